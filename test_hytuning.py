"""What the code claims, against definitions: a naive loop, `transformers`, a count, a hand computation.

In the order in which a reader meets the ideas: prg, hytuning, model, sampling, data, train. It takes about six
minutes on a CPU. Where `transformers` is not installed, the comparisons with it are skipped. With
HYTUNING_SMOLLM2=FOLDER, a real checkpoint with a reference.json in it, one more test runs.

SPDX-License-Identifier: MIT
"""
import json
import math
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import data
import model as decoder
import train
from hytuning import (adaptive_weights, distillation_loss, entropy, group_advantages, hytuning_loss,
                      over_vocabulary, pool_by_answer, rlif_loss, self_certainty, token_logprobs)
from model import CheckpointError, Config, Decoder, generate, load_pretrained, save_pretrained
from prg import Trace, answer_support, auroc, brier_score, expected_calibration_error, progressive_reasoning_gain

try:
    from hypothesis import given, settings, strategies as st
    settings.register_profile("here", deadline=None, derandomize=True)
    settings.load_profile("here")
except ImportError:  # the tests on generated cases are skipped
    from unittest.mock import MagicMock
    st, settings = MagicMock(), lambda **_: lambda test: test
    given = lambda *_: pytest.mark.skip(reason="hypothesis, which generates the cases, is not installed")  # noqa: E731

VOCAB = 61


