"""A custom motion module goes where it was told, changes nothing while it is new, and is all that learns afterwards."""
from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from animatediff_lit.custom_motion import (FAULTS, MOTION_MODULES, CustomMotionModule, CustomWrapper, TemporalConv, as_before, contestants, count, custom_modules,
                                           custom_state_dict, integrate_custom_module, interval, load_custom, matched_size, motion_faults, motion_sites,
                                           race_table, register_motion_module, run_race, save_custom, standard_module)
from animatediff_lit.motion import MotionModule
from animatediff_lit.pipeline import AnimationPipeline
from animatediff_lit.spatial import PixelLinear
from animatediff_lit.training import Recipe, fit
from animatediff_lit.unet import UNet3DConditionModel, VideoLayers

FACTORIES = {"standard": standard_module, "film": lambda c: CustomMotionModule(c, 12, 2), "conv": lambda c: TemporalConv(c, 10)}
each_module = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)


def small_unet(**options) -> UNet3DConditionModel:
    "A UNet whose motion modules have weights as after training."
    torch.manual_seed(0)
    small = dict(block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8, num_attention_heads=2, motion_num_attention_heads=2,
                 down_block_types=("CrossAttnDownBlockMotion",) * 2, up_block_types=("CrossAttnUpBlockMotion",) * 2)
    unet = UNet3DConditionModel(**small | options).eval()
    for module in unet.modules():
        if isinstance(module, MotionModule): module.proj_out.reset_parameters()
    return unet


def shake(model) -> None:
    "Draw the weights of the custom modules anew, so that they change what passes."
    with torch.no_grad():
        for module in custom_modules(model).values():
            for p in module.parameters(): p.copy_(torch.randn(p.shape) * 0.3)


@pytest.fixture
def inputs() -> tuple:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 5, 4, 4, generator=g), torch.tensor([30, 800]), torch.randn(2, 3, 8, generator=g)


@pytest.fixture(scope="module")
def nano() -> AnimationPipeline:
    return AnimationPipeline.from_pretrained("nano")


# ---- the modules
@each_module
@torch.no_grad()
def test_each_module_is_sound_and_the_identity_when_new(factory):
    for channels in (8, 48, 30):
        module, x = factory(channels), torch.randn(2, channels, 5, 3, 4)
        assert motion_faults(module, channels) == {} and torch.equal(module(x), x)


@torch.no_grad()
def test_film_hears_each_videos_own_time_and_needs_none():
    module = CustomMotionModule(8, 12, 2).double()
    for p in module.parameters(): p.copy_(torch.randn(p.shape) * 0.3)
    x = torch.randn(1, 8, 4, 2, 2, dtype=torch.float64).repeat(3, 1, 1, 1, 1)
    out = module(x, timestep=torch.tensor([10, 500, 10]))
    assert torch.allclose(out[0], out[2], atol=1e-5) and not torch.allclose(out[0], out[1], atol=1e-2)
    assert torch.allclose(module(x[:1], 10), out[:1], atol=1e-5) and not torch.allclose(module(x[:1]), out[:1], atol=1e-2)


def test_the_convolution_sees_two_frames_to_either_side():
    module = TemporalConv(4, 6).double()
    module.norm = nn.Identity()
    nn.init.normal_(module.proj_out.weight)
    x = torch.randn(1, 4, 9, 1, 1, dtype=torch.float64, requires_grad=True)
    module(x)[:, :, 4].sum().backward()
    assert (x.grad.abs().sum((0, 1, 3, 4)) > 0).tolist() == [i in range(2, 7) for i in range(9)]


@pytest.mark.parametrize("make, message", [
    (lambda: CustomMotionModule(8, 0), "give at least 1 of each"), (lambda: CustomMotionModule(8, num_layers=0), "give at least 1 of each"),
    (lambda: TemporalConv(8, 4, kernel_size=2), "give an odd number"),
    (lambda: CustomMotionModule(8, 4, 1)(torch.zeros(1, 6, 3, 2, 2)), "takes (batch, 8, frames, height, width)"),
    (lambda: TemporalConv(8, 4)(torch.zeros(8, 3, 2, 2)), "takes (batch, 8, frames, height, width)"),
    (lambda: CustomMotionModule(8, 4, 1)(torch.zeros(3, 8, 3, 2, 2), torch.tensor([1, 2])), "2 timesteps for a batch of 3"),
    (lambda: CustomMotionModule(8, 4, 1, max_frames=4)(torch.zeros(1, 8, 5, 2, 2)), "at most 4 frames")])
