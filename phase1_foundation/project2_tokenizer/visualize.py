"""Draw what vocabularies do to text: uv run python phase1_foundation/project2_tokenizer/visualize.py"""

import html
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.corpora import documents
from common.files import CHECKPOINTS, atomic_write, make_folder
from common.plots import new_figure, save_figure
from common.script import script
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.measures import (
    Vocabulary,
    bytes_per_token,
    digit_groups,
    is_utf8,
    premium,
    sample_texts,
    token_counts,
)
from phase1_foundation.project2_tokenizer.report import (
    DIGIT_PATTERNS,
    DIGIT_VOCAB,
    LANGUAGES,
    NUMBERS,
    CompareConfig,
    read_texts,
    tokenizers_to_compare,
)
from phase1_foundation.project2_tokenizer.unigram import UnigramTokenizer

COLORS = ["#1f77b4", "#d95f02", "#555555", "#7570b3", "#1b9e77", "#e7298a"]  # of the tokenizers, in turn
SIZES = [256, 512, 1024, 2048, 4096, 8192, 16384]


@dataclass
class VisualizeConfig(CompareConfig):
    """Project 2: draw what vocabularies do to text, as five figures and a page of coloured tokens."""

    text: Path | None = None  # the page shows this file (the beginning); otherwise a few lines of everything
    out: Path = CHECKPOINTS / "project2"  # folder for the figures and the page


def shorten(tokenizer: BPETokenizer, size: int) -> BPETokenizer:
    """Return what training for a smaller size would have given: BPE learns the same merges first."""
    merges = tokenizer.merges[: size - 256]
    kept = {new for *_, new in merges}
    vocab = {i: token for i, token in tokenizer.vocab.items() if len(token) == 1 or i in kept}
    return BPETokenizer(vocab, merges, pattern=tokenizer.pattern)


