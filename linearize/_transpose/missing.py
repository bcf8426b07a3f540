"""Methods that an author did not give: the other one, turned around."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._capture.custom import CustomBackward, CustomJvp, CustomNode
from .._execute.executor import Executor
from .._programs.program import Emitter, Equation, Program, Var
from .._programs.residuals import Residual
from .._record.recorder import OpaqueError
from .._record.walk import record_function
from .._spaces.compare import close
from .._spaces.space import TensorSpec
from .._text.labels import beside
from .._torch.names import aten
from ..errors import MissingDerivativeError
from .opaque_matrix import dense_transpose
from .second import twice_differentiated
from .transpose import TransposedNode, transpose


def resolve(program: Program, *, materialize: bool, limit: int) -> Program:
    """Replace what an author did not give: calls of missing methods.

    Parameters
    ----------
    program
        In which such calls may occur.
    materialize
        Whether to build a matrix from unit vectors where the other method is of no use.
    limit
        The most bytes that one such matrix may take.

    Raises
    ------
    MissingDerivativeError
        If a custom Function lacks the method and its other one cannot be transposed.
    """
    if not any(_missing(eq.op) for eq in program.equations):
        return program
    e = Emitter(fixed="a method of a custom Function was recorded")
    names: dict[Var, Var] = {}

    for eq in program.equations:
        renamed = eq.renamed(lambda x: names.get(x, x))
        if not _missing(eq.op):
            e.equations.append(renamed)
            continue
        e.source = eq.source
        replacement = _replacement(eq, limit if materialize else None)
        results = e.inline(replacement, [a for a in renamed.args if isinstance(a, Var)])
        for out, got in zip(eq.outputs, results, strict=True):
            if out is not None:
                # A direction on which the output does not depend is a zero of its shape.
                names[out] = got if got is not None else _zero(e, out.spec, renamed.args)
    outputs = [None if v is None else names.get(v, v) for v in program.outputs]
    whole = program.with_equations(e.equations, outputs)
    whole.fixed = e.fixed
    return whole.live()


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


def _replacement(eq: Equation, limit: int | None) -> Program:
    """Return a program from the equation's variables to its outputs."""
    op: Any = eq.op
    present = [isinstance(a, Var) for a in eq.args]
    wanted = [v is not None for v in eq.outputs]
    if isinstance(op, CustomJvp):
        fn, ins, outs = _backward_of(op.node, op.wanted)
        has, lacks = "backward", "jvp"
        if not op.node.has_backward:
            raise MissingDerivativeError(_neither(beside(op.node.name, eq.source)))
        name = op.node.name
    elif isinstance(op, CustomBackward):
        fn, ins, outs = _jvp_of(op.node, present)
        has, lacks, name = "jvp", "backward", op.node.name
        if not op.node.has_jvp:
            raise MissingDerivativeError(_neither(beside(name, eq.source)))
    else:
        fn, ins, outs = op, list(op.outputs), list(op.inputs)
        has, lacks, name = "backward", "jvp", op.label
    # `fn` maps the equation's outputs to its arguments: it is the given direction.
    try:
        if isinstance(op, TransposedNode):
            raise OpaqueError(op.reason)
        given = _recorded(fn, ins, outs, name, has)
    except OpaqueError as reason:
        direction = op.node if isinstance(op, TransposedNode) else fn
        by_pytorch, fault = twice_differentiated(direction, ins, outs, present, wanted, name, has)
        if by_pytorch is not None:
            return by_pytorch
        if limit is None:
            remedy = "" if isinstance(op, TransposedNode) else f"give it a {lacks}, or "
            raise MissingDerivativeError(
                f"{beside(name, eq.source)} has no {lacks}, and its {has} cannot be transposed "
                f"({reason}), by PyTorch neither ({fault}): {remedy}"
                'pass opaque="materialize" to build its matrix from unit vectors'
            ) from None
        return dense_transpose(fn, ins, outs, present, wanted, name, limit)
    turned = transpose(given, f"transpose of {name}.{has}")
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
    name: str,
    method: str,
) -> Program:
    """Record the given direction, and test it with other numbers.

    Code that leaves PyTorch half-way leaves a program that is right only for the numbers it
    was recorded with.
    """
    source = f"{name}.{method}"
    program, _, _ = record_function(fn, ins, outs, name=source, source=source)
    generator = torch.Generator().manual_seed(1)
    numbers = [spec.random(generator) for spec in ins]
    with torch.inference_mode(False), torch.no_grad():
        expected = fn(*(t.clone() for t in numbers))
        written = {storage_of(r) for r in program.residuals() if r.changed()}
        if written:
            # The method writes to what it keeps, at each call: the program gets a copy.
            program, _, _ = record_function(fn, ins, outs, name=source, source=source)
            for r in program.residuals():
                if storage_of(r) in written:
                    r.tensor = r.tensor.clone()
                    r.version = r.tensor._version
        from_program = Executor(program)(numbers)
    for e, got, spec in zip(expected, from_program, outs, strict=True):
        want = spec.zeros() if e is None else e
        have = spec.zeros() if got is None else got
        if not close(have, want):
            raise OpaqueError("the result depends on its argument in a way not seen by PyTorch")
    return program
