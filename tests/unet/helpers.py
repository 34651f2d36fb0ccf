"""What the tests of U-Nets share: small U-Nets, specs that fit their heads, comparisons."""

import contextlib
import logging

import torch
from diffusers import (
    UNet2DConditionModel,
    UNet2DModel,
)

from tests.helpers import spec_of
from vit_rope.positions import Rotary, schemes
from vit_rope.unet import (
    RopeUNet2DModel,
)

FITTING = {"comrope_ap": "comrope_ap(block=4)", "comrope_ld": "comrope_ld(block=4)"}  # for heads of 8 channels
SPECS = [FITTING.get(name, spec_of(name)) for name in schemes() if name != "xpos"]  # which has one axis
SPECS += ["learned + mixed", 'sincos + axial(pairs="half")']
SMALL = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
TEXT = SMALL | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
SELF = ".attentions.0.transformer_blocks.0.attn1"  # of the conditional U-Net


def plain(**changes):
    return UNet2DModel(**SMALL | changes).eval()


def text(**changes):
    return UNet2DConditionModel(**TEXT | changes).eval()


def call(model, height=16, width=16, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 1, height, width, generator=generator).to(dtype)
    words = torch.randn(batch, 5, 12, generator=generator).to(dtype)
    inputs = (x, 5, words) if hasattr(model, "encoder_hid_proj") else (x, 5)
    return model(*inputs, return_dict=False)[0]


def without_rotation(model):
    """The same model, with the identity for every rotation."""
    for module in model.modules():
        if isinstance(module, Rotary):
            module.initial = torch.zeros_like(module.initial)
            if module.freqs is not None:
                torch.nn.init.zeros_(module.freqs)
    return model


def gap(a, b):
    return (a - b).abs().max().item()


def with_large_tables(model):
    """The same model, with tables as large as trained ones; at the start they are small."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("position.table"):
                parameter.normal_()
    return model


@contextlib.contextmanager
def log(caplog):
    """Records of diffusers' own loggers, which do not propagate."""
    names = "configuration_utils", "models.modeling_utils", "models.attention_processor"
    loggers = [logging.getLogger(f"diffusers.{name}") for name in names]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)


def rope(spec="axial", **changes):
    return RopeUNet2DModel(**SMALL | changes, position=spec).eval()
