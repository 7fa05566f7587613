"""Tests of the code against naive loops, `transformers`, hand computations and finite differences.

The order is prg, hytuning, model, sampling, data, train, several processes, README. All tests take
about three minutes on a CPU. Those that need `transformers` or `hypothesis` are skipped if it is
not installed.

SPDX-License-Identifier: MIT
"""
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

import data
import hytuning
import model as decoder
import prg
import train
from hytuning import (adaptive_weights, distillation_loss, group_advantages, head_logprobs,
                      hytuning_loss, learning_signals, pool_by_answer, rlif_loss,
                      self_certainty, token_logprobs, trace_weights, weigh_queries)
from model import CheckpointError, Config, Decoder, generate, load_pretrained, save_pretrained
from prg import (Trace, answer_support, auroc, brier_score, expected_calibration_error, pack,
                 packed_support, progressive_reasoning_gain)

try:
    from hypothesis import given, settings, strategies as st
    settings.register_profile("here", deadline=None, derandomize=True)
    settings.load_profile("here")
except ImportError:
    st = MagicMock()

    def given(*_, **__):
        return pytest.mark.skip(reason="hypothesis is not installed")
    settings = given

VOCAB = 61


def tiny(vocab=VOCAB, **options) -> Decoder:
    """Return a random decoder, far enough from uniform that a wrong mask or position shows."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, initializer_range=0.3)
    return Decoder(Config(vocab, **{**sizes, **options})).eval()


def transformers():
    return pytest.importorskip("transformers", reason="it is needed for comparison")


def close(a, b, tolerance=1e-6):
    a, b = (torch.as_tensor(x).detach() for x in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


MODEL = tiny()

# -----------------------------------------------------------------------------
# prg


def test_gain_rewards_steady_support():
    for supports, expected in (
            ([0, 0.25, 0.5, 0.75, 1], 1),  # equal steps from 0 to 1
            ([0, 0, 0, 0.9, 0.9], 0.9 / 4),  # one of K steps gains all: 1/K of the gain
            ([0.99, 0.99, 0.99], 0),  # the support never changes
            ([1, 0.5, 0], -1), ([0.2, 0.7], 0.5), ([0.7], 0)):
        p = torch.tensor([supports])
        found = progressive_reasoning_gain(p, torch.ones_like(p, dtype=torch.bool))
        assert found.item() == pytest.approx(expected)


def gain_by_definition(p: list[float]) -> float:
    if not p:
        return -1.0
    steps = [b - a for a, b in zip(p, p[1:])]
    if not any(steps):
        return 0.0
    return (p[-1] - p[0])**3 / (len(steps) * sum(g * g for g in steps))


@given(st.lists(st.lists(st.floats(0, 1, width=32), max_size=7), min_size=1, max_size=5))
def test_gain_matches_its_definition_and_bounds_for_any_padding(rows):
    width = max(map(len, rows)) + 1
    # The values in the padding must not matter.
    p = torch.full((len(rows), width), 0.5)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        p[i, :len(row)] = torch.tensor(row)
        mask[i, :len(row)] = True
    found = progressive_reasoning_gain(p, mask)
    close(found, [gain_by_definition(row) for row in rows])
    assert found.abs().max() <= 1 + 1e-6


def test_final_support_is_the_support_after_the_last_step_or_0():
    p = torch.tensor([[0.1, 0.6, 0.0], [0.2, 0.3, 0.4], [0.9, 0.9, 0.9]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    close(prg.final_support(p, mask), [0.6, 0.4, 0])


def make_trace(steps, prompt=3, marker=2, answer=2, tail=0, seed=0) -> Trace:
    """Return a random trace with parts of these lengths. Prompts of one length are equal."""
    cuts = [prompt]
    for length in steps:
        cuts.append(cuts[-1] + length)
    start = cuts[-1] + marker
    rng = random.Random(seed)
    response = [rng.randrange(VOCAB) for _ in range(start + answer + tail - prompt)]
    return Trace([*range(20, 20 + prompt), *response], cuts, start, start + answer)


# Traces with different numbers of steps. Some have repeated cuts, no step, an answer of one token,
# no marker, no answer or a tail. Some neighbours have the same prompt, others have different ones.
TRACES = [make_trace([4, 3, 5]), make_trace([2] * 6, seed=1), make_trace([3, 0, 0, 2], seed=2),
          make_trace([], seed=3), make_trace([3, 2], answer=1, tail=2, seed=4),
          make_trace([3, 2], prompt=4, marker=0, seed=5),
          make_trace([2, 2], prompt=4, marker=0, answer=1, seed=6),
          make_trace([3], answer=0, tail=1, seed=7),
          make_trace([1, 1], prompt=1, tail=3, answer=4, seed=8),
          make_trace([2, 6], prompt=1, answer=3, seed=9)]


def test_support_equals_exp_of_minus_the_answer_loss_of_transformers():
    tf = transformers()
    torch.manual_seed(0)
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.3)).eval()
    support, mask = answer_support(lambda ids: llama(ids).logits, TRACES)
    for trace, p, m in zip(TRACES, support, mask):
        expected = []
        for cut in trace.cuts if trace.answer else []:
            ids = torch.tensor([trace.tokens[:cut] + trace.tokens[trace.cuts[-1]:trace.answer_end]])
            labels = ids.clone()
            labels[:, :ids.shape[1] - len(trace.answer)] = -100  # no loss for these
            expected.append(math.exp(-llama(ids, labels=labels).loss.item()))
        assert m.tolist() == [True] * len(expected) + [False] * (len(m) - len(expected))
        close(p[m], expected, 1e-5)
        assert p[~m].tolist() == [0] * (len(m) - len(expected))


def check_packed_support(traces, tokens=2048, width=1024):
    support, mask = answer_support(MODEL, traces)
    with patch.object(prg, "pack", partial(pack, width=width)):
        packed, packed_mask = packed_support(MODEL, traces, tokens)
    assert torch.equal(packed_mask, mask)
    close(packed, support, 1e-5)


def test_packed_support_equals_support_from_separate_passes():
    check_packed_support(TRACES)
    check_packed_support([])


SHAPES = st.builds(make_trace, st.lists(st.integers(0, 4), max_size=4), st.integers(1, 3),
                   st.integers(0, 2), st.integers(0, 3), st.integers(0, 2), st.integers(0, 99))


@settings(max_examples=40)
@given(st.lists(SHAPES, min_size=1, max_size=6), st.sampled_from([1, 64, 2048]), st.integers(1, 99))
def test_packed_support_of_random_traces(traces, tokens, width):
    check_packed_support(traces, tokens, width)


def prg_by_definition(model, trace) -> float:
    support, mask = answer_support(model, [trace])
    return gain_by_definition(support[mask].tolist())


def plain_logprobs(model, trace) -> torch.Tensor:
    """Return log pi of each token of the response, [T], from a separate pass."""
    logits = model(torch.tensor([trace.tokens]))[0, trace.cuts[0] - 1:-1]
    return token_logprobs(logits, torch.tensor(trace.response))


# Three prompts with five responses each, of 3 to 20 tokens.
GROUPS = [make_trace([2 * j, j], prompt=3 + 4 * i, tail=1, seed=5 * i + j)
          for i in range(3) for j in range(5)]


@pytest.mark.parametrize("width, tokens, rows", [(1, 1, 15), (30, 64, 10), (48, 256, 6),
                                                 (1024, 2048, 3)])
def test_packed_responses_match_log_probabilities_and_gradients_of_separate_passes(
        width, tokens, rows):
    """In the first case each row holds one response, and there is no mask."""
    model = tiny()
    factors = torch.linspace(-1, 1, len(GROUPS))
    found = {}
    batches = pack(GROUPS, copies=False, tokens=tokens, width=width)
    assert sum(len(batch.input_ids) for batch in batches) == rows
    for batch in batches:
        one_response_a_row = len(batch.trace) == len(batch.input_ids)
        assert (batch.attention_mask is None) == one_response_a_row
    for batch in batches:
        for i, row, mask in zip(batch.trace.tolist(), train.Policy(model)(batch), batch.mask):
            found[i] = row[mask]
    plain = [plain_logprobs(model, trace) for trace in GROUPS]
    for i, expected in enumerate(plain):
        close(found[i], expected, 1e-5)
    packed_loss = sum(factor * found[i].sum() for i, factor in enumerate(factors))
    plain_loss = sum(factor * x.sum() for factor, x in zip(factors, plain))
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(packed_loss, parameters),
                    torch.autograd.grad(plain_loss, parameters)):
        close(a, b, 1e-4)


@pytest.mark.parametrize("tokens", [1, 100, 300, 2048])
def test_a_packed_batch_has_at_most_the_given_number_of_tokens(tokens):
    for batch in pack(GROUPS, False, tokens, 30) + pack(GROUPS, True, tokens, 60):
        assert batch.input_ids.numel() <= tokens or len(batch.input_ids) == 1


def test_invalid_cuts_raise_an_error():
    for cuts, start, end in (([], 2, 4), ([0, 1], 2, 4), ([2, 1], 3, 4), ([1, 3], 2, 4),
                             ([1], 9, 9), ([1], 3, 2), ([1], 2, 5)):
        with pytest.raises(ValueError, match="cuts"):
            Trace([1, 2, 3, 4], cuts, start, end)
    trace = Trace([1, 2, 3, 4], [2, 3], 3)
    assert (trace.prompt, trace.response, trace.answer_end) == ([1, 2], [3, 4], 4)


# A confidence is k of n votes. With integers, its bin is computed without rounding.
VOTE = st.integers(1, 20).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n), st.booleans()))


@given(st.lists(VOTE, min_size=1, max_size=40))
def test_calibration_measures_match_their_definitions(votes):
    confidence = [k / n for k, n, _ in votes]
    correct = torch.tensor([right for _, _, right in votes])
    bins = {}
    for k, n, right in votes:
        bins.setdefault(min(10 * k // n, 9), []).append(k / n - right)
    expected = sum(abs(sum(gaps)) for gaps in bins.values()) / len(votes)
    close(expected_calibration_error(confidence, correct), expected)
    rows = prg.reliability(confidence, correct)
    assert [number for _, _, number in rows] == [len(bins[b]) for b in sorted(bins)]
    for (mean, right, _), b in zip(rows, sorted(bins)):
        close(mean - right, sum(bins[b]) / len(bins[b]))
        assert min(int(10 * mean + 1e-9), 9) == b
    errors = [(k / n - right)**2 for k, n, right in votes]
    close(brier_score(confidence, correct), sum(errors) / len(votes))
    pairs = []
    for a, right in zip(confidence, correct):
        for b, other in zip(confidence, correct):
            if right and not other:
                pairs.append((a > b) + 0.5 * (a == b))
    expected = sum(pairs) / len(pairs) if pairs else math.nan
    assert auroc(confidence, correct) == pytest.approx(expected, nan_ok=True)


def test_invalid_confidences_raise_an_error():
    for confidence, correct in (([1.5], [1]), ([0.5], [2]), ([0.5, 0.5], [1])):
        with pytest.raises(ValueError):
            brier_score(confidence, correct)


# -----------------------------------------------------------------------------
# hytuning

def random_logits(*shape, dtype=torch.double):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=dtype) * 2


def test_self_certainty_matches_its_definition():
    logits = random_logits(3, 5, 7)
    pi = logits.softmax(-1)
    V = 7
    divergence = sum(1 / V * torch.log(1 / V / pi[..., v]) for v in range(V))  # KL(U || pi)
    close(self_certainty(logits), divergence)
    targets = torch.arange(15).reshape(3, 5) % V
    close(token_logprobs(logits, targets), pi.gather(-1, targets[..., None])[..., 0].log())
    close(self_certainty(torch.full((2, 9), 3.0)), [0.0, 0.0])


def test_advantages_are_normalized_within_each_group(recwarn):
    rewards = random_logits(12)
    A = group_advantages(rewards, 4).view(3, 4)
    r = rewards.view(3, 4)
    close(A.mean(1), [0.0] * 3)
    close(A.std(1, unbiased=False), [1.0] * 3, 1e-3)
    assert ((A > 0) == (r > r.mean(1, keepdim=True))).all(), "a sign is never flipped"
    assert (A.argsort(1) == r.argsort(1)).all()
    assert group_advantages(rewards, 1).tolist() == [0] * 12 and not recwarn.list
    for reward, group in ((0.1, 3), (1000.1, 8), (-7.3, 6)):
        for dtype in (torch.float32, torch.float64):
            equal = torch.full((2 * group,), reward, dtype=dtype)
            assert group_advantages(equal, group).tolist() == [0] * len(equal), "exactly"
    with pytest.raises(ValueError):
        group_advantages(rewards, 5)


def weight_by_definition(gain: float, anchor: float, tau: float) -> float:
    return 2 / (1 + math.exp(-min((gain - anchor) / max(anchor, 0.05), 0) / tau))


def test_adaptive_weights_are_relative_to_the_anchor():
    gains = torch.linspace(-1, 1, 21, requires_grad=True)
    for anchor, tau in ((0.5, 0.25), (0.9, 1.0), (-0.3, 1.0), (0.02, 1.0), (0.3, 1e9)):
        w = adaptive_weights(gains, torch.tensor(anchor, requires_grad=True), tau)
        close(w, [weight_by_definition(x, anchor, tau) for x in gains.tolist()])
        assert (w.diff() >= 0).all() and not w.requires_grad
        assert (w[gains >= anchor] == 1).all(), "more pays no more"


def test_an_answer_earns_the_weights_of_its_rollouts():
    w = torch.tensor([1.0, 0.5, 0.25, 1.0, 0.5, 0.5, 0.0, 0.25], requires_grad=True)
    # Two groups: a number means nothing in the other one.
    answers = torch.tensor([0, 1, 0, 3, 0, 0, 0, 0])
    e = pool_by_answer(w, answers, 4)
    close(e, [1.25 / 4, 0.5 / 4, 1.25 / 4, 1 / 4, *[1.25 / 4] * 4])
    assert not e.requires_grad
    votes = pool_by_answer(torch.ones(8), answers, 4)
    close(votes, [0.5, 0.25, 0.5, 0.25, 1, 1, 1, 1])
    assert len(pool_by_answer(w[:0], answers[:0], 4)) == 0, "a process may have no query"


def test_advantages_and_earned_shares_of_each_method():
    """Values are computed by hand for two groups of four. The number -1 means no answer."""
    c = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    prg = torch.tensor([0.2, 0.05, 0.4, -1.0, 0.1, -1.0, 0.2, 0.3])
    answers = torch.tensor([0, 1, 0, -1, 0, -1, 2, 0])
    w = [1, weight_by_definition(0.05, 0.2, 0.5), 1, 0,
         weight_by_definition(0.1, 0.2, 0.5), 0, 1, 1]
    expected = {
        "rd": ([0] * 8, [0] * 8), "rlif": (c.tolist(), [1] * 8), "static": (c.tolist(), [0.5] * 8),
        "votes": ([4 / 4, 2 / 4, 4 / 4, 0, 13 / 4, 0, 7 / 4, 13 / 4],
                  [2 / 4, 1 / 4, 2 / 4, 0, 2 / 4, 0, 1 / 4, 2 / 4]),
        "hytuning": ([4 / 4, w[1] * 2 / 4, 4 / 4, 0, (w[4] * 5 + 8) / 4, 0, 7 / 4,
                      (w[4] * 5 + 8) / 4],
                     [2 / 4, w[1] / 4, 2 / 4, 0, (w[4] + 1) / 4, 0, 1 / 4, (w[4] + 1) / 4])}
    expected["support"] = expected["hytuning"]
    for method, (r, e) in expected.items():
        A, earned = learning_signals(method, c, prg, answers, 4, anchor=0.2)
        close(A, group_advantages(torch.tensor(r).float(), 4))
        close(earned, e)
    assert set(expected) == set(train.METHODS)
    for method in ("rd", "rlif", "static", "votes"):
        A, earned = learning_signals(method, c, None, answers, 4)
        assert len(A) == len(earned) == 8, "PRG and anchor are not used"
    with pytest.raises(ValueError, match="magic"):
        learning_signals("magic", c, prg, answers, 4, 0.2)
    nothing = torch.zeros(0)
    assert [len(x) for x in learning_signals("hytuning", *[nothing] * 3, 4, 0.2)] == [0, 0]


def test_queries_are_weighted_by_their_earned_shares():
    A = torch.tensor([1.0, -1.0, 2.0, -2.0])
    e = torch.tensor([0.2, 0.4, 0.0, 0.1])
    lam = e.mean().item()
    close(weigh_queries(A, e, lam, 2), A * torch.tensor([0.3, 0.3, 0.05, 0.05]) / lam)
    assert weigh_queries(A, torch.zeros(4), 0.0, 2).tolist() == [0] * 4


def test_advantages_are_0_if_no_rollout_has_an_answer():
    """If their weights were above 0, small rewards would be normalized to large advantages."""
    none = torch.full((4,), -1)
    for anchor in (-0.5, 0.9):
        A, e = learning_signals("hytuning", torch.rand(4), -torch.ones(4), none, 4, anchor)
        assert A.tolist() == e.tolist() == [0, 0, 0, 0]


def test_only_hytuning_and_support_weight_traces_by_their_evidence():
    prg = torch.tensor([0.3, 0.1, -0.2])
    p_K = torch.tensor([0.9, 0.8, 0.1])
    assert hytuning.choose_evidence("hytuning", prg, p_K) is prg
    assert hytuning.choose_evidence("support", prg, p_K) is p_K
    w = torch.tensor([weight_by_definition(x, 0.2, 0.5) for x in prg.tolist()])
    close(trace_weights("hytuning", prg, 0.2), w / w.mean())
    assert trace_weights("votes", prg, 0.2).tolist() == [1, 1, 1]


def some_losses():
    """Return log-probabilities of 4 sequences of up to 5 tokens, their mask and advantages."""
    logprobs = (-random_logits(4, 5).abs() - 0.1).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    return logprobs, mask.double(), torch.tensor([1.5, -0.5, 0.25, -1.25], dtype=torch.double)


def test_losses_and_the_policy_gradient_match_hand_computations():
    logprobs, mask, A = some_losses()
    v = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.double)
    nll = -(logprobs * mask).sum(1)
    objective = -(A * (logprobs * mask).sum(1) / torch.tensor([3, 5, 2, 1])).sum() / 4
    rd = distillation_loss(logprobs, mask)
    rlif = rlif_loss(logprobs, mask, A.requires_grad_())
    close(rd, nll.sum() / 11)
    close(distillation_loss(logprobs, v[:, None] * mask, 11), (v * nll).sum() / 11)
    close(rlif, -A.mean())
    close(hytuning_loss(rd, rlif, 0.3), 0.7 * rd + 0.3 * rlif)
    # The gradient depends on the policy although the value does not. A has no gradient.
    expected, = torch.autograd.grad(objective, logprobs, retain_graph=True)
    close(*torch.autograd.grad(rlif, logprobs, retain_graph=True), expected)
    assert torch.autograd.grad(rlif, A, allow_unused=True) == (None,)


def test_the_policy_gradient_of_the_decoder_matches_a_finite_difference():
    """The slopes of -sum A mean log pi / n in a random direction are compared in float64."""
    model = tiny().double()
    ids = torch.arange(20).reshape(2, 10) % VOCAB
    A = torch.tensor([1.0, -0.6]).double()
    rlif_loss(token_logprobs(model(ids)[:, :-1], ids[:, 1:]), torch.ones(2, 9), A).backward()
    parameters = list(model.parameters())
    torch.manual_seed(2)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction))
    values = []
    with torch.no_grad():
        for move in (1e-5, -2e-5):
            for p, d in zip(parameters, direction):
                p += move * d
            logprobs = token_logprobs(model(ids)[:, :-1], ids[:, 1:])
            values.append(-(A * logprobs.mean(1)).mean())
    close(slope, (values[0] - values[1]) / 2e-5, 1e-5)


def test_head_logprobs_in_pieces_match_the_plain_computation():
    hidden = random_logits(1100, 6, dtype=torch.float).requires_grad_()
    targets = torch.arange(1100) % 23
    head = nn.Linear(6, 23, bias=False)
    seen = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    pieces = head_logprobs(hidden, head, targets)
    grads = torch.autograd.grad(pieces.sin().sum(), (hidden, head.weight))
    assert sorted(seen) == [76, 76, 512, 512, 512, 512], "never all at once, and again in backward"
    plain = token_logprobs(head(hidden), targets)
    close(pieces, plain)
    for a, b in zip(grads, torch.autograd.grad(plain.sin().sum(), (hidden, head.weight))):
        close(a, b, 1e-5)


# -----------------------------------------------------------------------------
# model

LLAMA3 = dict(rope_type="llama3", rope_theta=5e3, factor=4.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=16)
CHECKPOINTS = {
    "llama": ("Llama", {}), "tied": ("Llama", dict(tie_word_embeddings=True)),
    "no GQA": ("Llama", dict(num_key_value_heads=6)),
    "one key head": ("Llama", dict(num_key_value_heads=1)),
    "biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "head_dim": ("Llama", dict(head_dim=16)), "llama3": ("Llama", dict(rope_parameters=LLAMA3)),
    "mistral": ("Mistral", dict(sliding_window=7)),
    "mistral, no window": ("Mistral", dict(sliding_window=None)), "qwen2": ("Qwen2", {}),
    "qwen2, window off": ("Qwen2", dict(use_sliding_window=False, sliding_window=5)),
    "qwen2, window": ("Qwen2", dict(use_sliding_window=True, sliding_window=6,
                                    max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3, layer_types": ("Qwen3", dict(
        head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"]))}
WINDOWS = {"mistral": 7, "qwen2, window": 6, "qwen3, layer_types": 5}
IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(3))


def write_checkpoint(folder, family="Llama", options={}, dtype=torch.float32, **how):
    """Write a random tiny model with transformers, and return it."""
    tf = transformers()
    sizes = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                 num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256)
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**{**sizes, **options})
    theirs = getattr(tf, f"{family}ForCausalLM")(config).eval()
    # Change the ones and zeros that would hide a mistake.
    for name, p in theirs.named_parameters():
        nn.init.normal_(p, float("norm" in name), 0.3 if p.ndim == 1 else 0.15)
    theirs.to(dtype).save_pretrained(folder, **how)
    return theirs


def reopened(folder):
    """Open a model with transformers, which must find all of its weights and no others."""
    theirs, info = transformers().AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return theirs.eval()


def edit_json(path, **changes):
    """Change fields of a JSON file. A field whose value is ... is removed."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_the_decoder_matches_transformers_after_loading_and_saving(name, tmp_path):
    theirs = write_checkpoint(tmp_path / "theirs", *CHECKPOINTS[name])
    ours = load_pretrained(tmp_path / "theirs")
    assert ours.config.context == WINDOWS.get(name, 256)
    n = min(40, ours.config.context)
    ids = IDS[:, :n]
    close(ours(ids), theirs(ids).logits, 1e-4)
    prompts = [ids[0, :n // 3], ids[1, :1]]
    how = dict(max_new_tokens=n - n // 3, do_sample=False, eos_token_id=None, pad_token_id=0)
    greedy = [theirs.generate(p[None], attention_mask=torch.ones_like(p)[None], **how)[0, len(p):]
              for p in prompts]
    found = generate(ours, [p.tolist() for p in prompts], max_new_tokens=n - n // 3, temperature=0)
    assert found == [[g.tolist()] for g in greedy]
    save_pretrained(ours, tmp_path / "ours")
    close(reopened(tmp_path / "ours")(ids).logits, theirs(ids).logits, 1e-5)


@pytest.mark.parametrize("name", WINDOWS)
@torch.no_grad()
def test_sequences_longer_than_the_sliding_window_raise_an_error(name, tmp_path):
    theirs = write_checkpoint(tmp_path, *CHECKPOINTS[name])
    ours = load_pretrained(tmp_path)
    longer = IDS[:, :WINDOWS[name] + 1]
    with pytest.raises(ValueError, match="sliding window"):
        generate(ours, [[1], longer[0, :3].tolist()], max_new_tokens=WINDOWS[name] - 2)
    with pytest.raises(ValueError, match="sliding window"):
        ours(longer)
    ours.config.sliding_window = None
    assert (ours(longer) - theirs(longer).logits).abs().max() > 1e-3, "no sooner than they must"


@pytest.mark.parametrize("rope", [dict(rope_type="default", rope_theta=5e3), LLAMA3])
def test_an_older_config_gives_the_same_rope_frequencies(rope):
    """An older config has `rope_theta` and `rope_scaling`, with `type` for `rope_type`."""
    raw = dict(model_type="llama", vocab_size=9, hidden_size=8, intermediate_size=8,
               num_hidden_layers=1, num_attention_heads=1)
    newer = Config.from_dict({**raw, "rope_parameters": rope})
    scaling = {k.removeprefix("rope_"): v for k, v in rope.items() if k != "rope_theta"}
    older = Config.from_dict({**raw, "rope_theta": 5e3, "rope_scaling": scaling})
    close(decoder.rope_frequencies(older.rope_parameters, 8),
          decoder.rope_frequencies(newer.rope_parameters, 8))


@torch.no_grad()
def test_a_bfloat16_file_becomes_a_float32_model(tmp_path):
    write_checkpoint(tmp_path, dtype=torch.bfloat16)
    ours = load_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    close(ours(IDS), reopened(tmp_path)(IDS).logits, 1e-4)
    halved = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert halved.lm_head.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert halved(IDS).dtype == ours(IDS).dtype == torch.float32


@torch.no_grad()
def test_shards_are_read_and_one_file_is_written(tmp_path):
    theirs = write_checkpoint(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ours = load_pretrained(tmp_path)
    close(ours(IDS), theirs(IDS).logits, 1e-4)
    # Save over the shards, which must not be read any more.
    nn.init.ones_(ours.lm_head.weight)
    save_pretrained(ours, tmp_path)
    for again in (load_pretrained(tmp_path)(IDS), reopened(tmp_path)(IDS).logits):
        close(again, ours(IDS), 1e-5)


@torch.no_grad()
def test_an_untied_head_and_the_end_tokens_are_saved(tmp_path):
    """config.json may say that the head is tied. Both JSON files must list the end tokens."""
    untied = tiny()
    untied.files["generation_config.json"] = b'{"eos_token_id": 3, "top_k": 5}'
    save_pretrained(untied, tmp_path / "a")
    edit_json(tmp_path / "a" / "config.json", tie_word_embeddings=True, eos_token_id=7)
    ours = load_pretrained(tmp_path / "a")
    assert ours.eos_ids == (3,), "generation_config.json comes first"
    ours.eos_ids = (3, 9)
    save_pretrained(ours, tmp_path / "b")
    again = load_pretrained(tmp_path / "b")
    assert again.eos_ids == (3, 9)
    assert torch.equal(again(IDS % VOCAB), untied(IDS % VOCAB))
    generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [3, 9], "top_k": 5}
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["eos_token_id"] == [3, 9] and config["tie_word_embeddings"] is False
    mode = (tmp_path / "b" / "config.json").stat().st_mode
    assert (tmp_path / "b" / "model.safetensors").stat().st_mode == mode, "the same may read both"


@pytest.mark.parametrize("error, expected", [
    (OSError, OSError), (RuntimeError, OSError), (SafetensorError, OSError),
    (KeyboardInterrupt, KeyboardInterrupt)])
def test_an_interrupted_write_leaves_the_old_file_and_no_temporary_file(error, expected, tmp_path):
    def write_half(path):
        path.write_text("ha")
        raise error("disk full")

    (tmp_path / "file").write_text("whole")
    with pytest.raises(expected, match="disk full"):
        decoder.atomic_write(tmp_path / "file", write_half)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "whole"


# Changes to config.json, and what the message must name.
BAD_CONFIGS = [
    (dict(model_type="gpt2"), "'gpt2'"), (dict(hidden_size=...), "hidden_size"),
    (dict(hidden_size="32"), ""), (dict(vocab_size=10**30), ""), (dict(num_attention_heads=0), ""),
    (dict(num_key_value_heads=3), "num_key_value_heads"), (dict(head_dim=7), "7"),
    (dict(hidden_act="gelu"), "'gelu'"), (dict(quantization_config={"bits": 4}), "quantized"),
    (dict(rope_parameters={"rope_type": "linear", "factor": 2.0}), "'linear'"),
    (dict(rope_parameters=..., rope_scaling={"type": "yarn", "factor": 4.0}), "'yarn'"),
    (dict(rope_parameters={"rope_type": "llama3"}), ""), (dict(rope_scaling=LLAMA3), "rope_"),
    (dict(rope_parameters={"full_attention": {}}), "RoPE"), (dict(rope_theta=7.0), "rope_theta"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor")]


@pytest.mark.parametrize("changes, named", BAD_CONFIGS)
def test_an_unsupported_config_is_named_in_one_line(changes, named, tmp_path):
    save_pretrained(MODEL, tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=f"config.json.*{named}") as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, content, named", [
    ("config.json", None, "config.json"), ("config.json", b"{", "config.json"),
    ("config.json", b"[" * 10**5, "config.json"), ("config.json", b"[]", "config.json"),
    ("generation_config.json", b"?", "generation_config.json"),
    ("generation_config.json", b'{"eos_token_id": "</s>"}', "eos_token_id"),
    ("model.safetensors", None, "model.safetensors"),
    ("model.safetensors", b"x" * 99, "model.safetensors"),
    ("model.safetensors", lambda x: x[:-100], "model.safetensors"),
    ("model.safetensors", lambda x: x.replace(b"lm_head", b"lm_tail"), "lm_tail"),
    ("model.safetensors", lambda x: x.replace(b"[61,32]", b"[32,61]"), "size mismatch"),
    ("model.safetensors.index.json", b"{}", "weight_map"),
    ("model.safetensors.index.json", b'{"weight_map": {"a": "model-2.safetensors"}}', "model-2")])
def test_a_broken_checkpoint_is_named_in_one_line(name, content, named, tmp_path):
    folder = tmp_path / "checkpoint, é 漢"
    save_pretrained(MODEL, folder)
    load_pretrained(folder)
    if callable(content):
        content = content((folder / name).read_bytes())
    if content is None or "index" in name:
        (folder / name.removesuffix(".index.json")).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=named) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)


# -----------------------------------------------------------------------------
# sampling

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [5, 6, 8]]
ENDS = (3, 20, 40)
SAMPLING = dict(samples_per_prompt=10, max_new_tokens=50, temperature=1.5, seed=("a", 7))


@pytest.mark.parametrize("vocab, temperature, top_p", [
    (5, 1.0, 1.0), (600, 2.0, 1.0), (40, 0.6, 0.9), (600, 2.0, 0.9), (40, 1.0, 0.05)])
def test_draws_follow_the_distribution_of_the_smallest_nucleus(vocab, temperature, top_p):
    """With evenly spaced numbers, the frequency of each token equals its probability."""
    logits = random_logits(vocab)
    p = (logits / temperature).softmax(-1)
    expected = torch.zeros(vocab, dtype=torch.double)
    for token in p.argsort(descending=True):
        if expected.sum() < top_p or top_p == 1:
            expected[token] = p[token]
    expected /= expected.sum()
    n = 20000
    u = (torch.arange(n) + 0.5) / n
    drawn = decoder.draw(logits.float().expand(n, -1), u, temperature, top_p)
    assert ((torch.bincount(drawn, minlength=vocab) - n * expected).abs() < 1.1).all()


def watched(logits):
    """Return a statistic [2, R] of logits [R, V]."""
    return torch.stack((self_certainty(logits), logits.amax(-1)))


@pytest.mark.parametrize("temperature, top_p", [(1.5, 1.0), (1.5, 0.8), (0, 1.0)])
@torch.no_grad()
def test_samples_and_their_statistic_match_passes_without_a_cache(temperature, top_p):
    """Each token is drawn again, from the logits of the whole text and the same random number."""
    sampling = {**SAMPLING, "temperature": temperature}
    n = SAMPLING["max_new_tokens"]
    keep = decoder.Cache.keep
    with patch.object(decoder.Cache, "keep", autospec=True, side_effect=keep) as compacted:
        samples, means = generate(MODEL, PROMPTS, eos_ids=ENDS, top_p=top_p, statistic=watched,
                                  **sampling)
    u = decoder.uniforms(PROMPTS, 10, n, SAMPLING["seed"]).view(len(PROMPTS), 10, n)
    for i, prompt in enumerate(PROMPTS):
        for j, sample in enumerate(samples[i]):
            logits = MODEL(torch.tensor([prompt + sample]))[0, len(prompt) - 1:-1]
            drawn = decoder.draw(logits, u[i, j, :len(sample)], temperature, top_p)
            assert drawn.tolist() == sample
            assert not any(x in ENDS for x in sample[:-1])
            assert sample[-1] in ENDS or len(sample) == n
            close(means[:, i, j], watched(logits).mean(-1), 1e-4)
    lengths = sorted(len(sample) for group in samples for sample in group)
    assert lengths[0] < 16 and lengths[-1] > 32 and compacted.called, "or nothing was tested"


@torch.no_grad()
def test_bfloat16_sampling_with_large_keys_agrees_with_passes_without_a_cache():
    """Attention scores rounded to bfloat16 give an error of 0.010, float32 scores one of 0.002."""
    model = tiny(qkv_bias=True)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.k_proj.bias, std=100)
    model.bfloat16()
    samples, means = generate(model, PROMPTS, samples_per_prompt=10, max_new_tokens=30,
                              statistic=self_certainty)
    errors = []
    for i, prompt in enumerate(PROMPTS):
        for j, sample in enumerate(samples[i]):
            logits = model(torch.tensor([prompt + sample]))[0, len(prompt) - 1:-1].float()
            errors.append(means[i, j] - self_certainty(logits).mean())
    assert torch.stack(errors).square().mean().sqrt() < 0.005


