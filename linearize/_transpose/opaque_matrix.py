"""The matrix of one opaque operation, built from unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._programs.around_matrix import flat_real, matrix_program, reals, times
from .._programs.numbers import Numbers
from .._programs.program import Program
from .._spaces.compare import close, roughly
from .._spaces.space import TensorSpec
from .._text.progress import progress
from ..errors import MissingDerivativeError, NotLinearError


def dense_transpose(
    fn: Callable[..., Sequence[torch.Tensor | None]],
    ins: Sequence[TensorSpec],
    outs: Sequence[TensorSpec],
    present: Sequence[bool],
    wanted: Sequence[bool],
    name: str,
    limit: int,
    numbers: Numbers,
) -> Program:
    """Return the transpose of the linear function `fn` as a program around its matrix.

    Complex numbers count as pairs of real ones, so that maps that are only real-linear come out
    right.

    Parameters
    ----------
    fn
        Maps one tensor per `ins` to one per `outs`; called once per scalar of `ins`, and
        once more.
    present
        Which of `outs` are variables of the transpose.
    wanted
        Which of `ins` are results of the transpose.
    name
        Whose matrix it is, for the progress bar and errors.
    limit
        The most bytes that the matrix may take.
    numbers
        Receive the matrix.
    """
    rows = [spec for spec, want in zip(ins, wanted, strict=True) if want]
    columns = [spec for spec, here in zip(outs, present, strict=True) if here]
    dtype = torch.float32
    for spec in (*rows, *columns):
        dtype = torch.promote_types(dtype, spec.dtype.to_real())
    height, width = sum(map(reals, rows)), sum(map(reals, columns))
    size = height * width * dtype.itemsize
    if size > limit:
        raise MissingDerivativeError(
            f"{name}: its matrix of {height} by {width} would take {size:,} bytes, more than the "
            f"limit of {limit:,} (opaque_limit)"
        )
    matrix = torch.empty((height, width), dtype=dtype, device=columns[0].device)
    units = _units(ins, wanted)
    with torch.inference_mode(False), torch.no_grad():
        for row in progress(range(height), height, f"matrix of {name}"):
            results = fn(*next(units))
            known = zip(results, outs, present, strict=True)
            parts = [flat_real(spec.or_zeros(t)).to(matrix) for t, spec, here in known if here]
            matrix[row] = torch.cat(parts)
        _check_sum(matrix, fn, ins, outs, present, wanted, name)
    spec = TensorSpec.of(matrix)
    return matrix_program(spec, times(matrix), columns, list(ins), wanted, name, numbers)


def _check_sum(
    matrix: torch.Tensor,
    fn: Callable[..., Sequence[torch.Tensor | None]],
    ins: Sequence[TensorSpec],
    outs: Sequence[TensorSpec],
    present: Sequence[bool],
    wanted: Sequence[bool],
    name: str,
) -> None:
    """Raise if the function at a random argument is far from what the matrix gives.

    User code may solve equations to a tolerance: only what is far off is told. What clips numbers
    larger than these is taken as the linear map that it is for small ones.
    """
    generator = torch.Generator().manual_seed(1)
    arguments = [
        _of_both_signs(s.random(generator)) if w else s.zeros()
        for s, w in zip(ins, wanted, strict=True)
    ]
    parts = [flat_real(t).to(matrix) for t, w in zip(arguments, wanted, strict=True) if w]
    expected = matrix.mT @ torch.cat(parts)
    results = fn(*(t.clone() for t in arguments))
    start = 0
    for t, spec, here in zip(results, outs, present, strict=True):
        if not here:
            continue
        end = start + reals(spec)
        got = flat_real(spec.or_zeros(t)).to(matrix)
        if not close(got, expected[start:end], roughly):
            raise NotLinearError(
                f"{name} is not linear: its result for a sum is not the sum of its results, so "
                "that no matrix stands for it"
            )
        start = end


def _of_both_signs(t: torch.Tensor) -> torch.Tensor:
    """Return numbers every other of which is negative, the first too: the unit vectors are not."""
    if t.is_complex():
        return -t
    sign = 1 - 2 * ((torch.arange(t.numel(), device=t.device) + 1) % 2)
    return t.abs() * sign.reshape(t.shape)


def _units(ins: Sequence[TensorSpec], wanted: Sequence[bool]) -> Any:
    for k, (spec, want) in enumerate(zip(ins, wanted, strict=True)):
        if not want:
            continue
        for i in range(reals(spec)):
            arguments = [s.zeros() for s in ins]
            flat_real(arguments[k])[i] = 1
            yield arguments
