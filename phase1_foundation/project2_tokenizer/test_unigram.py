"""Checks of the unigram tokenizer. --interactive shows the best and some random cuts of what you type."""

import io
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.script import ask, run_validation
from phase1_foundation.project2_tokenizer import unigram_train
from phase1_foundation.project2_tokenizer.unigram import UnigramTokenizer
from phase1_foundation.project2_tokenizer.unigram_train import Lattice, lay_out, seed_matches, train_unigram

ENGLISH = "".join(topics.values())[:200_000]  # Python's own manual, which every reader has
MIXED = "the cat sat on the mat, the rat sat on the cat; 日本語と日本 — naïve café 🙂🙂 aaaaaa\n\n\tx = 12345"


@pytest.fixture(scope="module")
def tokenizer() -> UnigramTokenizer:
    return UnigramTokenizer.train(ENGLISH, 1000, special_tokens=["<|end|>", "<|end|><|end|>"])


def random_tokenizer(seed: int, letters: str = "abc", longest: int = 4) -> UnigramTokenizer:
    """All bytes and a random half of all strings of these letters, with random scores."""
    rng = random.Random(seed)
    strings = ["".join(s) for n in range(1, longest + 1) for s in itertools.product(letters, repeat=n)]
    pieces = [bytes([b]) for b in range(256)]
    pieces += [s.encode() for s in strings if len(s.encode()) > 1 and rng.random() < 0.5]
    scores = {i: -rng.uniform(8, 12) if i < 256 else -rng.uniform(2, 12) for i in range(len(pieces))}
    return UnigramTokenizer(dict(enumerate(pieces)), scores, pattern="none")


def segmentations(tokenizer: UnigramTokenizer, data: bytes) -> Iterator[tuple[int, ...]]:
    """Every way to cut the data into pieces, by trying every first piece."""
    if not data:
        yield ()
    for i, piece in tokenizer.vocab.items():
        if data.startswith(piece):
            yield from ((i, *rest) for rest in segmentations(tokenizer, data[len(piece) :]))


def by_probability(tokenizer: UnigramTokenizer, text: str) -> list[tuple[float, tuple[int, ...]]]:
    found = [(sum(tokenizer.scores[i] for i in ids), ids) for ids in segmentations(tokenizer, text.encode())]
    return sorted(found, reverse=True)


# The best, the n best, and random segmentations


def test_viterbi_finds_the_best_of_all_segmentations():
    for seed in range(40):
        tokenizer = random_tokenizer(seed)
        text = "".join(random.Random(-seed).choices("abc", k=9))
        best, _ = by_probability(tokenizer, text)[0]
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert sum(tokenizer.scores[i] for i in ids) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("text", ["abcabcab", "aaaaaaaa", "a", "", "aé日b"])
def test_nbest_are_the_first_n_of_all_segmentations_in_order(text):
    tokenizer = random_tokenizer(7, "abé日" if "é" in text else "abc")
    everything = by_probability(tokenizer, text)
    found = tokenizer.nbest(text, 50)
    assert len(found) == min(50, len(everything))
    assert [score for _, score in found] == pytest.approx([score for score, _ in everything[:50]], abs=1e-9)
    assert len({tuple(ids) for ids, _ in found}) == len(found)
    for ids, score in found:
        assert tokenizer.decode(ids) == text
        assert score == pytest.approx(sum(tokenizer.scores[i] for i in ids), abs=1e-9)


def test_the_best_of_nbest_is_as_good_as_what_encode_returns(tokenizer):
    text = ENGLISH[:2000]  # has runs of spaces: many segmentations tie, and a wrong search would try them all
    (best, score), *others = tokenizer.nbest(text, 20)
    assert tokenizer.decode(best) == text
    assert score == pytest.approx(sum(tokenizer.scores[i] for i in best))
    assert score == pytest.approx(sum(tokenizer.scores[i] for i in tokenizer.encode(text)))
    assert all(a[1] >= b[1] for a, b in itertools.pairwise(others))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_samples_follow_the_probabilities_to_the_power_alpha(alpha):
    tokenizer = random_tokenizer(3)
    everything = by_probability(tokenizer, "abcab")
    weights = {ids: math.exp(alpha * score) for score, ids in everything}
    rng, n = random.Random(0), 20_000
    drawn = Counter(tuple(tokenizer.sample("abcab", alpha, rng)) for _ in range(n))
    assert drawn.keys() <= weights.keys()
    assert p_value(drawn, {ids: n * w / sum(weights.values()) for ids, w in weights.items()}) > 1e-4


