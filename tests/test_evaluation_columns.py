"""The launch script of a training over ranks, and the examples of the page on several ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).parents[1]


def _run_page() -> list[torch.Tensor]:
    """The blocks of the page as one program; what it is left with: whole tensors, and whether each has a gradient."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text("utf-8"), re.DOTALL):
        exec(block, names)
        if "tokens" in names and "of_columns" not in names:  # behind the first block, whose model has trained a step
            names["of_columns"] = [
                *(x.to_local() if hasattr(x, "to_local") else x for x in names["model"].parameters())
            ]
            assert all(x.grad is not None for x in names["model"].parameters())
    placements = {str(x.placements) for x in names["model"].parameters()}
    assert placements == {"(Shard(dim=0), Shard(dim=1))", "(Shard(dim=0),)"}
    return [names["tokens"], *names["of_columns"]]


def test_the_examples_of_the_page_run():
    one, two = run_ranks(_run_page, 2)
    assert torch.equal(one[0], two[0])
    different = [tuple(x.shape) for x, y in zip(one, two, strict=True) if not torch.equal(x, y)]
    assert different == [(256, 8), (256, 8)]  # the columns of both tables


def _launch(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    command += ("-m", "benchmarks.evaluation.columns", *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=os.environ)


@pytest.mark.slow
def test_the_script_trains_and_says_what_crosses():
    pytest.importorskip("transformers", reason="needs the extra [transformers]")
    done = _launch(2, "--steps=2")
    assert done.returncode == 0, done.stderr
    first, rate, memory, *crossed = done.stdout.splitlines()
    assert re.fullmatch(r"step 2: \d\.\d\d bits a byte, digits right \d\.\d\d", first)
    assert float(rate.split()[0]) > 0
    assert all(int(number) > 100 for number in re.findall(r"(\d+) MiB", memory))
    tokens, reads = 2 * 512, 2 * (512 + 1)  # the first token of the second chunk is read again
    assert crossed == [
        f"last step, columns: all_gather 2 times, {2 * tokens * 64 * 4} bytes a rank",
        f"last step, columns: all_reduce 1 times, {2 * reads * 16 * 4} bytes a rank",
    ]
    refused = _launch(2, "--columns=3")
    assert refused.returncode != 0
    assert "columns: error: --columns must divide the 2 ranks, got 3" in refused.stderr


def test_the_script_fits_a_screen():
    """It is an example to read."""
    assert len((ROOT / "benchmarks" / "evaluation" / "columns.py").read_text("utf-8").splitlines()) <= 80


def test_the_script_must_be_launched(capsys):
    columns = pytest.importorskip("benchmarks.evaluation.columns", exc_type=ImportError)
    assert not dist.is_initialized()
    assert columns.main([]) == 2
    assert "start it by torchrun" in capsys.readouterr().err
