"""Checks of the training data. --interactive cuts the text you type into inputs and targets."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.script import ask, run_validation
from phase1_foundation.project1_minimal_gpt import download_data
from phase1_foundation.project1_minimal_gpt.config import DownloadConfig
from phase1_foundation.project1_minimal_gpt.data import TextData, read_ids
from phase1_foundation.project1_minimal_gpt.tokenizer import ByteTokenizer, CharTokenizer


def counting(n: int = 1000, block_size: int = 8, batch_size: int = 64, seed: int = 0) -> TextData:
    """A text whose tokens are 0, 1, 2, ..., so that a token tells its place."""
    return TextData(torch.arange(n), block_size, batch_size, seed)


def test_a_batch_is_a_function_of_seed_and_step():
    data = counting()
    later = data.batch(7)
    for step in (0, 3, 7):
        x, y = data.batch(step)
        again, _ = counting().batch(step)
        assert torch.equal(x, again)
    assert torch.equal(x, later[0])
    assert torch.equal(y, later[1])
    torch.manual_seed(99)  # whatever else draws random numbers
    assert torch.equal(data.batch(7)[0], x)
    assert not torch.equal(data.batch(8)[0], x)
    assert not torch.equal(counting(seed=1).batch(7)[0], x)


def test_targets_are_the_inputs_one_token_later():
    x, y = counting().batch(0)
    assert x.shape == y.shape == (64, 8)
    assert torch.equal(y, x + 1)
    assert torch.equal(x[:, 1:], x[:, :-1] + 1)


def test_windows_come_from_everywhere_in_the_training_part_and_nowhere_else():
    data = counting()
    x, y = (torch.cat(parts) for parts in zip(*(data.batch(step) for step in range(400)), strict=True))
    starts = x[:, 0]
    assert (starts.min(), starts.max(), y.max()) == (0, 899 - 8, 899)  # 25,600 draws of 892 starts miss none
    # Each start comes n / 892 times give or take the root of it: a chi-square of 891 degrees of freedom.
    expected = len(starts) / 892
    chi_square = ((torch.bincount(starts, minlength=892) - expected) ** 2 / expected).sum()
    assert abs(chi_square - 891) < 5 * math.sqrt(2 * 891)


@given(st.integers(100, 400), st.integers(1, 12), st.integers(1, 50))
def test_validation_windows_are_consecutive_and_complete(n: int, block_size: int, windows: int):
    if n // 10 <= block_size:
        return
    data = counting(n, block_size)
    first = n - n // 10  # the last tenth
    assert torch.equal(torch.cat([data.train, data.validation]), torch.arange(n))
    assert data.validation[0] == first
    batches = list(data.validation_batches(windows))
    x, y = (torch.cat(parts).flatten() for parts in zip(*batches, strict=True))
    assert torch.equal(x, torch.arange(first, first + len(x)))
    assert torch.equal(y, x + 1)
    assert 0 <= n - 1 - first - len(x) < block_size  # only a remainder shorter than a window is left out
    assert all(len(a) == windows for a, _ in batches[:-1])


@pytest.mark.parametrize(("n", "block_size"), [(80, 8), (1, 1), (0, 1), (2559, 256)])
def test_a_text_too_short_for_a_window_is_refused_in_words(n: int, block_size: int):
    with pytest.raises(ValueError, match=rf"block_size \({block_size}\) must be below .* of {n} tokens"):
        counting(n, block_size)
    assert len(list(counting(10 * (block_size + 1), block_size).validation_batches(1))) == 1  # just enough


# Files


def test_a_file_is_read_character_by_character(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_bytes("Grüße\r\n🙂".encode())
    ids, tokenizer = read_ids(path, "char")
    assert isinstance(tokenizer, CharTokenizer)
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids.tolist()) == "Grüße\r\n🙂"  # line ends stay as they are


@pytest.mark.parametrize("content", ["Grüße".encode(), bytes(range(256)), b"\0"])
def test_any_file_is_read_byte_by_byte(content: bytes, tmp_path: Path):
    (tmp_path / "file").write_bytes(content)
    ids, tokenizer = read_ids(tmp_path / "file", "byte")
    assert isinstance(tokenizer, ByteTokenizer)
    assert ids.tolist() == list(content)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", "char", "must not be empty"),
        (b"", "byte", "must not be empty"),
        (b"ab\xffcd", "char", "must be UTF-8 text, but byte 2 is 0xff; --tokenizer byte"),
        ("über".encode("utf-16"), "char", "must be UTF-8 text, but byte 0 is 0xff"),
        ("ßa\0b".encode(), "char", "must be text, but byte 3 is 0"),
    ],
)
def test_a_file_that_is_not_text_is_refused_in_words(content: bytes, kind: str, message: str, tmp_path: Path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_ids(tmp_path / "file", kind)


# download_data.py


def test_downloading_says_where_the_text_is_and_how_it_begins(
    text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(download_data, "load_corpus", lambda name, source: text_file)
    assert download_data.run(DownloadConfig()) == text_file
    text = text_file.read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert f"{len(text):,} characters, {len(set(text))} different" in printed
    assert text[:200] in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--corpus nowhere", "corpus (nowhere) must be one of"), ("--source pigeon", "source")],
)
def test_an_unknown_corpus_or_source_gets_one_line_and_status_2(flags: str, message: str, refusal: Callable):
    assert message in refusal(download_data.main, *flags.split()).err


def interact() -> None:
    """Show what the model sees of the typed text and what it must answer, place by place."""
    for text in ask("text> "):
        for end in range(1, len(text)):
            print(f"after {text[:end]!r} comes {text[end]!r}")


if __name__ == "__main__":
    run_validation(__file__, interact)
