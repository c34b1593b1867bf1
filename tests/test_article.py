"""The two unit tests of the article that the project started from, at the sizes that it gives."""
from __future__ import annotations

import torch

from animatediff_lit.motion import MotionModule
from animatediff_lit.unet import UNet3DConditionModel


@torch.no_grad()
def test_the_unet_returns_the_shape_of_its_input():
    model = UNet3DConditionModel(in_channels=4, out_channels=4)
    out = model(torch.randn(2, 4, 16, 64, 64), torch.tensor([100]))
    assert out.shape == (2, 4, 16, 64, 64) and out.isfinite().all() and out.std() > 0


@torch.no_grad()
def test_the_motion_module_gives_the_same_twice():
    "A new module would give back its input, and pass whatever it does inside; so its last layer gets weights, as after training."
    module = MotionModule(in_channels=320, motion_rank=64)
    module.proj_out.reset_parameters()
    x, context = torch.randn(2, 320, 16, 64, 64), torch.randn(2, 77, 768)
    first = module(x, context)
    assert first.shape == x.shape and not torch.equal(first, x)
    assert torch.equal(module(x, context), first)
