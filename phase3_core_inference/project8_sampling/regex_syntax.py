r"""Regular expressions, parsed by hand into languages of bytes.

PAPERS
  [1] Programming Techniques: Regular Expression Search Algorithm, Thompson, 1968
  [2] Efficient Guided Generation for Large Language Models, Willard & Louf, 2023, arXiv:2307.09702

SYMBOLS
  The syntax, which is Python's and JavaScript's as far as it is regular:
    a . [a-z] [^a-z]      a character; `.` is any but the line feed
    \d \w \s \D \W \S     ASCII digits, letters and _, spaces; and all others
    \n \t \r \f \v \0 \xHH \uHHHH and \ before punctuation
    x|y  xy  (x) (?:x) (?P<name>x) (?<name>x)
    x* x+ x? x{2} x{2,} x{2,5} x{,5}, and each with a ? behind it, which changes nothing here
    ^ $                   at the ends of the whole pattern or of its outermost alternatives
"""

import string
from collections.abc import Callable

from phase3_core_inference.project8_sampling.grammar import Grammar, Node

Ranges = list[tuple[int, int]]
Characters = Callable[[Ranges], Node]  # writes a set of characters, given as ranges of code points, as bytes
LAST = 0x10FFFF  # largest code point
CLASSES: dict[str, Ranges] = {
    "d": [(48, 57)],
    "w": [(48, 57), (65, 90), (95, 95), (97, 122)],
    "s": [(9, 13), (32, 32)],
}
CONTROLS = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "0": 0}
MOST_REPEATS = 10_000


def parse_regex(pattern: str, grammar: Grammar, characters: Characters, search: bool = False) -> Node:
    r"""Return the texts that match a pattern as a whole, or, with `search`, those with a match somewhere.

    PAPER: by the structure of the pattern, [1]; for a language model, [2] Sec. 3.
    PAPER CONTEXT: The libraries of Python and JavaScript match by trying and going back, and so can have what
        no automaton has: \1, (?=x), (?<!x), \b. All of these are refused, in a sentence.
    INTUITION: Three levels: alternatives of sequences of repeated things.
    IMPLEMENTATION: Recursive descent, one method for each level. `characters` writes a set of characters
        as bytes: plain UTF-8, or as they stand inside of a JSON string. Raises ValueError.
    WHY: Tests compare with Python's `re` (with re.ASCII) on random patterns and texts.
    """
    return _Parser(pattern, grammar, characters).parse(search)


def invert(ranges: Ranges) -> Ranges:
    """Return all other code points."""
    found, start = [], 0
    for low, high in sorted(ranges):
        if start < low:
            found.append((start, low - 1))
        start = max(start, high + 1)
    return [*found, (start, LAST)] if start <= LAST else found


