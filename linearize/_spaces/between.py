"""Maps around a map: what goes in and comes out is changed, the map in between stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .flat import Parts, zeros
from .maps import Apply, AtOnce, LinearMap
from .memory import ON_RANKS
from .space import Space


def composed(first: Apply, second: Apply) -> Apply:
    """Return one map after another."""

    def around(parts: Parts, *, stacked: bool) -> Parts:
        return second(first(parts, stacked=stacked), stacked=stacked)

    return around


def turned(at_once: AtOnce) -> AtOnce:
    """Return how many vectors an adjoint takes at once."""
    return lambda adjoint: at_once(not adjoint)


def there_and_back(at_once: AtOnce) -> AtOnce:
    """Return how many vectors a map followed by its adjoint takes at once."""
    return lambda _: min(at_once(False), at_once(True))


def alike(_adjoint: bool) -> int:
    """Return how many vectors a map takes at once on each rank, whatever it has in memory."""
    return ON_RANKS


def fewest(*operators: LinearMap) -> AtOnce:
    """Return how many vectors several maps take at once."""
    return lambda adjoint: min(A._at_once(adjoint) for A in operators)


def added(one: Apply, other: Apply) -> Apply:
    """Return the sum of two maps."""

    def around(parts: Parts, *, stacked: bool) -> Parts:
        a, b = one(parts, stacked=stacked), other(parts, stacked=stacked)
        return [x + y for x, y in zip(a, b, strict=True)]

    return around


def scaled(apply: Apply, factor: Any) -> Apply:
    """Return a multiple of a map."""

    def around(parts: Parts, *, stacked: bool) -> Parts:
        return [factor * t for t in apply(parts, stacked=stacked)]

    return around


def diagonal(entries: Parts) -> Apply:
    """Return a map that multiplies by numbers."""

    def around(parts: Parts, *, stacked: bool) -> Parts:
        return [d * t for d, t in zip(entries, parts, strict=True)]

    return around


def conjugated(apply: Apply) -> Apply:
    """Return a map between conjugates."""

    def around(parts: Parts, *, stacked: bool) -> Parts:
        return [
            t.conj().resolve_conj()
            for t in apply([t.conj().resolve_conj() for t in parts], stacked=stacked)
        ]

    return around


def real(apply: Apply, ours: Space, theirs: Space) -> Apply:
    """Return a map of real and imaginary parts."""

    def around(parts: Parts, *, stacked: bool) -> Parts:
        return as_real(apply(as_complex(parts, ours), stacked=stacked), theirs)

    return around


def as_complex(parts: Sequence[torch.Tensor], space: Space) -> Parts:
    """Return the tensors of a space that real and imaginary parts stand for."""
    return [
        torch.view_as_complex(t.contiguous()) if leaf.dtype.is_complex else t
        for t, leaf in zip(parts, space.tensors, strict=True)
    ]


def as_real(parts: Sequence[torch.Tensor], space: Space) -> Parts:
    """Return real and imaginary parts in the place of a space's complex tensors."""
    return [
        torch.view_as_real(t.resolve_conj()) if leaf.dtype.is_complex else t
        for t, leaf in zip(parts, space.tensors, strict=True)
    ]


def block(apply: Apply, ours: Space, at: Sequence[int], taken: Sequence[int]) -> Apply:
    """Return a map of the tensors of `ours` numbered `at`, the others being zero.

    It gives the results numbered `taken`.
    """

    def around(parts: Parts, *, stacked: bool) -> Parts:
        whole = zeros(ours, len(parts[0]) if stacked else None)
        for i, t in zip(at, parts, strict=True):
            whole[i] = t
        results = apply(whole, stacked=stacked)
        return [results[i] for i in taken]

    return around
