"""Running f once.

`capture` runs f under grad mode on detached aliases of the primals and keeps what the
linear maps are recorded from: the autograd graph, and what was seen of the contexts of
custom Functions. It owns everything that must be known while f runs.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .._spaces.space import Space, TensorSpec, differentiable
from .._spaces.trees import Tree, flatten
from .._text.labels import function_name
from .._torch.compiled import compiled_functions
from .._torch.contexts import applied_late, eager_compiled_functions, owner_of
from .._torch.graphs import Node, accumulators, gradient_edge
from .._torch.hooks import HookWatcher, Unhooked
from .._torch.modes import NOTHING, being_traced, functorch_active, grad_enabled
from .._torch.names import batched_or_wrapped, pytree
from .._torch.pieces import CompiledCalls, Piece
from .._torch.ranks import collectives_seen
from .._torch.sharded import is_sharded, lies, local_of, may_be_sharded, reduced
from ..errors import StructureError, UnsupportedError
from .contexts import ContextRecords
from .conversions import laid_out_leaves, laid_out_roots
from .dependence import check_not_behind, is_derivative, warn_independent
from .graph import Edge, Graph
from .reads import Reads, scripted_state, stamps, warn_of_hooks
from .trace import Trace


@dataclasses.dataclass(slots=True)
class Capture:
    """What one run of f left.

    Attributes
    ----------
    value
        f's output in its structure, tensors detached.
    aux
        What f returned beside it (`has_aux`), tensors detached.
    in_space, out_space
        The spaces of tangents and cotangents.
    edges
        The gradient edge of each differentiable output leaf, None where there is no graph.
    owners
        What keeps the graph alive for its contexts, where they do not.
    leaves
        The detached alias of each differentiable primal leaf.
    records
        What was seen of custom Functions' contexts.
    reads
        The tensors that f read, with their versions after the run.
    watched
        Whether these were noted.
    moving
        Those of them that PyTorch writes to without raising their version.
    hooks
        The gradient hooks that f registered.
    unhooked
        Knows whether there are any, or were registered afterwards.
    outputs
        The differentiable outputs with their history.
    trace
        Knows the lines of f; None if it was not traced.
    name
        Of f.
    derivative
        Whether f is the derivative of another function, and so may well be constant.
    pieces
        The parts of f that `torch.compile` was asked to compile.
    """

    value: Any
    aux: Any
    in_space: Space
    out_space: Space
    edges: list[Edge | None]
    owners: list[Node]
    leaves: list[torch.Tensor]
    records: ContextRecords
    reads: list[tuple[weakref.ref[torch.Tensor], int]]
    watched: bool
    moving: list[torch.Tensor]
    hooks: HookWatcher
    unhooked: Unhooked
    outputs: list[torch.Tensor]
    trace: Trace | None = None
    name: str = ""
    derivative: bool = False
    pieces: Sequence[Piece] = ()

    def nodes(self) -> list[Node]:
        """Return the graph node of each of the leaves."""
        return accumulators(self.leaves)

    def graph(self) -> Graph:
        """Return the graph between value and primals."""
        graph = Graph(self.edges, self.leaves, self.records, self.trace, self.owners)
        if self.records.meshes:
            self._lay_out(graph)
        if self.watched:
            # What f read out of sight, in a thread of its own for instance, may be here.
            known = {id(ref) for ref, _ in self.reads}
            refs = map(weakref.ref, graph.constants)
            self.reads += stamps(ref for ref in refs if id(ref) not in known)
        warn_of_hooks(graph, self.hooks)
        self.hooks = HookWatcher()
        if not graph.order and self.edges and not self.derivative:
            warn_independent(f"the value of {self.name}")
        return graph

    def _lay_out(self, graph: Graph) -> None:
        """Find out how values and primals lie on the ranks, for the graph and for both spaces."""
        ours, theirs = self.in_space, self.out_space
        ins = laid_out_leaves(graph, ours.layouts or [None] * len(ours.tensors))
        outs = laid_out_roots(graph, theirs.layouts or [None] * len(theirs.tensors))
        graph.layouts = outs, ins
        ours.layouts, theirs.layouts = (x if any(x) else () for x in (ins, outs))


def capture(
    f: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    argnums: Sequence[int],
    *,
    has_aux: bool = False,
    watch: bool = False,
    copy: bool = False,
    records: ContextRecords | None = None,
    trace: bool = False,
    compiled: Callable[..., Any] | None = None,
) -> Capture:
    """Run f once and keep its graph.

    Parameters
    ----------
    f
        The function.
    args, kwargs
        Its arguments.
    argnums
        The positions of the arguments that are differentiated, all in range.
    has_aux
        Whether f returns `(value, aux)`.
    watch
        Whether to note which tensors f reads (costs some microseconds per operation of f).
    copy
        Whether f gets copies of the tensors, for callers that overwrite theirs unseen.
    records
        Where to note what is seen of custom Functions' contexts.
    trace
        Whether to note which line of f makes which node of the graph.
    compiled
        Runs in the place of f, f itself or what it was compiled to; in it, compiled functions run
        compiled. With None they run as they were written, so that PyTorch can differentiate the
        graph again; and so they do if lines are noted.

    Raises
    ------
    StructureError
        If no argument is differentiable, or f returns something that is not a tensor.
    UnsupportedError
        If a primal or an output has a layout that cannot be linearized.
    """
    _refuse_transforms()
    given, tree = flatten(tuple([args[i] for i in argnums]))
    _check_layouts(given, tree)
    in_space = Space.of_leaves(given, tree, "tangent", "primals")
    _check_some(given, in_space)
    records = ContextRecords() if records is None else records
    _note_meshes(records, in_space)
    frozen = torch.is_inference_mode_enabled()
    reads = Reads(records, thaw=frozen) if watch or frozen else None
    traced = Trace(_called.__code__, records) if trace else None
    calls = None if compiled is None or trace else _calls(reads)
    run = f if compiled is None or trace else compiled
    with grad_enabled():
        aliases = _Aliases(copy)
        arguments, keywords = aliases.arguments(args, kwargs, argnums, given, tree)
        if reads is not None:
            reads.note(scripted_state(f, aliases.others))
        with HookWatcher() as hooks:
            result = _called(run, arguments, keywords, records, reads, traced, calls)
            unhooked = hooks.since()
        result, aux = _apart(result) if has_aux else (result, None)
        outputs, out_space = _outputs(result)
        _note_meshes(records, out_space)
        records.note_conversions()
        edges = [
            _edge(x) for x, leaf in zip(outputs, out_space.leaves, strict=True) if leaf is not None
        ]
        check_not_behind(edges, given, tree.paths, aliases.leaves)
        made = (owner_of(x) for x in outputs if isinstance(x, torch.Tensor))
        owners = [node for node in made if node is not None]
        value = out_space.tree.unflatten(_detached(outputs, own=len(records) > 0))
    return Capture(
        value=value,
        aux=aux,
        in_space=in_space,
        out_space=out_space,
        edges=edges,
        owners=owners,
        leaves=aliases.leaves,
        records=records,
        reads=[] if reads is None else reads.stamps(),
        watched=reads is not None,
        moving=[] if reads is None else reads.moving(),
        hooks=hooks,
        unhooked=unhooked,
        outputs=[x for x in outputs if differentiable(x)],
        trace=traced,
        name=function_name(f),
        derivative=is_derivative(f),
        pieces=() if calls is None else tuple(calls.pieces),
    )


def _calls(reads: Reads | None) -> CompiledCalls:
    return CompiledCalls() if reads is None else CompiledCalls([reads], reads.note_compiled)


def _refuse_transforms() -> None:
    if functorch_active():
        raise UnsupportedError(
            "a Linearizer cannot run inside torch.func transforms (vmap, grad, jvp, ...); "
            "linearize the transformed function instead, or use linearize.func"
        )
    if being_traced():
        raise UnsupportedError(
            "a Linearizer cannot be traced (make_fx, torch.export): the trace would hold the "
            "numbers of this one point; trace functions of linearize.func, which go to torch.func "
            "there, or linearize before the trace"
        )


class _Aliases:
    """Detached aliases of f's arguments: of `leaves`, which are differentiated, and of the others.

    The graph may keep these too, and must not keep the caller's own objects alive. What is no
    tensor is among `others` as it is.
    """

    def __init__(self, copy: bool) -> None:
        self._copy = copy
        self.leaves: list[torch.Tensor] = []
        self.others: list[Any] = []

    def arguments(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        argnums: Sequence[int],
        given: Sequence[Any],
        tree: Tree,
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """Return what f is called with, where some arguments were flattened already."""
        whole = list(argnums) == list(range(len(args)))
        if whole and not kwargs:
            return tree.unflatten([self._alias(x, True) for x in given]), {}
        chosen = set(argnums)
        others = [] if whole else [a for i, a in enumerate(args) if i not in chosen]
        rest, frame = flatten((others, dict(kwargs)))
        mine: Sequence[Any] = tree.unflatten([self._alias(x, True) for x in given])
        fixed, keywords = frame.unflatten([self._alias(x, False) for x in rest])
        if whole:
            return mine, keywords
        by_place, theirs = dict(zip(argnums, mine, strict=True)), iter(fixed)
        return [by_place[i] if i in chosen else next(theirs) for i in range(len(args))], keywords

    def _alias(self, x: Any, differentiate: bool) -> Any:
        if not isinstance(x, torch.Tensor):
            self.others.append(x)
            return x.copy() if self._copy and hasattr(x, "__array_interface__") else x
        t = x.clone().detach() if self._copy or x.is_inference() else x.detach()
        if differentiate and differentiable(t):
            self.leaves.append(t.requires_grad_())
        return t


def _called(
    f: Callable[..., Any],
    arguments: Sequence[Any],
    keywords: Mapping[str, Any],
    records: ContextRecords,
    reads: Reads | None,
    traced: Trace | None,
    calls: CompiledCalls | None,
) -> Any:
    """Call f; this is where a trace of its lines begins."""
    if traced is not None:
        records.locate = traced.locate
    with (
        records.watching(),
        eager_compiled_functions() if calls is None else compiled_functions(calls),
        collectives_seen(),
        NOTHING if reads is None else reads,
        NOTHING if traced is None else traced,
    ):
        return _in_full(applied_late(f)(*arguments, **keywords))


def _in_full(result: Any) -> Any:
    """Return f's result with DTensors that are still to be added up over the ranks added up."""
    if not may_be_sharded():
        return result
    return pytree.tree_map_only(torch.Tensor, lambda t: reduced(t) if is_sharded(t) else t, result)


