"""Draw what caches weigh, where a step meets the roofline, and what an endless text does to a window.

uv run python phase3_core_inference/project7_kv_cache/visualize.py --model smollm2-135m
"""

from collections.abc import Callable
from pathlib import Path

import torch

from common.device import pick_device, pick_dtype
from common.files import make_folder
from common.plots import new_figure, save_figure
from common.script import script
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.weights import load_model
from phase3_core_inference.project7_kv_cache.config import VisualizeConfig
from phase3_core_inference.project7_kv_cache.evaluate import load_texts, losses
from phase3_core_inference.project7_kv_cache.ring import RingCache
from phase3_core_inference.project7_kv_cache.roofline import (
    cache_bytes,
    decode_work,
    measure_machine,
    quantized_bytes,
    weight_count,
)

SMOOTH = 100  # tokens over which losses are averaged in the picture


def run(config: VisualizeConfig) -> list[Path]:
    """Draw the pictures that are asked for and return their paths."""
    out, paths = make_folder(config.out), []
    draw: dict[str, Callable[[VisualizeConfig, Path], str]] = {"memory": draw_memory, "stream": draw_stream}
    for name in config.pictures:
        paths.append(out / f"{name}.png")
        print(f"{paths[-1]}: {draw[name](config, paths[-1])}")
    return paths


def draw_memory(config: VisualizeConfig, path: Path) -> str:
    """Draw the bytes of SmolLM2's cache by context, and the best possible speed by batch."""
    shape = DecoderConfig.llama()
    figure, (left, right) = new_figure(columns=2, width=11, height=4.2)
    contexts = [2**power for power in range(7, 18)]
    for heads, name in ((9, "9 key heads (MHA)"), (3, "3 key heads (SmolLM2, GQA)"), (1, "1 key head (MQA)")):
        variant = DecoderConfig.llama(n_kv_head=heads)
        left.loglog(contexts, [cache_bytes(variant, n) / 1e6 for n in contexts], label=name)
    coded = [quantized_bytes(shape, n, 4, 32, 32) / 1e6 for n in contexts]
    left.loglog(contexts, coded, "--", color="C1", label="3 key heads, 4 bits")
    left.axhline(weight_count(shape) * 2 / 1e6, color="grey", linewidth=0.8, linestyle=":")
    left.text(contexts[0], weight_count(shape) * 2.3 / 1e6, "all weights, bf16", fontsize=8, color="grey")
    left.set(title="cache of one text, bf16", xlabel="context (tokens)", ylabel="MB")
    left.legend(fontsize=8)
    device = pick_device(config.device)
    machine = measure_machine(device, pick_dtype("auto", device))
    batches = [2**power for power in range(9)]
    for context, color in ((128, "C0"), (1024, "C1"), (8192, "C2")):
        works = [decode_work(shape, [context] * batch) for batch in batches]
        speeds = [batch / machine.seconds(work) for batch, work in zip(batches, works, strict=True)]
        right.loglog(batches, speeds, "o-", markersize=3, color=color, label=f"context {context:,}")
    right.set_xscale("log", base=2)
    right.set(
        title=f"one step at best: {machine.bandwidth / 1e9:,.0f} GB/s, {machine.rate / 1e9:,.0f} GFLOP/s",
        xlabel="texts at once",
        ylabel="tokens per second",
    )
    right.legend(fontsize=8)
    save_figure(figure, path)
    return (
        f"memory by context; limits of this machine, whose ridge is {machine.ridge:.0f} operations per byte"
    )


def draw_stream(config: VisualizeConfig, path: Path) -> str:
    """Draw the loss along a text for a window, and for one of the same size with sinks."""
    device = pick_device(config.device)
    model, tokenizer = load_model(config.model)
    model.to(device)
    text = load_texts(config.data, config.source, tokenizer, 1, config.tokens).to(device)
    kept = config.window + config.sinks
    caches = {
        f"window of {kept}": RingCache(model.config, kept),
        f"window of {config.window} and {config.sinks} sinks": RingCache(
            model.config, config.window, config.sinks
        ),
    }
    figure, axes = new_figure(width=8, height=4)
    said = []
    for name, cache in caches.items():
        loss = losses(model, cache, text)[0]
        after = loss[2 * kept :].mean().item()
        said.append(f"{name} {after:.2f}")
        kernel = torch.ones(1, 1, SMOOTH, device=device) / SMOOTH
        smooth = torch.nn.functional.conv1d(loss[None, None], kernel)[0, 0].cpu()
        axes.plot(
            range(SMOOTH, SMOOTH + len(smooth)), smooth, label=f"{name}: {after:.2f} after token {2 * kept}"
        )
    axes.axvline(kept, color="grey", linewidth=0.8, linestyle=":", label="the first token leaves the window")
    axes.set(
        title=f"{Path(config.model).name}: a text that goes on, in constant memory",
        xlabel="token",
        ylabel=f"loss (nats per token, mean of {SMOOTH})",
    )
    axes.legend(fontsize=8)
    save_figure(figure, path)
    return ", ".join(said) + " nats per token"


@script
def main() -> None:
    """Parse and draw."""
    run(VisualizeConfig.from_cli())


if __name__ == "__main__":
    main()
