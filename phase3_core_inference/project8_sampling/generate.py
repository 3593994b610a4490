"""Let a model write, with every setting of the sampler.

uv run python phase3_core_inference/project8_sampling/generate.py --model smollm2-135m --interactive
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from common.device import pick_device, pick_dtype
from common.script import ask, one_line, script
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.generate import (
    GrowingCache,
    can_chat,
    chat_ids,
    stop_tokens,
    text_ids,
)
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model
from phase3_core_inference.project8_sampling.beam_search import check_length, choose_rows
from phase3_core_inference.project8_sampling.config import GenerateConfig, SamplingParams, WriterConfig
from phase3_core_inference.project8_sampling.contrastive import contrastive_logits
from phase3_core_inference.project8_sampling.sampler import Sampled, Sampler
from phase3_core_inference.project8_sampling.state import RequestState
from phase3_core_inference.project8_sampling.vocabulary import Vocabulary


class Writer:
    """A model, its tokenizer and vocabulary, and how a prompt is put to it."""

    def __init__(self, config: WriterConfig) -> None:
        self.config = config
        device = pick_device(config.device)
        self.model, self.tokenizer = load_model(config.model, pick_dtype(config.precision, device))
        self.model.to(device)
        self.vocabulary = Vocabulary.of(self.tokenizer, self.model.config.vocab_size)
        self.chats = can_chat(self.tokenizer) if config.chat == "auto" else config.chat == "yes"
        if self.chats and not can_chat(self.tokenizer):
            raise ValueError(f"chat (yes) must be no: {config.model} does not know the marks of ChatML")
        self.stop = stop_tokens(self.tokenizer)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return what the model is given."""
        if self.chats:
            system = [("system", self.config.system)] if self.config.system else []
            return chat_ids(self.tokenizer, [*system, ("user", prompt)])
        ids = text_ids(self.tokenizer, prompt)
        if not ids:
            raise ValueError("prompt () must hold at least one character for a model without a start token")
        return ids

    def states(self, prompt: str, params: SamplingParams, number: int) -> list[RequestState]:
        """Return requests for several texts; each has a seed of its own."""
        ids = self.prompt_ids(prompt)
        check_length(self.model, ids, params.max_new_tokens)
        seeds = [None if params.seed is None else params.seed + i for i in range(number)]
        return [RequestState(replace(params, seed=seed), ids, self.vocabulary, self.stop) for seed in seeds]


