r"""New special tokens for a trained model: rows for them in its embedding and its head, and where they begin.

PAPERS
  [1] Initializing New Word Embeddings for Pretrained Language Models, Hewitt, 2021,
      nlp.stanford.edu/~johnhew/vocab-expansion.html

SYMBOLS                                     SHAPES
  n  tokens that the model was trained on     V  vocab_size
  k  new tokens                               C  n_embd
"""

from collections.abc import Collection
from dataclasses import replace

from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.model import Decoder

TABLES = ("token_embedding.weight", "head.weight")  # with a row for each token


def resize_embeddings(
    model: Decoder, tokenizer: Tokenizer, specials: Collection[str]
) -> tuple[Decoder, Tokenizer]:
    r"""Return model and tokenizer with these special tokens as well; both as they are, if they know them.

    PAPER: [1]: new rows are the mean of the old ones, which bounds how far the model's odds can move.
    PAPER CONTEXT: The marks of a conversation are tokens that pretraining never saw. Libraries gave them
        small random rows, and with some models the new tokens then took nearly all probability.
    INTUITION: Who is new in a company had best begin as its average member: never the loudest.
    IMPLEMENTATION: New ids follow the tokenizer's last one. Rows that the model has beyond it, to round its
        vocabulary up, were never trained and are used first. All new rows begin equal; the first step parts
        them, as each stands elsewhere. The new model shares its other weights with the old one.
    WHY: The logit of a mean row is the mean of the logits, and exp(mean) <= mean(exp), so the loss of no old
        token rises by more than log(1 + k / n). A row of zeros has logit 0, and a trained model's others may
        all be far below it. Tests hold the bound, and break it with zeros and with random rows.
    """
    grown = add_specials(tokenizer, specials)
    if grown is tokenizer:
        return model, tokenizer
    config = replace(model.config, vocab_size=max(model.config.vocab_size, grown.vocab_size))
    weights = model.state_dict()
    for name in TABLES:
        known = weights[name][: tokenizer.vocab_size]  # (n, C)
        table = known.mean(dim=0).repeat(config.vocab_size, 1)  # (V, C)
        table[: len(known)] = known
        weights[name] = table
    return Decoder.from_weights(config, weights).train(model.training), grown


def add_specials(tokenizer: Tokenizer, specials: Collection[str]) -> Tokenizer:
    """Return the tokenizer with these special tokens behind all ids that it has, or itself if none is new."""
    missing = [name for name in dict.fromkeys(specials) if name not in tokenizer.special_tokens]
    if not missing:
        return tokenizer
    if not isinstance(tokenizer, BPETokenizer):
        raise ValueError(
            f"tokenizer ({type(tokenizer).__name__}) must be a BPETokenizer to get special tokens"
        )
    if "" in missing:
        raise ValueError("specials ('') must have a name")
    ids = {name: tokenizer.vocab_size + number for number, name in enumerate(missing)}
    parts = (tokenizer.pattern, tokenizer.ignore_merges)
    return BPETokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens | ids, *parts)
