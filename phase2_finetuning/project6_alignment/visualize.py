"""Draw what reinforcement learning did: uv run python phase2_finetuning/project6_alignment/visualize.py

Each picture is drawn if the runs for it are there; what the losses do at their bounds needs none.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import make_folder, shown
from common.plots import new_figure, read_csv, save_figure
from common.script import script
from phase2_finetuning.project6_alignment.config import PolicyLossConfig, VisualizeConfig
from phase2_finetuning.project6_alignment.policy_losses import policy_loss

COMMAND = "uv run python phase2_finetuning/project6_alignment/train_grpo.py"
TABLE = "rounds.csv"  # of a run
Rows = Sequence[Mapping[str, str]]
PRICED = {"grpo": "no price", "grpo_kl": "a price on the distance"}  # folders of runs, and what they show
EXPLOITED = "exploit"
BOUNDS = {
    "PPO, GRPO": PolicyLossConfig(mean="token"),
    "DAPO: higher upper bound": PolicyLossConfig(mean="token", clip_high=0.28),
    "CISPO: bounded weight": PolicyLossConfig(mean="token", clip="cispo", clip_low=1.0, clip_high=0.28),
    "no bound": PolicyLossConfig(mean="token", clip="none"),
}


def run(config: VisualizeConfig) -> list[Path]:
    """Draw all pictures for which there are runs, and return their files."""
    out = make_folder(config.out)
    runs = {path.parent.name: read_csv(path) for path in sorted(config.folder.glob(f"*/{TABLE}"))}
    draw_bounds(out / "bounds.png")
    drawn = [out / "bounds.png"]
    if priced := {label: runs[name] for name, label in PRICED.items() if name in runs}:
        draw_rounds(out / "kl.png", priced)
        drawn.append(out / "kl.png")
    if EXPLOITED in runs:
        draw_exploit(out / "exploit.png", runs[EXPLOITED])
        drawn.append(out / "exploit.png")
    if plain := {name: rows for name, rows in runs.items() if name != EXPLOITED}:
        draw_algorithms(out / "algorithms.png", plain)
        drawn.append(out / "algorithms.png")
    for path in drawn:
        print(f"written to {shown(path)}")
    if not runs:
        print(f"there are no runs in {shown(config.folder)} yet; make one with: {COMMAND}")
    return drawn


def column(rows: Rows, name: str, against: str = "round") -> tuple[list[float], list[float]]:
    """Return (rounds, or other x values; values) of a column of a run's table, where it has any."""
    points = [(float(row[against]), float(row[name])) for row in rows if row.get(name)]
    return [x for x, _ in points], [y for _, y in points]


def draw_rounds(path: Path, runs: Mapping[str, Rows]) -> None:
    """Draw the tables of some runs: rewards and right answers, distance from the reference, length."""
    figure, axes = new_figure(columns=3, width=14, height=4)
    panels = {
        "reward; dots: tests answered rightly": ("reward", "test_right"),
        "distance from the reference (nats per answer)": ("kl",),
        "length (tokens per answer)": ("tokens",),
    }
    for panel, (title, names) in zip(axes, panels.items(), strict=True):
        for number, (label, rows) in enumerate(runs.items()):
            for name in names:
                is_test = name == "test_right"
                style: dict[str, Any] = (
                    {"marker": "o", "linewidth": 2} if is_test else {"alpha": 0.6, "label": label}
                )
                panel.plot(*column(rows, name), color=f"C{number}", **style)
        panel.set(title=title, xlabel="round")
        panel.legend(fontsize=8)
    save_figure(figure, path)


def draw_exploit(path: Path, rows: Rows) -> None:
    """Draw a run that exploits its reward: what it is paid for, what was meant, and how it is done."""
    figure, (left, right) = new_figure(columns=2, width=11, height=4)
    left.plot(*column(rows, "reward"), label="the reward: the answer stands somewhere")
    left.plot(*column(rows, "right"), label="what was meant: it is the answer")
    left.plot(*column(rows, "test_right"), "o", color="C1", label="the same, of tests, likeliest token")
    left.set(title="you get what you measure", xlabel="round", ylim=(-0.02, 1.02))
    left.legend(fontsize=8)
    right.plot(*column(rows, "tokens"), color="C3")
    right.set(title="how: length (tokens per answer)", xlabel="round", ylim=(0, None))
    save_figure(figure, path)


def draw_algorithms(path: Path, runs: Mapping[str, Rows]) -> None:
    """Draw right answers to the tests by round and by second, for runs of one reward."""
    figure, axes = new_figure(columns=2, width=11, height=4)
    for panel, against in zip(axes, ("round", "seconds"), strict=True):
        for name, rows in runs.items():
            panel.plot(*column(rows, "test_right", against), marker=".", label=name)
        panel.set(xlabel=against, ylabel="tests answered rightly", ylim=(0, 1.02))
    axes[0].legend(fontsize=8)
    save_figure(figure, path)


def slope(ratio: Tensor, advantage: float, config: PolicyLossConfig) -> Tensor:
    """Return by how much a token's log-odds are pushed up, when they are `ratio` times what they were."""
    logprobs = ratio.log().requires_grad_()
    mask, old = torch.ones_like(ratio, dtype=torch.bool), torch.zeros_like(ratio)
    gains = torch.full_like(ratio, advantage)
    odds, before, gain, kept = (each[:, None] for each in (logprobs, old, gains, mask))
    total, _ = policy_loss(odds, before, gain, kept, config, longest=1)
    return -torch.autograd.grad(total, logprobs)[0]


def draw_bounds(path: Path) -> None:
    """Draw the push that a good and a bad answer's token still gets, by how far its odds have moved."""
    figure, axes = new_figure(columns=2, width=11, height=4)
    ratio = torch.linspace(0.4, 1.8, 701) + 1e-3  # on a bound itself min() shares the slope out
    for panel, advantage in zip(axes, (1.0, -1.0), strict=True):
        for number, (name, config) in enumerate(BOUNDS.items()):
            panel.plot(ratio, slope(ratio, advantage, config), label=name, linewidth=5 - number)
        word = "better" if advantage > 0 else "worse"
        panel.set(title=f"an answer that was {word} than its group", xlabel="odds now / odds when written")
    axes[0].set_ylabel("push on the log-odds of a token")
    axes[1].legend(fontsize=8)
    save_figure(figure, path)


@script
def main() -> None:
    """Parse and draw."""
    run(VisualizeConfig.from_cli())


if __name__ == "__main__":
    main()
