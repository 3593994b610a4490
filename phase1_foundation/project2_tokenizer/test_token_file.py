r"""Checks of the JSON files: what goes in comes out, and whatever else is in a file gives one clear line."""

import functools
import json
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.script import run_validation
from phase1_foundation.project2_tokenizer import token_file
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.token_file import (
    load_tokenizer,
    save_tokenizer,
    text_to_token,
    token_to_text,
)
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project2_tokenizer.unigram import UnigramTokenizer
from phase1_foundation.project2_tokenizer.wordpiece import WordPieceTokenizer

TEXT = 'the cat sat on the mat 😀😀😀 日本日本 naïve\u2028 \\ " \x00\x7f\x85 ' * 3


def bpe() -> BPETokenizer:
    return BPETokenizer.train(TEXT, 285, special_tokens=["<|end|>", '"quoted\\"', "日本<|>"])


TOKENIZERS = {
    "bpe": bpe,
    "unigram": lambda: UnigramTokenizer.train(TEXT, 280, special_tokens=["<|end|>"]),
    "wordpiece": lambda: WordPieceTokenizer(
        {0: b"un", 1: b"##able", 2: "##日".encode()}, {"[UNK]": 3, "[CLS]": 9}
    ),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_tokenizer(bpe(), tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


def changed(path: Path, **fields: Any) -> Path:
    """Return the path of a copy of a file in which some fields are other ones."""
    copy = path.with_name("changed.json")
    copy.write_text(json.dumps(json.loads(path.read_bytes()) | fields))
    return copy


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_saved_tokenizer_comes_back_as_it_was(kind: str, tmp_path: Path):
    tokenizer = TOKENIZERS[kind]()
    path = tmp_path / "new" / "folder" / "tokenizer.json"
    tokenizer.save(path)
    back = type(tokenizer).load(path)
    assert type(back) is type(tokenizer)
    for name in ("vocab", "merges", "scores", "special_tokens", "pattern", "ignore_merges"):
        assert getattr(back, name, None) == getattr(tokenizer, name, None), name
    assert back.encode(TEXT, "all") == tokenizer.encode(TEXT, "all")
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]  # no temporary file is left


def test_loading_as_another_kind_is_refused(saved: Path):
    with pytest.raises(ValueError, match=r"\(BPETokenizer\) must hold a UnigramTokenizer"):
        UnigramTokenizer.load(saved)


def test_a_file_is_valid_utf8_json_with_one_entry_a_line(saved: Path):
    text = saved.read_bytes().decode()
    assert json.loads(text)["kind"] == "bpe"
    assert ' "日本": ' not in text
    assert re.search(r'^ "\d+": "日本",?$', text, re.M)
    assert re.search(r'^ "\d+": "\\udcf0",?$', text, re.M)  # the first byte of an emoji is no text
    assert re.search(r"^ \[\d+, \d+, \d+\],?$", text, re.M)


@given(st.binary(min_size=1, max_size=8))
def test_any_bytes_have_a_text_of_their_own_that_utf8_can_hold(token: bytes):
    text = json.loads(
        json.dumps(token_to_text(token), ensure_ascii=False).encode("utf-8", "backslashreplace")
    )
    assert text_to_token(text) == token


def test_another_class_cannot_be_saved(tmp_path: Path):
    with pytest.raises(ValueError, match=r"tokenizer \(Tokenizer\) must be one of bpe, unigram, wordpiece"):
        save_tokenizer(type("Tokenizer", (), {})(), tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "content .* must be JSON"),
        (b"\xff\xfe{}", r"byte 0 \(0xff\) must be UTF-8"),
        (b'{"version": 1, "kind": "bpe", "vo', "Unterminated string"),
        (b"[" * 100_000, "recursion"),
        (b'{"a":' * 100_000, "recursion"),
        (b"[1, 2]", r"content \(\[1, 2\]\) must be an object"),
        (b'{"version": 1, "version": 1}', "name 'version' stands twice"),
        (b'{"version": NaN}', "NaN is no JSON"),
        (b'{"version": 1' + b"0" * 5000 + b"}", "must be JSON"),
        (b"{}", r"version \(None\) must be 1"),
        (b'{"version": true}', r"version \(True\) must be 1"),
        (b'{"version": 2}', r"version \(2\) must be 1"),
        (b'{"version": 1, "kind": "pickle"}', r"kind \('pickle'\) must be one of bpe, unigram, wordpiece"),
        (b'{"version": 1, "kind": ["bpe"]}', r"kind \(\['bpe'\]\) must be one of"),
        (
            b'{"version": 1, "kind": "bpe"}',
            r"fields \(\[\]\) must be version, kind, vocab, merges, special_tokens, pattern, ignore_merges",
        ),
    ],
)
def test_a_file_of_anything_else_gives_one_clear_line(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(path)
    line = str(error.value)
    assert line.startswith(str(path))
    assert "\n" not in line
    assert len(line) < 300


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab": {}}, r"vocab \(empty\) must hold a token"),
        ({"vocab": []}, r"vocab \(\[\]\) must be an object"),
        ({"vocab": {"0": ""}}, r"vocab\[0\] \(empty\) must have a byte"),
        ({"vocab": {"0": "a", "1": "a"}}, r"vocab\[1\] \(b'a'\) must differ from vocab\[0\]"),
        (
            {"vocab": {"0": "é", "1": "\udcc3\udca9"}},
            r"vocab\[1\] .* must differ from vocab\[0\]",
        ),  # the same bytes
        ({"vocab": {"007": "a"}}, r"vocab \('007'\) must have ids for names"),
        ({"vocab": {"٧": "a"}}, r"must have ids for names"),
        ({"vocab": {"-1": "a"}}, r"vocab \(-1\) must be a whole number from 0 to 16777215"),
        ({"vocab": {"9" * 400: "a"}}, r"must have ids for names"),
        ({"vocab": {"16777216": "a"}}, r"vocab \(16777216\) must be a whole number from 0 to 16777215"),
        ({"vocab": {"0": "\ud800"}}, r"vocab\[0\] \('\\ud800'\) must be the text of a token"),
        ({"vocab": {"0": 5}}, r"vocab\[0\] \(5\) must be the text of a token"),
        ({"merges": {}}, r"merges \(\{\}\) must be a list"),
        ({"merges": [[0, 1]]}, r"merges\[0\] \(\[0, 1\]\) must be \[left, right, id\]"),
        ({"merges": ["abc"]}, r"merges\[0\] \('abc'\) must be \[left, right, id\]"),
        ({"merges": [[0, 1, 2.0]]}, r"merges\[0\] \(2.0\) must be a whole number"),
        ({"merges": [[0, True, 2]]}, r"merges\[0\] \(True\) must be a whole number"),
        ({"merges": [[0, 1, 10**9]]}, r"merges\[0\] \(1000000000\) must be a whole number"),
        ({"merges": [[0, 1, 9999]]}, r"merges\[0\] \(9999\) must be an id of vocab"),
        ({"merges": [[0, 1, 2]]}, r"merges\[0\] \(2: b'#'\) must make b'!\"' of 0 and 1"),
        ({"merges": [[256, 0, 256]]}, r"merges\[0\] \(256: b'.*'\) must make"),  # a token out of itself
        ({"special_tokens": []}, r"special_tokens \(\[\]\) must be an object"),
        ({"special_tokens": {"": 999}}, r"special_tokens \(''\) must have text for names"),
        ({"special_tokens": {"\udc80": 999}}, r"special_tokens \('\\udc80'\) must have text for names"),
        (
            {"special_tokens": {"<|a|>": 0}},
            r"special_tokens\['<\|a\|>'\] \(0\) must be an id that nothing else has",
        ),
        ({"special_tokens": {"<|a|>": 999, "<|b|>": 999}}, r"must be an id that nothing else has"),
        ({"special_tokens": {"<|a|>": "5"}}, r"special_tokens\['<\|a\|>'\] \('5'\) must be a whole number"),
        (
            {"pattern": "(a+)+$"},
            r"pattern \('\(a\+\)\+\$'\) must be one of gpt2, gpt4",
        ),  # no regex from strangers
        ({"pattern": ["gpt4"]}, r"pattern \(\['gpt4'\]\) must be one of"),
        ({"ignore_merges": 1}, r"ignore_merges \(1\) must be true or false"),
        ({"extra": 1}, r"fields .* must be version, kind"),
    ],
)
def test_a_field_that_cannot_be_gives_one_clear_line(fields: dict[str, Any], message: str, saved: Path):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(changed(saved, **fields))


