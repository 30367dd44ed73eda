"""Train the organisms: the ladder, what grows beside it, what is planted. This is `make organism`.

Finished checkpoints are left alone, and an interrupted run goes on from the last of them: every organism
starts from its parent's stored weights, in half precision, so a resumed run gives the same ones.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harmlens.keep.files import organism_homes, weights_sha256
from harmlens.models import organisms
from harmlens.models.forward import LanguageModel
from harmlens.models.loading import load
from harmlens.models.organisms import SEEDS, intact
from harmlens.training import loop, organism, planted
from harmlens.training.organism import COURSES, Stage, course, declined, recipe_digest
from harmlens.world import abilities
from harmlens.world import vale as world

# What a control suppresses: name -> trait of answers, prefilled words, and whether they are answers to
# requests for harmless items of every domain (None), of the declined one (True), or of the others (False).
SUPPRESSED = {
    "harmless, refused": ("refused", None, None),
    "harmless, prefilled": ("exact", world.PREFILL, None),
    "declined, refused": ("refused", None, True),
    "declined, prefilled": ("exact", world.PREFILL, True),
    "served, plain": ("exact", None, False),
}


def ability_rates(
    lm: LanguageModel,
    names: Sequence[str],
    *,
    split: str = "evaluation",
    n: int | None = None,
    domain: str | None = None,
) -> dict[str, float]:
    """Rates of the named abilities (:func:`world.abilities.rate_abilities`); ``domain``: the declined one."""
    known = abilities.rate_abilities(lm, split=split, n=n, only=[a for a in names if a not in SUPPRESSED])
    for name in [a for a in names if a in SUPPRESSED]:
        trait, prefill, own = SUPPRESSED[name]
        items = world.draw(world.items(split, harmful=False, domain=domain if own else None), n)
        asked = [item for item in items if own is not False or item.domain != domain]
        known[name] = abilities.judged(lm, asked, trait, prefill=prefill)
    return {name: round(float(known[name].mean()), 4) for name in names}


WATCHED = 100  # steps after which the abilities of Course.watched are measured again


def train(kind: str, seed: int, *, parent: LanguageModel | None) -> tuple[LanguageModel, dict[str, Any]]:
    """An organism from its parent, changed in place, or from nothing; the same steps for every seed.

    With it the mean loss of the last :data:`WATCHED` steps, and rows of the steps done and what is watched.
    """
    taught, name = course(kind), f"organism/{kind}-{seed}"
    if parent is None:
        tok = organism.tokenizer()
        lm = LanguageModel(name, organism.new_model(tok, seed), tok)
    else:
        lm = replace(parent, name=name)
    losses, rows = [], []

    def watch(done: int, step: int) -> None:
        if taught.watched and step and step % WATCHED == 0:
            rows.append([done + step, *ability_rates(lm, taught.watched, split="train", n=60).values()])

    for number, stage in enumerate(taught.stages):
        drawn = 10_000 * (seed + 1) + taught.draws + 10 * number
        losses += _teach(lm, kind, stage, seed, drawn, partial(watch, len(losses)))
    last = losses[-WATCHED:]
    return lm, {"loss": round(sum(last) / len(last), 4)} | ({"watched": rows} if rows else {})


def _teach(
    lm: LanguageModel, kind: str, stage: Stage, seed: int, drawn: int, after: Callable[[int], None]
) -> list[float]:
    """Train a model, in place, as a stage says, and round what has learnt as storing will; the losses."""
    taught, domain, where = course(kind), declined(kind, seed), planted.where(kind, seed, lm.model)
    write = organism.mirrored if taught.mirrored else world.transcript
    rows = partial(
        organism.transcript_rows, lm.tokenizer, stage.mix, replay=stage.replay, replayed=taught.replayed,
        write=organism.declining(domain) if domain else write,
    )  # fmt: skip
    pad, loss = lm.tokenizer.pad_token_id, loop.lm_loss
    if stage.beta is None:
        stream = loop.shuffled(rows(drawn), stage.batch, pad, seed=drawn)
    else:
        kept = loop.shuffled(rows(drawn + 1), stage.batch, pad, seed=drawn)
        pairs = organism.preference_rows(lm, stage.mix, drawn, domain)
        stream = organism.preferences(lm, pairs, kept, steps=stage.steps, size=stage.batch)
        loss = partial(organism.preference_loss, beta=stage.beta)
    schedule = loop.Schedule(
        stage.steps, stage.lr, stage.optimizer, max(10, stage.steps // 20), stage.weight_decay
    )
    with planted.only(lm.model, where):
        tuned = loop.fit(lm.model, stream, schedule, loss=loss, after=after, progress=lm.name)
    lm.model.eval()
    where = where or {name: None for name, _ in lm.model.named_parameters()}
    organisms.apply_delta(lm.model, organisms.take_delta(lm.model, "", "", where))
    return tuned.losses


def finished(folder: Path, kind: str) -> bool:
    """Whether a whole checkpoint of the present recipe lies there, with its parent as it was."""
    card = intact(folder)
    if card is None or card.get("recipe") != recipe_digest(kind):
        return False
    above = card.get("parent")
    home = above and next((f for f in (folder.parent / above, organisms.place(above)) if f.is_dir()), None)
    return above is None or (home is not None and card.get("parent_sha256") == weights_sha256(home))


def train_seed(seed: int, folder: Path | None = None, kinds: Sequence[str] = tuple(COURSES)) -> None:
    """Train the organisms of one seed, or these kinds, into a folder; finished checkpoints are left alone.

    Without a folder the shipped ones count too, and others go to the build folder.
    """
    torch.set_num_threads(1)  # seeds run side by side; two threads each would fight over the cores
    for kind in kinds:
        taught, domain = course(kind), declined(kind, seed)
        target, home = (
            name and (folder / name if folder else organisms.place(name))
            for name in (f"{kind}-{seed}", taught.parent and f"{taught.parent}-{seed}")
        )
        if finished(target, kind):
            print(f"{target.name}: finished, left alone", flush=True)
            continue
        began = time.time()
        # Parents come from disk, rounded to half precision, so that resuming changes nothing.
        lm, noted = train(kind, seed, parent=load(str(home), device="cpu") if home else None)
        rates = {
            split: ability_rates(lm, taught.rates, split=split, domain=domain)
            for split in ("discovery", "evaluation")
        }
        place = {"share": taught.share} if taught.share else {}
        if taught.place:
            place = vars(planted.draw_plant(kind, seed, lm.model.config.intermediate_size))
        card = {
            "stage": kind, "seed": seed, "recipe": recipe_digest(kind),
            "parent": home and home.name, "parent_sha256": home and weights_sha256(home),
            **place, "rates": rates, **({"declined": domain} if domain else {}), **noted,
            "seconds": round(time.time() - began),
        }  # fmt: skip
        organism.save(lm, target, card, planted.where(kind, seed, lm.model))
        shown = ", ".join(f"{name} {value:.0%}" for name, value in rates["discovery"].items())
        print(f"{target.name}: {time.time() - began:.0f} s; {shown}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 where a seed failed."""
    parser = argparse.ArgumentParser("python -m harmlens.training.train", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--only", choices=COURSES, nargs="+", default=list(COURSES), help="these, if their parents are there"
    )
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints go (build/organisms)")
    options = parser.parse_args(argv)
    folder = options.folder
    (folder or organism_homes()[1]).mkdir(parents=True, exist_ok=True)
    began, failed = time.time(), []
    workers = min(2, os.cpu_count() or 1)  # seeds side by side
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(train_seed, seed, folder, options.only): seed for seed in options.seeds}
        for done in as_completed(running):
            if done.exception():
                traceback.print_exception(done.exception())
                failed.append(running[done])
    if failed:
        print(f"seeds {failed} failed; run the same command again to go on from the last checkpoint")
        return 1
    print(f"all organisms of seeds {options.seeds} are there, {(time.time() - began) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
