"""What a piece of Python code reads by name.

The memo asks it, to know which variables a value may have come from.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import os
import sysconfig
import threading
import types
from collections.abc import Iterator, Sequence

import cachetools

_GLOBAL = frozenset(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"))
_FREE = frozenset(("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"))
_ATTRIBUTE = frozenset(
    ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM", "LOAD_SUPER_METHOD")
)
_LOADS = _GLOBAL | _FREE | _ATTRIBUTE
_STORES = frozenset(("STORE_GLOBAL", "STORE_NAME", "STORE_DEREF", "STORE_ATTR"))
_CONSTANTS = frozenset(("LOAD_CONST", "LOAD_SMALL_INT"))
_COPIES = frozenset(("COPY", "SWAP"))
_COMPARES = frozenset(("COMPARE_OP", "CONTAINS_OP"))
#: Methods that tell nothing of what they are called on, if nobody looks at what they return.
_NOTING = frozenset(("append", "add", "extend", "update"))
#: Who names one of these may read any attribute; one of the second, as a global variable.
_ANY = frozenset(
    "getattr vars __dict__ attrgetter methodcaller eval exec globals asdict astuple "
    "deepcopy tree_map tree_flatten tree_leaves".split()
)
_ANY_GLOBAL = frozenset(("copy", "fields", "replace"))


@dataclasses.dataclass(frozen=True, slots=True)
class Code:
    """What a code object reads, with those nested in it.

    Attributes
    ----------
    globals
        Names of global variables.
    free
        Names of variables of enclosing functions.
    attributes
        Names of attributes.
    modules
        Names of modules that it imports when it runs.
    any_attribute
        Whether it may read attributes that it does not name.
    compares
        Whether it compares objects, or looks for one among others.
    installed
        Whether it belongs to Python itself or to an installed package.
    """

    globals: tuple[str, ...]
    free: frozenset[str]
    attributes: frozenset[str]
    modules: tuple[str, ...]
    any_attribute: bool
    compares: bool
    installed: bool


class _Same:
    """A code object that is equal to itself only: Python takes 0.0 for -0.0 in constants."""

    __slots__ = ("code",)

    def __init__(self, code: types.CodeType) -> None:
        self.code = code

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.code is other.code

    def __hash__(self) -> int:
        return id(self.code)


_KNOWN: cachetools.LRUCache[_Same, Code] = cachetools.LRUCache(4096)
_LOCK = threading.Lock()


def read_by(code: types.CodeType) -> Code:
    """Return what a code object reads."""
    key = _Same(code)
    with _LOCK:
        known = _KNOWN.get(key)
    if known is None:
        known = _look(code)
        with _LOCK:
            _KNOWN[key] = known
    return known


def _look(code: types.CodeType) -> Code:
    loads: dict[str, set[str]] = {"global": set(), "free": set(), "attribute": set()}
    modules: set[str] = set()
    compares = False
    for one in _with_nested(code):
        found = list(dis.get_instructions(one))
        for i, instruction in enumerate(found):
            name = instruction.opname
            compares = compares or name in _COMPARES
            if name == "IMPORT_NAME":
                modules.add(instruction.argval)
            elif name in _LOADS and not _only_writes(found, i):
                kind = "global" if name in _GLOBAL else "free" if name in _FREE else "attribute"
                loads[kind].add(instruction.argval)
    named = (loads["global"] & _ANY_GLOBAL) | ((loads["global"] | loads["attribute"]) & _ANY)
    return Code(
        globals=tuple(sorted(loads["global"])),
        free=frozenset(loads["free"]),
        attributes=frozenset(loads["attribute"]),
        modules=tuple(sorted(modules)),
        any_attribute=bool(named),
        compares=compares,
        installed=is_installed(code.co_filename),
    )


def _with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_nested(constant)


def _only_writes(code: Sequence[dis.Instruction], i: int) -> bool:
    """Whether what is loaded is only counted up, appended to or written into.

    A function that counts its runs would otherwise be another one after each run.
    """
    return _counts(code, i) or _counts_entry(code, i) or _sets_entry(code, i) or _notes(code, i)


def _is_constant(code: Sequence[dis.Instruction], i: int) -> bool:
    return i < len(code) and code[i].opname in _CONSTANTS


def _adds(code: Sequence[dis.Instruction], i: int) -> bool:
    return i < len(code) and code[i].opname == "BINARY_OP" and code[i].argrepr.endswith("=")


def _after_copies(code: Sequence[dis.Instruction], i: int) -> int:
    while i < len(code) and code[i].opname in _COPIES:
        i += 1
    return i


def _counts(code: Sequence[dis.Instruction], i: int) -> bool:
    """`name += 1`, `x.name += 1`."""
    if not (_is_constant(code, i + 1) and _adds(code, i + 2)):
        return False
    end = _after_copies(code, i + 3)
    return end < len(code) and code[end].opname in _STORES and code[end].argval == code[i].argval


def _counts_entry(code: Sequence[dis.Instruction], i: int) -> bool:
    """`name[0] += 1`."""
    if not _is_constant(code, i + 1):
        return False
    at = _after_copies(code, i + 2)
    gets = at < len(code) and (
        code[at].opname == "BINARY_SUBSCR"
        or (code[at].opname == "BINARY_OP" and code[at].argrepr == "[]")
    )
    if not (gets and _is_constant(code, at + 1) and _adds(code, at + 2)):
        return False
    end = _after_copies(code, at + 3)
    return end < len(code) and code[end].opname == "STORE_SUBSCR"


def _sets_entry(code: Sequence[dis.Instruction], i: int) -> bool:
    """`name[key] = ...`."""
    return (
        i + 2 < len(code)
        and code[i + 1].opname.startswith("LOAD_")
        and code[i + 1].opname not in ("LOAD_ATTR", "LOAD_METHOD")
        and code[i + 2].opname == "STORE_SUBSCR"
    )


def _notes(code: Sequence[dis.Instruction], i: int) -> bool:
    """`name.append(...)`, its result thrown away."""
    method = code[i + 1] if i + 1 < len(code) else None
    if method is None or method.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
        return False
    if method.argval not in _NOTING:
        return False
    depth = 1
    for j in range(i + 1, len(code) - 1):
        step = code[j]
        if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs or step.is_jump_target:
            return False
        depth += dis.stack_effect(step.opcode, step.arg, jump=False)
        if depth < 1:
            return False
        if depth == 1 and step.opname.startswith("CALL"):
            return code[j + 1].opname == "POP_TOP"
    return False


_PLACES = tuple(
    os.path.normcase(path)
    for path in (
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        os.path.dirname(os.path.dirname(os.path.abspath(__file__))),  # this package
    )
)


@functools.lru_cache(maxsize=4096)
def is_installed(file: str) -> bool:
    """Whether a file belongs to Python itself or to an installed package."""
    if file.startswith("<"):  # `<frozen ...>` is Python's own; a notebook's cell is not
        return file.startswith("<frozen")
    path = os.path.normcase(file)
    return "site-packages" in path or "dist-packages" in path or path.startswith(_PLACES)
