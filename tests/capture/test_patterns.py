"""Ways to write functions: checkpoints, hooks, compiled and scripted parts, subclasses, layouts.

J·v is compared with finite differences, Jᵀ·u with PyTorch's engine, unless said otherwise.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import linearize as lz
from linearize.errors import IgnoredHookWarning, UnsupportedError
from tests.support.comparing import CALLS, Counted, close, compare
from tests.support.references import like

D, C = torch.float64, torch.complex128
# `torch.func.jvp`, a reference, compiles something when it is first called.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> torch.Tensor:
    wide = C if dtype.is_complex else D
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=wide, generator=generator).to(dtype)


# -- primals ------------------------------------------------------------------------------------


def mixing(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x.sum()).cumsum(-1) if x.dim() else x.sin() ** 2


# -- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", ["jvp", "vjp"])
def test_checkpoints(reentrant: bool, first: str) -> None:
    """Right, and each block runs once more for all products together."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    net = net.double()
    blocks = 0

    def block(x: torch.Tensor, i: int) -> torch.Tensor:
        nonlocal blocks
        blocks += 1
        return net[i + 1](net[i](x))

    def f(x: torch.Tensor) -> torch.Tensor:
        for i in (0, 2):
            x = checkpoint(block, x, i, use_reentrant=reentrant)
        return net[4](x).sin()

    x = rand(5, 4)
    plain = compare(lambda x: net(x).sin(), x)
    counted = Counted(f)
    here = lz.Linearizer(counted).at(x)
    assert blocks == 2
    (here.jvp_fn if first == "jvp" else here.vjp_fn)(rand(5, 4) if first == "jvp" else rand(5, 3))
    ran = blocks
    assert ran == 4  # once more for each block, not for each tensor that it had saved
    for call in range(CALLS):
        v, u = rand(5, 4, seed=call), rand(5, 3, seed=call)
        close(here.jvp_fn(v), plain.jvp_fn(v), 1e-10)
        close(here.vjp_fn(u), plain.vjp_fn(u), 1e-10)
    assert blocks == ran
    assert counted.runs == 1
    assert all(p.grad is None for p in net.parameters())


def test_reentrant_checkpoints_over_a_closure() -> None:
    """PyTorch's own backward of such a block does not know of `w`: its gradient is lost."""

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda h: (h * w).sin(), x, use_reentrant=True) * w

    compare(lambda x, w: (x * w).sin() * w, rand(3), rand(3, seed=1))
    x, w = rand(3), rand(3, seed=1)
    here, plain = (lz.Linearizer(g).at(x, w) for g in (f, lambda x, w: (x * w).sin() * w))
    for call in range(CALLS):
        v, u = like((x, w), call), rand(3, seed=call)
        close(here.jvp_fn(*v), plain.jvp_fn(*v), 1e-12)
        close(here.vjp_fn(u), plain.vjp_fn(u), 1e-12)
    # Outside, checkpoints are what they were.
    leaf = x.clone().requires_grad_()
    assert "CheckpointFunction" in f(leaf, w).grad_fn.next_functions[0][0].name()