def tiny(vocab=VOCAB, **options) -> Decoder:
    """A random decoder, far enough from uniform that a wrong mask or position shows."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, initializer_range=0.3)
    return Decoder(Config(vocab, **{**sizes, **options})).eval()


def transformers():
    return pytest.importorskip("transformers", reason="the reference that the decoder is compared with")


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance,
                               check_dtype=False)


# ------------------------------------------------------------------------------------------------- prg

def gain(*supports) -> float:
    p = torch.tensor([supports])
    return progressive_reasoning_gain(p, torch.ones_like(p, dtype=torch.bool)).item()


def test_gain_rewards_steady_support():
    assert gain(0, 0.25, 0.5, 0.75, 1) == pytest.approx(1), "equal steps from no idea to certain"
    assert gain(0, 0, 0, 0.9, 0.9) == pytest.approx(0.9 / 4), "one step does it all: 1/K of what was gained"
    assert 0 < gain(0.1, 0.9, 0.1, 0.9, 0.2) < 0.01, "back and forth"
    assert gain(0.99, 0.99, 0.99) == 0, "certain from the start, nothing earned"
    assert gain(1, 0.5, 0) == pytest.approx(-1), "support lost step by step"
    assert gain(0.2, 0.7) == pytest.approx(0.5), "one step: the net gain"
    assert gain(0.7) == 0, "no step, nothing earned"
    nothing = torch.zeros(1, 3)
    assert progressive_reasoning_gain(nothing, nothing.bool()).item() == -1, "no answer"


@given(st.lists(st.lists(st.floats(0, 1, width=32), max_size=7), min_size=1, max_size=5))
def test_gain_is_its_definition_within_bounds_whatever_the_padding(rows):
    width = max(map(len, rows)) + 1
    p = torch.full((len(rows), width), 0.5)  # what stands in the padding must not matter
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        p[i, :len(row)], mask[i, :len(row)] = torch.tensor(row), True

    def definition(row):
        steps = [b - a for a, b in zip(row, row[1:])]
        if not any(steps):
            return 0.0 if row else -1.0
        return (row[-1] - row[0])**3 / (len(steps) * sum(g * g for g in steps))
    found = progressive_reasoning_gain(p, mask)
    close(found, [definition(row) for row in rows])
    assert found.abs().max() <= 1 + 1e-6


def separate_passes(model, trace) -> list[float]:
    """Support by its definition: for each k one pass over prefix, marker and answer."""
    marker, answer = trace.tokens[trace.cuts[-1]:trace.answer_start], trace.tokens[trace.answer_start:]
    supports = []
    for cut in trace.cuts if answer else []:
        ids = trace.tokens[:cut] + marker + answer
        with torch.no_grad():
            logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
        first = cut + len(marker)
        supports.append(math.exp(sum(logprobs[first + t - 1, y] for t, y in enumerate(answer)) / len(answer)))
    return supports


def make_trace(steps, prompt=3, marker=2, answer=2, tail=0, seed=0) -> Trace:
    """A trace of random tokens with parts of these lengths."""
    rng, cuts = random.Random(seed), [prompt]
    for length in steps:
        cuts.append(cuts[-1] + length)
    tokens = [rng.randrange(VOCAB) for _ in range(cuts[-1] + marker + answer + tail)]
    end = len(tokens) - tail
    return Trace(tokens[:end], cuts, cuts[-1] + marker, tokens[end:])


TRACES = [make_trace([4, 3, 5]), make_trace([2] * 6, seed=1), make_trace([3, 0, 0, 2], seed=2),
          make_trace([], seed=3), make_trace([3, 2], answer=1, seed=4), make_trace([3, 2], marker=0, seed=5),
          make_trace([2, 2], marker=0, answer=1, seed=6), make_trace([3], answer=0, seed=7),
          make_trace([1, 1], prompt=1, tail=3, answer=4, seed=8)]


def check_support(model, traces):
    support, mask = answer_support(model, traces)
    for trace, p, m in zip(traces, support, mask):
        expected = separate_passes(model, trace)
        assert m.tolist() == [True] * len(expected) + [False] * (len(m) - len(expected))
        close(p[m], expected, 1e-5)


MODEL = tiny()


@pytest.mark.parametrize("model", [MODEL, tiny(use_sliding_window=True, sliding_window=5, max_window_layers=1),
                                   lambda *inputs: MODEL(*inputs)], ids=["decoder", "sliding window", "callable"])
def test_packed_support_is_that_of_separate_passes(model):
    """Of different depth, cuts repeated, no step, a one-token answer, no marker, no answer, a tail."""
    check_support(model, TRACES)


LENGTHS = st.builds(make_trace, st.lists(st.integers(0, 4), max_size=4), st.integers(1, 4), st.integers(0, 2),
                    st.integers(0, 3), st.integers(0, 2), st.integers(0, 99))


@settings(max_examples=30)
@given(st.lists(LENGTHS, min_size=1, max_size=4))
def test_packed_support_of_any_trace(traces):
    check_support(MODEL, traces)


def test_support_through_a_transformers_model():
    tf = transformers()
    torch.manual_seed(0)
    other = tf.LlamaForCausalLM(tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3, attn_implementation="sdpa")).eval()
    check_support(lambda ids, positions=None, mask=None:
                  other(ids, position_ids=positions, attention_mask=mask).logits, TRACES)


def test_cuts_that_do_not_fit_are_refused():
    for cuts, answer_start in (([], 2), ([0, 1], 2), ([2, 1], 3), ([1, 3], 2), ([1], 9)):
        with pytest.raises(ValueError):
            Trace([1, 2, 3, 4], cuts, answer_start)


# Confidences as they come up: k of n votes. In whole numbers the bin has no rounding.
VOTES = st.lists(st.integers(1, 20).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n), st.booleans())),
                 min_size=1, max_size=40)


@given(VOTES)
def test_calibration_measures_are_their_definitions(votes):
    confidence, correct = [k / n for k, n, _ in votes], [right for _, _, right in votes]
    bins = {}
    for k, n, right in votes:
        bins.setdefault(min(10 * k // n, 9), []).append((k / n, right))
    gaps = [abs(sum(c for c, _ in b) / len(b) - sum(r for _, r in b) / len(b)) * len(b) for b in bins.values()]
    close(expected_calibration_error(confidence, correct), sum(gaps) / len(votes))
    close(brier_score(confidence, correct), sum((c - r)**2 for c, r in zip(confidence, correct)) / len(votes))
    pairs = [(a > b) + 0.5 * (a == b) for a, right in zip(confidence, correct) if right
             for b, other in zip(confidence, correct) if not other]
    if pairs:
        close(auroc(confidence, correct), sum(pairs) / len(pairs))
    else:
        assert math.isnan(auroc(confidence, correct)), "no right or no wrong answer: nothing to tell apart"


def test_calibration_by_hand():
    assert expected_calibration_error([0, 1, 0.7, 0.7], [0, 1, 1, 0]) == pytest.approx(0.1), "edge bins are exact"
    assert brier_score(torch.tensor([1.0, 0.5]), torch.tensor([False, True])) == pytest.approx(0.625)
    assert auroc([0.5, 0.5], [1, 0]) == 0.5, "a tie counts half"
    with pytest.raises(ValueError):
        brier_score([1.5], [1])


# -------------------------------------------------------------------------------------------- hytuning

def random_logits(*shape, dtype=torch.double):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2


def test_certainty_and_entropy_are_their_definitions():
    logits, V = random_logits(3, 5, 7), 7
    pi = logits.softmax(-1)
    close(self_certainty(logits), sum(1 / V * torch.log(1 / V / pi[..., v]) for v in range(V)))  # KL(U || pi)
    close(entropy(logits), -sum(pi[..., v] * pi[..., v].log() for v in range(V)))
    targets = torch.arange(15).reshape(3, 5) % V
    close(token_logprobs(logits, targets), pi.gather(-1, targets[..., None])[..., 0].log())
    close(self_certainty(torch.full((2, 9), 3.0)), [0.0, 0.0])
    assert (self_certainty(logits) > 0).all()


def test_advantages_of_a_group(recwarn):
    rewards = random_logits(12)
    A = group_advantages(rewards, 4).view(3, 4)
    close(A.mean(1), [0.0] * 3)
    close(A.std(1, unbiased=False), [1.0] * 3, 1e-3)
    r = rewards.view(3, 4)
    assert ((A > 0) == (r > r.mean(1, keepdim=True))).all(), "a sign is never flipped"
    assert (A.argsort(1) == r.argsort(1)).all()
    assert (group_advantages(torch.full((6,), 0.1), 3).abs() < 1e-3).all(), "nothing to prefer"
    assert group_advantages(rewards, 1).tolist() == [0] * 12 and not recwarn.list
    with pytest.raises(ValueError):
        group_advantages(rewards, 5)


def test_a_weight_lowers_a_reward_but_never_turns_it_round():
    """Among equally certain rollouts the better earned wins, among equally earned ones the more certain."""
    w, certainty = adaptive_weights(torch.tensor([0.1, 0.4, 0.4, -1.0]), 0.4), torch.tensor([3.0, 3.0, 5.0, 5.0])
    A = group_advantages(pool_by_answer(w * certainty, torch.arange(4), 4), 4)
    assert A[2] > A[1] > A[0] > A[3], "confident and wrong comes last"


def test_adaptive_weights_are_relative_to_the_anchor():
    prg = torch.linspace(-1, 1, 21, requires_grad=True)
    for anchor, tau in ((0.5, 0.25), (0.1, 0.1), (0.9, 1.0)):
        w = adaptive_weights(prg, anchor, tau)
        close(w, [2 / (1 + math.exp(-min((p - anchor) / anchor, 0) / tau)) for p in prg.tolist()])
        assert adaptive_weights(torch.tensor([anchor, 2 * anchor]), anchor, tau).tolist() == [1, 1], "more pays no more"
        assert (w.diff() >= 0).all() and not w.requires_grad
    for a in (-0.3, 0.0, 0.02):  # the floor: what is as good as the anchor counts in full, however low that is
        close(adaptive_weights(prg, a, 1.0), [2 / (1 + math.exp(-min((p - a) / 0.05, 0))) for p in prg.tolist()])
    close(adaptive_weights(prg, 0.3, tau=1e9), torch.ones(21))  # as the README says
    assert adaptive_weights(prg, torch.tensor(0.4, requires_grad=True)).grad_fn is None


def test_an_answer_has_earned_what_the_rollouts_that_give_it_have():
    w = torch.tensor([1.0, 0.5, 0.25, 1.0, 0.5, 0.5, 0.0, 0.25], requires_grad=True)
    answers = torch.tensor([0, 1, 0, 3, 0, 0, 0, 0])  # of two groups: a number means nothing in the other one
    e = pool_by_answer(w, answers, 4)
    close(e, [1.25 / 4, 0.5 / 4, 1.25 / 4, 1 / 4, *[1.25 / 4] * 4])
    assert not e.requires_grad
    close(pool_by_answer(torch.ones(8), answers, 4), [0.5, 0.25, 0.5, 0.25, 1, 1, 1, 1])  # the share of the vote
    assert len(pool_by_answer(w[:0], answers[:0], 4)) == 0, "a process may have no query"


def some_losses():
    """Log-probabilities of 4 sequences of up to 5 tokens, masks, advantages; as leaves that want a gradient."""
    logprobs = (-random_logits(4, 5).abs() - 0.1).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).double()
    return logprobs, mask, torch.tensor([1.5, -0.5, 0.25, -1.25], dtype=torch.double)


def test_losses_by_hand():
    logprobs, mask, A = some_losses()
    old, reference = logprobs.detach() + random_logits(4, 5) / 5, logprobs.detach() - random_logits(4, 5) / 3
    clip, kl, nll, gains = 0.2, 0.3, 0.0, 0.0
    for j in range(4):
        tokens = [t for t in range(5) if mask[j, t]]
        for t in tokens:
            now, before, start = (x[j, t].item() for x in (logprobs, old, reference))
            nll += -now
            ratio, a = math.exp(now - before), A[j].item()
            gain = min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a)
            gains += (gain - kl * (math.exp(start - now) - 1 - (start - now))) / len(tokens) / 4
    rd = distillation_loss(logprobs, mask)
    w = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.double)  # of the traces
    close(distillation_loss(logprobs, w[:, None] * mask, 11),
          sum(-w[j] * logprobs[j, t] for j in range(4) for t in range(5) if mask[j, t]) / 11)
    rlif = rlif_loss(logprobs, mask, A, old_logprobs=old, clip=clip, reference_logprobs=reference, kl=kl)
    close(rd, nll / 11)
    close(rlif, -gains)
    close(hytuning_loss(rd, rlif, 0.3), 0.7 * nll / 11 - 0.3 * gains)


def test_shares_with_global_counts_add_up_to_the_whole():
    logprobs, mask, A = some_losses()
    parts = [slice(0, 1), slice(1, 4), slice(4, 4)]  # one process may have nothing at all
    shares = [distillation_loss(logprobs[s], mask[s], mask.sum()) for s in parts]
    close(sum(shares), distillation_loss(logprobs, mask))
    whole = rlif_loss(logprobs, mask, A)
    close(sum(rlif_loss(logprobs[s], mask[s], A[s], 4) for s in parts), whole)
    close(whole, -A.mean())


def test_the_on_policy_loss_is_zero_but_its_gradient_is_the_policy_gradient():
    logprobs, mask, _ = some_losses()
    A = group_advantages(random_logits(4), 4).requires_grad_()
    loss = rlif_loss(logprobs, mask, A)
    found, = torch.autograd.grad(loss, logprobs, retain_graph=True)
    expected, = torch.autograd.grad(-(A.detach() * (logprobs * mask).sum(1) / mask.sum(1)).mean(), logprobs)
    close(loss.detach(), 0.0)
    close(found, expected)
    assert found.abs().max() > 0.1
    assert torch.autograd.grad(loss, A, allow_unused=True) == (None,), "no gradient makes an advantage larger"


def test_finite_difference_of_the_policy_gradient_through_the_decoder():
    """In float64, along a random direction of all parameters: what backward says of sum A mean log pi / n."""
    model, ids = tiny().double(), torch.arange(20).reshape(2, 10) % VOCAB
    mask, A = torch.ones(2, 9).double(), torch.tensor([1.0, -0.6]).double()
    logprobs = lambda: token_logprobs(model(ids)[:, :-1], ids[:, 1:])  # noqa: E731
    rlif_loss(logprobs(), mask, A).backward()
    torch.manual_seed(2)
    direction = [torch.randn_like(p) for p in model.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction))

    def objective_at(step):
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction):
                p += step * d
            value = -(A * logprobs().mean(1)).mean()
            for p, d in zip(model.parameters(), direction):
                p -= step * d
        return value
    close(slope, (objective_at(1e-5) - objective_at(-1e-5)) / 2e-5, 1e-5)


@pytest.mark.parametrize("log_ratio, advantage, moves", [
    (0.5, 1, False), (0.5, -1, True), (-0.5, 1, True), (-0.5, -1, False), (0.1, 1, True), (-0.1, -1, True)])
def test_clipping_stops_what_went_far_enough_but_not_the_way_back(log_ratio, advantage, moves):
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    rlif_loss(logprobs, torch.ones(1, 1), torch.tensor([float(advantage)]),
              old_logprobs=torch.tensor([[-1.0 - log_ratio]]), clip=0.2).backward()
    assert bool(logprobs.grad) == moves


def test_the_kl_estimate_is_right_on_average_never_negative_and_zero_at_the_reference():
    now, start = random_logits(2, 9).log_softmax(-1).requires_grad_()
    one, none = torch.ones(1, 1), torch.zeros(1)
    def k3(a, b): return rlif_loss(a.view(1, 1), one, none, reference_logprobs=b.detach().view(1, 1), kl=1.0)
    values = torch.stack([k3(a, b) for a, b in zip(now, start)])
    assert (values >= 0).all() and k3(now[0], now[0]) == 0
    assert torch.autograd.grad(k3(now[0], now[0]), now)[0].abs().max() == 0
    close((now.exp() * values).sum(), (now.exp() * (now - start)).sum())  # E k3 = KL(pi || reference)


def test_over_vocabulary_is_the_plain_computation_in_pieces():
    hidden, targets = random_logits(10, 6, dtype=torch.float).requires_grad_(), torch.arange(10)
    head, seen = torch.nn.Linear(6, 23, bias=False), []

    def watched(x):
        seen.append(len(x))
        return head(x)

    def statistic(logits, targets):
        return token_logprobs(logits, targets) + self_certainty(logits).square()
    pieces = over_vocabulary(statistic, hidden, watched, targets, chunk=4)
    plain = statistic(head(hidden), targets)
    close(pieces, plain)
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), (hidden, head.weight)) for x in (pieces, plain))):
        close(a, b, 1e-5)
    assert sorted(seen) == [2, 2, 4, 4, 4, 4], "never all logits at once, and computed again in backward"


# ----------------------------------------------------------------------------------------------- model

def rope(kind, **more):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=5e3, **more))


STRETCH = dict(factor=4.0, original_max_position_embeddings=16)
CHECKPOINTS = {
    "llama": ("Llama", {}), "tied": ("Llama", dict(tie_word_embeddings=True)),
    "no GQA": ("Llama", dict(num_key_value_heads=6)), "one key head": ("Llama", dict(num_key_value_heads=1)),
    "biases": ("Llama", dict(attention_bias=True, mlp_bias=True)), "head_dim": ("Llama", dict(head_dim=16)),
    "linear": ("Llama", rope("linear", factor=4.0)),
    "llama3": ("Llama", rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **STRETCH)),
    "yarn": ("Qwen2", rope("yarn", **STRETCH)),
    "yarn, all of it": ("Llama", rope("yarn", mscale=0.7, mscale_all_dim=0.3, beta_fast=16, truncate=False,
                                      **STRETCH)),
    "mistral": ("Mistral", dict(sliding_window=7)), "mistral, no window": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", {}), "qwen2, window off": ("Qwen2", dict(use_sliding_window=False, sliding_window=5)),
    "qwen2, window": ("Qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3, layer_types": ("Qwen3", dict(
        head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"]))}
IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(3))


def write_checkpoint(folder, family="Llama", options={}, dtype=torch.float32, **how):
    """A random tiny model, written by transformers."""
    tf = transformers()
    sizes = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
                 num_key_value_heads=2, max_position_embeddings=256)
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**{**sizes, **options})
    model = getattr(tf, f"{family}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():  # away from the ones and zeros that would hide a mistake
        torch.nn.init.normal_(p, float("norm" in name), 0.3 if p.ndim == 1 else 0.15)
    model.to(dtype).save_pretrained(folder, **how)
    return model


def reopened(folder):
    """Opened by transformers, which must find exactly what it asks for."""
    model, info = transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                                      output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def edit_json(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_the_decoder_is_that_of_transformers_there_and_back(name, tmp_path):
    theirs = write_checkpoint(tmp_path / "theirs", *CHECKPOINTS[name])
    ours = load_pretrained(tmp_path / "theirs")
    close(ours(IDS), theirs(IDS).logits, 1e-4)
    prompts = [IDS[0, :12], IDS[1, :5]]
    greedy = [theirs.generate(p[None], attention_mask=torch.ones_like(p)[None], max_new_tokens=24, do_sample=False,
                              eos_token_id=None, pad_token_id=0)[0, len(p):].tolist() for p in prompts]
    assert generate(ours, [p.tolist() for p in prompts], max_new_tokens=24, temperature=0) == [[g] for g in greedy]
    save_pretrained(ours, tmp_path / "ours")
    close(reopened(tmp_path / "ours")(IDS).logits, theirs(IDS).logits, 1e-5)


@pytest.mark.parametrize("name", ["llama", "linear", "llama3", "yarn"])
@torch.no_grad()
def test_the_older_spelling_of_a_config(name, tmp_path):
    """`rope_theta`, `rope_scaling` and `torch_dtype`; a theta of its own shows whether it is read."""
    theirs = write_checkpoint(tmp_path / "theirs", CHECKPOINTS[name][0], CHECKPOINTS[name][1] or rope("default"))
    path = tmp_path / "theirs" / "config.json"
    scaling = json.loads(path.read_text())["rope_parameters"]
    theta, kind = scaling.pop("rope_theta"), scaling.pop("rope_type")
    older = None if kind == "default" else {**scaling, ("type" if kind == "linear" else "rope_type"): kind}
    edit_json(path, rope_parameters=..., dtype=..., rope_theta=theta, rope_scaling=older, torch_dtype="float32")
    ours = load_pretrained(tmp_path / "theirs")
    close(ours(IDS), theirs(IDS).logits, 1e-4)
    save_pretrained(ours, tmp_path / "ours")
    close(reopened(tmp_path / "ours")(IDS).logits, theirs(IDS).logits, 1e-5)


@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_padding_changes_nothing(left):
    model = tiny(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    rows = [IDS[0, :9] % VOCAB, IDS[1, :5] % VOCAB]
    ids, positions = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    places = [slice(9 - len(row), 9) if left else slice(0, len(row)) for row in rows]
    mask = torch.eye(9, dtype=torch.bool).repeat(2, 1, 1, 1)
    for b, (row, place) in enumerate(zip(rows, places)):
        ids[b, place], positions[b, place] = row, torch.arange(len(row))
        mask[b, 0, place, place] = torch.ones(len(row), len(row)).tril().bool()
    logits = model(ids, positions, mask)
    for b, (row, place) in enumerate(zip(rows, places)):
        close(logits[b, place], model(row[None])[0], 1e-5)


@torch.no_grad()
def test_a_bfloat16_file_becomes_a_float32_model(tmp_path):
    write_checkpoint(tmp_path, dtype=torch.bfloat16)
    ours = load_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    close(ours(IDS), reopened(tmp_path)(IDS).logits, 1e-4)
    assert load_pretrained(tmp_path, dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_shards_there_and_back(tmp_path, monkeypatch):
    theirs = write_checkpoint(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ours = load_pretrained(tmp_path)
    close(ours(IDS), theirs(IDS).logits, 1e-4)
    monkeypatch.setattr(decoder, "SHARD_BYTES", 70_000)
    save_pretrained(ours, tmp_path)  # over their shards, which must not be taken for ours
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for again in (load_pretrained(tmp_path)(IDS), reopened(tmp_path)(IDS).logits):
        close(again, ours(IDS), 1e-5)
    monkeypatch.undo()
    save_pretrained(ours, tmp_path)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"], "no stale shards"


def edit_weights(folder, change):
    path = next(folder.glob("model*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cut_short(folder):
    path = next(folder.glob("model*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def remove(pattern):
    return lambda folder: [path.unlink() for path in list(folder.glob(pattern))]


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


BROKEN = {  # what happens to the folder, and what the message must name
    "no folder": (shutil.rmtree, "checkpoint"), "no config": (remove("config.json"), "config.json"),
    "config not JSON": (write("config.json", "{"), "config.json"),
    "config a list": (write("config.json", "[]"), "config.json"),
    "unknown family": (config(model_type="gpt2"), "config.json"),
    "a size missing": (config(hidden_size=...), "config.json"),
    "a size of text": (config(hidden_size="32"), "config.json"),
    "gelu": (config(hidden_act="gelu"), "config.json"),
    "quantized": (config(quantization_config={"bits": 4}), "config.json"),
    "longrope": (config(rope_parameters={"rope_type": "longrope"}), "config.json"),
    "no weights": (remove("model*"), "model.safetensors"), "truncated": (cut_short, "model-0000"),
    "a shard missing": (remove("model-00002-*"), "model-00002-of-00002.safetensors"),
    "index not JSON": (write("model.safetensors.index.json", "?"), "model.safetensors.index.json"),
    "a key renamed": (lambda f: edit_weights(f, lambda t: t.update({"x.weight": t.popitem()[1]})), "x.weight"),
    "a key missing": (lambda f: edit_weights(f, lambda t: t.popitem()), "checkpoint"),
    "a wrong shape": (lambda f: edit_weights(f, lambda t: t.update({k: v[1:].clone() for k, v in t.items()})),
                      "size mismatch for "),
    "foreign tokenizer": (write("tokenizer.json", '{"model": {"vocab": {"a": 61}}}'), "tokenizer.json"),
    "tokenizer not one": (write("tokenizer.json", "{}"), "tokenizer.json")}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_named_in_one_line(name, tmp_path, monkeypatch):
    model, folder = tiny(), tmp_path / "checkpoint"
    monkeypatch.setattr(decoder, "SHARD_BYTES", 50_000)
    save_pretrained(model, folder)
    assert len(list(folder.glob("model-*-of-00002.safetensors"))) == 2, "what is broken must be there at first"
    load_pretrained(folder)
    damage, named = BROKEN[name]
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif("HYTUNING_SMOLLM2" not in os.environ, reason="HYTUNING_SMOLLM2 names no real checkpoint")
@torch.no_grad()
def test_a_real_checkpoint():
    folder = Path(os.environ["HYTUNING_SMOLLM2"])
    reference, model = json.loads((folder / "reference.json").read_text()), load_pretrained(folder)
    for case in reference["prompts"]:
        logits = model(torch.tensor([case["ids"]]))[0, -1]
        close(logits[:64], case["logits_head"], 1e-3)
        close(logits.logsumexp(0), case["logsumexp"], 1e-4)
        n = len(case["greedy"])
        [[found]] = generate(model, [case["ids"]], max_new_tokens=n, temperature=0, eos_ids=model.eos_ids)
        assert found == case["greedy"]
    ids = torch.tensor([reference["text"]["ids"]])
    close(token_logprobs(model(ids)[:, :-1], ids[:, 1:]).mean(), reference["text"]["mean_logprob"], 1e-4)
    text = data.Text(folder, model.eos_ids)
    assert text.encode(reference["text"]["text"]) == reference["text"]["ids"]


# -------------------------------------------------------------------------------------------- sampling

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [5, 6, 8]]


@torch.no_grad()
def next_token(model, ids, temperature=1.0):
    return (model(torch.tensor([ids]))[0, -1].double() / temperature).softmax(-1)


def check_frequencies(counts, expected, n):
    """Pearson's chi-square, which has mean `dof` and about the variance 2 dof + sum 1/(n p)."""
    cells = {k: p for k, p in expected.items() if p > 0}
    assert set(counts) <= set(cells), "a token that cannot come up"
    chi = sum((counts[k] - n * p)**2 / (n * p) for k, p in cells.items())
    dof = len(cells) - 1
    assert abs(chi - dof) < 5 * math.sqrt(2 * dof + sum(1 / p for p in cells.values()) / n) + 1


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_two_tokens_come_up_as_often_as_they_should(temperature):
    """Pairs, so that the cache and the independence of the draws are tested too."""
    model, n = tiny(vocab=5), 8000
    samples, = generate(model, [[1, 2, 3]], samples_per_prompt=n, max_new_tokens=2, temperature=temperature,
                        seed=4)
    first = next_token(model, [1, 2, 3], temperature)
    expected = {(a, b): (first[a] * next_token(model, [1, 2, 3, a], temperature)[b]).item()
                for a in range(5) for b in range(5)}
    check_frequencies(Counter(map(tuple, samples)), expected, n)


