r"""How fast training is beside what the hardware could do, and where its numbers are written.

PAPERS
  [1] PaLM: Scaling Language Modeling with Pathways, Chowdhery et al., 2022, arXiv:2204.02311
  [2] Scaling Laws for Neural Language Models, Kaplan et al., 2020, arXiv:2001.08361

SYMBOLS
  rate  operations per second; a multiplication and an addition are two
"""

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from common.device import measure_matmul_rate
from common.plots import LossLog, plot_losses, read_csv
from common.script import progress

COLUMNS = (
    "step",
    "seconds",
    "train_loss",
    "val_loss",
    "lr",
    "gradient",
    "tokens_per_second",
    "utilization",
    "skipped",
)
WARM_UP = 5  # steps before their time is extrapolated

# Dense bf16 matrix products that add up in fp32, operations per second, as the makers' data sheets have them.
# The first name that is part of the device's name counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def peak_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the rate that a step's is compared with, and where it comes from.

    PAPER: [1] Sec. 4.1 and Appendix B: model FLOPs utilization, MFU, is the observed rate over the peak rate.
    PAPER CONTEXT: Hardware utilization, quoted before, looks better the more activations are recomputed. [1]
        counts only what the model's arithmetic needs, so that systems can be compared.
    INTUITION: Of all multiplications that the chip could have done in this time, how many were needed?
    IMPLEMENTATION: Data sheets for known GPUs in 16 bits. On anything else the best rate of a large matrix
        product, measured now: a CPU's peak depends on its clock, its memory and its neighbours.
    WHY: A rate in tokens per second says nothing across models and machines; a share of the peak does.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    known = [peak for part, peak in PEAKS.items() if part in name]
    if known and dtype != torch.float32:
        return known[0], f"{name}'s data sheet"
    return measure_matmul_rate(device, dtype), "measured on a large matrix product"


def operations_per_token(model: nn.Module) -> float:
    """Return the operations to train on one token: what the model says, or 6 per weight ([2] Sec. 2.1)."""
    count: Callable[[], int] | None = getattr(model, "flops_per_token", None)
    return count() if count else 6.0 * sum(weight.numel() for weight in model.parameters())


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far: by tensors on a GPU, else by this process (0: unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Journal:
    """The numbers of each step: a bar on the screen, losses.csv, loss.png; TensorBoard or W&B if asked.

    PAPER: none; the utilization among the numbers is that of [1].
    PAPER CONTEXT: Logging services come and go, and want an account. A table that any program reads stays.
    INTUITION: A ship's log: a line an hour, in ink, whatever happens to the ship.
    IMPLEMENTATION: A row of the table is on disk before the next step begins; on resuming, rows after the
        checkpoint go. The steps two to five predict the time of all. Only the first process keeps a journal.
    WHY: What a run costs is known after seconds, and the summary holds the prediction against the clock.
    """

    def __init__(
        self,
        out: Path,
        log: str,
        settings: Mapping[str, Any],
        first: int,
        last: int,
        full_speed: float,
        title: str,
        silent: bool = False,
        unit: str = "nats per token",
    ) -> None:
        """Open it for steps `first` to `last`; `full_speed` is the tokens per second of full utilization.

        `unit` is that of the loss; its last word is what add() counts. Only tokens have a utilization.
        """
        self.unit, self.counted = unit, unit.split()[-1]
        self.out, self.steps, self.full_speed, self.title, self.silent = (
            out,
            last - first,
            full_speed,
            title,
            silent,
        )
        self.drawn, self.ended = time.monotonic(), False
        self.times: list[float] = []  # seconds of each step
        self.speeds: list[float] = []  # tokens per second of each step
        self.predicted = 0.0  # seconds of all of them
        if not silent:
            self.send, self.close = open_log(log, out, settings, first or None)
            self.csv = LossLog(out / "losses.csv", COLUMNS, first or None)
        quiet = {"disable": True} if silent else {}
        self.bar = progress(range(last), initial=first, total=last, desc="training", **quiet)

    def say(self, text: str) -> None:
        """Write a line above the bar."""
        if not self.silent:
            self.bar.write(text)

    def add(self, step: int, tokens: int, took: float, **values: float | None) -> None:
        """Write the numbers of a step that took so many seconds; at the fifth, predict the time of all."""
        self.times.append(took)
        speed = tokens / took
        self.speeds.append(speed)
        if self.silent:
            return
        if len(self.times) == WARM_UP < self.steps:
            typical = statistics.median(self.times[1:])  # the first compiles, allocates and warms up
            self.predicted = sum(self.times) + typical * (self.steps - WARM_UP)
            self.say(f"prediction  {self.steps:,} steps in {self.predicted:,.0f} s, evaluations not counted")
        if self.counted == "token":
            values |= {"tokens_per_second": speed, "utilization": speed / self.full_speed}
        self.csv.add(step=step, **values)
        self.send(step, {name: value for name, value in values.items() if value is not None})
        told = {"loss": f"{values['train_loss']:.3f}", f"{self.counted}s_per_s": f"{speed:,.0f}"}
        self.bar.set_postfix(told, refresh=False)
        self.bar.update()

    def summary(self) -> str:
        """Return how long all of it took, beside what was predicted, and how fast it was."""
        if not self.times:
            return "there was nothing left to do"
        line = f"{len(self.times):,} steps in {sum(self.times):.1f} s"
        if self.predicted and len(self.times) == self.steps:
            line += f", predicted {self.predicted:.1f} s"
        speed = statistics.median(self.speeds)
        line += f"; {speed:,.0f} {self.counted}s/s"
        return f"{line}, utilization {speed / self.full_speed:.1%}" if self.counted == "token" else line

    def draw(self) -> None:
        """Draw losses.csv to loss.png; within a run not more often than twice a minute."""
        if self.silent or (not self.ended and time.monotonic() - self.drawn < 30):
            return
        self.drawn = time.monotonic()
        rows, curves = read_csv(self.out / "losses.csv"), {}
        for name, column in (("training batch", "train_loss"), ("validation", "val_loss")):
            points = [(float(row["step"]), float(row[column])) for row in rows if row[column]]
            if points:
                curves[name] = ([step for step, _ in points], [loss for _, loss in points])
        plot_losses(self.out / "loss.png", curves, self.title, y=f"loss ({self.unit})")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True
        self.bar.close()
        self.draw()
        if not self.silent:
            self.close()


Send = Callable[[int, dict[str, float]], None]


def open_log(
    log: str, out: Path, settings: Mapping[str, Any], resume_step: int | None
) -> tuple[Send, Callable[[], None]]:
    """Return what takes the numbers of a step, and what ends it."""
    if log == "csv":
        return lambda step, values: None, lambda: None
    try:
        module = importlib.import_module("torch.utils.tensorboard" if log == "tensorboard" else log)
    except ImportError as error:
        raise ValueError(f"log ({log}) must be installed first: uv pip install {log}") from error
    if log == "tensorboard":
        writer = module.SummaryWriter(str(out / "tensorboard"), purge_step=resume_step and resume_step + 1)

        def send(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        return send, writer.close
    name_file = out / "wandb_run.txt"  # a resumed run goes on in the same chart
    known = name_file.read_text() if resume_step is not None and name_file.is_file() else None
    run = module.init(project="llm-course", id=known, resume="allow", dir=str(out), config=dict(settings))
    name_file.write_text(run.id)
    return lambda step, values: run.log(values, step=step), run.finish
