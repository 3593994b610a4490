r"""Checks of what all tokenizers share, and of the scripts. --interactive shows your text cut into tokens."""

import inspect
import io
import json
import os
import string
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.script import ask, run_validation
from phase1_foundation.project1_minimal_gpt.tokenizer import ByteTokenizer, CharTokenizer
from phase1_foundation.project2_tokenizer import config, download_data, encode, train_tokenizer
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.interop import open_tokenizer
from phase1_foundation.project2_tokenizer.patterns import PATTERNS
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project2_tokenizer.unigram import UnigramTokenizer
from phase1_foundation.project2_tokenizer.wordpiece import WordPieceTokenizer

FOLDER = Path(__file__).parent
TEXT = "the cat sat on the mat, and the cats sat on the mats. 日本語 😀 naïve\n\n" * 5
LETTERS = {i: letter.encode() for i, letter in enumerate(string.ascii_lowercase + ",.日本語😀ï")}
FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "char": lambda: CharTokenizer.train(TEXT),
    "byte": lambda: ByteTokenizer.train(TEXT),
    "bpe": lambda: BPETokenizer.train(TEXT, 290, special_tokens=["<|end|>"]),
    "unigram": lambda: UnigramTokenizer.train(TEXT, 280, special_tokens=["<|end|>"]),
    "wordpiece": lambda: WordPieceTokenizer(
        LETTERS | {100 + i: b"##" + letter for i, letter in LETTERS.items()}, {"[UNK]": 999}
    ),
}
LOSSLESS = [name for name in FAMILIES if name != "wordpiece"]  # it forgets the spaces


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_the_interface(family: str, tmp_path: Path):
    tokenizer = FAMILIES[family]()
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode(TEXT)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert all(0 <= i < tokenizer.vocab_size for i in tokenizer.special_tokens.values())
    assert tokenizer.encode_batch([TEXT, "", "cat"]) == [ids, [], tokenizer.encode("cat")]
    assert tokenizer.decode_bytes(ids).decode() == tokenizer.decode(ids)
    tokenizer.save(tmp_path / "tokenizer.json")
    back = type(tokenizer).load(tmp_path / "tokenizer.json")
    assert back.encode(TEXT) == ids
    assert back.vocab_size == tokenizer.vocab_size
    assert json.loads((tmp_path / "tokenizer.json").read_bytes())  # JSON, never a pickle


@pytest.mark.parametrize("family", LOSSLESS)
def test_a_text_comes_back_as_it_was(family: str):
    tokenizer = FAMILIES[family]()
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_from_whatever_learned_on_bytes(text: str):
    for family in ("byte", "bpe", "unigram"):
        tokenizer = trained(family)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=st.binary())
def test_any_bytes_come_back(text: bytes):
    for family in ("bpe", "unigram"):
        tokenizer = trained(family)
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text


_TRAINED: dict[str, Tokenizer] = {}


def trained(family: str) -> Tokenizer:
    return _TRAINED.get(family) or _TRAINED.setdefault(family, FAMILIES[family]())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_id_and_half_a_character_are_refused_in_one_line(family: str):
    tokenizer = FAMILIES[family]()
    for id in (tokenizer.vocab_size, -1):
        with pytest.raises(ValueError, match=str(id)):
            tokenizer.decode([id])
    with pytest.raises(ValueError, match=r"ud83d|U\+D83D"):
        tokenizer.encode("a\ud83d")


@pytest.mark.parametrize("family", LOSSLESS)
def test_where_the_iterator_cuts_the_text_does_not_matter(family: str):
    cls = type(FAMILIES[family]())
    settings = {"vocab_size": 290} if family in ("bpe", "unigram") else {}
    whole = cls.train_from_iterator([TEXT], **settings)
    pieces = cls.train_from_iterator(list(TEXT), **settings)
    assert pieces.encode(TEXT) == whole.encode(TEXT)
    assert getattr(pieces, "merges", None) == getattr(whole, "merges", None)


# config.py and the scripts


def test_the_names_of_patterns_in_the_settings_are_those_there_are():
    assert set(get_args(config.PatternName)) == set(PATTERNS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT + inspect.getsource(inspect)[:20_000], encoding="utf-8")
    return tmp_path / "text.txt"


def train(data: Path, **settings: Any) -> Tokenizer:
    settings = {"vocab_size": 400, "out": data.parent / "tokenizer.json"} | settings
    return train_tokenizer.run(config.TrainConfig(**settings), [data])


