"""From products to the entries of a sparse matrix, checked, in the layout that is asked for."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch

from .._spaces.budget import memory_budget
from .._spaces.compare import tolerance
from .._spaces.flat import join, random, split
from .._spaces.operators import ChunkSize, LinearOperator
from .._text.progress import progress
from ..errors import LinearizeError
from ._patterns import Pattern
from ._ways import Way

Layout: TypeAlias = Literal["coo", "csr", "csc", "scipy"]
LAYOUTS = ("coo", "csr", "csc", "scipy")


def entries(
    A: LinearOperator, pattern: Pattern, way: Way, chunk_size: ChunkSize, *, sure: bool
) -> torch.Tensor:
    """Return the entries of a matrix in the order of its pattern.

    Parameters
    ----------
    A
        The operator.
    pattern, way
        Where it has entries, and how they are had.
    chunk_size
        How many products go in one pass.
    sure
        Whether the pattern is the program's own. Then it is checked thoroughly once, at other
        points by one product more in the same pass.
    """
    back = way.reverse > 0
    ahead = way.forward > 0 or not back
    forward = _results(A, pattern, way, chunk_size, adjoint=False) if ahead else None
    reverse = _results(A, pattern, way, chunk_size, adjoint=True) if back else None
    stacks = [t for t in (forward, reverse) if t is not None]
    flat = torch.cat([t.reshape(-1) for t in stacks]) if len(stacks) > 1 else stacks[0].reshape(-1)
    take, conjugated = way.places(flat.device)
    values = flat.index_select(0, take)
    if values.is_complex():
        values = torch.where(conjugated, values.conj(), values)
    if not (sure and pattern.checked and _agrees(A, pattern, way, values, stacks[0][-1], ahead)):
        verify(A, pattern, values)
        pattern.checked = True
    return values


def _results(
    A: LinearOperator, pattern: Pattern, way: Way, chunk_size: ChunkSize, *, adjoint: bool
) -> torch.Tensor:
    """Return the products of one direction, the first direction's with one for a random vector."""
    ours, theirs = (A.out_space, A.in_space) if adjoint else (A.in_space, A.out_space)
    seeds = way.seeds(ours, adjoint=adjoint)
    count = len(seeds)
    if chunk_size == "auto":
        if pattern.bytes_each is None:
            pattern.bytes_each = max(A._peak(), 1)
        chunk = max(1, memory_budget(A.device) // pattern.bytes_each)
    else:
        chunk = chunk_size or count
    starts = range(0, count, chunk)
    images = [
        join(theirs, A._several(split(ours, seeds[k : k + chunk]), adjoint=adjoint), stacked=True)
        for k in progress(starts, len(starts), "sparse Jacobian")
    ]
    return images[0] if len(images) == 1 else torch.cat(images)


def _agrees(
    A: LinearOperator,
    pattern: Pattern,
    way: Way,
    values: torch.Tensor,
    want: torch.Tensor,
    ahead: bool,
) -> bool:
    """Whether the entries times a random vector are what the product gave for it."""
    space = A.in_space if ahead else A.out_space
    x = way.random(space)
    row, column = pattern.places(values.device)
    to, by = (row, column) if ahead else (column, row)
    terms = (values if ahead else values.conj()) * x[by]
    got = torch.zeros_like(want, dtype=terms.dtype).index_add(0, to, terms)
    size = torch.zeros_like(want, dtype=terms.dtype.to_real()).index_add(0, to, terms.abs())
    limit = tolerance(values.dtype) * (size + want.abs())
    return bool(((got - want).abs() <= limit).all())  # nothing that is not finite


def verify(A: LinearOperator, pattern: Pattern, values: torch.Tensor) -> None:
    """Raise unless the entries that were found are all that there are, row by row.

    Two vectors are tried, the second with columns weighed so that small ones count like large
    ones. A row in which terms cancel is known as precisely as sums of such terms are.
    """
    generator = torch.Generator().manual_seed(1_009)
    row, column = pattern.places(values.device)
    sizes = values.abs()
    columns = torch.zeros(A.shape[1], dtype=sizes.dtype, device=sizes.device)
    columns = columns.scatter_reduce(0, column, sizes, "amax")
    most = float(columns.max()) if len(columns) else 0.0
    least = math.sqrt(torch.finfo(sizes.dtype).eps)
    weights = (
        (columns / most).clamp(min=least) if 0 < most < math.inf else torch.ones_like(columns)
    )

    def image(x: torch.Tensor) -> torch.Tensor:
        return join(A.out_space, A._apply(split(A.in_space, x), stacked=False))

    def added(terms: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros(A.shape[0], dtype=terms.dtype, device=terms.device)
        return zero.index_add(0, row, terms)

    for scale in (torch.ones_like(weights), weights):
        x, y = (join(A.in_space, random(A.in_space, generator)) / scale for _ in range(2))
        want = image(x)
        got = added(values * x[column])
        limit = tolerance(values.dtype) * (added(sizes * x.abs()[column]) + want.abs())
        finite = torch.isfinite(want)
        off = torch.where(finite, (got - want).abs() > limit, torch.isfinite(got))
        if bool(off.any()):
            off &= ~finite | ((got - want).abs() > 1e3 * (want + image(y) - image(x + y)).abs())
        lacking = off.nonzero().flatten()
        if len(lacking):
            raise LinearizeError(
                "a sparse Jacobian: times a random vector it differs from the Jacobian times that "
                "vector; the pattern lacks entries, or what was said to be symmetric is not (in "
                f"{_rows(lacking)})"
            )


def _rows(numbers: torch.Tensor) -> str:
    """Return some rows by their numbers."""
    few = ", ".join(str(int(i)) for i in numbers[:3])
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"row{'s' if len(numbers) > 1 else ''} {few}{more}"


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
    bounds, places = (
        torch.from_numpy(x.astype(np.int64)).to(values.device) for x in (found.indptr, found.indices)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CS. tensor support is in beta", UserWarning)
        return make(bounds, places, values, shape, check_invariants=False)
