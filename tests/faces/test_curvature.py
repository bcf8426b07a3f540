"""Curvature operators against dense Hessians of PyTorch, and against curvlinops."""

import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import linearize as lz
import linearize.curvature
from linearize.curvature import fisher, gauss_newton, hessian
from tests.support.functions import rand
from tests.support.operator_contract import check_operator

F64 = torch.float64


def classes(n, k, seed=0):
    return torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))


def model(p, x):
    """A network of one hidden layer, 2 -> 4 -> 3."""
    return torch.tanh(x @ p["w"].T + p["b"]) @ p["v"].T


PARAMS = {"w": rand(4, 2), "b": rand(4, seed=1), "v": rand(3, 4, seed=2)}
SIZE = 24


def flat_model(t, x):
    w, b, v = t.split([8, 4, 12])
    return model({"w": w.view(4, 2), "b": b, "v": v.view(3, 4)}, x)


FLAT = torch.cat([PARAMS[k].reshape(-1) for k in ("w", "b", "v")])

LOSSES = {
    "mse": (F.mse_loss, lambda n, s: rand(n, 3, seed=s)),
    "cross_entropy": (F.cross_entropy, lambda n, s: classes(n, 3, s)),
    "bce_with_logits": (
        F.binary_cross_entropy_with_logits,
        lambda n, s: (rand(n, 3, seed=s) > 0).to(F64),
    ),
    "poisson_nll": (F.poisson_nll_loss, lambda n, s: rand(n, 3, seed=s).abs().round()),
}


def dense_ggn(loss, x, y):
    """Jᵀ·H·J from PyTorch's dense derivatives."""
    J = torch.autograd.functional.jacobian(lambda t: flat_model(t, x), FLAT)
    out = flat_model(FLAT, x)
    H = torch.autograd.functional.hessian(lambda o: loss(o, y), out)
    J, H = J.reshape(-1, SIZE), H.reshape(out.numel(), out.numel())
    return J.T @ H @ J


def dense_hessian(loss, x, y):
    return torch.autograd.functional.hessian(lambda t: loss(flat_model(t, x), y), FLAT)


@pytest.mark.parametrize("name", LOSSES)
def test_gauss_newton_and_fisher(name):
    loss, targets = LOSSES[name]
    batches = [(rand(5, 2, seed=s), targets(5, s)) for s in (3, 4)]
    want = sum(dense_ggn(loss, x, y) for x, y in batches)
    G = gauss_newton(model, PARAMS, name, batches)
    check_operator(G, want)
    check_operator(fisher(model, PARAMS, name, batches), want)
    if name == "mse":  # by hand: 2/size JᵀJ
        J = [torch.func.jacrev(flat_model)(FLAT, x).reshape(15, SIZE) for x, _ in batches]
        by_hand = sum(2 / 15 * j.T @ j for j in J)
        torch.testing.assert_close(G.materialize(), by_hand)
    total = sum(loss(flat_model(FLAT, x), y) for x, y in batches)
    torch.testing.assert_close(G.value, total)
    t = FLAT.clone().requires_grad_()
    (g,) = torch.autograd.grad(sum(loss(flat_model(t, x), y) for x, y in batches), t)
    got = torch.cat([G.gradient[k].reshape(-1) for k in ("w", "b", "v")])
    torch.testing.assert_close(got, g)


def test_a_loss_given_as_a_function():
    x, y = rand(6, 2, seed=3), rand(6, 3, seed=4)
    loss = lambda o, y: ((o - y) ** 2 + 1).sqrt().sum()  # noqa: E731
    check_operator(gauss_newton(model, PARAMS, loss, [(x, y)]), dense_ggn(loss, x, y))
    closed = gauss_newton(lambda p: model(p, x), PARAMS, lambda o: loss(o, y))
    torch.testing.assert_close(closed.materialize(), dense_ggn(loss, x, y))


