r"""The texts of JSON values: strings with lengths and patterns, numbers with bounds, and where spaces may be.

PAPERS
  [1] RFC 8259: The JavaScript Object Notation (JSON) Data Interchange Format, Bray, 2017
  [2] Efficient Guided Generation for Large Language Models, Willard & Louf, 2023, arXiv:2307.09702
"""

import json
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from functools import reduce
from typing import Any

from phase3_core_inference.project8_sampling.grammar import Grammar, Node
from phase3_core_inference.project8_sampling.regex_syntax import parse_regex, utf8

DIGITS = 15  # of an integer, or on either side of the point: what a float can hold
INDENT = 32  # spaces after a line feed, at most
SHORT_ESCAPES = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\"}
FORMATS = {
    "date": r"[12]\d{3}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)"
    r"|02-(0[1-9]|1\d|2[0-8]))",
    "time": r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": r"((25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(25[0-5]|2[0-4]\d|1?\d?\d)".replace(
        r"1?\d?\d", r"1\d\d|[1-9]?\d"
    ),
    "email": r"[a-z0-9]+([._+-][a-z0-9]+){0,4}@[a-z0-9]+(-[a-z0-9]+){0,4}(\.[a-z0-9]+){0,3}\.[a-z]{2,8}",
}
FORMATS["date-time"] = f"({FORMATS['date']})T({FORMATS['time']})"


class JSONText:
    r"""The texts of JSON values, each written in one way only.

    PAPER: the syntax, [1]; as a grammar for a language model, [2] Sec. 4.
    PAPER CONTEXT: [1] allows a character to be written in several ways ("A" is "\u0041"), any spaces, and
        numbers without end. What a model may do, sooner or later it does.
    INTUITION: A strict typist: one spelling for each word.
    IMPLEMENTATION: Strings are written as json.dumps(ensure_ascii=False) does. Numbers have at most 15
        digits on either side of the point. Between the parts of objects and lists there may be a space,
        or a line feed and up to 32 spaces; nothing else.
    WHY: With one spelling per string, a pattern or a forbidden name is a matter of the text alone.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.character = self.characters([(0, 0x10FFFF)])
        digit = grammar.span(48, 57)
        self.digit, self.nonzero = digit, grammar.span(49, 57)
        self.natural = grammar.either(  # without leading zeros
            grammar.text("0"), grammar.sequence(self.nonzero, grammar.repeat(digit, 0, DIGITS - 1))
        )
        self.fraction = grammar.sequence(grammar.text("."), grammar.repeat(digit, 1, DIGITS))
        indent = grammar.sequence(grammar.text("\n"), grammar.repeat(grammar.text(" "), 0, INDENT))
        self.space = grammar.maybe(grammar.either(grammar.text(" "), indent))
        self.minus = grammar.text("-")

    # Strings

    def characters(self, ranges: list[tuple[int, int]]) -> Node:
        """Return the characters of some ranges of code points, as they stand in a JSON string."""
        grammar = self.grammar
        inside = [code for code in (*range(32), 34, 92) if any(low <= code <= high for low, high in ranges)]
        short = sum(1 << ord(SHORT_ESCAPES[code]) for code in inside if code in SHORT_ESCAPES)
        long = [grammar.text(f"{code:02x}") for code in inside if code not in SHORT_ESCAPES]
        escapes = grammar.either(
            grammar.one_of(short), grammar.sequence(grammar.text("u00"), grammar.either(*long))
        )
        plain = [
            (max(low, first), min(high, last))
            for low, high in ranges
            for first, last in ((32, 33), (35, 91), (93, 0x10FFFF))
            if max(low, first) <= min(high, last)
        ]
        return grammar.either(utf8(grammar, plain), grammar.sequence(grammar.text("\\"), escapes))

    def quoted(self, content: Node) -> Node:
        """Return the strings with such a content."""
        quote = self.grammar.text('"')
        return self.grammar.sequence(quote, content, quote)

    def content(self, least: int = 0, most: int | None = None, patterns: tuple[str, ...] = ()) -> Node:
        """Return the contents of `least` to `most` characters in which each pattern is found."""
        found = [parse_regex(pattern, self.grammar, self.characters, search=True) for pattern in patterns]
        if (least, most) != (0, None) or not found:
            found.append(self.grammar.repeat(self.character, least, most))
        return reduce(self.grammar.both, found)

    def string(self, patterns: tuple[str, ...] = ()) -> Node:
        """Return the strings in which each pattern is found."""
        return self.quoted(self.content(patterns=patterns))

    def formatted(self, name: str) -> Node:
        """Return the content of strings of a format, without their quotes."""
        return parse_regex(FORMATS[name], self.grammar, self.characters)

    def literal(self, value: Any) -> Node:
        """Return the one text of a value; of an object or a list, with a space after each comma and colon."""
        return self.grammar.text(json.dumps(value, ensure_ascii=False))

    # Numbers

    def integer(self, low: int | None = None, high: int | None = None, multiple: int = 1) -> Node:
        """Return the integers from low to high (None: no bound) that are multiples."""
        limit = 10**DIGITS - 1
        low, high = max(-limit, -limit if low is None else low), min(limit, limit if high is None else high)
        parts = [self._naturals(max(low, 0), high)] if high >= 0 else []
        if low < 0:
            parts.append(self.grammar.sequence(self.minus, self._naturals(max(1, -high), -low)))
        found = self.grammar.either(*parts) if low <= high else self.grammar.nothing
        return found if multiple == 1 else self.grammar.both(found, self._multiples(multiple))

    def _naturals(self, low: int, high: int) -> Node:
        """Return the numbers from low to high, 0 <= low; those of each length apart."""
        parts = []
        for length in range(len(str(low)), len(str(high)) + 1):
            first = max(low, 10 ** (length - 1) if length > 1 else 0)
            last = min(high, 10**length - 1)
            if first <= last:
                parts.append(self._digits_between(str(first), str(last)))
        return self.grammar.either(*parts)

    def _digits_between(self, low: str, high: str) -> Node:
        """Return the digits from low to high, which are equally many."""
        grammar, rest = self.grammar, len(low) - 1
        if set(low) <= {"0"} and set(high) <= {"9"}:
            return grammar.repeat(self.digit, len(low), len(low))
        if low[0] == high[0]:
            return grammar.sequence(grammar.text(low[0]), self._digits_between(low[1:], high[1:]))
        parts = [
            grammar.sequence(grammar.text(low[0]), self._digits_between(low[1:], "9" * rest)),
            grammar.sequence(grammar.text(high[0]), self._digits_between("0" * rest, high[1:])),
        ]
        if ord(high[0]) - ord(low[0]) > 1:
            between = grammar.span(ord(low[0]) + 1, ord(high[0]) - 1)
            parts.append(grammar.sequence(between, grammar.repeat(self.digit, rest, rest)))
        return grammar.either(*parts)

    def _multiples(self, m: int) -> Node:
        """Return the integers that are multiples of m: a rule for each remainder of the digits so far."""
        grammar = self.grammar
        for remainder in range(m):
            steps = [
                grammar.sequence(grammar.text(str(d)), grammar.call(f"mod {m}: {(remainder * 10 + d) % m}"))
                for d in range(10)
            ]
            end = [grammar.empty] if remainder == 0 else []
            grammar.rules[f"mod {m}: {remainder}"] = grammar.either(*steps, *end)
        return grammar.sequence(grammar.maybe(self.minus), grammar.call(f"mod {m}: 0"))

    def number(self, low: "Bound" = None, high: "Bound" = None) -> Node:
        """Return the numbers between two bounds: (value, whether it is itself out), or None for no bound.

        Bounded ones have no exponent, and 15 digits in all, so that no text between the bounds is rounded
        onto one of them.
        """
        grammar = self.grammar
        if low is None and high is None:
            exponent = grammar.sequence(
                grammar.one_of(1 << 101 | 1 << 69),  # e, E
                grammar.maybe(grammar.one_of(1 << 43 | 1 << 45)),  # +, -
                grammar.repeat(self.digit, 1, 2),
            )
            sign, fraction = grammar.maybe(self.minus), grammar.maybe(self.fraction)
            return grammar.sequence(sign, self.natural, fraction, grammar.maybe(exponent))
        whole = max(len(str(abs(int(bound[0])))) for bound in (low, high) if bound is not None)
        if whole > DIGITS:
            raise ValueError(
                f"bounds ({low and low[0]}, {high and high[0]}) must have at most {DIGITS} digits"
            )
        places = Decimal(1).scaleb(whole - DIGITS)  # finer bounds are moved inwards
        if low is not None:
            low = low[0].quantize(places, ROUND_CEILING), low[1]
        if high is not None:
            high = high[0].quantize(places, ROUND_FLOOR), high[1]
        digits = [format(bound[0], "f").partition(".")[2].rstrip("0") for bound in (low, high) if bound]
        decimals = max(*map(len, digits), min(6, DIGITS - whole))
        above = (Decimal(0), True)  # the negative numbers begin here: -0 is no number
        if high is not None:
            above = max(above, (-high[0], high[1]))
        negative = self._magnitudes(above, None if low is None else (-low[0], low[1]), decimals)
        return grammar.either(self._magnitudes(low, high, decimals), grammar.sequence(self.minus, negative))

    def _magnitudes(self, low: "Bound", high: "Bound", decimals: int) -> Node:
        """Return the numbers without a sign between two bounds."""
        if high is not None and (high[0] < 0 or high == (Decimal(0), True)):
            return self.grammar.nothing
        node = self._compared(Decimal(0), False, True, decimals)
        if low is not None and low >= (Decimal(0), False):
            node = self._compared(*low, True, decimals)
        return node if high is None else self.grammar.both(node, self._compared(*high, False, decimals))

    def _compared(self, bound: Decimal, strict: bool, above: bool, decimals: int) -> Node:
        """Return the numbers without a sign above (or below) a bound, or equal to it unless strict."""
        grammar = self.grammar
        before, _, after = format(bound, "f").partition(".")
        whole, digits = int(before), after.rstrip("0")
        largest = 10 ** (DIGITS - decimals) - 1
        if above:
            others = self._naturals(whole + 1, largest)
        else:
            others = self._naturals(0, whole - 1) if whole else grammar.nothing
        padded = digits.ljust(decimals, "0")
        tails = [] if strict else [self._zeros(digits, decimals)]
        for i, digit in enumerate(padded):  # the first digit that differs from the bound's
            first, last = (ord(digit) + 1, 57) if above else (48, ord(digit) - 1)
            if first <= last:
                rest = grammar.repeat(self.digit, 0, decimals - 1 - i)
                tails.append(
                    grammar.sequence(grammar.text("." + padded[:i]), grammar.span(first, last), rest)
                )
        if not above:  # a number that ends before the bound's last digit is less, too
            tails += [grammar.text("." + digits[:i]) if i else grammar.empty for i in range(len(digits))]
        fraction = grammar.sequence(grammar.text("."), grammar.repeat(self.digit, 1, decimals))
        return grammar.either(
            grammar.sequence(others, grammar.maybe(fraction)),
            grammar.sequence(grammar.text(str(whole)), grammar.either(*tails)),
        )

    def _zeros(self, digits: str, decimals: int) -> Node:
        """Return the ways to write the digits behind a point, with zeros behind them or not."""
        zeros = self.grammar.repeat(self.grammar.text("0"), 0 if digits else 1, decimals - len(digits))
        tail = self.grammar.sequence(self.grammar.text("." + digits), zeros)
        return tail if digits else self.grammar.maybe(tail)


Bound = tuple[Decimal, bool] | None
