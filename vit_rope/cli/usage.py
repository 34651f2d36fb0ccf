"""The help of fit, validate and test: one screen per command, and one per class."""

import argparse
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from docstring_parser import parse
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, callbacks, loggers, strategies

from ..training.classification import Classification
from ..training.data.folder import ImageFolder
from ..training.data.in_memory import CIFAR, Digits, FashionMNIST
from ..training.data.timm import TimmData
from ..training.diffusion import Diffusion
from ..training.ema import EMA
from ..training.optim import OptimConfig, ScheduleConfig
from ..training.run.checkpoints import BestCheckpoint, LastCheckpoint
from .parsers import HelpFormatter

MODELS = (Classification, Diffusion)  # imported, so that a configuration may give their short names
DATA = (Digits, FashionMNIST, CIFAR, ImageFolder, TimmData)
PURPOSE = {
    "fit": "Train a model.",
    "validate": "Score a checkpoint on the validation set.",
    "test": "Score a checkpoint on the test set.",
}
KEYS = {
    "out": "folder of the run (default: runs/run)",
    "seed_everything": "seed of all random numbers (default: 0)",
    "model": "class of the model and how it learns, one of those below",
    "data": "class of the data, one of those below",
    "trainer": "Lightning's Trainer: max_epochs, devices, precision, accelerator, …",
    "checkpoint": "best.ckpt: the score that chooses it (monitor); its mode, min or max",
    "last": "last.ckpt: how often it is saved (every_steps)",
    "ema": "moving average of the weights (decay)",
}
OPTIONS = {
    "--config FILE": "YAML file with these keys; without it, the one in the checkpoint",
    "--ckpt_path RUN": "checkpoint: a file, the folder of a run, or best or last, of the run in --out",
    "--KEY VALUE": "overrides the file: --data.batch_size 64 --model.optim.lr 1e-3",
    "--overwrite true": "replace the run in --out",
    "--import MODULE": "import a Python module first, for its position schemes and classes",
    "--print_config": "print the complete configuration",
    "--help NAME": "arguments of a class or a key, e.g. --help Classification or --help trainer",
    "--help all": "all options, as Lightning lists them",
}
SECTIONS = {  # keys with arguments of their own, and their class
    "trainer": Trainer,
    "checkpoint": BestCheckpoint,
    "last": LastCheckpoint,
    "ema": EMA,
    "model.optim": OptimConfig,
    "model.schedule": ScheduleConfig,
}


def topic(args: Sequence[str]) -> str | None:
    """The word after --help, or "" without one; None if no help is asked for.

    A command without any options asks for help as well.
    """
    asked = next((i for i, word in enumerate(args) if word in ("-h", "--help")), None)
    if asked is None:
        return None if args else ""
    following = args[asked + 1 : asked + 2]
    return following[0] if following and not following[0].startswith("-") else ""


def overview(verb: str) -> str:
    """The help of one of the three verbs, on one screen."""
    options = {name: text for name, text in OPTIONS.items() if verb == "fit" or "overwrite" not in name}
    tables = {
        "keys, in the YAML file and on the command line": KEYS,
        "models": {cls.__name__: _summary(cls) for cls in MODELS},
        "data": {cls.__name__: _summary(cls) for cls in DATA},
        "options": options,
    }
    source = "--config FILE" if verb == "fit" else "--ckpt_path RUN"
    lines = [f"usage: vit-rope {verb} {source} [--KEY VALUE …]", "", PURPOSE[verb]]
    for title, table in tables.items():
        lines += ["", f"{title}:", *(f"  {name:<17} {text}" for name, text in table.items())]
    lines += ["", "docs/training.md has examples of all keys. VIT_ROPE_TRACEBACK=1 shows the traceback of any error."]
    return "\n".join(lines)


def details(name: str) -> str:
    """The arguments of a class or of a key; ValueError for a name that is neither."""
    classes = {cls.__name__: cls for base in (LightningModule, LightningDataModule) for cls in _subclasses(base)}
    for module in (callbacks, loggers, strategies):
        classes |= {key: value for key, value in vars(module).items() if inspect.isclass(value)}
    keys = SECTIONS | {"optim": OptimConfig, "schedule": ScheduleConfig}
    cls = keys.get(name) or classes.get(name.rpartition(".")[2])
    if cls is None:
        known = [*SECTIONS, *(each.__name__ for each in (*MODELS, *DATA))]
        raise ValueError(f"there is no help on {name!r}; choose one of {', '.join(known)}, or all")
    prefix = next((key for key, section in SECTIONS.items() if section is cls), None)
    if prefix is None:
        prefix = "model" if issubclass(cls, LightningModule) else "data" if cls in DATA else None
    docstring = parse(inspect.getdoc(cls) or "")
    text = "\n\n".join(filter(None, (docstring.short_description, docstring.long_description)))
    parser = ClassParser(usage=argparse.SUPPRESS, add_help=False, formatter_class=HelpFormatter)
    parser.add_class_arguments(cls, prefix, as_group=False, fail_untyped=False)
    return f"{cls.__name__}: {text}\n\n{parser.format_help()}".rstrip()


class ClassParser(ArgumentParser):
    """A parser for its help only, with one name for each argument."""

    def add_argument(self, *names: str, **settings: Any) -> Any:
        """Add one argument, without the second name that jsonargparse gives to lists."""
        return super().add_argument(names[0], **settings)


def _subclasses(cls: type) -> Iterator[type]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _summary(cls: type) -> str:
    """The beginning of a docstring, in what an overview has room for."""
    text = (parse(inspect.getdoc(cls) or "").short_description or "").partition(":")[0].partition(";")[0]
    return textwrap.shorten(text, 80, placeholder=" …")
