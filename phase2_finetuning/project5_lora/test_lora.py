"""Checks of the adapters, held to peft's. --interactive switches those of a small model."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.script import ask, run_validation
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.test_model import assert_same
from phase2_finetuning.project5_lora.adapters import (
    active_adapters,
    adapter_names,
    adapter_parts,
    adapters_of_rows,
    add_adapter,
    count_trained,
    lora_layers,
    merge,
    remove_adapter,
    unload,
    unmerge,
    use_adapters,
)
from phase2_finetuning.project5_lora.conftest import make_model, make_twin
from phase2_finetuning.project5_lora.lora import LoRALinear, LowRank, Recipe
from phase2_finetuning.project5_lora.targets import Slot, choose_slots, slots_of

peft = pytest.importorskip("peft")
LORA = Recipe(rank=3, alpha=5.0)
RECIPES = {
    "lora": LORA,
    "rslora": Recipe(rank=3, alpha=5.0, rslora=True),
    "dora": Recipe(rank=3, alpha=5.0, dora=True),
    "some targets": Recipe(rank=3, alpha=5.0, targets=("q_proj", "v_proj", "layers.1.mlp.down_proj")),
    "dora, some targets": Recipe(rank=3, alpha=5.0, targets=("k_proj", "up_proj"), dora=True),
}
each_recipe = pytest.mark.parametrize("name", RECIPES)


def fill(model: nn.Module, name: str = "default", seed: int = 3) -> None:
    """Give an adapter values at which a mistake would show: no B is 0, no length is its row's."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in adapter_parts(model, name).values():
            for weight in part.parameters():
                noise = torch.randn(weight.shape, generator=draw, dtype=weight.dtype)
                weight += 0.2 * noise if weight.dim() == 2 else 0.5 * noise.abs()


def adapted(family: str = "llama", recipe: Recipe = LORA, dtype: torch.dtype = torch.float64) -> Decoder:
    model = make_model(family, dtype)
    add_adapter(model, recipe)
    fill(model)
    return model


def peft_of(model: Decoder, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, **more: Any) -> nn.Module:
    """peft's model with the same adapter, on transformers' model with the same weights."""
    twin = make_twin(plain_copy(model), monkeypatch)
    targets = recipe.targets[0] if recipe.targets == ("all-linear",) else list(recipe.targets)
    facts = {
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "use_dora": recipe.dora,
        "use_rslora": recipe.rslora,
    }
    gpt2 = model.config.norm == "layernorm"
    theirs = peft.get_peft_model(
        twin, peft.LoraConfig(target_modules=targets, fan_in_fan_out=gpt2, **facts | more)
    )
    for name, ours in weights_by_their_names(model).items():
        their = dict(theirs.named_parameters())[name]
        assert their.shape == ours.shape
        their.data.copy_(ours)
    return theirs.eval()


def plain_copy(model: Decoder) -> Decoder:
    """The model without its adapters."""
    state = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    plain = Decoder(model.config).to(next(model.parameters()).dtype)
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain


def weights_by_their_names(model: nn.Module, gradients: bool = False) -> dict[str, Tensor]:
    """Our adapter's weights, or their gradients, cut up and named as peft's parameters are."""
    found = {}
    for part in adapter_parts(model, "default").values():
        pieces = {"lora_A": part.A, "lora_B": part.B, "lora_magnitude_vector": part.magnitude}
        for kind, values in pieces.items():
            for i, slot in enumerate(part.touched if len(values) else []):
                if kind == "lora_A":
                    value = (values.grad if gradients else values).split(part.ranks)[i]
                else:
                    value = values[i].grad if gradients else values[i]
                found[f"base_model.model.{slot.name}.{kind}.default.weight"] = value
    return found


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


# peft is the oracle