@pytest.mark.parametrize("trainer", ["naive", "incremental", "parallel"])
def test_every_trainer_writes_the_same_tokenizer(trainer: str, data: Path):
    tokenizer = train(data, trainer=trainer)
    assert isinstance(tokenizer, BPETokenizer)
    assert tokenizer.vocab_size == 400
    assert tokenizer.special_tokens == {"<|endoftext|>": 399}
    assert tokenizer.merges == train(data, out=data.parent / "other.json").merges
    assert open_tokenizer(data.parent / "tokenizer.json").encode(TEXT) == tokenizer.encode(TEXT)


def test_unigram_is_trained_and_saved_too(data: Path):
    tokenizer = train(data, algorithm="unigram", pattern="gpt2", special_tokens=[])
    assert isinstance(tokenizer, UnigramTokenizer)
    assert (tokenizer.vocab_size, tokenizer.pattern) == (400, "gpt2")
    assert open_tokenizer(data.parent / "tokenizer.json").encode(TEXT) == tokenizer.encode(TEXT)


def test_several_files_are_learned_from_and_documents_stay_apart(tmp_path: Path):
    (tmp_path / "a.docs.txt").write_text("ab\nab\nab\n" * 20)
    (tmp_path / "b.txt").write_text("cd" * 50)
    settings = config.TrainConfig(vocab_size=300, out=tmp_path / "t.json", pattern="none")
    tokens = set(train_tokenizer.run(settings, [tmp_path / "a.docs.txt", tmp_path / "b.txt"]).vocab.values())
    assert {b"ab", b"cd", b"cdcd"} <= tokens
    assert not any(b"ba" in token or b"bc" in token or b"<|" in token for token in tokens)


def encoded(tokenizer: Path, **settings: Any) -> bytes:
    stdin, stdout = io.BytesIO(settings.pop("stdin", b"")), io.BytesIO()
    encode.run(config.EncodeConfig(tokenizer=str(tokenizer), **settings), stdin, stdout)
    return stdout.getvalue()


@pytest.mark.parametrize(
    "content", [TEXT.encode(), b"", b"\xff\xfe\x00 half \xf0\x9f", "é😀".encode() * 40_000]
)
def test_the_filter_gives_the_ids_of_the_whole_and_back(
    content: bytes, data: Path, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = train(data)
    monkeypatch.setattr(encode, "BLOCK", 7)  # tears characters and numbers apart
    path = data.parent / "tokenizer.json"
    ids = encoded(path, stdin=content)
    assert [int(word) for word in ids.split()] == tokenizer.encode(content)
    assert max(map(len, ids.split(b"\n")), default=0) <= 5 * encode.LINE
    assert encoded(path, stdin=ids, decode=True) == content
    (data.parent / "content").write_bytes(content)
    assert encoded(path, file=data.parent / "content") == ids


def test_special_tokens_count_in_the_filter_only_if_allowed(data: Path):
    train(data)
    path = data.parent / "tokenizer.json"
    assert len(encoded(path, text="<|endoftext|>").split()) > 1
    assert encoded(path, text="<|endoftext|>", allow_special=True) == b"399\n"


@pytest.mark.parametrize("ids", [b"12 x", b"1,2", b"-1", b"1.0", b"9" * 100_000, b"1 \xff"])
def test_what_is_no_number_is_refused_by_the_filter(ids: bytes, data: Path):
    train(data)
    with pytest.raises(ValueError, match=r"id \(.*\) must be a whole number"):
        encoded(data.parent / "tokenizer.json", stdin=ids, decode=True)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train_tokenizer --vocab_size 100", "vocab_size (100) must be at least 257"),
        ("train_tokenizer --vocab_size many", "many"),
        ("train_tokenizer --vocabsize 300", "did you mean vocab_size?"),
        ("train_tokenizer --algorithm wordpiece", "'bpe', 'unigram'"),
        ("train_tokenizer --pattern (a+)+$", "'gpt2', 'gpt4'"),
        ("train_tokenizer --data nothing.txt", "data (nothing.txt) must be a file, or one of tiny"),
        ("train_tokenizer --data ../no.json --out ../no.json/x", "nothing can be written there"),
        ("train_tokenizer --out ..", "out (..) must be a file, not a folder"),
        ("train_tokenizer --special_tokens a a", "special_tokens (a, a) must be different"),
        ("download_data --size huge", "huge"),
        ("encode --tokenizer nothing.json x", "train_tokenizer.py"),
        ("encode --tokenizer ../no.json x", "must be JSON"),
        ("encode --file a.txt text", "file (a.txt) must not be given together with a text"),
    ],
)
def test_a_script_ends_on_bad_input_with_one_line_and_status_2(
    command: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "no.json").write_text("{")
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    name, *flags = command.split(" ")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    main = {"train_tokenizer": train_tokenizer, "download_data": download_data, "encode": encode}[name].main
    with pytest.raises(SystemExit) as end:
        main()
    out, error = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(folder.iterdir())  # and nothing is half written


