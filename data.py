"""Answers, prompts and responses as text and as token ids, JSONL records, and a toy task.

A response has one reasoning step per line and ends with a marker ("Answer:") and the answer. Steps
and answer are located in the token ids of the response itself, because encoding its text again may
give other tokens. The toy task shows the effect of the method in 90 seconds on a laptop.

This file is self-contained; copy it freely. Next to read: model.py.

SPDX-License-Identifier: MIT
"""
import hashlib
import json
import re
import unicodedata
from datetime import datetime
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

MARKER = "Answer:"
INSTRUCTION = 'Reason line by line, then end with the line "{marker} ...".'


class DataError(ValueError):
    """Data or a tokenizer cannot be used. The message says what is wrong, where, and what to do."""


# -----------------------------------------------------------------------------
# answers

def find_answer(text: str, marker: str = MARKER) -> tuple[int, int, int] | None:
    """Return (marker start, answer start, answer end) in characters, or None without an answer.

    The answer is the rest of the last marker's line. The marker is found in upper and lower case,
    between stars or underscores, and with a fullwidth colon: "**ANSWER**: 18", "Answer：18".
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
    answer = line.strip()
    bold = re.fullmatch(r"\*\*([^*]+)\*\*", answer)
    if bold:
        answer = bold[1].strip()
    elif answer.endswith("**") and answer.count("**") == 1:  # as in "**Answer: 18**"
        answer = answer.removesuffix("**").strip()
    if not answer:
        return None
    start = found[-1].end() + line.index(answer)
    return found[-1].start(), start, start + len(answer)


def extract_answer(text: str, marker: str = MARKER) -> str | None:
    """Return the answer that `find_answer` finds in the text, or None."""
    found = find_answer(text, marker)
    if found is None:
        return None
    return text[found[1]:found[2]]


# (pattern, replacement) pairs that change only the form of an answer.
FORMS = [
    ("[\u2010-\u2015\u2212]", "-"),  # dashes
    ("[\u2018\u2019]", "'"),  # curly quotes
    ("[\u201c\u201d]", '"'),
    (r"(?<![\w*])\*\*([^*]+)\*\*(?![\w*])", r"\1"),  # Markdown's **bold** and `code`
    (r"`([^`]+)`", r"\1"),
    (r"(?<![\w$\\])(\$\$?)([^$]+)\1(?![\w$])", r"\2"),  # LaTeX: $...$, \(...\), \[...\]
    (r"\\\((.*?)\\\)|\\\[(.*?)\\\]", r"\1\2"),
    (r"\\(?:boxed|text|textbf|textit|mathrm)\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1 "),
    (r"\\(?:left|right)(?= ?[()\[\]{}|.\\])", ""),
    (r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3}(?!\d|\)))", ","),  # LaTeX's thousands separators and spaces
    (r"\\[,;:]", " "),
    (r"\\([$%])", r"\1"),
    (r"(^|= )(-?)\\[dt]?frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))$", r"\1\2\3\5/\4\6"),
    (r"\^\{?\\circ\}?", "°"),
    (r"(?<=\d) ?%", " percent"),
    # Spaces inside brackets, but not in (1, 234), since (1,234) may be one number.
    (r"(?<=[(\[{]) | (?=[)\]}])|(?<=,) (?!\d{3}(?!\d))(?=[^()\[\]{}]*[)\]}])", ""),
    (r"""^(["'])((?:(?!\1).)+)\1$""", r"\2"),  # quotes around the whole answer
    (r"(?<![.\s]) ?[.。]$", ""),  # a final full stop
]
FULLWIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}

# Either a letter that is marked as in "(B)", "B)", "B." or "B: ", perhaps followed by the option's
# text, which begins with a word or a number; or a capital letter, perhaps with text in brackets.
TEXT = r"(?:[Aa] )?[^\W\d_]{2}.*|-?[$€£¥₹]?\d.*"
CHOICE = re.compile(rf"(?:[Oo]ption )?(?:\(([A-Ja-j])\)|([A-Ja-j])(?:[.)]|:(?= )))(?: ({TEXT}))?"
                    r"|(?:[Oo]ption )?([A-J])(?: \(([^\W\d_]{2}.*)\))?")
