"""Draw what the trained GPT attends to and what its embeddings have learned.

uv run python phase1_foundation/project1_minimal_gpt/visualize.py --prompt "To be, or not to be"
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.files import make_folder, shown
from common.plots import new_figure, save_figure
from common.script import script
from phase1_foundation.project1_minimal_gpt.attention import CausalAttention, explicit_attention
from phase1_foundation.project1_minimal_gpt.config import VisualizeConfig
from phase1_foundation.project1_minimal_gpt.generate import load_gpt
from phase1_foundation.project1_minimal_gpt.model import GPT
from phase1_foundation.project1_minimal_gpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#3b7dd8", "#d8733b", "#9aa5b1"
KINDS = {  # of characters, and the colors of their labels
    "vowel": "#c0392b",
    "consonant": "#2563b0",
    "capital": "#1e8449",
    "digit": "#8e44ad",
    "punctuation": "#b7791f",
    "whitespace": "#111111",
    "other": "#7f8c8d",
}
PATTERNS = {  # what a head may look for: the places in (T, T) for tokens (T,); row t is the token that looks
    "itself": lambda ids: torch.eye(len(ids), dtype=torch.bool),
    "the one\nbefore": lambda ids: torch.eye(len(ids), dtype=torch.bool).roll(-1, 1).tril(-1),
    "same\ntoken": lambda ids: (ids[:, None] == ids).tril(-1),
    "what followed\nthat one": lambda ids: (
        (ids[:, None] == ids.roll(1)).tril() & (torch.arange(len(ids)) > 0)
    ),
    "first of\nthe text": lambda ids: (torch.arange(len(ids)) == 0).expand(len(ids), len(ids)),
}


class RecordingAttention(CausalAttention):
    """A backend that computes plain causal attention and keeps the weights of every layer."""

    def __init__(self) -> None:
        super().__init__("explicit")
        self.weights: list[Tensor] = []  # per layer (B, H, T, T)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix (B, H, T, D); mixing the unit vectors instead of values gives the weights themselves."""
        B, H, T, _ = q.shape
        unit = torch.eye(T, dtype=q.dtype, device=q.device).expand(B, H, T, T)
        self.weights.append(explicit_attention(q, k, unit))
        return self.weights[-1] @ v


@torch.no_grad()
def attention_weights(model: GPT, ids: list[int]) -> Tensor:
    """Return the weights (n_layer, n_head, T, T) with which each token (row) attends to each (column)."""
    if not 1 <= len(ids) <= model.config.block_size:
        raise ValueError(
            f"prompt ({len(ids)} tokens) must have at least 1 and at most block_size "
            f"({model.config.block_size}) tokens"
        )
    backend = RecordingAttention()
    model(torch.tensor([ids]), backend)
    return torch.cat(backend.weights)


def run(config: VisualizeConfig) -> list[Path]:
    """Draw the pictures and return their paths."""
    model, tokenizer = load_gpt(config.checkpoint)
    ids = tokenizer.encode(config.prompt)
    weights = attention_weights(model, ids)
    out = make_folder(config.out)
    labels = [label(tokenizer, i) for i in ids]
    paths = [out / f"{name}.png" for name in ("attention", "heads", "positions", "tokens")]
    draw_attention(weights, labels, paths[0])
    draw_heads(weights, torch.tensor(ids), paths[1])
    draw_positions(model.position_embedding.weight.detach(), paths[2])
    draw_tokens(model.token_embedding.weight.detach(), tokenizer, paths[3])
    described = (
        f"{model.config.n_layer} layers of {model.config.n_head} heads, on {len(ids)} tokens",
        "how far back each head looks, and at what",
        "how alike the learned positions are, and their main directions",
        "the tokens on the two main directions of their embeddings",
    )
    for path, what in zip(paths, described, strict=True):
        print(f"{shown(path)}: {what}")
    return paths


# What is shown


