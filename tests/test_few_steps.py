"""Four steps: the loss is its definition, a perfect student has none, and the shipped student is nano's and says what it says."""
from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from animatediff_lit.debugging import fingerprint
from animatediff_lit.diffusion import NoiseSchedule
from animatediff_lit.evaluation import grid, judge, summary, table
from animatediff_lit.few_steps import FOUR_STEPS, RECIPE, Segments, consistency_loss, distil, distil_nano, four_step_pipeline, jump, main, nano_path, paired
from animatediff_lit.pipeline import NANO, AnimationPipeline, denoise, draw_noise, guide
from animatediff_lit.training import LatentClips, Recipe, add_delta, nano_schedule, nano_scheduler

SCHEDULE = nano_schedule()
BLANK = torch.zeros(1, 1, 1)


def always(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    "The denoiser of a world in which a caption, one number, is the clip: its paths do not bend."
    signal, amount = SCHEDULE.coefficients(t, x)
    clean = text[..., None, None].expand_as(x)
    return SCHEDULE.target(clean, (x - signal * clean) / amount, t)


def bent(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return torch.sin(2 * x + t.reshape(-1, 1, 1, 1, 1) / 300 + text[..., None, None])


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Parameter(torch.randn(4, 1, 1, 1)), nn.Parameter(torch.randn(4, 1, 1, 1))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return torch.tanh(self.a * x + self.b * bent(x, t, text))


def inputs(n: int = 12, last: int = 12) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, n, 4, 3, 2, 2, generator=g)
    return dict(clean=clean, noise=noise, t=torch.arange(n) % last, text=torch.randn(n, 1, 1, generator=g))


def data() -> LatentClips:
    g = torch.Generator().manual_seed(0)
    return LatentClips(torch.randn(12, 4, 3, 2, 2, generator=g), torch.randint(6, (12, 5), generator=g), torch.randn(6, 1, 1, generator=g))


def test_a_jump_is_a_ddim_step_and_no_turn_is_nothing():
    path = Segments(SCHEDULE, 4, 3)
    x, v = torch.randn(2, 13, 4, 3, 2, 2)
    assert torch.equal(jump(v, x, torch.zeros(13)), x)
    for i in range(12):
        at, to = torch.full((13,), i), torch.full((13,), i + 1)
        want = SCHEDULE.ddim_step(v, x, int(path.times[i]), int(path.times[i + 1]))
        assert torch.allclose(jump(v, x, path.turn(at, to)), want, atol=2e-6)


@pytest.mark.parametrize("steps, per", [(1, 1), (4, 3), (2, 4), (8, 2)])
def test_segments_end_where_the_scheduler_stops(steps, per):
    path, scheduler = Segments(SCHEDULE, steps, per), nano_scheduler()
    assert isinstance(scheduler, DDIMScheduler)
    scheduler.set_timesteps(steps)
    assert path.stops == scheduler.timesteps.tolist() and path.times[-1] == -1 and path.angles[-1] == 0
    places = torch.arange(steps * per)
    assert path.end(places).tolist() == [per * (i // per + 1) for i in range(steps * per)]
    assert path.turn(places, places + 1).min() > 0 and path.turn(places, places + 1).sum() < math.pi / 2


@pytest.mark.parametrize("steps, per, bend", [(4, 3, 1.5), (4, 1, 2.0), (2, 4, 1.2)])
def test_bent_segments_share_the_turn_better_and_an_euler_walk_jumps_along_them(steps, per, bend):
    path, even = Segments(SCHEDULE, steps, per, bend), Segments(SCHEDULE, steps, per)
    assert path.times[0] == 999 and path.times[-1] == -1 and (path.times.diff() < 0).all() and (path.times[1:-1] < even.times[1:-1]).all()
    ends = torch.arange(0, steps * per + 1, per)
    assert path.turn(ends[:-1], ends[1:]).max() < even.turn(ends[:-1], ends[1:]).max()
    x, text = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.randn(2, 1, 1)
    got = denoise(Tiny(), EulerDiscreteScheduler.from_config(nano_scheduler().config), x, text, steps=path.stops)
    for i in ends[:-1]: x = jump(path.ask(Tiny(), x, i[None], text), x, path.turn(i[None], i[None] + per))
    assert torch.allclose(got, x, atol=2e-4)


@pytest.mark.parametrize("steps, per, walk", [(4, 3, 1), (4, 3, 3), (1, 12, 4), (2, 4, 2)])
def test_a_perfect_student_has_no_loss_and_a_teacher_without_guidance_another(steps, per, walk):
    rules, x = dict(teacher=always, blank=BLANK, path=Segments(SCHEDULE, steps, per), walk=walk), inputs(last=steps * per // walk)
    def guided(noisy: Tensor, t: Tensor, text: Tensor) -> Tensor: return always(noisy, t, 3 * text)
    loss, by_step = consistency_loss(guided, **x, **rules, scale=3.0)
    assert loss < 1e-8 and set(by_step) == {f"step {s + 1}" for s in range(steps)}
    assert consistency_loss(always, **x, **rules, scale=1.0)[0] < 1e-8 and consistency_loss(always, **x, **rules, scale=3.0)[0] > 1e-3


@pytest.mark.parametrize("walk", [1, 3])
def test_the_loss_is_its_definition(walk):
    path, x, student = Segments(SCHEDULE, 4, 3), inputs(last=12 // walk), Tiny()
    def leap(model, z, a, b, text):
        out = guide(model(z, a[None], BLANK), model(z, a[None], text), 2.0) if model is bent else model(z, a[None].clamp(min=0), text)
        return SCHEDULE.ddim_step(out, z, int(a), int(b)) if a != b else z
    errors = []
    for b in range(12):
        i, text = int(x["t"][b]) * walk, x["text"][[b]]
        end = path.times[(i // 3 + 1) * 3]
        start = z = SCHEDULE.add_noise(x["clean"][[b]], x["noise"][[b]], int(path.times[i]))
        for j in range(i, i + walk): z = leap(bent, z, path.times[j], path.times[j + 1], text)
        target = leap(student, z, path.times[i + walk], end, text).detach()
        apart = leap(student, start, path.times[i], end, text) - target
        errors.append(apart.square().mean() / path.turn(torch.tensor(i), path.end(torch.tensor(i))).sin())
    wanted = torch.autograd.grad(torch.stack(errors).mean(), list(student.parameters()))
    loss, by_step = consistency_loss(student, **x, teacher=bent, blank=BLANK, path=path, walk=walk)
    assert torch.allclose(loss, torch.stack(errors).mean(), rtol=1e-4)
    got = torch.autograd.grad(loss, list(student.parameters()))                      # a target with gradients gives others
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(got, wanted))
    steps = (x["t"] * walk) // 3
    for s in range(4): assert by_step[f"step {s + 1}"] == pytest.approx(torch.stack(errors)[steps == s].mean().item(), rel=1e-3)


@pytest.mark.parametrize("walk", [1, 3])
def test_a_kill_changes_no_bit_and_the_teacher_stays(walk, tmp_path):
    recipe, teacher = Recipe(steps=6, batch=4, warmup=2, save_every=2), Tiny()
    whole, killed, resumed = Tiny(), Tiny(), Tiny()
    options = dict(path=Segments(SCHEDULE, 4, 3), walk=walk, teacher=teacher)
    distil(whole, data(), BLANK, recipe, **options)
    distil(killed, data(), BLANK, recipe, **options, checkpoint=tmp_path / "x.ckpt", until=3)
    log = distil(resumed, data(), BLANK, recipe, **options, checkpoint=tmp_path / "x.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters())) and log[-1]["step"] == 6
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(teacher.parameters(), Tiny().parameters()))
    assert not torch.equal(whole.a, teacher.a)
    alone = Tiny()
    distil(alone, data(), BLANK, recipe, Segments(SCHEDULE, 4, 3), walk)                # its own copy teaches
    assert torch.equal(alone.a, whole.a)


TWO = """
import sys, torch
from accelerate import Accelerator
sys.path.insert(0, "tests")
from test_few_steps import *
student = Tiny()
distil(student, data(), BLANK, Recipe(steps=4, batch=4, warmup=1, ema=0.5), Segments(SCHEDULE), 1, accelerator=(accelerator := Accelerator(cpu=True)))
assert accelerator.num_processes == 2
if accelerator.is_main_process: torch.save(student.state_dict(), sys.argv[1])
"""


def test_two_processes_end_where_one_does(run_in_two, tmp_path):
    run_in_two(TWO, tmp_path / "two.pt")
    one, two = Tiny(), torch.load(tmp_path / "two.pt", weights_only=True)
    distil(one, data(), BLANK, Recipe(steps=4, batch=4, warmup=1, ema=0.5), Segments(SCHEDULE), 1)
    assert all(torch.allclose(p, two[n], atol=1e-6) and not torch.equal(p, Tiny().state_dict()[n]) for n, p in one.state_dict().items())


def test_what_cannot_work_is_one_sentence():
    with pytest.raises(ValueError, match="predicts 'epsilon', and a jump needs 'v_prediction'"): Segments(NoiseSchedule())
    with pytest.raises(ValueError, match="0 steps with 3.*at least 1"): Segments(SCHEDULE, 0, 3)
    with pytest.raises(ValueError, match="more steps|1 to 1000|sampling steps"): Segments(SCHEDULE, 400, 3)
    with pytest.raises(ValueError, match="With a bend of 9.0 some of the 12 timesteps are the same"): Segments(SCHEDULE, bend=9.0)
    with pytest.raises(ValueError, match="A walk of 2 does not divide the 3 steps"): distil(Tiny(), data(), BLANK, Recipe(steps=1, batch=1), walk=2)


@pytest.mark.parametrize("words", [["--steps", "0"], ["--batch", "x"], ["--clips", "-1"], ["--judge"]])
def test_a_wrong_command_is_refused(words, tmp_path, capsys):
    with pytest.raises(SystemExit): main(["--out", str(tmp_path / "x"), *words])
    assert "error:" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_pairs():
    rows = [judge(s, s.render()) | {"alignment": 0.5} for s in grid(22)]
    worse = copy.deepcopy(rows)
    worse[3]["motion"], worse[4]["flicker"] = not rows[3]["motion"], rows[4]["flicker"] + 2.2
    found = paired(worse, rows)
    assert found["motion"][0] == pytest.approx(-1 / 22, abs=1e-4) and found["motion"][1] < found["motion"][0] < found["motion"][2]
    assert found["flicker"][0] == pytest.approx(0.1) and found["shape"][0] == 0 and found["shape"][1] == -found["shape"][2] < 0    # no difference is not certainty


def test_the_smallest_run_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "four"
    main(["--out", str(out), "--steps", "1", "--batch", "1", "--clips", "2"])
    main(["--out", str(out), "--clips", "1", "--judge"])
    record = json.loads((out / "four_steps.json").read_text())
    assert record["recipe"]["steps"] == 1 and record["judged"] == 1 and set(record["time"]) == set(record["more"]) and 0 < record["time"]["4 steps, student"][0] < 0.5
    assert set(record["summary"]) == {"25 steps", "4 steps, student", "4 steps, nano", "4 even steps, nano"} and "| 25 steps |" in capsys.readouterr().out
    again = distil_nano(out, replace(RECIPE, steps=1, batch=1), clips=2)                 # finished already: nothing but the file is made anew
    small, nano = load_file(out / "four_steps.safetensors"), AnimationPipeline.from_pretrained("nano").unet.state_dict()
    assert all(torch.equal(p, nano[n]) or torch.equal(small[n], (p - nano[n]).half()) for n, p in again.unet.state_dict().items())


# ---- the shipped student
def test_the_shipped_student_is_of_the_shipped_nano():
    record, delta = json.loads(FOUR_STEPS.with_suffix(".json").read_text()), load_file(FOUR_STEPS)
    pipe = AnimationPipeline.from_pretrained("nano")
    nano = copy.deepcopy(pipe.unet.state_dict())
    assert record["nano"] == fingerprint(*nano.values()), "nano has changed: distil it again with python -m animatediff_lit.few_steps"
    kept = json.loads((NANO / "evaluation_eta_0.json").read_text())
    assert record["summary"]["25 steps"] == summary(kept["rows"][:record["judged"]]), "nano was judged again: judge the student again"
    assert table(record["summary"]) in (FOUR_STEPS.parent / "README.md").read_text(encoding="utf-8"), "the model card has another table than the record"
    assert FOUR_STEPS.stat().st_size < 4e6 and all(d.dtype == torch.float16 for d in delta.values())
    add_delta(pipe.unet, FOUR_STEPS)
    for n, p in pipe.unet.state_dict().items(): assert torch.equal(p, nano[n] + delta[n]) if n in delta else torch.equal(p, nano[n]), n


@torch.no_grad()
def test_the_shipped_student_lands_nearer_with_as_many_passes():
    nano, fast, stops = AnimationPipeline.from_pretrained("nano"), four_step_pipeline(), nano_path().stops
    noise = draw_noise([torch.Generator().manual_seed(77)], (4, 16, 8, 8))
    text, blank = nano.encode_prompt("a green moon moving up"), nano.encode_prompt("")
    aim = denoise(nano.unet, nano.scheduler, noise, text, blank, 25, 2.0)
    away = [(denoise(unet, fast.scheduler, noise, text, steps=stops) - aim).square().mean().item() for unet in (fast.unet, nano.unet)]
    assert away[0] < away[1], away
