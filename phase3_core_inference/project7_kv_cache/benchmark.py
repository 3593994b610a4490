"""Measure writing and reading beside transformers, llama.cpp and what the hardware could do at best.

uv run python phase3_core_inference/project7_kv_cache/benchmark.py
"""

import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.corpora import load_file
from common.device import pick_device, pick_dtype, seed_everything
from common.script import one_line, script
from phase1_foundation.project1_minimal_gpt.attention import AttentionBackend
from phase1_foundation.project1_minimal_gpt.benchmark import time_in_turn
from phase1_foundation.project3_pretrain.benchmark import hugging_face
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.generate import GrowingCache
from phase1_foundation.project3_pretrain.model import Decoder
from phase3_core_inference.project7_kv_cache.config import BenchmarkConfig
from phase3_core_inference.project7_kv_cache.decoding import Decoding, How, prefill
from phase3_core_inference.project7_kv_cache.generate import read, remembered_bytes
from phase3_core_inference.project7_kv_cache.heavy_hitter import HeavyHitterCache
from phase3_core_inference.project7_kv_cache.mixing import mix
from phase3_core_inference.project7_kv_cache.prefix import PrefixMemory
from phase3_core_inference.project7_kv_cache.quantized import QuantizedCache
from phase3_core_inference.project7_kv_cache.ring import RingCache
from phase3_core_inference.project7_kv_cache.roofline import (
    Work,
    decode_work,
    measure_machine,
    prefill_work,
)
from phase3_core_inference.project7_kv_cache.slots import SlotCache

OURS, COMPILED, RECORDED = "ours", "ours, compiled", "ours, recorded"
HF, LLAMA_CPP, NONE = "transformers", "llama.cpp, Q4_1", "no cache"
STEPS = 8  # per timing of a single step
Contestants = Mapping[str, Callable[[], object]]


