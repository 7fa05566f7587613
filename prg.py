"""Does the reasoning progressively earn its answer? Support, PRG, and can a confidence be believed?

A *trace* is a prompt, reasoning steps and an answer introduced by a marker. *Support* p_k is the
probability of the answer when the marker follows directly after the first k steps. *PRG*, the
progressive reasoning gain, is the support gained from p_0 to p_K times how steadily it was gained.
The last part measures a confidence against what turned out to be right.

The model is any callable `(input_ids, position_ids, attention_mask) -> logits`. This file imports
nothing of the project, so it can be taken alone. Next to read: hytuning.py.

SPDX-License-Identifier: MIT
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


# -----------------------------------------------------------------------------
# traces

@dataclass
class Trace:
    """Token ids of a prompt and a response, and where the reasoning may be cut.

    The prefix after k steps is tokens[:cuts[k]], k = 0..K, so cuts[0] is the length of the prompt;
    tokens[cuts[K]:answer_start] is the marker, tokens[answer_start:answer_end] the answer, by
    default to the end. What follows it (an end token, say) takes no part in the support. An empty
    answer means that there is none. Raises ValueError for cuts that do not fit the tokens.
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
            raise ValueError(f"cuts {self.cuts} and the answer's bounds {self.answer_start} and "
                             f"{self.answer_end} must rise, from 1 to {len(self.tokens)} tokens")

    @property
    def prompt(self) -> list[int]:
        return self.tokens[:self.cuts[0]]

    @property
    def response(self) -> list[int]:
        return self.tokens[self.cuts[0]:]

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.answer_start:self.answer_end]


# -----------------------------------------------------------------------------
# packing: a prompt is computed once for all of its responses

@dataclass
class Packed:
    """Traces laid out for one pass. A row is a tree: a prompt, then responses to it, and for the
    support, behind each (which then ends before its marker), a copy of marker and answer for every
    cut:

        prompt | response 1 | copy 0 | copy 1 | ... | response 2 | copy 0 | copy 1 | ...

    A slot sees itself, the prompt, and the slots before it in its own response or copy; a copy also
    sees its response up to the cut. Positions are those of separate texts, so log-probabilities are
    those of separate passes.

    Each response or copy starts one token early: with the prompt's last token (which the prompt
    then leaves out), or the last one before its cut. That slot predicts its first token, so all of
    its tokens are predicted inside it, and a missing marker or a prompt of one token needs no
    special case.
    """
    input_ids: Tensor  # [B, W]
    position_ids: Tensor  # [B, W]
    attention_mask: Tensor  # [B, 1, W, W] bool, True where the query (third axis) sees the key
    # What is predicted: n responses or, for the support, n copied answers, of up to T tokens.
    trace: Tensor  # [n] of which trace
    step: Tensor  # [n] after how many steps, for a copy
    slots: Tensor  # [n, T] where its tokens are predicted, in the flat [B x W]
    targets: Tensor  # [n, T] its tokens
    mask: Tensor  # [n, T] bool: not padding


