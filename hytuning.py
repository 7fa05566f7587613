"""The HyTuning method: a few supervised traces and many unlabeled queries share one update.

RD (reasoning distillation) is maximum likelihood on the supervised traces. RLIF (reinforcement
learning from internal feedback) samples G rollouts, or responses, of the policy pi to each
unlabeled query and rewards those of which the policy itself is certain. For rollout j, with i~j
running over the rollouts to the same query that give the same answer:

    c_j = mean over its tokens of KL(U || pi)                    self-certainty; U is uniform
    w_j = 2 sigmoid(min((PRG_j - a) / max(a, 0.05), 0) / tau)    weight; tau makes it softer
    r_j = (1/G) sum_{i~j} w_i c_i                                reward
    e_j = (1/G) sum_{i~j} w_i                                    earned share: weighted votes
    A_j = (r_j - mean of the group) / std of the group           advantage

    lambda_q = mean of e over the group of query q               share of RLIF for this query
    lambda   = mean of lambda_q over all queries                 share of RLIF in all
    A_j      is multiplied by lambda_q / lambda
    L        = (1 - lambda) L_RD + lambda L_RLIF                 loss

Each query counts for RLIF as much as its rollouts have earned; what is left goes to RD.

PRG (see prg.py) measures how far the reasoning earned the answer, and the anchor a is the mean PRG
of the supervised traces. The traces are weighted in the same way, since they may also be wrong:
in L_RD each of them counts v = w / (mean w of the traces).

Only the log-probabilities of tokens in the two losses have a gradient; w, v, c, r, e, A and lambda
are constants. This file is self-contained; copy it freely. Next to read: prg.py.

SPDX-License-Identifier: MIT
"""
import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


# -----------------------------------------------------------------------------
# what the logits of a token tell us

