"""Sparse matrices in the order in which products read them.

The transpose of a matrix that is stored by rows is stored by columns. PyTorch puts these into rows
at each product, which takes many times as long as the product. Here it is done once for a point.
"""

from __future__ import annotations

import torch

from .._programs.numbers import Numbers
from .._programs.program import Equation, Program
from .._programs.values import Constant
from .._torch.names import aten

#: Products, with the places of their left factors.
_LEFT = {
    aten.mv.default: 0,
    aten.mm.default: 0,
    aten.addmv.default: 1,
    aten.addmm.default: 1,
}


def store_by_rows(program: Program, numbers: Numbers) -> Program:
    """Store the matrices by rows that are left factors of products."""

    def stored(eq: Equation) -> Equation:
        place = _LEFT.get(eq.op)
        left = None if place is None else eq.args[place]
        if not isinstance(left, Constant) or not _is_by_columns(numbers[left]):
            return eq
        made = numbers.evaluated(by_rows, left, source=left.source)
        return eq.renamed(lambda x: made if x is left else x)

    return program.with_equations([stored(eq) for eq in program.equations])


def stores_by_rows(program: Program) -> bool:
    """Whether a program reads matrices that were stored by rows for it."""
    return any(c.origin.op is by_rows for c in program.constants)


def by_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Return a sparse matrix stored by rows; any other as it is."""
    if not _is_by_columns(matrix):
        return matrix
    begins, row, values = matrix.ccol_indices(), matrix.row_indices(), matrix.values()
    order = torch.argsort(row, stable=True)
    count, columns = matrix.shape
    column = torch.arange(columns, dtype=row.dtype, device=row.device)
    column = column.repeat_interleave(begins.diff())[order]
    ends = torch.bincount(row, minlength=count).cumsum(0)
    ends = torch.cat([ends.new_zeros(1), ends]).to(row.dtype)
    return torch.sparse_csr_tensor(
        ends, column, values[order], matrix.shape, check_invariants=False
    )


def _is_by_columns(matrix: torch.Tensor) -> bool:
    return matrix.layout is torch.sparse_csc and matrix.dim() == 2 and matrix.values().dim() == 1
