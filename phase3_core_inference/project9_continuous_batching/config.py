"""Settings of project 9. Flags: --slots 16 --token_budget 128; presets: configs/*.yaml."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.config import BaseConfig, Precision
from common.files import CHECKPOINTS
from phase1_foundation.project1_minimal_gpt.config import check_seed
from phase1_foundation.project3_pretrain.config import SYSTEM

OUT = CHECKPOINTS / "project9"
Policy = Literal["continuous", "dynamic", "static"]


@dataclass
class EngineConfig(BaseConfig):
    """How requests share a model."""

    policy: Policy = "continuous"  # who may join a batch, and when: at each step, or when the last is over
    slots: int = 32  # sequences in the cache at once
    length: int = 1024  # longest sequence, prompt and answer, in tokens
    cache_tokens: int = 0  # tokens in the cache, of all sequences together; 0: slots times length
    token_budget: int = 256  # tokens computed in a step; above slots, so that prompts always get on
    chunked: bool = True  # cut prompts to the budget; off: each prompt is computed as a whole
    order: Literal["fcfs", "priority", "fair"] = "fcfs"  # of those who wait; fair: by service had per client
    aging: float = 10.0  # seconds of waiting that count as one step of priority; 0: they count nothing
    prompt_weight: float = 1.0  # what a token read costs a client
    output_weight: float = 2.0  # what a token written costs a client
    max_wait: float = 0.5  # seconds that a dynamic batch waits for company

    def validate_config(self) -> None:
        """Raise ValueError for an engine in which a request could wait for ever."""
        self.require_at_least(1, "slots", "length")
        self.require_at_least(0, "cache_tokens", "aging", "prompt_weight", "output_weight", "max_wait")
        if self.token_budget <= self.slots:
            rule = f"must be above slots ({self.slots}), or prompts may starve"
            raise ValueError(f"token_budget ({self.token_budget}) {rule}")
        if 0 < self.cache_tokens < self.length:
            rule = f"must be at least length ({self.length}), or a long request never fits"
            raise ValueError(f"cache_tokens ({self.cache_tokens}) {rule}")

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds."""
        return self.cache_tokens or self.slots * self.length


@dataclass
class GenerateConfig(BaseConfig):
    """Project 9: answer several prompts at once."""

    model: str = "smollm2-135m"  # a checkpoint, a folder of safetensors, a .gguf file, or a name
    prompts: list[str] = field(default_factory=lambda: ["What is a cache?", "Name three rivers."])
    system: str = SYSTEM  # what a chat model is told first; empty: nothing
    max_new_tokens: int = 60  # of each answer
    temperature: float = 0.7  # 0: always the likeliest token; 1: the model's own odds
    top_p: float = 0.95  # keep the fewest tokens whose odds add up to p; 1: all
    seed: int = 1337  # of the first answer; each further one has its own
    precision: Precision = "auto"  # of weights; auto: bf16 where the hardware has it
    interactive: bool = False  # answer what you type, prompts divided by |, until an empty line
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(slots=8))

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot write."""
        super().validate_config()
        self.require_at_least(1, "max_new_tokens")
        self.require_at_least(0, "temperature")
        check_seed(self.seed)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1")
        if not self.interactive and not all(self.prompts):
            raise ValueError("prompts () must each be a text")


@dataclass
class LoadConfig(BaseConfig):
    """Requests as they would come: how many, how fast, how long."""

    requests: int = 96  # in all
    arrivals: Literal["poisson", "bursty", "at_once"] = "poisson"  # bursty: the same rate, in clusters
    rate: float = 4.0  # requests per second, on average
    burstiness: float = 3.0  # standard deviation of the pause between bursty requests, in means
    prompt_tokens: float = 64.0  # median length of a prompt; lengths are lognormal
    output_tokens: float = 48.0  # median length of an answer; likewise
    spread: float = 1.0  # standard deviation of the logarithm of both
    clients: int = 1  # that the requests come from, in turn
    seed: int = 0  # of times and lengths

    def validate_config(self) -> None:
        """Raise ValueError for a load that cannot be made."""
        self.require_at_least(1, "requests", "prompt_tokens", "output_tokens", "clients")
        self.require_at_least(0, "burstiness", "spread")
        check_seed(self.seed)
        if not 0 < self.rate < float("inf"):
            raise ValueError(f"rate ({self.rate}) must be above 0")


@dataclass
class SimulateConfig(BaseConfig):
    """Project 9: what an engine would do under a load, by a cost model, in milliseconds."""

    costs: Path = OUT / "costs.json"  # made by benchmark.py; without it: those that are built in
    rates: list[float] = field(default_factory=lambda: [0.5, 1, 2, 3, 4, 6, 8])  # requests/s to try
    policies: list[Policy] = field(default_factory=lambda: ["continuous", "dynamic", "static"])
    first_token: float = 2.0  # seconds within which a good answer begins
    between_tokens: float = 0.2  # seconds between its tokens, at most on average
    out: Path = OUT  # folder for simulation.csv, simulation.png
    load: LoadConfig = field(default_factory=lambda: LoadConfig(requests=400))
    engine: EngineConfig = field(default_factory=EngineConfig)

    def validate_config(self) -> None:
        """Raise ValueError for a sweep without a point."""
        super().validate_config()
        if not self.rates or min(self.rates) <= 0 or not self.policies:
            raise ValueError(f"rates ({self.rates}) must be above 0, and policies at least one")


@dataclass
class BenchmarkConfig(BaseConfig):
    """Project 9: real engines under one load, side by side, and the simulator beside them."""

    model: str = "smollm2-135m"  # a checkpoint, a folder of safetensors, a .gguf file, or a name
    random: bool = False  # the model's shape with random weights
    precision: Precision = "auto"  # of weights; auto: bf16 where the hardware has it
    repeats: int = 3  # rounds, contestants in turn; medians count
    steady_steps: int = 30  # steps timed with all slots writing, for the engine's own share
    device: str = "auto"  # auto: cuda, else mps, else cpu
    out: Path = OUT  # folder for costs.json, benchmark.png
    load: LoadConfig = field(
        default_factory=lambda: LoadConfig(
            requests=192, arrivals="at_once", prompt_tokens=16, output_tokens=16, spread=1.5
        )
    )
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(length=512))

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot be timed."""
        super().validate_config()
        self.require_at_least(1, "repeats", "steady_steps")


@dataclass
class VisualizeConfig(BaseConfig):
    """Project 9: draw slots over time, stalls, fairness, and latency under load."""

    pictures: list[Literal["slots", "stalls", "fairness", "latency"]] = field(
        default_factory=lambda: ["slots", "stalls", "fairness", "latency"]
    )
    costs: Path = OUT / "costs.json"  # made by benchmark.py; without it: those that are built in
    out: Path = OUT  # folder for the PNGs
