"""Runs chapters as the tests do, and writes into each card what the chapter costs.

    python tests/measure.py                        every chapter
    python tests/measure.py nbs/01_video.ipynb     this one
    python tests/measure.py --save ...             the outputs of this run go into the notebook as well

The card has one line that ends in `<!-- measured -->` and, behind it, what this program writes there:
`CPU 12 s · peak 640 MB (2 cores, 2026-11-22)`. CPU seconds are those of all cores together, and of helper processes; the
peak is the resident memory of the notebook's own process, in 10^6 bytes. A line within a quarter of the new measurement
stays as it is, so that measuring again changes nothing. A chapter that fails is left untouched.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
CELL_LIMIT = 120  # seconds that one cell may take
NOTEBOOK_LIMIT = 600  # seconds after which a whole notebook is stopped
RESULT = "\nMEASURED "

MARK = "<!-- measured -->"
MARK_TEXT = re.compile(MARK + r' CPU (\d+) s · peak (\d+) MB \((\d+) cores?, \d{4}-\d\d-\d\d\)$')


@dataclass
class Cost:
    "What one run of one chapter took."
    chapter: str
    passed: bool
    seconds: float
    cpu_seconds: float
    peak_mb: float
    log: str


def chapters() -> list[Path]:
    "All chapter notebooks, in reading order."
    return sorted(p for p in NBS.glob("*.ipynb") if p.name[0] not in "._")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stay_offline(event: str, args: tuple) -> None:
    "An audit hook: a chapter reaches no other machine."
    if event == "socket.getaddrinfo": host = args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple): host = args[1][0]
    else: return
    host = host.decode() if isinstance(host, bytes) else host
    if host and host not in ("localhost", "::1") and not host.startswith("127."):
        raise OSError(f"A chapter runs offline, and this one tried to reach {host}: mark the cell with `#| eval: false`.")


def peak_bytes() -> int:
    "Peak resident memory of this process. Linux's `ru_maxrss` would include the parent's, so `/proc` comes first."
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found: return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_here(notebook: Path) -> None:
    "Run `notebook` in this process with nbdev-test's rules, save its outputs into it, print what it took, and exit."
    from nbdev.config import get_config
    from nbdev.test import test_nb
    sys.addaudithook(stay_offline)
    passed, _ = test_nb(notebook, skip_flags=get_config(ROOT).tst_flags.split(), basepath=ROOT, save=True, cell_timeout=CELL_LIMIT)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(u.ru_utime + u.ru_stime for u in used)
    sys.stderr.flush()
    os.write(1, (RESULT + json.dumps({"cpu_seconds": cpu, "peak_mb": peak_bytes() / 1e6})).encode())  # a stuck cell may hold sys.stdout
    os._exit(0 if passed else 1)  # at once: a cell stopped at its limit may still hold a thread


def run(notebook: Path, folder: Path, **environment: str) -> tuple[Cost, Path]:
    """Run a copy of `notebook` in a fresh process and an otherwise empty `folder`, as a reader on Colab would.

    Returns what it took and the copy, which holds the outputs of this run if it passed."""
    copy = Path(shutil.copy(notebook, folder))
    env = {**os.environ, "IN_TEST": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / ".huggingface"), "IPYTHONDIR": str(folder / ".ipython"),
           "CUDA_VISIBLE_DEVICES": "", **environment}
    start = time.monotonic()
    try:
        done = subprocess.run([sys.executable, __file__, "--here", str(copy)], cwd=folder, env=env, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=NOTEBOOK_LIMIT)
        log, passed = done.stdout, done.returncode == 0
    except subprocess.TimeoutExpired as e:
        out = e.stdout or b""
        log = (out if isinstance(out, str) else out.decode(errors="replace")) + f"\nStopped: {notebook.name} took more than {NOTEBOOK_LIMIT} s."
        passed = False
    log, _, result = log.partition(RESULT)
    numbers = json.loads(result.splitlines()[0]) if result else {"cpu_seconds": float("nan"), "peak_mb": float("nan")}
    return Cost(notebook.stem, passed and bool(result), time.monotonic() - start, **numbers, log=log.strip()), copy


def replace_file(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def clean_json(notebook: Path) -> str:
    "The text of `notebook` as `nbdev-clean` would write it."
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    from fastcore.nbio import loads, nb2str
    nb, cfg = loads(notebook.read_text(encoding="utf-8")), get_config(ROOT)
    clean_nb(nb, allowed_out_metadata_keys=cfg.allowed_out_metadata_keys)
    return nb2str(nb)


def spots(text: str) -> list[str]:
    "The marks in the text of a notebook file, each with what stands behind it on its line."
    return re.findall(re.escape(MARK) + r'[^"\\]*', text)


def mark(text: str, cost: Cost) -> str:
    "`text` of a notebook file with the measured line of `cost`; unchanged where the old one is within a quarter."
    (spot,) = spots(text)
    cpu, peak = max(1, round(cost.cpu_seconds)), 10 * max(1, round(cost.peak_mb / 10))
    old = MARK_TEXT.match(spot)
    if old and int(old[3]) == cores() and all(abs(int(o) - n) <= max(1, n / 4) for o, n in zip(old.groups(), (cpu, peak))): return text
    number = f"{cores()} core{'s' * (cores() > 1)}"
    return text.replace(spot, f"{MARK} CPU {cpu} s · peak {peak} MB ({number}, {date.today()})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="chapters to measure (all)")
    parser.add_argument("--save", action="store_true", help="write this run's outputs into the notebooks, cleaned")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here: run_here(args.here)
    failed, notebooks = 0, args.notebooks or chapters()
    for notebook in notebooks:
        if not notebook.is_file():
            parser.error(f"{notebook} is no notebook: give paths such as nbs/01_video.ipynb, or none for all chapters.")
        if len(spots(notebook.read_text(encoding="utf-8"))) != 1:
            parser.error(f"{notebook} needs {MARK} exactly once, at the end of a line of its card.")
    for notebook in notebooks:
        print(f"{notebook.name} ... ", end="", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            cost, copy = run(notebook, Path(folder))
            if cost.passed:
                old = notebook.read_text(encoding="utf-8")
                new = mark(clean_json(copy) if args.save else old, cost)
                if new != old: replace_file(notebook, new)
                print(f"{cost.seconds:.1f} s, CPU {cost.cpu_seconds:.1f} s, peak {cost.peak_mb:.0f} MB, {'written' if new != old else 'unchanged'}")
            else:
                failed += 1
                print(f"FAILED\n{cost.log}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
