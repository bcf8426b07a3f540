"""Operations, dispatch keys and pytrees, and what can be asked about one tensor."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch._library.custom_ops import CustomOpDef as CustomOpDef
from torch._ops import OpOverload as OpOverload
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree

aten: Any = torch.ops.aten
pytree = _pytree
DispatchKey: Any = torch._C.DispatchKey

KeyPath: TypeAlias = tuple[Any, ...]


def bare(op: Any) -> Any:
    """Return an operation without its Python part, which does nothing but call it."""
    return getattr(op, "_op", op)


def holds_tensors(script: Any) -> bool:
    """Whether a TorchScript function has tensors in it, as a trace of one that read some."""
    graph: Any = script.inlined_graph  # held: its nodes do not hold it
    constants = graph.findAllNodes("prim::Constant")
    return any(n.hasAttribute("value") and n.kindOf("value") == "t" for n in constants)


#: What may hold tensors in C, where Python does not see them.
OPAQUE: tuple[Any, ...] = (torch._C.ScriptMethod, torch.ScriptObject, torch.futures.Future)


def operator_functions(op: CustomOpDef) -> list[Any]:
    """Return the Python functions that a custom operator was made of."""
    names = ("_init_fn", "_backend_fns", "_setup_context_fn", "_backward_fn", "_vmap_fn")
    return [getattr(op, name, None) for name in names]


def native_function(name: str) -> Callable[..., Any]:
    """Return the C function that `torch` offers by this name, whatever stands there now."""
    return cast(Callable[..., Any], getattr(torch._C._VariableFunctions, name))


def native_method(name: str) -> Callable[..., Any]:
    """Return the C method that tensors have by this name, whatever stands there now."""
    return cast(Callable[..., Any], getattr(torch._C.TensorBase, name))


#: What tells lazy tensors from others: conjugated, negated, without memory.
BITS = tuple(map(native_method, ("is_conj", "is_neg", "_is_zerotensor")))


def key_string(path: KeyPath) -> str:
    """Return `['a'][0].b` for a pytree key path."""
    return str(pytree.keystr(path))


def reachable_elsewhere(t: torch.Tensor, aliases: int, holders: int) -> bool:
    """Whether somebody else holds `t` or its memory; never wrongly denied.

    The caller holds so many tensors on the same storage (`aliases`, `t` included), and `t` by so
    many references (`holders`).
    """
    count = _references(t) - holders + 1
    storage = t.untyped_storage()
    # Python's handle on the storage is one of its owners.
    if t._use_count() > 1 or int(torch._C._storage_Use_Count(storage._cdata)) - 1 > aliases:  # type: ignore[attr-defined]
        return True
    return count > _LEAST and count > _lone_references()  # last, for it takes longest


def storage_token(t: torch.Tensor) -> tuple[int, Any]:
    """Return what tells a storage from all others, and what must be held for it to do so."""
    token = StorageWeakRef(t.untyped_storage())
    return token.cdata, token


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


def has_forward_tangent(t: Any) -> bool:
    """Whether `t` is a dual tensor of an open `torch.autograd.forward_ad` level."""
    if not isinstance(t, torch.Tensor) or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(t).tangent is not None


def has_memory(t: torch.Tensor) -> bool:
    """Whether a dense tensor has memory; forward mode makes zeros that have none."""
    return not t._is_zerotensor()


def unwrapped(t: torch.Tensor) -> torch.Tensor:
    """Return the tensor inside of one of `torch.func`'s transforms, any other as it is."""
    while batched_or_wrapped(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


#: Whether a tensor belongs to a `torch.func` transform (a batched or tracked tensor).
batched_or_wrapped: Callable[[torch.Tensor], bool] = (
    torch._C._functorch.is_functorch_wrapped_tensor
)


def decompositions(op: Any) -> Callable[..., Any] | None:
    """Return the function that computes `op` by simpler operations, None if there is none."""
    from torch._decomp import decomposition_table  # loads slowly and is seldom needed

    return decomposition_table.get(op)


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


#: Functions that run a backward pass.
RUNS_BACKWARD = frozenset((torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward))
#: Functions with running statistics: the place of the first of both, and the name of the flag, the
#: sixth argument, by which they move, with its default.
MOVING_STATISTICS: dict[Any, tuple[int, str, bool]] = {
    torch.nn.functional.batch_norm: (1, "training", False),
    torch.nn.functional.instance_norm: (1, "use_input_stats", True),
    torch.batch_norm: (3, "training", False),
    torch.instance_norm: (3, "use_input_stats", True),
    torch.native_batch_norm: (3, "training", False),
    torch.cudnn_batch_norm: (3, "training", False),
    torch.miopen_batch_norm: (3, "training", False),
}


def statistics_of(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[int | str, Any], bool]:
    """Return the running statistics that such a function is given, and whether they move."""
    first, flag, moves = MOVING_STATISTICS[func]
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    places = (first, first + 1, "running_mean", "running_var")
    return {p: given[p] for p in places if p in given}, bool(given.get(5, given.get(flag, moves)))
