"""Positions in the Unet of denoising-diffusion-pytorch."""

import copy
import re

import pytest
import torch

from tests.unet.helpers import SPECS, gap, with_large_tables, without_rotation
from vit_rope.unet import (
    add_positions,
    remove_positions,
    set_positions,
)
from vit_rope.unet.maps import build_at, map_layout


@pytest.fixture
def lucid():
    package = pytest.importorskip("denoising_diffusion_pytorch", reason="denoising-diffusion-pytorch is not installed")

    def make(**options):
        torch.manual_seed(0)
        options = {"dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2, "channels": 1} | options
        return package.Unet(16, **options).eval()

    return make


def denoise(model, height=16, width=16):
    generator = torch.Generator().manual_seed(1)
    return model(torch.randn(2, 1, height, width, generator=generator), torch.tensor([3, 9]))


@pytest.mark.parametrize("options", [{}, {"full_attn": True}, {"full_attn": True, "flash_attn": True}])
@torch.no_grad()
def test_identity_is_stock_and_rotation_is_not(lucid, options):
    model = lucid(**options)
    for size in ((16, 16), (8, 24)):
        stock = denoise(model, *size)
        for spec in SPECS:
            try:
                positioned = add_positions(copy.deepcopy(model), spec, sample_size=16)
            except ValueError as error:
                assert re.search("level .*linear attention has", str(error))  # noqa: PT017
                assert not options
                continue
            if spec in ("none", "axial", "mixed"):  # of which rotation is all they do
                assert gap(denoise(without_rotation(copy.deepcopy(positioned)), *size), stock) < 2e-6
            if spec != "none":
                assert gap(denoise(with_large_tables(positioned), *size), stock) > 1e-5
            assert torch.equal(denoise(remove_positions(positioned), *size), stock)
            assert set(positioned.state_dict()) == set(model.state_dict())


@torch.no_grad()
def test_attention_is_relative_and_its_memory_has_no_position(lucid):
    def module(origin, full):
        return add_positions(lucid(full_attn=full), "axial", origin=origin, sample_size=8).downs[0][2]

    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    for full in (True, False):
        original, shifted = (module(origin, full)(x) for origin in (0.0, (3.0, -2.0)))
        assert gap(original, shifted) > 1e-6  # memory sits at the origin, un-rotated
    original, shifted = (module(origin, False) for origin in (0.0, (3.0, -2.0)))
    for linear in (original, shifted):
        linear.mem_kv[0] = -1e4  # keys whose softmax is zero
    assert gap(original(x), shifted(x)) < 1e-5


@torch.no_grad()
def test_linear_attention_rotates_the_numerator_only():
    lucidrains = pytest.importorskip("vit_rope.unet.lucidrains", reason="denoising-diffusion-pytorch is not installed")
    layout = map_layout(8, 1, 8, 0, (3, 4), "index", 0.0)
    encoding = build_at("", 0, "axial", layout, "")(layout.coords())
    q, k, v = torch.rand(3, 1, 1, 12, 8).unbind(0)
    out = lucidrains.attend_features(q, k, v, encoding)
    cos_sin = encoding.q.rotation[0][0, :, 0]  # (N, R, 2)
    rotation = torch.stack(
        [torch.block_diag(*(torch.stack((c, -s, s, c)).view(2, 2) for c, s in pairs)) for pairs in cos_sin]
    )
    for m in range(12):  # RoFormer, equation 19, one token at a time
        weights = torch.stack([(rotation[m] @ q[0, 0, m]) @ (rotation[n] @ k[0, 0, n]) for n in range(12)])
        torch.testing.assert_close(out[0, 0, m], weights @ v[0, 0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="linear attention has no logits"):
        lucidrains.attend_features(q, k, v, encoding._replace(biases=[torch.zeros(1, 1, 12, 12)]))


def test_bad_input(lucid):
    with pytest.raises(ValueError, match="does not know the size of its training images; give sample_size"):
        add_positions(lucid(), "axial")
    wrong = r"downs.0.2 \(level 0, 16 channels, 2 heads of 6\).*attn_dim_head of the Unet sets the channels of a head"
    with pytest.raises(ValueError, match=wrong):
        add_positions(lucid(attn_dim_head=6), "axial", sample_size=16)
    with pytest.raises(ValueError, match=r"positions already; call set_positions .*, or remove_positions first"):
        add_positions(add_positions(lucid(), "axial", sample_size=16), "axial", sample_size=16)
    with pytest.raises(ValueError, match="this Unet has no positions to remove"):
        remove_positions(lucid())
    import denoising_diffusion_pytorch as package

    with pytest.raises(TypeError, match="only Unet can have positions, not KarrasUnet"):
        add_positions(package.KarrasUnet(image_size=8, dim=8), "axial", sample_size=8)


def test_training_and_sampling(lucid):
    import denoising_diffusion_pytorch as package

    model = add_positions(lucid(), "learned + mixed", sample_size=8)
    diffusion = package.GaussianDiffusion(model, image_size=8, timesteps=4)
    diffusion(torch.rand(2, 1, 8, 8)).backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if ".position." in name)


@torch.no_grad()
def test_another_spec_keeps_what_was_learned_or_changes_nothing(lucid):
    for options in ({}, {"full_attn": True}):
        model = add_positions(lucid(**options), "mixed", sample_size=16)
        before, weights = denoise(model), copy.deepcopy(model.state_dict())
        for spec in ("learned", "axail"):
            with pytest.raises(ValueError, match=r"downs.0.2 \(level 0"):
                set_positions(model, spec)
            assert torch.equal(denoise(model), before)
        assert set_positions(model, "interpolate(mixed, factor=2)") is model
        assert gap(denoise(model), before) > 1e-5
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="this Unet has no positions to change; call add_positions"):
        set_positions(lucid(), "mixed")
