"""Teach by rewards, token by token: uv run python phase2_finetuning/project6_alignment/train_ppo.py

Beside the policy a second model learns what reward to expect at each token; its surprises are learned from.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from common.device import pick_device, seed_everything
from common.script import script
from phase1_foundation.project1_minimal_gpt.optimizer import make_optimizers
from phase1_foundation.project1_minimal_gpt.train import autocast
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project6_alignment.advantages import gae, token_rewards, whiten
from phase2_finetuning.project6_alignment.config import PPOConfig
from phase2_finetuning.project6_alignment.kl import kl_estimate
from phase2_finetuning.project6_alignment.learner import (
    ROWS,
    Numbers,
    PolicyLearner,
    means,
    minibatches,
    update,
)
from phase2_finetuning.project6_alignment.pairs import fingerprint, load_policy
from phase2_finetuning.project6_alignment.policy_losses import Sums, value_loss
from phase2_finetuning.project6_alignment.reward_model import RewardModel
from phase2_finetuning.project6_alignment.rollouts import Rollout
from phase2_finetuning.project6_alignment.rounds import Round, Rounds, Writer

COMMAND = "uv run python phase2_finetuning/project6_alignment/train_ppo.py"


class PPO(PolicyLearner):
    """Learn from what a value model did not expect.

    The value model is a copy of the policy with one number in place of the head, which is 0 at first: so the
    first round is REINFORCE, and nothing depends on how a head was drawn.
    """

    columns = (*PolicyLearner.columns, "value_loss", "explained")

    def __init__(self, config: PPOConfig, policy: Decoder) -> None:
        super().__init__(config.rl, config.policy, policy)
        self.config = config
        self.critic = RewardModel(copy.deepcopy(policy)).to(self.device)
        nn.init.zeros_(self.critic.score.weight)
        self.modules["critic"] = self.critic
        self.critic_optimizers = make_optimizers(self.critic, config.rl)
        for optimizer in self.critic_optimizers:
            for group in optimizer.param_groups:
                group["peak_lr"] *= config.value_lr / config.rl.lr
        self.optimizers += self.critic_optimizers

    def learn(self, batch: Round, share: float) -> Numbers:
        """Move policy and value model after a round; return what is worth a column."""
        config, loss, rollout = self.config, self.loss, batch.rollout
        mask, before, values = rollout.mask, self.before(rollout), self.values(rollout)
        prices = torch.zeros_like(values)
        if loss.kl_weight and loss.kl_in == "reward":
            prices = loss.kl_weight * kl_estimate(before.old, before.reference, loss.kl_estimator)
        rewards = token_rewards(batch.rewards, prices, mask)
        credit, returns = gae(rewards, values, mask, config.gamma, config.lam)
        advantages = whiten(credit, mask) * before.weights
        updates = []
        for rows in minibatches(self.rl, len(mask), self.device):
            numbers = self.learn_from(rollout, before, advantages, rows, share)
            losses = list[float]()
            parts = self._value_losses(rollout, values, returns, rows, losses)
            update(list(self.critic.parameters()), self.critic_optimizers, parts, self.rl.grad_clip, share)
            updates.append(numbers | {"value_loss": sum(losses) / int(mask[rows].sum())})
        unexplained = (returns - values)[mask].var() / returns[mask].var().clamp(min=1e-8)
        return before.numbers | {"explained": 1 - unexplained.item()} | means(updates)

    @torch.no_grad()
    def values(self, rollout: Rollout) -> Tensor:
        """Return the reward that is expected before each token is written, (B, T); 0 outside of the mask."""
        found = torch.zeros_like(rollout.logprobs)
        for rows in torch.arange(len(found), device=self.device).split(ROWS):
            part = rollout.take(rows)
            with autocast(self.device, self.dtype):
                values = self.critic.values(part.tokens) * part.mask
            found[rows, : values.shape[1]] = values.to(found.dtype)
        return found

    def _value_losses(
        self, rollout: Rollout, old: Tensor, returns: Tensor, rows: Tensor, seen: list[float]
    ) -> Iterator[Sums]:
        for part in rows.split(self.rl.micro_batch_size or len(rows)):
            piece = rollout.take(part)
            before, wanted = (each[part, : piece.mask.shape[1]] for each in (old, returns))
            with autocast(self.device, self.dtype):
                values = self.critic.values(piece.tokens)
            total, count = value_loss(values, before, wanted, piece.mask, self.config.value_clip)
            seen.append(total.item())
            yield self.config.value_weight * total, count


def run(config: PPOConfig) -> list[Numbers]:
    """Train and return the numbers of every round; main() calls it, and so do the tests."""
    policy, tokenizer, template = load_policy(config.rl.model)
    policy.to(pick_device(config.rl.device))
    seed_everything(config.rl.seed)
    writer = Writer(config.rl, policy, tokenizer, template, samples=1)
    settings = config.to_dict() | {"start": fingerprint(policy)}
    learner = PPO(config, policy)

    def write(number: int) -> Round:
        return writer.write(number, config.rl.prompts)

    return Rounds(config.rl, config.out, learner, writer, write, settings, COMMAND).train()


@script
def main() -> None:
    """Parse, print, train."""
    config = PPOConfig.from_cli()
    config.print_config()
    run(config)
    print("next: uv run python phase2_finetuning/project6_alignment/evaluate.py")


if __name__ == "__main__":
    main()
