"""Boolean matrices in SciPy's CSR format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from .._spaces.specs import TensorSpec

Integers: TypeAlias = NDArray[np.int64]
#: A boolean matrix in SciPy's CSR format.
Rows: TypeAlias = Any


def marked(row: Any, column: Any, shape: tuple[int, int]) -> Rows:
    """Return the matrix with entries at these places."""
    return sp.csr_array((np.ones(len(row), dtype=bool), (row, column)), shape=shape)


def places(pattern: Rows) -> tuple[Integers, Integers]:
    """Return row and column of each entry, in the matrix' order."""
    row = np.repeat(np.arange(pattern.shape[0]), np.diff(pattern.indptr))
    return row, pattern.indices.astype(np.int64)


def same(a: Rows, b: Rows) -> bool:
    """Whether two matrices with sorted indices have the same entries."""
    return (
        a.shape == b.shape
        and a.nnz == b.nnz
        and np.array_equal(a.indptr, b.indptr)
        and np.array_equal(a.indices, b.indices)
    )


def in_parts(pattern: Rows, outs: Sequence[TensorSpec], ins: Sequence[TensorSpec]) -> Rows:
    """Return a pattern by real and imaginary parts: all of them where a number is complex."""
    rows, columns = (
        np.repeat(
            np.arange(sum(s.numel for s in specs)),
            np.repeat([1 + s.dtype.is_complex for s in specs], [s.numel for s in specs]),
        )
        for specs in (outs, ins)
    )
    return pattern[rows][:, columns].tocsr()
