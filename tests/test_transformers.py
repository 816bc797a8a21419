"""Memories in Hugging Face models: caches, generation, training, saving, and the model of our own."""

import copy
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [transformers]")
pytest.importorskip("accelerate", reason="needs accelerate, as transformers' Trainer does")

from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorWithFlattening,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    StaticCache,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.models.qwen3_next import modeling_qwen3_next

from fwpkm_kernels.integrations import language_model
from fwpkm_kernels.integrations.transformers import (
    FwPKMConfig,
    FwPKMForCausalLM,
    MemoryCacheLayer,
    add_memory,
    load_memory,
)
from fwpkm_kernels.layers import FastWeightProductKeyMemory, ProductKeyMemory, StreamedMemory

logging.set_verbosity_error()
logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parent.parent
#: What transformers calls a cache, from 5.24 on and before.
CACHE = "cache" if "cache" in inspect.signature(Qwen3ForCausalLM.forward).parameters else "past_key_values"
PAD, VOCABULARY, PROMPT = 0, 61, 23
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "initializer_range": 0.2,  # so that greedy decoding does not stand still
}
MEMORY = {"num_keys": 8, "top_k": 2, "key_dim": 8, "value_dim": 16, "chunk_size": 6, "query_conv": 3}
MEMORIES = ("keys", "table.weight")  #: what has a dtype of its own
#: Before, transformers makes wrong masks for three kinds.
THIRD = "full_attention" if Version("5.24") <= language_model._INSTALLED else "sliding_attention"
PKM = {"num_keys": 8, "top_k": 2, "heads": 2, "key_dim": 8, "value_dim": 16}
OWN = {
    **SIZES,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "sliding_attention", THIRD, "linear_attention"],
    "sliding_window": 7,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "memory_layers": [0, 2],
    "memory": MEMORY,
    "pkm_layers": [1, 3],
    "pkm": PKM,
}
ONLY_GDN = {**OWN, "layer_types": ["linear_attention"] * 4, "pkm_layers": []}


@pytest.fixture(autouse=True)
def gated_delta_nets_in_pytorch(monkeypatch):
    """As where fla is not installed, whose kernels need a GPU."""
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        function = getattr(modeling_qwen3_next, name)
        monkeypatch.setattr(modeling_qwen3_next, name, inspect.unwrap(function))


def qwen(seed: int = 0, **changes) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **changes)).eval()


def with_memory(**options) -> Qwen3ForCausalLM:
    return add_memory(qwen(), [0, 2], **(MEMORY | options))


def own(**changes) -> FwPKMForCausalLM:
    torch.manual_seed(0)
    return FwPKMForCausalLM(FwPKMConfig(**(OWN | changes))).eval()


def neox() -> GPTNeoXForCausalLM:
    """Of a model whose blocks call the cache `layer_past`."""
    torch.manual_seed(0)
    sizes = {name: x for name, x in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
    return add_memory(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).eval(), [0, 2], **MEMORY)


MAKERS = {"added": with_memory, "neox": neox, "own": own, "only_gdn": lambda: own(**ONLY_GDN)}


@pytest.fixture(params=MAKERS, scope="module")
def model(request):
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def added():
    return with_memory()


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, and the mask of the second, which is shorter and padded on the left."""
    ids = torch.randint(1, VOCABULARY, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    return ids * mask, mask


def read(model, cache, ids, mask=None, cuts=(5, 10, 1, 7)) -> torch.Tensor:
    """Logits of pieces that are read one after the other."""
    logits, seen = [], 0 if mask is None else mask.shape[1] - ids.shape[1]
    for piece in ids.split(list(cuts), 1):
        seen += piece.shape[1]
        past = None if mask is None else mask[:, :seen]
        logits.append(model(piece, attention_mask=past, use_cache=True, **{CACHE: cache}).logits)
    return torch.cat(logits, 1)


def close(actual, expected) -> None:
    """Up to float32's rounding; the Gated DeltaNets differ most, in chunks and step by step."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    model.zero_grad()
    return found


@torch.no_grad()
def test_any_cut_through_a_cache_is_the_whole(model):
    ids, mask = prompts()
    whole = model(ids, attention_mask=mask).logits
    close(whole[1, 9:], model(ids[1:, 9:]).logits[0])
    cache = DynamicCache(config=model.config)
    close(read(model, cache, ids, mask)[mask > 0], whole[mask > 0])
    assert [x.get_seq_length() for x in cache.layers if isinstance(x, MemoryCacheLayer)] == [PROMPT, PROMPT]
    cache.reset()
    close(read(model, cache, ids, mask, (12, 11))[mask > 0], whole[mask > 0])


