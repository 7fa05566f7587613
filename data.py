"""Answers, prompts and responses as text and as token ids, JSONL records, and a toy task.

A response has one reasoning step per line and ends with a marker ("Answer:" or "\\boxed{") and the
answer. Both are located in its own token ids, because encoding its text again may give others.

This file is self-contained; copy it freely. Read model.py next.

SPDX-License-Identifier: MIT
"""
import json
import re
import unicodedata
from collections import Counter
from datetime import datetime
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

MARKER = "Answer:"
INSTRUCTION = 'Think step by step, then end with the line "{marker} <answer>".'


class DataError(ValueError):
    """Data or a tokenizer cannot be used. The message says what is wrong, where, and what to do."""


# -----------------------------------------------------------------------------
# answers

def find_answer(text: str, marker: str = MARKER) -> tuple[int, int, int] | None:
    r"""Return (marker start, answer start, answer end) in characters, or None without an answer.

    The answer is the rest of the line after the last marker, which is also found in upper and lower
    case, in bold and with a fullwidth colon: "**ANSWER**: 18", "Answer：18". Without a marker, or if
    nothing follows it on its line, the answer is the content of the last closed \boxed{...} (after
    it), and "\boxed{" is the marker. Thoughts, which end with "</think>", do not count.
    """
    start = text.rfind("</think>") + 1
    if "<think>" in text[start:]:
        return None
    name = re.escape(marker.strip().rstrip(" :："))
    colon = ""
    if marker.strip().endswith((":", "：")):
        colon = r"[^\S\n]*[:：]"
    pattern = re.compile(rf"(?i)\*{{0,3}}{name}\*{{0,3}}{colon}\*{{0,3}}")
    answer = ""
    markers = list(pattern.finditer(text, start))
    if markers:
        marker_start, start = markers[-1].span()
        line = text[start:].partition("\n")[0].strip()
        # The answer is in bold, as in "Answer: **18**", or the whole line, as in "**Answer: 18**".
        answer = re.sub(r"^(?:\*\*)?([^*]*)\*\*$", r"\1", line).strip()
    if not answer:
        marker_start, start, answer = find_box(text, start)
    if not answer:
        return None
    start = text.index(answer, start)
    return marker_start, start, start + len(answer)


def find_box(text: str, start: int) -> tuple[int, int, str]:
    r"""Return (start, content start, content) of the last closed \boxed{...} after `start`."""
    box = (start, start, "")
    opened = []
    for brace in re.compile(r"\\boxed\{|\\.|[{}]").finditer(text, start):  # \\. skips \{ and \}
        if brace[0] in ("{", r"\boxed{"):
            opened.append(brace)
        elif brace[0] == "}" and opened:
            first = opened.pop()
            if first[0] != "{":
                box = (first.start(), first.end(), text[first.end():brace.start()].strip())
    return box


def extract_answer(text: str, marker: str = MARKER) -> str | None:
    """Return the answer that `find_answer` finds in the text, or None."""
    found = find_answer(text, marker)
    if found is None:
        return None
    return text[found[1]:found[2]]


# (pattern, replacement) pairs that change only the form of an answer.
FORMS = [
    (r"(?<![.\s]) ?[.。]$", ""),  # a final full stop
    (r"""^(["'])((?:(?!\1).)+)\1$|^<([^<>]+)>$""", r"\2\3"),  # quotes or <> around it
    (r"(?<![\w*`])(\*\*|`)([^*`]+)\1(?![\w*`])", r"\2"),  # Markdown's **bold** and `code`
    # LaTeX's $...$, \(...\) and \[...\]
    (r"(?<![\w$\\])(\$\$?)((?:[^$\\]|\\.)+)\1(?![\w$])", r"\2"),
    (r"(?<!\\)\\[()\[\]]|\\(?:left|right)(?= ?[()\[\]{}|.\\])", ""),
    (r"\\(?:boxed|text|textbf|textit|mathrm)\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1 "),
    (r"\{,\}|,\\!", ","),  # thousands
    (r"\\[,;:]", " "),  # spaces
    (r"\\([$%])", r"\1"),
    (r"^(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3"),
    (r"(?<=\d) ?%", " percent"),
    # Spaces inside brackets, but not in (1, 234), since (1,234) may be one number.
    (r"(?<=[(\[{]) | (?=[)\]}])|(?<=,) (?!\d{3}(?!\d))(?=[^()\[\]{}]{0,99}[)\]}])", ""),
]
FULLWIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
DASHES_AND_QUOTES = str.maketrans("‐‑‒–—―−‘’“”", "-------''\"\"")
INVISIBLE = r"[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
# A word whose case does not count: Paris and PARIS, but not mRNA, \Delta or the unit in "5 Cal".
PLAIN_WORD = r"(?<!\\)(?<!\d )\b(?!\w*[a-z][A-Z])(?:[^\W\d_]{3,}|No)\b"

