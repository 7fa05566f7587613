"""The laboratory behind the README's table of PRG formulas, for this commit alone.

    python lab.py sample MODEL eval.jsonl OUT.json [SAMPLES] [NEW_TOKENS] [QUERIES]
    python lab.py table OUT.json ...

`sample` draws responses of a model (float32 for kinds, bfloat16 for Qwen2.5-Coder) and keeps the
support of each answer under the same model. `table` prints, for each formula, how often a right
sample has more than a wrong one to the same query, the AUROC, the share of the weight
min(max(PRG, 0) / a, 1)^2 on right samples (a: the mean of the right ones), and the mean of wrong
responses of one line and of right ones of three lines or more.

The data of *kinds* and *problem* is made by lab.py of commit 7878edc. The starts are
    train.py --method rd --max_labeled 8 --steps 6 or 12 --lr 3e-5 --seed S (SmolLM2-135M-Instruct)
    train.py --method rd --max_labeled 16 or 8 --steps 5 --lr 1e-5 --seed 1 (Qwen2.5-Coder-0.5B)
In the toy whose careless authors stop early, half of them keep only their first one to four lines,
drawn with rng.integers(1, 5), and answer with what these lines state most often.

SPDX-License-Identifier: MIT
"""
import json
import sys
from collections import defaultdict

import numpy as np
import torch

import data
import prg
from model import generate, load_pretrained


def late(p):
    k = np.arange(1, len(p))
    return (k * p[1:]).sum() / k.sum()


def integral(p):
    """2 t p(t) dt from 0 to 1, with p linear between the cuts t = k / K."""
    K = len(p) - 1
    a = np.arange(K)
    b = a + 1
    return (p[:-1] * (b**2 - a**2) + np.diff(p) * (2 * (b**3 - a**3) / 3 - a * (b**2 - a**2))).sum() / K**2


def running(p, keep=2 / 3):
    m = p[0]
    for x in p[1:]:
        m = keep * m + (1 - keep) * x
    return m


def steady(p):
    g = np.diff(p)
    return (p[-1] - p[0])**3 / max(len(g) * (g**2).sum(), 1e-300)


FORMULAS = {
    "this PRG": lambda p: running(p) - p[0] / 3, "running mean": running, "keeps 1/2": lambda p: running(p, 0.5),
    "keeps 0.7": lambda p: running(p, 0.7), "less p_0/4": lambda p: running(p) - p[0] / 4,
    "less p_0/2": lambda p: running(p) - p[0] / 2, "less p_0": lambda p: running(p) - p[0],
    "sum k p_k / sum k": late, "the same less p_0/2": lambda p: late(p) - p[0] / 2,
    "the same less p_0": lambda p: late(p) - p[0], "sum k p_k / sum k+1": lambda p: late(p) * (len(p) - 1) / (len(p) + 1),
    "integral": integral, "mean of p_1..p_K": lambda p: p[1:].mean(), "mean of p_0..p_K": lambda p: p.mean(),
    "p_K": lambda p: p[-1], "p_0": lambda p: p[0], "D": lambda p: p[-1] - p[0], "earlier": steady}


def sample(folder, file, out, samples=4, new=400, queries=200):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_pretrained(folder, device).requires_grad_(False)
    text = data.Text(folder, model.eos_ids)
    rows = []
    held_out, _ = data.load_eval(file, text, 512, int(queries))
    for start in range(0, len(held_out), 64):
        batch = held_out[start:start + 64]
        groups = generate(model, [prompt for prompt, _, _ in batch], samples_per_prompt=int(samples),
                          max_new_tokens=int(new), seed="curves", eos_ids=text.end_ids)
        traces = []
        for i, ((prompt, _, gold), group) in enumerate(zip(batch, groups), start):
            for response in group:
                fields, answer = text.parse(prompt, response)
                if answer is not None:
                    traces.append(prg.Trace(*fields))
                    rows.append({"q": i, "answer": answer, "right": data.answers_match(answer, gold)})
        support, mask = prg.packed_support(model, traces)
        for row, p, m in zip(rows[-len(traces):], support, mask):
            row["p"] = p[m].tolist()
    json.dump(rows, open(out, "w"))


def table(*files):
    for file in files:
        rows = json.load(open(file))
        queries = defaultdict(list)
        for i, row in enumerate(rows):
            queries[row["q"]].append(i)
        right = np.array([row["right"] for row in rows])
        K = np.array([len(row["p"]) - 1 for row in rows])
        pairs = [(i, j) for group in queries.values() for i in group for j in group if right[i] and not right[j]]
        i, j = np.array(pairs).T
        print(f"{file}: {len(rows)} answers, right {right.mean():.3f}, {len(pairs)} pairs, {K.mean():.1f} lines")
        for name, formula in FORMULAS.items():
            v = np.array([formula(np.array(row["p"])) if len(row["p"]) > 1 else 0.0 for row in rows])
            wins = ((v[i] > v[j]) + (v[i] == v[j]) / 2).mean()
            w = np.clip(v / max(v[right].mean(), 1e-6), 0, 1)**2
            print(f"  {name:22} wins {wins:.3f}  AUROC {prg.auroc(v, right):.3f}  weight on right {w[right].sum() / w.sum():.3f}"
                  f"  {v[(K <= 1) & ~right].mean():.3f} {v[(K >= 3) & right].mean():.3f}")


if __name__ == "__main__":
    {"sample": sample, "table": table}[sys.argv[1]](*sys.argv[2:])
