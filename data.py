"""Text in, text out: answers, tokens, JSONL records, and a toy task.

A response is reasoning, one step a line, then a marker ("Answer:") and the answer on the same line.
Steps and answer are found in the response's own token ids: text that is encoded again may split
differently. On the toy task the method's effect can be seen in a minute on a laptop.

This file imports nothing of the project, so it can be taken alone. Next to read: model.py.

SPDX-License-Identifier: MIT
"""
import hashlib
import json
import re
import unicodedata
from fractions import Fraction
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

MARKER = "Answer:"
INSTRUCTION = 'Reason line by line, then end with the line "{marker} ...".'


class DataError(ValueError):
    """Unusable data. One sentence: what is wrong, in which file and line, what to do."""


# -----------------------------------------------------------------------------
# answers

def find_answer(text: str, marker: str = MARKER) -> tuple[int, int, int] | None:
    """Offsets of the last marker, of the answer's start and of its end; None without an answer.

    The answer is the rest of the marker's line. The marker counts in upper and lower case, between
    stars or underscores, and with a fullwidth colon: "**ANSWER**: 18", "Answer：18".
    """
    words = re.escape(marker.strip().rstrip(" :："))
    # The tokenizer may have composed or decomposed the letters.
    words = unicodedata.normalize("NFC", words) + "|" + unicodedata.normalize("NFD", words)
    pattern = f"[*_]{{0,3}}(?:{words})[*_]{{0,3}}"
    if marker.strip().endswith((":", "：")):
        pattern += r"[^\S\n]*[:：][*_]{0,3}"
    found = list(re.finditer(pattern, text, re.IGNORECASE))
    if not found:
        return None
    line = text[found[-1].end():].split("\n", 1)[0]
    answer = line.strip().strip("*").strip()
    if not answer:
        return None
    start = found[-1].end() + line.index(answer)
    return found[-1].start(), start, start + len(answer)


def extract_answer(text: str, marker: str = MARKER) -> str | None:
    """The text after the last marker, on its line; None without a marker or with nothing there."""
    found = find_answer(text, marker)
    if found is None:
        return None
    return text[found[1]:found[2]]


# How an answer looks, not what it says: (pattern, what it becomes), in this order.
REWRITE = [
    # Dashes that can be a minus, curly quotes, the slashes of fractions.
    (r"[\u2010-\u2015\u2212]", "-"),
    (r"[\u2018-\u201f]", "'"),
    (r"[\u2044\u2215]", "/"),
    # Markdown: bold, but not the power in 2**3, and code.
    (r"\*\*(?!\w)|(?<!\w)\*\*|`", ""),
    # LaTeX: spacing, wrappers, fractions (\frac12 and \frac{1}{2}), escaped signs; braces around
    # one word, since around more they may mean something.
    (r"\\[,;:!]", ""),
    (r"\\(?:boxed|text[a-z]*|math[a-z]*|left|right)(?![a-z])", ""),
    (r"\\[dt]?frac ?\{? ?(-?\d+|\d) ?\}? ?\{? ?(\d+) ?\}?", r" \1/\2"),
    (r"\\(?![a-z])", ""),
    (r"\{([\w.,-]*)\}", r"\1"),
    # US$ is $.
    (r"\b[a-z]{1,3}(?=\$)", ""),
]


def normalise(text: str) -> str:
    """The spelling in which answers are compared."""
    # NFKC would make 31/2 of 3½ and 52 of 5².
    text = re.sub("[¼-¾⅐-⅞]", r" \g<0>", text)
    text = re.sub("[²³¹⁰⁴-⁹]+", r"^\g<0>", text)
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    for pattern, replacement in REWRITE:
        text = re.sub(pattern, replacement, text)
    # Currency signs and invisible characters do not count.
    text = "".join(c for c in text if unicodedata.category(c) not in ("Sc", "Cf"))
    text = " ".join(text.split())
    # Nor does outer punctuation of any script, except what may begin a number.
    outer = "".join(c for c in text if unicodedata.category(c)[0] in "PZ")
    return text.rstrip(outer).lstrip(re.sub("[-.]", "", outer)) or text


