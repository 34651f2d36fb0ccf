"""Train any timm model as a classifier.

Shapes   B images, C channels, (H, W) height and width of an image
"""

import json
import logging
import sys
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors.torch import save
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import check_fit, one_line, read, replacing
from .learner import Learner, NonFinite
from .optim import OptimConfig, ScheduleConfig

log = logging.getLogger(__name__)
OPTIM, SCHEDULE = OptimConfig(), ScheduleConfig()


class Classification(Learner):
    """Training and evaluation of a timm classifier.

    Logs `val/loss`, `val/acc`, `test/loss` and `test/acc`.

    Args:
        model: any timm model name; a position scheme goes into `model_args`
        model_args: keyword arguments of `timm.create_model`, such as
            {position: "axial(base=100)", depth: 6}
        num_classes: number of classes; set from the data, as are `in_chans` and `img_size`
        in_chans: channels of an image
        img_size: side of an image in pixels
        weights: file to fine-tune from: a checkpoint or safetensors (exported, or timm's)
        mixup: alpha of mixup (arXiv:1710.09412); 0 is off
        cutmix: alpha of CutMix (arXiv:1905.04899); 0 is off
        label_smoothing: fraction of the target that is spread over all classes
        loss: cross entropy, or a binary cross entropy per class (as in DeiT III, arXiv:2204.07118)
        compile: run the model through torch.compile
        nonfinite: for a loss that is nan or infinite: stop the run, skip the batch, or ignore it
        optim: optimizer, learning rate, weight and layer decay
        schedule: warm-up and course of the learning rate
    """

    def __init__(
        self,
        model: str,
        model_args: dict[str, Any] | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int = 224,
        weights: str = "",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        loss: Literal["cross_entropy", "binary"] = "cross_entropy",
        compile: bool = False,
        nonfinite: NonFinite = "stop",
        optim: OptimConfig = OPTIM,
        schedule: ScheduleConfig = SCHEDULE,
    ):
        super().__init__(model, optim, schedule, nonfinite)
        if min(mixup, cutmix, label_smoothing) < 0 or label_smoothing >= 1:
            raise ValueError(
                "Classification needs mixup >= 0, cutmix >= 0 and 0 <= label_smoothing < 1, "
                f"got {mixup}, {cutmix} and {label_smoothing}"
            )
        if loss == "binary" and label_smoothing:
            raise ValueError("the binary loss counts each class of a target as present, so label_smoothing must be 0")
        if num_classes < 2:
            raise ValueError(f"Classification needs at least 2 classes, the data have {num_classes}")
        self.binary, self.label_smoothing = loss == "binary", label_smoothing
        self.model, self.model_args = create_classifier(model, model_args or {}, num_classes, in_chans, img_size)
        self.img_size = self.model_args.get("img_size", img_size)
        if weights:
            load_weights(self.model, weights, model)
        self.mixup = None
        if mixup or cutmix:
            self.mixup = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
        if compile:
            self.model.compile()  # in place, which keeps the names in checkpoints

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W)."""
        return self.model(images)

    def loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of images (B, C, H, W) and labels (B,), a scalar, after mixup and CutMix."""
        images, labels = self._check(batch)
        if self.mixup is not None and len(images) % 2 == 0:
            images, targets = self.mixup(images, labels)
        else:  # timm's Mixup mixes image i with image B - 1 - i and needs an even B
            targets = mixup_target(labels, self.model_args["num_classes"], smoothing=self.label_smoothing)
        logits = self(images).float()
        if self.binary:
            return F.binary_cross_entropy_with_logits(logits, targets.gt(0.0).float())
        return F.cross_entropy(logits, targets)

    def on_validation_epoch_start(self) -> None:
        """Forget the scores of earlier evaluations."""
        self.scores: list[Tensor] = []  # of each batch: loss, correct images and images, summed

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Score a batch."""
        self._score(batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss` and `val/acc`."""
        self._log_scores("val")

    def on_test_epoch_start(self) -> None:
        """Forget the scores of earlier evaluations."""
        self.on_validation_epoch_start()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Score a batch."""
        self._score(batch)

    def on_test_epoch_end(self) -> None:
        """Log `test/loss` and `test/acc`."""
        self._log_scores("test")

    def export(self, folder: Path, state_dict: dict[str, Tensor], extra: dict[str, Any]) -> Path:
        """Write model.safetensors and config.json, and return the path of the first.

        timm loads them with `create_model("local-dir:FOLDER", pretrained=True)`.

        Args:
            folder: where to write them
            state_dict: weights of this module
            extra: entries of timm's `pretrained_cfg`, such as mean and std of the images
        """
        weights = {k.removeprefix("model."): v.contiguous() for k, v in state_dict.items() if k.startswith("model.")}
        sides = [self.img_size] * 2 if isinstance(self.img_size, int) else list(self.img_size)
        default: dict[str, Any] = getattr(self.model, "default_cfg", {})
        pretrained = {key: default[key] for key in ("classifier", "first_conv") if key in default}
        input_size = [self.model_args["in_chans"], *sides]
        pretrained |= {"num_classes": self.model_args["num_classes"], "input_size": input_size}
        config = {"architecture": self.name, "model_args": self.model_args, "pretrained_cfg": pretrained | extra}
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("config.json", json.dumps(config, indent=2) + "\n"),
            ("model.safetensors", save(weights)),
        ):
            with replacing(folder / name) as file:
                file.write(content if isinstance(content, bytes) else content.encode())
        return folder / "model.safetensors"

    def _check(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        channels = self.model_args["in_chans"]
        if images.shape[1] != channels:
            raise ValueError(
                f"{self.name} was built for images of {channels} channels, the data have {images.shape[1]}"
            )
        return images, labels

    def _score(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = self._check(batch)
        logits = self(images).float()
        correct = (logits.argmax(dim=1) == labels).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        self.scores.append(torch.stack((losses, correct, torch.ones_like(losses))).sum(dim=1))  # stays on the device

    def _log_scores(self, split: str) -> None:
        """Log the mean loss and accuracy of all images of all processes."""
        loss, correct, images = self.total(torch.stack(self.scores).cpu().double().sum(dim=0))
        self.log_dict({f"{split}/loss": loss / images, f"{split}/acc": correct / images}, sync_dist=True)


def create_classifier(
    name: str, args: dict[str, Any], num_classes: int, in_chans: int, img_size: int
) -> tuple[nn.Module, dict[str, Any]]:
    """A timm model for the data, and all arguments that it was created with.

    `args` may replace `img_size`. Raises ValueError or TypeError, of one line, for a name that timm
    does not know and for arguments that do not fit.
    """
    check_name(name)
    of_data: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
    for key in ("num_classes", "in_chans"):
        if args.get(key, of_data[key]) != of_data[key]:
            raise ValueError(f"model_args give {key} {args[key]}, but the data have {of_data[key]}; leave it out")
    args = of_data | args
    try:
        return timm.create_model(name, **args), args
    except ValueError:
        raise  # mostly from this library, with a message that explains it
    except Exception as error:  # for arguments it does not expect, a constructor may raise any exception
        if not isinstance(error, TypeError) or "'img_size'" not in str(error):
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{name} with {args}: {one_line(error)}") from error
    del args["img_size"]  # a convolutional network, which accepts images of any size
    return timm.create_model(name, **args), args


def check_name(name: str) -> None:
    """Raise ValueError with the most similar names if timm has no model of this name."""
    if ":" not in name and not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3) or timm.list_models("vit_rope*")
        raise ValueError(f"timm has no model {name!r}; did you mean {', '.join(near)}?")


def load_weights(model: nn.Module, path: str, name: str) -> None:
    """Load the weights of a timm model from a checkpoint or a safetensors file.

    The checkpoint may be of this library or of timm. A classifier for a different number of classes
    keeps its initial weights. Raises ValueError for anything else that does not fit the model.
    """
    content = read(path)
    key = next((key for key in ("state_dict_ema", "model_ema", "state_dict", "model") if key in content), None)
    state = content if key is None else content[key]
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} has no weights: its {key} is not a dictionary with names as keys")
    state = without_prefixes(state, model.state_dict(), path)
    # timm's convention: the file of a model has a function that converts its checkpoints
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            state = convert(state, model)
        except Exception as error:  # timm's functions expect certain tensors to exist
            raise ValueError(f"{path} has the weights of a model other than {name}: {one_line(error)}") from error
    initial, heads = model.state_dict(), _classifiers(model)
    misfits = [key for key in state if key in initial and key.startswith(heads)]
    misfits = [key for key in misfits if getattr(state[key], "shape", None) != initial[key].shape]
    if misfits:
        log.info("%s has a classifier for other classes: %s is trained from scratch", path, ", ".join(misfits))
        state = {**state, **{key: initial[key] for key in misfits}}
    check_fit(model, state, name)
    model.load_state_dict(state)


def without_prefixes(state: Mapping[str, Any], wanted: Collection[str], path: str) -> dict[str, Any]:
    """The weights by their names in the model itself, not in what a program had wrapped around it.

    `_orig_mod.` (torch.compile, also of a part), `module.` (DistributedDataParallel, averages) and
    `model.` (this library, Lightning) go, in any order, unless a name is one of `wanted`. Raises
    ValueError if two names then are the same.
    """
    weights = {name: value for name, value in state.items() if name != "n_averaged" or name in wanted}
    renamed = {name: name if name in wanted else name.replace("_orig_mod.", "") for name in weights}
    while True:
        prefixes = ("module.", "model.")
        found = [prefix for prefix in prefixes if all(name.startswith(prefix) for name in renamed.values())]
        if not renamed or not found or any(name in wanted for name in renamed.values()):
            break
        renamed = {name: short.removeprefix(found[0]) for name, short in renamed.items()}
    if len(set(renamed.values())) < len(renamed):
        raise ValueError(f"{path} has the same weights twice, once with and once without a prefix such as _orig_mod.")
    return {short: weights[name] for name, short in renamed.items()}


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of a timm model's classifier parameters."""
    default: Any = getattr(model, "default_cfg", {})
    names = default.get("classifier", "head")
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
