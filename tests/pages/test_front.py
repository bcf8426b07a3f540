"""The picture of the front page: its arithmetic, and that it shows the committed results."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import front
from benchmarks.outer_page import BEGIN, END, page
from benchmarks.steps import ENGINES

RESULTS = [
    {
        "case": case,
        "k": k,
        "f": 1e-3,
        "launched": True,
        "parts": {},
        "engines": {
            "linearize": {"first": 1.0, "later": 2e-3 + 1e-4 * k},
            "torch.func.jvp": {"first": 1.0, "later": 3e-3 * k},
            "jax.jit": {"fails": "not installed"},
        },
    }
    for case in front.CASES[:2]
    for k in (1, 10, 100)
]
PAGE = f"before\n{BEGIN}\n\n{page(RESULTS)}\n{END}\nafter"


def test_times_are_read_from_the_page() -> None:
    assert set(front.LINES) <= set(ENGINES)
    found = {curve.engine: curve.points for curve in front.curves(PAGE, front.CASES[1])}
    assert [n for n, _ in found["linearize"]] == [1, 10, 100]
    assert [t for _, t in found["linearize"]] == pytest.approx([2.1, 3, 12])
    assert [t for _, t in found["torch.func.jvp"]] == pytest.approx([3, 30, 300])
    assert found["jax.jit"] == ()


def test_more_time_is_higher_and_more_products_are_to_the_right() -> None:
    root = ET.fromstring(front.picture(PAGE))
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 2 * 2 * 3
    first = circles[:3]  # of torch.func.jvp
    x, y = ([float(c.attrib[n]) for c in first] for n in ("cx", "cy"))
    assert x[0] < x[1] < x[2]
    assert y[0] > y[1] > y[2]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)  # ten times each
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert front.CASES[0] in texts
    assert front.CASES[2] not in texts
    assert "100" in texts


def test_a_page_without_results_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"benchmarks\.outer"):
        front.picture("nothing")


def test_the_picture_goes_with_the_committed_results(tmp_path: Path) -> None:
    results = (front.DOCS / front.RESULTS).read_text(encoding="utf-8")
    shown = (front.DOCS / front.PICTURE).read_text(encoding="utf-8")
    assert shown == front.picture(results), "run python -m benchmarks.front"
    for name in ("docs/index.md", "README.md"):
        assert "_static/outer.svg" in (front.DOCS.parent / name).read_text(encoding="utf-8")
    (tmp_path / "_static").mkdir()
    (tmp_path / front.RESULTS).write_text(PAGE, encoding="utf-8")
    front.main(tmp_path)
    assert (tmp_path / front.PICTURE).stat().st_size > 1000
