r"""Facts at the head of a GGUF file: names and values, the whole vocabulary among them, before the weights.

PAPERS
  [1] GGUF (docs/gguf.md of github.com/ggml-org/ggml), Gerganov and contributors, 2023
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

SCALARS = dict(
    zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
)  # [1]'s types, struct's letters
STRING, ARRAY = 8, 9
MAX_NAME = 100  # letters; [1] allows tensors 64, and no fact in use has more
MAX_HEAD = 2**26  # bytes; the largest vocabularies take a quarter of it


class Head:
    r"""The bytes at the head of a GGUF file, read value by value and never past their end.

    PAPER: [1] "File Structure": magic, version, number of tensors, number of facts, then each fact as
        name, type, value. A string is its length and its bytes; a list its type, its length and its values.
    PAPER CONTEXT: Before GGUF a model came as weights and half a dozen files beside it. llama.cpp put all of
        it in one file: hyperparameters, vocabulary, merges, chat template, weights.
    INTUITION: Every value says how long it is, so the reader just walks. What it must never do is believe
        a length: each one is checked against what is left of the file before anything of that size is made.
    IMPLEMENTATION: Little-endian, versions 2 and 3. struct reads a whole list of numbers in one call.
    WHY: A file of 49 bytes can claim a list of 2^40 numbers. The official gguf.GGUFReader 0.19 believes it,
        and takes memory until the machine has none; here that is one line of error.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.left = file, min(size, MAX_HEAD)

    def take(self, size: int, what: str) -> bytes:
        """Return the next bytes, or ValueError if there are not so many."""
        if size > self.left:
            raise ValueError(
                f"{what} ({size} bytes) must fit in the {self.left} bytes that are left of the file"
            )
        self.left -= size
        return self.file.read(size)

    def unpack(self, layout: str, what: str) -> tuple[Any, ...]:
        """Return the next numbers."""
        layout = f"<{layout}"
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))

    def string(self, what: str) -> str:
        """Return the next string."""
        (size,) = self.unpack("Q", what)
        content = self.take(size, what)
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{what} ({content[:40]!r}) must be UTF-8") from None

    def name(self) -> str:
        """Return the next string, which names something, and so is short and fit to be printed."""
        name = self.string("name")
        if len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(f"name ({name[:MAX_NAME]!r}) must be at most {MAX_NAME} printable characters")
        return name

    def value(self, kind: int, what: str) -> Any:
        """Return the next value: a number, a truth value, a string, or a list of those."""
        if kind in SCALARS:
            return self.unpack(SCALARS[kind], what)[0]
        if kind == STRING:
            return self.string(what)
        if kind != ARRAY:
            raise ValueError(f"{what} (type {kind}) must have one of the types 0 to 12")
        kind, count = self.unpack("IQ", what)
        if kind == ARRAY:
            raise ValueError(f"{what} (a list of lists) must be a flat list")
        if kind in SCALARS:
            size = struct.calcsize(SCALARS[kind])
            return list(struct.unpack(f"<{count}{SCALARS[kind]}", self.take(count * size, what)))
        return [self.value(kind, what) for _ in range(count)]  # the end of the file ends a false count


def read_gguf_metadata(path: str | Path) -> Mapping[str, Any]:
    """Return the facts of a GGUF file by name, such as "llama.block_count"; ValueError for any other file."""
    path = Path(path)
    with open(path, "rb") as file:
        try:
            return read_facts(Head(file, path.stat().st_size))[1]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def read_facts(head: Head) -> tuple[int, dict[str, Any]]:
    """Return how many tensors a file says it has, and its facts; the list of the tensors comes next."""
    if head.take(4, "magic") != b"GGUF":
        raise ValueError("content (no GGUF at its beginning) must be a GGUF file")
    version, tensors, count = head.unpack("IQQ", "counts")
    if version not in (2, 3):
        raise ValueError(f"version ({version}) must be 2 or 3")
    facts: dict[str, Any] = {}
    for _ in range(count):
        name = head.name()
        if name in facts:
            raise ValueError(f"name ({name}) must stand once")
        (kind,) = head.unpack("I", name)
        facts[name] = head.value(kind, name)
    return tensors, facts
