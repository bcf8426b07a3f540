"""Colourings: which columns, and which rows, are had by one product.

All of them are greedy. What stands in the way of a colour is kept as the bits of one integer
for each row, so that a colouring takes as many steps as there are entries.

A. H. Gebremedhin, F. Manne, A. Pothen, "What color is your Jacobian? Graph coloring for computing
derivatives", SIAM Review 47, 2005, describes the three kinds: of columns that share no row, of
rows and columns together ("star bicolouring"), and of a symmetric matrix ("star colouring").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ._boolean import Integers, places

#: A colour for each column or row, -1 for those that need none.
Colors: TypeAlias = Integers

#: Entries up to which colourings are tried in several orders.
_SMALL = 200_000
#: How often the classes of a colouring are gone through again, the last ones first.
_PASSES = 4


def count(colors: Colors) -> int:
    """Return how many colours there are."""
    return int(colors.max(initial=-1)) + 1


def grouped(pattern: Any) -> Colors:
    """Return a colour for each column, so that columns of one colour share no row."""
    columns = pattern.shape[1]
    fewest = int(np.diff(pattern.indptr).max(initial=0))
    if 2 * fewest > columns:  # next to nothing can be saved
        return np.arange(columns)
    colors = _best(_Columns(pattern.tocsc()), fewest)
    return np.maximum(colors, 0)  # empty columns may have any


def split_by(pattern: Any, rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> tuple[Any, Any]:
    """Return colours of the columns and of the rows.

    Products with J give the entries outside of some rows, and those in some columns; products
    with Jᵀ the others.
    """
    row, column = places(pattern)
    forward = ~rows[row] | columns[column]
    shape = pattern.shape
    marked = sp.csr_array((forward + 1, pattern.indices, pattern.indptr), shape=shape)
    other = sp.csr_array((2 - forward, pattern.indices, pattern.indptr), shape=shape)
    return _best(_Columns(marked.tocsc(), 2), 0), _best(_Columns(other.T.tocsc(), 2), 0)


def _best(columns: _Columns, fewest: int) -> Colors:
    """Return the best of some greedy colourings; `fewest` colours are enough."""
    best = columns.colored(range(columns.width))
    if columns.entries > _SMALL:
        return best
    by_size = np.argsort(-columns.sizes, kind="stable").tolist()
    orders: Iterator[Sequence[int]] = itertools.chain(
        [by_size], (_last_first(best) for _ in range(_PASSES))
    )
    for order in orders:
        if count(best) <= max(fewest, 1):
            break
        found = columns.colored(order)
        if count(found) <= count(best):
            best = found
    return best


def _last_first(colors: Colors) -> Sequence[int]:
    """Return the columns by classes, the last ones first: greedily they take no more colours.

    J. Culberson, "Iterated greedy graph coloring and the difficulty landscape", 1992.
    """
    order: list[int] = np.argsort(-colors, kind="stable").tolist()
    return order


class _Columns:
    """Colours columns one after the other.

    Where the numbers of the matrix are `direct`, an entry is had by these products: columns of
    one colour share no row in which that is so for one of them. By default all are.
    """

    def __init__(self, csc: Any, direct: int | None = None) -> None:
        self.height, self.width = csc.shape
        self.entries = csc.nnz
        self.sizes = np.diff(csc.indptr)
        alone = np.ones(csc.nnz, dtype=bool) if direct is None else csc.data == direct
        self._alone, self._beside = _rows(csc, alone), _rows(csc, ~alone)

    def colored(self, order: Iterable[int]) -> Colors:
        """Return the greedy colouring in an order of columns."""
        colors = [-1] * self.width
        met = [0] * self.height  # colours of columns in this row
        taken = [0] * self.height  # of columns that have to be alone in it
        (own, first), (others, start) = self._alone, self._beside
        for j in order:
            alone, beside = own[first[j] : first[j + 1]], others[start[j] : start[j + 1]]
            if not alone:
                continue
            forbidden = 0
            for i in alone:
                forbidden |= met[i]
            for i in beside:
                forbidden |= taken[i]
            bit = ~forbidden & (forbidden + 1)
            for i in alone:
                met[i] |= bit
                taken[i] |= bit
            for i in beside:
                met[i] |= bit
            colors[j] = bit.bit_length() - 1
        return np.array(colors, dtype=np.int64)


def _rows(csc: Any, chosen: NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """Return the rows of the chosen entries, and where those of each column begin."""
    return csc.indices[chosen].tolist(), np.append(0, np.cumsum(chosen))[csc.indptr].tolist()


def star(pattern: Any) -> Colors:
    """Colour a symmetric matrix so that each entry is had, be it by its mirror image.

    Neighbours have different colours; and of each two, one is the only neighbour of its colour
    that the other one has.
    """
    orders: list[Iterable[int]] = [range(pattern.shape[0])]
    if pattern.nnz <= _SMALL:
        orders.append(np.argsort(-np.diff(pattern.indptr), kind="stable").tolist())
    return min((_Star(pattern).colored(order) for order in orders), key=count)


class _Star:
    """Colours the vertices of a graph one after the other. Colours are bits.

    For each vertex are known the colours that its neighbours have, those that several have, and
    those that one neighbour must go on having alone, because the vertex is not alone in its own
    colour there.
    """

    def __init__(self, pattern: Any) -> None:
        row, column = places(pattern)
        size = pattern.shape[0]
        self._near: list[int] = column[row != column].tolist()
        counts = np.bincount(row[row != column], minlength=size)
        self._bounds: list[int] = [0, *np.cumsum(counts).tolist()]
        self._bits = [0] * size
        self._once, self._more, self._alone = [0] * size, [0] * size, [0] * size

    def colored(self, order: Iterable[int]) -> Colors:
        """Return the greedy colouring in an order of vertices."""
        for v in order:
            forbidden = self._forbidden(v)
            self._give(v, ~forbidden & (forbidden + 1))
        return np.array([b.bit_length() - 1 for b in self._bits], dtype=np.int64)

    def _neighbours(self, v: int) -> list[int]:
        return self._near[self._bounds[v] : self._bounds[v + 1]]

    def _forbidden(self, v: int) -> int:
        bits, once, alone = self._bits, self._once, self._alone
        more, forbidden = self._more[v], once[v]
        for w in self._neighbours(v):
            if bits[w]:
                forbidden |= alone[w]
                if bits[w] & more:
                    forbidden |= once[w]
        return forbidden

    def _give(self, v: int, bit: int) -> None:
        bits, once, more, alone = self._bits, self._once, self._more, self._alone
        bits[v] = bit
        for x in self._neighbours(v):
            if bits[x] and bits[x] & more[v]:
                alone[x] |= bit
            if not once[x] & bit:
                once[x] |= bit
            elif more[x] & bit:
                alone[v] |= bits[x]
            else:
                more[x] |= bit
                for w in self._neighbours(x):
                    if bits[w] == bit:
                        alone[w] |= bits[x]
