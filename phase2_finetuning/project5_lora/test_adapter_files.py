"""Checks of adapter files: both ways between us and peft, and what a stranger's file can do (nothing)."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.script import run_validation
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.test_model import assert_same
from phase2_finetuning.project5_lora.adapter_files import SETTINGS, TENSORS, load_adapter, save_adapter
from phase2_finetuning.project5_lora.adapters import add_adapter, lora_layers, use_adapters
from phase2_finetuning.project5_lora.conftest import make_model, make_twin
from phase2_finetuning.project5_lora.lora import Recipe
from phase2_finetuning.project5_lora.prompt_files import load_prompt, save_prompt
from phase2_finetuning.project5_lora.prompt_tuning import PrefixTuned, PromptTuned
from phase2_finetuning.project5_lora.test_lora import fill

peft = pytest.importorskip("peft")
RECIPES = {
    "lora": Recipe(rank=3, alpha=5.0),
    "rslora": Recipe(rank=3, alpha=5.5, rslora=True),
    "dora": Recipe(rank=2, alpha=4.0, dora=True, targets=("q_proj", "v_proj", "down_proj")),
    "pissa": Recipe(rank=3, alpha=6.0, pissa=True),
    "rank-stabilized pissa": Recipe(rank=3, alpha=6.0, pissa=True, rslora=True),
    "one layer": Recipe(rank=2, alpha=4.0, targets=("layers.1.self_attn.q_proj",)),
}


def write(folder: Path, family: str = "llama", recipe: Recipe = RECIPES["lora"]) -> Decoder:
    """Save an adapter with values at which a mistake would show; return the model that has it."""
    model = make_model(family)
    add_adapter(model, recipe)
    fill(model)
    save_adapter(model, folder, base="some/base")
    return model


# Both ways


@pytest.mark.parametrize("name", RECIPES)
def test_what_we_write_peft_reads_on_transformers_model(
    name: str, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ours = write(tmp_path, recipe=RECIPES[name])
    theirs = peft.PeftModel.from_pretrained(make_twin(make_model(), monkeypatch), tmp_path).double()
    assert (ours(tokens) - make_model()(tokens)).abs().max() > 0.01
    assert_same(ours(tokens), theirs(tokens, use_cache=False).logits)


@pytest.mark.parametrize("name", RECIPES)
def test_what_we_write_we_read(name: str, tokens: Tensor, tmp_path: Path):
    ours = write(tmp_path, recipe=RECIPES[name])
    again = make_model()
    load_adapter(again, tmp_path, "theirs")
    assert_same(again(tokens), ours(tokens))


@pytest.mark.parametrize(
    ("family", "facts"),
    [
        ("llama", {"target_modules": "all-linear", "use_rslora": True}),
        ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
        ("llama", {"target_modules": r".*\.(k|o)_proj"}),
        ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [1]}),
        (
            "llama",
            {
                "target_modules": ["q_proj", "down_proj"],
                "rank_pattern": {"layers.0.mlp.down_proj": 5, "q_proj": 2},
                "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 7},
            },
        ),
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    ],
    ids=["rslora", "dora", "pattern", "one layer", "ranks", "gpt2"],
)
def test_what_peft_writes_we_read(
    family: str, facts: dict[str, Any], tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make_model(family)
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **facts)
    theirs = peft.get_peft_model(make_twin(model, monkeypatch), config).double().eval()
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    assert (model(tokens) - make_model(family)(tokens)).abs().max() > 0.01
    assert_same(model(tokens), theirs(tokens, use_cache=False).logits)


def test_a_pissa_adapter_of_peft_is_read_although_its_base_was_changed(
    tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make_model(dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="pissa", target_modules="all-linear")
    theirs = peft.get_peft_model(make_twin(model, monkeypatch).float(), config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_" in name:
                weight += 0.05 * torch.randn_like(weight)
    theirs.save_pretrained(tmp_path)
    before = model(tokens)
    load_adapter(model, tmp_path)
    assert (model(tokens) - before).abs().max() > 0.1
    torch.testing.assert_close(model(tokens), theirs(tokens, use_cache=False).logits, rtol=0, atol=1e-3)


def test_adapters_in_16_bits_are_read_into_32(tokens: Tensor, tmp_path: Path):
    write(tmp_path)
    save_file({name: x.bfloat16() for name, x in load_file(tmp_path / TENSORS).items()}, tmp_path / TENSORS)
    model = make_model(dtype=torch.float32)
    load_adapter(model, tmp_path)
    part = lora_layers(model)["blocks.0.attention.qkv"].adapters["default"]
    assert part.A.dtype == torch.float32
    assert torch.equal(part.A, part.A.bfloat16().float())


@pytest.mark.parametrize("kind", [PrefixTuned, PromptTuned])
def test_prefixes_and_prompts_travel_both_ways(
    kind: type, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ours = kind(make_model(), 3).double().eval()
    short = tokens[:, :10]
    save_prompt(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make_twin(make_model(), monkeypatch), tmp_path / "ours").double()
    their_logits = theirs(short).logits
    assert_same(ours(short), their_logits[:, -10:])
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(load_prompt(make_model(), tmp_path / "theirs").double()(short), ours(short))
    facts = json.loads((tmp_path / "ours" / SETTINGS).read_text())
    for change, message in [
        ({"num_virtual_tokens": -1}, r"num_virtual_tokens \(-1\) must be a whole number above 0"),
        ({"num_virtual_tokens": 4}, r"tensors \(.*\) must be prompt_embeddings alone, \(4, "),
        ({"prefix_projection": True}, r"prefix_projection \(true\) must be false"),
        ({"peft_type": "IA3"}, r"peft_type must be one of"),
    ]:
        (tmp_path / "ours" / SETTINGS).write_text(json.dumps(facts | change))
        with pytest.raises(ValueError, match=message):
            load_prompt(make_model(), tmp_path / "ours")


# Files of strangers


def edit_settings(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        facts = json.loads((folder / SETTINGS).read_text())
        (folder / SETTINGS).write_text(json.dumps(facts | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return edit


def add(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def cut(folder: Path) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) // 2])


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no settings": (lambda folder: (folder / SETTINGS).unlink(), "adapter_config.json is missing"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), "adapter_model.safetensors is missing"),
    "settings that are no JSON": (lambda folder: (folder / SETTINGS).write_text("{"), "must be JSON"),
    "settings that are a list": (lambda folder: (folder / SETTINGS).write_text("[]"), "must be an object"),
    "half of the tensors": (cut, "must be a whole safetensors file"),
    "a pickle by this name": (
        lambda folder: torch.save({}, folder / TENSORS), "must be a whole safetensors file",
    ),
    "another method": (edit_settings(peft_type="IA3"), r"peft_type \('IA3'\) must be LORA"),
    "a rank that is no number": (edit_settings(r="8"), r"r \('8'\) must be of type int"),
    "rank 0": (edit_settings(r=0), r"rank \(0\) must be at least 1"),
    "another rank": (edit_settings(r=4), r"lora_A.weight \(\(3, 32\)\) must be \(4, 32\)"),
    "an alpha that is no number": (edit_settings(lora_alpha=None), r"lora_alpha \(None\) must be of type"),
    "trained biases": (edit_settings(bias="all"), r"bias \('all'\) must be none"),
    "biases in the adapter": (edit_settings(lora_bias=True), r"lora_bias \(True\) must be empty"),
    "whole modules": (edit_settings(modules_to_save=["lm_head"]), r"modules_to_save \(.*\) must be empty"),
    "what is not invented yet": (edit_settings(use_magic=True), r"use_magic \(True\) must be empty"),
    "a start that changed the base": (edit_settings(init_lora_weights="olora"), r"init_lora_weights \('ol"),
    "a pattern with no number": (edit_settings(alpha_pattern={"q_proj": "x"}), r"alpha_pattern .* must"),
    "targets that are missing": (
        edit_tensors(lambda tensors: tensors.pop(f"{Q}.lora_A.weight")), r"lora_A.weight \(none\) must be",
    ),
    "a tensor too many": (
        edit_tensors(add(Q.replace("layers.0", "layers.7") + ".lora_A.weight", torch.ones(1))),
        "must have a place in this model",
    ),
    "a tensor of something else": (
        edit_tensors(add("x", torch.ones(1))), "must begin with base_model",
    ),
    "whole numbers": (
        edit_tensors(add(f"{Q}.lora_A.weight", torch.ones(3, 32, dtype=torch.int8))),
        "must hold floating-point numbers",
    ),
    "the shape of another model": (
        edit_tensors(add(f"{Q}.lora_B.weight", torch.ones(33, 3))),
        r"lora_B.weight \(\(33, 3\)\) must be \(32, 3\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_file_is_refused_in_one_line_and_leaves_the_model_alone(name: str, tmp_path: Path):
    write(tmp_path)
    damage, message = BROKEN[name]
    damage(tmp_path)
    model = make_model()
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_adapter(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not lora_layers(model)
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_pickle_beside_or_instead_of_the_tensors_is_never_opened(tmp_path: Path):
    """peft itself falls back on adapter_model.bin."""

    class Trap:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "sprung").touch, ())

    write(tmp_path)
    torch.save(Trap(), tmp_path / "adapter_model.bin")
    load_adapter(make_model(), tmp_path)
    (tmp_path / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(TENSORS)):
        load_adapter(make_model(), tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_regular_expression_that_never_ends_is_not_run(tmp_path: Path):
    write(tmp_path)
    edit_settings(target_modules="(a*)*" * 20 + "b", rank_pattern={"(.*.*)*" * 9 + "x": 4})(tmp_path)
    load_adapter(make_model(), tmp_path)


def test_several_files_on_one_model(tokens: Tensor, tmp_path: Path):
    outputs = {}
    model: nn.Module = make_model()
    for name in ("lora", "dora", "pissa"):
        outputs[name] = write(tmp_path / name, recipe=RECIPES[name])(tokens)
        load_adapter(model, tmp_path / name, name)
    for name, output in outputs.items():
        use_adapters(model, name)
        assert_same(model(tokens), output)


if __name__ == "__main__":
    run_validation(__file__)