def test_bad_input_of_the_modules_is_one_sentence(make, message):
    with pytest.raises(ValueError) as caught: make()
    assert message in str(caught.value)


class Mutant(CustomMotionModule):
    "A custom motion module whose `wrong` is applied to what it adds."
    def __init__(self, wrong): super().__init__(8, 12, 1); self.wrong = wrong
    def forward(self, x, timestep=None): return x + self.wrong(super().forward(x, timestep) - x, x)


def swap(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor: return y.permute(0, 2, 3, 4, 1).reshape(y.shape)


class Repeats(CustomMotionModule):
    def forward(self, x, timestep=None): return super().forward(x, None if timestep is None else timestep.flip(0))


class Apart(nn.Module):
    def __init__(self): super().__init__(); self.out = nn.Conv3d(8, 8, 1); nn.init.zeros_(self.out.weight); nn.init.zeros_(self.out.bias)
    def forward(self, x): return x + self.out(x)


class Deaf(Apart):
    def forward(self, x, timestep): return x + self.out(x + x.mean(2, keepdim=True))


@pytest.mark.parametrize("module, fault", [
    (Mutant(swap), "pixels mixed"), (Mutant(lambda y, x: y.flip(0)), "videos mixed"), (Repeats(8, 12, 1), "videos mixed"), (Apart(), "frames apart"), (Deaf(), "time ignored"),
    (nn.Conv3d(8, 8, 1), "not new"), (nn.AvgPool3d(2), "another shape"), (CustomMotionModule(16, 8, 1), "does not run")])
def test_faults_are_found(module, fault):
    found = motion_faults(module, 8)
    assert fault in found and all(found[name].startswith(FAULTS[name]) for name in found)


# ---- exactly what it was
@each_module
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_before_training_it_is_the_old_model(factory, frozen, gradients, inputs):
    "Also if the old one could learn: for weights that could, PyTorch multiplies in another order, which shows in the last bits."
    unet = small_unet().requires_grad_(not frozen)
    with torch.set_grad_enabled(gradients):
        before, still = unet(*inputs), copy.deepcopy(unet).set_motion(False)(*inputs)
        behind, instead = integrate_custom_module(unet, factory), integrate_custom_module(unet, factory, replace=True)
        assert torch.equal(behind(*inputs), before) and torch.equal(instead(*inputs), still) and not torch.equal(before, still)
        assert torch.equal(copy.deepcopy(behind)(*inputs), before)
        shake(behind)
        assert not torch.equal(behind(*inputs), before)
        assert torch.equal(behind.set_motion(False)(*inputs), still) and not torch.equal(behind.set_motion(True)(*inputs), still)


@pytest.mark.parametrize("shape", [(1, 4, 1, 8, 8), (1, 4, 4, 8, 8), (2, 4, 3, 4, 8)])
def test_the_default_unet_and_nano_keep_their_bits(shape, nano):
    "For the first and the last shape, freezing alone changed bits of one of them where this was written."
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for unet, dim in ((UNet3DConditionModel().eval(), 768), (copy.deepcopy(nano.unet), 64)):
        changed = integrate_custom_module(unet, FACTORIES["film"])
        x = torch.randn(shape, generator=g), torch.randint(1000, shape[:1], generator=g), torch.randn(shape[0], 5, dim, generator=g)
        with torch.no_grad(): assert torch.equal(changed(*x), unet(*x))
        assert torch.equal(changed(*x), unet(*x))


@pytest.mark.parametrize("layer, shape", [(nn.Linear, (3, 7)), (nn.Linear, (4, 7, 5)), (nn.Linear, (2, 4, 7, 5)), (PixelLinear, (2, 4, 7, 5)),
                                          (lambda i, o: nn.Linear(i, o, bias=False), (2, 4, 7, 5))])
def test_a_frozen_layer_keeps_its_bits(layer, shape):
    for width in (8, 48, 64, 320):
        could = layer(width, 24)
        frozen = copy.deepcopy(could).requires_grad_(False)
        frozen.register_forward_hook(as_before)
        x = torch.randn(*shape[:-2], width, 3 * shape[-2]).mT
        for y in (x, x.contiguous(), torch.randn(width, 6).mT):
            assert torch.equal(frozen(y), could(y))


def test_only_what_we_freeze_gets_the_hook(inputs):
    unet = small_unet()
    unet.mid_block.requires_grad_(False)
    changed = integrate_custom_module(integrate_custom_module(unet, FACTORIES["film"]), FACTORIES["film"])
    hooked = {n for n, m in changed.named_modules() if as_before in m._forward_hooks.values()}
    assert hooked and not any(n.startswith("mid_block") or ".custom." in n for n in hooked)
    assert all(len(changed.get_submodule(n)._forward_hooks) == 1 for n in hooked) and not any(m._forward_hooks for m in unet.modules())


@torch.no_grad()
def test_a_pipeline_makes_the_same_video(nano):
    options = dict(num_inference_steps=2, video_length=4, progress=False)
    changed = integrate_custom_module(nano, FACTORIES["film"])
    assert type(changed) is AnimationPipeline and changed is not nano and changed.unet is not nano.unet
    assert (changed("a red star moving left", **options).frames == nano("a red star moving left", **options).frames).all()


@each_module
@pytest.mark.parametrize("replace", [False, True])
def test_only_the_custom_modules_learn(factory, replace, inputs):
    unet = small_unet(motion_context_dim=6)
    changed = integrate_custom_module(unet, factory, replace=replace)
    trainable = {n for n, p in changed.named_parameters() if p.requires_grad}
    assert trainable == {n for n in dict(changed.named_parameters()) if ".custom." in n} and len(trainable) >= 7
    start = {n: p.detach().clone() for n, p in changed.state_dict().items()}
    fit(changed, lambda g, b: {"x": inputs[0]}, lambda m, x: (m(x, *inputs[1:]).square().mean(), {}), Recipe(steps=3, batch=2, lr=1e-2, warmup=1))
    moved = {n for n, p in changed.state_dict().items() if not torch.equal(p, start[n])}
    assert moved and moved <= trainable
    assert {n.split(".custom.")[0] for n in moved} == set(motion_sites(changed))                        # gradients reach every site
    old = unet.state_dict()
    kept = {n.replace(".original", ""): p for n, p in changed.state_dict().items() if ".custom." not in n}
    assert all(torch.equal(p, old[n]) for n, p in kept.items())
    if not replace: assert kept.keys() == old.keys()


def test_a_module_with_frozen_parts_stays_so_and_the_pipeline_is_frozen(nano):
    def half(channels: int) -> nn.Module:
        module = TemporalConv(channels, 4)
        module.conv_in.requires_grad_(False)
        return module
    changed = integrate_custom_module(nano, half, "mid_block")
    for network in (changed.vae, changed.text_encoder): assert not any(p.requires_grad for p in network.parameters())
    assert {n.split(".custom.")[1].split(".")[0] for n, p in changed.unet.named_parameters() if p.requires_grad} == {"norm", "conv", "proj_out"}


# ---- where, and whose
def test_copy_and_in_place():
    unet = small_unet()
    names = list(unet.state_dict())
    changed = integrate_custom_module(unet, FACTORIES["conv"])
    assert list(unet.state_dict()) == names and all(p.requires_grad for p in unet.parameters()) and not unet._forward_pre_hooks
    assert not {p.data_ptr() for p in unet.parameters()} & {p.data_ptr() for p in changed.parameters()}
    assert integrate_custom_module(unet, FACTORIES["conv"], inplace=True) is unet and len(custom_modules(unet)) == len(motion_sites(unet))


@pytest.mark.parametrize("options", [{}, dict(block_out_channels=(8, 12, 16), down_block_types=("DownBlockMotion",) * 3, up_block_types=("UpBlockMotion",) * 3,
                                              layers_per_block=2), dict(use_motion_mid_block=False, norm_num_groups=2)])
def test_every_site_has_its_width(options, inputs):
    unet, widths = small_unet(**options), {}
    for block in unet.modules():
        if isinstance(block, VideoLayers) and block.motion_modules:
            for module in block.motion_modules: widths[id(module)] = module.proj_in.in_features
    sites = motion_sites(unet)
    assert [widths[id(unet.get_submodule(site))] for site in sites] == list(sites.values()) and len(sites) == len(widths)
    changed = integrate_custom_module(unet, FACTORIES["conv"])
    assert motion_sites(changed) == sites
    assert {s: m.conv_in.in_channels for s, m in zip(sites, custom_modules(changed).values())} == sites


def test_named_sites_only():
    unet = small_unet()
    for sites, expected in (("mid_block", 1), (["up_blocks.0", "mid_block.motion_modules.0"], 3), ("up_blocks.0.motion_modules.1", 1)):
        assert len(custom_modules(integrate_custom_module(unet, FACTORIES["conv"], sites))) == expected
    changed = integrate_custom_module(unet, FACTORIES["film"], "mid_block")
    assert type(changed.mid_block.motion_modules[0]) is CustomWrapper and type(changed.up_blocks[0].motion_modules[0]) is MotionModule


def test_a_module_is_itself_at_the_first_site_and_copied_to_the_others():
    unet, module = small_unet(), TemporalConv(16, 4)
    changed = integrate_custom_module(unet, module, "up_blocks.0", inplace=True)
    first, second = custom_modules(changed).values()
    assert first is module and second is not module and all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_twice_is_one_behind_the_other(inputs):
    unet = integrate_custom_module(small_unet(), FACTORIES["film"])
    shake(unet)
    with torch.no_grad():
        twice = integrate_custom_module(unet, FACTORIES["film"])
        assert torch.equal(twice(*inputs), unet(*inputs)) and len(twice._forward_pre_hooks) == 1
    assert len(custom_modules(twice)) == 2 * len(motion_sites(unet)) and all(p.requires_grad for m in custom_modules(twice).values() for p in m.parameters())


def other_width(channels: int) -> nn.Module: return CustomMotionModule(channels + 1, 4, 1)


@pytest.mark.parametrize("given, sites, kind, message", [
    (CustomMotionModule(8, 4, 1), None, ValueError, "The module for down_blocks.1.motion_modules.0 does not take the 16 channels there"),
    (other_width, "mid_block", ValueError, "The module for mid_block.motion_modules.0 does not take the 16 channels there"),
    (FACTORIES["film"], "middle", ValueError, "There is no motion module at 'middle' in this UNet: its sites are down_blocks.0.motion_modules.0, "),
    (FACTORIES["film"], ["mid_block", "up_blocks.7"], ValueError, "There is no motion module at 'up_blocks.7'"),
    (FACTORIES["film"], "up_block", ValueError, "There is no motion module at 'up_block'"), (FACTORIES["film"], [], ValueError, "No site is named"),
    (lambda c: nn.Conv3d(c, c, 1), "mid_block", ValueError, "start its last layer at zero, or pass trained=True"),
    (lambda c: nn.AvgPool3d(2), "mid_block", ValueError, "does not give back the shape"), (7, None, TypeError, "this is a int"),
    (lambda c: None, None, TypeError, "The factory gave a NoneType"), ("fancy", None, ValueError, "use one of standard, film, conv")])
def test_bad_input_is_one_sentence_and_changes_nothing(given, sites, kind, message, inputs):
    unet = small_unet()
    before = {n: p.clone() for n, p in unet.state_dict().items()}
    with pytest.raises(kind) as caught: integrate_custom_module(unet, given, sites=sites, inplace=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not custom_modules(unet) and unet.state_dict().keys() == before.keys() and all(p.requires_grad for p in unet.parameters())
    assert all(torch.equal(p, before[n]) for n, p in unet.state_dict().items())


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "nano", None])
def test_only_unets_and_pipelines_are_changed(model):
    with pytest.raises(TypeError, match="Give a UNet3DConditionModel or an AnimationPipeline"): integrate_custom_module(model, FACTORIES["conv"])


