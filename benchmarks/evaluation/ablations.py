"""What the needle models' options do: rows that each change one of the defaults, with the same bytes of training.

A row says only what differs from the defaults of `Options`, as ``--set`` takes it. All are of seed 0, on which
the defaults were chosen; what is reported of the models themselves is of other seeds.
"""

import dataclasses
from types import MappingProxyType

from benchmarks.evaluation.options import Options, Phase
from benchmarks.evaluation.text import NEEDLE_LENGTH


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A row: another training, or other memories in the test, or both."""

    changes: dict[str, str] = dataclasses.field(default_factory=dict)
    #: sub-keys of fresh memories in the test, one after the other; None is the memory of the training
    test_keys: tuple[int | None, ...] = (None,)


def _long_chunks(chunk_size: int) -> dict[str, str]:
    """Changes for chunks of a size, under which every question still comes a chunk after its needle, or later.

    A phase whose rows are shorter than two chunks gets rows twice as long, and half as many: in rows of a single chunk
    nothing would be written before it is asked for.
    """
    plan = [
        Phase(2 * phase.length, phase.batch // 2, phase.steps) if phase.length < 2 * chunk_size else phase
        for phase in Options().plan
    ]
    phases = ",".join("x".join(map(str, phase)) for phase in plan)
    return {"memory.chunk_size": str(chunk_size), "plan": phases, "distance": str(chunk_size + NEEDLE_LENGTH)}


ABLATIONS = MappingProxyType(
    {
        "defaults": Ablation(),
        "no query convolution": Ablation({"memory.query_conv": "None"}),
        "convolution of 4": Ablation({"memory.query_conv": "4"}),
        "convolution of 8": Ablation({"memory.query_conv": "8"}),
        "no price on gates": Ablation({"gate_price": "0"}),
        "price on gates 0.5": Ablation({"gate_price": "0.5"}),
        "price on gates 1": Ablation({"gate_price": "1"}),
        "memory before the second layer": Ablation({"memory_layers": "1"}),
        "memories before both layers": Ablation({"memory_layers": "0,1"}),
        "lookahead 0": Ablation({"memory.lookahead": "0"}),
        "score dot": Ablation({"memory.score": "dot"}),
        "no key step": Ablation({"memory.addressing_weight": "0"}),
        "key step in tests too": Ablation({"test_memory.addressing_weight": "1"}),
        "step normalized": Ablation({"memory.step": "normalized"}),
        "chunks of 64": Ablation({"memory.chunk_size": "64"}),
        "chunks of 128": Ablation({"memory.chunk_size": "128"}),
        "chunks of 512": Ablation(_long_chunks(512)),
        "K = 4": Ablation({"memory.top_k": "4"}),
        "K = 8": Ablation({"memory.top_k": "8"}),
        "K = 32": Ablation({"memory.top_k": "32"}),
        # These rows are the curve over n: the defaults' training, and a small one, under memories of many sizes.
        "other memories in the test": Ablation(test_keys=(64, 128, 256, 512, 1024)),
        "trained with n = 128": Ablation({"memory.num_keys": "128"}, (None, 512)),
        # Here keys stay as they were drawn and only the key step spreads them, so it works in the test too.
        "memory reset in training": Ablation({"memory.initial_memory": "frozen", "test_memory.addressing_weight": "1"}),
        "no gate on writes": Ablation({"memory.write_gate": "False"}),
        "no gates": Ablation({"memory.gate": "False", "memory.write_gate": "False"}),
    }
)

CELLS = "4096:10x10:1,32768:5x20,131072:2x20:1"
READINGS = "1,2"