def test_random_numbers_use_all_bits_of_their_hash():
    """A 32-bit seed would be equal for these two prompts."""
    u = decoder.uniforms([[98983], [102828]], 1, 9, seed=0)
    assert not (u[0] == u[1]).any()
    assert (u >= 0).all() and (u < 1).all() and u.dtype == torch.float32


def test_a_sample_depends_only_on_its_prompt_its_number_and_the_seed():
    whole = generate(MODEL, PROMPTS, eos_ids=ENDS, **SAMPLING)
    assert len({tuple(sample) for group in whole for sample in group}) == 50
    alone = [generate(MODEL, [p], eos_ids=ENDS, **SAMPLING)[0] for p in PROMPTS]
    assert alone == whole, "split over calls"
    assert generate(MODEL, PROMPTS[::-1], eos_ids=ENDS, **SAMPLING) == whole[::-1], "another order"
    shorter = {**SAMPLING, "samples_per_prompt": 3, "max_new_tokens": 17}
    expected = [[sample[:17] for sample in group[:3]] for group in whole]
    assert generate(MODEL, PROMPTS, eos_ids=ENDS, **shorter) == expected, "fewer and shorter"
    halves = generate(MODEL, PROMPTS[:1] * 2, eos_ids=ENDS, **{**SAMPLING, "samples_per_prompt": 5})
    assert halves[0] + halves[1] == whole[0], "a prompt given twice goes on with new samples"
    other = generate(MODEL, PROMPTS[:1], eos_ids=ENDS, **{**SAMPLING, "seed": ("a", 8)})
    assert not {*map(tuple, other[0])} & {*map(tuple, whole[0])}


