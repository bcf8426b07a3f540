"""The benchmark itself: what it verifies, what it refuses to time, what it says of targets."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import engines, report, run
from benchmarks.case import Case, Problem
from benchmarks.cases import CASES, matmul, opaque
from benchmarks.figures import Figure, figures
from benchmarks.measure import Engine, interleaved, measure, memory, operations, reference

SMALL = [case for case in CASES if case.size == "small"]
TINY = Case("one matrix product, n = 4", "small", lambda dtype: matmul.problem(4, dtype))
QUICK = {engines.OURS: engines.ours, engines.LIMIT: engines.limit}


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_limits_are_the_derivative_in_both_directions(case: Case) -> None:
    known, problem = reference(case), case.make(torch.float64)
    makers = [engines.limit] if problem.dense is None else [engines.limit, engines.dense]
    for make in makers:
        found = Engine(make, problem, known).verified(1e-9)
        assert "error" in found, found
    assert all(float(t.abs().max()) > 1e-4 for t in known.jvp)  # else every check is vacuous


def test_a_wrong_engine_is_reported_and_never_timed() -> None:
    calls = {"right": 0, "wrong": 0, "later": 0}

    def counting(name: str, factor: Any) -> Any:
        def make(problem: Problem) -> engines.Made:
            made = problem.limit()

            def jvp(v: torch.Tensor) -> torch.Tensor:
                calls[name] += 1
                return made.jvp(v) * factor(calls[name])

            return engines.Made(jvp, made.vjp)

        return make

    def broken(problem: Problem) -> engines.Made:
        raise ValueError("no such luck")

    def shapeless(problem: Problem) -> engines.Made:
        return engines.Made(lambda v: problem.limit().jvp(v)[:1])

    result = measure(
        TINY,
        1,
        {
            "right": counting("right", lambda call: 1),
            "wrong": counting("wrong", lambda call: 1.01),
            "later": counting("later", lambda call: 1 if call < 4 else 0),
            "broken": broken,
            "shapeless": shapeless,
        },
    )
    found = result["engines"]
    assert found["right"]["jvp"] > 0
    assert found["wrong"]["wrong"] == pytest.approx(0.01, rel=0.2)
    assert found["later"]["wrong"] == pytest.approx(1.0)
    assert found["broken"] == {"fails": "ValueError: no such luck"}
    assert found["shapeless"]["wrong"] == float("inf")
    assert all("jvp" not in e and "setup" not in e for n, e in found.items() if n != "right")
    assert calls["right"] > 50
    assert calls["wrong"] <= 3
    assert calls["later"] <= 5


def test_an_opaque_limit_that_is_not_the_derivative_is_refused() -> None:
    def make(dtype: torch.dtype) -> Problem:
        right = opaque.fixpoint(5, dtype)
        return Problem(lambda x: 2 * right.f(x), right.primals, right.limit)

    with pytest.raises(AssertionError, match="not the derivative"):
        reference(Case("doubled", "small", make, opaque=True))


def test_all_measurements_of_one_case() -> None:
    result = measure(TINY, 2, QUICK)
    own = result["engines"][engines.OURS]
    assert own["runs"] == 1
    assert own["error"] < 1e-6
    assert {"jvp", "vjp", "setup", "relinearize", "retained_bytes", "peak_bytes"} <= own.keys()
    assert {"batched_jvp", "batched_vjp"} <= own.keys()
    assert sum(own["operations"]["jvp"].values()) == 1
    assert json.loads(json.dumps(result)) == result


def test_engines_take_turns() -> None:
    turns: list[str] = []

    def sluggish(name: str) -> Any:
        def work() -> None:
            turns.append(name)
            np.linalg.inv(np.eye(300))  # longer than the shortest time that is read off

        return work

    times = interleaved({"a": sluggish("a"), "b": sluggish("b")}, 3)
    assert turns == ["a", "b"] * 3
    assert min(times.values()) > 1e-4


def test_memory_is_what_is_held_and_the_most_in_between() -> None:
    held, most = memory(lambda: torch.ones(1000).double().float())
    assert held == 4000
    assert most == 4000 + 8000


def test_operations_are_those_that_run() -> None:
    x = torch.ones(3)
    assert operations(lambda: x.sin() * x * x) == {"mul.Tensor": 2, "sin": 1}


def synthetic(**own: float) -> dict[str, Any]:
    limit = {"error": 0.0, "jvp": 100e-6, "vjp": 100e-6}
    ours = {"error": 0.0, "jvp": 110e-6, "vjp": 130e-6, "setup": 2e-3, "retained_bytes": 104}
    peer = {"error": 0.0, "jvp": 105e-6}
    return {
        "case": "synthetic",
        "size": "medium",
        "kind": "",
        "by_blas": False,
        "opaque": False,
        "autograd": 1e-3,
        "forward": 1e-3,
        "graph_bytes": 100,
        "engines": {
            engines.OURS: ours | own,
            "double backward": peer,
            "jax, baked": {"error": 0.0, "jvp": 200e-6},
            engines.LIMIT: limit,
        },
    }


def figure(result: dict[str, Any], name: str, which: str = "") -> Figure:
    return next(f for f in figures(result) if f.name == name and f.detail.startswith(which))


def test_targets() -> None:
    result = synthetic(relinearize=1.4e-3)
    assert figure(result, "product / limit", "jvp").met is True
    assert figure(result, "product / limit", "vjp").met is False
    # The peer is within 10 % of the limit: to be no slower than 1.02 of it is asked for.
    assert figure(result, "product / best PyTorch peer").target == 1.02
    assert figure(result, "product / best PyTorch peer").met is False
    assert figure(result, "product / better JAX").value == pytest.approx(0.55)
    assert figure(result, "setup / forward under autograd").met is True
    assert figure(result, "relinearize / forward under autograd").met is False
    assert figure(result, "retained bytes / autograd graph's").met is True
    text = report.text(report.targets([result]))
    assert "1 of 2" in text
    assert "✗" in report.text(report.by_case([result]))


def test_tiny_and_distant_peers_have_other_targets() -> None:
    result = synthetic()
    for entry in result["engines"].values():
        entry["jvp"] /= 10
    assert figure(result, "product / limit", "jvp").target == 2.0
    result["engines"]["double backward"]["jvp"] = 12e-6
    assert figure(result, "product / best PyTorch peer").target == 0.9


def test_the_command_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "CASES", (TINY,))
    monkeypatch.setattr(run, "measure", functools.partial(measure, engines=QUICK))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    out, docs = tmp_path / "out" / "results.json", tmp_path / "page.md"
    docs.write_text(f"before\n{report.BEGIN}outdated{report.END}\nafter\n")
    assert run.main(["--rounds", "1", "--out", str(out), "--docs", str(docs)]) == 0
    written = json.loads(out.read_text())
    assert [r["case"] for r in written["results"]] == [TINY.name]
    page = docs.read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "outdated" not in page
    assert "make bench" in page
    assert TINY.name in page
    assert (tmp_path / "_static" / "benchmarks.svg").stat().st_size > 1000
    # What was measured is taken over, and cases can be chosen.
    monkeypatch.setattr(run, "measure", None)
    assert run.main(["--resume", "--out", str(out)]) == 0
    assert run.main(["--only", "no such case"]) == 2
    assert run.main(["--list", "--size", "small"]) == 0
    assert TINY.name in capsys.readouterr().out
