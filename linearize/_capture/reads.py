"""What f reads while it runs.

The memo must know which tensors a value came from, beside the arguments: `Reads` notes them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .._torch.modes import DispatchMode, lazy_bits_respected
from .._torch.names import batched_or_wrapped, pytree


class Reads(TorchFunctionMode):
    """Notes every tensor that PyTorch's Python interface is given while f runs.

    Parameters
    ----------
    thaw
        Whether to hand on copies of inference tensors, which autograd does not accept.
    """

    def __init__(self, *, thaw: bool = False) -> None:
        super().__init__()
        self._seen: dict[int, weakref.ref[torch.Tensor]] = {}
        self._thaw = thaw

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.note(args)
        if kwargs:
            self.note(kwargs.values())
        if self._thaw and not getattr(func, "__name__", "").endswith("_"):
            args, kwargs = pytree.tree_map(_thawed, (args, kwargs))
        if func in _RUNS_BACKWARD:
            # Python code that runs inside is out of this mode's sight.
            with _DeepReads(self):
                return func(*args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)

    def note(self, items: Iterable[Any]) -> None:
        for a in items:
            if isinstance(a, _TENSOR):
                self._seen[id(a)] = _REF(a)
            elif type(a) in _SEQUENCES:
                self.note(a)

    def stamps(self) -> list[tuple[weakref.ref[torch.Tensor], int]]:
        """Return the tensors still alive with their versions now."""
        alive = ((ref, ref()) for ref in self._seen.values())
        return [
            (ref, t._version)
            for ref, t in alive
            if t is not None and not batched_or_wrapped(t) and not t.is_inference()
        ]


_RUNS_BACKWARD = {torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward}
#: Looked up once: this runs at each operation of f.
_TENSOR, _REF, _SEQUENCES = torch.Tensor, weakref.ref, (list, tuple)


def _thawed(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x


class _DeepReads(DispatchMode):
    """Notes the tensors that operations are given inside a backward run by f."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._reads.note(args)
        with lazy_bits_respected():
            return func(*args, **(kwargs or {}))


def scripted_state(f: Any, arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield parameters and buffers of TorchScript modules in reach, which run out of sight."""
    todo: list[Any] = [f, *(x for x in arguments if not isinstance(x, torch.Tensor))]
    seen: set[int] = set()
    while todo and len(seen) < 200:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (torch.Tensor, type)):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.nn.Module):
            for module in thing.modules():
                if isinstance(module, torch.jit.ScriptModule):
                    yield from module.parameters()
                    yield from module.buffers()
        elif callable(thing):
            cells = getattr(thing, "__closure__", None) or ()
            todo.extend(cell.cell_contents for cell in cells if _filled(cell))
            todo.extend(getattr(thing, name, None) for name in ("__self__", "func"))
            todo.extend(getattr(thing, "__dict__", {}).values())


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a closure over a name that has no value yet
        return False
