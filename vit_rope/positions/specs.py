"""How to name a position scheme.

A spec names a scheme, its options, modifiers and sums: "axial(base=100)", "learned + mixed". It is
the value in YAML, the argument on the command line and the label in a plot. Building one never
imports a module, because a spec may come with a downloaded config: a user's scheme is registered by
importing its module.
"""

import ast
import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from .base import Layout, Position, Sum

Factory = Callable[..., Position]
F = TypeVar("F", bound=Factory)
_SCHEMES: dict[str, Factory] = {}
ALIASES = {"rope": "axial", "rotary": "axial"}
MEANINGS = {  # common words for schemes, of which there are several
    "absolute": "learned (a table of vectors) or sincos (fixed waves)",
    "sinusoidal": "sincos (added to tokens) or axial (rotates queries and keys)",
    "relative": "shaw, swin or another one of the folders relative/ and bias/",
}


def register(factory: F | str) -> Any:
    """Make `factory(layout, *schemes, **options)` known to specs: `@register`, by its lower-case
    name, or `@register("name")`.

    Parameters without a default are schemes to modify, those with one are options. Raises
    ValueError for a name that is taken.
    """
    if isinstance(factory, str):
        return functools.partial(_register, factory)
    return _register(factory.__name__.lower(), factory)


def _register(name: str, factory: F) -> F:
    if name in _SCHEMES or name in ALIASES:
        home = _SCHEMES[name].__module__ if name in _SCHEMES else f"{__name__} for {ALIASES[name]}"
        raise ValueError(f"position scheme {name!r} is registered already, by {home}")
    _SCHEMES[name] = factory
    return factory


def schemes() -> list[str]:
    """Every registered name, sorted."""
    return sorted(_SCHEMES)


def build(spec: str, layout: Layout) -> Position:
    """The scheme that `spec` names, e.g. "mixed(base=10) + learned", for a model of this layout.

    Raises TypeError where spec is not a string, and ValueError where it cannot be parsed, names
    something that does not exist, or asks for something that the layout does not allow.
    """
    if not isinstance(spec, str):
        raise TypeError(
            f'a position spec is a string such as "axial(base=100)", or "none" for no positions, '
            f"got {type(spec).__name__}"
        )
    if len(spec) > 1000:
        raise ValueError(f"a position spec has at most 1000 characters, got {len(spec)}")
    try:
        tree = ast.parse(spec.strip(), mode="eval").body
        position = _build(tree, layout)
    except SyntaxError as error:
        raise ValueError(f'cannot read position spec {spec!r}: expected e.g. "axial(base=100) + learned"') from error
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot build position {spec!r}: {error or type(error).__name__}") from error
    position.axes, position.made_for, position.spec = layout.axes, layout, spec.strip()
    return position


def rebuild(position: Position, spec: str) -> Position:
    """The scheme that another spec names, for the same layout, with the learned parameters of
    `position`.

    The parameters are the same objects, so they keep their device, and an optimizer keeps training
    them. Raises ValueError for a spec that does not fit or learns parameters of other names or
    shapes.
    """
    scheme = build(spec, cast(Layout, position.made_for))
    learned, wanted = (dict(each.named_parameters()) for each in (position, scheme))
    if {name: p.shape for name, p in learned.items()} != {name: p.shape for name, p in wanted.items()}:
        raise ValueError(
            f"{spec!r} learns {sorted(wanted) or 'nothing'}, but the model's positions learned "
            f"{sorted(learned) or 'nothing'}; create a model with it instead"
        )
    for name, parameter in learned.items():
        owner, _, leaf = name.rpartition(".")
        setattr(scheme.get_submodule(owner), leaf, parameter)
    return scheme.train(position.training)


