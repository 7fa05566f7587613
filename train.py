"""Train a model with HyTuning. The method itself is in `Trainer.step`.

    python train.py                                     # the toy task, about 90 seconds
    python train.py --model FOLDER --labeled a.jsonl --unlabeled b.jsonl --eval c.jsonl
    torchrun --nproc_per_node=8 train.py --model ...    # the same on eight GPUs

Before training, the PRG of each supervised trace is computed under the starting model. The mean
PRG is the anchor a, and the PRG of a trace sets its weight v. Every step then does the following:

    1. Sample a group of G rollouts for each unlabeled query, and compute their self-certainty c.
    2. Compute the PRG of each rollout under the frozen starting model.
    3. Compute the weight w of each rollout from its PRG.
    4. Pool the rollouts that give the same answer into rewards r and earned shares e.
    5. Compute the advantages A and lambda, and multiply A by lambda_q / lambda of its query q.
    6. Take one optimizer step on (1 - lambda) L_RD + lambda L_RLIF.

SPDX-License-Identifier: MIT
"""
import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from datetime import timedelta
from functools import partial
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
from model import CheckpointError, Config, Decoder, generate, load_pretrained, save_pretrained


class UsageError(ValueError):
    """The run cannot start. The message says in one sentence what is wrong and what to do."""


# -----------------------------------------------------------------------------
# arguments

METHODS = ("rd", "rlif", "static", "votes", "hytuning")

# The training files of the methods that do not need both.
LEARNS_FROM = {"rd": ("labeled",), "rlif": ("unlabeled",)}

# Settings that may change when a run is resumed.
MAY_CHANGE = ("steps", "out", "resume", "save_every", "show", "device", "tokens_per_batch",
              "rollouts_per_batch", "checkpoint_activations")

