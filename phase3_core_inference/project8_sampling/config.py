"""Settings of project 8. Flags: --temperature 0.7 --top_p 0.9; presets: configs/*.yaml."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.config import BaseConfig, Precision
from common.files import CHECKPOINTS
from phase1_foundation.project1_minimal_gpt.config import check_seed
from phase1_foundation.project3_pretrain.config import MODEL, SYSTEM

OUT = CHECKPOINTS / "project8"
Chat = Literal["auto", "yes", "no"]


@dataclass
class SamplingParams(BaseConfig):
    """How one request wants its tokens chosen. Every default switches its setting off."""

    temperature: float = 1.0  # 0: always the likeliest token; 1: the model's own odds
    top_n_sigma: float = 0.0  # keep logits within n standard deviations of the largest; 0: all
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 1.0  # keep the fewest tokens whose odds add up to p; 1: all
    min_p: float = 0.0  # keep tokens with at least this share of the likeliest one's odds
    typical_p: float = 1.0  # keep the tokens of most typical surprise whose odds add up to this; 1: all
    epsilon: float = 0.0  # keep tokens with at least these odds
    eta: float = 0.0  # keep tokens with at least min(eta, sqrt(eta) * exp(-entropy)) as odds
    mirostat: Literal[0, 1, 2] = 0  # hold the surprise at a level, by version 1 or 2; instead of the above
    mirostat_tau: float = 5.0  # that level, in bits per token
    mirostat_rate: float = 0.1  # how fast it is steered there
    repetition_penalty: float = 1.0  # divide (or multiply, if negative) the logits of all tokens seen
    presence_penalty: float = 0.0  # subtract from the logits of tokens written
    frequency_penalty: float = 0.0  # subtract for each time that a token was written
    no_repeat_ngram: int = 0  # never write a sequence of n tokens twice; 0: that is fine
    logit_bias: dict[int, float] = field(default_factory=dict)  # token id and what to add to its logit, ...
    watermark: float = 0.0  # add to the logits of the green tokens, by which the text can be told; 0: none
    watermark_share: float = 0.25  # of the vocabulary that is green
    watermark_key: int = 15485863  # secret from which the green tokens are made
    regex: str | None = None  # what is written must match it as a whole
    json_schema: str | None = None  # JSON text of a schema that what is written must satisfy
    stop: list[str] = field(default_factory=list)  # texts before which writing ends
    max_new_tokens: int = 200  # length of what is written, at most
    min_new_tokens: int = 0  # and at least, as far as stop tokens are concerned
    logprobs: int | None = None  # report the log-probability of each token, and of the n likeliest
    seed: int | None = None  # the same seed writes the same text, whoever is in the batch; none: any

    def validate_config(self) -> None:
        """Raise ValueError for settings that no token can be chosen with."""
        at_least_0 = ("temperature", "top_n_sigma", "top_k", "epsilon", "eta", "no_repeat_ngram")
        self.require_at_least(0, *at_least_0, "min_new_tokens", "logprobs", "mirostat_tau")
        self.require_at_least(1, "max_new_tokens")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature ({self.temperature}) must be 0 or at least 0.001")
        for name in ("min_p", "epsilon", "eta"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0 and below 1")
        for name in ("top_p", "typical_p"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be above 0 and at most 1")
        for name in ("repetition_penalty", "mirostat_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} ({getattr(self, name)}) must be above 0")
        for name in ("temperature", "presence_penalty", "frequency_penalty", "watermark"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} ({getattr(self, name)}) must be a finite number")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.mirostat not in (0, 1, 2):
            raise ValueError(f"mirostat ({self.mirostat}) must be 0, 1 or 2")
        if self.mirostat and self.temperature == 0:
            raise ValueError(f"temperature ({self.temperature}) must be above 0 for mirostat, which draws")
        others = [name for name, off in NEUTRAL.items() if getattr(self, name) != off and name != "mirostat"]
        if self.mirostat and others:
            raise ValueError(f"mirostat ({self.mirostat}) must be 0 beside {others[0]}: it takes its place")
        if self.watermark and not 0 < self.watermark_share < 1:
            raise ValueError(f"watermark_share ({self.watermark_share}) must be above 0 and below 1")
        if self.regex is not None and self.json_schema is not None:
            raise ValueError(f"regex ({self.regex}) must be none beside a json_schema")
        if "" in self.stop:
            raise ValueError("stop ('') must not be empty")
        for token, bias in self.logit_bias.items():
            if token < 0 or math.isnan(bias) or bias == math.inf:
                raise ValueError(f"logit_bias[{token}] ({bias}) must be of a token id, and finite or -inf")
        if self.seed is not None:
            check_seed(self.seed)


# The settings that cut the distribution, in the order in which they act, with the values that cut nothing.
NEUTRAL = {
    "top_n_sigma": 0.0,
    "top_k": 0.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon": 0.0,
    "eta": 0.0,
    "mirostat": 0.0,
}


@dataclass
class WriterConfig(BaseConfig):
    """Who writes, and what about."""

    model: str = str(MODEL)  # a checkpoint, a folder of safetensors, a .gguf file, or a name: smollm2-135m
    prompt: str = ""  # text to go on from, or what you say to a chat model; empty: the start of a document
    chat: Chat = "auto"  # ChatML around what you say; auto: if the tokenizer can
    system: str = SYSTEM  # what a chat model is told first; empty: nothing
    precision: Precision = "fp32"  # of the weights
    device: str = "auto"  # auto: cuda, else mps, else cpu


@dataclass
class GenerateConfig(BaseConfig):
    """Project 8: let a model write, with every way to choose its tokens."""

    writer: WriterConfig = field(default_factory=WriterConfig)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_samples: int = 1  # how many texts, all in one batch
    contrast: float = 0.0  # contrastive decoding: keep tokens with this share of the likeliest's odds; 0: off
    amateur: str = (
        ""  # the weaker model of the contrast; empty: the same one, which sees the last tokens only
    )
    amateur_context: int = 16  # tokens that it sees then
    interactive: bool = False  # answer what you type, until an empty line

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot write."""
        super().validate_config()
        self.require_at_least(1, "num_samples", "amateur_context")
        if not 0 <= self.contrast <= 1:
            raise ValueError(f"contrast ({self.contrast}) must be between 0 and 1")


