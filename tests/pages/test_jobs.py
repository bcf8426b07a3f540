"""The ten jobs of `docs/jobs.md`: every way that can be tried here, on small problems."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

for module in ("matplotlib", "scipy", "sklearn", "threadpoolctl"):
    pytest.importorskip(module)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import ten_jobs  # noqa: E402
from jobs.job import Counted, Job, lines, measured  # noqa: E402
from jobs.notebook import session  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


#: How often ours runs f; None where it is once for each point that SciPy asks for.
RUNS = {"cnn_curvature": 3, "ggn_diagonal": 3, "equilibrium": 1, "mri": 6, "kernel": 1}


@pytest.mark.parametrize("name", ten_jobs.NAMES)
def test_each_way_is_right(name: str) -> None:
    job = importlib.import_module(f"jobs.{name}").JOB
    problem = job.make(True)
    rows = [measured(job, problem, way) for way in job.ways if "lineax" not in way]
    for row in rows:
        assert row.missing or row.right, row
    ours = rows[0]
    assert ours.way == "linearize"
    assert ours.runs == RUNS.get(name, ours.runs)
    others = [row for row in rows[1:] if row.runs and row.way == "torch.func"]
    assert all(ours.runs <= row.runs for row in others)


def test_an_answer_that_is_wrong_is_seen() -> None:
    def right(p: Any) -> Any:
        return p.f(1.0)

    def wrong(p: Any) -> Any:
        return p.f(1.1)

    class Problem:
        f = Counted(lambda x: x)

    job = Job("", lambda quick: Problem(), lambda p, x: abs(x - 1), 0.01, {"a": right, "b": wrong})
    rows = [measured(job, Problem(), way) for way in job.ways]
    assert [row.right for row in rows] == [True, False]
    assert "wrong" in ten_jobs.cells(rows[1])[-1]


def test_lines_are_those_of_the_body() -> None:
    def way(problem: object) -> object:
        """Do it."""
        import math

        # A comment.
        x = [
            math.pi,
        ]

        return x

    assert lines(way) == 4


def test_a_notebook() -> None:
    names = {"__name__": "__main__"}
    cells = list(session(names))
    wrong, right, kept, same = (cell.value for cell in cells[1:])
    assert not wrong.startswith("0.1246")
    assert right.startswith("0.1246")
    asked, ran = (int(word) for word in right.split() if word.isdigit())
    assert asked == ran
    assert "<cell 3>:4" in str(kept)  # lines of cells are named
    assert "return b[0] * (1 - torch.exp(-b[1] * pressu" in str(kept)
    assert "<table" in kept._repr_html_()
    assert same == (True, True)


def test_the_page_has_every_job() -> None:
    page = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    for name in ten_jobs.NAMES:
        job = importlib.import_module(f"jobs.{name}").JOB
        assert f"## {job.title}" in page, "run python examples/ten_jobs.py --docs docs/jobs.md"
        assert f"examples/jobs/{name}.py" in page
    assert "wrong" not in page.partition(ten_jobs.BEGIN)[2].replace("was wrong", "")
