"""Checks of sampling and generate.py. --interactive shows what each setting leaves to draw from."""

import io
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.checkpoints import save_checkpoint
from common.script import ask, run_validation
from phase1_foundation.project1_minimal_gpt import generate as script
from phase1_foundation.project1_minimal_gpt.config import CHECKPOINT, GenerateConfig, GPTConfig
from phase1_foundation.project1_minimal_gpt.conftest import Trained
from phase1_foundation.project1_minimal_gpt.generate import generate, load_gpt, next_token_odds, run
from phase1_foundation.project1_minimal_gpt.model import GPT

ODDS = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625])  # sums of these are exact


def support(**settings: float | None) -> set[int]:
    return set(next_token_odds(ODDS.log(), **settings).nonzero().flatten().tolist())


def small_gpt() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=12, n_layer=1, n_head=2, n_embd=16))
    for weight in model.parameters():
        weight.data.normal_(0, 0.5)  # odds far from even
    return model.eval()


# Odds


def test_temperature_divides_the_logits():
    logits = torch.tensor([1.0, 2.0, -1.0])
    for temperature in (0.1, 1.0, 3.0):
        odds = [math.exp(x / temperature) for x in logits.tolist()]
        expected = torch.tensor(odds) / sum(odds)
        torch.testing.assert_close(next_token_odds(logits, temperature), expected)
    assert next_token_odds(logits, 0).tolist() == [0, 1, 0]
    assert next_token_odds(torch.tensor([2.0, 2.0]), 0).sum() == 1  # of equals, one


@pytest.mark.parametrize(
    ("top_k", "kept"),
    [
        (1, {1}),
        (2, {1, 3}),
        (3, {0, 1, 3}),
        (5, {0, 1, 2, 3, 4}),
        (99, {0, 1, 2, 3, 4}),
        (None, {0, 1, 2, 3, 4}),
    ],
)
def test_top_k_keeps_exactly_the_k_likeliest(top_k: int | None, kept: set[int]):
    assert support(top_k=top_k) == kept
    odds = next_token_odds(ODDS.log(), top_k=top_k)
    places = sorted(kept)
    torch.testing.assert_close(odds[places], ODDS[places] / ODDS[places].sum())  # their ratios stay


def test_top_k_keeps_k_where_several_are_equally_likely():
    assert (next_token_odds(torch.zeros(10), top_k=4) > 0).sum() == 4


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, {1}), (0.5, {1}), (0.51, {1, 3}), (0.75, {1, 3}), (0.8, {0, 1, 3}), (0.875, {0, 1, 3}),
     (0.9, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3, 4})],
)  # fmt: skip
def test_top_p_keeps_exactly_the_fewest_that_add_up_to_p(top_p: float, kept: set[int]):
    assert support(top_p=top_p) == kept
    assert next_token_odds(ODDS.log(), top_p=top_p).sum() == pytest.approx(1)


def test_top_p_counts_what_top_k_left_and_both_what_temperature_made():
    assert support(top_k=2, top_p=0.6) == {1}  # of the two, the first has two thirds
    assert support(top_p=0.6) == {1, 3}
    assert support(temperature=0.5, top_p=0.6) == {1}  # squared odds: 16/22 for the first
    assert support(temperature=100.0, top_p=0.6) == {0, 1, 3}


@given(
    st.lists(st.integers(-120, 120), min_size=1, max_size=40, unique=True),
    st.floats(0.05, 5),
    st.none() | st.integers(1, 50),
    st.none() | st.floats(0.01, 1),
)
def test_odds_are_a_distribution_that_keeps_the_order_of_the_logits(quarters, temperature, top_k, top_p):
    logits = [n / 4 for n in quarters]  # far enough apart that no two have the same odds by rounding
    odds = next_token_odds(torch.tensor(logits), temperature, top_k, top_p)
    assert odds.sum().item() == pytest.approx(1, abs=1e-5)
    assert odds[max(range(len(logits)), key=logits.__getitem__)] == odds.max() > 0
    if top_k is not None:
        assert (odds > 0).sum() <= top_k
    kept = [x for x, odd in zip(logits, odds.tolist(), strict=True) if odd > 0]
    assert all(x <= min(kept) or x in kept for x in logits)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.9}]
)
def test_odds_equal_those_of_hugging_face(settings: dict[str, float]):
    from transformers.generation import logits_process as theirs

    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3
    warped = logits[None] / settings.get("temperature", 1.0)
    if "top_k" in settings:
        warped = theirs.TopKLogitsWarper(settings["top_k"])(torch.zeros(1, 1), warped)
    if "top_p" in settings:
        warped = theirs.TopPLogitsWarper(settings["top_p"])(torch.zeros(1, 1), warped)
    torch.testing.assert_close(next_token_odds(logits, **settings), warped[0].softmax(dim=0))


