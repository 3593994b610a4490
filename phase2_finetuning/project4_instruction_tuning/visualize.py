"""Draw what is learned from: uv run python phase2_finetuning/project4_instruction_tuning/visualize.py

Rows and masks as training sees them, the losses of runs side by side, and scores before and after.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common.files import make_folder, shown
from common.plots import new_figure, read_csv, save_figure
from common.script import script
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.config import VisualizeConfig as LossesConfig
from phase1_foundation.project3_pretrain.layers import DocumentAttention
from phase1_foundation.project3_pretrain.loss import NO_LOSS
from phase1_foundation.project3_pretrain.visualize import draw_losses
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project4_instruction_tuning.config import TRAIN_COMMAND, VisualizeConfig
from phase2_finetuning.project4_instruction_tuning.sft import ConversationBatches, make_examples
from phase2_finetuning.project4_instruction_tuning.templates import template_for
from phase2_finetuning.project4_instruction_tuning.train import FILES, load_data

ENOUGH = 2000  # conversations to make rows of
SPELLED = 30  # tokens that are written out


def run(config: VisualizeConfig) -> list[Path]:
    """Draw the pictures that are asked for and return their paths."""
    out, paths = make_folder(config.out), []
    draw: dict[str, Callable[[VisualizeConfig, Path], str]] = {
        "rows": draw_rows,
        "losses": lambda config, path: draw_losses(LossesConfig(runs=config.runs), path),
        "scores": draw_scores,
    }
    for name in config.pictures:
        paths.append(out / f"{name}.png")
        print(f"{shown(paths[-1])}: {draw[name](config, paths[-1])}")
    return paths


def draw_rows(config: VisualizeConfig, path: Path) -> str:
    """Draw the rows of a batch, and who sees whom in the first; print that row."""
    _, tokenizer = load_model(config.model)
    how = config.data
    data = load_data(replace(how, train_tasks=min(how.train_tasks, ENOUGH)), seed=0)
    encoding = (template_for(tokenizer), tokenizer, how.block_size, how.learn == "everything")
    examples, count = make_examples(data.train[:ENOUGH], *encoding)
    batch = ConversationBatches(examples, how.block_size, how.batch_size, packing=how.packing).batch(0)
    documents = np.asarray(batch.documents)  # (B, T)
    learned = batch.targets.numpy() != NO_LOSS
    kinds = np.where(documents == 0, 0, np.where(learned, 2, 1))
    figure, (left, right) = new_figure(columns=2, width=12, height=4.6)
    for panel in (left, right):
        panel.grid(False)
    colors = np.array([[255, 255, 255], [198, 219, 239], [217, 72, 1]], np.uint8)
    left.imshow(colors[kinds], aspect="auto", interpolation="nearest")
    for row, column in zip(*np.nonzero(np.diff(documents, axis=1)), strict=True):
        left.plot([column + 0.5] * 2, [row - 0.5, row + 0.5], color="black", linewidth=0.7)
    share = f"{count.learned / count.tokens:.0%}"
    left.set(
        title=f"a batch; orange: the next token is learned ({share} of all)", xlabel="token", ylabel="row"
    )
    left.set(yticks=range(0, len(kinds), max(1, len(kinds) // 8)))
    allowed = DocumentAttention(torch.from_numpy(documents[:1])).allowed[0, 0]
    right.imshow(allowed.numpy(), cmap="Greys", interpolation="nearest")
    right.set(title="row 0: which token (down) sees which (across)", xlabel="token", ylabel="token")
    save_figure(figure, path)
    print(spell(tokenizer, batch.tokens[0].tolist(), batch.targets[0].tolist()))
    return f"{len(kinds)} rows of {kinds.shape[1]} tokens, and who sees whom in the first"


def spell(tokenizer: Tokenizer, tokens: list[int], targets: list[int]) -> str:
    """Return a table of the first tokens of a row: what is read, and what is learned next."""
    lines = ["what is read             what is learned"]
    for token, target in list(zip(tokens, targets, strict=True))[:SPELLED]:
        learned = "" if target == NO_LOSS else repr(tokenizer.decode([target]))
        lines.append(f"{tokenizer.decode([token])!r:24} {learned}".rstrip())
    return "\n".join(lines)


def draw_scores(config: VisualizeConfig, path: Path) -> str:
    """Draw the share of right answers by family: before, and after each run."""
    tables = {}
    for folder in config.runs:
        if not (folder / "scores.csv").is_file():
            raise FileNotFoundError(
                f"no {folder / 'scores.csv'}; make it with: {TRAIN_COMMAND} --out {folder}"
            )
        rows = read_csv(folder / "scores.csv")
        tables[folder.name] = {row["family"]: row for row in rows if row["family"] != FILES}
    families = list(next(iter(tables.values())))
    if not families:
        raise ValueError(f"runs ({config.runs[0]}) must have learned tasks to have scores of families")
    bars = {"before": (next(iter(tables.values())), "right_before")}
    bars |= {f"after: {name}": (table, "right_after") for name, table in tables.items()}
    figure, axes = new_figure(width=9, height=4.2)
    width = 0.8 / len(bars)
    for number, (name, (table, column)) in enumerate(bars.items()):
        shares = [
            int(table[family][column]) / int(table[family]["answers"]) if family in table else 0.0
            for family in families
        ]
        places = np.arange(len(families)) + (number - (len(bars) - 1) / 2) * width
        axes.bar(places, shares, width, label=name, color="0.6" if number == 0 else f"C{number - 1}")
    axes.set_xticks(range(len(families)), families, rotation=40, ha="right")
    axes.set(
        title="answers that are right, to tasks that were not learned from", ylabel="share", ylim=(0, 1.02)
    )
    axes.legend(fontsize=8)
    save_figure(figure, path)
    return f"right answers by family, before and after {len(tables)} runs"


@script
def main() -> None:
    """Parse and draw."""
    torch.set_grad_enabled(False)
    run(VisualizeConfig.from_cli())


if __name__ == "__main__":
    main()