def draw_compression(
    path: Path, learn: list[str], held_out: list[str], config: CompareConfig
) -> dict[str, list[float]]:
    """Draw bytes per token against the size of the vocabulary, for the text learned from and for new text."""
    seen = "".join(text[: len(new)] for text, new in zip(learn, held_out, strict=True))  # as much of each
    texts = {"training text": seen, "held-out text": "".join(held_out)}
    largest = BPETokenizer.train_from_iterator(learn, SIZES[-1], pattern=config.pattern)
    sizes = [size for size in SIZES if size <= largest.vocab_size]
    curves: dict[str, list[float]] = {}
    for size in sizes:
        makers: dict[str, Vocabulary] = {"BPE": shorten(largest, size)}
        if size > 256:
            makers["unigram"] = UnigramTokenizer.train_from_iterator(learn, size, pattern=config.pattern)
        for name, tokenizer in makers.items():
            for kind, text in texts.items():
                curves.setdefault(f"{name}, {kind}", []).append(bytes_per_token(tokenizer, text))
    figure, axes = new_figure()
    for label, values in curves.items():
        name, kind = label.split(", ")
        new = kind.startswith("held")
        style = {"color": COLORS[name == "unigram"], "alpha": 1 if new else 0.5, "markersize": 4}
        axes.plot(sizes[-len(values) :], values, "o-" if new else "o--", label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(title="Compression", xlabel="tokens in the vocabulary", ylabel="bytes per token")
    axes.legend()
    save_figure(figure, path)
    return curves


def draw_lengths(
    path: Path, tokenizers: Mapping[str, Vocabulary], counts: Mapping[str, Counter[int]]
) -> None:
    """Draw histograms of the tokens' lengths: in the vocabulary, and in the text."""
    figure, (left, right) = new_figure(1, 2, width=10)
    for (name, tokenizer), color in zip(tokenizers.items(), itertools.cycle(COLORS), strict=False):
        listed = Counter(min(len(token), 16) for token in tokenizer.vocab.values())
        used: Counter[int] = Counter()
        for i, count in counts[name].items():
            used[min(len(tokenizer.vocab[i]), 16)] += count
        for axes, lengths in ((left, listed), (right, used)):
            share = [100 * lengths[n] / lengths.total() for n in range(1, 17)]
            axes.plot(range(1, 17), share, "o-", color=color, label=name, markersize=4)
    for axes, where in ((left, "the vocabulary"), (right, "held-out text")):
        axes.set(title=f"Length of the tokens in {where}", xlabel="bytes in a token", ylabel="% of tokens")
        axes.set_xticks([1, 4, 8, 12, 16], ["1", "4", "8", "12", "16 and more"])
    right.legend()
    save_figure(figure, path)


def draw_zipf(path: Path, counts: Mapping[str, Counter[Any]]) -> None:
    """Draw how often the n-th commonest token is used, for growing vocabularies, and so for words."""
    figure, axes = new_figure()
    for number, (name, counter) in enumerate(counts.items()):
        values = sorted(counter.values(), reverse=True)
        axes.loglog(range(1, len(values) + 1), values, color=f"C{number}", label=name, linewidth=1.5)
    top = max(max(counter.values()) for counter in counts.values())
    axes.loglog([1, 10_000], [top, top / 10_000], ":", color="black", label="1 / rank", linewidth=1)
    axes.set(title="Larger vocabularies approach Zipf's law of words", xlabel="rank", ylabel="occurrences")
    axes.legend()
    save_figure(figure, path)


def draw_fertility(path: Path, tokenizers: Mapping[str, Vocabulary]) -> None:
    """Draw bytes per token of each text, and how many tokens languages need for what English says in one."""
    texts = sample_texts()
    figure, (left, right) = new_figure(1, 2, width=10, height=5)
    height = 0.8 / len(tokenizers)
    for number, (name, tokenizer) in enumerate(tokenizers.items()):
        for axes, names, measure in (
            (left, list(texts), lambda text, tokenizer=tokenizer: bytes_per_token(tokenizer, text)),
            (right, LANGUAGES, lambda text, tokenizer=tokenizer: premium(tokenizer, text, texts["English"])),
        ):
            places = [place + (number - (len(tokenizers) - 1) / 2) * height for place in range(len(names))]
            values = [measure(texts[text]) for text in names]
            bars = axes.barh(places, values, height, color=COLORS[number % len(COLORS)], label=name)
            axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=6)
            axes.set_yticks(range(len(names)), names)
            axes.grid(visible=False)
    left.set(title="Compression", xlabel="bytes per token")
    right.set(title="Tokens for the same text", xlabel="times the tokens of English")
    for axes in (left, right):
        axes.invert_yaxis()
    right.legend()
    save_figure(figure, path)


def draw_digits(path: Path, learn: list[str]) -> dict[str, Counter[tuple[int, ...]]]:
    """Draw how all numbers of four digits are cut, after training with three patterns on the same text."""
    figure, axes = new_figure(width=8, height=2.8)
    found: dict[str, Counter[tuple[int, ...]]] = {}
    color: dict[tuple[int, ...], str] = {}
    for row, pattern in enumerate(DIGIT_PATTERNS):
        tokenizer = BPETokenizer.train_from_iterator(learn, DIGIT_VOCAB, pattern)
        found[pattern] = digit_groups(tokenizer, NUMBERS)
        begin = 0.0
        for groups, count in found[pattern].most_common():
            share = 100 * count / found[pattern].total()
            axes.barh(
                row, share, left=begin, color=color.setdefault(groups, f"C{len(color)}"), edgecolor="white"
            )
            if share > 6:
                axes.text(
                    begin + share / 2,
                    row,
                    "+".join(map(str, groups)),
                    ha="center",
                    va="center",
                    color="white",
                )
            begin += share
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set(
        title="Digits in the tokens of 1000 to 9999, by pattern", xlabel="% of the numbers", xlim=(0, 100)
    )
    save_figure(figure, path)
    return found


STYLESHEET = """
body { font: 16px/1.7 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
body { color: #222; background: #fff }
pre { font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
span { border-radius: 3px; padding: 2px 0 } small { color: #888 } span:hover { outline: 2px solid #222 }
"""
PASTELS = ["#cfe8ff", "#ffe0b8", "#d4f1cc", "#f3d3ec", "#fff3a6"]


