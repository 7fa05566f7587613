"""Does the reasoning progressively earn its answer? Support, PRG, and how far a confidence can be believed.

A *trace* is a prompt, reasoning steps and an answer introduced by a marker. *Support* p_k is the probability
of the answer when the marker follows directly after the first k steps. *PRG*, the progressive reasoning
gain, is the support gained from p_0 to p_K times how steadily it was gained. The second half measures a
confidence against what turned out to be right: calibration error, Brier score, AUROC.

The model is any callable `(input_ids, position_ids, attention_mask) -> logits`. This file imports nothing
of the project, so it can be taken alone. Next to read: hytuning.py.

SPDX-License-Identifier: MIT
"""
from dataclasses import dataclass, field

import torch
from torch import Tensor


# ------------------------------------------------------------------------------------- traces, packing

@dataclass
class Trace:
    """Token ids of prompt, reasoning, marker and answer, and where the reasoning may be cut.

    The prefix after k steps is tokens[:cuts[k]], k = 0..K, so cuts[0] is the length of the prompt;
    tokens[cuts[K]:answer_start] is the marker and tokens[answer_start:] the answer. `tail` is what follows
    the answer (an end token, say): it takes no part in the support. An empty answer means that none
    could be read. Raises ValueError for cuts that do not fit the tokens.
    """
    tokens: list[int]
    cuts: list[int]
    answer_start: int
    tail: list[int] = field(default_factory=list)

    def __post_init__(self):
        bounds = [1, *self.cuts, self.answer_start, len(self.tokens)]
        if not self.cuts or bounds != sorted(bounds):
            raise ValueError(f"cuts {self.cuts} and answer_start {self.answer_start} must rise from 1 (a prompt is "
                             f"not empty) to the number of tokens, {len(self.tokens)}")


@dataclass
class Packed:
    """Traces laid out for one pass: row b is trace b, then K copies of its marker and answer.

    Copy k sees the prefix up to cut k and itself, at the positions it would have there; the answer that ends
    the trace itself serves as copy K. So a trace of T tokens with an answer of A (marker included) costs
    T + K (A - 1) tokens instead of the (K+1) T of separate passes, and gives the same numbers.
    """
    input_ids: Tensor  # [B, W]
    position_ids: Tensor  # [B, W]
    attention_mask: Tensor  # [B, 1, W, W] bool, True where the query (first W) sees the key
    # One entry for each (trace, k, answer token): its row, k, the slot that predicts it, and its id. [N] each
    row: Tensor
    step: Tensor
    source: Tensor
    target: Tensor
    mask: Tensor  # [B, K_max+1] bool: the k that each trace has

    def support(self, logprobs: Tensor) -> Tensor:
        """p_k = exp(mean_t log pi(y_t | x, s_1..s_k, marker, y_<t)), [B, K_max+1], from logprobs [N]; else 0."""
        where = (self.row, self.step)
        total = torch.zeros(self.mask.shape, device=logprobs.device).index_put(where, logprobs, accumulate=True)
        count = torch.zeros_like(total).index_put(where, torch.ones_like(logprobs), accumulate=True)
        return torch.where(self.mask, (total / count.clamp(min=1)).exp(), 0.0)


def pack(traces: list[Trace], device=None) -> Packed:
    """Lay traces out for one pass (see Packed). A trace without an answer has no copies, and mask False."""
    ids, positions, owners, limits, cells = [], [], [], [], []
    for b, trace in enumerate(traces):
        K, end = len(trace.cuts) - 1, len(trace.tokens)
        row = trace.tokens + trace.tail
        position, owner, limit = list(range(len(row))), [0] * len(row), [end + len(trace.tail)] * len(row)
        block = trace.tokens[trace.cuts[K]:]  # marker and answer; the last token predicts nothing and is not copied
        for k in range(K + 1 if end > trace.answer_start else 0):
            cut, start = trace.cuts[k], trace.cuts[K] if k == K else len(row)
            if k < K:
                row, n = row + block[:-1], len(block) - 1
                position += range(cut, cut + n)
                owner, limit = owner + [k + 1] * n, limit + [cut] * n
            for t in range(trace.answer_start - trace.cuts[K], len(block)):  # t is 0 if there is no marker
                cells.append((b, k, start + t - 1 if t else cut - 1, block[t]))
        ids.append(row), positions.append(position), owners.append(owner), limits.append(limit)

    W, K_max = max(map(len, ids)), max(len(trace.cuts) for trace in traces) - 1
    ids, positions, owner, limit = (torch.tensor([row + [fill] * (W - len(row)) for row in table], device=device)
                                    for table, fill in ((ids, 0), (positions, 0), (owners, -1), (limits, 0)))
    slot = torch.arange(W, device=device)
    own = owner[:, :, None] == owner[:, None, :]  # padding sees padding, so that no row of the mask is empty
    prefix = (owner[:, None, :] == 0) & (slot[None, None, :] < limit[:, :, None])
    attention = (own | prefix) & (slot[:, None] >= slot)
    row, step, source, target = torch.tensor(cells, dtype=torch.long, device=device).reshape(-1, 4).T
    mask = torch.zeros(len(traces), K_max + 1, dtype=torch.bool, device=device)
    mask[row, step] = True
    return Packed(ids, positions, attention[:, None], row, step, source, target, mask)


