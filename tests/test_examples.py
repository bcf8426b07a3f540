"""The examples, each run in its small version; and the mathematics that they write by hand."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for module in ("matplotlib", "scipy", "tqdm"):
    pytest.importorskip(module)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(autouse=True)
def same_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """Run an example in its small version, and return what it printed."""
    picture = tmp_path / "new" / f"{name}.png"
    example = importlib.import_module(name)
    assert example.main(["--quick", "--quiet", "--out", str(picture), *more]) == 0
    out = capsys.readouterr()
    assert not out.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    return out.out


def rows(printed: str) -> dict[str, list[str]]:
    """Return the rows of the printed tables: by their first column, the others."""
    cells = [[c for c in line.split("  ") if c.strip()] for line in printed.splitlines()]
    return {row[0]: [c.strip() for c in row[1:]] for row in cells if len(row) > 1}


# -- bundle adjustment ----------------------------------------------------------------------


def test_bundle_adjustment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(run("bundle_adjustment", tmp_path, capsys))
    ours, custom, theirs = (
        found[name]
        for name in ("torch, linearize", "custom Function, linearize", "torch, torch.func.jvp")
    )
    assert ours[0] == custom[0] == theirs[0]  # pixels
    assert ours[3] == custom[3] == "7"
    assert int(theirs[3]) > int(theirs[2])


def test_bundle_data_is_read_as_described() -> None:
    from bundle.data import read

    for name, cameras, points, markers in (
        ("problem_01.bin", 333, 26, 5421),
        ("problem_03.bin", 500, 37, 6184),
    ):
        scene = read(name)
        assert scene.turn.shape == (cameras, 3, 3)
        assert scene.points.shape == (points, 3)
        assert scene.xy.shape == (markers, 2)
        eye = np.broadcast_to(np.eye(3), scene.turn.shape)
        np.testing.assert_allclose(scene.turn @ scene.turn.transpose(0, 2, 1), eye, atol=1e-4)


def test_bundle_engines_give_the_same_products() -> None:
    from bundle.reprojection import residual_in_numpy, residual_in_torch
    from bundle.solve import ENGINES
    from bundle_adjustment import problem

    scene, start, _ = problem(quick=True)
    plain, custom = residual_in_torch(scene), residual_in_numpy(scene)
    x = torch.cat([t.flatten() for t in start.values()]).numpy()
    points = [ENGINES[e](plain, start)(x) for e in ("torch.func.jvp", "linearize")]
    points.append(ENGINES["linearize"](custom, start)(x))
    known, *others = points
    rng = np.random.default_rng(0)
    for _ in range(4):
        v, u = rng.standard_normal(len(x)), rng.standard_normal(len(known.value))
        for other in others:
            np.testing.assert_allclose(other.value, known.value, rtol=1e-10, atol=1e-9)
            for product, given in (("gram", v), ("pull", u), ("columns", v[:, None])):
                expected: Any = getattr(known, product)(given)
                found = getattr(other, product)(given)
                np.testing.assert_allclose(found, expected, atol=1e-11 * abs(expected).max())


def test_bundle_preconditioner_is_the_diagonal_of_the_matrix() -> None:
    from bundle.reprojection import residual_in_torch
    from bundle.solve import ENGINES, _diagonal_blocks
    from bundle_adjustment import problem

    scene, start, _ = problem(quick=True)
    x = torch.cat([t.flatten() for t in start.values()]).numpy()
    point = ENGINES["linearize"](residual_in_torch(scene), start)(x)
    J = point.columns(np.eye(len(x)))
    blocks = np.concatenate(_diagonal_blocks(point, scene, start))
    for k, block in enumerate(blocks):
        part = J[:, 3 * k : 3 * k + 3]
        np.testing.assert_allclose(block, part.T @ part, rtol=1e-9, atol=1e-6)
