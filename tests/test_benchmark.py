"""The benchmark: the same weights on both sides, no time without the same outputs, and a table and files that hold all that was asked for."""
from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from animatediff_lit import benchmark as bench
from animatediff_lit.benchmark import HEAD, LIMITS, RECORD, SUBJECTS, Request, benchmark, calls, distance, imports, main, measure, prepare, random_unet, table, twin
from animatediff_lit.speed import FastUNet, network

TINY = Request("tiny", frames=2)
QUICK: dict[str, Any] = dict(subjects=["tiny"], frames=[1, 3], modes=["eager"], rounds=2, memory=False, threads=1)


def corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    "From here on diffusers' UNet gets a bias of its own."
    def changed(unet):
        theirs = twin(unet)
        theirs.conv_out.bias = torch.nn.Parameter(theirs.conv_out.bias + 0.05)
        return theirs
    monkeypatch.setattr(bench, "twin", changed)


# ---- the same weights, the same outputs
@pytest.mark.parametrize("subject", ["tiny", "nano"])
def test_both_sides_share_their_memory(subject):
    ours = random_unet(subject)
    mine, yours = ours.state_dict(), twin(ours).state_dict()
    assert mine.keys() == yours.keys()
    for name in mine: assert mine[name].data_ptr() == yours[name].data_ptr() and mine[name].isfinite().all() and (mine[name] != 0).all(), name


def test_the_structures_fit_without_their_weights():
    "The full sizes, on the meta device: names, shapes, and nothing computed."
    for subject in ("middle", "sd15"):
        ours = bench.on_meta(subject)
        assert twin(ours).conv_out.weight.shape == ours.conv_out.weight.shape and ours.config.motion_norm == "all_frames"
    assert SUBJECTS["sd15"].pixels == 256 and ours.conv_in.weight.shape == (320, 4, 3, 3)


@pytest.mark.parametrize("request_", [Request("tiny", 1), Request("tiny", 5), Request("tiny", 3, pixels=64), Request("nano", 3, steps=3)], ids=str)
def test_outputs_agree(request_):
    found = {name: run() for name, run in calls(request_).items()}
    assert distance(found["ours"], found["diffusers"]) <= LIMITS["float32"]
    if request_.subject == "nano": assert [t.dtype for t in found["ours"]] == [torch.float32, torch.uint8] == [t.dtype for t in found["diffusers"]]
    assert found["ours"][0].shape == (1, 4, request_.frames, *[(request_.pixels or 32) // 8 * (2 if request_.subject == "nano" else 1)] * 2)
    assert found["ours"][0].std() > 0.1


@pytest.mark.parametrize("part", ["conv_in", "mid_block.motion_modules.0.proj_out", "up_blocks.1.attentions.0.proj_out"])
def test_every_part_reaches_the_output(part):
    "With random weights nothing is switched off, so a fault anywhere would show."
    ours = random_unet("tiny")
    theirs = twin(ours)
    layer = theirs.get_submodule(part)
    layer.bias = torch.nn.Parameter(layer.bias + 0.05)
    (noisy, t, text), _ = bench.example_inputs(ours, 2, 4, 4)
    with torch.no_grad(): apart = distance([ours(noisy, t, text)], [theirs(noisy, t, text.repeat_interleave(2, 0)).sample])
    assert apart > 10 * LIMITS["float32"]


def test_distance():
    x = torch.tensor([1.0, -2.0, 4.0])
    assert distance([x], [x]) == 0 and distance([x + 0.4], [x]) == pytest.approx(0.1) == distance([x - 0.4], [x])
    assert distance([x, x + 4], [x, x]) == 1 and distance([100 * x + 40], [100 * x]) == pytest.approx(0.1)
    one, other = torch.tensor([200, 10], dtype=torch.uint8), torch.tensor([199, 11], dtype=torch.uint8)
    assert distance([one], [other]) == 0 and distance([one], [torch.tensor([200, 12], dtype=torch.uint8)]) == 1 / 200
    for a, b in (([x[:1]], [x]), ([x, x], [x]), ([x * math.nan], [x]), ([x], [x * math.nan]), ([0 * x], [0 * x])): assert math.isnan(distance(a, b))


# ---- rows
def test_a_row():
    row = measure(TINY, rounds=3, memory=False)
    assert row["status"] == "same" and 0 <= row["difference"] <= row["limit"] == 1e-4
    assert {name: len(s) for name, s in row["seconds"].items()} == {"ours": 3, "diffusers": 3}
    middle, least, most = row["time"]
    turns = [a / b for a, b in zip(row["seconds"]["ours"], row["seconds"]["diffusers"])]
    assert (least, most) == (min(turns), max(turns)) and least <= middle <= most and middle in turns


def test_a_row_apart():
    "Each side in a process of its own, and one that fails says so."
    row = measure(TINY, rounds=2, memory=False, apart=True)
    assert row["apart"] and [len(s) for s in row["seconds"].values()] == [2, 2] and min(map(min, row["seconds"].values())) > 0
    assert "| eager, apart |" in table({"rows": [row], "machine": {}})
    broken = Request("tiny", frames=2)
    object.__setattr__(broken, "subject", "giant")
    with bench.two_processes(broken) as runs, pytest.raises(RuntimeError, match="The process of ours has ended"): runs["ours"]()


def test_a_wrong_side_fails(monkeypatch, tmp_path, capsys):
    "It gets no time, the others do, and the exit status says so."
    corrupt(monkeypatch)
    row = measure(TINY, memory=False)
    assert row["status"] == "FAIL" and row["difference"] > 1e-3 and "seconds" not in row and "time" not in row
    assert main(["--subjects", "tiny", "--frames", "2", "--modes", "eager", "--no-memory", "--out", str(tmp_path)]) == 1
    assert "FAIL" in capsys.readouterr().out and "| FAIL" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "benchmark.json").read_text())["rows"][0]["status"] == "FAIL"