def p_value(observed: Counter, expected: dict) -> float:
    """Pearson's chi-square test; cells that expect fewer than 5 are taken together."""
    rare = [key for key, value in expected.items() if value < 5]
    cells = [(observed[key], value) for key, value in expected.items() if value >= 5]
    if rare:
        cells.append((sum(observed[key] for key in rare), sum(expected[key] for key in rare)))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)).item()


def test_the_chi_square_test_notices_a_wrong_alpha():
    tokenizer = random_tokenizer(3)
    weights = {ids: math.exp(0.3 * score) for score, ids in by_probability(tokenizer, "abcab")}
    rng, n = random.Random(0), 20_000
    drawn = Counter(tuple(tokenizer.sample("abcab", 0.4, rng)) for _ in range(n))
    assert p_value(drawn, {ids: n * w / sum(weights.values()) for ids, w in weights.items()}) < 1e-4


def test_large_alpha_samples_are_the_best_segmentation(tokenizer):
    text = ENGLISH[:500]
    assert tokenizer.sample(text, alpha=1e6, rng=random.Random(0)) == tokenizer.encode(text)


def test_sampling_repeats_with_the_seed_and_always_decodes_to_the_text(tokenizer):
    one, two = (tokenizer.sample(MIXED, 0.2, random.Random(5)) for _ in range(2))
    assert one == two
    assert one != tokenizer.encode(MIXED)
    assert tokenizer.decode(one) == MIXED


def test_smoothing_decides_how_often_another_than_the_best_segmentation_is_drawn(tokenizer):
    rng = random.Random(0)
    words = rng.sample(ENGLISH.split(), 2000)

    def unchanged(alpha: float) -> float:
        return sum(tokenizer.sample(word, alpha, rng) == tokenizer.encode(word) for word in words) / len(
            words
        )

    assert unchanged(1.0) > 0.9
    assert unchanged(0.1) < 0.6


# Training


def small_lattice() -> tuple[Lattice, list[bytes], np.ndarray, dict[bytes, int]]:
    counts = {b"abcab": 3, b"bcab": 2, b"cabc": 1, b"a": 4}
    corpus = lay_out(counts)
    matches = seed_matches(corpus, 100, 4)
    log_p = np.log(matches.total + 0.1) - np.log((matches.total + 0.1).sum())
    return Lattice(corpus, matches), matches.pieces, log_p, counts


def log_likelihood(counts: dict[bytes, int], log_p: dict[bytes, torch.Tensor]) -> torch.Tensor:
    """The definition: for each chunk the log of the sum over all segmentations."""
    total = torch.zeros((), dtype=torch.float64)
    for chunk, count in counts.items():
        scores = [
            torch.stack([log_p[p] for p in cut]).sum() for cut in cuts(chunk) if all(p in log_p for p in cut)
        ]
        total = total + count * torch.logsumexp(torch.stack(scores), 0)
    return total


def cuts(chunk: bytes) -> Iterator[list[bytes]]:
    for borders in itertools.product([False, True], repeat=len(chunk) - 1):
        places = [0, *(i + 1 for i, border in enumerate(borders) if border), len(chunk)]
        yield [chunk[a:b] for a, b in itertools.pairwise(places)]


def test_forward_backward_gives_the_likelihood_and_its_gradient():
    lattice, pieces, log_p, counts = small_lattice()
    variable = torch.tensor(log_p, requires_grad=True)
    expected = log_likelihood(counts, dict(zip(pieces, variable, strict=True)))
    (gradient,) = torch.autograd.grad(expected, variable)
    likelihood, posterior = lattice.forward_backward(log_p)
    assert likelihood == pytest.approx(expected.item(), abs=1e-9)
    np.testing.assert_allclose(lattice.expected_counts(posterior, len(pieces)), gradient.numpy(), atol=1e-9)


