"""Text to numbers and back, in the two simplest ways: a number per character, a number per byte.

PAPERS
  [1] Language Models are Unsupervised Multitask Learners, Radford et al., 2019 (GPT-2)
  [2] A Neural Probabilistic Language Model, Bengio et al., 2003, JMLR 3

SYMBOLS (code = paper)
  vocab_size = |V|  number of different tokens [2]
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from common.files import atomic_write


class Tokenizer(ABC):
    """What every tokenizer of the course can do; project 2 states it as a protocol and widens it.

    PAPER: [2] Sec. 2 speaks of words of a vocabulary V; [1] Sec. 2.2 of what a vocabulary should be made of.
    PAPER CONTEXT: A network takes numbers from a fixed set. Words leave rare ones out; characters and bytes
        leave nothing out but make texts long. [1] goes between the two; project 2 builds that.
    INTUITION: A dictionary with numbered entries, read in both directions.
    IMPLEMENTATION: decode(encode(text)) == text, always; what cannot be encoded is an error, never a silent
        "?".
    WHY: A model is worthless without the exact numbering it was trained with, so the tokenizer saves itself.
    """

    special_tokens: dict[str, int] = {}  # noqa: RUF012  # these two families have none, and nothing adds any

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of different tokens."""

    @classmethod
    @abstractmethod
    def train_from_iterator(cls, texts: Iterable[str]) -> Self:
        """Return a tokenizer fit for these texts; where one text ends and the next begins does not matter."""

    @classmethod
    def train(cls, text: str) -> Self:
        """Return a tokenizer fit for this text."""
        return cls.train_from_iterator([text])

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return token ids. Raises ValueError, naming the character, for text that has no encoding."""

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes that the ids stand for.

        Raises ValueError for an id outside the vocabulary.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text.

        Bytes that are not UTF-8 (a token sequence cut inside a character) show as U+FFFD.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return what save() writes: plain strings, numbers, lists and dicts."""

    def save(self, path: Path | str) -> None:
        """Write the tokenizer as JSON."""
        with atomic_write(path) as file:
            json.dump(self.to_dict(), file, ensure_ascii=False)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what save() wrote. Raises ValueError for any other file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tokenizer ({path}) must be JSON: {error}") from error
        tokenizer = from_dict(content)
        if not isinstance(tokenizer, cls):
            raise ValueError(f"tokenizer ({path}) must be a {cls.__name__}, not a {type(tokenizer).__name__}")
        return tokenizer


class CharTokenizer(Tokenizer):
    """A number for each character that occurs in the training text.

    PAPER: none; [1] Sec. 2.2 lists character-level models as the alternative to words.
    PAPER CONTEXT: 65 characters make tinyshakespeare, so the embedding is tiny and all weights go into the
        blocks.
    INTUITION: The sorted list of characters; a character's number is its place.
    IMPLEMENTATION: Sorted by code point, so the same text always gives the same numbers.
    WHY: The price is a closed world: a character that the training text lacks cannot be encoded, and says so.
    """

    def __init__(self, chars: str) -> None:
        """Take the characters in the order of their ids. Raises ValueError for none, or one twice."""
        if not chars or len(set(chars)) != len(chars):
            counts = f"{len(chars)} characters, {len(set(chars))} different"
            raise ValueError(f"vocab ({counts}) must hold at least one, each once")
        self.chars = chars
        self.ids = {char: i for i, char in enumerate(chars)}

    @property
    def vocab_size(self) -> int:
        """Number of different characters."""
        return len(self.chars)

    @classmethod
    def train_from_iterator(cls, texts: Iterable[str]) -> Self:
        """Collect the characters of the texts."""
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        return cls("".join(sorted(seen)))

    def encode(self, text: str) -> list[int]:
        """Return one id per character."""
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            char = error.args[0]
            known = "".join(self.chars) if self.vocab_size <= 100 else f"{self.vocab_size} characters"
            raise ValueError(
                f"character ({char!r}, U+{ord(char):04X}) must be one that the training text has: {known!r}"
            ) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the characters' UTF-8 bytes."""
        return "".join(self.chars[_checked(i, self.vocab_size)] for i in ids).encode(
            "utf-8", errors="surrogatepass"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return kind and vocabulary."""
        return {
            "kind": "char",
            "vocab": list(self.chars),
            "merges": [],
            "special_tokens": {},
            "pattern": None,
        }


class ByteTokenizer(Tokenizer):
    """A number for each of the 256 bytes: any file in any language, with nothing to learn.

    PAPER: [1] Sec. 2.2: byte-level models need a vocabulary of 256 only, and can encode everything.
    PAPER CONTEXT: Unicode has well over 100,000 characters; UTF-8 spells each with one to four bytes.
    INTUITION: The file as it lies on the disk.
    IMPLEMENTATION: The id is the byte. A text cut inside a character decodes with U+FFFD at the cut.
    WHY: It never meets an unknown character; the price is up to four tokens per character.
    """

    @property
    def vocab_size(self) -> int:
        """256."""
        return 256

    @classmethod
    def train_from_iterator(cls, texts: Iterable[str]) -> Self:
        """Return the tokenizer; there is nothing to learn from the texts."""
        return cls()

    def encode(self, text: str) -> list[int]:
        """Return one id per UTF-8 byte."""
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            char = text[error.start]
            raise ValueError(
                f"character (U+{ord(char):04X}) must be text: half of a surrogate pair has no UTF-8 form"
            ) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes."""
        return bytes(_checked(i, 256) for i in ids)

    def to_dict(self) -> dict[str, Any]:
        """Return the kind; there is nothing else to know."""
        return {"kind": "byte", "vocab": [], "merges": [], "special_tokens": {}, "pattern": None}


def from_dict(content: Any) -> Tokenizer:
    """Return the tokenizer that `to_dict` described. Raises ValueError for anything else."""
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        vocab = content.get("vocab")
        if not isinstance(vocab, list) or not all(isinstance(char, str) and len(char) == 1 for char in vocab):
            raise ValueError("vocab must be a list of single characters")
        return CharTokenizer("".join(vocab))
    raise ValueError(f"kind ({kind!r}) must be 'char' or 'byte'")


def _checked(i: int, vocab_size: int) -> int:
    """Return the id.

    Raises ValueError if it is outside the vocabulary: a negative one would count from the end.
    """
    if not 0 <= i < vocab_size:
        raise ValueError(f"id ({i}) must be at least 0 and below vocab_size ({vocab_size})")
    return i
