"What chapter 10b does not show of the short trainings that each take one decision back."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from animatediff_lit import levers
from animatediff_lit.evaluation import STRAIGHT
from animatediff_lit.levers import (IMAGES, LEVERS, MOTION, RECORD, Lever, base_for, draw_both, last_steps, lever_table, made_latents, main, moves, paces,
                                    run_levers, train_lever, way_gone)
from animatediff_lit.pipeline import AnimationPipeline
from animatediff_lit.training import CLIPS_BIAS, LatentClips, encode_scenes
from animatediff_lit.video import Video, draw_scenes, read_clip

OPPOSITE = dict(zip(STRAIGHT, (STRAIGHT[1], STRAIGHT[0], STRAIGHT[3], STRAIGHT[2])))


@pytest.mark.parametrize("scene", moves(8, 0, cues=False), ids=lambda s: s.motion)
def test_without_cues_a_clip_backwards_is_the_opposite_move(scene):
    other = replace(scene, motion=OPPOSITE[scene.motion])
    assert np.abs(scene.render().astype(int) - other.render()[::-1]).max() <= 1
    assert read_clip(scene.render()).motion == scene.motion
    assert way_gone(other.render(), scene) == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize("scene", moves(8, 0), ids=lambda s: s.motion)
def test_with_cues_the_middle_frame_leans_where_the_move_goes(scene):
    path = scene.path(np.array([7.0]))[:2, 0]
    towards = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[scene.motion.split()[1]]
    assert path @ towards > 0.05
    assert way_gone(replace(scene, travel=scene.travel / 2).render(), scene) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("lever", [Lever(), Lever(cues=False), Lever(context=True)])
def test_stage_1_is_repeated_only_where_the_stills_are_others(lever, tmp_path):
    nano = AnimationPipeline.from_pretrained("nano")
    data = encode_scenes(nano, moves(4, 1, lever.cues), frames=8)
    pipe = base_for(lever, nano, data, tmp_path, replace(IMAGES, steps=2, batch=4, warmup=1, ema=0.5))
    same = {n: torch.equal(w, nano.unet.state_dict()[n]) for n, w in pipe.unet.state_dict().items() if "motion_modules" not in n}
    assert all(same.values()) == lever.cues
    assert all(("motion_modules" in n) == p.requires_grad for n, p in pipe.unet.named_parameters())
    assert any(".context." in n for n, _ in pipe.unet.named_parameters()) == lever.context


def test_the_context_reaches_the_motion_modules():
    few = dict(clips=8, n=1, motion=replace(MOTION, steps=4, warmup=1, log_every=1))
    one, two = (train_lever(Lever(context=c), None, **few)["history"][-1]["loss"] for c in (False, True))
    assert one != two and one == pytest.approx(two, rel=0.2)


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch):
    asked = []
    run = dict(rise={"500": 0.1, "700": 0.2, "850": 0.3}, gone=[0.5, 1.0], motion=[True, False], seconds=60)
    monkeypatch.setattr(levers, "train_lever", lambda lever, out, seed: asked.append((lever, seed)) or run)
    names = list(LEVERS)[:2]
    run_levers(tmp_path, names[:1])
    record = run_levers(tmp_path, names, seeds=2)
    assert asked == [(LEVERS[names[0]], 0), (LEVERS[names[1]], 0), (LEVERS[names[0]], 1), (LEVERS[names[1]], 1)]
    assert list(record) == names and all(len(runs) == 2 for runs in record.values())
    row = lever_table(record).splitlines()[2]
    assert row.startswith(f"| {names[0]} | +10% | +20% | +30% | 0.75 (") and "| 50% (" in row and row.endswith("| 1.0 |")


def test_the_command_line_keeps_the_paces_of_an_earlier_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(levers, "run_levers", lambda *args: {})
    monkeypatch.setattr(levers, "paces", lambda: {"images": 1})
    monkeypatch.setattr(levers, "huge_page_shares", lambda: {"images": 2})
    main(["--out", str(tmp_path), "--paces"])
    main(["--out", str(tmp_path)])
    assert json.loads((tmp_path / RECORD.name).read_text()) == {"levers": {}, "paces": {"images": 1}, "huge pages": {"images": 2}}
    for wrong in (["--seeds", "0"], ["--only", "more data"]):
        with pytest.raises(SystemExit): main(["--out", str(tmp_path), *wrong])
    assert "more data" in capsys.readouterr().err


