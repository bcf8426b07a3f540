"""The matrix of one opaque operation, built from unit vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._programs.program import Emitter, Program, Var
from .._programs.residuals import Residual
from .._spaces.space import TensorSpec
from .._text.progress import progress
from .._torch.names import aten
from ..errors import MissingDerivativeError


def reals(spec: TensorSpec) -> int:
    """Return of how many real numbers a tensor consists."""
    return math.prod(spec.shape) * (2 if spec.dtype.is_complex else 1)


def flat_real(t: torch.Tensor) -> torch.Tensor:
    """Return the real numbers of a tensor as a vector."""
    return (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).reshape(-1)


def dense_transpose(
    fn: Callable[..., Sequence[torch.Tensor | None]],
    ins: Sequence[TensorSpec],
    outs: Sequence[TensorSpec],
    present: Sequence[bool],
    wanted: Sequence[bool],
    name: str,
    limit: int,
) -> Program:
    """Return the transpose of the linear function `fn` as a program around its matrix.

    Complex numbers count as pairs of real ones, so that maps that are only real-linear come
    out right.

    Parameters
    ----------
    fn
        Maps one tensor per `ins` to one per `outs`; called once per scalar of `ins`.
    ins, outs
        The specifications of its arguments and results.
    present
        Which of `outs` are variables of the transpose.
    wanted
        Which of `ins` are results of the transpose.
    name
        Whose matrix it is, for the progress bar and errors.
    limit
        The most bytes that the matrix may take.

    Raises
    ------
    MissingDerivativeError
        If the matrix would be larger than `limit`.
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
    device = columns[0].device
    matrix = torch.empty((height, width), dtype=dtype, device=device)
    units = _units(ins, wanted)
    with torch.inference_mode(False), torch.no_grad():
        for row in progress(range(height), height, f"matrix of {name}"):
            results = fn(*next(units))
            parts = [
                torch.zeros(reals(spec), dtype=dtype, device=device)
                if t is None
                else flat_real(t).to(dtype=dtype, device=device)
                for t, spec, here in zip(results, outs, present, strict=True)
                if here
            ]
            matrix[row] = torch.cat(parts)
    spec = TensorSpec.of(matrix)
    return matrix_program(spec, times(matrix), columns, list(ins), wanted, name)


def _units(ins: Sequence[TensorSpec], wanted: Sequence[bool]) -> Any:
    for k, (spec, want) in enumerate(zip(ins, wanted, strict=True)):
        if not want:
            continue
        for i in range(reals(spec)):
            arguments = [s.zeros() for s in ins]
            flat = (
                torch.view_as_real(arguments[k]) if spec.dtype.is_complex else arguments[k]
            ).view(-1)
            flat[i] = 1
            yield arguments


def times(matrix: torch.Tensor) -> Callable[[Emitter, Var], Var]:
    """Return what writes down the product of a matrix with a vector."""

    def emit(e: Emitter, v: Var) -> Var:
        result = TensorSpec((matrix.shape[0],), matrix.dtype, matrix.device)
        return e.emit(aten.mv.default, (Residual(matrix, e.source), v), result)

    return emit


def matrix_program(
    matrix: TensorSpec,
    multiply: Callable[[Emitter, Var], Var],
    columns: Sequence[TensorSpec],
    all_rows: Sequence[TensorSpec],
    wanted: Sequence[bool],
    name: str,
) -> Program:
    """Return the product with a matrix as a program.

    Parameters
    ----------
    matrix
        The specification of the matrix, of real numbers.
    multiply
        Writes down its product with a vector.
    columns
        The specifications of the arguments.
    all_rows, wanted
        Those of the results, and which of them the matrix has rows for.
    name
        Whose matrix it is.
    """
    e = Emitter(f"matrix of {name}")
    device, dtype = matrix.device, matrix.dtype
    inputs = [Var(spec) for spec in columns]
    parts = []
    for v in inputs:
        spec = v.spec
        if spec.dtype.is_complex:
            v = e.emit(aten.resolve_conj.default, (v,), spec)
            spec = TensorSpec((*spec.shape, 2), spec.dtype.to_real(), spec.device)
            v = e.emit(aten.view_as_real.default, (v,), spec)
        flat = TensorSpec((math.prod(spec.shape),), spec.dtype, spec.device)
        v = e.emit(aten.reshape.default, (v, [flat.shape[0]]), flat)
        parts.append(_cast(e, v, TensorSpec(flat.shape, dtype, device)))
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
        v = e.emit(aten.reshape.default, (v, list(shape)), TensorSpec(shape, dtype, device))
        v = _cast(e, v, TensorSpec(shape, real, spec.device))
        if spec.dtype.is_complex:
            # Pairs must lie side by side, in a batched run too.
            v = e.emit(aten.clone.default, (v,), v.spec, memory_format=torch.contiguous_format)
            v = e.emit(aten.view_as_complex.default, (v,), spec)
        outputs.append(v)
        start = end
    return Program(inputs, e.equations, outputs, list(all_rows), e.source)


def _cast(e: Emitter, v: Var, spec: TensorSpec) -> Var:
    if v.spec == spec:
        return v
    return e.emit(aten._to_copy.default, (v,), spec, dtype=spec.dtype, device=spec.device)
