"""What is seen of the contexts of custom Functions while f runs.

PyTorch drops some of it after `forward`, and a context does not tell all of the rest. The
records are keyed weakly by context, which is the graph's node, and so go with the graph.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .._programs.residuals import Residual
from .._spaces.space import TensorSpec
from .._text.labels import Line
from .._torch.contexts import ContextWatcher
from .._torch.graphs import forward_class
from .._torch.ranks import collective_kind


@dataclasses.dataclass(slots=True)
class ContextRecord:
    """What was seen of one context while `forward` ran."""

    inputs: tuple[TensorSpec | None, ...] | None = None
    #: The arguments that are no tensors, of collectives only.
    settings: tuple[Any, ...] | None = None
    versions: tuple[tuple[weakref.ref[torch.Tensor], int], ...] = ()
    saved_for_forward: tuple[Residual | None, ...] | None = None
    materialize: bool = True
    line: Line | None = None


class ContextRecords:
    """Records of the contexts made during one forward run, keyed weakly by context.

    Attributes
    ----------
    locate
        Tells the line of f that is being executed; None if nobody wants to know.
    collectives
        The contexts of collectives, in order; these are kept, as other ranks wait for them.
    """

    def __init__(self) -> None:
        self.locate: Callable[[], Line | None] | None = None
        self._records: weakref.WeakKeyDictionary[Any, ContextRecord]
        self._records = weakref.WeakKeyDictionary()
        self.collectives: list[Any] = []

    def watching(self) -> ContextWatcher:
        """Return the context manager inside which contexts are recorded."""
        return ContextWatcher(self._created, self._saved, self._materialize)

    def get(self, ctx: Any) -> ContextRecord:
        """Return the record of `ctx`, an empty one if none was made."""
        return self._records.get(ctx) or ContextRecord()

    def communicating(self) -> list[Any]:
        """Return the contexts of collectives that products have to run, in order."""
        return [
            ctx for ctx in self.collectives if any(ctx.needs_input_grad) and not is_identity(ctx)
        ]

    def communicates(self) -> bool:
        """Whether products have to communicate."""
        return bool(self.communicating())

    def __len__(self) -> int:
        return len(self._records)

    def _created(self, ctx: Any, arguments: tuple[Any, ...] | None) -> None:
        record = self._records[ctx] = ContextRecord()
        if self.locate is not None:
            record.line = self.locate()
        if is_collective(ctx):
            self.collectives.append(ctx)
            record.settings = tuple(
                None if isinstance(a, torch.Tensor) else a for a in arguments or ()
            )
        if arguments is not None:
            record.inputs = tuple(
                TensorSpec.of(a) if isinstance(a, torch.Tensor) else None for a in arguments
            )
            record.versions = tuple(
                (weakref.ref(a), a._version)
                for a in arguments
                if isinstance(a, torch.Tensor) and not a.is_inference()
            )

    def _saved(self, ctx: Any, tensors: tuple[torch.Tensor | None, ...]) -> None:
        # Aliases without history: a saved output would otherwise hold its own node alive.
        source = f"{function_name(forward_class(ctx))} (save_for_forward)"
        self._records.setdefault(ctx, ContextRecord()).saved_for_forward = tuple(
            None if t is None else Residual(t.detach(), source) for t in tensors
        )

    def _materialize(self, ctx: Any, value: bool) -> None:
        self._records.setdefault(ctx, ContextRecord()).materialize = value


#: Functions that only wait for what another one has begun.
_IDENTITIES = frozenset({"wait_tensor", "_wrap_tensor_autograd"})


def is_collective(ctx: Any) -> bool:
    """Whether a context is that of a collective, or of what stands beside one."""
    return bool(collective_kind(forward_class(ctx)))


def is_identity(ctx: Any) -> bool:
    """Whether a context is that of a Function which only waits."""
    return collective_kind(forward_class(ctx)) in _IDENTITIES


def function_name(cls: Any) -> str:
    """Return the name of a custom Function, or of the operator that it was made for."""
    name: str = cls.__name__
    if name.startswith("GeneratedBackwardFor_"):
        return name.removeprefix("GeneratedBackwardFor_")
    return str(cls.__qualname__).replace("<locals>.", "")
