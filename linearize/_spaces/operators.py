"""The contract of linear operators, and their algebra."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol, TypeAlias

import torch

from ..errors import (
    MissingDerivativeError,
    OptionError,
    SpaceError,
    StructureError,
    UnsupportedError,
)
from .budget import memory_budget
from .compare import close
from .flat import Parts, check_flat, flat_spec, join, random, split, units, zeros
from .space import Space, TensorSpec

Direction: TypeAlias = Literal["auto", "forward", "reverse"]
ChunkSize: TypeAlias = int | Literal["auto"] | None


class Apply(Protocol):
    """A linear map on lists of tensors."""

    def __call__(self, parts: Parts, *, stacked: bool) -> Parts:
        """Map an element, or several stacked ones."""


class LinearOperator:
    """A linear map between two spaces.

    Parameters
    ----------
    in_space, out_space
        What it maps from and to: pytrees of tensors.
    apply, apply_adjoint
        The map and its adjoint: functions of a list of tensors, one per differentiable leaf of
        the space, and of the keyword `stacked`: whether each tensor has one more dimension in
        front, for several elements at once. They return such a list, of new tensors.
    peak
        Estimates the bytes that one vector takes on its way, for `chunk_size="auto"`.
    name
        For `repr` and messages.

    Notes
    -----
    `A(x)` takes a pytree and returns one. `A @ x` takes, beside pytrees, the flat forms that
    solvers work with: a tensor of shape (n,) gives one of shape (m,), and n by k gives m by k,
    the columns being mapped in one vectorised pass. A flat vector is the concatenation of the
    leaves, each row by row.
    """

    def __init__(
        self,
        in_space: Space,
        out_space: Space,
        apply: Apply,
        apply_adjoint: Apply,
        *,
        peak: Callable[[], int] | None = None,
        name: str = "LinearOperator",
    ) -> None:
        self.in_space = in_space
        self.out_space = out_space
        self._apply = apply
        self._apply_adjoint = apply_adjoint
        self._peak = peak or self._own_bytes
        self._name = name

    # -- what it is ---------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, the numbers of scalars of the two spaces."""
        return self.out_space.size, self.in_space.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds the elements of both spaces."""
        return torch.promote_types(flat_spec(self.in_space).dtype, flat_spec(self.out_space).dtype)

    @property
    def device(self) -> torch.device:
        """Where the flat vectors of the input side are."""
        return self.in_space.tensors[0].device

    @property
    def H(self) -> LinearOperator:  # noqa: N802 - as in NumPy
        """The adjoint, for real numbers the transpose, for complex ones its conjugate."""
        return LinearOperator(
            self.out_space,
            self.in_space,
            self._apply_adjoint,
            self._apply,
            peak=self._peak,
            name=f"{self._name}.H",
        )

    @property
    def T(self) -> LinearOperator:  # noqa: N802 - as in NumPy
        """The transpose, without conjugation."""
        if not any(leaf.dtype.is_complex for leaf in self._leaves()):
            return self.H
        return LinearOperator(
            self.out_space,
            self.in_space,
            _between_conjugates(self._apply_adjoint),
            _between_conjugates(self._apply),
            peak=self._peak,
            name=f"{self._name}.T",
        )

    def gram(self) -> LinearOperator:
        """Return Aᴴ·A, applied in one pass."""

        def apply(parts: Parts, *, stacked: bool) -> Parts:
            return self._apply_adjoint(self._apply(parts, stacked=stacked), stacked=stacked)

        return SelfAdjoint(self.in_space, apply, peak=self._peak, name=f"{self._name}.gram()")

    def __repr__(self) -> str:
        rows, columns = self.shape
        kinds = {str(leaf.dtype).removeprefix("torch.") for leaf in self._leaves()}
        return f"<{self._name} {rows} x {columns} {', '.join(sorted(kinds))}>"

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
        given = self.in_space.flatten(element)
        parts = [
            spec.zeros() if t is None else t
            for t, spec in zip(given, self.in_space.tensors, strict=True)
        ]
        return self.out_space.unflatten(self._apply(parts, stacked=False))

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
        if type(other).__module__ == "numpy":
            raise StructureError(
                "an operator takes tensors: pass torch.from_numpy(x), or make it an operator of "
                "NumPy arrays by linearize.scipy.aslinearoperator"
            )
        if not isinstance(other, torch.Tensor) or not self._is_flat(other):
            return self(other)
        check_flat(self.in_space, other, f"{self!r} @ tensor")
        columns = other.dim() == 2
        parts = split(self.in_space, other.mT if columns else other)
        if columns and other.shape[1] == 0:
            return join(self.out_space, zeros(self.out_space, 0), stacked=True).mT
        result = join(self.out_space, self._apply(parts, stacked=columns), stacked=columns)
        return result.mT if columns else result

    def __rmatmul__(self, other: Any) -> Any:
        """Return xᵀ·A for a flat vector, or X·A for a matrix whose rows are such vectors."""
        if not isinstance(other, torch.Tensor):
            return NotImplemented
        return (self.T @ other.mT).mT if other.dim() == 2 else self.T @ other

    def __add__(self, other: Any) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        _same(self.in_space, other.in_space, f"{self!r} + {other!r}")
        _same(self.out_space, other.out_space, f"{self!r} + {other!r}")

        def apply(parts: Parts, *, stacked: bool) -> Parts:
            a, b = self._apply(parts, stacked=stacked), other._apply(parts, stacked=stacked)
            return [x + y for x, y in zip(a, b, strict=True)]

        def apply_adjoint(parts: Parts, *, stacked: bool) -> Parts:
            a = self._apply_adjoint(parts, stacked=stacked)
            b = other._apply_adjoint(parts, stacked=stacked)
            return [x + y for x, y in zip(a, b, strict=True)]

        def peak() -> int:
            return self._own_bytes() + max(self._peak(), other._peak())

        name = f"({self._name} + {other._name})"
        return self._like(self.in_space, self.out_space, apply, apply_adjoint, peak, name, other)

    def __sub__(self, other: Any) -> LinearOperator:
        return self + -other if isinstance(other, LinearOperator) else NotImplemented

    def __neg__(self) -> LinearOperator:
        return -1 * self

    def __mul__(self, factor: Any) -> LinearOperator:
        if isinstance(factor, torch.Tensor) and factor.dim() == 0:
            factor = factor.item()
        if not isinstance(factor, numbers.Number):
            return NotImplemented
        if isinstance(factor, complex) and not all(x.dtype.is_complex for x in self._leaves()):
            raise SpaceError(f"{factor!r} * {self!r}: a complex factor needs complex spaces")
        scale: Any = factor

        def apply(parts: Parts, *, stacked: bool) -> Parts:
            return [scale * t for t in self._apply(parts, stacked=stacked)]

        def apply_adjoint(parts: Parts, *, stacked: bool) -> Parts:
            back = scale.conjugate()
            return [back * t for t in self._apply_adjoint(parts, stacked=stacked)]

        def peak() -> int:
            return self._own_bytes() + self._peak()

        name = f"{scale:.3g} * {self._name}"
        spaces = self.in_space, self.out_space
        if isinstance(factor, complex):  # no longer its own adjoint
            return LinearOperator(*spaces, apply, apply_adjoint, peak=peak, name=name)
        return self._like(*spaces, apply, apply_adjoint, peak, name)

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> LinearOperator:
        if isinstance(factor, torch.Tensor) and factor.dim() == 0:
            factor = factor.item()
        return self * (1 / factor) if isinstance(factor, numbers.Number) else NotImplemented  # type: ignore[operator]

    def materialize(
        self,
        *,
        chunk_size: ChunkSize = "auto",
        direction: Direction = "auto",
    ) -> torch.Tensor:
        """Return the matrix, shape (m, n), from products with unit vectors.

        Long work shows a progress bar where `tqdm` is installed.

        Parameters
        ----------
        chunk_size
            How many unit vectors are mapped in one pass: "auto" for as many as take a quarter
            of the free memory, None for all.
        direction
            "forward" takes the n columns, "reverse" the m rows (by the adjoint), "auto" the
            fewer of them, or those that there is a derivative for.

        Raises
        ------
        UnsupportedError
            If the spaces are complex and the map is only real-linear: it has no such matrix.
        """
        check_chunk_size(chunk_size)
        if direction not in ("auto", "forward", "reverse"):
            raise OptionError(
                f'direction must be "auto", "forward" or "reverse", got {direction!r}'
            )
        self.check_complex_linear("materialize")
        rows, columns = self.shape
        matrix = torch.empty((rows, columns), dtype=self.dtype, device=self.device)
        mixed = flat_spec(self.in_space).dtype.is_complex != matrix.is_complex()
        if direction == "reverse" and mixed:
            raise UnsupportedError(
                "materialize: the adjoint of a map from real to complex numbers keeps real parts "
                'only; use direction="forward"'
            )
        fewer: Direction = "forward" if mixed or columns < rows else "reverse"
        if direction != "auto":
            return self._filled(matrix, direction, chunk_size)
        try:
            return self._filled(matrix, fewer, chunk_size)
        except MissingDerivativeError:
            if mixed:
                raise
            return self._filled(matrix, "reverse" if fewer == "forward" else "forward", chunk_size)

    def _filled(
        self, matrix: torch.Tensor, direction: Direction, chunk_size: ChunkSize
    ) -> torch.Tensor:
        if direction == "forward":
            for start, images in self.columns(chunk_size):
                block = join(self.out_space, images, stacked=True)
                matrix[:, start : start + len(block)] = block.mT
        else:
            for start, images in self.rows(chunk_size):
                block = join(self.in_space, images, stacked=True)
                matrix[start : start + len(block)] = block.conj()
        return matrix

    def columns(self, chunk_size: ChunkSize = "auto") -> Iterator[tuple[int, Parts]]:
        """Yield the images of the unit vectors of `in_space`: the columns of the matrix.

        Parameters
        ----------
        chunk_size
            How many are computed in one pass, as for `materialize`.

        Yields
        ------
        start, parts
            The number of the first column, and one tensor per leaf of `out_space`, its
            first dimension counting the columns of this chunk.
        """
        check_whole(self.in_space, "columns of the matrix")
        chunk = self._chunk(chunk_size, self.in_space.size)
        for start, parts in units(self.in_space, chunk, "columns"):
            yield start, self._several(parts, adjoint=False)

    def rows(self, chunk_size: ChunkSize = "auto") -> Iterator[tuple[int, Parts]]:
        """Yield the images of the unit vectors of `out_space` under the adjoint.

        Parameters
        ----------
        chunk_size
            How many are computed in one pass, as for `materialize`.

        Yields
        ------
        start, parts
            The number of the first row, and one tensor per leaf of `in_space`, its first
            dimension counting the rows of this chunk. For complex numbers these are the
            conjugates of the rows.
        """
        check_whole(self.out_space, "rows of the matrix")
        chunk = self._chunk(chunk_size, self.out_space.size)
        for start, parts in units(self.out_space, chunk, "rows"):
            yield start, self._several(parts, adjoint=True)

    def check_complex_linear(self, what: str) -> None:
        """Raise if the map between complex spaces is linear over the real numbers only.

        The Jacobian of a function that is not holomorphic is of that kind. It is tested at one
        random vector, which takes two products; for real spaces it takes none.

        Parameters
        ----------
        what
            What needs it, for the message.

        Raises
        ------
        UnsupportedError
            If it is not complex-linear.
        """
        if not any(leaf.dtype.is_complex for leaf in self.in_space.tensors):
            return
        flat_spec(self.in_space), flat_spec(self.out_space)
        v = random(self.in_space, torch.Generator().manual_seed(4_711))
        straight = self._apply(v, stacked=False)
        turned = self._apply([1j * t for t in v], stacked=False)
        if not all(
            t.is_complex() and close(t, 1j * s) for s, t in zip(straight, turned, strict=True)
        ):
            raise UnsupportedError(
                f"{what}: the map is linear over the real numbers only (the function is not "
                "holomorphic), so that no complex matrix stands for it; let the function take "
                "and return torch.view_as_real(z) in place of complex z"
            )

    # -- helpers ------------------------------------------------------------------------

    def _several(self, parts: Parts, *, adjoint: bool) -> Parts:
        """Map a stack; a stack of one without `torch.vmap`."""
        apply = self._apply_adjoint if adjoint else self._apply
        if len(parts[0]) != 1:
            return apply(parts, stacked=True)
        return [t.unsqueeze(0) for t in apply([t[0] for t in parts], stacked=False)]

    def _chunk(self, chunk_size: ChunkSize, count: int) -> int:
        if chunk_size is None:
            return max(count, 1)
        if chunk_size == "auto":
            chunk_size = memory_budget(self.device) // max(self._peak(), 1)
        return max(1, min(chunk_size, count))

    def _after(self, first: LinearOperator) -> LinearOperator:
        _same(first.out_space, self.in_space, f"{self!r} @ {first!r}")

        def apply(parts: Parts, *, stacked: bool) -> Parts:
            return self._apply(first._apply(parts, stacked=stacked), stacked=stacked)

        def apply_adjoint(parts: Parts, *, stacked: bool) -> Parts:
            middle = self._apply_adjoint(parts, stacked=stacked)
            return first._apply_adjoint(middle, stacked=stacked)

        return LinearOperator(
            first.in_space,
            self.out_space,
            apply,
            apply_adjoint,
            peak=lambda: max(self._peak(), first._peak()),
            name=f"{self._name} @ {first._name}",
        )

    def _like(
        self,
        in_space: Space,
        out_space: Space,
        apply: Apply,
        apply_adjoint: Apply,
        peak: Callable[[], int],
        name: str,
        *others: LinearOperator,
    ) -> LinearOperator:
        """Return an operator that is self-adjoint if all that it is made of are."""
        if all(isinstance(x, SelfAdjoint) for x in (self, *others)):
            return SelfAdjoint(in_space, apply, peak=peak, name=name)
        return LinearOperator(in_space, out_space, apply, apply_adjoint, peak=peak, name=name)

    def _leaves(self) -> tuple[TensorSpec, ...]:
        return (*self.in_space.tensors, *self.out_space.tensors)

    def _own_bytes(self) -> int:
        """Return the bytes of an argument and its result."""
        return sum(leaf.nbytes for leaf in self._leaves())

    def _is_flat(self, x: torch.Tensor) -> bool:
        """Whether a tensor is read as a vector or a matrix of vectors."""
        size = self.in_space.size
        if x.dim() in (1, 2) and x.shape[0] == size:
            return True
        single = self.in_space.spec.is_leaf()
        if single and tuple(x.shape) == self.in_space.tensors[0].shape:
            return False
        columns = self.shape[1]
        also = f", or {self.in_space.tensors[0].shape}" if single else ""
        raise SpaceError(
            f"{self!r} @ tensor: expected a tensor of shape ({columns},) or ({columns}, k){also}, "
            f"got {tuple(x.shape)}"
        )


def check_chunk_size(chunk_size: Any) -> None:
    """Raise `OptionError` for what is no chunk size."""
    fine = chunk_size is None or chunk_size == "auto"
    if not fine and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise OptionError(
            f'chunk_size must be a positive integer, "auto" or None, got {chunk_size!r}'
        )


def _same(a: Space, b: Space, what: str) -> None:
    if a.tensors != b.tensors:
        raise SpaceError(f"{what}: the spaces differ: {a!r} and {b!r}")
    if a.group is not b.group:
        raise SpaceError(
            f"{what}: in one the vectors are whole, in the other each rank has a part, or the "
            "groups differ: the inner products are not the same"
        )


def check_whole(space: Space, what: str) -> None:
    """Raise if each rank has a part of the space's vectors only."""
    if space.group is not None:
        raise UnsupportedError(
            f"{what}: each rank has a part of the vectors only, and unit vectors of all ranks at "
            "once are none of the whole; use products, or linearize.scipy.aslinearoperator, whose "
            "vectors are whole on every rank"
        )


class SelfAdjoint(LinearOperator):
    """An operator that is its own adjoint.

    Parameters
    ----------
    space
        What it maps from and to.
    apply, peak, name
        As for any operator.
    """

    def __init__(
        self,
        space: Space,
        apply: Apply,
        *,
        peak: Callable[[], int] | None = None,
        name: str = "SelfAdjoint",
    ) -> None:
        super().__init__(space, space, apply, apply, peak=peak, name=name)

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        """The adjoint, which is the operator itself."""
        return self


def _between_conjugates(apply: Apply) -> Apply:
    def conjugated(parts: Parts, *, stacked: bool) -> Parts:
        return [
            t.conj().resolve_conj()
            for t in apply([t.conj().resolve_conj() for t in parts], stacked=stacked)
        ]

    return conjugated