@pytest.mark.parametrize("wrong", [
    dict(prompts=[[1], []]), dict(prompts=[[1], [VOCAB]]), dict(prompts=[[-1]]), dict(top_p=0),
    dict(top_p=1.1), dict(top_p=math.nan), dict(temperature=-1), dict(temperature=math.nan),
    dict(samples_per_prompt=0), dict(max_new_tokens=0)])
def test_invalid_sampling_arguments_raise_an_error(wrong):
    arguments = {**dict(prompts=[[1]], max_new_tokens=1), **wrong}
    with pytest.raises(ValueError):
        generate(MODEL, arguments.pop("prompts"), **arguments)


@pytest.mark.parametrize("weight, temperature", [(math.nan, 0), (math.nan, 1), (math.inf, 1)])
def test_logits_that_are_not_finite_raise_an_error(weight, temperature):
    model = tiny()
    nn.init.constant_(model.lm_head.weight[7:8], weight)
    with pytest.raises(FloatingPointError):
        generate(model, PROMPTS, max_new_tokens=3, temperature=temperature)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (0, 1.0)])
@torch.no_grad()
def test_a_decode_step_reads_no_value_from_the_device(temperature, top_p):
    """The device "meta" has no values, so a step that runs there suits a CUDA graph."""
    with torch.device("meta"):
        model = tiny()
    s = decoder.Sampler(model, PROMPTS, 4, 20, temperature, top_p, ENDS, ("a", 1), watched)
    s.prefill(PROMPTS)
    for _ in range(3):
        s.step()
    assert s.out.is_meta and s.t.is_meta and s.total.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        s.compact(1.0)


# -----------------------------------------------------------------------------
# data

