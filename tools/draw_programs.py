"""Draw the two linear programs of a small function: the picture in docs/inspecting.md.

    python tools/draw_programs.py

writes docs/_static/programs.svg.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import linearize as lz

TARGET = Path(__file__).parents[1] / "docs" / "_static" / "programs.svg"


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * u * x**2


A = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def f(x: torch.Tensor) -> torch.Tensor:
    h = torch.tanh(A @ x)
    return h + Cube.apply(h)


def drawing() -> lz.inspection.Drawing:
    x = torch.linspace(0, 1, 3, dtype=torch.float64)
    return lz.Linearizer(f, trace=True).at(x).program.draw()


if __name__ == "__main__":
    print(drawing().save(TARGET))
