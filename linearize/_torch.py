"""Floor 0: the only home of PyTorch names that are private or not stable.

Everything that may change from one PyTorch release to the next is reached through here,
so that a new release is met by editing one file.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._ops import OpOverload as OpOverload
from torch.autograd import forward_ad
from torch.autograd import function as autograd_function
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.autograd.graph import Node as Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import CheckpointFunction, checkpoint

__all__ = [
    "ContextWatcher",
    "DispatchKey",
    "DispatchMode",
    "Node",
    "OpOverload",
    "accumulators",
    "aten",
    "bare",
    "batched_or_wrapped",
    "call_node",
    "decompositions",
    "eager_compiled_functions",
    "forward_class",
    "functions_as_they_are",
    "functions_overridden",
    "functorch_active",
    "gradient_edge",
    "has_forward_tangent",
    "has_memory",
    "input_metadata",
    "is_custom",
    "is_generated",
    "is_view_op",
    "is_wrapped_number",
    "key_string",
    "lazy_bits_respected",
    "leaf_variable",
    "let_die_in_turn",
    "materialized_arguments",
    "native_function",
    "native_method",
    "only_raises",
    "outside_backward",
    "outside_transforms",
    "packed_by_hooks",
    "pytree",
    "reachable_elsewhere",
    "recomputed_apart",
    "recomputed_once",
    "saved_names",
    "saved_tensors",
    "set_grad_mode",
    "spec_children",
    "subclasses_ignored",
    "transform_depth",
    "unobserved",
    "unpacked",
    "without_inference_mode",
    "without_subclass",
]

aten: Any = torch.ops.aten
DispatchKey: Any = torch._C.DispatchKey
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

T = TypeVar("T")
KeyPath: TypeAlias = tuple[Any, ...]


class DispatchMode(TorchDispatchMode):
    """A dispatch mode that does not load the compiler.

    The base class wraps its subclasses' methods in a way that imports `torch._dynamo` at the
    first call, which takes a second.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def bare(op: Any) -> Any:
    """Return an operation without its Python part, which does nothing but call it."""
    return getattr(op, "_op", op)


def native_function(name: str) -> Callable[..., Any]:
    """Return the C function that `torch` offers by this name, whatever stands there now."""
    return cast(Callable[..., Any], getattr(torch._C._VariableFunctions, name))


def native_method(name: str) -> Callable[..., Any]:
    """Return the C method that tensors have by this name, whatever stands there now."""
    return cast(Callable[..., Any], getattr(torch._C.TensorBase, name))


def key_string(path: KeyPath) -> str:
    """Return `['a'][0].b` for a pytree key path."""
    return str(pytree.keystr(path))


def reachable_elsewhere(t: torch.Tensor, aliases: int) -> bool:
    """Whether somebody else holds `t` or its memory; never wrongly denied.

    Parameters
    ----------
    t
        A tensor that the caller holds by one reference.
    aliases
        How many tensors on the same storage the caller holds, `t` included.
    """
    count = _references(t)
    if (count > _LEAST and count > _lone_references()) or t._use_count() > 1:  # type: ignore[attr-defined]
        return True
    storage = t.untyped_storage()
    # Python's handle on the storage is one of its owners.
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1 > aliases


def _references(t: torch.Tensor) -> int:
    return sys.getrefcount(t)


def _lone_references() -> int:
    """Return what `_references` counts for a tensor with one holder, called as above.

    Not once for all: it is more while `torch.compile` has a say in how frames are run, as it
    goes on to have after a failure.
    """
    holder = types.SimpleNamespace(tensor=torch.zeros(()))

    def called_with(t: torch.Tensor) -> int:
        return _references(t)

    return called_with(holder.tensor)


#: What it is at least.
_LEAST = _lone_references()


def spec_children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    """Return the structures of the children of a pytree node."""
    return list(spec.children() if hasattr(spec, "children") else spec.children_specs)


#: Whether a `torch.func` transform is running around the caller.
functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

#: Switches grad mode on or off, as `torch.no_grad` does at both its ends, and much quicker.
set_grad_mode: Callable[[bool], None] = torch._C._set_grad_enabled


#: Whether somebody watches or replaces PyTorch's Python functions in this thread.
functions_overridden: Callable[[], bool] = torch._C._is_torch_function_mode_enabled


