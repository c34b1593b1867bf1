"""`make demo`: the command line of the pipeline module, run as a newcomer runs it."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from animatediff_lit import pipeline
from animatediff_lit.pipeline import NANO, check_settings, demo_prompts, main
from animatediff_lit.video import BACKGROUNDS, COLOURS, MOTIONS, SHAPES
from measure import ROOT


def command(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "animatediff_lit.pipeline", *args], cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_prompts_cover_the_world():
    words = " ".join(demo_prompts())
    assert all(w in words for w in (*COLOURS, *SHAPES, *BACKGROUNDS)) and len(demo_prompts()) == len(MOTIONS) == len(set(demo_prompts()))
    for prompt, motion in zip(demo_prompts(), MOTIONS): assert motion in prompt
    assert not any("circle spinning" in p for p in demo_prompts())


def test_demo(tmp_path):
    done = command("--steps", "4", "--out", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    gifs = sorted((tmp_path / "demo").glob("*.gif"))
    assert len(gifs) == len(MOTIONS) and sorted(p.name for p in tmp_path.joinpath("demo").iterdir()) == sorted([*(g.name for g in gifs), "contact_sheet.png"])
    for gif, prompt in zip(gifs, demo_prompts()):
        with Image.open(gif) as picture: assert picture.n_frames > 1 and picture.info.get("loop") == 0
        assert gif.stem.endswith(prompt.replace(" ", "-")[:60])
    with Image.open(tmp_path / "demo" / "contact_sheet.png") as sheet: assert sheet.width > 600 and sheet.height > 64 * len(MOTIONS) / 2
    assert "contact_sheet.png" in done.stdout.strip().splitlines()[-1] and done.stdout.strip().splitlines()[-1].startswith("Open ")
    total, bars = 4 * len(MOTIONS), [line for line in done.stderr.splitlines() if line.strip()]
    assert f"{total}/{total}" in bars[-1] and all(f"/{total} [" in line for line in bars), "stderr should hold one progress bar and nothing else"


def test_own_prompt(tmp_path):
    done = command("--prompt=a blue star spinning clockwise", "--steps=4", "--seed=7", "--guidance=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    gifs = sorted((tmp_path / "demo").glob("*.gif"))
    assert [re.findall(r"-seed-(\d+)$", g.stem) for g in gifs] == [["10"], ["7"], ["8"], ["9"]]
    assert len({g.read_bytes() for g in gifs}) == 4


def test_noise_on_the_way_is_for_nano(tmp_path, monkeypatch):
    "Other models may have a scheduler without it, and the released ones are asked without."
    asked = []
    monkeypatch.setattr(pipeline, "check_settings", lambda scheduler, steps, guidance, eta, *rest: asked.append(eta) or check_settings(scheduler, 0, guidance, eta, *rest))
    for more in ([], ["--model", str(NANO)], ["--model", str(NANO), "--eta", "0.5"]): assert main(["--out", str(tmp_path / "demo"), *more]) == 2
    assert asked == [1, 0, 0.5] and not list(tmp_path.iterdir())


def test_unknown_word(tmp_path):
    done = command("--prompt", "a blue dragon spinning clockwise", cwd=tmp_path)
    assert done.returncode == 2 and "dragon" in done.stderr and "circle" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("args, says", [(["--prompt", ""], "The prompt is empty"), (["--steps", "0"], "num_inference_steps is 0"), (["--guidance", "nan"], "guidance_scale is nan"),
                                        (["--prompt", "a red star", "--seed", "-1"], "seed is -1"), (["--model", "./nowhere"], "There is no folder"), (["--out", "a file"], "is a file")], ids=str)
def test_bad_arguments(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("mine")
    assert main(args) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.strip().splitlines()) == 1 and [p.name for p in tmp_path.iterdir()] == ["a file"]


def test_no_such_option(capsys):
    with pytest.raises(SystemExit) as end: main(["--promt", "a red star"])
    assert end.value.code == 2 and "--prompt" in capsys.readouterr().err