# Words that change the number or the choice before them, in whole or by their first letters.
CHANGING = (
    r"(?:and|but|cannot|grand|mod|neither|never|nor|not|point|root|tens?|times|too|was)\b|wrong"
    r"|false|incorrect|excluded|ruled|eliminated|plus|minus|below|squared|cubed|factorial|half|halv"
    r"|third|quarter|pair|couple|score|dozen|hundred|thousand|lakh|crore|[a-z]*illi(?:on|ard)|zero"
    r"|one|two|three|thirt|four|fort[iy]|fi[fv]|six|seven|eigh|nin[et]|tenth|elev|twel|twen")
WORD = (rf"(?!(?i:{CHANGING}))"
        "(?:[A-Za-zà-ÿ][a-zà-ÿ]{2,}(?:'s)?|of|in|[cmk][gm]|km/h|[€£¥₹°])(?![^ ,)])")
WORDS = rf"{WORD}(?:,? {WORD})*"
CHOICE = rf"(?:option )?(?:\(?([A-Ja-j])\)(?: {WORDS})?|([A-J]))"  # such as "B) Paris"
OPTION = rf"\(?([A-J])(?:[.:)] | \()(?:-?\$?[\d.,/]+|{WORDS})\)?"  # such as "B. 18"
# Sign, currency sign, number without leading zeros, and unit or other words.
FRACTION = r"[1-9]\d* ?/ ?[1-9]\d*$"
DECIMAL = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d*|0|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d{1,3})?"
NUMBER = rf"([-+]?) ?([$€£¥₹]?) ?({FRACTION}|{DECIMAL})( ?[€£¥₹°]| .*|)"


def canonical(answer: str) -> str:
    r"""Return the form in which answers are compared: equal forms are the same answer.

    1. Width, spaces, invisible characters, kinds of dashes and quotes, a final full stop, quotes
       around the answer, Markdown's bold and code, and LaTeX that only formats do not count.
    2. Case counts only in short or mixed words (mW, mRNA), after a number and in LaTeX commands.
    3. A choice from A to J is its letter: "(b)", "B." and "B) Paris" are B; "(B) is wrong" is not.
    4. A number is its value: "$1,000.00" is 1e3; "3/4" and \frac{3}{4} are 0.75.
    5. All other text is a part of the answer, also a unit: "5 cm" is neither 5 nor "5 m".

    In doubt, answers differ: a wrong match rewards an error, while a missed match loses a vote.
    """
    text = re.sub(INVISIBLE, "", unicodedata.normalize("NFC", answer))
    text = text.translate(FULLWIDTH | DASHES_AND_QUOTES)
    for _ in range(3):  # Forms may be nested, as in $\boxed{\text{B}}$.
        for pattern, replacement in FORMS:
            text = " ".join(re.sub(pattern, replacement, text).split())
    text = re.sub(PLAIN_WORD, lambda word: word[0].lower(), text)
    choice = re.fullmatch(CHOICE, text)
    if choice:
        return (choice[1] or choice[2]).upper()
    number = re.fullmatch(NUMBER, text)
    if number and len(text) < 200:
        sign, currency, digits, unit = number.groups()
        value = Fraction(re.sub("[, ]", "", sign + digits))
        text = " ".join(f"{value} {currency.replace('$', '')} {unit}".split())
    return text


def answers_match(answer: str, gold: str) -> bool:
    """Return whether an answer has the same canonical form as the gold answer.

    Words may stand behind a bare number or letter that is the gold answer: "72 clips", "25%" and
    "B. Paris" match 72, 25 and B, unless they change its meaning, as in "5 hundred".
    """
    form = canonical(answer)
    expected = canonical(gold)
    if form == expected:
        return form != ""
    if re.fullmatch(r"[-+]?[\d.,/]+", gold.strip()):
        return bool(re.fullmatch(rf"{re.escape(expected)} {WORDS}", form))
    option = re.fullmatch(OPTION, form)
    return bool(option) and option[1] == expected


