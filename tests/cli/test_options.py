"""Options count wherever they stand, `~` is the home directory, best.ckpt is the best."""

import json
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.callbacks import EarlyStopping

from tests.helpers import CLASSIFIER, CONFIG, last_checkpoint, run
from vit_rope.cli import fit
from vit_rope.cli.parsers import VerbParser
from vit_rope.files import expand_home, find, read, replacing
from vit_rope.training.data.folder import ImageFolder
from vit_rope.training.data.in_memory import CIFAR, FashionMNIST
from vit_rope.training.data.timm import TimmData
from vit_rope.training.run.checkpoints import BestCheckpoint, LastCheckpoint
from vit_rope.training.run.metrics import MetricsLogger

SHORT = {**CONFIG, "model": CLASSIFIER, "trainer": {**CONFIG["trainer"], "max_epochs": 1}}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The home directory, which is not the working folder."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


# The home directory


def test_run_in_the_home_directory(home):
    (home / "c.yaml").write_text(yaml.safe_dump(SHORT | {"out": "~/runs/yaml"}))
    run("--config", "~/c.yaml")
    run("--config=~/c.yaml", "--out=~/runs/option")
    for name in ("yaml", "option"):
        folder = home / "runs" / name
        assert {path.name for path in folder.iterdir()} >= {"config.yaml", "metrics.jsonl", "checkpoints", "exported"}
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
        assert yaml.safe_load((folder / "config.yaml").read_text())["out"] == str(folder)
    run("--ckpt_path", "~/runs/yaml", "--trainer.max_epochs", 2)
    run("--config", "~/c.yaml", "--ckpt_path", "last", "--trainer.max_epochs", 3)
    assert last_checkpoint(home / "runs" / "yaml")["epoch"] == 2
    weights = ("--model.weights", "~/runs/yaml/exported/model.safetensors")
    run("--config", "~/c.yaml", "--out", "~/runs/tuned", *weights)
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("value", ["~/a", "~", Path("~/a"), ["~/a", "b~"], ("~/a",), {"root": {"x": ["~/a"]}}])
def test_every_path_inside_a_value_is_expanded(home, value):
    text = str(expand_home(value))
    assert "~/" not in text
    assert str(home) in text
    assert type(expand_home(value)) is type(value)


@pytest.mark.parametrize("value", ["axial(base=100)", "a~/b", 3, None, True, 1.5, "./~"])
def test_values_without_home_stay(home, value):
    assert expand_home(value) == value


def test_library_functions_expand_the_home_directory(home):
    with replacing("~/a.txt") as file:
        file.write(b"a")
    assert (home / "a.txt").read_text() == "a"
    (home / "r" / "checkpoints").mkdir(parents=True)
    (home / "r" / "checkpoints" / "last.ckpt").touch()
    assert find("~/r", "", "last") == find("last", "~/r", "") == home / "r" / "checkpoints" / "last.ckpt"
    with pytest.raises(FileNotFoundError, match=f"no file {home}/b"):
        read("~/b")
    MetricsLogger("~/m").log_metrics({"a": 1.0}, 0)
    assert (home / "m" / "metrics.jsonl").is_file()
    assert LastCheckpoint("~/c").path == home / "c" / "last.ckpt"
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("make", [FashionMNIST, CIFAR, ImageFolder, lambda root: TimmData(2, "x/y", root)])
def test_roots_of_data_are_expanded(home, make):
    for split, name in ((split, name) for split in ("train", "val") for name in "ab"):
        (home / "images" / split / name).mkdir(parents=True)
        (home / "images" / split / name / "0.png").touch()
    assert str(make("~/images").root) == str(home / "images")


def test_verbs_expand_their_paths(home):
    def verb(run: str, config: list[Path], *, out: Path | None = None, root: str = "~/data", n: int = 3) -> None:
        """Do nothing.

        Args:
            run: a
            config: b
            out: c
            root: d
            n: e
        """
        assert (run, config) == (f"{home}/r", [home / "a", home / "b"])
        assert (out, root, n) == (home / "o", f"{home}/data", 3)

    VerbParser("vit-rope verb", verb).run(["~/r", "~/a", "~/b", "--out=~/o"])


# Options and configurations


@pytest.mark.parametrize("config", [["--config", "c.yaml"], ["--config=c.yaml"], ["-c", "c.yaml"]])
def test_options_count_before_and_after_the_configuration(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(yaml.safe_dump(SHORT | {"out": "runs/of_the_file", "seed_everything": 3}))
    options = ["--out", "runs/other", "--overwrite", "true", "--trainer.max_epochs", "2", "--model.optim.lr", "0.5"]
    options += ["--seed_everything", "7", "--data.batch_size=32", "--model.model_args.position", "axial"]
    for place in (0, 2, len(options)):
        run(*options[:place], *config, *options[place:])
        settings = yaml.safe_load(Path("runs/other/config.yaml").read_text())
        assert settings["model"]["init_args"]["optim"]["lr"] == 0.5
        assert settings["model"]["init_args"]["model_args"]["position"] == "axial"
        assert (settings["trainer"]["max_epochs"], settings["seed_everything"]) == (2, 7)
        assert settings["data"]["init_args"]["batch_size"] == 32
    assert [path.name for path in Path("runs").iterdir()] == ["other"]


def test_of_several_configurations_the_later_counts():
    args = ["fit", "--out", "o", "-c", "a.yaml", "--trainer.max_epochs", "-1", "--config=b.yaml"]
    rest = ["--out", "o", "--trainer.max_epochs", "-1"]
    assert fit.with_checkpoint(args, []) == ["fit", "--config", "a.yaml", "--config", "b.yaml", *rest]


# The best checkpoint


@pytest.mark.parametrize(
    ("monitor", "best"), [("val/loss", "min"), ("val/loss_t900", "min"), ("val/acc", "max"), ("train/loss", "min")]
)
def test_mode_follows_from_the_monitor(monitor, best):
    assert BestCheckpoint(monitor=monitor).mode == BestCheckpoint(monitor=monitor, mode=best).mode == best
    worst = {"min": "max", "max": "min"}[best]
    with pytest.raises(ValueError, match=rf"checkpoint.monitor is {monitor}, and its mode {worst} chooses the worst"):
        BestCheckpoint(monitor=monitor, mode=worst)


def test_mode_of_an_unknown_score_must_be_given():
    with pytest.raises(
        ValueError, match=r"val/fid, neither a loss nor an accuracy: set checkpoint\.mode to min or max"
    ):
        BestCheckpoint(monitor="val/fid")
    assert BestCheckpoint(monitor="val/fid", mode="max").mode == "max"
    assert BestCheckpoint().mode == "min"


def test_best_checkpoint_has_the_lowest_loss(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SHORT))
    options = ("--checkpoint.monitor", "val/loss", "--trainer.max_epochs", 3)
    run("--config", tmp_path / "c.yaml", "--out", tmp_path / "r", *options)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    assert len(losses) == 3
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["val/loss"] == pytest.approx(min(losses), rel=1e-4)
    assert summary["epoch"] == losses.index(min(losses)) + 1


def test_early_stopping_at_the_worst_is_refused(tmp_path):
    assert EarlyStopping(monitor="val/acc").mode == "min"  # Lightning's default
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SHORT))
    options = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/acc")
    with pytest.raises(ValueError, match="the monitor of EarlyStopping is val/acc, and its mode min chooses the worst"):
        run("--config", tmp_path / "c.yaml", "--out", tmp_path / "r", *options)
    assert not (tmp_path / "r").exists()