def test_the_same_pair_cannot_merge_twice(saved: Path):
    merges = json.loads(saved.read_bytes())["merges"]
    with pytest.raises(ValueError, match=r"merges\[\d+\] .* must be a pair that no earlier merge has"):
        load_tokenizer(changed(saved, merges=[*merges, merges[0]]))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"0": "high"}, r"scores\['0'\] \('high'\) must be a number between -1000 and 1000"),
        ({"0": 1e300}, r"must be a number between"),
        ({"0": True}, r"must be a number between"),
        ({"zero": -1}, r"scores \('zero'\) must have ids for names"),
        ({}, r"scores \(0 ids\) must have the ids of vocab"),
    ],
)
def test_scores_are_finite_numbers_one_for_each_piece(scores: dict[str, Any], message: str, tmp_path: Path):
    TOKENIZERS["unigram"]().save(tmp_path / "unigram.json")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(changed(tmp_path / "unigram.json", scores=scores))


def test_a_file_that_is_too_long_is_not_read(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_file, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"size \(\d+ bytes\) must be at most 1000"):
        load_tokenizer(saved)


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"train_tokenizer\.py"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(FileNotFoundError, match=r"train_tokenizer\.py"):
        load_tokenizer(tmp_path)  # a folder


def test_every_truncated_file_is_refused(saved: Path):
    content = saved.read_bytes()
    cut = saved.with_name("cut.json")
    for size in range(0, len(content) - 2, 37):
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"must be JSON|must be UTF-8"):
            load_tokenizer(cut)


