"""Draw runs side by side, schedules, shards, and what the heads of a model look at.

uv run python phase1_foundation/project3_pretrain/visualize.py --pictures attention --model smollm2-135m
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.files import make_folder
from common.plots import new_figure, read_csv, save_figure
from common.script import script
from phase1_foundation.project1_minimal_gpt.visualize import PATTERNS, RecordingAttention, by_pattern
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.config import TRAIN_COMMAND, TrainConfig, VisualizeConfig
from phase1_foundation.project3_pretrain.likelihood import start_token
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.schedules import lr_share
from phase1_foundation.project3_pretrain.shards import documents_of, load_manifest, open_shard
from phase1_foundation.project3_pretrain.weights import load_model

LABELLED = 64  # tokens of a map that have room for their names


def run(config: VisualizeConfig) -> list[Path]:
    """Draw the pictures that are asked for and return their paths."""
    out, paths = make_folder(config.out), []
    draw: dict[str, Callable[[VisualizeConfig, Path], str]] = {
        "losses": draw_losses,
        "schedules": draw_schedules,
        "shards": draw_shards,
        "attention": draw_attention,
    }
    for name in config.pictures:
        paths.append(out / f"{name}.png")
        print(f"{paths[-1]}: {draw[name](config, paths[-1])}")
    return paths


# Training


def draw_losses(config: VisualizeConfig, path: Path) -> str:
    """Draw the losses of all runs, by step and by seconds."""
    figure, axes = new_figure(columns=2, width=11, height=4.2)
    for number, run_folder in enumerate(config.runs):
        file = run_folder / "losses.csv"
        if not file.is_file():
            raise FileNotFoundError(f"no {file}; make it with: {TRAIN_COMMAND} --out {run_folder}")
        rows = read_csv(file)
        for panel, x in zip(axes, ("step", "seconds"), strict=True):
            for column, width, alpha in (("train_loss", 0.8, 0.35), ("val_loss", 2.0, 1.0)):
                points = [(float(row[x]), float(row[column])) for row in rows if row[column] and row[x]]
                last = f"{run_folder.name}: {points[-1][1]:.3f}" if points and column == "val_loss" else None
                panel.plot(
                    [a for a, _ in points],
                    [b for _, b in points],
                    color=f"C{number}",
                    linewidth=width,
                    alpha=alpha,
                    label=last,
                )
    for panel, x in zip(axes, ("step", "seconds of training"), strict=True):
        panel.set(
            xlabel=x, ylabel="loss (nats per token)", title="validation (thick) and training batches (thin)"
        )
        panel.legend(fontsize=8)
    save_figure(figure, path)
    return f"the losses of {len(config.runs)} runs, by step and by time"


def draw_schedules(config: VisualizeConfig, path: Path) -> str:
    """Draw the learning rate over a run of the default length, and over one that is twice as long."""
    figure, axes = new_figure(columns=2, width=11, height=3.4)
    for panel, schedule in zip(axes, ("cosine", "wsd"), strict=True):
        for times, style in ((1, "-"), (2, "--")):
            how = TrainConfig(schedule=schedule, max_steps=times * TrainConfig.max_steps)  # type: ignore[arg-type]
            shares = [lr_share(step, how) for step in range(how.max_steps)]
            panel.plot(shares, style, label=f"{how.max_steps:,} steps")
        panel.set(title=schedule, xlabel="step", ylabel="share of the peak learning rate")
        panel.legend(fontsize=8)
    save_figure(figure, path)
    return "how the learning rate rises and falls, in a run and in one twice as long"


# Data


def draw_shards(config: VisualizeConfig, path: Path) -> str:
    """Draw how long the documents are, how often each token occurs, and how large the shards are."""
    manifest = load_manifest(config.shards)
    lengths: list[int] = []
    counts = np.zeros(manifest.vocab_size, np.int64)
    for shard in manifest.shards:
        tokens = open_shard(config.shards, manifest, shard, verify=False)
        counts += np.bincount(tokens, minlength=manifest.vocab_size)
        lengths += [len(document) for document in documents_of(tokens, manifest.separator)]
    figure, (left, middle, right) = new_figure(columns=3, width=14, height=4)
    edges = np.geomspace(1, max(lengths) + 1, 41)
    left.hist(lengths, edges, label="documents")
    left.hist(
        lengths, edges, weights=np.array(lengths) / np.mean(lengths), alpha=0.5, label="their tokens (scaled)"
    )
    left.set(
        xscale="log", title=f"{len(lengths):,} documents", xlabel="tokens in a document", ylabel="documents"
    )
    left.legend(fontsize=8)
    ranked = np.sort(counts[counts > 0])[::-1]
    rank = np.arange(1, len(ranked) + 1)
    middle.loglog(rank, ranked, label=f"{len(ranked):,} of {len(counts):,} tokens occur")
    middle.loglog(rank, ranked[0] / rank, ":", color="grey", label="Zipf: 1 / rank")
    middle.set(title="how often each token occurs", xlabel="rank", ylabel="occurrences", ylim=(0.5, None))
    middle.legend(fontsize=8)
    names = [shard.file.removesuffix(".bin") for shard in manifest.shards]
    colors = ["C0" if shard.split == "train" else "C1" for shard in manifest.shards]
    right.barh(names, [shard.tokens / 1e6 for shard in manifest.shards], color=colors)
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=7)
    right.set(title="shards", xlabel="million tokens")
    save_figure(figure, path)
    return f"{counts.sum():,} tokens in {len(lengths):,} documents"


# Attention


class GroupedRecordingAttention(RecordingAttention):
    """Project 1's backend that keeps its weights, for fewer key heads than query heads."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix as if each query head had a key head of its own."""
        sharing = q.shape[1] // k.shape[1]
        return super().attend(layer, q, k.repeat_interleave(sharing, 1), v.repeat_interleave(sharing, 1))


