r"""QuantizedCache: the past in 8, 4 or 2 bits, the newest tokens in full.

PAPERS
  [1] KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, Liu et al., 2024, arXiv:2402.02750

SYMBOLS (code = paper)                              SHAPES
  bits     = B  of a code                             n  groups of tokens in codes
  group    = G  tokens of a group                     T  new tokens
  residual = R  newest tokens, kept in full           B, H, Hkv, D  as in mixing.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase3_core_inference.project7_kv_cache.mixing import mix_causally

BITS = (8, 4, 2)


@dataclass(frozen=True)
class Codes:
    """Numbers rounded to 2^bits levels between the least and the greatest of their group.

    PAPER: [1] Sec. 2: round to nearest, with zero = min and scale = (max - min) / (2^B - 1).
    PAPER CONTEXT: Weights were stored like this before; a cache has to be quantized while the model writes,
        so the way must be quick and need no calibration.
    INTUITION: A ruler for each small group, laid from its least to its greatest number.
    IMPLEMENTATION: Several codes share a byte. Scale and zero take 16 bits (64 in a float64 model) and are
        rounded before the codes are chosen, so that this rounding does no harm of its own.
    WHY: No number is off by more than half a scale, and what scale and zero lost; a test holds it to that.
    """

    packed: Tensor  # (..., D * bits / 8) uint8
    scale: Tensor  # one number for each group, broadcasts over it
    zero: Tensor
    bits: int

    @classmethod
    def of(cls, x: Tensor, bits: int, dim: int) -> "Codes":
        """Return the codes of (..., D); all numbers along `dim` are a group."""
        exact = torch.promote_types(x.dtype, torch.float32)
        kept = torch.float64 if x.dtype == torch.float64 else torch.float16
        low, high = x.amin(dim, keepdim=True).to(exact), x.amax(dim, keepdim=True).to(exact)
        zero, scale = low.to(kept), ((high - low) / (2**bits - 1)).to(kept)
        steps = (x - zero.to(exact)) / scale.to(exact).clamp(
            min=torch.finfo(exact).tiny
        )  # scale 0: all alike
        codes = steps.round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        return cls(pack(codes, bits), scale, zero, bits)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """Return (..., D), what the codes stand for."""
        exact = torch.promote_types(dtype, torch.float32)
        codes = unpack(self.packed, self.bits).to(exact)
        return codes.mul_(self.scale.to(exact)).add_(self.zero.to(exact)).to(dtype)

    def followed_by(self, other: "Codes") -> "Codes":
        """Return the codes of both, joined at the dimension of groups."""
        packed = torch.cat([self.packed, other.packed], dim=2)
        scale, zero = torch.cat([self.scale, other.scale], dim=2), torch.cat([self.zero, other.zero], dim=2)
        return Codes(packed, scale, zero, self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return self.packed.nbytes + self.scale.nbytes + self.zero.nbytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes (..., D) of so many bits in bytes, (..., D * bits / 8)."""
    first, *parts = codes.unflatten(-1, (8 // bits, -1)).unbind(-2)
    for number, part in enumerate(parts, 1):
        first = first | part << bits * number
    return first


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the codes that `pack` packed."""
    parts = [packed >> bits * number & 2**bits - 1 for number in range(8 // bits)]
    return torch.cat(parts, dim=-1)


class QuantizedCache:
    """Remember keys and values in few bits: keys by channel, values by token, and the newest in full.

    PAPER: [1] Sec. 3: what is quantized along which dimension, and the residual in full.
    PAPER CONTEXT: Cutting every token's numbers to a few bits ruins keys: a few of their channels are ten
        times as large as the others, in all tokens ([1] Sec. 3), and set the scale for all. Along a channel
        numbers are alike. Values have no such channels, and attention weighs them token by token.
    INTUITION: In a table of heights and shoe sizes, round each column by its own ruler.
    IMPLEMENTATION: A channel's group is `group` tokens, so keys wait until so many have left the residual.
        A token sees the same codes whether it comes alone or in a prompt: a prompt is taken in parts, and
        between them a group goes. ([1] quantizes a prompt after having mixed it in full.) One scale for a
        token's values in a head, where [1] has groups of 32 channels. Codes become numbers before mixing.
    WHY: 4 bits with scales take a third of bf16's memory. Tests hold the logits to attention over keys and
        values that were rounded one by one, and the error of attention to the bound derived in the README.
    """

    def __init__(self, config: DecoderConfig, bits: int = 8, group: int = 32, residual: int = 32) -> None:
        if bits not in BITS:
            raise ValueError(f"bits ({bits}) must be one of {', '.join(map(str, BITS))}")
        if config.head_width * bits % 8:
            rule = f"must be divisible by {8 // bits}: so many codes share a byte"
            raise ValueError(f"head_dim ({config.head_width}) {rule}")
        for name, value in (("group", group), ("residual", residual)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        self.bits, self.group, self.residual = bits, group, residual
        self.length = 0  # tokens remembered
        self.codes: dict[int, tuple[Codes, Codes]] = {}  # of each layer, (B, Hkv, n, group, ...)
        self.newest: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # of each layer, (B, Hkv, up to residual + group, D)

    def positions(self, tokens: Tensor) -> Tensor:
        """Return where the new tokens stand, (T,)."""
        self.length += tokens.shape[1]
        return torch.arange(self.length - tokens.shape[1], self.length, device=tokens.device)

    def in_codes(self, length: int) -> int:
        """Return how many of `length` tokens the last of them finds in codes."""
        return max(0, length - self.residual) // self.group * self.group

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Remember k and v (B, Hkv, T, D) and mix for q (B, H, T, D)."""
        end = self.length - q.shape[2]
        mixed = []
        while end < self.length:
            begin = end  # the tokens from here to the one for which the next group goes see the same past
            end = min(self.length, self.in_codes(begin + 1) + self.group + self.residual - 1)
            part = slice(begin - self.length, end - self.length or None)
            past = self._remember(layer, k[:, :, part], v[:, :, part], end)
            mixed.append(mix_causally(q[:, :, part], *past))
        return torch.cat(mixed, dim=2)

    def _remember(self, layer: int, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Add keys and values of the newest of `length` tokens; return all, as the last of them sees them."""
        newest, codes = [k, v], self.codes.get(layer)
        if layer in self.newest:
            newest = [torch.cat(pair, dim=2) for pair in zip(self.newest[layer], newest, strict=True)]
        done = codes[0].packed.shape[2] * self.group if codes else 0
        if (due := self.in_codes(length) - done) > 0:
            groups = [x[:, :, :due].unflatten(2, (-1, self.group)) for x in newest]  # (B, Hkv, n, group, D)
            made = Codes.of(groups[0], self.bits, dim=-2), Codes.of(groups[1], self.bits, dim=-1)
            codes = (codes[0].followed_by(made[0]), codes[1].followed_by(made[1])) if codes else made
            self.codes[layer] = codes
            newest = [x[:, :, due:] for x in newest]
        self.newest[layer] = newest[0], newest[1]
        if not codes:
            return newest[0], newest[1]
        keys, values = (
            torch.cat([part.numbers(k.dtype).flatten(2, 3), full], dim=2)
            for part, full in zip(codes, newest, strict=True)
        )
        return keys, values