class Steps:
    """A model that reads one prompt, then one more token in each row at a time.

    What it returns are the logits of the next token, (R, V).
    """

    def __init__(self, model: Decoder, prompt: Sequence[int], rows: int, context: int | None = None) -> None:
        """Begin with the prompt; with `context`, no more than so many tokens are ever looked at."""
        self.model, self.context = model, context
        self.device = next(model.parameters()).device
        self.texts = [list(prompt) for _ in range(rows)]
        self.cache = GrowingCache()
        if context is None:
            logits = self._run([prompt])
            choose_rows(self.cache, [0] * rows)
            self.logits = logits.expand(rows, -1)
        else:
            self.logits = self._run([text[-context:] for text in self.texts])

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Read a token in each row."""
        for text, token in zip(self.texts, tokens, strict=True):
            text.append(token)
        if self.context is None:
            self.logits = self._run([[token] for token in tokens])
        else:  # the window moves, and with it every position: begin anew
            self.cache = GrowingCache()
            self.logits = self._run([text[-self.context :] for text in self.texts])
        return self.logits

    @torch.no_grad()
    def _run(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        hidden = self.model.hidden(torch.tensor(tokens, device=self.device), self.cache)
        return self.model.head(hidden[:, -1])


def write(
    model: Decoder,
    states: list[RequestState],
    on_step: Callable[[Sampled], object] = lambda sampled: None,
    contrast: Callable[[Tensor, Sequence[int] | None], Tensor] | None = None,
) -> None:
    """Write until every request has ended; all have the same prompt. `contrast` may change the logits."""
    steps, sampler = Steps(model, states[0].prompt, len(states)), Sampler()
    tokens: list[int] | None = None
    while True:
        logits = steps.logits if tokens is None else steps.feed(tokens)
        logits = contrast(logits, tokens) if contrast else logits
        going = [row for row, state in enumerate(states) if state.finish_reason is None]
        sampled = sampler(logits[going], [states[row] for row in going])
        on_step(sampled)
        if all(state.finish_reason for state in states):
            return
        tokens = [0] * len(states)
        for row, token in zip(going, sampled.tokens, strict=True):
            tokens[row] = max(token, 0)  # rows that have ended read something, whatever it is


class Contrast:
    """Subtract what an amateur says (contrastive decoding)."""

    def __init__(self, config: GenerateConfig, writer: Writer, state: RequestState) -> None:
        self.config = config
        amateur, context = writer.model, config.amateur_context
        if config.amateur:
            amateur, tokenizer = load_model(config.amateur, next(writer.model.parameters()).dtype)
            context = amateur.config.block_size
            if tokenizer.encode("A test.") != writer.tokenizer.encode("A test."):
                raise ValueError(
                    f"amateur ({config.amateur}) must have the tokenizer of {config.writer.model}"
                )
        self.steps = Steps(amateur, state.prompt, config.num_samples, context)

    def __call__(self, logits: Tensor, tokens: Sequence[int] | None) -> Tensor:
        """Return the contrast of the expert's logits with the amateur's, after the same tokens."""
        amateur = self.steps.logits if tokens is None else self.steps.feed(tokens)
        return contrastive_logits(logits, amateur, self.config.contrast)


def run(config: GenerateConfig) -> list[str]:
    """Write what was asked for, printing as it comes, and return it."""
    config = replace(config, sampling=with_schema_text(config.sampling))
    writer = Writer(config.writer)
    if not config.interactive:
        return answer(config, writer, config.writer.prompt)
    texts = []
    for prompt in ask("you> " if writer.chats else "text> "):
        try:
            texts += answer(config, writer, prompt)
        except ValueError as error:  # what is too long should not end the conversation
            print(f"error: {one_line(error)}")
    return texts


def with_schema_text(params: SamplingParams) -> SamplingParams:
    """Return the settings with the schema's text where they have the name of its file."""
    schema = params.json_schema
    if schema is None or schema.lstrip()[:1] in ("{", "t", "f"):
        return params
    path = Path(schema)
    if not path.is_file():
        raise FileNotFoundError(f"json_schema ({schema}) must be a schema as JSON text, or a file with one")
    return replace(params, json_schema=path.read_text(encoding="utf-8"))


def answer(config: GenerateConfig, writer: Writer, prompt: str) -> list[str]:
    """Print and return the texts after one prompt."""
    began = time.perf_counter()
    states = writer.states(prompt, config.sampling, config.num_samples)
    contrast = Contrast(config, writer, states[0]) if config.contrast else None
    single, opening = len(states) == 1, "" if writer.chats else prompt
    if single:
        print(opening, end="", flush=True)
    write(
        writer.model, states, lambda sampled: single and print(sampled.shown[0], end="", flush=True), contrast
    )
    for i, state in enumerate(states):
        if not single:
            print(f"--- sample {i + 1} of {len(states)}, seed {state.seed}, ended by {state.finish_reason}")
            print(opening + state.text)
        if state.error:
            print(f"\nerror: {state.error}")
    tokens, seconds = sum(len(state.output) for state in states), time.perf_counter() - began
    ending = f", ended by {states[0].finish_reason}, seed {states[0].seed}" if single else ""
    print(f"\n({tokens} tokens, {tokens / seconds:.1f} tokens/s{ending})", file=sys.stderr)
    return [opening + state.text for state in states]


def load_tokenizer_of(name: str) -> tuple[Tokenizer, int]:
    """Return the tokenizer of a model, and the size of the model's vocabulary."""
    model, tokenizer = load_model(name)
    return tokenizer, model.config.vocab_size


@script
def main() -> None:
    """Parse and write."""
    run(GenerateConfig.from_cli())


if __name__ == "__main__":
    main()
