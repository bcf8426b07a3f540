"""Dropping what changes nothing, and computing equal things once."""

from __future__ import annotations

from typing import Any

from .._programs.aten import IDLE, RESHAPES, SAME_NUMBERS, STRIDED, permutation
from .._programs.numbers import Numbers
from .._programs.program import Equation, Program
from .._programs.values import Var, frozen
from .._torch.names import OpOverload, aten


def merge_copies(program: Program, _: Numbers | None = None) -> Program:
    """Drop what changes nothing, join reshapes and permutations, compute equal things once.

    What is flipped twice is as it was.
    """
    return _Merging(program).run()


class _Merging:
    def __init__(self, program: Program) -> None:
        self.program = program
        #: What takes the place of a variable.
        self.same: dict[Var, Var] = {}
        #: Of what it is the numbers in another shape; an order of the dimensions; flipped.
        self.origin: dict[Var, Var] = {}
        self.turned: dict[Var, tuple[Var, tuple[int, ...]]] = {}
        self.flipped: dict[Var, tuple[Var, Any]] = {}
        self.strided, self.uses = laid_out(program), program.uses()
        self.known: dict[Any, tuple[Var | None, ...]] = {}

    def run(self) -> Program:
        kept: list[Equation] = []
        for eq in self.program.equations:
            left: Equation | None = eq.renamed(lambda x: self.same.get(x, x))
            if left is not None and isinstance(eq.op, OpOverload):
                left = self.merged(left)
            if left is not None:
                kept.append(left)
        outputs = [None if v is None else self.same.get(v, v) for v in self.program.outputs]
        return self.program.with_equations(kept, outputs).live()

    def merged(self, eq: Equation) -> Equation | None:
        """Return what an equation becomes, None if its results are there already."""
        out = eq.result
        for step in (self.idle, self.reshaped, self.permuted, self.turned_back):
            if out is None:
                break
            found = step(eq, out)
            if isinstance(found, Var):
                self.same[out] = found
                return None
            eq = found
        key = frozen(eq.op, eq.args, eq.kwargs)
        known = self.known.get(key)
        if known is not None and all(
            a is not None or b is None for a, b in zip(known, eq.outputs, strict=True)
        ):
            pairs = zip(eq.outputs, known, strict=True)
            self.same |= {ours: theirs for ours, theirs in pairs if ours and theirs}
            return None
        self.known[key] = eq.outputs
        return eq

    # Each returns what the result is, if it is there already, else what the equation becomes.

    def idle(self, eq: Equation, out: Var) -> Var | Equation:
        x = eq.args[0] if eq.args else None
        idle = eq.op in IDLE and out not in self.strided
        if idle and isinstance(x, Var) and x.spec == out.spec:
            return x
        if eq.op is aten.view.default:  # other than that, `reshape` takes any strides
            return _other(eq, aten.reshape.default, *eq.args)
        return eq

    def reshaped(self, eq: Equation, out: Var) -> Var | Equation:
        if eq.op not in RESHAPES or not isinstance(eq.args[0], Var):
            return eq
        x = eq.args[0]
        base = self.origin[out] = self.origin.get(x, x)
        if base.spec == out.spec:
            return base
        # What is permuted is copied to be shown in another shape, and that once.
        copied = base in self.turned and self.uses[x] > 1
        if base is x or copied:
            return eq
        return _other(eq, aten.reshape.default, base, list(out.spec.shape))

    def permuted(self, eq: Equation, out: Var) -> Var | Equation:
        order = permutation(eq.op, eq.args)
        if order is None:
            return eq
        base, before = self.turned.get(eq.args[0], (eq.args[0], None))
        if before is not None:
            order = tuple([before[i] for i in order])
            eq = _other(eq, aten.permute.default, base, list(order))
        self.turned[out] = base, order
        return base if order == tuple(range(len(order))) else eq

    def turned_back(self, eq: Equation, out: Var) -> Var | Equation:
        if eq.op is not aten.flip.default or not isinstance(eq.args[0], Var):
            return eq
        base, dims = self.flipped.get(eq.args[0], (None, ()))
        if base is not None and dims == eq.args[1]:
            return base
        self.flipped[out] = eq.args[0], eq.args[1]
        return eq


def _other(eq: Equation, op: OpOverload, *args: Any) -> Equation:
    return Equation(op, args, {}, eq.outputs, eq.source)


def laid_out(program: Program) -> set[Var]:
    """Return the variables on whose strides something relies, in other shapes too."""
    found: set[Var] = set()
    for eq in reversed(program.equations):
        if eq.op in STRIDED or (eq.op in SAME_NUMBERS and eq.outputs[0] in found):
            found.update(eq.inputs())
    return found