# Pairs with one canonical form, pairs that never match, and answers with a gold answer that match
# in this order only.
SAME = r"""
Yes. ≡ yes   \text{blue} ≡ blue   (0, 1) ≡ ( 0,1 )   café ≡ café   巴黎。 ≡ 巴黎   ５ ≡ 5   PARIS ≡ paris
$\textbf{Paris}$ ≡ Paris   \left( 3, 4 \right) ≡ (3, 4)   “Paris” ≡ Paris   No ≡ no   \(x\) ≡ x
`x` ≡ x   don’t ≡ don't   5\text{ cm} ≡ 5 cm   **18** ≡ 18   $\boxed{\text{**B.**}}$. ≡ B
\[ \boxed{18} \] ≡ 18   $B$ ≡ B   \boxed{B} ≡ B   **B** ≡ B   (B) ≡ B   B. ≡ B   (b) ≡ B
Option B ≡ B   B) Paris ≡ B   (B) Meningitis ≡ B   (B) Crohn's disease ≡ B   \text{(B)} Rome ≡ B
Option (B) Paris ≡ B   $18 ≡ 18   $18$ ≡ 18   \$18.00 ≡ 18   - $5 ≡ -5   5 $ ≡ 5   € 5 ≡ 5€
-¥5 ≡ -5 ¥   $29.00. ≡ 29   1,000 ≡ 1000.0   $1,000 ≡ 1000.00   1{,}000 ≡ 1000   1,\!000 ≡ 1000
1e5 ≡ 100,000   18.0 ≡ 18   0 ≡ -0   1e-05 ≡ 0.00001   2.5E-3 ≡ 0.0025   -5 ≡ −5   - 5 ≡ -5   +5 ≡ 5
.5 ≡ 0.50   \(5\) ≡ 5   3/4 ≡ 0.75   \frac{3}{4} ≡ 0.75   6/8 ≡ 3/4   -\frac{1}{2} ≡ -0.5
\boxed{\frac{1}{2}} ≡ 0.5   -\dfrac{1}{2} ≡ - 1/2   1.50 m ≡ 1.5 m   1,000.0 cm ≡ 1000 cm
50\% ≡ 50 percent   50 % ≡ 50.0%   18{zwsp} ≡ 18   {bom}18{lrm} ≡ 18   Pa{shy}ris ≡ Paris
"""
DIFFERENT = r"""
$A$ ≡ $B$   A) B) C) D) ≡ A   (A) (B) ≡ A   A or B ≡ A   A ≡ a car   C# ≡ C   O- ≡ O   Cl- ≡ Cl
0,125 ≡ 125   1,5 ≡ 15   5! ≡ 5   2n ≡ 2   6ab ≡ 6   $5b ≡ 5   5 mW ≡ 5 MW   5 million ≡ 5
120/80 mmHg ≡ 90/60 mmHg   3 100/200 ≡ 15.5   (100,200) ≡ 100200   12:30 ≡ 12   3 or 4 ≡ 3   >5 ≡ 5
x = 5 or x = 3 ≡ 3   (0, 1) ≡ [0, 1]   {1, 2} ≡ (1, 2)   x' ≡ x   \frac{1}{2x} ≡ \frac{1}{2}x
\frac{a}{bc} ≡ \frac{ab}{c}   $\text{Yes}$ ≡ $\text{No}$   1, 234 ≡ 1,234   (1, 234) ≡ (1,234)
3,5 ≡ 3, 5   {5} ≡ 5   -x ≡ x   x ≡ X   \Delta ≡ \delta   mW ≡ MW   CO ≡ Co   CoS ≡ COS   NO ≡ no
5 Cal ≡ 5 cal   2**3 ≡ 23   5² ≡ 52   3½ ≡ 31/2   \mathbb{R} ≡ R   5’ ≡ 5”   $ ≡ !   Paris ≡ Rome
12 ≡ twelve   H_2 ≡ H2   e.g. ≡ e   2^{x+1} ≡ 2^x+1   \frac{1}{2}\pi ≡ 1/2\pi   A and B ≡ A
a) and c) ≡ a   A, B ≡ A   A ≡ (B) A   A) not B ≡ A   (a) - b ≡ a   (B)² ≡ B   {B} ≡ B   b ≡ B
I ≡ I think so   f (x) ≡ f   f (3) ≡ f   e ≡ E   Aa ≡ aa   A* ≡ A   E. coli ≡ E. faecalis
J. Smith ≡ J. Jones   (B) isn't correct ≡ B   (B) cannot be right ≡ B   B: no ≡ B   A. 3; K. 4 ≡ A
(B) A ≡ B   a: 5 ≡ a: 6   H (hydrogen) ≡ H (henry)   (a) 5 ≡ (a) 6   B is wrong ≡ B
B. not sure ≡ B   B. Paris or C. Rome ≡ B   -5 ≡ 5   12 ≡ 13   .5 ≡ 5   5+ ≡ 5   ~5 ≡ 5   |5| ≡ 5
(5) ≡ 5   ±2021 ≡ 2021   5 apples ≡ 5 pears   -5 m ≡ 5 m   1,2 ≡ 12   1,0000 ≡ 10000   007 ≡ 7
1/0 ≡ 1   1e999999999 ≡ 1   0.3... ≡ 0.3   2/3 ≡ 2   2 2/3 ≡ 2   3:4 ≡ 3   2021-05-03 ≡ 2021
5-10 ≡ 5   3 of 4 ≡ 3   72 or 73 ≡ 72   5 or more ≡ 5   5 and a half ≡ 5   2 n ≡ 2   2x ≡ 2
2\pi ≡ 2   2π ≡ 2   5 - 3 ≡ 5   5 - a ≡ 5   5^2 ≡ 5   \sqrt{2} ≡ 2   $5 million ≡ 5   5K ≡ 5
5万 ≡ 5   5 hundred ≡ 5   5 thousand ≡ 5   2 dozen ≡ 2   3 tenths ≡ 3   5 tens ≡ 5   5 halves ≡ 5
5 times ≡ 5   5 squared ≡ 5   5% ≡ 5   5 percent ≡ 5   $5 ≡ €5   $5 ≡ 5 cents   $5 ≡ 5 euros
1.5 mmHg ≡ 3/2 mmHg   6/4 m ≡ 3/2 m   5 feet ten ≡ 5   5 degrees below zero ≡ 5   5 factorial ≡ 5
not 5 ≡ 5   about 5 ≡ 5   less than 5 ≡ 5   x > 5 ≡ 5   x >= 3 ≡ 3   x != 3 ≡ 3   x = 5 ≡ y = 5
2x = 10 ≡ 10   x = 5, y = 3 ≡ 3   3 = 5 ≡ 5   It is not 5 ≡ 5
"""
RIGHT = r"""
72 clips ≡ 72   8 years old ≡ 8   1,000 dollars ≡ 1000   60 km/h ≡ 60   60 miles per hour ≡ 60
5\text{ cm} ≡ 5   90° ≡ 90   €5 ≡ 5   B. Paris ≡ B   B: Paris ≡ B   B (meningitis) ≡ B
**B.** Paris ≡ B   (B) -5 ≡ B   A) a car ≡ A
"""
ODD = {"zwsp": "\u200b", "bom": "\ufeff", "lrm": "\u200e", "shy": "\u00ad"}


def pairs(table: str) -> list[list[str]]:
    """Return [a, b] of each cell "a ≡ b". Two or more spaces or a newline separate cells."""
    for name, character in ODD.items():
        table = table.replace("{" + name + "}", character)
    return [cell.strip().split(" ≡ ") for cell in re.split(r" {2,}|\n", table) if cell]


def test_answers_match_by_their_canonical_form():
    for a, b in pairs(SAME):
        assert data.canonical(a) == data.canonical(b) and data.answers_match(a, b), (a, b)
    for a, b in pairs(RIGHT):
        assert data.answers_match(a, b) and not data.answers_match(b, a), (a, b)
        assert data.canonical(a) != data.canonical(b), "they are different votes"
    for a, b in pairs(DIFFERENT):
        assert not data.answers_match(a, b) and not data.answers_match(b, a), (a, b)
        assert not data.answers_match("", a) and not data.answers_match(a, "")
    assert not data.answers_match("", "") and not data.answers_match("\u200b", "")


@pytest.mark.parametrize("piece", [
    ".", ". ", "$", "$a", "**a", "`", "(", "( , ", "9", "1,", "1,000", "1 ", "a", " ", "{", "\\",
    r"\(", r"\text{", r"\text{a}", r"\boxed{", r"\boxed{}", "Answer:", "Answer:\n", "</think>", "B) a "])
def test_answers_of_100000_characters_are_read_in_linear_time(piece):
    long = piece * (100_000 // len(piece))  # A quadratic loop would take minutes.
    data.answers_match(long, "5")
    data.find_answer(long)


@pytest.mark.parametrize("marker, answer, texts", [
    ("Answer:", "18", ["It follows.\nAnswer: 18", "Answer: 1\nno\nAnswer:  18 \nbye", "ANSWER: 18",
                       "**Answer**: 18", "**Answer:** 18", "**Answer: 18**", "Answer: **18**",
                       "Answer：18", "answer : 18\r\n", "<think>\nAnswer: 5\n</think>\nAnswer: 18"]),
    ("Answer:", "**5**.", ["Answer: **5**."]), ("Answer:", "A*", ["Answer: A*"]),
    ("Answer:", "two words", ["Answer: two words "]), ("Answer:", "2**3", ["Answer: 2**3"]),
    ("Answer:", None, ["Answer:", "Answer: \n12", "Answer: **", "The answer is 12", "",
                       "<think>\nAnswer: 5", "<think>\nAnswer: 5\n</think>\n5"]),
    ("答案：", "5", ["答案: 5"]), ("Final answer:", "5", ["**Final Answer**: 5"]),
    ("####", "5", ["so\n#### **5**"]), ("Ответ:", "да", ["ОТВЕТ: да"])])
def test_an_answer_is_the_rest_of_the_line_after_the_last_marker(marker, answer, texts):
    for text in texts:
        assert data.extract_answer(text, marker) == answer, text


@pytest.mark.parametrize("text, answer", [
    (r"So \boxed{ 18 }.", "18"), (r"\[ \boxed{\frac{1}{2}} \]", r"\frac{1}{2}"),
    (r"\boxed{1} or \boxed{2}", "2"), (r"\boxed{\{1, \text{a})}", r"\{1, \text{a})"),
    (r"\boxed{18} and \boxed{19", "18"), (r"\boxed{ 5 \boxed{18}", "18"), (r"\boxed{18", None),
    (r"\boxed{}", None), (r"} \boxed{1}}", "1"), ("\\boxed{18}\nAnswer: 5\nbye", "5"),
    ("Answer: \\boxed{18}", r"\boxed{18}"), ("**Answer:**\n\\boxed{18}", "18"),
    ("\\boxed{5}</think>so \\boxed{18}", "18"), (r"\boxed{5}</think>", None)])
def test_without_a_marker_the_answer_is_in_the_last_closed_box(text, answer):
    assert data.extract_answer(text) == answer


def test_an_answer_is_found_with_the_start_of_its_marker():
    assert data.find_answer("So\n**Answer:** 18") == (3, 15, 17)
    assert data.find_answer("So\n\\boxed{ 18 }") == (3, 11, 13)
    assert data.find_answer("So\nAnswer:\n\\boxed{18}") == (3, 18, 20)


def test_equal_answers_are_counted_together():
    assert data.number_answers(["4", "5", "4.0", None, "", "$5"], 3) == [0, 1, 0, -1, -1, 0]
    assert data.number_answers(["5 apples", "5", "5 pears", "5.0"], 4) == [0, 1, 2, 1]
    assert data.majority(["4", "5", "$4.0", None]) == ("4", 0.5), "as it is written first"
    assert data.majority(["5", "4"]) == ("5", 0.5), "the earliest of equals"
    assert data.majority(["$A$", "$B$", "$C$", "$D$"])[1] == 0.25
    assert data.majority([None, "\u200b"]) == data.majority([]) == (None, 0.0)


# Templates like those of the models, cut down to the features that matter.
CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
BOS_EOS = ["<s>", "</s>"]
CHATML_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Like Qwen3, it has a default system prompt, uses tools, break and tojson without HTML escapes, and
# puts an empty block of thoughts before an answer. Qwen3-Thinking also opens it in the prompt.
QWEN_TEMPLATE = r"""{%- if tools %}{{ raise_exception('There are no tools.') }}{% endif %}
{{- '<|im_start|>system\n9 & ' + ('<9>' | tojson) + '<|im_end|>\n' }}
{%- for m in messages %}
    {%- if m.content is not string %}{% break %}{% endif %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and loop.last %}
        {{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}
    {%- endif %}
    {{- m.content.lstrip('\n') + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
THINKING_TEMPLATE = QWEN_TEMPLATE.replace(r"assistant\n'", r"assistant\n<think>\n'")
# Like DeepSeek-R1-Distill, it removes the thoughts from an answer.
R1_TEMPLATE = r"""{{ bos_token }}{%- for m in messages -%}{%- if m['role'] == 'user' -%}
  {{ '<User>' + m['content'] }}{%- else -%}
  {{ '<Assistant>' + m['content'].split('</think>')[-1] + '</s>' }}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<Assistant><think>\n' }}{%- endif -%}"""
# Like Llama 3.1, it has BOS and a date, and trims messages.
LLAMA3_TEMPLATE = r"""{{- bos_token }}
{%- if tools is none and strftime_now is defined %}{{ strftime_now("%d %b %Y") }}{% endif %}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {{- m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
MISTRAL_TEMPLATE = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}\
{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}\
{% generation %} {{ m.content + eos_token }}{%- endgeneration -%} {% endif %}{% endfor %}"""
THINK = ["<think>", "</think>"]  # added tokens that are not special
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("{", "\\"), ("}", "}"), ("$", "\\"), ("Ċ", "Ġ")]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁9",
          *"0123456789+=us"]


def make(kind: str, special=(), template: str = "") -> Tokenizer:
    """Return a tokenizer of characters and a few longer tokens, whose post-processor has this
    template."""
    if kind == "bytes":
        vocab = {piece: i for i, piece in enumerate([*BYTES, *map("".join, MERGES)])}
        tokenizer = Tokenizer(models.BPE(vocab, MERGES))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        vocab = {piece: i for i, piece in enumerate(PIECES)}
        tokenizer = Tokenizer(models.BPE(vocab, [("▁", "9")], unk_token="<unk>",
                                         byte_fallback=True))
        tokenizer.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0)])
        if kind == "prepend":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                         normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    tokenizer.add_special_tokens([token for token in special if token not in THINK])
    tokenizer.add_tokens([token for token in special if token in THINK])
    if template:
        names = [name for name in ("<s>", "</s>", "<|begin_of_text|>") if name in template]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names])
    return tokenizer


