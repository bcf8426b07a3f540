"""Which tensors were computed in the same way from the same ones.

The two directions of a point compute constants from what the graph saved, each when it needs
them. What one has computed and still keeps need not be computed and kept by the other too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

#: Longer recipes begin anew: to hold them would take as much memory as the graph did.
_LONGEST = 64


class Recipe:
    """How one tensor of one point came about; the same object as long as anybody holds it.

    Attributes
    ----------
    given
        Whether it is the recipe of a tensor that was not computed here.
    parts
        The recipes of what it was computed from.
    length
        How many operations one after the other lead to it.
    result
        Gives what was made by it, None if nobody keeps that any more.
    """

    __slots__ = ("__weakref__", "given", "length", "parts", "result")

    def __init__(self, parts: Sequence[Recipe] | None = None) -> None:
        self.given = parts is None
        self.parts = tuple(parts or ())
        self.length: int = max((p.length + 1 for p in self.parts), default=0)
        self.result: Callable[[], Any] = _nothing


def _nothing() -> None:
    """Return nothing."""


#: What made each recipe; a key keeps the recipes of the arguments alive.
_KNOWN: weakref.WeakValueDictionary[Any, Recipe] = weakref.WeakValueDictionary()


def recipe(
    op: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    parts: Sequence[Recipe],
    source: str,
) -> Recipe:
    """Return the recipe of an operation's result.

    Parameters
    ----------
    op
        The operation.
    args, kwargs
        Its arguments, with recipes in place of tensors.
    parts
        The recipes among them.
    source
        What the result is kept for.
    """
    if any(p.length >= _LONGEST for p in parts):
        return Recipe()
    key = op, source, frozen(args), frozen(sorted(kwargs.items()))
    found = _KNOWN.get(key)
    if found is None:
        found = _KNOWN[key] = Recipe(parts)
    return found


def frozen(x: Any) -> Any:
    """Return what two arguments have in common that mean the same."""
    if isinstance(x, (list, tuple)):
        return tuple(map(frozen, x))
    return x if isinstance(x, Recipe) else (type(x).__name__, repr(x))


def roots(recipes: Iterable[Recipe]) -> frozenset[Recipe]:
    """Return what recipes begin with: tensors that were given."""
    stack, seen, found = list(recipes), set[Recipe](), set[Recipe]()
    while stack:
        r = stack.pop()
        if r not in seen:
            seen.add(r)
            stack.extend(r.parts)
            if r.given:
                found.add(r)
    return frozenset(found)
