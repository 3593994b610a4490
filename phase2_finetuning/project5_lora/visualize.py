"""Draw NF4 under the bell curve, the weights of a real model in it, and what four bits lose of them.

uv run python phase2_finetuning/project5_lora/visualize.py
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common.config import BaseConfig
from common.files import CHECKPOINTS, make_folder, shown
from common.plots import new_figure, save_figure
from common.script import script
from phase1_foundation.project3_pretrain.config import MODEL
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project5_lora.blockwise import dequantize, dynamic_levels, quantize
from phase2_finetuning.project5_lora.nf4 import BLOCK, LEVELS, OUTERMOST

Picture = Literal["levels", "weights", "errors"]
COLORS = ("#3b7dd8", "#d8733b", "#9aa5b1")  # of the three data types
SAMPLE = 2**18  # weights of each matrix to look at
FLOATS = (0, 0.5, 1, 1.5, 2, 3, 4, 6)  # of four bits: sign, two of exponent, one of fraction


@dataclass
class VisualizeConfig(BaseConfig):
    """Project 5: draw the data types, and the weights of a model in them."""

    pictures: list[Picture] = field(default_factory=lambda: ["levels", "weights", "errors"])  # which to draw
    model: str = str(MODEL)  # whose weights: a checkpoint, a .gguf file, ..., or smollm2-135m
    out: Path = CHECKPOINTS / "project5"  # folder for the PNGs


def run(config: VisualizeConfig) -> list[Path]:
    """Draw the pictures that are asked for and return their paths."""
    out, paths = make_folder(config.out), []
    matrices: dict[str, Tensor] = {}
    if {"weights", "errors"} & set(config.pictures):
        matrices = matrices_of(load_model(config.model)[0])
    for name in config.pictures:
        paths.append(out / f"{name}.png")
        if name == "levels":
            told = draw_levels(paths[-1])
        elif name == "weights":
            told = draw_weights(matrices, paths[-1])
        else:
            told = draw_errors(matrices, paths[-1])
        print(f"{shown(paths[-1])}: {told}")
    return paths


def matrices_of(model: Decoder) -> dict[str, Tensor]:
    """Return the first SAMPLE weights of each matrix that QLoRA packs, by name."""
    named = model.blocks.named_parameters()
    return {name: weight.detach().flatten()[:SAMPLE].float() for name, weight in named if weight.dim() == 2}


def four_bit_types() -> dict[str, Tensor]:
    """Return the levels of three data types of four bits, divided by the largest."""
    floats = torch.tensor(FLOATS) / max(FLOATS)
    both = torch.cat([-floats[1:].flip(0), floats])
    return {"NF4": LEVELS, "float": both, "integer": torch.arange(-7, 8) / 7}


def draw_levels(path: Path) -> str:
    """Draw the levels of NF4 under the bell curve whose quantiles they are, and the dynamic type's."""
    figure, (left, right) = new_figure(columns=2, width=11, height=4)
    # in standard deviations, what is 1 among the levels
    widest = torch.special.ndtri(torch.tensor(OUTERMOST, dtype=torch.float64)).item()
    borders = torch.cat([torch.tensor([-1.5]), (LEVELS[1:] + LEVELS[:-1]) / 2, torch.tensor([1.5])])
    for code, (low, high) in enumerate(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)):
        x = torch.linspace(low, high, 50)
        left.fill_between(x, bell(x * widest), color="#3b7dd8" if code % 2 else "#9cc2f0", linewidth=0)
    left.vlines(LEVELS, 0, bell(LEVELS * widest), color="black", linewidth=1)
    for code, level in enumerate(LEVELS.tolist()):
        left.text(level, -0.02, f"{code}", ha="center", va="top", fontsize=8)
    left.set(title="NF4: quantiles of the normal distribution", ylabel="density", ylim=(-0.05, 0.42),
             xlabel=f"level; 1 is {widest:.2f} standard deviations")  # fmt: skip
    left.text(0, 0.405, "a line is a level, an area what rounds to it", ha="center", fontsize=8)
    for place, signed in enumerate((True, False)):
        levels = dynamic_levels(signed)
        levels = levels[levels > 0]
        right.plot(levels, [place] * len(levels), "|", markersize=22, color="#3b7dd8")
        name = "signed, for the mean: positive half" if signed else "unsigned, for squares"
        right.text(1.3e-7, place + 0.27, name, fontsize=9)
    right.plot(torch.arange(1, 256) / 255, [2] * 255, "|", markersize=22, color="#9aa5b1")
    right.text(1.3e-7, 2.27, "even steps", fontsize=9)
    right.set(xscale="log", yticks=[], xlim=(1e-7, 2), ylim=(-0.5, 2.7))
    right.set(title="Dynamic type: 8 bits over seven decades", xlabel="value / largest of its block")
    save_figure(figure, path)
    return "the levels of four and of eight bits"


