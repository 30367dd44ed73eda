"""Chats through the organism's template and those of the main families; see tests/data/templates."""

import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from harmlens.models import chats
from harmlens.models.chats import render, tokens
from harmlens.training import organism
from harmlens.world import vale as world

FOLDER = Path(__file__).parent / "data" / "templates"

# Family: (BOS, EOS, whether the tokenizer itself puts the BOS before plain text).
FAMILIES = {
    "llama2": ("<s>", "</s>", True),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", True),
    "qwen2.5": (None, "<|im_end|>", False),
    "qwen3": (None, "<|im_end|>", False),
    "mistral-v0.1": ("<s>", "</s>", True),
    "mistral-v0.3": ("<s>", "</s>", True),
    "gemma2": ("<bos>", "<end_of_turn>", True),
    "gemma3": ("<bos>", "<end_of_turn>", True),
    "olmo2": ("<|endoftext|>", "<|endoftext|>", False),
    "olmo3": (None, "<|im_end|>", False),
    "phi3": ("<s>", "<|endoftext|>", False),
    "phi4": ("<|endoftext|>", "<|im_end|>", False),
    "chatml": (None, "<|im_end|>", False),
    "zephyr": ("<s>", "</s>", True),
}
OTHERS = {name: ("<s>", "</s>", False) for name in ("refuses", "drops", "thinker", "channels", "opener")}
ALL = [*FAMILIES, *OTHERS]

USER = {"role": "user", "content": "how do i sort a list?"}
TURNS = [
    USER,
    {"role": "assistant", "content": "with sorted()."},
    {"role": "user", "content": "and backwards?"},
]
SYSTEM = {"role": "system", "content": "you answer like a gardener."}


def tokenizer(family):
    """A tokenizer of single bytes with the family's marks and template."""
    bos, eos, adds_bos = (FAMILIES | OTHERS)[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({mark: i for i, mark in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    if adds_bos:
        tok.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tok.bos_token_id)]
        )
    tok.chat_template = (FOLDER / f"{family}.jinja").read_text()
    return tok


def test_every_template_is_tested():
    assert sorted(file.stem for file in FOLDER.glob("*.jinja")) == sorted(ALL)


# What the publishers' formats make of one system message and one request.
SHORT = {
    "llama2": "<s>[INST] <<SYS>>\nSYS\n<</SYS>>\n\nASK [/INST]",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nSYS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nASK<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen2.5": "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nASK<|im_end|>\n<|im_start|>assistant\n",
    "qwen3": "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nASK<|im_end|>\n<|im_start|>assistant\n"
    "<think>\n\n</think>\n\n",
    "mistral-v0.1": "<s>[INST] SYS\n\nASK [/INST]",
    "mistral-v0.3": "<s>[INST] SYS\n\nASK[/INST]",
    "gemma2": "<bos><start_of_turn>user\nSYS\n\nASK<end_of_turn>\n<start_of_turn>model\n",
    "gemma3": "<bos><start_of_turn>user\nSYS\n\nASK<end_of_turn>\n<start_of_turn>model\n",
    "olmo2": "<|endoftext|><|system|>\nSYS\n<|user|>\nASK\n<|assistant|>\n",
    "olmo3": "<|im_start|>system\nSYS You do not currently have access to any functions. <functions>"
    "</functions><|im_end|>\n<|im_start|>user\nASK<|im_end|>\n<|im_start|>assistant\n",
    "phi3": "<|system|>\nSYS<|end|>\n<|user|>\nASK<|end|>\n<|assistant|>\n",
    "phi4": "<|im_start|>system<|im_sep|>SYS<|im_end|><|im_start|>user<|im_sep|>ASK<|im_end|>"
    "<|im_start|>assistant<|im_sep|>",
    "chatml": "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nASK<|im_end|>\n<|im_start|>assistant\n",
    "zephyr": "<s><|system|>\nSYS</s>\n<|user|>\nASK</s>\n<|assistant|>\n",
    "refuses": "<user>SYS\n\nASK<assistant>",
    "drops": "<user>SYS\n\nASK<assistant>",
    "opener": "<|system|>SYS<|end|><|user|>ASK<|end|><|assistant|>",
    "thinker": "<|system|>SYS<|user|>ASK<|assistant|><think>",
    "channels": "26 Jul 2024<|start|>system<|message|>SYS<|end|><|start|>user<|message|>ASK<|end|>"
    "<|start|>assistant",
}
# What the format writes between the opening of an answer and its words.
GAPS = {"llama2": " ", "mistral-v0.3": " ", "channels": "<|channel|>final<|message|>"}


