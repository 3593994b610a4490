"""Checks of the reward model."""

import math
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.checkpoints import save_checkpoint
from common.script import run_validation
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project6_alignment.pair_loader import fill_rows
from phase2_finetuning.project6_alignment.preference import PairBatch
from phase2_finetuning.project6_alignment.reward_model import (
    RewardModel,
    load_reward_model,
    pair_rewards,
    reward_loss,
)

V = 300


def make(**changes: Any) -> RewardModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": V, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    return RewardModel(Decoder(DecoderConfig(**shape | changes))).double()


def batch(pairs: int = 4) -> PairBatch:
    draw = torch.Generator().manual_seed(1)
    rows = [
        (
            torch.randint(V, (2 + i % 3,), generator=draw).tolist(),
            torch.randint(V, (1 + i,), generator=draw).tolist(),
        )
        for i in range(2 * pairs)
    ]
    tokens, mask = fill_rows(rows)
    shape = (pairs, 2, -1)
    return PairBatch(tokens.view(shape), mask.view(shape), torch.zeros(pairs, 2))


@pytest.mark.parametrize("center", [0.0, 0.03])
def test_loss_and_gradient_equal_trls(center):
    reward_trainer = pytest.importorskip("trl.trainer.reward_trainer")
    model, pairs = make(), batch()
    scores = pair_rewards(model, pairs)
    alone = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    settings = SimpleNamespace(
        accelerator=alone, model=SimpleNamespace(training=False), _metrics={"eval": defaultdict(list)},
        args=SimpleNamespace(center_rewards_coefficient=center or None), _total_train_tokens=0,
    )  # fmt: skip
    logits = scores.T.reshape(-1, 1)  # trl has all chosen ones first
    theirs = reward_trainer.RewardTrainer.compute_loss(
        settings, lambda **_: SimpleNamespace(logits=logits), {}
    )
    total, count = reward_loss(model, pairs, center)
    assert count == 4
    torch.testing.assert_close(total / count, theirs, rtol=0, atol=1e-14)
    weights = list(model.parameters())
    for ours, other in zip(
        torch.autograd.grad(total / count, weights), torch.autograd.grad(theirs, weights), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-13)


def test_equal_scores_lose_ln_2_and_the_level_does_not_matter():
    model, pairs = make(), batch()
    before, _ = reward_loss(model, pairs)
    model.shift(7.0)
    after, _ = reward_loss(model, pairs)
    torch.testing.assert_close(before, after, rtol=1e-13, atol=0)
    torch.nn.init.zeros_(model.score.weight)
    flat, count = reward_loss(model, pairs)
    assert flat.item() / count == pytest.approx(math.log(2))


def test_the_reward_stands_at_the_answers_last_token_and_filling_does_not_touch_it():
    model, pairs = make(), batch()
    tokens, mask = pairs.tokens.flatten(0, 1), pairs.mask.flatten(0, 1)
    found = model(tokens, mask)
    for row, reward in enumerate(found):
        end = int(mask[row].nonzero()[-1]) + 1
        torch.testing.assert_close(model.scores(tokens[row : row + 1, :end])[0, -1], reward)


def test_the_value_of_a_token_knows_nothing_of_the_token():
    model = make()
    tokens = torch.randint(V, (1, 9))
    other = tokens.clone()
    other[0, 5] = (other[0, 5] + 1) % V
    same = (model.values(tokens) == model.values(other))[0]
    assert same[:6].all()
    assert not same[6:].any()
    torch.testing.assert_close(model.values(tokens)[0, 1:], model.scores(tokens)[0, :-1])


def test_scores_begin_about_as_large_as_one():
    torch.manual_seed(0)
    config = make().config
    scores = [RewardModel(Decoder(config)).scores(torch.randint(V, (4, 16))) for _ in range(20)]
    assert torch.stack(scores).std().item() == pytest.approx(1, abs=0.35)


def test_it_learns_which_answer_is_better():
    model, pairs = make(), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses: list[float] = []
    for _ in range(30):
        optimizer.zero_grad()
        total, count = reward_loss(model, pairs, 0.01)
        total.backward()
        optimizer.step()
        losses.append(total.item() / count)
    assert losses[-1] < 0.1 < losses[0]
    rewards = pair_rewards(model, pairs)
    assert (rewards[:, 0] > rewards[:, 1]).all()


def test_in_bf16_scores_still_have_the_digits_of_fp32():
    model = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        scores: Tensor = model.scores(torch.randint(V, (2, 9)))
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16().float()).any()


def test_it_is_read_back_with_its_tokenizer(tmp_path: Path):
    tokenizer = BPETokenizer.train_from_iterator(["a better answer"], 270)
    tokenizer.save(tmp_path / "tokenizer.json")
    model = make().float()
    entries = {
        "config": asdict(model.config),
        "model_state_dict": model.state_dict(),
        "tokenizer": (tmp_path / "tokenizer.json").read_text(encoding="utf-8"),
    }
    save_checkpoint(tmp_path / "model.pt", **entries)
    again, same = load_reward_model(tmp_path / "model.pt")
    tokens = torch.randint(V, (2, 9))
    assert torch.equal(again.scores(tokens), model.eval().scores(tokens))
    assert same.encode("answer") == tokenizer.encode("answer")
    policy = Decoder(replace(model.config))
    save_checkpoint(tmp_path / "policy.pt", **entries | {"model_state_dict": policy.state_dict()})
    with pytest.raises(ValueError, match=r"must be one that train_reward.py made; it has no score$"):
        load_reward_model(tmp_path / "policy.pt")
    with pytest.raises(FileNotFoundError, match=r"train_reward.py"):
        load_reward_model(tmp_path / "none.pt")


if __name__ == "__main__":
    run_validation(__file__)
