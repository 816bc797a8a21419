"""What the evaluation measures, on models whose answers are known."""

import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from benchmarks.evaluation import needles, perplexity
from benchmarks.evaluation.models import memories_of, new_cache
from benchmarks.evaluation.needles import Cell, answer
from benchmarks.evaluation.perplexity import Piece, bits_of_stream, gain, mean_bits
from benchmarks.evaluation.text import DIGITS, NEEDLE_LENGTH, Corpus, draw_needles
from benchmarks.evaluation.under_test import read, state_bytes
from fwpkm_kernels.integrations.cache import MemoryCacheLayer
from tests.helpers.evaluation_models import TINY, tiny_model

DOCUMENTS = {f"document {i}": bytes(random.Random(i).choices(range(97, 123), k=700 + 90 * i)) for i in range(5)}
CORPUS = Corpus(b"", DOCUMENTS)
ASKED = NEEDLE_LENGTH - len(".\n") - 1  #: bytes that a model is given to be asked: all but the last digit


class Reader:
    """A stand-in for a model: it predicts the codes that stand in what its cache has read, as `knows` has them."""

    device = torch.device("cpu")

    def __init__(self, knows):
        self.knows = knows

    def __call__(self, data, cache, use_cache, logits_to_keep):
        cache.layers[0].read += bytes(data[0].tolist())
        text = cache.layers[0].read
        logits = torch.zeros(1, logits_to_keep, 256)
        question = text[-ASKED : 1 - DIGITS]
        if logits_to_keep == DIGITS and question.startswith(b"\nthe access code of "):
            at = text.find(question)
            code = text[at + len(question) :][:DIGITS]
            is_hidden = at < len(text) - ASKED
            code = self.knows(at, code) if is_hidden else b"zzzzzz"
            for index, digit in enumerate(code):
                logits[0, index, digit] = 1.0
        return SimpleNamespace(logits=logits)


@pytest.fixture
def found(monkeypatch):
    """What `measure` yields for a stand-in."""
    monkeypatch.setattr(
        needles, "new_cache", lambda model: SimpleNamespace(layers=[SimpleNamespace(read=b"", x=torch.zeros(3))])
    )

    def run(knows, cell, seed=0):
        return list(needles.measure(Reader(knows), CORPUS, cell, seed))

    return run


def test_a_model_that_finds_all(found):
    (once, twice) = found(lambda at, code: code, Cell(2000, 3, 5, (1, 2)))
    for cell, readings in ((once, 1), (twice, 2)):
        assert (cell[:6], cell.by_depth) == ((2000, readings, 15, 15, 15 * DIGITS, 0), [3] * 5)
        assert cell.state_bytes == 12
    assert 0 <= once.seconds <= twice.seconds


def test_a_model_that_finds_none(found):
    (cell,) = found(lambda at, code: b"zzzzzz", Cell(2000, 2, 5, (1,)))
    assert (cell[:7], cell.by_depth) == ((2000, 1, 0, 10, 0, 0, 0), [0] * 5)


def test_one_digit_wrong_is_not_found(found):
    for place in range(DIGITS):
        (cell,) = found(lambda at, code, i=place: code[:i] + b"z" + code[i + 1 :], Cell(2000, 1, 4, (1,)))
        assert (cell[:6], cell.by_depth) == ((2000, 1, 0, 4, 4 * (DIGITS - 1), 0), [0] * 4)


def test_depth_is_counted_from_the_beginning(found):
    (cell,) = found(lambda at, code: code if at > 1000 else b"zzzzzz", Cell(2000, 3, 6, (1,)))
    assert cell.by_depth == [0, 0, 0, 3, 3, 3]
    assert cell.found == 9


def test_controls_that_are_found_are_counted(monkeypatch):
    """By a model that knows the needles' names without reading: here it is told both codes."""
    monkeypatch.setattr(needles, "new_cache", lambda model: SimpleNamespace(layers=[]))
    monkeypatch.setattr(needles, "read", lambda *arguments: None)
    monkeypatch.setattr(needles, "answer", lambda model, needle, cache: DIGITS)
    (cell,) = needles.measure(Reader(None), CORPUS, Cell(2000, 2, 5, (1,)), 0)
    assert (cell.found, cell.controls_found, cell.control_digits, cell.needles) == (10, 10, 10 * DIGITS, 10)


