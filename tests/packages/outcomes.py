"""What becomes of a function of a published package: right, right on request, or refused."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch

import linearize as lz
from linearize.errors import LinearizeError
from tests.support.comparing import CALLS
from tests.support.references import Plain, like, tensors

BOTH, MATRIX, ONE, REFUSED = "both", "with a matrix", "one", "refused"
#: In the words of the table.
WORDS = {
    BOTH: "right in both directions",
    MATRIX: 'Jᵀ·u; J·v with `opaque="materialize"`',
    ONE: "Jᵀ·u only",
    REFUSED: "refused",
}


@dataclasses.dataclass
class Outcome:
    """One of the above, and how J·v comes about or why it does not."""

    kind: str
    note: str = ""


class WrongError(AssertionError):
    """A product is not what autograd gives."""


def outcome(make: Callable[[], Any], tolerance: float = 1e-6) -> Outcome:
    """Try both products of a case, four times each, against the rows that autograd gives.

    Raises
    ------
    WrongError
        If one is wrong.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f, primals = make()
        plain = Plain(f, primals)
        rows = jacobian(plain)
        here = lz.Linearizer(f).at(*primals)
        try:
            for k in range(CALLS):
                pulled(here, rows, k, tolerance)
        except LinearizeError as error:
            return Outcome(REFUSED, _first(error))
        try:
            pushed(here, rows, primals, tolerance)
        except LinearizeError as error:
            reason = _first(error)
        else:
            by_pytorch = "second derivative" in here.program.explain()
            return Outcome(BOTH, "J·v by PyTorch's second derivative" if by_pytorch else "")
        here = lz.Linearizer(f, opaque="materialize").at(*primals)
        try:
            pushed(here, rows, primals, tolerance)
        except LinearizeError as error:
            return Outcome(ONE, _first(error))
        return Outcome(MATRIX, reason)


def jacobian(plain: Plain) -> torch.Tensor:
    """Return the real Jacobian by autograd, from as many random cotangents as it has rows.

    Unit vectors would not do: an iterative solver may break down for them.
    """
    leaves = [x.clone().requires_grad_() for x in plain.at]
    ys = plain(leaves)
    count = len(flat(ys))
    given, found = [], []
    for k in range(count):
        us = like(ys, 1000 + k)
        got = torch.autograd.grad(ys, leaves, us, retain_graph=True, allow_unused=True)
        pairs = zip(got, leaves, strict=True)
        found.append(flat([torch.zeros_like(x) if g is None else g for g, x in pairs]))
        given.append(flat(us))
    return torch.linalg.solve(torch.stack(given), torch.stack(found))


def flat(parts: Any) -> torch.Tensor:
    """Return the real and then the imaginary parts of each tensor as one vector."""
    return torch.cat(
        [
            torch.cat([t.real.reshape(-1), t.imag.reshape(-1)])
            if t.is_complex()
            else t.reshape(-1)
            for t in parts
        ]
    )


def pulled(here: Any, rows: torch.Tensor, k: int, tolerance: float) -> None:
    u = like(here.value, 2 * k)
    same(flat(tensors(here.vjp_fn(u))), rows.T @ flat(tensors(u)), tolerance, "Jᵀ·u")


def pushed(here: Any, rows: torch.Tensor, primals: Any, tolerance: float) -> None:
    for k in range(CALLS):
        v = like(primals, 2 * k + 1)
        same(flat(tensors(here.jvp_fn(*v))), rows @ flat(tensors(v)), tolerance, "J·v")


def same(got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    off = float((got - expected).abs().max())
    if not off <= tolerance * (1 + float(expected.abs().max())):
        raise WrongError(f"{what} is off by {off:.1e}: {got.tolist()} for {expected.tolist()}")


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0]