@dataclass
class Row:
    """The median time of one contestant."""

    task: str
    name: str
    seconds: float
    tokens: int
    floor: float = 0.0  # seconds that the hardware needs at least; 0: not stated
    megabytes: float = 0.0  # of the cache; 0: not stated

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class Bench:
    """What all timings share: settings, device, machine, our model and transformers'."""

    def __init__(self, config: BenchmarkConfig, shape: DecoderConfig) -> None:
        self.config, self.shape = config, shape
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.precision, self.device)
        self.machine = measure_machine(self.device, self.dtype)
        seed_everything(0)
        self.model = Decoder(shape).to(self.device, self.dtype).eval().requires_grad_(False)
        self.peer = hugging_face(shape).to(self.device, self.dtype).eval()
        self.rows: list[Row] = []

    def prompt(self, tokens: int) -> list[int]:
        """Return random token ids."""
        return torch.randint(self.shape.vocab_size, (tokens,)).tolist()

    def time(
        self, task: str, contestants: Contestants, tokens: int, work: Work | None, times: int = 1
    ) -> None:
        """Time contestants in turn; `work` is that of one call, of which a contestant makes `times`."""
        medians = time_in_turn(contestants, self.config.repeats, self.device, task)
        floor = self.machine.seconds(work) if work else 0.0
        self.rows += [Row(task, name, took / times, tokens, floor) for name, took in medians.items()]

    def transformers(self, prompts: list[list[int]], new_tokens: int) -> Callable[[], object]:
        """Return what lets transformers write, greedily, after prompts that are filled up on the left."""
        longest = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        how: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "use_cache": True}
        how |= {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

        def write() -> None:
            with warnings.catch_warnings(), torch.inference_mode():
                warnings.simplefilter("ignore")
                self.peer.generate(tokens, attention_mask=mask, **how)

        return write

    def ours(self, prompts: list[list[int]], new_tokens: int, how: How = "eager") -> Callable[[], object]:
        """Return what lets our model write, greedily."""
        decoding = Decoding(self.model, len(prompts), max(map(len, prompts)) + new_tokens, how)
        return lambda: list(decoding.write(prompts, new_tokens))


def run(config: BenchmarkConfig) -> list[Row]:
    """Time everything, print the tables, and return the rows."""
    bench = Bench(config, config.model)
    print_machine(bench)
    for time_task in (time_decode, time_prefill, time_contexts, time_prefix, time_batch, time_heads):
        first = len(bench.rows)
        with torch.inference_mode():
            time_task(bench)
        print_rows(bench.rows[first:])
    if bench.device.type == "cuda":
        bench.rows += time_gpt2(config)
    print(f"medians of {config.repeats} rounds, contestants in turn; floor: what the memory's bandwidth,")
    print("or for long prompts and large batches the arithmetic, allows at best")
    return bench.rows


def time_decode(bench: Bench) -> None:
    """Time writing one text, token by token."""
    config = bench.config
    prompts, new = [bench.prompt(config.prompt_tokens)], config.new_tokens
    contestants = {OURS: bench.ours(prompts, new), HF: bench.transformers(prompts, new)}
    if bench.device.type == "cuda":
        contestants[RECORDED] = bench.ours(prompts, new, "recorded")
    elif config.compile:
        contestants[COMPILED] = bench.ours(prompts, new, "compiled")
    step = decode_work(bench.shape, [config.prompt_tokens + new // 2], bench.dtype.itemsize)
    bench.time(f"write {new} tokens", contestants, new, Work(step.bytes * new, step.operations * new))


def time_prefill(bench: Bench) -> None:
    """Time reading a long prompt, up to its first new token."""
    tokens = bench.config.prefill_tokens
    prompts = [bench.prompt(tokens)]
    contestants = {OURS: bench.ours(prompts, 1), HF: bench.transformers(prompts, 1)}
    if bench.config.gguf != "none" and bench.device.type == "cpu":
        try:
            contestants[LLAMA_CPP] = llama_cpp(load_file(bench.config.gguf), tokens)
        except (ImportError, OSError) as error:
            print(f"without llama.cpp: {one_line(error)}")
    bench.time(
        f"read {tokens} tokens", contestants, tokens, prefill_work(bench.shape, tokens, bench.dtype.itemsize)
    )


def llama_cpp(path: Path, tokens: int) -> Callable[[], object]:
    """Return what lets llama.cpp read a new random prompt, with as many threads as torch has."""
    import xllamacpp  # here: a library of the group `reference`

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(path), tokens + 64, 1
    settings.n_gpu_layers, settings.verbosity = 0, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    server, draw = xllamacpp.Server(settings), random.Random(0)

    def read_prompt() -> None:
        prompt = [draw.randrange(1000, 40_000) for _ in range(tokens)]
        how: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "cache_prompt": False}
        server.handle_completions({"prompt": prompt, **how})

    return read_prompt


def time_contexts(bench: Bench) -> None:
    """Time one step of one text at a context, with each cache and without any."""
    context, shape = bench.config.context, bench.shape
    prompt = bench.prompt(context)
    slots = SlotCache(shape, 1, shape.block_size, bench.dtype, bench.device)
    prefill(bench.model, slots, [(0, prompt)])
    kept = min(context // 4, shape.block_size // 2)
    caches: dict[str, AttentionBackend] = {
        "growing (project 3)": GrowingCache(),
        f"ring of {kept}, 4 sinks": RingCache(shape, kept, 4),
        **{f"{bits} bits": QuantizedCache(shape, bits) for bits in (8, 4, 2)},
        f"{kept} heavy hitters": HeavyHitterCache(shape, kept),
    }
    new, token = torch.tensor([prompt], device=bench.device), prompt[:1]

    def steps(step: Callable[[], object]) -> Callable[[], object]:
        return lambda: [step() for _ in range(STEPS)]

    def again(cache: AttentionBackend) -> Callable[[], object]:
        return steps(lambda: read(bench.model, cache, token))

    contestants: dict[str, Callable[[], object]] = {
        "slots": steps(lambda: prefill(bench.model, slots, [(0, token)])),
        NONE: lambda: [bench.model.head(bench.model.hidden(new)[:, -1]) for _ in range(STEPS)],
    }
    for name, cache in caches.items():
        read(bench.model, cache, prompt)
        contestants[name] = again(cache)
    work = decode_work(shape, [context], bench.dtype.itemsize)
    bench.time(f"a step at {context}", contestants, 1, work, STEPS)
    for row in bench.rows[-len(contestants) :]:
        if row.name in caches:
            row.megabytes = remembered_bytes(caches[row.name]) / 1e6


def time_prefix(bench: Bench) -> None:
    """Time the first token of a prompt all but the end of which was read before."""
    tokens = bench.config.prefill_tokens
    known, cache = bench.prompt(tokens), SlotCache(bench.shape, 2, tokens, bench.dtype, bench.device)
    memory = PrefixMemory(cache)

    def read_prompt(prompt: list[int]) -> None:
        slot, reused = memory.begin(prompt)
        prefill(bench.model, cache, [(slot, prompt[reused:])])
        memory.end(slot, prompt)

    read_prompt(known)
    new = max(1, tokens // 20)
    contestants = {
        "all anew": lambda: read_prompt(bench.prompt(tokens)),
        f"all but {new} known": lambda: read_prompt(known[:-new] + bench.prompt(new)),
    }
    bench.time("first token", contestants, tokens, None)


def time_batch(bench: Bench) -> None:
    """Time prompts of unequal length, read at once, and a few tokens written after each."""
    config, new = bench.config, 16
    lengths = [max(1, config.context * (row + 1) // config.batch) for row in range(config.batch)]
    prompts = [bench.prompt(length) for length in lengths]
    for task, count in (("read a batch", 1), ("and write 16 each", new)):
        contestants = {OURS: bench.ours(prompts, count), HF: bench.transformers(prompts, count)}
        bench.time(task, contestants, sum(lengths) + count * len(prompts), None)


def time_heads(bench: Bench) -> None:
    """Time attention alone, one token over 250: shared keys read once, or by torch's switch."""
    shape, layers = bench.shape, 30
    heads, kept = (1, shape.n_head, 1, shape.head_width), (1, shape.kv_heads, 250, shape.head_width)
    q = torch.randn(heads, device=bench.device).to(bench.dtype)
    pasts = [
        [torch.randn(kept, device=bench.device).to(bench.dtype) for _ in range(2)] for _ in range(layers)
    ]

    def switch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    contestants: Contestants = {
        "shared keys as rows": lambda: [mix(q, k, v) for k, v in pasts],
        "enable_gqa": lambda: [switch(q, k, v) for k, v in pasts],
    }
    bench.time("mix, 1 over 250", contestants, 1, None, layers)


def time_gpt2(config: BenchmarkConfig) -> list[Row]:
    """Time GPT-2's shape, random weights, on a GPU: one text, and 64."""
    bench = Bench(config, DecoderConfig.gpt2())
    new = 256
    for batch in (1, 64):
        prompts = [bench.prompt(config.prompt_tokens) for _ in range(batch)]
        contestants = {RECORDED: bench.ours(prompts, new, "recorded"), HF: bench.transformers(prompts, new)}
        step = decode_work(bench.shape, [config.prompt_tokens + new // 2] * batch, bench.dtype.itemsize)
        work = Work(step.bytes * new, step.operations * new)
        bench.time(f"GPT-2, {batch} at once", contestants, batch * new, work)
    print_rows(bench.rows)
    return bench.rows


def print_machine(bench: Bench) -> None:
    """Print what the machine can do, and what follows for this model."""
    machine, size = bench.machine, bench.dtype.itemsize
    threads = f" with {torch.get_num_threads()} threads" if bench.device.type == "cpu" else ""
    print(f"device      {bench.device}{threads}: reads {machine.bandwidth / 1e9:,.0f} GB/s, multiplies at "
          f"{machine.rate / 1e9:,.0f} GFLOP/s in {str(bench.dtype)[6:]}; "
          f"ridge {machine.ridge:,.0f} operations per byte")  # fmt: skip
    for name, work in (
        ("a step", decode_work(bench.shape, [bench.config.context], size)),
        ("a prompt", prefill_work(bench.shape, bench.config.prefill_tokens, size)),
    ):
        tokens = 1 if name == "a step" else bench.config.prefill_tokens
        print(f"{name:12}{work.bytes / 1e6:,.0f} MB, {work.operations / 1e9:,.2f} GFLOP, "
              f"{work.intensity:,.1f} operations per byte: at best "
              f"{tokens / machine.seconds(work):,.0f} tokens/s")  # fmt: skip


def print_rows(rows: list[Row]) -> None:
    """Print one or several tasks; the ratio is the first contestant's time to each one's."""
    if not rows:
        return
    print(f"\n{'':22}{'':22}{'ms':>10}{'tokens/s':>11}{'of the floor':>14}{'MB':>8}{'first is':>12}")
    for row in rows:
        first = next(other for other in rows if other.task == row.task)
        share = f"{row.floor / row.seconds:.0%}" if row.floor else ""
        size = f"{row.megabytes:.1f}" if row.megabytes else ""
        faster = f"{row.seconds / first.seconds:.2f}x"
        times = f"{row.seconds * 1e3:10.2f}{row.speed:11,.0f}"
        print(f"{row.task:22}{row.name:22}{times}{share:>14}{size:>8}{faster:>12}")


@script
def main() -> None:
    """Parse and measure."""
    run(BenchmarkConfig.from_cli())


if __name__ == "__main__":
    main()
