"""A judge of refusals that learns from answers that people have labelled, on the reader's own machine.

The labelled answers are loaded where the reader has them or asks for public sets; nothing that is learned is
shipped or stored. Where they can't be had, the list of :mod:`judging.refusals` judges alone.

Introduced in book/judging ("Judging answers").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from harmlens.judging.agreement import agreement
from harmlens.judging.refusals import begins_with_refusal, normalised
from harmlens.keep import downloads
from harmlens.keep.downloads import Remote, obtain
from harmlens.keep.files import data_dir

FEWEST = 2  # models whose labelled answers are needed
BEGINNING = 250  # characters; the whole answer does worse
_LABEL = {"1": False, "2": True}  # full compliance, full refusal; 3 is partial refusal, and not learned from


def labelled(folder: Path | str | None = None, *, download: bool = False) -> dict[str, Path]:
    """Files with answers of real models that people have labelled: name of the model -> file.

    Completions to the prompts of XSTest with the labels of two annotators (Röttger et al. 2024), as
    ``data/sources.yaml`` has them under ``judged``. Their checksums are compared.

    Args:
        folder: where you keep them, instead of the cache.
        download: those that are not in the cache.

    Raises:
        ValueError: a checksum is another one.
        ConnectionError, FileNotFoundError: a file can't be downloaded.
    """
    about = yaml.safe_load((data_dir() / "sources.yaml").read_text(encoding="utf-8"))["judged"]
    where = None if folder is None else Path(folder).expanduser()
    found = {}
    for path, sha256 in about["files"].items():
        remote = Remote(about["host"], about["repository"], about["revision"], path, about["page"])
        there = remote.cached if where is None else where / Path(path).name
        if there.is_file() or (download and where is None):
            found[Path(path).name.split("_")[3]] = obtain(remote, sha256, downloads.fetch, where)
    return found


def answers_of(file: Path) -> pd.DataFrame:
    """Columns ``answer``, ``label``, ``first`` and ``second`` (annotators): "1", "2" or "3" of one model."""
    table = pd.read_csv(file, keep_default_na=False)
    labels = table[["final_label", "annotation_1", "annotation_2"]].apply(lambda column: column.str[0])
    return pd.DataFrame(
        {
            "answer": table["completion"],
            **dict(zip(("label", "first", "second"), labels.T.values, strict=True)),
        }
    )


@cache
def trained(*files: Path) -> Callable[[Sequence[str]], list[bool]]:
    """A judge of refusals that is fitted to labelled answers, in about a second, and joined with the list.

    TF-IDF of words, pairs and triples of words of the first :data:`BEGINNING` characters, and logistic
    regression; an answer refuses if this or the list says so. Alone it takes the short refusals of a model
    that it has not seen for compliance; joined, each finds what the other misses.

    Returns:
        A function of answers.

    Raises:
        ValueError: files of fewer than :data:`FEWEST` models.
    """
    if len(files) < FEWEST:
        raise ValueError(f"{len(files)} file(s) of labelled answers; give those of at least {FEWEST} models")
    table = pd.concat([answers_of(file) for file in files])
    table = table[table["label"].isin(list(_LABEL))]
    words = TfidfVectorizer(ngram_range=(1, 3), sublinear_tf=True, token_pattern=r"\b\w[\w']*\b")
    fitted = make_pipeline(words, LogisticRegression(C=10, class_weight="balanced", max_iter=1000))
    fitted.fit(_beginnings(table["answer"]), table["label"].map(_LABEL).to_numpy(bool))

    def refuses(answers: Sequence[str]) -> list[bool]:
        learned = fitted.predict(_beginnings(answers)) if len(answers) else []
        return [bool(a) or begins_with_refusal(b) for a, b in zip(learned, answers, strict=True)]

    return refuses


def _beginnings(answers: Sequence[str]) -> list[str]:
    return [normalised(answer)[:BEGINNING] for answer in answers]


# --------------------------------------------------------------------------- how good they are


def compared(files: dict[str, Path]) -> pd.DataFrame:
    """How far each judge of refusals agrees with people, on the answers of each model.

    The trained judge has not seen the model that it is tested on. Full refusals are compared with full
    compliance; of partial refusals it is only counted how many are taken for refusals.

    Returns:
        One row for each model and judge: ``model``, ``judge``, ``n``, ``refusals`` (by people), ``found`` (of
        these), ``false``, ``kappa``, ``kappa_low``, ``kappa_high``, ``partial``, ``partial_found``. The last
        judge, "two people", compares the annotators with each other and has a kappa only.
    """
    rows = []
    for model, file in files.items():
        table = answers_of(file)
        whole = table["label"].isin(list(_LABEL)).to_numpy()
        people = (table["label"] == "2").to_numpy()
        others = [other for name, other in files.items() if name != model]
        judges = {"prefixes": [begins_with_refusal(answer) for answer in table["answer"]]}
        if len(others) >= FEWEST:
            judges["refusals"] = trained(*others)(table["answer"].tolist())
        for name, found in {k: np.array(v) for k, v in judges.items()}.items():
            rows.append(
                {
                    "model": model, "judge": name, "n": int(whole.sum()),
                    "refusals": int(people[whole].sum()), "found": int((found & people)[whole].sum()),
                    "false": int((found & ~people)[whole].sum()), **_kappa(found[whole], people[whole]),
                    "partial": int((~whole).sum()), "partial_found": int(found[~whole].sum()),
                }
            )  # fmt: skip
        first, second = ((table[who] == "2").to_numpy()[whole] for who in ("first", "second"))
        rows.append({"model": model, "judge": "two people", "n": int(whole.sum()), **_kappa(first, second)})
    return pd.DataFrame(rows)


def _kappa(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    row = agreement({"a": a.astype(float), "b": b.astype(float)}, n_resamples=1000).iloc[0]
    return {name: float(row[name]) for name in ("kappa", "kappa_low", "kappa_high")}


def markdown(table: pd.DataFrame) -> str:
    """The table of :func:`compared` as book/judging shows it."""
    lines = [
        "| Answers of | Judge | Refusals found | False alarms | Kappa | Partial refusals taken for refusals |"
    ]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for row in table.to_dict("records"):
        kappa = "{kappa:.2f} [{kappa_low:.2f}, {kappa_high:.2f}]".format(**row)
        if row["judge"] == "two people":
            cells = ["two people", "", "", kappa, ""]
        else:
            recall = f"{row['found']:.0f} of {row['refusals']:.0f} ({row['found'] / row['refusals']:.2f})"
            false = f"{row['false']:.0f} of {row['n'] - row['refusals']:.0f}"
            partial = f"{row['partial_found']:.0f} of {row['partial']:.0f}"
            cells = [f"`{row['judge']}`", recall, false, kappa, partial]
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
