r"""Checks of the exchange with Hugging Face, tiktoken, GPT-2's files and GGUF, against the real libraries."""

import base64
import functools
import inspect
import json
import os
import random
import re
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from common.files import DATA
from common.script import run_validation
from phase1_foundation.project2_tokenizer import interop
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.gguf_metadata import read_gguf_metadata
from phase1_foundation.project2_tokenizer.interop import (
    CUTS,
    LETTERS,
    load_gguf,
    load_gpt2,
    load_hf,
    open_tokenizer,
    save_hf,
    to_hf,
    to_letters,
)
from phase1_foundation.project2_tokenizer.patterns import GPT4, PATTERNS
from phase1_foundation.project2_tokenizer.test_token_file import check_refused_or_works, mutate
from phase1_foundation.project2_tokenizer.tiktoken_ranks import (
    load_tiktoken,
    recover_merges,
    save_tiktoken,
    to_tiktoken,
)

SPECIAL = ["<|endoftext|>", "<|end|>", "<|end|><|end|>", "日本"]
VARIED = [
    "",
    " ",
    "Hello, world! I'm sure THEY'LL say it's fine; don't you'Ve 'S 're ſ'ſ?",
    "a   b    c \t\t d\n\n\n   e\r\n\r\n  f  ",
    "1234567890 3.14159 1,000,000   12 ab   34 x  1 ²³½ ٣٤٥ Ⅷ 四五 १२३ 12²3",
    "日本語のテキスト、カタカナー。你好，世界！한국어 텍스트입니다",
    "😀👍🏽🇺🇸❤️👨‍👩‍👧‍👦 \U0010ffff \U00040000",
    "Россия и Україна; مرحبا بالعالم; Ελλάδα; हिन्दी में; ภาษาไทย; Việt Nam",
    "zero\u200bwidth\u200c\u200d\ufeff nbsp\u00a0x\u2003em\u3000ideo\u2028ls\u2029ps\x85nel",
    "café cafe\u0301 Å A\u030a \u212b \ufb01",
    "def f(x):\n\tif x:\n        return x ** 2  # comment\n\n\nclass CamelCaseHTMLParser:\n    pass\n",
    "a\x00b\x01\x04\x06\x13c\x7f",
    "<|endoftext|>x<|end|><|end|><|end|> <|end <|END|>",
    "a" * 500 + "-" * 70 + " " * 50 + "x",
]
TEXT = "".join(VARIED) * 3 + inspect.getsource(functools)[:8000]
ALPHABET = "ab XY'sS1²٣.,-\n\r\t \u00a0\u2028éß日本😀\u0301\u200d<|end>\x04"
TEXTS = st.one_of(st.text(max_size=40), st.text(alphabet=ALPHABET, max_size=40))


@functools.cache
def trained(pattern: str) -> BPETokenizer:
    return BPETokenizer.train(TEXT, 600, pattern=pattern, special_tokens=SPECIAL)


@functools.cache
def exported(pattern: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(to_hf(trained(pattern))))


def hf_ids(theirs: tokenizers.Tokenizer, text: str, specials: bool) -> list[int]:
    theirs.encode_special_tokens = not specials  # their name for "encode them as if they were text"
    return theirs.encode(text, add_special_tokens=False).ids


def same(a: BPETokenizer, b: BPETokenizer) -> bool:
    names = ("vocab", "merges", "special_tokens", "pattern", "ignore_merges")
    return all(getattr(a, name) == getattr(b, name) for name in names)


# tokenizer.json


@pytest.mark.parametrize("pattern", CUTS)
@pytest.mark.parametrize("specials", [True, False])
def test_an_exported_tokenizer_json_encodes_as_ours(pattern: str, specials: bool):
    for text in VARIED:
        assert trained(pattern).encode(text, "all" if specials else ()) == hf_ids(
            exported(pattern), text, specials
        )


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, pattern=st.sampled_from(list(CUTS)), specials=st.booleans())
def test_an_exported_tokenizer_json_encodes_any_text_as_ours(text: str, pattern: str, specials: bool):
    if all(
        unicodedata.ucd_3_2_0.category(letter) != "Cn" for letter in text
    ):  # all libraries know Unicode 3.2
        ours = trained(pattern).encode(text, "all" if specials else ())
        assert ours == hf_ids(exported(pattern), text, specials)


