r"""What others call the parts of a Decoder: GPT-2, Llama and Qwen3 in Hugging Face's files and in GGUF.

PAPERS
  [1] Language Models are Unsupervised Multitask Learners, Radford et al., 2019 (GPT-2)
  [2] LLaMA: Open and Efficient Foundation Language Models, Touvron et al., 2023, arXiv:2302.13971
  [3] Mistral 7B, Jiang et al., 2023, arXiv:2310.06825
  [4] Qwen3 Technical Report, Yang et al., 2025, arXiv:2505.09388
  [5] RoFormer: Enhanced Transformer with Rotary Position Embedding, Su et al., 2021, arXiv:2104.09864

SHAPES
  C  n_embd    D  head_dim
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from phase1_foundation.project2_tokenizer.token_file import read_object, show
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder

FAMILIES = ("gpt2", "llama", "qwen3")
MAX_SIZE = 2**24  # of anything in a config that a stranger wrote
MAX_POSITIONS = 2**20  # a table of which is made before any weight is read
MODULES: dict[str, dict[str, str]] = {  # names of our modules: theirs; those of a block without its prefix
    "gpt2": {
        "token_embedding": "transformer.wte", "position_embedding": "transformer.wpe",
        "norm": "transformer.ln_f", "head": "lm_head", "blocks": "transformer.h", "norm1": "ln_1",
        "attention.qkv": "attn.c_attn", "attention.proj": "attn.c_proj", "norm2": "ln_2",
        "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj",
    },
    "llama": {
        "token_embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
        "blocks": "model.layers", "norm1": "input_layernorm",
        "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
        "attention.proj": "self_attn.o_proj", "norm2": "post_attention_layernorm",
        "feed_forward.gate_up": "mlp.gate_proj mlp.up_proj", "feed_forward.down": "mlp.down_proj",
    },
    "gguf": {
        "token_embedding": "token_embd", "position_embedding": "position_embd", "norm": "output_norm",
        "head": "output", "blocks": "blk", "norm1": "attn_norm", "attention.qkv": "attn_q attn_k attn_v",
        "attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm", "attention.proj": "attn_output",
        "norm2": "ffn_norm", "feed_forward.gate_up": "ffn_gate ffn_up", "feed_forward.up": "ffn_up",
        "feed_forward.down": "ffn_down",
    },
}  # fmt: skip


def family_of(config: DecoderConfig) -> str:
    """Return the family whose files can hold a model of this shape, or ValueError."""
    switches = (config.norm, config.positions, config.mlp)
    square = config.kv_heads == config.n_head and config.head_width * config.n_head == config.n_embd
    if switches == ("layernorm", "learned", "gelu") and square and not config.qk_norm:
        return "gpt2"
    if switches == ("rmsnorm", "rope", "swiglu") and not (config.qk_norm and config.bias):
        return "qwen3" if config.qk_norm else "llama"
    raise ValueError(
        f"norm, positions, mlp ({', '.join(switches)}) must be, with all else, those of GPT-2, Llama or Qwen3"
    )


Turn = Callable[[Tensor], Tensor]  # one tensor, laid out in another way


@dataclass(frozen=True)
class Part:
    """One of their tensors, which is some rows of one of our parameters."""

    name: str
    shape: tuple[int, ...]  # theirs
    rows: int  # of our parameter
    turn: Turn  # theirs to ours
    back: Turn  # ours to theirs


def parts_of(config: DecoderConfig, style: str) -> Iterator[tuple[str, list[Part]]]:
    """Yield each parameter of a Decoder, and the tensors of a file that make it, one below the other.

    PAPER: none describes files; the order of rotary pairs is [5] Eq. 15 (neighbours) against code (halves).
    PAPER CONTEXT: [2] turned neighbouring features, as [5] has it. Hugging Face's port turns feature i with
        i + D / 2, which needs no strided reads, and so reorders the rows of q and k; so do [3] and [4].
        llama.cpp kept the order of [2] for its architecture "llama".
    INTUITION: The same orchestra, seated differently; every player must find the right chair.
    IMPLEMENTATION: Our names and shapes come from a model without memory (device meta), theirs from a
        table. GPT-2's code keeps matrices as (in, out), torch's Linear as (out, in). One matrix makes our
        q, k and v.
    WHY: With wrong seats every shape still fits and the model still talks, worse; only logits can tell.
    """
    family = family_of(config)
    table = MODULES["gguf" if style == "gguf" else "gpt2" if family == "gpt2" else "llama"]
    with torch.device("meta"):
        model = Decoder(config)
    fused = {
        name: rows for name, module in model.named_modules() for rows in getattr(module, "fused", {}).values()
    }
    for name, weight in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        prefix = ""
        if module.startswith("blocks."):
            _, index, module = module.split(".", 2)
            prefix = f"{table['blocks']}.{index}."
        theirs = table[module].split(" ")
        if style == "gguf" and family == "gpt2" and module == "attention.qkv":
            theirs = ["attn_qkv"]
        rows = fused[name.rpartition(".")[0].rpartition(".")[0]] if len(theirs) > 1 else (len(weight),)
        parts = []
        for i, (their, count) in enumerate(zip(theirs, rows, strict=True)):
            turn: Turn = _as_it_is
            back: Turn = _as_it_is
            shape = (count, *weight.shape[1:])
            if style == "hf" and family == "gpt2" and prefix and weight.dim() == 2:
                shape, turn, back = shape[::-1], torch.t, torch.t
            if style == "gguf" and family == "llama" and module == "attention.qkv" and i < 2:
                turn, back = _halves(config.head_width), _neighbours(config.head_width)
            parts.append(Part(f"{prefix}{their}.{leaf}", shape, count, turn, back))
        yield name, parts


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _halves(D: int) -> Turn:
    """Return what brings rows in which pairs are neighbours into the order in which they are D / 2 apart."""
    return lambda x: x.unflatten(0, (-1, D // 2, 2)).transpose(1, 2).reshape(x.shape)


def _neighbours(D: int) -> Turn:
    """Return the way back."""
    return lambda x: x.unflatten(0, (-1, 2, D // 2)).transpose(1, 2).reshape(x.shape)


# Hugging Face's config.json


def config_from_hf(facts: Mapping[str, Any]) -> DecoderConfig:
    """Return the shape that a config.json describes; ValueError for what a Decoder cannot be."""
    kind = facts.get("model_type")
    if kind not in (*FAMILIES, "mistral"):
        raise ValueError(f"model_type ({show(kind)}) must be one of {', '.join(FAMILIES)}, mistral")
    read = _Reader(facts)
    if kind == "gpt2":
        read.must("activation_function", "gelu_new", "gelu_pytorch_tanh", default="gelu_new")
        read.must("scale_attn_weights", True, default=True)
        read.must("scale_attn_by_inverse_layer_idx", False, default=False)
        return DecoderConfig.gpt2(
            vocab_size=read.size("vocab_size"),
            block_size=read.size("n_positions", 1024, MAX_POSITIONS),
            n_layer=read.size("n_layer"),
            n_head=read.size("n_head"),
            n_embd=read.size("n_embd"),
            mlp_hidden=read.size("n_inner", 0),
            norm_eps=read.number("layer_norm_epsilon", 1e-5),
            tied=read.switch("tie_word_embeddings", True),
        )
    read.must("hidden_act", "silu", default="silu")
    read.must("rope_scaling", None)
    rope = _Reader(read_object(facts.get("rope_parameters") or {}, "rope_parameters"))
    rope.must("rope_type", "default", default="default")
    rope.must("partial_rotary_factor", 1.0, default=1.0)
    positions = read.size("max_position_embeddings", most=MAX_POSITIONS)
    if (kind == "mistral" or read.switch("use_sliding_window", False)) and facts.get(
        "sliding_window"
    ) is not None:
        positions = min(positions, read.size("sliding_window"))  # so far the window shows everything
    bias = read.switch("attention_bias", False)
    read.must("mlp_bias", bias, default=bias if kind == "qwen3" else False)
    return DecoderConfig.llama(
        vocab_size=read.size("vocab_size"),
        block_size=positions,
        n_layer=read.size("num_hidden_layers"),
        n_head=read.size("num_attention_heads"),
        n_kv_head=read.size("num_key_value_heads", 0),
        n_embd=read.size("hidden_size"),
        head_dim=read.size("head_dim", 128 if kind == "qwen3" else 0),
        mlp_hidden=read.size("intermediate_size"),
        bias=bias,
        qk_norm=kind == "qwen3",
        tied=read.switch("tie_word_embeddings", False),
        rope_theta=rope.number("rope_theta", read.number("rope_theta", 10_000.0)),
        norm_eps=read.number("rms_norm_eps", 1e-6),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Return the content of a config.json that transformers, version 4 or 5, builds this shape from."""
    family = family_of(config)
    if family == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": config.vocab_size,
            "n_positions": config.block_size,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.mlp_width,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tied,
        }
    return {
        "architectures": ["Qwen3ForCausalLM" if family == "qwen3" else "LlamaForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied,
    }


# GGUF's facts


def config_from_gguf(facts: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    """Return the shape that a GGUF file describes; ValueError for what a Decoder cannot be."""
    kind = facts.get("general.architecture")
    if kind not in FAMILIES:
        raise ValueError(f"general.architecture ({show(kind)}) must be one of {', '.join(FAMILIES)}")
    read = _Reader(facts, f"{kind}.")
    if "token_embd.weight" not in shapes:
        raise ValueError(f"tensors ({len(shapes)}) must hold token_embd.weight")
    shape = DecoderConfig.gpt2 if kind == "gpt2" else DecoderConfig.llama
    config = shape(
        vocab_size=shapes["token_embd.weight"][0],
        block_size=read.size("context_length", most=MAX_POSITIONS),
        n_layer=read.size("block_count"),
        n_head=read.size("attention.head_count"),
        n_embd=read.size("embedding_length"),
        mlp_hidden=read.size("feed_forward_length"),
        tied="output.weight" not in shapes,
    )
    if kind == "gpt2":
        return replace(config, norm_eps=read.number("attention.layer_norm_epsilon", 1e-5))
    read.must("rope.scaling.type", None, "none")
    read.must("expert_count", None, 0)
    width = read.size(
        "attention.key_length", read.size("rope.dimension_count", config.n_embd // config.n_head)
    )
    read.must("attention.value_length", width, default=width)
    read.must("rope.dimension_count", width, default=width)
    return replace(
        config,
        n_kv_head=read.size("attention.head_count_kv", config.n_head),
        head_dim=width,
        bias="blk.0.attn_q.bias" in shapes,
        qk_norm=kind == "qwen3",
        rope_theta=read.number("rope.freq_base", 10_000.0),
        norm_eps=read.number("attention.layer_norm_rms_epsilon", 1e-5),
    )


def config_to_gguf(config: DecoderConfig) -> dict[str, Any]:
    """Return the facts from which llama.cpp builds this shape."""
    family = family_of(config)
    facts: dict[str, Any] = {
        "block_count": config.n_layer,
        "context_length": config.block_size,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.mlp_width,
        "attention.head_count": config.n_head,
    }
    if family == "gpt2":
        facts |= {"attention.layer_norm_epsilon": config.norm_eps}
    else:
        facts |= {
            "attention.head_count_kv": config.kv_heads,
            "attention.key_length": config.head_width,
            "attention.value_length": config.head_width,
            "attention.layer_norm_rms_epsilon": config.norm_eps,
            "rope.freq_base": config.rope_theta,
            "rope.dimension_count": config.head_width,
            "vocab_size": config.vocab_size,
        }
    return {"general.architecture": family} | {f"{family}.{name}": value for name, value in facts.items()}


class _Reader:
    """Facts that a stranger wrote, each checked as it is read."""

    def __init__(self, facts: Mapping[str, Any], prefix: str = "") -> None:
        self.facts, self.prefix = facts, prefix

    def _get(self, name: str, default: Any) -> Any:
        value = self.facts.get(self.prefix + name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        value = self._get(name, default)
        if type(value) is not int or not (value == default or 0 < value <= most):
            raise ValueError(f"{self.prefix}{name} ({show(value)}) must be a whole number from 1 to {most}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float):
            raise ValueError(f"{self.prefix}{name} ({show(value)}) must be a number")
        return float(value)

    def switch(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise ValueError(f"{self.prefix}{name} ({show(value)}) must be true or false")
        return value

    def must(self, name: str, *allowed: Any, default: Any = None) -> None:
        value = self._get(name, default)
        if value not in allowed:
            words = " or ".join(str(each) for each in allowed)
            raise ValueError(
                f"{self.prefix}{name} ({show(value)}) must be {words}: the Decoder has nothing else"
            )
