"""Writes that put several entries at one place, where the last one stays.

Autograd gives the gradient of the place to each of them. The nodes of such writes are told
from those that write each place once, as the derivative is another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._torch.graphs import Node, input_metadata, recomputed_apart, signed
from .._torch.modes import unobserved

#: Fewer entries are written by one thread, in order.
_ONE_THREAD = 1 << 15


def _positions(indices: Sequence[torch.Tensor | None], shape: Sequence[int]) -> torch.Tensor:
    """Return where entries go along the dimensions that are indexed, as one number for each."""
    place, dim = torch.zeros((), dtype=torch.long), 0
    for index in indices:
        if index is None:
            dim += 1
            continue
        masks = index.dtype in (torch.bool, torch.uint8)
        for part in index.nonzero().unbind(1) if masks else (index,):
            place = place.to(part.device) * shape[dim] + part % max(shape[dim], 1)
            dim += 1
    return place


def _along(node: Any, shape: Sequence[int]) -> torch.Tensor:
    index: torch.Tensor = node._saved_index
    return index % max(shape[signed(node._saved_dim)], 1) if shape else index


def _on_grid(dim: int, index: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    if not shape:
        return index
    places = [torch.arange(n, device=index.device) for n in index.shape]
    grid = [g.expand(index.shape) for g in torch.meshgrid(*places, indexing="ij")]
    grid[dim % len(shape)] = index
    return _positions(grid, shape)


#: By the node's name: the places that it writes to.
_PLACES: dict[str, Callable[[Any, Sequence[int]], torch.Tensor]] = {
    "IndexCopyBackward0": _along,
    "IndexPutBackward0": lambda n, shape: _positions(n._saved_indices, shape),
    "PutBackward0": lambda n, shape: n._saved_index % max(math.prod(shape), 1),
    "ScatterBackward0": lambda n, shape: _on_grid(signed(n._saved_dim), n._saved_index, shape),
    "UnsafeIndexPutBackward0": lambda n, shape: _positions(n._saved_indices, shape),
}


def may_repeat(kind: type) -> bool:
    """Whether nodes of a class can put several entries at one place."""
    return kind.__name__ in _PLACES


def repeats(node: Node) -> bool:
    """Whether a node puts several entries at one place, and it matters which of them stays."""
    places = _PLACES.get(type(node).__name__)
    adds = getattr(node, "_saved_accumulate", False)
    if places is None or adds or node.next_functions[1][0] is None:
        return False
    (meta,) = input_metadata(node)
    with unobserved(), recomputed_apart():
        return _some_equal(places(node, tuple(meta.shape)))


def _some_equal(places: torch.Tensor) -> bool:
    return bool(places.unique().numel() < places.numel())


def read_repeatedly(name: str, args: Sequence[Any], shape: Sequence[int]) -> bool:
    """Whether an operation that reads entries by indices reads one of them several times."""
    with unobserved():
        if name == "index":
            found = _positions(args[0], shape)
        elif name == "gather":
            found = _on_grid(args[0], args[1], shape)
        else:
            count = shape[args[0]] if name == "index_select" and shape else math.prod(shape)
            found = args[-1] % max(count, 1)
        return _some_equal(found)


def left_to_chance(entries: torch.Tensor) -> bool:
    """Whether several threads write entries, so that any of those at one place may stay."""
    one = entries.numel() < _ONE_THREAD or torch.get_num_threads() == 1
    return entries.device.type != "cpu" or not one