# Thousands; then a sign, a number (1 1/4, 2/3, 10.5 or 1e-5), and the rest.
THOUSANDS = re.compile(r"\b\d{1,3}(?:[, ]\d{3})+(?!\d)")
NUMBER = re.compile(r"([-+]|minus)? ?"
                    r"((?:\d+ )?\d+ ?/ ?\d+|(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,3}(?!\d))?)(.*)")
# What makes another value of the number before it: scales, and mathematics such as 2x or 5 - a.
NO_UNIT = re.compile(r"\b(?:hundred|thousand|[mbtr]+illi(?:on|ard)|dozen|lakh|crore|squared|cubed)"
                     r"|\b(?:k|mn|bn|tn|pi|[xyzie]+)\b|[π百千万萬億亿]|- ")


def read_number(text: str) -> tuple[Fraction, str] | None:
    """(value, unit words) of a normalised text that is a number and at most unit words.

    Of an equation counts what follows the last "=" or "is". A list is no number.
    """
    if re.search(r"[,;] |\b(?:and|or)\b", text):
        return None
    text = re.sub(r"^[^<>≤≥≠≈!]*(?:=|\bis\b)", "", text).strip(" (")
    text = THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), text)
    match = NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, number, unit = match.groups()
    # Units are words of any script, with a slash or a power: apples, sq. ft., km/h, m^2.
    signs = re.sub(r"(?<=[^\W\d_])\^-?\d\b", "", unit)
    signs = "".join(c for c in signs if unicodedata.category(c)[0] not in "LM")
    if signs.strip(" /·°%(){}.'-") or NO_UNIT.search(unit):
        return None
    try:
        value = sum(Fraction(part) for part in re.sub(" ?/ ?", "/", number).split())
    except (ValueError, ZeroDivisionError):
        return None
    if sign in ("-", "minus"):
        value = -value
    return value, unit.strip()


def answers_match(a: str, b: str) -> bool:
    """Whether two answers say the same: as text, as a choice, or as numbers.

    As a choice, where one is a bare letter: "B" and "(B) Paris". As numbers, where one is bare or
    the units are the same: "$1,000", "1000.00" and "1000 dollars".
    """
    a, b = sorted((normalise(a), normalise(b)), key=len)
    if a == b:
        return True
    # A letter, a sign, and text after a space (or in another script). "a) and c)" are two choices.
    option = re.match(r"([^\W\d_])[).:\]}、]+(?: (?!and\b|or\b|\W+ )|[^\x00-\x7f])", b)
    if option and option[1] == a:
        return True
    first = read_number(a)
    second = read_number(b)
    if first is None or second is None or first[0] != second[0]:
        return False
    return first[1] == second[1] or "" in (first[1], second[1])


def number_answers(answers: list[str | None], group_size: int) -> list[int]:
    """A number for each answer, equal where two of a group say the same; -1 for an unreadable one.

    answers lists the groups one after the other. The number is the index in the group of the first
    answer that says the same. "5" says the same as "5 apples" and as "5 pears", which are not the
    same: the first one decides.
    """
    numbers = []
    for start in range(0, len(answers), group_size):
        group = answers[start:start + group_size]
        first = []
        for i, answer in enumerate(group):
            number = i if answer else -1
            for j in range(i):
                if first[j] == j and answer and answers_match(group[j], answer):
                    number = j
                    break
            first.append(number)
        numbers += first
    return numbers


def majority(answers: list[str | None]) -> tuple[str | None, float]:
    """The answer most often given, the earliest of equals, and its share of all votes.

    (None, 0.0) where no answer can be read.
    """
    votes = [number for number in number_answers(answers, len(answers) or 1) if number >= 0]
    if not votes:
        return None, 0.0
    best = max(votes, key=votes.count)
    return answers[best], votes.count(best) / len(answers)


# -----------------------------------------------------------------------------
# tokens

# The chat formats that special tokens give away, with {} for the user's turn, and what ends a turn.
CHATS = [
    ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
]
SPECIAL = re.compile(r"(<\|\w+\|>)")

