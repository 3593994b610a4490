"""Methods, ranks and learning rates side by side: uv run python phase2_finetuning/project5_lora/sweep.py

Every run takes the same steps on the same batches. A killed sweep goes on with what is not in sweep.csv.
"""

import contextlib
import csv
import hashlib
import io
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

from common.files import atomic_write, make_folder, shown
from common.plots import new_figure, read_csv, save_figure
from common.script import progress, script
from phase2_finetuning.project4_instruction_tuning.evaluate import Scores
from phase2_finetuning.project4_instruction_tuning.scoring import ALL
from phase2_finetuning.project5_lora import train
from phase2_finetuning.project5_lora.config import Config, Method, SweepConfig
from phase2_finetuning.project5_lora.tuning import VIRTUAL


@dataclass(frozen=True)
class Run:
    """A run, and what it has shown."""

    settings: str  # a short name for all that is the same in a sweep
    method: Method
    rank: int  # 0: the method has none
    lr: float
    trained: int = 0  # weights
    share: float = 0.0  # of the model's weights
    loss_before: float = 0.0  # nats per token of the right answers
    loss: float = 0.0
    right_before: float = 0.0  # share of the answers
    right: float = 0.0
    seconds: float = 0.0  # of training

    @property
    def name(self) -> str:
        """Method and rank."""
        return f"{self.method}, rank {self.rank}" if self.rank else self.method


def run(config: SweepConfig) -> list[Run]:
    """Make the runs that are missing; print, draw and return all of them."""
    out = make_folder(config.run.train.out)
    known = {key(each): each for each in read_runs(out / "sweep.csv")}
    planned = list(plan(config))
    missing = [each for each in planned if key(each) not in known]
    steps = config.run.train.max_steps
    print(f"sweep       {len(planned)} runs of {steps:,} steps, {len(missing)} of them to go")
    before: Scores | None = None  # the same for all
    with progress(missing, desc="sweep") as bar:
        for each in bar:
            with contextlib.redirect_stdout(io.StringIO()):  # of each run one line is enough
                result = train.run(settings_of(each, config.run), before=before)
            before = result.before
            known[key(each)] = done = finished(each, result)
            write_runs(out / "sweep.csv", known.values())
            bar.write(f"{done.name:18}  lr {done.lr:<7g} {done.loss:.3f} nats, {done.right:.1%} right")
    shutil.rmtree(out / "run", ignore_errors=True)  # checkpoints of the last run, which may be gigabytes
    runs = [known[key(each)] for each in planned]
    print_table(runs)
    draw(runs, out / "sweep.png")
    print(f"written to {shown(out)}: sweep.csv, sweep.png")
    return runs


def plan(config: SweepConfig) -> Iterator[Run]:
    """Yield the runs to make, without results."""
    same = config.run.to_dict()
    for name in ("method", "rank", "lr", "out", "resume", "overwrite", "device"):
        del same[name]
    settings = hashlib.sha256(repr(sorted(same.items())).encode()).hexdigest()[:12]
    for method in config.methods:
        for rank in [0] if method in ("full", *VIRTUAL) else config.ranks:
            for rate in config.full_rates if method == "full" else config.rates:
                yield Run(settings, method, rank, rate)


def key(run: Run) -> tuple[str, str, int, float]:
    """Return what makes a run another one."""
    return run.settings, run.method, run.rank, run.lr


def settings_of(run: Run, config: Config) -> Config:
    """Return the settings of one run; alpha stays, so what a rank counts is the method's to say."""
    return replace(
        config,
        tune=replace(config.tune, method=run.method, rank=run.rank or config.tune.rank),
        train=replace(config.train, lr=run.lr, out=config.train.out / "run", overwrite=True),
    )


def finished(run: Run, result: train.Result) -> Run:
    """Return a run with its results."""
    one, other = result.before[ALL], result.after[ALL]
    return replace(
        run,
        trained=result.trained,
        share=result.trained / result.weights,
        loss_before=one.loss,
        loss=other.loss,
        right_before=one.accuracy,
        right=other.accuracy,
        seconds=result.seconds,
    )


def best_runs(runs: Iterable[Run]) -> list[Run]:
    """Return of each method and rank the run with the rate that gave the lowest loss."""
    best: dict[str, Run] = {}
    for each in runs:
        if each.name not in best or each.loss < best[each.name].loss:
            best[each.name] = each
    return list(best.values())


def gain(run: Run, full: Run) -> float:
    """Return how much of what full fine-tuning takes off the loss a run takes off."""
    return (run.loss_before - run.loss) / (full.loss_before - full.loss)


def print_table(runs: list[Run]) -> None:
    """Print each method and rank at its best rate, beside full fine-tuning at its own."""
    best = best_runs(runs)
    full = next((each for each in best if each.method == "full"), None)
    print(f"\nbefore: {runs[0].loss_before:.3f} nats per answer token, {runs[0].right_before:.1%} right")
    print(
        f"{'at its best rate':18}  {'lr':>7}  {'trained':>10}  {'share':>7}  {'nats':>6}  {'right':>6}  gain"
    )
    for each in best:
        share = f"{gain(each, full):6.1%}" if full else ""
        print(f"{each.name:18}  {each.lr:7g}  {each.trained:11,}  {each.share:7.2%}  "
              f"{each.loss:5.3f}  {each.right:5.1%}  {share}")  # fmt: skip


def draw(runs: list[Run], path: Path) -> None:
    """Draw the loss at every learning rate, and at the best one against the weights that are trained."""
    figure, (left, right) = new_figure(1, 2, width=9.0)
    for name in dict.fromkeys(each.name for each in runs):
        mine = sorted((each.lr, each.loss) for each in runs if each.name == name)
        left.plot(*zip(*mine, strict=True), marker="o", label=name)
    left.set(xscale="log", xlabel="peak learning rate", ylabel="loss (nats per answer token)")
    best = best_runs(runs)
    for method in dict.fromkeys(each.method for each in best):
        points = sorted((each.share, each.loss) for each in best if each.method == method)
        right.plot(*zip(*points, strict=True), marker="o", label=method)
    right.set(xscale="log", xlabel="share of the weights that is trained", ylabel="loss at the best rate")
    for axes, shown_runs in ((left, runs), (right, best)):
        axes.set_ylim(0, 1.1 * max(each.loss for each in shown_runs))
        axes.legend(loc="lower left")
    figure.suptitle(f"The same steps; {runs[0].loss_before:.2f} nats before")
    save_figure(figure, path)


def read_runs(path: Path) -> list[Run]:
    """Return the rows of sweep.csv, if there is one; ValueError if it is another file."""
    if not path.is_file():
        return []
    kinds = {field.name: type(field.default) for field in fields(Run) if field.default is not MISSING}
    kinds |= {"settings": str, "method": str, "rank": int, "lr": float}
    try:
        return [Run(**{name: kinds[name](value) for name, value in row.items()}) for row in read_csv(path)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be a table that sweep.py wrote; delete it to begin anew") from error


def write_runs(path: Path, runs: Iterable[Run]) -> None:
    """Write sweep.csv, whole or not at all."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Run)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, runs))


@script
def main() -> None:
    """Parse, print, sweep."""
    config = SweepConfig.from_cli()
    config.print_config()
    run(config)


if __name__ == "__main__":
    main()
