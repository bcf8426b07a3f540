"""Errors and interruptions at every stage, threads, forks and copies.

After whatever went wrong the object works, and nothing is left behind: no mode, no hook on
PyTorch's classes, no lock, no memory.
"""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode

import linearize as lz
from linearize.errors import ClosedError, CopyError
from tests.support.comparing import CALLS, close, compare
from tests.support.functions import rand

D = torch.float64
PACKAGE = str(Path(lz.__file__).parent)


class Interrupt(BaseException):
    """Like a Ctrl-C, but nobody else's."""


class Squared(Function):
    """x² with both methods; raises what it is told to, where it is told to."""

    fail: ClassVar[dict[str, BaseException]] = {}

    @staticmethod
    def step(name: str) -> None:
        error = Squared.fail.pop(name, None)
        if error is not None:
            raise error

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        Squared.step("before forward")
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        Squared.step("forward")
        return x * x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        ctx.note = g  # left behind if the next line raises
        Squared.step("backward")
        return 2 * ctx.saved_tensors[0] * g

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        ctx.note = v
        Squared.step("jvp")
        return 2 * ctx.saved_tensors[0] * v


def f(x: torch.Tensor) -> torch.Tensor:
    h = Squared.apply(x.sin()) * 1.5
    h[0] = h[1] * 2
    return h.cumsum(0).tanh() * x


def plain(x: torch.Tensor) -> torch.Tensor:
    h = x.sin() ** 2 * 1.5
    h = torch.cat([h[1:2] * 2, h[1:]])
    return h.cumsum(0).tanh() * x


X = rand(4)
J = torch.func.jacrev(plain)(X)


def nothing_left() -> None:
    """Check what a failure could have left in PyTorch."""
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.overrides._get_current_function_mode() is None
    assert _get_current_dispatch_mode() is None
    assert "__init__" not in vars(torch.autograd.function.BackwardCFunction)
    assert "linearize" not in torch.autograd.function.FunctionCtx.save_for_forward.__module__
    assert "apply" not in vars(torch.utils.checkpoint.CheckpointFunction)
    assert torch.compiler.is_compiling() is False


def still_right(here: lz.Linearization) -> None:
    close(here.value, [plain(X)], 1e-12)
    for call in range(CALLS):
        v = rand(4, seed=call + 5)
        close(here.jvp_fn(v), [J @ v], 1e-10)
        close(here.vjp_fn(v), [J.T @ v], 1e-10)