# Text that denies the choice or names another one is not the text of an option.
NOT_OPTION = re.compile(r".*\b(?:and|or|nor|not?|never|neither|but|is|isn|are|was|be|it|does|doesn"
                        r"|do|don|cannot|can|too|wrong|false|incorrect|excluded|ruled|eliminated"
                        r"|plus|minus|times)\b|.*(?:\b[b-z]\b|\ba\b(?! \w)|\b\w\))", re.IGNORECASE)

# Groups are sign, currency sign, number without leading zeros or simple fraction, and unit.
NUMBER = re.compile(r"([-+]?) ?([$€£¥₹]?) ?((?=\.?\d)(?!0[\d,])(?:\d{1,3}(?:,\d{3})+|\d*)"
                    r"(?:\.\d+)?(?:[eE][-+]?\d{1,3})?)( ?[$€£¥₹°]| [^\W\d_]+(?:/[^\W\d_]+)?|)")
FRACTION = re.compile(r"([-+]?) ?()((?!0)\d+ ?/ ?(?!0)\d+)()")
LEFT_SIDE = re.compile(r"[A-Za-z](?:_?[0-9])?|(?=.*[0-9)] ?[-+*/×÷^])[0-9.()+*/×÷^ -]+")
# Units that may be missing in one of two answers: common signs, abbreviations and plurals, except
# for plurals that multiply the number.
UNIT = re.compile(r"[$€£¥₹°]|percent|[cmk]m|[mk]g|ml|km/h|mph|people|feet|hour|minute|day|week|year"
                  r"|[a-z]{2,}[a-rtv-z]s")
MULTIPLE = re.compile(r"times|pairs|couples|halves|quarters|logs|scores|(?!months)[a-z]*(?:ths|tens"
                      r"|thirds|hundreds|thousands|illions|illiards|zeroe?s|dozens|crores|lakhs)")


def normalize(text: str) -> str:
    """Return the form in which answers are compared."""
    text = unicodedata.normalize("NFC", text).translate(FULLWIDTH)
    before = None
    while text != before:
        before = text
        text = " ".join(text.split())
        for pattern, replacement in FORMS:
            text = re.sub(pattern, replacement, text)
    # Case matters after a digit, where a unit may follow, and in x, mW, CO and \Delta.
    words, units = re.fullmatch(r"(\D*)(.*)", text).groups()
    return re.sub(r"(?<!\\)\b(?:[^\W\d_]{3,}|No)\b", fold_case, words) + units


def fold_case(word: re.Match) -> str:
    """Convert words such as Paris and PARIS to lower case, but not words such as mRNA."""
    if word[0][1:].islower() or word[0].isupper():
        return word[0].lower()
    return word[0]


def read_choice(text: str) -> tuple[str, list[str]] | None:
    """Return (letter, [text of the option]) if a normalized answer is one choice, or None."""
    match = CHOICE.fullmatch(text)
    if match is None:
        return None
    option = match[3] or match[5] or ""
    if NOT_OPTION.match(option):
        return None
    letter = match[1] or match[2] or match[4]
    return letter.upper(), [option]


def read_number(text: str) -> tuple[tuple[Fraction, str], list[str]] | None:
    """Return ((value, unit), [left side, optional unit]) of a normalized number, or None."""
    *left, right = [side.strip() for side in text.split("=")]
    match = FRACTION.fullmatch(right) or NUMBER.fullmatch(right)
    if match is None or not all(LEFT_SIDE.fullmatch(side) for side in left):
        return None
    sign, currency, number, unit = match.groups()
    if (currency and unit) or len(number) > 100:
        return None
    value = Fraction(re.sub("[, ]", "", number))
    if sign == "-":
        value = -value
    unit = currency or unit.strip()
    if unit == "$":
        unit = "dollars"
    if UNIT.fullmatch(unit) and not MULTIPLE.fullmatch(unit):
        return (value, ""), ["=".join(left), unit]
    return (value, unit), ["=".join(left), ""]