# Drawing


def test_the_same_seed_writes_the_same_whatever_else_draws():
    model = small_gpt()
    first = list(generate(model, [1, 2], 50, seed=5))
    torch.rand(7)
    assert list(generate(model, [1, 2], 50, seed=5)) == first
    assert list(generate(model, [1, 2], 50, seed=6)) != first
    assert list(generate(model, [1, 2], 20, seed=5)) == first[:20]
    assert len(first) == 50


def test_temperature_0_always_takes_the_likeliest_of_the_last_block_size_tokens():
    model = small_gpt()
    ids = [3]
    for token in generate(model, [3], 30, temperature=0, seed=1):
        assert token == model(torch.tensor([ids[-8:]]))[0, -1].argmax()
        ids.append(token)
    seen: list[list[int]] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].tolist()))
    assert list(generate(model, [3], 30, temperature=0, seed=2)) == ids[1:]
    assert seen == [ids[max(0, end - 8) : end] for end in range(1, 31)]
    assert list(generate(model, [3], 30, temperature=2.0, top_k=1)) == ids[1:]


@pytest.mark.parametrize("settings", [{"temperature": 0.5}, {"top_k": 6}, {"top_p": 0.8}])
def test_drawn_tokens_follow_the_stated_odds(settings: dict[str, float]):
    model, draws = small_gpt(), 500
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2]]))[0, -1]
    odds = next_token_odds(logits, **({"temperature": 0.8} | settings))
    drawn = [next(generate(model, [1, 2], 1, seed=seed, **settings)) for seed in range(draws)]
    counts = torch.bincount(torch.tensor(drawn), minlength=12)
    assert not counts[odds == 0].any()
    often = odds * draws >= 5  # rarer ones are counted together, as the test of chi-square asks for
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([odds[often], odds[~often].sum()[None]]) * draws
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    assert freedom >= 2
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_writing_leaves_the_model_in_the_mode_it_was_in():
    model = small_gpt()
    for training in (True, False):
        model.train(training)
        list(generate(model, [1], 2))
        assert model.training == training


@pytest.mark.parametrize("length", [0, 9])
def test_a_prompt_that_is_empty_or_longer_than_the_context_is_refused_in_words(length: int):
    with pytest.raises(
        ValueError, match=rf"prompt \({length} tokens\) must have .* at most block_size \(8\)"
    ):
        next(generate(small_gpt(), [1] * length, 1))
    assert len(list(generate(small_gpt(), [1] * 8, 1))) == 1


# The script


@pytest.fixture
def asked(trained: Trained) -> GenerateConfig:
    return GenerateConfig(
        checkpoint=trained.out / "model.pt", prompt="to be", max_new_tokens=20, device="cpu"
    )


def test_it_prints_what_it_returns_prompt_first(asked: GenerateConfig, capsys):
    texts = run(replace(asked, num_samples=3))
    assert all(text.startswith("to be") and len(text) == len("to be") + 20 for text in texts)
    assert len(set(texts)) == 3
    printed = capsys.readouterr().out
    assert printed.split("--- sample 2")[0] == f"--- sample 1 of 3, seed 1337\n{texts[0]}\n"
    assert run(replace(asked, seed=1338)) == texts[1:2]


def test_interactively_it_answers_each_line_and_survives_a_strange_one(
    asked: GenerateConfig, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("to be\nZ\nnot\n\nnever read\n"))
    texts = run(replace(asked, interactive=True))
    assert [text.split()[0][:3] for text in texts] == ["to", "not"]
    assert "character ('Z', U+005A) must be one that the training text has" in capsys.readouterr().out


