"""What a session of a pool takes at the paper's size: a table of 512² rows of 512 floats, 512 MiB."""

import pytest
import torch

from fwpkm_kernels import MemoryPool, MemoryState, fast_weight_memory_step


@pytest.mark.slow
def test_a_session_at_the_papers_size():
    """4 096 tokens take at most 70 MiB, and 16 sessions at most what two states take."""
    n, width, mebi = 512, 512, 2**20
    generator = torch.Generator().manual_seed(0)
    keys = torch.rand(1, 2, n, width // 2, generator=generator) * 2 - 1
    values = torch.randn(n * n, width, generator=generator)
    pool, state = MemoryPool(keys, values, capacity="80 MiB"), MemoryState(keys, values)
    session = pool.open()
    for _ in range(8):
        queries, targets = (torch.randn(1, 512, *shape, generator=generator) for shape in ((1, width), (width,)))
        fast_weight_memory_step(pool, queries, targets, sessions=[session])
    assert pool.position(session) == 4096
    assert pool.num_bytes(session) <= 70 * mebi
    fast_weight_memory_step(state, queries[:, :0], targets[:, :0])
    assert 16 * pool.num_bytes(session) <= 2 * sum(x.nbytes for x in state.named_tensors().values())
