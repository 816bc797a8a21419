"""The example server: requests that come and go get what each would get alone, also where sessions are evicted."""

import pytest

from fwpkm_kernels._commands import CommandError
from fwpkm_kernels.demo import serve

SIZES = {"num_keys": 16, "width": 16, "chunk_size": 8, "device": "cpu", "seed": 0}


def served(capacity: int, most: int) -> tuple[serve.Report, list[list[int]]]:
    requests = serve.make_requests(5, 40, 12, seed=1)
    report = serve.serve(serve.Model(capacity=capacity, **SIZES), requests, most, every=2)
    return report, [request.said for request in requests]


def test_requests_get_what_each_would_get_alone():
    together, said = served(2000, 3)
    alone, wanted = served(256, 1)
    assert said == wanted
    assert (together.most_sessions, alone.most_sessions, together.evictions) == (3, 1, 0)
    assert together.tokens == alone.tokens
    assert together.steps < alone.steps
    assert len(together.session_bytes) == 5


def test_a_full_pool_moves_sessions_to_the_host():
    report, said = served(90, 3)
    assert report.evictions > 0
    assert said == served(2000, 3)[1]


def test_a_pool_that_no_request_fits_is_told():
    with pytest.raises(CommandError, match="--capacity is too small for one request: the pool is full"):
        served(10, 3)


def test_it_prints_tokens_a_second_and_bytes_of_a_session(capsys):
    assert serve.main(["--requests", "3", "--prompt", "20", "--wanted", "4", "--num-keys", "8", "--width", "8"]) == 0
    printed = capsys.readouterr().out
    assert "tokens a second" in printed
    assert "a session took" in printed


@pytest.mark.parametrize("option", [["--width", "7"], ["--num-keys", "4"], ["--sessions", "0"], ["--capacity", "2 GB"]])
def test_options_that_no_run_can_have(option, capsys):
    assert serve.main(option) != 0
    assert option[0].removeprefix("--").replace("-", "") in capsys.readouterr().err.replace("-", "").replace("_", "")
