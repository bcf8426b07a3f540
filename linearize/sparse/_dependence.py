"""Which results of a linear program can depend on which of its arguments.

Each variable has a boolean matrix, one row per entry, one column per entry of the program's
arguments. Operations that move entries move rows, pointwise operations join the rows of their
arguments, contractions join rows along a dimension. Kernels are tried out (see `_probing`), custom
Functions have the pattern that their author declared. What any other operation gives counts as
depending on all that its arguments depend on. So a pattern can hold too much, never too little.

Numbers do not matter, except where they say what is read: indices, positions, and the zeros of a
matrix that f found ready. What was looked at is noted, so that the pattern is used where these are
the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch

from .._execute.binding import BoundProgram
from .._programs.aten import JOINED, JOINED_BY_ENTRY, MOVES, schema_of
from .._programs.origins import Origin, Saved, ordered
from .._programs.program import Equation
from .._programs.values import Constant, Var, frozen
from .._spaces.nested import map_leaves
from .._text.labels import beside
from .._torch.names import OpOverload
from . import _declared, _probing

#: A boolean matrix in SciPy's CSR format.
Rows: TypeAlias = Any
Rule: TypeAlias = Callable[["_Reader", Equation], "list[Rows] | None"]

#: What is looked at of a constant.
Look: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

#: Entries that a pattern may have before it counts as full.
LIMIT = 50_000_000


class TooDenseError(Exception):
    """A pattern would have more entries than `LIMIT`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What an operation does to the number of entries.

    Attributes
    ----------
    name
        Of the operation, with the line of f if that is known.
    before, after
        The most arguments that an entry of what goes in, and of what comes out, depends on.
    guessed
        Whether its result counts as depending on everything, for want of a rule.
    """

    name: str
    before: int
    after: int
    guessed: bool


@dataclasses.dataclass(slots=True)
class Dependence:
    """The boolean matrix of a program.

    Attributes
    ----------
    rows
        One row per entry of the results.
    steps
        The operations whose results depend on more than their arguments do.
    looked_at
        What was read of constants, by their origins.
    here_only
        Whether the program may be another one at other points of the structure.
    """

    rows: Rows
    steps: list[Step]
    looked_at: dict[Origin, tuple[Look, torch.Tensor]]
    here_only: bool

    @property
    def exact(self) -> bool:
        """Whether nothing was guessed."""
        return not any(step.guessed for step in self.steps)

    def holds(self, read: Callable[[Origin], torch.Tensor]) -> bool:
        """Whether it is the one of another point too, of which constants can be read."""
        try:
            return not self.here_only and all(
                torch.equal(look(read(o).detach()), seen)
                for o, (look, seen) in self.looked_at.items()
            )
        except LookupError:  # recorded anew
            return False


def _numbers(t: torch.Tensor) -> torch.Tensor:
    return t.clone()


def _not_zero(t: torch.Tensor) -> torch.Tensor:
    return t.nonzero().T


def _stored(t: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = t.to_sparse_coo().coalesce().indices()
    return found


class _Reader:
    """Propagates the boolean matrices through one program."""

    def __init__(self, program: BoundProgram) -> None:
        sizes = [v.spec.numel for v in program.inputs]
        self.width = sum(sizes)
        self.rows: dict[Var, Rows] = {}
        self.steps: list[Step] = []
        self.looked_at: dict[Origin, tuple[Look, torch.Tensor]] = {}
        self.numbers = program.numbers()
        #: What lies in memory row by row.
        self.contiguous: set[Var] = set()
        self._tried: dict[Hashable, Rows | None] = {}
        start = 0
        for v, size in zip(program.inputs, sizes, strict=True):
            self.rows[v] = sp.eye_array(size, self.width, k=start, dtype=bool, format="csr")
            start += size

    def read(self, eq: Equation) -> None:
        """Find the rows of an equation's results."""
        results = self._found(eq)
        guessed = results is None
        if results is None:
            results = self._everything(eq)
        after = 0
        for out, rows in zip(eq.outputs, results, strict=True):
            if out is not None:
                if rows.nnz > LIMIT:
                    raise TooDenseError
                assert rows.shape == (out.spec.numel, self.width), eq.name
                self.rows[out] = rows
                after = max(after, _most(rows))
        if eq.kwargs.get("memory_format") == torch.contiguous_format or eq.kind == "contiguous":
            self.contiguous.update(v for v in eq.outputs if v is not None)
        before = max((_most(self.rows[v]) for v in eq.inputs()), default=0)
        if guessed or after > before:
            name = beside(eq.name, eq.source)
            self.steps.append(Step(name, before, after, guessed and after > 1))

    def _found(self, eq: Equation) -> list[Rows] | None:
        if not isinstance(eq.op, OpOverload):
            declared = _declared.relation(eq)
            if declared is not None:
                return self._linked(eq, declared)
        elif eq.op.namespace != "aten":
            return None
        elif (rule := _rule(eq.op)) is not None:
            results = rule(self, eq)
            if results is not None:
                return results
        return self._linked(eq, self._try(eq)) if _probing.tried(eq) else None

    def _try(self, eq: Equation) -> Rows | None:
        """Try an operation out, once for all that are alike."""
        variables, kept = eq.inputs(), _probing.kept(eq)
        for c in kept:
            self.read_numbers(c)

        def kind(x: Any) -> Any:
            if isinstance(x, Var):
                return variables.index(x), x.spec
            return ("any", x.spec) if isinstance(x, Constant) and x not in kept else x

        key = frozen(eq.op, map_leaves(kind, eq.args), map_leaves(kind, eq.kwargs))
        if key not in self._tried:
            self._tried[key] = _probing.relation(eq, self.numbers, LIMIT)
        return self._tried[key]

    def _linked(self, eq: Equation, relation: Rows | None) -> list[Rows] | None:
        """Return the rows of an equation's results, of which is known what entries they read."""
        if relation is None:
            return None
        source = [self.rows[v] for v in dict.fromkeys(eq.inputs())]
        joined = self.joined(relation, sp.vstack(source, format="csr"))
        results, start = [], 0
        for out in eq.outputs:
            size = 0 if out is None else out.spec.numel
            results.append(joined[start : start + size])
            start += size
        return results

    def read_numbers(self, c: Constant) -> torch.Tensor:
        """Return the tensor of a constant, and note that it was looked at."""
        return self._look(c, _numbers)

    def entries(self, c: Constant) -> torch.Tensor:
        """Return the places where a constant has entries, one in each column.

        If it was not there before f ran, another point may have others: these are all places.
        """
        t = self.numbers[c]
        if t.layout != torch.strided:
            return self._look(c, _stored)
        begin = [o for o in ordered([c.origin]) if not o.inputs()]
        if all(o.static or (isinstance(o, Saved) and o.ready) for o in begin):
            return self._look(c, _not_zero)
        return torch.ones(t.shape, dtype=torch.bool).nonzero().T

    def _look(self, c: Constant, at: Look) -> torch.Tensor:
        seen = at(self.numbers[c].detach())
        if not c.origin.static:
            self.looked_at[c.origin] = at, seen
        return seen

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


