"""Whole Jacobians and Hessians against those of PyTorch, with the runs of f counted."""

import math

import pytest
import torch
from torch.autograd import functional as taf

import linearize as lz
from linearize import func, functional
from tests.support.functions import rand

F64 = torch.float64


class Opaque(torch.autograd.Function):
    """exp, that no transform of PyTorch can look into."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tensor([math.exp(t) for t in x.tolist()], dtype=x.dtype)
        ctx.save_for_backward(y)
        ctx.save_for_forward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return torch.tensor(
            [a * b for a, b in zip(g.tolist(), ctx.saved_tensors[0].tolist(), strict=True)]
        ).to(g)

    @staticmethod
    def jvp(ctx, t):
        return torch.tensor(
            [a * b for a, b in zip(t.tolist(), ctx.saved_tensors[0].tolist(), strict=True)]
        ).to(t)


class Square(torch.autograd.Function):
    """x² in the old style, with a backward that can be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def two(x, y):
    """A matrix and a vector to a tuple of a cube and a number."""
    return x.sin()[:, :, None] * y, (x.sum() * y).prod()


def tree(p, s):
    """Pytrees on both sides."""
    return {"h": torch.tanh(p["w"] @ s), "n": (p["b"] ** 2).sum() * s}


def equal(got, want):
    torch.testing.assert_close(got, want)
    a, b = torch.utils._pytree.tree_flatten(got)[1], torch.utils._pytree.tree_flatten(want)[1]
    assert a == b


@pytest.mark.parametrize("name", ["jacrev", "jacfwd"])
@pytest.mark.parametrize("argnums", [0, 1, -1, (0, 1), (1,), (1, 0)])
@pytest.mark.parametrize("chunk_size", ["auto", None, 1, 2])
def test_jacrev_and_jacfwd(name, argnums, chunk_size):
    ours, theirs = getattr(func, name), getattr(torch.func, name)
    x, y = rand(2, 3), rand(4, seed=1)
    # (torch.func.jacfwd of PyTorch 2.13 is wrong for argnums=-1.)
    want = theirs(two, argnums=1 if argnums == -1 else argnums)(x, y)
    equal(ours(two, argnums=argnums, chunk_size=chunk_size)(x, y), want)


@pytest.mark.parametrize("name", ["jacrev", "jacfwd"])
def test_pytrees_keywords_and_aux(name):
    ours, theirs = getattr(func, name), getattr(torch.func, name)
    p, s = {"w": rand(3, 4), "b": rand(2, seed=1)}, rand(4, seed=2)
    for argnums in (0, 1, (0, 1)):
        equal(ours(tree, argnums)(p, s), theirs(tree, argnums)(p, s))

    def f(x, *, factor):
        return x.sin() * factor, {"seen": x * 2}

    got = ours(f, has_aux=True)(s, factor=3.0)
    want = theirs(lambda x: f(x, factor=3.0), has_aux=True)(s)
    equal(got, want)


@pytest.mark.parametrize("compute", [func.jacrev, func.jacfwd, None])
def test_complex(compute):
    compute = compute or (lambda f: lambda z: functional.jacobian(f, z))
    z = rand(3, dtype=torch.complex128)
    got = compute(lambda z: z * z.sum())(z)
    equal(got, torch.diag(z.sum().expand(3)) + z[:, None].expand(3, 3))
    z.requires_grad_()
    got = compute(lambda z: z.exp())(z)
    equal(got.detach(), torch.diag(z.detach().exp()))
    if got.requires_grad:
        want = torch.diag(z.exp())
        u = rand(3, 3, dtype=torch.complex128, seed=1)
        equal(torch.autograd.grad(got, z, u), torch.autograd.grad(want, z, u))
    with pytest.raises(lz.errors.UnsupportedError, match="holomorphic"):
        compute(lambda z: z * z.conj())(z)
    w = rand(3, dtype=torch.complex128, seed=2)
    if compute is func.jacrev:
        with pytest.raises(lz.errors.UnsupportedError, match="columns"):
            compute(lambda x: x * w)(rand(3))
    else:
        equal(compute(lambda x: x * w)(rand(3)), torch.diag(w))


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "hessian"])
def test_results_are_differentiable(name):
    ours, theirs = getattr(func, name), getattr(torch.func, name)
    scale = torch.tensor(1.3, dtype=F64, requires_grad=True)
    x = rand(3).requires_grad_()

    def f(x):
        return (x.sin() * x.roll(1) * scale).cumsum(0)

    got, want = ours(f)(x), theirs(f)(x)
    equal(got, want)
    u = torch.randn_like(want)
    equal(torch.autograd.grad(got, (x, scale), u), torch.autograd.grad(want, (x, scale), u))
    with torch.no_grad():
        assert not ours(f)(x).requires_grad


