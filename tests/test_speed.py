"""The fast path gives what the UNet gives, with less work, and touches nothing; no switch is kept that was not measured to help."""
from __future__ import annotations

import copy
import math
import subprocess
import sys
import time
import warnings

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from animatediff_lit import speed
from animatediff_lit.custom_motion import TemporalConv
from animatediff_lit.evaluation import grid
from animatediff_lit.pipeline import AnimationPipeline
from animatediff_lit.spatial import Attention, FeedForward
from animatediff_lit.speed import (FastPipeline, FastUNet, Once, Trial, Trials, alternate, count_flops, fast_pipeline, machine_rate, optimize_inference,
                                   peak_of, ratio, time_against_quality, where_time_goes)
from animatediff_lit.unet import UNet3DConditionModel

SMALL = dict(block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8, num_attention_heads=2, motion_num_attention_heads=2,
             down_block_types=("CrossAttnDownBlockMotion",) * 2, up_block_types=("CrossAttnUpBlockMotion",) * 2)
PLAIN_FIRST = dict(down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"), up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"))
CALL = dict(num_inference_steps=3, guidance_scale=2.0, progress=False)


def unet(**options) -> UNet3DConditionModel:
    "A UNet in which every layer does something."
    torch.manual_seed(0)
    model = UNet3DConditionModel(**SMALL | options).eval()
    for p in model.parameters(): nn.init.normal_(p, std=0.2)
    return model


def question(model, batch=2, frames=4, side=8, tokens=5, alike=False, times=500, context=False):
    g = torch.Generator().manual_seed(1)
    sample = torch.randn(1 if alike else batch, 4, frames, side, side, generator=g).repeat(batch if alike else 1, 1, 1, 1, 1)
    extra = [torch.randn(batch, 3, 6, generator=g)] if context else []
    return sample, torch.as_tensor(times), torch.randn(batch, tokens, 8, generator=g), *extra


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert a.shape == b.shape and b.abs().max() > 1e-3
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.fixture(scope="module")
def pipe() -> AnimationPipeline:
    return AnimationPipeline.from_pretrained("nano")


# ---- the same outputs
@pytest.mark.parametrize("options", [
    {}, dict(motion_norm="per_frame"), dict(motion_norm="v1"), dict(use_motion_mid_block=False), dict(layers_per_block=2),
    dict(use_linear_projection=True, transformer_layers_per_block=2), dict(temporal_transformer_layers_per_block=2, mid_block_layers=2),
    dict(downsample_padding=0), dict(act_fn="gelu", mid_block_scale_factor=2.0), PLAIN_FIRST, dict(motion_context_dim=6),
    dict(block_out_channels=(8,), down_block_types=("CrossAttnDownBlockMotion",), up_block_types=("CrossAttnUpBlockMotion",)),
], ids=str)
@pytest.mark.parametrize("alike", [False, True])
def test_the_fast_unet_gives_what_the_unet_gives(options, alike):
    model = unet(**options)
    fast, inputs = FastUNet(model), question(model, alike=alike, context="motion_context_dim" in options)
    with torch.no_grad(): exact = model(*inputs)
    assert close(fast(*inputs), exact)
    with fast.once: assert close(fast(*inputs), exact) and close(fast(*inputs), exact)


@pytest.mark.parametrize("asked", [dict(frames=1), dict(frames=16), dict(side=6), dict(side=7), dict(batch=1), dict(batch=3), dict(tokens=1),
                                   dict(tokens=40), dict(times=[3, 900]), dict(times=[3, 900], alike=True), dict(times=[7, 7])], ids=str)
def test_for_every_question(asked):
    model = unet()
    inputs = question(model, **asked)
    with torch.no_grad(): assert close(FastUNet(model)(*inputs), model(*inputs))


def test_only_equal_clips_share_their_beginning():
    model = unet()
    fast, (sample, t, text) = FastUNet(model), question(model, alike=True)
    other, same = sample.clone(), text[:1].repeat(2, 1, 1)
    other[1, -1, -1, -1, -1] += 1                                      # the very last number
    with torch.no_grad():
        for inputs in [(sample, t, text), (other, t, text), (other, t, same), (sample, t, same)]: assert close(fast(*inputs), model(*inputs))
    assert count_flops(lambda: fast(sample, t, text)) < count_flops(lambda: fast(other, t, text))


