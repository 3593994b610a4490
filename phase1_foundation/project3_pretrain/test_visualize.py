"""Checks that the pictures of project 3 show what they say."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.script import run_validation
from phase1_foundation.project3_pretrain import visualize
from phase1_foundation.project3_pretrain.config import VisualizeConfig
from phase1_foundation.project3_pretrain.layers import GroupedCausalAttention
from phase1_foundation.project3_pretrain.test_shards import make_shards
from phase1_foundation.project3_pretrain.visualize import (
    GroupedRecordingAttention,
    attention_weights,
    label,
    run,
)


def test_all_pictures_are_drawn(checkpoint: Path, tmp_path: Path, capsys):
    shards = make_shards(tmp_path / "shards", [[[1, 2, 3], [4]], [[5, 6]]])
    runs = [tmp_path / name for name in ("muon", "adamw")]
    for folder in runs:
        folder.mkdir()
        rows = "step,seconds,train_loss,val_loss\n1,0.5,3.0,\n2,1.0,2.5,2.6\n"
        (folder / "losses.csv").write_text(rows, encoding="utf-8")
    config = VisualizeConfig(runs=runs, shards=shards, model=str(checkpoint), prompt="The sky", out=tmp_path)
    paths = run(config)
    assert [path.name for path in paths] == ["losses.png", "schedules.png", "shards.png", "attention.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    printed = capsys.readouterr().out
    assert "losses.png: the losses of 2 runs" in printed
    assert "shards.png: 16 tokens in 4 documents" in printed  # 9 of text, 7 separators
    assert "attention.png: 2 layers of 4 heads" in printed


def test_recorded_weights_mix_to_what_the_model_computes(model):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    backend = GroupedRecordingAttention()
    torch.testing.assert_close(backend.attend(0, q, k, v), GroupedCausalAttention().attend(0, q, k, v))
    weights = attention_weights(model, list(range(9)))
    assert weights.shape == (2, 4, 9, 9)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 9))
    assert weights.triu(1).abs().max() == 0


def test_labels_can_be_seen(tokenizer):
    shown = {label(tokenizer, token) for token in range(tokenizer.vocab_size)}
    assert all(text and text.isprintable() and len(text) <= 12 for text in shown)
    assert label(tokenizer, tokenizer.encode("\n")[0]) == "↵"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pictures losses --runs nowhere", "no nowhere/losses.csv; make it with: uv run python"),
        ("--pictures shards --shards nowhere", "no shards in nowhere"),
        ("--pictures attention --model nowhere.pt", "model (nowhere.pt) must be"),
        ("--pictures attention --model MODEL --prompt LONG", "tokens) must have at most 48 tokens"),
        ("--prompt=", "prompt () must hold at least one character"),
    ],
)
def test_a_bad_input_gets_one_line_and_status_2(
    flags: str, message: str, checkpoint, tmp_path, refusal: Callable
):
    words = [{"MODEL": str(checkpoint), "LONG": "x" * 60}.get(word, word) for word in flags.split()]
    assert message in refusal(visualize.main, "--out", str(tmp_path), *words).err


if __name__ == "__main__":
    run_validation(__file__)
