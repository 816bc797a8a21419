"""The demo: its protocol (predict, then read and write; probe each needle at its depth), its memories, its messages."""

import dataclasses
import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch

from fwpkm_kernels import chunk_value_update_, product_key_lookup, sparse_value_gather
from fwpkm_kernels._commands import CommandError
from fwpkm_kernels.demo import __main__ as program
from fwpkm_kernels.demo import memory as memories
from fwpkm_kernels.demo import stream as streams
from fwpkm_kernels.demo.memory import MEMORIES, EpisodicMemory, Options, set_up
from fwpkm_kernels.demo.stream import (
    chunks_in_pass,
    code_contexts,
    default_text,
    is_found,
    make_sentences,
    make_stream,
    read_pass,
    read_text,
    to_tensor,
)
from tests.helpers.files import FULL

SMALL = Options(
    passes=2,
    device="cpu",
    text_bytes=4096,
    needles=3,
    depths=(128, 1024),
    sub_keys=64,
    query_width=128,
    value_width=64,
    chunk_size=64,
)
SMALL_ARGUMENTS = ["--depths", "128", "1024"]
SMALL_ARGUMENTS += ["--device=cpu", "--passes=2", "--text-bytes=4096", "--needles=3", "--chunk-size=64"]
SMALL_ARGUMENTS += ["--sub-keys=64", "--query-width=128", "--value-width=64"]


def prose(size=6000, seed=0):
    """Words of a small vocabulary: short contexts repeat, long ones less often."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("abcdefghijklmnopqrst") for _ in range(rng.randint(2, 8))) for _ in range(60)]
    return " ".join(rng.choice(words) for _ in range(size // 3)).encode()[:size]


def run(options, text=None, name="plain"):
    """A memory, and the results of its passes over a text."""
    stream = make_stream(prose() if text is None else text, options)
    memory = EpisodicMemory(options, name)
    return memory, [read_pass(memory, stream, lambda count: None) for _ in range(options.passes)]


def numbers(results):
    return [(r.accuracy, r.found, r.controls_found) for r in results]


def same_state(one, other):
    """Whether two state_dicts agree bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


@pytest.mark.parametrize("name", MEMORIES)
def test_same_seed_gives_the_same_numbers_bitwise(name):
    memory, results = run(SMALL, name=name)
    again, results_again = run(SMALL, name=name)
    assert numbers(results) == numbers(results_again)
    assert same_state(memory.state.state_dict(), again.state.state_dict())
    other, results_other = run(dataclasses.replace(SMALL, seed=1), name=name)
    assert numbers(results) != numbers(results_other)
    assert not torch.equal(memory.features, other.features)
    assert not torch.equal(memory.state.keys, other.state.keys)


@pytest.mark.parametrize("name", MEMORIES)
def test_a_second_pass_knows_more_and_the_needles(name):
    _, (first, second) = run(SMALL, name=name)
    assert 0.3 < first.accuracy < second.accuracy
    assert sum(second.found) >= 5  # of 6
    assert first.controls_found == second.controls_found == [0, 0]


def test_the_memories_differ_in_what_they_say_they_differ_in():
    (plain, _), (key_step, _), (normalized, _) = (run(SMALL, name=name) for name in MEMORIES)
    assert torch.equal(plain.state.keys, plain.features)
    assert torch.equal(normalized.state.keys, plain.features)
    assert not torch.equal(key_step.state.keys, plain.features)
    assert torch.equal(key_step.features, plain.features)  # the queries do not follow the sub-keys
    tables = [memory.state.values for memory in (plain, key_step, normalized)]
    for i in range(3):
        assert (tables[i] - tables[i - 1]).abs().max() > 1e-3
    far = dataclasses.replace(SMALL, addressing_weight=20.0)
    assert (run(far, name="key-step")[0].state.keys - plain.features).norm() > 2 * (
        key_step.state.keys - plain.features
    ).norm()
    assert torch.equal(run(far)[0].state.values, plain.state.values)  # the others have no key step


