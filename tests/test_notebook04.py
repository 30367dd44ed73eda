"""What notebook 04 teaches: positions by what stands there, and how far an effect moves with depth."""

from __future__ import annotations

import lecture
import numpy as np
import pytest
import tiny

from harmlens.asking import pairs as prompts
from harmlens.models.chats import tokens


def test_the_shift_is_a_difference_of_centres_of_mass():
    shift = lecture.defined("04").centre_shift
    last, word = np.array([[0, 0, 2.0], [0, 0, 4.0]]), np.array([[3.0, 1.0, 0], [3.0, 1.0, 0]])
    columns = np.concatenate([last, word], axis=1).T
    assert shift(*columns) == pytest.approx(1 - 0.125)
    assert shift(*columns[[3, 4, 5, 0, 1, 2]]) == pytest.approx(0.125 - 1)
    drawn = [np.stack([one, one[::-1]]) for one in columns]  # two resamples of the same units
    np.testing.assert_allclose(shift(*drawn, axis=-1), [0.875, 0.875])


@pytest.mark.parametrize("contrast", ["prompt", "behaviour"])
def test_every_position_from_the_first_difference_on_has_one_role(contrast):
    lm, page = tiny.model(), lecture.defined("04")
    pair = prompts.pairs(contrast, n=1)[0]
    found = page.places(lm, pair)
    spelt = tokens(lm.tokenizer, pair.x1.render(lm))
    known, at = prompts.roles(lm, pair), sorted(i for where in found.values() for i in where)
    assert at[-1] == len(spelt) - 1 and len(set(at)) == len(at)
    assert set(known["request"] + known["template"] + known["last"]) <= set(at)
    for role, word in (("modifier", pair.x1.about.modifier), ("noun", pair.x1.about.noun)):
        assert lm.tokenizer.decode([spelt[i] for i in found[role]]).strip() == word
    assert ("author" in found) == (contrast == "behaviour")


def test_the_most_frequent_kind_is_kept():
    assert lecture.defined("04").most_alike(["ab", "c", "de", "f", "gh"], len) == ["ab", "de", "gh"]
