r"""Tokenized text on disk: files of bare token ids that are read without being loaded, and a manifest.

PAPERS
  [1] Language Models are Few-Shot Learners (GPT-3), Brown et al., 2020, arXiv:2005.14165
  [2] Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism, Shoeybi et al.,
      2019, arXiv:1909.08053

A shard is  S d1 d1 d1 S d2 d2 S d3 ... S : a separator before each document and one at the end.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from common.files import atomic_write, make_folder

VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
PREPROCESS = "uv run python phase1_foundation/project3_pretrain/preprocess.py"
DTYPES = {"uint16": 1 << 16, "uint32": 1 << 32}  # how many ids each can tell apart
Tokens = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True)
class Shard:
    """What the manifest says of one file."""

    file: str
    split: str  # train or validation
    tokens: int  # separators among them
    documents: int
    text_bytes: int  # of the documents in UTF-8: what bits per byte divides by
    sha256: str


@dataclass(frozen=True)
class Manifest:
    r"""What a folder of shards holds.

    PAPER: none; [2]'s code describes its files of tokens by an index beside them.
    PAPER CONTEXT: Two bytes on a disk are a number; which word it means is known to one tokenizer only.
    INTUITION: The label on the box: what is in it, how much, and who packed it.
    IMPLEMENTATION: JSON, written last. Sizes and SHA-256 of every file are in it, the tokenizer's too.
    WHY: A file cut short and another vocabulary raise no error when they are read; training would learn
        noise.
    """

    dtype: str
    vocab_size: int
    separator: int  # token id
    tokenizer_sha256: str
    shards: list[Shard]
    made_from: dict[str, Any]  # the settings and files that preprocess.py was given
    version: int = VERSION

    def of(self, split: str) -> list[Shard]:
        """Return the shards of a split; ValueError if there are none."""
        shards = [shard for shard in self.shards if shard.split == split]
        if not shards:
            splits = sorted({shard.split for shard in self.shards})
            raise ValueError(f"split ({split}) must be one of {', '.join(splits)}")
        return shards

    def total(self, split: str, what: str) -> int:
        """Return the tokens, documents or text_bytes of a split."""
        return sum(getattr(shard, what) for shard in self.of(split))

    def check_vocab_size(self, vocab_size: int) -> None:
        """Raise ValueError unless a model of this vocabulary knows all tokens of the shards."""
        if vocab_size < self.vocab_size:
            raise ValueError(
                f"vocab_size ({vocab_size}) must be at least {self.vocab_size}, as in the shards"
            )

    def check_tokenizer(self, sha256: str) -> None:
        """Raise ValueError unless the shards were made with this tokenizer: other ids mean other words."""
        if sha256 != self.tokenizer_sha256:
            rule = f"must be the one that made the shards, {self.tokenizer_sha256[:12]}"
            raise ValueError(f"tokenizer ({sha256[:12]}) {rule}")

    def save(self, folder: Path) -> None:
        """Write the manifest; a folder that has one is complete."""
        with atomic_write(folder / MANIFEST) as file:
            json.dump(asdict(self), file, indent=1)


def load_manifest(folder: Path | str) -> Manifest:
    """Read the manifest of a folder and check it and the tokenizer; FileNotFoundError, ValueError."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no shards in {folder}; make them with: {PREPROCESS} --out {folder}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**values | {"shards": [Shard(**shard) for shard in values["shards"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"manifest ({path}) must be one that preprocess.py wrote: {error}") from None
    numbers = [manifest.vocab_size, manifest.separator]
    for shard in manifest.shards:
        numbers += [shard.tokens, shard.documents, shard.text_bytes]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"manifest ({path}) must count in whole numbers")
    if any(Path(shard.file).name != shard.file for shard in manifest.shards):
        raise ValueError(f"manifest ({path}) must name files beside it")
    if manifest.version != VERSION or manifest.dtype not in DTYPES:
        kind = f"version {manifest.version}, {manifest.dtype}"
        raise ValueError(f"manifest ({path}: {kind}) must be of version {VERSION}, {' or '.join(DTYPES)}")
    if not (folder / TOKENIZER).is_file():
        raise FileNotFoundError(f"no tokenizer {folder / TOKENIZER}; make it with: {PREPROCESS} --overwrite")
    manifest.check_tokenizer(file_sha256(folder / TOKENIZER))
    return manifest


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file; FileNotFoundError if it is not there."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def token_dtype(vocab_size: int) -> str:
    """Return the narrowest type for token ids below vocab_size."""
    return next(dtype for dtype, most in DTYPES.items() if vocab_size <= most)


def open_shard(folder: Path | str, manifest: Manifest, shard: Shard, verify: bool = True) -> Tokens:
    """Return the tokens (N,) of a shard as a memory map; ValueError unless it is what the manifest says.

    The length is always checked; `verify` reads the whole file once, about a gigabyte per second.
    """
    path = Path(folder) / shard.file
    if not path.is_file():
        raise FileNotFoundError(f"no shard {path}; make it with: {PREPROCESS} --overwrite")
    expected = shard.tokens * np.dtype(manifest.dtype).itemsize
    if (size := path.stat().st_size) != expected:
        raise ValueError(
            f"shard ({path}) must have {expected} bytes and has {size}: it is cut short or damaged"
        )
    if verify and file_sha256(path) != shard.sha256:
        raise ValueError(f"shard ({path}) must have the SHA-256 of the manifest: it is damaged")
    return np.memmap(path, np.dtype(manifest.dtype).newbyteorder("<"), "r")


class ShardWriter:
    r"""Write documents to a shard one after the other, with nothing but the current one in memory.

    PAPER: [1] Appendix B: documents are packed into sequences and divided by an end-of-text token; the code
        of [2] made memory-mapped files of ids the usual form of a corpus.
    PAPER CONTEXT: A corpus of 10 billion tokens has 20 GB as 16-bit ids and 80 GB as a list in memory would
        have.
    INTUITION: A shard is a tape of ids. Where a document begins, a separator stands on the tape.
    IMPLEMENTATION: The separator comes before its document, so the model also learns how documents begin,
        and a prompt is a separator and text. The last one closes the last document: its end is predicted
        too.
    WHY: The operating system maps the file into memory and reads the pages that are touched. So a loader
        starts at once, any window is a slice, and processes on one machine share a single copy.
    """

    def __init__(self, folder: Path, name: str, split: str, vocab_size: int, separator: int) -> None:
        self.path, self.split, self.separator = make_folder(folder) / name, split, separator
        self.dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self.tokens = self.documents = self.text_bytes = 0
        self.digest = hashlib.sha256()

    def __enter__(self) -> Self:
        self._writing = atomic_write(self.path, "wb")
        self._file = self._writing.__enter__()
        return self

    def add(self, ids: Iterable[int], text_bytes: int) -> None:
        """Append a document."""
        self._write([self.separator, *ids])
        self.documents += 1
        self.text_bytes += text_bytes

    def _write(self, ids: list[int]) -> None:
        content = np.array(ids, self.dtype).tobytes()
        self.digest.update(content)
        self._file.write(content)
        self.tokens += len(ids)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write([self.separator])
        self._writing.__exit__(kind, error, trace)

    def entry(self) -> Shard:
        """Return what the manifest should say; call it when the file is closed."""
        digest = self.digest.hexdigest()
        return Shard(self.path.name, self.split, self.tokens, self.documents, self.text_bytes, digest)


def documents_of(tokens: Tokens, separator: int) -> Iterator[Tokens]:
    """Yield the documents of a shard, without separators."""
    for start, end in pairwise(np.flatnonzero(tokens == separator)):
        yield tokens[start + 1 : end]
