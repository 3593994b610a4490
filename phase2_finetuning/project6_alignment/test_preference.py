"""Checks of the preference losses, against trl's and against what the papers promise."""

import math
from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.script import run_validation
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project6_alignment.config import PreferenceLossConfig
from phase2_finetuning.project6_alignment.preference import (
    LOSSES,
    Odds,
    PairBatch,
    dpo,
    implicit_rewards,
    ipo,
    kto,
    pair_odds,
    preference_loss,
    strength,
)

B, T = 6, 9


class Alone:
    """What trl asks of accelerate: here there is one process."""

    device = torch.device("cpu")

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather


def trainer(**settings: Any) -> Any:
    """Return what trl's losses read of a trainer."""
    common = {"accelerator": Alone(), "model": SimpleNamespace(training=False), "aux_loss_enabled": False}
    return SimpleNamespace(**common, _metrics={"eval": defaultdict(list)}, _total_train_tokens=0, **settings)


def tokens_and_mask() -> tuple[Tensor, Tensor]:
    """Return log-probabilities (B, 3, T) of tokens and the answers' mask."""
    draw = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(B, 3, T, generator=draw, dtype=torch.float64) * 2 - 0.01
    lengths = torch.randint(1, T - 1, (B, 3, 1), generator=draw)
    return logprobs, (torch.arange(T) >= 1) & (torch.arange(T) < 1 + lengths)


def as_odds(logprobs: Tensor, mask: Tensor, reference: Tensor) -> Odds:
    return Odds((logprobs * mask).sum(-1), reference, mask.sum(-1))


