"""Chapters 4 and 5 against diffusers' image layers over random shapes, the properties of every layer, and bad input."""
from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention import FeedForward as ReferenceFeedForward
from diffusers.models.attention_processor import Attention as ReferenceAttention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding as ReferenceEmbedding
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D

from animatediff_lit.blocks import (Downsample, InflatedConv2d, ResnetBlock, TimestepEmbedding, Upsample, VideoGroupNorm, activation,
                                    check_divides, fold_frames, timestep_encoding, unfold_frames)
from animatediff_lit.spatial import Attention, FeedForward, SpatialTransformer, SpatialTransformerBlock

SEEDS = range(8)
FRAMES = (1, 4, 5, 16)
each_seed = pytest.mark.parametrize("seed", SEEDS)


class Draw:
    "A random configuration: everything follows from the seed, and the frames run through 1, 4, 5 and 16."
    def __init__(self, seed: int):
        pick = random.Random(seed)
        torch.manual_seed(seed)
        self.batch, self.frames = pick.choice((1, 2, 3)), FRAMES[seed % len(FRAMES)]
        self.height, self.width = pick.randint(3, 8), pick.randint(3, 8)
        self.groups, self.heads = pick.choice((1, 2, 4, 8)), pick.choice((1, 2, 3, 4, 8))
        self.channels, self.wider = (24 * pick.choice((1, 2)) for _ in range(2))         # groups and heads divide 24
        self.temb, self.text_dim, self.words = pick.randint(5, 40), pick.randint(5, 40), pick.randint(1, 9)
        self.scale, self.depth, self.linear = pick.choice((1.0, 1.5)), pick.choice((1, 2)), seed % 2 == 1
        self.loudness = pick.choice((0.01, 0.1, 1.0))                                    # quiet frames show the eps of a norm

    def video(self) -> torch.Tensor:
        "Frames of different brightness, so that the statistics of one frame are not those of all."
        x = torch.randn(self.batch, self.channels, self.frames, self.height, self.width)
        return self.loudness * (x * (1 + torch.arange(self.frames) / 4)[:, None, None] + torch.arange(self.frames)[:, None, None] / 2)

    def text(self) -> torch.Tensor:
        return torch.randn(self.batch, self.words, self.text_dim)


def shake(module: torch.nn.Module) -> torch.nn.Module:
    "Noise on every parameter, as after training: nothing is zero or one any more."
    with torch.no_grad():
        for p in module.parameters(): p += 0.1 * torch.randn_like(p)
    return module


def assert_same(ours: torch.nn.Module, reference: torch.nn.Module, inputs: tuple, reference_inputs: tuple) -> None:
    "Equal to 1e-5 of the output's size, with the reference's weights; videos are held against folded frames."
    ours.load_state_dict(shake(reference).state_dict(), strict=True)
    more = {"return_dict": False} if isinstance(reference, Transformer2DModel) else {}
    with torch.no_grad(): got, right = ours(*inputs), reference(*reference_inputs, **more)
    if more: right, = right
    if got.ndim == 5: right = unfold_frames(right, got.shape[2])
    assert got.shape == right.shape
    assert (got - right).abs().max() <= 1e-5 * right.abs().max()


# ---- parity
@each_seed
def test_resnet_block(seed):
    d = Draw(seed)
    x, temb = d.video(), torch.randn(d.batch, d.temb)                                    # a time of its own for each video
    ours = ResnetBlock(d.channels, d.wider, d.temb, d.groups, output_scale=d.scale)
    reference = ResnetBlock2D(in_channels=d.channels, out_channels=d.wider, temb_channels=d.temb, groups=d.groups, eps=1e-5, output_scale_factor=d.scale)
    assert_same(ours, reference, (x, temb), (fold_frames(x), temb.repeat_interleave(d.frames, 0)))


@each_seed
def test_resnet_block_with_the_statistics_of_all_frames(seed):
    "The original's v1. diffusers has no such block, so its arithmetic is written out."
    d = Draw(seed)
    x, temb = d.video(), torch.randn(d.batch, d.temb)
    block = shake(ResnetBlock(d.channels, d.wider, d.temb, d.groups, across_frames=True))
    def norm(n, t):                                                                      # float64, group by group
        parts = t.double().unflatten(1, (d.groups, -1))
        parts = (parts - parts.mean((2, 3, 4, 5), keepdim=True)) / (parts.var((2, 3, 4, 5), correction=0, keepdim=True) + 1e-5).sqrt()
        return parts.flatten(1, 2) * n.weight.double()[:, None, None, None] + n.bias.double()[:, None, None, None]
    def conv(c, t): return F.conv3d(t, c.weight.double()[:, :, None], c.bias.double(), padding=(0, c.padding[0], c.padding[1]))
    with torch.no_grad():
        h = conv(block.conv1, F.silu(norm(block.norm1, x)))
        h = h + F.linear(F.silu(temb.double()), block.time_emb_proj.weight.double(), block.time_emb_proj.bias.double())[:, :, None, None, None]
        h = conv(block.conv2, F.silu(norm(block.norm2, h)))
        right = h + (x if block.conv_shortcut is None else conv(block.conv_shortcut, x.double()))
        got = block(x, temb)
    assert (got - right).abs().max() <= 1e-5 * right.abs().max()


