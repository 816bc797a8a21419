"""FwPKM as an episodic memory that needs no training: ``python -m fwpkm_kernels.demo [FILE]``.

Memories of n² value rows read a text byte by byte, and after each byte predict the next. They are built from the
package's public functions alone: a MemoryState, fast_weight_memory_step to read and write, and product_key_lookup,
softmax and sparse_value_gather to probe. There is no network, no training, no other table, no n-gram count.

Queries
    Fixed random features of the last eight bytes that were read. Six hashed suffixes of these bytes each name one of n
    random vectors of a half, and the query half is the sum of the vectors so named: suffixes of 3 and 8 bytes in the
    first half, of 2, 4, 5 and 8 in the second. These vectors are also the sub-keys that a memory starts with. So the
    lookup finds them again by score, and their 2·4 pairs are the slots: one that depends on the last 3 bytes only, one
    on 4, one on 5, and five on all 8, so that a known short suffix answers where the long one is new. Vectors and
    hashes are random; nothing here depends on the text.
Targets
    A fixed random unit vector, the code, for each byte value. The predicted byte is the code nearest to the read.
Reading
    Token t is byte t: its query is made of the eight bytes up to it, its target is its own code. With lookahead=1 the
    memory pairs each query with the next target, so that a token's output predicts the byte after it, and is read
    before that byte is seen. Each step reads a chunk and then writes the pairs whose targets lie in it; the pair of the
    last byte read waits for the next chunk. Values start at zero, which predicts byte 0. Passes read the same stream
    again, one after the other, with the memory kept. The first byte of a pass is not counted: it is the last token of
    the pass before that predicts it, and in pass 1 there is none.
Memories
    Three memories read the same stream, one after the other, and differ in one thing from the first:

    - plain: step="paper", and no key step.
    - key-step: with the key step, of weight ``--addressing-weight``, which moves sub-keys toward being used evenly. The
      queries do not follow them.
    - normalized: step="normalized", and no key step.

    All else is the same: stream, queries, codes, initial memory, chunks, and the step size ``--lr`` of values and keys.
Needles
    ``the access code of NAME is 123456``, with random names and codes. Each has a depth d, and is hidden in the text so
    that its last digit ends a chunk: all its digits are written with that chunk. When exactly d other bytes have been
    read since, it is probed, which writes nothing: each digit is predicted from the true eight bytes before it, and the
    needle is found if all are right. These eight bytes are nowhere else in the text or the needles. In pass p a needle
    has been read p times. Chance is measured beside it: a control, a sentence of the same form that is never read, is
    probed at the same moments. Guessing digits would find one code in 10⁶.

Accuracy counts the bytes of the text, not those of the needles. A text too short for one pass is repeated. The same
seed gives the same numbers, bit for bit, on the same machine with the same versions and number of threads.
"""