def test_a_pace_is_a_share_of_the_plain_one():
    threads = torch.get_num_threads()
    found = paces(1, ("plain", "channels-last"), passes=1)
    assert torch.get_num_threads() == threads and list(found) == ["images", "motion"]
    assert all(ways["plain"]["share"] == [1, 1, 1] and 0.1 < ways["channels-last"]["share"][0] < 10 for ways in found.values())


def test_the_record_holds_every_lever():
    record = json.loads(RECORD.read_text())
    parts = [record[part] for part in ("levers", "timesteps", "muon")]
    assert list(parts[0] | parts[1] | parts[2]) == list(LEVERS) and set(record["paces"]) == set(record["huge pages"]) == {"images", "motion"}
    assert all(run["n"] == 330 and run["history"][-1]["step"] == run["recipe"]["steps"] == 2000 for run in record["stills"])
    for name, runs in (item for part in parts for item in part.items()):
        for run in runs: assert Lever(**run["lever"]) == LEVERS[name] and len(run["gone"]) == len(run["motion"]) == len(record["levers"]["as nano"][0]["gone"])


def test_every_second_clip_leans_to_the_noise():
    data = LatentClips(torch.randn(3, 4, 2, 2, 2), torch.zeros(3, 5, dtype=torch.long), torch.randn(1, 4, 8))
    drawn = draw_both(data)(torch.Generator().manual_seed(0), 10_000)
    noisy, clear = drawn["t"].float().div(1000).reshape(-1, 2).mean(0)
    assert noisy == pytest.approx(1 / (1 + CLIPS_BIAS), abs=0.02) and clear == pytest.approx(1 / 3, abs=0.02)
    assert {k: len(v) for k, v in drawn.items()} == dict.fromkeys(("clean", "noise", "t", "text"), 10_000)
    with pytest.raises(ValueError, match="5 clips has no two halves"): draw_both(data)(torch.Generator(), 5)


def test_the_last_steps_begin_at_the_clip_and_stray_with_their_number():
    nano, scenes = AnimationPipeline.from_pretrained("nano"), draw_scenes(3, seed=5)
    clean = encode_scenes(nano, scenes).latents.float()
    away = [(last_steps(nano, scenes, n, torch.Generator().manual_seed(0)) - clean).square().mean().item() for n in (1, 4, 25)]
    assert away[0] < away[1] < away[2] and away[0] < 0.02 < 0.2 < away[2]


def test_made_latents_are_those_of_their_scenes(monkeypatch):
    asked = []
    monkeypatch.setattr(levers, "last_steps", lambda pipe, scenes, steps, g: asked.append((len(scenes), steps)) or torch.zeros(len(scenes), 1))
    assert made_latents(None, draw_scenes(30, seed=5), most=3).shape == (30, 1)
    assert asked == [(8, 1), (8, 2), (8, 3), (6, 1)]


@pytest.mark.parametrize("changed, wrong", [({}, {}), ({"star": "circle", "moon": "square"}, {"star": 5, "moon": 4})])
def test_wrong_shapes_are_those_that_were_not_asked_for(monkeypatch, changed, wrong):
    def switches(pipe): return [m.enabled for m in pipe.unet.modules() if hasattr(m, "enabled")]
    def generate(pipe, scenes, **options):
        assert not any(switches(pipe)) and options == {"batch": 66, "video_length": 1, "eta": 1}
        return [Video(replace(s, shape=changed.get(s.shape, s.shape), motion="standing still").render(1), caption=s.caption) for s in scenes]
    monkeypatch.setattr(levers, "generate", generate)
    nano = AnimationPipeline.from_pretrained("nano")
    assert levers.wrong_shapes(nano, 26, eta=1) == wrong and all(switches(nano)) and switches(nano)
