"""Checking two products when one of them is used first, or at each use."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch

from .._check.adjoint import check_maps
from .._execute.binding import BoundProgram
from .._spaces.balance import Total
from .._torch.modes import outside_transforms
from .._transpose.missing import resolve
from .._transpose.transpose import transpose
from ..errors import AdjointError, LinearizeError, MissingDerivativeError, StalenessError
from .product import Product


def check_adjoint(pushforward: Product, pullback: Product, *, thorough: bool = True) -> None:
    """Check that two products are adjoint, and name what is at fault if they are not.

    `thorough` as of `check_maps`. If a rank cannot make the check, that is an error on every rank
    that f communicates with.
    """
    ranks = pushforward._lifetime.ranks

    def check(total: Total | None, seed: int, resolved: _Pair | None = None) -> None:
        # Both programs are made first: what is derived of one is then at hand for both.
        programs = pullback.program, pushforward.program
        check_maps(
            lambda u: pullback._apply(pullback._arguments.alike(u)),
            lambda v: pushforward._apply(pushforward._arguments.alike(v)),
            *programs,
            lambda: resolved or _resolved(*programs, pushforward),
            transpose,
            thorough=thorough,
            total=total,
            seed=seed,
        )

    with outside_transforms(), torch.inference_mode(False), torch.no_grad():
        if ranks is None:
            check(None, 4)
            return
        ranks.whole(
            "a check",
            lambda: _resolved(pullback.program, pushforward.program, pushforward),
            lambda resolved: check(ranks.total, ranks.seed, resolved),
        )


_Pair: TypeAlias = tuple[BoundProgram, BoundProgram]


def _resolved(pullback: BoundProgram, pushforward: BoundProgram, product: Product) -> _Pair:
    """Return two programs with nothing missing."""
    options = product._policy.opaque
    return pullback.made(resolve, **options), pushforward.made(resolve, **options)


class _FirstUse:
    """Checks two products when one of them is used first; a failure stays one."""

    def __init__(self, pushforward: Product, pullback: Product, *, held: bool) -> None:
        # Weak, and held by the products: either of them may be gone.
        self.products = weakref.ref(pushforward), weakref.ref(pullback)
        #: Both, where other ranks make the check too, whatever is gone there.
        self.held = (pushforward, pullback) if held else ()
        self.lock = threading.RLock()
        self.state: LinearizeError | None = None
        self.busy = self.done = False

    def __call__(self) -> None:
        with self.lock:
            if self.busy or self.done:
                return
            if self.state is not None:
                raise self.state
            products = [p for p in (ref() for ref in self.products) if p is not None]
            if len(products) == 2:
                self.busy = True
                try:
                    self._check(*products)
                except MissingDerivativeError:
                    pass  # there is nothing to compare with
                except AdjointError as error:
                    self.state = error
                    raise
                finally:
                    self.busy = False
            self.done, self.held = True, ()
            for p in products:
                if p._first is self:
                    p._first = None

    @staticmethod
    def _check(pushforward: Product, pullback: Product) -> None:
        """Make the one check; what the pushforward owes besides is covered by it."""
        ranks = pushforward._lifetime.ranks
        if ranks is not None and ranks.some(
            "the check before the first product", lambda: _lacks(pushforward, pullback)
        ):
            return  # there is nothing to compare with on one of them
        _, proof = pushforward.program, pushforward._proof()  # which it comes with
        with contextlib.nullcontext() if proof is None else proof.aside():
            check_adjoint(pushforward, pullback, thorough=False)


def _lacks(pushforward: Product, pullback: Product) -> bool:
    """Whether a custom Function lacks a method that cannot be derived."""
    try:
        _resolved(pullback.program, pushforward.program, pushforward)
    except MissingDerivativeError:
        return True
    return False


def check_before_use(pushforward: Product, pullback: Product, *, held: bool) -> None:
    """Have two products checked when one of them is used first.

    Both are kept until then if they are `held`; else there is no check unless both are alive.
    """
    pushforward._first = pullback._first = _FirstUse(pushforward, pullback, held=held)


class _HeldStill:
    """Checks that running statistics which a graph keeps are as they were.

    PyTorch moves them without raising their version.
    """

    def __init__(
        self, kept: Iterable[tuple[str, torch.Tensor]], then: Callable[[], None] | None
    ) -> None:
        self._kept = [(label, t, t.clone()) for label, t in kept]
        self._then = then

    def __call__(self) -> None:
        for label, t, before in self._kept:
            if not torch.equal(t, before):
                raise StalenessError(
                    f"{label}: running statistics that it needs have moved since the "
                    "linearization (the module was run in training mode); linearize anew"
                )
        if self._then is not None:
            self._then()


def check_statistics(
    products: Sequence[Product], kept: Sequence[tuple[str, torch.Tensor]]
) -> None:
    """Have products check at each use that running statistics have not moved."""
    for product in products if kept else ():
        product._first = _HeldStill(kept, product._first)
