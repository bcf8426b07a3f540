"""The boolean matrices of a program's variables, while it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch

from .._execute.binding import BoundProgram
from .._programs.origins import Origin, Saved, ordered
from .._programs.program import Equation
from .._programs.values import Constant, Var
from ._boolean import Rows

#: What is looked at of a constant.
Look: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

#: Entries that a pattern may have before it counts as full.
LIMIT = 50_000_000


class TooDenseError(Exception):
    """A pattern would have more entries than `LIMIT`."""


def _numbers(t: torch.Tensor) -> torch.Tensor:
    return t.clone()


def _not_zero(t: torch.Tensor) -> torch.Tensor:
    return t.nonzero().T


def _stored(t: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = t.to_sparse_coo().coalesce().indices()
    return found


class Reader:
    """What is known of a program's variables on the way through it.

    Attributes
    ----------
    width
        How many entries the program's arguments have.
    rows
        For each variable that is still needed, what its entries depend on.
    looked_at
        What was read of constants, by their origins.
    numbers
        The tensors of the constants.
    contiguous
        Variables that lie in memory row by row.
    """

    def __init__(self, program: BoundProgram) -> None:
        sizes = [v.spec.numel for v in program.inputs]
        self.width = sum(sizes)
        self.rows: dict[Var, Rows] = {}
        self.looked_at: dict[Origin, tuple[Look, torch.Tensor]] = {}
        self.numbers = program.numbers()
        self.contiguous: set[Var] = set()
        start = 0
        for v, size in zip(program.inputs, sizes, strict=True):
            self.rows[v] = sp.eye_array(size, self.width, k=start, dtype=bool, format="csr")
            start += size

    def linked(self, eq: Equation, relation: Rows | None) -> list[Rows] | None:
        """Return the rows of an equation's results, of which is known what entries they read."""
        if relation is None:
            return None
        source = [self.rows[v] for v in dict.fromkeys(eq.inputs())]
        joined = self.joined(relation, sp.vstack(source, format="csr"))
        results, start = [], 0
        for out in eq.outputs:
            size = 0 if out is None else out.spec.numel
            results.append(joined[start : start + size])
            start += size
        return results

    def read_numbers(self, c: Constant) -> torch.Tensor:
        """Return the tensor of a constant, and note that it was looked at."""
        return self._look(c, _numbers)

    def entries(self, c: Constant) -> torch.Tensor:
        """Return the places where a constant has entries, one in each column.

        If it was not there before f ran, another point may have others: these are all places.
        """
        t = self.numbers[c]
        if t.layout != torch.strided:
            return self._look(c, _stored)
        begin = [o for o in ordered([c.origin]) if not o.inputs()]
        if all(o.static or (isinstance(o, Saved) and o.ready) for o in begin):
            return self._look(c, _not_zero)
        return torch.ones(t.shape, dtype=torch.bool).nonzero().T

    def _look(self, c: Constant, at: Look) -> torch.Tensor:
        seen = at(self.numbers[c].detach())
        if not c.origin.static:
            self.looked_at[c.origin] = at, seen
        return seen

    def everything(self, eq: Equation) -> list[Rows]:
        """Let each entry of each result depend on everything that the arguments depend on."""
        used = np.zeros(self.width, dtype=bool)
        for v in eq.inputs():
            used[self.rows[v].indices] = True
        count = int(used.sum())
        results = []
        for out in eq.outputs:
            height = 0 if out is None else out.spec.numel
            if height * count > LIMIT:
                raise TooDenseError
            one = sp.csr_array(used[None, :])
            results.append(self.taken(one, np.zeros(height, dtype=np.int64)))
        return results

    def taken(self, rows: Rows, index: Any) -> Rows:
        """Return the rows with these numbers; -1 stands for an empty row."""
        index = np.asarray(index).reshape(-1)
        if index.size and index.min() < 0:
            empty = sp.csr_array((1, rows.shape[1]), dtype=bool)
            rows = sp.vstack([rows, empty], format="csr")
        if index.size * (rows.nnz // max(rows.shape[0], 1)) > 4 * LIMIT:
            raise TooDenseError
        return rows[index]

    def joined(self, relation: Rows, rows: Rows) -> Rows:
        """Return the rows of results that join the rows that a relation names."""
        return (relation.astype(bool) @ rows.astype(bool)).tocsr()
