"""How the operations that move, join and contract entries treat boolean matrices.

A rule returns the rows of each result of an equation, None if it does not cover the case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch

from .._programs.aten import JOINED, JOINED_BY_ENTRY, MOVES, schema_of
from .._programs.program import Equation
from .._programs.values import Constant, Var
from .._spaces.nested import map_leaves
from .._torch.names import OpOverload
from . import _reading
from ._boolean import Rows, marked
from ._reading import Reader, TooDenseError

Rule: TypeAlias = Callable[[Reader, Equation], "list[Rows] | None"]

#: What puts the entries of one argument in the place of some of another's.
_PUTS = frozenset(
    "slice_scatter select_scatter diagonal_scatter masked_scatter masked_scatter_backward "
    "masked_select diag".split()
)


def rule_for(op: OpOverload) -> Rule | None:
    """Return what gives the rows of an operation's results, None if there is no rule."""
    schema = schema_of(op)
    rule = _RULES.get(schema.name)
    if rule is not None:
        return rule
    if schema.name in MOVES or schema.name in JOINED or schema.name in _PUTS:
        return _move
    return _pointwise if schema.by_entry or schema.name in JOINED_BY_ENTRY else None


def _index(shape: Sequence[int], start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + math.prod(shape)).reshape(tuple(shape))


def _pointwise(reader: Reader, eq: Equation) -> list[Rows] | None:
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


def _move(reader: Reader, eq: Equation) -> list[Rows] | None:
    """Let the operation itself move the numbers of the entries; zero stands for nothing."""
    variables = list(dict.fromkeys(eq.inputs()))
    starts, start = {}, 0
    for v in variables:
        starts[v] = start
        start += v.spec.numel

    def number(x: Any) -> Any:
        if isinstance(x, Var):
            return _index(x.spec.shape, starts[x] + 1)
        if not isinstance(x, Constant):
            return x
        if x.spec.differentiable:  # what stands beside variables is zero: the map is linear
            return torch.zeros(x.spec.shape, dtype=torch.int64)
        return reader.read_numbers(x).cpu()

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


def _reduction(reader: Reader, eq: Equation) -> list[Rows] | None:
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


def _gathered(reader: Reader, rows: Rows, target: torch.Tensor, height: int) -> Rows:
    """Join the rows that have the same target; a negative target stands for none."""
    index = target.reshape(-1).numpy()
    source = np.arange(index.size)
    source, index = source[index >= 0], index[index >= 0]
    return reader.joined(marked(index, source, (height, rows.shape[0])), rows)


def _matmul(reader: Reader, eq: Equation) -> list[Rows] | None:
    """Products with a matrix, or with a stack of them."""
    a, b = eq.args[:2]
    if isinstance(a, Var) == isinstance(b, Var):
        return None
    v, other = (a, b) if isinstance(a, Var) else (b, a)
    if not isinstance(other, Constant):
        return None
    entries, shape = reader.entries(other).cpu(), other.spec.shape
    nothing = torch.zeros_like(entries[:1])
    if len(shape) == 1:  # mv with a variable matrix, or dot
        right = isinstance(a, Var)
        entries = torch.cat([entries, nothing] if right else [nothing, entries])
        shape = (*shape, 1) if right else (1, *shape)
    if len(shape) == 2:
        entries, shape = torch.cat([nothing, entries]), (1, *shape)
    (stack, height, width), (place, row, column) = shape, entries
    if isinstance(a, Var):  # out[place, i, column] takes in a[place, i, row]
        count = v.spec.numel // max(stack * height, 1)
        outer = place[:, None] * count + torch.arange(count)
        out, into = outer * width + column[:, None], outer * height + row[:, None]
        size = stack * count * width, stack * count * height
    else:  # out[place, row, i] takes in b[place, column, i]
        count = v.spec.numel // max(stack * width, 1)
        out, into = (
            (place * n + k)[:, None] * count + torch.arange(count)
            for n, k in ((height, row), (width, column))
        )
        size = stack * height * count, stack * width * count
    if out.numel() > _reading.LIMIT:
        raise TooDenseError
    relation = marked(out.reshape(-1).numpy(), into.reshape(-1).numpy(), size)
    return [reader.joined(relation, reader.rows[v])]