@torch.no_grad()
def test_a_cache_that_is_reset_begins_with_the_parameters_as_they_are():
    model, (ids, _) = with_memory().bfloat16(), prompts()
    cache = DynamicCache(config=model.config)
    model(ids, **{CACHE: cache})
    model.model.layers[0].memory.table.weight.normal_(std=2.0)
    cache.reset()
    assert torch.equal(model(ids, **{CACHE: cache}).logits, model(ids).logits)
    cache.reset()
    model.float()(ids[:, :9], **{CACHE: cache})
    with pytest.raises(ValueError, match="`cache` must be of the memory's dtype torch.float64, got torch.float32"):
        model.double()(ids[:, 9:], **{CACHE: cache})


@torch.no_grad()
def test_a_cache_of_another_model_is_refused(model):
    ids, _ = prompts()
    cache, other = DynamicCache(config=model.config), copy.deepcopy(model)
    read(model, cache, ids[:, :12], cuts=(12,))
    message = "`cache` must have been read by this model.* memory has read 0 tokens, unlike its other layers"
    with pytest.raises(ValueError, match=message):
        other(ids[:, 12:], **{CACHE: cache})
    with pytest.raises(ValueError, match=message):
        other.generate(ids, **{CACHE: cache}, **GREEDY)
    plain = own(**ONLY_GDN | {"memory_layers": []}) if all(cache.is_linear[:3]) else qwen()
    cache = DynamicCache(config=plain.config)
    plain(ids[:, :12], **{CACHE: cache})
    add_memory(plain, [0], **MEMORY)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            plain(ids[:, 12:], **{CACHE: cache})


@torch.no_grad()
def test_a_model_may_tell_its_decoder_in_masks_of_its_own():
    """As Gemma3 does around images, whose decoder gets several masks of four dimensions."""
    sizes = {**SIZES, "vocab_size": 80, "sliding_window": 7}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=sizes,
        vision_config={**vision, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        **{"image_token_index": 70, "boi_token_index": 71, "eoi_token_index": 72},
    )
    torch.manual_seed(0)
    model = add_memory(Gemma3ForConditionalGeneration(config).eval(), [0, 2], **MEMORY)
    ids, mask = prompts()
    whole = model(ids, attention_mask=mask).logits
    close(whole[1, 9:], model(ids[1:, 9:]).logits[0])
    assert torch.equal(model(ids, None, mask).logits, whole)  # pixel values come second


@torch.no_grad()
def test_a_mask_of_ones_own_comes_with_that_of_padding():
    model, (ids, mask) = own(), prompts()
    whole = model(ids, attention_mask=mask).logits
    masks = create_masks_for_generate(model.config, model.model.embed_tokens(ids), mask, None, None)
    close(model(ids, attention_mask=masks, memory_mask=mask).logits[mask > 0], whole[mask > 0])
    model = with_memory()
    whole = model(ids, attention_mask=mask).logits
    mask4 = create_causal_mask(model.config, model.model.embed_tokens(ids), mask, None)
    assert mask4.ndim == 4
    close(model(ids, attention_mask=mask4, memory_mask=mask).logits[mask > 0], whole[mask > 0])


@torch.no_grad()
def test_a_mask_may_have_columns_for_tokens_to_come_but_none_too_few(added):
    ids, mask = prompts()
    whole = added(ids, attention_mask=mask).logits
    cache, wide = StaticCache(config=added.config, max_cache_len=40), torch.nn.functional.pad(mask, (0, 17))
    logits = [added(x, attention_mask=wide, **{CACHE: cache}).logits for x in ids.split((12, 11), 1)]
    close(torch.cat(logits, 1)[mask > 0], whole[mask > 0])
    with pytest.raises(ValueError, match=r"`attention_mask` must have a column for each .* 23 .* and 1 .*\[2, 1\]"):
        added(ids[:, :1], attention_mask=mask[:, :1], **{CACHE: cache})


@torch.no_grad()
def test_a_copied_cache_goes_on_by_itself(model):
    ids, _ = prompts()
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    read(model, cache, ids[:, :14], cuts=(14,))
    other = copy.deepcopy(cache)
    read(model, cache, ids.flip(0)[:, 14:], cuts=(9,))
    close(read(model, other, ids[:, 14:], cuts=(4, 5)), whole[:, 14:])
    assert len(other.layers) == len(cache.layers)


