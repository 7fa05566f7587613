"""Support, progressive reasoning gain (PRG), and measures of calibration.

A *trace* is a prompt, K reasoning steps and an answer that follows a marker such as "Answer:". Its
*support* p_k is the probability of the answer (the geometric mean over its tokens) if the marker
follows directly after the first k steps. *PRG* is the gain in support from p_0 to p_K, multiplied
by the steadiness of that gain. The calibration measures compare confidence with correctness.

The last part of the file computes the support in one pass instead of K+1. You do not need it to use
PRG in your own code. This file is self-contained; copy it freely. Read train.py next.

SPDX-License-Identifier: MIT
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


# -----------------------------------------------------------------------------
# traces

@dataclass
class Trace:
    """Token ids of a prompt and a response, and the positions at which the response is divided.

        tokens[:cuts[0]]                      the prompt
        tokens[cuts[k - 1]:cuts[k]]           reasoning step k, for k = 1..K
        tokens[cuts[K]:answer_start]          the marker
        tokens[answer_start:answer_end]       the answer; if it is empty, the trace has no answer
        tokens[answer_end:]                   what follows, such as an end token

    answer_end defaults to the end of the tokens. Raises ValueError if there are no cuts, the prompt
    is empty, or the positions decrease or exceed the number of tokens.
    """
    tokens: list[int]
    cuts: list[int]
    answer_start: int
    answer_end: int | None = None

    def __post_init__(self):
        if self.answer_end is None:
            self.answer_end = len(self.tokens)
        bounds = [1, *self.cuts, self.answer_start, self.answer_end, len(self.tokens)]
        if not self.cuts or bounds != sorted(bounds):
            raise ValueError(f"there must be at least one cut, and cuts {self.cuts}, answer_start "
                             f"{self.answer_start} and answer_end {self.answer_end} must be "
                             "non-decreasing and lie between 1 and the number of tokens, "
                             f"{len(self.tokens)}")

    @property
    def prompt(self) -> list[int]:
        return self.tokens[:self.cuts[0]]

    @property
    def response(self) -> list[int]:
        return self.tokens[self.cuts[0]:]

    @property
    def marker(self) -> list[int]:
        return self.tokens[self.cuts[-1]:self.answer_start]

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.answer_start:self.answer_end]


# -----------------------------------------------------------------------------
# support and PRG

@torch.no_grad()
def answer_support(model, traces: list[Trace]) -> tuple[Tensor, Tensor]:
    """Return the support of each trace after k = 0..K steps and its mask, [B, K_max+1] each.

        p_k = exp(mean_t log pi(y_t | x, s_1..s_k, marker, y_<t))

    where x is the prompt, s are the steps and y is the answer. The mask is True for the k that a
    trace has; without an answer it is all False. Where it is False, the support is 0. `model` is
    any callable from ids [1, T], on the CPU, to logits [1, T, V]. It is called K+1 times for each
    trace; `packed_support` below gives the same result faster. The formula is this project's own.
    """
    width = max((len(trace.cuts) for trace in traces), default=1)
    support = torch.zeros(len(traces), width)
    mask = torch.zeros(len(traces), width, dtype=torch.bool)
    for b, trace in enumerate(traces):
        if not trace.answer:
            continue
        for k, cut in enumerate(trace.cuts):
            ids = torch.tensor([trace.tokens[:cut] + trace.marker + trace.answer])
            # The logits at a position predict the token after it.
            n = len(trace.answer)
            logits = model(ids)[0, -n - 1:-1].float()  # [n, V]
            answer = ids[0, -n:, None].to(logits.device)  # [n, 1]
            logprobs = logits.log_softmax(-1).gather(1, answer)
            support[b, k] = logprobs.mean().exp()
            mask[b, k] = True
    return support, mask


def progressive_reasoning_gain(support: Tensor, mask: Tensor) -> Tensor:
    """Return PRG [B], in [-1, 1], from the support p and its mask, [B, K_max+1] each.

        g_k = p_k - p_{k-1},   D = p_K - p_0,   steadiness = D^2 / (K * sum_k g_k^2)
        PRG = D * steadiness

    By the Cauchy-Schwarz inequality the steadiness lies in [0, 1]. It is 1 if every step adds the
    same and 1/K if only one step changes the support. PRG is 0 if the support never changes, and
    -1 for a trace without an answer. The name and the idea are HyTuning's (arXiv 2604.08454); the
    formula is this project's own.
    """
    p = support.double()
    g = (p[:, 1:] - p[:, :-1]) * mask[:, 1:]
    D = g.sum(-1)
    K = mask[:, 1:].sum(-1)
    energy = K * g.square().sum(-1)
    steadiness = torch.where(energy > 0, D.square() / energy.clamp(min=1e-300), 0.0)
    return torch.where(mask.any(-1), D * steadiness, -1.0).to(support.dtype)


def final_support(support: Tensor, mask: Tensor) -> Tensor:
    """Return the final support p_K [B], the model's confidence in its answer, or 0 without one."""
    last = (mask.sum(-1) - 1).clamp(min=0)
    return (support * mask).gather(-1, last[:, None])[:, 0]


