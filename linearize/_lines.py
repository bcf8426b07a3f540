"""Floor 1: lines of the user's code, and labels that know them.

What a linear program says about where its parts come from are plain strings, such as the name
of a graph node. A `Site` is such a string that also knows lines of f.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Iterable
from types import CodeType
from typing import NamedTuple

import torch

#: Code in these folders is not the user's.
_OTHERS = tuple(os.path.dirname(os.path.abspath(p)) + os.sep for p in (torch.__file__, __file__))


class Line(NamedTuple):
    """A line of the user's code.

    Attributes
    ----------
    file
        The path of the file, as Python knows it.
    number
        Of the line, from 1.
    function
        The name of the function that the line is in.
    """

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
    """What something is kept or computed for, with the lines of f that it comes from.

    Equal to the plain string, so that nothing else needs to know of lines.

    Attributes
    ----------
    lines
        Each once, in the order met.
    """

    lines: tuple[Line, ...]

    def __new__(cls, text: str, lines: Iterable[Line]) -> Site:
        """Return `text` with its lines."""
        site = super().__new__(cls, text)
        site.lines = tuple(dict.fromkeys(lines))
        return site


def lines_of(text: str) -> tuple[Line, ...]:
    """Return the lines that a label knows, none for a plain string."""
    return text.lines if isinstance(text, Site) else ()


def joined(text: str, parts: Iterable[str]) -> str:
    """Return `text` with the lines that it and the other labels know."""
    found = [line for part in (text, *parts) for line in lines_of(part)]
    return Site(text, found) if found else text


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
        """Return the innermost line outside PyTorch and this package; None if f has none."""
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code is self._stop:
                return None
            if not code.co_filename.startswith(_OTHERS):
                key = code, frame.f_lineno
                line = self._known.get(key)
                if line is None:
                    line = self._known[key] = Line(code.co_filename, frame.f_lineno, code.co_name)
                return line
            frame = frame.f_back  # type: ignore[assignment]
        return None