def number_answers(answers: list[str | None], group_size: int) -> list[int]:
    """Give equal answers within a group of `group_size` the same number, and -1 to no answer."""
    numbers = []
    for i, answer in enumerate(answers):
        if i % group_size == 0:
            known = {"": -1}
        numbers.append(known.setdefault(canonical(answer or ""), len(known) - 1))
    return numbers


def majority(answers: list[str | None]) -> tuple[str | None, float]:
    """Return the most common answer (the first of several) and its share of all, or (None, 0.0)."""
    forms = [canonical(answer or "") for answer in answers]
    votes = Counter(form for form in forms if form)
    if not votes:
        return None, 0.0
    form, count = votes.most_common(1)[0]
    return answers[forms.index(form)], count / len(answers)


# -----------------------------------------------------------------------------
# prompts and responses

# Unicode never assigns these characters, so texts do not use them. START is added to the tokenizer:
# text is encoded after it, because tokenizers may treat the beginning of a text differently.
# QUESTION and ANSWER are placeholders for the messages in a rendered chat template.
START, QUESTION, ANSWER = "\ufdd0", "\ufdd1", "\ufdd2"


def render_chat(folder: Path, date: datetime) -> tuple[str, str] | None:
    """Render the folder's chat template with QUESTION and ANSWER: (prompt, conversation).

    The prompt ends where the assistant's turn begins. The template gets what `transformers` gives
    it. Returns None if the folder has no template. Raises DataError if it cannot be rendered.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    variables = {"tools": None, "documents": None, "strftime_now": date.strftime,
                 "raise_exception": raise_exception}
    texts = []
    try:
        for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            path = folder / name
            texts.append(path.read_text(encoding="utf-8") if path.is_file() else "")
        config = json.loads(texts[0] or "{}")
        if "added_tokens_decoder" not in config:
            config.update(json.loads(texts[1] or "{}"))
        source = texts[2] or config.get("chat_template")
        if isinstance(source, list):
            source = {named["name"]: named["template"] for named in source}["default"]
        if not source:
            return None
        for name, token in config.items():
            if isinstance(token, dict):  # A special token is a string, or has it as "content".
                token = token.get("content")
            if name.endswith("_token") and isinstance(token, str):
                variables[name] = token
        # {% generation %} and {% endgeneration %} mark the assistant's text and print nothing.
        source = re.sub(r"(\{%[-+]?\s*)(?:end)?generation\b", r"\1set _ = 0", source)
        template = environment.from_string(source)
        messages = [{"role": "user", "content": QUESTION}]
        prompt = template.render(messages=messages, add_generation_prompt=True, **variables)
        messages.append({"role": "assistant", "content": ANSWER})
        conversation = template.render(messages=messages, add_generation_prompt=False, **variables)
        if QUESTION not in prompt:
            raise ValueError("it leaves out the user's message")
    except Exception as error:  # A template may raise anything.
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"the chat template in {folder} cannot be used ({reason}): correct it in "
                        "chat_template.jinja or tokenizer_config.json") from None
    return prompt, conversation


class Text:
    """Converts between text and token ids with a checkpoint's tokenizer and chat template.

    Without a chat template, `chat` is None and a prompt is plain text. A template prints `date`, by
    default the present. `end` is the id that ends a supervised response: the special token that the
    template puts after an answer, or else the first of `eos_ids`, the model's own end tokens. Any
    of `end_ids` ends a response. Raises DataError if a file cannot be used or has no end token.
    """

    def __init__(self, folder, eos_ids=(), marker: str = MARKER, date: datetime | None = None):
        self.marker = marker
        path = Path(folder) / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
            self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
            self.tokenizer.encode_special_tokens = True
            self.tokenizer.add_tokens([AddedToken(START, normalized=False)])
            self.start = self.tokenizer.token_to_id(START)
            ids = self.tokenizer.encode(START).ids
            self.bos = ids[:ids.index(self.start)]
        except Exception as error:  # The library raises plain Exceptions.
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path} cannot be used ({reason}): use the model's own file") from None
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {i for i, token in added.items() if token.special}

        self.chat = None
        self.before_response = "\n"
        self.before_reasoning = ""
        self.before_answer = ""
        end_ids = list(eos_ids)
        rendered = render_chat(Path(folder), date or datetime.now())
        if rendered is not None:
            self.chat, conversation = rendered
            if not self.chat.endswith("\n"):
                self.before_response = ""
            before, _, after = conversation.partition(ANSWER)
            ends = [i for i in self.special if after.lstrip().startswith(added[i].content)]
            end_ids = ends + end_ids
            # The prompt may open a block of thoughts, or the template put one before an answer.
            if self.chat.rstrip().endswith("<think>"):
                self.before_answer = "</think>\n\n"
            elif before.removeprefix(self.chat).lstrip().startswith("<think>"):
                self.before_reasoning = "<think>\n"
                self.before_answer = "</think>\n\n"
        if not end_ids:
            raise DataError(f"{folder} has no end token: set eos_token_id in its config.json")
        self.end = end_ids[0]
        self.end_ids = set(end_ids)

    def encode(self, text: str, after: str) -> list[int]:
        """Return the ids of a text that follows `after`; "" means that it follows a special token.

        A special token that is spelled out in the text is encoded as text.
        """
        before = self.tokenizer.encode(START + after, add_special_tokens=False).ids
        ids = self.tokenizer.encode(START + after + text, add_special_tokens=False).ids
        if ids[:len(before)] != before:
            # If a token crosses the boundary, encode the text by itself.
            return self.encode(text, after="")
        return ids[len(before):]

    def encode_prompt(self, question: str) -> list[int]:
        """Return the ids of a question and the instruction, up to the start of the response."""
        asked = f"{question.strip()}\n{INSTRUCTION.format(marker=self.marker)}"
        if self.chat is None:
            return self.bos + self.tokenizer.encode(asked + "\n", add_special_tokens=False).ids
        for i in self.special:
            # START breaks up a special token that is spelled out in the question.
            token = self.tokenizer.id_to_token(i)
            asked = asked.replace(token, token[0] + START + token[1:])
        text = self.chat.replace(QUESTION, asked)
        self.tokenizer.encode_special_tokens = False
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        self.tokenizer.encode_special_tokens = True
        return [i for i in ids if i != self.start]

    def encode_response(self, reasoning: str, answer: str) -> list[int]:
        """Return the ids of a supervised response with its end token, but without blank lines.

        If the chat template has a block of thoughts, the reasoning is in it.
        """
        lines = [line.rstrip() + "\n" for line in reasoning.splitlines() if line.strip()]
        lines = [self.before_reasoning, *lines, self.before_answer]
        text = "".join(lines) + f"{self.marker} {answer}"
        return self.encode(text, after=self.before_response) + [self.end]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids without the end tokens, which some tokenizers would show."""
        return self.tokenizer.decode([i for i in ids if i not in self.end_ids])

    def read(self, response: list[int]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a response ("" if it was cut off or has invalid UTF-8), and (first,
        end) of each character, which comes from response[first:end]."""
        text = ""
        places = []
        ended = bool(response) and response[-1] in self.end_ids
        if ended and "\ufffd" not in self.decode(response):
            stream = decoders.DecodeStream(skip_special_tokens=True)
            first = 0
            for end, i in enumerate(response[:-1], 1):
                piece = stream.step(self.tokenizer, i)
                if piece:
                    text += piece
                    places += [(first, end)] * len(piece)
                    first = end
        return text, places

    def parse(self, prompt: list[int], response: list[int]) -> tuple[tuple, str | None]:
        """Return ((tokens, cuts, answer_start, answer_end), answer): a `prg.Trace` and its answer.

        tokens is prompt + response. Step k is tokens[cuts[k - 1]:cuts[k]], the marker is
        tokens[cuts[-1]:answer_start] and the answer is tokens[answer_start:answer_end]. Steps are
        the lines before the marker with a letter or a digit, except for earlier answers and words
        on the marker's own line, which belong to the step before them. What stands between the last
        step and the marker, such as "</think>" or "$", belongs to the marker. Without an answer, or
        if the response was cut off, there are no steps, answer_start = answer_end = len(tokens),
        and the answer is None.
        """
        tokens = prompt + response
        text, places = self.read(response)
        found = find_answer(text, self.marker)
        if found is None or (self.before_answer and "</think>" not in text):
            return (tokens, [len(prompt)], len(tokens), len(tokens)), None
        marker_start, answer_start, answer_end = found

        # A line begins at its first character that is not whitespace.
        lines = re.finditer(r"\S.*", text[:marker_start])
        lines = [line for line in lines if not re.fullmatch(r"[\W_]*|</?think>", line[0])]
        cuts = {0}
        if lines:
            marker = re.compile(r"\S").search(text, lines[-1].end())
            # Before a box, the words on its own line may be reasoning.
            last = marker_start
            if text[marker_start] != "\\":
                last = text.rfind("\n", 0, marker_start)
            for line in lines[1:]:
                if line.start() <= last and not find_answer(line[0], self.marker):
                    cuts.add(places[line.start()][0])
            cuts.add(places[marker.start()][0])
        cuts = [len(prompt) + cut for cut in sorted(cuts)]
        first = len(prompt) + places[answer_start][0]
        end = len(prompt) + places[answer_end - 1][1]
        return (tokens, cuts, first, end), text[answer_start:answer_end]


# -----------------------------------------------------------------------------
# JSONL records

def read_jsonl(path):
    """Yield ("PATH line NUMBER", record) of each line that is not blank, with numbers as strings.

    Raises DataError if the file cannot be read, or if a line is not a JSON object.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = json.loads(line, parse_int=str, parse_float=str)
                if not isinstance(record, dict):
                    raise ValueError("it has no named fields")
                yield f"{path} line {number}", record
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a JSONL file") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)  # without JSONDecodeError's own line number
        raise DataError(f"{path} line {number} is not a JSON object ({reason}): write one object "
                        "on each line, in UTF-8") from None


def text_field(record: dict, name: str, where: str) -> str:
    """Return a text field ("question" may replace "prompt"). Raises DataError if it has no text."""
    if name == "prompt" and "prompt" not in record and "question" in record:
        name = "question"
    text = record.get(name)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: {name!r} is {text!r:.50}, but must be a string with some text "
                        f"(the fields are {', '.join(record) or 'none'}): correct it")
    # "?" replaces half of a surrogate pair, which cannot be encoded.
    return text.replace(START, "").encode(errors="replace").decode()