@each_seed
def test_down_and_up(seed):
    d = Draw(seed)
    x, padding, size = d.video(), seed % 2, (2 * d.height + seed % 3 - 1, 2 * d.width + 1)
    assert_same(Downsample(d.channels, padding), Downsample2D(d.channels, use_conv=True, padding=padding, name="op"), (x,), (fold_frames(x),))
    for target in (None, size):
        assert_same(Upsample(d.channels), Upsample2D(d.channels, use_conv=True), (x, target), (fold_frames(x), target))


@each_seed
def test_time(seed):
    d = Draw(seed)
    times = torch.randint(0, 1000, (d.batch,))
    assert torch.equal(timestep_encoding(times, d.temb), get_timestep_embedding(times, d.temb, flip_sin_to_cos=True, downscale_freq_shift=0))
    act, condition = random.Random(seed).choice(("silu", "mish", "gelu")), 7 if seed % 2 else None
    inputs = (timestep_encoding(times, d.temb), torch.randn(d.batch, 7) if condition else None)
    assert_same(TimestepEmbedding(d.temb, d.channels, act, condition), ReferenceEmbedding(d.temb, d.channels, act, cond_proj_dim=condition), inputs, inputs)


def test_time_refuses_a_condition_that_it_has_no_layer_for():
    with pytest.raises(ValueError, match="made without cond_proj_dim"): TimestepEmbedding(8, 32)(torch.zeros(1, 8), torch.zeros(1, 7))


@each_seed
def test_spatial_transformer(seed):
    d = Draw(seed)
    x, text = d.video(), d.text()
    ours = SpatialTransformer(d.channels, d.heads, d.text_dim, d.depth, d.groups, d.linear)
    reference = Transformer2DModel(d.heads, d.channels // d.heads, d.channels, num_layers=d.depth, norm_num_groups=d.groups,
                                   cross_attention_dim=d.text_dim, use_linear_projection=d.linear)
    assert_same(ours, reference, (x, text), (fold_frames(x), text.repeat_interleave(d.frames, 0)))


@each_seed
def test_parts_of_the_spatial_transformer(seed):
    d = Draw(seed)
    tokens, text, width = torch.randn(d.batch, 11, d.channels), d.text(), d.channels // d.heads
    assert_same(Attention(d.channels, d.heads), ReferenceAttention(d.channels, heads=d.heads, dim_head=width), (tokens,), (tokens,))
    assert_same(Attention(d.channels, d.heads, d.text_dim), ReferenceAttention(d.channels, d.text_dim, heads=d.heads, dim_head=width), (tokens, text), (tokens, text))
    assert_same(FeedForward(d.channels), ReferenceFeedForward(d.channels, activation_fn="geglu"), (tokens,), (tokens,))
    one_frame = tokens[:, None]
    ours, reference = SpatialTransformerBlock(d.channels, d.heads, d.text_dim), BasicTransformerBlock(d.channels, d.heads, width, cross_attention_dim=d.text_dim)
    ours.load_state_dict(shake(reference).state_dict(), strict=True)
    right = reference(tokens, encoder_hidden_states=text)
    assert (ours(one_frame, text)[:, 0] - right).abs().max() <= 1e-5 * right.abs().max()


# ---- what holds whatever the weights are
def layers(d: Draw) -> dict[str, tuple[torch.nn.Module, tuple]]:
    "Every layer for videos, and what it takes beside the video."
    temb, text = torch.randn(d.batch, d.temb), d.text()
    return {"convolution": (InflatedConv2d(d.channels, d.wider, 3, padding=1), ()), "norm": (VideoGroupNorm(d.groups, d.channels), ()),
            "resnet": (ResnetBlock(d.channels, d.wider, d.temb, d.groups), (temb,)), "down": (Downsample(d.channels), ()),
            "down, padding 0": (Downsample(d.channels, 0), ()), "up": (Upsample(d.channels), ()),
            "transformer": (SpatialTransformer(d.channels, d.heads, d.text_dim, d.depth, d.groups, d.linear), (text,))}


@each_seed
def test_frames_and_videos_do_not_meet(seed):
    d = Draw(seed)
    x = d.video()
    changed = x.clone()
    changed[-1, :, 0] += torch.randn_like(changed[-1, :, 0])
    for name, (layer, more) in layers(d).items():
        with torch.no_grad(): moved = (layer(changed, *more) != layer(x, *more)).flatten(3).any(-1).any(1)
        assert moved[-1, 0] and moved.sum() == 1, name


