"""What the tests of project 4 share: project 3's small model and tokenizer, and the course's own marks."""

import dataclasses
from pathlib import Path

import pytest
import torch

from common.checkpoints import save_checkpoint
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.conftest import model, tokenizer  # noqa: F401
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project4_instruction_tuning.conversations import Conversation, Message
from phase2_finetuning.project4_instruction_tuning.embedding_resize import resize_embeddings
from phase2_finetuning.project4_instruction_tuning.templates import PLAIN

ROOM = 160  # block_size of the base model


@pytest.fixture(scope="session")
def marked(model: Decoder, tokenizer: Tokenizer) -> tuple[Decoder, Tokenizer]:  # noqa: F811
    """Model and tokenizer with the marks of PLAIN."""
    return resize_embeddings(model, tokenizer, PLAIN.specials)


@pytest.fixture(scope="session")
def checkpoint(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A base model as project 3 saves it, with room for a conversation; it has learned nothing yet."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    shape = {"block_size": ROOM, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    base = Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, **shape))
    tokenizer.save(folder / "tokenizer.json")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    entries = {"config": dataclasses.asdict(base.config), "model_state_dict": base.state_dict()}
    save_checkpoint(folder / "model.pt", tokenizer=text, **entries)
    return folder / "model.pt"


@pytest.fixture(scope="session")
def conversations() -> list[Conversation]:
    """Conversations of one to three turns, some with a system message, with answers of uneven length."""
    talks = []
    for number in range(23):
        talk = [Message("system", "Be brief.")] if number % 3 == 0 else []
        for turn in range(1 + number % 3):
            question = f"What is in the {'sea ' * (number % 4)}{turn}?"
            talk += [Message("user", question), Message("assistant", "fox " * (number % 5) + str(number))]
        talks.append(talk)
    return talks


def answers_of(conversation: Conversation) -> list[str]:
    """Return what the assistant says."""
    return [message.content for message in conversation if message.role == "assistant"]
