"""The commands `vit-rope fit`, `validate` and `test`, from a YAML file, a checkpoint, or both."""

import importlib
import logging
import os
import signal
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from .. import files
from ..training.classification import Classification, check_name
from ..training.ema import EMA
from ..training.run import trust
from ..training.run.checkpoints import AtomicIO, BestCheckpoint, LastCheckpoint
from ..training.run.folder import RunFolder, check_free
from ..training.run.metrics import MetricsLogger
from ..training.run.progress import ProgressLine
from ..training.seeds import Reseed
from . import usage
from .errors import one_line_errors
from .parsers import OneLineErrors

# the last two come of settings too: numbers that are too large, and what Lightning refuses
SETTINGS_ERRORS = (ValueError, TypeError, OSError, OverflowError, MisconfigurationException)


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, with errors in one line."""


class FirstStep(Callback):
    """Notes that training has begun. Later errors are not about settings: they need a traceback."""

    began = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.began = True


class CLI(LightningCLI):
    """LightningCLI with one folder per run, and a configuration inside each checkpoint.

    The command line overrides the YAML file and the configuration of the checkpoint.

    Args:
        args: arguments of the command line, the first of which is the verb
        modules: modules of the user, already imported, whose classes a configuration may name
        first_step: callback that notes whether training has begun
    """

    def __init__(self, args: list[str], modules: list[str], first_step: FirstStep):
        self.modules, self.first_step = modules, first_step
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
            parser_class=Parser,
            parser_kwargs={"prog": "vit-rope"},
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
        self.config = parser.parse_args(args)
        for key, value in list(self.config.items()):
            self.config[key] = files.expand_home(value)

    def _parse_ckpt_path(self) -> None:
        """Find and check the checkpoint. Unlike Lightning, keep the settings as they are."""
        config = self.config[self.config.subcommand]
        if config.ckpt_path:
            fit = self.config.subcommand == "fit"
            path = files.find(config.ckpt_path, config.out, "last" if fit else "best")
            trust.check_parts(files.read(path), path, resumes=fit)
            config.ckpt_path = str(path)
            config.model.get("init_args", {}).pop("weights", None)  # the checkpoint replaces them

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        if issubclass(_class(config.model.class_path), Classification):
            check_name(config.model.init_args.model)
        main_process = getattr(rank_zero_only, "rank", 0) == 0
        if main_process and self.subcommand == "fit" and not config.trainer.fast_dev_run:
            check_free(Path(config.out), config.ckpt_path, config.overwrite)

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; what they raise is an error in the settings."""
        try:
            super().instantiate_classes()
        except Exception as error:
            cause: BaseException = error
            if error.__cause__ is not None and str(error).startswith("Does not validate against any of the Union"):
                cause = error.__cause__  # the message of the class, without those of jsonargparse
            kinds = [kind for kind in (FileNotFoundError, OSError, TypeError) if isinstance(cause, kind)]
            raise (kinds or [ValueError])[0](files.one_line(cause)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make the trainer, with the metrics file, the checkpoints and the progress line."""
        settings: Any = self.config_init[str(self.subcommand)]
        config, out = settings["trainer"], settings["out"]
        if config.logger is not False:
            configured = [] if config.logger in (None, True) else config.logger
            loggers = configured if isinstance(configured, list) else [configured]
            kwargs["logger"] = [MetricsLogger(out, str(self.subcommand)), *loggers]
        plugins = config.plugins or []
        kwargs["plugins"] = [AtomicIO(), *(plugins if isinstance(plugins, list) else [plugins])]
        callbacks: list[Callback] = [Reseed(), self.first_step]
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
        print_scores(self.trainer)

    def after_test(self) -> None:
        print_scores(self.trainer)


def main(args: Sequence[str], verb: str = "fit") -> None:
    """Run `vit-rope fit`, `validate` or `test`.

    Before the first training step a ValueError, TypeError or OSError ends the process with one
    line and status 1. Later ones and all other exceptions keep their traceback.
    """
    first_step = FirstStep()
    where = f" in process {os.environ['RANK']}" if "RANK" in os.environ else ""

    def report(text: str) -> NoReturn:
        sys.exit(f"error{where}: {text}")

    with one_line_errors(*SETTINGS_ERRORS, report=report, unless=lambda: first_step.began):
        train([verb, *args], first_step)


def train(args: Sequence[str], first_step: FirstStep | None = None) -> None:
    """Run a command such as `fit --config configs/digits_vit.yaml`; errors are raised.

    `--import MODULE` imports a module first, so that its position schemes and classes are known.
    """
    with warnings.catch_warnings():
        filter_warnings()
        modules, argv = pop_imports(args)
        if (topic := usage.topic(argv[1:])) == "all":
            argv = [argv[0], "--help"]
        elif topic is not None:
            print(usage.details(topic) if topic else usage.overview(argv[0]))
            return
        try:
            CLI(with_checkpoint(argv, modules), modules, first_step or FirstStep())
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # Lightning's status for it is 1
                sys.exit(128 + signal.SIGINT)
            raise


def pop_imports(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The modules of `--import MODULE`, which are imported, and the other arguments."""
    modules, rest = _known(args, "--import")
    for name in modules:
        sys.path.insert(0, str(Path.cwd()))
        try:
            importlib.import_module(name)
        except (ImportError, ValueError) as error:
            raise ValueError(f"--import {name}: {error}") from error
        finally:
            sys.path.pop(0)
    return modules, rest


def with_checkpoint(args: list[str], modules: list[str]) -> list[str]:
    """The arguments, the configuration first: the files of `--config`, or the one in `--ckpt_path`.

    What follows a configuration overrides it, so no option is lost wherever `--config` stands.
    """
    (ckpt_paths, _), (outs, _) = _known(args, "--ckpt_path"), _known(args, "--out")
    configs, others = _known(args, "--config", "-c")
    if configs or not ckpt_paths:
        return [args[0], *(word for path in configs for word in ("--config", path)), *others[1:]]
    out = outs[-1] if outs else "runs/run"
    path = files.find(ckpt_paths[-1], out, "last" if args[0] == "fit" else "best")
    config = trust.embedded_config(files.read(path), path, modules)
    moved = ["--out", str(path.parents[1])] if path.parent.name == "checkpoints" else []
    return [args[0], "--config", config, *moved, *args[1:]]


def _known(args: Sequence[str], *names: str) -> tuple[list[str], list[str]]:
    """The values of one option, which may be given several times, and the other arguments."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*names, dest="values", action="append", default=[])
    known, rest = parser.parse_known_args(args)
    return known.values, rest


@rank_zero_only
def print_scores(trainer: Any) -> None:
    """Print the scores of validate or test, the accuracy last."""
    for name, value in sorted(trainer.callback_metrics.items(), key=lambda item: item[0].endswith("/acc")):
        print(f"{name} {float(value):.4f}", flush=True)


def filter_warnings() -> None:
    """Drop the messages of Lightning and torch that appear in every run and need no action."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # for calls of Lightning
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_useful)
    for message in (
        r".*does not have many workers",  # datasets in memory are fastest without
        r".*isinstance\(treespec, LeafSpec\)",
        r"The number of training batches \(\d+\) is smaller than the logging interval",
        r"The dirpath has changed from",  # the run's folder was moved
        r"Checkpoint directory .* exists and is not empty",  # a resumed run; new ones are checked by this library
        r"`training_step` returned `None`",  # a skipped batch, which is reported by this library
        r"Found .* module\(s\) in eval mode",
    ):
        warnings.filterwarnings("ignore", message=message)


def _is_useful(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("💡", "TPU available", "Loading `train_dataloader` to estimate"))


def _checkpoints(out: str) -> str:
    return str(Path(out, "checkpoints"))


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
