"""Climb from counting pairs of characters to the full GPT, one idea per rung.

uv run python phase1_foundation/project1_minimal_gpt/ladder.py
"""

import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from common.device import pick_device, pick_dtype, seed_everything
from common.files import atomic_write, make_folder, shown
from common.plots import new_figure, save_figure
from common.script import progress, script
from phase1_foundation.project1_minimal_gpt.attention import (
    AttentionBackend,
    CausalAttention,
    CausalSelfAttention,
)
from phase1_foundation.project1_minimal_gpt.config import GPTConfig, LadderConfig, TrainConfig
from phase1_foundation.project1_minimal_gpt.data import TextData, read_ids
from phase1_foundation.project1_minimal_gpt.model import GPT, FeedForward
from phase1_foundation.project1_minimal_gpt.optimizer import lr_factor, make_optimizers
from phase1_foundation.project1_minimal_gpt.train import evaluate, find_text, train_step


class CountedBigram(nn.Module):
    """Rung 1: how often did each character follow each other one? No learning, one pass over the text."""

    def __init__(self, ids: Tensor, vocab_size: int) -> None:
        super().__init__()
        pairs = torch.bincount(ids[:-1] * vocab_size + ids[1:], minlength=vocab_size**2)
        counts = pairs.view(vocab_size, vocab_size) + 1  # a pair never seen is rare, not impossible
        self.register_buffer("log_odds", (counts / counts.sum(dim=1, keepdim=True)).log())  # (V, V)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, T) to (B, T, V)."""
        return self.get_buffer("log_odds")[tokens]


class LearnedBigram(nn.Module):
    """Rung 2.

    The same table, found by gradient descent; it ends where counting began, but this way can be built on.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.zeros_(self.table.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, T) to (B, T, V)."""
        return self.table(tokens)


class AverageOfThePast(CausalAttention):
    """Rung 3's backend: every earlier token counts the same, so queries and keys are not even looked at."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the running mean of v over positions, (B, H, T, D)."""
        count = torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
        return v.cumsum(dim=2) / count


class OneMix(nn.Module):
    """Rungs 3 to 6.

    Embed, mix the past once, perhaps think about it, predict. Nothing is added or normalized yet.
    """

    def __init__(self, config: GPTConfig, backend: AttentionBackend, feed_forward: bool = False) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.attention = CausalSelfAttention(config)
        self.feed_forward = FeedForward(config) if feed_forward else nn.Identity()
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        self.backend = backend

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, T) to (B, T, V)."""
        x = self.token_embedding(tokens) + self.position_embedding(self.backend.positions(tokens))
        x = self.attention(x, partial(self.backend.attend, 0))
        return self.head(self.feed_forward(x))


@dataclass
class Rung:
    """One row of the ladder's table."""

    name: str
    idea: str
    build: Callable[[], nn.Module]
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1.0  # times the ladder's; a table of log-odds has further to go than a network's weights
    parameters: int = 0
    seconds: float = 0.0
    val_loss: float = 0.0  # nats per character


def make_rungs(shape: GPTConfig, ids: Tensor) -> list[Rung]:
    """Return the nine rungs, each one idea above the last; `ids` is the training part."""
    heads, attention = shape.n_head, CausalAttention(shape.attention)
    counted = partial(CountedBigram, ids, shape.vocab_size)
    average = partial(OneMix, replace(shape, n_head=1), AverageOfThePast())
    one_head = partial(OneMix, replace(shape, n_head=1), attention)
    thinking = partial(OneMix, shape, attention, feed_forward=True)
    one_block = partial(GPT, replace(shape, n_layer=1))
    return [
        Rung("bigram, counted", "the last character says what comes next", counted),
        Rung("bigram, learned", "the same table, by gradient descent", partial(LearnedBigram, shape), lr=30),
        Rung("average of the past", "look at all earlier characters, equally", average),
        Rung("attention, 1 head", "choose what to look at", one_head),
        Rung(
            f"attention, {heads} heads", "look for several things at once", partial(OneMix, shape, attention)
        ),
        Rung("+ feed-forward", "think about what was found", thinking),
        Rung("+ residuals, LayerNorm", "add to the stream instead of replacing it", one_block),
        Rung(f"+ depth: {shape.n_layer} blocks", "look again, at what the others found", partial(GPT, shape)),
        Rung("+ Muon", "the same network, better steps", partial(GPT, shape), optimizer="muon"),
    ]


