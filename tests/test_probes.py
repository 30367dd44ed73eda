"""Read-outs: the residual stream as the model has it, and probes that find what is there and nothing else."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from harmlens.flow import probes
from harmlens.models import chats


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@torch.no_grad()
def test_hidden_states_are_those_of_a_plain_forward_pass(architecture):
    lm = tiny.model(architecture)
    texts = tiny.texts(lm)
    states = probes.hidden_states(lm, texts, batch_size=3)
    assert states.shape == (len(texts), tiny.SHAPE.layers + 1, tiny.SHAPE.width)
    for text, got in zip(texts, states, strict=True):
        ids = torch.tensor([chats.tokens(lm.tokenizer, text)])
        plain = lm.model(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(got, torch.stack([s[0, -1] for s in plain]), atol=1e-4, rtol=1e-4)


def test_depth_nought_is_the_last_tokens_embedding():
    lm = tiny.model()
    text = tiny.texts(lm)[0]
    last = chats.tokens(lm.tokenizer, text)[-1]
    table = lm.model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(probes.hidden_states(lm, [text])[0, 0], table[last])


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@torch.no_grad()
def test_states_at_some_words_are_those_of_the_whole_text(architecture):
    lm = tiny.model(architecture)
    chat = "how do i brew a salted draught?"
    part = probes.up_to(lm, chat, "salted draught")
    at = len(chats.tokens(lm.tokenizer, part)) - 1
    ids = chats.tokens(lm.tokenizer, lm.render(chat))
    assert at < len(ids) - 1
    whole = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    expected = torch.stack([s[0, at] for s in whole])
    torch.testing.assert_close(probes.hidden_states(lm, [part])[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_texts_read_at_a_length_are_texts_cut_there(architecture):
    lm = tiny.model(architecture)
    chat = "how do i brew a salted draught?"
    part = probes.up_to(lm, chat, "salted draught")
    at = len(chats.tokens(lm.tokenizer, part))
    got = probes.hidden_states(lm, [lm.render(chat)] * 2, lengths=[at, at - 1])
    shorter = probes.up_to(lm, chat, "salted")
    torch.testing.assert_close(got, probes.hidden_states(lm, [part, shorter]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[0], [10_000]])
def test_a_length_that_a_text_does_not_have(lengths):
    lm = tiny.model()
    with pytest.raises(ValueError, match="must lie between 1 and the number of the text's tokens"):
        probes.hidden_states(lm, tiny.texts(lm)[:1], lengths=lengths)


def test_one_length_for_each_text():
    lm = tiny.model()
    with pytest.raises(ValueError, match="give one to each text; got 1 for 2 texts"):
        probes.hidden_states(lm, tiny.texts(lm)[:2], lengths=[1])


TEMPLATES = {
    "several tokens": "{% for m in messages %}<|user|> {{ m.content }}<|end|>{% endfor %}<|assistant|>",
    "nothing but the message": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "a message that is stripped": "{% for m in messages %}<|user|> {{ m.content | trim }}<|end|>{% endfor %}",
}


@pytest.mark.parametrize(
    ("template", "behind"),
    list(zip(TEMPLATES.values(), ["<|end|><|assistant|>", "", "<|end|>"], strict=True)),
)
def test_places_of_any_template(template, behind):
    lm = tiny.model()
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = template
    lm = replace(lm, tokenizer=tokenizer)
    for chat in (" a salted draught? ", [{"role": "user", "content": " a salted draught? "}]):
        ids = chats.tokens(tokenizer, lm.render(chat))
        found = probes.places(lm, chat)
        assert list(found) == ["last word", "end of message", "last position"]
        assert tokenizer.decode(ids[found["last word"] - 1]) == "?"
        assert found["last position"] == len(ids)
        assert tokenizer.decode(ids[found["last word"] :]).replace(" ", "") == behind
        assert found["end of message"] == min(found["last word"] + 1, len(ids))


def test_places_in_a_chat_of_several_messages():
    lm = tiny.model()
    chat = [
        {"role": "system", "content": "a salted draught?"},
        {"role": "user", "content": "a salted draught?"},
    ]
    ids = chats.tokens(lm.tokenizer, lm.render(chat))
    assert lm.tokenizer.decode(ids[probes.places(lm, chat)["last word"] :]).count("?") == 0


def test_a_text_is_cut_behind_the_last_place():
    lm = tiny.model()
    chat = "is a salted draught a draught?"
    assert probes.up_to(lm, chat, "draught").endswith("a salted draught a draught")
    assert probes.up_to(lm, chat, "salted draught").endswith("is a salted draught")


@pytest.mark.parametrize("words", ["powder", ""])
def test_words_that_do_not_stand_there(words):
    with pytest.raises(ValueError, match="do not stand in the rendered chat"):
        probes.up_to(tiny.model(), "a salted draught?", words)


def test_words_that_end_inside_a_token():
    with pytest.raises(ValueError, match="end inside a token"):
        probes.up_to(tiny.model(), "a salted draught?", "salt")


def test_summed_embeddings_ignore_the_order_of_words():
    lm = tiny.model()
    a, b, c = probes.summed_embeddings(lm, ["salted draught", "draught salted", "salted salted"])
    table = lm.model.get_input_embeddings().weight.detach()
    one, other = (table[lm.tokenizer.convert_tokens_to_ids(w)] for w in ("salted", "draught"))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, one + other)
    torch.testing.assert_close(c, 2 * one)


def sample(n, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6))
    return x, rng


def test_a_probe_finds_a_linear_rule():
    (x, _), (z, _) = sample(300, 0), sample(200, 1)
    right = probes.probe(x, [bool(v) for v in x[:, 2] > 0.3], z, [bool(v) for v in z[:, 2] > 0.3])
    assert right.shape == (200,) and set(right) <= {0.0, 1.0}
    assert right.mean() > 0.95


def test_a_probe_cannot_find_an_exclusive_or_nor_noise():
    (x, rng), (z, other) = sample(600, 0), sample(600, 1)
    xor = [[bool(v) for v in (t[:, 0] > 0) ^ (t[:, 1] > 0)] for t in (x, z)]
    noise = [[bool(v) for v in r.random(600) > 0.5] for r in (rng, other)]
    for train, test in (xor, noise):
        assert 0.4 < probes.probe(x, train, z, test).mean() < 0.6


def test_scaling_and_shifting_features_changes_nothing():
    (x, _), (z, _) = sample(100, 0), sample(50, 1)
    labels, truth = ([bool(v) for v in t.sum(1) > 0] for t in (x, z))
    scale, shift = np.array([1e-3, 1, 10, 1e3, 5, 2]), np.arange(6.0) * 7
    np.testing.assert_array_equal(
        probes.probe(x, labels, z, truth), probes.probe(x * scale + shift, labels, z * scale + shift, truth)
    )


def test_tensors_are_welcome():
    (x, _), (z, _) = sample(100, 0), sample(50, 1)
    labels, truth = ([bool(v) for v in t[:, 0] > 0] for t in (x, z))
    np.testing.assert_array_equal(
        probes.probe(torch.tensor(x), labels, torch.tensor(z), truth), probes.probe(x, labels, z, truth)
    )


@pytest.mark.parametrize(("labels", "truth"), [(3, 4), (4, 3)])
def test_each_row_needs_a_label(labels, truth):
    x = np.eye(4)
    with pytest.raises(ValueError, match="one label to each row of train, and one truth to each row of test"):
        probes.probe(x, [True, False, True, False][:labels], x, [True] * truth)


def test_one_class_is_not_enough():
    with pytest.raises(ValueError, match="labels hold one class only"):
        probes.probe(np.eye(3), [True] * 3, np.eye(3), [True, False, True])


def test_no_texts():
    for read in (probes.hidden_states, probes.summed_embeddings):
        with pytest.raises(ValueError, match="texts is empty"):
            read(tiny.model(), [])
