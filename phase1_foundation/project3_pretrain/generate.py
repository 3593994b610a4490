"""Let a model write, or chat with one that was taught to.

uv run python phase1_foundation/project3_pretrain/generate.py --model smollm2-135m --interactive

A chat model gets what you type between the marks that it was taught with (ChatML).
"""

import sys
import time
from collections.abc import Collection, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from common.device import pick_device
from common.script import ask, one_line, script
from phase1_foundation.project1_minimal_gpt.generate import next_token_odds, stream_text
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.config import GenerateConfig
from phase1_foundation.project3_pretrain.likelihood import STARTS, start_token
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model

IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # before and after what each speaker says
Message = tuple[str, str]  # who: system, user or assistant; what


class GrowingCache:
    """A backend that remembers the keys and values of all tokens so far, so that each is computed once.

    The plain form: a tensor that grows token by token. What can be had beyond it is project 7's subject.
    """

    def __init__(self) -> None:
        self.length = 0  # tokens remembered
        self.past: dict[int, tuple[Tensor, Tensor]] = {}  # of each layer, (B, Hkv, length, D)

    def positions(self, tokens: Tensor) -> Tensor:
        """Return where the new tokens stand, behind those remembered."""
        self.length += tokens.shape[1]
        return torch.arange(self.length - tokens.shape[1], self.length, device=tokens.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values of the past and of the new tokens up to each."""
        if layer in self.past:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(self.past[layer], (k, v), strict=True))
        self.past[layer] = k, v
        T, S = q.shape[2], k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if 1 < T < S else None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=T == S, enable_gqa=q.shape[1] != k.shape[1]
        )


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Yield new token ids one by one, up to one of `stop`; the same seed gives the same ids.

    Where the text outgrows block_size, the cache begins anew with its later half. Raises ValueError for an
    empty or too long prompt.
    """
    block_size, device = model.config.block_size, next(model.parameters()).device
    if not 1 <= len(prompt) <= block_size:
        raise ValueError(
            f"prompt ({len(prompt)} tokens) must have at least 1 and at most {block_size} tokens"
        )
    draw = torch.Generator().manual_seed(seed)
    text, new, cache = list(prompt), list(prompt), GrowingCache()
    for _ in range(max_new_tokens):
        if cache.length + len(new) > block_size:
            new, cache = text[-max(1, block_size // 2) :], GrowingCache()
        hidden = model.hidden(torch.tensor([new], device=device), cache)[:, -1]  # (1, C)
        odds = next_token_odds(model.head(hidden)[0].float().cpu(), temperature, top_k, top_p)
        token = int(torch.multinomial(odds, 1, generator=draw))
        if token in stop:
            return
        yield token
        text.append(token)
        new = [token]


def can_chat(tokenizer: Tokenizer) -> bool:
    """Say whether a tokenizer has the marks of ChatML."""
    return {IM_START, IM_END} <= tokenizer.special_tokens.keys()


def chat_ids(tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    r"""Return a conversation in ChatML, ready for the assistant's answer.

    It is <|im_start|>user\nwhat is said<|im_end|>\n for each message. A model file brings its template as a
    program (Jinja) that it wants run; these four lines do the same for this template and run nothing. The
    marks go in as ids and what is said as mere text: typing <|im_end|> does not end a message.
    """
    start, end = tokenizer.special_tokens[IM_START], tokenizer.special_tokens[IM_END]
    ids: list[int] = []
    for who, what in messages:
        ids += [start, *tokenizer.encode(f"{who}\n{what}"), end, *tokenizer.encode("\n")]
    return [*ids, start, *tokenizer.encode("assistant\n")]


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return a text to go on from, after the mark that begins one if the tokenizer has it."""
    start = start_token(tokenizer)
    return [*([] if start is None else [start]), *tokenizer.encode(text)]


def stop_tokens(tokenizer: Tokenizer, chats: bool = True) -> frozenset[int]:
    """Return the ids at which a text, or an answer of someone who chats, is over."""
    names = (*STARTS, IM_END) if chats else STARTS
    return frozenset(tokenizer.special_tokens[name] for name in names if name in tokenizer.special_tokens)


class Writer:
    """A model with all that it takes to answer: its tokenizer, the settings, and what was said so far."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.model, self.tokenizer = load_model(config.model)
        self.model.to(pick_device(config.device))
        self.chats = can_chat(self.tokenizer) if config.chat == "auto" else config.chat == "yes"
        if self.chats and not can_chat(self.tokenizer):
            raise ValueError(f"chat (yes) must be no: {config.model} does not know {IM_START} and {IM_END}")
        self.messages: list[Message] = [("system", config.system)] if config.system else []
        self.stop = stop_tokens(self.tokenizer, self.chats)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return what the model is given; of a conversation that no longer fits, the oldest turns go."""
        if not self.chats:
            return text_ids(self.tokenizer, prompt)
        ids = chat_ids(self.tokenizer, [*self.messages, ("user", prompt)])
        kept = 1 if self.config.system else 0
        while (
            len(ids) > self.model.config.block_size - self.config.max_new_tokens and len(self.messages) > kept
        ):
            del self.messages[kept : kept + 2]
            ids = chat_ids(self.tokenizer, [*self.messages, ("user", prompt)])
        return ids

    def tokens_after(self, ids: list[int], seed: int) -> Iterator[int]:
        """Yield what the model writes after these tokens; project 7 does it with other caches."""
        config = self.config
        how = (config.max_new_tokens, config.temperature, config.top_k, config.top_p, seed, self.stop)
        return generate(self.model, ids, *how)

    def write(self, prompt: str, seed: int) -> str:
        """Print the continuation or the answer as it comes, and return it."""
        opening = "" if self.chats else prompt
        print(opening, end="", flush=True)
        return opening + print_text(self.tokenizer, self.tokens_after(self.prompt_ids(prompt), seed))


def print_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """Print the text of tokens as they come, then their number and speed; return the text."""
    began, count, pieces = time.perf_counter(), 0, list[str]()

    def counted() -> Iterator[int]:
        nonlocal count
        for token in tokens:
            count += 1
            yield token

    for piece in stream_text(tokenizer, counted()):  # type: ignore[arg-type]
        pieces.append(piece)
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - began
    print()
    print(f"({count} tokens, {count / seconds:.1f} tokens/s)", file=sys.stderr)
    return "".join(pieces)


def run(config: GenerateConfig, writer: Writer | None = None) -> list[str]:
    """Write what was asked for, printing as it comes, and return it."""
    writer = writer or Writer(config)
    if not config.interactive:
        if config.num_samples == 1:
            return [writer.write(config.prompt, config.seed)]
        texts = []
        for seed in range(config.seed, config.seed + config.num_samples):
            print(f"--- sample {seed - config.seed + 1} of {config.num_samples}, seed {seed}")
            texts.append(writer.write(config.prompt, seed))
        return texts
    texts = []
    for turn, prompt in enumerate(ask("you> " if writer.chats else "text> ")):
        try:
            texts.append(writer.write(prompt, config.seed + turn))
        except ValueError as error:  # what is too long should not end the conversation
            print(f"error: {one_line(error)}")
            continue
        if writer.chats:
            writer.messages += [("user", prompt), ("assistant", texts[-1])]
    return texts


@script
def main() -> None:
    """Parse and write."""
    run(GenerateConfig.from_cli())


if __name__ == "__main__":
    main()
