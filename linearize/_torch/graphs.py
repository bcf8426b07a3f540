"""Nodes of autograd graphs, and what they keep."""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.autograd.graph import Node as Node

from .aot import SAVED_BY_PIECES, is_piece
from .modes import NOTHING, subclasses_ignored, unobserved
from .names import OpOverload

T = TypeVar("T")


#: The nodes in which the gradients of leaf tensors end.
AccumulateGrad: Any = cast("Any", torch._C._functions).AccumulateGrad


def is_custom(node: Node) -> bool:
    """Whether a graph node is the context of a custom `torch.autograd.Function`."""
    return isinstance(node, BackwardCFunction)


#: The classes of PyTorch's own nodes that were met, and those that keep running statistics.
_BUILT_IN: set[type] = set()
NORMS: set[type] = set()


def some_custom(kinds: set[type]) -> bool:
    """Whether among classes of nodes there are those of such contexts."""
    custom = False
    for kind in kinds - _BUILT_IN:
        if issubclass(kind, BackwardCFunction):
            custom = True
        elif is_generated(kind):
            _BUILT_IN.add(kind)
            if "BatchNorm" in kind.__name__:
                NORMS.add(kind)
    return custom


class _Children:
    """Lets the nodes below a graph node die one after the other, not one inside the other."""

    __slots__ = ("nodes",)
    _local = threading.local()

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes

    def __del__(self) -> None:
        local = _Children._local.__dict__
        dying = local.get("dying")
        if dying is not None:
            dying.extend(self.nodes)
            return
        dying = local["dying"] = self.nodes
        try:
            while dying:
                dying.pop()
        finally:
            local["dying"] = None


#: Up to so many nodes may die inside each other; each takes some hundred bytes of the stack.
_SHALLOW = 2000


def let_die_in_turn(nodes: Collection[Node], others: int = 0) -> None:
    """Prepare nodes of a deep graph, seen from Python, for their end.

    Parameters
    ----------
    nodes
        Of the graph.
    others
        How many more of its nodes were seen before.

    Notes
    -----
    A node that Python has seen keeps its Python object, and then PyTorch (2.13) destroys what
    is below it recursively: from some ten thousand nodes on the stack overflows. The nodes'
    metadata, which go first, hand over what is below to a loop.
    """
    if len(nodes) + others > _SHALLOW:
        for node in nodes:
            below = [child for child, _ in node.next_functions if child is not None]
            if below:
                metadata: Any = node.metadata
                metadata["linearize"] = _Children(below)


def pulled_back(
    roots: Sequence[tuple[Node, int]],
    cotangents: Sequence[torch.Tensor],
    leaves: Sequence[torch.Tensor],
) -> list[torch.Tensor | None]:
    """Return what PyTorch's engine makes of cotangents; the graph stays as it is.

    No result shares memory with another one or with a cotangent.
    """
    found = torch.autograd.grad(
        [GradientEdge(node, nr) for node, nr in roots],
        leaves,
        cotangents,
        retain_graph=True,
        allow_unused=True,
    )
    taken = {t.untyped_storage().data_ptr() for t in cotangents}
    return [None if t is None else _own(t, taken) for t in found]


def _own(t: torch.Tensor, taken: set[int]) -> torch.Tensor:
    """Return a dense tensor on memory that is not among what is taken, and add it to that."""
    if t.layout is not torch.strided:
        t = t.to_dense()
    begin = t.untyped_storage().data_ptr()
    if begin in taken or t.is_conj() or t.is_neg():
        t = t.resolve_conj().resolve_neg().clone()
        begin = t.untyped_storage().data_ptr()
    taken.add(begin)
    return t


def has_outputs(node: Any) -> bool:
    """Whether the call that made a custom node has returned."""
    return len(node._input_metadata) > 0


def forward_class(node: Node) -> Any:
    """Return the `torch.autograd.Function` subclass that made a custom node."""
    return node._forward_cls  # type: ignore[attr-defined]


def gradient_edge(t: torch.Tensor) -> GradientEdge:
    """Return where the gradient of `t` goes, for a tensor that requires grad.

    A subclass that intercepts functions is not asked: what it returns from a view may have
    more history than PyTorch's own `get_gradient_edge` reckons with.
    """
    with subclasses_ignored():
        return get_gradient_edge(t)


def accumulators(leaves: Sequence[torch.Tensor]) -> list[Node]:
    """Return the nodes in which the gradients of leaf tensors end."""
    with torch.enable_grad(), subclasses_ignored():
        return [t.view_as(t).grad_fn.next_functions[0][0] for t in leaves]  # type: ignore[union-attr,misc]


