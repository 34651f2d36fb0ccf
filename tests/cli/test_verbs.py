"""What the other verbs tell a person at a terminal."""

import contextlib

import pytest

from vit_rope.cli import study
from vit_rope.cli.schemes import scheme_table
from vit_rope.positions import schemes
from vit_rope_cli import main


@pytest.mark.parametrize("verb", ["sample", "quality", "study", "schemes", "bench", "plot"])
def test_help_describes_every_option(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with contextlib.suppress(SystemExit):  # plot prints its figures and returns
        main([verb, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 55
    assert max(map(len, lines)) <= 100
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  --"):
            assert "  " in line.strip() or following.startswith(" " * 20), f"{line} has no description"


@pytest.mark.parametrize("width", [60, 80, 99, 100, 120])
def test_the_table_of_schemes_fits_the_terminal(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    main(["schemes"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    names = [line.split()[0] for line in text.splitlines()[1:] if not line.startswith(" ")]
    assert names == schemes()
    assert text == scheme_table(width=width) + "\n"


def test_plot_lists_its_figures(capsys):
    main(["plot"])
    text = capsys.readouterr().out
    assert "kernel" in text
    assert "study" in text
    with pytest.raises(SystemExit) as caught:
        main(["plot", "karnel"])
    assert caught.value.code == 2
    assert "there is no figure 'karnel'" in capsys.readouterr().err


def test_bench_lists_its_topics(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "speed"])
    assert caught.value.code == 2
    assert "error: there is no topic 'speed'; choose one of rotate, model, block" in capsys.readouterr().err


def test_study_passes_options_of_fit_on():
    args = ["a.yaml", "b.yaml", "--trainer.max_epochs", "2", "--seed", "0", "1", "--data.root=x", "--position", "none"]
    known, further = study.split(args, {"seed", "position"})
    assert known == ["a.yaml", "b.yaml", "--seed", "0", "1", "--position", "none"]
    assert further == ["--trainer.max_epochs", "2", "--data.root=x"]


def test_study_reports_a_missing_file_in_one_line():
    with pytest.raises(SystemExit, match=r"^error: .*nowhere\.yaml"):
        main(["study", "nowhere.yaml"])
