"""What the examples have in common: their command line, tables, and pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

__all__ = ["figure", "options", "save", "table"]

OUT = Path(__file__).resolve().parent / "out"


def options(doc: str | None, name: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line: `--quick`, `--quiet` and `--out`. Also settle on one thread."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--quick", action="store_true", help="a small version, in seconds")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT / f"{name}.png",
        metavar="PNG",
        help=f"where the picture goes (default: out/{name}.png beside this script)",
    )
    # The problems are small: threads would cost more than they give.
    torch.set_num_threads(1)
    threadpool_limits(1)
    return parser.parse_args(arguments)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return aligned columns: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *rest = zip(row, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def figure(columns: int, rows: int = 1, width: float = 4.2, height: float = 3.4) -> Any:
    """Return a figure and its array of axes, drawn without a display."""
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False)


def save(made: Figure, path: Path) -> None:
    """Write a PNG file, making its folder if needed, and say where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=90)
    print(f"Picture: {path.name}")
