"""What the code of f can reach, beside its arguments.

A value that is remembered is right only as long as all that it came from is the same: variables
of enclosing functions, defaults, global variables that the code names, attributes of objects,
lists, dicts, arrays. `Reach.now` writes all that down. Objects whose attributes are read by code
that can be seen count with the attributes that this code names, others with all of them. Tensors,
classes and modules are referred to weakly.
"""

from __future__ import annotations

import array
import collections
import contextvars
import enum
import functools
import io
import logging
import mmap
import operator
import random
import re
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, ValuesView
from itertools import repeat
from typing import Any, TypeAlias

import torch

from .._text.labels import function_name
from .._torch.names import (
    MOVING_STATISTICS,
    OPAQUE,
    CustomOpDef,
    holds_tensors,
    operator_functions,
)
from .classes import (
    TRUSTED,
    has_code,
    has_foreign_code,
    is_foreign,
    is_own,
    once_per_class,
    read_of,
    slots_of,
)
from .code import is_installed, read_by
from .module_tree import Tree
from .state import PLAIN, PLAIN_TENSORS, TELLING, State

#: A name, and in what it stands: `(("f", "net"), "scale")`.
Where: TypeAlias = tuple[Any, str]

#: How many things are looked at.
_MOST = 50_000
_DESCRIPTORS: tuple[type, ...] = (
    *(types.WrapperDescriptorType, types.MethodDescriptorType, types.MethodWrapperType),
    *(types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType),
)
#: What f writes to, waits for or draws from, and objects that stay what they are.
_LEFT_ALONE: tuple[type, ...] = (
    *(logging.Logger, logging.Handler, logging.LoggerAdapter, io.IOBase),
    *(threading.Thread, threading.Event, threading.Barrier),
    *(threading.Condition, threading.Semaphore, type(threading.Lock()), type(threading.RLock())),
    *(enum.Enum, re.Pattern, random.Random, torch.Generator),
    *_DESCRIPTORS,
)
_LEFT_ALONE_PACKAGES = frozenset(
    "asyncio concurrent contextlib multiprocessing queue threading".split()
)
#: What is in memory that others write to too.
_SHARED_MODULES = frozenset(
    f"multiprocessing.{name}" for name in ("managers", "shared_memory", "sharedctypes")
)


