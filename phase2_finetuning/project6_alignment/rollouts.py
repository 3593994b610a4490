r"""Let the policy write: many answers at once, through a cache, with the odds it gave to every token.

PAPERS
  [1] Training language models to follow instructions with human feedback, Ouyang et al., 2022,
      arXiv:2203.02155 (InstructGPT)
  [2] DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, Shao et al., 2024,
      arXiv:2402.03300 (GRPO)
  [3] Efficiently Scaling Transformer Inference, Pope et al., 2022, arXiv:2211.05102
  [4] Orca: A Distributed Serving System for Transformer-Based Generative Models, Yu et al., OSDI 2022
  [5] Truncated Importance Sampling, Ionides, 2008, Journal of Computational and Graphical Statistics 17
  [6] Your Efficient RL Framework Secretly Brings You Off-Policy RL Training, Yao et al., 2025,
      fengyao.notion.site/off-policy-rl

SHAPES
  B  rows: the texts that are written at once    H, Hkv  query heads, key and value heads
  T  tokens of the longest row                   D       head_dim
  S  columns that the cache remembers            V       vocab_size
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from phase1_foundation.project3_pretrain.layers import DocumentAttention
from phase1_foundation.project3_pretrain.model import Decoder

PAD = 0  # token that fills a row up; nothing ever looks at it
CROWDED = 0.75  # share of rows still being written at which the others are taken out of the cache


@dataclass
class Rollout:
    """Texts that a model wrote after its prompts, one to the row.

    PAPER: none; what the policy gradient of [1] Sec. 3.5 and [2] Sec. 4.1 needs to know.
    PAPER CONTEXT: Writing wants rows that end together, learning wants rows that begin together.
    INTUITION: The exam papers as they were handed in.
    IMPLEMENTATION: Each row begins in column 0 and is filled up behind, so the trainer needs no mask: causal
        attention never sees what comes last. Entry t of each table belongs to tokens[b, t].
    WHY: The same layout as the trainer's (logprobs.py), so nothing is ever shifted against anything.
    """

    tokens: Tensor  # (B, T) int64: prompt, answer, filling
    mask: Tensor  # (B, T) bool: True on what the model wrote, the stop token included
    logprobs: Tensor  # (B, T) float: log of the odds with which tokens[b, t] was drawn; 0 where not written
    stopped: Tensor  # (B,) bool: ended with a stop token, rather than being cut off

    def answers(self) -> list[list[int]]:
        """Return the tokens that were written in each row, without the stop token."""
        rows = zip(self.tokens, self.mask, self.stopped.tolist(), strict=True)
        return [row[mask].tolist()[: -1 if stopped else None] for row, mask, stopped in rows]

    def take(self, rows: Tensor) -> Self:
        """Return some of the rows, without the columns that none of them uses."""
        place = torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device)
        T = max(2, int((place * self.mask[rows]).max())) if len(rows) else 2
        tokens, mask, logprobs = (each[rows, :T] for each in (self.tokens, self.mask, self.logprobs))
        return type(self)(tokens, mask, logprobs, self.stopped[rows])

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Return the rows of several rollouts as one."""
        T = max(part.tokens.shape[1] for part in parts)

        def joined(name: str) -> Tensor:
            tables = (getattr(part, name) for part in parts)
            return torch.cat([F.pad(table, (0, T - table.shape[1])) for table in tables])

        stopped = torch.cat([part.stopped for part in parts])
        return cls(joined("tokens"), joined("mask"), joined("logprobs"), stopped)


