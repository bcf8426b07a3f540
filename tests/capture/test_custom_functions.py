"""Custom Functions that follow the contract: both products, by the Function's own methods."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import Function, gradcheck, gradgradcheck
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import linearize as lz
from tests.support.functions import F64, backward_only, direction, opaque, point, quadratic, slope
from tests.support.references import finite_difference, native_jvp, native_vjp

# Forward-mode AD, the reference here, compiles something when it is first called.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

close = torch.testing.assert_close


def check_both(f: Any, *primals: torch.Tensor, plain: Any = None, tol: float = 1e-7) -> None:
    """Compare both products, each asked for twice, with differences and native backward.

    `plain` is f without custom Functions, for those that PyTorch's engine gets wrong.
    """
    here = lz.Linearizer(f).at(*primals)
    value = f(*primals)
    close(here.value, value)
    many = not isinstance(value, torch.Tensor)
    tangents = [direction(x, seed=i + 1) for i, x in enumerate(primals)]
    values = value if many else [value]
    cotangents = [direction(y, seed=i + 11) for i, y in enumerate(values)]
    pulled = native_vjp(plain or f, primals, cotangents if many else cotangents[0])
    for _ in range(2):
        pushed = here.jvp_fn(*tangents)
        expected = finite_difference(f, primals, tangents)
        close(list(pushed) if many else [pushed], expected, rtol=tol, atol=tol)
        got = here.vjp_fn(type(value)(cotangents) if many else cotangents[0])
        for mine, native in zip(got, pulled, strict=True):
            close(mine, torch.zeros_like(mine) if native is None else native)


# -- the Function that reads numbers ----------------------------------------------------------


def test_numbers_are_read_in_every_method():
    Quadratic, calls = quadratic()
    x, a = point(), torch.tensor(1.5, dtype=F64)
    here = lz.Linearizer(lambda x, a: Quadratic.apply(x, a, 0.5, -1.0)).at(x, a)
    assert calls == {"forward": 1}
    close(here.value, 1.5 * x**2 + 0.5 * x - 1)
    for seed in range(5):
        dx, da, u = (
            direction(x, seed),
            torch.tensor(0.1 + seed, dtype=F64),
            direction(x, 50 + seed),
        )
        close(here.jvp_fn(dx, da), (3 * x + 0.5) * dx + x**2 * da)
        ux, ua = here.vjp_fn(u)
        close(ux, (3 * x + 0.5) * u)
        close(ua, (x**2 * u).sum())
    assert calls == {"forward": 1, "jvp": 5, "backward": 5}


def test_three_in_a_row_call_each_context_once():
    Quadratic, calls = quadratic()
    x, a = point(), torch.tensor(0.7, dtype=F64)

    def f(x, a):
        for b in (0.5, -1.0, 0.25):
            x = Quadratic.apply(torch.sin(x) + 0.1, a, b, 1.0)
        return x

    def plain(x, a):
        for b in (0.5, -1.0, 0.25):
            x = torch.sin(x) + 0.1
            x = a * x**2 + b * x + 1
        return x

    here = lz.Linearizer(f).at(x, a)
    v, u = (direction(x), direction(a)), direction(x, 2)
    expected, pulled = native_jvp(plain, (x, a), v), native_vjp(plain, (x, a), u)
    for k in range(1, 4):
        close(here.jvp_fn(*v), expected)
        close(list(here.vjp_fn(u)), pulled)
        assert calls == {"forward": 3, "jvp": 3 * k, "backward": 3 * k}


def test_many_uses_in_a_graph_with_branches():
    """The same Function at each step of a loop, results shared between branches."""
    Quadratic, calls = quadratic()

    def f(x, a, apply=lambda *args: Quadratic.apply(*args)):
        total = x.new_zeros(())
        h = x
        for k in range(20):
            h = apply(h / (1 + h.abs()), a, 0.1 * k, 0.0)
            total = total + (h * x).sum()
        return h, total, torch.outer(h, x)

    def plain(x, a):
        return f(x, a, lambda x, a, b, c: a * x**2 + b * x + c)

    x, a = point(4), torch.tensor(0.7, dtype=F64)
    here = lz.Linearizer(f).at(x, a)
    v = (direction(x), direction(a))
    u = tuple(direction(y, i) for i, y in enumerate(here.value))
    close(here.jvp_fn(*v), native_jvp(plain, (x, a), v))
    close(list(here.vjp_fn(u)), native_vjp(plain, (x, a), u))
    assert calls == {"forward": 20, "jvp": 20, "backward": 20}


class NumpyPower(Function):
    """x**n over NumPy, in the new style."""

    @staticmethod
    def forward(x, n):
        return torch.from_numpy(np.power(x.detach().numpy(), n))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.x, ctx.n = inputs[0].detach().numpy().copy(), inputs[1]

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.numpy() * ctx.n * np.power(ctx.x, ctx.n - 1)), None

    @staticmethod
    def jvp(ctx, dx, _):
        return torch.from_numpy(dx.numpy() * ctx.n * np.power(ctx.x, ctx.n - 1))


def test_numpy_in_the_new_style():
    check_both(lambda x: NumpyPower.apply(x.cos(), 3) + NumpyPower.apply(x, 2), point())


# -- what the methods receive -----------------------------------------------------------------


def describe(t: Any) -> Any:
    return None if t is None else (tuple(t.shape), t.dtype, bool(t.any()), t.requires_grad)


def recorder(style: str, materialize: bool) -> tuple[type[Function], dict[str, Any]]:
    """Return a Function that notes what its methods are given.

    Arguments: two float tensors of different shapes, a double one that never has a tangent,
    integers, a string, None. Results: three differentiable ones, of which one is not of the
    shape of an argument, and a string, a marked float, integers and None between them.
    """
    seen: dict[str, Any] = {}

    def run(x, y):
        outs = (x * 2, "text", (x.sum() + y.sum()).reshape(1), x.detach() / 2)
        return (*outs, torch.arange(4), y * 3, None)

    def fill(ctx, outs):
        ctx.set_materialize_grads(materialize)
        ctx.mark_non_differentiable(outs[3], outs[4])

    class Methods(Function):
        @staticmethod
        def backward(ctx, *grads):
            seen["backward"] = (*map(describe, grads), torch.is_grad_enabled())
            seen["needs"] = ctx.needs_input_grad
            return (None,) * 6

        @staticmethod
        def jvp(ctx, *tangents):
            seen["jvp"] = tuple(map(describe, tangents))
            dx, dy = (
                torch.zeros(n) if t is None else t
                for n, t in zip((3, 2), tangents[:2], strict=True)
            )
            return dx * 2, None, (dx.sum() + dy.sum()).reshape(1), None, None, dy * 3, None

    class Old(Methods):
        @staticmethod
        def forward(ctx, x, y, w, i, s, n):
            outs = run(x, y)
            fill(ctx, outs)
            return outs

    class New(Methods):
        @staticmethod
        def forward(x, y, w, i, s, n):
            return run(x, y)

        @staticmethod
        def setup_context(ctx, inputs, output):
            fill(ctx, output)

    return (Old if style == "old" else New), seen


@pytest.mark.parametrize("style", ["old", "new"])
@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("argnums", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("used", [(0,), (2,), (5,), (0, 2, 5), (5, 3)])
def test_methods_receive_what_pytorch_passes(style, materialize, argnums, used):
    Recorder, seen = recorder(style, materialize)
    w, i = torch.ones(2, 2, dtype=F64), torch.arange(5)
    primals = point(3, torch.float32), point(2, torch.float32)

    def f(x, y):
        outs = Recorder.apply(x, y, w, i, "static", None)
        return tuple(outs[k] for k in used)

    v = [torch.ones_like(x) if k in argnums else None for k, x in enumerate(primals)]
    native_jvp(f, primals, v)
    leaves = [x.clone().requires_grad_(k in argnums) for k, x in enumerate(primals)]
    outs = [y for y in f(*leaves) if y.requires_grad]
    native = {"jvp": seen["jvp"]}
    if outs:
        wanted = [x for x in leaves if x.requires_grad]
        torch.autograd.grad(outs, wanted, [torch.ones_like(y) for y in outs], allow_unused=True)
        native |= seen
    seen.clear()

    here = lz.Linearizer(f, argnums=argnums).at(*primals)
    assert not seen, "no method is called before a product asks for it"
    here.vjp_fn(tuple(torch.ones_like(y) for y in here.value))
    here.jvp_fn(*(v[k] for k in argnums))
    assert seen == native


def test_jvp_may_use_autograd():
    """Methods are called without grad mode, and can switch it on for themselves."""

    class Sine(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_forward(x)
            return x.sin()

        @staticmethod
        def jvp(ctx, dx):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                (slopes,) = torch.autograd.grad(x.sin().sum(), x)
            return slopes * dx

    x = point()
    v = direction(x)
    expected = native_jvp(Sine.apply, (x,), (v,))
    here = lz.Linearizer(Sine.apply).at(x)
    result = here.jvp_fn(v)
    close(result, expected)
    assert not result.requires_grad
    close(here.vjp_fn(v)[0], x.cos() * v)


# -- contexts ---------------------------------------------------------------------------------


class Saves(Function):
    """Keeps different tensors for the two directions, and a number on the context."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y.sin())
        ctx.save_for_forward(x.exp(), y, x)
        ctx.scale = 3.0
        return 3.0 * x.exp() * y.sin()

    @staticmethod
    def backward(ctx, g):
        x, sine = ctx.saved_tensors
        dy = (1 - sine**2).sqrt()  # 0 < y < π/2
        scaled = ctx.scale * g * x.exp()
        return scaled * sine, scaled * dy

    @staticmethod
    def jvp(ctx, dx, dy):
        e, y, x = ctx.saved_tensors
        assert len(ctx.saved_tensors) == 3
        assert torch.equal(e, x.exp())
        return ctx.scale * e * (dx * y.sin() + dy * y.cos())