def test_a_loss_is_what_the_likelihood_loses_without_the_piece():
    lattice, pieces, log_p, counts = small_lattice()
    likelihood, posterior = lattice.forward_backward(log_p)
    losses = lattice.losses(posterior, len(pieces))
    scores = dict(zip(pieces, torch.tensor(log_p), strict=True))
    once = [p for p in pieces if len(p) > 1 and all(chunk.count(p) < 2 for chunk in counts)]
    assert len(once) >= 5
    for piece in once:
        without = log_likelihood(counts, {p: score for p, score in scores.items() if p != piece})
        assert losses[pieces.index(piece)] == pytest.approx(likelihood - without.item(), abs=1e-9)


def test_the_likelihood_never_falls_between_prunings():
    steps: list[tuple[int, float]] = []
    counts = Counter(ENGLISH[:50_000].encode().split(b" "))
    train_unigram(counts, 500, on_step=lambda pieces, likelihood: steps.append((pieces, likelihood)))
    rounds = [
        [value for _, value in group] for _, group in itertools.groupby(steps, key=lambda step: step[0])
    ]
    assert len(rounds) > 5
    assert all(len(values) == unigram_train.EM_STEPS for values in rounds)
    assert all(b >= a for values in rounds for a, b in itertools.pairwise(values))


def test_many_em_steps_climb_and_settle():
    corpus = lay_out(Counter(ENGLISH[:20_000].encode().split(b" ")))
    matches = seed_matches(corpus, 300, 8)
    values: list[float] = []
    unigram_train.em_steps(Lattice(corpus, matches), matches.total, lambda _, value: values.append(value), 30)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(values))
    assert values[-1] - values[-2] < 1e-4 * (values[1] - values[0])


def test_the_seeds_are_the_repeated_substrings_of_whole_characters():
    counts = {"banana ананас".encode(): 2, b"banana": 1, "日本日本".encode(): 1, b"x": 9}
    truth: Counter[bytes] = Counter()
    for chunk, count in counts.items():
        text = chunk.decode()
        for begin, end in itertools.combinations(range(len(text) + 1), 2):
            piece = text[begin:end].encode()
            if 1 < len(piece) <= 8:
                truth[piece] += count
    repeated = {piece: count for piece, count in truth.items() if count > 1}
    matches = seed_matches(lay_out(counts), 10_000, 8)
    assert dict(zip(matches.pieces[256:], matches.total[256:], strict=True)) == repeated
    assert Counter(matches.piece[matches.piece >= 256].tolist()).keys() == set(
        range(256, 256 + len(repeated))
    )

    few = seed_matches(lay_out(counts), 5, 8)
    coverage = sorted((len(piece) * count for piece, count in repeated.items()), reverse=True)
    assert (
        sorted((len(p) * n for p, n in zip(few.pieces[256:], few.total[256:], strict=True)), reverse=True)
        == coverage[:5]
    )


def test_training_learns_the_words_that_made_the_text():
    rng = random.Random(0)
    words = ["wolf", "badger", "hare", "fox", "otter", "mole"]
    text = "".join(rng.choice(words) for _ in range(3000))  # no spaces: nothing says where a word ends
    tokenizer = UnigramTokenizer.train(text, 256 + len(words), pattern="none")
    assert set(list(tokenizer.vocab.values())[256:]) == {word.encode() for word in words}


def test_the_vocabulary_has_the_size_that_was_asked_for_and_falls_in_probability(tokenizer):
    assert tokenizer.vocab_size == 1000 == len(tokenizer.vocab) + 2
    scores = [tokenizer.scores[i] for i in range(256, 998)]
    assert scores == sorted(scores, reverse=True)
    assert sum(map(math.exp, tokenizer.scores.values())) == pytest.approx(1)


