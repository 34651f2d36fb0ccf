"""Imports point one way, and importing the library stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vit_rope

ROOT = Path(vit_rope.__file__).parent
LAYERS = [
    {"positions"},
    {"attention"},
    {"patches", "memory", "block", "vit", "unet", "denoiser", "layouts"},
    {"convert", "encoders", "pretrained", "fold", "analysis", "certify", "sampling", "training"},
    {"plots", "bench", "catalogue"},
    {"__main__"},
]
OUTSIDE = {  # packages that only these parts may import, and the parts that may import nothing but torch
    "lightning": {"training"},
    "jsonargparse": {"training"},
    "matplotlib": {"plots"},
    "timm": {
        "block",
        "patches",
        "layouts",
        "vit",
        "denoiser",
        "convert",
        "encoders",
        "pretrained",
        "training",
        "bench",
        "__main__",
    },
    "diffusers": {"unet", "denoiser", "sampling", "training", "bench"},
}


def part(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imports(path: Path):
    """(inside, name): parts of vit_rope and outside packages that a file imports, anywhere in it."""
    package = ["vit_rope", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) + 1 - node.level] if node.level else []
            full = ".".join([*stem, node.module] if node.module else stem)
            names = [f"{full}.{alias.name}" for alias in node.names] if full == "vit_rope" else [full]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            yield (True, rest[0]) if first == "vit_rope" and rest else (False, first)


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_to_lower_layers_alone(path):
    own = part(path)
    for inside, name in imports(path):
        if inside:
            assert layer(name) <= layer(own), f"{path} imports vit_rope.{name}"
        elif name in OUTSIDE:
            assert own in OUTSIDE[name], f"{path} imports {name}"


def test_positions_need_torch_alone():
    allowed = set(sys.stdlib_module_names) | {"torch", "vit_rope"}
    for path in (ROOT / "positions").glob("*.py"):
        own = {"triton"} if path.name == "kernel.py" else set()  # which only a GPU ever asks for
        assert {name for inside, name in imports(path) if not inside} <= allowed | own


def loaded(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in done.stdout.split()}


def test_importing_the_library_registers_models_and_loads_nothing_heavy():
    code = "import vit_rope, timm; timm.list_models('vit_rope_*').index('vit_rope_small_patch16_224')"
    heavy = {
        "lightning",
        "pytorch_lightning",
        "diffusers",
        "transformers",
        "matplotlib",
        "jsonargparse",
        "torchmetrics",
    }
    assert not heavy & loaded(code)


def test_help_loads_no_trainer():
    assert not {"torch", "timm", "vit_rope"} & loaded("from vit_rope_cli import main; main(['--help'])")
