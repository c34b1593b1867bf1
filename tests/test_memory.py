"""Memory: the estimate against the allocator over a sweep, the switches against the plain model, and bad input."""
from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from animatediff_lit import memory
from animatediff_lit.blocks import ResnetBlock
from animatediff_lit.memory import (ATTENTION, CARDS, KINDS, RESERVE, Ledger, check_memory_usage, estimate_memory, example_inputs, measure_memory,
                                    most_frames, optimize_memory_usage, structure, switch_attention, Switches, trace_memory, turn)
from animatediff_lit.motion import MotionModule
from animatediff_lit.pipeline import AnimationPipeline
from animatediff_lit.spatial import Attention, SpatialTransformer
from animatediff_lit.temporal import TemporalAttention
from animatediff_lit.unet import UNet3DConditionModel

NARROW = dict(block_out_channels=(32, 64, 128, 128))


def unet_of(preset: str) -> UNet3DConditionModel:
    torch.manual_seed(0)
    return UNet3DConditionModel.from_preset(preset, **(NARROW if preset != "nano" else {}))


@pytest.fixture(scope="module")
def unets() -> dict[str, UNet3DConditionModel]:
    return {"nano": unet_of("nano"), "sd15-v2": unet_of("sd15-v2")}


# ---- the estimate is right
def training_bytes(unet: nn.Module) -> int: return sum(p.nbytes for p in unet.parameters() if p.requires_grad)


KINDS_OF_RUN = [(False, False), (True, False), (True, True), ("motion", False), ("motion", True)]
# Some processors copy the weights of a convolution as they compute it; that is not in the estimate, and the tensors have to outweigh it.
SWEEP = [(("nano", 4, 16), *how) for how in KINDS_OF_RUN] + [(network, *how) for network in (("nano", 3, 8), ("sd15-v2", 2, 32)) for how in KINDS_OF_RUN[:3:2]]


@pytest.mark.parametrize("network, training, checkpointing", SWEEP, ids=str)
def test_estimate_is_within_a_tenth_of_the_measured_peak(unets, network, training, checkpointing):
    preset, frames, side = network
    unet = copy.deepcopy(unets[preset])
    turn(unet, checkpointing, None, None)
    if training == "motion": unet.set_frozen("spatial")
    inputs, _ = example_inputs(unet, frames, side, side, tokens=16)
    real = measure_memory(unet, *inputs, backward=bool(training))
    pixels = side * (4 if preset == "nano" else 8)
    guess = estimate_memory(unet, frames, pixels, pixels, dtype=torch.float32, training=training, checkpointing=checkpointing, optimizer=None, guidance=False, tokens=16)
    for name in ("peak", "parameters", "gradients", "activations"):
        a, b = getattr(guess, name), getattr(real, name)
        assert abs(a - b) <= 0.1 * b, f"{name}: estimated {a}, measured {b}"
    assert guess.gradients == training_bytes(unet) * bool(training)


@pytest.mark.parametrize("options", [{"attention": "plain"}, {"attention": "sliced"}, {"attention": "tiled", "feed_forward": 64, "checkpointing": True}], ids=str)
def test_estimate_of_every_switch(unets, options):
    unet = copy.deepcopy(unets["nano"])
    turn(unet, options.get("checkpointing", False), options.get("attention"), options.get("feed_forward"))
    inputs, _ = example_inputs(unet, 2, 16, 16, tokens=16)
    real = measure_memory(unet, *inputs, backward=True).peak
    guess = estimate_memory("nano", 2, 64, 64, dtype=torch.float32, training=True, optimizer=None, tokens=16, **options).peak
    assert abs(guess / real - 1) < 0.1


def test_guidance_batch_and_dtype_scale_the_activations():
    one, two = (estimate_memory("nano", 8, 64, 64, batch=batch, guidance=guidance) for batch, guidance in ((1, True), (2, False)))
    assert one.peak == two.peak
    double = estimate_memory("nano", 8, 64, 64, dtype=torch.float64)
    assert double.parameters == 4 * one.parameters and 3.5 < double.activations / one.activations < 4.5


def test_an_optimizer_keeps_what_torchs_keeps(unets):
    unet = copy.deepcopy(unets["nano"]).set_frozen("spatial")
    learning = [p for p in unet.parameters() if p.requires_grad]
    for p in learning: p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(learning)
    optimizer.step()
    kept = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    found = estimate_memory(unet, 4, 32, 32, dtype=torch.float32, training=True)
    assert found.optimizer == kept == 2 * found.gradients == 2 * estimate_memory("nano", 4, 32, 32, dtype=torch.float32, training="motion").gradients
    assert found.timeline[-1][0] == "optimizer step"
    assert estimate_memory("nano", 4, 32, 32, training=True, optimizer="sgd").optimizer == 0