@torch.no_grad()
def attention_weights(model: Decoder, ids: list[int]) -> Tensor:
    """Return the weights (n_layer, n_head, T, T) with which each token (row) attends to each (column)."""
    if not 1 <= len(ids) <= model.config.block_size:
        raise ValueError(f"prompt ({len(ids)} tokens) must have at most {model.config.block_size} tokens")
    backend = GroupedRecordingAttention()
    model.hidden(torch.tensor([ids]), backend)
    return torch.cat(backend.weights)


def draw_attention(config: VisualizeConfig, path: Path) -> str:
    """Draw what all heads look for in a text that comes twice, and a map of the best head for each."""
    model, tokenizer = load_model(config.model)
    start, text = start_token(tokenizer), tokenizer.encode(config.prompt)
    ids = [*([] if start is None else [start]), *text, *text]
    weights = attention_weights(model, ids)
    shares = by_pattern(weights, torch.tensor(ids))  # (n_layer, n_head, patterns)
    n_layer, n_head, _ = shares.shape
    figure, axes = new_figure(2, len(PATTERNS), width=3.6 * len(PATTERNS), height=8.6)
    for column, name in enumerate(PATTERNS):
        share = shares[:, :, column]
        layer, head = divmod(int(share.argmax()), n_head)
        name = name.replace("\n", " ")
        top, bottom = axes[0, column], axes[1, column]
        image = top.imshow(share.numpy(), cmap="magma_r", vmin=0, vmax=1, aspect="auto", origin="lower")
        top.set(title=f"on {name}", xlabel="head", ylabel="layer" if column == 0 else "")
        top.set_xticks(range(0, n_head, math.ceil(n_head / 12)))
        top.set_xticklabels([str(h + 1) for h in range(0, n_head, math.ceil(n_head / 12))], fontsize=7)
        every = math.ceil(n_layer / 15)
        top.set_yticks(range(0, n_layer, every), [str(x + 1) for x in range(0, n_layer, every)], fontsize=7)
        show_map(bottom, weights[layer, head], [label(tokenizer, i) for i in ids])
        bottom.set_title(f"layer {layer + 1}, head {head + 1}: {share.max():.0%} on {name}", fontsize=9)
    for panel in axes.flat:
        panel.grid(visible=False)
    figure.colorbar(image, ax=axes[0, -1], shrink=0.8, label="share of a head's attention")
    figure.suptitle(f"{config.model}: what {n_layer * n_head} heads look for in a text that comes twice")
    save_figure(figure, path)
    return f"{n_layer} layers of {n_head} heads on {len(ids)} tokens"


def show_map(panel: Any, weights: Tensor, labels: list[str]) -> None:
    """Show the weights (T, T) of one head; the shade is their root."""
    future = torch.ones_like(weights, dtype=torch.bool).triu(1)
    panel.imshow(weights.sqrt().masked_fill(future, float("nan")).numpy(), cmap="magma_r", vmin=0, vmax=1)
    panel.set_facecolor("#f2f2f2")
    every = math.ceil(len(labels) / LABELLED)
    size = min(6.0, 220 / len(labels))
    panel.set_xticks(range(0, len(labels), every), labels[::every], fontsize=size, rotation=90)
    panel.set_yticks(range(0, len(labels), every), labels[::every], fontsize=size)
    panel.tick_params(length=0, pad=1)


def label(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as something short that can be seen."""
    text = (
        tokenizer.decode([token]).replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥").replace("$", r"\$")
    )
    return "".join(char if char.isprintable() else "?" for char in text)[:12]


@script
def main() -> None:
    """Parse and draw."""
    run(VisualizeConfig.from_cli())


if __name__ == "__main__":
    main()
