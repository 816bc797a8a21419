"""Pools of sessions beside one `MemoryState` for each, which is what a session must be."""

from typing import Any

import torch
from torch import Tensor

from fwpkm_kernels import MemoryPool, MemoryState, fast_weight_memory_step, testing
from tests.conftest import Place
from tests.helpers.memory import make_inputs

TOKENS = ("queries", "targets", "gates", "mask")


class Pair:
    """A pool, and a state for each of its sessions, which read the same tokens one after the other."""

    def __init__(
        self, place: Place, *, heads: int = 1, capacity: int | str | None = 400, keep_past: bool = False, **options: Any
    ) -> None:
        self.options = {"chunk_size": 4, "top_k": 2, "lookahead": 1, "backend": place.backend, **options}
        sizes = {"heads": heads, "num_keys": 5, "key_width": 6, "width": 4}
        dtype = torch.float32
        inputs = make_inputs(6, 64, **sizes, mask="real", dtype=dtype, device=place.device)
        self.keys, self.values = inputs["keys"], inputs["values"]
        self.stream = {name: inputs[name] for name in TOKENS}
        self.pool = MemoryPool(self.keys, self.values, capacity=capacity, keep_past=keep_past)
        self.states: dict[int, MemoryState] = {}
        self.drawn = 0

    def open(self) -> int:
        session = self.pool.open()
        self.states[session] = MemoryState(self.keys, self.values)
        return session

    def fork(self, session: int) -> int:
        other = self.pool.fork(session)
        self.states[other] = self.states[session].clone()
        return other

    def tokens(self, rows: int, length: int) -> dict[str, Tensor]:
        """The next tokens that no session has read yet, begun again when there are no more."""
        self.drawn += 1
        begin = self.drawn * 7 % (64 - length)
        order = [(self.drawn + row) % 6 for row in range(rows)]
        return {name: x[order, begin : begin + length] for name, x in self.stream.items()}

    def step(self, sessions: list[int], length: int, lengths: list[int] | None = None, run: Any = None) -> Tensor:
        """One call of the pool, whose output is bitwise that of the states.

        A state reads at most up to the end of its chunk at a time, as a session does: several whole chunks in one step
        of a state are weighed by another kernel.
        """
        tokens = self.tokens(len(sessions), length)
        output = self._run(tokens, sessions, lengths) if run is None else run(**tokens, sessions=sessions)
        for row, session in enumerate(sessions):
            begin = length - (length if lengths is None else lengths[row])
            testing.assert_bitwise_equal(output[row, :begin], torch.zeros_like(output[row, :begin]))
            state = self.states[session]
            while begin < length:
                end = min(length, begin + 4 - state.position % 4)
                part = {name: x[row : row + 1, begin:end] for name, x in tokens.items()}
                wanted = fast_weight_memory_step(state, **part, **self.options)
                testing.assert_bitwise_equal(output[row : row + 1, begin:end], wanted)
                begin = end
        return output

    def pool_step(self, sessions: list[int], length: int, lengths: list[int] | None = None) -> Tensor:
        """One call of the pool alone."""
        return self._run(self.tokens(len(sessions), length), sessions, lengths)

    def _run(self, tokens: dict[str, Tensor], sessions: list[int], lengths: list[int] | None) -> Tensor:
        given = None if lengths is None else torch.tensor(lengths, dtype=torch.int64, device="cpu")
        return fast_weight_memory_step(self.pool, **tokens, sessions=sessions, lengths=given, **self.options)

    def check(self, session: int) -> None:
        """The session is bitwise the state."""
        state, saved = self.states[session], self.pool.state_dict(session)
        assert self.pool.position(session) == state.position
        expected = state.state_dict()
        values = self.values.clone()
        values[saved.pop("slots").to(values.device)] = saved.pop("rows").to(values.device)
        testing.assert_bitwise_equal(values, expected.pop("values"))
        if state.position == 0 and "binding" not in expected:  # the pool may be bound by others
            saved = {name: saved[name] for name in expected}
        assert saved.keys() == expected.keys()
        for name, x in expected.items():
            testing.assert_bitwise_equal(saved[name].to(x.device), x, name)

    def check_all(self) -> None:
        for session in self.states:
            self.check(session)

    def count_rows(self) -> int:
        """How many different rows the sessions hold, with their pasts: what is not free."""
        held: set[int] = set()
        for one in self.pool._sessions.values():
            while one is not None:
                if one.stored is None:
                    index = self.pool._store.indices[one.seat]
                    held |= set(index[index >= 0].tolist())
                one = one.past
        return len(held)