# A token that we add for ourselves (no text has this character). Text is encoded after it and the
# token then cut off, since a tokenizer may treat the beginning of a text specially: SentencePiece
# puts a "▁" there.
ANCHOR = "\ufdd0"


def load_tokenizer(path: Path) -> tuple[Tokenizer, list[int]]:
    """(the tokenizer, the ids that it puts before a text by itself: none, or that of BOS)."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # A "<|im_end|>" in somebody's question is text.
        tokenizer.encode_special_tokens = True
        tokenizer.add_tokens([AddedToken(ANCHOR, normalized=False)])
        ids = tokenizer.encode(ANCHOR).ids
        first = ids[:ids.index(tokenizer.token_to_id(ANCHOR))]
        if not tokenizer.encode(INSTRUCTION + " é漢", add_special_tokens=False).ids:
            raise ValueError("it has no token for any text")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # The library raises bare Exceptions, and Rust panics, which are no Exceptions.
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is no usable tokenizer ({reason}): use the model's own") from None
    return tokenizer, first


def chat_template(folder: Path) -> str:
    """The folder's own chat template; "" where it has none."""
    try:
        if (folder / "chat_template.jinja").is_file():
            return (folder / "chat_template.jinja").read_text()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        return str(config.get("chat_template") or "")
    except (OSError, ValueError, AttributeError):
        return ""


