"""The explorer in a real browser: the report page, and the widget in JupyterLab. Skipped where there is no Chromium."""
import base64
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from scarcenet.config import ORIGINAL, Config
from scarcenet.ledger.explorer import FRONT, Explorer, bundle, crop_picture, everything, explore, pick, report
from scarcenet.ledger.ledger import Ledger, open_run_ledger, redecide
from scarcenet.predict.predictor import find_poses
from scarcenet.record import Record, by_instance
from scarcenet.run.folder import open_run
from scarcenet.run.load import gather
from scarcenet.run.train_run import train_run

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync").split()
QUICK = dict(labels="1", device="cpu", network="tiny", size=32, sigma=1.0, supervised_epochs=1, supervised_batch=8, epochs=3, keep_epochs=3,
             keep_floor=0.5, views=1, batch=8, labelled_repeat=2, ramp_epochs=2, drop=0.3)
RULES = [dict(keep=k, agree_px=a, drop=d) for k, a, d in ((None, None, None), (0.37, None, None), (None, 1.15, None), (None, None, 0.55), (0.0, 0.0, 0.99),
                                                        (1.0, 3.0, 0.0), (0.84, 0.6, 0.4), (0.5, 0.05, 0.07))]


@pytest.fixture(scope="module", params=[Config, lambda **changes: replace(ORIGINAL, **changes)], ids=["default", "original"])
def run(request, zoo, tmp_path_factory):
    config = request.param(data=str(zoo), **QUICK)
    folder = tmp_path_factory.mktemp("explore")
    train_run(config, open_run(folder / "run", config), gather(config, folder))
    return folder / "run"


