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


class _Call:
    """An operation on its way into the program, with one result or several."""

    __slots__ = ("args", "kwargs", "op", "out")

    def __init__(self, op: OpOverload, args: Any, kwargs: Any, out: Var) -> None:
        self.op, self.args, self.kwargs, self.out = op, args, kwargs, out


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
                left = self.merged(left, eq.op)
            if left is not None:
                kept.append(left)
        outputs = [None if v is None else self.same.get(v, v) for v in self.program.outputs]
        return self.program.with_equations(kept, outputs).live()

    def merged(self, eq: Equation, op: OpOverload) -> Equation | None:
        """Return what an equation becomes, None if its results are there already."""
        out = eq.outputs[0] if len(eq.outputs) == 1 else None
        if out is not None:
            call = _Call(op, eq.args, eq.kwargs, out)
            steps = (self.idle, self.reshaped, self.permuted, self.turned_back)
            before = next((v for v in (step(call) for step in steps) if v is not None), None)
            if before is not None:
                self.same[out] = before
                return None
            op, eq = call.op, Equation(call.op, call.args, call.kwargs, eq.outputs, eq.source)
        key = frozen(op, eq.args, eq.kwargs)
        known = self.known.get(key)
        if known is not None and all(
            a is not None or b is None for a, b in zip(known, eq.outputs, strict=True)
        ):
            pairs = zip(eq.outputs, known, strict=True)
            self.same |= {ours: theirs for ours, theirs in pairs if ours and theirs}
            return None
        self.known[key] = eq.outputs
        return eq

    # Each returns what the result is, if it is there already, and may change the call.

    def idle(self, c: _Call) -> Var | None:
        x = c.args[0] if c.args else None
        idle = c.op in IDLE and isinstance(x, Var) and x.spec == c.out.spec
        if c.op is aten.view.default:  # other than that, `reshape` takes any strides
            c.op = aten.reshape.default
        return x if idle and c.out not in self.strided else None

    def reshaped(self, c: _Call) -> Var | None:
        if c.op not in RESHAPES or not isinstance(c.args[0], Var):
            return None
        x = c.args[0]
        base = self.origin[c.out] = self.origin.get(x, x)
        if base.spec == c.out.spec:
            return base
        # What is permuted is copied to be shown in another shape, and that once.
        copied = base in self.turned and self.uses[x] > 1
        if base is not x and not copied:
            c.op, c.args, c.kwargs = aten.reshape.default, (base, list(c.out.spec.shape)), {}
        return None

    def permuted(self, c: _Call) -> Var | None:
        order = permutation(c.op, c.args)
        if order is None:
            return None
        base, before = self.turned.get(c.args[0], (c.args[0], None))
        if before is not None:
            order = tuple([before[i] for i in order])
            c.op, c.args, c.kwargs = aten.permute.default, (base, list(order)), {}
        self.turned[c.out] = base, order
        return base if order == tuple(range(len(order))) else None

    def turned_back(self, c: _Call) -> Var | None:
        if c.op is not aten.flip.default or not isinstance(c.args[0], Var):
            return None
        base, dims = self.flipped.get(c.args[0], (None, ()))
        if dims == c.args[1]:
            return base
        self.flipped[c.out] = c.args[0], c.args[1]
        return None


def laid_out(program: Program) -> set[Var]:
    """Return the variables on whose strides something relies, in other shapes too."""
    found: set[Var] = set()
    for eq in reversed(program.equations):
        if eq.op in STRIDED or (eq.op in SAME_NUMBERS and eq.outputs[0] in found):
            found.update(eq.inputs())
    return found
