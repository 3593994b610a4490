"""Checks of sampling through the cache. --interactive writes several answers to what you type."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from common.script import ask, run_validation
from phase1_foundation.project3_pretrain.config import MODEL, DecoderConfig
from phase1_foundation.project3_pretrain.generate import generate
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project6_alignment import rollouts
from phase2_finetuning.project6_alignment.rollouts import LeftPaddedCache, Rollout, draw, sample

V, STOP = 23, 7
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5], [8, 9]]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"n_kv_head": 2, "mlp_hidden": 0, "qk_norm": True},
    "gpt2": {},
}


def make(family: str = "llama", dtype: torch.dtype = torch.float64) -> Decoder:
    """Return a model of random weights, large enough that its odds are far from uniform."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": V, "block_size": 40, "n_layer": 2, "n_head": 4, "n_embd": 32}
    model = Decoder(getattr(DecoderConfig, family)(**shape | FAMILIES[family]))
    for weight in model.parameters():
        weight.data *= 4
    return model.to(dtype).eval()


def expected_logprobs(model: Decoder, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Return the log-odds as a trainer finds them: all rows at once, without a cache, from column 0."""
    with torch.no_grad():
        odds = (model(rollout.tokens) / temperature).log_softmax(dim=-1)[:, :-1]
    return odds.gather(2, rollout.tokens[:, 1:, None])[:, :, 0]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes of the tokens that models are given from now on."""
    shapes: list[tuple[int, int]] = []
    hidden: Callable[..., Tensor] = Decoder.hidden

    def spy(self: Decoder, tokens: Tensor, *rest: Any) -> Tensor:
        shapes.append((tokens.shape[0], tokens.shape[1]))
        return hidden(self, tokens, *rest)

    monkeypatch.setattr(Decoder, "hidden", spy)
    return shapes


# The cache


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_rows_of_unequal_length_are_those_of_each_row_alone(family: str):
    model, steps = make(family), 5
    more = torch.randint(V, (len(PROMPTS), steps))
    cache = LeftPaddedCache([len(prompt) for prompt in PROMPTS], 7 + steps)
    padded = torch.tensor([[0] * (7 - len(prompt)) + prompt for prompt in PROMPTS])
    with torch.no_grad():
        found = [model(padded, cache)[:, -1], *(model(token, cache)[:, -1] for token in more.split(1, 1))]
        for row, prompt in enumerate(PROMPTS):
            alone = model(torch.tensor([prompt + more[row].tolist()]))[0, len(prompt) - 1 :]
            torch.testing.assert_close(torch.stack(found)[:, row], alone, atol=1e-12, rtol=1e-12)


def test_rows_that_are_kept_copied_or_reordered_keep_their_past():
    model, order = make(), torch.tensor([3, 0, 0])
    cache = LeftPaddedCache([len(prompt) for prompt in PROMPTS], 12)
    padded = torch.tensor([[0] * (7 - len(prompt)) + prompt for prompt in PROMPTS])
    with torch.no_grad():
        model(padded, cache)
        cache.keep(order)
        assert cache.past[0].shape[3] == cache.room == 8  # four columns were padding for all of them
        for token in ([11, 12, 13], [14, 15, 16]):
            found = model(torch.tensor(token)[:, None], cache)[:, -1]
        for row, text in enumerate([[8, 9, 11, 14], [3, 1, 4, 12, 15], [3, 1, 4, 13, 16]]):
            torch.testing.assert_close(found[row], model(torch.tensor([text]))[0, -1], atol=1e-12, rtol=1e-12)


# The rollout


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_log_odds_equal_the_trainers(dtype: torch.dtype, error: float, temperature: float):
    # Those of float32 are sums of a few dozen roundings of 6e-8 in logits that reach some dozens.
    model = make(dtype=dtype)
    rollout = sample(model, PROMPTS, 16, temperature, {STOP}, seed=1, samples=6)
    expected = expected_logprobs(model, rollout, temperature)
    mask = rollout.mask[:, 1:]
    assert mask.sum() > 100
    torch.testing.assert_close(rollout.logprobs[:, 1:][mask], expected[mask], atol=error, rtol=0)
    assert not rollout.logprobs[~rollout.mask].any()


def test_a_rows_answer_is_its_prompt_then_what_was_written_up_to_a_stop():
    rollout = sample(make(), PROMPTS, 16, stop={STOP, 2}, seed=1, samples=6)
    stopped = 0
    for row, answer in enumerate(rollout.answers()):
        prompt = PROMPTS[row // 6]
        ends = bool(rollout.stopped[row])
        written = rollout.tokens[row, rollout.mask[row]].tolist()
        assert rollout.tokens[row, : len(prompt)].tolist() == prompt
        assert rollout.mask[row].nonzero()[:, 0].tolist() == list(
            range(len(prompt), len(prompt) + len(written))
        )
        assert written[: len(answer)] == answer
        assert not {STOP, 2} & set(answer)
        assert (len(written) - len(answer), len(written) == 16 or ends) == (int(ends), True)
        stopped += ends
    assert 0 < stopped < len(rollout.stopped)
    assert rollout.mask[:, -1].any()  # no column is wasted


def test_who_shares_the_batch_changes_no_answer(monkeypatch: pytest.MonkeyPatch):
    model = make()
    together = sample(model, PROMPTS, 16, stop={STOP}, seed=5)
    monkeypatch.setattr(rollouts, "CROWDED", 0.0)  # nobody leaves
    assert sample(model, PROMPTS, 16, stop={STOP}, seed=5).answers() == together.answers()
    others = sample(model, [PROMPTS[0], [20, 21, 22, 20, 21], *PROMPTS[2:]], 16, stop={STOP}, seed=5)
    same = [mine == theirs for mine, theirs in zip(others.answers(), together.answers(), strict=True)]
    assert same == [True, False, True, True]


def test_the_seed_decides_and_other_random_numbers_do_not():
    model = make()
    first = sample(model, PROMPTS, 16, seed=5)
    torch.rand(3)
    assert sample(model, PROMPTS, 16, seed=5).answers() == first.answers()
    assert sample(model, PROMPTS, 16, seed=6).answers() != first.answers()


def test_rows_that_are_done_leave_and_prompts_are_read_once(forwards: list[tuple[int, int]]):
    rollout = sample(make(), PROMPTS, 16, stop={STOP, 2, 5}, seed=1, samples=8)
    assert forwards[0] == (4, 7)
    sizes = [rows for rows, _ in forwards[1:]]
    assert sizes[0] == 32
    assert sizes == sorted(sizes, reverse=True)
    assert {width for _, width in forwards[1:]} == {1}
    for step, size in enumerate(sizes, start=1):
        writing = int((rollout.mask.sum(dim=1) > step).sum())
        assert writing <= size < max(writing / rollouts.CROWDED, 1.5) + 1


def test_writing_ends_when_all_are_done(forwards: list[tuple[int, int]]):
    rollout = sample(make(), PROMPTS, 16, stop=set(range(V)))
    assert len(forwards) == 1
    assert rollout.answers() == [[], [], [], []]
    assert rollout.mask.sum(dim=1).tolist() == [1, 1, 1, 1]


def test_tokens_are_drawn_with_the_odds_of_the_model_at_the_temperature():
    model, count, temperature = make(), 20_000, 1.7
    rollout = sample(model, [[3, 1, 4]], 1, temperature, seed=3, samples=count)
    with torch.no_grad():
        odds = (model(torch.tensor([[3, 1, 4]]))[0, -1] / temperature).softmax(dim=0)
    seen = rollout.tokens[:, 3].bincount(minlength=V)
    expected = odds * count
    usual = expected > 5
    chi_square = ((seen - expected)[usual] ** 2 / expected[usual]).sum()
    assert usual.sum() > 10
    assert chi_square < 60  # of at most 22 degrees of freedom: once in 40,000 seeds


@pytest.mark.parametrize("family", FAMILIES)
def test_at_temperature_zero_it_writes_what_generate_writes(family: str):
    model = make(family)
    rollout = sample(model, PROMPTS, 12, temperature=0, stop={STOP})
    alone = [list(generate(model, prompt, 12, temperature=0, stop={STOP})) for prompt in PROMPTS]
    assert rollout.answers() == alone
    mask = rollout.mask[:, 1:]
    torch.testing.assert_close(rollout.logprobs[:, 1:][mask], expected_logprobs(model, rollout)[mask])


def test_a_token_without_a_chance_is_never_drawn():
    logits = torch.full((4, 6), float("-inf"))
    logits[:, 2], logits[:, 4] = 0.0, 1.0
    noise = torch.tensor([0.0, 0.2, 0.9, 1 - 2**-53], dtype=torch.float64)
    token, odds = draw(logits, 1.0, noise)
    assert token.tolist() == [2, 2, 4, 4]
    assert odds.isfinite().all()


def test_dropout_is_off_while_writing_and_training_goes_on_after():
    model = make().train()
    for block in model.blocks:
        block.dropout = torch.nn.Dropout(0.5)
    rollout = sample(model, PROMPTS, 8, seed=2)
    assert model.training
    assert rollout.answers() == sample(make(), PROMPTS, 8, seed=2).answers()


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 4, r"prompts \(0\) must be at least one, of at least one token each"),
        ([[1], []], 4, r"prompts \(2\) must be at least one"),
        ([[1]], 0, r"max_new_tokens \(0\) must be at least 1"),
        (
            [[1], [1] * 37],
            4,
            r"of 37 tokens\) must have at most block_size - max_new_tokens \(40 - 4\)",
        ),
    ],
)
def test_prompts_that_leave_no_room_are_refused(prompts: list, new: int, message: str):
    with pytest.raises(ValueError, match=message):
        sample(make(), prompts, new)


def test_the_context_can_be_filled_to_its_end():
    rollout = sample(make(), [[1] * 36, [2]], 4)
    assert rollout.mask.sum(dim=1).tolist() == [4, 4]
    assert rollout.tokens.shape[1] == 40


def interact() -> None:
    """Let the pretrained model go on from a text eight times."""
    model, tokenizer = load_model(MODEL)
    for text in ask("text> "):
        rollout = sample(model, [tokenizer.encode(text)], 24, temperature=0.8, samples=8)
        for row, mask, logprobs in zip(rollout.tokens, rollout.mask, rollout.logprobs, strict=True):
            print(f"{logprobs.sum():8.2f} nats  {tokenizer.decode(row[mask].tolist())!r}")


if __name__ == "__main__":
    run_validation(__file__, interact)
