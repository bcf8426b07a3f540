"""Methods that an author did not give: the other one, turned around."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from .._capture.custom import CustomNode
from .._capture.custom_operations import CustomBackward, CustomJvp, Direction, direction_of
from .._execute.binding import BoundProgram
from .._execute.executor import runner
from .._programs.numbers import Numbers
from .._programs.program import Emitter, Equation, Program
from .._programs.residuals import Residual
from .._programs.values import Var
from .._record.function import record_function
from .._record.recording import OpaqueError
from .._record.witness import Unseen, Witness
from .._spaces.compare import agree, magnitudes
from .._spaces.space import TensorSpec
from .._text.labels import beside
from .._torch.names import aten
from .._torch.ranks import alone
from ..errors import MissingDerivativeError
from .opaque_matrix import dense_transpose
from .second import twice_differentiated
from .transpose import TransposedNode, transpose

#: The call of a method that a program was made of, which holds where that does the same; or why
#: it holds at one point only.
Call: TypeAlias = Unseen | str


def resolve(
    program: Program,
    numbers: Numbers,
    *,
    materialize: bool,
    limit: int,
    places: Mapping[int, int] | None = None,
    unseen: list[Unseen] | None = None,
) -> Program:
    """Replace what an author did not give: calls of missing methods.

    Parameters
    ----------
    program
        In which such calls may occur.
    numbers
        Receive those that the result reads besides.
    materialize
        Whether to build a matrix from unit vectors where the other method is of no use.
    limit
        The most bytes that one such matrix may take.
    places
        Where the custom Functions' nodes stand in their graph, by the ids of these.
    unseen
        Receives the calls of their methods: where these do the same, so does the result.

    Raises
    ------
    MissingDerivativeError
        If a custom Function lacks the method and its other one cannot be transposed.
    """
    if not lacks_methods(program):
        return program
    e = Emitter(numbers=numbers, fixed=program.fixed)
    names: dict[Var, Var] = {}

    for eq in program.equations:
        renamed = eq.renamed(lambda x: names.get(x, x))
        if not _missing(eq.op):
            e.equations.append(renamed)
            continue
        e.source = eq.source
        place = (places or {}).get(id(eq.op.node), -1)  # type: ignore[attr-defined]
        replacement, call = _replacement(eq, numbers, limit if materialize else None, place)
        if isinstance(call, str):
            e.fixed = e.fixed or f"{eq.source}, {call}"
        elif unseen is not None:
            unseen.append(call)
        results = e.inline(replacement, [a for a in renamed.args if isinstance(a, Var)])
        for out, got in zip(eq.outputs, results, strict=True):
            if out is not None:
                # A direction on which the output does not depend is a zero of its shape.
                names[out] = got if got is not None else _zero(e, out.spec, renamed.args)
    outputs = [None if v is None else names.get(v, v) for v in program.outputs]
    whole = program.with_equations(e.equations, outputs)
    whole.fixed = e.fixed
    return whole.live()


def lacks_methods(program: Program) -> bool:
    """Whether a program calls methods that an author did not give."""
    return any(_missing(eq.op) for eq in program.equations)


def _zero(e: Emitter, spec: TensorSpec, args: Sequence[Any]) -> Var:
    like = next(a for a in args if isinstance(a, Var))
    return e.emit(
        aten.new_zeros.default,
        (like, list(spec.shape)),
        spec,
        dtype=spec.dtype,
        device=spec.device,
    )


def _missing(op: Any) -> bool:
    if isinstance(op, CustomJvp):
        return not op.node.has_jvp
    if isinstance(op, CustomBackward):
        return not op.node.has_backward
    return isinstance(op, TransposedNode)


def _replacement(
    eq: Equation, numbers: Numbers, limit: int | None, place: int
) -> tuple[Program, Call]:
    """Return a program from the equation's variables to its outputs, and what it was made of."""
    op: Any = eq.op
    direction: Direction
    chosen: tuple[bool, ...]
    if isinstance(op, TransposedNode):
        name, chosen, has, lacks = op.label, (), "backward", "jvp"
        direction = op, list(op.outputs), list(op.inputs)
    else:
        name, forth = op.node.name, isinstance(op, CustomJvp)
        has, lacks = ("backward", "jvp") if forth else ("jvp", "backward")
        chosen = op.wanted if forth else tuple([isinstance(a, Var) for a in eq.args])
        direction = direction_of(op.node, has, chosen)
        if not (op.node.has_backward if forth else op.node.has_jvp):
            raise MissingDerivativeError(
                f"{beside(name, eq.source)} has neither a backward nor a jvp: give it one (a "
                "torch.library operator: call register_autograd)"
            )
    # `fn` maps the equation's outputs to its arguments: it is the given direction.
    with alone(
        f"{beside(name, eq.source)} has no {lacks}, and its {has} communicates with other ranks: "
        f"give it a {lacks}, as it cannot be derived from what one rank sees"
    ):
        witness = Witness(place, has, chosen) if place >= 0 else None
        return _derived(eq, direction, (name, has, lacks), numbers, limit, witness)


