"""Train with HyTuning. Read it from the top, or start at `Trainer.step`.

    python train.py                                     # the toy task, about a minute
    python train.py --model FOLDER --labeled a.jsonl --unlabeled b.jsonl --eval c.jsonl
    torchrun --nproc_per_node=8 train.py --model ...    # the same on eight GPUs

Before training the starting model judges the supervised traces: their mean PRG is the anchor a, and
each one's PRG decides how much it counts (v). Then, in every step:

    1. sample a group of G rollouts for each unlabeled query
    2. judge: how far did the reasoning earn the answer? (frozen starting model -> PRG -> w)
    3. certainty: what the sampler saw (c)
    4. pool by answer: rewards r, earned shares e
    5. advantages A and the mix lambda
    6. one update on (1 - lambda) L_RD + lambda L_RLIF

SPDX-License-Identifier: MIT
"""
import argparse
import contextlib
import copy
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import hytuning
import prg
from model import (CheckpointError, Config, Decoder, atomic_write, generate, load_pretrained,
                   save_pretrained)


class UsageError(ValueError):
    """A run that cannot be done as asked. The message is one sentence that says what to do."""


# -----------------------------------------------------------------------------
# arguments

# What may change between a run and its resumption.
MAY_CHANGE = ("steps", "out", "resume", "save_every", "show", "device", "tokens_per_batch",
              "rollouts_per_batch", "checkpoint_activations", "zero")

METHODS = ("rd", "rlif", "static", "votes", "hytuning")

# lambda of the methods where it does not depend on the rollouts.
FIXED_LAMBDA = {"rd": 0.0, "rlif": 1.0, "static": 0.5}

# Defaults where there is no --model.
TOY = dict(max_prompt_tokens=64, max_new_tokens=48, lr=4e-4, tokens_per_batch=4096)


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python train.py [options]", allow_abbrev=False,
        description="Train with HyTuning. Without arguments: the toy task. README.md explains.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    add = parser.add_argument_group("model and data").add_argument
    toy = ", ".join(f"{name} {value}" for name, value in TOY.items())
    add("--model", help=f"folder of a Hugging Face checkpoint; none: the toy task, with {toy}")
    add("--labeled", help='JSONL of supervised traces: {"prompt", "reasoning", "answer"}, or GSM8K')
    add("--unlabeled", help='JSONL of queries: {"prompt"}; answers are not read')
    add("--eval", help='JSONL of held-out queries: {"prompt", "answer"}')
    add("--max_labeled", type=int, default=0, help="maximum number of supervised traces; 0: all")
    add("--max_unlabeled", type=int, default=0, help="maximum number of queries; 0: all")
    add("--max_eval", type=int, default=0, help="maximum number of held-out queries; 0: all")
    add("--max_prompt_tokens", type=int, default=512, help="longer prompts are skipped")
    add("--max_new_tokens", type=int, default=512, help="longest response")
    add("--marker", default=data.MARKER, help="what introduces the answer")
    add("--max_steps", type=int, default=16, help="steps of a trace; more are merged evenly")

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="hytuning",
        help="rd: traces alone; rlif: certainty alone; static: both, half and half; votes: "
             "certainty pooled by answer, and lambda adapts; hytuning: votes, weighed by PRG")
    add("--queries_per_step", type=int, default=16, help="Q, over all processes")
    add("--group_size", type=int, default=8, help="G, rollouts of a query")
    add("--traces_per_step", type=int, default=16, help="over all processes")
    add("--tau", type=float, default=0.5, help="softness of the gate on PRG")
    add("--temperature", type=float, default=1.0,
        help="of sampling; log-probabilities are always those of temperature 1")

    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=int, default=100, help="training steps")
    add("--lr", type=float, default=2e-6, help="learning rate of AdamW")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add("--seed", type=int, default=0, help="random seed")

    add = parser.add_argument_group("run").add_argument
    add("--out", default="out/run", help="folder for metrics, evaluation, model and checkpoint")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--eval_only", action="store_true", help="evaluate --model and stop")
    add("--eval_samples", type=int, default=8, help="samples of a held-out query")
    add("--save_every", type=int, default=20, help="steps between checkpoints")
    add("--show", type=int, default=3, help="held-out queries to print at the end")
    add("--device", help="cpu, cuda or cuda:N; none: a GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16"),
        help="of the forward pass; none: bfloat16 on a GPU, float32 on a CPU")
    add("--tokens_per_batch", type=int,
        help="tokens of a pass, padding included; none: 16384 on a GPU, 1024 on a CPU")
    add("--rollouts_per_batch", type=int, default=512, help="sampled at a time, in each process")
    add("--checkpoint_activations", action="store_true",
        help="recompute activations: less memory, a third more time")
    add("--zero", action="store_true", help="shard optimizer state over the processes (ZeRO-1)")

    if not parser.parse_args(argv).model:
        parser.set_defaults(**TOY)
    args = parser.parse_args(argv)
    check_arguments(args, parser)
    return args


