"Noise schedules and the DDIM step against diffusers, golden numbers, and what bad input is told."
from __future__ import annotations

import inspect
import warnings
from fractions import Fraction

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

from animatediff_lit.diffusion import PREDICTIONS, ForwardProcess, NoiseSchedule, make_betas, timestep_grid

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")
VIDEO = (3, 4, 5, 6, 7)  # b c f h w


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(**config) -> DDIMScheduler:
    return DDIMScheduler(**{"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "steps_offset": 1, **config})


# ---- golden numbers
@pytest.mark.parametrize("schedule, end, at_500, at_999, largest_sigma", [
    ("linear", 0.012, 0.1608, 0.001579, 25.1), ("scaled_linear", 0.012, 0.2763, 0.00466, 14.6), ("scaled_linear", 0.020, 0.1689, 0.00023, 65.9)])
def test_golden_tables(schedule, end, at_500, at_999, largest_sigma):
    abar = NoiseSchedule(schedule, end=end).alphas_cumprod.double()
    digits = len(str(f"{at_999:f}".rstrip("0"))) - 2
    assert round(abar[500].item(), 4) == at_500 and round(abar[999].item(), digits) == at_999
    assert round(((1 - abar[999]) / abar[999]).sqrt().item(), 1) == largest_sigma


def test_default_is_animatediff_and_not_diffusers_linear():
    assert torch.equal(NoiseSchedule().alphas_cumprod, reference().alphas_cumprod)
    assert not torch.allclose(NoiseSchedule().alphas_cumprod, DDIMScheduler(beta_schedule="linear").alphas_cumprod, rtol=0.1)


def test_golden_timesteps():
    schedule = NoiseSchedule()
    assert schedule.ddim_timesteps(25) == list(range(961, 0, -40))
    assert schedule.ddim_timesteps(25, "linspace")[:3] == [999, 957, 916] and schedule.ddim_timesteps(25, "linspace")[-2:] == [42, 0]
    assert schedule.ddim_timesteps(25, "trailing")[::24] == [999, 39]


# ---- parity
@pytest.mark.parametrize("steps", [1, 10, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_are_equal(schedule, steps):
    theirs = reference(beta_schedule=schedule, num_train_timesteps=steps)
    assert torch.equal(make_betas(schedule, steps=steps), theirs.betas)
    assert torch.equal(ForwardProcess(schedule, steps=steps).alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_and_velocity(schedule):
    theirs, (clean, noise) = reference(beta_schedule=schedule, prediction_type="v_prediction"), randn(2, *VIDEO)
    ours = NoiseSchedule.from_scheduler(theirs)
    for t in (torch.tensor([0, 500, 999]), torch.tensor([7])):
        torch.testing.assert_close(ours.add_noise(clean, noise, t), theirs.add_noise(clean, noise, t), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(ours.target(clean, noise, t), theirs.get_velocity(clean, noise, t), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 7, 25, 50, 999])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_ddim_step(schedule, prediction, spacing, n):
    "At five places of each run, both ways to end it; diffusers steps by `steps // n`, whatever its grid does."
    for to_one in (True, False):
        theirs = reference(beta_schedule=schedule, prediction_type=prediction, timestep_spacing=spacing, set_alpha_to_one=to_one)
        theirs.set_timesteps(n)
        ours, grid = NoiseSchedule.from_scheduler(theirs), theirs.timesteps.tolist()
        for t in {grid[i * (n - 1) // 4] for i in range(5)}:
            noisy, output = randn(2, *VIDEO, seed=t)
            t_next = t - 1000 // n if t >= 1000 // n else (-1 if to_one else 0)
            expected = theirs.step(output, t, noisy)
            scale = max(1.0, expected.prev_sample.abs().max().item())
            torch.testing.assert_close(ours.ddim_step(output, noisy, t, t_next) / scale, expected.prev_sample / scale, atol=1e-6, rtol=1e-5)
            clean, _ = ours.split(output, noisy, t)
            scale = max(1.0, clean.abs().max().item())
            torch.testing.assert_close(clean / scale, expected.pred_original_sample / scale, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_grids_are_equal(spacing):
    theirs = reference(timestep_spacing=spacing)
    for n in range(1, 1000):
        theirs.set_timesteps(n)
        assert timestep_grid(1000, n, spacing) == theirs.timesteps.tolist(), n


def test_trailing_grid():
    """Equal to diffusers' wherever that is well defined.

    It computes `arange(1000, 0, -1000 / n)` in floating point: for some n that yields n + 1 entries, and exact halves are
    rounded by accident. Ours has n entries, each the nearest whole number."""
    theirs, compared = reference(timestep_spacing="trailing"), 0
    for n in range(1, 1001):
        theirs.set_timesteps(n)
        grid, exact = timestep_grid(1000, n, "trailing"), [1000 - Fraction(1000 * i, n) - 1 for i in range(n)]
        assert len(grid) == n and grid[0] == 999 and all(abs(t - e) <= Fraction(1, 2) for t, e in zip(grid, exact))
        assert all(a > b for a, b in zip(grid, grid[1:])) and grid[-1] >= 0
        if len(theirs.timesteps) == n and all(e.denominator != 2 for e in exact):
            assert grid == theirs.timesteps.tolist(), n
            compared += 1
    assert compared > 800


def schedulers_with_a_table() -> list[type]:
    "All of diffusers' schedulers that can be made from nothing and have `alphas_cumprod`."
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(n for n in dir(diffusers.schedulers) if n.endswith("Scheduler")):
            try:
                kind = getattr(diffusers.schedulers, name)
                if inspect.isclass(kind) and hasattr(kind(), "alphas_cumprod"): found.append(kind)
            except Exception: continue  # one that needs arguments, or a package that is not installed
    return found


TABLED = schedulers_with_a_table()


def test_there_are_many_schedulers():
    assert len(TABLED) >= 12 and DDIMScheduler in TABLED


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, about diffusers
@pytest.mark.parametrize("kind", TABLED, ids=lambda k: k.__name__)
def test_from_any_scheduler(kind):
    scheduler = kind()
    ours = NoiseSchedule.from_scheduler(scheduler)
    assert ours.prediction == scheduler.config.get("prediction_type", "epsilon")  # RePaint knows nothing else
    torch.testing.assert_close(ours.alphas_cumprod, scheduler.alphas_cumprod.float(), rtol=0, atol=0)
    ours.alphas_cumprod.zero_()
    assert scheduler.alphas_cumprod.abs().max() > 0, "from_scheduler must copy the table"


# ---- properties
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_split_undoes_target(schedule, prediction):
    ours = NoiseSchedule(schedule, prediction=prediction)
    clean, noise = randn(2, *VIDEO).double()
    t = torch.tensor([0, 500, 998])
    split = ours.split(ours.target(clean, noise, t), ours.add_noise(clean, noise, t), t)
    torch.testing.assert_close(split, (clean, noise), atol=1e-4, rtol=1e-4)


def test_signal_and_noise_keep_unit_variance():
    signal, amount = NoiseSchedule().coefficients(torch.arange(1000), torch.zeros(1000, 2, 2))
    assert signal.shape == (1000, 1, 1)
    torch.testing.assert_close(signal ** 2 + amount ** 2, torch.ones(1000, 1, 1))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_keeps_the_dtype(dtype, tolerance):
    "And the factors are rounded once, at the end: at t = 0 the noise is 3 %, which half precision of 1 - abar would get wrong."
    clean, noise = randn(2, *VIDEO)
    exact = NoiseSchedule().add_noise(clean, noise, 0)
    result = NoiseSchedule().add_noise(clean.to(dtype), noise.to(dtype), 0)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), exact, atol=tolerance, rtol=tolerance)
    _, amount = NoiseSchedule().coefficients(0, clean.to(dtype))
    assert abs(amount.item() / 0.00085 ** 0.5 - 1) < 4e-3


def test_a_timestep_for_each_sample_is_a_batch_of_single_ones():
    ours, (clean, noise), t = NoiseSchedule(prediction="v_prediction"), randn(2, *VIDEO), torch.tensor([3, 600, 999])
    for method in (ours.add_noise, ours.target, lambda a, b, t: ours.split(a, b, t)[0]):
        single = torch.cat([method(clean[i:i + 1], noise[i:i + 1], int(t[i])) for i in range(3)])
        torch.testing.assert_close(method(clean, noise, t), single, atol=0, rtol=0)


# ---- bad input: one sentence each
VIDEOS = torch.zeros(VIDEO)


@pytest.mark.parametrize("error, message, call", [
    (ValueError, "'cosine' is not a schedule", lambda: NoiseSchedule("cosine")),
    (ValueError, "from 0.00085 to 12", lambda: NoiseSchedule(end=12)),
    (ValueError, "0 steps", lambda: NoiseSchedule(steps=0)),
    (ValueError, "'flow' is not something a model predicts", lambda: NoiseSchedule(prediction="flow")),
    (ValueError, "'flow_prediction' is not something", lambda: NoiseSchedule.from_scheduler(reference(prediction_type="flow_prediction"))),
    (TypeError, "FlowMatchEulerDiscreteScheduler has no table", lambda: NoiseSchedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler())),
    (ValueError, "timesteps 0 to 999; asked for 1000", lambda: NoiseSchedule().add_noise(VIDEOS, VIDEOS, 1000)),
    (ValueError, "timesteps 0 to 999; asked for -1", lambda: NoiseSchedule().target(VIDEOS, VIDEOS, -1)),
    (ValueError, "2 timesteps for 3 samples", lambda: NoiseSchedule().add_noise(VIDEOS, VIDEOS, torch.tensor([1, 2]))),
    (TypeError, "whole numbers", lambda: NoiseSchedule().split(VIDEOS, VIDEOS, torch.tensor(10.5))),
    (ValueError, "every frame needs noise of its own", lambda: NoiseSchedule().add_noise(VIDEOS, VIDEOS[:, :, :1], 10)),
    (ValueError, "1001 sampling steps from a schedule of 1000", lambda: NoiseSchedule().ddim_timesteps(1001)),
    (ValueError, "0 sampling steps", lambda: NoiseSchedule().ddim_timesteps(0)),
    (ValueError, "use fewer steps or offset 0", lambda: NoiseSchedule().ddim_timesteps(1000)),
    (ValueError, "'even' is not a spacing", lambda: NoiseSchedule().ddim_timesteps(10, "even")),
])
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message) as caught: call()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
