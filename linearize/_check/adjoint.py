"""Checking that two linear programs are adjoint.

One random pair (u, v) tells two programs that are not adjoint apart, but for a set of pairs of
measure zero: Re⟨u, J·v⟩ = Re⟨Jᴴ·u, v⟩, in floating point within what rounding amounts to.

One half of such a pair is computed anyhow: a `Proof` takes the first product J·v that a user
asks for, before the user has it. Where that tells nothing `check_built_in` runs both programs.

User code costs what it costs, and some Functions part from their derivative on purpose
(straight-through estimators): neither calls any for the check. The programs are cut at opaque
operations, and what goes in and comes out there counts as more arguments and results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch

from .._execute.binding import Binding, BoundProgram
from .._execute.executor import Executor, runner
from .._programs.numbers import Numbers
from .._programs.program import Equation, Operation, Program, op_name
from .._programs.residuals import Residual
from .._programs.values import Var
from .._spaces.balance import Balance, Tensors, Total, eps_of, inner, over, weights_of
from .._spaces.compare import close, roughly, tolerance
from .._spaces.space import TensorSpec
from ..errors import AdjointError, NotLinearError

#: A linear map on flat lists of tensors; None is zero.
Map: TypeAlias = Callable[[Sequence[Any]], Tensors]
Specs: TypeAlias = Sequence[TensorSpec | None]
#: What makes a program's transpose.
Transposed: TypeAlias = Callable[[Program, Numbers], Program]


def rounding_limit(*programs: BoundProgram | Program) -> float:
    """Return the relative error that may be rounding, in the coarsest dtype that occurs."""
    dtypes = {v.spec.dtype for p in programs for v in p.inputs}
    dtypes |= {v.spec.dtype for p in programs for eq in p.equations for v in eq.outputs if v}
    return max(map(tolerance, dtypes), default=1.0)


def _coarsest(*programs: BoundProgram) -> float:
    values = [v for p in programs for eq in p.equations for v in (*eq.outputs, *p.inputs) if v]
    return max((eps_of(v.spec.dtype) for v in values), default=0.0)


def node_of(op: Any) -> Any:
    """Return the graph node whose code, the user's, an operation calls; None for other ones."""
    return getattr(op, "node", None) if isinstance(op, Operation) else None


# -- with numbers of its own ------------------------------------------------------------------


