r"""Adapters in peft's own files: an adapter_config.json beside an adapter_model.safetensors.

PAPERS
  [1] LoRA: Low-Rank Adaptation of Large Language Models, Hu et al., 2021, arXiv:2106.09685
  [2] PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models, Meng, Wang &
      Zhang, 2024, arXiv:2404.02948
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.files import atomic_write, make_folder
from common.script import one_line
from phase1_foundation.project2_tokenizer.token_file import naming, read_json, show
from phase1_foundation.project3_pretrain.families import family_of
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project5_lora.adapters import adapter_parts, add_adapter
from phase2_finetuning.project5_lora.config import TRAIN_COMMAND
from phase2_finetuning.project5_lora.lora import Recipe
from phase2_finetuning.project5_lora.targets import ALL, Slot, fits, shortest, slots_of

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before every name: peft's two wrappers around transformers' model
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
LEAVE_BASE = (True, False, "gaussian", "orthogonal", "eva")  # starts that do not change the model's weights
# Settings of peft that say how an adapter came to be or what it is called, but change nothing in its outputs.
# Any other one that we do not read must be empty, or the adapter would load and be a little wrong.
SILENT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
READ = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_to_transform", "lora_alpha",
    "lora_dropout", "peft_type", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora",
}  # fmt: skip


def save_adapter(model: Decoder, folder: Path | str, name: str = "default", base: str = "") -> Path:
    """Write an adapter, for us and for peft; `base` is the name of the model that it belongs to.

    PAPER: [1] Sec. 4.2 counts what is saved; [2], its appendix, makes a PiSSA adapter a plain one.
    PAPER CONTEXT: peft's two files are what every tool that serves or shares adapters reads.
    INTUITION: A letter in the language that everybody at the other end speaks.
    IMPLEMENTATION: The names are those of transformers' model; our stacked As and diagonal Bs are cut into
        one pair for each of its layers. What PiSSA learned is B A less what it began with: two products side
        by side, which is a plain adapter of twice the rank, and fits the unchanged model.
    WHY: A test loads the folder with peft on transformers' model and gets our logits, and ours from theirs.
    """
    parts = adapter_parts(model, name).values()
    tensors: dict[str, Tensor] = {}
    slots: list[Slot] = []
    for part in parts:
        pairs = part.pairs()
        for slot, down, up in pairs:
            slots.append(slot)
            tensors |= {PREFIX + slot.name + A: down, PREFIX + slot.name + B: up}
        for (slot, _, _), magnitude in zip(pairs, part.magnitude, strict=False):
            tensors[PREFIX + slot.name + MAGNITUDE] = magnitude
    recipe = next(iter(parts)).recipe
    return write_adapter(folder, _facts(model, recipe, slots, base), tensors)


def write_adapter(folder: Path | str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write the two files of an adapter and return their folder."""
    folder = make_folder(folder)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(folder / TENSORS, "wb") as file:
        file.write(save(whole, metadata={"format": "pt"}))
    with atomic_write(folder / SETTINGS) as file:
        file.write(json.dumps(facts, indent=2) + "\n")
    return folder


def _facts(model: Decoder, recipe: Recipe, slots: Sequence[Slot], base: str) -> dict[str, Any]:
    """Return what adapter_config.json says; the first slot's rank and alpha are the rule."""
    rank, alpha = slots[0].rank, slots[0].alpha
    there = [slot.name for each in slots_of(model.config).values() for slot in each]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": recipe.dropout,
        "use_rslora": recipe.rslora,
        "use_dora": recipe.dora,
        "init_lora_weights": True,
        "target_modules": shortest([slot.name for slot in slots], there),
        "rank_pattern": {slot.name: slot.rank for slot in slots if slot.rank != rank},
        "alpha_pattern": {slot.name: _whole(slot.alpha) for slot in slots if slot.alpha != alpha},
        "bias": "none",
        "fan_in_fan_out": family_of(model.config) == "gpt2",  # there, GPT-2's matrices are (in, out)
        "inference_mode": True,
    }


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number


def load_adapter(model: Decoder, folder: Path | str, name: str = "default") -> list[str]:
    """Put an adapter that we or peft wrote on a model, in use; return the names of the layers that got it.

    PAPER: as for save_adapter.
    PAPER CONTEXT: Adapters come from strangers. Older ones are pickles, programs that run when they are read.
    INTUITION: A parcel is weighed, measured and held against its label before anybody opens the door.
    IMPLEMENTATION: JSON and safetensors only, neither of which can run. Ranks are those of the matrices and
        must be those of the settings. A setting that would change the outputs and that we do not have is an
        error, as is a tensor without a place, a missing one, and one of another shape; all before the model
        is touched. ValueError or OSError, in one line.
    WHY: Tests feed it files that were cut, swapped, renamed and made up, and compare honest ones with peft.
    """
    folder = Path(folder)
    for file in (SETTINGS, TENSORS):
        if not (folder / file).is_file():
            what = f"an adapter is a folder of {SETTINGS} and {TENSORS}; train one with: {TRAIN_COMMAND}"
            raise FileNotFoundError(f"{folder / file} is missing; {what}")
    facts = read_json(folder / SETTINGS)
    with naming(folder / SETTINGS):
        recipe = _read_recipe(facts)
    with naming(folder / TENSORS):
        tensors = {_their_module(name): tensor for name, tensor in read_tensors(folder / TENSORS).items()}
    with naming(folder):
        plan = _make_plan(model, facts, recipe, tensors)
    add_adapter(model, recipe, name, plan)
    with torch.no_grad():
        for part in adapter_parts(model, name).values():
            for i, (slot, down) in enumerate(zip(part.touched, part.A.split(part.ranks), strict=True)):
                down.copy_(tensors.pop(slot.name + A))
                part.B[i].copy_(tensors.pop(slot.name + B))
                if recipe.dora:
                    part.magnitude[i].copy_(tensors.pop(slot.name + MAGNITUDE))
    return list(plan)


