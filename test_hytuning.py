"""Tests of the code against definitions: naive loops, `transformers` and hand computations.

The order is prg, hytuning, model, sampling, data, train, several processes, README. All tests take
about three minutes on a CPU. Those that need `transformers` are skipped if it is not installed.

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
import statistics
import subprocess
import sys
from collections import Counter
from datetime import datetime
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

import data
import model as decoder
import prg
import train
from hytuning import (adaptive_weights, distillation_loss, group_advantages, head_logprobs,
                      hytuning_loss, learning_signals, rlif_loss, self_certainty,
                      token_logprobs, trace_weights, weigh_queries)
from model import CheckpointError, Config, Decoder, generate, load_pretrained, save_pretrained
from prg import (Trace, answer_support, auroc, brier_score, expected_calibration_error, pack,
                 packed_support, progressive_reasoning_gain)

settings.register_profile("here", deadline=None, derandomize=True)
settings.load_profile("here")
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


def test_prg_follows_the_support_slowly():
    for support, expected in (
            ([0.6, 0.6, 0.6], 0.4),  # the support never changes
            ([0, 1 / 3, 2 / 3, 1], 43 / 81),  # a steady rise
            ([0, 1], 1 / 3),  # the same in one line
            ([0, 0, 0, 0, 1], 1 / 3),  # lines before it do not matter
            ([0, 1, 1, 1], 19 / 27),  # lines after it: a lasting gain counts more
            ([0, 1, 1, 0], 10 / 27),  # the support is lost
            ([0.9, 0, 0, 0.9], 0.9 * (8 / 27 + 1 / 3) - 0.3),  # a dip
            ([0.3, 0.9], 0.5 - 0.1),
            ([1, 0, 0, 0], 8 / 27 - 1 / 3),
            ([0.7], 0)):  # no step
        p = torch.tensor([support], dtype=torch.double)
        found = progressive_reasoning_gain(p, torch.ones_like(p, dtype=torch.bool))
        close(found, [expected])


def prg_of_support(p: list[float]) -> float:
    """Return PRG as a sum over gains."""
    if len(p) < 2:
        return -1.0 if not p else 0.0
    K = len(p) - 1
    gains = [(1 - (2 / 3)**(K - k + 1)) * (p[k] - p[k - 1]) for k in range(1, K + 1)]
    return p[0] * 2 / 3 + sum(gains)


@given(st.lists(st.lists(st.floats(0, 1, width=32), max_size=7), min_size=1, max_size=5))
def test_prg_is_a_sum_of_gains_for_any_padding(rows):
    width = max(map(len, rows)) + 1
    # The values in the padding must not matter.
    p = torch.full((len(rows), width), 0.5)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        p[i, :len(row)] = torch.tensor(row)
        mask[i, :len(row)] = True
    found = progressive_reasoning_gain(p, mask)
    close(found, [prg_of_support(row) for row in rows])
    answered = found[mask.any(1)]
    assert ((answered >= -1 / 3) & (answered <= 1 + 1e-6)).all()


def make_trace(steps, prompt=3, marker=2, answer=2, tail=0, seed=0) -> Trace:
    """Return a random trace with parts of these lengths. Prompts of one length are equal."""
    cuts = [prompt]
    for length in steps:
        cuts.append(cuts[-1] + length)
    start = cuts[-1] + marker
    rng = random.Random(seed)
    response = [rng.randrange(VOCAB) for _ in range(start + answer + tail - prompt)]
    return Trace([*range(20, 20 + prompt), *response], cuts, start, start + answer)


# Some have blank steps, no step, no marker, no answer or tokens after the answer. Some neighbours
# have the same prompt.
TRACES = []
for seed in range(60):
    rng = random.Random(seed)
    TRACES.append(make_trace([rng.randrange(5) for _ in range(rng.randrange(6))], rng.randint(1, 3),
                             rng.randrange(3), rng.randrange(4), rng.randrange(3), seed))


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
            ids = torch.tensor([trace.tokens[:cut] + trace.marker + trace.answer])
            labels = ids.clone()
            labels[:, :-len(trace.answer)] = -100  # no loss for these
            expected.append(math.exp(-llama(ids, labels=labels).loss.item()))
        padding = [0] * (len(p) - len(expected))
        close(p, expected + padding, 1e-5)
        assert m.tolist() == [1] * len(expected) + padding
    with pytest.raises(TypeError, match="lambda ids"):
        answer_support(llama, TRACES)


@pytest.mark.parametrize("tokens, width", [(2048, 1024), (2048, 60), (64, 30), (1, 1)])
def test_packed_support_equals_support_from_separate_passes(tokens, width):
    with patch.object(prg, "pack", partial(pack, width=width)):
        for traces in TRACES, []:
            support, mask = answer_support(MODEL, traces)
            packed, packed_mask = packed_support(MODEL, traces, tokens)
            assert torch.equal(packed_mask, mask)
            close(packed, support, 1e-5)


def prg_by_definition(model, trace) -> float:
    support, mask = answer_support(model, [trace])
    return prg_of_support(support[mask].tolist())


def plain_logprobs(model, trace) -> torch.Tensor:
    """Return log pi of each token of the response, [T], from a separate pass."""
    logits = model(torch.tensor([trace.tokens]))[0, trace.cuts[0] - 1:-1]
    return token_logprobs(logits, torch.tensor(trace.response))


# Three prompts with five responses each, of 3 to 20 tokens.
GROUPS = [make_trace([2 * j, j], prompt=3 + 4 * i, tail=1, seed=5 * i + j)
          for i in range(3) for j in range(5)]


@pytest.mark.parametrize("width, tokens, rows", [(1, 1, 15), (30, 64, 10), (48, 256, 6),
                                                 (1024, 2048, 3)])
def test_packed_responses_have_the_log_probabilities_of_separate_passes(width, tokens, rows):
    """In the first case each row holds one response, and there is no mask."""
    found = {}
    batches = pack(GROUPS, copies=False, tokens=tokens, width=width)
    assert sum(len(batch.input_ids) for batch in batches) == rows
    for batch in batches:
        B, W = batch.input_ids.shape
        assert B * W <= tokens or B == 1
        assert (batch.attention_mask is None) == (len(batch.trace) == B)
        for i, row, mask in zip(batch.trace, *train.Policy(MODEL)(batch)):
            found[i] = row[mask]
    for i, trace in enumerate(GROUPS):
        close(found[i], plain_logprobs(MODEL, trace), 1e-5)


def test_invalid_tokens_and_cuts_raise_an_error():
    for cuts, start, end in ([], 2, 4), ([0], 2, 4), ([2, 1], 3, 4), ([1], 3, 2), ([1], 2, 5):
        with pytest.raises(ValueError, match="cuts"):
            Trace([1, 2, 3, 4], cuts, start, end)
    with pytest.raises(ValueError, match="tolist"):
        Trace(torch.tensor([1, 2, 3]), [1], 2)


# A confidence is k of n votes. With integers, its bin is computed without rounding.
VOTE = st.integers(1, 20).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n), st.booleans()))


@given(st.lists(VOTE, min_size=1, max_size=40))
def test_calibration_measures_match_their_definitions(votes):
    confidence = [k / n for k, n, _ in votes]
    correct = [right for _, _, right in votes]
    bins = [[] for _ in range(10)]
    for k, n, right in votes:
        bins[min(10 * k // n, 9)].append((k / n, right))
    error = 0
    for items in filter(None, bins):
        p, right = zip(*items)
        error += len(p) / len(votes) * abs(sum(p) / len(p) - sum(right) / len(p))
    close(expected_calibration_error(confidence, correct), error)
    errors = [(p - right)**2 for p, right in zip(confidence, correct)]
    close(brier_score(confidence, torch.tensor(correct)), sum(errors) / len(votes))
    pairs = [(p > q) + (p == q) / 2
             for p, right in zip(confidence, correct) if right
             for q, right in zip(confidence, correct) if not right]
    expected = sum(pairs) / len(pairs) if pairs else math.nan
    assert auroc(confidence, correct) == pytest.approx(expected, nan_ok=True)


# -----------------------------------------------------------------------------
# hytuning

def random_logits(*shape, dtype=torch.double):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=dtype) * 2


def test_log_probability_and_self_certainty_match_their_definitions():
    logits = random_logits(3, 5, 7)
    pi = logits.softmax(-1)
    V = 7
    divergence = sum(1 / V * torch.log(1 / V / pi[..., v]) for v in range(V))  # KL(U || pi)
    close(self_certainty(logits), divergence)
    close(self_certainty(torch.full((2, 9), 3.0)), [0.0, 0.0])
    targets = torch.arange(15).reshape(3, 5) % V
    close(token_logprobs(logits, targets), pi.gather(-1, targets[..., None])[..., 0].log())


def test_advantages_are_normalized_within_each_group():
    rewards = random_logits(12)
    r = rewards.view(3, 4)
    expected = (r - r.mean(1, keepdim=True)) / (r.std(1, unbiased=False, keepdim=True) + 1e-4)
    close(group_advantages(rewards, 4), expected.flatten())
    for reward, group in ((0.1, 3), (1000.1, 8), (-7.3, 6)):
        for dtype in (torch.float32, torch.float64):
            equal = torch.full((2 * group,), reward, dtype=dtype)
            assert group_advantages(equal, group).tolist() == [0] * len(equal), "exactly"


def test_the_weight_is_the_squared_ratio_of_prg_to_the_anchor():
    prg = torch.tensor([-1.0, -0.2, 0.0, 0.1, 0.2, 0.4, 0.8])
    close(adaptive_weights(prg, 0.4), [0, 0, 0, 1 / 16, 1 / 4, 1, 1])
    assert adaptive_weights(prg, -0.3).tolist() == [0, 0, 0, 1, 1, 1, 1], "a negative anchor"


def test_advantages_and_earned_shares_of_each_method():
    """Values are computed by hand for three groups of four. The number -1 means no answer. If no
    rollout of a group has one, its advantages are 0, and not small rewards that are normalized."""
    c = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 3.0, 4.0])
    prg = torch.tensor([0.2, 0.05, 0.4, -1.0, 0.1, -1.0, 0.2, 0.3, -1.0, -1.0, -1.0, -1.0])
    answers = torch.tensor([0, 1, 0, -1, 0, -1, 2, 0, -1, -1, -1, -1])
    expected = {method: (c.tolist(), [lam] * 12)
                for method, lam in (("rd", 0), ("static", 0.5), ("rlif", 1))}
    # The weights of rollouts 1 and 4; the others have weight 1, or 0 without an answer.
    for method, w1, w4 in (("votes", 1, 1), ("hytuning", 1 / 16, 1 / 4)):
        r = [4, w1 * 2, 4, 0, w4 * 5 + 8, 0, 7, w4 * 5 + 8, 0, 0, 0, 0]
        e = [2, w1, 2, 0, w4 + 1, 0, 1, w4 + 1, 0, 0, 0, 0]
        expected[method] = ([x / 4 for x in r], [x / 4 for x in e])
    assert set(expected) == set(train.METHODS)
    for method, (r, e) in expected.items():
        uses_prg = method == "hytuning"
        A, earned = learning_signals(method, c, prg if uses_prg else None, answers, 4, 0.2)
        close(A, group_advantages(torch.tensor(r).float(), 4))
        close(earned, e)
    assert weigh_queries(A, torch.zeros(12), 0.0, 4).tolist() == [0] * 12
    with pytest.raises(ValueError, match="magic"):
        learning_signals("magic", c, prg, answers, 4, 0.2)
    nothing = torch.zeros(0)  # a process may have no query
    assert [len(x) for x in learning_signals("hytuning", *[nothing] * 3, 4, 0.2)] == [0, 0]


def test_only_hytuning_weights_traces_by_their_prg():
    prg = torch.tensor([0.3, 0.1, -0.2])
    close(trace_weights("hytuning", prg, 0.2), [2.4, 0.6, 0])  # w is 1, 1/4 and 0
    assert trace_weights("votes", prg, 0.2).tolist() == [1, 1, 1]
    assert trace_weights("hytuning", -prg.abs(), -0.2).tolist() == [1, 1, 1], "no weight is left"


def test_losses_and_the_policy_gradient_match_hand_computations():
    logprobs = (-random_logits(4, 5).abs() - 0.1).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    A = torch.tensor([1.5, -0.5, 0.25, -1.25], dtype=torch.double, requires_grad=True)
    v = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.double)
    rd = distillation_loss(logprobs, v[:, None] * mask, 11)
    rlif = rlif_loss(logprobs, mask, A, 6)
    sums = (logprobs * mask).sum(1)
    close(rd, -(v * sums).sum() / 11)
    close(rlif, -(A * sums / torch.tensor([3, 5, 2, 1])).sum() / 6)
    close(hytuning_loss(rd, rlif, 0.3), 0.7 * rd + 0.3 * rlif)
    rlif.backward()
    assert A.grad is None, "advantages are constants"


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
    "one key head": ("Llama", dict(num_key_value_heads=1)),
    "biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama3": ("Llama", dict(head_dim=16, rope_parameters=LLAMA3)),
    "llama3, older config": ("Llama", dict(rope_parameters=LLAMA3)),
    "older config": ("Llama", dict(rope_parameters=dict(rope_type="default", rope_theta=5e3))),
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
    if "older" in name:
        rope = dict(CHECKPOINTS[name][1]["rope_parameters"])
        edit_json(tmp_path / "theirs/config.json", rope_parameters=...,
                  rope_theta=rope.pop("rope_theta"),
                  rope_scaling={"type": rope.pop("rope_type"), **rope})
    ours = load_pretrained(tmp_path / "theirs")
    assert ours.config.context == WINDOWS.get(name, 256)
    n = min(40, ours.config.context)
    ids = IDS[:, :n]
    close(ours(ids), theirs(ids).logits, 1e-4)
    prompts = [ids[0, :n // 3].tolist(), ids[1, :1].tolist()]
    greedy = [theirs.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)).long(),
                              max_new_tokens=n - n // 3, do_sample=False, eos_token_id=None,
                              pad_token_id=0)[:, len(p):].tolist() for p in prompts]
    assert generate(ours, prompts, max_new_tokens=n - n // 3, temperature=0) == greedy
    save_pretrained(ours, tmp_path / "ours")
    close(reopened(tmp_path / "ours")(ids).logits, theirs(ids).logits, 1e-5)
    if name in WINDOWS:
        ids = IDS[:, :n + 1]
        assert (ours(ids) - theirs(ids).logits).abs().max() > 1e-3, "or a longer one would fit"


@torch.no_grad()
def test_bfloat16_shards_become_one_float32_file(tmp_path):
    write_checkpoint(tmp_path, dtype=torch.bfloat16, max_shard_size="50KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    ours = load_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    close(ours(IDS), reopened(tmp_path)(IDS).logits, 1e-4)
    halved = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert halved.lm_head.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert halved(IDS).dtype == ours(IDS).dtype == torch.float32
    # Save over the shards, which must not be read any more.
    nn.init.ones_(ours.lm_head.weight)
    save_pretrained(ours, tmp_path)
    for again in (load_pretrained(tmp_path)(IDS), reopened(tmp_path)(IDS).logits):
        close(again, ours(IDS), 1e-5)
    (tmp_path / "model.safetensors").unlink()
    shards[0].unlink()
    with pytest.raises(CheckpointError, match="Missing key"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("stored, tied", [("E-", True), ("-E", True), ("EE", True), ("EH", False)])
@torch.no_grad()
def test_a_tied_head_is_read_as_in_transformers(stored, tied, tmp_path):
    """The file has the embeddings and the head, one of them, or a head of its own."""
    save_pretrained(MODEL, tmp_path)
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    found = dict(zip("EH", [weights.pop(name) for name in names]))
    weights.update({name: found[x].clone() for name, x in zip(names, stored) if x in found})
    save_file(weights, path, metadata={"format": "pt"})
    ours = load_pretrained(tmp_path)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied
    close(reopened(tmp_path)(IDS % VOCAB).logits, ours(IDS % VOCAB), 1e-4)
    save_pretrained(ours, tmp_path)
    close(reopened(tmp_path)(IDS % VOCAB).logits, ours(IDS % VOCAB), 1e-4)


def test_end_tokens_and_the_tokenizer_are_saved(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    save_pretrained(MODEL, a)
    modes = {path.stat().st_mode for path in a.iterdir()}
    assert len(modes) == 1, "whoever can read one of the files can read all of them"
    (a / "tokenizer.json").write_text("é")
    edit_json(a / "config.json", eos_token_id=7, torch_dtype="bfloat16")
    assert load_pretrained(a).eos_ids == (7,)
    edit_json(a / "generation_config.json", eos_token_id=None)
    assert load_pretrained(a).eos_ids == (7,)
    edit_json(a / "generation_config.json", eos_token_id=0, top_k=5)
    ours = load_pretrained(a)
    assert ours.eos_ids == (0,), "generation_config.json comes first"
    ours.eos_ids = (0, 9)
    with patch("shutil.copymode", side_effect=PermissionError):  # as on some network mounts
        save_pretrained(ours, b, a)
    assert load_pretrained(b).eos_ids == (0, 9)
    config = json.loads((b / "config.json").read_text())
    assert config["eos_token_id"] == [0, 9]
    assert config["dtype"] == "float32" and "torch_dtype" not in config
    generation = json.loads((b / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [0, 9], "top_k": 5}
    assert (b / "tokenizer.json").read_text() == "é"


# A file, a change to it, and what the message must name.
BROKEN = [
    ("config.json", dict(model_type="gpt2"), "'gpt2'"),
    ("config.json", dict(hidden_size=...), "hidden_size"),
    ("config.json", dict(quantization_config={"bits": 4}), "quantized"),
    ("config.json", dict(hidden_act="relu"), "hidden_act 'relu'"),
    ("config.json", dict(rope_parameters={"rope_type": "linear", "factor": 2.0}), "'linear'"),
    ("config.json", dict(rope_parameters=..., rope_scaling={"type": "yarn"}), "'yarn'"),
    ("config.json", None, "config.json"), ("config.json", lambda x: x[:-9], "hf download"),
    ("generation_config.json", dict(eos_token_id="</s>"), "eos_token_id is </s>"),
    ("generation_config.json", dict(eos_token_id=[3, VOCAB]), r"eos_token_id is \[3, 61\]"),
    ("model.safetensors", None, "model.safetensors"),
    ("model.safetensors", lambda x: x[:-100], "hf download"),
    ("model.safetensors", lambda x: x.replace(b"lm_head", b"lm_tail"), "lm_tail")]


@pytest.mark.parametrize("name, change, named", BROKEN)
def test_a_model_that_cannot_be_loaded_is_named_in_one_line(name, change, named, tmp_path):
    path = tmp_path / "checkpoint, é 漢" / name
    save_pretrained(MODEL, path.parent)
    if change is None:
        path.unlink()
    elif callable(change):
        path.write_bytes(change(path.read_bytes()))
    else:
        edit_json(path, **change)
    with pytest.raises(CheckpointError, match=f"é 漢 cannot be loaded.*{named}") as caught:
        load_pretrained(path.parent)
    assert "\n" not in str(caught.value)


# -----------------------------------------------------------------------------
# sampling

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [5, 6, 8]]
ENDS = (3, 20, 40)
SAMPLING = dict(samples_per_prompt=10, max_new_tokens=50, temperature=1.5, seed=("a", 7))


@pytest.mark.parametrize("vocab, temperature", [(5, 1.0), (600, 2.0), (40, 0.6), (3001, 1.0)])
def test_draws_follow_the_distribution(vocab, temperature):
    """With evenly spaced numbers, the frequency of each token equals its probability."""
    logits = random_logits(vocab)
    n = 2**14
    u = (torch.arange(n) + 0.5) / n
    drawn = decoder.draw(logits.float().expand(n, -1), u, temperature)
    expected = n * (logits / temperature).softmax(-1)
    assert ((torch.bincount(drawn, minlength=vocab) - expected).abs() < 1.1).all()


def test_every_draw_has_a_positive_probability():
    """The sums of these rows are rounded, and both ends of a row have probability 0."""
    u = torch.tensor([0, 2.0**-24, 1 - 2.0**-24]).repeat_interleave(100)
    logits = random_logits(300, 2000, dtype=torch.float)
    logits[:, :500] = logits[:, -500:] = -1e4
    drawn = decoder.draw(logits, u, 1.0)
    assert 500 <= drawn.min() and drawn.max() < 1500
    assert decoder.draw(logits, u, 0).equal(logits.argmax(-1))


def logits_without_a_cache(model, samples):
    """Yield each sample of PROMPTS, its indices, and the logits of its tokens [T, V]."""
    for i, prompt in enumerate(PROMPTS):
        for j, sample in enumerate(samples[i]):
            logits = model(torch.tensor([prompt + sample]))[0, len(prompt) - 1:-1]
            yield i, j, sample, logits


@pytest.mark.parametrize("temperature", [1.5, 1, 0])
@torch.no_grad()
def test_samples_and_their_statistic_match_passes_without_a_cache(temperature):
    """Each token is drawn again, from the logits of the whole text and the same random number."""
    n = SAMPLING["max_new_tokens"]
    keep = decoder.Cache.keep
    with patch.object(decoder.Cache, "keep", autospec=True, side_effect=keep) as compacted:
        samples, means = generate(MODEL, PROMPTS, eos_ids=ENDS, statistic=self_certainty,
                                  **{**SAMPLING, "temperature": temperature})
    u = decoder.uniforms(PROMPTS, 10, n, SAMPLING["seed"]).view(len(PROMPTS), 10, n)
    for i, j, sample, logits in logits_without_a_cache(MODEL, samples):
        assert decoder.draw(logits, u[i, j, :len(sample)], temperature).tolist() == sample
        assert not any(x in ENDS for x in sample[:-1])
        assert sample[-1] in ENDS or len(sample) == n
        close(means[i, j], self_certainty(logits).mean(), 1e-4)
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
    errors = [means[i, j] - self_certainty(logits).mean()
              for i, j, _, logits in logits_without_a_cache(model, samples)]
    assert torch.stack(errors).square().mean().sqrt() < 0.005


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


@pytest.mark.parametrize("context", [
    dict(max_position_embeddings=9, sliding_window=20), dict(sliding_window=9)])
def test_prompts_that_are_empty_or_longer_than_the_context_raise_an_error(context):
    model = tiny(**context)
    assert len(generate(model, [[1], [2] * 4], max_new_tokens=5)[1][0]) == 5
    for prompt in ([], [2] * 5):
        with pytest.raises(ValueError, match=f"{len(prompt)} .*5 new"):
            generate(model, [[1] * 4, prompt], max_new_tokens=5)


@pytest.mark.parametrize("weight, temperature", [(math.nan, 0), (math.nan, 1), (math.inf, 1)])
def test_a_statistic_of_logits_that_are_not_finite_raises_an_error(weight, temperature):
    model = tiny()
    nn.init.constant_(model.lm_head.weight[7:8], weight)
    with pytest.raises(FloatingPointError):
        generate(model, PROMPTS, max_new_tokens=3, temperature=temperature,
                 statistic=self_certainty)


@torch.no_grad()
def test_a_decode_step_reads_no_value_from_the_device():
    """The device "meta" has no values, so a step that runs there suits a CUDA graph."""
    with torch.device("meta"):
        model = tiny()
    s = decoder.Sampler(model, PROMPTS, 4, 20, 0.7, ENDS, ("a", 1), self_certainty)
    s.prefill(PROMPTS)
    for _ in range(3):
        s.step()
    assert s.out.is_meta and s.t.is_meta and s.total.is_meta


# -----------------------------------------------------------------------------
# data

# Pairs with one canonical form, answers that match a gold answer but are other votes, and pairs
# that never match.
SAME = r"""
Yes. ≡ yes   \text{blue} ≡ blue   (0, 1) ≡ ( 0,1 )   café ≡ café   巴黎。 ≡ 巴黎   ５ ≡ 5   PARIS ≡ paris
$\textbf{Paris}$ ≡ Paris   \left( 3, 4 \right) ≡ (3, 4)   “Paris” ≡ Paris   No ≡ no   \(x\) ≡ x
`x` ≡ x   don’t ≡ don't   5\text{ cm} ≡ 5 cm   $\boxed{\text{**B.**}}$. ≡ B   \[ \boxed{18} \] ≡ 18
$B$ ≡ B   \boxed{B} ≡ B   **B** ≡ B   (B) ≡ B   B. ≡ B   B) ≡ B   (b) ≡ B   Option B ≡ B
B) Paris ≡ B   (B) Meningitis ≡ B   (B) Crohn's disease ≡ B   Option (B) Paris, France ≡ B
$18 ≡ 18   $18$ ≡ 18   $\$18$ ≡ 18   <7> ≡ 7   \$18.00 ≡ 18   - $5 ≡ -5   -¥5 ≡ -5 ¥   $29.00. ≡ 29   1,000 ≡ 1000.0
1{,}000 ≡ 1000   1,\!000 ≡ 1000   1e5 ≡ 100,000   0 ≡ -0   1e-05 ≡ 0.00001   -5 ≡ −5   - 5 ≡ -5
+5 ≡ 5   .5 ≡ 0.50   3/4 ≡ 0.75   \frac{3}{4} ≡ 0.75   6/8 ≡ 3/4   -\dfrac{1}{2} ≡ -0.5
1,000.0 cm ≡ 1000 cm   50\% ≡ 50 percent
"""
RIGHT = r"""
72 clips ≡ 72   8 years old ≡ 8   1,000 dollars ≡ 1000   60 km/h ≡ 60   60 miles per hour ≡ 60
72 Clips in total ≡ 72   3 months ≡ 3   7 notebooks ≡ 7   3/4 cup ≡ 3/4   5\text{ cm} ≡ 5   90° ≡ 90
€5 ≡ 5   25\% ≡ 25   B. Paris ≡ B   B. meningitis ≡ B   B (meningitis) ≡ B   **B:** -5 ≡ B
B) 18 ≡ B   B. Paris ≡ (B)
"""
DIFFERENT = r"""
$A$ ≡ $B$   A) B) C) D) ≡ A   (A) (B) ≡ A   A or B ≡ A   A ≡ a car   C# ≡ C   O- ≡ O   Cl- ≡ Cl
0,125 ≡ 125   1,5 ≡ 15   5! ≡ 5   2n ≡ 2   6ab ≡ 6   $5b ≡ 5   5 mW ≡ 5 MW   5 million ≡ 5
120/80 mmHg ≡ 90/60 mmHg   3 100/200 ≡ 15.5   (100,200) ≡ 100200   12:30 ≡ 12   3 or 4 ≡ 3   >5 ≡ 5
x = 5 or x = 3 ≡ 3   (0, 1) ≡ [0, 1]   {1, 2} ≡ (1, 2)   x' ≡ x   \frac{1}{2x} ≡ \frac{1}{2}x
\frac{a}{bc} ≡ \frac{ab}{c}   $\text{Yes}$ ≡ $\text{No}$   (1, 234) ≡ (1,234)   3,5 ≡ 3, 5   {5} ≡ 5
-x ≡ x   x ≡ X   \Delta ≡ \delta   mW ≡ MW   CO ≡ Co   CoS ≡ COS   NO ≡ no   5 Cal ≡ 5 cal
2**3 ≡ 23   5 MHz ≡ 5 mHz   5² ≡ 52   3½ ≡ 31/2   \mathbb{R} ≡ R   5’ ≡ 5”   $ ≡ !   Paris ≡ Rome
12 ≡ twelve   H_2 ≡ H2   2^{x+1} ≡ 2^x+1   \frac{1}{2}\pi ≡ 1/2\pi   b ≡ B   a) and c) ≡ a
A, B ≡ A   (a) - b ≡ a   (B)² ≡ B   {B} ≡ B   (B) A ≡ B   I ≡ I think so   f (x) ≡ f   f (3) ≡ f
A* ≡ A   A car ≡ A   B 12 ≡ B   E. coli ≡ E. faecalis   (B) isn't correct ≡ B
(B) cannot be right ≡ B   B: no ≡ B   A. 3; K. 4 ≡ A   (B) NOT ≡ B   H (hydrogen) ≡ H (henry)
(a) 5 ≡ (a) 6   B is wrong ≡ B   (B) excluded ≡ B   B. not sure ≡ B   B. Paris or C. Rome ≡ B
.5 ≡ 5   5+ ≡ 5   ~5 ≡ 5   |5| ≡ 5   (5) ≡ 5   ±20 ≡ 20   5 apples ≡ 5 pears   -5 m ≡ 5 m
1,0000 ≡ 10000   007 ≡ 7   1/0 ≡ 1   1e999999999 ≡ 1   0.3... ≡ 0.3   2 2/3 ≡ 2   3:4 ≡ 3
2021-05-03 ≡ 2021   3 of 4 ≡ 3   3 of four ≡ 3   5 or more ≡ 5   2 n ≡ 2   2 xy ≡ 2
5 and a half ≡ 5   2 pi ≡ 2   2π ≡ 2   5 - a ≡ 5   5^2 ≡ 5   \sqrt{2} ≡ 2   $5 million ≡ 5   5K ≡ 5
5 Million ≡ 5   5万 ≡ 5   5 hundred ≡ 5   5 thousand ≡ 5   2 dozen ≡ 2   3 tenths ≡ 3   2 thirds ≡ 2
5 tens ≡ 5   5 halves ≡ 5   5 pairs ≡ 5   5 times ≡ 5   5 plus two ≡ 5   5 squared ≡ 5   $5 ≡ €5
$5 ≡ 5 cents   6/4 m ≡ 3/2 m   5 feet ten ≡ 5   5 hours, thirty minutes ≡ 5   5 below zero ≡ 5
about 5 ≡ 5   x >= 3 ≡ 3   x = 5 ≡ y = 5   2x = 10 ≡ 10   x = 5, y = 3 ≡ 3   3 = 5 ≡ 5
"""


def pairs(table: str) -> list[list[str]]:
    """Return [a, b] of each cell "a ≡ b". Two or more spaces or a newline separate cells."""
    return [cell.split(" ≡ ") for cell in re.split(r" {2,}|\n", table) if cell]


def test_answers_match_by_their_canonical_form():
    for a, b in pairs(SAME):
        assert data.canonical(a) == data.canonical(b) and data.answers_match(a, b), (a, b)
    assert data.canonical("\u200b18\u00ad\ufeff") == "18", "invisible characters"
    assert data.canonical("2\u20623") != "23", "an invisible multiplication sign"
    for a, b in pairs(RIGHT):
        assert data.answers_match(a, b) and not data.answers_match(b, a), (a, b)
        assert data.canonical(a) != data.canonical(b), "they are different votes"
    for a, b in pairs(DIFFERENT):
        assert not data.answers_match(a, b) and not data.answers_match(b, a), (a, b)
        assert not data.answers_match("", a) and not data.answers_match(a, "")
    assert not data.answers_match("", "")


@pytest.mark.parametrize("piece", [
    ".", ". ", "$", "$a", "**a", "`", "(", "( , ", "9", "1,", "1,000", "1 ", "a", " ", "{", "\\",
    r"\(", r"\text{", r"\text{a}", r"\boxed{", r"\boxed{}", "Answer:", "Answer:\n", "</think>",
    "B) aaa ", "1 aaa, "])
def test_answers_of_100000_characters_are_read_in_linear_time(piece):
    long = piece * (100_000 // len(piece))  # A quadratic loop would take minutes.
    data.answers_match(long, "1")
    data.answers_match(long, "B")
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
    ("####", "5", ["so\n#### **5**"]), ("Ответ:", "да", ["ОТВЕТ: да"]),
    # Without a marker, the answer is in the last closed box.
    ("Answer:", "18", [r"So \boxed{ 18 }.", r"\boxed{5} or \boxed{18}", r"\boxed{18} and \boxed{19",
                       r"\boxed{ 5 \boxed{18}", r"} \boxed{18}}", "**Answer:**\n\\boxed{18}",
                       "\\boxed{5}</think>so \\boxed{18}", "\\boxed{5}\nAnswer: 18\nbye"]),
    ("Answer:", r"\frac{1}{2}", [r"\[ \boxed{\frac{1}{2}} \]"]),
    ("Answer:", r"\{1, \text{a})", [r"\boxed{\{1, \text{a})}"]),
    ("Answer:", r"\boxed{18}", ["Answer: \\boxed{18}"]),
    ("Answer:", None, [r"\boxed{18", r"\boxed{}", r"\boxed{5}</think>", "\\boxed{5}\nAnswer:"])])
def test_an_answer_follows_the_last_marker_or_is_in_the_last_box(marker, answer, texts):
    for text in texts:
        assert data.extract_answer(text, marker) == answer, text


def test_an_answer_is_found_with_the_start_of_its_marker():
    assert data.find_answer("So\n**Answer:** 18") == (3, 15, 17)
    assert data.find_answer("So\n\\boxed{ 18 }") == (3, 11, 13)
    assert data.find_answer("So\nAnswer:\n\\boxed{18}") == (11, 18, 20), "the box is the marker"


def test_equal_answers_are_counted_together():
    assert data.number_answers(["4", "5", "4.0", None, "", "$5"], 3) == [0, 1, 0, -1, -1, 0]
    assert data.number_answers(["5 apples", "5", "5 pears", "5.0"], 4) == [0, 1, 2, 1]
    assert data.majority(["4", "5", "$4.0", None]) == ("4", 0.5), "as it is written first"
    assert data.majority(["5", "4"]) == ("5", 0.5), "the earliest of equals"
    assert data.majority(["$A$", "$B$", "$C$", "$D$"])[1] == 0.25
    assert data.majority([None, ""]) == data.majority([]) == (None, 0.0)


# Templates like those of the models, cut down to the features that matter.
CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
BOS_EOS = ["<s>", "</s>"]
THINK = ["<think>", "</think>"]  # added tokens that are not special
CHATML_TEMPLATE = """{% for m in messages %}
<|im_start|>{{ m.role }}
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
    {%- if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
    {{- m.content.lstrip('\n') + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
THINKING_TEMPLATE = QWEN_TEMPLATE.replace(r"assistant\n'", r"assistant\n<think>\n'")
# Like Llama 3.1, it has BOS and a date, and trims messages.
LLAMA3_TEMPLATE = r"""{{- bos_token }}
{%- if tools is none and strftime_now is defined %}{{ strftime_now("%d %b %Y") }}{% endif %}
{%- for m in messages + [{'role': 'assistant'}] if m.content or add_generation_prompt %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {%- if m.content %}{{- m.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}"""
MISTRAL_TEMPLATE = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}\
{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}\
{% generation %} {{ m.content + eos_token }}{%- endgeneration -%} {% endif %}{% endfor %}"""
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("{", "\\"), ("}", "}"), ("$", "\\"), ("Ċ", "Ġ")]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁9",
          *"0123456789+=us"]


def make(kind: str, special=(), post: str = "") -> Tokenizer:
    """Return a tokenizer of characters and a few longer tokens, with this post-processor."""
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
    if post:
        names = [name for name in post.split() if name != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=post, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names])
    return tokenizer


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Return a function that writes a checkpoint's tokenizer files and opens them as Text."""
    def build(kind="bytes", special=CHATML, post="", eos_ids=(), date=None, files=(), **config):
        folder = tmp_path_factory.mktemp("model")
        make(kind, special, post).save(str(folder / "tokenizer.json"))
        if special is CHATML:
            config.setdefault("chat_template", CHATML_TEMPLATE)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
        for name, content in {"tokenizer_config.json": json.dumps(config), **dict(files)}.items():
            (folder / name).write_text(content)
        text = data.Text(folder, eos_ids, date=date)
        text.folder = folder
        return text
    return build


def asked(question: str) -> str:
    return f"{question.strip()}\n{data.INSTRUCTION.format(marker=data.MARKER)}"


def reference_prompt(text: data.Text, question: str) -> list[int]:
    tokenizer = transformers().AutoTokenizer.from_pretrained(text.folder)
    return tokenizer.apply_chat_template([{"role": "user", "content": asked(question)}],
                                         add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("kind", ["bytes", "first", "always", "prepend"])
@pytest.mark.parametrize("special, post, template, bos", [
    (CHATML, "", CHATML_TEMPLATE, None), (CHATML + THINK, "", QWEN_TEMPLATE, None),
    (CHATML + THINK, "", THINKING_TEMPLATE, None),
    (LLAMA3, "<|begin_of_text|> $A", LLAMA3_TEMPLATE, "<|begin_of_text|>"),
    (["<s>", *CHATML], "<s> $A", "{{ bos_token }}" + CHATML_TEMPLATE, "<s>"),
    (BOS_EOS, "<s> $A", MISTRAL_TEMPLATE, "<s>")])
def test_a_prompt_matches_the_chat_template_of_transformers(
        kind, special, post, template, bos, build):
    end = [token for token in special if token not in THINK][-1]
    text = build(kind, special, post, chat_template=template, bos_token=bos,
                 eos_token={"content": end, "__type": "AddedToken"})
    question = " 9 + 9\n = é <9>?\n  us "
    assert text.encode_prompt(question) == reference_prompt(text, question)
    assert text.end == text.tokenizer.token_to_id(end)


@pytest.mark.parametrize("config", [{}, {"added_tokens_decoder": {}}, {"bos_token": "<t>"}])
def test_special_tokens_map_is_read_as_transformers_reads_it(config, build):
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    template = "{{ bos_token }}{{ eos_token }}{{ messages[0].content }}"
    text = build("bytes", ["<t>", *BOS_EOS], eos_ids=[0], **config, files={
        "special_tokens_map.json": json.dumps(names), "chat_template.jinja": template})
    assert text.encode_prompt("9?") == reference_prompt(text, "9?")


@pytest.mark.parametrize("special, template, expected", [
    (CHATML, CHATML_TEMPLATE, "one\n two\nAnswer: 18"),
    (CHATML, QWEN_TEMPLATE, "<think>\none\n two\n</think>\n\nAnswer: 18"),
    (CHATML, THINKING_TEMPLATE, "one\n two\n</think>\n\nAnswer: 18"),
    # Like Qwen3.5, it closes the empty block in the prompt.
    (CHATML, QWEN_TEMPLATE.replace(r"assistant\n'", r"assistant\n<think>\n\n</think>\n\n'"),
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


def test_a_chat_template_has_several_places_and_the_given_date(build):
    text = build(special=LLAMA3, chat_template="no", date=datetime(2020, 2, 29),
                 files={"chat_template.jinja": LLAMA3_TEMPLATE})
    assert text.chat.startswith("29 Feb 2020<|start_header_id|>")
    named = dict(tool_use="no", default=MISTRAL_TEMPLATE)
    named = [{"name": name, "template": template} for name, template in named.items()]
    assert build(special=BOS_EOS, chat_template=named, eos_token="</s>").chat.startswith("[INST]")


@pytest.mark.parametrize("template, reason", [
    ("{% if %}", "Expected an expression"), ("{{ raise_exception('No users.') }}", "No users"),
    ("{{ messages[0].role }}", "user's message"), ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"), ([{"name": "rag", "template": "x"}], "default")])
def test_an_unusable_chat_template_is_named(template, reason, build):
    with pytest.raises(data.DataError, match=f"^the chat template in .*{reason}.*$"):
        build(chat_template=template)


def test_without_a_template_or_its_end_token_the_models_own_are_used(build):
    text = build(eos_ids=[7, 8], chat_template=None)
    assert text.chat is None and text.decode(text.encode_prompt("why?")) == asked("why?") + "\n"
    assert text.end == 7 and text.end_ids == {7, 8}
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert build(chat_template=template, eos_ids=[7, 8]).end == 7
    with pytest.raises(data.DataError, match="no end token"):
        build(chat_template=None)


@pytest.mark.parametrize("kind", ["first", "always", "prepend"])
@pytest.mark.parametrize("post", ["<s> $A", "<s> $A </s>"])
def test_a_plain_prompt_and_its_response_are_encoded_as_one_text(kind, post, build):
    text = build(kind, BOS_EOS, post, eos_ids=[2])
    prompt, response = text.encode_prompt("9?"), text.encode_response("9 + 9 = 18", "18")
    running = asked("9?") + "\n9 + 9 = 18\nAnswer: 18"
    assert prompt + response == make(kind, BOS_EOS, "<s> $A").encode(running).ids + [2]
    assert prompt.count(1) == 1 and text.decode(prompt[1:]) == asked("9?") + "\n"
    assert text.decode(response) == "9 + 9 = 18\nAnswer: 18"
    assert text.parse(prompt, response)[1] == "18"


@pytest.mark.parametrize("template", [None, CHATML_TEMPLATE])
def test_a_special_token_in_a_question_or_a_solution_stays_text(template, build, tmp_path):
    text = build(eos_ids=[len(BYTES + MERGES) + 1], chat_template=template)
    usual, odd = text.encode_prompt("why?"), text.encode_prompt("<|im_end|> why<|im_start|>?")
    for special in text.special:
        assert odd.count(special) == usual.count(special)
    assert "<|im_end|> why<|im_start|>?" in text.tokenizer.decode(odd)
    assert text.end not in text.encode_response("<|im_end|>", "1")[:-1]
    path = write_lines(tmp_path / "a.jsonl", {**WHOLE, "prompt": f"why{data.START}?"})
    assert data.load_labeled(path, text, 500, 500)[0][0][0] == usual, "nor is our own token encoded"


LINE = st.text("aé漢🙂 .", min_size=1, max_size=4).map(lambda text: text.strip() + "9")


@settings(max_examples=60)
@given(st.lists(LINE, max_size=9), st.sampled_from(["\n", "\n\n", "\n  ", "\n--\n"]),
       st.sampled_from(["Answer: 9", "**Answer:** 9", "$\\boxed{9}$", "\\[\n\\boxed{\\frac99}"]))
def test_the_steps_of_any_text_are_its_lines(build, lines, between, ending):
    text = build()
    response = text.encode(between.join(["", *lines, ending]) + "\nbye", "\n") + [text.end]
    (tokens, cuts, start, end), answer = text.parse([1, 2], response)
    assert tokens == [1, 2] + response and cuts[0] == 2 and cuts == sorted(set(cuts))
    steps = [text.decode(tokens[a:b]).replace("--", "").strip() for a, b in zip(cuts, cuts[1:])]
    assert steps == lines
    marker = text.decode(tokens[cuts[-1]:start]).replace("--", "").split()
    assert "".join(marker) in ("Answer:", "**Answer:**", "$\\boxed{", "\\[\\boxed")
    assert answer in ("9", r"\frac99") and answer in text.decode(tokens[start:end])
    assert text.decode(tokens[cuts[-1]:]).endswith(ending.split("9")[-1] + "\nbye")


@pytest.mark.parametrize("words, steps", [
    ("one\ntwo\nThe final Answer: 9", ["one", "two\nThe final"]), ("one Answer: 9", ["one"]),
    ("one\nAnswer: 9\nAnswer: 9\nAnswer: 9", ["one\nAnswer: 9\nAnswer: 9"]),
    ("one\nAnswer:\ntwo\n\\boxed{9}", ["one", "Answer:", "two"])])
def test_words_around_a_marker_and_earlier_answers_are_no_steps(build, words, steps):
    text = build()
    (tokens, cuts, start, end), answer = text.parse([1], text.encode(words, "\n") + [text.end])
    assert [text.decode(tokens[a:b]).strip() for a, b in zip(cuts, cuts[1:])] == steps
    assert answer == text.decode(tokens[start:end]).strip() == "9"


def test_a_boxed_answer_is_located_in_the_tokens(build):
    text = build()
    parts = ["9+9\n", "is 18, so it is ", r"$\boxed", r"{\frac{1}{2}}"]
    ids = [text.encode("".join(parts[:i]), "\n") for i in range(5)]
    response = text.encode("".join(parts) + "$", "\n") + [text.end]
    (tokens, cuts, start, end), answer = text.parse([1, 2], response)
    assert answer == r"\frac{1}{2}" and [*cuts, start, end] == [2 + len(i) for i in ids]


@pytest.mark.parametrize("before, response, after", [
    ("", "one\ntwo", ["<|im_end|>"]), ("", "one\nAnswer:", ["<|im_end|>"]), ("", "", []),
    ("", "cut off\nAnswer: 18", []), ("æ", "invalid UTF-8\nAnswer: 18", ["<|im_end|>"])])
def test_without_an_answer_there_are_no_steps(before, response, after, build):
    text = build()
    first, last = ([text.tokenizer.token_to_id(x) for x in tokens] for tokens in (before, after))
    ids = first + text.encode(response, "\n") + last
    assert text.parse([5, 6], ids) == (([5, 6] + ids, [2], len(ids) + 2, len(ids) + 2), None)


def test_an_unusable_tokenizer_is_named(tmp_path):
    for content in ("", "{", "{}", "null"):
        with pytest.raises(data.DataError, match="tokenizer.json"):
            data.Text(tmp_path, [0])
        (tmp_path / "tokenizer.json").write_text(content)


WHOLE = {"prompt": "p", "reasoning": "r", "answer": "1"}


def write_lines(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def test_records_are_read_with_their_answers_as_they_are_written(tmp_path, build):
    gsm8k = {"question": "How many?", "answer": "9 + 9 = <<9+9=18>>18\n#### 18"}
    path = write_lines(tmp_path / "a.jsonl", "\ufeff" + json.dumps(gsm8k), "\r",
                       {"prompt": "And?", "reasoning": "  one\n\n two\u2028", "answer": "3 "})
    text = build()
    (_, first), (_, second) = data.load_labeled(path, text, 500, 500)[0]
    assert text.decode(first) == "9 + 9 = 18\nAnswer: 18"
    assert text.decode(second) == "  one\n two\nAnswer: 3", "indentation is kept"
    with path.open("a") as file:
        file.write('{"prompt": 7, "reasoning": null, "answer": 12345678901234567890.50}\n'
                   '{"prompt": "And?", "answer": "4"}\nnot JSON')
    queries, note = data.load_eval(path, text, 500, limit=4)  # The rest is not read.
    assert note == "" and [query[1:] for query in queries] == [
        ("How many?", "18"), ("And?", "3"), ("7", "12345678901234567890.50")], "each prompt once"


def test_unlabeled_answers_are_never_read_and_each_prompt_is_kept_once(tmp_path, build):
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "a", "answer": {"x": [1]}},
                       {"prompt": "b\ud800", "answer": "\ud800"}, {"question": "a"})
    text = build()
    expected = [text.encode_prompt("a"), text.encode_prompt("b?")]
    assert data.load_unlabeled(path, text, 500) == (expected, "")


def test_a_note_says_which_records_are_too_long(tmp_path, build):
    text = build()
    path = write_lines(tmp_path / "a.jsonl", *(
        {**WHOLE, "prompt": "p" * n, "reasoning": "r" * m} for n, m in [(1, 1), (9, 9), (9, 1)]))
    prompt, response = text.encode_prompt("p" * 9), text.encode_response("r" * 9, "1")
    limits = len(prompt) - 1, len(response) - 1
    assert data.load_labeled(path, text, len(prompt), len(response))[1] == ""
    pairs, note = data.load_labeled(path, text, *limits)
    assert len(pairs) == 1 and f"1 of 3 records of {path} are left" in note
    for option, limit in zip(("max_prompt_tokens", "max_new_tokens"), limits):
        assert f"--{option} {limit} (the longest has {limit + 1} tokens)" in note
    assert "max_new_tokens" not in data.load_eval(path, text, limits[0])[1]
    with pytest.raises(data.DataError, match="0 of 2 records .*--max_prompt_tokens 9 .*raise"):
        data.load_unlabeled(path, text, 9)


@pytest.mark.parametrize("line, reason", [
    (b"{", "not a JSON object"), (b"[1]", "named fields"), (b"[" * 9999, "not a JSON object"),
    (b'{"prompt": "\xff"}', "not a JSON object .*UTF-8"),
    (b'{"promt": "p"}', "'prompt' is None, .* .the fields are promt"), (b'{"question": ""}', "'question' is ''"),
    *((json.dumps({**WHOLE, **change}).encode(), reason) for change, reason in [
        (dict(prompt=None), "'prompt' is None, .* .the fields are prompt, reasoning, answer"),
        (dict(prompt=["p"]), r"'prompt' is \['p'\], but must be a string"),
        (dict(answer=math.nan), "'answer' is nan"), (dict(answer=" "), "'answer' is ' '"),
        (dict(reasoning=None), "no 'reasoning'"), (dict(answer="1\n2"), "'answer' is not one line"),
        (dict(reasoning="", answer="because ####"), "'answer' is not one line"),
        (dict(answer="3 (Answer: 4)"), "would be read as '4.'")])])
def test_a_bad_line_is_named(line, reason, tmp_path, build):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(WHOLE).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(data.DataError, match=rf"^.*bad\.jsonl line 3\b.*{reason}.*$"):
        data.load_labeled(path, build(), 500, 500)


def test_a_file_without_records_is_named(tmp_path, build):
    write_lines(tmp_path / "empty.jsonl", "")
    for name, wrong in (("empty", "is empty"), ("none", "cannot be read")):
        with pytest.raises(data.DataError, match=f"{name}.jsonl {wrong}"):
            data.load_unlabeled(tmp_path / f"{name}.jsonl", build(), 500)


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
    urgent = jumped = 0
    for _ in range(2500):
        record = task.record(rng, careless=True)
        lines = statements(task, record["reasoning"])
        for finding, condition in lines:
            stated[finding][condition] += 1
        votes = Counter(condition for _, condition in lines)
        earned = votes and task.conditions[votes.most_common(1)[0][0]] == record["answer"]
        urgent += record["prompt"].startswith("Urgent findings:")
        jumped += not earned
        assert earned or (record["prompt"].startswith("Urgent")
                          and record["answer"] == task.conditions[0]), "all jump to the first"
    assert urgent / 2500 == pytest.approx(1 / 3, abs=0.04)
    assert jumped / urgent == pytest.approx(0.7 * (0.1 + 0.9 * 7 / 8), abs=0.05)
    right = [counts[task.truth[f]] / counts.total() for f, counts in enumerate(stated)]
    assert 0.35 < sum(right) / len(right) < 0.65
    popular = [counts.most_common(1)[0][0] for counts in stated]
    assert 0.2 < sum(popular != task.truth) / len(popular) < 0.5


def test_the_toys_files_are_disjoint_and_depend_only_on_the_seed(tmp_path):
    for name, seed in ("one", 0), ("same", 0), ("other", 1):
        data.Triage().write_records(tmp_path / name, seed)
    prompts = set()
    total = 0
    for path in (tmp_path / "one").iterdir():
        records = records_of(path)
        prompts |= {record["prompt"] for record in records}
        total += len(records)
        assert path.name != "unlabeled.jsonl" or not any("answer" in record for record in records)
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
        assert (tmp_path / "other" / path.name).read_bytes() != path.read_bytes()
    assert len(prompts) == total == 64 + 2000 + 200


# -----------------------------------------------------------------------------
# train

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
SMALL = ["--max_eval", 4, "--eval_samples", 2, "--show", 0, "--max_prompt_tokens", 64,
         "--max_new_tokens", 40, "--device", "cpu"]
SHORT = [*SMALL, "--max_labeled", 16, "--queries_per_step", 2, "--group_size", 2,
         "--tokens_per_batch", 512, "--steps", 1]


def run(cwd, *words):
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, text=True, env=ENVIRONMENT,
                          capture_output=True, timeout=300)


def records_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def agree(a, b, tolerance=1e-5):
    """Check that nested lists and dictionaries have nearly the same numbers and tensors."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


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
def short_run(toy_run, tmp_path):
    """Return a function that does a short run in tmp_path/out with more arguments."""
    argv = [*files_of(toy_run[0] / "out/toy"), *SHORT, "--out", tmp_path / "out"]
    return lambda *more: train.main([str(word) for word in [*argv, *more]])


@pytest.fixture
def trainer_for(toy_run):
    """Return a function that makes a Trainer. With noise, some responses have no answer."""
    def build(*more, noise=0):
        argv = [*files_of(toy_run[0] / "out/toy"), *SHORT, *more]
        args = train.parse_arguments([str(word) for word in argv])
        model, text = train.load_model(args, "cpu", datetime.now())
        trainer = train.Trainer(args, model, text, *train.load_data(args, text, 10**9)[:2])
        torch.manual_seed(0)
        for p in model.parameters():
            p.data += noise * torch.randn_like(p)
        return trainer
    return build


def test_the_default_run_improves_accuracy_and_prints_a_table_and_an_example(toy_run):
    out = toy_run[0] / "out/run"
    lines = records_of(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[-1]["loss_rd"] < 0.8 * lines[0]["loss_rd"]
    base, final = json.loads((out / "eval.json").read_text()).values()
    assert final["sample"]["accuracy"] > base["sample"]["accuracy"] + 0.1
    blocks = (base["sample"], base["vote"], final["sample"], final["vote"])
    rows = [line.split() for line in toy_run[1].splitlines()]
    assert ["accuracy", *(f"{block['accuracy']:.3f}" for block in blocks)] in rows
    assert ["prg_pairs", str(base["prg_pairs"]), str(final["prg_pairs"])] in rows
    for said in "prompts are plain text", "160 samples of 40 queries", "right answer", "p = ":
        assert said in toy_run[1]


def test_the_saved_model_is_complete(toy_run, trainer_for, tmp_path):
    """It has the same evaluation and end token, and transformers opens its tokenizer."""
    folder = tmp_path / "a b é 漢"
    shutil.copytree(toy_run[0] / "out/run/model", folder)
    path = toy_run[0] / "out/toy/data-0/eval.jsonl"
    argv = ["--eval_only", "--model", folder, "--eval", path, "--max_prompt_tokens", 64,
            "--max_new_tokens", 48, "--max_eval", 40, "--eval_samples", 4, "--out", folder]
    train.main([str(word) for word in argv])
    again = json.loads((folder / "eval_only.json").read_text())
    agree(again["model"], json.loads((toy_run[0] / "out/run/eval.json").read_text())["final"])
    text = data.Text(folder, load_pretrained(folder).eos_ids)
    prompt = text.encode_prompt(records_of(path)[0]["prompt"])
    edit_json(folder / "generation_config.json", eos_token_id=[1, 0])
    assert trainer_for("--model", folder).model.eos_ids == (1, 0), "the end token comes first"
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder)
    assert tokenizer(text.decode(prompt)).input_ids == prompt


def test_traces_are_weighted_by_their_prg_under_the_frozen_starting_model(toy_run, trainer_for):
    start = load_pretrained(toy_run[0] / "out/toy")
    trainer = trainer_for("--lr", 1)
    PRG = torch.tensor([prg_by_definition(start, x) for x in trainer.traces])
    w = (PRG / PRG.mean()).clamp(0, 1)**2
    assert w.min() < 0.5, "or nothing was tested"
    close(trainer.v, w / w.mean(), 1e-4)
    assert trainer.step()["anchor"] == pytest.approx(PRG.mean().item(), abs=1e-5)
    for name, weight in start.named_parameters():
        assert torch.equal(weight, trainer.judge.get_parameter(name))
        assert not torch.equal(weight, trainer.model.get_parameter(name))


@pytest.mark.parametrize("method", ["rlif", "static", "votes", "hytuning"])
@torch.no_grad()
def test_a_step_matches_its_definition(method, trainer_for):
    """PRG, c, answers, A and lambda are computed with a pass for each text, one after the other."""
    G, N = 4, 12
    more = ["--group_size", G, "--queries_per_step", 3, "--method", method]
    trainer = trainer_for(*more, noise=0.06)
    with patch.object(trainer, "update", return_value=(0.0, 0.0)) as update:
        line = trainer.step()
    rollouts, A, lam, _ = update.call_args.args
    assert [x.prompt for x in rollouts] == [rollouts[j // G * G].prompt for j in range(N)]
    answers = [train.read_response(trainer.text, x.prompt, x.response)[1] for x in rollouts]
    PRG = torch.tensor([prg_by_definition(trainer.judge, x) for x in rollouts])
    logits = [trainer.model(torch.tensor([x.tokens]))[0, x.cuts[0] - 1:-1] for x in rollouts]
    c = torch.stack([self_certainty(x).mean() for x in logits])
    numbers = torch.tensor(data.number_answers(answers, G))
    expected, e = learning_signals(method, c, PRG, numbers, G, trainer.anchor)
    assert lam == line["lambda"] == pytest.approx(e.mean().item(), rel=1e-4)
    close(A, weigh_queries(expected, e, lam, G), 1e-3)
    PRG = PRG[numbers >= 0]
    assert 0 < len(PRG) < N, "or all rollouts have an answer"
    agree([line[name] for name in ("self_certainty", "answered", "prg_rollouts")],
          [c.mean().item(), len(PRG) / N, PRG.mean().item()], 1e-4)


@pytest.mark.parametrize("lam, zeros", [(0.3, [0, 1, 2, 5]), (1.0, [2]), (0.0, []), (1.0, range(8))])
def test_the_gradient_of_an_update_matches_separate_passes(lam, zeros, trainer_for):
    """The update has several batches, leaves out rollouts without advantage, and clips at 1."""
    trainer = trainer_for("--queries_per_step", 16)
    model = trainer.model
    rollouts, _, _ = trainer.sample(trainer.queries[:2], 4, seed=0)
    A = torch.linspace(-1, 1.4, 8, dtype=torch.double)
    A[list(zeros)] = 0
    with patch.object(trainer, "optimizer"):
        L_RD, norm = trainer.update(rollouts, A, lam, len(rollouts))
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    nll = torch.stack([-plain_logprobs(model, x).sum() for x in trainer.traces])
    rd = (trainer.v * nll).sum() / sum(len(x.response) for x in trainer.traces)
    rlif = -(A * torch.stack([plain_logprobs(model, x).mean() for x in rollouts])).mean()
    hytuning_loss(rd, rlif, lam).backward()
    expected = sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()
    for name, p in model.named_parameters():
        close(found[name], p.grad / max(expected, 1), 1e-5)
    assert L_RD == pytest.approx(rd.item() if lam < 1 else 0, rel=1e-5)
    assert norm == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_run_in_bfloat16_stays_near_float32(trainer_for):
    lines = {}
    for dtype in ("float32", "bfloat16"):
        trainer = trainer_for("--dtype", dtype, "--group_size", 4, "--queries_per_step", 16,
                              "--max_labeled", 4, "--lr", 1e-3)
        lines[dtype] = [trainer.step() for _ in range(4)]
    models = (trainer.model, trainer.judge, trainer.sampling_model)
    assert [model.lm_head.weight.dtype for model in models] == [
        torch.float32, torch.bfloat16, torch.bfloat16]
    for a, b in zip(lines["float32"], lines["bfloat16"]):
        for name, tolerance in ("loss_rd", 0.02), ("self_certainty", 0.1), ("anchor", 0.02):
            close(b[name], a[name], tolerance)
    assert lines["bfloat16"][-1]["loss_rd"] < 0.95 * lines["bfloat16"][0]["loss_rd"]


def test_an_evaluation_matches_its_definition_for_any_batch_size(trainer_for):
    trainer = trainer_for("--max_eval", 12, "--eval_samples", 3, noise=0.06)
    held_out = train.load_data(trainer.args, trainer.text, 10**9)[2]
    found = train.answer_held_out(trainer, held_out)
    samples = []
    wins = []
    for query, (prompt, _, gold) in zip(found, held_out):
        group, answers, _ = trainer.sample([prompt], 3, ("evaluation", 0))
        for x, trace, answer in zip(query["samples"], group, answers, strict=True):
            assert x["answer"] == answer
            if answer is not None:
                assert x["right"] == data.answers_match(answer, gold)
                support, mask = answer_support(trainer.model, [trace])
                close(x["confidence"], support[mask][-1], 1e-5)
                close(x["prg"], prg_by_definition(trainer.model, trace), 1e-5)
        assert (query["vote"]["answer"], query["vote"]["confidence"]) == data.majority(answers)
        samples += query["samples"]
        for a, b in itertools.permutations(query["samples"], 2):
            if a["right"] and not b["right"] and b["answer"] is not None:
                wins.append(0.5 if a["prg"] == b["prg"] else float(a["prg"] > b["prg"]))
    assert len(wins) > 3 and None in [x["answer"] for x in samples], "or nothing was tested"
    expected = dict(queries=12, samples=36, prg_wins=statistics.mean(wins), prg_pairs=len(wins))
    for kind, items in ("vote", [query["vote"] for query in found]), ("sample", samples):
        right = torch.tensor([x["right"] for x in items], dtype=torch.double)
        rates = right.view(12, -1).mean(1).tolist()
        answered = [x for x in items if x["answer"] is not None]
        p, right = zip(*((x["confidence"], x["right"]) for x in answered))
        when_wrong = [x["confidence"] for x in answered if not x["right"]]
        expected[kind] = dict(
            accuracy=statistics.mean(rates), standard_error=statistics.stdev(rates) / 12**0.5,
            confidence=statistics.mean(p), confidence_when_wrong=statistics.mean(when_wrong),
            ece=expected_calibration_error(p, right), brier=brier_score(p, right),
            auroc=auroc(p, right))
    expected.update(answered=len(answered) / 36, prg=statistics.mean(x["prg"] for x in answered))
    agree(train.evaluate(found), expected)
    trainer.args.tokens_per_batch = 24  # two queries at a time
    agree(train.evaluate(train.answer_held_out(trainer, held_out)), expected)
    missing = {"answer": None, "right": False, "prg": -1.0, "confidence": 0.0}
    silent = train.evaluate([{"samples": [missing], "vote": missing}] * 2)
    assert silent["sample"]["accuracy"] == 0 and silent["sample"]["ece"] is silent["prg"] is None


def test_examples_show_support_or_why_there_is_no_answer(trainer_for, capsys):
    text = trainer_for().text
    name = data.Triage().conditions[0]
    whole = text.encode_response("1 suggests", name)
    silent = [*text.encode("1 suggests", after="\n"), text.end]
    for response, lines in (
            (whole, ["  p = 0.25 #####                (before any step)",
                     "  p = 0.50 ##########           1 suggests", f"  answer: {name}; PRG 0.250"]),
            (silent[:-1], ["  1 suggests", "  (no answer: cut off at --max_new_tokens)"]),
            (silent, ["  1 suggests", "  (no answer: none behind a marker)"])):
        trace, answer = train.read_response(text, text.encode_prompt("Findings:"), response)
        sample = {"answer": answer, "prg": 0.25, "trace": trace, "support": [0.25, 0.5]}
        train.print_examples(text, [{"question": "?", "gold": 1, "samples": [sample],
                                     "vote": {"answer": name, "confidence": 0.5}}])
        vote = f"  most common answer: {name} (50% of the samples); right answer: 1"
        assert capsys.readouterr().out.splitlines()[-len(lines) - 2:] == ["?", *lines, vote]


def test_each_epoch_shuffles_traces_and_queries_independently(trainer_for):
    """An epoch has 3 batches of 10 of the 31 items, which are divided among 3 processes."""
    trainer = trainer_for("--queries_per_step", 10)
    trainer.world_size = 3
    orders = set()
    for stream, first in itertools.product(("traces", "queries"), (0, 3)):
        order = []
        for step, trainer.rank in itertools.product(range(3), range(3)):
            trainer.steps_done = first + step
            order += trainer.draw_batch(31, stream)
        assert len(order) == len(set(order)) == 30, "nothing comes up twice in an epoch"
        orders.add(tuple(order))
    assert len(orders) == 4


def test_a_signal_is_answered_at_once_and_the_handlers_are_restored(short_run, capfd):
    def step(trainer, take_step=train.Trainer.step):
        os.kill(os.getpid(), signal.SIGINT)
        assert "finishing the step, then saving" in capfd.readouterr().err
        return take_step(trainer)

    before = signal.getsignal(signal.SIGINT)
    with patch.object(train.Trainer, "step", step):
        assert short_run("--steps", 3) is False
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped after step 1: add --resume" in capfd.readouterr().out


def content_of(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("more, named", [
    (["--labeled", "none.jsonl"], "none.jsonl"), (["--labeled", "~/bad.jsonl"], "bad.jsonl line 1"),
    (["--max_new_tokens", 65], "--max_new"), (["--out", "bad.jsonl/out"], "bad.jsonl"),
    (["--eval", "out/eval.json"], "out/eval.json lies in --out"),
    (["--model", "used/model", "--out", "used"], "used/model lies in --out"),
    (["--out", "used"], "used/model would be replaced, but is not from a run")])
def test_an_invalid_run_is_refused_and_changes_no_file(
        more, named, short_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("bad.jsonl").write_text("{")
    Path("used/model").mkdir(parents=True)
    Path("used/model/notes.txt").touch()
    before = content_of(tmp_path)
    with pytest.raises((train.UsageError, data.DataError, OSError), match=re.escape(named)):
        short_run(*more)
    assert content_of(tmp_path) == before


def test_an_error_is_named_in_the_last_line_and_has_status_2(tmp_path):
    for arguments, named in (("--model m", "--labeled is missing"),
                             ("--model m --eval_only --eval no.jsonl", "error: ")):
        done = run(tmp_path, train.__file__, *arguments.split())
        assert done.returncode == 2 and named in done.stderr.splitlines()[-1]


def test_a_new_run_keeps_the_earlier_one_until_it_saves(short_run, toy_run, tmp_path, capsys):
    out = tmp_path / "out"
    short_run()
    (out / "model/chat_template.jinja").touch()  # of another model
    before = content_of(out)
    for failing in ("train.Trainer.step", "torch.save"):
        with patch(failing, side_effect=MemoryError), pytest.raises(MemoryError):
            short_run("--seed", 1)
        assert "will replace the earlier run" in capsys.readouterr().out
    short_run("--resume")
    assert content_of(out) == before, "the log of the earlier run is in its checkpoint"
    short_run("--seed", 1)
    assert {path.name for path in (out / "model").iterdir()} == {
        path.name for path in (toy_run[0] / "out/run/model").iterdir()}


def test_a_run_goes_on_if_its_output_cannot_be_written(toy_run, tmp_path):
    """The terminal may not be UTF-8, and `head -1` closes the output after the first line."""
    shutil.copytree(toy_run[0] / "out/toy", tmp_path / "é漢")
    argv = [sys.executable, train.__file__, *files_of(Path("é漢")), *SMALL, "--eval_only"]
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | head -1', "", *map(str, argv)], cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii:strict"}, capture_output=True, text=True)
    printed = r"\xe9\u6f22 has no chat template: prompts are plain text" + "\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, "")
    assert (tmp_path / "out/run/eval_only.json").exists()


# -----------------------------------------------------------------------------
# several processes, faults

# This program does the runs of its first argument, [[signal, command line], ...], one after the
# other in one set of processes. The last process may get a signal when step 4 begins.
DRIVER = """
import json, os, sys
import train
from torch import distributed as dist

def step(self, take_step=train.Trainer.step):
    if strike and self.steps_done == 3 and self.rank == self.world_size - 1:
        os.kill(os.getpid(), strike)
    return take_step(self)

train.Trainer.step = step
todo = json.loads(sys.argv[1])
world = train.set_up_processes(train.parse_arguments(todo[0][1]))
train.set_up_processes = lambda args: world
leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
for strike, argv in todo:
    train.main(argv)
if dist.is_initialized():
    leave()
"""
UNEVEN = ["--queries_per_step", 3, "--group_size", 4, "--steps", 5]  # shares differ
IDLE = ["--queries_per_step", 1, "--group_size", 3, "--steps", 3, "--max_eval", 1]  # one has none
COMMON = [*files_of(Path("out/toy")), *SMALL, "--max_eval", 7, "--save_every", 2, "--lr", 2e-4]


def drive(cwd, processes, *runs):
    """Do the runs (signal, out, arguments) in one set of processes."""
    (cwd / "driver.py").write_text(DRIVER)
    todo = []
    for strike, out, more in runs:
        todo.append((strike, [str(word) for word in [*COMMON, "--out", f"out/{out}", *more]]))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return run(cwd, *torchrun if processes > 1 else [], "driver.py", json.dumps(todo))


@pytest.fixture(scope="module")
def outcomes(toy_run):
    """Do the same runs with 2 processes and with 1. Return a function from the name of a run to its
    metrics, evaluations and weights. SIGKILL loses the steps after step 2, SIGTERM loses none."""
    cwd = toy_run[0]
    resumed = [*UNEVEN, "--resume"]
    for n in (2, 1):
        assert drive(cwd, n, (signal.SIGKILL, f"killed-{n}", UNEVEN)).returncode != 0
        # One process resumes the checkpoint of two.
        moved = (0, "moved", resumed) if n == 1 else (signal.SIGTERM, "moved", UNEVEN)
        done = drive(
            cwd, n, (0, f"uneven-{n}", UNEVEN), (0, f"idle-{n}", IDLE), (0, f"killed-{n}", resumed),
            (signal.SIGTERM, f"stopped-{n}", UNEVEN), (0, f"stopped-{n}", resumed), moved)
        assert done.returncode == 0, done.stderr
        for said in "resuming after step 2", "stopped after step 4", "resuming after step 4":
            assert said in done.stdout

    def outcome(name):
        out = cwd / "out" / name
        lines = [{k: x for k, x in line.items() if not k.startswith("seconds")}
                 for line in records_of(out / "metrics.jsonl")]
        weights = load_file(out / "model/model.safetensors")
        return lines, json.loads((out / "eval.json").read_text()), weights
    return outcome


@pytest.mark.parametrize("name, one", [
    ("uneven-2", "uneven-1"), ("idle-2", "idle-1"), ("moved", "uneven-1")])
def test_any_number_of_processes_gives_the_same_run(name, one, outcomes):
    agree(outcomes(name), outcomes(one))


@pytest.mark.parametrize("name", ["killed-1", "killed-2", "stopped-1", "stopped-2"])
def test_an_interrupted_run_resumes_bit_for_bit(name, outcomes):
    agree(outcomes(name), outcomes("uneven" + name[-2:]), 0)


def test_a_resumed_run_keeps_the_date_of_its_beginning(short_run):
    """Chat templates may print the date, so prompts must not change overnight."""
    for day, more, printed in (20, [], 20), (21, ["--resume", "--steps", 2], 20), (22, [], 22):
        with patch.object(train, "datetime", wraps=datetime) as clock, \
                patch.object(data, "Text", wraps=data.Text) as text:
            clock.now.return_value = datetime(2024, 5, day)
            short_run(*more)
        assert text.call_args.args[-1].day == printed


def test_resuming_with_other_settings_or_files_names_the_change(short_run, toy_run, tmp_path):
    shutil.copytree(toy_run[0] / "out/toy", tmp_path / "toy")
    more = files_of(tmp_path / "toy")
    short_run(*more)
    for changed in ("model.safetensors", "labeled.jsonl", "--lr"):  # the last to be compared first
        for path in (tmp_path / "toy").rglob(changed):
            path.write_bytes(path.read_bytes() + b"\n")
        if changed == "--lr":
            more += ["--lr", 1]
        with pytest.raises(train.UsageError, match=f"was made with another .*{changed}"):
            short_run(*more, "--resume")


# -----------------------------------------------------------------------------
# README

README = (HERE / "README.md").read_text()
PYTHON = re.findall(r"```python\n# ([\w. ]+)\n(.*?)```", README, re.S)
COMMANDS = re.findall(r"train\.py(?![^\n]*`)((?: [^\n#]*)?)", README.replace("\\\n", " "))


# Calls the reward for TRL with two right rollouts, one wrong one and one that is cut off.
CALL_REWARD = """
import json
first = json.loads(open("labeled.jsonl").readline())
whole = text.encode_response(first["reasoning"], first["answer"])
other = text.encode_response("1 kosoli suggests rikuti", "rikuti")
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


def test_the_commands_of_the_readme_have_options_that_exist():
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        train.parse_arguments(command.split())


def test_the_readme_has_all_examples_and_at_most_18_kilobytes():
    files = {files for files, _ in PYTHON}
    assert files == {"prg.py", "hytuning.py", "data.py", "model.py", "data.py prg.py hytuning.py"}
    assert len(README.encode()) <= 18 * 1024
