"""How matrix products, solves and convolutions take stacks of arguments."""

from __future__ import annotations

from typing import Any

import torch

from .._programs.program import Equation
from .._programs.values import Constant, Var
from .._spaces.space import TensorSpec
from .._torch.names import aten
from .stacking import Vectorizer, rule

#: From how many columns on a product with a matrix is taken entry by entry, by one kernel. Fewer
#: columns are taken together, which takes two copies; where all is small the copies decide.
_WIDE, _SMALL = 16, 1 << 12
#: Batches of matrices of which a product takes fewer multiplications PyTorch multiplies by plain
#: loops on a CPU: up to so many columns one pointwise operation for each is quicker.
_SIMPLE, _THIN = 400, 4


def _matrix_product(s: Vectorizer, a: Any, b: Any) -> Var:
    k = s.count
    if isinstance(a, Var):
        n, inner = a.spec.shape
        m = b.spec.shape[1]
        if s.names[a] in s.turned and not _is_sparse(s, b):  # to copy it would cost more
            return s.emit(aten.bmm.default, (s.names[a], s.repeated(b)), (k, n, m))
        tall = s.reshape(s.names[a], k * n, inner)
        return s.reshape(s.emit(aten.mm.default, (tall, b), (k * n, m)), k, n, m)
    n, inner = a.spec.shape
    m = b.spec.shape[1]
    v = s.names[b]
    if _is_wide(s, a, b):
        return s.emit(aten.bmm.default, (s.repeated(a), v), (k, n, m))
    # (A B)ᵀ = Bᵀ Aᵀ, with all the columns of B as rows.
    rows = v if m == 1 else s.permute(v, 0, 2, 1)
    tall = s.reshape(rows, k * m, inner)
    product = s.emit(aten.mm.default, (tall, s.numbers.viewed(aten.t.default, a)), (k * m, n))
    stacked = s.reshape(product, k, m, n)
    return s.reshape(stacked, k, n, m) if m == 1 else s.permute(stacked, 0, 2, 1)


def _is_wide(s: Vectorizer, a: Constant, b: Var) -> bool:
    n, inner = a.spec.shape
    m = b.spec.shape[1]
    return not _is_sparse(s, a) and (m >= _WIDE or (m > 1 and n * inner * m < _SMALL))


def _is_sparse(s: Vectorizer, c: Constant) -> bool:
    return s.numbers[c].layout is not torch.strided


