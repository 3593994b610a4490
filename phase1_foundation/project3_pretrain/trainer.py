r"""The training loop of this and every later project: any model, any batches, any loss that is a sum.

PAPERS
  [1] Mixed Precision Training, Micikevicius et al., 2017, arXiv:1710.03740
  [2] Language Models are Few-Shot Learners, Brown et al., 2020, arXiv:2005.14165 (GPT-3)

SYMBOLS
  loss    nats per token: the sum over all tokens of a step's batch, divided by their number
  length  of the gradient of all weights together, before clipping
"""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.checkpoints import load_checkpoint, save_checkpoint
from common.device import pick_dtype, seed_everything
from common.files import make_folder
from common.script import StopRequest
from phase1_foundation.project1_minimal_gpt.optimizer import clip_gradients, make_optimizers
from phase1_foundation.project1_minimal_gpt.train import autocast
from phase1_foundation.project3_pretrain.accumulation import Loss, add_up_losses
from phase1_foundation.project3_pretrain.config import TRAIN_COMMAND, TrainConfig
from phase1_foundation.project3_pretrain.distributed import ParallelModel, World
from phase1_foundation.project3_pretrain.guard import SpikeGuard
from phase1_foundation.project3_pretrain.loader import Prefetcher
from phase1_foundation.project3_pretrain.loss import language_model_loss
from phase1_foundation.project3_pretrain.metrics import Journal, operations_per_token, peak_memory, peak_rate
from phase1_foundation.project3_pretrain.schedules import lr_share

fused_optimizers = partial(make_optimizers, fused=True)
SMALLEST_SCALE = 2.0**-24  # of the loss in fp16; a gradient that still overflows is no number at all
FREE_TO_CHANGE = {
    "out", "resume", "overwrite", "device", "compile", "parallel", "max_steps", "micro_batch_size",
    "eval_interval", "eval_batches", "keep", "patience", "log", "shards", "corpus", "prompt", "sample_tokens",
}  # on --resume  # fmt: skip


class Batches(Protocol):
    """Where a trainer's batches come from."""

    def batch(self, step: int) -> Any:
        """Return this process's share of a step's batch: a function of the step, whatever thread asks.

        A record, dict or tuple of tensors whose rows are sequences; every process gets equally many rows.
        """
        ...


class Step(NamedTuple):
    """What a step found out before it moved the weights."""

    loss: float  # nats per token, of the whole batch
    tokens: int
    length: float  # of the gradient, before clipping
    skipped: str  # why the weights were not moved, or nothing
    stop: bool  # a process was asked to end


