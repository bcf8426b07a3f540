"""Pytrees: the quick walk agrees with PyTorch's."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from linearize._spaces.trees import flatten

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Held:
    """Registered as a pytree below."""

    a: Any
    b: Any = None


torch.export.register_dataclass(Held)


class Listed(list[Any]):
    """Is no pytree."""


T = torch.ones(2)
TREES = [
    T,
    None,
    1.5,
    (),
    [],
    {},
    (T,),
    [T, T],
    (T, [T, {"a": T, "b": ()}]),
    {"x": T, "y": (None, "text"), 3: [T]},
    Pair(T, [T]),
    (Pair(T, T), {"p": Pair(1, T)}),
    OrderedDict(b=T, a=[T]),
    defaultdict(list, k=[T]),
    Held(T, (T, T)),
    [Held(T), Held(T, T)],
    Listed([T, T]),
    {"m": torch.nn.Parameter(T)},
    (torch.float32, torch.device("cpu"), slice(1, 2)),
]


@pytest.mark.parametrize("tree", TREES, ids=lambda t: type(t).__name__)
def test_leaves_structure_and_paths_are_those_of_pytorch(tree: Any) -> None:
    leaves, found = flatten(tree)
    with_paths, spec = pytree.tree_flatten_with_path(tree)
    assert len(leaves) == len(with_paths)
    assert all(x is y for x, (_, y) in zip(leaves, with_paths, strict=True))
    assert found.spec == spec
    assert found.paths == tuple(pytree.keystr(path) for path, _ in with_paths)
    assert found.single == spec.is_leaf()
    again = found.unflatten(leaves)
    assert type(again) is type(tree)
    assert pytree.tree_flatten(again) == (leaves, spec) or all(
        x is y for x, y in zip(pytree.tree_leaves(again), leaves, strict=True)
    )


def test_equal_structures_are_one_object_and_others_are_not() -> None:
    for i, one in enumerate(TREES):
        assert flatten(one)[1] is flatten(one)[1]
        for other in TREES[i + 1 :]:
            same = pytree.tree_structure(one) == pytree.tree_structure(other)
            assert (flatten(one)[1] is flatten(other)[1]) == same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({1: T}, {True: T}),
        ({"a": T, "b": T}, {"b": T, "a": T}),
        ((T, (T,)), ((T, T),)),
        ([T], (T,)),
        (([], T), (T, [])),
        ({"a": [T]}, {"a": T}),
    ],
)
def test_structures_that_look_alike(one: Any, other: Any) -> None:
    assert flatten(one)[1] is not flatten(other)[1]
    leaves, tree = flatten(one)
    assert repr(tree.unflatten(leaves)) == repr(one)


def test_the_only_entry_of_a_tuple() -> None:
    tree = flatten(({"a": T, "b": [T]},))[1]
    inner = flatten({"a": T, "b": [T]})[1]
    assert tree.unpacked() is inner
    assert inner.paths == ("['a']", "['b'][0]")
    for whole in ((T, T), [T], T, ()):
        assert flatten(whole)[1].unpacked() is flatten(whole)[1]
    # Also where the entry was never seen by itself.
    fresh = flatten(({"never seen before": T},))[1].unpacked()
    assert fresh is flatten({"never seen before": T})[1]
    assert fresh.paths == ("['never seen before']",)


def test_many_structures_do_not_pile_up() -> None:
    from linearize._spaces.trees import _KNOWN

    for i in range(500):
        flatten({f"key {i}": T})
    assert len(_KNOWN) < 300
