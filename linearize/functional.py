"""Drop-in functions with the contracts of `torch.autograd.functional`.

>>> import torch
>>> from linearize.functional import hessian, jacobian
>>> jacobian(torch.sin, torch.zeros(2))
tensor([[1., 0.],
        [0., 1.]])
>>> hessian(lambda x: x.prod(), torch.tensor([2.0, 3.0]))
tensor([[0., 1.],
        [1., 0.]])

Changing the import is enough. The function runs once, custom Functions of every style are
called directly, and what can be vectorised is, in chunks that fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from ._capture.dependence import derivative
from ._derivatives.blocks import matrix
from ._derivatives.gradient import value_and_gradient
from ._derivatives.history import Point, handed_on
from ._spaces.operators import ChunkSize, Direction, check_chunk_size
from ._torch.modes import eagerly
from ._torch.names import pytree
from .errors import OptionError, StructureError

__all__ = ["hessian", "hvp", "jacobian", "vhp"]


def __dir__() -> list[str]:
    return __all__


Strategy = Literal["auto", "reverse-mode", "forward-mode"]
_DIRECTIONS: dict[str, Direction] = {
    "auto": "auto",
    "reverse-mode": "reverse",
    "forward-mode": "forward",
}


@eagerly
def jacobian(
    func: Callable[..., Any],
    inputs: Any,
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = True,
    strategy: Strategy = "auto",
    *,
    chunk_size: ChunkSize = "auto",
) -> Any:
    """Return the Jacobian of a function, computed from one run of it.

    The contract of `torch.autograd.functional.jacobian`.

    Parameters
    ----------
    func
        Takes the inputs, and returns a tensor or a pytree of tensors.
    inputs
        A tensor or another pytree, for a function of one argument; a tuple for a function of
        several.
    create_graph
        Whether the result can be differentiated with respect to the inputs.
    strict
        Whether an output that does not depend on one of the inputs is an error, with
        `create_graph` also a derivative that depends on nothing.
    vectorize
        Whether several rows or columns are computed in one pass. Custom Functions are called
        once for each of them, inside of the pass.
    strategy
        "reverse-mode" computes rows, "forward-mode" columns, "auto" the fewer of them.
    chunk_size
        How many are computed in one pass: "auto" for as many as take a quarter of the free
        memory, None for all.

    Returns
    -------
    pytree
        Structured like the output, with a structure like the inputs in place of each leaf, of
        tensors of shape `(*output.shape, *input.shape)`.

    Raises
    ------
    OptionError
        If an option has a value that it cannot have.
    StructureError
        With `strict`, if an output does not depend on one of the inputs.
    UnsupportedError
        For complex numbers, if the derivative is linear over the real numbers only.
    """
    direction, theirs, chunk = _options(strategy, chunk_size, vectorize)
    primals, single = _primals(inputs)
    if handed_on(primals):
        return torch.autograd.functional.jacobian(
            func, inputs, create_graph, strict, vectorize, theirs
        )
    with torch.set_grad_enabled(create_graph):
        forward = "jacobian" if strategy == "forward-mode" else ""
        point = Point(func, primals, has_aux=False, forward=forward, keep=strict)
        if strict:
            _check_strict(point, "jacobian", varying=create_graph)
        return matrix(point, direction, chunk, unpack=single)


@eagerly
def hessian(
    func: Callable[..., Any],
    inputs: Any,
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = True,
    outer_jacobian_strategy: Strategy = "auto",
    *,
    chunk_size: ChunkSize = "auto",
) -> Any:
    """Return the Hessian of a scalar function, computed from one run of it and its backward.

    The contract of `torch.autograd.functional.hessian`.

    Parameters
    ----------
    func
        Takes the inputs, and returns one number as a tensor.
    inputs, create_graph
        As for `jacobian`.
    strict
        As for `jacobian`, of the gradient.
    vectorize
        As for `jacobian`.
    outer_jacobian_strategy
        How the gradient is differentiated: "reverse-mode", "forward-mode" or "auto".
    chunk_size
        As for `jacobian`.

    Returns
    -------
    pytree
        Structured like the inputs, with such a structure in place of each leaf, of tensors of
        shape `(*input.shape, *input.shape)`.

    Raises
    ------
    OptionError, StructureError
        As for `jacobian`; also if func does not return one number.
    UnsupportedError
        If the backward of a custom Function has no derivative that can be seen.
    """
    direction, theirs, chunk = _options(outer_jacobian_strategy, chunk_size, vectorize)
    primals, single = _primals(inputs)
    if handed_on(primals):
        return torch.autograd.functional.hessian(
            func, inputs, create_graph, strict, vectorize, theirs
        )

    @derivative
    def gradient(*args: Any) -> Any:
        return value_and_gradient(func, args, args[0] if single else args)[1]

    with torch.set_grad_enabled(create_graph):
        point = Point(gradient, primals, has_aux=False, keep=strict)
        if strict:
            _check_strict(point, "hessian", varying=create_graph)
        return matrix(point, direction, chunk, unpack=single)


@eagerly
def hvp(
    func: Callable[..., Any],
    inputs: Any,
    v: Any = None,
    create_graph: bool = False,
    strict: bool = False,
) -> tuple[Any, Any]:
    """Return a scalar function's value and the product of its Hessian with a vector.

    The contract of `torch.autograd.functional.hvp`. func and its backward run once. For many
    products at one point use `linearize.curvature.hessian`.

    Parameters
    ----------
    func, inputs
        As for `hessian`.
    v
        Structured like the inputs; may be left out if these are one number.
    create_graph, strict
        As for `hessian`.

    Returns
    -------
    value, product
        The product is structured like the inputs.

    Raises
    ------
    StructureError, SpaceError
        If v does not fit, or func does not return one number.
    """
    primals, single = _primals(inputs)
    if handed_on(primals, v):
        return torch.autograd.functional.hvp(func, inputs, v, create_graph, strict)  # type: ignore[no-any-return]

    @derivative
    def both(*args: Any) -> tuple[Any, Any]:
        # Both are outputs, and no `aux`, so that both keep their history.
        return value_and_gradient(func, args, args)

    with torch.set_grad_enabled(create_graph):
        point = Point(both, primals, has_aux=False, keep=strict)
        if strict:
            _check_strict_product(point, "hvp", varying=create_graph)
        value, gradient = point.value
        if v is None:
            if sum(t.numel() for t in pytree.tree_leaves(gradient)) != 1:
                raise StructureError("hvp: v may be left out only where the input is one number")
            v = pytree.tree_map(torch.ones_like, gradient)
        else:
            v = (v,) if single else v
        product = point.vjp((None, tuple(v)))
    return value, product[0] if single else product


@eagerly
def vhp(
    func: Callable[..., Any],
    inputs: Any,
    v: Any = None,
    create_graph: bool = False,
    strict: bool = False,
) -> tuple[Any, Any]:
    """Return a scalar function's value and the product of a vector with its Hessian.

    The contract of `torch.autograd.functional.vhp`; the Hessian being symmetric, the same as
    `hvp`.

    Parameters
    ----------
    func, inputs, v, create_graph, strict
        As for `hvp`.

    Returns
    -------
    value, product
        As for `hvp`.

    Raises
    ------
    StructureError, SpaceError
        As for `hvp`.
    """
    return hvp(func, inputs, v, create_graph, strict)


def _primals(inputs: Any) -> tuple[tuple[Any, ...], bool]:
    """Return the arguments, and whether there is only one that is not in a tuple."""
    return (inputs, False) if isinstance(inputs, tuple) else ((inputs,), True)


def _options(
    strategy: str, chunk_size: ChunkSize, vectorize: bool
) -> tuple[Direction, str, ChunkSize]:
    """Return the direction, its name in PyTorch, and how many products go in one pass."""
    check_chunk_size(chunk_size)
    if strategy not in _DIRECTIONS:
        raise OptionError(f"strategy must be one of {sorted(_DIRECTIONS)}, got {strategy!r}")
    theirs = "reverse-mode" if strategy == "auto" else strategy
    return _DIRECTIONS[strategy], theirs, chunk_size if vectorize else 1


def _check_strict(point: Point, what: str, *, varying: bool) -> None:
    """Raise as PyTorch does in strict mode: each output must depend on each input.

    With `varying` the derivatives must depend on something too.
    """
    table = point.dependence()
    for i, row in enumerate(table):
        if not all(row):
            raise StructureError(
                f"{what}: strict=True, and output {i} does not depend on input {row.index(False)}"
            )
    if varying:
        for i in range(len(table)):
            for j in point.constant_inputs(i, i + 1):
                raise StructureError(
                    f"{what}: strict=True and create_graph=True, and the derivative of output {i} "
                    f"by input {j} is constant"
                )


def _check_strict_product(point: Point, what: str, *, varying: bool) -> None:
    """Raise as PyTorch does in strict mode for the product of a Hessian, given value and gradient.

    Each entry of the gradient must depend on some input, and on each input some entry.
    """
    table = point.dependence()
    for i, row in enumerate(table):
        if not any(row):
            entry = f"the derivative by input {i - 1}" if i else "the output"
            raise StructureError(f"{what}: strict=True, and {entry} depends on no input")
    for j, column in enumerate(zip(*table[1:], strict=True)):
        if not any(column):
            raise StructureError(f"{what}: strict=True, and the Hessian is zero for input {j}")
    if varying:
        for j in point.constant_inputs(1):
            raise StructureError(
                f"{what}: strict=True and create_graph=True, and the product is constant for "
                f"input {j}"
            )
