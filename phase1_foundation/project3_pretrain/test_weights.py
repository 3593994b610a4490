"""Checks of loading.

--interactive prints the shape, the tensors and the tokenizer of the model that you name.
"""

import json
import os
import random
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file
from torch import Tensor, nn

from common.checkpoints import save_checkpoint
from common.corpora import load_corpus, load_file
from common.downloads import DownloadError
from common.script import ask, run_validation
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.export import save_folder, save_gguf
from phase1_foundation.project3_pretrain.families import config_from_hf, parts_of
from phase1_foundation.project3_pretrain.gguf_file import KINDS, GGUFFile, to_bf16, to_q8_0
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import find_model, load_folder, load_model

V = 300
TEXT = "Once upon a time there was a tokenizer, and it had 300 tokens; no more, no less.\n" * 3
LLAMA = {
    "model_type": "llama", "vocab_size": V, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": V, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MODELS = {
    "gpt2": GPT2,
    "gpt2, untied": GPT2 | {"tie_word_embeddings": False, "n_inner": 100},
    "llama": LLAMA,
    "llama, tied": LLAMA | {"tie_word_embeddings": True, "head_dim": 24},
    "llama, biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": None},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 32},
}
SHAPES = {
    "gpt2": DecoderConfig.gpt2(vocab_size=V, block_size=32, n_layer=2, n_head=4, n_embd=64),
    "llama": DecoderConfig(vocab_size=V, block_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=64),
    "qwen3": DecoderConfig(
        vocab_size=V, block_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, qk_norm=True
    ),
}


