"""Tensors in nested arguments of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def leaves(tree: Any) -> list[Any]:
    """Return the leaves of nested lists, tuples and dicts."""
    found: list[Any] = []
    _gather((tree,), found)
    return found


def _gather(tree: Any, found: list[Any]) -> None:
    for x in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(x, NESTED):
            if x:
                _gather(x, found)
        else:
            found.append(x)


NESTED = (list, tuple, dict)


def map_leaves(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `fn` to each leaf of nested lists, tuples and dicts."""
    kind = type(tree)
    if kind is list or kind is tuple:
        return kind([map_leaves(fn, x) if isinstance(x, NESTED) else fn(x) for x in tree])
    if kind is dict:
        return {k: map_leaves(fn, x) for k, x in tree.items()}
    return fn(tree)