class LeftPaddedCache:
    """A backend that remembers the keys and values of many rows of unequal length.

    PAPER: the whole prompt in parallel, then token by token from the cache, [3]; that a finished row leaves
        without waiting for the others, [4].
    PAPER CONTEXT: Reinforcement learning spends most of its time writing. A row alone reads all weights for
        one token; a hundred rows read them once for a hundred.
    INTUITION: Line the prompts up at their right edge: everybody's next word then goes into the same column.
    IMPLEMENTATION: Columns before a row's first token are padding. The prompts meet project 3's document
        mask (padding is another document); after them each step adds one column to memory that is there from
        the start. `keep` takes rows out, or copies them: a group shares its prompt until its answers part.
    WHY: Logits equal those of each row alone without a cache, to rounding (tests), so what is learned is
        about the text that was written, not about its neighbours in the batch.
    """

    def __init__(self, lengths: Sequence[int], room: int) -> None:
        """Expect rows of these lengths, padded on the left to the longest, and `room` columns in all."""
        self.begins = max(lengths) - torch.tensor(lengths)  # (B,) column of each row's first token
        self.room, self.length = room, 0
        self.past: dict[int, Tensor] = {}  # of each layer, keys and values: (2, B, Hkv, room, D)
        self.prefill: DocumentAttention | None = None
        self.seen: Tensor | None = None

    def positions(self, tokens: Tensor) -> Tensor:
        """Return where the new tokens stand in their own rows, (B, T)."""
        first, self.length = self.length, self.length + tokens.shape[1]
        self.begins = self.begins.to(tokens.device)
        columns = torch.arange(self.length, device=tokens.device)
        written = columns >= self.begins[:, None]  # (B, S)
        self.prefill = DocumentAttention(written.int()) if first == 0 else None
        self.seen = written[:, None, None]  # (B, 1, 1, S)
        return (columns[first:] - self.begins[:, None]).clamp(min=0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values of each row's own past and of its new tokens: all of the prompt, then one by one."""
        if layer not in self.past:
            B, Hkv, _, D = k.shape
            self.past[layer] = k.new_empty(2, B, Hkv, self.room, D)
        past, first = self.past[layer], self.length - k.shape[2]
        past[0, :, :, first : self.length], past[1, :, :, first : self.length] = k, v
        if self.prefill:
            return self.prefill.attend(layer, q, k, v)
        keys, values = past[:, :, :, : self.length]  # (B, Hkv, S, D)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.seen, enable_gqa=grouped)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row that is named several times becomes several.

        Columns that are padding for all of them go as well.
        """
        begins = self.begins[rows]
        spare = int(begins.min())
        self.begins, self.length, self.room = begins - spare, self.length - spare, self.room - spare
        self.past = {layer: past[:, rows, :, spare:] for layer, past in self.past.items()}


@torch.no_grad()
def sample(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    stop: Collection[int] = (),
    seed: int = 0,
    samples: int = 1,
) -> Rollout:
    """Write `samples` answers to each prompt, each up to a stop token; those of a prompt are adjacent rows.

    PAPER: the policy's answers, [1] Sec. 3.5; a group of them for each question, [2] Sec. 4.1.1.
    PAPER CONTEXT: A policy gradient needs texts that the policy itself wrote, and their probabilities.
    INTUITION: A class writes an exam; whoever hands in leaves the room, and the others have more air.
    IMPLEMENTATION: Each row draws by a uniform number that depends on the seed, its own number and the step
        alone, where the cumulative odds pass it: no row notices who shares the batch. All odds are softmax of
        logits / temperature, whole: a top-p would make the odds of the trainer those of another distribution.
    WHY: The log-odds noted here equal the trainer's within rounding (a test; 1e-12 in float64). Where they
        do not, as between two precisions or two engines, the ratio of PPO is wrong from the first step on.

    At temperature 0 the likeliest token is taken, and its log-odds at temperature 1 are noted. Raises
    ValueError for prompts that are empty or leave no room for an answer.
    """
    check_prompts(model, prompts, max_new_tokens)
    first, was_training = next(model.parameters()), model.training
    device, B = first.device, len(prompts) * samples
    noise = torch.rand(B, max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    noise = noise.to(device, torch.float32 if device.type == "mps" else torch.float64)  # mps has no float64
    ends = torch.tensor(sorted(stop), dtype=torch.long, device=device)
    tokens = torch.full((B, max_new_tokens), PAD, device=device)
    logprobs = torch.zeros_like(tokens, dtype=torch.promote_types(first.dtype, torch.float32))
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    rows, active = torch.arange(B, device=device), mask.new_ones(B)  # in the cache; of these, still writing
    model.eval()
    try:
        hidden, cache = prefill(model, prompts, max_new_tokens)
        hidden = hidden[rows // samples]  # (B, C)
        cache.keep(rows // samples)
        for step in range(max_new_tokens):
            drawn, odds = draw(logits_of(model, hidden), temperature, noise[rows, step])
            tokens[rows, step], mask[rows, step] = drawn.where(active, PAD), active
            logprobs[rows, step] = odds.where(active, 0)
            active &= ~torch.isin(drawn, ends)
            share = active.double().mean().item()
            if not share or step == max_new_tokens - 1:
                break
            if share <= CROWDED:
                stay = active.nonzero()[:, 0]
                cache.keep(stay)
                rows, drawn, active = rows[stay], drawn[stay], active[stay]
            hidden = model.hidden(drawn[:, None], cache)[:, 0]
    finally:
        model.train(was_training)
    return assemble([prompt for prompt in prompts for _ in range(samples)], tokens, mask, logprobs, ends)


def check_prompts(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise ValueError for prompts that are empty, or that leave no room for an answer."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"prompts ({len(lengths)}) must be at least one, of at least one token each")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
    room = model.config.block_size - max_new_tokens
    if max(lengths) > room:
        rule = f"block_size - max_new_tokens ({model.config.block_size} - {max_new_tokens})"
        raise ValueError(f"prompts (the longest of {max(lengths)} tokens) must have at most {rule} tokens")


def prefill(
    model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[Tensor, LeftPaddedCache]:
    """Return what the head needs for the first token after each prompt, (B, C), and the cache behind it."""
    longest = max(map(len, prompts))
    padded = [[PAD] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    cache = LeftPaddedCache([len(prompt) for prompt in prompts], longest + max_new_tokens - 1)
    return model.hidden(torch.tensor(padded, device=next(model.parameters()).device), cache)[:, -1], cache


def logits_of(model: Decoder, hidden: Tensor) -> Tensor:
    """Map (B, C) to logits (B, V), in the precision of the weights even where products run in 16 bits."""
    with torch.autocast(hidden.device.type, enabled=False):
        return model.head(hidden.to(model.head.weight.dtype))


def draw(logits: Tensor, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return a token for each row of logits (B, V), and its log-odds; `noise` (B,) is uniform in [0, 1)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    odds = F.log_softmax(logits / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = odds.argmax(dim=-1)
    else:
        total = odds.to(noise.dtype).exp().cumsum(dim=-1)  # (B, V), up to about 1
        token = torch.searchsorted(total, noise[:, None] * total[:, -1:], right=True)[:, 0]
        token = token.clamp(max=odds.shape[-1] - 1)  # if rounding took the product up to the total
    return token, odds.gather(1, token[:, None])[:, 0]


def assemble(
    prompts: Sequence[Sequence[int]], tokens: Tensor, mask: Tensor, logprobs: Tensor, ends: Tensor
) -> Rollout:
    """Put what was written, (B, max_new_tokens), behind the prompts, and cut off columns that nobody uses."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
    longest = int(lengths.max())
    filled = [list(prompt) + [PAD] * (longest - len(prompt)) for prompt in prompts]
    wide = F.pad(torch.tensor(filled, device=tokens.device), (0, tokens.shape[1]), value=PAD)
    places = lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)  # of what was written
    T = int((lengths + mask.sum(dim=1)).max())

    def placed(background: Tensor, written: Tensor) -> Tensor:
        return background.scatter(1, places, written)[:, :T]

    stopped = (mask & torch.isin(tokens, ends)).any(dim=1)
    zeros = torch.zeros_like(wide)
    return Rollout(
        placed(wide, tokens), placed(zeros.bool(), mask), placed(zeros.to(logprobs), logprobs), stopped
    )


def off_policy_weights(now: Tensor, written: Tensor, mask: Tensor, cap: float) -> Tensor:
    r"""Return what each token (B, T) counts, if other odds wrote it than the trainer finds: at most `cap`.

    PAPER: the cut, [5]; for the gap between the program that writes and the one that learns, [6].
    PAPER CONTEXT: The fast program that writes and the exact one that learns compute the same model in
        different precision or order, and so are two policies. [6] found training to collapse from that.
    INTUITION: If the class that was asked is not the class that you teach, weigh each answer by how much more
        often yours would have given it.
    IMPLEMENTATION: min(cap, odds now / odds when written), token by token. PPO's ratio is another matter: it
        compares the trainer after some updates with the trainer before them.
    WHY: Weighted so, answers of one model have the mean gradient of another's (a test adds them all up). The
        ratio's scatter is without bound; the cut makes a small error of the mean out of it.
    """
    return ((now - written) * mask).exp().clamp(max=cap) * mask
