"""How a FwPKMForCausalLM is spread over processes: the plans that transformers reads, and the styles that they name."""

from typing import Any

from packaging.version import Version
from torch import nn
from transformers import Qwen3Config, __version__
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from .._operators import NAMESPACE
from ..layers import ProductKeyMemory, ValueTable

#: Before, transformers shards a layer before the table in it, which must be the other way round.
_HAS_PLANS = Version("5.24") <= Version(__version__)
_TABLE, _MLP = f"{NAMESPACE}_value_columns", f"{NAMESPACE}_mlp"  #: the styles, by the package's own name
_OF_MLP = "layers.*.mlp."
_GATED_DELTA_NET = dict.fromkeys(("in_proj_qkvz", "in_proj_ba", "out_proj"), "colwise_gather_output")


class _ValueColumns(TensorParallelLayer):
    """Each rank has its columns of a table of values, with which the layers around the table compute."""

    def validate_param(self, module: Any, param: str, mesh: Any, parameter_name: str | None = None) -> None:
        width = module.weight.shape[1]
        if width % mesh.size():
            raise ValueError(
                f"`value_dim` must be a multiple of the {mesh.size()} ranks of tensor parallelism, got "
                f"{width} in {parameter_name}"
            )

    def shard_param(self, module: Any, param: str, mesh: Any) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor

        whole = module.weight
        columns = distribute_tensor(whole, mesh, [Shard(1)], src_data_rank=None)  # on no device yet: nothing is sent
        module.weight = nn.Parameter(columns, requires_grad=whole.requires_grad)

    def install_forward(self, module: ValueTable, mesh: Any) -> ValueTable:
        module.mesh = mesh
        return module


class _MLPOrMemory(TensorParallelLayer):
    """A Qwen3MLP by Qwen3's own plan; a ProductKeyMemory in its place stays as it is, though it too has a `gate_proj`.

    A rule for `layers.*.mlp.gate_proj` would be one for both.
    """

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        if not isinstance(module, ProductKeyMemory):
            for name, style in _qwen3_plan(_OF_MLP).items():
                layer, how = module.get_submodule(name.removeprefix(_OF_MLP)), ALL_PARALLEL_STYLES[style]
                for parameter in list(layer._parameters):
                    how.shard_param(layer, parameter, mesh)
                how.install_forward(layer, mesh)
        return module


ALL_PARALLEL_STYLES.register(_TABLE, _ValueColumns())  # type: ignore[arg-type]
ALL_PARALLEL_STYLES.register(_MLP, _MLPOrMemory())  # type: ignore[arg-type]


def _qwen3_plan(prefix: str) -> dict[str, str]:
    plan: dict[str, str] = Qwen3Config.base_model_tp_plan
    return {name: style for name, style in plan.items() if name.startswith(prefix)}


def _tables(config: Any) -> dict[str, dict[str, Any]]:
    """The tables that are Parameters, by their place, with the options of their layers. Others, which are buffers, stay
    whole under both plans."""
    tables = {}
    if config.memory_layers and config.memory.get("initial_memory", "learned") == "learned":
        tables["layers.*.memory.table"] = config.memory
    if config.pkm_layers:
        tables["layers.*.mlp.table"] = config.pkm
    return tables


def _computes_by_columns(options: dict[str, Any]) -> bool:
    """Whether a layer can: not where keys move by whole rows, nor with sparse gradients, which no DTensor has."""
    return options.get("key_gradient") != "all" and not options.get("sparse_grad")


def tp_plan(config: Any) -> dict[str, str] | None:
    """The plan of tensor parallelism, of no rules but those for what is in the model: transformers warns of others."""
    if not _HAS_PLANS:
        return None
    plan: dict[str, str] = {}
    kinds = set(config.layer_types)
    if kinds - {"linear_attention"}:
        plan |= _qwen3_plan("layers.*.self_attn.")
    if "linear_attention" in kinds:
        plan |= {f"layers.*.self_attn.{name}": style for name, style in _GATED_DELTA_NET.items()}
    if not config.pkm_layers:
        plan |= _qwen3_plan(_OF_MLP)
    elif len(config.pkm_layers) < config.num_hidden_layers:
        plan["layers.*.mlp"] = _MLP
    return plan | {name: _TABLE for name, options in _tables(config).items() if _computes_by_columns(options)}


def fsdp_plan(config: Any) -> dict[str, str] | None:
    """The plan of FSDP: each table is gathered and freed by itself.

    "keep_full_weight" would not do for a table: transformers shards such modules last, after the layers around them.
    """
    if not _HAS_PLANS:
        return None
    return Qwen3Config.base_model_fsdp_plan | dict.fromkeys(_tables(config), "free_full_weight")