def test_contexts_follow_the_seed_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(needles, "new_cache", lambda model: SimpleNamespace(layers=[]))
    monkeypatch.setattr(needles, "read", lambda model, data, *rest: seen.append(bytes(data.tolist())))
    monkeypatch.setattr(needles, "answer", lambda *arguments: 0)
    for readings, seed in (((1,), 0), ((1,), 0), ((1,), 1)):
        list(needles.measure(Reader(None), CORPUS, Cell(1500, 2, 3, readings), seed))
    first, second, again, _, other, _ = seen
    assert first == again
    assert len({first, second, other}) == 3
    assert all(len(data) == 1500 for data in seen)


@pytest.mark.parametrize("model", ["swa+fwpkm", "full"])
@torch.no_grad()
def test_a_question_leaves_the_cache_as_it_was(model):
    model, rng = tiny_model(model), random.Random(0)
    (needle, other) = draw_needles(rng, 2, is_test=True)
    data = torch.randint(256, (90,), generator=torch.Generator().manual_seed(0))
    asked, untouched = new_cache(model), new_cache(model)
    read(model, data, asked)
    read(model, data, untouched)
    before = [x.memory.positions for x in asked.layers if hasattr(x, "memory")]
    right = [answer(model, x, asked) for x in (needle, other, needle)]
    assert right[0] == right[2]
    assert before == [x.memory.positions for x in asked.layers if hasattr(x, "memory")]
    follows = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(1))
    logits = [model(follows, cache=cache, use_cache=True).logits for cache in (asked, untouched)]
    assert logits[0].equal(logits[1])


@torch.no_grad()
def test_an_answer_is_right_where_greedy_decoding_is(monkeypatch):
    """Codes that the model decodes by itself are found, with all digits; after a change of one they are not.

    Digits of any bytes serve, as the model is not trained.
    """
    model, rng = tiny_model("swa+fwpkm"), random.Random(1)
    cache = new_cache(model)
    read(model, torch.randint(256, (70,), generator=torch.Generator().manual_seed(0)), cache)
    for needle in draw_needles(rng, 4, is_test=True):
        question = torch.tensor([list(needle.question)])
        copied, decoded = copy.deepcopy(cache), []
        token = question
        for _ in range(DIGITS):
            token = model(token, cache=copied, use_cache=True).logits[:, -1:].argmax(-1)
            decoded.append(int(token))
        for place in (None, 0, DIGITS - 1):
            code = [x ^ (i == place) for i, x in enumerate(decoded)]
            asked = SimpleNamespace(question=needle.question, code=SimpleNamespace(encode=lambda c=code: bytes(c)))
            assert (answer(model, asked, cache) == DIGITS) == (place is None)


@torch.no_grad()
def test_state_bytes_of_attention_grow_and_those_of_a_memory_do_not():
    sizes = {}
    for name in ("full", "swa", "swa+fwpkm"):
        model = tiny_model(name)
        cache, sizes[name] = new_cache(model), []
        empty = state_bytes(cache)  # a counter for each window
        assert empty <= 16
        for _ in range(3):
            read(model, torch.zeros(64, dtype=torch.int64), cache)
            sizes[name].append(state_bytes(cache) - empty)
    # Keys and values of two layers, two heads, eight numbers; beside them what the convolutions have read, 7 x 32.
    assert sizes["full"] == [4 * 2 * (2 * 2 * 8 * tokens + 7 * 32) for tokens in (64, 128, 192)]
    # A window of 8 goes on with its last 7 tokens.
    assert sizes["swa"] == [4 * 2 * 2 * 2 * 8 * 7] * 3
    ((memory,), table) = memories_of(tiny_model("swa+fwpkm")), 4 * (64 * 16 + 2 * 8 * 8)
    assert memory.keys.nbytes + memory.table.weight.nbytes == table
    assert len(set(sizes["swa+fwpkm"])) == 1
    assert sizes["swa"][0] + table < sizes["swa+fwpkm"][0] < sizes["swa"][0] + table + 16_384


