"""Settings of project 5. Flags: --method dora --rank 16 --lr 2e-3; presets: configs/*.yaml."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from common.config import BaseConfig, Precision
from common.files import CHECKPOINTS
from phase1_foundation.project1_minimal_gpt.config import check_seed
from phase2_finetuning.project4_instruction_tuning.config import ChatConfig as PlainChatConfig
from phase2_finetuning.project4_instruction_tuning.config import DataConfig, Template, TuneConfig

TRAIN_COMMAND = "uv run python phase2_finetuning/project5_lora/train.py"
OUT = CHECKPOINTS / "project5"
ADAPTER = OUT / "adapter"  # made by train.py
Method = Literal["full", "lora", "rslora", "dora", "lora_plus", "pissa", "qlora", "prefix", "prompt"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass
class AdapterConfig(BaseConfig):
    """What is trained in the place of the model's own weights."""

    method: Method = "lora"  # full: the model's own weights
    rank: int = 8  # columns of B and rows of A
    alpha: float = 16.0  # B A counts alpha / rank (rslora: alpha / sqrt(rank))
    lora_dropout: float = 0.0  # share of its input that an adapter does not see while training
    targets: list[str] = field(
        default_factory=lambda: ["all-linear"]
    )  # matrices by transformers' names: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
    lr_ratio: float = 16.0  # of B's learning rate to A's (lora_plus)
    virtual_tokens: int = 16  # before every text (prefix, prompt)
    adam_bits: Literal[32, 8] = 32  # of each of the optimizer's two averages

    def validate_config(self) -> None:
        """Raise ValueError for what cannot be trained."""
        self.require_at_least(1, "rank", "virtual_tokens", "lr_ratio")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha ({self.alpha}) must be above 0")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout ({self.lora_dropout}) must be at least 0 and below 1")
        if not self.targets:
            raise ValueError("targets () must name at least one matrix, or all-linear")


@dataclass
class TrainConfig(TuneConfig):
    """How to tune: project 4's settings, with other defaults."""

    optimizer: Literal["muon", "adamw"] = "adamw"  # adapters are always AdamW's
    max_steps: int = 120  # steps
    eval_interval: int = 40  # steps between evaluations; each also saves and samples
    warmup_steps: int = 8  # steps over which the learning rate rises to its peak
    lr: float = 2e-3  # peak learning rate; adapters want about ten times that of full fine-tuning
    out: Path = OUT  # folder for adapter/, model.pt, losses.csv, loss.png, scores.csv


@dataclass
class Config(BaseConfig):
    """Project 5: teach a language model something new with few weights."""

    model: str = "smollm2-135m"  # a checkpoint, a folder of safetensors, a .gguf file, or a name
    tune: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(
        default_factory=lambda: DataConfig(train_tasks=6000, test_tasks=104, block_size=128, batch_size=4)
    )
    train: TrainConfig = field(default_factory=TrainConfig)

    def validate_config(self) -> None:
        """Raise ValueError for methods that do not go together."""
        super().validate_config()
        plain = self.tune.method == "full" and self.tune.adam_bits == 32
        if self.train.optimizer != "adamw" and not plain:
            raise ValueError(
                f"optimizer ({self.train.optimizer}) must be adamw for adapters and for adam_bits 8"
            )


@dataclass
class SweepConfig(BaseConfig):
    """Project 5: the same steps with other methods, ranks and learning rates, side by side."""

    methods: list[Method] = field(default_factory=lambda: ["full", "lora"])  # to compare
    ranks: list[int] = field(default_factory=lambda: [8])  # of adapters
    rates: list[float] = field(default_factory=lambda: [1e-3, 2e-3])  # of adapters; the best one counts
    full_rates: list[float] = field(default_factory=lambda: [1e-4, 2e-4])  # of full fine-tuning
    run: Config = field(
        default_factory=lambda: Config(
            data=DataConfig(train_tasks=6000, test_tasks=52, block_size=128, batch_size=4),
            train=TrainConfig(max_steps=60, eval_interval=60, out=OUT / "sweep"),
        )
    )  # all else

    def validate_config(self) -> None:
        """Raise ValueError for a sweep without runs."""
        super().validate_config()
        for name in ("methods", "ranks", "rates", "full_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} ({values}) must be at least one, none twice")
        for rank in self.ranks:
            if rank < 1:
                raise ValueError(f"ranks ({rank}) must be at least 1")
        for rate in self.rates + self.full_rates:
            if not rate > 0:
                raise ValueError(f"rates ({rate}) must be above 0")


@dataclass
class EvaluateConfig(BaseConfig):
    """Project 5: let a model answer tasks with and without adapters."""

    model: str = "smollm2-135m"  # a checkpoint, a folder of safetensors, a .gguf file, or a name
    adapters: list[Path] = field(default_factory=lambda: [ADAPTER])  # folders of train.py, or of peft
    families: list[str] = field(default_factory=list)  # of tasks; also reasoning_gym:NAME; none: all of ours
    test_tasks: int = 400  # of all families together, none of which was learned from
    template: Template = "auto"  # marks around what is said; auto: those that the tokenizer has
    max_new_tokens: int = 48  # of an answer
    samples: int = 3  # answers to show, of each
    seed: int = 1337  # of the tasks
    precision: Precision = "fp32"  # of matrix products
    device: str = "auto"  # auto: cuda, else mps, else cpu

    def validate_config(self) -> None:
        """Raise ValueError for limits below what can be measured."""
        self.require_at_least(1, "test_tasks", "max_new_tokens")
        self.require_at_least(0, "samples")
        check_seed(self.seed)


@dataclass
class ChatConfig(PlainChatConfig):
    """Project 5: talk to a model through its adapters, and change them while you talk."""

    model: str = "smollm2-135m"  # a checkpoint, a folder of safetensors, a .gguf file, or a name
    adapters: list[Path] = field(default_factory=lambda: [ADAPTER])  # folders of train.py, or of peft


@dataclass
class MergeConfig(BaseConfig):
    """Project 5: make a model and its adapter one model, for export.py, llama.cpp and all else."""

    model: str = "smollm2-135m"  # a checkpoint, a folder of safetensors, a .gguf file, or a name
    adapters: list[Path] = field(default_factory=lambda: [ADAPTER])  # folders; several are added up
    out: Path = OUT / "merged.pt"  # a checkpoint that every script takes as --model
