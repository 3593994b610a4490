"""Text to token ids, or back: uv run python phase1_foundation/project2_tokenizer/encode.py "Hello, world"

A filter: what comes in goes out in pieces, so a file of any size takes the same memory.
"""

import codecs
import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from typing import BinaryIO, cast

from common.script import script
from phase1_foundation.project2_tokenizer.config import EncodeConfig
from phase1_foundation.project2_tokenizer.interop import open_tokenizer
from phase1_foundation.project2_tokenizer.token_file import show

BLOCK = 1 << 16  # bytes that are read at a time
LINE = 1000  # ids that are written, or decoded, at a time
LONGEST_ID = 20  # digits


def read_text(file: io.BufferedIOBase) -> Iterator[bytes]:
    """Yield what a file holds in pieces that cut no character in two; bytes that are not UTF-8 stay."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    while block := file.read1(BLOCK):
        yield decoder.decode(block).encode("utf-8", "surrogateescape")
    yield decoder.decode(b"", final=True).encode("utf-8", "surrogateescape")


def read_ids(file: io.BufferedIOBase) -> Iterator[int]:
    """Yield the numbers in a file, which spaces or ends of line separate."""
    torn = b""
    while block := file.read1(BLOCK):
        *words, torn = (torn + block + b"|").split()  # the last one may go on, be it empty so far
        torn = torn[:-1]
        if len(torn) > LONGEST_ID:
            words.append(torn)
        yield from map(_read_id, words)
    if torn:
        yield _read_id(torn)


def _read_id(word: bytes) -> int:
    if not word.isdigit() or len(word) > LONGEST_ID:
        raise ValueError(f"id ({show(word.decode('utf-8', 'replace'))}) must be a whole number")
    return int(word)


def run(config: EncodeConfig, stdin: io.BufferedIOBase, stdout: BinaryIO) -> None:
    """Write the ids of the input, or the text that its ids stand for."""
    tokenizer = open_tokenizer(config.tokenizer)
    allowed = "all" if config.allow_special else ()
    with ExitStack() as stack:
        file: io.BufferedIOBase = stdin
        if config.text is not None:
            file = io.BytesIO(config.text.encode("utf-8", "surrogateescape"))
        elif config.file is not None:
            file = stack.enter_context(open(config.file, "rb"))
        if config.decode:
            ids = read_ids(file)
            while batch := list(islice(ids, LINE)):
                stdout.write(tokenizer.decode_bytes(batch))
        else:
            ids = tokenizer.encode_iterable(read_text(file), allowed)
            while batch := list(islice(ids, LINE)):
                stdout.write(" ".join(map(str, batch)).encode() + b"\n")
    stdout.flush()


@script
def main() -> None:
    run(EncodeConfig.from_cli(), cast(io.BufferedIOBase, sys.stdin.buffer), sys.stdout.buffer)


if __name__ == "__main__":
    main()
