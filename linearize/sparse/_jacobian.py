"""Patterns, colourings and sparse Jacobians."""

from __future__ import annotations

import math
from typing import Any, Literal

import networkx
import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from .._points.jacobian import Jacobian
from .._points.linearization import Linearization
from .._spaces.compare import tolerance
from .._spaces.flat import join, random, split
from .._spaces.operators import ChunkSize, LinearOperator, check_chunk_size
from .._spaces.space import check_whole
from .._text.progress import progress
from ..errors import LinearizeError, OptionError, SpaceError, StructureError
from ._dependence import TooDenseError, dependence

__all__ = ["coloring", "jacobian", "pattern"]


def pattern(of: Linearization | Jacobian) -> Any:
    """Return where the Jacobian can have entries, found from its linear program.

    Indices are followed through views, gathers and scatters, pointwise operations, reductions,
    products with matrices and convolutions. What goes through any other operation, custom
    Functions included, counts as full: the pattern can be too large, never too small. Numbers
    are not looked at, so that it holds at every point where f takes the same branches and the
    same indices.

    Parameters
    ----------
    of
        A linearization, or its Jacobian.

    Returns
    -------
    scipy.sparse.csr_array
        Booleans, of shape (m, n).

    Raises
    ------
    StructureError
        If what is given is neither.
    """
    J = of.jacobian if isinstance(of, Linearization) else of
    check_whole(J.in_space, "a sparsity pattern")
    return _found(J)


def _found(J: Any) -> Any:
    if not isinstance(J, Jacobian):
        raise StructureError(
            f"pattern: expected a linearization or its Jacobian, got {type(J).__name__}"
        )
    jvp_fn, vjp_fn = J._products
    try:
        found, exact = dependence(vjp_fn.program)
        found = found.T.tocsr()
    except TooDenseError:
        found, exact = None, False
    if not exact:
        # Both directions hold all entries; what only one of them has is none.
        try:
            other, _ = dependence(jvp_fn.program)
            found = other if found is None else found.multiply(other).tocsr().astype(bool)
        except (TooDenseError, LinearizeError):
            pass
    if found is None:
        found = sp.csr_array(np.ones(J.shape, dtype=bool))
    found.sum_duplicates()
    found.sort_indices()
    return found


def coloring(pattern: Any) -> NDArray[np.int64]:
    """Return a colour for each column, so that columns of one colour share no row.

    Parameters
    ----------
    pattern
        A SciPy sparse matrix of shape (m, n); its stored entries count.

    Returns
    -------
    numpy.ndarray
        Integers of shape (n,), from 0 to the number of colours less one.

    Notes
    -----
    A. R. Curtis, M. J. D. Powell, J. K. Reid, "On the estimation of sparse Jacobian matrices",
    J. Inst. Maths Applics 13, 1974. The graph is coloured greedily, smallest degree last, by
    networkx.
    """
    entries = sp.csr_array(pattern).astype(bool)
    columns = entries.shape[1]
    fullest = int(np.diff(entries.indptr).max(initial=0))
    if 2 * fullest > columns:  # next to nothing can be saved
        return np.arange(columns)
    # Counts, not booleans: a product of booleans was seen to be slower.
    counts = entries.astype(np.int32)
    neighbours = sp.triu(counts.T @ counts, k=1, format="coo")
    graph = networkx.Graph()
    graph.add_nodes_from(range(columns))
    graph.add_edges_from(zip(neighbours.row.tolist(), neighbours.col.tolist(), strict=True))
    colours = networkx.greedy_color(graph, strategy="smallest_last")
    return np.array([colours[j] for j in range(columns)], dtype=np.int64)