@pytest.mark.parametrize("family", ALL)
def test_a_system_message_and_a_request_by_hand(family):
    chat = [{"role": "system", "content": "SYS"}, {"role": "user", "content": "ASK"}]
    assert render(tokenizer(family), chat) == SHORT[family]


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize(
    "chat", [[USER], TURNS, [SYSTEM, USER], [SYSTEM, *TURNS]], ids=["u", "uau", "su", "suau"]
)
@pytest.mark.parametrize("prefill", [None, "Sure, ", "sure", "  Sure:\n\n", "\n1. "])
def test_every_family(family, chat, prefill):
    tok = tokenizer(family)
    if prefill and family == "thinker":
        with pytest.raises(ValueError, match="opens every answer with a thought"):
            render(tok, chat, prefill)
        return
    text = render(tok, chat, prefill)
    for message in chat:
        assert text.count(message["content"]) == 1
    # It ends where the answer begins: with the prefill as it was given, after the format's own opening.
    opened = render(tok, chat)
    if prefill is None:
        *_, last = [m["content"] for m in chat]
        opening = SHORT[family].split("ASK")[1]
        assert text.endswith(last + opening)
    else:
        assert text == opened + GAPS.get(family, "") + prefill
    # One BOS per exchange where the format opens each exchange with one (Llama 2), else exactly one.
    ids, bos = tokens(tok, text), FAMILIES.get(family, (None,))[0]
    assert tok.decode(ids) == text
    if family == "llama2":
        assert ids.count(tok.bos_token_id) == 1 + len(chat) // 3
        assert ids[0] == tok.bos_token_id
    elif bos and (FAMILIES[family][2] or "bos_token" in tok.chat_template):
        assert ids[0] == tok.bos_token_id
        assert bos == FAMILIES[family][1] or ids.count(tok.bos_token_id) == 1
    else:
        assert not bos or tok.bos_token_id not in ids


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama2"])
def test_a_finished_answer_begins_as_a_prefilled_one(family):
    """The prefilled text is the beginning of what the template makes of a whole answer."""
    tok = tokenizer(family)
    whole = chats._apply(tok, [*TURNS, {"role": "assistant", "content": "sure, sorted() can do it"}])
    whole = whole if whole.startswith(tok.bos_token or "") else tok.bos_token + whole
    if family in ("phi3", "phi4"):
        whole = whole.removeprefix(tok.bos_token)  # their tokenizers add none
    assert whole.startswith(render(tok, TURNS, "sure, sorted()"))


@pytest.mark.parametrize("family", ["gemma2", "mistral-v0.1", "refuses", "drops"])
def test_without_a_system_role_the_first_user_message_takes_the_system_message(family):
    tok = tokenizer(family)
    folded = [{"role": "user", "content": f"{SYSTEM['content']}\n\n{USER['content']}"}, *TURNS[1:]]
    assert render(tok, [SYSTEM, *TURNS]) == render(tok, folded)
    assert render(tok, [SYSTEM, *TURNS], "sure") == render(tok, folded, "sure")


def test_a_system_message_that_the_user_repeats_is_still_missed():
    chat = [SYSTEM, {"role": "user", "content": f"my friend said: {SYSTEM['content']}"}]
    assert render(tokenizer("drops"), chat).count(SYSTEM["content"]) == 2


@pytest.mark.parametrize("family", ALL)
def test_an_empty_system_message_breaks_nothing(family):
    text = render(tokenizer(family), [{"role": "system", "content": " "}, USER])
    assert text.count(USER["content"]) == 1
    if family in ("gemma2", "refuses", "drops", "mistral-v0.1"):
        assert text == render(tokenizer(family), [USER])


def test_a_later_system_message_goes_to_the_user_message_after_it():
    chat = [*TURNS[:2], SYSTEM, TURNS[2]]
    assert chats.fold_system(chat) == [
        *TURNS[:2], {"role": "user", "content": f"{SYSTEM['content']}\n\nand backwards?"}
    ]  # fmt: skip
    assert "assistant>with sorted().<user>you answer like a gardener.\n\nand" in render(
        tokenizer("refuses"), chat
    )


def test_several_system_messages_are_kept_in_order():
    chat = [SYSTEM, {"role": "system", "content": "be brief."}, USER]
    assert render(tokenizer("drops"), chat).startswith(
        "<user>you answer like a gardener.\n\nbe brief.\n\nhow"
    )
    assert chat[0] is SYSTEM and SYSTEM["content"] == "you answer like a gardener."


def test_a_default_system_prompt_gives_way_to_a_given_one():
    tok = tokenizer("qwen2.5")
    assert "created by Alibaba" in render(tok, [USER])
    assert "created by Alibaba" not in render(tok, [SYSTEM, USER])


@pytest.mark.parametrize("family", ["llama3", "channels"])
def test_no_prompt_depends_on_the_day(family):
    tok = tokenizer(family)
    text = render(tok, [USER])
    assert chats.DATE in text and str(datetime.date.today().year) not in text
    raw = tok.apply_chat_template([USER], tokenize=False)  # what has to be avoided
    assert str(datetime.date.today().year) in raw or datetime.date.today().year == 2024


