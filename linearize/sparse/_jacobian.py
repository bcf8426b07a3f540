"""Sparse Jacobians: patterns, colourings and matrices, as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from .._points.jacobian import Jacobian
from .._points.linearization import Linearization
from .._spaces.operators import ChunkSize, LinearOperator, SelfAdjoint, check_chunk_size
from .._spaces.space import check_whole
from .._spaces.specs import describe
from ..errors import OptionError, SpaceError, StructureError, UnsupportedError
from ._assembly import LAYOUTS, Layout, entries, laid_out
from ._coloring import grouped
from ._patterns import Pattern, given, pattern_of
from ._ways import DIRECTIONS, Direction, Way

__all__ = ["coloring", "explain", "jacobian", "pattern"]


def pattern(of: Linearization | LinearOperator) -> sp.csr_array:
    """Return where the Jacobian can have entries, found from its linear program.

    Indices are followed through views, gathers and scatters, pointwise operations, reductions and
    products with matrices; kernels of PyTorch are tried out. What goes through any other operation
    counts as full, custom Functions included unless their pattern was declared (see `declare`):
    the pattern can be too large, never too small.

    Numbers are not looked at, but for indices, the coordinates of `grid_sample`, and the zeros of
    matrices that f found ready. So the pattern holds at every point where f takes the same
    branches and these are the same.

    Parameters
    ----------
    of
        A linearization, its Jacobian, the `gram()` of that, an operator of
        `linearize.curvature`, or the real operator, `as_real()`, of one of these.

    Returns
    -------
    scipy.sparse.csr_array
        Booleans, of shape (m, n).

    Raises
    ------
    StructureError
        If what is given is none of these.
    """
    A = _operator(of, "a sparsity pattern")
    return pattern_of(A).entries.copy()


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
    J. Inst. Maths Applics 13, 1974.
    """
    return grouped(Pattern(pattern).entries)


@overload
def jacobian(
    of: Linearization | LinearOperator,
    *,
    pattern: Any = None,
    direction: Direction = "auto",
    symmetric: bool | None = None,
    layout: Literal["coo", "csr", "csc"] = "coo",
    chunk_size: ChunkSize = "auto",
) -> torch.Tensor: ...
@overload
def jacobian(
    of: Linearization | LinearOperator,
    *,
    pattern: Any = None,
    direction: Direction = "auto",
    symmetric: bool | None = None,
    layout: Literal["scipy"],
    chunk_size: ChunkSize = "auto",
) -> sp.csr_array: ...
def jacobian(
    of: Linearization | LinearOperator,
    *,
    pattern: Any = None,
    direction: Direction = "auto",
    symmetric: bool | None = None,
    layout: Layout = "coo",
    chunk_size: ChunkSize = "auto",
) -> Any:
    """Return the Jacobian as a sparse matrix, from as many products as it has colours.

    Points of one structure share the pattern and its colours.

    Parameters
    ----------
    of
        A linearization, its Jacobian, or, with a pattern, any operator.
    pattern
        Where it can have entries: a SciPy sparse matrix. None to find it from the program.
    direction
        "forward" groups columns, "reverse" rows, "both" has dense rows by products with Jᵀ and
        the others by products with J, or the same of columns; "symmetric" takes each entry or
        its mirror image. "auto" takes what costs least; `explain` tells what that is.
    symmetric
        Whether the matrix is known to be its own adjoint, as a Hessian is. None for what the
        operator says of itself.
    layout
        "coo", "csr" or "csc" for a sparse tensor of that layout, "scipy" for a
        `scipy.sparse.csr_array`.
    chunk_size
        How many products are formed in one vectorised pass.

    Returns
    -------
    torch.Tensor or scipy.sparse.csr_array
        Of shape (m, n), entries in order, each once; entries of the pattern that are zero are
        stored.

    Raises
    ------
    LinearizeError
        If the result times a random vector is not the Jacobian times it: the pattern that was
        given lacks entries, or the matrix is not symmetric.
    OptionError
        If there is no such direction or layout.
    SpaceError
        If the pattern has another shape, or is to be symmetric and is not square.
    UnsupportedError
        If the spaces are complex and the map is only real-linear: it has no such matrix.
    """
    A = _operator(of, "a sparse Jacobian")
    check_chunk_size(chunk_size)
    if layout not in LAYOUTS:
        raise OptionError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    A.check_complex_linear("a sparse Jacobian")
    known, way, _ = _chosen(A, pattern, direction, symmetric)
    own = pattern is None and isinstance(A, Jacobian) and A._products[0]._policy.check != "always"
    values = entries(A, known, way, chunk_size, sure=own)
    return laid_out(known, values, layout)