def _derived(
    eq: Equation,
    direction: Direction,
    words: tuple[str, str, str],
    numbers: Numbers,
    limit: int | None,
    witness: Witness | None,
) -> tuple[Program, Call]:
    """Return the transpose of what is given, and what it was made of."""
    op: Any = eq.op
    (fn, ins, outs), (name, has, lacks) = direction, words
    present = [isinstance(a, Var) for a in eq.args]
    wanted = [v is not None for v in eq.outputs]
    call: Call
    try:
        if isinstance(op, TransposedNode):
            raise OpaqueError(op.reason)
        given, call = _recorded(fn, ins, outs, numbers, op.node, has, witness)
    except OpaqueError as reason:
        called = op.node if isinstance(op, TransposedNode) else fn
        by_pytorch, fault = twice_differentiated(called, ins, outs, present, wanted, name, has)
        if by_pytorch is not None:
            return by_pytorch, f"{has}: {reason}"
        if limit is None:
            remedy = "" if isinstance(op, TransposedNode) else f"give it a {lacks}, or "
            raise MissingDerivativeError(
                f"{beside(name, eq.source)} has no {lacks}, and its {has} cannot be transposed "
                f"({reason}), by PyTorch neither ({fault}): {remedy}"
                'pass opaque="materialize" to build its matrix from unit vectors'
            ) from None
        matrix = dense_transpose(fn, ins, outs, present, wanted, name, limit, numbers)
        return matrix, f"{has}: {reason}"
    turned = transpose(given, numbers, f"transpose of {name}.{has}")
    keep = [v if want else None for v, want in zip(turned.outputs, wanted, strict=True)]
    whole = Program(turned.inputs, turned.equations, keep, turned.specs, turned.name)
    fixed = given.fixed or turned.fixed
    if not fixed and any(op.of_point for op in (*given.opaque(), *turned.opaque())):
        fixed = "it calls another one"
    if fixed and not isinstance(call, str):
        call = f"{has}: {fixed}"
    return whole.restricted(present), call


def storage_of(r: Residual) -> int:
    """Return where the memory of a residual begins."""
    return r.tensor.untyped_storage().data_ptr()


def _recorded(
    fn: Callable[..., Sequence[torch.Tensor | None]],
    ins: list[TensorSpec],
    outs: list[TensorSpec],
    numbers: Numbers,
    node: CustomNode,
    method: str,
    witness: Witness | None,
) -> tuple[Program, Call]:
    """Record the given direction, and test it with other numbers; return what was called too.

    Code that leaves PyTorch half-way leaves a program that is right only for the numbers it
    was recorded with.
    """
    source = f"{node.name}.{method}"
    program, results = record_function(fn, ins, outs, numbers, source, witness=witness)
    call: Call = f"{method}: its graph is not known"
    if witness is not None:
        call = witness.ended(results) or f"{method}: {witness.blind}"
    generator = torch.Generator().manual_seed(1)
    arguments = [spec.random(generator) for spec in ins]
    with torch.inference_mode(False), torch.no_grad():
        expected = fn(*(t.clone() for t in arguments))
        read = numbers.residuals(program.constants)
        written = {storage_of(r) for r in read if r.changed()}
        if written:
            # The method writes to what it keeps, at each call: the program gets a copy.
            call = f"{method}: it writes to what it keeps"
            program, _ = record_function(fn, ins, outs, numbers, source)
            for r in numbers.residuals(program.constants):
                if storage_of(r) in written:
                    r.replace(r.tensor.clone())
        bound = BoundProgram.of(program, numbers)
        if not agree(runner(bound)(arguments), expected, outs):
            raise OpaqueError("the result depends on its argument in a way not seen by PyTorch")
        kind = method, tuple(ins), tuple(outs)
        tried = _TRIED.setdefault(node.cls, set())
        if program.fixed or kind not in tried:
            _try_scaled(bound, fn, arguments, outs)
            tried.add(kind)
    return program, call


#: What was tried at several magnitudes, by the class of the custom Function: at each point would
#: cost too much, where nothing is compared with the argument.
_TRIED: weakref.WeakKeyDictionary[type, set[Hashable]] = weakref.WeakKeyDictionary()


def _try_scaled(
    program: BoundProgram,
    fn: Callable[..., Sequence[torch.Tensor | None]],
    arguments: Sequence[torch.Tensor],
    outs: Sequence[TensorSpec],
) -> None:
    """Raise unless a method does what its program does at several magnitudes."""
    for factor in magnitudes(*(t.dtype for t in arguments)):
        scaled = [factor * t for t in arguments]
        expected = fn(*(t.clone() for t in scaled))
        if not agree(runner(program)(scaled), expected, outs, factor):
            raise OpaqueError(
                f"it is not linear: its result for arguments {factor:.0e} times as large is not "
                "as much larger, as where gradients are clipped or rounded"
            )
