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
from .operators import LinearOperator, SelfAdjoint, operator_between
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
    forward, back = _spread(operators), _gathered(_adjoints(operators))
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
    forward, back = _gathered(operators), _spread(_adjoints(operators))
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

    return operator_between(
        ours,
        theirs,
        _each(operators),
        _each(_adjoints(operators)),
        self_adjoint=all(isinstance(A, SelfAdjoint) for A in operators),
        at_once=fewest(*operators),
        diagonal=diagonal if all(A.shape[0] == A.shape[1] for A in operators) else None,
        name="block_diagonal",
    )


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


def _adjoints(operators: Sequence[LinearOperator]) -> list[LinearOperator]:
    return [A.H for A in operators]


def _spread(operators: Sequence[LinearOperator]) -> Apply:
    """Return the map of an element to all of its images."""

    def apply(parts: Parts, *, stacked: bool) -> Parts:
        return [t for A in operators for t in A._apply(parts, stacked=stacked)]

    return apply


def _each(operators: Sequence[LinearOperator]) -> Apply:
    """Return the map of several elements to one image of each."""

    def apply(parts: Parts, *, stacked: bool) -> Parts:
        return list(chain.from_iterable(_images(operators, parts, stacked)))

    return apply


def _gathered(operators: Sequence[LinearOperator]) -> Apply:
    """Return the map of several elements to the sum of their images."""

    def apply(parts: Parts, *, stacked: bool) -> Parts:
        images = _images(operators, parts, stacked)
        total = next(images)
        for more in images:
            total = [a + b for a, b in zip(total, more, strict=True)]
        return total

    return apply


def _images(operators: Sequence[LinearOperator], parts: Parts, stacked: bool) -> Iterator[Parts]:
    """Yield what each operator makes of its own part of some elements."""
    rest = parts
    for A in operators:
        count = len(A.in_space.tensors)
        yield A._apply(rest[:count], stacked=stacked)
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