def _read_recipe(facts: Mapping[str, Any]) -> Recipe:
    """Return what the settings say, or ValueError for what we do not have."""

    def typed(name: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = facts.get(name, default)
        if type(value) not in kinds:
            raise ValueError(f"{name} ({show(value)}) must be of type {kinds[0].__name__}")
        return value

    kind = facts.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type ({show(kind)}) must be LORA")
    for name, value in facts.items():
        if name not in SILENT | READ and value:
            raise ValueError(f"{name} ({show(value)}) must be empty: our adapters have no such thing")
    if facts.get("bias", "none") != "none":
        raise ValueError(f"bias ({show(facts['bias'])}) must be none: adapters here leave biases alone")
    start = facts.get("init_lora_weights", True)
    if start != "pissa" and not any(start is each or start == each for each in LEAVE_BASE):
        raise ValueError(
            f"init_lora_weights ({show(start)}) must be one that leaves the model's weights alone, or pissa; "
            "peft's save_pretrained(path_initial_model_for_weight_conversion=...) makes a plain adapter of it"
        )
    return Recipe(
        rank=typed("r", (int,), 8),
        alpha=float(typed("lora_alpha", (int, float), 8)),
        dropout=float(typed("lora_dropout", (float, int), 0.0)),
        targets=(ALL,),
        rslora=typed("use_rslora", (bool,), False),
        dora=typed("use_dora", (bool,), False),
        pissa=start == "pissa",
    )


def _their_module(name: str) -> str:
    """Return a tensor's name without peft's wrappers, or ValueError."""
    if not (name.startswith(PREFIX) and name.endswith((A, B, MAGNITUDE))):
        raise ValueError(f"tensor {show(name)} must begin with {PREFIX} and end in {A}, {B} or {MAGNITUDE}")
    return name.removeprefix(PREFIX)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; ValueError for one that is cut, foreign, or of whole numbers."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except SafetensorError as error:
        raise ValueError(f"content ({one_line(error)[:200]}) must be a whole safetensors file") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"tensor {show(name)} ({str(tensor.dtype)[6:]}) must hold floating-point numbers"
            )
    return tensors


def _make_plan(
    model: Decoder, facts: Mapping[str, Any], recipe: Recipe, tensors: Mapping[str, Tensor]
) -> dict[str, list[Slot]]:
    """Return which slots have which rank, after each tensor was held against the place that it is to have."""
    ranks, alphas = (_read_pattern(facts, name) for name in ("rank_pattern", "alpha_pattern"))
    wanted = _read_targets(facts)
    widths = {
        name: layer.in_features for name, layer in model.named_modules() if hasattr(layer, "in_features")
    }
    spare, plan = set(tensors), {}
    for layer, slots in slots_of(model.config).items():
        chosen = []
        for slot in slots:
            names = [slot.name + end for end in (A, B, *([MAGNITUDE] if recipe.dora else []))]
            there = (
                not spare.isdisjoint(names) if wanted is None else any(fits(slot.name, end) for end in wanted)
            )
            if there:
                rank = int(_lookup(ranks, slot.name, recipe.rank))
                slot = replace(slot, rank=rank, alpha=_lookup(alphas, slot.name, recipe.alpha))
                shapes = [(rank, widths[layer]), (slot.rows, rank), (slot.rows,)]
                for name, shape in zip(names, shapes, strict=False):
                    found = tuple(tensors[name].shape) if name in tensors else "none"
                    if found != shape:
                        raise ValueError(f"tensor {name} ({found}) must be {shape} for this model")
                spare -= set(names)
            chosen.append(slot)
        if any(slot.rank for slot in chosen):
            plan[layer] = chosen
    if spare or not plan:
        name = show(min(spare)) if spare else "none"
        raise ValueError(
            f"tensor {name} (one of {len(spare)}) must have a place in this model, as targets say"
        )
    return plan


def _read_targets(facts: Mapping[str, Any]) -> list[str] | None:
    """Return the names in target_modules; None where they are told otherwise, and the tensors decide."""
    targets = facts.get("target_modules")
    if facts.get("exclude_modules") or facts.get("layers_to_transform") is not None:
        return None
    if not isinstance(targets, list):  # a stranger's regular expression is not run: it need never end
        return None
    if not targets or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"target_modules ({show(targets)}) must be names of modules")
    return targets


def _read_pattern(facts: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return a pattern's numbers by the module names that it has for keys."""
    pattern = facts.get(name) or {}
    numbers = isinstance(pattern, dict) and all(
        type(value) in (int, float) and 0 < value < math.inf for value in pattern.values()
    )
    if not numbers:
        raise ValueError(f"{name} ({show(pattern)}) must give numbers above 0 to names of modules")
    return {key.removeprefix("^").removesuffix("$"): value for key, value in pattern.items()}


def _lookup(pattern: Mapping[str, float], name: str, default: float) -> float:
    return next((value for key, value in pattern.items() if fits(name, key)), default)
