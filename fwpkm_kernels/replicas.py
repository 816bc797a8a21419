"""The gradients of tables that several ranks have, averaged over these at the end of each backward."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
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
        weight = table.weight
        hooks = weight._post_accumulate_grad_hooks or {}
        if self._note in hooks.values():
            weight._post_accumulate_grad_hooks = hooks  # a cast of a DTensor leaves them, but nothing that calls them
        elif weight.requires_grad:
            weight.register_post_accumulate_grad_hook(self._note)

    def _note(self, weight: Tensor) -> None:
        # A number and no flag, which a backward that raises would leave set.
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        """Leave the mean over the ranks in `grad`.

        Before, that holds the mean of backwards before, which is the same on every rank, and what is this rank's own.
        """
        weights = list(dict.fromkeys(table.weight for table in (one() for one in self._tables) if table is not None))
        layouts = [0 if x.grad is None else 2 if x.grad.is_sparse else 1 for x in weights]
        of_any = torch.tensor(layouts, device=weights[0].device)
        torch.distributed.all_reduce(of_any, torch.distributed.ReduceOp.MAX, group=self._group)
        for weight, layout in zip(weights, of_any.tolist(), strict=True):
            if layout > 0:
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight, layout=torch.sparse_coo if layout == 2 else torch.strided)
                grad = weight.grad.to_local() if hasattr(weight.grad, "to_local") else weight.grad
                total = grad.to(torch.promote_types(grad.dtype, torch.float32))  # sums in bfloat16 lose, or fail
                torch.distributed.all_reduce(total, group=self._group)
                grad.copy_(total / self._ranks)


class NoReplicas:
    """What a copy of a table has in the place of `Replicas`: its gradient would be that of one rank alone."""

    def watch(self, table: Any) -> None:
        """Refuse to train."""
        if torch.is_grad_enabled() and table.weight.requires_grad:
            raise RuntimeError(
                "this table is a copy of one whose gradient `replicate_tables_` averages over ranks: call that of the "
                "model with the copy, or set requires_grad_(False)"
            )
