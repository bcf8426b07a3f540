"""Opaque code of others: operators of `torch.library`, and nodes in C++."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest
import torch

import linearize as lz
from linearize.errors import LinearizeError, MissingDerivativeError
from tests.support.functions import direction, opaque, point
from tests.support.references import native_jvp, native_vjp

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

close = torch.testing.assert_close


# -- torch.library -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library():
    """Operators in a namespace of their own, with the counts of their runs."""
    namespace = "linearize_tests"
    calls: Counter[str] = Counter()

    @torch.library.custom_op(f"{namespace}::sine", mutates_args=())
    def sine(x: torch.Tensor) -> torch.Tensor:
        calls["sine"] += 1
        return torch.from_numpy(np.sin(x.detach().numpy()))

    sine.register_autograd(
        lambda ctx, g: g * ctx.saved_tensors[0].cos(),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    )

    @torch.library.custom_op(f"{namespace}::opaque_sine", mutates_args=())
    def opaque_sine(x: torch.Tensor) -> torch.Tensor:
        calls["opaque_sine"] += 1
        return torch.from_numpy(np.sin(x.detach().numpy()))

    opaque_sine.register_autograd(
        opaque(lambda ctx, g: g * ctx.saved_tensors[0].cos()),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    )

    @torch.library.custom_op(f"{namespace}::weighted", mutates_args=())
    def weighted(
        xs: list[torch.Tensor], factor: float, *, scale: float = 2.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return scale * factor * sum(xs) + xs[0] ** 2, torch.stack(xs).sum()

    def setup(ctx, inputs, keyword_only_inputs, output):
        xs, ctx.factor = inputs
        ctx.count, ctx.scale = len(xs), keyword_only_inputs["scale"]
        ctx.save_for_backward(xs[0])

    def back(ctx, g, h):
        (x,) = ctx.saved_tensors
        common = ctx.scale * ctx.factor * g + h
        return [common + 2 * x * g, *([common] * (ctx.count - 1))], None

    weighted.register_autograd(back, setup_context=setup)

    @torch.library.custom_op(f"{namespace}::parts", mutates_args=())
    def parts(x: torch.Tensor, n: int) -> list[torch.Tensor]:
        return [x * n, x.sin()]

    def setup_parts(ctx, inputs, output):
        ctx.n = inputs[1]
        ctx.save_for_backward(inputs[0])

    parts.register_autograd(
        lambda ctx, gs: (gs[0] * ctx.n + gs[1] * ctx.saved_tensors[0].cos(), None),
        setup_context=setup_parts,
    )

    @torch.library.custom_op(f"{namespace}::bare", mutates_args=())
    def bare(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @torch.library.custom_op(f"{namespace}::bare_with_jvp", mutates_args=())
    def bare_with_jvp(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    ops = {
        op._opoverload._schema.name.partition("::")[2]: op
        for op in (sine, opaque_sine, weighted, parts, bare, bare_with_jvp)
    }
    return ops, calls


def test_library_operator(library):
    """`torch.func.jvp` gives zeros here."""
    ops, calls = library
    calls.clear()
    x = point()
    v = direction(x)
    here = lz.Linearizer(lambda x: ops["sine"](x * 2) * x).at(x)
    slopes = 2 * x * (2 * x).cos() + (2 * x).sin()
    for _ in range(3):
        close(here.jvp_fn(v), slopes * v)
        close(here.vjp_fn(v)[0], slopes * v)
    assert calls == {"sine": 1}


def test_library_operator_with_lists_and_keywords(library):
    ops, _ = library
    x, y = point(seed=1), point(seed=2)

    def f(x, y, op=ops["weighted"]):
        return op([x, y, x.cos()], 1.5, scale=3.0)

    def reference(x, y):
        xs = [x, y, x.cos()]
        return 4.5 * sum(xs) + xs[0] ** 2, torch.stack(xs).sum()

    here = lz.Linearizer(f).at(x, y)
    v = direction(x), direction(y, 2)
    u = tuple(direction(t, 3) for t in here.value)
    for _ in range(2):
        close(here.jvp_fn(*v), native_jvp(reference, (x, y), v))
        close(list(here.vjp_fn(u)), native_vjp(reference, (x, y), u))
    close(here.vjp_fn((u[0], None))[1], 4.5 * u[0])


@pytest.mark.parametrize("which", [(0, 1), (0,), (1,)])
def test_library_operator_that_returns_a_list(library, which):
    ops, _ = library
    x = point()
    v = direction(x)
    here = lz.Linearizer(lambda x: [ops["parts"](x, 3)[k] for k in which]).at(x)
    expected = [(3 * v, x.cos() * v)[k] for k in which]
    close(here.jvp_fn(v), expected)
    close(here.vjp_fn([v] * len(which))[0], sum(expected))


def test_registered_jvp(library):
    """An operator's own jvp is called, and called with its own arguments."""
    ops, calls = library
    x = point()
    v = direction(x)
    f = lz.Linearizer(lambda x: ops["opaque_sine"](x) * 2)
    with pytest.raises(MissingDerivativeError, match=r"opaque_sine.*jvp"):
        f.at(x).jvp_fn(v)
    seen = []

    def jvp(ctx, *tangents):
        seen.append(tangents)
        return torch.from_numpy(tangents[0].numpy() * np.cos(ctx.saved_tensors[0].numpy()))

    assert lz.register_jvp(ops["opaque_sine"], jvp) is jvp
    calls.clear()
    here = lz.Linearizer(lambda x: ops["opaque_sine"](x) * 2).at(x)
    for _ in range(3):
        close(here.jvp_fn(v), 2 * x.cos() * v)
        close(here.vjp_fn(v)[0], 2 * x.cos() * v)
    assert [len(t) for t in seen] == [1, 1, 1]
    close(seen[0][0], v)
    assert calls == {"opaque_sine": 1}


