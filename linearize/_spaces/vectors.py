"""Elements of a space as flat vectors, with what a solver does to them."""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import SpaceError, UnsupportedError
from .specs import TensorSpec, describe, differing


class VectorSpace(abc.ABC):
    """A pytree of tensors, seen as a space of vectors."""

    __slots__ = ()

    #: One specification per differentiable leaf.
    tensors: tuple[TensorSpec, ...]

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Number of scalars in an element."""

    @abc.abstractmethod
    def tensors_of(self, tree: Any, *, stacked: bool = False) -> list[torch.Tensor | None]:
        """Return the tensors of an element, one per differentiable leaf, None for zero."""

    @abc.abstractmethod
    def element_of(self, tensors: Sequence[torch.Tensor | None]) -> Any:
        """Return a pytree with `tensors` at the differentiable leaves."""

    def filled(self, element: Any) -> list[torch.Tensor]:
        """Return the tensors of an element, zeros where `tensors_of` has None."""
        return [
            leaf.or_zeros(t)
            for t, leaf in zip(self.tensors_of(element), self.tensors, strict=True)
        ]

    def _element(self, given: Any) -> Any:
        """Return what stands for an element in the form that `tensors_of` takes."""
        return given

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
        """Return the inner product of two elements, aᴴ·b.

        Parameters
        ----------
        a, b
            Pytrees structured like the space; None, for all or a part of one, is zero.

        Returns
        -------
        torch.Tensor
            One number, differentiable with respect to both.

        Raises
        ------
        StructureError, SpaceError
            If one does not fit; the message names the leaf.
        """
        parts = [
            torch.vdot(x.reshape(-1), y.reshape(-1)).to(self.tensors[0].device)
            for x, y in zip(
                self.tensors_of(self._element(a)), self.tensors_of(self._element(b)), strict=True
            )
            if x is not None and y is not None
        ]
        total: torch.Tensor = self.tensors[0].zeros().sum()
        for part in parts:
            total = total + part
        return total

    def norm(self, a: Any) -> torch.Tensor:
        """Return the Euclidean norm of an element.

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
        """Return a pytree of normally distributed numbers.

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
        return self.element_of([leaf.random(source) for leaf in self.tensors])

    def join(self, parts: Sequence[torch.Tensor], *, stacked: bool = False) -> torch.Tensor:
        """Return the flat vector of one tensor per differentiable leaf; of K stacked ones, K rows.

        Parameters
        ----------
        parts
            The tensors, which are not looked at.
        stacked
            Whether each has one more dimension in front.
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
        """Return one tensor per differentiable leaf; of K rows, K stacked ones.

        Parameters
        ----------
        flat
            A flat vector, or rows of them, which is not looked at.
        """
        sizes = [leaf.numel for leaf in self.tensors]
        return [
            part.reshape((*flat.shape[:-1], *leaf.shape)).to(dtype=leaf.dtype, device=leaf.device)
            for part, leaf in zip(flat.split(sizes, dim=-1), self.tensors, strict=True)
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
