"""Causal language models of some twenty million parameters, by their parameters.

They are those of transformers, untrained; the value is the loss on a batch of random tokens.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from benchmarks.case import Problem, seeded
from benchmarks.engines import NotInstalledError

BATCH, LENGTH, WORDS = 2, 128, 8000


def _problem(make: Any, dtype: torch.dtype) -> Problem:
    if importlib.util.find_spec("transformers") is None:
        raise NotInstalledError("transformers")
    net = seeded(make).to(dtype).eval()
    tokens = torch.randint(WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(4))
    named = {k: p.detach() for k, p in net.named_parameters()}

    def f(*primals: torch.Tensor) -> torch.Tensor:
        weights = dict(zip(named, primals, strict=True))
        given = {"input_ids": tokens, "labels": tokens, "use_cache": False}
        loss: torch.Tensor = torch.func.functional_call(net, weights, (), given).loss
        return loss

    def limit() -> Any:
        raise NotImplementedError("no limit by hand")

    return Problem(f, tuple(named.values()), limit)


def gpt2(dtype: torch.dtype) -> Problem:
    """GPT-2 with 6 layers of width 512."""

    def make() -> Any:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=WORDS,
            n_positions=LENGTH,
            n_embd=512,
            n_layer=6,
            n_head=8,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
        )
        return GPT2LMHeadModel(config)

    return _problem(make, dtype)


def llama(dtype: torch.dtype) -> Problem:
    """Llama with 6 layers of width 512 and grouped queries."""

    def make() -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=WORDS,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            attn_implementation="eager",
        )
        return LlamaForCausalLM(config)

    return _problem(make, dtype)
