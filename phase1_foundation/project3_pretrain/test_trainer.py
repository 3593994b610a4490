"""Checks of the trainer: batches cut up anyhow, runs killed and resumed, bad batches, files and settings."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.checkpoints import load_checkpoint
from common.script import run_validation
from phase1_foundation.project1_minimal_gpt.optimizer import make_optimizers
from phase1_foundation.project3_pretrain import metrics
from phase1_foundation.project3_pretrain.accumulation import split_rows, to_device
from phase1_foundation.project3_pretrain.config import DecoderConfig, TrainConfig
from phase1_foundation.project3_pretrain.guard import PATIENCE, WINDOW, SpikeGuard
from phase1_foundation.project3_pretrain.loss import Batch, language_model_loss
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.trainer import Trainer, checkpoints

V, T, B = 17, 8, 8


class Counting:
    """Sequences that count upwards in small steps; of each row an uneven share of the targets is hidden."""

    def __init__(self, seed: int = 0, rank: int = 0, size: int = 1) -> None:
        self.seed, self.rank, self.size = seed, rank, size

    def batch(self, step: int) -> Batch:
        draw = np.random.default_rng([self.seed, step])
        rows = torch.from_numpy(draw.integers(1, 4, (B, T + 1)).cumsum(axis=1) % V)
        hidden = torch.from_numpy(draw.random((B, T)) < draw.random((B, 1)))
        share = slice(self.rank * B // self.size, (self.rank + 1) * B // self.size)
        return Batch(rows[share, :-1], rows[share, 1:].masked_fill(hidden[share], -100))


def small_config(out: Path, **settings) -> TrainConfig:
    fast = {
        "lr": 1e-2,
        "warmup_steps": 3,
        "precision": "fp32",
        "device": "cpu",
        "eval_interval": 5,
        "eval_batches": 2,
    }
    return TrainConfig(**{"out": out, "max_steps": 12} | fast | settings)


def small_model(seed: int = 0, **settings) -> Decoder:
    torch.manual_seed(seed)
    shape = {"vocab_size": V, "block_size": T, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 8}
    return Decoder(DecoderConfig(**shape | settings))


def small_trainer(
    out: Path, loader=None, model: nn.Module | None = None, loss=language_model_loss, **settings
):
    config = small_config(out, **settings)
    return Trainer(model or small_model(), loader or Counting(), config, loss, validation=Counting(seed=1))


def equal_states(one: Trainer, other: Trainer) -> bool:
    """Say whether weights and optimizers are the same to the bit."""
    same = [torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True)]
    for a, b in zip(one.optimizers, other.optimizers, strict=True):
        states = zip(a.state.values(), b.state.values(), strict=True)
        same += [bool(torch.as_tensor(s[name] == t[name]).all()) for s, t in states for name in s]
    return all(same) and len(same) > 30


def read_losses(out: Path) -> list[tuple[str, str, str]]:
    with open(out / "losses.csv", newline="") as file:
        return [(row["step"], row["train_loss"], row["val_loss"]) for row in csv.DictReader(file)]


# Sums, not means


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_uneven_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path, rows: int):
    batch = Counting().batch(0)
    counts = [int((part.targets != -100).sum()) for part in split_rows(batch, 3)]
    assert len(set(counts)) == 3  # so it matters how they are weighted
    model = small_model().double()
    total, count = language_model_loss(model, batch)
    expected = torch.autograd.grad(total / count, list(model.parameters()))
    trainer = small_trainer(tmp_path, model=model, micro_batch_size=rows, grad_clip=1e9)
    result = trainer.step(0, batch)
    assert result.tokens == count == sum(counts)
    assert result.loss == pytest.approx((total / count).item(), rel=1e-12)
    for weight, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, grad, rtol=1e-12, atol=1e-14)


def test_the_mean_of_means_would_be_another_gradient():
    model, batch = small_model().double(), Counting().batch(0)
    weights = list(model.parameters())
    total, count = language_model_loss(model, batch)
    exact = torch.autograd.grad(total / count, weights)
    means = [
        total / count for total, count in (language_model_loss(model, part) for part in split_rows(batch, 3))
    ]
    wrong = torch.autograd.grad(sum(means) / len(means), weights)
    apart = torch.stack([(a - b).norm() for a, b in zip(exact, wrong, strict=True)]).norm()
    assert apart > 0.1 * torch.stack([grad.norm() for grad in exact]).norm()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_is_clipping_and_the_optimizers_step(tmp_path: Path, optimizer: str):
    trainer = small_trainer(tmp_path, optimizer=optimizer, micro_batch_size=3, grad_clip=0.5, warmup_steps=0)
    model = small_model()
    optimizers = make_optimizers(model, trainer.config)
    for step in range(3):
        result = trainer.step(step, Counting().batch(step))
        total, count = language_model_loss(model, Counting().batch(step))
        (total / count).backward()
        length = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] = group["peak_lr"] * 0.5 * (1 + math.cos(math.pi * step / 12))
            each.step()
            each.zero_grad()
        assert result.length == pytest.approx(length.item(), rel=1e-5)
        assert result.length > 0.5  # so it was clipped
        # Muon rounds to bf16: an entry, at most sqrt(16) for the tallest matrix, is off by 2**-8 of lr a step
        off = 1e-5 if optimizer == "adamw" else 3 * 0.03 * 4 * 2**-8
        for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=off)


def test_muon_moves_each_matrix_of_a_fused_weight_by_itself(tmp_path: Path):
    trainer = small_trainer(tmp_path, model=small_model(n_head=4, n_kv_head=2, n_embd=16), weight_decay=0.0)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.step(0, Counting().batch(0))
    rows = {"qkv": (16, 8, 8), "gate_up": (64, 64)}
    for name, weight in trainer.model.named_parameters():
        for kind, split in rows.items():
            if f"{kind}.weight" in name:
                for part in (before[name] - weight.detach()).split(split):
                    values = torch.linalg.svdvals(part / (0.03 / 3 * max(1, part.shape[0] / 16) ** 0.5))
                    assert 0.5 < values[: len(values) // 2].min() <= values.max() < 1.3, name


def test_evaluation_weighs_every_token_alike_and_leaves_no_trace(tmp_path: Path):
    trainer = small_trainer(tmp_path, micro_batch_size=3, model=small_model(dropout=0.5))
    with torch.no_grad():
        sums = [language_model_loss(trainer.model.eval(), Counting(seed=1).batch(i)) for i in range(2)]
    trainer.model.train()
    expected = sum(float(total) for total, _ in sums) / sum(int(count) for _, count in sums)
    assert trainer.evaluate() == pytest.approx(expected, rel=1e-5)
    assert trainer.model.training
    assert all(weight.grad is None for weight in trainer.model.parameters())


class Linear(nn.Module):
    """A model that is no Decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 2))


