r"""Prefix tuning and prompt tuning: the model stays as it is, and first reads something that was trained.

PAPERS
  [1] Prefix-Tuning: Optimizing Continuous Prompts for Generation, Li & Liang, 2021, arXiv:2101.00190
  [2] The Power of Scale for Parameter-Efficient Prompt Tuning, Lester, Al-Rfou & Constant, 2021,
      arXiv:2104.08691

SYMBOLS (code = paper)
  length        = |P_idx| [1], p [2]    virtual tokens
  small, expand = P'_theta, MLP [1]     a smaller matrix, and the network that makes the prefix of it
  prompt        = P_e [2]               what stands in the place of embeddings

SHAPES
  B  sequences    T  tokens    P  virtual tokens    C  n_embd    L  layers    Hkv  key heads    D  head_dim
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1_foundation.project1_minimal_gpt.attention import AttentionBackend
from phase1_foundation.project3_pretrain.cpu_kernels import Linear
from phase1_foundation.project3_pretrain.generate import GrowingCache
from phase1_foundation.project3_pretrain.model import Decoder


class _Tuned(nn.Module):
    """A frozen Decoder behind `length` virtual tokens, with the Decoder's interface."""

    def __init__(self, model: Decoder, length: int) -> None:
        super().__init__()
        if not 1 <= length < model.config.block_size:
            raise ValueError(
                f"length ({length}) must be at least 1 and below block_size ({model.config.block_size})"
            )
        self.model, self.length = model.requires_grad_(False), length
        self.config = replace(model.config, block_size=model.config.block_size - length)

    @property
    def head(self) -> Linear:
        """The Decoder's own, which the loss asks for."""
        return self.model.head

    def forward(self, tokens: Tensor, backend: AttentionBackend | None = None) -> Tensor:
        """Map token ids (B, T) to logits (B, T, V)."""
        return self.head(self.hidden(tokens, backend))

    def hidden(self, tokens: Tensor, backend: AttentionBackend | None = None) -> Tensor:
        """Map token ids (B, T) to what the head turns into logits, (B, T, C).

        A backend must be a GrowingCache; an empty one is filled with the virtual tokens first.
        """
        cache = GrowingCache() if backend is None else backend
        if not isinstance(cache, GrowingCache):
            rule = "must be None or a GrowingCache: virtual tokens begin a row, and rows are not packed"
            raise ValueError(f"backend ({type(cache).__name__}) {rule}")
        if cache.length + tokens.shape[1] > self.model.config.block_size - self.length * (cache.length == 0):
            raise ValueError(
                f"tokens ({tokens.shape[1]}) must be at most block_size ({self.config.block_size})"
            )
        return self.model.hidden(tokens, cache) if cache.length else self.begin(tokens, cache)

    def begin(self, tokens: Tensor, cache: GrowingCache) -> Tensor:
        """Do the same for the first tokens of a sequence."""
        raise NotImplementedError