@pytest.fixture(scope="module")
def gguf_path(tokenizer: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(random_decoder("llama"), tokenizer, tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.fixture
def folder(tokenizer: BPETokenizer, tmp_path: Path) -> Path:
    return save_folder(random_decoder("llama"), tokenizer, tmp_path / "model")


def random_decoder(family: str) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(SHAPES[family])
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    """Give every weight, biases and gains too, a value at which a mistake would show."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.15).add_(0.5 * (weight.dim() == 1))


def hugging_face(facts: dict) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts)).eval()
    randomize(model)
    return model


def random_tokens() -> Tensor:
    return torch.randint(V, (2, 32), generator=torch.Generator().manual_seed(1))


# Folders as transformers' save_pretrained writes them


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_that_transformers_wrote_is_the_same_model_here(name: str, sharded: bool, tmp_path: Path):
    theirs = hugging_face(MODELS[name])
    theirs.save_pretrained(tmp_path, max_shard_size="50KB" if sharded else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    ours = load_folder(tmp_path)
    tensors = dict(theirs.named_parameters())
    for ours_name, parts in parts_of(ours.config, "hf"):
        expected = torch.cat([part.turn(tensors.pop(part.name)) for part in parts])
        assert torch.equal(ours.get_parameter(ours_name), expected)
    assert not tensors
    with torch.no_grad():
        torch.testing.assert_close(
            ours(random_tokens()), theirs(random_tokens()).logits, rtol=1e-4, atol=1e-4
        )


def test_the_gpt2_of_the_hub_loads_without_its_prefix_and_with_its_masks(tmp_path: Path):
    """Its file has no "transformer." before the names, and a mask beside the weights of each block."""
    theirs = hugging_face(GPT2)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_safetensors(path).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 32, 32).tril()}, path)
    with torch.no_grad():
        logits = load_folder(tmp_path)(random_tokens())
        torch.testing.assert_close(logits, theirs(random_tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_are_read_and_given(dtype: torch.dtype, folder: Path):
    tensors = load_safetensors(folder / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    expected = tensors["model.norm.weight"].to(dtype)
    assert torch.equal(load_folder(folder).norm.weight, expected.float())
    assert torch.equal(load_folder(folder, torch.bfloat16).norm.weight, expected.to(torch.bfloat16))


def test_configs_of_older_and_newer_transformers_say_the_same():
    facts = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
             "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    old = facts | {"rope_theta": 5e5, "rope_scaling": None}
    new = facts | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert config_from_hf(old) == config_from_hf(new)
    assert config_from_hf(new).rope_theta == 5e5
    assert not config_from_hf(new).tied
    assert config_from_hf(facts | {"model_type": "mistral", "sliding_window": 16}).block_size == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, r"model_type \('mamba'\) must be one of gpt2, llama, qwen3, mistral"),
        ({"hidden_size": "64"}, r"hidden_size \('64'\) must be a whole number from 1"),
        ({"hidden_size": -64}, r"hidden_size \(-64\) must be"),
        ({"hidden_size": True}, r"hidden_size \(True\) must be"),
        ({"num_hidden_layers": None}, r"num_hidden_layers \(None\) must be"),
        ({"num_hidden_layers": 10_000_000}, r"n_layer \(10000000\) must be at most the \d+ tensors"),
        ({"max_position_embeddings": 10**9}, r"max_position_embeddings \(1000000000\) must be"),
        ({"num_attention_heads": 7}, r"n_head \(7\) must be divisible by n_kv_head \(2\)"),
        ({"num_key_value_heads": 3}, r"n_head \(4\) must be divisible by n_kv_head \(3\)"),
        ({"hidden_act": "relu"}, r"hidden_act \('relu'\) must be silu"),
        ({"rope_parameters": {"rope_type": "llama3"}}, r"rope_type \('llama3'\) must be default"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling .* must be None"),
        ({"rope_parameters": [1]}, r"rope_parameters \(\[1\]\) must be an object"),
        ({"rms_norm_eps": "small"}, r"rms_norm_eps \('small'\) must be a number"),
        ({"rms_norm_eps": 0}, r"norm_eps \(0.0\) must be above 0"),
        ({"attention_bias": True}, r"mlp_bias \(False\) must be True"),
        ({"tie_word_embeddings": 1}, r"tie_word_embeddings \(1\) must be true or false"),
        ({"vocab_size": 301}, r"model.embed_tokens.weight \(shape \(300, 64\)\) must be \(301, 64\)"),
        ({"intermediate_size": 100}, r"mlp.gate_proj.weight \(shape \(192, 64\)\) must be \(100, 64\)"),
        ({"tie_word_embeddings": False}, r"lm_head.weight \(none\) must be among the"),
        ({"model_type": "qwen3"}, r"self_attn.q_norm.weight \(none\) must be among the"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_is_refused_in_one_line(change: dict, message: str, folder: Path):
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | change))
    refused(folder, message)


def refused(path: Path, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda tensors: tensors.pop("model.norm.weight"),
            r"tensor model.norm.weight \(none\) must be among",
        ),
        (
            lambda tensors: tensors.update(extra=torch.ones(2)),
            r"tensor 'extra' \(one of 1\) must have a place",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).int()}),
            r"\(int32\) must hold floating",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(damage: Callable, message: str, folder: Path):
    tensors = load_safetensors(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, message)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_safetensors_file_that_was_cut_short_is_refused_in_one_line(share: float, folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(folder, "model.safetensors must be a whole safetensors file")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "model.bin", "a/../model.safetensors"]
)
def test_an_index_cannot_lead_out_of_its_folder(name: str, folder: Path):
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"weight_map \(.*\) must name safetensors files of this folder")


def test_a_missing_shard_is_named(folder: Path):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model-00001-of-00002.safetensors is missing", FileNotFoundError)


class Bomb:
    """A pickle that, when it is loaded as pickles usually are, makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_pickles_are_never_run(folder: Path, tmp_path: Path):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(tmp_path / "boom")}, folder / "pytorch_model.bin")
    refused(folder, "weights are read from safetensors only", FileNotFoundError)
    torch.save({"model_state_dict": Bomb(tmp_path / "boom")}, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "must be a whole file of this course")
    assert not (tmp_path / "boom").exists()


# Our checkpoints, and names


def save_ours(path: Path, vocabulary: BPETokenizer, **changes: object) -> Path:
    model = random_decoder("llama")
    vocabulary.save(path.with_suffix(".json"))
    entries = {
        "config": vars(model.config),
        "model_state_dict": model.state_dict(),
        "tokenizer": path.with_suffix(".json").read_text(),
    }
    save_checkpoint(path, **entries | changes)
    return path


