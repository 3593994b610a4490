"""What the tests of project 3 share: a text, and a model that was trained on it for a second."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoints import save_checkpoint
from phase1_foundation.project1_minimal_gpt.config import OptimizerConfig
from phase1_foundation.project1_minimal_gpt.optimizer import make_optimizers
from phase1_foundation.project1_minimal_gpt.train import train_step
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder

SENTENCES = (
    "The sky over the sea is blue. ",
    "The grass on the hill is green. ",
    "The fox in the snow is red. ",
    "Die Straße führt über die Brücke 🙂. ",
)


@pytest.fixture(scope="session")
def tokenizer() -> BPETokenizer:
    """A tokenizer with the special tokens of documents and of ChatML."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return BPETokenizer.train_from_iterator(SENTENCES * 3, 300, special_tokens=special)


@pytest.fixture(scope="session")
def model(tokenizer: BPETokenizer) -> Decoder:
    """A Decoder with grouped heads that knows the sentences by heart."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"block_size": 48, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    model = Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, **shape))
    (optimizer,) = make_optimizers(model, OptimizerConfig(optimizer="adamw", lr=1e-2))
    rows = [[tokenizer.special_tokens["<|endoftext|>"], *tokenizer.encode(text)] for text in SENTENCES]
    longest = max(map(len, rows))
    x = torch.tensor([(row * longest)[: longest + 1] for row in rows])
    for _ in range(80):
        train_step(model, [optimizer], x[:, :-1], x[:, 1:])
    return model.eval()


@pytest.fixture(scope="session")
def checkpoint(model: Decoder, tokenizer: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as train.py would save it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer.save(folder / "tokenizer.json")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    weights = {"config": asdict(model.config), "model_state_dict": model.state_dict(), "tokenizer": text}
    save_checkpoint(folder / "model.pt", **weights)
    return folder / "model.pt"
