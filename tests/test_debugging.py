"""Every broken setup is found under its own name, no healthy one is accused, and the gradient and NaN tools name the layer."""
from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from animatediff_lit.debugging import (FAULTS, MUTANTS, GradientTable, Setup, all_finite, check_gradients, diagnose, example_inputs, fingerprint,
                                       gradient_figure, nonfinite, random_setup, reroll)
from animatediff_lit.latents import nano_autoencoder
from animatediff_lit.motion import MotionModule
from animatediff_lit.pipeline import AnimationPipeline
from animatediff_lit.spatial import SpatialTransformer
from animatediff_lit.temporal import MemoryEfficientAttention, TemporalAttention
from animatediff_lit.unet import UNet3DConditionModel


def small_unet(seed: int = 0, **options) -> UNet3DConditionModel:
    torch.manual_seed(seed)
    small = dict(block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8, num_attention_heads=2, motion_num_attention_heads=2,
                 down_block_types=("CrossAttnDownBlockMotion",) * 2, up_block_types=("CrossAttnUpBlockMotion",) * 2)
    return UNet3DConditionModel(**small | options)


@pytest.fixture(scope="module")
def sound() -> Setup:
    torch.manual_seed(0)
    return Setup(small_unet(), new=True, vae=nano_autoencoder())


# ---- the diagnosis
def test_the_sound_setup_is_healthy(sound):
    assert diagnose(sound) == {}


def test_there_is_a_mutant_and_a_sentence_for_each_fault():
    assert len(MUTANTS) >= 12 and MUTANTS.keys() | {"text ignored"} == FAULTS.keys()
    assert all(text.endswith(".") and text.count(". ") == 0 for text in FAULTS.values())


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mutant_keeps_the_shape_and_is_found_under_its_name(sound, name):
    mutant = MUTANTS[name](sound)
    with torch.no_grad(): out = mutant.unet(*(x.float() for x in example_inputs(mutant.unet)))
    assert out.shape == example_inputs(mutant.unet)[0].shape and out.isfinite().all()
    found = diagnose(mutant)
    assert list(found) == [name] and found[name].endswith(FAULTS[name])


IN_THE_NETWORK = [name for name in MUTANTS if MUTANTS[name].__qualname__.startswith("edited") and name != "no zero-init"]


@pytest.mark.parametrize("name", IN_THE_NETWORK)
def test_trained_weights_hide_no_mutant(name):
    "Another UNet, with weights as after training, another norm; the answer names a layer."
    unet = small_unet(1, motion_norm="v1", use_linear_projection=True)
    unet.load_state_dict(reroll(unet, 3).state_dict())
    found = diagnose(MUTANTS[name](Setup(unet)))
    assert list(found) == [name] and not found[name].startswith(("sampling", "training"))


def test_a_layer_without_text_is_found():
    class Deaf(SpatialTransformer):
        def forward(self, x, text): return super().forward(x, torch.zeros_like(text))
    unet = small_unet()
    [m for m in unet.modules() if isinstance(m, SpatialTransformer)][0].__class__ = Deaf
    assert list(diagnose(unet)) == ["text ignored"]


def test_division_by_the_whole_width_is_no_substitute_for_the_root_of_a_head():
    class WholeWidth(TemporalAttention):
        def attend(self, q, k, v): return (q @ k.mT / math.sqrt(q.shape[1] * q.shape[-1])).softmax(-1) @ v
    unet = small_unet()
    [m for m in unet.modules() if isinstance(m, TemporalAttention)][0].__class__ = WholeWidth
    assert list(diagnose(unet)) == ["no √d"]


def test_two_faults_far_apart_are_both_found(sound):
    both = MUTANTS["guidance reversed"](MUTANTS["position in the residual"](sound))
    assert set(diagnose(both)) == {"guidance reversed", "position in the residual"}


@pytest.mark.parametrize("seeds", [range(n, n + 10) for n in range(0, 50, 10)], ids=lambda r: f"{r.start}-{r.stop - 1}")
def test_no_healthy_configuration_is_accused(seeds):
    accused = {seed: found for seed in seeds if (found := diagnose(random_setup(seed)))}
    assert not accused


def test_random_setups_differ_in_what_they_choose():
    configs = [random_setup(seed) for seed in range(20)]
    for name in ("motion_norm", "block_out_channels", "use_motion_mid_block", "motion_num_attention_heads"):
        assert len({getattr(s.unet.config, name) for s in configs}) > 1, name
    assert {s.new for s in configs} == {True, False} and len({type(s.scheduler) for s in configs}) > 2


def test_nano_and_memory_efficient_attention_are_healthy():
    pipe = AnimationPipeline.from_pretrained("nano")
    for m in pipe.unet.modules():
        if type(m) is TemporalAttention: m.__class__, m.tile = MemoryEfficientAttention, 2
    before = fingerprint(*pipe.unet.state_dict().values())
    assert diagnose(pipe) == {}
    assert fingerprint(*pipe.unet.state_dict().values()) == before            # examined, not touched


def test_new_is_only_asked_when_promised():
    trained = small_unet()
    trained.load_state_dict(reroll(trained).state_dict())
    assert diagnose(Setup(trained)) == {} and list(diagnose(Setup(trained, new=True))) == ["no zero-init"]


@pytest.mark.parametrize("wrong, error, words", [
    ("a UNet", TypeError, "this is a str"), (nn.Linear(2, 2), TypeError, "this is a Linear"),
    (small_unet(motion_max_seq_length=2), ValueError, "fewer than 3 frames"),
    (replace(Setup(small_unet()), unet=None), TypeError, "this is a NoneType")])