def test_models_of_several_outputs():
    def two(p):
        return p.sin(), {"s": p.sum() * p[:2]}

    def loss(out):
        return (out[0] ** 4).sum() + out[1]["s"].exp().sum()

    p = rand(4)
    J = torch.autograd.functional.jacobian(lambda p: torch.cat([two(p)[0], two(p)[1]["s"]]), p)
    o = torch.cat([two(p)[0], two(p)[1]["s"]])
    H = torch.diag(torch.cat([12 * o[:4] ** 2, o[4:].exp()]))
    torch.testing.assert_close(gauss_newton(two, p, loss).materialize(), J.T @ H @ J)


def test_hessian_over_batches():
    batches = [(rand(n, 2, seed=n), rand(n, 3, seed=n)) for n in (3, 5)]
    loss = F.mse_loss

    def f(p, x, y):
        return loss(model(p, x), y)

    want = sum(dense_hessian(loss, x, y) for x, y in batches)
    H = hessian(f, PARAMS, batches)
    check_operator(H, want)
    torch.testing.assert_close(H.value, sum(f(PARAMS, x, y) for x, y in batches))
    mean = hessian(f, PARAMS, iter(batches), reduction="mean")
    x, y = (torch.cat(t) for t in zip(*batches, strict=True))
    torch.testing.assert_close(mean.materialize(), dense_hessian(loss, x, y))
    torch.testing.assert_close(mean.value, f(PARAMS, x, y))
    t = FLAT.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(flat_model(t, x), y), t)
    torch.testing.assert_close(torch.cat([u.reshape(-1) for u in mean.gradient.values()]), g)


def test_hessian_without_batches_runs_f_once():
    runs = 0

    def f(x):
        nonlocal runs
        runs += 1
        return (x.sin() * x.roll(1)).sum() ** 2

    x = rand(5)
    H = hessian(f, x)
    check_operator(
        H, torch.autograd.functional.hessian(lambda x: (x.sin() * x.roll(1)).sum() ** 2, x)
    )
    assert runs == 1
    assert H.gradient.shape == x.shape


def counting(f):
    def counted(*args):
        counted.runs += 1
        return f(*args)

    counted.runs = 0
    return counted


