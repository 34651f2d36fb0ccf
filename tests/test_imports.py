"""Imports point to lower layers only, no two packages import each other, and importing the library
stays light.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vit_rope

ROOT = Path(vit_rope.__file__).parent
LAYERS = [
    {"ops"},
    {"positions"},
    {"attention"},
    {"models", "unet", "files"},
    {"convert", "analysis", "sampling"},
    {"training", "bench", "plots"},
    {"cli", "__main__"},
]
OUTSIDE = {  # packages, and the only parts of the library that may import them
    "lightning": {"training", "cli"},
    "jsonargparse": {"training", "cli"},
    "matplotlib": {"plots"},
    "timm": {"models", "convert", "training", "bench"},
    "diffusers": {"models", "unet", "sampling", "training", "bench"},
}


def part(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imports(path: Path):
    """(inside, name): modules of vit_rope and outside packages that a file imports, anywhere."""
    package = ["vit_rope", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) + 1 - node.level] if node.level else []
            full = ".".join([*stem, node.module] if node.module else stem)
            names = [f"{full}.{alias.name}" for alias in node.names] if (full + ".").startswith("vit_rope.") else [full]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            yield (True, rest) if first == "vit_rope" and rest else (False, first)


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_to_lower_layers_only(path):
    own = part(path)
    for inside, name in imports(path):
        if inside:
            assert layer(name[0]) <= layer(own), f"{path} imports vit_rope.{'.'.join(name)}"
        elif name in OUTSIDE:
            assert own in OUTSIDE[name], f"{path} imports {name}"


def test_positions_and_operations_need_torch_only():
    allowed = set(sys.stdlib_module_names) | {"torch", "vit_rope"}
    for path in [*(ROOT / "ops").rglob("*.py"), *(ROOT / "positions").rglob("*.py")]:
        own = {"triton"} if path == ROOT / "ops" / "triton.py" else set()  # loaded on a GPU only
        assert {name for inside, name in imports(path) if not inside} <= allowed | own


def units() -> dict[str, set[str]]:
    """What each package or module, at every depth, imports of its siblings: {"": …, "positions":
    …}.
    """
    graph: dict[str, set[str]] = {}
    for path in FILES:
        own = path.relative_to(ROOT).with_suffix("").parts
        own = own[:-1] if own[-1] == "__init__" else own
        for inside, name in imports(path):
            if not inside:
                continue
            for depth in range(min(len(own), len(name))):
                if own[:depth] == tuple(name[:depth]) and own[depth] != name[depth]:
                    graph.setdefault("/".join(own[: depth + 1]), set()).add("/".join([*own[:depth], name[depth]]))
    return graph


def test_no_two_packages_import_each_other():
    """Transitively, and at every depth: among the parts of the library, and among the parts of each
    package.
    """
    graph = units()

    def reachable(start: str) -> set[str]:
        seen, left = set(), [start]
        while left:
            for name in graph.get(left.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    left.append(name)
        return seen

    circles = [name for name in graph if name in reachable(name)]
    assert not circles


def loaded(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in done.stdout.split()}


HEAVY = {"lightning", "pytorch_lightning", "diffusers", "transformers", "matplotlib", "jsonargparse", "torchmetrics"}


def test_importing_the_library_registers_models_and_loads_nothing_heavy():
    code = "import vit_rope, timm; timm.list_models('vit_rope_*').index('vit_rope_small_patch16_224'); dir(vit_rope)"
    assert not HEAVY & loaded(code)


def test_sampling_loads_no_trainer():
    code = "import vit_rope.sampling, vit_rope.sampling.io, vit_rope.cli.sample"
    assert not {"lightning", "pytorch_lightning", "torchmetrics", "matplotlib"} & loaded(code)


def test_help_loads_no_trainer():
    assert not {"torch", "timm", "vit_rope"} & loaded("from vit_rope_cli import main; main(['--help'])")
