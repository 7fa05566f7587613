"""HyTuning's losses: how a few supervised traces and many unlabeled queries share one update.

    w_j = 2 sigmoid(min((PRG_j - a) / max(a, 0.05), 0) / tau)   does rollout j earn its answer as the traces do?
    r_j = (1/G) sum of w_i * self-certainty_i                   certainty counts as far as it was earned, and for the
          over the i of its group with y_i = y_j                answer: whoever gives it gets what all have earned
    A_j = (r_j - mean of the group) / std of the group          GRPO's advantage
    L   = (1 - lambda) L_RD + lambda L_RLIF                     with lambda = mean_j e_j

e_j is r_j without the certainty: the share of the group that has earned j's answer. In L_RD a supervised trace i
counts v_i = w_i / mean w, since it may be wrong as well. No gradient flows through w, v, r, e, A or lambda: only the
log-probabilities of the tokens have one. Every mean is a sum over what is given, divided by a count that may be
passed in: with the global count, the losses of micro-batches and ranks add up to the loss of the whole batch.

This file imports nothing of the project, so it can be taken alone. Next to read: data.py, then train.py.

SPDX-License-Identifier: MIT
"""
import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


# ------------------------------------------------------------------------- what a token's logits tell us

def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log pi(target) [...] from logits [..., V] and the ids targets [...], in nats."""
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)


def self_certainty(logits: Tensor) -> Tensor:
    """KL(U || pi) = -log V - (1/V) sum_v log pi(v), in nats, [...] from logits [..., V]. 0 for a uniform pi.

    U is the uniform distribution over the vocabulary. A rollout's self-certainty is the mean over its
    response tokens. Intuitor, arXiv 2505.19590.
    """
    return logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1])


def entropy(logits: Tensor) -> Tensor:
    """-sum_v pi(v) log pi(v), in nats, [...] from logits [..., V]."""
    return torch.distributions.Categorical(logits=logits, validate_args=False).entropy()


def over_vocabulary(statistic, hidden: Tensor, lm_head, targets: Tensor, chunk: int = 512) -> Tensor:
    """`statistic(logits [n, V] in float32, targets [n])` for hidden [N, D], without ever holding N x V logits.

    Chunk after chunk of tokens goes through lm_head (any callable [n, D] -> [n, V]); in the backward pass its
    logits are computed again. With 150,000 tokens in the vocabulary the logits are most of the memory.
    """
    def of_chunk(hidden, targets):
        return statistic(lm_head(hidden).float(), targets)
    return torch.cat([checkpoint(of_chunk, h, t, use_reentrant=False)
                      for h, t in zip(hidden.split(chunk), targets.split(chunk))])


# -------------------------------------------------------------------------------- advantages and weights

def adaptive_weights(prg: Tensor, anchor, tau: float = 0.5) -> Tensor:
    """w_j = 2 sigmoid(min((PRG_j - a) / max(a, 0.05), 0) / tau), [N] in (0, 1], from PRG [N] and the anchor a.

    The anchor is the mean PRG of the supervised traces: w is 1 for a rollout that earns its answer as well as
    they do. Better pays nothing more, since support that rises more steadily than theirs comes from lines that
    all say the same, right or wrong. The floor of 0.05 keeps an anchor near 0 from turning the gate into a step.
    """
    anchor = torch.as_tensor(anchor, dtype=prg.dtype, device=prg.device)
    return (2 * (((prg - anchor) / anchor.clamp(min=0.05)).clamp(max=0) / tau).sigmoid()).detach()


def pool_by_answer(values: Tensor, answers: Tensor, group_size: int) -> Tensor:
    """(1/G) sum of values_i over the rollouts i of j's group that give j's answer, [N], for each rollout j.

    values [N] and answers [N] (any numbers, equal where two rollouts of a group give the same answer) lie in
    consecutive groups of G. One rollout's PRG is a weak witness, since reasoning that is wrong may be steady too;
    what all that reach an answer have earned, each in its own way, is a strong one. Of weights w it is the share of
    the group that has earned the answer; with all w = 1 the share of the vote (as a reward: TTRL, arXiv 2504.16084).
    """
    x, y = values.detach().view(-1, group_size), answers.view(-1, group_size)
    return ((y[:, :, None] == y[:, None, :]) * x[:, None, :]).mean(-1).flatten()


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """A_j = (r_j - mean) / (std + 1e-4) within each group of consecutive rewards [N]; std over the group.

    GRPO, arXiv 2402.03300. A group of equal rewards has advantage 0: the 1e-4 is far above rounding. Raises
    ValueError where the rewards are not whole groups.
    """
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards are not whole groups of {group_size}")
    r = rewards.detach().view(-1, group_size)
    away = r - r.mean(1, keepdim=True)
    return (away / (away.square().mean(1, keepdim=True).sqrt() + 1e-4)).flatten()


# ------------------------------------------------------------------------------------------------ losses

def distillation_loss(logprobs: Tensor, mask: Tensor, tokens=None) -> Tensor:
    """L_RD = -sum(log pi(token)) / tokens: the mean negative log-likelihood of a response token, in nats.

    logprobs [B, T] of the supervised traces, mask [B, T] of their response tokens, with a weight for each trace in
    place of the 1 if they do not count alike; tokens defaults to mask.sum().
    """
    tokens = mask.sum() if tokens is None else tokens
    return -(logprobs * mask).sum() / tokens


def rlif_loss(logprobs: Tensor, mask: Tensor, advantages: Tensor, rollouts=None, *, old_logprobs: Tensor = None,
              clip: float = 0.0, reference_logprobs: Tensor = None, kl: float = 0.0) -> Tensor:
    """L_RLIF = -(1/rollouts) sum_j A_j mean_t log pi(token_jt): the policy gradient on unlabeled rollouts.

    logprobs [B, T], mask [B, T] of the response tokens, advantages [B]; rollouts defaults to B. Written with
    the ratio pi / pi_old, which is 1 at the first update and has the gradient of log pi there, so the value
    of the loss is -mean A (0 for whole normalised groups) while its gradient is the policy gradient.
    old_logprobs [B, T] are those of the sampling policy; clip > 0 limits the ratio to 1 +- clip (PPO, arXiv
    1707.06347), for several updates on one batch. kl > 0 adds kl times the k3 estimate of KL(pi || reference).
    """
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio, A = (logprobs - old_logprobs).exp(), advantages.detach()[:, None]
    gain = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A) if clip else ratio * A
    if kl:
        away = reference_logprobs - logprobs
        gain = gain - kl * (away.exp() - 1 - away)
    per_rollout = (gain * mask).sum(1) / mask.sum(1).clamp(min=1)
    return -per_rollout.sum() / (len(logprobs) if rollouts is None else rollouts)


def hytuning_loss(rd: Tensor, rlif: Tensor, lam) -> Tensor:
    """L = (1 - lambda) L_RD + lambda L_RLIF. While rollouts disagree, or reason worse than the anchor, RD leads."""
    return (1 - lam) * rd + lam * rlif
