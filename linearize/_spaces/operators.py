"""The contract of linear operators, and their algebra."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import torch

from ..errors import SpaceError, StructureError
from . import between
from .flat import Parts, check_flat, is_flat, refuse_array, zeros
from .maps import Apply, AtOnce, ChunkSize, Direction, KnownDiagonal, LinearMap, check_chunk_size
from .space import Space

if TYPE_CHECKING:
    import scipy.sparse.linalg

__all__ = [
    "Apply",
    "ChunkSize",
    "Direction",
    "LinearOperator",
    "SelfAdjoint",
    "check_chunk_size",
]

#: What makes operators of other packages of ours, by their names. The faces that do so stand above
#: this room; the package enters them here.
BRIDGES: dict[str, Callable[..., Any]] = {}


class LinearOperator(LinearMap):
    """A linear map between two spaces.

    Parameters
    ----------
    in_space, out_space
        What it maps from and to: pytrees of tensors.
    apply, apply_adjoint
        The map and its adjoint: functions of a list of tensors, one per differentiable leaf of
        the space, and of the keyword `stacked`: whether each tensor has one more dimension in
        front, for several elements at once. They return such a list, of new tensors.
    at_once
        Takes whether the adjoint is meant, and returns how many vectors are best mapped in one
        pass, for `chunk_size="auto"`. None for as many as fit into the memory.
    diagonal
        Takes a chunk size, and returns the diagonal where there is a shorter way to it than n
        products, else None.
    name
        For `repr` and messages.

    Notes
    -----
    `A(x)` takes a pytree and returns one. `A @ x` takes, beside pytrees, the flat forms that
    solvers work with: a tensor of shape (n,) gives one of shape (m,), and n by k gives m by k,
    the columns being mapped in vectorised passes. A flat vector is the concatenation of the
    leaves, each row by row.
    """

    #: The operator whose real and imaginary parts this one maps, if it is `as_real()` of one.
    of_parts: LinearOperator | None = None

    @property
    def H(self) -> LinearOperator:  # noqa: N802 - as in NumPy
        """The adjoint, for real numbers the transpose, for complex ones its conjugate."""
        change = self._diagonal_by(lambda d: d.conj().resolve_conj())
        return self._turned(self._apply_adjoint, self._apply, change, "H")

    @property
    def T(self) -> LinearOperator:  # noqa: N802 - as in NumPy
        """The transpose, without conjugation."""
        if not self._is_complex:
            return self.H
        apply, back = between.conjugated(self._apply_adjoint), between.conjugated(self._apply)
        return self._turned(apply, back, self._diagonal_by(lambda d: d), "T")

    def _turned(
        self, apply: Apply, back: Apply, diagonal: KnownDiagonal, word: str
    ) -> LinearOperator:
        return LinearOperator(
            self.out_space,
            self.in_space,
            apply,
            back,
            at_once=between.turned(self._at_once),
            diagonal=diagonal,
            name=f"{self._name}.{word}",
        )

    def adjoint(self) -> LinearOperator:
        """Return the adjoint, as `H` does."""
        return self.H

    def gram(self) -> LinearOperator:
        """Return Aᴴ·A, applied in one pass."""
        return SelfAdjoint(
            self.in_space,
            between.composed(self._apply, self._apply_adjoint),
            at_once=between.there_and_back(self._at_once),
            diagonal=self.squared_norms,
            name=f"{self._name}.gram()",
        )

    def damped(self, by: Any) -> LinearOperator:
        """Return A + λ·I, or A + diag(d), as Levenberg and Marquardt need it.

        Parameters
        ----------
        by
            A number; or the entries of a diagonal, a pytree structured like the space or a
            flat vector of shape (n,).

        Returns
        -------
        LinearOperator
            Of the same shape; a `SelfAdjoint` if this one is and the entries are real.

        Raises
        ------
        StructureError, SpaceError
            If the entries do not fit, or the spaces of both sides differ.
        """
        _same(self.in_space, self.out_space, f"{self!r}.damped")
        number, space = _number(by), self.in_space
        shift: LinearOperator = (
            from_diagonal(space, by) if number is None else number * identity(space)
        )
        return self + shift

    def as_real(self) -> LinearOperator:
        """Return the operator on real and imaginary parts, twice the coordinates.

        Each complex leaf becomes a real one with one more dimension of length 2, as by
        `torch.view_as_real`. Every map has such an operator, the Jacobian of a function that
        is not holomorphic too; its adjoint is the transpose for the real inner product.

        Returns
        -------
        LinearOperator
            A real one; the operator itself if it is real.
        """
        if not self._is_complex:
            return self
        real = operator_between(
            self.in_space.as_real(),
            self.out_space.as_real(),
            between.real(self._apply, self.in_space, self.out_space),
            between.real(self._apply_adjoint, self.out_space, self.in_space),
            self_adjoint=isinstance(self, SelfAdjoint),
            at_once=self._at_once,
            name=f"{self._name}.as_real()",
        )
        real.of_parts = self
        return real

    def to_scipy(self, *, real: bool = False) -> scipy.sparse.linalg.LinearOperator:
        """Return the operator as one of SciPy's: `linearize.scipy.aslinearoperator`.

        Parameters
        ----------
        real
            Whether a complex operator is taken as the real one of twice the size.

        Returns
        -------
        scipy.sparse.linalg.LinearOperator
            Of NumPy arrays, with all four products.
        """
        return BRIDGES["scipy"](self, real=real)

    def __getitem__(self, block: Any) -> LinearOperator:
        """Return a block: `G["layer.weight", "layer.bias"]`, `J[:, "bias"]`.

        Parameters
        ----------
        block
            What of `out_space`, and what of `in_space`: each the key of a dictionary, a
            position in a tuple or list, the name of a field, or `:` for all of it. Deeper parts
            are had one after another.

        Raises
        ------
        StructureError
            If there is no such part.
        """
        if not isinstance(block, tuple) or len(block) != 2:
            raise StructureError(
                f"{self!r}: a block is given by two keys, of rows and of columns, A[rows, columns]"
                f"; got {block!r}"
            )
        (out_space, rows), (in_space, columns) = (
            space.part(key)
            for space, key in zip((self.out_space, self.in_space), block, strict=True)
        )

        name = f"{self._name}[{', '.join(':' if k == slice(None) else repr(k) for k in block)}]"
        forward = between.block(self._apply, self.in_space, columns, rows)
        back = between.block(self._apply_adjoint, self.out_space, rows, columns)
        return operator_between(
            in_space,
            out_space,
            forward,
            back,
            self_adjoint=isinstance(self, SelfAdjoint) and rows == columns,
            at_once=self._at_once,
            name=name,
        )

    #: NumPy leaves `array @ A` to the operator, which says what to do.
    __array_ufunc__ = None

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise StructureError(
            f"{self!r} is no array: write it out, A.materialize().numpy(), or take SciPy's form "
            "of it, A.to_scipy()"
        )

    # -- what it does -------------------------------------------------------------------

    def __call__(self, element: Any) -> Any:
        """Map a pytree structured like `in_space` to one structured like `out_space`.

        Parameters
        ----------
        element
            The argument; None, for all or a part of it, is zero.

        Raises
        ------
        StructureError, SpaceError
            If it does not fit; the message names the leaf.
        """
        parts = self._told(lambda: self.in_space.filled(element))
        return self.out_space.element_of(self._apply(parts, stacked=False))

    @overload
    def __matmul__(self, other: LinearOperator) -> LinearOperator: ...
    @overload
    def __matmul__(self, other: torch.Tensor) -> torch.Tensor: ...
    @overload
    def __matmul__(self, other: Any) -> Any: ...
    def __matmul__(self, other: Any) -> Any:
        """Return the product with an operator, a flat vector, a matrix or a pytree.

        Parameters
        ----------
        other
            An operator, for the composition of both; a tensor of shape (n,), for a vector of
            shape (m,); a tensor of shape (n, k), for a matrix of shape (m, k); or an element of
            `in_space`, for one of `out_space`. A tensor that can be read both ways is flat.

        Raises
        ------
        StructureError, SpaceError
            If it does not fit.
        """
        if isinstance(other, LinearOperator):
            return self._after(other)
        if not self._told(lambda: is_flat(self.in_space, other, f"{self!r} @ tensor")):
            return self(other)
        if other.dim() == 2:
            return self._times(other)
        parts = self._apply(self.in_space.split(other), stacked=False)
        return self.out_space.join(parts, stacked=False)

    def _times(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the product with a matrix, several columns in each pass."""
        count = matrix.shape[1]
        if count == 0:
            return self.out_space.join(zeros(self.out_space, 0), stacked=True).mT
        images = []
        for rows in matrix.mT.contiguous().split(max(1, min(self._at_once(False), count))):
            parts = self.in_space.split(rows)
            images.append(self.out_space.join(self._several(parts), stacked=True))
        return (images[0] if len(images) == 1 else torch.cat(images)).mT

    def __rmatmul__(self, other: torch.Tensor) -> torch.Tensor:
        """Return xᵀ·A for a flat vector, or X·A for a matrix whose rows are such vectors."""
        refuse_array(other)
        if not isinstance(other, torch.Tensor):
            return NotImplemented
        return (self.T @ other.mT).mT if other.dim() == 2 else self.T @ other

    def __add__(self, other: Any) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        _same(self.in_space, other.in_space, f"{self!r} + {other!r}")
        _same(self.out_space, other.out_space, f"{self!r} + {other!r}")

        def diagonal(chunk_size: ChunkSize) -> torch.Tensor:
            return self.diagonal(chunk_size=chunk_size) + other.diagonal(chunk_size=chunk_size)

        return operator_between(
            self.in_space,
            self.out_space,
            between.added(self._apply, other._apply),
            between.added(self._apply_adjoint, other._apply_adjoint),
            self_adjoint=isinstance(self, SelfAdjoint) and isinstance(other, SelfAdjoint),
            at_once=between.fewest(self, other),
            diagonal=diagonal,
            name=f"({self._name} + {other._name})",
        )

    def __sub__(self, other: Any) -> LinearOperator:
        return self + -other if isinstance(other, LinearOperator) else NotImplemented

    def __neg__(self) -> LinearOperator:
        return -1 * self

    def __mul__(self, factor: Any) -> LinearOperator:
        if (scale := _number(factor)) is None:
            return NotImplemented
        turns = isinstance(scale, complex)  # no longer its own adjoint
        if turns and not all(x.dtype.is_complex for x in self._leaves()):
            raise SpaceError(f"{scale!r} * {self!r}: a complex factor needs complex spaces")
        return operator_between(
            self.in_space,
            self.out_space,
            between.scaled(self._apply, scale),
            between.scaled(self._apply_adjoint, scale.conjugate()),
            self_adjoint=isinstance(self, SelfAdjoint) and not turns,
            at_once=self._at_once,
            diagonal=self._diagonal_by(lambda d: scale * d),
            name=f"{scale:.3g} * {self._name}",
        )

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> LinearOperator:
        number = _number(factor)
        return NotImplemented if number is None else self * (1 / number)

    # -- helpers ------------------------------------------------------------------------

    def _after(self, first: LinearOperator) -> LinearOperator:
        _same(first.out_space, self.in_space, f"{self!r} @ {first!r}")

        return LinearOperator(
            first.in_space,
            self.out_space,
            between.composed(first._apply, self._apply),
            between.composed(self._apply_adjoint, first._apply_adjoint),
            at_once=between.fewest(self, first),
            name=f"{self._name} @ {first._name}",
        )

    @property
    def _is_complex(self) -> bool:
        return self.in_space.is_complex or self.out_space.is_complex

    def _diagonal_by(self, change: Callable[[torch.Tensor], torch.Tensor]) -> KnownDiagonal:
        """Return what finds the diagonal of an operator whose diagonal follows from this one's."""
        return lambda chunk_size: change(self.diagonal(chunk_size=chunk_size))