def token_span(first: int, group: list[tuple[int, bytes]]) -> str:
    """Return tokens as one piece of HTML: their text, a stripe for each, ids and bytes as tooltip."""
    content = b"".join(token for _, token in group)
    text = html.escape(content.decode()) if is_utf8(content) else content.hex(" ")
    text = text.replace("\r", "␍").replace("\n", "<small>↵</small>\n").replace("\t", "<small>→</small>\t")
    stops, place = [], 0.0
    for number, (_, token) in enumerate(group, first):
        stops.append(f"{PASTELS[number % 5]} {place:.0%} {(place := place + len(token) / len(content)):.0%}")
    title = "\n".join(f"{i}: {token!r}" for i, token in group)
    stripes = f"background: linear-gradient(90deg, {', '.join(stops)})"
    return f'<span style="{stripes}" title="{html.escape(title)}">{text}</span>'


def token_spans(tokenizer: Vocabulary, ids: list[int]) -> str:
    """Return a text in coloured tokens; those that share a character stand together."""
    spans: list[str] = []
    group: list[tuple[int, bytes]] = []
    for number, i in enumerate(ids):
        group.append((i, tokenizer.vocab[i]))
        if is_utf8(b"".join(token for _, token in group)) or len(group) == 20 or number == len(ids) - 1:
            spans.append(token_span(number + 1 - len(group), group))
            group = []
    return "".join(spans)


def token_page(text: str, tokenizers: Mapping[str, Vocabulary]) -> str:
    """Return an HTML page that shows a text in the tokens of each tokenizer."""
    parts = ['<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>Tokens</title>']
    parts.append(
        f"<style>{STYLESHEET}</style><h1>One text, several tokenizers</h1><p>A new colour is a new token; "
    )
    parts.append("a letter with stripes takes several. Point at a token for its id and bytes.</p>")
    for name, tokenizer in tokenizers.items():
        ids = tokenizer.encode(text)
        head = f"{name}: {len(ids)} tokens, {len(text.encode()) / max(1, len(ids)):.2f} bytes per token"
        parts.append(f"<h2>{html.escape(head)}</h2><pre>{token_spans(tokenizer, ids)}</pre>")
    return "\n".join(parts) + "\n</html>\n"


def page_text(config: VisualizeConfig) -> str:
    """Return the text of the page: the beginning of a file, or the beginning of each sample."""
    if config.text:
        return next(documents(config.text), "")[:5000]
    lines = {"code": 16, "numbers": 3}
    texts = sample_texts().items()
    beginnings = [[line[:80] for line in text.split("\n")[: lines.get(name, 1)]] for name, text in texts]
    return "\n".join(itertools.chain(*beginnings, ["😀 naïve   spaces"]))


def run(config: VisualizeConfig) -> dict[str, Any]:
    """Draw everything, and return the numbers that were drawn."""
    make_folder(config.out)
    text = page_text(config)
    learn, held_out = read_texts(config)
    tokenizers = tokenizers_to_compare(config, learn)
    counts = {name: token_counts(tokenizer, held_out) for name, tokenizer in tokenizers.items()}
    compression = draw_compression(config.out / "compression.png", learn, held_out, config)
    draw_lengths(config.out / "token_lengths.png", tokenizers, counts)
    rungs: dict[str, Counter[Any]] = {
        f"{size} tokens": token_counts(shorten(tokenizers["BPE"], size), learn)
        for size in (256, 1024, config.vocab_size)
        if size <= config.vocab_size
    }
    words = Counter(word for text in learn for word in text.split())
    draw_zipf(config.out / "zipf.png", rungs | {"words": words})
    draw_fertility(config.out / "fertility.png", tokenizers)
    digits = draw_digits(config.out / "digits.png", learn)
    with atomic_write(config.out / "tokens.html") as file:
        file.write(token_page(text, tokenizers))
    return {"compression": compression, "digits": digits, "tokenizers": tokenizers}


@script
def main() -> None:
    config = VisualizeConfig.from_cli()
    run(config)
    print(f"In {config.out}: compression, token_lengths, zipf, fertility and digits (.png), tokens.html")


if __name__ == "__main__":
    main()
