"""Models of the evaluation that are small enough for tests."""

import dataclasses

import torch

from benchmarks.evaluation.models import Size, make_config, make_model

TINY = Size(
    hidden_size=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    parameters=40_000,
    window=8,
    gdn={"heads": 2, "head_dim": 8},
    memory_layers=(1,),
    pkm_layers=(1,),
    memory={
        "scope": "batch",
        "initial_memory": "persistent",
        "num_keys": 8,
        "key_dim": 16,
        "value_dim": 16,
        "top_k": 4,
        "chunk_size": 16,
        "query_conv": 4,
    },
    pkm={"num_keys": 8, "heads": 2, "key_dim": 16, "value_dim": 16, "top_k": 4},
    training={"plan": ((128, 1, 3),), "warmup": 1},
)


def tiny_model(model, seed=0, **changes):
    torch.manual_seed(seed)
    size = dataclasses.replace(TINY, **changes)
    return make_model(make_config(model, size, {}, 0.1), size).eval()