def by_hand(stream, options, memory):
    """The bytes that a plain memory predicts in its first pass, and its values after it, from the three operations."""
    codes, keys, size = memory.codes, memory.features, options.chunk_size
    values = torch.zeros(options.sub_keys**2, options.value_width)
    context = b"\n" * 7 + stream.data

    def read(first, stop):
        queries = memory.queries(to_tensor([context[t : t + 8] for t in range(first, stop)], "cpu"))
        scores, slots = product_key_lookup(queries, keys, options.top_k)
        slots, weights = slots.flatten(1), torch.softmax(scores.flatten(1), dim=-1)
        return slots, weights, sparse_value_gather(values, slots, weights)

    predicted = []
    for start in range(0, len(stream.data), size):
        first, stop = max(start - 1, 0), start + size
        slots, weights, reads = read(first, stop)
        predicted += (reads @ codes.T).argmax(-1).tolist()[start - first :]
        pairs = slice(0, stop - 1 - first)  # the pair of the last token waits for its target
        targets = codes[list(stream.data[first + 1 : stop])]
        chunk_value_update_(values, slots[pairs], weights[pairs], targets, reads[pairs], lr=options.lr)
    return bytes(predicted), values


def test_a_plain_first_pass_is_that_of_the_three_operations():
    stream = make_stream(prose(), SMALL)
    memory = EpisodicMemory(SMALL, "plain")
    result = read_pass(memory, stream, lambda count: None)
    predicted, values = by_hand(stream, SMALL, memory)
    torch.testing.assert_close(memory.state.values, values, rtol=1e-5, atol=1e-6)
    text = list(zip(predicted, stream.data[1:], stream.is_text[1:], strict=False))
    assert result.accuracy == sum(a == b for a, b, counts in text if counts) / sum(stream.is_text[1:])
    # Cut anywhere, and predictions are the same bytes.
    memory = EpisodicMemory(SMALL, "plain")
    data = to_tensor([stream.data], "cpu")[0]
    assert bytes(torch.cat([memory.read(part) for part in data.split(37)]).tolist()) == predicted
    torch.testing.assert_close(memory.state.values, values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MEMORIES)
def test_probes_change_nothing(name):
    memory = EpisodicMemory(SMALL, name)
    memory.read(to_tensor([prose(200)], "cpu")[0])  # 3 chunks and a part of one
    before, recent = memory.state.state_dict(), memory.recent.clone()
    is_found(memory, make_sentences(4, b"", random.Random(0)))
    memory.recall(to_tensor([b"whatever", b"anything"], "cpu"))
    assert same_state(memory.state.state_dict(), before)
    assert torch.equal(memory.recent, recent)
    assert memory.state.position == 200


def test_every_byte_is_predicted_before_it_is_written():
    # Nobody can predict random bytes that are read for the first time; a read after the write could.
    rng = random.Random(3)
    text = bytes(rng.randrange(1, 256) for _ in range(SMALL.text_bytes * 2))
    _, (first, second) = run(dataclasses.replace(SMALL, sub_keys=128), text)
    assert first.accuracy < 0.02
    assert second.accuracy > 0.5


@pytest.mark.parametrize("name", MEMORIES)
def test_memory_starts_knowing_nothing(name):
    memory = EpisodicMemory(SMALL, name)
    assert not memory.state.values.any()
    assert memory.state.position == 0
    assert torch.equal(memory.state.keys, memory.features)
    contexts = to_tensor([b"whatever", b"anything"], "cpu")
    assert memory.recall(contexts).tolist() == [0, 0]


def ending_a_chunk(sentence):
    """A chunk of which a sentence is the end."""
    return to_tensor([b" " * (SMALL.chunk_size - len(sentence)) + sentence], "cpu")[0]


