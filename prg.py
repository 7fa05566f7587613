"""Support, progressive reasoning gain (PRG), and measures of calibration.

A *trace* is a prompt, K reasoning steps and an answer that follows a marker such as "Answer:". Its
*support* p_k is the probability of the answer (the geometric mean over its tokens) if the marker
follows directly after the first k steps. *PRG* is high if the steps support the answer early and
keep supporting it. The calibration measures compare confidence with correctness.

The last part of the file computes the support in one pass instead of K+1. You do not need it to use
PRG in your own code. This file is self-contained; copy it freely. Read it down to "the same in one
pass", then `Trainer.step` in train.py.

SPDX-License-Identifier: MIT
"""
from dataclasses import dataclass

import torch
from torch import Tensor


# -----------------------------------------------------------------------------
# traces, their support and PRG

@dataclass
class Trace:
    """A prompt and a response as one list of token ids, and the positions that divide the response.

        prompt      tokens[:cuts[0]]
        step k      tokens[cuts[k - 1]:cuts[k]], for k = 1..K
        marker      tokens[cuts[K]:answer_start]
        answer      tokens[answer_start:answer_end]; if it is empty, the trace has no answer
        response    tokens[cuts[0]:], which may end in tokens after the answer

    answer_end defaults to the end of the tokens. Raises ValueError if the tokens are not a list or
    the positions are not valid.
    """
    tokens: list[int]
    cuts: list[int]
    answer_start: int
    answer_end: int | None = None

    def __post_init__(self):
        if not isinstance(self.tokens, list):
            raise ValueError("tokens must be a list of integers: call tolist() on a tensor")
        if self.answer_end is None:
            self.answer_end = len(self.tokens)
        bounds = [1, *self.cuts, self.answer_start, self.answer_end, len(self.tokens)]
        if not self.cuts or bounds != sorted(bounds):
            raise ValueError("there must be at least one cut, and 1 <= cuts <= answer_start <= "
                             f"answer_end <= number of tokens, but these are {bounds}")
        self.prompt = self.tokens[:self.cuts[0]]
        self.marker = self.tokens[self.cuts[-1]:self.answer_start]
        self.answer = self.tokens[self.answer_start:self.answer_end]
        self.response = self.tokens[self.cuts[0]:]


@torch.no_grad()
def answer_support(model, traces: list[Trace]) -> tuple[Tensor, Tensor]:
    """Return the support of each trace after k = 0..K steps and its mask, [B, K_max+1] each.

        p_k = exp(mean_t log pi(y_t | x, s_1..s_k, marker, y_<t))

    where x is the prompt, s are the steps and y is the answer. The mask is True for the k that a
    trace has; without an answer it is all False. Where it is False, the support is 0.

    `model` is a callable from ids [1, T], on the CPU, to logits [1, T, V], for example
    `lambda ids: model(ids).logits` for a model of `transformers`. It is called K+1 times for each
    trace; `packed_support` below gives the same result faster. Raises TypeError if it does not
    return a tensor. The formula is this project's own.
    """
    width = max((len(trace.cuts) for trace in traces), default=1)
    support = torch.zeros(len(traces), width)
    mask = torch.zeros(len(traces), width, dtype=torch.bool)
    for b, trace in enumerate(traces):
        if not trace.answer:
            continue
        for k, cut in enumerate(trace.cuts):
            ids = torch.tensor([trace.tokens[:cut] + trace.marker + trace.answer])
            logits = model(ids)
            if not isinstance(logits, Tensor):
                raise TypeError("model must return logits: pass `lambda ids: model(ids).logits`")
            n = len(trace.answer)
            # The logits at a position predict the token after it.
            logprobs = logits[0, -n - 1:-1].float().cpu().log_softmax(-1)  # [n, V]
            support[b, k] = logprobs.gather(1, ids[0, -n:, None]).mean().exp()
            mask[b, k] = True
    return support, mask


def progressive_reasoning_gain(support: Tensor, mask: Tensor) -> Tensor:
    """Return PRG [B], in [-1/3, 1], from the support p and its mask, [B, K_max+1] each.

        m_0 = p_0,   m_k = m_{k-1} + (p_k - m_{k-1}) / 3,   PRG = m_K - p_0 / 3

    The running mean m follows the support slowly, so an early and lasting gain counts more than one
    in the last step: PRG = 2/3 p_0 + sum_k (1 - (2/3)^(K-k+1)) (p_k - p_{k-1}). The number of steps
    before a gain does not matter. A support p that never changes gives 2/3 p, since PRG cannot tell
    a known answer from one that was decided before the reasoning.

    An answer without steps has PRG 0, and a trace without an answer has -1. The name and the idea
    are HyTuning's (arXiv 2604.08454); the formula is this project's own.
    """
    p = support
    m = p[:, 0]
    for k in range(1, p.shape[1]):
        m = torch.where(mask[:, k], m + (p[:, k] - m) / 3, m)
    K = mask.sum(-1) - 1
    gain = torch.where(K > 0, m - p[:, 0] / 3, 0.0)
    return torch.where(K >= 0, gain, -1.0)


