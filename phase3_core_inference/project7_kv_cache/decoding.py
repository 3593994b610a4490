r"""Writing in two phases: prompts in flat batches (prefill), then one token of each per step (decode).

PAPERS
  [1] Efficiently Scaling Transformer Inference, Pope et al., 2022, arXiv:2211.05102
  [2] PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph Compilation,
      Ansel et al., 2024 (ASPLOS)

SHAPES
  B  sequences, one per slot    V  vocab_size
"""

import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from types import FunctionType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from phase1_foundation.project1_minimal_gpt.generate import next_token_odds
from phase1_foundation.project3_pretrain.model import Decoder
from phase3_core_inference.project7_kv_cache.slots import SlotCache
from phase3_core_inference.project7_kv_cache.static import StaticCache

CHUNK = 512  # tokens of a flat batch: enough to fill the processor, few enough to stay near it
COMPILERS = ("g++", "clang++", "cl")
How = Literal["eager", "compiled", "recorded"]


class Step(Protocol):
    """One decode step: the newest token of every sequence goes in, its logits (B, V) come out."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Map (B, 1) to (B, V)."""
        ...


def prefill(model: Decoder, cache: SlotCache, prompts: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """Run (slot, new tokens) of several sequences; return the logits (prompts, V) after the last of each.

    PAPER: [1] Sec. 2: prefill works on all tokens of the prompts at once, decode on one of each.
    PAPER CONTEXT: The two phases want opposite things. A prompt's tokens share each weight that is read, so
        arithmetic is the limit; a step reads all weights for a handful of tokens, so memory is.
    INTUITION: Read a letter in one sitting; answer it word by word.
    IMPLEMENTATION: Prompts are laid end to end and cut every CHUNK tokens, wherever that is: no padding, and
        no prompt too long. Only the last token of each meets the head, a fifth of SmolLM2's weights.
    WHY: Prompts of unequal length are read in half the time that filling them up takes (benchmark.py).
    """
    if short := [slot for slot, tokens in prompts if not tokens]:
        raise ValueError(f"prompt (0 tokens) of slot {short[0]} must have at least 1 token")
    newest: dict[int, Tensor] = {}  # of each prompt, its last token so far: (C,)
    for batch in flat_batches(prompts, CHUNK):
        cache.plan([(slot, len(part)) for _, slot, part in batch])
        flat = [token for _, _, part in batch for token in part]
        hidden = model.hidden(torch.tensor([flat], device=cache.device), cache)[0]  # (N, C)
        ends = accumulate(len(part) for _, _, part in batch)
        newest |= {row: hidden[end - 1] for (row, _, _), end in zip(batch, ends, strict=True)}
    return model.head(torch.stack([newest[row] for row in range(len(prompts))]))


def flat_batches(
    prompts: Sequence[tuple[int, Sequence[int]]], size: int
) -> Iterator[list[tuple[int, int, Sequence[int]]]]:
    """Yield batches of up to `size` tokens as (number of the prompt, slot, some of its tokens)."""
    batch, room = list[tuple[int, int, Sequence[int]]](), size
    for row, (slot, tokens) in enumerate(prompts):
        begin = 0
        while begin < len(tokens):
            part = tokens[begin : begin + room]
            batch.append((row, slot, part))
            begin, room = begin + len(part), room - len(part)
            if not room:
                yield batch
                batch, room = [], size
    if batch:
        yield batch


def make_step(model: Decoder, memory: SlotCache, how: How) -> Step:
    """Return the decode step of all slots, as Python runs it, compiled, or recorded on a GPU."""
    if how == "eager":
        return EagerStep(model, memory)
    if how == "recorded":
        return RecordedStep(model, StaticCache(memory))
    return CompiledStep(model, StaticCache(memory))


class EagerStep:
    """A step as Python runs it, operation by operation.

    PAPER: none.
    PAPER CONTEXT: What a step costs beyond reading its weights is the time to ask for each operation.
    INTUITION: A cook who walks to the pantry for each ingredient.
    IMPLEMENTATION: A flat batch with one token for each slot; each reads exactly its own past.
    WHY: It needs no compiler and no fixed shapes; the others are held to its logits.
    """

    def __init__(self, model: Decoder, memory: SlotCache) -> None:
        self.model, self.memory = model, memory
        self.batch = [(slot, 1) for slot in range(memory.slots)]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Map (B, 1) to (B, V)."""
        self.memory.plan(self.batch)
        return self.model.head(self.model.hidden(tokens.T, self.memory)[0])


class CompiledStep:
    """A step compiled to few fused kernels, its weights laid out for single tokens.

    PAPER: [2] Sec. 3 (capturing the graph), Sec. 4 (compiling it).
    PAPER CONTEXT: torch.compile runs the Python of the model once, records what it does to tensors, and
        writes C++ for it. The model's code stays as it is.
    INTUITION: The same cook, with everything laid out before the guests come.
    IMPLEMENTATION: One graph for the whole model. "Freezing" makes the weights constants, which lets oneDNN
        store them in the order in which it reads them; it takes a copy of them, and changes to the weights
        are not seen afterwards. How far attention looks is a variable of the graph, so longer texts compile
        nothing again. Before each call the compiler would make sure that nothing has changed which it took
        for granted, in hundreds of places; here nothing does, so these checks are left out.
    WHY: `benchmark.py` shows what it gains, and what compiling costs. Its logits equal the eager step's.
    """

    def __init__(self, model: Decoder, cache: StaticCache) -> None:
        if "CXX" not in os.environ and not any(map(shutil.which, COMPILERS)):
            raise ValueError(f"step (compiled) must have a C++ compiler: {', '.join(COMPILERS)}")
        self.cache = cache

        def run(tokens: Tensor) -> Tensor:
            return model.head(model.hidden(tokens, cache)[:, -1])

        # What is compiled is kept with the function's code, which all steps share: this one gets its own.
        code = run.__code__.replace()
        own = FunctionType(code, run.__globals__, run.__name__, None, run.__closure__)
        options: dict[str, Any] = {"freezing": True, "guard_filter_fn": lambda guards: [False] * len(guards)}
        self.run = torch.compile(own, fullgraph=True, dynamic=False, options=options)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Map (B, 1) to (B, V)."""
        self.cache.reserve()
        return self.run(tokens)


class RecordedStep:
    """A step recorded once on a GPU and replayed as one (a CUDA graph).

    PAPER: [2] Sec. 4 (the compiler's mode "reduce-overhead" does the same).
    PAPER CONTEXT: A GPU is done with a small kernel before Python has asked for the next one. A recording
        holds all kernels with their addresses; replaying it is one request.
    INTUITION: A player piano.
    IMPLEMENTATION: One recording for each extent of attention, a power of two; tokens and lengths are read
        from fixed places in memory. Recording runs the step for real a few times, so lengths are put back.
    WHY: Reading GPT-2's 124M parameters takes an H200 a twentieth of a millisecond, asking for the operations
        of a step takes several. A test marked gpu holds the logits to the eager step's.
    """

    def __init__(self, model: Decoder, cache: StaticCache) -> None:
        if cache.memory.device.type != "cuda":
            raise ValueError(f"device ({cache.memory.device}) must be cuda to record a step")
        self.model, self.cache = model, cache
        self.tokens = torch.zeros(cache.memory.slots, 1, dtype=torch.long, device=cache.memory.device)
        self.recordings: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, tokens: Tensor) -> Tensor:
        """Map (B, 1) to (B, V); the next call overwrites it."""
        self.tokens.copy_(tokens)
        extent = self.cache.reserve()
        if extent not in self.recordings:
            self.recordings[extent] = self._record()
        graph, logits = self.recordings[extent]
        graph.replay()
        return logits

    def _run(self) -> Tensor:
        return self.model.head(self.model.hidden(self.tokens, self.cache)[:, -1])

    def _record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        lengths = self.cache.lengths.clone()
        side = (
            torch.cuda.Stream()
        )  # libraries allocate their workspace on first use, which cannot be recorded
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run()
                self.cache.lengths.copy_(lengths)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._run()
        self.cache.lengths.copy_(lengths)
        return graph, logits


