"""What can be seen of the code of classes."""

from __future__ import annotations

import abc
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch

from .code import is_installed

T = TypeVar("T")

#: Bases that read no attributes of their own accord, but those that are always looked at.
_HARMLESS = (
    *(object, torch.nn.Module, torch.autograd.Function, abc.ABC, Generic, Protocol),
    threading.local,
)
_HEAP_TYPE = 1 << 9
#: What stands in a class and is not read by code that can be seen.
_BORING = frozenset(
    "__module__ __doc__ __dict__ __weakref__ __qualname__ __annotations__ __annotate__ "
    "__annotate_func__ __annotations_cache__ __firstlineno__ __static_attributes__ "
    "__orig_bases__ __parameters__ __abstractmethods__ _abc_impl __repr__ __str__ __slots__ "
    "__match_args__ __dataclass_fields__ __dataclass_params__ __hash__ __reduce__".split()
)
#: What of it is read when an object is made.
_MAKING = frozenset("__init__ __new__ __post_init__ __init_subclass__ __set_name__".split())
#: Methods that dataclasses are given, which read all fields.
_COMPARING = frozenset("__eq__ __lt__ __le__ __gt__ __ge__".split())
#: Packages whose code is taken to hide nothing, in C, and to read no tensors of its own.
TRUSTED = (frozenset(("torch", "numpy", "scipy")) | sys.stdlib_module_names) - {
    "ctypes",
    "_ctypes",
}


def once_per_class(ask: Callable[[type], T]) -> Callable[[type], T]:
    """Have a question about a class answered once, without keeping the class."""
    known: weakref.WeakKeyDictionary[type, T] = weakref.WeakKeyDictionary()

    @functools.wraps(ask)
    def asked(cls: type) -> T:
        answer = known.get(cls)
        if answer is None:
            answer = known[cls] = ask(cls)
        return answer

    return asked


@once_per_class
def installed_class(cls: type) -> bool:
    """Whether a class belongs to Python itself, to an installed package, or is written in C."""
    if not cls.__flags__ & _HEAP_TYPE:
        return True
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if file is not None:
        return is_installed(file)
    return module is not None and cls.__module__ in sys.builtin_module_names


@once_per_class
def has_code(cls: type) -> bool:
    """Whether some code of a class can be seen."""
    return not all(map(installed_class, cls.__mro__))


def is_own(cls: type) -> bool:
    """Whether all code that reads attributes of a class's objects can be seen."""
    return all(base in _HARMLESS or not installed_class(base) for base in cls.__mro__)


def is_foreign(module: str | None) -> bool:
    """Whether code is of a package that may read tensors of its own."""
    return (module or "").partition(".")[0] not in TRUSTED


@once_per_class
def has_foreign_code(cls: type) -> bool:
    """Whether a class has methods of such a package, or contexts that hold what they like."""
    return issubclass(cls, torch.autograd.Function) or any(
        installed_class(base) and is_foreign(base.__module__) for base in cls.__mro__
    )


def slots_of(cls: type) -> list[str]:
    """Return the names of the slots of a class's objects."""
    names: list[str] = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        names += (slots,) if isinstance(slots, str) else slots
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def read_of(
    cls: type, names: Collection[str], *, makes: bool, compares: bool
) -> Iterator[tuple[str, Any]]:
    """Yield what code that reads some names can read of a class, where that is not installed.

    `makes` tells whether it makes objects of the class, `compares` whether it compares any.
    """
    installed = [base for base in cls.__mro__ if installed_class(base)]
    for base in cls.__mro__:
        if base in installed:
            continue
        unread = _BORING if makes else _BORING | _MAKING
        if not compares and "__dataclass_params__" in vars(base):
            unread |= _COMPARING
        for name, value in list(vars(base).items()):
            if name in unread:
                continue
            # Methods of a known name may be called from code that is not looked at.
            if name in names or name[:2] == "__" or any(name in vars(b) for b in installed):
                yield name, value