def test_memory_budget():
    batches = [(rand(50, 2, seed=s), rand(50, 3, seed=s)) for s in range(4)]
    want = sum(dense_ggn(F.mse_loss, x, y) for x, y in batches)
    f = counting(model)
    G = gauss_newton(f, PARAMS, "mse", batches)
    v = rand(SIZE, seed=9)
    for _ in range(4):
        torch.testing.assert_close(G @ v, want @ v)
    assert f.runs == G.batches == G.batches_kept == 4
    # What a batch keeps is seen before the program is simplified, and grows by that.
    one = gauss_newton(f, PARAMS, "mse", batches[:1])
    _ = one @ v
    at_first = one.nbytes
    _ = [one @ v for _ in range(3)]
    for budget, kept in ((4 * one.nbytes + at_first, 4), (2 * one.nbytes + at_first // 2, 2)):
        f.runs = 0
        G = gauss_newton(f, PARAMS, "mse", batches, max_bytes=budget)
        for _ in range(5):
            torch.testing.assert_close(G @ v, want @ v)
            assert G.nbytes <= budget
        assert G.batches_kept == kept
        f.runs = 0
        torch.testing.assert_close(G @ v, want @ v)
        assert f.runs == 4 - kept  # the others anew for each product
    none = gauss_newton(f, PARAMS, "mse", batches, max_bytes=0)
    assert (none.batches_kept, none.nbytes) == (0, 0)
    torch.testing.assert_close(none.materialize(), want)


def test_batches_beyond_the_budget_have_the_same_draws():
    def f(p, x):
        return F.dropout(x @ p, 0.5).square().sum()

    p, batches = rand(4), [rand(30, 4, seed=s) for s in (1, 2)]
    torch.manual_seed(0)
    kept = hessian(f, p, batches).materialize()
    torch.manual_seed(0)
    anew = hessian(f, p, batches, max_bytes=0)
    state = torch.get_rng_state()
    for _ in range(3):
        torch.testing.assert_close(anew.materialize(), kept)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's draws go on undisturbed


def test_batches_that_cannot_be_repeated_are_an_error():
    calls = []

    def f(p):
        calls.append(1)
        return (p**2).sum() * len(calls)

    H = hessian(f, rand(3), max_bytes=0)
    with pytest.raises(lz.errors.LinearizeError, match="another value"):
        H @ rand(3)


def test_changed_parameters_are_noticed():
    p = rand(3)
    H = hessian(lambda p: (p**3).sum(), p)
    p.mul_(2)
    with pytest.raises(lz.errors.StalenessError):
        H @ rand(3)


def test_nothing_outlives_the_operator():
    x = rand(4, 2)
    w = weakref.ref(x)
    G = gauss_newton(model, PARAMS, "mse", [(x, rand(4, 3))])
    H = hessian(lambda p, x: model(p, x).exp().sum(), PARAMS, [x])
    _ = G @ rand(SIZE), H @ rand(SIZE), G.gradient
    del x, G, H
    gc.collect()
    assert w() is None


def test_custom_functions_in_the_model():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.from_numpy(x.detach().numpy() ** 3)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return torch.from_numpy(3 * x.detach().numpy() ** 2 * g.detach().numpy())

        @staticmethod
        def jvp(ctx, t):
            (x,) = ctx.saved_tensors
            return torch.from_numpy(3 * x.detach().numpy() ** 2 * t.detach().numpy())

        @staticmethod
        def setup(ctx):
            pass

    class Both(Opaque):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_forward(x)
            return Opaque.forward(ctx, x)

    p, A = rand(3), rand(5, 3, seed=1)
    G = gauss_newton(lambda p: A @ Both.apply(p), p, lambda o: o.exp().sum())
    J = A * 3 * p**2
    check_operator(G, J.T @ torch.diag((A @ p**3).exp()) @ J)


def test_wrong_arguments():
    p = rand(3)
    with pytest.raises(lz.errors.OptionError, match="cross_entropy"):
        gauss_newton(torch.sin, p, "hinge")
    with pytest.raises(lz.errors.OptionError, match="distribution"):
        fisher(torch.sin, p, torch.sum)
    with pytest.raises(lz.errors.OptionError, match="reduction"):
        hessian(torch.sum, p, reduction="median")
    with pytest.raises(lz.errors.OptionError, match="max_bytes"):
        hessian(torch.sum, p, max_bytes=-1)
    with pytest.raises(lz.errors.StructureError, match="one real number"):
        hessian(torch.sin, p)
    with pytest.raises(lz.errors.StructureError, match="at least one"):
        hessian(torch.sum, p, [])
    with pytest.raises(lz.errors.StructureError, match="inputs, targets"):
        gauss_newton(lambda p, x: p * x, p, "mse", [rand(3)])


@pytest.mark.parametrize("kind", ["GGN", "Hessian"])
def test_against_curvlinops(kind):
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = [(rand(n, 5, seed=n), classes(n, 3, n)) for n in (6, 4)]
    loss = nn.CrossEntropyLoss()
    make = getattr(curvlinops, f"{kind}LinearOperator")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = make(net, loss, list(net.parameters()), data)
        params = {k: t.detach() for k, t in net.named_parameters()}
        v = rand(sum(t.numel() for t in params.values()), seed=5)
        want = theirs @ v

    def apply(p, x):
        return functional_call(net, p, (x,))

    if kind == "GGN":
        ours = gauss_newton(apply, params, "cross_entropy", data, reduction="mean")
    else:
        ours = hessian(lambda p, x, y: loss(apply(p, x), y), params, data, reduction="mean")
    for _ in range(4):
        torch.testing.assert_close(ours @ v, want, rtol=1e-10, atol=1e-12)
