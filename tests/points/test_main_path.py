"""One run, both products: structures, arguments, numbers and independence of the results."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import linearize as lz
from linearize.errors import IgnoredHookWarning
from tests.support.functions import rand

# `torch.func.jvp`, the reference here, compiles something when it is first called.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Field:
    """A user's own container, known to PyTorch's pytree."""

    level: torch.Tensor
    slope: torch.Tensor


pytree.register_dataclass(Field, serialized_type_name="linearize.tests.Field")


@pytest.fixture(autouse=True)
def random_state() -> Iterator[None]:
    """Seeding in a test must not reach the next one."""
    with torch.random.fork_rng(devices=[]):
        yield


def like(tree: Any, seed: int = 1) -> Any:
    """Random tensors structured like `tree`; None for what has no tangent."""
    g = torch.Generator().manual_seed(seed)

    def direction(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()):
            return torch.randn(x.shape, dtype=x.dtype, generator=g)
        return None

    return pytree.tree_map(direction, tree)


def tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def native(f: Callable[..., Any], primals: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Value, J·v and Jᵀ·u of differentiable tensors by `torch.func`, as flat lists."""
    leaves, spec = pytree.tree_flatten(primals)
    where = [i for i, x in enumerate(leaves) if like(x) is not None]

    def flat(*chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        full = list(leaves)
        for i, t in zip(where, chosen, strict=True):
            full[i] = t
        out = f(*pytree.tree_unflatten(full, spec))
        return tuple(t for t in tensors(out) if t.is_floating_point() or t.is_complex())

    at = tuple(leaves[i] for i in where)
    return (
        flat(*at),
        lambda v: torch.func.jvp(flat, at, tuple(v))[1],
        lambda u: torch.func.vjp(flat, *at)[1](tuple(u)),
    )


def check(f: Callable[..., Any], *primals: Any) -> lz.Linearization:
    """Compare value and products, called twice each, with `torch.func`; count the runs."""
    value, jvp, vjp = native(f, primals)
    runs = 0

    def counted(*args: Any) -> Any:
        nonlocal runs
        runs += 1
        return f(*args)

    here = lz.Linearizer(counted).at(*primals)
    v, u = like(primals), like(here.value, seed=2)
    for _ in range(2):
        close(here.value, value)
        close(here.jvp_fn(*v), jvp(tensors(v)))
        close(here.vjp_fn(u), vjp(tensors(u)))
    assert runs == 1
    return here


def close(got: Any, expected: Any) -> None:
    flat = tensors(got)
    expected = tensors(expected)
    flat = [t for t in flat if t.is_floating_point() or t.is_complex()]
    assert len(flat) == len(expected) > 0
    for a, b in zip(flat, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad


# -- structures ----------------------------------------------------------------------------


def test_readme_formula_by_hand() -> None:
    x, v, u = rand(3), rand(3, seed=1), rand(3, seed=2)
    here = lz.Linearizer(lambda x: torch.sin(x) * x.sum()).at(x)
    J = torch.diag(torch.cos(x) * x.sum()) + torch.outer(torch.sin(x), torch.ones_like(x))
    torch.testing.assert_close(here.value, torch.sin(x) * x.sum())
    torch.testing.assert_close(here.jvp_fn(v), J @ v)
    (back,) = here.vjp_fn(u)
    torch.testing.assert_close(back, J.T @ u)


STRUCTURES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "two primals": (lambda a, b: a.sin() * b, (rand(3), rand(3, seed=5))),
    "nested": (
        lambda t: [t["a"][0] * t["b"]["c"], {"z": t["a"][1].exp(), "y": (t["a"][0].sum(),)}],
        ({"a": [rand(2), rand(3, seed=3)], "b": {"c": rand(2, seed=4)}},),
    ),
    "namedtuple": (
        lambda p: Pair(p.left * p.right, p.left.sum()),
        (Pair(rand(3), rand(3, seed=7)),),
    ),
    "dataclass": (
        lambda p: Field(p.level * p.slope, p.slope.cos()),
        (Field(rand(3), rand(3, seed=8)),),
    ),
    "ordered dict": (
        lambda d: OrderedDict(b=d["b"] * 2, a=d["a"] * d["b"]),
        (OrderedDict(b=rand(2), a=rand(2, seed=9)),),
    ),
    "0-dim and empty": (
        lambda a, b: (a * 2 + b.sum(), b * a),
        (rand(), torch.empty(0, 3, dtype=torch.float64)),
    ),
    "single-element tuple": (lambda t: (t[0] ** 3,), ((rand(2),),)),
    "empty containers": (lambda a, e: {"e": [], "a": a.tanh(), "n": ()}, (rand(2), [])),
    "views in and out": (lambda a: a.t()[1:, ::2], (rand(4, 5).t(),)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name: str) -> None:
    f, primals = STRUCTURES[name]
    here = check(f, *primals)
    u, v = like(here.value), like(primals)
    assert pytree.tree_structure(here.value) == pytree.tree_structure(f(*primals))
    assert pytree.tree_structure(here.jvp_fn(*v)) == pytree.tree_structure(here.value)
    assert pytree.tree_structure(here.vjp_fn(u)) == pytree.tree_structure(primals)
    for a, b in zip(tensors(here.jvp_fn(*v)), tensors(here.value), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_fields_of_a_dataclass_may_be_none() -> None:
    """PyTorch leaves such fields out of the leaves; as a tangent they are zeros."""
    level, slope, v = rand(3), rand(3, seed=1), rand(3, seed=2)
    here = lz.Linearizer(lambda p: Field(p.level * p.slope, p.slope.cos())).at(Field(level, slope))
    u = rand(3, seed=3)
    for _ in range(4):
        pushed = here.jvp_fn(Field(v, None))  # type: ignore[arg-type]
        assert torch.allclose(pushed.level, v * slope)
        assert not pushed.slope.any()
        (pulled,) = here.vjp_fn(Field(None, u))  # type: ignore[arg-type]
        assert not pulled.level.any()
        assert torch.allclose(pulled.slope, -u * slope.sin())
    with pytest.raises(lz.errors.SpaceError, match=r"tangent\[0\]\.slope"):
        here.jvp_fn(Field(v, v[:2]))

    half = lz.Linearizer(lambda p: p.level**2).at(Field(level, None))  # type: ignore[arg-type]
    assert torch.allclose(half.jvp_fn(Field(v, None)), 2 * level * v)  # type: ignore[arg-type]
    with pytest.raises(lz.errors.StructureError, match=r"\.slope: expected None"):
        half.jvp_fn(Field(v, v))


def test_a_dataclass_that_is_not_registered_is_named() -> None:
    @dataclasses.dataclass
    class Unknown:
        x: torch.Tensor

    with pytest.raises(lz.errors.StructureError, match=r"register_dataclass\(Unknown\)"):
        lz.Linearizer(lambda p: p.x).at(Unknown(rand(2)))


def test_module_parameters_as_a_primal() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    model.double()
    x = rand(5, 3)
    params = dict(model.named_parameters())

    here = check(lambda p, x: functional_call(model, p, (x,)), params, x)
    back, _ = here.vjp_fn(torch.ones(5, 2, dtype=torch.float64))
    assert list(back) == list(params)
    model(x).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(back[name], p.grad)


def test_dict_tangents_match_by_key_not_by_position() -> None:
    here = lz.Linearizer(lambda d: {"p": d["a"] * 2, "q": d["b"] * 3}).at(
        {"a": rand(2), "b": rand(2)}
    )
    va, vb = rand(2, seed=1), rand(2, seed=2)
    out = here.jvp_fn({"b": vb, "a": va})
    torch.testing.assert_close(out, {"p": va * 2, "q": vb * 3})
    (back,) = here.vjp_fn({"q": vb, "p": va})
    torch.testing.assert_close(back, {"a": va * 2, "b": vb * 3})


def test_none_stands_for_zero_anywhere() -> None:
    def f(d: Any, y: torch.Tensor) -> Any:
        return {"p": d["a"] * d["b"][0] * y, "q": (d["b"][1] + y, y.sum())}

    d = {"a": rand(2), "b": [rand(2, seed=1), rand(2, seed=2)]}
    y = rand(2, seed=3)
    here = lz.Linearizer(f).at(d, y)
    va, zero = rand(2, seed=4), torch.zeros(2, dtype=torch.float64)
    full = here.jvp_fn({"a": va, "b": [zero, zero]}, zero)
    for sparse in ({"a": va, "b": None}, {"a": va, "b": [None, zero]}):
        torch.testing.assert_close(here.jvp_fn(sparse, None), full)
    torch.testing.assert_close(full["p"], va * d["b"][0] * y)
    assert not any(t.any() for t in tensors(here.jvp_fn(None, None)))

    u = rand(2, seed=5)
    full = here.vjp_fn({"p": u, "q": (zero, torch.zeros((), dtype=torch.float64))})
    torch.testing.assert_close(here.vjp_fn({"p": u, "q": None}), full)
    torch.testing.assert_close(here.vjp_fn({"p": u, "q": (None, None)}), full)
    back = here.vjp_fn(None)
    assert [t.shape for t in tensors(back)] == [(2,)] * 4
    assert not any(t.any() for t in tensors(back))


def test_leaves_without_tangents() -> None:
    def f(p: Any) -> Any:
        picked = p["x"][p["index"]] * p["power"]
        return {"y": picked if p["flag"] else -picked, "count": p["index"] + 1, "name": "y"}

    p = {"x": rand(4), "index": torch.tensor([2, 0]), "power": 3, "flag": True}
    here = lz.Linearizer(f).at(p)
    assert here.value["name"] == "y"
    assert here.value["count"].tolist() == [3, 1]
    v = rand(4, seed=1)
    out = here.jvp_fn({"x": v, "index": None, "power": None, "flag": None})
    torch.testing.assert_close(out["y"], 3 * v[[2, 0]])
    assert out["count"] is None
    assert out["name"] is None
    (back,) = here.vjp_fn({"y": torch.ones(2, dtype=torch.float64), "count": None, "name": None})
    assert back["x"].tolist() == [3, 0, 3, 0]
    assert back["index"] is None
    assert back["power"] is None


# -- arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argnums", "chosen"), [(0, [0]), (2, [2]), (-1, [2]), ((0, 2), [0, 2]), ([2, 0], [2, 0])]
)
def test_argnums(argnums: Any, chosen: list[int]) -> None:
    args = [rand(3, seed=i) for i in range(3)]

    def f(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return a * b + b * c**2

    slopes = [args[1], args[0] + args[2] ** 2, 2 * args[1] * args[2]]
    here = lz.Linearizer(f, argnums=argnums).at(*args)
    v = [rand(3, seed=10 + i) for i in chosen]
    expected = sum(slopes[i] * t for i, t in zip(chosen, v, strict=True))
    torch.testing.assert_close(here.jvp_fn(*v), expected)
    u = rand(3, seed=20)
    back = here.vjp_fn(u)
    assert isinstance(back, tuple)
    torch.testing.assert_close(back, tuple(slopes[i] * u for i in chosen))


def test_other_arguments_are_passed_through() -> None:
    seen: list[Any] = []

    def f(x: torch.Tensor, how: Any, *, weight: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        seen.append((how, scale))
        assert not weight.requires_grad
        return x * weight * scale

    x, w, token = rand(3), rand(3, seed=1), object()
    here = lz.Linearizer(f, argnums=0).at(x, token, weight=w, scale=2.0)
    assert seen == [(token, 2.0)]
    torch.testing.assert_close(here.jvp_fn(x), x * w * 2)
    back = here.vjp_fn(x)
    assert len(back) == 1


def test_aux_is_handed_out_detached() -> None:
    def f(x: torch.Tensor) -> Any:
        return x**2, {"norm": x.norm(), "note": "kept"}

    x = rand(3)
    here = lz.Linearizer(f, has_aux=True).at(x)
    torch.testing.assert_close(here.value, x**2)
    torch.testing.assert_close(here.aux["norm"], x.norm())
    assert here.aux["note"] == "kept"
    assert not here.aux["norm"].requires_grad
    torch.testing.assert_close(here.jvp_fn(x), 2 * x * x)
    assert lz.Linearizer(torch.sin).at(x).aux is None


def test_the_same_tensor_as_two_primals() -> None:
    x, v, u = rand(3), rand(3, seed=1), rand(3, seed=2)
    here = lz.Linearizer(lambda a, b: a.sin() * b).at(x, x)
    torch.testing.assert_close(here.jvp_fn(v, None), v * x.cos() * x)
    torch.testing.assert_close(here.jvp_fn(None, v), v * x.sin())
    torch.testing.assert_close(here.vjp_fn(u), (u * x.cos() * x, u * x.sin()))


def test_primals_that_require_grad_and_have_history() -> None:
    leaf = rand(3).requires_grad_()
    x = leaf * 2
    here = lz.Linearizer(torch.sin).at(x)
    torch.testing.assert_close(here.jvp_fn(torch.ones_like(x)), x.detach().cos())
    assert not here.value.requires_grad
    assert leaf.grad is None
    assert lz.Linearizer(torch.sin).at(torch.nn.Parameter(rand(3))).value.shape == (3,)


# -- one run per point -----------------------------------------------------------------------


def test_products_belong_to_the_dropout_mask_of_the_run() -> None:
    x = torch.ones(1000, dtype=torch.float64)
    here = lz.Linearizer(lambda x: F.dropout(x, 0.5)).at(x)
    mask = here.value  # at ones, the value is the mask times two
    assert 300 < int((mask > 0).sum()) < 700
    v = rand(1000)
    for _ in range(3):
        assert torch.equal(here.jvp_fn(v), v * mask)
        assert torch.equal(here.vjp_fn(v)[0], v * mask)


def test_batch_norm_statistics_move_once() -> None:
    bn, reference = (torch.nn.BatchNorm1d(3, dtype=torch.float64) for _ in range(2))
    x = rand(8, 3)
    reference(x)
    here = lz.Linearizer(bn).at(x)
    for _ in range(3):
        here.jvp_fn(x)
        here.vjp_fn(x)
    assert int(bn.num_batches_tracked) == 1
    torch.testing.assert_close(bn.running_mean, reference.running_mean)
    torch.testing.assert_close(bn.running_var, reference.running_var)
    _, expected = torch.func.jvp(lambda x: F.batch_norm(x, None, None, training=True), (x,), (x,))
    torch.testing.assert_close(here.jvp_fn(x), expected, atol=1e-4, rtol=1e-4)


def test_control_flow_on_numbers() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        steps = 0
        while x.norm().item() > 1.0:
            x = x * 0.5 if x[0] > 0 else x.sin()
            steps += 1
        return x * steps + float(x[0].detach())

    for sign in (1.0, -1.0):
        check(f, sign * torch.tensor([3.0, 1.0], dtype=torch.float64))


def test_the_random_state_sees_one_run_and_no_products() -> None:
    x = rand(4)

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rand(4, dtype=torch.float64)

    torch.manual_seed(3)
    expected = f(x)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    here = lz.Linearizer(f).at(x)
    here.jvp_fn(x)
    here.vjp_fn(x)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(here.value, expected)
    torch.testing.assert_close(here.jvp_fn(x), expected)


def test_first_product_first_or_second() -> None:
    """Neither product needs the other to have been called before."""
    x, v = rand(3), rand(3, seed=1)
    for order in ("jv", "vj"):
        here = lz.Linearizer(lambda x: x.sin().cumsum(0)).at(x)
        got = {}
        for which in order:
            got[which] = here.jvp_fn(v) if which == "j" else here.vjp_fn(v)[0]
        torch.testing.assert_close(got["j"], (v * x.cos()).cumsum(0))
        torch.testing.assert_close(got["v"], v.flip(0).cumsum(0).flip(0) * x.cos())


def test_a_checkpointed_block_is_not_run_by_later_products() -> None:
    from torch.utils.checkpoint import checkpoint

    blocks = 0

    def block(x: torch.Tensor) -> torch.Tensor:
        nonlocal blocks
        blocks += 1
        return x.sin().tanh()

    x = rand(3)
    here = lz.Linearizer(lambda x: checkpoint(block, x, use_reentrant=False) * 2).at(x)
    slope = 2 * x.cos() * (1 - x.sin().tanh() ** 2)
    torch.testing.assert_close(here.jvp_fn(x), slope * x)
    before = blocks
    for _ in range(3):
        torch.testing.assert_close(here.jvp_fn(x), slope * x)
        torch.testing.assert_close(here.vjp_fn(x)[0], slope * x)
    assert blocks == before


def test_gradient_hooks_of_f_are_no_part_of_its_derivative() -> None:
    """A hook changes gradients, not the function: both products are of the function's own J."""

    def f(x: torch.Tensor) -> torch.Tensor:
        h = x.sin()
        if h.requires_grad:
            h.register_hook(lambda g: 10 * g)
        return h * 2

    x = rand(3)
    ones = torch.ones(3, dtype=torch.float64)
    with pytest.warns(IgnoredHookWarning, match="SinBackward0"):
        here = lz.Linearizer(f).at(x)
    torch.testing.assert_close(here.vjp_fn(ones)[0], 2 * x.cos())
    torch.testing.assert_close(here.jvp_fn(ones), torch.func.jvp(f, (x,), (ones,))[1])


def test_outputs_that_do_not_depend_on_the_primals() -> None:
    w = torch.nn.Parameter(rand(2))

    def f(x: torch.Tensor, y: torch.Tensor) -> Any:
        return x * 2, torch.ones(3), w * 2, torch.arange(2), y.detach() * y

    x, y = rand(2), rand(2, seed=1)
    here = lz.Linearizer(f).at(x, y)
    out = here.jvp_fn(x, y)
    torch.testing.assert_close(out[0], 2 * x)
    assert out[1].dtype == torch.float32
    assert not out[1].any()
    assert not out[2].any()
    assert out[3] is None
    torch.testing.assert_close(out[4], y * y)
    back = here.vjp_fn((None, torch.ones(3), rand(2), None, None))
    assert not any(t.any() for t in back)

    with pytest.warns(lz.errors.IndependenceWarning, match="depends on no primal"):
        constant = lz.Linearizer(lambda x: torch.ones(3)).at(x)
    assert constant.jvp_fn(x).tolist() == [0, 0, 0]
    assert constant.vjp_fn(torch.ones(3))[0].tolist() == [0, 0]


# -- grad modes ------------------------------------------------------------------------------


def test_tangents_that_require_grad() -> None:
    x = rand(4)
    W = rand(3, 4, seed=1)
    here = lz.Linearizer(lambda x: torch.tanh(W @ x)).at(x)
    J = (1 - torch.tanh(W @ x)[:, None] ** 2) * W
    v = rand(4, seed=2).requires_grad_()
    u = rand(3, seed=3).requires_grad_()

    jv = here.jvp_fn(v)
    (grad,) = torch.autograd.grad(jv, v, u)
    torch.testing.assert_close(jv.detach(), J @ v.detach())
    torch.testing.assert_close(grad.detach(), J.T @ u.detach())
    torch.testing.assert_close(grad.detach(), here.vjp_fn(u.detach())[0])

    (jtu,) = here.vjp_fn(u)
    (grad,) = torch.autograd.grad(jtu, u, v.detach())
    torch.testing.assert_close(grad, J @ v.detach())

    # A quadratic form in v, twice: its Hessian is 2 JᵀJ.
    (first,) = torch.autograd.grad((here.jvp_fn(v) ** 2).sum(), v, create_graph=True)
    (second,) = torch.autograd.grad(first, v, v.detach())
    torch.testing.assert_close(second, 2 * J.T @ (J @ v.detach()))


def test_grad_reaches_only_the_tangents_that_require_it() -> None:
    x, y = rand(3), rand(3, seed=1)
    here = lz.Linearizer(lambda x, y: (x * y, x.sum())).at(x, y)
    v = rand(3, seed=2).requires_grad_()
    a, b = here.jvp_fn(v, y)
    (grad,) = torch.autograd.grad(a.sum() + 2 * b, v)
    torch.testing.assert_close(grad, y + 2)
    a, b = here.jvp_fn(None, v)
    (grad,) = torch.autograd.grad(a.sum(), v)
    torch.testing.assert_close(grad, x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_everything_works_without_grad(mode: Any) -> None:
    W = rand(3, 3)

    def f(x: torch.Tensor) -> torch.Tensor:
        return (W @ x).sin()

    x, v = rand(3, seed=1), rand(3, seed=2)
    jv = (W @ x).cos() * (W @ v)
    jtu = W.T @ ((W @ x).cos() * v)
    outside = lz.Linearizer(f).at(x)
    with mode():
        y = x.clone()  # in inference mode, an inference tensor
        t = v.clone()
        inside = lz.Linearizer(f).at(y)
        for here in (inside, outside):
            torch.testing.assert_close(here.value, f(x))
            torch.testing.assert_close(here.jvp_fn(t), jv)
            torch.testing.assert_close(here.vjp_fn(t)[0], jtu)
            assert not here.jvp_fn(t.requires_grad_(not t.is_inference())).requires_grad
            t = v.clone()
    # What was made inside works outside, also for inference tangents, and for grad.
    torch.testing.assert_close(inside.jvp_fn(t.detach()), jv)
    torch.testing.assert_close(inside.vjp_fn(t.detach())[0], jtu)
    w = v.clone().requires_grad_()
    (grad,) = torch.autograd.grad(inside.jvp_fn(w), w, v)
    torch.testing.assert_close(grad, jtu)


def test_an_inference_primal_is_not_changed_under_the_point() -> None:
    """Inference tensors have no version: the point must keep numbers of its own."""
    with torch.inference_mode():
        x = rand(3)
        here = lz.Linearizer(lambda x: x**2).at(x)
        before = x.clone()
        x.mul_(5)
        torch.testing.assert_close(here.value, before**2)
        torch.testing.assert_close(here.jvp_fn(torch.ones_like(x)), 2 * before)


def test_closed_over_inference_tensors() -> None:
    with torch.inference_mode():
        w = rand(3, seed=1)
        x = rand(3)
        here = lz.Linearizer(lambda x: x * w).at(x)
        torch.testing.assert_close(here.value, x * w)
        torch.testing.assert_close(here.jvp_fn(x), x * w)
        torch.testing.assert_close(here.vjp_fn(x)[0], x * w)


# -- numbers ---------------------------------------------------------------------------------

COMPLEX: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "holomorphic": lambda z: z.exp() * z,
    "conjugate": lambda z: z.conj() * z.sum(),
    "real output": lambda z: z.abs() ** 2,
    "real and imaginary": lambda z: torch.stack([z.real * z.imag, z.real]),
    "angle": lambda z: z.angle().sin(),
    "matrix": lambda z: torch.outer(z, z.conj()) @ z,
    "view": lambda z: torch.view_as_real(z) ** 2,
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_primals(name: str) -> None:
    f = COMPLEX[name]
    z = rand(3, dtype=torch.complex128)
    here = check(f, z)
    # Independently of PyTorch's formulas: differences along a real direction.
    v, h = rand(3, seed=4, dtype=torch.complex128), 1e-6
    difference = (f(z + h * v) - f(z - h * v)) / (2 * h)
    torch.testing.assert_close(here.jvp_fn(v), difference, atol=1e-7, rtol=1e-6)
    # The adjoint over the reals, PyTorch's convention for gradients.
    u = like(here.value)
    left = (u.conj() * here.jvp_fn(v)).real.sum()
    right = (here.vjp_fn(u)[0].conj() * v).real.sum()
    torch.testing.assert_close(left, right)


def test_real_primal_complex_output() -> None:
    x = rand(3)
    here = check(lambda x: torch.polar(x.abs(), x) * (1 + 2j), x)
    (back,) = here.vjp_fn(rand(3, dtype=torch.complex128))
    assert back.dtype == torch.float64
    assert here.jvp_fn(x).dtype == torch.complex128


def test_conjugate_views_as_arguments() -> None:
    z, v = (rand(3, seed=i, dtype=torch.complex128) for i in range(2))
    here = lz.Linearizer(lambda z: z**2).at(z.conj())
    torch.testing.assert_close(here.jvp_fn(v.conj()), 2 * z.conj() * v.conj())
    torch.testing.assert_close(here.vjp_fn(v.conj())[0], 2 * z * v.conj())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_of_each_leaf_is_kept(dtype: torch.dtype) -> None:
    x = rand(4).to(dtype)
    here = lz.Linearizer(lambda x: (x * 2, (x.double() * 3))).at(x)
    a, b = here.jvp_fn(x)
    assert (a.dtype, b.dtype) == (dtype, torch.float64)
    torch.testing.assert_close(b, x.double() * 3)
    (back,) = here.vjp_fn((x, torch.ones(4, dtype=torch.float64)))
    assert back.dtype == dtype
    torch.testing.assert_close(back, 2 * x + 3)


def test_autocast_inside_f() -> None:
    W, x = rand(4, 4, dtype=torch.float32), rand(4, seed=1, dtype=torch.float32)

    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x[None], W)[0].sin()

    here = lz.Linearizer(f).at(x)
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    u = torch.ones_like(y)
    (expected,) = torch.autograd.grad(y, leaf, u)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(here.vjp_fn(u)[0], expected)
    assert here.jvp_fn(x).dtype == torch.bfloat16
    exact = (W @ x).cos() * (W @ x)
    torch.testing.assert_close(here.jvp_fn(x).float(), exact, atol=0.05, rtol=0.05)


def test_sparse_gradients_are_gradients() -> None:
    """`embedding(sparse=True)` has a sparse gradient in PyTorch."""
    weight, index = rand(5, 3), torch.tensor([1, 1, 4])
    here = lz.Linearizer(lambda w: F.embedding(index, w, sparse=True)).at(weight)
    v, u = rand(5, 3, seed=1), rand(3, 3, seed=2)
    torch.testing.assert_close(here.jvp_fn(v), v[index])
    expected = torch.zeros(5, 3, dtype=torch.float64).index_add_(0, index, u)
    torch.testing.assert_close(here.vjp_fn(u)[0].to_dense(), expected)


def test_a_deep_graph() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(700):  # twice as many nodes as Python may nest calls
            x = x.sin() * 1.1 - 0.028
        return x

    check(f, rand(2))


# -- results share no memory -------------------------------------------------------------------

ALIASING: dict[str, tuple[Callable[..., Any], int]] = {
    "identity": (lambda x, y: (x, y), 2),
    "the same output twice": (lambda x, y: (x + y, x + y.view(2, 2).view(4)), 2),
    "one tensor twice": (lambda x, y: (lambda z: (z, z))(x * y), 2),
    "a view of a primal": (lambda x, y: (x.view(2, 2), y[1:]), 2),
    "an output and its view": (lambda x, y: (lambda z: (z, z.view(2, 2), z[::2]))(x.sin()), 2),
    "a sum with a reshaped primal": (lambda x, y: (x.reshape(2, 2) + y.reshape(2, 2)).sin(), 2),
    "a saved output": (lambda x, y: (x.exp(), y.tanh()), 2),
    "an expanded primal": (lambda x, y: (x.expand(3, 4), y.sum()), 2),
    "transposed": (lambda x, y: x.view(2, 2).t().contiguous() + y.view(2, 2), 2),
    "linear in both": (lambda x, y: [x - y, y * 1], 2),
}


@pytest.mark.parametrize("name", ALIASING)
def test_results_share_memory_with_nothing(name: str) -> None:
    f, count = ALIASING[name]
    primals = tuple(rand(4, seed=i) for i in range(count))
    here = check(f, *primals)
    value = [t.clone() for t in tensors(here.value)]

    def no_alias(results: list[torch.Tensor], arguments: list[torch.Tensor]) -> None:
        pointers = [t.untyped_storage().data_ptr() for t in results]
        assert len(set(pointers)) == len(pointers)
        others = {t.untyped_storage().data_ptr() for t in (*arguments, *primals)}
        assert not others & set(pointers)

    v, u = like(primals), like(here.value)
    for product, argument in ((lambda a: here.jvp_fn(*a), v), (here.vjp_fn, u)):
        given = [t.clone() for t in tensors(argument)]
        first = tensors(product(argument))
        no_alias(first, tensors(argument))
        kept = [t.clone() for t in first]
        for t in first:
            t.copy_(torch.full_like(t, 99.0))
        for a, b in zip(tensors(argument), given, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(tensors(product(argument)), kept, strict=True):
            torch.testing.assert_close(a, b)  # a later call may round differently
    for a, b in zip(tensors(here.value), value, strict=True):
        assert torch.equal(a, b)


def test_arguments_may_be_expanded_or_strided() -> None:
    x = rand(3, 4)
    here = lz.Linearizer(lambda x: x.view(12).sin().view(4, 3)).at(x)
    v = rand(4, 3, seed=1).t()
    torch.testing.assert_close(here.jvp_fn(v), (v * x.cos()).reshape(4, 3))
    one = torch.ones((), dtype=torch.float64).expand(4, 3)
    torch.testing.assert_close(here.vjp_fn(one)[0], x.cos())


# -- products under torch.func ---------------------------------------------------------------


def test_products_under_torch_func() -> None:
    """The products are linear maps: transforms of them are known in closed form."""
    x, v, w = (rand(3, seed=i) for i in range(3))
    here = lz.Linearizer(lambda x: x.sin() * x.sum()).at(x)
    J = torch.func.jacrev(lambda x: x.sin() * x.sum())(x)
    grad = torch.func.grad(lambda v: (here.jvp_fn(v) ** 2).sum())(v)
    torch.testing.assert_close(grad, 2 * J.T @ (J @ v))
    _, out = torch.func.jvp(here.jvp_fn, (v,), (w,))
    torch.testing.assert_close(out, J @ w)


@pytest.mark.parametrize("warm", [False, True])
def test_vmap_over_a_product(warm: bool) -> None:
    x = rand(3)

    def f(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * x.sum()

    J = torch.func.jacrev(f)(x)
    here = lz.Linearizer(f).at(x)
    if warm:
        here.jvp_fn(x)
        here.vjp_fn(x)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(here.jvp_fn)(eye).T, J)
    torch.testing.assert_close(torch.vmap(here.vjp_fn)(eye)[0], J)


# -- the objects -------------------------------------------------------------------------------


def test_programs_can_be_printed() -> None:
    W = rand(3, 4)
    here = lz.Linearizer(lambda x: (W @ x).tanh()).at(rand(4))
    text = str(here.program)
    assert "pushforward" in text
    assert "pullback" in text
    assert "float64[4]" in text
    assert "float64[3,4]" in text
    assert "bytes" in text


def test_objects_say_what_they_are() -> None:
    lin = lz.Linearizer(torch.sin)
    here = lin.at(rand(3))
    assert "sin" in repr(lin)
    assert "float64[3]" in repr(here)
    assert "jvp_fn" in repr(here.jvp_fn)
    here.close()
    assert "closed" in repr(here)
    assert "closed" in repr(here.jvp_fn)


@pytest.mark.parametrize("make", [lambda lin, h: lin, lambda lin, h: h, lambda lin, h: h.jvp_fn])
def test_objects_refuse_to_be_copied(make: Any) -> None:
    import copy

    lin = lz.Linearizer(torch.sin)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.copy(make(lin, lin.at(rand(3))))
