"""Text in, text out: the tokenizer and its prompt format, JSONL records, steps and answers, the toy task.

A response is reasoning, one step a line, then a marker ("Answer:") and the answer. `Text.parse` finds steps and
answer on the token ids themselves, since text that is encoded again may split differently. The toy task at the
end makes a data set on which the method's effect can be seen in a minute on a laptop.

This file imports nothing of the project, so it can be taken alone. Next to read: train.py.

SPDX-License-Identifier: MIT
"""
import contextlib
import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers


class DataError(ValueError):
    """Data that cannot be used. The message is one sentence: what is wrong, in which file and line, what to do."""


MARKER = "Answer:"
INSTRUCTION = 'Reason line by line, then end with the line "{marker} ...".'

# ---------------------------------------------------------------------------------------------- answers


def find_answer(text: str, marker: str = MARKER) -> tuple[int, int, int] | None:
    """Offsets (of the last marker, of the answer's start, of its end): the answer is the rest of that line."""
    at = text.rfind(marker)
    line = text[at + len(marker):].split("\n", 1)[0] if at >= 0 else ""
    start = at + len(marker) + len(line) - len(line.lstrip())
    return (at, start, start + len(line.strip())) if line.strip() else None


def extract_answer(text: str, marker: str = MARKER) -> str | None:
    """What stands behind the last marker, on its line; None where there is no marker or nothing behind it."""
    found = find_answer(text, marker)
    return text[found[1]:found[2]] if found else None


NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.)?(?:(?<=\d)/\d+)?")


def answers_match(a: str, b: str) -> bool:
    """Whether two answers say the same: "$1,000", "1000.00" and "1000 dollars" do, and "Yes." and "yes".

    Case, outer punctuation and currency signs do not count. A bare number also matches text that holds exactly
    one number, and this one.
    """
    a, b = (re.sub(r"\s+", " ", re.sub("[$€£]", "", x.replace("\u2212", "-"))).casefold() for x in (a, b))
    a, b = (x.lstrip(" *`\"'([").rstrip(" *`\"')].!?,;:") or x for x in (a, b))
    if a == b:
        return True
    numbers = [[as_number(x) for x in NUMBER.findall(text) if as_number(x) is not None] for text in (a, b)]
    bare = any(NUMBER.fullmatch(text.rstrip(" %")) for text in (a, b))
    return bare and len(numbers[0]) == 1 and numbers[0] == numbers[1]