def _number(x: Any) -> Any:
    """Return a number, which a tensor may hold; None for anything else."""
    if isinstance(x, torch.Tensor) and x.dim() == 0:
        return x.item()
    return x if isinstance(x, numbers.Number) else None


def _same(a: Space, b: Space, what: str) -> None:
    if a.tensors != b.tensors or a.layouts != b.layouts:
        raise SpaceError(f"{what}: the spaces differ: {a!r} and {b!r}")
    if a.group is not b.group:
        raise SpaceError(
            f"{what}: in one the vectors are whole, in the other each rank has a part, or the "
            "groups differ: the inner products are not the same"
        )


class SelfAdjoint(LinearOperator):
    """An operator that is its own adjoint.

    Parameters
    ----------
    space
        What it maps from and to.
    apply, at_once, diagonal, name
        As for any operator.
    """

    def __init__(
        self,
        space: Space,
        apply: Apply,
        *,
        at_once: AtOnce | None = None,
        diagonal: KnownDiagonal | None = None,
        name: str = "SelfAdjoint",
    ) -> None:
        super().__init__(space, space, apply, apply, at_once=at_once, diagonal=diagonal, name=name)

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        """The adjoint, which is the operator itself."""
        return self


def operator_between(
    in_space: Space,
    out_space: Space,
    apply: Apply,
    apply_adjoint: Apply,
    *,
    self_adjoint: bool,
    at_once: AtOnce | None = None,
    diagonal: KnownDiagonal | None = None,
    name: str,
) -> LinearOperator:
    """Return an operator, a `SelfAdjoint` if it is known to be one."""
    if self_adjoint:
        return SelfAdjoint(in_space, apply, at_once=at_once, diagonal=diagonal, name=name)
    return LinearOperator(
        in_space, out_space, apply, apply_adjoint, at_once=at_once, diagonal=diagonal, name=name
    )