@each_seed
def test_no_layer_copies_to_fold(seed):
    "Before every convolution and norm inside a layer, and behind it, folding gives the same memory in the right order."
    d = Draw(seed)
    x = unfold_frames(fold_frames(d.video()).contiguous(), d.frames)
    def check(name, tensor):
        images = fold_frames(tensor)
        assert images.data_ptr() == tensor.data_ptr() and images.is_contiguous(), name
    for name, (layer, more) in layers(d).items():
        for part in layer.modules():
            if isinstance(part, (InflatedConv2d, VideoGroupNorm)): part.register_forward_pre_hook(lambda _, given, name=name: check(name, given[0]))
        with torch.no_grad(): check(name, layer(x, *more))


def test_statistics_differ_from_two_frames_on():
    "A test with one frame cannot see the switch, so it must be seen with more."
    d = Draw(3)
    for frames in FRAMES:
        x = d.video()[:, :, :frames]
        per_frame, across = VideoGroupNorm(8, d.channels)(x), VideoGroupNorm(8, d.channels, across_frames=True)(x)
        assert ((per_frame - across).abs().max() > 0.1) == (frames > 1)


@each_seed
def test_words_are_a_set_and_do_not_leak(seed):
    d = Draw(seed)
    x, text = d.video(), d.text()
    layer, _ = layers(d)["transformer"]
    other = text.clone()
    other[-1, 0] += 1.0
    with torch.no_grad():
        out = layer(x, text)
        assert (layer(x, text[:, torch.randperm(d.words)]) - out).abs().max() <= 1e-5 * out.abs().max()
        moved = (layer(x, other) != out).flatten(3).any(-1).any(1)
    assert moved[-1].all() and not moved[:-1].any()


# ---- bad input
SPATIAL = SpatialTransformer(8, 2, context_dim=6, groups=2)
VIDEO, TEXT = torch.zeros(2, 8, 3, 4, 4), torch.zeros(2, 5, 6)
BAD = {
    "images for a video": (lambda: InflatedConv2d(8, 8, 1)(torch.zeros(2, 8, 4, 4)), r"A video tensor has 5 dimensions \(batch, channels, frames, height, width\); this one has shape \(2, 8, 4, 4\): .*unsqueeze\(2\)"),
    "images for the norm": (lambda: VideoGroupNorm(2, 8, across_frames=True)(torch.zeros(2, 8, 4, 4)), "A video tensor has 5 dimensions"),
    "images for the transformer": (lambda: SPATIAL(torch.zeros(2, 8, 4, 4), TEXT), "A video tensor has 5 dimensions"),
    "frames that do not fit": (lambda: unfold_frames(torch.zeros(6, 8, 4, 4), 4), "A batch of 6 images does not divide into videos of 4 frames: give a number of frames that divides 6"),
    "no frames": (lambda: unfold_frames(torch.zeros(6, 8, 4, 4), 0), "does not divide into videos of 0 frames"),
    "groups": (lambda: VideoGroupNorm(8, 12), "12 channels do not divide into 8 groups: choose a number of groups that divides 12"),
    "groups of the wider side": (lambda: ResnetBlock(8, 12, 4, groups=8), "12 channels do not divide into 8 groups"),
    "heads": (lambda: SpatialTransformer(10, 4, 6, groups=2), "10 channels do not divide into 4 heads: choose a number of heads that divides 10"),
    "no parts": (lambda: check_divides(8, 0, "channels", "heads"), "8 channels do not divide into 0 heads"),
    "an activation": (lambda: activation("sillu"), "'sillu' is not an activation known here: use one of silu, "),
    "timesteps in a table": (lambda: timestep_encoding(torch.zeros(2, 1), 8), r"The timesteps have shape \(2, 1\): give one number for each video"),
    "text for every frame": (lambda: SPATIAL(VIDEO, TEXT.repeat_interleave(3, 0)), r"The text has shape \(6, 5, 6\); give \(batch, words, dim\) = \(2, any, 6\): one text for each video, not one for each frame"),
    "text of another width": (lambda: SPATIAL(VIDEO, torch.zeros(2, 5, 7)), r"The text has shape \(2, 5, 7\)"),
    "text without a batch": (lambda: SPATIAL(VIDEO, torch.zeros(5, 6)), r"The text has shape \(5, 6\)"),
    "a context for another batch": (lambda: Attention(8, 2, 6)(torch.zeros(2, 9, 8), TEXT[:1]), r"context of shape \(1, 5, 6\); give \(batch, tokens, dim\) = \(2, any, 6\)"),
    "no context where one is needed": (lambda: Attention(8, 2, 6)(torch.zeros(2, 9, 8)), r"context of shape \(2, 9, 8\); give \(batch, tokens, dim\) = \(2, any, 6\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_sentence(name):
    attempt, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught: attempt()
    assert "\n" not in str(caught.value)
