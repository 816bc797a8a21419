"""The text of the evaluation: nothing held out is trained on, and needles are where they should be."""

import random

import pytest

from benchmarks.evaluation.text import (
    DIGITS,
    NEEDLE_LENGTH,
    Corpus,
    Needle,
    context,
    draw_needles,
    hide,
    python_text,
    read_files,
    training_batch,
    training_row,
)

PLAIN = bytes(range(65, 91)) * 400


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """Seconds of work: for what is said of this text alone."""
    return python_text()


def test_no_held_out_text_is_trained_on(corpus):
    words = corpus.training.split()
    trained = {tuple(words[i : i + 12]) for i in range(len(words))}
    for name, document in corpus.held_out.items():
        assert document.strip() not in corpus.training, name
        for line in document.split(b"\n"):
            assert len(line) < 80 or line.strip() not in corpus.training, (name, line)
        words = document.split()
        leaked = [words[i : i + 12] for i in range(len(words) - 11) if tuple(words[i : i + 12]) in trained]
        assert not leaked, (name, leaked[:3])


def test_held_out_text_suffices_for_the_longest_context(corpus):
    """A context of 128K is read without a document coming twice, nor a part of one within another."""
    assert sum(map(len, corpus.held_out.values())) > 131_072
    assert len(corpus.training) > 1_000_000
    runs = [
        {tuple(words[i : i + 12]) for i in range(len(words) - 11)}
        for words in map(bytes.split, corpus.held_out.values())
    ]
    assert len(set().union(*runs)) == sum(map(len, runs))


def test_a_drawn_order_has_every_document_once():
    corpus = Corpus(b"", {str(number): b"%d" % number for number in range(9)})
    documents = corpus.documents(random.Random(1))
    assert dict(documents) == corpus.held_out
    assert documents == corpus.documents(random.Random(1))
    assert documents != corpus.documents(random.Random(2))
    assert corpus.stream(random.Random(1)) == b"".join(document for _, document in documents)


def test_needles_of_tests_have_names_of_their_own(corpus):
    """Names can be told apart by a rule alone, so that no list has to be kept; neither kind is in the text."""
    rng = random.Random(0)
    for_tests = {needle.name for needle in draw_needles(rng, 3000, is_test=True)}
    others = {needle.name for needle in draw_needles(rng, 3000, is_test=False)}
    assert len(for_tests) == len(others) == 3000
    assert not for_tests & others
    assert b"the access code of" not in corpus.training + corpus.stream(rng)


def test_rows_of_training_have_no_name_of_a_test():
    rng, seen = random.Random(3), set()
    for _ in range(50):
        data, _ = training_row(Corpus(PLAIN, {}), 2048, 6, 1, 200, rng)
        seen |= {part[:6].decode() for part in data.split(b"the access code of ")[1:] if len(part) > 6}
    assert len(seen) > 200
    assert not seen & {needle.name for needle in draw_needles(random.Random(4), 20_000, is_test=True)}


def test_a_needle_is_its_question_and_its_code():
    needle = Needle("vokuna", "483920")
    assert needle.sentence == b"\nthe access code of vokuna is 483920.\n"
    assert needle.question == b"\nthe access code of vokuna is "
    assert len(needle.sentence) == NEEDLE_LENGTH
    for drawn in draw_needles(random.Random(0), 100, is_test=True):
        assert len(drawn.sentence) == NEEDLE_LENGTH
        assert len(drawn.code) == DIGITS
        assert drawn.code.isdigit()


@pytest.mark.parametrize(
    ("places", "starts"),
    [([], []), ([0], [0]), ([3, 20], [3, 20]), ([3, 4, 5], [3, 8, 13]), ([0, 38], [0, 38]), ([38, 39], [38, 43])],
)
def test_hidden_sentences_follow_each_other_where_they_would_overlap(places, starts):
    sentences = [b"<%d__>" % i for i in range(len(places))]
    data, found = hide(PLAIN, list(zip(places, sentences, strict=True)), 40)
    assert len(data) == 40
    assert found == starts
    rest = data
    for start, sentence in reversed(list(zip(starts, sentences, strict=True))):
        assert data[start : start + 5] == sentence[: max(0, 40 - start)]
        rest = rest[:start] + rest[start + 5 :]
    assert rest == PLAIN[: len(rest)]


@pytest.mark.parametrize("length", [200, 513, 4097])
@pytest.mark.parametrize("needles", [1, 3, 12])
def test_answers_are_digits_of_needles_at_least_a_distance_before(length, needles):
    """Twelve needles in 200 bytes move each other, and all questions, over the end."""
    distance, rng, answers = 90, random.Random(f"{length} {needles}"), 0
    for _ in range(20):
        data, is_answer = training_row(Corpus(PLAIN, {}), length, needles, 2, distance, rng)
        assert len(data) == len(is_answer) == length
        marked = [i for i in range(length) if is_answer[i]]
        for begin in marked[::DIGITS]:
            code, question = data[begin : begin + DIGITS], data[begin - NEEDLE_LENGTH + DIGITS + 2 : begin]
            assert is_answer[begin : begin + DIGITS] == [True] * DIGITS
            assert not is_answer[begin - 1]
            assert code.isdigit()
            assert question.startswith(b"\nthe access code of ")
            assert question.endswith(b" is ")
            first = data.find(question + code)
            assert 0 <= first <= begin - len(question) - distance
        assert len(marked) % DIGITS == 0
        answers += len(marked) // DIGITS
    assert (answers > 0) == ((length, needles) != (200, 12))
    assert answers <= 20 * needles * 2