def solution_of(record: dict, where: str) -> tuple[str, str]:
    """Return (reasoning or "", answer). In GSM8K, "answer" has both: reasoning with <<calculator
    annotations>>, "####", the answer."""
    reasoning = ""
    answer = text_field(record, "answer", where)
    if record.get("reasoning"):
        reasoning = text_field(record, "reasoning", where)
    elif "####" in answer:
        reasoning, _, answer = re.sub(r"<<[^<>]*>>", "", answer).rpartition("####")
    answer = answer.strip()
    if not answer or "\n" in answer:
        raise DataError(f"{where}: 'answer' is not one line of text: make it one line")
    return reasoning, answer


def load_labeled(path, text: Text, max_prompt: int, max_response: int, limit: int = 0):
    """Return ([(prompt ids, response ids)], note) from a file of supervised traces.

    This note and those below are "", or say which records were skipped as too long.
    """
    pairs = []
    for where, record in islice(read_jsonl(path), limit or None):
        prompt = text.encode_prompt(text_field(record, "prompt", where))
        reasoning, answer = solution_of(record, where)
        if not reasoning.strip():
            raise DataError(f"{where} has no 'reasoning' (the fields are {', '.join(record)}): add "
                            "it, or use GSM8K's '... #### 18'")
        response = text.encode_response(reasoning, answer)
        _, found = text.parse(prompt, response)
        if canonical(found or "") != canonical(answer):
            raise DataError(f"{where}: the answer {answer!r} would be read as {found or ''!r}: "
                            "rephrase it")
        pairs.append((prompt, response))
    return keep_short(path, pairs, max_prompt, max_response)