class RankOne(Operation):
    """The map b Re⟨a, ·⟩, which stands for an opaque operation."""

    __slots__ = ("a", "b", "name")
    may_alias = False

    def __init__(self, a: Tensors, b: Tensors, name: str) -> None:
        self.a, self.b = a, b
        self.name = name

    def __call__(self, *args: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Apply the map."""
        total = inner(self.a, args)
        return [None if b is None else b * total for b in self.b]


class StandIns:
    """Maps of rank one for opaque operations; those of one node are adjoint to each other."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(5)
        self._vectors: dict[Any, torch.Tensor] = {}

    def of(
        self, node: Any, outputs: Specs, inputs: Specs, name: str, *, backward: bool
    ) -> RankOne:
        """Return what stands for the `backward` of a node, or for its `jvp`."""
        sides = self._some((id(node), "out"), outputs), self._some((id(node), "in"), inputs)
        return RankOne(*(sides if backward else sides[::-1]), f"a stand-in for {name}")

    def placed(self, program: BoundProgram, *, backward: bool) -> BoundProgram:
        """Return a program without user code."""

        def placed(eq: Equation) -> Any:
            node = node_of(eq.op)
            if node is None:
                return eq.op
            specs = [
                [v.spec if isinstance(v, Var) else None for v in side]
                for side in (eq.args, eq.outputs)
            ]
            # A backward takes what belongs to the node's outputs, a jvp what to its inputs.
            outputs, inputs = specs if backward else specs[::-1]
            return self.of(node, outputs, inputs, op_name(eq.op), backward=backward)

        return program.with_opaque(placed)

    def _some(self, side: Any, specs: Specs) -> Tensors:
        return [None if s is None else self._vector((side, i), s) for i, s in enumerate(specs)]

    def _vector(self, key: Any, spec: TensorSpec) -> torch.Tensor:
        if key not in self._vectors:
            self._vectors[key] = spec.random(self._generator) / math.sqrt(max(spec.numel, 1))
        return self._vectors[key]


def check_built_in(
    pullback: BoundProgram, pushforward: BoundProgram, transposed: Transposed
) -> None:
    """Check that two programs are adjoint, except for the opaque operations in them.

    Each opaque operation is replaced by a map b ⟨a, ·⟩ in one program and by its adjoint a ⟨b, ·⟩
    in the other. `transposed` made the second program of the first: asked again about single
    equations it tells the one at fault, which the error names.
    """
    generator = torch.Generator().manual_seed(3)
    stand_ins = StandIns()
    back = stand_ins.placed(pullback, backward=True)
    forth = stand_ins.placed(pushforward, backward=False)
    off = _parting_of(back, forth, generator)
    if off is not None:
        raise AdjointError(
            f"pushforward and pullback are not adjoint ({_by(off)}): "
            f"{_first_at_fault(pullback, transposed)}; please report this"
        )


def check_maps(
    pullback: Map,
    pushforward: Map,
    cotangents: BoundProgram,
    tangents: BoundProgram,
    programs: Callable[[], tuple[BoundProgram, BoundProgram]],
    transposed: Transposed,
    *,
    thorough: bool,
    total: Total | None = None,
    seed: int = 4,
) -> None:
    """Check that two products are linear and adjoint, with the user code in them.

    Parameters
    ----------
    cotangents, tangents
        The programs of pullback and pushforward, which say what they take.
    programs
        Gives the two programs with nothing missing, to find what is at fault.
    transposed
        As of `check_built_in`.
    thorough
        Whether to spend more calls of user code: on a pair in which small columns count as much
        as large ones, and on arguments of other magnitudes.
    total
        Sums over the ranks, where the products communicate; other magnitudes are not tried then.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = pullback, pushforward
    off = parting(*maps, generator, programs, cotangents, tangents, columns=thorough, total=total)
    alone = total is None
    for product, program, name in zip(maps, (cotangents, tangents), _NAMES, strict=True):
        if thorough and alone and any(node_of(eq.op) is not None for eq in program.equations):
            _check_linear(product, program, name, generator)
    if off is not None:
        fault = _name_fault(*programs(), transposed, total)
        raise AdjointError(f"jvp_fn and vjp_fn are not adjoint ({_by(off)}): {fault}")


_NAMES = "vjp_fn", "jvp_fn"


def _check_linear(
    product: Map, program: BoundProgram, name: str, generator: torch.Generator
) -> None:
    """Raise if a product with user code in it is not linear, as where gradients are clipped."""
    arguments = [v.spec.random(generator) for v in program.inputs]
    culprit = _not_linear(product, arguments)
    if culprit is None:
        return
    for eq in program.equations:
        if node_of(eq.op) is None:
            continue
        given = [a.spec.random(generator) if isinstance(a, Var) else None for a in eq.args]
        if _not_linear(partial(_called, eq.op), given) is not None:
            name = op_name(eq.op)
            break
    raise NotLinearError(
        f"{name} is not linear: for arguments {culprit:.0e} times as large its result is not as "
        "much larger, as where gradients are clipped or rounded"
    )


def _not_linear(product: Map, arguments: Tensors) -> float | None:
    """Return a factor that a map does not let through, None if there is none.

    User code may solve equations to a tolerance: only what is far from linear is told.
    """
    with torch.inference_mode(False), torch.no_grad():
        first = product([None if t is None else t.clone() for t in arguments])
        for factor in (2.0**10, -(2.0**20)):
            scaled = product([None if t is None else t * factor for t in arguments])
            for a, b in zip(scaled, first, strict=True):
                zero = torch.zeros((), dtype=torch.float64)
                a, b = (zero if t is None else t for t in (a, b))
                a, b = torch.broadcast_tensors(a, b * factor)
                finite = bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())
                if finite and not close(a, b, roughly):
                    return factor
    return None


def parting(
    pullback: Map,
    pushforward: Map,
    generator: torch.Generator,
    programs: Callable[[], tuple[BoundProgram, BoundProgram]],
    of_pullback: BoundProgram,
    of_pushforward: BoundProgram,
    *,
    columns: bool = False,
    total: Total | None = None,
) -> float | None:
    """Return by how much two maps miss being adjoint, None if rounding explains it.

    Where numbers are not finite nothing can be said.

    Parameters
    ----------
    programs
        Gives the programs of both with nothing missing, to see how much rounding amounts to.
    of_pullback, of_pushforward
        Programs that say what they take.
    columns
        Whether to try another pair too, in which small columns count as much as large ones, as
        small rows do anyhow.
    total
        Sums over the ranks, which all come to the same conclusion then.
    """
    u = [v.spec.random(generator) for v in of_pullback.inputs]
    v = [v.spec.random(generator) for v in of_pushforward.inputs]
    limit = rounding_limit(of_pullback, of_pushforward)
    with torch.inference_mode(False), torch.no_grad():
        for balance, arguments, results in balances(pullback, pushforward, u, v, columns=columns):
            if total is not None:
                limit = _mean(total, limit)
                balance.sum_up(total)
            if balance.holds(limit):
                continue
            noise = _noise(programs(), generator, arguments, results)
            factor = min(100.0, 0.05 / max(_coarsest(*programs()), 1e-300))
            if total is not None:
                factor = _mean(total, factor)
                (noise,) = total([noise])
            if math.isfinite(noise) and abs(balance.total) > factor * noise:
                return balance.off
    return None


def _mean(total: Total, number: float) -> float:
    whole, count = total([number, 1.0])
    return whole / count


#: A cotangent and a tangent, or what the two maps make of them.
_Pair: TypeAlias = tuple[Tensors, Tensors]


def balances(
    pullback: Map, pushforward: Map, u: Tensors, v: Tensors, *, columns: bool
) -> Iterator[tuple[Balance, _Pair, _Pair]]:
    """Yield Re⟨u, J·v⟩ - Re⟨Jᴴ·u, v⟩ for u and v scaled so that entries of all sizes count alike.

    With it come the arguments and the results of the two maps. With `columns` there is a second
    pair, in which v is scaled too, not u alone.
    """
    tangent, sizes = v, [None if t is None else torch.ones_like(t) for t in v]
    for again in (True, False) if columns else (False,):
        jv = pushforward(tangent)
        weights = weights_of(jv, u)
        cotangent = over(u, weights)
        jtu = pullback(cotangent)
        balance = Balance()
        balance.add(1, u, over(jv, weights))
        balance.add(-1, over(jtu, sizes), v)
        yield balance, (cotangent, tangent), (jtu, jv)
        if again:
            sizes = weights_of(jtu, v)
            tangent = over(v, sizes)


def _noise(
    programs: tuple[BoundProgram, BoundProgram],
    generator: torch.Generator,
    arguments: _Pair,
    results: _Pair,
) -> float:
    """Return how much rounding may amount to in the two inner products.

    Where large terms cancel, or a matrix is close to singular, that may be much: with all numbers
    different in their last digits it is seen how much.
    """
    (back, forth), (u, v), (jtu, jv) = programs, arguments, results
    noise = _lost(back, u) * math.sqrt(inner(v, v)) + _lost(forth, v) * math.sqrt(inner(u, u))
    for _ in range(2):
        jv_near = runner(_nudged_residuals(forth, generator))(_nudged(v, generator))
        jtu_near = runner(_nudged_residuals(back, generator))(_nudged(u, generator))
        noise += abs(inner(u, jv) - inner(u, jv_near))
        noise += abs(inner(jtu, v) - inner(jtu_near, v))
    return noise


def _lost(program: BoundProgram, arguments: Sequence[Any]) -> float:
    """Return the last digit of the largest number that a program computes on its way."""
    values = [v for eq in program.equations for v in eq.outputs if v is not None]
    specs = [v.spec for v in values]
    whole = Program(program.inputs, program.equations, values, specs)
    results = Executor(whole)(arguments, program.binding)
    return max(
        (float(t.abs().max()) * eps_of(t.dtype) for t in results if t is not None and t.numel()),
        default=0.0,
    )


def _nudged(tensors: Iterable[Any], generator: torch.Generator) -> list[torch.Tensor]:
    return [_near(t, generator) for t in tensors]


def _nudged_residuals(program: BoundProgram, generator: torch.Generator) -> BoundProgram:
    near = [
        Residual(_near(r.tensor, generator), r.source) if eps_of(r.tensor.dtype) else r
        for r in program.binding.residuals
    ]
    return BoundProgram(program.program, Binding(near, program.binding.ops))


def _near(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return numbers that differ from others by some of their last digits."""
    return t + 4 * eps_of(t.dtype) * t * TensorSpec.of(t).random(generator)


def _by(off: float) -> str:
    return f"they differ by {off:.1e} of their size on a random pair"


# -- who is at fault --------------------------------------------------------------------------


def _name_fault(
    pullback: BoundProgram,
    pushforward: BoundProgram,
    transposed: Transposed,
    total: Total | None,
) -> str:
    """Return which custom Function or operation makes two programs part, the first in f's order.

    Calls each custom Function's methods once more.
    """
    found: Iterable[_Measured] = _custom_balances(pullback, pushforward)
    if total is not None:
        found = _everywhere(list(found), total)
    for equation, other, pairs, limit in found:
        if not all(b.holds(limit) for b in pairs):
            return (
                f"the first to part is {op_name(equation.op)}, which is not the adjoint of "
                f"{op_name(other.op)}"
            )
    return _first_at_fault(pullback, transposed)


#: A Function's two operations, what was balanced of them, and what rounding may be.
_Measured: TypeAlias = tuple[Equation, Equation, Iterable[Balance], float]


def _custom_balances(pullback: BoundProgram, pushforward: BoundProgram) -> Iterator[_Measured]:
    """Yield what the methods of each custom Function give for random pairs."""
    backwards = {id(node_of(eq.op)): eq for eq in pullback.equations if node_of(eq.op) is not None}
    generator = torch.Generator().manual_seed(5)

    def numbers(args: Sequence[Any], used: Sequence[Any]) -> list[torch.Tensor | None]:
        """Return random arguments; what the other direction does not give back is zero."""
        return [
            None if not isinstance(a, Var) else a.spec.random(generator) if y else a.spec.zeros()
            for a, y in zip(args, used, strict=True)
        ]

    for eq in pushforward.equations:
        node = node_of(eq.op)
        other = None if node is None or eq.communicates else backwards.get(id(node))
        if other is None:
            continue
        v, u = numbers(eq.args, other.outputs), numbers(other.args, eq.outputs)
        limit = max(rounding_limit(_alone(eq)), rounding_limit(_alone(other)))
        maps = partial(_called, other.op), partial(_called, eq.op)
        yield eq, other, (b for b, *_ in balances(*maps, u, v, columns=True)), limit


def _everywhere(found: Sequence[_Measured], total: Total) -> list[_Measured]:
    """Return balances of all ranks together, where each has as many custom Functions.

    One may communicate by its own methods, and its two sides are equal in the sum only.
    """
    # All are called on each rank, whatever is found, as they may wait for each other.
    own = [(eq, other, list(pairs), limit) for eq, other, pairs, limit in found]
    ranks, count, squares = total([1.0, len(own), len(own) ** 2])
    if ranks * squares == count**2:
        for balance in (b for _, _, pairs, _ in own for b in pairs):
            balance.sum_up(total)
    return list(own)


def _called(op: Callable[..., Tensors], arguments: Sequence[Any]) -> Tensors:
    return op(*arguments)


def _first_at_fault(pullback: BoundProgram, transposed: Transposed) -> str:
    generator = torch.Generator().manual_seed(6)
    numbers = pullback.numbers()
    for eq in reversed(pullback.equations):  # the pushforward's order
        if isinstance(eq.op, Operation):
            continue
        alone = BoundProgram.of(_alone(eq), numbers)
        if _parting_of(alone, alone.made(transposed), generator) is not None:
            return f"the first to part is {eq.name}, from {eq.source or 'the graph'}"
    return "each of its operations by itself is right, together they are not"


def _parting_of(
    back: BoundProgram, forth: BoundProgram, generator: torch.Generator
) -> float | None:
    maps = runner(back), runner(forth)
    return parting(*maps, generator, lambda: (back, forth), back, forth)


def _alone(eq: Equation) -> Program:
    """Return a program of one equation."""
    inputs = list(dict.fromkeys(eq.inputs()))
    results = [v for v in eq.outputs if v is not None]
    return Program(inputs, [eq], results, [v.spec for v in results], eq.name)
