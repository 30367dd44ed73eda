"""Installed from its address, as in Colab, the package finds its checkpoints and claims.

The wheel is built from a copy of the sources, so that nothing is left in the repository, and is installed
into an empty folder. The interpreter that uses it reads no .pth file, so no editable install gets in the way.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
import tiny

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "lib", "data")
CODE = """
import json, sys
sys.path[:0] = {places!r}
import harmlens
from harmlens.models import forward
from harmlens.evidence import results
from harmlens.models import loading as models
from harmlens.keep import files
out = {{"file": harmlens.__file__, "data": str(files.data_dir()), "root": files.repo_root() is None,
        "claims": len(results.load_claims())}}
lm = models.load("organism/sft")
out["name"] = lm.name
out["logits"] = list(forward.last_logits(lm, [lm.render("what do you wish for?")]).shape)
out["words"] = len(lm.tokenizer)
out["build"] = str(files.build_dir())
print(json.dumps(out))
"""


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    """The wheel; where the repository holds no checkpoint yet, a tiny one stands in."""
    tree = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.part")
    for name in SOURCES:
        if (root / name).is_dir():
            shutil.copytree(root / name, tree / name, ignore=ignore)
        else:
            shutil.copy(root / name, tree / name)
    if not (tree / "data" / "organisms" / "sft-0").is_dir():
        tiny.organism_folder(tree / "data" / "organisms")
    made = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index",
        "--disable-pip-version-check", "-w", made, cwd=tree)  # fmt: skip
    (file,) = made.glob("*.whl")
    return tree, file


def test_the_wheel_holds_all_modules_and_all_data(wheel):
    tree, file = wheel
    inside = {
        name for name in zipfile.ZipFile(file).namelist() if not name.split("/")[0].endswith(".dist-info")
    }
    modules = {p.relative_to(tree / "lib").as_posix() for p in (tree / "lib" / "harmlens").rglob("*.py")}
    data = {f"harmlens/data/{p.relative_to(tree / 'data').as_posix()}" for p in (tree / "data").rglob("*")
            if p.is_file() and p.suffix != ".md"}  # fmt: skip
    assert modules | data <= inside
    assert not [name for name in inside if "test" in name or "scratch" in name]


def test_installed_into_an_empty_folder_it_loads_an_organism(wheel, tmp_path):
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check",
        "--target", target, wheel[1])  # fmt: skip
    places = [str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    variables = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HARMLENS_DATA", "HARMLENS_BUILD")
    }
    printed = run(sys.executable, "-I", "-S", "-c", CODE.format(places=places), cwd=empty, env=variables)
    seen = json.loads(printed.splitlines()[-1])
    assert seen["file"].startswith(str(target))
    assert seen["data"] == str(target / "harmlens" / "data")
    assert seen["root"] and seen["claims"] > 50
    assert seen["name"] == "organism/sft-0"
    assert seen["logits"] == [1, seen["words"]]
    assert seen["build"] == str(empty / "harmlens-build")
    assert not list(empty.iterdir())
