"""Converted models of timm have the same logits, also after saving and loading; every parameter is
random."""

import re

import pytest
import timm
import torch
from timm.models._hub import save_for_hf

from tests.helpers import difference, images, randomised, shrunken
from vit_rope.convert import from_timm, ropeify

ROTARY = [name for name in timm.list_models(module="eva") if not re.match("eva_|eva02_enormous", name)]
# one name for each combination of options; the other names differ in width and depth
SETTINGS = [
    "eva02_tiny_patch14_336",
    "eva02_base_patch14_224",
    "eva02_base_patch14_448",
    "eva02_base_patch16_clip_224",
    "vit_medium_patch16_rope_reg1_gap_256",
    "vit_mediumd_patch16_rope_reg1_gap_256",
    "vit_betwixt_patch16_rope_reg4_gap_256",
    "vit_small_patch16_rope_224",
    "vit_base_patch16_rope_224",
    "vit_small_patch16_rope_ape_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_pe_core_tiny_patch16_384",
    "vit_pe_core_base_patch16_224",
    "vit_pe_core_gigantic_patch14_448",
    "vit_pe_lang_large_patch14_448",
    "vit_pe_lang_gigantic_patch14_448",
    "vit_pe_spatial_tiny_patch16_512",
    "vit_small_patch16_dinov3",
    "vit_tiny_patch16_dinov3_qkvb",
    "vit_small_plus_patch16_dinov3",
    "vit_small_plus_patch16_dinov3_qkvb",
    "vit_7b_patch16_dinov3",
    "vit_small_patch16_lingbot",
    "vit_giant_patch16_lingbot",
    "vit_base_patch16_sapiens2",
    "vit_5b_patch16_sapiens2",
]


def test_every_rotary_name_of_timm_is_known():
    assert len(ROTARY) == 60
    assert set(SETTINGS) <= set(ROTARY)


@pytest.mark.parametrize("name", [n if n in SETTINGS else pytest.param(n, marks=pytest.mark.slow) for n in ROTARY])
def test_logits_are_those_of_timm(name, tmp_path):
    options = shrunken(name)
    theirs = randomised(timm.create_model(name, **options))
    ours, x = from_timm(theirs), images(options["img_size"])
    with torch.no_grad():
        want = theirs(x)
        got = ours(x)
        assert got.shape == (2, 7)
        assert difference(got, want) < 1e-5
        theirs.rope = None
        assert difference(theirs(x), want) > 1e-3  # the test would notice wrong positions
    save_for_hf(ours, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(x), got)


VITS = {
    "vit_tiny_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch32_clip_224": {},
    "vit_giant_patch14_dinov2": {"mlp_ratio": 2},
    "vit_so400m_patch14_siglip_gap_224": {},
    "vit_so150m_patch16_reg4_map_256": {},
    "vit_so150m_patch16_reg4_gap_256": {},
    "vit_so150m2_patch16_reg1_gap_256": {},
    "vit_medium_patch16_reg4_gap_256": {},
}


def test_multimodal_rotations_convert():
    patch = {"img_size": (84, 126), "rope_type": "mrope", "rope_temperature": 500.0, "depth": 2, "num_classes": 7}
    theirs, x = randomised(timm.create_model("eva02_tiny_patch14_224", **patch)), images((84, 126))
    assert difference(from_timm(theirs)(x).detach(), theirs(x).detach()) < 1e-5
    theirs = timm.create_model("eva02_tiny_patch14_224", **patch | {"rope_mrope_section": (20, 6, 6)})
    with pytest.raises(ValueError, match="sections do not cover all pairs"):
        from_timm(theirs)


def test_norms_before_pooling_and_after_it_convert():
    options = {"use_post_transformer_norm": True, "img_size": (84, 126), "depth": 2, "num_classes": 7}
    theirs, x = randomised(timm.create_model("eva02_tiny_patch14_224", **options)), images((84, 126))
    ours = from_timm(theirs)
    assert difference(ours(x).detach(), theirs(x).detach()) < 1e-5
    ours.reset_classifier(3)
    assert ours(x).shape == (2, 3)


@pytest.mark.parametrize("indexing", ["ij", "xy"])
@pytest.mark.parametrize("kind", ["mixed", "cat", "dinov3"])
def test_both_orders_of_the_axes_convert(kind, indexing):
    options = {"rope_type": kind, "rope_grid_indexing": indexing, "img_size": (84, 126), "depth": 2, "num_classes": 7}
    options["ref_feat_shape"] = (6, 9)
    theirs, x = randomised(timm.create_model("eva02_tiny_patch14_224", **options)), images((84, 126))
    assert difference(from_timm(theirs)(x).detach(), theirs(x).detach()) < 1e-5


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_biases_and_norms_of_queries_and_keys_convert(qkv_bias, qk_norm, fused):
    options = {"qkv_bias": qkv_bias, "qk_norm": qk_norm, "img_size": (84, 126), "depth": 2, "num_classes": 7}
    eva = randomised(timm.create_model("eva02_tiny_patch14_224", qkv_fused=fused, **options))
    vit = randomised(timm.create_model("vit_tiny_patch16_224", **options | {"img_size": (96, 144)}))
    for theirs, ours, x in (
        (eva, from_timm(eva), images((84, 126))),
        (vit, ropeify(vit, "none"), images((96, 144))),
    ):
        assert difference(ours(x).detach(), theirs(x).detach()) < 1e-5
        assert (ours.blocks[0].attn.qkv.bias is not None) == qkv_bias