def test_inside_transforms_of_pytorch():
    x = rand(5, 3)
    f = lambda x: x.sin() * x.sum()  # noqa: E731
    for name in ("jacrev", "jacfwd", "hessian"):
        ours, theirs = getattr(func, name), getattr(torch.func, name)
        equal(torch.func.vmap(ours(f))(x), torch.func.vmap(theirs(f))(x))
        equal(torch.func.jacrev(ours(f))(x[0]), torch.func.jacrev(theirs(f))(x[0]))


@pytest.mark.parametrize("argnums", [0, (0,), (0, 1)])
def test_hessian_of_scalars_and_of_trees(argnums):
    x, y = rand(2, 3), rand(4, seed=1)
    f = lambda x, y: (x.sin().sum(0) ** 2).sum() * y.prod() + y.exp().sum()  # noqa: E731
    equal(func.hessian(f, argnums)(x, y), torch.func.hessian(f, argnums)(x, y))
    equal(func.hessian(two, argnums)(x, y), torch.func.hessian(two, argnums)(x, y))
    p, s = {"w": rand(3, 4), "b": rand(2, seed=1)}, rand(4, seed=2)
    equal(func.hessian(tree, argnums)(p, s), torch.func.hessian(tree, argnums)(p, s))


def test_hessian_of_no_numbers():
    x = rand(3)

    def f(x):
        return {"none": x[:0] ** 2, "some": (x**3).sum()}

    expected = torch.func.hessian(f)(x)
    equal(func.hessian(f)(x), expected)
    equal(func.hessian(lambda x: f(x)["none"])(x), expected["none"])


def test_f_runs_once_and_is_not_looked_into():
    runs = 0

    def f(x):
        nonlocal runs
        runs += 1
        return Opaque.apply(x) * x.sum()

    x = rand(4)
    e = x.exp()
    want = torch.diag(e) * x.sum() + e[:, None]
    for compute in (func.jacrev(f), func.jacfwd(f), lambda x: functional.jacobian(f, x)):
        runs = 0
        equal(compute(x), want)
        assert runs == 1

    def g(x):
        nonlocal runs
        runs += 1
        assert x.sum().item() < 1e9  # no transform of PyTorch passes this
        return Square.apply(x).sum() ** 2

    q = (x * x).sum()
    want = 8 * torch.outer(x, x) + 4 * q * torch.eye(4, dtype=F64)
    for compute in (func.hessian(g), lambda x: functional.hessian(g, x)):
        runs = 0
        equal(compute(x), want)
        assert runs == 1
    runs = 0
    value, product = functional.hvp(g, x, torch.ones_like(x))
    equal(value, q * q)
    equal(product, want.sum(1))
    assert runs == 1


# -- torch.autograd.functional ------------------------------------------------------------

