"""Chats as the text a model reads, for every kind of chat template.

Templates differ in what they refuse, drop and add: some know no system role, some write a date or an empty
thought, some trim an answer. What a template does is found out by rendering, never by the model's name.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

# The date that Llama 3.1 falls back on. Today's date would make every prompt differ from day to day.
DATE = "26 Jul 2024"
# Stands in for an answer, to see what a template writes before one. A plain word survives trimming.
_ANSWER = "PREFILLEDANSWER"


def render(
    tokenizer: PreTrainedTokenizerBase, chat: str | Sequence[Message], prefill: str | None = None
) -> str:
    """A chat as the text the model reads, ending where the model's answer begins.

    A system message goes to the head of the user message after it, a blank line between, where the
    template refuses or drops the system role (Gemma, early Mistral). A template's own default system
    prompt stays. Where a template can leave out thinking it does, and where it writes a date that date is
    always the same. The text begins with a BOS where the tokenizer puts one before plain text.

    Args:
        chat: one user message, or messages with ``role`` and ``content``.
        prefill: words put into the model's mouth: the answer goes on from there. The text ends with
            exactly these. End them with a word, not with a space: most tokenizers join a space to the
            word after it, so a text that ends with one is unlike what models are trained on.

    Raises:
        ValueError: the tokenizer has no chat template, or the chat does not end with the user.
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
    text = _opened(tokenizer, messages)
    if prefill:
        text += _before_answer(tokenizer, messages[-1]) + prefill
    bos = tokenizer.bos_token
    if bos and not text.startswith(bos) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = bos + text
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
        elif message["role"] == "user" and waiting:
            folded.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            folded.append(message)
    return folded


def _opened(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The text up to where the answer begins; system messages folded if the template can't take them."""
    system = [m["content"].strip() for m in messages if m["role"] == "system"]
    if not system:
        return _apply(tokenizer, messages, add_generation_prompt=True)
    folded = fold_system(messages)
    try:
        text = _apply(tokenizer, messages, add_generation_prompt=True)
    except TemplateError as error:
        try:
            return _apply(tokenizer, folded, add_generation_prompt=True)
        except TemplateError:
            raise error from None  # the system role was not the reason
    # Other messages may quote a system message, so its occurrences are counted.
    dropped = any(text.count(s) < sum(m["content"].count(s) for m in messages) for s in system if s)
    if dropped:
        return _apply(tokenizer, folded, add_generation_prompt=True)
    return text


def _before_answer(tokenizer: PreTrainedTokenizerBase, user: Message) -> str:
    """What the template writes between the opening of an answer and its words: nothing, a space, a header.

    ``continue_final_message`` is not used: it loses trailing spaces and what only an opening has, and it
    fails where a template changes the answer. Nor is the whole chat: some templates (Mistral 0.3) put the
    system message into the last message if that is the user's, and nowhere once an answer follows.
    """
    opened = _apply(tokenizer, [user], add_generation_prompt=True)
    try:
        whole = _apply(tokenizer, [user, {"role": "assistant", "content": _ANSWER}])
    except TemplateError:
        return ""
    end = whole.rfind(_ANSWER)
    return whole[len(opened) : end] if whole.startswith(opened) and end >= len(opened) else ""


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> str:
    template = tokenizer.get_chat_template()
    if "enable_thinking" in template:
        options["enable_thinking"] = False
    if "date_string" in template:
        options["date_string"] = DATE
    if "strftime_now" in template:
        # A macro, since transformers lets no function through to a template.
        template = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}\n" + template
    return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **options)
