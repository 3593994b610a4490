"""Checks of the measures, the tables and the drawings. --interactive compares tokenizers on what you type."""

import html
import itertools
import re
from pydoc_data.topics import topics

import pytest

from common.downloads import DownloadError
from common.script import ask, run_validation
from phase1_foundation.project2_tokenizer import report, visualize
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.measures import (
    audit,
    bytes_per_token,
    digit_groups,
    is_utf8,
    premium,
    sample_texts,
    token_counts,
    tokens_per_word,
)
from phase1_foundation.project2_tokenizer.unigram import UnigramTokenizer

ENGLISH = "".join(topics.values())[:60_000]  # Python's own manual, which every reader has


def tokenizer_of(*tokens: str, pattern: str = "gpt4") -> BPETokenizer:
    """A tokenizer with these tokens, merged from the left, letter by letter."""
    vocab = {i: bytes([i]) for i in range(256)}
    ids = {token: i for i, token in vocab.items()}
    merges = []
    for token in (token.encode() for token in tokens):
        for left, right in ((token[:n], token[n : n + 1]) for n in range(1, len(token))):
            if left + right not in ids:
                ids[left + right] = len(ids)
                vocab[ids[left + right]] = left + right
                merges.append((ids[left], ids[right], ids[left + right]))
    return BPETokenizer(vocab, merges, pattern=pattern)


def test_the_sample_texts_are_eight_languages_code_and_numbers():
    texts = sample_texts()
    assert [*report.LANGUAGES, "code", "numbers"] == list(texts)
    assert all(text.count("\n") == 6 for name, text in texts.items() if name in report.LANGUAGES)
    assert len({text.count("\n") for text in texts.values()}) > 1


def test_compression_fertility_and_premium_are_what_their_names_say():
    tokenizer = tokenizer_of("the", " cat")
    assert bytes_per_token(tokenizer, "the cat") == 7 / 2
    assert tokens_per_word(tokenizer, "the cat sat") == 6 / 3  # the, cat, and four bytes of " sat"
    assert premium(tokenizer, "die cat", "the cat") == 4 / 2
    assert bytes_per_token(tokenizer_of(), "日本") == 1


def test_audit_finds_unused_tokens_stepping_stones_and_halves():
    tokenizer = tokenizer_of("hello", "é")
    found = audit(tokenizer, token_counts(tokenizer, ["hello hello"]))
    unused = {tokenizer.vocab[i] for i in found.unused if i >= 256}
    assert unused == {b"he", b"hel", b"hell", "é".encode()}
    assert {tokenizer.vocab[i] for i in found.stepping_stones} == {b"he", b"hel", b"hell"}
    assert found.unreachable == []
    assert {tokenizer.vocab[i] for i in found.halves} == {bytes([b]) for b in range(128, 256)}


def test_a_token_that_the_pattern_cuts_is_unreachable():
    tokenizer = tokenizer_of("a1")  # gpt4 cuts letters from digits
    assert [tokenizer.vocab[i] for i in audit(tokenizer, {}).unreachable] == [b"a1"]
    assert audit(tokenizer_of("a1", pattern="none"), {}).unreachable == []


def test_bpe_leaves_stepping_stones_and_unigram_hardly_any():
    bpe, unigram = (cls.train(ENGLISH, 1500) for cls in (BPETokenizer, UnigramTokenizer))
    stones = [len(audit(t, token_counts(t, [ENGLISH])).stepping_stones) for t in (bpe, unigram)]
    assert stones[0] > 10 * stones[1]


def test_digit_groups_follow_the_pattern():
    assert digit_groups(tokenizer_of("123", "45"), [1234, 12345]) == {(3, 1): 1, (3, 2): 1}
    assert digit_groups(tokenizer_of("1234", " 2024"), [1234]) == {(3, 1): 1}  # gpt4 allows three at most
    assert digit_groups(tokenizer_of(" 2024", pattern="gpt2"), [2024, 2025]) == {(4,): 1, (3, 1): 1}
    assert digit_groups(tokenizer_of("12", pattern="smollm"), report.NUMBERS) == {(1, 1, 1, 1): 9000}


def test_a_shorter_vocabulary_is_what_training_for_it_gives():
    large, small = BPETokenizer.train(ENGLISH, 600), BPETokenizer.train(ENGLISH, 350)
    short = visualize.shorten(large, 350)
    assert (short.vocab, short.merges) == (small.vocab, small.merges)


