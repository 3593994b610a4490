"""Learn a vocabulary from text: uv run python phase1_foundation/project2_tokenizer/train_tokenizer.py"""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.corpora import CORPORA, documents, load_corpus
from common.files import make_folder
from common.script import progress, script
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.config import BYTES, TOKENIZER, TrainConfig
from phase1_foundation.project2_tokenizer.token_file import token_to_text
from phase1_foundation.project2_tokenizer.unigram import UnigramTokenizer

SAMPLE = 100_000  # characters of the text on which the tokenizer is tried
ENCODE_COMMAND = "uv run python phase1_foundation/project2_tokenizer/encode.py"
TYPE_COMMAND = "uv run python phase1_foundation/project2_tokenizer/test_tokenizer.py --interactive"


def find_data(config: TrainConfig) -> list[Path]:
    """Return the text files to learn from; a corpus by name is fetched if need be."""
    for name in config.data:
        if not Path(name).is_file() and name not in CORPORA:
            raise ValueError(f"data ({name}) must be a file, or one of {', '.join(CORPORA)}")
    return [Path(name) if Path(name).is_file() else load_corpus(name, config.source) for name in config.data]


def read_data(paths: Iterable[Path], special_tokens: list[str]) -> Iterator[str]:
    """Yield the documents of the files, and after each what separates it from the next."""
    for path in paths:
        for document in progress(documents(path), desc=path.name, unit=" texts", leave=False, disable=None):
            yield document
            yield special_tokens[0] if special_tokens else "\n"  # training cuts a special token out


def train_bpe(config: TrainConfig, texts: Iterable[str]) -> BPETokenizer:
    """Learn merges, and show how many there are a second and which pair is merged just now."""
    total = config.vocab_size - BYTES - len(config.special_tokens)
    with progress(range(total), desc="merging", unit=" merges") as bar:

        def on_merge(left: bytes, right: bytes, count: int) -> None:
            if not bar.n:
                bar.unpause()  # the text had to be read first
            pair = f"{token_to_text(left)!r} + {token_to_text(right)!r}, {count:,} times"
            bar.set_postfix_str(pair, refresh=False)
            bar.update()

        return BPETokenizer.train_from_iterator(
            texts,
            config.vocab_size,
            config.pattern,
            config.special_tokens,
            config.trainer,
            config.workers,
            on_merge,
        )


def train_unigram(config: TrainConfig, texts: Iterable[str]) -> UnigramTokenizer:
    """Learn pieces, and show how many are left and how well they explain the text."""
    with progress(range(0), total=None, desc="EM", unit=" steps") as bar:

        def on_step(pieces: int, likelihood: float) -> None:
            bar.set_postfix_str(f"{pieces:,} pieces, log-likelihood {likelihood:,.0f}", refresh=False)
            bar.update()

        return UnigramTokenizer.train_from_iterator(
            texts, config.vocab_size, config.pattern, config.special_tokens, on_step
        )


def run(config: TrainConfig, paths: Iterable[Path]) -> BPETokenizer | UnigramTokenizer:
    """Train a tokenizer on text files, save it, and return it."""
    make_folder(config.out.parent)  # or say now that it cannot be written
    train = train_bpe if config.algorithm == "bpe" else train_unigram
    tokenizer = train(config, read_data(paths, config.special_tokens))
    tokenizer.save(config.out)
    return tokenizer


@script
def main() -> None:
    config = TrainConfig.from_cli()
    paths = find_data(config)
    started = time.perf_counter()
    tokenizer = run(config, paths)
    seconds = time.perf_counter() - started
    counts = f"{len(tokenizer.vocab):,} tokens and {len(tokenizer.special_tokens)} special"
    out = os.path.relpath(config.out)
    print(f"{out}: {counts}, in {seconds:.1f} s")
    if tokenizer.vocab_size < config.vocab_size:
        print(f"not {config.vocab_size:,}: the text has no more that occurs together")
    if sample := next(documents(paths[0]))[:SAMPLE]:
        compression = len(sample.encode()) / len(tokenizer.encode(sample))
        print(f"{compression:.2f} bytes per token at the beginning of {paths[0].name}")
    longest = sorted(tokenizer.vocab.values(), key=len, reverse=True)[:8]
    print("longest:", *(repr(token_to_text(token)) for token in longest))
    flag = "" if config.out == TOKENIZER else f" --tokenizer {out}"
    print(f'next: {ENCODE_COMMAND}{flag} "Hello, world"')
    print(f"or type text to see it cut: {TYPE_COMMAND}")


if __name__ == "__main__":
    main()