def pack(traces: list[Trace], copies: bool, tokens: int = 2048, width: int = 1024,
         device=None) -> list[Packed]:
    """Lay traces out in batches of at most `tokens` slots (or one row), padding included.

    With `copies` their answers are predicted after every cut, else their responses. Consecutive
    traces with the same prompt share a row while it stays within `width`, since attention costs the
    square of a row; a longer trace has a row of its own.
    """
    rows, widths = [], []
    for i, trace in enumerate(traces):
        size = len(trace.response)
        if copies:
            if not trace.answer:
                continue
            copy_size = trace.answer_end - trace.cuts[-1]
            size = trace.cuts[-1] - trace.cuts[0] + len(trace.cuts) * copy_size
        if rows and traces[rows[-1][0]].prompt == trace.prompt and widths[-1] + size <= width:
            rows[-1].append(i)
            widths[-1] += size
        else:
            rows.append([i])
            widths.append(len(trace.prompt) - 1 + size)

    # Rows of like width go together, since a batch is as wide as its widest row.
    order = sorted(range(len(rows)), key=lambda row: -widths[row])
    batches = []
    while order:
        count = max(1, tokens // (widths[order[0]] + 7))  # lay_out rounds up to a multiple of 8
        batches.append(lay_out(traces, [rows[row] for row in order[:count]], copies, device))
        order = order[count:]
    return batches


PROMPT = -1  # the number of the prompt among the responses 1, 2, ...; 0 is padding


def stretch(tokens: list[int], start: int, response: int, copy: int = 0) -> Tensor:
    """Slots [len(tokens), 5] of consecutive tokens: token, position, number of the response, number
    of the copy (0: the response itself), and the position at which the stretch begins."""
    slots = torch.empty(len(tokens), 5, dtype=torch.long)
    slots[:, 0] = torch.tensor(tokens)
    slots[:, 1] = torch.arange(start, start + len(tokens))
    slots[:, 2:] = torch.tensor((response, copy, start))
    return slots


def lay_out(traces: list[Trace], rows: list[list[int]], copies: bool, device=None) -> Packed:
    """One batch; its row b holds the traces rows[b], whose prompt is the same."""
    table = []  # [B] of slots [W, 5]
    found = []  # [n] of (trace, step, row, slot that predicts the first of the targets)
    targets = []  # [n] of token ids
    for b, row in enumerate(rows):
        prompt = traces[row[0]].prompt
        slots = [stretch(prompt[:-1], 0, PROMPT)]
        filled = len(prompt) - 1
        for response, i in enumerate(row, 1):
            trace = traces[i]
            start, end = trace.cuts[0], trace.cuts[-1]
            if copies:
                slots.append(stretch(trace.tokens[start - 1:end - 1], start - 1, response))
                filled += end - start
                for k, cut in enumerate(trace.cuts):
                    found.append((i, k, b, filled + trace.answer_start - end))
                    targets.append(trace.answer)
                    tokens = trace.tokens[cut - 1:cut] + trace.tokens[end:trace.answer_end - 1]
                    slots.append(stretch(tokens, cut - 1, response, copy=k + 1))
                    filled += len(tokens)
            else:
                found.append((i, 0, b, filled))
                targets.append(trace.response)
                slots.append(stretch(trace.tokens[start - 1:-1], start - 1, response))
                filled += len(trace.response)
        table.append(torch.cat(slots))

    table = pad_sequence(table, batch_first=True)
    # A multiple of 8, for CUDA's attention kernels.
    table = F.pad(table, (0, 0, 0, -table.shape[1] % 8)).to(device)
    ids, position, response, copy, start = table.unbind(-1)  # [B, W] each
    trace, step, row, first = torch.tensor(found, device=device).T  # [n] each
    lengths = torch.tensor([len(x) for x in targets], device=device)
    targets = [torch.tensor(x, dtype=torch.long) for x in targets]
    targets = pad_sequence(targets, batch_first=True).to(device)  # [n, T]
    t = torch.arange(targets.shape[1], device=device)
    mask = t < lengths[:, None]  # [n, T]
    slots = (row * table.shape[1] + first)[:, None] + t
    attention_mask = tree_mask(position, response, copy, start)
    return Packed(ids, position, attention_mask, trace, step, slots * mask, targets, mask)


def tree_mask(position: Tensor, response: Tensor, copy: Tensor, start: Tensor) -> Tensor:
    """[B, 1, W, W] bool, which key (last axis) a query sees, from what `stretch` says [B, W]."""
    query = (slice(None), slice(None), None)
    key = (slice(None), None)
    W = position.shape[1]
    before = torch.ones(W, W, dtype=torch.bool, device=position.device).tril()
    in_prompt = response[key] == PROMPT
    same_response = response[query] == response[key]
    same_copy = copy[query] == copy[key]
    above_cut = (copy[key] == 0) & (position[key] < start[query])
    return (before & (in_prompt | same_response & (same_copy | above_cut)))[:, None]


# -----------------------------------------------------------------------------
# support and PRG

@torch.no_grad()
def answer_support(model, traces: list[Trace], tokens: int = 2048, device=None):
    """Support of each trace after k = 0..K steps: (support [B, K_max+1], mask [B, K_max+1] bool).

        p_k = exp(mean_t log pi(y_t | x, s_1..s_k, marker, y_<t))

    The mask says which k a trace has: none without an answer. `model` is any callable `(input_ids,
    position_ids, attention_mask) -> logits [B, T, V]`; where it also has `hidden_states` (with the
    same arguments) and `lm_head`, logits are computed only where an answer is predicted. device
    defaults to that of the model's parameters; tokens are those of one pass, padding included.
    """
    if device is None and hasattr(model, "parameters"):
        device = next(model.parameters()).device
    depth = max([len(trace.cuts) for trace in traces], default=1)
    support = torch.zeros(len(traces), depth, device=device)
    mask = torch.zeros(len(traces), depth, dtype=torch.bool, device=device)
    lm_head = getattr(model, "lm_head", None) if hasattr(model, "hidden_states") else None
    for batch in pack(traces, copies=True, tokens=tokens, device=device):
        inputs = (batch.input_ids, batch.position_ids, batch.attention_mask)
        output = model.hidden_states(*inputs) if lm_head else model(*inputs)
        output = output.flatten(0, 1)[batch.slots[batch.mask]]
        logprobs = []
        # In pieces, since all logits at once are large.
        for x, target in zip(output.split(512), batch.targets[batch.mask].split(512)):
            logits = lm_head(x) if lm_head else x
            logprobs.append(logits.float().log_softmax(-1).gather(1, target[:, None])[:, 0])
        total = torch.zeros(batch.mask.shape, device=device)
        total[batch.mask] = torch.cat(logprobs)
        support[batch.trace, batch.step] = (total.sum(1) / batch.mask.sum(1)).exp()
        mask[batch.trace, batch.step] = True
    return support, mask


def progressive_reasoning_gain(support: Tensor, mask: Tensor) -> Tensor:
    """PRG [B] in [-1, 1] from support p [B, K_max+1] and the mask of the k that each trace has.

        g_k = p_k - p_{k-1},   D = p_K - p_0,   steadiness = D^2 / (K * sum_k g_k^2)
        PRG = D * steadiness

    The steadiness is in [0, 1] by Cauchy-Schwarz: 1 if every step adds the same, 1/K if one step
    does it all (and 1 for K = 1). PRG is 0 where nothing changes, and -1 without an answer. The
    name and the idea are HyTuning's (arXiv 2604.08454); the formula is this project's.
    """
    p = support.double()
    g = (p[:, 1:] - p[:, :-1]) * mask[:, 1:]
    D = g.sum(-1)
    K = mask[:, 1:].sum(-1)
    energy = K * g.square().sum(-1)
    steadiness = torch.where(energy > 0, D.square() / energy.clamp(min=1e-300), 0.0)
    return torch.where(mask.any(-1), D * steadiness, -1.0).to(support.dtype)


# -----------------------------------------------------------------------------
# can the confidence be believed?

def reliability(confidence, correct, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean confidence, share that is right, number) of each bin of confidence that holds any.

    confidence [N] in [0, 1], correct [N] bool or 0/1; the bins are of equal width. Where confidence
    can be believed, the first two are equal. This and the three below raise ValueError for other
    values, NaN included, and unequal lengths.
    """
    confidence, correct = as_columns(confidence, correct)
    index = (confidence * bins).long().clamp(max=bins - 1)
    rows = []
    for b in index.unique():
        inside = index == b
        number = inside.sum().item()
        rows.append((confidence[inside].mean().item(), correct[inside].mean().item(), number))
    return rows


def expected_calibration_error(confidence, correct, bins: int = 10) -> float:
    """Mean distance of confidence [N] and accuracy over the bins above, weighted by their numbers.

    NaN for no data. Guo et al., 1706.04599.
    """
    total = 0
    distance = 0.0
    for mean, right, number in reliability(confidence, correct, bins):
        total += number
        distance += number * abs(mean - right)
    return distance / total if total else math.nan


def brier_score(confidence, correct) -> float:
    """Mean squared distance of confidence [N] and correctness [N]: 0 is perfect (Brier, 1950)."""
    confidence, correct = as_columns(confidence, correct)
    return (confidence - correct).square().mean().item()


def auroc(confidence, correct) -> float:
    """Probability that a right answer has more confidence than a wrong one, ties half.

    The Mann-Whitney statistic: 0.5 is chance; NaN where all are right or all wrong.
    """
    confidence, correct = as_columns(confidence, correct)
    values, rank_of = confidence.unique(return_inverse=True)
    count = torch.bincount(rank_of, minlength=len(values)).double()
    # Ranks count from 1; equal values share their mean rank.
    rank = (count.cumsum(0) - (count - 1) / 2)[rank_of]
    right = correct.sum()
    wrong = len(correct) - right
    return ((rank @ correct - right * (right + 1) / 2) / (right * wrong)).item()


def as_columns(confidence, correct) -> tuple[Tensor, Tensor]:
    confidence = torch.as_tensor(confidence, dtype=torch.double).cpu().flatten()
    correct = torch.as_tensor(correct, dtype=torch.double).cpu().flatten()
    if len(confidence) != len(correct) or not ((correct == 0) | (correct == 1)).all():
        raise ValueError("correct must be 0 or 1 for each entry of confidence")
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("confidence must lie in [0, 1]")
    return confidence, correct
