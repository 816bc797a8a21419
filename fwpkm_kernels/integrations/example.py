"""A language model of transformers with FwPKM layers learns text, byte by byte.

``python -m fwpkm_kernels.integrations.example [--steps N] [--out PNG]`` draws the loss, and prints what the model says.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .._commands import check_outputs, command, need, one_line, write_output
from ..demo import default_text
from ..layers import parameter_groups

LENGTH, BATCH = 256, 4  #: bytes of a row, rows of a step


@command("example")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; ``argv`` replaces the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.example", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="of the optimizer (default: 150)")
    parser.add_argument("--out", type=Path, default=Path("example.png"), help="the curve (default: example.png)")
    arguments = parser.parse_args(argv)
    check_outputs(arguments.out)
    tqdm, figure = need("tqdm", "demo"), need("matplotlib.figure", "demo").Figure(layout="constrained")
    schedule = need("transformers", "transformers").get_cosine_schedule_with_warmup
    from .transformers import FwPKMConfig, FwPKMForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 32}
    memory = {"num_keys": 64, "key_dim": 64, "value_dim": 128, "chunk_size": 64, "query_conv": 4}
    kinds = ["sliding_attention"] * 2
    model = FwPKMForCausalLM(FwPKMConfig(**sizes, **heads, layer_types=kinds, memory_layers=[1], memory=memory))
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=3e-3, weight_decay=0.1))
    plan = schedule(optimizer, arguments.steps // 10, arguments.steps)
    text = torch.frombuffer(bytearray(default_text()), dtype=torch.uint8)
    bits = []
    for _ in (bar := tqdm.trange(arguments.steps)):
        starts = torch.randint(len(text) - LENGTH, (BATCH,)).tolist()
        ids = torch.stack([text[start : start + LENGTH] for start in starts]).long()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        plan.step()
        optimizer.zero_grad()
        bits.append(loss.item() / torch.tensor(2.0).log().item())
        bar.set_postfix_str(f"{bits[-1]:.2f} bits a byte")
    axes = figure.subplots()
    axes.plot(bits)
    axes.set(
        xlabel="step", ylabel="bits a byte", title="A model with a fast-weight memory reads Python's documentation"
    )
    figure.savefig(png := io.BytesIO(), format="png")
    write_output(arguments.out, png.getvalue())
    said = model.eval().generate(text[None, :LENGTH].long(), max_new_tokens=64, do_sample=True, top_k=8)
    print(f"{bits[-1]:.2f} bits a byte; curve: {one_line(arguments.out)}; it goes on:")
    print(bytes(said[0, LENGTH:].tolist()).decode(errors="replace"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
