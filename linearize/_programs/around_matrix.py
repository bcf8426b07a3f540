"""Programs around one matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .._spaces.space import TensorSpec
from .._torch.names import aten
from .numbers import Numbers
from .program import Emitter, Program
from .values import Var


def reals(spec: TensorSpec) -> int:
    """Return of how many real numbers a tensor consists."""
    return math.prod(spec.shape) * (2 if spec.dtype.is_complex else 1)


def flat_real(t: torch.Tensor) -> torch.Tensor:
    """Return the real numbers of a tensor as a vector."""
    return (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).reshape(-1)


def times(matrix: torch.Tensor) -> Callable[[Emitter, Var], Var]:
    """Return what writes down the product of a matrix with a vector."""

    def emit(e: Emitter, v: Var) -> Var:
        spec = v.spec.shaped(matrix.shape[0])
        return e.emit(aten.mv.default, (e.constant(matrix), v), spec)

    return emit


def matrix_program(
    matrix: TensorSpec,
    multiply: Callable[[Emitter, Var], Var],
    columns: Sequence[TensorSpec],
    all_rows: Sequence[TensorSpec],
    wanted: Sequence[bool],
    name: str,
    numbers: Numbers,
) -> Program:
    """Return the product with a matrix of real numbers, of which `numbers` receive the entries.

    Parameters
    ----------
    multiply
        Writes down its product with a vector.
    columns
        The specifications of the arguments.
    all_rows, wanted
        Those of the results, and which of them the matrix has rows for.
    name
        Whose matrix it is.
    """
    e = Emitter(f"matrix of {name}", numbers)
    device, dtype = matrix.device, matrix.dtype
    inputs = [Var(spec) for spec in columns]
    parts = []
    for v in inputs:
        spec = v.spec
        if spec.dtype.is_complex:
            v = e.emit(aten.resolve_conj.default, (v,), spec)
            spec = TensorSpec((*spec.shape, 2), spec.dtype.to_real(), spec.device)
            v = e.emit(aten.view_as_real.default, (v,), spec)
        v = e.shaped(v, spec.numel)
        parts.append(e.cast(v, TensorSpec(v.spec.shape, dtype, device)))
    joined = TensorSpec((matrix.shape[1],), dtype, device)
    vector = parts[0] if len(parts) == 1 else e.emit(aten.cat.default, (parts,), joined)
    vector = multiply(e, vector)
    outputs: list[Var | None] = []
    start = 0
    for spec, want in zip(all_rows, wanted, strict=True):
        if not want:
            outputs.append(None)
            continue
        end = start + reals(spec)
        part = TensorSpec((end - start,), dtype, device)
        whole = end - start == matrix.shape[0]
        v = vector if whole else e.emit(aten.slice.Tensor, (vector, 0, start, end), part)
        real = spec.dtype.to_real()
        shape = (*spec.shape, 2) if spec.dtype.is_complex else spec.shape
        v = e.cast(e.shaped(v, *shape), TensorSpec(shape, real, spec.device))
        if spec.dtype.is_complex:
            # Pairs must lie side by side, in a batched run too.
            v = e.emit(aten.view_as_complex.default, (e.dense(v),), spec)
        outputs.append(v)
        start = end
    return Program(inputs, e.equations, outputs, list(all_rows), e.source)