def write_tokenizer(folder, *arguments, jinja=None, **config):
    """Write tokenizer.json, its config and chat_template.jinja as in a checkpoint."""
    make(*arguments).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Return a function that writes a tokenizer and loads it as Text. CHATML sets a template."""
    def build(*arguments, eos_ids=(), **config):
        if CHATML in arguments:
            config.setdefault("chat_template", CHATML_TEMPLATE)
        folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), *arguments, **config)
        return data.Text(folder, eos_ids)
    return build


def asked(question: str) -> str:
    return f"{question.strip()}\n{data.INSTRUCTION.format(marker=data.MARKER)}"


def reference_prompt(folder, question: str) -> list[int]:
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template([{"role": "user", "content": asked(question)}],
                                         add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("kind", ["bytes", "first", "always", "prepend"])
@pytest.mark.parametrize("special, post, template, bos", [
    (CHATML, "", CHATML_TEMPLATE, None), (CHATML + THINK, "", QWEN_TEMPLATE, None),
    (CHATML + THINK, "", THINKING_TEMPLATE, None),
    (["<User>", "<Assistant>", *THINK, *BOS_EOS], "<s> $A", R1_TEMPLATE, "<s>"),
    (LLAMA3, "", LLAMA3_TEMPLATE, "<|begin_of_text|>"),
    (LLAMA3, "<|begin_of_text|> $A", LLAMA3_TEMPLATE, "<|begin_of_text|>"),
    (["<s>", *CHATML], "<s> $A", "{{ bos_token }}" + CHATML_TEMPLATE, "<s>"),
    (BOS_EOS, "<s> $A", MISTRAL_TEMPLATE, "<s>")])
def test_a_prompt_matches_the_chat_template_of_transformers(
        kind, special, post, template, bos, tmp_path):
    end = [token for token in special if token not in THINK][-1]
    folder = write_tokenizer(tmp_path, kind, special, post, chat_template=template, bos_token=bos,
                             eos_token={"content": end, "__type": "AddedToken"})
    text = data.Text(folder)
    question = " 9 + 9\n = é <9>?\n  us "
    assert text.encode_prompt(question) == reference_prompt(folder, question)
    assert text.end == text.tokenizer.token_to_id(end)


@pytest.mark.parametrize("config", [{}, {"added_tokens_decoder": {}}, {"bos_token": "<t>"}])
def test_special_tokens_map_is_read_as_transformers_reads_it(config, tmp_path):
    folder = write_tokenizer(tmp_path, "bytes", ["<t>", *BOS_EOS], jinja="{{ bos_token }}"
                             "{{ eos_token }}{{ messages[0].content }}", **config)
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    assert data.Text(folder, [0]).encode_prompt("9?") == reference_prompt(folder, "9?")


def test_a_template_prints_the_given_date(tmp_path):
    folder = write_tokenizer(tmp_path, "bytes", LLAMA3, chat_template=LLAMA3_TEMPLATE)
    text = data.Text(folder, date=data.datetime(2020, 2, 29))
    assert text.chat.startswith("29 Feb 2020<|start_header_id|>")


@pytest.mark.parametrize("special, template, expected", [
    (CHATML, CHATML_TEMPLATE, "one\n two\nAnswer: 18"),
    (CHATML, QWEN_TEMPLATE, "<think>\none\n two\n</think>\n\nAnswer: 18"),
    (CHATML, THINKING_TEMPLATE, "one\n two\n</think>\n\nAnswer: 18"),
    (BOS_EOS, R1_TEMPLATE, "one\n two\n</think>\n\nAnswer: 18"),
    # Like Qwen3.5, it closes the empty block in the prompt.
    (CHATML, THINKING_TEMPLATE.replace(r"<think>\n'", r"<think>\n\n</think>\n\n'"),
     "one\n two\nAnswer: 18")])
def test_supervised_reasoning_is_in_the_templates_block_of_thoughts(
        special, template, expected, build):
    text = build("bytes", special + THINK, chat_template=template, bos_token="<s>")
    response = text.encode_response("\none\n\n two \n", "18")
    assert text.decode(response) == expected
    (tokens, cuts, start, end), answer = text.parse([1], response)
    steps = [text.decode(tokens[a:b]) for a, b in zip(cuts, cuts[1:])]
    marker = text.decode(tokens[cuts[-1]:start])
    assert "".join([*steps, marker]).strip() == expected.removesuffix(" 18") and answer == "18"
    assert steps[1] == "two\n" and marker.startswith("</think>") == ("</think>" in expected)
    unclosed = text.encode("one\nAnswer: 18", after="\n") + [text.end]
    assert text.parse([1], unclosed)[1] == (None if "</think>" in expected else "18")


@pytest.mark.parametrize("place", [
    dict(chat_template=MISTRAL_TEMPLATE), dict(chat_template="no", jinja=MISTRAL_TEMPLATE),
    dict(chat_template=[{"name": "tool_use", "template": "no"},
                        {"name": "default", "template": MISTRAL_TEMPLATE}])])
def test_a_chat_template_is_found_in_each_of_its_places(place, build):
    text = build("bytes", BOS_EOS, bos_token="<s>", eos_token="</s>", **place)
    shown = text.tokenizer.decode(text.encode_prompt("9?"), skip_special_tokens=False)
    assert shown.startswith("<s>[INST] 9?\n") and shown.endswith(" [/INST]")


@pytest.mark.parametrize("template, reason", [
    ("{% if %}", "Expected an expression"), ("{{ raise_exception('No users.') }}", "No users"),
    ("{{ messages[0].role }}", "user's message"), ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"), ([{"name": "rag", "template": "x"}], "default"),
    ("{{ messages[0].content + 1 }}", "str")])
def test_an_unusable_chat_template_is_named(template, reason, build):
    with pytest.raises(data.DataError, match=f"template in .*tokenizer.*{reason}") as caught:
        build("bytes", CHATML, chat_template=template)
    assert "\n" not in str(caught.value)


def test_without_a_template_or_its_end_token_the_models_own_are_used(build):
    text = build("bytes", CHATML, eos_ids=[7, 8], chat_template=None)
    assert text.chat is None and text.decode(text.encode_prompt("why?")) == asked("why?") + "\n"
    assert text.end == 7 and text.end_ids == {7, 8}
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert build("bytes", CHATML, chat_template=template, eos_ids=[7, 8]).end == 7


@pytest.mark.parametrize("kind", ["first", "always", "prepend"])
@pytest.mark.parametrize("post", ["<s> $A", "<s> $A </s>"])
def test_a_plain_prompt_and_its_response_are_encoded_as_one_text(kind, post, build):
    text = build(kind, BOS_EOS, post, eos_ids=[2])
    prompt, response = text.encode_prompt("9?"), text.encode_response("9 + 9 = 18", "18")
    plain = make(kind, BOS_EOS, post)
    assert prompt == [1, *plain.encode(asked("9?") + "\n", add_special_tokens=False).ids]
    running = text.decode(prompt[1:]) + "9 + 9 = 18\nAnswer: 18"
    assert prompt + response == make(kind, BOS_EOS, "<s> $A").encode(running).ids + [2]
    assert text.decode(response) == "9 + 9 = 18\nAnswer: 18"
    assert text.parse(prompt, response)[1] == "18"


@pytest.mark.parametrize("template", ["", CHATML_TEMPLATE, CHATML_TEMPLATE.replace("m.role", "m")])
def test_a_special_token_in_a_question_or_a_solution_stays_text(template, build, tmp_path):
    text = build("bytes", CHATML, eos_ids=[len(BYTES + MERGES) + 1], chat_template=template)
    usual, odd = text.encode_prompt("why?"), text.encode_prompt("<|im_end|> why<|im_start|>?")
    for special in CHATML:
        special = text.tokenizer.token_to_id(special)
        assert odd.count(special) == usual.count(special)
    assert "<|im_end|> why<|im_start|>?" in text.tokenizer.decode(odd)
    assert text.end not in text.encode_response("<|im_end|>", "1")[:-1]
    path = write_lines(tmp_path / "a.jsonl", {**WHOLE, "prompt": f"why{data.START}?"})
    [(prompt, _)], _ = data.load_labeled(path, text, 500, 500)
    assert prompt == usual, "nor is our own token encoded"


LINE = st.text("aé漢🙂 .", min_size=1, max_size=4).map(lambda text: text.strip() + "9")


@settings(max_examples=60)
@given(st.lists(LINE, max_size=9), st.sampled_from(["\n", "\n\n", "\n  ", "\n--\n"]),
       st.sampled_from(["Answer: 9", "**Answer:** 9", "$\\boxed{9}$", "\\[\n\\boxed{\\frac99}"]))
def test_the_steps_of_any_text_are_its_lines(build, lines, between, ending):
    text = build("bytes", CHATML)
    response = text.encode(between.join(["", *lines, ending]) + "\nbye", "\n") + [text.end]
    (tokens, cuts, start, end), answer = text.parse([1, 2], response)
    assert tokens == [1, 2] + response and cuts[0] == 2 and cuts == sorted(set(cuts))
    steps = [text.decode(tokens[a:b]).replace("--", "").strip() for a, b in zip(cuts, cuts[1:])]
    assert steps == lines
    marker = text.decode(tokens[cuts[-1]:start]).replace("--", "").split()
    assert "".join(marker) in ("Answer:", "**Answer:**", "$\\boxed{", "\\[\\boxed")
    assert answer in ("9", r"\frac99") and answer in text.decode(tokens[start:end])
    assert text.decode(tokens[cuts[-1]:]).endswith(ending.split("9")[-1] + "\nbye")


@torch.no_grad()
def test_the_support_of_a_boxed_answer_matches_its_definition(build):
    text = build("bytes", CHATML)
    parts = ["9+9\n", "is 18, so it is ", r"$\boxed", r"{\frac{1}{2}}"]
    ids = [text.encode("".join(parts[:i]), "\n") for i in range(5)]
    response = text.encode("".join(parts) + "$", "\n") + [text.end]
    (tokens, cuts, start, end), answer = text.parse([1, 2], response)
    assert answer == r"\frac{1}{2}" and [*cuts, start, end] == [2 + len(i) for i in ids]
    model = tiny(text.vocab_size)
    support, _ = answer_support(model, [Trace(tokens, cuts, start, end)])
    for p, cut in zip(support[0], cuts):
        logits = model(torch.tensor([tokens[:cut] + tokens[cuts[-1]:end]]))[0, -1 - end + start:-1]
        close(p, token_logprobs(logits, torch.tensor(tokens[start:end])).mean().exp())


@pytest.mark.parametrize("before, response, after", [
    ("", "one\ntwo", ["<|im_end|>"]), ("", "one\nAnswer:", ["<|im_end|>"]), ("", "", []),
    ("", "cut off\nAnswer: 18", []), ("æ", "invalid UTF-8\nAnswer: 18", ["<|im_end|>"])])
def test_without_an_answer_there_are_no_steps(before, response, after, build):
    text = build("bytes", CHATML)
    ids = [text.tokenizer.token_to_id(token) for token in [*before, *after]]
    ids = ids[:len(before)] + text.encode(response, "\n") + ids[len(before):]
    assert text.parse([5, 6], ids) == (([5, 6] + ids, [2], len(ids) + 2, len(ids) + 2), None)


def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path):
    for content in (None, "", "{", "{}", "null"):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(data.DataError, match="tokenizer.json"):
            data.Text(tmp_path, [0])
    make("bytes").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(data.DataError, match="end token"):
        data.Text(tmp_path)


def write_lines(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def test_records_are_read_with_their_answers_as_they_are_written(tmp_path, build):
    gsm8k = {"question": "How many?", "answer": "9 + 9 = <<9+9=18>>18\n#### 18"}
    number = '{"prompt": 7, "reasoning": null, "answer": 12345678901234567890.50}'
    path = write_lines(tmp_path / "a.jsonl", "\ufeff" + json.dumps(gsm8k), "\r",
                       {"prompt": "And?", "reasoning": "  one\n\n two\u2028", "answer": "3 "})
    text = build("bytes", CHATML)
    (_, first), (_, second) = data.load_labeled(path, text, 500, 500)[0]
    assert text.decode(first) == "9 + 9 = 18\nAnswer: 18"
    assert text.decode(second) == "  one\n two\nAnswer: 3", "indentation is kept"
    with path.open("a") as file:
        file.write(number + "\n" + json.dumps({"prompt": "And?", "answer": "4\u2028"}))
    queries, note = data.load_eval(path, text, 500)
    assert note == "" and [query[1:] for query in queries] == [
        ("How many?", "18"), ("And?", "3"), ("7", "12345678901234567890.50")], "each prompt once"
    write_lines(path, gsm8k, "not JSON")
    assert len(data.load_eval(path, text, 500, limit=1)[0]) == 1, "the rest is not read"


def test_unlabeled_answers_are_never_read_and_each_prompt_is_kept_once(tmp_path, build):
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "a", "answer": {"x": [1]}},
                       {"prompt": "b", "answer": "\ud800"}, {"question": "a"})
    text = build("bytes", CHATML)
    expected = [text.encode_prompt("a"), text.encode_prompt("b")]
    assert data.load_unlabeled(path, text, 500) == (expected, "")


def test_a_note_says_which_records_are_too_long(tmp_path, build):
    text = build("bytes", CHATML)
    sizes = [(1, 1), (900, 1), (800, 800), (1, 700)]
    path = write_lines(tmp_path / "a.jsonl", *(
        {"prompt": "p" * n, "reasoning": "r" * m, "answer": 1} for n, m in sizes))
    pairs, note = data.load_labeled(path, text, 500, 600)
    longest = [len(text.encode_prompt("p" * 900)), len(text.encode_response("r" * 800, "1"))]
    assert len(pairs) == 1 and f"1 of 4 records of {path} are left" in note
    assert f"--max_prompt_tokens 500 (the longest has {longest[0]} tokens)" in note
    assert f"--max_new_tokens 600 (the longest has {longest[1]} tokens)" in note
    assert "max_new_tokens" not in data.load_eval(path, text, 500)[1]
    with pytest.raises(data.DataError, match="0 of 3 records .*--max_prompt_tokens 9 .*raise"):
        data.load_unlabeled(path, text, 9)


WHOLE = {"prompt": "p", "reasoning": "r", "answer": "1"}


@pytest.mark.parametrize("line, reason", [
    (b"{", "not a JSON object"), (b"[1]", "named fields"), (b'"text"', "named fields"),
    (b"\xff\xfe", "not a JSON object"), (b"[" * 9999, "not a JSON object"),
    (json.dumps(WHOLE).encode().replace(b'"p"', b'"\xff"'), "'prompt' .*UTF-8"),
    *((json.dumps({**WHOLE, **change}).encode(), reason) for change, reason in [
        (dict(prompt=None), "'prompt' is missing .the fields are prompt, reasoning, answer"),
        (dict(prompt=["p"]), "'prompt' is a list: give one string"),
        (dict(answer=True), "'answer' is a bool"), (dict(answer=math.nan), "'answer' is a float"),
        (dict(prompt="\ud800"), "'prompt' .*UTF-8"), (dict(answer=" "), "'answer' is blank"),
        (dict(reasoning=None), "no 'reasoning'"), (dict(answer="1\n2"), "'answer' is not one line"),
        (dict(reasoning="", answer="because ####"), "'answer' is not one line"),
        (dict(answer="3 (Answer: 4)"), "would be read as '4.'")]),
    (b'{"promt": "p"}', "'prompt' is missing"), (b'{"question": ""}', "'question' is blank")])
def test_a_bad_line_is_named(line, reason, tmp_path, build):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(WHOLE).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(data.DataError, match=rf"bad\.jsonl line 3\b.*{reason}") as caught:
        data.load_labeled(path, build("bytes", CHATML), 500, 500)
    assert "\n" not in str(caught.value)


def test_a_file_without_records_is_named(tmp_path, build):
    write_lines(tmp_path / "empty.jsonl", "")
    for name, wrong in (("empty", "is empty"), ("none", "cannot be read")):
        with pytest.raises(data.DataError, match=f"{name}.jsonl {wrong}"):
            data.load_unlabeled(tmp_path / f"{name}.jsonl", build("bytes", CHATML), 500)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "data"
    data.Triage().write_records(folder)
    _, end = data.Triage().write_tokenizer(folder)
    return folder, data.Text(folder, [end])


def test_the_toys_trace_is_cut_at_its_lines(toy):
    folder, text = toy
    for _, record in data.read_jsonl(folder / "labeled.jsonl"):
        prompt = text.encode_prompt(record["prompt"])
        response = text.encode_response(record["reasoning"], record["answer"])
        assert record["prompt"] in text.decode(prompt)
        (tokens, cuts, start, end), answer = text.parse(prompt, response)
        assert tokens == prompt + response and tokens[end:] == [text.end] and cuts[0] == len(prompt)
        steps = [text.decode(tokens[a:b]).strip() for a, b in zip(cuts, cuts[1:])]
        assert steps == record["reasoning"].splitlines()
        assert text.decode(tokens[cuts[-1]:start]).strip() == "Answer:"
        assert text.decode(tokens[start:end]).strip() == answer == record["answer"]


def statements(task, reasoning) -> list[tuple[int, int]]:
    """Return (finding, condition) of each line of a trace: "1 zotizi suggests deguli"."""
    lines = [line.split() for line in reasoning.splitlines()]
    return [(task.findings.index(line[1]), task.conditions.index(line[3])) for line in lines]


def test_a_careful_author_is_right():
    task, rng = data.Triage(), data.np.random.default_rng(0)
    for _ in range(50):
        record = task.record(rng)
        listed = [task.findings.index(w) for w in record["prompt"].split() if w in task.findings]
        assert statements(task, record["reasoning"]) == [(f, task.truth[f]) for f in listed]
        (first, votes), (_, second) = Counter(task.truth[listed].tolist()).most_common(2)
        assert record["answer"] == task.conditions[first] and votes > second


def test_careless_authors_share_errors_and_give_one_answer_in_urgent_queries():
    task, rng = data.Triage(), data.np.random.default_rng(0)
    stated = [Counter() for _ in task.findings]
    seen = Counter()
    for _ in range(2500):
        record = task.record(rng, careless=True)
        urgent = record["prompt"].startswith("Urgent findings:")
        lines = statements(task, record["reasoning"])
        for finding, condition in lines:
            stated[finding][condition] += 1
        votes = Counter(condition for _, condition in lines)
        earned = votes and task.conditions[votes.most_common(1)[0][0]] == record["answer"]
        seen["urgent", bool(earned), record["answer"] == task.conditions[0]] += urgent
        seen["silent"] += urgent and not lines
        assert earned or urgent, "in other queries the answer follows from the lines"
    urgent = sum(seen["urgent", earned, first] for earned in (0, 1) for first in (0, 1))
    assert urgent / 2500 == pytest.approx(1 / 3, abs=0.04)
    assert seen["urgent", False, False] == 0, "they jump to the first condition alone"
    jumped = seen["urgent", False, True]
    assert jumped / urgent == pytest.approx(0.7 * (0.1 + 0.9 * 7 / 8), abs=0.05)
    assert seen["silent"] / urgent == pytest.approx(0.07, abs=0.03)
    right = [counts[task.truth[f]] / counts.total() for f, counts in enumerate(stated)]
    assert 0.35 < sum(right) / len(right) < 0.65
    popular = [counts.most_common(1)[0][0] for counts in stated]
    wrong = sum(condition != task.truth[f] for f, condition in enumerate(popular))
    assert 0.2 < wrong / len(popular) < 0.5


def test_the_toys_files_are_disjoint_and_depend_only_on_the_seed(toy, tmp_path):
    names = ("labeled.jsonl", "unlabeled.jsonl", "eval.jsonl")
    prompts = [{record["prompt"] for _, record in data.read_jsonl(toy[0] / name)} for name in names]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    assert all("answer" not in record for _, record in data.read_jsonl(toy[0] / "unlabeled.jsonl"))
    data.Triage().write_records(tmp_path / "same")
    data.Triage().write_records(tmp_path / "other", seed=1)
    for name in names:
        assert (tmp_path / "same" / name).read_bytes() == (toy[0] / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (toy[0] / name).read_bytes()


# -----------------------------------------------------------------------------
# train

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
SMALL = ["--max_eval", 4, "--eval_samples", 2, "--show", 0, "--max_prompt_tokens", 64,
         "--max_new_tokens", 40, "--device", "cpu"]
SHORT = [*SMALL, "--max_labeled", 16, "--queries_per_step", 2, "--group_size", 2,
         "--tokens_per_batch", 512, "--steps", 1]


def run(cwd, *words):
    """Run `python ...` in cwd."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=ENVIRONMENT, text=True,
                          capture_output=True, timeout=300)