def label(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as something that can be seen: the character, a sign for white space, or its code."""
    content = tokenizer.decode_bytes([token])
    try:
        char = content.decode("utf-8")
    except UnicodeDecodeError:
        return content.hex()
    signs = {" ": "␣", "\n": "↵", "\t": "⇥", "$": r"\$"}  # a lone $ would begin a formula
    return signs.get(char) or (char if char.isprintable() and has_glyph(char) else f"{ord(char):02x}")


def has_glyph(char: str) -> bool:
    """Say whether the font of the pictures can draw this character."""
    from matplotlib.font_manager import findfont, get_font

    return bool(get_font(findfont("DejaVu Sans")).get_char_index(ord(char)))


def kind(tokenizer: Tokenizer, token: int) -> str:
    """Return the kind of character (a key of KINDS) that a token is."""
    char = tokenizer.decode([token])
    if char.isspace():
        return "whitespace"
    if char.isdigit():
        return "digit"
    if char.isalpha():
        if char.isupper():
            return "capital"
        return "vowel" if char in "aeiou" else "consonant"
    return "punctuation" if char.isascii() and char.isprintable() else "other"


def by_distance(weights: Tensor, furthest: int) -> Tensor:
    """Return how much each head (of (..., T, T)) gives, on average, to the token 0, 1, 2, ... places back.

    The last column is everything further back. Rows that do not reach back so far are left out.
    """
    T = weights.shape[-1]
    near = [weights.diagonal(-d, -2, -1).mean(dim=-1) for d in range(min(furthest, T))]
    far = weights.tril(-furthest).sum(dim=-1)[..., furthest:].mean(dim=-1) if furthest < T else near[0] * 0
    return torch.stack([*near, far], dim=-1)


def by_pattern(weights: Tensor, ids: Tensor) -> Tensor:
    """Return the share of each head's attention that falls on the places of each of PATTERNS.

    Counted are the rows, without the first, in which the pattern has a place.
    """
    shares = []
    for places in (find(ids) for find in PATTERNS.values()):
        rows = places.any(dim=1) & (torch.arange(len(ids)) > 0)
        there = (weights * places).sum(dim=-1)[..., rows]  # (L, H, rows)
        shares.append(there.mean(dim=-1) if rows.any() else torch.zeros(weights.shape[:-2]))
    return torch.stack(shares, dim=-1)


def main_directions(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (N, count) coordinates on the directions of largest variance, and the share of each."""
    centered = (points - points.mean(dim=0)).double()
    u, s, _ = torch.linalg.svd(centered, full_matrices=False)
    share = s**2 / (s**2).sum().clamp(min=1e-30)
    missing = max(0, count - len(s))
    coordinates = torch.nn.functional.pad(u * s, (0, missing))[:, :count]
    return coordinates, torch.nn.functional.pad(share, (0, missing))[:count]


def spread_out(places: Tensor, least: float) -> Tensor:
    """Return the places (N, 2), pushed apart where closer than `least` of the picture: all labels show."""
    size = (places.amax(dim=0) - places.amin(dim=0)).clamp(min=1e-9)
    places = places / size
    for _ in range(100):
        apart = places[:, None] - places  # (N, N, 2)
        distance = apart.norm(dim=-1, keepdim=True)
        places = places + ((least - distance).clamp(min=0) * apart / (distance + 1e-9)).sum(dim=1) / 2
    return places * size


# Pictures


def draw_attention(weights: Tensor, labels: list[str], path: Path) -> None:
    """Draw a grid of maps, a row of it per layer, a column per head; dark is much attention."""
    n_layer, n_head, T, _ = weights.shape
    side = min(max(2.4, 0.085 * T), 5.6)  # inches: room for a label per token, up to 64 of them
    every = math.ceil(T / 64)
    figure, axes = new_figure(n_layer, n_head, n_head * side, n_layer * side + 0.5)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for place, panel in enumerate(panels(axes)):
        shades = weights[place // n_head, place % n_head].sqrt().masked_fill(future, float("nan"))
        panel.imshow(shades.numpy(), cmap="magma_r", vmin=0, vmax=1)
        panel.grid(visible=False)
        panel.set_facecolor("#f2f2f2")
        panel.set_title(f"layer {place // n_head + 1}, head {place % n_head + 1}", fontsize=9)
        panel.set_xticks(range(0, T, every), labels[::every], fontsize=5.5)
        panel.set_yticks(range(0, T, every), labels[::every], fontsize=5.5)
        panel.tick_params(length=0, pad=1)
    figure.suptitle(
        "Each row is a token; the darker a place in it, the more it attends there (shade: root of weight)"
    )
    save_figure(figure, path)


def draw_heads(weights: Tensor, ids: Tensor, path: Path, furthest: int = 16) -> None:
    """Draw a line per head: its attention by distance, and by what it finds there."""
    n_layer, n_head, T, _ = weights.shape
    heads = [f"layer {layer + 1}, head {head + 1}" for layer in range(n_layer) for head in range(n_head)]
    evenly = torch.ones(T, T).tril()
    evenly = evenly / evenly.sum(dim=-1, keepdim=True)
    height = 1.6 + 0.26 * (len(heads) + 1)
    figure, (left, right) = new_figure(columns=2, width=12, height=height)
    near = torch.cat([by_distance(weights, furthest).flatten(0, 1), by_distance(evenly, furthest)[None]])
    found = torch.cat([by_pattern(weights, ids).flatten(0, 1), by_pattern(evenly, ids)[None]])
    back = [str(d) for d in range(near.shape[1] - 1)]
    for panel, table, columns in ((left, near, [*back, "more"]), (right, found, [*PATTERNS])):
        panel.imshow(table.sqrt().numpy(), cmap="magma_r", vmin=0, vmax=1, aspect="auto")
        panel.grid(visible=False)
        panel.set_xticks(range(len(columns)), columns, fontsize=8)
        panel.set_yticks(range(len(heads) + 1), [*heads, "all alike"], fontsize=8)
        panel.tick_params(length=0)
        panel.axhline(len(heads) - 0.5, color="black", linewidth=1)
        for row, column in torch.cartesian_prod(*(torch.arange(size) for size in table.shape)).tolist():
            if (share := table[row, column].item()) >= 0.005:
                color = "white" if share > 0.35 else "black"
                panel.text(
                    column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color
                )
    left.set(title="how far back: % of attention", xlabel="tokens back")
    right.set(title="at what: % of attention, where there is such a token")
    save_figure(figure, path)


def draw_positions(positions: Tensor, path: Path) -> None:
    """Draw how alike the positions (T, C) are, and their main directions as curves."""
    figure, (left, right) = new_figure(columns=2, width=11, height=4.6)
    unit = torch.nn.functional.normalize(positions - positions.mean(dim=0), dim=1)
    image = left.imshow((unit @ unit.T).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    left.grid(visible=False)
    left.set(title="cosine between positions (their mean removed)", xlabel="position", ylabel="position")
    figure.colorbar(image, ax=left, shrink=0.85)
    curves, shares = main_directions(positions, 4)
    for curve, share, color in zip(curves.T, shares.tolist(), (BLUE, ORANGE, "#1e8449", GREY), strict=True):
        right.plot(curve.numpy(), color=color, linewidth=1.5, label=f"{share:.0%} of the variance")
    right.set(title="the four main directions of the position embeddings", xlabel="position", ylabel="value")
    right.legend(fontsize=8)
    save_figure(figure, path)


def draw_tokens(embeddings: Tensor, tokenizer: Tokenizer, path: Path) -> None:
    """Draw every token's label at its place on the two main directions of the embeddings (V, C)."""
    embeddings = embeddings[: tokenizer.vocab_size]
    places, shares = main_directions(embeddings, 2)
    places = spread_out(places, least=0.022 if len(embeddings) <= 100 else 0.014)
    figure, panel = new_figure(width=9, height=7.5)
    kinds = [kind(tokenizer, token) for token in range(len(embeddings))]
    size = 13 if len(embeddings) <= 100 else 8
    for token, (x, y) in enumerate(places.tolist()):
        panel.text(x, y, label(tokenizer, token), color=KINDS[kinds[token]], fontsize=size,
                   fontweight="bold", ha="center", va="center", clip_on=True)  # fmt: skip
    for name, color in KINDS.items():
        if name in kinds:
            panel.plot([], [], "o", color=color, label=name)
    low, high = places.amin(dim=0), places.amax(dim=0)
    edge = 0.05 * (high - low).clamp(min=1e-6)
    (left, bottom), (right, top) = (low - edge).tolist(), (high + edge).tolist()
    panel.set(xlim=(left, right), ylim=(bottom, top), title="token embeddings",
              xlabel=f"first main direction ({shares[0]:.0%} of the variance)",
              ylabel=f"second ({shares[1]:.0%})")  # fmt: skip
    panel.legend(fontsize=9)
    save_figure(figure, path)


def panels(axes: Any) -> "list[Axes]":
    """Return the axes of a grid row by row, also where the grid is a single one."""
    return list(axes.flat) if hasattr(axes, "flat") else [axes]


@script
def main() -> None:
    """Parse and draw."""
    run(VisualizeConfig.from_cli())


if __name__ == "__main__":
    main()