@pytest.mark.parametrize("vocab, top_p, temperature", [
    (600, 1.0, 2.0), (40, 0.6, 1.0), (600, 0.9, 2.0), (40, 0.05, 1.0)])
def test_a_nucleus_is_the_smallest_set_with_that_probability(vocab, top_p, temperature):
    model, n = tiny(vocab=vocab), 20000
    samples, = generate(model, [[1, 2, 3]], samples_per_prompt=n, max_new_tokens=1, temperature=temperature,
                        top_p=top_p, seed=5)
    expected, mass = {}, 0.0
    for p, token in zip(*(x.tolist() for x in next_token(model, [1, 2, 3], temperature).sort(descending=True))):
        if mass < top_p or top_p == 1:
            expected[token], mass = p, mass + p
    check_frequencies(Counter(token for token, in samples), {k: p / mass for k, p in expected.items()}, n)


@pytest.mark.parametrize("options", [{}, dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)])
def test_greedy_is_the_argmax_of_passes_without_a_cache(options):
    model = tiny(**options)
    for prompt, (found,) in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=30, temperature=0)):
        ids = list(prompt)
        while len(ids) < len(prompt) + 30:
            ids.append(next_token(model, ids).argmax().item())
        assert found == ids[len(prompt):]


ENDS = (3, 20, 40)
SAMPLING = dict(samples_per_prompt=10, max_new_tokens=50, temperature=1.5, seed=7)  # families of 4, 4 and 2