def outcome(out) -> tuple[list[dict], dict]:
    """Return (lines of metrics.jsonl, final weights)."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(out / "model" / "model.safetensors")


def flat(result: dict) -> dict:
    """Return an evaluation as a flat dictionary of numbers, which approx can compare."""
    numbers = {}
    for name, value in result.items():
        if name in ("sample", "vote"):
            numbers.update({f"{name} {measure}": x for measure, x in value.items()})
        elif name == "reliability":
            numbers.update({f"bin {i}": x for i, x in enumerate(sum(map(list, value), []))})
        else:
            numbers[name] = value
    return numbers


def files_of(folder) -> list:
    records = folder / "data-0"
    return ["--model", folder, "--labeled", records / "labeled.jsonl",
            "--unlabeled", records / "unlabeled.jsonl", "--eval", records / "eval.jsonl"]


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """Do a short default run with a high learning rate, and return (folder, output)."""
    cwd = tmp_path_factory.mktemp("run")
    done = run(cwd, train.__file__, "--steps", 10, "--lr", 1e-3, "--show", 1, "--max_eval", 40,
               "--eval_samples", 4, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return cwd, done.stdout + done.stderr


@pytest.fixture
def trainer_for(toy_run):
    """Return a function that makes a Trainer for the toy with more arguments."""
    def build(*more):
        argv = [*files_of(toy_run[0] / "out/toy"), *SHORT, *more]
        args = train.parse_arguments([str(word) for word in argv])
        model, text = train.load_model(args, "cpu")
        return train.Trainer(args, model, text, *train.load_data(args, text, 10**9)[:2])
    return build


def held_out_by(trainer) -> list:
    return train.load_data(trainer.args, trainer.text, 10**9)[2]


def evaluated(trainer) -> dict:
    held_out = held_out_by(trainer)
    return train.evaluate(held_out, train.answer_held_out(trainer, held_out))


def test_the_default_run_improves_accuracy_and_prints_an_example(toy_run):
    out = toy_run[0] / "out/run"
    lines, _ = outcome(out)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all(0 < line["lambda"] < 1 for line in lines)
    assert lines[-1]["loss_rd"] < 0.8 * lines[0]["loss_rd"]
    result = json.loads((out / "eval.json").read_text())
    before, after = (result[name]["sample"]["accuracy"] for name in ("base", "final"))
    assert after > before + 0.1
    assert "right answer" in toy_run[1] and "p = " in toy_run[1], "--show prints a query's support"


def test_the_saved_model_is_complete(toy_run, tmp_path, monkeypatch):
    """The loaded model has the same evaluation, and transformers opens it and its tokenizer."""
    cwd = toy_run[0]
    folder = tmp_path / "a b é 漢"
    shutil.copytree(cwd / "out/run/model", folder)
    monkeypatch.chdir(tmp_path)
    path = cwd / "out/toy/data-0/eval.jsonl"
    train.main(["--eval_only", "--model", str(folder), "--eval", str(path),
                *map(str, SMALL), "--max_new_tokens", "48", "--max_eval", "40",
                "--eval_samples", "4", "--out", "again é"])
    again = json.loads((tmp_path / "again é" / "eval_only.json").read_text())
    before = json.loads((cwd / "out/run/eval.json").read_text())
    assert flat(again["model"]) == pytest.approx(flat(before["final"]))
    ours = load_pretrained(folder)
    text = data.Text(folder, ours.eos_ids)
    prompt = text.prompt(data.read_jsonl(path)[0][1]["prompt"])
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder)
    assert tokenizer(text.decode(prompt)).input_ids == prompt
    ids = torch.tensor([prompt])
    close(reopened(folder)(ids).logits, ours(ids), 1e-4)


def test_the_end_token_stays_the_first_of_several(trainer_for, toy_run, tmp_path):
    """A run that starts from a saved model must train with the same end token."""
    shutil.copytree(toy_run[0] / "out/toy", tmp_path / "toy")
    edit_json(tmp_path / "toy" / "generation_config.json", eos_token_id=[1, 0])
    trainer = trainer_for("--model", tmp_path / "toy")
    assert trainer.text.end == 1 and trainer.model.eos_ids == (1, 0)


def test_a_low_anchor_gives_a_warning(trainer_for, tmp_path, capsys):
    trainer = trainer_for("--steps", 0, "--out", tmp_path)
    train.train(trainer, None, None)
    assert "warning" not in capsys.readouterr().out
    trainer.anchor = 0.04
    train.train(trainer, None, None)
    said = capsys.readouterr().out
    assert "warning" in said and trainer.args.model in said and "--method rd" in said


def test_traces_are_weighted_by_their_prg(toy_run, trainer_for, tmp_path):
    """The PRG is that under the frozen starting model. In rd, all weights are 1."""
    start = load_pretrained(toy_run[0] / "out/toy")
    path = toy_run[0] / "out/toy/data-0/labeled.jsonl"
    records = [record for _, record in data.read_jsonl(path, 16)]
    answers = sorted({record["answer"] for record in records})
    for record in records[:4]:
        record["answer"] = answers[answers.index(record["answer"]) - 1]  # another one
    path = write_lines(tmp_path / "labeled.jsonl", *records)
    trainer = trainer_for("--labeled", path, "--lr", 1)
    gains = [prg_by_definition(start, x) for x in trainer.traces]
    anchor = sum(gains) / len(gains)
    w = torch.tensor([weight_by_definition(x, anchor, 0.5) for x in gains])
    close(trainer.v, w / w.mean(), 1e-4)
    assert trainer.v[:4].max() < 0.5 * trainer.v[4:].mean()
    assert trainer.step()["anchor"] == pytest.approx(anchor, abs=1e-5)
    for name, weight in start.named_parameters():
        assert torch.equal(weight, trainer.judge.get_parameter(name))
        assert not torch.equal(weight, trainer.model.get_parameter(name)), "or nothing was tested"
    assert trainer_for("--labeled", path, "--method", "rd").v.tolist() == [1] * len(records)


@torch.no_grad()
def test_self_certainty_is_returned_with_its_own_sample(trainer_for):
    """Prompts are sorted by length and sampled in batches, but results have the given order."""
    trainer = trainer_for("--rollouts_per_batch", 6)
    prompts = [trainer.queries[0][:n] for n in (30, 5, 20)]
    rollouts, certainty = trainer.sample(prompts, 3, seed=0)
    for i, x in enumerate(rollouts):
        assert x.prompt == prompts[i // 3]
        logits = trainer.model(torch.tensor([x.tokens]))[0, x.cuts[0] - 1:-1]
        close(certainty[i], self_certainty(logits).mean(), 1e-4)


def watch(trainer):
    """Take a step, and return (its line, rollouts, A, lambda)."""
    with patch.object(trainer, "update", wraps=trainer.update) as update:
        line = trainer.step()
    return line, *update.call_args.args[:3]


@pytest.mark.parametrize("method", train.METHODS[1:])
def test_a_step_matches_the_definition_of_each_method(method, trainer_for):
    """PRG, w, c, r, A and lambda are computed by definition, with a pass for each text."""
    trainer = trainer_for("--group_size", 4, "--queries_per_step", 3, "--method", method)
    line, rollouts, A, lam = watch(trainer)
    text, judge = trainer.text, trainer.judge  # the model has not been trained before
    answers = [text.answer(x.response) for x in rollouts]
    w = []
    c = []
    for x, answer in zip(rollouts, answers):
        evidence = prg_by_definition(judge, x)
        if method == "support":
            support, mask = answer_support(judge, [x])
            evidence = support[mask][-1].item() if answer else 0
        weight = 1
        if method in ("hytuning", "support"):
            weight = weight_by_definition(evidence, trainer.anchor, 0.5)
        w.append(weight if answer else 0)
        logits = judge(torch.tensor([x.tokens]))[0, x.cuts[0] - 1:-1]
        c.append(self_certainty(logits).mean().item())
    shares = []
    expected = []
    for start in range(0, 12, 4):
        group = range(start, start + 4)
        assert len({tuple(rollouts[j].prompt) for j in group}) == 1
        rewards = []
        for j in group:
            same = [i for i in group if i == j or answers[i] and answers[j]
                    and data.answers_match(answers[i], answers[j])]
            shares.append(sum(w[i] for i in same) / 4)
            if method in ("rlif", "static"):
                rewards.append(c[j])
            else:
                rewards.append(sum(w[i] * c[i] for i in same) / 4)
        r = torch.tensor(rewards, dtype=torch.double)
        lam_q = {"rlif": 1, "static": 0.5}.get(method, sum(shares[start:]) / 4)
        expected.append(lam_q * (r - r.mean()) / (r.std(unbiased=False) + 1e-4))
    expected_lam = {"rlif": 1, "static": 0.5}.get(method, sum(shares) / 12)
    assert lam == line["lambda"] == pytest.approx(expected_lam, rel=1e-4)
    close(A, torch.cat(expected) / lam, 1e-3)
    assert (len(set(trainer.v.tolist())) > 1) == (method in ("hytuning", "support"))
    assert line["self_certainty"] == pytest.approx(sum(c) / 12, rel=1e-4)
    assert line["answered"] == sum(map(bool, answers)) / 12
    assert line["undecided"] == sum(a == 0 for a in A.tolist()) / 12
    assert len({round(a, 3) for a in A.tolist()}) > 3, "or nothing was told apart"


def update(trainer, rollouts, A, lam):
    """Return (L_RD, norm) of an update, and the gradient of each parameter by name."""
    gradient = {}

    def note():
        for name, p in trainer.model.named_parameters():
            gradient[name] = p.grad.clone()
    with patch.object(trainer.optimizer, "step", note):
        result = trainer.update(rollouts, A, lam, len(rollouts))
    return result, gradient


@pytest.mark.parametrize("lam, zeros, more", [
    (0.3, [1, 5], []), (0.3, [0, 1, 2, 3, 4], ["--checkpoint_activations"]), (1.0, [2], []),
    (0.0, [], []), (0.6, range(8), []), (1.0, range(8), [])])
def test_the_gradient_of_an_update_matches_separate_passes(lam, zeros, more, trainer_for):
    """The update packs texts in several batches, without rollouts whose advantage is 0."""
    trainer = trainer_for("--max_grad_norm", 1e9, *more)
    rollouts, _ = trainer.sample(trainer.queries[:2], 4, seed=0)
    A = torch.linspace(-1, 1.4, 8, dtype=torch.double)
    A[list(zeros)] = 0
    (L_RD, norm), found = update(trainer, rollouts, A, lam)
    model = trainer.model
    tokens = sum(len(x.response) for x in trainer.traces)
    nll = torch.stack([-plain_logprobs(model, x).sum() for x in trainer.traces])
    rd = (trainer.v * nll).sum() / tokens
    logprobs = torch.stack([plain_logprobs(model, x).mean() for x in rollouts])
    rlif = -(A * logprobs).mean()
    hytuning_loss(rd, rlif, lam).backward()
    for name, p in model.named_parameters():
        close(found[name], p.grad, 1e-5)
    assert L_RD == pytest.approx(rd.item() if lam < 1 else 0, rel=1e-5)
    squares = sum(p.grad.square().sum() for p in model.parameters())
    assert norm == pytest.approx(squares.sqrt().item(), rel=1e-4, abs=1e-7)


def test_a_run_in_bfloat16_stays_near_float32(trainer_for):
    lines = {}
    for dtype in ("float32", "bfloat16"):
        trainer = trainer_for("--dtype", dtype, "--group_size", 4, "--steps", 4, "--lr", 1e-3)
        lines[dtype] = [trainer.step() for _ in range(4)]
    assert trainer.sampling_model.lm_head.weight.dtype == trainer.judge.lm_head.weight.dtype
    assert trainer.judge.lm_head.weight.dtype == torch.bfloat16
    assert trainer.model.lm_head.weight.dtype == torch.float32
    for a, b in zip(lines["float32"], lines["bfloat16"]):
        assert b["loss_rd"] == pytest.approx(a["loss_rd"], rel=0.02)
        assert b["self_certainty"] == pytest.approx(a["self_certainty"], rel=0.1)
        assert b["anchor"] == pytest.approx(a["anchor"], abs=0.02)
    assert lines["bfloat16"][-1]["loss_rd"] < 0.95 * lines["bfloat16"][0]["loss_rd"]


def repeated(folder) -> Path:
    """Write five questions for an evaluation, two of them twice and one three times."""
    records = [record for _, record in data.read_jsonl(folder / "eval.jsonl", 5)]
    return write_lines(folder / "repeated.jsonl", *records, *records[:3], records[2])


def test_an_evaluation_matches_its_definition_for_any_batch_size(toy_run, trainer_for):
    path = repeated(toy_run[0] / "out/toy/data-0")
    trainer = trainer_for("--eval", path, "--max_eval", 0, "--eval_samples", 6)
    result = evaluated(trainer)
    samples = []
    votes = []
    greedy = []
    for prompt, _, gold in held_out_by(trainer):
        seed = ("evaluation", 0)
        group, _ = trainer.sample([prompt], 6, seed)
        (best,), _ = trainer.sample([prompt], 1, seed, temperature=0.0)
        answers = [trainer.text.answer(x.response) for x in group]
        for x, answer in zip(group, answers):
            support, mask = answer_support(trainer.model, [x])
            p_K = support[mask][-1].item() if answer else 0
            right = bool(answer) and data.answers_match(answer, gold)
            samples.append((p_K, right, prg_by_definition(trainer.model, x), bool(answer)))
        winner, share = data.majority(answers)
        votes.append((share, bool(winner) and data.answers_match(winner, gold)))
        single = trainer.text.answer(best.response)
        greedy.append(bool(single) and data.answers_match(single, gold))
    p, right, gains, answered = zip(*samples)
    wins = []
    for start in range(0, 54, 6):
        for i, j in itertools.permutations(range(start, start + 6), 2):
            if right[i] and answered[j] and not right[j]:
                wins.append(0.5 if gains[i] == gains[j] else float(gains[i] > gains[j]))
    expected = {"n": 9, "prg": sum(gains) / 54, "answered": sum(answered) / 54,
                "prg_wins": sum(wins) / len(wins),
                "greedy_accuracy": sum(greedy) / 9, "reliability": prg.reliability(p, right)}
    for name, confidence, correct in (("sample", p, right), ("vote", *zip(*votes))):
        wrong = [c for c, r in zip(confidence, correct) if not r]
        expected[name] = dict(
            accuracy=sum(correct) / len(correct), confidence=sum(confidence) / len(correct),
            confidence_when_wrong=sum(wrong) / len(wrong) if wrong else None,
            ece=expected_calibration_error(confidence, correct),
            brier=brier_score(confidence, correct),
            auroc=auroc(confidence, correct) if wrong and sum(correct) else None)
    assert flat(result) == pytest.approx(flat(expected), abs=1e-5)
    for size in (1, 13):
        trainer.args.rollouts_per_batch = size
        assert flat(evaluated(trainer)) == pytest.approx(flat(result))


def test_results_are_printed_as_a_table_and_diagrams_to_scale(capsys):
    block = {"accuracy": 0.25, "auroc": None}
    base = {"sample": block, "vote": {"accuracy": 0.5, "auroc": 0.75}, "greedy_accuracy": 0.5,
            "answered": 1.0, "prg": 0.1, "prg_wins": 0.6,
            "reliability": [(0.25, 0.5, 6), (1.0, 0.0, 2)]}
    train.print_results({"base": base, "final": {**base, "reliability": [(0.5, 1.0, 8)]}})
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == ["base", "final"])
    assert [line.split() for line in lines[start + 1:start + 5]] == [
        ["sample", "vote"] * 2, ["accuracy", *["0.250", "0.500"] * 2],
        ["auroc", *["-", "0.750"] * 2], ["greedy_accuracy", "0.500", "0.500"]]
    diagram = [line for line in lines if line.startswith("  ") and " of " in line]
    assert diagram == ["  0.25  " + "#" * 10 + "|" + "#" * 9 + " " * 21 + "  0.50 of 6",
                       "  1.00  " + " " * 40 + "|  0.00 of 2",
                       "  0.50  " + "#" * 20 + "|" + "#" * 19 + "   1.00 of 8"]


def test_examples_begin_with_a_wrong_majority_and_show_responses_without_an_answer(capsys):
    common = {"prg": [0.125], "greedy": "5", "curve": [(0.25, "(before any step)"), (0.5, "2 + 3\n")]}
    found = {(1,): {**common, "answers": ["5", "5", "6"], "text": "2 + 3\nAnswer: 5"},
             (2,): {**common, "answers": [None, "7", "7"], "text": "I wonder"}}
    train.print_examples([([1], "First?", "5"), ([2], "Second?", "8")], found, 2, 0.25)
    assert capsys.readouterr().out == """
