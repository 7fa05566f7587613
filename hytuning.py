"""HyTuning's weights, rewards and losses: how a few supervised traces and many unlabeled queries
share one update. For rollout j, one of a group of G that answer the same query:

    c_j = self-certainty, the mean over its tokens
    w_j = 2 sigmoid(min((PRG_j - a) / max(a, 0.05), 0) / tau)    its weight
    r_j = (1/G) sum_{i~j} w_i c_i                                its reward
    e_j = (1/G) sum_{i~j} w_i                                    the share that earned its answer
    A_j = (r_j - mean of the group) / std of the group           its advantage (GRPO)
    L   = (1 - lambda) L_RD + lambda L_RLIF                      lambda: mean e of all rollouts

i~j: i is in j's group and gives the same answer. The anchor a is the mean PRG of the supervised
traces. They may be wrong too, so in L_RD trace i counts v_i = w_i / mean w. No gradient flows
through w, v, e, r, A or lambda: only through the log-probabilities of the tokens. Means take an
optional global count, so that the losses of micro-batches and processes add up to the loss of the
whole batch.

This file imports nothing of the project, so it can be taken alone. Next to read: train.py.

SPDX-License-Identifier: MIT
"""
import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


# -----------------------------------------------------------------------------
# what a token's logits tell us

def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log pi(target) [...] from logits [..., V] and the ids targets [...], in nats."""
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)


def self_certainty(logits: Tensor) -> Tensor:
    """KL(U || pi) = -log V - (1/V) sum_v log pi(v), in nats, [...] from logits [..., V].

    U is uniform over the vocabulary, so a uniform pi has 0. A rollout's self-certainty c is the
    mean over its response tokens. Intuitor, arXiv 2505.19590.
    """
    return logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1])


def entropy(logits: Tensor) -> Tensor:
    """-sum_v pi(v) log pi(v), in nats, [...] from logits [..., V]."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def head_logprobs(hidden: Tensor, lm_head, targets: Tensor) -> Tensor:
    """log pi(target) [N] from hidden [N, D] and targets [N], without ever holding N x V logits.

    Chunk after chunk of tokens goes through lm_head (any callable [n, D] -> [n, V]); the backward
    pass computes its logits again. With a vocabulary of 150,000 all logits at once would be most of
    the memory.
    """
    chunk = 2048 if hidden.is_cuda else 512
    logprobs = []
    for h, t in zip(hidden.split(chunk), targets.split(chunk)):
        # Nothing is random in it, so no random state needs to be kept.
        logprobs.append(checkpoint(chunk_logprobs, h, lm_head, t, use_reentrant=False,
                                   preserve_rng_state=False))
    return torch.cat(logprobs)


def chunk_logprobs(hidden: Tensor, lm_head, targets: Tensor) -> Tensor:
    return token_logprobs(lm_head(hidden).float(), targets)


# -----------------------------------------------------------------------------
# weights, rewards, advantages

def adaptive_weights(prg: Tensor, anchor, tau: float = 0.5) -> Tensor:
    """w_j = 2 sigmoid(min((PRG_j - a) / max(a, 0.05), 0) / tau), [N] in (0, 1], from PRG [N] and a.

    The anchor a is the mean PRG of the supervised traces: w is 1 for a rollout that earns its
    answer as well as they do. Better pays nothing more, since support that rises more steadily than
    theirs comes from lines that all say the same, right or wrong. The floor of 0.05 keeps an anchor
    near 0 from turning the gate into a step.
    """
    anchor = torch.as_tensor(anchor, dtype=prg.dtype, device=prg.device)
    shortfall = ((prg - anchor) / anchor.clamp(min=0.05)).clamp(max=0)
    return (2 * (shortfall / tau).sigmoid()).detach()


def pool_by_answer(values: Tensor, answers: Tensor, group_size: int) -> Tensor:
    """For each rollout j, [N]: (1/G) sum of values_i over those of its group that give its answer.

    values [N] and answers [N] (any numbers, equal where two rollouts of a group give the same
    answer) lie in consecutive groups of G. One rollout's PRG is weak evidence, since reasoning
    that is wrong may be steady too; that of all rollouts which reach an answer, each in its own
    way, is strong. With all values 1 it is the share of the vote (TTRL, arXiv 2504.16084).
    """
    x = values.detach().view(-1, group_size)  # [Q, G]
    y = answers.view(-1, group_size)
    same = y[:, :, None] == y[:, None, :]  # [Q, G, G]
    return (same * x[:, None, :]).mean(-1).flatten()


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """A_j = (r_j - mean) / (std + 1e-4) within each group of consecutive rewards [N].

    std over the group; a group of equal rewards has advantage 0, exactly. GRPO, arXiv 2402.03300.
    Raises ValueError where the rewards are not whole groups.
    """
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards are not whole groups of {group_size}")
    r = rewards.detach().view(-1, group_size)
    # Less the first one, so that equal rewards are 0 before anything is rounded.
    r = r - r[:, :1]
    centered = r - r.mean(1, keepdim=True)
    std = centered.square().mean(1, keepdim=True).sqrt()
    return (centered / (std + 1e-4)).flatten()


# -----------------------------------------------------------------------------
# losses

def distillation_loss(logprobs: Tensor, mask: Tensor, tokens=None) -> Tensor:
    """L_RD = -sum(mask * log pi(token)) / tokens, in nats: the negative log-likelihood of a token.

    logprobs [B, T] of the supervised traces; mask [B, T] is 1, or the trace's weight v, for their
    response tokens and 0 in the padding; the divisor `tokens` defaults to mask.sum().
    """
    if tokens is None:
        tokens = mask.sum()
    return -(logprobs * mask).sum() / tokens


def rlif_loss(logprobs: Tensor, mask: Tensor, advantages: Tensor, rollouts=None) -> Tensor:
    """L_RLIF = -(1/rollouts) sum_j A_j mean_t log pi(token_jt): the policy gradient on rollouts.

    logprobs [B, T], mask [B, T] of the response tokens, advantages [B]; rollouts defaults to B.
    Written with GRPO's ratio pi / pi_old, which has the gradient of log pi. With one update a batch
    it is 1, so the value of the loss is -mean A (0 for whole groups) while its gradient is not 0.
    GRPO's clipping of the ratio is for several updates on the same rollouts; there are none here.
    """
    if rollouts is None:
        rollouts = len(logprobs)
    ratio = (logprobs - logprobs.detach()).exp()
    gain = ratio * advantages.detach()[:, None]
    per_rollout = (gain * mask).sum(1) / mask.sum(1).clamp(min=1)
    return -per_rollout.sum() / rollouts


def hytuning_loss(rd: Tensor, rlif: Tensor, lam) -> Tensor:
    """L = (1 - lambda) L_RD + lambda L_RLIF. While rollouts disagree, or reason worse than the
    traces, RD leads; as they catch up, the unlabeled data takes over."""
    return (1 - lam) * rd + lam * rlif
