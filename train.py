"""Train a model with HyTuning. The method itself is in `Trainer.step`.

    python train.py                                     # the toy task, about 90 seconds
    python train.py --model FOLDER --labeled a.jsonl --unlabeled b.jsonl --eval c.jsonl
    torchrun --nproc_per_node=8 train.py --model ...    # the same on eight GPUs

Before training, the PRG of each supervised trace is computed under the starting model. The mean
PRG is the anchor a, and the PRG of a trace sets its weight v. `Trainer.step` then has four numbered
steps. Read hytuning.py and prg.py before it, and data.py and model.py after it.

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
import time
from datetime import datetime, timedelta
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

# The training files of each method.
BOTH = ("labeled", "unlabeled")
METHODS = {"rd": ("labeled",), "rlif": ("unlabeled",), "static": BOTH, "votes": BOTH,
           "hytuning": BOTH}

# Options that may change when a run is resumed.
MAY_CHANGE = ("steps", "out", "resume", "save_every", "show", "device", "tokens_per_batch")

# Defaults that depend on the task or the device.
TOY = dict(max_labeled=16, max_prompt_tokens=64, max_new_tokens=48, lr=4e-4, tokens_per_batch=4096)
REAL = dict(max_labeled=0, max_prompt_tokens=512, max_new_tokens=512, lr=2e-6)
GPU = dict(tokens_per_batch=16384, dtype="bfloat16")
CPU = dict(tokens_per_batch=1024, dtype="float32")


def positive(text: str) -> int:
    """Return a positive number, or raise the error that argparse turns into a message."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python train.py [options]", allow_abbrev=False,
        description="Train with HyTuning. Without --model, run the toy task. See README.md. "
                    "Defaults are in parentheses.")

    path = os.path.expanduser
    add = parser.add_argument_group("model and data").add_argument
    add("--model", type=path, help="folder of a Hugging Face checkpoint (the toy task)")
    add("--labeled", type=path, help='JSONL file of {"prompt", "reasoning", "answer"}, or GSM8K')
    add("--unlabeled", type=path, help='JSONL file of {"prompt"}; answers are ignored')
    add("--eval", type=path, help='JSONL file of held-out {"prompt", "answer"}')
    add("--max_labeled", type=int, help="traces to read; 0 means all (0; toy: 16)")
    add("--max_eval", type=int, default=0, help="--eval records to read; 0 means all (0)")
    add("--max_prompt_tokens", type=int, help="skip longer prompts (512; toy: 64)")
    add("--max_new_tokens", type=int, help="skip or cut longer responses (512; toy: 48)")
    add("--marker", default=data.MARKER, help="text before the answer (%(default)s)")

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="hytuning",
        help="rd: supervised traces only; rlif: self-certainty only; static: half rd, half rlif; "
             "votes: rd and rlif mixed by lambda, self-certainty pooled by answer; hytuning: votes "
             "weighted by PRG (%(default)s)")
    add("--queries_per_step", type=positive, default=16,
        help="queries of a step, and also traces of a step, for all processes (%(default)s)")
    add("--group_size", type=positive, default=8, help="G, rollouts per query (%(default)s)")

    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=positive, default=100, help="training steps (%(default)s)")
    add("--lr", type=float, help="learning rate of AdamW (2e-6; toy: 4e-4)")
    add("--seed", type=int, default=0, help="random seed, 0 or more (%(default)s)")

    add = parser.add_argument_group("run").add_argument
    add("--out", type=path, default="out/run", help="folder for all results (%(default)s)")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--eval_only", action="store_true", help="evaluate --model without training")
    add("--eval_samples", type=positive, default=8, help="samples per query (%(default)s)")
    add("--save_every", type=positive, default=20, help="steps between saves (%(default)s)")
    add("--show", type=int, default=3, help="examples to print at the end (%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda: one GPU for each process (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), help="of a forward pass (bfloat16 on a GPU)")
    add("--tokens_per_batch", type=int,
        help="tokens of a forward pass, with padding (GPU: 16384; CPU: 1024; toy: 4096)")

    args = parser.parse_args(argv)
    if args.group_size == 1 and args.method != "rd":
        parser.error("--group_size 1 has no other rollout to compare with: give at least 2")
    if not args.model and (args.eval_only or args.labeled or args.unlabeled or args.eval):
        parser.error("--model is missing: give the folder of a checkpoint")
    for name in files_needed(args):
        if args.model and not getattr(args, name):
            parser.error(f"--{name} is missing: give a JSONL file")
    for defaults in (REAL if args.model else TOY, CPU if args.device == "cpu" else GPU):
        for name, value in defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    return args


def files_needed(args) -> tuple[str, ...]:
    return ("eval",) if args.eval_only else METHODS[args.method]


def check_out(args):
    """Raise UsageError if training would replace one of its inputs, or files that no run wrote."""
    out = Path(args.out).resolve()
    for path in (args.model, args.labeled, args.unlabeled, args.eval):
        if path and Path(path).resolve().is_relative_to(out):
            raise UsageError(f"{path} lies in --out, where a run replaces files: use another --out")
    for name in ("model", "checkpoint.pt", "eval.json"):
        if (out / name).exists() and not (out / "metrics.jsonl").exists():  # every run writes it
            raise UsageError(f"{out / name} would be replaced, but is not from a run: use another "
                             "--out")


# -----------------------------------------------------------------------------
# processes

def set_up_processes(args) -> tuple[int, int, torch.device]:
    """Return (rank, world size, device) of this process, from the variables that torchrun sets."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        if args.dtype == "bfloat16":
            torch.set_float32_matmul_precision("high")  # use TF32 for float32 matmuls
        # With a mask, cuDNN attention returns NaN gradients at some lengths on Hopper GPUs
        # (pytorch issue 196678). It also builds a new plan for every shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world_size > 1:
        # The other processes wait while rank 0 writes a checkpoint, so the timeout is long.
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo",
                                device_id=device if args.device == "cuda" else None,
                                timeout=timedelta(minutes=30))
    return rank, world_size, device


def all_sum(x: Tensor) -> Tensor:
    """Sum x over all processes in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def from_rank_0(value):
    """Return the value that rank 0 has, in all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def say(text: str):
    """Print a text, if it is not empty, on rank 0 without breaking a progress bar."""
    if not text or (dist.is_initialized() and dist.get_rank() > 0):
        return
    try:
        tqdm.write(text)
    except BrokenPipeError:  # nobody reads the output any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# -----------------------------------------------------------------------------
# model and data

def load_model(args, device, date: datetime) -> tuple[Decoder, data.Text]:
    model = load_pretrained(args.model, device)
    text = data.Text(args.model, model.eos_ids, args.marker, date)
    if text.chat is None:
        say(f"{args.model} has no chat template: prompts are plain text")
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
    limit = args.max_prompt_tokens
    longest = limit + args.max_new_tokens
    if longest > context:
        raise UsageError(f"--max_prompt_tokens {limit} and --max_new_tokens {args.max_new_tokens} "
                         f"add up to {longest}, but {args.model} supports {context}: lower them")
    traces = []
    queries = []
    held_out = []
    if "labeled" in files_needed(args):
        pairs, note = data.load_labeled(args.labeled, text, limit, args.max_new_tokens,
                                        args.max_labeled)
        traces = [read_response(text, prompt, response)[0] for prompt, response in pairs]
        say(note)
    if "unlabeled" in files_needed(args):
        queries, note = data.load_unlabeled(args.unlabeled, text, limit)
        say(note)
    if args.eval:
        held_out, note = data.load_eval(args.eval, text, limit, args.max_eval)
        say(note)
    # Prompts are padded to the longest of a batch, so put those of similar length together.
    held_out.sort(key=lambda query: len(query[0]))
    return traces, queries, held_out


def read_response(text: data.Text, prompt: list[int], response: list[int]):
    """Return the trace of a response, and its answer or None."""
    fields, answer = text.parse(prompt, response)
    return prg.Trace(*fields), answer


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

        self.model = model
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
            PRG = self.compute_prg(self.traces)  # [n]
            self.anchor = PRG.mean().item()
            self.v = hytuning.trace_weights(args.method, PRG, self.anchor)

    def step(self) -> dict:
        """Take one training step, and return its line for metrics.jsonl.

        This process samples N rollouts, G consecutive ones for each of its queries.
        """
        args = self.args
        # Each part ends by reading a value from the device, so the clock needs no synchronization.
        clock = [time.perf_counter()]

        # 1. Sample a group of G rollouts for each query, and compute their self-certainty c.
        indices = self.draw_batch(len(self.queries), "queries")
        queries = [self.queries[i] for i in indices]
        seed = ("rollouts", args.seed, self.steps_done)
        rollouts, answers, c = self.sample(queries, args.group_size, seed)  # [N] each
        clock.append(time.perf_counter())

        # 2. Compute the PRG of each rollout under the frozen starting model.
        PRG = self.compute_prg(rollouts)  # [N]

        # 3. Compute w, r, e, A and lambda. To try another reward, change `learning_signals`.
        answers = self.column(data.number_answers(answers, args.group_size))  # [N], -1 for none
        A, e = hytuning.learning_signals(args.method, c, PRG, answers, args.group_size,
                                         self.anchor)  # [N] each
        earned, N_all = all_sum(self.column([e.sum(), len(e)])).tolist()  # over all processes
        lam = earned / max(N_all, 1)
        A = hytuning.weigh_queries(A, e, lam, args.group_size)
        clock.append(time.perf_counter())

        # 4. Take one optimizer step on (1 - lambda) L_RD + lambda L_RLIF.
        L_RD, grad_norm = self.update(rollouts, A, lam, N_all)
        clock.append(time.perf_counter())
        self.steps_done += 1

        answered = answers >= 0
        lengths = self.column([len(x.response) for x in rollouts])
        return {"step": self.steps_done, "lambda": lam, "loss_rd": L_RD, "grad_norm": grad_norm,
                "anchor": self.anchor, "prg_rollouts": self.global_mean(PRG[answered]),
                "self_certainty": self.global_mean(c), "answered": self.global_mean(answered),
                "response_length": self.global_mean(lengths),
                "seconds_sampling": clock[1] - clock[0], "seconds_judging": clock[2] - clock[1],
                "seconds_update": clock[3] - clock[2]}

    def update(self, rollouts, A: Tensor, lam: float, N_all: float) -> tuple[float, float]:
        """Take one optimizer step, and return L_RD and the gradient norm of all processes.

        A [N] has the advantages of this process's rollouts; N_all counts those of all processes.
        Terms of weight 0 are left out. Raises FloatingPointError if the gradient is not finite.
        """
        indices = []
        if lam < 1:
            indices = self.draw_batch(len(self.traces), "traces")
        traces = [self.traces[i] for i in indices]
        v = self.v[indices].float()
        tokens = all_sum(self.column([sum(len(x.response) for x in traces)])).clamp(min=1)
        kept = [] if lam == 0 else A.nonzero()[:, 0].tolist()
        rollouts = [rollouts[i] for i in kept]
        A = A[kept].float()
        if not traces and not rollouts:
            # DDP needs a backward pass in each process, so run any trace with weight 0.
            traces = [prg.Trace(tokens=[0, 0], cuts=[1], answer_start=1)]
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
            L_RD = 0
            L_RLIF = 0
            if i < len(rd_batches):
                weights = v[batch.trace, None] * mask
                L_RD = hytuning.distillation_loss(logprobs, weights, tokens)
                total_RD += L_RD.detach()
            else:
                L_RLIF = hytuning.rlif_loss(logprobs, mask, A[batch.trace], N_all)
            # DDP averages gradients over processes. The factor turns the average into a sum.
            (hytuning.hytuning_loss(L_RD, L_RLIF, lam) * self.world_size).backward()

        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        if not math.isfinite(norm):  # the same in all processes
            raise FloatingPointError(f"the gradient of step {self.steps_done + 1} is not finite: "
                                     "lower --lr")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # DDP's gradients are views of its buckets
        return all_sum(total_RD).item(), norm

    def restore(self, state: dict):
        """Continue from the content of a checkpoint."""
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]  # its settings stay those of this run
        self.optimizer.load_state_dict({"state": state["moments"], "param_groups": groups})
        self.steps_done = len(state["log"])

    def draw_batch(self, total: int, stream: str) -> list[int]:
        """Return this process's indices in the step's batch of --queries_per_step of `total` items.

        Each epoch is shuffled again and split into full batches; the remainder is dropped. `stream`
        is part of the seed, so that queries and traces are shuffled independently.
        """
        size = min(self.args.queries_per_step, total)
        if size == 0:
            return []
        epoch, place = divmod(self.steps_done, total // size)
        rng = np.random.default_rng([self.args.seed, epoch, *stream.encode()])
        batch = rng.permutation(total)[place * size:(place + 1) * size]
        return batch[self.rank::self.world_size].tolist()

    def sample(self, prompts, samples: int, seed):
        """Return N = len(prompts) x samples responses as traces, grouped by prompt, their answers
        (None if there is none) and their self-certainty c [N]."""
        if self.sampling_model is not self.model:
            self.sampling_model.load_state_dict(self.model.state_dict())
        found = []
        certainty = [self.column([])]
        # A token in the sampler's cache takes far less memory than one in a training pass.
        longest = self.args.max_prompt_tokens + self.args.max_new_tokens
        size = max(1, 32 * self.args.tokens_per_batch // (longest * samples))
        for start in tqdm(range(0, len(prompts), size), "sampling", leave=False, delay=5,
                          disable=self.rank > 0 or None):  # None: shown on a terminal only
            batch = prompts[start:start + size]
            groups, means = generate(
                self.sampling_model, batch, samples_per_prompt=samples,
                max_new_tokens=self.args.max_new_tokens, seed=seed, eos_ids=self.text.end_ids,
                statistic=hytuning.self_certainty)
            certainty.append(means.double().flatten())
            for prompt, group in zip(batch, groups):
                found += [read_response(self.text, prompt, response) for response in group]
        traces = [trace for trace, _ in found]
        answers = [answer for _, answer in found]
        return traces, answers, torch.cat(certainty)

    def measure_support(self, model: Decoder, traces) -> tuple[Tensor, Tensor]:
        """Return the support and its mask, [N, K_max+1] each, of traces under a model."""
        with self.autocast():
            support, mask = prg.packed_support(model, traces, self.args.tokens_per_batch)
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

    def global_mean(self, x: Tensor) -> float | None:
        """Return the mean of the values x of all processes, or None if there are none."""
        total, number = all_sum(self.column([x.sum(), len(x)])).tolist()
        return total / number if number else None


# -----------------------------------------------------------------------------
# evaluation

def answer_held_out(trainer: Trainer, held_out) -> list[dict]:
    """Sample --eval_samples responses to each held-out query, and return a dictionary for each:
    the question, the gold answer, the samples, and the vote, which is the most common answer.

    A sample has its answer (or None), whether it is right, its confidence p_K, its PRG, its trace
    and its support. The confidence of a vote is its share of the samples. The processes divide the
    queries and exchange the results.
    """
    args = trainer.args
    S = args.eval_samples
    mine = held_out[trainer.rank::trainer.world_size]
    prompts = [prompt for prompt, _, _ in mine]
    traces, answers, _ = trainer.sample(prompts, S, ("evaluation", args.seed))
    support, mask = trainer.measure_support(trainer.model, traces)
    confidence = prg.final_support(support, mask).clamp(max=1).tolist()
    PRG = prg.progressive_reasoning_gain(support, mask).tolist()
    found = []
    for i, (_, question, gold) in enumerate(mine):
        samples = []
        for j in range(i * S, (i + 1) * S):
            samples.append({"answer": answers[j], "confidence": confidence[j], "prg": PRG[j],
                            "trace": traces[j], "support": support[j].tolist()})
        winner, fraction = data.majority(answers[i * S:(i + 1) * S])
        vote = {"answer": winner, "confidence": fraction}
        for x in (*samples, vote):
            x["right"] = x["answer"] is not None and data.answers_match(x["answer"], gold)
        found.append({"question": question, "gold": gold, "samples": samples, "vote": vote})
    if trainer.world_size > 1:
        parts = [None] * trainer.world_size
        dist.all_gather_object(parts, found)
        found = sum(parts, [])
    return found


def evaluate(found: list[dict]) -> dict:
    """Return the measures of a model for eval.json, from the result of `answer_held_out`."""
    samples = []
    wins = []  # for each right and wrong sample of a query: whether the right one has more PRG
    for query in found:
        samples += query["samples"]
        right = [x["prg"] for x in query["samples"] if x["right"]]
        wrong = [x["prg"] for x in query["samples"] if x["answer"] is not None and not x["right"]]
        wins += [(a > b) + (a == b) / 2 for a in right for b in wrong]
    answered = [x for x in samples if x["answer"] is not None]
    return {"sample": measure_confidence(samples, len(found)),
            "vote": measure_confidence([query["vote"] for query in found], len(found)),
            "queries": len(found), "samples": len(samples),
            "answered": len(answered) / len(samples),
            "prg": sum(x["prg"] for x in answered) / len(answered) if answered else None,
            "prg_wins": sum(wins) / len(wins) if wins else None, "prg_pairs": len(wins)}


def measure_confidence(items: list[dict], queries: int) -> dict:
    """Return measures of samples or votes, which list the queries one after the other.

    A missing answer counts as wrong in the accuracy; the measures of confidence leave it out. The
    standard error takes the queries as independent, but not the samples of a query. A measure that
    is undefined is None.
    """
    right = torch.tensor([x["right"] for x in items], dtype=torch.double)
    variance = right.view(queries, -1).mean(1).var(correction=0)  # of the accuracy on a query
    answered = [x for x in items if x["answer"] is not None]
    confidence = torch.tensor([x["confidence"] for x in answered], dtype=torch.double)
    correct = torch.tensor([x["right"] for x in answered], dtype=torch.double)
    measures = {
        "accuracy": right.mean().item(),
        "standard_error": (variance / (queries - 1)).sqrt().item(),
        "confidence": confidence.mean().item(),
        "confidence_when_wrong": confidence[correct == 0].mean().item(),
        "ece": prg.expected_calibration_error(confidence, correct),
        "brier": prg.brier_score(confidence, correct), "auroc": prg.auroc(confidence, correct)}
    return {name: None if math.isnan(value) else value for name, value in measures.items()}


def print_results(results: dict):
    """Print a table of the measures of each model."""
    last = list(results.values())[-1]
    say(f"\n{last['samples']} samples of {last['queries']} queries. A vote is the most common\n"
        "answer to a query, and its confidence is its share of the samples. A sample without an\n"
        "answer counts in the accuracy only.\n")
    say(f"{'':22}" + "".join(f"{name:>16}" for name in results))
    say(f"{'':22}" + f"{'sample':>9}{'vote':>7}" * len(results))
    for measure in last["sample"]:
        row = f"{measure:22}"
        for result in results.values():
            row += f"{show(result['sample'][measure]):>9}{show(result['vote'][measure]):>7}"
        say(row)
    for measure in ("answered", "prg", "prg_wins", "prg_pairs"):
        say(f"{measure:22}" + "".join(f"{show(r[measure]):>9}{'':7}" for r in results.values()))


def show(value: float | int | None) -> str:
    if isinstance(value, float):
        return f"{round(value, 3) + 0.0:.3f}"  # + 0.0 turns -0.0 into 0.0
    return str(value)


def print_examples(text: data.Text, found: list[dict]):
    """Print held-out queries with the support after each step of their first sample."""
    for query in found:
        sample = query["samples"][0]
        trace = sample["trace"]
        say(f"\n{query['question']}")
        if sample["answer"] is None:
            ended = trace.tokens[-1] in text.end_ids
            reason = "none behind a marker" if ended else "cut off at --max_new_tokens"
            say(f"  {text.decode(trace.response)}\n  (no answer: {reason})")
        else:
            steps = [text.decode(trace.tokens[a:b]) for a, b in zip(trace.cuts, trace.cuts[1:])]
            for p, step in zip(sample["support"], ["(before any step)", *steps]):
                say(f"  p = {p:4.2f} {'#' * round(20 * p):20s} {' '.join(step.split())}")
            say(f"  answer: {sample['answer']}; PRG {show(sample['prg'])}")
        vote = query["vote"]
        say(f"  most common answer: {vote['answer']} ({vote['confidence']:.0%} of the samples); "
            f"right answer: {query['gold']}")


# -----------------------------------------------------------------------------
# checkpoints

def describe_run(args) -> dict:
    """Return what a checkpoint has besides tensors: the settings, which must not change when the
    run is resumed, the date that templates print, the evaluation of the starting model, and the
    lines of metrics.jsonl, one for each step."""
    settings = {f"--{name}": x for name, x in vars(args).items() if name not in MAY_CHANGE}
    paths = []
    if not args.eval_only:  # an evaluation is not resumed, so it need not read the model twice
        paths += [args.labeled, args.unlabeled, args.eval]
        for pattern in ("*.json", "*.jinja", "*.safetensors"):
            paths += Path(args.model).glob(pattern)
    for path in paths:
        if path and Path(path).is_file():  # a missing file is named when it is read
            with open(path, "rb") as file:
                settings[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return {"settings": settings, "date": datetime.now().isoformat(), "base": None, "log": []}


def save(trainer: Trainer, run: dict):
    """Write model/ and checkpoint.pt, from which a run is resumed, in place of an earlier run."""
    out = Path(trainer.args.out)
    state = {**run, "model": trainer.model.state_dict(),
             "moments": trainer.optimizer.state_dict()["state"]}
    torch.save(state, out / "checkpoint.pt.tmp")
    (out / "eval.json").unlink(missing_ok=True)
    shutil.rmtree(out / "model", ignore_errors=True)
    save_pretrained(trainer.model, out / "model", trainer.args.model)
    # Before this line, a crash leaves the earlier checkpoint.
    os.replace(out / "checkpoint.pt.tmp", out / "checkpoint.pt")


def read_checkpoint(args, run: dict) -> dict:
    """Return the content of the checkpoint in --out, or `run` if there is none. Raises UsageError
    if it was made with other settings or other files."""
    path = Path(args.out, "checkpoint.pt")
    if not from_rank_0(path.is_file()):
        say(f"there is no checkpoint in {args.out}: the run starts from the beginning")
        return run
    # With mmap, the processes of a machine share one copy in memory.
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    for name in sorted(run["settings"] | state["settings"]):
        before = state["settings"].get(name)
        now = run["settings"].get(name)
        if before != now:
            raise UsageError(f"{path} was made with another {name} ({before}, not {now}): use the "
                             "same, or another --out")
    say(f"resuming after step {len(state['log'])}")
    return state


# -----------------------------------------------------------------------------
# the toy

def train_toy_base(folder: Path, device: torch.device):
    """Train the base model of the toy task on careless traces, and save it to `folder`."""
    toy = data.Triage()
    folder.mkdir(parents=True, exist_ok=True)
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
            traces.append(read_response(text, prompt, response)[0])
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
    records = base / f"data-{args.seed}"
    if rank == 0 and not (base / "model.safetensors").exists():
        train_toy_base(base, device)
    if rank == 0 and not (records / "eval.jsonl").exists():
        data.Triage().write_records(records, args.seed)
    if dist.is_initialized():
        dist.barrier()
    say(f"the toy is in {base}: remove it to build it anew")
    args.model = str(base)
    for name in ("labeled", "unlabeled", "eval"):
        setattr(args, name, str(records / f"{name}.jsonl"))


# -----------------------------------------------------------------------------
# the run

def main(argv=None) -> bool:
    """Do a whole run: evaluate, train, save and evaluate again. argv defaults to the command line.

    Return False if SIGINT or SIGTERM has stopped the training, and True otherwise. Raises
    UsageError, DataError, CheckpointError, OSError or FloatingPointError.
    """
    args = parse_arguments(argv)
    rank, world_size, device = set_up_processes(args)
    if not args.model:
        set_up_toy(args, rank, device)
    out = Path(args.out)
    if not args.eval_only:
        check_out(args)
    out.mkdir(parents=True, exist_ok=True)
    run = from_rank_0(describe_run(args) if rank == 0 else None)
    if args.resume:
        run = read_checkpoint(args, run)
    model, text = load_model(args, device, datetime.fromisoformat(run["date"]))
    traces, queries, held_out = load_data(args, text, model.config.context)
    trainer = Trainer(args, model, text, traces, queries, rank, world_size)
    results = {}
    finished = True
    if not args.eval_only:
        if "model" in run:  # it is the content of a checkpoint
            trainer.restore(run)
        elif (out / "checkpoint.pt").exists():
            say(f"the first save will replace the earlier run in {out}, which --resume continues")
        if held_out and run["base"] is None:
            run["base"] = evaluate(answer_held_out(trainer, held_out))
        results["base"] = run["base"]
        finished = train(trainer, run)
    if finished and held_out:
        found = answer_held_out(trainer, held_out)
        results["model" if args.eval_only else "final"] = evaluate(found)
        if rank == 0:
            name = "eval_only.json" if args.eval_only else "eval.json"
            (out / name).write_text(json.dumps(results, indent=2))
            print_results(results)
            found.sort(key=lambda query: query["vote"]["right"])  # wrong ones first
            print_examples(text, found[:args.show])
            say(f"\nthe results are in {out / name}")
    if world_size > 1:
        dist.barrier()  # until rank 0 has written its files
        # gloo's threads release their tensors. If one waited for the GIL while Python shuts down,
        # the process would be aborted (pytorch issue 190489).
        time.sleep(0.2)
        dist.destroy_process_group()
    return finished


def train(trainer: Trainer, run: dict) -> bool:
    """Take the remaining steps, log them and save; return False if a signal stopped the run."""
    args = trainer.args
    log = Path(args.out, "metrics.jsonl")
    if trainer.rank == 0:
        log.write_text("".join(run["log"]))
    stopping = False
    bar = tqdm(total=args.steps, initial=trainer.steps_done, desc=args.method,
               disable=trainer.rank > 0 or None)  # None: shown on a terminal only
    with note_signals(trainer.rank) as signals, bar:
        while trainer.steps_done < args.steps and not stopping:
            line = trainer.step()
            step = trainer.steps_done
            run["log"].append(json.dumps(line) + "\n")
            if trainer.rank == 0:
                with open(log, "a") as file:
                    file.write(run["log"][-1])
            bar.set_postfix_str(f"loss_rd {line['loss_rd']:.3f}", refresh=False)
            bar.update()
            # A signal may have reached only some of the processes.
            stopping = all_sum(torch.tensor(len(signals), device=trainer.device)).item() > 0
            if stopping or step % args.save_every == 0 or step == args.steps:
                if trainer.rank == 0:
                    save(trainer, run)
                say(f"step {step} of {args.steps} saved: loss_rd {line['loss_rd']:.3f}, "
                    f"lambda {line['lambda']:.2f}, answered {show(line['answered'])}, "
                    f"PRG {show(line['prg_rollouts'])} (traces: {show(line['anchor'])})")
    say(f"the model is in {log.parent / 'model'}, the log in {log}")
    if stopping:
        say(f"stopped after step {step}: add --resume to the command to continue")
    return not stopping


@contextlib.contextmanager
def note_signals(rank: int):
    """Collect SIGINT and SIGTERM in a list, so that the current step can be finished and saved.
    A second signal of the same kind ends the process."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        if rank == 0:  # os.write, since the signal may have interrupted a call of print
            os.write(2, b"\nfinishing the step, then saving; press Ctrl-C again to abort\n")

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    # Print each line at once, and escape the characters that the terminal's encoding does not have.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        status = 0 if main() else 130  # so that a shell script stops, too
    except KeyboardInterrupt:
        status = 130
    except (CheckpointError, data.DataError, UsageError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)