@pytest.mark.parametrize("name", MEMORIES)
def test_a_written_needle_is_found_and_one_never_written_is_not(name):
    memory = EpisodicMemory(SMALL, name)
    hidden, control = make_sentences(2, b"", random.Random(0))
    assert is_found(memory, [hidden, control]) == [False, False]
    chunk = ending_a_chunk(hidden)
    memory.read(chunk[:-1])
    assert not memory.state.values.any()  # reading changes nothing before the chunk is full
    assert is_found(memory, [hidden, control]) == [False, False]
    memory.read(chunk[-1:])  # its last digit is written with its own chunk
    assert is_found(memory, [hidden, control]) == [True, False]


def test_one_wrong_digit_is_not_found():
    memory = EpisodicMemory(SMALL, "plain")
    (hidden,) = make_sentences(1, b"", random.Random(0))
    wrong = bytearray(hidden)
    wrong[-1] = ord("0") + (wrong[-1] - ord("0") + 1) % 10
    memory.read(ending_a_chunk(bytes(wrong)))
    assert is_found(memory, [hidden, bytes(wrong)]) == [False, True]


def test_contexts_are_the_true_eight_bytes_before_each_digit():
    sentence = b"\nthe access code of banana is 123456"
    assert code_contexts(sentence)[0] == b"nana is "
    assert code_contexts(sentence)[-1] == b"is 12345"


def test_needles_are_hidden_once_and_their_contexts_are_unique():
    text = prose()
    stream = make_stream(text, SMALL)
    assert len(stream.needles) == 6
    assert len(stream.data) == len(stream.is_text) == chunks_in_pass(SMALL) * SMALL.chunk_size
    shown = bytes(byte for byte, is_text in zip(stream.data, stream.is_text, strict=True) if is_text)
    assert shown == (text + text)[: len(shown)]
    assert len(shown) >= SMALL.text_bytes
    for needle in stream.needles:
        end = (needle.chunk + 1) * SMALL.chunk_size
        assert stream.data[:end].endswith(needle.text)
        assert end + needle.depth <= len(stream.data)
        contexts, control_contexts = map(code_contexts, (needle.text, needle.control))
        assert all(stream.data.count(context) == 1 for context in contexts)
        assert not any(context in stream.data for context in control_contexts)


def test_needles_are_probed_when_exactly_their_depth_has_been_read(monkeypatch):
    probes = []

    def recording_is_found(memory, sentences):
        assert memory.state.position % SMALL.chunk_size == 0  # all that was read is written, but for the last pair
        probes.append((sentences, memory.state.position))
        return [True, False]

    monkeypatch.setattr(streams, "is_found", recording_is_found)
    stream = make_stream(prose(), SMALL)
    result = read_pass(EpisodicMemory(SMALL, "plain"), stream, lambda count: None)
    assert result.found == [3, 3]
    assert result.controls_found == [0, 0]
    depths = {(needle.text, needle.control): needle.depth for needle in stream.needles}
    assert len(probes) == len(depths)
    for sentences, at in probes:
        end_of_needle = stream.data.index(sentences[0]) + len(sentences[0])
        assert at - end_of_needle == depths[tuple(sentences)]


def test_a_short_text_is_repeated():
    stream = make_stream(b"abc", SMALL)
    assert stream.data.startswith(b"abcabc")
    assert sum(stream.is_text) >= SMALL.text_bytes


def test_default_text_is_long_enough_and_defaults_are_the_papers_memory():
    options = Options()
    text = default_text()
    stream = make_stream(text, options)
    assert len(text) > sum(stream.is_text) >= 131072
    assert {needle.depth for needle in stream.needles} == {4096, 16384, 65536, 131072}
    sizes = (options.sub_keys, options.top_k, options.query_width, options.value_width, options.chunk_size)
    assert sizes == (512, 8, 512, 512, 512)


