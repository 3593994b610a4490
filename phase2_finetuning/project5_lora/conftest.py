"""What the tests of project 5 share: small models of both families, and the same models in transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.checkpoints import save_checkpoint
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.conftest import SENTENCES
from phase1_foundation.project3_pretrain.export import named_tensors
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.test_model import hugging_face

SHAPES = {
    "llama": DecoderConfig.llama(
        vocab_size=61, block_size=16, n_layer=2, n_embd=32, n_head=4, n_kv_head=2, mlp_hidden=48
    ),
    "gpt2": DecoderConfig.gpt2(vocab_size=61, block_size=16, n_layer=2, n_embd=32, n_head=4),
}


def make_model(family: str = "llama", dtype: torch.dtype = torch.float64) -> Decoder:
    """A Decoder whose every weight, biases and gains too, has a value at which a mistake would show."""
    torch.manual_seed(0)
    model = Decoder(SHAPES[family])
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model.to(dtype).eval()


def make_twin(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The same model in transformers, in float64 throughout."""
    twin = hugging_face(model.config, monkeypatch)
    missing, unexpected = twin.load_state_dict(dict(named_tensors(model, "hf")), strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise ValueError(f"weights ({missing}, {unexpected}) must be those of the twin")
    return twin


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small Llama that has learned nothing yet, with ChatML in its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = BPETokenizer.train_from_iterator(SENTENCES * 3, 300, special_tokens=special)
    tokenizer.save(folder / "tokenizer.json")
    torch.manual_seed(0)
    shape: dict[str, Any] = vars(SHAPES["llama"]) | {"vocab_size": tokenizer.vocab_size, "block_size": 96}
    model = Decoder(DecoderConfig(**shape))
    weights = {"config": shape, "model_state_dict": model.state_dict()}
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    save_checkpoint(folder / "model.pt", **weights, tokenizer=text)
    return folder / "model.pt"


@pytest.fixture
def tokens() -> torch.Tensor:
    """A batch of random tokens."""
    return torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(1))
