"""Outer loops at random, a few each time and as many as are asked for.

`LINEARIZE_FUZZ_CASES=4000 pytest -m slow -s tests/whole/test_outer_loops.py` goes on for about an
hour. The seed is printed, and may be set: `LINEARIZE_FUZZ_SEED=7`.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.support import outer_loops

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def refusals(found: dict[str, int]) -> list[str]:
    return [f"{text} ({n})" for text, n in found.items() if text.startswith("refused")]


def test_some_outer_loops() -> None:
    """The same each time."""
    found = outer_loops.run(seed=0, cases=12)
    assert not refusals(found)
    assert found["points"] >= 36


#: Cases that found something: a Jacobian that is zero but for rounding.
FOUND = [1000038]


@pytest.mark.parametrize("seed", FOUND)
def test_cases_that_found_something(seed: int) -> None:
    outer_loops.Case(seed).run()


@pytest.mark.slow
def test_many_outer_loops() -> None:
    """Others each time."""
    seed = int(os.environ.get("LINEARIZE_FUZZ_SEED", random.randrange(10_000)))
    cases = int(os.environ.get("LINEARIZE_FUZZ_CASES", "300"))
    print(f"LINEARIZE_FUZZ_SEED={seed} LINEARIZE_FUZZ_CASES={cases}", flush=True)
    found = outer_loops.run(seed, cases)
    print(dict(found))
    assert not refusals(found)
