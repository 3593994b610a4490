"""Checks of BPE, of the patterns that cut text, and of special tokens. --interactive shows the cuts."""

import itertools
import pickle
import tracemalloc
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from common.script import ask, run_validation
from phase1_foundation.project2_tokenizer import bpe, patterns
from phase1_foundation.project2_tokenizer.benchmark import hugging_face, hugging_face_merges
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer, merge_ranked
from phase1_foundation.project2_tokenizer.patterns import GPT2, PATTERNS
from phase1_foundation.project2_tokenizer.test_bpe_train import corpus, python_source
from phase1_foundation.project2_tokenizer.tokenizer import ChunkCache, Tokenizer, split_special

SPECIAL = ["<|end|>", "<|end|><|end|>", "<|sep|>"]
EXACT = [name for name, pattern in PATTERNS.items() if not pattern.normalize]
CHARACTERS = [  # one of each kind that a pattern treats in its own way
    *" \n\r\t'sStTLdmaAzZé/.,!?-_\"12²½Ⅷ٣ßſKǅʰª中文ि\u0301\u200b\u200d\u3000\xa0\x85\x1c\x0b\u2028\ufeff",
    *("ll", "ve", "RE", "😀", "🏽", "𝔘", "𐐨", "𝟙", "<|end|>", "<|sep|>"),
]
TEXTS = st.lists(st.sampled_from(CHARACTERS), max_size=50).map("".join) | st.text(max_size=50)


def trained(pattern: str = "gpt4") -> BPETokenizer:
    """Return a tokenizer that knows a little of everything."""
    if pattern not in TRAINED:
        text = python_source(30_000) + corpus("scripts")[:30_000] + "".join(CHARACTERS * 3) + "a" * 100
        TRAINED[pattern] = BPETokenizer.train(text, 1000, pattern=pattern, special_tokens=SPECIAL)
    return TRAINED[pattern]


TRAINED: dict[str, BPETokenizer] = {}


def as_tiktoken(tokenizer: BPETokenizer) -> tiktoken.Encoding:
    """Return tiktoken with the same ranks."""
    return tiktoken.Encoding(
        "ours",
        pat_str=PATTERNS[tokenizer.pattern].source or r"[\s\S]+",
        mergeable_ranks={token: i for i, token in tokenizer.vocab.items()},
        special_tokens={},
    )


# Round trips, and the same ids as elsewhere


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, pattern=st.sampled_from(EXACT), allowed=st.sampled_from([(), "all", SPECIAL[:1]]))
def test_any_text_comes_back(text: str, pattern: str, allowed: str | list[str]):
    tokenizer = trained(pattern)
    assert tokenizer.decode(tokenizer.encode(text, allowed)) == text


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=60) | TEXTS.map(str.encode).map(lambda b: b[1:-1]), pattern=st.sampled_from(EXACT)
)
def test_any_bytes_come_back(data: bytes, pattern: str):
    tokenizer = trained(pattern)
    assert tokenizer.decode_bytes(tokenizer.encode(data, "all")) == data


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, pattern=st.sampled_from(EXACT))
def test_ids_are_those_of_tiktoken_with_the_same_ranks(text: str, pattern: str):
    assert trained(pattern).encode(text) == as_tiktoken(trained(pattern)).encode_ordinary(text)


def test_a_megabyte_is_encoded_as_tiktoken_and_hugging_face_encode_it():
    text = python_source(700_000) + corpus("english")[:200_000] + corpus("scripts")[:100_000]
    ours = BPETokenizer.train(text[::-1][:100_000] + text[:400_000], 3000)
    theirs = hugging_face([text[::-1][:100_000] + text[:400_000]], 3000)
    assert hugging_face_merges(theirs) == ours.merges
    ids = ours.encode(text)
    assert ids == as_tiktoken(ours).encode_ordinary(text)
    assert ids == theirs.encode(text).ids
    assert len(text) == 1_000_000


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.integers(0, 3), max_size=40),
    pairs=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(4, 9)), unique_by=lambda m: m[:2]
    ),
)
def test_the_heap_merges_as_a_search_of_all_pairs_does(ids: list[int], pairs: list[tuple[int, int, int]]):
    ranks = {(left, right): rank for rank, (left, right, _) in enumerate(pairs)}  # in any order, also cyclic
    pairs = [merge for merge in pairs if merge[2] not in merge[:2]]
    ranks = {(left, right): rank for rank, (left, right, _) in enumerate(pairs)}
    expected = list(ids)
    while found := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(expected)) if pair in ranks]:
        rank, place = min(found)
        expected[place : place + 2] = [pairs[rank][2]]
    assert merge_ranked(ids, ranks, pairs) == expected


