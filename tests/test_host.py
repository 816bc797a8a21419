"""Launches that pass by Triton's Python give the driver what Triton would, and are Triton's where somebody watches.

Each test is a process of its own, in which a stand-in for NVIDIA's driver is told of every launch and runs nothing.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import HAS_GPU

needs_stand_in = pytest.mark.skipif(
    HAS_GPU or shutil.which("gcc") is None, reason="needs gcc, and a machine without a GPU, for the stand-in"
)


def run(*command: str) -> None:
    """Run Python in another process, where kernels are compiled, and not Triton's interpreter's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_INTERPRET")}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def run_case(case: str) -> None:
    run("-c", f"from tests.helpers import launched; launched.{case}()")


@needs_stand_in
def test_of_a_training_step(tmp_path):
    """Every launch is compared, and direct ones take less time: some 0.4 of it, 0.6 with other processes beside."""
    path = tmp_path / "host.json"
    run("-m", "benchmarks.host", "--repeats", "20", "--json", str(path))
    result = json.loads(path.read_text())
    assert result["launches"] == result["compared"] > 100
    times = {how: parts["both"]["least"] for how, parts in result["ms"].items()}
    rest = times.pop("no launches")
    assert 0.0 < times["direct"] - rest < 0.6 * (times["through Triton"] - rest), result


@needs_stand_in
@pytest.mark.slow
def test_of_other_options():
    run_case("compare_options")


@needs_stand_in
def test_of_arguments():
    run_case("compare_arguments")


@needs_stand_in
def test_of_those_who_watch():
    run_case("watch")


def test_without_gcc(monkeypatch):
    from benchmarks import host
    from fwpkm_kernels._commands import CommandError

    pytest.importorskip("triton")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(CommandError, match="gcc is missing"):
        host.Driver("folder")


def test_training_does_not_wait_for_the_host():
    """Else it could be no CUDA graph."""
    run_case("train_without_host")
