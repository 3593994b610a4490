"""Measure the memory of full fine-tuning, LoRA and QLoRA, and what four and eight bits cost in time.

uv run python phase2_finetuning/project5_lora/benchmark.py
"""

import multiprocessing
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.config import BaseConfig
from common.device import seed_everything
from common.files import CHECKPOINTS, make_folder, shown
from common.plots import new_figure, save_figure
from common.script import progress, script
from phase1_foundation.project1_minimal_gpt.benchmark import time_in_turn
from phase1_foundation.project1_minimal_gpt.optimizer import AdamW
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.cpu_kernels import Linear
from phase1_foundation.project3_pretrain.loss import Batch
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project5_lora.adamw8bit import AdamW8bit
from phase2_finetuning.project5_lora.ledger import WAYS, Ledger, predict, prepare
from phase2_finetuning.project5_lora.meter import measure
from phase2_finetuning.project5_lora.nf4 import NF4
from phase2_finetuning.project5_lora.qlora import NF4Linear

MIB = 2**20
COLUMNS = [column.name for column in fields(Ledger)]
COLORS = {"weights": "#3b7dd8", "gradients": "#d8733b", "optimizer": "#9aa5b1", "activations": "#9cc2f0"}
OURS, PEER = "ours", "bitsandbytes"
MATRIX = (1536, 576)  # of SmolLM2's feed-forward


@dataclass
class BenchmarkConfig(BaseConfig):
    """Project 5: the memory of ways to fine-tune, predicted and measured; the time of 4 and 8 bits."""

    model: DecoderConfig = field(default_factory=DecoderConfig.llama)  # SmolLM2-135M's shape
    batch_size: int = 1  # sequences of a micro-batch
    length: int = 128  # tokens of a sequence
    ways: list[str] = field(default_factory=lambda: list(WAYS))  # to fine-tune
    repeats: int = 7  # timings of each; the median counts; 0: none
    out: Path = CHECKPOINTS / "project5"  # folder for ledger.png

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot be measured."""
        super().validate_config()
        self.require_at_least(1, "batch_size", "length")
        self.require_at_least(0, "repeats")
        if unknown := [way for way in self.ways if way not in WAYS]:
            raise ValueError(f"ways ({unknown[0]}) must be among {', '.join(WAYS)}")


@dataclass
class Row:
    """The memory of one way to fine-tune, in bytes."""

    way: str
    predicted: Ledger
    measured: Ledger
    peak: int  # of all tensors alive
    process: int  # what the process grew by at most; 0: unknown


def run(config: BenchmarkConfig) -> list[Row]:
    """Measure all ways, each in a process of its own; print the table, draw it, time 4 and 8 bits."""
    out, shape = make_folder(config.out), config.model
    for way in config.ways:  # before any is measured
        predict(shape, WAYS[way], config.batch_size, config.length)
    width = f"{shape.n_layer} layers, {shape.n_embd} wide, {shape.vocab_size:,} tokens"
    print(f"model       {width}, random weights, fp32")
    print(f"batch       {config.batch_size} sequences of {config.length} tokens, two micro-batches per step")
    rows = [measure_alone(config, way) for way in progress(config.ways, desc="memory", leave=False)]
    print_ledgers(rows)
    draw(rows, out / "ledger.png")
    print(f"written to {shown(out / 'ledger.png')}")
    if config.repeats:
        time_bits(config.repeats)
    return rows


# Memory


def measure_alone(config: BenchmarkConfig, way: str) -> Row:
    """Measure in a new process, which has no other model's memory to use again."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_way, config, way).result()


