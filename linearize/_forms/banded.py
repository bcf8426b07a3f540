"""Square matrices with few diagonals.

The Jacobian of explicit time stepping in one dimension has entries near its diagonal only, also
around the corners where the ends of the domain meet. The diagonals take less memory than the
matrix, and a product with them less time.
"""

from __future__ import annotations

import dataclasses

import torch

from .._execute.thresholds import BAND_SHARE
from .._programs.program import Emitter
from .._programs.values import Var
from .._spaces.space import TensorSpec
from .._torch.names import aten


@dataclasses.dataclass(frozen=True, slots=True)
class Banded:
    """A square matrix of which a band of diagonals is not zero, closed around the corners.

    Attributes
    ----------
    diagonals
        `diagonals[k, i]` is the entry in row i and column i + k - lower, modulo n: width by n.
    lower
        How many of them lie below the main diagonal, which is one of them.
    """

    diagonals: torch.Tensor
    lower: int

    @staticmethod
    def of(matrix: torch.Tensor) -> Banded | None:
        """Return the narrowest band that holds a matrix, None if it is not narrow."""
        n = len(matrix)
        if n < 2 or matrix.shape != (n, n):
            return None
        rows, columns = torch.nonzero(matrix, as_tuple=True)
        offsets = sorted({0, *torch.unique((columns - rows) % n).tolist()})
        if len(offsets) > BAND_SHARE * n:
            return None
        # The band begins after the widest gap between diagonals, seen as a circle.
        gaps = [b - a for a, b in zip(offsets, [*offsets[1:], offsets[0] + n], strict=True)]
        last = gaps.index(max(gaps))
        width = max(2, n - gaps[last] + 1)  # `transposed_times` needs two
        if width > BAND_SHARE * n:
            return None
        start = offsets[(last + 1) % len(offsets)]
        lower = (n - start) % n
        i = torch.arange(n, device=matrix.device)
        k = torch.arange(width, device=matrix.device)[:, None]
        return Banded(matrix[i, (i + k - lower) % n], lower)

    @property
    def spec(self) -> TensorSpec:
        """The specification of the whole matrix."""
        n = self.diagonals.shape[1]
        return TensorSpec((n, n), self.diagonals.dtype, self.diagonals.device)

    def times(self, e: Emitter, v: Var) -> Var:
        """Write down the product with a vector."""
        width, n = self.diagonals.shape
        spec = v.spec
        # Window k of the padded vector is the vector from place k - lower on.
        after = width - 1 - self.lower
        padded = _around(e, v, 0, self.lower, after)
        windows = e.emit(aten.unfold.default, (padded, 0, n, 1), _like(spec, width, n))
        terms = e.emit(aten.mul.Tensor, (e.constant(self.diagonals), windows), windows.spec)
        return e.emit(aten.sum.dim_IntList, (terms, [0]), spec)

    def transposed_times(self, e: Emitter, u: Var) -> Var:
        """Write down the product of the transpose with a vector."""
        width, n = self.diagonals.shape
        spec = u.spec
        terms = e.emit(aten.mul.Tensor, (e.constant(self.diagonals), u), _like(spec, width, n))
        # What row i gives to column i + k - lower is read where rows of one number less begin.
        after = self.lower
        wide = _around(e, terms, 1, width - 1 - after, after)
        length = n + width - 1
        flat = e.emit(aten.reshape.default, (wide, [width * length]), _like(spec, width * length))
        cut = _like(spec, width * (length - 1))
        flat = e.emit(
            aten.slice.Tensor, (flat, 0, width - 1, width - 1 + width * (length - 1)), cut
        )
        skewed = e.emit(
            aten.reshape.default, (flat, [width, length - 1]), _like(spec, width, length - 1)
        )
        skewed = e.emit(aten.slice.Tensor, (skewed, 1, 0, n), _like(spec, width, n))
        return e.emit(aten.sum.dim_IntList, (skewed, [0]), spec)


def _around(e: Emitter, v: Var, dim: int, before: int, after: int) -> Var:
    """Write down a vector, or rows, with some of its end before it and of its beginning after."""
    *front, n = v.spec.shape
    parts = []
    if before:
        part = _like(v.spec, *front, before)
        parts.append(e.emit(aten.slice.Tensor, (v, dim, n - before, n), part))
    parts.append(v)
    if after:
        parts.append(e.emit(aten.slice.Tensor, (v, dim, 0, after), _like(v.spec, *front, after)))
    if len(parts) == 1:
        return v
    return e.emit(aten.cat.default, (parts, dim), _like(v.spec, *front, before + n + after))


def _like(spec: TensorSpec, *shape: int) -> TensorSpec:
    return TensorSpec(shape, spec.dtype, spec.device)