def test_tables_compare_every_tokenizer_on_every_text(tmp_path):
    (tmp_path / "text.txt").write_text(ENGLISH)
    tables = report.run(report.CompareConfig(data=[str(tmp_path / "text.txt")], vocab_size=400, compare=[]))
    assert tables["Bytes per token"][0] == ["text", "BPE", "unigram"]
    assert [row[0] for row in tables["Bytes per token"][1:]] == list(sample_texts())
    same = tables["Tokens for the same text, English = 1"]
    assert same[1] == ["English", "1.00", "1.00"]
    assert float(same[5][1]) > 2  # Hindi
    learned = BPETokenizer.train(ENGLISH[: len(ENGLISH) * 9 // 10], 400)
    held_out = bytes_per_token(learned, ENGLISH[len(ENGLISH) * 9 // 10 :])
    assert tables["Bytes per token on held-out text"][1][1] == f"{held_out:.2f}"
    smollm = next(row for row in tables["Numbers from 1000 to 9999"] if row[0] == "BPE, pattern smollm")
    assert smollm[2:] == ["4.00", "1", "1+1+1+1 100%"]
    lines = report.markdown([["a", "b"], ["1|2", "3"]]).splitlines()
    assert lines == ["| a | b |", "| --- | --- |", r"| 1\|2 | 3 |"]


def test_everything_is_drawn(tmp_path):
    (tmp_path / "text.txt").write_text(ENGLISH[:20_000])
    config = visualize.VisualizeConfig(
        data=[str(tmp_path / "text.txt")], vocab_size=400, compare=[], out=tmp_path / "out"
    )
    numbers = visualize.run(config)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    names = ["compression", "token_lengths", "zipf", "fertility", "digits"]
    assert files == {*(f"{name}.png" for name in names), "tokens.html"}
    assert all((tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in names)
    for values in numbers["compression"].values():
        assert all(a < b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("text", [sample_texts()["Hindi"], "<b>&\"'</b>\n\tx  y", "日本 🙂 é", "a\r\nb", ""])
def test_the_page_shows_the_text_and_nothing_else(text):
    tokenizer = BPETokenizer.train(ENGLISH, 400)
    page = visualize.token_page(text, {"<ours>": tokenizer})
    shown = re.search(r"<pre>(.*)</pre>", page, re.DOTALL)
    assert shown is not None
    plain = re.sub(r"<small>.</small>|<[^>]*>", "", shown[1])
    assert html.unescape(plain).replace("␍", "\r") == text
    assert "<b>" not in page
    assert "&lt;ours&gt;" in page
    ids = [
        int(i)
        for title in re.findall('title="([^"]*)"', shown[1])
        for i in re.findall(r"(?m)^(\d+): b", title)
    ]
    assert ids == tokenizer.encode(text)


def test_bytes_that_are_no_text_are_shown_as_numbers():
    tokenizer = BPETokenizer.train("", 256)
    spans = visualize.token_spans(tokenizer, tokenizer.encode(b"a\xff"))
    assert re.sub("<[^>]*>", "", spans) == "aff"
    assert not is_utf8(b"\xff")


def test_bad_settings_get_a_clear_error():
    with pytest.raises(ValueError, match=r"megabytes \(0\) must be more than 0"):
        report.CompareConfig(megabytes=0).validate_config()
    with pytest.raises(ValueError, match=r"vocab_size \(256\) must be at least 257"):
        visualize.VisualizeConfig(vocab_size=256).validate_config()


def test_a_text_too_short_to_learn_from_gets_a_clear_error(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match=r"data \(.*short.txt: 5 characters\) must have at least 1000"):
        report.run(report.CompareConfig(data=[str(tmp_path / "short.txt")]))


def test_a_vocabulary_that_cannot_be_fetched_is_left_out(monkeypatch, capsys):
    def fail(name: str) -> None:
        raise DownloadError("no network")

    monkeypatch.setattr(report, "open_tokenizer", fail)
    found = report.tokenizers_to_compare(report.CompareConfig(vocab_size=300), [ENGLISH[:1000]])
    assert list(found) == ["BPE", "unigram"]
    assert "left out: gpt2 (no network)" in capsys.readouterr().out


def interact() -> None:
    """Compare the tokenizers on each typed text."""
    tokenizers = report.tokenizers_to_compare(report.CompareConfig(), [ENGLISH])
    for text in ask("text> "):
        for name, tokenizer in tokenizers.items():
            ids = tokenizer.encode(text)
            print(f"{name:8} {len(ids):3} tokens  " + "|".join(tokenizer.decode([i]) for i in ids))


if __name__ == "__main__":
    run_validation(__file__, interact)
