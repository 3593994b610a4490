r"""Byte-level BPE in others' files: Hugging Face's tokenizer.json, GPT-2's two files, GGUF, tiktoken's ranks.

PAPERS
  [1] Language Models are Unsupervised Multitask Learners, Radford et al., 2019 (GPT-2)
  [2] The Llama 3 Herd of Models, Grattafiori et al., 2024, arXiv:2407.21783
  [3] Qwen2 Technical Report, Yang et al., 2024, arXiv:2407.10671
  [4] SmolLM2: When Smol Goes Big, Ben Allal et al., 2025, arXiv:2502.02737

The files say the same things, vocabulary, merges, special tokens and how text is cut, in different words:
  tokenizer.json      everything; tokens in GPT-2's letters; the cutting as a list of regular expressions
  GPT-2's files       encoder.json (or vocab.json): letters and ids; vocab.bpe (or merges.txt): merges
  tiktoken's ranks    bytes in base64 and ids, which are also the order of the merges; no merges, no cutting
  GGUF                everything, before the weights; the cutting as a name
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.corpora import load_file
from common.files import atomic_write
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.bpe_train import BYTES, Merge
from phase1_foundation.project2_tokenizer.gguf_metadata import read_gguf_metadata
from phase1_foundation.project2_tokenizer.patterns import GPT2, GPT4, O200K, QWEN2
from phase1_foundation.project2_tokenizer.tiktoken_ranks import load_tiktoken
from phase1_foundation.project2_tokenizer.token_file import (
    TRAIN_COMMAND,
    build_tokenizer,
    check_merges,
    check_vocab,
    naming,
    read_id,
    read_json,
    read_list,
    read_object,
    read_text,
    show,
)

if TYPE_CHECKING:
    from phase1_foundation.project2_tokenizer.unigram import UnigramTokenizer
    from phase1_foundation.project2_tokenizer.wordpiece import WordPieceTokenizer

# How a tokenizer.json says each of our patterns: Unicode normalization, and regular expressions of which each
# cuts what the one before it left. For SmolLM2 [4] those are two; our pattern does it in one.
CUTS: dict[str, tuple[str | None, list[str]]] = {
    "gpt2": (None, [GPT2]),
    "gpt4": (None, [GPT4]),
    "o200k": (None, [O200K]),
    "qwen2": ("NFC", [QWEN2]),
    "smollm": (None, [r"\p{N}", GPT2]),
    "none": (None, []),
}
GGUF_PRE = {  # llama.cpp's names: (pattern, whether a chunk that is a token needs no merges)
    "gpt-2": ("gpt2", False),
    "gpt-4o": ("o200k", False),
    "dbrx": ("gpt4", False),
    "llama-bpe": ("gpt4", True),
    "qwen2": ("qwen2", False),
    "smollm": ("smollm", False),
}
# name: (file of common.corpora, and what OpenAI's do not say: the pattern, the special tokens)
KNOWN: dict[str, tuple[str, str, dict[str, int]]] = {
    "gpt2": ("gpt2_ranks", "gpt2", {"<|endoftext|>": 50256}),
    "cl100k": ("cl100k_ranks", "gpt4", {"<|endoftext|>": 100257}),
    "o200k": ("o200k_ranks", "o200k", {"<|endoftext|>": 199999}),
    "smollm2": ("smollm2-135m", "", {}),
}
VISIBLE = 188  # of the 256 bytes, that many are letters or signs in Latin-1
CONTROL, USER_DEFINED, UNUSED = (
    3,
    4,
    5,
)  # types of tokens in a GGUF file: special ones, and rows without a token
# what a tokenizer.json may say of its model, as we say it and in other ways
MODEL: dict[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "dropout": (None, 0),
    "byte_fallback": (False, None),
    **dict.fromkeys(("unk_token", "continuing_subword_prefix", "end_of_word_suffix"), (None, "")),
}


def byte_letters() -> dict[int, str]:
    r"""Return GPT-2's letter for each byte, in GPT-2's order.

    PAPER: [1] Section 2.2 works on bytes; the letters are in its published code, bytes_to_unicode.
    PAPER CONTEXT: BPE code of the time read words as text and split its files at spaces.
    INTUITION: Give each byte a letter that can be seen. The 188 bytes that are visible in Latin-1 stand for
        themselves; the other 68 get the letters from U+0100 on, so a space is the 33rd of them, "Ġ".
    IMPLEMENTATION: BYTES has the visible ones first; in that order they are the tokens 0 to 255 of GPT-2.
    WHY: tokenizer.json, vocab.json and GGUF files write tokens so. Read as text, "Ġthe" is not " the", and
        a tokenizer that forgets it finds no word that follows a space.
    """
    return {b: chr(b if i < VISIBLE else 0x100 + i - VISIBLE) for i, b in enumerate(BYTES)}


LETTERS = byte_letters()
LETTER_BYTES = {letter: b for b, letter in LETTERS.items()}


def to_letters(token: bytes) -> str:
    """Return a token in GPT-2's letters."""
    return "".join([LETTERS[b] for b in token])


