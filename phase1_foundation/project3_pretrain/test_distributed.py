"""Checks of training by two processes; torchrun starts them once, and they do all that the tests look at."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.checkpoints import load_checkpoint
from common.script import run_validation
from phase1_foundation.project1_minimal_gpt.optimizer import gather
from phase1_foundation.project3_pretrain.distributed import ParallelModel, World, join_world
from phase1_foundation.project3_pretrain.loss import Batch, language_model_loss
from phase1_foundation.project3_pretrain.test_trainer import Counting, small_config, small_model
from phase1_foundation.project3_pretrain.trainer import Trainer, checkpoints

KINDS = ("ddp", "fsdp")
RUNS = [(kind, optimizer) for kind in KINDS for optimizer in ("adamw", "muon")]
MODULE = "phase1_foundation.project3_pretrain.test_distributed"


def trainer_of(
    out: Path, world: World, model: nn.Module | None = None, loader: Any = None, **settings
) -> Trainer:
    """Return a trainer in float64, so that two processes differ from one by nearly nothing."""
    loader = loader or Counting(rank=world.rank, size=world.size)
    validation = Counting(seed=1, rank=world.rank, size=world.size)
    config = small_config(out, keep=0, **{"micro_batch_size": 3} | settings)
    model = model or small_model().double()
    return Trainer(model, loader, config, validation=validation, sample=greedy, world=world)


def greedy(model: nn.Module) -> str:
    """Return the likeliest next tokens of a sequence."""
    return str(model(torch.arange(8)[None]).argmax(dim=-1).tolist())


# What the two processes do


def work(task: str, out: Path) -> None:
    """Run a task in one of the processes that torchrun started."""
    with join_world("cpu") as world:
        if task == "wait":
            trainer_of(
                out, world, loader=Slow(world), max_steps=1000, eval_interval=1000, parallel="fsdp"
            ).train()
            return
        results: dict[str, Any] = {"sum": world.sum(torch.tensor(world.rank + 1.0)).item()}
        for kind in KINDS:
            results[kind] = one_step(out, world, kind)
            results[f"{kind} nan"] = one_bad_process(out, world, kind)
            for precision in ("bf16", "fp16"):
                trainer = trainer_of(
                    out / f"{kind}_{precision}", world, small_model(), parallel=kind, precision=precision
                )
                results[f"{kind} {precision}"] = trainer.train()
        for kind, optimizer in RUNS:
            settings = {"optimizer": optimizer, "parallel": kind}
            results[f"{kind} {optimizer}"] = trainer_of(
                out / f"{kind}_{optimizer}", world, **settings
            ).train()
            resumed = trainer_of(out / f"{kind}_{optimizer}_resumed", world, resume=True, **settings)
            results[f"{kind} {optimizer} resumed"] = resumed.train()
        if world.rank == 0:
            (out / "results.json").write_text(json.dumps(results))


class Slow(Counting):
    """Batches that take a while."""

    def __init__(self, world: World) -> None:
        super().__init__(rank=world.rank, size=world.size)

    def batch(self, step: int) -> Batch:
        time.sleep(0.1)
        return super().batch(step)


def one_step(out: Path, world: World, kind: str) -> dict[str, Any]:
    """Save the gradient of a step, of which each process computed two uneven micro-batches."""
    trainer = trainer_of(out / f"{kind}_step", world, parallel=kind, grad_clip=1e9)
    result = trainer.step(0, trainer.loader.batch(0))
    grads = {
        name: gather(weight.grad)
        for name, weight in trainer.model.named_parameters()
        if weight.grad is not None
    }
    held = sum(getattr(w, "_local_tensor", w).numel() for w in trainer.model.parameters())
    if world.rank == 0:
        torch.save(grads, out / f"{kind}_grads.pt")
    return {"loss": result.loss, "tokens": result.tokens, "held": held, "all": trainer.parameters}


def one_bad_process(out: Path, world: World, kind: str) -> list[Any]:
    """Return what the first process does about a loss of the second that is no number."""
    trainer = trainer_of(out / f"{kind}_nan", world, parallel=kind)

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        total, count = language_model_loss(model, batch)
        return total * (math.nan if world.rank == 1 else 1.0), count

    trainer.loss = loss
    skipped = trainer.step(0, trainer.loader.batch(0)).skipped
    trainer.loss = language_model_loss
    return [skipped, trainer.step(1, trainer.loader.batch(1)).loss]


# What one process does, to compare


def start(task: str, out: Path) -> subprocess.Popen:
    """Start two processes that run `work`."""
    words = [
        "--nproc_per_node",
        "2",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        "--module",
        MODULE,
    ]
    command = [sys.executable, "-m", "torch.distributed.run", *words, task, str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def end(process: subprocess.Popen) -> None:
    """Leave no process behind, whatever went wrong."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which one process, and then two, have left their runs."""
    out = tmp_path_factory.mktemp("runs")
    for optimizer in ("adamw", "muon"):
        trainer_of(out / f"alone_{optimizer}", World(), optimizer=optimizer).train()
        for kind in KINDS:  # where two processes will go on after five steps
            folder = out / f"{kind}_{optimizer}_resumed"
            folder.mkdir()
            shutil.copy(out / f"alone_{optimizer}" / "step_00000005.pt", folder)
    process = start("all", out)
    try:
        said, _ = process.communicate(timeout=300)
    finally:
        end(process)
    if process.returncode:
        pytest.fail(said[:4000], pytrace=False)
    return out


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def losses_of(out: Path) -> list[float]:
    """Return the losses of a run, as its checkpoints know them."""
    return [load_checkpoint(path, "-")["train_loss"] for path in checkpoints(out)]


