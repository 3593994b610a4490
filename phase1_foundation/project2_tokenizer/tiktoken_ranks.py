r"""tiktoken's rank files: every token with its rank and no merges; and how the merges are found again.

PAPERS
  [1] Neural Machine Translation of Rare Words with Subword Units, Sennrich, Haddow and Birch, 2016,
      arXiv:1508.07909
  [2] The Llama 3 Herd of Models, Grattafiori et al., 2024, arXiv:2407.21783
"""

import base64
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.files import atomic_write
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.bpe_train import Merge
from phase1_foundation.project2_tokenizer.patterns import PATTERNS
from phase1_foundation.project2_tokenizer.token_file import (
    MAX_ID,
    check_vocab,
    naming,
    read_id,
    read_text,
    show,
)

LONGEST = 1024  # bytes of a token; those of OpenAI have at most 128


def recover_merges(vocab: Mapping[int, bytes]) -> list[Merge]:
    r"""Return, in the order of the ids, the merge that makes each token that some merge can make.

    PAPER: [1] Algorithm 1 learns merges in the order in which they are applied; the ids keep that order.
    PAPER CONTEXT: tiktoken stores tokens and ids alone. It joins two neighbours whenever both together are a
        token, the lowest id first. So the merges are there, but nobody says what they are.
    INTUITION: Encode a token as if it were text. The last join, of two parts into the token itself, is its
        merge: nothing else can have happened to these bytes in any text in which they end up as that token.
    IMPLEMENTATION: Where the joins get stuck, the token has no merge. In cl100k and o200k they never do; in
        Llama 3 [2] they do for 588 of 128,000 tokens, as it added a second vocabulary to OpenAI's.
    WHY: With merges one encoder serves every format. As for tokens without: tiktoken looks whether a chunk is
        a token before it joins anything, so we must too (ignore_merges), or Llama 3 reads other tokens.
    """
    ids = {token: i for i, token in vocab.items()}
    merges = []
    for i in sorted(vocab):
        parts = [bytes([b]) for b in vocab[i]]
        while len(parts) > 2:
            joined = [ids.get(left + right, MAX_ID) for left, right in pairwise(parts)]
            first = min(joined)
            if first == MAX_ID:
                break
            at = joined.index(first)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2 and parts[0] in ids and parts[1] in ids:
            merges.append((ids[parts[0]], ids[parts[1]], i))
    return merges


def load_tiktoken(
    path: str | Path, pattern: str = "gpt4", special_tokens: Mapping[str, int] | None = None
) -> BPETokenizer:
    """Read a rank file. It says neither how text is cut nor what the special tokens are; the caller does."""
    vocab: dict[int, bytes] = {}
    text, special = read_text(path), dict(special_tokens or {})
    with naming(path):
        for number, line in enumerate(text.splitlines(), 1):
            try:
                token, rank = line.split(" ")
                i, content = int(rank), base64.b64decode(token, validate=True)
            except ValueError:
                raise ValueError(
                    f"line {number} ({show(line)}) must be a token in base64 and its rank"
                ) from None
            if i in vocab or len(content) > LONGEST:
                raise ValueError(
                    f"line {number} ({show(line)}) must have a rank of its own and {LONGEST} bytes at most"
                )
            vocab[read_id(i, f"line {number}")] = content
        check_vocab(vocab, special)
    merges = recover_merges(vocab)
    reachable = {new for *_, new in merges}
    ignore_merges = any(i not in reachable and len(token) > 1 for i, token in vocab.items())
    return BPETokenizer(vocab, merges, special, pattern, ignore_merges)


def to_tiktoken(tokenizer: BPETokenizer) -> dict[str, Any]:
    """Return the arguments of tiktoken.Encoding, or ValueError if that would not encode as we do."""
    vocab, pattern = tokenizer.vocab, PATTERNS[tokenizer.pattern]
    ranks = {token: i for i, token in vocab.items()}
    if missing := sum(bytes([b]) not in ranks for b in range(256)):
        raise ValueError(f"vocab (lacks {missing} bytes) must hold all 256 for tiktoken")
    if pattern.normalize:
        raise ValueError(f"pattern ({tokenizer.pattern}) must not normalize text for tiktoken")
    for name in tokenizer.special_tokens:  # tiktoken tries them in the order of a hash table
        if any(other != name and other.startswith(name) for other in tokenizer.special_tokens):
            raise ValueError(f"special_tokens ({name!r}) must not begin another one for tiktoken")
    if recover_merges(vocab) != tokenizer.merges:
        raise ValueError(
            f"merges ({len(tokenizer.merges)}) must be in the order of their ids, one a token, for tiktoken"
        )
    return {
        "name": "ours",
        "pat_str": pattern.source or r"[\s\S]+",
        "mergeable_ranks": ranks,
        "special_tokens": dict(tokenizer.special_tokens),
    }


def save_tiktoken(tokenizer: BPETokenizer, path: str | Path) -> None:
    """Write a rank file that tiktoken.load.load_tiktoken_bpe reads; errors as to_tiktoken."""
    ranks = to_tiktoken(tokenizer)["mergeable_ranks"]
    with atomic_write(path, "wb") as file:
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            file.write(base64.b64encode(token) + b" %d\n" % rank)