@pytest.mark.parametrize("pattern", CUTS)
def test_transformers_loads_the_file_and_decodes_too(pattern: str, tmp_path: Path):
    save_hf(trained(pattern), tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in VARIED:
        ids = trained(pattern).encode(text, "all")
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == trained(pattern).decode(ids)
    assert len(theirs) == trained(pattern).vocab_size


@pytest.mark.parametrize("pattern", CUTS)
def test_a_tokenizer_json_comes_back_as_it_was(pattern: str, tmp_path: Path):
    save_hf(trained(pattern), tmp_path / "tokenizer.json")
    assert same(load_hf(tmp_path / "tokenizer.json"), trained(pattern))
    assert same(open_tokenizer(tmp_path), trained(pattern))
    exported(pattern).save(str(tmp_path / "theirs.json"))  # as the library writes it
    assert same(open_tokenizer(tmp_path / "theirs.json"), trained(pattern))


def test_possessive_quantifiers_stay_out_of_tokenizer_json():
    # In tiktoken \p{N}{1,3}+ takes at most three digits; for Hugging Face's engine it takes all, by threes.
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}+"), "isolated")
    assert split.pre_tokenize_str("1234567") == [("1234567", (0, 7))]
    for _, regexes in CUTS.values():
        assert not any(re.search(r"([+*?]|\{\d+(,\d*)?\})\+", regex) for regex in regexes)


def test_every_pattern_has_a_form_in_tokenizer_json():
    assert CUTS.keys() == PATTERNS.keys()
    assert all(
        (normalization == "NFC") == PATTERNS[name].normalize for name, (normalization, _) in CUTS.items()
    )


def test_a_special_token_must_not_look_like_another_token():
    tokenizer = BPETokenizer(trained("gpt2").vocab, trained("gpt2").merges, {"Ġ": 999}, "gpt2")
    with pytest.raises(
        ValueError, match=r"special_tokens \('Ġ'\) must not look like vocab\[\d+\] in tokenizer.json"
    ):
        to_hf(tokenizer)


def stage(kind: str, **settings: Any) -> dict[str, Any]:
    return {"type": kind, **settings}


BYTE_LEVEL = stage("ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
WITH_REGEX = BYTE_LEVEL | {"use_regex": True}
SPLIT = stage("Split", pattern={"Regex": GPT4}, behavior="Isolated", invert=False)


@pytest.mark.parametrize(
    ("pre_tokenizer", "pattern"),
    [
        (WITH_REGEX, "gpt2"),  # as in GPT-2
        (
            stage("Sequence", pretokenizers=[stage("Digits", individual_digits=True), WITH_REGEX]),
            "smollm",
        ),  # SmolLM2
        (stage("Sequence", pretokenizers=[SPLIT, BYTE_LEVEL]), "gpt4"),  # Llama 3
        (
            stage("Sequence", pretokenizers=[SPLIT | {"behavior": "Removed", "invert": True}, BYTE_LEVEL]),
            "gpt4",
        ),
        (BYTE_LEVEL, "none"),
    ],
)
def test_the_pre_tokenizers_of_real_models_are_understood(pre_tokenizer: dict, pattern: str, tmp_path: Path):
    fields = to_hf(trained(pattern)) | {"pre_tokenizer": pre_tokenizer}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(fields))
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_hf(tmp_path / "tokenizer.json")
    assert ours.pattern == pattern
    assert all(ours.encode(text, "all") == hf_ids(theirs, text, True) for text in VARIED)