def test_each_direction_gets_its_own_saved_tensors():
    # Twice each way: setting the one must not disturb the other.
    check_both(Saves.apply, point(seed=3), point(seed=4))


def test_saved_for_forward_do_not_outlive_their_owner():
    refs = []

    class Keep(Function):
        @staticmethod
        def forward(ctx, x):
            kept = x.detach().cos()
            refs.append(weakref.ref(kept.untyped_storage()))
            ctx.save_for_forward(kept)
            return x.sin()

        @staticmethod
        def jvp(ctx, dx):
            return ctx.saved_tensors[0] * dx

    here = lz.Linearizer(Keep.apply, maxsize=0).at(point())
    here.jvp_fn(direction(point()))
    jvp_fn = here.jvp_fn
    del here
    gc.collect()
    close(jvp_fn(torch.ones(6, dtype=F64)), point().cos())
    del jvp_fn
    gc.collect()
    assert refs[0]() is None


class Scaled(Function):
    """x · w, whose backward computes only what is needed."""

    asked: list[tuple[bool, ...]] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        Scaled.asked.append(ctx.needs_input_grad)
        x, w = ctx.saved_tensors
        return (g * w if ctx.needs_input_grad[0] else None), (
            g * x if ctx.needs_input_grad[1] else None
        )


