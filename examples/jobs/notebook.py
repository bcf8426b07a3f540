"""A notebook: a model is changed between cells until it fits.

Misra1a of the NIST reference problems. Each cell runs in the same names, as a notebook's do; the
second model has the name of the first. What a cell shows is its last expression.
"""

from __future__ import annotations

import ast
import dataclasses
import linecache
from collections.abc import Iterator
from typing import Any

__all__ = ["CELLS", "Cell", "session"]

CELLS = (
    """
    import torch
    from nist.data import load
    from scipy.optimize import least_squares
    import linearize as lz

    (data,) = load(["Misra1a"])
    volume, pressure = torch.tensor(data.y), torch.tensor(data.x)
    runs = 0
    """,
    """
    def model(b):
        global runs
        runs += 1
        return b[0] * (1 - torch.exp(-b[1])) * pressure - volume

    def fit():
        p = lz.scipy.VectorFunction(model, data.starts[1])
        return least_squares(p.fun, p.x0, p.jac, x_scale="jac", xtol=1e-12, ftol=1e-15)

    found = fit()
    f"{2 * found.cost:.4f} where NIST has {data.rss:.4f}; f ran {runs} times"
    """,
    """
    def model(b):  # the parenthesis was wrong
        global runs
        runs += 1
        return b[0] * (1 - torch.exp(-b[1] * pressure)) - volume

    runs = 0
    found = fit()
    f"{2 * found.cost:.4f}; f was asked for at {found.nfev} points and ran {runs} times"
    """,
    """
    here = lz.Linearizer(model, trace=True).at(torch.tensor(found.x))
    here.residuals()
    """,
    """
    pressure = pressure / 1000  # the same cell again, with other units
    old, new = torch.tensor(found.x), torch.tensor(found.x * [1, 1000])
    again = lz.Linearizer(model).at(new)
    torch.allclose(again.value, here.value), torch.allclose(again.jvp_fn(new), here.jvp_fn(old))
    """,
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """What was typed, and what is shown: None, or the last expression's value."""

    code: str
    value: Any


def session(names: dict[str, Any]) -> Iterator[Cell]:
    """Run all cells in these names, as IPython does: code is found by the name of its cell."""
    for number, cell in enumerate(CELLS, 1):
        indented = cell.strip("\n").rstrip()
        code = "\n".join(line.removeprefix("    ") for line in indented.splitlines())
        name = f"<cell {number}>"
        linecache.cache[name] = len(code), None, code.splitlines(keepends=True), name
        tree = ast.parse(code)
        last = tree.body[-1]
        if isinstance(last, ast.Expr):
            rest = ast.Module(tree.body[:-1], type_ignores=[])
            exec(compile(rest, name, "exec"), names)
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
        else:
            exec(compile(tree, name, "exec"), names)
            value = None
        yield Cell(code, value)
