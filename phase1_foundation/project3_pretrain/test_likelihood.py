"""Checks of perplexity, bits per byte and answers by likelihood. --interactive scores the text you type."""

import bz2
import math
import random
import re
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F

from common.script import ask, run_validation
from phase1_foundation.project3_pretrain import likelihood
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.conftest import SENTENCES
from phase1_foundation.project3_pretrain.likelihood import (
    Continued,
    Question,
    TextScore,
    answer_questions,
    bzip2_bits_per_byte,
    encode_pair,
    score_continuations,
    score_text,
    standard_error,
    start_token,
    text_losses,
)
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model


def random_model(**changes) -> Decoder:
    """A Decoder in float64 that has learned nothing."""
    torch.manual_seed(1)
    shape = {"vocab_size": 17, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16} | changes
    model = Decoder(DecoderConfig(**shape)).double().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model


@torch.no_grad()
def loss_of(model: Decoder, past: list[int], token: int) -> float:
    """The loss of one token, from all logits at once and one sequence."""
    return -model(torch.tensor([past]))[0, -1].log_softmax(dim=-1)[token].item()


@pytest.mark.parametrize("N", [1, 5, 8, 9, 23])
@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 1), (1, 1), (12, 5)])
def test_each_token_counts_once_with_the_past_that_its_window_has(N: int, context: int, stride: int):
    model, ids = random_model(), torch.randint(17, (N + 1,)).tolist()
    expected = []
    for place in range(N):  # of the token that predicts
        begin = 0 if place < context else stride * math.ceil((place - context + 1) / stride)
        expected.append(loss_of(model, ids[begin : place + 1], ids[place + 1]))
    with torch.no_grad():
        found = text_losses(model, torch.tensor(ids), context, stride)
    torch.testing.assert_close(
        found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5
    )


def test_at_stride_1_every_token_has_its_full_context():
    model, ids = random_model(), torch.randint(17, (30,)).tolist()
    expected = [loss_of(model, ids[max(0, i - 11) : i + 1], ids[i + 1]) for i in range(29)]
    with torch.no_grad():
        found = text_losses(model, torch.tensor(ids), 12, stride=1)
    torch.testing.assert_close(
        found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5
    )


def test_neither_batches_nor_chunks_of_logits_change_a_loss(monkeypatch: pytest.MonkeyPatch):
    model, ids = random_model(), torch.randint(17, (100,))
    with torch.no_grad():
        whole = text_losses(model, ids, 8, 3)
        monkeypatch.setattr(likelihood, "CHUNK_LOGITS", 17 * 5)
        monkeypatch.setattr(likelihood, "BATCH_TOKENS", 24)
        torch.testing.assert_close(text_losses(model, ids, 8, 3), whole)