def test_diagnose_refuses_in_one_sentence(wrong, error, words):
    with pytest.raises(error, match=words) as caught: diagnose(wrong)
    assert "\n" not in str(caught.value)


def test_diagnose_refuses_nan_weights():
    unet = small_unet()
    with torch.no_grad(): unet.conv_in.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="The weight conv_in.weight has NaN or infinity"): diagnose(unet)


# ---- gradients
def rows(factor: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    for p in model[0].parameters(): p.grad *= factor
    return model


@pytest.mark.parametrize("factor, flag", [(1.0, ""), (1e-9, "vanishing"), (0.0, "vanishing"), (1e6, "exploding"), (math.nan, "NaN or Inf"), (math.inf, "NaN or Inf")])
def test_flags_by_size(factor, flag):
    assert [r.flag for r in check_gradients(rows(factor), show=False)] == [flag, ""]


def test_mean_maximum_and_ratio_are_those_of_the_layer():
    model = rows()
    row = check_gradients(model, show=False)[0]
    grad, weight = (torch.cat([t.flatten() for t in ts]) for ts in zip(*[(p.grad, p.detach()) for p in model[0].parameters()]))
    assert row.mean == pytest.approx(grad.abs().mean().item()) and row.max == pytest.approx(grad.abs().max().item())
    assert row.ratio == pytest.approx((grad.norm() / weight.norm()).item())


def test_flags_absent_and_frozen():
    model = rows()
    model[0].bias.grad = None
    assert [r.flag for r in check_gradients(model, show=False)] == ["absent", ""]
    model[0].requires_grad_(False)
    assert [r.flag for r in check_gradients(model, show=False)] == ["frozen by mistake", ""]
    assert [r.flag for r in check_gradients(model, train="1.", show=False)] == ["", ""]
    assert [r.flag for r in check_gradients(model.requires_grad_(False), show=False)] == ["frozen by mistake"] * 2


def test_a_part_that_is_frozen_whole_is_meant_to_be():
    unet = small_unet()
    for part, motion_learns in (("spatial", True), ("motion", False)):
        unet.set_frozen(part).zero_grad()
        sample, t, text = (x.float() for x in example_inputs(unet))
        unet(sample, t, text).square().sum().backward()
        table = check_gradients(unet, show=False)
        assert not [r for r in table if r.flag not in ("", "vanishing")]
        assert {"motion_modules" in r.name for r in table if r.mean} == {motion_learns}
        wrong = check_gradients(unet, train="motion_modules." if part == "motion" else "resnets.", show=False).flagged
        assert "frozen by mistake" in {r.flag for r in wrong}


def test_the_table_prints_and_draws(capsys):
    model = rows(math.nan)
    table = check_gradients(model)
    shown = capsys.readouterr().out
    assert shown.strip() == str(table) and "NaN or Inf" in shown and "1 of 2 layers" in shown
    assert isinstance(table, GradientTable) and gradient_figure(table).axes[0].get_yscale() == "log"
    long = GradientTable(list(table) * 40)
    assert len(str(long).splitlines()) <= 14 and "40 of 80" in str(long)


@pytest.mark.parametrize("wrong, options, error, words", [
    ("model", {}, TypeError, "this is a str"), (nn.Linear(2, 2), {}, ValueError, "call loss.backward"),
    (rows(), {"train": "motion"}, ValueError, "No parameter has 'motion'")])
def test_check_gradients_refuses_in_one_sentence(wrong, options, error, words):
    with pytest.raises(error, match=words) as caught: check_gradients(wrong, **options)
    assert "\n" not in str(caught.value)


# ---- the first NaN
def half_module() -> MotionModule:
    torch.manual_seed(0)
    module = MotionModule(32, num_heads=4)
    module.proj_out.reset_parameters()
    return module


def test_the_first_overflow_forward():
    module, x = half_module(), torch.randn(1, 32, 3, 4, 4)
    with torch.no_grad(): module.transformer_blocks[0].ff.net[0].proj.weight *= 400
    with nonfinite(module) as found: module(x)
    assert found == []
    with nonfinite(module.half()) as found: out = module(x.half())
    assert found[0] == "forward: transformer_blocks.0.ff.net.0 (GEGLU)" and not all_finite(out)


def test_the_first_overflow_backward():
    module, x = half_module().half(), torch.randn(1, 32, 3, 4, 4).half().requires_grad_()
    with nonfinite(module) as found: module(x).backward(torch.ones_like(x))
    assert found == []
    with torch.no_grad(): module.transformer_blocks[0].ff.net[2].weight.fill_(600)
    with nonfinite(module) as found: out = module(x); out.backward(torch.full_like(x, 2000))
    assert found and found[0].startswith("backward: ") and all_finite(out)


def test_a_slope_without_end_backward_and_hooks_that_leave():
    class Root(nn.Module):
        def forward(self, x): return x.sqrt()
    model, x = nn.Sequential(nn.Identity(), Root(), nn.Identity()), torch.zeros(2, requires_grad=True)
    with nonfinite(model) as found: model(x).sum().backward()
    assert found[0] == "backward: 1 (Root)"
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_nonfinite_refuses_what_is_no_model():
    with pytest.raises(TypeError, match="this is a list"), nonfinite([1]): pass


# ---- bits
def test_fingerprint_sees_every_bit():
    x = torch.zeros(3)
    seen = {fingerprint(t) for t in (x, -x, x.double(), x[:2], x[None], torch.tensor([0, 0, 1e-45]))}
    assert len(seen) == 6 and fingerprint(x) == fingerprint(x.clone())
