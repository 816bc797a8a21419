"""Associative recall in the evaluation: what rows ask for, what is counted, and training that can be repeated."""

import dataclasses
import json
import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from benchmarks.evaluation import mqar
from benchmarks.evaluation.models import MODELS, count_parameters, size_options
from benchmarks.evaluation.mqar import CONTROLS, KEYS, NONE, VALUES, MqarTrainer, Rows, make_options, make_rows
from benchmarks.evaluation.options import Phase

KINDS = [(256, 4, False), (256, 32, True), (256, 64, False), (97, 7, True), (1024, 128, True)]


def is_value(token: int) -> bool:
    return KEYS <= token < KEYS + VALUES


def given_in(tokens: list[int]) -> dict[int, list[int]]:
    """The values of each key in a first half, in their order, where it is read from its beginning to its end."""
    given: dict[int, list[int]] = {}
    at = 0
    while at < len(tokens):
        if tokens[at] < KEYS:
            assert is_value(tokens[at + 1])
            given.setdefault(tokens[at], []).append(tokens[at + 1])
            at += 1
        else:
            assert tokens[at] >= KEYS + VALUES
        at += 1
    return given


@pytest.mark.parametrize("length, pairs, overwrite", KINDS)
def test_each_query_asks_for_the_last_value_of_a_key_that_was_given(length, pairs, overwrite):
    rows = make_rows(3, length, pairs, overwrite, random.Random(0))
    assert all(x.shape == (3, length) and x.dtype == torch.int64 for x in rows)
    for tokens, answers, older, controls in zip(*(x.tolist() for x in rows), strict=True):
        half = length // 2
        given = given_in(tokens[:half])
        assert len(given) == pairs
        assert sum(len(values) == 2 for values in given.values()) == pairs // 2 * overwrite
        assert all(len(values) <= 2 and len(set(values)) == len(values) for values in given.values())
        asked = [token for token in tokens[half:] if token < KEYS]
        assert not any(is_value(token) for token in tokens[half:])
        assert len(asked) == len(set(asked)) == pairs + CONTROLS
        assert set(given) < set(asked)
        for at, token in enumerate(tokens):
            found = (answers[at], older[at], controls[at])
            if at < half or token >= KEYS:
                assert found == (NONE, NONE, NONE)
            elif token in given:
                values = given[token]
                assert found == (values[-1], values[0] if len(values) == 2 else NONE, NONE)
            else:
                assert found[:2] == (NONE, NONE)
                assert controls[at] in {values[-1] for values in given.values()}


def test_rows_follow_from_their_seed():
    first, again, other = (make_rows(2, 256, 8, True, random.Random(seed)) for seed in ("a", "a", "b"))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first.tokens, other.tokens)
    assert not torch.equal(first.tokens[0], first.tokens[1])


def test_places_and_keys_are_drawn_from_all_that_there_are():
    rows = make_rows(400, 64, 8, True, random.Random(0))
    for keys, places in ((rows.tokens[:, :32] < KEYS, range(31)), (rows.tokens[:, 32:] < KEYS, range(32))):
        assert keys.any(0).nonzero().flatten().tolist() == list(places)
    assert rows.tokens.unique().tolist() == list(range(256))


@pytest.mark.parametrize("length, pairs, overwrite", [(256, 64, False), (256, 42, True), (4096, KEYS - CONTROLS, True)])
def test_rows_that_are_too_full_are_refused(length, pairs, overwrite):
    make_rows(1, length, pairs, overwrite, random.Random(0))
    for wrong in (pairs + 1 + overwrite, 0):
        with pytest.raises(ValueError, match=f"`pairs` must fit into a row, got {wrong} of {length} tokens"):
            make_rows(1, length, wrong, overwrite, random.Random(0))


def test_what_is_counted():
    #             filler, key given twice, key given once, two controls, key given twice
    answers = torch.tensor([[NONE, 170, 171, NONE, NONE, 172]])
    older = torch.tensor([[NONE, 180, NONE, NONE, NONE, 182]])
    controls = torch.tensor([[NONE, NONE, NONE, 171, 170, NONE]])
    rows = Rows(torch.zeros_like(answers), answers, older, controls)
    names = ("right", "asked", "overwritten_right", "overwritten", "stale", "controls_right", "controls")
    for predictions, expected in {
        (170, 170, 171, 171, 170, 172): (3, 3, 2, 2, 0, 2, 2),
        (180, 180, 171, 180, 171, 182): (1, 3, 0, 2, 2, 0, 2),
        (170, 172, 170, 170, 170, 172): (1, 3, 1, 2, 0, 1, 2),
    }.items():
        counts = mqar.count(torch.tensor([predictions]), rows)
        assert dict(zip(names, counts, strict=True)) == dict(zip(names, expected, strict=True))


