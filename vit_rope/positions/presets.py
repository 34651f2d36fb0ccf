"""Conventions of other libraries, which differ in bookkeeping that trained weights depend on.

Bookkeeping of channels is an order of frequencies (`orders`), that of places a change of coordinates before them
(`measures`, units, origins), and some sources compute an angle in an order or a precision of their own (`exact`).
`presets` lists what is what: a spec, a unit and an origin for each convention, with its source, whose installed code
or formula the tests compare it with.
"""

import math
from typing import NamedTuple


class Preset(NamedTuple):
    """A convention: `build(spec, Layout(…, unit, origin))` on grids of so many `axes`, and where it is used."""

    spec: str
    source: str
    axes: int = 2
    unit: str = "index"
    origin: float | str = 0.0
    note: str = ""


def presets() -> dict[str, Preset]:
    """Every convention by name; a `note` says what its spec alone cannot, such as whose the coordinates are."""
    return dict(PRESETS)


PI = math.pi
COMROPE = (
    "it counts (c + 0.5) / n, half as far, so std is half its own; its class token turns as a patch at 0.5 would, our "
    "origin, where all tokens without a place are; for its jitter in training give your own coordinates"
)
PRESETS = {
    "rope_vit_axial": Preset("xy(axial(base=100))", "naver-ai/rope-vit, timm vit_*_rope_*; arXiv:2403.13298"),
    "rope_vit_mixed": Preset("mixed(base=10)", "naver-ai/rope-vit, timm vit_*_rope_mixed_*; arXiv:2403.13298"),
    "rope_vit_swin": Preset(
        "xy(axial(base=50))", "naver-ai/rope-vit's Swin; arXiv:2403.13298",
        note="coordinates count within a window; its own table has 4e-8 where this has 0; mixed is rope_vit_mixed",
    ),
    "eva02": Preset("reference(axial(base=10000), grid=(16, 16))", "timm eva02_*, vit_*_rope_reg*; arXiv:2303.11331"),
    "perception_encoder": Preset(
        "reference(xy(axial(base=10000)), grid=(24, 24))", "timm vit_pe_*; arXiv:2504.13181", origin=-1.0,
        note="the reference is the training grid: (14, 14), (24, 24) or (32, 32); gigantic models have origin 0",
    ),
    "dinov3": Preset("dinov3(base=100)", "timm and transformers' DINOv3; arXiv:2508.10104", unit="centered"),
    "dinov3_meta": Preset(
        'dinov3(base=100, periods="bfloat16")', "the files that facebookresearch/dinov3 publishes", unit="centered"
    ),
    "qwen2_vl": Preset('axial(base=10000, pairs="half")', "transformers Qwen2-VL, timm qwen3_vit_*, deepseek_vit_*"),
    "gemma4": Preset('xy(axial(base=100, pairs="axis"))', "timm gemma4_vit_*"),
    "genlip": Preset("mrope(base=10000, idle=1)", "timm rope_type='mrope'", note="the idle share is that of text"),
    "pixtral": Preset("mrope(base=10000, blocks=True)", "transformers Pixtral; arXiv:2410.07073"),
    "llama4": Preset("xy(axial(base=10000))", "transformers Llama 4", origin=-1.0, note="its class token comes last"),
    "vjepa2": Preset(
        "vjepa2(base=10000)", "transformers V-JEPA 2; arXiv:2506.09985", 3, note="no rotation, and not relative"
    ),
    "flux": Preset(
        "axial64(base=10000, share=(16, 56, 56))", "diffusers FluxPosEmbed", 3, note="axes (0, row, column), text at 0"
    ),
    "flux2": Preset("axial64(base=2000)", "diffusers Flux2PosEmbed", 4, note="axes (time, row, column, text)"),
    "wan": Preset("axial64(base=10000, share=(44, 42, 42))", "diffusers WanRotaryPosEmbed; arXiv:2503.20314", 3),
    "hunyuan_video": Preset(
        "axial(base=256, share=(16, 56, 56))", "diffusers HunyuanVideoRotaryPosEmbed; arXiv:2412.03603", 3
    ),
    "cogvideox": Preset(
        "axial(base=10000, share=(16, 24, 24))", "diffusers get_3d_rotary_pos_embed; arXiv:2408.06072", 3,
        note="those of version 1.5; 1.0 gives a crop coordinates of its own",
    ),
    "cosmos": Preset(
        f'axial(base=({10000 * 2 ** (44 / 42)}, 10000, 10000), share=(44, 42, 42), pairs="half")',
        "diffusers CosmosRotaryPosEmbed; arXiv:2501.03575", 3, note="time counts in 1/24 s",
    ),
    "lumina_next": Preset(
        "alternate(axial(base=10000))", "diffusers get_2d_rotary_pos_embed_lumina; arXiv:2406.18583",
        note="its ntk_factor multiplies the base, its linear_factor is that of interpolate",
    ),
    "hunyuan_dit": Preset(
        "xy(axial(base=10000))", "diffusers get_2d_rotary_pos_embed; arXiv:2405.08748",
        note="coordinates are those of the crop in a reference grid: give your own",
    ),
    "mochi": Preset(
        "mixed", "diffusers MochiRoPE", 3,
        note="frequencies start at 0; coordinates are centred, scaled to an area of 192 x 192: give your own",
    ),
    "ltx": Preset(
        "ltx(base=10000)", "diffusers LTXVideoRotaryPosEmbed; arXiv:2501.00103", 3,
        note="coordinates are 2 c - 1, c the share of 20 frames, 2048 rows, 2048 columns: give your own",
    ),
    "rotary_embedding_torch": Preset(
        "axial(base=10000, share=(16, 16))", "rotary-embedding-torch freqs_for='lang'",
        note="the share is its `dim`, for each axis; the rest stays un-rotated",
    ),
    "rotary_embedding_torch_pixel": Preset(
        f'normalize(spectrum(axial(share=(16, 16)), first={PI}, last={5 * PI}, spacing="linear"))',
        "rotary-embedding-torch freqs_for='pixel'", note="max_freq is 10: the last speed is half of it, times pi",
    ),
    "rvt": Preset(
        f'normalize(spectrum(axial, first={PI}, last={5 * PI}, spacing="linear"))', "vit-pytorch rvt; arXiv:2105.07926"
    ),
    "vit_5": Preset(
        "axial(base=100000)", "vit-pytorch vit_5", note="its registers turn too, along a line of their own; ours do not"
    ),
    "golden_gate": Preset(
        'spectrum(goldengate(pairs="half", rounds=10), first=1, last=10000)', "vit-pytorch GoldenGateRoPENd",
        note="most of these frequencies alias on whole coordinates; for cells goldengate(base=100) is meant",
    ),
    "k_diffusion": Preset(
        f"spectrum(axial, first={PI}, last={5 * PI}, learned=True)", "k-diffusion axial_rope",
        unit="centered_longer", origin="center", note="it stores the logarithms of the speeds",
    ),
    "hdit": Preset(
        f'spectrum(axial(share=(16, 16), pairs="half"), first={PI}, last={10 * PI}, heads=True)',
        "k-diffusion image_transformer_v2; arXiv:2401.11605", unit="centered_longer", origin="center",
        note="the share is a quarter of the head for each axis",
    ),
    "liere": Preset(
        "normalize(liere(block=8), low=0, grows=True)", "StanfordMIMI/LieRE; arXiv:2406.10322",
        note="not relative; its entries have the other sign and begin in [0, 2 pi), where ours count cells",
    ),
    "liere_visionllama": Preset(
        f"normalize(spectrum(axial, first=1, last={math.exp(-4)}), low=0, grows=True)",
        "StanfordMIMI/LieRE's baseline; arXiv:2406.10322", note="turns by a radian at most across the training image",
    ),
    "comrope_ap": Preset(
        "comrope_ap(std=0.5)", "Longin-Yu/ComRoPE; arXiv:2506.03737", unit="centered", note=COMROPE
    ),
    "comrope_ld": Preset(
        "comrope_ld(std=0.5)", "Longin-Yu/ComRoPE; arXiv:2506.03737", unit="centered", note=COMROPE
    ),
}  # fmt: skip
