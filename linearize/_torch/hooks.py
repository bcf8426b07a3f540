"""Gradient hooks and hooks on saved tensors, registered while f runs or afterwards."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from .graphs import Node, node_of
from .watching import Installed, ThreadStack

_INIT: Any = RemovableHandle.__init__
_ENTER: Any = saved_tensors_hooks.__enter__
_AROUND: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)
#: Who makes a handle for a hook of a tensor, and who for one of a node.
_OF_TENSOR = torch.Tensor.register_hook.__code__
_OF_NODE = getattr(getattr(torch.autograd.Function, "_register_hook", None), "__code__", None)


class HookWatcher:
    """Learns of the gradient hooks that this thread registers while it is active.

    PyTorch does not tell which hooks a node has; but for each it makes a handle. `nodes` are those
    whose gradients hooks of tensors are given.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.some_on_nodes = False
        self._since: Unhooked | None = None

    def __enter__(self) -> HookWatcher:
        self._since = Unhooked()
        _WATCHING.__enter__()
        _WATCHERS.entered.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _WATCHERS.entered.pop()
        self._since = None  # which the frames of an error in f would hold
        _WATCHING.__exit__()

    def since(self) -> Unhooked:
        """Return what goes on looking out for hooks, when f has returned."""
        assert self._since is not None
        return self._since

    @property
    def any(self) -> bool:
        """Whether there are hooks of one of the two kinds."""
        return self.some_on_nodes or bool(self.nodes)

    def hooks(self, node: Node) -> bool:
        """Whether a node of the graph that f left has a hook that f registered."""
        return node in self.nodes or (self.some_on_nodes and _has_hooks(node))


#: The watchers of each thread.
_WATCHERS = ThreadStack()
no_hooks_watched = _WATCHERS.emptied


class Unhooked:
    """Knows whether a hook was registered since it was made, by whichever thread.

    PyTorch's engine runs gradient hooks, and has saved tensors unpacked by theirs, which a
    checkpoint does by running a part of f again. The latter count while a watcher is active: later
    ones see nothing of what f saved.
    """

    __slots__ = ("_before",)
    _hooks = 0

    def __init__(self) -> None:
        _LOOKING.__enter__()
        self._before = Unhooked._hooks - (_AROUND(False) is not None)

    @property
    def still(self) -> bool:
        """Whether there is none so far."""
        return Unhooked._hooks == self._before

    def __del__(self) -> None:
        if sys.is_finalizing():
            return
        _LOOKING.__exit__()


def _entered(self: saved_tensors_hooks) -> None:
    """Stand for `saved_tensors_hooks.__enter__`."""
    Unhooked._hooks += 1
    _ENTER(self)


def _made(self: RemovableHandle, hooks_dict: Any, *, extra_dict: Any = None) -> None:
    """Stand for `RemovableHandle.__init__`."""
    _INIT(self, hooks_dict, extra_dict=extra_dict)
    caller = sys._getframe(1)
    if caller.f_code in (_OF_TENSOR, _OF_NODE):
        Unhooked._hooks += 1
    watchers: list[HookWatcher] = _WATCHERS.entered
    if not watchers:
        return
    if caller.f_code is _OF_TENSOR:
        node = node_of(caller.f_locals["self"])
        if node is not None:
            for watcher in watchers:
                watcher.nodes.append(node)
    elif caller.f_code is _OF_NODE:
        for watcher in watchers:
            watcher.some_on_nodes = True


def _has_hooks(node: Any) -> bool:
    """Whether there are hooks on a node itself: they share a dict with one registered now."""
    for register in (node.register_hook, node.register_prehook):
        handle = register(_nothing)
        handle.remove()
        if handle.hooks_dict_ref():
            return True
    return False


def _nothing(*_: Any) -> None:
    """Change no gradient."""


def _put(cls: Any, name: str, own: Any, theirs: Any) -> Installed:
    """Return what stands in the place of a method."""
    return Installed(lambda: setattr(cls, name, own), lambda: setattr(cls, name, theirs))


_WATCHING = _put(saved_tensors_hooks, "__enter__", _entered, _ENTER)
_LOOKING = _put(RemovableHandle, "__init__", _made, _INIT)
#: What runs in the place of PyTorch's own functions.
HOOKS = (_made,)