def final_support(support: Tensor, mask: Tensor) -> Tensor:
    """Return the final support p_K [B], the model's confidence in its answer, or 0 without one."""
    last = (mask.sum(-1) - 1).clamp(min=0)
    return (support * mask).gather(-1, last[:, None])[:, 0]


# -----------------------------------------------------------------------------
# calibration

def expected_calibration_error(confidence, correct, bins: int = 10) -> float:
    """Return the mean of |mean confidence - accuracy| over bins of confidence, weighted by count.

    confidence [N] is in [0, 1], correct [N] is bool or 0/1, and the bins have equal width. The
    result is NaN if there is no data. The measure is from Guo et al., arXiv 1706.04599.
    """
    confidence = torch.as_tensor(confidence, dtype=torch.double)
    correct = torch.as_tensor(correct, dtype=torch.double)
    bin_of = (confidence * bins).long().clamp(0, bins - 1)
    # The gap of a bin times its count is the absolute value of a sum over its items.
    gaps = torch.bincount(bin_of, weights=confidence - correct).abs()
    return (gaps.sum() / len(confidence)).item()


def brier_score(confidence, correct) -> float:
    """Return the mean of (confidence - correct)^2, or NaN without data. 0 is best. Brier (1950)."""
    confidence = torch.as_tensor(confidence, dtype=torch.double)
    correct = torch.as_tensor(correct, dtype=torch.double)
    return (confidence - correct).square().mean().item()


def auroc(confidence, correct) -> float:
    """Return the probability that a correct item has more confidence than a wrong one.

    Ties count half, so chance gives 0.5. It is NaN if all items are correct or all are wrong.
    """
    confidence = torch.as_tensor(confidence, dtype=torch.double)
    correct = torch.as_tensor(correct, dtype=torch.double)
    right = confidence[correct == 1]
    wrong = confidence[correct == 0].sort().values
    less = torch.searchsorted(wrong, right)  # how many wrong items have less confidence
    less_or_equal = torch.searchsorted(wrong, right, right=True)
    return ((less + less_or_equal).double().mean() / 2 / len(wrong)).item()


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
    """Consecutive tokens of a row: a prompt, a response, its reasoning or a copy.

    The inputs of a response or a copy begin with the token before it and leave out its last token,
    so its last len(targets) inputs predict the targets.
    """
    inputs: list[int]
    position: int = 0  # the position of the first input in its text
    trace: int | None = None  # the index of the trace
    cut: int | None = None  # k for the copy after k steps, None for everything else
    targets: list[int] | None = None


def count_slots(row: list[Segment]) -> int:
    return sum(len(segment.inputs) for segment in row)


