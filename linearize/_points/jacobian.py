"""The Jacobian of a function at a point, as a linear operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from .._execute.binding import BoundProgram
from .._programs.program import Operation
from .._programs.reach import is_diagonal
from .._simplify.rowwise import rows_apart
from .._spaces.flat import Parts, zeros
from .._spaces.maps import Apply, ChunkSize, Direction
from .._spaces.operators import LinearOperator, SelfAdjoint
from .._spaces.space import Space
from .._text.progress import progress
from .closures import JvpFn, VjpFn
from .product import Product


class Jacobian(LinearOperator):
    """The Jacobian of a function at a point: `here.jacobian`.

    A function of one primal has that primal's structure as `in_space`, one of several primals
    the tuple of them. It keeps the two products and nothing else of the linearization.

    A matrix that was written out at a point, this one or `gram()`, stays there if it takes no
    more than `dense_limit` bytes: it is not written out again, and products use it where it is
    no larger than what the program reads. The norms of columns take a product for each number
    that a row of the value has where f treats each row of its primal by itself.

    Parameters
    ----------
    jvp_fn, vjp_fn
        The products of a linearization.

    Raises
    ------
    LinearizeError
        In products, what `jvp_fn` and `vjp_fn` raise.
    """

    def __init__(self, jvp_fn: JvpFn, vjp_fn: VjpFn) -> None:
        self._products = jvp_fn, vjp_fn
        self._written = _Written(jvp_fn, vjp_fn, "jacobian")
        ours, theirs = jvp_fn._arguments.unpacked(), jvp_fn._results
        super().__init__(
            ours,
            theirs,
            self._written.times(jvp_fn, ours, theirs, lambda matrix: matrix.mT),
            self._written.times(vjp_fn, theirs, ours, torch.conj),
            at_once=lambda adjoint: (vjp_fn if adjoint else jvp_fn).at_once(),
            diagonal=self._from_program,
            name="Jacobian",
        )

    def gram(self) -> LinearOperator:
        """Return Jᴴ·J. Both maps are one program, simplified together."""
        return Gram(self)

    def _matrix(self, chunk_size: ChunkSize, direction: Direction) -> torch.Tensor:
        return self._written.once(
            direction, lambda: super(Jacobian, self)._matrix(chunk_size, direction)
        )

    def _from_program(self, chunk_size: ChunkSize) -> torch.Tensor | None:
        """Return the diagonal if a look at the program, or a matrix that is there, tells it."""
        matrix = self._written.matrix()
        if matrix is not None:
            return matrix.diagonal().clone()
        _, vjp_fn = self._products
        if is_diagonal(vjp_fn.program.program):
            self.check_complex_linear("diagonal")
            ones = [torch.ones_like(t) for t in zeros(self.out_space)]
            return self.in_space.join(run(vjp_fn, ones, stacked=False)).conj().resolve_conj()
        if not self._apart:
            return None
        self.check_complex_linear("diagonal")
        found = [part.diagonal(start, 0, 2) for start, part in self._rows_at_once(chunk_size)]
        return torch.cat(found, 1).reshape(-1).conj().resolve_conj()

    def _squared_norms(self, chunk_size: ChunkSize) -> torch.Tensor:
        """Return them; where f has rows, by a product for each number that a row has."""
        if not self._apart:
            return super()._squared_norms(chunk_size)
        total = zeros(self.in_space)[0].reshape(-1)
        for _, part in self._rows_at_once(chunk_size):
            total += part.abs().square().sum(0).reshape(-1)
        return total

    @functools.cached_property
    def _apart(self) -> bool:
        """Whether the matrix has a block for each row, all of one shape, and nothing else.

        It is seen most easily before the program is simplified, and stays true.
        """
        spaces = self.in_space, self.out_space
        if not all(s.is_single and s.tensors[0].numel for s in spaces):
            return False
        _, vjp_fn = self._products
        (ours, theirs) = (s.tensors[0] for s in spaces)
        same = ours.dtype == theirs.dtype and ours.shape[:1] == theirs.shape[:1]
        return same and len(ours.shape) > 0 and rows_apart(vjp_fn.program.program)

    def _rows_at_once(self, chunk_size: ChunkSize) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the conjugate rows of all blocks: chunks by blocks by columns of a block."""
        _, vjp_fn = self._products
        theirs = self.out_space.tensors[0]
        blocks = theirs.shape[0]
        high, wide = theirs.numel // blocks, self.in_space.size // blocks
        chunk = self.H._chunk(chunk_size, high)
        starts = range(0, high, chunk)
        for start in progress(starts, len(starts), "rows of blocks"):
            units = torch.eye(high, dtype=theirs.dtype, device=theirs.device)[
                start : start + chunk
            ]
            stack = units.unsqueeze(1).expand(-1, blocks, -1)
            parts = [stack.reshape(len(units), *theirs.shape)]
            (images,) = run(vjp_fn, parts, stacked=True)
            yield start, images.reshape(len(units), blocks, wide)


