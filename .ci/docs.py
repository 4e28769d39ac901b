"""Make the site from the notebooks as they are, none is run: `python .ci/docs.py [FOLDER]`, by default _docs.

Sphinx, MyST-NB and furo, set up in .ci/site, make the pages, and the library itself a small run to look into, so
`pip install -e ".[docs]"` comes first. Warnings are errors, and so is a link within the site that leads nowhere.
"""

import argparse
import base64
import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from html import escape
from html.parser import HTMLParser
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from posixpath import dirname, normpath, relpath
from urllib.parse import unquote, urlsplit

import nbformat
from PIL import Image

from scarcenet.zoo.dataset import write_zoo

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
INI = ConfigParser(delimiters=["="], interpolation=None)
INI.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = INI["DEFAULT"]
FILES = f"{SETTINGS['git_url']}/blob/{SETTINGS['branch']}"
COLAB = FILES.replace("https://github.com", "https://colab.research.google.com/github")
IMAGES = {"image/png", "image/jpeg"}
WIDGET = "application/vnd.jupyter.widget-view+json"
THUMBNAIL = 320  # px wide
COMMANDS = {"suggest"}  # public names that are commands, too: in a text one cannot tell which is meant
# the run of the page "A run to look into": what `scarcenet demo` does, with fewer and smaller images
RUN = "demo --size 64 --epochs 3 --supervised-epochs 3 --supervised-repeat 8 --evaluate-every 3 --device cpu".split()
SET = dict(train=128, val=24, test=24, seed=0)

DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
# in Markdown: what is left alone (fences, links), or a name in backticks
NAME = re.compile(r"```.*?```|!?\[[^\]]*\]\([^)]*\)|^#.*$|(?<!`)`([\w/]+)`(?!`)", re.M | re.S)
LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
INSIDE = re.compile(r"\]\(#[^)\s]*\)")  # a link to a heading of the same page


def find_notebooks() -> dict[str, nbformat.NotebookNode]:
    """Page name, like 06_relabeling or data/coco -> its notebook; the course comes first."""
    files = [f for f in NBS.rglob("*.ipynb") if not {"runs", ".ipynb_checkpoints"} & set(f.parts)]
    names = sorted((f.relative_to(NBS).with_suffix("").as_posix() for f in files), key=lambda n: ("/" in n, n))
    return {name: nbformat.read(NBS / f"{name}.ipynb", as_version=4) for name in names}


def is_course(name: str) -> bool:
    return name[0].isdigit()


def title(notebook: nbformat.NotebookNode) -> str:
    return re.match(r"# (.+)", notebook.cells[0].source)[1]


def long_title(name: str, notebook: nbformat.NotebookNode) -> str:
    """With the number of a chapter, by which the texts call it, or the folder of a reference page."""
    return f"{name[:2]} {title(notebook)}" if is_course(name) else f"{dirname(name)}: {title(notebook)}"


def sentence(notebook: nbformat.NotebookNode) -> str:
    return re.search(r"^> (.+)", notebook.cells[0].source, re.M)[1]


def has_directive(cell: nbformat.NotebookNode, *names: str) -> bool:
    return re.search(rf"^#\|\s*({'|'.join(names)})\s*$", cell.source, re.M) is not None


def images_of(cell: nbformat.NotebookNode) -> list[bytes]:
    outputs = [o.get("data", {}) for o in cell.get("outputs", [])]
    return [base64.b64decode(data[kind]) for data in outputs for kind in IMAGES & data.keys()]


# ---- a notebook becomes a page


