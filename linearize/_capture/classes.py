"""What can be seen of the code of classes."""

from __future__ import annotations

import abc
import sys
import weakref
from typing import Generic, Protocol

import torch

from .code import is_installed

_CODE: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()
_INSTALLED: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()
_FOREIGN: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()
#: Bases that read no attributes of their own accord, but those that are always looked at.
_HARMLESS = (object, torch.nn.Module, torch.autograd.Function, abc.ABC, Generic, Protocol)
_HEAP_TYPE = 1 << 9
#: Packages whose code is taken to hide nothing, in C, and to read no tensors of its own.
TRUSTED = (frozenset(("torch", "numpy", "scipy")) | sys.stdlib_module_names) - {
    "ctypes",
    "_ctypes",
}


def installed_class(cls: type) -> bool:
    """Whether a class belongs to Python itself, to an installed package, or is written in C."""
    known = _INSTALLED.get(cls)
    if known is None:
        if cls.__flags__ & _HEAP_TYPE:
            module = sys.modules.get(cls.__module__)
            file = getattr(module, "__file__", None)
            builtin = module is not None and cls.__module__ in sys.builtin_module_names
            known = builtin if file is None else is_installed(file)
        else:
            known = True
        _INSTALLED[cls] = known
    return known


def has_code(cls: type) -> bool:
    """Whether some code of a class can be seen."""
    known = _CODE.get(cls)
    if known is None:
        known = _CODE[cls] = not all(map(installed_class, cls.__mro__))
    return known


def is_own(cls: type) -> bool:
    """Whether all code that reads attributes of a class's objects can be seen."""
    return all(base in _HARMLESS or not installed_class(base) for base in cls.__mro__)


def is_foreign(module: str | None) -> bool:
    """Whether code is of a package that may read tensors of its own."""
    return (module or "").partition(".")[0] not in TRUSTED


def has_foreign_code(cls: type) -> bool:
    """Whether a class has methods of such a package, or contexts that hold what they like."""
    known = _FOREIGN.get(cls)
    if known is None:
        known = _FOREIGN[cls] = issubclass(cls, torch.autograd.Function) or any(
            installed_class(base) and is_foreign(base.__module__) for base in cls.__mro__
        )
    return known


def slots_of(cls: type) -> list[str]:
    """Return the names of the slots of a class's objects."""
    names: list[str] = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        names += (slots,) if isinstance(slots, str) else slots
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def is_generated(cls: type) -> bool:
    """Whether a class is a dataclass: it compares field by field."""
    return "__dataclass_params__" in vars(cls)