def jacobian(
    of: Linearization | LinearOperator,
    *,
    pattern: Any = None,
    direction: Literal["auto", "forward", "reverse"] = "auto",
    chunk_size: ChunkSize = "auto",
) -> torch.Tensor:
    """Return the Jacobian as a sparse tensor, from as many products as it has colours.

    Parameters
    ----------
    of
        A linearization, its Jacobian, or, with a pattern, any operator.
    pattern
        Where it can have entries: a SciPy sparse matrix. None to find it from the program; pass
        `linearize.sparse.pattern(here)` to use it at many points.
    direction
        "forward" groups columns, "reverse" rows; "auto" takes what needs fewer products.
    chunk_size
        How many products are formed in one vectorised pass.

    Returns
    -------
    torch.Tensor
        Of shape (m, n), sparse (COO), coalesced; entries of the pattern that are zero are
        stored.

    Raises
    ------
    LinearizeError
        If the result times a random vector is not the Jacobian times it: the pattern that was
        given lacks entries.
    SpaceError
        If the pattern has another shape.
    """
    A = of.jacobian if isinstance(of, Linearization) else of
    check_whole(A.in_space, "a sparse Jacobian")
    check_chunk_size(chunk_size)
    if direction not in ("auto", "forward", "reverse"):
        raise OptionError(f'direction must be "auto", "forward" or "reverse", got {direction!r}')
    A.check_complex_linear("a sparse Jacobian")
    found = _found(A) if pattern is None else pattern
    entries = sp.csr_array(found).astype(bool).tocoo()
    if entries.shape != A.shape:
        raise SpaceError(f"pattern: expected shape {A.shape}, got {entries.shape}")
    forward = direction == "forward"
    if direction == "auto":
        by_column = np.bincount(entries.col, minlength=A.shape[1]).max(initial=0)
        by_row = np.bincount(entries.row, minlength=A.shape[0]).max(initial=0)
        forward = bool(by_row <= by_column)
    grouped, kept = (entries.col, entries.row) if forward else (entries.row, entries.col)
    csr = entries.tocsr()
    colours = torch.from_numpy(coloring(csr if forward else csr.T))
    compressed = _compressed(A, colours, forward, chunk_size)
    group = colours[torch.from_numpy(grouped).long()].to(A.device)
    values = compressed[group, torch.from_numpy(kept).long().to(A.device)]
    where = torch.from_numpy(np.stack([entries.row, entries.col]).astype(np.int64))
    if not forward:
        values = values.conj().resolve_conj()
    result = torch.sparse_coo_tensor(
        where.to(A.device), values, A.shape, check_invariants=True
    ).coalesce()
    _verify(A, result)
    return result


def _compressed(
    A: LinearOperator, colours: torch.Tensor, forward: bool, chunk_size: ChunkSize
) -> torch.Tensor:
    """Return, for each colour, the product with the sum of the unit vectors of that colour."""
    ours, theirs = (A.in_space, A.out_space) if forward else (A.out_space, A.in_space)
    count = int(colours.max()) + 1 if len(colours) else 0
    chunk = A._chunk(chunk_size, max(count, 1), adjoint=not forward)
    rows = []
    for start in progress(range(0, count, chunk), -(-count // chunk), "sparse Jacobian"):
        some = torch.arange(start, min(start + chunk, count))
        seeds = (colours[None, :] == some[:, None]).to(dtype=A.dtype, device=A.device)
        images = A._several(split(ours, seeds), adjoint=not forward)
        rows.append(join(theirs, images, stacked=True))
    if not rows:
        return torch.zeros((0, theirs.size), dtype=A.dtype, device=A.device)
    return torch.cat(rows)


def _verify(A: LinearOperator, result: torch.Tensor) -> None:
    """Raise unless the entries that were found are all that there are, row by row.

    Two vectors are tried, the second with columns weighed so that small ones count like large
    ones. A row in which terms cancel is known as precisely as sums of such terms are.
    """
    generator = torch.Generator().manual_seed(1_009)
    row, column = result.indices()
    sizes = result.values().abs()
    columns = torch.zeros(A.shape[1], dtype=sizes.dtype, device=sizes.device)
    columns = columns.scatter_reduce(0, column, sizes, "amax")
    most = float(columns.max()) if len(columns) else 0.0
    least = math.sqrt(torch.finfo(sizes.dtype).eps)
    weights = (
        (columns / most).clamp(min=least) if 0 < most < math.inf else torch.ones_like(columns)
    )

    def image(x: torch.Tensor) -> torch.Tensor:
        return join(A.out_space, A._apply(split(A.in_space, x), stacked=False))

    for scale in (torch.ones_like(weights), weights):
        x, y = (join(A.in_space, random(A.in_space, generator)) / scale for _ in range(2))
        want = image(x)
        got = torch.mv(result, x.to(result.dtype))
        terms = torch.zeros(A.shape[0], dtype=sizes.dtype, device=sizes.device)
        terms = terms.index_add(0, row, sizes * x.abs()[column])
        limit = tolerance(result.dtype) * (terms + want.abs())
        finite = torch.isfinite(want)
        off = torch.where(finite, (got - want).abs() > limit, torch.isfinite(got))
        if bool(off.any()):
            off &= ~finite | ((got - want).abs() > 1e3 * (want + image(y) - image(x + y)).abs())
        lacking = off.nonzero().flatten()
        if len(lacking):
            raise LinearizeError(
                "a sparse Jacobian: times a random vector it differs from the Jacobian times that "
                f"vector; the pattern lacks entries (in {_rows(lacking)})"
            )


def _rows(numbers: torch.Tensor) -> str:
    """Return some rows by their numbers."""
    few = ", ".join(str(int(i)) for i in numbers[:3])
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"row{'s' if len(numbers) > 1 else ''} {few}{more}"
