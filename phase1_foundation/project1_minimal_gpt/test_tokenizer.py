"""Checks of the tokenizers. --interactive shows the ids of the text you type."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.script import ask, run_validation
from phase1_foundation.project1_minimal_gpt.generate import stream_text
from phase1_foundation.project1_minimal_gpt.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    from_dict,
)

TEXT = "Grüße, 世界! 🙂\n"


def test_ids_are_the_places_in_the_sorted_characters():
    tokenizer = CharTokenizer.train("hello")
    assert (tokenizer.chars, tokenizer.vocab_size) == ("ehlo", 4)
    assert tokenizer.encode("hello") == [1, 0, 2, 2, 3]
    assert tokenizer.decode([3, 2, 0]) == "ole"
    assert tokenizer.encode_batch(["he", ""]) == [[1, 0], []]
    assert CharTokenizer.train_from_iterator(["he", "llo"]).chars == tokenizer.chars


def test_byte_ids_are_the_bytes():
    tokenizer = ByteTokenizer.train("anything")
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("Aß🙂") == [0x41, 0xC3, 0x9F, 0xF0, 0x9F, 0x99, 0x82]


# Round trips; hypothesis draws characters of all planes of Unicode


@given(st.text(min_size=1))
def test_characters_come_back_as_they_went_in(text: str):
    tokenizer = CharTokenizer.train(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert len(ids) == len(text)


@given(st.text())
def test_text_comes_back_from_its_bytes(text: str):
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


@given(st.binary())
def test_any_bytes_come_back(content: bytes):
    assert ByteTokenizer().decode_bytes(list(content)) == content
    assert ByteTokenizer().decode(content) == content.decode(errors="replace")


@given(st.text(min_size=1), st.randoms())
def test_any_order_of_characters_decodes_to_that_text(text: str, random):
    tokenizer = CharTokenizer.train(text)
    ids = [random.randrange(tokenizer.vocab_size) for _ in range(20)]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


@given(st.one_of(st.binary(), st.text().map(str.encode)))
def test_text_that_streams_token_by_token_equals_the_decoded_whole(content: bytes):
    pieces = list(stream_text(ByteTokenizer(), content))
    assert "".join(pieces) == ByteTokenizer().decode(content)
    whole = [piece for piece in pieces if "�" not in piece]
    assert all(piece.encode() in content for piece in whole)


def test_a_character_streams_when_its_last_byte_is_there():
    assert list(stream_text(ByteTokenizer(), "aß🙂".encode())) == ["a", "", "ß", "", "", "", "🙂", ""]
    assert list(stream_text(ByteTokenizer(), "🙂".encode()[:3])) == ["", "", "", "�"]
    assert list(stream_text(CharTokenizer.train(TEXT), CharTokenizer.train(TEXT).encode("世🙂"))) == [
        "世",
        "🙂",
        "",
    ]


# Files


@pytest.mark.parametrize("tokenizer", [CharTokenizer.train(TEXT), ByteTokenizer()])
def test_a_saved_tokenizer_loads_as_it_was(tokenizer: Tokenizer, tmp_path: Path):
    path = tmp_path / "folder" / "tokenizer.json"
    tokenizer.save(path)
    for loaded in (type(tokenizer).load(path), from_dict(json.loads(path.read_text(encoding="utf-8")))):
        assert type(loaded) is type(tokenizer)
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
        assert loaded.to_dict() == tokenizer.to_dict()
    assert {"vocab", "merges", "special_tokens", "pattern"} <= tokenizer.to_dict().keys()
    assert tokenizer.special_tokens == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be JSON"),
        ('{"kind": "char", "vocab": ["a"', "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[]", r"kind \(None\) must be 'char' or 'byte'"),
        ('{"kind": "bpe"}', r"kind \('bpe'\) must be 'char' or 'byte'"),
        ('{"kind": "char"}', "vocab must be a list of single characters"),
        ('{"kind": "char", "vocab": ["ab"]}', "vocab must be a list of single characters"),
        ('{"kind": "char", "vocab": [1]}', "vocab must be a list of single characters"),
        ('{"kind": "char", "vocab": ["a", "a"]}', r"vocab \(2 characters, 1 different\)"),
        ('{"kind": "char", "vocab": []}', "must hold at least one, each once"),
        ('{"kind": "byte"}', "must be a CharTokenizer, not a ByteTokenizer"),
    ],
)
def test_a_file_that_is_no_tokenizer_of_this_kind_is_refused_in_words(
    content: str, message: str, tmp_path: Path
):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        CharTokenizer.load(path)


def test_a_file_that_is_not_text_is_refused_in_words(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be JSON"):
        ByteTokenizer.load(tmp_path / "tokenizer.json")


# Refusals


def test_an_unknown_character_is_named_with_its_number():
    with pytest.raises(ValueError, match=r"character \('ß', U\+00DF\) must be one .*'ehlo'"):
        CharTokenizer.train("hello").encode("heßo")
    many = CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 200))))
    with pytest.raises(ValueError, match=r"'🙂', U\+1F642.*200 characters"):
        many.encode("🙂")


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(ValueError, match=r"character \(U\+D83D\) must be text"):
        ByteTokenizer().encode("a\ud83d")


@pytest.mark.parametrize("tokenizer", [CharTokenizer("abc"), ByteTokenizer()])
@pytest.mark.parametrize("beyond", [-1, 256])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, beyond: int):
    with pytest.raises(ValueError, match=rf"id \({beyond}\) must be at least 0 and below vocab_size"):
        tokenizer.decode([0, beyond])


def test_no_text_makes_no_character_tokenizer():
    with pytest.raises(ValueError, match="must hold at least one"):
        CharTokenizer.train("")


def interact() -> None:
    """Show the typed text in both numberings; the character one is fit to what you type."""
    for text in ask("text> "):
        for tokenizer in (CharTokenizer.train(text), ByteTokenizer()):
            ids = tokenizer.encode(text)
            pieces = " ".join(f"{i}:{tokenizer.decode_bytes([i]).decode(errors='replace')}" for i in ids)
            print(f"{type(tokenizer).__name__:14} {len(ids):3} of {tokenizer.vocab_size}: {pieces}")


if __name__ == "__main__":
    run_validation(__file__, interact)
