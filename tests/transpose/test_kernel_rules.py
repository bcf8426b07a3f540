"""Backward kernels without a derivative in PyTorch: both products, against other sources."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import linearize as lz
from tests.support.functions import randn

D = torch.float64
C = torch.complex128
Function = Callable[..., torch.Tensor]


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the real inner product."""
    return torch.vdot(a.flatten(), b.flatten()).real


def finite_difference(
    f: Function, primals: list[torch.Tensor], v: list[torch.Tensor]
) -> torch.Tensor:
    """Return the central difference quotient along v."""
    h = 1e-5
    ahead = f(*(p + h * t for p, t in zip(primals, v, strict=True)))
    behind = f(*(p - h * t for p, t in zip(primals, v, strict=True)))
    return (ahead - behind) / (2 * h)


def check(f: Function, *primals: torch.Tensor) -> lz.Linearization:
    """Compare J·v with finite differences and Jᵀ·u with native backward, four times."""
    runs = 0

    def counted(*x: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return f(*x)

    here = lz.Linearizer(counted).at(*primals)
    v = [randn(*p.shape, dtype=p.dtype, seed=1) for p in primals]
    leaves = [p.clone().requires_grad_() for p in primals]
    value = f(*leaves)
    u = randn(*value.shape, dtype=value.dtype, seed=2)
    expected = torch.autograd.grad(value, leaves, u)
    with torch.no_grad():
        quotient = finite_difference(f, list(primals), v)
    for _ in range(CALLS):
        jv = here.jvp_fn(*v)
        torch.testing.assert_close(jv, quotient, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(here.vjp_fn(u), expected)
        other = sum(dot(a, b) for a, b in zip(expected, v, strict=True))
        torch.testing.assert_close(dot(u, jv), other)
    # Each product is differentiable: the derivative of one is the other.
    for t in v:
        t.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(here.jvp_fn(*v), v, u), expected)
    assert runs == 1
    return here


CASES: dict[str, tuple[Function, tuple[torch.Tensor, ...]]] = {}
CALLS = 4  # later calls run simplified programs


def case(name: str, f: Function, *primals: torch.Tensor) -> None:
    assert name not in CASES
    CASES[name] = (f, primals)


# -- distances --------------------------------------------------------------------------------

for _p in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf):
    case(
        f"cdist p={_p}",
        lambda x, y, p=_p: torch.cdist(x, y, p, "donot_use_mm_for_euclid_dist"),
        randn(2, 1, 4, 3),
        randn(5, 6, 3),
    )
    case(f"pdist p={_p}", lambda x, p=_p: F.pdist(x, p), randn(6, 3))

# -- bags -------------------------------------------------------------------------------------

INDEX = torch.tensor([1, 1, 3, 4, 1, 6, 0])
OFFSETS = torch.tensor([0, 2, 2, 4])  # with an empty bag
for _mode in ("sum", "mean", "max"):
    for _padding in (None, 1):
        case(
            f"embedding_bag {_mode} padding={_padding}",
            lambda w, m=_mode, p=_padding: F.embedding_bag(
                INDEX, w, OFFSETS, mode=m, padding_idx=p
            ),
            randn(7, 3),
        )
case(
    "embedding_bag with weights",
    lambda w, s: F.embedding_bag(
        INDEX, w, OFFSETS, mode="sum", per_sample_weights=s, padding_idx=1
    ),
    randn(7, 3),
    randn(7),
)
case(
    "embedding_bag with the last offset",
    lambda w: F.embedding_bag(INDEX, w, torch.tensor([0, 2, 7]), include_last_offset=True),
    randn(7, 3),
)
case("embedding_bag of rows", lambda w: F.embedding_bag(INDEX[:6].view(2, 3), w), randn(7, 3))

# -- recurrent networks and sampled images ----------------------------------------------------