# Defaults that depend on the task or the device.
TOY = dict(max_labeled=16, max_prompt_tokens=64, max_new_tokens=48, lr=4e-4, tokens_per_batch=4096)
REAL = dict(max_labeled=0, max_prompt_tokens=512, max_new_tokens=512, lr=2e-6)
GPU = dict(tokens_per_batch=16384, dtype="bfloat16")
CPU = dict(tokens_per_batch=1024, dtype="float32")


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python train.py [options]", allow_abbrev=False,
        description="Train with HyTuning. Without --model, run the toy task. See README.md.")

    add = parser.add_argument_group("model and data").add_argument
    add("--model", help="folder of a Hugging Face checkpoint (default: the toy task)")
    add("--labeled", help='JSONL file of {"prompt", "reasoning", "answer"}, or of GSM8K records')
    add("--unlabeled", help='JSONL file of queries, {"prompt"}; answers are ignored')
    add("--eval", help='JSONL file of held-out queries, {"prompt", "answer"}')
    add("--max_labeled", type=int, help="traces to read; 0 means all (default: 0; toy: 16)")
    add("--max_unlabeled", type=int, default=0, help="queries to read; 0 means all (default: 0)")
    add("--max_eval", type=int, default=0, help="--eval records to read; 0 means all (default: 0)")
    add("--max_prompt_tokens", type=int, help="skip longer prompts (default: 512; toy: 64)")
    add("--max_new_tokens", type=int, help="skip or cut longer responses (default: 512; toy: 48)")
    add("--marker", default=data.MARKER, help="text before the answer (default: %(default)s)")
    add("--max_reasoning_steps", type=int, default=16,
        help="merge lines into at most this many reasoning steps (default: %(default)s)")

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="hytuning",
        help="rd: supervised traces only; rlif: self-certainty only; static: half rd, half rlif; "
             "votes: rd and rlif mixed by lambda, self-certainty pooled by answer; hytuning: votes "
             "weighted by PRG (default: %(default)s)")
    add("--queries_per_step", type=int, default=16, help="for all processes (default: %(default)s)")
    add("--group_size", type=int, default=8, help="G, rollouts per query (default: %(default)s)")
    add("--traces_per_step", type=int, default=16, help="for all processes (default: %(default)s)")
    add("--tau", type=float, default=0.5, help="temperature of the weight w (default: %(default)s)")

    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=int, default=100, help="training steps (default: %(default)s)")
    add("--lr", type=float, help="learning rate of AdamW (default: 2e-6; toy: 4e-4)")
    add("--max_grad_norm", type=float, default=1.0, help="clip gradients (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")

    add = parser.add_argument_group("run").add_argument
    add("--out", default="out/run", help="folder for all results (default: %(default)s)")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--eval_only", action="store_true", help="evaluate --model without training")
    add("--eval_samples", type=int, default=8, help="samples per query (default: %(default)s)")
    add("--save_every", type=int, default=20, help="steps between saves (default: %(default)s)")
    add("--show", type=int, default=3, help="examples to print at the end (default: %(default)s)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="data type of the forward pass (default: bfloat16 on a GPU, float32 on a CPU)")
    add("--tokens_per_batch", type=int,
        help="tokens of a forward pass, with padding (default: GPU 16384, CPU 1024; toy: 4096)")
    add("--rollouts_per_batch", type=int, default=512,
        help="rollouts that a process samples at a time (default: %(default)s)")
    add("--checkpoint_activations", action="store_true",
        help="recompute activations in the backward pass to save memory; takes a third more time")

    args = parser.parse_args(argv)
    check_arguments(args, parser)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for defaults in (REAL if args.model else TOY, CPU if args.device == "cpu" else GPU):
        for name, value in defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    return args


def check_arguments(args, parser):
    may_be_0 = ("max_labeled", "max_unlabeled", "max_eval", "steps", "seed", "show")
    for name, value in vars(args).items():
        if value == "":
            parser.error(f"--{name} is empty: give a value")
        is_number = type(value) in (int, float)
        if is_number and not (0 < value < math.inf or value == 0 and name in may_be_0):
            least = "0 or more" if name in may_be_0 else "a positive number"
            parser.error(f"--{name} cannot be {value}: give {least}")
    if args.group_size == 1 and args.method != "rd":
        parser.error("--group_size cannot be 1, since a group compares rollouts: give at least 2")
    if not args.marker.strip() or "\n" in args.marker:
        parser.error("--marker must be a single line that is not blank, such as 'Answer:'")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if args.device and args.device not in devices:
        parser.error(f"--device {args.device} is not available: PyTorch finds {', '.join(devices)}")
    if args.eval_only and args.resume:
        parser.error("--resume continues a training, which --eval_only leaves out: remove one")
    if not args.model and (args.eval_only or args.labeled or args.unlabeled or args.eval):
        parser.error("--model is missing: give the folder of a checkpoint")
    for name in files_needed(args):
        if args.model and not getattr(args, name):
            parser.error(f"--{name} is missing: give a JSONL file")


def files_needed(args) -> tuple[str, ...]:
    if args.eval_only:
        return ("eval",)
    return LEARNS_FROM.get(args.method, ("labeled", "unlabeled"))


# -----------------------------------------------------------------------------
# processes

def set_up_processes(args) -> tuple[int, int, torch.device]:
    """Return (rank, world size, device) of this process.

    torchrun starts the processes. If one dies, torchrun reports its rank and ends the others. If
    one hangs, they end after the timeout. Raises UsageError if a variable of torchrun is missing.
    """
    rank = 0
    world_size = 1
    device = torch.device(args.device)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UsageError(f"the environment variable WORLD_SIZE is set, but {name} is not: "
                                 "start several processes with torchrun, or unset WORLD_SIZE")
        rank = int(os.environ["RANK"])
        world_size = int(os.environ["WORLD_SIZE"])
        if args.device == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if args.dtype == "bfloat16":
            torch.set_float32_matmul_precision("high")  # use TF32 for float32 matmuls
        # With a mask, cuDNN attention returns NaN gradients at some lengths on Hopper GPUs
        # (pytorch issue 196678). It also builds a new plan for every shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        # The other processes wait while rank 0 writes a checkpoint, so the timeout is long.
        dist.init_process_group(backend, timeout=timedelta(minutes=30),
                                device_id=device if device.type == "cuda" else None)
    return rank, world_size, device


def all_sum(x: Tensor) -> Tensor:
    """Sum x over all processes in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def barrier():
    if dist.is_initialized():
        dist.barrier()


def say(text: str):
    """Print a line on rank 0 without breaking a progress bar."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(text)


# -----------------------------------------------------------------------------
# model and data

def load_model(args, device) -> tuple[Decoder, data.Text]:
    model = load_pretrained(args.model, device)
    text = data.Text(args.model, model.eos_ids, args.marker)
    if text.vocab_size > model.config.vocab_size:
        raise UsageError(f"{args.model}/tokenizer.json has more tokens than the vocab_size in "
                         "config.json: use the tokenizer that belongs to the model")
    # The end token of training comes first, also in the files of the saved model.
    model.eos_ids = tuple(dict.fromkeys((text.end, *model.eos_ids)))
    return model, text


def load_data(args, text: data.Text, context: int):
    """Return the supervised traces, the unlabeled prompts and the held-out (prompt, question, gold
    answer) tuples. A list is empty if the run does not need it. Raises UsageError if a prompt and
    a response may together be longer than `context` tokens."""
    traces = []
    queries = []
    held_out = []
    limit = args.max_prompt_tokens
    if "labeled" in files_needed(args):
        pairs, note = data.load_labeled(args.labeled, text, limit, args.max_new_tokens,
                                        args.max_labeled)
        report(note)
        traces = [make_trace(text, prompt, response) for prompt, response in pairs]
    if "unlabeled" in files_needed(args):
        queries, note = data.load_unlabeled(args.unlabeled, text, limit)
        report(note)
    if args.eval:
        held_out, note = data.load_eval(args.eval, text, limit, args.max_eval)
        report(note)
    longest = limit + args.max_new_tokens
    if longest > context:
        raise UsageError(f"--max_prompt_tokens {limit} and --max_new_tokens {args.max_new_tokens} "
                         f"add up to {longest}, but {args.model} supports {context}: lower them")
    return traces, queries, held_out


def report(note: str):
    if note:
        say(note)


def make_trace(text: data.Text, prompt: list[int], response: list[int]) -> prg.Trace:
    return prg.Trace(*text.parse(prompt, response)[0])


# -----------------------------------------------------------------------------
# training

class Policy(nn.Module):
    """Computes the log-probabilities of packed responses. DDP wraps this module."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, batch: prg.Packed) -> tuple[Tensor, Tensor]:
        """Return log pi of the tokens of n responses, [n, T], with 0 in the padding, and a mask."""
        hidden = self.decoder.hidden_states(batch.input_ids, batch.position_ids,
                                            batch.attention_mask)  # [B, W, D]
        hidden = hidden.flatten(0, 1)[batch.slots]  # [tokens of responses, D]
        return batch.pad(hytuning.head_logprobs(hidden, self.decoder.logits, batch.targets))


# A process without data runs this trace with weight 0, so that DDP has a backward pass there.
DUMMY = prg.Trace(tokens=[0, 0], cuts=[1], answer_start=1)


class Trainer:
    """Holds the policy, the judge and the optimizer of a run, and takes its training steps."""

    def __init__(self, args, model: Decoder, text: data.Text, traces, queries,
                 rank: int = 0, world_size: int = 1):
        self.args = args
        self.text = text
        self.traces = traces
        self.queries = queries
        self.rank = rank
        self.world_size = world_size
        self.device = model.lm_head.weight.device
        self.dtype = getattr(torch, args.dtype)
        self.steps_done = 0
        self.checksums = compute_checksums(args)  # once, since a file may change during the run

        self.model = model
        self.model.checkpoint_activations = args.checkpoint_activations
        # The judge is the frozen starting model. If it were trained together with the policy, it
        # would learn to agree with the policy's errors.
        self.judge = copy.deepcopy(model).requires_grad_(False).to(self.dtype)
        # The trained weights are float32. Sampling is faster with a bfloat16 copy of them.
        self.sampling_model = model
        if self.dtype != torch.float32:
            self.sampling_model = copy.deepcopy(self.judge)
        self.policy = Policy(model)
        if world_size > 1:
            self.policy = DistributedDataParallel(self.policy, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95),
                                           weight_decay=0.0, fused=True)
        # The anchor a and the weights v of the supervised traces.
        self.anchor = None
        self.v = torch.zeros(0, device=self.device)
        if self.traces:
            PRG = self.compute_prg(self.traces)
            self.anchor = PRG.mean().item()
            self.v = hytuning.trace_weights(args.method, PRG, self.anchor, args.tau)

    def step(self) -> dict:
        """Take one training step, and return its line for metrics.jsonl.

        This process samples N rollouts, G consecutive ones for each of its queries.
        """
        args = self.args
        clock = [self.now()]

        # 1. Sample a group of G rollouts for each query, and compute their self-certainty c.
        share = self.share_of_batch(len(self.queries), args.queries_per_step, "queries")
        queries = [self.queries[i] for i in share]
        seed = ("rollouts", args.seed, self.steps_done)
        rollouts, c = self.sample(queries, args.group_size, seed)  # [N] each
        clock.append(self.now())

        # 2. Compute the PRG of each rollout under the frozen starting model.
        gains, evidence = self.judge_traces(rollouts)  # [N] each; equal except for `support`
        answers = [self.text.parse(x.prompt, x.response)[1] for x in rollouts]
        answers = self.column(data.number_answers(answers, args.group_size))  # [N], -1 for none
        clock.append(self.now())

        # 3. to 5. Compute w, r, e, A and lambda. To try another reward, change `learning_signals`.
        A, e = hytuning.learning_signals(args.method, c, PRG, answers, args.group_size,
                                         self.anchor, args.tau)  # [N] each
        earned, N_all = all_sum(self.column([e.sum(), len(e)])).tolist()  # over all processes
        lam = earned / max(N_all, 1)
        A = hytuning.weigh_queries(A, e, lam, args.group_size)

        # 6. Take one optimizer step on (1 - lambda) L_RD + lambda L_RLIF.
        L_RD, grad_norm = self.update(rollouts, A, lam, N_all)
        clock.append(self.now())
        self.steps_done += 1

        columns = {"prg_rollouts": PRG, "self_certainty": c, "answered": answers >= 0,
                   "undecided": A == 0,
                   "response_length": self.column([len(x.response) for x in rollouts])}
        line = {"step": self.steps_done, "lambda": lam, "loss_rd": L_RD, "grad_norm": grad_norm,
                "anchor": self.anchor, **mean_over_rollouts(columns, N_all)}
        for name, start, end in zip(("sampling", "judging", "update"), clock, clock[1:]):
            line[f"seconds_{name}"] = end - start
        return line

    def update(self, rollouts, A: Tensor, lam: float, N_all: float) -> tuple[float, float]:
        """Take one optimizer step, and return L_RD and the gradient norm of all processes.

        A [N] has the advantages of this process's rollouts; N_all counts those of all processes.
        Terms of weight 0 are left out. Raises FloatingPointError if the gradient is not finite.
        """
        indices = []
        if lam < 1:
            indices = self.share_of_batch(len(self.traces), self.args.traces_per_step, "traces")
        traces = [self.traces[i] for i in indices]
        v = self.v[indices].float()
        tokens = all_sum(self.column([sum(len(x.response) for x in traces)])).clamp(min=1)
        kept = [] if lam == 0 else A.nonzero()[:, 0].tolist()
        rollouts = [rollouts[i] for i in kept]
        A = A[kept].float()
        if not traces and not rollouts:
            traces = [DUMMY]
            v = torch.zeros(1, device=self.device)

        rd_batches = self.pack(traces)
        batches = rd_batches + self.pack(rollouts)
        total_RD = torch.zeros(1, device=self.device)
        for i, batch in enumerate(batches):
            # DDP reads this attribute. It synchronizes gradients in the last backward pass only.
            self.policy.require_backward_grad_sync = i == len(batches) - 1
            with self.autocast():
                # Call the DDP wrapper, since self.policy.module would not synchronize gradients.
                logprobs, mask = self.policy(batch)  # [n, T] each
            # Losses are divided by global counts, so they add up over batches and processes.
            L_RD = torch.zeros(1, device=self.device)
            L_RLIF = torch.zeros(1, device=self.device)
            if i < len(rd_batches):
                mask = v[batch.trace, None] * mask
                L_RD = hytuning.distillation_loss(logprobs, mask, tokens)
            else:
                L_RLIF = hytuning.rlif_loss(logprobs, mask, A[batch.trace], N_all)
            # DDP averages gradients over processes. The factor turns the average into a sum.
            (hytuning.hytuning_loss(L_RD, L_RLIF, lam) * self.world_size).backward()
            total_RD += L_RD.detach()

        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm).item()
        if not math.isfinite(norm):  # the same in all processes
            raise FloatingPointError(f"the gradient of step {self.steps_done + 1} is not finite: "
                                     "lower --lr")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # DDP's gradients are views of its buckets
        return all_sum(total_RD).item(), norm

    def share_of_batch(self, total: int, size: int, stream: str) -> list[int]:
        """Return this process's indices in the step's batch of `size` out of `total` items.

        Each epoch is shuffled again and split into full batches; the remainder is dropped. `stream`
        is part of the seed, so that queries and traces are shuffled independently.
        """
        size = min(size, total)
        if size == 0:
            return []
        epoch, place = divmod(self.steps_done, total // size)
        rng = np.random.default_rng([self.args.seed, epoch, *stream.encode()])
        batch = rng.permutation(total)[place * size:(place + 1) * size]
        return batch[self.rank::self.world_size].tolist()

    def sample(self, prompts, samples: int, seed, temperature: float = 1.0, progress: str = ""):
        """Return N = len(prompts) x samples responses as traces, grouped by prompt, and their
        self-certainty c [N]. `progress` is the title of a progress bar, or "" for none."""
        if self.sampling_model is not self.model:
            with torch.no_grad():
                for copied, p in zip(self.sampling_model.parameters(), self.model.parameters()):
                    copied.copy_(p)
        traces = [None] * (len(prompts) * samples)
        certainty = torch.zeros(len(prompts), samples, dtype=torch.double, device=self.device)
        # Prompts are padded to the longest of a batch, so put those of similar length together.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = max(1, self.args.rollouts_per_batch // samples)
        disable = True if self.rank or not progress else None  # None: shown on a terminal only
        for start in tqdm(range(0, len(order), size), progress, leave=False, disable=disable):
            batch = order[start:start + size]
            groups, means = generate(
                self.sampling_model, [prompts[i] for i in batch], samples_per_prompt=samples,
                max_new_tokens=self.args.max_new_tokens, temperature=temperature, seed=seed,
                eos_ids=self.text.end_ids, statistic=hytuning.self_certainty)
            certainty[batch] = means.double()
            for i, group in zip(batch, groups):
                for j, response in enumerate(group):
                    traces[i * samples + j] = make_trace(self.text, prompts[i], response)
        return traces, certainty.flatten()

    def measure_support(self, judge: Decoder, traces) -> tuple[Tensor, Tensor]:
        """Return the support and its mask, [N, K_max+1] each, of traces under the model `judge`."""
        with self.autocast():
            support, mask = prg.packed_support(judge, traces, self.args.tokens_per_batch,
                                               self.device)
        return support.double(), mask

    def compute_prg(self, traces) -> Tensor:
        """Return the PRG [N] of traces under the frozen starting model."""
        return prg.progressive_reasoning_gain(*self.measure_support(self.judge, traces))

    def pack(self, traces) -> list[prg.Packed]:
        return prg.pack(traces, copies=False, tokens=self.args.tokens_per_batch, device=self.device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16,
                              enabled=self.dtype == torch.bfloat16)

    def column(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.double, device=self.device)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def mean_over_rollouts(columns: dict[str, Tensor], N: float) -> dict[str, float | None]:
    """Return the mean of each column over the N rollouts of all processes, or None if N is 0."""
    sums = all_sum(torch.stack([column.double().sum() for column in columns.values()])).tolist()
    return {name: total / N if N else None for name, total in zip(columns, sums)}


# -----------------------------------------------------------------------------
# evaluation

def answer_held_out(trainer: Trainer, held_out) -> dict[tuple, dict]:
    """Return a dict from each held-out prompt, a tuple of token ids, to the results of the model.

    The processes divide the prompts and exchange the results: the answers of the samples (None if
    there is none), their confidence p_K (0 without an answer) and their PRG, the answer of greedy
    decoding, and of the first sample its text and the support and the text of each step.
    """
    text = trainer.text
    S = trainer.args.eval_samples
    prompts = list(dict.fromkeys(tuple(prompt) for prompt, _, _ in held_out))
    mine = [list(prompt) for prompt in prompts[trainer.rank::trainer.world_size]]
    seed = ("evaluation", trainer.args.seed)
    samples, _ = trainer.sample(mine, S, seed, progress="evaluating")
    greedy, _ = trainer.sample(mine, 1, seed, temperature=0.0, progress="evaluating, greedy")
    support, mask = trainer.measure_support(trainer.model, samples)
    gains = prg.progressive_reasoning_gain(support, mask).tolist()
    confidence = prg.final_support(support, mask).clamp(max=1).tolist()
    found = {}
    for i, prompt in enumerate(mine):
        group = range(i * S, (i + 1) * S)
        first = samples[i * S]
        steps = [text.decode(first.tokens[a:b]) for a, b in zip(first.cuts, first.cuts[1:])]
        found[tuple(prompt)] = {
            "answers": [text.parse([], samples[j].response)[1] for j in group],
            "confidence": [confidence[j] for j in group], "prg": [gains[j] for j in group],
            "greedy": text.parse([], greedy[i].response)[1], "text": text.decode(first.response),
            "curve": list(zip(support[i * S].tolist(), ["(before any step)", *steps]))}
    if trainer.world_size > 1:
        parts = [None] * trainer.world_size
        dist.all_gather_object(parts, found)
        for part in parts:
            found.update(part)
    return found


def evaluate(held_out, found: dict[tuple, dict]) -> dict:
    """Return the measures of a model for eval.json. A query that is listed twice counts twice."""
    samples = []  # (confidence, whether right) of every sample
    votes = []  # the same for the majority answer to every query
    greedy = []
    answers = []
    gains = []
    wins = []  # for each right and wrong sample of a query: whether the right one has more PRG
    for prompt, _, gold in held_out:
        entry = found[tuple(prompt)]
        right = [is_right(answer, gold) for answer in entry["answers"]]
        samples += zip(entry["confidence"], right)
        winner, share = data.majority(entry["answers"])
        votes.append((share, is_right(winner, gold)))
        greedy.append(is_right(entry["greedy"], gold))
        answers += entry["answers"]
        gains += entry["prg"]
        gains_right = []
        gains_wrong = []
        for answer, gain, correct in zip(entry["answers"], entry["prg"], right):
            if correct:
                gains_right.append(gain)
            elif answer is not None:
                gains_wrong.append(gain)
        wins += [(a > b) + (a == b) / 2 for a in gains_right for b in gains_wrong]
    return {"sample": measure_confidence(samples), "vote": measure_confidence(votes),
            "greedy_accuracy": sum(greedy) / len(greedy),
            "answered": 1 - answers.count(None) / len(answers),
            "prg": sum(gains) / len(gains),
            "prg_wins": sum(wins) / len(wins) if wins else None, "n": len(held_out),
            "reliability": prg.reliability(*zip(*samples))}


def is_right(answer: str | None, gold: str) -> bool:
    return answer is not None and data.answers_match(answer, gold)


def measure_confidence(pairs) -> dict:
    """Return measures of (confidence, whether right) pairs, with None for undefined ones."""
    confidence, correct = torch.tensor(pairs, dtype=torch.double).T
    measures = {
        "accuracy": correct.mean().item(), "confidence": confidence.mean().item(),
        "confidence_when_wrong": confidence[correct == 0].mean().item(),
        "ece": prg.expected_calibration_error(confidence, correct),
        "brier": prg.brier_score(confidence, correct), "auroc": prg.auroc(confidence, correct)}
    return {name: None if math.isnan(value) else value for name, value in measures.items()}


def print_results(results: dict):
    """Print the measures of each model, and the reliability diagrams of their samples."""
    print("\nsample: one response; its confidence p_K is the probability that the evaluated model\n"
          "        gives to its answer after its reasoning\n"
          "vote:   the most common answer; its confidence is its share of the samples")
    print(f"\n{'':22}" + "".join(f"{name:>16}" for name in results))
    print(f"{'':22}" + f"{'sample':>9}{'vote':>7}" * len(results))
    last = list(results.values())[-1]
    for measure in last["sample"]:
        row = f"{measure:22}"
        for result in results.values():
            row += f"{show(result['sample'][measure]):>9}{show(result['vote'][measure]):>7}"
        print(row)
    for measure in ("greedy_accuracy", "answered", "prg", "prg_wins"):
        print(f"{measure:22}" + "".join(f"{show(r[measure]):>9}{'':7}" for r in results.values()))
    if last["answered"] == 0:
        print("\nwarning: no response has a readable answer, so confidence means nothing: raise "
              "--max_new_tokens, or train with --method rd first")
    for name, result in results.items():
        print(f"\n{name}: confidence (|) and accuracy (#) of the samples in each bin of confidence")
        for confidence, accuracy, number in result["reliability"]:
            bar = list(f"{'#' * round(40 * accuracy):41}")
            bar[round(40 * confidence)] = "|"
            print(f"  {confidence:4.2f}  {''.join(bar)}  {accuracy:4.2f} of {number}")


def show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def print_examples(held_out, found: dict[tuple, dict], number: int, anchor: float | None):
    """Print held-out queries with the support after each step of their first sample. The first
    query is one whose majority answer is wrong, if there is one."""
    def majority_is_right(query):
        prompt, _, gold = query
        winner, _ = data.majority(found[tuple(prompt)]["answers"])
        return is_right(winner, gold)

    wrong = [query for query in held_out if not majority_is_right(query)][:1]
    others = [query for query in held_out if query not in wrong]
    for prompt, question, gold in (wrong + others)[:number]:
        entry = found[tuple(prompt)]
        S = len(entry["answers"])
        print(f"\n{question}\n  sample 1 of {S}, with the support of its answer under this model:")
        if entry["answers"][0] is None:
            print(f"  {entry['text']}\n  (no answer: this response is cut off or has no marker)")
        else:
            for p, step in entry["curve"]:
                print(f"  p = {p:4.2f} {'#' * round(20 * p):20s} {' '.join(step.split())}")
            verdict = "right" if is_right(entry["answers"][0], gold) else "wrong"
            print(f"  answer: {entry['answers'][0]} ({verdict}); PRG {show(entry['prg'][0])} "
                  f"(anchor under the starting model: {show(anchor)})")
        winner, share = data.majority(entry["answers"])
        print(f"  majority: {winner} ({round(share * S)} of {S} samples); right answer: {gold}")


# -----------------------------------------------------------------------------
# checkpoints

def atomic_write(path: Path, write):
    """Call write(temporary path), then rename the result to `path`.

    If anything fails, an older file at `path` is left as it was and the temporary file is removed.
    Raises OSError if the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError from torch.save
        raise OSError(f"{path} cannot be written ({error}): check the folder's "
                      "permissions and the space on the disk") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(trainer: Trainer, base: dict | None):
    """On rank 0, write checkpoint.pt, which has everything that a resumed run needs."""
    path = Path(trainer.args.out, "checkpoint.pt")
    if trainer.rank == 0:
        state = {"model": trainer.model.state_dict(),
                 "moments": trainer.optimizer.state_dict()["state"],
                 "steps_done": trainer.steps_done, "base": base, "args": vars(trainer.args),
                 "checksums": trainer.checksums}
        atomic_write(path, lambda temporary: torch.save(state, temporary))
    barrier()


def load_checkpoint(trainer: Trainer) -> dict | None:
    """Restore the checkpoint in --out, if there is one, and return the base model's evaluation.
    Raises UsageError if the checkpoint is damaged or was made with other settings or data."""
    path = Path(trainer.args.out, "checkpoint.pt")
    found = all_sum(torch.tensor(float(path.is_file()), device=trainer.device)).item()
    if found == 0:
        say(f"there is no checkpoint in {trainer.args.out}: the run starts from the beginning")
        return None
    if found < trainer.world_size:
        raise UsageError(f"{path} is not visible from every machine: use an --out on a shared disk")
    try:
        # With mmap, the processes of a machine share one copy in memory.
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch.load raises errors of many types for a damaged file
        reason = str(error).split("\n")[0]
        raise UsageError(f"{path} cannot be read ({reason}): remove it, or use another "
                         "--out") from None
    for name, now in vars(trainer.args).items():
        before = state["args"].get(name)
        if before != now and name not in MAY_CHANGE:
            raise UsageError(f"{path} was made with --{name} {before}, not {now}: use the same "
                             "value, or another --out")
    for name, checksum in trainer.checksums.items():
        if state["checksums"][name] != checksum:
            raise UsageError(f"{name} has changed since {path} was made: restore it, or use "
                             "another --out")
    trainer.model.load_state_dict(state["model"])
    groups = trainer.optimizer.state_dict()["param_groups"]  # keeps this optimizer's flags
    trainer.optimizer.load_state_dict({"state": state["moments"], "param_groups": groups})
    trainer.steps_done = state["steps_done"]
    say(f"resuming after step {trainer.steps_done} of {trainer.args.steps}")
    return state["base"]


def compute_checksums(args) -> dict[str, str]:
    """Return the checksum of each data file that the run reads."""
    paths = [getattr(args, name) for name in (*files_needed(args), "eval")]
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths if path}


