"""Comparing both products of a function with references that know nothing of the package."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import linearize as lz
from tests.support.references import REFERENCES, Plain, gradient, like, tensors

#: At the third call of a closure the simplified program is tried, at the fourth it serves.
CALLS = 4


class Counted:
    """Counts the runs of a function."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f
        self.runs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return self.f(*args, **kwargs)


def noted(method: Callable[..., Any], points: set[bytes]) -> Callable[..., Any]:
    """Wrap a method of a function for SciPy to note the points that it is asked for."""

    @functools.wraps(method)
    def wrapper(x: Any, *args: Any) -> Any:
        points.add(np.asarray(x, dtype=float).tobytes())
        return method(x, *args)

    return wrapper


@contextlib.contextmanager
def same_draws(seed: int = 0) -> Iterator[None]:
    """Let every function inside draw the same numbers, and leave the outside as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def compare(
    f: Callable[..., Any],
    *primals: Any,
    reference: str = "difference",
    tol: float = 1e-7,
    **options: Any,
) -> lz.Linearization:
    """Compare value and products of `f`, each called four times, and count the runs of `f`.

    `f` must compute the same each time. Directions differ from call to call, so that nothing
    can be right by being remembered. Returns the linearization.
    """
    plain = Plain(f, primals)
    value = [y.detach().clone() for y in plain(plain.at)]
    counted = Counted(f)
    here = lz.Linearizer(counted, **options).at(*primals)
    close(here.value, value, 1e-12 if tol < 1e-6 else tol)
    for call in range(CALLS):
        v = like(primals, seed=2 * call + 1)
        close(here.jvp_fn(*v), REFERENCES[reference](plain, tensors(v)), tol)
        u = like(here.value, seed=2 * call + 2)
        close(here.vjp_fn(u), gradient(plain, tensors(u)), tol)
    close(here.value, value, 1e-12 if tol < 1e-6 else tol)
    assert counted.runs == 1
    return here


def close(got: Any, expected: Any, tol: float) -> None:
    """Compare the differentiable tensors, with a tolerance relative to the largest entry."""
    mine, theirs = tensors(got), tensors(expected)
    assert len(mine) == len(theirs)
    size = max((float(t.abs().max()) for t in theirs if t.numel()), default=0.0)
    for a, b in zip(mine, theirs, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=tol, atol=tol * max(size, 1e-3))