def refuse(path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    fields = json.loads(json.dumps(to_hf(trained("gpt2"))))
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message) as error:
        load_hf(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("model", None, r"model \(None\) must be an object"),
        ("model.type", "Unigram", r"model.type \('Unigram'\) must be \"BPE\""),
        ("model.dropout", 0.1, r"model.dropout \(0.1\) must be null"),
        ("model.byte_fallback", True, r"model.byte_fallback \(True\) must be false"),
        ("model.unk_token", "<unk>", r"model.unk_token \('<unk>'\) must be null"),
        ("model.continuing_subword_prefix", "##", r"model.continuing_subword_prefix \('##'\) must be null"),
        ("model.vocab", {}, r"merges\[0\] .* must be two tokens that make a third"),
        ("model.vocab", {"a": 0, "b": 0}, r"vocab \(2 tokens\) must have as many ids, not 1"),
        ("model.vocab", {"日": 0}, r"vocab\[0\] \('日'\) must be spelled in GPT-2's 256 letters for bytes"),
        ("model.vocab", {"a": 1e3}, r"vocab\['a'\] \(1000.0\) must be a whole number"),
        ("model.merges", None, r"merges \(None\) must be a list"),
        ("model.merges", ["a b c"], r"merges\[0\] .* must be two tokens that make a third"),
        ("model.merges", [["a"]], r"merges\[0\] .* must be two tokens that make a third"),
        ("model.merges", [[["a"], "b"]], r"merges\[0\] .* must be two tokens that make a third"),
        ("model.merges", [7], r"merges\[0\] \(7\) must be two tokens that make a third"),
        (
            "added_tokens",
            [{"id": 5, "content": "!"}],
            r"special token \('!': 5\) must have its id in vocab, 0",
        ),
        (
            "added_tokens",
            [{"id": 1e9, "content": "x"}],
            r"added_tokens\[0\].id \(1000000000.0\) must be a whole number",
        ),
        (
            "added_tokens",
            [{"id": 999, "content": "x", "lstrip": True}],
            r"added_tokens\[0\].lstrip \(True\) must be false",
        ),
        ("added_tokens", ["x"], r"added_tokens\[0\] \('x'\) must be an object"),
        (
            "normalizer",
            {"type": "Lowercase"},
            r"pre_tokenizer \(.*Lowercase.*\) must cut as one of gpt2, gpt4",
        ),
        ("pre_tokenizer", None, r"pre_tokenizer \(\{\}\) must be Split or Digits, and ByteLevel at last"),
        (
            "pre_tokenizer",
            stage("Whitespace"),
            r"pre_tokenizer .* must be Split or Digits, and ByteLevel at last",
        ),
        (
            "pre_tokenizer",
            WITH_REGEX | {"add_prefix_space": True},
            r"must be Split or Digits, and ByteLevel at last",
        ),
        (
            "pre_tokenizer",
            stage("Sequence", pretokenizers=[SPLIT | {"pattern": {"Regex": "(a+)+$"}}, BYTE_LEVEL]),
            r"pre_tokenizer \(.*\(a\+\)\+\$.*\) must cut as one of gpt2, gpt4",  # never compiled
        ),
    ],
)
def test_a_tokenizer_json_that_we_cannot_follow_is_refused(
    where: str, value: Any, message: str, tmp_path: Path
):
    def change(fields: dict[str, Any]) -> None:
        *path, name = where.split(".")
        for part in path:
            fields = fields[part]
        fields[name] = value

    refuse(tmp_path / "tokenizer.json", change, message)