def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log pi(target) [...], in nats, from logits [..., V] and token ids targets [...]."""
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)


def self_certainty(logits: Tensor) -> Tensor:
    """KL(U || pi) = -log V - (1/V) sum_v log pi(v), in nats, [...] from logits [..., V].

    U is the uniform distribution over the vocabulary, so the self-certainty of a uniform pi is 0.
    The self-certainty c of a rollout is the mean over its tokens. Intuitor, arXiv 2505.19590.
    """
    return logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1])


# -----------------------------------------------------------------------------
# weights, pooling, advantages

def adaptive_weights(prg: Tensor, anchor, tau: float = 0.5) -> Tensor:
    """w_j = 2 sigmoid(min((PRG_j - a) / max(a, 0.05), 0) / tau), [N] in (0, 1].

    prg [N] is the PRG of each rollout and the anchor a (a number) the mean PRG of the supervised
    traces. A rollout that reasons as well as the traces has weight 1. Exceeding the anchor earns no
    extra weight: very steady support usually comes from repetitive lines. The floor of 0.05 keeps
    the weight from becoming a step function if the anchor is near 0.
    """
    anchor = torch.as_tensor(anchor, dtype=prg.dtype, device=prg.device)
    shortfall = ((prg - anchor) / anchor.clamp(min=0.05)).clamp(max=0)
    return (2 * (shortfall / tau).sigmoid()).detach()


def pool_by_answer(values: Tensor, answers: Tensor, group_size: int) -> Tensor:
    """For each rollout j, (1/G) sum of values_i over the rollouts of its group with its answer.

    values [N] and answers [N] (integers; equal numbers within a group mean equal answers) list the
    groups one after the other; the result is [N]. If all values are 1, it is each answer's share
    of the votes (TTRL, arXiv 2504.16084). Pooling helps because the PRG of one rollout is weak
    evidence: several rollouts that each earn the same answer in their own way are strong evidence.
    """
    x = values.detach().view(-1, group_size)  # [Q, G]
    y = answers.view(-1, group_size)  # [Q, G]
    same = y[:, :, None] == y[:, None, :]  # [Q, G, G]
    return (same * x[:, None, :]).mean(-1).flatten()


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """A_j = (r_j - mean) / (std + 1e-4) within each group of consecutive rewards [N]. GRPO, arXiv
    2402.03300.

    A group whose rewards are all equal has advantages of exactly 0. Raises ValueError if the
    rewards do not form whole groups.
    """
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not form whole groups of {group_size}")
    r = rewards.detach().view(-1, group_size)
    # Subtract the first reward, so that equal rewards give exactly 0 despite rounding.
    r = r - r[:, :1]
    centered = r - r.mean(1, keepdim=True)
    std = centered.square().mean(1, keepdim=True).sqrt()
    return (centered / (std + 1e-4)).flatten()


# -----------------------------------------------------------------------------
# the methods

def learning_signals(method: str, certainty: Tensor, prg: Tensor | None, answers: Tensor,
                     group_size: int, anchor: float | None = None,
                     tau: float = 0.5) -> tuple[Tensor, Tensor]:
    """What a step learns from its rollouts: (advantages A [N], earned shares e [N]).

    The groups of `group_size` rollouts follow one another. certainty [N] is c. answers [N] are
    integers: equal where two rollouts of a group give the same answer, -1 where a rollout has no
    answer. prg [N] and the anchor a are used by hytuning and support only. The mix lambda is the
    mean of e over all processes; `weigh_queries` then makes use of it.
    """
    c = certainty
    if method == "rd":
        # Reasoning distillation alone: rollouts are ignored.
        r = torch.zeros_like(c)
        e = torch.zeros_like(c)
    elif method == "rlif":
        # Internal feedback alone: each rollout is rewarded by its own certainty.
        r = c
        e = torch.ones_like(c)
    elif method == "static":
        # The same reward, and RD and RLIF count half each.
        r = c
        e = torch.full_like(c, 0.5)
    elif method == "votes":
        # Each rollout has one vote: the certainty of all rollouts with the same answer is pooled.
        w = (answers >= 0).to(c.dtype)
        r = pool_by_answer(w * c, answers, group_size)
        e = pool_by_answer(w, answers, group_size)
    elif method in ("hytuning", "support"):
        # The same, but each vote is multiplied by w, which says how far it was earned. (support is
        # a control, for which `prg` is the final support p_K: see `choose_evidence`.)
        w = (answers >= 0) * adaptive_weights(prg, anchor, tau)
        r = pool_by_answer(w * c, answers, group_size)
        e = pool_by_answer(w, answers, group_size)
    else:
        raise ValueError(f"there is no method {method!r}")
    return group_advantages(r, group_size), e


def weigh_queries(advantages: Tensor, earned: Tensor, lam: float, group_size: int) -> Tensor:
    """A_j lambda_q / lambda [N], where lambda_q is the mean of the earned shares of a group.

    Advantages are divided by the standard deviation of their group. Without this factor a group in
    which little was earned would push as hard as one in which much was.
    """
    lam_q = earned.view(-1, group_size).mean(1).repeat_interleave(group_size)
    return advantages * lam_q / max(lam, 1e-9)


def choose_evidence(method: str, prg: Tensor, p_K: Tensor) -> Tensor:
    """The numbers [N] that weights are computed from: PRG or, for the control `support`, p_K.

    The final support p_K says how sure the model is in the end, but not whether it progressed.
    """
    return p_K if method == "support" else prg


def trace_weights(method: str, prg: Tensor, anchor: float, tau: float = 0.5) -> Tensor:
    """How much each supervised trace counts in L_RD, v [n] with mean 1, from PRG [n]."""
    w = torch.ones_like(prg)
    if method in ("hytuning", "support"):
        w = adaptive_weights(prg, anchor, tau)
    return w / w.mean()


# -----------------------------------------------------------------------------
# losses

def distillation_loss(logprobs: Tensor, mask: Tensor, tokens=None) -> Tensor:
    """L_RD = -sum(mask * log pi(token)) / tokens, the negative log-likelihood of a token in nats.

    logprobs [B, T] are those of the supervised traces. mask [B, T] is 1 (or the weight v of the
    trace) for response tokens and 0 for padding. The divisor `tokens` defaults to mask.sum(); pass
    the number of tokens of the whole batch if this is only a part of it.
    """
    if tokens is None:
        tokens = mask.sum()
    return -(logprobs * mask).sum() / tokens


def rlif_loss(logprobs: Tensor, mask: Tensor, advantages: Tensor, rollouts=None) -> Tensor:
    """L_RLIF = -(1/rollouts) sum_j A_j mean_t log pi(token_jt), the policy gradient.

    logprobs [B, T], mask [B, T] of the response tokens, advantages [B]. The divisor `rollouts`
    defaults to B; pass the number of rollouts of the whole batch if this is only a part of it.

    It is written like GRPO, with the ratio pi / pi_old, whose gradient is that of log pi. As there
    is one update for each batch of rollouts, the ratio is 1 and clipping it would change nothing.
    The *value* of the loss is therefore -mean A, or 0 for whole groups; its gradient is not 0.
    """
    if rollouts is None:
        rollouts = len(logprobs)
    ratio = (logprobs - logprobs.detach()).exp()
    gain = ratio * advantages.detach()[:, None]
    per_rollout = (gain * mask).sum(1) / mask.sum(1).clamp(min=1)
    return -per_rollout.sum() / rollouts


def hytuning_loss(rd: Tensor, rlif: Tensor, lam) -> Tensor:
    """L = (1 - lambda) L_RD + lambda L_RLIF.

    RD leads while the rollouts disagree or reason worse than the traces. As they catch up, the
    weight of RD falls.
    """
    return (1 - lam) * rd + lam * rlif


# -----------------------------------------------------------------------------
# log-probabilities without all logits in memory

def head_logprobs(hidden: Tensor, head, targets: Tensor) -> Tensor:
    """log pi(target) [N] from hidden states [N, D] and targets [N], without N x V logits in memory.

    head is any callable [n, D] -> [n, V]. It is applied to one chunk of tokens after another, and
    the backward pass computes the logits of a chunk again. With a vocabulary of 150,000 the logits
    of a whole batch would take most of the memory.
    """
    chunk = 2048 if hidden.is_cuda else 512
    logprobs = []
    for h, t in zip(hidden.split(chunk), targets.split(chunk)):
        logprobs.append(checkpoint(chunk_logprobs, h, head, t, use_reentrant=False,
                                   preserve_rng_state=False))
    return torch.cat(logprobs)


def chunk_logprobs(hidden: Tensor, head, targets: Tensor) -> Tensor:
    return token_logprobs(head(hidden), targets)