def test_a_unet_without_motion_modules_says_so():
    unet = small_unet()
    for block in unet.modules():
        if isinstance(block, VideoLayers): block.motion_modules = None
    with pytest.raises(ValueError, match="has no motion modules"): integrate_custom_module(unet, FACTORIES["conv"])


def test_a_trained_module_may_come_in(inputs):
    trained = TemporalConv(16, 4)
    nn.init.normal_(trained.proj_out.weight)
    with pytest.raises(ValueError, match="trained=True"): integrate_custom_module(small_unet(), trained, "mid_block")
    assert custom_modules(integrate_custom_module(small_unet(), trained, "mid_block", trained=True))


# ---- the registry
def test_registry_by_name_and_no_name_twice(inputs):
    assert list(MOTION_MODULES) == ["standard", "film", "conv"]
    assert type(custom_modules(integrate_custom_module(small_unet(), "conv", "mid_block"))["mid_block.motion_modules.0.custom"]) is TemporalConv
    with pytest.raises(ValueError, match="'conv' is the name of TemporalConv already"): register_motion_module("conv")(other_width)
    try: assert register_motion_module("other")(other_width) is other_width and MOTION_MODULES["other"] is other_width
    finally: MOTION_MODULES.pop("other", None)


# ---- the time
class Spy(nn.Module):
    "Remembers what it was told."
    def __init__(self, channels: int): super().__init__(); self.seen = []
    def forward(self, x, timestep, motion_context=None): self.seen.append((timestep.tolist(), motion_context)); return x