def _recurrent(kind: str) -> tuple[Function, tuple[torch.Tensor, ...]]:
    """Return a network as a function of its input and its first weight."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = getattr(torch.nn, kind)(3, 4, num_layers=2, bidirectional=True, dtype=D)
    weight = net.weight_ih_l0.detach().clone()

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.func.functional_call(net, {"weight_ih_l0": weight}, x)[0]
        return output

    return run, (randn(5, 2, 3), weight)


for _kind in ("RNN", "GRU", "LSTM"):
    _run, _primals = _recurrent(_kind)
    case(_kind, _run, *_primals)
for _mode in ("bilinear", "nearest", "bicubic"):
    case(
        f"grid_sample {_mode}",
        lambda x, g, m=_mode: F.grid_sample(x, g.tanh(), mode=m, align_corners=False),
        randn(1, 2, 4, 5),
        randn(1, 3, 3, 2),
    )
case(
    "grid_sample in three dimensions",
    lambda x, g: F.grid_sample(x, g.tanh(), padding_mode="border", align_corners=True),
    randn(1, 2, 3, 4, 3),
    randn(1, 2, 2, 2, 3),
)

# -- losses -----------------------------------------------------------------------------------

TARGETS = torch.tensor([[1, 2], [3, 3], [4, 0]])
for _reduction in ("none", "mean", "sum"):
    case(
        f"ctc_loss {_reduction}",
        lambda x, r=_reduction: F.ctc_loss(
            x.log_softmax(-1), TARGETS, [8, 7, 5], [2, 2, 1], reduction=r
        ),
        randn(8, 3, 5),
    )
    case(
        f"ctc_loss {_reduction}, one sequence too short",
        lambda x, r=_reduction: F.ctc_loss(
            x.log_softmax(-1), TARGETS, [8, 2, 5], [2, 2, 1], reduction=r, zero_infinity=True
        ),
        randn(8, 3, 5),
    )
    for _p in (1, 2):
        case(
            f"multi_margin_loss {_reduction} p={_p}",
            lambda x, r=_reduction, p=_p: F.multi_margin_loss(
                x, INDEX[1:4] % 4, p=p, margin=0.7, weight=randn(4).abs(), reduction=r
            ),
            randn(3, 4),
        )
    case(
        f"multilabel_margin_loss {_reduction}",
        lambda x, r=_reduction: F.multilabel_margin_loss(
            x, torch.tensor([[0, 2, -1, 1], [1, -1, 0, 0]]), reduction=r
        ),
        randn(2, 4),
    )
case("multi_margin_loss of one row", lambda x: F.multi_margin_loss(x, torch.tensor(1)), randn(4))
case(
    "multilabel_margin_loss of one row",
    lambda x: F.multilabel_margin_loss(x, torch.tensor([1, -1, 0, 0])),
    randn(4),
)
case(
    "ctc_loss of one sequence",
    lambda x: F.ctc_loss(x.log_softmax(-1), TARGETS[0], torch.tensor(8), torch.tensor(2)),
    randn(8, 5),
)

# -- segments ---------------------------------------------------------------------------------

for _reduce in ("sum", "mean", "max", "min", "prod"):
    case(
        f"segment_reduce {_reduce} by lengths",
        lambda x, r=_reduce: torch.segment_reduce(x, r, lengths=torch.tensor([2, 1, 3])),
        randn(6, 2),
    )
    case(
        f"segment_reduce {_reduce} by offsets",
        lambda x, r=_reduce: torch.segment_reduce(x, r, offsets=torch.tensor([0, 2, 3, 6])),
        randn(6, 2),
    )
case(
    "segment_reduce along another axis",
    lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([[2, 0, 4], [1, 3, 2]]), axis=1),
    randn(2, 6, 2),
)
case(
    "segment_reduce of a product with a zero",
    lambda x: torch.segment_reduce(
        x * torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0], dtype=D)[:, None],
        "prod",
        lengths=torch.tensor([2, 4]),
    ),
    randn(6, 2),
)

# -- normalized weights -----------------------------------------------------------------------

for _dim, _shape in ((0, (4, 1, 1)), (-1, (1, 1, 2)), (2, (1, 1, 2))):
    case(
        f"weight_norm dim={_dim}",
        lambda v, g, d=_dim: torch._weight_norm(v, g, d),
        randn(4, 3, 2),
        randn(*_shape),
    )

# -- attention --------------------------------------------------------------------------------

QKV = (randn(2, 4, 6, 8), randn(2, 4, 5, 8), randn(2, 4, 5, 8, seed=3))
MASK = randn(6, 5) > 0
MASK[2] = False  # a query that may see nothing
ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "with a bias": {"attn_mask": randn(6, 5)},
    "with a bias for each head": {"attn_mask": randn(2, 4, 6, 5)},
    "with a bias for keys": {"attn_mask": randn(2, 1, 1, 5), "scale": 2.0},
    "with a mask": {"attn_mask": MASK},
}
for _name, _options in ATTENTION.items():
    case(
        f"attention {_name}",
        lambda q, k, v, o=_options: F.scaled_dot_product_attention(q, k, v, **o),
        *QKV,
    )
case(
    "attention with grouped heads",
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True),
    randn(2, 4, 6, 8),
    *(t[:, :2] for t in QKV[1:]),
)
case("attention to itself", lambda x: F.scaled_dot_product_attention(x, x.sin(), x), QKV[0])

# -- whole nodes ------------------------------------------------------------------------------

for _dtype in (D, C):
    case(f"matrix_exp {_dtype}", torch.linalg.matrix_exp, randn(2, 4, 4, dtype=_dtype))
    case(
        f"matrix_exp of a small matrix {_dtype}",
        torch.linalg.matrix_exp,
        1e-6 * randn(3, 3, dtype=_dtype),
    )
    for _dim in (0, 1, -1):
        case(
            f"logcumsumexp {_dtype} dim={_dim}",
            lambda x, d=_dim: torch.logcumsumexp(3 * x, d),
            randn(3, 9, 2, dtype=_dtype),
        )
    case(
        f"qr {_dtype}",
        lambda x: torch.cat([t.flatten() for t in torch.linalg.qr(x)]),
        randn(2, 4, 3, dtype=_dtype),
    )
    case(
        f"square qr {_dtype}",
        lambda x: torch.linalg.qr(x).R,
        randn(3, 3, dtype=_dtype),
    )
case("logcumsumexp of a number", lambda x: torch.logcumsumexp(x, 0), randn())
case("logcumsumexp of one", lambda x: torch.logcumsumexp(x, -1), randn(3, 1))


@pytest.mark.parametrize("name", CASES)
def test_products(name: str) -> None:
    f, primals = CASES[name]
    check(f, *primals)


@pytest.mark.parametrize(
    "name", [n for n in CASES if "p=0.0" not in n and not n.startswith(("qr", "square qr"))]
)
def test_batched_products(name: str) -> None:
    """`torch.vmap` of a product is the product of each."""
    f, primals = CASES[name]
    here = lz.Linearizer(f).at(*primals)
    v = [torch.stack([randn(*p.shape, dtype=p.dtype, seed=s) for s in range(3)]) for p in primals]
    got = torch.vmap(here.jvp_fn)(*v)
    expected = torch.stack([here.jvp_fn(*(t[i] for t in v)) for i in range(3)])
    torch.testing.assert_close(got, expected)


def test_tangents_of_some_primals_only() -> None:
    here = lz.Linearizer(F.scaled_dot_product_attention).at(*QKV)
    v = [randn(*p.shape, seed=1) for p in QKV]
    parts = [here.jvp_fn(*(t if i == k else None for i, t in enumerate(v))) for k in range(3)]
    torch.testing.assert_close(parts[0] + parts[1] + parts[2], here.jvp_fn(*v))


def test_a_product_first_used_inside_a_backward_pass() -> None:
    """There the engine lets nodes skip what does not lead to the inputs that it is asked for."""
    for f, x in ((torch.tanh, randn(3)), (lambda x: torch.linalg.qr(x).R, randn(3, 3))):
        here = lz.Linearizer(f).at(x)
        expected = lz.Linearizer(f).at(x).vjp_fn(x)

        class Inside(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: torch.Tensor, here: Any = here) -> Any:
                return here.vjp_fn(grad)

        leaf = x.clone().requires_grad_()
        got = torch.autograd.grad(Inside.apply(leaf), leaf, x)
        torch.testing.assert_close(got, expected)


# -- distances --------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 2.0, 3.0, math.inf])
def test_points_that_coincide_have_the_subgradient_of_the_kernel(p: float) -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0]], dtype=D)
    for f in (
        lambda x: F.pdist(x, p),
        lambda x: torch.cdist(x, x[:2].detach(), p, "donot_use_mm_for_euclid_dist"),
    ):
        here = lz.Linearizer(f).at(x)
        v = randn(3, 2)
        jv = here.jvp_fn(v)
        leaf = x.clone().requires_grad_()
        value = f(leaf)
        rows = [torch.autograd.grad(y, leaf, retain_graph=True)[0] for y in value.flatten()]
        expected = torch.stack([dot(row, v) for row in rows]).view(value.shape)
        torch.testing.assert_close(jv, expected)


def test_distances_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small blocks give what one gives."""
    x, v = randn(9, 3), randn(9, 3, seed=1)
    for f in (lambda x: torch.cdist(x, x.sin(), 3.0), lambda x: F.pdist(x, 3.0)):
        whole = lz.Linearizer(f).at(x).jvp_fn(v)
        monkeypatch.setattr("linearize._transpose.kernel_formulas.BLOCK", 40)
        torch.testing.assert_close(lz.Linearizer(f).at(x).jvp_fn(v), whole)
        monkeypatch.undo()


