"""The benchmark of outer loops: what it verifies, what its tables say, which form they advise."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import choice, outer, outer_page, steps, whole_runs
from benchmarks.case import Problem
from benchmarks.cases import matmul, opaque
from benchmarks.steps import COMPILED, COMPILED_F, DOUBLE, FORWARD, JITTED, OURS, Ours

TINY = outer.Loop("tiny", lambda dtype: matmul.problem(4, dtype), launched=True, most=10)
QUICK = (OURS, FORWARD, DOUBLE)


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(outer, "POINTS", 3)


# -- measured -------------------------------------------------------------------------------


def test_all_engines_are_timed_at_all_points() -> None:
    few, many = outer.measure(TINY, (2, 10, 100), 2, QUICK)
    assert [few["k"], many["k"]] == [2, 10]  # not more than `most`
    for result in (few, many):
        assert set(result["engines"]) == set(QUICK)
        assert all(e["first"] > 0 and e["points"] == 6 for e in result["engines"].values())
        assert list(result["parts"]) == [OURS]
        assert set(result["parts"][OURS]["times"]) == set(Ours.PARTS)
        assert sum(result["parts"][OURS]["rooms"].values()) == pytest.approx(1)
        assert "_points" in result["parts"][OURS]["rooms"]
    assert json.loads(json.dumps(few)) == few


@pytest.mark.parametrize("place", [0, 2, 9])
def test_a_wrong_product_of_a_first_point_is_never_timed(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def wrong(problem: Problem) -> steps.Step:
        right = steps.forward_mode(problem)

        def step(x: Any, vs: Any) -> list[Any]:
            calls.append(len(vs))
            return [1.1 * p if k == place else p for k, p in enumerate(right(x, vs))]

        return step

    def broken(problem: Problem) -> steps.Step:
        raise ValueError("no such luck")

    monkeypatch.setitem(outer.ENGINES, FORWARD, wrong)
    monkeypatch.setitem(outer.ENGINES, DOUBLE, broken)
    (result,) = outer.measure(TINY, (2,), 1, QUICK)
    assert result["engines"][FORWARD] == {"fails": "wrong"}
    assert result["engines"][DOUBLE] == {"fails": "ValueError"}
    assert calls == [TINY.first]
    assert result["engines"][OURS]["later"] > 0


def test_a_slow_engine_goes_to_fewer_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer, "SHARE", 0.0)
    (result,) = outer.measure(TINY, (2,), 2, QUICK)
    assert {e["points"] for e in result["engines"].values()} == {1}
    monkeypatch.setattr(outer, "SLOW", 0)
    begun = outer.begin(TINY, DOUBLE, outer.Reference(TINY), TINY.make(TINY.dtype))
    assert begun[0] is None
    assert begun[1]["fails"] == "over 0"
    assert begun[1]["first"] > 0


def test_a_function_that_is_compiled_is_one_that_nobody_compiled_before() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    one, two = steps.fresh(f), steps.fresh(f)
    assert one.__code__ is not two.__code__
    assert one.__code__ != two.__code__
    assert torch.equal(one(torch.ones(3)), f(torch.ones(3)))


@pytest.mark.parametrize("loop", outer.LOOPS, ids=lambda loop: loop.name)
def test_references_are_derivatives(loop: outer.Loop) -> None:
    if "M parameters" in loop.name or "512" in loop.name or "256" in loop.name:
        pytest.skip("large")
    problem, reference = loop.make(torch.float64), outer.Reference(loop)
    (x,), (v,) = outer.points(problem, 1), outer.directions(problem, 1)
    if "opaque" in loop.name:
        size = 1 / (1 + problem.f(*x).sin() / 2)
        (known,) = (size * v[0],)
    else:
        known = torch.func.jvp(problem.functional or problem.f, x, v)[1]
    assert not reference.wrong((0, 0), x, v, known)
    assert reference.wrong((0, 0), x, v, 1.01 * known)


def test_whole_runs_end_at_the_same_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_runs, "STEPS", 2)
    monkeypatch.setattr(whole_runs, "INNER", 3)
    monkeypatch.setattr(whole_runs, "ROUNDS", 1)
    chosen = {name: whole_runs.ENGINES[name] for name in QUICK}
    chosen["other steps"] = lambda problem: whole_runs.by_torch(problem, _halved(problem))
    monkeypatch.setattr(whole_runs, "ENGINES", chosen)
    small = opaque.inlined(torch.float64)
    (x,) = small.primals
    result = whole_runs.measure("small", lambda: Problem(lambda x: x.tanh() - 0.5, (x,), print))
    found = result["run"]
    assert found["other steps"] == {"fails": "wrong"}
    for name in QUICK:
        assert found[name]["cost"] == pytest.approx(found[OURS]["cost"], rel=1e-9)
        assert found[name]["cost"] < result["from"]
        assert found[name]["later"] > 0


def _halved(problem: Problem) -> Any:
    maps = whole_runs.ours(problem.f)

    def made(x: Any) -> whole_runs.Maps:
        right = maps(x)
        return whole_runs.Maps(right.value, lambda *v: right.push(*v) / 2, right.pull)

    return made


def test_cases_of_an_earlier_run_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that goes on with other cases forgets none, and writes all of them down."""

    def measured(loop: outer.Loop, *_: Any) -> Iterator[dict[str, Any]]:
        if loop is outer.LOOPS[2]:
            raise MemoryError
        yield result(loop.name, 1, {OURS: 1.0})

    monkeypatch.setattr(outer, "measure", measured)
    monkeypatch.setattr(outer, "load", lambda _: None)
    first, second, third = (loop.name for loop in outer.LOOPS[:3])
    held = tmp_path / "outer.json"
    for name, more in ((first, []), (second, ["--resume"]), (third, ["--resume"])):
        assert outer.main(["-k", "1", "--out", str(held), "--only", name, *more]) == 0
    assert [r["case"] for r in json.loads(held.read_text())] == [first, second]
    printed = capsys.readouterr().out.rpartition(f"{third} is left out: MemoryError")[2]
    assert f"| {first} | 1 |" in printed
    assert f"| {second} | 1 |" in printed


