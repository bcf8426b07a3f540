"""One side of a linear map.

A `Space` is a pytree structure with a shape, dtype and device per differentiable leaf. It
turns what a user passes into a flat list of tensors, with errors that name the leaf, and
turns a flat list back into the user's structure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from .._torch.names import pytree, spec_children
from .._torch.ranks import agreed_number, summed_over
from .._torch.sharded import is_sharded, local_of
from ..errors import SpaceError, StructureError, UnsupportedError
from .sharding import Layout
from .specs import TensorSpec, describe, differentiable, differing, tensor_spec
from .trees import Tree, flatten
from .vectors import VectorSpace

__all__ = ["Space", "TensorSpec", "differentiable", "tensor_spec"]


class Space(VectorSpace):
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
    layouts
        How each tensor of an element lies on the ranks, where that is known: DTensors, and plain
        tensors that several ranks have alike. Lists of tensors have this rank's parts then.
    """

    __slots__ = (
        "_all_differentiable",
        "_row",
        "_single",
        "group",
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
        specs = [TensorSpec.of(local_of(x)) if differentiable(x) else None for x in leaves]
        space = cls(tree, specs, word, of)
        layouts = [Layout.of(x) for x in leaves if differentiable(x)]
        if any(layouts):
            space.layouts = tuple(layouts)
        return space

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
        known = iter(self.layouts or [None] * len(self.tensors))
        shown = [None if leaf is None else next(known) or leaf for leaf in self.leaves]
        inside = ", ".join(
            f"{path or 'value'}: {leaf if leaf is not None else 'no tangent'}"
            for path, leaf in zip(self.paths, shown, strict=True)
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
        space.group, space.layouts = self.group, self.layouts
        return space

    def parts_of(self, group: Any) -> Space:
        """Return the same space, an element of which is one rank's part of a larger one."""
        space = Space(self.tree, self.leaves, self.word, self.of)
        space.group, space.layouts = group, self.layouts
        return space

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
            return [tree] if self._single else list(tree)
        leaves, found = flatten(tree)
        if found is not self.tree:
            leaves = []
            self._flatten_up_to(tree, self.spec, "", leaves)
        if self.layouts:
            return self._laid_out(leaves, stacked)
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

    def element_of(self, tensors: Sequence[torch.Tensor | None], others: Any = None) -> Any:
        """Return a pytree with `tensors` at the differentiable leaves.

        The other leaves are taken from the list `others`, or are None.
        """
        if self.layouts:
            pairs = zip(tensors, self.layouts, strict=True)
            tensors = [
                t if t is None or layout is None else layout.given(t) for t, layout in pairs
            ]
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
        if self.layouts:
            return False
        if self._single:
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
                self._check(given, expected, path, stacked=stacked)
            if given is not None and layout is not None:
                given = layout.taken(given, f"{self.word}{path}", stacked)
            if expected is not None:
                flat.append(given)
        return flat

    def _check(
        self, given: Any, expected: TensorSpec | None, path: str, *, stacked: bool = False
    ) -> None:
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
                        f"{describe(getattr(tree, name))}"
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

    def as_real(self) -> Space:
        """Return the space with real and imaginary parts in the place of complex numbers.

        Each complex leaf has one more dimension of length 2, as by `torch.view_as_real`.
        """
        if not self.is_complex:
            return self
        check_whole(self, "as_real")
        leaves = [
            leaf
            if leaf is None or not leaf.dtype.is_complex
            else TensorSpec((*leaf.shape, 2), leaf.dtype.to_real(), leaf.device)
            for leaf in self.leaves
        ]
        return Space(self.tree, leaves, self.word, self.of)

    def part(self, key: Any) -> tuple[Space, list[int]]:
        """Return the space below a key of the pytree, and the numbers of its tensors.

        Parameters
        ----------
        key
            The key of a dictionary, a position, the name of a field, or `:` for all.

        Raises
        ------
        StructureError
            If there is nothing of that name, or nothing there has tangents.
        """
        if key is Ellipsis or (isinstance(key, slice) and key == slice(None)):
            return self, list(range(len(self.tensors)))
        check_whole(self, "a block")
        whole = self.tree.unflatten(list(range(len(self.leaves))))
        fields = dataclasses.is_dataclass(whole) or (
            isinstance(key, str) and hasattr(whole, "_fields")
        )
        try:
            below = getattr(whole, key) if fields else whole[key]
        except (KeyError, IndexError, TypeError, AttributeError):
            raise StructureError(
                f"{self.word}: there is no part {key!r} in {self!r}; a part is the key of a "
                "dictionary, a position in a tuple or list, the name of a field, or `:` for all"
            ) from None
        positions, tree = flatten(below)
        order = [i for i, leaf in enumerate(self.leaves) if leaf is not None]
        places = [order.index(i) for i in positions if self.leaves[i] is not None]
        if not places:
            raise StructureError(f"{self.word}: the part {key!r} of {self!r} has no {self.word}")
        return Space(tree, [self.leaves[i] for i in positions], self.word, self.of), places

    @staticmethod
    def joined(spaces: Sequence[Space]) -> Space:
        """Return the space of tuples with one element of each."""
        for space in spaces:
            check_whole(space, "an operator of several")
        parts = tuple([s.tree.unflatten(list(range(len(s.leaves)))) for s in spaces])
        leaves = [leaf for s in spaces for leaf in s.leaves]
        return Space(flatten(parts)[1], leaves, spaces[0].word, spaces[0].of)

    def dot(self, a: Any, b: Any) -> torch.Tensor:
        """Return the inner product of two elements; of whole vectors, where these are parts."""
        own = super().dot(a, b)
        if self.group is None:
            return own
        if own.requires_grad:
            raise UnsupportedError("dot: an inner product over ranks cannot be differentiated")
        return summed_over(self.group, own)

    def norm(self, a: Any) -> torch.Tensor:
        """Return the Euclidean norm of an element; of a whole vector, where it is a part."""
        return super().norm(a) if self.group is None else self.dot(a, a).abs().sqrt()

    def random(self, generator: torch.Generator | None = None) -> Any:
        """Return a pytree of normally distributed numbers; of DTensors as of whole tensors."""
        if not self.layouts:
            return super().random(generator)
        source = torch.default_generator if generator is None else generator
        drawn = int(torch.randint(1 << 62, (), generator=source))
        alike = torch.Generator().manual_seed(agreed_number(drawn, self.group))
        parts = []
        for leaf, layout in zip(self.tensors, self.layouts, strict=True):
            if layout is None:
                parts.append(leaf.random(source))
            elif layout.whole is None:
                parts.append(leaf.random(alike) * layout.count**-0.5)
            else:
                shape = tuple(layout.whole.tensor_meta.shape)
                whole = TensorSpec(shape, leaf.dtype, leaf.device).random(alike)
                parts.append(layout.whole_numbers(whole))
        return self.element_of(parts)

    def ravel(self, element: Any) -> torch.Tensor:
        """Return the flat vector of an element, see `VectorSpace`; not of DTensors."""
        check_no_layouts(self, "ravel")
        return super().ravel(element)

    def unravel(self, vector: torch.Tensor) -> Any:
        """Return the element that a flat vector stands for, see `VectorSpace`."""
        check_no_layouts(self, "unravel")
        return super().unravel(vector)

    def alike(self, parts: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Return parts that are the same where several ranks have a tensor: their means."""
        return [
            t if t is None or layout is None else layout.mean(t)
            for t, layout in zip(parts, self.layouts or [None] * len(parts), strict=True)
        ]

    def _element(self, given: Any) -> Any:
        """Return an element; of a tuple of one, its only entry may be given alone."""
        children = spec_children(self.spec) if self.spec.type is tuple else ()
        alone = len(children) == 1 and given is not None and type(given) is not tuple
        return (given,) if alone else given


def check_no_layouts(space: Space, what: str) -> None:
    """Raise if the vectors of a space are DTensors, or belong to them."""
    if space.layouts:
        raise UnsupportedError(
            f"{what}: not for {space!r}, whose vectors are DTensors, or plain tensors that "
            "several ranks have alike; these are whole as they are: inner products of DTensors "
            "are those of whole vectors, and solvers written in PyTorch take them"
        )


def check_whole(space: Space, what: str) -> None:
    """Raise if each rank has a part of the space's vectors only."""
    if space.group is not None:
        raise UnsupportedError(
            f"{what}: each rank has a part of the vectors only, and unit vectors of all ranks at "
            "once are none of the whole; use products, or linearize.scipy.aslinearoperator, whose "
            "vectors are whole on every rank"
        )
