"""What the tests of project 1 share: a text, settings that train in a second, and a model so trained."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from phase1_foundation.project1_minimal_gpt import train
from phase1_foundation.project1_minimal_gpt.config import Config, GPTConfig, TrainConfig

SENTENCE = "to be or not that is the question whether ’tis nobler in the mind 🙂\n"


def random_words(count: int = 1300) -> str:
    """Return a text of random words of a known play, about five characters each, the same every time."""
    return " ".join(random.Random(0).choices(SENTENCE.split(" "), k=count))


@dataclass
class Trained:
    """A finished run: its settings, the loss of every step, and the folder that it wrote."""

    config: Config
    losses: list[float]
    out: Path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of about 6,000 characters."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(random_words(), encoding="utf-8")
    return path


def tiny_config(text_file: Path, out: Path, **changes: Any) -> Config:
    """Settings that train in a second, with dropout, so that a lost random state would show."""
    model: dict[str, Any] = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.1}
    how: dict[str, Any] = {
        "data": str(text_file),
        "out": out,
        "batch_size": 8,
        "max_steps": 40,
        "eval_interval": 15,
        "sample_tokens": 5,
        "warmup_steps": 5,
        "device": "cpu",
    }
    model |= {name: changes.pop(name) for name in list(changes) if name in GPTConfig.__dataclass_fields__}
    return Config(GPTConfig(**model), TrainConfig(**(how | changes)))


@pytest.fixture(scope="session")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny model, trained without interruption."""
    config = tiny_config(text_file, tmp_path_factory.mktemp("trained"))
    return Trained(config, train.run(config), config.train.out)