def test_registered_jvp_gets_the_operators_arguments(library):
    ops, _ = library
    seen = []

    def jvp(ctx, *tangents):
        seen.append(tangents)
        xs, factor = tangents
        assert factor is None
        first = ctx.scale * ctx.factor * sum(xs) + 2 * ctx.saved_tensors[0] * xs[0]
        return first, sum(t.sum() for t in xs)

    op = ops["weighted"]._opoverload  # an overload is as good as the op
    lz.register_jvp(op, jvp)
    x, y = point(seed=1), point(seed=2)
    here = lz.Linearizer(lambda x: ops["weighted"]([x, y], 1.5, scale=3.0)).at(x)
    v = direction(x)
    close(here.jvp_fn(v), (4.5 * v + 2 * x * v, v.sum()))
    ((xs, _),) = seen
    assert isinstance(xs, list)
    close(xs[0], v)
    close(xs[1], torch.zeros_like(y))


def test_library_operator_without_autograd(library):
    ops, _ = library
    here = lz.Linearizer(lambda x: ops["bare"](x) + x).at(point())
    for product in (here.jvp_fn, here.vjp_fn):
        with pytest.raises(LinearizeError, match=r"bare.*register_autograd"):
            product(direction(point()))
    close(here.value, 3 * point())


def test_library_operator_with_a_jvp_and_no_autograd(library):
    """Jᵀ·u comes from transposing the jvp, or there is an error that says what is missing."""
    ops, _ = library
    lz.register_jvp(ops["bare_with_jvp"], lambda ctx, dx: 2 * dx)
    here = lz.Linearizer(lambda x: ops["bare_with_jvp"](x) + x).at(point())
    v = direction(point())
    close(here.jvp_fn(v), 3 * v)
    close(here.vjp_fn(v)[0], 3 * v)


@pytest.mark.parametrize(
    "op", [torch.sin, torch.ops.aten.sin, torch.ops.aten.sin.default, "sin", None]
)
def test_register_jvp_takes_custom_operators_only(op):
    with pytest.raises(TypeError, match="custom op"):
        lz.register_jvp(op, lambda ctx, dx: dx)


# -- autograd nodes in C++ -----------------------------------------------------------------------

CPP = """
#include <torch/extension.h>
using namespace torch::autograd;

struct Cube : public Function<Cube> {
  static torch::Tensor forward(AutogradContext* ctx, const torch::Tensor& x) {
    ctx->save_for_backward({x});
    return x.pow(3);
  }
  static tensor_list backward(AutogradContext* ctx, tensor_list grads) {
    auto x = ctx->get_saved_variables()[0];
    return {3 * x * x * grads[0]};
  }
};

// The same with a backward that leaves PyTorch's operations.
struct RawCube : public Function<RawCube> {
  static torch::Tensor forward(AutogradContext* ctx, const torch::Tensor& x) {
    ctx->save_for_backward({x});
    return x.pow(3);
  }
  static tensor_list backward(AutogradContext* ctx, tensor_list grads) {
    auto x = ctx->get_saved_variables()[0].contiguous();
    auto g = grads[0].contiguous();
    auto out = torch::empty_like(x);
    for (int64_t i = 0; i < x.numel(); ++i) {
      double v = x.data_ptr<double>()[i];
      out.data_ptr<double>()[i] = 3 * v * v * g.data_ptr<double>()[i];
    }
    return {out};
  }
};

torch::Tensor cube(torch::Tensor x) { return Cube::apply(x); }
torch::Tensor raw_cube(torch::Tensor x) { return RawCube::apply(x); }
"""


@pytest.fixture(scope="module")
def cpp(tmp_path_factory):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    if shutil.which("ninja") is None:
        pytest.skip("no ninja, which torch.utils.cpp_extension needs")
    from torch.utils.cpp_extension import load_inline

    return load_inline(
        "linearize_test_nodes",
        CPP,
        functions=["cube", "raw_cube"],
        build_directory=str(tmp_path_factory.mktemp("cpp")),
        extra_cflags=["-O0"],
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's and the extension loader's
class TestCppNode:
    def test_written_in_torch_operations(self, cpp):
        x = point()
        v = direction(x)
        here = lz.Linearizer(lambda x: cpp.cube(x.sin()) * 2).at(x)
        slopes = 6 * x.sin() ** 2 * x.cos()
        for _ in range(2):
            close(here.vjp_fn(v)[0], slopes * v)
            close(here.jvp_fn(v), slopes * v)

    def test_opaque(self, cpp):
        x = point()
        v = direction(x)
        slopes = 6 * x.sin() ** 2 * x.cos()

        def f(x):
            return cpp.raw_cube(x.sin()) * 2

        here = lz.Linearizer(f).at(x)
        for _ in range(2):
            with pytest.raises(MissingDerivativeError, match="RawCube"):
                here.jvp_fn(v)
            close(here.vjp_fn(v)[0], slopes * v)
        here = lz.Linearizer(f, opaque="materialize").at(x)
        for _ in range(2):
            close(here.jvp_fn(v), slopes * v)