def check_arguments(args, parser):
    may_be_0 = ("max_labeled", "max_unlabeled", "max_eval", "steps", "seed", "show")
    for name, value in vars(args).items():
        number = type(value) in (int, float)
        if number and not (0 < value < math.inf or value == 0 and name in may_be_0):
            parser.error(f"--{name} cannot be {value}: give a larger number")
    if args.group_size == 1 and args.method != "rd":
        parser.error("--group_size is 1: a rollout is compared with others of its group")
    if not args.marker.strip() or "\n" in args.marker:
        parser.error("--marker is blank or longer than a line: give a word, such as 'Answer:'")
    if (args.device or "cpu").startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: there is no GPU that PyTorch can use")

    files = {"labeled": args.labeled, "unlabeled": args.unlabeled, "eval": args.eval}
    needed = {"rd": ["labeled"], "rlif": ["unlabeled"]}.get(args.method, ["labeled", "unlabeled"])
    for name in ["eval"] if args.eval_only else needed:
        if args.model and not files[name]:
            parser.error(f"--{name} is missing: give a JSONL file")
    if not args.model and any(files.values()):
        parser.error("the toy knows only its own words: data of yours needs a --model")


# -----------------------------------------------------------------------------
# processes

def set_up(args) -> tuple[int, int, torch.device]:
    """(rank, number of processes, device) of this process, alone or one that torchrun started.

    torchrun watches its processes: it ends all when one dies, and says which. Should one hang, the
    others end after the timeout.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # With a mask, cuDNN's attention has NaN gradients at some lengths on Hopper (pytorch issue
        # 196678), and it plans anew for every shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    return rank, world_size, device


def all_sum(x: Tensor) -> Tensor:
    """The sum of x over all processes, the same in each."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def barrier():
    if dist.is_initialized():
        dist.barrier()


# -----------------------------------------------------------------------------
# the method