CASES = [
    (lambda x: x.sin() * x.sum(), rand(3)),
    (lambda x: x[:2].exp().sum(), rand(3)),
    (lambda x: torch.stack([x.sum()] * 5), rand(2)),
    (lambda x, y: x[:, None] * y.cos(), (rand(3), rand(2, seed=1))),
    (two, (rand(2, 3), rand(4, seed=1))),
    (lambda x: (x, x.sum()), rand(2)),
    (lambda x: x * 2, (rand(2),)),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("strategy", ["auto", "reverse-mode", "forward-mode"])
def test_jacobian_has_pytorchs_contract(case, vectorize, strategy):
    f, x = CASES[case]
    got = functional.jacobian(f, x, vectorize=vectorize, strategy=strategy)
    equal(got, taf.jacobian(f, x))


@pytest.mark.parametrize("strategy", ["auto", "reverse-mode", "forward-mode"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_hessian_has_pytorchs_contract(strategy, vectorize):
    for f, x in (
        (lambda x: x.sin().prod(), rand(3)),
        (lambda x: x.sin().prod()[None], rand(3)),
        (lambda x, y: (x.sin().sum() * y).prod(), (rand(2, 2), rand(3, seed=1))),
        (lambda x: x.exp().sum(), (rand(2),)),
        (lambda x, y: x.sum() + y.exp().sum(), (rand(2), rand(3))),
    ):
        got = functional.hessian(f, x, vectorize=vectorize, outer_jacobian_strategy=strategy)
        equal(got, taf.hessian(f, x))


def test_hvp_and_vhp_have_pytorchs_contract():
    f = lambda x, y: (x.sin().sum(0) * y).prod()  # noqa: E731
    x, v = (rand(2, 3), rand(3, seed=1)), (rand(2, 3, seed=2), rand(3, seed=3))
    equal(functional.hvp(f, x, v), taf.hvp(f, x, v))
    equal(functional.vhp(f, x, v), taf.vhp(f, x, v))
    equal(functional.hvp(torch.prod, v[1], v[1]), taf.hvp(torch.prod, v[1], v[1]))
    one = rand(1)
    equal(functional.hvp(lambda x: x[0].sin(), one), taf.hvp(lambda x: x[0].sin(), one))
    with pytest.raises(lz.errors.StructureError, match="left out"):
        functional.hvp(torch.sum, v[1])
    with pytest.raises(lz.errors.StructureError, match="one real number"):
        functional.hvp(torch.sin, v[1], v[1])
    with pytest.raises(lz.errors.SpaceError):
        functional.hvp(torch.sum, v[1], v[0])


def test_create_graph():
    x = rand(3).requires_grad_()
    f = lambda x: (x.sin() * x.prod()).cumsum(0)  # noqa: E731
    s = lambda x: f(x).sum()  # noqa: E731
    for name, g, more in (("jacobian", f, ()), ("hessian", s, ()), ("hvp", s, (rand(3, seed=1),))):
        ours, theirs = getattr(functional, name), getattr(taf, name)
        got, want = ours(g, x, *more), theirs(g, x, *more)
        equal(got, want)
        assert not any(t.requires_grad for t in torch.utils._pytree.tree_leaves(got))
        got, want = (h(g, x, *more, create_graph=True) for h in (ours, theirs))
        for a, b in zip(*(torch.utils._pytree.tree_leaves(t) for t in (got, want)), strict=True):
            u = torch.randn_like(b)
            equal(torch.autograd.grad(a, x, u), torch.autograd.grad(b, x, u, retain_graph=True))


def test_strict():
    x = rand(2)
    constant = lambda x: (x, torch.ones(1))  # noqa: E731
    equal(functional.jacobian(constant, x)[1], torch.zeros(1, 2))
    with pytest.raises(lz.errors.StructureError, match="strict"):
        functional.jacobian(constant, x, strict=True)
    with pytest.raises(lz.errors.StructureError, match="strict"):
        functional.hessian(torch.sum, x, strict=True)
    equal(functional.hessian(torch.sum, x), torch.zeros(2, 2, dtype=F64))


def test_wrong_options():
    x = rand(2)
    with pytest.raises(lz.errors.OptionError, match="strategy"):
        functional.jacobian(torch.sin, x, strategy="sideways")
    with pytest.raises(lz.errors.OptionError, match="chunk_size"):
        functional.jacobian(torch.sin, x, chunk_size=0)
    with pytest.raises(lz.errors.OptionError, match="chunk_size"):
        func.jacrev(torch.sin, chunk_size="all")
    for argnums in (1, -2, (0, 0), (0, -1)):
        with pytest.raises(lz.errors.OptionError, match="argnums"):
            func.jacrev(torch.sin, argnums)(x)
    with pytest.raises(lz.errors.StructureError):
        func.hessian(lambda x: x.long())(x)


def test_direction_without_a_derivative_is_not_taken():
    class BackwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            return torch.tensor(
                [
                    t * math.cos(a)
                    for t, a in zip(g.tolist(), ctx.saved_tensors[0].tolist(), strict=True)
                ]
            ).to(g)

    x = rand(2)
    A = rand(5, 2, seed=1)
    f = lambda x: A @ BackwardOnly.apply(x)  # noqa: E731
    want = A * x.cos()
    equal(functional.jacobian(f, x), want)
    equal(lz.Linearizer(f).at(x).jacobian.materialize(), want)
    with pytest.raises(lz.errors.MissingDerivativeError):
        functional.jacobian(f, x, strategy="forward-mode")
