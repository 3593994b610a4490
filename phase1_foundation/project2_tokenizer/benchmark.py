"""Measure BPE beside the libraries that are written in Rust, and the fast trainer beside the naive one.

uv run python phase1_foundation/project2_tokenizer/benchmark.py
"""

import contextlib
import gc
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common.config import BaseConfig
from common.corpora import documents, load_corpus
from common.files import CHECKPOINTS, make_folder
from common.plots import new_figure, save_figure
from common.script import script
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.bpe_train import BYTES, Merge, count_chunks, incremental, naive
from phase1_foundation.project2_tokenizer.patterns import GPT4, PATTERNS

MEGABYTE = 1_000_000
Curve = list[tuple[int, float]]  # (size, seconds)
Train = Callable[[str, int], Any]  # text and vocabulary size to tokenizer
Results = dict[str, dict[str, float]]  # median seconds by task and library
PEER = "Hugging Face"  # the one that all are compared with
STEP = 1.5  # from one point of a curve to the next


@dataclass
class BenchmarkConfig(BaseConfig):
    """Project 2: how fast we are beside Hugging Face's tokenizers, tiktoken and rustbpe, in one run."""

    vocab_sizes: list[int] = field(default_factory=lambda: [1024, 5000, 32000])  # to train
    encode_vocab_size: int = 5000  # of the tokenizer that encodes
    python_megabytes: float = 4.7  # of Python's library, beside the megabyte of Shakespeare
    library: bool = True  # train on the whole of Python's library too
    workers: int = 2  # processes, for the whole library
    memory: bool = True  # measure memory
    repeats: int = 5  # rounds, of which the median counts; for the whole library at most 3
    naive_seconds: float = 60.0  # for the naive trainer, on each of two curves; 0: none
    out: Path = CHECKPOINTS / "project2" / "benchmark.png"  # the chart

    def validate_config(self) -> None:
        """Raise ValueError for settings that measure nothing."""
        self.require_at_least(1, "repeats", "workers")
        self.require_at_least(len(BYTES), "encode_vocab_size")
        if not self.vocab_sizes or min(self.vocab_sizes) < len(BYTES):
            raise ValueError(f"vocab_sizes ({self.vocab_sizes}) must be at least {len(BYTES)} each")
        if not 0 < self.python_megabytes < 1000:
            raise ValueError(f"python_megabytes ({self.python_megabytes}) must be above 0 and below 1000")


# The other libraries


def hugging_face(texts: list[str], vocab_size: int, pattern: str = "gpt4") -> Any:
    """Return a byte-level BPE trained by Hugging Face's `tokenizers`; it counts the texts in parallel."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    source = PATTERNS[pattern].source
    cut = [pre_tokenizers.Split(tokenizers.Regex(source), "isolated")] if source else []
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def hugging_face_merges(tokenizer: Any) -> list[Merge]:
    """Return the merges that it learned, as ids."""
    model = json.loads(tokenizer.to_str())["model"]
    ids = model["vocab"]
    return [(ids[left], ids[right], ids[left + right]) for left, right in model["merges"]]


def rust_bpe(text: str, vocab_size: int) -> Any:
    """Return the tokenizer that nanochat's trainer learns."""
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator([text], vocab_size, pattern=GPT4)
    return tokenizer


def tiktoken_encoding(tokenizer: BPETokenizer) -> Any:
    """Return tiktoken with our vocabulary."""
    import tiktoken

    ranks = {token: i for i, token in tokenizer.vocab.items()}
    return tiktoken.Encoding("ours", pat_str=GPT4, mergeable_ranks=ranks, special_tokens={})


LIBRARIES: dict[str, Train] = {
    "ours": BPETokenizer.train,
    PEER: lambda text, vocab_size: hugging_face(list(PATTERNS["gpt4"].blocks([text])), vocab_size),
    "rustbpe": rust_bpe,
}


# Time


