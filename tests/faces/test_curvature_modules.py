"""Curvature of modules and their data; diagonals; vectors."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import linearize as lz
from linearize.curvature import fisher, gauss_newton, hessian
from tests.support.comparing import Counted
from tests.support.functions import rand


def net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    made[0].bias.requires_grad_(False)
    return made


def data(count=22):
    return rand(count, 4, seed=1), torch.arange(count) % 3


def loader():
    """Batches of unequal length."""
    return DataLoader(TensorDataset(*data()), batch_size=8)


def dense(net, loss, what):
    """The matrix from PyTorch alone, of all data at once."""
    names = [n for n, p in net.named_parameters() if p.requires_grad]
    x, y = data()
    own = {n: p.detach() for n, p in net.named_parameters()}
    shapes = [own[n].shape for n in names]

    def model(v):
        parts = v.split([s.numel() for s in shapes])
        chosen = {n: t.view(s) for n, t, s in zip(names, parts, shapes, strict=True)}
        return functional_call(net, {**own, **chosen}, (x,))

    v = torch.cat([own[n].reshape(-1) for n in names])
    if what == "hessian":
        return torch.autograd.functional.hessian(lambda v: loss(model(v), y), v)
    J = torch.autograd.functional.jacobian(model, v).reshape(-1, len(v))
    z = model(v).detach()
    H = torch.autograd.functional.hessian(lambda z: loss(z, y), z).reshape(len(J), len(J))
    return J.T @ H @ J


LOSSES = {
    "name": ("cross_entropy", nn.functional.cross_entropy),
    "module": (nn.CrossEntropyLoss(), nn.functional.cross_entropy),
    "sum": (
        nn.CrossEntropyLoss(reduction="sum"),
        lambda z, y: nn.functional.cross_entropy(z, y, reduction="sum"),
    ),
    "function": (
        lambda z, y: nn.functional.cross_entropy(z, y, reduction="sum"),
        lambda z, y: nn.functional.cross_entropy(z, y, reduction="sum"),
    ),
}


@pytest.mark.parametrize("which", list(LOSSES))
@pytest.mark.parametrize("make", [gauss_newton, hessian], ids=lambda f: f.__name__)
def test_a_module_and_its_data(make, which):
    loss, plain = LOSSES[which]
    module = net()
    want = dense(module, plain, make.__name__)
    G = make(module, loss, loader())
    assert G.shape == want.shape
    for _ in range(2):
        torch.testing.assert_close(G.materialize(), want)
    torch.testing.assert_close(G.diagonal(), want.diagonal())
    torch.testing.assert_close(G.trace(), want.trace())
    assert list(G.gradient) == ["0.weight", "2.weight", "2.bias"]
    leaves = [p for p in module.parameters() if p.requires_grad]
    x, y = data()
    grads = torch.autograd.grad(plain(module(x), y), leaves)
    torch.testing.assert_close(G.flat_gradient, torch.cat([g.reshape(-1) for g in grads]))
    torch.testing.assert_close(G.in_space.ravel(G.gradient), G.flat_gradient)
    v = rand(G.shape[1], seed=5)
    torch.testing.assert_close(G.in_space.ravel(G(G.in_space.unravel(v))), want @ v)


def test_the_parameters_may_be_chosen():
    module, full = net(), None
    full = gauss_newton(module, "cross_entropy", loader()).materialize()
    some = {n: p for n, p in module.named_parameters() if n.startswith("2")}
    for params in (some, list(some.values()), tuple(some.values())):
        G = gauss_newton(module, params, "cross_entropy", loader())
        torch.testing.assert_close(G.materialize(), full[20:, 20:])
        assert isinstance(G.gradient, dict if isinstance(params, dict) else list)
    F = fisher(module, "cross_entropy", loader())
    torch.testing.assert_close(F.materialize(), full)
    torch.testing.assert_close(F["2.weight", "0.weight"].materialize(), full[20:35, :20])


def test_what_is_no_call_for_a_module():
    module = net()
    with pytest.raises(lz.errors.StructureError, match=r"\(net, loss, loader\)"):
        gauss_newton(module, dict(module.named_parameters()), loader())
    with pytest.raises(lz.errors.StructureError, match="four arguments"):
        gauss_newton(module, "mse", "mse", loader())
    with pytest.raises(lz.errors.StructureError, match="no parameter 'head'"):
        gauss_newton(module, {"head": rand(2)}, "mse", loader())
    with pytest.raises(lz.errors.StructureError, match="entry 1 is no parameter"):
        gauss_newton(module, [module[0].weight, rand(2)], "mse", loader())
    with pytest.raises(lz.errors.StructureError, match=r"\(net, loss, loader\)"):
        hessian(module, dict(module.named_parameters()), loader())
    with pytest.raises(lz.errors.OptionError, match="mse"):
        gauss_newton(module, "mean squares", loader())


def test_the_diagonal_of_a_gauss_newton_matrix_takes_its_outputs():
    """Many parameters, few outputs: no product for each parameter."""
    w = rand(3, 2_000, seed=3) / 50
    x, y = rand(2, 2_000, seed=4), rand(2, 3, seed=5)

    def model(w, x):
        return torch.tanh(x @ w.T)

    G = gauss_newton(model, w, "mse", [(x[:1], y[:1]), (x[1:], y[1:])])
    calls = Counted(G._apply)
    G._apply = calls
    J = torch.autograd.functional.jacobian(lambda w: model(w, x), w).reshape(6, -1)
    assert J.norm() > 1
    want = (J.square() * (2 / 3)).sum(0)  # each batch is the mean of three squares
    for chunk_size in ("auto", 1, 2):
        torch.testing.assert_close(G.diagonal(chunk_size=chunk_size), want)
    assert calls.runs == 0
    torch.testing.assert_close(G.trace(), want.sum())
    estimate = G.trace(samples=50, generator=torch.Generator().manual_seed(0))
    assert (estimate.value - want.sum()).abs() < 4 * estimate.error
    mean = gauss_newton(model, w, "mse", [(x[:1], y[:1]), (x[1:], y[1:])], reduction="mean")
    torch.testing.assert_close(mean.diagonal(), want / 2)


def test_the_diagonal_of_a_gauss_newton_matrix_takes_no_pullback_of_many_outputs():
    """Many outputs, few parameters; the Hessian of the loss has eigenvalues of either sign."""
    w, xs = rand(4, seed=3), [rand(30, 4, seed=k) for k in (4, 5)]

    def model(w, x):
        return torch.tanh(x * w).sum(1)

    def loss(z, y):
        return (z**3).sum() + (z[:-1] * z[1:]).sum() + (y * z).sum()

    y = torch.zeros(30, dtype=w.dtype)
    G = gauss_newton(model, w, loss, [(x, y) for x in xs])
    calls = Counted(G._apply)
    G._apply = calls
    want = torch.zeros(4, dtype=w.dtype)
    for x in xs:
        J = torch.autograd.functional.jacobian(lambda w, x=x: model(w, x), w)
        H = torch.autograd.functional.hessian(lambda z: loss(z, y), model(w, x))
        assert torch.linalg.eigvalsh(H)[[0, -1]].prod() < 0
        want += (J.T @ H @ J).diagonal()
    for chunk_size in ("auto", 1, 3):
        torch.testing.assert_close(G.diagonal(chunk_size=chunk_size), want)
    assert calls.runs == 0


def test_the_diagonal_linearizes_batches_that_are_not_kept_once_each():
    w, runs = rand(4, seed=3), []

    def model(w, x):
        runs.append(1)
        return torch.tanh(x * w).sum(1)

    batches = [(rand(30, 4, seed=k), rand(30, seed=k)) for k in (4, 5, 6)]
    G = gauss_newton(model, w, "mse", batches, max_bytes=0)
    assert G.batches_kept == 0
    runs.clear()
    found = G.diagonal(chunk_size=3)
    assert len(runs) == len(batches)
    torch.testing.assert_close(found, G.materialize(chunk_size=4).diagonal())


# -- curvlinops ---------------------------------------------------------------------------


def test_every_function_of_curvlinops_that_takes_an_operator():
    curvlinops = pytest.importorskip("curvlinops")
    module = net()
    G = gauss_newton(module, "cross_entropy", loader())
    M = G.materialize()
    torch.manual_seed(0)
    n = len(M)

    def near(got, want, tol):
        assert abs(float(got) - float(want)) <= tol * abs(float(want))

    near(curvlinops.hutchinson_trace(G, num_matvecs=36), M.trace(), 0.7)
    near(curvlinops.hutchpp_trace(G, num_matvecs=36), M.trace(), 0.1)
    near(curvlinops.xtrace(G, num_matvecs=36), M.trace(), 0.1)
    near(curvlinops.hutchinson_squared_fro(G, num_matvecs=36), M.square().sum(), 0.9)
    got = curvlinops.hutchinson_diag(G, num_matvecs=36)
    assert (got - M.diagonal()).norm() < M.diagonal().norm()
    got = curvlinops.xdiag(G, num_matvecs=36)
    assert (got - M.diagonal()).norm() < 0.1 * M.diagonal().norm()
    grid, density = curvlinops.lanczos_approximate_spectrum(G, ncv=n - 1, num_points=64)
    assert grid.shape == density.shape == (64,)
    assert float(density.min()) >= 0
    grid, density = curvlinops.lanczos_approximate_log_spectrum(G, ncv=n - 1, num_points=64)
    assert grid.shape == density.shape == (64,)
    # The same matrix as its own.
    params = [p for p in module.parameters() if p.requires_grad]
    theirs = curvlinops.GGNLinearOperator(
        module, nn.CrossEntropyLoss(), params, list(loader()), check_deterministic=False
    )
    v = rand(n, seed=7)
    torch.testing.assert_close(G @ v, theirs @ v)
    inverse = curvlinops.CGInverseLinearOperator(theirs)
    assert inverse.shape == tuple(G.shape)


def test_every_solver_of_torchsparsegradutils():
    tsgu = pytest.importorskip("torchsparsegradutils.utils")
    G = gauss_newton(net(), "cross_entropy", loader()).damped(0.1)
    b = rand(G.shape[0])
    want = torch.linalg.solve(G.materialize(), b)
    for solve, tol in ((tsgu.linear_cg, 1e-3), (tsgu.minres, 1e-2), (tsgu.bicgstab, 1e-4)):
        assert (solve(G.__matmul__, b) - want).norm() < tol * want.norm()
    x, _ = tsgu.lsmr(G.__matmul__, b, Armat=G.H.__matmul__, n=len(b), atol=1e-10, btol=1e-10)
    assert (x - want).norm() < 1e-6 * want.norm()
