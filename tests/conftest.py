"""What all tests share: an offline environment, and the closing table of what each notebook took."""
import os
import subprocess
import sys

import pytest
import torch

from measure import ROOT

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

COSTS = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[COSTS] = []


@pytest.fixture
def run_in_two(tmp_path):
    "Runs a script with an `accelerator` in two processes, with `out` as its argument. The test itself has one thread as well: with two, sums are added in another order."
    def run(script: str, out) -> None:
        (tmp_path / "two.py").write_text(script + "accelerator.wait_for_everyone()\naccelerator.end_training()\n")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "two.py"), str(out)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def costs(request) -> list:
    "The `measure.Cost` of every notebook that ran; a test adds to it, the closing table shows it."
    return request.config.stash[COSTS]


def pytest_report_teststatus(report, config):
    "A notebook gets a line of its own where other tests get a dot."
    where, _, chapter = report.nodeid.rstrip("]").partition("[")
    if where.endswith("test_notebooks.py::test_runs") and report.when == "call":
        return report.outcome, f"\n  {chapter}.ipynb {report.outcome}", report.outcome.upper()


def pytest_terminal_summary(terminalreporter, config):
    costs = config.stash[COSTS]
    if not costs: return
    terminalreporter.section("what each notebook took")
    terminalreporter.write_line(f"{'notebook':<22}{'':<8}{'seconds':>8}{'CPU seconds':>13}{'peak MB':>9}")
    for c in costs:
        terminalreporter.write_line(f"{c.chapter:<22}{'passed' if c.passed else 'FAILED':<8}{c.seconds:>8.1f}{c.cpu_seconds:>13.1f}{c.peak_mb:>9.0f}")
    count = f"{sum(c.passed for c in costs)} of {len(costs)} notebooks"
    terminalreporter.write_line(f"{count:<22}{'passed':<8}{sum(c.seconds for c in costs):>8.1f}")