def link_texts(text: str, page: str, names: dict[str, nbformat.NotebookNode], public: set[str]) -> str:
    """Markdown whose links lead to pages of the site or to files of the repository; names in backticks are links."""
    here = dirname(page) or "."

    def link_file(match: re.Match) -> str:
        opening, target, anchor = match[1], match[2], match[3] or ""
        path = normpath(f"{here}/{target}")
        if path.removesuffix(".ipynb") in names:
            return f"{opening}{target}{anchor.lower()})"  # Jupyter's anchors keep capitals, MyST's do not
        inside = (NBS / path).suffix in (".png", ".jpg", ".svg")
        return match[0] if inside else f"{opening}{FILES}/{normpath(f'nbs/{path}')}{anchor})"

    def link_name(match: re.Match) -> str:
        name = match[1]
        if name in names and name != page:
            return f"[`{name}`]({relpath(name, here)}.ipynb)"
        return f"{{py:obj}}`~scarcenet.{name}`" if name in public - COMMANDS else match[0]

    text = INSIDE.sub(lambda match: match[0].lower(), text)
    return NAME.sub(link_name, LINK.sub(link_file, text))


def page_links(page: str, module: str | None) -> str:
    """The line below a title."""
    colab = f'<a class="colab" href="{COLAB}/nbs/{page}.ipynb">Open in Colab</a>' if is_course(page) else ""
    source = f'<a href="{FILES}/nbs/{page}.ipynb">Notebook on GitHub</a>'
    makes = f"<span>cells with a blue edge make <code>scarcenet.{module}</code></span>" if module else ""
    return f'<div class="page-links">{colab}{source}{makes}</div>'


def live_run(folder: str) -> str:
    """The report page, in a frame."""
    path = relpath("report.html", folder or ".")
    frame = f'<iframe class="report" src="{path}" title="Explorer of a run" loading="lazy"></iframe>'
    return f'{frame}\n<p><a href="{path}">Open the explorer on a page of its own</a></p>'


