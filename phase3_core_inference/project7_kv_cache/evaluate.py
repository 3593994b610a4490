"""Measure what each cache costs in quality and saves in memory, on the same texts.

uv run python phase3_core_inference/project7_kv_cache/evaluate.py --model smollm2-135m
"""

import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.corpora import documents, load_corpus
from common.device import pick_device, pick_dtype
from common.files import atomic_write, shown
from common.script import progress, script
from phase1_foundation.project1_minimal_gpt.attention import AttentionBackend
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.generate import GrowingCache
from phase1_foundation.project3_pretrain.likelihood import start_token
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model
from phase3_core_inference.project7_kv_cache.config import EvaluateConfig
from phase3_core_inference.project7_kv_cache.generate import remembered_bytes
from phase3_core_inference.project7_kv_cache.heavy_hitter import HeavyHitterCache
from phase3_core_inference.project7_kv_cache.quantized import QuantizedCache
from phase3_core_inference.project7_kv_cache.ring import RingCache

PIECE = 128  # tokens that are read at once


@dataclass
class Row:
    """What a cache did on the texts."""

    name: str
    bytes: int  # at the end, of one text
    nats: float  # per token, over the tokens after the first `budget`
    seconds: float


def run(config: EvaluateConfig) -> list[Row]:
    """Measure every cache, print and write the table, and return it."""
    device = pick_device(config.device)
    model, tokenizer = load_model(config.model, pick_dtype(config.precision, device))
    model.to(device)
    if config.tokens > model.config.block_size:
        raise ValueError(f"tokens ({config.tokens}) must be at most block_size ({model.config.block_size})")
    texts = load_texts(config.data, config.source, tokenizer, config.texts, config.tokens).to(device)
    kept = config.memory.window + config.memory.sinks
    begin = max(kept, config.memory.budget)
    if begin >= config.tokens - 1:
        rule = f"must be above {begin + 1}: all caches would hold everything"
        raise ValueError(f"tokens ({config.tokens}) {rule}")
    print(f"texts       {config.texts} of {config.tokens:,} tokens; losses from token {begin + 2:,} on")
    rows = []
    for name, cache in progress(contestants(config, model), desc="caches", leave=False):
        started = time.perf_counter()
        loss = losses(model, cache, texts)[:, begin:].mean().item()
        rows.append(Row(name, remembered_bytes(cache) // config.texts, loss, time.perf_counter() - started))
    print_rows(rows)
    with atomic_write(config.out / "evaluate.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["cache", "bytes", "nats_per_token", "seconds"])
        writer.writerows([row.name, row.bytes, f"{row.nats:.4f}", f"{row.seconds:.2f}"] for row in rows)
    print(f"table written to {shown(config.out / 'evaluate.csv')}")
    return rows


def contestants(config: EvaluateConfig, model: Decoder) -> list[tuple[str, AttentionBackend]]:
    """Return the caches by name."""
    shape, how = model.config, config.memory
    kept = how.window + how.sinks
    caches: list[tuple[str, AttentionBackend]] = [("everything", GrowingCache())]
    for bits in (8, 4, 2):
        caches.append((f"{bits} bits", QuantizedCache(shape, bits, how.group, how.residual)))
    caches.append((f"window {kept}", RingCache(shape, kept)))
    caches.append((f"window {how.window}, {how.sinks} sinks", RingCache(shape, how.window, how.sinks)))
    caches.append((f"{how.budget} heavy hitters", HeavyHitterCache(shape, how.budget)))
    return caches


def load_texts(data: str, source: str, tokenizer: Tokenizer, count: int, length: int) -> Tensor:
    """Return `count` texts (count, length) from the end of a corpus, each as a document begins."""
    path = Path(data) if Path(data).is_file() else load_corpus(data, source)
    start = start_token(tokenizer)
    found = list(islice(_long_enough(path, tokenizer, length), count))
    if len(found) < count:
        rule = f"must have {count} documents of at least {length} tokens, not {len(found)}"
        raise ValueError(f"data ({data}) {rule}")
    return torch.tensor([([start] if start is not None else []) + ids for ids in found])[:, :length]


def _long_enough(path: Path, tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    """Yield the tokens of documents that have as many, the last document first."""
    for text in reversed(list(documents(path))):
        if len(text) > length:  # a token is at least about a character
            ids = tokenizer.encode(text[: 20 * length])
            if len(ids) >= length:
                yield ids[:length]


@torch.inference_mode()
def losses(model: Decoder, cache: AttentionBackend, texts: Tensor) -> Tensor:
    """Return the loss (texts, tokens - 1) of each token after the first, in nats; some are read at a time."""
    piece = min(PIECE, cache.at_once) if isinstance(cache, RingCache) else PIECE
    parts = []
    for begin in range(0, texts.shape[1] - 1, piece):
        end = min(begin + piece, texts.shape[1] - 1)
        logits = model(texts[:, begin:end], cache).float()
        parts.append(F.cross_entropy(logits.mT, texts[:, begin + 1 : end + 1], reduction="none"))
    return torch.cat(parts, dim=1)


def print_rows(rows: list[Row]) -> None:
    """Print the table beside the first row, which forgets and rounds nothing."""
    full = rows[0]
    print(f"\n{'remembers':24}{'KB':>10}{'of all':>9}{'nats per token':>16}{'more':>9}{'seconds':>9}")
    for row in rows:
        share, more = row.bytes / full.bytes, row.nats - full.nats
        print(
            f"{row.name:24}{row.bytes / 1e3:10,.0f}{share:9.1%}{row.nats:16.4f}{more:+9.4f}{row.seconds:9.1f}"
        )


@script
def main() -> None:
    """Parse and measure."""
    run(EvaluateConfig.from_cli())


if __name__ == "__main__":
    main()