def script(name: str, *flags: str | Path, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, FOLDER / name, *flags], capture_output=True, timeout=120, check=False, **settings
    )


def test_the_scripts_work_one_after_the_other(data: Path):
    out = data.parent / "folder" / "tokenizer.json"
    result = script("train_tokenizer.py", "--data", data, "--vocab_size", "300", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "299 tokens and 1 special" in result.stdout.decode()
    ids = script("encode.py", "--tokenizer", out, input=b"the cats \xff")
    text = script("encode.py", "--tokenizer", out, "--decode", input=ids.stdout)
    assert text.stdout == b"the cats \xff", text.stderr


def test_a_text_without_pairs_gives_a_smaller_vocabulary_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "x.txt").write_text("ab")
    flags = ["--data", str(tmp_path / "x.txt"), "--vocab_size", "300", "--out", str(tmp_path / "t.json")]
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *flags])
    train_tokenizer.main()
    assert "not 300: the text has no more" in capsys.readouterr().out


def test_the_memory_of_the_filter_does_not_grow_with_the_input(data: Path):
    train(data)
    settings = config.EncodeConfig(tokenizer=str(data.parent / "tokenizer.json"))
    peaks = []
    for size in (100_000, 400_000):
        with open(os.devnull, "wb") as nowhere:
            tracemalloc.start()
            encode.run(settings, io.BufferedReader(Endless(data.read_bytes(), size)), nowhere)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 50_000  # bytes, for 300,000 more that come in


class Endless(io.RawIOBase):
    """A file that repeats a content up to a size, and never has more than a piece of it in memory."""

    def __init__(self, content: bytes, size: int) -> None:
        self.content, self.left = content, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self.content[: min(len(buffer), self.left)]
        buffer[: len(piece)] = piece
        self.left -= len(piece)
        return len(piece)


def test_download_data_gets_what_there_is_and_says_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys, data: Path
):
    def load(name: str, source: str) -> Path:
        if name == "kjv":
            raise ValueError("source (hub) must be one of auto for kjv")
        return data

    monkeypatch.setattr(download_data, "load_corpus", load)
    assert download_data.run(config.DownloadConfig(size="medium")) == [data]
    assert capsys.readouterr().out == "left out: source (hub) must be one of auto for kjv\n"


# --interactive

COLOURS = (25, 130, 28, 90, 124)  # of 256-colour terminals: blue, orange, green, purple, red


def coloured(tokenizer: Tokenizer, text: str, colours: bool) -> str:
    """Return the tokens of a text side by side, each on its own background, and their ids below."""
    ids = tokenizer.encode(text)
    pieces = [visible(tokenizer.decode_bytes([i])) for i in ids]
    if not colours:
        return "|".join(pieces) + "\n" + " ".join(map(str, ids))
    paint = [f"\x1b[97;48;5;{COLOURS[n % len(COLOURS)]}m{{}}\x1b[0m" for n in range(len(ids))]
    pieces = [style.format(piece) for style, piece in zip(paint, pieces, strict=True)]
    return "".join(pieces) + "\n" + " ".join(style.format(i) for style, i in zip(paint, ids, strict=True))


def visible(token: bytes) -> str:
    """Return a token as text that cannot move the cursor: parts of characters and controls become escapes."""
    text = token.decode("utf-8", "backslashreplace")
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def test_tokens_are_shown_side_by_side_with_their_ids_below():
    tokenizer = trained("byte")
    assert (
        coloured(tokenizer, "a 😀\x1b", False)
        == "a| |\\xf0|\\x9f|\\x98|\\x80|\\x1b\n97 32 240 159 152 128 27"
    )
    blue, orange, end = "\x1b[97;48;5;25m", "\x1b[97;48;5;130m", "\x1b[0m"
    shown = f"{blue}a{end}{orange}b{end}\n{blue}97{end} {orange}98{end}"
    assert coloured(tokenizer, "ab", True) == shown


def interact() -> None:
    """Cut typed text with the tokenizer that train_tokenizer.py made, or else one that is learned now."""
    if config.TOKENIZER.is_file():
        tokenizer = open_tokenizer(config.TOKENIZER)
    else:
        tokenizer = BPETokenizer.train(inspect.getsource(inspect) + inspect.getsource(subprocess), 1000)
        print("trained on two files of Python's library; train_tokenizer.py makes a better one")
    for text in ask("text> "):
        print(coloured(tokenizer, text, sys.stdout.isatty() and "NO_COLOR" not in os.environ))


if __name__ == "__main__":
    run_validation(__file__, interact)
