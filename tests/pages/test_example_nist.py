"""The NIST regression example: files, models with hand-written derivatives, fits, report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

pytest.importorskip("scipy")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from nist import models as nist_models  # noqa: E402
from nist.data import (  # noqa: E402
    DATA_DIR,
    DataFileError,
    Problem,
    load,
    problem_names,
    read_problem,
)
from nist.fit import Counts, Fit, Objective, _refine, fit, log_relative_error  # noqa: E402
from nist.models import MODELS  # noqa: E402
from nist.report import summary, table  # noqa: E402

import linearize  # noqa: E402

# Observations, parameters, level, first and last (x, y), certified value of the last parameter:
# what the published files say, written down by hand.
FACTS: dict[str, tuple[int, int, str, tuple[float, float], tuple[float, float], float]] = {
    "BoxBOD": (6, 2, "higher", (1, 109), (10, 224), 5.4723748542e-01),
    "Chwirut1": (214, 3, "lower", (0.5, 92.9), (1.75, 28.95), 1.0530908399e-02),
    "Chwirut2": (54, 3, "lower", (0.5, 92.9), (1.75, 28.9), 1.2150007096e-02),
    "DanWood": (6, 2, "lower", (1.309, 2.138), (1.68, 5.66), 3.8604055871e00),
    "Eckerle4": (35, 3, "higher", (400, 0.0001575), (500, 0.000071), 4.5154121844e02),
    "Gauss1": (250, 8, "lower", (1, 97.62227), (250, 4.875359), 1.8389389025e01),
    "Gauss3": (250, 8, "average", (1, 97.58776), (250, 4.875312), 1.9668221230e01),
    "Kirby2": (151, 5, "average", (9.65, 0.0082), (371.3, 92.2), 2.1664802578e-05),
    "Lanczos1": (24, 6, "average", (0, 2.5134), (1.15, 6.239312536719e-02), 5.0000000001e00),
    "Lanczos2": (24, 6, "average", (0, 2.5134), (1.15, 6.23931e-02), 5.0028798100e00),
    "Lanczos3": (24, 6, "lower", (0, 2.5134), (1.15, 0.0624), 4.9863565084e00),
    "MGH09": (11, 4, "higher", (4, 0.1957), (0.0625, 0.0246), 1.3606233068e-01),
    "Misra1a": (14, 2, "lower", (77.6, 10.07), (760, 81.78), 5.5015643181e-04),
    "Misra1b": (14, 2, "lower", (77.6, 10.07), (760, 81.78), 3.9039091287e-04),
    "Misra1c": (14, 2, "average", (77.6, 10.07), (760, 81.78), 2.0813627256e-04),
    "Misra1d": (14, 2, "average", (77.6, 10.07), (760, 81.78), 3.0227324449e-04),
    "Rat42": (9, 3, "higher", (9, 8.93), (79, 67.08), 6.7359200066e-02),
    "Roszman1": (25, 4, "average", (-4868.68, 0.252429), (-464.17, 0.624169), -1.8134269537e02),
}

# The opaque models again, as plain torch: autograd then gives their derivatives.
TWINS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "BoxBOD": lambda b, x: b[0] * (1 - torch.exp(-b[1] * x)),
    "Eckerle4": lambda b, x: b[0] / b[1] * torch.exp(-0.5 * ((x - b[2]) / b[1]) ** 2),
    "Lanczos1": lambda b, x: sum(b[i] * torch.exp(-b[i + 1] * x) for i in (0, 2, 4)),
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "Rat42": lambda b, x: b[0] / (1 + torch.exp(b[1] - b[2] * x)),
    "Roszman1": lambda b, x: b[0] - b[1] * x - torch.atan(b[2] / (x - b[3])) / torch.pi,
}
TWINS["Lanczos2"] = TWINS["Lanczos3"] = TWINS["Lanczos1"]

FUNCTIONS = {
    "BoxBOD": "SaturatingExponential",
    "Eckerle4": "GaussianPeak",
    "Lanczos1": "ExponentialTerm",
    "MGH09": "KowalikOsborne",
    "Rat42": "LogisticGrowth",
    "Roszman1": "QuantumDefect",
}


def problem_called(name: str) -> Problem:
    return load([name])[0]


def tensors(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return x, y and three parameter vectors: both starts and the certified one."""
    points = [*problem.starts, problem.certified]
    return (
        torch.from_numpy(problem.x),
        torch.from_numpy(problem.y),
        [torch.from_numpy(b.copy()) for b in points],
    )


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def test_all_files_have_a_model_and_facts() -> None:
    assert problem_names() == sorted(MODELS) == sorted(FACTS)