def race(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each; round by round, so that a busy moment strikes all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, work in contestants.items():
            gc.collect()  # what one leaves behind is not for the next to clear away
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def show(task: str, medians: Mapping[str, float], size: int | None = None) -> None:
    """Print seconds, or megabytes per second of a text of this size, and how they compare with the peer's."""
    cells = []
    for name, seconds in medians.items():
        speed = f"{seconds:7.3f} s" if size is None else f"{size / MEGABYTE / seconds:6.1f} MB/s"
        cells.append(f"{name} {speed} {medians[PEER] / seconds:5.2f}x")
    print(f"{task:36}", "   ".join(cells), flush=True)


def time_training(name: str, text: str, config: BenchmarkConfig, whole: bool = False) -> Results:
    """Train each vocabulary size with each library; of the whole library also in several processes."""
    results = {}
    blocks = list(PATTERNS["gpt4"].blocks([text]))  # for its threads to share, cut where it changes nothing
    parallel = partial(BPETokenizer.train, algorithm="parallel", workers=config.workers)
    for vocab_size in config.vocab_sizes:
        contestants = {"ours": partial(BPETokenizer.train, text, vocab_size)}
        if whole:
            contestants[f"ours, {config.workers} processes"] = partial(parallel, text, vocab_size)
        contestants[PEER] = partial(hugging_face, blocks, vocab_size)
        contestants["rustbpe"] = partial(rust_bpe, text, vocab_size)
        task = f"train {name}, vocabulary {vocab_size}"
        results[task] = race(contestants, min(3, config.repeats) if whole else config.repeats)
        show(task, results[task])
    return results


def time_encoding(name: str, text: str, config: BenchmarkConfig) -> Results:
    """Encode the whole text as one string, and decode it, with tokenizers that were trained on it."""
    size, vocab_size = len(text.encode()), config.encode_vocab_size
    ours, rust = BPETokenizer.train(text, vocab_size), rust_bpe(text, vocab_size)
    theirs = hugging_face(list(PATTERNS["gpt4"].blocks([text])), vocab_size)
    tiktoken = tiktoken_encoding(ours)
    ids = ours.encode(text)
    if not ids == theirs.encode(text).ids == tiktoken.encode_ordinary(text):
        raise ValueError(f"ids of {name} must be the same from all libraries")
    results = {
        f"encode {name}": race(
            {
                "ours": partial(ours.encode, text),
                "ours, with nothing cached": lambda: BPETokenizer(ours.vocab, ours.merges).encode(text),
                PEER: lambda: theirs.encode(text).ids,
                "tiktoken": partial(tiktoken.encode_ordinary, text),
                "rustbpe": partial(rust.encode, text),
            },
            config.repeats,
        ),
        f"decode {name}": race(
            {
                "ours": partial(ours.decode, ids),
                PEER: partial(theirs.decode, ids),
                "tiktoken": partial(tiktoken.decode, ids),
                "rustbpe": partial(rust.decode, rust.encode(text)),
            },
            config.repeats,
        ),
    }
    for task, medians in results.items():
        show(task, medians, size)
    return results


# Memory


def peak_memory(forget: bool = False) -> int:
    """Return the largest number of bytes that this process has had in memory, since it was told to forget."""
    if not Path("/proc/self/status").exists():  # not Linux: nothing can be forgotten there
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if forget:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def memory_of(task: str, who: str, text: str, vocab_size: int) -> int:
    """Return the bytes that a task needs beside the text; to be called in a process of its own."""
    train = LIBRARIES[who]
    tokenizer = train(text[: len(text) // 100], vocab_size)  # also imports what it needs
    before = peak_memory(forget=True)
    if task == "train":
        train(text, vocab_size)
    else:
        tokenizer.encode(text)
    return peak_memory() - before


def show_memory(name: str, text: str, config: BenchmarkConfig) -> None:
    """Print how much memory training and encoding need."""
    for task in ("train", "encode"):
        cells = []
        for who in LIBRARIES:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                size = pool.submit(memory_of, task, who, text, config.encode_vocab_size).result()
            cells.append(f"{who} {size / MEGABYTE:.0f} MB")
        print(f"{f'memory to {task} {name}':36}", "   ".join(cells), flush=True)


# Growth


class TimeUpError(Exception):
    """A trainer has used up its time."""


def merge_curve(train: Callable[..., object], counts: Mapping[str, int], seconds: float) -> Curve:
    """Return how many seconds a trainer took for so many merges."""
    curve: Curve = []
    started = time.perf_counter()

    def note(merge: Merge, count: int) -> None:
        passed, merges = time.perf_counter() - started, merge[2] - len(BYTES) + 1
        if not curve or merges >= curve[-1][0] * STEP:
            curve.append((merges, passed))
        if passed > seconds:
            raise TimeUpError

    with contextlib.suppress(TimeUpError):
        train(counts, 1 << 20, note)
    return curve


def text_curve(train: Train, text: str, vocab_size: int, seconds: float) -> Curve:
    """Return the seconds for longer and longer texts, as long as the next is likely to be done in time."""
    curve: Curve = []
    size = 1 << 14
    while size <= len(text) and 3 * sum(passed for _, passed in curve) < seconds:
        started = time.perf_counter()
        train(text[:size], vocab_size)
        curve.append((size, time.perf_counter() - started))
        size *= 2
    return curve


def draw(shakespeare: str, library: str, config: BenchmarkConfig) -> None:
    """Draw the time of training against the size of the text and the merges; print where the naive ends."""
    vocab_size, seconds = config.vocab_sizes[0], config.naive_seconds
    contestants: dict[str, Train] = {"naive": partial(BPETokenizer.train, algorithm="naive"), **LIBRARIES}
    by_text = {who: text_curve(train, library, vocab_size, seconds) for who, train in contestants.items()}
    counts = count_chunks([shakespeare], "gpt4")
    by_merges = {
        "naive": merge_curve(naive, counts, seconds),
        "ours": merge_curve(incremental, counts, seconds),
    }
    figure, axes = new_figure(columns=2, width=10)
    for axis, curves in zip(axes, (by_text, by_merges), strict=True):
        for name, curve in curves.items():
            axis.loglog(*zip(*curve, strict=True), "o-", markersize=3, label=name)
        axis.set(ylabel="seconds")
        axis.legend()
        size, slow = curves["naive"][-1]
        fast = dict(curves["ours"])[size]
        what = "characters of Python source" if curves is by_text else "merges in Shakespeare"
        print(f"{size:,} {what}: naive {slow:.2f} s, ours {fast:.3f} s, {slow / fast:,.0f}x")
    axes[0].set(xlabel="characters of Python source", title=f"vocabulary of {vocab_size}")
    axes[1].set(xlabel="merges", title="Shakespeare, once its chunks are counted")
    save_figure(figure, config.out)
    print(f"chart written to {config.out}")


def describe(name: str, text: str, vocab_size: int) -> None:
    """Print how much work there is: the different chunks, and the places in them that training merges."""
    counts = count_chunks([text], "gpt4")
    ours = BPETokenizer.train(text, vocab_size)
    before, after = (sum(map(len, map(cut, counts))) for cut in (str.encode, ours.encode))
    size, merges = len(text.encode()) / MEGABYTE, len(ours.merges)
    print(f"{name}: {size:.1f} MB, {counts.total():,} chunks, {len(counts):,} different")
    print(f"  {merges} merges change {before - after:,} places in the {before:,} bytes of different chunks")


def run(config: BenchmarkConfig) -> Results:
    """Measure everything, print it, draw the chart, and return the medians in seconds by task and library."""
    make_folder(config.out.parent)
    shakespeare = "".join(documents(load_corpus("tinyshakespeare")))
    library = "".join(documents(load_corpus("stdlib")))
    results: Results = {}
    python = library[: int(config.python_megabytes * MEGABYTE)]
    for name, text in {"Shakespeare": shakespeare, "Python source": python}.items():
        describe(name, text, config.encode_vocab_size)
        results |= time_training(name, text, config) | time_encoding(name, text, config)
        if config.memory:
            show_memory(name, text, config)
    if config.library:
        size = len(library.encode()) / MEGABYTE
        results |= time_training(f"{size:.0f} MB", library, config, whole=True)
    if config.naive_seconds:
        draw(shakespeare, library, config)
    print(f"medians of {config.repeats} rounds in turn; 2.00x: twice as fast as {PEER}")
    return results


@script
def main() -> None:
    config = BenchmarkConfig.from_cli()
    config.print_config()
    run(config)


if __name__ == "__main__":
    main()