def from_letters(text: str, name: str) -> bytes:
    """Return the token that GPT-2's letters spell, or ValueError."""
    try:
        return bytes([LETTER_BYTES[letter] for letter in text])
    except KeyError:
        raise ValueError(f"{name} ({show(text)}) must be spelled in GPT-2's 256 letters for bytes") from None


def to_hf(tokenizer: BPETokenizer) -> dict[str, Any]:
    """Return the content of a tokenizer.json, with which others encode as we do with "all" special tokens."""
    normalization, regexes = CUTS[tokenizer.pattern]
    letters = {i: to_letters(token) for i, token in tokenizer.vocab.items()}
    ids = {text: i for i, text in letters.items()}
    for name, i in tokenizer.special_tokens.items():  # here, or the library gives them ids of its own
        if ids.setdefault(name, i) != i:
            raise ValueError(
                f"special_tokens ({name!r}) must not look like vocab[{ids[name]}] in tokenizer.json"
            )
    isolated = {"type": "Split", "behavior": "Isolated", "invert": False}
    splits = [isolated | {"pattern": {"Regex": regex}} for regex in regexes]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": True}
            for name, i in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": {"type": normalization} if normalization else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": tokenizer.ignore_merges,
            "vocab": dict(sorted(ids.items(), key=lambda item: item[1])),
            "merges": [[letters[left], letters[right]] for left, right, _ in tokenizer.merges],
        },
    }


def save_hf(tokenizer: BPETokenizer, path: str | Path) -> None:
    """Write a tokenizer.json, for tokenizers.Tokenizer.from_file and transformers.PreTrainedTokenizerFast."""
    content = json.dumps(to_hf(tokenizer), ensure_ascii=False, indent=1)
    with atomic_write(path) as file:
        file.write(content)


def load_hf(path: str | Path) -> BPETokenizer:
    """Read a tokenizer.json of byte-level BPE. What it adds around a text (BOS, EOS) is up to the caller."""
    fields = read_json(path)
    with naming(path):
        return _from_hf(fields)


def _from_hf(fields: dict[str, Any]) -> BPETokenizer:
    model = read_object(fields.get("model"), "model")
    for name, allowed in MODEL.items():
        if model.get(name) not in allowed:
            raise ValueError(f"model.{name} ({show(model.get(name))}) must be {json.dumps(allowed[0])}")
    special = {}
    for i, entry in enumerate(read_list(fields.get("added_tokens") or [], "added_tokens")):
        token = read_object(entry, f"added_tokens[{i}]")
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag):
                raise ValueError(f"added_tokens[{i}].{flag} ({show(token[flag])}) must be false")
        special[str(token.get("content"))] = read_id(token.get("id"), f"added_tokens[{i}].id")
    merges = [
        merge.split(" ") if isinstance(merge, str) else merge  # once "Ġ t", nowadays ["Ġ", "t"]
        for merge in read_list(model.get("merges"), "merges")
    ]
    ignore_merges = model.get("ignore_merges") is True
    return _build(_read_ids(model.get("vocab")), merges, special, _pattern_of(fields), ignore_merges)


def _pattern_of(fields: Mapping[str, Any]) -> str:
    """Return the name of our pattern that cuts as a tokenizer.json says."""
    normalizer = read_object(fields.get("normalizer") or {}, "normalizer")
    pre = read_object(fields.get("pre_tokenizer") or {}, "pre_tokenizer")
    stages = read_list(pre.get("pretokenizers"), "pretokenizers") if pre.get("type") == "Sequence" else [pre]
    regexes: list[str] = []
    for i, stage in enumerate(stages):
        stage, last = read_object(stage, "pre_tokenizer"), i == len(stages) - 1
        how = (stage.get("type"), stage.get("behavior"), stage.get("invert"))
        if how in (("Split", "Isolated", False), ("Split", "Removed", True)) and not last:
            regexes.append(read_object(stage.get("pattern"), "pattern").get("Regex", ""))
        elif how[0] == "Digits" and stage.get("individual_digits") and not last:
            regexes.append(r"\p{N}")
        elif how[0] == "ByteLevel" and not stage.get("add_prefix_space", True) and last:
            regexes += [GPT2] * bool(stage.get("use_regex", True))
        else:
            rule = "must be Split or Digits, and ByteLevel at last"
            raise ValueError(f"pre_tokenizer ({json.dumps(stage)[:100]}) {rule}")
    for name, cut in CUTS.items():
        if cut == (normalizer.get("type"), regexes):
            return name
    cuts = json.dumps([normalizer.get("type"), *regexes])
    raise ValueError(f"normalizer and pre_tokenizer ({cuts[:200]}) must cut as one of {', '.join(CUTS)}")


