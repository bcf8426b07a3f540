"""Transpose rules of single operations.

A rule receives an equation y = A x and the cotangents of y, emits the equations of Aᵀ, and
returns the cotangents of the equation's variables. "Transpose" is with respect to the real
inner product Re⟨a, b⟩, which is PyTorch's convention for gradients: the transpose of a
multiplication by c is a multiplication by conj(c).

Operations without a rule are transposed by PyTorch's own derivative of that one operation
(see `transpose`); a rule saves that work, or stands where PyTorch has no derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from .._programs.aten import schema_of, wants_contiguous
from .._programs.broadcast import summed
from .._programs.program import Emitter, Equation, Operation
from .._programs.values import Constant, Var, zeros
from .._spaces.space import TensorSpec
from .._torch.names import OpOverload, aten

Cotangents: TypeAlias = Sequence[Var | None]
Result: TypeAlias = Iterable[tuple[Var, Var]]
Rule: TypeAlias = Callable[[Emitter, Equation, Cotangents], Result | None]
#: Of an operation with one result, whose cotangent it receives.
SingleRule: TypeAlias = Callable[[Emitter, Equation, Var], Result | None]

#: By ATen overload, or by class of `Operation`, subclasses included.
_RULES: dict[Any, Rule] = {}


def rule_for(op: Any) -> Rule | None:
    """Return the transpose rule of an operation, None if it has none of its own."""
    if isinstance(op, Operation):
        return next((_RULES[kind] for kind in type(op).__mro__ if kind in _RULES), None)
    if not isinstance(op, OpOverload):
        return None
    own = _RULES.get(op)
    return _diagonal if own is None and schema_of(op).by_entry else own


def fit(e: Emitter, ct: Var, spec: TensorSpec) -> Var:
    """Emit the transpose of a broadcast and of a cast, from `ct` to `spec`."""
    to = spec.shape
    ct = summed(e, ct, to)
    if ct.spec.dtype.is_complex and not spec.dtype.is_complex:
        pairs = TensorSpec((*to, 2), ct.spec.dtype.to_real(), ct.spec.device)
        ct = e.emit(aten.resolve_conj.default, (ct,), ct.spec)  # view_as_real wants it plain
        ct = e.emit(aten.view_as_real.default, (ct,), pairs)
        ct = e.emit(aten.select.int, (ct, -1, 0), pairs.shaped(*to))
    return e.cast(ct, spec)


def as_gradient(e: Emitter, op: Any, ct: Any) -> Any:
    """Emit `ct` laid out as a backward kernel wants its gradient."""
    if isinstance(ct, Var) and isinstance(op, OpOverload) and wants_contiguous(op):
        return e.emit(aten.contiguous.default, (ct,), ct.spec)
    return ct


def _filled(args: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return positional arguments after the first with defaults for those that are absent."""
    return args + defaults[len(args) - 1 :]


def conj(e: Emitter, x: Any) -> Any:
    """Return the conjugate of a constant or number; real ones as they are."""
    if isinstance(x, Constant):
        return e.numbers.viewed(aten._conj.default, x) if x.spec.dtype.is_complex else x
    return x.conjugate() if isinstance(x, complex) else x


def adjoint_matrix(e: Emitter, x: Constant) -> Constant:
    """Return the conjugate transpose of a constant, a view of it."""
    return e.numbers.viewed(aten.mH.default, x)


def rule_of_several(*ops: Any) -> Callable[[Rule], Rule]:
    """Register the rule of operations with several results."""

    def register(fn: Rule) -> Rule:
        _RULES.update(dict.fromkeys(ops, fn))
        return fn

    return register


def rule(*ops: Any) -> Callable[[SingleRule], SingleRule]:
    """Register the rule of operations with one result."""

    def register(fn: SingleRule) -> SingleRule:
        rule_of_several(*ops)(_of_one(fn))
        return fn

    return register


def _of_one(fn: SingleRule) -> Rule:
    def apply(e: Emitter, eq: Equation, cts: Cotangents) -> Result | None:
        (ct,) = cts
        return None if ct is None else fn(e, eq, ct)

    return apply


