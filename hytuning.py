"""The HyTuning method: a few supervised traces and many unlabeled queries share one update.

RD (reasoning distillation) is maximum likelihood on the supervised traces. RLIF (reinforcement
learning from internal feedback) samples G rollouts, or responses, of the policy pi to each
unlabeled query and rewards those of which the policy itself is certain. For rollout j, with i~j
running over the rollouts to the same query that give the same answer:

    c_j = mean over its tokens of KL(U || pi)                    self-certainty; U is uniform
    w_j = min(max(PRG_j, 0) / a, 1)^2                            weight; 0 without an answer
    r_j = (1/G) sum_{i~j} w_i c_i                                reward
    e_j = (1/G) sum_{i~j} w_i                                    earned share: weighted votes
    A_j = (r_j - mean of the group) / (std of the group + 1e-4)  advantage

    lambda_q = mean of e over the group of query q
    lambda   = mean of lambda_q over all queries
    A_j      is multiplied by lambda_q / lambda
    L        = (1 - lambda) L_RD + lambda L_RLIF                 loss

So a query counts in RLIF in proportion to lambda_q, and RD counts more while the rollouts disagree
or their PRG is below that of the traces.

PRG (see prg.py) measures how early the reasoning supports its answer, and whether it keeps doing
so. The anchor a is the mean PRG of the supervised traces. Since traces may also be wrong,
each of them is weighted in L_RD by v = w / (mean of w over the traces).

Only the log-probabilities of tokens in the two losses have a gradient; w, v, c, r, e, A and lambda
are constants. This file is self-contained; copy it freely. Read prg.py next.

SPDX-License-Identifier: MIT
"""
import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


# -----------------------------------------------------------------------------
# log-probability and self-certainty of a token

def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log pi(target) [...], in nats, from logits [..., V] and token ids targets [...]."""
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)


def self_certainty(logits: Tensor) -> Tensor:
    """Return KL(U || pi) = -log V - (1/V) sum_v log pi(v) [...], in nats, from logits [..., V].

    U is the uniform distribution over the vocabulary, so the self-certainty of a uniform pi is 0.
    The self-certainty c of a rollout is the mean over its tokens (Intuitor, arXiv 2505.19590).
    """
    return logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1])


# -----------------------------------------------------------------------------
# weights, pooling, advantages

def adaptive_weights(prg: Tensor, anchor: float) -> Tensor:
    """Return w_j = min(max(PRG_j, 0) / a, 1)^2, [N] in [0, 1].

    prg [N] is the PRG of each rollout and the anchor a the mean PRG of the supervised traces. A
    rollout that reasons as well as the traces do has weight 1, and one with half of their PRG has
    1/4. If a is 0 or less, every rollout with a positive PRG has weight 1.
    """
    return (prg / max(anchor, 1e-6)).clamp(0, 1).square().detach()


def pool_by_answer(values: Tensor, answers: Tensor, group_size: int) -> Tensor:
    """Return, for each rollout, (1/G) sum of values over the rollouts of its group with its answer.

    values [N] and answers [N] (integers; equal numbers within a group mean equal answers) list the
    groups one after the other; the result is [N]. If all values are 1, it is the fraction of the
    group that gives the answer (TTRL, arXiv 2504.16084, rewards the majority answer). Pooling helps
    because the PRG of one rollout is weak evidence, while several with one answer are stronger.
    """
    x = values.detach().view(-1, group_size)  # [Q, G]
    y = answers.view(-1, group_size)  # [Q, G]
    same = y[:, :, None] == y[:, None, :]  # [Q, G, G]
    return (same * x[:, None, :]).mean(-1).flatten()


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Return A_j = (r_j - mean) / (std + 1e-4), [N], in each group of consecutive rewards [N].

    The formula is GRPO's (arXiv 2402.03300), with 1e-4 added.
    """
    r = rewards.detach().view(-1, group_size)
    r = r - r[:, :1]  # Equal rewards then have advantages of exactly 0, despite rounding.
    centered = r - r.mean(1, keepdim=True)
    std = centered.square().mean(1, keepdim=True).sqrt()
    return (centered / (std + 1e-4)).flatten()


# -----------------------------------------------------------------------------
# the methods

