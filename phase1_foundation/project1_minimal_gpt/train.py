"""Train project 1 to predict the next character.

uv run python phase1_foundation/project1_minimal_gpt/train.py
"""

import copy
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from common.checkpoints import load_checkpoint, load_weights, restore_random_states, save_checkpoint
from common.corpora import load_corpus
from common.device import measure_matmul_rate, pick_device, pick_dtype, seed_everything, synchronize
from common.files import make_folder, shown
from common.plots import LossLog, plot_losses, read_csv
from common.script import StopRequest, progress, script
from phase1_foundation.project1_minimal_gpt.config import TRAIN_COMMAND, Config
from phase1_foundation.project1_minimal_gpt.data import TextData, read_ids
from phase1_foundation.project1_minimal_gpt.generate import generate
from phase1_foundation.project1_minimal_gpt.model import GPT
from phase1_foundation.project1_minimal_gpt.optimizer import clip_gradients, lr_factor, make_optimizers
from phase1_foundation.project1_minimal_gpt.tokenizer import Tokenizer

COLUMNS = ("step", "seconds", "train_loss", "val_loss", "lr", "tokens_per_second")
LOG_INTERVAL = 10  # steps between rows of losses.csv
# settings that may differ from those of the run that --resume goes on with
FREE_TO_CHANGE = {
    "out",
    "resume",
    "device",
    "compile",
    "max_steps",
    "eval_interval",
    "sample_tokens",
    "source",
}


@dataclass
class Run:
    """Everything that changes while training, and so everything that a checkpoint holds."""

    model: GPT
    tokenizer: Tokenizer
    optimizers: list[Optimizer]
    scaler: torch.amp.GradScaler  # keeps fp16 gradients above zero; does nothing for bf16 and fp32
    step: int = 0  # steps done
    seconds: float = 0.0  # of training, evaluations left out
    best: float = float("inf")  # lowest validation loss so far, nats per token


def run(config: Config) -> list[float]:
    """Train and return the loss of every step; main() calls it, and so do the tests, with a tiny config."""
    train, out = config.train, make_folder(config.train.out)
    device = pick_device(train.device)
    dtype = pick_dtype(train.precision, device)
    data, state = prepare(config, device)
    log = LossLog(out / "losses.csv", COLUMNS, resume_step=state.step)
    describe(config, data, state, dtype)
    forward: nn.Module = torch.compile(state.model) if train.compile else state.model  # type: ignore[assignment]
    losses: list[Tensor] = []
    begin = time.perf_counter() - state.seconds
    steps = range(state.step, train.max_steps)
    bar = progress(steps, initial=state.step, total=train.max_steps, desc="training")
    with StopRequest() as stop:
        for step in bar:
            x, y = data.batch(step, device)
            share = lr_factor(step, train)
            losses.append(
                train_step(forward, state.optimizers, x, y, dtype, share, train.grad_clip, state.scaler)
            )

            state.step, stopping = step + 1, stop.requested
            evaluating = stopping or state.step % train.eval_interval == 0 or state.step == train.max_steps
            if not evaluating and state.step % LOG_INTERVAL:
                continue
            row = {"step": state.step, "train_loss": losses[-1].item(), "lr": train.lr * share}
            state.seconds = time.perf_counter() - begin  # after item(), which waits for a GPU to be done
            row |= {"seconds": state.seconds, "tokens_per_second": state.step * x.numel() / state.seconds}
            numbers = {"loss": f"{row['train_loss']:.3f}", "tokens/s": f"{row['tokens_per_second']:,.0f}"}
            bar.set_postfix(numbers, refresh=False)
            if evaluating:
                row["val_loss"] = evaluate(state.model, data, device, dtype)
            log.add(**row)  # before save(): resuming drops a row too many, but cannot make up a lost one
            if evaluating:
                save(state, config, row["train_loss"], row["val_loss"])
                bar.write(report(state, row["train_loss"], row["val_loss"], train.sample_tokens, train.seed))
                begin = time.perf_counter() - state.seconds  # evaluating and saving are not training
            if stopping:
                break
    finish(config, state)
    return [loss.item() for loss in losses]


