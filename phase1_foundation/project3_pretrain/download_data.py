"""Get text to train on: uv run python phase1_foundation/project3_pretrain/download_data.py

Without flags that is the offline corpus. Large ones (--corpus fineweb_edu) are streamed from the Hugging Face
hub, as much as the limits say; interrupted, the next call goes on. Files of yours become a corpus, too.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common.corpora import (
    CORPORA,
    ONE_PER_LINE,
    SHA256,
    HubTable,
    documents,
    hub_errors,
    load_corpus,
    write_documents,
)
from common.downloads import DownloadError
from common.files import DATA, atomic_write, make_folder
from common.script import progress, script
from phase1_foundation.project3_pretrain.config import DownloadConfig
from phase1_foundation.project3_pretrain.shards import PREPROCESS

SAVE_EVERY = 1000  # rows of a stream
PIECE = 1 << 13  # characters from which running text is cut at the next empty line
LIMITED = "the limit is reached; --limit_documents and --limit_mb move it, --overwrite begins anew"
LONGEST = 1 << 16  # characters at which it is cut in any case
ARTICLE = re.compile(r" = [^=].* = \n")  # the title of a WikiText article


def read_documents(path: Path, column: str = "text") -> Iterator[str]:
    """Yield the documents of a file or folder, one at a time in memory; ValueError for what cannot be read.

    Lines of .docs.txt and .jsonl and rows of .parquet are documents. Other .txt files are cut: WikiText where
    an article begins, running text at empty lines. Any other file is one document.
    """
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                yield from read_documents(file, column)
    elif path.name.endswith(ONE_PER_LINE) or path.suffix not in (".txt", ".jsonl", ".parquet"):
        yield from documents(path)
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path, column)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path, column)
    else:
        yield from _cut(path, at_titles=path.name.startswith("wikitext"))


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:  # of JSON, or of UTF-8
                raise ValueError(f"{path}:{number} must be JSON: {error}") from None
            yield _text_of(row, column, f"{path}:{number}")


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(64, columns=[column], use_threads=False):
                for row in batch.to_pylist():
                    yield _text_of(row, column, str(path))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} must be a whole Parquet file: {error}") from error


def _text_of(row: Any, column: str, place: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        names = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"column ({column}) must hold text; {place} has: {names or 'no columns'}")
    return row[column].encode("utf-8", "ignore").decode()  # JSON can hold half a surrogate pair, UTF-8 cannot


def _cut(path: Path, at_titles: bool) -> Iterator[str]:
    """Yield pieces of running text, which together are all of it."""
    lines: list[str] = []
    size = 0
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in iter(lambda: file.readline(LONGEST), ""):
                if lines and at_titles and ARTICLE.fullmatch(line):
                    yield "".join(lines)
                    lines, size = [], 0
                lines.append(line)
                size += len(line)
                if not at_titles and (size >= LONGEST or (size >= PIECE and not line.strip())):
                    yield "".join(lines)
                    lines, size = [], 0
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text ({error.reason})") from error
    if lines:
        yield "".join(lines)


def stream(table: HubTable, path: Path, most_rows: float, most_bytes: float) -> None:
    """Write rows of a dataset to path until the limits are reached; if interrupted, the next call goes on.

    The file grows as path.part. Beside it path.part.json says up to where it is safe on the disk, and what
    the library needs to go on from there; whatever was written after that is cut off again.
    """
    part, marker = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")
    state: dict[str, Any] = {"rows": 0, "bytes": 0, "stream": None}
    if part.is_file() and marker.is_file():
        state = json.loads(marker.read_text())
        print(f"{path.name}: going on after {state['rows']:,} rows, {state['bytes']:,} bytes")
    records = table.load(streaming=True)
    if state["stream"]:
        records.load_state_dict(state["stream"])
    total = None if math.isinf(most_bytes) else int(most_bytes)
    unit: dict[str, Any] = {"unit": "B", "unit_scale": True, "initial": state["bytes"], "total": total}
    bar: Any = progress([], desc=path.name, **unit)
    with bar, open(make_folder(path.parent) / part.name, "ab") as file:
        file.truncate(state["bytes"])
        for content in _contents(table, records) if _goes_on(state, most_rows, most_bytes) else ():
            state["rows"], state["bytes"] = state["rows"] + 1, state["bytes"] + len(content)
            file.write(content)
            bar.update(len(content))
            if not (goes_on := _goes_on(state, most_rows, most_bytes)) or state["rows"] % SAVE_EVERY == 0:
                file.flush()
                os.fsync(file.fileno())  # the text must be on the disk before the marker says so
                with atomic_write(marker) as marked:
                    json.dump(state | {"stream": records.state_dict()}, marked)
            if not goes_on:
                print(LIMITED)
                break
    if not state["rows"]:
        raise DownloadError(f"{table.dataset} has no rows")
    part.replace(path)
    marker.unlink(missing_ok=True)


def _contents(table: HubTable, records: Iterable[dict[str, str]]) -> Iterator[bytes]:
    with hub_errors():
        yield from (table.row(record["text"]) for record in records)


def _goes_on(state: dict[str, Any], most_rows: float, most_bytes: float) -> bool:
    return state["rows"] < most_rows and state["bytes"] < most_bytes


def limited(texts: Iterable[str], most_rows: float, most_bytes: float) -> Iterator[str]:
    """Yield texts until the limits are reached."""
    rows = size = 0
    for text in texts:
        if rows >= most_rows or size >= most_bytes:
            print(LIMITED)
            return
        yield text
        rows, size = rows + 1, size + len(text.encode())


def run(config: DownloadConfig) -> Path:
    """Get a corpus and return its file; DownloadError, ValueError, FileNotFoundError if it cannot be had."""
    limits = config.limit_documents or math.inf, config.limit_mb * 1e6 or math.inf
    given = Path(config.corpus)
    if given.exists():
        return _take_in(given, config, limits)
    if given.suffix or "/" in config.corpus:
        raise FileNotFoundError(f"corpus ({config.corpus}) must be a file or folder, or a corpus by name")
    entry = CORPORA.get(config.corpus)
    tables = [source.table for source in entry.sources if source.table] if entry else []
    if not entry or not tables or entry.file in SHA256 or config.source not in ("auto", "hub"):
        return load_corpus(config.corpus, config.source)
    path = DATA / entry.file
    if not config.overwrite and (path.exists() or (config.source == "auto" and _in_mirror(config.corpus))):
        return load_corpus(config.corpus)
    try:
        stream(tables[0], path, *limits)
    except DownloadError as error:
        rest = "what came so far stays, so run this again; without a network there is --corpus stdlib"
        raise DownloadError(f"{config.corpus}: {error}; {rest}") from error
    return path


def _take_in(given: Path, config: DownloadConfig, limits: tuple[float, float]) -> Path:
    path = DATA / f"{given.name.split('.')[0]}{ONE_PER_LINE}"
    if path.exists() and not config.overwrite:
        print(f"{path} is already there; --overwrite makes it anew")
        return path
    texts = progress(read_documents(given, config.column), desc=path.name, unit=" documents")
    write_documents(path, limited(texts, *limits))
    return path


def _in_mirror(corpus: str) -> bool:
    try:
        return bool(os.environ.get("LLM_COURSE_DATA")) and load_corpus(corpus, "local").exists()
    except DownloadError:
        return False


@script
def main() -> None:
    config = DownloadConfig.from_cli()
    path = run(config)
    print(f"{path}: {path.stat().st_size:,} bytes; it begins:\n{next(read_documents(path))[:300]}")
    print(f"next: {PREPROCESS} --data {path.name.split('.')[0] if path.parent == DATA else path}")


if __name__ == "__main__":
    main()
