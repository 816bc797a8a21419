"""The layers as mixers of flash-linear-attention."""

import copy
import inspect

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [transformers]")

from transformers import DynamicCache

from fwpkm_kernels.integrations.fla import FLAMixer
from fwpkm_kernels.integrations.transformers import MemoryCacheLayer
from fwpkm_kernels.layers import FastWeightProductKeyMemory, ProductKeyMemory

pytestmark = pytest.mark.filterwarnings("ignore:Triton is not supported on current platform:UserWarning")


def flas_cache():
    return pytest.importorskip("fla.models.cache_utils", reason="needs flash-linear-attention").Cache()


#: fla's is one of transformers', which stands for it where it is missing.
caches = pytest.mark.parametrize("make_cache", [flas_cache, DynamicCache], ids=["fla", "transformers"])


@pytest.fixture(scope="module")
def mixer() -> FLAMixer:
    torch.manual_seed(0)
    layer = FastWeightProductKeyMemory(16, num_keys=8, top_k=2, key_dim=8, value_dim=8, chunk_size=6, input_norm=False)
    layer.num_hidden_layers = 2
    return FLAMixer(layer)


def read(mixer: FLAMixer, cache, x: torch.Tensor, mask: torch.Tensor, cuts) -> torch.Tensor:
    """Outputs of pieces, each with the mask of all columns so far, as fla's models hand it on."""
    seen, outputs = mask.shape[1] - x.shape[1], []
    for piece in x.split(cuts, 1):
        seen += piece.shape[1]
        output, attentions, returned = mixer(piece, mask[:, :seen], past_key_values=cache, use_cache=True)
        assert attentions is None
        assert returned is cache
        outputs.append(output)
    return torch.cat(outputs, 1)


def test_the_signature_is_that_of_flas_mixers():
    mixers = [FLAMixer]
    try:
        from fla.layers import GatedDeltaNet

        mixers.append(GatedDeltaNet)
    except ImportError:
        pass
    for kind in mixers:
        names = [*inspect.signature(kind.forward).parameters]
        shared = ["hidden_states", "attention_mask", "past_key_values", "use_cache", "output_attentions", "kwargs"]
        assert names == ["self", *shared]


@caches
@torch.no_grad()
def test_flas_cache_holds_the_memory(mixer, make_cache):
    x, mask = torch.randn(2, 20, 16), torch.ones(2, 20)
    mask[1, :7] = 0
    whole, _, none = mixer(x, attention_mask=mask)
    assert none is None
    torch.testing.assert_close(whole[1:, 7:], mixer(x[1:, 7:])[0])
    cache = make_cache()
    torch.testing.assert_close(read(mixer, cache, x, mask, [1, 2, 9, 1, 7]), whole)
    kinds = [isinstance(layer, MemoryCacheLayer) for layer in cache.layers]
    assert kinds == [False, False, True]
    assert cache.layers[2].get_seq_length() == 20


@caches
@torch.no_grad()
def test_flas_cache_chooses_rows_and_crops(mixer, make_cache):
    x, mask = torch.randn(2, 20, 16), torch.ones(2, 20)
    whole, _, _ = mixer(x)
    cache = make_cache()
    read(mixer, cache, x[:, :9], mask[:, :9], [9])
    for choose, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ):
        other = copy.deepcopy(cache)
        choose(other)
        rest = read(mixer, other, x[rows, 9:], mask[rows], [11])
        torch.testing.assert_close(rest, whole[rows, 9:])
    read(mixer, cache, x[:, :2], torch.ones(2, 11), [2])
    cache.layers[2].crop(cache.layers[2]._validate_crop(9))
    torch.testing.assert_close(read(mixer, cache, x[:, 9:], mask, [11]), whole[:, 9:])
    cache.reset()
    torch.testing.assert_close(read(mixer, cache, x, mask, [20]), whole)


@caches
def test_packed_documents_and_gradients_go_through(mixer, make_cache):
    x = torch.randn(1, 20, 16, requires_grad=True)
    output, _, _ = mixer(x, cu_seqlens=torch.tensor([0, 13, 20]), past_key_values=make_cache(), use_cache=True)
    torch.testing.assert_close(output, torch.cat((mixer(x[:, :13])[0], mixer(x[:, 13:])[0]), 1))
    output.square().sum().backward()
    assert mixer.layer.table.weight.grad.count_nonzero() > 0
    assert x.grad.count_nonzero() > 0


def test_a_static_memory_is_a_mixer_too():
    layer = ProductKeyMemory(16, num_keys=8, top_k=2, heads=2, key_dim=8, value_dim=8)
    x = torch.randn(2, 5, 16)
    output, attentions, cache = FLAMixer(layer)(x, attention_mask=torch.ones(2, 9), output_attentions=True)
    torch.testing.assert_close(output, layer(x))
    assert attentions is None
    assert cache is None