class Policy(nn.Module):
    """The decoder as a function from packed responses to log-probabilities: what DDP wraps."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, batch: prg.Packed) -> Tensor:
        """log pi of the tokens of n responses, [n, T], 0 in the padding."""
        inputs = (batch.input_ids, batch.position_ids, batch.attention_mask)
        hidden = self.decoder.hidden_states(*inputs).flatten(0, 1)  # [B W, D]
        hidden = hidden[batch.slots[batch.mask]]
        targets = batch.targets[batch.mask]
        logprobs = hytuning.head_logprobs(hidden, self.decoder.lm_head, targets)
        return logprobs.new_zeros(batch.mask.shape).masked_scatter(batch.mask, logprobs)


def certainty_and_entropy(logits: Tensor) -> Tensor:
    """[2, R] from logits [R, V]: what the sampler notes of every token."""
    return torch.stack((hytuning.self_certainty(logits), hytuning.entropy(logits)))


# A trace that stands in, with weight 0, where a process has nothing to learn from.
IDLE = prg.Trace(tokens=[0, 0], cuts=[1], answer_start=1)


class Trainer:
    """A run: its data, its models, a step of the method, evaluation, checkpoints."""

    def __init__(self, args, rank: int, world_size: int, device: torch.device):
        self.args = args
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.done = 0  # steps
        self.skipped = 0  # updates in a row whose gradient was not finite

        self.model = load_pretrained(args.model, device)
        self.model.checkpoint_activations = args.checkpoint_activations
        self.text = data.Text(args.model, self.model.eos_ids, args.marker, args.max_steps)
        # The chat format's end token first: the saved model must stop where it has learned to.
        self.model.eos_ids = tuple(dict.fromkeys((self.text.end, *self.model.eos_ids)))
        longest = args.max_prompt_tokens + args.max_new_tokens
        context = self.model.config.context
        if longest > context:
            raise UsageError(f"--max_prompt_tokens and --max_new_tokens make {longest} tokens, but "
                             f"{args.model} was made for {context}: lower one or both")
        if self.text.vocab_size > self.model.config.vocab_size:
            raise UsageError(f"{args.model}: tokenizer.json has more tokens than config.json's "
                             "vocab_size: the two belong to different models")
        self.load_data()

        on_cuda = device.type == "cuda"
        args.tokens_per_batch = args.tokens_per_batch or (16384 if on_cuda else 1024)
        args.dtype = args.dtype or ("bfloat16" if on_cuda else "float32")
        self.dtype = getattr(torch, args.dtype)
        # The judge of PRG stays as it is: one that learned with the rollouts would come to agree
        # with their errors.
        self.judge = copy.deepcopy(self.model).requires_grad_(False).to(self.dtype)
        # Trained weights stay in float32; sampling reads them twice as fast from a bfloat16 copy.
        self.sampling_model = self.model
        if self.dtype != torch.float32:
            self.sampling_model = copy.deepcopy(self.judge)
        self.policy = Policy(self.model)
        if world_size > 1:
            self.policy = DistributedDataParallel(self.policy, gradient_as_bucket_view=True)
        self.optimizer = self.make_optimizer()
        self.weigh_traces()

    def load_data(self):
        """The supervised traces, the unlabeled queries and the held-out queries."""
        args, text = self.args, self.text
        self.traces = []  # prg.Trace
        self.queries = []  # prompt ids
        self.held_out = []  # (prompt ids, question, gold answer)
        skipped = {}
        if args.labeled:
            pairs, skipped["labeled"] = data.load_labeled(
                args.labeled, text, args.max_prompt_tokens, args.max_new_tokens, args.max_labeled)
            self.traces = [self.trace(prompt, response) for prompt, response in pairs]
        if args.unlabeled:
            self.queries, skipped["unlabeled"] = data.load_unlabeled(
                args.unlabeled, text, args.max_prompt_tokens, args.max_unlabeled)
        if args.eval:
            self.held_out, skipped["eval"] = data.load_eval(
                args.eval, text, args.max_prompt_tokens, args.max_eval)
        for name, number in skipped.items():
            if number:
                self.say(f"--{name}: {number} records skipped, longer than --max_prompt_tokens or "
                         "--max_new_tokens")

    def make_optimizer(self):
        options = dict(lr=self.args.lr, betas=(0.9, 0.95), weight_decay=0.0)
        if self.args.zero and self.world_size > 1:
            # A second to import, so only where it is asked for.
            from torch.distributed.optim import ZeroRedundancyOptimizer
            return ZeroRedundancyOptimizer(self.model.parameters(), torch.optim.AdamW, **options)
        return torch.optim.AdamW(self.model.parameters(), fused=True, **options)

    def weigh_traces(self):
        """Before training: the anchor a, and how much each supervised trace counts, v [traces]."""
        self.anchor = None
        self.v = torch.zeros(0, device=self.device)
        if not self.traces:
            return
        gains = self.measure_prg(self.judge, self.traces)
        self.anchor = gains.mean().item()
        self.v = torch.ones_like(gains)
        if self.args.method == "hytuning":
            w = hytuning.adaptive_weights(gains, self.anchor, self.args.tau)
            self.v = w / w.mean()
            if self.anchor < 0.05:  # where the gate has its floor
                self.say(f"warning: {self.args.model} finds a PRG of only {self.anchor:.3f} in the "
                         "supervised traces, as a model does that does not know the answer's form: "
                         "warm it up with --method rd, and start from what that writes")

    def step(self) -> dict:
        """One step on this process's share of the batch; the line for metrics.jsonl.

        There are Q queries and N = Q G rollouts, those of a query one after the other.
        """
        args, G = self.args, self.args.group_size
        queries = []
        if args.method != "rd":
            share = self.share_of_batch(len(self.queries), args.queries_per_step, "queries")
            queries = [self.queries[i] for i in share]
        clock = [self.now()]

        # 1. sample a group of G rollouts for each query
        seed = ("rollouts", args.seed, self.done)
        rollouts, seen = self.sample(queries, G, args.temperature, seed)
        clock.append(self.now())

        # 2. judge: how far did the reasoning earn the answer? (PRG of the frozen starting model)
        # All methods log it; hytuning alone uses it.
        gains = self.measure_prg(self.judge, rollouts)  # [N] PRG, -1 where there is no answer
        answered = self.column([len(x.answer) > 0 for x in rollouts])  # [N] 0 or 1
        clock.append(self.now())

        # 3. certainty: what the sampler saw (c)
        c, entropy = seen  # [N] each

        # 4. pool by answer: rewards r, earned shares e
        if args.method in ("votes", "hytuning"):
            # What has no answer has earned nothing, however little the gate would let through.
            w = answered  # [N]
            if args.method == "hytuning":
                w = w * hytuning.adaptive_weights(gains, self.anchor, args.tau)
            answers = self.answer_numbers(rollouts)  # [N]
            r = hytuning.pool_by_answer(w * c, answers, G)  # [N]
            e = hytuning.pool_by_answer(w, answers, G)  # [N]
        else:
            r = c
            e = torch.zeros_like(c)
        # A reward of your own is added to r here.

        # 5. advantages A and the mix lambda
        A = hytuning.group_advantages(r, G)  # [N]
        columns = {"N": torch.ones_like(c), "earned": e, "prg_rollouts": gains, "self_certainty": c,
                   "entropy": entropy, "answered": answered, "undecided": (A == 0).double(),
                   "response_length": self.column([len(x.response) for x in rollouts])}
        sums = all_sum(torch.stack(list(columns.values())).sum(1))  # over all processes
        totals = dict(zip(columns, sums.tolist()))
        lam = FIXED_LAMBDA.get(args.method)
        if lam is None:
            lam = totals["earned"] / totals["N"]  # mean of e

        # 6. one update on (1 - lambda) L_RD + lambda L_RLIF
        L_RD, L_RLIF, grad_norm = self.update(rollouts, A, lam, totals["N"])
        clock.append(self.now())
        self.done += 1
        return self.log_line(L_RD, L_RLIF, lam, grad_norm, totals, clock)

    def update(self, rollouts, A: Tensor, lam: float, N: float) -> tuple[float, float, float]:
        """One optimizer step: (L_RD, L_RLIF, norm of the gradient), of all processes' shares.

        A [rollouts of this process]; N is the number of rollouts of all processes.
        """
        # What has no weight in the loss has no gradient, and is left out.
        share = []
        if lam < 1:
            share = self.share_of_batch(len(self.traces), self.args.traces_per_step, "traces")
        traces = [self.traces[i] for i in share]
        v = self.v[share]
        kept = A.nonzero()[:, 0].tolist() if lam > 0 else []
        rollouts = [rollouts[i] for i in kept]
        A = A[kept]
        tokens = all_sum(self.column([len(x.response) for x in traces]).sum())
        if not traces and not rollouts:
            # The other processes wait for this one's gradients: zeros.
            traces = [IDLE]
            v = torch.zeros(1, device=self.device)

        batches = [(batch, True) for batch in self.pack(traces)]
        batches += [(batch, False) for batch in self.pack(rollouts)]
        losses = torch.zeros(2, device=self.device)
        for number, (batch, supervised) in enumerate(batches, 1):
            # Processes exchange gradients once, in the last backward pass.
            # (An unwrapped policy does not look at this.)
            self.policy.require_backward_grad_sync = number == len(batches)
            with self.autocast():
                # The DDP wrapper, not its .module, or gradients are not exchanged.
                logprobs = self.policy(batch)  # [n, T]
            # Divided by global counts, the losses of micro-batches and processes add up.
            L_RD = L_RLIF = logprobs.new_zeros(())
            if supervised:
                mask = v[batch.trace, None].float() * batch.mask
                L_RD = hytuning.distillation_loss(logprobs, mask, tokens.clamp(min=1))
            else:
                L_RLIF = hytuning.rlif_loss(logprobs, batch.mask, A[batch.trace].float(), N)
            # DDP takes the mean over processes, where a sum is wanted.
            (hytuning.hytuning_loss(L_RD, L_RLIF, lam) * self.world_size).backward()
            losses += torch.stack((L_RD, L_RLIF)).detach()

        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm).item()
        self.skipped += 1
        if math.isfinite(norm):  # the same in all processes
            self.optimizer.step()
            self.skipped = 0
        if self.skipped == 10:
            raise UsageError("the gradient was not finite in ten steps in a row: lower --lr or use "
                             "--dtype float32")
        self.optimizer.zero_grad(set_to_none=False)  # DDP's gradients are views of its buckets
        return *all_sum(losses).tolist(), norm

    def share_of_batch(self, total: int, size: int, stream: str) -> list[int]:
        """This process's share of the step's items, out of `total`: an epoch is a shuffle, cut into
        whole batches. `stream` tells the shuffle of the queries from that of the traces."""
        size = min(size, total)
        if size == 0:
            return []
        epoch, place = divmod(self.done, total // size)
        rng = np.random.default_rng([self.args.seed, epoch, *stream.encode()])
        batch = rng.permutation(total)[place * size:(place + 1) * size]
        return batch[self.rank::self.world_size].tolist()

    def sample(self, prompts, samples: int, temperature: float, seed, bar: str = ""):
        """N = prompts x samples responses as prg.Trace; their certainty and entropy, [2, N]."""
        if self.sampling_model is not self.model:
            with torch.no_grad():
                for mine, trained in zip(self.sampling_model.parameters(), self.model.parameters()):
                    mine.copy_(trained)
        traces = [None] * (len(prompts) * samples)
        seen = torch.zeros(2, len(prompts), samples, dtype=torch.double, device=self.device)
        # Prompts of like length together, since a batch is as wide as its longest.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = max(1, self.args.rollouts_per_batch // samples)
        hidden = not bar or self.rank > 0
        for start in tqdm(range(0, len(order), size), bar, leave=False, disable=hidden or None):
            batch = order[start:start + size]
            groups, means = generate(
                self.sampling_model, [prompts[i] for i in batch], samples_per_prompt=samples,
                max_new_tokens=self.args.max_new_tokens, temperature=temperature, seed=seed,
                eos_ids=self.text.ends, statistic=certainty_and_entropy)
            seen[:, batch] = means.double()
            for i, group in zip(batch, groups):
                rollouts = [self.trace(prompts[i], response) for response in group]
                traces[i * samples:(i + 1) * samples] = rollouts
        return traces, seen.flatten(1)

    def trace(self, prompt: list[int], response: list[int]) -> prg.Trace:
        return prg.Trace(*self.text.parse(prompt, response))

    def measure_prg(self, judge: Decoder, traces) -> Tensor:
        """PRG of each trace as this model sees it, [N]; -1 without an answer."""
        tokens = self.args.tokens_per_batch
        with self.autocast():
            support, mask = prg.answer_support(judge, traces, tokens, self.device)
        return prg.progressive_reasoning_gain(support.double(), mask)

    def answer_numbers(self, rollouts) -> Tensor:
        """Numbers [N], the same for rollouts of a group that give the same answer."""
        answers = [self.text.answer(x.response) for x in rollouts]
        numbers = []
        for i in range(0, len(answers), self.args.group_size):
            numbers += data.same_answers(answers[i:i + self.args.group_size])
        return self.column(numbers)

    def pack(self, traces) -> list[prg.Packed]:
        return prg.pack(traces, copies=False, tokens=self.args.tokens_per_batch, device=self.device)

    def autocast(self):
        # Without the cache each chunk of the head has a gradient of its own, summed in float32.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False,
                              enabled=self.dtype == torch.bfloat16)

    def column(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.double, device=self.device)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def say(self, *words):
        if self.rank == 0:
            tqdm.write(" ".join(map(str, words)))

    def log_line(self, L_RD, L_RLIF, lam, grad_norm, totals, clock) -> dict:
        """What metrics.jsonl says of a step; None where the method has no such thing."""
        names = ("prg_rollouts", "self_certainty", "entropy", "response_length", "answered",
                 "undecided")  # whose advantage is 0
        N = totals["N"]
        line = {"step": self.done, "loss": hytuning.hytuning_loss(L_RD, L_RLIF, lam),
                "loss_rd": L_RD if lam < 1 else None,
                "loss_rlif": L_RLIF if lam > 0 else None,  # about 0 on policy; its gradient is not
                "lambda": lam, "anchor": self.anchor}
        for name in names:
            line[name] = totals[name] / N if N else None
        line["grad_norm"] = grad_norm
        line["skipped_in_a_row"] = self.skipped
        line["tokens_per_second"] = totals["response_length"] / (clock[-1] - clock[0])
        seconds = np.diff(clock).tolist()
        for name, value in zip(("seconds_sampling", "seconds_scoring", "seconds_update"), seconds):
            line[name] = value
        # NaN is not JSON.
        return {k: v if v is not None and math.isfinite(v) else None for k, v in line.items()}

    # -------------------------------------------------------------------------
    # evaluation

    def evaluate(self) -> dict:
        """What eval.json says of the model as it is, and in self.found what `show` prints.

        A question that is listed twice is answered once and counted twice.
        """
        args = self.args
        distinct = list(dict.fromkeys(tuple(prompt) for prompt, _, _ in self.held_out))
        mine = [list(prompt) for prompt in distinct[self.rank::self.world_size]]
        seed = ("evaluation", args.seed)
        sampled, _ = self.sample(mine, args.eval_samples, args.temperature, seed, "evaluating")
        greedy, _ = self.sample(mine, 1, 0.0, seed, "evaluating, greedy")
        gains = self.measure_prg(self.model, sampled)
        gains = gains.view(-1, args.eval_samples).mean(1).tolist()
        found = {}
        for i, prompt in enumerate(mine):
            group = sampled[i * args.eval_samples:(i + 1) * args.eval_samples]
            answers = [self.text.answer(x.response) for x in group]
            single = self.text.answer(greedy[i].response)
            found[tuple(prompt)] = (answers, single, gains[i], group[0])
        if self.world_size > 1:
            parts = [None] * self.world_size
            dist.all_gather_object(parts, found)
            for part in parts:
                found.update(part)
        self.found = found

        rows = []
        for prompt, _, gold in self.held_out:
            answers, single, gain, _ = found[tuple(prompt)]
            winner, share = data.majority(answers)
            right = [self.is_right(answer, gold) for answer in answers]
            rows.append((np.mean(right), self.is_right(winner, gold), share,
                         self.is_right(single, gold), gain))
        accuracy, correct, confidence, greedy, gain = torch.tensor(rows, dtype=torch.double).T
        result = {
            "accuracy": accuracy.mean().item(), "majority_accuracy": correct.mean().item(),
            "greedy_accuracy": greedy.mean().item(), "confidence": confidence.mean().item(),
            "confidence_when_wrong": confidence[correct == 0].mean().item(),
            "ece": prg.expected_calibration_error(confidence, correct),
            "brier": prg.brier_score(confidence, correct), "auroc": prg.auroc(confidence, correct),
            "prg": gain.mean().item(), "n": len(rows),
            "reliability": prg.reliability(confidence, correct)}
        # NaN, where nothing is wrong, is not JSON.
        return {name: None if value != value else value for name, value in result.items()}

    def is_right(self, answer: str | None, gold: str) -> bool:
        return answer is not None and data.answers_match(answer, gold)

    def show(self, number: int):
        """The first held-out queries: support after every step of a rollout, PRG, the vote."""
        for prompt, question, gold in self.held_out[:number]:
            answers, _, _, trace = self.found[tuple(prompt)]
            with self.autocast():
                support, mask = prg.answer_support(self.model, [trace], device=self.device)
            gain = prg.progressive_reasoning_gain(support, mask).item()
            self.say(f"\n{question}")
            lines = ["(before any step)"]
            for a, b in zip(trace.cuts, trace.cuts[1:]):
                lines.append(" ".join(self.text.decode(trace.tokens[a:b]).split()))
            for p, line in zip(support[mask].tolist(), lines):
                self.say(f"  p = {p:4.2f} {'#' * round(20 * p):20s} {line}")
            winner, share = data.majority(answers)
            answer = answers[0] or "(none that can be read)"
            self.say(f"  {self.args.marker} {answer}    PRG {gain:.2f}")
            self.say(f"  vote: {winner}, {round(share * len(answers))} of {len(answers)}    "
                     f"right answer: {gold}")

    # -------------------------------------------------------------------------
    # checkpoints

    def save(self, base: dict | None):
        """Write checkpoint.pt: all that the rest of the run depends on, however many processes."""
        if hasattr(self.optimizer, "consolidate_state_dict"):  # --zero: rank 0 collects the shards
            self.optimizer.consolidate_state_dict(to=0)
        if self.rank == 0:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                     "done": self.done, "skipped": self.skipped, "base": base,
                     "args": vars(self.args)}
            atomic_write(Path(self.args.out, "checkpoint.pt"), lambda path: torch.save(state, path))
        barrier()

    def restore(self) -> dict | None:
        """Go on from the checkpoint in --out, if there is one; the evaluation of the base model."""
        path = Path(self.args.out, "checkpoint.pt")
        found = all_sum(torch.tensor(float(path.is_file()), device=self.device)).item()
        if found == 0:
            self.say(f"no checkpoint in {self.args.out}: starting anew")
            return None
        if found < self.world_size:
            raise UsageError(f"{path} is not on all machines: give an --out on a shared disk")
        # On the CPU first: never twice on the GPU.
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds
            reason = str(error).split("\n")[0]
            raise UsageError(f"{path} cannot be read ({reason}): remove it, or use another "
                             "--out") from None
        for name, now in vars(self.args).items():
            before = state["args"].get(name)
            if before != now and name not in MAY_CHANGE:
                raise UsageError(f"{path} was made with --{name} {before}, not {now}: use the "
                                 "same, or another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]
        self.skipped = state["skipped"]
        self.say(f"resuming after step {self.done}")
        return state["base"]


# -----------------------------------------------------------------------------
# the toy's base model

def build_toy(rank: int, device: torch.device, folder=Path("out/toy")) -> Path:
    """The toy's data, and a base model trained on what careless authors write; built once."""
    if rank == 0 and not folder.exists():
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        toy = data.Triage()
        vocab_size, end = toy.write(temporary)
        torch.manual_seed(0)
        model = Decoder(Config(
            vocab_size, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
            initializer_range=0.1, rope_parameters={"rope_type": "default", "rope_theta": 100.0}))
        model.eos_ids = (end,)
        policy = Policy(model.to(device))
        text = data.Text(temporary, [end])
        rng = np.random.default_rng(1)
        steps, lr = 180, 1e-2
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
        for _ in tqdm(range(steps), "training the toy's base model", leave=False, disable=None):
            traces = []
            for _ in range(64):
                record = toy.record(rng, careless=True)
                prompt = text.prompt(record["prompt"])
                response = text.response(record["reasoning"], record["answer"])
                traces.append(prg.Trace(*text.parse(prompt, response)))
            batch, = prg.pack(traces, copies=False, tokens=2**20, device=device)
            hytuning.distillation_loss(policy(batch), batch.mask).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        save_pretrained(model, temporary)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(temporary)  # another run was faster
    barrier()
    return folder


