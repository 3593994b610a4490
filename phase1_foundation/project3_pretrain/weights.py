r"""Real weights: model and tokenizer from our checkpoints, from safetensors, from GGUF, or by a known name.

PAPERS
  [1] SmolLM2: When Smol Goes Big -- Data-Centric Training of a Small Language Model, Ben Allal et al., 2025,
      arXiv:2502.02737
  [2] Language Models are Unsupervised Multitask Learners, Radford et al., 2019 (GPT-2)
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.checkpoints import load_checkpoint, load_weights
from common.corpora import FILES, load_file
from common.script import one_line
from phase1_foundation.project2_tokenizer.interop import load_gguf, open_tokenizer
from phase1_foundation.project2_tokenizer.token_file import (
    build_tokenizer,
    naming,
    read_json,
    read_object,
    show,
)
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.config import TRAIN_COMMAND, DecoderConfig
from phase1_foundation.project3_pretrain.families import (
    config_from_gguf,
    config_from_hf,
    parts_of,
)
from phase1_foundation.project3_pretrain.gguf_file import GGUFFile
from phase1_foundation.project3_pretrain.model import Decoder

HUB = {"gpt2": "openai-community/gpt2"}  # short names of repositories; any OWNER/NAME works as well
HUB_FILES = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
# What old files keep beside their weights: masks and wavelengths, which a Decoder computes.
IGNORED = r".*\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq"


class Tensors(Protocol):
    """A file of named tensors, or several."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Return one of them."""
        ...


def load_model(name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Tokenizer]:
    """Return a model, ready to write, and its tokenizer.

    PAPER: [1] and [2] are the models with names; the interface is the course's own.
    PAPER CONTEXT: A model is a shape, a few hundred tensors and a tokenizer, and everybody packs them
        differently.
    INTUITION: Whatever the box, the same thing comes out of it.
    IMPLEMENTATION: A checkpoint of ours, a folder with config.json and safetensors, a .gguf file, or a
        name: smollm2-135m, gpt2, or OWNER/NAME on the Hugging Face hub. Every fact is checked before memory
        is taken; nothing in any of these files is ever run. Raises ValueError or OSError in one line.
    WHY: What must not happen is a model that loads and is a little wrong: a missing, an unknown or a
        misshapen tensor, or a tokenizer with more tokens than the model, is an error.
    """
    path = find_model(name_or_path)
    if path.is_dir():
        model: Decoder = load_folder(path, dtype)
        tokenizer: Tokenizer = open_tokenizer(path)
    elif path.suffix == ".gguf":
        model, tokenizer = load_gguf_model(path, dtype), load_gguf(path)
    else:
        model, tokenizer = load_decoder(path, dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        rule = f"must be at most the model's {model.config.vocab_size}"
        raise ValueError(f"{path}: the tokenizer's vocab_size ({tokenizer.vocab_size}) {rule}")
    return model.eval(), tokenizer


def find_model(name_or_path: str | Path) -> Path:
    """Return the file or folder of a model, fetched if it is known by name.

    FileNotFoundError says what can be.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name in FILES and FILES[name].file.endswith(".gguf"):
        return load_file(name)
    if path.exists():
        return path
    if name in HUB or (re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.suffix):
        return _from_hub(HUB.get(name, name))
    known = ", ".join([*(name for name, entry in FILES.items() if entry.file.endswith(".gguf")), *HUB])
    raise FileNotFoundError(
        f"model ({name}) must be a file, a folder, {known} or OWNER/NAME on the hub; "
        f"train one with: {TRAIN_COMMAND}"
    )


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download  # here: it takes half a second to import

    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES, etag_timeout=5))
    except Exception as error:  # a dozen types from four libraries
        raise OSError(
            f"{repository} cannot be had from the Hugging Face hub: {one_line(error)[:200]}"
        ) from error


def load_decoder(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Tokenizer]:
    """Return the model and tokenizer of a checkpoint of ours."""
    entries = load_checkpoint(path, TRAIN_COMMAND, needs=("config", "model_state_dict", "tokenizer"))
    try:
        config = DecoderConfig(**entries["config"])
        for name, default in vars(DecoderConfig()).items():
            kinds = (int, float) if type(default) is float else (type(default),)
            if type(value := getattr(config, name)) not in kinds:
                raise ValueError(f"{name} ({show(value)}) must be of type {type(default).__name__}")
        _check(config, len(entries["model_state_dict"]))
        tokenizer = build_tokenizer(read_object(json.loads(entries["tokenizer"]), "tokenizer"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"checkpoint ({path}) must be of this project's Decoder: {one_line(error)}"
        ) from error
    model = Decoder(config)
    load_weights(model, entries["model_state_dict"], path)
    return model.to(dtype), tokenizer


def load_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """Return the model of a folder with a config.json and safetensors."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json, so it is no folder of a model")
    facts = read_json(folder / "config.json")
    with naming(folder):
        return build_decoder(config_from_hf(facts), SafetensorsFolder(folder), "hf", dtype)