class Reach:
    """What the code of a function can reach."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self._f = f
        #: Attributes that any code in reach reads. They grow until no code is new.
        self.names: set[str] = set()
        self.any_name = False
        #: Whether some code in reach compares objects.
        self.compares = False

    def now(self, others: Iterable[Any] = ()) -> State:
        """Return what can be reached now, from f or from one of `others`."""
        roots = [(x, (None, f"argument {i}")) for i, x in enumerate(others)]
        roots.append((self._f, (None, function_name(self._f))))
        while True:
            before = self._known()
            walk = _Walk(self)
            try:
                walk.run(roots)
            except Exception as error:  # an object of the user's does as it likes
                walk.unseen = f"what f can reach ({type(error).__name__}: {error})"
            if self._known() == before:
                return State(walk.tokens, walk.tensors, walk.unseen, whole=walk.sees_all())

    def _known(self) -> tuple[int, bool, bool]:
        return len(self.names), self.any_name, self.compares


class _Walk:
    """One look at all that can be reached."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._names = reach.names
        self.tokens: list[Any] = []
        self.tensors: list[weakref.ref[torch.Tensor]] = []
        self.unseen = ""
        #: Whether something was met that may hold tensors of its own, read others, or move some.
        self._beside = False
        self._stack: list[tuple[Any, Where]] = []
        #: What was seen, in order: kept alive, so that no other thing gets its id.
        self._seen: dict[int, tuple[int, Any]] = {}
        self._classes: dict[tuple[int, bool], type] = {}

    def run(self, roots: Iterable[tuple[Any, Where]]) -> None:
        """Look at everything that can be reached from some roots."""
        stack, tokens, seen = self._stack, self.tokens, self._seen
        stack.extend(roots)
        while stack:
            x, where = stack.pop()
            kind = type(x)
            if kind in PLAIN:
                tokens.append(x)
                continue
            before = seen.get(id(x))
            if before is not None:
                tokens.append(_again(before[0]))
                continue
            seen[id(x)] = (len(seen), x)
            if len(seen) > _MOST:
                self.unseen = f"{_text(where)} (more than {_MOST} things)"
                return
            (_KNOWN.get(kind) or _look_of(kind))(self, x, where)

    def sees_all(self) -> bool:
        """Whether f can read no tensors but those that were met, which tell their changes."""
        if self._beside or self._reach.any_name or not TELLING.isdisjoint(self._names):
            return False
        return all(
            t is not None and type(t) in PLAIN_TENSORS and not t.__dict__
            for t in map(operator.call, self.tensors)
        )

    def _hidden(self, x: Any, where: Where) -> None:
        """Take note of something that cannot be looked into."""
        self.tokens.append(type(x).__name__)
        self.unseen = self.unseen or f"{_text(where)} ({type(x).__module__}.{type(x).__name__})"

    def _fixed(self, x: Any, _: Where) -> None:
        """Take note of something that stays what it is."""
        self._beside = self._beside or not isinstance(x, _STATELESS)
        try:
            self.tokens.append(weakref.ref(x))
        except TypeError:
            self.tokens.append(x)

    def _tensor(self, x: torch.Tensor, _: Where) -> None:
        ref = weakref.ref(x)
        self.tokens.append(ref)
        self.tensors.append(ref)

    def _sequence(self, x: Any, where: Where) -> None:
        items = tuple(x)
        self._head(x)
        if PLAIN.issuperset(map(type, items)):
            self.tokens.append(items)
            return
        self.tokens.append(len(items))
        self._stack.extend(zip(items, repeat((where, "[...]"))))

    def _mapping(self, x: Mapping[Any, Any], where: Where) -> None:
        self._sequence(tuple(x.keys()), where)
        self._sequence(tuple(x.values()), where)
        self._head(x)
        if hasattr(x, "default_factory"):
            self._stack.append((x.default_factory, (where, "default_factory")))

    def _head(self, x: Any) -> None:
        """Take note of a container's type, and of what a subclass adds to it."""
        kind = type(x)
        if kind.__module__ == "builtins":
            self.tokens.append(kind)
            return
        self._code_of(kind, (None, kind.__qualname__))
        if getattr(x, "__dict__", None):
            self._attributes(x, vars(x), (None, kind.__qualname__))

    def _buffer(self, x: Any, _: Where) -> None:
        """Take note of memory, by its content."""
        self.tokens.append((type(x).__name__, hash(bytes(x))))

    def _array(self, x: Any, where: Where) -> None:
        described = x.__array_interface__
        self.tokens.append((described["typestr"], described["shape"], repr(described["descr"])))
        if "O" in described["typestr"]:
            self._sequence(x.ravel().tolist(), where)
        else:
            self.tokens.append(hash(x.tobytes()))

    def _function(self, f: types.FunctionType, where: Where) -> None:
        inner = f.__dict__.get("_torchdynamo_orig_callable")
        if inner is not None:  # the rest is what the compiler keeps
            self._stack.append((inner, where))
            return
        code = f.__code__
        read = read_by(code)
        tokens, stack = self.tokens, self._stack
        tokens.append(code)
        for given in (f.__defaults__, f.__kwdefaults__):
            if given:
                stack.append((given, (where, "default")))
        for name, cell in zip(code.co_freevars, f.__closure__ or (), strict=True):
            if name in read.free:
                tokens.append(name)
                try:
                    stack.append((cell.cell_contents, (where, name)))
                except ValueError:  # has no value yet
                    tokens.append(cell)
        if read.installed:
            self._beside = self._beside or f in MOVING_STATISTICS or is_foreign(f.__module__)
            return
        self._names |= read.attributes
        self._reach.any_name |= read.any_attribute
        self._reach.compares |= read.compares
        for name in read.modules:
            if name in sys.modules:
                stack.append((sys.modules[name], (where, name)))
        known = f.__globals__
        for name in read.globals:
            if name in known:
                tokens.append(name)
                stack.append((known[name], (where, name)))
        if f.__dict__:
            self._named(f.__dict__, where, any_name=self._reach.any_name)
        tokens.append(_END)

    def _method(self, f: types.MethodType, where: Where) -> None:
        self._stack.append((f.__func__, where))
        self._stack.append((f.__self__, (where, "__self__")))

    def _builtin(self, f: Any, where: Where) -> None:
        of = f.__self__
        if of is None or isinstance(of, types.ModuleType):
            package = (f.__module__ or getattr(of, "__name__", "")).partition(".")[0]
            self.tokens.append(f)
            self._beside = self._beside or f in MOVING_STATISTICS
            if package not in TRUSTED:
                self._hidden(f, where)
            return
        self.tokens.append(f.__name__)
        self._stack.append((of, (where, "__self__")))

    def _partial(self, f: functools.partial[Any], where: Where) -> None:
        self.tokens.append(functools.partial)
        self._stack.append(((f.func, f.args, f.keywords), where))

    def _wrapper(self, f: Any, where: Where) -> None:
        """Look through a wrapper of C code around a function, which remembers results."""
        self._beside = True
        self.tokens.append(type(f).__name__)
        self._stack.append((f.__wrapped__, where))

    def look_at(self, x: Any, where: Where) -> None:
        """Look at something later."""
        self._stack.append((x, where))

    def _python_module(self, m: types.ModuleType, where: Where) -> None:
        self.tokens.append(m.__name__)
        file = getattr(m, "__file__", None)
        builtin = m.__name__ in sys.builtin_module_names
        if not (builtin if file is None else is_installed(file)):
            self._named(vars(m), where)
        else:
            self._beside = self._beside or is_foreign(m.__name__)

    def _class(self, cls: type, where: Where) -> None:
        """Look at a class that code can make objects of."""
        self._code_of(cls, where, makes=True)

    def _code_of(self, cls: type, where: Where, *, makes: bool = False) -> None:
        """Look at what code can read of a class, if it is not an installed one."""
        tokens = self.tokens
        tokens.append(weakref.ref(cls))
        self._beside = self._beside or has_foreign_code(cls)
        if (id(cls), makes) in self._classes or not has_code(cls):
            return
        self._classes[id(cls), makes] = cls
        for name, value in read_of(cls, self._names, makes=makes, compares=self._reach.compares):
            tokens.append(name)
            self._stack.append((value, (where, name)))
        tokens.append(_END)

    def _object(self, x: Any, where: Where) -> None:
        """Look at an object: its class, and its attributes."""
        kind = type(x)
        self._code_of(kind, (where, "__class__"))
        found = False
        for name in slots_of(kind):
            if hasattr(x, name):
                found = True
                self.tokens.append(name)
                self._stack.append((getattr(x, name), (where, name)))
        own = getattr(x, "__dict__", None)
        if isinstance(own, dict):
            self._attributes(x, own, where)
        elif not found:
            (self._fixed if _stays(kind) else self._hidden)(x, where)

    def _of_context(self, x: Any, where: Where) -> None:
        """Look at what is here of something of which f may read another thread's in one."""
        self._beside = True
        if isinstance(x, contextvars.ContextVar):
            self._stack.append((x.get(None), where))
        else:
            self._object(x, where)

    def _attributes(self, x: Any, own: dict[str, Any], where: Where) -> None:
        self._named(own, where, any_name=self._reach.any_name or not is_own(type(x)))

    def _named(self, own: Mapping[str, Any], where: Where, *, any_name: bool = False) -> None:
        names, tokens, stack = self._names, self.tokens, self._stack
        for name, value in list(own.items()):
            if any_name or name in names:
                tokens.append(name)
                if type(value) in PLAIN:
                    tokens.append(value)
                else:
                    stack.append((value, (where, name)))
        tokens.append(_END)

    def _ours(self, x: Any, where: Where) -> None:
        """Look at an object of this package: what it keeps for itself is its own affair."""
        self._fixed(x, where)
        f = getattr(x, "f", None)
        if callable(f):
            self._stack.append((f, (where, "f")))

    def _torch_module(self, m: torch.nn.Module, where: Where) -> None:
        inner = m.__dict__.get("_modules", {}).get("_orig_mod")
        if inner is not None:  # the rest is what the compiler keeps
            self._stack.append((inner, where))
            return
        tree = _tree(m)
        tensors = tree.tensors()
        self.tokens.append(tree.tokens)
        self.tokens += tensors
        self.tensors += tensors
        self._beside = self._beside or tree.moves or any(map(has_foreign_code, tree.kinds()))
        for ref in tree.classes:
            cls = ref()
            if cls is not None:
                self._code_of(cls, (where, cls.__qualname__))
        for name, value in tree.others(self._names, any_name=self._reach.any_name):
            self.tokens.append(name)
            self._stack.append((value, (where, name)))
        self.tokens.append(_END)

    def _getter(self, x: Any, where: Where) -> None:
        """Look at what reads attributes by names that no code shows."""
        self._fixed(x, where)
        self._reach.any_name = True

    def _operator(self, op: Any, where: Where) -> None:
        self._fixed(op, where)
        self._stack.append((operator_functions(op), where))

    def _script_function(self, f: Any, where: Where) -> None:
        (self._hidden if holds_tensors(f) else self._fixed)(f, where)

    def _scripted(self, m: Any, where: Where) -> None:
        """Look at a TorchScript module, as far as Python sees it."""
        self._fixed(m, where)
        for part in m.modules():
            self.tokens.append(part.training)
        for t in (*m.parameters(), *m.buffers()):
            self._tensor(t, where)