def functions_as_they_are() -> contextlib.AbstractContextManager[Any]:
    """Hide PyTorch's Python functions from those who watch or replace them."""
    disabled: contextlib.AbstractContextManager[Any] = torch._C.DisableTorchFunction()
    return disabled


def transform_depth() -> int:
    """Return how many `torch.func` transforms are running around the caller, one in another."""
    return len(torch._C._functorch.get_interpreter_stack() or ())


def has_forward_tangent(t: Any) -> bool:
    """Whether `t` is a dual tensor of an open `torch.autograd.forward_ad` level."""
    if not isinstance(t, torch.Tensor) or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(t).tangent is not None


def has_memory(t: torch.Tensor) -> bool:
    """Whether a dense tensor has memory; forward mode makes zeros that have none."""
    return not t._is_zerotensor()


def batched_or_wrapped(t: torch.Tensor) -> bool:
    """Whether `t` belongs to a `torch.func` transform (a batched or tracked tensor)."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(t))


def is_custom(node: Node) -> bool:
    """Whether a graph node is the context of a custom `torch.autograd.Function`."""
    return isinstance(node, BackwardCFunction)


def call_node(node: Any, grads: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
    """Call a built-in graph node with gradients of its outputs."""
    if getattr(node, "_saved_sparse", False) and grads[0] is not None:
        dense = _DENSE.get(node.name())  # the same gradient as of `sparse=False`
        if dense is not None:
            return dense(node, grads[0])
    result = node(*grads)
    return result if isinstance(result, (tuple, list)) else (result,)


def _embedding(node: Any, grad: torch.Tensor) -> Sequence[torch.Tensor | None]:
    return (
        aten.embedding_dense_backward.default(
            grad,
            node._saved_indices,
            node._saved_weight_sym_argsize_0,
            _signed(node._saved_padding_idx),
            node._saved_scale_grad_by_freq,
        ),
    )


def _embedding_bag(node: Any, grad: torch.Tensor) -> Sequence[torch.Tensor | None]:
    indices, offsets, bags = node._saved_indices, node._saved_offsets, node._saved_result1
    mode, padding = node._saved_mode, _signed(node._saved_padding_idx)
    weight = aten._embedding_bag_backward.default(
        grad,
        indices,
        offsets,
        bags,
        node._saved_result2,
        node._saved_result3,
        node._saved_weight_sym_argsize_0,
        node._saved_scale_grad_by_freq,
        mode,
        False,  # not sparse
        node._saved_per_sample_weights,
        padding,
    )
    if node.next_functions[-1][0] is None:
        return weight, None
    of_samples = aten._embedding_bag_per_sample_weights_backward.default
    return weight, of_samples(grad, node._saved_weight, indices, offsets, bags, mode, padding)


_DENSE: dict[str, Callable[..., Sequence[torch.Tensor | None]]] = {
    "EmbeddingBackward0": _embedding,
    "EmbeddingBagBackward0": _embedding_bag,
}


def _signed(n: int) -> int:
    # Some nodes hand out a negative number as an unsigned one.
    return n - (1 << 64) if n >= 1 << 63 else n


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


def subclasses_ignored() -> contextlib.AbstractContextManager[Any]:
    """Let operations on tensor subclasses return plain tensors, as C++ code sees them."""
    return torch._C.DisableTorchFunctionSubclass()


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


def without_subclass(t: torch.Tensor) -> torch.Tensor:
    """Return `t` without history as a plain tensor on the same memory."""
    with subclasses_ignored():
        plain = t.detach()
        return plain if type(plain) is torch.Tensor else plain.as_subclass(torch.Tensor)


def leaf_variable(node: Node) -> torch.Tensor | None:
    """Return the leaf tensor behind an `AccumulateGrad` node, None for other nodes."""
    return getattr(node, "variable", None)


def input_metadata(node: Any) -> Sequence[Any]:
    """Return shape, dtype and device of each gradient that the node receives."""
    metadata: Sequence[Any] = node._input_metadata
    return metadata


@contextlib.contextmanager
def without_inference_mode() -> Iterator[None]:
    """Leave inference mode, without grad mode, which leaving alone would switch on."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def unobserved() -> contextlib.AbstractContextManager[Any]:
    """Suspend dispatch modes."""
    return _disable_current_modes()


