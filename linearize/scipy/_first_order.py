"""Value and gradient of a scalar function, without its linearization."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from cachetools import LRUCache

from .._capture.contexts import ContextRecords
from .._capture.graph import edge_of, in_graph
from .._capture.reach import Reach
from .._capture.reads import Reads
from .._capture.state import State, stamps
from .._derivatives.gradient import check_scalar
from .._points.memo import Stamp, changed, numbers
from .._spaces.trees import tangent_leaves
from ._operators import Array


class Slope(NamedTuple):
    """What one run of f and its backward gave."""

    value: float
    gradient: Array
    #: What f could reach before the run.
    state: State
    #: What f read, as it was after the run.
    reads: list[Stamp]

    def fresh(self, now: State) -> bool:
        """Whether all that f can reach and has read is as it was."""
        return not now.unseen and self.state.same(now) and not changed(self.reads)


class FirstOrder:
    """Runs f and its backward once at each point; the points are recognised by their numbers.

    `unravel` and `ravel` make the pytree of a flat vector, and the flat vector of its
    differentiable tensors.
    """

    def __init__(
        self,
        f: Callable[[Any], torch.Tensor],
        maxsize: int,
        unravel: Callable[[Array], Any],
        ravel: Callable[[list[torch.Tensor]], Array],
    ) -> None:
        self._f = f
        self._unravel, self._ravel = unravel, ravel
        self._reach = Reach(f)
        self._known: LRUCache[Hashable, Slope] = LRUCache(maxsize)

    def at(self, x: Array) -> Slope:
        """Return value and gradient at a flat vector."""
        key = (
            x.dtype.str,
            x.tobytes(),
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"),
        )
        found = self._known.get(key)
        state = self._reach.now()
        if found is None or not found.fresh(state):
            found = self._run(self._unravel(x), state)
            if self._known.maxsize:
                self._known[key] = found
        return found

    def _run(self, x: Any, state: State) -> Slope:
        leaves = tangent_leaves(x)
        inference = torch.is_inference_mode_enabled()
        with torch.inference_mode(False) if inference else nullcontext(), torch.enable_grad():
            for t in leaves:
                t.requires_grad_()
            # What f can read is known, or it is watched: that takes as long as a small f.
            watching = nullcontext() if state.whole else Reads(ContextRecords())
            with watching as reads:
                value = self._f(x)
            check_scalar(value)
            hidden = () if reads is None else in_graph([edge_of(value)])
            gradient = (
                torch.autograd.grad(value, leaves, allow_unused=True)
                if value.requires_grad
                else [None] * len(leaves)
            )
        parts = [
            torch.zeros_like(t, requires_grad=False) if g is None else g
            for t, g in zip(leaves, gradient, strict=True)
        ]
        read: list[Stamp] = [*state.stamps()]
        if reads is not None:
            read += [*reads.stamps(), *stamps(map(weakref.ref, hidden)), *numbers(reads.moving())]
        return Slope(value.item(), self._ravel(parts), state, read)
