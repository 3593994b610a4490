"""Settings of project 7. Flags: --cache ring --window 256; presets: configs/*.yaml."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.config import BaseConfig, Precision
from common.files import CHECKPOINTS
from phase1_foundation.project1_minimal_gpt.config import Source
from phase1_foundation.project3_pretrain.config import MODEL, DecoderConfig
from phase1_foundation.project3_pretrain.config import GenerateConfig as WriterConfig

CacheName = Literal["none", "growing", "slots", "static", "ring", "quantized", "heavy"]


@dataclass
class CacheConfig(BaseConfig):
    """Which past is remembered, and how."""

    window: int = 120  # ring: newest tokens that are remembered
    sinks: int = 4  # ring: first tokens that are, besides
    bits: Literal[8, 4, 2] = 4  # quantized: of a code
    group: int = 32  # quantized: tokens whose keys share a scale
    residual: int = 32  # quantized: newest tokens, in full
    budget: int = 124  # heavy: tokens that a head remembers

    def validate_config(self) -> None:
        """Raise ValueError for a cache that cannot be."""
        self.require_at_least(1, "window", "group", "residual")
        self.require_at_least(0, "sinks")
        self.require_at_least(2, "budget")


@dataclass
class GenerateConfig(WriterConfig):
    """Project 7: write, or chat, with a cache of your choice."""

    cache: CacheName = (
        "slots"  # none: read everything anew for each token; static: a compiled or recorded step
    )
    memory: CacheConfig = field(default_factory=CacheConfig)
    precision: Precision = "auto"  # of weights and cache; auto: bf16 where the hardware has it

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot write."""
        super().validate_config()
        self.memory.validate_config()


@dataclass
class EvaluateConfig(BaseConfig):
    """Project 7: what each cache costs in quality, and saves in memory."""

    model: str = str(MODEL)  # a checkpoint, a folder of safetensors, a .gguf file, or a name: smollm2-135m
    data: str = "stdlib"  # a corpus by name, or a text file
    source: Source = "auto"  # where a corpus by name comes from
    tokens: int = 256  # of each text; at most block_size
    texts: int = 4  # how many
    memory: CacheConfig = field(default_factory=lambda: CacheConfig(window=60, budget=64))
    precision: Precision = "fp32"  # of weights and cache
    device: str = "auto"  # auto: cuda, else mps, else cpu
    out: Path = CHECKPOINTS / "project7"  # folder for evaluate.csv

    def validate_config(self) -> None:
        """Raise ValueError for what cannot be measured."""
        super().validate_config()
        self.require_at_least(2, "tokens")
        self.require_at_least(1, "texts")


@dataclass
class VisualizeConfig(BaseConfig):
    """Project 7: draw memory, the roofline, and what a text without an end does to a window."""

    pictures: list[Literal["memory", "stream"]] = field(default_factory=lambda: ["memory", "stream"])
    model: str = str(MODEL)  # a checkpoint, a folder of safetensors, a .gguf file, or a name: smollm2-135m
    data: str = "stdlib"  # stream: a corpus by name, or a text file
    source: Source = "auto"  # where a corpus by name comes from
    tokens: int = 3000  # stream: length of the text
    window: int = 124  # stream: newest tokens that are remembered
    sinks: int = 4  # stream: first tokens that are, besides
    device: str = "auto"  # auto: cuda, else mps, else cpu
    out: Path = CHECKPOINTS / "project7"  # folder for the PNGs

    def validate_config(self) -> None:
        """Raise ValueError for what cannot be drawn."""
        self.require_at_least(1, "window", "sinks")
        if self.tokens <= 2 * (self.window + self.sinks):
            rule = f"must be above {2 * (self.window + self.sinks)}, twice window + sinks"
            raise ValueError(f"tokens ({self.tokens}) {rule}")


@dataclass
class BenchmarkConfig(BaseConfig):
    """Project 7: speed beside transformers, llama.cpp, and what the hardware could do at best."""

    model: DecoderConfig = field(default_factory=DecoderConfig.llama)
    gguf: str = "smollm2-135m"  # what llama.cpp runs, if it is there; none: nothing
    prompt_tokens: int = 64  # that writing goes on from
    new_tokens: int = 64  # written per timing
    prefill_tokens: int = 1000  # of the prompt that is read
    context: int = 512  # at which a cache is compared with none, and caches with each other
    batch: int = 8  # sequences that are read and written at once
    repeats: int = 5  # timings of each; the median counts
    compile: bool = True  # also the compiled step: minutes the first time, and a C++ compiler
    precision: Precision = "auto"  # of weights and cache; auto: bf16 where the hardware has it
    device: str = "auto"  # auto: cuda, else mps, else cpu

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot be timed."""
        super().validate_config()
        names = ("prompt_tokens", "new_tokens", "prefill_tokens", "context", "batch", "repeats")
        self.require_at_least(1, *names)
        self.model.require_at_least(1, "vocab_size")
        longest = max(self.prefill_tokens, self.context, self.prompt_tokens) + self.new_tokens
        if longest > self.model.block_size:
            raise ValueError(
                f"block_size ({self.model.block_size}) must be at least {longest}, the longest text"
            )
