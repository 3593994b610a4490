r"""How far a policy has moved from its reference: three estimators, and what their gradients really do.

PAPERS
  [1] Approximating KL Divergence, Schulman, 2020, joschu.net/blog/kl-approx.html
  [2] DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, Shao et al., 2024,
      arXiv:2402.03300 (GRPO)
  [3] On a few pitfalls in KL divergence gradient estimation for RL, Tang & Munos, 2025, arXiv:2506.09477
  [4] Rethinking KL Regularization in RLHF: From Value Estimation to Gradient Optimization, Liu et al., 2025,
      arXiv:2510.01555

SYMBOLS (code = [1])
  logprobs = log q    of drawn tokens, under the policy that drew them
  reference = log p   of the same tokens, under the reference
  KL(q, p)            the expectation under q of log q - log p
"""

from torch import Tensor


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: str = "k3") -> Tensor:
    r"""Return an estimate of KL(policy, reference) for each drawn token, any shape, in nats.

    PAPER: k1, k2 and k3 are [1]'s; k3 as GRPO's penalty, [2] Eq. 4; what their gradients are, [3] and [4].
    PAPER CONTEXT: The exact KL is a sum over the vocabulary at every place. The drawn token alone gives an
        estimate: its log-ratio, k1, has the right mean, but half of the time the wrong sign.
    INTUITION: k1 asks only how much likelier this token is to us. k3 adds p/q - 1, whose mean is 0 and which
        is large where k1 is negative: the mean stays, the scatter goes.
    IMPLEMENTATION: With d = log q - log p: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. k1 and k3 have the
        mean KL, k2 nearly where the two are near; k2 and k3 are never below 0.
    WHY: A penalty added to the loss acts by its gradient, which is another matter ([3]). With tokens drawn
        from the policy itself, the mean gradient of k1 is 0: it penalizes nothing. That of k2 is the
        gradient of KL(q, p), that of k3 the gradient of KL(p, q), the other way round. A test sums all three
        over a whole vocabulary. As a reward, which has no gradient of its own, k1 is the right one ([4]).
    """
    gap = logprobs - reference
    if kind == "k1":
        return gap
    if kind == "k2":
        return gap.square() / 2
    if kind == "k3":
        return (-gap).expm1() + gap
    raise ValueError(f"kl_estimator ({kind}) must be k1, k2 or k3")
