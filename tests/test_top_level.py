"""The public names of `vit_rope`: what `dir` lists, what loads on first use, and submodules."""

import subprocess
import sys

import pytest

import vit_rope

NAMES = {
    "RopeViT",
    "__version__",
    "add_positions",
    "attend",
    "build",
    "from_timm",
    "grid",
    "remove_positions",
    "ropeify",
    "set_positions",
}


def test_dir_lists_the_public_names_only():
    assert set(dir(vit_rope)) == NAMES
    assert set(vit_rope.__all__) == NAMES - {"__version__"}


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_every_name_can_be_imported_and_is_documented(name):
    namespace = {}
    exec(f"from vit_rope import {name}", namespace)
    assert callable(namespace[name])
    assert namespace[name].__doc__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'vit_rope' has no attribute 'rotate'"):
        vit_rope.rotate  # noqa: B018


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_that_need_diffusers_load_on_first_use():
    report = "print('diffusers' in sys.modules)"
    assert run(f"import sys, vit_rope; {report}; vit_rope.add_positions; {report}").split() == ["False", "True"]


def test_subpackages_can_be_imported_from_the_package():
    run("from vit_rope import analysis, positions, convert; analysis.kernel, positions.schemes, convert.ropeify")
