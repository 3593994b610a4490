"""Teach by pairs of answers: uv run python phase2_finetuning/project6_alignment/train_preference.py

The model answers tasks several times, a program judges, and DPO (or --loss ipo, kto, orpo, simpo) learns from
pairs of a right and a wrong answer. Then it is compared with the model that it was, on tasks that neither has
seen. With --data FILE the pairs are people's.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoints import load_checkpoint, load_weights
from common.files import shown
from common.plots import new_figure, read_csv, save_figure
from common.script import script
from phase1_foundation.project1_minimal_gpt.train import autocast
from phase1_foundation.project3_pretrain.distributed import World, join_world
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project4_instruction_tuning.tasks import FAMILIES, make_tasks
from phase2_finetuning.project6_alignment.config import PREFERENCE_COMMAND, PreferenceConfig
from phase2_finetuning.project6_alignment.judging import Judge
from phase2_finetuning.project6_alignment.learner import Numbers
from phase2_finetuning.project6_alignment.pair_loader import PairLoader, make_loaders
from phase2_finetuning.project6_alignment.pair_training import Watch, train_on_pairs
from phase2_finetuning.project6_alignment.pairs import find_pairs, fingerprint, load_policy
from phase2_finetuning.project6_alignment.preference import (
    LOSSES,
    PairBatch,
    implicit_rewards,
    pair_odds,
    preference_loss,
)

LABELS = {  # columns of preference.csv, and what they are
    "margin": "reward margin, better over worse answer",
    "chosen": "reward of the better answer",
    "rejected": "reward of the worse answer",
    "ranked": "share of pairs ranked rightly",
    "right": "share of right answers, sampled",
    "right_best": "share of right answers, likeliest token",
    "win_rate": "win rate against the model before, sampled",
    "tokens": "tokens per answer",
}


class PolicyWatch(Watch):
    """What is measured as a policy learns: pairs that are held back, and answers to tasks."""

    columns, file = tuple(LABELS), "preference.csv"
    line = "margin {margin:.3f}  ranked {ranked:.1%}  right {right:.1%}  win rate {win_rate:.1%}"

    def __init__(self, config: PreferenceConfig, held: PairLoader, judges: list[Judge], world: World) -> None:
        """Take a judge of sampled answers and one of the likeliest."""
        super().__init__(config, held, world)
        self.config, self.judges = config.loss, judges

    @torch.no_grad()
    def odds_of(self, model: Decoder, batch: PairBatch) -> Tensor:
        """Return the log-probabilities (B, K) of answers, in the precision of training."""
        with autocast(self.device, self.dtype):
            return pair_odds(model, batch.to(self.device)).policy

    @torch.no_grad()
    def look(self, model: Decoder) -> Numbers:
        """Return the numbers of LABELS."""
        rewards = []
        for batch in self.held.in_order():
            with autocast(self.device, self.dtype):
                odds = pair_odds(model, batch.to(self.device))
            rewards.append(implicit_rewards(odds, self.config)[:, :2])
        chosen, rejected = torch.cat(rewards).T
        with torch.autocast(self.device.type, enabled=False):
            sampled, best = (judge.judge(model) for judge in self.judges)
        return {
            "margin": (chosen - rejected).mean().item(),
            "chosen": chosen.mean().item(),
            "rejected": rejected.mean().item(),
            "ranked": ((chosen > rejected).double() + (chosen == rejected) / 2).mean().item(),
            "right": sampled.right,
            "right_best": best.right,
            "win_rate": sampled.win_rate,
            "tokens": sampled.tokens,
        }


def run(config: PreferenceConfig, world: World | None = None) -> dict[str, Numbers]:
    """Train, judge, draw; return the numbers of both models, {"before": ..., "after": ...}."""
    world = world or World()
    pairs, train = config.pairs, config.train
    model, tokenizer, template = load_policy(pairs.model)
    model.to(world.device(train.device))
    made = find_pairs(model, tokenizer, template, pairs, train.seed, train.out / "pairs.json", world)
    loader, held = make_loaders(made, pairs, train.seed, world, strangers=config.loss.loss == "kto")
    tasks = make_tasks(pairs.families or list(FAMILIES), pairs.test_tasks, train.seed, "test")
    judges = [
        Judge(tokenizer, template, tasks, temperature, pairs.max_new_tokens, train.seed, samples)
        for temperature, samples in ((pairs.temperature, pairs.samples), (0.0, 1))
    ]
    watch = PolicyWatch(config, held, judges, world)
    for judge in judges:
        judge.compare_with(model)
    if LOSSES[config.loss.loss].uses_reference:
        for each in (loader, held):
            each.measure(partial(watch.odds_of, model))
    before, start = watch.look(model), fingerprint(model)
    loss = partial(preference_loss, config=config.loss)
    if not train_on_pairs(model, loader, loss, config, watch, before, tokenizer, start):
        return {"before": before}
    path = train.out / "model.pt"
    load_weights(model, load_checkpoint(path, PREFERENCE_COMMAND)["model_state_dict"], path)
    numbers = {"before": before, "after": watch.look(model.eval())}
    if world.rank == 0:
        report(numbers, config)
    return numbers


def report(numbers: dict[str, Numbers], config: PreferenceConfig) -> None:
    """Print a table of both models, draw the curves, and say what was written."""
    out = config.train.out
    print(f"\n{config.loss.loss.upper():<46}{'before':>8}{'after':>8}")
    for name, label in LABELS.items():
        form = ".1%" if name in ("ranked", "right", "right_best", "win_rate") else ".3f"
        print(f"{label:<46}" + "".join(f"{numbers[when][name]:>8{form}}" for when in ("before", "after")))
    draw(out, config.loss.loss)
    print(f"written to {shown(out)}: model.pt, preference.csv, preference.png, pairs.json")
    print("next: uv run python phase2_finetuning/project6_alignment/evaluate.py")


def draw(out: Path, name: str) -> None:
    """Draw preference.csv: rewards, ranking, right answers and length, over the steps."""
    rows = read_csv(out / "preference.csv")
    steps = [int(row["step"]) for row in rows]
    panels = {
        f"{name.upper()}: rewards of pairs held back": {
            "chosen": "better answer", "rejected": "worse answer", "margin": "margin",
        },
        "pairs held back: share ranked rightly": {"ranked": ""},
        "tasks never seen": {
            "win_rate": "win rate against the model before", "right_best": "right, likeliest token",
            "right": "right, sampled",
        },
        "tokens per answer": {"tokens": ""},
    }  # fmt: skip
    figure, grid = new_figure(2, 2, width=9.0, height=6.0)
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=True):
        for column, label in curves.items():
            axes.plot(steps, [float(row[column]) for row in rows], label=label)
        axes.set(title=title, xlabel="step")
        if len(curves) > 1:
            axes.legend(fontsize=8)
    save_figure(figure, out / "preference.png")


@script
def main() -> None:
    """Parse, print, train."""
    config = PreferenceConfig.from_cli()
    with join_world(config.train.device) as world:
        world.print(config.to_yaml(), end="")
        run(config, world)


if __name__ == "__main__":
    main()
