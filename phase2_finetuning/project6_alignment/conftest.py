"""What the tests of project 6 share: a small model that can be asked, as a checkpoint."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from common.checkpoints import save_checkpoint
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project4_instruction_tuning.conversations import Message
from phase2_finetuning.project4_instruction_tuning.tasks import FAMILIES, make_tasks
from phase2_finetuning.project4_instruction_tuning.templates import PLAIN
from phase2_finetuning.project6_alignment.logprobs import answer_logprobs


@pytest.fixture(scope="session")
def tokenizer() -> BPETokenizer:
    """A tokenizer of the tasks' text with the marks of the course's own template."""
    texts = [f"{task.prompt} {task.answer}\n" for task in make_tasks(list(FAMILIES), 130, 0)]
    return BPETokenizer.train_from_iterator(texts, 300, special_tokens=list(PLAIN.specials))


@pytest.fixture(scope="session")
def policy_file(tokenizer: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, whose odds are not far from uniform."""
    torch.manual_seed(0)
    shape = DecoderConfig(vocab_size=tokenizer.vocab_size, block_size=96, n_layer=2, n_head=2, n_embd=32)
    folder = tmp_path_factory.mktemp("policy")
    tokenizer.save(folder / "tokenizer.json")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    weights = Decoder(shape).state_dict()
    save_checkpoint(folder / "model.pt", config=asdict(shape), model_state_dict=weights, tokenizer=text)
    return folder / "model.pt"


@pytest.fixture(scope="session")
def taught_file(policy_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after a hundred steps on counting letters: it answers with a number, right or wrong."""
    model, tokenizer = load_model(policy_file)
    examples = [
        PLAIN.encode(tokenizer, [Message("user", task.prompt), Message("assistant", task.answer)])
        for task in make_tasks(["count"], 320, 0)
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(100):
        some = [examples[i % 320] for i in range(32 * step, 32 * step + 32)]
        T = max(len(ids) for ids, _ in some)
        tokens = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in some])
        mask = torch.tensor([learned + [False] * (T - len(learned)) for _, learned in some])
        optimizer.zero_grad()
        (-answer_logprobs(model, tokens, mask).sum() / mask.sum()).backward()
        optimizer.step()
    entries = torch.load(policy_file, weights_only=True) | {"model_state_dict": model.state_dict()}
    path = tmp_path_factory.mktemp("taught") / "model.pt"
    save_checkpoint(path, **entries)
    return path
