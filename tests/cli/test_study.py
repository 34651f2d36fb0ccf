"""A study: one folder per run, resumed and kept where the settings are the same, else refused."""

import json
import signal
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers import CLASSIFIER, CONFIG
from vit_rope.cli import fit
from vit_rope_cli import main

MODEL = {"class_path": "Classification", "init_args": {"model": "m", "model_args": {"position": "axial"}}}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The command lines of the runs of studies of c.yaml; such a run writes the files of a run."""
    monkeypatch.chdir(tmp_path)
    content = {"out": "runs/c", "model": MODEL, "data": {"class_path": "Digits"}, "trainer": {"max_epochs": 8}}
    for name in "cd":
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content | {"out": f"runs/{name}"}))
    started = []

    def train(args):
        started.append(args)
        folder = Path(args[args.index("--out") + 1])
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        position = args[args.index("--model.model_args.position") + 1]
        init = MODEL["init_args"] | {"model_args": {"position": position}}
        settings = content | {"model": MODEL | {"init_args": init}, "seed_everything": 0}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        (folder / "checkpoints" / "last.ckpt").touch()
        row = {"stage": "fit", "step": 0, "time": len(started), "val/loss": 1.0}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (folder / "summary.json").write_text(json.dumps({"seconds": 1.0}))

    monkeypatch.setattr(fit, "main", train)
    return started


def folders(started) -> list[str]:
    return [args[args.index("--out") + 1] for args in started]


@pytest.mark.parametrize("out", [[], ["--out", "elsewhere"]])
def test_each_run_has_its_own_folder(runs, out, capsys):
    main(["study", "c.yaml", "--position", "none", "mixed", "--seed", "0", "1", *out])
    root = out[-1] if out else "runs/c"
    assert folders(runs) == [f"{root}/{name}/{seed}" for seed in (0, 1) for name in ("none", "mixed")]
    assert capsys.readouterr().out == f"{root}/study.csv\n"


def test_each_configuration_has_its_own_folder(runs, tmp_path, monkeypatch):
    main(["study", "c.yaml", "d.yaml", "--position", "none", "--out", "o"])
    assert folders(runs) == ["o/c/none/0", "o/d/none/0"]
    Path("e.yaml").write_text(Path("c.yaml").read_text())
    with pytest.raises(SystemExit, match="two configurations have the same folder, of runs/c, runs/c"):
        main(["study", "c.yaml", "e.yaml", "--position", "none"])
    with pytest.raises(SystemExit, match=r"'learned\+mixed' and 'learned \+ mixed' have the same folder"):
        main(["study", "c.yaml", "--position", "learned + mixed", "learned+mixed"])
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("f.yaml").write_text(yaml.safe_dump({"out": "~/f", "model": MODEL}))
    main(["study", "~/f.yaml", "--position", "none"])
    assert folders(runs)[2:] == [str(tmp_path / "f" / "none" / "0")]


def test_finished_runs_are_kept_if_their_settings_are_the_same(runs, capsys):
    command = ["study", "c.yaml", "--position", "none", "--trainer.max_epochs", "8", "--data.batch_size=4"]
    main(command)
    main([*command[:4], "--data.batch_size=4", "--trainer.max_epochs", "8"])
    main([*command[:3], "none", "mixed", *command[4:]])
    assert folders(runs) == ["runs/c/none/0", "runs/c/mixed/0"]
    assert "runs/c: 1 finished runs are kept, 1 are trained" in capsys.readouterr().err
    main(["study", "c.yaml"])  # the table only
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trainer.max_epochs", "30"], r"options: --trainer.max_epochs 8, now --trainer.max_epochs 30"),
        (
            ["--trainer.max_epochs", "8", "--sed", "3"],
            r"options: --trainer.max_epochs 8, now --sed 3 --trainer.max_epochs 8",
        ),
        ([], r"options: --trainer.max_epochs 8, now none"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_runs_with_other_settings_are_refused_or_replaced(runs, options, told, finished):
    command = ["study", "c.yaml", "--position", "none"]
    main([*command, "--trainer.max_epochs", "8"])
    if not finished:
        Path("runs/c/none/0/summary.json").unlink()
    with pytest.raises(SystemExit, match=rf"^error: runs/c/none/0 was trained with other settings \({told}\): replace"):
        main([*command[:3], "mixed", "none", *options])
    assert len(runs) == 1  # refused before any run
    main([*command, *options, "--overwrite"])
    assert runs[1][-2:] == ["--overwrite", "true"]
    main([*command, *options, "--overwrite"])
    assert len(runs) == 2  # now the settings are the same


def test_a_configuration_that_has_changed_is_refused(runs):
    main(["study", "c.yaml", "--position", "none"])
    Path("c.yaml").write_text(Path("c.yaml").read_text().replace("max_epochs: 8", "max_epochs: 9"))
    with pytest.raises(SystemExit, match=r"other settings \(the configuration has changed\)"):
        main(["study", "c.yaml", "--position", "none"])


def test_scores_of_another_judge_are_refused_or_replaced(runs, monkeypatch):
    from vit_rope.training import quality

    judges = []
    monkeypatch.setattr(quality, "scores", lambda run, judge, *args, **options: judges.append(judge) or {"fd": 1.0})
    command = ["study", "c.yaml", "--position", "none", "--judge"]
    main([*command, "a"])
    main([*command, "a"])
    with pytest.raises(SystemExit, match=r"was scored with other settings \(judge: a, now b\)"):
        main([*command, "b"])
    main([*command, "b", "--overwrite"])
    assert judges == ["a", "b"]
    assert len(runs) == 1


def test_a_run_that_was_interrupted_is_resumed(runs, monkeypatch, capsys):
    train = fit.main

    def interrupted(args):
        train(args)
        Path(folders(runs)[-1], "summary.json").unlink()
        sys.exit(128 + signal.SIGINT)

    command = ["study", "c.yaml", "--position", "none", "mixed"]
    with monkeypatch.context() as patch:
        patch.setattr(fit, "main", interrupted)
        with pytest.raises(SystemExit) as caught:
            main(command)
    assert caught.value.code == 130
    assert "the same vit-rope study command resumes this run" in capsys.readouterr().err
    main(command)
    assert folders(runs) == ["runs/c/none/0", "runs/c/none/0", "runs/c/mixed/0"]
    assert [args[-2:] for args in runs] == [["--overwrite", "true"], ["--ckpt_path", "last"], ["--overwrite", "true"]]


def test_runs_without_a_record_are_kept_if_they_are_finished(runs, capsys):
    command = ["study", "c.yaml", "--position", "none"]
    main(command)
    Path("runs/c/none/0/study.json").unlink()
    main(command)
    assert "runs/c/none/0 is kept, but what it was trained with is not known" in capsys.readouterr().err
    Path("runs/c/none/0/summary.json").unlink()
    with pytest.raises(SystemExit, match=r"other settings \(not recorded\)"):
        main(command)


@pytest.mark.parametrize("option", ["--seed_everything", "--model.model_args.position", "--ckpt_path=x"])
def test_options_of_the_study_itself_are_refused(runs, option):
    with pytest.raises(SystemExit, match=f"^error: {option.partition('=')[0]} is set by the study"):
        main(["study", "c.yaml", "--position", "none", option, "3"])


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not a YAML file"), ("text", "is not a configuration of")])
def test_files_that_are_no_configuration(runs, text, message):
    Path("x.yaml").write_text(text)
    with pytest.raises(SystemExit, match=rf"^error: x\.yaml {message}"):
        main(["study", "x.yaml"])
    Path("x.yaml").write_text("model: 1")
    with pytest.raises(SystemExit, match=r"^error: x\.yaml has no out: add it, or give --out"):
        main(["study", "x.yaml"])


def test_a_real_run_is_resumed_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trainer = {**CONFIG["trainer"], "max_epochs": 2}
    Path("c.yaml").write_text(yaml.safe_dump({**CONFIG, "out": "r", "model": CLASSIFIER, "trainer": trainer}))
    with monkeypatch.context() as patch:
        patch.setattr("vit_rope.training.run.folder.report", lambda *_: sys.exit(130))
        with pytest.raises(SystemExit):
            main(["study", "c.yaml", "--position", "axial"])
    (tmp_path / "r/axial/0/summary.json").unlink()
    before = (tmp_path / "r/axial/0/metrics.jsonl").read_text()
    main(["study", "c.yaml", "--position", "axial"])
    assert (tmp_path / "r/axial/0/metrics.jsonl").read_text() == before  # nothing was left to train
    assert (tmp_path / "r/axial/0/summary.json").is_file()
