"""Conventions of other libraries, which differ in bookkeeping that trained weights depend on.

Bookkeeping of channels (which axis comes first, whether axes alternate) is an order of the columns of `freqs`;
bookkeeping of places (an offset, a grid that measures others) is a change of coordinates before them; and some sources
compute an angle in an order or a precision of their own. `presets` lists what is what: a spec, a unit and an origin for
each convention, with its source, whose installed code the tests compare it with.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .base import Layout, Position
from .coords import check_shape
from .encoding import Encoding, Side
from .rotary import Pairs, Rotary, axial, geometric, turning
from .specs import register


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


PRESETS = {
    "rope_vit_axial": Preset("xy(axial(base=100))", "naver-ai/rope-vit, timm vit_*_rope_*; arXiv:2403.13298"),
    "rope_vit_mixed": Preset("mixed(base=10)", "naver-ai/rope-vit, timm vit_*_rope_mixed_*; arXiv:2403.13298"),
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
    "genlip": Preset("dealt(base=10000, idle=1)", "timm rope_type='mrope'", note="the idle share is that of text"),
    "pixtral": Preset("dealt(base=10000, blocks=True)", "transformers Pixtral; arXiv:2410.07073"),
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
        "axial(base=10000, share=(16, 24, 24))", "diffusers get_3d_rotary_pos_embed; arXiv:2408.06072", 3
    ),
    "cosmos": Preset(
        f'axial(base=({10000 * 2 ** (44 / 42)}, 10000, 10000), share=(44, 42, 42), pairs="half")',
        "diffusers CosmosRotaryPosEmbed; arXiv:2501.03575", 3, note="time counts in 1/24 s",
    ),
    "lumina_next": Preset("alternate(axial(base=10000))", "diffusers get_2d_rotary_pos_embed_lumina; arXiv:2406.18583"),
    "hunyuan_dit": Preset(
        "xy(axial(base=10000))", "diffusers get_2d_rotary_pos_embed; arXiv:2405.08748",
        note="coordinates are those of the crop in a reference grid: give your own",
    ),
    "mochi": Preset(
        "mixed", "diffusers MochiRoPE", 3,
        note="frequencies start at 0; coordinates are centred, scaled to an area of 192 x 192: give your own",
    ),
}  # fmt: skip


# ---- orders of channels and places ----------------------------------------------------------------------------------


def _columns(name: str, layout: Layout, scheme: Position, change: Callable[[Tensor], Tensor]) -> Rotary:
    """A rotary scheme whose frequencies (…, A, R) are changed."""
    if not isinstance(scheme, Rotary) or scheme.initial.shape[-2] != layout.axes:
        raise ValueError(f"{name} modifies a rotary scheme with frequencies for each axis, such as {name}(axial)")
    scheme.initial = change(scheme.initial)
    if isinstance(scheme, Exact):
        scheme.exact = change(scheme.exact)
    scheme.reset_parameters()
    return scheme


@register
def xy(layout: Layout, scheme: Position) -> Rotary:
    """A rotary scheme that takes the axes in reverse order: x before y, the first channels to the column."""
    return _columns("xy", layout, scheme, lambda freqs: freqs.flip(-2))


@register
def alternate(layout: Layout, scheme: Position) -> Rotary:
    """A rotary scheme whose axes take turns pair by pair, rather than a block of channels each."""

    def change(freqs: Tensor) -> Tensor:
        blocks = freqs.unflatten(-1, (layout.axes, -1)) if freqs.shape[-1] % layout.axes == 0 else freqs[..., None]
        own = torch.eye(layout.axes, dtype=torch.bool, device=freqs.device)[..., None]
        if blocks.shape[-2] != layout.axes or blocks.masked_select(~own).any():
            raise ValueError("axes alternate where each has as many pairs of its own as the others: alternate(axial)")
        return blocks.transpose(-1, -2).flatten(-2)

    return _columns("alternate", layout, scheme, change)


@register
class Reference(Position):
    """A scheme that measures every grid by one of `grid` cells: coordinate c of n cells counts as c / n * grid.

    So an image of any size spans the turns of the size that EVA-02 (arXiv:2303.11331) was trained with. `grid` is the
    training grid unless told otherwise. The caller's own coordinates, which come from no grid, are taken as cells of
    the reference. Raises ValueError for a grid of another number of axes.
    """

    def __init__(self, layout: Layout, scheme: Position, grid: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.scheme, self.grid = scheme, layout.grid if grid is None else grid
        for claim in ("relative", "reversible", "keeps_flash", "extrapolates", "each_layer"):
            setattr(self, claim, getattr(scheme, claim))
        check_shape(self.grid)
        if len(self.grid) != layout.axes:
            raise ValueError(f"reference grid {self.grid} has {len(self.grid)} axes, the layout {layout.axes}")

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return self.scheme.add(x, coords, grid, layer)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        if grid is not None:
            coords = self.measure(coords, grid)
            key_coords = None if key_coords is None else self.measure(key_coords, grid)
        return self.scheme.encode(coords, key_coords, grid)

    def measure(self, coords: Tensor, grid: Sequence[int]) -> Tensor:
        """Coordinates (…, A) on `grid` in cells of the reference grid."""
        cells = [coords[..., a] / n * m for a, (n, m) in enumerate(zip(grid, self.grid, strict=True))]
        return torch.stack(cells, dim=-1)


@register
def dealt(layout: Layout, base: float = 10000.0, blocks: bool = False, idle: int = 0, pairs: Pairs = "half") -> Rotary:
    """One series of frequencies base^(-j/R) over all R pairs of a head, dealt out to the axes in turn.

    Each round of the deal begins with `idle` pairs that stay un-rotated (of axes that images do not have). With
    `blocks` the pairs of an axis then lie together, as in Pixtral (arXiv:2410.07073); else as they were dealt, the
    multimodal RoPE of Qwen2-VL's kin (arXiv:2409.12191).
    """
    if idle < 0 or base <= 0 or layout.head_dim % 2:
        raise ValueError(f"dealt needs idle >= 0, base > 0 and an even head_dim, got {idle}, {base}, {layout.head_dim}")
    series = geometric(layout.head_dim // 2, base)
    axis = torch.arange(len(series), device="cpu") % (idle + layout.axes) - idle
    freqs = torch.stack([torch.where(axis == a, series, 0.0) for a in range(layout.axes)])
    if blocks:
        freqs = freqs[:, axis.argsort(stable=True)]
    return Rotary(freqs[None, None], pairs)


# ---- orders and precisions of computing -----------------------------------------------------------------------------


class Exact(Rotary):
    """A rotary scheme that computes its angles as its source does, from numbers `exact` (A, R) for axes and pairs."""

    def __init__(self, freqs: Tensor, exact: Tensor, pairs: Pairs = "interleaved") -> None:
        super().__init__(freqs[None, None], pairs)
        self.exact = exact

    def angle(self, coords: Tensor, exact: Tensor) -> Tensor:
        """Angles (…, A, R) of coordinates (…, A, 1), of which the sum over the axes counts."""
        raise NotImplementedError(f"{type(self).__name__} needs angle()")

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        k = None if key_coords is None else self.side(key_coords)
        return Encoding(self.side(coords), k, stride=self.stride)

    def side(self, coords: Tensor) -> Side:
        """Queries or keys at coordinates (N, A) or (B, N, A)."""
        places = coords if coords.ndim == 3 else coords[None]
        theta = self.angle(places[..., None], self.exact.to(coords.device)).sum(dim=-2)[:, :, None]
        return Side(turn=[torch.stack((theta.cos(), theta.sin()), dim=-1).to(coords.dtype)])


@register
class DinoV3(Exact):
    """DINOv3's axial RoPE (arXiv:2508.10104): coordinate c, centered in [-1, 1], turns by 2 pi c / period.

    The periods of an axis are base^(j/P), j = 0 … P - 1. The files that Meta publishes carry them rounded to
    "bfloat16"; timm and transformers compute them in "float32". Raises ValueError where axes have no equal share.
    """

    def __init__(
        self,
        layout: Layout,
        base: float = 100.0,
        pairs: Pairs = "half",
        periods: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        count = axial(layout, base).initial.shape[-1] // layout.axes
        series = base ** (torch.arange(count, dtype=torch.float32, device="cpu") / count)
        if periods == "bfloat16":
            series = series.bfloat16().float()
        exact = torch.full((layout.axes, layout.axes, count), math.inf, device="cpu")
        exact[range(layout.axes), range(layout.axes)] = series
        exact = exact.flatten(1)
        super().__init__(2 * math.pi / exact, exact, pairs)
        self.periods = periods

    def angle(self, coords: Tensor, exact: Tensor) -> Tensor:
        return 2 * math.pi * coords / exact


@register
class Axial64(Exact):
    """`axial` whose frequencies and angles are float64 until their cosine is taken, as Flux and Wan compute them.

    Compiled and exported graphs stay in the coordinates' own precision, for not every device has float64.
    """

    def __init__(
        self, layout: Layout, base: float = 10000.0, share: Literal["equal", "rest"] | tuple[int, ...] = "equal"
    ) -> None:
        freqs = axial(layout, base, share).initial[0, 0]
        exact = torch.zeros_like(freqs, dtype=torch.float64)
        for axis, row in enumerate(freqs):
            at = row.nonzero()[:, 0]
            exact[axis, at] = 1.0 / base ** (torch.arange(len(at), dtype=torch.float64, device="cpu") / len(at))
        super().__init__(freqs, exact)

    def angle(self, coords: Tensor, exact: Tensor) -> Tensor:
        return coords.double() * exact

    def side(self, coords: Tensor) -> Side:
        return turning(self.frequencies(coords), coords) if torch.compiler.is_compiling() else super().side(coords)


@register
class VJepa2(Position):
    """What V-JEPA 2 (arXiv:2506.09985) does in place of a rotation: the two channels of a pair turn by other angles.

    Each axis has an equal, even share of channels, the rest stays as it is; of a share of D channels, channel i turns
    by coordinate * base^(-2 (i mod D/2) / D), beside its neighbour. Scores depend on more than displacements: it serves
    weights that were trained so.
    """

    relative, reversible = False, True

    def __init__(self, layout: Layout, base: float = 10000.0) -> None:
        super().__init__()
        width = 2 * (layout.head_dim // layout.axes // 2)
        if width == 0 or base <= 0:
            raise ValueError(f"vjepa2 needs a base above 0 and heads of {2 * layout.axes} channels or more")
        omega = geometric(width // 2, base).float().repeat(2)
        speeds = torch.zeros(layout.axes, layout.axes, width, device="cpu")
        speeds[range(layout.axes), range(layout.axes)] = omega
        self.speeds = torch.nn.functional.pad(speeds.flatten(1), (0, layout.head_dim - layout.axes * width))

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        k = None if key_coords is None else self.side(key_coords)
        return Encoding(self.side(coords), k)

    def side(self, coords: Tensor) -> Side:
        """Matrices (B, N, 1, D, D) that stand for the rotations."""
        coords = coords if coords.ndim == 3 else coords[None]
        theta = (coords[..., None] * self.speeds.to(coords)).sum(dim=-2)
        channels = theta.shape[-1]
        across = theta.new_zeros(channels, channels)
        even = torch.arange(0, channels - 1, 2, device=theta.device)
        across[even, even + 1], across[even + 1, even] = 1.0, -1.0
        matrix = torch.diag_embed(theta.cos()) + across * theta.sin()[..., None, :]
        return Side(basis=[matrix[:, :, None]])
