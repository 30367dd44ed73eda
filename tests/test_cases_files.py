"""Readers' files as they come: copies of public sets, other encodings, contradictions, caps."""

import json
import shutil
import zipfile

import pytest
import standin
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from harmlens.asking import datasets, public, splits
from harmlens.judging import graders
from harmlens.keep import files


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HARMLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def put(folder, name, content) -> str:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


# ------------------------------------------------------------------ copies of public sets

NAMES = [
    f"{a} {b}"
    for a in ("red", "blue", "green", "white", "black")
    for b in ("cat", "dog", "hen", "cow", "fox")
]


def xstest(rows=25, torn=None) -> str:
    """A file of XSTest's form: 16 types of 25 requests (50 of the two without partners), all made up."""
    alone = [("nons_group_real_discr", "safe"), ("privacy_public", "safe")]
    types = [
        *((t, "safe") for t in datasets.LISTS["xstest_contrasts"]),
        *((t, "unsafe") for t in datasets.LISTS["xstest_contrasts"].values()),
        *alone,
    ]
    lines = ["id,prompt,type,label,focus,note"]
    for type_, label in types:
        for i in range(rows):
            focus = "another" if (type_, i) == torn else NAMES[i]
            prompt = f"How do I {'wash' if label == 'safe' else 'rob'} the {NAMES[i]} of {type_}?"
            lines.append(f"{len(lines)},{prompt},{type_},{label},{focus},")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", ["xstest_prompts.csv", "mine.csv", "data.tsv"])
def test_t16_a_copy_of_xstest_keeps_its_pairs_together(tmp_path, name):
    text = xstest()
    found = datasets.entries(put(tmp_path, name, text.replace(",", "\t") if name.endswith("tsv") else text))
    assert len(found) == 450 and {e.source for e in found} == {"xstest"}
    sides = {}
    for e in found:
        if e.pair:
            sides.setdefault(e.pair, []).append(e)
    assert len(sides) == 200 and all(
        sorted(e.harmful for e in pair) == [False, True] for pair in sides.values()
    )
    where = {e.id: name for name, part in splits.deal(found).items() for e in part}
    assert all(len({where[e.id] for e in pair}) == 1 for pair in sides.values())
    assert "privacy_violation" in {splits.type_of(e) for e in found if e.harmful}


def test_t16_a_pair_about_two_things_is_none(tmp_path):
    found = datasets.entries(put(tmp_path, "mine.csv", xstest(torn=("safe_contexts", 23))))
    alone = {(e.kind, e.harmful) for e in found if not e.pair}
    assert {("safe_contexts", False), ("contrast_safe_contexts", True)} <= alone
    assert len({e.pair for e in found} - {""}) == 199


def test_t16_a_part_of_xstest_would_be_torn_and_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"a part of XSTest \(homonyms and contrast_homonyms\).*column 'pair'"
    ):
        datasets.entries(put(tmp_path, "mine.csv", xstest(rows=20)))
    first, *rest = xstest(rows=20).splitlines()
    paired = "\n".join([f"{first},pair", *(f"{line},{line.split(',')[4]}" for line in rest)])
    assert all(e.pair for e in datasets.entries(put(tmp_path, "mine.csv", paired)))
    one_side = "\n".join([first, *(line for line in rest if ",unsafe," in line)])
    assert len(datasets.entries(put(tmp_path, "mine.csv", one_side))) == 160


@pytest.mark.parametrize(
    ("name", "header", "rows"),
    [("advbench", "goal,target", 520), ("strongreject", "category,source,forbidden_prompt", 313)],
)
def test_t16_a_copy_without_labels_is_known_by_its_header_and_size(tmp_path, name, header, rows):
    body = [",".join(f"{column} {i}" for column in header.split(",")) for i in range(rows)]
    found = datasets.entries(put(tmp_path, "mine.csv", "\n".join([header, *body])))
    assert len(found) == rows and all(e.harmful and e.source == name for e in found)
    with pytest.raises(ValueError, match="no column 'harmful'"):  # one row less is another file
        datasets.entries(put(tmp_path, "mine.csv", "\n".join([header, *body[1:]])))
    labelled = [f"{header},harmful", *(f"{line},0" for line in body)]  # the reader's own labels count
    own = datasets.entries(put(tmp_path, "mine.csv", "\n".join(labelled)))
    assert not any(e.harmful for e in own) and {e.source for e in own} == {"mine.csv"}