class Trainer:
    """Train a model so that it does not matter how a batch is cut up, nor where a run was interrupted.

    PAPER: [2] Sec. 2.3 and App. B: the recipe, warm-up, clipping, Adam, decay; [1] Sec. 3.1 and 3.2: fp16.
    PAPER CONTEXT: Project 1 has the recipe in one screen. A run of days on machines that fail needs more: to
        go on from where it was, to be stopped, to survive a bad batch, and to use all processors there are.
    INTUITION: A marathon is planned so that any runner can take over at any kilometre stone.
    IMPLEMENTATION: The batch of a step and the seed of its random numbers are functions of (seed, step,
        rank), so a checkpoint is weights, the optimizers' averages, the guard's memory and the step. All
        processes agree on loss, length and stopping, so they decide alike without a leader.
    WHY: Tests hold a run that was killed and resumed to one that was not, to the bit, and one that went on
        with another number of processes to within rounding.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Batches,
        config: TrainConfig,
        loss: Loss = language_model_loss,
        *,
        validation: Batches | None = None,
        sample: Callable[[Any], str] | None = None,
        bytes_per_token: float = 0.0,
        unit: str = "nats per token",
        entries: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        optimizers: Callable[[nn.Module, TrainConfig], list[Optimizer]] = fused_optimizers,
        world: World | None = None,
        trained_only: bool = False,
    ) -> None:
        """Take a model, equal on all processes, and what changes from task to task.

        `sample(model)` writes a text to look at. With `bytes_per_token`, of the validation text, its loss is
        told in bits per byte as well. `unit` says what a loss is measured in, per what it counts. `entries`
        go into checkpoints beside the model's config; `settings` must be equal on resuming (by default the
        config). With `trained_only` checkpoints leave out weights that need no gradient: whoever froze them
        has them. Raises ValueError or OSError if `config.out` is no folder to write to, holds another run,
        or nothing to resume.
        """
        self.loader: Any = loader
        self.config, self.loss, self.world = config, loss, world or World()
        self.validation, self.sample, self.bytes_per_token = validation, sample, bytes_per_token
        self.unit = unit
        self.saved = _trained(model) if trained_only else None  # names of weights; None: all
        self.settings = dict(config.to_dict() if settings is None else settings)
        shape = {"config": dataclasses.asdict(model.config)} if hasattr(model, "config") else {}  # type: ignore[call-overload]
        self.entries = shape | dict(entries or {})
        self.out = make_folder(config.out)
        self.device = self.world.device(config.device)
        self.dtype = pick_dtype(config.precision, self.device)
        self.operations = operations_per_token(model)
        self.parameters = sum(weight.numel() for weight in model.parameters())
        self.model = model
        self.parallel = ParallelModel(
            model, self.world, config.parallel, self.device, self.dtype, config.compile
        )
        self.optimizers = optimizers(model, config)
        fp16 = self.dtype == torch.float16
        # Gradients of a sum over thousands of tokens are large as they are: scaling them starts at 1.
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=1.0, enabled=fp16)
        self.guard = SpikeGuard(config.spike_sigmas)
        self.done = 0  # steps
        self.seconds = 0.0  # of training, evaluations left out
        self.best = math.inf  # lowest validation loss, nats per token
        self.waited = 0  # evaluations since it was that low
        self.replaced = begin_run(self.out, config.resume, config.overwrite, self.restore, TRAIN_COMMAND)

    def train(self) -> list[float]:
        """Train up to max_steps, or until Ctrl-C or SIGTERM; save, and return the losses of these steps."""
        config, losses = self.config, []
        batches = Prefetcher(self.loader)
        self.model.train()  # one that was loaded comes ready to write, without dropout and the like
        with StopRequest() as stop, self._open_journal() as journal, closing(batches):
            for step in range(self.done, config.max_steps):
                begin = time.perf_counter()
                result = self.step(step, batches.batch(step), stop.requested)
                losses.append(result.loss)
                self.done, took = step + 1, time.perf_counter() - begin
                self.seconds += took
                ends = result.stop or self.done == config.max_steps
                pause = ends or self.done % config.eval_interval == 0
                val_loss = self.evaluate() if pause and self.validation else None
                journal.add(
                    self.done, result.tokens, took, seconds=self.seconds, train_loss=result.loss,
                    val_loss=val_loss, lr=self.optimizers[0].param_groups[0]["lr"],
                    gradient=result.length, skipped=self.guard.skipped,
                )  # fmt: skip
                if result.skipped:
                    journal.say(f"step {self.done:,}  update skipped: {result.skipped}")
                if pause:
                    self.save(result.loss, val_loss)
                    journal.say(self._report(result.loss, val_loss))
                    journal.draw()
                if ends or out_of_patience(config.patience, self.waited):
                    break
        self._finish(journal)
        return losses

    def step(self, number: int, batch: Any, stop: bool = False) -> Step:
        """Move the weights once. Raises ValueError if too many updates in a row had to be skipped."""
        config = self.config
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        seed = np.random.SeedSequence([config.seed, number, self.world.rank])
        seed_everything(int(seed.generate_state(1, np.uint64)[0] >> 1))
        sums = self._sums(batch, self.scaler)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        weights = list(self.model.parameters())
        length = clip_gradients(weights, config.grad_clip, (1 / sums[1]).to(weights[0].dtype))
        total, count, length = torch.stack([*sums, length]).tolist()  # the one wait for a GPU
        loss = total / count if count else math.nan
        skipped = self._overflow(loss, length) or self.guard.judge(loss, length, int(count))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_share(number, config)
            if not skipped:
                optimizer.step()
        self.scaler.update()
        return Step(loss, int(count), length, skipped, self.world.any(stop))

    def _sums(self, batch: Any, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Return (sum of losses, tokens) of a batch over all processes, and its gradient in the weights."""
        rows = self.config.micro_batch_size
        return add_up_losses(self.parallel, self.loss, batch, self.device, rows, self.dtype, scaler)

    def _overflow(self, loss: float, length: float) -> str:
        """Say so if a gradient was too large for fp16, as happens until the scale of the loss is found."""
        only_gradient = math.isfinite(loss) and not math.isfinite(length)
        if not (self.scaler.is_enabled() and only_gradient and self.scaler.get_scale() > SMALLEST_SCALE):
            return ""
        return "a gradient overflowed fp16, so the loss will be scaled by half as much"

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the loss over the first `eval_batches` validation batches, nats per token."""
        if self.validation is None:
            raise ValueError("validation (None) must be a loader to evaluate on")
        self.model.eval()
        sums = [self._sums(self.validation.batch(number)) for number in range(self.config.eval_batches)]
        self.model.train()
        total, count = torch.stack(sums).sum(dim=0).tolist()
        return total / count if count else math.nan

    def save(self, train_loss: float, val_loss: float | None) -> None:
        """Write step_N.pt, and model.pt if this is the best so far; remove all but the `keep` newest."""
        weights = {
            "iter": self.done,
            "train_loss": train_loss,
            "val_loss": val_loss,
            **self.entries,
            "model_state_dict": self.parallel.weights(self.saved),
        }
        is_best = val_loss is None or val_loss < self.best
        self.best = min(self.best, math.inf if val_loss is None else val_loss)
        planned = self.done % self.config.eval_interval == 0  # and not because of Ctrl-C
        self.waited = 0 if is_best else self.waited + planned
        states = {
            "optimizer_state_dict": [self.parallel.optimizer_state(each) for each in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
            "seconds": self.seconds,
            "best": self.best,
            "waited": self.waited,
            "settings": self.settings,
        }
        if self.world.rank == 0:
            save_checkpoint(self.out / f"step_{self.done:08}.pt", **weights, **states)
            if is_best:
                save_checkpoint(self.out / "model.pt", **weights)
            keep_newest(self.out, self.config.keep, self.replaced)
        self.replaced = []

    def restore(self, path: Path) -> None:
        """Bring everything back to where a checkpoint left it. Raises ValueError if settings differ."""
        needs = ("model_state_dict", "optimizer_state_dict", "settings", "guard", "scaler")
        there = load_checkpoint(path, TRAIN_COMMAND, needs)
        check_settings(self.settings, there["settings"], path)
        self.parallel.load_weights(there["model_state_dict"], path, self.saved)
        for optimizer, state in zip(self.optimizers, there["optimizer_state_dict"], strict=True):
            self.parallel.load_optimizer_state(optimizer, state)
        if there["scaler"]:  # of a run in fp16
            self.scaler.load_state_dict(there["scaler"])
        self.guard.load_state_dict(there["guard"])
        self.done, self.seconds, self.best = there["iter"], there["seconds"], there["best"]
        self.waited = there.get("waited", 0)

    def _open_journal(self) -> Journal:
        """Print what is about to happen, and return where its numbers go."""
        config, world, say = self.config, self.world, self.world.print
        rate, source = peak_rate(self.device, self.dtype)
        each = f" in each of {world.size} processes ({config.parallel})" if world.size > 1 else ""
        say(f"model       {self.parameters:,} parameters, {self.operations / 1e6:,.1f} MFLOP per token")
        say(f"device      {self.device}{each}, {str(self.dtype)[6:]} at {rate / 1e9:,.0f} GFLOP/s ({source})")
        if self.done:
            say(f"resumed     after {self.done:,} of {config.max_steps:,} steps")
        if self.replaced:
            say(f"replaced    at the first save: the finished run in {self.out}")
        full_speed = rate * world.size / self.operations  # tokens per second
        name, silent = f"{self.parameters:,} parameters", world.rank > 0
        span = (self.done, config.max_steps)
        return Journal(self.out, config.log, self.settings, *span, full_speed, name, silent, self.unit)

    @torch.no_grad()
    def _report(self, train_loss: float, val_loss: float | None) -> str:
        """Return a line about the run, and a piece of what the model writes by now."""
        line = f"step {self.done:,}  train {train_loss:.4f}"
        if val_loss is not None:
            line += f"  validation {val_loss:.4f} {self.unit}"
            if self.bytes_per_token:
                line += f", {val_loss / math.log(2) / self.bytes_per_token:.4f} bits per byte"
        line += f"  {self.seconds:.1f} s"
        if not self.sample:
            return line
        self.model.eval()
        with autocast(self.device, self.dtype):  # by all processes: the weights may be spread over them
            text = self.parallel.plainly(self.sample)
        self.model.train()
        return f"{line}\n{text}\n"

    def _finish(self, journal: Journal) -> None:
        """Say how it went and what was written."""
        memory = peak_memory(self.device) / 2**20
        self.world.print(journal.summary() + (f"; peak memory {memory:,.0f} MiB" if memory else ""))
        best = f"best validation loss {self.best:.4f}; " if math.isfinite(self.best) else ""
        self.world.print(f"{best}{self.guard.skipped} updates skipped")
        self.world.print(
            f"written to {self.out}: model.pt (best), step_*.pt (to --resume), losses.csv, loss.png"
        )
        if out_of_patience(self.config.patience, self.waited):
            self.world.print(f"stopped early: the last {self.waited} evaluations did not lower the best loss")
        elif self.done < self.config.max_steps:
            left = f"stopped after {self.done:,} of {self.config.max_steps:,} steps"
            self.world.print(f"{left}; go on with --resume and the same flags")


def _trained(model: nn.Module) -> list[str]:
    """Return the names of the weights that a gradient moves."""
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def check_settings(settings: Mapping[str, Any], before: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError for a setting that must be as it was when the run began that is to be resumed."""
    for name, value in settings.items():
        if name not in FREE_TO_CHANGE and value != before.get(name):
            raise ValueError(
                f"{name} ({value}) must be {before.get(name)} to resume {path}, as when that run began"
            )


def checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints of a folder that a run can go on from, oldest first."""
    return sorted(out.glob("step_*.pt"))


def begin_run(
    out: Path,
    resume: bool,
    overwrite: bool,
    restore: Callable[[Path], None],
    command: str,
    unit: str = "steps",
) -> list[Path]:
    """Restore the newest checkpoint if asked to; else return those of a run that is over, to be replaced.

    Raises ValueError if a folder holds a run that was stopped before its end, unless told to overwrite it.
    """
    made = checkpoints(out)
    if resume:
        restore(made[-1] if made else out / "step_*.pt")
        return []
    if made and not overwrite:
        there = load_checkpoint(made[-1], command, needs=("iter", "settings"))
        settings = there["settings"]
        ended = out_of_patience(settings.get("patience", 0), there.get("waited", 0))
        if there["iter"] < settings["max_steps"] and not ended:
            what = f"holds a run that was stopped after {there['iter']:,} {unit}"
            raise ValueError(f"out ({out}) {what}: --resume goes on with it, --overwrite begins anew")
    return made


def keep_newest(out: Path, keep: int, replaced: Collection[Path]) -> None:
    """Remove the checkpoints of a folder but for the newest `keep` (0: all) that are not `replaced`."""
    made = set(checkpoints(out))
    for path in made - set(sorted(made - set(replaced))[-keep:]):
        path.unlink()


def out_of_patience(patience: int, waited: int) -> bool:
    """Say whether so many evaluations in a row without a lower validation loss are enough; 0: never."""
    return 0 < patience <= waited
