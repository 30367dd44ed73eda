"""Numbers that must not come without a word: drops of nothing, repeated questions, torn epochs."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from harmlens.asking import public
from harmlens.asking.datasets import Entry
from harmlens.evidence import stats
from harmlens.models import forward
from harmlens.training import loop, tune

FAST = {"n_resamples": 200}

# ------------------------------------------------------------------ relative drops and their intervals


def exact(k, n):
    found = scipy_stats.binomtest(k, n).proportion_ci(method="exact")
    return pytest.approx((found.low, found.high))


def before_and_after(had, left, never=0):
    return [[1, 0]] * (had - left) + [[1, 1]] * left + [[0, 0]] * never


def test_t20_a_drop_of_nothing_is_refused():
    nothing = before_and_after(0, 0, never=3)
    with pytest.raises(stats.TooFew, match="values: nothing was there before"):
        stats.bootstrap_ci(nothing, "relative drop")
    with pytest.raises(stats.TooFew, match="nothing was there before"):  # something came, nothing went
        stats.bootstrap_ci([[0, 1], [0, 1]], "relative drop")


@given(st.integers(1, 12), st.integers(0, 40))
@settings(max_examples=20, deadline=None)
def test_t20_all_gone_is_exact_over_the_units_that_had_it(had, never):
    values = before_and_after(had, 0, never)
    if len(values) < 2:
        return
    gone = stats.bootstrap_ci(values, "relative drop")
    assert (gone.value, gone.n) == (1.0, had) and gone.ci == exact(had, had)
    graded = stats.bootstrap_ci(
        np.array(values) * 0.3, "relative drop"
    )  # part of an ability is one trial too
    assert graded == gone
    stayed = stats.bootstrap_ci([[a, a] for a, _ in values], "relative drop")
    assert (stayed.value, stayed.n) == (0.0, had) and stayed.ci == exact(0, had)


def test_t20_one_of_a_hundred_says_next_to_nothing():
    one = before_and_after(1, 0, never=99)
    assert stats.bootstrap_ci(one, "relative drop").ci == pytest.approx((0.025, 1.0))


@given(st.integers(3, 9), st.integers(1, 2), st.integers(0, 200))
@settings(max_examples=20, deadline=None)
def test_t20_units_without_the_ability_change_nothing(had, left, never):
    few, many = before_and_after(had, left), before_and_after(had, left, never)
    assert stats.bootstrap_ci(few, "relative drop", **FAST) == stats.bootstrap_ci(
        many, "relative drop", **FAST
    )


def test_a_denominator_that_resamples_to_zero_is_said_without_a_warning(recwarn):
    gained = [[1, 0], [0, 1], [0, 1]]
    for statistic, values in (("relative drop", gained), ("ratio", [[1, 0], [1, 0], [1, 1]])):
        with pytest.raises(stats.TooFew, match="too few units"):
            stats.bootstrap_ci(values, statistic)
    with pytest.raises(ValueError, match="denominator zero"):
        stats.bootstrap_ci([[1, 0]] * 4, "ratio")
    with pytest.raises(stats.TooFew, match="one unit only counts"):
        stats.bootstrap_ci([[1.0, 0.4], [0.0, 0.0]], "relative drop")
    assert not recwarn.list


@pytest.mark.parametrize(("k", "n"), [(math.nan, 4), (1, math.nan), (1, math.inf)])
def test_counts_that_are_none_are_named(k, n):
    with pytest.raises(ValueError, match="must be a whole number"):
        stats.proportion_ci(k, n)


# ------------------------------------------------------------------ epochs


def marked(n, lengths=(1,)):
    """Rows that are told by their first token."""
    return [
        forward.Row([100 + i] * lengths[i % len(lengths)], [True] * lengths[i % len(lengths)])
        for i in range(n)
    ]


@given(
    st.integers(1, 70),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(0, 9),
    st.sampled_from([(1,), (1, 5, 3)]),
)
@settings(max_examples=60, deadline=None)
def test_h6_an_epoch_holds_each_row_once(n, size, pool, seed, lengths):
    stream = loop.shuffled(marked(n, lengths), size, 0, seed=seed, pool=pool)
    steps = tune.steps_of(1, n, size)
    for _ in range(3):
        seen = [b.ids[:, 0].tolist() for b in itertools.islice(stream, steps)]
        assert Counter(itertools.chain(*seen)) == Counter(range(100, 100 + n))
        sizes = [len(each) for each in seen]
        assert max(sizes) <= size and max(sizes) - min(sizes) <= 1


def test_h6_three_epochs_in_as_many_steps_as_are_said():
    for n, size in ((24, 16), (96, 16), (17, 16), (5, 16), (257, 16)):
        steps = tune.steps_of(3, n, size)
        seen = Counter()
        for batch in itertools.islice(loop.shuffled(marked(n), size, 0), steps):
            seen.update(batch.ids[:, 0].tolist())
        assert set(seen.values()) == {3} and len(seen) == n


def test_h6_a_run_of_one_epoch_learns_every_row():
    """Of 24 rows, two steps once saw seven."""
    lm = tiny.model()
    rows = [forward.Row([5, 5, 40 + i], [False, False, True]) for i in range(24)]
    before = lm.model.get_output_embeddings().weight.detach().clone()
    recipe = tune.Recipe(steps=tune.steps_of(1, 24, 16), lr=1e-3, batch_size=16, weight_decay=0.0)
    tune.tune(lm, rows, recipe)
    assert recipe.steps == 2
    moved = (lm.model.get_output_embeddings().weight.detach() - before).abs().sum(1)
    assert (moved[40:64] > 0).all()


# ------------------------------------------------------------------ the same question


def fact(number, prompt, *answers):
    return Entry(f"f{number}", prompt, False, "fact", answers=answers)


@given(st.integers(1, 30), st.integers(1, 200), st.integers(0, 9))
@settings(max_examples=30)
def test_h4_no_question_is_two_units(known, n, seed):
    entries = [fact(i, f"Question {i}?", str(i)) for i in range(known)]
    asked = public.ask_facts(entries, n, seed=seed)
    assert len(asked) == len({repr(c) for c in asked.chats}) == len(set(asked.units)) == min(n, known)
    assert public.ask_facts(entries, n, seed=seed) == asked


def test_h4_a_question_that_is_there_twice_counts_once_with_both_answers():
    asked = public.ask_facts(
        [fact(0, "What is C++?", "a"), fact(1, "What is  c++?", "b"), fact(2, "What is C#?", "c")]
    )
    assert asked.units == ("f0", "f2")
    assert asked.answers == (("a", "b", "C++ is a", "C++ is b"), ("c", "C# is c"))


def test_t17_facts_are_drawn_at_random_and_not_from_the_top():
    entries = [fact(i, f"Question {i}?", str(i)) for i in range(200)]
    drawn = public.ask_facts(entries, 50)
    place = np.array([int(unit[1:]) for unit in drawn.units])
    assert 70 < place.mean() < 130 and (np.diff(place) > 0).all()
    assert public.ask_facts(entries, 50, seed=1).units != drawn.units
