"""Train with HyTuning: settings, the loop, evaluation, checkpoints. Read it from the top, or start at `train`.

    python train.py                                                            # the toy task, 75 seconds
    python train.py --model FOLDER --labeled a.jsonl --unlabeled b.jsonl --eval c.jsonl
    torchrun --nproc_per_node=8 train.py --model ...                           # the same on eight GPUs

Before training the supervised traces are judged: the anchor, and what each counts. A step: sample a group of
rollouts for each query; judge them with the starting model (PRG) and score them with the policy (self-certainty);
turn that into weights, advantages and lambda; one update on the mixed loss.

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
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from importlib.util import find_spec
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
from model import CheckpointError, Config, Decoder, generate, load_pretrained, put, save_pretrained


# -------------------------------------------------------------------------------------------- settings

def option(default, help, toy=None, **more):
    return field(default=default, metadata={"help": help, "toy": toy, **more})


@dataclass
class Settings:
    model: str = option("", "folder of a Hugging Face checkpoint; none: the toy task", group="model and data")
    labeled: str = option("", 'JSONL of supervised traces: {"prompt", "reasoning", "answer"}, or GSM8K')
    unlabeled: str = option("", 'JSONL of queries: {"prompt"}; answers are not read')
    eval: str = option("", 'JSONL of held-out queries: {"prompt", "answer"}')
    max_labeled: int = option(0, "use the first so many supervised traces; 0: all")
    max_unlabeled: int = option(0, "use the first so many queries; 0: all")
    max_eval: int = option(0, "use the first so many held-out queries; 0: all")
    max_prompt_tokens: int = option(512, "longer prompts are skipped, in tokens", toy=64)
    max_new_tokens: int = option(512, "longest response, in tokens", toy=48)
    marker: str = option(data.MARKER, "what introduces the answer")
    max_steps: int = option(16, "reasoning steps of a trace; more are merged evenly")

    method: str = option("hytuning", "what is trained", choices=("hytuning", "rd", "rlif", "static"), group="method")
    queries_per_step: int = option(16, "unlabeled queries of a step, over all processes")
    group_size: int = option(8, "rollouts of a query")
    traces_per_step: int = option(16, "supervised traces of a step, over all processes")
    tau: float = option(0.5, "softness of the gate on PRG / anchor")
    temperature: float = option(1.0, "of sampling, in training and evaluation; the loss is always that of 1")
    reward: str = option("self_certainty", "of a rollout", choices=("self_certainty", "negative_entropy"))
    kl: float = option(0.0, "weight of the KL divergence from the starting model")
    clip: float = option(0.0, "PPO's clipping range; 0: none")

    steps: int = option(100, "training steps", toy=80, group="optimisation")
    lr: float = option(2e-6, "learning rate of AdamW", toy=2e-4)
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm")
    updates_per_batch: int = option(1, "updates on the rollouts of a step; more want --clip")
    seed: int = option(0, "of everything random")

    out: str = option("out/run", "folder for metrics.jsonl, eval.json, model/ and checkpoints", group="run")
    study: bool = option(False, "compare all methods on the toy task: the first table of the README's results")
    resume: bool = option(False, "go on from the last checkpoint in --out")
    eval_only: bool = option(False, "evaluate --model and stop")
    eval_samples: int = option(8, "samples of a held-out query")
    save_every: int = option(20, "steps between checkpoints")
    show: int = option(3, "held-out queries to print at the end")
    tensorboard: str = option("", "folder for the metrics in TensorBoard's format as well")
    device: str = option("", "cpu, cuda, cuda:1 ...; none: a GPU if there is one")
    dtype: str = option("", "of the forward pass; none: bfloat16 if on a GPU", choices=("float32", "bfloat16"))
    tokens_per_batch: int = option(16384, "tokens of one forward pass, padding included", toy=4096)
    rollouts_per_batch: int = option(512, "rollouts sampled at a time, in each process")
    checkpoint_activations: bool = option(False, "recompute activations: less memory, a third more time")
    zero: bool = option(False, "share Adam's moments out among the processes: less memory in each, the same weights")


TOY = {f.name: f.metadata["toy"] for f in fields(Settings) if f.metadata["toy"]}  # defaults where there is no --model


class UsageError(ValueError):
    """Settings that do not fit together. The message is one sentence that says what to do."""


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse's own prints several lines
        raise UsageError(f"{message}: python train.py --help lists all options")


def parse_arguments(argv=None) -> Settings:
    parser = Parser(
        description="Train with HyTuning. Without arguments: the toy task. README.md explains.", allow_abbrev=False,
        usage="python train.py [options]", formatter_class=lambda prog: argparse.HelpFormatter(prog, 4, 30))
    group, kinds = None, {int: "N", float: "X", str: "TEXT"}
    for f in fields(Settings):
        group = parser.add_argument_group(f.metadata["group"]) if "group" in f.metadata else group
        toy = f" ({f.default}; toy {f.metadata['toy']})" if f.metadata["toy"] else f" ({f.default})"
        if f.type is bool:
            group.add_argument(f"--{f.name}", action="store_true", help=f.metadata["help"])
        else:
            choices = f.metadata.get("choices")
            what = f.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
            group.add_argument(f"--{f.name}", type=f.type, choices=choices, metavar=kinds[f.type],
                               help=what + (toy if f.default != "" else ""))
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    settings = Settings(**{**({} if given.get("model") else TOY), **given})
    for name in ("queries_per_step", "group_size", "traces_per_step", "max_prompt_tokens", "max_new_tokens", "tau",
                 "lr", "max_steps", "eval_samples", "save_every", "updates_per_batch", "tokens_per_batch",
                 "rollouts_per_batch", "max_grad_norm", "temperature"):
        if not 0 < getattr(settings, name) < math.inf:
            raise UsageError(f"--{name} is {getattr(settings, name)}: give a number above 0")
    for name in ("seed", "steps", "kl", "clip", "show", "max_labeled", "max_unlabeled", "max_eval"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise UsageError(f"--{name} is {getattr(settings, name)}: give a number that is not negative")
    if settings.tensorboard and not find_spec("tensorboard"):
        raise UsageError("--tensorboard needs a package that is not installed: pip install tensorboard")
    if settings.group_size == 1 and settings.method != "rd":
        raise UsageError("--group_size is 1: a rollout is compared with others of its query, so give at least 2")
    if not settings.marker.strip() or "\n" in settings.marker:
        raise UsageError("--marker is blank or longer than a line: give a word or two, such as 'Answer:'")
    return settings


# ------------------------------------------------------------------------------------------- processes

BEAT, SILENCE = 4, 8  # seconds between signs of life of a process; how many of them may be missing


class World:
    """The processes of a run: one, or as many as torchrun started (NCCL on GPUs, gloo on CPU).

    As a context it ends well or not at all: when a process dies, or leaves with an error, the others end too, with
    a sentence that names it. A collective would not do: it may never return, or fail without a name.
    """

    def __init__(self, device: str):
        if os.environ.get("WORLD_SIZE", "1") != "1" and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
            raise UsageError("WORLD_SIZE is set, but not all else that torchrun sets: start with torchrun, or unset it")
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.signals = []  # SIGINT and SIGTERM that have come: finish the step, save, leave
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(device)
            if self.device.type not in ("cpu", "cuda"):
                raise RuntimeError("only cpu and cuda can")
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}): use "
                             "--device cpu, or leave it out") from None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1:
            # For a process that lives but does not move. Of a dead one the watch knows within a minute.
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
            self.store, self.meetings, self.left = self.connect(), 0, threading.Event()
            self.store.set(f"host of {self.rank}", socket.gethostname())
            self.watcher = threading.Thread(target=self.watch, daemon=True)
            self.watcher.start()

    def connect(self) -> dist.Store:
        """A connection, for one thread, to the store of small values that the machine of rank 0 keeps for all."""
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        return dist.PrefixStore(f"hytuning {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def watch(self):
        """Give a sign of life every few seconds, and look for that of the next process and for reports of failure.

        A thread, since the main one may wait in a collective for what will never come. Beats are counted and not
        timed, so that a computer may sleep in between.
        """
        store, other, seen, missing = self.connect(), (self.rank + 1) % self.size, 0, 0
        while not self.left.wait(BEAT):
            alarm = threading.Timer(BEAT * SILENCE, self.end, ["the machine of rank 0 does not answer any more"])
            alarm.daemon = True
            alarm.start()
            try:
                store.add(f"beats of {self.rank}", 1)
                beats = store.add(f"beats of {other}", 0)
                seen, missing = beats, missing + 1 if beats == seen else 0
                if missing > SILENCE:
                    host = store.get(f"host of {other}").decode()
                    store.compare_set("failure", "", f"rank {other} on {host} gives no sign of life: its process or "
                                                     "its machine died")
                failure = store.get("failure").decode() if store.check(["failure"]) else ""
            except RuntimeError:
                failure = "the machine of rank 0 does not answer any more, or its processes have ended"
            alarm.cancel()
            if failure and not self.left.is_set():
                self.end(failure)

    def end(self, failure: str):
        print(f"error (rank {self.rank}): ending, since {failure}", file=sys.stderr, flush=True)
        os._exit(1)  # nothing milder ends a main thread that waits in a collective

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.size == 1:
            return
        if error is None:
            self.meet()
            self.left.set()
            dist.barrier()  # only then may rank 0, whose store the watch reads, go
        elif kind is RuntimeError or isinstance(error, dist.DistError):  # maybe a collective that lost a process:
            if self.signals:
                self.end("another process has ended, and torchrun, which says which, asks for it")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(BEAT * (SILENCE + 2))  # then the watch will say which, and end this one too
        self.left.set()
        self.watcher.join(BEAT)
        if error is not None:
            with contextlib.suppress(RuntimeError):  # the store may be gone as well
                reason = next(iter(str(error).splitlines()), "")
                self.store.compare_set("failure", "", f"rank {self.rank} has ended with {kind.__name__}: {reason}")

    def meet(self):
        """Wait for all processes, however long one of them writes: not in a collective, which would time out."""
        if self.size > 1:
            self.meetings += 1
            name = f"meeting {self.meetings}"
            self.store.add(name, 1)
            while self.store.add(name, 0) < self.size:
                time.sleep(0.05)
            dist.barrier()  # so that nobody takes the store away from one who still looks

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, the same in each."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def mine(self, items: list) -> list:
        """This process's share of a global batch."""
        return items[self.rank::self.size]

    def say(self, *words):
        if self.rank == 0:
            tqdm.write(" ".join(map(str, words)))

    def bar(self, total: int, what: str):
        hidden = True if self.rank or not total else None  # None: shown on a terminal only
        return tqdm(total=total, desc=what, disable=hidden, dynamic_ncols=True, leave=False)


