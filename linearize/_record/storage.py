"""Tensors that share memory, as pieces of one flat value.

A complex tensor and a real view of it lie on the same memory: there the flat value is real,
with two numbers for each complex one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from .._programs.program import Emitter
from .._programs.values import Constant, Var, zeros
from .._spaces.space import TensorSpec
from .._torch.names import aten

Geometry: TypeAlias = tuple[list[int], list[int], int]


def common_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype | None:
    """Return the dtype of a flat value that holds all the tensors, None if none does."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) == 1:
        return dtypes.pop()
    if not all(d.is_floating_point or d.is_complex for d in dtypes):
        return None
    real = {d.to_real() for d in dtypes}
    return real.pop() if len(real) == 1 else None


def geometry(t: torch.Tensor, itemsize: int = 0) -> Geometry:
    """Return size, stride and offset in elements, or in smaller items.

    There is one more dimension if an element has several items.
    """
    size, stride, offset = list(t.shape), list(t.stride()), int(t.storage_offset())
    count = t.element_size() // (itemsize or t.element_size())
    if count == 1:
        return size, stride, offset
    return [*size, count], [*(count * s for s in stride), 1], count * offset


def covers_storage(t: torch.Tensor) -> bool:
    """Whether a tensor is its whole storage, in order."""
    return t.is_contiguous() and t.nbytes == t.untyped_storage().nbytes()


def covered(t: torch.Tensor, others: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return, for each other tensor, which of its elements share memory with `t`.

    Elements that are complex count as two if `t` is real.
    """
    item = min(x.element_size() for x in (t, *others))
    count = t.untyped_storage().nbytes() // item
    touched = torch.zeros(count, dtype=torch.bool, device=t.device)
    touched.as_strided(*geometry(t, item)).fill_(True)
    return [touched.as_strided(*geometry(x, item)) for x in others]


def memory_order(t: torch.Tensor) -> list[int] | None:
    """Return the order of dimensions in which a tensor would be contiguous, None if in none."""
    strides = t.stride()
    order = sorted(range(t.dim()), key=strides.__getitem__, reverse=True)
    return order if t.permute(order).is_contiguous() else None


def flat_spec(t: torch.Tensor, dtype: torch.dtype) -> TensorSpec:
    """Return the specification of the whole storage under `t` as a flat value."""
    return TensorSpec((t.untyped_storage().nbytes() // dtype.itemsize,), dtype, t.device)


def stored(
    e: Emitter, value: Var | Constant, t: torch.Tensor, dtype: torch.dtype
) -> Var | Constant:
    """Emit what lies in memory where `t` has a value: no lazy bits, real pairs if need be.

    A constant is zero.
    """
    spec = TensorSpec.of(t)
    paired = dtype != spec.dtype
    pairs = TensorSpec((*spec.shape, 2), dtype, spec.device) if paired else spec
    if isinstance(value, Constant):
        return zeros(pairs)
    value = _lazily(e, value, t)
    if paired:
        value = e.emit(aten.resolve_conj.default, (value,), spec)
        value = e.dense(value)
        value = e.emit(aten.view_as_real.default, (value,), pairs)
    return value


def shown(e: Emitter, flat: Var | Constant, t: torch.Tensor) -> Var:
    """Emit the value of `t` that lies in a flat value."""
    spec, dtype = TensorSpec.of(t), flat.spec.dtype
    where = geometry(t, dtype.itemsize)
    pairs = TensorSpec(tuple(where[0]), dtype, spec.device)
    value = e.emit(aten.as_strided.default, (flat, *where), pairs)
    if dtype != spec.dtype:
        value = e.emit(aten.view_as_complex.default, (e.dense(value),), spec)
    return _lazily(e, value, t)


def scattered(e: Emitter, flat: Var | Constant, value: Var | Constant, t: torch.Tensor) -> Var:
    """Emit a flat value with the value of `t` written into it."""
    dtype = flat.spec.dtype
    piece = stored(e, value, t, dtype)
    args = (flat, piece, *geometry(t, dtype.itemsize))
    return e.emit(aten.as_strided_scatter.default, args, flat_spec(t, dtype))


def flattened(e: Emitter, value: Var, t: torch.Tensor, dtype: torch.dtype) -> Var:
    """Emit the flat value of a contiguous `t` that covers its storage."""
    whole = stored(e, value, t, dtype)
    assert isinstance(whole, Var)
    spec = flat_spec(t, dtype)
    # Contiguous, because the strides at a later run may be others.
    return e.emit(aten.view.default, (e.dense(whole), list(spec.shape)), spec)


def _lazily(e: Emitter, value: Var, t: torch.Tensor) -> Var:
    """Emit what turns a value of `t` into what lies in memory, or back."""
    if t.is_conj():
        value = e.emit(aten.conj_physical.default, (value,), value.spec)
    if t.is_neg():
        value = e.emit(aten.neg.default, (value,), value.spec)
    return value
