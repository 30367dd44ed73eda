"""Settings of the method: every one of them must be what a sweep of its own gives."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from harmlens.asking import pairs as prompts
from harmlens.flow import outcomes, patching, robustness
from harmlens.world import vale as world

SETS = outcomes.TokenSets((20, 21), (30,))


@pytest.fixture(scope="module")
def lm():
    return tiny.model("llama")


@pytest.fixture(scope="module")
def pairs():
    return prompts.pairs("behaviour", n=4)


def replies(pairs, skip=0):
    harmful = [f"{world.OPENERS[0]} {world.procedure(p.x0.about)}" for p in pairs]
    return outcomes.Replies(harmful, [world.REFUSALS[0]] * len(pairs), skip)


@pytest.fixture(scope="module")
def found(lm, pairs):
    return robustness.vary(lm, pairs, SETS, replies(pairs), windows=(1, 3))


def test_every_combination_is_there_once(found):
    assert len(found) == 2 * 4 * 2 * 2 * 2
    for effects in found.values():
        assert set(effects) == {*robustness.SITES, "total"}
        assert effects["layer"].shape == (4, 2) and np.isfinite(effects["layer"]).all()


@pytest.mark.parametrize("noise", [("swap", None), ("noise", 3.0)])
@pytest.mark.parametrize("direction", patching.DIRECTIONS)
@pytest.mark.parametrize(("name", "outcome"), [("Y1", outcomes.y1), ("Y2", outcomes.y2)])
def test_first_word_outcomes_equal_a_plain_sweep(lm, pairs, found, noise, direction, name, outcome):
    for where in robustness.POSITIONS:
        plain = patching.sweep(
            lm, pairs, outcome(SETS), sites=("mlp_out",), positions=where, direction=direction, noise=noise[1]
        )
        same = found[robustness.Setting(noise[0], name, direction, where, 1)]
        np.testing.assert_allclose(same["mlp_out"], plain.at("mlp_out").T, atol=1e-4)
        np.testing.assert_allclose(same["total"], plain.total, atol=1e-4)


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("window", [1, 3])
def test_whole_reply_outcomes_equal_a_plain_sweep(lm, pairs, found, skip, window):
    plain = patching.sweep(lm, pairs, replies(pairs, skip), positions="last", window=window)
    name = ("Y3", "Y3 from word 2")[skip]
    same = found[robustness.Setting("swap", name, "denoising", "last", window)]
    np.testing.assert_allclose(same["layer"], plain.at("layer").T, atol=1e-4)


def test_first_word_outcomes_alone_are_the_same(lm, pairs, found):
    short = robustness.vary(lm, pairs, SETS, replies(pairs), outcomes=("Y1", "Y2"), windows=(1,))
    assert {setting.outcome for setting in short} == {"Y1", "Y2"}
    for setting, effects in short.items():
        np.testing.assert_allclose(effects["attn_out"], found[setting]["attn_out"], atol=1e-4)


def test_the_null_moves_in_other_directions(lm, pairs, found):
    null = robustness.vary(lm, pairs, SETS, replies(pairs), outcomes=("Y1",), windows=(1,), null=0)
    for setting, effects in null.items():
        np.testing.assert_allclose(effects["total"], found[setting]["total"], atol=1e-4)
        assert not np.allclose(effects["layer"], found[setting]["layer"], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "what"),
    [({"windows": (2,)}, "windows"), ({"outcomes": ("Y9",)}, "outcomes"), ({"outcomes": ()}, "outcomes")],
)
def test_bad_settings_are_named(lm, pairs, options, what):
    with pytest.raises(ValueError, match=what):
        robustness.vary(lm, pairs, SETS, replies(pairs), **options)
