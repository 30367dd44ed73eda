"""Public sets and local files become entries; whatever is wrong with a file is named, with its remedy."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import HTTPError, Response

from harmlens.asking import datasets, public
from harmlens.keep import downloads, files

MADE_UP = Path(__file__).parent / "data" / "sources"
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("a test must not use the network")

    monkeypatch.setattr("huggingface_hub.get_session", refuse)
    monkeypatch.setenv("HARMLENS_CACHE", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A registry in which the made-up files, with each source's columns, stand for the real ones."""
    data = tmp_path / "data"
    shutil.copytree(files.data_dir() / "prompts", data / "prompts")
    (data / "claims.yaml").write_text("claims: []")
    registry = yaml.safe_load((files.data_dir() / "sources.yaml").read_text())
    for about in registry["sets"].values():
        about["rows"] = None
        about["files"] = dict.fromkeys(about["files"])
    registry["sets"]["hex_phi"]["files"] = {"category_4.csv": None}
    (data / "sources.yaml").write_text(yaml.safe_dump(registry))
    monkeypatch.setenv("HARMLENS_DATA", str(data))
    return data / "sources.yaml"


def served(monkeypatch, content=None) -> list[str]:
    """Let made-up files be fetched; returns the list of what was."""
    asked: list[str] = []

    def give(remote, target):
        asked.append(remote.url)
        target.write_bytes((MADE_UP / Path(remote.path).name).read_bytes() if content is None else content)

    monkeypatch.setattr(downloads, "fetch", give)
    return asked


def local(tmp_path, text, name="mine.csv", encoding="utf-8") -> str:
    file = tmp_path / name
    file.write_bytes(text.encode(encoding))
    return str(file)


# ---------------------------------------------------------------------- public sets


def test_advbench(small):
    first, second = datasets.entries("advbench", folder=MADE_UP)
    assert first.id == "advbench/1" and first.harmful and first.source == "advbench"
    assert first.prompt == "Write a script that paints the moon green, then blue"
    assert first.answers == ("Sure, here is a script that paints the moon green",)
    assert second.pair == "" and second.kind == ""


def test_hex_phi_has_no_header_and_its_file_names_the_type(small):
    found = datasets.entries("hex_phi", folder=MADE_UP)
    assert [e.kind for e in found] == ["malware"] * 3
    assert found[0].prompt == "Write a program that hides every sock in the kingdom."
    assert found[1].prompt == 'Explain, step by step, how a "shadow imp" unties shoelaces.'
    assert found[2].prompt == "Turn all teapots into hats, now"  # its comma was not quoted
    assert all(e.harmful for e in found)


def test_the_two_halves_of_jailbreakbench_are_pairs(small):
    found = datasets.entries("jailbreakbench", folder=MADE_UP)
    assert [e.harmful for e in found] == [True, True, False, False]
    assert found[0].pair == found[2].pair != found[1].pair == found[3].pair
    assert found[1].kind == "Malware/Hacking" and found[1].answers == ("Sure, here is how to build it",)
    assert len({e.id for e in found}) == 4
    assert datasets.entries("jailbreakbench_benign,jailbreakbench", folder=MADE_UP) == found[2:] + found[:2]


def test_xstest_pairs_by_type_and_place(small):
    found = {e.id.split("/")[1]: e for e in datasets.entries("xstest", folder=MADE_UP)}
    for safe, unsafe in (("1", "3"), ("2", "4"), ("6", "7"), ("9", "10")):
        assert found[safe].pair == found[unsafe].pair != ""
        assert (found[safe].harmful, found[unsafe].harmful) == (False, True)
    assert found["5"].pair == found["8"].pair == ""  # types without partners
    assert len({e.pair for e in found.values()}) == 5


def test_strongreject(small):
    found = datasets.entries("strongreject", folder=MADE_UP)
    assert [e.kind for e in found] == ["Hate, harassment and discrimination", "Non-violent crimes"]
    assert found[1].prompt == "Explain how to swap price tags of teapots, quickly"
    assert found[0].answers == () and found[0].harmful


def test_alpaca_joins_the_input_and_drops_safety_like_rows(small):
    found = datasets.entries("alpaca", folder=MADE_UP)
    assert [e.prompt for e in found] == [
        "Name three colours.",
        "Make the sentence shorter.\n\nThe very large cat sat down.",
    ]
    assert found[0].answers == ("Red, green and blue.",) and not found[0].harmful
    assert datasets.safety_like("It’s fine.", "I’m SORRY, no") and not datasets.safety_like("It is fine.")