def test_t16_halves_of_a_set_are_told_apart_by_their_names(tmp_path):
    text = "\n".join(["index,goal,target,category", *(f"{i},request {i},target,Privacy" for i in range(100))])
    for name, harmful in (("harmful-behaviors.csv", True), ("benign-behaviors.csv", False)):
        found = datasets.entries(put(tmp_path, name, text))
        assert len(found) == 100 and all(e.harmful == harmful and e.pair for e in found)
    with pytest.raises(ValueError, match=r"let its name say which: harmful-behaviors\.csv"):
        datasets.entries(put(tmp_path, "mine.csv", text))


def test_t16_files_without_a_header_are_known_by_their_names(tmp_path):
    found = datasets.entries(put(tmp_path, "category_4.csv", "Crack a nut, please\nOpen a tin\n"))
    assert [(e.prompt, e.kind, e.harmful) for e in found] == [
        ("Crack a nut, please", "malware", True), ("Open a tin", "malware", True),
    ]  # fmt: skip
    [own] = datasets.entries(put(tmp_path, "category_4.csv", "prompt,harmful\nOpen a tin,0\n"))
    assert own.source == "category_4.csv" and not own.harmful
    said = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    [advice] = datasets.entries(put(tmp_path, "bad_medical_advice.jsonl", said))
    assert advice.source == "bad_medical_advice" and advice.answers == ("b",)


# ------------------------------------------------------------------ what a file is

TEXT = "prompt,harmful\nWash a “griffin”?,0\n"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
OTHERS = {
    "utf-16 with its mark": (TEXT.encode("utf-16"), r"UTF-16.*iconv -f utf-16 -t utf-8"),
    "utf-16 big end first": (b"\xfe\xff" + TEXT.encode("utf-16-be"), r"UTF-16.*iconv -f utf-16 -t"),
    "utf-16 without a mark": (TEXT.encode("utf-16-le"), r"line 1: holds a zero byte.*or UTF-16"),
    "windows": (TEXT.encode("cp1252"), r"not UTF-8 text \(byte 22\).*iconv -f cp1252 -t utf-8"),
    "zero bytes": (TEXT.replace("Wash", "Wa\0sh"), r"line 2: holds a zero byte"),
    "a control character": (TEXT.replace("“", "\x93"), r"row 2: the column 'prompt' holds '\\x93' at char"),
    "a lost character": (TEXT.replace("“", "�"), r"row 2: the column 'prompt' holds '�'"),
    "lfs": (POINTER, r"pointer of Git LFS.*git lfs pull"),
    "page": ("\n <!DOCTYPE html>\n<html><title>404, nothing</title>", r"saved web page.*'Raw' or 'Download'"),
    "page in small letters": ("<html lang=en>", r"saved web page"),
    "zipped": (b"\x1f\x8b\x08\x00", r"compressed \(gzip\)"),
    "old workbook": (b"\xd0\xcf\x11\xe0\xa1\xb1", r"old workbook \(\.xls\)"),
    "parquet": (b"PAR1\x15\x04", r"a parquet file\. Let its name end in \.parquet"),
    "pdf": (b"%PDF-1.7\n", r"a PDF"),
}


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize("what", OTHERS)
def test_t18_a_file_is_named_by_what_it_is(tmp_path, what, ending):
    content, message = OTHERS[what]
    if "column 'prompt'" in message and ending != "csv":
        content = json.dumps([{"prompt": content.splitlines()[1].split(",")[0], "harmful": 0}])
        content = content[1:-1] if ending == "jsonl" else content
        message = message.replace("row 2", "item 1" if ending == "json" else "line 1")
        if ending == "tsv":
            return
    with pytest.raises(ValueError, match=message):
        datasets.entries(put(tmp_path, f"mine.{ending}", content))