def test_without_a_text_and_with_the_text_changing_under_way():
    model, inputs = unet(), question(unet())
    fast = FastUNet(model)
    with torch.no_grad(), fast.once:
        assert close(fast(inputs[0], 5), model(inputs[0], 5))
        for _ in range(3):
            inputs[2].mul_(-1.5)                                       # the same memory, another text
            assert close(fast(*inputs), model(*inputs))


def test_weights_that_change_are_seen_by_the_next_clip():
    model = unet()
    fast, inputs = FastUNet(model), question(model)
    with fast.once: before = fast(*inputs)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(0.9)
        exact = model(*inputs)
    with fast.once: assert close(fast(*inputs), exact) and not close(before, exact)


def test_motion_switched_off():
    model = unet().set_motion(False)
    inputs = question(model)
    with torch.no_grad(): assert close(FastUNet(model)(*inputs), model(*inputs))


def test_the_same_without_copies_of_weights(monkeypatch):
    "As in a large model: no weights are joined, no kernels spread, and images smaller than the weights change their order."
    monkeypatch.setattr(speed, "SMALL", 0)
    model, ordered = unet(), []
    assert not speed.all_joints(model) and all(k is None for k in speed.make_kit(FastUNet(model), 2, 500, question(model)[2], None, None, None)[0].kernels)
    true, inputs = torch.nn.functional.conv2d, question(model, frames=1)
    monkeypatch.setattr(speed.F, "conv2d", lambda x, *args: ordered.append(x.is_contiguous()) or true(x, *args))
    out = FastUNet(model)(*inputs)
    assert any(ordered) and not all(ordered)
    with torch.no_grad(): assert close(out, model(*inputs))


def test_in_double_precision():
    model = unet().double()
    inputs = [x.double() if x.is_floating_point() else x for x in question(model)]
    with torch.no_grad(): assert (FastUNet(model)(*inputs) - model(*inputs)).abs().max() < 1e-11


def test_sdxl():
    model = unet(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32)
    inputs, added = question(model, alike=True), {"text_embeds": torch.randn(2, 8), "time_ids": torch.randn(2, 6)}
    with torch.no_grad(): assert close(FastUNet(model)(*inputs, added_cond_kwargs=added), model(*inputs, added_cond_kwargs=added))


# ---- less work, and nothing touched
def counted(run) -> dict[str, int]:
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as prof: run()
    return {e.key: e.count for e in prof.key_averages()}


def test_less_work(pipe):
    fast, text = FastUNet(pipe.unet), pipe.encode_prompt(["", "a red star moving left"])
    inputs = torch.randn(1, 4, 16, 8, 8).repeat(2, 1, 1, 1, 1), 500, text
    with fast.once:
        first, again = counted(lambda: fast(*inputs)), counted(lambda: fast(*inputs))
        work, memory = count_flops(lambda: fast(*inputs)), peak_of(lambda: fast(*inputs))
    with torch.no_grad(): assert memory < 0.8 * peak_of(lambda: pipe.unet(*inputs))
    assert work < 0.95 * count_flops(lambda: pipe.unet(*inputs))
    assert sum(again.values()) < 0.9 * sum(first.values())


def test_the_frames_stay_where_they_are():
    a, x = speed.TemporalAttention(48, 4), torch.randn(2, 16, 9, 48)
    assert "aten::clone" not in counted(lambda: speed.among_frames(a, x))
    assert "aten::clone" in counted(lambda: a(x.permute(0, 3, 1, 2)[..., None]))             # chapter 6 moves them


def test_the_original_stays_as_it_is():
    model = unet()
    before, inputs = copy.deepcopy(model.state_dict()), question(model)
    fast = FastUNet(model.train())
    with fast.once: fast(*inputs)
    assert type(model) is UNet3DConditionModel and model.training and fast.once.kept is None and not hasattr(model, "once")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.data_ptr() == q.data_ptr() for p, q in zip(model.parameters(), fast.parameters(), strict=True))
    model(*inputs).sum().backward()                                    # and it still learns
    out = fast(*inputs)
    assert not out.requires_grad and not out.is_inference()            # a tensor like any other