def as_number(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def same_answers(answers: list[str | None]) -> list[int]:
    """For each answer the index of the first one that says the same; an unreadable one is like no other.

    "5" says the same as "5 apples" and as "5 pears", which are not the same: what comes first decides.
    """
    first = []
    for i, answer in enumerate(answers):
        first.append(next((j for j in dict.fromkeys(first)
                           if answer and answers[j] and answers_match(answers[j], answer)), i))
    return first


def majority(answers: list[str | None]) -> tuple[str | None, float]:
    """The answer most often given, the earliest of equals, and its share of the votes, unreadable ones counted."""
    votes = [first for first, answer in zip(same_answers(answers), answers) if answer]
    best = max(dict.fromkeys(votes), key=votes.count, default=None)
    return (None if best is None else answers[best]), votes.count(best) / len(answers)


# ----------------------------------------------------------------------------------- tokens and prompts

# The chat formats that special tokens give away: pieces before the response, and the token that ends it.
CHATS = [(["<|im_start|>", "user\n{}", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"], "<|im_end|>"),
         (["<|begin_of_text|>", "<|start_header_id|>", "user", "<|end_header_id|>", "\n\n{}", "<|eot_id|>",
           "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"], "<|eot_id|>")]


class Text:
    """A checkpoint folder's tokenizer, the prompt format that its special tokens show, and the answer marker.

    `eos_ids` are the model's end tokens; `self.ends` is these and the chat format's. Raises DataError where
    tokenizer.json is missing or broken, or nothing is known to end a response.
    """

    def __init__(self, folder, eos_ids=(), marker: str = MARKER, max_steps: int = 16):
        self.path = Path(folder) / "tokenizer.json"
        with errors_named(f"{self.path} cannot be read as a tokenizer"):
            self.tokenizer = Tokenizer.from_file(str(self.path))
        self.tokenizer.no_padding(), self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True  # a "<|im_end|>" in somebody's question is text
        self.marker, self.max_steps = marker, max_steps
        self.special = {token.content: i for i, token in self.tokenizer.get_added_tokens_decoder().items()}
        self.pieces, end = next(((pieces, self.special[end]) for pieces, end in CHATS
                                 if all(p in self.special for p in pieces if p.startswith("<|"))),
                                (None, next(iter(eos_ids), None)))
        if end is None:
            raise DataError(f"{folder} names no end token: set eos_token_id in its generation_config.json")
        self.end, self.ends = end, {end, *eos_ids}

    def encode(self, text: str, around: bool = False) -> list[int]:
        """Token ids of a text; `around`: with what the tokenizer itself puts before and after it."""
        with errors_named(f"{self.path} fails on a text"):
            return self.tokenizer.encode(text, add_special_tokens=around).ids

    def prompt(self, question: str) -> list[int]:
        """Token ids of a question with the instruction, up to where the response begins."""
        asked = f"{question}\n{INSTRUCTION.format(marker=self.marker)}"
        if self.pieces is None:  # plain text, after whatever the tokenizer itself puts first
            ids = self.encode(asked + "\n", around=True)
            ids = ids[:-1] if ids[-1:] == [self.end] else ids
        else:
            ids = [i for piece in self.pieces for i in ([self.special[piece]] if piece in self.special
                                                        else self.encode(piece.replace("{}", asked)))]
        if not ids:
            raise DataError(f"{self.path} has no token for anything in a prompt: use the model's own")
        return ids

    def response(self, reasoning: str, answer: str) -> list[int]:
        """Token ids of a supervised response, the end token included."""
        lines = [line.strip() for line in reasoning.splitlines() if line.strip()]
        return self.encode("\n".join(lines + [f"{self.marker} {answer}"])) + [self.end]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i not in self.ends])  # which some tokenizers would show

    def parse(self, prompt: list[int], response: list[int]) -> tuple[list[int], list[int], int, list[int]]:
        """(tokens, cuts, answer_start, tail) as prg.Trace has them, from the token ids of prompt and response.

        Steps are the non-empty lines before the last marker; neighbours are merged evenly down to max_steps.
        Without a readable answer the trace is the whole text with no steps and an empty answer.
        """
        text, ends = self.spans(response)
        found = find_answer(text, self.marker)
        if found is None:
            whole = prompt + response
            return whole, [len(prompt)], len(whole), []
        marker, start, last = (token_at(ends, offset) for offset in (found[0], found[1], found[2] - 1))
        stop = max(i for i, token in enumerate(response) if ends[i] == ends[last] and token not in self.ends)
        starts = [m.start(1) for m in re.finditer(r"^[^\S\n]*(\S)", text[:found[0]], re.MULTILINE)]
        K = min(len(starts), self.max_steps)
        chosen = [starts[k * len(starts) // K] for k in range(1, K)]
        cuts = sorted({0, *(token_at(ends, offset) for offset in chosen), marker}) if starts else [0]
        cuts = [len(prompt) + cut for cut in cuts]
        return prompt + response[:stop + 1], cuts, len(prompt) + start, response[stop + 1:]

    def spans(self, ids: list[int]) -> tuple[str, list[int]]:
        """The text of ids, and for each id the offset at which its text ends. Tokens that share one character
        (a character may take several bytes) all end where it does."""
        stream, text, ends, waiting = decoders.DecodeStream(skip_special_tokens=True), "", [], 0
        for i in ids:
            try:
                piece = None if i in self.ends else stream.step(self.tokenizer, i)
            except Exception:  # bytes that are no text, which a sampled response may hold: nothing can be read in it
                return "", [0] * len(ids)
            waiting += 1
            if piece is not None:
                text += piece
                ends += [len(text)] * waiting
                waiting = 0
        return text, ends + [len(text)] * waiting


@contextlib.contextmanager
def errors_named(sentence: str):
    """DataError for whatever the tokenizers library raises on a broken file: a bare Exception, or a Rust panic."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise DataError(f"{sentence} ({' '.join(str(error).split())[:200]}): download it again") from None


def token_at(ends: list[int], offset: int) -> int:
    """The index of the token that holds the character at offset."""
    return next(i for i, end in enumerate(ends) if end > offset)


# --------------------------------------------------------------------------------------- JSONL records

def read_jsonl(path, limit: int = 0) -> list[tuple[int, dict]]:
    """(line number, record) of the lines of a JSONL file that are not blank, the first `limit` or all.

    Raises DataError, naming the line, for whatever is not a JSON object.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give the path of a JSONL file") from None
    records = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not 0 < limit <= len(records):
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=no_number)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} line {number} is not JSON ({error}): write one JSON object a line") from None
            if not isinstance(record, dict):
                raise DataError(f"{path} line {number} is not a JSON object: write {{...}} with the fields by name")
            records.append((number, record))
    if not records:
        raise DataError(f"{path} is empty: write one JSON object a line")
    return records


def no_number(name: str):
    raise ValueError(f"{name} is no value")  # NaN stands for a missing one where a table was exported


def text_field(record: dict, names: tuple[str, ...], where: str) -> str:
    """The first of the named fields, as text that can be encoded."""
    name = next((name for name in names if name in record), None)
    if name is None:
        raise DataError(f"{where} has no field {' or '.join(map(repr, names))}: add it")
    value = record[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError):
        raise DataError(f"{where}: {name!r} is not a text that can be encoded: make it a string") from None
    return value.strip()


def question_of(record: dict, where: str) -> str:
    question = text_field(record, ("prompt", "question"), where)
    if not question:
        raise DataError(f"{where}: the prompt is empty: fill it in or remove the line")
    return question


def solution_of(record: dict, where: str) -> tuple[str, str]:
    """(reasoning, answer) of a record. GSM8K has both in one field: reasoning with <<marks>>, "####", answer."""
    answer = text_field(record, ("answer",), where)
    reasoning = text_field(record, ("reasoning",), where) if "reasoning" in record else ""
    if "reasoning" not in record and "####" in answer:
        reasoning, _, answer = (part.strip() for part in re.sub(r"<<[^<>]*>>", "", answer).rpartition("####"))
    if not answer or "\n" in answer:
        raise DataError(f"{where}: the answer is {'empty' if not answer else 'longer than one line'}: give one line")
    return reasoning, answer


def load_labeled(path, text: Text, max_prompt: int, max_response: int,
                 limit: int = 0) -> tuple[list[tuple[list, list]], int]:
    """([(prompt ids, response ids)], how many were skipped as too long) of {"prompt", "reasoning", "answer"}."""
    records = []
    for number, record in read_jsonl(path, limit):
        where = f"{path} line {number}"
        question, (reasoning, answer) = question_of(record, where), solution_of(record, where)
        if "reasoning" not in record and not reasoning:
            raise DataError(f"{where} has no field 'reasoning': add it (or use GSM8K's form, '... #### 18')")
        records.append((text.prompt(question), text.response(reasoning, answer)))
    return keep_short(records, path, lambda r: len(r[0]) <= max_prompt and len(r[1]) <= max_response,
                      f"{max_prompt} prompt tokens and {max_response} response tokens")


def load_unlabeled(path, text: Text, max_prompt: int, limit: int = 0) -> tuple[list[list[int]], int]:
    """([prompt ids], how many were skipped) of {"prompt"}, repeated ones once. An answer is never looked at."""
    prompts = [text.prompt(question_of(record, f"{path} line {number}")) for number, record in read_jsonl(path, limit)]
    distinct = list(map(list, dict.fromkeys(map(tuple, prompts))))
    return keep_short(distinct, path, lambda p: len(p) <= max_prompt, f"{max_prompt} prompt tokens")


def load_eval(path, text: Text, max_prompt: int, limit: int = 0) -> tuple[list[tuple[list, str, str]], int]:
    """([(prompt ids, question, gold answer)], how many were skipped) of {"prompt", "answer"}."""
    records = []
    for number, record in read_jsonl(path, limit):
        where = f"{path} line {number}"
        question, (_, answer) = question_of(record, where), solution_of(record, where)
        records.append((text.prompt(question), question, answer))
    return keep_short(records, path, lambda r: len(r[0]) <= max_prompt, f"{max_prompt} prompt tokens")


def keep_short(records, path, fits, limit):
    kept = [record for record in records if fits(record)]
    if not kept:
        raise DataError(f"{path}: all {len(records)} records are longer than {limit}: raise the limits")
    return kept, len(records) - len(kept)


# ------------------------------------------------------------------- the toy task: triage by evidence

class Triage:
    """Findings that point to conditions, invented words in an invented table; nothing medical is meant.

    A query lists findings, most of which point to one condition; a trace says line by line what each points
    to, then names the condition that came up most. The base model learns from careless authors, who state a
    finding right less than half the time; of some findings a *popular misconception* is stated more often
    than the truth. So support for an answer rises as findings agree, and a trace that goes wrong can end
    confident and wrong: the disease that HyTuning is for.
    """
    FINDINGS, CONDITIONS, LISTED, AGREEING = 192, 8, 6, 4

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng([seed, 0])
        syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
        names = []
        while len(names) < self.FINDINGS + self.CONDITIONS:
            name = "".join(rng.choice(syllables, 3))
            if name not in names:
                names.append(name)
        self.findings, self.conditions = names[:self.FINDINGS], names[self.FINDINGS:]
        self.truth = rng.permutation(self.FINDINGS) % self.CONDITIONS  # what each finding points to
        # What careless authors state of each finding: probabilities over conditions, [FINDINGS, CONDITIONS].
        believed = np.full((self.FINDINGS, self.CONDITIONS), 0.0)
        for f, true in enumerate(self.truth):
            wrong = rng.choice([c for c in range(self.CONDITIONS) if c != true])
            p_true, p_wrong = (0.26, 0.54) if f % 3 == 0 else (0.50, 0.10)
            believed[f] = (1 - p_true - p_wrong) / (self.CONDITIONS - 2)
            believed[f, true], believed[f, wrong] = p_true, p_wrong
        self.believed = believed

    def query(self, rng) -> tuple[list[int], int]:
        """(findings, the condition that most of them point to); each other condition comes up once at most."""
        condition, *others = rng.permutation(self.CONDITIONS)[:1 + self.LISTED - self.AGREEING]
        agreeing = rng.choice(np.flatnonzero(self.truth == condition), self.AGREEING, replace=False)
        rest = [rng.choice(np.flatnonzero(self.truth == c)) for c in others]
        return list(rng.permutation([*agreeing, *rest])), int(condition)

    def question(self, findings) -> str:
        return "Findings:\n" + "\n".join(f"{i} {self.findings[f]}" for i, f in enumerate(findings, 1))

    def solution(self, findings, stated) -> tuple[str, str]:
        """(reasoning, answer) of an author who states these conditions: the one stated most, first of equals."""
        lines = [f"{i} {self.findings[f]} suggests {self.conditions[c]}"
                 for i, (f, c) in enumerate(zip(findings, stated), 1)]
        return "\n".join(lines), self.conditions[max(stated, key=list(stated).count)]

    def record(self, rng, careless: bool = False) -> dict:
        """A record with prompt, reasoning and answer, by a careful author or a careless one."""
        findings, _ = self.query(rng)
        stated = [rng.choice(self.CONDITIONS, p=self.believed[f]) if careless else self.truth[f] for f in findings]
        reasoning, answer = self.solution(findings, stated)
        return {"prompt": self.question(findings), "reasoning": reasoning, "answer": answer}

    def write(self, folder, seed: int = 0, traces: int = 16, queries: int = 2000, held_out: int = 200):
        """labeled.jsonl, unlabeled.jsonl, eval.jsonl; and tokenizer files, a word (or a sign) a token."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for number, (name, count, fields) in enumerate([("labeled", traces, ("prompt", "reasoning", "answer")),
                                                        ("unlabeled", queries, ("prompt",)),
                                                        ("eval", held_out, ("prompt", "answer"))], 1):
            rng = np.random.default_rng([seed, number])
            records = [self.record(rng) for _ in range(count)]
            lines = [json.dumps({field: record[field] for field in fields}) for record in records]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

        text = "\n".join(["Findings:", INSTRUCTION.format(marker=MARKER), *"123456", MARKER, "1 suggests",
                          " ".join(["", *self.findings, *self.conditions])])
        split = pre_tokenizers.Split(Regex(r" ?\w+|\s|[^\s\w]"), "isolated")
        words = dict.fromkeys(["<unk>", "<end>", *(word for word, _ in split.pre_tokenize_str(text))])
        words = {word: i for i, word in enumerate(words)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Fuse()
        tokenizer.add_special_tokens(["<unk>", "<end>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "unk_token": "<unk>"}))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": words["<end>"]}))
        return len(words), words["<end>"]
