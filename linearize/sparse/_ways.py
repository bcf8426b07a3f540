"""The ways to have a sparse matrix from products, and which of them is the cheapest.

Products with J give columns, products with Jᵀ rows, both together what dense rows and dense
columns would spoil for either. A symmetric matrix takes fewer: each entry also stands in the
mirror.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from .._spaces.flat import random
from .._spaces.space import Space, TensorSpec
from ._boolean import Integers, places
from ._coloring import Colors, count, grouped, split_by, star

Direction: TypeAlias = Literal["auto", "forward", "reverse", "both", "symmetric"]
DIRECTIONS = get_args(Direction)

#: The most numbers in a stack of seeds that is kept for the next point.
_KEPT = 1_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Prices:
    """What a product costs by each of the two directions."""

    forward: float = 1.0
    reverse: float = 1.0

    def of(self, columns: Colors, rows: Colors) -> float:
        """Return what products with all colours cost."""
        return _cost(self.forward, count(columns)) + _cost(self.reverse, count(rows))


def _cost(price: float, products: int) -> float:
    return price * products if products else 0.0  # a direction that there is none of costs inf


class OnDevices:
    """Two arrays as tensors, made once on each device."""

    def __init__(self, first: NDArray[Any], second: NDArray[Any]) -> None:
        self._arrays = first, second
        self._made: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return them on a device."""
        if device not in self._made:
            first, second = (torch.from_numpy(x).to(device) for x in self._arrays)
            self._made[device] = first, second
        return self._made[device]


class Way:
    """Products that give a matrix, and where each entry stands in their results.

    Parameters
    ----------
    name
        "forward", "reverse", "both" or "symmetric".
    pattern
        The entries, in CSR format with sorted indices.
    columns, rows
        Colours; columns of one colour are summed up by one product with J, rows by one with Jᴴ.
        Those of a symmetric matrix are either.
    """

    def __init__(self, name: str, pattern: Any, columns: Colors, rows: Colors) -> None:
        self.name, self.columns, self.rows = name, columns, rows
        self.forward, self.reverse = count(columns), count(rows)
        row, column = places(pattern)
        if name == "symmetric":
            colors, size = (columns if self.forward else rows), len(columns)
            own = _alone(colors, column, row)
            straight = colors[column] * size + row
            mirror = colors[row] * size + column
            found = np.where(own, straight, mirror), ~own
        else:
            found = self._from_both(pattern.shape, row, column)
        #: For each entry its place in the results, those of J, one after the other, then of Jᴴ;
        #: and whether what stands there is the conjugate.
        self.places = OnDevices(*found)
        self._seeds: dict[object, torch.Tensor] = {}
        self._random: dict[TensorSpec, torch.Tensor] = {}

    def seeds(self, space: Space, *, adjoint: bool) -> torch.Tensor:
        """Return the arguments of the products of one direction, one in each row.

        Sums of the unit vectors of one colour; in the first direction that there is, a random
        vector comes last.
        """
        spec = space.vector
        key = spec.dtype, spec.device, adjoint
        if key in self._seeds:
            return self._seeds[key]
        colors = torch.from_numpy(self.rows if adjoint else self.columns)
        kinds = torch.arange(self.reverse if adjoint else self.forward)
        made = (colors[None, :] == kinds[:, None]).to(dtype=spec.dtype, device=spec.device)
        if not (adjoint and self.forward):
            made = torch.cat([made, self.random(space)[None]])
        if made.numel() <= _KEPT:
            self._seeds[key] = made
        return made

    def random(self, space: Space) -> torch.Tensor:
        """Return the random vector."""
        spec = space.vector
        if spec not in self._random:
            generator = torch.Generator().manual_seed(20_011)
            self._random[spec] = space.join(random(space, generator))
        return self._random[spec]

    def _from_both(
        self, shape: tuple[int, int], row: Integers, column: Integers
    ) -> tuple[Integers, NDArray[np.bool_]]:
        height, width = shape
        by_row = np.zeros(len(row), dtype=bool)
        if self.reverse:
            by_row = self.rows[row] >= 0
            if self.forward:  # where both sum up an entry, one of them may have it alone
                by_row &= _alone(self.rows, row, column)
        straight = self.columns[column] * height + row
        # After the results of products with J, and the one to check these.
        turned = (self.forward + (self.forward > 0)) * height + self.rows[row] * width + column
        return np.where(by_row, turned, straight), by_row

    @property
    def products(self) -> int:
        """How many products it takes."""
        return self.forward + self.reverse

    def __str__(self) -> str:
        if self.name == "both":
            return f"both: {_counted(self.forward)} forward and {self.reverse} in reverse"
        return f"{self.name}: {_counted(self.products)}"