@rule(aten.mv.default)
def _mv(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    a, b = eq.args
    if isinstance(a, Var):
        return s.emit(aten.matmul.default, (s.names[a], b), (s.count, *out.shape))
    return s.emit(
        aten.mm.default, (s.names[b], s.numbers.viewed(aten.t.default, a)), (s.count, *out.shape)
    )


def _batch_product(s: Vectorizer, a: Any, b: Any) -> Var:
    k = s.count
    if isinstance(a, Var):
        count, n, inner = a.spec.shape
        m = b.spec.shape[2]
        v = s.permute(s.names[a], 1, 0, 2, 3)
        tall = s.reshape(v, count, k * n, inner)
        product = s.emit(aten.bmm.default, (tall, b), (count, k * n, m))
        return s.permute(s.reshape(product, count, k, n, m), 1, 0, 2, 3)
    count, n, inner = a.spec.shape
    m = b.spec.shape[2]
    v = s.permute(s.names[b], 1, 2, 0, 3)
    wide = s.reshape(v, count, inner, k * m)
    if 0 < inner <= _THIN and n * inner * k * m < _SIMPLE and a.spec.device.type == "cpu":
        product = _sum_of_columns(s, a, wide)
    else:
        product = s.emit(aten.bmm.default, (a, wide), (count, n, k * m))
    return s.permute(s.reshape(product, count, n, k, m), 2, 0, 1, 3)


def _sum_of_columns(s: Vectorizer, a: Constant, b: Var) -> Var:
    """Multiply batches of matrices, column by row."""
    (count, n, inner), m = a.spec.shape, b.spec.shape[2]
    total: Var | None = None
    for i in range(inner):
        column = s.numbers.viewed(aten.slice.Tensor, a, 2, i, i + 1)
        row = s.emit(aten.slice.Tensor, (b, 1, i, i + 1), (count, 1, m))
        shape = (count, n, m)
        if total is None:
            total = s.emit(aten.mul.Tensor, (row, column), shape)
        else:
            total = s.emit(aten.addcmul.default, (total, row, column), shape)
    assert total is not None
    return total


@rule(aten.mm.default, aten.bmm.default)
def _product(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    make = _matrix_product if eq.op is aten.mm.default else _batch_product
    return make(s, *eq.args)


@rule(aten.addmm.default, aten.baddbmm.default)
def _added_product(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    x, a, b = eq.args
    if not isinstance(x, Var) or isinstance(a, Var) == isinstance(b, Var):
        return None
    alpha, beta = eq.kwargs.get("alpha", 1), eq.kwargs.get("beta", 1)
    shape = (s.count, *out.shape)
    v = s.raised(s.names[x], len(out.shape))
    plain = eq.op is aten.addmm.default and v.spec.shape == shape
    if plain and isinstance(a, Var):
        rows, inner = s.count * out.shape[0], a.spec.shape[1]
        tall = s.reshape(s.names[a], rows, inner)
        flat = s.reshape(v, rows, out.shape[1])
        done = s.emit(eq.op, (flat, tall, b), flat.spec.shape, **eq.kwargs)
        return s.reshape(done, *shape)
    if plain and isinstance(a, Constant) and _is_wide(s, a, b):
        args = (v, s.repeated(a), s.names[b])
        return s.emit(aten.baddbmm.default, args, shape, **eq.kwargs)
    make = _matrix_product if eq.op is aten.addmm.default else _batch_product
    product = make(s, a, b)
    if beta != 1:
        v = s.emit(aten.mul.Scalar, (v, beta), v.spec.shape)
    kwargs = {} if alpha == 1 else {"alpha": alpha}
    return s.emit(aten.add.Tensor, (v, product), shape, **kwargs)


@rule(aten.linalg_lu_solve.default)
def _lu_solve(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    lu, pivots, b = eq.args
    if not (isinstance(b, Var) and isinstance(lu, Constant) and isinstance(pivots, Constant)):
        return None
    if len(lu.spec.shape) != 2 or len(out.shape) != 2 or not eq.kwargs.get("left", True):
        return None
    n, m = out.shape
    wide = s.reshape(s.permute(s.names[b], 1, 0, 2), n, s.count * m)
    args = (lu, pivots, wide)
    solved = s.emit(eq.op, args, wide.spec.shape, **eq.kwargs)
    return s.permute(s.reshape(solved, n, s.count, m), 1, 0, 2)


@rule(aten.convolution.default)
def _convolution(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    x, w, bias, *rest = eq.args
    if not isinstance(x, Var) or not isinstance(w, Constant) or bias is not None:
        return None
    many = s.reshape(s.names[x], s.count * x.spec.shape[0], *x.spec.shape[1:])
    shape = (s.count * out.shape[0], *out.shape[1:])
    done = s.emit(eq.op, (many, w, None, *rest), shape)
    return s.reshape(done, s.count, *out.shape)


@rule(aten.convolution_backward.default)
def _convolution_backward(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    """Take the entries of a stack as further samples, where the input's gradient is wanted."""
    g, x, w, biases, *rest, mask = eq.args
    wanted = isinstance(g, Var) and isinstance(x, Constant) and isinstance(w, Constant)
    if not wanted or list(mask) != [True, False, False]:
        return None
    many = s.reshape(s.names[g], s.count * g.spec.shape[0], *g.spec.shape[1:])
    spec = TensorSpec((s.count * out.shape[0], *out.shape[1:]), out.dtype, out.device)
    # Of the input nothing but the shape is read.
    like: dict[str, Any] = {"source": x.source, "dtype": out.dtype, "device": out.device}
    shape = s.numbers.evaluated(aten.full.default, [1] * len(spec.shape), 0, **like)
    shape = s.numbers.evaluated(aten.expand.default, shape, list(spec.shape), source=x.source)
    result = Var(spec)
    args = (many, shape, w, biases, *rest, mask)
    s.e.equations.append(Equation(eq.op, args, {}, (result, None, None), eq.source))
    return s.reshape(result, s.count, *out.shape)