# -----------------------------------------------------------------------------
# calibration

def reliability(confidence, correct, bins: int = 10) -> list[tuple[float, float, int]]:
    """Return (mean confidence, accuracy, number of items) of each nonempty bin of confidence.

    confidence [N] in [0, 1], correct [N] bool or 0/1; the bins have equal width. For a calibrated
    model the first two numbers agree. This function and the three below raise ValueError if the
    lengths differ or a value is outside its range or NaN.
    """
    confidence, correct = as_columns(confidence, correct)
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    rows = []
    for b in bin_of.unique():
        inside = bin_of == b
        count = inside.sum().item()
        rows.append((confidence[inside].mean().item(), correct[inside].mean().item(), count))
    return rows


def expected_calibration_error(confidence, correct, bins: int = 10) -> float:
    """Return the mean of |confidence - accuracy| over the bins of `reliability`, weighted by count.

    It is NaN if there is no data. The measure is from Guo et al., arXiv 1706.04599.
    """
    total = 0
    error = 0.0
    for mean_confidence, accuracy, count in reliability(confidence, correct, bins):
        total += count
        error += count * abs(mean_confidence - accuracy)
    return error / total if total else math.nan


def brier_score(confidence, correct) -> float:
    """Return the mean of (confidence - correct)^2, or NaN without data. 0 is best. Brier (1950)."""
    confidence, correct = as_columns(confidence, correct)
    return (confidence - correct).square().mean().item()


def auroc(confidence, correct) -> float:
    """Return the probability that a correct item has more confidence than a wrong one.

    Ties count half, so chance gives 0.5. The result is NaN if all items are correct or all are
    wrong. It is computed from ranks (the Mann-Whitney statistic).
    """
    confidence, correct = as_columns(confidence, correct)
    values, rank_of = confidence.unique(return_inverse=True)
    count = torch.bincount(rank_of, minlength=len(values)).double()
    # Ranks start at 1, and equal values share their mean rank.
    rank = (count.cumsum(0) - (count - 1) / 2)[rank_of]
    right = correct.sum()
    wrong = len(correct) - right
    return ((rank @ correct - right * (right + 1) / 2) / (right * wrong)).item()


def as_columns(confidence, correct) -> tuple[Tensor, Tensor]:
    """Return both as float64 tensors [N] on the CPU, or raise ValueError as in `reliability`."""
    confidence = torch.as_tensor(confidence, dtype=torch.double).cpu().flatten()
    correct = torch.as_tensor(correct, dtype=torch.double).cpu().flatten()
    if len(confidence) != len(correct) or not ((correct == 0) | (correct == 1)).all():
        raise ValueError("correct must hold one 0 or 1 for each confidence")
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("confidence must lie in [0, 1]")
    return confidence, correct


