"""Checks of the loop of writing, judging and learning, and of what GRPO and PPO do in it."""

import copy
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.plots import read_csv
from common.script import run_validation
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project4_instruction_tuning.tasks import FAMILIES
from phase2_finetuning.project6_alignment import learner as learner_module
from phase2_finetuning.project6_alignment import train_grpo, train_ppo
from phase2_finetuning.project6_alignment.advantages import group_advantages
from phase2_finetuning.project6_alignment.config import GRPOConfig, PolicyLossConfig, PPOConfig, RLConfig
from phase2_finetuning.project6_alignment.learner import PolicyLearner, minibatches
from phase2_finetuning.project6_alignment.logprobs import answer_logprobs
from phase2_finetuning.project6_alignment.pairs import load_policy
from phase2_finetuning.project6_alignment.rollouts import off_policy_weights
from phase2_finetuning.project6_alignment.rounds import Round, Writer
from phase2_finetuning.project6_alignment.train_grpo import GRPO, collect
from phase2_finetuning.project6_alignment.train_ppo import PPO

TINY: dict[str, Any] = {
    "families": ["add", "count"],
    "rewards": ["brevity"],  # the one reward of which a model of random weights gets some
    "prompts": 4,
    "max_new_tokens": 8,
    "test_tasks": 6,
    "eval_interval": 2,
    "max_steps": 4,
    "lr": 1e-2,
    "device": "cpu",
}
LEARNING: dict[str, Any] = {
    "max_steps": 25,
    "eval_interval": 25,
    "prompts": 8,
    "max_new_tokens": 16,
    "lr": 2e-2,
}


def grpo_config(
    policy_file: Path, out: Path, policy: PolicyLossConfig | None = None, **changes: Any
) -> GRPOConfig:
    own = {name: changes.pop(name) for name in ("samples", "dynamic_sampling") if name in changes}
    rl = RLConfig(**TINY | {"model": str(policy_file)} | changes)
    return GRPOConfig(rl, policy or PolicyLossConfig(), out=out, **{"samples": 4} | own)


def ppo_config(policy_file: Path, out: Path, **changes: Any) -> PPOConfig:
    own = {"model": str(policy_file), "prompts": 16, "epochs": 2, "minibatches": 2}
    loss = PolicyLossConfig(mean="token", kl_in="reward", kl_estimator="k1", kl_weight=0.02)
    return PPOConfig(RLConfig(**TINY | own | changes), loss, value_lr=1e-2, out=out)


