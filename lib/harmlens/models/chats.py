"""Chats as the text a model reads, for every kind of chat template.

Templates differ in what they refuse, drop and add: some know no system role, some write a date or an empty
thought, some trim an answer. What a template does is found out by rendering, never by the model's name.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

# The date that Llama 3.1 falls back on. Today's date would make every prompt differ from day to day.
DATE = "26 Jul 2024"
# Stand in for messages, to see what a template writes around them. Plain words survive trimming.
_ASKED, _ANSWER = "PLAINREQUEST", "PREFILLEDANSWER"
_USER = {"role": "user", "content": _ASKED}
# <think>, </think>, <|begin_of_thought|>, <|END_THINKING|>, [THINK], <seed:think>, ...
THOUGHT = re.compile(
    r"(?:<\|?|\[|◁)(?P<before>/|(?:start|begin|end)(?:_of)?_)?(?:\w+:)?"
    r"(?:think|thinking|thoughts?|reasoning)(?P<after>_start|_end)?(?:\|?>|\]|▷)",
    re.IGNORECASE,
)
# What templates are given anyway, so that none of it switches thinking.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"}


@dataclass(frozen=True)
class Prompt:
    """A chat that ends where the model's answer begins."""

    messages: tuple[Message, ...]
    prefill: str | None = None  # start of the answer put into the model's mouth
    about: Any = None  # what is asked for: an item of the world, or an entry of a public set or a file

    def render(self, lm: Any) -> str:
        """The text that a :class:`models.forward.LanguageModel` reads."""
        return lm.render(self.messages, self.prefill)


@dataclass(frozen=True)
class Pair:
    """Two prompts of equal length; ``id`` names the unit that statistics resample."""

    id: str
    x1: Prompt
    x0: Prompt


@dataclass(frozen=True)
class Frame:
    """What a chat template writes around an answer, found by rendering."""

    opening: str = ""  # behind the user's words, where the answer is to begin
    closing: str = ""  # closes a thought that the opening has opened, if the template does so itself
    lead: str = ""  # between these and the words of an answer: nothing, a space, a header
    trail: str = ""  # behind these words, up to and with the mark that ends the turn; "" without such a mark
    stops: frozenset[int] = frozenset()  # ids of tokens with which an answer is over
    thought: str = ""  # the mark with which the opening opens a thought that nothing closes
    control: tuple[str, ...] = ()  # texts that become control tokens wherever they stand

    def begins(self, prompt: str) -> bool:
        """Whether a rendered prompt ends where an answer begins, with no word of it prefilled."""
        opened = self.opening + self.closing
        return bool(opened) and prompt.endswith(opened)

    def thinks(self, prompt: str) -> str:
        """The mark of the thought that a rendered prompt ends in; "" where it ends in none."""
        return self.thought if self.begins(prompt) else ""


def frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What the tokenizer's chat template writes around an answer; without one only its end."""
    template = None if tokenizer.chat_template is None else tokenizer.get_chat_template()
    return _frame(tokenizer, template, tokenizer.bos_token, tokenizer.eos_token, len(tokenizer))


def render(
    tokenizer: PreTrainedTokenizerBase, chat: str | Sequence[Message], prefill: str | None = None
) -> str:
    """A chat as the text the model reads, ending where the model's answer begins.

    A system message goes to the head of the user message after it where the template refuses or drops the
    system role (Gemma, early Mistral). A template's own default system prompt stays. Where a template can
    leave out thinking, or close a thought at once, it does; a date that it writes is always the same. The
    text begins with a BOS where the tokenizer puts one before plain text, and ends with the ``prefill``: end
    that with a word, not with a space, since most tokenizers join a space to the word after it.

    Raises:
        ValueError: no chat template, a chat that does not end with the user, a control token in a message,
            or a prefill where the template opens a thought.
        jinja2.TemplateError: the template refuses the chat for another reason than its system role.
    """
    messages = [{"role": "user", "content": chat}] if isinstance(chat, str) else list(chat)
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("chat must end with a user message; put the start of an answer into prefill")
    if tokenizer.chat_template is None:
        raise ValueError(
            "this tokenizer has no chat template, so a chat can't be rendered. Choose an instruction-tuned "
            "model, or set tokenizer.chat_template to the template of the model's aligned partner: "
            "load(name, template_from=partner) does that."
        )
    for message in messages:
        require_plain(tokenizer, message["content"], f"a message of the {message['role']}")
    around, text = frame(tokenizer), _opened(tokenizer, messages)
    text += around.closing if text.endswith(around.opening) else ""
    if prefill:
        require_plain(tokenizer, prefill, "prefill")
        require_spoken(tokenizer, text)
        text += around.lead + prefill
    bos = tokenizer.bos_token
    if bos and not text.startswith(bos) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = bos + text
    return text