def show_code(cell: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """A code cell without its directives: they say how it looks."""
    if has_directive(cell, "hide") or cell.id == "colab":
        return []
    tags = [
        tag for tag, names in {"exported": ["export"], "slow": ["slow", "gpu"]}.items() if has_directive(cell, *names)
    ]
    if has_directive(cell, r"echo:\s*false"):
        tags.append("remove-input")
    cell.metadata = nbformat.from_dict({"tags": tags})
    cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
    if not cell.source:
        return []
    anchor = nbformat.v4.new_markdown_cell(f'<span id="cell-{cell.id}"></span>')
    return [anchor, cell] if images_of(cell) else [cell]


def to_page(
    name: str, notebook: nbformat.NotebookNode, names: dict[str, nbformat.NotebookNode], public: set[str]
) -> nbformat.NotebookNode:
    """The notebook that MyST-NB shows."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cells.append(nbformat.v4.new_markdown_cell(link_texts(cell.source, name, names, public)))
            continue
        is_widget = any(WIDGET in o.get("data", {}) for o in cell.outputs)
        cell = nbformat.from_dict(cell)
        cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
        for output in cell.outputs:
            if text := output.get("data", {}).get("text/markdown"):
                output.data["text/markdown"] = link_texts(text, name, names, public)
        cells += show_code(cell)
        if is_widget:
            cells.append(nbformat.v4.new_markdown_cell(live_run(dirname(name))))
    if name != "index":
        cells.insert(1, nbformat.v4.new_markdown_cell(page_links(name, module_of(notebook))))
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def module_of(notebook: nbformat.NotebookNode) -> str | None:
    """What a notebook is exported to."""
    found = [re.search(r"^#\|\s*default_exp\s+(\S+)", c.source, re.M) for c in notebook.cells if c.cell_type == "code"]
    return next((match[1] for match in found if match), None)


# ---- pages that no notebook is


def toctree(caption: str, entries: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}" if caption else "", "", *entries, "```"])


def folder_page(folder: str, names: dict[str, nbformat.NotebookNode]) -> str:
    """The reference notebooks of a folder."""
    inside = {name.removeprefix(f"{folder}/"): nb for name, nb in names.items() if dirname(name) == folder}
    rows = [f"- [{title(nb)}]({name}.ipynb) (`{module_of(nb) or name}`): {sentence(nb)}" for name, nb in inside.items()]
    return "\n\n".join([f"# {folder}", "\n".join(rows), toctree("", list(inside))])


def gallery_page(names: dict[str, nbformat.NotebookNode], out: Path) -> str:
    """Every figure, small, with a link to its place in the chapter; `out` gets the small images."""
    (out / "gallery").mkdir(exist_ok=True)
    parts = ["# Gallery", "> Every figure of the course and of the reference; each leads to the cell that draws it."]
    for name, notebook in names.items():
        heading, shown = title(notebook), []
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                heading = (re.findall(r"^#+ (.+)", cell.source, re.M) or [heading])[-1]
            for n, data in enumerate(images_of(cell)):
                file = f"gallery/{name.replace('/', '-')}-{cell.id}-{n}.jpg"
                image = Image.open(BytesIO(data)).convert("RGBA").convert("RGB")
                image.thumbnail((THUMBNAIL, THUMBNAIL))
                image.save(out / file, quality=85)
                text = escape(re.sub(r"[`$*]", "", heading))
                picture = f'<img src="{file}" alt="{text}" loading="lazy">'
                shown.append(f'<a href="{name}.html#cell-{cell.id}">{picture}<span>{text}</span></a>')
        if shown:
            head = f"## [{long_title(name, notebook)}]({name}.ipynb)"
            parts += [head, '<div class="gallery">\n' + "\n".join(shown) + "\n</div>"]
    return "\n\n".join(parts)


def run_page() -> str:
    commands = [f"scarcenet train {' '.join(RUN)} --out runs/demo", "scarcenet report runs/demo --out report.html"]
    return "\n\n".join(
        [
            "# A run to look into",
            "> Page through the animals, click a keypoint, move a threshold: what would have been decided?",
            "The page below is what `scarcenet report` writes. It needs neither server nor kernel: the decisions are "
            "made again in the browser, by the same rule ([explorer](ledger/explorer.ipynb)). Its run was trained when "
            "this site was made, in about a minute, on fewer and smaller images than `scarcenet demo` uses: more "
            "of its decisions are wrong, so there is more to find.",
            live_run(""),
            "It was made like this, on a smaller zoo:",
            "```sh\n" + "\n".join(commands) + "\n```",
        ]
    )


def public_groups() -> dict[str, list[str]]:
    """The public names, under the comments that divide them in `scarcenet/__init__.py`."""
    source = (ROOT / "scarcenet" / "__init__.py").read_text(encoding="utf-8")
    groups: dict[str, list[str]] = {}
    for line in re.search(r"^_HOME = \{\n(.*?)^\}", source, re.M | re.S)[1].splitlines():
        if comment := re.match(r"\s*# (.+)", line):
            groups[comment[1][0].upper() + comment[1][1:]] = []
        else:
            list(groups.values())[-1].append(re.match(r'\s*"(\w+)"', line)[1])
    return groups


def describe(name: str, home: str) -> str:
    """The reStructuredText that fetches the docstring of a public name."""
    thing = getattr(importlib.import_module("scarcenet"), name)
    kind = "class" if inspect.isclass(thing) else "function" if inspect.isfunction(thing) else "data"
    options = {"class": "   :members:\n", "function": "", "data": "   :no-value:\n"}[kind]
    return f".. auto{kind}:: scarcenet.{name}\n{options}\n   Explained in :doc:`/{home}`.\n"


def api_pages(names: dict[str, nbformat.NotebookNode]) -> dict[str, str]:
    """File -> text: an overview, and a page of each group of public names."""
    homes = {module_of(nb): name for name, nb in names.items()}
    where = importlib.import_module("scarcenet")._HOME
    pages, overview = (
        {},
        ["API\n===", "Everything that ``scarcenet.__all__`` lists; ``import scarcenet as sn`` is all it takes."],
    )
    for group, members in public_groups().items():
        slug = re.sub(r"\W+", "_", group.lower())
        line = "=" * len(group)
        pages[f"api/{slug}.rst"] = "\n\n".join([f"{group}\n{line}", *(describe(m, homes[where[m]]) for m in members)])
        listed = "\n".join(f"   ~scarcenet.{m}" for m in members)
        heading = f":doc:`{group} <{slug}>`"
        overview += [f"{heading}\n{'-' * len(heading)}", f".. autosummary::\n   :nosignatures:\n\n{listed}"]
    entries = "\n".join(f"   {file[4:-4]}" for file in pages)
    return pages | {"api/index.rst": "\n\n".join([*overview, f".. toctree::\n   :hidden:\n\n{entries}\n"])}


# ---- all of it


def copy_mathjax(out: Path) -> None:
    """What draws the formulas, from the package that Jupyter serves it from."""
    source = files("jupyter_server_mathjax") / "static"
    left_out = shutil.ignore_patterns("localization", "SVG", "a11y")
    shutil.copytree(str(source), out, ignore=left_out)


def write_sources(sources: Path, out: Path) -> None:
    """What Sphinx reads; `out` gets the gallery's images."""
    names = find_notebooks()
    public = {name for group in public_groups().values() for name in group}
    folders = sorted({dirname(name) for name in names} - {""}, key=lambda f: (f != "core", f))
    pages = api_pages(names) | {"gallery.md": gallery_page(names, out), "run.md": run_page()}
    pages |= {f"{folder}/index.md": folder_page(folder, names) for folder in folders}
    for name, notebook in names.items():
        file = sources / f"{name}.ipynb"
        file.parent.mkdir(exist_ok=True)
        page = to_page(name, notebook, names, public)
        if name == "index":
            course = [f"{long_title(n, nb)} <{n}>" for n, nb in names.items() if is_course(n)]
            trees = [
                toctree("The course", course),
                toctree("To look at", ["run", "gallery"]),
                toctree("Reference", ["API <api/index>", *(f"{folder}/index" for folder in folders)]),
            ]
            page.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(trees)))
        nbformat.write(page, file)
    for name, text in pages.items():
        (sources / name).parent.mkdir(exist_ok=True)
        (sources / name).write_text(text, encoding="utf-8")
    shutil.copytree(NBS / "images", sources / "images")


