"""Checking two products when one of them is used first."""

from __future__ import annotations

import threading
import weakref

import torch

from .._check.adjoint import check_maps
from .._programs.program import Program
from .._torch.modes import outside_transforms
from .._transpose.missing import resolve
from .._transpose.transpose import transpose
from ..errors import AdjointError, LinearizeError, MissingDerivativeError
from .product import Product


def check_adjoint(pushforward: Product, pullback: Product) -> None:
    """Check that two products are adjoint, and name what is at fault if they are not.

    Raises
    ------
    AdjointError
        Naming the first operation or custom Function at which they part.
    """

    def resolved() -> tuple[Program, Program]:
        opaque = pushforward._policy.opaque
        return resolve(pullback.program, **opaque), resolve(pushforward.program, **opaque)

    with outside_transforms(), torch.inference_mode(False), torch.no_grad():
        # Both programs are made first: what is derived of one is then at hand for both.
        programs = pullback.program, pushforward.program
        ranks = pushforward._lifetime.ranks
        check_maps(
            pullback._apply,
            pushforward._apply,
            *programs,
            resolved,
            transpose,
            None if ranks is None else ranks.total,
            4 if ranks is None else ranks.seed,
        )


class _FirstUse:
    """Checks two products when one of them is used first; a failure stays one."""

    def __init__(self, pushforward: Product, pullback: Product) -> None:
        # Weak, and held by the products: either of them may be gone.
        self.products = weakref.ref(pushforward), weakref.ref(pullback)
        self.lock = threading.RLock()
        self.state: LinearizeError | None = None
        self.busy = False

    def __call__(self) -> None:
        with self.lock:
            if self.busy:
                return
            if self.state is not None:
                raise self.state
            products = [p for p in (ref() for ref in self.products) if p is not None]
            if len(products) == 2:
                self.busy = True
                try:
                    check_adjoint(*products)
                except MissingDerivativeError:
                    pass  # there is nothing to compare with
                except AdjointError as error:
                    self.state = error
                    raise
                finally:
                    self.busy = False
            for p in products:
                p._first = None


def check_before_use(pushforward: Product, pullback: Product) -> None:
    """Have two products checked when one of them is used first, if both are alive then."""
    pushforward._first = pullback._first = _FirstUse(pushforward, pullback)
