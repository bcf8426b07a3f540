"""What a piece of Python code reads by name.

The memo asks it, to know which variables a value may have come from.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import os
import re
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
    code
        The code object.
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

    code: types.CodeType
    globals: tuple[str, ...]
    free: frozenset[str]
    attributes: frozenset[str]
    modules: tuple[str, ...]
    any_attribute: bool
    compares: bool
    installed: bool


@cachetools.cached(cachetools.LRUCache(4096), key=id, lock=threading.Lock())
def read_by(code: types.CodeType) -> Code:
    """Return what a code object reads.

    By identity: Python takes 0.0 for -0.0 in constants. What is known of it keeps it.
    """
    loads: dict[str, set[str]] = {"global": set(), "free": set(), "attribute": set()}
    modules: set[str] = set()
    compares = False
    for one in _with_nested(code):
        found = list(dis.get_instructions(one))
        letters = "".join(map(_letter, found))
        for i, instruction in enumerate(found):
            name = instruction.opname
            compares = compares or name in _COMPARES
            if name == "IMPORT_NAME":
                modules.add(instruction.argval)
            elif name in _LOADS and not _only_writes(found, letters, i):
                kind = "global" if name in _GLOBAL else "free" if name in _FREE else "attribute"
                loads[kind].add(instruction.argval)
    named = (loads["global"] & _ANY_GLOBAL) | ((loads["global"] | loads["attribute"]) & _ANY)
    return Code(
        code=code,
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


def _only_writes(code: Sequence[dis.Instruction], letters: str, i: int) -> bool:
    """Whether what is loaded is only counted up, appended to or written into.

    A function that counts its runs would otherwise be another one after each run.
    """
    counted = _COUNTS.match(letters, i + 1)
    if counted and code[counted.end() - 1].argval == code[i].argval:
        return True
    return bool(_SETS_ENTRY.match(letters, i + 1)) or _notes(code, i)


def _letter(step: dis.Instruction) -> str:
    """Return what a step does, in one letter."""
    name = step.opname
    if name == "BINARY_OP":
        return "[" if step.argrepr == "[]" else "+" if step.argrepr.endswith("=") else "."
    return _LETTERS.get(name, "l" if name.startswith("LOAD_") else ".")


#: `k` is a constant, `c` what only moves things about, `l` any other load of a variable.
_LETTERS = {
    **dict.fromkeys(("LOAD_CONST", "LOAD_SMALL_INT"), "k"),
    **dict.fromkeys(("COPY", "SWAP"), "c"),
    **dict.fromkeys(("LOAD_ATTR", "LOAD_METHOD"), "."),
    **dict.fromkeys(("STORE_GLOBAL", "STORE_NAME", "STORE_DEREF", "STORE_ATTR"), "="),
    "BINARY_SUBSCR": "[",
    "STORE_SUBSCR": "]",
}
#: `name += 1`, `x.name += 1`.
_COUNTS = re.compile(r"k\+c*=")
#: `name[0] += 1`, `name[key] = ...`.
_SETS_ENTRY = re.compile(r"kc*\[k\+c*\]|[kl]\]")


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