def train_step(
    model: nn.Module,
    optimizers: list[Optimizer],
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype = torch.float32,
    lr_share: float = 1.0,
    grad_clip: float = 1.0,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Move the weights once, to predict y (B, T) better from x (B, T).

    Return the loss before, nats per token.
    """
    scaler = scaler or torch.amp.GradScaler(x.device.type, enabled=False)
    with autocast(x.device, dtype):
        logits = model(x)  # (B, T, V)
    loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
    scaler.scale(loss).backward()  # fp16 cannot hold gradients below 6e-8: compute them scaled up
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    clip_gradients(model.parameters(), grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_share
        scaler.step(optimizer)  # skipped if a gradient overflowed
        optimizer.zero_grad()
    scaler.update()
    return loss.detach()


def prepare(config: Config, device: torch.device) -> tuple[TextData, Run]:
    """Return the data and the run to start, or to go on with where --resume asks for it."""
    train = config.train
    seed_everything(train.seed)
    ids, tokenizer = read_ids(find_text(train.data, train.source), train.tokenizer)
    data = TextData(ids, config.model.block_size, train.batch_size, train.seed)
    V = tokenizer.vocab_size
    if config.model.vocab_size not in (0, V):
        raise ValueError(f"vocab_size ({config.model.vocab_size}) must be {V}, as the text has, or 0")
    model = GPT(replace(config.model, vocab_size=V)).to(device)
    fp16 = pick_dtype(train.precision, device) == torch.float16
    state = Run(
        model, tokenizer, make_optimizers(model, train), torch.amp.GradScaler(device.type, enabled=fp16)
    )
    if train.resume:
        restore(state, config, train.out / "last.pt")
    return data, state


def find_text(data: str, source: str = "auto") -> Path:
    """Return the file to train on: a path, or a corpus by name. Raises FileNotFoundError if it is neither."""
    if Path(data).is_file():
        return Path(data)
    if Path(data).suffix or "/" in data:
        raise FileNotFoundError(
            f"data ({data}) must be a text file or a corpus by name; there is no such file"
        )
    return load_corpus(data, source)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return the context in which matrix products run in `dtype`; weights stay fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def evaluate(model: nn.Module, data: TextData, device: torch.device, dtype: torch.dtype) -> float:
    """Return the loss over the whole validation part, nats per token."""
    model.eval()
    total, count = 0.0, 0
    for x, y in data.validation_batches(windows=16, device=device):
        with autocast(device, dtype):
            logits = model(x)
        total += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum").item()
        count += y.numel()
    model.train()
    return total / count


def save(state: Run, config: Config, train_loss: float, val_loss: float) -> None:
    """Write last.pt, and model.pt if this is the best so far.

    Generate.py reads the one, --resume the other.
    """
    is_best = val_loss < state.best
    state.best = min(val_loss, state.best)
    weights = {
        "iter": state.step,
        "train_loss": train_loss,
        "val_loss": val_loss,
        "config": asdict(state.model.config),
        "tokenizer": state.tokenizer.to_dict(),
        "model_state_dict": state.model.state_dict(),
    }
    if is_best:
        save_checkpoint(config.train.out / "model.pt", **weights)
    save_checkpoint(
        config.train.out / "last.pt",
        **weights,
        optimizer_state_dict=[optimizer.state_dict() for optimizer in state.optimizers],
        scaler=state.scaler.state_dict(),
        seconds=state.seconds,
        best=state.best,
        settings=config.to_dict(),
    )


def restore(state: Run, config: Config, path: Path) -> None:
    """Bring the run back to where last.pt left it, random generators included.

    Raises ValueError if settings differ.
    """
    checkpoint = load_checkpoint(
        path, TRAIN_COMMAND, needs=("model_state_dict", "optimizer_state_dict", "settings", "tokenizer")
    )
    for name, value in config.to_dict().items():
        before = checkpoint["settings"].get(name)
        if name not in FREE_TO_CHANGE and value != before:
            raise ValueError(f"{name} ({value}) must be {before} to resume {path}, as when that run began")
    if checkpoint["tokenizer"] != state.tokenizer.to_dict():
        raise ValueError(
            f"data ({config.train.data}) must be the text that {path} was trained on; its characters differ"
        )
    load_weights(state.model, checkpoint["model_state_dict"], path)
    for optimizer, saved in zip(state.optimizers, checkpoint["optimizer_state_dict"], strict=True):
        optimizer.load_state_dict(saved)
    state.scaler.load_state_dict(checkpoint["scaler"])
    state.step, state.seconds, state.best = checkpoint["iter"], checkpoint["seconds"], checkpoint["best"]
    restore_random_states(checkpoint["random_states"])


def describe(config: Config, data: TextData, state: Run, dtype: torch.dtype) -> None:
    """Print what is about to happen: sizes, operations, and the time that it will take."""
    train, model = config.train, state.model
    device = next(model.parameters()).device
    tokens = train.batch_size * config.model.block_size  # per step
    operations = tokens * model.flops_per_token()
    with torch.random.fork_rng():  # what measuring draws must not change the run
        seconds = predict_step_seconds(config, data, model, dtype)
        rate = measure_matmul_rate(device, dtype)
    left = train.max_steps - state.step
    sizes = f"{len(data.train):,} tokens to train on, {len(data.validation):,} to validate"
    print(f"text        {sizes}, {state.tokenizer.vocab_size} different")
    print(f"model       {model.count_parameters():,} parameters")
    print(f"device      {device}, {str(dtype)[6:]} matrix products at {rate / 1e9:,.0f} GFLOP/s")
    work = f"{tokens:,} tokens, {operations / 1e9:,.1f} GFLOP"
    print(f"step        {work}, {seconds * 1e3:,.0f} ms, {operations / seconds / rate:.0%} of that rate")
    print(f"prediction  {left:,} steps in {left * seconds:,.0f} s, evaluations not counted", flush=True)


def predict_step_seconds(config: Config, data: TextData, model: GPT, dtype: torch.dtype) -> float:
    """Return the seconds of a step, measured on a copy of the model: the run itself is not touched."""
    device = next(model.parameters()).device
    trial = copy.deepcopy(model)
    optimizers = make_optimizers(trial, config.train)
    x, y = data.batch(0, device)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        train_step(trial, optimizers, x, y, dtype)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def report(state: Run, train_loss: float, val_loss: float, sample_tokens: int, seed: int) -> str:
    """Return a line about the run, and a piece of what the model writes by now."""
    losses = f"train {train_loss:.4f}  validation {val_loss:.4f} nats per token"
    line = f"step {state.step:,}  {losses}  {state.seconds:.1f} s"
    start = min(state.tokenizer.vocab_size - 1, 10)  # byte 10 is the line end; among characters any will do
    ids = generate(state.model, [start], sample_tokens, seed=seed)
    return f"{line}\n{state.tokenizer.decode(ids)}\n" if sample_tokens else line


def finish(config: Config, state: Run) -> None:
    """Draw losses.csv, and say what was written and what to run next."""
    out = config.train.out
    rows = read_csv(out / "losses.csv")
    curves = {}
    for name, column in (("training batch", "train_loss"), ("validation", "val_loss")):
        points = [(float(row["step"]), float(row[column])) for row in rows if row[column]]
        curves[name] = ([step for step, _ in points], [loss for _, loss in points])
    plot_losses(out / "loss.png", curves, title=f"Project 1: {state.model.count_parameters():,} parameters")
    print(
        f"trained {state.step:,} of {config.train.max_steps:,} steps in {state.seconds:.1f} s; "
        f"best validation loss {state.best:.4f}"
    )
    print(f"written to {shown(out)}: model.pt (best), last.pt (to --resume), losses.csv, loss.png")
    if state.step < config.train.max_steps:
        print(f"stopped early; go on with: {TRAIN_COMMAND} --resume and the same flags")
    print(f"next: {TRAIN_COMMAND.replace('train.py', 'generate.py')} --interactive")


@script
def main() -> None:
    """Parse, print, train."""
    config = Config.from_cli()
    config.print_config()
    run(config)


if __name__ == "__main__":
    main()
