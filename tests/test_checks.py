"""Checks of exercises: what is right passes, and each usual mistake is told from the others."""

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from harmlens import checks
from harmlens.evidence.words import WORDS
from harmlens.keep import files
from harmlens.models.chats import tokens
from harmlens.world import vale as world

TOLD = files.read_yaml(files.data_dir() / "checks.yaml")


def resid(lm, prompt, layer, put=None, at=-1):
    """Last logits of a prompt, with the stream behind a layer overwritten somewhere; and that stream."""
    seen = {}

    def hook(module, inputs, out):
        out = out.clone()
        seen["stream"] = out.clone()
        if put is not None:
            out[:, at] = put[:, at]
        return out

    ids = torch.tensor([tokens(lm.tokenizer, prompt.render(lm))])
    handle = lm.model.model.layers[layer].register_forward_hook(hook)
    with torch.no_grad():
        logits = lm.model(ids).logits[:, -1]
    handle.remove()
    return logits, seen["stream"]


def patched(lm, pair, layer, y1, *, at=-1, shift=0, flip=False, nothing=False):
    x1, x0 = (pair.x0, pair.x1) if flip else (pair.x1, pair.x0)
    _, stream = resid(lm, x1, layer + shift)
    return float(y1(resid(lm, x0, layer + shift, None if nothing else stream, at)[0]))


def interval(by, values):
    return values.mean() - by, values.mean() + by


def t90(values, quantile=0.95, **options):
    ddof, over = options.get("ddof", 1), options.get("over", len(values) ** 0.5)
    return interval(scipy_stats.t.ppf(quantile, len(values) - 1) * values.std(ddof=ddof) / over, values)


def percentiles(values, ends=(2.5, 97.5), replace=True):
    rng = np.random.default_rng(3)
    means = [rng.choice(values, len(values), replace=replace).mean() for _ in range(4000)]
    return np.percentile(means, ends)


def vector(patch, seed, draw=torch.randn):
    new = draw(len(patch), generator=torch.Generator().manual_seed(seed))
    return new * patch.norm() / new.norm()


def taken(prune, preserve, p, q):
    order, kept = prune.flatten().argsort(), preserve.flatten().argsort(descending=True)
    n, m = (int(share * prune.numel()) for share in (q, p))
    return [i for i in order[:n].tolist() if i not in set(kept[:m].tolist())]


def hues(modifier, noun):
    return world.hue(modifier) == "sun", world.hue(noun) == "sun"


def word(effect, diff, threshold, no_effect, delta, *, mean=False):
    low, high = effect
    if (sum(effect) / 2 if mean else low) > threshold and diff[0] > 0:
        return "supported"
    if low > no_effect and diff[0] > 0:
        return "partial"
    return "contradicted" if diff[1] < delta or high < threshold else "inconclusive"


