"""`linearize.func` against `torch.func`: the same calls, the same results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import linearize.func as lf
from linearize.errors import NotLinearError, SpaceError, StructureError
from tests.support.functions import rand

# `torch.func.jvp`, the reference here, compiles something when it is first called.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.fixture(autouse=True)
def random_state() -> Iterator[None]:
    """Seeding in a test must not reach the next one."""
    with torch.random.fork_rng(devices=[]):
        yield


def like(tree: Any, seed: int = 1) -> Any:
    g = torch.Generator().manual_seed(seed)
    return pytree.tree_map(lambda t: torch.randn(t.shape, dtype=t.dtype, generator=g), tree)


def same(got: Any, expected: Any) -> None:
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


W = rand(3, 4, seed=20)

FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "sin": (torch.sin, (rand(3),)),
    "two primals": (lambda x, y: x * y.exp(), (rand(3), rand(3, seed=2))),
    "matrix": (lambda x: torch.tanh(W @ x), (rand(4),)),
    "softmax": (lambda x: F.softmax(x, -1).log(), (rand(2, 4),)),
    "tuple out": (lambda x: (x.sum(), x.prod()), (rand(3),)),
    "dict out": (lambda x: {"a": x**2, "b": [x.cos()]}, (rand(3),)),
    "tree in": (lambda d: d["x"] * d["y"][0], ({"x": rand(2), "y": [rand(2, seed=1)]},)),
    "identity": (lambda x: x, (rand(3),)),
    "one of two is not used": (lambda x, y: x * 2, (rand(3), rand(2))),
    "constant output": (lambda x: (x * 2, torch.ones(2, dtype=torch.float64)), (rand(3),)),
    "in-place on a copy": (lambda x: x.clone().mul_(x).add_(1), (rand(3),)),
    "view and scatter": (lambda x: torch.zeros(5).double().index_add(0, IDX, x), (rand(3),)),
    "conv": (lambda x, k: F.conv1d(x, k, padding=1), (rand(1, 2, 6), rand(3, 2, 3, seed=4))),
    "layer norm": (lambda x: F.layer_norm(x, (4,)), (rand(3, 4),)),
    "linalg": (lambda A, b: torch.linalg.solve(A, b), (rand(3, 3) + 4 * torch.eye(3), rand(3))),
    "eigenvalues": (lambda A: torch.linalg.eigvalsh(A + A.mT), (rand(3, 3),)),
    "sort": (lambda x: x.sort().values.cumsum(0), (rand(5),)),
    "where": (lambda x: torch.where(x > 0, x**2, x.sin()), (rand(6),)),
    "complex": (lambda z: z.conj() * z.sum(), (rand(3, dtype=torch.complex128),)),
    "scalar": (lambda x: x**3, (rand(),)),
}
IDX = torch.tensor([0, 4, 4])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jvp_vjp_linearize(name: str) -> None:
    f, primals = FUNCTIONS[name]
    tangents = like(primals)
    expected = torch.func.jvp(f, primals, tangents)
    got = lf.jvp(f, primals, tangents)
    assert isinstance(got, tuple)
    same(got, expected)

    out, jvp_fn = lf.linearize(f, *primals)
    same(out, expected[0])
    for _ in range(2):
        same(jvp_fn(*tangents), expected[1])

    out, vjp_fn = lf.vjp(f, *primals)
    same(out, expected[0])
    u = like(out, seed=3)
    _, reference = torch.func.vjp(f, *primals)
    for _ in range(2):
        same(vjp_fn(u), reference(u))


def test_each_runs_the_function_once() -> None:
    runs = 0

    def f(x: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return x.sin()

    x = rand(3)
    lf.jvp(f, (x,), (x,))
    assert runs == 1
    _, jvp_fn = lf.linearize(f, x)
    _, vjp_fn = lf.vjp(f, x)
    for _ in range(3):
        jvp_fn(x)
        vjp_fn(x)
    assert runs == 3


def test_has_aux() -> None:
    def f(x: torch.Tensor) -> Any:
        return x.sin(), {"n": x.norm(), "k": torch.tensor(3)}

    x, v = rand(3), rand(3, seed=1)
    same(lf.jvp(f, (x,), (v,), has_aux=True), torch.func.jvp(f, (x,), (v,), has_aux=True))
    out, vjp_fn, aux = lf.vjp(f, x, has_aux=True)
    out2, vjp_fn2, aux2 = torch.func.vjp(f, x, has_aux=True)
    same((out, aux, vjp_fn(v)), (out2, aux2, vjp_fn2(v)))


def test_strict() -> None:
    def f(x: torch.Tensor) -> Any:
        return x, torch.ones(2, dtype=torch.float64)

    x = rand(3)
    same(lf.jvp(f, (x,), (x,)), torch.func.jvp(f, (x,), (x,)))
    for jvp in (lf.jvp, torch.func.jvp):
        with pytest.raises((RuntimeError, StructureError)):
            jvp(f, (x,), (x,), strict=True)
    same(lf.jvp(torch.sin, (x,), (x,), strict=True), torch.func.jvp(torch.sin, (x,), (x,)))


def test_integer_outputs() -> None:
    def f(x: torch.Tensor) -> Any:
        return x * 2, (x > 0), x.argmax()

    x = rand(3)
    same(lf.jvp(f, (x,), (x,)), torch.func.jvp(f, (x,), (x,)))
    out, jvp_fn = lf.linearize(f, x)
    same(out, f(x))
    same(jvp_fn(x), torch.func.jvp(f, (x,), (x,))[1])


def test_arguments_must_be_tuples_that_fit() -> None:
    x = rand(3)
    with pytest.raises(StructureError, match=r"must be tuples, got Tensor and Tensor"):
        lf.jvp(torch.sin, x, x)
    with pytest.raises(StructureError, match=r"expected 1 .*got 2"):
        lf.jvp(torch.sin, (x,), (x, x))
    with pytest.raises(SpaceError, match=r"tangent\[0\].*float64\[3\].*float64\[2\]"):
        lf.jvp(torch.sin, (x,), (x[:2],))
    _, vjp_fn = lf.vjp(torch.sin, x)
    with pytest.raises(SpaceError, match=r"cotangent"):
        vjp_fn(x[:2])


def test_plain_point_gives_plain_results() -> None:
    x = rand(3)
    out, jv = lf.jvp(torch.sin, (x,), (x,))
    assert not out.requires_grad
    assert not jv.requires_grad
    out, vjp_fn = lf.vjp(torch.sin, x)
    assert not out.requires_grad
    assert not vjp_fn(x)[0].requires_grad


# -- vmap over the closures, the usual way to a Jacobian -----------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_jacobians_by_vmap(requires_grad: bool) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(W @ x) * x.sum()

    x = rand(4).requires_grad_(requires_grad)
    J = torch.func.jacrev(f)(x.detach())
    _, vjp_fn = lf.vjp(f, x)
    (rows,) = torch.vmap(vjp_fn)(torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(rows.detach(), J)
    _, jvp_fn = lf.linearize(f, x)
    columns = torch.vmap(jvp_fn)(torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(columns.detach().T, J)
    # Under vmap the products are numbers without history, which autograd then says.
    assert not rows.requires_grad


# -- inside other transforms ---------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "vmap": torch.vmap,
    "grad": lambda g: torch.func.grad(lambda x: g(x).sum()),
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "vmap of grad": lambda g: torch.vmap(torch.func.grad(lambda x: g(x).sum())),
    "hessian": lambda g: torch.func.hessian(lambda x: g(x).sum()),
}


def curved(x: torch.Tensor) -> torch.Tensor:
    return x.sin() * x.sum()


def by_jvp(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: module.jvp(curved, (x,), (x * 2,))[1]


def by_vjp(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def g(x: torch.Tensor) -> torch.Tensor:
        out, vjp_fn = module.vjp(curved, x)
        return vjp_fn(out)[0]

    return g


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("use", [by_jvp, by_vjp])
def test_inside_torch_func(transform: str, use: Any) -> None:
    x = rand(2, 3) if "vmap" in transform else rand(3)
    apply = TRANSFORMS[transform]
    torch.testing.assert_close(apply(use(lf))(x), apply(use(torch.func))(x))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_linearize_inside_torch_func(transform: str) -> None:
    """`torch.func.linearize` fails inside some transforms; nothing may be wrong in any."""

    def g(x: torch.Tensor) -> torch.Tensor:
        out, jvp_fn = lf.linearize(curved, x)
        return jvp_fn(x) + out

    def reference(x: torch.Tensor) -> torch.Tensor:
        return sum(torch.func.jvp(curved, (x,), (x,)), torch.zeros(()).double())

    x = rand(2, 3) if "vmap" in transform else rand(3)
    apply = TRANSFORMS[transform]
    try:
        got = apply(g)(x)
    except RuntimeError:
        assert transform in ("vmap", "jacfwd", "hessian")
    else:
        torch.testing.assert_close(got, apply(reference)(x))


# -- nesting -------------------------------------------------------------------------------------


def derivative(module: Any, f: Callable[[Any], Any], how: str) -> Callable[[Any], Any]:
    """d f / d x of a scalar function of a scalar, forwards or backwards."""
    if how == "jvp":
        return lambda x: module.jvp(f, (x,), (torch.ones_like(x),))[1]
    if how == "linearize":
        return lambda x: module.linearize(f, x)[1](torch.ones_like(x))

    def backward(x: torch.Tensor) -> torch.Tensor:
        out, vjp_fn = module.vjp(f, x)
        return vjp_fn(torch.ones_like(out))[0]

    return backward


ORDERS = ["jvp jvp", "vjp vjp", "jvp vjp", "vjp jvp", "linearize vjp", "vjp linearize"]


@pytest.mark.parametrize("order", [*ORDERS, "jvp jvp jvp", "vjp vjp vjp", "vjp jvp linearize"])
def test_nested_derivatives_of_a_polynomial(order: str) -> None:
    f: Any = lambda x: x**5 + x**2  # noqa: E731
    x = torch.tensor(1.3, dtype=torch.float64)
    for how in order.split():
        f = derivative(lf, f, how)
    level = len(order.split())
    expected = {2: 20 * x**3 + 2, 3: 60 * x**2}[level]
    torch.testing.assert_close(f(x), expected)
    # The value of the inner closures belongs to the outer level too.
    torch.testing.assert_close(f(x + 1), {2: 20 * (x + 1) ** 3 + 2, 3: 60 * (x + 1) ** 2}[level])


@pytest.mark.parametrize(
    "orders", [("vjp", "jvp"), ("jvp", "vjp"), ("jvp", "jvp"), ("vjp", "vjp")]
)
def test_closed_over_tensors_of_an_outer_level(orders: tuple[str, str]) -> None:
    """d/dx [ x · d/dy (x y³) ] at y = x: perturbations must not be confused."""
    outer, inner = orders

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * derivative(lf, lambda y: x * y**3, inner)(x.detach() * 1.0)

    x = torch.tensor(1.7, dtype=torch.float64)
    # With y fixed at x: f = x · x · 3y², so that f' = 6 x y² = 6 x³.
    torch.testing.assert_close(derivative(lf, f, outer)(x), 6 * x**3)

    def g(x: torch.Tensor) -> torch.Tensor:
        return x * derivative(lf, lambda y: x * y**3, inner)(x)

    # With y = x moving too: g = 3 x⁴.
    torch.testing.assert_close(derivative(lf, g, outer)(x), 12 * x**3)


def test_the_classical_perturbation_confusion() -> None:
    """d/dx [x · d/dy (x + y)] is 1, not 2."""
    one = torch.tensor(1.0, dtype=torch.float64)
    for outer in ("jvp", "vjp", "linearize"):
        for inner in ("jvp", "vjp", "linearize"):
            f = lambda x, inner=inner: x * derivative(lf, lambda y: x + y, inner)(one)  # noqa: E731
            assert derivative(lf, f, outer)(one).item() == 1.0


def test_three_levels_with_something_closed_over_at_each() -> None:
    a, b, c = (rand(3, seed=i) for i in range(3))

    def use(module: Any) -> torch.Tensor:
        def first(x: torch.Tensor) -> torch.Tensor:
            def second(y: torch.Tensor) -> torch.Tensor:
                def third(z: torch.Tensor) -> torch.Tensor:
                    return (x * y * z * c).sin() * z

                _, jvp_fn = module.jvp(third, (y * b,), (x,))
                return jvp_fn * y

            out, vjp_fn = module.vjp(second, x * a)
            return vjp_fn(out * x)[0]

        return torch.stack(module.jvp(first, (rand(3, seed=5),), (rand(3, seed=6),)))

    torch.testing.assert_close(use(lf), use(torch.func))


def test_hessian_vector_products() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(W @ x).sum() * x.prod()

    def gradient(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: module.vjp(f, x)[1](torch.ones((), dtype=torch.float64))[0]

    x, v = rand(4), rand(4, seed=1)
    H = torch.func.hessian(f)(x)
    torch.testing.assert_close(lf.jvp(gradient(lf), (x,), (v,))[1], H @ v)
    _, jvp_fn = lf.linearize(gradient(lf), x)
    for i in range(3):
        torch.testing.assert_close(jvp_fn(rand(4, seed=i)), H @ rand(4, seed=i))
    torch.testing.assert_close(lf.vjp(gradient(lf), x)[1](v)[0], H @ v)
    # Mixed with torch.func and torch.autograd inside.
    torch.testing.assert_close(lf.linearize(torch.func.grad(f), x)[1](v), H @ v)
    torch.testing.assert_close(lf.jvp(gradient(torch.func), (x,), (v,))[1], H @ v)


# -- autograd through results ------------------------------------------------------------------


def gradients(outputs: Any, inputs: list[torch.Tensor], order: int) -> list[torch.Tensor]:
    """Derivatives of a weighted sum of the outputs, one after the other."""
    found = []
    y = sum(
        (t * rand(*t.shape, seed=40 + i)).sum() for i, t in enumerate(pytree.tree_leaves(outputs))
    )
    for k in range(order):
        grads = torch.autograd.grad(
            y, inputs, create_graph=k + 1 < order, allow_unused=True, materialize_grads=True
        )
        found.extend(grads)
        y = sum((g * rand(*g.shape, seed=50 + k + i)).sum() for i, g in enumerate(grads))
    return found


@pytest.mark.parametrize("which", ["jvp", "vjp", "linearize"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_results_are_differentiable_in_everything(which: str, order: int) -> None:
    """In the primal, the direction and a closed-over parameter, to third order."""

    def use(module: Any) -> list[torch.Tensor]:
        x = rand(3).requires_grad_()
        w = rand(3, seed=1).requires_grad_()
        v = rand(3, seed=2).requires_grad_()

        def f(x: torch.Tensor) -> torch.Tensor:
            return (x * w).sin() * x**2 * w.sum()

        if which == "jvp":
            results: Any = module.jvp(f, (x,), (v,))
        elif which == "vjp":
            out, vjp_fn = module.vjp(f, x)
            results = (out, vjp_fn(v))
        else:
            out, jvp_fn = module.linearize(f, x) if module is lf else (f(x), None)
            results = (out, jvp_fn(v) if jvp_fn else module.jvp(f, (x,), (v,))[1])
        return gradients(results, [x, w, v], order)

    for a, b in zip(use(lf), use(torch.func), strict=True):
        torch.testing.assert_close(a, b)


def test_backward_accumulates_into_parameters() -> None:
    def use(module: Any) -> Any:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        net.double()
        x = rand(5, 3)
        out, jv = module.jvp(net, (x,), (torch.ones_like(x),))
        ((out - jv) ** 2).mean().backward()
        return [p.grad for p in net.parameters()]

    for a, b in zip(use(lf), use(torch.func), strict=True):
        # The last bias moves the value only.
        torch.testing.assert_close(a, b)


def test_only_some_primals_require_grad() -> None:
    x, y = rand(3).requires_grad_(), rand(3, seed=1)
    out, vjp_fn = lf.vjp(lambda x, y: x**2 * y, x, y)
    gx, gy = vjp_fn(torch.ones(3, dtype=torch.float64))
    (a,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (b,) = torch.autograd.grad(gx.sum() + 2 * gy.sum(), x)
    torch.testing.assert_close(a, (2 * x * y).detach())
    torch.testing.assert_close(b, (2 * y + 4 * x).detach())


def test_closures_may_be_differentiated_again_and_again() -> None:
    x = rand(3).requires_grad_()
    _, vjp_fn = lf.vjp(lambda x: x**3, x)
    for i in range(3):
        u = rand(3, seed=i)
        (g,) = torch.autograd.grad(vjp_fn(u)[0].sum(), x)
        torch.testing.assert_close(g, (6 * x * u).detach())


def test_create_graph_of_vjp_fn() -> None:
    """`torch.func`'s closures take it; it says whether the result has a history."""
    x = rand(3).requires_grad_()
    _, vjp_fn = lf.vjp(lambda x: x**2, x)
    u = torch.ones(3, dtype=torch.float64)
    assert vjp_fn(u)[0].requires_grad
    assert not vjp_fn(u, create_graph=False)[0].requires_grad
    with torch.no_grad():
        assert not vjp_fn(u)[0].requires_grad


