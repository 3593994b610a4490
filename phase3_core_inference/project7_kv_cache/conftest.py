"""What the tests of project 7 share: small models in float64, and a check against no cache at all."""

from typing import Any

import pytest
import torch

from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder

V, LONGEST = 31, 40
SHAPE: dict[str, Any] = {"vocab_size": V, "block_size": LONGEST, "n_layer": 2, "n_head": 4, "n_embd": 32}
SHAPES = {
    "a key head for each query head": DecoderConfig(**SHAPE, n_kv_head=4),
    "grouped queries": DecoderConfig(**SHAPE, n_kv_head=2, mlp_hidden=48),
    "one key head for all": DecoderConfig(**SHAPE, n_kv_head=1, qk_norm=True),
    "gpt2": DecoderConfig.gpt2(**SHAPE),
}


def small_decoder(config: DecoderConfig) -> Decoder:
    """A float64 model whose weights are large enough for attention to matter."""
    torch.manual_seed(0)
    model = Decoder(config).double().eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=0.3).add_(0.5 * (weight.dim() == 1))
    return model


@pytest.fixture(scope="session", params=SHAPES)
def model(request: pytest.FixtureRequest) -> Decoder:
    """Each shape of attention in turn: MHA, GQA, MQA, and GPT-2's learned positions."""
    return small_decoder(SHAPES[request.param])


@pytest.fixture(scope="session")
def llama() -> Decoder:
    """One model with grouped queries."""
    return small_decoder(SHAPES["grouped queries"])
