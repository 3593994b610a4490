r"""Which documents to train on: text brought into one form, then rules that data dumps and spam do not pass.

PAPERS
  [1] Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (C4), Raffel et al.,
      2019, arXiv:1910.10683
  [2] Scaling Language Models: Methods, Analysis & Insights from Training Gopher, Rae et al., 2021,
      arXiv:2112.11446
  [3] Evaluating Large Language Models Trained on Code (Codex), Chen et al., 2021, arXiv:2107.03374
  [4] The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale, Penedo et al., 2024,
      arXiv:2406.17557

A rule is a function that a document passes or not; its docstring is what the report says about it. RULES has
a set for each kind of text, KINDS the kind of each corpus. The rules for prose are for English and would
throw away two thirds of Python's standard library; those for code keep 99.8% of it.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import accumulate
from operator import itemgetter

STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}  # [2]
TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}  # [2] Table A1
REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # [2] Table A1
# all but tab and line feed; U+FEFF is what some editors begin a file with
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s|$)")
GENERATED = re.compile(r"auto-?generated|(automatically|is|was) generated|do not edit", re.IGNORECASE)


def normalize(text: str) -> str:
    """Return the text in one form: lines end in line feeds, no control characters, Unicode composed (NFC)."""
    text = CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text if text.isascii() else unicodedata.normalize("NFC", text)


class Document:
    r"""A text and what the rules ask of it, counted when first asked for.

    PAPER: [2] Table A1 (repetition) and the quality filters before it; [1] Sec. 2.2; [3] Sec. 3.1.
    PAPER CONTEXT: Most of what a crawler brings home is menus, price lists and word salad. Earlier corpora
        trusted one signal, such as links from Reddit; [1] and [2] throw away by simple statistics, in the
        open.
    INTUITION: Nobody reads a billion pages. But prose has words of 3 to 10 letters, "the" and "of" among
        them, and does not say the same thing over and over.
    IMPLEMENTATION: Words are what spaces divide. As in the pipeline of [4], which re-implements [2], of a
        repeated line, paragraph or n-gram the first occurrence does not count as a repeat.
    WHY: [4] trained one model on each version of a corpus: with such rules it answers more questions right.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """What spaces divide."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not empty, without the spaces around them."""
        return [line.strip() for line in self.text.split("\n") if line.strip()]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What empty lines divide."""
        return [part.strip() for part in re.split(r"\n\s*\n", self.text) if part.strip()]

    @cached_property
    def ends(self) -> list[int]:
        """Where each word ends, in characters of all words side by side; before them a 0."""
        return list(accumulate(map(len, self.words), initial=0))

    def ngrams(self, n: int) -> Iterator[tuple[str, ...]]:
        """Yield each n words in a row."""
        return zip(*(self.words[i:] for i in range(n)), strict=False)

    def share_of_top(self, n: int) -> float:
        """Return the share of the characters that the most frequent n-gram has, if it comes twice."""
        top, count = max(Counter(self.ngrams(n)).items(), key=itemgetter(1), default=((), 0))
        return count * len("".join(top)) / self.ends[-1] if count > 1 else 0.0

    def share_of_repeats(self, n: int) -> float:
        """Return the share of the characters in n-grams that were there before, none counted twice."""
        seen: set[tuple[str, ...]] = set()
        characters = counted = 0
        for i, gram in enumerate(self.ngrams(n)):
            if gram in seen:
                characters += self.ends[i + n] - self.ends[max(i, counted)]
                counted = i + n
            seen.add(gram)
        return characters / max(1, self.ends[-1])


def has_text(d: Document) -> bool:
    """At least one word."""
    return bool(d.words)


def has_50_to_100000_words(d: Document) -> bool:
    """50 to 100,000 words [2]."""
    return 50 <= len(d.words) <= 100_000


def has_words_of_3_to_10_letters(d: Document) -> bool:
    """Words of 3 to 10 characters on average [2]."""
    return 3 <= d.ends[-1] / len(d.words) <= 10


def has_few_symbols(d: Document) -> bool:
    """At most one hash sign, and at most one ellipsis, for ten words [2]."""
    ellipses = d.text.count("...") + d.text.count("…")
    return max(d.text.count("#"), ellipses) <= 0.1 * len(d.words)


def has_few_bullets(d: Document) -> bool:
    """At most 90% of the lines begin with a bullet [2]."""
    return sum(line.startswith(("•", "-", "*", "‣", "●")) for line in d.lines) <= 0.9 * len(d.lines)


def has_few_broken_lines(d: Document) -> bool:
    """At most 30% of the lines end in an ellipsis [2]."""
    return sum(line.endswith(("...", "…")) for line in d.lines) <= 0.3 * len(d.lines)


def has_letters(d: Document) -> bool:
    """At least 80% of the words have a letter [2]."""
    return sum(any(map(str.isalpha, word)) for word in d.words) >= 0.8 * len(d.words)


def has_stop_words(d: Document) -> bool:
    """At least two of: the, be, to, of, and, that, have, with [2]."""
    return len(STOP_WORDS.intersection(d.words)) >= 2


def repeats_few_lines(d: Document) -> bool:
    """At most 30% of the lines, with 20% of the characters, were there before [2]."""
    return _few_repeats(d.lines, d.text)


def repeats_few_paragraphs(d: Document) -> bool:
    """At most 30% of the paragraphs, with 20% of the characters, were there before [2]."""
    return _few_repeats(d.paragraphs, d.text)


def _few_repeats(parts: list[str], text: str) -> bool:
    counts = Counter(parts)
    characters = sum(len(part) * (count - 1) for part, count in counts.items())
    return len(parts) - len(counts) <= 0.3 * len(parts) and characters <= 0.2 * len(text)


def has_no_dominant_ngram(d: Document) -> bool:
    """The most frequent 2-, 3-, 4-gram has at most 20%, 18%, 16% of the characters [2]."""
    return all(d.share_of_top(n) <= limit for n, limit in TOP_NGRAMS.items())


def repeats_few_ngrams(d: Document) -> bool:
    """At most 15% of the characters in repeated 5-grams, down to 10% in 10-grams [2]."""
    if d.share_of_repeats(5) <= min(REPEATED_NGRAMS.values()):
        return True  # whatever repeats 6 words repeats 5, so the other shares are no greater
    return all(d.share_of_repeats(n) <= limit for n, limit in REPEATED_NGRAMS.items())


def has_3_sentences(d: Document) -> bool:
    """At least 3 sentences [1]."""
    return len(SENTENCE_END.findall(d.text)) >= 3


def is_no_placeholder(d: Document) -> bool:
    """No "lorem ipsum" [1]."""
    return "lorem ipsum" not in d.text.lower()


def has_no_curly_bracket(d: Document) -> bool:
    """No curly bracket, which prose has not and code has [1]."""
    return "{" not in d.text


def is_below_a_megabyte(d: Document) -> bool:
    """Below 1 MB [3]."""
    return len(d.text) < 1_000_000


def has_lines_of_100_on_average(d: Document) -> bool:
    """Lines of at most 100 characters on average [3]."""
    return len(d.text) <= 100 * (d.text.count("\n") + 1)


def has_no_line_over_1000(d: Document) -> bool:
    """No line of more than 1,000 characters [3]."""
    return max(map(len, d.lines), default=0) <= 1000


def is_mostly_alphanumeric(d: Document) -> bool:
    """At least 25% letters and digits: [3] says "a small percentage" and no number."""
    return sum(map(str.isalnum, d.text)) >= 0.25 * len(d.text)


def is_written_by_people(d: Document) -> bool:
    """The first five lines do not say that a program wrote the rest [3]."""
    return not GENERATED.search("\n".join(d.lines[:5]))


def keep_sentences(text: str) -> tuple[str, Counter[str]]:
    """Return the lines of a web page that are sentences [1], and how many went for which reason."""
    kept, gone = [], Counter[str]()
    for line in CITATION.sub("", text).split("\n"):
        line, low = line.strip(), line.lower()
        if not line.endswith((".", "!", "?", '"', "”")) or line.endswith("..."):
            gone["no punctuation at the end"] += bool(line)
        elif len(line.split()) < 5:
            gone["fewer than 5 words"] += 1
        elif "javascript" in low:
            gone["javascript"] += 1
        elif any(policy in low for policy in POLICIES):
            gone["terms of use, cookies"] += 1
        else:
            kept.append(line)
    return "\n".join(kept), gone


Rule = Callable[[Document], bool]
PROSE: list[Rule] = [
    has_text,
    has_50_to_100000_words,
    has_words_of_3_to_10_letters,
    has_few_symbols,
    has_few_bullets,
    has_few_broken_lines,
    has_letters,
    has_stop_words,
    repeats_few_lines,
    repeats_few_paragraphs,
    has_no_dominant_ngram,
    repeats_few_ngrams,
]
RULES: dict[str, list[Rule]] = {
    "prose": PROSE,  # [2]: books, articles, pages that somebody has already cleaned
    # pages as they come from a crawler: [1], then [2]
    "web": [has_text, has_3_sentences, is_no_placeholder, has_no_curly_bracket, *PROSE[1:]],
    "code": [
        has_text,
        is_below_a_megabyte,
        has_lines_of_100_on_average,
        has_no_line_over_1000,
        is_mostly_alphanumeric,
        is_written_by_people,
    ],
    "none": [has_text],
}
KINDS = {  # of the corpora known by name; of anything else: prose
    "stdlib": "code",
    "tinyshakespeare": "none",  # verse and stage directions
    "shakespeare": "none",
    "kjv": "none",
    "wikitext2": "none",  # articles that people chose, with spaces around each sign
    "wikitext103": "none",
}


def judge(text: str, kind: str) -> tuple[str, str, Counter[str]]:
    """Return the text as it should be kept, the rule that it breaks or "", and why lines are gone."""
    gone: Counter[str] = Counter()
    if kind == "web":
        text, gone = keep_sentences(text)
    document = Document(text)
    broken = (rule.__name__ for rule in RULES[kind] if not rule(document))
    return text, next(broken, ""), gone