def learning_signals(method: str, certainty: Tensor, prg: Tensor | None, answers: Tensor,
                     group_size: int, anchor: float | None = None) -> tuple[Tensor, Tensor]:
    """Return the advantages A [N] and the earned shares e [N] of the rollouts of a training step.

    The groups of `group_size` rollouts follow one another. certainty [N] is c. answers [N] are
    integers: equal where two rollouts of a group give the same answer, -1 where a rollout has no
    answer. Only hytuning uses prg [N], the PRG of the rollouts, and the anchor a. Raises ValueError
    for an unknown method. Then call `weigh_queries`.
    """
    c = certainty
    fixed = {"rd": 0.0, "static": 0.5, "rlif": 1.0}  # lambda of the methods that do not compute it
    if method in fixed:
        # Each rollout is rewarded by its own certainty; in `rd`, lambda = 0 leaves it out.
        r = c
        e = torch.full_like(c, fixed[method])
    elif method in ("votes", "hytuning"):
        # The certainty of all rollouts with the same answer is pooled. In `votes`, each rollout has
        # one vote; in `hytuning`, its vote is multiplied by its weight.
        w = (answers >= 0).to(c.dtype)
        if method == "hytuning":
            w = w * adaptive_weights(prg, anchor)
        r = pool_by_answer(w * c, answers, group_size)
        e = pool_by_answer(w, answers, group_size)
    else:
        raise ValueError(f"there is no method {method!r}: use rd, rlif, static, votes or hytuning")
    return group_advantages(r, group_size), e


def weigh_queries(advantages: Tensor, earned: Tensor, lam: float, group_size: int) -> Tensor:
    """Return A_j lambda_q / lambda [N], where lambda_q is the mean of the earned shares of a group.

    lam is lambda, the mean of the earned shares over all processes. Advantages are divided by the
    standard deviation of their group, so without this factor all queries would count the same.
    """
    lam_q = earned.view(-1, group_size).mean(1).repeat_interleave(group_size)
    return advantages * lam_q / max(lam, 1e-9)


def trace_weights(method: str, prg: Tensor, anchor: float) -> Tensor:
    """Return the weights v [n] of the supervised traces in L_RD (mean 1), from their PRG [n]."""
    w = adaptive_weights(prg, anchor)
    if method != "hytuning" or w.sum() == 0:
        return torch.ones_like(prg)
    return w / w.mean()


# -----------------------------------------------------------------------------
# losses

def distillation_loss(logprobs: Tensor, mask: Tensor, tokens) -> Tensor:
    """Return L_RD = -sum(mask * log pi(token)) / tokens, a mean negative log-likelihood in nats.

    logprobs [B, T] are those of the supervised traces. mask [B, T] is 1 (or the weight v of the
    trace) for response tokens and 0 for padding. The divisor `tokens` is the number of response
    tokens in the whole batch, of which this may be a part.
    """
    return -(logprobs * mask).sum() / tokens


def rlif_loss(logprobs: Tensor, mask: Tensor, advantages: Tensor, rollouts) -> Tensor:
    """Return L_RLIF = -(1/rollouts) sum_j A_j mean_t log pi(token_jt), a policy-gradient loss.

    logprobs [B, T] are those of the rollouts, mask [B, T] is 1 for response tokens and 0 for
    padding, and advantages are [B]. The divisor `rollouts` is the number of rollouts in the whole
    batch, of which these B may be a part.

    With one update for each batch of rollouts, the gradient is that of GRPO (arXiv 2402.03300): the
    ratio pi / pi_old is then 1, and clipping has no effect.
    """
    means = (logprobs * mask).sum(1) / mask.sum(1).clamp(min=1)  # [B]
    return -(advantages.detach() * means).sum() / rollouts


def hytuning_loss(rd: Tensor, rlif: Tensor, lam) -> Tensor:
    """Return L = (1 - lambda) L_RD + lambda L_RLIF."""
    return (1 - lam) * rd + lam * rlif


# -----------------------------------------------------------------------------
# log-probabilities without all logits in memory

def head_logprobs(hidden: Tensor, head, targets: Tensor) -> Tensor:
    """Return log pi(target) [N], in nats, from hidden states [N, D] and targets [N].

    head is any callable [n, D] -> [n, V]. It is applied to one chunk of tokens after another, and
    the backward pass computes the logits of a chunk again. With a vocabulary of 150,000 the logits
    of a whole batch would take most of the memory.
    """
    def chunk_logprobs(h, t):
        return token_logprobs(head(h), t)

    chunk = 2048 if hidden.is_cuda else 512
    pairs = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(chunk_logprobs, h, t, use_reentrant=False) for h, t in pairs])