class PrefixTuned(_Tuned):
    """Train keys and values, in every layer, of tokens that were never written.

    PAPER: [1] Sec. 4.2; made by a network, Sec. 4.3; begun at real words, Sec. 7.4.
    PAPER CONTEXT: A prompt steers a model, but finding the words is guesswork over a discrete set. [1] looks
        for activations instead, by gradient: 0.1% of the weights per task, and one model for all tasks.
    INTUITION: The model remembers having read something that no text could have said.
    IMPLEMENTATION: What attention sees of a past token is its key and its value, so a prefix is a cache
        that is filled before the first token. With `hidden` its numbers come out of a smaller matrix by a
        network with one hidden layer, as in [1]; `fold` then drops the network. `words` begins at what the
        model itself remembers of these tokens. The text stands at positions P, P + 1, ..., as after a cache.
    WHY: [1] found the direct form unstable in learning rate and start. Begun at words, the tuned model
        equals the model that has read those words; logits equal peft's (tests).
    """

    def __init__(
        self, model: Decoder, length: int, words: Sequence[int] | None = None, hidden: int = 0
    ) -> None:
        """Put a prefix before a model: trained by a network of width `hidden`, or (0) directly."""
        super().__init__(model, length)
        config, weight = model.config, model.head.weight
        self.shape = (length, config.n_layer, 2, config.kv_heads, config.head_width)
        numbers = torch.Size(self.shape[1:]).numel()
        self.expand: nn.Module = nn.Identity()
        if hidden:
            if words is not None:
                raise ValueError(
                    f"hidden ({hidden}) must be 0 to begin at words, for which no network is known"
                )
            self.expand = nn.Sequential(
                nn.Linear(config.n_embd, hidden), nn.Tanh(), nn.Linear(hidden, numbers)
            )
        self.small = nn.Parameter(torch.randn(length, config.n_embd if hidden else numbers))
        self.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        if words is not None:
            self._begin_at(_repeat(words, length, config.vocab_size))

    @torch.no_grad()
    def _begin_at(self, words: Tensor) -> None:
        """Make the prefix what the model remembers of (P,) tokens."""
        cache = GrowingCache()
        self.model.hidden(words[None].to(self.small.device), cache)
        past = [torch.stack(cache.past[layer], dim=1)[0] for layer in range(self.model.config.n_layer)]
        whole = torch.stack(past)  # (L, 2, Hkv, P, D)
        self.small.copy_(whole.permute(3, 0, 1, 2, 4).flatten(1))

    def fold(self) -> None:
        """Keep the prefix and drop the network that made it."""
        self.small, self.expand = nn.Parameter(self.expand(self.small).detach()), nn.Identity()

    def begin(self, tokens: Tensor, cache: GrowingCache) -> Tensor:
        prefix = self.expand(self.small).view(self.shape).permute(1, 2, 3, 0, 4)  # (L, 2, Hkv, P, D)
        rows = prefix[:, :, None].expand(-1, -1, len(tokens), -1, -1, -1)  # (L, 2, B, Hkv, P, D)
        cache.length = self.length
        cache.past = {layer: (keys, values) for layer, (keys, values) in enumerate(rows)}
        return self.model.hidden(tokens, cache)


class PromptTuned(_Tuned):
    """Train vectors that stand before the text in the place of embeddings.

    PAPER: [2] Sec. 2; length and initialization, Sec. 2.1.
    PAPER CONTEXT: [2] simplifies [1]: virtual tokens at the input only, without a network. With T5 of 11
        billion weights that reaches full fine-tuning; with small models it stays well behind (Fig. 1).
    INTUITION: New words for a language that the model already speaks.
    IMPLEMENTATION: Rows are padded by P tokens, and a hook on the embedding puts the prompt there, so the
        model's own code and the cache see an ordinary sequence. Begun at the embeddings of `words`
        (repeated up to P), or of random tokens, as "sampled vocabulary" in [2].
    WHY: One vector per virtual token: 0.01% of SmolLM2 for 20 of them. Begun at words, the tuned model equals
        the model with these words before the text; logits equal peft's (tests).
    """

    def __init__(self, model: Decoder, length: int, words: Sequence[int] | None = None) -> None:
        """Put a prompt before a model."""
        super().__init__(model, length)
        V = model.config.vocab_size
        begin = _repeat(torch.randint(V, (length,)).tolist() if words is None else words, length, V)
        table = model.token_embedding.weight.detach()
        exact = torch.promote_types(table.dtype, torch.float32)
        self.prompt = nn.Parameter(table[begin.to(table.device)].to(exact))  # (P, C)

    def begin(self, tokens: Tensor, cache: GrowingCache) -> Tensor:
        prompt, P = self.prompt.expand(len(tokens), -1, -1), self.length

        def put_first(_: nn.Module, __: tuple[Tensor], words: Tensor) -> Tensor:
            return torch.cat([prompt.to(words.dtype), words[:, P:]], dim=1)

        with self.model.token_embedding.register_forward_hook(put_first):
            return self.model.hidden(F.pad(tokens, (P, 0)), cache)[:, P:]


def _repeat(words: Sequence[int], length: int, vocab_size: int) -> Tensor:
    """Return tokens over and over, (length,). Raises ValueError for none, or one that is unknown."""
    if not words:
        raise ValueError("words () must hold at least one token")
    if bad := next((word for word in words if not 0 <= word < vocab_size), None):
        raise ValueError(f"words ({bad}) must be tokens of the model, below {vocab_size}")
    return torch.tensor(list(words)).repeat(-(-length // len(words)))[:length]