@settings(max_examples=200, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_a_mutated_tokenizer_json_is_refused_in_one_line_or_works(rng: random.Random, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "tokenizer.json"
    path.write_text(json.dumps(mutate(small_hf(), rng)))
    check_refused_or_works(path, load_hf)


@functools.cache
def small() -> BPETokenizer:
    return BPETokenizer.train("the cat sat on the mat", 262, special_tokens=["<|end|>"], pattern="gpt2")


@functools.cache
def small_hf() -> dict[str, Any]:
    return to_hf(small())


# tiktoken


def without_overlap(tokenizer: BPETokenizer) -> BPETokenizer:
    special = {name: i for name, i in tokenizer.special_tokens.items() if name != "<|end|><|end|>"}
    return BPETokenizer(tokenizer.vocab, tokenizer.merges, special, tokenizer.pattern)


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "o200k", "none"])
def test_exported_ranks_encode_in_tiktoken_as_ours(pattern: str):
    ours = without_overlap(trained(pattern))
    theirs = tiktoken.Encoding(**to_tiktoken(ours))
    for text in VARIED:
        assert theirs.encode(text, allowed_special="all") == ours.encode(text, "all")
        assert theirs.encode(text, disallowed_special=()) == ours.encode(text)


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "o200k", "none"])
def test_a_rank_file_is_read_by_tiktoken_and_gives_the_merges_back(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ours, path = without_overlap(trained(pattern)), tmp_path / "ours.tiktoken"
    save_tiktoken(ours, path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # no copies elsewhere
    assert load_tiktoken_bpe(str(path)) == {token: i for i, token in ours.vocab.items()}
    back = load_tiktoken(path, pattern, ours.special_tokens)
    assert (back.vocab, back.merges, back.special_tokens) == (ours.vocab, ours.merges, ours.special_tokens)
    assert all(back.encode(text, "all") == ours.encode(text, "all") for text in VARIED)


def ranks_of(tokens: list[bytes]) -> dict[int, bytes]:
    return dict(enumerate([bytes([b]) for b in range(256)] + tokens))


def test_a_token_that_no_merge_makes_matches_a_whole_chunk_only(tmp_path: Path):
    # Llama 3 has 588 such tokens. Here bc is joined first, and neither a + bc nor bc + d is a token.
    vocab = ranks_of([b"bc", b"abcd", b"ab", b"cd", b" abc"])
    assert [vocab[new] for *_, new in recover_merges(vocab)] == [b"bc", b"ab", b"cd"]
    path = tmp_path / "x.tiktoken"
    ranks = {token: i for i, token in vocab.items()}
    theirs = tiktoken.Encoding("x", pat_str=GPT4, mergeable_ranks=ranks, special_tokens={})
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in vocab.items()))
    ours = load_tiktoken(path)
    save_hf(ours, tmp_path / "tokenizer.json")
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("abcd", "abcde", " abc", "xabcd", "abcdabcd", " abcd abc ab bc"):
        assert ours.encode(text) == theirs.encode(text) == hf.encode(text).ids, text
    assert ours.encode("abcd") == [257]
    assert same(load_hf(tmp_path / "tokenizer.json"), ours)


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(
        st.binary(min_size=2, max_size=6).map(lambda t: bytes(97 + b % 3 for b in t)), unique=True
    ),
    text=st.text("abc ", max_size=30),
)
def test_merges_recovered_from_any_ranks_encode_as_tiktoken(tokens: list[bytes], text: str):
    vocab = ranks_of(
        tokens
    )  # a random vocabulary, which no training would give: parts may come after the whole
    ours = BPETokenizer(vocab, recover_merges(vocab), {}, "gpt4", ignore_merges=True)
    ranks = {token: i for i, token in vocab.items()}
    theirs = tiktoken.Encoding("x", pat_str=GPT4, mergeable_ranks=ranks, special_tokens={})
    assert ours.encode(text) == theirs.encode(text)