@pytest.fixture(scope="module")
def browser():
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page that may reach nothing but this machine, and must not complain."""
    page, trouble = browser.new_page(viewport=dict(width=1280, height=1000)), []
    page.on("console", lambda m: trouble.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: trouble.append(str(e)))
    page.on("request", lambda r: trouble.append(r.url) if not r.url.startswith(("file:", "data:", "blob:", "http://127.0.0.1", "ws://127.0.0.1")) else None)
    yield page
    page.close()
    assert trouble == []


def decided(ledger, epoch, rules):
    record = ledger.record(epoch)
    return by_instance(record._replace(decision=redecide(ledger, epoch, record, **rules))).decision


# ---- what the front end is given

def test_bundle(run):
    ledger = open_run_ledger(run)
    poses = find_poses(ledger.config, run, split="train", bare=True)
    rows = pick(ledger, poses, 10)
    assert len(set(rows)) == 10 and ledger.labelled[rows].sum() == 1
    made = bundle(ledger, poses, rows)
    array = {n: np.frombuffer(base64.b64decode(a["data"]), a["dtype"]).reshape(a["shape"]) for n, a in made["arrays"].items()}
    assert json.loads(json.dumps(made)) == made
    for e, epoch in enumerate(ledger.epochs):
        record = by_instance(ledger.record(epoch))
        assert np.array_equal(array["decision"][e], record.decision[rows])
        assert np.array_equal(np.isnan(array["loss"][e]), record.label_loss[rows].isnan())
    # positions stand on the crop as they stand in the picture
    for n, row in enumerate(rows):
        (x, y, w, h), seen, known = poses.instances[row].box, made["instances"][n], array["truth_known"][n] > 0
        room = 0.15 * max(w, h)
        left, top = max(0, int(x - room)), max(0, int(y - room))
        right, bottom = min(poses.instances[row].width, int(np.ceil(x + w + room))), min(poses.instances[row].height, int(np.ceil(y + h + room)))
        scale = np.array([seen["width"] / (right - left), seen["height"] / (bottom - top)])
        by_hand = (poses.truth.xy[row] + 0.5 - (left, top)) * scale - 0.5
        assert known.any() and np.allclose(array["truth_xy"][n][known], by_hand[known], atol=1e-2)
    hidden = bundle(ledger, poses, rows, truth=False)
    assert not {"truth_xy", "truth_known", "right", "label_right"} & hidden["arrays"].keys()


def test_no_animal_is_no_page(run):
    with pytest.raises(ValueError, match="0 animals"):
        report(run, most=0)


@pytest.mark.parametrize("x", [-500.0, 5000.0, -20.0])
def test_a_box_that_leaves_the_picture(run, x):
    poses = find_poses(open_run_ledger(run).config, run, split="train")
    beside = replace(poses, instances=(replace(poses.instances[0], box=(x, 10.0, 60.0, 40.0)), *poses.instances[1:]))
    data, (width, height), affine = crop_picture(beside, 0)
    assert data.startswith("data:image/jpeg;base64,") and width and height and np.isfinite(affine).all()


def test_two_thousand_animals_in_a_moment(run):
    """Moving a slider in a notebook: at most 0.2 s for 2,000 instances."""
    small = open_run_ledger(run)
    n, times = len(small.instances), -(-2000 // len(small.instances))
    tile = lambda t: torch.cat([t] * times)[:2000]
    class Large(Ledger):
        def record(self, epoch):
            record = by_instance(small.record(epoch))
            big = Record(*(tile(t) for t in record))
            return big._replace(index=torch.arange(2000), batch=torch.arange(2000) // 16)
    large = Large(small.folder, small.config, pd.concat([small.instances] * times, ignore_index=True)[:2000], small.names,
                  tile(small.label_xy), tile(small.score), tile(small.has_label), small.epochs)
    widget = Explorer.__new__(Explorer)
    widget._ledger, widget._rows, widget._records = large, torch.arange(2000), {}
    super(Explorer, widget).__init__()
    widget._decide()
    times = []
    for keep in (0.2, 0.4, 0.6):
        began = time.perf_counter()
        widget.rules = dict(keep=keep, agree_px=1.0, drop=0.5)
        widget._decide()
        times.append(time.perf_counter() - began)
    assert n and min(times) <= 0.2


# ---- the page

def test_the_page_decides_as_python_does(run, page):
    ledger = open_run_ledger(run)
    code = base64.b64encode((FRONT / "explorer.js").read_bytes()).decode()
    page.goto("about:blank")
    given = dict(all=everything(ledger, [0]), run=bundle(ledger, find_poses(ledger.config, run, split="train", bare=True), [0])["run_rules"], rules=RULES)
    answers = page.evaluate("""async ({ code, all, run, rules }) => {
        const front = await import("data:text/javascript;base64," + code), seen = front.decodeAll(all);
        return rules.map((r) => seen.epochs.map((_, e) => Array.from(front.redecide(seen, run, r, e).decision)));
    }""", given | {"code": code})
    for rules, answer in zip(RULES, answers):
        for epoch, decision in zip(ledger.epochs, answer):
            assert decision == decided(ledger, epoch, rules).flatten().tolist(), (rules, epoch)


def test_the_report(run, page, tmp_path):
    ledger = open_run_ledger(run)
    html = report(run, most=12)
    assert len(html.encode()) < 15e6 and "http" not in html.replace("http://www.w3.org", "")
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    page.goto(f"file://{tmp_path / 'report.html'}")
    at = lambda name: page.locator(f"[data-test={name}]")
    at("counts").wait_for()
    # the middle of the picture's first pixel is at (0, 0), where `crop_picture`'s affine has it
    assert set(page.locator("svg.picture image").evaluate_all("all => all.map(i => i.getAttribute('x') + ' ' + i.getAttribute('y'))")) == {"-0.5 -0.5"}
    assert page.locator("img").evaluate_all("all => all.filter(i => i.getAttribute('src') && i.loading != 'lazy' && !(i.complete && i.naturalWidth)).map(i => i.outerHTML.slice(0, 200))") == []
    assert not at("note").is_visible()
    before = at("counts").inner_text()
    at("agree_px").fill("3")
    page.wait_for_function("before => document.querySelector('[data-test=counts]').innerText != before", arg=before)
    assert at("note").is_visible()
    free = decided(ledger, ledger.epochs[-1], dict(agree_px=3.0))[~ledger.labelled]
    assert str(int((free == 1).sum())) in at("counts").inner_text().replace(",", "").split()
    # by keyboard: the next animal, the next keypoint, the epoch before, the run's own rules
    page.locator(".scarce").first.focus()
    for key in ("ArrowRight", "ArrowDown", "[", "r"):
        page.keyboard.press(key)
    assert not at("note").is_visible() and at("epoch").input_value() == str(len(ledger.epochs) - 2)
    assert ledger.names[1] in page.locator(".scarce").inner_text()


def test_nothing_in_a_name_ends_the_script(run, page, tmp_path):
    """A file name is data, whatever stands in it."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    name = "<!--<script></script><img src=x onerror=alert(1)>.jpg"
    import pyarrow.parquet as pq
    table = pq.read_table(folder / "ledger/instances.parquet").to_pandas()
    table["file"] = name
    table.to_parquet(folder / "ledger/instances.parquet")
    (tmp_path / "report.html").write_text(report(folder, most=6), encoding="utf-8")
    page.on("dialog", lambda d: pytest.fail("a name was run as a script"))
    page.goto(f"file://{tmp_path / 'report.html'}")
    page.locator("[data-test=counts]").wait_for()
    assert name in page.locator(".scarce").inner_text()


