"""The golden cases: their names, what a file holds, and how near a result must come to it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = [
    "allgrad_me", "clip", "dot_relu", "dot_softmax", "heads2", "heads2_b3_top8", "idw_silu", "idw_t07",
    "look0", "look2", "lr05_wd", "mask_leftpad", "mask_nogates", "mask_rand", "me03", "paper_a", "paper_b",
    "paper_d_b3", "paper_e_officialinit", "paper_g_tail_partial", "paper_h_tail_one", "paper_i_single_chunk",
    "paper_j_short", "paper_l_near_keys", "paper_m_topk1", "paper_n_topk2", "paper_o_topk_eq_n",
    "paper_p_collisions", "wd",
]  # fmt: skip


class Case(NamedTuple):
    config: dict[str, Any]
    tensors: dict[str, Tensor]  # the inputs in the dtype under test, the answers in float64


def load(name: str, dtype: torch.dtype) -> Case:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        config = json.loads(str(arrays["config"]))
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "config"}
    # The inputs are stored in float32, the answers in float64.
    tensors = {key: t.to(dtype) if t.dtype == torch.float32 else t for key, t in tensors.items()}
    return Case(config, tensors)


def assert_near(actual: Tensor, exact: Tensor, tolerance: float, name: str) -> None:
    """Relative in norm."""
    error, norm = float((actual.detach().double() - exact).norm()), float(exact.norm())
    assert error <= tolerance * norm, f"{name}: error {error:.3g} over {tolerance:.3g} of {norm:.3g}"


def tolerance(name: str, dtype: torch.dtype) -> float:
    """The agreement that tests/golden/README.md promises."""
    if dtype == torch.float64:
        return 1e-12
    return 6e-5 if name == "paper_l_near_keys" else 3e-6