@pytest.mark.parametrize("text", ["a" * 100_000, "ab" * 50_000, " " * 100_000, "\n" * 100_000, "'s" * 50_000,
                                  "é" * 50_000, "字" * 30_000, "xyz" + "aab" * 30_000])  # fmt: skip
def test_a_long_text_without_a_space_takes_n_log_n_steps(text: str, monkeypatch: pytest.MonkeyPatch):
    popped = 0

    def count(heap: list[int]) -> int:
        nonlocal popped
        popped += 1
        return heappop(heap)

    heappop = bpe.heappop
    monkeypatch.setattr(bpe, "heappop", count)
    tokenizer = BPETokenizer.train(text[:1000], 260, pattern="none")
    ids = tokenizer.encode(text)
    assert len(text.encode()) / 10 < popped <= 3 * len(text.encode())  # a heap entry at first, two per merge
    assert ids == as_tiktoken(tokenizer).encode_ordinary(text)


# Patterns


@settings(max_examples=250, deadline=None)
@given(text=TEXTS, name=st.sampled_from([name for name in EXACT if name != "none"]))
def test_the_fast_engine_cuts_as_the_published_expression_does(text: str, name: str):
    assert PATTERNS[name].split(text) == regex.findall(PATTERNS[name].source, text)


@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.sampled_from(CHARACTERS), max_size=50).map("".join))
def test_gpt2_and_smollm_cut_as_hugging_face_does_in_steps(text: str):
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    smollm = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    for name, steps in {"gpt2": gpt2, "smollm": smollm}.items():
        spans = [span for _, span in steps.pre_tokenize_str(text)]
        assert [text[start:stop] for start, stop in spans] == PATTERNS[name].split(text)


@pytest.mark.parametrize(
    ("pattern", "chunks"),
    [
        ("gpt2", "We|'ll| fix|  | it|:|\n\n| x|.|append|(|12345|)| camelCase| IT|'|S"),
        ("gpt4", "We|'ll| fix|  | it|:\n\n| x|.append|(|123|45|)| camelCase| IT|'S"),
        ("o200k", "We'll| fix|  | it|:\n\n| x|.append|(|123|45|)| camel|Case| IT'S"),
        ("qwen2", "We|'ll| fix|  | it|:\n\n| x|.append|(|1|2|3|4|5|)| camelCase| IT|'S"),
        ("smollm", "We|'ll| fix|  | it|:|\n\n| x|.|append|(|1|2|3|4|5|)| camelCase| IT|'|S"),
    ],
)
def test_each_pattern_cuts_as_its_comments_say(pattern: str, chunks: str):
    assert PATTERNS[pattern].split("We'll fix   it:\n\n x.append(12345) camelCase IT'S") == chunks.split("|")


def test_all_characters_are_classified_alike_by_both_engines():
    characters = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x10000))))
    for name in ("gpt2", "gpt4", "o200k", "smollm"):
        for text in (characters, " ".join(characters), "'s'".join(characters)):
            assert PATTERNS[name].split(text) == regex.findall(PATTERNS[name].source, text)


def test_one_emoji_leaves_the_other_blocks_to_the_fast_engine(monkeypatch: pytest.MonkeyPatch):
    slow, text = [], "word " * 20_000 + "😀 " + "word " * 20_000
    findall = regex.findall
    monkeypatch.setattr(
        regex, "findall", lambda source, block: slow.append(len(block)) or findall(source, block)
    )
    assert PATTERNS["gpt4"].split(text) == findall(PATTERNS["gpt4"].source, text)
    assert 0 < sum(slow) < 20_000


@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(st.sampled_from(["e", "\u0301", "é", "\u0958", "ᄀ", "ᅡ", "ᆨ", "!", " ", "\u037e", "1"])).map(
        "".join
    )
)
def test_normalizing_blocks_is_normalizing_the_text(text: str):
    blocks = PATTERNS["qwen2"].blocks(text, size=1)
    assert [chunk for block in blocks for chunk in PATTERNS["qwen2"].split(block)] == PATTERNS["qwen2"].split(
        text
    )


# Special tokens


