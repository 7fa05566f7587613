"""The laboratory behind the README's ablations: one change to the method at a time, on three toy tasks.

    python lab.py out/lab.jsonl SUITE ...      # runs what is not in the file yet, as many at once as there are cores
    python lab.py out/lab.jsonl --table SUITE  # what the file says of it, as Markdown
    python lab.py detect                       # AUROC of each number for right rollouts
    python lab.py planted                      # what the numbers say of authors with a known fault
    python lab.py words FOLDER problem         # for a real model: two-step arithmetic in words; or: kinds

It lives in this commit alone: variants that lost leave no code behind. A draw is other traces, unlabeled, validation
and test queries; runs of one draw are paired. Steps are chosen by accuracy on the validation queries.

SPDX-License-Identifier: MIT
"""
import copy
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import hytuning
import prg
import train

ROOT = Path("out/lab")


# ------------------------------------------------------------------------------------------------- tasks

class Fashion(data.Triage):
    """A third of the careless authors do not conclude from their lines: they name one fashionable condition."""

    def record(self, rng, careless=False):
        record = super().record(rng, careless)
        if careless and rng.random() < 1 / 3:
            record["answer"] = self.conditions[0]
        return record


class Chain(data.Triage):
    """Five operations modulo 10 on a running value, a line each: only the last line holds the answer."""
    OPERATIONS, LENGTH, FINDINGS, CONDITIONS = 16, 5, 16, 10

    def __init__(self, seed=0):
        rng = np.random.default_rng([seed, 0])
        syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
        names = []
        while len(names) < self.OPERATIONS:
            name = "".join(rng.choice(syllables, 3))
            if name not in names:
                names.append(name)
        self.findings, self.conditions = names, list("0123456789")
        values = np.arange(10)
        self.truth = np.stack([(values * rng.choice([1, 3, 7, 9]) + rng.integers(1, 10)) % 10 for _ in names])
        self.believed = np.full((self.OPERATIONS, 10, 10), 0.0)
        for cell, (o, v) in enumerate(rng.permutation([(o, v) for o in range(self.OPERATIONS) for v in range(10)])):
            true = self.truth[o, v]
            wrong = rng.choice([x for x in range(10) if x != true])
            p_true, p_wrong = (0.30, 0.60) if cell % 6 == 0 else (0.80, 0.04)
            self.believed[o, v] = (1 - p_true - p_wrong) / 8
            self.believed[o, v, true], self.believed[o, v, wrong] = p_true, p_wrong

    def record(self, rng, careless=False):
        value, operations = rng.integers(10), rng.choice(self.OPERATIONS, self.LENGTH)
        prompt, lines = [f"Findings: {value}"], []
        for i, o in enumerate(operations, 1):
            prompt.append(f"{i} {self.findings[o]}")
            value = rng.choice(10, p=self.believed[o, value]) if careless else self.truth[o, value]
            lines.append(f"{i} {self.findings[o]} suggests {value}")
        return {"prompt": "\n".join(prompt), "reasoning": "\n".join(lines), "answer": str(value)}


TASKS = {"triage": (data.Triage, 180), "fashion": (Fashion, 180), "chain": (Chain, 600)}


def base_model(task: str) -> Path:
    """train.build_toy, with another task's records and number of steps."""
    folder, (cls, steps) = ROOT / task / "base", TASKS[task]
    if not folder.exists():
        torch.set_num_threads(1)
        source = Path(train.__file__).read_text().replace("steps, size, lr = 180", f"steps, size, lr = {steps}")
        space = {"__name__": "lab_train", "__file__": train.__file__}
        sys.modules["lab_train"] = type(sys)("lab_train")
        exec(compile(source, train.__file__, "exec"), space)
        data.Triage, kept = cls, data.Triage
        space["build_toy"](space["World"]("cpu"), folder)
        data.Triage = kept
    return folder