def failure(capsys, *argv):
    """The one line that the demo says when it refuses its command line."""
    assert program.main([str(argument) for argument in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("demo: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"some text\0 and more", "binary file: byte 9"),
        (b"\x89PNG\r\n\x1a\n", "binary file: byte 6 is 0x1a"),
        ("déjà vu".encode("utf-16"), "binary file: byte 3 is 0x00"),
    ],
)
def test_unreadable_files_get_one_clear_line(tmp_path, capsys, content, message):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    line = failure(capsys, path)
    assert message in line
    assert str(path) in line


def test_a_directory_gets_one_clear_line(tmp_path, capsys):
    assert "Is a directory" in failure(capsys, tmp_path)


def need_demo_extra() -> None:
    for module in ("matplotlib", "rich", "tqdm"):
        pytest.importorskip(module)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--passes=0"], "--passes must be positive"),
        (["--lr=nan"], "--lr must be positive"),
        (["--chunk-size=20"], "--chunk-size must hold a needle"),
        (["--depths", "1000"], "--depths must be different multiples of --chunk-size 512"),
        (["--top-k=9", "--sub-keys=8"], "--top-k at most --sub-keys"),
        (["--addressing-weight=0"], "--addressing-weight must be positive"),
        (["--memories", "plain", "plain"], "--memories must be different"),
        (["--device=abacus"], "cannot set up the memory"),
        (["--plot=missing/demo.png"], "cannot write missing/demo.png"),
    ],
)
def test_impossible_options_get_one_clear_line(here, capsys, arguments, message):
    need_demo_extra()
    assert program.main(arguments) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--plot=folder"], "cannot write folder: Is a directory"),
        (["--json=folder"], "cannot write folder: Is a directory"),
        (["--json=missing/result.json"], "cannot write missing/result.json: No such file"),
        (["--json=text/result.json"], "cannot write text/result.json: Not a directory"),
        (["--plot=link"], "cannot write link: No such file"),
        (["--plot=result", "--json=./result"], "cannot write result: it is the same file as result"),
        (["--json=text"], "cannot write text: it is the file that is read"),
        (["--plot=" + "n" * 256], "File name too long"),
    ],
)
def test_outputs_are_tried_before_a_byte_is_read(here, capsys, monkeypatch, arguments, message):
    monkeypatch.delattr(program, "read_text")
    (here / "text").write_bytes(prose())
    (here / "folder").mkdir()
    (here / "link").symlink_to("missing/demo.png")
    assert message in failure(capsys, "text", *arguments)
    assert sorted(os.listdir(here)) == ["folder", "link", "text"]


def test_a_current_folder_that_is_gone_gets_one_clear_line(here, capsys):
    (here / "gone").mkdir()
    os.chdir("gone")
    (here / "gone").rmdir()
    assert "cannot write demo.png: No such file" in failure(capsys)


@FULL
def test_an_output_that_fails_costs_no_other(here, capsys, monkeypatch):
    need_demo_extra()
    (here / "text").write_bytes(prose())
    (here / "plot").write_bytes(b"old")
    (here / "demo.png").symlink_to("plot")
    arguments = ["text", "--memories=plain", *FEW_ARGUMENTS]

    def told(*outputs):
        assert program.main([*arguments, *outputs]) == 2
        captured = capsys.readouterr()
        assert "Needles found" in captured.out
        return captured.err.splitlines()[-1]

    full = "cannot write /dev/full: No space left on device"
    assert told("--plot=/dev/full", "--json=kept.json") == f"demo: error: {full}"
    assert list(json.loads((here / "kept.json").read_text())["memories"]) == ["plain"]
    assert told("--json=/dev/full") == f"demo: error: {full}"
    assert (here / "plot").read_bytes().startswith(b"\x89PNG")
    assert told("--plot=/dev/full", "--json=/dev/full") == f"demo: error: {full}; {full}"

    def no_plot(*args):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(program, "plot", no_plot)
    with pytest.raises(RuntimeError, match="no fonts"):
        program.main([*arguments, "--json=again.json"])
    assert "Needles found" in capsys.readouterr().out
    assert sorted(os.listdir(here)) == ["again.json", "demo.png", "kept.json", "plot", "text"]


def test_a_missing_extra_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert "pip install 'fwpkm_kernels[demo]'" in failure(capsys)


