"""Products with one small matrix for each row.

The matrices of all rows are one constant. Where one side has few numbers a row, rows come last
in it: a product is then a handful of operations on long vectors, in both directions, and the
two directions keep one constant for both.

What a number does not depend on is left out of its sum: zero times infinity is NaN.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .._execute.binding import Binding
from .._execute.executor import Executor
from .._programs.numbers import Numbers
from .._programs.origins import Costly, Literal, Origin, roots
from .._programs.price import price_of_many
from .._programs.program import Emitter, Program
from .._programs.residuals import Residual
from .._programs.values import Constant
from .._spaces.compare import close, rounding
from .._spaces.space import TensorSpec
from .._torch.names import aten

#: The source of the matrices.
SOURCE = "rows"
#: How many numbers a row are few.
NARROW = 4
#: Matrices of more variables on one side than this are not compared: there are too many orders.
_MOST_VARIABLES = 4
#: How many rows are compared before all are.
_SAMPLE = 8


class _Matrices(Costly):
    """Computes the matrices of a program that treats each row by itself from its constants.

    Parameters
    ----------
    program
        The program.
    order
        What comes first, second and third: 0 stands for the numbers that come in, 1 for rows,
        2 for the numbers that go out.
    widths
        How many numbers each variable has along the first and the second dimension, if neither
        is that of the rows.

    Attributes
    ----------
    depends
        Which numbers depend on which, in the order of the first two dimensions; None if all do.
    """

    depends: torch.Tensor | None = None

    def __init__(
        self,
        program: Program,
        order: tuple[int, int, int],
        widths: tuple[list[int], list[int]] = ([], []),
    ) -> None:
        self._run = Executor(program)
        self._specs = [v.spec for v in program.inputs]
        self._order = order
        self.widths = widths
        self.cost = price_of_many(program, sum(map(width, self._specs)))

    def __call__(self, *constants: torch.Tensor) -> torch.Tensor:
        """Return the matrices."""
        return self._columns(constants, 1).permute(self._order).contiguous()

    def look(self, constants: Sequence[torch.Tensor]) -> None:
        """See what depends on what: NaN comes through, whatever it is multiplied by.

        It is so at all points, as there are no choices among the steps.
        """
        depends = self._columns(constants, torch.nan).isnan().any(1, keepdim=True)
        if not bool(depends.all()):
            self.depends = depends.permute(self._order)

    def _columns(self, constants: Sequence[torch.Tensor], number: float) -> torch.Tensor:
        """Return what multiples of the unit vectors are mapped to."""
        binding = Binding([Residual(t) for t in constants], ())
        rows = self._specs[0].shape[0]
        widths = [width(spec) for spec in self._specs]
        units = []
        for i, spec in enumerate(self._specs):
            unit = torch.zeros(sum(widths), rows, widths[i], dtype=spec.dtype, device=spec.device)
            start = sum(widths[:i])
            for k in range(widths[i]):
                unit[start + k, :, k] = number
            units.append(unit.reshape(-1, *spec.shape))

        def apply(*parts: torch.Tensor) -> torch.Tensor:
            results = self._run(parts, binding)
            flat = [t.reshape(rows, -1) for t in results if t is not None]
            return torch.cat(flat, 1)

        columns: torch.Tensor = torch.vmap(apply)(*units)
        return columns


def width(spec: TensorSpec) -> int:
    """Return how many numbers a row has."""
    return math.prod(spec.shape[1:])


def multiply(e: Emitter, program: Program) -> None:
    """Emit products with matrices in place of a program's equations, for the same variables.

    The equations themselves if they hold a number apart from others that are many.
    """
    e.source = SOURCE
    into = sum(width(v.spec) for v in program.inputs)
    out = sum(width(v.spec) for v in program.outputs if v is not None)
    if min(into, out) <= NARROW:
        _by_numbers(e, program, into, out)
    elif not _by_rows(e, program, into, out):
        e.equations.extend(program.equations)


# -- rows first ---------------------------------------------------------------------------------


def _by_rows(e: Emitter, program: Program, into: int, out: int) -> bool:
    """Emit one batched product, if each number that goes out depends on each that comes in."""
    made = _Matrices(program, (1, 2, 0))
    made.look([e.numbers[c] for c in program.constants])
    if made.depends is not None:
        return False
    matrices = _evaluated(e, program, made)
    like, rows = program.inputs[0].spec, matrices.spec.shape[0]
    columns = [e.shaped(v, rows, width(v.spec), 1) for v in program.inputs]
    whole = columns[0]
    if len(columns) > 1:
        whole = e.emit(aten.cat.default, (columns, 1), like.shaped(rows, into, 1))
    product = e.emit(aten.bmm.default, (matrices, whole), like.shaped(rows, out, 1))
    start = 0
    for v in (v for v in program.outputs if v is not None):
        part, count = product, width(v.spec)
        if count < out:
            args = (product, 1, start, start + count)
            part = e.emit(aten.slice.Tensor, args, like.shaped(rows, count, 1))
        start += count
        e.add(aten.reshape.default, (part, list(v.spec.shape)), (v,))
    return True


# -- rows last ----------------------------------------------------------------------------------


def _by_numbers(e: Emitter, program: Program, into: int, out: int) -> None:
    """Emit a sum of products with vectors as long as there are rows.

    The side with few numbers comes first in the matrices, whichever direction it is, so that
    they are the same in both.
    """
    outs = [v for v in program.outputs if v is not None]
    sides = [width(v.spec) for v in program.inputs], [width(v.spec) for v in outs]
    order = (2, 0, 1) if out <= into else (0, 2, 1)
    from_first = out > into  # else from the second dimension to the first
    widths = sides if from_first else sides[::-1]
    made = _Matrices(program, order, widths)
    made.look([e.numbers[c] for c in program.constants])
    matrices = _evaluated(e, program, made)
    depends = made.depends
    made_of = roots([c.origin for c in program.constants], _MOST_ROOTS)
    kept = None
    if made_of is not None:
        t = e.numbers[matrices]
        if into == out:
            kept = _kept(e.numbers, made_of, t.transpose(0, 1), *widths[::-1])
            from_first = kept is not None
        kept = kept or _kept(e.numbers, made_of, t, *widths)
        if kept is None:
            e.numbers.pool[SOURCE, made_of] = matrices
    starts = _starts(widths[0]), _starts(widths[1])
    if kept is not None:
        matrices, starts = kept
        depends = matrices.origin.op.depends  # type: ignore[union-attr]
    like, rows = program.inputs[0].spec, matrices.spec.shape[-1]
    inner, outer = starts if from_first else starts[::-1]
    parts = []
    for _, v in sorted(zip(inner, program.inputs, strict=True), key=lambda pair: pair[0]):
        count = width(v.spec)
        flat = e.shaped(v, rows, count)
        parts.append(e.emit(aten.t.default, (flat,), like.shaped(count, rows)))
    turned = parts[0]
    if len(parts) > 1:
        turned = e.emit(aten.cat.default, (parts, 0), like.shaped(into, rows))
    if from_first:
        turned = e.emit(aten.unsqueeze.default, (turned, 1), like.shaped(into, 1, rows))
    # The first factor decides how the result lies in memory.
    terms = e.emit(aten.mul.Tensor, (matrices, turned), matrices.spec)
    if depends is not None:
        zero = _literal(e, torch.zeros((), dtype=like.dtype, device=like.device))
        chosen = _literal(e, depends), terms, zero
        terms = e.emit(aten.where.self, chosen, matrices.spec)
    args: tuple[Any, ...] = terms, [0 if from_first else 1]
    total = e.emit(aten.sum.dim_IntList, args, like.shaped(out, rows))
    for start, v in zip(outer, outs, strict=True):
        part, count = total, width(v.spec)
        if count < out:
            args = (total, 0, start, start + count)
            part = e.emit(aten.slice.Tensor, args, like.shaped(count, rows))
        if len(v.spec.shape) == 2:
            e.add(aten.t.default, (part,), (v,))
            continue
        part = e.emit(aten.t.default, (part,), like.shaped(rows, count))
        e.add(aten.reshape.default, (part, list(v.spec.shape)), (v,))


def _evaluated(e: Emitter, program: Program, matrices: _Matrices) -> Constant:
    return e.numbers.evaluated(matrices, *program.constants, source=SOURCE)


def _literal(e: Emitter, tensor: torch.Tensor) -> Constant:
    return e.numbers.constant(tensor, SOURCE, Literal(tensor))


#: Matrices that come of more tensors are not looked for in the other direction's program.
_MOST_ROOTS = 1024


def _kept(
    numbers: Numbers,
    made_of: frozenset[Origin],
    t: torch.Tensor,
    first: Sequence[int],
    second: Sequence[int],
) -> tuple[Constant, tuple[list[int], list[int]]] | None:
    """Return the other direction's matrices if they are the same but for the variables' order.

    `made_of` is what the matrices come from, `t` are those computed now, `first` and `second` the
    numbers of each variable along the first two dimensions.

    Returns
    -------
    tuple or None
        The matrices, and where in each of the two dimensions each variable's numbers begin.
        None if there are none, or if several orders give the same numbers: at another point
        only one of them may be right.
    """
    known = numbers.pool.get((SOURCE, made_of))
    if known is None or known.spec.numel != t.numel() or not numbers.found(known):
        return None
    theirs = numbers[known]
    widths = first, second
    if max(map(len, widths)) > _MOST_VARIABLES:
        return None
    some = slice(None, None, max(1, t.shape[-1] // _SAMPLE))
    fitting = [
        places
        for places in _orders(known.origin.op.widths, widths)
        if close(_ordered(theirs[..., some], places, widths), t[..., some])
    ]
    if len(fitting) != 1 or not close(_ordered(theirs, fitting[0], widths), t, rounding):
        return None
    return known, fitting[0]


def _orders(
    theirs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield where our variables can begin along two dimensions."""
    options = []
    for have, want in zip(theirs, ours, strict=True):
        starts = _starts(have)
        options.append(
            [
                [starts[i] for i in order]
                for order in itertools.permutations(range(len(have)))
                if [have[i] for i in order] == list(want)
            ]
        )
    yield from itertools.product(*options)


def _starts(widths: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(widths)][:-1]


def _ordered(
    t: torch.Tensor, places: Sequence[Sequence[int]], widths: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Return matrices with the variables' numbers in another order."""
    for dim in (0, 1):
        parts = [t.narrow(dim, i, n) for i, n in zip(places[dim], widths[dim], strict=True)]
        t = torch.cat(parts, dim)
    return t
