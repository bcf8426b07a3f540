"""Transposes of the backward kernels of normalisations.

With x̂ the normalised input, y = x̂ w + b, the gradient of the input is M(w u), where
M u = rstd (u - mean(u) - x̂ mean(x̂ u)) with means over a group of entries (Ba, Kiros, Hinton,
arXiv:1607.06450; Ioffe, Szegedy, arXiv:1502.03167). M is symmetric, so that the kernel is
its own transpose, with w applied last. In evaluation mode of a batch norm M is rstd.
"""

from __future__ import annotations

from typing import Any

import torch

from .._programs.program import Emitter, Equation
from .._programs.values import Constant, Var
from .._spaces.space import TensorSpec
from .._torch.names import aten
from .rules import Cotangents, Result, as_gradient, conj, fit, rule_of_several

_FIRST = [True, False, False]


def _symmetric(e: Emitter, eq: Equation, ct: Var, args: tuple[Any, ...], spec: TensorSpec) -> Var:
    """Emit the gradient that the kernel gives of the input, for `ct` in place of its own."""
    out = Var(spec)
    e.add(eq.op, (as_gradient(e, eq.op, ct), *args), (out, None, None))
    return out


def _affine(
    e: Emitter, eq: Equation, cts: Cotangents, normal: Constant | None, shape: list[int]
) -> list[tuple[Var, Var]]:
    """Emit what tangents of weight and bias do to the output; both are seen as `shape`."""
    grad = eq.args[0]
    results = []
    for ct, factor in ((cts[1], normal), (cts[2], None)):
        if ct is None:
            continue
        out, whole = e.shaped(ct, *shape), ct.spec.shaped(*grad.spec.shape)
        if factor is not None:
            out = e.emit(aten.mul.Tensor, (out, factor), whole)
        else:
            out = e.emit(aten.expand.default, (out, list(whole.shape)), whole)
        results.append((grad, fit(e, out, grad.spec)))
    return results


def _computed(e: Emitter, op: Any, *args: Any, **kwargs: Any) -> Constant:
    return e.numbers.evaluated(op, *args, source=e.source, **kwargs)


def _normal(e: Emitter, x: Constant, mean: Constant, rstd: Constant) -> Constant:
    """Return the normalised input."""
    return _computed(e, aten.mul.Tensor, _computed(e, aten.sub.Tensor, x, mean), rstd)


def _plain(*constants: Any) -> bool:
    """Whether nothing but the gradient is a variable, and all is real."""
    return all(
        c is None or (isinstance(c, Constant) and not c.spec.dtype.is_complex) for c in constants
    )


def _mixed(x: Constant, weight: Constant | None) -> bool:
    """Whether the weight is more precise than the input, which the kernel must be told by it."""
    return weight is not None and weight.spec.dtype != x.spec.dtype


@rule_of_several(aten.native_layer_norm_backward.default)
def _layer_norm(e: Emitter, eq: Equation, cts: Cotangents) -> Result | None:
    grad, x, shape, mean, rstd, weight, bias, _ = eq.args
    if not isinstance(grad, Var) or not _plain(x, mean, rstd, weight, bias) or _mixed(x, weight):
        return None
    results = []
    if cts[0] is not None:
        args = (x, shape, mean, rstd, None, None, _FIRST)
        out = _symmetric(e, eq, cts[0], args, grad.spec)
        if weight is not None:
            out = e.emit(aten.mul.Tensor, (out, conj(e, weight)), grad.spec)
        results.append((grad, out))
    normal = None
    if cts[1] is not None:
        normal = _normal(e, x, mean, rstd)
    return [*results, *_affine(e, eq, cts, normal, list(shape))]


@rule_of_several(aten.native_batch_norm_backward.default)
def _batch_norm(e: Emitter, eq: Equation, cts: Cotangents) -> Result | None:
    grad, x, weight, mean, var, save_mean, save_rstd, train, eps, _ = eq.args
    if not isinstance(grad, Var) or not _plain(x, weight, mean, var, save_mean, save_rstd):
        return None
    results = []
    if cts[0] is not None:
        args = (x, weight, mean, var, save_mean, save_rstd, train, eps, _FIRST)
        # The weight is constant over what the means are taken over.
        results.append((grad, _symmetric(e, eq, cts[0], args, grad.spec)))
    shape = [grad.spec.shape[1], *(1,) * (len(grad.spec.shape) - 2)]
    normal = None
    if cts[1] is not None:
        if train:
            centre, scale = save_mean, save_rstd
        else:
            shifted = _computed(e, aten.add.Scalar, var, eps)
            centre, scale = mean, _computed(e, aten.rsqrt.default, shifted)
        columns = (_computed(e, aten.reshape.default, c, shape) for c in (centre, scale))
        normal = _normal(e, x, *columns)
    return [*results, *_affine(e, eq, cts, normal, shape)]


@rule_of_several(aten.native_group_norm_backward.default)
def _group_norm(e: Emitter, eq: Equation, cts: Cotangents) -> Result | None:
    grad, x, mean, rstd, weight, n, c, size, groups, _ = eq.args
    if not isinstance(grad, Var) or not _plain(x, mean, rstd, weight) or c == 0 or n == 0:
        return None
    if _mixed(x, weight):
        return _in_wide(e, eq, cts, weight.spec.dtype)
    shape = [c, *(1,) * (len(grad.spec.shape) - 2)]
    results = []
    if cts[0] is not None:
        args = (x, mean, rstd, None, n, c, size, groups, _FIRST)
        out = _symmetric(e, eq, cts[0], args, grad.spec)
        if weight is not None:
            column = _computed(e, aten.reshape.default, weight, shape)
            out = e.emit(aten.mul.Tensor, (out, column), grad.spec)
        results.append((grad, out))
    normal = None
    if cts[1] is not None:
        by_group = _computed(e, aten.reshape.default, x, [n, groups, -1])
        statistics = (_computed(e, aten.unsqueeze.default, c, -1) for c in (mean, rstd))
        normal = _normal(e, by_group, *statistics)
        normal = _computed(e, aten.reshape.default, normal, list(grad.spec.shape))
    return [*results, *_affine(e, eq, cts, normal, shape)]


def _in_wide(e: Emitter, eq: Equation, cts: Cotangents, dtype: torch.dtype) -> Result:
    """Transpose the kernel in the precision of its weight, between casts."""
    grad, x, *rest = eq.args
    x = _computed(e, aten._to_copy.default, x, dtype=dtype)
    wide = Var(TensorSpec(grad.spec.shape, dtype, grad.spec.device))
    given = [
        None if v is None else e.cast(v, TensorSpec(v.spec.shape, dtype, v.spec.device))
        for v in cts
    ]
    pairs = _group_norm(e, Equation(eq.op, (wide, x, *rest), {}, eq.outputs, eq.source), given)
    return [(grad, fit(e, ct, grad.spec)) for _, ct in pairs or ()]
