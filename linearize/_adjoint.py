"""Floor 3: checking that two linear programs are adjoint.

One random pair (u, v) tells two programs that are not adjoint apart, but for a set of pairs of
measure zero: Re⟨u, J·v⟩ = Re⟨Jᴴ·u, v⟩, in floating point within what rounding amounts to.

User code costs what it costs, and some Functions part from their derivative on purpose
(straight-through estimators). `check_built_in` calls none: each opaque operation is replaced
by a map b ⟨a, ·⟩ in one program and by its adjoint a ⟨b, ·⟩ in the other, so that everything
around it is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch

from ._execute import Executor
from ._linearity import tolerance
from ._program import Equation, Operation, Program, Var, op_name
from ._space import TensorSpec
from .errors import AdjointError

#: A linear map on flat lists of tensors; None is zero.
Map: TypeAlias = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor | None]]


class _RankOne(Operation):
    """The map b Re⟨a, ·⟩, which stands for an opaque operation."""

    __slots__ = ("a", "b", "name")
    may_alias = False

    def __init__(
        self, a: Sequence[torch.Tensor | None], b: Sequence[torch.Tensor | None], name: str
    ) -> None:
        self.a, self.b = a, b
        self.name = name

    def __call__(self, *args: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Apply the map."""
        pairs = zip(self.a, args, strict=True)
        total = sum((_real_dot(a, x) for a, x in pairs if a is not None and x is not None), 0.0)
        return [None if b is None else b * total for b in self.b]


