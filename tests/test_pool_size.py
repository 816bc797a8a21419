"""What a session of a pool takes at the paper's size: a table of 512² rows of 512 floats, 512 MiB."""

import pytest
import torch

from fwpkm_kernels import MemoryPool, fast_weight_memory_step


def test_a_session_of_any_4096_tokens():
    """At most 70 MiB, also where no two accesses meet; 16 sessions in two tables, where 8 in 100 repeat a slot."""
    n, width, accesses = 512, 512, 4096 * 8
    keys, values = torch.zeros(1, 2, n, width // 2), torch.empty(n * n, width)  # the table is never read
    pool = MemoryPool(keys, values, capacity=0)
    session = pool.open()
    queries, targets = torch.zeros(1, 0, 1, width), torch.zeros(1, 0, width)
    fast_weight_memory_step(pool, queries, targets, sessions=[session])
    besides = pool.num_bytes(session) + keys.nbytes  # which move
    assert besides + accesses * values[0].nbytes <= 70 * 2**20
    rows = int(accesses * 0.92)
    assert 16 * (besides + rows * values[0].nbytes) <= 2 * values.nbytes


@pytest.mark.slow
def test_a_session_at_the_papers_size():
    """4 096 random tokens take at most 70 MiB, and 16 sessions at most what two tables take."""
    n, width, mebi = 512, 512, 2**20
    generator = torch.Generator().manual_seed(0)
    keys = torch.rand(1, 2, n, width // 2, generator=generator) * 2 - 1
    values = torch.randn(n * n, width, generator=generator)
    pool = MemoryPool(keys, values, capacity="80 MiB")
    session = pool.open()
    for _ in range(8):
        queries, targets = (torch.randn(1, 512, *shape, generator=generator) for shape in ((1, width), (width,)))
        fast_weight_memory_step(pool, queries, targets, sessions=[session])
    assert pool.position(session) == 4096
    assert pool.num_bytes(session) <= 70 * mebi
    assert 16 * pool.num_bytes(session) <= 2 * values.nbytes
