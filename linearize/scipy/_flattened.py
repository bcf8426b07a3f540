"""Functions of pytrees, seen as functions of the real vectors that SciPy's optimizers move."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import scipy.sparse
import torch

from .. import sparse
from .._points.jacobian import Jacobian
from .._points.linearization import Linearization
from .._points.linearizer import Linearizer
from .._points.point import Point
from .._spaces.between import as_complex, as_real
from .._spaces.operators import LinearOperator
from .._spaces.space import Space, differentiable
from .._spaces.trees import tangent_leaves
from .._torch.modes import grad_enabled
from .._torch.names import pytree
from ..errors import OptionError, SpaceError, StructureError
from ._operators import Array, array, aslinearoperator

_WHAT = "functions for SciPy's optimizers"
Kind: TypeAlias = Literal["dense", "operator", "sparse"]


class Flattened:
    """A function of a pytree, seen as a function of a flat real vector."""

    #: How a remembered function is told from others.
    _name = ""

    def __init__(self, f: Callable[..., Any], x0: Any, maxsize: int, *, has_aux: bool) -> None:
        start = as_tensors(x0)
        self._space = Space.of_tree(start, "tangent", "x0")
        if not self._space.tensors:
            raise StructureError(
                "x0: expected floating point or complex numbers: a tensor, a NumPy array, a list "
                f"of numbers, or a pytree of tensors and arrays; got {_described(x0)}"
            )
        self._real = self._space.as_real()
        self._arrays = not any(isinstance(t, torch.Tensor) for t in pytree.tree_leaves(x0))
        self._vector = self._real.vector
        leaf = self._space.tensors[0]
        #: The start's shape if it is one real tensor.
        self._shape = (
            leaf.shape if self._space.spec.is_leaf() and self._vector.dtype == leaf.dtype else None
        )
        # What is no variable stays as it is given.
        self._others = [None if differentiable(x) else x for x in pytree.tree_leaves(start)]
        #: The start as SciPy wants it.
        self.x0: Array = self._of_parts(tangent_leaves(start)).astype(float)
        self.linearizer = Linearizer(f, match="value", maxsize=maxsize, has_aux=has_aux)

    def unravel(self, x: Array) -> Any:
        """Return the pytree that a flat vector stands for.

        Parameters
        ----------
        x
            A NumPy vector of shape (n,).

        Returns
        -------
        pytree
            Of tensors, structured like the start, with its dtypes and devices; leaves that are
            not differentiated are the start's.

        Raises
        ------
        SpaceError
            If the vector has another length.
        """
        given, spec = torch.tensor(np.ascontiguousarray(x)), self._vector
        if tuple(given.shape) != spec.shape:
            raise SpaceError(f"x: expected shape {spec.shape}, got {tuple(given.shape)}")
        given = given.to(dtype=spec.dtype, device=spec.device)
        if self._shape is not None:  # optimizers wait for this
            return given.reshape(self._shape)
        parts = self._real.split(given)
        return self._space.element_of(as_complex(parts, self._space), self._others)

    def _of_parts(self, parts: list[torch.Tensor]) -> Array:
        """Return the flat vector of the start's differentiable tensors, or others like them."""
        if self._shape is not None:
            return array(parts[0].reshape(-1))
        return array(self._real.join(as_real(parts, self._space)))

    def at(self, x: Array) -> Linearization:
        """Return the linearization at a flat vector.

        For a `ScalarFunction` it is that of the gradient, and its `aux` is the value.

        Parameters
        ----------
        x
            A NumPy vector of shape (n,).

        Returns
        -------
        Linearization
            The same object if the point is remembered.

        Raises
        ------
        SpaceError
            If the vector has another length.
        """
        here = self.linearizer.at(self.unravel(x))
        here._check_whole(_WHAT)
        return here

    def value(self, x: Array) -> Array:
        """Return the value at a flat vector, as another one; `at` goes on from this run of f."""
        point = self.linearizer._point((self.unravel(x),), {}, later=True)
        if point.in_space.group is not None:
            point.linearized(self.linearizer._linearized)._check_whole(_WHAT)
        return values(point)

    def plain_value(self, x: Array) -> Array:
        """Return the value at a flat vector by a run of f of which nothing is kept."""
        with grad_enabled():  # as f runs elsewhere
            given = self.unravel(x)
            for t in tangent_leaves(given):
                t.requires_grad_()
            value = self.linearizer.f(given)
        return _flat(value, Space.of_tree(value, "cotangent", "value"))

    def like_start(self, x: Array) -> Any:
        """Return what a flat vector stands for, as arrays if the start was given as such."""
        found = self.unravel(x)
        if not self._arrays:
            return found
        return pytree.tree_map(lambda t: array(t) if isinstance(t, torch.Tensor) else t, found)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._name}: {self._space}>"


def check_kind(kind: str, option: str) -> None:
    """Raise `OptionError` for what is no form of a matrix."""
    if kind not in get_args(Kind):
        raise OptionError(f'{option} must be "dense", "operator" or "sparse", got {kind!r}')


def matrix(J: Jacobian, kind: Kind, *, symmetric: bool = False) -> Any:
    """Return the matrix of a Jacobian, of real and imaginary parts, in the form asked for."""
    A: LinearOperator = J.as_real()
    if kind == "operator":
        return aslinearoperator(A)
    if kind == "dense":
        return array(A.materialize())
    found = sparse.jacobian(A, symmetric=symmetric and A is J, layout="scipy")
    return scipy.sparse.csr_matrix(found)  # the older class, which all solvers take


def values(here: Linearization | Point) -> Array:
    """Return a value as a flat vector, complex numbers as two."""
    return _flat(here.value, here.out_space)


def _flat(value: Any, space: Space) -> Array:
    return array(space.as_real().join(as_real(tangent_leaves(value), space)))


def as_tensors(x0: Any) -> Any:
    """Return a start with tensors in the place of NumPy arrays and lists of numbers."""
    if isinstance(x0, (list, tuple)) and x0 and all(map(_is_numbers, x0)):
        try:
            x0 = np.array(x0)
        except ValueError as error:
            raise StructureError("x0: expected rows of one length in a list of lists") from error
    if isinstance(x0, np.ndarray) and np.issubdtype(x0.dtype, np.integer):
        x0 = x0.astype(float)
    return pytree.tree_map(_as_tensor, x0)


def _as_tensor(leaf: Any) -> Any:
    """Return a floating point or complex array as a tensor; anything else as it is."""
    if not isinstance(leaf, np.ndarray) or not np.issubdtype(leaf.dtype, np.inexact):
        return leaf
    try:
        return torch.tensor(np.ascontiguousarray(leaf, dtype=leaf.dtype.newbyteorder("=")))
    except TypeError as error:
        raise StructureError(
            f"x0: PyTorch has no numbers of dtype {leaf.dtype}; convert it, x0.astype(float)"
        ) from error


def _is_numbers(x: Any) -> bool:
    if isinstance(x, (list, tuple)):
        return all(map(_is_numbers, x))
    return isinstance(x, numbers.Number) and not isinstance(x, bool)


def _described(x0: Any) -> str:
    kinds = [
        f"an array of {x.dtype}" if isinstance(x, (np.ndarray, torch.Tensor)) else repr(x)
        for x in pytree.tree_leaves(x0)
    ]
    return ", ".join(kinds[:5]) or f"an empty {type(x0).__name__}"