def test_any_model_batch_and_loss_will_do(tmp_path: Path):
    class Points:
        def batch(self, step: int) -> dict:
            x = torch.from_numpy(np.random.default_rng(step).normal(size=(6, 2)))
            return {"x": x.float(), "pair": (x.float() @ torch.tensor([[2.0], [-1.0]]), "a name")}

    def squares(model: Linear, batch: dict) -> tuple[Tensor, int]:
        errors = batch["x"] @ model.weight.T - batch["pair"][0]
        return errors.square().sum(), len(errors)

    config = small_config(
        tmp_path, max_steps=100, lr=0.1, weight_decay=0.0, micro_batch_size=4, eval_interval=100
    )
    trainer = Trainer(Linear(), Points(), config, squares)  # no validation, no sample
    losses = trainer.train()
    assert losses[-1] < 1e-4 < losses[0]
    torch.testing.assert_close(trainer.model.weight.data, torch.tensor([[2.0, -1.0]]), atol=0.02, rtol=0)
    assert load_checkpoint(tmp_path / "model.pt", "-", ("model_state_dict",))["val_loss"] is None


def test_batches_of_any_shape_are_cut_by_rows():
    x = torch.arange(5)
    batch = {"a": x, "b": [x + 5, (Batch(x, x), "name")], "c": 3}
    parts = split_rows(batch, 2)
    assert [part["b"][1][0].tokens.tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert parts[2]["b"][0].tolist() == [9]
    assert parts[2]["c"] == 3
    assert to_device(batch, torch.device("cpu"))["b"][1][1] == "name"
    assert split_rows(batch, 0) == [batch]
    with pytest.raises(ValueError, match=r"batch \(tensors of \[2, 5\] rows\)"):
        split_rows((x, x[:2]), 2)


# Interrupted and resumed


@pytest.mark.parametrize(
    ("optimizer", "precision", "dropout"),
    [("adamw", "fp32", 0.2), ("muon", "fp32", 0.0), ("muon", "bf16", 0.2)],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, optimizer, precision, dropout):
    settings = {"optimizer": optimizer, "precision": precision, "micro_batch_size": 3}
    whole = small_trainer(tmp_path / "whole", model=small_model(dropout=dropout), **settings)
    losses = whole.train()
    out = tmp_path / "parts"
    stopping = StopAfter(7, Counting())
    part = small_trainer(out, stopping, small_model(dropout=dropout), **settings).train()
    torch.manual_seed(99)  # whatever else happened in between
    second = small_trainer(out, model=small_model(seed=5, dropout=dropout), resume=True, **settings)
    assert part + second.train() == losses
    assert len(part) < 12
    assert equal_states(whole, second)
    assert (second.done, second.best) == (whole.done, whole.best)
    assert second.guard.state_dict() == whole.guard.state_dict()
    final = {row[0]: row for row in read_losses(tmp_path / "whole")}
    assert all(final[row[0]][:2] == row[:2] for row in read_losses(out))
    assert len(read_losses(out)) == 12


class StopAfter:
    """Batches that send this process SIGTERM while they are being made."""

    def __init__(self, step: int, loader: Counting, number: int = signal.SIGTERM) -> None:
        self.step, self.loader, self.number = step, loader, number

    def batch(self, step: int) -> Batch:
        if step == self.step:
            os.kill(os.getpid(), self.number)
        return self.loader.batch(step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_before_the_run_ends(tmp_path: Path, number: int, capsys: pytest.CaptureFixture):
    trainer = small_trainer(tmp_path, loader=StopAfter(2, Counting(), number))
    losses = trainer.train()
    assert 0 < len(losses) < 5  # before the first evaluation was due
    assert load_checkpoint(checkpoints(tmp_path)[-1], "-")["iter"] == len(losses)
    assert f"stopped after {len(losses)} of 12 steps; go on with --resume" in capsys.readouterr().out


KILLED = """
import sys, time
from pathlib import Path
from phase1_foundation.project3_pretrain.test_trainer import Counting, small_trainer

class Slow(Counting):
    def batch(self, step):
        time.sleep(0.05)
        return super().batch(step)

small_trainer(Path(sys.argv[1]), loader=Slow(), max_steps=40).train()
"""


@pytest.mark.slow  # another process has to import torch
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path):
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "step_00000010.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()  # -9: nothing is saved or closed
    process.wait()
    assert 10 <= load_checkpoint(checkpoints(out)[-1], "-")["iter"] < 40
    resumed = small_trainer(out, model=small_model(seed=5), resume=True, max_steps=40)
    resumed.train()
    whole = small_trainer(tmp_path / "whole", max_steps=40)
    whole.train()
    assert equal_states(whole, resumed)
    assert read_losses(out) == read_losses(tmp_path / "whole")
    assert len(read_losses(out)) == 40


def test_resuming_needs_the_same_settings_and_a_checkpoint(tmp_path: Path):
    small_trainer(tmp_path, max_steps=5).train()
    with pytest.raises(
        ValueError, match=r"lr \(0.5\) must be 0.01 to resume .*step_00000005.pt, as when that run"
    ):
        small_trainer(tmp_path, resume=True, lr=0.5)
    with pytest.raises(ValueError, match=r"seed \(1\) must be 1337"):
        small_trainer(tmp_path, resume=True, seed=1)
    with pytest.raises(ValueError, match=r"must fit the model: .* there and .* here"):
        small_trainer(tmp_path, resume=True, model=small_model(n_embd=4))
    assert small_trainer(tmp_path, max_steps=5, resume=True).train() == []  # nothing is left to do
    free = {"max_steps": 7, "micro_batch_size": 3, "keep": 1, "eval_interval": 1}
    assert len(small_trainer(tmp_path, resume=True, **free).train()) == 2
    with pytest.raises(FileNotFoundError, match=r"train.py"):
        small_trainer(tmp_path / "empty", resume=True)
    checkpoints(tmp_path)[-1].write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"checkpoint .* must be a whole file"):
        small_trainer(tmp_path, resume=True)


