"""Elements as vectors, against flattening by hand."""

import pytest
import torch

import linearize as lz
from tests.support.functions import rand
from tests.support.operator_contract import element, flat


def point():
    """Pytrees on both sides, with a leaf that has no tangent."""
    p = {"w": rand(3, 4), "n": 7, "b": rand(3, seed=1)}

    def f(p, s):
        h = torch.tanh(p["w"] @ s + p["b"])
        return {"h": h, "count": torch.tensor(3), "last": (h.sum(), s[:2])}

    return lz.Linearizer(f).at(p, rand(4, seed=2))


def spaces():
    here = point()
    return [here.in_space, here.out_space, here.jacobian.in_space, here.jacobian.out_space]


@pytest.mark.parametrize("which", range(4))
def test_a_vector_is_the_leaves_one_after_another(which):
    space = spaces()[which]
    v = rand(space.size, seed=3)
    tree = space.unravel(v)
    torch.testing.assert_close(flat(space, tree), v)
    assert torch.equal(space.ravel(tree), v)
    assert torch.equal(flat(space, element(space, v)), space.ravel(element(space, v)))
    # several
    V = rand(5, space.size, seed=4)
    trees = space.unravel(V)
    assert torch.equal(space.ravel(trees), V)
    for k in range(5):
        one = torch.utils._pytree.tree_map(lambda t: None if t is None else t[k], trees)  # noqa: B023
        assert torch.equal(space.ravel(one), V[k])
    # inside a transform
    assert torch.equal(torch.vmap(lambda v: space.ravel(space.unravel(v)))(V), V)


def test_vectors_have_gradients():
    space = point().in_space
    v = rand(space.size).requires_grad_()
    u = rand(space.size, seed=1)
    (g,) = torch.autograd.grad(space.ravel(space.unravel(v)) @ u, v)
    torch.testing.assert_close(g, u)
    V = rand(2, space.size).requires_grad_()
    (g,) = torch.autograd.grad((space.ravel(space.unravel(V)) @ u).sum(), V)
    torch.testing.assert_close(g, u.expand(2, -1))
    a, b = space.unravel(v), space.unravel(u)
    (g,) = torch.autograd.grad(space.dot(a, b), v)
    torch.testing.assert_close(g, u)
    (g,) = torch.autograd.grad(space.norm(space.unravel(v)), v)
    torch.testing.assert_close(g, (v / v.norm()).detach())


def test_inner_product_and_norm():
    for space in spaces():
        a, b = rand(space.size, seed=5), rand(space.size, seed=6)
        x, y = space.unravel(a), space.unravel(b)
        torch.testing.assert_close(space.dot(x, y), a @ b)
        torch.testing.assert_close(space.norm(x), a.norm())
        assert space.norm(space.zeros()) == 0
        assert space.dot(None, y) == 0
        torch.testing.assert_close(space.ravel(None), torch.zeros_like(a))


def test_complex_inner_product():
    z, w = rand(3, dtype=torch.complex128), rand(3, dtype=torch.complex128, seed=1)
    space = lz.Linearizer(torch.exp).at(z).jacobian.in_space
    torch.testing.assert_close(space.dot(z, w), (z.conj() * w).sum())
    torch.testing.assert_close(space.norm(z), z.abs().square().sum().sqrt())
    assert torch.equal(space.ravel(z.conj()), z.conj())


def test_random_elements_follow_the_generator():
    space = point().in_space
    first = space.ravel(space.random(torch.Generator().manual_seed(3)))
    again = space.ravel(space.random(torch.Generator().manual_seed(3)))
    assert torch.equal(first, again)
    state = torch.get_rng_state()
    space.random(torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(space.ravel(space.random()), space.ravel(space.random()))
    assert abs(float(space.ravel(space.random()).mean())) < 3


def test_the_space_of_one_primal_takes_it_alone():
    here = lz.Linearizer(torch.sin).at(rand(3))
    v = rand(3, seed=1)
    assert torch.equal(here.in_space.ravel(v), v)
    assert torch.equal(here.in_space.ravel((v,)), v)
    torch.testing.assert_close(
        here.jvp_fn(*here.in_space.unravel(v)), here.jacobian.out_space.unravel(here.jacobian @ v)
    )


def test_several_precisions():
    x, y = rand(2), rand(3, seed=1).float()
    space = lz.Linearizer(lambda x, y: x.sum() * y.double()).at(x, y).in_space
    v = space.ravel((x, y))
    assert v.dtype == torch.float64
    assert space.unravel(v)[1].dtype == torch.float32
    torch.testing.assert_close(space.dot((x, y), (x, y)), x @ x + (y @ y).double())
    torch.testing.assert_close(space.norm((x, y)), torch.cat([x, y.double()]).norm())


def test_what_does_not_fit_is_named():
    space = point().jacobian.in_space
    with pytest.raises(lz.errors.SpaceError, match=r"\['w'\].*\(3, 4\)"):
        space.ravel(({"w": rand(4, 3), "n": None, "b": None}, None))
    with pytest.raises(lz.errors.SpaceError, match=r"float64\[19\].*\(4,\)"):
        space.unravel(rand(4))
    with pytest.raises(lz.errors.SpaceError, match="float32"):
        space.unravel(rand(19).float())
    with pytest.raises(lz.errors.SpaceError, match="ndarray"):
        space.unravel(rand(19).numpy())
    with pytest.raises(lz.errors.SpaceError, match=r"\(2, 2, 19\)"):
        space.unravel(rand(2, 2, 19))
    with pytest.raises(lz.errors.SpaceError):  # two lengths
        space.ravel(({"w": rand(2, 3, 4), "n": None, "b": rand(5, 3)}, None))
    with pytest.raises(lz.errors.StructureError, match="keys"):
        space.ravel(({"w": rand(3, 4)}, None))
    mixed = lz.Linearizer(lambda x, z: x * z).at(rand(3), rand(3, dtype=torch.complex128)).in_space
    with pytest.raises(lz.errors.UnsupportedError, match="as_real"):
        mixed.ravel(mixed.zeros())


def test_a_solver_by_hand_needs_no_helper():
    """Levenberg–Marquardt with conjugate gradients on a dictionary."""
    t = torch.linspace(0, 1, 30, dtype=torch.float64)
    y = 2 * (-1.5 * t).exp() + 0.5

    def residual(p):
        return {"r": p["a"] * (-p["k"] * t).exp() + p["c"] - y}

    p = {"a": torch.ones((), dtype=torch.float64), "k": rand(), "c": rand(seed=1)}
    lin = lz.Linearizer(residual)
    for _ in range(25):
        here = lin.at(p)
        J, space = here.jacobian, here.jacobian.in_space
        A, b = J.gram().damped(1e-9), -(J.H @ here.out_space.ravel(here.value))
        x, r = torch.zeros_like(b), b
        d, size = r, r @ r
        for _ in range(6):
            if size < 1e-28:
                break
            Ad = A @ d
            step = size / (d @ Ad)
            x, r = x + step * d, r - step * Ad
            size, old = r @ r, size
            d = r + (size / old) * d
        p = space.unravel(space.ravel(p) + x)
    torch.testing.assert_close(p["k"].item(), 1.5, rtol=1e-6, atol=0)
    torch.testing.assert_close(p["c"].item(), 0.5, rtol=1e-6, atol=0)
