"""Derivatives of solutions, by the implicit function theorem.

A solver finds x with f(x, p) = 0. How x moves with p does not depend on how it was found:
∂f/∂x · dx = −∂f/∂p · dp. The functions here attach that derivative to a solution that any solver
found, at the price of one run of f and one linear solve for each derivative.

>>> import torch, linearize as lz, linearize.implicit
>>> p = torch.tensor([4.0, 9.0], dtype=torch.float64, requires_grad=True)
>>> found = p.detach().sqrt()  # by any solver
>>> x = lz.implicit.root(lambda x, p: x * x - p, found, p)
>>> torch.autograd.grad(x.sum(), p)[0]
tensor([0.2500, 0.1667], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ._capture.capture import Capture, capture
from ._capture.dependence import derivative
from ._capture.graph import other_leaves
from ._derivatives.gradient import gradient_and_value
from ._points.jacobian import run
from ._points.linearization import Linearization
from ._spaces.flat import Parts
from ._spaces.operators import operator_between
from ._spaces.solvers import (
    Automatic,
    Blocks,
    Solve,
    Solving,
    batch_size,
    checked_inverse,
)
from ._spaces.space import Space, differentiable
from ._spaces.specs import describe
from ._spaces.trees import tangent_leaves, tangent_part
from ._torch.modes import eagerly, functorch_active
from ._torch.names import pytree
from .errors import LinearizeError, SpaceError, StructureError, UnsupportedError

__all__ = ["least_squares", "minimum", "root"]

#: A pytree of tensors: a solution is one structured like the start.
X = TypeVar("X")


def __dir__() -> list[str]:
    return __all__


@eagerly
def root(
    f: Callable[..., Any],
    x: X,
    *params: Any,
    solve: Solve | None = None,
    tol: float | None = None,
    batch: bool = False,
) -> X:
    """Return the solution x of `f(x, *params) = 0` with its derivatives by the params.

    Parameters
    ----------
    f
        A function of x and the params with as many numbers as x.
    x
        The solution, found by any solver: a pytree of real tensors.
    *params
        Pytrees of tensors.
    solve
        Solves the linear systems: takes an operator A, ∂f/∂x or its transpose, and a flat
        vector b. None for what suits the size: the matrix is written out and factorized, once,
        or, beyond a thousand unknowns, the system is solved by products alone
        (`linearize.solvers.iterative`).
    tol
        The largest component of `f(x, *params)` that still counts as zero. None for 1e-6 in
        double precision and 1e-3 in single.
    batch
        Whether the first dimension of every tensor of x and of f(x) counts independent systems.
        Their small matrices are had from as many products as one of them has unknowns, and
        solved together; that the systems are independent is seen by the residual.

    Returns
    -------
    pytree
        The solution, differentiable once with respect to the params, in reverse and in forward
        mode.

    Raises
    ------
    LinearizeError
        If f is not zero at x: the derivative would be that of something else. Or, in the
        backward pass, if what `solve` returns does not solve the system.
    SpaceError
        If f does not return as many numbers as x has.
    UnsupportedError
        Under the transforms of `torch.func`, and at a second derivative.
    """
    return _attached("root", f, x, params, solve, tol, batch)


def _attached(
    name: str,
    f: Callable[..., Any],
    x: X,
    params: tuple[Any, ...],
    solve: Solve | None,
    tol: float | None,
    batch: bool,
) -> X:
    """Return a solution with its derivatives; that of a gradient has a symmetric system."""
    if functorch_active():
        raise UnsupportedError(
            f"{name}: does not run under torch.func transforms. For many systems at once (vmap), "
            "give f all of them, stacked along the first dimension, with batch=True; for "
            "Jacobians take linearize.func.jacrev or torch.autograd.functional.jacobian"
        )
    space = Space.of_tree(x, "tangent", "x")
    if not space.tensors:
        raise StructureError(f"{name}: x: expected floating point tensors, got {describe(x)}")
    if space.is_complex:
        raise UnsupportedError(
            f"{name}: expected real numbers, got complex ones; let f take torch.view_as_real(x)"
        )
    given = tangent_leaves(params)
    start = pytree.tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, x)
    fixed = pytree.tree_map(lambda t: t.detach() if differentiable(t) else t, params)
    captured = capture(f, (start, *fixed), {}, range(1 + len(fixed)))
    if torch.is_grad_enabled():
        _check_closure(captured, name)
    here = Linearization(captured)
    value = here.out_space.filled(tangent_part(here.value))
    if here.out_space.size != space.size:
        raise SpaceError(
            f"{name}: f returns {here.out_space.size} numbers for the {space.size} of x"
        )
    largest = max((float(t.abs().max()) for t in value if t.numel()), default=0.0)
    limit = _limit(space) if tol is None else tol
    if not largest <= limit:
        raise LinearizeError(
            f"{name}: x is no solution, the largest component of f(x) is {largest:.3g} (tol "
            f"{limit:.3g}); solve more accurately, or give tol"
        )
    parts = space.filled(start)
    symmetric = name != "root"
    if batch:
        batch_size(space, here.out_space)
    own = Blocks() if batch else Automatic()
    solving = own if solve is None else Solving(solve)
    system = _System(here, space, len(given), solving, symmetric=symmetric)
    results = _Solution.apply(system, *parts, *given)  # type: ignore[no-untyped-call]
    solution: X = space.element_of(results)
    return solution


@eagerly
def minimum(
    loss: Callable[..., torch.Tensor],
    x: X,
    *params: Any,
    solve: Solve | None = None,
    tol: float | None = None,
    batch: bool = False,
) -> X:
    """Return the minimum x of `loss(x, *params)` with its derivatives by the params.

    The gradient is zero there: the derivatives are those of its root. The systems are those of
    the Hessian, which is symmetric.

    Parameters
    ----------
    loss
        Returns one real number.
    x, *params, solve, tol, batch
        As for `root`; `tol` is for the gradient.

    Returns
    -------
    pytree
        As for `root`.

    Raises
    ------
    LinearizeError
        As for `root`.
    """

    @derivative
    def gradient(x: Any, *params: Any) -> Any:
        return gradient_and_value(lambda x: loss(x, *params))(x)[0]

    return _attached("minimum", gradient, x, params, solve, tol, batch)


@eagerly
def least_squares(
    residual: Callable[..., Any],
    x: X,
    *params: Any,
    solve: Solve | None = None,
    tol: float | None = None,
    batch: bool = False,
) -> X:
    """Return the least-squares solution of `residual(x, *params)` with its derivatives.

    The systems are those of the exact Hessian of half the sum of squares, not of its
    Gauss–Newton part: where residuals remain, only the former gives the derivative.

    Parameters
    ----------
    residual
        Returns a tensor, or a pytree of tensors.
    x, *params, solve, tol, batch
        As for `root`; `tol` is for the gradient Jᵀ·r.

    Returns
    -------
    pytree
        As for `root`.

    Raises
    ------
    LinearizeError
        As for `root`.
    """

    def half(x: Any, *params: Any) -> torch.Tensor:
        leaves = tangent_leaves(residual(x, *params))
        return torch.stack([(t * t).sum() for t in leaves]).sum() / 2

    return minimum(half, x, *params, solve=solve, tol=tol, batch=batch)


def _check_closure(captured: Capture, name: str) -> None:
    """Raise if f depends on tensors that require grad besides its arguments."""
    others = other_leaves(captured.edges, captured.nodes())
    if others:
        shapes = ", ".join(str(tuple(t.shape)) for t in others[:5])
        more = ", ..." if len(others) > 5 else ""
        raise UnsupportedError(
            f"{name}: f depends on {len(others)} tensor(s) that require grad and are no arguments "
            f"of it (shapes {shapes}{more}): the solution would have no derivative by them. Pass "
            "them as params (for a module: dict(net.named_parameters()), and "
            "torch.func.functional_call inside f), or detach them if they are constants"
        )


class _System:
    """∂f/∂x and ∂f/∂p at the solution, from one run of f."""

    def __init__(
        self,
        here: Linearization,
        space: Space,
        count: int,
        solving: Solving,
        *,
        symmetric: bool,
    ) -> None:
        self.space = space
        self.of = here.out_space
        self._jvp, self._vjp = here.jvp_fn, here.vjp_fn
        self._count = count
        self._size = len(space.tensors)
        by_x = operator_between(
            space,
            here.out_space,
            self._apply_adjoint if symmetric else self._apply,
            self._apply_adjoint,
            self_adjoint=symmetric,
            name="∂f/∂x",
        )
        self._inverse = checked_inverse(by_x, solving, None)

    def _apply(self, parts: Parts, *, stacked: bool) -> Parts:
        tensors: list[Any] = [*parts, *([None] * self._count)]
        return run(self._jvp, tensors, stacked=stacked)

    def _apply_adjoint(self, parts: Parts, *, stacked: bool) -> Parts:
        return run(self._vjp, parts, stacked=stacked)[: self._size]

    def forward(self, tangents: list[torch.Tensor | None]) -> Parts:
        """Return dx for dp."""
        change = self._jvp._apply([*([None] * self._size), *tangents])
        return self._inverse._apply([-t for t in change], stacked=False)

    def reverse(self, cotangents: Parts) -> Parts:
        """Return the cotangents of p for those of x."""
        w = self._inverse._apply_adjoint(cotangents, stacked=False)
        return self._vjp._apply([-t for t in w])[self._size :]


class _Solution(torch.autograd.Function):
    """A solution as a function of the params."""

    @staticmethod
    def forward(system: _System, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t.clone() for t in tensors[: len(system.space.tensors)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.system = inputs[0]
        ctx.save_for_backward(*inputs[1 + len(ctx.system.space.tensors) :])

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        system: _System = ctx.system
        results = system.reverse([u.detach() for u in cotangents])
        if torch.is_grad_enabled():
            results = list(_Once.apply(len(results), *results, *cotangents, *ctx.saved_tensors))  # type: ignore[no-untyped-call]
        return (None, *([None] * len(cotangents)), *results)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: torch.Tensor | None) -> Any:
        system: _System = ctx.system
        return tuple(system.forward(list(tangents[len(system.space.tensors) :])))


class _Once(torch.autograd.Function):
    """Gradients that cannot be differentiated again: without this, they would pass as constant."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        raise UnsupportedError(
            "an implicit derivative can be differentiated once only; differentiate through the "
            "solver's own steps, or use finite differences of the gradient"
        )


def _limit(space: Space) -> float:
    double = all(leaf.dtype == torch.float64 for leaf in space.tensors)
    return 1e-6 if double else 1e-3
