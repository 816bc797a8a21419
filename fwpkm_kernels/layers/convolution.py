"""The causal convolution in front of a layer's queries, which knows where documents begin."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import Documents


def convolve(x: Tensor, weight: Tensor, documents: Documents, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """A causal depthwise convolution over the tokens of each document: z_t = Σ_i weight_i · x_{t - w + 1 + i}.

    Before its first token a document has zeros, or `tail`. Padding is skipped. Nothing waits for the device.

    Args:
        x: [B, T, d].
        weight: [d, 1, w].
        tail: the w - 1 tokens before each document, [S, w - 1, d]; None is zeros.

    Returns:
        z [B, T, d], and the last w - 1 tokens of each document, [S, w - 1, d].
    """
    before = weight.shape[2] - 1
    count, (batch, length, width) = documents.number, x.shape
    if tail is None:
        tail = x.new_zeros(count, before, width)
    weight = weight.to(x.dtype)
    if documents.are_rows:
        window = torch.cat((tail.to(x.dtype), x), dim=1)
        return slide(window, weight), window[:, length:]
    # The window is the row without its padding, with each document's tail in front of it: no w tokens that follow each
    # other there belong to two documents.
    real = (
        torch.ones(batch, length, dtype=torch.bool, device=x.device) if documents.mask is None else documents.mask > 0
    )
    running = F.pad(real.long().cumsum(1), (1, 0))  # tokens before each position
    bounds = documents.bounds(x.device)
    starts = running[:, bounds] + before * torch.arange(len(bounds), device=x.device)  # of tails, [B, S / B + 1]
    places = running[:, :-1] + before * (documents.numbers(x.device) + 1)
    size = length + before * (len(bounds) - 1)
    places = torch.where(real, places, size)  # padding goes to a last column, which nothing reads
    tail_places = (starts[:, :-1, None] + torch.arange(before, device=x.device)).flatten(1)

    def columns(index: Tensor) -> Tensor:
        return index.unsqueeze(-1).expand(-1, -1, width)

    window = x.new_zeros(batch, size + 1, width).scatter(1, columns(places), x)
    window = window.scatter(1, columns(tail_places), tail.to(x.dtype).reshape(*tail_places.shape, width))
    z = slide(window[:, :size], weight).gather(1, columns(torch.where(real, places - before, 0)))
    ends = (starts[:, 1:, None] - before + torch.arange(before, device=x.device)).flatten(1)
    last = window.gather(1, columns(ends)).view(count, before, width)
    return torch.where(real.unsqueeze(-1), z, 0.0), last


def slide(window: Tensor, weight: Tensor) -> Tensor:
    """The depthwise convolution [B, t, d] of a window [B, t + w - 1, d] with weights [d, 1, w]."""
    if window.shape[1] < weight.shape[2]:  # there are no tokens, which conv1d refuses
        return window[:, :0]
    return F.conv1d(window.transpose(1, 2), weight, groups=weight.shape[0]).transpose(1, 2)
