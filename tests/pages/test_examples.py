"""The examples, each run in its small version; and the mathematics that they write by hand."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for module in ("matplotlib", "scipy", "sklearn", "threadpoolctl", "tqdm"):
    pytest.importorskip(module)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(autouse=True)
def same_number_of_threads() -> Iterator[None]:
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    with threadpool_limits(None):
        yield
    torch.set_num_threads(before)


def run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """Run an example in its small version, and return what it printed."""
    picture = tmp_path / "new" / f"{name}.png"
    example = importlib.import_module(name)
    assert example.main(["--quick", "--quiet", "--out", str(picture), *more]) == 0
    out = capsys.readouterr()
    # Of work that takes long the package shows a bar, which goes at the end.
    assert not out.err.rpartition("\r")[2].strip()
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
    assert ours[3] == custom[3] == "5"
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


# -- Bratu's problem ------------------------------------------------------------------------


def test_bratu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("bratu", tmp_path, capsys)
    found = [line.split() for line in printed.splitlines() if line.startswith("fold, square")]
    # n, critical λ, error, Newton steps, products, runs of f
    errors = [abs(float(row[3]) - 6.808124423) for row in found]
    assert errors[1] < 5e-5
    assert 13 < errors[0] / errors[1] < 19  # fourth order
    assert all(int(row[7]) == int(row[5]) + 1 for row in found)


def test_bratu_on_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(run("bratu_ranks", tmp_path, capsys))
    for kind in ("collective", "isend, irecv"):
        one, two = found[f"{kind}, ranks: 1"], found[f"{kind}, ranks: 2"]
        assert one[0] == two[0]  # Newton steps
        assert int(two[1]) == int(two[0]) + 1  # runs of f
        assert two[3] == two[4].split(" + ")[0]  # a product sends what f sends
        assert float(two[6]) < 1e-10
        # What a rank keeps falls with the number of ranks.
        assert int(two[5].replace(",", "")) < 0.6 * int(one[5].replace(",", ""))


def test_tensor_parallel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = rows(run("tensor_parallel", tmp_path, capsys))["ranks: 2"]
    assert two[0] == "1"  # run of f
    assert float(two[2]) < 1e-10
    assert two[3] == "2"  # a product sends what f sends


@pytest.mark.parametrize("dim", [1, 2])
def test_bratu_equation_is_of_fourth_order(dim: int) -> None:
    from bratu import Bratu

    def wrong(n: int) -> float:
        """Return what an exact solution of another equation leaves."""
        problem = Bratu(n, dim)
        x = torch.linspace(0, 1, n + 2, dtype=torch.float64)
        u = (torch.pi * x).sin()
        u = u if dim == 1 else u[:, None] * u
        inside = (slice(1, -1),) * dim
        # Δu = −dim·π²·u: the stencil of the right-hand side is applied to that.
        zero = torch.zeros((), dtype=torch.float64)
        bent = problem.residual(u[inside], zero)
        source = -dim * torch.pi**2 * u
        convolve = torch.nn.functional.conv1d if dim == 1 else torch.nn.functional.conv2d
        averaged = convolve(source[None, None], problem.average)[0, 0]
        return float((bent - averaged).abs().max())

    assert 12 < wrong(15) / wrong(31) < 20


def test_bratu_preconditioner_inverts_the_five_point_laplacian() -> None:
    from bratu import Bratu

    problem = Bratu(6)
    u = np.random.default_rng(0).standard_normal((6, 6))
    p = np.pad(u, 1)
    laplacian = p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4 * u
    b = np.append(laplacian.ravel() / problem.h**2, 7.0)
    np.testing.assert_allclose(
        problem.inverse_laplacian(1, 1) @ b, np.append(u.ravel(), 7.0), rtol=1e-10
    )


# -- a physics-informed network -------------------------------------------------------------


def test_physics_informed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(run("physics_informed", tmp_path, capsys))
    steps, runs, products, *_, error = found["Gauss–Newton"]
    assert steps == runs
    assert int(products) > 10 * int(runs)
    assert float(error) < min(float(found[name][-1]) for name in ("Adam", "L-BFGS"))


def test_poisson_residual_is_zero_at_the_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    from physics_informed import Poisson, solution

    problem = Poisson(6, 4)
    monkeypatch.setattr(problem, "u", lambda p, x: solution(x))
    assert float(problem.residual(problem.start).detach().abs().max()) < 1e-12
    monkeypatch.setattr(problem, "u", lambda p, x: 2 * solution(x))
    assert float(problem.residual(problem.start).detach().abs().max()) > 1e-1


# -- Laplace's approximation ----------------------------------------------------------------


def test_laplace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("laplace", tmp_path, capsys)
    found = rows(printed)
    for name in ("curvature.hessian", "curvature.gauss_newton", "func.hessian"):
        runs, _, error = found[f"linearize.{name}"]
        assert runs == "1"
        assert float(error) < 1e-12
    assert "The evidence is greatest for a prior of precision 1." in printed
    assert float(found["1"][-1]) > 0.94


def test_laplace_evidence_and_predictions_by_sampling() -> None:
    from laplace import posterior

    draw = torch.Generator().manual_seed(0)
    X = torch.randn(60, 2, generator=draw, dtype=torch.float64)
    y = (X @ torch.tensor([2.0, -1.0], dtype=torch.float64) > 0).double()
    y[:8] = 1 - y[:8]
    fitted = posterior(X, y, 0.5)
    # The integral over both weights, on a grid.
    axis = torch.linspace(-12, 12, 481, dtype=torch.float64)
    w = torch.cartesian_prod(axis, axis)
    logit = w @ X.T
    log_p = (y * logit - torch.nn.functional.softplus(logit)).sum(1) - 0.25 * (w * w).sum(1)
    cell = float(axis[1] - axis[0]) ** 2
    evidence = float(log_p.logsumexp(0)) + np.log(cell * 0.5 / (2 * np.pi))
    assert abs(fitted.evidence - evidence) < 0.05
    probability = (log_p.softmax(0)[:, None] * logit.sigmoid()).sum(0)
    assert float((fitted.probability(X) - probability).abs().max()) < 0.02


# -- spectrum -------------------------------------------------------------------------------


def test_spectrum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(run("spectrum", tmp_path, capsys))
    for name in ("at the start, linearize", "trained, linearize"):
        products, runs, _ = found[name][-3:]
        assert runs == "2"
        assert int(products) > 20


def test_spectrum_is_that_of_the_matrix() -> None:
    from spectrum import Digits, outer

    import linearize.scipy

    digits = Digits((4,), 100)
    found = outer(digits, lambda: linearize.scipy.aslinearoperator(digits.matrix()), 6)
    params = {n: p.detach() for n, p in digits.net.named_parameters()}
    ((x, _),) = digits.batches
    model = lambda p: torch.func.functional_call(digits.net, p, (x,))  # noqa: E731
    J = torch.cat([j.flatten(2) for j in torch.func.jacrev(model)(params).values()], 2).double()
    p = model(params).softmax(1).double()
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    G = torch.einsum("nki,nkl,nlj->ij", J, H, J) / len(x)
    expected = torch.linalg.eigvalsh(G).flip(0)[:6].numpy()
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)


# -- fixed point ----------------------------------------------------------------------------


def test_fixed_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(run("fixed_point", tmp_path, capsys))
    assert float(found["implicit"][-1]) < 1e-8
    assert float(found["through 2 iterations"][-1]) > 1e-2
    assert float(found["implicit"][1]) < 0.5 * float(found["through 80 iterations"][1])


# -- Triton ---------------------------------------------------------------------------------


def test_triton_says_why_it_does_not_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton_norm

    monkeypatch.setattr(triton_norm, "INTERPRETED", False)
    if triton_norm.missing() is None:
        pytest.skip("it runs here")
    assert triton_norm.main(["--quiet"]) == 0
    assert capsys.readouterr().out.startswith("Not run: ")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
def test_triton_kernels_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("torchsparsegradutils")
    done = subprocess.run(
        [
            sys.executable,
            str(EXAMPLES / "triton_norm.py"),
            "--quiet",
            "--out",
            str(tmp_path / "a"),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Products differ from those of torch.func by" in done.stdout


@pytest.mark.gpu
def test_triton_kernels_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("torchsparsegradutils")
    assert "loss" in run("triton_norm", tmp_path, capsys)


# -- the page -------------------------------------------------------------------------------


def test_the_page_has_a_place_and_a_picture_for_each_example() -> None:
    import run_all

    docs = EXAMPLES.parent / "docs"
    page = (docs / "examples.md").read_text(encoding="utf-8")
    for name in run_all.NAMES:
        assert run_all.written(page, name, "new\nPicture: x") != page
        assert f"python examples/{name}.py" in page
        assert f"_static/examples/{name}.png" in page
        assert (docs / "_static" / "examples" / f"{name}.png").exists()
    with pytest.raises(ValueError, match="no place"):
        run_all.written(page, "another", "")
