"""Functions under `torch.compile` run compiled, once, and give what they give as written.

The references are finite differences and PyTorch's engine on the function as it was written.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import linearize as lz
from linearize._record import node_formulas
from linearize._torch.pieces import OWN_WORDS
from linearize.errors import StalenessError
from tests.support.comparing import close, same_draws
from tests.support.references import Plain, difference, gradient, like, tensors

D = torch.float64
CALLS = 5
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Forget what was compiled: PyTorch compiles one piece of code a few times only."""
    yield
    torch.compiler.reset()


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=D, generator=generator).to(dtype)


W = rand(4, 4, seed=9)


def agree(
    compiled: Callable[..., Any],
    plain: Callable[..., Any],
    *points: tuple[Any, ...],
    tol: float = 1e-7,
    **options: Any,
) -> tuple[lz.Linearizer, lz.Linearization]:
    """Compare value and products at several points with those of the function as written."""
    lin = lz.Linearizer(compiled, **options)
    for primals in points:
        reference = Plain(plain, primals)
        here = lin.at(*primals)
        close(
            here.value, [y.detach() for y in reference(reference.at)], 1e-12 if tol < 1e-6 else tol
        )
        for call in range(CALLS):
            v, u = like(primals, seed=2 * call), like(here.value, seed=2 * call + 1)
            close(here.jvp_fn(*v), difference(reference, tensors(v)), tol)
            close(here.vjp_fn(u), gradient(reference, tensors(u)), tol)
    return lin, here


def ran(here: lz.Linearization) -> list[str]:
    """Return why pieces ran as they are, empty for those that ran compiled."""
    return [piece.reason for piece in here.program.pieces]