def explain(
    of: Linearization | LinearOperator,
    *,
    pattern: Any = None,
    direction: Direction = "auto",
    symmetric: bool | None = None,
) -> str:
    """Tell how a sparse Jacobian is had: its entries, what fills it, and from which products.

    Parameters
    ----------
    of, pattern, direction, symmetric
        As for `jacobian`. Lines of f are named with `Linearizer(f, trace=True)`.

    Returns
    -------
    str
        Several lines.

    Raises
    ------
    OptionError, SpaceError
        As by `jacobian`.
    """
    A = _operator(of, "a sparse Jacobian")
    known, way, compared = _chosen(A, pattern, direction, symmetric)
    found = known.entries
    by_row, (rows, columns) = np.diff(found.indptr), found.shape
    lines = [
        f"{rows} x {columns}, {found.nnz:,} entries: {found.nnz / max(rows, 1):.3g} in a row, "
        f"{by_row.max(initial=0)} at most"
    ]
    least = min(price for _, price in compared)
    for text, price in compared:
        chosen = "  <- taken" if text == str(way) else ""
        lines.append(f"  {text}, price {price / max(least, 1e-300):.2f}{chosen}")
    return "\n".join([*lines, *_filling(known)])


#: How many operations are named that fill a pattern without being unknown.
_NAMED = 5


def _filling(known: Pattern) -> Iterator[str]:
    """Tell which operations make a pattern what it is."""
    for step in known.steps:
        if step.guessed:
            yield (
                f"  counted as full: {step.name}, where each entry depends on {step.after} "
                "(linearize.sparse.declare gives a custom Function its pattern)"
            )
    filling = [s for s in known.steps if not s.guessed]
    for step in sorted(filling, key=lambda s: s.before - s.after)[:_NAMED]:
        yield f"  filled by {step.name}: from {step.before} to {step.after} for an entry"


def _operator(of: Any, what: str) -> LinearOperator:
    A = of.jacobian if isinstance(of, Linearization) else of
    if not isinstance(A, LinearOperator):
        raise StructureError(
            "sparse: expected a linearization, Linearizer(f).at(x), or an operator, its Jacobian "
            f"for instance, got {describe(of)}"
        )
    check_whole(A.in_space, what)
    return A


def _chosen(
    A: LinearOperator, pattern: Any, direction: Direction, symmetric: bool | None
) -> tuple[Pattern, Way, list[tuple[str, float]]]:
    """Return the pattern, the way to the matrix, and what was compared."""
    if direction not in DIRECTIONS:
        raise OptionError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    known = pattern_of(A) if pattern is None else given(pattern)
    if known.entries.shape != A.shape:
        raise SpaceError(f"pattern: expected shape {A.shape}, got {known.entries.shape}")
    mirrored = isinstance(A, SelfAdjoint) if symmetric is None else symmetric
    if (symmetric or direction == "symmetric") and A.shape[0] != A.shape[1]:
        raise SpaceError(f"a symmetric matrix is square, this one is {A.shape}")
    if A._is_mixed and direction == "auto":
        direction = "forward"
    if A._is_mixed and direction != "forward":
        raise UnsupportedError(
            "a sparse Jacobian: the adjoint of a map from real to complex numbers keeps real "
            'parts only; use direction="forward"'
        )
    way, compared = known.way(direction, symmetric=mirrored)
    return known, way, compared