def identity(space: Space) -> SelfAdjoint:
    """Return the identity of a space, for damping: `J.gram() + 0.1 * identity(J.in_space)`.

    Parameters
    ----------
    space
        An operator's `in_space` or `out_space`.

    Returns
    -------
    SelfAdjoint
        Of shape (n, n).

    Raises
    ------
    StructureError
        If no space is given.
    """
    _check_space(space, "identity")

    def apply(parts: Parts, *, stacked: bool) -> Parts:
        return [t.clone() for t in parts]

    def ones(chunk_size: ChunkSize) -> torch.Tensor:
        return torch.ones_like(space.vector.zeros())

    return SelfAdjoint(space, apply, diagonal=ones, name="identity")


def from_diagonal(space: Space, entries: Any) -> LinearOperator:
    """Return the diagonal operator of a space with the given entries.

    Parameters
    ----------
    space
        An operator's `in_space` or `out_space`.
    entries
        A pytree structured like the space, or a flat vector of shape (n,).

    Returns
    -------
    LinearOperator
        Of shape (n, n); a `SelfAdjoint` if the entries are real.

    Raises
    ------
    StructureError, SpaceError
        If no space is given, or the entries do not fit.
    """
    _check_space(space, "from_diagonal")
    if isinstance(entries, torch.Tensor) and tuple(entries.shape) == (space.size,):
        check_flat(space, entries, "from_diagonal")
        given = space.split(entries)
    else:
        given = space.filled(entries)
    own = [t.clone() for t in given]
    return operator_between(
        space,
        space,
        between.diagonal(own),
        between.diagonal([t.conj().resolve_conj() for t in own]),
        self_adjoint=not space.is_complex,
        diagonal=lambda _: space.join(own).clone(),
        name="diagonal",
    )


def _check_space(space: Any, what: str) -> None:
    if not isinstance(space, Space):
        raise StructureError(
            f"{what}: expected a space, an operator's in_space or out_space, got "
            f"{type(space).__name__} {space!r}"
        )
