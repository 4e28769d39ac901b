"""How Sphinx makes the site; .ci/docs.py calls it."""

import re
from configparser import ConfigParser
from pathlib import Path
from textwrap import dedent

ini = ConfigParser(delimiters=["="])
ini.read(Path(__file__).parents[2] / "settings.ini", encoding="utf-8")
settings = ini["DEFAULT"]

project, author, release = settings["title"], settings["author"], settings["version"]
project_copyright = settings["copyright"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax"]

nb_execution_mode = "off"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
mathjax_path = "mathjax/MathJax.js"  # the site's own: it asks nobody else for anything
mathjax2_config = {
    "config": ["TeX-AMS-MML_HTMLorMML-full.js"],
    "jax": ["input/TeX", "output/HTML-CSS"],
    "tex2jax": {"ignoreClass": ".*", "processClass": "math"},
    "HTML-CSS": {"availableFonts": [], "webFont": "STIX-Web", "linebreaks": {"automatic": True}},
    "messageStyle": "none",
    "showMathMenu": False,
}

default_role = "py:obj"  # a docstring's single backticks: a public name is a link, all else is code
autosummary_generate = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 100
add_module_names = False

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}


def tidy_docstring(app, what, name, obj, options, lines):
    """Our docstrings are plain: examples need no heading, and outside of code, a star or a bar is no markup."""
    if what == "data":
        lines[:] = [f"`{type(obj).__name__}`: {', '.join(obj if isinstance(obj, dict) else obj.names)}."]
    text, _, examples = "\n".join(lines).partition("Examples:\n")
    lines[:] = text.splitlines() + dedent(examples).splitlines()
    for n, line in enumerate(lines):
        if not line.startswith((">>>", "...")):
            parts = re.split(r"(`[^`]*`)", line)
            lines[n] = "".join(p if p.startswith("`") else re.sub(r"([*|])", r"\\\1", p) for p in parts)


def setup(app):
    app.connect("autodoc-process-docstring", tidy_docstring)