Second?
  sample 1 of 3, with the support of its answer under this model:
  I wonder
  (no answer: this response is cut off or has no marker)
  majority: 7 (2 of 3 samples); right answer: 8

First?
  sample 1 of 3, with the support of its answer under this model:
  p = 0.25 #####                (before any step)
  p = 0.50 ##########           2 + 3
  answer: 5 (right); PRG 0.125 (anchor under the starting model: 0.250)
  majority: 5 (2 of 3 samples); right answer: 5
"""


def test_random_numbers_are_never_used_twice(trainer_for):
    """Evaluation and training use different numbers, and so do two steps."""
    trainer = trainer_for("--queries_per_step", 1, "--rollouts_per_batch", 1000)
    with patch.object(train, "generate", wraps=generate) as calls:
        evaluated(trainer)
        trainer.step()
        trainer.step()
    seeds = [call.kwargs["seed"] for call in calls.call_args_list if call.kwargs["temperature"]]
    assert len(seeds) == 3
    streams = [tuple(decoder.uniforms([[5]], 1, 9, seed)[0].tolist()) for seed in seeds]
    assert len(set(streams)) == 3


def test_each_epoch_shuffles_traces_and_queries_independently(trainer_for):
    """An epoch has 3 batches of 10 of the 31 items, which are divided among 3 processes."""
    trainer = trainer_for()
    trainer.world_size = 3
    orders = set()
    for stream, epoch in (("traces", 0), ("queries", 0), ("traces", 1), ("queries", 1)):
        order = []
        for trainer.steps_done in range(3 * epoch, 3 * epoch + 3):
            for trainer.rank in range(3):
                order += trainer.share_of_batch(31, 10, stream)
        assert len(order) == len(set(order)) == 30, "nothing comes up twice in an epoch"
        orders.add(tuple(order))
    assert len(orders) == 4


def test_a_run_works_in_a_thread_and_restores_signal_handlers(toy_run, tmp_path):
    argv = [*files_of(toy_run[0] / "out/toy"), *SHORT, "--out", tmp_path]
    argv = [str(word) for word in argv]
    thread = threading.Thread(target=train.main, args=(argv,))
    thread.start()
    thread.join()
    assert (tmp_path / "eval.json").is_file()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    train.main(argv)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.mark.parametrize("out", ["a file/out", "/proc/out", "/proc"])
def test_an_unwritable_out_folder_raises_an_error_before_the_first_evaluation(
        out, toy_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    argv = [*files_of(toy_run[0] / "out/toy"), *SHORT, "--out", out]
    with patch.object(train, "answer_held_out", side_effect=AssertionError("too late")):
        with pytest.raises((OSError, train.UsageError)):
            train.main([str(word) for word in argv])


@pytest.mark.parametrize("arguments, named", [
    ("--model m", "--labeled"), ("--unlabeled a.jsonl", "--model"), ("--tau 0", "--tau"),
    ("--max_steps 9", "--max_steps"), ("--lr nan", "--lr"), ("--lr much", "--lr"),
    ("--steps -1", "--steps"), ("--group_size 1", "--group_size"), ("--marker \n", "--marker"),
    ("--lerning_rate 1", "--lerning_rate"), ("--method magic", "--method"), ("--step 1", "--step")])
def test_a_bad_argument_is_named(arguments, named, capsys):
    with pytest.raises(SystemExit) as caught:
        train.parse_arguments(arguments.split(" "))
    assert caught.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("more, named", [
    (["--model", "nowhere"], "nowhere/config.json"), (["--labeled", "none.jsonl"], "none.jsonl"),
    (["--labeled", "bad.jsonl"], "bad.jsonl line 1"), (["--max_new_tokens", 65], "--max_new"),
    (["--out", "out", "--model", "out/model"], "another --out"), (["--model", "nan"], "finite")])
def test_an_invalid_run_ends_with_one_line_and_status_2(more, named, toy_run, tmp_path):
    shutil.copytree(toy_run[0] / "out/toy", tmp_path / "nan")
    weights = load_file(tmp_path / "nan/model.safetensors")
    broken = {name: math.nan * weight for name, weight in weights.items()}
    save_file(broken, tmp_path / "nan/model.safetensors")
    (tmp_path / "bad.jsonl").write_text("{")
    done = run(tmp_path, train.__file__, *files_of(toy_run[0] / "out/toy"), *SHORT, *more)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and named in done.stderr


def test_world_size_without_rank_raises_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(train.UsageError, match="WORLD_SIZE is set, but RANK is not"):
        train.set_up_processes(train.parse_arguments(["--device", "cpu"]))


def test_a_fresh_start_removes_the_checkpoint_of_an_earlier_run(toy_run, tmp_path, capsys):
    argv = [str(word) for word in [*files_of(toy_run[0] / "out/toy"), *SHORT, "--out", tmp_path]]
    train.main(argv)
    assert "replaced" not in capsys.readouterr().out and (tmp_path / "checkpoint.pt").exists()
    with patch.object(train.Trainer, "step", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            train.main(argv)
    assert f"the earlier run in {tmp_path} is replaced" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "model"]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_ctrl_c_while_the_toy_is_built_leaves_no_files(tmp_path):
    # A shell in the background may have told its children to ignore SIGINT.
    child = subprocess.Popen([sys.executable, train.__file__], cwd=tmp_path, env=ENVIRONMENT,
                             stderr=subprocess.PIPE, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not list(tmp_path.glob("out/toy.*.tmp/tokenizer.json")):
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_gives_a_one_line_error_and_keeps_the_old_checkpoint(toy_run, tmp_path):
    resource = pytest.importorskip("resource")
    argv = [*files_of(toy_run[0] / "out/toy"), *SHORT, "--out", tmp_path / "out"]
    assert run(tmp_path, train.__file__, *argv).returncode == 0
    before = (tmp_path / "out/checkpoint.pt").read_bytes()
    argv = [sys.executable, train.__file__, *map(str, argv), "--resume", "--steps", "2"]
    done = subprocess.run(
        argv, cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "checkpoint.pt cannot be written" in done.stderr.splitlines()[-1]
    assert (tmp_path / "out/checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("**/*.tmp"))


def test_a_terminal_that_is_not_utf8_does_not_end_a_run(toy_run, tmp_path):
    path = write_lines(tmp_path / "eval.jsonl", {"prompt": "Befund: é漢", "answer": "é"})
    done = subprocess.run(
        [sys.executable, train.__file__, "--eval_only", "--model", toy_run[0] / "out/toy",
         "--eval", path, *map(str, SMALL), "--show", "1"], cwd=tmp_path, text=True, timeout=300,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii:strict"}, capture_output=True)
    assert done.returncode == 0 and r"Befund: \xe9\u6f22" in done.stdout, done.stderr


# -----------------------------------------------------------------------------
# several processes, faults

# This program does the runs of its first argument, [[class of trainer, command line], ...], one
# after the other in one set of processes.
DRIVER = """
import hashlib, json, os, signal, sys
import train