@torch.no_grad()
def test_a_cache_is_not_pickled_and_an_output_is(added):
    ids, _ = prompts()
    output = added(ids, output_gate_means=True)
    with pytest.raises(TypeError, match="a MemoryCacheLayer cannot be pickled"):
        pickle.dumps(output[CACHE])
    output = added(ids, output_gate_means=True, use_cache=False)
    for other in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output)):
        assert type(other) is type(output)
        assert [*other] == [*output]
        close((other.logits, other.gate_means), (output.logits, output.gate_means))


@torch.no_grad()
def test_a_cache_is_offloaded_and_fetched_where_it_is_not_there_already(monkeypatch):
    model, (ids, _) = with_memory(), prompts()
    whole = model(ids).logits
    cache, moved = DynamicCache(config=model.config), []
    read(model, cache, ids[:, :9], cuts=(9,))
    entry, layer, to = cache.layers[-1], model.model.layers[2].memory, StreamedMemory.to
    monkeypatch.setattr(StreamedMemory, "to", lambda memory, device: (moved.append(device), to(memory, "cpu"))[1])
    entry.offload()
    entry.prefetch()
    assert moved == []
    keys = layer.keys
    layer.keys = torch.nn.Parameter(keys.to("meta"))
    entry.prefetch()
    assert moved == [torch.device("meta")]
    layer.keys = keys
    assert entry.get_mask_sizes(14) == (PROMPT, 0)
    assert entry.get_max_length() == -1
    close(read(model, cache, ids[:, 9:], cuts=(14,)), whole[:, 9:])


@torch.no_grad()
def test_rows_of_a_cache_are_chosen_repeated_and_reordered(added):
    ids, _ = prompts()
    whole = added(ids).logits
    for choose, rows in (
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    ):
        cache = DynamicCache(config=added.config)
        read(added, cache, ids[:, :14], cuts=(14,))
        choose(cache)
        close(read(added, cache, ids[rows, 14:], cuts=(9,)), whole[rows, 14:])


@torch.no_grad()
@pytest.mark.parametrize("crop", [-3, 13])
def test_a_cache_is_cropped_inside_a_chunk(added, crop):
    ids, _ = prompts()
    mask = torch.ones_like(ids)
    mask[:, 0] = 0  # a column that both rows do not see
    whole = added(ids, attention_mask=mask).logits
    cache = DynamicCache(config=added.config)
    read(added, cache, ids[:, :13], mask[:, :13], (13,))
    read(added, cache, ids[:, :3], mask.new_ones(2, 16), (3,))
    for layer in cache.layers:  # transformers' own take no positive counts any more
        layer.crop(crop if isinstance(layer, MemoryCacheLayer) else -3)
    assert {layer.get_seq_length() for layer in cache.layers} == {13}
    close(read(added, cache, ids[:, 13:], mask, (10,)), whole[:, 13:])


@torch.no_grad()
def test_a_crop_beyond_the_chunk_is_refused(added):
    cache = DynamicCache(config=added.config)
    read(added, cache, prompts()[0], cuts=(23,))
    with pytest.raises(ValueError, match="`tokens` must be at most 5"):
        cache.layers[-1].crop(-6)
    assert cache.layers[-1].get_seq_length() == PROMPT
    with pytest.raises(ValueError, match="`tokens` must be at most 5"):
        cache.crop(-6)  # of attention already
    with pytest.raises(ValueError, match="cropped as a whole, got one whose memory has read 23 tokens"):
        read(added, cache, prompts()[0][:, 17:], cuts=(6,))


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 1, 5])
def test_a_crop_reaches_over_a_chunk_where_the_past_is_recorded(added, kept):
    ids, mask = prompts()
    whole = added(ids, attention_mask=mask).logits
    cache = DynamicCache(config=added.config)
    read(added, cache, ids[:, :12], mask[:, :12], (12,))
    cache.activate_past_recording()
    drafts = torch.cat((ids[:, 12 : 12 + kept], ids[:, 12 + kept : 18].flip(1)), 1)
    read(added, cache, drafts, mask[:, :18], (6,))
    cache.crop(kept - 6)
    close(read(added, cache, ids[:, 12 + kept :], mask, (11 - kept,)), whole[:, 12 + kept :])


GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": PAD}


def test_generation_with_padding_is_that_of_each_row_alone(model):
    ids, mask = prompts()
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert len(expected[:, PROMPT:].unique()) >= 4
    for row, prompt in ((0, ids[:1]), (1, ids[1:, 9:])):
        for cache in ("dynamic", "static"):  # which has slots that are not filled yet
            alone = model.generate(prompt, cache_implementation=cache, **GREEDY)
            assert torch.equal(alone[0, prompt.shape[1] :], expected[row, PROMPT:]), cache
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 1}, {"prefill_chunk_size": 7}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY, **options), expected), options