@pytest.mark.parametrize("name", sorted(FACTS))
def test_file_is_read_as_published(name: str) -> None:
    observations, parameters, level, first, last, certified = FACTS[name]
    problem = problem_called(name)
    assert problem.name == name
    assert problem.difficulty == level
    assert problem.x.shape == problem.y.shape == (observations,)
    assert problem.x.dtype == problem.y.dtype == np.float64
    assert problem.starts.shape == (2, parameters)
    assert problem.certified.shape == problem.deviations.shape == (parameters,)
    assert (problem.x[0], problem.y[0]) == first
    assert (problem.x[-1], problem.y[-1]) == last
    assert problem.certified[-1] == certified


def test_starts_and_deviations_are_in_their_columns() -> None:
    problem = problem_called("Rat42")
    assert problem.starts.tolist() == [[100, 1, 0.1], [75, 2.5, 0.07]]
    assert problem.deviations.tolist() == [1.7340283401, 8.8295217536e-02, 3.4465663377e-03]
    assert problem.rss == 8.0565229338


@pytest.mark.parametrize("name", sorted(FACTS))
def test_certified_parameters_give_the_certified_sum_of_squares(name: str) -> None:
    problem = problem_called(name)
    x, y, (*_, certified) = tensors(problem)
    residual = MODELS[name].predict(certified, x) - y
    # Lanczos1 fits its data to 13 digits; the 11 certified ones leave a sum of about 4e-21.
    assert_allclose(float(residual @ residual), problem.rss, rtol=1e-9, atol=1e-20)


def test_the_damaged_value_is_corrected_and_reported() -> None:
    problem = problem_called("Roszman1")
    assert problem.certified[0] == 0.20196866396
    assert "b1 = 1.20196866396E-0" in problem.corrections[0]
    assert all(not other.corrections for other in load() if other.name != "Roszman1")