class _StandIns:
    """Replaces opaque operations; those of one node are adjoint to each other."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.vectors: dict[Any, torch.Tensor] = {}

    def vector(self, node: Any, place: tuple[bool, int], spec: TensorSpec) -> torch.Tensor:
        key = (id(node), place)
        if key not in self.vectors:
            size = math.sqrt(max(math.prod(spec.shape), 1))
            self.vectors[key] = spec.random(self.generator) / size
        return self.vectors[key]

    def placed(self, program: Program, *, backward: bool) -> Program:
        """Return a program without user code."""
        return program.with_equations([self._placed(eq, backward) for eq in program.equations])

    def _placed(self, eq: Equation, backward: bool) -> Equation:
        if not isinstance(eq.op, Operation):
            return eq
        node = getattr(eq.op, "node", eq.op)

        def vectors(variables: Iterable[Any], side: bool) -> list[torch.Tensor | None]:
            return [
                self.vector(node, (side, i), v.spec) if isinstance(v, Var) else None
                for i, v in enumerate(variables)
            ]

        # A backward takes what belongs to the node's outputs, a jvp what belongs to its inputs.
        a, b = vectors(eq.args, not backward), vectors(eq.outputs, backward)
        op = _RankOne(a, b, f"a stand-in for {op_name(eq.op)}")
        return Equation(op, eq.args, {}, eq.outputs, eq.source)


def check_built_in(
    pullback: Program, pushforward: Program, transposed: Callable[[Program], Program]
) -> None:
    """Check that two programs are adjoint, except for the opaque operations in them.

    Parameters
    ----------
    pullback, pushforward
        The second is the transpose of the first.
    transposed
        What made it so, asked again about single equations to find the one at fault.

    Raises
    ------
    AdjointError
        Naming the first operation at which they part.
    """
    generator = torch.Generator().manual_seed(3)
    stand_ins = _StandIns(generator)
    back = stand_ins.placed(pullback, backward=True) if pullback.is_opaque() else pullback
    forth = stand_ins.placed(pushforward, backward=False) if pullback.is_opaque() else pushforward
    off = parting(
        Executor(back),
        Executor(forth),
        _specs(pullback),
        _specs(pushforward),
        generator,
        lambda: (back, forth),
    )
    if off is not None:
        raise AdjointError(
            f"pushforward and pullback are not adjoint ({_percent(off)}): "
            f"{_first_at_fault(pullback, transposed)}; please report this"
        )


def check_maps(
    pullback: Map,
    pushforward: Map,
    cotangents: Sequence[TensorSpec],
    tangents: Sequence[TensorSpec],
    programs: Callable[[], tuple[Program, Program]],
    transposed: Callable[[Program], Program],
) -> None:
    """Check that two products are adjoint, with the user code in them.

    Parameters
    ----------
    pullback, pushforward
        The products.
    cotangents, tangents
        What they take.
    programs
        Gives the two programs with nothing missing, to find what is at fault.
    transposed
        As of `check_built_in`.

    Raises
    ------
    AdjointError
        If they are not.
    """
    generator = torch.Generator().manual_seed(4)
    off = parting(pullback, pushforward, cotangents, tangents, generator, programs)
    if off is not None:
        fault = _name_fault(*programs(), transposed)
        raise AdjointError(f"jvp_fn and vjp_fn are not adjoint ({_percent(off)}): {fault}")


def _name_fault(
    pullback: Program,
    pushforward: Program,
    transposed: Callable[[Program], Program],
) -> str:
    """Return which custom Function or operation makes two programs part, the first in f's order.

    Calls each custom Function's methods once more.
    """
    backwards = {
        id(eq.op.node): eq
        for eq in pullback.equations
        if isinstance(eq.op, Operation) and hasattr(eq.op, "node")
    }
    generator = torch.Generator().manual_seed(5)

    def numbers(args: Sequence[Any], used: Sequence[Any]) -> list[torch.Tensor | None]:
        """Return random arguments; what the other direction does not give back is zero."""
        return [
            None if not isinstance(a, Var) else a.spec.random(generator) if y else a.spec.zeros()
            for a, y in zip(args, used, strict=True)
        ]

    for eq in pushforward.equations:
        node = getattr(eq.op, "node", None) if isinstance(eq.op, Operation) else None
        other = backwards.get(id(node))
        if node is None or other is None:
            continue
        v, u = numbers(eq.args, other.outputs), numbers(other.args, eq.outputs)
        jv, jtu = eq.op(*v), other.op(*u)
        specs = [a.spec for a in (*eq.args, *other.args) if isinstance(a, Var)]
        if _off(u, jv, v, jtu) > _limit(specs):
            return (
                f"the first to part is {op_name(eq.op)}, which is not the adjoint of "
                f"{op_name(other.op)}"
            )
    return _first_at_fault(pullback, transposed)


def parting(
    pullback: Map,
    pushforward: Map,
    cotangents: Sequence[TensorSpec],
    tangents: Sequence[TensorSpec],
    generator: torch.Generator,
    programs: Callable[[], tuple[Program, Program]],
) -> float | None:
    """Return by how much two maps miss being adjoint, None if rounding explains it.

    Relative to ‖u‖·‖J·v‖ + ‖Jᴴ·u‖·‖v‖. Where numbers are not finite nothing can be said.
    """
    u = [spec.random(generator) for spec in cotangents]
    v = [spec.random(generator) for spec in tangents]
    with torch.inference_mode(False), torch.no_grad():
        jv, jtu = pushforward(v), pullback(u)
        off = _off(u, jv, v, jtu)
        if not off > _limit([*cotangents, *tangents]):
            return None
        # Where large terms cancel, rounding alone may be as large: the same once more with
        # arguments that differ by some digits shows how large.
        jv_near, jtu_near = pushforward(_nudged(v, generator)), pullback(_nudged(u, generator))
        scale = _scale(u, jv) + _scale(v, jtu)
        noise = abs(_dot(u, jv) - _dot(u, jv_near)) + abs(_dot(v, jtu) - _dot(v, jtu_near))
        back, forth = programs()
        noise += _lost(back, u) * math.sqrt(_dot(v, v)) + _lost(forth, v) * math.sqrt(_dot(u, u))
    return None if not math.isfinite(noise) or off * scale <= 100 * noise else off


def _lost(program: Program, arguments: Sequence[torch.Tensor]) -> float:
    """Return the last digit of the largest number that a program computes on its way."""
    values = [v for eq in program.equations for v in eq.outputs if v is not None]
    specs = [v.spec for v in values]
    results = Executor(Program(program.inputs, program.equations, values, specs))(arguments)
    return max(
        (
            float(t.abs().max()) * torch.finfo(t.dtype).eps
            for t in results
            if t is not None and t.numel() and (t.is_floating_point() or t.is_complex())
        ),
        default=0.0,
    )


def _first_at_fault(pullback: Program, transposed: Callable[[Program], Program]) -> str:
    generator = torch.Generator().manual_seed(6)
    for eq in reversed(pullback.equations):  # the pushforward's order
        if isinstance(eq.op, Operation):
            continue
        alone, forth = _alone(eq), transposed(_alone(eq))
        maps = Executor(alone), Executor(forth)
        specs = _specs(alone), _specs(forth)
        if parting(*maps, *specs, generator, lambda: (alone, forth)) is not None:
            return f"the first to part is {eq.name}, from {eq.source or 'the graph'}"
    return "each of its operations by itself is right, together they are not"


def _alone(eq: Equation) -> Program:
    """Return a program of one equation."""
    inputs = list(dict.fromkeys(eq.inputs()))
    results = [v for v in eq.outputs if v is not None]
    return Program(inputs, [eq], results, [v.spec for v in results], eq.name)


def _specs(program: Program) -> list[TensorSpec]:
    return [v.spec for v in program.inputs]


def _limit(specs: Iterable[TensorSpec]) -> float:
    return max((tolerance(spec.dtype) for spec in specs), default=1.0)


Tensors: TypeAlias = Sequence[torch.Tensor | None]


def _off(u: Tensors, jv: Tensors, v: Tensors, jtu: Tensors) -> float:
    scale = _scale(u, jv) + _scale(v, jtu)
    return abs(_dot(u, jv) - _dot(v, jtu)) / scale if scale else 0.0


def _scale(a: Tensors, b: Tensors) -> float:
    return math.sqrt(_dot(a, a)) * math.sqrt(_dot(b, b))


def _dot(a: Tensors, b: Tensors) -> float:
    pairs = zip(a, b, strict=True)
    return sum(float(_real_dot(x, y)) for x, y in pairs if x is not None and y is not None)


def _real_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return Re⟨a, b⟩ in double precision."""
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    return torch.dot(a.reshape(-1).double(), b.reshape(-1).double())


def _nudged(tensors: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    return [
        t + 4 * torch.finfo(t.dtype).eps * t * TensorSpec.of(t).random(generator) for t in tensors
    ]


def _percent(off: float) -> str:
    return f"they differ by {off:.1e} of their size on a random pair"