class _Parser:
    def __init__(self, pattern: str, grammar: Grammar, characters: Characters) -> None:
        self.pattern, self.grammar, self.characters = pattern, grammar, characters
        self.place = self.depth = 0

    def refuse(self, what: str, rule: str) -> ValueError:
        return ValueError(f"regex ({self.pattern}) {rule}: {what} at {self.place}")

    def peek(self, text: str) -> bool:
        return self.pattern.startswith(text, self.place)

    def take(self, text: str) -> bool:
        """Go past `text`, if it stands here."""
        if self.peek(text):
            self.place += len(text)
            return True
        return False

    def next(self) -> str:
        if self.place >= len(self.pattern):
            raise self.refuse("it ends", "must be whole")
        self.place += 1
        return self.pattern[self.place - 1]

    def parse(self, search: bool) -> Node:
        anything = self.grammar.repeat(self.characters([(0, LAST)])) if search else self.grammar.empty
        found = []
        while True:
            front = self.grammar.empty if self.take("^") else anything
            middle = self.sequence()
            back = self.grammar.empty if self.take("$") else anything
            found.append(self.grammar.sequence(front, middle, back))
            if self.place == len(self.pattern):
                return self.grammar.either(*found)
            if not self.take("|"):
                what = self.pattern[self.place]
                rule = "must have ^ and $ at its ends only" if what in "^$" else "must have brackets in pairs"
                raise self.refuse(what, rule)

    def alternatives(self) -> Node:
        found = [self.sequence()]
        while self.take("|"):
            found.append(self.sequence())
        return self.grammar.either(*found)

    def sequence(self) -> Node:
        found = []
        while self.place < len(self.pattern) and self.pattern[self.place] not in "|)^$":
            found.append(self.repeated())
        return self.grammar.sequence(*found)

    def repeated(self) -> Node:
        node = self.single()
        while (bounds := self.bounds()) is not None:
            node = self.grammar.repeat(node, *bounds)
            if self.take("?"):  # the lazy form matches the same texts
                continue
            if self.peek("+"):
                raise self.refuse("+", "must not have possessive repeats")
            if (
                self.place < len(self.pattern)
                and self.pattern[self.place] in "*{"
                and self.bounds() is not None
            ):
                raise self.refuse(self.pattern[self.place - 1], "must not repeat a repeat without brackets")
        return node

    def bounds(self) -> tuple[int, int | None] | None:
        """Return how often what stands before may come, if a repeat stands here."""
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(sign):
                return bounds
        end = self.pattern.find("}", self.place)
        if not self.peek("{") or end < 0:
            return None
        low, comma, high = self.pattern[self.place + 1 : end].partition(",")
        if not all(part.isascii() and part.isdigit() for part in (low, high) if part) or not (low or high):
            return None  # a brace that is no repeat is a brace
        least = int(low or 0)
        most = (int(high) if high else None) if comma else least
        if max(least, most or 0) > MOST_REPEATS or (most is not None and most < least):
            raise self.refuse(self.pattern[self.place : end + 1], f"must repeat at most {MOST_REPEATS} times")
        self.place = end + 1
        return least, most

    def single(self) -> Node:
        char = self.next()
        if char == "(":
            return self.group()
        if char == "[":
            return self.characters(self.bracket())
        if char == ".":
            return self.characters(invert([(10, 10)]))
        if char == "\\":
            return self.characters(self.escape())
        if char in "*+?":
            raise self.refuse(char, "must have something to repeat")
        return self.characters([(ord(char), ord(char))])

    def group(self) -> Node:
        if self.take("?"):
            if self.take("P<") or (
                self.peek("<") and not self.peek("<=") and not self.peek("<!") and self.take("<")
            ):
                while self.next() != ">":
                    pass
            elif not self.take(":"):
                raise self.refuse(f"(?{self.next()}", "must be regular")
        self.depth += 1
        if self.depth > 100:
            raise self.refuse("(", "must nest at most 100 deep")
        node = self.alternatives()
        self.depth -= 1
        if not self.take(")"):
            if self.place < len(self.pattern):
                raise self.refuse(self.pattern[self.place], "must have ^ and $ at its ends only")
            raise self.refuse("(", "must have brackets in pairs")
        return node

    def escape(self) -> Ranges:
        r"""Return what stands behind a backslash: a class, or one character."""
        char = self.next()
        if char.lower() in CLASSES:
            ranges = CLASSES[char.lower()]
            return ranges if char.islower() else invert(ranges)
        if char in CONTROLS:
            if char == "0" and self.place < len(self.pattern) and self.pattern[self.place].isdigit():
                raise self.refuse("an octal number", "must be regular and plain")
            code = CONTROLS[char]
        elif char in "xu":
            digits = "".join(self.next() for _ in range(2 if char == "x" else 4))
            if set(digits) - set(string.hexdigits):
                raise self.refuse(f"\\{char}{digits}", "must have hexadecimal digits there")
            code = int(digits, 16)
        elif char.isascii() and char.isalnum():
            raise self.refuse(f"\\{char}", "must be regular and plain")
        else:
            code = ord(char)
        return [(code, code)]

    def bracket(self) -> Ranges:
        """Return the characters of [...], whose opening bracket is read."""
        inverted = self.take("^")
        ranges: Ranges = []
        if self.take("]"):  # as the first it is a character
            ranges.append((93, 93))
        while not self.take("]"):
            low = self.member()
            if self.peek("-") and not self.peek("-]"):
                self.place += 1
                high = self.member()
                if len(low) > 1 or len(high) > 1 or low[0][0] != low[0][1] or high[0][0] != high[0][1]:
                    raise self.refuse("-", "must have single characters around it")
                if high[0][0] < low[0][0]:
                    raise self.refuse("-", "must have ranges that rise")
                low = [(low[0][0], high[0][0])]
            ranges += low
        return invert(ranges) if inverted else ranges

    def member(self) -> Ranges:
        char = self.next()
        if char != "\\":
            return [(ord(char), ord(char))]
        if self.take("b"):
            return [(8, 8)]
        return self.escape()


def utf8(grammar: Grammar, ranges: Ranges) -> Node:
    """Return the characters of some ranges of code points, in UTF-8; surrogates are no characters."""
    found = []
    for low, high in ranges:
        for first, last in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)):
            if max(low, first) <= min(high, last):
                start, end = chr(max(low, first)).encode(), chr(min(high, last)).encode()
                found.append(_bytes_between(grammar, start, end))
    return grammar.either(*found)


def _bytes_between(grammar: Grammar, low: bytes, high: bytes) -> Node:
    """Return the texts of UTF-8 from low to high, which have equally many bytes."""
    span, sequence = grammar.span, grammar.sequence
    if len(low) == 1:
        return span(low[0], high[0])
    if low[0] == high[0]:
        return sequence(span(low[0], low[0]), _bytes_between(grammar, low[1:], high[1:]))
    least, most = b"\x80" * (len(low) - 1), b"\xbf" * (len(low) - 1)
    parts, start, end = [], low[0], high[0]
    if low[1:] != least:
        parts.append(sequence(span(start, start), _bytes_between(grammar, low[1:], most)))
        start += 1
    if high[1:] != most:
        parts.append(sequence(span(end, end), _bytes_between(grammar, least, high[1:])))
        end -= 1
    if start <= end:
        parts.append(sequence(span(start, end), *[span(0x80, 0xBF)] * (len(low) - 1)))
    return grammar.either(*parts)
