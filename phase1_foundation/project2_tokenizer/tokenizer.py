"""What every tokenizer of the course can do, and how special tokens are told from text that looks like them.

PAPERS
  [1] Neural Machine Translation of Rare Words with Subword Units, Sennrich, Haddow and Birch, 2016,
      arXiv:1508.07909
  [2] PEP 544: Protocols: Structural subtyping (static duck typing), Levkivskyi, Lehtosalo and Langa, 2017
  [3] Human Behavior and the Principle of Least Effort, Zipf, 1949
"""

import functools
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    PAPER: [1] Sec. 3, a fixed vocabulary in which any text can be written; as a protocol [2].
    PAPER CONTEXT: A network has a row of numbers for each token, so the tokens are fixed before it is
        trained. If they are words, any other word is "unknown" and lost; [1] takes pieces of words.
    INTUITION: A tokenizer is a code book, made once from a text (train), and from then on only looked up.
    IMPLEMENTATION: A class that inherits gets the methods that have a body here and must write the others.
        One that has them all is a Tokenizer without inheriting; project 1's are.
    WHY: A model needs to know nothing of what is inside: decode(encode(text)) == text is all.
    """

    special_tokens: dict[str, int]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding table needs."""

    @classmethod
    @abstractmethod
    def train_from_iterator(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learn a vocabulary from one text that comes in pieces; where it is cut does not matter."""

    @classmethod
    def train(cls, text: str, vocab_size: int, **settings: Any) -> Self:
        """Learn a vocabulary from a text, with the settings of train_from_iterator."""
        return cls.train_from_iterator([text], vocab_size, **settings)

    @abstractmethod
    def encode(self, text: str | bytes, allowed_special: Collection[str] = ()) -> list[int]:
        """Return the ids of a text, in which the allowed special tokens (or "all") count as such.

        ValueError if a name is not special, or for a lone surrogate in the text: half a character is none.
        """

    def encode_batch(
        self, texts: Iterable[str | bytes], allowed_special: Collection[str] = ()
    ) -> list[list[int]]:
        """Return the ids of each text."""
        return [self.encode(text, allowed_special) for text in texts]

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes that the ids stand for; ValueError if there is no such id."""

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Return the text that the ids stand for, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to a JSON file."""
        # Here, not above: token_file imports this module.
        from phase1_foundation.project2_tokenizer.token_file import save_tokenizer

        save_tokenizer(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a tokenizer that save wrote; ValueError if the file holds anything else."""
        from phase1_foundation.project2_tokenizer.token_file import load_tokenizer

        tokenizer = load_tokenizer(path)
        if not isinstance(tokenizer, cls):
            raise ValueError(f"{path} ({type(tokenizer).__name__}) must hold a {cls.__name__}")
        return tokenizer


class ChunkCache(dict[str, tuple[int, ...]]):
    """The ids of chunks, found by a function when they are first asked for, and remembered.

    PAPER: [3] the n-th most frequent word of a text occurs about 1/n times as often as the first.
    PAPER CONTEXT: So a few thousand words make up most of a text, in almost any language.
    INTUITION: Who has spelled "the" once need not spell it again.
    IMPLEMENTATION: Python calls __missing__ only for a key that is not there; any other costs one look-up, in
        C. A full cache is emptied: what is frequent is soon back. Long chunks are rare and not kept, so that
        the bound on entries bounds the memory.
    WHY: To merge the bytes of a chunk takes about a hundred times as long as to look its ids up.
    """

    def __init__(
        self, find: Callable[[str], tuple[int, ...]], entries: int = 1 << 16, length: int = 128
    ) -> None:
        super().__init__()
        self.find, self.entries, self.length = find, entries, length

    def __missing__(self, chunk: str) -> tuple[int, ...]:
        ids = self.find(chunk)
        if len(chunk) <= self.length:
            if len(self) >= self.entries:
                self.clear()
            self[chunk] = ids
        return ids


def as_text(text: str | bytes) -> str:
    """Return a text to encode: bytes that are not UTF-8 become lone surrogates, so a str must bring none."""
    if isinstance(text, bytes):
        return text.decode("utf-8", "surrogateescape")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text ({text[error.start]!r} at {error.start}) must be without lone surrogates: "
            "pass bytes to encode what is not Unicode"
        ) from None
    return text


def as_bytes(text: str) -> bytes:
    """Return the bytes of a text, or of a part of it, that as_text returned."""
    return text.encode("utf-8", "surrogateescape")


def join_tokens(tokens: Mapping[int, bytes], ids: Iterable[int]) -> bytes:
    """Return the bytes of the tokens with these ids."""
    try:
        return b"".join(map(tokens.__getitem__, ids))
    except KeyError as error:
        raise ValueError(f"id ({error}) must be one of the {len(tokens)} in the vocabulary") from None


def choose_special(special_tokens: dict[str, int], allowed: Collection[str]) -> dict[str, int]:
    """Return the special tokens that a caller allows: "all", or a collection of their names.

    Nothing is allowed unless the caller says so. Who types <|endoftext|> into a chat means 13 characters. If
    they became the control token, a user could end the document, or speak as the system.
    """
    if allowed == "all":
        return special_tokens
    if isinstance(allowed, str):
        raise ValueError(f'allowed_special ({allowed!r}) must be "all" or a collection of special tokens')
    for name in allowed:
        if name not in special_tokens:
            raise ValueError(
                f"allowed_special ({name!r}) must be one of {', '.join(special_tokens) or 'none'}"
            )
    return {name: special_tokens[name] for name in allowed}


def split_special(text: str, special_tokens: Collection[str]) -> Iterator[tuple[str, bool]]:
    """Cut the special tokens out of a text: (part, whether it is a special token), from left to right.

    Of several that begin in the same place the longest is meant; the shorter one would hide it for ever.
    """
    if not special_tokens:
        return iter([(text, False)] if text else [])
    parts = special_pattern(frozenset(special_tokens)).split(text)  # text and special token in turn
    return ((part, bool(i % 2)) for i, part in enumerate(parts) if part)


@functools.lru_cache(maxsize=64)
def special_pattern(special_tokens: frozenset[str]) -> re.Pattern[str]:
    """Compile a regular expression that finds special tokens, of those in one place the longest."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