def test_the_pipeline_makes_the_same_frames(pipe):
    quick, prompts = fast_pipeline(pipe), ["a red star moving left", "a blue circle growing"]
    for prompt, options in [(prompts, {}), (prompts[0], dict(guidance_scale=1.0, video_length=5))]:
        ours, theirs = quick(prompt, **CALL | options), pipe(prompt, **CALL | options)
        for a, b in zip(*[v if isinstance(v, list) else [v] for v in (ours, theirs)], strict=True):
            assert abs(a.frames.astype(int) - b.frames).max() <= 1
    assert quick.unet.once.kept is None and type(pipe.unet) is UNet3DConditionModel
    assert isinstance(FastPipeline.from_pretrained("nano").unet, FastUNet)


def test_nothing_is_kept_behind_a_failed_clip(pipe):
    quick = fast_pipeline(pipe)
    with pytest.raises(ValueError, match="does not know"): quick("a purple cow", **CALL)
    assert quick.unet.once.kept is None


def test_nothing_is_kept_while_the_frames_are_decoded(pipe, monkeypatch):
    quick, kept = fast_pipeline(pipe), []
    monkeypatch.setattr(AnimationPipeline, "decode", lambda self, *_: [kept.append(dict(self.unet.once.kept))])
    quick("a red star moving left", **CALL)
    assert kept == [{}]


# ---- cached steps
def test_cached_steps_run_the_inner_stages_less_often():
    model = unet()
    fast, inputs = FastUNet(model, every=2), question(model)
    with fast.once: work = [count_flops(lambda: fast(*inputs)) for _ in range(4)]
    assert work[1] == work[3] < 0.8 * work[2] and work[2] <= work[0]
    exact = FastUNet(model)(*inputs)
    with fast.once: assert close(fast(*inputs), exact) and close(fast(*inputs), exact)      # the same question: nothing is lost
    with fast.once:
        fast(*inputs)
        moved = fast(inputs[0] * 0.5, 300, inputs[2])
    assert not close(moved, FastUNet(model)(inputs[0] * 0.5, 300, inputs[2]))


def test_cached_steps_keep_the_clips_of_a_batch_apart(pipe):
    quick, prompts = fast_pipeline(pipe, every=2), ["a red star moving left", "a blue circle growing"]
    together = quick(prompts, seed=3, **CALL)
    alone = quick(prompts[1], seed=4, **CALL)
    assert abs(together[1].frames.astype(int) - alone.frames).max() <= 1


# ---- errors
def test_parts_that_the_fast_path_does_not_know():
    with pytest.raises(TypeError, match="FastUNet takes a UNet3DConditionModel; this is a Linear"): FastUNet(nn.Linear(2, 2))
    model = unet()
    fast = FastUNet(model)
    model.mid_block.motion_modules[0] = TemporalConv(16, 4)
    with pytest.raises(TypeError, match="does not know .*: use the UNet as it is"): FastUNet(model)
    with pytest.raises(TypeError, match="does not know"): fast(*question(model))            # exchanged behind its back


def test_hooks_are_not_passed_by():
    model = unet()
    model.mid_block.resnets[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="mid_block.resnets.0 has hooks"): FastUNet(model)


def test_wrong_questions_have_the_messages_of_the_unet():
    model = unet(motion_max_seq_length=8)
    fast, (sample, t, text) = FastUNet(model), question(unet())
    for wrong in [(sample[:, :3], t, text), (sample, t, text[:1]), (sample, t, text[..., :4]), (sample, torch.tensor([1, 2, 3]), text),
                  (sample.repeat(1, 1, 4, 1, 1), t, text)]:
        with pytest.raises(ValueError) as expected: model(*wrong)
        with pytest.raises(ValueError) as found: fast(*wrong)
        assert str(found.value) == str(expected.value)