def test_an_unfinished_run_is_not_replaced_by_mistake(tmp_path: Path):
    small_trainer(tmp_path, loader=StopAfter(6, Counting())).train()
    with pytest.raises(
        ValueError, match=r"holds a run that was stopped after \d+ steps: --resume goes on with it"
    ):
        small_trainer(tmp_path)
    small_trainer(tmp_path, overwrite=True, max_steps=3).train()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000003.pt"]  # not the higher numbers
    small_trainer(tmp_path, max_steps=2).train()  # a finished run may be replaced
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002.pt"]
    assert len(read_losses(tmp_path)) == 2


def test_a_model_that_comes_ready_to_write_is_trained_with_its_dropout(tmp_path: Path):
    model = small_model(dropout=0.5).eval()  # as load_model returns it
    small_trainer(tmp_path, model=model, max_steps=1).train()
    assert model.training


class Noise:
    """Validation text that has nothing to do with what is learned."""

    def batch(self, step: int) -> Batch:
        rows = torch.from_numpy(np.random.default_rng(step).integers(0, V, (B, T + 1)))
        return Batch(rows[:, :-1], rows[:, 1:])


def test_a_run_that_only_gets_worse_is_ended_early(tmp_path: Path, capsys: pytest.CaptureFixture):
    def trainer(patience: int, **settings) -> Trainer:
        config = small_config(tmp_path, max_steps=60, eval_interval=4, patience=patience, **settings)
        return Trainer(small_model(), Counting(), config, validation=Noise())

    losses = trainer(patience=2).train()
    evaluated = [(int(step), float(loss)) for step, _, loss in read_losses(tmp_path) if loss]
    best = min(evaluated, key=lambda pair: pair[1])[0]
    assert best + 8 == len(losses) < 60  # two evaluations in a row were no better
    assert load_checkpoint(tmp_path / "model.pt", "-")["iter"] == best
    assert "stopped early: the last 2 evaluations did not lower the best loss" in capsys.readouterr().out
    assert len(trainer(patience=4, resume=True).train()) == 8  # it remembers that it has waited for two
    assert len(trainer(patience=1).train()) == best + 4  # a run that ended by itself may be replaced