HOSTILE = [
    None,
    True,
    -1,
    0,
    1,
    2**70,
    1.5,
    "",
    "a",
    "\udc80",
    "\ud800",
    [],
    {},
    [[]],
    {"0": "a"},
    [0, 1, 2],
    "x" * 9999,
]


@functools.cache
def content(kind: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        TOKENIZERS[kind]().save(Path(folder) / "tokenizer.json")
        return json.loads((Path(folder) / "tokenizer.json").read_bytes())


def mutate(value: Any, rng: random.Random) -> Any:
    """Return a JSON value in which one thing, anywhere, is replaced, removed, doubled or swapped."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        copy = value.copy()
        what = rng.random()
        if what < 0.15:
            del copy[key]
        elif what < 0.3:
            other = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
            copy[key], copy[other] = copy[other], copy[key]
        elif what < 0.4 and isinstance(copy, list):
            copy.insert(key, copy[key])
        else:
            copy[key] = mutate(copy[key], rng)
        return copy
    return rng.choice(HOSTILE)


def check_refused_or_works(path: Path, load: Callable[[Path], Tokenizer]) -> None:
    complaint, tokenizer = "", None
    try:
        tokenizer = load(path)
    except ValueError as error:
        complaint = str(error)
    assert "\n" not in complaint
    assert len(complaint) < 500
    if tokenizer:
        assert isinstance(tokenizer.decode(tokenizer.encode(TEXT, "all")), str)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_a_mutated_file_is_either_refused_in_one_line_or_works(
    kind: str, rng: random.Random, tmp_path_factory
):
    path = tmp_path_factory.mktemp("fuzz") / "tokenizer.json"
    path.write_text(json.dumps(mutate(content(kind), rng)))
    check_refused_or_works(path, load_tokenizer)


if __name__ == "__main__":
    run_validation(__file__)
