"""Checks of writing. --interactive exports the model that you name to a folder and a GGUF file."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from common.files import CHECKPOINTS
from common.script import ask, run_validation
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.interop import load_gguf
from phase1_foundation.project3_pretrain.config import DecoderConfig, ExportConfig
from phase1_foundation.project3_pretrain.export import (
    chat_template,
    named_tensors,
    run,
    save_folder,
    save_gguf,
)
from phase1_foundation.project3_pretrain.gguf_file import GGUFFile
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model

V = 320  # 20 rows more than the tokenizer has tokens, as when a vocabulary is rounded up for speed
LLAMA = DecoderConfig(vocab_size=V, block_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)
GPT2 = DecoderConfig.gpt2(vocab_size=V, block_size=32, n_layer=2, n_head=4, n_embd=64)
SHAPES = {
    "gpt2": GPT2,
    "gpt2, untied, narrow": replace(GPT2, tied=False, mlp_hidden=96),
    "llama": replace(LLAMA, rope_theta=5000.0, norm_eps=1e-6),
    "llama, untied, wide heads": replace(LLAMA, tied=False, head_dim=32),
    "llama, biases": replace(LLAMA, bias=True),
    "qwen3": replace(LLAMA, qk_norm=True),
}
each_shape = pytest.mark.parametrize("shape", SHAPES)
ODD = "Hello, I'M  12345 naïve\n\n cafés… \tx**2 你好 🙂\r\n<|endoftext|>"
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def random_decoder(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.15).add_(0.5 * (weight.dim() == 1))
    return model


def random_tokens() -> Tensor:
    return torch.randint(V, (2, 32), generator=torch.Generator().manual_seed(1))


def same_weights(ours: Decoder, again: Decoder) -> bool:
    weights = dict(again.named_parameters())
    return (
        all(torch.equal(weights.pop(name), weight) for name, weight in ours.named_parameters())
        and not weights
    )


@each_shape
def test_transformers_reads_the_folder_and_gives_our_logits(
    shape: str, tokenizer: BPETokenizer, tmp_path: Path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = random_decoder(SHAPES[shape])
    save_folder(ours, tokenizer, tmp_path, chat=CHAT)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(random_tokens()), theirs(random_tokens()).logits, rtol=1e-4, atol=1e-4
        )
    theirs_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs_tokenizer(ODD)["input_ids"] == tokenizer.encode(ODD, "all")
    assert (
        theirs.config.eos_token_id == theirs_tokenizer.eos_token_id == tokenizer.special_tokens["<|im_end|>"]
    )
    assert theirs_tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


@each_shape
def test_a_folder_comes_back_as_it_was(shape: str, tokenizer: BPETokenizer, tmp_path: Path):
    ours = random_decoder(SHAPES[shape])
    again, again_tokenizer = load_model(save_folder(ours, tokenizer, tmp_path))
    assert same_weights(ours, again)
    assert torch.equal(ours(random_tokens()), again(random_tokens()))
    assert again_tokenizer.encode(ODD, "all") == tokenizer.encode(ODD, "all")


@each_shape
def test_a_gguf_file_comes_back_as_it_was(shape: str, tokenizer: BPETokenizer, tmp_path: Path):
    ours = random_decoder(SHAPES[shape])
    again, again_tokenizer = load_model(save_gguf(ours, tokenizer, tmp_path / "x.gguf"))
    assert same_weights(ours, again)
    eps = {"norm_eps": pytest.approx(again.config.norm_eps, rel=1e-6)}  # the file has it in 32 bits
    for name, value in (vars(ours.config) | eps | {"head_dim": 0, "mlp_hidden": 0, "n_kv_head": 0}).items():
        assert name in ("head_dim", "mlp_hidden", "n_kv_head") or getattr(again.config, name) == value, name
    assert again.config.mlp_width == ours.config.mlp_width
    torch.testing.assert_close(ours(random_tokens()), again(random_tokens()), rtol=1e-5, atol=1e-5)
    assert again_tokenizer.encode(ODD, "all") == tokenizer.encode(ODD, "all")
    assert vars(again_tokenizer)["vocab"] == tokenizer.vocab


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_matrices_are_written_as_asked_and_all_else_in_full(
    shape: str, kind: str, tokenizer: BPETokenizer, tmp_path: Path
):
    ours = random_decoder(SHAPES[shape])
    path = save_gguf(ours, tokenizer, tmp_path / "x.gguf", kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, tensor in named_tensors(ours, "gguf"):
        matrix = tensor.dim() == 2 and name != "position_embd.weight"
        assert tensors[name].tensor_type.name == (kind.upper() if matrix else "F32"), name
        expected = gguf.quantize(tensor.numpy(), tensors[name].tensor_type)
        assert np.array_equal(tensors[name].data.view(np.uint8), expected.view(np.uint8)), name
    again, _ = load_model(path)
    exact, rough = ours(random_tokens()), again(random_tokens())
    assert not torch.equal(exact, rough)
    assert (exact - rough).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_folder_can_hold_half_the_bytes(dtype: torch.dtype, tokenizer: BPETokenizer, tmp_path: Path):
    ours = random_decoder(LLAMA)
    folder = save_folder(ours, tokenizer, tmp_path, dtype)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118
    again, _ = load_model(folder)
    assert torch.equal(again.head.weight, ours.head.weight.to(dtype).float())
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype)[6:]


def test_biases_that_our_gpt2_lacks_are_zeros_in_theirs(tokenizer: BPETokenizer, tmp_path: Path):
    ours = random_decoder(replace(GPT2, bias=False))
    for path in (
        save_folder(ours, tokenizer, tmp_path / "folder"),
        save_gguf(ours, tokenizer, tmp_path / "x.gguf"),
    ):
        again, _ = load_model(path)
        assert again.config.bias
        assert torch.equal(ours(random_tokens()), again(random_tokens()))


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "smollm", "qwen2", "o200k"])
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_vocabulary_comes_back_as_it_was_if_llama_cpp_has_a_name_for_it(
    pattern: str, ignore_merges: bool, tmp_path: Path
):
    tokenizer = BPETokenizer.train_from_iterator(
        [ODD * 3], 280, pattern=pattern, special_tokens=["<|endoftext|>"]
    )
    tokenizer.ignore_merges, path = ignore_merges, tmp_path / "x.gguf"
    if ignore_merges and pattern != "gpt4":
        with pytest.raises(ValueError, match=rf"pattern \({pattern}\) must be one that llama.cpp knows"):
            save_gguf(random_decoder(LLAMA), tokenizer, path)
        assert not path.exists()
        return
    again = load_gguf(save_gguf(random_decoder(LLAMA), tokenizer, path))
    assert vars(again)["vocab"] == tokenizer.vocab
    assert vars(again)["merges"] == tokenizer.merges
    assert (again.special_tokens, again.pattern) == (tokenizer.special_tokens, pattern)
    assert again.ignore_merges == ignore_merges
    reader = gguf.GGUFReader(path)
    tokens, types = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert len(tokens) == len(set(tokens)) == len(types) == V
    assert types.count(5) == V - tokenizer.vocab_size


@pytest.mark.parametrize(
    "change",
    [{"norm": "layernorm"}, {"positions": "learned"}, {"mlp": "gelu"}, {"qk_norm": True, "bias": True}],
)
def test_a_shape_that_no_family_has_is_refused(change: dict, tokenizer: BPETokenizer, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"norm, positions, mlp \(.*\) must be, with all else, those of GPT-2"
    ):
        save_folder(random_decoder(replace(LLAMA, **change)), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_blocks_of_32_do_not_fit_are_refused(tokenizer: BPETokenizer, tmp_path: Path):
    model = random_decoder(replace(LLAMA, mlp_hidden=100))
    with pytest.raises(
        ValueError, match=r"blk.0.ffn_down.weight \(shape \(64, 100\)\) must have rows of a multiple of 32"
    ):
        save_gguf(model, tokenizer, tmp_path / "x.gguf", "q8_0")


def test_the_chat_template_is_handed_on_unread(tokenizer: BPETokenizer, tmp_path: Path):
    bomb = "{{ cycler.__init__.__globals__.os.mkdir('boom') }}"
    folder = save_folder(random_decoder(LLAMA), tokenizer, tmp_path / "folder", chat=bomb)
    file = save_gguf(random_decoder(LLAMA), tokenizer, tmp_path / "x.gguf", chat=bomb)
    assert chat_template(folder) == chat_template(file) == bomb
    (folder / "chat_template.jinja").write_text(CHAT)  # where transformers 5 keeps it
    assert chat_template(folder) == CHAT


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_the_script_writes_what_a_checkpoint_holds(
    form: str, checkpoint: Path, model: Decoder, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = run(ExportConfig(model=str(checkpoint), format=form, out=tmp_path / "deep" / "export"))
    assert out.name == {"hf": "export", "gguf": "export.gguf"}[form]
    again, _ = load_model(out)
    assert same_weights(model, again)
    assert f"{model.count_parameters():,} parameters, llama" in capsys.readouterr().out


def test_q8_0_is_for_gguf_only():
    with pytest.raises(ValueError, match=r"weights \(q8_0\) must be f32, f16 or bf16 for hf"):
        ExportConfig(weights="q8_0").validate_config()


@pytest.mark.slow
@each_shape
def test_llama_cpp_reads_the_file_and_gives_our_odds(shape: str, tokenizer: BPETokenizer, tmp_path: Path):
    """llama.cpp itself, where the package xllamacpp is installed.

    It keeps keys and values in 16 bits: 0.2%.
    """
    server_of = pytest.importorskip("xllamacpp")
    import requests

    ours = random_decoder(SHAPES[shape])
    settings = server_of.CommonParams()
    settings.model.path = str(save_gguf(ours, tokenizer, tmp_path / "x.gguf"))
    settings.n_parallel, settings.n_ctx, settings.warmup = 1, 64, False
    server = server_of.Server(settings)
    address = server.listening_address
    answer = requests.post(
        f"{address}/tokenize", json={"content": ODD, "parse_special": True}, timeout=60
    ).json()
    assert answer["tokens"] == tokenizer.encode(ODD, "all")
    ids = tokenizer.encode(ODD, "all")[:24]
    question = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 5}
    answer = requests.post(f"{address}/completion", json=question, timeout=60).json()
    found = answer["completion_probabilities"][0]["top_logprobs"]
    best = ours(torch.tensor([ids]))[0, -1].log_softmax(dim=0).topk(5)
    assert [entry["id"] for entry in found] == best.indices.tolist()
    assert [entry["logprob"] for entry in found] == pytest.approx(best.values.tolist(), rel=2e-3)


def interact() -> None:
    """Export the models whose names or paths are typed, to a folder that is removed again."""
    for name in ask("model> "):
        with tempfile.TemporaryDirectory(dir=CHECKPOINTS) as folder:
            for form in ("hf", "gguf"):
                out = run(ExportConfig(model=name, format=form, out=Path(folder) / "export"))
                if out.suffix == ".gguf":
                    print(f"{len(GGUFFile(out).tensors)} tensors")


if __name__ == "__main__":
    run_validation(__file__, interact)