def start_run(folder: Path, out: Path) -> subprocess.Popen:
    """Begin the run of the page "A run to look into", in `folder`; in the end, its report is `out`."""
    zoo = write_zoo(folder / "zoo", **SET)
    library, run = [sys.executable, "-m", "scarcenet"], str(folder / "demo")
    train = [*library, "train", *RUN, "--data", str(zoo), "--out", run]
    report = [*library, "report", run, "--out", str(out)]
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(f"{shlex.join(train)} && {shlex.join(report)}", shell=True, stdout=log)


class Page(HTMLParser):
    """The links of a page, and the places that links may lead to."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value is not None:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


def wrong_links(site: Path) -> list[str]:
    """Links that lead to no file or place of the site; of those that leave it, the ones that are no https address."""
    pages = {f.resolve(): Page(f.read_text(encoding="utf-8")) for f in site.rglob("*.html")}
    wrong = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                good = parts.scheme == "data" or (parts.scheme in ("https", "http") and "." in parts.netloc)
            else:
                target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
                good = target.is_file() and (target not in pages or unquote(parts.fragment) in pages[target].places)
            if not good:
                wrong.append(f"{file.relative_to(site.resolve())}: {link}")
    return wrong


def main(out: Path) -> int:
    if out.is_dir() and any(out.iterdir()) and not (out / "_static").is_dir():
        sys.exit(f"{out}: holds something else than a site; choose an empty folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        run = start_run(Path(folder), out.resolve() / "report.html")  # beside Sphinx
        copy_mathjax(out / "_static" / "mathjax")
        sources = Path(folder) / "sources"
        sources.mkdir()
        write_sources(sources, out)
        sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", f"{folder}/doctrees"]
        code = subprocess.run([*sphinx, "-c", str(ROOT / ".ci" / "site"), str(sources), str(out)]).returncode
        code = run.wait() or code
    wrong = wrong_links(out)
    print(*wrong, sep="\n")
    return code or bool(wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / SETTINGS["doc_path"], help="made anew")
    sys.exit(main(parser.parse_args().folder))
