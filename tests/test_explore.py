"""The explorer in a real browser: the report page, and the widget in JupyterLab. Skipped where there is no Chromium."""

import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from scarcenet.config import OFFICIAL, Config
from scarcenet.ledger.explorer import ASSETS, Explorer, bundle, crop_image, explore, pack_all, pick, report_page
from scarcenet.ledger.ledger import Ledger, open_ledger, redecide
from scarcenet.ledger.suggest import suggest
from scarcenet.predict.predictor import find_poses
from scarcenet.record import Record, by_instance
from scarcenet.relabel import Decision
from scarcenet.run.folder import open_run
from scarcenet.run.load import load_run_data
from scarcenet.run.train_run import train_in_folder

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
QUICK = dict(
    labels=1,
    device="cpu",
    precision="float32",
    network="hrnet_tiny",
    size=32,
    sigma=1.0,
    supervised_epochs=1,
    supervised_batch=8,
    epochs=3,
    keep_epochs=3,
    keep_floor=0.5,
    views=1,
    batch=8,
    labelled_repeat=2,
    rampup_epochs=2,
    drop=0.3,
)
RULES = [
    dict(keep=keep, agree_px=agree_px, drop=drop)
    for keep, agree_px, drop in (
        (None, None, None),
        (0.37, None, None),
        (None, 1.15, None),
        (None, None, 0.55),
        (0.0, 0.0, 0.99),
        (1.0, 3.0, 0.0),
        (0.84, 0.6, 0.4),
        (0.5, 0.05, 0.07),
    )
]


def official(**changes) -> Config:
    """The official code's configuration with changes."""
    return replace(OFFICIAL, **changes)


@pytest.fixture(scope="module", params=[Config, official], ids=["default", "official"])
def run(request, zoo, tmp_path_factory):
    """A run's folder."""
    config = request.param(data=str(zoo), **QUICK)
    folder = tmp_path_factory.mktemp("explore")
    train_in_folder(config, open_run(folder / "run", config), load_run_data(config, folder))
    return folder / "run"


