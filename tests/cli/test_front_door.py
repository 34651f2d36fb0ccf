"""The command `vit-rope`: verbs, version, missing packages, and its three spellings."""

import importlib
import os
import subprocess
import sys

import pytest

import vit_rope_cli
from tests.helpers import ROOT
from vit_rope import __version__
from vit_rope_cli import VERBS, main


def process(*command: str) -> subprocess.CompletedProcess:
    """A new process that has ended."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_all_spellings_list_the_verbs_without_arguments():
    expected = vit_rope_cli.usage() + "\n"
    assert process(sys.executable, "train.py").stdout == expected
    assert process(sys.executable, "vit_rope_cli.py", "--help").stdout == expected
    assert all(f"  {verb} " in expected for verb in VERBS)


def test_every_verb_has_a_file_with_a_main():
    for verb in VERBS:
        assert callable(importlib.import_module(f"vit_rope.cli.{verb}").main)


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"vit-rope {__version__}\n"


@pytest.mark.parametrize(("verb", "hint"), [("fitt", "; did you mean fit?"), ("xyzzy", "\n")])
def test_unknown_verbs_end_with_status_2(verb, hint, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb])
    assert caught.value.code == 2
    assert f"there is no verb '{verb}'{hint}" in capsys.readouterr().err


def test_the_environment_of_openmp_is_set_for_every_verb_unless_it_is_set_already(monkeypatch, capsys):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    main(["--help"])
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    main(["--help"])
    assert os.environ["GOMP_SPINCOUNT"] == "7"


@pytest.mark.parametrize(
    ("verb", "package"),
    [("fit", "lightning"), ("sample", "rich"), ("plot", "matplotlib"), ("study", "jsonargparse")],
)
def test_a_missing_package_of_the_extra_is_reported_in_one_line(verb, package):
    code = f"import sys; sys.modules[{package!r}] = None; from vit_rope_cli import main; main([{verb!r}, 'RUN'])"
    done = process(sys.executable, "-c", code)
    assert done.returncode == 1
    message = f'error: vit-rope {verb} needs {package}, which is not installed: pip install "vit_rope[train]"'
    assert done.stderr.splitlines() == [message]


def test_other_missing_modules_keep_their_traceback(monkeypatch):
    def load(name):
        raise ModuleNotFoundError("No module named 'foo'", name="foo")

    monkeypatch.setattr(vit_rope_cli.importlib, "import_module", load)
    with pytest.raises(ModuleNotFoundError, match="foo"):
        main(["fit"])


def test_schemes_needs_no_package_of_the_extra():
    blocked = "import sys; sys.modules.update(dict.fromkeys(('jsonargparse', 'lightning', 'rich', 'docstring_parser')))"
    done = process(sys.executable, "-c", f"{blocked}; from vit_rope_cli import main; main(['schemes'])")
    assert done.stdout.startswith("scheme "), done.stderr
