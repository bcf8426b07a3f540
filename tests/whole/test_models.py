"""Real models: every family of modules, and the ways in which models are put together.

J·v is compared with finite differences, Jᵀ·u with PyTorch's engine, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import linearize as lz
from tests.support.comparing import CALLS, Counted, close, compare, same_draws
from tests.support.functions import rand
from tests.support.references import like

D = torch.float64
# `torch.func.jvp`, a reference, compiles something when it is first called.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a module in float64 with numbers of its own, also where it starts with zeros."""
    with same_draws():
        module = make().double()
        for p in module.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    return module


def applied(module: nn.Module, seed: int = 0) -> Callable[..., Any]:
    """Return a function of parameters and inputs that draws the same at each call."""

    def f(parameters: dict[str, torch.Tensor], *inputs: Any) -> Any:
        with same_draws(seed):
            return functional_call(module, parameters, inputs)

    return f


def check(make: Callable[[], nn.Module], *inputs: Any, train: bool = True, **how: Any) -> None:
    """Compare the products with respect to parameters and inputs."""
    module = built(make).train(train)
    parameters = {k: p.detach().clone() for k, p in module.named_parameters()}
    compare(applied(module), parameters, *inputs, **how)


# -- the families ---------------------------------------------------------------------------

IMAGE, SERIES, VOLUME, TABLE = rand(2, 4, 6, 6), rand(2, 4, 9), rand(1, 2, 4, 4, 4), rand(5, 4)

FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "Linear": (lambda: nn.Linear(4, 3), (TABLE,)),
    "Bilinear": (lambda: nn.Bilinear(4, 4, 2), (TABLE, rand(5, 4, seed=1))),
    "Embedding": (lambda: nn.Embedding(7, 3), (torch.tensor([[1, 2, 1], [6, 0, 1]]),)),
    "EmbeddingBag": (
        lambda: nn.EmbeddingBag(7, 3, mode="mean"),
        (torch.tensor([1, 2, 1, 6, 0]), torch.tensor([0, 2])),
    ),
    "Conv1d": (lambda: nn.Conv1d(4, 3, 3, stride=2, padding=1), (SERIES,)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"), (IMAGE,)),
    "Conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (IMAGE,)),
    "Conv2d, reflected": (
        lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"),
        (IMAGE,),
    ),
    "Conv3d": (lambda: nn.Conv3d(2, 2, 2), (VOLUME,)),
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1),
        (IMAGE,),
    ),
    "MaxPool2d": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.MaxPool2d(2)), (IMAGE,)),
    "AvgPool2d": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.AvgPool2d(3, 1, 1)), (IMAGE,)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((2, 3)), (IMAGE,)),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(2), (IMAGE,)),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), (IMAGE.abs() + 0.1,)),
    "FractionalMaxPool2d": (lambda: nn.FractionalMaxPool2d(2, output_size=3), (IMAGE,)),
    "Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), (IMAGE,)),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), (IMAGE,)),
    "Fold": (lambda: nn.Sequential(nn.Unfold(3), nn.Fold((6, 6), 3)), (IMAGE,)),
    "RNN": (lambda: nn.RNN(4, 3, nonlinearity="relu", num_layers=2), (rand(6, 2, 4),)),
    "RNNCell": (lambda: nn.RNNCell(4, 3), (TABLE, rand(5, 3))),
    "LSTM": (lambda: nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True), (rand(2, 5, 4),)),
    "LSTM, projected": (lambda: nn.LSTM(4, 5, proj_size=2), (rand(4, 2, 4),)),
    "LSTMCell": (lambda: nn.LSTMCell(4, 3), (TABLE,)),
    "GRU": (
        lambda: nn.GRU(4, 3, bidirectional=True),
        (rand(5, 2, 4), rand(2, 2, 3, seed=4)),
    ),
    "GRUCell": (lambda: nn.GRUCell(4, 3), (TABLE, rand(5, 3, seed=3))),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2), (rand(5, 2, 4),) * 3),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        (rand(2, 5, 4),),
    ),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(4, 2, 8, dropout=0.1, activation="gelu"),
        (rand(3, 2, 4), rand(5, 2, 4, seed=1)),
    ),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (TABLE,)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4, momentum=None), (IMAGE,)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2, track_running_stats=False), (VOLUME,)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (IMAGE,)),
    "LayerNorm": (lambda: nn.LayerNorm((6, 6)), (IMAGE,)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (IMAGE,)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (TABLE,)),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), (IMAGE,)),
    "Dropout": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4)), (TABLE,)),
    "Dropout2d": (lambda: nn.Dropout2d(0.4), (IMAGE,)),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.4), (TABLE,)),
    "FeatureAlphaDropout": (lambda: nn.FeatureAlphaDropout(0.4), (IMAGE,)),
    "RReLU": (lambda: nn.RReLU(), (TABLE,)),
    "PReLU": (lambda: nn.PReLU(4), (TABLE,)),
    "GLU": (lambda: nn.GLU(), (TABLE,)),
    "GELU": (lambda: nn.GELU("tanh"), (TABLE,)),
    "SiLU": (lambda: nn.SiLU(inplace=False), (TABLE,)),
    "Mish": (lambda: nn.Mish(), (TABLE,)),
    "Softmax": (lambda: nn.Softmax(-1), (TABLE,)),
    "MultiMargin": (lambda: nn.MultiMarginLoss(), (TABLE, torch.tensor([0, 1, 3, 2, 0]))),
    "CrossEntropy": (lambda: nn.CrossEntropyLoss(), (TABLE, torch.tensor([0, 1, 3, 2, 0]))),
    "AdaptiveLogSoftmax": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 6, cutoffs=[2]),
        (TABLE, torch.tensor([0, 1, 3, 5, 4])),
    ),
    "CosineSimilarity": (lambda: nn.CosineSimilarity(), (TABLE, rand(5, 4, seed=1))),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    make, inputs = FAMILIES[name]
    check(make, *inputs)