class Scripted:
    """A model that predicts the first or the last value that a row gives for a key."""

    device = torch.device("cpu")

    def __init__(self, which: int) -> None:
        self.which = which

    def __call__(self, tokens: torch.Tensor, cache: object = None, **kwargs: object) -> SimpleNamespace | None:
        if cache is not None:  # read for the size of it
            return None
        (row,) = tokens.tolist()
        given = given_in(row[: len(row) // 2])
        predictions = torch.tensor([[given.get(token, [KEYS])[self.which] for token in row]])
        return SimpleNamespace(logits=torch.nn.functional.one_hot(predictions, 256))


def test_a_model_is_right_with_the_last_value_and_stale_with_the_first(monkeypatch):
    monkeypatch.setattr(mqar, "new_cache", lambda model: SimpleNamespace(layers=[]))
    recall = mqar.measure(Scripted(-1), 256, 32, True, 3, 0)
    assert (recall.right, recall.asked, recall.overwritten_right, recall.overwritten) == (96, 96, 48, 48)
    assert (recall.stale, recall.controls, recall.chance, recall.state_bytes) == (0, 3 * CONTROLS, 1 / VALUES, 0)
    recall = mqar.measure(Scripted(0), 256, 32, True, 3, 0)
    assert (recall.right, recall.overwritten_right, recall.stale) == (48, 0, 48)
    assert recall.controls_right < 12  # one value predicted after all of them is another key's now and then


def small(model: str = "swa+fwpkm", seed: int = 0, steps: int = 2) -> MqarTrainer:
    return MqarTrainer(dataclasses.replace(make_options(model, seed, steps), plan=(Phase(256, 1, steps),)))


def test_training_and_tests_share_no_seed(monkeypatch):
    used: dict[str, list[object]] = {"training": [], "tests": []}

    class Noted(random.Random):
        def __init__(self, seed: object) -> None:
            used[now].append(seed)
            super().__init__(seed)

    monkeypatch.setattr(mqar, "random", SimpleNamespace(Random=Noted))
    monkeypatch.setattr(mqar, "new_cache", lambda model: SimpleNamespace(layers=[]))
    trainer = small(steps=40)
    now = "training"
    for trainer.step in range(40):
        for part in range(2):
            trainer.batch(part)
    now = "tests"
    for kind in KINDS:
        mqar.measure(Scripted(-1), *kind, 1, 0)
    assert len(set(used["training"])) == 80
    assert len(set(used["tests"])) == len(KINDS)
    assert not set(used["training"]) & set(used["tests"])


def test_training_is_deterministic_and_of_the_answers_alone():
    first, again, other = (small(seed=seed) for seed in (0, 0, 1))
    for trainer in (first, again, other):
        while not trainer.is_done:
            trainer.train_step()
    trained, same, drawn = (trainer.model.state_dict() for trainer in (first, again, other))
    assert all(torch.equal(x, same[name]) for name, x in trained.items())
    assert not torch.equal(trained["lm_head.weight"], drawn["lm_head.weight"])
    first.step = 0
    tokens, answers = first.batch(0)
    loss, figures = first.loss(tokens, answers)
    logits = first.model(tokens).logits.log_softmax(-1)
    asked = (answers != NONE).nonzero().tolist()
    expected = -sum(logits[row, at, answers[row, at]] for row, at in asked) / len(asked)
    right = sum(logits[row, at].argmax() == answers[row, at] for row, at in asked) / len(asked)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(figures[1:3], torch.stack((expected.detach(), right)))


def test_models_are_of_one_size():
    for model in MODELS:
        others, _ = count_parameters(MqarTrainer(make_options(model, 0)).model)
        assert abs(others - mqar.SIZE.parameters) <= 3 * mqar.SIZE.hidden_size, model


def test_a_window_keeps_as_much_of_any_length_and_a_memory_at_most_its_rows():
    kept = {
        model: [mqar.measure(trained, length, 8, False, 1, 0).state_bytes for length in (64, 128)]
        for model in ("swa", "swa+fwpkm", "full")
        for trained in [small(model).model.eval()]
    }
    assert kept["swa"][0] == kept["swa"][1] < kept["swa+fwpkm"][0] < kept["swa+fwpkm"][1]
    first, second = (bytes_ - kept["swa"][0] for bytes_ in kept["swa+fwpkm"])
    assert second - first < first  # queue, index and keys are kept of any length
    assert 1.9 < kept["full"][1] / kept["full"][0] <= 2


def test_the_program_appends_a_line_for_each_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(mqar, "LENGTHS", (64, 256))
    out = tmp_path / "mqar.jsonl"
    out.write_text('{"kept": 1}\n')
    assert mqar.main(["--model", "swa", "--seed", "3", "--steps", "1", "--keys", "8", "--out", str(out)]) == 0
    kept, *lines = map(json.loads, out.read_text("utf-8").splitlines())
    cells = [(64, 8, False), (64, 8, True), (256, 8, False), (256, 8, True), (256, 32, False), (256, 32, True)]
    assert kept == {"kept": 1}
    assert [(line["length"], line["pairs"], line["overwrite"]) for line in lines] == cells
    for line in lines:
        assert line["asked"] == 2 * line["pairs"]
        assert line["overwritten"] == line["overwrite"] * line["pairs"]
        assert (line["model"], line["seed"], line["training_steps"], line["training_tokens"]) == ("swa", 3, 1, 2048)
        assert line["options"]["seed"] == 3
        assert {"commit", "versions"} < set(line)
        assert line["size_options"] == json.loads(json.dumps(size_options(mqar.SIZE)))


@pytest.mark.parametrize("name", ["steps", "keys"])
def test_nothing_is_not_trained_nor_asked(tmp_path, capsys, name):
    assert mqar.main([f"--{name}=0", f"--out={tmp_path / 'new'}"]) == 2
    assert capsys.readouterr().err == f"mqar: error: --{name} must be at least 1, got 0\n"


@pytest.mark.slow
def test_a_memory_learns_it_and_the_last_value():
    trainer = mqar.train_mqar(make_options("swa+fwpkm", 0, 80))
    recall = mqar.measure(trainer.model, 1024, 32, True, 4, 0)
    assert recall.right >= 0.9 * recall.asked
    assert recall.stale <= 0.1 * recall.overwritten
    assert recall.controls_right <= 0.2 * recall.controls