def load_unlabeled(path, text: Text, max_prompt: int):
    """Return ([prompt ids], note) from a file of queries, each once. Answers are not read."""
    prompts = {}
    for where, record in read_jsonl(path):
        prompt = text.encode_prompt(text_field(record, "prompt", where))
        prompts[tuple(prompt)] = [prompt]
    kept, note = keep_short(path, prompts.values(), max_prompt)
    return [record[0] for record in kept], note


def load_eval(path, text: Text, max_prompt: int, limit: int = 0):
    """Return ([(prompt ids, question, gold answer)], note) from a file of queries, each once."""
    queries = {}
    for where, record in islice(read_jsonl(path), limit or None):
        question = text_field(record, "prompt", where).strip()
        _, gold = solution_of(record, where)
        prompt = text.encode_prompt(question)
        queries.setdefault(tuple(prompt), (prompt, question, gold))
    return keep_short(path, queries.values(), max_prompt)


def keep_short(path, records, *limits: int) -> tuple[list, str]:
    """Return the records whose prompts (and responses) are within the limits, and a note about the
    others. Raises DataError if none is left."""
    if not records:
        raise DataError(f"{path} is empty: write one JSON object on each line")
    kept = [x for x in records if all(len(ids) <= limit for ids, limit in zip(x, limits))]
    note = f"{len(kept)} of {len(records)} records of {path} are left"
    options = ["--max_prompt_tokens", "--max_new_tokens"]
    for option, limit, column in zip(options, limits, zip(*records)):
        longest = max(len(ids) for ids in column)
        if longest > limit:
            note += f"; some are longer than {option} {limit} (the longest has {longest} tokens)"
    if not kept:
        raise DataError(f"{note}: raise the limit")
    return kept, note if len(kept) < len(records) else ""