def test_a_checkpoint_gives_back_the_model_that_was_saved(trained: Trained):
    model, tokenizer = load_gpt(trained.out / "last.pt")
    saved = torch.load(trained.out / "last.pt", weights_only=True)
    assert asdict(model.config) == saved["config"]
    assert all(
        torch.equal(weight, saved["model_state_dict"][name]) for name, weight in model.state_dict().items()
    )
    assert tokenizer.to_dict() == saved["tokenizer"]
    assert not model.training


@pytest.fixture
def damaged(trained: Trained, tmp_path: Path) -> Path:
    """A folder with checkpoints that are not what they should be."""
    good = torch.load(trained.out / "model.pt", weights_only=True)
    good.pop("random_states")
    whole = (trained.out / "model.pt").read_bytes()
    for percent in (0, 1, 50, 99):
        (tmp_path / f"cut{percent}.pt").write_bytes(whole[: len(whole) * percent // 100])
    (tmp_path / "text.pt").write_text("To be, or not to be")
    save_checkpoint(tmp_path / "shape.pt", **good | {"config": good["config"] | {"n_embd": 64}})
    save_checkpoint(tmp_path / "foreign.pt", **good | {"config": good["config"] | {"n_experts": 8}})
    save_checkpoint(tmp_path / "lacking.pt", **{name: good[name] for name in ("config", "tokenizer")})
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--temperature -1", "temperature (-1.0) must be at least 0"),
        ("--temperature nan", "temperature (nan) must be at least 0"),
        ("--temperature hot", "temperature"),
        ("--top_k 0", "top_k (0) must be at least 1"),
        ("--top_p 0", "top_p (0.0) must be above 0 and at most 1"),
        ("--top_p 1.5", "top_p (1.5) must be above 0 and at most 1"),
        ("--max_new_tokens 0", "max_new_tokens (0) must be at least 1"),
        ("--seed 9223372036854775808", "must be at least 0 and below 2**63"),
        ("--promt x", "did you mean prompt?"),
        ("--prompt=", "prompt () must hold at least one character"),
        ("--prompt=Zeus", "character ('Z', U+005A) must be one that the training text has"),
        ("--prompt=to_be_or_not_to_be", "character ('_', U+005F)"),
        (
            "--prompt=totototototototot",
            "prompt (17 tokens) must have at least 1 and at most block_size (16) tokens",
        ),
        ("--checkpoint {folder}/none.pt", "none.pt; make it with: uv run python phase1_foundation/"),
        ("--checkpoint {folder}/cut0.pt", "cut0.pt) must be a whole file of this course"),
        ("--checkpoint {folder}/cut1.pt", "cut1.pt) must be a whole file of this course"),
        ("--checkpoint {folder}/cut50.pt", "cut50.pt) must be a whole file of this course"),
        ("--checkpoint {folder}/cut99.pt", "cut99.pt) must be a whole file of this course"),
        ("--checkpoint {folder}/text.pt", "text.pt) must be a whole file of this course"),
        ("--checkpoint {folder}/shape.pt", "shape.pt) must fit the model"),
        ("--checkpoint {folder}/foreign.pt", "must be of this project's GPT"),
        ("--checkpoint {folder}/lacking.pt", "it lacks model_state_dict"),
        ("--device abacus", "device (abacus) must be one of those on this machine"),
    ],
)
def test_a_bad_input_gets_one_line_and_status_2_and_no_text(
    flags: str, message: str, asked: GenerateConfig, damaged: Path, refusal: Callable
):
    words = flags.format(folder=damaged).split()
    printed = refusal(script.main, "--checkpoint", str(asked.checkpoint), *words)
    assert message in printed.err
    assert printed.out == ""


def interact() -> None:
    """Show, for the character after your text, how temperature, top-k and top-p change the odds."""
    model, tokenizer = load_gpt(CHECKPOINT)
    for text in ask("text> "):
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.encode(text)[-model.config.block_size :]]))[0, -1]
        for settings in ({}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.9}):
            odds = next_token_odds(logits, **settings).sort(descending=True, stable=True)
            pairs = zip(odds.indices.tolist(), odds.values.tolist(), strict=True)
            shown = [f"{tokenizer.decode([i])!r} {odd:.1%}" for i, odd in list(pairs)[:8] if odd > 0]
            print(f"{settings or 'plain'!s:22} {int((odds.values > 0).sum()):3} left: {', '.join(shown)}")


if __name__ == "__main__":
    run_validation(__file__, interact)
