"""Straight-line Python functions, written out and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class Writer:
    """Writes arguments of calls as Python text; what is of a `named` type has a name there."""

    def __init__(self, named: tuple[type, ...]) -> None:
        self.names: dict[Any, str] = {}
        self._named = named
        self._known: dict[str, Any] = {}
        self._by_value: dict[int, str] = {}

    def text(self, x: Any) -> str:
        """Return the text of an argument."""
        if isinstance(x, self._named):
            return self.names[x]
        if x is None or type(x) in (bool, int):
            return repr(x)
        if type(x) is list:
            return f"[{', '.join(map(self.text, x))}]"
        if type(x) is tuple:
            return f"({', '.join(map(self.text, x))}{',' * bool(x)})"
        return self.constant(x)

    def constant(self, x: Any) -> str:
        """Return a name by which the function knows an object."""
        name = self._by_value.setdefault(id(x), f"c{len(self._by_value)}")
        self._known[name] = x
        return name

    def call(self, op: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
        """Return the text of a call."""
        given = [self.text(a) for a in args]
        given += [f"{k}={self.text(a)}" for k, a in kwargs.items()]
        return f"{op}({', '.join(given)})"

    def function(self, lines: Sequence[str], title: str) -> Callable[..., Any]:
        """Return the function `run` of some lines."""
        exec(compile("\n".join(lines), f"<{title}>", "exec"), self._known)
        run: Callable[..., Any] = self._known.pop("run")
        return run