# -----------------------------------------------------------------------------
# the same in one pass
#
# The passes of `answer_support` repeat most of their tokens. Here a prompt is computed once for all
# responses to it, and the reasoning of a response once for all of its cuts. A row of a batch holds
#
#     prompt | reasoning 1 | copy 0 | copy 1 | ... | reasoning 2 | copy 0 | copy 1 | ...
#
# where copy k repeats the marker and the answer, and attends to the prompt and the first k steps.
# An attention mask keeps everything else apart, and the positions are those of separate texts, so
# all log-probabilities equal those of separate passes. Training packs whole responses in the same
# way, without copies.

@dataclass
class Segment:
    """Consecutive tokens of a row: a prompt, a response or a copy.

    The inputs of a response or a copy begin with the token before it and leave out its last token.
    The last len(targets) inputs predict the targets.
    """
    inputs: list[int]
    position: int  # the position of the first input in its text
    owner: int  # the index of the trace, or PROMPT or PADDING
    copy: int = 0  # k + 1 for the copy after k steps, 0 for everything else
    targets: list[int] | None = None


PROMPT = -1
PADDING = -2


def make_segments(trace: Trace, index: int, copies: bool) -> list[Segment]:
    """Return the segments of a trace after its prompt: the whole response as a target or, with
    `copies`, the reasoning without a target and then a copy for each cut with its answer as target.
    """
    tokens = trace.tokens
    start = trace.cuts[0] - 1
    if not copies:
        return [Segment(tokens[start:-1], start, index, targets=trace.response)]
    segments = [Segment(tokens[start:trace.cuts[-1] - 1], start, index)]
    for k, cut in enumerate(trace.cuts):
        inputs = [tokens[cut - 1]] + trace.marker + trace.answer[:-1]
        segments.append(Segment(inputs, cut - 1, index, copy=k + 1, targets=trace.answer))
    return segments


@dataclass
class Packed:
    """A batch of B rows of W slots, with n targets (responses or answers) of up to T tokens."""
    input_ids: Tensor  # [B, W]
    position_ids: Tensor  # [B, W]
    attention_mask: Tensor | None  # [B, 1, W, W] bool, True where a query sees a key; None: causal
    trace: Tensor  # [n] the index of the trace of each target
    cut: Tensor  # [n] the number of steps before a copied answer; 0 for a response
    slots: Tensor  # [n, T] where each token of a target is predicted, in the flattened [B x W]
    targets: Tensor  # [n, T] the tokens to be predicted
    mask: Tensor  # [n, T] bool, False in the padding


def pack(traces: list[Trace], copies: bool, tokens: int = 2048, width: int = 1024,
         device=None) -> list[Packed]:
    """Arrange traces in batches of at most `tokens` slots, padding included, or of a single row.

    The targets are the responses or, with `copies`, the answers after every cut; traces without an
    answer are then left out. Consecutive traces with the same prompt share a row as long as it has
    at most `width` slots, since the cost of attention grows with the square of the width. A trace
    that needs more gets a row of its own.
    """
    rows = []
    widths = []
    row_prompt = None  # the prompt of the last row
    for index, trace in enumerate(traces):
        if copies and not trace.answer:
            continue
        segments = make_segments(trace, index, copies)
        size = sum(len(segment.inputs) for segment in segments)
        if trace.prompt != row_prompt or widths[-1] + size > width:
            # The prompt's last token is the first input of each response.
            rows.append([Segment(trace.prompt[:-1], 0, PROMPT)])
            widths.append(len(trace.prompt) - 1)
            row_prompt = trace.prompt
        rows[-1] += segments
        widths[-1] += size

    # A batch is as wide as its widest row, so rows of similar width go together.
    order = sorted(range(len(rows)), key=lambda row: -widths[row])
    batches = []
    while order:
        count = max(1, tokens // max(round_up(widths[order[0]]), 1))
        batches.append(lay_out([rows[row] for row in order[:count]], device))
        order = order[count:]
    return batches


def lay_out(rows: list[list[Segment]], device=None) -> Packed:
    """Turn rows of segments into the tensors of a batch."""
    sizes = [sum(len(segment.inputs) for segment in row) for row in rows]
    width = round_up(max(sizes))
    ids, position, start, owner, copy = [], [], [], [], []  # one number for each slot
    traces, cuts, slots, targets = [], [], [], []  # one entry for each target
    for row, size in zip(rows, sizes):
        padding = Segment([0] * (width - size), 0, PADDING)
        for segment in [*row, padding]:
            n = len(segment.inputs)
            ids += segment.inputs
            position += range(segment.position, segment.position + n)
            start += [segment.position] * n
            owner += [segment.owner] * n
            copy += [segment.copy] * n
            if segment.targets:
                traces.append(segment.owner)
                cuts.append(max(segment.copy - 1, 0))
                slots.append(torch.arange(len(ids) - len(segment.targets), len(ids)))
                targets.append(torch.tensor(segment.targets))

    table = torch.tensor([ids, position, start, owner, copy], device=device)
    ids, position, start, owner, copy = table.view(5, len(rows), width)  # [B, W] each
    attention_mask = None
    # If each row is one prompt and one response, causal attention is right without a mask.
    if any(len(row) > 2 for row in rows):
        attention_mask = tree_mask(position, start, owner, copy)
    mask = pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in targets], batch_first=True)
    return Packed(ids, position, attention_mask, torch.tensor(traces, device=device),
                  torch.tensor(cuts, device=device),
                  pad_sequence(slots, batch_first=True).to(device),
                  pad_sequence(targets, batch_first=True).to(device), mask.to(device))