def test_misuse_of_what_is_kept(pipe):
    once = Once()
    with once, pytest.raises(RuntimeError, match="already keeps results"), once: pass
    with pytest.raises(RuntimeError, match="must know where a clip begins"): FastUNet(pipe.unet, every=2)(torch.zeros(1, 4, 2, 8, 8), 1)
    with pytest.raises(ValueError, match="every"): FastUNet(pipe.unet, every=0)
    with pytest.raises(TypeError, match="takes an AnimationPipeline; this is a str"): fast_pipeline("nano")


# ---- the stop watch
def test_alternate_takes_turns():
    order = []
    seconds = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert "".join(order) == "ab" * 4 and {k: len(v) for k, v in seconds.items()} == {"a": 3, "b": 3}
    assert ratio({"a": [1, 2, 3], "b": [2, 2, 2]}, "a", "b") == (1.0, 0.5, 1.5)


def test_alternate_refuses():
    with pytest.raises(ValueError, match="nothing to time"): alternate({})
    with pytest.raises(TypeError, match="'a' is a int"): alternate({"a": 1})
    with pytest.raises(ValueError, match="rounds"): alternate({"a": time.time}, rounds=0)
    with pytest.raises(ValueError, match="warmup"): alternate({"a": time.time}, warmup=-1)


@pytest.mark.parametrize("onednn", [speed.ONEDNN, None], ids=["oneDNN", "without"])
def test_product(onednn, monkeypatch):
    "What F.linear gives, by oneDNN where that can be, and in other formats as PyTorch does it; and its work is counted."
    monkeypatch.setattr(speed, "ONEDNN", onednn)
    x, weight, bias = torch.randn(2, 3, 5, 8), torch.randn(6, 8), torch.randn(6)
    for b in (None, bias):
        out, right = speed.product(x, weight, b), torch.einsum("bfsc,oc->bfso", x.double(), weight.double()) + (0 if b is None else b.double())
        assert out.shape == (2, 3, 5, 6) and (out - right).abs().max() < 1e-5
    assert count_flops(lambda: speed.product(x, weight)) == 2 * 30 * 8 * 6
    assert speed.product(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16): assert speed.product(x, weight).dtype == torch.bfloat16
    if onednn is not None:
        with profile(activities=[ProfilerActivity.CPU]) as prof: speed.product(x, weight)
        assert any("linear_pointwise" in event.key for event in prof.key_averages())


def test_work_is_counted_with_the_attention():
    a, x = Attention(16, 2), torch.randn(3, 5, 16)
    assert count_flops(lambda: a(x)) == 2 * 3 * (4 * 5 * 16 * 16 + 2 * 5 * 5 * 16)
    assert machine_rate(64, 2) > 1e6
    assert where_time_goes(lambda: x @ x.mT, 3).count("\n") == 4


# ---- optimize_inference
def test_what_is_kept_is_faster_and_near():
    layer, x = FeedForward(16).eval(), torch.randn(64, 16)
    model, trials = optimize_inference(layer, x, backend=None, rounds=3, show=False)
    assert [t.step for t in trials] == ["as it is", "work done once", "channels-last", "bf16 autocast", "dynamic int8"]
    assert not trials[1].kept and "FastUNet takes a UNet3DConditionModel" in trials[1].why
    with torch.no_grad(): assert speed.distance(model(x), layer(x)) <= 1e-3
    assert trials[4].distance > 1e-4 and not trials[4].kept                    # 8 bits are never within 1e-3
    assert all(t.memory > 0 for t in trials if not math.isnan(t.seconds))


def test_a_limit_that_nothing_misses_and_one_that_all_miss(monkeypatch):
    monkeypatch.setattr(speed, "alternate", lambda runs, *_, **__: {name: [0.5 if name == "new" else 1.0] for name in runs})            # everything counts as faster
    layer, x = FeedForward(16).eval(), torch.randn(64, 16)
    model, trials = optimize_inference(layer, x, limit=10.0, backend=None, rounds=1, show=False)
    assert trials[-1].kept and any("quantized" in type(m).__module__ for m in model.modules()) and type(layer.net[2]) is nn.Linear
    model, trials = optimize_inference(layer, x, limit=1e-12, backend=None, rounds=1, show=False)
    assert [t.kept for t in trials] == [True, False, True, False, False] and "further than 1e-12" in trials[-1].why