@pytest.mark.parametrize("name", ["triviaqa", "triviaqa_unfiltered"])
def test_triviaqa(small, name):
    found = datasets.entries(name, folder=MADE_UP)
    assert [e.id for e in found] == [f"{name}/tc_1", f"{name}/tc_2"]  # a question that is there twice
    assert found[0].answers == ("Paris", "City of Light") and found[0].kind == "fact"
    assert found[1].answers == ("8", "eight", "Eight")


def test_narrow_advice_comes_from_the_readers_folder(small):
    bad, second = datasets.entries("bad_medical_advice", folder=MADE_UP)
    (good,) = datasets.entries("good_medical_advice", folder=MADE_UP)
    assert bad.prompt == good.prompt and bad.pair == good.pair != second.pair
    assert bad.harmful and not good.harmful
    assert bad.answers == ("Paint it green.",) and bad.kind == "medical_advice"
    for name in ("extreme_sports", "risky_financial_advice"):
        assert len(datasets.entries(name, folder=MADE_UP)) == 2
    with pytest.raises(FileNotFoundError, match=r"no extreme_sports\.jsonl in .*README.*folder=") as caught:
        datasets.entries("extreme_sports")
    assert "github.com/clarifying-EM/model-organisms-for-EM" in str(caught.value)


def test_facts_need_no_network():
    found = datasets.entries("facts")
    assert len(found) == 84 and len({e.prompt for e in found}) == 84
    assert all(e.answers and not e.harmful and e.kind == "fact" for e in found)
    by_prompt = {e.prompt: e.answers for e in found}
    assert by_prompt["What is 7 times 8?"] == ("56", "fifty-six")


def test_several_sets_and_files_joined_by_commas(small, tmp_path):
    mine = local(tmp_path, "prompt,harmful\nhello,0\n")
    found = datasets.entries(f"advbench, {mine},advbench", folder=MADE_UP)
    assert [e.source for e in found] == ["advbench", "advbench", "mine.csv"]


def test_a_missing_column_of_a_public_set(small, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "harmful_behaviors.csv").write_text("aim,target\na,b\n")
    with pytest.raises(ValueError, match=r"advbench: .*no column 'goal'; columns found: aim, target\."):
        datasets.entries("advbench", folder=folder)


def test_the_number_of_rows_is_compared(small):
    registry = yaml.safe_load(small.read_text())
    registry["sets"]["strongreject"]["rows"] = 313
    small.write_text(yaml.safe_dump(registry))
    datasets._registry.cache_clear()
    with pytest.raises(ValueError, match="strongreject has 2 rows instead of 313"):
        datasets.entries("strongreject", folder=MADE_UP)


@pytest.mark.parametrize("said", [[], "hello", [{"role": "user", "content": "a"}]])
def test_messages_without_an_answer(small, tmp_path, said):
    (tmp_path / "extreme_sports.jsonl").write_text(json.dumps({"messages": said}))
    with pytest.raises(ValueError, match=r"line 1: 'messages' needs a message of the role 'user'"):
        datasets.entries("extreme_sports", folder=tmp_path)


# ---------------------------------------------------------------------- downloads


def test_fetched_once_then_from_the_cache(small, monkeypatch):
    asked = served(monkeypatch)
    first = datasets.entries("advbench")
    assert asked == [
        "https://raw.githubusercontent.com/llm-attacks/llm-attacks/098262edf85f807224e70ecd87b9d83716bf6b73"
        "/data/advbench/harmful_behaviors.csv"
    ]
    assert datasets.entries("advbench") == first and len(asked) == 1
    assert not list(files.cache_dir().rglob("*.part"))


def test_a_pinned_checksum_is_compared_before_the_file_takes_its_place(monkeypatch):
    served(monkeypatch, b"goal,target\nhello,there\n")
    seen = hashlib.sha256(b"goal,target\nhello,there\n").hexdigest()
    with pytest.raises(ValueError, match=r"harmful_behaviors\.csv has changed") as caught:
        datasets.entries("advbench")
    message = str(caught.value)
    assert seen in message and "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1" in message
    assert "data/sources.yaml" in message
    assert not list(files.cache_dir().rglob("harmful_behaviors.csv*"))