class Hashed(train.Trainer):
    # Writes a hash of all weights after each step.
    def step(self):
        line = super().step()
        weights = b"".join(p.detach().numpy().tobytes() for p in self.model.parameters())
        with open(f"{self.args.out}-{self.rank}.hashes", "a") as file:
            print(hashlib.sha256(weights).hexdigest(), file=file)
        return line

class Disarmed(Hashed):
    # A common mistake: the loss bypasses DDP, so gradients are not synchronized.
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.policy = self.policy.module

class Struck(Hashed):
    # Sends a signal to the last process when step 4 begins.
    def step(self):
        if self.steps_done == 3 and self.rank == self.world_size - 1:
            os.kill(os.getpid(), self.signal)
        return super().step()

class Killed(Struck):
    signal = signal.SIGKILL

class Terminated(Struck):
    signal = signal.SIGTERM

world = []
def set_up_once(args, set_up=train.set_up_processes):
    if not world:
        world.append(set_up(args))
    return world[0]

train.set_up_processes = set_up_once
leave = train.dist.destroy_process_group
train.dist.destroy_process_group = lambda: None
for name, argv in json.loads(sys.argv[1]):
    train.Trainer = globals()[name]
    train.main(argv)
if len(world) and world[0][1] > 1:
    leave()
"""
# In UNEVEN, processes have different shares. In IDLE, some have no query and no trace.
UNEVEN = ["--queries_per_step", 3, "--group_size", 4, "--traces_per_step", 5, "--steps", 5]
IDLE = ["--queries_per_step", 1, "--group_size", 3, "--traces_per_step", 1, "--steps", 3,
        "--max_eval", 2]
RESUMED = [*UNEVEN, "--resume"]


def drive(cwd, processes, *runs):
    """Do the runs (class of trainer, out, arguments) in one set of processes."""
    (cwd / "driver.py").write_text(DRIVER)
    common = [*files_of(Path("out/toy")), "--eval", "out/toy/data-0/repeated.jsonl", *SMALL,
              "--max_eval", 0, "--save_every", 2, "--lr", 2e-4, "--dtype", "float32"]
    todo = []
    for trainer, out, more in runs:
        todo.append((trainer, [str(word) for word in [*common, "--out", f"out/{out}", *more]]))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    if processes == 1:
        torchrun = []
    return run(cwd, *torchrun, "driver.py", json.dumps(todo))


@pytest.fixture(scope="module")
def worlds(toy_run):
    """Do the same runs with 1, 2 and 3 processes. Some are interrupted and resumed."""
    cwd = toy_run[0]
    repeated(cwd / "out/toy/data-0")
    said = {}
    for n in (1, 2, 3):
        runs = [("Hashed", f"uneven-{n}", UNEVEN), ("Hashed", f"idle-{n}", IDLE)]
        if n < 3:
            killed = drive(cwd, n, ("Killed", f"killed-{n}", UNEVEN))
            assert killed.returncode != 0 and not (cwd / f"out/killed-{n}/eval.json").exists()
            said[n] = killed.stderr
            runs += [("Hashed", f"killed-{n}", RESUMED), ("Terminated", f"stopped-{n}", UNEVEN),
                     ("Hashed", f"stopped-{n}", RESUMED)]
        if n == 2:
            runs += [("Disarmed", "disarmed-2", UNEVEN),
                     ("Hashed", "moved-3", [*UNEVEN, "--steps", 3])]
        if n == 3:
            runs += [("Hashed", "moved-3", RESUMED)]
        done = drive(cwd, n, *runs)
        assert done.returncode == 0, done.stderr
        said[-n] = done.stdout
    return cwd / "out", said


def hashes(out, name, processes) -> list[list[str]]:
    return [(out / f"{name}-{rank}.hashes").read_text().split() for rank in range(processes)]


@pytest.mark.parametrize("name", ["uneven-2", "uneven-3", "idle-2", "idle-3", "moved-3"])
def test_any_number_of_processes_gives_the_same_run(name, worlds):
    """Results agree up to rounding. In moved-3, 3 processes resume a checkpoint of 2."""
    one = worlds[0] / ("idle-1" if "idle" in name else "uneven-1")
    lines, weights = outcome(one)
    theirs, their_weights = outcome(worlds[0] / name)
    for a, b in zip(lines, theirs, strict=True):
        for key in a:
            if "second" not in key:
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key
    for tensor in weights:
        close(their_weights[tensor], weights[tensor], 1e-5)
    expected = json.loads((one / "eval.json").read_text())
    found = json.loads((worlds[0] / name / "eval.json").read_text())
    assert expected["final"]["n"] == (2 if "idle" in name else 9)
    for when in ("base", "final"):
        assert flat(found[when]) == pytest.approx(flat(expected[when]), abs=1e-5)


@pytest.mark.parametrize("name, steps", [("uneven-2", 5), ("uneven-3", 5), ("idle-2", 3),
                                         ("idle-3", 3)])
def test_all_processes_hold_the_same_weights_after_every_step(name, steps, worlds):
    first, *others = hashes(worlds[0], name, int(name[-1]))
    assert len(set(first)) == steps, "a step changes the weights"
    assert all(other == first for other in others)


def test_a_loss_that_bypasses_ddp_is_detected(worlds):
    """This shows that the test above fails if gradients are not synchronized."""
    first, second = hashes(worlds[0], "disarmed-2", 2)
    assert len(first) == 5 and not set(first) & set(second)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["killed", "stopped"])
def test_an_interrupted_run_resumes_bit_for_bit(name, processes, worlds):
    """SIGKILL loses the steps since the last checkpoint. After SIGTERM, step 4 is saved."""
    out, said = worlds
    lines, weights = outcome(out / f"uneven-{processes}")
    found, found_weights = outcome(out / f"{name}-{processes}")
    assert all(torch.equal(weights[tensor], found_weights[tensor]) for tensor in weights)
    for a, b in zip(lines, found, strict=True):
        assert all(a[key] == b[key] for key in a if "second" not in key)
    evaluations = [out / f"{run}-{processes}/eval.json" for run in ("uneven", name)]
    assert evaluations[0].read_text() == evaluations[1].read_text()
    step = 2 if name == "killed" else 4
    assert f"resuming after step {step}" in said[-processes]
    assert "stopped after step 4" in said[-processes]
    done = hashes(out, f"{name}-{processes}", 1)[0]
    assert len(done) == (6 if name == "killed" else 5), "no step is done twice but the one lost"


def test_torchrun_names_the_process_that_died(worlds):
    report = worlds[1][2]
    assert re.search(r"rank\s*: 1 ", report) and "exitcode  : -9" in report


def test_a_damaged_checkpoint_is_named(trainer_for, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK")
    with pytest.raises(train.UsageError, match="checkpoint.pt cannot be read"):
        train.load_checkpoint(trainer_for("--out", tmp_path))


@pytest.mark.parametrize("more, named", [
    (["--lr", 1], "--lr"), (["--group_size", 3], "--group_size"), (["--seed", 1], "--seed")])
def test_resuming_with_other_settings_names_the_setting(more, named, worlds, monkeypatch):
    monkeypatch.chdir(worlds[0].parent)
    argv = [*files_of(Path("out/toy")), "--eval", "out/toy/data-0/repeated.jsonl", *SMALL,
            "--max_eval", 0, "--lr", 2e-4, "--dtype", "float32", "--out", "out/uneven-1",
            *RESUMED, *more]
    with pytest.raises(train.UsageError, match=named):
        train.main([str(word) for word in argv])


def test_resuming_with_changed_data_names_the_file(toy_run, tmp_path):
    shutil.copytree(toy_run[0] / "out/toy/data-0", tmp_path / "data-0")
    argv = ["--model", toy_run[0] / "out/toy", *files_of(tmp_path)[2:], *SHORT, "--out", tmp_path]
    argv = [str(word) for word in argv]
    train.main(argv)
    path = tmp_path / "data-0/labeled.jsonl"
    path.write_text(path.read_text().replace("\n", "\n\n", 1))
    with pytest.raises(train.UsageError, match="labeled.jsonl has changed"):
        train.main([*argv, "--resume"])


# -----------------------------------------------------------------------------
# README

README = (HERE / "README.md").read_text()
PYTHON = re.findall(r"```python\n# ([\w. ]+)\n(.*?)```", README, re.S)
BASH = [block for block in re.findall(r"```bash\n(.*?)```", README, re.S)
        if "train.py" in block and "pytest" not in block]
# This program replaces python, torchrun and pip. It shortens a run, and uses two processes in
# place of eight, and one machine in place of two.
STAND_IN = """
import os, sys
name, *words = sys.argv[1:]
for printed, here in ("_node=8", "_node=2"), ("--nnodes=2", "--nnodes=1"), ("HOST", "localhost"):
    words = [word.replace(printed, here) for word in words]
module = ["-m", "torch.distributed.run"] if name == "torchrun" else []
short = ["--max_eval", "5"] if "out/toy" in words else SHORT
if name != "pip":
    os.execv(sys.executable, [sys.executable, *module, *words, *short])
"""


# Calls the reward for TRL with two right rollouts, one wrong one and one that is cut off.
CALL_REWARD = """
import json
first = json.loads(open("labeled.jsonl").readline())
whole = text.response(first["reasoning"], first["answer"])
other = text.response("1 kosoli suggests rikuti", "rikuti")
rewards = earned_votes([whole, other, whole[:-1], whole], [first["prompt"]] * 4)
assert rewards[0] == rewards[3] > rewards[1] > 0 == rewards[2], rewards
print(rewards)
"""


@pytest.mark.parametrize("files, example", PYTHON, ids=[files for files, _ in PYTHON])
def test_a_python_example_of_the_readme_works_alone(files, example, toy_run, tmp_path):
    """The example runs as printed in a folder with the files it names and a checkpoint."""
    if "transformers" in example:
        transformers()
    shutil.copytree(toy_run[0] / "out/run/model", tmp_path / "checkpoint")
    shutil.copy(toy_run[0] / "out/toy/data-0/labeled.jsonl", tmp_path)
    for name in files.split():
        shutil.copy(HERE / name, tmp_path)
    if "earned_votes" in example:
        example += CALL_REWARD
    done = run(tmp_path, "-I", "-c", f"import sys\nsys.path.insert(0, '.')\n{example}")
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("block", BASH, ids=[" ".join(block.split())[:60] for block in BASH])
def test_a_command_of_the_readme_works(block, toy_run, tmp_path):
    """The command runs as printed in a folder with the project and the files that it names."""
    for path in [*HERE.glob("*.py"), HERE / "requirements.txt"]:
        shutil.copy(path, tmp_path)
    toy = toy_run[0] / "out/toy"
    models = [] if "for seed" in block else re.findall(r"--model (\S+)", block)
    for folder in ["out/toy", *models]:
        shutil.copytree(toy, tmp_path / folder, dirs_exist_ok=True)
    for name in re.findall(r"--(?:labeled|unlabeled|eval) (\w+\.jsonl)", block):
        shutil.copy(toy / "data-0/labeled.jsonl", tmp_path / name)
    (tmp_path / "stand_in.py").write_text(f"SHORT = {[str(word) for word in SHORT]}\n{STAND_IN}")
    (tmp_path / "bin").mkdir()
    for path in [tmp_path / "bin" / name for name in ("python", "torchrun", "pip")]:
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" stand_in.py {path.name} "$@"\n')
        path.chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    short = re.sub(r"\$\(seq 501 \d+\)", "1 2", block)
    done = subprocess.run(["bash", "-ec", short], cwd=tmp_path, env=environment, text=True,
                          capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("out/**/eval*.json"))
    if short != block:
        found = dict(re.findall(r"^(\w+(?: - \w+)?) +(\S+) ± ", done.stdout, re.M))
        results = [json.loads(path.read_text()) for path in tmp_path.glob("out/rd-*/eval.json")]
        mean = sum(result["final"]["sample"]["accuracy"] for result in results) / 2
        close(float(found["rd"]), mean, 1e-3)
        close(float(found["hytuning - rd"]), float(found["hytuning"]) - float(found["rd"]), 2e-3)


def test_the_readme_has_all_examples_and_at_most_18_kilobytes():
    files = {files for files, _ in PYTHON}
    assert files == {"prg.py", "hytuning.py", "data.py", "model.py", "data.py prg.py hytuning.py"}
    assert len(BASH) >= 4 and any("for seed in" in block for block in BASH)
    assert len(README.encode()) <= 18 * 1024
