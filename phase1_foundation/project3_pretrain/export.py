"""Write a model for transformers or llama.cpp.

Uv run python phase1_foundation/project3_pretrain/export.py --format gguf
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from common.files import atomic_write, make_folder
from common.script import script
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.gguf_metadata import read_gguf_metadata
from phase1_foundation.project2_tokenizer.interop import CONTROL, GGUF_PRE, UNUSED, save_hf, to_letters
from phase1_foundation.project2_tokenizer.token_file import read_json, read_text
from phase1_foundation.project3_pretrain.config import ExportConfig
from phase1_foundation.project3_pretrain.families import config_to_gguf, config_to_hf, family_of, parts_of
from phase1_foundation.project3_pretrain.gguf_file import write_gguf
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import find_model, load_model

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's numbers for "mostly this"
ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
)  # the first that a tokenizer has ends what it writes
STARTS = ("<|im_start|>", "<|begin_of_text|>", "<s>", "<|endoftext|>")


def run(config: ExportConfig) -> Path:
    """Write the files and return the folder or file."""
    path = find_model(config.model)
    model, tokenizer = load_model(path)
    if not isinstance(tokenizer, BPETokenizer):
        raise ValueError(f"tokenizer ({type(tokenizer).__name__}) must be byte-level BPE to be exported")
    chat = chat_template(path)
    print(f"model       {config.model}: {model.count_parameters():,} parameters, {family_of(model.config)}")
    if config.format == "hf":
        out = save_folder(model, tokenizer, config.out, DTYPES[config.weights], chat)
        how = f'transformers.AutoModelForCausalLM.from_pretrained("{out}")'
    else:
        out = save_gguf(model, tokenizer, config.out.with_suffix(".gguf"), config.weights, chat)
        how = f"llama-cli -m {out}"
    size = sum(file.stat().st_size for file in (out.iterdir() if out.is_dir() else [out]))
    print(f"written to  {out}: {size:,} bytes, matrices as {config.weights}")
    print(f"read it by  {how}")
    return out


def save_folder(
    model: Decoder,
    tokenizer: BPETokenizer,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    chat: str | None = None,
) -> Path:
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json, for transformers."""
    make_folder(folder)
    special = {name: find_special(tokenizer, names) for name, names in (("bos", STARTS), ("eos", ENDS))}
    ids = {f"{name}_token_id": tokenizer.special_tokens.get(token or "") for name, token in special.items()}
    _write_json(folder / "config.json", config_to_hf(model.config) | ids | {"dtype": str(dtype)[6:]})
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in named_tensors(model, "hf")}
    with atomic_write(folder / "model.safetensors", "wb") as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    save_hf(tokenizer, folder / "tokenizer.json")
    facts: dict[str, Any] = {f"{name}_token": token for name, token in special.items() if token}
    facts |= {"chat_template": chat} if chat else {}
    facts |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size}
    _write_json(folder / "tokenizer_config.json", facts | {"clean_up_tokenization_spaces": False})
    return folder


def save_gguf(
    model: Decoder, tokenizer: BPETokenizer, path: Path, kind: str = "f32", chat: str | None = None
) -> Path:
    """Write a GGUF file for llama.cpp; norms, biases and positions stay f32, as llama.cpp wants them."""
    facts = config_to_gguf(model.config) | {
        "general.name": path.stem,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
    }
    facts |= gguf_vocabulary(tokenizer, model.config.vocab_size)
    facts |= {"tokenizer.chat_template": chat} if chat else {}

    def kind_of(name: str, tensor: Tensor) -> str:
        return kind if tensor.dim() == 2 and name != "position_embd.weight" else "f32"

    write_gguf(
        path, facts, [(name, tensor, kind_of(name, tensor)) for name, tensor in named_tensors(model, "gguf")]
    )
    return path


def named_tensors(model: Decoder, style: str) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's tensors by the names and in the layouts of others' files."""
    config, weights = model.config, dict(model.named_parameters())
    if family_of(config) == "gpt2":
        config = replace(config, bias=True)  # theirs always has biases; where ours has none they are 0
    for name, parts in parts_of(config, style):
        rows = [part.rows for part in parts]
        weight = weights[name].detach() if name in weights else torch.zeros(sum(rows))
        for part, piece in zip(parts, weight.split(rows), strict=True):
            yield part.name, part.back(piece)


def gguf_vocabulary(tokenizer: BPETokenizer, rows: int) -> dict[str, Any]:
    """Return a tokenizer as the facts of a GGUF file.

    `rows` of the embedding without a token get a name too.
    """
    names = {(pattern, ignores): name for name, (pattern, ignores) in GGUF_PRE.items()}
    if (tokenizer.pattern, tokenizer.ignore_merges) not in names:
        raise ValueError(
            f"pattern ({tokenizer.pattern}) must be one that llama.cpp knows: {', '.join(GGUF_PRE)}"
        )
    letters = {i: to_letters(token) for i, token in tokenizer.vocab.items()}
    special = {i: name for name, i in tokenizer.special_tokens.items()}
    tokens = [special.get(i) or letters.get(i) or f"[PAD{i}]" for i in range(rows)]
    types = [CONTROL if i in special else 1 if i in letters else UNUSED for i in range(rows)]
    facts = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": names[tokenizer.pattern, tokenizer.ignore_merges],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{letters[left]} {letters[right]}" for left, right, _ in tokenizer.merges],
        "tokenizer.ggml.add_bos_token": False,
    }
    for name, candidates in (("bos", STARTS), ("eos", ENDS)):
        if token := find_special(tokenizer, candidates):
            facts[f"tokenizer.ggml.{name}_token_id"] = tokenizer.special_tokens[token]
    return facts


def find_special(tokenizer: BPETokenizer, names: tuple[str, ...]) -> str | None:
    """Return the first of the names that is a special token."""
    return next((name for name in names if name in tokenizer.special_tokens), None)


def chat_template(path: Path) -> str | None:
    """Return the chat template of a file or folder as text, to be handed on.

    It is not looked into, still less run.
    """
    if path.suffix == ".gguf":
        found = read_gguf_metadata(path).get("tokenizer.chat_template")
    elif (path / "chat_template.jinja").is_file():
        found = read_text(path / "chat_template.jinja")
    elif (path / "tokenizer_config.json").is_file():
        found = read_json(path / "tokenizer_config.json").get("chat_template")
    else:
        found = None
    return found if isinstance(found, str) else None


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


@script
def main() -> None:
    """Parse and write."""
    run(ExportConfig.from_cli())


if __name__ == "__main__":
    main()