class Gram(SelfAdjoint):
    """Jᴴ·J as one program: what `gram()` of a Jacobian returns.

    Parameters
    ----------
    of
        The Jacobian.
    """

    def __init__(self, of: Jacobian) -> None:
        jvp_fn, vjp_fn = of._products
        product = jvp_fn._then(vjp_fn, "gram")
        self._of, self._product = of, product
        self._written = _Written(jvp_fn, vjp_fn, "gram")
        space = of.in_space
        super().__init__(
            space,
            self._written.times(product, space, space, lambda matrix: matrix.mT),
            at_once=lambda _: product.at_once(),
            diagonal=self._of_columns,
            name="Jacobian.gram()",
        )

    def _matrix(self, chunk_size: ChunkSize, direction: Direction) -> torch.Tensor:
        """Return the matrix, from that of the Jacobian where it was written out."""

        def made() -> torch.Tensor:
            M = self._of._written.matrix()
            if M is not None and M.dtype == self.dtype:
                return M.mH @ M
            return super(Gram, self)._matrix(chunk_size, direction)

        return self._written.once(direction, made)

    def _chains(self) -> Sequence[Sequence[Product]]:
        return [[self._product]]

    def _of_columns(self, chunk_size: ChunkSize) -> torch.Tensor:
        M = self._of._written.matrix()
        if M is None or M.dtype != self.dtype:
            return self._of.squared_norms(chunk_size)
        return M.abs().square().sum(0).to(self.dtype)


class _Written:
    """A matrix that was written out at a point, until it is closed or what it is of changes."""

    def __init__(self, jvp_fn: JvpFn, vjp_fn: VjpFn, what: str) -> None:
        self._products = jvp_fn, vjp_fn
        self._what = what
        self._is_short: bool | None = None

    def matrix(self) -> torch.Tensor | None:
        """Return the matrix, None if there is none or a product could not be had any more."""
        jvp_fn, vjp_fn = self._products
        found = vjp_fn._matrices.get(self._what)
        if found is None:
            return None
        if any(r.changed() for p in (jvp_fn, vjp_fn) for r in p._residuals()):
            del vjp_fn._matrices[self._what]
            return None
        return found

    def short(self) -> torch.Tensor | None:
        """Return the matrix if a product with it reads no more than the program does.

        A program that calls custom Functions is promised to call them at each product.
        """
        matrix = self.matrix()
        if matrix is None:
            return None
        if self._is_short is None:
            self._is_short = self._reads_no_more(matrix)
        return matrix if self._is_short else None

    def times(
        self,
        product: Product,
        ours: Space,
        theirs: Space,
        turned: Callable[[torch.Tensor], torch.Tensor],
    ) -> Apply:
        """Return what applies a product, by the matrix where that reads no more."""

        def apply(parts: Parts, *, stacked: bool) -> Parts:
            matrix = self.short()
            if matrix is None:
                return run(product, parts, stacked=stacked)
            return theirs.split(ours.join(parts, stacked=stacked) @ turned(matrix))

        return apply

    def _reads_no_more(self, matrix: torch.Tensor) -> bool:
        _, vjp_fn = self._products
        specs = (*vjp_fn._arguments.tensors, *vjp_fn._results.tensors)
        program = vjp_fn.program
        own = any(isinstance(eq.op, Operation) and eq.op.of_point for eq in program.equations)
        return (
            not own
            and all(s.dtype.is_complex == matrix.is_complex() for s in specs)
            and matrix.nbytes <= _read(program)
        )

    def once(self, direction: Direction, write: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the matrix, written out if it is not there; a new tensor each time."""
        _, vjp_fn = self._products
        vjp_fn._check_open()
        known = self.matrix() if direction == "auto" else None
        if known is None:
            known = write()
            if known.nbytes <= vjp_fn._policy.dense_limit and not known.requires_grad:
                vjp_fn._matrices[self._what] = known
                if self._what == "jacobian":
                    vjp_fn._written(known)
                vjp_fn._lifetime.changed()
        return known.clone()


def _read(program: BoundProgram) -> int:
    """Return the bytes that a program reads and writes."""
    kept = sum(r.tensor.nbytes for r in program.binding.residuals)
    passed = (v for eq in program.equations for v in (*eq.inputs(), *eq.outputs))
    return kept + sum(v.spec.nbytes for v in passed if v is not None)


def run(product: Product, parts: Parts, *, stacked: bool) -> Parts:
    """Apply a product to an element, or to several stacked ones in one pass."""
    if not stacked:
        return product._apply(parts)
    if len(parts[0]) == 0:
        return zeros(product._results, 0)
    return product._batched(parts, None)