def test_special_tokens_are_text_unless_allowed():
    tokenizer = trained()
    end, sep = tokenizer.special_tokens["<|end|>"], tokenizer.special_tokens["<|sep|>"]
    text = "a<|end|>b<|sep|>"
    assert not {end, sep} & set(tokenizer.encode(text))
    assert tokenizer.encode(text, ["<|end|>"])[:2] == [*tokenizer.encode("a"), end]
    assert sep not in tokenizer.encode(text, {"<|end|>"})
    assert tokenizer.encode(text, "all") == [*tokenizer.encode("a"), end, *tokenizer.encode("b"), sep]
    assert tokenizer.decode(tokenizer.encode(text, "all")) == tokenizer.decode(tokenizer.encode(text)) == text


def test_of_overlapping_special_tokens_the_longest_is_meant():
    tokenizer = trained()
    end, twice, _ = tokenizer.special_tokens.values()
    assert tokenizer.encode("<|end|>" * 3, "all") == [twice, end]
    assert tokenizer.encode("<|end|>" * 3, ["<|end|>"]) == [end] * 3
    assert list(split_special("abcd", ["ab", "abc", "d"])) == [("abc", True), ("d", True)]


def test_a_text_without_special_tokens_is_searched_for_them_once(monkeypatch: pytest.MonkeyPatch):
    searched = 0

    class Counting:
        def finditer(self, text: str, start: int, stop: int) -> list:
            nonlocal searched
            searched += stop - start
            return []

    monkeypatch.setattr(patterns, "special_pattern", lambda names: Counting())
    text = "no special token here " * 10_000
    assert len(list(PATTERNS["gpt4"].blocks([text], SPECIAL))) > 10
    assert searched < 1.1 * len(text)  # not, for each block, as far as the end of the text


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        (["<|no|>"], r"allowed_special \('<\|no\|>'\) must be one of <\|end\|>, "),
        ("<|end|>", r'allowed_special \(.*\) must be "all" or a collection'),
    ],
)
def test_unknown_special_tokens_are_refused(allowed: str | list[str], message: str):
    with pytest.raises(ValueError, match=message):
        trained().encode("a", allowed)


# Streams and memory


@settings(max_examples=100, deadline=None)
@given(text=TEXTS, places=st.lists(st.integers(0, 50)), pattern=st.sampled_from(sorted(PATTERNS)))
def test_a_stream_gives_the_ids_of_the_whole(text: str, places: list[int], pattern: str):
    text *= 500  # of several blocks
    bounds = [0, *sorted(min(400 * place, len(text)) for place in places), len(text)]
    pieces = [text[start:stop] for start, stop in itertools.pairwise(bounds)]
    tokenizer = trained(pattern)
    assert list(tokenizer.encode_iterable(pieces, "all")) == tokenizer.encode(text, "all")


@pytest.mark.parametrize("piece", ["a long day's journey into night. ", "a", "<|end|>"])
def test_the_memory_of_a_stream_does_not_grow_with_it(piece: str):
    tokenizer, peaks = trained(), []
    piece *= 1000 // len(piece)
    for pieces in (30, 90):
        tracemalloc.start()
        stream = tokenizer.encode_iterable(itertools.repeat(piece, pieces), "all", longest=500)
        length = sum(len(tokenizer.decode_bytes([i])) for i in stream)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert length == pieces * len(piece)
    assert peaks[1] < 1.1 * peaks[0] + 15_000  # the additional text alone has 60,000 bytes


def test_only_a_stretch_that_is_too_long_is_cut_through():
    tokenizer = trained()
    text = "a" * 20_000
    assert list(tokenizer.encode_iterable([text], longest=30_000)) == tokenizer.encode(text)
    pieces = ["x" * 1000, "<|end|>", "y" * 99]
    for pattern, first in {"gpt4": "x" * 1000, "none": "x" * 1000 + "<|end|>"}.items():
        assert next(PATTERNS[pattern].blocks(pieces, ["<|end|>"], size=100, longest=1003)) == first


def test_the_cache_is_bounded_and_may_forget():
    asked: list[str] = []
    cache = ChunkCache(lambda chunk: (asked.append(chunk) or len(chunk),), entries=3, length=4)
    assert [cache[chunk] for chunk in ("a", "bb", "a", "ccc", "a", "long one", "long one")] == [
        (1,), (2,), (1,), (3,), (1,), (8,), (8,)
    ]  # fmt: skip
    assert asked == ["a", "bb", "ccc", "long one", "long one"]
    assert set(cache) == {"a", "bb", "ccc"}
    assert cache["dddd"] == (4,)
    assert set(cache) == {"dddd"}