@pytest.mark.parametrize(
    "name",
    [
        "BatchNorm1d",
        "BatchNorm2d",
        "InstanceNorm2d",
        "Dropout",
        "RReLU",
        "TransformerEncoderLayer",
        "MultiheadAttention",
    ],
)
def test_family_in_eval_mode(name: str) -> None:
    make, inputs = FAMILIES[name]

    def used() -> nn.Module:
        module = make()
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
        return module

    check(used, *inputs, train=False)


def test_a_whole_transformer_with_masks() -> None:
    model = built(lambda: nn.Transformer(4, 2, 1, 1, 8, dropout=0.1, batch_first=True)).train()
    mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=D)
    padding = torch.tensor([[False, False, False, True], [False] * 4])

    def f(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with same_draws():
            return model(source, target, tgt_mask=mask, src_key_padding_mask=padding)

    compare(f, rand(2, 4, 4), rand(2, 3, 4, seed=1))


def test_the_encoder_in_eval_mode() -> None:
    """Its fast path has no derivative; PyTorch leaves it where something requires grad."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = built(lambda: nn.TransformerEncoder(layer, 2)).eval()
    compare(model, rand(2, 3, 4))


def test_sequences_of_different_lengths() -> None:
    lstm = built(lambda: nn.LSTM(4, 3))

    def f(x: torch.Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3])
        out, (h, _) = lstm(packed)
        return nn.utils.rnn.pad_packed_sequence(out)[0], h

    compare(f, rand(5, 2, 4))


def test_a_padding_index_has_no_gradient() -> None:
    """PyTorch leaves its row out of the gradient on purpose, and so do both products."""
    weight, index = rand(7, 3), torch.tensor([1, 2, 6, 1])
    here = lz.Linearizer(lambda w: F.embedding(index, w, padding_idx=1)).at(weight)
    learns = (torch.arange(7) != 1).to(D)[:, None]
    for call in range(CALLS):
        v, u = rand(7, 3, seed=call), rand(4, 3, seed=call)
        torch.testing.assert_close(here.jvp_fn(v), (v * learns)[index])
        expected = torch.zeros(7, 3, dtype=D).index_add(0, index, u) * learns
        torch.testing.assert_close(here.vjp_fn(u)[0], expected)


# -- messages on a graph --------------------------------------------------------------------

SOURCE, TARGET = torch.tensor([0, 1, 2, 3, 3, 4, 0]), torch.tensor([1, 2, 0, 0, 4, 3, 3])


def by_index_add(h: torch.Tensor) -> torch.Tensor:
    return torch.zeros(5, 3, dtype=D).index_add(0, TARGET, h[SOURCE].tanh())


def by_scatter_add(h: torch.Tensor) -> torch.Tensor:
    index = TARGET[:, None].expand(-1, 3)
    return torch.zeros_like(h).scatter_add_(0, index, h.gather(0, SOURCE[:, None].expand(-1, 3)))


def by_scatter_reduce(how: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def aggregated(h: torch.Tensor) -> torch.Tensor:
        index = TARGET[:, None].expand(-1, 3)
        return h.scatter_reduce(0, index, h[SOURCE].sin(), how, include_self=False)

    return aggregated


def attention_on_edges(h: torch.Tensor) -> torch.Tensor:
    """Softmax over the edges that end in a node, as graph attention networks form it."""
    score = (h[SOURCE] * h[TARGET]).sum(-1)
    top = torch.full((5,), -torch.inf, dtype=D).scatter_reduce(0, TARGET, score, "amax")
    weight = (score - top.detach()[TARGET]).exp()
    total = torch.zeros(5, dtype=D).index_put((TARGET,), weight, accumulate=True)
    return torch.zeros(5, 3, dtype=D).index_add(
        0, TARGET, (weight / total[TARGET])[:, None] * h[SOURCE]
    )


@pytest.mark.parametrize(
    "layer",
    [by_index_add, by_scatter_add, attention_on_edges]
    + [by_scatter_reduce(how) for how in ("sum", "mean", "amax", "amin", "prod")],
    ids=["index_add", "scatter_add", "attention", "sum", "mean", "amax", "amin", "prod"],
)
def test_messages_on_a_graph(layer: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def f(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return layer(layer(h @ w).relu() + h)

    compare(f, rand(5, 3), rand(3, 3, seed=1))


def test_messages_by_a_sparse_matrix() -> None:
    """A sparse adjacency matrix that is fixed; its products with dense ones are linear."""
    edges = torch.stack([TARGET, SOURCE])
    matrix = torch.sparse_coo_tensor(edges, rand(7), (5, 5), check_invariants=True).coalesce()
    compare(lambda h, w: torch.sparse.mm(matrix, (h @ w).tanh()), rand(5, 3), rand(3, 3, seed=1))


# -- what a model keeps ---------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("primal", ["input", "parameters"])
def test_running_statistics_move_once(momentum: float | None, primal: str) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4, momentum=momentum), nn.ReLU())

    model, other = built(make), built(make)
    other(SERIES)
    if primal == "input":
        counted = Counted(model)
        here = lz.Linearizer(counted).at(SERIES)
    else:
        counted = Counted(lambda p: functional_call(model, p, (SERIES,)))
        here = lz.Linearizer(counted).at(dict(model.named_parameters()))
    for call in range(CALLS):
        here.jvp_fn(
            *like((SERIES,), call)
            if primal == "input"
            else like((dict(model.named_parameters()),), call)
        )
        here.vjp_fn(like(here.value, call))
    assert counted.runs == 1
    for (name, mine), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    assert int(model[1].num_batches_tracked) == 1


def test_spectral_norm_does_one_power_iteration() -> None:
    """Its vectors move at each run in train mode: products must belong to the run's vectors."""

    def make() -> nn.Module:
        return parametrizations.spectral_norm(nn.Linear(4, 3))

    model, other = built(make).train(), built(make).train()
    expected = other(TABLE).detach()
    here = lz.Linearizer(model).at(TABLE)
    torch.testing.assert_close(here.value, expected)
    weight = torch.linalg.lstsq(TABLE, here.value - model.bias.detach()).solution
    for call in range(CALLS):
        v = rand(5, 4, seed=call)
        torch.testing.assert_close(here.jvp_fn(v), v @ weight)
    for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["Dropout", "LSTM", "attention", "functional"])