RIGHT = {
    "harm_rule": lambda m, n: hues(m, n)[0] != hues(m, n)[1],
    "outcome": lambda x, a, b: x[a].logsumexp(0) - x[b].logsumexp(0),
    "one_patch": patched,
    "nie": lambda y1, y0, y: (y - y0).mean() / (y1 - y0).mean(),
    "tie": lambda y1, y0, y: (y1 - y).mean() / (y1 - y0).mean(),
    "matched_null": vector,
    "signed_score": lambda w, g: w * g.sum(0),
    "set_difference": taken,
    "bootstrap": percentiles,
    "run_interval": t90,
    "five_words": word,
}
WRONG = {
    "harm_rule": {
        "flipped": lambda m, n: hues(m, n)[0] == hues(m, n)[1],
        "noun": lambda m, n: not hues(m, n)[1],
        "modifier": lambda m, n: hues(m, n)[0],
        "type": lambda m, n: "harmful" if hues(m, n)[0] != hues(m, n)[1] else "harmless",
        "constant": lambda m, n: True,
    },
    "outcome": {
        "mean": lambda x, a, b: x[a].mean() - x[b].mean(),
        "sum": lambda x, a, b: x[a].sum() - x[b].sum(),
        "probabilities": lambda x, a, b: x.softmax(0)[a].sum() - x.softmax(0)[b].sum(),
        "largest": lambda x, a, b: x[a].max() - x[b].max(),
        "first": lambda x, a, b: x[a][0] - x[b][0],
    },
    "one_patch": {
        "nothing": lambda *args: patched(*args, at=0),
        "other": lambda *args: patched(*args, at=slice(None)),
        "reversed": lambda *args: patched(*args, flip=True),
        "early": lambda *args: patched(*args, shift=-1),
        "late": lambda *args: patched(*args, shift=1),
    },
    "nie": {
        "ratios": lambda y1, y0, y: ((y - y0) / (y1 - y0)).mean(),
        "plain": lambda y1, y0, y: (y - y0).mean(),
        "left": lambda y1, y0, y: (y1 - y).mean() / (y1 - y0).mean(),
    },
    "tie": {
        "ratios": lambda y1, y0, y: ((y1 - y) / (y1 - y0)).mean(),
        "plain": lambda y1, y0, y: (y1 - y).mean(),
        "kept": lambda y1, y0, y: (y - y0).mean() / (y1 - y0).mean(),
    },
    "matched_null": {
        "shape": lambda patch, seed: patch[:9],
        "seeds": lambda patch, seed: vector(patch, 0),
        "unsteady": lambda patch, seed: vector(patch, int(np.random.default_rng().integers(10**6))),
        "norm": lambda patch, seed: torch.randn(len(patch), generator=torch.Generator().manual_seed(seed)),
        "shuffled": lambda patch, seed: patch[
            torch.randperm(len(patch), generator=torch.Generator().manual_seed(seed))
        ],
        "same": lambda patch, seed: -patch,
    },
    "signed_score": {
        "flipped": lambda w, g: -w * g.sum(0),
        "preserve": lambda w, g: w.abs() * g.abs().sum(0),
        "absolute": lambda w, g: (w * g.sum(0)).abs(),
        "gradient": lambda w, g: g.sum(0),
        "mean": lambda w, g: w * g.mean(0),
    },
    "set_difference": {
        "highest": lambda a, b, p, q: taken(-a, b, p, q),
        "lowest": lambda a, b, p, q: taken(a, -b, p, q),
        "exchanged": lambda a, b, p, q: taken(a, b, q, p),
        "whole": lambda a, b, p, q: taken(a, b, 0.0, q),
        "common": lambda a, b, p, q: set(taken(a, b, 0.0, q)) & set(taken(-b, b, 0.0, p)),
    },
    "bootstrap": {
        "width": lambda values: percentiles(values, replace=False),
        "values": lambda values: np.percentile(values, (2.5, 97.5)),
        "spread": lambda values: interval(1.96 * values.std(ddof=1), values),
        "narrow": lambda values: percentiles(values, (5, 95)),
    },
    "run_interval": {
        "range": lambda values: (values.min(), values.max()),
        "normal": lambda values: interval(1.645 * values.std(ddof=1) / 2, values),
        "wide": lambda values: t90(values, 0.975),
        "deviation": lambda values: t90(values, over=1),
        "population": lambda values: t90(values, ddof=0),
    },
    "five_words": {"mean": lambda *case: word(*case, mean=True)},
}


@pytest.mark.parametrize("check", RIGHT)
def test_what_is_right_passes(check, capsys):
    getattr(checks, check)(RIGHT[check])
    assert capsys.readouterr().out == f"{check}: right\n"


@pytest.mark.parametrize(("check", "mistake"), [(c, m) for c, known in WRONG.items() for m in known])
def test_each_usual_mistake_is_named(check, mistake):
    with pytest.raises(checks.Wrong) as error:
        getattr(checks, check)(WRONG[check][mistake])
    assert TOLD[check][mistake] in str(error.value) and str(error.value).startswith(f"{check}: ")


def test_every_message_has_a_mistake_that_brings_it_up():
    assert TOLD.keys() == RIGHT.keys()
    tried = {check: set(known) for check, known in WRONG.items() if check != "five_words"}
    assert tried == {check: set(told) for check, told in TOLD.items() if check != "five_words"}
    assert set(TOLD["five_words"]) == set(checks._CASES)
    said = {word(*case, 0.5, 0.0, 0.1) for case in checks._CASES.values()}
    assert said == set(WORDS) - {"not testable"}


@pytest.mark.parametrize("check", RIGHT)
def test_a_starter_that_gives_nothing_back_is_told_so(check):
    with pytest.raises(checks.Wrong, match=r"nothing back|you say None"):
        getattr(checks, check)(lambda *given: None)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda w, g: "much", "a number or an array is wanted, and str came"),
        (lambda w, g: w[0], r"should have the shape \(4, 5\), and has \(5,\)"),
        (lambda w, g: w + 1, "not what the package gives on this case"),
    ],
)
def test_anything_else_is_said_plainly(function, message):
    with pytest.raises(checks.Wrong, match=message):
        checks.signed_score(function)
    with pytest.raises(checks.Wrong, match="the sign is flipped"):
        checks.nie(lambda *y: -RIGHT["nie"](*y))
    with pytest.raises(checks.Wrong, match="3 weights, 0 of them right"):
        checks.set_difference(lambda *scores: [-1, -2, -3])
