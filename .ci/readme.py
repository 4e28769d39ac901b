"""Write README.md from nbs/index.ipynb, with nbconvert alone: `python .ci/readme.py`."""

import re
import sys
from pathlib import Path
from posixpath import normpath

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Made from nbs/index.ipynb by .ci/readme.py: edit that notebook. -->\n\n"
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp|export|include:\s*false)\b", re.M)
SILENT = re.compile(r"^#\|\s*echo:\s*false\b", re.M)  # its Markdown is shown, its code is not
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\)")  # beside the notebook, not beside README.md


def readme(index: Path) -> tuple[str, dict[str, bytes]]:
    """README.md's text for a notebook, and the pictures it shows: path -> bytes."""
    notebook = nbformat.read(index, as_version=4)
    notebook.cells = [c for c in notebook.cells if c.cell_type != "code" or not HIDDEN.search(c.source)]
    for n, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and SILENT.search(cell.source):
            shown = [o["data"]["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {})]
            notebook.cells[n] = cell = nbformat.v4.new_markdown_cell("\n\n".join(shown))
        elif cell.cell_type == "code":
            cell.source = DIRECTIVE.sub("", cell.source)
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(lambda link: f"]({normpath('nbs/' + link[1])})", cell.source)
    body, made = MarkdownExporter().from_notebook_node(
        notebook, resources={"unique_key": "index", "output_files_dir": "index_files"}
    )
    return NOTE + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n", made["outputs"]


def main() -> int:
    text, pictures = readme(ROOT / "nbs" / "index.ipynb")
    for name, content in pictures.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(content)
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