@pytest.fixture(scope="module")
def browser():
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page that may reach nothing but localhost, and must log no error."""
    page = browser.new_page(viewport=dict(width=1280, height=1000))
    allowed = ("file:", "data:", "blob:", "http://127.0.0.1", "ws://127.0.0.1")
    faults = []

    def check_request(request):
        if not request.url.startswith(allowed):
            faults.append(request.url)

    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", check_request)
    yield page
    page.close()
    assert faults == []


def decided(ledger, epoch, rules):
    """The decisions (N, K) of an epoch under other rules, by Python."""
    record = ledger.record(epoch)
    return by_instance(record._replace(decision=redecide(ledger, epoch, record, **rules))).decision


# ---- what the front end is given


def test_bundle(run):
    ledger = open_ledger(run)
    poses = find_poses(ledger.config, run, split="train", unannotated=True)
    rows = pick(ledger, poses, 10)
    assert len(set(rows)) == 10 and ledger.labelled[rows].sum() == 1
    made = bundle(ledger, poses, rows)
    array = {
        name: np.frombuffer(base64.b64decode(packed["data"]), packed["dtype"]).reshape(packed["shape"])
        for name, packed in made["arrays"].items()
    }
    assert json.loads(json.dumps(made)) == made
    for e, epoch in enumerate(ledger.epochs):
        record = by_instance(ledger.record(epoch))
        assert np.array_equal(array["decision"][e], record.decision[rows])
        assert np.array_equal(np.isnan(array["loss"][e]), record.label_loss[rows].isnan())
    # positions lie on the crop where they lie in the image
    for n, row in enumerate(rows):
        instance, crop, known = poses.instances[row], made["instances"][n], array["truth_known"][n] > 0
        x, y, w, h = instance.box
        room = 0.15 * max(w, h)
        left, top = max(0, int(x - room)), max(0, int(y - room))
        right = min(instance.width, int(np.ceil(x + w + room)))
        bottom = min(instance.height, int(np.ceil(y + h + room)))
        scale = np.array([crop["width"] / (right - left), crop["height"] / (bottom - top)])
        by_hand = (poses.truth.xy[row] + 0.5 - (left, top)) * scale - 0.5
        assert known.any() and np.allclose(array["truth_xy"][n][known], by_hand[known], atol=1e-2)
    hidden = bundle(ledger, poses, rows, truth=False)
    assert not {"truth_xy", "truth_known", "right", "label_right"} & hidden["arrays"].keys()


def test_no_animal_is_no_page(run):
    with pytest.raises(ValueError, match="animals: expected 1 or more, got 0"):
        report_page(run, most=0)


@pytest.mark.parametrize("x", [-500.0, 5000.0, -20.0])
def test_a_box_that_leaves_the_image(run, x):
    poses = find_poses(open_ledger(run).config, run, split="train")
    beside = replace(poses, instances=(replace(poses.instances[0], box=(x, 10.0, 60.0, 40.0)), *poses.instances[1:]))
    data, (width, height), affine = crop_image(beside, 0)
    assert data.startswith("data:image/jpeg;base64,") and width and height and np.isfinite(affine).all()


@pytest.mark.timing
def test_two_thousand_animals_in_a_moment(run):
    """Moving a slider in a notebook: at most 0.2 s for 2,000 instances."""
    small, n = open_ledger(run), 2000
    times = math.ceil(n / len(small.instances))

    def tile(t):
        return torch.cat([t] * times)[:n]

    class Large(Ledger):
        def record(self, epoch):
            record = Record(*map(tile, by_instance(small.record(epoch))))
            return record._replace(index=torch.arange(n), batch=torch.arange(n) // 16)

    large = Large(
        folder=small.folder,
        config=small.config,
        instances=pd.concat([small.instances] * times, ignore_index=True)[:n],
        names=small.names,
        label_xy=tile(small.label_xy),
        score=tile(small.score),
        has_label=tile(small.has_label),
        epochs=small.epochs,
    )
    widget = Explorer.__new__(Explorer)
    widget._ledger, widget._rows, widget._records = large, torch.arange(n), {}
    super(Explorer, widget).__init__()
    widget._decide()
    seconds = []
    for keep in (0.2, 0.4, 0.6):
        began = time.perf_counter()
        widget.rules = dict(keep=keep, agree_px=1.0, drop=0.5)
        widget._decide()
        seconds.append(time.perf_counter() - began)
    assert min(seconds) <= 0.2


# ---- the page


def test_the_page_decides_as_python_does(run, page):
    ledger = open_ledger(run)
    code = base64.b64encode((ASSETS / "explorer.js").read_bytes()).decode()
    page.goto("about:blank")
    poses = find_poses(ledger.config, run, split="train", unannotated=True)
    run_rules = bundle(ledger, poses, [0])["run_rules"]
    answers = page.evaluate(
        """async ({ code, all, run, rules }) => {
            const { decodeAll, redecide } = await import("data:text/javascript;base64," + code);
            const decoded = decodeAll(all);
            return rules.map((r) => decoded.epochs.map((_, e) => Array.from(redecide(decoded, run, r, e).decision)));
        }""",
        dict(code=code, all=pack_all(ledger, [0]), run=run_rules, rules=RULES),
    )
    for rules, answer in zip(RULES, answers, strict=True):
        for epoch, decision in zip(ledger.epochs, answer, strict=True):
            assert decision == decided(ledger, epoch, rules).flatten().tolist(), (rules, epoch)


def test_the_report(run, page, tmp_path):
    ledger = open_ledger(run)
    html = report_page(run, most=12)
    assert f"scarcenet predict {run.name}" in html  # how to use the network
    assert len(html.encode()) < 15e6 and "http" not in html.replace("http://www.w3.org", "")
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    page.goto(f"file://{tmp_path / 'report.html'}")

    def at(name):
        return page.locator(f"[data-test={name}]")

    at("counts").wait_for()
    # the middle of the image's first pixel is at (0, 0), where `crop_image`'s affine has it
    origins = "all => all.map(i => i.getAttribute('x') + ' ' + i.getAttribute('y'))"
    assert set(page.locator("svg.picture image").evaluate_all(origins)) == {"-0.5 -0.5"}
    not_shown = """all => all
        .filter(i => i.getAttribute('src') && i.loading != 'lazy' && !(i.complete && i.naturalWidth))
        .map(i => i.outerHTML.slice(0, 200))"""
    assert page.locator("img").evaluate_all(not_shown) == []
    assert not at("note").is_visible()
    before = at("counts").inner_text()
    at("agree_px").fill("3")
    page.wait_for_function("before => document.querySelector('[data-test=counts]').innerText != before", arg=before)
    assert at("note").is_visible()
    unlabelled = decided(ledger, ledger.epochs[-1], dict(agree_px=3.0))[~ledger.labelled]
    assert str(int((unlabelled == Decision.REUSABLE).sum())) in at("counts").inner_text().replace(",", "").split()
    # by keyboard: the next animal, the next keypoint, the epoch before, the run's own rules
    page.locator(".scarce").first.focus()
    for key in ("ArrowRight", "ArrowDown", "[", "r"):
        page.keyboard.press(key)
    assert not at("note").is_visible() and at("epoch").input_value() == str(len(ledger.epochs) - 2)
    assert ledger.names[1] in page.locator(".scarce").inner_text()


def test_suggested_animals_are_a_filter(run, page, tmp_path):
    suggested = suggest(run, 3, device="cpu")
    suggested.save(tmp_path / "next")
    (tmp_path / "report.html").write_text(report_page(run, most=10, suggested=tmp_path / "next"), encoding="utf-8")
    page.goto(f"file://{tmp_path / 'report.html'}")
    page.locator("[data-test=suggested]").check()
    assert page.locator("[data-test=matches]").inner_text().split()[0] == str(len(suggested.poses))
    assert "suggested, no. 1: " in page.locator(".scarce").inner_text()


def test_nothing_in_a_name_ends_the_script(run, page, tmp_path):
    """A file name is data, whatever it contains."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    name = "<!--<script></script><img src=x onerror=alert(1)>.jpg"
    table = pq.read_table(folder / "ledger/instances.parquet").to_pandas()
    table["file"] = name
    table.to_parquet(folder / "ledger/instances.parquet")
    (tmp_path / "report.html").write_text(report_page(folder, most=6), encoding="utf-8")
    page.on("dialog", lambda d: pytest.fail("a name was run as a script"))
    page.goto(f"file://{tmp_path / 'report.html'}")
    page.locator("[data-test=counts]").wait_for()
    assert name in page.locator(".scarce").inner_text()


