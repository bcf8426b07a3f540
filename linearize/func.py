"""Drop-in functions with the contracts of `torch.func`.

Changing `from torch.func import jvp, vjp, linearize` to `from linearize.func import ...` is
enough. f runs once, and custom Functions of every style are called directly. As in
`torch.func`, results are differentiable with respect to primals, tangents and closed-over
tensors that require grad. Inside another `torch.func` transform (`vmap`, `grad`, ...) the
calls are handed on to `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._capture.capture import capture
from ._derivatives.blocks import hessian, jacfwd, jacrev
from ._derivatives.history import Point, handed_on
from ._points.linearization import Linearization
from ._spaces.compare import close_at, magnitudes
from ._spaces.space import TensorSpec, differentiable
from ._spaces.trees import tangent_leaves, tangent_part
from ._torch.names import pytree
from .errors import NotLinearError, StructureError

__all__ = [
    "hessian",
    "jacfwd",
    "jacrev",
    "jvp",
    "linear_transpose",
    "linearize",
    "vjp",
]


def __dir__() -> list[str]:
    return __all__


def jvp(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    strict: bool = False,
    has_aux: bool = False,
) -> Any:
    """Return `(func(*primals), J·tangents)`, and aux with `has_aux`.

    The contract of `torch.func.jvp`; for a single product that function is cheaper.

    Parameters
    ----------
    func
        The function; returns tensors or a pytree of them.
    primals, tangents
        Tuples of the same structure.
    strict
        Whether an output that does not depend on the primals is an error.
    has_aux
        Whether func returns `(output, aux)`.

    Returns
    -------
    output, product
        Both structured like func's output; with `has_aux` there is aux as a third.

    Raises
    ------
    StructureError, SpaceError
        If primals or tangents are not tuples, or the tangents do not fit.
    """
    if handed_on(primals, tangents):
        return torch.func.jvp(func, primals, tangents, strict=strict, has_aux=has_aux)
    if not isinstance(primals, tuple) or not isinstance(tangents, tuple):
        raise StructureError(
            f"jvp: primals and tangents must be tuples, got {type(primals).__name__} and "
            f"{type(tangents).__name__}"
        )
    point = Point(func, primals, has_aux, forward="jvp")
    if strict and any(v is None for v in point.here.jvp_fn.program.outputs):
        raise StructureError("jvp: strict=True, and an output does not depend on the primals")
    out = point.jvp(tangents)
    return (point.value, out, point.aux) if has_aux else (point.value, out)


def vjp(func: Callable[..., Any], *primals: Any, has_aux: bool = False) -> Any:
    """Return `(func(*primals), vjp_fn)`, and aux with `has_aux`.

    The contract of `torch.func.vjp`: `vjp_fn(cotangents)` returns a tuple with the cotangent of
    each primal.

    Parameters
    ----------
    func
        The function; returns tensors or a pytree of them.
    *primals
        Its arguments.
    has_aux
        Whether func returns `(output, aux)`.

    Returns
    -------
    output, vjp_fn
        With `has_aux` there is aux as a third. `vjp_fn` can be called any number of times.

    Raises
    ------
    StructureError
        If no primal is differentiable, or func returns something that is not a tensor.
    """
    if handed_on(primals):
        return torch.func.vjp(func, *primals, has_aux=has_aux)
    point = Point(func, primals, has_aux)

    def vjp_fn(
        cotangents: Any, retain_graph: bool = True, create_graph: bool | None = None
    ) -> Any:
        if not isinstance(retain_graph, bool):
            raise StructureError(
                "vjp_fn: expected one cotangent, structured like the output of the function (a "
                f"tuple for a tuple), got a second argument of type {type(retain_graph).__name__}"
            )
        with torch.set_grad_enabled(
            torch.is_grad_enabled() if create_graph is None else create_graph
        ):
            return point.vjp(cotangents)

    return (point.value, vjp_fn, point.aux) if has_aux else (point.value, vjp_fn)


def linearize(func: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """Return `(func(*primals), jvp_fn)`.

    The contract of `torch.func.linearize`: `jvp_fn(*tangents)` is J·v. Here func runs once,
    need not be traceable, and the products go with that one run.

    Parameters
    ----------
    func
        The function; returns tensors or a pytree of them.
    *primals
        Its arguments.

    Returns
    -------
    output, jvp_fn
        `jvp_fn` takes one tangent for each primal, structured and typed like it.

    Raises
    ------
    StructureError
        If no primal is differentiable, or func returns something that is not a tensor.
    """
    if handed_on(primals):
        # `torch.func.linearize` itself is wrong inside other transforms.
        value = func(*primals)
        return value, lambda *tangents: torch.func.jvp(func, primals, tangents)[1]
    point = Point(func, primals, has_aux=False, forward="linearize")

    def jvp_fn(*tangents: Any) -> Any:
        return point.jvp(tangents)

    return point.value, jvp_fn


def linear_transpose(func: Callable[..., Any], *primals: Any) -> Callable[..., Any]:
    """Return the transpose of a linear function.

    The contract of `jax.linear_transpose`: the result maps a cotangent, structured like
    func's output, to a tuple with one entry per primal. It is the plain transpose, without
    conjugation: for complex numbers Jᵀ, not the Jᴴ of `vjp`.

    Parameters
    ----------
    func
        A linear function. It runs once at `primals`, and at random points of several
        magnitudes to see that it is linear.
    *primals
        Give structure, shapes, dtypes and devices.

    Returns
    -------
    callable
        From a cotangent to a tuple with one entry for each primal.

    Raises
    ------
    NotLinearError
        If func at one of the random points is not its Jacobian at `primals` times that point.
    """
    point = Linearization(capture(func, primals, {}, range(len(primals))))
    generator = torch.Generator().manual_seed(7_919)
    elsewhere = pytree.tree_map(
        lambda x: TensorSpec.of(x).random(generator) if differentiable(x) else x, primals
    )
    image = point.jvp_fn(*tangent_part(elsewhere))
    dtypes = {x.dtype for x in tangent_leaves(primals)}
    for factor in (1.0, *magnitudes(*dtypes)):
        _check_image(func, elsewhere, image, factor)

    def transposed(cotangent: Any) -> Any:
        result = point.vjp_fn(pytree.tree_map(_conjugate, cotangent))
        return pytree.tree_map(_conjugate, result)

    return transposed


def _check_image(func: Callable[..., Any], primals: Any, image: Any, factor: float) -> None:
    """Raise if func at a multiple of a point is not that multiple of the point's image."""

    def scaled(x: Any) -> Any:
        return factor * x if differentiable(x) else x

    with torch.no_grad():
        value = func(*pytree.tree_map(scaled, primals))
    expected = pytree.tree_leaves(pytree.tree_map(scaled, image))
    for want, got in zip(expected, pytree.tree_leaves(value), strict=True):
        if want is not None and not close_at(factor, got, want):
            raise NotLinearError(
                "linear_transpose: func is not linear: at a random point, times "
                f"{factor:.0e}, it differs from its Jacobian at the primals times that point"
            )


def _conjugate(x: Any) -> Any:
    return x.conj() if isinstance(x, torch.Tensor) and x.is_complex() else x
