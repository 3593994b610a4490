r"""Where a text is cut into chunks before any merge: no token ever reaches from one chunk into the next.

PAPERS
  [1] Language Models are Unsupervised Multitask Learners, Radford et al., 2019 (GPT-2)
  [2] Tokenization counts: the impact of tokenization on arithmetic in frontier LLMs, Singh and Strouse, 2024,
      arXiv:2402.14903

SYMBOLS of the regular expressions
  \p{L} letter: \p{Lu} upper, \p{Ll} lower, \p{Lt} title case, \p{Lm} \p{Lo} without case
  \p{M} mark, such as an accent, on the letter before it     \p{N} digit or other number
  \s white space     \S anything else
"""

import functools
import re
import sys
import unicodedata
from collections.abc import Collection, Iterable, Iterator

import regex

from phase1_foundation.project2_tokenizer.tokenizer import special_pattern

# The published expressions, letter by letter, so that a tokenizer can take its own into other libraries. The
# first alternative that fits makes the next chunk.
GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d"  # English endings
    r"| ?\p{L}+"  # a word with the space before it, so that " word" is one token
    r"| ?\p{N}+"  # a number, however long
    r"| ?[^\s\p{L}\p{N}]+"  # signs
    r"|\s+(?!\S)"  # white space, but not the last before a word
    r"|\s+"
)
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # also in IT'S
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the space or the sign before it: ".append"
    r"|\p{N}{1,3}"  # digits in threes, so that no token is a year or a price
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # signs with the ends of line after them: ":\n"
    r"|\s*[\r\n]+"  # white space up to the last end of line
    r"|\s+(?!\S)"  # indentation, but for its last space
    r"|\s+"
)
QWEN2 = GPT4.replace(r"\p{N}{1,3}", r"\p{N}")  # every digit by itself
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}"  # above: "camelCase" is two words, an accent is part of a word, and so is the ending
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
SMOLLM = (  # SmolLM2's files say it in two steps: cut out every digit, then GPT2 on what is left between them
    r"\p{N}"
    r"|'s|'t|'re|'ve|'m|'ll|'d"
    r"| ?\p{L}+"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?![^\s\p{N}])"  # white space, but not the last before a word; a digit takes none
    r"|\s+"
)

BLOCK = 1 << 14  # characters that are cut into chunks at a time, so that the processor's cache holds them

# A place between two characters where each pattern here ends a chunk, whatever else is in the text. No chunk
# has a letter or digit and then a sign or space, except for an ending like 's, and none has a space after
# anything but white space. Nor does any pattern look beyond such a place to decide on the chunks before it.
_SAFE_PLACE = regex.compile(r"(?<=[\p{L}\p{N}])(?=[^\p{L}\p{N}\p{M}'])|(?<=\S)(?=[^\S\r\n])")
_BEYOND_BMP = re.compile("[\U00010000-\U0010ffff]")  # characters of more than 16 bits, emoji for one


class Pattern:
    r"""A rule by which a text is cut into chunks.

    PAPER: [1] Sec. 2.2; for digits [2].
    PAPER CONTEXT: Merges by frequency alone gave [1] many versions of one word, such as "dog.", "dog!" and
        "dog?". So it forbids merges across categories of characters, except for the space before a word.
    INTUITION: The pattern finds what a person would call words; the merges then find the pieces of words.
    IMPLEMENTATION: Python's `re` is more than twice as fast as `regex`, but knows no \p{L}. So we spell out
        for it which characters of 16 bits are letters; blocks of text that have others are left to `regex`.
    WHY: Chunks repeat: of a million characters of Shakespeare one chunk in seventeen is new. Whatever a
        tokenizer must find out about a chunk, it has to find out only once.
    """

    def __init__(self, source: str, normalize: bool = False) -> None:
        self.source = source  # the regular expression; if it is empty, the whole text is one chunk
        self.normalize = normalize  # to NFC, with é as one character, before the text is cut

    def split(self, text: str) -> list[str]:
        """Return the chunks of a text; joined they are the text, or its NFC."""
        if self.normalize:
            text = unicodedata.normalize("NFC", text)
        if not self.source:
            return [text] if text else []
        if text.isascii():
            return _fast(self.source).findall(text)
        chunks: list[str] = []
        for block in self.blocks([text]):
            beyond = _BEYOND_BMP.search(block)
            chunks += regex.findall(self.source, block) if beyond else _fast(self.source).findall(block)
        return chunks

    def blocks(
        self,
        texts: Iterable[str],
        special_tokens: Collection[str] = (),
        size: int = BLOCK,
        longest: int = sys.maxsize,
    ) -> Iterator[str]:
        """Cut a text that comes in pieces anew, where no chunk and no special token is cut in two.

        A block ends at the first safe place after `size` characters. A text that has none, such as a
        megabyte of one letter, is one block, up to `longest`: there it is cut in the middle of a chunk.
        """
        parts: list[str] = []
        size = min(size, longest)
        length, enough = 0, size
        for text in texts:
            parts.append(text)
            length += len(text)
            if length < enough:
                continue
            held, start = "".join(parts), 0
            while end := self._end(held, start, size, longest, special_tokens):
                yield held[start:end]
                start = end
            parts = [held[start:]]
            length = len(parts[0])
            enough = max(size, min(2 * length, longest))  # search again when what had no place has doubled
        if length:
            yield "".join(parts)

    def _end(self, text: str, start: int, size: int, longest: int, special_tokens: Collection[str]) -> int:
        """Return where a block that begins at `start` ends, or 0 if that depends on text to come."""
        end = min(next(self._safe_places(text, start + size, start + longest), start + longest), len(text))
        reach = max(map(len, special_tokens), default=1)
        if special_tokens:
            for match in special_pattern(frozenset(special_tokens)).finditer(text, start, end + reach):
                if match.start() < end:
                    end = max(end, match.end())
        return end if end + reach <= len(text) else 0  # a special token may have begun there

    def _safe_places(self, text: str, start: int, stop: int) -> Iterator[int]:
        for match in _SAFE_PLACE.finditer(text, start) if self.source else ():
            place = match.start()
            if place >= stop:
                return
            if not self.normalize or unicodedata.is_normalized("NFC", text[place - 1 : place + 1]):
                yield place


@functools.cache
def _fast(source: str) -> re.Pattern[str]:
    r"""Compile an expression with `re`, spelling out the characters that \p{L} and \s stand for."""
    spelled, inside = "", False  # inside [...]
    for symbol in regex.findall(r"\\p\{\w+\}|\\.|.", source.replace(r"\S", r"[^\s]")):
        inside = symbol == "[" or (inside and symbol != "]")
        if symbol == r"\s" or symbol.startswith(r"\p"):
            symbol = _ranges(symbol) if inside else f"[{_ranges(symbol)}]"
        spelled += symbol
    return re.compile(spelled)


@functools.cache
def _ranges(name: str) -> str:
    r"""Return the characters of 16 bits that \p{L} or the like stands for, in the manner of A-Za-z."""
    characters = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x10000))))  # surrogates are no characters
    runs = regex.findall(f"{name}+", characters)
    return "".join(f"{re.escape(run[0])}-{re.escape(run[-1])}" for run in runs)


PATTERNS = {
    "gpt2": Pattern(GPT2),
    "gpt4": Pattern(GPT4),  # GPT-4 (cl100k), Llama 3
    "o200k": Pattern(O200K),  # GPT-4o
    "qwen2": Pattern(QWEN2, normalize=True),
    "smollm": Pattern(SMOLLM),
    "none": Pattern(""),
}
