"""Settings of project 4. Flags: --families add reverse --lr 1e-3; presets: configs/*.yaml."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.config import BaseConfig, Precision
from common.files import CHECKPOINTS
from phase1_foundation.project1_minimal_gpt.config import check_seed
from phase1_foundation.project3_pretrain.config import MODEL as BASE_MODEL
from phase1_foundation.project3_pretrain.config import TrainConfig

TRAIN_COMMAND = "uv run python phase2_finetuning/project4_instruction_tuning/train.py"
OUT = CHECKPOINTS / "project4"
MODEL = OUT / "model.pt"  # made by train.py
Template = Literal["auto", "chatml", "smollm2", "llama3", "plain", "text"]  # templates.py has them


@dataclass
class DataConfig(BaseConfig):
    """What is learned from, and what the result is tried on."""

    data: list[str] = field(default_factory=lambda: ["tasks"])  # tasks (made here), sets by name, or files
    families: list[str] = field(default_factory=list)  # of tasks; also reasoning_gym:NAME; none: all of ours
    train_tasks: int = 40_000  # tasks to learn from
    test_tasks: int = 390  # other ones, answered before and after; as many again are the validation set
    turns: int = 3  # tasks in a conversation, at most
    limit: int = 0  # conversations from each set or file; 0: all
    validation_share: float = 0.05  # of these conversations
    template: Template = "auto"  # marks around what is said; auto: those that the tokenizer has, or new ones
    learn: Literal["answers", "everything"] = "answers"  # from which tokens; everything: prompts as well
    block_size: int = 256  # tokens of a row, and the longest conversation; at most the model's own
    batch_size: int = 16  # rows per step, of all processes together
    packing: bool = True  # several conversations in a row, none of which sees another; off: one

    def validate_config(self) -> None:
        """Raise ValueError for settings that no batches can have."""
        self.require_at_least(1, "train_tasks", "turns", "batch_size")
        self.require_at_least(2, "block_size")
        self.require_at_least(0, "test_tasks", "limit")
        if not self.data:
            raise ValueError("data () must name tasks or a file")
        if not 0 <= self.validation_share <= 0.5:
            raise ValueError(f"validation_share ({self.validation_share}) must be between 0 and 0.5")


@dataclass
class TuneConfig(TrainConfig):
    """How to tune: project 3's settings, with other defaults, and the noise."""

    max_steps: int = 560  # steps
    eval_interval: int = 140  # steps between evaluations; each also saves and samples
    lr: float = 2e-3  # peak learning rate of AdamW
    muon_lr: float = 0.02  # peak learning rate of Muon
    weight_decay: float = 0.0  # pull of matrices towards zero, times the learning rate
    neftune_alpha: float = 0.0  # noise on the embeddings while training (NEFTune); 5 to 15; 0: none
    patience: int = 3  # evaluations in a row without a lower validation loss that end a run; 0: none do
    out: Path = OUT  # folder for model.pt, tokenizer.json, losses.csv, loss.png, scores.csv

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot train."""
        super().validate_config()
        self.require_at_least(0, "neftune_alpha")
        if self.neftune_alpha and self.compile:
            raise ValueError(f"neftune_alpha ({self.neftune_alpha}) must be 0 with --compile")


@dataclass
class Config(BaseConfig):
    """Project 4: teach a language model to answer."""

    model: str = str(
        BASE_MODEL
    )  # a checkpoint, a folder of safetensors, a .gguf file, or a name: smollm2-135m
    data: DataConfig = field(default_factory=DataConfig)
    train: TuneConfig = field(default_factory=TuneConfig)


@dataclass
class EvaluateConfig(BaseConfig):
    """Project 4: let models answer tasks, and measure how likely they find real answers."""

    models: list[str] = field(
        default_factory=lambda: [str(BASE_MODEL), str(MODEL)]
    )  # before and after: checkpoints, folders, .gguf files, names
    data: list[str] = field(default_factory=lambda: ["tasks"])  # tasks (made here), sets by name, or files
    families: list[str] = field(default_factory=list)  # of tasks; also reasoning_gym:NAME; none: all of ours
    test_tasks: int = 390  # of all families together, none of which was learned from
    limit: int = 200  # conversations from each set or file; 0: all
    template: Template = "auto"  # marks around what is said; auto: those that the tokenizer has
    max_new_tokens: int = 48  # of an answer
    samples: int = 3  # answers to show, of each model
    seed: int = 1337  # of the tasks
    precision: Precision = "fp32"  # of matrix products
    device: str = "auto"  # auto: cuda, else mps, else cpu

    def validate_config(self) -> None:
        """Raise ValueError for limits below what can be measured."""
        self.require_at_least(1, "test_tasks", "max_new_tokens")
        self.require_at_least(0, "limit", "samples")
        check_seed(self.seed)
        if not self.models or not self.data:
            raise ValueError("models and data must each name at least one")


@dataclass
class ChatConfig(BaseConfig):
    """Project 4: talk to a model, or pipe what you say into it."""

    model: str = str(MODEL)  # a checkpoint, a folder of safetensors, a .gguf file, or a name: smollm2-135m
    template: Template = "auto"  # marks around what is said; auto: those that the tokenizer has
    system: str = ""  # what the model is told first; empty: nothing
    max_new_tokens: int = 200  # length of an answer
    temperature: float = 0.0  # 0: always the likeliest token; 1: the model's own odds
    top_k: int | None = None  # keep only the k likeliest tokens
    top_p: float | None = None  # keep the fewest tokens whose odds add up to p
    forget: bool = False  # answer each line for itself, as if nothing had been said before
    seed: int = 1337  # the same seed writes the same answers
    device: str = "auto"  # auto: cuda, else mps, else cpu

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot sample."""
        self.require_at_least(0, "temperature")
        self.require_at_least(1, "max_new_tokens", "top_k")
        check_seed(self.seed)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1")


@dataclass
class VisualizeConfig(BaseConfig):
    """Project 4: draw rows and masks, runs side by side, and scores before and after."""

    pictures: list[Literal["rows", "losses", "scores"]] = field(
        default_factory=lambda: ["rows", "losses", "scores"]
    )
    runs: list[Path] = field(default_factory=lambda: [OUT])  # folders of train.py to compare
    data: DataConfig = field(default_factory=DataConfig)  # whose rows are drawn
    model: str = str(MODEL)  # whose tokenizer cuts them
    out: Path = OUT  # folder for the pictures

    def validate_config(self) -> None:
        """Raise ValueError without anything to draw."""
        super().validate_config()
        if not self.runs:
            raise ValueError("runs () must name a folder of train.py")


@dataclass
class BenchmarkConfig(BaseConfig):
    """Project 4: speed of learning from conversations, packed and padded, beside Hugging Face's model."""

    model: str = str(BASE_MODEL)  # whose shape and tokenizer are used
    conversations: int = 32  # of tasks, in a batch
    block_size: int = 256  # tokens of a packed row
    repeats: int = 7  # timings of each; the median counts
    precision: Precision = "auto"  # of matrix products; auto: bf16 where the hardware has it
    device: str = "auto"  # auto: cuda, else mps, else cpu

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot be timed."""
        self.require_at_least(1, "conversations", "repeats")
        self.require_at_least(2, "block_size")