# -- tables ---------------------------------------------------------------------------------


def result(case: str, k: int, later: dict[str, float], **first: float) -> dict[str, Any]:
    """Return what was measured, in milliseconds."""
    entries: dict[str, Any] = {
        name: {"first": first.get(name, 1.0) / 1e3, "later": t / 1e3, "points": 20}
        for name, t in later.items()
    }
    parts = {"times": dict.fromkeys(Ours.PARTS, 2e-3), "rooms": {"C++": 0.75, "_points": 0.25}}
    return {
        "case": case,
        "k": k,
        "f": 1e-3,
        "launched": case == "small",
        "engines": entries,
        "parts": {OURS: parts, COMPILED_F: parts},
    }


RESULTS = [
    result("small", 2, {OURS: 5.0, COMPILED_F: 9.0, FORWARD: 10.0, DOUBLE: 4.0, JITTED: 1.0}),
    result("small", 10, {OURS: 6.0, COMPILED_F: 3.0, FORWARD: 50.0, DOUBLE: 11.0, JITTED: 2.9}),
    result("large", 10, {OURS: 6.0, COMPILED_F: 6.5, FORWARD: 10.0, DOUBLE: 9.0}),
]


def test_targets() -> None:
    found = {row[0]: row[2:] for row in list(outer_page.targets(RESULTS))[1:]}
    assert found["torch.func.jvp, K = 2"][:2] == ["1 of 1", "0.50"]
    assert found["torch.func.jvp, K ≥ 10"] == ["1 of 2", "0.60", "large, K = 10"]
    assert found["double backward, K ≥ 2"] == ["2 of 3", "1.25", "small, K = 2"]
    assert found["double backward, K ≥ 10, small operations"][:2] == ["0 of 1", "0.55"]
    assert found["jax.jit, K ≥ 10, f compiled where that helps"][:2] == ["0 of 1", "1.03"]
    assert found["jax.jit, any K, f compiled where that helps"] == [
        "1 of 2",
        "5.00",
        "small, K = 2",
    ]


