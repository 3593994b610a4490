"""Checks of the trainers: the naive one is the definition, Hugging Face's `tokenizers` the judge."""

import functools
import random
import sys
import sysconfig
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path
from pydoc_data import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from common.script import run_validation
from phase1_foundation.project2_tokenizer import benchmark, bpe_train
from phase1_foundation.project2_tokenizer.benchmark import hugging_face, hugging_face_merges
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.bpe_train import (
    BYTES,
    count_chunks,
    count_chunks_parallel,
    incremental,
    naive,
)
from phase1_foundation.project2_tokenizer.patterns import PATTERNS


@functools.cache
def python_source(size: int) -> str:
    """Return so many characters of the source of Python's library."""
    text = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_text(encoding="utf-8") if len(text) < size else ""
    return text[:size]


@functools.cache
def corpus(name: str) -> str:
    """Return a text that everybody has: code, English, or all the scripts of the world."""
    if name == "code":
        return python_source(500_000)
    if name == "english":
        return "\n".join(topics.topics.values())[:500_000]
    characters = (chr(i) for i in range(0xA0, 0x20000))
    return "".join(f"{c} {unicodedata.name(c).title()}\n" for c in characters if unicodedata.name(c, ""))[
        :300_000
    ]


# What is learned


@pytest.mark.parametrize(("name", "pattern"), [("code", "gpt4"), ("english", "gpt2"), ("scripts", "o200k")])
def test_real_text_gives_the_merges_of_hugging_face(name: str, pattern: str):
    text = corpus(name)
    ours = BPETokenizer.train(text, 4000, pattern=pattern)
    theirs = hugging_face([text], 4000, pattern)
    assert ours.merges == hugging_face_merges(theirs)
    assert len(ours.merges) == 4000 - 256


@pytest.mark.parametrize("name", ["code", "english", "scripts"])
def test_the_trainers_agree_on_real_text(name: str):
    counts = count_chunks([corpus(name)[:20_000]], "gpt4")
    merges = naive(counts, 100)
    assert incremental(counts, 100) == merges
    assert len(merges) == 100


ADVERSARIAL = {
    "aaaa": "a" * 1000,
    "runs of many lengths": " ".join("a" * n for n in range(1, 40)),
    "two letters": "abba" * 50 + "baab" * 50,
    "all ties": "".join(map(chr, range(33, 127))),
    "one word": "internationalization",
    "one letter": "x",
    "empty": "",
    "only special tokens": "<|endoftext|>" * 10,
    "fibonacci": "abaababaabaababaababaabaababaabaab" * 3,
}


@pytest.mark.parametrize("pattern", ["gpt4", "none"])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_text_gives_the_same_merges_everywhere(name: str, pattern: str):
    text, special = ADVERSARIAL[name], ["<|endoftext|>"]
    trained = {
        algorithm: BPETokenizer.train(
            text, 400, pattern=pattern, special_tokens=special, algorithm=algorithm, workers=1
        )
        for algorithm in (
            ["naive", "incremental", "parallel"] if name == "aaaa" else ["naive", "incremental"]
        )
    }
    theirs = hugging_face_merges(hugging_face(text.split(special[0]), 399, pattern))
    assert [tokenizer.merges for tokenizer in trained.values()] == [theirs] * len(trained)
    if name in ("one letter", "empty", "only special tokens"):
        assert trained["naive"].vocab_size == 257


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(st.tuples(st.text("abc", min_size=1, max_size=30), st.integers(1, 5)), max_size=12),
    n_merges=st.integers(0, 60),
)
def test_random_words_give_the_same_merges_everywhere(words: list[tuple[str, int]], n_merges: int):
    counts = Counter[str]()
    for word, count in words:
        counts[word] += count
    merges = naive(counts, n_merges)
    assert incremental(counts, n_merges) == merges
    assert hugging_face_merges(hugging_face(list(counts.elements()), 256 + n_merges, "none")) == merges
    tokens: dict[int, tuple[int, ...]] = {i: (i,) for i in range(256)}
    for left, right, new in merges:
        tokens[new] = tokens[left] + tokens[right]
    assert len(set(tokens.values())) == 256 + len(merges)  # no two tokens have the same bytes


def test_the_example_of_1994_comes_out():  # aaabdaaabac is XdXac with X = ZY, Y = ab, Z = aa
    a, b = BYTES.index(b"a"), BYTES.index(b"b")
    assert naive({"aaabdaaabac": 1}, 3) == [(a, a, 256), (a, b, 257), (256, 257, 258)]


def test_of_equally_frequent_pairs_the_smallest_ids_are_merged_first():
    exclamation, z, space = map(BYTES.index, b"!z ")
    assert (exclamation, z, space) == (0, 89, 220)  # a space cannot be seen, so it comes after what can
    assert naive({" !z": 1}, 1) == [(exclamation, z, 256)]
    assert naive({"z!z !": 1}, 1) == [(exclamation, z, 256)]


def test_bytes_are_in_the_order_of_gpt2():
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = hugging_face([], 256).get_vocab()
    for character in map(chr, (*range(0x800), *range(0x800, 0xD800, 61), *range(0x10000, 0x110000, 4099))):
        [(spelled, _)] = letters.pre_tokenize_str(character)
        assert [ids[letter] for letter in spelled] == [BYTES.index(b) for b in character.encode()]


