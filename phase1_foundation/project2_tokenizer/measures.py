r"""What a vocabulary costs: tokens for the same text, cuts through numbers, tokens that nothing uses.

PAPERS
  [1] How Good is Your Tokenizer? On the Monolingual Performance of Multilingual Language Models, Rust,
      Pfeiffer, Vulić, Ruder and Gurevych, 2021, arXiv:2012.15613
  [2] Language Model Tokenizers Introduce Unfairness Between Languages, Petrov, La Malfa, Torr and Bibi, 2023,
      arXiv:2305.15425
  [3] Tokenization counts: the impact of tokenization on arithmetic in frontier LLMs, Singh and Strouse, 2024,
      arXiv:2402.14903
  [4] Byte Pair Encoding is Suboptimal for Language Model Pretraining, Bostrom and Durrett, 2020,
      arXiv:2004.03720
  [5] Fishing for Magikarp: Automatically Detecting Under-trained Tokens in Large Language Models, Land and
      Bartolo, 2024, arXiv:2405.05417
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Protocol

import yaml


class Vocabulary(Protocol):
    """What is measured here: a tokenizer whose tokens can be looked at."""

    vocab: dict[int, bytes]

    def encode(self, text: str | bytes) -> list[int]:
        """Return the ids of a text."""
        ...


def sample_texts() -> dict[str, str]:
    """Return the texts to compare on: eight languages that say the same, code, and numbers."""
    return yaml.safe_load((Path(__file__).parent / "texts.yaml").read_text(encoding="utf-8"))


def bytes_per_token(tokenizer: Vocabulary, text: str) -> float:
    """Return the compression: a context of n tokens holds n times as many bytes of such text."""
    return len(text.encode()) / len(tokenizer.encode(text))


def tokens_per_word(tokenizer: Vocabulary, text: str) -> float:
    """Return the fertility of [1]: 1 if every word is a token. Means little without spaces between words."""
    return len(tokenizer.encode(text)) / len(text.split())


def premium(tokenizer: Vocabulary, text: str, reference: str) -> float:
    r"""Return how many times the tokens of `reference` a text needs that says the same in another language.

    PAPER: [2] calls it the premium of a language relative to another; at 1 the tokenizer has parity.
    PAPER CONTEXT: Services charge by the token, and a context window is counted in tokens. [2] found up to 15
        times the tokens for the same content.
    INTUITION: The vocabulary is a budget that training spent on the languages of its corpus, by the byte.
    IMPLEMENTATION: The parallel texts are six articles of the Declaration of Human Rights.
    WHY: Bytes per token alone mislead: a Hindi letter has three bytes, so a tokenizer that spells Hindi
        letter by letter shows the 3 bytes per token of a passable English one.
    """
    return len(tokenizer.encode(text)) / len(tokenizer.encode(reference))


def token_counts(tokenizer: Vocabulary, texts: Iterable[str]) -> Counter[int]:
    """Return how often each token is used."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer.encode(text))
    return counts


@dataclass
class Audit:
    """Tokens that a model would not learn, though each has its row in the embedding table."""

    unused: list[int]  # not once in the text
    stepping_stones: list[int]  # of the unused: part of a longer token that is used; BPE made them on the way
    unreachable: list[int]  # not even their own text is encoded as this token
    halves: list[int]  # not UTF-8 by themselves: a byte or more of a character


def audit(tokenizer: Vocabulary, counts: Mapping[int, int]) -> Audit:
    r"""Find the tokens that the counted text never uses, and those that no text can use.

    PAPER: [5] finds tokens that models hardly saw in training; [4] sees BPE waste entries that unigram does
        not.
    PAPER CONTEXT: In 2023 it was found that models could not repeat " SolidGoldMagikarp" and answered with
        nonsense. The token was a user's name in the text that the tokenizer learned from; the text that the
        model learned from had it so rarely that its embedding was still nearly random.
    INTUITION: A token is alive only if training text has it. Count, and look at the zeros.
    IMPLEMENTATION: A stepping stone is an unused token inside a used one. A token is unreachable if its own
        text is encoded otherwise: the pattern cuts it, or other merges come first. Parts of characters are
        not tried, for the pattern cuts them otherwise where the rest of the character follows.
    WHY: Each dead token is a row of the embedding table and of the output layer that costs memory and time,
        can still be predicted, and can be typed by anyone.
    """
    unused = [i for i in tokenizer.vocab if not counts.get(i)]
    used = [token for i, token in tokenizer.vocab.items() if counts.get(i)]
    inside = {token[i:j] for token in used for i, j in combinations(range(len(token) + 1), 2)}
    stones = [i for i in unused if len(tokenizer.vocab[i]) > 1 and tokenizer.vocab[i] in inside]
    halves = [i for i, token in tokenizer.vocab.items() if not is_utf8(token)]
    whole = tokenizer.vocab.keys() - set(halves)
    unreachable = [i for i in sorted(whole) if tokenizer.encode(tokenizer.vocab[i]) != [i]]
    return Audit(unused, stones, unreachable, halves)


def is_utf8(token: bytes) -> bool:
    """Say whether the bytes are whole characters."""
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def digit_groups(tokenizer: Vocabulary, numbers: Iterable[int]) -> Counter[tuple[int, ...]]:
    r"""Count how numbers are cut: (1, 3) for 2|024; written after a space, as in a sentence.

    PAPER: [3] compares models that read digits in groups from the left with the same models reading from the
        right.
    PAPER CONTEXT: GPT-2 let the merges cut numbers: of its years 2024 is one token and 2023 two. Later
        patterns take one to three digits from the left (GPT-4), or single digits (SmolLM).
    INTUITION: To add numbers digit by digit a model must know where the ones and the tens are. If 1234 is
        1|234 and 1235 is 12|35, it must learn that anew for every number.
    IMPLEMENTATION: The number of digits in each token; a token that is only the space has none and does not
        count.
    WHY: Regular groups cost tokens and save knowledge: the report shows both.
    """
    groups: Counter[tuple[int, ...]] = Counter()
    for number in numbers:
        lengths = (len(tokenizer.vocab[i].strip()) for i in tokenizer.encode(f" {number}"))
        groups[tuple(length for length in lengths if length)] += 1
    return groups