def test_a_folder_that_torch_lacks_gets_one_clear_line(monkeypatch):
    def no_folder(*args):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(memories, "EpisodicMemory", no_folder)
    with pytest.raises(CommandError, match="a cache or temporary folder that it can use: .*No usable temporary"):
        set_up(SMALL, "plain")


def test_names_are_shown_on_one_line(here, capsys):
    need_demo_extra()
    Path("te\nxt").write_bytes(prose())
    assert program.main(["te\nxt", "--plot=pl\not", "--memories=plain", *FEW_ARGUMENTS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("text: te\\nxt, ")
    assert lines[-1] == "plot: pl\\not"


def test_a_character_cut_by_the_limit_is_no_error(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("ééé".encode())
    assert read_text(path, 3) == "ééé".encode()[:3]


def test_the_command_shows_tables_and_writes_plot_and_json(here, capsys):
    need_demo_extra()
    (here / "text").write_bytes(prose())
    assert program.main(["text", "--json", "result.json", *SMALL_ARGUMENTS]) == 0
    shown = capsys.readouterr()
    for name in MEMORIES:
        assert shown.out.count(f" {name} ") == 2  # a row in each table
    for words in ("Accuracy by pass", "bytes/s", "Needles found", "after 1K", "never (chance)", "sub_keys=64"):
        assert words in shown.out
    assert "100%" in shown.err  # the progress bar
    assert (here / "demo.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((here / "result.json").read_text())
    assert list(report["memories"]) == list(MEMORIES)
    for name, memory in report["memories"].items():
        _, results = run(SMALL, name=name)
        assert [(p["accuracy"], p["found"], p["controls_found"]) for p in memory["passes"]] == numbers(results)
        assert (memory["step"], memory["addressing_weight"]) == {
            "plain": ("paper", 0.0),
            "key-step": ("paper", 1.0),
            "normalized": ("normalized", 0.0),
        }[name]


def test_the_command_reads_with_the_memories_asked_for(here, capsys):
    need_demo_extra()
    (here / "text").write_bytes(prose())
    arguments = ["text", "--json=result.json", "--memories", "normalized", *SMALL_ARGUMENTS]
    assert program.main(arguments) == 0
    shown = capsys.readouterr()
    assert " normalized " in shown.out
    assert " plain " not in shown.out
    assert list(json.loads((here / "result.json").read_text())["memories"]) == ["normalized"]


@pytest.fixture(params=["meta", torch.float64, torch.bfloat16], ids=str)
def ambient(request):
    """What a process may have set for all of its tensors."""
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    if isinstance(request.param, str):
        torch.set_default_device(request.param)
    else:
        torch.set_default_dtype(request.param)
    yield
    torch.set_default_device(None if device == torch.device("cpu") else device)
    torch.set_default_dtype(dtype)


FEW_ARGUMENTS = [*SMALL_ARGUMENTS, "--passes=1", "--text-bytes=512", "--depths", "128"]


def few_numbers():
    """What the command finds in a few bytes."""
    assert program.main(["text", *FEW_ARGUMENTS, "--plot=/dev/null", "--json=result.json"]) == 0
    memories = json.loads(Path("result.json").read_text())["memories"]
    return [(p["accuracy"], p["found"]) for memory in memories.values() for p in memory["passes"]]


@pytest.fixture
def expected(here):
    need_demo_extra()
    (here / "text").write_bytes(prose())
    return few_numbers()


def test_defaults_of_the_process_change_nothing(expected, ambient):
    assert few_numbers() == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMORIES)
def test_the_papers_memory_on_the_default_text(name):
    passes = 4 if name == "plain" else 2
    _, results = run(Options(device="cpu", passes=passes), default_text(), name)
    assert results[0].accuracy > 0.55
    assert results[-1].accuracy > 0.80
    assert all(found >= 10 for found in results[0].found)  # of 16, read once
    assert all(found >= passes // 2 + 13 for found in results[-1].found)
    assert sum(sum(result.controls_found) for result in results) == 0
