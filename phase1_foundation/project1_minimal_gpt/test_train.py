"""Checks of training: what it learns, what it writes, and that an interruption leaves no trace."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.corpora import load_corpus
from common.plots import read_csv
from common.script import run_validation
from phase1_foundation.project1_minimal_gpt import train
from phase1_foundation.project1_minimal_gpt.config import Config
from phase1_foundation.project1_minimal_gpt.conftest import Trained, tiny_config
from phase1_foundation.project1_minimal_gpt.data import TextData, read_ids
from phase1_foundation.project1_minimal_gpt.generate import load_gpt

KILLED_AT_STEP_27 = """
import os, signal
from phase1_foundation.project1_minimal_gpt import train
batch = train.TextData.batch
def last_batch(self, step, *rest):
    if step == 27:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, step, *rest)
train.TextData.batch = last_batch
train.main()
"""


@pytest.fixture(autouse=True)
def quick(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the runs here the measuring and drawing that the run behind `trained` did for real."""
    monkeypatch.setattr(train, "measure_matmul_rate", lambda *_: 1e9 + float(torch.rand(1)))  # it draws, too
    monkeypatch.setattr(train, "plot_losses", lambda *_, **__: None)


def checkpoint(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def same(a: object, b: object) -> bool:
    """Say whether two checkpoints, or parts of them, are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_equal_to_the_bit_means_that():
    a = {"x": [torch.ones(2), 1.5]}
    assert same(a, {"x": [torch.ones(2), 1.5]})
    assert not same(a, {"x": [torch.ones(2) + 1e-7, 1.5]})
    assert not same(a, {"x": [torch.ones(2), 1.5], "y": 0})


def rows_without_times(folder: Path) -> list[tuple[str, ...]]:
    rows = read_csv(folder / "losses.csv")
    return [tuple(row[name] for name in ("step", "train_loss", "val_loss", "lr")) for row in rows]


def assert_as_if_uninterrupted(out: Path, trained: Trained) -> None:
    ours, whole = checkpoint(out), checkpoint(trained.out)
    for name in ("iter", "model_state_dict", "optimizer_state_dict", "random_states", "best", "val_loss"):
        assert same(ours[name], whole[name]), name
    assert rows_without_times(out) == rows_without_times(trained.out)


# Learning, and what is written


def test_training_learns_and_writes_what_it_says(trained: Trained):
    assert len(trained.losses) == 40
    tokenizer = load_gpt(trained.out / "model.pt")[1]
    assert abs(trained.losses[0] - math.log(tokenizer.vocab_size)) < 0.2
    assert trained.losses[-1] < 2.2
    assert {path.name for path in trained.out.iterdir()} == {"model.pt", "last.pt", "losses.csv", "loss.png"}
    assert (trained.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [row[0] for row in rows_without_times(trained.out)] == ["10", "15", "20", "30", "40"]
    for row in read_csv(trained.out / "losses.csv"):
        assert float(row["train_loss"]) == pytest.approx(trained.losses[int(row["step"]) - 1], abs=1e-5)
        assert bool(row["val_loss"]) == (row["step"] in ("15", "30", "40"))
        assert float(row["seconds"]) * float(row["tokens_per_second"]) == pytest.approx(
            int(row["step"]) * 8 * 16, rel=1e-4
        )


def test_a_checkpoint_explains_itself(trained: Trained):
    last = checkpoint(trained.out)
    assert last["iter"] == 40
    assert last["settings"] == trained.config.to_dict()
    assert last["config"]["n_embd"] == 32
    assert last["config"]["vocab_size"] == len(last["tokenizer"]["vocab"])
    assert last["train_loss"] == trained.losses[-1]
    best = checkpoint(trained.out, "model.pt")
    losses = [float(row["val_loss"]) for row in read_csv(trained.out / "losses.csv") if row["val_loss"]]
    assert best["val_loss"] == pytest.approx(min(losses), abs=1e-5)
    assert last["best"] == best["val_loss"]


def test_the_validation_loss_is_the_mean_over_the_whole_last_tenth(trained: Trained):
    model, tokenizer = load_gpt(trained.out / "last.pt")
    text = Path(trained.config.train.data).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text[len(text) - len(text) // 10 :]))
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - 16, 16):
            odds = model(ids[None, start : start + 16])[0].log_softmax(dim=-1)
            losses += [-odds[t, ids[start + t + 1]] for t in range(16)]
    data = TextData(read_ids(Path(trained.config.train.data), "char")[0], 16, 8, 0)
    assert train.evaluate(model, data, torch.device("cpu"), torch.float32) == pytest.approx(
        float(sum(losses) / len(losses)), rel=1e-5
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_each_precision_and_tokenizer_and_optimizer_trains(precision: str, text_file: Path, tmp_path: Path):
    other = {"tokenizer": "byte", "optimizer": "adamw"} if precision == "bf16" else {}
    config = tiny_config(text_file, tmp_path, precision=precision, max_steps=30, sample_tokens=0, **other)
    losses = train.run(config)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.7
    scaler = checkpoint(tmp_path)["scaler"]
    assert bool(scaler) == (precision == "fp16")
    if scaler:
        config.train.max_steps, config.train.resume = 35, True
        train.run(config)
        assert checkpoint(tmp_path)["scaler"]["_growth_tracker"] == scaler["_growth_tracker"] + 5


def test_model_pt_is_the_best_so_far_and_last_pt_the_last(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    val_losses = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(val_losses))
    train.run(tiny_config(text_file, tmp_path, max_steps=6, eval_interval=2))
    assert [checkpoint(tmp_path, name)["iter"] for name in ("model.pt", "last.pt")] == [4, 6]
    assert checkpoint(tmp_path)["best"] == 1.0


# Interruptions


def test_a_killed_run_resumes_to_the_bit(trained: Trained, text_file: Path, tmp_path: Path):
    config = tiny_config(text_file, tmp_path / "out")
    (tmp_path / "same.yaml").write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-c", KILLED_AT_STEP_27, "--config", str(tmp_path / "same.yaml")]
    killed = subprocess.run(command, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert checkpoint(tmp_path / "out")["iter"] == 15
    assert rows_without_times(tmp_path / "out")[-1][0] == "20"  # a row that resuming must not repeat
    config.train.resume = True
    assert train.run(config) == trained.losses[15:]
    assert_as_if_uninterrupted(tmp_path / "out", trained)


def test_sigterm_and_ctrl_c_save_after_the_step_and_resuming_leaves_no_trace(
    trained: Trained, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    signals = {7: signal.SIGTERM, 22: signal.SIGINT}
    batch = TextData.batch

    def signalling(self: TextData, step: int, *rest: object):
        if (number := signals.pop(step, None)) is not None:
            os.kill(os.getpid(), number)
        return batch(self, step, *rest)

    monkeypatch.setattr(TextData, "batch", signalling)
    config, losses = tiny_config(text_file, tmp_path), []
    for done in (8, 23, 40):
        losses += train.run(config)
        config.train.resume = True
        assert checkpoint(tmp_path)["iter"] == len(losses) == done
    assert losses == trained.losses
    rows = rows_without_times(tmp_path)
    assert [row[0] for row in rows] == ["8", "10", "15", "20", "23", "30", "40"]  # a stop adds its own row
    assert [row for row in rows if row[0] not in ("8", "23")] == rows_without_times(trained.out)
    assert same(checkpoint(tmp_path)["model_state_dict"], checkpoint(trained.out)["model_state_dict"])


@pytest.mark.parametrize("moment", ["evaluate", "report", "save_checkpoint"])
def test_a_crash_at_any_moment_loses_no_row_and_repeats_none(
    moment: str, trained: Trained, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls, original = [], getattr(train, moment)

    def crashing(*args: object, **settings: object):
        calls.append(args)
        if len(calls) == 2 + (moment == "save_checkpoint"):  # for files: step 15 wrote two, this is model.pt
            raise OSError("the power failed")
        return original(*args, **settings)

    config = tiny_config(text_file, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train, moment, crashing)
        with pytest.raises(OSError, match="power"):
            train.run(config)
    config.train.resume = True
    first = checkpoint(tmp_path)["iter"]
    assert first == (30 if moment == "report" else 15)
    assert train.run(config) == trained.losses[first:]
    assert_as_if_uninterrupted(tmp_path, trained)


def test_resuming_a_finished_run_changes_nothing(trained: Trained, text_file: Path, tmp_path: Path):
    config = tiny_config(text_file, tmp_path)
    train.run(config)
    before = (tmp_path / "last.pt").read_bytes(), rows_without_times(tmp_path)
    config.train.resume = True
    assert train.run(config) == []
    assert ((tmp_path / "last.pt").read_bytes(), rows_without_times(tmp_path)) == before


# Refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--n_embdd 32", "flag --n_embdd is unknown; did you mean n_embd?"),
        ("--max_steps many", "max_steps"),
        ("--n_embd 33 --n_head 2", "n_embd (33) must be divisible by n_head (2)"),
        ("--lr 0", "lr (0.0) must be above 0"),
        ("--lr nan", "lr (nan) must be above 0"),
        ("--beta2 1", "beta2 (1.0) must be at least 0 and below 1"),
        ("--batch_size 0", "batch_size (0) must be at least 1"),
        ("--seed -1", "seed (-1) must be at least 0"),
        ("--seed 18446744073709551616", "seed (18446744073709551616) must be at least 0 and below 2**63"),
        ("--device abacus", "device (abacus) must be one of those on this machine"),
        ("--vocab_size 64", "vocab_size (64) must be 20, as the text has, or 0"),
        ("--config nowhere", "config (nowhere) must be a YAML file"),
        ("--resume", "there is no checkpoint"),
        ("--data {tmp}/missing.txt", "missing.txt) must be a text file or a corpus by name"),
        ("--data gutenberg", "corpus (gutenberg) must be one of"),
        ("--data {tmp}/empty.txt", "empty.txt) must not be empty"),
        ("--data {tmp}/short.txt", "block_size (16) must be below the validation part"),
        ("--data {tmp}/binary.txt", "must be text, but byte 3 is 0"),
        ("--out {tmp}/empty.txt/below", "Not a directory"),
    ],
)
def test_a_bad_input_gets_one_line_and_status_2_and_writes_nothing(
    flags: str, message: str, text_file: Path, tmp_path: Path, refusal: Callable
):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("To be, or not to be")
    (tmp_path / "binary.txt").write_bytes(b"\x7fEL\0F" * 1000)
    there = sorted(tmp_path.rglob("*"))
    config = tiny_config(text_file, tmp_path / "out")
    fixed = [f"--{name}={value}" for name, value in config.to_dict().items() if name in
             ("data", "out", "block_size", "n_layer", "n_head", "n_embd", "max_steps")]  # fmt: skip
    assert message in refusal(train.main, *fixed, *flags.format(tmp=tmp_path).split()).err
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "out"] == there
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 48}, r"n_embd \(48\) must be 32 to resume"),
        ({"lr": 0.1}, r"lr \(0.1\) must be 0.003 to resume"),
        ({"data": "another"}, r"data .* must be .* to resume"),
    ],
)
def test_resuming_with_other_settings_is_refused_in_words(
    changes: dict, message: str, trained: Trained, text_file: Path, tmp_path: Path
):
    (tmp_path / "last.pt").write_bytes((trained.out / "last.pt").read_bytes())
    if "data" in changes:
        (tmp_path / "other.txt").write_text("another text " * 100)
        changes = {"data": str(tmp_path / "other.txt")}
    there = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        train.run(tiny_config(changes.pop("data", text_file), tmp_path, resume=True, **changes))
    assert sorted(tmp_path.iterdir()) == there


def test_resuming_after_the_text_changed_is_refused_in_words(trained: Trained, tmp_path: Path):
    changed = tmp_path / "text.txt"
    changed.write_text("another text " * 100)
    config = tiny_config(changed, tmp_path, max_steps=1)
    train.run(config)
    changed.write_text("Another text " * 100)
    config.train.resume = True
    with pytest.raises(ValueError, match=r"must be the text that .* was trained on; its characters differ"):
        train.run(config)


def test_a_truncated_checkpoint_is_refused_in_words(trained: Trained, text_file: Path, tmp_path: Path):
    whole = (trained.out / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"last.pt\) must be a whole file of this course; it is cut short"):
        train.run(tiny_config(text_file, tmp_path, resume=True))


# The promises of the presets


def preset(name: str, out: Path) -> Config:
    if load_corpus("tinyshakespeare").name != "tinyshakespeare.txt":
        pytest.skip("tinyshakespeare cannot be had here")
    return Config.from_cli(["--config", name, "--out", str(out)])


@pytest.mark.slow
def test_the_quick_preset_reaches_its_loss(tmp_path: Path):
    train.run(preset("quick", tmp_path))
    assert checkpoint(tmp_path, "model.pt")["val_loss"] <= 1.60


@pytest.mark.gpu
@pytest.mark.slow
def test_baby_gpt_reaches_nanogpts_loss_in_half_a_minute(tmp_path: Path):
    train.run(preset("baby_gpt", tmp_path))
    best = checkpoint(tmp_path, "model.pt")
    assert best["val_loss"] <= 1.47
    assert checkpoint(tmp_path)["seconds"] < 30


if __name__ == "__main__":
    run_validation(__file__)