class Decoding:
    """A model with the memory for some texts at once, and a way to take a step.

    PAPER: [1] Sec. 2: generating is a prefill, then as many steps as there are tokens.
    PAPER CONTEXT: A step of a batch reads the weights once for all texts, so up to the ridge of the roofline
        a second text costs little ([1] Sec. 3.3); what grows is the cache that each brings.
    INTUITION: A bus: the trip costs the same, empty or full.
    IMPLEMENTATION: Memory and step outlive a text, so that what was compiled or recorded serves the next
        ones. All texts begin together and end one by one; the rows of those that ended go along unused
        until the last has (project 9 gives their places to others).
    WHY: `generate` equals transformers' greedy tokens, for one prompt and for prompts of unequal length.
    """

    def __init__(self, model: Decoder, slots: int, length: int, how: How = "eager") -> None:
        weight = model.head.weight
        self.model, self.memory = model, SlotCache(model.config, slots, length, weight.dtype, weight.device)
        self.step = make_step(model, self.memory, how)

    @torch.inference_mode()
    def write(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: Collection[int] = (),
    ) -> Iterator[list[int | None]]:
        """Yield the next token of each prompt, None for a text that has ended; ends when all have.

        Raises ValueError unless there is a prompt for each slot, and room for it and its new tokens.
        """
        slots, length = self.memory.slots, self.memory.capacity
        if len(prompts) != slots:
            raise ValueError(f"prompts ({len(prompts)}) must be as many as slots ({slots})")
        longest = max(map(len, prompts)) + max_new_tokens - 1  # the last token is not read again
        if longest > length:
            raise ValueError(f"prompt and new tokens ({longest}) must be at most length ({length})")
        for slot in range(slots):
            self.memory.free(slot)
        draw = torch.Generator().manual_seed(seed)
        logits = prefill(self.model, self.memory, list(enumerate(prompts)))  # (B, V)
        ended = [False] * slots
        for number in range(max_new_tokens):
            tokens = choose(logits, temperature, top_k, top_p, draw)  # (B,)
            written = tokens.tolist()
            ended = [over or token in stop for over, token in zip(ended, written, strict=True)]
            if all(ended):
                return
            yield [None if over else token for over, token in zip(ended, written, strict=True)]
            if number + 1 < max_new_tokens:
                logits = self.step(tokens[:, None])


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, **how: Any
) -> list[list[int]]:
    """Return the new tokens of each prompt; `how` as in Decoding.write."""
    longest = max(map(len, prompts), default=0) + max_new_tokens - 1
    decoding = Decoding(model, len(prompts), longest)
    rows = decoding.write(prompts, max_new_tokens, **how)
    columns = zip(*rows, strict=True)
    return [[token for token in column if token is not None] for column in columns]


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, draw: torch.Generator
) -> Tensor:
    """Return a token (B,) for each row of logits (B, V); project 8 is about doing this well."""
    if temperature == 0:
        return logits.float().argmax(dim=-1)  # on a CPU faster than in bf16, and the same
    odds = torch.stack([next_token_odds(row, temperature, top_k, top_p) for row in logits.float().cpu()])
    return torch.multinomial(odds, 1, generator=draw)[:, 0].to(logits.device)