def outside_transforms() -> contextlib.AbstractContextManager[Any]:
    """Suspend `torch.func` transforms, for work that has nothing to do with them."""
    return temporarily_clear_interpreter_stack() if functorch_active() else _NOTHING


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


def lazy_bits_respected() -> contextlib.AbstractContextManager[Any]:
    """Let operations inside `__torch_dispatch__` see conjugate, negative and zero bits.

    PyTorch hands over below the keys that resolve these bits, so that there
    `x.conj() * 2` would be `x * 2`, also inside composite operations such as `linalg.pinv`.
    """
    now = torch._C._dispatch_tls_local_exclude_set()
    raw = now.raw_repr()
    excluded = _LESS_EXCLUDED.get(raw)
    if excluded is None:
        key = torch._C.DispatchKey
        for lazy in (key.Conjugate, key.Negative, key.ZeroTensor):
            now = now.remove(lazy)
        excluded = _LESS_EXCLUDED[raw] = now
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


_LESS_EXCLUDED: dict[int, Any] = {}


def decompositions(op: Any) -> Callable[..., Any] | None:
    """Return the function that computes `op` by simpler operations, None if there is none."""
    from torch._decomp import decomposition_table  # loads slowly and is seldom needed

    return decomposition_table.get(op)


def is_view_op(op: OpOverload) -> bool:
    """Whether an operation returns a view of its first argument and writes nothing."""
    return bool(op.is_view)


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


def is_wrapped_number(t: torch.Tensor) -> bool:
    """Whether a tensor without dimensions stands for a Python number.

    Such a number does not take part in type promotion as a tensor would. Never wrongly denied.
    """
    if t.device.type != "cpu":
        return False
    smaller = _SMALLER.get(t.dtype)
    if smaller is None:
        return t.dtype == torch.bool
    return torch.result_type(smaller, t) == smaller.dtype


#: Python numbers are saved in the dtypes on the left.
_SMALLER = {
    torch.float64: torch.empty((), dtype=torch.float32, device="cpu"),
    torch.complex128: torch.empty((), dtype=torch.complex64, device="cpu"),
    torch.int64: torch.empty((), dtype=torch.int32, device="cpu"),
}