_END = "end"
#: What stands for nothing that could hold a tensor.
_STATELESS = (
    *_DESCRIPTORS,
    *(re.Pattern, random.Random, torch.Generator),
)

_Look: TypeAlias = Callable[[_Walk, Any, Where], None]


def _through(inner: Callable[[Any], Any]) -> _Look:
    """Return what looks at something inside in place of what is around it."""
    return lambda walk, x, where: walk.look_at(inner(x), where)


#: By exact type, for speed.
_KNOWN: dict[type, _Look] = {
    types.FunctionType: _Walk._function,
    types.MethodType: _Walk._method,
    types.BuiltinFunctionType: _Walk._builtin,
    types.ModuleType: _Walk._python_module,
    torch.Tensor: _Walk._tensor,
    torch.nn.Parameter: _Walk._tensor,
    dict: _Walk._mapping,
    list: _Walk._sequence,
    tuple: _Walk._sequence,
    type: _Walk._class,
}
#: By base class, in this order.
_KINDS: tuple[tuple[type | tuple[type, ...], _Look], ...] = (
    (torch.Tensor, _Walk._tensor),
    (torch.jit.ScriptModule, _Walk._scripted),
    (torch.nn.Module, _Walk._torch_module),
    (torch.jit.ScriptFunction, _Walk._script_function),
    (functools.partial, _Walk._partial),
    (functools.cached_property, _through(operator.attrgetter("func"))),
    (property, _through(operator.attrgetter("fget"))),
    ((staticmethod, classmethod), _through(operator.attrgetter("__func__"))),
    (type(functools.lru_cache(len)), _Walk._wrapper),
    (weakref.ref, _through(operator.call)),
    (CustomOpDef, _Walk._operator),
    ((operator.attrgetter, operator.methodcaller), _Walk._getter),
    ((*OPAQUE, mmap.mmap), _Walk._hidden),
    ((contextvars.ContextVar, threading.local), _Walk._of_context),
    (_LEFT_ALONE, _Walk._fixed),
    (type, _Walk._class),
    (types.ModuleType, _Walk._python_module),
    ((dict, types.MappingProxyType, collections.UserDict), _Walk._mapping),
    ((list, tuple, set, frozenset, deque, KeysView, ValuesView, ItemsView), _Walk._sequence),
    ((bytearray, memoryview, array.array), _Walk._buffer),
)
_TREES: weakref.WeakKeyDictionary[torch.nn.Module, Tree] = weakref.WeakKeyDictionary()


