"""Checks of WordPiece. --interactive shows the pieces of what you type."""

import random
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.script import ask, run_validation
from phase1_foundation.project2_tokenizer.wordpiece import LONGEST_WORD, WordPieceTokenizer

ENGLISH = "".join(topics.values())[:100_000]  # Python's own manual, which every reader has


@pytest.fixture(scope="module")
def tokenizer() -> WordPieceTokenizer:
    return WordPieceTokenizer.train(ENGLISH, 1000, special_tokens=["[CLS]", "[SEP]"])


def with_pieces(*pieces: str) -> WordPieceTokenizer:
    return WordPieceTokenizer({i: piece.encode() for i, piece in enumerate(pieces, 1)}, {"[UNK]": 0})


def names(tokenizer: WordPieceTokenizer, text: str) -> list[str]:
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def test_the_longest_piece_wins_at_every_step():
    tokenizer = with_pieces("un", "una", "##aff", "##f", "##able", "u", "##fable", "##ff")
    assert names(tokenizer, "unaffable") == ["una", "##ff", "##able"]
    assert tokenizer.decode(tokenizer.encode("unaffable u")) == "unaffable u"


def test_greedy_fails_on_a_word_that_other_pieces_could_spell():
    assert names(with_pieces("ab", "a", "##bc"), "abc") == ["[UNK]"]  # a, ##bc would do


def test_one_unknown_part_makes_the_whole_word_unknown():
    assert names(with_pieces("the", "cat", "##s"), "the catz cats") == ["the", "[UNK]", "cat", "##s"]


def test_very_long_words_are_unknown():
    tokenizer = with_pieces("a", "##a")
    assert len(tokenizer.encode("a" * LONGEST_WORD)) == LONGEST_WORD
    assert tokenizer.encode("a" * (LONGEST_WORD + 1)) == [0]


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_hugging_face_on_random_vocabularies(seed):
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(seed)
    letters = "abé日🙂"
    pieces = {rng.choice(["", "##"]) + "".join(rng.choices(letters, k=rng.randint(1, 4))) for _ in range(150)}
    ids = {"[UNK]": 0} | {piece: i for i, piece in enumerate(sorted(pieces), 1)}
    theirs = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ours = with_pieces(*sorted(pieces))
    known = 0
    for _ in range(500):
        text = "".join(rng.choices(letters + " .,\n", k=rng.randint(0, 40))) + "a" * rng.choice(
            [0, 0, 0, 120]
        )
        assert ours.encode(text) == theirs.encode(text).ids
        known += sum(i > 0 for i in ours.encode(text))
    assert known > 500


def test_training_gives_characters_and_frequent_pieces(tokenizer):
    assert tokenizer.vocab_size == 1000
    pieces = {piece.decode() for piece in tokenizer.vocab.values()}
    assert {"the", "##ing", "e", "##e"} <= pieces
    assert list(tokenizer.special_tokens) == ["[UNK]", "[CLS]", "[SEP]"]
    unknown = tokenizer.encode(ENGLISH).count(tokenizer.special_tokens["[UNK]"])
    assert unknown == sum(len(word) > LONGEST_WORD for word in ENGLISH.split())


def test_equal_to_hugging_face_with_a_trained_vocabulary(tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    ids = {piece.decode(): i for i, piece in tokenizer.vocab.items()} | tokenizer.special_tokens
    theirs = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    assert tokenizer.encode(ENGLISH) == theirs.encode(ENGLISH).ids


def test_special_tokens_must_be_allowed(tokenizer):
    cls = tokenizer.special_tokens["[CLS]"]
    assert cls not in tokenizer.encode("[CLS] the end")
    assert tokenizer.encode("[CLS] the end", ["[CLS]"])[0] == cls


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="#"))
)  # "###" looks like #, continued
@settings(max_examples=200, deadline=None)
def test_what_was_decoded_encodes_to_the_same_ids_again(tokenizer, text):
    known = [i for i in tokenizer.encode(text) if i != tokenizer.special_tokens["[UNK]"]]
    assert all(i in tokenizer.vocab for i in known)
    assert tokenizer.encode(tokenizer.decode(known)) == known


@pytest.mark.parametrize("text", ["", "a", "日本語 " * 10, "[CLS]"])
def test_odd_corpora_train(text):
    tokenizer = WordPieceTokenizer.train(text, 50, special_tokens=["[CLS]"])
    assert tokenizer.vocab_size <= 50
    tokenizer.encode(text + ENGLISH[:100])


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    assert WordPieceTokenizer.load(tmp_path / "tokenizer.json").encode(ENGLISH[:5000]) == tokenizer.encode(
        ENGLISH[:5000]
    )


def test_bad_input_gets_a_clear_error(tokenizer):
    with pytest.raises(ValueError, match=r"special_tokens \(none\) must have \[UNK\]"):
        WordPieceTokenizer({}, {})
    with pytest.raises(ValueError, match=r"vocab_size \(1\) must be at least 2, the special tokens"):
        WordPieceTokenizer.train("text", 1, special_tokens=["[CLS]"])
    with pytest.raises(ValueError, match=r"id \(123456\) must be one of"):
        tokenizer.decode([123456])


def interact() -> None:
    """Show the pieces of each typed text."""
    tokenizer = WordPieceTokenizer.train("".join(topics.values()), 5000)
    for text in ask("text> "):
        print(" ".join(names(tokenizer, text)))


if __name__ == "__main__":
    run_validation(__file__, interact)