def test_low_rank_learns_little_and_still_needs_activations():
    full, lora = (estimate_memory("nano", 8, 32, 32, training=True, lora_rank=rank) for rank in (None, 4))
    modules = [m for m in structure("nano")[0].modules() if isinstance(m, TemporalAttention)]
    assert lora.gradients == sum(4 * 2 * 2 * 4 * m.to_q.in_features for m in modules) < full.gradients / 20         # four maps, down and up, float16, rank 4
    assert lora.activations > full.activations / 2 and lora.peak < full.peak


@pytest.mark.parametrize("preset, height", [("sd15-v1", 512), ("sdxl-beta", 1024)])
def test_full_size_without_weights(preset, height):
    found, unet = estimate_memory(preset, height=height, width=height), structure(preset)[0]
    assert found.parameters == 2 * sum(p.numel() for p in unet.parameters()) + 2 * sum(b.numel() for b in unet.buffers())
    assert found.parameters < found.peak <= found.total and found.activations > 1e9


def test_a_pipeline_says_how_many_pixels_a_latent_has():
    pipe = AnimationPipeline.from_pretrained("nano")
    assert structure(pipe)[1] == structure("nano")[1] == structure(pipe.unet)[1] == 4 and structure("sd15-v2")[1] == 8
    assert estimate_memory(pipe, 4, 32, 32).peak == estimate_memory("nano", 4, 32, 32).peak


def test_the_original_is_not_touched(unets):
    before = {name: p.clone() for name, p in unets["nano"].named_parameters()}
    estimate_memory(unets["nano"], 4, 32, 32, training="motion", lora_rank=2, checkpointing=True, attention="sliced")
    assert all(torch.equal(p, before[name]) and p.requires_grad and p.grad is None for name, p in unets["nano"].named_parameters())
    assert "forward" not in vars(unets["nano"].mid_block.resnets[0])


# ---- an estimate and a measurement are consistent in themselves
@pytest.mark.parametrize("training", [False, True])
def test_the_parts_add_up(training):
    found = estimate_memory("nano", 4, 32, 32, training=training)
    assert all(m.bytes == sum(m[2:]) for m in found.moments)
    assert found.peak == found.timeline[found.peak_at][1] == max(size for _, size in found.timeline) <= found.total
    assert sum(block.bytes for block in found.alive) == found.peak and {block.kind for block in found.alive} <= set(KINDS)
    names = [block.name for block in found.alive]
    assert all(names[i:i + names.count(name)] == [name] * names.count(name) for name in set(names) for i in [names.index(name)]), "grouped by layer"
    assert found.table() == found._repr_markdown_() and found.table().count("\n") == 6


def test_layers_come_in_order_and_backwards(unets):
    inputs, _ = example_inputs(unets["nano"], 2, 8, 8, tokens=4)
    names = [name for name, _ in measure_memory(unets["nano"], *inputs, backward=True).timeline]
    place = {name: i for i, name in enumerate(names)}
    down, up = "down_blocks.0.motion_modules.0", "up_blocks.1.motion_modules.1"
    assert place[down] < place[up] < place["loss"] < place[f"{up} (backward)"] < place[f"{down} (backward)"]


def test_the_measurement_sees_what_the_dispatcher_does_not():
    conv, image = nn.Conv2d(16, 16, 3, padding=1), torch.randn(4, 16, 32, 32)
    with torch.no_grad(): out = conv(image)
    own = sum(t.nbytes for t in (*conv.parameters(), image, out))
    assert measure_memory(conv, image).peak >= own == trace_memory(copy.deepcopy(conv).to("meta"), image.to("meta")).peak


def test_measuring_leaves_the_gradients_alone():
    layer = nn.Linear(4, 4)
    layer(torch.ones(1, 4)).sum().backward()
    before = layer.weight.grad
    measure_memory(layer, torch.ones(3, 4), backward=True)
    assert layer.weight.grad is before and torch.equal(before, torch.ones(4, 4))


def test_a_ledger_by_hand():
    ledger = Ledger()
    a = ledger.come(None, 300)
    ledger.visit("one")
    b = ledger.come(None, 500)
    ledger.go(a)
    ledger.visit("two")
    ledger.come(None, 100, "gradients")
    found = ledger.estimate()
    assert found.timeline == [("start", 300), ("one", 800), ("two", 600)] and found.peak_at == 1 and found.total == 900
    assert [x.bytes for x in found.alive] == [300, 500] and b == 1