@each_recipe
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_gradients_and_merged_weights_equal_those_of_peft(
    family: str, name: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
):
    recipe = RECIPES[name]
    if family == "gpt2" and "some" in name:
        recipe = Recipe(rank=3, alpha=5.0, targets=("c_attn", "h.1.mlp.c_proj"), dora=recipe.dora)
    ours = adapted(family, recipe)
    theirs = peft_of(ours, recipe, monkeypatch)
    logits, their_logits = ours(tokens), theirs(tokens, use_cache=False).logits
    assert (logits - plain_copy(ours)(tokens)).abs().max() > 0.1  # or an adapter that does nothing would pass
    assert_same(logits, their_logits)
    loss_of(logits, tokens).backward()
    loss_of(their_logits, tokens).backward()
    grads, their_weights = weights_by_their_names(ours, gradients=True), dict(theirs.named_parameters())
    assert grads.keys() == {name for name, weight in their_weights.items() if weight.requires_grad}
    for weight, grad in grads.items():
        assert_same(grad, their_weights[weight].grad, weight)
    assert all(weight.grad is None for name, weight in ours.named_parameters() if ".base." in name)
    unload(ours, merge=True)
    expected = make_twin(ours, monkeypatch).state_dict()
    for weight, value in theirs.merge_and_unload().state_dict().items():
        assert_same(expected[weight], value, weight)


def test_a_pissa_adapter_starts_and_learns_as_that_of_peft(tokens: Tensor, monkeypatch: pytest.MonkeyPatch):
    """In fp32, as peft has it in no other: a singular vector there is known to about 1e-6 / gap."""
    recipe = Recipe(rank=3, alpha=5.0, pissa=True)
    ours = make_model(dtype=torch.float32)
    before = ours(tokens)
    add_adapter(ours, recipe)
    torch.testing.assert_close(ours(tokens), before, rtol=0, atol=2e-5)
    theirs = peft.get_peft_model(
        make_twin(plain_copy(ours), monkeypatch).float(),
        peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights="pissa", target_modules="all-linear"),
    )
    for pair in zip(weights_by_their_names(ours).items(), strict=True):
        ((name, weight),) = pair
        their = dict(theirs.named_parameters())[name]
        torch.testing.assert_close(
            weight.abs(), their.abs(), rtol=0, atol=1e-4
        )  # singular vectors have no sign
        their.data.copy_(weight)  # B A, which they took out of the base, has none either
    for step in range(2):  # the second one after a step of the same length
        loss, their_loss = loss_of(ours(tokens), tokens), loss_of(theirs(tokens).logits, tokens)
        torch.testing.assert_close(loss, their_loss, rtol=0, atol=2e-5)
        for model, value in ((ours, loss), (theirs, their_loss)):
            value.backward()
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.requires_grad:
                        weight -= 0.5 * weight.grad
                        weight.grad = None
        assert step or (before - ours(tokens)).abs().max() > 0.01


# What the papers promise


@each_recipe
def test_a_new_adapter_changes_nothing(name: str, tokens: Tensor):
    model = make_model()
    before = model(tokens)
    add_adapter(model, RECIPES[name])
    assert_same(model(tokens), before)
    if not RECIPES[name].dora:
        assert torch.equal(model(tokens), before)


@each_recipe
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(name: str, tokens: Tensor):
    model = adapted(recipe=RECIPES[name], dtype=torch.float32)
    bits = {name: weight.clone() for name, weight in model.state_dict().items()}
    apart = model(tokens)
    for _ in range(3):
        merge(model)
        torch.testing.assert_close(model(tokens), apart, rtol=0, atol=1e-4)
        assert any(not torch.equal(weight, bits[name]) for name, weight in model.state_dict().items())
        unmerge(model)
        assert all(torch.equal(weight, bits[name]) for name, weight in model.state_dict().items())


def test_subtracting_the_product_again_as_the_paper_has_it_does_not_restore_the_weight():
    """Hu et al., Sec. 4.1; with this, a thousand switches leave another model behind."""
    layer = lora_layers(adapted(dtype=torch.float32))["blocks.0.attention.qkv"]
    weight, change = layer.base.weight.detach(), layer.adapters["default"].delta(layer.base.weight)
    assert not torch.equal((weight + change) - change, weight)