def measure_way(config: BenchmarkConfig, way: str) -> Row:
    """Fine-tune a random model of the shape for two steps, and return what that takes."""
    seed_everything(0)
    begin, _ = process_memory()
    model = Decoder(config.model)
    optimizer = prepare(model, WAYS[way])
    forget_peak()
    tokens = torch.randint(config.model.vocab_size, (config.batch_size, config.length + 1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    measured, peak = measure(model, optimizer, batch)
    _, most = process_memory()
    predicted = predict(config.model, WAYS[way], config.batch_size, config.length)
    return Row(way, predicted, measured, peak, max(most - begin, 0))


def process_memory() -> tuple[int, int]:
    """Return the bytes that the process has in memory, and the most it had; 0 where there is no Linux."""
    with suppress(OSError):
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", text, flags=re.MULTILINE))
        return int(found.get("VmRSS", 0)) * 1024, int(found.get("VmHWM", 0)) * 1024
    return 0, 0


def forget_peak() -> None:
    """Let the most that the process had be what it has now: preparing is not training."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def print_ledgers(rows: list[Row]) -> None:
    """Print what was predicted and, below it, measured."""
    columns = [*COLUMNS, "total"]
    print("".join([f"\n{'MiB':32}", *(f"{name:>12}" for name in [*columns, "peak", "process"])]))
    for row in rows:
        for name, ledger in (("predicted", row.predicted), ("measured", row.measured)):
            line = f"{row.way if ledger is row.predicted else '':22}{name:10}"
            line += "".join(f"{getattr(ledger, column) / MIB:12,.1f}" for column in columns)
            if ledger is row.measured:
                line += f"{row.peak / MIB:12,.1f}{row.process / MIB:12,.1f}"
            print(line)
        print(f"{'':22}{'ratio':10}" + "".join(f"{ratio(row, column):12.3f}" for column in columns))
    print("total: the four columns, there together at the end of the second micro-batch's forward pass")
    print("peak: of all tensors at any moment of the step; process: what it has at most, above torch itself")


def ratio(row: Row, column: str) -> float:
    """Return predicted over measured."""
    return getattr(row.predicted, column) / max(getattr(row.measured, column), 1)


def draw(rows: list[Row], path: Path) -> None:
    """Draw a bar per way, measured, with a mark for what was predicted."""
    figure, axes = new_figure(width=8.5, height=0.7 * len(rows) + 1.6)
    for place, row in enumerate(rows):
        left = 0.0
        for column in COLUMNS:
            width = getattr(row.measured, column) / MIB
            axes.barh(place, width, left=left, color=COLORS[column], label=column if place == 0 else None)
            left += width
        axes.plot([row.predicted.total / MIB] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2,
                  label="predicted total" if place == 0 else None)  # fmt: skip
        share = row.measured.total / rows[0].measured.total
        text = f" {left:,.0f} MiB" + (f", {share:.0%}" if place else "")
        axes.text(max(left, row.predicted.total / MIB), place, text, va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row.way for row in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="MiB, measured", xlim=(0, 1.25 * max(row.measured.total for row in rows) / MIB))
    axes.set_title("Memory of fine-tuning")
    axes.legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


# Time


def time_bits(repeats: int) -> None:
    """Print what quantizing costs, beside bitsandbytes and beside not quantizing."""
    seed_everything(0)
    weight = torch.randn(MATRIX)
    gigabytes = weight.numel() * (4 + 4.127 / 8) / 1e9  # to read four bits and to write fp32, or the reverse
    tables: dict[str, Mapping[str, Callable[[], object]]] = {
        "quantize to NF4": nf4_quantizers(weight),
        "dequantize NF4": nf4_dequantizers(weight),
        "linear, forward and backward": linears(weight),
        "AdamW, one step": adams(weight),
    }
    rate = copy_rate(weight, repeats)
    print(f"\n{f'{MATRIX}, fp32':32}{'':16}{'ms':>9}{'time / first':>14}")
    for task, contestants in tables.items():
        times = time_in_turn(contestants, repeats, torch.device("cpu"), task)
        first = next(iter(times.values()))
        for name, seconds in times.items():
            print(f"{task:32}{name:16}{seconds * 1e3:9.2f}{seconds / first:14.2f}")
    floor = gigabytes / rate * 1e3
    at = f"{gigabytes * 1e3:.1f} MB at the {rate:.1f} GB/s of a copy"
    print(f"floor of (de)quantizing: {floor:.2f} ms, {at}")


def copy_rate(weight: Tensor, repeats: int) -> float:
    """Return gigabytes per second, read and written."""
    out = torch.empty_like(weight)
    seconds = time_in_turn({"copy": partial(out.copy_, weight)}, repeats, weight.device, "copy")["copy"]
    return 2 * weight.numel() * 4 / 1e9 / seconds


def nf4_quantizers(weight: Tensor) -> dict[str, Callable[[], object]]:
    """Return our quantization, with double quantization, and theirs."""
    import bitsandbytes.functional as bnb  # here: it takes seconds to import

    theirs = partial(bnb.quantize_4bit, weight, quant_type="nf4", compress_statistics=True)
    return {OURS: partial(NF4.quantize, weight), PEER: theirs}


def nf4_dequantizers(weight: Tensor) -> dict[str, Callable[[], object]]:
    """Return our way back, and theirs."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return {OURS: NF4.quantize(weight).dequantize, PEER: partial(bnb.dequantize_4bit, packed, state)}


def linears(weight: Tensor) -> dict[str, Callable[[], object]]:
    """Return a frozen layer in fp32 and in NF4, ours and theirs, on 256 tokens."""
    from bitsandbytes.nn.modules import Linear4bit

    plain = Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
    plain.weight.data = weight
    how: dict[str, Any] = {"bias": False, "compute_dtype": torch.float32, "quant_type": "nf4"}
    peer = Linear4bit(*weight.T.shape, **how)
    peer.load_state_dict(plain.state_dict())
    peer.to("cpu")  # which quantizes
    x = torch.randn(256, weight.shape[1], requires_grad=True)
    layers: dict[str, nn.Module] = {"fp32": plain, OURS: NF4Linear(plain), PEER: peer}
    return {name: partial(forth_and_back, layer, x) for name, layer in layers.items()}


def forth_and_back(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a layer, and return the gradient of its input."""
    y = layer(x)
    return torch.autograd.grad(y, x, y.detach())[0]  # any gradient does


def adams(weight: Tensor) -> dict[str, Callable[[], object]]:
    """Return steps of this course's AdamW, of that with 8 bits, and of theirs."""
    from bitsandbytes.optim.adamw import AdamW8bit as Peer

    kinds: dict[str, Callable[..., Optimizer]] = {"fp32": AdamW, OURS: AdamW8bit, PEER: Peer}
    steps: dict[str, Callable[[], object]] = {}
    for name, kind in kinds.items():
        mine = nn.Parameter(weight.clone())
        mine.grad = torch.randn_like(weight)
        steps[name] = kind([{"params": [mine]}], lr=1e-4).step
    return steps


@script
def main() -> None:
    """Parse and measure."""
    run(BenchmarkConfig.from_cli())


if __name__ == "__main__":
    main()
