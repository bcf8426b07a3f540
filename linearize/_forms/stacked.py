"""Programs for many arguments at once.

`vectorized` turns a program into one whose variables all have a first dimension more, along
which arguments are stacked. Most operations have a rule that says how they take it; any other
is mapped over it by `torch.vmap`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch

from .._execute.mapped import Slot, apply_to, call_again, entries, stack_results
from .._programs.aten import permutation, schema_of
from .._programs.numbers import Numbers
from .._programs.program import Emitter, Equation, Program
from .._programs.values import Constant, Value, Var
from .._spaces.nested import map_leaves
from .._spaces.space import TensorSpec
from .._torch.names import OpOverload, aten


def vectorized(program: Program, numbers: Numbers, count: int) -> Program | None:
    """Return the program for `count` arguments at once, and let `numbers` have what it reads.

    None if user code is called, which is the caller's to loop over.
    """
    if program.is_opaque():
        return None
    return _Vectorizer(program, numbers, count).run()


class _Vectorizer:
    def __init__(self, program: Program, numbers: Numbers, count: int) -> None:
        self.program = program
        self.count = count
        self.e = Emitter(numbers=numbers)
        self.numbers = numbers
        self.names: dict[Var, Var] = {}
        #: Values that do not lie in memory in order.
        self.turned: set[Var] = set()

    def run(self) -> Program:
        inputs = [Var(self.spec(v.spec)) for v in self.program.inputs]
        self.names = dict(zip(self.program.inputs, inputs, strict=True))
        with torch.no_grad():
            for eq in self.program.equations:
                self.equation(eq)
        outputs = [None if v is None else self.names[v] for v in self.program.outputs]
        specs = [self.spec(s) for s in self.program.specs]
        name = f"{self.count} times {self.program.name}"
        return Program(inputs, self.e.equations, outputs, specs, name).live()

    def equation(self, eq: Equation) -> None:
        self.e.source = eq.source
        rule = _RULES.get(eq.op)
        if eq.op in _NAMING_RULES and _NAMING_RULES[eq.op](self, eq):
            return
        mark = len(self.e.equations)
        wanted = [v for v in eq.outputs if v is not None]
        out = wanted[0] if len(wanted) == 1 else None
        found = None
        if out is not None:
            if rule is not None:
                found = rule(self, eq, out.spec)
            elif (
                len(eq.outputs) == 1
                and isinstance(eq.op, OpOverload)
                and schema_of(eq.op).pointwise
            ):
                found = self.pointwise(eq, out.spec)
        if found is not None and out is not None:
            self.names[out] = found
            return
        del self.e.equations[mark:]
        self.mapped(eq)

    # -- what rules are made of -------------------------------------------------------------

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """Return the spec of a stack."""
        return TensorSpec((self.count, *spec.shape), spec.dtype, spec.device)

    def emit(self, op: Any, args: tuple[Any, ...], shape: Sequence[int], **kwargs: Any) -> Var:
        """Emit an operation whose result has the dtype and device of its first variable."""
        like = next(a for a in args if isinstance(a, Var)).spec
        return self.e.emit(op, args, TensorSpec(tuple(shape), like.dtype, like.device), **kwargs)

    def reshape(self, v: Var, *shape: int) -> Var:
        if v.spec.shape == shape:
            return v
        return self.emit(aten.reshape.default, (v, list(shape)), shape)

    def permute(self, v: Var, *dims: int) -> Var:
        shape = [v.spec.shape[d] for d in dims]
        out = self.emit(aten.permute.default, (v, list(dims)), shape)
        if dims != tuple(range(len(dims))):
            self.turned.add(out)
        return out

    def raised(self, v: Var, rank: int) -> Var:
        """Return a stack of values seen as values of a higher rank, as broadcasting does."""
        shape = v.spec.shape[1:]
        return self.reshape(v, self.count, *(1,) * (rank - len(shape)), *shape)

    def pointwise(self, eq: Equation, out: TensorSpec) -> Var | None:
        """Apply a pointwise operation as it stands, its operands aligned."""
        rank = len(out.shape)
        if any(len(c.spec.shape) > rank for c in eq.constants()):
            return None
        # A tensor without dimensions is a number to type promotion, a stack of them is not.
        if any(not v.spec.shape and v.spec.dtype != out.dtype for v in eq.inputs()):
            return None

        def aligned(x: Any) -> Any:
            return self.raised(self.names[x], rank) if isinstance(x, Var) else x

        args, kwargs = map_leaves(aligned, eq.args), map_leaves(aligned, eq.kwargs)
        return self.e.emit(eq.op, args, self.spec(out), **kwargs)

    def repeated(self, c: Constant) -> Constant:
        """Return a constant as a stack of which all entries are the same."""
        return self.numbers.viewed(aten.expand.default, c, [self.count, *c.spec.shape])

    def summed(self, v: Var, kept: int) -> Var:
        """Sum the entries of a stack over all but the last dimensions."""
        dims = list(range(1, len(v.spec.shape) - kept))
        if not dims:
            return v
        shape = (self.count, *v.spec.shape[len(dims) + 1 :])
        return self.emit(aten.sum.dim_IntList, (v, dims), shape)

    def mapped(self, eq: Equation) -> None:
        """Map an operation over the stack."""
        outs = tuple(None if v is None else Var(self.spec(v.spec)) for v in eq.outputs)
        self.names.update((v, o) for v, o in zip(eq.outputs, outs, strict=True) if v and o)

        def renamed(x: Any) -> Any:
            return self.names[x] if isinstance(x, Var) else x

        args = map_leaves(renamed, eq.args), map_leaves(renamed, eq.kwargs)
        op = _Mapped(eq.op, *args)
        self.e.equations.append(Equation(op, op.given, {}, outs, eq.source))


class _Mapped:
    """An operation mapped over the first dimension of its variables."""

    def __init__(self, op: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.op = op
        self.dims: list[int | None] = []
        given: list[Any] = []

        def place(x: Any) -> Any:
            if not isinstance(x, Value):
                return x
            given.append(x)
            self.dims.append(0 if isinstance(x, Var) else None)
            return Slot(len(given) - 1)

        self.template = map_leaves(place, (list(args), kwargs))
        self.given = tuple(given)

    def __repr__(self) -> str:
        return f"each {self.op}"

    def __call__(self, *given: Any) -> tuple[Any, ...]:
        """Apply it; returns all results."""
        if self.by_hand(given):
            return self.looped(given)
        there: list[bool] = []
        again = functools.partial(call_again, self.op)

        def one(*tensors: Any) -> tuple[Any, ...]:
            out = apply_to(again, self.template, tensors)
            results = out if isinstance(out, (tuple, list)) else (out,)
            there[:] = [t is not None for t in results]
            return tuple(t for t in results if t is not None)

        found = iter(torch.vmap(one, tuple(self.dims))(*given))
        return tuple(next(found) if here else None for here in there)

    def by_hand(self, given: Sequence[Any]) -> bool:
        """Whether entries are so large that a kernel for each beats simpler operations on all."""
        schema = schema_of(self.op) if isinstance(self.op, OpOverload) else None
        if schema is None or schema.pointwise or not schema.name.endswith("_backward"):
            return False
        stacks = (t for t, d in zip(given, self.dims, strict=True) if d == 0)
        return any(t[0].numel() >= _LARGE for t in stacks)

    def looped(self, given: Sequence[Any]) -> tuple[Any, ...]:
        count = next(len(t) for t, d in zip(given, self.dims, strict=True) if d == 0)
        outs = [apply_to(self.op, self.template, row) for row in entries(given, self.dims, count)]
        results = [out if isinstance(out, (tuple, list)) else (out,) for out in outs]
        return tuple([stack_results(column) for column in zip(*results, strict=True)])


#: From how many numbers in one entry on a kernel is called for each entry.
_LARGE = 1 << 13
#: From how many columns on a product with a matrix is taken entry by entry, by one kernel. Fewer
#: columns are taken together, which takes two copies; where all is small the copies decide.
_WIDE, _SMALL = 16, 1 << 12
#: Batches of matrices of which a product takes fewer multiplications PyTorch multiplies by plain
#: loops on a CPU: up to so many columns one pointwise operation for each is quicker.
_SIMPLE, _THIN = 400, 4


# -- rules ----------------------------------------------------------------------------------

Rule: TypeAlias = Callable[[_Vectorizer, Equation, TensorSpec], "Var | None"]
_RULES: dict[Any, Rule] = {}


def _rule(*ops: Any) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        _RULES.update(dict.fromkeys(ops, fn))
        return fn

    return register


#: Of operations with several results, which the rule names itself; it returns whether it did.
NamingRule: TypeAlias = Callable[[_Vectorizer, Equation], bool]
_NAMING_RULES: dict[Any, NamingRule] = {}


def _naming_rule(op: Any) -> Callable[[NamingRule], NamingRule]:
    def register(fn: NamingRule) -> NamingRule:
        _NAMING_RULES[op] = fn
        return fn

    return register


def _argument(eq: Equation, i: int, name: str, default: Any) -> Any:
    return eq.args[i] if len(eq.args) > i else eq.kwargs.get(name, default)


def _rank(v: Var) -> int:
    return len(v.spec.shape)


def _later(dims: Iterable[int], rank: int) -> list[int]:
    """Return dimensions of a value as those of a stack."""
    return [d % max(rank, 1) + 1 for d in dims]


@_rule(
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
def _as_it_stands(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    if eq.kwargs.get("memory_format") not in (
        None,
        torch.contiguous_format,
        torch.preserve_format,
    ):
        return None
    return s.e.emit(eq.op, (s.names[eq.args[0]], *eq.args[1:]), s.spec(out), **eq.kwargs)


@_rule(
    aten.reshape.default,
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
def _reshape(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    return s.reshape(s.names[eq.args[0]], s.count, *out.shape)


@_rule(aten.expand.default)
def _expand(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    v = s.raised(s.names[eq.args[0]], len(out.shape))
    return s.e.emit(aten.expand.default, (v, [s.count, *out.shape]), s.spec(out))


@_rule(aten.t.default, aten.transpose.int, aten.permute.default)
def _permute(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    dims = permutation(eq.op, eq.args)
    assert dims is not None
    return s.permute(s.names[eq.args[0]], 0, *(d + 1 for d in dims))


@_rule(aten.select.int, aten.slice.Tensor)
def _part(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    x, *rest = eq.args
    if eq.kwargs or not _rank(x):
        return None
    (dim,) = _later(rest[:1] or [0], _rank(x))
    return s.e.emit(eq.op, (s.names[x], dim, *rest[1:]), s.spec(out))


@_rule(aten.select_backward.default, aten.slice_backward.default)
def _place(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    x, sizes, dim, *rest = eq.args
    args = (s.names[x], [s.count, *sizes], *_later([dim], len(sizes)), *rest)
    return s.e.emit(eq.op, args, s.spec(out))


@_rule(aten.cat.default, aten.stack.default)
def _join(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    if eq.constants():
        return None
    (dim,) = _later([_argument(eq, 1, "dim", 0)], len(out.shape))
    return s.e.emit(eq.op, ([s.names[v] for v in eq.args[0]], dim), s.spec(out))


@_rule(aten.roll.default)
def _roll(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    x = s.names[eq.args[0]]
    shifts, dims = eq.args[1], _argument(eq, 2, "dims", [])
    if dims:
        return s.e.emit(eq.op, (x, shifts, _later(dims, len(out.shape))), s.spec(out))
    flat = s.reshape(x, s.count, math.prod(out.shape))
    rolled = s.emit(eq.op, (flat, shifts, [1]), flat.spec.shape)
    return s.reshape(rolled, s.count, *out.shape)


@_rule(aten.flip.default)
def _flip(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    args = (s.names[eq.args[0]], _later(eq.args[1], len(out.shape)))
    return s.e.emit(eq.op, args, s.spec(out))


@_rule(aten.sum.default, aten.mean.default)
def _total(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    x = eq.args[0]
    if eq.kwargs or not _rank(x):
        return None
    op = aten.sum.dim_IntList if eq.op is aten.sum.default else aten.mean.dim
    return s.e.emit(op, (s.names[x], list(range(1, _rank(x) + 1))), s.spec(out))


@_rule(aten.sum.dim_IntList, aten.mean.dim)
def _sum(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    x, dims, *rest = eq.args
    if not _rank(x):
        return None
    dims = _later(dims or range(_rank(x)), _rank(x))
    return s.e.emit(eq.op, (s.names[x], dims, *rest), s.spec(out), **eq.kwargs)


@_rule(aten.linalg_cross.default)
def _cross(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    (dim,) = _later([eq.kwargs.get("dim", -1)], len(out.shape))

    def raised(x: Any) -> Any:
        if isinstance(x, Var):
            return s.names[x]
        return s.numbers.viewed(aten.unsqueeze.default, x, 0)

    return s.e.emit(eq.op, (*map(raised, eq.args),), s.spec(out), dim=dim)


@_rule(aten._softmax_backward_data.default)
def _softmax(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    g, r, dim, dtype = eq.args
    if not (isinstance(g, Var) and isinstance(r, Constant)):
        return None
    if not (g.spec == out and dtype == out.dtype and out.shape):
        return None
    shape = (s.count, *out.shape)
    (dim,) = _later([dim], len(out.shape))
    products = s.emit(aten.mul.Tensor, (s.names[g], r), shape)
    sums = s.emit(
        aten.sum.dim_IntList,
        (products, [dim], True),
        [1 if i == dim else n for i, n in enumerate(shape)],
    )
    return s.emit(aten.addcmul.default, (products, sums, r), shape, value=-1)


@_naming_rule(aten.native_layer_norm_backward.default)
def _layer_norm(s: _Vectorizer, eq: Equation) -> bool:
    """Take the entries of a stack as further rows; tell whether that is possible."""
    g, x, shape, mean, rstd, weight, bias, _ = eq.args
    numbers = [r for r in (x, mean, rstd, weight, bias) if r is not None]
    if not isinstance(g, Var) or g.spec.numel >= _LARGE:
        return False
    if any(not isinstance(r, Constant) or r.spec.dtype != g.spec.dtype for r in numbers):
        return False
    v, (first, *affine) = s.names[g], eq.outputs
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
        s.names[first] = out = Var(s.spec(first.spec))
        args = (v, s.repeated(x), shape, means, scales, weight, bias, [True, False, False])
        s.e.equations.append(Equation(eq.op, args, {}, (out, None, None), eq.source))
    if affine[0] is not None:
        centred = s.numbers.evaluated(aten.sub.Tensor, x, mean, source=x.source)
        normal = s.numbers.evaluated(aten.mul.Tensor, centred, rstd, source=x.source)
        product = s.emit(aten.mul.Tensor, (v, normal), v.spec.shape)
        s.names[affine[0]] = s.summed(product, len(shape))
    if affine[1] is not None:
        s.names[affine[1]] = s.summed(v, len(shape))
    return True


@_rule(aten.mm.default)
def _mm(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    return _matrix_product(s, *eq.args)


def _matrix_product(s: _Vectorizer, a: Any, b: Any) -> Var:
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


def _is_wide(s: _Vectorizer, a: Constant, b: Var) -> bool:
    n, inner = a.spec.shape
    m = b.spec.shape[1]
    return not _is_sparse(s, a) and (m >= _WIDE or (m > 1 and n * inner * m < _SMALL))


def _is_sparse(s: _Vectorizer, c: Constant) -> bool:
    return s.numbers[c].layout is not torch.strided


@_rule(aten.mv.default)
def _mv(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    a, b = eq.args
    if isinstance(a, Var):
        return s.emit(aten.matmul.default, (s.names[a], b), (s.count, *out.shape))
    return s.emit(
        aten.mm.default, (s.names[b], s.numbers.viewed(aten.t.default, a)), (s.count, *out.shape)
    )


@_rule(aten.bmm.default)
def _bmm(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    return _batch_product(s, *eq.args)


def _batch_product(s: _Vectorizer, a: Any, b: Any) -> Var:
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


def _sum_of_columns(s: _Vectorizer, a: Constant, b: Var) -> Var:
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


@_rule(aten.addmm.default, aten.baddbmm.default)
def _added_product(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
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


@_rule(aten.linalg_lu_solve.default)
def _lu_solve(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
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


@_rule(aten.convolution.default)
def _convolution(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    x, w, bias, *rest = eq.args
    if not isinstance(x, Var) or not isinstance(w, Constant) or bias is not None:
        return None
    many = s.reshape(s.names[x], s.count * x.spec.shape[0], *x.spec.shape[1:])
    shape = (s.count * out.shape[0], *out.shape[1:])
    done = s.emit(eq.op, (many, w, None, *rest), shape)
    return s.reshape(done, s.count, *out.shape)


@_rule(aten.convolution_backward.default)
def _convolution_backward(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
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


@_rule(aten.index.Tensor)
def _index(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    x, where = eq.args
    given = [i for i, w in enumerate(where) if w is not None]
    if not isinstance(x, Var) or given != list(range(given[0], given[0] + len(given))):
        return None  # apart from each other, positions put their dimensions first
    if any(not isinstance(w, Constant) for w in where if w is not None):
        return None
    return s.e.emit(eq.op, (s.names[x], [None, *where]), s.spec(out))


@_rule(aten.index_put.default)
def _index_put(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
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
    first = s.permute(s.names[x], 1, 0, *range(2, _rank(x) + 1))
    # In the order of memory it is quicker, even with the copy.
    first = s.emit(
        aten.clone.default, (first,), first.spec.shape, memory_format=torch.contiguous_format
    )
    put = s.e.emit(eq.op, (wide, where, first, *rest), TensorSpec(shape, out.dtype, out.device))
    return s.permute(put, 1, 0, *range(2, len(shape)))


@_rule(aten.index_add.default)
def _index_add(s: _Vectorizer, eq: Equation, out: TensorSpec) -> Var | None:
    to, dim, where, x = eq.args
    if not (isinstance(to, Constant) and isinstance(x, Var) and out.shape):
        return None
    wide = s.numbers.viewed(aten.expand.default, to, [s.count, *out.shape])
    args = (wide, *_later([dim], len(out.shape)), where, s.names[x])
    return s.e.emit(eq.op, args, s.spec(out), **eq.kwargs)