def test_training_moves_the_adapter_and_nothing_else(tokens: Tensor):
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    add_adapter(model, LORA)
    rows = {"q": 32, "k": 16, "v": 16, "o": 32, "gate": 48, "up": 48}
    per_block = sum(3 * (32 + out) for out in rows.values()) + 3 * (48 + 32)
    assert count_trained(model) == 2 * per_block
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(3):
        loss_of(model(tokens), tokens).backward()
        optimizer.step()
    assert not torch.equal(model(tokens), plain_copy(model)(tokens))
    unload(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())


def test_the_gradient_of_a_wide_lora_dies_without_rank_stabilization_and_lives_with_it():
    """Kalajdzievski, Theorem 3.2: the update's size is stable in the rank only with alpha / sqrt(rank)."""
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 64).double(), torch.randn(1, 64, dtype=torch.float64)
    sizes: dict[bool, list[float]] = {False: [], True: []}
    for rslora in sizes:
        for rank in (64, 4096):
            layer = LoRALinear(linear)
            layer.adapters["a"] = LowRank(linear, [Slot("x", 64, rank, 1.0)], Recipe(rslora=rslora))
            layer.active = ("a",)
            start = layer(x)
            start.square().sum().backward()
            with torch.no_grad():
                layer.adapters["a"].B[0].sub_(layer.adapters["a"].B[0].grad)
                sizes[rslora].append(float((layer(x) - start).norm()))
    assert sizes[False][1] < 0.03 * sizes[False][0]  # 64 times the rank: about 1 / 64
    assert 0.5 < sizes[True][1] / sizes[True][0] < 2


def test_pissa_starts_at_the_best_approximation_of_its_rank():
    """Eckart & Young: no matrix of that rank is nearer to the weight than what PiSSA's B A is."""
    model = make_model()
    add_adapter(model, Recipe(rank=4, alpha=4.0, pissa=True))
    part = adapter_parts(model, "default")["blocks.0.attention.proj"]
    weight = model.blocks[0].attention.proj.base.weight
    values = torch.linalg.svdvals(weight)
    assert_same((weight - part.B[0] @ part.A).norm(), values[4:].norm())


def test_dora_learns_the_length_of_a_row_apart_from_its_direction(tokens: Tensor):
    model = adapted(recipe=RECIPES["dora"])
    layer = lora_layers(model)["blocks.0.attention.proj"]
    merged, part = layer.merged(), layer.adapters["default"]
    assert_same(merged.norm(dim=1), part.magnitude[0])
    assert_same(
        F.cosine_similarity(merged, layer.base.weight + part.spread() @ part.A), torch.ones(32).double()
    )


# Several adapters


def test_adapters_switch_add_up_and_come_off(tokens: Tensor):
    model = make_model()
    plain = model(tokens)
    outputs = {}
    for seed, (name, recipe) in enumerate(
        {"one": LORA, "two": RECIPES["dora"], "three": RECIPES["rslora"]}.items()
    ):
        add_adapter(model, recipe, name)
        fill(model, name, seed)
        outputs[name] = model(tokens)
    for name, output in outputs.items():
        use_adapters(model, name)
        assert active_adapters(model) == [name]
        assert torch.equal(model(tokens), output)
    use_adapters(model)
    assert torch.equal(model(tokens), plain)
    use_adapters(model, "one", "two")
    both = model(tokens)
    use_adapters(model, "two", "one")
    assert_same(model(tokens), both)
    merge(model)
    assert_same(model(tokens), both)
    unmerge(model)
    remove_adapter(model, "one")
    assert adapter_names(model) == ["two", "three"]
    assert torch.equal(model(tokens), outputs["two"])
    unload(model, merge=True)
    assert not lora_layers(model)
    assert_same(model(tokens), outputs["two"])


