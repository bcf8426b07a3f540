"""Patterns of operators, found from their programs, once for all points of one structure."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp

from .._execute.binding import BoundProgram
from .._points.jacobian import Jacobian
from .._points.product import Product
from .._programs.price import price
from .._spaces.operators import LinearOperator
from .._transpose.missing import resolve
from ..errors import LinearizeError, MissingDerivativeError, StructureError
from ._boolean import Rows, in_parts, places, same
from ._declared import times_declared
from ._dependence import Dependence, Step, dependence
from ._reading import TooDenseError
from ._ways import Direction, OnDevices, Prices, Way, ways


class Pattern:
    """Where a matrix may have entries, with the operations that fill it and the ways to have it.

    `reads` is what was looked at to find it, with the number of the product.
    """

    def __init__(
        self,
        entries: Any,
        steps: Sequence[Step] = (),
        prices: Prices | None = None,
        reads: Sequence[tuple[int, Dependence]] = (),
    ) -> None:
        found = sp.csr_array(entries, dtype=bool)
        found.sum_duplicates()
        found.sort_indices()
        self.entries = found
        self.steps = steps
        self.prices = prices or Prices()
        #: Whether products were seen to have no other entries.
        self.checked = False
        self._in_parts: Pattern | None = None
        self._reads = reads
        self._declared = times_declared()
        self._ways: dict[tuple[Direction, bool], tuple[Way, list[tuple[str, float]]]] = {}

    @functools.cached_property
    def places(self) -> OnDevices:
        """Row and column of each entry."""
        return OnDevices(*places(self.entries))

    def way(self, direction: Direction, *, symmetric: bool) -> tuple[Way, list[tuple[str, float]]]:
        """Return the cheapest way to have the matrix, and what was compared, with prices."""
        key = direction, symmetric
        if key not in self._ways:
            self._ways[key] = ways(self.entries, direction, self.prices, symmetric=symmetric)
        return self._ways[key]

    def learn(self, other: Pattern) -> None:
        """Take over the ways to another pattern, if that has the same entries."""
        if same(self.entries, other.entries):
            self._ways = other._ways

    def in_parts(self, of: LinearOperator) -> Pattern:
        """Return the pattern by real and imaginary parts, as that of an operator."""
        if self._in_parts is None:
            entries = in_parts(self.entries, of.out_space.tensors, of.in_space.tensors)
            self._in_parts = Pattern(entries, self.steps, self.prices)
        return self._in_parts

    @property
    def is_recent(self) -> bool:
        """Whether nothing was declared since."""
        return self._declared == times_declared()

    def holds(self, products: tuple[Product, ...]) -> bool:
        """Whether what was looked at is the same at another point of the structure."""
        return self.is_recent and all(read.holds(products[i]._read) for i, read in self._reads)


def pattern_of(A: Any) -> Pattern:
    """Return the pattern of an operator whose programs are known.

    Raises
    ------
    StructureError
        If it is another one.
    """
    if isinstance(A, Jacobian):
        return _of_jacobian(A)
    if isinstance(A, LinearOperator) and A.of_parts is not None:
        return pattern_of(A.of_parts).in_parts(A.of_parts)
    if isinstance(A, Summed):
        return _of_chains(A)
    raise StructureError(
        "pattern: expected a linearization, its Jacobian, the gram operator of that, an operator "
        f"of linearize.curvature, or the real operator of one of these, got {A!r}; the pattern of "
        "any other has to be given"
    )


@runtime_checkable
class Summed(Protocol):
    """An operator that is a sum of chains: products that are applied one after another."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def _chains(self) -> Iterable[Sequence[Product]]: ...


def _of_chains(A: Summed) -> Pattern:
    total = sp.csr_array(A.shape, dtype=bool)
    steps: list[Step] = []
    for chain in A._chains():
        rows: Rows = None
        for product in chain:
            one = _found(product)
            if one is None:
                return Pattern(np.ones(A.shape, dtype=bool))
            rows = one.rows if rows is None else (one.rows @ rows).astype(bool)
            steps += one.steps
        total = total + rows
    return Pattern(total, steps)


def _of_jacobian(J: Jacobian) -> Pattern:
    """Find the pattern, unless another point of the same structure knows it."""
    products = J._products
    here = products[1]._own_notes
    known: Pattern | None = here.get(_NOTE)
    if known is not None and known.is_recent:
        return known
    known = products[1]._notes().get(_NOTE)
    if known is None or not known.holds(products):
        found = _from_programs(J)
        if known is not None:
            found.learn(known)
        known = products[1]._notes()[_NOTE] = found  # only now the structure need be known
    here[_NOTE] = known
    return known


#: Under which name a structure's pattern is noted.
_NOTE = "pattern"


def _from_programs(J: Jacobian) -> Pattern:
    jvp_fn, vjp_fn = J._products
    back = _found(vjp_fn)
    entries, reads = None, []
    steps = [] if back is None else back.steps
    if back is not None:
        entries, reads = back.rows.T.tocsr(), [(1, back)]
    if back is None or not back.exact:
        # Both directions hold all entries; what only one of them has is none.
        straight = _found(jvp_fn)
        if straight is not None:
            reads.append((0, straight))
            fewer = entries is None or straight.rows.nnz < entries.nnz
            steps = straight.steps if fewer else steps
            entries = straight.rows if entries is None else entries.multiply(straight.rows)
    if entries is None:
        entries = np.ones(J.shape, dtype=bool)
    return Pattern(entries, steps, Prices(_price(jvp_fn), _price(vjp_fn)), reads)


def _found(product: Product) -> Dependence | None:
    """Return what a product's program tells; None if it would be too large, or there is none."""
    try:
        program = product.program
    except LinearizeError:
        return None
    try:
        return dependence(_resolved(program) or program)
    except TooDenseError:
        return None


def _resolved(program: BoundProgram) -> BoundProgram | None:
    """Return a program with methods turned around where their authors gave the other one only.

    None if that cannot be done but by a matrix.
    """
    try:
        return program.made(resolve, materialize=False, limit=0)
    except MissingDerivativeError:
        return None


def _price(product: Product) -> float:
    """Return what a product costs; infinite if it cannot be had, or but by a matrix."""
    try:
        resolved = _resolved(product.program)
    except LinearizeError:
        resolved = None
    return math.inf if resolved is None else max(price(resolved.program), 1.0)


def given(entries: Any) -> Pattern:
    """Return a pattern that the user gives, as it was met before if it is the same."""
    made = Pattern(entries)
    for known in reversed(_MET):
        if same(known.entries, made.entries):
            return known
    _MET.append(made)
    del _MET[:-_MOST_MET]
    return made


#: Patterns that users gave, the last ones, with their colourings.
_MET: list[Pattern] = []
_MOST_MET = 8