@pytest.mark.parametrize(("length", "needles", "share"), [(513, 3, 0.5), (4097, 8, 0.9)])
def test_most_questions_are_asked(length, needles, share):
    """Some of the miniature model's rows are lost to crowding and to the end of the row, most of them in short rows."""
    rng, asked = random.Random(0), 0
    for _ in range(200):
        asked += sum(training_row(Corpus(PLAIN, {}), length, needles, 2, 256, rng)[1]) // DIGITS
    assert asked > share * 200 * needles * 2


def test_a_batch_has_rows_of_one_byte_more_and_follows_its_seed():
    def make(seed):
        return training_batch(Corpus(PLAIN, {}), 3, 256, 2, 2, 100, random.Random(seed))

    (data, is_answer), (again, same) = make(5), make(5)
    assert data.shape == is_answer.shape == (3, 257)
    assert data.equal(again)
    assert is_answer.equal(same)
    assert not data.equal(make(6)[0])
    assert not data[0].equal(data[1])


def test_text_shorter_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"`corpus` must have 512 bytes to train on, got 511"):
        training_row(Corpus(PLAIN[:511], {}), 512, 1, 1, 100, random.Random(0))
    assert len(training_row(Corpus(PLAIN[:512], {}), 512, 1, 1, 100, random.Random(0))[0]) == 512


@pytest.mark.parametrize("length", [NEEDLE_LENGTH * 7, 1000, 4096, 12_345])
def test_a_context_has_each_needle_whole_in_its_part(length):
    """The text, of 600 bytes, comes over and over again; with 259 bytes there is nothing but needles."""
    text = PLAIN[:600]
    for seed in range(20):
        needles = draw_needles(random.Random(seed), 7, is_test=True)
        data = context(text, length, needles, random.Random(seed))
        assert len(data) == length
        rest = data
        for index, needle in enumerate(needles):
            assert data.count(needle.sentence) == 1
            start = data.index(needle.sentence)
            assert index * length // 7 <= start
            assert start + NEEDLE_LENGTH <= -(-(index + 1) * length // 7)
            rest = rest.replace(needle.sentence, b"")
        assert rest == (text * 21)[: len(rest)]
        assert data == context(text, length, needles, random.Random(seed))


def test_needles_are_anywhere_in_their_parts():
    places = []
    for seed in range(200):
        (needle,) = draw_needles(random.Random(seed), 1, is_test=True)
        places.append(context(PLAIN, 1037, [needle], random.Random(seed)).index(needle.sentence))
    assert min(places) < 50
    assert max(places) > 950
    assert 400 < sum(places) / 200 < 600


def test_contexts_that_cannot_be_are_refused():
    needles = draw_needles(random.Random(0), 3, is_test=True)
    with pytest.raises(ValueError, match=rf"`length` must be {NEEDLE_LENGTH} for each of 3 needles or more, got 100"):
        context(PLAIN, 100, needles, random.Random(0))
    with pytest.raises(ValueError, match="`text` must not be empty"):
        context(b"", 1000, needles, random.Random(0))


@pytest.mark.parametrize(("count", "held_out"), [(2, [1]), (9, [8]), (10, [9]), (11, [0, 10]), (25, [4, 14, 24])])
def test_every_tenth_file_is_held_out(tmp_path, count, held_out):
    paths = [tmp_path / f"{index:02}.txt" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_bytes(b"<%d>" % index)
    corpus = read_files(reversed(paths))
    assert corpus.held_out == {str(paths[index]): b"<%d>" % index for index in held_out}
    assert corpus.training == b"".join(b"<%d>" % index for index in range(count) if index not in held_out)


def test_of_a_single_file_the_last_tenth_is_held_out(tmp_path):
    (path := tmp_path / "all.txt").write_bytes(PLAIN)
    corpus = read_files([path])
    ((name, data),) = corpus.held_out.items()
    assert name == f"{path}, the last tenth"
    assert corpus.training + data == PLAIN
    assert len(data) == len(PLAIN) // 10


def test_no_files_and_empty_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`paths` must be of files with text, got none"):
        read_files([])
    (full := tmp_path / "full.txt").write_bytes(b"text")
    (empty := tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"`paths` must be of files with text, got .*empty\.txt, empty"):
        read_files([full, empty])
    with pytest.raises(FileNotFoundError):
        read_files([tmp_path / "missing.txt"])


def test_a_fingerprint_is_of_all_the_text():
    one = Corpus(b"training", {"a": b"held out"})
    assert one.fingerprint == Corpus(b"training", {"b": b"held out"}).fingerprint
    assert one.fingerprint != Corpus(b"trained", {"a": b"held out"}).fingerprint
    assert one.fingerprint != Corpus(b"training", {"a": b"held-out"}).fingerprint