def load_gguf_model(path: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """Return the model of a GGUF file."""
    file = GGUFFile(path)
    with naming(path):
        return build_decoder(config_from_gguf(file.facts, file.shapes), file, "gguf", dtype)


def build_decoder(config: DecoderConfig, file: Tensors, style: str, dtype: torch.dtype) -> Decoder:
    """Return a Decoder of this shape with the tensors of a file, all of which it must have a use for."""
    shapes = file.shapes
    _check(config, len(shapes))
    wanted = dict(parts_of(config, style))
    for part in (part for parts in wanted.values() for part in parts):
        if part.name not in shapes:
            raise ValueError(f"tensor {part.name} (none) must be among the {len(shapes)} of the file")
        if shapes[part.name] != part.shape:
            raise ValueError(f"tensor {part.name} (shape {shapes[part.name]}) must be {part.shape}")
    used = {part.name for parts in wanted.values() for part in parts}
    spare = {name for name in shapes.keys() - used if not re.fullmatch(IGNORED, name)}
    if config.tied:
        spare.discard("lm_head.weight")
    if spare:
        raise ValueError(
            f"tensor {show(min(spare))} (one of {len(spare)}) must have a place in a Decoder of this shape"
        )
    weights = {}
    for name, parts in wanted.items():
        tensors = [part.turn(file.tensor(part.name)).to(dtype) for part in parts]
        weights[name] = torch.cat(tensors) if len(tensors) > 1 else tensors[0].contiguous()
    return Decoder.from_weights(config, weights)


def _check(config: DecoderConfig, tensors: int) -> None:
    """Raise ValueError for a shape that would cost time or memory before a missing tensor is noticed."""
    config.validate_config()
    if config.vocab_size < 1 or config.n_layer > tensors:
        raise ValueError(f"n_layer ({config.n_layer}) must be at most the {tensors} tensors that there are")


class SafetensorsFolder:
    """The tensors of a folder of safetensors files, one file or several with an index.

    PAPER: none; the format is described at github.com/huggingface/safetensors (2022).
    PAPER CONTEXT: Models were shared as pickles, which are programs: whoever loaded one ran it. A safetensors
        file is a table of names, types and places in JSON, then numbers.
    INTUITION: A file that can only hold numbers can do no harm but be wrong.
    IMPLEMENTATION: The library maps the files and checks its tables; we check names and shapes. An index may
        name files of its own folder only. Files of pickles beside it are not looked at.
    WHY: A test gives it paths that lead elsewhere, cut files and missing ones, and gets one line of error
        each.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / "model.safetensors.index.json").is_file():
            index = read_object(
                read_json(folder / "model.safetensors.index.json").get("weight_map"), "weight_map"
            )
            files = {str(file) for file in index.values()}
        else:
            files = {"model.safetensors"}
        self.places: dict[str, tuple[str, str]] = {}  # name of a tensor: its file, its name there
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(files):
            self._read_table(file)
        if "wte.weight" in self.places:  # the GPT-2 of the hub is saved without the name of its outer module
            self.places = {f"transformer.{name}": place for name, place in self.places.items()}
            self.shapes = {f"transformer.{name}": shape for name, shape in self.shapes.items()}

    def _read_table(self, file: str) -> None:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"weight_map ({show(file)}) must name safetensors files of this folder")
        if not (self.folder / file).is_file():
            raise FileNotFoundError(
                f"{self.folder / file} is missing; weights are read from safetensors only"
            )
        with self._open(file) as table:
            for name in table.keys():  # noqa: SIM118  # it is no dict
                self.places[name] = file, name
                self.shapes[name] = tuple(table.get_slice(name).get_shape())

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        try:
            with safe_open(self.folder / file, "pt") as table:
                yield table
        except SafetensorError as error:
            raise ValueError(f"{file} must be a whole safetensors file: {one_line(error)[:200]}") from error

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, as the file has it."""
        file, stored = self.places[name]
        with self._open(file) as table:
            tensor = table.get_tensor(stored)
        if not tensor.is_floating_point():
            raise ValueError(f"tensor {name} ({str(tensor.dtype)[6:]}) must hold floating-point numbers")
        return tensor