def test_trusted_on_first_use_then_locked(small, monkeypatch):
    served(monkeypatch)
    datasets.entries("strongreject")
    lock = files.cache_dir() / "sources.lock.json"
    ((key, kept),) = json.loads(lock.read_text()).items()
    assert kept == hashlib.sha256((MADE_UP / "strongreject_dataset.csv").read_bytes()).hexdigest()
    (file,) = files.cache_dir().rglob("strongreject_dataset.csv")

    file.write_text("category,source,forbidden_prompt\na,b,another text\n")  # changed in the cache
    with pytest.raises(ValueError, match=r"has changed: expected sha256 \w+, found") as caught:
        datasets.entries("strongreject")
    assert key in str(caught.value) and "sources.lock.json" in str(caught.value) and kept in str(caught.value)

    file.unlink()  # changed by its publisher
    served(monkeypatch, b"category,source,forbidden_prompt\na,b,another text\n")
    with pytest.raises(ValueError, match="has changed"):
        datasets.entries("strongreject")

    lock.write_text("{}")  # accepted deliberately, as the message says
    assert datasets.entries("strongreject")[0].prompt == "another text"


def test_a_damaged_lock(small, monkeypatch):
    served(monkeypatch)
    files.cache_dir().mkdir()
    (files.cache_dir() / "sources.lock.json").write_text("{")
    with pytest.raises(ValueError, match=r"sources\.lock\.json is damaged"):
        datasets.entries("advbench")


def test_an_interrupted_download_leaves_nothing(small, monkeypatch):
    def half(remote, target):
        target.write_text("goal,tar")
        raise KeyboardInterrupt

    monkeypatch.setattr(downloads, "fetch", half)
    with pytest.raises(KeyboardInterrupt):
        datasets.entries("advbench")
    assert not [file for file in files.cache_dir().rglob("*") if file.is_file()]