def spy_of(unet) -> Spy: return next(iter(custom_modules(unet).values()))


@torch.no_grad()
def test_time_and_context_arrive_however_the_unet_is_called(inputs):
    unet = integrate_custom_module(small_unet(motion_context_dim=6), Spy, "mid_block")
    x, t, text = inputs
    context = torch.randn(2, 4, 6)
    unet(x, t, text, context); unet(x, 7, text, motion_context=context); unet(sample=x, timestep=torch.tensor([9]), motion_context=context); unet(x, t)
    assert [time for time, _ in spy_of(unet).seen] == [[30, 800], [7, 7], [9, 9], [30, 800]]
    assert [c is context for _, c in spy_of(unet).seen] == [True, True, True, False]


@torch.no_grad()
def test_modules_that_stay_get_the_context_that_they_got_before(inputs):
    unet, context = small_unet(motion_context_dim=6).requires_grad_(False), torch.randn(2, 4, 6)
    for module in unet.modules():
        if isinstance(module, MotionModule): nn.init.normal_(module.context.up.weight)
    before = unet(*inputs, context)
    assert not torch.equal(before, unet(*inputs))
    for sites in ("mid_block", None): assert torch.equal(integrate_custom_module(unet, FACTORIES["film"], sites)(*inputs, context), before)


