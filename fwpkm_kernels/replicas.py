"""The gradients of tables that several ranks have, averaged over these at the end of each backward."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import Variable


class Replicas:
    """Tables that every rank of a group trains with all of their rows, in an order that is the same on all ranks.

    Each table calls `watch` in forward, so that a Parameter which has taken the place of another one, by a cast, a load
    or the end of a freeze, is averaged too. A rank adds 0 for a table that only others have used.
    """

    def __init__(self, tables: Sequence[Any], group: Any) -> None:
        self._tables = [weakref.ref(table) for table in tables]
        self._group, self._ranks = group, torch.distributed.get_world_size(group)
        self._backward = -1  #: PyTorch's number of the last backward at whose end there is an average
        for table in tables:
            self.watch(table)

    def __deepcopy__(self, memo: dict[int, Any]) -> "NoReplicas":
        return NoReplicas()

    def __reduce__(self) -> Any:
        return NoReplicas, ()

    def watch(self, table: Any) -> None:
        """See to it that the gradient of the table's present weight is averaged."""
        if not torch.compiler.is_compiling():
            self._watch(table)
        elif table.weight.requires_grad and not (table.watched and table.watched[0] is table.weight):
            _watch_eagerly(self, table)

    def _watch(self, table: Any) -> None:
        weight = table.weight
        hooks = weight._post_accumulate_grad_hooks or {}
        if self._note in hooks.values():
            weight._post_accumulate_grad_hooks = hooks  # a cast of a DTensor leaves them, but nothing that calls them
        elif weight.requires_grad:
            weight.register_post_accumulate_grad_hook(self._note)
        table.watched = (weight,) if weight.requires_grad else ()

    def _note(self, weight: Tensor) -> None:
        # A number and no flag, which a backward that raises would leave set.
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        """Leave the mean over the ranks in `grad`. The host waits for a GPU once, to know which tables were used.

        Before, that holds the mean of backwards before, which is the same on every rank, and what is this rank's own.
        """
        weights = list(dict.fromkeys(table.weight for table in (one() for one in self._tables) if table is not None))
        kinds = [[x.grad is not None and x.grad.is_sparse is is_sparse for x in weights] for is_sparse in (False, True)]
        of_any = torch.tensor(kinds, dtype=torch.int32, device=weights[0].device)
        torch.distributed.all_reduce(of_any, torch.distributed.ReduceOp.MAX, group=self._group)
        for weight, is_dense, is_sparse in zip(weights, *of_any.tolist(), strict=True):
            if is_dense or is_sparse:
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight) if is_dense else _no_rows(weight)
                elif is_dense and weight.grad.is_sparse:
                    weight.grad = weight.grad.to_dense()
                grad = weight.grad.to_local() if hasattr(weight.grad, "to_local") else weight.grad
                total = grad.to(torch.promote_types(grad.dtype, torch.float32))  # sums in bfloat16 lose, or fail
                torch.distributed.all_reduce(total, group=self._group)
                total.div_(self._ranks)
                if total is not grad:
                    grad.copy_(total)


@_disable_dynamo
def _watch_eagerly(replicas: Replicas, table: Any) -> None:
    """Compiled code breaks here where a Parameter has taken the place of the one that was watched."""
    replicas._watch(table)


def _no_rows(weight: Tensor) -> Tensor:
    """A sparse gradient of 0, of rows as `sparse_value_gather` has them."""
    indices = torch.empty(1, 0, dtype=torch.int64, device=weight.device)
    return torch.sparse_coo_tensor(indices, weight[:0], weight.shape, check_invariants=False)


class NoReplicas:
    """What a copy of a table has in the place of `Replicas`: its gradient would be that of one rank alone."""

    def watch(self, table: Any) -> None:
        """Refuse to train."""
        if torch.is_grad_enabled() and table.weight.requires_grad:
            raise RuntimeError(
                "this table is a copy of one whose gradient `replicate_tables_` averages over ranks: call that of the "
                "model with the copy, or set requires_grad_(False)"
            )
