"""The example of a language model with a memory."""

import re

import pytest

pytest.importorskip("transformers", reason="needs the extra [transformers]")
pytest.importorskip("matplotlib", reason="needs the extra [demo]")
pytest.importorskip("tqdm", reason="needs the extra [demo]")

from fwpkm_kernels.integrations import example


def test_the_model_learns_and_its_curve_is_written(tmp_path, capsys):
    assert example.main(["--steps=8", f"--out={tmp_path / 'curve.png'}"]) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    assert f"loss curve: {tmp_path / 'curve.png'}" in shown.out
    bits = [float(number) for number in re.findall(r"(\d+\.\d+) bits a byte", shown.err)]
    assert bits[0] > 7.5
    assert bits[-1] < 6.5
