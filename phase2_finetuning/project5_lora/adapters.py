r"""Several adapters on one model: added, switched, merged and taken off while it runs.

PAPERS
  [1] LoRA: Low-Rank Adaptation of Large Language Models, Hu et al., 2021, arXiv:2106.09685
  [2] S-LoRA: Serving Thousands of Concurrent LoRA Adapters, Sheng et al., 2023, arXiv:2311.03285
  [3] Punica: Multi-Tenant LoRA Serving, Chen et al., 2023, arXiv:2310.18547
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project5_lora.lora import LoRALinear, LowRank, Recipe
from phase2_finetuning.project5_lora.modules import put, swap_linears
from phase2_finetuning.project5_lora.targets import Slot, choose_slots


def add_adapter(
    model: Decoder, recipe: Recipe, name: str = "default", plan: Mapping[str, Sequence[Slot]] | None = None
) -> list[str]:
    """Freeze the model and give it a new adapter, in use; return the names of the layers that got it.

    PAPER: [1] Sec. 4.2: all weights but A and B stay as they are.
    PAPER CONTEXT: Adam keeps two numbers per trained weight. Where 2% are trained, the optimizer's memory
        all but vanishes, and a checkpoint of a task has megabytes instead of gigabytes.
    INTUITION: The library stays as it is; each reader brings slips of paper to put between the pages.
    IMPLEMENTATION: Layers go through the module swap, once; a further adapter joins those that are there.
        `plan` says which slots have which rank, by default what the recipe's targets choose. The model may
        be quantized already: whatever has `dequantize()` counts as linear.
    WHY: A test counts the weights that training moves: those of A and B, and not one more.
    """
    if not re.fullmatch(r"\w[\w-]*", name) or name in adapter_names(model) or hasattr(nn.ModuleDict, name):
        rule = "must be new, of letters, digits, _ and -, and not the name of a method of torch's"
        raise ValueError(f"adapter ({name}) {rule}; there: {', '.join(adapter_names(model)) or 'none'}")
    if plan is None:
        plan = choose_slots(model.config, recipe.targets, recipe.rank, recipe.alpha)
    there = lora_layers(model)
    if any(layer.kept is not None for layer in there.values()):
        raise ValueError("adapters (merged) must be unmerged before another one is added")
    bases = {layer: there[layer].base if layer in there else model.get_submodule(layer) for layer in plan}
    parts = {layer: LowRank(bases[layer], slots, recipe) for layer, slots in plan.items()}  # may fail: first
    model.requires_grad_(False)
    if new := plan.keys() - there.keys():
        swap_linears(model, lambda _, linear: LoRALinear(linear), new.__contains__, nn.Module)
    for layer, part in parts.items():
        lora_layers(model)[layer].adapters[name] = part.train(model.training)
    use_adapters(model, name)
    return list(plan)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers that can have adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters on a model, in the order in which they came."""
    layers = lora_layers(model).values()
    return list(dict.fromkeys(name for layer in layers for name in layer.adapters))


def active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters in use."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.active))


def adapter_parts(model: nn.Module, name: str) -> dict[str, LowRank]:
    """Return the parts of an adapter by the names of their layers."""
    _check(model, [name])
    layers = lora_layers(model).items()
    return {layer: part.adapters[name] for layer, part in layers if name in part.adapters}  # type: ignore[misc]


def use_adapters(model: nn.Module, *names: str) -> None:
    """Use these adapters, added up, or none; those in use are trained."""
    _check(model, names)
    for layer in lora_layers(model).values():
        if layer.kept is not None:
            raise ValueError("adapters (merged) must be unmerged before others are used")
        layer.active = names
        for name, adapter in layer.adapters.items():
            adapter.requires_grad_(name in names)


@contextmanager
def adapters_of_rows(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Give each row of the batches in this block an adapter of its own; "" for none.

    As in [2] and [3], though with one product for each adapter and not one kernel for all.
    """
    _check(model, [name for name in names if name])
    layers = lora_layers(model).values()
    if any(layer.kept is not None for layer in layers):
        raise ValueError("adapters (merged) must be unmerged before rows can have their own")
    for layer in layers:
        layer.of_rows = tuple(names)
    try:
        yield
    finally:
        for layer in layers:
            layer.of_rows = None


def merge(model: nn.Module) -> None:
    """Put the adapters in use into the weights: the same outputs, at the speed of the plain model."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Restore the weights, to the bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take one adapter off."""
    for layer in (layers := lora_layers(model)):
        if layers[layer].kept is not None and name in layers[layer].active:
            raise ValueError(f"adapter ({name}) must be unmerged before it is removed")
    for layer in adapter_parts(model, name):
        del layers[layer].adapters[name]
    for each in layers.values():
        each.active = tuple(active for active in each.active if active != name)


def unload(model: nn.Module, merge: bool = False) -> None:
    """Make the model plain again, all its weights trainable: with the adapters in use merged, or without."""
    for name, layer in lora_layers(model).items():
        put(model, name, layer.plain(merge))
    model.requires_grad_(True)


def count_trained(model: nn.Module) -> int:
    """Return the number of weights that training moves."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _check(model: nn.Module, names: Sequence[str]) -> None:
    there = adapter_names(model)
    for name in names:
        if name not in there:
            raise ValueError(
                f"adapter ({name}) must be one of those on the model: {', '.join(there) or 'none'}"
            )
