"""Which of the two methods of a derivative the author of a custom Function gave.

A method is not given if there is none, or if PyTorch made it around one that is not given, as
`torch.vmap` does. Beside a `backward`, a `jvp` that only raises `NotImplementedError`, or returns
nothing but None, is a stub; a `backward` that returns None means zero.
"""

from __future__ import annotations

import dis
import functools
from types import CodeType
from typing import Any

import torch

from .._torch.graphs import only_raises, vmapped

_BASE = torch.autograd.Function


def gives_jvp(cls: Any) -> bool:
    """Whether a Function has a `jvp` of its own that is more than a stub."""
    if cls.jvp is _BASE.jvp:
        return False
    inner = vmapped(cls)
    if inner is not None:
        return gives_jvp(inner)
    return not (_is_stub(cls.jvp) and gives_backward(cls))


def gives_backward(cls: Any) -> bool:
    """Whether a Function has a `backward` of its own (or a `vjp`, its other name)."""
    if cls.backward is _BASE.backward and cls.vjp is _BASE.vjp:
        return False
    inner = vmapped(cls)
    return gives_backward(inner) if inner is not None else not only_raises(cls)


def _is_stub(method: Any) -> bool:
    code = getattr(method, "__code__", None)
    return isinstance(code, CodeType) and _returns_nothing(code)


@functools.lru_cache(maxsize=4096)
def _returns_nothing(code: CodeType) -> bool:
    """Whether a function returns None or says that it is not implemented, whatever comes in."""
    steps = list(dis.get_instructions(code))
    ends = [i for i, step in enumerate(steps) if step.opname in ("RETURN_CONST", "RETURN_VALUE")]
    if not ends:
        return "NotImplementedError" in code.co_names
    for i in ends:
        end = steps[i]
        loaded = end if end.opname == "RETURN_CONST" else steps[i - 1]
        constant = loaded.opname in ("LOAD_CONST", "RETURN_CONST") and loaded.argval is None
        # Where a jump leads to, there may be another value.
        if not constant or (end is not loaded and end.is_jump_target):
            return False
    return True
