"""What is known of a tensor without its numbers: shape, dtype and device."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape, dtype and device of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, t: torch.Tensor) -> TensorSpec:
        """Return the specification that `t` meets."""
        try:
            return tensor_spec(t.shape, t.dtype, t.device)
        except TypeError:  # a size that is a symbol has no hash
            return cls(tuple(t.shape), t.dtype, t.device)

    @classmethod
    def received(cls, meta: Any) -> TensorSpec:
        """Return what a graph node expects, given its metadata."""
        return tensor_spec(tuple(meta.shape), meta.dtype, meta.device)

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

    def shaped(self, *shape: int) -> TensorSpec:
        """Return the specification of another shape."""
        return TensorSpec(shape, self.dtype, self.device)

    def zeros(self) -> torch.Tensor:
        """Return a tensor of zeros."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def or_zeros(self, t: torch.Tensor | None) -> torch.Tensor:
        """Return a tensor, or zeros for None."""
        return self.zeros() if t is None else t

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
    return TensorSpec(tuple(shape), dtype, device)


def differentiable(leaf: Any) -> bool:
    """Whether a pytree leaf has tangents: a floating point or complex tensor."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def describe(x: Any) -> str:
    """Say in a few words what was passed."""
    if isinstance(x, torch.Tensor):
        return f"a tensor {TensorSpec.of(x)}"
    if isinstance(x, (int, float, complex, str, bool)):
        return f"{type(x).__name__} {x!r}"
    if isinstance(x, (list, tuple, dict)):
        return f"a {type(x).__name__} of {len(x)}"
    return f"a {type(x).__name__}"


def differing(given: torch.Tensor, expected: TensorSpec) -> str:
    """Say in what a tensor is not as expected."""
    pairs = (
        ("shape", tuple(given.shape), expected.shape),
        ("dtype", given.dtype, expected.dtype),
        ("device", given.device, expected.device),
        ("layout", given.layout, torch.strided),
    )
    return "; ".join(f"{n}: expected {e}, got {g}" for n, g, e in pairs if g != e)
