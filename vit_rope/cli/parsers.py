"""Command-line parsers that are read from the signature and the docstring of a function."""

import argparse
import inspect
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from docstring_parser import parse
from jsonargparse import ArgumentParser

from ..files import expand_home

WORDS = {"<class '": "", "'>": "", "typing.": "", "Expected a ": "expected ", "Expected ": "expected "}
WORDS |= {". Got value:": ", got", "dot import path string": "the name of a known class"}
NOT_SAID = ("NoneType", "Expected a path but")  # alternatives that jsonargparse lists but users do not mean


class OneLineErrors(ArgumentParser):
    """A jsonargparse parser that exits with status 2 and one line of text on an error."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        self.exit(2, f"error: {shorten(message)} (--help lists the options)\n")


class VerbParser(OneLineErrors):
    """The options of one verb: the parameters of a function, described by its docstring.

    Parameters without a default are positional arguments, keyword-only ones without a default are
    required options. A sequence takes several words (`--labels 3 4`), a bool is a flag (`--floor`,
    `--no-floor`), and underscores become dashes (`--png-dir`).

    Args:
        prog: name of the command in messages, such as "vit-rope sample"
        function: called with the arguments; its docstring is the help
        config: a dataclass for the parameter `config` of the function; its fields become options
        aliases: further names of options, such as {"labels": "label"}
        defaults: default values that differ from those of the signatures
    """

    def __init__(
        self,
        prog: str,
        function: Callable[..., Any],
        config: type | None = None,
        aliases: Mapping[str, str] | None = None,
        **defaults: Any,
    ) -> None:
        docstring = parse(inspect.getdoc(function) or "")
        paragraphs = filter(None, (docstring.short_description, docstring.long_description))
        self.function, self.config, self.aliases = function, config, aliases or {}
        self.hints = get_type_hints(function) | (get_type_hints(config) if config else {})
        super().__init__(prog=prog, description="\n\n".join(paragraphs), formatter_class=HelpFormatter)
        self.add_function_arguments(
            function, as_group=False, as_positional=True, skip=set() if config is None else {"config"}
        )
        if config is not None:
            self.add_class_arguments(config, as_group=False)
        self.set_defaults(defaults)

    def add_argument(self, *names: str, **settings: Any) -> Any:
        """Add one parameter, spelled as command lines spell it."""
        name = names[0].lstrip("-")
        hint = self.hints.get(name)
        if hint is None:  # an argument of jsonargparse's own, such as --help
            return super().add_argument(*names, **settings)
        if type(None) in get_args(hint):
            hint = get_args(hint)[0]
        if names[0].startswith("--"):
            aliases = [self.aliases[name]] if name in self.aliases else []
            names = tuple(f"--{spelling.replace('_', '-')}" for spelling in (name, *aliases))
        if hint is bool:
            kept = {key: settings[key] for key in ("help", "default") if key in settings}
            settings = kept | {"action": argparse.BooleanOptionalAction}
        elif get_origin(hint) in (list, tuple, Sequence):
            elements = get_args(hint)
            settings.pop("action", None)
            settings |= {"type": elements[0], "nargs": "+"}
            if get_origin(hint) is tuple:
                settings |= {"nargs": len(elements), "metavar": ("H", "W")}
            if settings.get("default"):
                settings["default"] = list(settings["default"])
        return super().add_argument(*names, **settings)

    def run(self, args: Sequence[str]) -> Any:
        """Parse the arguments, call the function with them and return its result.

        `~` at the start of a path is replaced by the home directory.
        """
        options = {key: expand_home(value) for key, value in self.parse_args(list(args)).as_dict().items()}
        if self.config is not None:
            fields = inspect.signature(self.config).parameters
            options["config"] = self.config(**{key: options.pop(key) for key in fields})
        return self.function(**options)

    def fail(self, text: str) -> NoReturn:
        """Report an error of the function in one line and exit with status 2."""
        self.exit(2, f"error: {text}\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help in at most 100 columns; defaults are shown except None, False and True."""

    def __init__(self, prog: str) -> None:
        width = min(100, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=28, width=width)

    def add_argument(self, action: argparse.Action) -> None:
        """Add the help of one argument, except of options such as --data.augment.help."""
        if not any(name.endswith(".help") for name in action.option_strings):
            super().add_argument(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").replace("%", "%%")
        shown = not isinstance(action.default, bool | type(None)) and action.default not in ("", argparse.SUPPRESS)
        return f"{text} (default: %(default)s)" if shown else text

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.dest.rpartition(".")[2].upper()


def shorten(message: str) -> str:
    """An error of jsonargparse in one line: what was expected, and what was given.

    jsonargparse itself lists each alternative of a type in a line of its own.
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    if len(lines) > 2:
        value = lines[-1].removeprefix("Given value: ")
        told = [line.removesuffix(f": {value}") for line in lines if line.startswith(("Expected", "Importing"))]
        told = [line for line in told if not any(words in line for words in NOT_SAID)]
        lines = [lines[0], f"{' or '.join(told or lines[1:2])}, got {value}"]
    text = " ".join(lines).removeprefix("Parser key ")
    for verbose, short in WORDS.items():
        text = text.replace(verbose, short)
    refused, denied, _ = text.partition(", denied by the")
    return f"{refused}; allow it by --import with its module" if denied else text