def climb(rung: Rung, data: TextData, config: LadderConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Train one rung's model (unless it has nothing to learn) and fill in its numbers."""
    seed_everything(config.seed)
    model = rung.build().to(device)
    rung.parameters = sum(weight.numel() for weight in model.parameters())
    begin = time.perf_counter()
    if rung.parameters:
        how = TrainConfig(max_steps=config.steps, optimizer=rung.optimizer, lr=config.lr * rung.lr)
        optimizers = make_optimizers(model, how)
        bar = progress(range(config.steps), desc=f"{rung.name:24}", leave=False)
        for step in bar:
            loss = train_step(model, optimizers, *data.batch(step, device), dtype, lr_factor(step, how))
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    rung.seconds = time.perf_counter() - begin
    rung.val_loss = evaluate(model, data, device, dtype)


def run(config: LadderConfig) -> list[Rung]:
    """Climb all rungs, print the table, draw it, and return it."""
    out = make_folder(config.out)
    device = pick_device(config.device)
    dtype = pick_dtype("auto", device)
    ids, tokenizer = read_ids(find_text(config.data, config.source), "char")
    data = TextData(ids, config.block_size, config.batch_size, config.seed)
    V, T, C = tokenizer.vocab_size, config.block_size, config.n_embd
    rungs = make_rungs(GPTConfig(block_size=T, vocab_size=V, n_layer=4, n_head=4, n_embd=C), data.train)
    before = math.log(V)
    print(f"{'rung':27}{'parameters':>11}{'seconds':>9}{'validation loss':>17}{'gain':>8}   idea")
    print(f"{'0  knowing nothing':27}{0:11,}{0:9.1f}{before:17.4f}{'':8}   all {V} characters are as likely")
    for number, rung in enumerate(rungs, start=1):
        climb(rung, data, config, device, dtype)
        numbers = (
            f"{rung.parameters:11,}{rung.seconds:9.1f}{rung.val_loss:17.4f}{before - rung.val_loss:8.4f}"
        )
        print(f"{number}  {rung.name:24}{numbers}   {rung.idea}", flush=True)
        before = rung.val_loss
    write(rungs, config)
    print(f"losses are nats per character over the whole validation part; {config.steps} steps per rung")
    print(f"written to {shown(out)}: ladder.csv, ladder.png; next: read model.py, then run train.py")
    return rungs


def write(rungs: list[Rung], config: LadderConfig) -> None:
    """Write ladder.csv and draw ladder.png."""
    with atomic_write(config.out / "ladder.csv") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["rung", "parameters", "seconds", "val_loss"])
        table.writerows(
            [rung.name, rung.parameters, f"{rung.seconds:.1f}", f"{rung.val_loss:.4f}"] for rung in rungs
        )
    figure, axes = new_figure(width=8)
    names = [f"{number}  {rung.name}" for number, rung in enumerate(rungs, start=1)]
    losses = [rung.val_loss for rung in rungs]
    bars = axes.barh(names, losses, color=["#9aa5b1"] * 2 + ["#3b7dd8"] * (len(rungs) - 2))
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.invert_yaxis()  # the first rung on top
    axes.grid(visible=False, axis="y")
    axes.set_xlim(min(losses) * 0.8, max(losses) * 1.05)
    axes.set(
        title=f"What each idea buys: {config.steps} steps each", xlabel="validation loss (nats per character)"
    )
    save_figure(figure, config.out / "ladder.png")


@script
def main() -> None:
    """Parse and climb."""
    config = LadderConfig.from_cli()
    config.print_config()
    run(config)


if __name__ == "__main__":
    main()
