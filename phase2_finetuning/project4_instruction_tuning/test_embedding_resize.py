"""Checks of new special tokens: what they change, what they must not, and why rows begin as the mean."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from common.checkpoints import save_checkpoint
from common.script import run_validation
from phase1_foundation.project2_tokenizer.wordpiece import WordPieceTokenizer
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.conftest import SENTENCES
from phase1_foundation.project3_pretrain.export import save_folder
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project4_instruction_tuning.embedding_resize import (
    TABLES,
    add_specials,
    resize_embeddings,
)

SPECIALS = ["<|user|>", "<|assistant|>", "<|end|>"]


def losses(model: Decoder, tokenizer) -> torch.Tensor:
    """Return the loss of each token of the sentences that the model knows, in float64."""
    found = []
    for text in SENTENCES:
        ids = torch.tensor([tokenizer.special_tokens["<|endoftext|>"], *tokenizer.encode(text)])
        logits = model.double()(ids[None, :-1])[0]
        found.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    return torch.cat(found)


def copy_of(model: Decoder) -> Decoder:
    return Decoder.from_weights(model.config, {n: w.clone() for n, w in model.state_dict().items()}).eval()


def test_known_tokens_keep_their_logits_and_new_ones_have_the_mean(model, tokenizer):
    grown, more = resize_embeddings(copy_of(model), tokenizer, SPECIALS)
    n = tokenizer.vocab_size
    assert [more.special_tokens[name] for name in SPECIALS] == [n, n + 1, n + 2]
    assert grown.config.vocab_size == grown.head.weight.shape[0] == n + 3
    assert grown.head.weight is grown.token_embedding.weight  # still tied
    ids = torch.tensor([tokenizer.encode(SENTENCES[0])])
    old, new = model(ids), grown(ids)
    assert torch.equal(old, new[..., :n])
    torch.testing.assert_close(new[..., n:], old.mean(dim=-1, keepdim=True).expand(*old.shape[:2], 3))


def test_untied_tables_have_a_mean_each(tokenizer):
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "tied": False}
    model = Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, **shape))
    grown, _ = resize_embeddings(model, tokenizer, SPECIALS)
    for name in TABLES:
        old, new = model.state_dict()[name], grown.state_dict()[name]
        assert torch.equal(new[: len(old)], old)
        assert torch.equal(new[len(old) :], old.mean(dim=0).expand(3, -1))
    assert not torch.equal(grown.head.weight, grown.token_embedding.weight)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_no_old_token_becomes_unlikelier_than_the_bound(model, tokenizer, k):
    before = losses(copy_of(model), tokenizer)
    grown, _ = resize_embeddings(copy_of(model), tokenizer, [f"<|{i}|>" for i in range(k)])
    rise = losses(grown, tokenizer) - before
    assert 0 < rise.max() <= math.log(1 + k / tokenizer.vocab_size)


@pytest.mark.parametrize("begin", ["zeros", "random"])
def test_other_beginnings_break_the_bound(model, tokenizer, begin):
    # A model may have all its logits far below 0: adding a constant vector to the output rows moves every
    # logit by the same amount and no odds. Then 0, the logit of a new row of zeros, is the largest.
    config = dataclasses.replace(model.config, tied=False)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = torch.tensor([tokenizer.encode(SENTENCES[0])])
    direction = model.hidden(ids)[0].mean(dim=0)
    weights["head.weight"] -= 3 * direction / direction.norm()
    shifted = Decoder.from_weights(config, weights).eval()
    before = losses(shifted, tokenizer)
    grown, _ = resize_embeddings(shifted.float(), tokenizer, SPECIALS)
    n, bound = tokenizer.vocab_size, math.log(1 + 3 / tokenizer.vocab_size)
    assert (losses(grown, tokenizer) - before).max() <= bound  # the mean keeps it here, too
    with torch.no_grad():
        torch.manual_seed(0)
        rows = torch.zeros(3, config.n_embd) if begin == "zeros" else 0.02 * torch.randn(3, config.n_embd)
        grown.head.weight[n:] = rows
    assert (losses(grown, tokenizer) - before).mean() > 50 * bound


def test_rows_beyond_the_tokenizer_are_used_first(model, tokenizer):
    n = tokenizer.vocab_size
    config = dataclasses.replace(model.config, vocab_size=n + 8)
    spare = dict(model.state_dict())
    for name in TABLES:
        spare[name] = torch.cat([spare[name], torch.full((8, config.n_embd), 9.0)])
    grown, more = resize_embeddings(Decoder.from_weights(config, spare), tokenizer, SPECIALS)
    assert (grown.config.vocab_size, more.vocab_size) == (n + 8, n + 3)
    assert torch.equal(grown.head.weight[n + 2], model.head.weight.mean(dim=0))


def test_text_is_cut_as_before_and_never_becomes_a_new_token(tokenizer):
    grown = add_specials(tokenizer, SPECIALS)
    for text in (*SENTENCES, "<|user|>hi<|end|>"):
        assert grown.encode(text) == tokenizer.encode(text)
    assert grown.encode("<|user|>", allowed_special=SPECIALS) == [tokenizer.vocab_size]
    assert grown.decode([tokenizer.vocab_size + 2]) == "<|end|>"


def test_what_is_known_already_stays_as_it_is(model, tokenizer):
    assert resize_embeddings(model, tokenizer, ["<|im_end|>"]) == (model, tokenizer)
    grown, more = resize_embeddings(model, tokenizer, ["<|im_end|>", "<|end|>", "<|end|>"])
    assert more.vocab_size == tokenizer.vocab_size + 1 == grown.config.vocab_size


def test_a_grown_model_comes_back_from_its_checkpoint(model, tokenizer, tmp_path: Path):
    grown, more = resize_embeddings(copy_of(model), tokenizer, SPECIALS)
    more.save(tmp_path / "tokenizer.json")
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    entries = {"config": dataclasses.asdict(grown.config), "model_state_dict": grown.state_dict()}
    save_checkpoint(tmp_path / "model.pt", tokenizer=text, **entries)
    loaded, cut = load_model(tmp_path / "model.pt")
    assert cut.special_tokens == more.special_tokens
    assert torch.equal(loaded.head.weight, grown.head.weight)


def test_new_rows_are_where_transformers_puts_them(model, tokenizer, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    save_folder(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.manual_seed(0)
    theirs.resize_token_embeddings(tokenizer.vocab_size + 3, mean_resizing=True)  # the mean, and tiny noise
    grown, _ = resize_embeddings(copy_of(model), tokenizer, SPECIALS)
    torch.testing.assert_close(
        grown.head.weight.detach(), theirs.get_input_embeddings().weight.detach(), atol=2e-5, rtol=0
    )


def test_names_and_kinds_that_cannot_be(tokenizer):
    with pytest.raises(ValueError, match=r"specials \(''\) must have a name"):
        add_specials(tokenizer, [""])
    other = WordPieceTokenizer.train_from_iterator(SENTENCES, 200)
    with pytest.raises(ValueError, match=r"tokenizer \(WordPieceTokenizer\) must be a BPETokenizer"):
        add_specials(other, SPECIALS)


if __name__ == "__main__":
    run_validation(__file__)