@pytest.mark.parametrize("options", [{}, dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)])
@torch.no_grad()
def test_samples_are_those_of_passes_without_a_cache(options):
    """Each token is drawn again, from the logits of the whole text and the same random number."""
    model, n = tiny(**options), SAMPLING["max_new_tokens"]
    u = decoder.uniforms(PROMPTS, 10, n, SAMPLING["seed"]).view(len(PROMPTS), 10, n)
    for prompt, group, numbers in zip(PROMPTS, generate(model, PROMPTS, eos_ids=ENDS, **SAMPLING), u):
        for sample, number in zip(group, numbers):
            logits = model(torch.tensor([prompt + sample]))[0, len(prompt) - 1:-1]
            assert decoder.draw(logits, number[:len(sample)], SAMPLING["temperature"], 1.0).tolist() == sample


def test_a_sample_does_not_depend_on_its_neighbours():
    whole = generate(MODEL, PROMPTS, eos_ids=ENDS, **SAMPLING)
    assert [generate(MODEL, [p], eos_ids=ENDS, **SAMPLING)[0] for p in PROMPTS] == whole, "split over calls"
    assert generate(MODEL, PROMPTS[::-1], eos_ids=ENDS, **SAMPLING) == whole[::-1], "in another order"
    fewer = generate(MODEL, PROMPTS, eos_ids=ENDS, **{**SAMPLING, "samples_per_prompt": 3})
    assert fewer == [group[:3] for group in whole], "with fewer samples"
    shorter = generate(MODEL, PROMPTS, eos_ids=ENDS, **{**SAMPLING, "max_new_tokens": 17})
    assert shorter == [[sample[:17] for sample in group] for group in whole], "with another length limit"


def test_samples_end_with_their_end_token_and_finished_rows_disturb_nobody():
    """Without end tokens no row leaves the batch: cut off by hand, the same must remain."""
    ended, endless = generate(MODEL, PROMPTS, eos_ids=ENDS, **SAMPLING), generate(MODEL, PROMPTS, **SAMPLING)

    def cut_off(sample):
        return sample[:next((i + 1 for i, x in enumerate(sample) if x in ENDS), len(sample))]
    assert ended == [[cut_off(sample) for sample in group] for group in endless]
    lengths = sorted(len(sample) for group in ended for sample in group)
    assert lengths[0] < 16 and lengths[-1] > 32, "some must leave early and some stay, or nothing was tested"


def test_samples_differ():
    ten = generate(MODEL, [[5, 6, 7]], **SAMPLING)[0]
    assert len(set(map(tuple, ten))) == 10
    twice = generate(MODEL, [[5, 6, 7], [5, 6, 7]], **{**SAMPLING, "samples_per_prompt": 5})
    assert twice[0] + twice[1] == ten, "a prompt given twice goes on with new samples"
    assert generate(MODEL, [[5, 6, 7]], **{**SAMPLING, "seed": 8})[0] != ten
    assert generate(MODEL, [[5, 6, 7]], **SAMPLING)[0] == ten


def test_a_prompt_that_cannot_be_read_is_refused():
    for prompt in ([], [VOCAB], [-1]):
        with pytest.raises(ValueError):
            generate(MODEL, [[1], prompt], max_new_tokens=1)


# ------------------------------------------------------------------------------------------------ data

@pytest.mark.parametrize("text, answer", [
    ("It follows.\nAnswer: 12", "12"), ("Answer: 1\nno, wait\nAnswer:  two words \nbye", "two words"),
    ("Answer:", None), ("Answer: \n12", None), ("12", None), ("", None)])
def test_an_answer_is_the_rest_of_the_last_markers_line(text, answer):
    assert data.extract_answer(text) == answer


@pytest.mark.parametrize("a, b, same", [
    ("$1,000", "1000.00", True), ("1000 dollars", "1000", True), ("Yes.", "yes", True), ("**18**", "18", True),
    ("1/2", "0.5", True), ("18%", "18", True), ("-5", "5", False), ("12", "13", False), ("x = 5", "5", True),
    ("3 apples", "3 oranges", False), ("3 of 4", "3", False), ("Paris", "paris", True), ("Paris", "Rome", False),
    ("12", "twelve", False), ("1/0", "1", False), (".5", "5", False), (".5", "0.5", True), ("-$5", "5", False),
    ("-$5", "-5", True), ("\u22125", "-5", True), ("(B)", "B", True), ("yes!", "yes", True),
    ("$", "!", False)])
def test_answers_match(a, b, same):
    assert data.answers_match(a, b) == data.answers_match(b, a) == same


def test_the_majority_counts_unreadable_answers_as_votes():
    assert data.majority(["4", "5", "4.0", None]) == ("4", 0.5)
    assert data.majority(["5", "4"]) == ("5", 0.5), "the earliest of equals"
    assert data.majority([None, None]) == (None, 0)


def test_same_answers_are_found_whatever_their_spelling():
    assert data.same_answers(["4", "5", "4.0", None, None, "$5"]) == [0, 1, 0, 3, 4, 1], "no two unreadable ones agree"
    assert data.same_answers([]) == []


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy data")
    _, end = data.Triage().write(folder)
    return folder, data.Text(folder, [end])


