"""What f could reach at one moment, to be compared with another moment."""

from __future__ import annotations

import operator
import struct
import weakref
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch

from .._torch.names import MOVING_STATISTICS, batched_or_wrapped

#: A tensor, and its version at some time.
Stamp: TypeAlias = tuple["weakref.ref[torch.Tensor]", int]

#: What carries no tensors beside its numbers.
PLAIN_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
#: By these names one tensor gives another one that is not it, or PyTorch moves one unseen.
TELLING = frozenset(
    ("grad", "_grad", "_base", "grad_fn", "main_grad", *(f.__name__ for f in MOVING_STATISTICS))
)
#: Compared by value.
PLAIN: frozenset[type] = frozenset(
    (
        *(int, float, complex, bool, str, bytes, range, slice),
        *(type(None), type(Ellipsis), type(NotImplemented)),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    )
)


class State:
    """What f could reach at one moment, written down in one flat list.

    Attributes
    ----------
    tensors
        The tensors among it.
    unseen
        Where in it something is that cannot be looked into; empty if there is none.
    whole
        Whether there are no tensors that f can read besides.
    """

    __slots__ = ("_tokens", "tensors", "unseen", "whole")

    def __init__(
        self,
        tokens: list[Any],
        tensors: list[weakref.ref[torch.Tensor]],
        unseen: str = "",
        *,
        whole: bool = False,
    ) -> None:
        self._tokens = tokens
        self.tensors = tensors
        self.unseen = unseen
        self.whole = whole and not unseen

    def same(self, other: State) -> bool:
        """Whether nothing is different at another moment."""
        mine, theirs = self._tokens, other._tokens
        if len(mine) != len(theirs):
            return False
        return all(map(operator.is_, mine, theirs)) or all(map(_alike, mine, theirs))

    def stamps(self) -> list[Stamp]:
        """Return the tensors still alive with their versions now."""
        return stamps(self.tensors)


def stamps(refs: Iterable[weakref.ref[torch.Tensor]]) -> list[Stamp]:
    """Return those tensors that are still alive with their versions now."""
    alive = ((ref, ref()) for ref in refs)
    return [
        (ref, t._version)
        for ref, t in alive
        if t is not None and not batched_or_wrapped(t) and not t.is_inference()
    ]


def _alike(a: Any, b: Any) -> bool:
    """Whether two tokens are the same; numbers by their bits."""
    if a is b:
        return True
    kind = type(a)
    if kind is not type(b):
        return False
    if kind is float:
        return struct.pack("d", a) == struct.pack("d", b)
    if kind is complex:
        return struct.pack("2d", a.real, a.imag) == struct.pack("2d", b.real, b.imag)
    if kind is tuple:
        return len(a) == len(b) and all(map(_alike, a, b))
    return kind in PLAIN and bool(a == b)
