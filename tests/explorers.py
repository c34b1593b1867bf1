"""What the tests of both explorers share: a browser, a page without a network, and a JupyterLab; skipped where they are not installed."""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import animatediff_lit

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()


def sentence(act, kind=ValueError) -> str:
    "What `act` refuses with: one sentence."
    with pytest.raises(kind) as caught: act()
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    return text


class Lab(NamedTuple):
    "A running JupyterLab: its address, and the folder that it shows."
    url: str
    folder: Path


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the tests in a browser need the package playwright")
    if CHROMIUM is None: pytest.skip("no chromium on the path")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    "JupyterLab with settings of its own, which keeps all cells on the page."
    pytest.importorskip("jupyterlab", reason="the tests of the widgets need jupyterlab")
    top = tmp_path_factory.mktemp("lab")
    settings = top / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(Path(animatediff_lit.__file__).parent.parent), "JUPYTERLAB_SETTINGS_DIR": str(top / "settings")}
    env |= {name: str(top / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    options = "--no-browser --allow-root --expose-app-in-browser --ip=127.0.0.1 --port=0 --IdentityProvider.token=testtoken".split()
    with open(top / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={top}"], env=env, cwd=top, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        for _ in range(480):
            found = re.search(r"http://127\.0\.0\.1:\d+", (top / "log").read_text())
            if found or server.poll() is not None: break
            time.sleep(0.25)
        assert found, (top / "log").read_text()[-2000:]
        yield Lab(found[0], top)
    finally:
        server.terminate()
        server.wait(20)


@contextmanager
def offline_page(browser, file: Path, ready: str, timeout: int) -> Iterator:
    "A file in the browser, the network off, once `ready` is there; nothing may be in the console in the end."
    context = browser.new_context(viewport={"width": 1180, "height": 1000}, offline=True)
    page, wrong = context.new_page(), []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.set_default_timeout(timeout)
    page.goto(file.as_uri())
    page.wait_for_selector(ready)
    yield page
    context.close()
    assert not wrong, wrong


@contextmanager
def lab_page(browser, lab: Lab, cells: Sequence[str], height: int, timeout: int) -> Iterator:
    "A new notebook of these cells in JupyterLab, its kernel ready; it may ask for nothing outside, and no error may be in the console in the end."
    code = [dict(cell_type="code", id=f"cell{n}", metadata={}, source=source, outputs=[], execution_count=None) for n, source in enumerate(cells)]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    (lab.folder / "explorer.ipynb").write_text(json.dumps(dict(cells=code, metadata=kernel, nbformat=4, nbformat_minor=5)))
    context = browser.new_context(viewport={"width": 1400, "height": height})
    page, wrong, outside = context.new_page(), [], []
    page.set_default_timeout(timeout)
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    context.route(lambda url: not url.startswith((lab.url, "data:", "blob:")), lambda route: (outside.append(route.request.url), route.abort()))
    page.goto(f"{lab.url}/doc/tree/explorer.ipynb?token=testtoken&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=max(timeout, 60_000))
    page.evaluate("async () => { const w = jupyterapp.shell.currentWidget; await w.context.ready; await w.sessionContext.ready; await w.sessionContext.session.kernel.info }")
    yield page
    context.close()
    assert not outside, f"the browser asked for {outside}"
    assert not wrong, wrong


def run_cell(page, cell: int) -> None:
    page.evaluate("i => { jupyterapp.shell.currentWidget.content.activeCellIndex = i; window.ran = null; jupyterapp.commands.execute('notebook:run-cell').then(() => window.ran = true) }", cell)
    page.wait_for_function("window.ran")