def _note_meshes(records: ContextRecords, space: Space) -> None:
    for layout in space.layouts:
        if layout is not None:
            records.note_mesh(layout.whole.mesh)


def _apart(result: Any) -> tuple[Any, Any]:
    """Return f's value, and what it returned beside it, without history."""
    if not (isinstance(result, tuple) and len(result) == 2):
        raise StructureError(
            f"has_aux=True: f must return a tuple (value, aux), got {type(result).__name__}"
        )
    value, aux = result
    return value, pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, aux)


def _detached(outputs: Sequence[Any], *, own: bool) -> list[Any]:
    """Return outputs without history; `own` copies, for a custom Function may overwrite them."""
    return [
        (x.detach().clone() if own else x.detach()) if isinstance(x, torch.Tensor) else x
        for x in outputs
    ]


def _edge(output: torch.Tensor) -> Edge | None:
    if not output.requires_grad:
        return None
    if type(output) is torch.Tensor and output.grad_fn is not None:
        return output.grad_fn, output.output_nr  # quicker
    edge = gradient_edge(output)
    return edge.node, edge.output_nr


def _check_layouts(leaves: Sequence[Any], tree: Tree) -> None:
    for x, path in zip(leaves, tree.paths, strict=True):
        if isinstance(x, torch.Tensor) and not _is_usual(x):
            _check_tensor(x, f"primal{path}")


