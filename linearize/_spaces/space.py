"""One side of a linear map.

A `Space` is a pytree structure with a shape, dtype and device per differentiable leaf. It
turns what a user passes into a flat list of tensors, with errors that name the leaf, and
turns a flat list back into the user's structure.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from .._torch.names import pytree, spec_children
from ..errors import SpaceError, StructureError
from .trees import Tree, flatten


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape, dtype and device of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, t: torch.Tensor) -> TensorSpec:
        """Return the specification that `t` meets."""
        return cls(tuple(t.shape), t.dtype, t.device)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        where = "" if self.device.type == "cpu" else f" {self.device}"
        return f"{dtype}[{','.join(map(str, self.shape))}]{where}"

    @property
    def differentiable(self) -> bool:
        """Whether such a tensor has tangents."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of such a tensor."""
        return self.numel * self.dtype.itemsize

    def matches(self, t: torch.Tensor) -> bool:
        """Whether `t` has this shape, dtype and device."""
        # A dtype is one object, and is compared as such: this runs at every call.
        return t.dtype is self.dtype and t.shape == self.shape and t.device == self.device

    def zeros(self) -> torch.Tensor:
        """Return a tensor of zeros."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def random(self, generator: torch.Generator) -> torch.Tensor:
        """Return normally distributed numbers, drawn on the CPU from `generator`.

        The global random state stays untouched, and every device sees the same numbers.
        """
        double = self.dtype in (torch.float64, torch.complex128)
        if self.dtype.is_complex:
            drawn = torch.complex128 if double else torch.complex64
        else:
            drawn = torch.float64 if double else torch.float32
        t = torch.randn(self.shape, dtype=drawn, generator=generator)
        return t.to(device=self.device, dtype=self.dtype)


@functools.lru_cache(maxsize=4096)
def tensor_spec(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> TensorSpec:
    """Return a specification; mostly the same object for the same one."""
    return TensorSpec(shape, dtype, device)


def differentiable(leaf: Any) -> bool:
    """Whether a pytree leaf has tangents: a floating point or complex tensor."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