def test_what_the_text_never_uses_gets_half_an_occurrence():
    learned = train_unigram({b"ab": 10}, 256)
    total = 10 + 10 + 254 / 2
    assert math.exp(learned[b"a"]) == pytest.approx(10 / total)
    assert math.exp(learned[b"\0"]) == pytest.approx(0.5 / total)


def test_where_the_iterator_cuts_the_text_does_not_matter():
    texts = [ENGLISH[i : i + 997] for i in range(0, 20_000, 997)]
    one = UnigramTokenizer.train("".join(texts), 400)
    two = UnigramTokenizer.train_from_iterator(iter(texts), 400)
    assert (one.vocab, one.scores) == (two.vocab, two.scores)


@pytest.mark.parametrize("text", ["", "a", "aaaaaaaa" * 1000, "🙂", "the " * 10, "\x00" * 50])
@pytest.mark.parametrize("pattern", ["gpt4", "none"])
def test_odd_corpora_train(text, pattern):
    tokenizer = UnigramTokenizer.train(text, 300, pattern=pattern)
    assert 256 <= tokenizer.vocab_size <= 300
    assert tokenizer.decode(tokenizer.encode(text + MIXED)) == text + MIXED


def test_long_chunks_are_cut_between_characters():
    chunk = "日本".encode() * 1000
    short = unigram_train.cut_long_chunks({chunk: 2, b"": 5, b"ab": 1})
    assert sum(len(part) * count for part, count in short.items()) == 2 * len(chunk) + 2
    assert max(map(len, short)) <= 1000
    for part in short:
        part.decode()  # raises where a character was cut
    assert max(map(len, unigram_train.cut_long_chunks({b"\x80" * 5000: 1}))) <= 1000


# Round trips


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.binary())
@settings(max_examples=200, deadline=None)
def test_any_bytes_come_back(tokenizer, data):
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
    assert tokenizer.decode_bytes(tokenizer.sample(data, 0.5)) == data
    assert all(tokenizer.decode_bytes(ids) == data for ids, _ in tokenizer.nbest(data, 3))


def test_a_million_equal_letters_take_linear_time(tokenizer):
    ids = tokenizer.encode("e" * 1_000_000)
    assert tokenizer.decode(ids) == "e" * 1_000_000


def test_user_text_that_spells_a_special_token_stays_text(tokenizer):
    end, twice = tokenizer.special_tokens["<|end|>"], tokenizer.special_tokens["<|end|><|end|>"]
    text = "a<|end|>b<|end|><|end|>"
    assert not {end, twice} & set(tokenizer.encode(text))
    assert tokenizer.encode(text, {"<|end|>"}).count(end) == 3
    ids = tokenizer.encode(text, "all")
    assert (ids.count(end), ids.count(twice)) == (1, 1)
    assert tokenizer.decode(ids) == text


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = UnigramTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode(MIXED + ENGLISH[:5000]) == tokenizer.encode(MIXED + ENGLISH[:5000])
    assert (loaded.scores, loaded.special_tokens) == (tokenizer.scores, tokenizer.special_tokens)