def test_one_mask_for_value_and_products(kind: str) -> None:
    """f draws anew at each run; value, J·v and Jᵀ·u must come from one draw."""
    drawn = {
        "Dropout": lambda: nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3)),
        "LSTM": lambda: nn.LSTM(4, 8, 2, dropout=0.5),
        "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5),
        "functional": lambda: nn.Sequential(nn.Linear(4, 3), nn.RReLU()),
    }
    model = built(drawn[kind])
    x = rand(5, 2, 4)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(5)
        counted = Counted(lambda x: model(x)[0] if kind == "LSTM" else model(x))
        here = lz.Linearizer(counted).at(x)

        def again(x: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(5)
            return counted.f(x)

        expected = compare(again, x)
        for call in range(CALLS):
            v, u = rand(5, 2, 4, seed=call), like(here.value, call)
            close(here.jvp_fn(v), expected.jvp_fn(v), 1e-12)
            close(here.vjp_fn(u), expected.vjp_fn(u), 1e-12)
        close(here.value, expected.value, 0.0)
        assert counted.runs == 1
    finally:
        torch.set_rng_state(state)


class Tied(nn.Module):
    """A weight used as the embedding and as the output layer, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.middle = nn.Linear(4, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embedding.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 4))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.out(self.middle(self.embedding(index) * self.scale).tanh())


def test_tied_weights() -> None:
    model = built(Tied)
    index = torch.tensor([0, 3, 5, 3])
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    assert len(parameters) == 3
    # `functional_call` ties by itself: one primal stands for both uses.
    compare(lambda p: functional_call(model, p, (index,)), parameters)


def test_parameters_and_buffers_as_primals() -> None:
    model = built(Tied)
    index = torch.tensor([0, 3, 5, 3])
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    compare(lambda p, b: functional_call(model, (p, b), (index,)), parameters, buffers)


@pytest.mark.parametrize("frozen", ["none", "some", "all"])
def test_parameters_with_and_without_grad(frozen: str) -> None:
    """The Jacobian with respect to the input does not depend on what else requires grad."""
    model = built(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)))
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(frozen == "none" or (frozen == "some" and i % 2 == 0))
    compare(model, TABLE)
    assert all(p.grad is None for p in model.parameters())
    # As primals, those that are frozen have tangents like the others.
    compare(lambda p: functional_call(model, p, (TABLE,)), dict(model.named_parameters()))


def test_the_parameters_of_a_model_in_place_of_f() -> None:
    """A function that reads its parameters from the module has no tangent for them."""
    model = built(lambda: nn.Linear(4, 3))
    here = compare(model, TABLE)
    with torch.no_grad():
        model.bias.add_(1.0)  # J does not read the bias
    torch.testing.assert_close(here.jvp_fn(TABLE), TABLE @ model.weight.detach().T)
    with torch.no_grad():
        model.weight.mul_(2.0)
    with pytest.raises(lz.errors.StalenessError):
        here.jvp_fn(TABLE)


# -- parametrizations -----------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


def symmetric() -> nn.Module:
    linear = nn.Linear(4, 4)
    parametrize.register_parametrization(linear, "weight", Symmetric())
    return linear


PARAMETRIZED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "weight_norm, conv": lambda: parametrizations.weight_norm(nn.Conv1d(4, 3, 2), dim=1),
    "orthogonal, exp": lambda: parametrizations.orthogonal(
        nn.Linear(4, 4), orthogonal_map="matrix_exp"
    ),
    "orthogonal, cayley": lambda: parametrizations.orthogonal(
        nn.Linear(4, 4), orthogonal_map="cayley"
    ),
    "orthogonal, householder": lambda: parametrizations.orthogonal(
        nn.Linear(4, 3), orthogonal_map="householder"
    ),
    "own": symmetric,
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrizations(name: str) -> None:
    check(PARAMETRIZED[name], SERIES if "conv" in name else TABLE)


def test_spectral_norm_in_eval_mode() -> None:
    """In eval mode the vectors stay, and the norm is a function of the weight alone."""
    check(lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), TABLE, train=False)


def test_cached_parametrizations() -> None:
    model = built(lambda: parametrizations.weight_norm(nn.RNNCell(4, 4), "weight_hh"))

    def f(x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(2, 4, dtype=D)
        with parametrize.cached():
            for step in x:
                h = model(step, h)
        return h

    compare(f, rand(3, 2, 4))


# -- torch.func and autograd inside f ---------------------------------------------------------


def energy(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x.roll(1) ** 2).sum() + x.prod()


INSIDE: dict[str, Callable[[torch.Tensor], Any]] = {
    "vmap": lambda x: torch.vmap(lambda r: r.sin() * r.sum())(x),
    "vmap over a closure": lambda x: torch.vmap(lambda i: (x * i).cos())(
        torch.arange(3.0).double()
    ),
    "vmap of a matrix product": lambda x: torch.vmap(torch.mv, in_dims=(None, 0))(x.T @ x, x),
    "nested vmap": lambda x: torch.vmap(torch.vmap(lambda a, b: a * b.exp()))(x, x.cos()),
    "grad": lambda x: torch.func.grad(energy)(x.flatten()),
    "grad_and_value": lambda x: torch.func.grad_and_value(energy)(x.flatten()),
    "grad of grad": lambda x: torch.func.grad(lambda y: torch.func.grad(energy)(y).sin().sum())(
        x.flatten()
    ),
    "vmap of grad": lambda x: torch.vmap(torch.func.grad(energy))(x),
    "jacrev": lambda x: torch.func.jacrev(lambda y: y.sin() * y.sum())(x.flatten()),
    "jacfwd": lambda x: torch.func.jacfwd(lambda y: y.sin() * y.sum())(x.flatten()),
    "hessian": lambda x: torch.func.hessian(energy)(x.flatten()),
    "jvp": lambda x: torch.func.jvp(torch.tanh, (x,), (x.cos(),))[1],
    "vjp": lambda x: torch.func.vjp(torch.tanh, x)[1](x.cos())[0],
    "linearize": lambda x: torch.func.linearize(torch.tanh, rand(3, 4))[1](x),
    "per-sample gradients": lambda x: torch.vmap(
        torch.func.grad(lambda w, r: F.linear(r, w).tanh().sum()), in_dims=(None, 0)
    )(x[:1], x),
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # func.linearize
@pytest.mark.parametrize("name", INSIDE)
def test_transforms_inside_f(name: str) -> None:
    compare(INSIDE[name], rand(3, 4), tol=1e-6)


def test_the_per_sample_gradients_of_a_module() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)))

    def loss(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(model, p, (x,)).square().sum()

    def f(p: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
        return torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(p, x)

    compare(f, {k: p.detach() for k, p in model.named_parameters()}, TABLE)


def gradient_inside(x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(energy(y), y, create_graph=True)[0].tanh()


def gradient_of_a_leaf(x: torch.Tensor) -> torch.Tensor:
    """The gradient at a point that does not depend on x, along something that does."""
    with torch.enable_grad():
        w = torch.ones(4, dtype=D, requires_grad=True)
        (g,) = torch.autograd.grad((w.sin() * x).sum(), w, create_graph=True)
        return g * x


def gradient_penalty(x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        (g,) = torch.autograd.grad(energy(y), y, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), y, create_graph=True)
        return h


def plain_gradient(x: torch.Tensor) -> torch.Tensor:
    """Without `create_graph`: a constant for whoever differentiates."""
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(y.pow(3).sum(), y)
    return g * 0 + 3 * x**2


def gradient_step(x: torch.Tensor) -> torch.Tensor:
    """Unrolled optimisation: each step is a gradient inside f."""
    with torch.enable_grad():
        w = torch.zeros(4, dtype=D, requires_grad=True)
        for _ in range(3):
            loss = ((w - x) ** 2).sum() + (w**4).sum()
            (g,) = torch.autograd.grad(loss, w, create_graph=True)
            w = w - 0.1 * g
        return w


@pytest.mark.parametrize(
    "f", [gradient_inside, gradient_of_a_leaf, gradient_penalty, plain_gradient, gradient_step]
)
def test_autograd_inside_f(f: Callable[[torch.Tensor], torch.Tensor]) -> None:
    compare(f, rand(4), tol=1e-6)


def test_backward_inside_f_leaves_gradients_where_it_puts_them() -> None:
    """f may train something on the way; the gradients it accumulates are its own affair."""
    w = nn.Parameter(rand(3))

    def f(x: torch.Tensor) -> torch.Tensor:
        w.grad = None
        with torch.enable_grad():
            (w * 2).sum().backward()
        return x * w.grad

    compare(f, rand(3))


# -- what is constant -------------------------------------------------------------------------


def test_regions_without_grad() -> None:
    """What f computes under `no_grad` or detaches is a constant of both products."""

    def f(x: torch.Tensor) -> Any:
        with torch.no_grad():
            scale = x.norm()
        with torch.inference_mode():
            steps = int((x > 0).sum())
        frozen = x.detach().exp()
        with torch.set_grad_enabled(False):
            mask = (x.cos() > 0).to(D)
        with torch.no_grad(), torch.enable_grad():
            inner = x.sin()
        return x / scale * steps + frozen * inner, mask * x, frozen

    x = rand(4)
    here = lz.Linearizer(Counted(f)).at(x)
    by_hand = torch.diag(int((x > 0).sum()) / x.norm() + x.exp() * x.cos())
    mask = (x.cos() > 0).to(D)
    for call in range(CALLS):
        v, u = rand(4, seed=call), [rand(4, seed=call + 10 * k) for k in range(1, 4)]
        out = here.jvp_fn(v)
        torch.testing.assert_close(out[0], by_hand @ v)
        torch.testing.assert_close(out[1], mask * v)
        assert not out[2].any()
        torch.testing.assert_close(here.vjp_fn(tuple(u))[0], by_hand @ u[0] + mask * u[1])


def test_straight_through_by_detach() -> None:
    """x + (round(x) - x).detach() has the derivative one, as its author wrote it."""
    x = 3 * rand(5)
    here = lz.Linearizer(lambda x: (x + (x.round() - x).detach()) ** 2).at(x)
    for call in range(CALLS):
        v = rand(5, seed=call)
        torch.testing.assert_close(here.jvp_fn(v), 2 * x.round() * v)
        torch.testing.assert_close(here.vjp_fn(v)[0], 2 * x.round() * v)


def test_a_target_network() -> None:
    """One copy of a model under no_grad, another one that is differentiated."""
    model = built(lambda: nn.Linear(4, 3))

    def f(p: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            target = functional_call(model, p, (TABLE,)).tanh()
        return F.mse_loss(functional_call(model, p, (TABLE,)), target, reduction="none")

    parameters = {k: q.detach() for k, q in model.named_parameters()}
    here = lz.Linearizer(f).at(parameters)
    y = functional_call(model, parameters, (TABLE,))
    for call in range(CALLS):
        (v,) = like((parameters,), call)
        moved = TABLE @ v["weight"].T + v["bias"]
        torch.testing.assert_close(here.jvp_fn(v), 2 * (y - y.tanh()) * moved)
