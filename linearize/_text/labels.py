"""Lines of the user's code, and labels that know them.

What a linear program says about where its parts come from are plain strings, such as the name
of a graph node. A `Site` is such a string that also knows lines of f.
"""

from __future__ import annotations

import functools
import linecache
import os
import sys
import sysconfig
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch


def function_name(f: Any) -> str:
    """Return how a function is called in texts: by its name, or that of its class."""
    name = getattr(f, "__qualname__", None) or type(f).__name__
    return str(name).removeprefix("_VariableFunctionsClass.")  # where torch.sin and its like are


class Line(NamedTuple):
    """A line of the user's code, in a file and in a function of some qualified name."""

    file: str
    number: int
    function: str

    @property
    def text(self) -> str:
        """The line as it is written, empty if the file cannot be read."""
        return linecache.getline(self.file, self.number).strip()

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.number}"


class Site(str):
    """What something is kept or computed for: a text without lines, and the lines of f.

    Each stands there once, in the order met.
    """

    name: str
    lines: tuple[Line, ...]

    def __new__(cls, text: str, lines: Iterable[Line], name: str = "") -> Site:
        """Return `text` with its lines."""
        site = super().__new__(cls, text)
        site.name = name or text
        site.lines = tuple(dict.fromkeys(lines))
        return site


def at_line(text: str, line: Line | None) -> str:
    """Return a label that names a line, if that is known."""
    return text if line is None else Site(f"{text} ({line})", [line], text)


def beside(name: str, source: str) -> str:
    """Return a name with the lines that a label knows, for messages."""
    lines = lines_of(source)
    return f"{name} ({named(lines)})" if lines else name


def name_of(text: str) -> str:
    """Return a label without the lines that it names."""
    return text.name if isinstance(text, Site) else text


def lines_of(text: str) -> tuple[Line, ...]:
    """Return the lines that a label knows, none for a plain string."""
    return text.lines if isinstance(text, Site) else ()


def joined(text: str, parts: Iterable[str]) -> str:
    """Return `text` with the lines that it and the other labels know."""
    found = [line for part in (text, *parts) for line in lines_of(part)]
    return Site(text, found, name_of(text)) if found else text


def named(lines: Iterable[Line]) -> str:
    """Return short names of lines: `model.py:3, 5-7`."""
    numbers: dict[str, list[int]] = {}
    for line in lines:
        numbers.setdefault(os.path.basename(line.file), []).append(line.number)
    return "; ".join(f"{file}:{_ranges(sorted(set(n)))}" for file, n in numbers.items())


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][-1] == n - 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _folder(path: str) -> str:
    return os.path.dirname(os.path.abspath(path)) + os.sep


#: Code in these folders is not the user's: PyTorch, this package, the standard library.
_OTHERS = (_folder(torch.__file__), _folder(os.path.dirname(__file__)), "<frozen ")
_STANDARD = _folder(os.__file__)
#: What is installed may lie below the standard library.
_INSTALLED = tuple(sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib"))


@functools.lru_cache(maxsize=4096)
def _is_users(file: str) -> bool:
    if file.startswith(_OTHERS):
        return False
    return file.startswith(_INSTALLED) or not file.startswith(_STANDARD)


class Locator:
    """Finds the line of f that is being executed.

    Parameters
    ----------
    stop
        The code of the function that calls f: what is outside of it is not f.
    """

    def __init__(self, stop: CodeType) -> None:
        self._stop = stop
        self._known: dict[tuple[CodeType, int], Line] = {}

    def __call__(self) -> Line | None:
        """Return the innermost line of the user's; None if f has none."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code is self._stop:
                return None
            if _is_users(code.co_filename):
                key = code, frame.f_lineno
                line = self._known.get(key)
                if line is None:
                    line = self._known[key] = Line(code.co_filename, key[1], code.co_qualname)
                return line
            frame = frame.f_back
        return None
