"""Pytrees of tensors, flattened in microseconds.

Tuples, lists and dicts are walked here, anything else by PyTorch; both agree on what is a leaf.
Equal structures are one object, so that they are compared by identity, and what is known of a
structure is found out once.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from .._torch.names import key_string, pytree, spec_children
from .specs import differentiable

#: Types that PyTorch takes for leaves, asked after first.
_LEAVES = frozenset(
    (torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, complex, str, bytes)
)


class Tree:
    """The structure of a pytree: two of equal structure are one object.

    Attributes
    ----------
    spec
        As PyTorch has it.
    paths
        One printable path per leaf.
    single
        Whether it is a leaf.
    row
        Whether it is a tuple of leaves.
    """

    __slots__ = ("__weakref__", "_build", "_tokens", "paths", "row", "single", "spec")

    def __init__(
        self, tokens: tuple[Any, ...], spec: pytree.TreeSpec, paths: Sequence[str]
    ) -> None:
        self._tokens = tokens
        self.spec = spec
        self.paths = tuple(paths)
        self.single = spec.is_leaf()
        self.row = spec.type is tuple and all(child.is_leaf() for child in spec_children(spec))
        self._build = _builder(spec)

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """Return the pytree with these leaves."""
        return self._build(iter(leaves))

    def unpacked(self) -> Tree:
        """Return the structure of the only entry of a tuple of one, any other as it is."""
        if self.spec.type is not tuple or len(children := spec_children(self.spec)) != 1:
            return self
        return _interned(
            self._tokens[2:], lambda: (children[0], [p.removeprefix("[0]") for p in self.paths])
        )


_KNOWN: weakref.WeakValueDictionary[tuple[Any, ...], Tree] = weakref.WeakValueDictionary()
#: Kept for a while, to be met again.
_LATEST: deque[Tree] = deque(maxlen=64)
_LOCK = threading.Lock()


def flatten(tree: Any) -> tuple[list[Any], Tree]:
    """Return the leaves and the structure of a pytree."""
    leaves: list[Any] = []
    tokens: list[Any] = []
    _walk(tree, leaves, tokens)

    def look() -> tuple[pytree.TreeSpec, list[str]]:
        with_paths, spec = pytree.tree_flatten_with_path(tree)
        return spec, [key_string(path) for path, _ in with_paths]

    return leaves, _interned(tuple(tokens), look)


def tangent_leaves(tree: Any) -> list[torch.Tensor]:
    """Return the leaves of a pytree that have tangents."""
    return [x for x in pytree.tree_leaves(tree) if differentiable(x)]


def tangent_part(tree: Any) -> Any:
    """Return a pytree with None in the place of leaves that have no tangents."""
    return pytree.tree_map(lambda x: x if differentiable(x) else None, tree)


def _interned(
    tokens: tuple[Any, ...], look: Callable[[], tuple[pytree.TreeSpec, list[str]]]
) -> Tree:
    known = _KNOWN.get(tokens)
    if known is None:
        made = Tree(tokens, *look())
        with _LOCK:
            known = _KNOWN.setdefault(tokens, made)
            _LATEST.append(known)
    return known


def _walk(x: Any, leaves: list[Any], tokens: list[Any]) -> None:
    """Append the leaves of a pytree, and what tells its structure from others."""
    kind = type(x)
    if kind in _LEAVES:
        leaves.append(x)
        tokens.append(None)
        return
    if kind is tuple or kind is list:
        tokens.append(kind)
        tokens.append(len(x))
        for child in x:
            _walk(child, leaves, tokens)
    elif kind is dict:
        keys = tuple(x)
        tokens.append(kind)
        tokens.append(keys)
        tokens.append(tuple(map(type, keys)))  # 1 and True are equal
        for child in x.values():
            _walk(child, leaves, tokens)
    else:
        others, spec = pytree.tree_flatten(x)
        leaves.extend(others)
        tokens.append(None if spec.is_leaf() else spec)


def _builder(spec: pytree.TreeSpec) -> Callable[[Iterator[Any]], Any]:
    """Return what makes a pytree of an iterator over its leaves."""
    if spec.is_leaf():
        return next
    kind, count = spec.type, spec.num_leaves
    if kind not in (tuple, list, dict):
        return lambda leaves: pytree.tree_unflatten(list(islice(leaves, count)), spec)
    children = spec_children(spec)
    flat = all(child.is_leaf() for child in children)
    parts = [_builder(child) for child in children]
    if kind is dict:
        keys = list(spec.context)
        if flat:
            return lambda leaves: dict(zip(keys, leaves, strict=False))
        return lambda leaves: {k: part(leaves) for k, part in zip(keys, parts, strict=True)}
    if flat:
        return lambda leaves: kind(islice(leaves, count))
    return lambda leaves: kind([part(leaves) for part in parts])