def test_a_checkpoint_of_ours_is_the_same_model_and_tokenizer(tokenizer: BPETokenizer, tmp_path: Path):
    model, again = load_model(save_ours(tmp_path / "model.pt", tokenizer))
    assert not model.training
    assert torch.equal(model(random_tokens()), random_decoder("llama")(random_tokens()))
    assert vars(again)["vocab"] == tokenizer.vocab
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"n_layers": 3}}, "must be of this project's Decoder: .*n_layers"),
        (
            {"config": vars(SHAPES["llama"]) | {"n_layer": 10**9}},
            r"n_layer \(1000000000\) must be at most the",
        ),
        ({"config": vars(SHAPES["llama"]) | {"n_layer": 3}}, r"must fit the model: blocks.2"),
        ({"config": vars(SHAPES["llama"]) | {"n_embd": 64.0}}, r"n_embd \(64.0\) must be of type int"),
        ({"tokenizer": "{}"}, r"version \(None\) must be 1"),
        ({"tokenizer": "[" * 100_000}, "must be of this project's Decoder"),
        ({"tokenizer": {"kind": "char"}}, "must be of this project's Decoder"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(
    change: dict, message: str, tokenizer: BPETokenizer, tmp_path: Path
):
    refused(save_ours(tmp_path / "model.pt", tokenizer, **change), message)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path):
    large = BPETokenizer.train_from_iterator([TEXT], V + 1)
    assert large.vocab_size == V + 1
    refused(save_ours(tmp_path / "model.pt", large), r"vocab_size \(301\) must be at most the model's 300")


def test_a_name_that_nobody_knows_is_refused_with_those_that_are():
    with pytest.raises(
        FileNotFoundError, match=r"model \(llama9\) must be .*smollm2-135m, gpt2 or OWNER/NAME"
    ):
        find_model("llama9")
    with pytest.raises(FileNotFoundError, match="train one with: uv run python"):
        find_model("checkpoints/nothing.pt")


# GGUF


def test_the_table_of_kinds_is_llama_cpps():
    for name, kind in KINDS.items():
        official = GGMLQuantizationType(kind.number)
        assert official.name.lower() == name
        assert gguf.GGML_QUANT_SIZES[official] == (kind.weights, kind.size)