@torch.no_grad()
def test_copies_hear_their_own_time_also_after_an_error(inputs):
    unet = integrate_custom_module(small_unet(), Spy, "mid_block")
    twin = copy.deepcopy(copy.deepcopy(unet))
    with pytest.raises(ValueError, match="3 timesteps for a batch of 2"): twin(inputs[0], torch.tensor([1, 2, 3]), inputs[2])
    with pytest.raises(TypeError, match="timestep"): twin(inputs[0])
    twin(*inputs)
    assert not spy_of(unet).seen and [time for time, _ in spy_of(twin).seen] == [[30, 800]]


def test_gradient_checkpointing_computes_the_same_gradients(inputs):
    "The backward pass computes the middle block once more, after the UNet has returned."
    plain = integrate_custom_module(small_unet(), FACTORIES["film"])
    shake(plain)
    saving = copy.deepcopy(plain)
    forward = saving.mid_block.forward
    saving.mid_block.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False)
    for unet in (plain, saving): unet(*inputs).square().mean().backward()
    grads = [{n: p.grad for n, p in unet.named_parameters() if p.grad is not None} for unet in (plain, saving)]
    assert grads[0].keys() == grads[1].keys() and all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])
    assert any(".film." in n and g.abs().max() > 0 for n, g in grads[0].items())


