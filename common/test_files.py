"""Checks of files, checkpoints, loss logs, plots and devices: written whole or not at all, and never code."""

import contextlib
import errno
import os
import pickle
import random

import numpy as np
import pytest
import torch

from common.checkpoints import load_checkpoint, load_weights, restore_random_states, save_checkpoint
from common.device import cpu_multiplies_bf16, measure_matmul_rate, pick_device, pick_dtype, seed_everything
from common.files import atomic_write, make_folder, shown
from common.plots import LossLog, plot_losses, read_csv
from common.script import run_validation

CPU = torch.device("cpu")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a" / "file.txt"
    with atomic_write(path) as file:
        file.write("old\r\nü")
    with pytest.raises(OSError, match="full") as caught, atomic_write(path) as file:  # noqa: PT012
        file.write("half of the n")
        raise OSError(errno.ENOSPC, "the disk is full")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == "old\r\nü".encode()
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "file", "wb") as file:  # noqa: PT012
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), atomic_write(tmp_path / "file"):
        open(tmp_path / "other")  # noqa: SIM115


def test_what_a_killed_run_left_is_swept_when_it_is_old(tmp_path):
    old, young = tmp_path / ".file.a.tmp", tmp_path / ".file.b.tmp"
    for left in (old, young):
        left.touch()
    os.utime(old, (0, 0))
    with atomic_write(tmp_path / "file"):
        pass
    assert sorted(item.name for item in tmp_path.iterdir()) == [".file.b.tmp", "file"]


def test_a_written_file_has_the_rights_that_open_would_give(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "atomic"):
        pass
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="nothing can be written there"):
        make_folder(tmp_path / "file" / "folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="nothing can be written there"):
        make_folder(tmp_path)


def test_paths_are_shown_relative_where_that_is_shorter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "a" / "b") == os.path.join("a", "b")
    assert shown("/elsewhere/b") == os.path.abspath("/elsewhere/b")


def make_checkpoint(path):
    model = torch.nn.Linear(3, 2)
    save_checkpoint(path, model_state_dict=model.state_dict(), config={"n": 3}, iter=7)
    return model


def test_a_checkpoint_comes_back_with_its_random_states(tmp_path):
    model = make_checkpoint(tmp_path / "c.pt")
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    entries = load_checkpoint(tmp_path / "c.pt", "train.py")
    restore_random_states(entries["random_states"])
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn
    assert entries["iter"] == 7
    assert torch.equal(entries["model_state_dict"]["weight"], model.weight)


def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="make it with: uv run train"):
        load_checkpoint(tmp_path / "none.pt", "uv run train.py")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_checkpoint_is_one_clear_line(tmp_path, keep):
    path = tmp_path / "c.pt"
    make_checkpoint(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"checkpoint \(.*\) must be a whole file of this course"):
        load_checkpoint(path, "train.py")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_checkpoints_never_crash_the_reader(tmp_path):
    path = tmp_path / "c.pt"
    make_checkpoint(path)
    content, choice = path.read_bytes(), random.Random(0)
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(choice.randint(1, 20)):
            damaged[choice.randrange(len(damaged))] = choice.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):  # and nothing else
            load_checkpoint(path, "train.py")


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_hostile_checkpoint_runs_no_code(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"model_state_dict": {}, "config": Attack()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="damaged or foreign"):
        load_checkpoint(tmp_path / "c.pt", "train.py")
    assert not (tmp_path / "attacked").exists()


def test_a_foreign_but_readable_checkpoint_says_what_it_lacks(tmp_path):
    torch.save({"config": {}}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="it lacks model_state_dict"):
        load_checkpoint(tmp_path / "c.pt", "train.py")
    torch.save([1, 2], tmp_path / "c.pt")
    with pytest.raises(ValueError, match="it lacks"):
        load_checkpoint(tmp_path / "c.pt", "train.py")


def test_weights_of_another_shape_are_named():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"must fit the model: weight is \(2, 4\) there and \(2, 3\) here"):
        load_weights(model, torch.nn.Linear(4, 2).state_dict(), "c.pt")
    with pytest.raises(ValueError, match="bias is none there"):
        load_weights(model, {"weight": model.weight}, "c.pt")


def test_the_loss_log_drops_rows_after_the_step_that_it_resumes_from(tmp_path):
    path = tmp_path / "losses.csv"
    log = LossLog(path, ["step", "loss"])
    for step in (10, 20, 30):
        log.add(step=step, loss=step / 3)
    LossLog(path, ["step", "loss"], resume_step=20).add(step=30, loss=None)
    assert [row["step"] for row in read_csv(path)] == ["10", "20", "30"]
    assert read_csv(path)[-1]["loss"] == ""
    LossLog(path, ["step", "loss"])
    assert read_csv(path) == []


def test_a_loss_log_cut_in_the_middle_of_a_row_can_be_resumed(tmp_path):
    path = tmp_path / "losses.csv"
    path.write_text("step,loss\n10,3.5\n2")
    LossLog(path, ["step", "loss"], resume_step=10)
    assert read_csv(path) == [{"step": "10", "loss": "3.5"}]


def test_a_plot_is_a_png(tmp_path):
    plot_losses(tmp_path / "p.png", {"training": ([1, 2], [3.0, 2.0]), "validation": ([], [])}, "A title")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_devices_are_picked_by_name():
    assert pick_device("cpu") == CPU
    assert pick_device().type in ("cuda", "mps", "cpu")
    for name in ("banana", "cuda:99", "meta"):
        with pytest.raises(
            ValueError, match=rf"device \({name}\) must be one of those on this machine: auto, .*cpu"
        ):
            pick_device(name)


def test_precision_follows_the_processor(monkeypatch):
    assert pick_dtype("fp32", CPU) == torch.float32
    assert pick_dtype("bf16", CPU) == torch.bfloat16
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("common.device.cpu_multiplies_bf16", lambda has_bf16=has_bf16: has_bf16)
        assert pick_dtype("auto", CPU) == dtype


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16", None])
def test_bf16_is_used_only_where_the_processor_has_it(monkeypatch, flag):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, str(flag): True}, raising=False)
    assert cpu_multiplies_bf16() == (flag is not None)


def test_a_seed_repeats_all_generators():
    def draw():
        seed_everything(3)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_the_measured_rate_is_a_rate_that_a_computer_can_have():
    assert 1e7 < measure_matmul_rate(CPU, torch.float32, size=64, seconds=0.01) < 1e17


if __name__ == "__main__":
    run_validation(__file__)
