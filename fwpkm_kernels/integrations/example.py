"""A language model of transformers with a memory learns text: ``python -m fwpkm_kernels.integrations.example``."""

import argparse
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._commands import check_outputs, command, need, one_line, write_output
from ..demo.stream import default_text
from ..layers import parameter_groups

LENGTH, BATCH = 256, 4  #: bytes of a row, rows of a step


@command("example")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; ``argv`` replaces the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(f"python -m {__package__}.example", description="A model with FwPKM learns text.")
    parser.add_argument("--steps", type=int, default=150, help="of the optimizer (default: 150)")
    parser.add_argument("--out", type=Path, default=Path("example.png"), help="the loss curve (default: example.png)")
    arguments = parser.parse_args(argv)
    check_outputs(arguments.out)
    tqdm, figure = need("tqdm", "demo"), need("matplotlib.figure", "demo").Figure(layout="constrained")
    need("transformers", "transformers")
    from .transformers import FwPKMConfig, FwPKMForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 32}
    memory = {"num_keys": 32, "key_dim": 64, "value_dim": 64, "chunk_size": 64, "query_conv": 4}
    kinds = ["sliding_attention"] * 2
    model = FwPKMForCausalLM(FwPKMConfig(**sizes, **heads, layer_types=kinds, memory_layers=[1], memory=memory))
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=2e-3, weight_decay=0.1))
    text = torch.tensor(list(default_text()))
    bits = []
    for _ in (bar := tqdm.trange(arguments.steps)):
        starts = torch.randint(len(text) - LENGTH, (BATCH,)).tolist()
        rows = torch.stack([text[start : start + LENGTH] for start in starts])
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bits.append(loss.item() / math.log(2))
        bar.set_postfix_str(f"{bits[-1]:.2f} bits a byte")
    figure.subplots(subplot_kw={"xlabel": "step", "ylabel": "bits a byte"}).plot(bits)
    figure.savefig(png := io.BytesIO(), format="png")
    write_output(arguments.out, png.getvalue())
    said = model.eval().generate(text[None, :LENGTH], max_new_tokens=64, do_sample=True, top_k=8)
    print(bytes(said[0, LENGTH:].tolist()).decode(errors="replace"))
    print(f"loss curve: {one_line(arguments.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
