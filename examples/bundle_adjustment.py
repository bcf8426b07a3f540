"""Adjust cameras and points of a film scene to where they were seen; f runs once per point.

Levenberg–Marquardt, its systems solved by preconditioned conjugate gradients: thousands of
products with JᵀJ. The reprojection is written once as plain torch, and once as a custom Function
over NumPy with derivatives by hand. The same solver with the products of `torch.func` shows what
it costs to run f again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundle.reprojection import Data, residual_in_numpy, residual_in_torch
from bundle.solve import ENGINES, Fit, adjust
from gallery import figure, options, save, table
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks.cases.bundle import read

Parameters = dict[str, torch.Tensor]


def problem(quick: bool) -> tuple[Data, Parameters, Parameters]:
    """Return markers, the start, and the solution of the file.

    The files hold solved scenes. The start is some way off: half a degree for the rotations, five
    percent of their spread for the points.
    """
    raw = read("problem_01.bin")
    keep = raw["camera"] < (40 if quick else len(raw["R"]))
    cameras = int(raw["camera"][keep].max()) + 1
    used, point = np.unique(raw["point"][keep], return_inverse=True)
    data = Data(
        intrinsics=tuple(raw["intrinsics"].tolist()),
        turn=raw["R"][:cameras].copy(),
        camera=raw["camera"][keep],
        point=point,
        xy=raw["xy"][keep],
    )
    solved = {
        "rotation": torch.zeros(cameras, 3, dtype=torch.float64),
        "shift": torch.tensor(raw["t"][:cameras]),
        "points": torch.tensor(raw["X"][used]),
    }
    draw = torch.Generator().manual_seed(0)
    spread = {"rotation": 0.01, "shift": 0.0, "points": 0.05 * solved["points"].std(0)}
    start = {
        name: t + spread[name] * torch.randn(t.shape, generator=draw, dtype=t.dtype)
        for name, t in solved.items()
    }
    return data, start, solved


def solve_all(quick: bool, quiet: bool) -> tuple[Data, dict[tuple[str, str], Fit]]:
    """Solve with every engine, the custom Function with linearize only."""
    data, start, _ = problem(quick)
    torch_, numpy_ = residual_in_torch(data), residual_in_numpy(data)
    # torch.func passes NumPy code the wrong numbers, or refuses it.
    tasks = [("torch", torch_, engine) for engine in ENGINES]
    tasks.insert(1, ("custom Function", numpy_, "linearize"))
    fits = {}
    for written, f, engine in tasks:
        with tqdm(unit="step", disable=quiet, leave=False, desc=f"{written}, {engine}") as bar:

            def step(error: float, bar: Any = bar) -> None:
                bar.set_postfix_str(f"{error:.4f} px")
                bar.update()

            limit = 8 if quick else 60
            fit = adjust(f, data, start, ENGINES[engine], max_iterations=limit, progress=step)
            fits[written, engine] = fit
    return data, fits


def picture(data: Data, fits: dict[tuple[str, str], Fit], path: Path) -> None:
    """Draw the error over the time, and one image's markers before and after."""
    made, ((left, right),) = figure(2)
    for (written, engine), fit in fits.items():
        seconds = np.linspace(0, fit.seconds, len(fit.errors))
        left.semilogy(seconds, fit.errors, ".-", label=f"{written}, {engine}")
    left.set(xlabel="seconds", ylabel="reprojection error [px]")
    left.legend(fontsize=7)

    f = residual_in_torch(data)
    start = problem(len(data.turn) <= 40)[1]
    shapes = {name: t.shape for name, t in start.items()}
    fit = fits["torch", "linearize"]
    pieces = torch.from_numpy(fit.parameters).split([s.numel() for s in shapes.values()])
    end = {n: p.view(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}
    mine = data.camera == np.bincount(data.camera).argmax()
    for parameters, label, style in ((start, "start", "rx"), (end, "adjusted", "b+")):
        shown = (f(parameters).numpy() + data.xy)[mine]
        right.plot(*shown.T, style, label=label)
    right.plot(*data.xy[mine].T, "ko", markerfacecolor="none", markersize=9, label="seen")
    right.invert_yaxis()
    right.set(xlabel="x [px]", ylabel="y [px]", title="one image")
    right.legend(fontsize=7)
    save(made, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Solve, compare, draw; return 1 if two solvers disagree."""
    chosen = options(__doc__, "bundle_adjustment", arguments)
    data, fits = solve_all(chosen.quick, chosen.quiet)
    unknowns = len(fits["torch", "linearize"].parameters)
    print(f"{len(data.xy)} markers in {len(data.turn)} images, {unknowns} unknowns")
    rows = [
        [
            f"{written}, {engine}",
            f"{fit.errors[0]:.2f}",
            f"{fit.errors[-1]:.6f}",
            fit.iterations,
            fit.products,
            fit.runs,
            f"{fit.seconds:.2f}",
        ]
        for (written, engine), fit in fits.items()
    ]
    header = ("residuals, products", "px at start", "px at end", "iterations")
    print(table((*header, "JᵀJ·v", "runs of f", "seconds"), rows))
    picture(data, fits, chosen.out)
    ends = [fit.errors[-1] for fit in fits.values()]
    if max(ends) > 1.001 * min(ends):
        print("The solvers disagree.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
