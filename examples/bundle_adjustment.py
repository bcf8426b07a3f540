"""Adjust cameras and points of a film scene to where they were seen; f runs once per point.

Levenberg–Marquardt, its systems solved by preconditioned conjugate gradients: hundreds of
products with JᵀJ. The reprojection is written once as plain torch, and once as a custom Function
over NumPy with derivatives by hand. The same solver with the products of `torch.func` shows what
it costs to run f again.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundle.data import Scene, read
from bundle.reprojection import residual_in_numpy, residual_in_torch
from bundle.solve import ENGINES, Fit, adjust
from gallery import figure, options, save, table
from tqdm import tqdm

Parameters = dict[str, torch.Tensor]


def problem(quick: bool) -> tuple[Scene, Parameters, Parameters]:
    """Return the scene, a start, and the solution that the file holds.

    The start is some way off the solution: half a degree for the rotations, five percent of their
    spread for the points.
    """
    scene = read("problem_01.bin")
    if quick:
        scene = first_cameras(scene, 12)
    solved = {
        "rotation": torch.zeros(len(scene.turn), 3, dtype=torch.float64),
        "shift": torch.tensor(scene.shift),
        "points": torch.tensor(scene.points),
    }
    draw = torch.Generator().manual_seed(0)
    spread = {"rotation": 0.01, "shift": 0.0, "points": 0.05 * solved["points"].std(0)}
    start = {
        name: t + spread[name] * torch.randn(t.shape, generator=draw, dtype=t.dtype)
        for name, t in solved.items()
    }
    return scene, start, solved


def first_cameras(scene: Scene, count: int) -> Scene:
    """Return the part of a scene that these cameras saw."""
    keep = scene.camera < count
    used, point = np.unique(scene.point[keep], return_inverse=True)
    return dataclasses.replace(
        scene,
        turn=scene.turn[:count],
        shift=scene.shift[:count],
        points=scene.points[used],
        camera=scene.camera[keep],
        point=point,
        xy=scene.xy[keep],
    )


def solve_all(
    scene: Scene, start: Parameters, quick: bool, quiet: bool
) -> dict[tuple[str, str], Fit]:
    """Solve with every engine; the custom Function with linearize only.

    `torch.func.jvp` refuses the NumPy code, `torch.func.linearize` gives wrong numbers for it.
    """
    plain, custom = residual_in_torch(scene), residual_in_numpy(scene)
    tasks: list[tuple[str, Any, str]] = [("torch", plain, engine) for engine in ENGINES]
    tasks.insert(1, ("custom Function", custom, "linearize"))
    fits = {}
    for written, f, engine in tasks[:3] if quick else tasks:
        with tqdm(unit="step", disable=quiet, leave=False, desc=f"{written}, {engine}") as bar:

            def step(error: float, bar: Any = bar) -> None:
                bar.set_postfix_str(f"{error:.4f} px")
                bar.update()

            fits[written, engine] = adjust(
                f, scene, start, ENGINES[engine], max_iterations=4 if quick else 50, progress=step
            )
    return fits


def rms(f: Any, parameters: Parameters) -> float:
    """Return the root of the mean squared distance in pixels."""
    return float(f(parameters).square().sum(1).mean().sqrt())


def picture(scene: Scene, start: Parameters, fits: dict[tuple[str, str], Fit], path: Path) -> None:
    """Draw the error over the time, and one image's markers before and after."""
    made, ((left, right),) = figure(2)
    for (written, engine), fit in fits.items():
        seconds = np.linspace(0, fit.seconds, len(fit.errors))
        left.semilogy(seconds, fit.errors, ".-", label=f"{written}, {engine}")
    left.set(xlabel="seconds of processor time", ylabel="reprojection error [px]")
    left.legend(fontsize=7)

    f = residual_in_torch(scene)
    pieces = torch.from_numpy(fits["torch", "linearize"].parameters).split(
        [t.numel() for t in start.values()]
    )
    end = {n: p.view_as(t) for (n, t), p in zip(start.items(), pieces, strict=True)}
    mine = scene.camera == np.bincount(scene.camera).argmax()
    for parameters, label, style in ((start, "start", "rx"), (end, "adjusted", "b+")):
        shown = (f(parameters).numpy() + scene.xy)[mine]
        right.plot(*shown.T, style, label=label)
    right.plot(*scene.xy[mine].T, "ko", markerfacecolor="none", markersize=9, label="seen")
    right.invert_yaxis()
    right.set(xlabel="x [px]", ylabel="y [px]", title="one image")
    right.legend(fontsize=7)
    save(made, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Solve, compare, draw; return 1 if two solvers disagree or f ran too often."""
    chosen = options(__doc__, "bundle_adjustment", arguments)
    scene, start, solved = problem(chosen.quick)
    fits = solve_all(scene, start, chosen.quick, chosen.quiet)
    f = residual_in_torch(scene)
    unknowns = sum(t.numel() for t in start.values())
    print(f"{len(scene.xy)} markers in {len(scene.turn)} images, {unknowns} unknowns;", end=" ")
    print(f"{rms(f, start):.2f} px at the start, {rms(f, solved):.6f} px in the file's solution")
    rows = [
        [
            f"{written}, {engine}",
            f"{fit.errors[-1]:.6f}",
            fit.iterations,
            fit.products,
            fit.runs,
            f"{fit.seconds:.2f}",
        ]
        for (written, engine), fit in fits.items()
    ]
    header = ("residuals, products", "px at end", "iterations", "JᵀJ·v", "runs of f", "seconds")
    print(table(header, rows))
    picture(scene, start, fits, chosen.out)

    ends = [fit.errors[-1] for fit in fits.values()]
    if max(ends) > 1.001 * min(ends):
        print("The solvers disagree.", file=sys.stderr)
        return 1
    ours = [fit for (_, engine), fit in fits.items() if engine == "linearize"]
    if any(fit.runs != fit.iterations + 1 for fit in ours):  # the start, then one for each step
        print("f ran more than once at a point.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
