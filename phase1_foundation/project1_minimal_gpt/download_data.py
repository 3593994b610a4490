"""Get the text to train on: uv run python phase1_foundation/project1_minimal_gpt/download_data.py"""

from pathlib import Path

from common.corpora import documents, load_corpus
from common.files import shown
from common.script import script
from phase1_foundation.project1_minimal_gpt.config import TRAIN_COMMAND, DownloadConfig


def run(config: DownloadConfig) -> Path:
    """Fetch the corpus and return its file."""
    path = load_corpus(config.corpus, config.source)
    text = "\n".join(documents(path))
    print(f"{shown(path)}: {len(text):,} characters, {len(set(text))} different; it begins:\n{text[:200]}")
    print(f"next: {TRAIN_COMMAND}")
    return path


@script
def main() -> None:
    """Parse and fetch."""
    run(DownloadConfig.from_cli())


if __name__ == "__main__":
    main()