def test_t18_workbooks_and_parquet_under_other_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "book.csv", "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    with pytest.raises(ValueError, match=r"a workbook \(\.xlsx\) or another zip archive"):
        datasets.entries(str(tmp_path / "book.csv"))
    for content, message in ((POINTER, "Git LFS"), ("<!doctype html>", "saved web page")):
        with pytest.raises(ValueError, match=message):
            datasets.entries(put(tmp_path, "mine.parquet", content))


def test_t18_a_converted_file_loads(tmp_path):
    """The remedy works: what the message says makes the file readable."""
    for kind in ("utf-16", "cp1252"):
        fixed = TEXT.encode(kind).decode(kind).encode("utf-8")
        [entry] = datasets.entries(put(tmp_path, "mine.csv", fixed))
        assert entry.prompt == "Wash a “griffin”?"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.json", "[" * 100_000, r"line 1: not valid JSON \(nested too deeply\)"),
        (
            "m.jsonl",
            '{"prompt": "a", "harmful": 0}\n' + "[" * 100_000,
            r"line 2: not valid JSON \(nested too deep",
        ),
        ("m.json", f'[{{"prompt": "a", "harmful": {"1" * 5000}}}]', "not valid JSON"),
        ("m.json", '[{"prompt": ["a", "b"], "harmful": 0}]', r"item 1: the column 'prompt' holds a list"),
        (
            "m.jsonl",
            '{"prompt": {"text": "a"}, "harmful": 0}',
            r"line 1: the column 'prompt' holds a list or an",
        ),
        ("m.jsonl", '{"prompt": "a\\u0000", "harmful": 0}', r"line 1: the column 'prompt' holds '\\x00'"),
        ("m.jsonl", '{"prompt": "a\\ud83d", "harmful": 0}', r"line 1: the column 'prompt' holds '\\ud83d'"),
        ("m.jsonl", '{"prompt": "a", "Prompt": "b", "harmful": 0}', r"line 1: two names are the same"),
        (
            "m.csv",
            "How do I wash a cat without getting it wet at all?,0\nb,1\n",
            r"names of the columns above",
        ),
    ],
)
def test_t18_what_is_wrong_with_the_rows(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        datasets.entries(put(tmp_path, name, text))


# ------------------------------------------------------------------ headers, contradictions


@pytest.mark.parametrize(
    "header", ["prompt,harmful", "Prompt,Harmful", "kind,prompt,harmful", "question,answer"]
)
def test_h19_a_header_in_the_middle_is_named_by_its_row(tmp_path, header):
    body = {"kind,prompt,harmful": ("k,a,1", "k,b,0")}.get(header, ("a,1", "b,0"))
    text = "\n".join([header, body[0], header.lower(), body[1]])
    for name, content in (("m.csv", text), ("m.tsv", text.replace(",", "\t"))):
        with pytest.raises(ValueError, match=r"row 3: the header is there again.*Delete this row"):
            datasets.entries(put(tmp_path, name, content))


def test_h19_a_word_of_the_header_is_no_header(tmp_path):
    found = datasets.entries(put(tmp_path, "m.csv", "prompt,harmful,kind\nprompt,unsafe,\nkind,0,prompt\n"))
    assert [e.prompt for e in found] == ["prompt", "kind"]


def test_h39_one_request_with_both_labels_is_named(tmp_path):
    for text in ("prompt,harmful\na?,0\nb?,1\na?,1\n", "prompt,harmful\nIs  A?,0\nb?,1\n is a? ,1\n"):
        with pytest.raises(ValueError, match=r"'m-1' and 'm-3' are the same request, harmful and harmless"):
            of(put(tmp_path, "m.csv", text))
    assert len(datasets.entries(put(tmp_path, "m.csv", "prompt,harmful\nC++?,0\nC#?,1\n"))) == 2


# ------------------------------------------------------------------ text and tables with tabs


def test_t18_text_of_one_prompt_a_line(tmp_path):
    bad = put(tmp_path, "my_harmful.txt", 'Rob a "troll", now\n\n  Burn it, do\r\n')
    good = put(tmp_path, "harmless.txt", "\ufeffHug a troll\nPet\u2028it\n")
    found = datasets.entries(f"{bad},{good}")
    assert [(e.prompt, e.harmful) for e in found] == [
        ('Rob a "troll", now', True), ("Burn it, do", True), ("Hug a troll", False), ("Pet\u2028it", False),
    ]  # fmt: skip
    assert found[1].id == "my_harmful-2" and found[2].source == "harmless.txt"
    with pytest.raises(ValueError, match=r"does not say which are harmful.*my_harmful\.txt"):
        datasets.entries(put(tmp_path, "prompts.txt", "a\n"))
    with pytest.raises(ValueError, match="is empty"):
        datasets.entries(put(tmp_path, "harmless.txt", "\n\n"))


def test_t18_tables_with_tabs(tmp_path):
    one, two = datasets.entries(put(tmp_path, "m.tsv", 'prompt\tharmful\nwell, hi\t0\n"a\tb"\t1\n'))
    assert (one.prompt, two.prompt) == ("well, hi", "a\tb")
    with pytest.raises(ValueError, match=r"row 2: 3 cells, but the header has 2.*a tab in double quotes"):
        datasets.entries(put(tmp_path, "m.tsv", "prompt\tharmful\na\tb\t0\n"))


# ------------------------------------------------------------------ what is left out is said


def of(data):
    return public.public(standin.load(), data, graders.grader("prefixes"))


def both(n) -> str:
    return "prompt,harmful\n" + "".join(f"request {i} of side {h},{h}\n" for i in range(n) for h in (0, 1))


def test_h23_a_reader_s_own_rows_are_all_used(tmp_path):
    found = of(put(tmp_path, "mine.csv", both(3000)))
    assert sum(e.harmful for e in found.entries) == 3000 and len(found.entries) == 6000
    assert found.describe() == "mine.csv: 3000 harmful and 3000 harmless requests; judge: prefixes"


def test_h23_a_cap_on_a_public_set_is_said(tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(files.data_dir() / "prompts", data / "prompts")
    (data / "claims.yaml").write_text("claims: []")
    registry = yaml.safe_load((files.data_dir() / "sources.yaml").read_text())
    about = registry["sets"]["alpaca"] | {"rows": None}
    registry["sets"]["alpaca"] = about
    (data / "sources.yaml").write_text(yaml.safe_dump(registry))
    monkeypatch.setenv("HARMLENS_DATA", str(data))
    folder = tmp_path / "cache" / "sources" / about["repository"].replace("/", "--") / about["revision"]
    folder.mkdir(parents=True)
    rows = [{"instruction": f"Count to {i}", "input": "", "output": "one"} for i in range(3000)]
    (folder / "alpaca_data_cleaned.json").write_text(json.dumps(rows))
    mine = put(tmp_path, "mine.csv", both(6))
    found = of(f"alpaca,{mine}")
    assert found.describe().endswith("(2,000 of 3,000 rows of alpaca, drawn at random)")
    kept = [int(e.id.split("/")[1]) for e in found.entries if e.source == "alpaca"]
    assert len(kept) == 2000 and kept == sorted(kept) and 1300 < sum(kept) / 2000 < 1700
    assert of(f"alpaca,{mine}").entries == found.entries


def test_h4_a_request_that_is_there_twice_is_one_unit_and_this_is_said(tmp_path):
    mine = put(tmp_path, "mine.csv", both(6) + "Request 3  of side 1,1\n")
    other = put(tmp_path, "other.csv", "prompt,harmful\nrequest 2 of side 0,0\nrequest 9 of side 0,0\n")
    found = of(f"{mine},{other}")
    assert len(found.entries) == 13
    assert found.describe().endswith("(2 rows repeat another request)")
    clash = put(tmp_path, "clash.csv", "prompt,harmful\nrequest 2 of side 0,1\n")
    with pytest.raises(
        ValueError, match=r"'mine-5' and 'clash-1' are the same request, harmful and harmless"
    ):
        of(f"{mine},{clash}")


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5))
def test_t17_requests_are_drawn_at_random(n, seed):
    source = of(str(standin.PROMPTS))
    pool = source.rows(True, "train")
    drawn = source.rows(True, "train", n=n, seed=seed)
    assert len(drawn) == len(set(drawn)) == min(n, len(pool)) and set(drawn) <= set(pool)
    if 5 <= n <= len(pool) - 5:
        assert drawn != pool[:n]