@torch.no_grad()
def test_generation_from_embeddings_is_that_from_tokens(model):
    ids, mask = prompts()
    embeddings = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, **GREEDY)[:, PROMPT:])


def test_beams_and_samples_with_a_cache_are_those_without(model):
    ids, mask = prompts()
    beams = {**GREEDY, "max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    samples = {**GREEDY, "max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2}
    for options in (beams, samples):
        found = []
        for use_cache in (True, False):
            set_seed(0)
            found.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **options))
        assert torch.equal(*found)


@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
@pytest.mark.filterwarnings("ignore:.*past_key_values.*deprecated:FutureWarning")
def test_a_cache_without_a_config_is_filled_up(added, name):
    ids, mask = prompts()
    cache = DynamicCache()
    found = added.generate(ids, attention_mask=mask, **{name: cache}, **GREEDY)
    assert torch.equal(found, added.generate(ids, attention_mask=mask, use_cache=False, **GREEDY))
    assert [isinstance(x, MemoryCacheLayer) for x in cache.layers] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("chunk_size", [64, 6])
def test_prompt_lookup_gives_the_greedy_tokens(monkeypatch, chunk_size):
    """Some drafts are accepted, others are taken back, over the beginning of chunks too."""
    model, calls, taken_back = with_memory(chunk_size=chunk_size), [], []
    options = {**GREEDY, "max_new_tokens": 24}
    prompt = prompts()[0][:1]
    expected = model.generate(prompt, **options)
    rollback = StreamedMemory.rollback
    monkeypatch.setattr(StreamedMemory, "rollback", lambda memory, n: (taken_back.append(n), rollback(memory, n)))
    model.model.register_forward_hook(lambda *args: calls.append(1))
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **options), expected)
    assert len(calls) < 24
    assert len({*taken_back}) > 1


class Wrapper(torch.nn.Module):
    """As PEFT's around modules that an adapter saves: with the module that was there, and its copy in use."""

    def __init__(self, memory: torch.nn.Module) -> None:
        super().__init__()
        self.before, self.used = memory, copy.deepcopy(memory)

    def forward(self, *args, **kwargs):
        return self.used(*args, **kwargs)


def test_a_wrapped_memory_takes_drafts_back_too():
    model, prompt, options = with_memory(), prompts()[0][:1], {**GREEDY, "max_new_tokens": 24}
    model.model.layers[0].memory = Wrapper(model.model.layers[0].memory)
    expected = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **options), expected)


def test_an_assistant_with_a_memory_of_its_own():
    model, assistant = with_memory(), add_memory(qwen(), [1], **MEMORY)
    prompt, options = prompts()[0][:1], {**GREEDY, "max_new_tokens": 24}
    assert torch.equal(model.generate(prompt, assistant_model=assistant, **options), model.generate(prompt, **options))


def test_one_memory_for_the_batch_has_no_beams():
    model = with_memory(scope="batch")
    with pytest.raises(ValueError, match='`scope`="batch" has one memory'):
        model.generate(prompts()[0], num_beams=2, **GREEDY)


def test_gated_delta_nets_cannot_be_assisted():
    with pytest.raises(ValueError, match="stateful"):
        own().generate(prompts()[0][:1], prompt_lookup_num_tokens=2, **GREEDY)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_training_has_its_gradients_with_a_cache_and_checkpoints(make):
    model = make().train()
    ids, mask = prompts()
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"attention_mask": mask, "labels": labels, "output_gate_means": True}

    def run(**options):
        output = model(ids, **inputs, **options)
        (output.loss + sum(output.gate_means)).backward()
        return output, gradients(model)

    expected, of_expected = run(use_cache=False)
    assert len(expected.gate_means) == 2
    assert all(of_expected[name].count_nonzero() for name in of_expected if "memory" in name)
    output, found = run()
    with pytest.raises(ValueError, match=r"`cache` must be read into under torch.no_grad\(\)"), torch.no_grad():
        model(ids, **{CACHE: output[CACHE]})
    output[CACHE].reset()
    with torch.no_grad():
        close(model(ids, attention_mask=mask, **{CACHE: output[CACHE]}).logits[mask > 0], expected.logits[mask > 0])
    model.gradient_checkpointing_enable()
    checkpointed, of_checkpointed = run(use_cache=False)
    for other, grads in ((output, found), (checkpointed, of_checkpointed)):
        close(other.loss, expected.loss)
        close(other.gate_means, expected.gate_means)
        close(grads, of_expected)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="`use_reentrant` must be False"):
        run(use_cache=False)


