"""Checks of the module swap."""

import pytest
import torch
from torch import nn

from common.script import run_validation
from phase1_foundation.project1_minimal_gpt.config import GPTConfig
from phase1_foundation.project1_minimal_gpt.model import GPT
from phase2_finetuning.project5_lora.conftest import make_model
from phase2_finetuning.project5_lora.lora import LoRALinear
from phase2_finetuning.project5_lora.modules import matrix_of, put, swap_linears


class Twice(nn.Module):
    """What a later project may put in a linear layer's place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Double what the layer says."""
        return 2 * self.linear(x)


def test_layers_are_chosen_by_a_pattern_for_the_whole_name_or_by_a_question():
    model = make_model()
    names = swap_linears(model, lambda _, linear: Twice(linear), r"blocks\.\d+\.attention\.(qkv|proj)")
    assert names == [f"blocks.{i}.attention.{part}" for i in range(2) for part in ("qkv", "proj")]
    assert isinstance(model.blocks[1].attention.qkv, Twice)
    assert isinstance(model.blocks[1].feed_forward.down, nn.Linear)
    assert swap_linears(model, lambda _, linear: Twice(linear), lambda name: name == "head") == ["head"]
    with pytest.raises(ValueError, match=r"where \(attention\) must fit the name .*: blocks.N"):
        swap_linears(model, lambda _, linear: Twice(linear), "attention")  # a part of a name is no name


def test_the_model_computes_with_what_was_put_in_and_its_code_knows_nothing_of_it(tokens: torch.Tensor):
    model = make_model()
    with torch.no_grad():
        before = model(tokens)
        swap_linears(model, lambda _, linear: Twice(linear), ".*down")
        for block in model.blocks:
            block.feed_forward.down.linear.weight /= 2
        assert torch.equal(model(tokens), before)  # a power of two rounds nothing


def test_a_layer_that_keeps_the_old_one_is_not_swapped_inside_of_itself():
    model = make_model()
    names = swap_linears(model, lambda _, linear: Twice(linear), ".*")
    assert not any("linear" in name for name in names)
    again = swap_linears(model, lambda _, linear: LoRALinear(linear), r".*\.linear")  # but may be, if asked
    assert again == [f"{name}.linear" for name in names]


def test_it_serves_any_model_and_keeps_the_mode():
    model = GPT(GPTConfig(vocab_size=11, n_layer=1, n_head=2, n_embd=8, block_size=4)).eval()
    swap_linears(model, lambda _, linear: Twice(linear), "blocks.*")
    assert not any(module.training for module in model.modules())


def test_the_matrix_of_a_layer_is_its_weight_or_what_it_unpacks():
    linear = nn.Linear(3, 2)
    assert matrix_of(linear) is linear.weight
    linear.dequantize = lambda: torch.zeros(2, 3)
    assert torch.equal(matrix_of(linear), torch.zeros(2, 3))
    model = make_model()
    put(model, "blocks.0.attention.proj", linear)
    assert model.blocks[0].attention.proj is linear


if __name__ == "__main__":
    run_validation(__file__)
