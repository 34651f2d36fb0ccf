"""The examples, commands, links and names in README, CONTRIBUTING and docs/ are correct."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vit_rope.analysis import assert_relative, assert_reversible
from vit_rope.positions import Layout, Sum, build, schemes, specs
from vit_rope.positions.presets import presets

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_python_blocks_run():
    space: dict = {}
    for block in blocks(README, "python"):
        exec(compile(block, "README.md", "exec"), space)
    assert space["logits"].shape == (1, 1000)
    assert space["out"].shape == (2, 6, 197, 64)


def test_the_page_about_timm_runs(capsys):
    space: dict = {}
    for block in blocks((ROOT / "docs" / "timm.md").read_text(), "python"):
        exec(compile(block, "timm.md", "exec"), space)
    assert "reference(xy(axial(base=10000)), grid=(24, 24)) index -1.0" in capsys.readouterr().out


def test_the_page_about_timm_lists_every_preset():
    page = (ROOT / "docs" / "timm.md").read_text()
    for name, preset in presets().items():
        assert f"| `{name}` | `{preset.spec}` | {preset.unit}" in page


def test_the_contributed_scheme_runs():
    name = "goldenangle"
    try:
        exec(blocks((ROOT / "CONTRIBUTING.md").read_text(), "python")[0], {"__name__": name})
        layout = Layout(width=64, heads=2, grid=(4, 4))
        assert isinstance(build("goldenangle(base=20) + learned", layout), Sum)
        position = build("goldenangle", layout)
        assert_relative(position)
        assert_reversible(position, (4, 4))
        with pytest.raises(ValueError, match="goldenangle needs 2 axes, got 1; use axial"):
            build("goldenangle", Layout(width=64, heads=2, grid=(4,)))
    finally:
        specs._SCHEMES.pop(name, None)


def test_the_table_names_every_scheme():
    table = README.partition("## Schemes")[2].partition("```")[0]
    for name in schemes():
        assert f"`{name}" in table, name


def test_the_table_names_the_folders_of_the_schemes():
    table = README.partition("## Schemes")[2].partition("```")[0]
    positions = ROOT / "vit_rope" / "positions"
    named = set(re.findall(r"^\| `(\w+/)", table, re.MULTILINE))
    assert named == {f"{path.parent.name}/" for path in positions.glob("*/__init__.py")}
    for path in re.findall(r"`([\w/]+\.py)`", table):
        assert (positions / path).exists(), path


@pytest.mark.parametrize("path", ["README.md", "vit_rope/positions/base.py", "vit_rope/attention.py"])
def test_the_idea_stands_where_a_reader_looks(path):
    idea = "A position scheme is a function of coordinates. "
    idea += "Attention asks it what to do and never asks which scheme it is."
    assert idea in " ".join((ROOT / path).read_text().split())


def test_quick_start_is_two_commands():
    section = README.partition("## Quick start")[2].partition("\n## ")[0]
    assert len(blocks(section, "bash")) == 2
    assert section.count("```") == 4


PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_the_pages_link_to_exist(page):
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_the_pages_name_exist(page):
    for path in re.findall(r"`(?:[^`]* )?((?:vit_rope|tests|configs|docs|results)/[\w/.]++)(?!\{)", page.read_text()):
        if path.endswith("goldenangle.py") or "NAME" in path:  # files that the reader is to write
            continue
        assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.slow
def test_the_main_job_reaches_its_score(tmp_path):
    first = blocks(README.partition("## Quick start")[2], "bash")[0]
    command = shlex.split(first.splitlines()[-1])
    assert command[:2] == ["python", "train.py"]
    done = subprocess.run(
        [sys.executable, *command[1:], "--out", str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    score = float(re.fullmatch(r"val/acc (\d\.\d+)", last)[1])
    assert score >= 0.975
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["val/acc"] == pytest.approx(score, abs=5e-5)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("val/acc") == pytest.approx(score, abs=5e-5) for row in rows)


def test_pain_42_numbers_name_their_recipe():  # rope-vit #5, #21; timm #1361
    rows = re.findall(r"^\| `(configs/\w+\.yaml)` \| (.*) \| ([0-9a-f]{7}) \|$", README, re.MULTILINE)
    assert len(rows) >= 2
    with Path(ROOT, "results", "classification.csv").open(newline="") as file:
        known = list(csv.DictReader(file))
    for config, text, commit in rows:
        assert (ROOT / config).is_file()
        runs = [row for row in known if row["config"] == config and row["commit"] == commit]
        assert all(f"--config {config}" in row["command"] for row in runs)
        reached = {round(float(row[key]), 3) for row in runs for key in ("val_acc", "test_acc")}
        quoted = {float(number) for number in re.findall(r"0\.\d{3}|1\.000", text)}
        assert quoted
        assert quoted <= reached