def as_written(tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
    """The words of an answer as the template has them: most trim them, some don't."""
    around = frame(tokenizer)
    whole = _tried(tokenizer, [_USER, {"role": "assistant", "content": answer}])
    before = _ASKED + around.opening + around.closing + around.lead
    for words in (answer, answer.rstrip(), answer.lstrip(), answer.strip()):
        if before + words + around.trail in whole:
            return words
    return answer  # the template changes more than that


def control_in(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The marks in a text that this model would read as control tokens, such as the end of a turn."""
    marks = [mark for mark in frame(tokenizer).control if mark in text]
    if not marks:
        return []
    as_text = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return marks if tokens(tokenizer, text) != as_text else []


def require_plain(tokenizer: PreTrainedTokenizerBase, text: str, what: str) -> None:
    """Refuse, with a ValueError that names the mark, a text that this model would not read as text."""
    if marks := control_in(tokenizer, text):
        raise ValueError(
            f"{what} holds {marks[0]!r}, which this model reads as a control token and not as text. Leave it "
            "out, or write the mark in another way, such as with spaces in it."
        )


def neutral(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text for a judge to read, with a space in each mark that the judge would take for a control token."""
    for mark in control_in(tokenizer, text):
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def require_spoken(tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """Refuse, with a ValueError, to put words into an answer whose template opens a thought before it."""
    if mark := frame(tokenizer).thinks(prompt):
        raise ValueError(
            f"the chat template opens every answer with a thought ({mark!r}), and no variable of it leaves "
            "that out: words put behind it, or read there, would belong to the thought. Leave out the "
            "prefill or the given answer, choose a model that does not think, or set "
            "tokenizer.chat_template to one that closes the thought."
        )


def answer_behind_thought(text: str) -> str | None:
    """What an answer says once the thoughts at its beginning are over; None where one never ends.

    Only the mark that closes a thought may be there, since some templates open it in the prompt.

    >>> answer_behind_thought("<think>Hm.</think>\\n\\nYes."), answer_behind_thought("Hm. </think> Yes.")
    ('Yes.', 'Yes.')
    """
    while (mark := THOUGHT.search(text)) is not None:
        if not _closes(mark):
            if text[: mark.start()].strip():
                return text  # it speaks of a mark
            mark = next((m for m in THOUGHT.finditer(text, mark.end()) if _closes(m)), None)
            if mark is None:
                return None
        text = text[mark.end() :].strip()
    return text


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a *rendered* text, which holds any BOS already."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """The same messages with each system message at the head of the user message after it.

    >>> fold_system([{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}])
    [{'role': 'user', 'content': 'be kind\\n\\nhello'}]
    """
    folded: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting += [message["content"].strip()] if message["content"].strip() else []
            continue
        if message["role"] == "user":
            message = {**message, "content": "\n\n".join([*waiting, message["content"]])}
            waiting = []
        folded.append(message)
    return folded


def _opened(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The text up to where the answer begins; system messages folded if the template can't take them."""
    system = [m["content"].strip() for m in messages if m["role"] == "system"]
    folded = fold_system(messages)
    try:
        text = _apply(tokenizer, messages, add_generation_prompt=True)
    except TemplateError:
        if text := _tried(tokenizer, folded, add_generation_prompt=True):
            return text
        raise  # the system role was not the reason
    # Other messages may quote a system message, so its occurrences are counted.
    dropped = any(text.count(s) < sum(m["content"].count(s) for m in messages) for s in system if s)
    return _apply(tokenizer, folded, add_generation_prompt=True) if dropped else text


@lru_cache(maxsize=32)
def _frame(
    tokenizer: PreTrainedTokenizerBase, template: str | None, bos: str | None, eos: str | None, size: int
) -> Frame:
    """See :func:`frame`; the other arguments are what it depends on."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    control = tuple(sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True))
    stops = {tokenizer.eos_token_id} - {None}
    opened = "" if template is None else _tried(tokenizer, [_USER], add_generation_prompt=True)
    if not opened:  # it refuses even this; other chats may be to its taste
        return Frame(stops=frozenset(stops), control=control)
    answer = {"role": "assistant", "content": _ANSWER}
    opening = opened[opened.rfind(_ASKED) + len(_ASKED) :]
    whole = _tried(tokenizer, [_USER, answer])
    end = whole.rfind(_ANSWER)
    # ``continue_final_message`` is not used: it loses trailing spaces and what only an opening has, and it
    # fails where a template changes the answer. Nor is the chat itself: some templates (Mistral 0.3) put the
    # system message into the last message if that is the user's, and nowhere once an answer follows.
    lead = whole[len(opened) : end] if whole.startswith(opened) and end >= len(opened) else ""
    closing, thought = "", ""
    if _in_thought(opening + lead) and _in_thought(opening):
        thought, lead = [m.group() for m in THOUGHT.finditer(opening)][-1], ""
    elif _in_thought(opening):
        closing, lead = lead, ""
    # The first mark behind an answer, the longest of those that begin there.
    marks = re.compile("|".join(re.escape(m) for m in control if m and (m != bos or m == eos)) or r"(?!)")
    behind = whole[end + len(_ANSWER) :] if end >= 0 else ""
    mark = marks.search(behind)
    trail = behind[: mark.end()] if mark else ""
    if not trail:  # nothing ends the turn; what opens the next one does
        following = _tried(tokenizer, [_USER, answer, _USER])
        mark = marks.search(following.partition(_ANSWER)[2].partition(_ASKED)[0])
    if mark:
        stops.add(tokenizer.convert_tokens_to_ids(mark.group()))
    return Frame(opening, closing, lead, trail, frozenset(stops), thought, control)


def _closes(mark: re.Match[str]) -> bool:
    before, after = mark["before"] or "", mark["after"] or ""
    return before == "/" or before.lower().startswith("end") or after.lower() == "_end"


def _in_thought(text: str) -> bool:
    """Whether the last mark of a thought in a text is one that opens it."""
    marks = list(THOUGHT.finditer(text))
    return bool(marks) and not _closes(marks[-1])


@lru_cache(maxsize=32)
def _switches(tokenizer: PreTrainedTokenizerBase, template: str) -> dict[str, Any]:
    """Variables of a template with which it opens no thought, or closes one at once: found by trying them."""
    base = {"enable_thinking": False} if "enable_thinking" in template else {}
    if not THOUGHT.search(template):
        return base

    def thinks(options: dict[str, Any]) -> int:
        """0 for a thought that is closed, 1 for none, 2 for an open one, 3 for what it does not take."""
        try:
            text = _apply(tokenizer, [_USER], options, add_generation_prompt=True)
        except Exception:  # a template raises whatever comes of a value that it does not expect
            return 3
        opening = text[text.rfind(_ASKED) + len(_ASKED) :] if _ASKED in text else "<think>"
        return 2 if _in_thought(opening) else 0 if THOUGHT.search(opening) else 1

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
    names = meta.find_undeclared_variables(environment.parse(plain)) - _GIVEN - set(environment.globals)
    names = sorted(names - set(tokenizer.special_tokens_map))
    tried = [{**base, name: value} for name in names for value in (False, "off", "none", True)]
    return min([base, *tried], key=thinks)  # the first of equals


def _tried(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> str:
    try:
        return _apply(tokenizer, messages, **options)
    except TemplateError:
        return ""


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], switches: dict | None = None, **options: Any
) -> str:
    template = tokenizer.get_chat_template()
    options |= _switches(tokenizer, template) if switches is None else switches
    if "date_string" in template:
        options.setdefault("date_string", DATE)
    if "strftime_now" in template:
        # A macro, since transformers lets no function through to a template.
        template = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}\n" + template
    return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **options)