@pytest.mark.parametrize("make", [with_memory, lambda: own(layer_types=None, gate_price=0.1)], ids=["added", "own"])
def test_training_compiles_in_one_graph(make):
    model, (ids, mask) = make().train(), prompts()
    inputs = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(ids, **inputs).loss, model(ids, **inputs).loss)
    torch._dynamo.reset()


def test_a_cache_that_holds_tokens_has_no_gradients(added):
    ids, _ = prompts()
    cache = DynamicCache(config=added.config)
    with torch.no_grad():
        added(ids, **{CACHE: cache})
    with pytest.raises(ValueError, match="`cache` is written in place, without gradients"):
        added(ids, **{CACHE: cache})


@torch.no_grad()
def test_a_memory_that_cannot_stream_is_evaluated_with_a_cache():
    ids, _ = prompts()
    published = {"scope": "batch", "boundary": "drop", "initial_memory": "persistent"}
    model = with_memory(**published)
    output = model(ids)
    assert torch.equal(output.logits, model(ids, use_cache=False).logits)
    with pytest.raises(ValueError, match='`boundary` must be "carry" for a memory that streams, got "drop"'):
        model(ids, **{CACHE: output[CACHE]})
    model = with_memory(scope="batch")
    borders = torch.tensor([0, 10, PROMPT], dtype=torch.int32)
    output = model(ids[:1], cu_seq_lens_q=borders)
    assert torch.equal(output.logits, model(ids[:1], cu_seq_lens_q=borders, use_cache=False).logits)
    with pytest.raises(ValueError, match='`cu_seqlens` must be None where a memory with `scope`="batch" streams'):
        model(ids[:1], **{CACHE: output[CACHE]})


@pytest.mark.parametrize("make", [with_memory, lambda: own(layer_types=None)], ids=["added", "own"])
def test_packed_sequences_are_those_alone(make):
    model = make().train()
    ids, _ = prompts()
    rows = [ids[0], ids[1, 9:]]
    examples = [{"input_ids": row.tolist()} for row in rows]
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(examples)
    packed = {name: x for name, x in packed.items() if not name.startswith("max_length")}
    output = model(**packed, use_cache=False)
    output.loss.backward()
    found = gradients(model)
    alone = [model(row[None], labels=row[None]) for row in rows]
    close(output.logits, torch.cat([x.logits for x in alone], 1))
    weights = [len(row) - 1 for row in rows]
    loss = sum(x.loss * weight for x, weight in zip(alone, weights, strict=True)) / sum(weights)
    close(output.loss, loss)
    loss.backward()
    close(found, gradients(model))


@torch.no_grad()
def test_gate_means_are_of_real_tokens_and_cost_a_price():
    ids, mask = prompts()
    model = own(gate_price=0.5)
    seen = []
    for block in (model.model.layers[0], model.model.layers[2]):
        gate = block.memory.g_proj
        gate.register_forward_hook(lambda module, args, output: seen.append(torch.sigmoid(output[mask > 0]).mean()))
    labels = ids.masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, labels=labels, output_gate_means=True)
    close(torch.stack(output.gate_means), torch.stack(seen))
    plain = own()(ids, attention_mask=mask, labels=labels)
    assert "gate_means" not in plain
    close(model(ids, mask, None, None, None, labels).loss, output.loss)
    without = with_memory(gate=False, write_gate=False)(ids, labels=labels, output_gate_means=True)
    assert without.gate_means == ()
    with pytest.raises(TypeError, match="`output_gate_means` needs a model with a head around this FwPKMModel"):
        model.model(ids, output_gate_means=True)
    close(output.loss, plain.loss + 0.5 * torch.stack(seen).mean())
    # A step of two such calls has the price once.
    total = 2 * (labels[:, 1:] != -100).sum()
    half = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=total)
    close(2 * half.loss, output.loss)
    as_tuple = model(ids, attention_mask=mask, labels=labels, output_gate_means=True, return_dict=False)
    close(as_tuple[0], output.loss)
    close(as_tuple[-1], output.gate_means)


