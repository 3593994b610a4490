"""Loss curves as CSV and PNG, and one look for every figure of the course."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "font.size": 10,
    "axes.titlesize": 11,
}


class LossLog:
    """losses.csv, a row at a time, safe on disk after each.

    Resuming drops the rows after the step it resumes from.
    """

    def __init__(self, path: Path, columns: Sequence[str], resume_step: int | None = None) -> None:
        """Start a new file, or keep the rows up to `resume_step` of the one that is there.

        The first column is the step.
        """
        self.path, self.columns = path, list(columns)
        kept: list[dict[str, str]] = []
        last = -1
        for row in read_csv(path) if resume_step is not None and path.is_file() else []:
            step = row.get(self.columns[0]) or ""
            if step.isdigit() and last < int(step) <= (
                resume_step or 0
            ):  # steps rise: a row cut short does not
                kept.append(row)
                last = int(step)
        with atomic_write(path) as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)

    def add(self, **values: float | None) -> None:
        """Append one row; what is not given stays empty."""
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(
                {
                    name: f"{value:.6g}" if isinstance(value, float) else value
                    for name, value in values.items()
                }
            )


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as dicts by column."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def new_figure(
    rows: int = 1, columns: int = 1, width: float = 7.0, height: float = 4.2
) -> tuple["Figure", Any]:
    """Return (figure, axes) in the house look, drawn without a screen; sizes in inches."""
    import matplotlib  # here: it takes half a second, and --help should not wait for it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        return plt.subplots(rows, columns, figsize=(width, height))


def save_figure(figure: "Figure", path: Path | str) -> None:
    """Write the figure as PNG, whole or not at all, and free it."""
    import matplotlib.pyplot as plt

    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png")
    plt.close(figure)


Curve = tuple[Sequence[float], Sequence[float]]  # x values, y values


def plot_losses(
    path: Path | str,
    curves: Mapping[str, Curve],
    title: str,
    x: str = "step",
    y: str = "loss (nats per token)",
) -> None:
    """Draw named curves of (x values, losses); the first is drawn thin, as the noisy one."""
    figure, axes = new_figure()
    for number, (name, (steps, losses)) in enumerate(curves.items()):
        last = f"{name}: {losses[-1]:.3f} at the end" if losses else name
        axes.plot(
            steps, losses, label=last, linewidth=1 if number == 0 else 2, alpha=0.6 if number == 0 else 1
        )
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.legend()
    save_figure(figure, path)
