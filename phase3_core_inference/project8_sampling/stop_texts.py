r"""Texts before which writing ends, wherever the borders of tokens and of characters happen to fall.

PAPERS
  [1] Efficient String Matching: An Aid to Bibliographic Search, Aho & Corasick, 1975
"""

import codecs
from collections.abc import Iterable, Sequence


class StopMatcher:
    """Find the first of several texts in a stream of bytes, and say what cannot be part of one any more.

    PAPER: [1]; the goto and failure functions in one table.
    PAPER CONTEXT: To look for each text in each new piece is quadratic, and to look in the decoded text of
        one token misses what spans two. The machine of [1] reads each byte once, for any number of texts.
    INTUITION: A finger in each text that may have begun; the machine's state is the finger furthest in.
    IMPLEMENTATION: A state is a prefix of some text, and knows how many bytes it holds. The next state is
        the longest prefix that ends what was read. UTF-8 never has one character inside of another, so
        bytes match where characters do.
    WHY: Bytes in a state must be held back, for they would be cut off if the text came to be whole; all
        before them can be shown. A test cuts texts into tokens at random and finds no letter too much.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = [text.encode() for text in texts]
        prefixes = {text[:n]: 0 for text in self.texts for n in range(len(text) + 1)} or {b"": 0}
        self.prefixes = list(prefixes)
        self.numbers = {prefix: i for i, prefix in enumerate(self.prefixes)}
        self.ending = [  # of each prefix, bytes of the longest text that it ends with
            max((len(text) for text in self.texts if prefix.endswith(text)), default=0)
            for prefix in self.prefixes
        ]
        self.table: dict[tuple[int, int], int] = {}  # (state, byte): the next state, once it was looked for
        self.state = self.numbers[b""]

    def _next(self, state: int, byte: int) -> int:
        """Return the number of the longest known prefix that ends with a state's prefix and a byte."""
        if (state, byte) not in self.table:
            read = self.prefixes[state] + bytes([byte])
            ends = (read[i:] for i in range(len(read) + 1))
            self.table[state, byte] = next(self.numbers[end] for end in ends if end in self.numbers)
        return self.table[state, byte]

    def read(self, data: bytes) -> int | None:
        """Read on; return how many bytes before the end of `data` the found text begins, or None."""
        if not self.texts:
            return None
        for i, byte in enumerate(data):
            self.state = self._next(self.state, byte)
            if found := self.ending[self.state]:
                return len(data) - (i + 1) + found
        return None

    @property
    def held(self) -> int:
        """How many of the bytes read may be the beginning of a text."""
        return len(self.prefixes[self.state])


class StreamedText:
    """The text of tokens as they come: whole characters only, and nothing that a stop text may yet take.

    PAPER: none, but [1] at its heart.
    PAPER CONTEXT: A token may end inside of a character, and a stop text inside of a token. Servers have
        shown both the half character and the half stop text.
    INTUITION: A typist who waits with a word as long as it may have to be struck out.
    IMPLEMENTATION: `pending` are the bytes that are not shown yet. Half characters wait in the decoder of
        Python's library; if they never become whole they end as U+FFFD.
    WHY: Joined, the pieces are the decoded text up to the stop text, for every way to cut it into tokens.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.matcher = StopMatcher(stop)
        self.pending = b""
        self.text = ""  # all that was shown
        self.stopped = False
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, data: bytes) -> str:
        """Take the bytes of a token and return what can be shown now; after a stop text, nothing."""
        if self.stopped:
            return ""
        self.pending += data
        before_end = self.matcher.read(data)
        if before_end is not None:
            self.stopped = True
            return self._show(self.pending[: len(self.pending) - before_end], final=True)
        return self._show(self.pending[: len(self.pending) - self.matcher.held])

    def finish(self) -> str:
        """Return what is still held back: no stop text will come any more."""
        if self.stopped:
            return ""
        self.stopped = True
        return self._show(self.pending, final=True)

    def _show(self, data: bytes, final: bool = False) -> str:
        self.pending = self.pending[len(data) :]
        shown = self.decoder.decode(data, final)
        self.text += shown
        return shown