@pytest.mark.parametrize("argnums", [(0,), (1,), (0, 1)])
def test_needs_input_grad(argnums):
    Scaled.asked.clear()
    x, w = point(seed=1), point(seed=2)
    here = lz.Linearizer(Scaled.apply, argnums=argnums).at(x, w)
    v = [direction(x, 5), direction(x, 6)]
    close(here.jvp_fn(*(v[k] for k in argnums)), sum(v[k] * (w, x)[k] for k in argnums))
    for k, got in zip(argnums, here.vjp_fn(v[0]), strict=True):
        close(got, v[0] * (w, x)[k])
    assert set(Scaled.asked) == {(0 in argnums, 1 in argnums)}


def test_parameter_that_is_no_primal():
    """An argument that requires grad but is closed over has a zero tangent."""
    w = torch.nn.Parameter(point(seed=2))
    x = point()
    here = lz.Linearizer(lambda x: Scaled.apply(x, w)).at(x)
    v = direction(x)
    close(here.jvp_fn(v), v * w.detach())
    close(here.vjp_fn(v)[0], v * w.detach())
    assert w.grad is None


def test_one_tensor_for_two_arguments():
    check_both(lambda x: Scaled.apply(x, x) + Scaled.apply(x, x.sin()), point())


def test_arguments_left_at_their_defaults():
    class Power(Function):
        @staticmethod
        def forward(x, n=2, bias=0.0):
            return x**n + bias

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])
            ctx.save_for_forward(inputs[0])
            ctx.n = inputs[1]

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * ctx.n * x ** (ctx.n - 1), None, None

        @staticmethod
        def jvp(ctx, dx, n, bias):
            assert n is None
            assert bias is None
            (x,) = ctx.saved_tensors
            return dx * ctx.n * x ** (ctx.n - 1)

    check_both(
        lambda x: Power.apply(x) + Power.apply(x, n=3) + Power.apply(x, 4, bias=1.0), point()
    )


