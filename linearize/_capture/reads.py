"""What f reads while it runs.

The memo must know which tensors a value came from, beside the arguments: `Reads` notes them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .._torch.modes import DispatchMode, lazy_bits_respected
from .._torch.names import MOVING_STATISTICS, RUNS_BACKWARD, pytree, statistics_of
from .contexts import ContextRecords
from .state import Stamp, stamps


class Reads(TorchFunctionMode):
    """Notes every tensor that PyTorch's Python interface is given while f runs.

    Running statistics that are only read are handed on as copies: PyTorch moves them without
    raising their version, and the graph would keep them. The records of contexts are looked at as
    soon as their `apply` has returned. To `thaw` is to hand on copies of inference tensors, which
    autograd does not accept.
    """

    def __init__(self, records: ContextRecords, *, thaw: bool = False) -> None:
        super().__init__()
        self._records = records
        self._seen: dict[int, weakref.ref[torch.Tensor]] = {}
        self._moving: dict[int, torch.Tensor] = {}
        self._thaw = thaw

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.note(args)
        if kwargs:
            self.note(kwargs.values())
        if self._records.pending:
            self._records.settle()
        if func in MOVING_STATISTICS:
            args, kwargs = self._held_still(func, args, kwargs or {})
        if self._thaw and not getattr(func, "__name__", "").endswith("_"):
            args, kwargs = pytree.tree_map(_thawed, (args, kwargs))
        if func in RUNS_BACKWARD:
            # Python code that runs inside is out of this mode's sight.
            with _DeepReads(self):
                return func(*args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)

    def note(self, items: Iterable[Any]) -> None:
        for a in items:
            if isinstance(a, _TENSOR):
                self._seen[id(a)] = _REF(a)
            elif type(a) in _SEQUENCES:
                self.note(a)

    def _held_still(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take note of running statistics; hand copies on where they do not move now."""
        found, moves = statistics_of(func, args, kwargs)
        still: dict[int | str, torch.Tensor] = {}
        for place, t in found.items():
            if isinstance(t, torch.Tensor):
                self._moving[id(t)] = t
                if not moves:
                    still[place] = t.clone()
        held = tuple([still.get(i, a) for i, a in enumerate(args)])
        return held, {k: still.get(k, a) for k, a in kwargs.items()}

    def note_compiled(self, items: Iterable[Any], moving: Iterable[torch.Tensor]) -> None:
        """Take note of what compiled code reads, and of running statistics among it."""
        self.note(items)
        self._moving.update((id(t), t) for t in moving)

    def moving(self) -> list[torch.Tensor]:
        """Return tensors that PyTorch writes to without raising their version."""
        return list(self._moving.values())

    def stamps(self) -> list[Stamp]:
        """Return the tensors still alive with their versions now."""
        return stamps(self._seen.values())


#: Looked up once: this runs at each operation of f.
_TENSOR, _REF, _SEQUENCES = torch.Tensor, weakref.ref, (list, tuple)


def _thawed(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x


class _DeepReads(DispatchMode):
    """Notes the tensors that operations are given inside a backward run by f."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._reads.note(args)
        with lazy_bits_respected():
            return func(*args, **(kwargs or {}))