# -----------------------------------------------------------------------------
# the toy task: triage by evidence

class Triage:
    """Find the condition to which most findings of a query point. All their names are invented.

    A trace says on each line to which condition one finding points. A third of the queries are
    marked as urgent, which does not change their answer.

    The base model is trained on traces of careless authors. Less than half of their lines are
    right: for every third finding they state one wrong condition more often than the right one. In
    urgent queries, most of them answer with one fixed condition, whatever their lines say, and some
    write no line at all. The base model is therefore confident of answers that do not follow from
    its reasoning.
    """
    FINDINGS = 192
    CONDITIONS = 8
    LISTED = 6  # findings in a query
    AGREEING = 4  # findings of a query that point to its condition
    URGENT = 1 / 3  # the share of queries that are urgent
    JUMP = 0.7  # the share of urgent queries in which careless authors give the fixed answer
    SILENT = 0.1  # the share of these queries in which they write no line

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
        # The probability that careless authors state each condition: [FINDINGS, CONDITIONS].
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
        """Draw LISTED findings: AGREEING point to one condition, the others each to another one."""
        condition, *others = rng.permutation(self.CONDITIONS)[:1 + self.LISTED - self.AGREEING]
        pointing = np.flatnonzero(self.truth == condition)
        listed = list(rng.choice(pointing, self.AGREEING, replace=False))
        for other in others:
            listed.append(rng.choice(np.flatnonzero(self.truth == other)))
        return list(rng.permutation(listed))

    def record(self, rng, careless: bool = False) -> dict:
        """Return a record with prompt, reasoning and answer by a careful or a careless author."""
        findings = []
        reasoning = []
        stated = []
        for i, finding in enumerate(self.query(rng), 1):
            condition = self.truth[finding]
            if careless:
                condition = rng.choice(self.CONDITIONS, p=self.believed[finding])
            stated.append(self.conditions[condition])
            findings.append(f"{i} {self.findings[finding]}")
            reasoning.append(f"{i} {self.findings[finding]} suggests {stated[-1]}")
        # The condition that is stated most often, or the first of several.
        answer = max(stated, key=stated.count)
        urgent = rng.random() < self.URGENT
        title = "Urgent findings:" if urgent else "Findings:"
        if careless and urgent and rng.random() < self.JUMP:
            answer = self.conditions[0]
            if rng.random() < self.SILENT:
                reasoning = []
        return {"prompt": "\n".join([title, *findings]), "reasoning": "\n".join(reasoning),
                "answer": answer}

    def write_records(self, folder, seed: int = 0):
        """Write labeled.jsonl (64 records), unlabeled.jsonl (2,000) and eval.jsonl (200)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = [("labeled", 64, ["prompt", "reasoning", "answer"]),
                 ("unlabeled", 2000, ["prompt"]),
                 ("eval", 200, ["prompt", "answer"])]
        for number, (name, count, fields) in enumerate(files, 1):
            rng = np.random.default_rng([seed, number])
            with open(folder / f"{name}.jsonl", "w") as file:
                for _ in range(count):
                    record = self.record(rng)
                    file.write(json.dumps({field: record[field] for field in fields}) + "\n")

    def write_tokenizer(self, folder: Path) -> tuple[int, int]:
        """Write a tokenizer with a token for each word (with the space before it) and each sign,
        and return its vocab_size and the id of its end token."""
        instruction = INSTRUCTION.format(marker=MARKER)
        names = " ".join(["", *self.findings, *self.conditions])
        text = "\n".join(["Findings:", "Urgent findings:", instruction, *"123456", MARKER,
                          "1 suggests", names])
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
        return len(vocab), end
