"""Get text to learn from: uv run python phase1_foundation/project2_tokenizer/download_data.py --size small"""

from pathlib import Path

from common.corpora import load_corpus
from common.downloads import DownloadError
from common.script import script
from phase1_foundation.project2_tokenizer.config import DownloadConfig
from phase1_foundation.project2_tokenizer.token_file import TRAIN_COMMAND

SMALL = ["tinyshakespeare"]
MEDIUM = [*SMALL, "shakespeare", "kjv", "sotu"]
CORPORA = {"small": SMALL, "medium": MEDIUM, "large": [*MEDIUM, "tinystories", "stdlib"]}


def run(config: DownloadConfig) -> list[Path]:
    """Get the corpora of a size that can be had, and return their files; DownloadError if there is none."""
    paths, reasons = [], []
    for name in CORPORA[config.size]:
        try:
            paths.append(load_corpus(name, config.source))
        except (DownloadError, ValueError) as error:  # ValueError: that source does not have this corpus
            reasons.append(str(error))
    if not paths:
        raise DownloadError("; ".join(reasons))
    for reason in reasons:
        print(f"left out: {reason}")
    return list(dict.fromkeys(paths))  # one corpus may stand in for several


@script
def main() -> None:
    paths = run(DownloadConfig.from_cli())
    names = " ".join(path.name.split(".")[0] for path in paths)
    print(f"{sum(path.stat().st_size for path in paths):,} bytes of text")
    print(f"next: {TRAIN_COMMAND} --data {names}")


if __name__ == "__main__":
    main()