@dataclass
class Packed:
    """A batch of B rows of W slots, with n targets (responses or answers) of M tokens in all."""
    input_ids: Tensor  # [B, W]
    position_ids: Tensor  # [B, W]
    attention_mask: Tensor | None  # [B, 1, W, W] bool, True where a query sees a key; None: causal
    slots: Tensor  # [M] where each token of the targets is predicted, in the flattened [B x W]
    targets: Tensor  # [M] the tokens to be predicted, one target after the other
    lengths: list[int]  # [n] the number of tokens of each target
    trace: list[int]  # [n] the index of the trace of each target
    cut: list[int | None]  # [n] k for the answer after k steps, None for a response

    def pad(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return values [M] as a table [n, T] with a row for each target, and its mask."""
        lengths = torch.tensor(self.lengths, device=values.device)
        mask = torch.arange(max(self.lengths), device=values.device) < lengths[:, None]
        return values.new_zeros(mask.shape).masked_scatter(mask, values), mask


def pack(traces: list[Trace], copies: bool, tokens: int = 2048, width: int = 1024,
         device=None) -> list[Packed]:
    """Arrange traces in batches of at most `tokens` slots, padding included, or of a single row.

    The targets are the responses or, with `copies`, the answers after every cut; traces without an
    answer are then left out. Consecutive traces with the same prompt share a row as long as it has
    at most `width` slots, since the cost of attention grows with the square of the width. A trace
    that needs more gets a row of its own.
    """
    rows = []
    prompt = None  # the prompt of the last row, None while there is no row
    for index, trace in enumerate(traces):
        if copies and not trace.answer:
            continue
        start = trace.cuts[0] - 1  # The prompt's last token is the first input of a response.
        if copies:
            segments = [Segment(trace.tokens[start:trace.cuts[-1] - 1], start)]  # the reasoning
            for k, end in enumerate(trace.cuts):
                inputs = [trace.tokens[end - 1]] + trace.marker + trace.answer[:-1]
                segments.append(Segment(inputs, end - 1, index, k, trace.answer))
        else:
            segments = [Segment(trace.tokens[start:-1], start, index, targets=trace.response)]
        if trace.prompt != prompt or count_slots(rows[-1] + segments) > width:
            prompt = trace.prompt
            rows.append([Segment(prompt[:-1])])
        rows[-1] += segments

    # A batch is as wide as its widest row, so rows of similar width go together.
    rows.sort(key=count_slots, reverse=True)
    batches = []
    while rows:
        W = -(-count_slots(rows[0]) // 8) * 8  # CUDA's attention kernels want a multiple of 8
        B = max(1, tokens // W)
        batches.append(lay_out(rows[:B], W, device))
        rows = rows[B:]
    return batches


def lay_out(rows: list[list[Segment]], W: int, device) -> Packed:
    """Turn rows of segments into the tensors of a batch that is W slots wide."""
    ids, positions = [], []  # of each slot
    slots, targets = [], []  # of each token of a target
    lengths, traces, cuts = [], [], []  # of each target
    sees = torch.zeros(len(rows), W, W, dtype=torch.bool)  # [B, query, key]
    for b, row in enumerate(rows):
        P = len(row[0].inputs)
        sees[b, :, :P] = True  # the prompt
        padding = Segment([0] * (W - count_slots(row)))
        end = 0
        for segment in [*row, padding]:
            start = end
            end += len(segment.inputs)
            ids += segment.inputs
            positions += range(segment.position, segment.position + end - start)
            sees[b, start:end, start:end] = True
            if segment.cut is None:
                reasoning = start
            else:  # a copy also sees the reasoning up to its own first position
                sees[b, start:end, reasoning:reasoning + segment.position - P] = True
            if segment.targets:
                slots += range(len(ids) - len(segment.targets), len(ids))
                targets += segment.targets
                lengths.append(len(segment.targets))
                traces.append(segment.trace)
                cuts.append(segment.cut)
    ids, positions = torch.tensor([ids, positions], device=device).view(2, len(rows), W)
    slots, targets = torch.tensor([slots, targets], device=device)
    # If each row is one prompt and one response, causal attention is right without a mask.
    attention_mask = None
    if any(len(row) > 2 for row in rows):
        attention_mask = sees.tril()[:, None].to(device)
    return Packed(ids, positions, attention_mask, slots, targets, lengths, traces, cuts)


@torch.no_grad()
def packed_support(model, traces: list[Trace], tokens: int = 2048) -> tuple[Tensor, Tensor]:
    """Return the support and mask of `answer_support`, [B, K_max+1] each, but faster.

    `model` is a `Decoder`, or has its hidden_states(input_ids, position_ids, attention_mask), which
    gives [B, W, D], its logits(hidden) and its lm_head. A batch has at most `tokens` slots, as in
    `pack`. The result is on the device of the model.
    """
    device = model.lm_head.weight.device
    width = max((len(trace.cuts) for trace in traces), default=1)
    support = torch.zeros(len(traces), width, device=device)
    mask = torch.zeros(len(traces), width, dtype=torch.bool, device=device)
    for batch in pack(traces, copies=True, tokens=tokens, device=device):
        hidden = model.hidden_states(batch.input_ids, batch.position_ids, batch.attention_mask)
        hidden = hidden.flatten(0, 1)[batch.slots]  # [M, D]
        logprobs = []
        # Compute the logits of 512 tokens at a time, to save memory.
        for h, target in zip(hidden.split(512), batch.targets.split(512)):
            logprobs.append(model.logits(h).log_softmax(-1).gather(1, target[:, None])[:, 0])
        table, in_answer = batch.pad(torch.cat(logprobs).float())  # [n, T] each
        support[batch.trace, batch.cut] = (table.sum(1) / in_answer.sum(1)).exp()
        mask[batch.trace, batch.cut] = True
    return support, mask
