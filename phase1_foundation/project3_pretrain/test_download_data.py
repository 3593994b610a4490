"""Checks of getting text. --interactive then shows the documents of a file that you name."""

import json
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from common import corpora
from common.corpora import HubTable, documents, write_documents
from common.downloads import DownloadError
from common.script import ask, run_validation
from phase1_foundation.project3_pretrain import download_data
from phase1_foundation.project3_pretrain.config import DownloadConfig
from phase1_foundation.project3_pretrain.download_data import limited, read_documents, run, stream


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data/, and no mirror."""
    for module in (corpora, download_data):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    monkeypatch.setattr(download_data, "SAVE_EVERY", 3)
    monkeypatch.delenv("LLM_COURSE_DATA", raising=False)
    return tmp_path / "data"


class FakeTable:
    """What the library `datasets` gives: rows that can be gone on with from a state, and may break off."""

    def __init__(self, rows: list[str], breaks_at: int | None = None) -> None:
        self.rows, self.breaks_at, self.place = rows, breaks_at, 0
        self.read: list[int] = []

    def __iter__(self) -> Iterator[dict[str, str]]:
        for place in range(self.place, len(self.rows)):
            if place == self.breaks_at:
                raise ConnectionError("the line is\ndead")
            self.place = place + 1
            self.read.append(place)
            yield {"text": self.rows[place]}

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeTable], FakeTable]:
    """Make the hub give a table."""

    def make(table: FakeTable) -> FakeTable:
        monkeypatch.setattr(HubTable, "load", lambda self, streaming: table)
        return table

    return make


TABLE = HubTable("some/dataset", "train", corpora._to_line, {})
STORIES = [f"Story {i}\nof {i % 7} lines." for i in range(20)]
NO_LIMIT = float("inf")


# Files of the reader's own


def test_lines_of_jsonl_and_rows_of_parquet_are_documents(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = ["one\ntwo", "", "drei ß \U0001f600"]
    rows = [{"content": text, "id": i} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet", row_group_size=2)
    assert list(read_documents(tmp_path / "a.jsonl", "content")) == texts
    assert list(read_documents(tmp_path / "b.parquet", "content")) == texts
    assert list(read_documents(tmp_path, "content")) == texts + texts  # a folder: its files, sorted


def test_running_text_is_cut_at_empty_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"Line {i} of the play.\n" + "\n" * (i % 5 == 4) for i in range(3000))
    (tmp_path / "play.txt").write_text(text)
    parts = list(read_documents(tmp_path / "play.txt"))
    assert "".join(parts) == text
    assert len(parts) > 5
    assert all(part.endswith("\n\n") for part in parts[:-1])


def test_text_without_empty_lines_or_even_lines_is_cut_all_the_same(tmp_path: Path) -> None:
    for name, text in (("lines.txt", "no empty line here\n" * 20_000), ("line.txt", "endless " * 50_000)):
        (tmp_path / name).write_text(text)
        parts = list(read_documents(tmp_path / name))
        assert "".join(parts) == text
        assert max(map(len, parts)) < 2 * (1 << 16)


def test_wikitext_is_cut_where_articles_begin(tmp_path: Path) -> None:
    articles = [" = One = \n \n = = Part = = \n Text . \n \n", " = Two = \n \n More = text = here . \n"]
    (tmp_path / "wikitext2-train.txt").write_text("".join(articles))
    assert list(read_documents(tmp_path / "wikitext2-train.txt")) == articles


def test_any_other_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("import this\n\n\n" * 10_000)
    write_documents(tmp_path / "some.docs.txt", ["a\nb", "c"])
    assert list(read_documents(tmp_path)) == ["import this\n\n\n" * 10_000, "a\nb", "c"]


@pytest.mark.parametrize("name", ["big.jsonl", "big.parquet", "big.txt", "big.docs.txt"])
def test_a_large_file_is_not_in_memory(tmp_path: Path, name: str) -> None:
    import pyarrow
    from pyarrow import parquet

    path, texts = tmp_path / name, (f"{'line of text' * 20}\n" * 100 for _ in range(400))  # 10 MB
    if name == "big.parquet":
        parquet.write_table(pyarrow.Table.from_pylist([{"text": t} for t in texts]), path, row_group_size=20)
    elif name == "big.docs.txt":
        write_documents(path, texts)
    else:
        with open(path, "w") as file:
            file.writelines(json.dumps({"text": t}) + "\n" if "json" in name else t for t in texts)
    tracemalloc.start()
    assert sum(map(len, read_documents(path))) == 400 * 24_100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": 1}\n',
            r"^column \(text\) must hold text; .*a\.jsonl:2 has: text$",
        ),
        ("a.jsonl", b'{"body": "x"}\n', r"^column \(text\) must hold text; .*a\.jsonl:1 has: body$"),
        ("a.jsonl", b"[1, 2]\n", r"^column \(text\) must hold text; .*a\.jsonl:1 has: list$"),
        ("a.jsonl", b'{"text": "x"\n', r"^.*a\.jsonl:1 must be JSON: "),
        ("a.jsonl", b'{"text": "\xff"}\n', r"^.*a\.jsonl:1 must be JSON: "),
        ("a.txt", b"fine\n\xff\n", r"^.*a\.txt must be UTF-8 text \(invalid start byte\)$"),
        ("a.parquet", b"PAR1 not really", r"^.*a\.parquet must be a whole Parquet file: "),
        ("a.parquet", b"", r"^.*a\.parquet must be a whole Parquet file: "),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(tmp_path / name))


def test_half_a_surrogate_pair_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b\ud83d\ude00"}')
    assert list(read_documents(tmp_path / "a.jsonl")) == ["ab\U0001f600"]


def test_a_parquet_file_without_the_column_is_an_error(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([{"body": "x"}]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"^column \(text\) must hold text; .*a\.parquet has: "):
        list(read_documents(tmp_path / "a.parquet"))


def test_files_of_yours_become_a_corpus_within_the_limits(data: Path, tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    assert list(documents(run(DownloadConfig(str(tmp_path / "my.jsonl"), limit_documents=5)))) == STORIES[:5]
    assert list(documents(run(DownloadConfig(str(tmp_path / "my.jsonl"))))) == STORIES[:5]  # already there
    whole = run(DownloadConfig(str(tmp_path / "my.jsonl"), overwrite=True))
    assert whole == data / "my.docs.txt"
    assert list(documents(whole)) == STORIES


def test_limits_count_documents_and_bytes() -> None:
    assert list(limited(STORIES, 3, NO_LIMIT)) == STORIES[:3]
    size = sum(len(story) for story in STORIES[:4])
    assert list(limited(STORIES, NO_LIMIT, size)) == STORIES[:4]
    assert list(limited(STORIES, NO_LIMIT, NO_LIMIT)) == STORIES
    forever = (story for _ in iter(int, 1) for story in STORIES)
    assert len(list(limited(islice(forever, 1000), 100, 1e9))) == 100


# The hub


@pytest.mark.parametrize(
    ("rows", "size", "expected"), [(7, NO_LIMIT, 7), (NO_LIMIT, 100, 5), (NO_LIMIT, NO_LIMIT, 20)]
)
def test_a_stream_ends_at_the_limit(
    data: Path, hub: Callable[[FakeTable], FakeTable], rows: float, size: float, expected: int
) -> None:
    table = hub(FakeTable(STORIES))
    stream(TABLE, data / "some.docs.txt", rows, size)
    assert list(documents(data / "some.docs.txt")) == STORIES[:expected]
    assert len(table.read) == expected  # not a row more than needed
    assert [file.name for file in data.iterdir()] == ["some.docs.txt"]


@pytest.mark.parametrize("breaks_at", [0, 1, 3, 4, 11, 19])
def test_a_stream_that_broke_off_goes_on_where_it_was_safe(
    data: Path, hub: Callable[[FakeTable], FakeTable], breaks_at: int
) -> None:
    path = data / "some.docs.txt"
    hub(FakeTable(STORIES, breaks_at))
    with pytest.raises(DownloadError, match=r"^ConnectionError: the line is dead$"):
        stream(TABLE, path, NO_LIMIT, NO_LIMIT)
    assert not path.exists()
    table = hub(FakeTable(STORIES))
    stream(TABLE, path, NO_LIMIT, NO_LIMIT)
    assert list(documents(path)) == STORIES
    assert table.read[0] == breaks_at - breaks_at % 3  # saved every three rows


def test_what_was_written_after_the_last_safe_place_is_cut_off(
    data: Path, hub: Callable[[FakeTable], FakeTable]
) -> None:
    path = data / "some.docs.txt"
    hub(FakeTable(STORIES, 9))
    with pytest.raises(DownloadError):
        stream(TABLE, path, NO_LIMIT, NO_LIMIT)
    with open(data / "some.docs.txt.part", "ab") as file:  # as if killed in the middle of a line
        file.write(b"half a sto")
    hub(FakeTable(STORIES))
    stream(TABLE, path, NO_LIMIT, NO_LIMIT)
    assert list(documents(path)) == STORIES


@pytest.mark.slow  # the import takes seconds
def test_the_real_library_goes_on_from_its_state_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))

    def load(self: HubTable, streaming: bool) -> Any:
        files, cache = str(tmp_path / "rows.jsonl"), str(tmp_path / "cache")
        return datasets.load_dataset(
            "json", data_files=files, split="train", streaming=streaming, cache_dir=cache
        )

    def fail_at_8(text: str) -> bytes:
        if text.startswith("Story 8"):
            raise ValueError("the line is dead")
        return corpora._to_line(text)

    monkeypatch.setattr(HubTable, "load", load)
    with pytest.raises(DownloadError, match="the line is dead"):
        stream(HubTable("some/dataset", "train", fail_at_8, {}), data / "some.docs.txt", NO_LIMIT, NO_LIMIT)
    assert json.loads((data / "some.docs.txt.part.json").read_text())["rows"] == 6
    stream(TABLE, data / "some.docs.txt", NO_LIMIT, NO_LIMIT)
    assert list(documents(data / "some.docs.txt")) == STORIES


def test_a_corpus_by_name_is_streamed_once(data: Path, hub: Callable[[FakeTable], FakeTable]) -> None:
    table = hub(FakeTable(STORIES))
    path = run(DownloadConfig("fineweb_edu", limit_documents=4))
    assert path == data / "fineweb_edu.docs.txt"
    assert list(documents(path)) == STORIES[:4]
    assert run(DownloadConfig("fineweb_edu", limit_documents=9)) == path
    assert len(table.read) == 4
    table.place = 0
    assert len(list(documents(run(DownloadConfig("fineweb_edu", limit_documents=9, overwrite=True))))) == 9


def test_a_mirror_is_asked_before_the_hub(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = tmp_path / "mirror"
    write_documents(mirror / "fineweb_edu.docs.txt", STORIES)
    monkeypatch.setenv("LLM_COURSE_DATA", str(mirror))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert list(documents(run(DownloadConfig("fineweb_edu")))) == STORIES
    with pytest.raises(DownloadError, match=r"^openwebtext: no answer from 127\.0\.0\.1:9.*--corpus stdlib$"):
        run(DownloadConfig("openwebtext"))


@pytest.mark.parametrize(
    "name", ["tinystories", "wikitext2", "wikitext103", "fineweb_edu", "openwebtext", "wikipedia"]
)
def test_each_large_corpus_is_known_to_the_hub(name: str) -> None:
    (table,) = [source.table for source in corpora.CORPORA[name].sources if source.table]
    assert "/" in table.dataset
    assert table.row("text").startswith(b"text")


def test_names_and_limits_that_make_no_sense_are_errors(data: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^corpus \(no/such\.jsonl\) must be a file or folder, or a corpus"
    ):
        run(DownloadConfig("no/such.jsonl"))
    with pytest.raises(ValueError, match=r"^corpus \(nonsense\) must be one of tinyshakespeare, "):
        run(DownloadConfig("nonsense"))
    with pytest.raises(ValueError, match=r"^limit_mb \(-1\.0\) must be at least 0$"):
        DownloadConfig(limit_mb=-1.0).validate_config()


def interact() -> None:
    for name in ask("file> "):
        for document in islice(read_documents(Path(name)), 5):
            print(f"{len(document):,} characters: {document[:100]!r}")


if __name__ == "__main__":
    run_validation(__file__, interact)
