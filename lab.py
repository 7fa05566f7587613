"""The programs behind the README's tables of the toy and of SmolLM2, for this commit alone.

    python lab.py late OPTIONS    # train.py with sum_k k p_k / sum_k k in place of PRG
    python lab.py chart OPTIONS   # train.py, and the share of the toy's fixed answer in urgent rollouts
    python lab.py table A B ...   # compare groups of runs, for example 'out/rd-*' 'out/hytuning-*'

OPTIONS are those of train.py. `table` takes eval.json, or eval_only.json where a run has no eval.json,
and pairs the runs of two groups by the number at the end of their folders.

The toy:      train.py --method M --seed S --out out/M-S               (rlif: --lr 2e-5, static: --lr 1e-4)
SmolLM2:      the data of `lab.py words kinds-S kinds S` at commit 7878edc,
    COMMON = --max_prompt_tokens 128 --max_new_tokens 48 --seed S --dtype float32 --device cpu
    TRAIN  = --labeled kinds-S/labeled.jsonl --unlabeled kinds-S/unlabeled.jsonl --max_labeled 8
             --queries_per_step 8 --group_size 8 --lr 3e-5
    train.py --model SmolLM2-135M-Instruct --method rd --steps 12 --out out/start-S $COMMON $TRAIN
    train.py --model out/start-S/model --method M --steps 16 --out out/M-S $COMMON $TRAIN
    train.py --eval_only --model out/M-S/model --out out/M-S $COMMON --eval kinds-S/eval.jsonl --eval_samples 4

SPDX-License-Identifier: MIT
"""
import json
import os
import sys
from glob import glob
from pathlib import Path

import numpy as np
import torch

import data
import prg
import train

MEASURES = ("accuracy", "ece", "brier", "auroc", "confidence_when_wrong")


def late(support, mask):
    k = torch.arange(support.shape[1], device=support.device) * mask
    mean = (k * support).sum(-1) / k.sum(-1).clamp(min=1)
    K = mask.sum(-1) - 1
    return torch.where(K >= 0, torch.where(K > 0, mean, 0.0), -1.0)


def chart(options):
    fixed = data.Triage().conditions[0]
    shares = []
    sample = train.Trainer.sample

    def record(trainer, prompts, samples, seed):
        traces, answers, c = sample(trainer, prompts, samples, seed)
        if seed[0] == "rollouts":
            urgent = ["Urgent" in trainer.text.decode(trace.prompt) for trace in traces]
            shares.append(np.mean([a == fixed for a, u in zip(answers, urgent) if u]))
        return traces, answers, c

    train.Trainer.sample = record
    train.main(options)
    print("share of the fixed answer in urgent rollouts, means of ten steps:")
    print(np.array(shares).reshape(-1, 10).mean(1).round(2).tolist())


def read(pattern):
    """Return {seed: [accuracy, ...]} of the trained models."""
    final = {}
    for folder in filter(os.path.isdir, glob(pattern)):
        seed = int(folder.rsplit("-", 1)[1])
        path = Path(folder, "eval.json")
        path = path if path.exists() else Path(folder, "eval_only.json")
        if not path.exists():
            continue
        results = json.loads(path.read_text())
        result = results.get("final") or results["model"]
        final[seed] = [result["sample"][m] for m in MEASURES]
        final[seed] += [result["prg_wins"], result["prg_pairs"], result["answered"], result["vote"]["accuracy"]]
    return final


def table(patterns):
    columns = [*MEASURES, "prg_wins", "prg_pairs", "answered", "vote"]
    runs = {pattern: read(pattern) for pattern in patterns}
    print("   ", *columns)
    for pattern, found in runs.items():
        x = np.array([found[s] for s in sorted(found)], dtype=float)
        print(f"{pattern}: {len(x)} runs, mean {np.nanmean(x, 0).round(3)} "
              f"s.e. {(np.nanstd(x, 0, ddof=1) / len(x)**.5).round(3)} lowest {x[:, 0].min():.3f}")
        if len(x) < 10:
            for s in sorted(found):
                print("   ", s, np.array(found[s], dtype=float).round(3))
    last = patterns[-1]
    for pattern in patterns[:-1]:
        seeds = sorted(set(runs[pattern]) & set(runs[last]))
        d = np.array([runs[last][s] for s in seeds], dtype=float) - np.array([runs[pattern][s] for s in seeds], dtype=float)
        half = {8: 2.365, 24: 2.069, 4: 3.182, 3: 4.303, 2: 12.7}.get(len(d), 2) * d.std(0, ddof=1) / len(d)**.5
        print(f"{last} - {pattern}, {len(d)} pairs, 95% intervals: accuracy {d[:, 0].mean():+.3f} ± {half[0]:.3f}, "
              f"ECE {d[:, 1].mean():+.3f} ± {half[1]:.3f}, Brier {d[:, 2].mean():+.3f} ± {half[2]:.3f}; "
              f"above on {(d[:, 0] > 0).sum()}, smallest {d[:, 0].min():+.3f}")


if __name__ == "__main__":
    command, *options = sys.argv[1:]
    if command == "late":
        prg.progressive_reasoning_gain = late
        train.main(options)
    else:
        {"chart": chart, "table": table}[command](options)