CHATML, LLAMA3 = (["<|im_start|>", "<|im_end|>"],
                  ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A tokenizer of single bytes with a chat format's special tokens: (special tokens, max_steps) -> Text."""
    def build(special, max_steps=16):
        folder = tmp_path_factory.mktemp("chat")
        alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(alphabet, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(special)
        tokenizer.save(str(folder / "tokenizer.json"))
        return data.Text(folder, max_steps=max_steps)
    return build


def test_the_toys_trace_is_cut_at_its_lines(toy):
    folder, text = toy
    for _, record in data.read_jsonl(folder / "labeled.jsonl"):
        prompt, response = text.prompt(record["prompt"]), text.response(record["reasoning"], record["answer"])
        assert record["prompt"] in text.decode(prompt)
        assert text.decode(response) == f"{record['reasoning']}\nAnswer: {record['answer']}"
        trace = Trace(*text.parse(prompt, response))
        assert trace.tokens + trace.tail == prompt + response and trace.tail == [text.end]
        parts = [text.decode(trace.tokens[a:b]).strip() for a, b in zip(trace.cuts, trace.cuts[1:])]
        assert trace.cuts[0] == len(prompt) and parts == record["reasoning"].splitlines()
        assert text.decode(trace.tokens[trace.cuts[-1]:trace.answer_start]).strip() == "Answer:"
        assert text.decode(trace.tokens[trace.answer_start:]).strip() == record["answer"]


LINE = st.text("aé漢🙂 .", min_size=1, max_size=4).map(str.strip).filter(bool)


@settings(max_examples=60)
@given(st.lists(LINE, max_size=9), LINE, st.sampled_from(["\n", "\n\n", "\n  "]), st.integers(1, 6))
def test_steps_of_any_text_are_whole_lines_merged_evenly(chat, lines, answer, between, max_steps):
    """Characters of several tokens, empty lines, indented ones; what follows the answer's line is tail."""
    text = chat(CHATML, max_steps)
    response = text.encode(between.join(lines + [f"Answer: {answer}"]) + "\nbye") + [text.end]
    trace = Trace(*text.parse([1, 2], response))
    steps = [text.decode(trace.tokens[a:b]).split("\n") for a, b in zip(trace.cuts, trace.cuts[1:])]
    found = [[line.strip() for line in step if line.strip()] for step in steps]
    assert sum(found, []) == lines and len(found) == min(len(lines), max_steps)
    sizes = set(map(len, found))
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert text.decode(trace.tokens[trace.answer_start:]).strip() == answer
    assert trace.tail == text.encode("\nbye") + [text.end]


def test_a_response_without_an_answer_has_none(toy):
    _, text = toy
    for response in ("1 suggests", "Answer:", ""):
        whole = [5, 6, *text.encode(response)]
        assert text.parse(whole[:2], whole[2:]) == (whole, [2], len(whole), [])


def test_an_empty_line_is_no_step(chat):
    text = chat(CHATML)
    for blank in ("", "\n", " \n\n"):
        assert text.parse([1, 2], text.encode(f"{blank}Answer: 7"))[1] == [2]


def test_prompts_have_the_chat_format_and_special_tokens_in_a_question_stay_text(chat):
    for special, before, after in (
            (CHATML, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
            (LLAMA3, "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
             "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")):
        text, question = chat(special), f"why {special[-1]} é?"
        ids = text.prompt(question)
        shown = text.tokenizer.decode(ids, skip_special_tokens=False)
        assert shown.startswith(before + question) and shown.endswith(after)
        assert ids.count(text.special[special[-1]]) == 1 and text.end == text.special[special[-1]]
        assert text.end not in text.response(special[-1], "1")[:-1]


def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path, toy):
    for content in (None, "{", "{}"):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(data.DataError, match="tokenizer.json"):
            data.Text(tmp_path, [0])
    with pytest.raises(data.DataError, match="end token"):
        data.Text(toy[0])


def test_an_end_token_that_the_tokenizer_shows_is_not_part_of_the_answer(toy, tmp_path):
    text, folder = toy[1], tmp_path / "shown"
    shutil.copytree(toy[0], folder)
    table = json.loads((folder / "tokenizer.json").read_text())
    for token in table["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(table))
    shown = data.Text(folder, text.ends)
    record = data.Triage().record(data.np.random.default_rng(0))
    response = text.response(record["reasoning"], record["answer"])
    assert shown.parse([5], response) == text.parse([5], response)
    assert shown.decode(response) == text.decode(response)


def test_a_tokenizer_that_knows_no_text_is_named(tmp_path):
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(data.DataError, match="tokenizer.json"):
        data.Text(tmp_path, [0]).prompt("a question")


def test_a_response_that_is_no_text_has_no_answer(tmp_path):
    """Tokenizers of the Llama 2 kind have a token for each byte, and a sampled response may string them anyhow."""
    words = {"<unk>": 0, "</s>": 1, "<0x0A>": 2, "<0xE2>": 3, "A": 4}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    trace = data.Text(tmp_path, [1]).parse([4], [2, 3, 4, 1])
    assert trace == ([4, 2, 3, 4, 1], [1], 5, [])


def write_lines(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def test_records_in_gsm8ks_form(tmp_path, toy, chat):
    path = write_lines(tmp_path / "a.jsonl",
                       {"question": "How many?", "answer": "9 + 9 = <<9+9=18>>18\n#### 18"}, "",
                       {"prompt": "And?", "reasoning": "one\n\n two", "answer": 3})
    text = chat(CHATML)
    (_, first), (_, second) = data.load_labeled(path, text, 500, 500)[0]
    assert text.decode(first) == "9 + 9 = 18\nAnswer: 18"
    assert text.decode(second) == "one\ntwo\nAnswer: 3"
    assert [(question, gold) for _, question, gold in data.load_eval(path, text, 500)[0]] == [
        ("How many?", "18"), ("And?", "3")]
    assert data.load_labeled(path, text, 500, len(second))[1] == 1, "the longer one is skipped, and counted"
    assert len(data.load_eval(path, text, 500, limit=1)[0]) == 1


def test_unlabeled_answers_are_never_read(tmp_path, chat):
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "a", "answer": {"x": [1]}},
                       {"prompt": "b", "answer": "\ud800"}, {"question": "a"})
    text = chat(CHATML)
    assert data.load_unlabeled(path, text, 500)[0] == [text.prompt("a"), text.prompt("b")], "repeated ones once"


@pytest.mark.parametrize("line", [
    b"{", b"[1]", b'"text"', b"\xff\xfe",
    b'{"reasoning": "r", "answer": "1"}', b'{"prompt": "p", "reasoning": "r"}',
    b'{"prompt": "p", "answer": "1"}', b'{"prompt": ["p"], "reasoning": "r", "answer": "1"}',
    b'{"prompt": "p", "reasoning": null, "answer": "1"}', b'{"prompt": "p", "reasoning": "r", "answer": true}',
    b'{"prompt": "\\ud800", "reasoning": "r", "answer": "1"}', b'{"prompt": " ", "reasoning": "r", "answer": "1"}',
    b'{"prompt": "p", "reasoning": "r", "answer": " "}', b'{"prompt": "p", "reasoning": "r", "answer": "1\\n2"}',
    b'{"prompt": "p", "answer": "because ####"}'])
def test_a_bad_line_is_named(line, tmp_path, chat):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "p", "reasoning": "r", "answer": "1"}\n\n' + line + b"\n")
    with pytest.raises(data.DataError, match=r"bad\.jsonl line 3\b") as caught:
        data.load_labeled(path, chat(CHATML), 500, 500)
    assert "\n" not in str(caught.value)


def test_a_file_without_records_is_named(tmp_path, chat):
    (tmp_path / "empty.jsonl").write_text("\n")
    long = write_lines(tmp_path / "long.jsonl", {"prompt": "p" * 999})
    for path, wrong in ((tmp_path / "empty.jsonl", "empty"), (tmp_path / "none.jsonl", "read"), (long, "longer")):
        with pytest.raises(data.DataError, match=f"{path.name}.*{wrong}"):
            data.load_unlabeled(path, chat(CHATML), 500)


def statements(task, reasoning) -> list[tuple[int, int]]:
    """(finding, condition) of each line of a trace."""
    finding, condition = ({word: i for i, word in enumerate(words)} for words in (task.findings, task.conditions))
    lines = (line.split() for line in reasoning.splitlines())
    return [(next(finding[w] for w in line if w in finding), condition[line[-1]]) for line in lines]


def test_a_careful_author_is_right():
    task, rng = data.Triage(), data.np.random.default_rng(0)
    for _ in range(50):
        record = task.record(rng)
        listed = [task.findings.index(w) for w in record["prompt"].split() if w in task.findings]
        assert [f for f, _ in statements(task, record["reasoning"])] == listed
        assert all(task.truth[f] == c for f, c in statements(task, record["reasoning"]))
        (first, votes), (_, second) = Counter(task.truth[listed].tolist()).most_common(2)
        assert record["answer"] == task.conditions[first] and votes > second


def test_careless_authors_are_right_about_half_of_the_time_and_share_misconceptions():
    task, rng = data.Triage(), data.np.random.default_rng(0)
    stated = [Counter() for _ in task.findings]
    for _ in range(2500):
        for finding, condition in statements(task, task.record(rng, careless=True)["reasoning"]):
            stated[finding][condition] += 1
    right = sum(counts[task.truth[f]] for f, counts in enumerate(stated)) / sum(map(Counter.total, stated))
    assert 0.35 < right < 0.65
    popular_and_wrong = sum(counts.most_common(1)[0][0] != task.truth[f] for f, counts in enumerate(stated))
    assert 0.2 < popular_and_wrong / len(stated) < 0.5


def test_the_toys_files_are_disjoint_and_a_function_of_the_seed(toy, tmp_path):
    names = ("labeled.jsonl", "unlabeled.jsonl", "eval.jsonl")
    prompts = [{record["prompt"] for _, record in data.read_jsonl(toy[0] / name)} for name in names]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    assert all("answer" not in record for _, record in data.read_jsonl(toy[0] / "unlabeled.jsonl"))
    data.Triage().write(tmp_path / "same")
    data.Triage().write(tmp_path / "other", seed=1)
    for name in names:
        assert (tmp_path / "same" / name).read_bytes() == (toy[0] / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (toy[0] / name).read_bytes()


# ----------------------------------------------------------------------------------------------- train

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}


def run(cwd, *arguments):
    """`python train.py` in cwd on the CPU."""
    return subprocess.run([sys.executable, train.__file__, "--device", "cpu", *map(str, arguments)], cwd=cwd,
                          env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def outcome(cwd, out) -> tuple[list[dict], dict]:
    """(lines of metrics.jsonl, final weights)"""
    lines = [json.loads(line) for line in (cwd / out / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(cwd / out / "model" / "model.safetensors")


def trained(cwd, out, *arguments) -> tuple[list[dict], dict]:
    """The outcome of a run that must succeed."""
    done = run(cwd, "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    return outcome(cwd, out)


EVALUATION = ["--max_eval", 40, "--eval_samples", 4]
SMALL = ["--max_eval", 4, "--eval_samples", 2, "--show", 0, "--max_new_tokens", 40]
SHORT = [*SMALL, "--max_prompt_tokens", 64, "--queries_per_step", 2, "--group_size", 2, "--tokens_per_batch", 512,
         "--steps", 1, "--device", "cpu"]


def toy_trainer(toy, *more) -> train.Trainer:
    """A Trainer in this process. `more` comes last, so it may give another --model or --labeled than the toy's."""
    files = ["--model", toy, "--labeled", toy / "labeled.jsonl", "--unlabeled", toy / "unlabeled.jsonl"]
    return train.Trainer(train.parse_arguments(map(str, [*files, *SHORT, *more])), train.World("cpu"))


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """The default run, shortened, with a learning rate that lets few steps show: (folder, metrics, output)."""
    cwd = tmp_path_factory.mktemp("run")
    done = run(cwd, "--steps", 10, "--lr", 1e-3, "--show", 1, *EVALUATION)
    assert done.returncode == 0, done.stderr
    lines = (cwd / "out/run/metrics.jsonl").read_text().splitlines()
    return cwd, [json.loads(line) for line in lines], done.stdout + done.stderr


def test_the_default_run_learns(toy_run):
    cwd, lines, _ = toy_run
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert all(math.isfinite(v) for line in lines for v in line.values())
    assert all(0 < line["lambda"] < 1 for line in lines)
    assert lines[-1]["loss_rd"] < 0.8 * lines[0]["loss_rd"]
    result = json.loads((cwd / "out/run/eval.json").read_text())
    assert result["final"]["accuracy"] > result["base"]["accuracy"] + 0.1


def test_a_judge_that_does_not_understand_the_traces_is_named(toy_run, tmp_path, capsys):
    """One whose weights are noise; the toy's own is silent."""
    toy, noise = toy_run[0] / "out/toy", tmp_path / "noise"
    shutil.copytree(toy, noise)
    weights = load_file(noise / "model.safetensors")
    save_file({name: torch.randn_like(weight) for name, weight in weights.items()}, noise / "model.safetensors")
    for model in (toy, noise):
        toy_trainer(toy, "--model", model)
        said = capsys.readouterr().out
        assert ("warning" in said and str(noise) in said and "--method rd" in said) == (model == noise)


def test_the_judge_does_not_learn(toy_run):
    """The anchor is the traces' mean PRG under the starting model, and that model stays what it was."""
    toy = toy_run[0] / "out/toy"
    trainer = toy_trainer(toy, "--lr", 1)
    start = load_pretrained(toy)
    gains = progressive_reasoning_gain(*answer_support(start, [x.trace for x in trainer.traces]))
    assert trainer.step()["anchor"] == pytest.approx(gains.mean().item(), abs=1e-5)
    for name, weight in start.named_parameters():
        assert torch.equal(weight, trainer.judge_model.get_parameter(name))
        assert not torch.equal(weight, trainer.model.get_parameter(name)), "or nothing was tested"


def test_a_trace_whose_lines_do_not_earn_its_answer_counts_less(toy_run, tmp_path):
    """By its own PRG under the starting model, in hytuning alone; and the loss is that of the weights."""
    toy, path = toy_run[0] / "out/toy", tmp_path / "labeled.jsonl"
    records = [json.loads(line) for line in (toy / "labeled.jsonl").read_text().splitlines()]
    answers = sorted({r["answer"] for r in records})
    for r in records[:4]:
        r["answer"] = answers[answers.index(r["answer"]) - 1]  # another one
    path.write_text("\n".join(map(json.dumps, records)))

    weighed = toy_trainer(toy, "--labeled", path)
    weight = torch.tensor([x.weight for x in weighed.traces])
    close(weight.mean(), 1)
    assert weight[:4].max() < 0.5 * weight[4:].mean()
    w = adaptive_weights(torch.tensor([x.prg for x in weighed.traces]), weighed.anchor, weighed.settings.tau)
    close(weight, w / w.mean(), 1e-5)
    assert all(x.weight == 1 for x in toy_trainer(toy, "--labeled", path, "--method", "rd").traces)

    ids = [torch.tensor([x.ids]) for x in weighed.traces]
    nll = [-token_logprobs(weighed.model(i)[0, :-1], i[0, 1:])[x.prompt_length - 1:].sum()
           for i, x in zip(ids, weighed.traces)]
    tokens = sum(x.length for x in weighed.traces)
    close(weighed.backward(weighed.traces, 0.0, tokens, 1)[0], sum(w * n for w, n in zip(weight, nll)) / tokens, 1e-5)


def test_what_has_no_answer_earns_nothing(toy_run):
    """Whatever the anchor: however little a gate let through, an advantage would make it large."""
    trainer = toy_trainer(toy_run[0] / "out/toy", "--group_size", 4)
    response = trainer.traces[0].response

    def weighed(*responses):
        rollouts = [trainer.sequence([3], response) for response in responses]
        for i, x in enumerate(rollouts):
            x.certainty = 10.0 + i
        trainer.judge(rollouts, trainer.judge_model)
        trainer.anchor = 0.9
        return trainer.weigh(rollouts, len(rollouts)), [x.advantage for x in rollouts]
    assert weighed(*[response[:-3]] * 4) == (0, [0, 0, 0, 0])
    lam, advantages = weighed(response, *[response[:-3]] * 3)
    assert lam > 0 and advantages[0] > 1 and len(set(advantages[1:])) == 1


def test_the_evaluation_says_what_it_should(toy_run):
    cwd, _, output = toy_run
    result = json.loads((cwd / "out/run/eval.json").read_text())
    assert set(result) == {"base", "final"}
    for values in result.values():
        assert set(values) == {"accuracy", "majority_accuracy", "greedy_accuracy", "confidence",
                               "confidence_when_wrong", "ece", "brier", "auroc", "prg", "n"}
        assert values["n"] == 40 and -1 <= values.pop("prg") <= 1
        assert all(0 <= v <= 1 for k, v in values.items() if k != "n")
    assert "right answer" in output and "p = " in output, "--show prints the support of a query"


def test_the_saved_model_is_complete(toy_run):
    """It is evaluated alike when it is loaded again, and transformers opens it, tokenizer and all."""
    cwd, _, _ = toy_run
    folder = cwd / "out/run/model"
    done = run(cwd, "--eval_only", "--model", folder, "--eval", "out/toy/eval.jsonl", "--max_prompt_tokens", 64,
               "--max_new_tokens", 48, "--out", "out/again", *EVALUATION)
    assert done.returncode == 0, done.stderr
    before, again = (json.loads((cwd / "out" / name).read_text())
                     for name in ("run/eval.json", "again/eval_only.json"))
    assert again["final"] == pytest.approx(before["final"])
    tf, ours = transformers(), load_pretrained(folder)
    text = data.Text(folder, ours.eos_ids)
    prompt = text.prompt(data.read_jsonl(cwd / "out/toy/eval.jsonl")[0][1]["prompt"])
    with torch.no_grad():
        close(reopened(folder)(torch.tensor([prompt])).logits, ours(torch.tensor([prompt])), 1e-4)
    assert tf.AutoTokenizer.from_pretrained(folder)(text.decode(prompt)).input_ids == prompt


def test_a_resumed_run_equals_an_uninterrupted_one(toy_run):
    cwd, few = toy_run[0], [*SMALL, "--queries_per_step", 4, "--group_size", 4]
    lines, weights = trained(cwd, "out/whole", "--steps", 6, *few)
    trained(cwd, "out/parts", "--steps", 4, *few)
    resumed_lines, resumed = trained(cwd, "out/parts", "--steps", 6, "--resume", *few)
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    for a, b in zip(lines, resumed_lines, strict=True):
        assert all(a[k] == b[k] for k in a if "second" not in k)
    assert set(json.loads((cwd / "out/parts/eval.json").read_text())) == {"base", "final"}
    trained(cwd, "out/parts", "--steps", 6, "--resume", *few, "--eval_samples", 3)
    assert set(json.loads((cwd / "out/parts/eval.json").read_text())) == {"final"}, "the base had another evaluation"
    refused = run(cwd, "--out", "out/parts", "--resume", "--steps", 8, "--lr", 1, *few)
    assert refused.returncode == 2 and "--lr" in refused.stderr


# --------------------------------------------------------------------------------------------- hostile files

# Values that a hostile or broken file may hold, and pieces of bytes.
ODD_VALUES = [None, True, False, 0, -1, 3, 0.5, 2**31, 2**63, -10**30, 10**400, 1e308, math.nan, math.inf, "", "32",
              "\0", "\ud800", "é漢🙂", "9" * 300, [], [None], [[]], {}, {"a": {"b": [1]}}]
ODD_BYTES = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"}", b'"', b"\\ud800", b"\r", b"\x85", b"NaN", b"1e999",
             b"[" * 3000]
ODD_FILES = [b"", b"\0" * 99, b"\n\n", b"null", b'"' + b"x" * 10**7 + b'"', b"[" * 10**6, b'{"prompt":' * 10**5,
             b'{"prompt": ' + b"9" * 9999 + b"}", b'{"prompt": "a", "answer": "' + b"<<" * 10**5 + b' #### 1"}',
             '{"prompt": "a\u2028b", "reasoning": "x\u2028y\u0085z", "answer": "1\u20282"}'.encode(),
             b'{"prompt": "a", "reasoning": "Answer: 3\\nAnswer:", "answer": "Answer: x"}']


def places(value):
    """(container, key) of everything inside a JSON value."""
    for key, inside in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inside, (dict, list)):
            yield from places(inside)


def broken_json(content: bytes, rng) -> bytes:
    """The same JSON with a few values removed, renamed or replaced by odd ones."""
    value = json.loads(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        container, key = rng.choice([*places(value)] or [([0], 0)])
        how = rng.random()
        if how < 0.2:
            del container[key]
        elif how < 0.3 and isinstance(container, dict):
            container["x" + key] = container.pop(key)
        else:
            container[key] = json.loads(json.dumps(rng.choice([*ODD_VALUES, [container[key]]])))
    return json.dumps(value).encode()


def broken_bytes(content: bytes, rng) -> bytes:
    """Cut off, with bytes changed, inserted, left out, said twice, or in another encoding."""
    for _ in range(rng.choice([1, 2, 8])):
        a = rng.randrange(len(content) + 1)
        b = a + rng.randrange(1, 40)
        content = rng.choice([
            lambda: content[:a], lambda: content[:a] + content[b:], lambda: content[:b] + content[a:],
            lambda: content[:a] + rng.randbytes(b - a) + content[b:],
            lambda: content[:a] + rng.choice(ODD_BYTES) + content[a:],
            lambda: content.decode(errors="replace").encode(rng.choice(["utf-16", "utf-8-sig", "cp037"]), "replace")])()
    return content


RECORDS = b"""{"prompt": "why 1 suggests?", "reasoning": "one\\ntwo", "answer": "18"}
{"question": "And?", "answer": "9+9=<<9+9=18>>18\\n#### 18"}
"""


def read_records(path, text):
    """Each loader on the file, and each supervised trace cut into steps."""
    for load in (lambda: data.load_labeled(path, text, 512, 512), lambda: data.load_unlabeled(path, text, 512),
                 lambda: data.load_eval(path, text, 512)):
        try:
            records, _ = load()
        except data.DataError as error:
            yield str(error)
            continue
        for prompt, response in (record for record in records if len(record) == 2 and isinstance(record, tuple)):
            tokens, _, _, tail = text.parse(prompt, response)
            assert tokens + tail == prompt + response


def use_folder(folder):
    """What a run does with a checkpoint: load, encode, sample, cut into steps, save, load again."""
    try:
        model = load_pretrained(folder)
        text = data.Text(folder, model.eos_ids)
        prompt = text.prompt("1 suggests")
        if not prompt or max(prompt) < model.config.vocab_size:
            [[response]] = generate(model, [prompt], max_new_tokens=2, eos_ids=text.ends)
            text.parse(prompt, response)
            save_pretrained(model, folder.with_name("saved"))
            load_pretrained(folder.with_name("saved"))
    except (CheckpointError, data.DataError) as error:
        yield str(error)


def test_hostile_files_end_in_a_result_or_in_one_sentence(tmp_path, toy):
    """550 of them from a fixed seed: records, config, tokenizer, generation config, weights."""
    rng, names = random.Random(0), ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"]
    model, sentences, results = tiny(vocab=224), 0, 0
    good, bad, lines = tmp_path / "good", tmp_path / "bad, é 漢", tmp_path / "lines é.jsonl"
    model.files = {"tokenizer.json": (toy[0] / "tokenizer.json").read_bytes(),
                   "generation_config.json": json.dumps({"eos_token_id": toy[1].end}).encode()}
    save_pretrained(model, good)
    assert not [*use_folder(good)], "what is broken must be whole at first"
    for case in range(550):
        if case < 200:
            files = [broken_bytes(RECORDS, rng), b"\n".join(broken_json(x, rng) for x in RECORDS.splitlines()),
                     *ODD_FILES]
            lines.write_bytes(files[case % 2] if case >= len(files) else files[case])
            said = [*read_records(lines, toy[1])]
        else:
            name = names[case % 4]
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            broken = broken_bytes if case % 3 == 0 or name == "model.safetensors" else broken_json
            (bad / name).write_bytes(broken((good / name).read_bytes(), rng))
            said = [*use_folder(bad)]
        assert all(sentence and "\n" not in sentence for sentence in said), (case, said)
        sentences, results = sentences + bool(said), results + (not said)
    assert sentences > 100 and results > 50, "some are still good, or nothing was told apart"


def test_a_folder_of_any_name(toy_run, tmp_path):
    """Spaces, other scripts; a damaged file in it, or a name that is no text, ends with status 2 and one line."""
    def outcome_in(folder):
        return run(tmp_path, "--eval_only", "--model", folder, "--eval", folder / "eval.jsonl",
                   "--max_prompt_tokens", 64, "--out", folder / "out", *SMALL)
    folder, no_text = tmp_path / "a b é 漢", tmp_path / os.fsdecode(b"\xff")
    for copy in (folder, no_text):
        shutil.copytree(toy_run[0] / "out/toy", copy)
    failures = {no_text / "model.safetensors": outcome_in(no_text)}
    for name in ("eval.jsonl", "tokenizer.json", "model.safetensors"):
        path, whole = folder / name, (folder / name).read_bytes()
        path.write_bytes(b"{" + whole[len(whole) // 2:])
        failures[path] = outcome_in(folder)
        path.write_bytes(whole)
    for path, done in failures.items():
        error, = done.stderr.splitlines()
        assert done.returncode == 2 and error.startswith("error: ") and path.name in error
    done = outcome_in(folder)
    assert done.returncode == 0 and (folder / "out/eval_only.json").is_file(), done.stderr


# ------------------------------------------------------------------------------- several processes, faults

# Does the runs of its first argument, [[class of trainer, command line], ...], one after the other in one set of
# processes, and then what train.py does with an error.
DRIVER = """
import hashlib, json, os, signal, sys, time
import torch, train

class Hashed(train.Trainer):  # notes a hash of all weights after each step, in each process
    def step(self):
        line = super().step()
        with open(f"{self.settings.out}-{self.world.rank}.hashes", "a") as file:
            weights = b"".join(p.detach().numpy().tobytes() for p in self.model.parameters())
            print(hashlib.sha256(weights).hexdigest(), file=file)
        return line

class Disarmed(Hashed):  # the classic mistake: the loss goes through .module, and DDP exchanges nothing
    def __init__(self, *arguments):
        super().__init__(*arguments)
        inside, inside.no_sync = self.policy.module, self.policy.no_sync
        self.policy = inside

def at_step_3(fault, everywhere):
    class Faulty(train.Trainer):
        def step(self):
            if self.done == 3 and (everywhere or self.world.rank):
                fault()
            return super().step()
    return Faulty

def fail():
    raise train.UsageError("what was asked for cannot be")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class KilledWhileWriting(train.Trainer):
    def save(self):
        def put(path, write):
            write(path.with_name(path.name + ".7.tmp"))
            os.truncate(path.with_name(path.name + ".7.tmp"), 1000)
            die()
        train.put = put
        super().save()

Killed, RankKilled, RankFails = at_step_3(die, True), at_step_3(die, False), at_step_3(fail, False)
RankFrozen = at_step_3(lambda: os.kill(os.getpid(), signal.SIGSTOP), False)

def all_runs(_):
    with train.World("cpu") as world:
        for trainer, arguments in runs:
            train.Trainer = globals()[trainer]
            train.run(train.parse_arguments(arguments), world)

runs, train.BEAT, train.train = json.loads(sys.argv.pop()), 0.5, all_runs
train.main()
"""


def drive(cwd, *runs, processes=1, status=0):
    """The runs (trainer, out, arguments...) in one set of processes, which must end with this status (-1: not 0)."""
    (cwd / "driver.py").write_text(DRIVER)
    runs = [(trainer, ["--device", "cpu", "--out", out, *map(str, rest)]) for trainer, out, *rest in runs]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([sys.executable, *torchrun * (processes > 1), "driver.py", json.dumps(runs)], cwd=cwd,
                          env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == status or status == -1 and done.returncode, done.stderr
    return done


def batches(queries, group, traces):
    return [*SMALL, "--dtype", "float32", "--queries_per_step", queries, "--group_size", group,
            "--traces_per_step", traces]


# Two updates a batch with clipping and KL, since on policy the RLIF loss is 0 and could not differ.
UNEVEN = [*batches(3, 4, 5), "--updates_per_batch", 2, "--clip", 0.2, "--kl", 0.1, "--save_every", 2, "--steps", 5]
IDLE = [*batches(1, 3, 1), "--steps", 3]


@pytest.fixture(scope="module")
def worlds(toy_run):
    """The same runs by 2, 4 and 1 processes: uneven shares, nothing to do for some, and the moments in shares, of
    which 4 processes and 1 resume from a checkpoint that 2 have written."""
    cwd = toy_run[0]

    def copied(out):
        (cwd / out).mkdir()
        shutil.copy(cwd / "out/zero-2/checkpoint-000004.pt", cwd / out)
        return out

    def of(processes):
        return [("Hashed", f"out/uneven-{processes}", *UNEVEN), ("Hashed", f"out/idle-{processes}", *IDLE)]
    drive(cwd, *of(2), ("Hashed", "out/zero-2", "--zero", *UNEVEN), ("Disarmed", "out/disarmed-2", *UNEVEN),
          processes=2)
    drive(cwd, *of(4), ("Hashed", copied("out/zero-4"), "--zero", "--resume", *UNEVEN), processes=4)
    drive(cwd, *of(1), ("Hashed", copied("out/zero-1"), "--zero", "--resume", *UNEVEN))
    return cwd


def hashes(cwd, out, processes) -> list[list[str]]:
    return [(cwd / f"{out}-{rank}.hashes").read_text().split() for rank in range(processes)]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", ["uneven", "idle"])
def test_any_number_of_processes_makes_the_updates_of_one(worlds, name, processes):
    lines, weights = outcome(worlds, f"out/{name}-1")
    theirs, their_weights = outcome(worlds, f"out/{name}-{processes}")
    for a, b in zip(lines, theirs, strict=True):
        for key in ("loss", "loss_rd", "loss_rlif", "lambda", "anchor", "prg_rollouts", "answered", "undecided"):
            close(a[key], b[key], 1e-5)
        close(a["grad_norm"], b["grad_norm"], 1e-4)
    assert name == "idle" or abs(lines[-1]["loss_rlif"]) > 1e-6
    for tensor in weights:
        close(weights[tensor], their_weights[tensor], 1e-5)


@pytest.mark.parametrize("out, steps", [("out/uneven-2", 5), ("out/uneven-4", 5), ("out/idle-2", 3), ("out/idle-4", 3),
                                        ("out/zero-2", 5)])
def test_all_processes_hold_the_same_weights_after_every_step(worlds, out, steps):
    first, *others = hashes(worlds, out, int(out[-1]))
    assert len(set(first)) == steps, "a step changes the weights"
    assert all(other == first for other in others)


def test_a_loss_that_goes_round_ddp_is_seen(worlds):
    """What the test above would say if DDP were not armed."""
    first, second = hashes(worlds, "out/disarmed-2", 2)
    assert len(first) == 5 and not set(first) & set(second)


def test_moments_in_shares_change_nothing_and_any_number_of_processes_resumes(worlds):
    weights = outcome(worlds, "out/uneven-2")[1]
    for out, tolerance in (("out/zero-2", 1e-6), ("out/zero-4", 1e-5), ("out/zero-1", 1e-5)):
        lines, found = outcome(worlds, out)
        assert lines[-1]["step"] == 5
        for tensor in weights:
            close(found[tensor], weights[tensor], tolerance)
    kept = [torch.load(worlds / f"out/{name}-2/checkpoint-000005.pt", weights_only=True)
            for name in ("uneven", "zero")]
    close(*(state["optimizer"]["state"][0]["exp_avg"] for state in kept))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_as_if_it_had_not_been(worlds, processes):
    """Killed between checkpoints, killed while it writes one, its newest one damaged: bit for bit the same weights."""
    out, expected = f"out/killed-{processes}", outcome(worlds, f"out/uneven-{processes}")
    folder, how = worlds / out, dict(processes=processes)
    drive(worlds, ("Killed", out, *UNEVEN), status=-1, **how)
    assert [path.name for path in folder.glob("checkpoint*")] == ["checkpoint-000002.pt"]
    if processes == 1:
        drive(worlds, ("KilledWhileWriting", out, "--resume", *UNEVEN), status=-1)
        assert sorted(path.name for path in folder.glob("checkpoint*")) == [
            "checkpoint-000002.pt", "checkpoint-000004.pt.7.tmp"]
        (folder / "checkpoint-000004.pt").write_bytes((folder / "checkpoint-000004.pt.7.tmp").read_bytes())
    done = drive(worlds, ("Hashed", out, "--resume", *UNEVEN), **how)
    assert "resuming after step 2" in done.stdout
    assert ("checkpoint-000004.pt cannot be read" in done.stdout) == (processes == 1)
    assert not list(folder.glob("*.tmp")), "half files are removed"
    lines, weights = outcome(worlds, out)
    assert all(torch.equal(weights[name], expected[1][name]) for name in weights)
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected[0]]


def test_nothing_to_resume_from_that_can_be_read(worlds):
    (worlds / "out/damaged").mkdir()
    (worlds / "out/damaged/checkpoint-000004.pt").write_bytes(b"PK")
    done = drive(worlds, ("Hashed", "out/damaged", "--resume", *UNEVEN), status=2)
    assert "checkpoint-000004.pt cannot be read" in done.stderr.splitlines()[-1]


def test_the_newest_checkpoint_is_that_of_the_most_steps(tmp_path):
    for step in (999980, 1000000):
        (tmp_path / f"checkpoint-{step:06d}.pt").touch()
    assert train.checkpoints(train.Settings(out=str(tmp_path)))[-1].name == "checkpoint-1000000.pt"


@pytest.mark.parametrize("trainer, status, named", [
    ("RankFrozen", None, "rank 1 on "), ("RankKilled", -9, "rank 1 on "),
    ("RankFails", 2, "rank 1 has ended with UsageError: what was asked for cannot be"),
    ("Hashed", 2, "rank 1 has ended with UsageError: ")])
def test_a_process_that_dies_or_fails_ends_the_others_by_name(worlds, tmp_path, trainer, status, named):
    """Two processes as on two machines, with nobody to look after both: the second is frozen (as if its machine were
    unplugged: nothing tells the first), killed, ends with an error, or has no checkpoint on its own disk."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shutil.copytree(worlds / "out/toy", tmp_path / "out/toy")
    out, processes = "out/zero-2" if trainer == "Hashed" else "out/faulty", []
    arguments = ["--device", "cpu", "--out", out, *map(str, UNEVEN), *["--resume"] * (trainer == "Hashed")]
    for rank, cwd in enumerate((worlds, tmp_path)):
        environment = dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        processes.append(subprocess.Popen(
            [sys.executable, worlds / "driver.py", json.dumps([(trainer, arguments)])], cwd=cwd, text=True,
            env={**ENVIRONMENT, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    try:
        first = processes[0].communicate(timeout=300)[1]
        assert processes[0].returncode == 1
        assert "error (rank 0): ending, since " + named in first.splitlines()[-1]
        if status is not None:
            second = processes[1].communicate(timeout=300)[1]
            assert processes[1].returncode == status
            assert status < 0 or second.splitlines()[-1].startswith("error (rank 1): ")
    finally:
        for process in processes:
            process.kill()


def test_what_goes_wrong_is_said_once():
    said = []
    world = type("World", (), {"say": said.append})
    warnings, fine = train.Warnings(world), {"step": 1, "answered": 0.5, "entropy": 1.0, "response_length": 9.0}
    for line in [fine] * 20 + [{**fine, "entropy": 0.0}] * 9 + [fine, dict.fromkeys(fine)] * 9:
        warnings.about(line)
    assert not said, "a floor for a short time, no rollouts at all: no reason to speak"
    floor, short, unanswered = ({**fine, name: 0.0} for name in ("entropy", "response_length", "answered"))
    for line in [floor] * 30 + [fine] + [short] * 30 + [unanswered] * 3:
        warnings.about(line)
    assert len(said) == 2 and "--lr" in said[0] and "--max_new_tokens" in said[1]


RD = ["--model", "out/toy", "--method", "rd", *map(str, SHORT)]


@pytest.mark.parametrize("arguments, named", [
    (["--model", "nowhere", "--method", "rd", "--labeled", "out/toy/labeled.jsonl"], "nowhere"),
    ([*RD, "--labeled", "nowhere.jsonl"], "nowhere.jsonl"), ([*RD, "--labeled", "bad.jsonl"], "bad.jsonl line 1"),
    (["--model", "out/toy"], "--labeled"), (["--tau", "0"], "--tau"), (["--group_size", "1"], "--group_size"),
    (["--unlabeled", "bad.jsonl"], "--model"), (["--temperature", "0"], "--temperature"),
    ([*RD, "--labeled", "out/toy/labeled.jsonl", "--model", "out/run/model", "--out", "out/run"], "another --out"),
    (["--lerning_rate", "1"], "--help"), (["--lr", "much"], "--lr"),
    pytest.param(["--tensorboard", "logs"], "pip install tensorboard",
                 marks=pytest.mark.skipif(find_spec("tensorboard") is not None, reason="tensorboard is installed"))])
def test_a_bad_command_line_ends_with_one_line(toy_run, arguments, named):
    write_lines(toy_run[0] / "bad.jsonl", "{")
    done = run(toy_run[0], "--out", "out/bad", *arguments)
    assert done.returncode == 2
    error, = done.stderr.splitlines()
    assert error.startswith("error:") and named in error


# ---------------------------------------------------------------------------------------------- README

README = Path(__file__).with_name("README.md").read_text()


@pytest.mark.parametrize("name", ["prg.py", "hytuning.py", "data.py", "model.py"])
def test_a_piece_works_alone(name, toy_run, tmp_path):
    """The README's example, as printed, in a folder with that one file and a checkpoint."""
    example = README.split(f"```python\n# {name}\n")[1].split("```")[0]
    if "transformers" in example:
        transformers()
    shutil.copytree(toy_run[0] / "out/run/model", tmp_path / "checkpoint")
    shutil.copy(Path(__file__).with_name(name), tmp_path)
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.')\n{example}"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_a_reward_of_your_own(toy_run):
    """The README's example, with a shorter run."""
    example = re.search(r"```python\n(from train import .*?)```", README, re.S)[1]
    shorter = [*SHORT, "--out", "out/own"]
    prelude = ("import train\nparse = train.parse_arguments\n"
               f"train.parse_arguments = lambda words: parse([*words, *{list(map(str, shorter))}])\n")
    done = subprocess.run([sys.executable, "-c", prelude + example], cwd=toy_run[0], env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and outcome(toy_run[0], "out/own"), done.stderr


# In place of python and torchrun: the words as printed and, behind them, what makes a run short; two processes for
# eight GPUs, one machine for two.
STAND_IN = """
import os, sys
name, *words = sys.argv[1:]
for printed, here in ("_node=8", "_node=2"), ("--nnodes=2", "--nnodes=1"), ("HOST", "localhost"):
    words = [word.replace(printed, here) for word in words]
module = ["-m", "torch.distributed.run"] * (name == "torchrun")
os.execv(sys.executable, [sys.executable, *module, *words, *SHORT])
"""
COMMANDS = [block for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            if "pytest" not in block and "--study" not in block]  # this is pytest; the study has its own test


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: " ".join(block.split())[:60])
def test_a_command_of_the_readme(block, toy_run, tmp_path):
    """As printed, in a folder with the project, a model and data of the names that it gives them."""
    for name in ("README.md", "requirements.txt", "train.py", "hytuning.py", "model.py", "prg.py", "data.py"):
        shutil.copy(Path(__file__).with_name(name), tmp_path)
    toy = toy_run[0] / "out/toy"
    for folder in ("out/toy", "FOLDER", "Qwen2.5-1.5B-Instruct"):
        shutil.copytree(toy, tmp_path / folder)
    solved = [json.dumps({"question": r["prompt"], "answer": f"{r['reasoning']}\n#### {r['answer']}"})
              for _, r in data.read_jsonl(toy / "labeled.jsonl")]
    for name in ("a", "b", "c", "gsm8k_train", "gsm8k_test"):
        write_lines(tmp_path / f"{name}.jsonl", *solved)
    (tmp_path / "stand_in.py").write_text(f"SHORT = {list(map(str, SHORT))}\n{STAND_IN}")
    (tmp_path / "bin").mkdir()
    stand_in = f"exec {shlex.quote(sys.executable)} stand_in.py"
    for name, script in (("python", f'{stand_in} python "$@"'), ("torchrun", f'{stand_in} torchrun "$@"'),
                         ("pip", "test -s requirements.txt")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", block], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    out = "out/qwen" if "out/qwen" in block else "out/run"
    assert len(outcome(tmp_path, out)[0]) == 1 and (tmp_path / out / "eval.json").is_file()


def test_the_options_that_the_readme_names_exist():
    commands = re.findall(r"train\.py((?: +(?:\\\n)?[^\s`#&]+)*)", README)
    assert sum("--model" in c for c in commands) >= 2
    for command in commands:
        words = re.sub(r"\\|\$DATA", "", command).split()
        if "--help" not in words:
            train.parse_arguments(words)


def test_the_study_is_what_its_runs_say(toy_run, tmp_path, monkeypatch, capsys):
    """Two seeds of one step: each number of the table, from the eval.json of the runs."""
    write = data.Triage.write
    monkeypatch.setattr(data.Triage, "write", lambda *where, **sizes: write(*where, queries=40, held_out=6, **sizes))
    monkeypatch.setattr(train, "STUDY", {method: (1e-3, 1) for method in train.STUDY})
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_run[0] / "out/toy", tmp_path / "out/toy")
    train.study(seeds=range(2))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()
            if line.startswith("|")]
    columns = [name.replace(" ", "_") for name in rows[0][1:]]
    assert "accuracy" in columns and "brier" in columns

    def result(name, seed):
        runs = json.loads((tmp_path / f"out/study/{name.replace('base', 'rd')}-{seed}/eval.json").read_text())
        return {k: math.nan if v is None else v for k, v in runs["base" if name == "base" else "final"].items()}
    found = {name: [result(name, seed) for seed in range(2)] for name in ("base", *train.STUDY)}
    for name, *cells in rows[2:]:
        method, _, other = name.partition(" − ")
        for column, cell in zip(columns, cells, strict=True):
            a, b = (x[column] - (y[column] if other else 0) for x, y in zip(found[method], found[other or "rd"]))
            half = abs(a - b) / 2  # the standard error of a mean of two
            assert cell == f"{(a + b) / 2:{'+' * bool(other)}.3f} ± {half * (train.T_95 if other else 1):.3f}"
    assert [row[0] for row in rows[2:]] == [*found, *(f"{m} − rd" for m in train.STUDY if m != "rd")]