def test_bad_input_gets_a_clear_error(tokenizer):
    vocab, scores = tokenizer.vocab, tokenizer.scores
    with pytest.raises(ValueError, match=r"scores\[5\] \(nan\) must be finite"):
        UnigramTokenizer(vocab, scores | {5: math.nan})
    with pytest.raises(ValueError, match=r"scores \(\d+ ids\) must have the ids of vocab"):
        UnigramTokenizer(vocab, scores | {123456: -1.0})
    with pytest.raises(ValueError, match=r"must have all 256 bytes; 1 are missing"):
        UnigramTokenizer({i: vocab[i] for i in vocab if i != 65}, {i: scores[i] for i in vocab if i != 65})
    with pytest.raises(ValueError, match=r"must be a piece of its own"):
        UnigramTokenizer(vocab | {5000: b"a"}, scores | {5000: -1.0})
    with pytest.raises(ValueError, match=r"pattern \('gpt9'\) must be one of gpt2, gpt4"):
        UnigramTokenizer(vocab, scores, pattern="gpt9")
    with pytest.raises(ValueError, match=r"vocab_size \(256\) must be at least 256 \+ 1 special tokens"):
        UnigramTokenizer.train("text", 256, special_tokens=["<|end|>"])
    with pytest.raises(ValueError, match=r"pattern \('gpt9'\) must be one of gpt2, gpt4"):
        UnigramTokenizer.train("text", 300, pattern="gpt9")
    with pytest.raises(ValueError, match=r"size \(100\) must be at least 256"):
        train_unigram({b"text": 1}, 100)
    with pytest.raises(ValueError, match=r"id \(123456\) must be one of the 1000 in the vocabulary"):
        tokenizer.decode([123456])
    with pytest.raises(ValueError, match="must be without lone surrogates"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(ValueError, match=r"alpha \(-1\) must be"):
        tokenizer.sample("a", -1)
    with pytest.raises(ValueError, match=r"n \(0\) must be"):
        tokenizer.nbest("a", 0)


# The libraries. Both fall back to bytes by a rule: a character that is no piece costs the worst score minus
# 10. Giving that to a character's first byte, and 0 to its other bytes, says the same with pieces alone.


def like_theirs(pieces: dict[str, float]) -> UnigramTokenizer:
    unknown = min(pieces.values()) - 10
    scores = {bytes([b]): 0.0 if 0x80 <= b < 0xC0 else unknown for b in range(256)}
    scores |= {piece.encode(): score for piece, score in pieces.items()}
    return UnigramTokenizer(dict(enumerate(scores)), dict(enumerate(scores.values())), pattern="none")


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_hugging_face_on_random_vocabularies(seed):
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(seed)
    letters = "ab é日🙂"
    pieces = {"".join(rng.choices(letters, k=rng.randint(1, 4))): -rng.uniform(2, 12) for _ in range(60)}
    names = [("<unk>", 0.0), *pieces.items(), *((f"<0x{b:02X}>", 0.0) for b in range(256))]
    theirs = tokenizers.Tokenizer(tokenizers.models.Unigram(names, unk_id=0, byte_fallback=True))
    ours = like_theirs(pieces)
    for _ in range(200):
        text = "".join(rng.choices(letters + "xß語", k=rng.randint(1, 40)))
        encoded = [names[i][0] for i in theirs.encode(text).ids]
        as_bytes = [bytes.fromhex(name[3:5]) if name.startswith("<0x") else name.encode() for name in encoded]
        assert [ours.vocab[i] for i in ours.encode(text)] == as_bytes


def test_equal_to_sentencepiece_with_a_vocabulary_that_it_trained():
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ENGLISH.splitlines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=1200,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = {}
    for i in range(theirs.vocab_size()):
        if not (theirs.is_unknown(i) or theirs.is_control(i) or theirs.is_byte(i)):
            pieces[theirs.id_to_piece(i).replace("▁", " ")] = theirs.get_score(i)
    ours = like_theirs(pieces)
    for text in [*ENGLISH.splitlines()[:500], MIXED, "ß∂ x日本 a", "  a   b  "]:
        names = theirs.encode_as_pieces(text)
        as_bytes = [
            bytes.fromhex(name[3:5])
            if theirs.is_byte(theirs.piece_to_id(name))
            else name.replace("▁", " ").encode()
            for name in names
        ]
        assert [ours.vocab[i] for i in ours.encode(text)] == as_bytes


def interact() -> None:
    """Show the best, the next best and some random segmentations of each typed text."""
    tokenizer = UnigramTokenizer.train("".join(topics.values()), 5000)
    rng = random.Random(0)
    for text in ask("text> "):
        for ids, score in tokenizer.nbest(text, 3):
            print(f"{score:9.2f}  " + "|".join(tokenizer.decode([i]) for i in ids))
        for _ in range(3):
            print("   sample  " + "|".join(tokenizer.decode([i]) for i in tokenizer.sample(text, 0.2, rng)))


if __name__ == "__main__":
    run_validation(__file__, interact)
