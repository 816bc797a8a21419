"""Memories in the caches of Hugging Face models: pieces, padding, copies, crops and generation."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [transformers]")
pytest.importorskip("accelerate", reason="needs accelerate, as transformers' Trainer does")

from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    StaticCache,
    set_seed,
)
from transformers.generation import ContinuousMixin
from transformers.generation.candidate_generator import EarlyExitCandidateGenerator
from transformers.masking_utils import create_causal_mask, create_masks_for_generate

from fwpkm_kernels.integrations.transformers import FwPKMForCausalLM, MemoryCacheLayer, add_memory
from fwpkm_kernels.layers import FastWeightProductKeyMemory, StreamedMemory
from tests.helpers.transformers import (
    CACHE,
    GREEDY,
    MAKERS,
    MEMORY,
    ONLY_GDN,
    PROMPT,
    SIZES,
    close,
    own,
    prompts,
    put_gated_delta_nets_into_pytorch,
    qwen,
    read,
    with_memory,
)


@pytest.fixture(autouse=True)
def gated_delta_nets_in_pytorch(monkeypatch):
    put_gated_delta_nets_into_pytorch(monkeypatch)


@pytest.fixture(params=MAKERS, scope="module")
def model(request):
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def added():
    return with_memory()


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
    with pytest.raises(
        ValueError, match="`tokens` must be at most 5, .* so it cannot go on: .* activate_past_recording"
    ):
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


def drafting() -> FwPKMForCausalLM:
    return own(layer_types=["full_attention", "sliding_attention"] * 2, pkm_layers=[])


@torch.no_grad()
@pytest.mark.parametrize("make", [with_memory, drafting], ids=["added", "own"])
def test_an_early_exit_drafts_with_the_first_layers_and_their_memories(make, monkeypatch):
    model, drafts = make(), []
    prompt, options = prompts()[0][:1], {**GREEDY, "max_new_tokens": 12}
    layers, expected = model.config.num_hidden_layers, model.generate(prompt, **options)
    draw = EarlyExitCandidateGenerator.get_candidates

    def note(*args, **kwargs):
        drafts.append((args[1], draw(*args, **kwargs)[0]))
        return drafts[-1][1], None

    monkeypatch.setattr(EarlyExitCandidateGenerator, "get_candidates", note)
    assert torch.equal(model.generate(prompt, assistant_early_exit=2, **options), expected)
    assert model.config.num_hidden_layers == layers
    assert len(drafts) > 1  # the second goes on from the cache of the first
    model.config.num_hidden_layers = 2
    for tokens, draft in drafts:
        for column in range(tokens.shape[1], draft.shape[1]):
            logits = model(draft[:, :column], use_cache=False).logits
            assert logits[0, -1].argmax() == draft[0, column]


@torch.no_grad()
def test_what_is_no_cache_is_refused(model):
    """As continuous batching's is none, and tuples of states were once."""
    ids, _ = prompts()
    for other in (object(), ((ids, ids),)):
        with pytest.raises(TypeError, match=f"`{CACHE}` must be a Cache of .*, got {type(other).__name__}"):
            model(ids, **{CACHE: other})
    with pytest.raises(TypeError, match=f"`{CACHE}` must be a Cache of .*, got Attributes"):
        model.generate(ids, **{CACHE: Attributes()}, **GREEDY)


class Attributes:
    """What generation marks as a cache of the user's."""


def test_continuous_batching_is_refused_before_it_begins(model, monkeypatch):
    message = f"`model` must have no memory for continuous batching.* got {type(model).__name__}"
    ids = prompts()[0]
    options = GenerationConfig(**GREEDY)
    for call in (
        model.init_continuous_batching,
        lambda: model.continuous_batching_context_manager().__enter__(),
        lambda: model.generate_batch(ids.tolist(), generation_config=options),
        lambda: model.generate(ids, cache_implementation="paged", **GREEDY),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    monkeypatch.setattr(ContinuousMixin, "init_continuous_batching", lambda *args: args)
    plain = own(memory_layers=[])
    assert plain.init_continuous_batching(options) == (plain, options)


@torch.no_grad()
def test_without_memories_any_object_may_be_the_cache():
    class Paged:
        """As transformers' PagedAttentionCache, which is none of its caches."""

        def update(self, key_states, value_states, layer_idx, **kwargs):
            return key_states, value_states

    plain, ids = own(memory_layers=[], layer_types=["full_attention"] * 4), prompts()[0]
    assert torch.equal(plain.model(ids, **{CACHE: Paged()}, use_cache=False)[0], plain.model(ids)[0])


def test_one_memory_for_the_batch_has_no_beams():
    model = with_memory(scope="batch")
    with pytest.raises(ValueError, match='`scope`="batch" has one memory'):
        model.generate(prompts()[0], num_beams=2, **GREEDY)


def test_gated_delta_nets_cannot_be_assisted():
    with pytest.raises(ValueError, match="stateful"):
        own().generate(prompts()[0][:1], prompt_lookup_num_tokens=2, **GREEDY)


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