# ---- keeping it
def test_state_round_trip(tmp_path, inputs):
    changed = integrate_custom_module(small_unet(), FACTORIES["film"])
    shake(changed)
    path = save_custom(changed, tmp_path / "custom.safetensors")
    again = load_custom(integrate_custom_module(small_unet(), FACTORIES["film"]), path)
    with torch.no_grad(): assert torch.equal(again(*inputs), changed(*inputs))
    assert all(".custom." in name for name in custom_state_dict(changed)) and [p.name for p in tmp_path.iterdir()] == ["custom.safetensors"]


@pytest.mark.parametrize("other", [dict(sites="mid_block"), dict(factory=lambda c: CustomMotionModule(c, 8, 2)), dict(factory=FACTORIES["conv"])])
def test_loading_is_strict_and_all_or_nothing(tmp_path, other):
    path = save_custom(integrate_custom_module(small_unet(), FACTORIES["film"]), tmp_path / "custom.safetensors")
    target = integrate_custom_module(small_unet(), other.get("factory", FACTORIES["film"]), other.get("sites"))
    shake(target)
    before = copy.deepcopy(custom_state_dict(target))
    with pytest.raises(ValueError, match="differ in name or shape"): load_custom(target, path)
    assert all(torch.equal(t, before[n]) for n, t in custom_state_dict(target).items())


def test_bad_files_are_one_sentence(tmp_path):
    changed = integrate_custom_module(small_unet(), FACTORIES["conv"])
    with pytest.raises(FileNotFoundError, match="There is no file"): load_custom(changed, tmp_path / "none.safetensors")
    torch.save({}, tmp_path / "pickle.safetensors")
    with pytest.raises(ValueError, match="no safetensors file, or a damaged one"): load_custom(changed, tmp_path / "pickle.safetensors")
    for model in (small_unet(), integrate_custom_module(small_unet(), Spy)):
        with pytest.raises(ValueError, match="no custom module with weights"): save_custom(model, tmp_path / "x")


def test_a_changed_pipeline_refuses_the_diffusers_layout(nano, tmp_path):
    with pytest.raises(ValueError, match="does not fit into diffusers' MotionAdapter"):
        integrate_custom_module(nano, FACTORIES["conv"], "mid_block").save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# ---- the race
def test_equal_parameters():
    for channels in (48, 64, 320):
        sizes = [count(factory(channels)) for factory in contestants().values()]
        assert max(sizes) < 1.03 * min(sizes)


def test_matched_size_is_the_nearest():
    def build(size: int) -> nn.Module: return nn.Linear(size, 10)
    for target in (1, 20, 34, 36, 1234):
        best = min(range(1, 200), key=lambda n: abs(count(build(n)) - target))
        assert abs(count(build(matched_size(build, target))) - target) == abs(count(build(best)) - target)
    assert matched_size(build, 10 ** 9, most=50) == 50


def test_interval_is_that_of_the_mean():
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and math.isclose(high - mean, 1.96 * 1.25 ** 0.5 / 4 ** 0.5) and math.isclose(mean - low, high - mean)


def test_the_recorded_race_goes_on_where_it_stopped(tmp_path):
    options = dict(minutes=1e-6, seeds=1, clips=1, train=16, errors=2, batch=1, steps=1)
    record = run_race(tmp_path, **options)
    assert set(record["results"]) == {"no motion", *contestants()} and all(len(runs) == 1 for runs in record["results"].values())
    files = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*-0.json")}
    (tmp_path / "conv-0.json").unlink(missing_ok=False)
    again = run_race(tmp_path, **options)
    assert again["results"] == record["results"] and all(p.stat().st_mtime_ns == t for p, t in files.items() if p.name != "conv-0.json")
    assert json.loads((tmp_path / "race.json").read_text())["results"] == record["results"]
    assert race_table(record["results"]).splitlines()[0] == "| | no motion | standard | film | conv |"
    with pytest.raises(ValueError, match="another race"): run_race(tmp_path, **options | {"minutes": 1.0})
