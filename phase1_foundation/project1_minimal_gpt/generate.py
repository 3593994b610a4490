"""Let the trained GPT write: uv run python phase1_foundation/project1_minimal_gpt/generate.py --interactive

PAPERS
  [1] Hierarchical Neural Story Generation, Fan, Lewis & Dauphin, 2018, arXiv:1805.04833 (top-k)
  [2] The Curious Case of Neural Text Degeneration, Holtzman et al., 2019, arXiv:1904.09751 (top-p)

SHAPES
  V  vocab_size
"""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoints import load_checkpoint, load_weights
from common.device import pick_device
from common.script import ask, one_line, script
from phase1_foundation.project1_minimal_gpt.config import TRAIN_COMMAND, GenerateConfig, GPTConfig
from phase1_foundation.project1_minimal_gpt.model import GPT
from phase1_foundation.project1_minimal_gpt.tokenizer import Tokenizer, from_dict


def next_token_odds(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the distribution (V,) from which the next token is drawn.

    PAPER: top-k, [1] Sec. 5.4; top-p (nucleus), [2] Sec. 3.1, Eq. 2 and 3; temperature, [2] Sec. 3.3, Eq. 4.
    PAPER CONTEXT: Always taking the likeliest token loops ([2] Fig. 1); drawing from all of them lets the
        many tokens of nearly no chance add up to a real one. Both papers cut that tail.
    INTUITION: Temperature says how bold, top-k and top-p how far down the list of candidates it may go.
    IMPLEMENTATION: Temperature first, then top-k, then top-p on what is left, as in Hugging Face's order.
        Top-p keeps a token while the odds before it are below p, so at least one stays. Temperature 0 is
        the argmax.
    WHY: Tests check which tokens can be drawn, exactly. Project 8 is about everything else one can do here.
    """
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    logits = logits.float() / temperature
    if top_k is not None and top_k < len(logits):
        logits = torch.full_like(logits, float("-inf")).scatter(
            0, (kept := logits.topk(top_k)).indices, kept.values
        )
    odds = logits.softmax(dim=0)
    if top_p is not None:
        ranked, order = odds.sort(descending=True, stable=True)
        odds[order[ranked.cumsum(dim=0) - ranked >= top_p]] = 0
        odds /= odds.sum()
    return odds


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield new token ids one by one; the same seed gives the same ids, whatever else draws random numbers.

    Once the text is longer than block_size, the model sees its last block_size tokens. Every step computes
    the whole context again: what a KV cache saves is project 7's subject. Raises ValueError for an empty or
    too long prompt.
    """
    block_size, device = model.config.block_size, next(model.parameters()).device
    if not 1 <= len(prompt) <= block_size:
        raise ValueError(
            f"prompt ({len(prompt)} tokens) must have at least 1 and at most block_size ({block_size}) tokens"
        )
    draw = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prompt], device=device)  # (1, T)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits = model(ids[:, -block_size:])[0, -1]  # (V,)
            odds = next_token_odds(logits.cpu(), temperature, top_k, top_p)
            token = int(torch.multinomial(odds, 1, generator=draw))
            yield token
            ids = torch.cat([ids, torch.tensor([[token]], device=device)], dim=1)
    finally:
        model.train(was_training)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of ids as soon as its characters are whole.

    A character's bytes may be several tokens.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


def load_gpt(path: Path, device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer]:
    """Return the model and tokenizer of a checkpoint.

    Raises FileNotFoundError or ValueError with one line.
    """
    checkpoint = load_checkpoint(path, TRAIN_COMMAND, needs=("config", "tokenizer", "model_state_dict"))
    try:
        config = GPTConfig(**checkpoint["config"])
        config.validate_config()
    except TypeError as error:
        raise ValueError(f"checkpoint ({path}) must be of this project's GPT: {error}") from error
    model = GPT(config).to(device)
    load_weights(model, checkpoint["model_state_dict"], path)
    return model.eval(), from_dict(checkpoint["tokenizer"])


def run(config: GenerateConfig) -> list[str]:
    """Write `num_samples` texts after the prompt, printing as they come; return them, prompts included."""
    model, tokenizer = load_gpt(config.checkpoint, pick_device(config.device))
    if not config.interactive:
        return write(model, tokenizer, config.prompt, config)
    texts = []
    for prompt in ask("text> "):
        try:
            texts += write(model, tokenizer, prompt, config)
        except ValueError as error:  # an unknown character should not end the conversation
            print(f"error: {one_line(error)}")
    return texts


def write(model: GPT, tokenizer: Tokenizer, prompt: str, config: GenerateConfig) -> list[str]:
    """Print and return the samples after one prompt."""
    texts = []
    for sample in range(config.num_samples):
        if config.num_samples > 1:
            print(f"--- sample {sample + 1} of {config.num_samples}, seed {config.seed + sample}")
        how = (config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.seed + sample)
        ids = generate(model, tokenizer.encode(prompt), *how)
        pieces: list[str] = []
        for piece in stream_text(tokenizer, ids):
            pieces.append(piece if pieces else prompt + piece)
            print(pieces[-1], end="", flush=True)
        print()
        texts.append("".join(pieces))
    return texts


@script
def main() -> None:
    """Parse and write."""
    run(GenerateConfig.from_cli())


if __name__ == "__main__":
    main()
