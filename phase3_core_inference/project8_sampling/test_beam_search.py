"""Checks of beam search and of the two contrasts. --interactive searches with SmolLM2 for what you type."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from common.script import ask, run_validation
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.families import config_to_hf, parts_of
from phase1_foundation.project3_pretrain.model import Decoder
from phase3_core_inference.project8_sampling.beam_search import beam_search, score_of
from phase3_core_inference.project8_sampling.config import SearchConfig, WriterConfig
from phase3_core_inference.project8_sampling.contrastive import contrastive_logits, contrastive_search
from phase3_core_inference.project8_sampling.search import run

V, STOP, PAD = 24, 5, 23
SHAPE = DecoderConfig.llama(
    vocab_size=V, block_size=48, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, mlp_hidden=32, tied=False
)


def random_model(seed: int) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(SHAPE).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5).add_(weight.dim() == 1)
    return model.eval()


def in_transformers(model: Decoder):
    """Return transformers' model with these weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    facts = config_to_hf(SHAPE)
    facts.pop("model_type")
    theirs = LlamaForCausalLM(LlamaConfig(**facts)).double().eval()
    state = theirs.state_dict()
    for name, parts in dict(parts_of(SHAPE, "hf")).items():
        weight, start = model.state_dict()[name], 0
        for part in parts:  # several of theirs may be one of ours
            rows = state[part.name].shape[0]
            state[part.name].copy_(weight[start : start + rows])
            start += rows
    return theirs


SETTINGS = list(itertools.product((1, 2, 5), (0.0, 1.0, 2.0, -0.5), ("yes", "no", "never")))
THEIR_WORDS = {"yes": True, "no": False, "never": "never"}


@pytest.mark.parametrize("seed", range(6))
def test_beam_search_is_that_of_transformers_token_for_token(seed: int):
    model, draw = random_model(seed), random.Random(seed)
    theirs = in_transformers(model)
    lengths = set()
    for beams, length_penalty, early_stopping in SETTINGS:
        prompt = [draw.randrange(V) for _ in range(draw.randrange(1, 6))]
        new, stop = draw.randrange(2, 16), [[STOP], [STOP, 7], []][draw.randrange(3)]
        ours = beam_search(model, prompt, new, beams, stop, length_penalty, early_stopping)
        if beams == 1 and early_stopping != "yes":
            continue  # transformers has greedy search there, which does not look beyond a stop token
        expected = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), max_new_tokens=new,
            num_beams=beams, num_return_sequences=beams, length_penalty=length_penalty, do_sample=False,
            early_stopping=THEIR_WORDS[early_stopping], eos_token_id=stop or None, pad_token_id=PAD,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        if beams == 1:
            assert expected.sequences[0, len(prompt) :].tolist() == ours[0].tokens
            continue
        found = zip(ours, expected.sequences.tolist(), expected.sequences_scores.tolist(), strict=True)
        for hypothesis, sequence, score in found:
            written = sequence[len(prompt) :][: len(hypothesis.tokens)]
            assert written == hypothesis.tokens, (beams, length_penalty, early_stopping)
            assert set(sequence[len(prompt) + len(hypothesis.tokens) :]) <= {PAD}
            assert hypothesis.score == pytest.approx(score, abs=1e-4)
        lengths.update(len(hypothesis.tokens) for hypothesis in ours)
    assert len(lengths) > 5  # texts did end at different places