def test_what_is_missed_stands_beside_with_the_parts_of_its_time() -> None:
    _, *rows = outer_page.missed(RESULTS)
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("small", "2", OURS),
        ("small", "10", OURS),
        ("small", "10", COMPILED_F),
        ("large", "10", OURS),
    ]
    assert rows[0][3] == "double backward 1.2 > 1.0; jax.jit 5 > 2.0"
    assert rows[0][4:] == ["2.00"] * len(Ours.PARTS) + ["C++ 75%, _points 25%"]


def test_few_points_are_marked_and_failures_are_named() -> None:
    one = result("small", 10, {OURS: 6.0, FORWARD: 50.0})
    one["engines"][FORWARD]["points"] = 2
    one["engines"][DOUBLE] = {"fails": "wrong"}
    header, row = outer_page.rows([one], "later")
    cells = dict(zip(header, row, strict=True))
    assert cells[FORWARD] == "50\\*"
    assert choice.number(cells[FORWARD]) == 50
    assert (cells[OURS], cells[DOUBLE], cells[JITTED]) == ("6", "wrong", "–")


def committed(results: list[dict[str, Any]]) -> str:
    return f"before\n{outer_page.BEGIN}\n\n{outer_page.page(results)}\n{outer_page.END}\nafter"


def test_the_first_points_are_read_from_the_page() -> None:
    rows = outer_page.read(committed(RESULTS), first=True)
    assert [(row["case"], row[OURS]) for row in rows] == [("small", "1"), ("large", "1")]
    assert len(outer_page.read(committed(RESULTS))) == 3


# -- the choice -----------------------------------------------------------------------------


def test_the_simplest_form_that_costs_least_is_advised() -> None:
    page = committed(RESULTS)
    small, more, large = outer_page.read(page)
    assert choice.best(small) == DOUBLE
    assert choice.best(more) == COMPILED_F
    assert choice.best(large) == OURS
    assert choice.best(dict.fromkeys(choice.FORMS, "RuntimeError")) == "–"
    assert choice.gain(more, COMPILED_F) == pytest.approx(11 / 3, rel=1e-2)
    table = list(choice.rows(page))
    assert table[0] == ["case", "K = 2", "K = 10", "points until compiling is repaid"]
    assert table[1] == ["small", DOUBLE, f"{COMPILED_F} (3.7)", "1, or never"]
    assert table[2] == ["large", "–", f"{OURS} (1.5)", "never"]
    assert choice.sentence(page) == (
        "A `Linearizer` costs least with K = 2 in 0 of 1 cases, with K = 10 in 2 of 2 cases."
    )


def test_compiling_is_repaid_when_what_it_saved_is_what_it_cost() -> None:
    first = {OURS: "10", COMPILED_F: "1.01e+03", COMPILED: "wrong"}
    later = {OURS: "6", COMPILED_F: "3", COMPILED: "–"}
    assert choice.repaid(first, later) == 1 + math.ceil(1000 / 3)
    assert choice.repaid(first, later | {COMPILED_F: "7"}) == math.inf


def test_the_page_goes_with_the_committed_results(tmp_path: Path) -> None:
    results = (choice.DOCS / choice.RESULTS).read_text(encoding="utf-8")
    page = (choice.DOCS / choice.PAGE).read_text(encoding="utf-8")
    shown = page.partition(choice.BEGIN)[2].partition(choice.END)[0].strip()
    assert shown == choice.generated(results).strip(), "run python -m benchmarks.choice"
    (tmp_path / choice.RESULTS).write_text(committed(RESULTS), encoding="utf-8")
    (tmp_path / choice.PAGE).write_text(f"a\n{choice.BEGIN}\n{choice.END}\nz\n", encoding="utf-8")
    choice.main(tmp_path)
    assert "| large |" in (tmp_path / choice.PAGE).read_text(encoding="utf-8")
