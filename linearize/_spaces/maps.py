"""A linear map between two spaces, and what can be read off it: matrix, diagonal, trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, overload

import torch

from .._text.progress import progress
from .._torch.ranks import failing
from ..errors import (
    LinearizeError,
    MissingDerivativeError,
    OptionError,
    SpaceError,
    UnsupportedError,
)
from .compare import close
from .estimates import Estimate, Mean, signs
from .flat import Parts, random, units, zeros
from .memory import memory_budget
from .space import Space, TensorSpec, check_whole

T = TypeVar("T")
Direction: TypeAlias = Literal["auto", "forward", "reverse"]
ChunkSize: TypeAlias = int | Literal["auto"] | None
#: Returns the diagonal of a matrix, None if it takes products with all unit vectors.
KnownDiagonal: TypeAlias = Callable[[ChunkSize], torch.Tensor | None]
#: Takes whether the adjoint is meant, and returns how many vectors are best mapped in one pass.
AtOnce: TypeAlias = Callable[[bool], int]


class Apply(Protocol):
    """A linear map on lists of tensors."""

    def __call__(self, parts: Parts, *, stacked: bool) -> Parts:
        """Map an element, or several stacked ones."""


class LinearMap:
    """A linear map, known by its products and those of its adjoint.

    Parameters
    ----------
    in_space, out_space, apply, apply_adjoint, at_once, diagonal, name
        As for `LinearOperator`.
    """

    def __init__(
        self,
        in_space: Space,
        out_space: Space,
        apply: Apply,
        apply_adjoint: Apply,
        *,
        at_once: AtOnce | None = None,
        diagonal: KnownDiagonal | None = None,
        name: str = "LinearOperator",
    ) -> None:
        self.in_space = in_space
        self.out_space = out_space
        self._apply = apply
        self._apply_adjoint = apply_adjoint
        self._at_once = at_once or self._by_own_bytes
        self._known_diagonal = diagonal
        self._name = name

    # -- what it is ---------------------------------------------------------------------

    @property
    def H(self) -> LinearMap:  # noqa: N802 - as in NumPy
        """The adjoint, of which `LinearOperator` makes an operator."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, the numbers of scalars of the two spaces."""
        return self.out_space.size, self.in_space.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds the elements of both spaces."""
        return torch.promote_types(self.in_space.vector.dtype, self.out_space.vector.dtype)

    @property
    def device(self) -> torch.device:
        """Where the flat vectors of the input side are."""
        return self.in_space.tensors[0].device

    def __repr__(self) -> str:
        rows, columns = self.shape
        kinds = {str(leaf.dtype).removeprefix("torch.") for leaf in self._leaves()}
        return f"<{self._name} {rows} x {columns} {', '.join(sorted(kinds))}>"

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
            How many unit vectors are mapped in one pass: "auto" for as many as take little
            time, None for all.
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
        return self._matrix(chunk_size, direction)

    def _matrix(self, chunk_size: ChunkSize, direction: Direction) -> torch.Tensor:
        self.check_complex_linear("materialize")
        rows, columns = self.shape
        matrix = torch.empty((rows, columns), dtype=self.dtype, device=self.device)
        if direction == "reverse" and self._is_mixed:
            raise UnsupportedError(
                "materialize: the adjoint of a map from real to complex numbers keeps real parts "
                'only; use direction="forward"'
            )

        def filled(forward: bool) -> torch.Tensor:
            lines = matrix.mT if forward else matrix
            for start, block in self._lines(chunk_size, forward):
                lines[start : start + len(block)] = block if forward else block.conj()
            return matrix

        return self._by_fewer(filled) if direction == "auto" else filled(direction == "forward")

    @property
    def _is_mixed(self) -> bool:
        """Whether one side is real and the other complex: its adjoint keeps real parts only."""
        return self.in_space.is_complex != self.out_space.is_complex

    def _by_fewer(self, found: Callable[[bool], T]) -> T:
        """Return what columns (True) or rows give: the fewer, or what has a derivative."""
        rows, columns = self.shape
        forward = self._is_mixed or columns < rows
        try:
            return found(forward)
        except MissingDerivativeError:
            if self._is_mixed:
                raise
            return found(not forward)

    @overload
    def diagonal(self, *, chunk_size: ChunkSize = "auto") -> torch.Tensor: ...
    @overload
    def diagonal(
        self,
        *,
        samples: int,
        generator: torch.Generator | None = None,
        chunk_size: ChunkSize = "auto",
    ) -> Estimate: ...
    def diagonal(
        self,
        *,
        samples: int | None = None,
        generator: torch.Generator | None = None,
        chunk_size: ChunkSize = "auto",
    ) -> torch.Tensor | Estimate:
        """Return the diagonal of a square matrix, as a flat vector: exact, or an estimate.

        Sums, multiples, gram matrices and diagonal operators know a shorter way than n
        products: that of JᴴJ takes as many as J has rows or columns, whichever are fewer.

        Parameters
        ----------
        samples
            From how many products with random signs it is estimated; None for the exact one.
        generator
            Of the CPU, for these; None for PyTorch's own.
        chunk_size
            As for `materialize`.

        Returns
        -------
        torch.Tensor or Estimate
            Of shape (n,); `in_space.unravel` gives it the structure of the space. An `Estimate`
            has it as `value`, and the standard error of each entry as `error`.

        Raises
        ------
        SpaceError
            If the matrix is not square.
        UnsupportedError
            If the spaces are complex and the map is only real-linear.
        """
        self._check_square("diagonal")
        if samples is not None:
            return self._sampled(samples, generator, chunk_size, lambda z, image: z * image)
        check_chunk_size(chunk_size)
        if self._known_diagonal is not None:
            known = self._known_diagonal(chunk_size)
            if known is not None:
                return known
        self.check_complex_linear("diagonal")
        found = torch.empty(self.shape[1], dtype=self.dtype, device=self.device)
        for start, block in self._lines(chunk_size, forward=True):
            found[start : start + len(block)] = block.diagonal(start)
        return found

    @overload
    def trace(self, *, chunk_size: ChunkSize = "auto") -> torch.Tensor: ...
    @overload
    def trace(
        self,
        *,
        samples: int,
        generator: torch.Generator | None = None,
        chunk_size: ChunkSize = "auto",
    ) -> Estimate: ...
    def trace(
        self,
        *,
        samples: int | None = None,
        generator: torch.Generator | None = None,
        chunk_size: ChunkSize = "auto",
    ) -> torch.Tensor | Estimate:
        """Return the trace of a square matrix: exact, or an estimate.

        Parameters
        ----------
        samples, generator, chunk_size
            As for `diagonal`.

        Returns
        -------
        torch.Tensor or Estimate
            One number. An `Estimate` has it as `value`, and its standard error as `error`.

        Raises
        ------
        SpaceError
            If the matrix is not square.
        UnsupportedError
            If the spaces are complex and the map is only real-linear.

        Notes
        -----
        M. F. Hutchinson, "A stochastic estimator of the trace of the influence matrix",
        Communications in Statistics 18, 1989. curvlinops' `hutchpp_trace` and `xtrace` take the
        operators of this package, and need fewer products where few eigenvalues are large.
        """
        self._check_square("trace")
        if samples is None:
            return self.diagonal(chunk_size=chunk_size).sum()
        return self._sampled(samples, generator, chunk_size, lambda z, image: (z * image).sum(1))

    def _check_square(self, what: str) -> None:
        check_whole(self.in_space, what)
        rows, columns = self.shape
        if rows != columns:
            raise SpaceError(f"{what}: {self!r} is not square")

    def _sampled(
        self,
        samples: int,
        generator: torch.Generator | None,
        chunk_size: ChunkSize,
        read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> Estimate:
        """Return the mean of what is read off products with random signs."""
        if not isinstance(samples, int) or samples < 2:
            raise OptionError(f"samples must be an integer of at least 2, got {samples!r}")
        check_chunk_size(chunk_size)
        self.check_complex_linear("an estimate")
        mean, chunk = Mean(), self._chunk(chunk_size, samples)
        for start in progress(range(0, samples, chunk), -(-samples // chunk), "samples"):
            parts = signs(self.in_space, min(chunk, samples - start), generator)
            images = self.out_space.join(self._several(parts), stacked=True)
            mean.add(read(self.in_space.join(parts, stacked=True).to(images.dtype), images))
        return mean.estimate()

    def squared_norms(self, chunk_size: ChunkSize = "auto") -> torch.Tensor:
        """Return the squared norms of the columns: the diagonal of Aᴴ·A, from one pass.

        Parameters
        ----------
        chunk_size
            As for `materialize`.

        Returns
        -------
        torch.Tensor
            Of shape (n,), in the dtype of `in_space`.
        """
        check_chunk_size(chunk_size)
        self.check_complex_linear("the norms of columns")
        return self._squared_norms(chunk_size)

    def _squared_norms(self, chunk_size: ChunkSize) -> torch.Tensor:
        def summed(forward: bool) -> torch.Tensor:
            found = self.in_space.vector.zeros()
            for start, block in self._lines(chunk_size, forward):
                squares = block.abs().square()
                if forward:
                    found[start : start + len(block)] = squares.sum(1)
                else:
                    found += squares.sum(0)
            return found

        return self._by_fewer(summed)

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
        return self._images(chunk_size, "columns")

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
        return self.H._images(chunk_size, "rows")

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
        if not self.in_space.is_complex:
            return
        _ = self.dtype  # there is none for real and complex leaves together
        v = random(self.in_space, torch.Generator().manual_seed(4_711))
        straight = self._apply(v, stacked=False)
        turned = self._apply([1j * t for t in v], stacked=False)
        if not all(
            t.is_complex() and close(t, 1j * s) for s, t in zip(straight, turned, strict=True)
        ):
            raise UnsupportedError(
                f"{what}: the map is linear over the real numbers only (the function is not "
                "holomorphic), so that no complex matrix stands for it; take its real operator, "
                "A.as_real(), which counts a complex number as two"
            )

    # -- helpers ------------------------------------------------------------------------

    def _told(self, given: Callable[[], T]) -> T:
        """Look at an argument; ranks that wait in the product are told if it does not fit."""
        try:
            return given()
        except LinearizeError as error:
            if self.in_space.group is not None:
                with failing(error):
                    # Not zeros: where custom Functions communicate nobody is told otherwise.
                    nothing = [t.fill_(torch.nan) for t in zeros(self.in_space)]
                    self._apply(nothing, stacked=False)
            raise

    def _images(self, chunk_size: ChunkSize, what: str) -> Iterator[tuple[int, Parts]]:
        """Yield the images of the unit vectors in stacks, with the number of the first."""
        check_whole(self.in_space, f"{what} of the matrix")
        chunk = self._chunk(chunk_size, self.in_space.size)
        for start, parts in units(self.in_space, chunk, what):
            yield start, self._several(parts)

    def _lines(self, chunk_size: ChunkSize, forward: bool) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the columns, or the conjugate rows, in stacks of flat vectors."""
        space = self.out_space if forward else self.in_space
        for start, images in (self.columns if forward else self.rows)(chunk_size):
            yield start, space.join(images, stacked=True)

    def _several(self, parts: Parts) -> Parts:
        """Map a stack; a stack of one without `torch.vmap`."""
        if len(parts[0]) != 1:
            return self._apply(parts, stacked=True)
        return [t.unsqueeze(0) for t in self._apply([t[0] for t in parts], stacked=False)]

    def _chunk(self, chunk_size: ChunkSize, count: int) -> int:
        """Return how many of `count` vectors are mapped in one pass."""
        if chunk_size is None:
            return max(count, 1)
        if chunk_size == "auto":
            chunk_size = self._at_once(False)
        return max(1, min(chunk_size, count))

    def _leaves(self) -> tuple[TensorSpec, ...]:
        return (*self.in_space.tensors, *self.out_space.tensors)

    def _by_own_bytes(self, adjoint: bool) -> int:
        """Return how many arguments and results fit into the memory."""
        return memory_budget(self.device) // max(sum(leaf.nbytes for leaf in self._leaves()), 1)


def check_chunk_size(chunk_size: Any) -> None:
    """Raise `OptionError` for what is no chunk size."""
    fine = chunk_size is None or chunk_size == "auto"
    if not fine and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise OptionError(
            f'chunk_size must be a positive integer, "auto" or None, got {chunk_size!r}'
        )