def test_nan_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "calls", lambda request: {name: lambda: (torch.tensor([math.nan]),) for name in ("ours", "diffusers")})
    row = benchmark(**QUICK, out=tmp_path)["rows"][0]
    assert row["status"] == "FAIL" and row["difference"] is None and "NaN" not in (tmp_path / "benchmark.json").read_text()


def test_what_cannot_be_compiled_says_why(monkeypatch):
    "That is no failure; the same error elsewhere is one."
    def broken(request): raise RuntimeError("No compiler here.\nA long story.")
    monkeypatch.setattr(bench, "calls", broken)
    row = measure(Request("tiny", 2, "compiled"))
    assert row["status"] == "not run" and row["reason"] == "No compiler here." and "No compiler here." in table({"rows": [row], "machine": {}})
    with pytest.raises(RuntimeError, match="No compiler"): measure(TINY)


@pytest.mark.parametrize("mode, ours, theirs", [("eager", False, False), ("optimised", False, False), ("compiled", True, True), ("ours compiled", True, False)])
def test_who_is_compiled(mode, ours, theirs):
    unet = random_unet("tiny")
    other = twin(unet)
    ready = prepare(unet, other, mode)
    assert isinstance(ready, FastUNet) == (mode != "eager") and (getattr(ready, "run", network) is not network) == ours and (other._compiled_call_impl is not None) == theirs


def test_imports(monkeypatch):
    started = []
    monkeypatch.setattr(bench.subprocess, "run", lambda command, check: started.append(command[-1]))
    row = imports(rounds=2)
    assert started == ["import animatediff_lit.pipeline", "import torch"] * 3 and len(row["seconds"]["torch"]) == 2
    assert "1.3" in table({"rows": [row], "machine": {}})


# ---- memory
def test_memory_of_a_call():
    "A call that makes 80 MB and gives them back, in a fresh process: an old one may have that much lying about."
    code = """
import json, torch
from animatediff_lit.benchmark import call_memory
from animatediff_lit.memory import check_memory_usage
found = call_memory(lambda: (torch.ones(10_000_000) + 1).sum())
print(json.dumps(found | check_memory_usage("cpu", show=False)))
"""
    found = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 70e6 < found["call"] < 120e6 and abs(found["held"] - found["used"]) < 40e6


def test_memory_alone():
    "In a process of its own, where each side holds the weights and needs something for the call."
    row = bench.memory_of(Request("tiny", frames=32, pixels=128))
    assert set(row["bytes"]) == {"ours", "diffusers"} and row["memory"] == row["bytes"]["ours"]["call"] / row["bytes"]["diffusers"]["call"]
    assert all(1e8 < side["held"] and 1e4 < side["call"] < 1e8 for side in row["bytes"].values())


