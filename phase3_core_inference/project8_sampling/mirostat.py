r"""Mirostat: instead of cutting at a fixed place, cut so that the text stays as surprising as is wished.

PAPERS
  [1] Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity, Basu et al., 2020,
      arXiv:2007.14966

SYMBOLS (code = paper)
  tau = τ    the surprise that is wished for, in bits per token
  mu  = μ    the surprise that is allowed at present; starts at 2 τ
  rate = η   how fast mu follows
  s          exponent of Zipf's law: the i-th likeliest token has odds in proportion to i^-s
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from phase3_core_inference.project8_sampling.truncation import Ranked

Array = np.ndarray[Any, Any]
ZIPF_TOKENS = 100  # likeliest tokens from which s is estimated (m in [1])


def mirostat(ranked: "Ranked", settings: Array) -> Array:
    r"""Keep tokens (R, K) so that the surprise of what is drawn stays near tau.

    PAPER: version 1, [1] Alg. 1; version 2 is its simpler form in llama.cpp, which refers to [1] too.
    PAPER CONTEXT: With a fixed top-k or top-p the surprise of a text drifts: small cuts fall into a loop
        (the boredom trap), large ones lose the thread (the confusion trap).
    INTUITION: A thermostat. Was the last token duller than wished, open the window a little.
    IMPLEMENTATION: `settings` (R, 3): version, mu, vocabulary size. Version 2 cuts what is more surprising
        than mu. Version 1 knows of Zipf's law, estimates its exponent s from the likeliest 100 tokens, and
        computes the k at which the surprise expected of top-k would be mu.
    WHY: A test draws from Zipf's law itself and finds the mean surprise at tau, which no fixed k gives.
    """
    version, mu, vocab_size = (settings[:, i : i + 1] for i in range(3))
    K = ranked.values.shape[1]
    k = zipf_k(zipf_exponent(ranked.values), mu, vocab_size)
    keep = np.where(version == 1, np.arange(K) < k, ranked.surprise() <= mu * math.log(2))
    keep[:, 0] = True  # there must always be one
    if ZIPF_TOKENS > K:  # too few are ranked to estimate s: keeping the last of them says so
        keep |= version == 1
    return keep


def zipf_exponent(values: Array) -> Array:
    """Return the exponent s (R, 1) that fits the falling logits (R, K) of the likeliest tokens best."""
    values = values[:, :ZIPF_TOKENS]
    i = np.arange(1, values.shape[1])
    t = np.log((i + 1) / i)
    usable = np.isfinite(values[:, 1:])
    b = np.subtract(values[:, :-1], values[:, 1:], where=usable, out=np.zeros(usable.shape))
    # b = ln(p_i / p_i+1), in which the normalizer drops out
    return (t * b).sum(axis=1, keepdims=True) / (t * t * usable).sum(axis=1, keepdims=True).clip(min=1e-12)


def zipf_k(s: Array, mu: Array, vocab_size: Array) -> Array:
    """Return the k (R, 1), at least 1, at which top-k of Zipf's law is as surprising as mu bits."""
    s = np.where(np.abs(s - 1) < 1e-6, s + 1e-6, s).clip(min=1e-3)  # the formula has a gap at 1
    e = s - 1
    log_k = (np.log(e / (1 - vocab_size**-e)) + mu * math.log(2)) / s
    return np.exp(log_k.clip(0, np.log(vocab_size))).round()


def next_mu(mu: float, tau: float, rate: float, surprise: float) -> float:
    """Return the allowed surprise after a token that had `surprise` bits before anything was cut."""
    return mu - rate * (surprise - tau)