def test_what_tiktoken_would_encode_otherwise_is_refused():
    ours = trained("gpt4")
    vocab = {i: token for i, token in ours.vocab.items() if token != b"\x04"}
    with pytest.raises(ValueError, match=r"vocab \(lacks 1 bytes\) must hold all 256 for tiktoken"):
        to_tiktoken(BPETokenizer(vocab, ours.merges, {}, "gpt4"))
    with pytest.raises(ValueError, match=r"merges \(\d+\) must be in the order of their ids"):
        to_tiktoken(BPETokenizer(ours.vocab, ours.merges[::-1], {}, "gpt4"))
    with pytest.raises(
        ValueError, match=r"special_tokens \('<\|end\|>'\) must not begin another one for tiktoken"
    ):
        to_tiktoken(ours)  # which takes the one or the other, by the order of a hash table
    with pytest.raises(ValueError, match=r"pattern \(qwen2\) must not normalize text for tiktoken"):
        to_tiktoken(trained("qwen2"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"vocab \(empty\)"),
        (b"YQ== 0\nYg==\n", r"line 2 \('Yg=='\) must be a token in base64 and its rank"),
        (b"YQ== 0\nY!!g== 1\n", r"line 2 .* must be a token in base64 and its rank"),
        (b"YQ== 0\nYg== x\n", r"line 2 .* must be a token in base64 and its rank"),
        (b"YQ== 0\nYg== 0\n", r"line 2 .* must have a rank of its own"),
        (b"YQ== 0\nYg== -1\n", r"line 2 \(-1\) must be a whole number"),
        (b"YQ== 0\nYg== 99999999999\n", r"line 2 \(99999999999\) must be a whole number"),
        (b"YQ== 0\nYQ== 1\n", r"vocab\[1\] \(b'a'\) must differ from vocab\[0\]"),
        (b"YQ== 0\n" + b"YWFh" * 1000 + b" 1\n", r"line 2 .* 1024 bytes at most"),
        (b"YQ== 0\n\xff", r"byte 7 \(0xff\) must be UTF-8"),
    ],
)
def test_a_broken_rank_file_gives_one_clear_line(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "x.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tiktoken(path)
    assert "\n" not in str(error.value)


# GPT-2's two files


def write_gpt2(tokenizer: BPETokenizer, folder: Path) -> tuple[Path, Path]:
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps(to_hf(tokenizer)["model"]["vocab"]))
    lines = [f"{left} {right}" for left, right in to_hf(tokenizer)["model"]["merges"]]
    merges.write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    return vocab, merges


def test_gpt2s_files_are_read_as_transformers_reads_them(tmp_path: Path):
    text = "## ## ### #version #version 日本 the cat " * 5
    ours = BPETokenizer.train(text, 290, pattern="gpt2", special_tokens=["<|endoftext|>"])
    vocab, merges = write_gpt2(ours, tmp_path)
    assert "\n# #\n" in merges.read_text()  # a merge, not a comment
    back = load_gpt2(vocab, merges)
    assert same(back, ours)
    assert same(open_tokenizer(tmp_path), ours)
    theirs = transformers.GPT2Tokenizer(vocab=str(vocab), merges=str(merges))
    for text in [*VARIED, "## #version"]:
        assert theirs.encode(text) == back.encode(text, "all")


def test_broken_gpt2_files_give_one_clear_line(tmp_path: Path):
    vocab, merges = write_gpt2(small(), tmp_path)
    merges.write_text(merges.read_text() + "zz zz\n")
    with pytest.raises(
        ValueError, match=r"merges\[\d+\] \(\['zz', 'zz'\]\) must be two tokens that make a third"
    ):
        load_gpt2(vocab, merges)
    with pytest.raises(FileNotFoundError):
        load_gpt2(vocab, tmp_path / "nothing")
    vocab.write_text(vocab.read_text()[:100])
    with pytest.raises(ValueError, match="must be JSON"):
        load_gpt2(vocab, merges)


# GGUF