def aot(f: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    return torch.compile(f, backend="aot_eager", **settings)


def stencil(x: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        x = x + 0.1 * (x.roll(1) - x.roll(-1)) * x.sin()
    return x


def layers(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(torch.tanh(x @ W) @ W) * x.sum()


def broken(x: torch.Tensor) -> torch.Tensor:
    y = x.sin() * 2
    torch._dynamo.graph_break()
    z = y.exp().sum()
    return z * x + W[0]


def branching(x: torch.Tensor) -> torch.Tensor:
    return x.sin() if bool(x.sum() > 0) else x.cos() * x


def aliasing(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x.sin()
    return x, x.view(-1), x.T * 2, y, y.view(-1)[1:]


def slices(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(6, dtype=D)
    y[1:5] = x.sin()
    y[0] = x.sum()
    return y * y


def embedded(x: torch.Tensor) -> torch.Tensor:
    return functional.embedding(torch.tensor([1, 2, 2]), x).tanh() * torch.tensor([1.0, 2, 3, 4])


def attention(x: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(x[None], x[None] @ W, x[None])


def normed(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(functional.layer_norm(x, (4,))) @ W


def spectrum(x: torch.Tensor) -> torch.Tensor:
    return torch.fft.rfft(x).abs().square().sum() * x


ONES = {f.__name__: f for f in (stencil, layers, aliasing, embedded, attention, normed, spectrum)}


@pytest.mark.parametrize("name", ONES)
def test_one_piece(name: str) -> None:
    """Recorded once, and every later point takes it over."""
    f = ONES[name]
    lin, here = agree(aot(f), f, *((rand(4, 4, seed=k),) for k in range(3)))
    assert ran(here) == [""]
    assert lin.stats().recorded <= 1
    assert lin.stats().reused >= 2


def test_programs_are_no_longer_than_those_of_the_function_as_written() -> None:
    x = rand(6)
    for f in (stencil, slices):
        x = rand(6) if f is stencil else rand(4)
        here, plain = lz.Linearizer(aot(f)).at(x), lz.Linearizer(f).at(x)
        assert len(here.program.pullback.equations) <= len(plain.program.pullback.equations)


@pytest.mark.parametrize("f", [broken, branching, slices])
def test_pieces_and_branches(f: Callable[..., Any]) -> None:
    points = [(rand(4, seed=k).abs() * sign,) for k, sign in enumerate((1, -1, 1, -1))]
    _, here = agree(aot(f), f, *points)
    assert set(ran(here)) == {""}


class Cube(torch.autograd.Function):
    """Has a jvp of its own, which the compiler leaves alone."""

    calls = 0

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return 3 * ctx.saved_tensors[0] ** 2 * g

    @staticmethod
    def jvp(ctx: Any, t: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        Cube.calls += 1
        return 3 * ctx.saved_tensors[0] ** 2 * t


class Sine(torch.autograd.Function):
    """Has a backward only, which the compiler looks into."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # type: ignore[override]
        return g * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("whole", [False, True])
def test_custom_functions_between_pieces(whole: bool) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return Cube.apply(x.sin()).cos() * x

    before = Cube.calls
    _, here = agree(aot(f, fullgraph=whole), f, *((rand(4, seed=k),) for k in range(3)))
    assert Cube.calls - before >= 3 * CALLS
    assert any("Cube" in eq.name for eq in here.program.pushforward.equations)


def test_custom_functions_inside_of_a_piece() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return Sine.apply(x * 2).cos() * x

    _, here = agree(aot(f), f, *((rand(4, seed=k),) for k in range(3)))
    assert ran(here) == [""]


def test_eager_code_between_compiled_functions() -> None:
    first, second = aot(layers), aot(stencil)
    runs = []

    def f(x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return second(first(x).cos() * x)

    _, here = agree(f, lambda x: stencil(layers(x).cos() * x), *((rand(4, 4),) for _ in range(2)))
    assert ran(here) == ["", ""]
    assert len(runs) == 2


@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes_that_change(dynamic: bool | None) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return (x * x.shape[0]).tanh().cumsum(0) * x.sum()

    points = [(rand(n, seed=k),) for k, n in enumerate((4, 4, 7, 9, 7))]
    _, here = agree(aot(f, dynamic=dynamic), f, *points)
    assert ran(here) == [""]


def test_dtypes_that_change() -> None:
    compiled = aot(stencil)
    agree(compiled, stencil, (rand(4),))
    lin = lz.Linearizer(compiled)
    here, x = lin.at(rand(4).float()), rand(4)
    assert here.value.dtype == torch.float32
    close(here.jvp_fn(x.float()), [lz.Linearizer(stencil).at(x).jvp_fn(x).float()], 1e-5)
    agree(compiled, stencil, (rand(4).to(torch.complex128),), tol=1e-6)


def test_dropout_is_that_of_the_one_run() -> None:
    compiled = aot(lambda x: functional.dropout(x, 0.5, True) @ W)
    x = torch.ones(8, 4, dtype=D)
    lin = lz.Linearizer(compiled, maxsize=0)
    values = []
    for seed in range(3):
        with same_draws(seed):
            here = lin.at(x)
        values.append(here.value)
        for _ in range(CALLS):  # the function is linear
            close(here.jvp_fn(x), here.value, 1e-12)
        u = rand(8, 4)
        close((here.vjp_fn(u)[0] * x).sum(), (u * here.value).sum(), 1e-12)
    assert not torch.equal(values[0], values[1])
    assert ran(here) == [""]


@pytest.mark.parametrize("training", [True, False])
def test_buffers(training: bool) -> None:
    """Running statistics move once in training; moved elsewhere, they do not change a point."""

    def made() -> nn.Module:
        with same_draws():
            return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()).double()

    plain, net = made().train(training), made().train(training)
    lin, x = lz.Linearizer(aot(net)), rand(5, 4)
    here = lin.at(x)
    close(here.value, plain(x).detach(), 1e-12)
    for ours, theirs in zip(net.buffers(), plain.buffers(), strict=True):
        close(ours, theirs, 1e-12)
    still = Plain(plain.train(training), (x,))
    for call in range(CALLS):
        u = rand(5, 3, seed=call)
        close(here.vjp_fn(u), gradient(still, [u]), 1e-9)
        close((here.jvp_fn(x) * u).sum(), (here.vjp_fn(u)[0] * x).sum(), 1e-9)
    net.train()(rand(5, 4, seed=3))  # moves the statistics, without a count of changes
    again = lin.at(x)
    assert again is not here
    if not training:
        close(here.vjp_fn(u), gradient(Plain(made().eval(), (x,)), [u]), 1e-9)


def test_written_arguments_and_side_effects() -> None:
    buffer, seen = torch.zeros(4, dtype=D), []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        buffer.mul_(0.5).add_(1)
        return x.sin() * buffer.sum()

    lin = lz.Linearizer(aot(f))
    for k in range(3):
        x = rand(4, seed=k)
        here = lin.at(x)
        for _ in range(CALLS):
            close(here.jvp_fn(x), x.cos() * x * buffer.sum(), 1e-12)
            close(here.vjp_fn(x), x.cos() * x * buffer.sum(), 1e-12)
    assert len(seen) == 3
    close(buffer, torch.full((4,), 1.75, dtype=D), 1e-12)


def test_a_parameter_that_changes_is_noticed() -> None:
    net = nn.Linear(4, 4).double()
    lin, x = lz.Linearizer(aot(lambda x: net(x).tanh())), rand(4)
    here = lin.at(x)
    assert lin.at(x) is here
    with torch.no_grad():
        net.weight.mul_(2)
    with pytest.raises(StalenessError):
        here.jvp_fn(x)
    there = lin.at(x)
    assert there is not here
    close(there.value, net(x).tanh().detach(), 1e-12)


def test_what_compiled_code_reads_is_noticed() -> None:
    """The memo is told of tensors out of its reach that a compiled graph is given."""

    class Holder:
        __slots__ = ("hidden",)

    holder = Holder()
    holder.hidden = torch.ones(4, dtype=D)
    lin, x = lz.Linearizer(aot(lambda x: x * holder.hidden.exp())), rand(4)
    here = lin.at(x)
    close(here.jvp_fn(x), x * torch.e, 1e-12)
    holder.hidden.mul_(2)
    close(lin.at(x).jvp_fn(x), x * torch.e**2, 1e-12)


# -- what runs as it is --------------------------------------------------------------------------


@torch.library.custom_op("linearize_test::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


doubled.register_fake(torch.empty_like)
doubled.register_autograd(lambda ctx, g: 2 * g)


def failing(module: Any, inputs: Any) -> Any:
    raise ValueError("no compiler here")


REASONS: dict[str, tuple[Callable[..., Any], str]] = {
    "operator": (lambda x: doubled(x).sin(), "derivative of its own"),
    "index": (
        lambda x: torch.zeros_like(x).index_put((torch.tensor([0, 1]),), x[:2]),
        "index_put",
    ),
    "logcumsumexp": (lambda x: x.logcumsumexp(0) * x, "logcumsumexp"),
    "det": (lambda x: torch.linalg.det(x.outer(x) + W) * x, "det"),
}


@pytest.mark.parametrize("name", REASONS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_would_lose_something_runs_as_it_is(name: str) -> None:
    f, reason = REASONS[name]
    if name == "operator":
        lz.register_jvp(doubled, lambda ctx, t: 2 * t) if hasattr(lz, "register_jvp") else None
    lin = lz.Linearizer(aot(f))
    for k in range(2):
        here, plain = lin.at(rand(4, seed=k)), lz.Linearizer(f).at(rand(4, seed=k))
        for call in range(CALLS):
            u = rand(4, seed=call)
            close(here.vjp_fn(u), plain.vjp_fn(u), 1e-10)
            if name != "operator":
                close(here.jvp_fn(u), plain.jvp_fn(u), 1e-10)
    assert reason in str(here.program.pieces[0])


def test_what_has_a_formula_of_its_own_is_left_alone() -> None:
    """Each node that the package knows better of is made by an operation that is left alone."""
    made_by = {
        "AsStridedScatterBackward0": "as_strided_scatter",
        "IndexCopyBackward0": "index_copy",
        "IndexPutBackward0": "index_put",
        "LinalgDetBackward0": "_linalg_det",
        "LinalgMatrixExpBackward0": "linalg_matrix_exp",
        "LogcumsumexpBackward0": "logcumsumexp",
        "MaxUnpool2DBackward0": "max_unpool2d",
        "MaxUnpool3DBackward0": "max_unpool3d",
        "MkldnnRnnLayerBackward0": "mkldnn_rnn_layer",
        "NllLoss2DBackward0": "nll_loss2d_forward",
        "PutBackward0": "put",
        "ScatterBackward0": "scatter",
        "SegmentReduceBackward0": "segment_reduce",
        "UnsafeIndexPutBackward0": "_unsafe_index_put",
    }
    known = {*node_formulas._FORMULAS, *node_formulas._MENDED} - {"EmbeddingBackward0"}
    assert known == set(made_by)  # an embedding needs it with `scale_grad_by_freq` only
    assert set(made_by.values()) <= OWN_WORDS


@pytest.mark.parametrize("whole", [False, True])
def test_compilers_of_others_are_not_used(whole: bool) -> None:
    def backend(module: Any, inputs: Any) -> Any:
        return module.forward

    compiled = torch.compile(layers, backend=backend, fullgraph=whole)
    _, here = agree(compiled, layers, (rand(3, 4),), (rand(3, 4, seed=1),))
    assert "is not PyTorch's" in ran(here)[0]


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize._torch.pieces._aot", lambda backend: failing)
    _, here = agree(aot(layers), layers, (rand(3, 4),), (rand(3, 4, seed=1),))
    assert "no compiler here" in ran(here)[0]
    assert "no compiler here" in str(here.program)


def test_a_pytorch_with_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then compiled functions run as they were written."""
    compiled = aot(layers)
    monkeypatch.delattr("torch._dynamo.eval_frame._create_wrapped_callback")
    _, here = agree(compiled, layers, (rand(3, 4),))
    assert ran(here) == []


def test_a_pullback_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch._functorch._aot_autograd.graph_compile.AutogradLazyBackwardCompileInfo"
    monkeypatch.setattr(name, lambda *args, **kwargs: None)
    _, here = agree(aot(layers), layers, (rand(3, 4),), (rand(3, 4, seed=1),))
    assert "not kept" in ran(here)[0]


def test_lines_are_noted_of_what_runs_as_written() -> None:
    here = lz.Linearizer(aot(layers), trace=True).at(rand(3, 4))
    assert "test_compiled.py" in str(here.program)


# -- the compiler is asked for here --------------------------------------------------------------


def test_compile_compiles_the_function_too() -> None:
    runs: list[int] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return stencil(x)

    points = [(rand(6, seed=k),) for k in range(3)]
    lin, here = agree(f, stencil, *points, compile={"backend": "aot_eager"})
    assert len(runs) == 3
    assert set(ran(here)) == {""}
    assert lin.f is f
    assert lin.at(*points[-1]) is here
    net = nn.Linear(4, 4).double()
    agree(net, net, (rand(3, 4),), (rand(3, 4, seed=1),), compile={"backend": "aot_eager"})


def test_compile_leaves_alone_what_cannot_be_compiled() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.detach().numpy().tolist()
        return x * torch.tensor(sum(y), dtype=D) + Cube.apply(x)

    def frozen(x: torch.Tensor) -> torch.Tensor:
        return x * FROZEN.sum() + x**3

    global FROZEN
    lin = lz.Linearizer(f, compile={"backend": "aot_eager"})
    for k in range(3):
        FROZEN = x = rand(4, seed=k)
        here, plain = lin.at(x), Plain(frozen, (x,))
        for call in range(CALLS):
            v = rand(4, seed=call)
            close(here.jvp_fn(v), difference(plain, [v]), 1e-7)
            close(here.vjp_fn(v), gradient(plain, [v]), 1e-7)
    agree(Cube.apply, lambda x: x**3, (rand(4),), compile={"backend": "aot_eager"})


FROZEN = torch.zeros(4)


def test_the_compiler_of_the_caller_is_not_disturbed() -> None:
    """What was compiled outside stays, and other threads see nothing of ours."""
    compiled = aot(layers)
    x = rand(3, 4)
    outside = compiled(x)
    counters = torch._dynamo.utils.counters["stats"]
    made = counters["unique_graphs"]
    lz.Linearizer(compiled).at(x)
    assert counters["unique_graphs"] == made + 1
    close(compiled(x), outside, 1e-12)
    results: list[torch.Tensor] = []
    inside = threading.Event()

    def f(x: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=lambda: results.append(compiled(x.detach())))
        thread.start()
        thread.join()
        inside.set()
        return compiled(x)

    lz.Linearizer(f).at(x)
    assert inside.is_set()
    close(results, [outside], 1e-12)
    assert counters["unique_graphs"] == made + 1


def test_several_threads() -> None:
    """While one compiles, the others wait for it, and are not taken for being traced."""

    def product(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        t = torch.tanh(x @ W)
        return (1 - t * t) * (v @ W) * x.sum() + t * v.sum()

    lin, failed = lz.Linearizer(aot(lambda x: torch.tanh(x @ W) * x.sum())), []

    def work(seed: int) -> None:
        try:
            for call in range(3):
                x = rand(3, 4, seed=10 * seed + call)
                close(lin.at(x).jvp_fn(x), product(x, x), 1e-10)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(mode: str) -> None:
    for f in (stencil, broken, layers):
        shape = (4, 4) if f is layers else (4,)
        points = [(rand(*shape, seed=k),) for k in range(3)]
        lin, here = agree(f, f, *points, compile={"mode": mode})
        assert set(ran(here)) == {""}
        assert lin.stats().reused >= 2
    compiled = torch.compile(lambda x: functional.dropout(x, 0.5, True) @ W, mode=mode)
    x = torch.ones(8, 4, dtype=D)
    here = lz.Linearizer(compiled).at(x)
    for _ in range(CALLS):
        close(here.jvp_fn(x), here.value, 1e-12)
        close((here.vjp_fn(x)[0] * x).sum(), here.value.sum(), 1e-12)
    here = lz.Linearizer(torch.compile(stencil, mode=mode)).at(rand(4).to(torch.complex128))
    assert "complex" in ran(here)[0]
