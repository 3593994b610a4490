"""Train a reward model: uv run python phase2_finetuning/project6_alignment/train_reward.py

The tuned model answers tasks several times, a program judges, and the model, with a score in place of its
head, learns which of two answers is right. Then it picks the best of n answers to tasks it has never seen.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoints import load_checkpoint, load_weights, save_checkpoint
from common.device import seed_everything
from common.files import shown
from common.plots import new_figure, read_csv, save_figure
from common.script import progress, script
from phase1_foundation.project1_minimal_gpt.train import autocast
from phase1_foundation.project3_pretrain.distributed import World, join_world
from phase2_finetuning.project4_instruction_tuning.tasks import FAMILIES, make_tasks
from phase2_finetuning.project6_alignment.config import REWARD_COMMAND, RewardConfig
from phase2_finetuning.project6_alignment.learner import Numbers
from phase2_finetuning.project6_alignment.pair_loader import fill_rows, make_loaders
from phase2_finetuning.project6_alignment.pair_training import Watch, train_on_pairs
from phase2_finetuning.project6_alignment.pairs import (
    encode_tasks,
    find_pairs,
    fingerprint,
    load_policy,
    sample_answers,
)
from phase2_finetuning.project6_alignment.reward_model import RewardModel, pair_rewards, reward_loss

Picks = dict[int, tuple[float, float]]  # by number of answers: share right of the picked, and if any is right


class RewardWatch(Watch):
    """What is measured as a reward model learns: pairs that are held back."""

    columns, file = ("ranked", "margin", "level"), "reward.csv"
    line = "ranked {ranked:.1%}  margin {margin:.3f}  level {level:.3f}"

    @torch.no_grad()
    def rewards(self, model: RewardModel) -> Tensor:
        """Return the rewards of all pairs that are held back, (N, 2)."""
        with autocast(self.device, self.dtype):
            return torch.cat([pair_rewards(model, batch.to(self.device)) for batch in self.held.in_order()])

    def look(self, model: RewardModel) -> Numbers:
        """Return the share of pairs ranked rightly, and the mean difference and the mean of their rewards."""
        rewards = self.rewards(model)
        margin = rewards[:, 0] - rewards[:, 1]
        ranked = (margin > 0).double().mean().item()
        return {"ranked": ranked, "margin": margin.mean().item(), "level": rewards.mean().item()}


def run(config: RewardConfig, world: World | None = None) -> dict[str, Any]:
    """Train, judge, draw; return the numbers before and after, and how well the best of n is picked."""
    world = world or World()
    pairs, train = config.pairs, config.train
    policy, tokenizer, template = load_policy(pairs.model)
    device = world.device(train.device)
    policy.to(device)
    start = fingerprint(policy)
    made = find_pairs(policy, tokenizer, template, pairs, train.seed, train.out / "pairs.json", world)
    loader, held = make_loaders(made, pairs, train.seed, world)
    tasks = make_tasks(pairs.families or list(FAMILIES), pairs.test_tasks, train.seed, "test")
    how = (config.best_of, pairs.temperature, pairs.max_new_tokens, train.seed)
    answers = sample_answers(policy, tokenizer, template, tasks, *how)  # before the policy becomes the judge
    seed_everything(train.seed)
    model = RewardModel(policy).to(device)
    watch = RewardWatch(config, held, world)
    before = watch.look(model)
    loss = partial(reward_loss, center=config.center)
    if not train_on_pairs(model, loader, loss, config, watch, before, tokenizer, start) or world.rank:
        return {"before": before}
    center_best(model.eval(), watch, train.out / "model.pt")
    written = [[answer.ids for answer in group] for group in answers]
    scores = score_answers(model, encode_tasks(tokenizer, template, tasks), written)
    right = torch.tensor([[answer.right for answer in group] for group in answers])
    numbers = {"before": before, "after": watch.look(model), "best_of": pick_best(scores, right)}
    report(numbers, scores, right, config)
    return numbers


def center_best(model: RewardModel, watch: RewardWatch, path: Path) -> None:
    """Load the best weights, bring the mean reward of the pairs held back to 0, and store them so."""
    entries = load_checkpoint(path, REWARD_COMMAND)
    load_weights(model, entries["model_state_dict"], path)
    model.shift(-watch.rewards(model).mean().item())
    save_checkpoint(path, **entries | {"model_state_dict": model.state_dict()})


@torch.no_grad()
def score_answers(model: RewardModel, prompts: list[list[int]], answers: list[list[list[int]]]) -> Tensor:
    """Return the rewards of equally many answers to each prompt, (prompts, answers)."""
    device = model.score.weight.device
    rewards = []
    for prompt, group in progress(list(zip(prompts, answers, strict=True)), desc="scoring", leave=False):
        tokens, mask = fill_rows([(prompt, ids) for ids in group])
        rewards.append(model(tokens.to(device), mask.to(device)).cpu())
    return torch.stack(rewards)


def pick_best(scores: Tensor, right: Tensor) -> Picks:
    """Return how often the answer of the highest score among n is right, and how often any of the n is.

    For n = 1, 2, 4, ...; the answers (prompts, answers) are cut into as many groups of n as there are.
    """
    picks: Picks = {}
    n = 1
    while n <= scores.shape[1]:
        groups = scores.shape[1] // n
        told, truth = (x[:, : groups * n].reshape(-1, n) for x in (scores, right))
        picked = truth.gather(1, told.argmax(dim=1, keepdim=True))
        picks[n] = picked.double().mean().item(), truth.any(dim=1).double().mean().item()
        n *= 2
    return picks


def report(numbers: dict[str, Any], scores: Tensor, right: Tensor, config: RewardConfig) -> None:
    """Print tables, draw, and say what was written."""
    out = config.train.out
    print(f"\n{'pairs held back':<34}{'before':>8}{'after':>8}")
    for name, label, form in (("ranked", "ranked rightly", ".1%"), ("margin", "better minus worse", ".3f")):
        print(f"{label:<34}" + "".join(f"{numbers[when][name]:>8{form}}" for when in ("before", "after")))
    print(f"\n{'tasks never seen: of n answers':<34}{'picked':>8}{'any':>8}")
    for n, (picked, any_right) in numbers["best_of"].items():
        print(f"{f'right, n = {n}':<34}{picked:>8.1%}{any_right:>8.1%}")
    draw(out, numbers["best_of"], scores, right)
    print(f"written to {shown(out)}: model.pt, reward.csv, reward.png, pairs.json")
    print(
        "next: uv run python phase2_finetuning/project6_alignment/train_ppo.py "
        f"--rewards {shown(out / 'model.pt')}"
    )


def draw(out: Path, picks: Picks, scores: Tensor, right: Tensor) -> None:
    """Draw the share of pairs ranked rightly, the scores of right and wrong answers, and best of n."""
    rows = read_csv(out / "reward.csv")
    figure, (left, middle, last) = new_figure(1, 3, width=11.0, height=3.6)
    left.plot([int(row["step"]) for row in rows], [float(row["ranked"]) for row in rows])
    left.set(title="pairs held back, ranked rightly", xlabel="step", ylim=(0, 1))
    for name, chosen in (("right answers", right), ("wrong answers", ~right)):
        middle.hist(scores[chosen].tolist(), bins=30, alpha=0.6, label=name)
    middle.set(title="scores on tasks never seen", xlabel="reward")
    for place, name in enumerate(("picked by the reward model", "any of them")):
        last.plot(list(picks), [shares[place] for shares in picks.values()], marker="o", label=name)
    last.axhline(picks[1][0], linestyle="--", color="gray", label="one answer")
    last.set(title="best of n: share right", xlabel="n", xscale="log", ylim=(0, 1))
    last.set_xticks(list(picks), [str(n) for n in picks])
    last.minorticks_off()
    for axes in (middle, last):
        axes.legend(fontsize=7)
    save_figure(figure, out / "reward.png")


@script
def main() -> None:
    """Parse, print, train."""
    config = RewardConfig.from_cli()
    with join_world(config.train.device) as world:
        world.print(config.to_yaml(), end="")
        run(config, world)


if __name__ == "__main__":
    main()
