"""The command line: fit, validate and test, from a YAML, from a checkpoint alone, or from both."""

import importlib
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from .. import files
from ..training.classification import Classification, check_name
from ..training.data.folder import ImageFolder
from ..training.data.in_memory import CIFAR, Digits, FashionMNIST
from ..training.data.timm import TimmData
from ..training.diffusion import Diffusion
from ..training.ema import EMA
from ..training.run import trust
from ..training.run.checkpoints import AtomicIO, BestCheckpoint, LastCheckpoint
from ..training.run.folder import RunFolder, check_free
from ..training.run.metrics import MetricsLogger
from ..training.run.progress import ProgressLine
from ..training.seeds import Reseed

CLASSES = (
    Classification,
    Diffusion,
    Digits,
    FashionMNIST,
    CIFAR,
    ImageFolder,
    TimmData,
)  # imported: known by short names


class CLI(LightningCLI):
    """LightningCLI with one folder a run, a configuration inside each checkpoint, and the command line above both."""

    def __init__(self, args: list[str], modules: list[str]):
        self.modules = modules
        trust.guard(modules)
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=RunFolder,
            trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False, "use_distributed_sampler": False},
            seed_everything_default=0,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        evaluate = {"model", "dataloaders", "datamodule", "weights_only", "verbose"}
        fit = {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}
        return {"fit": fit, "validate": evaluate, "test": evaluate}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", type=str, default="runs/run", help="The folder that keeps the run.")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/acc",
                "checkpoint.mode": "max",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(EMA, "ema")
        for key in ("checkpoint", "last"):
            parser.link_arguments("out", f"{key}.dirpath", compute_fn=_checkpoints)
        for fact in ("num_classes", "in_chans", "img_size"):
            parser.link_arguments(f"data.{fact}", f"model.init_args.{fact}", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument("--overwrite", type=bool, default=False, help="Replace the run that `out` holds.")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(with_checkpoint(args, self.modules))

    def _parse_ckpt_path(self) -> None:
        """Find and check the checkpoint; unlike Lightning's, leave settings as YAML and command line have them."""
        config = self.config[self.config.subcommand]
        if config.ckpt_path:
            fits = self.config.subcommand == "fit"
            path = files.find(config.ckpt_path, config.out, "last" if fits else "best")
            trust.check_parts(files.read(path), path, resumes=fits)
            config.ckpt_path = str(path)
            config.model.get("init_args", {}).pop("weights", None)  # the checkpoint's are later ones

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        if issubclass(_class(config.model.class_path), Classification):
            check_name(config.model.init_args.model)
        first = getattr(rank_zero_only, "rank", 0) == 0
        if first and self.subcommand == "fit" and not config.trainer.fast_dev_run:
            check_free(Path(config.out), config.ckpt_path, config.overwrite)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:
            said: BaseException = error
            if error.__cause__ is not None and str(error).startswith("Does not validate against any of the Union"):
                said = error.__cause__  # what the class said, without jsonargparse's account of where it asked
            kinds = [kind for kind in (FileNotFoundError, OSError, TypeError) if isinstance(said, kind)]
            raise (kinds or [ValueError])[0](files.one_line(said)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        given: Any = self.config_init[str(self.subcommand)]
        config, out = given["trainer"], given["out"]
        if config.logger is not False:
            asked = [] if config.logger in (None, True) else config.logger
            loggers = asked if isinstance(asked, list) else [asked]
            kwargs["logger"] = [MetricsLogger(out, str(self.subcommand)), *loggers]
        plugins = config.plugins or []
        kwargs["plugins"] = [AtomicIO(), *(plugins if isinstance(plugins, list) else [plugins])]
        callbacks: list[Callback] = [Reseed()]
        if config.enable_progress_bar is not False:
            callbacks.append(ProgressLine())
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        trainer: Any = self.trainer
        if getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            raise ValueError("set save_distributed_checkpoint: false of the strategy: a checkpoint is one file here")
        for callback in trainer.callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.imports = self.modules

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}
        return kwargs if subcommand == "fit" else kwargs | {"verbose": False}

    def after_validate(self) -> None:
        say_scores(self.trainer)

    def after_test(self) -> None:
        say_scores(self.trainer)


def main(args: list[str] | None = None) -> None:
    """Run a command such as `fit --config configs/digits_vit.yaml`; the arguments are the process's unless given.

    `--import MODULE` imports a module first, so that position schemes and classes of the user's own are known.
    """
    with warnings.catch_warnings():
        filter_warnings()
        argv = list(sys.argv[1:] if args is None else args)
        try:
            CLI(*pop_imports(argv))
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # Lightning's status for it is 1
                sys.exit(128 + signal.SIGINT)
            raise
        except (ValueError, TypeError, OSError, OverflowError, MisconfigurationException) as error:
            if args is not None or not says_all(error):
                raise
            rank = f" in process {os.environ['RANK']}" if "RANK" in os.environ else ""
            sys.exit(f"error{rank}: {message(error)}")


def says_all(error: Exception) -> bool:
    """Whether a traceback would only hide the message: an error of this library, or of settings, before any step."""
    frames = traceback.extract_tb(error.__traceback__)
    places = re.findall(r'^ *File "(.+)", line \d+', str(error), re.MULTILINE) if of_worker(error) else []
    last = places[-1] if places else frames[-1].filename
    ours = Path(last).is_relative_to(Path(__file__).parents[1])
    return ours or all(frame.name != "_run_stage" for frame in frames)


def of_worker(error: Exception) -> bool:
    """Whether it is what torch makes of an error in a worker of a DataLoader: its traceback as text."""
    return re.match(r"Caught \w+ in DataLoader worker process", str(error)) is not None


def message(error: Exception) -> str:
    """What an error says, in one line, which in the text of a traceback stands last, after the name of its class."""
    if of_worker(error):
        return str(error).strip().splitlines()[-1].partition(": ")[2]
    return files.one_line(error)


def pop_imports(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without `--import MODULE`, and those modules, imported."""
    modules, rest = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument.split("=")[0] == "--import":
            name = argument.partition("=")[2] or next(arguments, "")
            sys.path.insert(0, str(Path.cwd()))
            try:
                importlib.import_module(name)
            except (ImportError, ValueError) as error:
                raise ValueError(f"--import {name}: {error}") from error
            finally:
                sys.path.pop(0)
            modules.append(name)
        else:
            rest.append(argument)
    return rest, modules


def with_checkpoint(argv: list[str], modules: list[str]) -> list[str]:
    """The arguments, with the configuration inside `--ckpt_path` in front where no `--config` is given."""
    ckpt_path = _value(argv, "--ckpt_path")
    if not argv or not ckpt_path or any(argument.split("=")[0] in ("-c", "--config") for argument in argv):
        return argv
    out = _value(argv, "--out") or "runs/run"
    path = files.find(ckpt_path, out, "last" if argv[0] == "fit" else "best")
    config = trust.embedded_config(files.read(path), path, modules)
    moved = ["--out", str(path.parents[1])] if path.parent.name == "checkpoints" else []
    return [argv[0], "--config", config, *moved, *argv[1:]]


@rank_zero_only
def say_scores(trainer: Any) -> None:
    """Print the scores of validate or test, the accuracy last."""
    for name, value in sorted(trainer.callback_metrics.items(), key=lambda item: item[0].endswith("/acc")):
        print(f"{name} {float(value):.4f}", flush=True)


def filter_warnings() -> None:
    """Drop what Lightning and torch say at every run and no user of ours can act on."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of calls that Lightning makes
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_worth_saying)
    for message in (
        r".*does not have many workers",  # sets in memory are fastest without
        r".*isinstance\(treespec, LeafSpec\)",
        r"The number of training batches \(\d+\) is smaller than the logging interval",
        r"The dirpath has changed from",  # the folder was moved
        r"Checkpoint directory .* exists and is not empty",  # a resumed run, or checked by us
        r"`training_step` returned `None`",  # a batch that was left out, of which we tell ourselves
        r"Found .* module\(s\) in eval mode",
    ):
        warnings.filterwarnings("ignore", message=message)


def _worth_saying(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("💡", "TPU available", "Loading `train_dataloader` to estimate"))


def _value(argv: list[str], option: str) -> str | None:
    value = None
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if argument == option:
            value = following
        elif argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
    return value


def _checkpoints(out: str) -> str:
    return str(Path(out, "checkpoints"))


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