# ------------------------------------------------------------------------------------------- the method

@dataclass
class Sequence:
    """A rollout or a supervised trace, and what `Trainer` finds out about it: in `judge` its PRG, in `score` certainty,
    entropy and log-probabilities, in `weigh` and `weigh_traces` its advantage or weight."""
    trace: prg.Trace
    prompt_length: int
    complete: bool = False  # ended by itself, with an answer that can be read
    supervised: bool = False
    weight: float = 1.0  # of a supervised trace in L_RD
    prg: float = -1.0
    certainty: float = 0.0  # self-certainty, the mean over the response
    entropy: float = 0.0  # likewise
    logprobs: Tensor = None  # log pi of the response tokens, [T]
    advantage: float = 0.0

    @property
    def ids(self) -> list[int]:
        return self.trace.tokens + self.trace.tail

    @property
    def response(self) -> list[int]:
        return self.ids[self.prompt_length:]

    @property
    def length(self) -> int:
        return len(self.response)


class Policy(nn.Module):
    """The decoder as a function to log-probabilities. DDP wraps this, and calling the wrapper is what arms it."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids, row, source, target):
        hidden = self.decoder.hidden_states(input_ids)
        return hytuning.over_vocabulary(hytuning.token_logprobs, hidden[row, source], self.decoder.lm_head, target)


def response_cells(sequences: list[Sequence], device) -> tuple[Tensor, ...]:
    """(row, source, target, offset), [N] each: slot `source` of the row predicts response token `target`."""
    cells = [(b, s.prompt_length + t - 1, token, t) for b, s in enumerate(sequences)
             for t, token in enumerate(s.response)]
    return torch.tensor(cells, dtype=torch.long, device=device).reshape(-1, 4).T.unbind()


def make_optimizer(model: Decoder, settings: Settings, world: World):
    """AdamW; with --zero each process keeps the moments of its share of the parameters and sends their new values."""
    how = dict(lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    if settings.zero and world.size > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # a second to import, so only where it is asked for
        return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, **how)
    return torch.optim.AdamW(model.parameters(), **how)


class Trainer:
    """A run: the model, its data, and a step of the method. `extra_reward(prompt, response) -> float`, on
    texts, is added to each rollout's reward before its group is normalised."""

    def __init__(self, settings: Settings, world: World, extra_reward=None):
        self.settings, self.world, self.extra_reward = settings, world, extra_reward
        s, device = settings, world.device
        self.model = load_pretrained(s.model, device)
        self.model.checkpoint_activations = s.checkpoint_activations
        self.text = data.Text(s.model, self.model.eos_ids, s.marker, s.max_steps)
        longest, context = s.max_prompt_tokens + s.max_new_tokens, self.model.config.max_position_embeddings
        if longest > context:
            raise UsageError(f"--max_prompt_tokens and --max_new_tokens make {longest} tokens, but {s.model} was "
                             f"made for {context}: lower one of them")
        self.load_data()

        self.dtype = getattr(torch, s.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
        self.policy = Policy(self.model)
        if world.size > 1:
            self.policy = DistributedDataParallel(self.policy, gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(self.model, s, world)
        # The judge of PRG stays as it is: one that learned with the rollouts would come to agree with their errors.
        self.judge_model = copy.deepcopy(self.model).requires_grad_(False)
        self.reference = Policy(self.judge_model) if s.kl else None
        if not s.kl:  # which wants the policy's own arithmetic; a judge may round
            self.judge_model.to(self.dtype)
        # Master weights stay in float32; sampling reads them twice as fast from a bfloat16 copy.
        self.sampler = self.model if self.dtype == torch.float32 else copy.deepcopy(self.model).to(self.dtype)
        self.weigh_traces()
        self.done, self.bad_steps = 0, 0

    def load_data(self):
        s, skipped = self.settings, {}  # by flag, not by path: one file may serve two of them
        labeled, self.unlabeled, self.held_out = [], [], []
        if s.labeled:
            labeled, skipped["labeled"] = data.load_labeled(
                s.labeled, self.text, s.max_prompt_tokens, s.max_new_tokens, s.max_labeled)
        if s.unlabeled:
            self.unlabeled, skipped["unlabeled"] = data.load_unlabeled(
                s.unlabeled, self.text, s.max_prompt_tokens, s.max_unlabeled)
        if s.eval:
            self.held_out, skipped["eval"] = data.load_eval(s.eval, self.text, s.max_prompt_tokens, s.max_eval)
        self.traces = [self.sequence(*record, supervised=True) for record in labeled]
        if not all(trace.complete for trace in self.traces):
            raise UsageError(f"{s.labeled}: an answer behind {s.marker!r} cannot be read back from the tokens of "
                             f"{s.model}: choose another --marker")
        for name, count in skipped.items():
            if count:
                self.world.say(f"--{name} {getattr(s, name)}: {count} records skipped, longer than --max_prompt_tokens "
                               "or --max_new_tokens")

    def weigh_traces(self):
        """Set the anchor and, for hytuning, how much each supervised trace counts: README, "The method"."""
        self.anchor = None
        if not self.traces:
            return
        world, mine = self.world, self.world.mine(self.traces)
        self.judge(mine, self.judge_model)
        gains = torch.zeros(len(self.traces), dtype=torch.double, device=world.device)
        gains[world.rank::world.size] = torch.tensor([x.prg for x in mine], dtype=torch.double, device=world.device)
        gains = world.sum(gains).cpu()
        self.anchor = gains.mean().item()
        if self.settings.method == "hytuning":
            w = hytuning.adaptive_weights(gains, self.anchor, self.settings.tau)
            for x, weight in zip(self.traces, (w / w.mean()).tolist()):
                x.weight = weight
            if self.anchor < 0.05:  # where the gate has its floor
                world.say(f"warning: {self.settings.model} finds a PRG of only {self.anchor:.3f} in the supervised "
                          "traces: as a judge it will tell little. Teach it their form first, with a few steps of "
                          "--method rd, and start from the model that this writes")

    def amp(self):
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def sequence(self, prompt: list[int], response: list[int], supervised=False) -> Sequence:
        trace = prg.Trace(*self.text.parse(prompt, response))
        complete = len(trace.tokens) > trace.answer_start and response[-1] in self.text.ends
        if not complete:  # PRG is -1 anyway: no answer to look at after each step
            trace = prg.Trace(prompt + response, [len(prompt)], len(prompt + response))
        return Sequence(trace, len(prompt), complete, supervised)

    def sample(self, prompts, samples: int, temperature: float, seed: int, what="") -> list[list[list[int]]]:
        """[prompt][sample] -> response ids: `generate` on batches of prompts of like length."""
        if self.sampler is not self.model:
            with torch.no_grad():
                for mine, master in zip(self.sampler.parameters(), self.model.parameters()):
                    mine.copy_(master)
        responses = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = max(1, self.settings.rollouts_per_batch // samples)
        with self.world.bar(len(prompts) if what else 0, what) as bar:
            for batch in (order[i:i + size] for i in range(0, len(order), size)):
                groups = generate(self.sampler, [prompts[i] for i in batch], samples_per_prompt=samples, seed=seed,
                                  max_new_tokens=self.settings.max_new_tokens, temperature=temperature,
                                  eos_ids=self.text.ends)
                for i, group in zip(batch, groups):
                    responses[i] = group
                bar.update(len(batch))
        return responses

    def judge(self, sequences: list[Sequence], model: Decoder):
        """Fill in PRG, as this model sees it: -1 for what did not end by itself with an answer that can be read."""
        with self.amp():
            support, mask = prg.answer_support(model, [x.trace for x in sequences], self.world.device,
                                               self.settings.tokens_per_batch)
        for x, gain in zip(sequences, prg.progressive_reasoning_gain(support, mask).tolist()):
            x.prg = gain if x.complete else -1.0

    @torch.no_grad()
    def score(self, sequences: list[Sequence]):
        """Fill in self-certainty, entropy and log-probabilities under the current policy."""
        def statistics(logits, targets):
            return torch.stack([hytuning.token_logprobs(logits, targets), hytuning.self_certainty(logits),
                                hytuning.entropy(logits)], 1)
        for indices in prg.batches_by_length([len(x.ids) for x in sequences], self.settings.tokens_per_batch):
            batch = [sequences[i] for i in indices]
            row, source, target, _ = response_cells(batch, self.world.device)
            ids = nn.utils.rnn.pad_sequence([torch.tensor(x.ids) for x in batch], batch_first=True)
            with self.amp():
                hidden = self.model.hidden_states(ids.to(self.world.device))[row, source]
                values = hytuning.over_vocabulary(statistics, hidden, self.model.lm_head, target)
            for x, value in zip(batch, values.split([x.length for x in batch])):
                x.logprobs, (x.certainty, x.entropy) = value[:, 0], value[:, 1:].mean(0).tolist()

    def step(self) -> dict:
        """Sample, score, weigh, update; returns the line that goes into metrics.jsonl."""
        s, world, clock = self.settings, self.world, [self.now()]
        queries = [] if s.method == "rd" else world.mine(self.batch(self.unlabeled, s.queries_per_step))
        traces = world.mine(self.batch(self.traces, s.traces_per_step))
        responses = self.sample(queries, s.group_size, s.temperature, seed=s.seed * 10**6 + self.done)
        rollouts = [self.sequence(prompt, response) for prompt, group in zip(queries, responses) for response in group]
        clock.append(self.now())
        self.judge(rollouts, self.judge_model)
        self.score(rollouts)
        clock.append(self.now())

        of_rollouts, of_traces = self.totals(rollouts), self.totals(traces)
        lam = self.weigh(rollouts, of_rollouts["count"])
        losses, norm = self.update((rollouts if lam > 0 else []) + (traces if lam < 1 else []), lam,
                                   of_traces["length"], of_rollouts["count"])
        undecided = world.sum(torch.tensor(float(sum(abs(x.advantage) < 1e-3 for x in rollouts)), device=world.device))
        clock.append(self.now())
        self.done += 1

        def mean(total, name):
            return total[name] / total["count"] if total["count"] else None
        seconds = [end - start for start, end in zip(clock, clock[1:])]
        line = {"step": self.done, "loss": hytuning.hytuning_loss(*losses, lam),
                "loss_rd": losses[0] if of_traces["count"] and lam < 1 else None,
                # 0 on policy, but its gradient is not
                "loss_rlif": losses[1] if of_rollouts["count"] and lam > 0 else None,
                "lambda": lam, "anchor": self.anchor, "prg_rollouts": mean(of_rollouts, "prg"),
                "self_certainty": mean(of_rollouts, "certainty"), "entropy": mean(of_rollouts, "entropy"),
                "response_length": mean(of_rollouts, "length"), "answered": mean(of_rollouts, "complete"),
                "undecided": undecided.item() / of_rollouts["count"] if of_rollouts["count"] else None,
                "grad_norm": norm, "skipped_in_a_row": self.bad_steps,
                "tokens_per_second": of_rollouts["length"] / sum(seconds),
                "seconds_sampling": seconds[0], "seconds_scoring": seconds[1], "seconds_update": seconds[2]}
        return {k: v if v is not None and math.isfinite(v) else None for k, v in line.items()}  # nan is not JSON

    def batch(self, items: list, size: int) -> list:
        """This step's items, of all processes: an epoch is a shuffle, cut into whole batches without repeats."""
        size = min(size, len(items))
        if not size:
            return []
        epoch, place = divmod(self.done, len(items) // size)
        order = np.random.default_rng([self.settings.seed, epoch]).permutation(len(items))
        return [items[i] for i in order[place * size:(place + 1) * size]]

    def totals(self, sequences: list[Sequence]) -> dict[str, float]:
        """Sums over the sequences of all processes; means divide by the global count, so no share counts more."""
        names = ("prg", "certainty", "entropy", "length", "complete")
        sums = [float(len(sequences))] + [sum(float(getattr(x, name)) for x in sequences) for name in names]
        total = self.world.sum(torch.tensor(sums, dtype=torch.double, device=self.world.device))
        return dict(zip(("count", *names), total.tolist()))

    def weigh(self, rollouts: list[Sequence], count: float) -> float:
        """Set each rollout's advantage and return lambda: README, "The method"."""
        s = self.settings

        def column(name):
            return torch.tensor([getattr(x, name) for x in rollouts], dtype=torch.double)
        # Both are divergences from the uniform distribution, never negative: a weight can only take away.
        uniform = math.log(self.model.config.vocab_size)
        r = column("certainty") if s.reward == "self_certainty" else uniform - column("entropy")
        e = torch.zeros(len(rollouts), dtype=torch.double)
        if s.method == "hytuning":
            # Without an answer nothing was earned. A gate alone would leave a little, and advantages are relative.
            w = hytuning.adaptive_weights(column("prg"), self.anchor, s.tau) * column("complete")
            answers = self.answers(rollouts)
            r, e = (hytuning.pool_by_answer(values, answers, s.group_size) for values in (w * r, w))
        if self.extra_reward:
            r += torch.tensor([self.extra_reward(self.text.decode(x.ids[:x.prompt_length]),
                                                 self.text.decode(x.response)) for x in rollouts], dtype=torch.double)
        for x, advantage in zip(rollouts, hytuning.group_advantages(r, s.group_size).tolist()):
            x.advantage = advantage
        mean = self.world.sum(e.sum().to(self.world.device)).item() / max(count, 1)
        return {"hytuning": mean, "static": 0.5, "rd": 0.0, "rlif": 1.0}[s.method]

    def answers(self, rollouts: list[Sequence]) -> Tensor:
        """Numbers [N], the same for rollouts of a group that give the same answer."""
        said = [self.text.decode(x.trace.tokens[x.trace.answer_start:]) if x.complete else None for x in rollouts]
        groups = [said[i:i + self.settings.group_size] for i in range(0, len(said), self.settings.group_size)]
        return torch.tensor([number for group in groups for number in data.same_answers(group)], dtype=torch.long)

    def update(self, sequences: list[Sequence], lam: float, token_count: float, rollout_count: float):
        """One optimiser step (or --updates_per_batch); ([L_RD, L_RLIF], norm of the gradient)."""
        for _ in range(self.settings.updates_per_batch):
            losses = self.world.sum(self.backward(sequences, lam, max(token_count, 1), max(rollout_count, 1))).tolist()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm).item()
            if math.isfinite(norm):  # the same in all processes, since DDP has exchanged the gradients
                self.optimizer.step()
            self.bad_steps = 0 if math.isfinite(norm) else self.bad_steps + 1
            self.optimizer.zero_grad(set_to_none=self.world.size == 1)  # DDP's gradients stay views of its buckets
        if self.bad_steps >= 10:
            raise UsageError("the gradient was not finite in ten steps in a row: lower --lr or use --dtype float32")
        return losses, norm

    def now(self) -> float:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def backward(self, sequences: list[Sequence], lam: float, token_count: float, rollout_count: float) -> Tensor:
        """Gradients of L = (1 - lambda) L_RD + lambda L_RLIF over this process's share; its [L_RD, L_RLIF].

        Both losses divide by global counts, of the supervised response tokens and of the rollouts, so shares add up to
        the whole batch; DDP averages over processes, hence the factor world.size.
        """
        s, device, losses = self.settings, self.world.device, torch.zeros(2, device=self.world.device)
        if not sequences:  # the other processes wait for this one's gradients: give them zeros
            sequences = [Sequence(prg.Trace([0], [1], 1), prompt_length=1, logprobs=torch.zeros(0, device=device))]
        batches = prg.batches_by_length([len(x.ids) for x in sequences], s.tokens_per_batch)
        for number, indices in enumerate(batches, 1):
            batch = [sequences[i] for i in indices]
            row, source, target, offset = response_cells(batch, device)
            ids = nn.utils.rnn.pad_sequence([torch.tensor(x.ids) for x in batch], batch_first=True).to(device)
            shape = len(batch), max(x.length for x in batch)

            def table(values):
                return torch.zeros(shape, device=device).index_put((row, offset), values.float())
            # Gradients are exchanged between processes once, in the last backward pass.
            with self.policy.no_sync() if self.world.size > 1 and number < len(batches) else contextlib.nullcontext():
                with self.amp():
                    values = self.policy(ids, row, source, target)
                logprobs, mask = table(values), table(torch.ones_like(values))
                rd_rows = torch.tensor([x.supervised for x in batch], device=device)
                more = {}
                if s.updates_per_batch > 1:
                    old = [torch.zeros(x.length, device=device) if x.supervised else x.logprobs for x in batch]
                    more["old_logprobs"] = table(torch.cat(old))[~rd_rows]
                if s.kl:
                    with self.amp():
                        more["reference_logprobs"] = table(self.reference(ids, row, source, target))[~rd_rows]
                A = torch.tensor([x.advantage for x in batch], device=device)[~rd_rows]
                w = torch.tensor([x.weight for x in batch], device=device)[:, None]
                L_RD = hytuning.distillation_loss(logprobs[rd_rows], (w * mask)[rd_rows], token_count)
                L_RLIF = hytuning.rlif_loss(logprobs[~rd_rows], mask[~rd_rows], A, rollout_count,
                                            clip=s.clip, kl=s.kl, **more)
                (hytuning.hytuning_loss(L_RD, L_RLIF, lam) * self.world.size).backward()
            losses += torch.stack([L_RD, L_RLIF]).detach()
        return losses

    # ------------------------------------------------------------------------------------- evaluation

    def evaluate(self) -> tuple[dict, list]:
        """What eval.json says of the model as it is, and what `show` prints of this process's first queries."""
        s, world = self.settings, self.world
        mine = world.mine(self.held_out)
        prompts = [prompt for prompt, _, _ in mine]
        groups = self.sample(prompts, s.eval_samples, s.temperature, s.seed, "evaluating")
        greedy = self.sample(prompts, 1, 0.0, s.seed, "evaluating, greedy")
        rollouts = [[self.sequence(prompt, response) for response in group] for prompt, group in zip(prompts, groups)]
        self.judge([x for group in rollouts for x in group], self.model)

        def answer(response):
            return data.extract_answer(self.text.decode(response), s.marker)
        table, examples = torch.zeros(len(self.held_out), 5, dtype=torch.double, device=world.device), []
        for i, ((_, question, gold), group, single) in enumerate(zip(mine, groups, greedy)):
            def right(given):
                return given is not None and data.answers_match(given, gold)
            answers = [answer(response) for response in group]
            winner, share = data.majority(answers)
            table[world.rank + i * world.size] = torch.tensor([
                np.mean([right(a) for a in answers]), right(winner), share, right(answer(single[0])),
                np.mean([x.prg for x in rollouts[i]])])
            examples.append((question, gold, rollouts[i][0], winner, round(share * len(answers))))
        return summary(*world.sum(table).cpu().unbind(1)), examples[:s.show]

    def show(self, examples):
        """Held-out queries with a rollout each: support after every step as a bar, PRG, the vote, the right answer."""
        for question, gold, rollout, winner, votes in examples:
            trace, say = rollout.trace, self.world.say
            support, has_answer = prg.answer_support(self.model, [trace], self.world.device)
            lines = ["(before any step)"] + [" ".join(self.text.decode(trace.tokens[a:b]).split())
                                             for a, b in zip(trace.cuts, trace.cuts[1:])]
            say(f"\n{question}")
            for p, line in zip(support[0].tolist(), lines) if has_answer.any() else []:
                say(f"  p = {p:4.2f} {'#' * round(20 * p):20s} {line}")
            answer = self.text.decode(trace.tokens[trace.answer_start:]).strip()
            say(f"  {self.settings.marker} {answer or '(none that can be read)'}    PRG {rollout.prg:.2f}")
            say(f"  vote: {winner}, {votes} of {self.settings.eval_samples}    right answer: {gold}")

    # ------------------------------------------------------------------------------------ checkpoints

    def save(self):
        """A checkpoint holds all that the rest of the run depends on, in one form for any number of processes, with
        --zero or without; the last two are kept."""
        if hasattr(self.optimizer, "consolidate_state_dict"):  # --zero: rank 0 collects the shares
            self.optimizer.consolidate_state_dict(to=0)
        if self.world.rank == 0:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.done,
                     "bad_steps": self.bad_steps, "settings": asdict(self.settings)}
            put(checkpoint_path(self.settings, self.done), lambda path: torch.save(state, path))
            for old in checkpoints(self.settings)[:-2]:
                old.unlink()
        self.world.meet()

    def restore(self) -> dict | None:
        """Go on from the newest checkpoint of --out that can be read, which rank 0 chooses; the settings that it was
        made with, or None if there is none."""
        s, world, state = self.settings, self.world, None
        if world.rank == 0:
            state = newest_checkpoint(s, world)
        step = world.sum(torch.tensor(state["step"] if state else 0, device=world.device)).item()
        if not step:
            return None
        path = checkpoint_path(s, step)
        if not path.is_file():
            raise UsageError(f"{path}, from which rank 0 goes on, is not on {socket.gethostname()}: give an --out on a "
                             "disk that all machines share")
        state = state or read_checkpoint(path)
        free = {"steps", "out", "resume", "tensorboard", "show", "device", "save_every", "eval", "max_eval",
                "eval_samples", "tokens_per_batch", "rollouts_per_batch", "checkpoint_activations", "zero"}
        changed = [f"--{k} {v} there, {getattr(s, k, v)} here" for k, v in state["settings"].items()
                   if k not in free and v != getattr(s, k, v)]
        if changed:
            raise UsageError(f"{path} was made with other settings ({'; '.join(changed)}): use these, or another --out")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.done, self.bad_steps = step, state["bad_steps"]
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{path} belongs to a model of another shape than {s.model}: use another --out") from None
        return state["settings"]


def summary(single: Tensor, correct: Tensor, confidence: Tensor, greedy: Tensor, gain: Tensor) -> dict:
    """What eval.json says, from a value for each held-out query, [N] each: share of samples that are right, whether
    the majority is, its share of the votes, whether the greedy answer is right, and mean PRG."""
    result = {"accuracy": single.mean().item(), "majority_accuracy": correct.mean().item(),
              "greedy_accuracy": greedy.mean().item(), "confidence": confidence.mean().item(),
              "confidence_when_wrong": confidence[correct == 0].mean().item(),
              "ece": prg.expected_calibration_error(confidence, correct),
              "brier": prg.brier_score(confidence, correct), "auroc": prg.auroc(confidence, correct),
              "prg": gain.mean().item(), "n": len(correct)}
    return {k: None if v != v else v for k, v in result.items()}  # nan, where nothing is wrong, is not JSON


def checkpoint_path(settings: Settings, step: int) -> Path:
    return Path(settings.out) / f"checkpoint-{step:06d}.pt"


def checkpoints(settings: Settings) -> list[Path]:
    """Those in --out, the newest last."""
    found = Path(settings.out).glob("checkpoint-[0-9]*.pt")
    return sorted(found, key=lambda path: (len(path.name), path.name))  # 1000000 comes after 999999


def read_checkpoint(path: Path) -> dict:
    """The content of a checkpoint, on the CPU: never twice on the GPU. Raises UsageError if it cannot be read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state["settings"], dict) or path.name != f"checkpoint-{state['step']:06d}.pt":
            raise ValueError("it does not hold what its name says")
        return state
    except Exception as error:  # whatever a file of unknown content makes torch raise
        raise UsageError(f"{path} cannot be read as a checkpoint ({(str(error) or repr(error)).splitlines()[0]})"
                         ) from None


def newest_checkpoint(settings: Settings, world: World) -> dict | None:
    """The content of the newest checkpoint that can be read; None where there is none at all."""
    found, failures = checkpoints(settings), []
    for path in reversed(found):
        try:
            return read_checkpoint(path)
        except UsageError as error:
            world.say(f"warning: {error}: going on from the one before")
            failures.append(str(error))
    if failures:
        raise UsageError(f"{failures[0]}, nor any before it: move them away, or start anew without --resume")
    return None


# --------------------------------------------------------------------------------------------- the run

def train(settings: Settings, extra_reward=None):
    """A whole run: evaluate, train, save, evaluate again."""
    with World(settings.device) as world:
        run(settings, world, extra_reward)


def run(settings: Settings, world: World, extra_reward=None):
    if not settings.model:
        for name in ("labeled", "unlabeled", "eval"):
            if getattr(settings, name):
                raise UsageError(f"--{name} needs a --model: the toy's, used without one, knows only its own words")
        settings.model = str(build_toy(world))
        for name in ("labeled", "unlabeled", "eval"):
            setattr(settings, name, f"{settings.model}/{name}.jsonl")
    needed = ["eval"] if settings.eval_only else {"rd": ["labeled"], "rlif": ["unlabeled"]}.get(
        settings.method, ["labeled", "unlabeled"])
    for name in needed:
        if not getattr(settings, name):
            raise UsageError(f'--{name} is missing: give a JSONL file (README, "Your own data and model")')
    out, results = Path(settings.out), {}
    if not settings.eval_only and Path(settings.model).resolve() == (out / "model").resolve():
        raise UsageError(f"--model {settings.model} is where this run would write its own: give another --out")
    trainer = Trainer(settings, world, extra_reward)

    def evaluate(name):
        results[name], examples = trainer.evaluate()
        if world.rank == 0:  # under another name where nothing was trained, since a run's own may be there
            name = "eval_only.json" if settings.eval_only else "eval.json"
            put(out / name, lambda path: path.write_text(json.dumps(results, indent=2)))
        return examples
    if world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
    if not settings.eval_only:
        before = trainer.restore() if settings.resume else None
        if settings.resume:
            world.say(f"resuming after step {trainer.done}" if before else f"no checkpoint in {out}: starting anew")
        if before:
            same = all(before.get(name) == getattr(settings, name) for name in ("eval", "max_eval", "eval_samples"))
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                base = json.loads((out / "eval.json").read_text())["base"]
                if same and base["n"] == len(trainer.held_out):
                    results["base"] = base
        elif trainer.held_out:
            evaluate("base")
        finished = learn(trainer, out)
        if world.rank == 0:
            save_pretrained(trainer.model, out / "model")
        world.meet()
        if not finished:
            return world.say(f"stopped after step {trainer.done}; the model so far is in {out / 'model'}; go on with "
                             "--resume")
    if trainer.held_out:
        examples = evaluate("final")
        print_table(world, results)
        trainer.show(examples)
    if not settings.eval_only:
        world.say(f"\nthe model is in {out / 'model'}, the log in {out / 'metrics.jsonl'}")


def learn(trainer: Trainer, out: Path) -> bool:
    """The steps that are left, logged and saved; False if SIGINT or SIGTERM ended them early."""
    settings, world, stop = trainer.settings, trainer.world, trainer.world.signals
    warn = Warnings(world)
    if world.rank == 0:
        log = open_log(out / "metrics.jsonl", trainer.done)
        board = open_tensorboard(settings.tensorboard, trainer.done)
        for old in [] if trainer.done else checkpoints(settings):  # of another run, not to be resumed by mistake
            world.say(f"removing {old}, since this run starts anew")
            old.unlink()
        for half in out.glob("*.tmp"):
            world.say(f"removing {half}, which a run that was killed left half written")
            half.unlink()

    def stop_soon(number, frame):  # finish the step, save, leave; at once when asked twice
        if stop:
            raise KeyboardInterrupt
        stop.append(number)
    handlers = {number: signal.signal(number, stop_soon) for number in (signal.SIGINT, signal.SIGTERM)}
    stopping = False
    with world.bar(settings.steps, settings.method) as bar:
        bar.update(trainer.done)
        while trainer.done < settings.steps and not stopping:
            line = trainer.step()
            if world.rank == 0:
                log.write(json.dumps(line) + "\n")
                log.flush()
                for name, value in line.items() if board else []:
                    if value is not None:
                        board.add_scalar(name, value, line["step"])
            warn.about(line)
            state = f"lambda {line['lambda'] or 0:.2f}, PRG {line['prg_rollouts'] or 0:.2f}"
            bar.set_postfix_str(state)
            bar.update()
            stopping = world.sum(torch.tensor(float(bool(stop)), device=world.device)).item() > 0
            if stopping or trainer.done % settings.save_every == 0 or trainer.done == settings.steps:
                trainer.save()
                world.say(f"step {trainer.done} of {settings.steps}: {state}, saved")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return not stopping


class Warnings:
    """What the metrics say is going wrong, each once, with what to do."""
    FLOOR, LONG = 0.01, 10  # nats per token; steps

    def __init__(self, world: World):
        self.world, self.said, self.collapsed = world, set(), 0

    def about(self, line: dict):
        """Look at a line of metrics.jsonl, in which what describes rollouts is None where there are none."""
        if line["answered"] == 0:
            self.once("unanswered", f"no rollout of step {line['step']} ends by itself with a readable answer, so all "
                      "have PRG -1: raise --max_new_tokens, or let --method rd teach the form first")
        floor = line["entropy"] is not None and (line["entropy"] < self.FLOOR or line["response_length"] < 2)
        self.collapsed = self.collapsed + 1 if floor else 0
        if self.collapsed == self.LONG:
            self.once("collapsed", f"collapse: for {self.LONG} steps entropy ({line['entropy']:.4f} nats a token) or "
                      f"length ({line['response_length']:.0f} tokens) of responses has been at its floor: lower --lr")

    def once(self, what: str, sentence: str):
        if what not in self.said:
            self.said.add(what)
            self.world.say(f"warning: {sentence}")


def open_log(path: Path, steps: int):
    """metrics.jsonl for appending, with the lines of the first `steps` steps kept."""
    kept = path.read_text().splitlines(keepends=True)[:steps] if steps and path.exists() else []
    put(path, lambda temporary: temporary.write_text("".join(kept)))
    return open(path, "a")


def open_tensorboard(folder: str, steps: int):
    """A writer of TensorBoard's format, None for no folder, with the values of the first `steps` steps kept."""
    if folder:
        from torch.utils.tensorboard import SummaryWriter  # another package, so only where it is asked for
        return SummaryWriter(folder, purge_step=steps + 1)


def print_table(world: World, results: dict):
    world.say("\n" + " " * 24 + "".join(f"{name:>8}" for name in results))
    for key in results["final"]:
        values = ["-" if result.get(key) is None else f"{result[key]:.3f}" if key != "n" else result[key]
                  for result in results.values()]
        world.say(f"{key:24}" + "".join(f"{value:>8}" for value in values))


# ----------------------------------------------------------------------------------- the toy's base model

def build_toy(world: World, folder=Path("out/toy")) -> Path:
    """The toy's data, and a base model trained from scratch on what careless authors write; built once."""
    if not folder.exists() and world.rank == 0:
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        toy = data.Triage()
        vocab_size, end = toy.write(temporary)
        torch.manual_seed(0)
        model = Decoder(Config(vocab_size, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
                               num_attention_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
                               initializer_range=0.1, rope_parameters={"rope_type": "default", "rope_theta": 100.0}))
        text, policy, rng = data.Text(temporary, [end]), Policy(model.to(world.device)), np.random.default_rng(1)
        steps, size, lr = 180, 64, 1e-2
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
        for _ in tqdm(range(steps), "training the toy's base model", leave=False, disable=None):
            records = [toy.record(rng, careless=True) for _ in range(size)]
            pairs = [(text.prompt(r["prompt"]), text.response(r["reasoning"], r["answer"])) for r in records]
            batch = [Sequence(prg.Trace(p + a, [len(p)], len(p + a)), len(p)) for p, a in pairs]
            row, source, target, _ = response_cells(batch, world.device)
            ids = nn.utils.rnn.pad_sequence([torch.tensor(x.ids) for x in batch], batch_first=True).to(world.device)
            loss = -policy(ids, row, source, target).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eos_ids = (end,)
        save_pretrained(model, temporary)
        try:
            os.replace(temporary, folder)
        except OSError:  # another run has built it meanwhile
            shutil.rmtree(temporary)
    world.meet()
    return folder


# ------------------------------------------------------------------------------------------- the study

# For each method the learning rate and number of steps that were best on queries and seeds other than these.
STUDY = {"rd": (2e-4, 120), "rlif": (5e-5, 10), "static": (1e-4, 60), "hytuning": (2e-4, 140)}
T_95 = 2.776  # Student's t, two-sided, for the differences of five pairs


def study(seeds=range(5), folder=Path("out/study")):
    """All methods on the toy task, as a Markdown table. A seed is other traces, unlabeled and held-out queries and
    samples, the same for all methods; base model and tables are shared. As many runs at once as there are cores."""
    toy = build_toy(World("cpu"))
    for seed in seeds:
        data.Triage().write(folder / f"data-{seed}", seed, traces=256)

    def run(method, seed):
        out, (lr, steps) = folder / f"{method}-{seed}", STUDY[method]
        files = {name: folder / f"data-{seed}/{name}.jsonl" for name in ("labeled", "unlabeled", "eval")}
        options = {**TOY, **files, "model": toy, "method": method, "seed": seed, "lr": lr, "steps": steps, "out": out,
                   "max_labeled": 16, "show": 0, "device": "cpu"}
        done = subprocess.run([sys.executable, __file__, *(str(x) for k, v in options.items() for x in (f"--{k}", v))],
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise UsageError(f"the run in {out} failed: {reason}")
        return json.loads((out / "eval.json").read_text())
    jobs = [(method, seed) for seed in seeds for method in STUDY]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(jobs, pool.map(lambda job: run(*job), jobs)))

    columns = [name for name in found[jobs[0]]["final"] if name != "n"]
    table = {"base": [found["rd", seed]["base"] for seed in seeds],
             **{method: [found[method, seed]["final"] for seed in seeds] for method in STUDY}}
    table = {name: np.array([[run[c] for c in columns] for run in runs], dtype=float) for name, runs in table.items()}

    def row(name, values, scale, sign=""):
        error = scale * values.std(0, ddof=1) / math.sqrt(len(values))
        print(f"| {name} | " + " | ".join(f"{m:{sign}.3f} ± {e:.3f}" for m, e in zip(values.mean(0), error)) + " |")
    print(f"Mean ± standard error of {len(seeds)} seeds; below, the paired difference to rd and its 95% interval.\n")
    print("| | " + " | ".join(columns).replace("_", " ") + " |\n|---" + "|---" * len(columns) + "|")
    for name, values in table.items():
        row(name, values, 1)
    for name in list(STUDY)[1:]:
        row(f"{name} − rd", table[name] - table["rd"], T_95, sign="+")


def main():
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1" else ""
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal does not know must not end a run
        stream.reconfigure(errors="backslashreplace")
    try:
        settings = parse_arguments()
        study() if settings.study else train(settings)
    except (CheckpointError, data.DataError, UsageError, OSError) as error:
        print(f"error{rank}: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"error{rank}: {str(error).splitlines()[0]} Lower --tokens_per_batch or --rollouts_per_batch, or use "
              "--checkpoint_activations or --zero", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped at once; --resume goes on from the last checkpoint, if there is one", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
