"""Options of verbs from signatures and docstrings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from vit_rope.cli.errors import message, one_line_errors
from vit_rope.cli.parsers import VerbParser


@dataclass(frozen=True)
class Settings:
    """Settings.

    Args:
        n: a number
        labels: several numbers
    """

    n: int = 1
    labels: list[int] | None = None


def verb(
    specs: list[str],
    config: Settings,
    *,
    judge: str,
    size: tuple[int, int] = (4, 6),
    floor: bool = True,
    png_dir: Path | None = None,
    kind: Literal["a", "b"] = "a",
) -> dict:
    """Do something.

    With a second paragraph.

    Args:
        specs: several words
        judge: a required option with 100 %
        png_dir: a folder
    """
    return dict(locals())


@pytest.fixture
def parser():
    return VerbParser("vit-rope verb", verb, Settings, {"labels": "label"}, n=64)


def test_defaults(parser):
    expected = {"specs": ["axial"], "config": Settings(64), "judge": "j", "size": [4, 6], "floor": True}
    assert parser.run(["axial", "--judge", "j"]) == expected | {"png_dir": None, "kind": "a"}


def test_sequences_take_several_words_and_flags_none(parser):
    options = "axial mixed(base=10) --judge j --label 3 4 --size 8 9 --no-floor --png-dir a/b --kind b --n 2"
    found = parser.run(options.split())
    assert found["specs"] == ["axial", "mixed(base=10)"]
    assert found["config"] == Settings(2, [3, 4])
    assert found["size"] == [8, 9]
    assert found["floor"] is False
    assert found["png_dir"] == Path("a/b")
    assert found["kind"] == "b"
    assert parser.run(["axial", "--judge=j", "--labels", "5", "--floor"])["config"].labels == [5]


def test_help_is_the_docstring(parser):
    text = parser.format_help()
    for words in ("Do something.\n\nWith a second paragraph.", "--size H W", "--png-dir PNG_DIR", "a required option"):
        assert words in text
    assert "a number (default: 64)" in " ".join(text.split())
    assert "--labels" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("axial", "the following arguments are required: judge"),
        ("axial --judge j --n q", '"n": expected int, got q'),
        ("axial --judge j --kind q", "\"kind\": expected Literal['a', 'b'], got q"),
        ("axial --judge j --labels 1 q", '"labels" element 2: expected int, got q'),
        ("axial --judge j --size 4", "argument --size: expected 2 arguments"),
        ("axial --judge j --foo 4", "unrecognized arguments: --foo 4"),
    ],
)
def test_errors_are_one_line_and_status_2(parser, options, error, capsys):
    with pytest.raises(SystemExit) as caught:
        parser.run(options.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {error} (--help lists the options)\n"


def test_only_the_given_exceptions_become_one_line(monkeypatch):
    def fail(error, **options):
        with one_line_errors(ValueError, **options):
            raise error

    with pytest.raises(SystemExit, match=r"^error: first line$"):
        fail(ValueError("first line\nsecond line"))
    with pytest.raises(KeyError):
        fail(KeyError("x"))
    with pytest.raises(ValueError, match="x"):
        fail(ValueError("x"), unless=lambda: True)
    monkeypatch.setenv("VIT_ROPE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="x"):
        fail(ValueError("x"))


def test_messages_of_workers_are_their_last_line():
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback: …\nValueError: bad image: a.png"
    assert message(ValueError(text)) == "bad image: a.png"
    assert message(ValueError("")) == "ValueError"
