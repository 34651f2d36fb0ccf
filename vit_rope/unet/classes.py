"""The classes of U-Nets with positions, which saving and loading need: RopeUNet2DModel, RopeUNet2DConditionModel …"""

import inspect
from typing import Any

import diffusers
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel, UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils import is_accelerate_available
from torch import Tensor, nn

from .attention import install
from .maps import Kind, Origin, halvings, reset_missing_parameters

# keys of the config, beside the diffusers class's own
KEYS = ("position", "position_unit", "position_origin", "attention", "zero_init")
HOME = "vit_rope.unet"  # the module that saved pipelines name
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
        install(self, position, position_unit, position_origin, attention)
        self.register_to_config(zero_init=zero_init)
        if zero_init:
            _zero_outputs(self)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As diffusers has it; what positions learn and the folder has not, for it was another's, begins anew."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # pyrefly: ignore[missing-attribute]
        reset_missing_parameters(loaded[0], loaded[1].get("missing_keys", []))
        return loaded if output_loading_info else loaded[0]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ == __name__:
            cls.__module__ = HOME
        stock = stock_class(cls)
        if RopeMixin in cls.__bases__:
            _CLASSES.setdefault(stock, cls)
            if is_accelerate_available():  # learned frequencies keep their precision in from_pretrained(torch_dtype=…)
                cls._keep_in_fp32_modules = [*(stock._keep_in_fp32_modules or []), "position"]
        if "__init__" not in vars(cls):
            cls.__init__ = _spelled_out(cls.__init__, stock)


def stock_class(cls: type) -> Any:
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
        factor = 2 ** sum(halvings(self))
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
        type(f"Rope{stock.__name__}", (RopeMixin, stock), {"__module__": HOME})
    return _CLASSES[stock]


def class_named(name: str, module: str) -> type:
    """The class with positions called `name`, such as RopeUNet2DModel; AttributeError where there is none."""
    stock = _called(name.removeprefix("Rope")) if name.startswith("Rope") else None
    if stock is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}, or its class is yet to be imported")
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
