"""Writing down the linear program of a pullback.

`record_pullback` has a `Walk` go through an autograd graph. What cannot be written down is left
to PyTorch: as few nodes as can be, or all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from .._capture.graph import Graph
from .._execute.binding import BoundProgram
from .._execute.executor import runner
from .._programs.numbers import Numbers
from .._programs.program import Emitter, Program
from .._programs.values import Constant, Var
from .._spaces.compare import agree, magnitudes
from .._spaces.space import TensorSpec
from .._torch.graphs import Node
from ..errors import LinearizeError, NotLinearError, UnsupportedError
from .calls import NotRecordedError, SpreadError
from .node_programs import Gradient
from .stretch import Cut
from .walk import Walk
from .witness import Unseen

T = TypeVar("T")


def record_pullback(
    graph: Graph,
    out_specs: Sequence[TensorSpec],
    in_specs: Sequence[TensorSpec],
    numbers: Numbers,
    *,
    remembered: bool = False,
    given: Iterable[Constant] = (),
) -> tuple[Program, list[Unseen]]:
    """Record the linear program from cotangents of a graph's roots to those of its leaves.

    Parameters
    ----------
    graph
        The autograd graph.
    out_specs
        The specification of each root's cotangent.
    in_specs
        The specification of each leaf.
    numbers
        Receive what the program reads.
    remembered
        Whether to trace constants back to what the graph saved, so that the program can be
        taken over by other graphs, and to use what is known of single nodes.
    given
        Constants that the graph was made from, with numbers.

    Returns
    -------
    program, unseen
        The program, and the calls of what does not show all that it does.

    Raises
    ------
    UnsupportedError
        If a node's derivative cannot be applied; the message names the node.
    StalenessError
        If a tensor saved by the graph was changed in place.
    """
    inputs = [Var(spec) for spec in out_specs]

    def attempt(lazy: bool, cut: Cut | None) -> tuple[Walk, list[Gradient | None]]:
        # Not by calling itself: that would be a cycle, which keeps the graph.
        while True:
            generator = torch.Generator().manual_seed(0)
            emitter = Emitter(numbers=numbers)
            walk = Walk(graph, emitter, generator, remembered=remembered, lazy=lazy, cut=cut)
            walk.inputs = set(inputs)
            walk.recording.constants.given(given)
            try:
                return walk, walk.run([walk.seed(v) for v in inputs])
            except UnsupportedError:
                if not (lazy and walk.invented):
                    raise
            # A formula may refuse gradients that cannot come about: singular vectors have
            # phases that nothing may depend on.
            lazy = False

    # Parts that are left to PyTorch would bring collectives into another order.
    helped = remembered and not graph.communicates
    walk, arrived = _with_help(graph, lambda cut: attempt(remembered, cut), helped)
    emitter = walk.emitter
    outputs = [None if g is None else g.var for g in arrived]
    program = Program(
        inputs, emitter.equations, outputs, in_specs, "pullback", emitter.fixed
    ).live()
    if walk.recording.frozen and not program.is_opaque():
        _try_elsewhere(graph, BoundProgram.of(program, numbers), walk.recording.frozen)
    return program, walk.unseen


def _with_help(graph: Graph, attempt: Callable[[Cut | None], T], helped: bool) -> T:
    """Record a graph; leave what cannot be recorded to PyTorch, if `helped`."""
    nodes: frozenset[Node] = frozenset()
    cut: Cut | None = None
    while True:
        try:
            return attempt(cut)
        except SpreadError as error:
            if not helped:
                raise _sparse(next(iter(error.nodes)).name()) from None
            nodes |= error.nodes
            cut = Cut(graph, nodes, "a gradient inside is no dense tensor")
        except (UnsupportedError, RuntimeError, TypeError) as error:
            known = isinstance(error, LinearizeError) and not isinstance(error, NotRecordedError)
            if known or isinstance(error, torch.OutOfMemoryError):
                raise
            if not helped:
                raise _plain(error) from error.__cause__
            return _by_engine(graph, attempt, error)


def _by_engine(graph: Graph, attempt: Callable[[Cut | None], T], error: Exception) -> T:
    """Leave all of a graph to PyTorch's engine, because of an error."""
    reason = str(error).partition("\n")[0]
    nodes = [n for n in graph.order if n not in graph.leaves]
    try:
        return attempt(Cut(graph, nodes, reason, engine=True))
    except (LinearizeError, RuntimeError, TypeError):
        raise _plain(error) from error.__cause__


def _plain(error: Exception) -> Exception:
    return UnsupportedError(str(error)) if isinstance(error, NotRecordedError) else error


def _sparse(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name}: a gradient inside is no dense tensor; compute with values, by index_select and "
        "index_add"
    )


def _try_elsewhere(graph: Graph, program: BoundProgram, what: str) -> None:
    """Raise if a program is not right for other cotangents than it was recorded with."""
    for factor in (1.0, *magnitudes(*(v.spec.dtype for v in program.inputs))):
        generator = torch.Generator().manual_seed(1)
        walk = Walk(graph, Emitter(), generator, factor=factor)
        seeds = [walk.seed(v) for v in program.inputs]
        expected = [None if g is None else g.tensor for g in walk.run(seeds)]
        with torch.inference_mode(False), torch.no_grad():
            got = runner(program)([walk.number(g) for g in seeds])
        if not agree(got, expected, program.specs, factor):
            raise NotLinearError(
                f"{program.name}: its result depends on a comparison with the cotangent "
                f"({what}), so that it is not a linear map"
            )
