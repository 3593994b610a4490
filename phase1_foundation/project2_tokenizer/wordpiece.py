r"""WordPiece, BERT's tokenizer: from the left, always the longest piece of the vocabulary that fits.

PAPERS
  [1] Japanese and Korean Voice Search, Schuster and Nakajima, 2012 (ICASSP)
  [2] BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding, Devlin et al., 2018,
      arXiv:1810.04805
  [3] Fast WordPiece Tokenization, Song et al., 2020, arXiv:2012.15524
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Self

import regex

from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.bpe_train import BYTES, incremental
from phase1_foundation.project2_tokenizer.tokenizer import (
    Tokenizer,
    as_text,
    choose_special,
    join_tokens,
    split_special,
)

UNKNOWN = "[UNK]"  # stands for a word that the vocabulary cannot spell
PREFIX = "##"  # marks a piece that continues a word
LONGEST_WORD = 100  # characters; longer words are unknown, so that no word takes quadratic time
WORDS = regex.compile(r"\w+|[^\w\s]+")  # runs of letters and digits, runs of punctuation; spaces vanish


class WordPieceTokenizer(Tokenizer):
    r"""Words cut greedily into pieces: "unaffable" is un, ##aff, ##able.

    PAPER: [1] introduces word pieces; [3] describes the greedy longest match by which [2] encodes.
    PAPER CONTEXT: [1] had to recognize Japanese and Korean speech, whose writing has no or few spaces: an
        inventory of fixed size that can spell everything, instead of a dictionary. [2] made it BERT's.
    INTUITION: Like reading: recognize the longest known beginning, then go on behind it.
    IMPLEMENTATION: A piece inside a word is another piece than the same letters at its beginning, and is
        stored with ##. A word of which any part is unknown is [UNK] as a whole, as in [2]. [1] learns pieces
        by what they add to the likelihood; here BPE finds them, as in the trainer of Hugging Face's
        `tokenizers`.
    WHY: Greedy needs neither probabilities nor merges, only the list of pieces. The price: [UNK] is lost for
        ever, and so are the spaces; byte-level BPE and unigram give back every byte.
    """

    def __init__(self, vocab: dict[int, bytes], special_tokens: dict[str, int]) -> None:
        if UNKNOWN not in special_tokens:
            raise ValueError(f"special_tokens ({', '.join(special_tokens) or 'none'}) must have {UNKNOWN}")
        self.vocab, self.special_tokens = vocab, special_tokens
        self._ids = {piece.decode(): i for i, piece in vocab.items()}
        self._longest = max(map(len, self._ids), default=0)
        self._bytes = vocab | {i: name.encode() for name, i in special_tokens.items()}

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._bytes) + 1

    @classmethod
    def train_from_iterator(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: Collection[str] = ()
    ) -> Self:
        """Learn the pieces into which BPE cuts the words: characters, then the most frequent longer ones."""
        names = list(dict.fromkeys([UNKNOWN, *special_tokens]))
        if vocab_size < len(names):
            raise ValueError(f"vocab_size ({vocab_size}) must be at least {len(names)}, the special tokens")
        parts = split_special(as_text("".join(texts)), special_tokens)
        words = Counter(word for part, is_special in parts if not is_special for word in WORDS.findall(part))
        merges = incremental(words, vocab_size)
        tokens = dict(enumerate(bytes([b]) for b in BYTES))
        for left, right, new in merges:
            tokens[new] = tokens[left] + tokens[right]
        bpe = BPETokenizer(tokens, merges, pattern="none")

        letters: Counter[str] = Counter()
        longer: Counter[str] = Counter()
        for word, count in words.items():
            for place, letter in enumerate(word):
                letters[PREFIX * (place > 0) + letter] += count
            for place, i in enumerate(bpe.encode(word)):
                piece = tokens[i].decode(errors="ignore")
                if len(piece) > 1 and piece.encode() == tokens[i]:  # whole characters
                    longer[PREFIX * (place > 0) + piece] += count
        chosen = [piece for counter in (letters, longer) for piece, _ in counter.most_common()]
        vocab = dict(enumerate((piece.encode() for piece in chosen[: vocab_size - len(names)]), len(names)))
        return cls(vocab, {name: i for i, name in enumerate(names)})

    def encode(self, text: str | bytes, allowed_special: Collection[str] = ()) -> list[int]:
        """Return the ids of the words; the allowed special tokens (or "all") count as such."""
        special = choose_special(self.special_tokens, allowed_special)
        ids: list[int] = []
        for part, is_special in split_special(as_text(text), special):
            if is_special:
                ids.append(special[part])
            else:
                for word in WORDS.findall(part):
                    ids += self._encode_word(word)
        return ids

    def encode_iterable(
        self, texts: Iterable[str | bytes], allowed_special: Collection[str] = ()
    ) -> Iterator[int]:
        """Yield the ids of a text that comes in pieces; the whole text is held in memory."""
        yield from self.encode("".join(map(as_text, texts)), allowed_special)

    def _encode_word(self, word: str) -> list[int]:
        """Return the ids of a word's pieces, or of [UNK] if one is missing."""
        ids: list[int] = []
        begin, prefix = 0, ""
        while begin < len(word) <= LONGEST_WORD:
            for end in range(min(len(word), begin + self._longest), begin, -1):
                if (i := self._ids.get(prefix + word[begin:end])) is not None:
                    ids.append(i)
                    begin, prefix = end, PREFIX
                    break
            else:
                return [self.special_tokens[UNKNOWN]]
        return ids or [self.special_tokens[UNKNOWN]]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the words with a space between them; ValueError if there is no such id."""
        return b" ".join(join_tokens(self._bytes, [i]) for i in ids).replace(b" " + PREFIX.encode(), b"")