# -- bags -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_sparse_bags_have_dense_products(weighted: bool) -> None:
    def f(w: torch.Tensor, s: torch.Tensor, *, sparse: bool) -> torch.Tensor:
        weights = s if weighted else None
        return F.embedding_bag(
            INDEX, w, OFFSETS, mode="sum", per_sample_weights=weights, sparse=sparse
        ) + s.sum()  # fmt: skip

    w, s, u = randn(7, 3), randn(7), randn(4, 3)
    dense = lz.Linearizer(lambda w, s: f(w, s, sparse=False)).at(w, s)
    sparse = lz.Linearizer(lambda w, s: f(w, s, sparse=True)).at(w, s)
    torch.testing.assert_close(sparse.vjp_fn(u), dense.vjp_fn(u))
    torch.testing.assert_close(sparse.jvp_fn(w, s), dense.jvp_fn(w, s))


def test_a_gradient_scaled_by_frequency_is_refused() -> None:
    """It is not the gradient of what was computed."""
    here = lz.Linearizer(
        lambda w: F.embedding_bag(INDEX, w, OFFSETS, mode="sum", scale_grad_by_freq=True)
    ).at(randn(7, 3))
    with pytest.raises(lz.errors.UnsupportedError, match="_embedding_bag_backward"):
        here.jvp_fn(randn(7, 3))


