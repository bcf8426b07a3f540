"""Programs for many arguments at once.

`vectorized` turns a program into one whose variables all have a first dimension more, along
which arguments are stacked. Most operations have a rule that says how they take it; any other
is mapped over it by `torch.vmap`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .._programs.aten import permutation
from .._programs.numbers import Numbers
from .._programs.program import Equation, Program
from .._programs.values import Constant, Var
from .._spaces.space import TensorSpec
from .._torch.names import aten
from . import stacked_products as stacked_products  # registers its rules
from .stacking import LARGE, Vectorizer, later, rank, rule


def vectorized(program: Program, numbers: Numbers, count: int) -> Program:
    """Return the program for `count` arguments at once, and let `numbers` have what it reads.

    User code is called for each of them.
    """
    return Vectorizer(program, numbers, count).run()


# -- rules ----------------------------------------------------------------------------------


@rule(
    aten.clone.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
    aten._to_copy.default,
    aten._conj.default,
    aten.view_as_real.default,
    aten.view_as_complex.default,
)
def _as_it_stands(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    if eq.kwargs.get("memory_format") not in (
        None,
        torch.contiguous_format,
        torch.preserve_format,
    ):
        return None
    return s.e.emit(eq.op, (s.names[eq.args[0]], *eq.args[1:]), s.spec(out), **eq.kwargs)


@rule(
    aten.reshape.default,
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
def _reshape(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    return s.reshape(s.names[eq.args[0]], s.count, *out.shape)


@rule(aten.expand.default)
def _expand(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    v = s.raised(s.names[eq.args[0]], len(out.shape))
    return s.e.emit(aten.expand.default, (v, [s.count, *out.shape]), s.spec(out))


@rule(aten.t.default, aten.transpose.int, aten.permute.default)
def _permute(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    dims = permutation(eq.op, eq.args)
    assert dims is not None
    return s.permute(s.names[eq.args[0]], 0, *(d + 1 for d in dims))


@rule(aten.select.int, aten.slice.Tensor)
def _part(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    x, *rest = eq.args
    if eq.kwargs or not rank(x):
        return None
    (dim,) = later(rest[:1] or [0], rank(x))
    return s.e.emit(eq.op, (s.names[x], dim, *rest[1:]), s.spec(out))


@rule(aten.select_backward.default, aten.slice_backward.default)
def _place(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    x, sizes, dim, *rest = eq.args
    args = (s.names[x], [s.count, *sizes], *later([dim], len(sizes)), *rest)
    return s.e.emit(eq.op, args, s.spec(out))


@rule(aten.cat.default, aten.stack.default)
def _join(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    if eq.constants():
        return None
    (dim,) = later([eq.argument(1, 0, "dim")], len(out.shape))
    return s.e.emit(eq.op, ([s.names[v] for v in eq.args[0]], dim), s.spec(out))


@rule(aten.roll.default)
def _roll(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    x = s.names[eq.args[0]]
    shifts, dims = eq.args[1], eq.argument(2, [], "dims")
    if dims:
        return s.e.emit(eq.op, (x, shifts, later(dims, len(out.shape))), s.spec(out))
    flat = s.reshape(x, s.count, math.prod(out.shape))
    rolled = s.emit(eq.op, (flat, shifts, [1]), flat.spec.shape)
    return s.reshape(rolled, s.count, *out.shape)


@rule(aten.flip.default)
def _flip(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    args = (s.names[eq.args[0]], later(eq.args[1], len(out.shape)))
    return s.e.emit(eq.op, args, s.spec(out))


_BY_DIMENSIONS = {aten.sum.default: aten.sum.dim_IntList, aten.mean.default: aten.mean.dim}


@rule(*_BY_DIMENSIONS, *_BY_DIMENSIONS.values())
def _sum(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    x, dims, *rest = (*eq.args, None) if eq.op in _BY_DIMENSIONS else eq.args
    if not rank(x):
        return None
    args = s.names[x], later(dims or range(rank(x)), rank(x)), *rest
    return s.e.emit(_BY_DIMENSIONS.get(eq.op, eq.op), args, s.spec(out), **eq.kwargs)


@rule(aten.linalg_cross.default)
def _cross(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    (dim,) = later([eq.kwargs.get("dim", -1)], len(out.shape))

    def raised(x: Any) -> Any:
        if isinstance(x, Var):
            return s.names[x]
        return s.numbers.viewed(aten.unsqueeze.default, x, 0)

    return s.e.emit(eq.op, (*map(raised, eq.args),), s.spec(out), dim=dim)


@rule(aten._softmax_backward_data.default)
def _softmax(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    g, r, dim, dtype = eq.args
    if not (isinstance(g, Var) and isinstance(r, Constant)):
        return None
    if not (g.spec == out and dtype == out.dtype and out.shape):
        return None
    shape = (s.count, *out.shape)
    (dim,) = later([dim], len(out.shape))
    products = s.emit(aten.mul.Tensor, (s.names[g], r), shape)
    sums = s.emit(
        aten.sum.dim_IntList,
        (products, [dim], True),
        [1 if i == dim else n for i, n in enumerate(shape)],
    )
    return s.emit(aten.addcmul.default, (products, sums, r), shape, value=-1)


@rule(aten.native_layer_norm_backward.default)
def _layer_norm(s: Vectorizer, eq: Equation, out: TensorSpec) -> Sequence[Var] | None:
    """Take the entries of a stack as further rows."""
    g, x, shape, mean, rstd, weight, bias, _ = eq.args
    numbers = [r for r in (x, mean, rstd, weight, bias) if r is not None]
    if not isinstance(g, Var) or g.spec.numel >= LARGE:
        return None
    if any(not isinstance(r, Constant) or r.spec.dtype != g.spec.dtype for r in numbers):
        return None
    v, (first, *affine) = s.names[g], eq.outputs
    found = []
    if first is not None:
        # The kernel reads statistics as they lie in memory.
        means, scales = (
            s.numbers.evaluated(
                aten.clone.default,
                s.repeated(r),
                source=r.source,
                memory_format=torch.contiguous_format,
            )
            for r in (mean, rstd)
        )
        found.append(Var(s.spec(first.spec)))
        args = (v, s.repeated(x), shape, means, scales, weight, bias, [True, False, False])
        s.e.equations.append(Equation(eq.op, args, {}, (found[0], None, None), eq.source))
    if affine[0] is not None:
        centred = s.numbers.evaluated(aten.sub.Tensor, x, mean, source=x.source)
        normal = s.numbers.evaluated(aten.mul.Tensor, centred, rstd, source=x.source)
        product = s.emit(aten.mul.Tensor, (v, normal), v.spec.shape)
        found.append(s.summed(product, len(shape)))
    if affine[1] is not None:
        found.append(s.summed(v, len(shape)))
    return found


@rule(aten.index.Tensor)
def _index(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    x, where = eq.args
    given = [i for i, w in enumerate(where) if w is not None]
    if not isinstance(x, Var) or given != list(range(given[0], given[0] + len(given))):
        return None  # apart from each other, positions put their dimensions first
    if any(not isinstance(w, Constant) for w in where if w is not None):
        return None
    return s.e.emit(eq.op, (s.names[x], [None, *where]), s.spec(out))


@rule(aten.index_put.default)
def _index_put(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    to, where, x, *rest = eq.args
    if not (isinstance(to, Constant) and isinstance(x, Var) and len(where) == 1):
        return None
    (w,) = where
    if not isinstance(w, Constant) or w.spec.dtype == torch.bool or len(w.spec.shape) != 1:
        return None
    if not out.shape or x.spec.shape != (w.spec.shape[0], *out.shape[1:]):
        return None
    shape = (out.shape[0], s.count, *out.shape[1:])
    wide = s.numbers.viewed(
        aten.expand.default, s.numbers.viewed(aten.unsqueeze.default, to, 1), list(shape)
    )
    first = s.permute(s.names[x], 1, 0, *range(2, rank(x) + 1))
    # In the order of memory it is quicker, even with the copy.
    first = s.emit(
        aten.clone.default, (first,), first.spec.shape, memory_format=torch.contiguous_format
    )
    put = s.e.emit(eq.op, (wide, where, first, *rest), TensorSpec(shape, out.dtype, out.device))
    return s.permute(put, 1, 0, *range(2, len(shape)))


@rule(aten.index_add.default)
def _index_add(s: Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    to, dim, where, x = eq.args
    if not (isinstance(to, Constant) and isinstance(x, Var) and out.shape):
        return None
    wide = s.numbers.viewed(aten.expand.default, to, [s.count, *out.shape])
    args = (wide, *later([dim], len(out.shape)), where, s.names[x])
    return s.e.emit(eq.op, args, s.spec(out), **eq.kwargs)
