"""One side of a linear map.

A `Space` turns what a user passes into a flat list of tensors, with errors that name the leaf, and
turns a flat list back into the user's structure; its elements are flat vectors too, with what a
solver does to them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from .._torch.names import spec_children
from .._torch.ranks import agreed_number, summed_over
from .._torch.sharded import local_of
from ..errors import SpaceError, StructureError, UnsupportedError
from .sharding import Layout
from .specs import TensorSpec, describe, differentiable, differing, tensor_spec
from .structure import Structure
from .trees import Tree, flatten

__all__ = ["Space", "TensorSpec", "differentiable", "tensor_spec"]


class Space(Structure):
    """A pytree of tensors as a space of vectors: one shape, dtype and device for each of them.

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

    __slots__ = ()

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

    @property
    def is_complex(self) -> bool:
        """Whether some leaf is complex."""
        return any(leaf.dtype.is_complex for leaf in self.tensors)

    @property
    def vector(self) -> TensorSpec:
        """Shape, dtype and device of the flat vectors of the space.

        Raises
        ------
        UnsupportedError
            If the space has both real and complex leaves: no vector stands for both.
        """
        kinds = {leaf.dtype.is_complex for leaf in self.tensors}
        if len(kinds) > 1:
            raise UnsupportedError(
                f"flat vectors of {self!r}: it has both real and complex leaves; pass pytrees, "
                "or take the real operator, A.as_real(), which counts a complex number as two"
            )
        dtype = self.tensors[0].dtype
        for leaf in self.tensors[1:]:
            dtype = torch.promote_types(dtype, leaf.dtype)
        return TensorSpec((self.size,), dtype, self.tensors[0].device)

    def filled(self, element: Any) -> list[torch.Tensor]:
        """Return the tensors of an element, zeros where `tensors_of` has None."""
        return [
            leaf.or_zeros(t)
            for t, leaf in zip(self.tensors_of(element), self.tensors, strict=True)
        ]

    def unpacked(self) -> Space:
        """Return the space of the only entry of a tuple of one; any other space as it is."""
        tree = self.tree.unpacked()
        return self if tree is self.tree else self._laid_alike(tree, self.group)

    def parts_of(self, group: Any) -> Space:
        """Return the same space, an element of which is one rank's part of a larger one."""
        return self._laid_alike(self.tree, group)

    def _laid_alike(self, tree: Tree, group: Any) -> Space:
        space = Space(tree, self.leaves, self.word, self.of)
        space.group, space.layouts = group, self.layouts
        return space

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
        """Return the space below a key of the pytree, and the numbers of its tensors."""
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

    def ravel(self, element: Any) -> torch.Tensor:
        """Return the flat vector of an element: all leaves, each row by row, one after another.

        It is differentiable with respect to the element.

        Parameters
        ----------
        element
            A pytree structured like the space; None, for all or a part of it, is zero. Or
            several stacked ones, each tensor with one more dimension in front.

        Returns
        -------
        torch.Tensor
            Of shape (n,), or (K, n) for K stacked elements.

        Raises
        ------
        StructureError, SpaceError
            If the element does not fit; the message names the leaf.
        """
        check_no_layouts(self, "ravel")
        given, stacked = self._one_or_stacked(element)
        count = next((t.shape[:1] for t in given if t is not None), ()) if stacked else ()
        parts = [
            torch.zeros((*count, *leaf.shape), dtype=leaf.dtype, device=leaf.device)
            if t is None
            else t
            for t, leaf in zip(given, self.tensors, strict=True)
        ]
        return self.join(parts, stacked=stacked)

    def unravel(self, vector: torch.Tensor) -> Any:
        """Return the element that a flat vector stands for: the inverse of `ravel`.

        It is differentiable with respect to the vector.

        Parameters
        ----------
        vector
            A tensor of shape (n,), or (K, n) for K stacked elements.

        Returns
        -------
        pytree
            Structured like the space; leaves without tangents are None.

        Raises
        ------
        SpaceError
            If shape, dtype or device differ.
        """
        check_no_layouts(self, "unravel")
        if not isinstance(vector, torch.Tensor):
            raise SpaceError(f"unravel: expected a tensor {self.vector}, got {describe(vector)}")
        spec = self.vector
        front = tuple(vector.shape[:-1])
        expected = TensorSpec((*front[:1], *spec.shape), spec.dtype, spec.device)
        if not expected.matches(vector):
            raise SpaceError(
                f"unravel: expected {spec}, or one such row for each of several elements, got "
                f"{TensorSpec.of(vector)} ({differing(vector, expected)})"
            )
        return self.element_of(self.split(vector))

    def dot(self, a: Any, b: Any) -> torch.Tensor:
        """Return the inner product of two elements, aᴴ·b; of whole vectors, where these are parts.

        Parameters
        ----------
        a, b
            Pytrees structured like the space; None, for all or a part of one, is zero.

        Returns
        -------
        torch.Tensor
            One number, differentiable with respect to both, unless it is a sum over ranks.

        Raises
        ------
        StructureError, SpaceError
            If one does not fit; the message names the leaf.
        """
        total: torch.Tensor = self.tensors[0].zeros().sum()
        first, second = (self.tensors_of(self._element(x)) for x in (a, b))
        for x, y in zip(first, second, strict=True):
            if x is not None and y is not None:
                total = total + torch.vdot(x.reshape(-1), y.reshape(-1)).to(total.device)
        if self.group is None:
            return total
        if total.requires_grad:
            raise UnsupportedError("dot: an inner product over ranks cannot be differentiated")
        return summed_over(self.group, total)

    def norm(self, a: Any) -> torch.Tensor:
        """Return the Euclidean norm of an element; of a whole vector, where it is a part.

        Parameters
        ----------
        a
            A pytree structured like the space; None, for all or a part of it, is zero.

        Returns
        -------
        torch.Tensor
            One real number, differentiable with respect to the element.

        Raises
        ------
        StructureError, SpaceError
            If it does not fit; the message names the leaf.
        """
        if self.group is not None:
            return self.dot(a, a).abs().sqrt()
        norms = [
            torch.linalg.vector_norm(t).to(self.tensors[0].device)
            for t in self.tensors_of(self._element(a))
            if t is not None
        ]
        if not norms:
            return self.tensors[0].zeros().abs().sum()
        dtype = functools.reduce(torch.promote_types, [t.dtype for t in norms])
        whole: torch.Tensor = torch.linalg.vector_norm(torch.stack([t.to(dtype) for t in norms]))
        return whole

    def zeros(self) -> Any:
        """Return the zero of the space, as a pytree of new tensors."""
        return self.element_of([leaf.zeros() for leaf in self.tensors])

    def random(self, generator: torch.Generator | None = None) -> Any:
        """Return a pytree of normally distributed numbers; of DTensors as of whole tensors.

        Parameters
        ----------
        generator
            Of the CPU, whatever the devices of the space, so that all see the same numbers;
            None for PyTorch's own.

        Returns
        -------
        pytree
            Structured like the space.
        """
        source = torch.default_generator if generator is None else generator
        if not self.layouts:
            return self.element_of([leaf.random(source) for leaf in self.tensors])
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

    def join(self, parts: Sequence[torch.Tensor], *, stacked: bool = False) -> torch.Tensor:
        """Return the flat vector of one tensor per differentiable leaf; of K stacked ones, K rows.

        The tensors are not looked at.
        """
        spec = self.vector
        rows = [
            t.reshape((*t.shape[: int(stacked)], leaf.numel)).to(
                dtype=spec.dtype, device=spec.device
            )
            for t, leaf in zip(parts, self.tensors, strict=True)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return one tensor per differentiable leaf; of K rows, K stacked ones."""
        sizes = [leaf.numel for leaf in self.tensors]
        return [
            part.reshape((*flat.shape[:-1], *leaf.shape)).to(dtype=leaf.dtype, device=leaf.device)
            for part, leaf in zip(flat.split(sizes, dim=-1), self.tensors, strict=True)
        ]

    def alike(self, parts: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Return parts that are the same where several ranks have a tensor: their means."""
        return [
            t if t is None or layout is None else layout.mean(t)
            for t, layout in zip(parts, self.layouts or [None] * len(parts), strict=True)
        ]

    def _one_or_stacked(self, element: Any) -> tuple[list[torch.Tensor | None], bool]:
        """Return the tensors of an element or of stacked ones, and whether they are stacked."""
        element = self._element(element)
        try:
            return self.tensors_of(element), False
        except SpaceError:
            try:
                given = self.tensors_of(element, stacked=True)
            except SpaceError:
                pass
            else:
                lengths = {t.shape[0] for t in given if t is not None}
                if len(lengths) == 1:
                    return given, True
            raise

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
