"""Checks of training, its files, and what reads them, with a model that takes a second."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from common.plots import read_csv
from common.script import run_validation
from phase1_foundation.project1_minimal_gpt.config import OptimizerConfig
from phase1_foundation.project3_pretrain.trainer import Step, Trainer
from phase2_finetuning.project4_instruction_tuning.config import DataConfig
from phase2_finetuning.project4_instruction_tuning.scoring import ALL
from phase2_finetuning.project5_lora import chat, evaluate, merge, sweep, train
from phase2_finetuning.project5_lora.adamw8bit import AdamW8bit
from phase2_finetuning.project5_lora.adapter_files import TENSORS
from phase2_finetuning.project5_lora.adapters import add_adapter, count_trained
from phase2_finetuning.project5_lora.config import (
    METHODS,
    AdapterConfig,
    ChatConfig,
    Config,
    EvaluateConfig,
    MergeConfig,
    SweepConfig,
    TrainConfig,
)
from phase2_finetuning.project5_lora.conftest import make_model
from phase2_finetuning.project5_lora.lora import Recipe
from phase2_finetuning.project5_lora.lora_plus import make_adapter_optimizers
from phase2_finetuning.project5_lora.test_lora import RECIPES, peft_of
from phase2_finetuning.project5_lora.tuning import load_tuned


def settings(base: Path, out: Path, method: str = "lora", **changes: Any) -> Config:
    """A run of a few steps on short tasks; the model is asked in its own ChatML."""
    data = DataConfig(families=["add"], train_tasks=60, test_tasks=6, turns=1, block_size=40, batch_size=4)
    how: dict[str, Any] = {
        "max_steps": 6,
        "eval_interval": 3,
        "warmup_steps": 1,
        "lr": 1e-2,
        "precision": "fp32",
    }
    tune = AdapterConfig(method=method, rank=2, virtual_tokens=4)
    return Config(model=str(base), tune=tune, data=data, train=TrainConfig(out=out, **how | changes))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_the_loss_and_what_it_saves_is_what_was_measured(
    method: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    result = train.run(settings(base, tmp_path, method))
    assert result.after[ALL].loss < result.before[ALL].loss
    assert (result.trained == result.weights) == (method == "full")
    said = capsys.readouterr().out
    assert f"{result.trained:,} weights by {method}" in said
    assert "nats per answer token" in said
    assert {"losses.csv", "loss.png", "scores.csv", "model.pt"} <= {path.name for path in tmp_path.iterdir()}
    if method == "full":
        return
    saved = torch.load(tmp_path / "model.pt", weights_only=True)["model_state_dict"]
    assert sum(weight.numel() for weight in saved.values()) == result.trained  # the base is not saved with it
    facts = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert facts["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize("method", ["pissa", "qlora", "prefix"])
def test_a_run_that_was_killed_goes_on_to_the_bit(method: str, base: Path, tmp_path: Path):
    config = settings(base, tmp_path, method)
    whole = train.run(config)
    trained = (tmp_path / "adapter" / TENSORS).read_bytes()
    (tmp_path / "step_00000006.pt").unlink()  # as if it had been killed after the checkpoint of step 3
    config.train.resume = True
    assert train.run(config).losses == whole.losses[3:]
    assert (tmp_path / "adapter" / TENSORS).read_bytes() == trained
    config.tune.rank = 3
    with pytest.raises(ValueError, match=r"rank \(3\) must be 2 to resume|must fit the model"):
        train.run(config)


def test_ctrl_c_ends_a_sweep_without_a_row_of_half_a_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step = Trainer.step

    def press(trainer: Trainer, number: int, batch: Any, stop: bool = False) -> Step:
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, number, batch, stop or number == 1)

    monkeypatch.setattr(Trainer, "step", press)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(SweepConfig(ranks=[1], run=settings(base, tmp_path)))
    assert not (tmp_path / "sweep.csv").exists()
    assert (tmp_path / "run" / "step_00000002.pt").is_file()


def test_adapters_are_evaluated_switched_and_merged(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    for method in ("lora", "dora"):
        train.run(settings(base, tmp_path / method, method, max_steps=3))
    folders = [tmp_path / method / "adapter" for method in ("lora", "dora")]
    how: dict[str, Any] = {
        "model": str(base),
        "families": ["add"],
        "test_tasks": 6,
        "max_new_tokens": 8,
    }
    alone, one, other = evaluate.run(EvaluateConfig(adapters=folders, **how))
    assert len({alone[ALL].loss, one[ALL].loss, other[ALL].loss}) == 3
    again, _ = evaluate.run(EvaluateConfig(adapters=folders[1:], **how))[::-1]
    assert math.isclose(again[ALL].loss, other[ALL].loss, rel_tol=1e-6)
    merged = merge.run(MergeConfig(model=str(base), adapters=folders[:1], out=tmp_path / "merged.pt"))
    after, *_ = evaluate.run(EvaluateConfig(adapters=[], **how | {"model": str(merged)}))
    assert math.isclose(after[ALL].loss, one[ALL].loss, rel_tol=1e-6)
    capsys.readouterr()
    lines = iter(["What is 1 + 1?", "/use dora", "/use", "/use nobody", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat.run(ChatConfig(model=str(base), adapters=folders, max_new_tokens=3))
    said = capsys.readouterr().out
    assert "adapters: lora, dora;" in said
    assert "in use: dora; there: lora, dora" in said
    assert "in use: none" in said
    assert "error: adapter (nobody) must be one of those on the model: lora, dora" in said


def test_a_sweep_compares_at_the_best_rate_and_goes_on_where_it_was(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    base = settings(base, tmp_path, max_steps=3)
    config = SweepConfig(ranks=[1, 2], rates=[1e-9, 1e-2], full_rates=[1e-2], run=base)
    runs = sweep.run(config)
    assert [(each.name, each.lr) for each in sweep.best_runs(runs)] == [
        ("full", 1e-2), ("lora, rank 1", 1e-2), ("lora, rank 2", 1e-2),
    ]  # fmt: skip
    full, *_, last = runs
    assert sweep.gain(full, full) == 1
    assert 0 < sweep.gain(last, full) < 1
    assert runs[1].trained * 2 == runs[3].trained
    assert len(read_csv(tmp_path / "sweep.csv")) == 5
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    monkeypatch.setattr(train, "run", lambda *_, **__: pytest.fail("a known run was made again"))
    assert sweep.run(config) == runs
    assert "0 of them to go" in capsys.readouterr().out
    (tmp_path / "sweep.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"must be a table that sweep\.py wrote"):
        sweep.run(config)


# LoRA+


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_lora_plus_has_the_groups_and_rates_of_peft(name: str, monkeypatch: pytest.MonkeyPatch):
    optimizers = pytest.importorskip("peft.optimizers")
    ours = make_model()
    add_adapter(ours, RECIPES[name])
    theirs = peft_of(ours, RECIPES[name], monkeypatch)
    reference = optimizers.create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )

    def count(groups: list[dict]) -> dict[float, int]:
        sizes: dict[float, int] = {}
        for group in groups:
            if size := sum(weight.numel() for weight in group["params"]):
                sizes[group["lr"]] = sizes.get(group["lr"], 0) + size
        return sizes

    (optimizer,) = make_adapter_optimizers(ours, OptimizerConfig(lr=1e-3, weight_decay=0.1), ratio=16.0)
    assert count(optimizer.param_groups) == count(reference.param_groups)
    for group in optimizer.param_groups:
        assert group["peak_lr"] == group["lr"]
        assert all((weight.dim() > 1) == (group["weight_decay"] > 0) for weight in group["params"])


def test_an_optimizer_takes_what_is_trained_and_can_have_eight_bits():
    model = make_model()
    add_adapter(model, Recipe(rank=2))
    (optimizer,) = make_adapter_optimizers(model, OptimizerConfig(), bits=8)
    assert isinstance(optimizer, AdamW8bit)
    sizes = [weight.numel() for group in optimizer.param_groups for weight in group["params"]]
    assert sum(sizes) == count_trained(model)


# Errors


def test_what_cannot_work_is_told_in_one_line(base: Path, tmp_path: Path):
    for argv, message in [
        (["--method", "dora", "--optimizer", "muon"], r"optimizer \(muon\) must be adamw"),
        (["--rank", "0"], r"rank \(0\) must be at least 1"),
        (["--targets"], "targets"),
        (["--lora_dropout", "1"], r"lora_dropout \(1.0\) must be"),
        (["--method", "magic"], "method"),
    ]:
        with pytest.raises(ValueError, match=message):
            Config.from_cli(argv)
    config = settings(base, tmp_path)
    config.tune.targets = ["c_attn"]
    with pytest.raises(ValueError, match=r"targets \(c_attn\) must be all-linear or among q_proj"):
        train.run(config)
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json is missing"):
        load_tuned(str(base), [tmp_path / "nowhere"])


if __name__ == "__main__":
    run_validation(__file__)
