"""What was recorded of a node that runs user code, compared with another call of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from .._execute.binding import BoundProgram
from .._execute.executor import runner
from .._programs.program import Equation, Program
from .._spaces.compare import agree
from .._spaces.space import TensorSpec
from .._torch.graphs import Node, recomputed_apart
from .calls import called
from .recording import Recording

#: What a node was given, what was written down of it, and what it returned.
Recorded: TypeAlias = tuple[
    Sequence[torch.Tensor | None], Sequence[Equation], Sequence[torch.Tensor | None]
]


def second_opinion(
    recording: Recording, generator: torch.Generator, node: Node, recorded: Recorded
) -> str:
    """Return why a node is not what was recorded of it; empty if it is.

    The in-place operation that `CopySlices` carries may be a custom Function.
    """
    grads, equations, result = recorded
    inputs = [recording.variable(g) for g in grads if g is not None]
    outputs = [None if g is None else recording.variable(g) for g in result]
    specs = [TensorSpec.of(g) for g in result if g is not None]
    program = Program(
        [v for v in inputs if v is not None],
        equations,
        [v for v, g in zip(outputs, result, strict=True) if g is not None],
        specs,
    )
    numbers = [None if g is None else TensorSpec.of(g).random(generator) for g in grads]
    with recomputed_apart():
        results = called(node, [None if t is None else t.clone() for t in numbers], node.name())
    again = [g for g in results if g is not None]
    expected = runner(BoundProgram.of(program, recording.emitter.numbers))(
        [t for t in numbers if t is not None]
    )
    same = agree(expected, again, specs)
    return "" if same else "it runs a custom Function whose backward leaves PyTorch"
