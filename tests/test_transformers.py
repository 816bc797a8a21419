"""Memories in Hugging Face models: training, saving, configurations, and the model of our own."""

import copy
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
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Trainer,
    TrainingArguments,
)

from fwpkm_kernels.integrations import language_model
from fwpkm_kernels.integrations.transformers import FwPKMConfig, FwPKMForCausalLM, add_memory, load_memory
from fwpkm_kernels.layers import FastWeightProductKeyMemory, ProductKeyMemory
from tests.helpers.transformers import (
    CACHE,
    MAKERS,
    MEMORIES,
    MEMORY,
    ONLY_GDN,
    OWN,
    PKM,
    SIZES,
    close,
    gradients,
    own,
    prompts,
    put_gated_delta_nets_into_pytorch,
    qwen,
    with_memory,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def gated_delta_nets_in_pytorch(monkeypatch):
    put_gated_delta_nets_into_pytorch(monkeypatch)


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
