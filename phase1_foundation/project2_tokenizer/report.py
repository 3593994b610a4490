"""Compare tokenizers in tables: uv run python phase1_foundation/project2_tokenizer/report.py"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import BaseConfig
from common.corpora import documents, load_corpus
from common.downloads import DownloadError
from common.script import script
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.config import BYTES, PatternName, Source
from phase1_foundation.project2_tokenizer.interop import open_tokenizer
from phase1_foundation.project2_tokenizer.measures import (
    Vocabulary,
    audit,
    bytes_per_token,
    digit_groups,
    premium,
    sample_texts,
    token_counts,
    tokens_per_word,
)
from phase1_foundation.project2_tokenizer.token_file import token_to_text
from phase1_foundation.project2_tokenizer.unigram import UnigramTokenizer

LANGUAGES = ["English", "German", "French", "Russian", "Arabic", "Hindi", "Chinese", "Japanese"]
WITHOUT_SPACES = ["Chinese", "Japanese"]
DIGIT_PATTERNS: list[PatternName] = ["gpt2", "gpt4", "smollm"]
DIGIT_VOCAB = 20_000  # tokens; a small vocabulary has hardly any of several digits
NUMBERS = range(1000, 10_000)
SHORTEST = 1000  # characters of a text; from less there is nothing to learn
HELD_OUT = 0.1  # share of each text that no tokenizer of ours learns from

Table = list[list[str]]


@dataclass
class CompareConfig(BaseConfig):
    """Project 2: compare tokenizers in tables: compression by language, numbers, tokens that nothing uses."""

    # what ours learn from: corpora by name, or text files
    data: list[str] = field(default_factory=lambda: ["tinyshakespeare", "stdlib"])
    source: Source = "auto"  # where a corpus by name comes from
    megabytes: float = 4.0  # use so much of each at most
    vocab_size: int = 5000  # tokens of ours
    pattern: PatternName = "gpt4"  # how ours cut text into chunks
    # with these: gpt2, cl100k, o200k, smollm2, or tokenizer files
    compare: list[str] = field(default_factory=lambda: ["gpt2"])

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot work."""
        self.require_at_least(BYTES + 1, "vocab_size")
        if not self.megabytes > 0:
            raise ValueError(f"megabytes ({self.megabytes}) must be more than 0")


def read_texts(config: CompareConfig) -> tuple[list[str], list[str]]:
    """Return the texts to learn from and the held-out ones, one of each for each corpus."""
    learn, held_out = [], []
    for name in config.data:
        limit = int(config.megabytes * 1e6)
        text = ""
        for document in documents(Path(name) if Path(name).is_file() else load_corpus(name, config.source)):
            text += document[: limit - len(text)]
            if len(text) >= limit:
                break
        if len(text) < SHORTEST:
            raise ValueError(f"data ({name}: {len(text)} characters) must have at least {SHORTEST}")
        cut = len(text) - int(len(text) * HELD_OUT)
        learn.append(text[:cut])
        held_out.append(text[cut:])
    return learn, held_out


def tokenizers_to_compare(config: CompareConfig, texts: list[str]) -> dict[str, Any]:
    """Train ours and open the others; one that cannot be fetched is left out, with a line that says so."""
    found: dict[str, Any] = {}
    ours: dict[str, type[BPETokenizer | UnigramTokenizer]] = {
        "BPE": BPETokenizer,
        "unigram": UnigramTokenizer,
    }
    for name, cls in ours.items():
        begin = time.perf_counter()
        found[name] = cls.train_from_iterator(texts, config.vocab_size, config.pattern)
        print(f"{name}: {found[name].vocab_size} tokens learned in {time.perf_counter() - begin:.1f} s")
    for name in config.compare:
        try:
            found[name] = open_tokenizer(name)
        except DownloadError as error:
            print(f"left out: {name} ({error})")
    return found


