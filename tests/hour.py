"""The hour again: trains nano from nothing in two processes, judges 330 clips, and writes it into weights/hour.json, which chapter 10 shows, before the earlier ones.

    python tests/hour.py OUT       an hour of two cores, and a quarter of one to judge; OUT is a folder that does not exist
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure import ROOT

sys.path.insert(0, str(ROOT))
from animatediff_lit.benchmark import machine
from animatediff_lit.levers import HUGE_PAGES, latents_of, train_stills, wrong_shapes
from animatediff_lit.pipeline import NANO, AnimationPipeline
from animatediff_lit.video import write_whole

COMMAND = "-m torch.distributed.run --standalone --nproc-per-node 2 -m animatediff_lit.training --out"


def python(*words: str | Path) -> float:
    "Runs Python with these words; the seconds it took."
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | HUGE_PAGES)
    return time.perf_counter() - start


def mistakes(rows: list[dict]) -> list[dict[str, str]]:
    return [{key: row[key] for key in ("asked", "read")} for row in rows if not row["all three"]]


def looked_into(folder: str | Path, options: dict) -> dict[str, dict]:
    "The image model alone, and the latents, of a pipeline's folder."
    torch.set_num_threads(1)
    pipe = AnimationPipeline.from_pretrained(folder)
    return {"stills": wrong_shapes(pipe, **options), "latents": latents_of(pipe)}


def short_stage(folder: str | Path) -> dict:
    "How many stills a short stage 1 gets right in a folder's latents: chapter 10's question to an autoencoder."
    torch.set_num_threads(1)
    short = train_stills(folder)
    return {key: short[key] for key in ("recipe", "right", "n")}


def record(out: Path) -> dict:
    "Trains and judges; the `whole` run of hour.json."
    seconds = python(*COMMAND.split(), out / "nano")
    python("-m", "animatediff_lit.evaluation", "--model", out / "nano", "--out", out / "evaluation")
    log = json.loads((out / "nano" / "training.json").read_text())
    judged = json.loads((out / "evaluation" / "evaluation.json").read_text())
    parts = {name: {key: rows[-1][key] for key in ("step", "seconds")} for name, rows in log["history"].items()}
    return {"command": f"python {COMMAND}", "machine": machine("cpu", 1, "wall"), "seconds": seconds, "parts": parts, "recipes": log["recipes"],
            "options": judged["options"], "summary": judged["summary"]["model"], "wrong": mistakes(judged["rows"]),
            "short stage 1": short_stage(out / "nano")} | looked_into(out / "nano", judged["options"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=lambda name: Path(name).absolute(), help="a new folder for the run")
    out = parser.parse_args().out
    if out.exists(): parser.error(f"{out} is there already, and its time would not count: give a new folder.")
    file, new = NANO.parent / "hour.json", record(out)
    old = json.loads(file.read_text())
    before = old["whole"] | {"name": f"the hour of {old['whole']['machine']['date']}"}
    write_whole(file, (json.dumps({"whole": new, "earlier": [*old["earlier"], before], "shipped": looked_into("nano", new["options"])}, indent=1) + "\n").encode())
