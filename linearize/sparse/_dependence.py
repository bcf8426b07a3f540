"""Which results of a linear program can depend on which of its arguments.

Each variable has a boolean matrix, one row per entry, one column per entry of the program's
arguments. Operations that move entries move rows, pointwise operations join the rows of their
arguments, contractions join rows along a dimension. What an operation that has no rule here
gives counts as depending on all that its arguments depend on. So a pattern can hold too much,
never too little. Numbers do not matter, except where they are indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch

from .._execute.binding import BoundProgram
from .._programs.aten import JOINED, JOINED_BY_ENTRY, MOVES, schema_of
from .._programs.program import Equation
from .._programs.values import Constant, Var
from .._spaces.nested import map_leaves
from .._torch.names import OpOverload

#: A boolean matrix in SciPy's CSR format.
Rows: TypeAlias = Any
Rule: TypeAlias = Callable[["_Reader", Equation], "list[Rows] | None"]

#: Entries that a pattern may have before it counts as full.
LIMIT = 50_000_000


class TooDenseError(Exception):
    """A pattern would have more entries than `LIMIT`."""


class _Reader:
    """Propagates the boolean matrices through one program."""

    def __init__(self, program: BoundProgram) -> None:
        sizes = [v.spec.numel for v in program.inputs]
        self.width = sum(sizes)
        self.rows: dict[Var, Rows] = {}
        self.exact = True
        self.numbers = program.numbers()
        start = 0
        for v, size in zip(program.inputs, sizes, strict=True):
            self.rows[v] = sp.eye_array(size, self.width, k=start, dtype=bool, format="csr")
            start += size

    def read(self, eq: Equation) -> None:
        """Find the rows of an equation's results."""
        results = None
        if isinstance(eq.op, OpOverload) and eq.op.namespace == "aten":
            rule = _rule(eq.op)
            results = rule(self, eq) if rule is not None else None
        if results is None:
            self.exact = False
            results = self._everything(eq)
        for out, rows in zip(eq.outputs, results, strict=True):
            if out is not None:
                if rows.nnz > LIMIT:
                    raise TooDenseError
                assert rows.shape == (out.spec.numel, self.width), eq.name
                self.rows[out] = rows

    def _everything(self, eq: Equation) -> list[Rows]:
        """Let each entry of each result depend on everything that the arguments depend on."""
        used = np.zeros(self.width, dtype=bool)
        for v in eq.inputs():
            used[self.rows[v].indices] = True
        count = int(used.sum())
        results = []
        for out in eq.outputs:
            height = 0 if out is None else out.spec.numel
            if height * count > LIMIT:
                raise TooDenseError
            one = sp.csr_array(used[None, :])
            results.append(self.taken(one, np.zeros(height, dtype=np.int64)))
        return results

    def taken(self, rows: Rows, index: Any) -> Rows:
        """Return the rows with these numbers; -1 stands for an empty row."""
        index = np.asarray(index).reshape(-1)
        if index.size and index.min() < 0:
            empty = sp.csr_array((1, rows.shape[1]), dtype=bool)
            rows = sp.vstack([rows, empty], format="csr")
        if index.size * (rows.nnz // max(rows.shape[0], 1)) > 4 * LIMIT:
            raise TooDenseError
        return rows[index]

    def joined(self, relation: Rows, rows: Rows) -> Rows:
        """Return the rows of results that join the rows that a relation names."""
        return (relation.astype(bool) @ rows.astype(bool)).tocsr()


def dependence(program: BoundProgram) -> tuple[Rows, bool]:
    """Return the boolean matrix of a program's result, and whether every operation had a rule.

    Raises
    ------
    TooDenseError
        If it would have too many entries to be worth it.
    """
    reader = _Reader(program)
    for eq, gone in zip(program.equations, program.program.last_uses(), strict=True):
        reader.read(eq)
        for v in gone:
            del reader.rows[v]
    blocks = [
        sp.csr_array((spec.numel, reader.width), dtype=bool) if v is None else reader.rows[v]
        for v, spec in zip(program.outputs, program.specs, strict=True)
    ]
    if not blocks:
        return sp.csr_array((0, reader.width), dtype=bool), True
    return sp.vstack(blocks, format="csr").astype(bool), reader.exact


def _rule(op: OpOverload) -> Rule | None:
    schema = schema_of(op)
    rule = _RULES.get(schema.name)
    if rule is not None:
        return rule
    if schema.name in MOVES or schema.name in JOINED:
        return _move
    return _pointwise if schema.by_entry or schema.name in JOINED_BY_ENTRY else None


# -- rules ----------------------------------------------------------------------------------


def _index(shape: Sequence[int], start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + math.prod(shape)).reshape(tuple(shape))


def _pointwise(reader: _Reader, eq: Equation) -> list[Rows] | None:
    out = eq.outputs[0]
    if len(eq.outputs) != 1 or out is None:
        return None
    total: Rows = None
    for v in dict.fromkeys(eq.inputs()):
        rows = reader.rows[v]
        if v.spec.shape != out.spec.shape:
            rows = reader.taken(rows, _index(v.spec.shape).expand(out.spec.shape).numpy())
        total = rows if total is None else total + rows
    return [total]


def _move(reader: _Reader, eq: Equation) -> list[Rows] | None:
    """Let the operation itself move the numbers of the entries; zero stands for nothing."""
    variables = list(dict.fromkeys(eq.inputs()))
    starts, start = {}, 0
    for v in variables:
        starts[v] = start
        start += v.spec.numel

    def number(x: Any) -> Any:
        if isinstance(x, Var):
            return _index(x.spec.shape, starts[x] + 1)
        return reader.numbers[x].cpu() if isinstance(x, Constant) else x

    name = schema_of(eq.op).name
    if name == "_to_copy" or (name == "constant_pad_nd" and any(eq.args[2:])):
        moved: Any = number(eq.args[0]) if name == "_to_copy" else None
    else:
        kwargs = {k: v for k, v in eq.kwargs.items() if k not in ("memory_format", "device")}
        moved = eq.op(*map_leaves(number, eq.args), **map_leaves(number, kwargs))
    if moved is None:
        return None
    source = [reader.rows[v] for v in variables]
    rows = source[0] if len(source) == 1 else sp.vstack(source, format="csr")
    results = moved if isinstance(moved, (list, tuple)) else [moved]
    return [reader.taken(rows, t.numpy() - 1) for t in results]


def _reduction(reader: _Reader, eq: Equation) -> list[Rows] | None:
    v = eq.args[0]
    shape = v.spec.shape
    dims = eq.argument(1, None)
    dims = None if isinstance(dims, torch.dtype) else dims
    chosen = _dims(dims, len(shape))
    kept = [1 if d in chosen else n for d, n in enumerate(shape)]
    return [_gathered(reader, reader.rows[v], _index(kept).expand(shape), math.prod(kept))]


def _dims(dims: Any, count: int) -> set[int]:
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return set(range(count))
    given = [dims] if isinstance(dims, int) else dims
    return {d % count for d in given} if count else set()


def _gathered(reader: _Reader, rows: Rows, target: torch.Tensor, height: int) -> Rows:
    """Join the rows that have the same target; a negative target stands for none."""
    index = target.reshape(-1).numpy()
    source = np.arange(index.size)
    source, index = source[index >= 0], index[index >= 0]
    ones = np.ones(index.size, dtype=bool)
    relation = sp.csr_array((ones, (index, source)), shape=(height, rows.shape[0]))
    return reader.joined(relation, rows)


def _along(reader: _Reader, v: Var, dims: set[int]) -> Rows:
    """Join along dimensions, keeping the shape."""
    shape = v.spec.shape
    kept = [1 if d in dims else n for d, n in enumerate(shape)]
    group = _index(kept).expand(shape)
    joined = _gathered(reader, reader.rows[v], group, math.prod(kept))
    return reader.taken(joined, group.reshape(-1).numpy())


def _softmax(reader: _Reader, eq: Equation) -> list[Rows] | None:
    v = eq.args[0]
    if not isinstance(v, Var) or isinstance(eq.args[1], Var):
        return None
    return [_along(reader, v, _dims(eq.args[2], len(v.spec.shape)))]


def _cumsum(reader: _Reader, eq: Equation) -> list[Rows] | None:
    v, dim = eq.args[:2]
    shape = v.spec.shape
    if not shape:
        return [reader.rows[v]]
    dim %= len(shape)
    before, after = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    lower = sp.csr_array(np.tri(shape[dim], dtype=bool))
    return [reader.joined(_kron(_eye(before), lower, _eye(after)), reader.rows[v])]


def _eye(n: int) -> Rows:
    return sp.eye_array(n, dtype=bool, format="csr")


def _kron(*factors: Rows) -> Rows:
    total = factors[0]
    for factor in factors[1:]:
        if total.nnz * factor.nnz > LIMIT:
            raise TooDenseError
        total = sp.kron(total, factor, format="csr")
    return total


def _entries(t: torch.Tensor) -> Rows:
    """Return where a residual matrix may have entries: everywhere, unless its layout is sparse."""
    if t.layout == torch.strided:
        return sp.csr_array(np.ones(tuple(t.shape), dtype=bool))
    coo = t.to_sparse_coo().coalesce()
    row, column = coo.indices().cpu().numpy()
    return sp.csr_array((np.ones(row.size, dtype=bool), (row, column)), shape=tuple(t.shape))


def _matmul(reader: _Reader, eq: Equation) -> list[Rows] | None:
    a, b = eq.args[:2]
    if isinstance(a, Var) == isinstance(b, Var):
        return None
    v, other = (a, b) if isinstance(a, Var) else (b, a)
    if not isinstance(other, Constant):
        return None
    t = reader.numbers[other]
    if t.dim() == 1:  # dot, or mv with a variable matrix
        t = t[:, None] if isinstance(a, Var) else t[None, :]
    if isinstance(a, Var):
        rest = v.spec.shape[:-1]
        if t.dim() == 3:
            pattern = sp.csr_array(np.ones((t.shape[2], t.shape[1]), dtype=bool))
        else:
            pattern = _entries(t).T.tocsr()
        relation = _kron(_eye(math.prod(rest)), pattern)
    else:
        columns = v.spec.shape[-1] if len(v.spec.shape) > 1 else 1
        if t.dim() == 3:
            pattern = sp.csr_array(np.ones(tuple(t.shape[1:]), dtype=bool))
            relation = _kron(_eye(t.shape[0]), pattern, _eye(columns))
        else:
            relation = _kron(_entries(t), _eye(columns))
    return [reader.joined(relation, reader.rows[v])]


def _window(out: int, into: int, kernel: int, stride: int, padding: int, dilation: int) -> Rows:
    """Return which inputs each output of a one-dimensional convolution reads."""
    at = np.arange(out)[:, None] * stride - padding + np.arange(kernel)[None, :] * dilation
    row = np.broadcast_to(np.arange(out)[:, None], at.shape)
    inside = (at >= 0) & (at < into)
    ones = np.ones(int(inside.sum()), dtype=bool)
    return sp.csr_array((ones, (row[inside], at[inside])), shape=(out, into))


def _convolution_relation(
    into: Sequence[int],
    out: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
) -> Rows:
    """Return which inputs each output of a convolution reads; shapes with batch and channels."""
    if transposed:  # the other way round
        return _convolution_relation(
            out, into, weight, stride, padding, dilation, False, groups
        ).T.tocsr()
    ones = np.ones((out[1] // groups, into[1] // groups), dtype=bool)
    factors = [_eye(into[0]), _eye(groups), sp.csr_array(ones)]
    spread = [list(x) * (len(into) - 2) if len(x) == 1 else x for x in (stride, padding, dilation)]
    for k in range(len(into) - 2):
        step, pad, gap = (x[k] for x in spread)
        factors.append(_window(out[2 + k], into[2 + k], weight[2 + k], step, pad, gap))
    return _kron(*factors)


def _convolution(reader: _Reader, eq: Equation) -> list[Rows] | None:
    v, weight, _bias, stride, padding, dilation, transposed, _, groups = eq.args
    out = eq.outputs[0]
    if not isinstance(v, Var) or len(eq.inputs()) != 1 or out is None:
        return None
    shapes = v.spec.shape, out.spec.shape, weight.spec.shape
    relation = _convolution_relation(*shapes, stride, padding, dilation, transposed, groups)
    return [reader.joined(relation, reader.rows[v])]


def _convolution_backward(reader: _Reader, eq: Equation) -> list[Rows] | None:
    v, given, weight, _sizes, stride, padding, dilation, transposed, _, groups = eq.args[:10]
    if not isinstance(v, Var) or len(eq.inputs()) != 1:
        return None
    if any(out is not None for out in eq.outputs[1:]):
        return None
    shapes = given.spec.shape, v.spec.shape, weight.spec.shape
    relation = _convolution_relation(*shapes, stride, padding, dilation, transposed, groups)
    joined = reader.joined(relation.T.tocsr(), reader.rows[v])
    return [joined, *([sp.csr_array((0, reader.width), dtype=bool)] * (len(eq.outputs) - 1))]


def _index_put(reader: _Reader, eq: Equation) -> list[Rows] | None:
    base, indices, values = eq.args[:3]
    out = eq.outputs[0]
    if out is None or any(isinstance(i, Var) for i in indices):
        return None
    places = [None if i is None else reader.numbers[i].cpu() for i in indices]
    target = torch.ops.aten.index.Tensor(_index(out.spec.shape), places)
    height = out.spec.numel
    total = sp.csr_array((height, reader.width), dtype=bool)
    if isinstance(base, Var):
        total = total + reader.rows[base]
    if isinstance(values, Var):
        source = _index(values.spec.shape).expand(target.shape).reshape(-1).numpy()
        rows = reader.taken(reader.rows[values], source)
        total = total + _gathered(reader, rows, target, height)
    return [total.tocsr()]


def _scatter_add(reader: _Reader, eq: Equation) -> list[Rows] | None:
    base, dim, index, source = eq.args[:4]
    out = eq.outputs[0]
    if out is None or not isinstance(index, Constant):
        return None
    places = reader.numbers[index].cpu()
    total = sp.csr_array((out.spec.numel, reader.width), dtype=bool)
    if isinstance(base, Var):
        total = total + reader.rows[base]
    if isinstance(source, Var):
        numbers = _index(out.spec.shape)
        if schema_of(eq.op).name == "index_add":
            target = numbers.index_select(dim, places.reshape(-1))
            rows = reader.rows[source]
        else:
            target = numbers.gather(dim, places)
            read = tuple(slice(0, n) for n in places.shape)
            rows = reader.taken(reader.rows[source], _index(source.spec.shape)[read].numpy())
        total = total + _gathered(reader, rows, target, out.spec.numel)
    return [total.tocsr()]


def _unfold_backward(reader: _Reader, eq: Equation) -> list[Rows] | None:
    v, sizes, dim, size, step = eq.args
    target = _index(sizes).unfold(dim, size, step)
    return [_gathered(reader, reader.rows[v], target, math.prod(sizes))]


_RULES: dict[str, Rule] = {
    "sum": _reduction,
    "mean": _reduction,
    "nansum": _reduction,
    "cumsum": _cumsum,
    "mm": _matmul,
    "bmm": _matmul,
    "mv": _matmul,
    "dot": _matmul,
    "vdot": _matmul,
    "_sparse_mm": _matmul,
    "_softmax_backward_data": _softmax,
    "_log_softmax_backward_data": _softmax,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "index_put": _index_put,
    "_unsafe_index_put": _index_put,
    "scatter_add": _scatter_add,
    "index_add": _scatter_add,
    "unfold_backward": _unfold_backward,
}