# -----------------------------------------------------------------------------
# the toy

def build_folder(folder: Path, build, rank: int):
    """On rank 0, build `folder` under a temporary name and rename it, unless it exists already."""
    if rank == 0 and not folder.exists():
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        try:
            build(temporary)
            os.replace(temporary, folder)
        except OSError:
            if not folder.exists():  # otherwise another process has built it
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    barrier()


def train_toy_base(folder: Path, device: torch.device):
    """Train the base model of the toy task on careless traces, and save it to `folder`."""
    toy = data.Triage()
    folder.mkdir(parents=True)
    vocab_size, end = toy.write_tokenizer(folder)
    torch.manual_seed(0)
    model = Decoder(Config(
        vocab_size, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.1, rope_parameters={"rope_type": "default", "rope_theta": 100.0}))
    model.eos_ids = (end,)
    policy = Policy(model.to(device))
    text = data.Text(folder, [end])
    rng = np.random.default_rng(1)
    steps = 180
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps, pct_start=0.1)
    for _ in tqdm(range(steps), "training the toy's base model", leave=False, disable=None):
        traces = []
        for _ in range(64):
            record = toy.record(rng, careless=True)
            prompt = text.encode_prompt(record["prompt"])
            response = text.encode_response(record["reasoning"], record["answer"])
            traces.append(make_trace(text, prompt, response))
        batch, = prg.pack(traces, copies=False, tokens=2**20, device=device)
        logprobs, mask = policy(batch)
        hytuning.distillation_loss(logprobs, mask, mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    save_pretrained(model, folder)


def set_up_toy(args, rank: int, device: torch.device):
    """Build the toy's base model and data if they do not exist, and set the arguments to use them.
    The data depends on the seed of the run; the base model is the same for all seeds."""
    # More threads would make so small a model slower, especially on a busy machine.
    torch.set_num_threads(1)
    base = Path("out/toy")
    build_folder(base, partial(train_toy_base, device=device), rank)
    records = base / f"data-{args.seed}"
    build_folder(records, partial(data.Triage().write_records, seed=args.seed), rank)
    args.model = str(base)
    args.labeled = str(records / "labeled.jsonl")
    args.unlabeled = str(records / "unlabeled.jsonl")
    args.eval = str(records / "eval.jsonl")


# -----------------------------------------------------------------------------
# the run

def main(argv=None) -> bool:
    """Do a whole run: evaluate, train, save and evaluate again. argv defaults to the command line.

    Return False if SIGINT or SIGTERM has stopped the training after a step, and True otherwise.
    Raises UsageError, DataError, CheckpointError, OSError or FloatingPointError.
    """
    args = parse_arguments(argv)
    rank, world_size, device = set_up_processes(args)
    if not args.model:
        set_up_toy(args, rank, device)
    out = Path(args.out)
    if not args.eval_only and Path(args.model).resolve() == (out / "model").resolve():
        raise UsageError(f"--model {args.model} would be overwritten: use another --out")
    model, text = load_model(args, device)
    traces, queries, held_out = load_data(args, text, model.config.context)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be created ({error.strerror}): give another "
                         "folder") from None
    trainer = Trainer(args, model, text, traces, queries, rank, world_size)
    results = {}
    finished = True
    if not args.eval_only:
        base = load_checkpoint(trainer) if args.resume else None
        log = open_log(out, trainer.steps_done) if rank == 0 else None
        if held_out and base is None:
            base = evaluate(held_out, answer_held_out(trainer, held_out))
        results["base"] = base
        finished = train(trainer, base, log)
        if rank == 0:
            save_pretrained(model, out / "model", args.model)
            say(f"the model is in {out / 'model'}, the log in {out / 'metrics.jsonl'}")
        if not finished:
            say(f"stopped after step {trainer.steps_done}: add --resume to the command to continue")
    if finished and held_out:
        found = answer_held_out(trainer, held_out)
        results["model" if args.eval_only else "final"] = evaluate(held_out, found)
        if rank == 0:
            name = "eval_only.json" if args.eval_only else "eval.json"
            atomic_write(out / name, lambda path: path.write_text(json.dumps(results, indent=2)))
            print_results(results)
            print_examples(held_out, found, args.show, trainer.anchor)
            say(f"\nthe results are in {out / name}")
    if dist.is_initialized():
        # Wait until rank 0 has written its files. The pause lets gloo's threads release their
        # tensors: a thread that waits for the GIL while Python shuts down aborts the process
        # (pytorch issue 190489).
        barrier()
        time.sleep(0.2)
        dist.destroy_process_group()
    return finished