# ---- the widget


def test_the_widget_answers(run):
    ledger, widget = open_ledger(run), explore(run, most=8)
    rows = [i["instance"] for i in widget.bundle["instances"]]
    for rules in RULES:
        for place, epoch in enumerate(ledger.epochs):
            widget.epoch, widget.rules = place, rules
            shown = np.frombuffer(base64.b64decode(widget.decisions["data"]), np.int8).reshape(8, -1)
            assert np.array_equal(shown, decided(ledger, epoch, rules)[rows])
    assert len(repr(widget)) < 200


@pytest.mark.slow
def test_in_jupyterlab(page, tmp_path):
    """The notebook is opened, all its cells that are not slow are run, a slider is moved.

    The decisions change, and nothing is written to stderr.
    """
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install scarcenet[lab]")
    content = json.loads((ROOT / "nbs/ledger/explorer.ipynb").read_text(encoding="utf-8"))

    def left_out(cell):
        return cell["cell_type"] == "code" and re.search(r"#\| slow|showdoc|rmtree\(home\)", "".join(cell["source"]))

    content["cells"] = [
        cell | ({"outputs": []} if cell["cell_type"] == "code" else {})
        for cell in content["cells"]
        if not left_out(cell)
    ]
    (tmp_path / "chapter.ipynb").write_text(json.dumps(content))
    port = 8917
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "PYTHONPATH": str(ROOT),
    }
    flags = f"--no-browser --allow-root --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0".split()
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyterlab",
            *flags,
            "--IdentityProvider.token=tok",
            f"--ServerApp.root_dir={tmp_path}",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
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
        for _ in range(120):  # the page says "idle" before there is a kernel: ask the server
            ready = json.loads(urllib.request.urlopen(kernels).read())
            if ready and ready[0]["connections"] and ready[0]["execution_state"] == "idle":
                break
            time.sleep(0.5)
        page.locator('.lm-MenuBar-itemLabel:text-is("Run")').click()
        page.locator('.lm-Menu-itemLabel:text-is("Run All Cells")').click()
        shown = page.locator(".jp-OutputArea [data-test=counts]").first
        shown.wait_for(timeout=150000)
        done = """() => [...document.querySelectorAll('.jp-OutputArea-output')]
            .some(output => output.textContent.includes('decided again'))"""
        page.wait_for_function(done, timeout=150000)
        before = shown.inner_text()
        slider = page.locator(".jp-OutputArea [data-test=agree_px]").first
        slider.click(position=dict(x=5, y=5))  # the left end ...
        for _ in range(3):
            page.keyboard.press("ArrowRight")  # ... and three steps from it
        changed = "before => document.querySelector('.jp-OutputArea [data-test=counts]').innerText != before"
        page.wait_for_function(changed, arg=before, timeout=30000)
        assert page.locator('.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
        if keep := os.environ.get("SCARCENET_SCREENSHOTS"):
            page.screenshot(path=str(Path(keep) / "jupyterlab.png"))
        page.goto("about:blank")  # before the server ends, which the page would log as an error
    finally:
        server.terminate()
        server.wait(20)