def test_measuring_on_cuda_reads_the_high_water_mark(monkeypatch):
    "There is no GPU here: its allocator is played by a list of numbers."
    readings = iter([100, 150, 400, 250])
    fake = SimpleNamespace(memory_allocated=lambda d: 100, max_memory_allocated=lambda d: next(readings), reset_peak_memory_stats=lambda d: None, get_device_name=lambda d: "played")
    monkeypatch.setattr(memory.torch, "cuda", fake)
    layers, x = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()), torch.ones(1, 2)
    found = memory.measure_on_cuda(layers, (x,), {}, False, torch.device("cpu"))
    monkeypatch.undo()
    own = 16 + 8
    assert found.timeline == [("start", own), ("input", 50 + own), ("0", 300 + own), ("1", 150 + own)] and found.peak == 300 + own and found.parameters == 16


# ---- the switches
@pytest.mark.parametrize("how", list(ATTENTION))
@pytest.mark.parametrize("queries, keys, dtype", [(1, 1, torch.float32), (37, 37, torch.float32), (300, 300, torch.float64), (300, 77, torch.float32)])
def test_attentions_agree(how, queries, keys, dtype, monkeypatch):
    monkeypatch.setattr(memory, "SLICE", 5000)
    torch.manual_seed(0)
    plain, other = Attention(24, 3, 24).to(dtype), Attention(24, 3, 24).to(dtype)
    other.load_state_dict(plain.state_dict())
    switch_attention(other, how, Switches(), tile=64)
    x, context = torch.randn(3, queries, 24, dtype=dtype, requires_grad=True), torch.randn(3, keys, 24, dtype=dtype)
    results = []
    for layer in (plain, other):
        out = layer(x, context)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    for a, b in zip(*results): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_tiles_do_not_grow_with_the_square(backward):
    def peak(how: str, tokens: int) -> int:
        layer = Attention(16, 2)
        switch_attention(layer, how, Switches(), tile=64)
        return measure_memory(layer, torch.randn(1, tokens, 16), backward=backward).activations
    assert peak("plain", 512) > 3.4 * peak("plain", 256)
    for how in ("tiled", "fused"): assert peak(how, 512) < 2.5 * peak(how, 256)


@pytest.mark.parametrize("options", [dict(attention="fused"), dict(attention="plain", feed_forward=None), dict(attention="sliced", checkpointing=False, feed_forward=7),
                                     dict(attention="tiled", feed_forward=100)], ids=str)
@pytest.mark.parametrize("frozen", [None, "spatial"])
def test_outputs_and_gradients_stay_equal(unets, options, frozen, monkeypatch):
    monkeypatch.setattr(memory, "SLICE", 2000)
    unet = copy.deepcopy(unets["nano"]).set_frozen(frozen)
    for module in unet.modules():
        if isinstance(module, MotionModule): module.proj_out.reset_parameters()
    inputs, _ = example_inputs(unet, 3, 8, 8, batch=2, tokens=5)

    def answer() -> list[torch.Tensor]:
        out = unet(*inputs)
        return [out, *torch.autograd.grad(out.square().mean(), [p for p in unet.parameters() if p.requires_grad])]
    before = answer()
    report = optimize_memory_usage(unet, **options, measure=False, show=False)
    for a, b in zip(before, answer()): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.no_grad(): torch.testing.assert_close(unet(*inputs), before[0], atol=1e-5, rtol=1e-5)
    assert report.changes
    report.undo()
    assert all(torch.equal(a, b) for a, b in zip(before, answer()))
    assert not any({"forward", "attend", "chunk", "tile"} & vars(m).keys() for m in unet.modules())


def test_checkpointing_reaches_all_three_kinds(unets):
    unet = copy.deepcopy(unets["nano"])
    optimize_memory_usage(unet, measure=False, show=False)
    for kind in (ResnetBlock, SpatialTransformer, MotionModule):
        modules = [m for m in unet.modules() if isinstance(m, kind)]
        assert modules and all("forward" in vars(m) for m in modules)


def test_a_copy_of_an_optimized_model_is_its_own(unets):
    unet = copy.deepcopy(unets["nano"])
    optimize_memory_usage(unet, measure=False, show=False)
    twin = copy.deepcopy(unet)
    with torch.no_grad():
        for p in twin.parameters(): p.zero_()
    inputs, _ = example_inputs(unet, 2, 8, 8, tokens=4)
    assert twin(*inputs).abs().max() == 0 < unet(*inputs).abs().max()


