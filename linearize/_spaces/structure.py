"""A pytree of tensors, taken apart and put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from .._torch.names import pytree, spec_children
from .._torch.sharded import is_sharded
from ..errors import SpaceError, StructureError
from .sharding import Layout
from .specs import TensorSpec, describe, differing
from .trees import Tree, flatten


class Structure:
    """What takes elements apart and puts them together; all about it is said of `Space`."""

    __slots__ = (
        "_all_differentiable",
        "_row",
        "group",
        "is_row",
        "is_single",
        "layouts",
        "leaves",
        "of",
        "tensors",
        "tree",
        "word",
    )

    def __init__(
        self, tree: Tree, leaves: Sequence[TensorSpec | None], word: str, of: str
    ) -> None:
        self.tree = tree
        self.leaves = tuple(leaves)
        self.word = word
        self.of = of
        self.group: Any = None
        self.layouts: tuple[Layout | None, ...] = ()
        self.tensors = tuple([leaf for leaf in self.leaves if leaf is not None])
        self._all_differentiable = len(self.tensors) == len(self.leaves)
        # The plain cases, one tensor or a tuple of tensors, need no pytree work.
        #: Whether an element is one tensor.
        self.is_single = tree.single and self._all_differentiable
        self._row = tree.row and self._all_differentiable
        #: Whether an element is a tuple of one tensor.
        self.is_row = self._row and len(self.tensors) == 1

    @property
    def spec(self) -> pytree.TreeSpec:
        """The pytree structure as PyTorch has it."""
        return self.tree.spec

    @property
    def paths(self) -> tuple[str, ...]:
        """One printable path per leaf, used in errors."""
        return self.tree.paths

    def tensors_of(self, tree: Any, *, stacked: bool = False) -> list[torch.Tensor | None]:
        """Return the tensors of `tree`, one per differentiable leaf, None for zero.

        With `stacked`, each tensor has one more dimension in front, of any length.

        Raises
        ------
        StructureError
            If the structure differs, or a leaf is not a tensor, or has no tangents.
        SpaceError
            If a leaf has another shape, dtype or device.
        """
        if self._plain(tree, stacked):
            return [tree] if self.is_single else list(tree)
        leaves, found = flatten(tree)
        if found is not self.tree:
            leaves = []
            self._flatten_up_to(tree, self.spec, "", leaves)
        if self.layouts:
            return self._laid_out(leaves, stacked)
        for given, expected, path in zip(leaves, self.leaves, self.paths, strict=True):
            if given is not None:
                self._check(given, expected, path, stacked)
        if self._all_differentiable:
            return leaves
        return [t for t, leaf in zip(leaves, self.leaves, strict=True) if leaf is not None]

    def element_of(self, tensors: Sequence[torch.Tensor | None], others: Any = None) -> Any:
        """Return a pytree with `tensors` at the differentiable leaves.

        The other leaves are taken from the list `others`, or are None.
        """
        if self.layouts:
            pairs = zip(tensors, self.layouts, strict=True)
            tensors = [
                t if t is None or layout is None else layout.given(t) for t, layout in pairs
            ]
        if self.is_single:
            return tensors[0]
        if self._row:
            return tuple(tensors)
        if self._all_differentiable:
            return self.tree.unflatten(tensors)
        rest = iter(tensors)
        leaves = [
            next(rest) if leaf is not None else (None if others is None else others[i])
            for i, leaf in enumerate(self.leaves)
        ]
        return self.tree.unflatten(leaves)

    def _plain(self, tree: Any, stacked: bool) -> bool:
        """Whether `tree` is one tensor, or a tuple of tensors, that fits."""
        if self.layouts:
            return False
        if self.is_single:
            given: Sequence[Any] = (tree,)
        elif self._row and type(tree) is tuple and len(tree) == len(self.tensors):
            given = tree
        else:
            return False
        for t, expected in zip(given, self.tensors, strict=True):
            if not isinstance(t, torch.Tensor) or t.is_nested or t.layout is not torch.strided:
                return False
            if type(t) is not torch.Tensor and is_sharded(t):
                return False
            shape = t.shape
            if stacked:
                if not shape:
                    return False
                shape = shape[1:]
            if (
                shape != expected.shape
                or t.dtype is not expected.dtype
                or t.device != expected.device
            ):
                return False
        return True

    def _laid_out(self, leaves: Sequence[Any], stacked: bool) -> list[torch.Tensor | None]:
        """Return this rank's parts of the leaves of an element."""
        flat: list[torch.Tensor | None] = []
        layouts = iter(self.layouts)
        for given, expected, path in zip(leaves, self.leaves, self.paths, strict=True):
            layout = None if expected is None else next(layouts)
            sharded = layout is not None and layout.whole is not None
            if given is not None and not (sharded and isinstance(given, torch.Tensor)):
                self._check(given, expected, path, stacked)
            if given is not None and layout is not None:
                given = layout.taken(given, f"{self.word}{path}", stacked)
            if expected is not None:
                flat.append(given)
        return flat

    def _check(self, given: Any, expected: TensorSpec | None, path: str, stacked: bool) -> None:
        if expected is None:
            raise StructureError(
                f"{self.word}{path}: the leaf of the {self.of} there is not a floating point or "
                f"complex tensor and has no {self.word}; pass None, not {describe(given)}"
            )
        if not isinstance(given, torch.Tensor):
            raise StructureError(
                f"{self.word}{path}: expected a tensor {expected} or None (zero), "
                f"got {describe(given)}"
            )
        if is_sharded(given):
            raise SpaceError(
                f"{self.word}{path}: expected {expected}, a plain tensor as in the {self.of}, got "
                "a DTensor; pass its to_local() or full_tensor()"
            )
        if given.is_nested:  # has no shape to speak of
            raise SpaceError(f"{self.word}{path}: expected {expected}, got a nested tensor")
        if stacked:
            count = given.shape[0] if given.dim() else 0
            shape = (count, *expected.shape)
            expected = TensorSpec(shape, expected.dtype, expected.device)
        if not expected.matches(given) or given.layout != torch.strided:
            layout = "" if given.layout == torch.strided else f" of layout {given.layout}"
            raise SpaceError(
                f"{self.word}{path}: expected {expected}, got {TensorSpec.of(given)}{layout}"
                f" ({differing(given, expected)})"
            )

    def _flatten_up_to(self, tree: Any, spec: Any, path: str, leaves: list[Any]) -> None:
        """Flatten `tree` along `spec`, a None standing for all leaves below it."""
        if spec.is_leaf():
            leaves.append(tree)
            return
        if tree is None:
            leaves.extend([None] * spec.num_leaves)
            return
        children, own = pytree.tree_flatten(tree, is_leaf=lambda x: x is not tree)
        expected = spec_children(spec)
        mappings = isinstance(tree, dict) and issubclass(spec.type, dict)
        if own.is_leaf() or (own.type is not spec.type and not mappings):
            raise StructureError(
                f"{self.word}{path}: expected a {spec.type.__name__} of {len(expected)} as in the "
                f"{self.of}, got {describe(tree)}"
            )
        if mappings:
            keys = list(spec.context[1] if spec.type.__name__ == "defaultdict" else spec.context)
            self._check_keys(tree, keys, path)
            parts = [(tree[key], f"[{key!r}]") for key in keys]
        elif dataclasses.is_dataclass(tree) and isinstance(spec.context, list):
            # PyTorch counts a field that is None among the structure, not among the leaves.
            fields, constant = spec.context
            for name in constant:
                if getattr(tree, name) is not None:
                    raise StructureError(
                        f"{self.word}{path}.{name}: expected None as in the {self.of}, got "
                        f"{describe(getattr(tree, name))}"
                    )
            parts = [(getattr(tree, name), f".{name}") for name in fields]
        else:
            self._check_row(children, own, spec, path)
            parts = [(part, f"[{i}]") for i, part in enumerate(children)]
        for (part, name), child in zip(parts, expected, strict=True):
            self._flatten_up_to(part, child, f"{path}{name}", leaves)

    def _check_keys(self, tree: Any, keys: list[Any], path: str) -> None:
        if set(keys) != set(tree):
            missing, extra = (
                ", ".join(sorted(map(repr, some))) or "none"
                for some in (set(keys) - set(tree), set(tree) - set(keys))
            )
            raise StructureError(
                f"{self.word}{path}: keys differ from those of the {self.of}: missing {missing}, "
                f"unexpected {extra}"
            )

    def _check_row(self, children: list[Any], own: Any, spec: Any, path: str) -> None:
        count = len(spec_children(spec))
        if len(children) != count:
            noun = ("item" if path else self.word) + ("" if count == 1 else "s")
            raise StructureError(
                f"{self.word}{path}: expected {count} {noun} as in the {self.of}, got "
                f"{len(children)}"
            )
        if own.context != spec.context:
            raise StructureError(
                f"{self.word}{path}: expected a {spec.type.__name__} {spec.context!r} as in the "
                f"{self.of}, got {own.context!r}"
            )
