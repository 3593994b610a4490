"""Teach by groups of answers: uv run python phase2_finetuning/project6_alignment/train_grpo.py

The policy answers each task several times; what did better than its group becomes likelier. Presets hold what
became of GRPO: --config dapo, dr_grpo, rloo, gspo, cispo; or grpo, as first published.
"""

from dataclasses import replace

import torch

from common.device import pick_device, seed_everything
from common.script import script
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project6_alignment.advantages import group_advantages, has_signal, overlong_penalty
from phase2_finetuning.project6_alignment.config import GRPOConfig
from phase2_finetuning.project6_alignment.kl import kl_estimate
from phase2_finetuning.project6_alignment.learner import Numbers, PolicyLearner, means, minibatches
from phase2_finetuning.project6_alignment.pairs import fingerprint, load_policy
from phase2_finetuning.project6_alignment.rounds import Round, Rounds, Writer

COMMAND = "uv run python phase2_finetuning/project6_alignment/train_grpo.py"
ATTEMPTS = 4  # times that dynamic sampling asks, at most


class GRPO(PolicyLearner):
    """Learn from what did better than its group."""

    def __init__(self, config: GRPOConfig, policy: Decoder) -> None:
        super().__init__(config.rl, config.policy, policy)
        self.config = config

    def learn(self, batch: Round, share: float) -> Numbers:
        """Move the policy after a round; return how far from the reference it was, and how it moved."""
        config, loss, rollout = self.config, self.loss, batch.rollout
        lengths = rollout.mask.sum(dim=1)
        rewards = batch.rewards + overlong_penalty(lengths, self.rl.max_new_tokens, config.overlong_buffer)
        before = self.before(rollout)
        if loss.kl_weight and loss.kl_in == "reward":
            prices = kl_estimate(before.old, before.reference, loss.kl_estimator) * rollout.mask
            rewards = rewards - loss.kl_weight * prices.sum(dim=1)
        advantages = group_advantages(rewards, config.samples, loss.advantage)[:, None] * before.weights
        if config.drop_truncated:
            rollout = replace(rollout, mask=rollout.mask & rollout.stopped[:, None])
        updates = [
            self.learn_from(rollout, before, advantages, rows, share)
            for rows in minibatches(self.rl, len(rewards), self.device)
        ]
        return before.numbers | means(updates)


def collect(writer: Writer, config: GRPOConfig, number: int) -> Round:
    """Return a round; with dynamic sampling, only tasks to which some answers were better than others.

    DAPO (Yu et al. 2025, Sec. 3.2): a group of equal rewards has no advantage, so as a policy gets better its
    batches get smaller unnoticed. If after some attempts there are too few, they are what is learned from.
    """
    wanted, parts, groups = config.rl.prompts * config.samples, list[Round](), 0
    for attempt in range(ATTEMPTS):
        batch = writer.write(number, config.rl.prompts, attempt)
        if not config.dynamic_sampling:
            return batch
        useful = has_signal(batch.rewards, config.samples).repeat_interleave(config.samples)
        parts.append(batch.take(useful.nonzero()[:, 0]))
        groups += len(parts[-1].tasks)
        if groups >= wanted:
            break
    joined = Round.join(parts) if groups else batch
    joined.asked = (attempt + 1) * config.rl.prompts
    return joined.take(torch.arange(min(wanted, len(joined.tasks)), device=joined.rewards.device))


def run(config: GRPOConfig) -> list[Numbers]:
    """Train and return the numbers of every round; main() calls it, and so do the tests."""
    policy, tokenizer, template = load_policy(config.rl.model)
    policy.to(pick_device(config.rl.device))
    seed_everything(config.rl.seed)
    writer = Writer(config.rl, policy, tokenizer, template, config.samples)
    settings = config.to_dict() | {"start": fingerprint(policy)}
    learner = GRPO(config, policy)

    def write(number: int) -> Round:
        return collect(writer, config, number)

    return Rounds(config.rl, config.out, learner, writer, write, settings, COMMAND).train()


@script
def main() -> None:
    """Parse, print, train."""
    config = GRPOConfig.from_cli()
    config.print_config()
    run(config)
    print("next: uv run python phase2_finetuning/project6_alignment/evaluate.py")


if __name__ == "__main__":
    main()
