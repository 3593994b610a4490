"""Write, or chat, with a cache of your choice, and see what it remembers and how fast it is.

uv run python phase3_core_inference/project7_kv_cache/generate.py --model smollm2-135m --interactive

In a chat, `slots` keeps the conversation in memory and reads only what is new of each turn.
"""

import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common.device import pick_dtype
from common.script import script
from phase1_foundation.project1_minimal_gpt.attention import AttentionBackend
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.generate import GrowingCache, Writer
from phase1_foundation.project3_pretrain.generate import run as run_writer
from phase1_foundation.project3_pretrain.model import Decoder
from phase3_core_inference.project7_kv_cache.config import CacheConfig, GenerateConfig
from phase3_core_inference.project7_kv_cache.decoding import CHUNK, Decoding, How, choose, prefill
from phase3_core_inference.project7_kv_cache.heavy_hitter import HeavyHitterCache
from phase3_core_inference.project7_kv_cache.prefix import PrefixMemory
from phase3_core_inference.project7_kv_cache.quantized import QuantizedCache
from phase3_core_inference.project7_kv_cache.ring import RingCache
from phase3_core_inference.project7_kv_cache.slots import SlotCache


def make_cache(name: str, config: DecoderConfig, how: CacheConfig) -> AttentionBackend | None:
    """Return a cache for one text by its name; None for none."""
    if name == "growing":
        return GrowingCache()
    if name == "ring":
        return RingCache(config, how.window, how.sinks)
    if name == "quantized":
        return QuantizedCache(config, how.bits, how.group, how.residual)
    if name == "heavy":
        return HeavyHitterCache(config, how.budget)
    if name == "none":
        return None
    raise ValueError(f"cache ({name}) must be none, growing, ring, quantized or heavy")


def remembered_bytes(cache: AttentionBackend | None) -> int:
    """Return the bytes that a cache holds."""
    if isinstance(cache, SlotCache):
        return sum(store.nbytes for store in (*cache.keys, *cache.values))
    if isinstance(cache, QuantizedCache):
        codes = sum(part.nbytes for pair in cache.codes.values() for part in pair)
        return codes + sum(part.nbytes for pair in cache.newest.values() for part in pair)
    pairs = getattr(cache, "past", {}).values()
    extra = [*getattr(cache, "score", {}).values(), *getattr(cache, "place", {}).values()]
    return sum(part.nbytes for pair in pairs for part in pair) + sum(part.nbytes for part in extra)


def read(model: Decoder, cache: AttentionBackend | None, tokens: list[int]) -> Tensor:
    """Run new tokens of one text, some at a time; return the logits (1, V) after the last."""
    device = model.head.weight.device
    if cache is None:
        return model.head(model.hidden(torch.tensor([tokens], device=device))[:, -1])
    chunk = min(CHUNK, cache.at_once) if isinstance(cache, RingCache) else CHUNK
    for begin in range(0, len(tokens), chunk):
        hidden = model.hidden(torch.tensor([tokens[begin : begin + chunk]], device=device), cache)
    return model.head(hidden[:, -1])


class CachedWriter(Writer):
    """Project 3's writer, with the caches of this project."""

    config: GenerateConfig

    def __init__(self, config: GenerateConfig) -> None:
        super().__init__(config)
        shape, weight = self.model.config, self.model.head.weight
        dtype = pick_dtype(config.precision, weight.device)
        self.model.to(dtype).requires_grad_(False)
        self.decoding: Decoding | None = None
        self.conversation: PrefixMemory | None = None
        if config.cache == "static":
            how: How = "recorded" if weight.is_cuda else "compiled"
            self.decoding = Decoding(self.model, 1, shape.block_size, how)
        elif config.cache == "slots":
            memory = SlotCache(shape, 2, shape.block_size, dtype, weight.device)
            self.conversation = PrefixMemory(memory)

    def tokens_after(self, ids: list[int], seed: int) -> Iterator[int]:
        """Yield what the model writes after these tokens, and say what was remembered."""
        config, shape = self.config, self.model.config
        total = len(ids) + config.max_new_tokens - 1  # the last token is not read again
        if total > shape.block_size and not (config.cache == "ring" and shape.positions == "rope"):
            rule = f"must be at most block_size ({shape.block_size}); only --cache ring has no end"
            raise ValueError(f"prompt and answer ({total} tokens) {rule}")
        if self.decoding is not None:
            how = (config.max_new_tokens, config.temperature, config.top_k, config.top_p, seed, self.stop)
            return (row[0] for row in self.decoding.write([ids], *how) if row[0] is not None)
        if self.conversation is not None:
            return self._converse(self.conversation, ids, seed)
        return self._write_once(ids, seed)

    @torch.inference_mode()
    def _converse(self, memory: PrefixMemory, ids: list[int], seed: int) -> Iterator[int]:
        """Write in a slot that may know the beginning of the text."""
        slot, reused = memory.begin(ids)
        cache, text = memory.cache, list(ids)
        try:
            for token in self._loop(
                lambda new: prefill(self.model, cache, [(slot, new)]), ids[reused:], seed
            ):
                text.append(token)
                yield token
        finally:
            memory.end(slot, text)
        size = remembered_bytes(cache) / (cache.slots * cache.capacity) * cache.length(slot)
        self._say(f"{reused} of the prompt's {len(ids)} tokens were known", size)

    @torch.inference_mode()
    def _write_once(self, ids: list[int], seed: int) -> Iterator[int]:
        """Write with a cache that serves this text alone, or with none."""
        cache = make_cache(self.config.cache, self.model.config, self.config.memory)
        text: list[int] = []

        def read_on(new: list[int]) -> Tensor:
            text.extend(new)
            return read(self.model, cache, text if cache is None else new)

        yield from self._loop(read_on, ids, seed)
        self._say(f"the prompt had {len(ids)} tokens", remembered_bytes(cache))

    def _loop(self, read_on: Callable[[list[int]], Tensor], ids: list[int], seed: int) -> Iterator[int]:
        """Yield tokens; `read_on` maps new tokens to the logits (1, V) after them."""
        config, new = self.config, ids
        draw, began = torch.Generator().manual_seed(seed), time.perf_counter()
        for number in range(config.max_new_tokens):
            logits = read_on(new)
            token = int(choose(logits, config.temperature, config.top_k, config.top_p, draw))
            if number == 0:
                self.first = time.perf_counter() - began
            if token in self.stop:
                return
            yield token
            new = [token]

    def _say(self, about: str, size: float) -> None:
        """Say on stderr how long the prompt took and what is remembered."""
        line = f"first token after {self.first * 1e3:.0f} ms; {about}; {size / 1e6:.2f} MB remembered"
        print(f"\n({self.config.cache}: {line})", end="", file=sys.stderr)


def run(config: GenerateConfig) -> list[str]:
    """Write what was asked for, printing as it comes, and return it."""
    return run_writer(config, CachedWriter(config))


@script
def main() -> None:
    """Parse and write."""
    run(GenerateConfig.from_cli())


if __name__ == "__main__":
    main()