def test_a_pipeline_keeps_its_frames_and_saves(capsys):
    pipe = AnimationPipeline.from_pretrained("nano")
    ask = dict(prompt="a red star moving left", video_length=4, num_inference_steps=2, progress=False)
    before = pipe(**ask).frames
    inputs, _ = example_inputs(pipe.unet, 4, 16, 16, tokens=8)
    report = optimize_memory_usage(pipe, attention="sliced", feed_forward=256, inputs=inputs)
    assert str(report) in capsys.readouterr().out
    saved = {(s.switch, s.task): s.after / s.before for s in report.savings}
    assert saved["checkpointing", "training step"] < 0.6 and saved["chunked autoencoder", "decoding"] < 0.6 and all(s.seconds_after > 0 for s in report.savings)
    after = pipe(**ask).frames
    assert abs(before.astype(int) - after.astype(int)).max() <= 1
    report.undo()
    assert not pipe.vae.use_slicing and (pipe(**ask).frames == before).all()


def test_twice_on_and_twice_back(unets):
    unet = copy.deepcopy(unets["nano"])
    first, second = (optimize_memory_usage(unet, measure=False, show=False) for _ in range(2))
    second.undo()
    assert "forward" in vars(unet.mid_block.resnets[0])
    first.undo()
    assert "forward" not in vars(unet.mid_block.resnets[0])


def test_memory_efficient_attention_is_one_class():
    from animatediff_lit.memory import MemoryEfficientAttention as here
    from animatediff_lit.temporal import MemoryEfficientAttention as there
    assert here is there and "MemoryEfficientAttention" in memory.__all__


# ---- cards
def test_most_frames_is_the_most():
    options = dict(model="nano", height=64, width=64)
    sizes = [estimate_memory(**options, frames=n).peak for n in (1, 9, 32)]
    assert most_frames(sizes[1] + RESERVE, **options) == 9
    assert most_frames(sizes[0], **options) == 0 and most_frames(sizes[2], reserve=0, **options) == 32
    assert list(CARDS) == ["8 GB", "12 GB", "16 GB", "24 GB", "80 GB"]


def test_sixteen_frames_train_under_sixteen_gigabytes_with_one_switch():
    task = dict(model="sd15-v2", training="motion", dtype=torch.float32)
    assert estimate_memory(**task).peak > CARDS["16 GB"] > estimate_memory(**task, checkpointing=True).peak + RESERVE


# ---- the thermometer
def test_check_memory_usage_sees_a_tensor(capsys):
    before = check_memory_usage("cpu", show=False)["used"]
    big = torch.ones(100, 2 ** 20)
    after = check_memory_usage()
    assert after["used"] - before > 0.9 * big.nbytes and after["used"] <= 1.05 * after["peak"] and after["peak"] < after["total"]
    assert "in use" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_check_memory_usage_without_cuda():
    with pytest.raises(RuntimeError, match="sees no CUDA device"): check_memory_usage("cuda")
    with pytest.raises(ValueError, match="'meta'"): check_memory_usage("meta")


# ---- bad input
@pytest.mark.parametrize("options, words", [
    (dict(model="sd15"), "not a preset"), (dict(model=3), "takes the name of a preset"), (dict(frames=0), "frames is 0"), (dict(frames=33), "position encodings for 32"),
    (dict(frames=2.5), "frames is 2.5"), (dict(height=500), "height is 500"), (dict(width=-8), "width is -8"), (dict(batch=0), "batch is 0"), (dict(dtype=torch.int8), "dtype is"),
    (dict(dtype="half"), "dtype is"), (dict(training="lora"), "training is 'lora'"), (dict(attention="flash"), "attention is 'flash'"), (dict(lora_rank=0), "lora_rank is 0"),
    (dict(optimizer="adam"), "optimizer is 'adam'"), (dict(feed_forward=0), "feed_forward is 0")], ids=str)
def test_estimate_refuses_in_a_sentence(options, words):
    with pytest.raises((TypeError, ValueError), match=words) as caught: estimate_memory(**{"model": "sd15-v2", **options})
    assert "\n" not in str(caught.value)


def test_the_others_refuse_in_a_sentence(unets):
    frozen = nn.Linear(2, 2).requires_grad_(False)
    for call in (lambda: measure_memory("model"), lambda: measure_memory(frozen, torch.ones(1, 2), backward=True), lambda: measure_memory(copy.deepcopy(frozen).to("meta")),
                 lambda: optimize_memory_usage("model"), lambda: optimize_memory_usage(unets["nano"], attention="flash"), lambda: optimize_memory_usage(unets["nano"], feed_forward=0)):
        with pytest.raises((TypeError, ValueError)) as caught: call()
        assert "\n" not in str(caught.value) and "forward" not in vars(unets["nano"].mid_block.resnets[0])


def test_a_frozen_unet_cannot_be_trained(unets):
    with pytest.raises(ValueError, match="frozen"): estimate_memory(copy.deepcopy(unets["nano"]).requires_grad_(False), 4, 32, 32, training=True)
