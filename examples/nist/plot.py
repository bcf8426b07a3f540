"""Draw the fits: one small panel per problem."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .fit import Fit
from .models import MODELS

__all__ = ["save_plot"]

_CURVE_POINTS = 400
_MAX_COLUMNS = 6
# The two curves usually coincide: a broad one below the data, a thin dashed one above.
_STYLES: dict[int, dict[str, Any]] = {
    1: {"color": "tab:orange", "linewidth": 4.0, "alpha": 0.6, "zorder": 1},
    2: {"color": "tab:blue", "linewidth": 1.2, "linestyle": "--", "zorder": 3},
}


def save_plot(fits: Sequence[Fit], path: Path) -> None:
    """Draw data and fitted curves of all fits into a PNG file, making its folder if needed."""
    names = list(dict.fromkeys(fit.problem.name for fit in fits))
    columns = min(_MAX_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.6 * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        _panel(axes, [fit for fit in fits if fit.problem.name == name])
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, fits: Sequence[Fit]) -> None:
    problem = fits[0].problem
    crowded = len(problem.x) > 100
    axes.plot(
        problem.x,
        problem.y,
        linestyle="none",
        marker=".",
        markersize=3 if crowded else 7,
        color="black",
        alpha=0.6 if crowded else 1.0,
        label="data",
        zorder=2,
    )
    x = np.linspace(problem.x.min(), problem.x.max(), _CURVE_POINTS)
    for fit in fits:
        with torch.no_grad():
            curve = MODELS[problem.name].predict(
                torch.from_numpy(fit.parameters), torch.from_numpy(x)
            )
        label = f"fit from start {fit.start}"
        axes.plot(x, curve.numpy(), label=label, **_STYLES[fit.start])
    digits = ", ".join(f"{fit.lre:.1f}" for fit in fits)
    axes.set_title(f"{problem.name}\nLRE {digits}", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.locator_params(nbins=4)