def answers_match(a: str, b: str) -> bool:
    """Return whether two answers are the same by one of three rules.

    1. As text, regardless of case, width, spaces, kinds of dashes and quotes, a final full stop,
       quotes around the answer, Markdown's bold and code, and LaTeX that only formats. Case does
       matter in words of one or two letters, in mixed words and after a digit: x, CO, "5 Mg".
    2. As one choice from A to J: "B", "(b)", "B.", "Option B" and "B) Paris" are the same, unless
       the choice is denied, another one is named or the texts of the two options differ.
    3. As one number: "$1,000.00" and 1e3, "3/4" and 0.75. The number may be the last side of an
       equation and have one unit. The left sides must be equal if both answers have one. The units
       must be equal, but %, a currency sign, a common abbreviation or a plural may be missing.

    All other answers are different, and so are doubtful cases, because a wrong match rewards an
    error, while a missed match only loses a vote.
    """
    a = normalize(a)
    b = normalize(b)
    if a == b:
        return a != ""
    for read in (read_choice, read_number):
        first = read(a)
        second = read(b)
        if first and second and first[0] == second[0]:
            return all(x == y or "" in (x, y) for x, y in zip(first[1], second[1]))
    return False


def number_answers(answers: list[str | None], group_size: int) -> list[int]:
    """Give the same number to the matching answers of a group, and -1 to a missing answer.

    A group is `group_size` consecutive answers. "5" matches "5 apples" and "5 pears", which do not
    match each other, and gets the number of the one that comes first.
    """
    numbers = []
    for start in range(0, len(answers), group_size):
        different = []  # the answers of this group, each once
        for answer in answers[start:start + group_size]:
            if not answer:
                numbers.append(-1)
                continue
            matches = [i for i, other in enumerate(different) if answers_match(other, answer)]
            if not matches:
                matches = [len(different)]
                different.append(answer)
            numbers.append(matches[0])
    return numbers


def majority(answers: list[str | None]) -> tuple[str | None, float]:
    """Return the most common answer (the first of several) and its share of all answers.

    If there is no answer, return (None, 0.0).
    """
    if not any(answers):
        return None, 0.0
    numbers = number_answers(answers, len(answers))
    votes = [number for number in numbers if number >= 0]
    best = max(votes, key=votes.count)
    return answers[numbers.index(best)], votes.count(best) / len(answers)


# -----------------------------------------------------------------------------
# prompts and responses

# Unicode never assigns these characters, so texts do not use them. START is added to the tokenizer:
# text is encoded after it, because tokenizers may treat the beginning of a text differently.
# QUESTION and ANSWER are placeholders for the messages in a rendered chat template.
START, QUESTION, ANSWER = "\ufdd0", "\ufdd1", "\ufdd2"


def load_tokenizer(path: Path) -> tuple[Tokenizer, list[int]]:
    """Return the tokenizer, and the ids that it adds before a text: none, or that of BOS."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        tokenizer.add_tokens([AddedToken(START, normalized=False)])
        ids = tokenizer.encode(START).ids
        bos = ids[:ids.index(tokenizer.token_to_id(START))]
        if not tokenizer.encode(INSTRUCTION + " é漢", add_special_tokens=False).ids:
            raise ValueError("it cannot encode text")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # The library raises plain Exceptions, and a Rust panic is only a BaseException.
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be used ({reason}): use the model's own file") from None
    return tokenizer, bos


def render_chat(folder: Path) -> tuple[str, str] | None:
    """Render the folder's chat template with QUESTION and ANSWER: (prompt, conversation).

    The prompt ends where the assistant's turn begins. Returns None if the folder has no template.
    Raises DataError if the template cannot be rendered.
    """
    path = folder / "tokenizer_config.json"
    config = {}
    try:
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
        source = config.get("chat_template")
        if isinstance(source, list):
            source = {named["name"]: named["template"] for named in source}["default"]
        if (folder / "chat_template.jinja").is_file():
            path = folder / "chat_template.jinja"
            source = path.read_text(encoding="utf-8")
        if not source:
            return None
        variables = {"tools": None, "documents": None}
        for name, token in config.items():
            # A special token is a string, or an object that holds it as "content".
            if isinstance(token, dict):
                token = token.get("content")
            if name.endswith("_token") and isinstance(token, str):
                variables[name] = token
        template = compile_template(source)
        messages = [{"role": "user", "content": QUESTION}]
        prompt = template.render(messages=messages, add_generation_prompt=True, **variables)
        messages.append({"role": "assistant", "content": ANSWER})
        conversation = template.render(messages=messages, add_generation_prompt=False, **variables)
        if QUESTION not in prompt:
            raise ValueError("it leaves out the user's message")
    except Exception as error:  # A template may raise anything.
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} has an unusable chat template ({reason}): correct it, or remove "
                        "it to use plain text") from None
    return prompt, conversation


def compile_template(source: str):
    """Compile a jinja2 template with the settings and functions that `transformers` gives it."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.now().strftime
    return environment.from_string(source)