def test_an_undamaged_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = edited(tmp_path, "Roszman1", "1.20196866396E-0", "2.0196866396E-01")
    problem = read_problem(path)
    assert problem.certified[0] == 0.20196866396
    assert not problem.corrections


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("(lines 61 to 74)", "(lines 61 to 73)", "14 observations"),
        ("(lines 61 to 74)", "(lines 61 to 99)", "of a file of 74 lines"),
        ("(lines 61 to 74)", "", "nothing matches"),
        ("2 Parameters", "3 Parameters", "3 parameters are announced, the table has 2"),
        ("Lower Level", "Lunar Level", "'lunar'"),
        ("  b2 =", "  c2 =", "no line for parameter b2"),
        ("760.0E0", "many", "not two numbers"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(DataFileError, match=message):
        read_problem(edited(tmp_path, "Misra1a", old, new))


def test_unknown_problem_is_named() -> None:
    with pytest.raises(KeyError, match="Misra9"):
        load(["Misra9"])


def edited(folder: Path, name: str, old: str, new: str) -> Path:
    """Write a changed copy of a dataset's file."""
    text = (DATA_DIR / f"{name}.dat").read_text()
    assert old in text
    path = folder / f"{name}.dat"
    path.write_text(text.replace(old, new))
    return path


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------


def test_the_opaque_models_are_those_with_a_twin() -> None:
    assert {name for name, model in MODELS.items() if model.kind == "NumPy"} == set(TWINS)


@pytest.mark.parametrize("name", sorted(TWINS))
def test_opaque_model_agrees_with_its_torch_twin(name: str) -> None:
    x, _, points = tensors(problem_called(name))
    lin = linearize.Linearizer(lambda b: MODELS[name].predict(b, x))
    for b in points:
        here = lin.at(b)
        expected = torch.autograd.functional.jacobian(lambda b: TWINS[name](b, x), b)
        unit = torch.eye(len(b), dtype=torch.float64)
        columns = torch.stack([here.jvp_fn(v) for v in unit], dim=1)
        rows = torch.stack([here.vjp_fn(u)[0] for u in torch.eye(len(x), dtype=torch.float64)])
        tolerance = {"rtol": 1e-10, "atol": 1e-13 * float(expected.abs().max())}
        torch.testing.assert_close(here.value, TWINS[name](b, x), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(columns, expected, **tolerance)
        torch.testing.assert_close(rows, expected, **tolerance)


@pytest.mark.parametrize("name", sorted(TWINS))
def test_backward_is_right_for_plain_autograd_too(name: str) -> None:
    x, _, points = tensors(problem_called(name))
    u = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    for b in points:
        b.requires_grad_()
        (actual,) = torch.autograd.grad(MODELS[name].predict(b, x), b, u)
        (expected,) = torch.autograd.grad(TWINS[name](b, x), b, u)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_jacobian_agrees_with_central_differences(name: str) -> None:
    problem = problem_called(name)
    with Objective(problem) as objective:
        for b in (problem.starts[1], problem.certified):
            jacobian = objective.jacobian(b)
            for j, step in enumerate(1e-5 * np.abs(b)):
                h = np.zeros_like(b)
                h[j] = step
                slope = (objective.residual(b + h) - objective.residual(b - h)) / (2 * step)
                scale = np.abs(jacobian[:, j]).max()
                assert_allclose(jacobian[:, j], slope, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize(("name", "function"), FUNCTIONS.items())
def test_products_call_the_functions_own_code_and_never_forward(
    name: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = getattr(nist_models, function)
    calls = dict.fromkeys(("forward", "jvp", "backward"), 0)

    def counting(method: str) -> Callable[..., Any]:
        original = getattr(cls, method)

        def call(*arguments: Any) -> Any:
            calls[method] += 1
            return original(*arguments)

        return call

    for method in calls:
        monkeypatch.setattr(cls, method, staticmethod(counting(method)))
    x, y, (b, *_) = tensors(problem_called(name))
    here = linearize.Linearizer(lambda b: MODELS[name].predict(b, x)).at(b)
    uses = 3 if name == "Lanczos1" else 1
    assert calls == {"forward": uses, "jvp": 0, "backward": 0}
    for _ in range(5):
        here.jvp_fn(torch.ones_like(b))
        here.vjp_fn(y)
    assert calls == {"forward": uses, "jvp": 5 * uses, "backward": 5 * uses}


def test_overflow_is_silent() -> None:
    x, _, _ = tensors(problem_called("BoxBOD"))
    for name, b in {
        "BoxBOD": [1.0, -1e3],
        "Misra1a": [1.0, -1e3],
        "Rat42": [1.0, 1e3, -1e3],
        "Lanczos1": [1.0, -1e3] * 3,
        "Eckerle4": [1.0, 1e-300, 1.0],
    }.items():
        value = MODELS[name].predict(torch.tensor(b, dtype=torch.float64), x)
        assert value.shape == x.shape


# ---------------------------------------------------------------------------------------------
# Fits
# ---------------------------------------------------------------------------------------------


def test_one_run_serves_residual_jacobian_and_gradient() -> None:
    problem = problem_called("BoxBOD")
    with Objective(problem) as objective:
        b = problem.starts[0].copy()
        residual = objective.residual(b)
        jacobian = objective.jacobian(b.copy())
        gradient = objective.gradient(b.copy())
        assert_allclose(gradient, jacobian.T @ residual, rtol=1e-13)
        assert objective.counts == Counts(requests=3, runs=1, jvps=2, vjps=1)
        assert objective.points == 1

        b *= 1.5  # in place: a new point, not the one remembered
        assert not np.allclose(objective.residual(b), residual)
        residual[:] = np.nan  # the caller's own copy
        assert np.isfinite(objective.residual(problem.starts[0])).all()
        assert objective.counts.runs == objective.points == 2


@pytest.mark.parametrize(
    ("name", "start"), [("BoxBOD", 1), ("Misra1a", 1), ("Kirby2", 1), ("Rat42", 2)]
)
def test_fit_finds_the_certified_parameters(name: str, start: int) -> None:
    problem = problem_called(name)
    result = fit(problem, start)
    assert result.solved
    assert result.lre > 10.0
    assert result.lre == log_relative_error(result.parameters, problem.certified)
    assert_allclose(result.parameters, problem.certified, rtol=1e-10)
    assert_allclose(result.rss, problem.rss, rtol=1e-10)

    counts = result.counts
    assert counts.runs == result.points
    assert counts.requests > 1.5 * counts.runs
    assert counts.jvps > 0
    assert counts.jvps % len(problem.certified) == 0
    assert 0 < counts.vjps < counts.requests
    # One point for each step of either stage; they share the point where they meet.
    steps = result.trust_region_steps + result.gradient_steps
    assert result.trust_region_steps < counts.runs <= steps + 1


def test_the_refinement_adds_digits() -> None:
    """From a stored start: how far a trust region comes depends on the processor's rounding."""
    problem = problem_called("Kirby2")
    signs = (-1.0) ** np.arange(len(problem.certified))
    rough = problem.certified * (1 + 1e-6 * signs)
    with Objective(problem) as objective:
        refined, _ = _refine(objective, rough)
    assert log_relative_error(rough, problem.certified) < 7
    assert log_relative_error(refined, problem.certified) > 9


def test_the_refinement_loses_no_digits() -> None:
    result = fit(problem_called("Kirby2"), 1)
    assert result.lre > 9
    assert result.lre >= min(result.trust_region_lre, 9.0)


def test_certified_values_play_no_part_in_the_fit() -> None:
    problem = problem_called("DanWood")
    ignorant = dataclasses.replace(problem, certified=np.full(2, np.nan), deviations=np.zeros(2))
    result = fit(ignorant, 2)
    assert result.lre == 0.0
    assert_allclose(result.parameters, problem.certified, rtol=1e-9)


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        ([1.0, 2.0], 11.0),
        ([1.0, 2.002], 3.0),
        ([1.00001, 2.0], 5.0),
        ([1.00001, 2.2], 1.0),
        ([1.0, -20.0], 0.0),
        ([1.0, 2.0 + 1e-13], 11.0),
        ([np.nan, 2.0], 0.0),
        ([np.inf, 2.0], 0.0),
    ],
)
def test_log_relative_error(estimate: list[float], expected: float) -> None:
    certified = np.array([1.0, 2.0])
    assert log_relative_error(np.array(estimate), certified) == pytest.approx(expected, abs=1e-9)


# ---------------------------------------------------------------------------------------------
# Report and command line
# ---------------------------------------------------------------------------------------------


def fits_by_hand() -> list[Fit]:
    """Return one solved and one unsolved fit."""
    problem = problem_called("Roszman1")
    solved = Fit(
        problem=problem,
        start=1,
        parameters=problem.certified,
        rss=problem.rss,
        trust_region_steps=20,
        gradient_steps=7,
        lre=9.0,
        trust_region_lre=7.0,
        counts=Counts(requests=50, runs=30, jvps=40, vjps=9),
        points=30,
    )
    unsolved = dataclasses.replace(
        solved,
        start=2,
        lre=3.0,
        trust_region_lre=2.0,
        counts=Counts(requests=5, runs=4, jvps=3, vjps=2),
        points=4,
    )
    return [solved, unsolved]


def test_table_has_a_line_per_fit_and_totals() -> None:
    lines = [" ".join(line.split()) for line in table(fits_by_hand()).splitlines()]
    header, _, first, second, _, totals = lines
    assert header == "problem level model start iterations asked runs of f jvps vjps LRE"
    assert first == "Roszman1 average NumPy 1 20+7 50 30 40 9 9.0"
    assert second == "Roszman1 average NumPy 2 20+7 5 4 3 2 3.0 (not solved)"
    assert totals == "all 55 34 43 11 6.0"


def test_summary_says_what_is_not_solved() -> None:
    text = " ".join(summary(fits_by_hand()).split())
    assert "1 of 2 runs" in text
    assert "Not solved: Roszman1 from start 2." in text
    assert "Average LRE: 6.0 over 2 runs of 1 problems (after the trust region alone: 4.5)" in text
    assert "asked for 55 times, at 34 distinct points" in text
    assert text.count("1.20196866396E-0") == 1


def test_command_line_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = command_line()
    plot = tmp_path / "new" / "fits.png"
    assert main.main(["--problems", "DanWood", "Misra1d", "--out", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "Solved (LRE of 4 or more): 4 of 4 runs. Not solved: none." in out
    assert out.count("Misra1d") == 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main.main(["--problems", "DanWood", "--quiet", "--out", str(plot)]) == 0
    assert "jvps" not in capsys.readouterr().out


def test_a_wrong_number_of_runs_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main = command_line()
    good, _ = fits_by_hand()
    bad = dataclasses.replace(good, points=good.counts.runs - 1)
    monkeypatch.setattr(main, "run", lambda names, quiet: [good, bad])
    assert main.main(["--out", str(tmp_path / "fits.png")]) == 1
    assert "ran 30 times at 29 distinct points" in capsys.readouterr().err


def command_line() -> Any:
    """Return the script as a module, where its own dependencies are installed."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    import nist_regression

    return nist_regression
