"""What preprocessing dropped and why: uv run python phase1_foundation/project3_pretrain/report.py"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from common.plots import new_figure, save_figure
from common.script import script
from phase1_foundation.project3_pretrain.config import ReportConfig
from phase1_foundation.project3_pretrain.dedup import chance_to_meet
from phase1_foundation.project3_pretrain.pipeline import EXAMPLES, write_json
from phase1_foundation.project3_pretrain.quality import RULES
from phase1_foundation.project3_pretrain.shards import Manifest, load_manifest

REPORT, FIGURE = "report.json", "report.png"
WHAT = {rule.__name__: rule.__doc__ or "" for rules in RULES.values() for rule in rules}
CITED = re.compile(r" \[\d\]")


def make_report(
    folder: Path,
    summaries: list[dict[str, Any]],
    copies: dict[str, Any],
    manifest: Manifest,
    seconds: dict[str, float],
) -> None:
    """Add up the chunks, write report.json and report.png, and print the table."""
    dropped: dict[str, dict[str, Any]] = {}
    lines: Counter[str] = Counter()
    for summary in summaries:
        lines.update(summary["lines"])
        for reason, entry in summary["dropped"].items():
            total = dropped.setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
            total["documents"] += entry["documents"]
            total["bytes"] += entry["bytes"]
            total["examples"] = (total["examples"] + entry["examples"])[:EXAMPLES]
    sums = {
        name: sum(summary[name] for summary in summaries) for name in ("documents", "bytes", "normalized")
    }
    worked = {"clean": sums["bytes"], "deduplicate": sum(summary["kept_bytes"] for summary in summaries)}
    worked["tokenize"] = worked["deduplicate"] - copies["exact_bytes"] - copies["near_bytes"]
    report = {
        **sums,
        "dropped": dict(sorted(dropped.items(), key=lambda item: -item[1]["documents"])),
        "lines": dict(lines.most_common()),
        "copies": copies,
        "seconds": seconds,  # empty if the run went on where another was killed
        "mb_per_second": {name: size / 1e6 / seconds[name] for name, size in worked.items() if seconds},
    }
    write_json(folder / REPORT, report)
    draw(folder, report, manifest)
    show(report, manifest)


def show(report: dict[str, Any], manifest: Manifest) -> None:
    """Print the table."""
    documents, size = report["documents"], report["bytes"]

    def row(name: str, count: int, of_bytes: int | None = None, note: str = "") -> None:
        share = f"{count / max(1, documents):8.2%}"
        in_mb = f"{of_bytes / 1e6:10.2f} MB" if of_bytes is not None else " " * 13
        print(f"{name:32}{count:12,} {share}{in_mb}  {note}".rstrip())

    print(f"{'':32}{'documents':>12}{'':9}{'text':>13}")
    row("read", documents, size)
    row("changed by normalization", report["normalized"])
    for reason, entry in report["dropped"].items():
        row(f"dropped: {reason}", entry["documents"], entry["bytes"])
    copies = report["copies"]
    for kind in ("exact", "near"):
        row(f"dropped: {kind} copies", copies[f"{kind}_documents"], copies[f"{kind}_bytes"])
    for split in sorted({shard.split for shard in manifest.shards}):
        of_split = manifest.of(split)
        tokens = manifest.total(split, "tokens")
        note = f"{tokens:,} tokens in {len(of_split)} shards"
        row(split, manifest.total(split, "documents"), manifest.total(split, "text_bytes"), note)
    for reason, count in report["lines"].items():
        print(f"lines dropped: {reason}: {count:,}")
    for reason, entry in report["dropped"].items():
        number, text = entry["examples"][0]["document"], entry["examples"][0]["text"][:40]
        print(f"{reason}: {CITED.sub('', WHAT[reason])} Unlike {number:,}: {text!r}")
    for example in copies["examples"][:1]:
        print(f"near copies, for example these two, similarity {example['similarity']:.2f}:")
        print(f"  kept    {example['kept'][:90]!r}\n  dropped {example['dropped'][:90]!r}")
    speeds = report["mb_per_second"]
    for stage, seconds in report["seconds"].items():
        speed = f"{speeds[stage]:8.1f} MB/s" if stage in speeds else ""
        print(f"{stage:12}{seconds:8.1f} s{speed}")


def draw(folder: Path, report: dict[str, Any], manifest: Manifest) -> None:
    """Draw what was dropped for which reason, and how alike the near copies were."""
    figure, (left, right) = new_figure(1, 2, width=11)
    counts = {reason: entry["documents"] for reason, entry in report["dropped"].items()}
    counts |= {f"{kind} copy": report["copies"][f"{kind}_documents"] for kind in ("exact", "near")}
    kept = report["documents"] - sum(counts.values())
    bars = left.barh(list(counts)[::-1], list(counts.values())[::-1])
    left.bar_label(bars, fmt="{:,.0f}", padding=3)
    left.margins(x=0.12)
    left.set(title=f"{kept:,} of {report['documents']:,} documents stay", xlabel="documents dropped")
    left.grid(visible=False, axis="y")

    plan = manifest.made_from
    similarities = report["copies"]["similarities"]
    right.bar([i / 50 for i in range(51)], similarities, width=0.02, alpha=0.5, label="near copies dropped")
    right.set(title="near copies and the chance to find them", xlabel="similarity", ylabel="documents")
    right.yaxis.get_major_locator().set_params(integer=True)
    right.grid(visible=False)
    curve = right.twinx()
    xs = [i / 200 for i in range(201)]
    bands, rows = plan["bands"], plan["permutations"] // plan["bands"]
    curve.plot(
        xs, [chance_to_meet(x, bands, rows) for x in xs], color="C1", label="chance to meet in a bucket"
    )
    curve.axvline(plan["near_duplicates"], color="C3", linestyle=":", label="threshold")
    curve.set(ylabel=f"chance with {bands} bands of {rows} rows")
    handles = [handle for axes in (right, curve) for handle in axes.get_legend_handles_labels()[0]]
    curve.legend(handles=handles, loc="upper left")
    save_figure(figure, folder / FIGURE)


def run(config: ReportConfig) -> dict[str, Any]:
    """Print the report of a folder of shards, draw it again, and return it."""
    folder = config.folder
    manifest = load_manifest(folder)
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    show(report, manifest)
    draw(folder, report, manifest)
    print(f"picture: {folder / FIGURE}")
    return report


@script
def main() -> None:
    run(ReportConfig.from_cli())


if __name__ == "__main__":
    main()