@torch.no_grad()
@pytest.mark.parametrize("make", [with_memory, own], ids=["added", "own"])
def test_models_are_copied_and_pickled(make):
    model = make()
    ids, mask = prompts()
    expected = model(ids, attention_mask=mask).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids, attention_mask=mask).logits, expected)
        assert type(other) is type(model)
        assert type(other).__name__ == type(make()).__name__
        other.model.layers[0].memory.keys.zero_()
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("size", ["10KB", "1GB"])
@pytest.mark.parametrize("initial_memory", ["learned", "frozen"])
def test_added_memories_are_saved_and_loaded(tmp_path, size, initial_memory):
    model = with_memory(initial_memory=initial_memory, memory_dtype=torch.float32)
    ids, _ = prompts()
    expected = model(ids).logits
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "10KB")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(plain(ids).logits, expected)
    assert load_memory(plain, tmp_path) is plain
    assert torch.equal(plain(ids).logits, expected)
    plain.model.layers[2].memory.keys.zero_()
    assert torch.equal(load_memory(plain, tmp_path)(ids).logits, expected)
    decoder = Qwen3Model.from_pretrained(tmp_path)
    close(plain.lm_head(load_memory(decoder, tmp_path)(ids).last_hidden_state), expected)
    half = load_memory(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), tmp_path)
    memory = half.model.layers[2].memory
    assert {memory.keys.dtype, memory.table.weight.dtype} == {torch.float32}
    assert memory.q_proj.weight.dtype == torch.bfloat16
    assert half(ids).logits.dtype == torch.bfloat16


def test_an_option_that_is_left_out_is_its_default(tmp_path):
    options = {name: x for name, x in MEMORY.items() if name != "query_conv"}
    add_memory(qwen(), [0], **options, lr=np.float32(0.5), gate=True).save_pretrained(tmp_path)
    load_memory(add_memory(qwen(), [0], **options, lr=0.5, query_conv=None), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.fwpkm = {"layers": [0], **options, "lr": 0.5}  # as before defaults were saved
    config.save_pretrained(tmp_path)
    load_memory(add_memory(qwen(), [0], **options, lr=0.5), tmp_path)


def test_a_layer_of_float64_is_saved_and_loaded(tmp_path):
    model = add_memory(qwen().double(), [0], **MEMORY, memory_dtype=torch.float64)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).fwpkm["memory_dtype"] == "float64"
    loaded = load_memory(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path)
    assert {x.dtype for x in loaded.model.layers[0].memory.parameters()} == {torch.float64}
    with pytest.raises(ValueError, match=r"memory_dtype='float64', got memory_dtype='float32'"):
        load_memory(add_memory(qwen().double(), [0], **MEMORY), tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("make", [qwen, lambda: own(memory_layers=[])], ids=["qwen", "own"])
def test_a_memory_that_begins_as_the_identity_changes_nothing(make):
    ids, mask = prompts()
    plain = make()
    expected = plain(ids, attention_mask=mask).logits
    add_memory(plain, [1], **MEMORY, output_init="zeros")
    assert torch.equal(plain(ids, attention_mask=mask).logits, expected)
    assert not plain.model.layers[1].memory.training
    assert add_memory(make().train(), [1], **MEMORY).model.layers[1].memory.training
    plain.model.layers[1].memory.o_proj.weight.normal_()
    assert not torch.equal(plain(ids, attention_mask=mask).logits, expected)


@torch.no_grad()
def test_our_model_is_saved_and_loaded(tmp_path):
    model = own(share_pkm_table=True, memory={**MEMORY, "memory_dtype": torch.float32})
    assert model.model.layers[1].mlp.table is model.model.layers[3].mlp.table
    ids, mask = prompts()
    expected = model(ids, attention_mask=mask).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is FwPKMForCausalLM
    close(loaded(ids, attention_mask=mask).logits, expected)
    first, last = (loaded.model.layers[index].mlp.table.weight for index in (1, 3))
    assert first is last
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {name for name, x in half.named_parameters() if x.dtype == torch.float32}
    assert {name.split(".", 3)[3] for name in wide} == {f"{x}.{y}" for x in ("memory", "mlp") for y in MEMORIES}
    assert half(ids, attention_mask=mask).logits.dtype == torch.bfloat16


def test_a_memory_may_be_of_half_precision_too(tmp_path):
    own(memory={**MEMORY, "memory_dtype": torch.bfloat16}).save_pretrained(tmp_path)
    memory = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).model.layers[0].memory
    assert {memory.get_parameter(name).dtype for name in MEMORIES} == {torch.bfloat16}


