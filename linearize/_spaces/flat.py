"""Elements of a space as flat vectors, one or many at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch

from .._text.progress import progress
from ..errors import SpaceError, StructureError
from .space import Space

#: The tensors of an element of a space, one per differentiable leaf.
Parts: TypeAlias = list[torch.Tensor]


def check_flat(space: Space, flat: torch.Tensor, what: str) -> None:
    """Raise `SpaceError` if a tensor has not the dtype and device of the space's vectors."""
    spec = space.vector
    if flat.dtype != spec.dtype or flat.device != spec.device:
        raise SpaceError(
            f"{what}: expected dtype {spec.dtype} on {spec.device}, got {flat.dtype} on "
            f"{flat.device}; convert it, nothing is cast silently"
        )


def refuse_array(x: Any) -> None:
    """Raise for arrays of NumPy, which would be taken for something else."""
    if type(x).__module__ == "numpy":
        raise StructureError(
            "an operator takes tensors: pass torch.from_numpy(x), or make it an operator of "
            "NumPy arrays, A.to_scipy()"
        )


def is_flat(space: Space, x: Any, what: str) -> bool:
    """Whether a factor is a vector of a space or a matrix of vectors, and no element."""
    refuse_array(x)
    if not isinstance(x, torch.Tensor) or space.layouts:
        return False
    columns = space.size
    if x.dim() in (1, 2) and x.shape[0] == columns:
        check_flat(space, x, what)
        return True
    single = space.spec.is_leaf()
    element = tuple(space.tensors[0].shape) if single else None
    if tuple(x.shape) == element:
        return False
    also = f", or {element}" if single and element != (columns,) else ""
    raise SpaceError(
        f"{what}: expected a tensor of shape ({columns},) or ({columns}, k){also}, "
        f"got {tuple(x.shape)}"
    )


def zeros(space: Space, stacked: int | None = None) -> Parts:
    """Return the zero of a space, or that many of them, stacked."""
    front = () if stacked is None else (stacked,)
    return [
        torch.zeros(front + leaf.shape, dtype=leaf.dtype, device=leaf.device)
        for leaf in space.tensors
    ]


def random(space: Space, generator: torch.Generator) -> Parts:
    """Return a normally distributed element."""
    return [leaf.random(generator) for leaf in space.tensors]


def units(space: Space, chunk: int, what: str) -> Iterator[tuple[int, Parts]]:
    """Yield the unit vectors of a space in stacks of at most `chunk`, with a progress bar.

    Yields
    ------
    start, parts
        The number of the first unit vector of the stack, and the stack.
    """
    size = space.size
    starts = range(0, size, chunk)
    for start in progress(starts, len(starts), what):
        count = min(chunk, size - start)
        parts = zeros(space, count)
        begin = 0
        for part, leaf in zip(parts, space.tensors, strict=True):
            low, high = max(start, begin), min(start + count, begin + leaf.numel)
            if low < high:
                rows = torch.arange(low - start, high - start, device=leaf.device)
                part.view(count, -1)[rows, rows + (start - begin)] = 1
            begin += leaf.numel
        yield start, parts