def write_gguf(tokenizer: BPETokenizer, path: Path, pre: str | list[str] | None, **changed: Any) -> None:
    names = {i: to_letters(token) for i, token in tokenizer.vocab.items()}
    tokens = names | {i: name for name, i in tokenizer.special_tokens.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(changed.get("model", "gpt2"))
    if isinstance(pre, list):
        writer.add_array("tokenizer.ggml.pre", pre)
    elif pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(changed.get("tokens", [tokens[i] for i in range(len(tokens))]))
    writer.add_token_types(
        changed.get("types", [3 if i in tokenizer.special_tokens.values() else 1 for i in sorted(tokens)])
    )
    writer.add_token_merges(
        changed.get("merges", [f"{names[left]} {names[right]}" for left, right, _ in tokenizer.merges])
    )
    for kind in (
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float32",
        "float64",
        "bool",
    ):
        getattr(writer, f"add_{kind}")(f"test.{kind}", 1)
    writer.add_array("test.floats", [0.5, -1.0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_the_head_of_a_gguf_file_is_read_as_the_official_reader_reads_it(tmp_path: Path):
    write_gguf(small(), tmp_path / "x.gguf", "gpt-2")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    theirs = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert read_gguf_metadata(tmp_path / "x.gguf") == theirs
    assert len(theirs) == 18


@pytest.mark.parametrize(
    ("pre", "pattern"), [("gpt-2", "gpt2"), ("smollm", "smollm"), ("llama-bpe", "gpt4"), ("qwen2", "qwen2")]
)
def test_a_vocabulary_comes_back_out_of_a_gguf_file(pre: str, pattern: str, tmp_path: Path):
    write_gguf(trained(pattern), tmp_path / "x.gguf", pre)
    back = open_tokenizer(tmp_path / "x.gguf")
    assert (back.vocab, back.merges, back.pattern) == (
        trained(pattern).vocab,
        trained(pattern).merges,
        pattern,
    )
    assert back.special_tokens == trained(pattern).special_tokens
    assert back.ignore_merges == (pre == "llama-bpe")
    assert load_gguf(tmp_path / "x.gguf", "none").pattern == "none"


@pytest.mark.parametrize(
    ("pre", "changed", "message"),
    [
        ("gpt-2", {"model": "llama"}, r"tokenizer.ggml.model \('llama'\) must be gpt2"),
        (
            "chameleon",
            {},
            r"tokenizer.ggml.pre \('chameleon'\) must be one of gpt-2, gpt-4o, dbrx, llama-bpe",
        ),
        (None, {}, r"tokenizer.ggml.pre \(None\) must be one of"),
        (["gpt-2"], {}, r"tokenizer.ggml.pre \(\['gpt-2'\]\) must be one of"),
        ("gpt-2", {"types": [1]}, r"must be as many as types \(1\)"),
        (
            "gpt-2",
            {"tokens": ["a", "a"], "types": [1, 1]},
            r"tokens \(1 different ones of 2\) must be as many as types",
        ),
        ("gpt-2", {"merges": ["a"]}, r"merges\[0\] \(\['a'\]\) must be two tokens that make a third"),
        ("gpt-2", {"merges": ["q q"]}, r"merges\[0\] \(\['q', 'q'\]\) must be two tokens that make a third"),
    ],
)
def test_a_gguf_file_that_we_cannot_follow_is_refused(
    pre: str | None, changed: dict, message: str, tmp_path: Path
):
    write_gguf(small(), tmp_path / "x.gguf", pre, **changed)
    with pytest.raises(ValueError, match=message) as error:
        load_gguf(tmp_path / "x.gguf")
    assert "\n" not in str(error.value)


HEAD = b"GGUF" + (3).to_bytes(4, "little") + bytes(8)  # magic, version, no tensors
ONE = (1).to_bytes(8, "little")
FLAG = ONE + b"k" + (7).to_bytes(4, "little") + b"\1"  # a name and a truth value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"magic \(4 bytes\) must fit in the 0 bytes that are left"),
        (b"GGML" + bytes(20), r"content \(no GGUF at its beginning\) must be a GGUF file"),
        (b"GGUF" + ONE[:4] + bytes(16), r"version \(1\) must be 2 or 3"),
        (HEAD + (2).to_bytes(8, "little") + FLAG + FLAG, r"name \(k\) must stand once"),
        (HEAD + ONE + FLAG.replace(b"k", b"\xff"), r"name \(b'\\xff'\) must be UTF-8"),
        (HEAD + ONE + FLAG.replace(b"\7", b"\15"), r"k \(type 13\) must have one of the types 0 to 12"),
    ],
)
def test_a_broken_head_gives_one_clear_line(content: bytes, message: str, tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_gguf_metadata(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(HEAD + ONE + FLAG)
    assert read_gguf_metadata(tmp_path / "x.gguf") == {"k": True}


def test_a_list_that_claims_to_be_endless_takes_no_memory(tmp_path: Path):
    # Historic bug: with these 49 bytes gguf.GGUFReader 0.19 fills the machine's memory.
    head = HEAD + ONE + ONE + b"k" + (9).to_bytes(4, "little")
    for kind, message in (
        (4, r"k \(4398046511104 bytes\) must fit"),
        (8, r"k \(8 bytes\) must fit"),
        (9, "list of lists"),
    ):
        path = tmp_path / f"{kind}.gguf"
        path.write_bytes(head + kind.to_bytes(4, "little") + (1 << 40).to_bytes(8, "little"))
        with pytest.raises(ValueError, match=message):
            read_gguf_metadata(path)


def test_every_truncated_gguf_file_is_refused(tmp_path: Path):
    write_gguf(small(), tmp_path / "x.gguf", "gpt-2")
    content = (tmp_path / "x.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in range(0, len(content), 29):
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match="must fit in the"):
            read_gguf_metadata(cut)


@functools.cache
def small_gguf() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(small(), Path(folder) / "x.gguf", "gpt-2")
        return (Path(folder) / "x.gguf").read_bytes()


@settings(max_examples=300, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_a_mutated_gguf_file_is_refused_in_one_line_or_works(rng: random.Random, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "x.gguf"
    content = bytearray(small_gguf())
    for _ in range(rng.choice([1, 2, 20])):
        at = rng.randrange(rng.choice([100, len(content)]))
        content[at : at + rng.choice([0, 1, 4, 8])] = rng.choice(
            [b"", b"\0", b"\xff" * 8, bytes([rng.randrange(256)])]
        )
    path.write_bytes(content)
    check_refused_or_works(path, load_gguf)


# By name, or whatever there is


@pytest.mark.parametrize(
    ("name", "file"), [("gpt2", "gpt2_ranks"), ("cl100k", "cl100k_ranks"), ("o200k", "o200k_ranks")]
)
def test_openais_tokenizers_are_opened_by_name(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_tiktoken(small(), tmp_path / file)
    monkeypatch.setattr(interop, "load_file", lambda file: tmp_path / file)
    back = open_tokenizer(name)
    assert back.pattern == name.replace("cl100k", "gpt4")
    assert back.merges == small().merges
    assert back.encode("<|endoftext|>", "all") == [tiktoken_eot(name)]


def tiktoken_eot(name: str) -> int:
    source = inspect.getsource(tiktoken_ext.openai_public)  # the vocabularies themselves are not installed
    found = re.search(rf"def {name}.*?ENDOFTEXT: (\d+)", source, re.S)
    return int(found[1]) if found else -1


def test_smollm2_is_opened_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_gguf(trained("smollm"), tmp_path / "smollm2-135m", "smollm")
    monkeypatch.setattr(interop, "load_file", lambda file: tmp_path / file)
    assert same(open_tokenizer("smollm2"), trained("smollm"))


def test_what_is_not_there_is_named_with_what_could_be(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer \(gpt3\) must be a file, a folder, or one of gpt2, cl100k"
    ):
        open_tokenizer("gpt3")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json must be a file; make a tokenizer with"):
        open_tokenizer(tmp_path)


# The real files, where they are


def real(name: str, where: str) -> Path:
    """Return a real file out of data/ or the local mirror; without it the test is skipped."""
    for path in (DATA / name, Path(os.environ.get("LLM_COURSE_DATA") or DATA) / where):
        if path.exists():
            return path
    pytest.skip(f"{name} is neither in data/ nor, as {where}, in the folder LLM_COURSE_DATA")


def test_the_real_gpt2_encodes_as_in_transformers_and_tiktoken(tmp_path: Path):
    merges = real("vocab.bpe", "vocab/vocab.bpe")
    ours = load_gpt2(merges.with_name("encoder.json"), merges)
    assert ours.vocab_size == 50257
    theirs = transformers.GPT2Tokenizer(vocab=str(merges.with_name("encoder.json")), merges=str(merges))
    encoding = tiktoken.Encoding(**to_tiktoken(ours))
    for text in [*VARIED, TEXT, inspect.getsource(random)]:
        ids = ours.encode(text, "all")
        assert theirs.encode(text) == ids
        assert encoding.encode(text, allowed_special="all") == ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "key", "pattern"),
    [
        ("cl100k_base", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4", "gpt4"),
        ("o200k_base", "fb374d419588a4632f3f557e76b4b70aebbca790", "o200k"),
    ],
)
def test_the_real_rank_files_encode_as_in_tiktoken(name: str, key: str, pattern: str):
    path = real(f"{name}.tiktoken", f"vocab/tiktoken_cache/{key}")
    ours = load_tiktoken(path, pattern)
    assert len(ours.merges) == len(ours.vocab) - 256  # a merge for each token
    theirs = tiktoken.Encoding(**to_tiktoken(ours))
    for text in [*VARIED, TEXT, inspect.getsource(random)]:
        assert theirs.encode(text, disallowed_special=()) == ours.encode(text)


@pytest.mark.slow  # transformers takes ten seconds to read the file
def test_the_real_smollm2_encodes_as_in_transformers(tmp_path: Path):
    path = real("SmolLM2-135M-Instruct.Q4_1.gguf", "models/SmolLM2-135M-Instruct.Q4_1.gguf")
    ours = load_gguf(path)
    assert (ours.vocab_size, len(ours.merges), len(ours.special_tokens)) == (49152, 48900, 17)
    assert len([token for token in ours.vocab.values() if len(token) == 1]) == 235  # 21 bytes have no token
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [*VARIED, TEXT, inspect.getsource(random)]
    # transformers does not read tokenizer.ggml.pre and cuts as GPT-2 does, so we must be told to as well ...
    as_gpt2 = load_gguf(path, "gpt2")
    assert [as_gpt2.encode(text, "all") for text in texts] == [theirs.encode(text) for text in texts]
    # ... and it agrees with what the file says once it has the pre-tokenizer of SmolLM2's own tokenizer.json.
    digits, byte_level = tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(False)
    theirs.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, byte_level])
    assert [ours.encode(text, "all") for text in texts] == [theirs.encode(text) for text in texts]
    assert as_gpt2.encode("x  1") != ours.encode(
        "x  1"
    )  # the two spaces are one token, as the digit takes none


def test_bytes_without_a_token_are_dropped_as_hugging_face_drops_them():
    ours = trained("smollm")
    vocab = {i: token for i, token in ours.vocab.items() if token not in (b"\x04", b"\xf1")}
    lacking = BPETokenizer(vocab, ours.merges, {}, "smollm")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(to_hf(lacking)))
    for text in VARIED:
        assert lacking.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert lacking.decode(lacking.encode("a\x04b")) == "ab"


@pytest.mark.parametrize("pattern", CUTS)
def test_a_lone_surrogate_is_refused_by_name(pattern: str):
    with pytest.raises(ValueError, match=r"text \('\\ud83d' at 2\) must be without lone surrogates"):
        trained(pattern).encode("ab\ud83d")


def test_gpt2s_letters_are_those_of_transformers():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert list(LETTERS.items()) == list(bytes_to_unicode().items())


if __name__ == "__main__":
    run_validation(__file__)