@_of_one
def _diagonal(e: Emitter, eq: Equation, ct: Var) -> Result | None:
    """Transpose a pointwise operation: a diagonal is its own transpose.

    Only for one real variable argument and a real result: a real-linear map of complex
    numbers is not its own transpose.
    """
    variables = eq.inputs()
    if len(variables) != 1 or eq.args.count(variables[0]) != 1:
        return None
    x = variables[0]
    if x.spec.dtype.is_complex or ct.spec.dtype.is_complex or x.spec.dtype != ct.spec.dtype:
        return None
    args = tuple(ct if a is x else a for a in eq.args)
    return [(x, fit(e, e.emit(eq.op, args, ct.spec, **eq.kwargs), x.spec))]


# -- identities, signs, sums, scalings --------------------------------------------------------


@rule(
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
)
def _identity(e: Emitter, eq: Equation, ct: Var) -> Result:
    return [(eq.args[0], ct)]


@rule(aten._to_copy.default, aten.expand.default)
def _cast(e: Emitter, eq: Equation, ct: Var) -> Result:
    return [(eq.args[0], fit(e, ct, eq.args[0].spec))]


@rule(
    aten.neg.default,
    aten._conj.default,
    aten.conj_physical.default,
    aten._neg_view.default,
    aten.t.default,
    aten.transpose.int,
    aten.flip.default,
)
def _same(e: Emitter, eq: Equation, ct: Var) -> Result:
    """Apply the operation with the same static arguments to the cotangent."""
    x, *rest = eq.args
    out = e.emit(eq.op, (ct, *rest), ct.spec.shaped(*x.spec.shape), **eq.kwargs)
    return [(x, fit(e, out, x.spec))]


@rule(aten.add.Tensor, aten.sub.Tensor)
def _add(e: Emitter, eq: Equation, ct: Var) -> Result:
    alpha = eq.kwargs.get("alpha", 1)
    for i, x in enumerate(eq.args[:2]):
        if not isinstance(x, Var):
            continue
        term = ct
        if i == 1 and alpha != 1:
            term = e.emit(aten.mul.Tensor, (term, conj(e, alpha)), term.spec)
        if i == 1 and eq.op is aten.sub.Tensor:
            term = e.emit(aten.neg.default, (term,), term.spec)
        yield x, fit(e, term, x.spec)


