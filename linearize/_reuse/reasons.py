"""Words for why a graph was recorded although others had been."""

from __future__ import annotations

from typing import Any

from .._capture.graph import Graph
from .._programs.program import Operation, Program

#: What stands where in a node's part of a signature, after its type.
_PARTS = (
    "other arguments want a gradient",
    "another shape, dtype or device",
    "another static argument",
    "what it saved has another shape, dtype, or layout",
    "other tensors that it saved are the same",
    "what it saved lies otherwise on the ranks",
)


def of_program(program: Program) -> str:
    """Return why a program that was recorded holds at one point only; empty if it does not."""
    if program.fixed:
        return program.fixed
    for eq in program.equations:
        if isinstance(eq.op, Operation) and eq.op.moved(lambda node: node) is None:
            return f"{eq.source}: {eq.op.note or eq.name}"
    unknown = next((c for c in program.constants if not c.origin.portable), None)
    return "" if unknown is None else f"{unknown.source}: a constant of unknown origin"


def of_signature(graph: Graph, now: tuple[Any, ...] | None, before: tuple[Any, ...] | None) -> str:
    """Return where the signature of a graph parts from that of the one before."""
    if now is None:
        return "what it depends on cannot be seen"
    if before is None or before == now:
        return "the programs before were let go, or do not hold for these numbers"
    for i, (a, b) in enumerate(zip(now[0], before[0], strict=False)):
        if a != b:
            return f"{graph.label(graph.order[i])}: {_of_node(a, b)}"
    if len(now[0]) != len(before[0]):
        return f"{len(now[0])} operations instead of {len(before[0])}"
    for place, name, value in now[-1]:
        if (place, name, value) not in before[-1]:
            return f"{graph.label(graph.order[place])}: another number, which does not only scale"
    kinds = ("", "other results", "other arguments", "other shapes, dtypes or devices")
    for what, a, b in zip(kinds, now, before, strict=False):
        if a != b:
            return what
    return "other tensors are the same"


def _of_node(a: Any, b: Any) -> str:
    if not (isinstance(a, tuple) and isinstance(b, tuple)):
        return "another argument of f"
    here, there = a[0], b[0]
    if here[0] != there[0]:
        return "another operation"
    if a[1] != b[1]:
        return "computed of something else"
    if a[2:] != b[2:]:
        return "another line of f"
    for what, x, y in zip(_PARTS, here[1:], there[1:], strict=False):
        if x != y:
            return what
    return "a custom Function of another kind"
