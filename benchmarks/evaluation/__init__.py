"""What a memory is good for: small language models with and without one, trained and measured on long texts."""

import sys

from fwpkm_kernels._commands import command, need


@command("evaluation")
def _check() -> int:
    """Say in a line that an extra is missing, before a program imports its modules, which need it."""
    need("transformers", "evaluation")
    return 0


if sys.argv[:1] == ["-m"] and (_status := _check()):  # which stands there until `python -m` has found its program
    sys.exit(_status)