def assert_same_run(one: Path, other: Path) -> None:
    """Fail unless two runs went through the same losses to the same weights, up to rounding."""
    assert losses_of(one) == pytest.approx(losses_of(other), rel=1e-9)
    ends = [load_checkpoint(checkpoints(path)[-1], "-") for path in (one, other)]
    assert ends[0]["iter"] == ends[1]["iter"] == 12
    assert ends[0]["val_loss"] == pytest.approx(ends[1]["val_loss"], rel=1e-9)
    torch.testing.assert_close(ends[0]["model_state_dict"], ends[1]["model_state_dict"], rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_gradient_of_one(out: Path, results: dict, kind: str):
    alone = trainer_of(out / "alone_step", World(), grad_clip=1e9)
    result = alone.step(0, Counting().batch(0))
    assert results[kind]["tokens"] == result.tokens
    assert results[kind]["loss"] == pytest.approx(result.loss, rel=1e-12)
    grads = torch.load(out / f"{kind}_grads.pt", weights_only=True)
    expected = {name: weight.grad for name, weight in alone.model.named_parameters()}
    torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-14)
    assert results["sum"] == 3.0


@pytest.mark.slow
def test_fsdp_holds_half_of_the_weights_and_ddp_all(results: dict):
    assert results["ddp"]["held"] == results["ddp"]["all"]
    assert 0.4 < results["fsdp"]["held"] / results["fsdp"]["all"] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "optimizer"), RUNS)
def test_two_processes_learn_what_one_learns(out: Path, kind: str, optimizer: str):
    assert_same_run(out / f"{kind}_{optimizer}", out / f"alone_{optimizer}")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "optimizer"), RUNS)
def test_two_processes_go_on_where_one_stopped(out: Path, results: dict, kind: str, optimizer: str):
    assert len(results[f"{kind} {optimizer} resumed"]) == 7
    assert_same_run(out / f"{kind}_{optimizer}_resumed", out / f"alone_{optimizer}")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "optimizer"), RUNS)
def test_one_process_goes_on_where_two_stopped(out: Path, tmp_path: Path, kind: str, optimizer: str):
    shutil.copy(out / f"{kind}_{optimizer}" / "step_00000005.pt", tmp_path)
    trainer = trainer_of(tmp_path, World(), small_model(seed=3).double(), optimizer=optimizer, resume=True)
    assert trainer.done == 5
    assert len(trainer.train()) == 7
    assert_same_run(tmp_path, out / f"alone_{optimizer}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_processes_skip_what_is_no_number_in_one(results: dict, kind: str):
    reason, next_loss = results[f"{kind} nan"]
    assert reason.startswith("the loss is nan")
    assert math.isfinite(next_loss)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_two_processes_in_sixteen_bits_learn_about_what_one_learns(
    tmp_path, results, kind: str, precision: str
):
    alone = trainer_of(tmp_path, World(), small_model(), precision=precision).train()
    assert results[f"{kind} {precision}"] == pytest.approx(alone, rel=1e-3)
    assert alone[-1] < 0.95 * alone[0]


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_the_run_can_go_on(tmp_path: Path):
    process = start("wait", tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "losses.csv").is_file() and (tmp_path / "losses.csv").read_text().count("\n") > 4:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=60)
    finally:
        end(process)
    saved = checkpoints(tmp_path)
    assert len(saved) == 1
    assert 4 <= load_checkpoint(saved[0], "-")["iter"] < 1000
    resumed = trainer_of(tmp_path, World(), resume=True, max_steps=1000, eval_interval=1000)
    assert math.isfinite(resumed.step(resumed.done, Counting().batch(resumed.done)).loss)


# One process


def test_without_torchrun_there_is_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.delenv("RANK", raising=False)
    with join_world("cpu") as world:
        assert world == World(rank=0, size=1, local_rank=0)
        assert world.sum(torch.tensor(2.0)) == 2.0
        world.print("the first speaks")
        World(rank=1, size=2).print("the second does not")
    assert capsys.readouterr().out == "the first speaks\n"


def test_work_and_its_gradient_are_the_models_own():
    model = small_model()
    parallel = ParallelModel(model, World(), "fsdp", torch.device("cpu"))
    tokens = torch.arange(8)[None]
    assert torch.equal(parallel(lambda model, x: model(x), tokens), model(tokens))
    assert torch.equal(parallel.plainly(lambda model: model.head.weight), model.head.weight)
    state = parallel.weights()
    assert state["head.weight"].data_ptr() == state["token_embedding.weight"].data_ptr()  # tied
    with pytest.raises(ValueError, match="must fit the model"):
        parallel.load_weights({name: value[:3] for name, value in state.items()}, "a file")


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        work(sys.argv[1], Path(sys.argv[2]))
    else:
        run_validation(__file__)