class Pieces:
    """A tokenizer that cuts a text of the letters a to p into pieces of one size: 16 or 256 tokens."""

    special_tokens: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, size: int) -> None:
        self.size = size

    def encode(self, text: str) -> list[int]:
        numbers = [ord(letter) - 97 for letter in text]
        return [
            sum(x * 16**i for i, x in enumerate(numbers[at : at + self.size]))
            for at in range(0, len(numbers), self.size)
        ]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(97 + token // 16**i % 16 for token in ids for i in range(self.size))


def test_bits_per_byte_compare_across_tokenizers_and_perplexities_do_not():
    text = "".join(random.Random(0).choices("abcdefghijklmnop", k=2001))
    scores = {}
    for size in (1, 2):  # one that knows nothing finds all tokens equally likely, and here it is right
        model = random_model(vocab_size=16**size)
        torch.nn.init.zeros_(model.head.weight)
        scores[size], told = score_text(model, Pieces(size), ["p" * (size - 1) + text])
        assert scores[size].text_bytes == len(told) == 2000
        assert scores[size].bits_per_byte == pytest.approx(4)
    assert scores[1].perplexity == pytest.approx(16)
    assert scores[2].perplexity == pytest.approx(256)
    assert scores[1].word_perplexity == scores[2].word_perplexity


def test_documents_stand_behind_each_other_with_a_start_token_before_each(model, tokenizer):
    start, texts = start_token(tokenizer), ["The sky", "over the sea"]
    ids = [i for text in texts for i in (start, *tokenizer.encode(text))]
    expected = sum(loss_of(model, ids[: i + 1], ids[i + 1]) for i in range(len(ids) - 1))
    score, told = score_text(model, tokenizer, texts)
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert (score.tokens, told, score.words) == (len(ids) - 1, b"The skyover the sea", 4)


def test_a_limit_cuts_tokens_and_bytes_alike(model, tokenizer):
    text = SENTENCES[3]  # characters of several bytes
    for limit in range(1, len(tokenizer.encode(text))):
        score, told = score_text(model, tokenizer, [text], limit_tokens=limit)
        assert score.tokens == limit
        assert (
            told
            == text.encode()[: score.text_bytes]
            == tokenizer.decode_bytes(tokenizer.encode(text)[:limit])
        )


def test_what_was_learned_is_predicted_better_than_bzip2_does(model, tokenizer):
    score, told = score_text(model, tokenizer, [SENTENCES[0]])
    assert score.bits_per_byte < 0.5 < bzip2_bits_per_byte(told)
    assert bzip2_bits_per_byte(told) == 8 * len(bz2.compress(told, 9)) / len(told)


def test_a_score_of_a_hopeless_model_is_a_number():
    assert math.isfinite(TextScore(nats=1e5, tokens=1000, text_bytes=3, words=0).word_perplexity)


@pytest.mark.parametrize(
    ("context", "stride", "message"),
    [
        (13, 0, "context (13) must be at least 1 and at most 12"),
        (8, 9, "stride (9) must be at least 1 and at most context (8)"),
    ],
)
def test_impossible_windows_are_refused(context: int, stride: int, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        text_losses(random_model(), torch.zeros(20, dtype=torch.long), context, stride)


def test_an_empty_text_is_refused(model, tokenizer):
    for texts in ([], [""], ["", ""]):
        with pytest.raises(ValueError, match="must have something to predict"):
            score_text(model, tokenizer, texts)


# Continuations


def test_continuations_score_as_they_do_alone():
    model, rng = random_model(), random.Random(0)
    pairs = [([rng.randrange(17) for _ in range(a)], [rng.randrange(17) for _ in range(b)]) for a, b in
             [(1, 1), (5, 3), (20, 4), (2, 10), (12, 1), (1, 12), (7, 5)]]  # fmt: skip
    for (context, ids), found in zip(pairs, score_continuations(model, pairs), strict=True):
        row = (context + ids)[-13:]
        with torch.no_grad():
            logits = model(torch.tensor([row[:-1]]))[0, -len(ids) :]
        assert found.nats == pytest.approx(F.cross_entropy(logits, torch.tensor(ids), reduction="sum").item())
        assert found.greedy == (logits.argmax(dim=-1).tolist() == ids)


def test_the_likeliest_continuation_is_greedy(model, tokenizer):
    pairs = [encode_pair(tokenizer, "The sky over the sea is", word) for word in (" blue", " green")]
    right, wrong = score_continuations(model, pairs)
    assert right.greedy
    assert not wrong.greedy
    assert right.nats < wrong.nats


def test_a_continuation_without_tokens_or_room_is_refused():
    for pair in (([1], []), ([], [1]), ([1], [1] * 13)):
        with pytest.raises(ValueError, match="must be at least 1 and at most block_size"):
            score_continuations(random_model(), [pair])


def test_a_space_goes_to_the_continuation(tokenizer):
    one, other = encode_pair(tokenizer, "The sky", " is"), encode_pair(tokenizer, "The sky ", "is")
    assert one == other
    assert tokenizer.decode_bytes(one[1]) == b" is"
    assert one[0][0] == start_token(tokenizer)


# Questions

QUESTIONS = [
    Question("The sky over the sea is", (" red.", " blue.", " green."), 1),
    Question("The fox in the snow is", (" red.", " blue.", " green."), 0),
    Question("The grass on the hill is", (" red.", " blue.", " green."), 2),
]


def test_a_model_answers_what_it_has_learned(model, tokenizer):
    score = answer_questions(model, tokenizer, QUESTIONS)
    assert (score.accuracy, score.normalized, score.questions) == (1, 1, 3)
    assert score.chance == pytest.approx(1 / 3)
    wrong = answer_questions(
        model, tokenizer, [Question(q.context, q.choices, 2 - q.answer) for q in QUESTIONS]
    )
    assert wrong.accuracy == pytest.approx(1 / 3)  # the middle one stays right


def test_a_last_word_counts_if_it_is_what_the_model_would_write(model, tokenizer):
    words = [Question(q.context, (q.choices[q.answer],), 0) for q in QUESTIONS]
    score = answer_questions(model, tokenizer, words)
    assert (score.accuracy, score.normalized) == (1, None)
    assert 1 < score.perplexity < 1.5
    assert answer_questions(model, tokenizer, [Question("The sky", (" Brücke",), 0)]).accuracy == 0


def test_raw_and_normalized_choices_follow_their_definitions(
    model, tokenizer, monkeypatch: pytest.MonkeyPatch
):
    nats = [3.0, 4.0, 5.0]  # per byte of "a", "bb", "cccccc": 3, 2 and 5/6
    monkeypatch.setattr(likelihood, "score_continuations", lambda *_: [Continued(x, False) for x in nats])
    for answer, raw, normalized in ((0, 1, 0), (1, 0, 0), (2, 0, 1)):
        score = answer_questions(model, tokenizer, [Question("x", (" a", " bb", " cccccc"), answer)])
        assert (score.accuracy, score.normalized) == (raw, normalized)


def test_the_standard_error_is_that_of_a_share():
    assert standard_error(0.5, 1000) == pytest.approx(0.0158, abs=1e-4)


def test_no_questions_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"questions \(0\) must be at least one"):
        answer_questions(model, tokenizer, [])


def interact() -> None:
    """Score what is typed, token by token."""
    model, tokenizer = load_model("smollm2-135m")
    for text in ask("text> "):
        ids = [start_token(tokenizer) or 0, *tokenizer.encode(text)]
        with torch.no_grad():
            losses = text_losses(model, torch.tensor(ids), min(len(ids), model.config.block_size))
        for token, loss in zip(ids[1:], losses.tolist(), strict=True):
            print(f"{loss / math.log(2):7.2f} bits  {tokenizer.decode([token])!r}")
        print(f"{losses.sum().item() / math.log(2) / len(text.encode()):7.3f} bits per byte")


if __name__ == "__main__":
    run_validation(__file__, interact)
