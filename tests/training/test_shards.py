"""Scores of several processes with shares of different sizes are those of one process."""

import json
import warnings

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.helpers import CLASSIFIER, CONFIG, TINY, run
from tests.processes import finish, start
from vit_rope.cli.fit import filter_warnings
from vit_rope.training.classification import Classification
from vit_rope.training.data.in_memory import Digits
from vit_rope.training.data.loader import make_loader
from vit_rope.training.diffusion import Diffusion


class Shard(SingleDeviceStrategy):
    """One of several processes that run one after the other, in several turns.

    What the other processes add to a reduction is what they gave in the turn before.
    """

    def __init__(self, rank: int, world: int, given: dict):
        super().__init__("cpu")
        self.global_rank, self.world_size, self.given, self.calls = rank, world, given, 0

    def reduce(self, tensor, group=None, reduce_op="mean"):
        tensor = torch.as_tensor(tensor)
        key, self.calls = self.calls, self.calls + 1
        self.given[self.global_rank, key] = tensor
        total = sum(self.given.get((rank, key), tensor) for rank in range(self.world_size))
        if reduce_op == "sum":
            return total
        return (total / self.world_size).to(tensor.dtype)  # an integer is floored, as by torch.distributed


class Few(Digits):
    """The first digits of the validation set."""

    def __init__(self, count: int):
        super().__init__(batch_size=4, augment="none")
        self.count = count

    def load(self):
        return {
            split: (images[: self.count], labels[: self.count]) for split, (images, labels) in super().load().items()
        }


def classifier():
    torch.manual_seed(0)
    args = CLASSIFIER["init_args"]["model_args"]
    return Classification("vit_rope_tiny_patch16_224", args, num_classes=10, in_chans=1, img_size=8)


def denoiser():
    module = Diffusion("RopeDiT", TINY, num_classes=10, in_chans=1, img_size=8)
    module._errors = lambda images, noise, time, labels: images.flatten(1).mean(dim=1)  # without noise
    return module


@pytest.fixture(autouse=True)
def quiet():
    """Without the warnings that fit drops, too."""
    with warnings.catch_warnings():
        filter_warnings()
        yield


def scores(module, stage: str, count: int, world: int) -> list[dict]:
    """What each process logs of the first `count` images."""
    given, found = {}, {}
    for _ in range(3):  # in the first turn no process knows the others, and a reduction may follow another
        for rank in range(world):
            quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
            trainer = Trainer(strategy=Shard(rank, world, given), use_distributed_sampler=False, **quiet)
            getattr(trainer, stage)(module, datamodule=Few(count), verbose=False)
            found[rank] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return list(found.values())


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("make", [classifier, denoiser])
def test_scores_of_uneven_shares_are_those_of_one_process(make, stage):
    module = make()
    for count, world in ((5, 2), (23, 3), (7, 4)):
        (wanted,) = scores(module, stage, count, 1)
        assert wanted
        for logged in scores(module, stage, count, world):
            assert logged == pytest.approx(wanted, abs=1e-6)


def test_fewer_images_than_processes_are_refused_in_all_of_them():
    for rank in range(3):
        trainer = Trainer(strategy=Shard(rank, 3, {}), logger=False, enable_progress_bar=False)
        with pytest.raises(ValueError, match="the val set has 2 images for 3 processes: use fewer processes"):
            make_loader(range(2), "val", 1, 0, trainer)


@pytest.mark.slow
def test_real_processes_score_shares_that_differ_as_one(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG | {"model": CLASSIFIER}))
    options = ("--config", tmp_path / "c.yaml", "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1)
    options += ("--trainer.limit_val_batches", 1.0)
    options += ("--model.optim.lr", 1e-9, "--model.schedule.warmup", 0)  # the weights stay as they were drawn
    run(*options, "--out", tmp_path / "one")
    several = ("ranks", 5, "fit", *options, "--out", tmp_path / "five", "--trainer.devices", 5)  # of 252 images
    status, _, err = finish(start("tests.processes", *several, "--trainer.strategy", "ddp"))
    assert status == 0, err
    one, two = (json.loads((tmp_path / name / "summary.json").read_text())["last"] for name in ("one", "five"))
    for name in ("val/loss", "val/acc"):
        assert two[name] == pytest.approx(one[name], abs=1e-5)