def test_a_checkpoint_over_a_node_that_is_read_twice() -> None:
    """Its indices are unpacked by PyTorch's own formula, and once more to mend that."""
    indices = torch.tensor([[[[0, 3], [9, 12]]]])

    def block(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.max_unpool2d(x.sin(), indices, 2) * x.sum()

    x, u = rand(1, 1, 2, 2), rand(1, 1, 4, 4)
    here, plain = (
        lz.Linearizer(g).at(x)
        for g in (lambda x: checkpoint(block, x, use_reentrant=False), block)
    )
    for call in range(CALLS):
        v = rand(1, 1, 2, 2, seed=call)
        close(here.jvp_fn(v), plain.jvp_fn(v), 1e-12)
        close(here.vjp_fn(u), plain.vjp_fn(u), 1e-12)
    q = x.clone().requires_grad_()
    close(here.vjp_fn(u)[0], torch.autograd.grad(block(q), q, u)[0], 1e-12)


def test_checkpoints_draw_the_mask_of_the_run() -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    x = rand(5, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        plain = lz.Linearizer(net).at(x)
        torch.manual_seed(1)
        here = lz.Linearizer(lambda x: checkpoint(net, x, use_reentrant=False)).at(x)
        after = torch.get_rng_state()
        for call in range(CALLS):
            v, u = rand(5, 4, seed=call), rand(5, 3, seed=call)
            close(here.jvp_fn(v), plain.jvp_fn(v), 1e-12)
            close(here.vjp_fn(u), plain.vjp_fn(u), 1e-12)
        assert torch.equal(torch.get_rng_state(), after)


def test_nested_checkpoints_and_parameters() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).double()

    def f(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        def inner(x: torch.Tensor) -> torch.Tensor:
            return checkpoint_sequential(net, 2, x, use_reentrant=False).tanh()

        def outer(x: torch.Tensor) -> torch.Tensor:
            return checkpoint(inner, x, use_reentrant=False).sin()

        return torch.func.functional_call(
            _Calls(net, outer), {f"net.{k}": t for k, t in p.items()}, (x,)
        )

    compare(f, {k: p.detach() for k, p in net.named_parameters()}, rand(3, 4))


class _Calls(nn.Module):
    def __init__(self, net: nn.Module, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.net, self.fn = net, fn

    def forward(self, x: torch.Tensor) -> Any:
        return self.fn(x)


# -- hooks on saved tensors ---------------------------------------------------------------------


def layered(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x.exp()).cumsum(0).tanh() * x


def test_save_on_cpu_around_at() -> None:
    x = rand(5)
    expected = compare(layered, x)
    with save_on_cpu():
        here = compare(layered, x)
    for call in range(CALLS):
        v = rand(5, seed=call)
        close(here.jvp_fn(v), expected.jvp_fn(v), 1e-12)


@pytest.mark.parametrize("inside", [False, True])
def test_hooks_that_pack_and_unpack(inside: bool) -> None:
    """Each tensor is unpacked at most once per program; what they pack goes with the graph."""
    counts = {"pack": 0, "unpack": 0}
    alive: list[weakref.ref[Any]] = []

    class Packed:
        def __init__(self, t: torch.Tensor) -> None:
            self.data = t.detach().numpy().copy()

    def pack(t: torch.Tensor) -> Packed:
        counts["pack"] += 1
        packed = Packed(t)
        alive.append(weakref.ref(packed))
        return packed

    def unpack(p: Packed) -> torch.Tensor:
        counts["unpack"] += 1
        return torch.from_numpy(p.data)

    def f(x: torch.Tensor) -> torch.Tensor:
        if inside:
            with saved_tensors_hooks(pack, unpack):
                return layered(x)
        return layered(x)

    x = rand(5)
    if inside:
        here = lz.Linearizer(f).at(x)
    else:
        with saved_tensors_hooks(pack, unpack):
            here = lz.Linearizer(f).at(x)
    plain = lz.Linearizer(layered).at(x)
    for call in range(CALLS):
        v = rand(5, seed=call)
        close(here.jvp_fn(v), plain.jvp_fn(v), 1e-12)
        close(here.vjp_fn(v), plain.vjp_fn(v), 1e-12)
    assert counts["pack"] > 0
    assert counts["unpack"] <= counts["pack"]
    del here, plain
    assert not any(ref() for ref in alive)


def test_hooks_are_disabled_around_at() -> None:
    with disable_saved_tensors_hooks("no hooks here"):
        compare(layered, rand(5))


def test_hooks_that_quantize_give_what_pytorch_gives() -> None:
    """Lossy packing changes the derivative: both products are those of what was unpacked."""

    def pack(t: torch.Tensor) -> torch.Tensor:
        return t.to(torch.bfloat16)

    def unpack(t: torch.Tensor) -> torch.Tensor:
        return t.to(D)

    x = rand(6)
    with saved_tensors_hooks(pack, unpack):
        here = lz.Linearizer(layered).at(x)
        leaf = x.clone().requires_grad_()
        y = layered(leaf)
    basis = torch.eye(6, dtype=D)
    J = torch.stack([torch.autograd.grad(y, leaf, e, retain_graph=True)[0] for e in basis])
    exact = torch.func.jacrev(layered)(x)
    assert (J - exact).abs().max() > 1e-5
    for call in range(CALLS):
        v = rand(6, seed=call)
        close(here.vjp_fn(v), J.T @ v, 1e-12)
        close(here.jvp_fn(v), J @ v, 1e-12)


# -- hooks on gradients -------------------------------------------------------------------------


def test_tensor_hooks_are_no_part_of_the_derivative() -> None:
    """Hooks on tensors, on nodes, on accumulated gradients: none of them runs."""
    called = []

    def f(x: torch.Tensor) -> torch.Tensor:
        h = x.sin()
        if h.requires_grad:
            h.register_hook(lambda g: called.append("tensor") or 10 * g)
            h.grad_fn.register_hook(lambda gi, go: called.append("node") or gi)
            h.grad_fn.register_prehook(lambda go: called.append("prehook") or go)
            h.retain_grad()
            x.register_post_accumulate_grad_hook(lambda t: called.append("accumulate"))
        return h * 2

    x = rand(3)
    with pytest.warns(IgnoredHookWarning, match="SinBackward0"):
        here = lz.Linearizer(f).at(x)
    for call in range(CALLS):
        v = rand(3, seed=call)
        close(here.jvp_fn(v), 2 * x.cos() * v, 1e-12)
        close(here.vjp_fn(v), 2 * x.cos() * v, 1e-12)
    assert not called


def test_module_hooks() -> None:
    """Forward hooks are part of f. Backward hooks change gradients, and are not run."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    plain = compare(lambda x: net[2](2 * net[1](net[0](x + 1))), rand(3))
    called = []
    net.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    net[1].register_forward_hook(lambda m, args, out: 2 * out)
    net[1].register_full_backward_hook(
        lambda m, gi, go: called.append("full") or tuple(7 * g for g in gi)
    )
    net[0].register_full_backward_pre_hook(
        lambda m, go: called.append("pre") or tuple(7 * g for g in go)
    )
    with pytest.warns(IgnoredHookWarning, match="BackwardHookFunction"):
        here = lz.Linearizer(net).at(rand(3))
    for call in range(CALLS):
        v, u = rand(3, seed=call), rand(2, seed=call)
        close(here.jvp_fn(v), plain.jvp_fn(v), 1e-12)
        close(here.vjp_fn(u), plain.vjp_fn(u), 1e-12)
    assert not called


# -- compiled and scripted ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("warm", [False, True])
def test_compiled_functions_inside_f(backend: str, warm: bool) -> None:
    """They run as they were written, and so leave a graph."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    compiled, function = (torch.compile(f, backend=backend) for f in (net, layered))
    x = rand(5, 3)
    if warm:
        compiled(function(x))
    here = lz.Linearizer(Counted(lambda x: compiled(function(x)))).at(x)
    plain = compare(lambda x: net(layered(x)), x)
    for call in range(CALLS):
        v, u = rand(5, 3, seed=call), rand(5, 2, seed=call)
        close(here.jvp_fn(v), plain.jvp_fn(v), 1e-10)
        close(here.vjp_fn(u), plain.vjp_fn(u), 1e-10)


SCRIPT = pytest.mark.filterwarnings("ignore:`torch.jit")


@SCRIPT
def test_scripted_functions_inside_f() -> None:
    """A scripted function leaves a graph; its profiling runs must not change that."""

    def plain(x: torch.Tensor, n: int) -> torch.Tensor:
        for _ in range(n):
            x = x.sin() * 1.1 if bool(x.sum() > 0) else x.cos() * x
        return x

    scripted = torch.jit.script(plain)
    for _ in range(4):  # the executor specialises after some runs
        compare(lambda x: scripted(x, 3), rand(4))


@SCRIPT
def test_scripted_and_traced_modules() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = rand(5, 3)
    plain = compare(net, x)
    for module in (torch.jit.script(net), torch.jit.trace(net, (x,))):
        for _ in range(4):
            here = compare(module, x)
            v = rand(5, 3, seed=8)
            close(here.jvp_fn(v), plain.jvp_fn(v), 1e-10)


# -- subclasses and layouts ---------------------------------------------------------------------


class Tagged(torch.Tensor):
    """A subclass that changes nothing but the type: PyTorch's own operations see through it."""


class Logging(torch.Tensor):
    """A subclass that intercepts functions and hands them on."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Logging.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("kind", [Tagged, Logging, nn.Parameter, nn.Buffer])
def test_plain_subclasses(kind: Any) -> None:
    x = rand(3, 4)
    given = x.as_subclass(kind) if issubclass(kind, (Tagged, Logging)) else kind(x)
    plain = compare(mixing, x)
    here = lz.Linearizer(mixing).at(given)
    for call in range(CALLS):
        v = rand(3, 4, seed=call)
        for mine, theirs in (
            (here.jvp_fn(v), plain.jvp_fn(v)),
            (here.vjp_fn(v)[0], plain.vjp_fn(v)[0]),
        ):
            assert type(mine) is torch.Tensor
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", [Tagged, Logging, nn.Parameter, nn.Buffer])
def test_plain_subclasses_at_points_that_take_programs_over(kind: Any) -> None:
    lin = lz.Linearizer(mixing)
    for point in range(4):
        x = rand(3, 4, seed=point)
        given = x.as_subclass(kind) if issubclass(kind, (Tagged, Logging)) else kind(x)
        here, plain = lin.at(given), lz.Linearizer(mixing, simplify=False).at(x)
        for call in range(CALLS):
            v = rand(3, 4, seed=call)
            for mine, theirs in (
                (here.jvp_fn(v), plain.jvp_fn(v)),
                (here.vjp_fn(v)[0], plain.vjp_fn(v)[0]),
            ):
                assert type(mine) is torch.Tensor
                torch.testing.assert_close(mine, theirs)
        kept = [r.tensor for p in (here.jvp_fn, here.vjp_fn) for r in p.program.residuals()]
        assert {type(t) for t in kept} == {torch.Tensor}
    assert lin.stats().reused == 3


def test_subclasses_as_directions() -> None:
    here = compare(mixing, rand(3, 4))
    v = rand(3, 4, seed=4)
    for kind in (Tagged, Logging):
        for _ in range(CALLS):
            got = here.jvp_fn(v.as_subclass(kind))
            torch.testing.assert_close(got.as_subclass(torch.Tensor), here.jvp_fn(v))


def test_subclasses_that_dispatch_are_refused_by_name() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    two = TwoTensor(rand(3), rand(3))
    with pytest.raises(UnsupportedError, match="TwoTensor"):
        lz.Linearizer(torch.sin).at(two)
    with pytest.raises(UnsupportedError, match="TwoTensor"):
        lz.Linearizer(lambda x: TwoTensor(x, x)).at(rand(3))


def sparse(layout: torch.layout) -> torch.Tensor:
    dense = torch.eye(4, dtype=D)
    options = {"blocksize": (2, 2)} if layout in (torch.sparse_bsr, torch.sparse_bsc) else {}
    return dense.to_sparse(layout=layout, **options)


LAYOUTS = [
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
]


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sparse_layouts_are_refused_by_name(layout: torch.layout) -> None:
    name = str(layout).removeprefix("torch.")
    with pytest.raises(UnsupportedError, match=name):
        lz.Linearizer(lambda x: x).at(sparse(layout))
    with pytest.raises(UnsupportedError, match=name):
        lz.Linearizer(
            lambda x: x.to_sparse(layout=layout, **({"blocksize": (2, 2)} if "bs" in name else {}))
        ).at(rand(4, 4))


SPARSE_INSIDE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a constant in csr": lambda x: sparse(torch.sparse_csr) @ x,
    "a constant in coo": lambda x: sparse(torch.sparse_coo) @ x.sin(),
    "a transposed constant": lambda x: torch.sparse.mm(sparse(torch.sparse_coo).t(), x) * x,
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", SPARSE_INSIDE)
def test_sparse_constants_inside_f(name: str) -> None:
    compare(SPARSE_INSIDE[name], rand(4, 4))
