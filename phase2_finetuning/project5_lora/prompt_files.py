r"""Prefixes and prompts in peft's own files.

PAPERS
  [1] Prefix-Tuning: Optimizing Continuous Prompts for Generation, Li & Liang, 2021, arXiv:2101.00190
  [2] The Power of Scale for Parameter-Efficient Prompt Tuning, Lester, Al-Rfou & Constant, 2021,
      arXiv:2104.08691

SHAPES
  P  virtual tokens    L  layers    Hkv  key heads    D  head_dim    C  n_embd
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from phase1_foundation.project2_tokenizer.token_file import naming, read_json, show
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project5_lora.adapter_files import SETTINGS, TENSORS, read_tensors, write_adapter
from phase2_finetuning.project5_lora.prompt_tuning import PrefixTuned, PromptTuned

TENSOR = "prompt_embeddings"  # the only one
KINDS: dict[str, type[PrefixTuned] | type[PromptTuned]] = {
    "PREFIX_TUNING": PrefixTuned,
    "PROMPT_TUNING": PromptTuned,
}
Tuned = PrefixTuned | PromptTuned


def save_prompt(tuned: Tuned, folder: Path | str, base: str = "") -> Path:
    """Write what stands before the text, for us and for peft; `base` is the name of the model behind it.

    PAPER: [1] Sec. 4.3: once trained, only the prefix is kept; [2] Sec. 2: one matrix per task.
    PAPER CONTEXT: All that is learned is P rows: keys and values of all layers [1], or embeddings [2].
    INTUITION: The note that is put before every text.
    IMPLEMENTATION: peft's table (P, L * 2 * Hkv * D) has keys before values in each layer, as ours has; a
        network that makes the prefix is run once and left out.
    WHY: A test has peft put the file before transformers' model, and gets our logits.
    """
    config = tuned.model.config
    facts: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "num_virtual_tokens": tuned.length,
        "num_transformer_submodules": 1,
        "num_layers": config.n_layer,
        "inference_mode": True,
    }
    with torch.no_grad():
        if isinstance(tuned, PrefixTuned):
            table = tuned.expand(tuned.small)
            heads = {"num_attention_heads": config.kv_heads, "token_dim": config.kv_heads * config.head_width}
            facts |= {"peft_type": "PREFIX_TUNING", "prefix_projection": False, **heads}
        else:
            table = tuned.prompt
            heads = {"num_attention_heads": config.n_head, "token_dim": config.n_embd}
            facts |= {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", **heads}
    return write_adapter(folder, facts, {TENSOR: table})


def prompt_kind(folder: Path | str) -> str:
    """Return the kind of what a folder holds, if it is a prefix or a prompt, else nothing."""
    path = Path(folder) / SETTINGS
    kind = read_json(path).get("peft_type") if path.is_file() else ""
    return str(kind) if isinstance(kind, str) and kind in KINDS else ""


def load_prompt(model: Decoder, folder: Path | str) -> Tuned:
    """Return the model behind a prefix or a prompt that we or peft wrote; errors as load_adapter()."""
    folder = Path(folder)
    kind = prompt_kind(folder)
    if not kind:
        raise ValueError(f"{folder / SETTINGS}: peft_type must be one of {', '.join(KINDS)}")
    with naming(folder / SETTINGS):
        length = _read_length(read_json(folder / SETTINGS))
    with naming(folder / TENSORS):
        tensors = read_tensors(folder / TENSORS)
        shape = (length, _width(kind, model.config))
        found = tuple(tensors[TENSOR].shape) if tensors.keys() == {TENSOR} else sorted(map(show, tensors))
        if found != shape:
            raise ValueError(f"tensors ({found}) must be {TENSOR} alone, {shape}, for this model")
    with torch.no_grad(), naming(folder):
        tuned = KINDS[kind](model, length)
        weight: nn.Parameter = tuned.small if isinstance(tuned, PrefixTuned) else tuned.prompt
        weight.copy_(tensors[TENSOR])
    return tuned.eval()


def _width(kind: str, config: DecoderConfig) -> int:
    """Return how many numbers a virtual token has."""
    if kind == "PROMPT_TUNING":
        return config.n_embd
    return config.n_layer * 2 * config.kv_heads * config.head_width


def _read_length(facts: dict[str, Any]) -> int:
    """Return the number of virtual tokens, or ValueError for a file that asks for more than a table."""
    length = facts.get("num_virtual_tokens")
    if type(length) is not int or length < 1:
        raise ValueError(f"num_virtual_tokens ({show(length)}) must be a whole number above 0")
    if facts.get("prefix_projection"):
        raise ValueError("prefix_projection (true) must be false: peft keeps the network, we its result")
    return length