def test_state_bytes_count_each_tensor_once():
    x = torch.zeros(10, 4)
    layer = SimpleNamespace(a=x, again=x, rows=[x[2:4], x[2:4]], table={0: x.view(4, 10), 1: None}, name="x", size=3)
    assert state_bytes(SimpleNamespace(layers=[layer])) == 160
    assert state_bytes(SimpleNamespace(layers=[SimpleNamespace(a=x[:2], b=x[5:6])])) == 48
    assert state_bytes(SimpleNamespace(layers=[layer, SimpleNamespace(y=torch.zeros(3))])) == 172


def piece(document, order, low, size, bits):
    return Piece(document, order, low, low + 100, size, bits)


def test_gain_is_a_ratio_of_sums_over_documents():
    """The first document has two pieces in the bucket, in two orders; what lies in other buckets does not count."""
    on = [
        piece("a", 0, 0, 50, 100.0),
        piece("b", 0, 0, 30, 90.0),
        piece("c", 0, 100, 9, 1.0),
        piece("a", 1, 0, 20, 50.0),
        piece("c", 1, 0, 100, 300.0),
    ]
    saved = [10.0, -3.0, 700.0, 5.0, 40.0]
    off = [x._replace(bits=x.bits + bits) for x, bits in zip(on, saved, strict=True)]
    mean, error = gain(on, off, 0)
    assert mean == pytest.approx((15 - 3 + 40) / 200)
    residuals = torch.tensor([15 - mean * 70, -3 - mean * 30, 40 - mean * 100], dtype=torch.float64)
    assert error == pytest.approx((3 / 2 * residuals.square().sum().item()) ** 0.5 / 200)
    assert gain(off, on, 0)[0] == pytest.approx(-mean)
    assert mean_bits(on, 0) == pytest.approx((100 + 90 + 50 + 300) / 200)
    assert mean_bits(on, 100) == pytest.approx(1 / 9)


def test_the_error_of_equal_documents_is_that_of_a_mean():
    saved = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    on = [piece(str(i), 0, 0, 50, 100.0) for i in range(8)]
    off = [x._replace(bits=100.0 + bits) for x, bits in zip(on, saved.tolist(), strict=True)]
    mean, error = gain(on, off, 0)
    assert mean == pytest.approx(saved.mean().item() / 50)
    assert error == pytest.approx(saved.std().item() / 8**0.5 / 50)


def test_one_document_has_no_error_to_speak_of():
    on = [piece("a", 0, 0, 50, 100.0)]
    assert gain(on, [on[0]._replace(bits=150.0)], 0) == (1.0, None)


def test_other_pieces_are_refused():
    on = [piece("a", 0, 0, 50, 100.0)]
    with pytest.raises(ValueError, match="must be of the same pieces of text"):
        gain(on, [on[0]._replace(bytes=49)], 0)
    with pytest.raises(ValueError, match="zip"):
        gain(on, [], 0)


@pytest.fixture(scope="module")
def model():
    model = tiny_model("swa+fwpkm")
    for memory in memories_of(model):  # what it reads is felt
        torch.nn.init.normal_(memory.o_proj.weight)
    return model


def stream(length):
    return torch.randint(97, 123, (length,), generator=torch.Generator().manual_seed(3))