def round_up(width: int) -> int:
    """Round up to a multiple of 8, the alignment of masks in CUDA's attention kernels."""
    return -(-width // 8) * 8


def tree_mask(position: Tensor, start: Tensor, owner: Tensor, copy: Tensor) -> Tensor:
    """Return which keys (last axis) each query sees, [B, 1, W, W] bool, from [B, W] of each slot.

    A slot sees itself and the slots before it in the prompt and in its own segment. A copy also
    sees the reasoning before its cut.
    """
    query = (slice(None), slice(None), None)  # x[query] is [B, W, 1]
    key = (slice(None), None, slice(None))  # x[key] is [B, 1, W]
    same_owner = owner[query] == owner[key]
    same_segment = same_owner & (copy[query] == copy[key])
    before_cut = same_owner & (copy[key] == 0) & (position[key] < start[query])
    earlier = torch.ones_like(same_owner[0]).tril()
    return (earlier & ((owner[key] == PROMPT) | same_segment | before_cut))[:, None]


@torch.no_grad()
def packed_support(model, traces: list[Trace], tokens: int = 2048, device=None):
    """Return the support and mask of `answer_support`, [B, K_max+1] each, on `device`, but faster.

    model.hidden_states(input_ids, position_ids, attention_mask) gives hidden states [B, W, D], and
    model.logits gives the float32 logits of those that predict an answer. A batch has at most
    `tokens` slots, as in `pack`. `device` defaults to that of the model.
    """
    if device is None:
        device = model.lm_head.weight.device
    width = max((len(trace.cuts) for trace in traces), default=1)
    support = torch.zeros(len(traces), width, device=device)
    mask = torch.zeros(len(traces), width, dtype=torch.bool, device=device)
    for batch in pack(traces, copies=True, tokens=tokens, device=device):
        hidden = model.hidden_states(batch.input_ids, batch.position_ids, batch.attention_mask)
        hidden = hidden.flatten(0, 1)[batch.slots[batch.mask]]  # [tokens of answers, D]
        targets = batch.targets[batch.mask][:, None]
        logprobs = []
        # Compute the logits of 512 tokens at a time, to save memory.
        for h, target in zip(hidden.split(512), targets.split(512)):
            logprobs.append(model.logits(h).log_softmax(-1).gather(1, target)[:, 0])
        table = torch.zeros(batch.mask.shape, device=device)
        table[batch.mask] = torch.cat(logprobs).float()
        support[batch.trace, batch.cut] = (table.sum(1) / batch.mask.sum(1)).exp()
        mask[batch.trace, batch.cut] = True
    return support, mask
