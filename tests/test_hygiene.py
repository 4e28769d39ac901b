"""The repository itself: modules are the notebooks', imports go down, the README is the index, style and types hold."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "scarcenet"
NOTEBOOKS = sorted(f for f in (ROOT / "nbs").rglob("*.ipynb") if not {"runs", ".ipynb_checkpoints"} & set(f.parts))
MODULES = sorted(f for f in LIBRARY.rglob("*.py") if f.stem not in ("__init__", "_modidx"))
LONGEST = 350  # lines of a module


def dotted(file: Path) -> str:
    """A module's name below the package."""
    return ".".join(file.relative_to(LIBRARY).with_suffix("").parts)


def notebook(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def exporting() -> dict[str, Path]:
    """Module name -> the notebook that makes it."""
    found = {}
    for file in NOTEBOOKS:
        for cell in notebook(file)["cells"]:
            if cell["cell_type"] == "code" and (
                name := re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(cell["source"]), re.M)
            ):
                found[name[1]] = file
    return found


def by_name(files):
    return pytest.mark.parametrize("file", files, ids=lambda f: f.relative_to(ROOT).with_suffix("").as_posix())


def test_export_leaves_no_difference(tmp_path):
    """The notebooks, exported into a copy in which no module is left, make the modules that stand here, every byte."""
    for name in ("settings.ini", "README.md", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    for file in NOTEBOOKS:
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    (tmp_path / "scarcenet").mkdir()
    shutil.copy(LIBRARY / "__init__.py", tmp_path / "scarcenet")
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # which makes nbdev_export do nothing
    subprocess.run(
        [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    made, here = (
        {f.relative_to(folder): f.read_text(encoding="utf-8") for f in folder.rglob("*.py")}
        for folder in (tmp_path / "scarcenet", LIBRARY)
    )
    assert made.keys() == here.keys()
    assert [name for name in here if made[name] != here[name]] == []


def test_every_module_has_its_notebook():
    assert {dotted(f) for f in MODULES} == set(exporting())


# A module imports only from its own layer or from those before it. A name is a module at the top, or a folder.
LAYERS = (
    ("utils",),
    ("config", "schema", "affine", "zoo"),
    ("data", "models"),
    ("heatmap", "pseudo_labels", "small_loss", "relabel", "mean_teacher"),
    ("step", "record", "checkpoint", "train", "evaluate"),
    ("predict",),
    ("run",),
    ("ledger", "experiments"),
    ("cli", "__main__"),
)
LAYER = {name: n for n, names in enumerate(LAYERS) for name in names}


def layer(module: str) -> int:
    return LAYER[module.split(".")[0]]


def imported(file: Path) -> set[str]:
    """The modules of this package that a module imports, wherever in it; each import must name its module."""
    found, here = set(), file.relative_to(LIBRARY).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == "scarcenet"):
            above = here[: len(here) - node.level + 1] if node.level else ()
            found.add(".".join((*above, node.module.removeprefix("scarcenet."))))
            assert "*" not in {alias.name for alias in node.names}
    assert found <= {dotted(f) for f in MODULES}, "from the package, import modules' names, not the package's"
    return found


def test_every_module_has_a_layer():
    assert set(LAYER) == {dotted(f).split(".")[0] for f in MODULES}


@by_name(MODULES)
def test_imports_go_down(file):
    assert {m for m in imported(file) if layer(m) > layer(dotted(file))} == set()


def test_imports_have_no_circle():
    """Not even one that a late import inside of a function would let pass; nor do two folders import each other."""
    modules = {dotted(f): imported(f) for f in MODULES}
    TopologicalSorter(modules).prepare()
    folders = {}
    for module, others in modules.items():
        here = module.rpartition(".")[0]
        folders.setdefault(here, set()).update({m.rpartition(".")[0] for m in others} - {here, ""})
    folders.pop("")  # the modules at the top are no folder: their order is the layers'
    TopologicalSorter(folders).prepare()


@by_name(MODULES)
def test_modules_are_short(file):
    """In lines, and in columns; but nbdev wraps `__all__` where it likes."""
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    own = re.sub(r"^__all__ = \[[^]]*\]", "", text, flags=re.M)
    assert [line for line in own.splitlines() if len(line) > 120] == []


def test_style():
    """`ruff` (.ruff.toml) finds nothing; its formatter neither, but in modules, whose blank lines are nbdev's."""
    written = ["nbs", "tests", "setup.py", ".ci", "scarcenet/__init__.py"]
    for command in (["check", *written, "scarcenet"], ["format", "--check", *written]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.slow
def test_types():
    """The type hints are complete, and mypy finds no fault in them (.mypy.ini)."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ".mypy.ini"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_modules_are_described():
    """Each begins with a sentence on what it is for."""
    assert [f.name for f in MODULES if not ast.get_docstring(ast.parse(f.read_text(encoding="utf-8")))] == []


def test_readme_is_the_index():
    specification = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    text, images = tool.readme(ROOT / "nbs" / "index.ipynb")
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text
    assert {name: (ROOT / name).read_bytes() for name in images} == images


def local_links(file: Path) -> list[str]:
    """What the links of a page, or of a notebook's texts and tables, name beside it."""
    if file.suffix == ".ipynb":
        cells = notebook(file)["cells"]
        texts = [c["source"] for c in cells if c["cell_type"] == "markdown"] + [
            o.get("data", {}).get("text/markdown", "") for c in cells for o in c.get("outputs", [])
        ]
    else:
        texts = [file.read_text(encoding="utf-8")]
    return [
        target for text in texts for target in re.findall(r"\]\((?!https?:|#|attachment:)([^)#\s]+)", "".join(text))
    ]


@by_name([ROOT / "README.md", *NOTEBOOKS])
def test_links_lead_somewhere(file):
    assert [target for target in local_links(file) if not (file.parent / target).exists()] == []


@by_name(NOTEBOOKS)
def test_notebook_form(file):
    """Title, sentence, cell ids that stay, no execution counts."""
    content = notebook(file)
    ids = [c.get("id", "") for c in content["cells"]]
    assert all(re.fullmatch(r"[\w-]{1,64}", i) for i in ids) and len(set(ids)) == len(ids)
    first = "".join(content["cells"][0]["source"])
    assert content["cells"][0]["cell_type"] == "markdown" and re.match(r"# .+\n+> .+", first), (
        "first cell: `# Title` and `> a sentence`"
    )
    assert all(
        c.get("execution_count") is None and not any(o.get("execution_count") for o in c["outputs"])
        for c in content["cells"]
        if c["cell_type"] == "code"
    ), "run nbdev_clean"


@by_name(NOTEBOOKS)
def test_notebook_outputs(file):
    """They were run, without an error; and there is something to look at."""
    outputs = [o for c in notebook(file)["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    errors = [
        o
        for o in outputs
        if o["output_type"] == "error" or "Traceback (most recent call last)" in "".join(o.get("text", []))
    ]
    assert outputs and not errors
    if file.stem != "index":
        assert any({"image/png", "image/svg+xml", "image/jpeg"} & o.get("data", {}).keys() for o in outputs), "no image"


# Folders of one machine, and what a browser or an editor leaves behind. Written so that this file does not find itself.
MACHINE = re.compile(
    "|".join(
        ["(?<![\\w.~<-])/" + f"(?:{name})/" for name in ("root", "home", "work", "Users", "tmp")]
        + [r"\b[A-Z]:\\\\Users"]
    )
)


def text_files():
    folders = [ROOT / n for n in ("nbs", "scarcenet", "tests", ".ci")]
    ends = (".py", ".ipynb", ".md", ".ini", ".js", ".css", ".toml", ".yml")
    inside = [
        f
        for folder in folders
        for f in folder.rglob("*")
        if f.suffix in ends and not {"runs", "__pycache__", ".ipynb_checkpoints"} & set(f.parts)
    ]
    return sorted(f for f in inside + [f for f in ROOT.iterdir() if f.is_file()] if f.suffix in ends)


@pytest.mark.parametrize("file", text_files(), ids=lambda f: f.relative_to(ROOT).as_posix())
def test_no_machine_paths(file):
    text = re.sub(r'"image/(?:png|jpeg)": ?"[^"]*"', "", file.read_text(encoding="utf-8"))  # base64 may hold anything
    assert [m[0] for m in MACHINE.finditer(text)] == []