class Text:
    """Converts between text and token ids with a checkpoint's tokenizer and chat template.

    Without a chat template, a prompt is plain text. `end` is the id that ends a response in
    training: the special token that the template puts after an answer, or otherwise the first of
    `eos_ids`, the model's own end tokens. `end_ids` has all ids that end a response. Raises
    DataError if tokenizer.json or the template cannot be used, or if there is no end token.
    """

    def __init__(self, folder, eos_ids=(), marker: str = MARKER, max_reasoning_steps: int = 16):
        self.marker = marker
        self.max_reasoning_steps = max_reasoning_steps
        self.tokenizer, self.bos = load_tokenizer(Path(folder) / "tokenizer.json")
        vocab = self.tokenizer.get_vocab()
        del vocab[START]
        self.vocab_size = max(vocab.values()) + 1
        self.unknown = vocab.get(getattr(self.tokenizer.model, "unk_token", None))
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {i for i, token in added.items() if token.special}

        self.chat = None
        self.before_response = "\n"
        end_ids = list(eos_ids)
        rendered = render_chat(Path(folder))
        if rendered is not None:
            self.chat, conversation = rendered
            if not self.chat.endswith("\n"):
                self.before_response = ""
            after_answer = self.encode_chat(conversation.partition(ANSWER)[2].lstrip())
            if after_answer and after_answer[0][0] in self.special:
                end_ids.insert(0, after_answer[0][0])
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

    def encode_chat(self, text: str) -> list[tuple[int, int, int]]:
        """Return (id, start, end) of each token of a text, and recognize special tokens in it."""
        self.tokenizer.encode_special_tokens = False
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        self.tokenizer.encode_special_tokens = True
        return [(i, start, end) for i, (start, end) in zip(encoding.ids, encoding.offsets)]

    def prompt(self, question: str) -> list[int]:
        """Return the ids of a question and the instruction, up to the start of the response."""
        asked = f"{question.strip()}\n{INSTRUCTION.format(marker=self.marker)}"
        if self.chat is None:
            return self.bos + self.tokenizer.encode(asked + "\n", add_special_tokens=False).ids
        pieces = self.chat.split(QUESTION)
        text = asked.join(pieces)
        # This has "1" for each character of the text that the user has written.
        user = ("1" * len(asked)).join("0" * len(piece) for piece in pieces)
        ids = []
        for i, start, end in self.encode_chat(text):
            if i in self.special and "1" in user[start:end]:
                ids += self.encode(text[start:end], after="")
            else:
                ids.append(i)
        return ids

    def response(self, reasoning: str, answer: str) -> list[int]:
        """Return the ids of a supervised response with its end token, but without blank lines."""
        lines = [line.rstrip() for line in reasoning.splitlines() if line.strip()]
        lines.append(f"{self.marker} {answer}")
        return self.encode("\n".join(lines), after=self.before_response) + [self.end]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids without the end tokens, which some tokenizers would show."""
        return self.tokenizer.decode([i for i in ids if i not in self.end_ids])

    def read(self, response: list[int]) -> tuple[str, list[int]]:
        """Return the text of a response without its end token, and the offset of each token's end.

        Tokens that share a multi-byte character all end where the character ends. The text is "" if
        the response was cut off or contains invalid UTF-8.
        """
        text = ""
        offsets = []
        cut_off = not response or response[-1] not in self.end_ids
        if cut_off or "\ufffd" in self.decode(response):
            return text, offsets
        stream = decoders.DecodeStream(skip_special_tokens=True)
        waiting = 0
        for i in response[:-1]:
            waiting += 1
            piece = stream.step(self.tokenizer, i)
            if piece is not None:
                text += piece
                offsets += [len(text)] * waiting
                waiting = 0
        return text, offsets + [len(text)] * waiting

    def answer(self, response: list[int]) -> str | None:
        """Return the answer of a response, or None if it was cut off or has no answer."""
        text, _ = self.read(response)
        return extract_answer(text, self.marker)

    def parse(self, prompt: list[int], response: list[int]) -> tuple[list, list, int, int]:
        """Return (tokens, cuts, answer_start, answer_end), the fields of `prg.Trace`.

        tokens is prompt + response. Step k is tokens[cuts[k - 1]:cuts[k]], the marker is
        tokens[cuts[-1]:answer_start] and the answer is tokens[answer_start:answer_end]. Steps are
        the nonblank lines before the last marker, merged evenly if max_reasoning_steps is exceeded.
        Without an answer there are no steps, and answer_start = answer_end = len(tokens).
        """
        tokens = prompt + response
        text, offsets = self.read(response)
        found = find_answer(text, self.marker)
        if found is None:
            return tokens, [len(prompt)], len(tokens), len(tokens)
        marker_start, answer_start, answer_end = found

        # A line begins at its first character that is not whitespace.
        lines = [match.start() for match in re.finditer(r"\S.*", text[:marker_start])]
        steps = min(len(lines), self.max_reasoning_steps)
        cuts = {0}
        for k in range(1, steps):
            cuts.add(token_at(offsets, lines[k * len(lines) // steps]))
        if lines:
            cuts.add(token_at(offsets, marker_start))
        start = token_at(offsets, answer_start)
        # All tokens of the answer's last character belong to the answer.
        end = token_at(offsets, offsets[token_at(offsets, answer_end - 1)])
        cuts = [len(prompt) + cut for cut in sorted(cuts)]
        return tokens, cuts, len(prompt) + start, len(prompt) + end


def token_at(offsets: list[int], character: int) -> int:
    """Return the index of the token with this character; `offsets` are the ends of the tokens."""
    return int(np.searchsorted(offsets, character, side="right"))


# -----------------------------------------------------------------------------
# JSONL records

def read_jsonl(path, limit: int = 0) -> list[tuple[str, dict]]:
    """Return ("PATH line NUMBER", record) of the first `limit` nonblank lines; 0 means all lines.

    Numbers are returned as strings, exactly as they are written. Raises DataError if the file
    cannot be read or is empty, or if a line is not a JSON object.
    """
    try:
        content = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a JSONL file") from None
    records = []
    # Bytes are split at \n, \r\n and \r only, but text also at U+2028, which JSON strings may have.
    for number, line in enumerate(content.splitlines(), 1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            numbers = dict(parse_int=str, parse_float=finite, parse_constant=finite)
            record = json.loads(line.decode(), **numbers)
            if not isinstance(record, dict):
                raise ValueError("it has no named fields")
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)  # without JSONDecodeError's own line number
            raise DataError(f"{where} is not a JSON object ({reason}): write one object on each "
                            "line, in UTF-8") from None
        records.append((where, record))
        if len(records) == limit:
            break
    if not records:
        raise DataError(f"{path} is empty: write one JSON object on each line")
    return records


def checksum(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def finite(number: str) -> str:
    """Return the number as it is written. Raises ValueError for NaN and infinity."""
    if not np.isfinite(float(number)):
        raise ValueError(f"{number} is not a finite number")
    return number


def text_field(record: dict, name: str, where: str) -> str:
    """Return a text field ("question" may replace "prompt"). Raises DataError if it is blank."""
    if name == "prompt" and "prompt" not in record and "question" in record:
        name = "question"
    text = record.get(name)
    # Half of a surrogate pair cannot be encoded.
    if not isinstance(text, str) or not text.strip() or re.search("[\ud800-\udfff]", text):
        raise DataError(f"{where}: the field {name!r} is missing, blank or not text (the fields "
                        f"are {', '.join(record) or 'none'}): fill it in")
    return text.replace(START, "")


def solution_of(record: dict, where: str) -> tuple[str, str]:
    """Return (reasoning, answer) of a record, with "" if it has no reasoning.

    GSM8K has both in one field: reasoning with <<calculator annotations>>, "####", the answer.
    """
    reasoning = ""
    answer = text_field(record, "answer", where)
    if record.get("reasoning"):
        reasoning = text_field(record, "reasoning", where)
    elif "####" in answer:
        reasoning, _, answer = re.sub(r"<<[^<>]*>>", "", answer).rpartition("####")
    answer = answer.strip()
    if not answer or "\n" in answer:
        raise DataError(f"{where} has an answer that is not one line of text: make it one line")
    return reasoning, answer


def load_labeled(path, text: Text, max_prompt: int, max_response: int, limit: int = 0):
    """Return ([(prompt ids, response ids)], number skipped) from a file of supervised traces."""
    kept = []
    records = read_jsonl(path, limit)
    for where, record in records:
        prompt = text.prompt(text_field(record, "prompt", where))
        reasoning, answer = solution_of(record, where)
        if not reasoning.strip():
            raise DataError(f"{where} has no 'reasoning' (the fields are {', '.join(record)}): add "
                            "it, or use GSM8K's '... #### 18'")
        words = text.encode(f"{reasoning}\n{answer}", after="\n")
        if 2 * words.count(text.unknown) > len(words):
            raise DataError(f"{where}: the model's tokenizer does not know most of these words: "
                            "use a model that was trained on such text")
        response = text.response(reasoning, answer)
        found = text.answer(response)
        if found is None or not answers_match(found, answer):
            raise DataError(f"{where}: the answer {answer!r} would be read as {found or ''!r}: "
                            "rephrase it")
        if len(prompt) <= max_prompt and len(response) <= max_response:
            kept.append((prompt, response))
    return kept, skipped(records, kept, path)


def load_unlabeled(path, text: Text, max_prompt: int, limit: int = 0):
    """Return ([prompt ids], number skipped) from a file, each prompt once. Answers are not read."""
    prompts = {}
    for where, record in read_jsonl(path, limit):
        prompts[tuple(text.prompt(text_field(record, "prompt", where)))] = None
    kept = [list(prompt) for prompt in prompts if len(prompt) <= max_prompt]
    return kept, skipped(prompts, kept, path)


def load_eval(path, text: Text, max_prompt: int, limit: int = 0):
    """Return ([(prompt ids, question, gold answer)], number skipped) from a file of queries."""
    kept = []
    records = read_jsonl(path, limit)
    for where, record in records:
        question = text_field(record, "prompt", where).strip()
        _, answer = solution_of(record, where)
        prompt = text.prompt(question)
        if len(prompt) <= max_prompt:
            kept.append((prompt, question, answer))
    return kept, skipped(records, kept, path)


def skipped(records, kept: list, path) -> int:
    """Return how many records were skipped as too long. Raises DataError if all were."""
    if not kept:
        raise DataError(f"every record of {path} is longer than --max_prompt_tokens or "
                        "--max_new_tokens: raise them")
    return len(records) - len(kept)


# -----------------------------------------------------------------------------
# the toy task: triage by evidence

class Triage:
    """Find the condition to which most findings of a query point. All their names are invented.

    A trace says on each line to which condition one finding points, and then answers with the
    condition that occurs most often. A third of the queries are marked as urgent, which does not
    change their answer.

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
        folder.mkdir(parents=True)
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
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
        return len(vocab), end
