"""The classes of U-Nets with positions, which diffusers needs in order to save and load them.

diffusers writes the name of a model's class into its folder, and the keys of its config are the
arguments of that class's constructor. So every U-Net class needs a counterpart with positions:
RopeUNet2DModel, RopeUNet2DConditionModel and, made when they are first asked for, one for any other
class.

Shapes   B samples, C channels, H and W height and width in pixels
"""

import inspect
from collections.abc import Iterator, Sequence
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

from ..positions import Position
from .attention import install, reinstall
from .maps import AttentionKind, Origin, halvings

CONFIG_KEYS = ("position", "position_unit", "position_origin", "attention", "zero_init")  # added to diffusers' keys
SAVED_MODULE = "vit_rope.unet"  # the module in which saved pipelines and pickles look for the classes
_ROPE_CLASSES: dict[type, type] = {}  # the class with positions of each diffusers class


class RopeMixin:
    """What a U-Net with positions adds to its diffusers class.

    Args:
        position, position_unit, position_origin, attention: `spec`, `unit`, `origin` and
            `attention` of `add_positions`
        zero_init: start the output and the last layer of every residual branch at zero, as in DDPM
            (arXiv:2006.11239) and ADM (arXiv:2105.05233)

    All five are keys of the config.
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
        attention: AttentionKind = "softmax",
        zero_init: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        install(self, position, position_unit, position_origin, attention)
        self.register_to_config(zero_init=zero_init)
        if zero_init:
            _zero_outputs(self)

    def set_position(self, spec: str) -> None:
        """Switch to another spec with the same parameters: "yarn(mixed, factor=2)" after "mixed".

        What the positions have learned stays, and the config names the new spec. Raises ValueError,
        and changes nothing, for a spec that does not fit or has other parameters.
        """
        reinstall(self, spec)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; initialises parameters of positions that the folder does not have."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # pyrefly: ignore[missing-attribute]
        reset_missing_parameters(loaded[0], loaded[1].get("missing_keys", []))
        return loaded if output_loading_info else loaded[0]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register a class with positions, written out below or made by `rope_class`."""
        super().__init_subclass__(**kwargs)
        if cls.__module__ == __name__:
            cls.__module__ = SAVED_MODULE
        stock = stock_class(cls)
        if RopeMixin in cls.__bases__:  # not a user's subclass of such a class
            _ROPE_CLASSES.setdefault(stock, cls)
            if is_accelerate_available():  # from_pretrained(torch_dtype=…) then keeps frequencies in float32
                cls._keep_in_fp32_modules = [*(stock._keep_in_fp32_modules or []), "position"]
        if "__init__" not in vars(cls):
            cls.__init__ = _with_all_config_keys(cls.__init__, stock)


def stock_class(cls: type) -> Any:
    """The diffusers class that a class with positions extends."""
    return next(base for base in cls.__mro__ if not issubclass(base, RopeMixin))


def _with_all_config_keys(init: Any, stock: type) -> Any:
    """The same constructor with every key of the config in its signature.

    diffusers reads the keys of a config off the signature, and command lines their options; that of
    RopeMixin has only (*args, **kwargs) for the keys of the diffusers class.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)

    added = [p for p in inspect.signature(RopeMixin.__init__).parameters.values() if p.name in CONFIG_KEYS]
    signature = inspect.signature(stock.__init__)
    __init__.__dict__["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), *added])
    return __init__


def _zero_outputs(unet: Any) -> None:
    """Set the output layer and the last layer of every residual branch to zero."""
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


def reset_missing_parameters(model: nn.Module, missing: Sequence[str]) -> None:
    """Initialise the schemes whose parameters a folder does not have, given the `missing` keys.

    diffusers leaves such parameters uninitialised or on the meta device.
    """
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)
    for name, module in model.named_modules():
        keys = {f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
        if isinstance(module, Position) and not keys.isdisjoint(missing):
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device=device or "cpu", recurse=False)
            module.reset_parameters()


class RopeUNet2DModel(RopeMixin, UNet2DModel):
    """diffusers' UNet2DModel, with all of its options, whose self-attention has positions.

    It needs `sample_size`, as some schemes are made for a grid. `attention_head_dim` is the number
    of channels of a head, 8 by default, and worth raising: a rotation shares them between the axes.
    Works at every size divisible by its downsampling factor.
    """

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor, ...]:
        """Noisy images (B, C, H, W) to a prediction of the same shape.

        Raises ValueError for a size that is not divisible by the downsampling factor.
        """
        factor = 2 ** sum(halvings(self))
        height, width = sample.shape[-2:]
        if height % factor or width % factor:
            raise ValueError(
                f"images of {height} x {width} are not divisible by {factor}, the factor by which this U-Net "
                f"downsamples; pad, crop or resize them to multiples of {factor}"
            )
        return super().forward(sample, timestep, class_labels, return_dict)


class RopeUNet2DConditionModel(RopeMixin, UNet2DConditionModel):
    """diffusers' UNet2DConditionModel, whose self-attention has positions; cross-attention has
    none.
    """


def rope_class(stock: type) -> type:
    """The class with positions for a diffusers class, such as RopeUNet2DModel for UNet2DModel."""
    if stock not in _ROPE_CLASSES:  # creating the class registers it, in __init_subclass__
        type(f"Rope{stock.__name__}", (RopeMixin, stock), {"__module__": SAVED_MODULE})
    return _ROPE_CLASSES[stock]


def class_named(name: str, module: str) -> type:
    """The class with positions of this name, such as RopeUNet2DModel.

    Raises AttributeError, as `module` would, if there is none.
    """
    stock = _stock_class_named(name.removeprefix("Rope")) if name.startswith("Rope") else None
    if stock is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}, or its class has not been imported yet")
    return rope_class(stock)


def _stock_class_named(name: str) -> type | None:
    """The diffusers model of this name, or else the latest user-defined one imported so far."""
    stock = getattr(diffusers, name, None)
    if isinstance(stock, type) and issubclass(stock, ModelMixin):
        return stock
    defined = [cls for cls in _subclasses(ModelMixin) if cls.__name__ == name and not issubclass(cls, RopeMixin)]
    return defined[-1] if defined else None


def _subclasses(cls: type) -> Iterator[type]:
    """All subclasses of a class, direct ones first, then theirs."""
    level = [cls]
    while level:
        level = [sub for parent in level for sub in parent.__subclasses__()]
        yield from level
