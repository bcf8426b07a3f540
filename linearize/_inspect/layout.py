"""Placing the boxes of a directed graph without cycles in layers, from top to bottom.

The usual way (Sugiyama): layers by longest path, edges over several layers get a place in each,
the order in a layer is improved by barycentres, and places are the least-squares ones that
keep order and distance.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

#: The distance between neighbours in a layer, and between layers.
GAP, RISE = 18.0, 30.0
#: How often the layers are gone through, down and up.
_SWEEPS = 6
#: The width that a passing edge takes in a layer.
_PASSAGE = 8.0


@dataclasses.dataclass(slots=True)
class Layout:
    """Where the boxes are, and which way the edges take.

    Attributes
    ----------
    centres
        x and y of the centre of each box.
    routes
        For each edge the points that it passes, from the lower edge of its first box to the
        upper edge of its last. It is straight from the first to the second, bends to the
        third, is straight to the fourth, and so on: it bends between layers only.
    width, height
        Of the whole.
    """

    centres: list[tuple[float, float]]
    routes: list[list[tuple[float, float]]]
    width: float
    height: float


def layered(sizes: Sequence[tuple[float, float]], edges: Sequence[tuple[int, int]]) -> Layout:
    """Place boxes of some widths and heights.

    They stand in topological order: the first position of an edge is smaller than the second.
    """
    layer = [0] * len(sizes)
    below: list[list[int]] = [[] for _ in sizes]
    #: Whether a box hangs on boxes that lead nowhere else, and so can follow what it leads to.
    free = [True] * len(sizes)
    for a, b in sorted(set(edges)):
        below[a].append(b)
    for a, children in enumerate(below):
        for b in children:
            layer[b] = max(layer[b], layer[a] + 1)
            free[b] &= free[a] and len(children) == 1
    for a in reversed(range(len(sizes))):
        if free[a] and below[a]:
            layer[a] = min(layer[b] for b in below[a]) - 1
    graph = _Layers(sizes, layer)
    paths = [graph.connect(a, b) for a, b in edges]
    graph.sort()
    graph.place()
    return graph.layout(paths)


class _Layers:
    """The graph with a place for each edge in each layer that it passes."""

    def __init__(self, sizes: Sequence[tuple[float, float]], layer: Sequence[int]) -> None:
        self.boxes = len(sizes)
        self.sizes = sizes
        self.widths = [w for w, _ in sizes]
        self.layer = list(layer)
        count = max(layer, default=-1) + 1
        self.heights = [0.0] * count
        self.rows: list[list[int]] = [[] for _ in range(count)]
        for i, (_, h) in enumerate(sizes):
            self.heights[layer[i]] = max(self.heights[layer[i]], h)
            self.rows[layer[i]].append(i)
        self.above: list[list[int]] = [[] for _ in sizes]
        self.below: list[list[int]] = [[] for _ in sizes]
        self.x: list[float] = []
        #: Passing edges of one origin share their way.
        self._passages: dict[tuple[int, int], int] = {}

    def connect(self, a: int, b: int) -> list[int]:
        """Lead an edge through the layers between; return the places that it passes."""
        path = [a]
        for level in range(self.layer[a] + 1, self.layer[b]):
            new = self._passages.get((a, level))
            if new is None:
                new = self._passages[a, level] = len(self.widths)
                self.widths.append(_PASSAGE)
                self.layer.append(level)
                self.rows[level].append(new)
                self.above.append([])
                self.below.append([])
            path.append(new)
        path.append(b)
        for u, v in itertools.pairwise(path):
            if v not in self.below[u]:
                self.below[u].append(v)
                self.above[v].append(u)
        return path

    # -- order --------------------------------------------------------------------------

    def sort(self) -> None:
        """Improve the order in the layers."""
        best, fewest = [row[:] for row in self.rows], self.crossings()
        for sweep in range(_SWEEPS):
            if fewest == 0:
                break
            if sweep % 2 == 0:
                for level in range(1, len(self.rows)):
                    self._sort_row(level, self.rows[level - 1], self.above)
            else:
                for level in range(len(self.rows) - 2, -1, -1):
                    self._sort_row(level, self.rows[level + 1], self.below)
            now = self.crossings()
            if now < fewest:
                best, fewest = [row[:] for row in self.rows], now
        self.rows = best

    def _sort_row(
        self, level: int, fixed: Sequence[int], towards: Sequence[Sequence[int]]
    ) -> None:
        place = {v: i for i, v in enumerate(fixed)}
        row = self.rows[level]

        def barycentre(i: int) -> float:
            near = [place[v] for v in towards[row[i]]]
            return sum(near) / len(near) if near else i * len(fixed) / len(row)

        wish = {v: barycentre(i) for i, v in enumerate(row)}
        row.sort(key=wish.__getitem__)

    def crossings(self) -> int:
        """Count the crossings of edges."""
        count = 0
        for upper, lower in itertools.pairwise(self.rows):
            place = {v: i for i, v in enumerate(lower)}
            ends = [place[v] for u in upper for v in sorted(self.below[u], key=place.__getitem__)]
            count += sum(ends[i] > e for j, e in enumerate(ends) for i in range(j))
        return count

    # -- places -------------------------------------------------------------------------

    def place(self) -> None:
        """Choose the places along the layers."""
        self.x = [0.0] * len(self.widths)
        for row in self.rows:
            self._place_row(row, lambda v: 0.0)
        for sweep in range(2 * _SWEEPS):
            down = sweep % 2 == 0
            towards = self.above if down else self.below
            for row in self.rows if down else self.rows[::-1]:
                self._place_row(row, lambda v, near=towards: self._wish(v, near))  # type: ignore[misc]

    def _wish(self, v: int, near: Sequence[Sequence[int]]) -> float:
        xs = [self.x[u] for u in near[v]]
        return sum(xs) / len(xs) if xs else self.x[v]

    def _place_row(self, row: Sequence[int], wish: Callable[[int], float]) -> None:
        """Place a layer as near to the wishes as order and distance allow."""
        offsets = [0.0]
        for u, v in itertools.pairwise(row):
            offsets.append(offsets[-1] + (self.widths[u] + self.widths[v]) / 2 + GAP)
        #: Mean wish and number of neighbours that touch (pool adjacent violators).
        pools: list[tuple[float, int]] = []
        for v, offset in zip(row, offsets, strict=True):
            mean, count = wish(v) - offset, 1
            while pools and pools[-1][0] > mean:
                other, n = pools.pop()
                mean, count = (mean * count + other * n) / (count + n), count + n
            pools.append((mean, count))
        places = [mean for mean, count in pools for _ in range(count)]
        for v, offset, start in zip(row, offsets, places, strict=True):
            self.x[v] = start + offset

    def layout(self, paths: Sequence[Sequence[int]]) -> Layout:
        """Return where everything is."""
        left = min((x - w / 2 for x, w in zip(self.x, self.widths, strict=True)), default=0.0)
        right = max((x + w / 2 for x, w in zip(self.x, self.widths, strict=True)), default=0.0)
        tops = [0.0]
        for h in self.heights:
            tops.append(tops[-1] + h + RISE)

        def band(v: int) -> tuple[float, float]:
            level = self.layer[v]
            return tops[level], tops[level] + self.heights[level]

        centres = [(self.x[v] - left, sum(band(v)) / 2) for v in range(self.boxes)]
        routes = []
        for path in paths:
            points = []
            for i, v in enumerate(path):
                top, bottom = band(v)
                middle = (top + bottom) / 2
                if i == 0:
                    top = middle + self.sizes[v][1] / 2
                if i == len(path) - 1:
                    bottom = middle - self.sizes[v][1] / 2
                points += [(self.x[v] - left, top), (self.x[v] - left, bottom)]
            routes.append(points)
        return Layout(centres, routes, right - left, max(tops[-1] - RISE, 0.0))
