"""The judge: right about real clips, not fooled by impostors, and its intervals and files are what they say."""
from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

from animatediff_lit.evaluation import (NanoCLIP, alignment, evaluate, flicker, generate, grid, judge, lines, load_clip, main, movement, summary, table,
                                        through_autoencoder, wilson)
from animatediff_lit.pipeline import AnimationPipeline
from animatediff_lit.video import COLOURS, MOTIONS, SHAPES, Scene, Video, held_out


@pytest.fixture(scope="module")
def nano() -> AnimationPipeline:
    return AnimationPipeline.from_pretrained("nano")


@pytest.fixture(scope="module")
def real() -> list[dict]:
    return [judge(s, s.render()) for s in grid(66)]


def test_the_grid_covers_everything():
    scenes = grid(330)
    for kind, words in (("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS)):
        counts = Counter(getattr(s, kind) for s in scenes)
        assert set(counts) == set(words) and max(counts.values()) - min(counts.values()) <= 1
    assert len({(s.colour, s.shape, s.motion) for s in scenes}) == 330 and {(s.motion, s.background) for s in scenes} == {(m, b) for m in MOTIONS for b in ("dark", "light")}
    assert 0.18 < np.mean([held_out(s.colour, s.shape, s.motion) for s in scenes]) < 0.22
    assert scenes[:7] == grid(7)
    with pytest.raises(ValueError, match="^0 scenes cannot be judged"): grid(0)


def test_real_clips_are_right(real):
    found = summary(real)
    assert all(found[line][0] >= 0.97 for line in ("colour", "shape", "background", "motion", "all three", "straight moves")), found
    assert found["standing still"][0] == 1 and sum(r["seen"] for r in real) == len(lines(real)["all three, seen in training"])


@pytest.mark.parametrize("change", [dict(colour="cyan"), dict(shape="moon"), dict(motion="moving right")])
def test_what_is_wrong_is_wrong(change):
    asked = Scene("red", "star", "moving left", "dark")
    row = judge(asked, Scene(**{**dict(colour="red", shape="star", motion="moving left", background="dark"), **change}).render())
    (kind,) = change
    assert not row[kind] and not row["all three"] and all(row[k] for k in {"colour", "shape", "motion", "background"} - {kind})


def test_flicker_sees_the_look_and_not_the_motion():
    still = Scene("red", "heart", "standing still", "dark").render()
    assert flicker(still) < 1e-3                                        # not 0: the turns are compared in Fourier space, in float32
    moved = np.stack([np.roll(f, (i % 5 - 2, i % 3 - 1), (0, 1)) for i, f in enumerate(still)])
    assert flicker(moved) < 0.01
    other = np.concatenate([still[:1], Scene("red", "square", "standing still", "dark").render()[:1]] * 8)
    recoloured = np.concatenate([still[:1], (still[:1] * 0.7).astype(np.uint8)] * 8)
    real = max(flicker(Scene("red", "heart", motion, "dark").render()) for motion in MOTIONS)
    assert 0 < 2 * real < min(flicker(other), flicker(recoloured))
    with pytest.raises(ValueError, match="only one"): flicker(still[:1])


def test_movement():
    sizes = {m: movement(Scene("blue", "square", m, "light", angle=0.1).render()) for m in ("standing still", "growing", "bouncing")}
    assert sizes["standing still"] == 0 < sizes["growing"] < sizes["bouncing"]
    assert movement(np.concatenate([Scene("blue", "square", "moving left", "light").render()[[0]], Scene("blue", "square", "moving left", "light").render()[[-1]]])) > 0.5


@pytest.mark.parametrize("right, n, low, high", [(5, 10, 0.2366, 0.7634), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (27, 30, 0.7438, 0.9654), (0, 0, 0, 1)])
def test_wilson(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=2e-4)


def test_table_has_a_line_for_everything(real):
    text = table({"a": summary(real), "b": summary(real[:11])}).splitlines()
    assert text[0] == "| | a | b |" and all(row.count("|") == 4 for row in text)
    assert {m for m in MOTIONS} <= {row.split("|")[1].strip() for row in text} and any("flicker" in row for row in text)


def test_clips_follow_from_their_place_in_the_list(nano):
    scenes = grid(4)
    whole = generate(nano, scenes, num_inference_steps=2, guidance_scale=3)
    parts = generate(nano, scenes, batch=3, num_inference_steps=2, guidance_scale=3)
    assert [v.caption for v in whole] == [s.caption for s in scenes]
    assert max(np.abs(a.frames.astype(int) - b.frames).max() for a, b in zip(whole, parts)) <= 1


def test_the_autoencoder_is_no_excuse(nano):
    scenes = grid(22)
    rows = [judge(s, v.frames) for s, v in zip(scenes, through_autoencoder(nano, [Video(s.render()) for s in scenes]))]
    assert np.mean([r["all three"] for r in rows]) >= 0.95


def test_clip_prefers_the_right_caption(nano):
    scenes = grid(66)
    cosines = alignment(load_clip(nano), nano.tokenizer, [s.caption for s in scenes], [s.render() for s in scenes])
    assert cosines.shape == (66, 66) and (cosines.argmax(1) == torch.arange(66)).float().mean() > 0.8
    assert isinstance(load_clip(nano), NanoCLIP) and cosines.abs().max() <= 1 + 1e-5


def test_everything_is_written(nano, tmp_path):
    columns = evaluate(nano, tmp_path / "new" / "folder", n=3, num_inference_steps=2)
    written = json.loads((tmp_path / "new" / "folder" / "evaluation.json").read_text())
    assert written["summary"] == columns and len(written["rows"]) == 3 and written["options"] == {"num_inference_steps": 2}
    assert set(columns) == {"model", "real clips", "through the autoencoder"} and "alignment" not in columns["model"]
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {"evaluation.json", "table.md", "sheet.png", "moving.apng"}


def test_a_wrong_model_is_named(tmp_path):
    with pytest.raises((ValueError, OSError), match="no-such-model"): main(["--model", str(tmp_path / "no-such-model"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