def test_scores_are_those_of_the_model_and_with_all_beams_the_best_text_is_found():
    model = random_model(1)
    found = beam_search(model, [3], 2, beams=V, length_penalty=0.0)
    with torch.no_grad():
        first = model(torch.tensor([[3]]))[0, -1].log_softmax(0)
        second = model(torch.tensor([[3, token] for token in range(V)]))[:, -1].log_softmax(1)
    total = first[:, None] + second
    best = total.flatten().argmax()
    assert found[0].tokens == [int(best) // V, int(best) % V]
    assert found[0].score == pytest.approx(float(total.max()), abs=1e-5)
    assert score_of([-1.0, -3.0], 1.0) == -2.0


def diverse_reference(model: Decoder, prompt: list[int], new: int, size: int, groups: int, diversity: float):
    """Diverse beam search over whole texts, with neither cache nor early end."""
    parties = [[((), 0.0)] for _ in range(groups)]
    for _ in range(new):
        taken = torch.zeros(V)
        for g, party in enumerate(parties):
            options = []
            for text, score in party:
                with torch.no_grad():
                    logprobs = model(torch.tensor([[*prompt, *text]]))[0, -1].float().log_softmax(0)
                options += [
                    ((*text, token), score + float(logprobs[token] - diversity * taken[token]))
                    for token in range(V)
                ]
            parties[g] = sorted(options, key=lambda option: -option[1])[:size]
            for text, _ in parties[g]:
                taken[text[-1]] += 1.0
    return [[list(text) for text, _ in party] for party in parties]


@pytest.mark.parametrize(
    ("size", "groups", "diversity"), [(1, 3, 0.7), (2, 2, 0.3), (2, 3, 5.0), (2, 2, 0.0)]
)
def test_diverse_beam_search_is_that_of_its_definition(size: int, groups: int, diversity: float):
    for seed in range(3):
        model = random_model(seed)
        found = beam_search(
            model, [1, 2], 6, size * groups, groups=groups, diversity=diversity, length_penalty=0.0
        )
        expected = diverse_reference(model, [1, 2], 6, size, groups, diversity)
        for g in range(groups):
            assert [h.tokens for h in found if h.group == g] == expected[g]


def test_diversity_makes_the_groups_differ():
    model = random_model(2)
    for diversity, differs in ((0.0, False), (100.0, True)):
        found = beam_search(model, [1], 4, 2, groups=2, diversity=diversity)
        a, b = (hypothesis.tokens for hypothesis in found)
        assert all(x != y for x, y in zip(a, b, strict=True)) == differs


# The two contrasts


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("alpha", "top_k"), [(0.0, 4), (0.6, 4), (0.9, 8), (1.0, 3)])
def test_contrastive_search_is_its_equation(alpha: float, top_k: int, seed: int):
    model, text = random_model(seed), [1, 2, 3]
    for token in contrastive_search(model, text, 10, alpha, top_k):
        with torch.no_grad():
            odds = model(torch.tensor([text]))[0, -1].softmax(0)
            scores = {}
            for candidate in odds.topk(top_k).indices.tolist():
                hidden = model.hidden(torch.tensor([[*text, candidate]]))[0]
                echo = F.cosine_similarity(hidden[-1:], hidden[:-1]).max()
                scores[candidate] = float((1 - alpha) * odds[candidate] - alpha * echo)
        assert token == max(scores, key=scores.__getitem__)
        text = [*text, token]


def test_contrastive_search_without_contrast_is_greedy_and_ends_at_a_stop_token():
    model = random_model(3)
    text, greedy = [1], []
    for _ in range(8):
        with torch.no_grad():
            greedy.append(int(model(torch.tensor([text + greedy]))[0, -1].argmax()))
    assert list(contrastive_search(model, text, 8, alpha=0.0)) == greedy
    found = list(contrastive_search(model, text, 8, alpha=0.0, stop=[greedy[2]]))
    assert found == greedy[: greedy.index(greedy[2]) + 1]


def test_contrastive_decoding_is_its_equation_and_equal_models_leave_no_contrast():
    expert, amateur = torch.randn(2, 50), torch.randn(2, 50)
    found = contrastive_logits(expert, amateur, 0.1, amateur_temperature=0.5)
    p, q = expert.softmax(1), (amateur / 0.5).softmax(1)
    plausible = p >= 0.1 * p.amax(1, keepdim=True)
    torch.testing.assert_close(found[plausible], (p / q).log()[plausible], atol=1e-4, rtol=1e-4)
    assert bool((found[~plausible] == -torch.inf).all())
    same = contrastive_logits(expert, expert)
    assert float(same[same > -torch.inf].abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beams": 3, "groups": 2}, r"beams \(3\) must be divisible by groups \(2\)"),
        ({"beams": 25}, r"beams \(25\) must be at most the 24 tokens"),
        ({"prompt": []}, r"prompt \(0 tokens\) must have at least 1 token"),
        (
            {"max_new_tokens": 48},
            r"prompt \(1 tokens\) must have at least 1 token, and with the 48 new ones at most 48",
        ),
    ],
)
def test_searches_that_cannot_be_are_refused_in_a_sentence(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        beam_search(random_model(0), **{"prompt": [1], "max_new_tokens": 4} | change)


def interact() -> None:
    for line in ask("text> "):
        run(SearchConfig(WriterConfig("smollm2-135m", line), max_new_tokens=30))


if __name__ == "__main__":
    run_validation(__file__, interact)