def test_the_newest_checkpoints_are_kept_and_the_best(tmp_path: Path):
    trainer = small_trainer(tmp_path, keep=2)
    for done, val_loss in enumerate([3.0, 1.0, 2.0, 1.5], start=1):
        trainer.done = done
        trainer.save(0.0, val_loss)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000003.pt", "step_00000004.pt"]
    best = load_checkpoint(tmp_path / "model.pt", "-")
    assert (best["iter"], best["val_loss"]) == (2, 1.0)
    assert DecoderConfig(**best["config"]) == trainer.model.config
    assert not {"optimizer_state_dict", "settings"} & best.keys()  # weights to use, not to go on from
    trainer.config.keep, trainer.done = 0, 5
    trainer.save(0.0, 1.7)
    assert len(checkpoints(tmp_path)) == 3
    resumed = small_trainer(tmp_path, resume=True)
    assert (resumed.done, resumed.best) == (5, 1.0)


def test_tied_weights_are_written_once(tmp_path: Path):
    trainer = small_trainer(tmp_path, model=small_model(vocab_size=5000))
    trainer.save(0.0, None)
    assert (tmp_path / "model.pt").stat().st_size < 1.2 * 4 * trainer.parameters + 20_000


def test_a_folder_that_cannot_be_written_to_is_noticed_at_once(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="nothing can be written there"):
        small_trainer(tmp_path / "file" / "out")