def test_each_merge_is_reported_with_its_count():
    seen = []
    tokenizer = BPETokenizer.train("low low lower", 259, on_merge=lambda *merge: seen.append(merge))
    assert seen == [(b"l", b"o", 3), (b"lo", b"w", 3), (b" ", b"low", 2)]
    assert [tokenizer.vocab[new] for _, _, new in tokenizer.merges] == [b"lo", b"low", b" low"]


def test_the_fast_trainer_does_a_thousandth_of_the_work(monkeypatch: pytest.MonkeyPatch):
    counts = count_chunks([python_source(1_000_000)], "gpt4")
    tokens, n_merges, looked_at = sum(len(chunk.encode()) for chunk in counts), 5000, 0
    merge = bpe_train._merge

    def spy(pair, new, words, numbers, *rest):
        nonlocal looked_at
        looked_at += len(numbers)
        return merge(pair, new, words, numbers, *rest)

    monkeypatch.setattr(bpe_train, "_merge", spy)
    assert len(incremental(counts, n_merges)) == n_merges
    assert (
        looked_at < 3 * tokens
    )  # a number is noted for each pair at first, and for two pairs at each place merged
    assert tokens * n_merges / looked_at > 1000


# Counting


PIECES = [*"ab'sST1 \n\t.<|>!\u0301é字😀", "<|e|>", "<|e|><|f|>", "a b"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, places=st.lists(st.integers(0, 60)), pattern=st.sampled_from(sorted(PATTERNS)))
def test_where_the_text_is_cut_into_pieces_changes_nothing(text: str, places: list[int], pattern: str):
    bounds = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    pieces = [text[start:stop] for start, stop in pairwise(bounds)]
    special = ["<|e|>", "<|e|><|f|>", "a b"]
    whole = count_chunks([text], pattern, special)
    assert count_chunks(pieces, pattern, special) == whole
    blocks = list(PATTERNS[pattern].blocks(pieces, special, size=3))
    assert "".join(blocks) == text
    assert sum((count_chunks([block], pattern, special) for block in blocks), Counter()) == whole


def test_several_processes_count_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bpe_train, "SHARE", 5000)  # so that the queue of shares fills up
    text = python_source(100_000) + "<|x|>" + corpus("scripts")[:50_000]
    pieces = [text[i : i + 777] for i in range(0, len(text), 777)]
    assert count_chunks_parallel(pieces, "gpt4", ["<|x|>"], workers=2) == count_chunks(
        [text], "gpt4", ["<|x|>"]
    )


def test_special_tokens_are_not_learned_from():
    text = "<|endoftext|>".join(["once upon a time"] * 20)
    tokenizer = BPETokenizer.train(text, 300, special_tokens=["<|endoftext|>"])
    assert tokenizer.merges == BPETokenizer.train_from_iterator(["once upon a time"], 299).merges
    assert tokenizer.special_tokens == {"<|endoftext|>": len(tokenizer.vocab)}
    assert not any(b"<" in token for token in tokenizer.vocab.values() if len(token) > 1)


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 255}, r"vocab_size \(255\) must be from 256 to 1114112"),
        ({"vocab_size": 257, "special_tokens": ["a", "b"]}, r"must be from 256 \+ 2 special tokens"),
        ({"vocab_size": sys.maxunicode + 2}, r"vocab_size \(1114112\)|must be from"),
        ({"algorithm": "fast"}, r"algorithm \('fast'\) must be one of naive, incremental, parallel"),
        ({"pattern": "gpt5"}, r"pattern \('gpt5'\) must be one of gpt2, gpt4"),
        ({"special_tokens": [""]}, r"special_tokens \(''\) must not be empty"),
        ({"algorithm": "parallel", "workers": 0}, r"workers \(0\) must be at least 1"),
        ({"text": "a\ud800"}, r"text \('\\ud800' at 1\) must be without lone surrogates"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        BPETokenizer.train(**({"text": "abc", "vocab_size": 300} | settings))
    assert "\n" not in str(error.value)


def test_a_random_order_of_the_chunks_gives_the_same_merges():
    counts = list(count_chunks([python_source(50_000)], "gpt4").items())
    merges = incremental(dict(counts), 500)
    random.Random(0).shuffle(counts)
    assert incremental(dict(counts), 500) == merges


def test_the_benchmark_measures_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    (tmp_path / "text.txt").write_text(python_source(20_000))
    monkeypatch.setattr(benchmark, "load_corpus", lambda name: tmp_path / "text.txt")
    config = benchmark.BenchmarkConfig(
        [300],
        300,
        0.02,
        library=False,
        repeats=1,
        memory=False,
        naive_seconds=0.3,
        out=tmp_path / "chart.png",
    )
    results = benchmark.run(config)
    assert results["train Python source, vocabulary 300"].keys() == {"ours", "Hugging Face", "rustbpe"}
    assert min(seconds for medians in results.values() for seconds in medians.values()) > 0
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert "44 merges change" in capsys.readouterr().out
    assert benchmark.memory_of("encode", "ours", "some text " * 100, 256) >= 0


if __name__ == "__main__":
    run_validation(__file__)