def test_vjp_is_another_name_for_backward():
    calls = Counter()

    class Cube(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def vjp(ctx, g):
            calls["vjp"] += 1
            return 3 * ctx.saved_tensors[0] ** 2 * g

        @staticmethod
        def jvp(ctx, dx):
            calls["jvp"] += 1
            return 3 * ctx.saved_tensors[0] ** 2 * dx

    x = point()
    here = lz.Linearizer(Cube.apply).at(x)
    v = direction(x)
    close(here.jvp_fn(v), 3 * x**2 * v)
    close(here.vjp_fn(v)[0], 3 * x**2 * v)
    assert calls == {"vjp": 1, "jvp": 1}


class Double(Function):
    """Doubles its argument in place, opaque in both directions."""

    calls = Counter()  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        Double.calls["backward"] += 1
        return torch.from_numpy(2 * g.numpy())

    @staticmethod
    def jvp(ctx, dx):
        Double.calls["jvp"] += 1
        dx.numpy()[:] *= 2
        return dx


def test_in_place():
    def f(x):
        h = x.sin()
        Double.apply(h)
        return h * x

    Double.calls.clear()
    check_both(f, point())
    assert Double.calls["jvp"] == 2, "the own jvp, once for each product"


def test_in_place_on_a_view():
    """PyTorch hides such a context in a `CopySlices` node, whose jvp cannot be called."""

    def f(x):
        h = x.sin()
        Double.apply(h[1:4])
        return h * x

    x = point()
    here = lz.Linearizer(f).at(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf, x)
    close(here.vjp_fn(x)[0], expected)
    with pytest.raises(lz.errors.MissingDerivativeError, match="CopySlices"):
        here.jvp_fn(x)
    got = lz.Linearizer(f, opaque="materialize").at(x).jvp_fn(x)
    close([got], finite_difference(f, (x,), (x,)), rtol=1e-6, atol=1e-6)


def test_several_outputs_some_unused():
    class Three(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin(), x[:2].exp(), (x**2).sum()

        @staticmethod
        def backward(ctx, a, b, c):
            (x,) = ctx.saved_tensors
            g = a * x.cos() + 2 * c * x
            g[:2] += b * x[:2].exp()
            return g

    check_both(Three.apply, point())
    check_both(lambda x: Three.apply(x)[1], point())
    check_both(lambda x: Three.apply(x)[2] * x, point())
    check_both(lambda x: Three.apply(x)[0] * Three.apply(x.cos())[2], point())


class Pair(Function):
    """(x y, 3 x, Σ y²) with `set_materialize_grads(False)`."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)
        return x * y, 3 * x, (y * y).sum()

    @staticmethod
    def plain(x, y):
        return x * y, 3 * x, (y * y).sum()


def _pair_backward(ctx, a, b, c):
    x, y = ctx.saved_tensors
    gx, gy = torch.zeros_like(x), torch.zeros_like(y)
    if a is not None:
        gx, gy = gx + a * y, gy + a * x
    if b is not None:
        gx = gx + 3 * b
    if c is not None:
        gy = gy + 2 * c * y
    return gx, gy


def _pair_jvp(ctx, dx, dy):
    x, y = ctx.saved_tensors
    parts = [
        t
        for t in (None if dx is None else dx * y, None if dy is None else x * dy)
        if t is not None
    ]
    first = sum(parts) if parts else None
    return first, None if dx is None else 3 * dx, None if dy is None else 2 * (y * dy).sum()


PAIRS = {
    "both": {"backward": _pair_backward, "jvp": _pair_jvp},
    "backward": {"backward": _pair_backward},
    "jvp": {"jvp": _pair_jvp},
    "both opaque": {"backward": opaque(_pair_backward), "jvp": opaque(_pair_jvp)},
    "backward opaque": {"backward": opaque(_pair_backward)},
    "jvp opaque": {"jvp": opaque(_pair_jvp)},
}


@pytest.mark.parametrize("methods", PAIRS)
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("given", ["xy", "x", "y"])
def test_undefined_tangents_and_cotangents(methods, used, given):
    """Whatever methods there are: tangents and cotangents left out, outputs not used."""
    kept = {name: staticmethod(m) for name, m in PAIRS[methods].items()}
    Undefined = type("Undefined", (Pair,), kept)
    x, y = point(seed=1), point(seed=2)

    def f(x, y):
        outs = Undefined.apply(x, y)
        return [outs[k] for k in used]

    def plain(x, y):
        return [Pair.plain(x, y)[k] for k in used]

    here = lz.Linearizer(f, opaque="materialize").at(x, y)
    v = [direction(x) if "x" in given else None, direction(y, 2) if "y" in given else None]
    full = [torch.zeros_like(x) if t is None else t for t in v]
    expected = native_jvp(plain, (x, y), full)
    for _ in range(2):
        close(here.jvp_fn(*v), expected)
    u = [direction(t, 3 + k) for k, t in enumerate(here.value)]
    for k in range(len(used) + 1):
        some = [None if i == k and len(used) > 1 else t for i, t in enumerate(u)]
        zeros = [torch.zeros_like(t) if s is None else s for t, s in zip(u, some, strict=True)]
        pulled = native_vjp(plain, (x, y), zeros)
        for got, want in zip(here.vjp_fn(some), pulled, strict=True):
            close(got, torch.zeros_like(got) if want is None else want)


@pytest.mark.parametrize("methods", PAIRS)
def test_undefined_tangent_of_an_argument_that_is_constant(methods):
    """With `set_materialize_grads(False)` a jvp may return None where no tangent comes in."""
    kept = {name: staticmethod(m) for name, m in PAIRS[methods].items()}
    Undefined = type("Undefined", (Pair,), kept)
    x, y = point(seed=1), point(seed=2)
    here = lz.Linearizer(Undefined.apply, argnums=0, opaque="materialize").at(x, y)
    v = direction(x)
    close(here.jvp_fn(v), (v * y, 3 * v, torch.zeros((), dtype=F64)))
    u = (direction(x, 3), direction(x, 4), torch.tensor(2.0, dtype=F64))
    close(here.vjp_fn(u)[0], u[0] * y + 3 * u[1])


# -- only one direction given -----------------------------------------------------------------


def times(ctx, g):
    return g * slope(ctx.saved_tensors[0])


def slices_of_a_buffer(ctx, g):
    (x,) = ctx.saved_tensors
    out, scaled = torch.zeros_like(x), slope(x) * g
    out[:3] = scaled[:3]
    out[3:] += scaled[3:]
    return out


def buffer_of_another_shape(ctx, g):
    (x,) = ctx.saved_tensors
    out, scaled = torch.zeros(2, 3, dtype=F64), slope(x) * g
    out.view(-1)[::2] = scaled[::2]
    out.view(6)[1::2].add_(scaled[1::2])
    return out.view(-1)


def parts_set_to_zero(ctx, g):
    scaled = slope(ctx.saved_tensors[0]) * g
    head, tail = scaled.clone(), scaled.clone()
    head[3:] = 0
    tail[:3].zero_()
    return head + tail


def index_put(ctx, g):
    (x,) = ctx.saved_tensors
    order = torch.tensor([5, 3, 1, 0, 2, 4])
    return torch.zeros_like(x).index_put_((order,), (slope(x) * g)[order], accumulate=True)


def masks(ctx, g):
    (x,) = ctx.saved_tensors
    out, chosen, scaled = torch.zeros_like(x), x > 0.8, slope(x) * g
    out[chosen] = scaled[chosen]
    return out + scaled.masked_fill(chosen, 0)


def uninitialized(ctx, g):
    (x,) = ctx.saved_tensors
    out = torch.empty(x.shape, dtype=x.dtype)
    out.copy_(g)
    return out.mul_(slope(x))


def memory_that_holds_the_answer(ctx, g):
    """As may happen when an earlier call freed the memory that this one gets."""
    scaled = slope(ctx.saved_tensors[0]) * g
    out = torch.empty_like(g)
    out.numpy()[:] = scaled.numpy()
    out[:3] = scaled[:3]
    out[3:] = scaled[3:]
    return out


def out_argument(ctx, g):
    (x,) = ctx.saved_tensors
    out = torch.empty_like(x)
    torch.mul(g, slope(x), out=out)
    return out


def overwrites_its_cotangent(ctx, g):
    return g.mul_(slope(ctx.saved_tensors[0]))


def autograd_inside(ctx, g):
    with torch.enable_grad():
        x = ctx.saved_tensors[0].detach().requires_grad_()
        y = x * x.sin()
    return torch.autograd.grad(y, x, g)[0]


def engine_inside(ctx, g):
    with torch.enable_grad():
        x = ctx.saved_tensors[0].detach().requires_grad_()
        (x * x.sin()).backward(g)
    return x.grad


def functional_vjp_inside(ctx, g):
    return torch.func.vjp(lambda x: x * x.sin(), ctx.saved_tensors[0])[1](g)[0]


def loop(ctx, g):
    (x,) = ctx.saved_tensors
    out = torch.empty_like(x)
    for i, (gi, s) in enumerate(zip(g.unbind(), slope(x).tolist(), strict=True)):
        out[i] = gi * s
    return out


def matrix_product(ctx, g):
    return g @ torch.diag(slope(ctx.saved_tensors[0]))


def solve(ctx, g):
    return torch.linalg.solve(torch.diag(1 / slope(ctx.saved_tensors[0])), g)


def plain_data(ctx, g):
    return g.data * slope(ctx.saved_tensors[0])


def numpy_of_the_residual(ctx, g):
    return torch.from_numpy(slope(ctx.saved_tensors[0]).numpy().copy()) * g


def branch_on_zero(ctx, g):
    (x,) = ctx.saved_tensors
    return g * slope(x) if (g != 0).any() else torch.zeros_like(x)


def more_than_one_none(ctx, g):
    return g * slope(ctx.saved_tensors[0]), None, None


BACKWARDS = [
    times,
    slices_of_a_buffer,
    buffer_of_another_shape,
    parts_set_to_zero,
    index_put,
    masks,
    uninitialized,
    memory_that_holds_the_answer,
    out_argument,
    overwrites_its_cotangent,
    autograd_inside,
    engine_inside,
    functional_vjp_inside,
    loop,
    matrix_product,
    solve,
    plain_data,
    numpy_of_the_residual,
    branch_on_zero,
    more_than_one_none,
]


@pytest.mark.parametrize("once", [False, True], ids=["", "once_differentiable"])
@pytest.mark.parametrize("backward", BACKWARDS, ids=lambda b: b.__name__)
def test_only_backward(backward, once):
    method = once_differentiable(backward) if once else backward
    apply = backward_only(method).apply

    def f(x, function=apply):
        return function(x.cos()) + x * function(x)

    # The engine shares one cotangent between the two, which one of these overwrites.
    check_both(f, point(), plain=lambda x: f(x, lambda h: h * h.sin()))


@pytest.mark.parametrize("backward", [times, autograd_inside, uninitialized, loop])
@pytest.mark.parametrize("where", ["at", "products", "both"])
def test_inference_mode(backward, where):
    """Code in methods that needs autograd works although the caller is in inference mode."""
    F = backward_only(backward)
    x = point()
    v = direction(x)
    with torch.inference_mode(where != "products"):
        here = lz.Linearizer(lambda x: F.apply(x) * 2).at(x)
    with torch.inference_mode(where != "at"):
        u = v.clone()
        close(here.vjp_fn(u)[0], 2 * slope(x) * v)
        close(here.jvp_fn(u), 2 * slope(x) * v)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bfloat16]
)
def test_broadcast_results_are_summed(dtype):
    """The engine sums a gradient to the shape of its argument; so must the transposed map."""

    class Product(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            return g * b.conj(), g * a.conj()

    a, b = point(3, dtype)[:, None], point(4, dtype, seed=5)
    u, da, db = direction(a * b), direction(a, 2), direction(b, 3)
    here = lz.Linearizer(Product.apply).at(a, b)
    tol = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    close(here.jvp_fn(da, db), da * b + a * db, **tol)
    got = here.vjp_fn(u)
    close(got, ((u * b.conj()).sum(1, keepdim=True), (u * a.conj()).sum(0)), **tol)


def test_result_of_another_dtype():
    """A gradient of another dtype is cast, as the engine does."""

    class Widen(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.double() ** 2

        @staticmethod
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0].double() * g

    x = point(5, torch.float32)
    here = lz.Linearizer(lambda x: Widen.apply(x).sin()).at(x)
    v, u = direction(x), direction(x.double(), 2)
    slopes = 2 * x.double() * (x.double() ** 2).cos()
    pushed, (pulled,) = here.jvp_fn(v), here.vjp_fn(u)
    assert pushed.dtype == F64
    assert pulled.dtype == torch.float32
    close(pushed, slopes * v.double())
    close(pulled, (slopes * u).float())


class RealToComplex(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.exp(1j * x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (g * (1j * torch.exp(1j * x)).conj()).real


class ComplexToReal(Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.real**2 + z.imag**2

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class RealLinear(Function):
    """|z|² + i Re z, whose derivative is linear over the real numbers only."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z * z.conj() + 1j * z.real

    @staticmethod
    def backward(ctx, g):
        return 2 * g.real * ctx.saved_tensors[0] + g.imag


class OnlyJvpToReal(Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_forward(z)
        return z.real**2 + z.imag**2

    @staticmethod
    def jvp(ctx, dz):
        return 2 * (dz * ctx.saved_tensors[0].conj()).real


COMPLEX = {
    "real to complex": (RealToComplex, torch.float64, lambda x: torch.exp(1j * x)),
    "complex to real": (ComplexToReal, torch.complex128, lambda z: z.abs() ** 2),
    "real-linear": (RealLinear, torch.complex128, lambda z: z * z.conj() + 1j * z.real),
    "only jvp": (OnlyJvpToReal, torch.complex128, lambda z: z.abs() ** 2),
}


@pytest.mark.parametrize("hidden", [False, True], ids=["", "materialized"])
@pytest.mark.parametrize("name", COMPLEX)
def test_complex(name, hidden):
    F, dtype, plain = COMPLEX[name]
    if hidden:
        method = "jvp" if "jvp" in vars(F) else "backward"
        F = type("Hidden", (F,), {method: staticmethod(opaque(getattr(F, method)))})
    x = point(4, dtype)
    here = lz.Linearizer(F.apply, opaque="materialize" if hidden else "error").at(x)
    v, u = direction(x), direction(here.value, 2)
    for _ in range(2):
        close(here.jvp_fn(v), native_jvp(plain, (x,), (v,)))
        close(list(here.vjp_fn(u)), native_vjp(plain, (x,), u))


def jvp_times(ctx, dx):
    return slope(ctx.saved_tensors[0]) * dx


def jvp_in_place(ctx, dx):
    (x,) = ctx.saved_tensors
    out = torch.empty_like(x)
    out[:3] = dx[:3]
    out[3:] = dx[3:]
    return out.mul_(slope(x))


def jvp_overwrites(ctx, dx):
    return dx.mul_(slope(ctx.saved_tensors[0]))


def jvp_by_forward_mode(ctx, dx):
    return torch.func.jvp(lambda x: x * x.sin(), tuple(ctx.saved_tensors), (dx,))[1]


@pytest.mark.parametrize("jvp", [jvp_times, jvp_in_place, jvp_overwrites, jvp_by_forward_mode])
def test_only_jvp(jvp):
    class Forward(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_forward(x)
            return x * x.sin()

    F = type(jvp.__name__, (Forward,), {"jvp": staticmethod(jvp)})
    x = point()
    here = lz.Linearizer(lambda x: F.apply(x.cos()) * x).at(x)
    plain = backward_only(times)
    v, u = direction(x), direction(x, 2)
    for _ in range(2):
        close(
            here.jvp_fn(v), finite_difference(lambda x: x.cos() * x.cos().sin() * x, (x,), (v,))[0]
        )
        expected = native_vjp(lambda x: plain.apply(x.cos()) * x, (x,), u)
        close(list(here.vjp_fn(u)), expected)


# -- second derivatives -----------------------------------------------------------------------

CALLS: Counter[str] = Counter()


class Sin(Function):
    """A Function whose backward is itself a custom Function."""

    @staticmethod
    def forward(x):
        CALLS["Sin.forward"] += 1
        return torch.sin(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return SinBackward.apply(g, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, dx):
        return dx * ctx.saved_tensors[0].cos()


class SinBackward(Function):
    @staticmethod
    def forward(g, x):
        return g * x.cos()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, u):
        g, x = ctx.saved_tensors
        return u * x.cos(), -u * g * x.sin()

    @staticmethod
    def jvp(ctx, dg, dx):
        g, x = ctx.saved_tensors
        return dg * x.cos() - g * x.sin() * dx


def cubed(x, sine=Sin.apply):
    return (sine(x) ** 3).sum()


def gradient(x):
    """The gradient of `cubed` by autograd, for a tensor that takes part in a graph."""
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    return torch.autograd.grad(cubed(x), x, create_graph=True)[0]


@pytest.mark.parametrize("f", [torch.func.grad(cubed), gradient], ids=["torch.func", "autograd"])
def test_function_whose_backward_is_a_function(f):
    x = point()
    CALLS.clear()
    here = lz.Linearizer(f).at(x)
    runs = CALLS["Sin.forward"]
    v = direction(x)
    hessian = torch.autograd.functional.hessian(lambda x: cubed(x, torch.sin), x)
    for _ in range(2):
        close(here.jvp_fn(v), hessian @ v)
        close(here.vjp_fn(v)[0], hessian @ v)
    assert CALLS["Sin.forward"] == runs

    w = v.clone().requires_grad_()
    for product in (here.jvp_fn, lambda u: here.vjp_fn(u)[0]):
        assert gradcheck(product, (w,), check_forward_ad=True, nondet_tol=1e-12)
        assert gradgradcheck(product, (w,), nondet_tol=1e-12)


def test_differentiable_products():
    """The derivative of a product with respect to its direction is the other product."""
    Quadratic, calls = quadratic()
    x, a = point(4), torch.tensor(1.5, dtype=F64)
    here = lz.Linearizer(lambda x, a: Quadratic.apply(x.sin(), a, 0.5, 0.0)).at(x, a)
    v = direction(x).requires_grad_()
    u = direction(x, 2)
    (got,) = torch.autograd.grad(here.jvp_fn(v, None), v, u, create_graph=True)
    close(got, (3 * x.sin() + 0.5) * x.cos() * u)
    w = u.clone().requires_grad_()
    (got,) = torch.autograd.grad(here.vjp_fn(w)[0], w, u)
    close(got, (3 * x.sin() + 0.5) * x.cos() * u)
    assert calls["forward"] == 1
    assert gradcheck(
        here.jvp_fn, (v, torch.tensor(0.3, dtype=F64, requires_grad=True)), nondet_tol=1e-12
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_runs_once_more_for_all_that_is_inside(reentrant):
    runs = 0

    def block(h):
        nonlocal runs
        runs += 1
        for _ in range(3):
            h = Sin.apply(h * h).tanh()
        return h

    x = point()
    here = lz.Linearizer(lambda x: checkpoint(block, x, use_reentrant=reentrant)).at(x)
    assert runs == 1
    plain = lz.Linearizer(block).at(x)
    runs = 1
    v = direction(x)
    for _ in range(4):
        close(here.jvp_fn(v), plain.jvp_fn(v))
        close(here.vjp_fn(v)[0], plain.vjp_fn(v)[0])
    assert runs == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_checkpoint(reentrant):
    def f(x):
        return checkpoint(lambda h: Sin.apply(h * h) * h, x, use_reentrant=reentrant) + x

    x = point()
    here = lz.Linearizer(f).at(x)
    v = direction(x)
    slopes = 2 * x**2 * (x**2).cos() + (x**2).sin() + 1
    for _ in range(3):
        close(here.jvp_fn(v), slopes * v)
        close(here.vjp_fn(v)[0], slopes * v)