def _check_some(leaves: Sequence[Any], space: Space) -> None:
    if not space.tensors:
        kinds = ", ".join(
            f"primal{path}: {_kind(x)}" for x, path in zip(leaves, space.paths, strict=True)
        )
        raise StructureError(
            "no differentiable primal: at least one must be a floating point or complex tensor; "
            f"got {kinds or 'no arguments'}"
        )


def _kind(leaf: Any) -> str:
    """Describe what is no differentiable primal, with what would make one of it."""
    name = type(leaf).__name__
    if isinstance(leaf, (float, complex)) or hasattr(leaf, "__array_interface__"):
        return f"{name} (make a tensor of it: torch.as_tensor)"
    if dataclasses.is_dataclass(leaf):
        return f"{name} (register the dataclass: torch.export.register_dataclass({name}))"
    if isinstance(leaf, torch.Tensor):
        return f"{TensorSpec.of(leaf)} (convert it: .double())"
    return name


def _is_usual(t: torch.Tensor) -> bool:
    """Whether there is nothing to check; quicker than to do so."""
    return (
        type(t) is torch.Tensor
        and t.layout is torch.strided
        and not (t.is_nested or t.is_quantized or t.is_meta or batched_or_wrapped(t))
    )


def _check_tensor(t: torch.Tensor, what: str) -> None:
    if is_sharded(t):
        if any(p.is_partial() for p in lies(t).placements):
            raise UnsupportedError(
                f"{what}: a DTensor whose ranks hold what is still to be added up (Partial) is "
                "not supported; call redistribute() first"
            )
        t = local_of(t)
    if t.is_nested:
        raise UnsupportedError(f"{what}: nested tensors are not supported; pad to a dense one")
    if t.is_quantized:
        raise UnsupportedError(
            f"{what}: quantized tensors have no derivative; call dequantize() first"
        )
    if t.layout != torch.strided:
        raise UnsupportedError(
            f"{what}: layout {t.layout} is not supported; pass its values as a dense primal, and "
            "compute with them by index_select and index_add or in a custom Function (a constant "
            "sparse tensor may be used inside f as it is)"
        )
    if t.device.type == "meta":
        raise UnsupportedError(f"{what}: a meta tensor has no numbers to linearize at")
    if batched_or_wrapped(t):
        raise UnsupportedError(f"{what}: is a tensor of a torch.func transform that has ended")
    if type(t).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise UnsupportedError(
            f"{what}: the tensor subclass {type(t).__name__} is not supported; pass its plain "
            "tensors and build it inside f"
        )


def _outputs(result: Any) -> tuple[list[Any], Space]:
    leaves, tree = flatten(result)
    for x, path in zip(leaves, tree.paths, strict=True):
        if isinstance(x, torch.Tensor):
            if not _is_usual(x):
                _check_tensor(x, f"output{path}")
        elif isinstance(x, (float, complex)):
            raise StructureError(
                f"output{path}: f returned the number {x!r}, whose derivative would be lost; "
                "return a tensor, or return it beside the value with has_aux=True"
            )
    if not any(isinstance(x, torch.Tensor) for x in leaves):
        raise StructureError(
            f"f returned {type(result).__name__}, which contains no tensor; expected a tensor or "
            "a pytree of tensors"
        )
    return leaves, Space.of_leaves(leaves, tree, "cotangent", "value")