def test_a_child_that_fails_gives_a_reason(monkeypatch):
    monkeypatch.setattr(bench.sys, "executable", "false")
    assert bench.memory_of(TINY) == {"reason": "The memory of ours could not be measured: exit status 1"}


# ---- table, files, command
def test_table_and_files_hold_every_row(tmp_path, capsys):
    before = torch.get_num_threads()
    record = benchmark(**QUICK, out=tmp_path / "new" / "folder")
    assert torch.get_num_threads() == before
    assert [(row["subject"], row["frames"], row["mode"]) for row in record["rows"]] == [("tiny", 1, "eager"), ("tiny", 3, "eager")]
    assert {"torch", "diffusers", "threads", "device", "cores", "date"} <= set(record["machine"])
    written = json.loads((tmp_path / "new" / "folder" / "benchmark.json").read_text())
    assert written == json.loads(json.dumps(record)) and {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {"benchmark.json", "table.md"}
    lines = (tmp_path / "new" / "folder" / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 2 + 2 and all(line.count("|") == len(HEAD) + 1 for line in lines[:4]) and len(capsys.readouterr().out.splitlines()) == 2


def test_files_are_written_after_every_row(monkeypatch, tmp_path):
    "What was measured is there although the next row breaks, and no half file."
    real, seen = bench.measure, []
    def second_breaks(request, *rest):
        seen.append(request)
        if len(seen) == 2: raise KeyboardInterrupt
        return real(request, *rest)
    monkeypatch.setattr(bench, "measure", second_breaks)
    with pytest.raises(KeyboardInterrupt): benchmark(**QUICK, out=tmp_path)
    assert len(json.loads((tmp_path / "benchmark.json").read_text())["rows"]) == 1 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("options, says", [
    (["--subjects", "giant"], "subject is 'giant': give nano, middle, sd15 or tiny."),
    (["--modes", "fast"], "mode is 'fast': give eager, optimised, compiled or ours compiled."),
    (["--frames", "33"], "frames is 33: give a whole number from 1 to 32."),
    (["--rounds", "0"], "rounds is 0: give a whole number, at least 1."),
    (["--steps", "0"], "steps is 0: give a whole number from 1 to 1000."),
    (["--threads", "0"], "threads is 0: give a whole number, at least 1."),
    (["--pixels", "100"], "pixels is 100: give a multiple of 64."),
    (["--apart", "--clock", "cpu"], "clock is 'cpu': give wall with apart, for the seconds of other processes are not counted here."),
    (["--dtype", "int8"], "dtype is 'int8': give float32, float16 or bfloat16."),
    (["--device", "tpu"], "device is 'tpu': give cpu or cuda."),
])
def test_bad_options(options, says, tmp_path, capsys):
    assert main(["--subjects", "tiny", "--out", str(tmp_path / "out"), *options]) == 2
    assert capsys.readouterr().err == says + "\n" and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert main(["--subjects", "tiny", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "device is 'cuda': give cpu, for this PyTorch sees no GPU.\n"


def test_a_place_where_nothing_can_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["--subjects", "tiny", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'file'} is a file: give a folder for the table.\n" and (tmp_path / "file").read_text() == "mine"


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "animatediff_lit.benchmark", "--subjects", "tiny", "--frames", "1", "--modes", "eager", "--rounds", "1", "--no-memory", "--threads", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(bench.__file__).parents[1])}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny  1  eager  same") and (tmp_path / "benchmark" / "benchmark.json").exists()


# ---- the record that ships
def test_the_record():
    "Every row has the same outputs, and its ratios follow from what was measured."
    record = json.loads(RECORD.read_text())
    assert record["rows"] and re.fullmatch(r"\d{4}-\d\d-\d\d", record["machine"]["date"])
    for row in record["rows"]:
        assert row["subject"] == "import" or row["status"] == "not run" or row["status"] == "same" and row["difference"] <= row["limit"]
        if "time" in row: assert row["time"] == pytest.approx(bench.ratio(row["seconds"], "ours", "torch" if row["subject"] == "import" else "diffusers"))
        if "memory" in row: assert row["memory"] == row["bytes"]["ours"]["call"] / row["bytes"]["diffusers"]["call"]
