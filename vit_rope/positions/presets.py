"""Conventions of other libraries, which trained weights depend on.

Conventions differ in the order of frequencies over channels (`rotary.channels`), in coordinates
(`rotary.coordinates`, units, origins), and in the order or precision of the computation of angles
(`rotary.exact`). `presets` gives a spec, a unit and an origin for each convention, and its source.
The tests compare each with the installed code of the source or with its formula.
"""

import math
from typing import NamedTuple


class Preset(NamedTuple):
    """A convention: `build(spec, Layout(…, unit, origin))` on grids with `axes` axes.

    `source` names the code and paper that use it. `note` says what the spec cannot express.
    """

    spec: str
    source: str
    axes: int = 2
    unit: str = "index"
    origin: float | str = 0.0
    note: str = ""


def presets() -> dict[str, Preset]:
    """Return all conventions by name."""
    return dict(PRESETS)


PI = math.pi
COMROPE = (
    "its coordinates are (c + 0.5) / n, half the range of ours, so std is half of its value; its class token is at "
    "0.5, the origin here, like all tokens without a position; for its jitter in training pass your own coordinates"
)
PRESETS = {
    "rope_vit_axial": Preset("xy(axial(base=100))", "naver-ai/rope-vit, timm vit_*_rope_*; arXiv:2403.13298"),
    "rope_vit_mixed": Preset("mixed(base=10)", "naver-ai/rope-vit, timm vit_*_rope_mixed_*; arXiv:2403.13298"),
    "rope_vit_swin": Preset(
        "xy(axial(base=50))", "naver-ai/rope-vit's Swin; arXiv:2403.13298",
        note="coordinates are relative to a window; its table has 4e-8 where this has 0; for mixed use rope_vit_mixed",
    ),
    "eva02": Preset("reference(axial(base=10000), grid=(16, 16))", "timm eva02_*, vit_*_rope_reg*; arXiv:2303.11331"),
    "perception_encoder": Preset(
        "reference(xy(axial(base=10000)), grid=(24, 24))", "timm vit_pe_*; arXiv:2504.13181", origin=-1.0,
        note="the reference is the training grid: (14, 14), (24, 24) or (32, 32); gigantic models have origin 0",
    ),
    "dinov3": Preset("dinov3(base=100)", "timm and transformers' DINOv3; arXiv:2508.10104", unit="centered"),
    "dinov3_meta": Preset(
        'dinov3(base=100, periods="bfloat16")', "published checkpoints of facebookresearch/dinov3", unit="centered"
    ),
    "qwen2_vl": Preset('axial(base=10000, pairs="half")', "transformers Qwen2-VL, timm qwen3_vit_*, deepseek_vit_*"),
    "gemma4": Preset('xy(axial(base=100, pairs="axis"))', "timm gemma4_vit_*"),
    "genlip": Preset("mrope(base=10000, idle=1)", "timm rope_type='mrope'", note="the idle share belongs to text"),
    "pixtral": Preset("mrope(base=10000, blocks=True)", "transformers Pixtral; arXiv:2410.07073"),
    "llama4": Preset("xy(axial(base=10000))", "transformers Llama 4", origin=-1.0, note="its class token comes last"),
    "vjepa2": Preset(
        "vjepa2(base=10000)", "transformers V-JEPA 2; arXiv:2506.09985", 3, note="neither a rotation nor relative"
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
        note="version 1.5; version 1.0 has different coordinates for crops",
    ),
    "cosmos": Preset(
        f'axial(base=({10000 * 2 ** (44 / 42)}, 10000, 10000), share=(44, 42, 42), pairs="half")',
        "diffusers CosmosRotaryPosEmbed; arXiv:2501.03575", 3, note="the unit of time is 1/24 s",
    ),
    "lumina_next": Preset(
        "alternate(axial(base=10000))", "diffusers get_2d_rotary_pos_embed_lumina; arXiv:2406.18583",
        note="its ntk_factor multiplies the base; its linear_factor is the factor of interpolate",
    ),
    "hunyuan_dit": Preset(
        "xy(axial(base=10000))", "diffusers get_2d_rotary_pos_embed; arXiv:2405.08748",
        note="coordinates are those of the crop in a reference grid: pass your own",
    ),
    "mochi": Preset(
        "mixed", "diffusers MochiRoPE", 3,
        note="frequencies start at 0; coordinates are centered and scaled to an area of 192 x 192: pass your own",
    ),
    "ltx": Preset(
        "ltx(base=10000)", "diffusers LTXVideoRotaryPosEmbed; arXiv:2501.00103", 3,
        note="coordinates are 2 c - 1, with c relative to 20 frames, 2048 rows and 2048 columns: pass your own",
    ),
    "rotary_embedding_torch": Preset(
        "axial(base=10000, share=(16, 16))", "rotary-embedding-torch freqs_for='lang'",
        note="the share is its `dim`, for each axis; other channels are not rotated",
    ),
    "rotary_embedding_torch_pixel": Preset(
        f'normalize(spectrum(axial(share=(16, 16)), first={PI}, last={5 * PI}, spacing="linear"))',
        "rotary-embedding-torch freqs_for='pixel'", note="max_freq is 10; the last speed is half of it, times pi",
    ),
    "rvt": Preset(
        f'normalize(spectrum(axial, first={PI}, last={5 * PI}, spacing="linear"))', "vit-pytorch rvt; arXiv:2105.07926"
    ),
    "vit_5": Preset(
        "axial(base=100000)", "vit-pytorch vit_5",
        note="its registers are rotated along a separate axis; ours are not rotated",
    ),
    "golden_gate": Preset(
        'spectrum(goldengate(pairs="half", rounds=10), first=1, last=10000)', "vit-pytorch GoldenGateRoPENd",
        note="most of these frequencies alias at integer coordinates; for cells use goldengate(base=100)",
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
        note="not relative; its entries have the opposite sign and start in [0, 2 pi), ours in units of cells",
    ),
    "liere_visionllama": Preset(
        f"normalize(spectrum(axial, first=1, last={math.exp(-4)}), low=0, grows=True)",
        "StanfordMIMI/LieRE's baseline; arXiv:2406.10322",
        note="rotates by at most one radian across the training image",
    ),
    "comrope_ap": Preset(
        "comrope_ap(std=0.5)", "Longin-Yu/ComRoPE; arXiv:2506.03737", unit="centered", note=COMROPE
    ),
    "comrope_ld": Preset(
        "comrope_ld(std=0.5)", "Longin-Yu/ComRoPE; arXiv:2506.03737", unit="centered", note=COMROPE
    ),
}  # fmt: skip