@once_per_class
def _look_of(kind: type) -> _Look:
    """Return how things of a type are looked at, if it is none of the known ones."""
    package = kind.__module__.partition(".")[0]
    if package == __name__.partition(".")[0]:
        return _Walk._ours
    if kind.__module__ in _SHARED_MODULES:
        return _Walk._hidden
    if package in _LEFT_ALONE_PACKAGES or kind.__module__ == "torch._ops":
        return _Walk._fixed
    for base, look in _KINDS:
        if issubclass(kind, base):
            return look
    return _Walk._array if hasattr(kind, "__array_interface__") else _Walk._object


def _tree(root: torch.nn.Module) -> Tree:
    """Return what a module and those inside it hold now."""
    try:
        known = _TREES.get(root)
        if known is None or not known.still_describes(root):
            known = _TREES[root] = Tree(root)
    except TypeError:  # it has no hash
        known = Tree(root)
    return known


def _stays(cls: type) -> bool:
    """Whether an object without attributes stays what it is."""
    if hasattr(cls, "__next__") or issubclass(cls, torch.UntypedStorage):
        return False
    return is_own(cls) or cls.__module__.partition(".")[0] in TRUSTED


@functools.cache
def _again(place: int) -> tuple[str, int]:
    """Return what stands for something that was seen before."""
    return ("again", place)


def _text(where: Where) -> str:
    outer, name = where
    return name if outer is None else f"{_text(outer)}: {name}"
