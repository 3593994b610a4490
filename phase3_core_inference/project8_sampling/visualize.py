"""Draw what each setting does to one real distribution, and how a watermark is found.

uv run python phase3_core_inference/project8_sampling/visualize.py
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.files import shown
from common.plots import new_figure, save_figure
from common.script import progress, script
from phase3_core_inference.project8_sampling.config import (
    SamplingParams,
    VisualizeConfig,
    WriterConfig,
)
from phase3_core_inference.project8_sampling.generate import Steps, Writer, write
from phase3_core_inference.project8_sampling.sampler import Sampler
from phase3_core_inference.project8_sampling.state import RequestState
from phase3_core_inference.project8_sampling.watermark import detect, expected_z, green_share

PANELS: dict[str, dict[str, Any]] = {
    "temperature 0.5": {"temperature": 0.5},
    "temperature 1.5": {"temperature": 1.5},
    "top_k 10": {"top_k": 10},
    "top_p 0.8": {"top_p": 0.8},
    "min_p 0.1": {"min_p": 0.1},
    "typical_p 0.5": {"typical_p": 0.5},
    "epsilon 0.01": {"epsilon": 0.01},
    "eta 0.02": {"eta": 0.02},
    "top_n_sigma 1.5": {"top_n_sigma": 1.5},
    "mirostat 2, mu 4 bits": {"mirostat": 2, "mirostat_tau": 2.0},
    "repetition_penalty 1.3": {"repetition_penalty": 1.3},
    "watermark 2": {"watermark": 2.0},
}


def run(config: VisualizeConfig) -> dict[str, float]:
    """Draw the pictures; return the share of the odds that each setting keeps, and the marked texts' z."""
    writer = Writer(WriterConfig(config.model, config.prompt, chat="no"))
    ids = writer.prompt_ids(config.prompt)
    logits = Steps(writer.model, ids, 1).logits.float().cpu()
    odds = {name: odds_under(logits, ids, settings) for name, settings in PANELS.items()}
    plain = odds_under(logits, ids, {})
    found = {name: float(plain[changed > 0].sum()) for name, changed in odds.items()}
    draw_settings(config, writer, plain, odds, config.out / "settings.png")
    print(f"\nafter {config.prompt!r}: what is left of the model's own odds, and of its tokens")
    for name, share in found.items():
        print(f"{name:24}{share:8.1%}{int((odds[name] > 0).sum()):8,} tokens")
    if config.watermark_tokens:
        found["z"] = watermark(config, writer, ids, config.out / "watermark.png")
    return found


def odds_under(logits: Tensor, ids: list[int], settings: dict[str, Any]) -> Tensor:
    """Return the odds (V,) of the next token after the prompt under some settings."""
    return Sampler().odds(logits, [RequestState(SamplingParams(**settings), ids)])[0]


def draw_settings(
    config: VisualizeConfig, writer: Writer, plain: Tensor, odds: dict[str, Tensor], path: Path
) -> None:
    """Draw a panel per setting: the model's own odds as a line, what is drawn from as bars."""
    order = plain.argsort(descending=True)[: config.tokens]
    figure, axes = new_figure(4, 3, width=10, height=9)
    place = np.arange(len(order))
    for axis, (name, changed) in zip(axes.flat, odds.items(), strict=True):
        kept, beyond = int((changed > 0).sum()), float(changed.sum() - changed[order].sum())
        axis.bar(place, changed[order].numpy(), color="tab:orange", width=0.9)
        axis.step(place, plain[order].numpy(), where="mid", color="black", linewidth=1)
        axis.set_title(name)
        axis.text(0.98, 0.9, f"{kept:,} tokens", transform=axis.transAxes, ha="right", va="top", fontsize=8)
        if beyond > 0.005:
            axis.text(0.98, 0.78, f"{beyond:.0%} to the right of this", transform=axis.transAxes,
                      ha="right", va="top", fontsize=8)  # fmt: skip
        axis.set_xticks(place[:8], [word(writer, int(token)) for token in order[:8]], rotation=90, fontsize=6)
    figure.suptitle(f"“{config.prompt} …”: the model's odds (line), and what is drawn from (bars)")
    save_figure(figure, path)
    print(f"wrote {shown(path)}")


def word(writer: Writer, token: int) -> str:
    """Return a token as a label."""
    return writer.tokenizer.decode([token]).replace("\n", "⏎").replace("$", r"\$").strip(" ") or "␣"


def watermark(config: VisualizeConfig, writer: Writer, ids: list[int], path: Path) -> float:
    """Draw the z of texts with and without a watermark as they grow; return the mean of the marked ones."""
    params = SamplingParams(
        max_new_tokens=config.watermark_tokens, min_new_tokens=config.watermark_tokens, top_k=200
    )
    curves: dict[float, list[list[float]]] = {}
    expected = []
    for delta in progress((0.0, 2.0), desc="watermark"):
        marked = replace(params, watermark=delta, watermark_share=0.25)
        vocab_size, stop = writer.model.config.vocab_size, writer.stop
        states = [
            RequestState(replace(marked, seed=seed), ids, writer.vocabulary, stop)
            for seed in range(config.watermark_texts)
        ]
        write(writer.model, states)
        texts = [[ids[-1], *state.output] for state in states]
        key = params.watermark_key
        curves[delta] = [
            [detect(text[: n + 1], vocab_size, 0.25, key).z for n in range(8, len(text), 8)] for text in texts
        ]
        if delta:
            expected = predicted(writer, ids, states, delta)
    figure, axes = new_figure()
    for delta, color in ((0.0, "tab:gray"), (2.0, "tab:orange")):
        for i, curve in enumerate(curves[delta]):
            label = f"watermark {delta:g}" if i == 0 else None
            axes.plot(range(8, 8 + 8 * len(curve), 8), curve, color=color, alpha=0.7, label=label)
    length = np.arange(8, config.watermark_tokens + 1)
    axes.plot(
        length,
        [expected_z(float(np.mean(expected)), 0.25, float(n)) for n in length],
        "k--",
        label="bound of the theorem",
    )
    axes.axhline(4, color="tab:red", linewidth=1, label="z = 4: one unmarked text in 30,000")
    axes.set(xlabel="tokens", ylabel="z", title="A watermark shows itself as the text grows")
    axes.legend()
    save_figure(figure, path)
    print(f"wrote {shown(path)}")
    return float(np.mean([curve[-1] for curve in curves[2.0]]))


@torch.no_grad()
def predicted(writer: Writer, ids: list[int], states: list[RequestState], delta: float) -> list[float]:
    """Return the least expected share of green tokens at each step of the texts, by the model's own odds."""
    bounds = []
    for state in states:
        logits = writer.model(torch.tensor([[*ids, *state.output[:-1]]]))[0, len(ids) - 1 :]
        kept = logits.float().topk(200).values.softmax(dim=1)
        bounds += [green_share(row, 0.25, delta) for row in kept]
    return bounds


@script
def main() -> None:
    """Parse and draw."""
    run(VisualizeConfig.from_cli())


if __name__ == "__main__":
    main()