@functools.cache
def saved_names(kind: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the attributes of a node class that are saved tensors, and the other saved ones."""
    raw = [name for name in dir(kind) if name.startswith("_raw_saved_")]
    tensors = tuple(name.removeprefix("_raw") for name in raw)
    known = [name for name in dir(kind) if name.startswith("_saved_")]
    return tensors, tuple(name for name in known if name not in tensors)


def unpacked(node: Node, name: str, raw: str) -> Any:
    """Return a saved tensor, or a sequence of them, given the names of both its forms.

    Raises
    ------
    RuntimeError
        If it was changed in place, or freed, or packed by a hook, which may compute anything.
    """
    packed = getattr(node, raw)
    for one in packed if isinstance(packed, (tuple, list)) else (packed,):
        if getattr(one, "unpack_hook", None) is not None:
            raise RuntimeError(f"{name} was packed by a hook")
    return getattr(node, name)


def saved_tensors(node: Node) -> Iterator[torch.Tensor]:
    """Yield the tensors that a built-in node keeps, as far as they lie ready.

    What was packed by a hook is left alone: to unpack it may mean to compute it again.
    """
    for name in saved_names(type(node))[0]:
        saved = getattr(node, f"_raw{name}")
        for raw in saved if isinstance(saved, (tuple, list)) else (saved,):
            if raw is None or getattr(raw, "unpack_hook", None) is not None:
                continue
            t = getattr(raw, "data", None)
            if isinstance(t, torch.Tensor):
                yield t


def recomputed_once() -> contextlib.AbstractContextManager[Any]:
    """Let a checkpointed block run once for all that is unpacked of it inside.

    Outside of a backward pass it runs for every single tensor. A tensor can be unpacked once.
    """
    group: Any = getattr(torch.utils.checkpoint, "GraphExecGroup", None)
    if group is None or group._get_current_group() is not None:
        return _NOTHING
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


def only_raises(cls: Any) -> bool:
    """Whether a Function was made for a `torch.library` operator without autograd."""
    if not cls.__name__.startswith("GeneratedBackwardFor_"):
        return False
    todo = [cls.backward]
    while todo:
        for cell in getattr(todo.pop(), "__closure__", None) or ():
            content = cell.cell_contents
            if hasattr(content, "_backward_fn"):
                return content._backward_fn is None
            if callable(content) and hasattr(content, "__closure__"):
                todo.append(content)
    return False


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


class _Eager:
    """Counts who wants compiled functions to run eagerly; the stance is one for all threads."""

    lock = threading.Lock()
    users = 0
    stance: Any = None

    @classmethod
    def begin(cls) -> None:
        with cls.lock:
            if cls.users == 0:
                cls.stance = torch.compiler.set_stance("force_eager")
                cls.stance.__enter__()
            cls.users += 1

    @classmethod
    def end(cls) -> None:
        with cls.lock:
            cls.users -= 1
            if cls.users == 0:
                cls.stance.__exit__(None, None, None)
                cls.stance = None


@contextlib.contextmanager
def eager_compiled_functions() -> Iterator[None]:
    """Run `torch.compile`d functions eagerly, so that they leave an ordinary graph.

    `torch._dynamo` is costly to import; where it is not loaded nothing can be compiled.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    _Eager.begin()
    try:
        yield
    finally:
        _Eager.end()


def _checkpointed(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
    """Stand for `CheckpointFunction.apply` while a watcher is active in this thread."""
    if ContextWatcher.current() is None:
        return _APPLY.__get__(None, CheckpointFunction)(function, preserve, *args)
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=preserve,
        determinism_check="none",
    )


class ContextWatcher:
    """Learns what the contexts of custom Functions do not tell after `forward`.

    Reentrant checkpoints become plain ones meanwhile: the backward of a reentrant one runs the
    block again at each product, adds to the `grad` of parameters, and does not know of
    primals that the block reads from a closure.

    While it is active, in this thread only, it is told of each new context, of the arguments
    of its `forward`, and of calls of `save_for_forward` (PyTorch drops those tensors after
    `forward`) and `set_materialize_grads` (which can be set but not read).

    The hooks are installed on PyTorch's context classes when a custom Function is applied while a
    watcher is active in that thread, and removed with the last watcher of any thread. Not before:
    to change a method of a class with a hundred subclasses takes longer than many a run of f.

    Parameters
    ----------
    on_create
        Called with `(context, arguments)`; arguments is None where they cannot be seen.
    on_save_for_forward
        Called with `(context, tensors)`.
    on_materialize
        Called with `(context, flag)`.
    """

    _lock = threading.Lock()
    _users = 0
    _hooked = False
    _local = threading.local()
    _save_for_forward: Callable[..., None] = FunctionCtx.save_for_forward
    _set_materialize: Callable[..., None] = FunctionCtx.set_materialize_grads

    def __init__(
        self,
        on_create: Callable[[Any, tuple[Any, ...] | None], None],
        on_save_for_forward: Callable[[Any, tuple[Any, ...]], None],
        on_materialize: Callable[[Any, bool], None],
    ) -> None:
        self.on_create = on_create
        self.on_save_for_forward = on_save_for_forward
        self.on_materialize = on_materialize

    def __enter__(self) -> ContextWatcher:
        cls = ContextWatcher
        with cls._lock:
            if cls._users == 0:
                CheckpointFunction.apply = staticmethod(_checkpointed)  # type: ignore[method-assign]
                if _APPLY_ASKS:
                    autograd_function._is_setup_context_defined = _asked
                else:
                    cls._hook()
            cls._users += 1
        stack = cls._local.__dict__.setdefault("stack", [])
        stack.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        cls = ContextWatcher
        cls._local.stack.pop()
        with cls._lock:
            cls._users -= 1
            if cls._users == 0:
                del CheckpointFunction.apply
                if _APPLY_ASKS:
                    autograd_function._is_setup_context_defined = _ASKED
                cls._unhook()

    @classmethod
    def expect(cls) -> None:
        """Make ready for a context that is about to be made."""
        with cls._lock:
            if cls._users:
                cls._hook()

    @classmethod
    def _hook(cls) -> None:
        if cls._hooked:
            return
        cls._hooked = True
        BackwardCFunction.__init__ = _created  # type: ignore[method-assign]
        FunctionCtx.save_for_forward = _saving  # type: ignore[method-assign]
        FunctionCtx.set_materialize_grads = _materializing  # type: ignore[method-assign]
        if _APPLY_CODE is None:
            torch.autograd.Function.apply = classmethod(_applied)  # type: ignore[assignment,method-assign]

    @classmethod
    def _unhook(cls) -> None:
        if not cls._hooked:
            return
        cls._hooked = False
        del BackwardCFunction.__init__
        FunctionCtx.save_for_forward = cls._save_for_forward  # type: ignore[method-assign]
        FunctionCtx.set_materialize_grads = cls._set_materialize  # type: ignore[method-assign]
        if _APPLY_CODE is None:
            torch.autograd.Function.apply = _APPLY  # type: ignore[method-assign]

    @classmethod
    def current(cls) -> ContextWatcher | None:
        """Return the innermost watcher of this thread."""
        stack = cls._local.__dict__.get("stack")
        return stack[-1] if stack else None


_APPLY: Any = torch.autograd.Function.__dict__["apply"]
#: The Python part of `Function.apply`; None where there is none (from PyTorch 2.15 on).
_APPLY_CODE = getattr(getattr(_APPLY, "__func__", None), "__code__", None)


#: Asked by the Python part of `Function.apply` before it does anything else.
_ASKED: Any = getattr(autograd_function, "_is_setup_context_defined", None)
_APPLY_ASKS = _APPLY_CODE is not None and "_is_setup_context_defined" in _APPLY_CODE.co_names


def _asked(method: Any) -> Any:
    if ContextWatcher.current() is not None:
        ContextWatcher.expect()
    return _ASKED(method)


def applied_late(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `F.apply` such that a watcher sees its arguments, anything else as it is."""
    owner = getattr(f, "__self__", None)
    own = isinstance(owner, type) and issubclass(owner, torch.autograd.Function)
    if _APPLY_CODE is None and own and getattr(f, "__name__", "") == "apply":
        return lambda *args, **kwargs: owner.apply(*args, **kwargs)  # type: ignore[union-attr]
    return f


_NO_SETUP: Any = torch.autograd.Function.setup_context


def _applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand for `Function.apply` where that has no Python part."""
    if cls.setup_context is not _NO_SETUP:
        bound = inspect.signature(cls.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        args, kwargs = bound.args, bound.kwargs
    return _APPLY.__get__(None, cls)(*args, **kwargs)


def _created(self: Any) -> None:
    watcher = ContextWatcher.current()
    if watcher is None:
        return
    # The C++ part of `Function.apply` makes the context; its Python part is the caller and
    # holds the arguments.
    frame = sys._getframe(1)
    known = frame.f_code in (_APPLY_CODE, _applied.__code__)
    watcher.on_create(self, frame.f_locals.get("args") if known else None)


def _saving(self: Any, *tensors: torch.Tensor) -> None:
    ContextWatcher._save_for_forward(self, *tensors)
    watcher = ContextWatcher.current()
    if watcher is not None:
        watcher.on_save_for_forward(self, tensors)


def _materializing(self: Any, value: bool) -> None:
    ContextWatcher._set_materialize(self, value)
    watcher = ContextWatcher.current()
    if watcher is not None:
        watcher.on_materialize(self, value)


def _contexts_keep_nodes() -> bool:
    """Whether a context keeps what its node saved, when nothing else of the graph is left."""

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.clone()

    with torch.inference_mode(False), torch.enable_grad():
        node: Any = Probe.apply(torch.ones((), requires_grad=True)).grad_fn  # type: ignore[no-untyped-call]
        try:
            return len(node.saved_tensors) == 1
        except RuntimeError:
            return False


_CONTEXTS_KEEP_NODES = _contexts_keep_nodes()


def owner_of(t: torch.Tensor) -> Node | None:
    """Return what keeps the graph of a tensor alive for its contexts, None if they do so.

    Before PyTorch 2.13 they do not.
    """
    if _CONTEXTS_KEEP_NODES or not t.requires_grad:
        return None
    with torch.enable_grad():
        return t.view_as(t).grad_fn
