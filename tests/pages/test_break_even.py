"""The break-even of `docs/when.md`: its arithmetic, and that it shows the committed results."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import break_even
from benchmarks.break_even import BreakEven, Costs, pairs
from benchmarks.report import BEGIN, END

PAGE = """
## Steady J·v

| case | forward, ms | linearize | torch.func.jvp, vjp |
| --- | --- | --- | --- |
| one | 2 | 1 | 4 |
| two | 1 | 1 | fails |
| three | 1 | 2 | 1 |

## Steady Jᵀ·u

| case | forward, ms | linearize | torch.func.jvp, vjp |
| --- | --- | --- | --- |
| one | 2 | 1 | 1 |
| two | 1 | 1 | 1 |
| three | 1 | 1e+00 | 1 |

## Set-up

| case | autograd, ms | linearize | torch.func.jvp, vjp | linearize again |
| --- | --- | --- | --- | --- |
| one | 3 | 7.5 (1) | 1 (2) | 2 |
| two | 3 | 5 (1) | fails | 2 |
| three | 3 | 5 (1) | -0.5 (2) | 2 |

## More
"""


@pytest.mark.parametrize("setup", [0.0, 1.0, 7.0, 100.0])
@pytest.mark.parametrize("pair", [0.5, 1.0, 3.0, 5.0])
def test_the_count_is_the_first_for_which_the_total_is_less(setup: float, pair: float) -> None:
    ours, rival = Costs(setup, pair), Costs(1.0, 3.0)

    def total(costs: Costs, k: int) -> float:
        return costs.setup + k * costs.pair

    expected = next(
        (k for k in range(1, 1000) if total(ours, k) <= total(rival, k) and k > 0), math.inf
    )
    got = pairs(ours, rival)
    assert got == expected or (pair >= 3 and setup >= 1 and got == math.inf)


def test_figures_are_read_from_the_tables() -> None:
    # Of the first case: 22.5 + 4 k against 3 + 10 k, then 6 + 4 k.
    assert list(break_even.break_evens(PAGE)) == [
        BreakEven("one", 4, 1, 2.5),
        BreakEven("three", math.inf, math.inf, 2 / 3),
    ]
    text = break_even.generated(PAGE)
    assert "| one | 4 | 1 | 0.4 |" in text
    assert "| three | never | never | 1.5 |" in text


def test_a_page_without_the_tables_is_an_error() -> None:
    with pytest.raises(ValueError, match="Steady"):
        list(break_even.break_evens("nothing"))


def test_the_page_goes_with_the_committed_results() -> None:
    results = (break_even.DOCS / break_even.RESULTS).read_text(encoding="utf-8")
    page = (break_even.DOCS / break_even.PAGE).read_text(encoding="utf-8")
    shown = page.partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == break_even.generated(results).strip(), "run python -m benchmarks.break_even"
    assert (break_even.DOCS / break_even.PLOT).exists()


def test_writing(tmp_path: Path) -> None:
    (tmp_path / "benchmarks.md").write_text(PAGE, encoding="utf-8")
    (tmp_path / "when.md").write_text(f"before\n{BEGIN}\n{END}\nafter\n", encoding="utf-8")
    (tmp_path / "_static").mkdir()
    break_even.main(tmp_path)
    page = (tmp_path / "when.md").read_text(encoding="utf-8")
    assert page.startswith("before")
    assert page.endswith("after\n")
    assert "pair 4" in page or "never" in page
    assert "never" in (tmp_path / "_static" / "break-even.svg").read_text(encoding="utf-8")