def text_tables(tokenizers: Mapping[str, Vocabulary]) -> dict[str, Table]:
    """Return bytes per token of each text; of languages also tokens per token of English, and per word."""
    texts = sample_texts()
    measures: dict[str, tuple[list[str], Callable[[Vocabulary, str], float]]] = {
        "Bytes per token": (list(texts), bytes_per_token),
        "Tokens for the same text, English = 1": (
            LANGUAGES,
            lambda tokenizer, text: premium(tokenizer, text, texts["English"]),
        ),
        "Tokens per word": ([name for name in LANGUAGES if name not in WITHOUT_SPACES], tokens_per_word),
    }
    tables: dict[str, Table] = {}
    for title, (names, measure) in measures.items():
        tables[title] = [["text", *tokenizers]]
        for name in names:
            values = [f"{measure(tokenizer, texts[name]):.2f}" for tokenizer in tokenizers.values()]
            tables[title].append([name, *values])
    return tables


def digit_table(learn: list[str], others: Mapping[str, Vocabulary]) -> Table:
    """Return how NUMBERS are cut: with three patterns after the same training, and by the others."""
    tokenizers: dict[str, Vocabulary] = {
        f"BPE, pattern {pattern}": BPETokenizer.train_from_iterator(learn, DIGIT_VOCAB, pattern)
        for pattern in DIGIT_PATTERNS
    }
    rows = [["tokenizer", "tokens of digits", "tokens per number", "ways to cut", "commonest ways"]]
    for name, tokenizer in (tokenizers | dict(others)).items():
        groups = digit_groups(tokenizer, NUMBERS)
        digits = sum(token.strip().isdigit() for token in tokenizer.vocab.values())
        mean = sum(len(group) * count for group, count in groups.items()) / groups.total()
        ways = [f"{'+'.join(map(str, g))} {100 * n / groups.total():.0f}%" for g, n in groups.most_common(3)]
        rows.append([name, str(digits), f"{mean:.2f}", str(len(groups)), ", ".join(ways)])
    return rows


def audit_table(tokenizers: Mapping[str, Vocabulary], texts: Iterable[str]) -> Table:
    """Return how many tokens the text does not use, by reason, and the longest of them."""
    texts = list(texts)
    kinds = ["unused", "of these stepping stones", "unreachable", "not whole characters", "longest unused"]
    rows = [["tokenizer", "tokens", *kinds]]
    for name, tokenizer in tokenizers.items():
        counts: Counter[int] = token_counts(tokenizer, texts)
        found = audit(tokenizer, counts)
        size = len(tokenizer.vocab)
        longest = sorted((tokenizer.vocab[i] for i in found.unused), key=len, reverse=True)[:2]
        rows.append(
            [
                name,
                str(size),
                f"{len(found.unused)} ({100 * len(found.unused) / size:.1f}%)",
                str(len(found.stepping_stones)),
                str(len(found.unreachable)),
                str(len(found.halves)),
                " ".join(repr(token_to_text(token)[:24]) for token in longest),
            ]
        )
    return rows


def markdown(table: Table) -> str:
    """Return a table in Markdown."""
    head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def run(config: CompareConfig) -> dict[str, Table]:
    """Return the tables by title."""
    learn, held_out = read_texts(config)
    tokenizers = tokenizers_to_compare(config, learn)
    others = {name: tokenizer for name, tokenizer in tokenizers.items() if name in config.compare}
    held = [["text", *tokenizers]]
    for name, text in zip(config.data, held_out, strict=True):
        held.append([name, *(f"{bytes_per_token(tokenizer, text):.2f}" for tokenizer in tokenizers.values())])
    return {
        "Bytes per token on held-out text": held,
        **text_tables(tokenizers),
        f"Numbers from {NUMBERS[0]} to {NUMBERS[-1]}": digit_table(learn, others),
        "Tokens that the training text does not use": audit_table(tokenizers, learn),
    }


@script
def main() -> None:
    for title, table in run(CompareConfig.from_cli()).items():
        print(f"\n### {title}\n\n{markdown(table)}", end="")


if __name__ == "__main__":
    main()