def _index_put(reader: Reader, eq: Equation) -> list[Rows] | None:
    _, indices, values = eq.args[:3]
    out = eq.outputs[0]
    if out is None or any(isinstance(i, Var) for i in indices):
        return None
    places = [None if i is None else reader.read_numbers(i).cpu() for i in indices]
    target = torch.ops.aten.index.Tensor(_index(out.spec.shape), places)
    return _put(reader, eq, values, target, adds=eq.argument(3, False, "accumulate"))


def _scatter(reader: Reader, eq: Equation) -> list[Rows] | None:
    _, dim, index, source = eq.args[:4]
    out = eq.outputs[0]
    if out is None or not isinstance(index, Constant):
        return None
    places = reader.read_numbers(index).cpu()
    name, numbers = schema_of(eq.op).name, _index(out.spec.shape)
    if name.startswith("index"):
        target = numbers.index_select(dim, places.reshape(-1))
    else:
        target = numbers.gather(dim, places)
    return _put(reader, eq, source, target, adds=name.endswith("_add"))


def _put(
    reader: Reader, eq: Equation, source: Any, target: torch.Tensor, *, adds: bool
) -> list[Rows]:
    """Return the rows of what an argument is put into, or added to, at the places of `target`."""
    base, out = eq.args[0], eq.outputs[0]
    assert out is not None
    height = out.spec.numel
    index = np.arange(height)
    if not adds:
        index[target.reshape(-1).numpy()] = -1
    if isinstance(base, Var):
        total = reader.taken(reader.rows[base], index)
    else:
        total = sp.csr_array((height, reader.width), dtype=bool)
    if isinstance(source, Var):
        read = _index(source.spec.shape)
        if read.dim() == target.dim():  # scattered is the corner that there are places for
            read = read[tuple(slice(0, n) for n in target.shape)]
        rows = reader.taken(reader.rows[source], read.expand(target.shape).numpy())
        total = total + _gathered(reader, rows, target, height)
    return [total.tocsr()]


def _unfold_backward(reader: Reader, eq: Equation) -> list[Rows] | None:
    v, sizes, dim, size, step = eq.args
    target = _index(sizes).unfold(dim, size, step)
    return [_gathered(reader, reader.rows[v], target, math.prod(sizes))]


def _as_parts(reader: Reader, eq: Equation) -> list[Rows] | None:
    v = eq.args[0]
    return [reader.taken(reader.rows[v], _index((v.spec.numel, 1)).expand(-1, 2).numpy())]


def _of_parts(reader: Reader, eq: Equation) -> list[Rows] | None:
    v = eq.args[0]
    count = v.spec.numel // 2
    return [_gathered(reader, reader.rows[v], _index((count, 1)).expand(-1, 2), count)]


def _strided(reader: Reader, eq: Equation) -> list[Rows] | None:
    """Strides count memory: they are places of entries where these lie in one row."""
    base = eq.args[0]
    flat = len(base.spec.shape) == 1 or base in reader.contiguous
    return _move(reader, eq) if flat else None


_RULES: dict[str, Rule] = {
    name: rule
    for rule, names in (
        (_reduction, "sum mean nansum"),
        (_matmul, "mm bmm mv dot vdot _sparse_mm"),
        (_index_put, "index_put _unsafe_index_put"),
        (_scatter, "scatter scatter_add index_add index_copy index_fill"),
        (_as_parts, "view_as_real"),
        (_of_parts, "view_as_complex"),
        (_strided, "as_strided as_strided_scatter"),
        (_unfold_backward, "unfold_backward"),
    )
    for name in names.split()
}