# Bad batches


def poison(steps: set[int], factor: float) -> Callable:
    """Return the loss of language models, multiplied in some steps: they are told by their first token."""
    marks = {int(Counting().batch(step).tokens.sum()) for step in steps}

    def loss(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
        total, count = language_model_loss(model, batch)
        return total * (factor if int(batch.tokens.sum()) in marks else 1.0), count

    return loss


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_without_a_number_moves_nothing(tmp_path: Path, factor: float):
    trainer = small_trainer(tmp_path, loss=poison({2}, factor), optimizer="muon")
    for step in range(2):
        trainer.step(step, Counting().batch(step))
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    result = trainer.step(2, Counting().batch(2))
    assert result.skipped.startswith(f"the loss is {factor}")
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.step(3, Counting().batch(3)).skipped == ""
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    assert trainer.guard.skipped == 1


def test_training_stops_if_no_step_has_a_number(tmp_path: Path):
    trainer = small_trainer(tmp_path, loss=poison(set(range(6, 20)), math.nan), max_steps=20)
    message = r"updates skipped in a row \(5\) must be below 5; the last, because the loss is nan"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    good = load_checkpoint(checkpoints(tmp_path)[-1], "-")
    assert good["iter"] == 10
    assert all(weight.isfinite().all() for weight in good["model_state_dict"].values())
    assert len(read_losses(tmp_path)) == 10
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path, loss=trainer.loss, max_steps=20, resume=True).train()


def test_a_batch_without_targets_is_skipped(tmp_path: Path):
    trainer = small_trainer(tmp_path, micro_batch_size=3)
    batch = Counting().batch(0)
    batch.targets.fill_(-100)
    result = trainer.step(0, batch)
    assert result.skipped == "there is no token to learn from"
    assert trainer.step(1, Counting().batch(1)).skipped == ""


def test_the_guard_skips_what_stands_out_and_accepts_a_new_level():
    guard, draw = SpikeGuard(sigmas=6), np.random.default_rng(0)
    for _ in range(WINDOW):
        assert guard.judge(*draw.normal([4.0, 1.0], 0.1)) == ""
    assert guard.judge(4.5, 1.0) == ""  # five standard deviations
    assert guard.judge(5.0, 1.0).startswith("the loss 5 is above 4.6")
    assert guard.judge(4.0, 2.0).startswith("the gradient's length 2 is above 1.6")
    assert guard.judge(3.0, 0.1) == ""  # better is never a spike
    reasons = [bool(guard.judge(8.0, 1.0)) for _ in range(PATIENCE)]
    assert reasons == sorted(reasons, reverse=True)
    assert not reasons[-1]
    off = SpikeGuard(sigmas=0)
    assert [off.judge(value, 1.0) for value in [1.0] * WINDOW + [1e9]] == [""] * (WINDOW + 1)


