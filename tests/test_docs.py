"""The site: it is made without a warning, all is in it, no link is broken, and it works in a browser."""

import fcntl
import functools
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

import scarcenet as sn

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 120  # seconds of one core that making the site may take, whatever else the machine does
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split()

for module in ("myst_nb", "furo", "jupyter_server_mathjax"):
    pytest.importorskip(module, reason="pip install scarcenet[docs]")


def load_docs() -> ModuleType:
    specification = importlib.util.spec_from_file_location("docs", ROOT / ".ci" / "docs.py")
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    return tool


docs = load_docs()
NOTEBOOKS = docs.find_notebooks()
COURSE = [name for name in NOTEBOOKS if docs.is_course(name)]


# ---- texts


@pytest.mark.parametrize(
    ("text", "linked"),
    [
        ("see `06_relabeling`.", "see [`06_relabeling`](../06_relabeling.ipynb)."),
        ("(`data/boxes`)", "([`data/boxes`](boxes.ipynb))"),
        ("this page, `data/coco`", "this page, `data/coco`"),
        ("`encode` and `encoded`", "{py:obj}`~scarcenet.encode` and `encoded`"),
        ("# `encode`", "# `encode`"),
        ("```\n`encode`\n```", "```\n`encode`\n```"),
        ("[`encode`](../03_heatmaps.ipynb)", "[`encode`](../03_heatmaps.ipynb)"),
        ("[all](../09_training.ipynb#The-differences)", "[all](../09_training.ipynb#the-differences)"),
        ("[below](#By-hand)", "[below](#by-hand)"),
        ("[rows](../measured/zoo.csv)", f"[rows]({docs.FILES}/nbs/measured/zoo.csv)"),
        ("[help](../../.github/CONTRIBUTING.md)", f"[help]({docs.FILES}/.github/CONTRIBUTING.md)"),
        ("![zoo](../images/zoo.png)", "![zoo](../images/zoo.png)"),
        ("[paper](https://arxiv.org/abs/2303.15023)", "[paper](https://arxiv.org/abs/2303.15023)"),
    ],
)
def test_links_are_made(text, linked):
    assert docs.link_texts(text, "data/coco", NOTEBOOKS, set(sn.__all__)) == linked


def test_wrong_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there">1</a><a href="b.html#here">2</a><a href="c.html">3</a><img src="d.png">'
        '<a href="https://arxiv.org">5</a><a href="https:/arxiv">6</a>'
    )
    (tmp_path / "b.html").write_text('<h1 id="here">B</h1><a href="#here"></a><a href="a.html"></a>')
    wrong = ["b.html#there", "c.html", "d.png", "https:/arxiv"]
    assert docs.wrong_links(tmp_path) == [f"a.html: {link}" for link in wrong]


def test_chapters_install_the_library_in_colab():
    """The second cell, not run anywhere else, and from the address in settings.ini."""
    for name in COURSE:
        cell = NOTEBOOKS[name].cells[1]
        assert cell.id == "colab" and cell.source.startswith("#| eval: false\n"), name
        assert 'if "google.colab" in sys.modules:' in cell.source
        assert f"git clone -q --depth 1 {docs.SETTINGS['git_url']}\n" in cell.source


def test_the_site_replaces_no_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds something else than a site"):
        docs.main(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_every_public_name_is_in_a_group():
    groups = docs.public_groups()
    assert all(groups) and ["__version__", *sum(groups.values(), [])] == sn.__all__


# ---- the site


def seconds_of_children() -> float:
    """What processes that have ended took of the processor."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as .ci/docs.py makes it, once for all workers: warnings and wrong links are errors."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = shared / "site"
    with open(shared / "site.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other worker waits
        if not out.exists():
            began = seconds_of_children()
            done = subprocess.run([sys.executable, ROOT / ".ci" / "docs.py", out], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            assert seconds_of_children() - began < LIMIT
    return out


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_the_site_is_whole(site):
    for name, notebook in NOTEBOOKS.items():
        text = (site / f"{name}.html").read_text(encoding="utf-8")
        assert ("Open in Colab" in text) == (name in COURSE)
        assert f"{docs.FILES}/nbs/{name}.ipynb" in text or name == "index"
        assert not re.search(r"#\| ?(export|hide|slow|default_exp|echo|eval)", re.sub("<[^>]*>", "", text)), name
        figures = [c.id for c in notebook.cells if c.cell_type == "code" for _ in docs.images_of(c)]
        gallery = (site / "gallery.html").read_text(encoding="utf-8")
        shown = [
            cell for cell in figures if f'href="{name}.html#cell-{cell}"' in gallery and f'id="cell-{cell}"' in text
        ]
        assert shown == figures
    api = "".join(f.read_text(encoding="utf-8") for f in (site / "api").glob("*.html"))
    assert [n for n in sn.__all__ if n != "__version__" and f'id="scarcenet.{n}"' not in api] == []
    assert 'id="explorer"' in (site / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def page(address):
    """A page of Chromium that may reach nothing but the site, where nothing may fail."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        page, faults = browser.new_page(viewport=dict(width=1400, height=1000)), []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("response", lambda r: faults.append(r.url) if r.status >= 400 else None)
        # MathJax measures an empty font, about:blank
        allowed = (address, "data:", "about:blank")
        page.on("request", lambda r: None if r.url.startswith(allowed) else faults.append(r.url))
        yield page
        browser.close()
        assert faults == []


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_in_a_browser(page, address):
    # from the first page to a chapter, whose formulas are drawn; by the gallery to a figure
    page.goto(f"{address}/index.html")
    page.locator(".sidebar-tree").get_by_text("06 Relabeling").click()
    page.wait_for_url("**/06_relabeling.html")
    page.locator(".MathJax").first.wait_for()
    page.wait_for_function("() => window.MathJax.Hub.queue.pending == 0")
    assert page.locator(".MathJax_Error, .merror").count() == 0
    page.locator(".sidebar-tree").get_by_text("Gallery", exact=True).click()
    page.locator(".gallery a").first.click()
    page.wait_for_url("**/00_scarcenet.html#cell-*")
    # the theme: light, dark, and back to the system's
    body = page.locator("body")
    before = body.get_attribute("data-theme")
    page.locator(".theme-toggle:visible").first.click()
    assert body.get_attribute("data-theme") != before
    # search finds the function of a name
    page.locator(".sidebar-search").fill("select_small_loss")
    page.keyboard.press("Enter")
    page.locator("#search-results .search li a").first.wait_for()
    found = page.locator("#search-results .search li a").evaluate_all("all => all.map(a => a.href)")
    assert any("api/the_step_and_its_parts.html" in link for link in found)
    # a threshold of the live run
    page.goto(f"{address}/run.html")
    explorer = page.frame_locator("iframe.report")
    counts = explorer.locator("[data-test=counts]")
    counts.wait_for()
    before = counts.inner_text()
    explorer.locator("[data-test=agree_px]").fill("3")
    explorer.locator("[data-test=note]").wait_for()
    assert counts.inner_text() != before