def test_only_the_adapters_in_use_are_trained(tokens: Tensor):
    model = adapted()
    add_adapter(model, Recipe(rank=2), "other")
    loss_of(model(tokens), tokens).backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == (".other." in name)


def test_each_row_of_a_batch_can_have_its_own_adapter(tokens: Tensor):
    model = adapted()
    add_adapter(model, RECIPES["dora"], "other")
    fill(model, "other", 9)
    alone = {"": (), "default": ("default",), "other": ("other",)}
    names = ["other", "", "default"]
    expected = []
    for row, name in enumerate(names):
        use_adapters(model, *alone[name])
        expected.append(model(tokens[row : row + 1]))
    with adapters_of_rows(model, names):
        together = model(tokens)
        with pytest.raises(ValueError, match=r"batch \(2 rows\)"):
            model(tokens[:2])
    assert_same(together, torch.cat(expected))
    assert_same(model(tokens[2:]), expected[2]) if active_adapters(model) == ["default"] else None


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_ranks_of_any_parts_of_a_layer_equal_their_adapters_one_by_one(data: st.DataObject):
    """Stacked As and diagonal Bs are one adapter per part."""
    rows = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    ranks = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)).filter(any))
    linear = nn.Linear(6, sum(rows)).double()
    slots = [Slot(f"m{i}", *sizes, alpha=2.0 + i) for i, sizes in enumerate(zip(rows, ranks, strict=True))]
    part = LowRank(linear, slots, Recipe())
    for B in part.B:
        nn.init.normal_(B)
    expected, pairs = [], iter(zip(part.A.split(part.ranks), part.B, strict=True))
    for slot in slots:
        if slot.rank:
            A, B = next(pairs)
            expected.append(slot.alpha / slot.rank * B @ A)
        else:
            expected.append(torch.zeros(slot.rows, 6).double())
    assert_same(part.delta(linear.weight), torch.cat(expected))
    x = torch.randn(2, 3, 6).double()
    assert_same(part(x, linear(x), linear), x @ torch.cat(expected).T)


# Under other number formats, in training, and beside other layers


def test_autocast_and_half_weights_keep_the_type_of_the_output(tokens: Tensor):
    for dtype in (torch.bfloat16, torch.float16):
        layer = lora_layers(adapted(recipe=RECIPES["dora"], dtype=dtype))["blocks.0.feed_forward.down"]
        x = torch.randn(2, 5, 48, dtype=dtype)
        assert layer.adapters["default"].A.dtype == torch.float32  # small steps would be lost in 16 bits
        assert layer(x).dtype == dtype
        layer.merge()
        assert layer.base.weight.dtype == dtype
    layer = lora_layers(adapted(dtype=torch.float32))["blocks.0.feed_forward.down"]
    x = torch.randn(2, 5, 48)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.2)


@torch.no_grad()
def test_dropout_falls_on_what_the_adapter_sees_and_only_in_training():
    torch.manual_seed(0)
    linear = nn.Linear(1000, 4)
    part = LowRank(linear, [Slot("x", 4, 2, 2.0)], Recipe(rank=2, alpha=2.0, dropout=0.25))
    nn.init.ones_(part.A)
    nn.init.ones_(part.B[0])
    x = torch.ones(1, 1000)
    assert torch.allclose(part.eval()(x, linear(x), linear), torch.tensor(2000.0))
    dropped = part.train()(x, linear(x), linear)
    assert dropped.std() == 0  # one mask for all outputs
    assert 1800 < float(dropped[0, 0]) < 2200
    assert float(dropped[0, 0]) != 2000