# -----------------------------------------------------------------------------
# the run

def main(argv=None):
    """A whole run, with these command line arguments: evaluate, train, save, evaluate again."""
    args = parse_arguments(argv)
    rank, world_size, device = set_up(args)
    if not args.model:
        # So small a model is slower on more threads, much slower on a busy machine.
        torch.set_num_threads(1)
        toy = build_toy(rank, device)
        args.model = str(toy)
        args.labeled = str(toy / "labeled.jsonl")
        args.unlabeled = str(toy / "unlabeled.jsonl")
        args.eval = str(toy / "eval.jsonl")
    out = Path(args.out)
    if not args.eval_only and Path(args.model).resolve() == (out / "model").resolve():
        raise UsageError(f"--model {args.model} is where this run writes: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args, rank, world_size, device)
    results = {}
    finished = True
    if not args.eval_only:
        base = trainer.restore() if args.resume else None
        log = open_log(out / "metrics.jsonl", trainer.done) if rank == 0 else None
        if trainer.held_out and base is None:
            base = trainer.evaluate()
        results["base"] = base
        finished = train(trainer, log, base)
        if rank == 0:
            save_pretrained(trainer.model, out / "model")
            trainer.say(f"the model is in {out / 'model'}, the log in {out / 'metrics.jsonl'}")
    if finished and trainer.held_out:
        results["model" if args.eval_only else "final"] = trainer.evaluate()
        if rank == 0:
            name = "eval_only.json" if args.eval_only else "eval.json"
            atomic_write(out / name, lambda path: path.write_text(json.dumps(results, indent=2)))
            print_results(results)
            trainer.show(args.show)
    if dist.is_initialized():
        # Together, once rank 0 has written; then a moment for gloo's threads to let go of tensors:
        # one that wants Python's lock while Python ends aborts the process (pytorch issue 190489).
        barrier()
        time.sleep(0.2)
        dist.destroy_process_group()


def open_log(path: Path, steps: int):
    """metrics.jsonl for appending, with the lines of the first `steps` steps kept."""
    kept = path.read_text().splitlines(keepends=True)[:steps] if steps else []
    atomic_write(path, lambda temporary: temporary.write_text("".join(kept)))
    return open(path, "a")


def train(trainer: Trainer, log, base: dict | None) -> bool:
    """The steps that are left, logged and saved; False if SIGINT or SIGTERM ended them early."""
    args = trainer.args
    stopping = False
    hidden = True if trainer.rank else None  # None: shown on a terminal only
    bar = tqdm(total=args.steps, initial=trainer.done, desc=args.method, disable=hidden)
    with noted_signals() as signals, bar:
        while trainer.done < args.steps and not stopping:
            line = trainer.step()
            if log is not None:
                log.write(json.dumps(line) + "\n")
                log.flush()
            bar.update()
            # A signal may have come to one process only.
            stopping = all_sum(torch.tensor(len(signals), device=trainer.device)).item() > 0
            if stopping or trainer.done % args.save_every == 0 or trainer.done == args.steps:
                trainer.save(base)
                said = f"step {trainer.done} of {args.steps}: lambda {line['lambda'] or 0:.2f}"
                if line["prg_rollouts"] is not None:
                    said += f", PRG of rollouts {line['prg_rollouts']:.2f}"
                trainer.say(said + ", saved")
                if line["answered"] == 0:
                    trainer.say("warning: no rollout ends by itself with a readable answer: raise "
                                "--max_new_tokens, or teach the form with --method rd first")
                if line["entropy"] is not None and line["entropy"] < 0.01:
                    trainer.say("warning: collapse, the entropy of rollouts is near 0: lower --lr")
    if stopping:
        trainer.say(f"stopped after step {trainer.done}: --resume goes on")
    return not stopping


@contextlib.contextmanager
def noted_signals():
    """A list that notes SIGINT and SIGTERM: finish the step, save, leave. A second acts at once."""
    came = []
    before = {}

    def note(number, frame):
        came.append(number)
        signal.signal(number, before[number])

    try:
        if threading.current_thread() is threading.main_thread():  # no other may
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, note)
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_results(results: dict):
    """The table of measures and, of each model, a reliability diagram."""
    print("\n" + " " * 24 + "".join(f"{name:>8}" for name in results))
    *_, last = results.values()
    measures = [name for name in last if name != "reliability"]
    for measure in measures:
        cells = ""
        for result in results.values():
            value = result[measure]
            cells += f"{value:8.3f}" if isinstance(value, float) else f"{value or '-':>8}"
        print(f"{measure:24}{cells}")
    for name, result in results.items():
        print(f"\n{name}: confidence of the majority (|) and how many of these are right (#)")
        for confidence, right, number in result["reliability"]:
            bar = list(f"{'#' * round(40 * right):41}")
            bar[round(40 * confidence)] = "|"
            print(f"  {confidence:4.2f}  {''.join(bar)}  {right:4.2f} of {number}")


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, data.DataError, UsageError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