def train(trainer: Trainer, base: dict | None, log) -> bool:
    """Take the remaining steps, log them and save; return False if a signal stopped the run."""
    args = trainer.args
    if args.method == "hytuning" and trainer.anchor < 0.05:
        say(f"warning: under {args.model} the mean PRG of the supervised traces is only "
            f"{trainer.anchor:.3f}: if the model has not learned the answer format, train it with "
            "--method rd first; if it has learned these traces by heart, use other traces")
    stopping = False
    bar = tqdm(total=args.steps, initial=trainer.steps_done, desc=args.method,
               disable=trainer.rank > 0 or None)  # None: shown on a terminal only
    with note_signals() as signals, bar:
        while trainer.steps_done < args.steps and not stopping:
            line = trainer.step()
            if log is not None:
                log.write(json.dumps(line) + "\n")
                log.flush()
            bar.update()
            # A signal may have reached only some of the processes.
            stopping = all_sum(torch.tensor(len(signals), device=trainer.device)).item() > 0
            step = trainer.steps_done
            if stopping or step % args.save_every == 0 or step == args.steps:
                save_checkpoint(trainer, base)
                say(f"step {step} of {args.steps} saved: lambda {line['lambda']:.2f}, PRG of "
                    f"rollouts {show(line['prg_rollouts'])}, anchor {show(line['anchor'])}")
                if line["answered"] == 0:
                    say("warning: no rollout ends with a readable answer: raise --max_new_tokens, "
                        "or teach the format with --method rd first; if there were answers before, "
                        "lower --lr")
    return not stopping


def open_log(out: Path, steps_done: int):
    """Open metrics.jsonl for appending, and keep only the lines of the first `steps_done` steps.

    A new run also removes the checkpoint and the evaluation of an earlier run in its folder.
    """
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if not steps_done:
        if path.exists():
            say(f"the earlier run in {out} is replaced")
        (out / "checkpoint.pt").unlink(missing_ok=True)
        (out / "eval.json").unlink(missing_ok=True)
    kept = "".join(lines[:steps_done])
    atomic_write(path, lambda temporary: temporary.write_text(kept))
    return open(path, "a")


@contextlib.contextmanager
def note_signals():
    """Collect SIGINT and SIGTERM in a list, so that the current step can be finished and saved.
    A second signal of the same kind has its usual effect."""
    received = []
    handlers = {}

    def note(number, frame):
        received.append(number)
        signal.signal(number, handlers[number])

    try:
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, note)
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        # Escape the characters that the encoding of the terminal does not have.
        stream.reconfigure(errors="backslashreplace")
    try:
        finished = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        finished = False
    except (CheckpointError, data.DataError, UsageError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if not finished:
        sys.exit(130)  # so that a shell script stops, too