@torch.no_grad()
def test_what_a_checkpoint_lacks_is_drawn_and_the_rest_loaded(tmp_path):
    plain = qwen()
    plain.save_pretrained(tmp_path)
    config = FwPKMConfig(**SIZES, memory_layers=[1], memory={**MEMORY, "output_init": "zeros"})
    model = FwPKMForCausalLM.from_pretrained(tmp_path, config=config)
    memory = model.model.layers[1].memory
    ids, mask = prompts()
    assert torch.equal(model(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)
    check_drawn(memory)
    assert memory.o_proj.weight.count_nonzero() == 0
    heads = {name: x for name, x in OWN.items() if name.startswith("linear")}
    mixed = FwPKMConfig(**SIZES, **heads, layer_types=["linear_attention", "full_attention", "full_attention"])
    check_mixer(FwPKMForCausalLM.from_pretrained(tmp_path, config=mixed).model.layers[0].self_attn)


@torch.no_grad()
def test_our_layers_begin_as_they_do_alone():
    model = own()
    check_drawn(model.model.layers[0].memory)
    fresh = ProductKeyMemory(32, **PKM)
    for name, x in model.model.layers[1].mlp.named_parameters():
        torch.testing.assert_close(x.std(), fresh.get_parameter(name).std(), rtol=0.5, atol=1e-3)
    check_mixer(model.model.layers[0].self_attn)


def check_mixer(mixer) -> None:
    """A Gated DeltaNet as Qwen3-Next draws it."""
    assert mixer.dt_bias.eq(1).all()
    rates = mixer.A_log.exp()
    assert rates.ge(0.0099).all()
    assert rates.le(16.01).all()
    assert rates.std() > 0


def check_drawn(memory: FastWeightProductKeyMemory) -> None:
    """As the layer draws it, and not transformers."""
    assert memory.keys.abs().max() <= 8**-0.5
    assert memory.keys.abs().max() > 0.9 * 8**-0.5
    torch.testing.assert_close(memory.table.weight.std(), torch.tensor(16**-0.5), rtol=0.1, atol=0)
    assert memory.q_proj.weight.abs().max() <= 32**-0.5
    assert memory.q_proj.bias.count_nonzero() > 0


def test_names_of_the_papers_models():
    config = FwPKMConfig.published("gdn + swa | pkm@6 + fwpkm@2,10", memory={"num_keys": 16})
    assert config.layer_types == ["linear_attention", "sliding_attention"] * 6
    assert (config.memory_layers, config.pkm_layers, config.memory) == ([2, 10], [6], {"num_keys": 16})
    assert (config.sliding_window, config.hidden_size, config.num_hidden_layers) == (512, 768, 12)
    assert FwPKMConfig.published("fa").memory_layers == []
    with torch.device("meta"):
        model = FwPKMForCausalLM(FwPKMConfig.published())
    tables = [x for name, x in model.named_parameters() if name.endswith("table.weight")]
    assert [x.shape for x in tables] == [(512**2, 512)] * 3
    for name in ("mamba", "gdn | fwpkm", "gdn | ttt@3", "gdn | pkm@x", ""):
        with pytest.raises(ValueError, match="`name` must be as in"):
            FwPKMConfig.published(name)


BAD_CONFIGS = {
    "memory_layers": {"memory_layers": [4]},
    "pkm_layers": {"pkm_layers": [1, 1]},
    "layer_types": {"layer_types": ["chunked_attention"] * 4},
    "num_hidden_layers": {"layer_types": ["full_attention"] * 3},
    "layer_types` must say": {"layer_types": None, "use_sliding_window": True},
    "memory": {"memory": {"layer_idx": 3}},
    "pkm": {"pkm": {"num_key": 8}},
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configurations_are_named(name):
    with pytest.raises(Exception, match=f"`{name}"):
        FwPKMConfig(**(OWN | BAD_CONFIGS[name]))


def test_three_kinds_of_attention_need_a_transformers_that_masks_them(monkeypatch):
    monkeypatch.setattr(language_model, "_INSTALLED", Version("5.23"))
    FwPKMForCausalLM(FwPKMConfig(**ONLY_GDN))
    kinds = ["linear_attention", "sliding_attention", "full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"`layer_types` must be of two kinds at most before transformers 5.24"):
        FwPKMForCausalLM(FwPKMConfig(**{**OWN, "layer_types": kinds}))


@torch.no_grad()
def test_hooks_of_accelerate_go_on():
    model, (ids, mask) = qwen(), prompts()
    for module in (model, model.model, *model.model.layers):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    add_memory(model, [0, 2], **MEMORY)
    expected = add_memory(qwen(), [0, 2], **MEMORY)
    expected.load_state_dict(model.state_dict())
    close(model(ids, attention_mask=mask).logits, expected(ids, attention_mask=mask).logits)


def test_bad_additions_are_named_and_change_nothing():
    model = qwen()
    for layers in ([3], [1, 1], []):
        with pytest.raises(ValueError, match="`layers` must be different indices below 3"):
            add_memory(model, layers, **MEMORY)
    with pytest.raises(ValueError, match="`layers`"):
        add_memory(model, [-1], **MEMORY)
    with pytest.raises(TypeError, match="`dtype` must not be among the options"):
        add_memory(model, [1], dtype=torch.float32)
    with pytest.raises(ValueError, match="`key_dim` must be even"):
        add_memory(model, [1], key_dim=3)
    with pytest.raises(TypeError, match="`model` must have a decoder with `layers`, got Linear"):
        add_memory(torch.nn.Linear(1, 1), [0])
    both = BartConfig(vocab_size=9, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=9)
    with pytest.raises(TypeError, match="`model` must have no encoder, got BartForConditionalGeneration"):
        add_memory(BartForConditionalGeneration(both), [0], **MEMORY)
    with torch.device("meta"), pytest.raises(ValueError, match="`model` must hold its weights in memory"):
        add_memory(Qwen3ForCausalLM(Qwen3Config(**SIZES)), [1], **MEMORY)
    assert type(model) is Qwen3ForCausalLM
    assert not hasattr(model.config, "fwpkm")
    add_memory(model, [1], **MEMORY)
    with pytest.raises(ValueError, match="`model` must have no memory yet"):
        add_memory(model, [2], **MEMORY)


def test_checkpoints_of_another_configuration_are_named(tmp_path):
    with_memory().save_pretrained(tmp_path / "memory")
    qwen().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="chunk_size=6, got chunk_size=4"):
        load_memory(with_memory(chunk_size=4), tmp_path / "memory")
    own(**ONLY_GDN).save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="`folder` must have been saved from a model with memories .*plain$"):
        load_memory(qwen(), tmp_path / "plain")
    with pytest.raises(ValueError, match="`folder` must .*; AutoModelForCausalLM loads an FwPKMForCausalLM"):
        load_memory(qwen(), tmp_path / "own")
    with pytest.raises(
        ValueError, match=r"layers.0.memory.q_norm.weight of shape \[32\], as in the checkpoint, got \[16\]"
    ):
        load_memory(Qwen3ForCausalLM(Qwen3Config(**(SIZES | {"hidden_size": 16}))), tmp_path / "memory")


@torch.no_grad()
def test_a_cache_must_know_the_layers_and_keeps_its_rows(added):
    layer, x = FastWeightProductKeyMemory(32, **MEMORY), torch.randn(2, 5, 32)
    with pytest.raises(ValueError, match="`cache` must know how many layers.*DynamicCache built without a config"):
        layer(x, cache=DynamicCache())
    cache = DynamicCache(config=added.config)
    whole = layer(torch.cat((x, x), 1))
    close(torch.cat((layer(x, cache=cache), layer(x, cache=cache)), 1), whole)
    with pytest.raises(ValueError, match="a memory for each of the 3 rows, got 2 memories"):
        layer(torch.randn(3, 1, 32), cache=cache)
    cache.reset()
    assert layer(torch.randn(3, 1, 32), cache=cache).shape == (3, 1, 32)


def test_a_trainer_runs_ten_steps(tmp_path):
    model = own(pkm_layers=[], gate_price=0.1)
    ids, _ = prompts()
    examples = [{"input_ids": ids[0], "labels": ids[0]}] * 8
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=10,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        gradient_checkpointing=True,
    )
    trainer = Trainer(model, arguments, train_dataset=examples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 10
    assert losses[-1] < 0.7 * losses[0]


def test_the_ten_lines(tmp_path):
    """Those of docs/layers.md, on a small model."""
    words = {"[PAD]": 0, "[UNK]": 1, **{word: index for index, word in enumerate("abcdef", 2)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    qwen().save_pretrained(tmp_path)
    prompts = ["a b c d e f a b", "c d"]

    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "layers.md").read_text("utf-8"), re.DOTALL)
    (lines,) = (block for block in blocks if "add_memory" in block)
    lines = lines.replace('"Qwen/Qwen3-0.6B"', "folder").replace("layers=[2, 14]", "layers=[0, 2]")
    lines = lines.replace("num_keys=512, chunk_size=512", "**MEMORY").replace("max_new_tokens=64", "max_new_tokens=8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([tokenizer(prompt) for prompt in prompts])
    names: dict[str, Any] = {"folder": tmp_path, "MEMORY": MEMORY, "batch": batch, "prompts": prompts}
    exec(lines, names)
    model, text = names["model"], names["text"]
    assert model.model.layers[0].memory.o_proj.weight.count_nonzero() > 0
    assert text.shape == (2, 16)