def test_an_adapter_beside_a_layer_that_packs_its_weight_merges_into_a_plain_one():
    class Packed(nn.Module):
        in_features, out_features, bias = 6, 4, None

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randint(-8, 8, (4, 6), dtype=torch.int8))

        def dequantize(self) -> Tensor:
            return self.codes.double() / 4

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.dequantize().T

    for recipe in (Recipe(rank=2), Recipe(rank=2, dora=True)):
        layer = LoRALinear(Packed())
        layer.adapters["a"] = LowRank(layer.base, [Slot("x", 4, 2, 16.0)], recipe)
        nn.init.normal_(layer.adapters["a"].B[0])
        layer.active = ("a",)
        x = torch.randn(3, 6, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"base \(Packed\) must be a plain linear layer"):
            layer.merge()
        assert_same(layer.plain(merge=True)(x), layer(x))


# Errors


def test_wrong_recipes_and_names_are_told_in_one_line():
    model = make_model()
    for change, message in [
        ({"rank": 0}, r"rank \(0\) must be at least 1"),
        ({"alpha": math.nan}, r"alpha \(nan\) must be above 0"),
        ({"dropout": 1.0}, r"dropout \(1.0\) must be at least 0 and below 1"),
        ({"targets": ()}, r"targets \(\) must name"),
        ({"dora": True, "pissa": True}, r"pissa \(True\) must be off"),
    ]:
        with pytest.raises(ValueError, match=message):
            Recipe(**change)
    with pytest.raises(ValueError, match=r"targets \(qq\) must be all-linear or among q_proj, k_proj"):
        add_adapter(model, Recipe(targets=("qq",)))
    with pytest.raises(ValueError, match=r"rank \(17\) must be at most 16 for .*k_proj"):
        add_adapter(model, Recipe(rank=17, pissa=True))
    assert not lora_layers(model)
    model = adapted()
    for action, message in [
        (lambda: add_adapter(model, LORA), r"adapter \(default\) must be new"),
        (lambda: add_adapter(model, LORA, "a.b"), r"adapter \(a.b\) must be new, of letters"),
        (lambda: add_adapter(model, LORA, "keys"), r"adapter \(keys\) must be new, .* method"),
        (lambda: use_adapters(model, "x"), r"adapter \(x\) must be one of those on the model: default"),
        (lambda: remove_adapter(model, "x"), r"adapter \(x\) must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            action()


def test_a_merged_model_can_neither_be_switched_nor_trained(tokens: Tensor):
    """No gradient reaches a merged adapter: better an error than a loss that never moves."""
    model = adapted()
    merge(model)
    model.train()
    for action in (
        lambda: model(tokens),
        lambda: use_adapters(model),
        lambda: add_adapter(model, LORA, "b"),
        lambda: remove_adapter(model, "default"),
    ):
        with pytest.raises(ValueError, match="must be unmerged"):
            action()
    with torch.no_grad():
        model(tokens)


def test_targets_choose_by_whole_words_of_transformers_names():
    config = make_model().config
    assert [slot.name for slot in slots_of(config)["blocks.1.attention.qkv"]] == [
        f"model.layers.1.self_attn.{part}_proj" for part in "qkv"
    ]
    plan = choose_slots(config, ["layers.0.self_attn.v_proj"], 4, 8.0)
    assert {name: [slot.rank for slot in slots] for name, slots in plan.items()} == {
        "blocks.0.attention.qkv": [0, 0, 4]
    }
    with pytest.raises(ValueError, match=r"targets \(proj\) must be"):
        choose_slots(config, ["proj"], 4, 8.0)


def interact() -> None:
    """Switch between adapters and look at the model's favourite next tokens."""
    model, tokens = adapted(), torch.randint(61, (1, 8))
    add_adapter(model, RECIPES["dora"], "other")
    fill(model, "other", 5)
    print(f"adapters: {', '.join(adapter_names(model))}; type the names to use, or none")
    for line in ask("use> "):
        use_adapters(model, *([] if line == "none" else line.split()))
        print("most likely next tokens:", model(tokens)[0, -1].topk(5).indices.tolist())


if __name__ == "__main__":
    run_validation(__file__, interact)
