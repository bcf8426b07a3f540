"""Gradient hooks that are registered while f runs."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .graphs import Node, node_of

_INIT: Any = RemovableHandle.__init__
#: Who makes a handle for a hook of a tensor, and who for one of a node.
_OF_TENSOR = torch.Tensor.register_hook.__code__
_OF_NODE = getattr(getattr(torch.autograd.Function, "_register_hook", None), "__code__", None)


class HookWatcher:
    """Learns of the gradient hooks that this thread registers while it is active.

    PyTorch does not tell which hooks a node has; but for each it makes a handle.

    Attributes
    ----------
    nodes
        The nodes whose gradients hooks of tensors are given.
    some_on_nodes
        Whether hooks were registered on nodes themselves.
    """

    _lock = threading.Lock()
    _users = 0
    _local = threading.local()

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.some_on_nodes = False

    def __enter__(self) -> HookWatcher:
        cls = HookWatcher
        with cls._lock:
            if cls._users == 0:
                RemovableHandle.__init__ = _made  # type: ignore[method-assign]
            cls._users += 1
        cls._local.__dict__.setdefault("stack", []).append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        cls = HookWatcher
        cls._local.stack.pop()
        with cls._lock:
            cls._users -= 1
            if cls._users == 0:
                RemovableHandle.__init__ = _INIT  # type: ignore[method-assign]

    @classmethod
    def active(cls) -> list[HookWatcher]:
        """Return the watchers of this thread."""
        stack: list[HookWatcher] = cls._local.__dict__.get("stack", [])
        return stack

    @classmethod
    @contextlib.contextmanager
    def none(cls) -> Iterator[None]:
        """Have no watcher in this thread for a while."""
        local = cls._local.__dict__
        stack = local.get("stack", [])
        local["stack"] = []
        try:
            yield
        finally:
            local["stack"] = stack

    @property
    def any(self) -> bool:
        """Whether there are hooks of one of the two kinds."""
        return self.some_on_nodes or bool(self.nodes)

    def hooks(self, node: Node) -> bool:
        """Whether a node of the graph that f left has a hook that f registered."""
        return node in self.nodes or (self.some_on_nodes and _has_hooks(node))


def _made(self: RemovableHandle, hooks_dict: Any, *, extra_dict: Any = None) -> None:
    """Stand for `RemovableHandle.__init__`."""
    _INIT(self, hooks_dict, extra_dict=extra_dict)
    watchers = HookWatcher.active()
    if not watchers:
        return
    caller = sys._getframe(1)
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


#: What runs in the place of PyTorch's own functions.
HOOKS = (_made,)
