"""Contracts of `torch.func` and `torch.autograd.functional`, each run on both implementations.

What differs on purpose is in `test_differences`, and on the page on migrating.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import linearize.func as lf
from linearize import functional
from linearize.errors import LinearizeError

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated",
    "ignore::linearize.errors.IndependenceWarning",
    "ignore:Attempted to insert a get_attr Node",  # by torch.func.linearize
)

D = torch.float64
X = torch.tensor([0.4, -1.2, 0.9], dtype=D)
Y = torch.tensor([1.3, 0.2, -0.7], dtype=D)
V = torch.tensor([1.0, 0.5, -2.0], dtype=D)


def ours(call: Callable[..., Any]) -> Any:
    return call(lf, functional)


def theirs(call: Callable[..., Any]) -> Any:
    return call(torch.func, torch.autograd.functional)


def flat(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


def both(call: Callable[..., Any]) -> Any:
    """Compare what both return, leaf by leaf, with structure, dtype and shape."""
    got, want = ours(call), theirs(call)
    assert torch.utils._pytree.tree_structure(got) == torch.utils._pytree.tree_structure(want)
    for a, b in zip(flat(got), flat(want), strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b)
            assert a.requires_grad == b.requires_grad
        else:
            assert a == b
    return got


def both_raise(call: Callable[..., Any], kind: type[Exception] = RuntimeError) -> None:
    """Both raise, and code that catches what PyTorch raises catches ours too."""
    with pytest.raises(kind):
        theirs(call)
    with pytest.raises(LinearizeError) as caught:
        ours(call)
    assert isinstance(caught.value, kind)


# -- aux ------------------------------------------------------------------------------------


def aux_cases() -> dict[str, Callable[..., Any]]:
    return {
        "vjp": lambda F, f, x: (lambda r: (r[0], r[1](V)[0], r[2]))(F.vjp(f, x, has_aux=True)),
        "jvp": lambda F, f, x: F.jvp(f, (x,), (V,), has_aux=True),
        "jacrev": lambda F, f, x: F.jacrev(f, has_aux=True)(x),
        "jacfwd": lambda F, f, x: F.jacfwd(f, has_aux=True)(x),
    }


@pytest.mark.parametrize("by", ["w", "x", "both"])
@pytest.mark.parametrize("face", aux_cases())
def test_aux_keeps_its_history(face: str, by: str) -> None:
    call = aux_cases()[face]

    def use(F: Any, _: Any) -> Any:
        x = X.clone().requires_grad_(by != "w")
        w = Y.clone().requires_grad_(by != "x")

        def f(x: torch.Tensor) -> Any:
            return w * x.sin(), {"a": w * x**2, "n": torch.tensor(3), "d": (w * x).detach()}

        result = call(F, f, x)
        total = sum(t.sum() for t in flat(result) if t.is_floating_point())
        inputs = [t for t in (x, w) if t.requires_grad]
        return torch.autograd.grad(total, inputs), [t.requires_grad for t in flat(result)]

    got, want = ours(use), theirs(use)
    torch.testing.assert_close(got[0], want[0])
    assert got[1] == want[1]


def test_aux_is_any_tree() -> None:
    both(lambda F, _: F.vjp(lambda x: (x.sin(), [x, {"k": x > 0}]), X, has_aux=True)[2])
    both(lambda F, _: F.jvp(lambda x: (x.sin(), ()), (X,), (V,), has_aux=True)[2])
    both(lambda F, _: F.jacrev(lambda x: (x.sin(), (x * 2, x)), has_aux=True)(X))


def test_aux_of_higher_order() -> None:
    def use(F: Any, _: Any) -> Any:
        x = X.clone().requires_grad_()
        _, aux = F.jacrev(lambda x: (x**2, x**4), has_aux=True)(x)
        (g,) = torch.autograd.grad(aux.sum(), x, create_graph=True)
        return torch.autograd.grad(g.sum(), x)

    both(use)


# -- values, products, matrices ---------------------------------------------------------------


def test_results_require_grad_as_theirs() -> None:
    for x in (X, X.clone().requires_grad_()):
        both(lambda F, _, x=x: F.jvp(torch.sin, (x,), (V,)))
        both(lambda F, _, x=x: F.vjp(torch.sin, x)[0])
        both(lambda F, _, x=x: F.vjp(torch.sin, x)[1](V))
        both(
            lambda F, _, x=x: (
                F.linearize(torch.sin, x)[0] if F is lf else F.jvp(torch.sin, (x,), (V,))[0]
            )
        )
        both(lambda F, _, x=x: F.jacrev(torch.sin)(x))
        both(lambda F, _, x=x: F.jacfwd(torch.sin)(x))
        both(lambda F, _, x=x: F.hessian(lambda x: (x**3).sum())(x))


def test_argnums() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 2.0 * x * y.sin()

    for argnums in (0, 1, (0,), (1, 0), -1, (0, -1)):
        rows = both(lambda F, _, a=argnums: F.jacrev(f, argnums=a)(X, Y))
        if argnums in (-1, (0, -1)):  # PyTorch's forward mode takes -1 for no argument
            torch.testing.assert_close(lf.jacfwd(f, argnums=argnums)(X, Y), rows)
            continue
        both(lambda F, _, a=argnums: F.jacfwd(f, argnums=a)(X, Y))
        both(lambda F, _, a=argnums: F.hessian(lambda x, y: f(x, y).sum(), argnums=a)(X, Y))


@pytest.mark.parametrize("argnums", ["a", 1.5, (0, 1.0), (), 7, (0, 0), (0, -1), -2])
def test_argnums_that_do_not_fit(argnums: Any) -> None:
    for name in ("jacrev", "jacfwd", "hessian"):
        both_raise(lambda F, _, n=name: getattr(F, n)(lambda x: x.sum(), argnums)(X))
    with pytest.raises(LinearizeError, match="argnums"):
        lf.jacrev(torch.sin, argnums)(X)


def test_lengths_and_kinds_that_do_not_fit() -> None:
    calls: list[Callable[..., Any]] = [
        lambda F, _: F.jvp(torch.sin, (X,), (X, X)),
        lambda F, _: F.jvp(torch.mul, (X, X), (X,)),
        lambda F, _: F.jvp(torch.sin, [X], [X]),
        lambda F, _: F.jvp(torch.sin, X, X),
        lambda F, _: F.jvp(lambda: X, (), ()),
        lambda F, _: F.jvp(lambda x: x * X, (2.0,), (1.0,)),
        lambda F, _: F.jvp(torch.sin, (X,), (X[:2],)),
        lambda F, _: F.jvp(lambda x: 3, (X,), (V,)),
        lambda F, _: F.jvp(lambda x: (X, x, 3), (X,), (V,), has_aux=True),
        lambda F, _: F.vjp(torch.sin, X)[1](X[:2]),
        lambda F, _: F.vjp(lambda x: (x, x), X)[1](X),
        lambda F, _: F.vjp(lambda x: 3, X),
        lambda F, _: F.vjp(torch.sin, X, has_aux=True),
        lambda F, _: F.vjp(torch.sin, torch.arange(3)),
        lambda F, _: F.linearize(torch.sin, X)[1](X, X),
        lambda _, A: A.hvp(lambda x: x.sum(), X, (X, X)),
        lambda _, A: A.hvp(lambda x, y: (x * y).sum(), (X, X), (X,)),
        lambda _, A: A.hvp(lambda x: x.sum(), X),
        lambda _, A: A.hvp(torch.sin, X, V),
        lambda _, A: A.vhp(torch.sin, X, V),
        lambda _, A: A.hessian(torch.sin, X),
    ]
    for call in calls:
        both_raise(call)
    both_raise(lambda F, _: F.vjp(torch.sin, X)[1](X, X), TypeError)
    both_raise(lambda F, _: F.jvp(torch.sin, (torch.arange(3),), (X,)), Exception)
    both_raise(lambda F, _: F.jacrev(torch.sin, chunk_size=-1)(X), ValueError)


def test_hessians_of_complex_functions() -> None:
    z = torch.complex(X, Y)
    for f in (lambda z: (z * z).sum(), lambda z: z.prod()):
        both_raise(lambda F, _, f=f: F.hessian(f)(z))
        both_raise(lambda _, A, f=f: A.hessian(f, z))
        both_raise(lambda _, A, f=f: A.hvp(f, z, z))
        with pytest.raises(LinearizeError, match="complex"):
            lf.hessian(f)(z)
    with pytest.raises(LinearizeError, match="complex"):
        lf.hessian(lambda x: torch.complex(x, x).prod())(X)


def test_complex_products() -> None:
    z, u = torch.complex(X, Y), torch.complex(Y, V)
    both(lambda F, _: F.jvp(lambda z: z * z.abs(), (z,), (u,)))
    both(lambda F, _: F.vjp(lambda z: z * z.abs(), z)[1](u))
    both(lambda _, A: A.hvp(lambda z: (z * z.conj()).real.sum(), z, u))


def test_nested_transforms() -> None:
    f = lambda x: (x.sin() * x.sum()).cumsum(0)  # noqa: E731
    both(lambda F, _: F.jacfwd(F.jacrev(f))(X))
    both(lambda F, _: F.jacrev(F.jacfwd(f))(X))
    both(lambda F, _: torch.func.grad(lambda x: F.vjp(f, x)[1](V)[0].sum())(X))
    both(lambda F, _: torch.vmap(lambda v: F.jvp(f, (X,), (v,))[1])(torch.eye(3, dtype=D)))
    both(lambda F, _: torch.vmap(F.jacrev(f))(torch.stack([X, Y])))
    both(lambda F, _: F.jvp(lambda x: F.vjp(f, x)[1](V)[0], (X,), (Y,)))


# -- strict -----------------------------------------------------------------------------------

STRICT: dict[str, tuple[Callable[..., Any], Any]] = {
    "one of two inputs": (lambda a, b: 2 * a**2, (X, Y)),
    "one of two outputs": (lambda a: (a**2, torch.ones(2, dtype=D)), X),
    "an output of an input": (lambda a, b: (a * b, a**2), (X, Y)),
    "all": (lambda a, b: (a * b, a**2 + b), (X, Y)),
    "constant": (lambda a: torch.ones(2, dtype=D), X),
    "detached": (lambda a: a.detach() * 2, X),
    "linear": (lambda a: 2 * a, X),
    "half linear": (lambda a, b: a**2 + b, (X, Y)),
}


def outcome(call: Callable[..., Any], module: Any) -> str:
    try:
        call(SimpleNamespace(), module)
    except RuntimeError:
        return "refused"
    return "given"


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", STRICT)
def test_strict_jacobian(name: str, create_graph: bool) -> None:
    f, inputs = STRICT[name]
    leaves = inputs if isinstance(inputs, tuple) else (inputs,)
    given = tuple(t.clone().requires_grad_(create_graph) for t in leaves)
    arguments = given if isinstance(inputs, tuple) else given[0]

    def call(_: Any, A: Any) -> Any:
        return A.jacobian(f, arguments, create_graph=create_graph, strict=True)

    want = outcome(call, torch.autograd.functional)
    assert outcome(call, functional) == want
    if want == "refused":
        both_raise(call)
    else:
        both(call)


SCALARS: dict[str, tuple[Callable[..., Any], Any]] = {
    "one of two inputs": (lambda a, b: (a**2).sum(), (X, Y)),
    "apart": (lambda a, b: (a**2 + b**2).sum(), (X, Y)),
    "one linear": (lambda a, b: (a**2 + b).sum(), (X, Y)),
    "product": (lambda a, b: (a * b).sum(), (X, Y)),
    "all": (lambda a, b: (a * b).sum() ** 2, (X, Y)),
    "linear": (lambda a: a.sum(), X),
    "square": (lambda a: (a**2).sum(), X),
    "cube": (lambda a: (a**3).sum(), X),
    "constant": (lambda a: torch.ones((), dtype=D), X),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("which", ["hessian", "hvp", "vhp"])
@pytest.mark.parametrize("name", SCALARS)
def test_strict_second_derivatives(name: str, which: str, create_graph: bool) -> None:
    f, inputs = SCALARS[name]
    leaves = inputs if isinstance(inputs, tuple) else (inputs,)
    given = tuple(t.clone().requires_grad_(create_graph) for t in leaves)
    arguments = given if isinstance(inputs, tuple) else given[0]
    v = (V, Y) if isinstance(inputs, tuple) else V

    def call(_: Any, A: Any) -> Any:
        options = {"create_graph": create_graph, "strict": True}
        if which == "hessian":
            return A.hessian(f, arguments, **options)
        return getattr(A, which)(f, arguments, v, **options)

    want = outcome(call, torch.autograd.functional)
    assert outcome(call, functional) == want
    if want == "refused":
        both_raise(call)


def test_strict_jvp() -> None:
    both_raise(lambda F, _: F.jvp(lambda x: (x, torch.ones(2)), (X,), (V,), strict=True))
    both(lambda F, _: F.jvp(lambda x, y: x * 2, (X, Y), (V, V), strict=True))


# -- autograd.functional --------------------------------------------------------------------


def test_functional_results() -> None:
    f = lambda x, y: (x * y.sum(), y.sin())  # noqa: E731
    g = lambda x, y: (x * y).sum() ** 2  # noqa: E731
    both(lambda _, A: A.jacobian(f, (X, Y)))
    both(lambda _, A: A.jacobian(f, (X, Y), create_graph=False, vectorize=True))
    both(lambda _, A: A.jacobian(torch.sin, X, strategy="forward-mode", vectorize=True))
    both(lambda _, A: A.hessian(g, (X, Y)))
    both(lambda _, A: A.hvp(g, (X, Y), (V, X)))
    both(lambda _, A: A.vhp(g, (X, Y), (V, X)))
    both(lambda _, A: A.hvp(lambda x: x**3, X[:1], None))
    x = X.clone().requires_grad_()
    for create in (False, True):
        both(lambda _, A, c=create: A.jacobian(torch.sin, x, create_graph=c))
        both(lambda _, A, c=create: A.hessian(lambda x: (x**4).sum(), x, create_graph=c))
        both(lambda _, A, c=create: A.hvp(lambda x: (x**4).sum(), x, V, create_graph=c))


# -- what differs -----------------------------------------------------------------------------


def test_differences() -> None:
    """Each stands on the page on migrating."""
    # None for a zero tangent, integer leaves beside, any pytree as input of `functional`.
    with pytest.raises(RuntimeError):
        torch.func.jvp(torch.sin, (X,), (None,))
    assert not lf.jvp(torch.sin, (X,), (None,))[1].any()
    with pytest.raises(TypeError):
        torch.autograd.functional.jacobian(lambda d: d["a"], {"a": X})
    assert functional.jacobian(lambda d: d["a"], {"a": X})["a"].shape == (3, 3)
    # A tangent of another dtype.
    assert torch.func.jvp(torch.sin, (X,), (V.float(),))[1].dtype == D
    with pytest.raises(LinearizeError, match="float32"):
        lf.jvp(torch.sin, (X,), (V.float(),))
    # Integer outputs have no Jacobian.
    assert torch.func.jacfwd(lambda x: x.argmax())(X).tolist() == [0, 0, 0]
    with pytest.raises(RuntimeError):
        torch.func.jacrev(lambda x: x.argmax())(X)
    assert lf.jacfwd(lambda x: x.argmax())(X) is None
    assert lf.jacrev(lambda x: x.argmax())(X) is None
    # Positions as a list.
    with pytest.raises(RuntimeError):
        torch.func.jacrev(torch.sin, [0])(X)
    assert len(lf.jacrev(torch.sin, [0])(X)) == 1
    # Writes into what f closes over.
    kept = torch.zeros(3, dtype=D)
    with pytest.raises(RuntimeError):
        torch.func.vjp(lambda x: kept.add_(1) * x, X)
    torch.testing.assert_close(lf.vjp(lambda x: kept.add_(1) * x, X)[0], X)
    # strict with vectorize.
    with pytest.raises(RuntimeError):
        torch.autograd.functional.jacobian(torch.sin, X, strict=True, vectorize=True)
    assert functional.jacobian(torch.sin, X, strict=True, vectorize=True).shape == (3, 3)
