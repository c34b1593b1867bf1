"""Recorded weights are those computed by hand, recording changes no bit and leaves nothing behind, and interventions obey their laws."""
from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from einops import rearrange
from torch import nn

from animatediff_lit import attention_maps
from animatediff_lit.attention_maps import (KINDS, KNOWN, MEASURES, attention_layers, attention_weights, distances, intervene, known_answer,
                                            record_attention, row_measures, tiles)
from animatediff_lit.debugging import reroll
from animatediff_lit.motion import MotionModule
from animatediff_lit.pipeline import AnimationPipeline
from animatediff_lit.temporal import MemoryEfficientAttention, TemporalAttention
from animatediff_lit.unet import UNet3DConditionModel

FRAMES, SIZE = 5, 8
UP = "up_blocks.1.motion_modules.1.transformer_blocks.0.attn1"          # at the full resolution
MID = "mid_block.motion_modules.0.transformer_blocks.0.attn2"           # at half of it


@pytest.fixture(scope="module")
def unet() -> UNet3DConditionModel:
    "Small, with weights as after training."
    torch.manual_seed(0)
    new = UNet3DConditionModel(block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8, num_attention_heads=2, motion_num_attention_heads=2,
                               down_block_types=("CrossAttnDownBlockMotion",) * 2, up_block_types=("CrossAttnUpBlockMotion",) * 2)
    return reroll(new, 3).float().eval()