class Space:
    """A pytree of tensors, as seen from outside.

    Parameters
    ----------
    tree
        The pytree structure.
    leaves
        One `TensorSpec` per leaf; None for a leaf without tangents.
    word
        What an element is called in errors: "tangent" or "cotangent".
    of
        What the structure is that of: "primals" or "value".

    Attributes
    ----------
    group
        Of whose ranks each has a part of an element, None for elements that are whole: what a
        part is of, a process group knows.
    """

    __slots__ = (
        "_all_differentiable",
        "_row",
        "_single",
        "group",
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
        self.tensors = tuple([leaf for leaf in self.leaves if leaf is not None])
        self._all_differentiable = len(self.tensors) == len(self.leaves)
        #: The plain cases, one tensor or a tuple of tensors, need no pytree work.
        self._single = tree.single and self._all_differentiable
        self._row = tree.row and self._all_differentiable

    @classmethod
    def of_tree(cls, tree: Any, word: str, of: str) -> Space:
        """Return the space of the tangents of `tree`."""
        return cls.of_leaves(*flatten(tree), word, of)

    @classmethod
    def of_leaves(cls, leaves: Sequence[Any], tree: Tree, word: str, of: str) -> Space:
        """Return the space of the tangents of a pytree that was flattened."""
        specs = [TensorSpec.of(x) if differentiable(x) else None for x in leaves]
        return cls(tree, specs, word, of)

    @property
    def is_single(self) -> bool:
        """Whether an element is one tensor."""
        return self._single

    @property
    def is_row(self) -> bool:
        """Whether an element is a tuple of one tensor."""
        return self._row and len(self.tensors) == 1

    @property
    def spec(self) -> pytree.TreeSpec:
        """The pytree structure as PyTorch has it."""
        return self.tree.spec

    @property
    def paths(self) -> tuple[str, ...]:
        """One printable path per leaf, used in errors."""
        return self.tree.paths

    def __repr__(self) -> str:
        inside = ", ".join(
            f"{path or 'value'}: {leaf if leaf is not None else 'no tangent'}"
            for path, leaf in zip(self.paths, self.leaves, strict=True)
        )
        return f"Space({inside})"

    @property
    def size(self) -> int:
        """Number of scalars in an element."""
        return sum(leaf.numel for leaf in self.tensors)

    def unpacked(self) -> Space:
        """Return the space of the only entry of a tuple of one; any other space as it is."""
        tree = self.tree.unpacked()
        if tree is self.tree:
            return self
        space = Space(tree, self.leaves, self.word, self.of)
        space.group = self.group
        return space

    def parts_of(self, group: Any) -> Space:
        """Return the same space, an element of which is one rank's part of a larger one."""
        space = Space(self.tree, self.leaves, self.word, self.of)
        space.group = group
        return space

    def flatten(self, tree: Any, *, stacked: bool = False) -> list[torch.Tensor | None]:
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
            return [tree] if self._single else list(tree)
        leaves, found = flatten(tree)
        if found is not self.tree:
            leaves = []
            self._flatten_up_to(tree, self.spec, "", leaves)
        if self._all_differentiable:
            for given, expected, path in zip(leaves, self.leaves, self.paths, strict=True):
                if given is not None:
                    self._check(given, expected, path, stacked=stacked)
            return leaves
        flat = []
        for given, expected, path in zip(leaves, self.leaves, self.paths, strict=True):
            if given is not None:
                self._check(given, expected, path, stacked=stacked)
            if expected is not None:
                flat.append(given)
        return flat

    def unflatten(self, tensors: Sequence[torch.Tensor | None], others: Any = None) -> Any:
        """Return a pytree with `tensors` at the differentiable leaves.

        The other leaves are taken from the list `others`, or are None.
        """
        if self._single:
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
        if self._single:
            given: Sequence[Any] = (tree,)
        elif self._row and type(tree) is tuple and len(tree) == len(self.tensors):
            given = tree
        else:
            return False
        for t, expected in zip(given, self.tensors, strict=True):
            if not isinstance(t, torch.Tensor) or t.is_nested or t.layout is not torch.strided:
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

    def _check(
        self, given: Any, expected: TensorSpec | None, path: str, *, stacked: bool = False
    ) -> None:
        if expected is None:
            raise StructureError(
                f"{self.word}{path}: the leaf of the {self.of} there is not a floating point or "
                f"complex tensor and has no {self.word}; pass None, not {_describe(given)}"
            )
        if not isinstance(given, torch.Tensor):
            raise StructureError(
                f"{self.word}{path}: expected a tensor {expected} or None (zero), "
                f"got {_describe(given)}"
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
                f" ({self._differing(given, expected)})"
            )

    @staticmethod
    def _differing(given: torch.Tensor, expected: TensorSpec) -> str:
        pairs = (
            ("shape", tuple(given.shape), expected.shape),
            ("dtype", given.dtype, expected.dtype),
            ("device", given.device, expected.device),
            ("layout", given.layout, torch.strided),
        )
        return "; ".join(f"{n}: expected {e}, got {g}" for n, g, e in pairs if g != e)

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
                f"{self.of}, got {_describe(tree)}"
            )
        if mappings:
            keys = list(spec.context[1] if spec.type.__name__ == "defaultdict" else spec.context)
            if set(keys) != set(tree):
                missing, extra = (
                    sorted(map(repr, set(keys) - set(tree))),
                    sorted(map(repr, set(tree) - set(keys))),
                )
                raise StructureError(
                    f"{self.word}{path}: keys differ from those of the {self.of}: "
                    f"missing {', '.join(missing) or 'none'}, "
                    f"unexpected {', '.join(extra) or 'none'}"
                )
            for key, child in zip(keys, expected, strict=True):
                self._flatten_up_to(tree[key], child, f"{path}[{key!r}]", leaves)
            return
        if dataclasses.is_dataclass(tree) and isinstance(spec.context, list):
            # PyTorch counts a field that is None among the structure, not among the leaves.
            fields, constant = spec.context
            for name in constant:
                if getattr(tree, name) is not None:
                    raise StructureError(
                        f"{self.word}{path}.{name}: expected None as in the {self.of}, got "
                        f"{_describe(getattr(tree, name))}"
                    )
            for name, child in zip(fields, expected, strict=True):
                self._flatten_up_to(getattr(tree, name), child, f"{path}.{name}", leaves)
            return
        if len(children) != len(expected):
            raise StructureError(
                f"{self.word}{path}: expected {len(expected)} "
                f"{self._items(path, len(expected))} as in the {self.of}, got {len(children)}"
            )
        if own.context != spec.context:
            raise StructureError(
                f"{self.word}{path}: expected a {spec.type.__name__} {spec.context!r} as in the "
                f"{self.of}, got {own.context!r}"
            )
        for i, (part, child) in enumerate(zip(children, expected, strict=True)):
            self._flatten_up_to(part, child, f"{path}[{i}]", leaves)

    def _items(self, path: str, count: int) -> str:
        noun = "item" if path else self.word
        return noun if count == 1 else f"{noun}s"


def _describe(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return f"a tensor {TensorSpec.of(x)}"
    if isinstance(x, (int, float, complex, str, bool)):
        return f"{type(x).__name__} {x!r}"
    if isinstance(x, (list, tuple, dict)):
        return f"a {type(x).__name__} of {len(x)}"
    return f"a {type(x).__name__}"