@pytest.mark.parametrize("indexing", ["ij", "xy"])
@pytest.mark.parametrize("reference", [None, (3, 6), (6, 9), (16, 16)])
def test_coordinates_of_a_reference_grid_shift_by_its_cells(reference, indexing, monkeypatch):
    options = {"img_size": (84, 126), "rope_grid_indexing": indexing, "depth": 1}
    options |= {"rope_shift_coords": 2.0, "rope_jitter_coords": 3.0}
    theirs = timm.create_model("eva02_tiny_patch14_224", dynamic_img_size=True, num_classes=7, **options)
    theirs.rope.ref_feat_shape = reference
    ours = from_timm(theirs)
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.ones(*size, **kwargs))  # the largest shift
    for size in ((84, 126), (126, 168)):
        plain, augmented = (ours.eval().patch_coords(images(size)), ours.train().patch_coords(images(size)))
        grid = plain[1]
        stretch = torch.tensor(
            [1.0, 1.0] if reference is None else [r / n for r, n in zip(reference, grid, strict=True)]
        )
        # timm stretches, then shifts, then multiplies
        torch.testing.assert_close(augmented[0] * stretch, (plain[0] * stretch + 2.0) * 3.0)
    wrong = {"num_kv_heads": 3, "position_shift_grid": (3,)}
    with pytest.raises(ValueError, match=re.escape("position_shift_grid (3,) has 1 axes, the coordinates 2")):
        timm.create_model("vit_rope_tiny_patch16_224", depth=1, **wrong)


def test_options_of_training_convert():
    options = {"rope_jitter_coords": 1.5, "drop_path_rate": 0.2, "patch_drop_rate": 0.3, "proj_drop_rate": 0.1}
    ours = from_timm(timm.create_model("vit_base_patch16_sapiens2", depth=2, num_kv_heads=12, **options))
    assert ours.patch_coords.augment == (0.0, 1.5, 2.0)
    assert ours.patch_drop.prob == 0.3
    assert ours.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    assert ours.blocks[0].attn.proj_drop.p == ours.blocks[0].mlp.drop1.p == 0.1


def small_vit(name):
    published = timm.create_model(name, device="meta")
    patch = published.patch_embed.patch_size[0]
    options = {"img_size": (4 * patch, 6 * patch), "depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 7}
    return randomised(timm.create_model(name, **options | VITS[name])), images(options["img_size"])


@pytest.mark.parametrize("name", VITS)
def test_a_vit_without_new_positions_is_bit_identical(name, tmp_path):
    theirs, x = small_vit(name)
    ours = ropeify(theirs, "none")
    assert torch.equal(ours(x), theirs(x))
    save_for_hf(ours, tmp_path, safe_serialization=True)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), ours(x))


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224", *list(VITS)[-4:]]
)
def test_a_learned_table_is_kept_dropped_or_gated(name):
    theirs, x = small_vit(name)
    kept, dropped, gated = (ropeify(theirs, "axial", ape=ape) for ape in ("keep", "drop", "gate"))
    torch.testing.assert_close(gated(x), kept(x), rtol=1e-5, atol=1e-5)
    assert (kept(x) - theirs(x)).abs().max() > 1e-3
    with torch.no_grad():
        gated.position.parts[1].gate.fill_(0)
        torch.testing.assert_close(gated(x), dropped(x), rtol=1e-6, atol=1e-6)
        theirs.pos_embed[:, (0 if theirs.no_embed_class else theirs.num_prefix_tokens) :] = 0
    torch.testing.assert_close(ropeify(theirs, "none")(x), ropeify(theirs, "none", ape="drop")(x), rtol=1e-5, atol=1e-5)
    assert {key for key, _ in dropped.named_parameters()} == {key for key, _ in kept.named_parameters()} - {"pos_embed"}


def test_a_converted_vit_learns_new_positions():
    theirs, x = small_vit("vit_tiny_patch16_224")
    torch.manual_seed(0)
    ours = ropeify(theirs.train(), "mixed", ape="gate")
    assert ours.training
    ours(x).square().sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    weights = theirs.blocks[0].attn.qkv.weight
    assert weights.data_ptr() != ours.blocks[0].attn.qkv.weight.data_ptr()


@pytest.mark.parametrize(
    ("convert", "name", "options", "error", "message"),
    [
        (from_timm, "resnet18", {}, TypeError, "from_timm converts models of timm's class Eva, got ResNet"),
        (from_timm, "vit_tiny_patch16_224", {"depth": 1}, TypeError, "ropeify gives it rotary positions"),
        (from_timm, "eva02_tiny_patch14_224", {"use_post_norm": True}, ValueError, "blocks of type EvaBlockPostNorm"),
        (ropeify, "resnet18", {}, TypeError, "ropeify gives positions to timm's VisionTransformer, got ResNet"),
        (ropeify, "vit_rope_test_patch16_64", {}, TypeError, "the model is a RopeViT already"),
        (ropeify, "vit_tiny_r_s16_p8_224", {"depth": 1}, ValueError, "does not support patches by HybridEmbed"),
        (ropeify, "deit_tiny_distilled_patch16_224", {"depth": 1}, ValueError, "does not support a distillation token"),
        (ropeify, "vit_base_patch16_rpn_224", {"depth": 1}, ValueError, "blocks of type ResPostBlock"),
    ],
)
def test_the_error_names_what_cannot_be_converted(convert, name, options, error, message):
    model = timm.create_model(name, **options)
    with pytest.raises(error, match=re.escape(message)):
        convert(model, "axial") if convert is ropeify else convert(model)


def test_invalid_options_of_ropeify():
    theirs, _ = small_vit("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="did you mean axial"):
        ropeify(theirs, "axail")
    with pytest.raises(ValueError, match='ape is "keep", "drop" or "gate", got \'fade\''):
        ropeify(theirs, "axial", "fade")
