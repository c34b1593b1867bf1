"""The motion module against its references: diffusers' class, and the original's arithmetic written out."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from einops import rearrange

from animatediff_lit.motion import MOTION_NORMS, MotionContext, MotionModule, TemporalTransformerBlock

FRAMES = (1, 4, 5, 16)
SHAPES = [dict(channels=32, heads=8, groups=32, layers=1), dict(channels=24, heads=3, groups=4, layers=2), dict(channels=48, heads=4, groups=8, layers=1)]


def shake(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    "Noise on every parameter and buffer, as after training: nothing is zero or one any more."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()): t += 0.1 * torch.randn(t.shape, generator=generator)
    return module


def ours_of(channels: int, heads: int, groups: int, layers: int, motion_norm: str = "all_frames", **more) -> MotionModule:
    return MotionModule(channels, num_heads=heads, norm_groups=groups, num_layers=layers, motion_norm=motion_norm, **more)


def theirs_of(channels: int, heads: int, groups: int, layers: int) -> AnimateDiffTransformer3D:
    return AnimateDiffTransformer3D(heads, channels // heads, in_channels=channels, num_layers=layers, norm_num_groups=groups,
                                    positional_embeddings="sinusoidal", num_positional_embeddings=32)


def drifting(channels: int, frames: int, seed: int = 0) -> torch.Tensor:
    "Two videos whose frames differ in brightness, so that the statistics of one frame are not those of all."
    x = torch.randn(2, channels, frames, 3, 5, generator=torch.Generator().manual_seed(seed))
    return x * (1 + torch.arange(frames) / 4)[:, None, None] + torch.arange(frames)[:, None, None] / 2


def original(weights: dict[str, torch.Tensor], x: torch.Tensor, frames: int, heads: int, groups: int, layers: int) -> torch.Tensor:
    "What the original v2 and v3 compute, on frames folded into the batch `(b f) c h w`: GroupNorm of each frame alone."
    n, c, h, w = x.shape
    def linear(name, t): return F.linear(t, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
    def layer_norm(name, t): return F.layer_norm(t, (c,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)
    y = F.group_norm(x, groups, weights["norm.weight"], weights["norm.bias"], 1e-6)
    y = linear("proj_in", y.permute(0, 2, 3, 1).reshape(n, h * w, c))                                    # (b f) pixels c
    y = y.reshape(n // frames, frames, h * w, c).transpose(1, 2).reshape(-1, frames, c)                  # (b pixels) f c
    for b in (f"transformer_blocks.{i}" for i in range(layers)):
        for k in "12":
            z = layer_norm(f"{b}.norm{k}", y) + weights[f"{b}.pos_embed.pe"][:, :frames]
            q, k_, v = (linear(f"{b}.attn{k}.to_{p}", z).reshape(len(z), frames, heads, c // heads).transpose(1, 2) for p in "qkv")
            scores = torch.softmax(q @ k_.transpose(2, 3) * (c // heads) ** -0.5, dim=-1)
            y = y + linear(f"{b}.attn{k}.to_out.0", (scores @ v).transpose(1, 2).reshape(len(z), frames, c))
        value, gate = linear(f"{b}.ff.net.0.proj", layer_norm(f"{b}.norm3", y)).chunk(2, dim=-1)
        y = y + linear(f"{b}.ff.net.2", value * F.gelu(gate))
    y = linear("proj_out", y).reshape(n // frames, h, w, frames, c).permute(0, 3, 4, 1, 2)
    return x + y.reshape(n, c, h, w)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def fold(x: torch.Tensor) -> torch.Tensor: return rearrange(x, "b c f h w -> (b f) c h w")
def unfold(x: torch.Tensor, frames: int) -> torch.Tensor: return rearrange(x, "(b f) c h w -> b c f h w", f=frames)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_all_frames_is_diffusers(shape):
    theirs = shake(theirs_of(**shape))
    ours = ours_of(**shape)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for frames in FRAMES:
        x = drifting(shape["channels"], frames)
        assert relative(ours(x), unfold(theirs(fold(x), num_frames=frames), frames)) < 1e-6


@pytest.mark.parametrize("motion_norm", ["per_frame", "v1"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_per_frame_is_the_original(shape, motion_norm):
    ours = shake(ours_of(**shape, motion_norm=motion_norm))
    other = ours_of(**shape)
    other.load_state_dict(ours.state_dict())
    for frames in FRAMES:
        x = drifting(shape["channels"], frames)
        wanted = unfold(original(ours.state_dict(), fold(x), frames, shape["heads"], shape["groups"], shape["layers"]), frames)
        assert relative(ours(x), wanted) < 1e-6
        assert (relative(other(x), wanted) > 1e-3) == (frames > 1)               # the other convention is seen, but not at one frame


@pytest.mark.parametrize("motion_norm", MOTION_NORMS)
@pytest.mark.parametrize("frames", [1, 2, 7, 32])
def test_a_new_module_is_the_identity(motion_norm, frames):
    module, x = MotionModule(32, motion_norm=motion_norm), torch.randn(2, 32, frames, 3, 4)
    assert (module(x) - x).abs().max() == 0
    assert (shake(module)(x) - x).abs().max() > 0.1                              # and it is not because it never does anything


def test_gradients_arrive_first_in_the_last_layer_then_everywhere():
    module, x, wanted = MotionModule(16, num_heads=4, norm_groups=8, num_layers=2), *torch.randn(2, 2, 16, 5, 3, 3)
    def with_gradient():
        module.zero_grad()
        (module(x) - wanted).square().mean().backward()
        return {name for name, p in module.named_parameters() if p.grad.any()}
    assert with_gradient() == {"proj_out.weight", "proj_out.bias"}
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert with_gradient() == {name for name, _ in module.named_parameters()}


@torch.no_grad()
def test_position_encodings_stay_out_of_the_residual():
    block, tokens = TemporalTransformerBlock(8, num_heads=2), torch.randn(6, 5, 8)
    for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
        layer.weight.zero_(), layer.bias.zero_()
    assert torch.equal(block(tokens), tokens)


@torch.no_grad()
def test_frames_meet_in_order_and_pixels_do_not():
    block = shake(TemporalTransformerBlock(8, num_heads=2))
    tokens, order = torch.randn(6, 5, 8), torch.tensor([3, 0, 4, 1, 2])
    changed = tokens.clone()
    changed[2, -1] += torch.randn(8)                                    # not a constant: LayerNorm would take that away
    moved = (block(changed) - block(tokens)).abs().amax(dim=2)
    others = torch.arange(6) != 2
    assert moved[2].min() > 1e-4 and moved[others].max() == 0
    assert not torch.allclose(block(tokens[:, order]), block(tokens)[:, order], atol=1e-3)
    block.pos_embed.pe.zero_()
    torch.testing.assert_close(block(tokens[:, order]), block(tokens)[:, order])


@pytest.mark.parametrize("motion_norm", MOTION_NORMS)
@torch.no_grad()
def test_a_batch_gives_what_its_members_give(motion_norm):
    module, x = shake(ours_of(24, 4, 8, 1, motion_norm)), drifting(24, 5)
    torch.testing.assert_close(module(x), torch.cat([module(video[None]) for video in x]))


@torch.no_grad()
def test_context():
    module, x, context = shake(MotionModule(16, 3, num_heads=2, norm_groups=4, context_dim=6)), torch.randn(2, 16, 5, 3, 3), torch.randn(2, 7, 6)
    assert module.context.down.out_features == 3
    assert relative(module(x, context), module(x)) > 1e-3
    torch.testing.assert_close(module(x, context)[1:], module(x[1:], context[1:]))          # each video has its own
    for p in module.context.up.parameters(): p.zero_()
    assert torch.equal(module(x, context), module(x))
    ignorant = shake(MotionModule(16, num_heads=2, norm_groups=4))
    assert torch.equal(ignorant(x, torch.randn(2, 77, 768)), ignorant(x))
    assert not any("context" in name for name in ignorant.state_dict())


def test_a_new_context_learns():
    module, x = shake(MotionModule(16, num_heads=2, norm_groups=4)), torch.randn(2, 16, 5, 3, 3)
    module.context = MotionContext(6, 16, rank=3)
    module(x, torch.randn(2, 7, 6)).square().mean().backward()
    assert module.context.up.weight.grad.any() and module.context.up.bias.grad.any()


def test_switched_off():
    module, x = shake(MotionModule(32)), torch.randn(1, 32, 40, 2, 2)
    module.enabled = False
    assert module(x) is x


@pytest.mark.parametrize("channels", [320, 640, 1280])
def test_parameter_count(channels):
    with torch.device("meta"): module = MotionModule(channels)
    assert sum(p.numel() for p in module.parameters()) == 22 * channels ** 2 + 21 * channels
    assert len(list(module.parameters())) == 26 and len(module.state_dict()) == 27


@pytest.mark.parametrize("make, message", [
    (lambda: MotionModule(30), "30 channels do not divide into 32 groups"),
    (lambda: MotionModule(32, num_heads=5), "32 channels do not divide into 5 heads"),
    (lambda: MotionModule(32, motion_norm="v3"), "motion_norm is 'v3': choose one of all_frames, per_frame, v1"),
    (lambda: MotionModule(32)(torch.zeros(4, 32, 8, 8)), r"takes \(batch, channels, frames, height, width\); this tensor has shape \(4, 32, 8, 8\)"),
    (lambda: MotionModule(32, max_frames=24)(torch.zeros(1, 32, 25, 2, 2)), "25 frames but .* 24"),
    (lambda: MotionModule(32, context_dim=6)(torch.zeros(2, 32, 3, 2, 2), torch.zeros(1, 7, 6)), r"motion_context has shape \(1, 7, 6\)"),
    (lambda: MotionModule(32, context_dim=6)(torch.zeros(2, 32, 3, 2, 2), torch.zeros(2, 7, 768)), r"motion_context has shape \(2, 7, 768\)"),
], ids=["groups", "heads", "norm", "rank", "frames", "context batch", "context width"])
def test_bad_input_gets_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as caught: make()
    assert "\n" not in str(caught.value)