@dataclass
class SearchConfig(BaseConfig):
    """Project 8: look for the text that scores best, instead of drawing one."""

    writer: WriterConfig = field(default_factory=WriterConfig)
    method: Literal["beam", "contrastive"] = "beam"  # beam search, or contrastive search
    beams: int = 4  # unfinished texts kept
    groups: int = 1  # of beams; from 2 on, diverse beam search
    diversity: float = 0.5  # what it costs a group to take a token that an earlier group took
    length_penalty: float = 1.0  # the score is the log-probability over length to this power
    early_stopping: Literal["yes", "no", "never"] = "no"  # stop once there are as many texts as beams
    alpha: float = 0.6  # contrastive: weight of the likeness to what was said
    top_k: int = 4  # contrastive: candidates at each step
    max_new_tokens: int = 60  # length of what is written, at most

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot search."""
        super().validate_config()
        self.require_at_least(1, "beams", "groups", "top_k", "max_new_tokens")
        self.require_at_least(0, "diversity")
        if self.beams % self.groups:
            raise ValueError(f"beams ({self.beams}) must be divisible by groups ({self.groups})")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha ({self.alpha}) must be between 0 and 1")


@dataclass
class DetectConfig(BaseConfig):
    """Project 8: say whether a text bears the watermark of a key."""

    text: str = ""  # the text; empty: one line after the other is asked for
    model: str = "smollm2-135m"  # whose tokenizer and vocabulary the text was written with
    watermark_share: float = 0.25  # of the vocabulary that is green
    watermark_key: int = 15485863  # secret from which the green tokens are made

    def validate_config(self) -> None:
        """Raise ValueError for a share that is none."""
        if not 0 < self.watermark_share < 1:
            raise ValueError(f"watermark_share ({self.watermark_share}) must be above 0 and below 1")


@dataclass
class VisualizeConfig(BaseConfig):
    """Project 8: draw what each setting does to one real distribution, and how a watermark is found."""

    model: str = "smollm2-135m"  # whose distribution
    prompt: str = "The best thing about the sea is"  # after which the next token is bet on
    tokens: int = 40  # likeliest tokens to show
    watermark_tokens: int = 120  # length of the marked and unmarked texts; 0: none
    watermark_texts: int = 8  # number of each
    out: Path = OUT  # folder for the PNGs

    def validate_config(self) -> None:
        """Raise ValueError for what cannot be drawn."""
        self.require_at_least(2, "tokens")
        self.require_at_least(0, "watermark_tokens")
        self.require_at_least(1, "watermark_texts")
        if not self.prompt:
            raise ValueError("prompt () must hold at least one character")


@dataclass
class BenchmarkConfig(BaseConfig):
    """Project 8: what choosing tokens costs beside making their logits."""

    model: str = "smollm2-135m"  # that makes the logits
    batch_size: int = 32  # requests
    context: int = 128  # tokens before the timed steps
    repeats: int = 15  # timings of each; the median counts
    schemas: int = 1000  # random JSON schemas to compile and to write by; 0: none
    max_new_tokens: int = 120  # of each of these documents
    precision: Precision = "fp32"  # of the model
    device: str = "auto"  # auto: cuda, else mps, else cpu

    def validate_config(self) -> None:
        """Raise ValueError for what cannot be timed."""
        self.require_at_least(1, "batch_size", "context", "repeats", "max_new_tokens")
        self.require_at_least(0, "schemas")
