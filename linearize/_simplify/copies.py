"""Dropping what changes nothing, and computing equal things once."""

from __future__ import annotations

from typing import Any

from .._programs.aten import RESHAPES, permutation
from .._programs.numbers import Numbers
from .._programs.program import Equation, Operation, Program
from .._programs.values import Var, frozen
from .._torch.names import OpOverload, aten

_NOTHING = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.expand.default,
        aten._to_copy.default,
        aten.squeeze.dim,
        aten.squeeze.default,
        aten.lift_fresh.default,
        aten.clone.default,
    }
)
#: Operations that rely on how their argument lies in memory.
_STRIDED = frozenset(
    {
        aten.as_strided.default,
        aten.as_strided_scatter.default,
        aten.view_as_complex.default,
        aten.view_as_real.default,
    }
)


def merge_copies(program: Program, _: Numbers | None = None) -> Program:
    """Drop what changes nothing, join reshapes and permutations, compute equal things once.

    What is flipped twice is as it was.
    """
    same: dict[Var, Var] = {}
    origin: dict[Var, Var] = {}
    turned: dict[Var, tuple[Var, tuple[int, ...]]] = {}
    flipped: dict[Var, tuple[Var, Any]] = {}
    strided, uses = laid_out(program), program.uses()
    known: dict[Any, tuple[Var | None, ...]] = {}
    kept: list[Equation] = []

    def current(x: Any) -> Any:
        return same.get(x, x)

    for eq in program.equations:
        renamed = eq.renamed(current)
        args, kwargs = renamed.args, renamed.kwargs
        out = eq.outputs[0] if len(eq.outputs) == 1 else None
        if isinstance(eq.op, Operation) or not isinstance(eq.op, OpOverload):
            kept.append(renamed)
            continue
        idle = eq.op in _NOTHING and isinstance(args[0], Var)
        if out is not None and idle and args[0].spec == out.spec and out not in strided:
            same[out] = args[0]
            continue
        # Other than `view`, `reshape` takes any strides.
        op = aten.reshape.default if eq.op is aten.view.default else eq.op
        if out is not None and op in RESHAPES and isinstance(args[0], Var):
            base = origin.get(args[0], args[0])
            origin[out] = base
            if base.spec == out.spec:
                same[out] = base
                continue
            # What is permuted is copied to be shown in another shape, and that once.
            copied = base in turned and uses[args[0]] > 1
            if base is not args[0] and not copied:
                op, args, kwargs = aten.reshape.default, (base, list(out.spec.shape)), {}
        order = None if out is None else permutation(op, args)
        if out is not None and order is not None:
            base, before = turned.get(args[0], (args[0], None))
            if before is not None:
                order = tuple([before[i] for i in order])
                op, args, kwargs = aten.permute.default, (base, list(order)), {}
            turned[out] = base, order
            if order == tuple(range(len(order))):
                same[out] = base
                continue
        if out is not None and op is aten.flip.default and isinstance(args[0], Var):
            if flipped.get(args[0], (None, ()))[1] == args[1]:
                same[out] = flipped[args[0]][0]
                continue
            flipped[out] = args[0], args[1]
        key = frozen(op, args, kwargs)
        if key in known and all(
            a is not None or b is None for a, b in zip(known[key], eq.outputs, strict=True)
        ):
            pairs = zip(eq.outputs, known[key], strict=True)
            same |= {ours: theirs for ours, theirs in pairs if ours and theirs}
            continue
        known[key] = eq.outputs
        kept.append(Equation(op, args, kwargs, eq.outputs, eq.source))
    outputs = [None if v is None else same.get(v, v) for v in program.outputs]
    return program.with_equations(kept, outputs).live()


_SAME_NUMBERS = _NOTHING | RESHAPES


def laid_out(program: Program) -> set[Var]:
    """Return the variables on whose strides something relies, in other shapes too."""
    found: set[Var] = set()
    for eq in reversed(program.equations):
        if eq.op in _STRIDED or (eq.op in _SAME_NUMBERS and eq.outputs[0] in found):
            found.update(eq.inputs())
    return found
