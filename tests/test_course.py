"""The course: every chapter has the same parts, and its numbers are those that were computed or measured."""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from scarcenet.experiments.ablation import read_grid
from scarcenet.relabel import DECISION_COLOURS
from scarcenet.run.figures import METHOD_COLOURS
from scarcenet.run.folder import read_rows
from scarcenet.schema import SIDE_COLOURS
from scarcenet.utils.files import read_json

NBS = Path(__file__).resolve().parents[1] / "nbs"
COURSE = sorted(NBS.glob("[0-9][0-9]_*.ipynb"))
METHOD = [f for f in COURSE if "01" <= f.stem[:2] <= "10"]  # the chapters that make a part of the method
CHAPTERS = [f for f in COURSE if f.stem[:2] != "00"]
CONFIG = NBS.parent / "scarcenet" / "config.py"
TAGS = ("*(paper)*", "*(code)*", "*(long run)*")
NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?:e-?\d+)?")


def by_name(files):
    return pytest.mark.parametrize("file", files, ids=lambda f: f.stem)


def cells(file: Path, kind: str) -> list[str]:
    """The sources of all cells of a kind."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in content["cells"] if c["cell_type"] == kind]


def outputs(file: Path) -> str:
    """All text that the cells printed or showed."""
    content = json.loads(file.read_text(encoding="utf-8"))
    texts = []
    for output in (o for c in content["cells"] for o in c.get("outputs", [])):
        data = output.get("data", {})
        texts += ["".join(output.get("text", "")), *("".join(data.get(f"text/{k}", "")) for k in ("plain", "markdown"))]
    return "\n".join(texts)


def section(file: Path, title: str) -> str:
    """The markdown cell that begins with `## title`."""
    found = [text for text in cells(file, "markdown") if text.startswith(f"## {title}")]
    assert len(found) == 1, f"expected one section {title!r}, got {len(found)}"
    return found[0]


@by_name(COURSE)
def test_begins_with_objectives_and_ends_with_next(file):
    texts = cells(file, "markdown")
    assert any(re.search(r"\d+ minutes", text) and "fterwards you can" in text for text in texts[:3]) or any(
        re.search(r"\d+ minutes", text) and "After this chapter you can" in text for text in texts[:3]
    ), "no minutes and objectives at the top"
    assert re.search(r"^\*\*Next:\*\* \[", texts[-1], re.M), "the last cell has no link to the next chapter"


@by_name(METHOD)
def test_has_equation_by_hand_batched_picture_and_test(file):
    texts, code = "\n".join(cells(file, "markdown")), "\n".join(cells(file, "code"))
    parts = {
        "equation": "$$" in texts,
        "by hand": re.search(r"\bby hand\b", texts, re.I),
        "batched": re.search(r"\bbatched\b|\bfor the whole batch\b", texts, re.I),
        "picture": '"image/png"' in file.read_text(encoding="utf-8"),
        "test": "assert " in code,
    }
    assert [name for name, found in parts.items() if not found] == []


@by_name(COURSE)
def test_exercises_are_tagged_and_answered(file):
    questions, answers = section(file, "Exercises").split("<details><summary>Answers</summary>")
    asked = re.findall(r"^\d+\. (.*)$", questions, re.M)
    assert asked and all(question.startswith(TAGS) for question in asked), "tag each: (paper), (code) or (long run)"
    assert len(re.findall(r"^\d+\. ", answers, re.M)) == len(asked), "an answer is missing"
    assert "</details>" in answers


@by_name(CHAPTERS)
def test_recap_quotes_what_was_computed(file):
    recap = section(file, "Recap")
    lines = recap.splitlines()[2:]
    assert lines and all(line.startswith("> - ") for line in lines), "the recap is a box of points"
    texts = cells(file, "markdown")
    assert texts.index(recap) < texts.index(section(file, "Exercises"))
    known = set(NUMBER.findall(outputs(file) + "\n".join(cells(file, "code"))))
    quoted = [
        n for n in NUMBER.findall(re.sub(r"`[^`]*`|\$[^$]*\$", "", recap)) if re.search(r"[.,e]", n) or len(n) > 2
    ]
    assert [n for n in quoted if n not in known] == [], "neither printed nor a constant of this chapter"


def rounded(number: str) -> set[str]:
    """A number, and a hundred times it, rounded to up to four decimals, without leading zeros."""
    return {f"{times * float(number):.{d}f}".lstrip("0") for times in (1, 100) for d in range(5)}


@by_name(COURSE)
def test_fractions_in_texts_come_from_somewhere(file):
    """A cell of the chapter prints or sets them, or a notebook or measured file that it names, or the settings do.

    Left out: answers of exercises, the two tables of the official code's differences, and gains of three draws, which
    `test_gains_of_12_results_are_measured` computes again.
    """
    source, texts = "\n".join(cells(file, "code")), cells(file, "markdown")
    told = source + "\n".join(texts)
    names = set(re.findall(r"\b(?:\d\d_\w+|(?:core|data|experiments|ledger|predict|run|utils|zoo)/\w+)\b", told))
    notebooks = [NBS / f"{name}.ipynb" for name in names if (NBS / f"{name}.ipynb").is_file()]
    files = [NBS / "measured" / name for name in re.findall(r"measured/([\w.-]+\.(?:csv|json))", told)]
    places = [outputs(file), source, *(f.read_text(encoding="utf-8") for f in files)]
    places += [outputs(f) + "\n".join(cells(f, "code")) for f in notebooks if f != file]
    places += [*re.findall(r"`[^`]*`|\$[^$]*\$", "\n".join(texts)), CONFIG.read_text(encoding="utf-8")]
    known = set().union(*map(rounded, set(re.findall(r"\d*\.?\d+", "\n".join(places).replace(",", "")))))
    quoted = []
    for text in texts:
        if not text.startswith(("## The differences", "## What the official code does otherwise", "## References")):
            text = re.sub(r"\d*\.\d+, -?\d*\.\d+ and -?\d*\.\d+", "", text.split("<summary>Answers</summary>")[0])
            text = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|arXiv[^)]*", "", text, flags=re.S)
            quoted += re.findall(r"(?<![\w.])\d*\.\d+(?!\.?\d)", text)
    assert [n for n in quoted if n.lstrip("0") not in known] == []


@by_name(CHAPTERS)
def test_the_official_code_is_folded(file):
    """In notes; the one table of all differences is in 09_training."""
    texts = cells(file, "markdown")
    if file.stem == "09_training":
        table = next(text for text in texts if text.startswith("## The differences"))
        assert [int(n) for n in re.findall(r"^\| (\d+) \|", table, re.M)] == list(range(1, 15))
    else:
        assert [text[:60] for text in texts if re.search(r"^(> )?\*\*The official code\.\*\*", text, re.M)] == []
    for text in texts:
        assert text.count("<details>") == text.count("</details>")


@by_name(sorted(f for f in NBS.rglob("*.ipynb") if not {"runs", ".ipynb_checkpoints"} & set(f.parts)))
def test_no_text_is_under_8_pt(file):
    """As a browser shows it at 100 %: 96 px to the inch, so a figure of fewer shrinks its text."""
    code = "\n".join(cells(file, "code"))
    sizes = re.findall(r"(?:fontsize|labelsize)\s*=\s*([\d.]+)", code)
    assert [size for size in sizes if float(size) < 8] == []
    assert [dpi for dpi in re.findall(r"dpi(?:\s*=\s*|\()(\d+)", code) if int(dpi) < 96] == []


@by_name([f for f in COURSE if f.stem[:2] != "06"])
def test_colours_of_decisions_mean_decisions(file):
    """Figures take them from `DECISION_COLOURS`; nothing else has them."""
    code = "\n".join(cells(file, "code")).lower()
    assert [colour for colour in ("#0072b2", "#e69f00", "#cc79a7") if colour in code] == []


def test_colours_of_sides_mean_sides():
    """Every figure takes them from `SIDE_COLOURS`."""
    for file in set(NBS.rglob("*.ipynb")) - {NBS / "core" / "schema.ipynb"}:
        code = "\n".join(cells(file, "code")).lower()
        assert [file.stem for side in ("left", "right") if SIDE_COLOURS[side].lower() in code] == []


def lab(colours, blind=None) -> np.ndarray:
    """CIE L*a*b* (N, 3) of colours #rrggbb, as the eye without red or green cones sees them (Machado et al. 2009)."""
    rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    if blind is not None:
        linear = (linear @ np.array(blind).T).clip(0, 1)
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    x, y, z = (np.where(v > 0.008856, np.cbrt(v), 7.787 * v + 16 / 116) for v in (xyz / (0.9505, 1, 1.089)).T)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