@rule(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
def _scale(e: Emitter, eq: Equation, ct: Var) -> Result | None:
    a, b = eq.args
    if isinstance(a, Var) and isinstance(b, Var):
        return None
    x, c = (a, b) if isinstance(a, Var) else (b, a)
    out = e.emit(eq.op, (ct, conj(e, c)), ct.spec)
    return [(x, fit(e, out, x.spec))]


@rule(aten.where.self)
def _where(e: Emitter, eq: Equation, ct: Var) -> Result | None:
    condition, a, b = eq.args
    results = []
    zero = zeros(ct.spec.shaped())
    for i, x in enumerate((a, b)):
        if isinstance(x, Var):
            picked = (condition, ct, zero) if i == 0 else (condition, zero, ct)
            results.append((x, fit(e, e.emit(aten.where.self, picked, ct.spec), x.spec)))
    return results


# -- views and moves --------------------------------------------------------------------------


@rule(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten._reshape_alias.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
def _reshape(e: Emitter, eq: Equation, ct: Var) -> Result:
    x = eq.args[0]
    return [(x, e.shaped(ct, *x.spec.shape))]


@rule(aten.permute.default)
def _permute(e: Emitter, eq: Equation, ct: Var) -> Result:
    x, dims = eq.args
    rank = len(dims)
    inverse = sorted(range(rank), key=lambda i: dims[i] % rank)
    return [(x, e.emit(aten.permute.default, (ct, inverse), x.spec))]


@rule(aten.slice.Tensor)
def _slice(e: Emitter, eq: Equation, ct: Var) -> Result:
    x, dim, start, end, step = _filled(eq.args, (0, None, None, 1))
    size = x.spec.shape[dim]
    start, end, _ = slice(start, end).indices(size)
    args = (ct, list(x.spec.shape), dim, start, max(start, end), step)
    return [(x, e.emit(aten.slice_backward.default, args, x.spec))]


@rule(aten.select.int)
def _select(e: Emitter, eq: Equation, ct: Var) -> Result:
    x, dim, index = eq.args
    args = (ct, list(x.spec.shape), dim, index)
    return [(x, e.emit(aten.select_backward.default, args, x.spec))]


#: What reads the part that an operation writes.
_PART = {
    aten.slice_backward.default: aten.slice.Tensor,
    aten.select_backward.default: aten.select.int,
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.select_scatter.default: aten.select.int,
    aten.diagonal_scatter.default: aten.diagonal.default,
}


@rule(aten.slice_backward.default, aten.select_backward.default)
def _part_backward(e: Emitter, eq: Equation, ct: Var) -> Result:
    x, _, *part = eq.args
    return [(x, e.emit(_PART[eq.op], (ct, *part), x.spec))]


@rule(aten.view_as_real.default)
def _view_as_real(e: Emitter, eq: Equation, ct: Var) -> Result:
    x = eq.args[0]
    return [(x, e.emit(aten.view_as_complex.default, (e.dense(ct),), x.spec))]


@rule(aten.cat.default)
def _cat(e: Emitter, eq: Equation, ct: Var) -> Result | None:
    tensors = eq.args[0]
    dim = eq.argument(1, 0)
    shapes = [x.spec.shape for x in tensors]
    if any(shape == (0,) and len(s) != 1 for shape in shapes for s in shapes):
        return None  # the old convention that an empty vector joins anything
    results, start = [], 0
    for x, shape in zip(tensors, shapes, strict=True):
        end = start + shape[dim]
        if isinstance(x, Var):
            part = e.emit(aten.slice.Tensor, (ct, dim, start, end), ct.spec.shaped(*shape))
            results.append((x, fit(e, part, x.spec)))
        start = end
    return results


@rule(aten.roll.default)
def _roll(e: Emitter, eq: Equation, ct: Var) -> Result:
    x, shifts, *dims = eq.args
    back = [-s for s in shifts]
    return [(x, e.emit(aten.roll.default, (ct, back, *dims), x.spec))]


@rule(aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default)
def _part_scatter(e: Emitter, eq: Equation, ct: Var) -> Result:
    x, src, *part = eq.args
    if isinstance(x, Var):
        yield x, e.emit(eq.op, (ct, zeros(src.spec), *part), x.spec)
    if isinstance(src, Var):
        read = e.emit(_PART[eq.op], (ct, *part), ct.spec.shaped(*src.spec.shape))
        yield src, fit(e, read, src.spec)


@rule(aten.as_strided.default)
def _as_strided(e: Emitter, eq: Equation, ct: Var) -> Result | None:
    # Only on a flat argument, where size, stride and offset mean the same at every run.
    x, size, stride, offset = _filled(eq.args, (None, None, 0))
    if len(x.spec.shape) != 1 or offset is None or _overlaps(size, stride):
        return None
    args = (zeros(x.spec), ct, size, stride, offset)
    return [(x, e.emit(aten.as_strided_scatter.default, args, x.spec))]


@rule(aten.as_strided_scatter.default)
def _as_strided_scatter(e: Emitter, eq: Equation, ct: Var) -> Result | None:
    # PyTorch's own derivative with respect to the first argument is not its transpose.
    x, src, size, stride, offset = eq.args
    if len(ct.spec.shape) != 1 or _overlaps(size, stride):
        return None
    ct = e.dense(ct)
    results = []
    if isinstance(x, Var):
        hole = zeros(ct.spec.shaped(*size))
        args = (ct, hole, size, stride, offset)
        results.append((x, e.emit(aten.as_strided_scatter.default, args, x.spec)))
    if isinstance(src, Var):
        read = (ct, size, stride, offset)
        results.append((src, e.emit(aten.as_strided.default, read, src.spec)))
    return results


def _overlaps(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether two indices may lead to one place (never wrongly denied)."""
    reach = 0
    for step, count in sorted(zip(stride, size, strict=True)):
        if count > 1:
            if step <= reach:
                return True
            reach += step * (count - 1)
    return False


# -- reductions -------------------------------------------------------------------------------


@rule(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
def _sum(e: Emitter, eq: Equation, ct: Var) -> Result:
    """Give each entry the cotangent of the sum, or mean, that it is part of."""
    x, over, *_ = (*eq.args, None)
    shape = x.spec.shape
    dims = [d % len(shape) for d in over or range(len(shape))]
    ct = e.shaped(ct, *(1 if i in dims else n for i, n in enumerate(shape)))
    out = e.emit(aten.expand.default, (ct, list(shape)), ct.spec.shaped(*shape))
    if eq.op in (aten.mean.default, aten.mean.dim):
        count = math.prod(shape[d] for d in dims)
        out = e.emit(aten.div.Scalar, (out, count), out.spec)
    return [(x, fit(e, out, x.spec))]


# -- matrix products --------------------------------------------------------------------------


@rule(aten.mm.default, aten.bmm.default)
def _mm(e: Emitter, eq: Equation, ct: Var) -> Result | None:
    a, b = eq.args
    if isinstance(a, Var) and isinstance(b, Constant):
        return [(a, e.emit(eq.op, (ct, adjoint_matrix(e, b)), a.spec))]
    if isinstance(b, Var) and isinstance(a, Constant):
        return [(b, e.emit(eq.op, (adjoint_matrix(e, a), ct), b.spec))]
    return None


@rule(aten.mv.default)
def _mv(e: Emitter, eq: Equation, ct: Var) -> Result | None:
    a, x = eq.args
    if isinstance(a, Constant):
        return [(x, e.emit(aten.mv.default, (adjoint_matrix(e, a), ct), x.spec))]
    return None


@rule(aten._softmax_backward_data.default)
def _softmax_backward(e: Emitter, eq: Equation, ct: Var) -> Result | None:
    # diag(p) - p pᵀ is symmetric.
    x, *rest = eq.args
    if ct.spec != x.spec:
        return None
    return [(x, e.emit(eq.op, (ct, *rest), x.spec))]


# -- convolutions -----------------------------------------------------------------------------


@rule_of_several(aten.convolution_backward.default)
def _convolution_backward(e: Emitter, eq: Equation, cts: Cotangents) -> Result | None:
    grad, image, weight, _, *geometry, _ = eq.args
    if not isinstance(grad, Var) or isinstance(image, Var) or isinstance(weight, Var):
        return None
    ct_image, ct_weight, ct_bias = cts
    terms = []
    if ct_image is not None:
        args = (ct_image, conj(e, weight), None, *geometry)
        terms.append(e.emit(aten.convolution.default, args, grad.spec))
    if ct_weight is not None:
        args = (conj(e, image), ct_weight, None, *geometry)
        terms.append(e.emit(aten.convolution.default, args, grad.spec))
    if ct_bias is not None:
        channels = (1, ct_bias.spec.shape[0], *(1,) * (len(grad.spec.shape) - 2))
        channels = channels[: len(grad.spec.shape)]
        bias = e.shaped(ct_bias, *channels)
        terms.append(e.emit(aten.expand.default, (bias, list(grad.spec.shape)), grad.spec))
    return [(grad, t) for t in terms]


@rule(aten.convolution.default)
def _convolution(e: Emitter, eq: Equation, ct: Var) -> Result | None:
    image, weight, bias, *geometry = eq.args
    if bias is not None:
        return None
    if isinstance(image, Var) and isinstance(weight, Constant):
        args = (ct, zeros(image.spec), conj(e, weight), None, *geometry, [True, False, False])
        out, index = image, 0
    elif isinstance(weight, Var) and isinstance(image, Constant):
        args = (ct, conj(e, image), zeros(weight.spec), None, *geometry, [False, True, False])
        out, index = weight, 1
    else:
        return None
    var = Var(out.spec)
    e.add(aten.convolution_backward.default, args, [var if i == index else None for i in range(3)])
    return [(out, var)]
