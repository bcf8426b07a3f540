"""Turning a linear program around.

`transpose` walks the equations backwards. Each is transposed by its rule (`rules`), else by
PyTorch's own derivative of that one operation, recorded in its turn, else by transposing
what it decomposes into. A custom Function's `backward` becomes its `jvp` and the other way
round. A custom operation whose author gave only one direction is resolved before execution:
the given one is recorded and transposed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch.autograd.graph import get_gradient_edge

from .._capture.collectives import Collective
from .._capture.custom_operations import CustomBackward, CustomJvp
from .._capture.graph import Graph
from .._capture.signature import shared_memory
from .._programs.numbers import Numbers
from .._programs.origins import Origin, Saved
from .._programs.program import Emitter, Equation, Program
from .._programs.values import Constant, Value, Var
from .._record.function import record_function
from .._record.node_programs import NODE_PROGRAMS, NodeProgram, dense
from .._record.pullback import record_pullback
from .._record.stretch import NodeBackward
from .._spaces.nested import map_leaves
from .._spaces.space import TensorSpec
from .._torch.names import aten, decompositions
from ..errors import LinearizeError, UnsupportedError
from . import kernel_rules as kernel_rules  # registers its rules
from . import norm_rules as norm_rules  # registers its rules
from .rules import Cotangents, Result, fit, rule_for, rule_of_several


def transpose(program: Program, numbers: Numbers, name: str = "pushforward") -> Program:
    """Return the transpose of a linear program; raise if an operation has none.

    `numbers` are those that the program reads, and receive those that the transpose reads.
    """
    e = Emitter(numbers=numbers, fixed=program.fixed)
    inputs = [Var(spec) for spec in program.specs]
    cotangents: dict[Var, Var] = {}

    def add(v: Var, ct: Var) -> None:
        known = cotangents.get(v)
        cotangents[v] = ct if known is None else e.emit(aten.add.Tensor, (known, ct), v.spec)

    for v, ct in zip(program.outputs, inputs, strict=True):
        if v is not None:
            add(v, ct)
    masks = _masks(program, numbers)
    for eq in reversed(program.equations):
        cts = [None if v is None else cotangents.pop(v, None) for v in eq.outputs]
        if any(cts) or eq.communicates:
            e.source = eq.source
            scales = eq.op in _SCALINGS and len(eq.inputs()) == 1
            mask = masks.get(eq.outputs[0]) if scales else None
            pairs = _transposed(e, eq, cts) if mask is None else _kept_zero(e, eq, cts, mask)
            for v, ct in pairs:
                add(v, ct)
    outputs = [cotangents.get(v) for v in program.inputs]
    specs = [v.spec for v in program.inputs]
    return Program(inputs, e.equations, outputs, specs, name, e.fixed).live()


V = TypeVar("V", bound=Value)
Mask: TypeAlias = Callable[[Emitter, Var], Var]

_SCALINGS = frozenset({aten.mul.Tensor, aten.div.Tensor})
_PLAIN = frozenset({aten.mul.Scalar, aten.div.Scalar, aten.neg.default})


def _masks(program: Program, numbers: Numbers) -> dict[Var | None, Mask]:
    """Return what sets entries to zero in values that are read by nothing else.

    PyTorch divides by zero and drops the result afterwards. The transpose drops first, and
    zero divided by zero is not zero: what a scaling gives must be dropped once more.
    """
    count = program.uses()
    masks: dict[Var | None, Mask] = {}
    for eq in reversed(program.equations):
        out = eq.outputs[0]
        inputs = eq.inputs()
        if len(inputs) != 1 or count[inputs[0]] != 1 or out is None or inputs[0].spec != out.spec:
            continue
        if _is_mask(eq, numbers):
            masks[inputs[0]] = functools.partial(_masked, eq)
        elif out in masks and eq.op in _SCALINGS | _PLAIN:
            masks[inputs[0]] = masks[out]
    return masks


def _kept_zero(e: Emitter, eq: Equation, cts: Cotangents, mask: Mask) -> list[tuple[Var, Var]]:
    """Transpose a scaling, and drop from what it gives what was dropped before."""
    (out,), (x,) = eq.outputs, eq.inputs()
    assert out is not None
    wide = Var(out.spec)  # the mask comes before broadcasts and casts are undone
    args = tuple(wide if a is x else a for a in eq.args)
    whole = Equation(eq.op, args, eq.kwargs, eq.outputs, eq.source)
    return [(x, fit(e, mask(e, ct), x.spec)) for _, ct in _transposed(e, whole, cts)]


def _is_mask(eq: Equation, numbers: Numbers) -> bool:
    """Whether an equation does nothing but set entries of its one variable to zero."""
    if eq.op is aten.masked_fill.Scalar:
        return bool(eq.args[2] == 0)
    if eq.op not in (aten.where.self, aten.masked_fill.Tensor):
        return False
    others = [x for x in eq.args if isinstance(x, Constant) and x.spec.dtype != torch.bool]
    return isinstance(eq.args[eq.op is aten.masked_fill.Tensor], Constant) and all(
        _is_always_zero(c, numbers) for c in others
    )


def _is_always_zero(c: Constant, numbers: Numbers) -> bool:
    """Whether a constant is zero at every point for which the program may be used."""
    return (c.origin.static or not c.origin.portable) and not bool(numbers[c].any())


def _masked(mask: Equation, e: Emitter, v: Var) -> Var:
    """Emit a mask of another value."""
    args = tuple(v if isinstance(a, Var) else a for a in mask.args)
    return e.emit(mask.op, args, v.spec, **mask.kwargs)


def _transposed(e: Emitter, eq: Equation, cts: Cotangents) -> list[tuple[Var, Var]]:
    own = rule_for(eq.op)
    if own is not None:
        mark = len(e.equations)
        result = own(e, eq, cts)
        if result is not None:
            return list(result)
        del e.equations[mark:]
    return _by_autograd(e, eq, cts)


# -- opaque operations ------------------------------------------------------------------------


class TransposedNode(NodeBackward):
    """The transpose of a `NodeBackward`, not known until it is resolved."""

    __slots__ = ()

    @property
    def name(self) -> str:  # type: ignore[override]
        """Printable name."""
        return f"transposed {self.label}"


@rule_of_several(CustomBackward, CustomJvp, Collective, NodeBackward)
def _turned(e: Emitter, eq: Equation, cts: Cotangents) -> Result:
    """Emit the other direction of an opaque operation."""
    op: Any = eq.op
    if isinstance(op, CustomBackward):
        wanted = [isinstance(a, Var) for a in eq.args]
        turned: Any = CustomJvp(op.node, wanted)
    elif isinstance(op, CustomJvp):
        turned = CustomBackward(op.node)
    elif isinstance(op, Collective):
        turned = op.turned()
    else:
        kind = NodeBackward if isinstance(op, TransposedNode) else TransposedNode
        turned = kind(op.node, op.reason)
    outs = [Var(a.spec) if isinstance(a, Var) else None for a in eq.args]
    e.add(turned, tuple(cts), outs)
    return [(a, out) for a, out in zip(eq.args, outs, strict=True) if isinstance(a, Var) and out]


# -- operations without a rule ----------------------------------------------------------------


def _by_autograd(e: Emitter, eq: Equation, cts: Cotangents) -> list[tuple[Var, Var]]:
    """Transpose one operation by recording PyTorch's own derivative of it.

    That is done once for all such operations, with arguments of the same kind.
    """
    variables, constants = _distinct(eq.inputs()), _distinct(eq.constants())
    given = [ct for ct in cts if ct is not None]
    key = _kind(eq, cts, e.numbers)
    known = NODE_PROGRAMS.find(key)
    if known is None:
        own = Numbers()
        stand_ins = {c: Constant(c.spec, Saved(0, "given", i)) for i, c in enumerate(constants)}
        own.put(stand_ins.values(), e.numbers.residuals(constants))
        program = _recorded_transpose(eq.renamed(lambda x: stand_ins.get(x, x)), cts, own)
        outputs = [None if v is None else (v, dense(v.spec.shape)) for v in program.outputs]
        known = NodeProgram.of(0, program.inputs, program.equations, outputs)
        if known is None or program.fixed:  # it holds at this point only
            theirs = {s.origin: c for c, s in stand_ins.items()}
            moved = {c: theirs.get(c.origin) or e.constant(own[c]) for c in program.constants}
            return _fitted(e, variables, e.inline(program, given, moved))
        NODE_PROGRAMS.keep(key, known)
    mine = {id(e.numbers[c]): c for c in constants}

    def adopt(t: torch.Tensor, origin: Origin) -> Constant:
        return mine.get(id(t)) or e.numbers.constant(t, e.source, origin)

    with torch.inference_mode(False), torch.no_grad():
        written = known.write(
            e,
            given,
            lambda o: e.numbers[constants[o.position or 0]],
            lambda o: constants[o.position or 0].origin,
            adopt,
        )
    return _fitted(e, variables, [None if g is None else g.var for g in written])


def _distinct(values: Sequence[V]) -> list[V]:
    return list(dict.fromkeys(values))


def _fitted(
    e: Emitter, variables: Sequence[Var], results: Sequence[Var | None]
) -> list[tuple[Var, Var]]:
    pairs = zip(variables, results, strict=True)
    return [(v, fit(e, got, v.spec)) for v, got in pairs if got is not None]


def _kind(eq: Equation, cts: Cotangents, numbers: Numbers) -> Hashable:
    """Return what the transpose of an operation depends on besides numbers."""
    variables, constants = _distinct(eq.inputs()), _distinct(eq.constants())

    def kind(x: Any) -> Any:
        if isinstance(x, Var):
            return variables.index(x), x.spec
        if isinstance(x, Constant):
            t = numbers[x]
            return constants.index(x), x.spec, t.stride(), t.is_conj(), t.is_neg()
        if isinstance(x, (list, tuple)):
            return tuple(map(kind, x))
        return type(x), repr(x)

    keywords = tuple([(k, kind(x)) for k, x in sorted(eq.kwargs.items())])
    shared = shared_memory([numbers[c] for c in constants])
    wanted = tuple([None if c is None else c.spec for c in cts])
    return eq.op, kind(eq.args), keywords, wanted, shared


def _recorded_transpose(eq: Equation, cts: Cotangents, own: Numbers) -> Program:
    """Record the transpose of an operation, from its cotangents to those of its variables.

    What it reads is in `own`.
    """
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode(False), torch.enable_grad():
        values = {v: v.spec.random(generator).requires_grad_() for v in _distinct(eq.inputs())}
        try:
            outs = _called(eq.op, eq, values, own)
            return _pullback_of(outs, list(values.values()), cts, eq.constants(), own)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            decomposed = _by_decomposition(eq, cts, own)
            if decomposed is not None:
                return decomposed
            raise UnsupportedError(
                f"{eq.name} (from {eq.source or 'the graph'}) has no transpose rule, and PyTorch "
                f"has no derivative of it: {error}"
            ) from error


def _called(
    op: Callable[..., Any], eq: Equation, values: Mapping[Var, torch.Tensor], own: Numbers
) -> Sequence[torch.Tensor]:
    """Return the results of an operation on what an equation reads."""

    def number(x: Any) -> Any:
        if isinstance(x, Constant):
            return own[x]
        return values[x] if isinstance(x, Var) else x

    out = op(*map_leaves(number, eq.args), **map_leaves(number, eq.kwargs))
    return out if isinstance(out, (tuple, list)) else (out,)


def _pullback_of(
    outs: Sequence[torch.Tensor],
    leaves: list[torch.Tensor],
    cts: Cotangents,
    given: Sequence[Constant],
    own: Numbers,
) -> Program:
    roots, specs = [], []
    for t, ct in zip(outs, cts, strict=True):
        if ct is None:
            continue
        if not t.requires_grad:
            raise RuntimeError("its result does not depend on its argument for autograd")
        edge = get_gradient_edge(t)
        roots.append((edge.node, edge.output_nr))
        specs.append(ct.spec)
    graph = Graph(roots, [get_gradient_edge(x).node for x in leaves])
    program, _ = record_pullback(graph, specs, list(map(TensorSpec.of, leaves)), own, given=given)
    return program


def _by_decomposition(eq: Equation, cts: Cotangents, own: Numbers) -> Program | None:
    """Transpose one operation through the operations that it decomposes into."""
    parts = decompositions(eq.op)
    if parts is None:
        return None
    variables = _distinct(eq.inputs())

    def fn(*numbers: torch.Tensor) -> Sequence[torch.Tensor | None]:
        return _called(parts, eq, dict(zip(variables, numbers, strict=True)), own)

    specs = [None if v is None else v.spec for v in eq.outputs]
    try:
        ins = [v.spec for v in variables]
        program, _ = record_function(fn, ins, specs, own, eq.source, given=eq.constants())
        turned = transpose(program, own)
    except (LinearizeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
    present = [ct for v, ct in zip(eq.outputs, cts, strict=True) if v is not None]
    return turned.restricted([ct is not None for ct in present])