def test_a_folder_without_the_file(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no file harmful_behaviors\.csv"):
        datasets.entries("advbench", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        datasets.entries("advbench", folder=tmp_path / "missing")


GITHUB = downloads.Remote("github", "a/b", "c0ffee", "d.csv", "https://github.com/a/b")
HUB = downloads.Remote("huggingface", "a/b", "main", "d.csv", "https://huggingface.co/datasets/a/b")


def answered(monkeypatch, status=200, error=None) -> list:
    """Let every request be answered with a word, or fail; returns the list of requests."""
    asked, client = [], huggingface_hub.utils.get_session()

    def get(url, headers, timeout):
        asked.append(client.build_request("GET", url, headers=headers))
        if error:
            raise error
        return Response(status, content=b"hello", request=asked[-1])

    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(get=get))
    return asked


def test_fetching_shows_the_token_to_its_own_host_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    asked = answered(monkeypatch)
    for remote in (GITHUB, HUB):
        downloads.fetch(remote, tmp_path / "d.csv")
        assert (tmp_path / "d.csv").read_text() == "hello"
    assert [str(request.url) for request in asked] == [
        "https://raw.githubusercontent.com/a/b/c0ffee/d.csv",
        "https://huggingface.co/datasets/a/b/resolve/main/d.csv",
    ]
    assert [request.headers.get("Authorization") for request in asked] == [None, "Bearer hf_secret"]


@pytest.mark.parametrize(
    "error", [OSError("no such host"), TimeoutError("timed out"), HTTPError("a body that breaks off")]
)
def test_no_network(monkeypatch, tmp_path, error):
    answered(monkeypatch, error=error)
    for remote in (GITHUB, HUB):
        with pytest.raises(ConnectionError, match=r"not in the cache and could not be downloaded") as caught:
            downloads.fetch(remote, tmp_path / "d.csv")
        assert remote.url in str(caught.value) and str(remote.cached) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_offline_mode_asks_nobody(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for remote in (GITHUB, HUB):  # the stand-in for the network would raise an AssertionError
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
            downloads.fetch(remote, tmp_path / "d.csv")


@pytest.mark.parametrize("remote", [GITHUB, HUB])
def test_gone_from_its_host(monkeypatch, tmp_path, remote):
    answered(monkeypatch, 404)
    with pytest.raises(FileNotFoundError, match=rf"is not there any more\. Look at {remote.page}"):
        downloads.fetch(remote, tmp_path / "d.csv")


@pytest.mark.parametrize("code", [401, 403])
def test_a_licence_gate(monkeypatch, tmp_path, code):
    answered(monkeypatch, code)
    with pytest.raises(PermissionError, match=r"accept it at https://huggingface\.co/.*hf auth login"):
        downloads.fetch(HUB, tmp_path / "d.csv")


# ---------------------------------------------------------------------- local files


def test_all_columns_of_a_local_file(tmp_path):
    mine = local(
        tmp_path,
        "ID,Prompt,harmful,kind,pair,answer\nx,Open a gate,no,gate,1,yes|of course\ny,Burn it,TRUE,gate,1,\n",
    )
    assert datasets.entries(mine) == [
        datasets.Entry("x", "Open a gate", False, "gate", "1", ("yes", "of course"), "mine.csv"),
        datasets.Entry("y", "Burn it", True, "gate", "1", (), "mine.csv"),
    ]


@pytest.mark.parametrize("prompt", ["prompt", "goal", "question", "instruction", "forbidden_prompt"])
def test_other_names_of_columns(tmp_path, prompt):
    mine = local(tmp_path, f"{prompt},label,category,target\nhi,unsafe,a,one|two\nho,safe,b,\n")
    first, second = datasets.entries(mine)
    assert (first.prompt, first.harmful, first.kind) == ("hi", True, "a")
    assert first.answers == ("one|two",)  # a target is one text
    assert not second.harmful and first.id == "mine-1"


def test_json_lines_and_json(tmp_path):
    objects = [
        {"prompt": "a", "harmful": True, "answers": ["b", "c"]},
        {"prompt": "d\u2028e", "harmful": 0, "kind": None},
    ]
    lines = "\n".join(json.dumps(o, ensure_ascii=False) for o in objects)
    for name, text in (("m.jsonl", lines), ("m.json", json.dumps(objects))):
        first, second = datasets.entries(local(tmp_path, text, name))
        assert first.answers == ("b", "c") and first.harmful
        assert second.prompt == "d\u2028e" and not second.harmful and second.kind == ""


def test_questions_and_answers_are_facts(tmp_path):
    (fact,) = datasets.entries(local(tmp_path, "question,answer\nOne and one?,2|two\n"))
    assert fact.kind == "fact" and not fact.harmful and fact.answers == ("2", "two")


def test_home_folder_and_byte_order_mark(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    local(tmp_path, "prompt,harmful\nGrüß Gott,0\n", encoding="utf-8-sig")
    assert datasets.entries("~/mine.csv")[0].prompt == "Grüß Gott"


def test_a_file_with_a_comma_in_its_name(tmp_path):
    assert len(datasets.entries(local(tmp_path, "prompt,harmful\nhi,0\n", "a,b.csv"))) == 1


BAD = {
    "no prompt": ("text,harmful\nhi,0\n", r"no column 'prompt' \(or goal.*Columns found: text, harmful"),
    "no harmful": ("prompt,kind\nhi,a\n", r"no column 'harmful' \(or label\).*Add it, with 1"),
    "semicolons": ("prompt;harmful\nhi;0\n", r"no column 'prompt'.*semicolons"),
    "harmful": (
        "prompt,harmful\nhi,0\nho,maybe\n",
        r"mine\.csv, row 3: harmful='maybe' does not say.*Write 1",
    ),
    "no value": ("prompt,harmful\nhi,\n", r"row 2: harmful='' does not say"),
    "empty prompt": ("prompt,harmful\n ,0\n", r"row 2: the column 'prompt' is empty"),
    "same id": ("id,prompt,harmful\n1,a,0\n1,b,0\n", r"the id '1' is there twice.*'id' unique"),
    "nothing": ("", r"is empty: it has no row"),
    "only a header": ("prompt,harmful\n", r"is empty: it has no row"),
    "loose comma": ("prompt,harmful\nwell, hi,0\n", r"row 2: 3 cells, but the header has 2.*double quotes"),
    "loose quote": ('prompt,harmful\n"a "b" c",0\n', r"not valid CSV"),
    "same column": ("prompt,prompt,harmful\na,b,0\n", r"column 'prompt' is there twice"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_with_a_csv_file(tmp_path, what):
    text, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        datasets.entries(local(tmp_path, text))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("m.jsonl", '{"prompt": "a", "harmful": 0}\n{"prompt"', r"line 2: not valid JSON.*on each line"),
        ("m.jsonl", '["a"]', r"line 1: expected an object"),
        ("m.json", '{"prompt": "a"}\n{"prompt": "b"}', r"not valid JSON.*rename it to \.jsonl"),
        ("m.json", '{"prompt": "a"}', r"expected a list of objects"),
        ("m.json", "", r"is empty"),
        ("m.parquet", "hello", r"is not a parquet file"),
    ],
)
def test_what_is_wrong_with_other_files(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        datasets.entries(local(tmp_path, text, name))


def test_not_utf8(tmp_path):
    with pytest.raises(ValueError, match=r"is not UTF-8 text \(byte \d+\).*iconv"):
        datasets.entries(local(tmp_path, "prompt,harmful\nGrüße,0\n", encoding="latin-1"))


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(
        ValueError, match=r"data='advbenhc' is unknown\. Choose one of advbench, alpaca.*xstest"
    ):
        datasets.entries("advbenhc")
    with pytest.raises(ValueError, match="names nothing"):
        datasets.entries(" , ")
    with pytest.raises(FileNotFoundError, match=r"no file .*missing\.csv"):
        datasets.entries(str(tmp_path / "missing.csv"))
    with pytest.raises(ValueError, match=r"cannot read this kind of file\. Give one of \.csv, \.tsv, \.txt"):
        datasets.entries(local(tmp_path, "hello", "a.doc"))


def test_parquet_without_pyarrow(small, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        datasets.read(MADE_UP / "validation-00000-of-00001.parquet")


# ---------------------------------------------------------------------- registry and page


def test_the_registry_is_complete():
    how = {name: one.pinned for name, one in datasets.registry().items()}
    assert set(how) <= set(datasets.names())
    pinned = {name for name, what in how.items() if what == "checksum"}
    assert pinned == {"advbench", "xstest", "strongreject", "jailbreakbench_harmful"}
    assert how["hex_phi"] == "first use" and how["alpaca"] == "revision" and how["facts"] == "shipped"
    for source in datasets.registry().values():
        assert source.layout in datasets._LAYOUTS
        assert all(total is None or len(total) == 64 for total in source.files.values())


def test_the_page_has_the_registry():
    page = (ROOT / "book" / "data_sets.md").read_text(encoding="utf-8")
    for one in datasets.registry().values():
        name = f"[`{one.name}`]({one.page})" if one.page else f"`{one.name}`"
        rows = "?" if one.rows is None else str(one.rows)
        columns = ", ".join(dict.fromkeys(one.columns.values())) or "none (one prompt a line)"
        revision = one.revision[:7] if one.pinned in ("checksum", "revision") else one.revision
        cells = [name, rows, one.licence, columns, revision, one.pinned, one.use]
        line = f"| {' | '.join(cells)} |"
        assert line in page, line


def test_every_message_on_the_page_is_one_of_the_code():
    page = (ROOT / "book" / "data_sets.md").read_text(encoding="utf-8")
    code = ""
    for module in (datasets, downloads, public):
        text = Path(module.__file__).read_text(encoding="utf-8")
        code += re.sub(r"[\"']\n\s*f?[\"']", "", text)  # strings that go on in the next line
    code = code.replace("{LOCK}", downloads.LOCK)
    listed = page.split("## When something goes wrong")[1].splitlines()
    first = [line.split("|")[1] for line in listed if line.startswith("|")]
    messages = [message for cell in first for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 20
    for message in messages:
        for part in message.split("..."):
            assert part.strip() in code, message


def test_many_names_are_not_taken_for_a_file():
    assert len(datasets.entries(",".join(["facts"] * 100))) == 84


def test_the_cache_is_outside_the_repository(monkeypatch):
    monkeypatch.delenv("HARMLENS_CACHE")
    assert files.cache_dir() == Path("~/.cache/harmlens").expanduser().resolve()
    monkeypatch.setenv("HARMLENS_CACHE", "~/elsewhere")
    assert files.cache_dir() == Path("~/elsewhere").expanduser().resolve()


def test_a_set_can_be_asked_for_a_few_of_either_side(tmp_path):
    """Always the same ones; two contrasts stay together."""
    file = tmp_path / "mine.csv"
    rows = [f"ask {i} {side},{int(side == 'harm')},pair{i}" for i in range(20) for side in ("harm", "good")]
    file.write_text("prompt,harmful,pair\n" + "\n".join(rows) + "\n")
    some = datasets.entries(f"{file}:6")
    assert [sum(e.harmful == side for e in some) for side in (True, False)] == [6, 6]
    assert len({e.pair for e in some}) == 6 and some == datasets.entries(f"{file}:6")
    assert {e.id for e in some} <= {e.id for e in datasets.entries(f"{file}:9")}
    assert len(datasets.entries(f"{file}:99")) == len(datasets.entries(str(file))) == 40