def test_the_guard_waits_until_it_knows_what_is_usual():
    guard = SpikeGuard(sigmas=6)
    assert [guard.judge(1.0 + 0.01 * (i % 2), 1.0) for i in range(WINDOW // 2 - 1)][-1] == ""
    assert guard.judge(100.0, 1.0) == ""
    other = SpikeGuard(sigmas=6)
    other.load_state_dict(guard.state_dict())
    assert other.judge(1e6, 1.0) == guard.judge(1e6, 1.0) != ""


def test_fp16_looks_for_a_scale_that_fits(tmp_path: Path):
    trainer = small_trainer(tmp_path / "half", precision="fp16", max_steps=20)
    exact = small_trainer(tmp_path / "exact", max_steps=20)
    batch = Counting().batch(0)
    trainer.scaler.scale(torch.zeros(1))  # its scale is made on first use
    trainer.scaler.update(2.0**40)
    skipped = [trainer.step(0, batch).skipped for _ in range(10)]
    assert set(skipped) == {"a gradient overflowed fp16, so the loss will be scaled by half as much"}
    assert trainer.scaler.get_scale() == 2.0**30
    assert trainer.guard.skipped == trainer.guard.in_a_row == 0  # that is how it works, and no harm
    trainer.scaler.update(1.0)
    pairs = [(trainer.step(i, Counting().batch(i)), exact.step(i, Counting().batch(i))) for i in range(5)]
    for half, full in pairs:
        assert half.skipped == ""
        assert half.loss == pytest.approx(full.loss, rel=0.01)
        assert half.length == pytest.approx(full.length, rel=0.05)  # so it was unscaled


# Numbers


def test_the_table_of_steps_is_whole_and_the_curves_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture):
    trainer = small_trainer(tmp_path)
    trainer.sample, trainer.bytes_per_token = lambda model: "a sample", 2.5
    losses = trainer.train()
    with open(tmp_path / "losses.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert [float(row["train_loss"]) for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [bool(row["val_loss"]) for row in rows] == [step in (5, 10, 12) for step in range(1, 13)]
    assert float(rows[0]["lr"]) == pytest.approx(1e-2 / 3, rel=1e-5)
    assert all(0 < float(row["utilization"]) < 1 for row in rows)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert "12 steps in" in said.out
    assert "predicted" in said.out
    bits = float(rows[-1]["val_loss"]) / math.log(2) / 2.5
    assert f"{bits:.3f}"[:-1] in said.err + said.out


def test_a_log_that_is_not_installed_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for log, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        with pytest.raises(ValueError, match=rf"log \({log}\) must be installed first: uv pip install {log}"):
            small_trainer(tmp_path / log, log=log).train()


def test_other_logs_get_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sent: dict[str, list] = {"wandb": [], "tensorboard": [], "closed": [], "opened": []}
    run = types.SimpleNamespace(
        id="abc",
        log=lambda values, step: sent["wandb"].append((step, values)),
        finish=lambda: sent["closed"].append(1),
    )
    wandb = types.SimpleNamespace(init=lambda **how: sent["opened"].append(how["id"]) or run)
    writer = types.SimpleNamespace(
        add_scalar=lambda *what: sent["tensorboard"].append(what), close=run.finish
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    board = types.SimpleNamespace(
        SummaryWriter=lambda folder, purge_step: sent["opened"].append(purge_step) or writer
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    for log in ("wandb", "tensorboard"):
        losses = small_trainer(tmp_path / log, log=log, max_steps=3).train()
        small_trainer(tmp_path / log, log=log, max_steps=4, resume=True).train()
    assert sent["opened"] == [None, "abc", None, 4]
    assert [(step, values["train_loss"]) for step, values in sent["wandb"][:3]] == list(
        enumerate(losses, start=1)
    )
    assert [step for step, _ in sent["wandb"]] == [1, 2, 3, 4]
    assert next(what for what in sent["tensorboard"] if what[0] == "val_loss")[2] == 3
    assert len(sent["closed"]) == 4


def test_utilization_is_relative_to_the_data_sheet_of_a_known_gpu(monkeypatch: pytest.MonkeyPatch):
    names = {"NVIDIA H200": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 80GB HBM3": 989e12}
    names |= {"NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA GeForce RTX 4090": 165e12}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert metrics.peak_rate(torch.device("cuda"), torch.bfloat16) == (peak, f"{name}'s data sheet")
    rate, source = metrics.peak_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15
    assert source.startswith("measured")


def test_operations_are_the_models_own_count_or_six_for_each_weight():
    model = small_model()
    assert metrics.operations_per_token(model) == model.flops_per_token()
    assert metrics.operations_per_token(nn.Linear(3, 5)) == 6 * 20
    assert metrics.peak_memory(torch.device("cpu")) > 50 * 2**20  # this process has imported torch


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(tmp_path: Path):
    plain = small_trainer(tmp_path / "plain").train()
    compiled = small_trainer(tmp_path / "compiled", compile=True).train()
    assert compiled == pytest.approx(plain, rel=1e-4)


if __name__ == "__main__":
    run_validation(__file__)
