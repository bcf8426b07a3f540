"""What a case is, and the few things that all cases need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

Tensors = tuple[torch.Tensor, ...]
Map = Callable[..., Any]
"""Tangents (or cotangents) one by one to a tensor or a tuple of tensors."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """The least linear work, written by hand with all residuals computed beforehand.

    Attributes
    ----------
    jvp, vjp
        `jvp(*tangents)` and `vjp(*cotangents)`.
    """

    jvp: Map
    vjp: Map


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function at a point.

    Attributes
    ----------
    f, primals
        The function and its arguments, all of them differentiated.
    limit
        Makes the least linear work.
    dense
        Makes it with small Jacobians as matrices, where that is still less: another yardstick,
        which no target refers to.
    jax
        Makes the same function and arguments for JAX; None where there is no counterpart.
    functional
        The same function for `torch.func`, where f itself cannot go through it.
    middle
        If given, a linear map on the side of the value: what is timed is
        `vjp(middle(jvp(v)))` of each engine, as in a Gauss-Newton product.
    """

    f: Callable[..., Any]
    primals: Tensors
    limit: Callable[[], Limit]
    dense: Callable[[], Limit] | None = None
    jax: Callable[[], tuple[Callable[..., Any], Sequence[Any]]] | None = None
    functional: Callable[..., Any] | None = None
    middle: Map | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem of one size.

    Attributes
    ----------
    name
        For the tables.
    size
        "small", "medium" or "large".
    make
        The problem, by dtype.
    dtype
        What is timed; the reference is always float64.
    by_blas
        Whether matrix products and convolutions take nearly all the time.
    opaque
        Whether f leaves PyTorch: the reference is then the closed form of the limit, itself
        compared with finite differences.
    kind
        Which family of cases it belongs to, for figures about one family.
    tolerance
        Of the products against float64, relative to the largest entry.
    """

    name: str
    size: str
    make: Callable[[torch.dtype], Problem]
    dtype: torch.dtype = torch.float32
    by_blas: bool = False
    opaque: bool = False
    kind: str = ""
    tolerance: float = 2e-3


def flat(y: Any) -> Tensors:
    """Return outputs as a tuple."""
    return tuple(y) if isinstance(y, (tuple, list)) else (y,)


def single(y: Tensors) -> Any:
    """Return a lone output as it is, several as a tuple."""
    return y[0] if len(y) == 1 else y


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    """Build with a random state of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def frozen(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a module whose parameters are constants."""
    return module.to(dtype).requires_grad_(requires_grad=False)


def randn(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Return the same numbers for every dtype, on the default device."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(*shape, dtype=torch.float64, device="cpu", generator=generator)
    return made.to(torch.get_default_device(), dtype)


def numpy(t: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a NumPy array for JAX to take over."""
    return t.detach().numpy()
