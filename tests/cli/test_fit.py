"""The help and the errors of fit, validate and test at a terminal."""

import pytest
import yaml

from vit_rope.cli import fit
from vit_rope.training.classification import Classification
from vit_rope_cli import main

CONFIG = {
    "model": {
        "class_path": "Classification",
        "init_args": {
            "model": "vit_rope_tiny_patch16_224",
            "model_args": {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1},
            "schedule": {"name": "constant", "warmup": 0},
        },
    },
    "data": {"class_path": "Digits", "init_args": {"batch_size": 64, "augment": "none"}},
    "trainer": {"max_epochs": 1, "limit_train_batches": 2, "accelerator": "cpu", "enable_progress_bar": False},
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The arguments for a small run in tmp_path."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.delenv("VIT_ROPE_TRACEBACK", raising=False)
    return ["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]


# Help


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
@pytest.mark.parametrize("options", [[], ["--help"], ["--config", "nowhere.yaml", "-h"]])
def test_help_is_one_screen(verb, options, capsys):
    main([verb, *options])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 100
    for key in ("out", "seed_everything", "model", "data", "trainer", "checkpoint", "last", "ema"):
        assert f"\n  {key} " in text
    for words in (
        "Classification",
        "Diffusion",
        "ImageFolder",
        "TimmData",
        "docs/training.md",
        "--ckpt_path",
        "--import",
    ):
        assert words in text
    assert ("--overwrite" in text) == (verb == "fit")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Classification", ("Classification:", "--model.mixup MIXUP", "alpha of mixup", "--model.optim.lr LR")),
        ("Digits", ("--data.batch_size", "--data.augment {none,light,strong}")),
        ("trainer", ("Trainer", "--trainer.max_epochs")),
        ("ema", ("--ema.decay DECAY",)),
        ("optim", ("OptimConfig", "--model.optim.weight_decay")),
        ("EarlyStopping", ("--patience",)),
    ],
)
def test_help_on_a_name_lists_its_arguments(name, words, capsys):
    main(["fit", "--help", name])
    text = capsys.readouterr().out
    assert all(word in text for word in words), text
    assert max(map(len, text.partition("\noptions:")[2].splitlines())) <= 100
    assert ".help" not in text


def test_help_on_an_unknown_name():
    with pytest.raises(SystemExit, match=r"^error: there is no help on 'Foo'; choose one of trainer, "):
        main(["fit", "--help", "Foo"])


def test_help_on_all_is_that_of_lightning(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--help", "all"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out) > 40_000


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.nonsense", "1"], "Option 'nonsense' is not accepted"),
        (["--trainer.max_epochz", "1"], "unrecognized arguments: --trainer.max_epochz 1"),
        (["--model.optim.lr", "abc"], '"optim.lr": expected float, got abc'),
        (["--trainer.max_epochs", "a"], '"trainer.max_epochs": expected int, got a'),
        (["--model", "Nope"], '"model": expected the name of a known class, got Nope'),
        (["--trainer.logger=WandbLogger"], "is not allowed; allow it by --import with its module"),
        (["--config", "nowhere.yaml"], "File does not exist"),
    ],
)
def test_settings_that_do_not_parse_end_with_one_line_and_status_2(config, options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", *config, *options])
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1


def test_unknown_key_in_a_file(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**CONFIG, "trainr": {"max_epochs": 1}}))
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "r")])
    assert caught.value.code == 2
    assert "trainr" in capsys.readouterr().err


def test_errors_before_the_first_step_are_one_line(config, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: timm has no model 'nonsense'") as caught:
        main(["fit", *config, "--model.model", "nonsense"])
    assert "\n" not in str(caught.value.code)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit, match=r"^error in process 3: no checkpoint nowhere"):
        main(["validate", "--ckpt_path", "nowhere"])
    monkeypatch.setenv("VIT_ROPE_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="no checkpoint nowhere"):
        main(["validate", "--ckpt_path", "nowhere"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_before_the_first_step_is_one_line(config, tmp_path, workers):
    for path in (tmp_path / split / name / "0.png" for split in ("train", "val") for name in "ab"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"broken")
    read = ["--data", "ImageFolder", "--data.root", str(tmp_path), "--data.img_size", "8", "--data.batch_size", "2"]
    with pytest.raises(SystemExit, match=r"^error: cannot read the image .*0\.png: cannot identify") as caught:
        main(["fit", *config, *read, "--data.workers", str(workers)])
    assert "\n" not in str(caught.value.code)


@pytest.mark.parametrize(
    ("step", "error", "shown"),
    [
        (0, ValueError, SystemExit),  # in the check of the validation, before training
        (1, ValueError, ValueError),
        (1, OSError, OSError),
        (0, KeyError, KeyError),
    ],
)
def test_errors_after_the_first_step_and_of_other_kinds_keep_their_traceback(config, monkeypatch, step, error, shown):
    def fail(self, batch, batch_idx):
        raise error("of the user's code")

    monkeypatch.setattr(Classification, "training_step" if step else "validation_step", fail)
    with pytest.raises(shown, match="of the user's code"):
        main(["fit", *config])


def test_arguments_of_a_checkpoint_and_of_imports_are_found(tmp_path, monkeypatch):
    (tmp_path / "some_module.py").write_text("")
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--lr", "-1", "--import", "some_module", "--import=json", "--model.position", "mixed + learned"]
    modules, rest = fit.pop_imports(args)
    assert modules == ["some_module", "json"]
    assert rest == ["fit", "--lr", "-1", "--model.position", "mixed + learned"]
    assert fit.with_checkpoint(rest, modules) == rest
    assert fit.with_checkpoint([*rest, "--ckpt_path", "x", "-c", "y"], modules) == [
        "fit",
        "--config",
        "y",
        *rest[1:],
        "--ckpt_path",
        "x",
    ]