def factory(name: str) -> Factory:
    """The function or class registered under a name; ValueError, with close names, where there is
    none.
    """
    name = ALIASES.get(name, name)
    if name not in _SCHEMES:
        near = MEANINGS.get(name) or " or ".join(difflib.get_close_matches(name, _SCHEMES, n=3, cutoff=0.5))
        hint = f"did you mean {near}? " if near else ""
        raise ValueError(f"no position scheme is called {name!r}; {hint}There are: {', '.join(schemes())}")
    return _SCHEMES[name]


def signature(name: str) -> inspect.Signature:
    """The parameters of a registered scheme behind its layout: schemes to modify (no default), then
    options.
    """
    return inspect.Signature(list(inspect.signature(factory(name)).parameters.values())[1:])


def _build(node: ast.expr, layout: Layout) -> Position:
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            both = Sum(*(part for side in (left, right) for part in _parts(_build(side, layout))))
            check_sum(both, layout)
            return both
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=keywords):
            return _call(name, layout, [_build(argument, layout) for argument in arguments], _options(name, keywords))
        case ast.Name(id=name):
            return _call(name, layout, [], {})
    raise ValueError(f"expected name, name(option=value) or a sum of these, not {ast.unparse(node)!r}")


def _parts(position: Position) -> list[Position]:
    return [cast(Position, part) for part in position.parts] if isinstance(position, Sum) else [position]


def check_sum(both: Sum, layout: Layout) -> None:
    """Raise ValueError for parts whose encodings cannot be combined, by combining those of a few
    cells. Parts on the meta device are not looked at.
    """
    if any(parameter.is_meta for parameter in both.parameters()):
        return
    with torch.no_grad(), torch.device("cpu"):
        coords = layout.coords()[:2]
        both.encode(coords, None, None)


def _options(name: str, keywords: list[ast.keyword]) -> dict[str, Any]:
    options = {}
    for keyword in keywords:
        if keyword.arg is None:
            raise ValueError(f"{name} takes options as name=value, not **{ast.unparse(keyword.value)}")
        try:
            value = ast.literal_eval(keyword.value)
        except (ValueError, TypeError) as error:
            text = ast.unparse(keyword.value)
            raise ValueError(f"{name}({keyword.arg}=…) takes a number, a string or a tuple, not {text}") from error
        options[keyword.arg] = tuple(value) if isinstance(value, list) else value
    return options


def _call(name: str, layout: Layout, parts: list[Position], options: dict[str, Any]) -> Position:
    scheme = factory(name)
    parameters = list(signature(name).parameters.values())
    wanted = [p.name for p in parameters if p.default is p.empty and p.kind is not p.KEYWORD_ONLY]
    if len(parts) != len(wanted):
        kind = f"modifies {len(wanted)} scheme(s) ({', '.join(wanted)})" if wanted else "modifies no other scheme"
        raise ValueError(f"{name} {kind}, got {len(parts)}; options are written name=value")
    hints = typing.get_type_hints(scheme.__init__ if inspect.isclass(scheme) else scheme)
    allowed = {p.name: hints.get(p.name, Any) for p in parameters if p.name not in wanted}
    for option, value in options.items():
        if option not in allowed:
            raise ValueError(f"{name} has no option {option!r}; it takes {', '.join(allowed) or 'none'}")
        if not _accepts(allowed[option], value):
            raise ValueError(f"{name}({option}=…) takes {_describe(allowed[option])}, got {value!r}")
    position = scheme(layout, *parts, **options)
    position.made_for = layout
    return position


def _accepts(hint: Any, value: Any) -> bool:
    """Whether a literal fits a type hint, as far as options of schemes use hints."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and len(value) > 0 and all(_accepts(arguments[0], item) for item in value)
    if hint in (float, int):
        kinds = (float, int) if hint is float else int
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    return hint is Any or (value is None if hint is type(None) else isinstance(value, hint))


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is typing.Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin is tuple:
        return f"a tuple, each item {_describe(arguments[0])}"
    names = {float: "a finite number", int: "a whole number", bool: "True or False", str: "a string"}
    return names.get(hint, str(hint))