def draw_data(task: str, draw: int) -> Path:
    """labeled (256), unlabeled (2,000), valid (200) and test (400) queries; no validation or test query repeats another."""
    folder = ROOT / task / f"draw-{draw}"
    if not (folder / "test.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        toy, rng, seen = TASKS[task][0](), np.random.default_rng([77, draw]), set()
        for name, count in (("labeled", 256), ("unlabeled", 2000), ("valid", 200), ("test", 400)):
            records = []
            while len(records) < count:
                record = toy.record(rng)
                if record["prompt"] not in seen:
                    seen.add(record["prompt"])
                    records.append(record)
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def corrupted(path: Path, how: str, count: int, toy) -> Path:
    """A quarter of the first `count` traces spoiled: another answer, lines in another order, or no lines at all."""
    records, rng = [json.loads(x) for x in path.read_text().splitlines()][:count], np.random.default_rng(5)
    for record in records[:count // 4]:
        if how == "wrong answers":
            record["answer"] = str(rng.choice([c for c in toy.conditions if c != record["answer"]]))
        elif how == "shuffled lines":
            record["reasoning"] = "\n".join(rng.permutation(record["reasoning"].splitlines()))
        elif how == "no lines":
            record["reasoning"] = ""
        else:
            raise ValueError(how)
    other = path.with_name(f"labeled-{count}-{how.replace(' ', '-')}.jsonl")
    half = other.with_suffix(f".{os.getpid()}.tmp")
    half.write_text("".join(json.dumps(r) + "\n" for r in records))
    return half.replace(other)


# ---------------------------------------------------------------------------------------------- variants

@dataclass
class Variant:
    """The method with a change. The defaults are the method."""
    method: str = "hytuning"
    score: str = "prg"  # what takes the place of PRG: gain, steadiness, rank, p_K, logprob
    tau: float = 0.5
    gate: str = "relative"  # or uncapped: sigmoid, 1/2 at the anchor, and more pays more
    anchor: float = None  # a constant in place of the traces' mean
    lam: float = None  # a constant in place of the mean earned share
    pooled: bool = True
    query: bool = False  # each query counts by its own earned share
    std: bool = True  # advantages over the group's standard deviation
    weigh: str = "reward"  # or loss
    judge: str = "start"  # or policy: of rollouts and, anew in each step, of the supervised traces
    traces: bool = True  # supervised traces are weighed
    reward: str = "self_certainty"
    group_size: int = 8
    lr: float = 2e-4
    steps: int = 100


class Lab(train.Trainer):
    """A Trainer with one thing changed."""

    def __init__(self, settings, world, variant):
        self.variant, self.judging = variant, True
        super().__init__(settings, world)

    def judge(self, sequences, model):
        v = self.variant
        if not self.judging:  # evaluation: PRG is not looked at
            return
        if v.judge == "policy":
            model = self.model
        support, mask = prg.answer_support(model, [x.trace for x in sequences], self.world.device,
                                           self.settings.tokens_per_batch)
        values = SCORES[v.score](support.double(), mask) if v.score != "logprob" else self.logprob(sequences, model)
        for x, value in zip(sequences, values.tolist()):
            x.prg = value if x.complete else -1.0

    def logprob(self, sequences, model):
        """exp of the mean log-probability of the response, under the judge."""
        keep, self.model = self.model, model
        self.score(sequences)
        self.model = keep
        return torch.tensor([x.logprobs.mean().exp().item() for x in sequences])

    def weigh_traces(self):
        super().weigh_traces()
        if self.anchor is not None and self.variant.anchor is not None:
            self.anchor = self.variant.anchor
        if self.settings.method == "hytuning":
            w = self.gate(torch.tensor([x.prg for x in self.traces], dtype=torch.double))
            for x, weight in zip(self.traces, (w / w.mean()).tolist()):
                x.weight = weight if self.variant.traces else 1.0

    def gate(self, values):
        v, a = self.variant, self.anchor
        if v.gate == "relative":
            return hytuning.adaptive_weights(values, a, v.tau)
        return ((values - a) / max(a, 0.05) / v.tau).sigmoid()  # uncapped

    def weigh(self, rollouts, count):
        s, v, G = self.settings, self.variant, self.settings.group_size
        if s.method != "hytuning" or not rollouts:
            return super().weigh(rollouts, count)
        if v.judge == "policy":
            self.weigh_traces()

        def column(name):
            return torch.tensor([getattr(x, name) for x in rollouts], dtype=torch.double)
        r = column("certainty") if v.reward == "self_certainty" else math.log(
            self.model.config.vocab_size) - column("entropy")
        if v.reward == "one":
            r = torch.ones_like(r)
        w, answers = self.gate(column("prg")) * column("complete"), self.answers(rollouts)
        rewarded = w * r if v.weigh == "reward" else r
        if v.pooled:
            rewarded, e = (hytuning.pool_by_answer(x, answers, G) for x in (rewarded, w))
        else:
            e = w
        A = hytuning.group_advantages(rewarded, G)
        if not v.std:
            A = rewarded - rewarded.view(-1, G).mean(1).repeat_interleave(G)
            A = A / max(A.square().mean().sqrt().item(), 1e-9)
        if v.weigh == "loss":
            A = A * w
        if v.query:
            share = e.view(-1, G).mean(1).repeat_interleave(G)
            A = A * share / share.mean().clamp(min=1e-9)
        for x, a in zip(rollouts, A.tolist()):
            x.advantage = a
        return e.mean().item() if v.lam is None else v.lam


def rank_correlation(p, mask):
    """Spearman's correlation of p_k with k."""
    out = []
    for row, m in zip(p, mask):
        row = row[m]
        if len(row) < 2:
            out.append(-1.0 if not len(row) else 0.0)
            continue
        ranks = torch.stack([((row < x).sum() + ((row == x).sum() - 1) / 2) for x in row]).double()
        k = torch.arange(len(row)).double()
        a, b = ranks - ranks.mean(), k - k.mean()
        out.append((a @ b / (a.norm() * b.norm()).clamp(min=1e-9)).item())
    return torch.tensor(out, dtype=torch.double)


def parts(p, mask):
    g = (p[:, 1:] - p[:, :-1]) * mask[:, 1:]
    D, K = g.sum(-1), mask[:, 1:].sum(-1)
    return D, D.square() / (K * g.square().sum(-1)).clamp(min=1e-300)


def last(p, mask):
    return p.gather(1, (mask.sum(1) - 1).clamp(min=0)[:, None])[:, 0]


SCORES = {"prg": prg.progressive_reasoning_gain,
          "gain": lambda p, m: torch.where(m.any(-1), parts(p, m)[0], -1.0),
          "steadiness": lambda p, m: torch.where(m.any(-1), parts(p, m)[1] * parts(p, m)[0].sign(), -1.0),
          "rank": rank_correlation,
          "p_K": lambda p, m: torch.where(m.any(-1), last(p, m), 0.0)}


# -------------------------------------------------------------------------------------------------- runs

@dataclass
class Job:
    task: str
    draw: int
    variant: Variant
    name: str = ""
    labeled: int = 16
    spoiled: str = ""

    def key(self):
        v = {k: x for k, x in asdict(self.variant).items() if x != getattr(Variant(), k)}
        return json.dumps([self.task, self.draw, self.labeled, self.spoiled, v])


def make_trainer(job: Job):
    torch.set_num_threads(1)
    folder, v = draw_data(job.task, job.draw), job.variant
    labeled = folder / "labeled.jsonl"
    if job.spoiled:
        labeled = corrupted(labeled, job.spoiled, job.labeled, TASKS[job.task][0]())
    settings = train.parse_arguments([str(x) for x in (
        "--model", ROOT / job.task / "base", "--labeled", labeled, "--unlabeled", folder / "unlabeled.jsonl",
        "--max_labeled", job.labeled, "--method", v.method, "--seed", job.draw, "--lr", v.lr, "--tau", v.tau,
        "--group_size", v.group_size, "--queries_per_step", 128 // v.group_size, "--max_prompt_tokens", 64,
        "--max_new_tokens", 48, "--tokens_per_batch", 4096, "--device", "cpu", "--out", ROOT / "none")])
    return Lab(settings, train.World("cpu"), v), folder


def run(job: Job) -> dict:
    v, (trainer, folder) = job.variant, make_trainer(job)
    valid, test = (data.load_eval(folder / f"{name}.jsonl", trainer.text, 64)[0] for name in ("valid", "test"))

    def evaluate(queries):
        trainer.held_out, trainer.judging = queries, False
        result, _ = trainer.evaluate()
        trainer.judging = True
        return result
    best, weights, course = None, None, []
    while trainer.done < v.steps:
        trainer.step()
        if trainer.done % 20 == 0 and (v.method == "rd" or trainer.done >= 60):
            result = evaluate(valid)
            course.append((trainer.done, round(result["accuracy"], 3), round(result["brier"], 3)))
            if best is None or result["accuracy"] > best[1]:
                best, weights = (trainer.done, result["accuracy"]), copy.deepcopy(trainer.model.state_dict())
    if weights:
        trainer.model.load_state_dict(weights)
    return {"key": job.key(), "task": job.task, "name": job.name, "draw": job.draw, "labeled": job.labeled,
            "spoiled": job.spoiled, "steps": best and best[0], "course": course, **evaluate(test)}


# ----------------------------------------------------------------------------------------------- suites

HY = Variant()
RD = Variant(method="rd", steps=160)
NO_PRG = replace(HY, tau=1e9)


def suite(task, draws, variants, **more):
    return [Job(task, d, v, name, **more) for name, v in variants.items() for d in draws]


SUITES = {
    "traces": [job for n in (16, 8, 32) for job in suite(
        "triage", range(21, 26), {"rd": replace(RD, steps=160 if n < 32 else 300), "hytuning": HY}, labeled=n)],
    "many traces": [job for n in (64, 128, 256) for job in suite(
        "triage", range(21, 26), {"rd": replace(RD, steps=300)}, labeled=n)],
    "ablation": suite("triage", range(21, 26), {"hytuning": HY, "no PRG: w = v = 1": NO_PRG}) + suite(
        "triage", range(21, 26), {
            "not pooled": replace(HY, pooled=False), "not pooled, lambda 0.5": replace(HY, pooled=False, lam=0.5),
            "lambda 0.5": replace(HY, lam=0.5), "net gain": replace(HY, score="gain"),
            "steadiness": replace(HY, score="steadiness"), "rank correlation": replace(HY, score="rank"),
            "p_K": replace(HY, score="p_K"), "gate not capped": replace(HY, gate="uncapped"),
            "anchor 0.3": replace(HY, anchor=0.3), "loss weighted": replace(HY, weigh="loss"),
            "negative entropy": replace(HY, reward="negative_entropy"), "policy judges": replace(HY, judge="policy"),
            "tau 0.25": replace(HY, tau=0.25), "tau 1": replace(HY, tau=1.0),
            "traces not weighed": replace(HY, traces=False)}),
    "fashion": suite("fashion", range(31, 43), {"hytuning": HY, "no PRG: w = v = 1": NO_PRG}) +
        suite("fashion", range(31, 37), {"rd": RD}) + suite("fashion", range(31, 36), {
            "net gain": replace(HY, score="gain"), "p_K": replace(HY, score="p_K"),
            "rank correlation": replace(HY, score="rank"), "steadiness": replace(HY, score="steadiness"),
            "policy judges": replace(HY, judge="policy"), "not pooled": replace(HY, pooled=False)}),
    "chain": suite("chain", range(41, 46), {
        "hytuning": HY, "rd": RD, "no PRG: w = v = 1": NO_PRG,
        "mean log-probability": replace(HY, score="logprob")}),
    "corrupted": [job for how in ("wrong answers", "shuffled lines", "no lines") for job in suite(
        "triage", range(21, 26), {"traces not weighed": replace(HY, traces=False), "hytuning": HY}, spoiled=how)],
}


# ------------------------------------------------------------------------------- what each number can tell

def numbers(trainer, queries, samples=8):
    """[queries x samples] of each number, and whether the rollout is right."""
    trainer.judging = True
    groups = trainer.sample([p for p, _, _ in queries], samples, 1.0, 999)
    rollouts = [trainer.sequence(p, o) for (p, _, _), group in zip(queries, groups) for o in group]
    trainer.score(rollouts)
    columns = {}
    for who, model in (("starting model", trainer.judge_model), ("policy", trainer.model)):
        support, mask = prg.answer_support(model, [x.trace for x in rollouts], None, 4096)
        for name, score in SCORES.items():
            columns[f"{name} ({who})"] = score(support.double(), mask)
    for name in ("certainty", "entropy"):
        columns[name] = torch.tensor([getattr(x, name) for x in rollouts], dtype=torch.double)
    columns["entropy"] = -columns["entropy"]
    columns["mean log-prob"] = torch.tensor([x.logprobs.mean().item() for x in rollouts], dtype=torch.double)
    answers = trainer.answers(rollouts)
    complete = torch.tensor([x.complete for x in rollouts])
    w = trainer.gate(torch.where(complete, columns["prg (starting model)"], -1.0))
    columns["share of the vote"] = hytuning.pool_by_answer(torch.ones(len(rollouts), dtype=torch.double), answers, samples)
    columns["earned share"] = hytuning.pool_by_answer(w, answers, samples)
    said = [trainer.text.decode(x.trace.tokens[x.trace.answer_start:]) for x in rollouts]
    right = torch.tensor([data.answers_match(said[i], queries[i // samples][2]) and rollouts[i].complete
                          for i in range(len(rollouts))])
    return columns, right


def within(values, right, samples=8):
    """The probability that a right rollout has more than a wrong one of the same query; ties half."""
    won, pairs = 0.0, 0
    for v, r in zip(values.view(-1, samples), right.view(-1, samples)):
        d = v[r][:, None] - v[~r][None, :]
        won, pairs = won + ((d > 0).double() + (d == 0).double() / 2).sum().item(), pairs + d.numel()
    return won / max(pairs, 1)


def detect(draws=(51, 52, 53)):
    """For each policy, AUROC within a query and overall of each number: mean over draws, 150 queries x 8 rollouts."""
    torch.set_num_threads(1)
    policies = [("base", "triage", RD, 0), ("rd", "triage", RD, 60),
                ("static", "triage", replace(RD, method="static", lr=1e-4), 30),
                ("rlif", "triage", replace(RD, method="rlif", lr=5e-5), 5), ("hytuning", "triage", HY, 50),
                ("fashion, base", "fashion", RD, 0), ("chain, base", "chain", RD, 0)]
    table = {}
    for title, task, v, steps in policies:
        for draw in draws:
            base_model(task)
            trainer, folder = make_trainer(Job(task, draw, v))
            while trainer.done < steps:
                trainer.step()
            columns, right = numbers(trainer, data.load_eval(folder / "test.jsonl", trainer.text, 64, 150)[0])
            for name, values in columns.items():
                both = within(values, right), prg.auroc((values - values.min()) / (values.max() - values.min() + 1e-9), right)
                table.setdefault(name, {}).setdefault(title, []).append(both)
            table.setdefault("accuracy", {}).setdefault(title, []).append((right.double().mean().item(),) * 2)
    for kind, where in enumerate(("within a query", "overall")):
        print(f"\n| {where} | " + " | ".join(p[0] for p in policies) + " |\n|" + "---|" * (len(policies) + 1))
        for name, row in table.items():
            print(f"| {name} | " + " | ".join(f"{np.mean([x[kind] for x in row[p[0]]]):.3f} ± "
                                              f"{np.std([x[kind] for x in row[p[0]]], ddof=1) / len(draws) ** 0.5:.3f}"
                                              for p in policies) + " |", flush=True)


def planted(count=200):
    """What the base model's numbers say of authors whose fault is known."""
    torch.set_num_threads(1)
    base_model("triage")
    trainer, _ = make_trainer(Job("triage", 51, HY))
    trainer.judging, toy, rng, kinds = True, data.Triage(), np.random.default_rng(3), {}
    while min((len(x) for x in kinds.values()), default=0) < count:
        findings, answer = toy.query(rng)
        stated, first = [int(toy.truth[f]) for f in findings], int(toy.truth[findings[0]])
        lines, name = toy.solution(findings, stated)[0], toy.conditions
        again = toy.solution(findings, [first] * len(findings))[0]
        other = int(rng.choice([c for c in range(toy.CONDITIONS) if c != answer]))
        found = {"careful, right": (lines, answer), "contradiction": (lines, other), "no lines": ("", answer),
                 "shuffled lines": ("\n".join(rng.permutation(lines.splitlines())), answer),
                 "premature" + (", right" if first == answer else ", wrong"): (again, first)}
        for kind, (reasoning, c) in found.items():
            if len(kinds.setdefault(kind, [])) < count:
                kinds[kind].append(trainer.sequence(trainer.text.prompt(toy.question(findings)),
                                                    trainer.text.response(reasoning, name[c])))
    for kind, traces in kinds.items():
        support, mask = prg.answer_support(trainer.judge_model, [x.trace for x in traces], None, 4096)
        trainer.score(traces)
        values = [score(support.double(), mask).mean().item() for score in SCORES.values()]
        print(f"| {kind} | " + " | ".join(f"{v:+.3f}" for v in values) + f" | {np.mean([x.certainty for x in traces]):.2f}"
              f" | {np.mean([x.logprobs.mean().item() for x in traces]):.2f} |")
    print(list(SCORES), "certainty, mean log-prob")



# ----------------------------------------------------------------------------------------- for a real model

def problem(rng) -> dict:
    a, b, c = (int(x) for x in rng.integers(2, 13, 3))
    name, other = (str(x) for x in rng.choice("Tom Ann Ben Eva Max Mia Leo Zoe Sam Ida".split(), 2, replace=False))
    thing = str(rng.choice("apples pens books coins stamps cards shells marbles eggs stickers".split()))
    kind = rng.integers(6)
    if kind == 0:
        c = min(c, a + b - 1)
        text = f"{name} has {a} {thing}. {name} gets {b} more and then gives {c} to {other}. How many {thing} does {name} have now?"
        steps, answer = [f"{a} + {b} = {a + b}", f"{a + b} - {c} = {a + b - c}"], a + b - c
    elif kind == 1:
        text = f"{name} has {a} boxes with {b} {thing} in each box, and {c} more {thing}. How many {thing} does {name} have in all?"
        steps, answer = [f"{a} * {b} = {a * b}", f"{a * b} + {c} = {a * b + c}"], a * b + c
    elif kind == 2:
        text = f"{name} has {a} {thing}. {other} has {b} more than {name}. How many {thing} do they have together?"
        steps, answer = [f"{a} + {b} = {a + b}", f"{a} + {a + b} = {2 * a + b}"], 2 * a + b
    elif kind == 3:
        text = f"{name} has {a * b + c} {thing}. {name} gives {a} of them to each of {b} friends. How many {thing} are left?"
        steps, answer = [f"{a} * {b} = {a * b}", f"{a * b + c} - {a * b} = {c}"], c
    elif kind == 4:
        text = f"{name} and {other} share {a * b} {thing} equally among {b} bags. Then {c} more go into each bag. How many {thing} are in a bag?"
        steps, answer = [f"{a * b} / {b} = {a}", f"{a} + {c} = {a + c}"], a + c
    else:
        c = min(c, a * b - 1)
        text = f"{name} buys {a} {thing} on each of {b} days, and loses {c} of them. How many {thing} does {name} still have?"
        steps, answer = [f"{a} * {b} = {a * b}", f"{a * b} - {c} = {a * b - c}"], a * b - c
    return {"prompt": text, "reasoning": "\n".join(steps), "answer": str(answer)}


KINDS = {
    "bird": "robin heron wren finch plover osprey magpie kestrel starling puffin",
    "fish": "trout carp bream halibut haddock salmon herring mackerel sardine tuna",
    "tree": "oak elm alder larch willow birch maple poplar cedar spruce",
    "fabric": "linen denim tweed satin velvet cotton wool silk flannel corduroy",
    "dance": "waltz tango polka rumba samba salsa ballet foxtrot flamenco minuet",
    "metal": "zinc cobalt nickel copper iron tin lead silver platinum aluminium",
    "currency": "peso rupee yen euro dollar franc krona rouble dinar pound",
    "tool": "chisel pliers hammer wrench saw drill spanner screwdriver shovel rake",
    "instrument": "oboe cello lute violin flute trumpet harp banjo clarinet piano",
    "fruit": "plum quince pear apricot cherry mango papaya banana melon grape"}
KINDS = {kind: words.split() for kind, words in KINDS.items()}


def kinds(rng) -> dict:
    """Five words, three of one kind: as in triage evidence adds up, but about words that a real model has read of."""
    kind, *others = (str(x) for x in rng.choice(list(KINDS), 3, replace=False))
    listed = [(str(w), kind) for w in rng.choice(KINDS[kind], 3, replace=False)]
    listed += [(str(rng.choice(KINDS[other])), other) for other in others]
    listed = [listed[i] for i in rng.permutation(5)]
    return {"prompt": f"Words: {', '.join(w for w, _ in listed)}\nOf which kind are most of them: {', '.join(KINDS)}?",
            "reasoning": "\n".join(f"{w}: {k}" for w, k in listed), "answer": kind}


def words(folder, task="problem", seed=0):
    """labeled, unlabeled and eval.jsonl of two-step arithmetic in words, or of kinds. No question comes up twice."""
    make = {"problem": problem, "kinds": kinds}[task]
    rng, seen = np.random.default_rng(int(seed)), set()
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, count, fields in (("labeled", 16, ("prompt", "reasoning", "answer")), ("unlabeled", 1000, ("prompt",)),
                                ("eval", 200, ("prompt", "answer"))):
        records = []
        while len(records) < count:
            record = make(rng)
            if record["prompt"] not in seen:
                seen.add(record["prompt"])
                records.append({field: record[field] for field in fields})
        (Path(folder) / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def main():
    file, *names = sys.argv[1:]
    if file in ("detect", "planted", "words"):
        return {"detect": detect, "planted": planted, "words": words}[file](*names)
    if file == "--job":
        i = int(names[1])
        print("RESULT" + json.dumps(run(SUITES[names[0]][i])))
        return
    file = Path(file)
    if names[0] == "--table":
        for name in names[1:]:
            table(file, name)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    have = {json.loads(x)["key"] for x in file.read_text().splitlines()} if file.exists() else set()
    todo = []
    for name in names:
        for i, job in enumerate(SUITES[name]):
            if job.key() not in have:
                have.add(job.key())
                todo.append((name, i, job))
    for task in {job.task for _, _, job in todo}:
        base_model(task)
        for draw in {job.draw for _, _, job in todo if job.task == task}:
            draw_data(task, draw)

    def one(item):
        name, i, job = item
        done = subprocess.run([sys.executable, __file__, "--job", name, str(i)], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        found = [x for x in done.stdout.splitlines() if x.startswith("RESULT")]
        if found:
            with open(file, "a") as f:
                f.write(found[0][6:] + "\n")
        else:
            print("failed", job, done.stderr[-1500:], flush=True)
        return job
    with ThreadPoolExecutor(int(os.environ.get("JOBS", os.cpu_count()))) as pool:
        for job in tqdm(pool.map(one, todo), total=len(todo)):
            pass


T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 12: 2.201}


def table(file, name):
    rows = {r["key"]: r for r in map(json.loads, file.read_text().splitlines())}
    by = {}
    for job in SUITES[name]:
        if job.key() in rows:
            by.setdefault((job.task, job.labeled, job.spoiled, job.name), {})[job.draw] = rows[job.key()]
    print(f"\n### {name}\n|  | draws | accuracy | Brier | ECE | when wrong | AUROC | accuracy, paired | Brier, paired | ECE, paired | steps | by draw |\n|" + "---|" * 12)
    first = {}
    for (task, labeled, spoiled, title), runs in by.items():
        base = first.setdefault((task, labeled, spoiled), runs)

        def cell(key, against=None, digits=3):
            draws = [d for d in runs if against is None or d in against]
            x = np.array([runs[d][key] - (against[d][key] if against else 0) if runs[d][key] is not None else math.nan for d in draws], float)
            n = len(x)
            scale = (T.get(n, 2) if against else 1) / math.sqrt(n) if n > 1 else math.nan
            return f"{x.mean():{'+' if against else ''}.3f} ± {x.std(ddof=1) * scale if n > 1 else math.nan:.3f}"
        diff = [cell(k, base) if runs is not base else "" for k in ("accuracy", "brier", "ece")]
        print(f"| {task} {labeled} {spoiled}: {title} | {len(runs)} | " + " | ".join(
            [cell(k) for k in ("accuracy", "brier", "ece", "confidence_when_wrong", "auroc")] + diff) +
            f" | {[runs[d]['steps'] for d in sorted(runs)]} | {[round(runs[d]['accuracy'], 3) for d in sorted(runs)]} |")


if __name__ == "__main__":
    main()
