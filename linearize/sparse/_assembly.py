"""From products to the entries of a sparse matrix, checked, in the layout that is asked for."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import scipy.sparse as sp
import torch

from .._spaces.compare import tolerance
from .._spaces.flat import random
from .._spaces.operators import ChunkSize, LinearOperator
from .._text.progress import progress
from ..errors import LinearizeError
from ._patterns import Pattern
from ._ways import Way

Layout: TypeAlias = Literal["coo", "csr", "csc", "scipy"]
LAYOUTS = get_args(Layout)


def entries(
    A: LinearOperator, pattern: Pattern, way: Way, chunk_size: ChunkSize, *, sure: bool
) -> torch.Tensor:
    """Return the entries of a matrix in the order of its pattern.

    Of a pattern that is `sure`, the program's own, they are checked thoroughly once, at other
    points by one product more in the same pass.
    """
    back = way.reverse > 0
    ahead = way.forward > 0 or not back
    sides = [(A, way.seeds(A.in_space, adjoint=False))] if ahead else []
    if back:
        sides.append((A.H, way.seeds(A.out_space, adjoint=True)))
    stacks = [_images(B, seeds, chunk_size) for B, seeds in sides]
    flat = torch.cat([t.reshape(-1) for t in stacks]) if len(stacks) > 1 else stacks[0].reshape(-1)
    take, conjugated = way.places(flat.device)
    values = flat.index_select(0, take)
    if values.is_complex():
        values = torch.where(conjugated, values.conj(), values)
    row, column = pattern.places(values.device)
    if ahead:
        side = _Side(A, "row", row, column, values)
    else:
        side = _Side(A.H, "column", column, row, values.conj())
    if not (sure and pattern.checked and side.agrees(way.random(side.ours), stacks[0][-1])):
        side.verify()
        pattern.checked = True
    return values


def _images(A: LinearOperator, seeds: torch.Tensor, chunk_size: ChunkSize) -> torch.Tensor:
    """Return the products with the rows of a matrix."""
    chunk = A._chunk(chunk_size, len(seeds))

    def images(some: torch.Tensor) -> torch.Tensor:
        return A.out_space.join(A._several(A.in_space.split(some)), stacked=True)

    if chunk >= len(seeds):
        return images(seeds)
    pieces = seeds.split(chunk)
    return torch.cat([images(s) for s in progress(pieces, len(pieces), "sparse Jacobian")])


class _Side:
    """Row, column and number of each entry that was found, held against products with A.

    `word` is what a row of A is called: A may be an adjoint.
    """

    def __init__(
        self,
        A: LinearOperator,
        word: str,
        to: torch.Tensor,
        by: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        self.ours = A.in_space
        self._A, self._word = A, word
        self._to, self._by, self._values = to, by, values

    def _added(self, terms: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros(self._A.shape[0], dtype=terms.dtype, device=terms.device)
        return zero.index_add(0, self._to, terms)

    def _times(self, x: torch.Tensor, want: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the entries times x, and how far that may be from a product."""
        terms = self._values * x[self._by]
        limit = tolerance(terms.dtype) * (self._added(terms.abs()) + want.abs())
        return self._added(terms), limit

    def agrees(self, x: torch.Tensor, want: torch.Tensor) -> bool:
        """Whether the entries times x are what the product gave for it, all of them finite."""
        got, limit = self._times(x, want)
        return bool(((got - want).abs() <= limit).all())

    def verify(self) -> None:
        """Raise unless the entries that were found are all that there are, row by row.

        Two vectors are tried, the second with columns weighed so that small ones count like large
        ones. A row in which terms cancel is known as precisely as sums of such terms are.
        """
        generator = torch.Generator().manual_seed(1_009)
        sizes = self._values.abs()
        largest = torch.zeros(self.ours.size, dtype=sizes.dtype, device=sizes.device)
        largest = largest.scatter_reduce(0, self._by, sizes, "amax")
        most = float(largest.max()) if len(largest) else 0.0
        weights = torch.ones_like(largest)
        if 0 < most < math.inf:
            weights = (largest / most).clamp(min=math.sqrt(torch.finfo(sizes.dtype).eps))
        for scale in (torch.ones_like(weights), weights):
            x, y = (self.ours.join(random(self.ours, generator)) / scale for _ in range(2))
            want = self._image(x)
            got, limit = self._times(x, want)
            off, finite = (got - want).abs(), torch.isfinite(want)
            wrong = torch.where(finite, off > limit, torch.isfinite(got))
            if bool(wrong.any()):
                rounding = (want + self._image(y) - self._image(x + y)).abs()
                wrong &= ~finite | (off > 1e3 * rounding)
            lacking = wrong.nonzero().flatten()
            if len(lacking):
                raise LinearizeError(
                    "a sparse Jacobian: times a random vector it differs from the Jacobian times "
                    "that vector; the pattern lacks entries, or what was said to be symmetric is "
                    f"not (in {_named(self._word, lacking)})"
                )

    def _image(self, x: torch.Tensor) -> torch.Tensor:
        return self._A.out_space.join(self._A._apply(self.ours.split(x), stacked=False))


def _named(word: str, numbers: torch.Tensor) -> str:
    """Return some rows or columns by their numbers."""
    few = ", ".join(str(int(i)) for i in numbers[:3])
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"{word}{'s' if len(numbers) > 1 else ''} {few}{more}"


def laid_out(pattern: Pattern, values: torch.Tensor, layout: Layout) -> Any:
    """Return a matrix of its entries; all arrays are its own."""
    found, shape = pattern.entries, pattern.entries.shape
    if layout == "scipy":
        numbers = values.numpy(force=True)
        return sp.csr_array((numbers, found.indices.copy(), found.indptr.copy()), shape=shape)
    if layout == "coo":
        where = torch.stack(pattern.places(values.device))
        return torch.sparse_coo_tensor(
            where, values, shape, is_coalesced=True, check_invariants=False
        )
    make: Any = torch.sparse_csr_tensor
    if layout == "csc":
        make = torch.sparse_csc_tensor
        order = sp.csr_array((np.arange(found.nnz), found.indices, found.indptr), shape).tocsc()
        values = values[torch.from_numpy(order.data.astype(np.int64)).to(values.device)]
        found = order
    arrays = found.indptr.astype(np.int64), found.indices.astype(np.int64)
    bounds, places = (torch.from_numpy(x).to(values.device) for x in arrays)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CS. tensor support is in beta", UserWarning)
        return make(bounds, places, values, shape, check_invariants=False)