ERRORS = [KeyboardInterrupt, RuntimeError, MemoryError, SystemExit]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("stage", ["before forward", "forward", "backward", "jvp"])
def test_user_code_that_raises(stage: str, error: type[BaseException]) -> None:
    """Also out of memory: `at` tries once more then, and a product hands the error on."""
    lin = lz.Linearizer(f)
    for warm in range(CALLS):
        Squared.fail = {stage: error("on purpose")}
        if stage.endswith("forward"):
            if error is MemoryError:
                lin.at(X)  # the second attempt
            else:
                with pytest.raises(error, match="on purpose"):
                    lin.at(X)
            assert not Squared.fail
            lin.clear()
        else:
            here = lin.at(X)
            product = here.jvp_fn if stage == "jvp" else here.vjp_fn
            for _ in range(warm):  # before and after the simplified program takes over
                if not Squared.fail:
                    product(X)
            with pytest.raises(error, match="on purpose"):
                product(X)
        nothing_left()
        still_right(lin.at(X))
        lin.clear()
    gc.collect()
    assert lin.stats().points == 0


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("stage", ["pack", "unpack"])
def test_hooks_that_raise(stage: str, error: type[BaseException]) -> None:
    failing = {stage}

    def raises(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def hook(t: torch.Tensor) -> torch.Tensor:
            if name in failing:
                failing.discard(name)
                raise error("on purpose")
            return t

        return hook

    lin = lz.Linearizer(plain)
    with saved_tensors_hooks(raises("pack"), raises("unpack")):
        if stage == "pack" and error is not MemoryError:
            with pytest.raises(error, match="on purpose"):
                lin.at(X)
            nothing_left()
        here = lin.at(X)
    if stage == "unpack":
        try:
            here.jvp_fn(X)
        except (error, lz.errors.UnsupportedError) as raised:
            assert "on purpose" in str(raised)  # noqa: PT017 - or else:
        else:
            assert issubclass(error, RuntimeError)  # what PyTorch cannot do is asked for again
        nothing_left()
    still_right(here)


def interrupted(work: Callable[[], Any], at: int, error: BaseException) -> int:
    """Run `work` and raise `error` at the given call of a function of the package.

    Returns how many calls there were. Functions whose job is to clean up are spared: nobody
    can clean up if the cleaning itself is interrupted. (A generator is resumed to be closed.)
    """
    seen = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal seen
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        if frame.f_code.co_name in ("__exit__", "__del__", "died", "_bury", "<genexpr>"):
            return
        seen += 1
        if seen == at:
            raise error

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


def through_life(lin: lz.Linearizer) -> None:
    """Make a point and bring both programs through all their stages."""
    here = lin.at(X)
    for _ in range(3):
        here.jvp_fn(X)
        here.vjp_fn(X)


@pytest.mark.parametrize("error", [Interrupt, MemoryError, torch.OutOfMemoryError])
def test_interrupted_anywhere(error: type[BaseException]) -> None:
    """Capture, record, transpose, resolve, simplify, execute: dozens of places in between.

    The same Linearizer and, where it is there already, the same point go on working.
    """
    total = interrupted(lambda: through_life(lz.Linearizer(f)), 0, Interrupt())
    assert total > 1000
    lin = lz.Linearizer(f)
    hit, refs = 0, []
    for i, at in enumerate(range(1, total, total // 40)):
        if i % 2:  # else programs are taken over
            lin = lz.Linearizer(f)
        try:
            interrupted(functools.partial(through_life, lin), at, error("on purpose"))
        except error:
            hit += 1
        except lz.LinearizeError as other:
            assert "on purpose" in str(other)  # noqa: PT017
        nothing_left()
        here = lin.at(X)
        close(here.jvp_fn(X), [J @ X], 1e-10)
        close(here.vjp_fn(X), [J.T @ X], 1e-10)
        if at % 5 == 0:
            still_right(here)
        refs += [weakref.ref(here), weakref.ref(here.jvp_fn)]
        del here
        lin.clear()
    gc.collect()
    assert not any(r() for r in refs)
    assert hit > 20
    still_right(lin.at(X))


# -- threads -------------------------------------------------------------------------------------


def test_everything_at_once_on_one_linearizer() -> None:
    """Points made, dropped, closed, cleared, batched, differentiated from eight threads."""
    lin = lz.Linearizer(f, maxsize=3)
    shared, batched = lin.at(X), lz.Linearizer(plain).at(X).vjp_fn.batched
    others = [rand(4, seed=i) for i in range(4)]
    jacobians = [torch.func.jacrev(plain)(x) for x in others]

    def work(i: int) -> None:
        for k in range(12):
            which = (i + k) % 4
            x, A = others[which], jacobians[which]
            v = rand(4, seed=100 * i + k)
            try:
                here = lin.at(x)
                close(here.jvp_fn(v), [A @ v], 1e-10)
                close(here.vjp_fn(v), [A.T @ v], 1e-10)
            except ClosedError:
                pass
            close(shared.jvp_fn(v), [J @ v], 1e-10)
            batch = torch.stack([v, X])
            close(batched(batch), [batch @ J], 1e-10)
            if k % 4 == i % 4:
                v.requires_grad_()
                (g,) = torch.autograd.grad(shared.jvp_fn(v), v, X)
                close(g, [J.T @ X], 1e-10)
            if k % 6 == 5:
                (lin.clear if i % 2 else lin.at(x).close)()
            lin.stats()

    # `torch.func` transforms and `f` itself must not see each other across threads.
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, i) for i in range(8)]:
            done.result(60)
    nothing_left()
    still_right(lin.at(X))


def test_an_interrupted_thread_blocks_nobody() -> None:
    started, go = threading.Event(), threading.Event()

    def slow(x: torch.Tensor) -> torch.Tensor:
        if not go.is_set():
            started.set()
            go.wait(60)
            raise Interrupt
        return f(x)

    lin = lz.Linearizer(slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lin.at, X)
        assert started.wait(60)
        second = pool.submit(lin.at, X)
        go.set()
        with pytest.raises(Interrupt):
            first.result(60)
        still_right(second.result(60))


# -- copies and forks ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("what", ["linearizer", "point", "jvp_fn", "vjp_fn", "inside", "module"])
def test_copies_are_refused(what: str, how: Callable[[Any], Any]) -> None:
    lin = lz.Linearizer(f)
    here = lin.at(X)
    module = torch.nn.Linear(1, 1)
    module.product = here.jvp_fn
    thing = {
        "linearizer": lin,
        "point": here,
        "jvp_fn": here.jvp_fn,
        "vjp_fn": here.vjp_fn,
        "inside": [here.vjp_fn],
        "module": module,
    }[what]
    if how is copy.copy and what in ("inside", "module"):
        assert how(thing) is not thing  # the container alone is copied
    else:
        with pytest.raises(CopyError, match="cannot be copied or pickled"):
            how(thing)
    still_right(here)


def test_values_and_results_can_be_copied_and_pickled() -> None:
    here = compare(plain, X)
    for tensor in (here.value, here.jvp_fn(X)):
        assert torch.equal(pickle.loads(pickle.dumps(tensor)), tensor)
        assert torch.equal(copy.deepcopy(tensor), tensor)


FORK = """
import os, sys, torch
import linearize as lz

torch.set_num_threads(1)
x = torch.linspace(0.1, 1.0, 5, dtype=torch.float64)
runs = []

def f(x):
    runs.append(os.getpid())
    return x.sin() * x.sum()

lin = lz.Linearizer(f)
here = lin.at(x)
J = torch.func.jacrev(f)(x)
runs.clear()
if sys.argv[1] == "warm":
    for _ in range(4):
        here.jvp_fn(x), here.vjp_fn(x)
child = os.fork()
for _ in range(4):
    assert torch.allclose(here.jvp_fn(x), J @ x)
    assert torch.allclose(here.vjp_fn(x)[0], J.T @ x)
assert lin.at(x) is here and not runs
other = x + 1
assert torch.allclose(lin.at(other).value, f(other))
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
else:
    os._exit(0)
print("both")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_a_fork_has_the_point_too(state: str) -> None:
    """A child process has the parent's points; products run in both, f in neither."""
    command = [sys.executable, "-c", FORK, state]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.stdout == "both\n", run.stderr