def test_a_tokenizer_with_a_small_cache_gives_the_same_ids():
    tokenizer = trained()
    forgetful = BPETokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, tokenizer.pattern)
    forgetful._cache.entries = 5
    text = python_source(20_000)
    assert forgetful.encode(text) == tokenizer.encode(text)
    assert len(forgetful._cache) <= 5


# Other people's vocabularies, errors, and the interface


def test_ids_may_be_in_any_order_and_bytes_may_be_missing():
    tokenizer = BPETokenizer({7: b"a", 3: b"b", 9: b"ab"}, [(7, 3, 9)], {"<s>": 0})
    assert tokenizer.encode("ab\x04ba") == [9, 3, 7]  # there is no token for the byte 4, so it is left out
    assert tokenizer.encode("<s>ab", "all") == [0, 9]
    assert tokenizer.vocab_size == 10


def test_a_chunk_that_is_a_token_needs_no_merges_if_they_are_ignored():
    vocab = {0: b"a", 1: b"b", 2: b"ab", 3: b"c", 4: b"abc"}
    assert BPETokenizer(vocab, [(0, 1, 2)]).encode("abc") == [2, 3]
    assert BPETokenizer(vocab, [(0, 1, 2)], ignore_merges=True).encode("abc,") == [4]


@pytest.mark.parametrize("text", ["\ud800", "ab\udc80", "x" * 40_000 + "\udfff", "😀"[:0] + "\ud83d\ude00"])
def test_half_a_character_is_refused(text: str):
    with pytest.raises(
        ValueError, match=r"text \('\\ud\w\w\w' at \d+\) must be without lone surrogates"
    ) as error:
        trained().encode(text)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="must be without lone surrogates"):
        list(trained().encode_iterable(["abc", text]))


def test_bytes_that_are_no_text_do_not_let_half_a_character_in():
    assert trained().decode_bytes(trained().encode(b"\x80")) == b"\x80"
    with pytest.raises(ValueError, match="must be without lone surrogates"):
        trained().encode("\udc80")  # which is what the byte 0x80 is called inside


@pytest.mark.parametrize("i", [-1, 1000, 5000])
def test_an_unknown_id_is_refused(i: int):
    with pytest.raises(ValueError, match=rf"id \({i}\) must be one of the 1000 in the vocabulary"):
        trained().decode([65, i])


def test_what_is_not_utf8_is_decoded_as_asked():
    ids = trained().encode("é".encode()[:1] + b"a")
    assert trained().decode(ids) == "\ufffda"
    assert trained().decode(ids, errors="ignore") == "a"
    with pytest.raises(UnicodeDecodeError):
        trained().decode(ids, errors="strict")


def test_an_unknown_pattern_is_refused():
    with pytest.raises(ValueError, match=r"pattern \('gpt9'\) must be one of gpt2, gpt4, o200k"):
        BPETokenizer({}, [], {}, "gpt9")


def test_a_tokenizer_can_be_saved_loaded_and_sent_to_another_process(tmp_path: Path):
    tokenizer = trained()
    tokenizer.save(tmp_path / "tokenizer.json")
    for back in (BPETokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert back.encode("Hello, <|end|>", "all") == tokenizer.encode("Hello, <|end|>", "all")
        assert back.encode_batch(["a b", b"\xff", ""]) == [
            tokenizer.encode(text) for text in ("a b", b"\xff", "")
        ]


def test_the_interface_asks_for_every_method():
    assert isinstance(trained(), Tokenizer)
    assert not isinstance("text", Tokenizer)

    class Unfinished(Tokenizer):
        special_tokens = {}  # noqa: RUF012

    with pytest.raises(TypeError, match=r"decode_bytes.*encode.*train_from_iterator.*vocab_size"):
        Unfinished()


def test_the_published_expressions_are_written_out_whole():
    assert GPT2 == r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    cl100k = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"  # as in tiktoken today; it cuts in the same way
    )
    text = "".join(CHARACTERS) * 3 + corpus("scripts")[:20_000] + "  \n \r\n\n  x   "
    today = tiktoken.Encoding(
        "x", pat_str=cl100k, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    assert today.encode_ordinary(text) == list(text.encode())
    assert PATTERNS["gpt4"].split(text) == regex.findall(cl100k.replace("$", r"\Z"), text)


def interact() -> None:
    """Cut the typed text into chunks with each pattern."""
    for text in ask("text> "):
        for name, pattern in PATTERNS.items():
            print(f"{name:8}", "|".join(pattern.split(text)))


if __name__ == "__main__":
    run_validation(__file__, interact)
