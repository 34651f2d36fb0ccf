"""Positions in the attention of a U-Net that you have: `add_positions(unet, "axial(base=100)")`.

A position scheme is a function of coordinates. Each self-attention over a feature map gets a scheme of its own, asks it
for an encoding and hands that to the same `attend` as the ViT's; coordinates come from the map that it is given. In
transformer blocks the map is flattened before attention sees it, so its grid travels beside the tokens. Attention over
anything else (text, frames) has no place and stays as it is.

A U-Net with positions has a class and a config of its own, so that a folder which it was saved to never comes back
without them unnoticed: `RopeUNet2DModel.from_pretrained` loads one, `UNet2DModel.from_pretrained` warns.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.modeling_utils import ModelMixin  # pipelines look for this name in a model's module
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel, UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils import is_accelerate_available
from torch import Tensor, nn

from .attention import GridTransformer2DModel, PlacedAttention, PositionProcessor, UnplacedAttention
from .maps import Kind, Origin, begin_missing, build_at, map_layout, pixels

# keys of the config, beside the diffusers class's own
KEYS = ("position", "position_unit", "position_origin", "attention", "zero_init")


def add_positions(
    unet: nn.Module,
    spec: str,
    unit: str = "index",
    origin: Origin = 0.0,
    sample_size: int | Sequence[int] | None = None,
    attention: Kind = "softmax",
) -> nn.Module:
    """Give every self-attention of a U-Net the positions that `spec` names, in place, and return the U-Net.

    Works on diffusers U-Nets, whose class and config then name the positions, and on denoising-diffusion-pytorch's
    `Unet`, which does not know the size that it is trained at: say it as `sample_size`, in pixels. Absolute schemes are
    added to the normalised input of the attention. `unit` "index" counts the cells of each map; "pixel" places a cell
    at the centre of its own pixels of the U-Net's input, so that all levels speak of the same image, as the "centered"
    units of `coords.grid` do. `origin` is the place, in that unit, which becomes 0. `attention` "linear" makes all of
    them linear, as `attention.attend_linear` has it, which is another function than the softmax of a trained U-Net.

    Raises TypeError for another model and ValueError where it has positions already or no self-attention over maps, or
    where an attention cannot take the scheme or is of a kind that has no place; the U-Net is then as it was.
    """
    if _is_lucidrains(unet):
        from . import lucidrains

        if attention != "softmax":
            raise ValueError(f"this Unet has linear attention where it was made so (full_attn); got {attention!r}")
        return lucidrains.add_positions(unet, spec, sample_size, unit, origin)
    if not isinstance(unet, ModelMixin) or not hasattr(unet, "down_blocks"):
        raise TypeError(f"add_positions takes a U-Net of diffusers or denoising-diffusion-pytorch, got {_name(unet)}")
    if isinstance(unet, RopeMixin):
        raise ValueError(f"the U-Net has positions already, {unet.config['position']!r}; call remove_positions first")
    if sample_size is not None:
        raise ValueError(f"{_SAMPLE_SIZE}; got sample_size={sample_size!r} beside it")
    _install(unet, spec, unit, origin, attention)
    unet.__class__ = rope_class(type(unet))
    return unet


def remove_positions(unet: nn.Module) -> nn.Module:
    """Undo `add_positions`, in place: modules, class and config are as before. Returns the U-Net.

    Raises ValueError where the U-Net has no positions.
    """
    if _is_lucidrains(unet):
        from . import lucidrains

        return lucidrains.remove_positions(unet)
    if not isinstance(unet, RopeMixin):
        raise ValueError(f"this {_name(unet)} has no positions to remove")
    plain: Any = AttnProcessor2_0()
    for module in unet.modules():
        if isinstance(module, PlacedAttention):
            del module.position, module.layout
            Attention.set_processor(module, plain)
        module.__class__ = _STAND_INS.get(type(module), type(module))
    unet.__class__ = _stock(type(unet))
    unet._internal_dict = type(unet.config)({key: value for key, value in unet.config.items() if key not in KEYS})
    return unet


_STAND_INS: dict[type[nn.Module], type[nn.Module]] = {
    PlacedAttention: Attention,
    UnplacedAttention: Attention,
    GridTransformer2DModel: Transformer2DModel,
}


# ---- where attention is ---------------------------------------------------------------------------------------------

_SAMPLE_SIZE = (
    "a diffusers U-Net has the size that it is trained at in its config; "
    "set it there, e.g. by unet.register_to_config(sample_size=(32, 32))"
)


def _attentions(unet: nn.Module) -> Iterator[tuple[str, Attention, Transformer2DModel | None]]:
    """Name, module and host of every self-attention over a map; the host, if any, flattens the map for it."""
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and re.search(r"(^|\.)attentions\.\d+$", name):
            if not module.is_cross_attention:
                yield name, module, None
        elif isinstance(module, Transformer2DModel) and module.is_input_continuous:
            for i, block in enumerate(module.transformer_blocks):
                for part in ("attn1", "attn2"):
                    attention = getattr(block, part)
                    if attention is not None and not attention.is_cross_attention:
                        yield f"{name}.transformer_blocks.{i}.{part}", attention, module


def _check_reached(unet: nn.Module, reached: set[str]) -> None:
    """Raise ValueError where no attention is `reached`, or not all that have keys from a map."""
    remedy = "choose block types that have it as AttnDownBlock2D and CrossAttnDownBlock2D do"
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name not in reached:
            over_map = re.match(
                r"(down_blocks|mid_block|up_blocks)\.(?!.*(temp|motion|fuser))", name
            )  # not time, boxes
            joined = module.added_kv_proj_dim is not None and not module.only_cross_attention
            if over_map and (joined or not module.is_cross_attention):
                what = f"{name} of this {_name(unet)}, which is self-attention of another kind"
                raise ValueError(f"positions do not reach {what}; {remedy}")
    if not reached:
        raise ValueError(
            f"this {_name(unet)} has no self-attention over a feature map that positions reach, so there is nothing to "
            f"place; {remedy}"
        )


def _halvings(unet: Any) -> list[bool]:
    return [getattr(block, "downsamplers", None) is not None for block in unet.down_blocks]


def _level(unet: nn.Module, name: str) -> int:
    """How often the map that the module of this name sees has been halved."""
    halvings = _halvings(unet)
    part, index = name.split(".")[:2]
    if part == "down_blocks":
        return sum(halvings[: int(index)])
    return sum(halvings[: -1 - int(index)] if part == "up_blocks" else halvings)


def _install(unet: Any, spec: str, unit: str, origin: Origin, kind: Kind) -> None:
    """Place every self-attention, all or none, and write so into the config."""
    found = list(_attentions(unet))
    _check_reached(unet, {name for name, _, _ in found})
    if unet.config.get("sample_size") is None:
        raise ValueError(f"{_SAMPLE_SIZE}; it is None")
    size, plan, hosts = pixels(unet.config.sample_size), [], set()
    for name, attention, host in found:
        if type(attention) is not Attention or type(attention.processor) is not AttnProcessor2_0:
            raise ValueError(
                f"{name} computes attention its own way, by {_name(attention.processor)}, which positions would "
                f"replace; give it a plain one first, set_processor(AttnProcessor2_0())"
            )
        level, head = _level(unet, name), attention.inner_dim // attention.heads
        layout = map_layout(attention.query_dim, attention.heads, head, level, size, unit, origin)
        what = "channels of a head" if host is None else "number of heads"
        remedy = f"attention_head_dim in the U-Net's config sets the {what} here"
        plan.append((attention, layout, build_at(name, level, spec, layout, remedy, kind)))
        hosts.add(host)
    for attention, layout, position in plan:
        attention.__class__ = PlacedAttention
        attention.layout, attention.position = layout, position
        attention.set_processor(PositionProcessor(kind))
    for host in hosts - {None}:
        host.__class__ = GridTransformer2DModel
        for module in host.modules():
            if type(module) is Attention:
                module.__class__ = UnplacedAttention
    unet.register_to_config(position=spec, position_unit=unit, position_origin=origin, attention=kind)


def _name(thing: object) -> str:
    return type(thing).__name__


def _is_lucidrains(unet: object) -> bool:
    return any(base.__module__.partition(".")[0] == "denoising_diffusion_pytorch" for base in type(unet).__mro__)


# ---- models ---------------------------------------------------------------------------------------------------------

_CLASSES: dict[type, type] = {}


class RopeMixin:
    """What a U-Net with positions has beside its diffusers class.

    `position`, `position_unit`, `position_origin` and `attention` are `spec`, `unit`, `origin` and `attention` of
    `add_positions`. With `zero_init` the output and the last layer of every residual branch begin at zero, as in DDPM
    (arXiv:2006.11239) and ADM (arXiv:2105.05233). All five are keys of the config.
    """

    config: Any
    register_to_config: Any
    _keep_in_fp32_modules: list[str] | None

    def __init__(
        self,
        *args: Any,
        position: str = "axial",
        position_unit: str = "index",
        position_origin: Origin = 0.0,
        attention: Kind = "softmax",
        zero_init: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        _install(self, position, position_unit, position_origin, attention)
        self.register_to_config(zero_init=zero_init)
        if zero_init:
            _zero_outputs(self)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As diffusers has it; what positions learn and the folder has not, for it was another's, begins anew."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # pyrefly: ignore[missing-attribute]
        begin_missing(loaded[0], loaded[1].get("missing_keys", []))
        return loaded if output_loading_info else loaded[0]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = _stock(cls)
        if RopeMixin in cls.__bases__:
            _CLASSES.setdefault(stock, cls)
            if is_accelerate_available():  # learned frequencies keep their precision in from_pretrained(torch_dtype=…)
                cls._keep_in_fp32_modules = [*(stock._keep_in_fp32_modules or []), "position"]
        if "__init__" not in vars(cls):
            cls.__init__ = _spelled_out(cls.__init__, stock)


def _stock(cls: type) -> Any:
    """The diffusers class that a class with positions extends."""
    return next(base for base in cls.__mro__ if not issubclass(base, RopeMixin))


def _spelled_out(init: Any, stock: type) -> Any:
    """The same constructor with all config keys in its signature, where diffusers and command lines read them off."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)

    own = [p for p in inspect.signature(RopeMixin.__init__).parameters.values() if p.name in KEYS]
    signature = inspect.signature(stock.__init__)
    __init__.__dict__["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), *own])
    return __init__


def _zero_outputs(unet: Any) -> None:
    for module in unet.modules():
        last: Any = None
        if isinstance(module, Attention) and module.residual_connection:
            last = module.to_out
        elif isinstance(module, ResnetBlock2D):
            last = module.conv2
        elif isinstance(module, Transformer2DModel):
            last = module.proj_out
        elif module is unet:
            last = unet.conv_out
        for parameter in () if last is None else last.parameters():
            nn.init.zeros_(parameter)


class RopeUNet2DModel(RopeMixin, UNet2DModel):
    """diffusers' UNet2DModel, with all of its options, whose self-attention has positions.

    It needs `sample_size`, for some schemes are made for a grid; `attention_head_dim`, 8 unless given, is the channels
    of a head and worth raising, for a rotation shares them between the axes. Works at every size that divides by its
    downsampling.
    """

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor, ...]:
        """Noisy images (B, C, H, W) to a prediction of the same size; raises ValueError for a size that cannot be."""
        factor = 2 ** sum(_halvings(self))
        height, width = sample.shape[-2:]
        if height % factor or width % factor:
            raise ValueError(
                f"images of {height} x {width} do not divide by {factor}, which is how much this U-Net downsamples; "
                f"pad, crop or resize them to multiples of {factor}"
            )
        return super().forward(sample, timestep, class_labels, return_dict)


class RopeUNet2DConditionModel(RopeMixin, UNet2DConditionModel):
    """diffusers' UNet2DConditionModel, whose self-attention has positions and whose cross-attention has none."""


def rope_class(stock: type) -> type:
    """The class with positions of a diffusers U-Net class: RopeUNet2DModel of UNet2DModel, and so on for any other."""
    if stock not in _CLASSES:
        type(f"Rope{stock.__name__}", (RopeMixin, stock), {"__module__": __name__})
    return _CLASSES[stock]


def __getattr__(name: str) -> type:  # how a saved pipeline, or a pickle, finds the classes that were not written out
    stock = _called(name.removeprefix("Rope")) if name.startswith("Rope") else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, or its class is yet to be imported")
    return rope_class(stock)


def _called(name: str) -> type | None:
    """The model of diffusers of this name, or else one of the user's own, made of it and imported by now."""
    stock = getattr(diffusers, name, None)
    if isinstance(stock, type) and issubclass(stock, ModelMixin):
        return stock
    below: list[type] = [ModelMixin]
    for cls in below:  # which grows
        below += cls.__subclasses__()
    own = [cls for cls in below if cls.__name__ == name and not issubclass(cls, RopeMixin)]
    return own[-1] if own else None