@pytest.mark.parametrize(
    "blind",
    [
        None,
        [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
        [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    ],
    ids=["all cones", "no red", "no green"],
)
def test_sides_decisions_and_methods_are_told_apart(blind):
    """With and without colour blindness: colours that differ by 20 in L*a*b* are not confused."""
    sides, decisions, methods = (list(p.values()) for p in (SIDE_COLOURS, DECISION_COLOURS, METHOD_COLOURS))
    left, right, middle, *others = lab([*sides, *decisions, METHOD_COLOURS["scarcenet"]], blind)
    for side in (left, right):
        assert min(np.linalg.norm(side - other) for other in (*others, middle)) > 20
    assert np.linalg.norm(left - right) > 75 and abs(left - right)[0] > 25  # in print without colours, too
    assert not set(methods) & {*sides, *decisions}


# ---- the numbers of 12_results, from the files that it cites

README = (NBS.parent / "README.md").read_text(encoding="utf-8")
GRIDS = ("study", "px128", "px256", "transfer", "study-demo")


def by_seed(rows, labels, method, column="teacher_AP"):
    return {int(r["seed"]): float(r[column]) for r in rows if (r["labels"], r["method"]) == (labels, method)}


def differences(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
    return {seed: a[seed] - b[seed] for seed in a.keys() & b.keys()}


@pytest.fixture(scope="module")
def measured() -> list[list[float]]:
    """Every gain that can be made of the measured rows, points of AP by seed: method over method, size over size."""
    folder = NBS / "measured"
    grids = {name: list(read_grid(folder / f"{name}.csv").values()) for name in GRIDS}
    for name, part in (("study", "no-small-loss"), ("study-demo", "no-small-loss-demo")):
        grids[name] += [r | {"method": "no loss"} for r in read_grid(folder / f"{part}.csv").values()]
    older = read_rows(folder / "study-before.csv")
    grids |= {name: [r for r in older if r["run"] == name] for name in ("first", "second")}
    replaced = [r for r in older if r["run"] == "elsewhere"]  # the two rows of the second run that are not today's
    grids["second"] += [r for r in grids["study"] if r["method"] == "supervised"] + replaced  # the last one counts
    columns = {f"{name}_AP" for name in ("teacher", "other_families", "cat", "dog", "horse", "cow", "sheep")}
    columns |= {"other_families_PCK", "teacher_PCK"}
    series = {}
    for name, rows in grids.items():
        for labels, method in {(r["labels"], r["method"]) for r in rows}:
            for column in columns & rows[0].keys():
                series[name, labels, column, method] = by_seed(rows, labels, method, column)
    for file, method in (("stage1", "stage 1"), ("baseline", "own recipe")):
        for row in read_json(folder / f"{file}.json"):
            key = (row["folder"], row["labels"], "teacher_AP", method)
            series.setdefault(key, {})[row["seed"]] = row["test AP"]
    for row in read_rows(folder / "demo.csv"):
        if row["labels"] == "1" and int(row["seed"]) > 2:  # the seeds on which nothing was chosen
            for drawn in ("demo", "demo, first three" if int(row["seed"]) < 6 else "demo, last three"):
                key = (drawn, "1", "teacher_AP", row["network"])
                series.setdefault(key, {})[int(row["seed"])] = float(row["test_AP"])
    places = {key[:3] for key in series}
    for place in places:  # the best of the baselines, seed by seed
        found = [series[(*place, m)] for m in ("supervised", "stage 1", "own recipe") if (*place, m) in series]
        if len(found) > 1:
            seeds = set.intersection(*(set(s) for s in found))
            series[(*place, "best")] = {seed: max(s[seed] for s in found) for seed in seeds}
    gains = [differences(a, b) for (i, a), (j, b) in product(series.items(), repeat=2) if i[1:3] == j[1:3]]
    return [[100 * gain[seed] for seed in sorted(gain)] for gain in gains if gain]


def test_gains_in_the_readme_are_measured():
    """The sentence on the drawn animals: gains by the number of labels."""
    said = re.search(r"With (.*) labelled images of each drawn species, ScarceNet gains (.*) points", README)
    counts, gains = (re.findall(r"-?\d*\.?\d+", part) for part in said.groups())
    rows = list(read_grid(NBS / "measured" / "study-demo.csv").values())
    assert len(counts) == 5
    for labels, gain in zip(counts, gains, strict=True):
        by_draw = differences(by_seed(rows, labels, "scarcenet"), by_seed(rows, labels, "supervised"))
        assert len(by_draw) == 3 and abs(100 * np.mean(list(by_draw.values())) - float(gain)) < 0.0501


def test_gains_of_12_results_are_measured(measured):
    """Three gains by seed ("8.5, 7.9 and 6.9"): each such triple of the chapter is one of the files'."""
    chapter = "\n".join(cells(NBS / "12_results.ipynb", "markdown"))
    found = re.findall(r"(?<![\d.])([+-]?\d*\.\d), ([+-]?\d*\.\d) and ([+-]?\d*\.\d)(?![\d.])", chapter)
    assert len(found) > 15
    triples = np.array([gain for gain in measured if len(gain) == 3])
    wrong = [t for t in found if np.abs(triples - np.array(t, float)).max(1).min() > 0.0501]
    assert wrong == []


def test_means_of_12_results_are_measured(measured):
    """Means with deviations ("16.3 ± 1.0 points"), too."""
    chapter = "\n".join(cells(NBS / "12_results.ipynb", "markdown"))
    found = re.findall(r"(\d*\.\d) ± (\d*\.\d)(?!\d)", chapter)
    assert found
    pairs = np.array([(np.mean(gain), np.std(gain, ddof=1)) for gain in measured if len(gain) > 1])
    assert [pair for pair in found if np.abs(pairs - np.array(pair, float)).max(1).min() > 0.0501] == []


def test_times_of_20_gpu_training_are_measured():
    text = "\n".join(cells(NBS / "20_gpu_training.ipynb", "markdown"))
    bench = read_json(NBS / "measured" / "bench-h100-w32.json")
    one, two = (round(1e3 * bench["rows"][name]["seconds"]) for name in ("forward", "two forwards"))
    assert f"32 images take {one} milliseconds, and 64 take {two}" in text
    assert f"{100 * bench['efficiency']['ScarceNet step']:.0f} % of" in text


def test_every_reference_is_used():
    """A reference names the chapters in which it is used, and they exist."""
    references = section(NBS / "12_results.ipynb", "References")
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| (.*) \|$", references, re.M)
    wanted = {"Mean Teacher", "FixMatch", "Co-teaching", "Noisy keypoint labels", "Dual networks", "HRNet", "DarkPose"}
    wanted |= {"UDP", "AP-10K", "APT-36K", "Animal-Pose", "SuperAnimal", "Lightning Pose"}
    assert wanted <= {name for name, _ in rows}
    assert all(re.search(r"\]\([\w/]+\.ipynb\)|All chapters|this chapter", text) for _, text in rows)
