"""A browser and a JupyterLab for the tests of the explorers; both are skipped where they are not installed."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()


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
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(ROOT), "JUPYTERLAB_SETTINGS_DIR": str(top / "settings")}
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