def test_under_no_grad() -> None:
    x = rand(3).requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out, vjp_fn = lf.vjp(torch.sin, x)
            torch.testing.assert_close(vjp_fn(torch.ones_like(x))[0], x.cos())
            out, jv = lf.jvp(torch.sin, (x,), (torch.ones_like(x),))
            torch.testing.assert_close(jv, x.cos())
            assert not out.requires_grad
            assert not jv.requires_grad


def test_old_style_functions_are_differentiable() -> None:
    """What `torch.func` refuses."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return 2 * ctx.saved_tensors[0] * g

    x, v = rand(3).requires_grad_(), rand(3, seed=1)
    out, jv = lf.jvp(Square.apply, (x,), (v,))
    torch.testing.assert_close(jv.detach(), (2 * x * v).detach())
    (g,) = torch.autograd.grad(jv.sum() + out.sum(), x)
    torch.testing.assert_close(g, (2 * v + 2 * x).detach())
    _, vjp_fn = lf.vjp(Square.apply, x)
    (g,) = torch.autograd.grad(vjp_fn(v)[0].sum(), x)
    torch.testing.assert_close(g, 2 * v)
    hessian = lf.jvp(lambda y: lf.vjp(Square.apply, y)[1](v)[0], (x.detach(),), (v,))[1]
    torch.testing.assert_close(hessian, 2 * v * v)


def test_forward_mode_from_outside() -> None:
    """Dual tensors of an open level of forward-mode AD keep their tangents."""
    from torch.autograd import forward_ad

    x, t = rand(3), rand(3, seed=1)
    with forward_ad.dual_level():
        out, vjp_fn = lf.vjp(torch.sin, forward_ad.make_dual(x, t))
        value, tangent = forward_ad.unpack_dual(vjp_fn(torch.ones_like(x))[0])
        torch.testing.assert_close(value, x.cos())
        torch.testing.assert_close(tangent, -x.sin() * t)
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, x.cos() * t)


# -- the transpose of a linear function --------------------------------------------------------

A = rand(3, 4, seed=30)
B = rand(3, 4, seed=31, dtype=torch.complex128)

LINEAR: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "matrix": (lambda x: A @ x, (rand(4),)),
    "sum of two": (lambda x, y: A @ x + 2 * y, (rand(4), rand(3))),
    "tree": (
        lambda d: {"s": d["a"].sum(), "t": (d["a"][1:] - d["b"],)},
        ({"a": rand(3), "b": rand(2)},),
    ),
    "fft": (lambda x: torch.fft.rfft(x), (rand(5),)),
    "complex matrix": (lambda x: B @ x, (rand(4, dtype=torch.complex128),)),
    "cumsum": (lambda x: x.cumsum(0).flip(0), (rand(4),)),
    "at zero": (lambda x: A @ x, (torch.zeros(4, dtype=torch.float64),)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_transpose(name: str) -> None:
    """⟨u, f(x)⟩ = ⟨fᵀ(u), x⟩, without conjugation."""
    f, primals = LINEAR[name]
    transposed = lf.linear_transpose(f, *primals)
    x = like(primals, seed=7)
    y = f(*x)
    for i in range(2):
        u = like(y, seed=8 + i)
        back = transposed(u)
        assert isinstance(back, tuple)
        assert pytree.tree_structure(back) == pytree.tree_structure(primals)

        def dot(a: Any, b: Any) -> torch.Tensor:
            leaves = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
            return sum(((p * q).sum() for p, q in leaves), torch.zeros(()).double())

        left, right = dot(u, y), dot(back, x)
        if name == "fft":  # from the reals to the complex numbers: the real part of it
            left, right = left.real, torch.as_tensor(right).real
        torch.testing.assert_close(left, right)


def test_linear_transpose_of_a_complex_matrix_is_not_conjugated() -> None:
    (back,) = lf.linear_transpose(lambda x: B @ x, rand(4, dtype=torch.complex128))(
        torch.ones(3, dtype=torch.complex128)
    )
    torch.testing.assert_close(back, B.T @ torch.ones(3, dtype=torch.complex128))


@pytest.mark.parametrize("at", ["random", "zero", "positive"])
@pytest.mark.parametrize(
    "f",
    [
        lambda x: x**2,
        lambda x: A @ x + 1,
        lambda x: x.sin(),
        torch.relu,
        lambda x: x.abs(),
        lambda x: x.norm(),
        lambda x: x.max(),
        lambda x: x.sort().values,
        lambda x: x.prod(),
    ],
    ids=["square", "affine", "sin", "relu", "abs", "norm", "max", "sort", "product"],
)
def test_what_is_not_linear_is_refused(f: Callable[..., Any], at: str) -> None:
    """Also where f(x) happens to be J·x: at zero, and for functions like relu everywhere."""
    x = rand(4)
    primal = {"random": x, "zero": torch.zeros_like(x), "positive": x.abs()}[at]
    with pytest.raises(NotLinearError):
        lf.linear_transpose(f, primal)
