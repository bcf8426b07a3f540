"""Methods that an author did not give: the other one, turned around."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from .._capture.custom import CustomNode
from .._capture.custom_operations import CustomBackward, CustomJvp
from .._execute.binding import BoundProgram
from .._execute.executor import runner
from .._programs.numbers import Numbers
from .._programs.program import Emitter, Equation, Program
from .._programs.residuals import Residual
from .._programs.values import Var
from .._record.function import record_function
from .._record.recording import OpaqueError
from .._spaces.compare import close_at, magnitudes
from .._spaces.space import TensorSpec
from .._text.labels import beside
from .._torch.names import aten
from .._torch.ranks import alone
from ..errors import MissingDerivativeError
from .opaque_matrix import dense_transpose
from .second import twice_differentiated
from .transpose import TransposedNode, transpose


def resolve(program: Program, numbers: Numbers, *, materialize: bool, limit: int) -> Program:
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

    Raises
    ------
    MissingDerivativeError
        If a custom Function lacks the method and its other one cannot be transposed.
    """
    if not lacks_methods(program):
        return program
    e = Emitter(numbers=numbers, fixed="a method of a custom Function was recorded")
    names: dict[Var, Var] = {}

    for eq in program.equations:
        renamed = eq.renamed(lambda x: names.get(x, x))
        if not _missing(eq.op):
            e.equations.append(renamed)
            continue
        e.source = eq.source
        replacement = _replacement(eq, numbers, limit if materialize else None)
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


def _replacement(eq: Equation, numbers: Numbers, limit: int | None) -> Program:
    """Return a program from the equation's variables to its outputs."""
    op: Any = eq.op
    if isinstance(op, CustomJvp):
        fn, ins, outs = _backward_of(op.node, op.wanted)
        has, lacks = "backward", "jvp"
        if not op.node.has_backward:
            raise MissingDerivativeError(_neither(beside(op.node.name, eq.source)))
        name = op.node.name
    elif isinstance(op, CustomBackward):
        fn, ins, outs = _jvp_of(op.node, [isinstance(a, Var) for a in eq.args])
        has, lacks, name = "jvp", "backward", op.node.name
        if not op.node.has_jvp:
            raise MissingDerivativeError(_neither(beside(name, eq.source)))
    else:
        fn, ins = op, list(op.outputs)
        outs = [s if s is not None else _nothing() for s in op.inputs]
        has, lacks, name = "backward", "jvp", op.label
    # `fn` maps the equation's outputs to its arguments: it is the given direction.
    with alone(
        f"{beside(name, eq.source)} has no {lacks}, and its {has} communicates with other ranks: "
        f"give it a {lacks}, as it cannot be derived from what one rank sees"
    ):
        return _derived(eq, (fn, ins, outs), (name, has, lacks), numbers, limit)


def _derived(
    eq: Equation,
    direction: Direction,
    words: tuple[str, str, str],
    numbers: Numbers,
    limit: int | None,
) -> Program:
    """Return the transpose of what is given."""
    op: Any = eq.op
    (fn, ins, outs), (name, has, lacks) = direction, words
    present = [isinstance(a, Var) for a in eq.args]
    wanted = [v is not None for v in eq.outputs]
    try:
        if isinstance(op, TransposedNode):
            raise OpaqueError(op.reason)
        given = _recorded(fn, ins, outs, numbers, op.node, has)
    except OpaqueError as reason:
        called = op.node if isinstance(op, TransposedNode) else fn
        by_pytorch, fault = twice_differentiated(called, ins, outs, present, wanted, name, has)
        if by_pytorch is not None:
            return by_pytorch
        if limit is None:
            remedy = "" if isinstance(op, TransposedNode) else f"give it a {lacks}, or "
            raise MissingDerivativeError(
                f"{beside(name, eq.source)} has no {lacks}, and its {has} cannot be transposed "
                f"({reason}), by PyTorch neither ({fault}): {remedy}"
                'pass opaque="materialize" to build its matrix from unit vectors'
            ) from None
        return dense_transpose(fn, ins, outs, present, wanted, name, limit, numbers)
    turned = transpose(given, numbers, f"transpose of {name}.{has}")
    keep = [v if want else None for v, want in zip(turned.outputs, wanted, strict=True)]
    whole = Program(turned.inputs, turned.equations, keep, turned.specs, turned.name)
    return whole.restricted(present)


def _neither(name: str) -> str:
    return (
        f"{name} has neither a backward nor a jvp: give it one (a torch.library operator: call "
        "register_autograd)"
    )


Direction = tuple[Callable[..., Sequence[torch.Tensor | None]], list[Any], list[Any]]


def _backward_of(node: CustomNode, wanted: Sequence[bool]) -> Direction:
    specs = [s if s is not None else _nothing() for s in node.outputs]

    def fn(*grads: torch.Tensor) -> list[torch.Tensor | None]:
        return node.backward([g if w else None for g, w in zip(grads, wanted, strict=True)])

    return fn, specs, list(node.inputs)


def _jvp_of(node: CustomNode, present: Sequence[bool]) -> Direction:
    def fn(*tangents: torch.Tensor) -> list[torch.Tensor | None]:
        return node.jvp(tangents, present)

    return fn, list(node.inputs), [s if s is not None else _nothing() for s in node.outputs]


def _nothing() -> TensorSpec:
    """Stand for an output that is not a tensor."""
    return TensorSpec((), torch.float32, torch.device("cpu"))


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
) -> Program:
    """Record the given direction, and test it with other numbers.

    Code that leaves PyTorch half-way leaves a program that is right only for the numbers it
    was recorded with.
    """
    source = f"{node.name}.{method}"
    program, _, _ = record_function(fn, ins, outs, numbers, name=source, source=source)
    generator = torch.Generator().manual_seed(1)
    arguments = [spec.random(generator) for spec in ins]
    with torch.inference_mode(False), torch.no_grad():
        expected = fn(*(t.clone() for t in arguments))
        read = numbers.residuals(program.constants)
        written = {storage_of(r) for r in read if r.changed()}
        if written:
            # The method writes to what it keeps, at each call: the program gets a copy.
            program, _, _ = record_function(fn, ins, outs, numbers, name=source, source=source)
            for r in numbers.residuals(program.constants):
                if storage_of(r) in written:
                    r.replace(r.tensor.clone())
        bound = BoundProgram.of(program, numbers)
        if not _agree(1.0, runner(bound)(arguments), expected, outs):
            raise OpaqueError("the result depends on its argument in a way not seen by PyTorch")
        kind = method, tuple(ins), tuple(outs)
        tried = _TRIED.setdefault(node.cls, set())
        if program.fixed or kind not in tried:
            _try_scaled(bound, fn, arguments, outs)
            tried.add(kind)
    return program


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
    dtypes = {t.dtype for t in arguments}
    for factor in magnitudes(min(dtypes, key=lambda d: torch.finfo(d).max)):
        scaled = [factor * t for t in arguments]
        expected = fn(*(t.clone() for t in scaled))
        if not _agree(factor, runner(program)(scaled), expected, outs):
            raise OpaqueError(
                f"it is not linear: its result for arguments {factor:.0e} times as large is not "
                "as much larger, as where gradients are clipped or rounded"
            )


def _agree(
    factor: float,
    got: Sequence[torch.Tensor | None],
    expected: Sequence[torch.Tensor | None],
    specs: Sequence[TensorSpec],
) -> bool:
    return all(
        close_at(factor, spec.or_zeros(a), spec.or_zeros(b))
        for a, b, spec in zip(got, expected, specs, strict=True)
    )
