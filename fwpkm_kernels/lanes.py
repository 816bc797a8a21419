"""The streams on which the parts of a chunk run beside each other in a CUDA graph."""

import contextlib
from typing import Any

import torch


class Lanes:
    """The streams on which the parts of a chunk run beside each other in a CUDA graph; none where nothing is captured.

    Addresses stay on the stream that is captured, so that those of a chunk need not wait for values of the one before.
    """

    def __init__(self, is_capturing: bool = False) -> None:
        self.plans: torch.cuda.Stream | None = torch.cuda.Stream() if is_capturing else None
        self.values: torch.cuda.Stream | None = torch.cuda.Stream() if is_capturing else None
        self._open: list[torch.cuda.Stream] = []  #: on which something has been launched
        #: Freed memory could be handed out on its own stream while another stream still reads it, so nothing is freed.
        self._held: list[Any] = []

    def on(self, lane: "torch.cuda.Stream | None") -> contextlib.AbstractContextManager[Any]:
        """Launch on a lane, after all that has been launched on the present stream."""
        if lane is None:
            return contextlib.nullcontext()
        lane.wait_stream(torch.cuda.current_stream())
        if lane not in self._open:
            self._open.append(lane)
        return torch.cuda.stream(lane)

    def hold(self, *tensors: Any) -> None:
        """Keep what several lanes read until all of them have ended."""
        if self.plans is not None:
            self._held.append(tensors)

    def wait(self, lane: "torch.cuda.Stream | None") -> None:
        """Let the present stream wait for a lane."""
        if lane is not None:
            torch.cuda.current_stream().wait_stream(lane)

    def join(self) -> None:
        """Let the present stream wait for all lanes that were launched on; then nothing is held any more.

        The others are no part of what is captured: to wait for them would be an error.
        """
        for lane in self._open:
            self.wait(lane)
        self._open.clear()
        self._held.clear()