def random_blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Blocks of random bytes; their scales are 16-bit floats, which no random bytes may make infinite."""
    blocks = np.random.default_rng(seed).integers(0, 256, (count, KINDS[kind].size), dtype=np.uint8)
    if KINDS[kind].weights > 1:
        blocks[:, 1::2] &= 0xBF  # the upper bit of an exponent, wherever the kind has its scales
    elif kind != "f32":
        blocks[:, 1] &= 0xBF
    return blocks


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_decoded_as_the_gguf_library_does_to_the_bit(kind: str, tmp_path: Path):
    official, weights = GGMLQuantizationType(KINDS[kind].number), KINDS[kind].weights
    blocks = random_blocks(kind, 64 if weights > 1 else 2048)
    path, writer = tmp_path / "x.gguf", GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("before", np.ones(3, np.float32))
    raw = blocks.reshape(8, -1)
    writer.add_tensor(
        "x", raw.view(np.float32) if kind == "f32" else raw, raw_dtype=None if kind == "f32" else official
    )
    write_all(writer)
    found = GGUFFile(path).tensor("x").numpy()
    expected = gguf.dequantize(raw.view({"f32": np.float32, "f16": np.float16}.get(kind, np.uint8)), official)
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert np.array_equal(found.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))
    if weights > 1:
        assert np.unique(found).size > 100


def write_all(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e4]))
def test_what_we_write_is_what_the_gguf_library_writes_to_the_bit(seed: int, scale: float):
    x = np.random.default_rng(seed).normal(0, scale, (20, 32)).astype(np.float32)
    x[0] = 0
    x[1] = np.round(x[1] / scale * 4) / 2  # halves, where roundings differ
    x[1, 0] = 127
    for kind, ours in (("q8_0", to_q8_0), ("bf16", to_bf16)):
        assert np.array_equal(
            ours(x), gguf.quantize(x, GGMLQuantizationType(KINDS[kind].number)).view(np.uint8)
        )


def test_no_weight_of_q8_0_is_off_by_more_than_half_a_step():
    x = torch.randn(1000, 32)
    d = x.abs().amax(dim=1, keepdim=True) / 127
    off = (torch.from_numpy(KINDS["q8_0"].read(to_q8_0(x.numpy()))) - x).abs()  # type: ignore[misc]
    assert (
        off <= d * (0.5 + 127 * 2**-11)
    ).all()  # d itself is rounded to 11 bits, and counts up to 127 times
    assert (off > d * 0.4).any()


def test_a_file_of_ours_holds_what_the_official_reader_finds(gguf_path: Path):
    reader, model = gguf.GGUFReader(gguf_path), random_decoder("llama")
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.architecture"] == "llama"
    assert facts["llama.attention.head_count_kv"] == 2
    assert facts["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert facts["tokenizer.ggml.token_type"].count(3) == 3
    mine = GGUFFile(gguf_path)
    assert {name: facts[name] for name in mine.facts} == mine.facts
    assert len(reader.tensors) == len(mine.tensors) == 2 * 9 + 2
    for tensor in reader.tensors:
        assert tensor.data_offset % 32 == 0
        assert np.array_equal(tensor.data, mine.tensor(tensor.name).numpy())
    down = next(tensor.data for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    assert np.array_equal(down, model.blocks[1].feed_forward.down.weight.detach().numpy())


def test_llama_cpps_order_of_rows_turns_neighbours_where_ours_turns_halves():
    """The scores of q and k are the same.

    Ours turned in halves, theirs, seated anew, in neighbouring pairs.
    """
    config = SHAPES["llama"]
    (q, k, _), D = dict(parts_of(config, "gguf"))["blocks.0.attention.qkv.weight"], config.head_width
    x, at = torch.randn(32, 64, dtype=torch.float64), torch.arange(32, dtype=torch.float64)
    angles = at[:, None] * 10_000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    turn = torch.polar(torch.ones_like(angles), angles)
    ours, theirs = [], []
    for part, heads in ((q, 4), (k, 2)):
        weight = torch.randn(heads * D, 64, dtype=torch.float64)
        assert torch.equal(part.turn(part.back(weight)), weight)
        assert not torch.equal(part.back(weight), weight)
        y = (x @ weight.T).view(32, heads, D)[:, 0]
        ours.append(torch.complex(y[:, : D // 2], y[:, D // 2 :]) * turn)
        z = (x @ part.back(weight).T).view(32, heads, D)[:, 0]
        theirs.append(torch.view_as_complex(z.view(32, D // 2, 2)) * turn)
    scores = [(a @ b.mH).real for a, b in (ours, theirs)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-12, atol=1e-12)


def test_a_gguf_file_is_the_same_model_and_tokenizer(gguf_path: Path, tokenizer: BPETokenizer):
    model, again = load_model(gguf_path)
    for name, weight in random_decoder("llama").named_parameters():
        assert torch.equal(model.get_parameter(name), weight), name
    assert vars(again)["merges"] == tokenizer.merges
    assert again.special_tokens == tokenizer.special_tokens


def test_a_gguf_file_cut_short_anywhere_is_refused_in_one_line(gguf_path: Path, tmp_path: Path):
    content, cut = gguf_path.read_bytes(), tmp_path / "cut.gguf"
    for end in [*range(64), *random.Random(0).sample(range(64, len(content) - 32), 60), len(content) - 32]:
        cut.write_bytes(content[:end])
        refused(cut, r"cut.gguf: .* must ")


def edited(path: Path, out: Path, edit: Callable[[bytes], bytes]) -> Path:
    out.write_bytes(edit(path.read_bytes()))
    return out


def with_bytes(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + new + content[at + len(new) :]


def after(mark: bytes, new: bytes, skip: int = 0) -> Callable[[bytes], bytes]:
    """Replace what comes after a mark and so many bytes."""
    return lambda content: with_bytes(content.index(mark) + len(mark) + skip, new)(content)


def instead(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(old, new)


U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
Q = b"blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_bytes(0, b"GGML"), r"content \(no GGUF at its beginning\) must be a GGUF file"),
        (with_bytes(4, U32(9)), r"version \(9\) must be 2 or 3"),
        (with_bytes(8, U64(2**60)), r" must "),
        (with_bytes(16, U64(2**60)), r" must "),
        (after(Q, U32(2**31)), r"attn_q.weight \(2147483648 sizes\) must have 1 to 4"),
        (after(Q, U32(0)), r"attn_q.weight \(0 sizes\) must have 1 to 4"),
        (after(Q, U64(2**62), 4), r"attn_q.weight \(bytes .*\) must be aligned and lie"),
        (after(Q, U64(0), 4), r"attn_q.weight \(shape \(64, 0\)\) must have rows"),
        (after(Q, U64(32), 4), r"attn_q.weight \(shape \(64, 32\)\) must be \(64, 64\)"),
        (after(Q, U32(99), 20), r"attn_q.weight \(kind 99\) must be one of f32"),
        (after(Q, U64(2**63), 24), r"attn_q.weight \(bytes .*\) must be aligned"),
        (after(Q, U64(7), 24), r"attn_q.weight \(bytes .*\) must be aligned"),
        (instead(b"blk.0.attn_k.weight", Q), r"blk.0.attn_q.weight\) must stand once"),
        (instead(b"output_norm", b"output_norn"), r"output_norm.weight \(none\) must be among"),
        (instead(b"token_embd", b"token_embq"), r"must hold token_embd.weight"),
        (instead(b"blk.1.attn_v.", b"blk.1\nattn_v."), r"name \('blk.1\\nattn_v.weight'\) must be"),
        (after(b"llama.block_count", U32(2**24), 4), r"n_layer \(16777216\) must be at most the 20 tensors"),
        (after(b"llama.context_length", U32(2**32 - 1), 4), r"context_length \(4294967295\) must be a whole"),
        (after(b"llama.attention.head_count_kv", U32(3), 4), r"n_head \(4\) must be divisible by n_kv_head"),
        (after(b"llama.rope.dimension_count", U32(8), 4), r"rope.dimension_count \(8\) must be 16"),
        (after(b"layer_norm_rms_epsilon", struct.pack("<f", float("nan")), 4), r"norm_eps \(nan\)"),
        (instead(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba"), r"architecture \('mamba'\)"),
    ],
)  # fmt: skip
def test_a_gguf_file_that_lies_is_refused_in_one_line(
    edit: Callable, message: str, gguf_path: Path, tmp_path: Path
):
    refused(edited(gguf_path, tmp_path / "x.gguf", edit), message)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_mutated_gguf_file_is_refused_in_one_line_or_loads(
    seed: int, gguf_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    choice, content = random.Random(seed), bytearray(gguf_path.read_bytes())
    head = content.index(b"output_norm.weight") + 100
    for _ in range(choice.randrange(1, 4)):
        content[choice.randrange(head)] = choice.choice([0, 1, 2, 127, 255, choice.randrange(256)])
    path = tmp_path_factory.mktemp("fuzz") / "x.gguf"
    path.write_bytes(content)
    try:
        model, _ = load_model(path)
    except ValueError as error:
        assert re.fullmatch(r"[^\n]{1,600}", str(error))  # noqa: PT017
    else:
        assert model(random_tokens() % model.config.vocab_size).shape[2] == model.config.vocab_size


# The real one


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Path]:
    try:
        yield load_file("smollm2-135m")
    except DownloadError as error:
        pytest.skip(f"no source reaches SmolLM2: {error}")


@pytest.mark.slow
def test_smollm2_writes_and_rates_text_as_in_transformers(smollm2: Path):
    pytest.importorskip("accelerate", reason="transformers reads no GGUF file without it")
    from transformers import AutoModelForCausalLM

    ours, tokenizer = load_model("smollm2-135m")
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    prompt = tokenizer.encode(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n", "all"
    )
    ids, how = torch.tensor([prompt]), {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 2}
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)[0].tolist()
    with torch.no_grad():
        while ids.shape[1] < len(expected):
            ids = torch.cat([ids, ours(ids)[:, -1:].argmax(dim=-1)], dim=1)
    assert ids[0].tolist() == expected
    assert "Paris" in tokenizer.decode(expected)
    text = load_corpus("stdlib").read_text(encoding="utf-8")[:20_000]
    ids = torch.tensor(tokenizer.encode(text)[:4096]).view(-1, 512)
    with torch.no_grad():
        losses = [
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            for logits in (ours(ids[:, :-1]), theirs(ids[:, :-1]).logits)
        ]
    assert abs(losses[0].exp() / losses[1].exp() - 1) < 1e-4


def interact() -> None:
    """Describe the models whose names or paths are typed."""
    for name in ask("model> "):
        model, tokenizer = load_model(name)
        kind = f"{type(tokenizer).__name__} of {tokenizer.vocab_size:,}"
        print(f"{model.config}\n{model.count_parameters():,} parameters; {kind}")
        for tensor, weight in model.named_parameters():
            print(f"{tensor:40} {tuple(weight.shape)!s:16} spread {weight.std():.4f}")


if __name__ == "__main__":
    run_validation(__file__, interact)