@pytest.fixture(scope="module")
def clip() -> torch.Tensor: return torch.randn(2, 4, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def words() -> torch.Tensor: return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def pipe() -> AnimationPipeline: return AnimationPipeline.from_pretrained("nano")


@torch.no_grad()
def ask(unet, clip, words, *times, **changes):
    with intervene(unet, **changes): return [unet(clip, t, words) for t in times or (500,)][-1]


def record(unet, clip, words, *times, **wishes):
    with torch.no_grad(), record_attention(unet, **wishes) as recording:
        for t in times or (500,): unet(clip, t, words)
    return recording


def inputs(unet, clip, words, name: str) -> tuple:
    "What the attention `name` is given: its tokens, and the context or None."
    came = []
    hook = unet.get_submodule(name).register_forward_pre_hook(lambda module, args: came.append(args))
    with torch.no_grad(): unet(clip, 500, words)
    hook.remove()
    return came[0][0], came[0][1] if len(came[0]) > 1 else None


def by_hand(layer, x, context=None) -> torch.Tensor:
    "Weights `(n, heads, s, k)` in double precision, one dot product at a time where it matters: no helper of the chapter."
    q, k = (rearrange(to(t).double(), "n s (h d) -> n h s d", h=layer.num_heads) for to, t in ((layer.to_q, x), (layer.to_k, x if context is None else context)))
    scores = torch.einsum("nhsd,nhkd->nhsk", q, k) / math.sqrt(q.shape[-1])
    return scores.exp() / scores.exp().sum(-1, keepdim=True)


# ---- exact
@torch.no_grad()
def test_temporal_weights_are_those_by_hand(unet, clip, words):
    recording = record(unet, clip, words)
    for name in (UP, MID):
        h, w = recording.grid(name)
        wanted = by_hand(unet.get_submodule(name), inputs(unet, clip, words, name)[0]).float().unflatten(0, (2, h, w))[1]        # the last clip
        step = SIZE // h
        for y, x in ((0, 0), (3, 4), (7, 7)):
            torch.testing.assert_close(recording.maps(name, 0, (y, x)), wanted[y // step, x // step], atol=1e-5, rtol=0)
        torch.testing.assert_close(recording.mean_map(name, 0), wanted.mean((0, 1)), atol=1e-5, rtol=0)
        entropy, away = -(wanted * wanted.log()).sum(-1).mean(-1), torch.arange(FRAMES)[:, None] - torch.arange(FRAMES)
        for measure, value in zip(MEASURES, (entropy, (wanted * away.abs()).sum(-1).mean(-1), wanted.diagonal(dim1=-2, dim2=-1).mean(-1))):
            torch.testing.assert_close(recording.scalar(name, 0, measure), value.movedim(-1, 0), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(recording.score(name, 0, measure), value.mean((0, 1)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_self_and_cross_weights_are_those_by_hand(unet, clip, words):
    recording = record(unet, clip, words, kinds=("self", "cross"))
    own, asks = "up_blocks.1.attentions.0.transformer_blocks.0.attn1", "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    wanted = by_hand(unet.get_submodule(own), inputs(unet, clip, words, own)[0]).float().unflatten(0, (2, FRAMES))[1]            # f heads s s
    torch.testing.assert_close(recording.maps(own, 0, (3, 4)), wanted[:, :, 3 * 8 + 4].transpose(0, 1).unflatten(-1, (8, 8)), atol=1e-5, rtol=0)
    y, x = torch.arange(64) // 8, torch.arange(64) % 8
    away = ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2).float().sqrt()
    torch.testing.assert_close(recording.scalar(own, 0, "reach").flatten(1), (wanted * away).sum(-1).mean(0), atol=1e-4, rtol=1e-4)
    wanted = by_hand(unet.get_submodule(asks), *inputs(unet, clip, words, asks)).float()[1].mean(0)                              # (f s) n
    for i in range(6): torch.testing.assert_close(recording.word_map(i, 0, asks).flatten(), wanted[:, i], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="has no 'reach': use entropy"): recording.scalar(asks, 0, "reach")


def test_tiles_cover_everything_once_and_change_nothing(unet, clip, words, monkeypatch):
    for size in ((7, 2, 5, 5), (3, 2, 16, 16), (1, 1, 1, 1)):
        for most in (1, 9, 100, 10 ** 6):
            seen = torch.zeros(size[0], size[2])
            for s, r in tiles(*size, most=most):
                seen[s, r] += 1
                assert seen[s, r].numel() * size[1] * size[3] <= max(most, size[1] * size[3])
            assert (seen == 1).all()
    whole = record(unet, clip, words, kinds=KINDS)
    monkeypatch.setattr(attention_maps, "tiles", partial(tiles, most=300))
    for (key, a), b in zip(whole.seen.items(), record(unet, clip, words, kinds=KINDS).seen.values()):
        torch.testing.assert_close(a.scalars, b.scalars, msg=str(key))
        if a.mean is not None: torch.testing.assert_close(a.mean, b.mean, msg=str(key))


def test_follow_goes_the_whole_way(unet, clip, words):
    recording = record(unet, clip, words)
    path = recording.follow(UP, 0, (2, 5), head=1, query_frame=3, key_frame=0)
    assert path["dot"] == pytest.approx(path["products"].sum().item(), abs=1e-5) == pytest.approx((path["q"] @ path["k"]).item(), abs=1e-5)
    assert path["scale"] == math.sqrt(len(path["q"])) and path["score"] == pytest.approx(path["dot"] / path["scale"], abs=1e-5)
    torch.testing.assert_close(path["scores"].softmax(0), path["weights"])
    assert path["weight"] == pytest.approx(recording.maps(UP, 0, (2, 5))[1, 3, 0].item(), abs=1e-6)


def test_half_precision_is_weighed_in_float32():
    q, k = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0)).half()
    assert attention_weights(q, k).dtype == torch.float32
    torch.testing.assert_close(attention_weights(q, k), attention_weights(q.float(), k.float()))


# ---- no bit changed, nothing left
def traces(network: nn.Module) -> int:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(sum(len(getattr(m, name)) for name in hooks) + ("attend" in vars(m)) for m in network.modules())


@pytest.mark.parametrize("guidance", (1, 2))
def test_a_whole_sampling_keeps_every_bit(pipe, guidance):
    latents, options = [], dict(num_inference_steps=3, guidance_scale=guidance, video_length=6, seed=3, progress=False)
    options["callback"] = lambda step, t, z: latents.append(z.clone())
    plain = pipe("a red star moving left", **options)
    with record_attention(pipe, kinds=KINDS) as recording: recorded = pipe("a red star moving left", **options)
    assert recording.steps == [0, 1, 2] and recording.frames == 6 and len(recording.layers) == 28
    assert all(torch.equal(a, b) for a, b in zip(latents[:3], latents[3:], strict=True)) and (plain.frames == recorded.frames).all()
    assert traces(pipe.unet) == 0 and "encode_prompt" not in vars(pipe)


def test_guidance_keeps_the_half_with_the_text(pipe):
    "Without guidance there is only that half, and at the first step it sees the same noise."
    options = dict(num_inference_steps=2, video_length=4, progress=False)
    recordings = []
    for guidance in (1, 3):
        with record_attention(pipe, kinds=KINDS, steps=[0]) as recording: pipe("a red star moving left", guidance_scale=guidance, **options)
        recordings.append(recording)
    for key, record in recordings[0].seen.items():
        torch.testing.assert_close(record.scalars, recordings[1].seen[key].scalars, atol=1e-4, rtol=1e-4)


def test_of_a_list_of_prompts_the_first_is_kept(pipe):
    options = dict(num_inference_steps=2, guidance_scale=1, video_length=4, progress=False)
    with record_attention(pipe, pixels=[]) as one: pipe("a red star moving left", **options)
    with record_attention(pipe, pixels=[]) as two: pipe(["a red star moving left", "a blue moon growing"], **options)
    assert two.tokens == one.tokens and two.steps == [0, 1]
    for key, record in one.seen.items(): torch.testing.assert_close(record.scalars, two.seen[key].scalars)


def test_nothing_is_left_behind_even_after_an_error(unet, clip, words):
    with record_attention(unet, kinds=KINDS): assert traces(unet) > 28
    assert traces(unet) == 0
    for changes in ({}, dict(shuffle_frames=range(FRAMES), window=1, zero_heads=[("", 0)], steps=[0])):
        with pytest.raises(ZeroDivisionError), intervene(unet, **changes), record_attention(unet): unet(clip, 500, words); raise ZeroDivisionError
        assert traces(unet) == 0
    with pytest.raises(ValueError, match="outside of the latents"): record(unet, clip, words, pixels=[(0, SIZE)])
    assert traces(unet) == 0


def test_a_subset_is_only_that(unet, clip, words):
    recording = record(unet, clip, words, 900, 500, 100, layers=["mid_block", UP], steps=[0, 2], heads=[1], pixels=[(3, 4)])
    assert set(recording.layers) == {UP, MID, MID.replace("attn2", "attn1")} and recording.steps == [0, 2] and recording.timesteps == [900, 100]
    everything = record(unet, clip, words, 900, 500, 100)
    assert recording.heads(UP) == 1 and everything.heads(UP) == 2 and recording.kind(UP) == "temporal"
    torch.testing.assert_close(recording.mean_map(UP, 2), everything.mean_map(UP, 2)[1:])
    torch.testing.assert_close(recording.maps(UP, 2, (3, 4)), everything.maps(UP, 2, (3, 4))[1:])
    assert everything.layers[0].startswith("down_blocks.0.motion_modules.0") and everything.layers[-1] == UP.replace("attn1", "attn2")
    with pytest.raises(ValueError, match=r"full maps of pixel \(0, 0\) were not kept"): recording.maps(UP, 2, (0, 0))


def test_the_details_are_bounded(unet, clip, words):
    small, whole = record(unet, clip, words, budget_mb=0.05), record(unet, clip, words)
    details = lambda r: sum(t.numel() * t.element_size() for record in r.seen.values() for t in record.kept)
    assert 0 < details(small) <= 50_000 < details(whole) and small.layers == whole.layers
    assert details(whole) == 256_000_000 - whole.room and details(record(unet, clip, words, pixels=[])) == 0
    torch.testing.assert_close(small.mean_map(UP, 0), whole.mean_map(UP, 0))


def test_words_have_names(pipe):
    with record_attention(pipe, kinds=["cross"]) as recording: pipe("a star moving left", num_inference_steps=2, video_length=4, progress=False)
    assert recording.tokens[1:5] == ["a", "star", "moving", "left"]
    assert recording.word_map("Star").shape == (4, 8, 8)
    torch.testing.assert_close(sum(recording.word_map(i) for i in range(16)), torch.ones(4, 8, 8))
    torch.testing.assert_close(recording.word_map("star"), torch.stack([recording.word_map("star", s) for s in (0, 1)]).mean(0))
    with pytest.raises(ValueError, match="'moon' is not in the prompt: its tokens are .* star"): recording.word_map("moon")
    with pytest.raises(ValueError, match="16 is not in the prompt"): recording.word_map(16)


# ---- sentences
@pytest.mark.parametrize("wishes, words_", [
    (dict(kinds=["motion"]), "'motion' is no kind of attention: use some of temporal, self, cross."), (dict(layers=["left_block"]), "No attention of kind temporal has 'left_block'"),
    (dict(steps=[-1]), "steps is"), (dict(steps=3), "steps is 3: give whole numbers"), (dict(steps=[7]), "Steps \\[7\\] were asked for, and the sampling had only steps 0 to 0"),
    (dict(pixels=[(8, 0)]), "outside of the latents: rows go from 0 to 7"), (dict(pixels=[3]), "pixels is"), (dict(heads=[2]), "Head 2 was asked for, and .* has heads 0 to 1")])
def test_bad_wishes_get_a_sentence(unet, clip, words, wishes, words_):
    with pytest.raises(ValueError, match=words_): record(unet, clip, words, **wishes)
    assert traces(unet) == 0


def test_what_was_not_recorded_gets_a_sentence(unet, clip, words):
    recording = record(unet, clip, words, 900, 500, steps=[1], pixels=[(0, 0)], kinds=["temporal", "self"])
    own = next(name for name in recording.layers if recording.kind(name) == "self")
    for call, sentence in ((lambda: recording.mean_map(UP, 0), "Step 0 was not recorded: recorded are 1"), (lambda: recording.mean_map("attn1", 1), "names .* of the recorded"),
                           (lambda: recording.scalar(UP, 1, "length"), "has no 'length'"), (lambda: recording.maps(UP, 1, (8, 8)), "outside of the latents"),
                           (lambda: recording.mean_map(own, 1), "name a temporal layer"), (lambda: recording.word_map("star"), "record with kinds"),
                           (lambda: recording.follow(UP, 1, (0, 0), 2, 0, 0), "head is 2: give a number from 0 to 1")):
        with pytest.raises(ValueError, match=sentence): call()


def test_one_recording_one_sampling(unet, clip, words):
    with pytest.raises(RuntimeError, match="being recorded already"), record_attention(unet), record_attention(unet): pass
    with pytest.raises(RuntimeError, match="one sampling, and a second one began"): record(unet, clip, words, 500, 100, 500)
    with pytest.raises(RuntimeError, match="open intervene first"), record_attention(unet), intervene(unet, window=1): pass
    with pytest.raises(RuntimeError, match="open intervene first, once"), intervene(unet, window=1), intervene(unet, temperature=2.0): pass
    assert traces(unet) == 0


def test_what_has_no_attention_gets_a_sentence():
    with pytest.raises(TypeError, match="this is a str"), record_attention("nano"): pass
    with pytest.raises(ValueError, match="no attention of kind cross"), record_attention(TemporalAttention(4, 2), ["cross"]): pass
    with pytest.raises(ValueError, match="Only clips"):
        layer = TemporalAttention(4, 2)
        with record_attention(layer): layer(torch.zeros(3, 5, 4))


# ---- interventions
def close(a, b): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_no_change_is_no_change(unet, clip, words):
    with intervene(unet): assert traces(unet) == 0
    usual = ask(unet, clip, words)
    assert torch.equal(ask(unet, clip, words, window=0, temperature=5.0, drop_position=True, zero_heads=[("", 0)], steps=[1]), usual)
    close(ask(unet, clip, words, window=FRAMES - 1), usual)
    close(ask(unet, clip, words, temperature=1 + 1e-7), usual)
    close(ask(unet, clip, words, shuffle_frames=range(FRAMES)), usual)
    assert not torch.allclose(ask(unet, clip, words, temperature=5.0), usual, atol=1e-3)


def test_only_the_positions_know_the_order(unet, clip, words):
    order = [3, 0, 4, 1, 2]
    back = [order.index(i) for i in range(FRAMES)]
    usual, shuffled = ask(unet, clip, words), ask(unet, clip, words, shuffle_frames=order)
    assert not torch.allclose(usual, shuffled, atol=1e-3)
    close(shuffled, ask(unet, clip[:, :, back], words)[:, :, order])
    bag = ask(unet, clip, words, drop_position=True)
    assert not torch.allclose(bag, usual, atol=1e-3)
    close(ask(unet, clip[:, :, order], words, drop_position=True), bag[:, :, order])
    close(ask(unet, clip, words, drop_position=True, shuffle_frames=order), bag)


def test_maps_show_the_change(unet, clip, words):
    def maps(**changes):
        with intervene(unet, **changes): return record(unet, clip, words).maps(UP, 0, (3, 4))
    usual = maps()
    near = (torch.arange(FRAMES)[:, None] - torch.arange(FRAMES)).abs() <= 1
    band = maps(window=1)
    assert (band[:, ~near] == 0).all()
    torch.testing.assert_close(maps(window=0), torch.eye(FRAMES).expand(2, -1, -1))
    torch.testing.assert_close(maps(temperature=1e7), torch.full((2, FRAMES, FRAMES), 1 / FRAMES), atol=1e-4, rtol=0)
    torch.testing.assert_close(maps(temperature=1e-7), torch.nn.functional.one_hot(maps(temperature=1e-7).argmax(-1), FRAMES).float(), atol=1e-4, rtol=0)
    assert maps(temperature=0.5).amax(-1).mean() > usual.amax(-1).mean()


@torch.no_grad()
def test_a_window_and_a_temperature_at_one_layer():
    torch.manual_seed(0)
    layer, x = TemporalAttention(8, 2), torch.randn(1, 8, 6, 2, 2)
    with intervene(layer, window=0): alone = layer(x)
    mixed = layer.to_out[0](layer.to_v(rearrange(x, "b c f h w -> b f h w c")))                # every frame takes its own value
    torch.testing.assert_close(alone, rearrange(mixed, "b f h w c -> b c f h w"))
    hot = TemporalAttention(8, 2)
    hot.load_state_dict(layer.state_dict())
    hot.to_q.weight /= 3
    with intervene(layer, temperature=3.0): torch.testing.assert_close(layer(x), hot(x))


@torch.no_grad()
def test_a_zeroed_head_is_silent():
    torch.manual_seed(0)
    module, x = MotionModule(8, num_heads=2, norm_groups=4), torch.randn(1, 8, 6, 2, 2)
    module.proj_out.reset_parameters()
    with intervene(module, zero_heads=[("attn2", 1)]): silent = module(x)
    assert not torch.allclose(silent, module(x))
    module.transformer_blocks[0].attn2.to_out[0].weight[:, 4:] = 0                             # what head 1 says is not heard
    torch.testing.assert_close(silent, module(x))


@torch.no_grad()
def test_changes_at_some_steps_only(unet, clip, words):
    with intervene(unet, temperature=50.0, steps=[1]), record_attention(unet) as recording:
        for t in (900, 500, 100): unet(clip, t, words)
    plain = record(unet, clip, words, 900, 500, 100)
    for step in (0, 2): torch.testing.assert_close(recording.maps(UP, step, (0, 0)), plain.maps(UP, step, (0, 0)))
    assert recording.score(UP, 1, "entropy").min() > math.log(FRAMES) - 0.01 > plain.score(UP, 1, "entropy").max()


@pytest.mark.parametrize("changes, sentence", [
    (dict(shuffle_frames=[0, 0, 1]), "give every frame number once"), (dict(shuffle_frames=[1, 0]), "2 numbers and the clip 5 frames"), (dict(window=-1), "window is -1"),
    (dict(window=1.5), "window is 1.5"), (dict(temperature=0), "temperature is 0: give a number above 0"), (dict(temperature=math.nan), "temperature is nan"),
    (dict(zero_heads=[("mid_block", 2)]), "head 2 of mid_block.* has heads 0 to 1"), (dict(zero_heads=[("nowhere", 0)]), "'nowhere' in its name"), (dict(steps=[]), "steps is")])
def test_bad_changes_get_a_sentence(unet, clip, words, changes, sentence):
    with pytest.raises(ValueError, match=sentence): ask(unet, clip, words, **changes)
    assert traces(unet) == 0


# ---- known answers, and other layers
@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("frames, size", ((16, 8), (7, 3)))
def test_known_answers_pass(name, frames, size):
    answer = known_answer(name, frames, size)
    assert answer.passed and answer.difference < 1e-6 and answer.recording.frames == frames


@pytest.mark.parametrize("name", ("uniform", "dot"))
def test_known_answers_can_fail(name, monkeypatch):
    "With an instrument that forgets the root of d, or that looks along the wrong axis."
    wrong = (lambda q, k: (3 * q @ k.mT).softmax(-1)) if name == "dot" else (lambda q, k: torch.eye(q.shape[-2]).expand(*q.shape[:-1], -1))
    monkeypatch.setattr(attention_maps, "attention_weights", wrong)
    assert not known_answer(name).passed
    with pytest.raises(ValueError, match="'rain' is no known answer: use one of identity, uniform, dot."): known_answer("rain")


@torch.no_grad()
def test_the_tiled_attention_is_recorded_too():
    torch.manual_seed(0)
    tiled, plain, x = MemoryEfficientAttention(8, 2, tile=2), TemporalAttention(8, 2), torch.randn(1, 8, 6, 2, 3)
    plain.load_state_dict(tiled.state_dict())
    recordings = []
    with ExitStack() as stack:
        for layer in (tiled, plain):
            recordings.append(stack.enter_context(record_attention(layer)))
            layer(x)
    assert recordings[0].layers == ["attention"] and recordings[0].timesteps == [None] and recordings[0].grid("attention") == (2, 3)
    torch.testing.assert_close(*(r.maps("attention", 0, (1, 2)) for r in recordings))


def test_every_attention_of_the_structures_is_found():
    with torch.device("meta"): unet = UNet3DConditionModel.from_preset("sd15-v2")
    assert [len(attention_layers(unet, [kind])) for kind in KINDS] == [42, 16, 16]


def test_measures_of_maps_that_are_known():
    away = distances("temporal", (1, 4, 1, 1))
    assert away.tolist() == [[0, 1, 2, 3], [1, 0, 1, 2], [2, 1, 0, 1], [3, 2, 1, 0]]
    entropy, reach, diagonal = row_measures(torch.full((4, 4), 0.25), away)
    torch.testing.assert_close(entropy, torch.full((4,), math.log(4)))
    assert reach.tolist() == [1.5, 1.0, 1.0, 1.5] and diagonal.tolist() == [0.25] * 4
    assert distances("self", (1, 9, 2, 2))[0].tolist() == pytest.approx([0, 1, 1, math.sqrt(2)])