def _counted(products: int) -> str:
    return "1 product" if products == 1 else f"{products} products"


def _alone(colors: Colors, line: Integers, crossing: Integers) -> NDArray[np.bool_]:
    """Whether no other entry on the line that crosses an entry's own has its line's colour."""
    keys = crossing * (count(colors) + 1) + colors[line]
    _, which, counts = np.unique(keys, return_inverse=True, return_counts=True)
    found: NDArray[np.bool_] = counts[which.reshape(-1)] == 1
    return found


def ways(
    pattern: Any, direction: Direction, prices: Prices, *, symmetric: bool
) -> tuple[Way, list[tuple[str, float]]]:
    """Return the cheapest way, and what was compared, with prices.

    With `symmetric` the matrix is known to be its own adjoint.
    """
    none = _none(pattern.shape[1]), _none(pattern.shape[0])
    found: list[tuple[float, Way]] = []

    def add(name: str, columns: Colors, rows: Colors) -> None:
        way = Way(name, pattern, columns, rows)
        found.append((prices.of(columns, rows), way))

    auto = direction == "auto"
    if direction == "forward" or (auto and (prices.forward < np.inf or prices.reverse == np.inf)):
        add("forward", grouped(pattern), none[1])
    if direction == "reverse" or (auto and prices.reverse < np.inf):
        add("reverse", none[0], grouped(pattern.T.tocsr()))
    if direction == "both" or (auto and max(prices.forward, prices.reverse) < np.inf):
        enough = min((price for price, _ in found), default=np.inf)
        for rows, columns in _splits(pattern, prices, enough):
            add("both", *split_by(pattern, rows, columns))
    if direction == "symmetric" or (auto and symmetric):
        colors = star((pattern + pattern.T).tocsr())
        ahead = prices.forward <= prices.reverse
        add("symmetric", *((colors, none[1]) if ahead else (none[0], colors)))
    best = min(found, key=lambda f: f[0])[1]
    return best, list({str(way): price for price, way in found}.items())


def _none(size: int) -> Colors:
    return np.full(size, -1, dtype=np.int64)


def _splits(
    pattern: Any, prices: Prices, enough: float
) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Return some choices of dense rows and columns, if they may cost less than `enough`.

    If so many dense rows are left to products with Jᵀ, those with J need no more colours than the
    largest row that remains has entries; and the other way round.
    """
    by_row = np.diff(pattern.indptr)
    by_column = np.bincount(pattern.indices, minlength=pattern.shape[1])
    rows, row_price = _densest(by_row, prices.reverse, prices.forward)
    columns, column_price = _densest(by_column, prices.forward, prices.reverse)
    every_row, no_column = np.ones_like(rows), np.zeros_like(columns)
    found = []
    if rows.any() and row_price < enough:
        found.append((rows, no_column))
    if columns.any() and column_price < enough:
        found.append((every_row, columns))
    if len(found) == 2:
        found.append((rows, columns))
    return found or ([] if enough < np.inf else [(rows, no_column)])


def _densest(
    sizes: NDArray[Any], apart: float, together: float
) -> tuple[NDArray[np.bool_], float]:
    """Return which lines are best had one by one, and what all cost then at least."""
    order = np.argsort(-sizes, kind="stable")
    remaining = np.append(sizes[order], 0)
    prices = apart * np.arange(len(remaining)) + together * remaining
    k = int(prices.argmin())
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[order[:k]] = True
    return chosen, float(prices[k])