# -- attention --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16])
def test_attention_equals_forward_ad_of_the_math_kernel(name: str, dtype: torch.dtype) -> None:
    options = {
        k: o.to(dtype) if isinstance(o, torch.Tensor) and o.is_floating_point() else o
        for k, o in ATTENTION[name].items()
    }
    primals = [t.to(dtype) for t in QKV]
    v = [randn(*p.shape, seed=1).to(dtype) for p in QKV]

    def f(*x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*x, **options)

    here = lz.Linearizer(f).at(*primals)
    assert "flash" in str(here.program)
    exact = [p.double() for p in primals], [t.double() for t in v]
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].double()
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = torch.func.jvp(f, *(tuple(x) for x in exact))
    if "with a mask" in name:  # the mathematical kernel may give nan where nothing is seen
        expected[..., 2, :] = 0
    tolerance = {D: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    got = here.jvp_fn(*v)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_long_sequences_makes_no_whole_matrix(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 2048
    monkeypatch.setattr("linearize._transpose.kernel_formulas.BLOCK", 1 << 17)
    q, k, v = (randn(1, 1, length, 4, seed=s).float() for s in range(3))

    def f(*x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*x, is_causal=causal)

    here = lz.Linearizer(f).at(q, k, v)
    with Largest() as largest:
        first = here.jvp_fn(k, v, q)
        here.vjp_fn(q)
    assert largest.numel <= length * length // 16
    torch.testing.assert_close(first, here.jvp_fn(k, v, q))
    # The first queries see a part that is small enough to compute otherwise.
    few = (q[..., :50, :], k, v) if not causal else tuple(t[..., :50, :] for t in (q, k, v))
    along = (k[..., :50, :], v, q) if not causal else tuple(t[..., :50, :] for t in (k, v, q))
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = torch.func.jvp(f, tuple(few), tuple(along))
    torch.testing.assert_close(first[..., :50, :], expected, rtol=1e-4, atol=1e-5)


def test_attention_with_dropout_has_the_same_mask_in_both_products() -> None:
    """No fused kernel on the CPU drops out: this goes by the mathematical one."""
    here = lz.Linearizer(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    ).at(*QKV)
    v = [randn(*p.shape, seed=1) for p in QKV]
    u = randn(*here.value.shape, seed=2)
    other = sum(dot(a, b) for a, b in zip(here.vjp_fn(u), v, strict=True))
    torch.testing.assert_close(dot(u, here.jvp_fn(*v)), other)


def test_a_transformer_layer() -> None:
    """With the default attention on the CPU PyTorch has no J·v of it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, dtype=D)
    check(layer, randn(5, 3, 8))


# -- whole nodes ------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1.0, 100.0, 1e4])
def test_logcumsumexp_of_numbers_far_apart(spread: float) -> None:
    """The Jacobian written by hand: a softmax of every stretch from the start."""
    x, v = spread * randn(70), randn(70, seed=1)
    here = lz.Linearizer(lambda x: torch.logcumsumexp(x, 0)).at(x)
    matrix = torch.stack(
        [F.pad(x[: i + 1].softmax(0), (0, len(x) - i - 1)) for i in range(len(x))]
    )
    torch.testing.assert_close(here.jvp_fn(v), matrix @ v)
    torch.testing.assert_close(here.vjp_fn(v)[0], matrix.T @ v)


def test_logcumsumexp_after_minus_infinity() -> None:
    x = torch.cat([torch.full((3,), -math.inf, dtype=D), randn(4)])
    here = lz.Linearizer(lambda x: torch.logcumsumexp(x, 0)).at(x)
    v = randn(7, seed=1)
    got = here.jvp_fn(v)
    _, expected = torch.func.jvp(lambda x: torch.logcumsumexp(x, 0), (x[3:],), (v[3:],))
    torch.testing.assert_close(got, torch.cat([torch.zeros(3, dtype=D), expected]))


def test_matrix_exp_along_a_direction_much_larger_than_the_point() -> None:
    a, v = randn(4, 4), randn(4, 4, seed=1)
    here = lz.Linearizer(torch.linalg.matrix_exp).at(a)
    torch.testing.assert_close(here.jvp_fn(1e12 * v), 1e12 * here.jvp_fn(v))
    torch.testing.assert_close(here.jvp_fn(0 * v), torch.zeros_like(v))


def test_a_point_changed_in_place_is_refused() -> None:
    """Before the first product and between products."""
    for f, x in (
        (torch.linalg.matrix_exp, randn(3, 3)),
        (lambda x: torch.logcumsumexp(x, 0), randn(5)),
        (lambda x: torch.cdist(x, x, 3.0), randn(4, 2)),
        (lambda x: F.multi_margin_loss(x, torch.tensor([0, 1])), randn(2, 3)),
    ):
        x = x.clone()
        here = lz.Linearizer(f).at(x)
        x.add_(1)
        with pytest.raises(lz.errors.StalenessError):
            here.jvp_fn(x)
        here = lz.Linearizer(f).at(x)
        here.vjp_fn(torch.ones_like(here.value))
        x.add_(1)
        with pytest.raises(lz.errors.StalenessError):
            here.jvp_fn(x)


# -- complex tensors and real views of them ---------------------------------------------------


def _by_backward(write: Callable[[torch.Tensor], torch.Tensor]) -> Function:
    """Return the identity with a backward that changes its gradient in place."""

    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return write(grad * 1)

    return Changed.apply


def _real_part(g: torch.Tensor) -> torch.Tensor:
    g.real.mul_(3)
    return g


def _imaginary_part_of_the_conjugate(g: torch.Tensor) -> torch.Tensor:
    g.conj().imag[1:].mul_(3)
    return g


def _diagonal_of_pairs(g: torch.Tensor) -> torch.Tensor:
    torch.view_as_real(g)[..., 1].diagonal().zero_()
    return g


def _conjugate_view(g: torch.Tensor) -> torch.Tensor:
    seen = g.conj()
    g[0].mul_(2j)
    return seen + g


def _view_of_the_conjugate(g: torch.Tensor) -> torch.Tensor:
    g.conj()[0].mul_(2j)
    return g


def _complex_write_seen_in_pairs(g: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_real(g)
    g.t()[1].mul_(1 + 2j)
    return torch.complex(pairs[..., 1], pairs[..., 0])


def _piece_of_a_buffer(g: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros(4, 3, dtype=g.dtype)
    buffer[1:] = g
    buffer.real[2].add_(buffer.imag[1])
    return buffer[1:]


@pytest.mark.parametrize(
    "write",
    [
        _real_part,
        _imaginary_part_of_the_conjugate,
        _diagonal_of_pairs,
        _conjugate_view,
        _view_of_the_conjugate,
        _complex_write_seen_in_pairs,
        _piece_of_a_buffer,
    ],
)
def test_writes_through_real_and_conjugate_views(
    write: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Recorded and transposed, against the real matrix of what was written."""
    x = randn(3, 3, dtype=C)
    here = lz.Linearizer(_by_backward(write)).at(x)

    def column(i: int) -> torch.Tensor:
        unit = torch.zeros(18, dtype=D)
        unit[i] = 1
        result = write(torch.view_as_complex(unit.view(3, 3, 2)).clone())
        return torch.view_as_real(result.resolve_conj()).flatten()

    matrix = torch.stack([column(i) for i in range(18)], 1)
    v = randn(3, 3, dtype=C, seed=1)
    flat = torch.view_as_real(v).flatten()
    for _ in range(2):
        got = here.jvp_fn(v).resolve_conj()
        torch.testing.assert_close(torch.view_as_real(got).flatten(), matrix.T @ flat)
        (back,) = here.vjp_fn(v)
        torch.testing.assert_close(
            torch.view_as_real(back.resolve_conj()).flatten(), matrix @ flat
        )