def written(policy_file: Path, out: Path, **changes: Any) -> tuple[GRPOConfig, Decoder, Round]:
    """Return settings, the policy in float64, and a round of its answers with rewards that differ."""
    config = grpo_config(policy_file, out, **changes)
    policy, tokenizer, template = load_policy(config.rl.model)
    policy.double()
    batch = collect(Writer(config.rl, policy, tokenizer, template, config.samples), config, 0)
    batch.rewards = torch.rand(
        len(batch.rewards), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return config, policy, batch


# Learning


def test_the_first_update_of_grpo_is_reinforce_with_the_groups_mean_as_baseline(
    policy_file: Path, tmp_path: Path
):
    config, policy, batch = written(policy_file, tmp_path)
    config.policy = PolicyLossConfig(advantage="centered", mean="constant")
    config.rl.grad_clip = 1e9
    GRPO(config, policy).learn(batch, share=0.0)  # weights stay, gradients are left
    found = [weight.grad.clone() for weight in policy.parameters()]
    policy.zero_grad()
    rollout = batch.rollout
    logprobs = answer_logprobs(policy, rollout.tokens, rollout.mask).sum(dim=1)
    baseline = batch.rewards.view(-1, 4).mean(dim=1).repeat_interleave(4)
    loss = -((batch.rewards - baseline) * logprobs).mean() / config.rl.max_new_tokens
    loss.backward()
    for ours, weight in zip(found, policy.parameters(), strict=True):
        torch.testing.assert_close(ours, weight.grad, atol=1e-10, rtol=1e-6)  # old odds are noted in float64


@pytest.mark.parametrize("mean", ["sequence", "token", "constant"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_parts_of_an_update_add_up_to_the_whole(
    policy_file: Path, tmp_path: Path, mean: Any, kl_weight: float
):
    grads = []
    for rows in (0, 3):
        config, policy, batch = written(policy_file, tmp_path)
        batch.rewards[4:8] = 0.5  # a group in which nothing can be learned, so its rows are not computed
        config.policy = PolicyLossConfig(mean=mean, kl_weight=kl_weight)
        config.rl.micro_batch_size = rows
        learner = GRPO(config, policy)
        for weight in policy.parameters():  # away from the reference, or the KL has no gradient
            weight.data.mul_(1.1)
        learner.learn(batch, share=0.0)
        grads.append(torch.cat([weight.grad.flatten() for weight in policy.parameters()]))
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-9)


def test_rows_that_teach_nothing_are_left_out_and_count_all_the_same(
    policy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    grads, sizes = [], []
    answer_odds = learner_module.answer_odds

    def spy(model: Decoder, tokens: Tensor, *rest: Any) -> Any:
        sizes.append(len(tokens))
        return answer_odds(model, tokens, *rest)

    monkeypatch.setattr(learner_module, "answer_odds", spy)
    for bonus in (0.0, 1e-30):  # a price on the entropy, however small, makes each row count
        config, policy, batch = written(policy_file, tmp_path)
        batch.rewards[4:12] = 0.5
        config.policy = PolicyLossConfig(entropy_bonus=bonus)
        GRPO(config, policy).learn(batch, share=0.0)
        grads.append(torch.cat([weight.grad.flatten() for weight in policy.parameters()]))
    assert sizes == [8, 16]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("advantage", ["normalized", "centered", "leave_one_out"])
def test_where_all_answers_are_worth_the_same_nothing_moves(
    policy_file: Path, tmp_path: Path, advantage: Any
):
    config, policy, batch = written(policy_file, tmp_path)
    config.policy = PolicyLossConfig(advantage=advantage)
    before = copy.deepcopy(policy.state_dict())
    batch.rewards[:] = 1.0
    numbers = GRPO(config, policy).learn(batch, share=1.0)
    assert numbers["gradient"] == 0
    for name, weight in policy.state_dict().items():
        torch.testing.assert_close(weight, before[name], atol=0, rtol=0)


def test_every_epoch_takes_each_row_once_in_a_new_order():
    rl = RLConfig(**TINY | {"epochs": 3, "minibatches": 4})
    parts = list(minibatches(rl, 10, torch.device("cpu")))
    assert [len(part) for part in parts] == [3, 3, 3, 1] * 3
    orders = [torch.cat(parts[i : i + 4]).tolist() for i in (0, 4, 8)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_several_updates_run_into_the_bound(policy_file: Path, tmp_path: Path):
    clipped = {}
    for epochs in (1, 4):
        config, policy, batch = written(policy_file, tmp_path, epochs=epochs)
        clipped[epochs] = GRPO(config, policy).learn(batch, share=1.0)["clipped"]
    assert clipped[1] == 0
    assert clipped[4] > 0.01


def test_the_price_of_distance_can_be_paid_in_the_reward(policy_file: Path, tmp_path: Path):
    config, policy, batch = written(policy_file, tmp_path)
    config.policy = PolicyLossConfig(
        advantage="centered", mean="constant", kl_in="reward", kl_estimator="k1", kl_weight=0.3
    )
    config.rl.grad_clip = 1e9
    learner = GRPO(config, policy)
    for weight in learner.reference.parameters():
        weight.data.mul_(0.9)
    reference = learner.logprobs(learner.reference, batch.rollout)
    learner.learn(batch, share=0.0)
    found = torch.cat([weight.grad.flatten() for weight in policy.parameters()])
    gap = (batch.rollout.logprobs - reference).sum(dim=1)
    advantages = group_advantages(batch.rewards - 0.3 * gap, 4, "centered")
    policy.zero_grad()
    logprobs = answer_logprobs(policy, batch.rollout.tokens, batch.rollout.mask).sum(dim=1)
    (-(advantages * logprobs).mean() / config.rl.max_new_tokens).backward()
    expected = torch.cat([weight.grad.flatten() for weight in policy.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-6)


# Odds that are not the trainer's


def test_weighed_answers_of_one_model_have_the_mean_gradient_of_anothers():
    torch.manual_seed(0)
    logits, other = (
        torch.randn(12, dtype=torch.float64, requires_grad=True),
        torch.randn(12, dtype=torch.float64),
    )
    rewards, mask = torch.rand(12, dtype=torch.float64), torch.ones(12, dtype=torch.bool)
    logprobs, written = logits.log_softmax(0), other.log_softmax(0)

    def mean_gradient(odds: Tensor, weights: Tensor) -> Tensor:
        return torch.autograd.grad((odds * weights * rewards * logprobs).sum(), logits, retain_graph=True)[0]

    wanted = mean_gradient(logprobs.exp().detach(), torch.ones(12))
    weights = off_policy_weights(logprobs.detach(), written, mask, cap=1e9)
    torch.testing.assert_close(mean_gradient(written.exp(), weights), wanted)
    errors = [
        (mean_gradient(written.exp(), weights) - wanted).norm().item()
        for weights in (off_policy_weights(logprobs.detach(), written, mask, cap=2.0), torch.ones(12))
    ]
    assert 0 < errors[0] < errors[1]  # cut: a small error; not weighed at all: a large one


def test_odds_that_the_writer_got_wrong_are_made_good(policy_file: Path, tmp_path: Path):
    config, policy, batch = written(policy_file, tmp_path)
    config.rl.off_policy_cap = 2.0
    noise = torch.randn(batch.rollout.logprobs.shape, generator=torch.Generator().manual_seed(1)) / 5
    exact = batch.rollout.logprobs.clone()
    batch.rollout.logprobs += noise.double() * batch.rollout.mask
    learner = PolicyLearner(config.rl, config.policy, policy)
    before = learner.before(batch.rollout)
    torch.testing.assert_close(before.old, exact, atol=1e-10, rtol=0)
    mask = batch.rollout.mask
    torch.testing.assert_close(before.weights[mask], (-noise.double()).exp().clamp(max=2.0)[mask])
    assert not before.weights[~mask].any()


# Rounds


def test_dynamic_sampling_keeps_tasks_at_which_answers_differ(policy_file: Path, tmp_path: Path, monkeypatch):
    config = grpo_config(policy_file, tmp_path, dynamic_sampling=True)
    policy, tokenizer, template = load_policy(config.rl.model)
    writer = Writer(config.rl, policy, tokenizer, template, config.samples)
    write = Writer.write

    def mark(self: Writer, number: int, count: int, attempt: int = 0) -> Round:
        batch = write(self, number, count, attempt)
        batch.rewards = torch.zeros(16)
        batch.rewards[[1, 9, 10]] = 1.0  # groups 0 and 2 of four
        return batch

    monkeypatch.setattr(Writer, "write", mark)
    batch = collect(writer, config, 3)
    assert (batch.asked, len(batch.tasks)) == (8, 16)
    assert batch.rewards.view(4, 4).sum(dim=1).tolist() == [1, 2, 1, 2]
    assert [task.prompt for task in batch.tasks[:4]] == [batch.tasks[0].prompt] * 4
    first, second = (mark(writer, 3, 4, attempt) for attempt in (0, 1))
    kept = [first.tasks[0], first.tasks[8], second.tasks[0], second.tasks[8]]
    assert batch.tasks[::4] == kept
    assert batch.rollout.answers() == [
        part.rollout.answers()[i]
        for part in (first, second)
        for group in (0, 8)
        for i in range(group, group + 4)
    ]


def test_dynamic_sampling_gives_up(policy_file: Path, tmp_path: Path):
    config = grpo_config(policy_file, tmp_path, dynamic_sampling=True, rewards=["exact"])
    policy, tokenizer, template = load_policy(config.rl.model)
    batch = collect(Writer(config.rl, policy, tokenizer, template, 4), config, 0)
    assert (batch.asked, len(batch.tasks)) == (16, 16)
    assert not batch.rewards.any()


def test_families_take_turns_across_rounds(policy_file: Path, tmp_path: Path):
    config = grpo_config(policy_file, tmp_path, families=list(FAMILIES)[:3])
    writer = Writer(config.rl, *load_policy(config.rl.model), 1)
    asked = [task.family for number in range(3) for task in writer.tasks(number, 4)]
    assert sorted(asked) == sorted(list(FAMILIES)[:3] * 4)
    assert writer.tasks(0, 4) != writer.tasks(3, 4)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(
    algorithm: str, policy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make, script = (grpo_config, train_grpo) if algorithm == "grpo" else (ppo_config, train_ppo)
    whole = script.run(make(policy_file, tmp_path / "whole"))
    write, count = Writer.write, 0

    def stop(self: Writer, *rest: int) -> Round:
        nonlocal count
        count += 1
        if count == 3:
            signal.raise_signal(signal.SIGTERM)
        return write(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", stop)
        first = script.run(make(policy_file, tmp_path / "parts"))
    assert len(first) == 3
    with pytest.raises(ValueError, match="stopped after 3 rounds: --resume goes on"):
        script.run(make(policy_file, tmp_path / "parts"))
    with pytest.raises(ValueError, match=r"prompts \(8\) must be \d+ to resume"):
        script.run(make(policy_file, tmp_path / "parts", resume=True, prompts=8))
    second = script.run(make(policy_file, tmp_path / "parts", resume=True))
    for name in ("reward", "kl", "gradient"):
        assert [row[name] for row in first + second] == [row[name] for row in whole]
    weights = [load_model(tmp_path / name / "model.pt")[0].state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    tables = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_csv(tmp_path / name / "rounds.csv")]
        for name in ("whole", "parts")
    ]
    assert len(tables[0]) == 5
    tables[1][3]["test_right"] = ""  # looked at only because it was stopped there
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    "preset",
    [
        *("default", "dapo", "rloo", "gspo", "cispo"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("dr_grpo", "grpo", "kl")),
    ],
)
def test_every_descendant_of_grpo_raises_the_reward(preset: str, policy_file: Path, tmp_path: Path, capsys):
    given = GRPOConfig.from_cli([] if preset == "default" else ["--config", preset])
    changes = LEARNING | {"epochs": given.rl.epochs, "minibatches": given.rl.minibatches}
    config = grpo_config(policy_file, tmp_path, given.policy, **changes)
    config = replace(config, dynamic_sampling=given.dynamic_sampling, overlong_buffer=given.overlong_buffer)
    numbers = train_grpo.run(config)
    early, late = (sum(row["reward"] for row in part) / 5 for part in (numbers[:5], numbers[-5:]))
    assert late > 0.8 > 0.3 > early
    assert numbers[-1]["tokens"] < 4 < 12 < numbers[0]["tokens"]
    assert numbers[-1]["kl"] > 0.1 > abs(numbers[0]["kl"])
    printed = capsys.readouterr().out
    assert "family" in printed
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.pt", "step_00000025.pt", "rounds.csv", "rounds.png", "tokenizer.json",
    }  # fmt: skip


def test_ppo_raises_the_reward(policy_file: Path, tmp_path: Path):
    numbers = train_ppo.run(ppo_config(policy_file, tmp_path, **LEARNING | {"prompts": 32}))
    early, late = (sum(row["reward"] for row in part) / 5 for part in (numbers[:5], numbers[-5:]))
    assert late > 0.8 > 0.3 > early


def test_the_critic_learns_what_to_expect_while_the_policy_stands_still(policy_file: Path, tmp_path: Path):
    config = ppo_config(policy_file, tmp_path, lr=1e-12)
    policy, tokenizer, template = load_policy(config.rl.model)
    batch = Writer(config.rl, policy, tokenizer, template, 1).write(0, 16)
    batch.rewards = torch.tensor([float(task.family == "add") for task in batch.tasks])  # known beforehand
    ppo = PPO(config, policy)
    numbers = [ppo.learn(batch, share=1.0) for _ in range(20)]
    assert numbers[0]["explained"] <= 0
    assert numbers[-1]["explained"] > 0.9
    assert numbers[-1]["value_loss"] < numbers[0]["value_loss"] / 10
    values = ppo.values(batch.rollout)
    expected = [values[row, mask].mean().item() for row, mask in enumerate(batch.rollout.mask)]
    assert min(expected[::2]) > 0.5 > max(expected[1::2])  # the families take turns


def test_the_first_values_are_zero_and_the_first_advantages_are_the_rewards(
    policy_file: Path, tmp_path: Path
):
    config = ppo_config(policy_file, tmp_path)
    policy, tokenizer, template = load_policy(config.rl.model)
    batch = Writer(config.rl, policy, tokenizer, template, 1).write(0, 4)
    ppo = PPO(config, policy)
    assert not ppo.values(batch.rollout).any()
    assert ppo.critic.decoder.token_embedding.weight is not policy.token_embedding.weight


def test_16_bits_with_a_short_exponent_are_refused(policy_file: Path, tmp_path: Path):
    config = grpo_config(policy_file, tmp_path, precision="fp16")
    with pytest.raises(ValueError, match=r"precision \(fp16\) must be fp32 or bf16"):
        train_grpo.run(config)


def test_without_a_tuned_model_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from phase2_finetuning.project6_alignment import pairs

    monkeypatch.setattr(pairs, "SFT_MODEL", tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match=r"make it with: uv run python phase2_finetuning/project4"):
        train_grpo.run(GRPOConfig(RLConfig(model=str(tmp_path / "none.pt"))))


if __name__ == "__main__":
    run_validation(__file__)
