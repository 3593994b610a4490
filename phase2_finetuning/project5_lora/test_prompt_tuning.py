"""Checks of prefix and prompt tuning: begun at words they equal the words; all equals peft's."""

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

from common.script import run_validation
from phase1_foundation.project3_pretrain.generate import GrowingCache, generate
from phase1_foundation.project3_pretrain.layers import DocumentAttention
from phase1_foundation.project3_pretrain.loss import Batch, language_model_loss
from phase2_finetuning.project5_lora.conftest import make_model, make_twin
from phase2_finetuning.project5_lora.prompt_tuning import PrefixTuned, PromptTuned

KINDS = [PrefixTuned, PromptTuned]
WORDS = [3, 7, 11, 7]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_begun_at_words_it_equals_the_model_that_reads_these_words(kind, family, tokens):
    model = make_model(family)
    with_words = torch.cat([torch.tensor(WORDS).expand(len(tokens), -1), tokens], dim=1)
    expected = model(with_words)[:, len(WORDS) :]
    torch.testing.assert_close(kind(model, len(WORDS), WORDS)(tokens), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_repeated_up_to_the_length(kind, tokens):
    model = make_model()
    long, short = kind(model, 4, [5, 9, 5, 9]), kind(model, 4, [5, 9])
    torch.testing.assert_close(long(tokens), short(tokens))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prefix_logits_and_gradients_equal_those_of_peft(family, tokens, monkeypatch):
    model = make_model(family)
    config = model.config
    width = config.kv_heads * config.head_width
    settings = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=width, num_layers=config.n_layer,
        num_attention_heads=config.kv_heads, num_transformer_submodules=1,
    )  # fmt: skip
    peer = get_peft_model(make_twin(model, monkeypatch), settings).double().eval()
    ours = PrefixTuned(model, 4)
    table = peer.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.copy_(ours.small)
    mine, theirs = ours(tokens), peer(input_ids=tokens).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(ours.small.grad, table.grad, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompt_logits_and_gradients_equal_those_of_peft(family, tokens, monkeypatch):
    model = make_model(family)
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_transformer_submodules=1,
                                  num_layers=model.config.n_layer, token_dim=model.config.n_embd,
                                  num_attention_heads=model.config.n_head)  # fmt: skip
    peer = get_peft_model(make_twin(model, monkeypatch), settings).double().eval()
    ours = PromptTuned(model, 4)
    table = peer.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.copy_(ours.prompt)
    mine, theirs = ours(tokens), peer(input_ids=tokens).logits[:, 4:]
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(ours.prompt.grad, table.grad, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("hidden", [0, 8])
def test_a_prefix_is_trained_and_nothing_else(hidden, tokens):
    tuned = PrefixTuned(make_model(), 4, hidden=hidden)
    language_model_loss(tuned, Batch(tokens, tokens))[0].backward()
    trained = {name for name, weight in tuned.named_parameters() if weight.grad is not None}
    network = {f"expand.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert trained == ({"small"} | network if hidden else {"small"})
    assert trained == {name for name, weight in tuned.named_parameters() if weight.requires_grad}


def test_a_prompt_is_trained_and_nothing_else(tokens):
    tuned = PromptTuned(make_model(), 4)
    language_model_loss(tuned, Batch(tokens, tokens))[0].backward()
    assert [name for name, weight in tuned.named_parameters() if weight.grad is not None] == ["prompt"]
    assert [name for name, weight in tuned.named_parameters() if weight.requires_grad] == ["prompt"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind, tokens):
    tuned = kind(make_model(dtype=torch.float32), 4)
    optimizer = torch.optim.AdamW([w for w in tuned.parameters() if w.requires_grad], lr=3e-2)
    losses = []
    for _ in range(40):
        loss, _ = language_model_loss(tuned, Batch(tokens[:, :-1], tokens[:, 1:]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_folding_the_network_changes_no_logit_and_drops_it(tokens):
    tuned = PrefixTuned(make_model(), 4, hidden=8)
    before = tuned(tokens)
    tuned.fold()
    assert torch.equal(tuned(tokens), before)
    assert [name for name, weight in tuned.named_parameters() if weight.requires_grad] == ["small"]


@pytest.mark.parametrize("kind", KINDS)
def test_writing_with_a_cache_equals_writing_after_the_words(kind):
    model = make_model()
    tuned = kind(model, len(WORDS), WORDS)
    written = list(generate(tuned, [1, 2, 3], 8, temperature=0))
    assert written == list(generate(model, [*WORDS, 1, 2, 3], 8, temperature=0))


@pytest.mark.parametrize("kind", KINDS)
def test_text_beyond_the_block_begins_a_new_cache_behind_the_same_tokens(kind):
    tuned = kind(make_model(), len(WORDS), WORDS)
    assert tuned.config.block_size == 12
    assert len(list(generate(tuned, [1, 2, 3], 40, temperature=0))) == 40


@pytest.mark.parametrize("kind", KINDS)
def test_one_model_can_stand_behind_several_prompts(kind, tokens):
    model = make_model()
    first, second = kind(model, 2, [5, 9]), kind(model, 3, [8, 1, 4])
    before = first(tokens)
    second(tokens)
    assert torch.equal(first(tokens), before)
    torch.testing.assert_close(model(tokens), make_model()(tokens))  # untouched itself


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_in_bf16_under_autocast(kind, tokens):
    tuned = kind(make_model(dtype=torch.float32), 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = language_model_loss(tuned, Batch(tokens, tokens))
    loss.backward()
    exact, _ = language_model_loss(tuned, Batch(tokens, tokens))
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_is_refused_in_one_line(kind, tokens):
    model = make_model()
    for length in (0, 16):
        with pytest.raises(ValueError, match=rf"length \({length}\) must be at least 1 and below block_size"):
            kind(model, length)
    with pytest.raises(ValueError, match=r"words \(\) must hold at least one token"):
        kind(model, 2, [])
    with pytest.raises(ValueError, match=r"words \(61\) must be tokens of the model, below 61"):
        kind(model, 2, [5, 61])
    tuned = kind(model, 5)
    with pytest.raises(ValueError, match=r"tokens \(12\) must be at most block_size \(11\)"):
        tuned(tokens)
    with pytest.raises(ValueError, match=r"backend \(DocumentAttention\) must be None or a GrowingCache"):
        tuned(tokens[:, :4], DocumentAttention(torch.zeros(3, 4, dtype=torch.int32)))
    cache = GrowingCache()
    tuned(tokens[:, :11], cache)
    with pytest.raises(ValueError, match="must be at most block_size"):
        tuned(tokens[:, :1], cache)


def test_a_network_cannot_begin_at_words():
    with pytest.raises(ValueError, match=r"hidden \(8\) must be 0 to begin at words"):
        PrefixTuned(make_model(), 2, [5, 9], hidden=8)


if __name__ == "__main__":
    run_validation(__file__)
