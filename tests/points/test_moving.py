"""What changes unseen, who asks at the wrong moment, and what dies where: never a wrong answer."""

from __future__ import annotations

import gc
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.hooks import RemovableHandle

import linearize as lz
from linearize import func
from linearize.errors import IgnoredHookWarning, StalenessError
from tests.support.functions import rand

D = torch.float64


# -- buffers that move without a version ---------------------------------------------------------


def normalized(norm: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    shape = (6, 3) if isinstance(norm, nn.BatchNorm1d) else (4, 3, 5)
    return nn.Sequential(norm.double().eval()), rand(*shape)


NORMS = [
    lambda: nn.BatchNorm1d(3),
    lambda: nn.BatchNorm1d(3, affine=False),
    lambda: nn.InstanceNorm1d(3, track_running_stats=True),
]


@pytest.mark.parametrize("make", NORMS)
@pytest.mark.parametrize("recorded", [False, True])
def test_running_statistics_that_moved_make_another_point(make: Any, recorded: bool) -> None:
    net, x = normalized(make())
    lin = lz.Linearizer(net)
    here, v, u = lin.at(x), torch.randn_like(x), torch.randn_like(x)
    before = here.value.clone()
    J = torch.func.vjp(net, x)[1](u)[0], torch.func.jvp(net, (x,), (v,))[1]
    if recorded:
        here.jvp_fn(v)
        here.vjp_fn(u)
    assert lin.at(x) is here
    net.train()
    net(torch.randn_like(x) * 5 + 2)
    net.eval()
    there = lin.at(x)
    assert there is not here
    torch.testing.assert_close(there.value, net(x))
    torch.testing.assert_close(here.value, before)
    now = torch.func.vjp(net, x)[1](u)[0], torch.func.jvp(net, (x,), (v,))[1]
    for _ in range(4):  # the point that is held is still that of its own run
        torch.testing.assert_close(here.vjp_fn(u)[0], J[0])
        torch.testing.assert_close(here.jvp_fn(v), J[1])
        torch.testing.assert_close(there.vjp_fn(u)[0], now[0])
        torch.testing.assert_close(there.jvp_fn(v), now[1])
    assert lin.at(x) is there


@pytest.mark.parametrize("recorded", [False, True])
def test_a_pullback_without_a_memo_sees_statistics_that_moved(recorded: bool) -> None:
    net, x = normalized(nn.BatchNorm1d(3))
    _, pullback = func.vjp(net, x)
    u = torch.randn_like(x)
    if recorded:
        pullback(u)
    net.train()
    net(torch.randn_like(x) * 5 + 2)
    with pytest.raises(StalenessError, match="running"):
        pullback(u)


def test_statistics_that_the_run_itself_moves_are_no_change() -> None:
    norm = nn.BatchNorm1d(3).double()
    lin = lz.Linearizer(norm)
    x = rand(6, 3)
    here = lin.at(x)
    assert lin.at(x) is here
    assert int(norm.num_batches_tracked) == 1
    expected = norm.running_mean.clone()
    torch.testing.assert_close(expected, 0.1 * x.mean(0))


# -- a dead primal -------------------------------------------------------------------------------


def test_a_new_tensor_with_the_id_of_a_dead_one_is_no_hit() -> None:
    """The primal dies while somebody holds the memo's lock, so that its entry is still there."""
    lin = lz.Linearizer(lambda x: x * 2)
    for i in range(20):
        x = torch.full((2,), float(i))
        old = id(x)
        lin.at(x)
        with lin._memo._lock:
            del x
        others = []
        for _ in range(1000):
            y = torch.full((2,), float(i + 100))
            if id(y) == old:
                break
            others.append(y)
        else:
            continue
        assert lin.at(y).value.tolist() == [2.0 * (i + 100)] * 2


def test_threads_whose_primals_die_never_get_each_others_points() -> None:
    lin = lz.Linearizer(lambda x: x * 2)
    wrong: list[Any] = []

    def work(k: int) -> None:
        for i in range(150):
            x = torch.full((1,), float(1000 * k + i))
            if lin.at(x).value.item() != 2 * x.item():
                wrong.append(i)
            del x

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


# -- interrupts ----------------------------------------------------------------------------------


class Interrupt(BaseException):
    pass


def interrupted(call: Any, moment: int) -> bool:
    """Call, and raise at a line of the package; whether it came to that."""
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith("linearizer.py"):
            return None
        if event == "line":
            count += 1
            if count == moment:
                sys.settrace(None)
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_line_leaves_nobody_waiting() -> None:
    x = torch.ones(2)
    moment, hits = 0, 0
    while True:
        moment += 1
        lin = lz.Linearizer(torch.sin)
        if not interrupted(lambda lin=lin: lin.at(x), moment):
            break
        hits += 1
        assert not lin._running, f"after an interrupt at line {moment} of the call"
        done: list[Any] = []
        thread = threading.Thread(
            target=lambda lin=lin, done=done: done.append(lin.at(x)), daemon=True
        )
        thread.start()
        thread.join(5.0)
        assert done
    assert hits > 20


# -- finalizers ----------------------------------------------------------------------------------


@pytest.fixture
def unraisable() -> Iterator[list[str]]:
    seen: list[str] = []
    old, sys.unraisablehook = sys.unraisablehook, lambda u: seen.append(repr(u.exc_value))
    yield seen
    sys.unraisablehook = old


def half_dead() -> list[Any]:
    """A point that took its programs over, one of whose products dies with the list."""
    w = rand(4, 4)
    lin = lz.Linearizer(lambda x: (w @ x).tanh() * x.sin())
    for i in range(2):
        here = lin.at(rand(4, seed=i))
        kept = here.vjp_fn
        for _ in range(4):
            kept(rand(4))
    return [here]


def test_points_may_die_anywhere(unraisable: list[str]) -> None:
    def under_grad(box: list[Any]) -> None:
        torch.func.grad(lambda y: (box.clear(), gc.collect(), y.sin().sum())[-1])(torch.ones(3))

    def under_vmap(box: list[Any]) -> None:
        torch.vmap(lambda y: (box.clear(), gc.collect(), y.sin())[-1])(torch.ones(3))

    def under_fake(box: list[Any]) -> None:
        with FakeTensorMode():
            box.clear()
            gc.collect()

    def under_make_fx(box: list[Any]) -> None:
        graph = make_fx(lambda y: (box.clear(), gc.collect(), y.sin())[-1])(torch.ones(3))
        assert [n.op for n in graph.graph.nodes] == ["placeholder", "call_function", "output"]

    def under_inference(box: list[Any]) -> None:
        with torch.inference_mode():
            box.clear()
            gc.collect()

    for where in (under_grad, under_vmap, under_fake, under_make_fx, under_inference):
        where(half_dead())
        assert not unraisable, (where.__name__, unraisable)


# -- user code that writes during a product ------------------------------------------------------


class Spoils(torch.autograd.Function):
    """Its backward uses what it saved, which is another node's constant too, as a workspace."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(shared)
        return x * 3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (shared,) = ctx.saved_tensors
        shared.zero_()
        return g * 3, None

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor, _: Any) -> torch.Tensor:
        return v * 3


def test_memory_that_a_backward_spoils_for_a_later_step() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        shared = torch.full((2,), 2.0, dtype=D)
        return Spoils.apply(x * shared, shared)

    x = torch.ones(2, dtype=D)
    here = lz.Linearizer(f, check="never").at(x)
    with pytest.raises(StalenessError):
        here.vjp_fn(x)


def test_memory_that_a_backward_uses_last_is_its_own_affair() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        shared = torch.full((2,), 2.0, dtype=D)
        return Spoils.apply(x, shared) * shared

    x = torch.ones(2, dtype=D)
    assert lz.Linearizer(f, check="never").at(x).vjp_fn(x)[0].tolist() == [6, 6]


class KeepsOutput(torch.autograd.Function):
    """y = exp(x), kept as an attribute."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, how: str) -> torch.Tensor:
        y = x.exp()
        ctx.kept = {"output": y, "view": y.view(-1), "list": [y]}[how]
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        kept = ctx.kept[0] if isinstance(ctx.kept, list) else ctx.kept
        return g * kept.detach(), None


@pytest.mark.parametrize("how", ["output", "view", "list"])
def test_an_attribute_of_a_context_that_f_changes_later(how: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = KeepsOutput.apply(x, how)
        with torch.no_grad():
            y.detach().mul_(100.0)
        return y * 1.0

    x = torch.zeros(2, dtype=D)
    here = lz.Linearizer(f).at(x)
    for product in (here.vjp_fn, here.jvp_fn):
        with pytest.raises(StalenessError):
            product(torch.ones_like(x))


# -- what callers may edit -----------------------------------------------------------------------


def test_what_a_caller_edits_is_not_handed_to_the_next() -> None:
    lin = lz.Linearizer(
        lambda x: ({"a": x * 2, "b": [x]}, {"log": [x.sum() * 1.0], "n": 3}), has_aux=True
    )
    x = rand(2)
    here = lin.at(x)
    here.value["b"].append(None)
    here.value["c"] = 1
    here.aux["log"].clear()
    assert set(lin.at(x).value) == {"a", "b"}
    assert len(lin.at(x).value["b"]) == 1
    assert lin.at(x).aux["log"][0].item() == x.sum().item()
    assert lin.at(x) is here
    here.aux["log"][0].zero_()
    with pytest.raises(StalenessError, match="aux"):
        _ = here.aux
    assert lin.at(x) is not here


def test_a_module_may_change_its_dtype_after_it_was_linearized() -> None:
    net = nn.Linear(2, 2)
    lin = lz.Linearizer(net)
    lin.at(torch.ones(2)).jvp_fn(torch.ones(2))
    net.double()
    x = torch.ones(2, dtype=D)
    torch.testing.assert_close(lin.at(x).jvp_fn(x), net.weight.detach() @ x)


def test_tensors_can_be_swapped_once_all_is_forgotten() -> None:
    w, x = torch.ones(2), torch.ones(2)
    net = nn.Linear(2, 2)
    lin = lz.Linearizer(lambda x: net(x) * w)
    lin.at(x).jvp_fn(x)
    lin.clear()
    gc.collect()
    for t in (w, net.weight, net.bias):
        other = nn.Parameter(torch.zeros_like(t)) if t is not w else torch.zeros(2)
        torch.utils.swap_tensors(t, other)
    assert lin.at(x).value.tolist() == [0, 0]


# -- tensors read out of sight -------------------------------------------------------------------


def in_a_thread(do: Any) -> Any:
    out: list[Any] = []
    thread = threading.Thread(target=lambda: out.append(do()))
    thread.start()
    thread.join()
    return out[0]


HIDDEN: dict[str, Any] = {
    "saved": lambda x, t: x * t,
    "saved by a later node": lambda x, t: (x.sin() * t).exp(),
    "index": lambda x, t: x[t],
    "several": lambda x, t: torch.cat([x * t, x / t]),
}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("products", [0, 1, 4])
def test_what_a_thread_of_f_read_is_seen_in_the_graph(name: str, products: int) -> None:
    t = torch.tensor([1, 0]) if name == "index" else rand(2, seed=1)
    hidden = iter([t] * 99)  # not to be reached by name
    lin = lz.Linearizer(
        lambda x: in_a_thread(lambda: HIDDEN[name](x, next(hidden))), unseen="constant"
    )
    x = rand(2)
    here = lin.at(x)
    for _ in range(products):
        here.jvp_fn(x)
        here.vjp_fn(here.value)
    assert lin.at(x) is here
    t.copy_(torch.tensor([0, 0]) if name == "index" else 2 * t)
    there = lin.at(x)
    assert there is not here
    torch.testing.assert_close(there.value, HIDDEN[name](x, t))
    v = torch.ones_like(x)
    expected = torch.func.jvp(lambda x: HIDDEN[name](x, t), (x,), (v,))[1]
    for _ in range(4):
        torch.testing.assert_close(there.jvp_fn(v), expected)
    if products:
        return
    with pytest.raises(StalenessError):
        here.jvp_fn(v)


@pytest.mark.parametrize("products", [0, 4])
@pytest.mark.parametrize("deep", [False, True])
def test_a_leaf_that_a_thread_of_f_read_is_seen_in_the_graph(products: int, deep: bool) -> None:
    t = rand(2, seed=1).requires_grad_()
    hidden = iter([t] * 99)

    def g(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (x + (t.exp().sum() if deep else t)).sin()

    lin = lz.Linearizer(lambda x: in_a_thread(lambda: g(x, next(hidden))), unseen="constant")
    x = rand(2)
    here = lin.at(x)
    for _ in range(products):
        here.jvp_fn(x)
        here.vjp_fn(here.value)
    assert lin.at(x) is here
    with torch.no_grad():
        t.mul_(2)
    there = lin.at(x)
    assert there is not here
    torch.testing.assert_close(there.value, g(x, t).detach())
    del here, there
    ref = weakref.ref(t)
    list(hidden)
    del t
    lin.clear()
    gc.collect()
    assert ref() is None


def test_constants_of_a_trace_are_seen_in_the_graph() -> None:
    w = rand(2, seed=1)
    traced = torch.jit.trace(lambda x: x * w, rand(2))
    lin = lz.Linearizer(lambda x: traced(x).sin(), unseen="constant")
    x = rand(2)
    here = lin.at(x)
    assert lin.at(x) is here
    w.mul_(2)
    torch.testing.assert_close(lin.at(x).value, (x * w).sin())


def test_what_f_freed_by_a_backward_of_its_own_is_no_change() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x[torch.tensor([0, 1])] * x * x.exp()
        return y + torch.autograd.grad(y.sum(), x)[0]

    lin = lz.Linearizer(f, max_bytes=1 << 20)
    x = rand(2)
    here = lin.at(x)
    assert lin.at(x) is here
    assert here.nbytes >= 0


def test_what_hooks_packed_is_not_unpacked_for_a_look() -> None:
    unpacked = 0

    def unpack(t: torch.Tensor) -> torch.Tensor:
        nonlocal unpacked
        unpacked += 1
        return t

    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            return x.sin() * x.cos()

    lin = lz.Linearizer(f, unseen="constant")
    x = rand(2)
    assert lin.at(x) is lin.at(x)
    assert unpacked == 0


# -- hooks ---------------------------------------------------------------------------------------


def test_a_gradient_hook_of_f_is_named() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.register_hook(lambda g: g * 10)
        return y.sin()

    with pytest.warns(IgnoredHookWarning, match="MulBackward0"):
        here = lz.Linearizer(f).at(torch.zeros(2))
    assert here.vjp_fn(torch.ones(2))[0].tolist() == [2, 2]


def on_the_node(y: torch.Tensor) -> None:
    assert y.grad_fn is not None
    y.grad_fn.register_hook(lambda gi, go: tuple(10 * g for g in gi))


def before_the_node(y: torch.Tensor) -> None:
    assert y.grad_fn is not None
    y.grad_fn.register_prehook(lambda go: tuple(10 * g for g in go))


HOOKS: dict[str, Any] = {
    "tensor": lambda x, y: y.register_hook(lambda g: 10 * g),
    "argument": lambda x, y: x.register_hook(lambda g: 10 * g),
    "node": lambda x, y: on_the_node(y),
    "before a node": lambda x, y: before_the_node(y),
    "before the end": lambda x, y: torch.autograd.graph.get_gradient_edge(x).node.register_prehook(
        lambda go: tuple(10 * g for g in go)
    ),
    "several": lambda x, y: torch.autograd.graph.register_multi_grad_hook((x, y), lambda g: None),
    "overwritten": lambda x, y: (y.register_hook(lambda g: 10 * g), y.mul_(2)),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("maxsize", [0, 8])
def test_every_gradient_hook_of_f_is_named(name: str, maxsize: int) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        HOOKS[name](x, y)
        return y.sin()

    lin = lz.Linearizer(f, maxsize=maxsize, unseen="constant")
    with pytest.warns(IgnoredHookWarning):
        lin.at(torch.zeros(2))
    with pytest.warns(IgnoredHookWarning):
        func.vjp(f, torch.zeros(2))


@pytest.mark.parametrize("name", ["node", "before a node", "tensor"])
def test_a_hook_on_a_custom_function_is_named(name: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = KeepsOutput.apply(x, "output")
        HOOKS[name](x, y)
        return y * 1.0

    with pytest.warns(IgnoredHookWarning, match="KeepsOutput"):
        lz.Linearizer(f, maxsize=0).at(torch.zeros(2, dtype=D))


def test_handles_are_made_as_ever_when_nobody_watches() -> None:
    gc.collect()  # points of other tests may still be watching
    before = RemovableHandle.__init__

    def f(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        lz.Linearizer(f).at(torch.zeros(2))
    assert RemovableHandle.__init__ is before


def test_a_backward_hook_of_a_module_is_named() -> None:
    net = nn.Linear(2, 2)
    net.register_full_backward_hook(lambda *_: None)
    with pytest.warns(IgnoredHookWarning):
        lz.Linearizer(net).at(torch.zeros(2))


def test_a_hook_outside_of_the_graph_is_none() -> None:
    w = torch.ones(2, requires_grad=True)

    def f(x: torch.Tensor) -> torch.Tensor:
        y = w * 2
        y.register_hook(lambda g: g)
        on_the_node(y)
        w.register_hook(lambda g: g)
        return x * w

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lz.Linearizer(f).at(torch.zeros(2))