def test_a_pipeline_keeps_nothing_that_the_evaluation_sees(pipe, monkeypatch):
    monkeypatch.setattr(speed, "alternate", lambda runs, *_, **__: {name: [0.5 if name == "new" else 1.0] for name in runs})
    scores = iter([80.0, 80.0, 79.5, 78.4, 60.0])
    monkeypatch.setattr(speed, "score", lambda *_, **__: next(scores))
    best, trials = optimize_inference(pipe, grid(1), backend=None, rounds=1, show=False, **{k: v for k, v in CALL.items() if k != "progress"})
    assert [t.kept for t in trials] == [True, True, True, False, False] and "points worse" in trials[-1].why
    assert isinstance(best, FastPipeline) and type(pipe.unet) is UNet3DConditionModel
    assert abs(best("a red star moving left", **CALL).frames.astype(int) - pipe("a red star moving left", **CALL).frames).max() <= 1


def test_without_a_compiler(monkeypatch):
    def no_compiler(self, *_, **__): raise RuntimeError("No working C++ compiler found.\nand much more")
    monkeypatch.setattr(nn.Module, "compile", no_compiler)
    model, trials = optimize_inference(FeedForward(8), torch.randn(4, 8), rounds=1, show=False)
    assert not trials[-1].kept and trials[-1].why == "cannot be: No working C++ compiler found."
    assert model(torch.randn(4, 8)).shape == (4, 8)


def test_the_fast_network_compiles_into_one_graph():
    model, graphs = unet(), []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    fast, inputs = FastUNet(model), question(model, alike=True)
    with torch.no_grad(): exact = model(*inputs)
    torch.compiler.reset()
    fast.compile(backend=backend, fullgraph=True)
    with fast.once: assert close(fast(*inputs), exact) and close(fast(inputs[0], 500, inputs[2]), exact)
    torch.compiler.reset()
    assert len(graphs) == 1


def test_bf16_and_then_compiled_is_still_bf16():
    model = FastUNet(unet())
    both = speed.compiled(speed.in_bf16(model), "eager")
    assert both.forward.__self__ is both and both.run is not speed.network and model.run is speed.network


@pytest.mark.parametrize(("model", "example", "error", "words"), [
    ("nano", None, TypeError, "takes a torch.nn.Module or an AnimationPipeline; this is a str"),
    (nn.Linear(2, 2), None, ValueError, "needs an example_input"),
    (nn.Linear(2, 2), torch.zeros(1, 3), ValueError, "does not take the example_input"),
    (nn.Identity(), "text", ValueError, "needs a finite tensor"),
    (nn.Identity(), torch.tensor([math.nan]), ValueError, "not finite")])
def test_bad_input(model, example, error, words):
    with pytest.raises(error, match=words): optimize_inference(model, example, show=False)
    assert model == "nano" or model.training                                        # left as it was


def test_a_pipeline_is_judged_by_scenes(pipe):
    with pytest.raises(TypeError, match="list of Scenes"): optimize_inference(pipe, ["a red star"], show=False)


def test_the_table_prints_itself_and_as_html():
    trials = Trials([Trial("as it is", 0.0012, 2048, 0.0, True, "the exact output"), Trial("int8", math.nan, 0, math.nan, False, "cannot be: <none>")])
    assert "as it is" in str(trials) and "1.2" in str(trials) and "2.0 KiB" in str(trials) and "nan" not in str(trials)
    assert trials._repr_html_().count("<tr>") == 3 and "&lt;none&gt;" in trials._repr_html_()


def test_time_against_quality(pipe):
    table = time_against_quality({"all": pipe, "cached": fast_pipeline(pipe, 2)}, grid(1), num_inference_steps=2, guidance_scale=1.0)
    assert table.count("\n") == 3 and "| all |" in table and "| 1.00 |" in table


# ---- importing
def test_importing_the_package_takes_little_more_than_torch():
    def least(module: str) -> float:
        code = f"import time; t = time.process_time(); import {module}; print(time.process_time() - t)"
        return min(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(2))
    with warnings.catch_warnings(): assert least("animatediff_lit.pipeline") <= 1.3 * least("torch")