def _most(rows: Rows) -> int:
    return int(np.diff(rows.indptr).max(initial=0))


def dependence(program: BoundProgram) -> Dependence:
    """Return the boolean matrix of a program's result, and how it came about.

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
    empty = sp.csr_array((0, reader.width), dtype=bool)
    rows = sp.vstack([*blocks, empty], format="csr").astype(bool)
    return Dependence(rows, reader.steps, reader.looked_at, bool(program.program.fixed))


#: What puts the entries of one argument in the place of some of another's.
_PUTS = frozenset(
    "slice_scatter select_scatter diagonal_scatter masked_scatter masked_scatter_backward "
    "masked_select diag".split()
)


def _rule(op: OpOverload) -> Rule | None:
    schema = schema_of(op)
    rule = _RULES.get(schema.name)
    if rule is not None:
        return rule
    if schema.name in MOVES or schema.name in JOINED or schema.name in _PUTS:
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


def _matmul(reader: _Reader, eq: Equation) -> list[Rows] | None:
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
    if out.numel() > LIMIT:
        raise TooDenseError
    ones = np.ones(out.numel(), dtype=bool)
    places = out.reshape(-1).numpy(), into.reshape(-1).numpy()
    return [reader.joined(sp.csr_array((ones, places), shape=size), reader.rows[v])]


def _index_put(reader: _Reader, eq: Equation) -> list[Rows] | None:
    base, indices, values = eq.args[:3]
    out = eq.outputs[0]
    if out is None or any(isinstance(i, Var) for i in indices):
        return None
    places = [None if i is None else reader.read_numbers(i).cpu() for i in indices]
    target = torch.ops.aten.index.Tensor(_index(out.spec.shape), places)
    height = out.spec.numel
    total = _kept(reader, base, None if eq.argument(3, False, "accumulate") else target, height)
    if isinstance(values, Var):
        source = _index(values.spec.shape).expand(target.shape).reshape(-1).numpy()
        rows = reader.taken(reader.rows[values], source)
        total = total + _gathered(reader, rows, target, height)
    return [total.tocsr()]


def _scatter(reader: _Reader, eq: Equation) -> list[Rows] | None:
    base, dim, index, source = eq.args[:4]
    out = eq.outputs[0]
    if out is None or not isinstance(index, Constant):
        return None
    places = reader.read_numbers(index).cpu()
    name, numbers = schema_of(eq.op).name, _index(out.spec.shape)
    whole = name.startswith("index")
    if whole:
        target = numbers.index_select(dim, places.reshape(-1))
    else:
        target = numbers.gather(dim, places)
    replaced = None if name.endswith("_add") else target
    total = _kept(reader, base, replaced, out.spec.numel)
    if isinstance(source, Var):
        rows = reader.rows[source]
        if name == "index_fill":
            rows = reader.taken(rows, np.zeros(target.numel(), dtype=np.int64))
        elif not whole:
            read = tuple(slice(0, n) for n in places.shape)
            rows = reader.taken(rows, _index(source.spec.shape)[read].numpy())
        total = total + _gathered(reader, rows, target, out.spec.numel)
    return [total.tocsr()]


def _kept(reader: _Reader, base: Any, replaced: torch.Tensor | None, height: int) -> Rows:
    """Return the rows of what something is put into, without those that it replaces."""
    if not isinstance(base, Var):
        return sp.csr_array((height, reader.width), dtype=bool)
    index = np.arange(height)
    if replaced is not None:
        index[replaced.reshape(-1).numpy()] = -1
    return reader.taken(reader.rows[base], index)


def _unfold_backward(reader: _Reader, eq: Equation) -> list[Rows] | None:
    v, sizes, dim, size, step = eq.args
    target = _index(sizes).unfold(dim, size, step)
    return [_gathered(reader, reader.rows[v], target, math.prod(sizes))]


def _as_parts(reader: _Reader, eq: Equation) -> list[Rows] | None:
    v = eq.args[0]
    return [reader.taken(reader.rows[v], _index((v.spec.numel, 1)).expand(-1, 2).numpy())]


def _of_parts(reader: _Reader, eq: Equation) -> list[Rows] | None:
    v = eq.args[0]
    count = v.spec.numel // 2
    return [_gathered(reader, reader.rows[v], _index((count, 1)).expand(-1, 2), count)]


def _strided(reader: _Reader, eq: Equation) -> list[Rows] | None:
    """Strides count memory: they are places of entries where these lie in one row."""
    base = eq.args[0]
    flat = len(base.spec.shape) == 1 or base in reader.contiguous
    return _move(reader, eq) if flat else None


_RULES: dict[str, Rule] = {
    "sum": _reduction,
    "mean": _reduction,
    "nansum": _reduction,
    "mm": _matmul,
    "bmm": _matmul,
    "mv": _matmul,
    "dot": _matmul,
    "vdot": _matmul,
    "_sparse_mm": _matmul,
    "index_put": _index_put,
    "_unsafe_index_put": _index_put,
    "scatter": _scatter,
    "scatter_add": _scatter,
    "index_add": _scatter,
    "index_copy": _scatter,
    "index_fill": _scatter,
    "view_as_real": _as_parts,
    "view_as_complex": _of_parts,
    "as_strided": _strided,
    "as_strided_scatter": _strided,
    "unfold_backward": _unfold_backward,
}
