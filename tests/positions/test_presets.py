"""Conventions against the installed code of their sources, to the last bit where the order of operations allows it."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers.models import embeddings as diffusers_embeddings
from diffusers.models.transformers import (
    transformer_cosmos,
    transformer_flux,
    transformer_flux2,
    transformer_hunyuan_video,
    transformer_mochi,
    transformer_wan,
)
from timm.layers import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
    apply_rot_embed_cat,
)
from timm.models.gemma4_vit import Gemma4RotaryEmbedding2D, apply_multidimensional_rope

from vit_rope.attention import attend
from vit_rope.ops.rotate import rotate
from vit_rope.ops.tables import angles
from vit_rope.positions import Layout, Rotary, build
from vit_rope.positions.presets import presets
from vit_rope.positions.rotary.coordinates import Reference, Rescaled
from vit_rope.positions.rotary.exact import Exact

SHAPE = (5, 7)
NAMES = sorted(presets())


def position(name, head=64, shape=SHAPE, spec=None):
    preset = presets()[name]
    layout = Layout(2 * head, 2, shape, depth=2, unit=preset.unit, origin=preset.origin)
    return build(spec or preset.spec, layout), layout


def same(name, cos, sin, exact=True, head=64, shape=SHAPE, coords=None):
    """Assert that a preset's table of the first layer and head is its source's, given with one column for each pair.

    The angles agree to the last bit where `exact`; an eager table takes its cosines from another routine than
    torch.cos, which may end in another bit.
    """
    scheme, layout = position(name, head, shape)
    places = layout.coords(shape) if coords is None else coords
    grid = list(shape) if coords is None else None
    turn = scheme(places, grid=grid).q.tables()[0][0, :, 0].detach()
    for ours, theirs in zip(turn.unbind(-1), (cos, sin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1.2e-7 if exact else 1e-6)
    if exact:
        if isinstance(scheme, Reference):
            places, scheme = scheme.measure(places, grid), scheme.scheme
        if not isinstance(scheme, Exact):
            theta = angles(scheme.frequencies(places), places)[0, 0, :, 0]
            turn = torch.stack((theta.cos(), theta.sin()), dim=-1)
        assert torch.equal(turn[..., 0], cos)
        assert torch.equal(turn[..., 1], sin)


def timm_table(rope, pairs, shape=SHAPE):
    """One column for each pair, (sines, cosines) of timm's (N, 2 * head)."""
    sin, cos = rope.get_embed(shape).chunk(2, -1)
    at = slice(0, None, 2) if pairs == "interleaved" else slice(0, sin.shape[-1] // 2)
    return cos[..., at], sin[..., at]


@pytest.mark.parametrize(
    ("name", "head", "options"),
    [
        ("rope_vit_axial", 64, {"temperature": 100.0, "grid_indexing": "xy"}),
        ("eva02", 64, {"ref_feat_shape": (16, 16)}),
        ("perception_encoder", 96, {"ref_feat_shape": (24, 24), "grid_indexing": "xy", "grid_offset": 1.0}),
        ("qwen2_vl", 72, {"rotate_half": True}),
    ],
)
@pytest.mark.parametrize("shape", [SHAPE, (16, 16), (40, 9)])
def test_timms_axial_tables(name, head, options, shape):
    half = options.get("rotate_half", False)
    rope = RotaryEmbeddingCat(head, in_pixels=False, **options)
    same(name, *timm_table(rope, "half" if half else "interleaved", shape), head=head, shape=shape)
    x = torch.randn(1, 1, math.prod(shape), head)
    scheme, layout = position(name, head, shape)
    encoding = scheme(layout.coords(shape), grid=list(shape))
    turned = rotate(x, encoding.q.tables()[0], encoding.stride)
    torch.testing.assert_close(turned, apply_rot_embed_cat(x, rope.get_embed(shape), half=half), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [SHAPE, (16, 16), (32, 9)])
@pytest.mark.parametrize("unit", [("separate", "centered"), ("min", "centered_shorter"), ("max", "centered_longer")])
def test_dinov3(shape, unit):
    rope = RotaryEmbeddingDinoV3(64, temperature=100.0, normalize_coords=unit[0])
    layout = Layout(128, 2, shape, unit=unit[1])
    encoding = build("dinov3", layout)(layout.coords())
    assert encoding.stride == 32
    turn = encoding.q.tables()[0][0, :, 0]
    for ours, theirs in zip(turn.unbind(-1), timm_table(rope, "half", shape), strict=True):
        assert torch.equal(ours, theirs)


def test_dinov3_with_the_periods_that_meta_publishes():
    rope = RotaryEmbeddingDinoV3(64, temperature=100.0)
    rope.periods = rope.periods.bfloat16().float()
    same("dinov3_meta", *timm_table(rope, "half"))
    exact, rounded = (
        scheme(layout.coords()).q.tables()[0] for scheme, layout in map(position, ("dinov3", "dinov3_meta"))
    )
    assert 1e-3 < (exact - rounded).abs().max() < 0.01


def test_mixed_with_timms_frequencies():
    rope = RotaryEmbeddingMixed(128, depth=2, num_heads=2, grid_indexing="xy")
    scheme, layout = position("rope_vit_mixed")
    scheme.freqs.data.copy_(rope.freqs.flip(0).permute(1, 2, 0, 3))
    encoding = scheme(layout.coords(), grid=list(SHAPE))
    sin, cos = rope.get_embed(SHAPE).chunk(2, -1)
    for layer, turn in enumerate(encoding.q.tables()):
        torch.testing.assert_close(turn[0, ..., 0].transpose(0, 1), cos[layer, ..., ::2], rtol=0, atol=2e-6)
        torch.testing.assert_close(turn[0, ..., 1].transpose(0, 1), sin[layer, ..., ::2], rtol=0, atol=2e-6)


@pytest.mark.parametrize("head", [48, 72, 96])
def test_genlip(head):
    thirds = head // 6
    rope = RotaryEmbeddingMRope(head, mrope_section=(thirds, thirds, thirds))
    same("genlip", *timm_table(rope, "half"), head=head)


def test_gemma4_pairs_within_the_channels_of_each_axis():
    scheme, layout = position("gemma4")
    places = layout.coords()
    rope = Gemma4RotaryEmbedding2D(64)
    x = torch.randn(1, 35, 2, 64)
    want = apply_multidimensional_rope(x, *rope(x, places.flip(-1)[None].long()))
    encoding = scheme(places, grid=list(SHAPE))
    got = rotate(x.transpose(1, 2), encoding.q.tables()[0], encoding.stride).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def every_other(cos, sin):
    return cos[..., ::2], sin[..., ::2]


def test_flux_and_flux2():
    ids = torch.stack((torch.zeros(35), *Layout(128, 2, SHAPE).coords().unbind(-1)), dim=-1)
    theirs = transformer_flux.FluxPosEmbed(10000, [16, 56, 56])(ids)
    same("flux", *every_other(*theirs), head=128, shape=(1, *SHAPE))
    ids = torch.cat((ids, torch.arange(35.0)[:, None]), dim=-1)
    theirs = transformer_flux2.Flux2PosEmbed(2000, [32, 32, 32, 32])(ids)
    same("flux2", *every_other(*theirs), head=128, shape=(1, *SHAPE, 1), coords=ids)


def test_video_of_diffusers():
    video = torch.zeros(1, 4, 3, 10, 14)
    wan = transformer_wan.WanRotaryPosEmbed(128, (1, 2, 2), 64)(video)
    same("wan", *(every_other(*(t[0, :, 0] for t in wan))), head=128, shape=(3, 5, 7))
    hunyuan = transformer_hunyuan_video.HunyuanVideoRotaryPosEmbed(2, 1, [16, 56, 56])(video)
    same("hunyuan_video", *every_other(*hunyuan), head=128, shape=(3, 5, 7))
    cos, sin = transformer_cosmos.CosmosRotaryPosEmbed(128)(video)
    same("cosmos", cos[:, :64], sin[:, :64], head=128, shape=(3, 5, 7))
    cog = diffusers_embeddings.get_3d_rotary_pos_embed(64, ((0, 0), SHAPE), SHAPE, 3, grid_type="slice", max_size=SHAPE)
    same("cogvideox", *every_other(*cog), shape=(3, *SHAPE))


def test_images_of_diffusers():
    lumina = diffusers_embeddings.get_2d_rotary_pos_embed_lumina(64, *SHAPE).flatten(0, 1)
    same("lumina_next", lumina.real, lumina.imag, exact=False)
    cos, sin = diffusers_embeddings.get_2d_rotary_pos_embed(64, ((0, 0), SHAPE), SHAPE, output_type="pt")
    same("hunyuan_dit", *every_other(cos, sin), exact=False)


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_mochi_is_frequencies_and_coordinates():
    rope, freqs = transformer_mochi.MochiRoPE(), torch.randn(3, 2, 32)
    coords = rope._get_positions(3, *SHAPE, dtype=torch.float32)
    scheme, _ = position("mochi", shape=(3, *SHAPE))
    scheme.freqs.data.copy_(freqs.transpose(0, 1))
    cos, sin = rope(freqs, 3, *SHAPE, dtype=torch.float32)
    turn = scheme(coords).q.tables()[0][0].detach()
    torch.testing.assert_close(turn[..., 0], cos, rtol=0, atol=2e-4)  # its angles, of 100 and more, are made by matmul
    torch.testing.assert_close(turn[..., 1], sin, rtol=0, atol=2e-4)


def test_transformers_dinov3_qwen_pixtral_and_llama():
    pytest.importorskip("transformers")
    from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3
    from transformers.models.llama4 import modeling_llama4 as llama4
    from transformers.models.pixtral import modeling_pixtral as pixtral
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen

    def config(**options):
        return SimpleNamespace(hidden_size=128, embed_dim=128, num_attention_heads=2, num_heads=2, **options)

    ids = Layout(128, 2, SHAPE).coords().T.long()
    rope = {"rope_type": "axial", "rope_theta": 10000.0}
    cos, sin = qwen.Qwen2VLVisionRotaryEmbedding(config(rope_parameters=rope))(torch.zeros(1), ids.T)
    same("qwen2_vl", cos[:, :32], sin[:, :32])
    cos, sin = pixtral.PixtralVisionRotaryEmbedding(config(rope_parameters=rope))(torch.zeros(1), ids.T)
    same("pixtral", cos[:, :32], sin[:, :32])
    small = config(image_size=(80, 112), patch_size=16, rope_theta=100.0)
    cos, sin = dinov3.DINOv3ViTRopePositionEmbedding(small).eval()(torch.zeros(1, 3, 80, 112))
    same("dinov3", cos[:, :32], sin[:, :32], exact=False)
    square = config(image_size=64, patch_size=16, rope_parameters=rope)
    turn = llama4.Llama4VisionRotaryEmbedding._compute_freqs_ci(square)[:, 0]
    same("llama4", turn.real[:-1], turn.imag[:-1], shape=(4, 4))
    assert (turn[-1] == 1).all()  # its class token, which comes last


def test_vjepa2_is_no_rotation():
    pytest.importorskip("transformers")
    from transformers.models.vjepa2.modeling_vjepa2 import rotate_queries_or_keys

    scheme, layout = position("vjepa2", shape=(2, 3, 4))
    places, q = layout.coords(), torch.randn(1, 2, 24, 64)
    parts = [rotate_queries_or_keys(part, places[:, a]) for a, part in enumerate(q.split((20, 20, 20, 4), dim=-1)[:3])]
    want = torch.cat((*parts, q[..., 60:]), dim=-1)
    basis = scheme(places).q.basis[0]
    torch.testing.assert_close((q[..., None, :] @ basis.transpose(1, 2)).squeeze(-2), want, rtol=0, atol=2e-6)
    k, v = torch.randn(2, 1, 2, 24, 64)
    near, far = (attend(q, k, v, scheme(c)) for c in (places, places + 5.0))
    assert not scheme.relative
    assert (near - far).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_builds_and_says_where_it_comes_from(name):
    preset = presets()[name]
    scheme, layout = position(name, head=128, shape=(3, 4, 5, 2)[: preset.axes])
    assert layout.axes == preset.axes
    assert isinstance(scheme, Rotary | Rescaled) or name == "vjepa2"
    assert re.search(r"timm|diffus|transformers|vit|torch|/", preset.source)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spectrum(axial, first=0)", "spectrum needs a positive first and last speed, got 0 and 100.0"),
        (
            "spectrum(goldengate, learned=True)",
            "spectrum(learned=True) needs a scheme whose layers and heads rotate alike",
        ),
        ("spectrum(dinov3)", "spectrum cannot modify DinoV3, which computes its own speeds"),
        ("ltx(base=0)", "ltx needs base > 0, an even head_dim and a width of 4 or more, got 0, 64 and 128"),
        ("normalize(axial, low=1)", "normalize needs low and high to differ, got 1 for both"),
        ("goldengate(rounds=0)", "goldengate needs 1 round or more to compute its ratio, got 0"),
        ("xy(learned)", "xy modifies rotary schemes with frequencies for each axis, such as xy(axial), not Learned"),
        ("alternate(axial(share=(16, 24)))", "alternate needs as many pairs of its own for each axis"),
        ("alternate(mixed)", "alternate needs as many pairs of its own for each axis"),
        ("reference(axial, grid=(4, 4, 4))", "reference grid (4, 4, 4) has 3 axes, the layout 2"),
        ("reference(axial, grid=(4, 0))", "a grid needs at least one cell"),
        ("mrope(idle=-1)", "mrope needs idle >= 0, base > 0 and an even head_dim"),
        ("vjepa2(base=0)", "vjepa2 needs a base above 0"),
        ('dinov3(periods="float16")', "dinov3(periods=…) takes 'float32' or 'bfloat16'"),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(spec, Layout(128, 2, SHAPE))


@pytest.mark.parametrize("places", [{"origin": "center"}, {"unit": "centered"}, {"unit": "centered_longer"}])
def test_a_span_is_the_same_in_every_unit(places):
    cos_sin = []
    for layout in (Layout(128, 2, (5, 4)), Layout(128, 2, (5, 4), **places)):
        cos_sin.append(build("normalize(axial, high=3)", layout)(layout.coords(SHAPE), grid=list(SHAPE)).q.tables()[0])
    torch.testing.assert_close(*cos_sin, rtol=0, atol=2e-6)
