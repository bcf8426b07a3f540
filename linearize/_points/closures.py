"""The two products of a linearization, as functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import StructureError
from .product import Product
from .programs import PULLBACK, PUSHFORWARD


class JvpFn(Product):
    """The pushforward of a linearization: tangents of the primals to the tangent of the value.

    Call it with one tangent per primal, each structured like the primal; None, for a whole
    primal or any part of it, is zero. The result is structured like the value; leaves that
    have no tangent (integers, strings) are None.

    Raises
    ------
    StructureError, SpaceError
        If a tangent does not fit; the message names it.
    StalenessError
        If a residual was changed in place since the linearization.
    ClosedError
        If the linearization was closed.
    MissingDerivativeError
        If a custom Function has no `jvp` and its `backward` cannot be transposed.
    """

    _name = "jvp_fn"
    _direction = PUSHFORWARD

    def __call__(self, *tangents: Any) -> Any:
        """Return J·v."""
        short = self._short
        if short is not None and len(tangents) == 1:
            result = short(tangents[0])
            if result is not None:
                return result
        if self._lifetime.ranks is not None:
            return self._lifetime.ranks.led(self._called, lambda: self._called_with(tangents))
        return self._called_with(tangents)

    def _called_with(self, tangents: tuple[Any, ...]) -> Any:
        if self._lifetime.closed:
            self._check_open()
        flat = self._arguments.tensors_of(tangents)
        return self._results.element_of(self._apply(flat))

    @property
    def _takes_one_tensor(self) -> bool:
        return self._arguments.is_row

    def batched(self, *tangents: Any, chunk_size: int | None = None) -> Any:
        """Return J·v for K tangents in one pass.

        Parameters
        ----------
        *tangents
            As for a single product, each tensor with a first dimension of length K.
        chunk_size
            How many are taken at once, which bounds the memory; None for all.

        Returns
        -------
        pytree
            Structured like the value, each tensor with a first dimension of length K.

        Raises
        ------
        StructureError, SpaceError
            If a tangent does not fit.

        Notes
        -----
        Built-in operations are vectorised; custom Functions are called once per tangent inside
        the pass, or once for all if they set `generate_vmap_rule`.
        """
        return self._stacked(tangents, chunk_size)


class VjpFn(Product):
    """The pullback of a linearization: a cotangent of the value to those of the primals.

    Call it with one cotangent structured like the value; None, for all or any part of it, is
    zero. The result is a tuple with one entry per primal; leaves that have no tangent are
    None. For complex numbers this is Jᴴ·u, PyTorch's convention for gradients.

    Raises
    ------
    StructureError, SpaceError
        If the cotangent does not fit; the message names the leaf.
    StalenessError
        If a residual was changed in place since the linearization.
    ClosedError
        If the linearization was closed.
    MissingDerivativeError
        If a custom Function has no `backward` and its `jvp` cannot be transposed.
    """

    _name = "vjp_fn"
    _direction = PULLBACK

    def __call__(self, *cotangent: Any) -> tuple[Any, ...]:
        """Return Jᵀ·u (Jᴴ·u for complex numbers)."""
        short = self._short
        if short is not None and len(cotangent) == 1:
            result: tuple[Any, ...] | None = short(cotangent[0])
            if result is not None:
                return result
        if self._lifetime.ranks is not None:
            return self._lifetime.ranks.led(self._called, lambda: self._called_with(cotangent))
        return self._called_with(cotangent)

    def _called_with(self, cotangent: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._lifetime.closed:
            self._check_open()
        if len(cotangent) != 1:
            raise StructureError(
                "vjp_fn: expected 1 cotangent, structured like the value (for a tuple of outputs, "
                f"one tuple), got {len(cotangent)}"
            )
        flat = self._arguments.tensors_of(cotangent[0])
        several: tuple[Any, ...] = self._results.element_of(self._apply(flat))
        return several

    def _at_once(
        self, tensors: Sequence[torch.Tensor | None]
    ) -> Sequence[torch.Tensor | None] | None:
        source = self._source
        if source is None or self._program is not None or self._compiling is not None:
            return None
        return source.pulled_back(tensors)

    @property
    def _takes_one_tensor(self) -> bool:
        return self._arguments.is_single

    def batched(self, cotangent: Any, *, chunk_size: int | None = None) -> Any:
        """Return Jᵀ·u for K cotangents in one pass.

        Parameters
        ----------
        cotangent
            As for a single product, each tensor with a first dimension of length K.
        chunk_size
            How many are taken at once, which bounds the memory; None for all.

        Returns
        -------
        tuple
            One entry per primal, each tensor with a first dimension of length K.

        Raises
        ------
        StructureError, SpaceError
            If the cotangent does not fit.
        """
        return self._stacked(cotangent, chunk_size)
