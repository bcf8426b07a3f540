"""Operators beside, below and across each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from ..errors import SpaceError, StructureError
from .between import fewest
from .flat import Parts
from .maps import Apply, ChunkSize
from .operators import LinearOperator, SelfAdjoint
from .space import Space


def vertical(*operators: LinearOperator) -> LinearOperator:
    """Return operators below each other: x to the tuple of all images of x.

    Parameters
    ----------
    *operators
        All of one `in_space`.

    Returns
    -------
    LinearOperator
        Its `out_space` is the tuple of theirs; as a matrix, theirs below each other.

    Raises
    ------
    StructureError, SpaceError
        If there is none, or their spaces differ.
    """
    ours = _common(operators, "vertical", "in_space")
    theirs = Space.joined([A.out_space for A in operators])
    forward, back = _spread(operators, adjoint=False), _gathered(operators, adjoint=True)
    return LinearOperator(ours, theirs, forward, back, at_once=fewest(*operators), name="vertical")


def horizontal(*operators: LinearOperator) -> LinearOperator:
    """Return operators beside each other: a tuple of elements to the sum of their images.

    Parameters
    ----------
    *operators
        All of one `out_space`.

    Returns
    -------
    LinearOperator
        Its `in_space` is the tuple of theirs; as a matrix, theirs beside each other.

    Raises
    ------
    StructureError, SpaceError
        If there is none, or their spaces differ.
    """
    theirs = _common(operators, "horizontal", "out_space")
    ours = Space.joined([A.in_space for A in operators])
    forward, back = _gathered(operators, adjoint=False), _spread(operators, adjoint=True)
    return LinearOperator(
        ours, theirs, forward, back, at_once=fewest(*operators), name="horizontal"
    )


def block_diagonal(*operators: LinearOperator) -> LinearOperator:
    """Return operators side by side on a diagonal: a tuple of elements to that of their images.

    Parameters
    ----------
    *operators
        Any.

    Returns
    -------
    LinearOperator
        Between the tuples of their spaces; a `SelfAdjoint` if all of them are.

    Raises
    ------
    StructureError
        If there is none.
    """
    check_operators(operators, "block_diagonal")
    ours = Space.joined([A.in_space for A in operators])
    theirs = Space.joined([A.out_space for A in operators])

    def diagonal(chunk_size: ChunkSize) -> torch.Tensor:
        return torch.cat([A.diagonal(chunk_size=chunk_size) for A in operators])

    known = diagonal if all(A.shape[0] == A.shape[1] for A in operators) else None
    at_once, name = fewest(*operators), "block_diagonal"
    forward, back = _each(operators, adjoint=False), _each(operators, adjoint=True)
    if all(isinstance(A, SelfAdjoint) for A in operators):
        return SelfAdjoint(ours, forward, at_once=at_once, diagonal=known, name=name)
    return LinearOperator(ours, theirs, forward, back, at_once=at_once, diagonal=known, name=name)


def check_operators(operators: Sequence[Any], what: str) -> None:
    """Raise if some of these are no operators, or there is none.

    Parameters
    ----------
    operators
        What was given.
    what
        To what, in the error.

    Raises
    ------
    StructureError
        If so; the message names the type.
    """
    if not operators:
        raise StructureError(f"{what}: expected at least one operator, got none")
    for A in operators:
        if not isinstance(A, LinearOperator):
            raise StructureError(
                f"{what}: expected operators, the jacobian of a linearization for instance, got "
                f"{type(A).__name__}"
            )


def _spread(operators: Sequence[LinearOperator], *, adjoint: bool) -> Apply:
    """Return the map of an element to all of its images."""

    def apply(parts: Parts, *, stacked: bool) -> Parts:
        images = []
        for A in operators:
            images += (A._apply_adjoint if adjoint else A._apply)(parts, stacked=stacked)
        return images

    return apply


def _each(operators: Sequence[LinearOperator], *, adjoint: bool) -> Apply:
    """Return the map of several elements to one image of each."""

    def apply(parts: Parts, *, stacked: bool) -> Parts:
        return list(chain.from_iterable(_images(operators, parts, adjoint, stacked)))

    return apply


def _gathered(operators: Sequence[LinearOperator], *, adjoint: bool) -> Apply:
    """Return the map of several elements to the sum of their images."""

    def apply(parts: Parts, *, stacked: bool) -> Parts:
        images = _images(operators, parts, adjoint, stacked)
        total = next(images)
        for more in images:
            total = [a + b for a, b in zip(total, more, strict=True)]
        return total

    return apply


def _images(
    operators: Sequence[LinearOperator], parts: Parts, adjoint: bool, stacked: bool
) -> Iterator[Parts]:
    """Yield what each operator makes of its own part of some elements."""
    rest = parts
    for A in operators:
        count = len((A.out_space if adjoint else A.in_space).tensors)
        yield (A._apply_adjoint if adjoint else A._apply)(rest[:count], stacked=stacked)
        rest = rest[count:]


def _common(operators: Sequence[LinearOperator], what: str, side: str) -> Space:
    """Return the space that all have on one side."""
    check_operators(operators, what)
    first: Space = getattr(operators[0], side)
    for A in operators[1:]:
        space: Space = getattr(A, side)
        if space.tensors != first.tensors:
            raise SpaceError(f"{what}: each {side} must be the same, got {first!r} and {space!r}")
    return first