def bell(x: Tensor) -> Tensor:
    """Return the standard normal density."""
    return torch.exp(-(x.double() ** 2) / 2) / math.sqrt(2 * math.pi)


def draw_weights(matrices: dict[str, Tensor], path: Path) -> str:
    """Draw how normal the weights are, and how evenly they use the 16 codes."""
    kinds = sorted({name.split(".", 1)[1].removesuffix(".weight") for name in matrices})
    figure, (left, right) = new_figure(columns=2, width=11, height=4)
    x = torch.linspace(-4.5, 4.5, 200)
    left.plot(x, bell(x), color="black", linewidth=2, label="normal")
    for kind in kinds:
        rows = [weight / weight.std() for name, weight in matrices.items() if f"{kind}." in name]
        values = torch.cat([row.flatten() for row in rows])
        density = torch.histc(values, 90, -4.5, 4.5) / len(values) / 0.1
        left.plot(torch.linspace(-4.45, 4.45, 90), density, label=kind, linewidth=1)
    left.set(title="weights of all layers", xlabel="standard deviations of a matrix", ylabel="density",
             yscale="log", ylim=(1e-5, 1))  # fmt: skip
    left.legend(fontsize=8)
    used = {name: code_shares(list(matrices.values()), levels) for name, levels in four_bit_types().items()}
    for number, (name, shares) in enumerate(used.items()):
        places = torch.arange(len(shares)) + 0.27 * (number - 1) + (16 - len(shares)) / 2
        told, color = f"{name}: {entropy(shares):.2f} bits of information", COLORS[number]
        right.bar(places.tolist(), (100 * shares).tolist(), width=0.27, color=color, label=told)
    right.axhline(100 / 16, color="black", linewidth=0.8)
    title = f"how often each code is used, blocks of {BLOCK}"
    right.set(title=title, xlabel="code, from the lowest level up", ylabel="% of the weights")
    right.legend(fontsize=8)
    save_figure(figure, path)
    return f"the weights of {len(matrices)} matrices; NF4's codes carry {entropy(used['NF4']):.2f} of 4 bits"


def code_shares(matrices: list[Tensor], levels: Tensor) -> Tensor:
    """Return the share of the weights that get each code."""
    counts = torch.zeros(len(levels), dtype=torch.float64)
    for weight in matrices:
        counts += torch.bincount(quantize(weight, levels, BLOCK)[0].int(), minlength=len(levels))
    return counts / counts.sum()


def entropy(shares: Tensor) -> float:
    """Return the bits of information per code."""
    return -torch.special.xlogy(shares, shares).sum().item() / math.log(2)


def draw_errors(matrices: dict[str, Tensor], path: Path) -> str:
    """Draw the error of each matrix by data type, and that of a few matrices by the size of a block."""
    figure, (left, right) = new_figure(columns=2, width=11, height=4)
    types = four_bit_types()
    means: dict[str, float] = {}
    for name, levels in types.items():
        errors = [relative_error(weight, levels, BLOCK) for weight in matrices.values()]
        means[name] = sum(errors) / len(errors)
        left.plot([100 * error for error in errors], ".", label=f"{name}: {means[name]:.2%} on average")
    left.set(title=f"error of each matrix, blocks of {BLOCK}", xlabel="matrix, from the first layer up",
             ylabel="squared error, % of squared weights", ylim=(0, None))  # fmt: skip
    left.legend(fontsize=8)
    some = list(matrices.values())[:: max(1, len(matrices) // 8)]
    blocks = [16, 32, 64, 128, 256, 1024, 4096]
    for name, levels in types.items():
        sums = [sum(relative_error(weight, levels, block) for weight in some) for block in blocks]
        curve = [100 * each / len(some) for each in sums]
        right.plot([4 + 32 / block for block in blocks], curve, "o-", label=name)
    for block, error in zip(blocks[:4], curve, strict=False):
        right.text(4 + 32 / block, error, f" {block}", fontsize=8, va="bottom")
    right.set(title="smaller blocks: better, and larger", xlabel="bits per weight, fp32 scales counted",
              ylabel="squared error, % of squared weights")  # fmt: skip
    right.legend(fontsize=8)
    save_figure(figure, path)
    return ", ".join(f"{name} {mean:.2%}" for name, mean in means.items()) + " of the squared weights lost"


def relative_error(weight: Tensor, levels: Tensor, block: int) -> float:
    """Return the squared error of quantizing over the squared weights."""
    back = dequantize(*quantize(weight, levels, block), levels, block)
    return ((back - weight).square().sum() / weight.square().sum()).item()


@script
def main() -> None:
    """Parse and draw."""
    run(VisualizeConfig.from_cli())


if __name__ == "__main__":
    main()