def history(tensors: Iterable[torch.Tensor]) -> list[Node]:
    """Return the graph nodes that made tensors, asked out of sight of all function modes.

    A view that must not be used any more, as PyTorch would say, counts as having none.
    """
    nodes = []
    with torch._C.DisableTorchFunction():
        for t in tensors:
            try:
                node = t.grad_fn
            except RuntimeError:
                continue
            if node is not None:
                nodes.append(node)
    return nodes


def node_of(t: torch.Tensor) -> Node | None:
    """Return where the gradient of a tensor goes, asked out of sight of all function modes.

    A view that must not be used any more, as PyTorch would say, has no such place.
    """
    with torch._C.DisableTorchFunction():
        try:
            return gradient_edge(t).node if t.requires_grad else None
        except RuntimeError:
            return None


def leaf_variable(node: Node) -> torch.Tensor | None:
    """Return the leaf tensor behind an `AccumulateGrad` node, None for other nodes."""
    return getattr(node, "variable", None)


#: The same, for many nodes at once.
METADATA: Callable[[Node], Sequence[Any]] = operator.attrgetter("_input_metadata")


def input_metadata(node: Any) -> Sequence[Any]:
    """Return shape, dtype and device of each gradient that the node receives."""
    metadata: Sequence[Any] = node._input_metadata
    return metadata


def outside_backward(do: Callable[[], T]) -> T:
    """Do something with graph nodes that a running backward pass must not influence.

    While the engine computes gradients of chosen inputs, a node called by hand skips results
    that do not lead there, and returns None for them. The engine's task is a matter of the
    thread: inside one, this goes to another thread.
    """
    if torch._C._current_graph_task_id() == -1:
        return do()
    outcome: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(do())
        except BaseException as error:  # handed on below
            failure.append(error)

    thread = threading.Thread(target=body, name="linearize")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def walking(do: Callable[[], T]) -> T:
    """Walk a graph, calling its nodes: without modes and history, outside of a backward pass."""

    def undisturbed() -> T:
        # All of these are a matter of the thread, and inside a backward pass that is another one.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            subclasses_ignored(),
            recomputed_once(),
            unobserved(),
        ):
            return do()

    return outside_backward(undisturbed)


def is_generated(kind: type) -> bool:
    """Whether a node class is one of those that PyTorch generates from its derivative table.

    They show what they saved, but for what shapes and dtypes tell.
    """
    return getattr(torch._C._functions, kind.__name__, None) is kind and kind.__name__ not in (
        "CopySlices",
        "Error",
        "DelayedError",
        "NotImplemented",
        "SendRpcBackward",
    )