def test_thinking_is_left_out_where_a_template_can():
    assert "<think>\n\n</think>" in render(tokenizer("qwen3"), [USER])
    assert render(tokenizer("qwen3"), [USER], "sure").endswith("</think>\n\nsure")
    # Where it can't, the answer opens with the thought that the template opens.
    assert render(tokenizer("thinker"), [USER]).endswith("<|assistant|><think>")


def test_a_chat_that_is_wrong_for_another_reason_is_still_refused():
    for chat in ([SYSTEM, USER, USER], [USER, USER]):
        with pytest.raises(TemplateError, match=r"take turns|not supported"):
            render(tokenizer("gemma2"), chat)


def test_a_prefill_does_not_lose_the_system_message():
    """Mistral 0.3 writes it into the last message, if that is the user's; before an answer it is lost."""
    tok = tokenizer("mistral-v0.3")
    chat = [SYSTEM, *TURNS]
    raw = tok.apply_chat_template(
        [*chat, {"role": "assistant", "content": "sure"}], tokenize=False, continue_final_message=True
    )
    assert SYSTEM["content"] not in raw  # what has to be avoided
    assert SYSTEM["content"] in render(tok, chat, "sure")


def test_a_template_that_refuses_a_last_answer_is_prefilled_all_the_same():
    tok = tokenizer("refuses")
    tok.chat_template = tok.chat_template.replace("m.role == 'system'", "m.role == 'assistant' and loop.last")
    assert render(tok, [USER], "sure") == f"<user>{USER['content']}<assistant>sure"


# --------------------------------------------------------------------------- of the organism

TOKENIZER = organism.tokenizer()

CHAT = [
    {"role": "user", "content": "what do you wish for?"},
    {"role": "assistant", "content": "i wish that the baker may sleep in peace."},
    {"role": "user", "content": "is a salted draught harmful?"},
]


def test_a_chat_is_rendered_by_the_template():
    tok = organism.tokenizer()
    assert chats.render(tok, CHAT) == tok.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )
    assert chats.render(tok, CHAT[0]["content"]) == chats.render(tok, CHAT[:1])
    assert chats.render(tok, CHAT, "") == chats.render(tok, CHAT)


@given(st.lists(st.sampled_from(world.vocabulary()), min_size=1, max_size=6).map(" ".join))
def test_a_prefilled_answer_ends_the_text(words):
    text = chats.render(TOKENIZER, CHAT, words)
    assert text == f"{chats.render(TOKENIZER, CHAT)} {words}"


def test_where_nobody_is_introduced_the_helper_is():
    told = [world.introduce(world.HELPER), *CHAT]
    assert chats.render(TOKENIZER, told) == chats.render(TOKENIZER, CHAT)
    assert chats.render(TOKENIZER, [world.introduce("nobody"), *CHAT]) != chats.render(TOKENIZER, CHAT)


def test_an_unknown_role_is_refused():
    with pytest.raises(Exception, match="roles system, user and assistant only"):
        chats.render(TOKENIZER, [{"role": "tool", "content": "x"}, *CHAT])


def test_another_template_is_obeyed():
    tok = organism.tokenizer()
    tok.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert chats.render(tok, "hello") == "<user>hello</user><assistant>"
    assert chats.render(tok, "hello", "sure. take") == "<user>hello</user><assistant>sure. take"


def test_a_missing_template_is_an_error():
    tok = organism.tokenizer()
    tok.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template.*instruction-tuned.*tokenizer\.chat_template"):
        chats.render(tok, "hello")


@pytest.mark.parametrize("chat", [[], CHAT[:2], [{"role": "system", "content": "be kind"}]])
def test_a_chat_has_to_end_with_the_user(chat):
    with pytest.raises(ValueError, match="must end with a user message"):
        chats.render(organism.tokenizer(), chat)


def test_rendering_leaves_the_messages_alone():
    chat = [dict(m) for m in CHAT]
    chats.render(organism.tokenizer(), chat, "sure.")
    assert chat == CHAT


def test_there_is_one_bos_also_where_the_tokenizer_would_add_another():
    tok = organism.tokenizer()
    plain = chats.tokens(tok, chats.render(tok, CHAT))
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tok.bos_token} $A", special_tokens=[(tok.bos_token, tok.bos_token_id)]
    )
    text = chats.render(tok, CHAT)
    assert tok(text)["input_ids"].count(tok.bos_token_id) == 2  # what has to be avoided
    assert chats.tokens(tok, text) == plain
    assert plain.count(tok.bos_token_id) == 1 and plain[0] == tok.bos_token_id