# ---- the widget

def test_the_widget_answers(run):
    ledger, widget = open_run_ledger(run), explore(run, most=8)
    rows = [i["instance"] for i in widget.bundle["instances"]]
    for rules in RULES:
        for place, epoch in enumerate(ledger.epochs):
            widget.epoch, widget.rules = place, rules
            shown = np.frombuffer(base64.b64decode(widget.decisions["data"]), np.int8).reshape(8, -1)
            assert np.array_equal(shown, decided(ledger, epoch, rules)[rows])
    assert len(repr(widget)) < 200


def test_in_jupyterlab(page, tmp_path):
    """The chapter is opened, all its cells that are not slow are run, a slider is moved: the decisions change, and nothing lands on stderr."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install scarcenet[lab]")
    content = json.loads((ROOT / "nbs/ledger/explorer.ipynb").read_text(encoding="utf-8"))
    wanted = lambda source: not any(word in source for word in ("#| slow", "showdoc", "rmtree(home)"))
    content["cells"] = [c | {"outputs": []} if c["cell_type"] == "code" else c for c in content["cells"] if c["cell_type"] != "code" or wanted("".join(c["source"]))]
    (tmp_path / "chapter.ipynb").write_text(json.dumps(content))
    port, environment = 8917, os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_DATA_DIR": str(tmp_path / "data"), "IPYTHONDIR": str(tmp_path / "ipython"),
                                            "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
                               "--IdentityProvider.token=tok", f"--ServerApp.root_dir={tmp_path}"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    try:
        kernels = f"http://127.0.0.1:{port}/api/kernels?token=tok"
        for _ in range(120):
            try:
                urllib.request.urlopen(kernels)
                break
            except OSError:
                time.sleep(0.5)
        page.goto(f"http://127.0.0.1:{port}/lab/tree/chapter.ipynb?reset&token=tok")
        page.locator(".jp-NotebookPanel .jp-Notebook").wait_for(timeout=90000)
        for _ in range(120):                       # the page says "idle" before there is a kernel: ask the server
            ready = json.loads(urllib.request.urlopen(kernels).read())
            if ready and ready[0]["connections"] and ready[0]["execution_state"] == "idle":
                break
            time.sleep(0.5)
        page.locator('.lm-MenuBar-itemLabel:text-is("Run")').click()
        page.locator('.lm-Menu-itemLabel:text-is("Run All Cells")').click()
        shown = page.locator(".jp-OutputArea [data-test=counts]").first
        shown.wait_for(timeout=150000)
        page.wait_for_function("() => [...document.querySelectorAll('.jp-OutputArea-output')].some(e => e.textContent.includes('decided again'))", timeout=150000)
        before = shown.inner_text()
        slider = page.locator(".jp-OutputArea [data-test=agree_px]").first
        slider.click(position=dict(x=5, y=5))       # the left end ...
        for _ in range(3):
            page.keyboard.press("ArrowRight")       # ... and three steps from it
        page.wait_for_function("before => document.querySelector('.jp-OutputArea [data-test=counts]').innerText != before", arg=before, timeout=30000)
        assert page.locator('.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
        if keep := os.environ.get("SCARCENET_SCREENSHOTS"):
            page.screenshot(path=str(Path(keep) / "jupyterlab.png"))
        page.goto("about:blank")                    # or the page complains that the server is gone
    finally:
        server.terminate()
        server.wait(20)