# ------------------------------------------------------------------------------------------ support, PRG

@torch.no_grad()
def answer_support(model, traces: list[Trace], device=None, tokens: int = 2048) -> tuple[Tensor, Tensor]:
    """Support p_k of each trace after k = 0..K steps: (support [B, K_max+1], mask [B, K_max+1] bool).

    `model` is any callable `(input_ids, position_ids, attention_mask) -> logits [B, T, V]`. Where it also has
    `hidden_states` (with the same arguments) and `lm_head`, logits are computed only where an answer token is
    predicted. device defaults to that of the model's parameters; tokens are those of one pass, padding included.
    """
    if device is None:
        device = next((p.device for p in getattr(model, "parameters", list)()), None)
    K_max = max((len(trace.cuts) for trace in traces), default=1) - 1
    support = torch.zeros(len(traces), K_max + 1, device=device)
    mask = torch.zeros(len(traces), K_max + 1, dtype=torch.bool, device=device)
    for batch in batches_by_length([packed_length(trace) for trace in traces], tokens):
        packed = pack([traces[i] for i in batch], device)
        arguments = packed.input_ids, packed.position_ids, packed.attention_mask
        if hasattr(model, "hidden_states"):
            hidden, head = model.hidden_states(*arguments)[packed.row, packed.source], model.lm_head
        else:
            hidden, head = model(*arguments)[packed.row, packed.source], lambda logits: logits
        logprobs = torch.cat([head(h).float().log_softmax(-1).gather(1, target[:, None])[:, 0]
                              for h, target in zip(hidden.split(512), packed.target.split(512))])  # N x V is large
        rows, width = torch.tensor(batch, device=device), packed.mask.shape[1]
        support[rows, :width], mask[rows, :width] = packed.support(logprobs), packed.mask
    return support, mask


def packed_length(trace: Trace) -> int:
    """Slots that `pack` needs for this trace."""
    has_answer = len(trace.tokens) > trace.answer_start
    copies = (len(trace.cuts) - 1) * (len(trace.tokens) - trace.cuts[-1] - 1) if has_answer else 0
    return len(trace.tokens) + len(trace.tail) + copies


def batches_by_length(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices in batches of like length, each of at most `budget` slots with its padding (or one alone)."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def progressive_reasoning_gain(support: Tensor, mask: Tensor) -> Tensor:
    """PRG [B] in [-1, 1] from support p [B, K_max+1] and the mask [B, K_max+1] of the k that each trace has.

        g_k = p_k - p_{k-1},   D = p_K - p_0,   PRG = D * D^2 / (K * sum_k g_k^2)

    The factor after D is the steadiness, in [0, 1] by Cauchy-Schwarz: 1 if every step adds the same, 1/K if
    one step does it all, as the only step of K = 1 does. PRG is 0 where nothing changes, and -1 for a row whose
    mask is empty: no answer.
    The name and the idea are HyTuning's (arXiv 2604.08454); the formula is this project's.
    """
    p = support.double()
    g = (p[:, 1:] - p[:, :-1]) * mask[:, 1:]
    D, K = g.sum(-1), mask[:, 1:].sum(-1)
    energy = K * g.square().sum(-1)
    steadiness = torch.where(energy > 0, D.square() / energy.clamp(min=1e-300), 0.0)
    return torch.where(mask.any(-1), D * steadiness, -1.0).to(support.dtype)


# ------------------------------------------------------------------------- can the confidence be believed?

def expected_calibration_error(confidence, correct, bins: int = 10) -> float:
    """Mean distance between confidence and accuracy over equal bins of confidence, weighted by their size.

    confidence [N] in [0, 1], correct [N] bool or 0/1. Guo et al., arXiv 1706.04599. nan for no data.
    """
    confidence, correct = as_columns(confidence, correct)
    index = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.double).index_add(0, index, confidence - correct)
    return (gaps.abs().sum() / len(confidence)).item()


def brier_score(confidence, correct) -> float:
    """Mean squared distance between confidence [N] and correctness [N]: 0 is perfect (Brier, 1950)."""
    confidence, correct = as_columns(confidence, correct)
    return (confidence - correct).square().mean().item()


def auroc(confidence, correct) -> float:
    """Probability that a right answer has more confidence than a wrong one, ties half (Mann-Whitney).

    0.5 is chance; nan where all are right or all wrong.
    """
    confidence, correct = as_columns(confidence, correct)
    values, rank_of = confidence.unique(return_inverse=True)
    count = torch.bincount(rank_of, minlength=len(values)).double()
    rank = (count.cumsum(0) - (count - 1) / 2)[rank_of]  # from 1; equal values share their mean rank
    right, wrong = correct.sum(), (1 - correct).sum()
    return ((rank @ correct - right * (right + 1) / 2) / (right * wrong)).item()


def as_columns(confidence, correct) -> tuple[Tensor, Tensor]:
    confidence = torch.as_tensor(confidence, dtype=torch.double).cpu().flatten()
    correct = torch.as_tensor(correct, dtype=torch.double).cpu().flatten()
    if len(confidence) != len(correct) or ((confidence < 0) | (confidence > 1)).any():
        raise ValueError("confidence must lie in [0, 1] and have one entry for each entry of correct")
    return confidence, correct