def saved_names(kind: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the attributes of a node class that are saved tensors, and the other saved ones."""
    if issubclass(kind, BackwardCFunction) and is_piece(getattr(kind, "_forward_cls", None)):
        return tuple(SAVED_BY_PIECES), ("symints", "needs_input_grad")
    return _saved_names(kind)


@functools.cache
def _saved_names(kind: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    raw = [name for name in dir(kind) if name.startswith("_raw_saved_")]
    tensors = tuple(name.removeprefix("_raw") for name in raw)
    known = [name for name in dir(kind) if name.startswith("_saved_")]
    return tensors, tuple(name for name in known if name not in tensors)


class PackedError(RuntimeError):
    """Raised where something was packed by a hook."""


def unpacked(node: Node, name: str, raw: str) -> Any:
    """Return a saved tensor, or a sequence of them, given the names of both its forms.

    Raises
    ------
    PackedError
        If it was packed by a hook, which may compute anything.
    RuntimeError
        If it was changed in place, or freed.
    """
    packed = getattr(node, raw)
    for one in packed if isinstance(packed, (tuple, list)) else (packed,):
        if getattr(one, "unpack_hook", None) is not None:
            raise PackedError(f"{name} was packed by a hook")
    return getattr(node, name)


def saved_tensors(node: Node) -> Iterator[torch.Tensor]:
    """Yield the tensors that a built-in node keeps, as far as they lie ready.

    What was packed by a hook is left alone: to unpack it may mean to compute it again.
    """
    for name in saved_names(type(node))[0]:
        for raw in _packed(node, name):
            if raw is None or getattr(raw, "unpack_hook", None) is not None:
                continue
            t = getattr(raw, "data", None)
            if isinstance(t, torch.Tensor):
                yield t


def saved_changed(node: Node) -> bool:
    """Whether a tensor that a built-in node keeps was changed in place after it was saved."""
    for name in saved_names(type(node))[0]:
        packed = _packed(node, name)
        if any(getattr(raw, "unpack_hook", None) is not None for raw in packed):
            continue
        try:
            getattr(node, name)
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                return True
    return False


def _packed(node: Node, name: str) -> Sequence[Any]:
    """Return what a node saved under a name, as it lies there; nothing if f has freed it."""
    try:
        packed = getattr(node, SAVED_BY_PIECES.get(name, f"_raw{name}"))
    except RuntimeError:
        return ()
    return packed if isinstance(packed, (tuple, list)) else (packed,)


def recomputed_once() -> contextlib.AbstractContextManager[Any]:
    """Let a checkpointed block run once for all that is unpacked of it inside.

    Outside of a backward pass it runs for every single tensor. A tensor can be unpacked once.
    """
    group: Any = getattr(torch.utils.checkpoint, "GraphExecGroup", None)
    if group is None or group._get_current_group() is not None:
        return NOTHING
    return cast("contextlib.AbstractContextManager[Any]", group())


@contextlib.contextmanager
def recomputed_apart() -> Iterator[None]:
    """Let what is unpacked inside be unpacked again outside, of `recomputed_once`."""
    group: Any = getattr(torch.utils.checkpoint, "GraphExecGroup", None)
    current = None if group is None else group._get_current_group()
    if current is None:
        yield
        return
    group.__exit__(current)
    try:
        yield
    finally:
        group.__enter__(current)


def next_node_number() -> int:
    """Return the number that the next node of an autograd graph made in this thread gets."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number


def node_number(node: Node) -> int:
    """Return the number of a node, which tells when it was made in its thread."""
    return node._sequence_nr()


def packed_by_hooks(node: Any) -> bool:
    """Whether what a custom node saved was packed by saved-tensor hooks."""
    return any(
        getattr(raw, "unpack_hook", None) is not None for raw in node._raw_saved_tensors or ()
    )


def is_vmapped(node: Any) -> bool:
    """Whether a custom node is of a Function that `torch.vmap` generated of another."""
    return str(forward_class(node).__name__).startswith("Vmapped")


def only_raises(cls: Any) -> bool:
    """Whether a Function was made for a `torch.library` operator without autograd."""
    if not cls.__name__.startswith("GeneratedBackwardFor_"):
        return False
    infos = (x._backward_fn for x in _enclosed(cls.backward) if hasattr(x, "_backward_fn"))
    return next(infos, True) is None


def operator_of(cls: Any) -> OpOverload | None:
    """Return the `torch.library` operator that a Function was made for, None for other ones."""
    if not cls.__name__.startswith("GeneratedBackwardFor_"):
        return None
    return next((x for x in _enclosed(cls.forward) if isinstance(x, OpOverload)), None)


def vmapped(cls: Any) -> Any:
    """Return the Function that `torch.vmap` made another one of, None if it did not."""
    if getattr(cls.jvp, "__module__", "") != "torch._functorch.autograd_function":
        return None
    classes = (x for x in _enclosed(cls.jvp) if isinstance(x, type) and x is not cls)
    return next((x for x in classes if issubclass(x, torch.autograd.Function)), None)


def _enclosed(fn: Any) -> Iterator[Any]:
    """Yield what a function, and functions that it holds, found where they were made."""
    todo, seen = [fn], {id(fn)}
    while todo:
        for cell in getattr(todo.pop(), "__closure__", None) or ():
            content = cell.cell_contents
            yield content
            if hasattr(content, "__closure__") and id(content) not in seen:
                seen.add(id(content))
                todo.append(content)


def materialized_arguments(node: Node, output_nr: int) -> tuple[torch.Tensor | None, ...]:
    """Return what PyTorch's engine hands to `backward` of a custom node, zeros throughout.

    The engine runs this one node with `apply` shadowed, so that the user's `backward` is not
    called: the result tells what stands for each output that has no gradient (zeros of its
    shape, or None), information that a node does not show otherwise.
    """
    received: list[tuple[torch.Tensor | None, ...]] = []
    count = len(node.needs_input_grad)  # type: ignore[attr-defined]

    def probe(*grads: torch.Tensor | None) -> tuple[None, ...]:
        received.append(grads)
        return (None,) * count

    meta = input_metadata(node)[output_nr]
    zero = torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device)
    edges = [GradientEdge(n, nr) for n, nr in node.next_functions if n is not None]
    attributes = node.__dict__
    attributes["apply"] = probe
    try:
        torch.autograd.grad(
            [GradientEdge(node, output_nr)],
            edges[:1],
            [zero],
            retain_graph=True,
            allow_unused=True,
        )
    finally:
        del attributes["apply"]
    return received[0]


def signed(n: int) -> int:
    """Return a dimension; some nodes hand out a negative one as an unsigned number."""
    return n - (1 << 64) if n >= 1 << 63 else n