def _read_ids(value: Any) -> dict[str, int]:
    return {text: read_id(i, f"vocab[{show(text)}]") for text, i in read_object(value, "vocab").items()}


def _build(
    ids: Mapping[str, int],
    merges: Iterable[Any],
    special: Mapping[str, int],
    pattern: str,
    ignore_merges: bool,
) -> BPETokenizer:
    """Build a tokenizer from tokens and merges in GPT-2's letters, or raise ValueError."""
    if len(set(ids.values())) != len(ids):
        raise ValueError(f"vocab ({len(ids)} tokens) must have as many ids, not {len(set(ids.values()))}")
    for name, i in special.items():
        if ids.get(name, i) != i:
            raise ValueError(f"special token ({show(name)}: {i}) must have its id in vocab, {ids[name]}")
    vocab = {i: from_letters(text, f"vocab[{i}]") for text, i in ids.items() if text not in special}
    triples: list[Merge] = []
    for rank, merge in enumerate(merges):
        try:
            left, right = merge
            triples.append((ids[left], ids[right], ids[left + right]))
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"merges[{rank}] ({show(merge)}) must be two tokens that make a third") from None
    check_vocab(vocab, special)
    check_merges(vocab, triples)
    return BPETokenizer(vocab, triples, dict(special), pattern, ignore_merges)


def load_gpt2(vocab_path: str | Path, merges_path: str | Path, pattern: str = "gpt2") -> BPETokenizer:
    """Read GPT-2's encoder.json and vocab.bpe; what is neither byte nor merge in there is a special token."""
    fields, text = read_json(vocab_path), read_text(merges_path)
    lines = text.split("\n")  # not splitlines(), which knows more ends of a line than these files
    merges = [line.split(" ") for line in lines[lines[0].startswith("#version") :] if line]
    made = {"".join(merge) for merge in merges} | set(LETTER_BYTES)
    with naming(f"{vocab_path}, {merges_path}"):
        ids = _read_ids(fields)
        return _build(ids, merges, {text: i for text, i in ids.items() if text not in made}, pattern, False)


def load_gguf(path: str | Path, pattern: str | None = None) -> BPETokenizer:
    """Read the byte-level BPE vocabulary of a GGUF file; `pattern` overrules what it says on cutting."""
    facts = read_gguf_metadata(path)
    with naming(path):
        kind, pre = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
        if kind != "gpt2":
            raise ValueError(f"tokenizer.ggml.model ({show(kind)}) must be gpt2, which means byte-level BPE")
        if pattern is None and str(pre) not in GGUF_PRE:
            raise ValueError(f"tokenizer.ggml.pre ({show(pre)}) must be one of {', '.join(GGUF_PRE)}")
        cut, ignore_merges = GGUF_PRE.get(str(pre), ("none", False))
        names = ("tokens", "token_type", "merges")
        tokens, types, merges = (read_list(facts.get(f"tokenizer.ggml.{name}"), name) for name in names)
        ids = {str(text): i for i, text in enumerate(tokens)}
        if not len(ids) == len(tokens) == len(types):
            counts = f"{len(ids)} different ones of {len(tokens)}"
            raise ValueError(f"tokens ({counts}) must be as many as types ({len(types)})")
        ids = {text: i for text, i in ids.items() if types[i] != UNUSED}
        special = {text: i for text, i in ids.items() if types[i] in (CONTROL, USER_DEFINED)}
        pairs = [str(merge).split(" ") for merge in merges]
        return _build(ids, pairs, special, pattern or cut, ignore_merges)


def open_tokenizer(name: str | Path) -> "BPETokenizer | UnigramTokenizer | WordPieceTokenizer":
    """Read a tokenizer: gpt2, cl100k, o200k or smollm2, fetched if need be; or from a file or folder.

    A file of ours, a tokenizer.json, a GGUF file; a folder with a tokenizer.json or GPT-2's two files.
    """
    if name in KNOWN:
        file, pattern, special = KNOWN[str(name)]
        path = load_file(file)
        return load_tiktoken(path, pattern, special) if pattern else load_gguf(path)
    path = Path(name)
    if not path.exists():
        rule = f"must be a file, a folder, or one of {', '.join(KNOWN)}; or make one with: {TRAIN_COMMAND}"
        raise FileNotFoundError(f"tokenizer ({name}) {rule}")
    if path.is_dir():
        for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
            if (path / vocab).is_file() and (path / merges).is_file():
                return load_gpt2(path / vocab, path / merges)
        path /= "tokenizer.json"
    if path.suffix == ".gguf":
        return load_gguf(path)
    fields = read_json(path)
    with naming(path):
        return _from_hf(fields) if "model" in fields else build_tokenizer(fields)