def reference_sums() -> Tensor:
    return -4 * torch.rand(B, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ours(name: str, logprobs: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    config = PreferenceLossConfig(loss=name, **settings)  # type: ignore[arg-type]
    return LOSSES[name].loss(as_odds(logprobs, mask, reference_sums()), strength(config), config).mean()


def trl_dpo(kind: str, logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return the loss of trl's DPOTrainer, given the log-probabilities as if a model had found them."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    both, shown = logprobs[:, :2].transpose(0, 1).flatten(0, 1), mask[:, :2].transpose(0, 1).flatten(0, 1)
    outputs = SimpleNamespace(
        log_probs=(both * shown)[:, 1:], entropy=both[:, 1:], mean_logits=both[:, 1:], is_top1=shown[:, 1:]
    )
    reference = reference_sums()
    inputs = {
        "input_ids": torch.zeros(2 * B, T, dtype=torch.long),
        "attention_mask": torch.ones(2 * B, T),
        "completion_mask": shown.long(),
        "ref_chosen_logps": reference[:, 0],
        "ref_rejected_logps": reference[:, 1],
    }
    settings = trainer(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind],
        loss_weights=[1.0], beta=beta, label_smoothing=0.0, use_weighting=False,
    )  # fmt: skip
    return dpo_trainer.DPOTrainer._compute_loss(settings, lambda **_: outputs, inputs, False)


def trl_kto(logprobs: Tensor, mask: Tensor, beta: float, up: float, down: float) -> Tensor:
    """Return the loss of trl's KTOTrainer."""
    kto_trainer = pytest.importorskip("trl.trainer.kto_trainer")
    both, shown = logprobs[:, :2].flatten(0, 1), mask[:, :2].flatten(0, 1)
    outputs = SimpleNamespace(log_probs=(both * shown)[:, 1:], entropy=both[:, 1:], mean_logits=both[:, 1:])
    reference = reference_sums()
    inputs = {
        "input_ids": torch.zeros(2 * B, T, dtype=torch.long),
        "attention_mask": torch.ones(2 * B, T),
        "completion_mask": shown.long(),
        "label": torch.tensor([True, False] * B),
        "ref_logps": reference[:, :2].flatten(),
        "ref_KL_logps": reference[:, 2],
    }
    settings = trainer(
        precompute_ref_logps=True, calculate_KL=True, loss_type="kto", beta=beta, desirable_weight=up,
        undesirable_weight=down, _compute_kl_logps=lambda *_: (logprobs * mask)[:, 2].sum(-1),
    )  # fmt: skip
    return kto_trainer.KTOTrainer._compute_loss(settings, lambda **_: outputs, inputs, False)


def trl_orpo(logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return the loss of trl's ORPOTrainer, each pair alone: it means its first term over tokens."""
    orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    means = (logprobs * mask).sum(-1) / mask.sum(-1)
    settings = trainer(beta=beta)
    settings.odds_ratio_loss = partial(orpo_trainer.ORPOTrainer.odds_ratio_loss, settings)
    losses = []
    for chosen, rejected in means[:, :2]:
        found = chosen[None], rejected[None], torch.zeros(1), torch.zeros(1), -chosen
        settings.concatenated_forward = lambda model, batch, found=found: found
        losses.append(orpo_trainer.ORPOTrainer.get_batch_loss_metrics(settings, None, {}, "eval")[0])
    return torch.stack(losses).mean()


def trl_simpo(logprobs: Tensor, mask: Tensor, beta: float, gamma: float) -> Tensor:
    """Return the loss of trl's CPOTrainer with loss_type simpo."""
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    means = (logprobs * mask).sum(-1) / mask.sum(-1)
    settings = trainer(alpha=0.0, loss_type="simpo", beta=beta, simpo_gamma=gamma, label_smoothing=0.0)
    return cpo_trainer.CPOTrainer.cpo_loss(settings, means[:, 0], means[:, 1])[0].mean()


CASES = {
    "dpo": (lambda x, m: ours("dpo", x, m, beta=0.3), lambda x, m: trl_dpo("sigmoid", x, m, 0.3)),
    "ipo": (lambda x, m: ours("ipo", x, m, beta=0.3), lambda x, m: trl_dpo("ipo", x, m, 0.3)),
    "kto": (
        lambda x, m: ours("kto", x, m, beta=0.3, desirable_weight=1.3, undesirable_weight=0.8),
        lambda x, m: trl_kto(x, m, 0.3, 1.3, 0.8),
    ),
    "orpo": (lambda x, m: ours("orpo", x, m, beta=0.3), lambda x, m: trl_orpo(x, m, 0.3)),
    "simpo": (
        lambda x, m: ours("simpo", x, m, beta=2.5, gamma=1.4),
        lambda x, m: trl_simpo(x, m, 2.5, 1.4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_trls(name):
    assert set(CASES) == set(LOSSES)
    logprobs, mask = tokens_and_mask()
    found = []
    for loss in CASES[name]:
        x = logprobs.clone().requires_grad_()
        value = loss(x, mask)
        found.append((value.detach(), torch.autograd.grad(value, x)[0]))
    tolerance = 1e-7 if name == "orpo" else 1e-14  # trl casts ORPO's terms to fp32
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=tolerance, check_dtype=name != "orpo")
    assert found[0][1].abs().max() > 1e-3


def even(gap: float = 0.0) -> Odds:
    """A pair whose chosen answer has become likelier by half of a gap, and the other one less likely."""
    policy = torch.tensor([[-3 + gap / 2, -5 - gap / 2, -4]], dtype=torch.float64, requires_grad=True)
    return Odds(policy, torch.tensor([[-3.0, -5, -4]], dtype=torch.float64), torch.tensor([[1, 1, 1]]))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_before_the_first_step_is_ln_2(smoothing):
    for beta in (0.01, 0.1, 5):
        assert dpo(even(), beta, PreferenceLossConfig(label_smoothing=smoothing)).item() == math.log(2)


def test_dpos_gradient_pulls_both_ways_and_the_more_the_worse_the_ranking():
    # Rafailov et al. 2023, Sec. 4: beta * sigmoid(reward of the rejected - reward of the chosen)
    for gap in (-6.0, 0.0, 6.0):
        odds = even(gap)
        (grad,) = torch.autograd.grad(dpo(odds, 0.5, PreferenceLossConfig()).sum(), odds.policy)
        pull = 0.5 / (1 + math.exp(0.5 * gap))
        torch.testing.assert_close(grad[0], torch.tensor([-pull, pull, 0], dtype=torch.float64))


def test_smoothed_dpo_has_a_finite_best_margin():
    config = PreferenceLossConfig(label_smoothing=0.1)
    best = math.log(0.9 / 0.1)
    odds = even(best / 0.5)
    (grad,) = torch.autograd.grad(dpo(odds, 0.5, config).sum(), odds.policy)
    assert grad.abs().max().item() < 1e-15


def test_ipo_turns_back_beyond_its_margin_and_dpo_does_not():
    for name, sign in (("ipo", 1.0), ("dpo", -1.0)):
        odds = even(1 / (2 * 0.5) + 0.3)
        (grad,) = torch.autograd.grad(LOSSES[name].loss(odds, 0.5, PreferenceLossConfig()).sum(), odds.policy)
        assert math.copysign(1, grad[0, 0].item()) == sign
    assert ipo(even(1.0), 0.5, PreferenceLossConfig()).item() == 0


def test_ktos_pull_fades_far_from_where_it_stands_and_dpos_on_a_wrong_pair_does_not():
    pulls = {}
    for gap in (0.0, -20.0):  # beta * half of it: 10
        odds = even(gap)
        (grad,) = torch.autograd.grad(kto(odds, 1.0, PreferenceLossConfig()).sum(), odds.policy)
        pulls[gap] = grad[0, 0].abs().item()
    assert pulls[0.0] / pulls[-20.0] == pytest.approx(5500, rel=0.01)
    odds = even(-20.0)
    (grad,) = torch.autograd.grad(dpo(odds, 1.0, PreferenceLossConfig()).sum(), odds.policy)
    assert grad[0, 0].abs().item() == pytest.approx(1, abs=1e-6)


def test_where_kto_stands_has_no_gradient_and_is_never_below_zero():
    config = PreferenceLossConfig(desirable_weight=2.0)
    odds = even()
    (grad,) = torch.autograd.grad(kto(odds, 1.0, config).sum(), odds.policy)
    assert grad[0, 2] == 0
    low = odds._replace(reference=odds.reference + torch.tensor([[0, 0, 9.0]]))
    assert kto(low, 1.0, config).item() == kto(odds, 1.0, config).item()
    high = odds._replace(reference=odds.reference - torch.tensor([[0, 0, 9.0]]))
    assert kto(high, 1.0, config).item() != kto(odds, 1.0, config).item()


def test_orpo_is_finite_for_an_answer_that_is_certain():
    policy = torch.tensor([[0.0, -40.0]], requires_grad=True)
    odds = Odds(policy, torch.zeros(1, 2), torch.ones(1, 2))
    loss = LOSSES["orpo"].loss(odds, 0.1, PreferenceLossConfig())
    (grad,) = torch.autograd.grad(loss.sum(), policy)
    assert loss.isfinite().all()
    assert grad.isfinite().all()


def model_and_batch(dtype: torch.dtype = torch.float64) -> tuple[Decoder, PairBatch]:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 31, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = Decoder(DecoderConfig(**shape)).to(dtype)
    _, mask = tokens_and_mask()
    tokens = torch.randint(31, mask.shape)
    return model, PairBatch(tokens, mask, torch.zeros(B, 3, dtype=dtype))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
def test_the_trainers_loss_is_the_sum_over_pairs_of_what_the_model_thinks(name, sft_weight):
    model, batch = model_and_batch()
    config = PreferenceLossConfig(loss=name, sft_weight=sft_weight)
    total, count = preference_loss(model, batch, config)
    logits = model(batch.tokens.flatten(0, 1))[:, :-1]
    each = -F.cross_entropy(
        logits.flatten(0, 1), batch.tokens.flatten(0, 1)[:, 1:].flatten(), reduction="none"
    )
    logprobs = F.pad(each.view(3 * B, T - 1), (1, 0)).view(B, 3, T)
    odds = as_odds(logprobs, batch.mask, batch.reference)
    expected = LOSSES[name].loss(odds, strength(config), config)
    if name != "orpo":  # which has it in it
        expected = expected - sft_weight * odds.policy[:, 0] / odds.lengths[:, 0]
    assert count == B
    torch.testing.assert_close(total, expected.sum(), rtol=1e-12, atol=0)


def test_rewards_are_gaps_to_the_reference_or_means_per_token():
    model, batch = model_and_batch()
    odds = pair_odds(model, batch)
    gaps = implicit_rewards(odds, PreferenceLossConfig(loss="dpo", beta=0.3))
    torch.testing.assert_close(gaps, 0.3 * (odds.policy - odds.reference))
    means = implicit_rewards(odds, PreferenceLossConfig(loss="simpo", beta=3.0))
    torch.testing.assert_close(means, 3 * odds.policy / odds.lengths)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, r"^beta \(0.0\) must be above 0$"),
        ({"label_smoothing": 0.5}, r"^label_smoothing \(0.5\) must be at least 0 and below 0.5$"),
        ({"gamma": -1.0}, r"^gamma \(-1.0\) must be at least 0$"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PreferenceLossConfig(**settings).validate_config()


if __name__ == "__main__":
    run_validation(__file__)