def test_off_is_the_memory_of_the_beginning(model):
    """The same as with a table that is made anew before each chunk is read; only the convolution goes on."""
    data, (memory,) = stream(200), memories_of(model)
    before, table = memory.options, memory.table.weight.clone()
    off, on = (bits_of_stream(model, data, treatment, [0]) for treatment in ("off", "on"))
    assert memory.options == before
    assert memory.table.weight.equal(table)
    cache, logits = new_cache(model), []
    with torch.no_grad():
        for chunk in data[:-1].split(before.chunk_size):
            logits.append(model(chunk[None], cache=cache, use_cache=True).logits[0])
            (state,) = cache.layers[-1].memory._memories.states
            state.values.copy_(table)
            state.keys.copy_(memory.keys)
    direct = torch.nn.functional.cross_entropy(torch.cat(logits), data[1:], reduction="none") / math.log(2)
    torch.testing.assert_close(off, direct, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(off[: before.chunk_size - 1], on[: before.chunk_size - 1])
    assert (off - on).abs().max() > 1e-3


def test_options_come_back_after_an_exception(model):
    (memory,) = memories_of(model)
    before = memory.options

    def fail(count):
        assert memory.options.lr == 0.0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bits_of_stream(model, stream(40), "off", [0], fail)
    assert memory.options == before


def test_a_reset_at_each_document_begins_the_memory_anew():
    """And nothing else: what attention has seen stays. A new memory has no convolution to go on from: here is none."""
    memory = TINY.memory | {"query_conv": None}
    model = tiny_model("swa+fwpkm", memory=memory)
    torch.nn.init.normal_(memories_of(model)[0].o_proj.weight)
    starts = [40, 90]
    data = stream(120)
    for treatment, others in (("reset each document", starts), ("on", [])):
        bits = bits_of_stream(model, data, treatment, starts)
        assert bits.shape == (119,)
        expected = bits_with_resets(model, data, others)
        torch.testing.assert_close(bits, expected, rtol=1e-4, atol=1e-4)
    assert (bits[40:] - bits_of_stream(model, data, "reset each document", starts)[40:]).abs().max() > 1e-3


def test_a_reset_leaves_the_convolution_of_queries(model):
    """Where nothing is ever written, a reset changes nothing, wherever in a chunk it comes."""
    model = copy.deepcopy(model)
    (memory,) = memories_of(model)
    memory.options = memory.options._replace(lr=0.0)
    data = stream(120)
    reset, on = (bits_of_stream(model, data, treatment, [16, 45, 90]) for treatment in ("reset each document", "on"))
    torch.testing.assert_close(reset, on, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def bits_with_resets(model, data, resets):
    """Byte by byte, with a new memory at each of `resets`, and the others kept."""
    cache, logits = new_cache(model), []
    for at, byte in enumerate(data[:-1]):
        if at in resets:
            (memory,) = memories_of(model)
            cache.layers[-1] = MemoryCacheLayer(memory)
            cache.layers[-1].memory = memory.new_memory(1)
            cache.layers[-1].memory.columns = at
        logits.append(model(byte.view(1, 1), cache=cache, use_cache=True).logits[0])
    return torch.nn.functional.cross_entropy(torch.cat(logits), data[1:], reduction="none") / math.log(2)


def test_a_reset_every_4k_is_a_reset_at_multiples(model):
    data = stream(4096 + 200)
    every, given = (bits_of_stream(model, data, f"reset {what}", [4096]) for what in ("every 4K", "each document"))
    assert every.equal(given)
    on = bits_of_stream(model, data, "on", [])
    assert on[:4096].equal(every[:4096])
    assert (on[4096:] - every[4096:]).abs().max() > 1e-3


def test_another_treatment_is_refused(model):
    with pytest.raises(ValueError, match=r"`treatment` must be one of on, off, .*, got 'reset'"):
        bits_of_stream(model, stream(20), "reset", [0])


def test_pieces_are_of_documents_and_buckets(monkeypatch):
    """Each byte but the first is in one piece, with bits that here are its place."""
    monkeypatch.setattr(
        perplexity, "bits_of_stream", lambda model, data, *rest: torch.arange(1, len(data), dtype=torch.float32)
    )
    edges = (0, 500, 1000, 4000)
    pieces = perplexity.measure(SimpleNamespace(device="cpu"), CORPUS, "on", 2, 0, edges)
    for order in (0, 1):
        documents, at, expected = CORPUS.documents(random.Random(f"0 {order}")), 0, []
        places = {}
        for name, document in documents:
            for place in range(at, min(at + len(document), 4000)):
                low = max(edge for edge in edges[:-1] if edge <= place)
                if place > 0:
                    places.setdefault((name, order, low), []).append(place)
            at += len(document)
        for (name, _, low), inside in places.items():
            high = edges[edges.index(low) + 1]
            expected.append(Piece(name, order, low, high, len(inside), float(sum(inside))))
        assert [x for x in pieces if x.order == order] == expected
