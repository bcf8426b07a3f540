"""Language and vision models built from a configuration, with the attention that is default.

PyTorch itself has no J·v of them: the fused attention kernel has neither forward mode nor a
differentiable backward. References are finite differences in float64 and native backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import functional_call

from tests.support.comparing import compare, same_draws
from tests.support.references import like

try:
    import torchvision as torchvision
except (ImportError, RuntimeError):
    # One made for another build of PyTorch, which other packages bring along, cannot be loaded;
    # transformers does without one that is not there.
    sys.modules["torchvision"] = None  # type: ignore[assignment]

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (extra `packages`)"
)
D = torch.float64
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TOKENS = torch.tensor([[3, 17, 4, 9, 1], [8, 8, 2, 30, 5]])


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=8, n_embd=12, n_layer=2, n_head=2, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    return transformers.BertModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def vit() -> Any:
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    return transformers.ViTModel(config)


MODELS: dict[str, Callable[[], Any]] = {"GPT-2": gpt2, "BERT": bert, "Llama": llama, "ViT": vit}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, train: bool) -> None:
    """With respect to the parameters; in train mode with the dropout of the one run."""
    with same_draws():
        model = MODELS[name]().to(D).train(train)
        for p in model.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
    kind = "pixel_values" if name == "ViT" else "input_ids"
    given = torch.linspace(-1, 1, 384, dtype=D).view(2, 3, 8, 8) if name == "ViT" else TOKENS
    assert model.config._attn_implementation == "sdpa"

    def f(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        with same_draws(1):
            return functional_call(model, parameters, (), {kind: given})[0]

    parameters = {k: p.detach() for k, p in model.named_parameters()}
    # Llama normalizes in float32, which differences feel; the adjoint identity does not.
    here = compare(f, parameters, tol=1e-2 if name == "Llama" else 1e-6)
    v, u = like(parameters, 50), like(here.value, 51)
    (back,) = here.vjp_fn(u)
    left = (u * here.jvp_fn(v)).sum()
    torch.testing.assert_close(left, sum((back[k] * v[k]).sum() for k in v), rtol=1e-5, atol=1e-6)


def test_hidden_states_as_primals() -> None:
    """With respect to what goes in, past the embedding."""
    with same_draws():
        model = gpt2().to(D).eval()
        embedded = model.transformer.wte(TOKENS).detach()
    compare(lambda h: model(inputs_embeds=h).logits, embedded, tol=1e-6)
