"""Checks of benchmark.py: the contestants compute the same gradient, and the table says what was timed."""

from pathlib import Path

import pytest
import torch

from common.script import run_validation
from phase1_foundation.project3_pretrain.export import save_folder
from phase1_foundation.project3_pretrain.loss import language_model_loss
from phase2_finetuning.project4_instruction_tuning.benchmark import our_gradient, run, their_gradient, whole
from phase2_finetuning.project4_instruction_tuning.config import BenchmarkConfig
from phase2_finetuning.project4_instruction_tuning.sft import answer_loss, make_examples
from phase2_finetuning.project4_instruction_tuning.templates import PLAIN


def test_all_ways_give_one_gradient(marked, conversations, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = marked
    save_folder(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).double().train()
    examples, count = make_examples(conversations, PLAIN, tokenizer, 48)
    packed, padded = (whole(examples, 48, packing=packing) for packing in (True, False))
    model = model.double()
    ways = [
        our_gradient(model, packed, answer_loss, torch.float32),
        our_gradient(model, packed, language_model_loss, torch.float32),
        our_gradient(model, padded, answer_loss, torch.float32),
    ]
    grads = []
    for way in ways:
        way()
        grads.append(model.head.weight.grad / count.learned)
    their_gradient(theirs, padded, torch.float32)()
    model.float().zero_grad()  # other tests use it
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(theirs.lm_head.weight.grad, grads[0], rtol=1e-3, atol=1e-6)  # fp32 loss


def test_the_table_compares_with_the_peer(checkpoint: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("transformers")
    rows = run(BenchmarkConfig(str(checkpoint), conversations=4, block_size=150, repeats=1, device="cpu"))
    assert len(rows) == 4
    assert all(row.seconds > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "Hugging Face" in printed
    assert "speed / peer" in printed


if __name__ == "__main__":
    run_validation(__file__)