class Text:
    """A checkpoint folder's tokenizer, with the prompt format that its special tokens show.

    `end` is the id that training ends responses with; `ends` are all ids that end one, this and
    `eos_ids`, the model's own. Raises DataError where tokenizer.json is missing or broken, or no
    id is known to end a response.
    """

    def __init__(self, folder, eos_ids=(), marker: str = MARKER, max_reasoning_steps: int = 16):
        self.marker = marker
        self.max_reasoning_steps = max_reasoning_steps
        self.tokenizer, self.first = load_tokenizer(Path(folder) / "tokenizer.json")
        vocab = self.tokenizer.get_vocab()
        del vocab[ANCHOR]
        self.vocab_size = max(vocab.values()) + 1
        self.template = None
        self.end = next(iter(eos_ids), None)
        for template, end in CHATS:
            ids = [self.tokenizer.token_to_id(token) for token in SPECIAL.findall(template)]
            if None not in ids:
                self.template = template
                self.end = self.tokenizer.token_to_id(end)
                own = chat_template(Path(folder))
                if own and "bos_token" not in own:
                    self.first = []
                break
        if self.end is None:
            raise DataError(f"{folder} names no end token: set eos_token_id in its config.json")
        self.end_ids = {self.end, *eos_ids}

    def encode(self, text: str, after: str = "\n") -> list[int]:
        """Token ids of a text that follows the text `after`, or, if that is "", a special token."""
        before = self.tokenizer.encode(ANCHOR + after, add_special_tokens=False).ids
        ids = self.tokenizer.encode(ANCHOR + after + text, add_special_tokens=False).ids
        if ids[:len(before)] != before:
            # A token straddles the boundary: encode the text as it is.
            return self.encode(text, after="")
        return ids[len(before):]

    def prompt(self, question: str) -> list[int]:
        """Token ids of a question with the instruction, up to where the response begins."""
        asked = f"{question.strip()}\n{INSTRUCTION.format(marker=self.marker)}"
        if self.template is None:
            ids = self.tokenizer.encode(asked + "\n", add_special_tokens=False).ids
        else:
            ids = []
            for piece in SPECIAL.split(self.template):
                if SPECIAL.match(piece):
                    ids.append(self.tokenizer.token_to_id(piece))
                else:
                    ids += self.encode(piece.replace("{}", asked), after="")
        # BOS once, also where the chat format begins with it.
        if ids[:len(self.first)] != self.first:
            ids = self.first + ids
        return ids

    def response(self, reasoning: str, answer: str) -> list[int]:
        """Token ids of a supervised response, the end token included."""
        lines = [line.strip() for line in reasoning.splitlines() if line.strip()]
        lines.append(f"{self.marker} {answer}")
        return self.encode("\n".join(lines)) + [self.end]

    def decode(self, ids: list[int]) -> str:
        """The text of ids without the end tokens, which some tokenizers would show."""
        return self.tokenizer.decode([i for i in ids if i not in self.end_ids])

    def read(self, response: list[int]) -> tuple[str, list[int]]:
        """(the text of a response, the offset in it where each token ends), the end token left out.

        Tokens that share a character of several bytes all end where it does. A response that was
        cut off, or holds bytes that are no text, reads as "".
        """
        text = ""
        ends = []
        if not response or response[-1] not in self.end_ids or "\ufffd" in self.decode(response):
            return text, ends
        stream = decoders.DecodeStream(skip_special_tokens=True)
        waiting = 0
        for i in response[:-1]:
            waiting += 1
            piece = stream.step(self.tokenizer, i)
            if piece is not None:
                text += piece
                ends += [len(text)] * waiting
                waiting = 0
        return text, ends + [len(text)] * waiting

    def answer(self, response: list[int]) -> str | None:
        """The answer of a response; None if it was cut off or has none."""
        text, _ = self.read(response)
        return extract_answer(text, self.marker)

    def parse(self, prompt: list[int], response: list[int]) -> tuple[list, list, int, int]:
        """(tokens, cuts, answer_start, answer_end): where steps, marker and answer stand.

        tokens is prompt + response. Step k is tokens[cuts[k]:cuts[k + 1]], the marker is
        tokens[cuts[-1]:answer_start] and the answer tokens[answer_start:answer_end]. Steps are the
        lines before the last marker that are not blank, merged evenly down to max_reasoning_steps. Without an
        answer there are no steps, and answer_start = answer_end = len(tokens).
        """
        tokens = prompt + response
        text, ends = self.read(response)
        found = find_answer(text, self.marker)
        if found is None:
            return tokens, [len(prompt)], len(tokens), len(tokens)
        marker_start, answer_start, answer_end = found

        # A line begins with its first character that is not blank.
        lines = [match.start() for match in re.finditer(r"\S.*", text[:marker_start])]
        steps = min(len(lines), self.max_reasoning_steps)
        cuts = {0}
        for k in range(1, steps):
            cuts.add(token_at(ends, lines[k * len(lines) // steps]))
        if lines:
            cuts.add(token_at(ends, marker_start))
        cuts = [len(prompt) + cut for cut in sorted(cuts)]

        # The answer ends with the last token of its last character.
        last = ends[token_at(ends, answer_end - 1)]
        start = len(prompt) + token_at(ends, answer_start)
        stop = len(prompt) + token_at(ends, last)
        return tokens, cuts, start, stop


def token_at(ends: list[int], offset: int) -> int:
    """The index of the first token whose text ends after the character at offset."""
    return int(np.searchsorted(ends, offset, side="right"))


# -----------------------------------------------------------------------------
# JSONL records

def read_jsonl(path, limit: int = 0) -> list[tuple[int, dict]]:
    """(line number, record) of the lines of a file that are not blank, the first `limit` or all.

    Numbers are returned as they are written, as strings. Raises DataError, naming the line, for
    whatever is not a JSON object.
    """
    try:
        content = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a JSONL file") from None
    records = []
    # Of bytes, splitlines knows no line ends but \n, \r\n and \r: U+2028 may stand in a string.
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            numbers = dict(parse_int=str, parse_float=finite, parse_constant=finite)
            record = json.loads(line.decode(), **numbers)
            if not isinstance(record, dict):
                raise ValueError("fields must have names")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {number} is no JSON object ({error}): mend it") from None
        records.append((number, record))
        if len(records) == limit:
            break
    if not records:
        raise DataError(f"{path} is empty: write one JSON object a line")
    return records


def checksum(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def finite(number: str) -> str:
    """The number as it is written. An exported table may say NaN for a missing value."""
    if not np.isfinite(float(number)):
        raise ValueError(f"{number} is not a finite number")
    return number


def text_field(record: dict, name: str, where: str) -> str:
    """A text, which must be there. "question" stands for "prompt"."""
    if name == "prompt" and "prompt" not in record and "question" in record:
        name = "question"
    text = record.get(name)
    # Half of a surrogate pair cannot be encoded.
    if not isinstance(text, str) or not text.strip() or re.search("[\ud800-\udfff]", text):
        raise DataError(f"{where}: {name!r} is missing, empty or no text: fill it in")
    return text.replace(ANCHOR, "").strip()


def solution_of(record: dict, where: str) -> tuple[str, str]:
    """(reasoning, answer) of a record, "" for no reasoning.

    GSM8K has both in one field: reasoning with <<calculator marks>>, "####", the answer.
    """
    reasoning = ""
    answer = text_field(record, "answer", where)
    if "reasoning" in record:
        reasoning = text_field(record, "reasoning", where)
    elif "####" in answer:
        reasoning, _, answer = re.sub(r"<<[^<>]*>>", "", answer).rpartition("####")
    answer = answer.strip()
    if not answer or "\n" in answer:
        raise DataError(f"{where}: the answer is not one line of text: make it one")
    return reasoning.strip(), answer


def load_labeled(path, text: Text, max_prompt: int, max_response: int, limit: int = 0):
    """([(prompt ids, response ids)], number skipped) of {"prompt", "reasoning", "answer"}."""
    kept = []
    records = read_jsonl(path, limit)
    for number, record in records:
        where = f"{path} line {number}"
        prompt = text.prompt(text_field(record, "prompt", where))
        reasoning, answer = solution_of(record, where)
        if not reasoning:
            raise DataError(f"{where} has no 'reasoning': add it, or write GSM8K's '... #### 18'")
        response = text.response(reasoning, answer)
        found = text.answer(response)
        if found is None or not answers_match(found, answer):
            raise DataError(f"{where}: the answer {answer!r} would be read as {found!r}: change it")
        if len(prompt) <= max_prompt and len(response) <= max_response:
            kept.append((prompt, response))
    return kept, skipped(records, kept, path)


def load_unlabeled(path, text: Text, max_prompt: int, limit: int = 0):
    """([prompt ids], number skipped) of {"prompt"}, repeated ones once. An answer is never read."""
    prompts = {}
    for number, record in read_jsonl(path, limit):
        question = text_field(record, "prompt", f"{path} line {number}")
        prompts[tuple(text.prompt(question))] = None
    kept = [list(prompt) for prompt in prompts if len(prompt) <= max_prompt]
    return kept, skipped(prompts, kept, path)


def load_eval(path, text: Text, max_prompt: int, limit: int = 0):
    """([(prompt ids, question, gold answer)], number skipped) of {"prompt", "answer"}."""
    kept = []
    records = read_jsonl(path, limit)
    for number, record in records:
        where = f"{path} line {number}"
        question = text_field(record, "prompt", where)
        _, answer = solution_of(record, where)
        prompt = text.prompt(question)
        if len(prompt) <= max_prompt:
            kept.append((prompt, question, answer))
    return kept, skipped(records, kept, path)


def skipped(records: list, kept: list, path) -> int:
    """How many records were skipped as too long; DataError if all were."""
    if not kept:
        raise DataError(f"{path}: all {len(records)} records are longer than the limit: raise it")
    return len(records) - len(kept)


# -----------------------------------------------------------------------------
# the toy task: triage by evidence

class Triage:
    """Findings that point to conditions: invented words, nothing medical is meant.

    A query lists findings, most of which point to one condition. A trace says line by line what
    each points to, then names the condition that came up most. The base model learns from careless
    authors, whose lines are right less than half the time; of every third finding they state a
    *popular misconception* more often than the truth. And a third of them conclude nothing: they
    name one condition that is in fashion, whatever their lines say. So there are answers that are
    given with confidence and were not earned, which is what HyTuning is made for.
    """
    FINDINGS, CONDITIONS = 192, 8
    # In a query, and of these how many point to its condition.
    LISTED, AGREEING = 6, 4
    # The share of careless authors who name the first condition, whatever their lines say.
    FASHION = 1 / 3

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng([seed, 0])
        syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
        names = []
        while len(names) < self.FINDINGS + self.CONDITIONS:
            name = "".join(rng.choice(syllables, 3))
            if name not in names:
                names.append(name)
        self.findings = names[:self.FINDINGS]
        self.conditions = names[self.FINDINGS:]
        # The condition that each finding points to: [FINDINGS].
        self.truth = rng.permutation(self.FINDINGS) % self.CONDITIONS
        # How often careless authors state each condition of a finding: [FINDINGS, CONDITIONS].
        self.believed = np.zeros((self.FINDINGS, self.CONDITIONS))
        for finding, true in enumerate(self.truth):
            wrong = rng.choice([c for c in range(self.CONDITIONS) if c != true])
            p_true, p_wrong = 0.50, 0.10
            if finding % 3 == 0:
                p_true, p_wrong = 0.26, 0.54
            self.believed[finding] = (1 - p_true - p_wrong) / (self.CONDITIONS - 2)
            self.believed[finding, true] = p_true
            self.believed[finding, wrong] = p_wrong

    def query(self, rng) -> list[int]:
        """Findings of which AGREEING point to one condition, each of the rest to another one."""
        condition, *others = rng.permutation(self.CONDITIONS)[:1 + self.LISTED - self.AGREEING]
        pointing = np.flatnonzero(self.truth == condition)
        listed = list(rng.choice(pointing, self.AGREEING, replace=False))
        for other in others:
            listed.append(rng.choice(np.flatnonzero(self.truth == other)))
        return list(rng.permutation(listed))

    def record(self, rng, careless: bool = False) -> dict:
        """A record with prompt, reasoning and answer, by a careful author or a careless one."""
        findings = ["Findings:"]
        reasoning = []
        stated = []
        for i, finding in enumerate(self.query(rng), 1):
            condition = self.truth[finding]
            if careless:
                condition = rng.choice(self.CONDITIONS, p=self.believed[finding])
            stated.append(self.conditions[condition])
            findings.append(f"{i} {self.findings[finding]}")
            reasoning.append(f"{i} {self.findings[finding]} suggests {stated[-1]}")
        # The condition stated most often, the first of equals.
        answer = max(stated, key=stated.count)
        if careless and rng.random() < self.FASHION:
            answer = self.conditions[0]
        return {"prompt": "\n".join(findings), "reasoning": "\n".join(reasoning), "answer": answer}

    def write(self, folder, seed=0, traces=16, queries=2000, held_out=200) -> tuple[int, int]:
        """Write labeled, unlabeled and eval.jsonl, and a tokenizer; (vocab_size, end_id) of it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = [("labeled", traces, ["prompt", "reasoning", "answer"]),
                 ("unlabeled", queries, ["prompt"]),
                 ("eval", held_out, ["prompt", "answer"])]
        for number, (name, count, fields) in enumerate(files, 1):
            rng = np.random.default_rng([seed, number])
            with open(folder / f"{name}.jsonl", "w") as file:
                for _ in range(count):
                    record = self.record(rng)
                    file.write(json.dumps({field: record[field] for field in fields}) + "\n")
        return self.write_tokenizer(folder)

    def write_tokenizer(self, folder: Path) -> tuple[int, int]:
        """A tokenizer with a token for each word (with the space before it) and each sign."""
        instruction = INSTRUCTION.format(marker=MARKER)
        names = " ".join(["", *self.findings, *self.conditions])
        text = "\n".join(["Findings:", instruction, *"123456", MARKER, "1 suggests", names])
        split = pre_tokenizers.Split(Regex(r" ?\w+|\s|[^\s\w]"), "isolated")
        words = ["<unk>", "<end>"] + [word for word, _ in split.pre_tokenize_str(text)]
        vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = split
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens(["<unk>", "<end>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        end = vocab["<end>"]
        names = {"tokenizer_class": "PreTrainedTokenizerFast",
                 "eos_token": "<end>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
        return len(vocab), end
