"""The rules of the code base, checked on the syntax tree of every file.

A rule is a function that takes source files and returns one line for each violation: the file, the
line, what is wrong and what to do.
"""

import ast
import importlib.util
import pydoc
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
FILE_LINES, FUNCTION_LINES, READING_LINES = 320, 60, 700
LONG_FUNCTIONS = {"forward_intermediates"}  # its arguments and its results are prescribed by timm
READING = ["README.md", "vit_rope/positions/rotary/base.py", "vit_rope/attention.py", "vit_rope/models/vit.py"]
SHARED_BY_TESTS = {"helpers", "oracles", "processes"}  # files of tests/ or of one of its folders
ENTRY_POINTS = {"main", "bench"}  # of each file of cli/ and of each topic of bench/, called by the name of the file
NAMED_TUPLE = {"_replace", "_asdict", "_fields", "_make"}  # public, in spite of the underscore
INHERITED = {  # methods whose documentation is that of a class outside the library
    "argparse.ArgumentParser": "error exit format_help print_help parse_args parse_known_args add_argument",
    "torch.nn.Module": "forward extra_repr state_dict load_state_dict train requires_grad_",
    "torch.autograd.Function": "forward backward setup_context",
    "lightning.pytorch.LightningModule": "training_step validation_step test_step configure_model"
    " configure_optimizers optimizer_step lr_scheduler_step configure_gradient_clipping setup log_dict",
    "lightning.pytorch.LightningDataModule": "prepare_data train_dataloader val_dataloader test_dataloader teardown",
    "lightning.pytorch.loggers.Logger": "name version save_dir root_dir log_dir log_hyperparams log_metrics save"
    " finalize",
    "lightning.pytorch.callbacks.WeightAveraging": "should_update state_dict load_state_dict",
    "lightning.pytorch.plugins.io.CheckpointIO": "save_checkpoint load_checkpoint remove_checkpoint teardown",
    "lightning.pytorch.callbacks.progress.ProgressBar": "disable enable print get_metrics",
    "lightning.pytorch.cli.LightningCLI": "add_arguments_to_parser add_core_arguments_to_parser init_parser subcommands"
    " before_instantiate_classes instantiate_classes instantiate_trainer parse_arguments"
    " add_default_arguments_to_parser setup_parser link_optimizers_and_lr_schedulers",
    "timm.models.vision_transformer.VisionTransformer": "forward_features forward_head forward_intermediates"
    " prune_intermediate_layers no_weight_decay group_matcher set_grad_checkpointing set_input_size get_classifier"
    " reset_classifier init_weights load_pretrained get_intermediate_layers",
    "diffusers.models.attention_processor.Attention": "set_processor fuse_projections",
    "diffusers.UNet2DConditionModel": "save_pretrained from_pretrained save_config from_config"
    " set_attn_processor set_default_attn_processor",
}
HOOKS = ("on_", "before_", "after_")  # of Lightning's modules, callbacks and CLI


class Source(NamedTuple):
    """A source file: its path from the root of the repository, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @classmethod
    def of(cls, path: str, text: str) -> "Source":
        return cls(path, text, ast.parse(text))

    def at(self, node: ast.AST | int, message: str) -> str:
        line = node if isinstance(node, int) else getattr(node, "lineno", 1)
        return f"{self.path}:{line}: {message}"

    @property
    def package(self) -> list[str]:
        return self.path.split("/")[:-1]


Function = ast.FunctionDef | ast.AsyncFunctionDef


def read(paths: list[Path]) -> list[Source]:
    return [Source.of(path.relative_to(ROOT).as_posix(), path.read_text()) for path in sorted(paths)]


LIBRARY = read([*(ROOT / "vit_rope").rglob("*.py"), ROOT / "vit_rope_cli.py", ROOT / "train.py"])
TESTS = read([*(ROOT / "tests").rglob("*.py")])


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def is_public(node: Function | ast.ClassDef) -> bool:
    return not node.name.startswith("_")


def public_classes(source: Source) -> list[ast.ClassDef]:
    return [node for node in source.tree.body if isinstance(node, ast.ClassDef) and is_public(node)]


def public_functions(body: list[ast.stmt]) -> list[Function]:
    return [node for node in body if isinstance(node, Function) and is_public(node)]


def named(node: ast.AST) -> str:
    """The last name of a dotted one: `Module` of `nn.Module`, `Generic` of `Generic[T]`."""
    node = node.value if isinstance(node, ast.Subscript) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def imported_from(node: ast.ImportFrom, source: Source) -> str:
    """The full name of the module of `from … import`, relative imports resolved."""
    stem = source.package[: len(source.package) + 1 - node.level] if node.level else []
    return ".".join([*stem, *([node.module] if node.module else [])])


# ---- size ---------------------------------------------------------------------------------------


def files_are_short(sources: list[Source]) -> list[str]:
    counts = [(source, source.text.count("\n")) for source in sources]
    return [
        source.at(1, f"{count} lines, at most {FILE_LINES}: move one idea to its own file")
        for source, count in counts
        if count > FILE_LINES
    ]


def functions_are_short(sources: list[Source]) -> list[str]:
    found = []
    for source in sources:
        for node in functions(source.tree):
            count = (node.end_lineno or node.lineno) - node.lineno + 1
            if count > FUNCTION_LINES and node.name not in LONG_FUNCTIONS:
                found.append(source.at(node, f"{node.name} has {count} lines, at most {FUNCTION_LINES}: split it"))
    return found


# ---- what the library does not contain ----------------------------------------------------------

SCRIPTING = {"script", "script_if_tracing", "ignore", "unused", "export", "is_scripting"}


def no_torchscript(sources: list[Source]) -> list[str]:
    found = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute):
                is_used = named(node.value) == "jit" and node.attr in SCRIPTING
                name = node.attr
            elif isinstance(node, ast.ImportFrom):
                is_used = node.module == "torch.jit" and bool({alias.name for alias in node.names} & SCRIPTING)
                name = "torch.jit"
            else:
                name = getattr(node, "id", None) or getattr(node, "name", None) or getattr(node, "value", None)
                is_used = False
            if is_used or (isinstance(name, str) and name.startswith("__jit_")):
                found.append(source.at(node, f"{name} supports TorchScript, which torch deprecates: remove it"))
    return found


def no_asserts(sources: list[Source]) -> list[str]:
    return [
        source.at(node, "assert: raise ValueError or TypeError that says what came, what is expected and what to do")
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Assert)
    ]


def no_todos(sources: list[Source]) -> list[str]:
    return [
        source.at(number, "TODO: do it or file an issue")
        for source in sources
        for number, line in enumerate(source.text.splitlines(), 1)
        if re.search(r"\b(TODO|FIXME|XXX)\b", line)
    ]


# ---- documentation ------------------------------------------------------------------------------


def modules_are_documented(sources: list[Source]) -> list[str]:
    return [
        source.at(1, "no docstring: say in one sentence what the module is for")
        for source in sources
        if not ast.get_docstring(source.tree)
    ]


def classes_of(sources: list[Source]) -> dict[str, list[ast.ClassDef]]:
    found: dict[str, list[ast.ClassDef]] = {}
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def inherits_documentation(cls: ast.ClassDef, name: str, library: dict[str, list[ast.ClassDef]]) -> bool:
    """Whether a base class documents the method, in the library or outside it (see `INHERITED`)."""
    for base in map(named, cls.bases):
        for parent in library.get(base, []):
            if parent is cls:
                continue
            methods = [node for node in parent.body if isinstance(node, Function) and node.name == name]
            if any(map(ast.get_docstring, methods)) or inherits_documentation(parent, name, library):
                return True
        if base not in library and (name.startswith(HOOKS) or name in " ".join(INHERITED.values()).split()):
            return True
    return False


def public_names_are_documented(sources: list[Source]) -> list[str]:
    library, found = classes_of(sources), []
    for source in sources:
        missing = [(node, node.name) for node in public_functions(source.tree.body) if not ast.get_docstring(node)]
        for cls in public_classes(source):
            if not ast.get_docstring(cls):
                missing.append((cls, cls.name))
            for node in public_functions(cls.body):
                if not ast.get_docstring(node) and not inherits_documentation(cls, node.name, library):
                    missing.append((node, f"{cls.name}.{node.name}"))
        found += [
            source.at(node, f"{name} has no docstring: say in one sentence what it does") for node, name in missing
        ]
    return found


def takes_tensors(node: Function) -> bool:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    hints = [argument.annotation for argument in arguments if argument is not None and argument.annotation]
    return any(_is_tensor(hint) for hint in hints)


def _is_tensor(hint: ast.AST) -> bool:
    if isinstance(hint, ast.Subscript) and named(hint) == "Callable":
        return False
    return named(hint) == "Tensor" or any(map(_is_tensor, ast.iter_child_nodes(hint)))


def tensors_have_a_legend(sources: list[Source]) -> list[str]:
    found = []
    for source in sources:
        public = public_functions(source.tree.body)
        public += [node for cls in public_classes(source) for node in public_functions(cls.body)]
        first = next(filter(takes_tensors, public), None)
        legend = re.search(r"^Shapes\b", ast.get_docstring(source.tree) or "", re.MULTILINE)
        if first and not legend:
            advice = "add a line to the module's docstring such as: Shapes   B samples, N tokens, D channels"
            found.append(
                source.at(1, f"no legend of shapes, though {first.name} (line {first.lineno}) takes a Tensor: {advice}")
            )
    return found


# ---- names --------------------------------------------------------------------------------------


def names_are_unique(sources: list[Source]) -> list[str]:
    """No two top-level functions or classes of one folder share a name, except entry points."""
    owners: dict[tuple[str, str], Source] = {}
    found = []
    for source in sources:
        for node in source.tree.body:
            if not isinstance(node, Function | ast.ClassDef) or node.name in ENTRY_POINTS or node.name.startswith("__"):
                continue
            owner = owners.setdefault(("/".join(source.package), node.name), source)
            if owner.path != source.path:
                found.append(source.at(node, f"{node.name} is also defined in {owner.path}: rename one, or share it"))
    return found


def private_names_stay_private(sources: list[Source]) -> list[str]:
    found = []
    for source in sources:
        modules = set()
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom) and imported_from(node, source).split(".")[0] == "vit_rope":
                modules |= {alias.asname or alias.name for alias in node.names}
                found += [
                    source.at(
                        node, f"imports the private {alias.name} of {imported_from(node, source)}: make it public"
                    )
                    for alias in node.names
                    if re.match(r"_(?!_)", alias.name)
                ]
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Attribute) or getattr(node.value, "id", None) not in modules:
                continue
            if re.match(r"_(?!_)", node.attr) and node.attr not in NAMED_TUPLE:
                found.append(source.at(node, f"uses the private {ast.unparse(node)}: make it public"))
    return found


def no_test_is_imported(sources: list[Source]) -> list[str]:
    found = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom):
                module = imported_from(node, source)
                package = (ROOT / module.replace(".", "/")).is_dir()
                names = [f"{module}.{alias.name}" for alias in node.names] if package else [module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                parts = name.split(".")
                shared = parts[-1] in SHARED_BY_TESTS
                if (parts[0] == "tests" and not shared) or any(part.startswith("test_") for part in parts):
                    found.append(source.at(node, f"imports {name}: move what tests share to tests/helpers.py"))
    return found


# ---- the rules hold -----------------------------------------------------------------------------

LIBRARY_RULES = [
    files_are_short,
    functions_are_short,
    no_torchscript,
    no_asserts,
    no_todos,
    modules_are_documented,
    public_names_are_documented,
    tensors_have_a_legend,
    names_are_unique,
    private_names_stay_private,
]


@pytest.mark.parametrize("rule", LIBRARY_RULES)
def test_the_library_keeps_the_rule(rule):
    found = rule(LIBRARY)
    assert not found, "\n" + "\n".join(found)


def test_tests_import_shared_code_only():
    found = no_test_is_imported(TESTS)
    assert not found, "\n" + "\n".join(found)


def test_the_core_is_a_short_read():
    counts = {path: (ROOT / path).read_text().count("\n") for path in READING}
    total = sum(counts.values())
    assert total <= READING_LINES, f"{total} lines, at most {READING_LINES}: shorten one of {counts}"


@pytest.mark.parametrize("base", INHERITED)
def test_methods_that_inherit_their_documentation_exist(base):
    cls = pydoc.locate(base)
    assert cls is not None
    missing = [name for name in INHERITED[base].split() if not hasattr(cls, name)]
    assert not missing, f"{base} has no {missing}: remove them from INHERITED"


# ---- the rules catch violations -----------------------------------------------------------------

DOC = '"""A module."""\n'
CATCHES = [  # a rule, what violates it, what the message contains
    (files_are_short, "x = 1\n" * 321, "a.py:1: 321 lines, at most 320"),
    (functions_are_short, "def f():\n" + "    x = 1\n" * 60, "a.py:1: f has 61 lines, at most 60"),
    (no_torchscript, "import torch\n\n\n@torch.jit.ignore\ndef f(): ...\n", "a.py:4: ignore supports TorchScript"),
    (no_torchscript, "class A:\n    __jit_unused_properties__ = []\n", "a.py:2: __jit_unused_properties__ supports"),
    (no_torchscript, "from torch.jit import script\n", "a.py:1: torch.jit supports TorchScript"),
    (no_torchscript, "import torch\n\nif torch.jit.is_scripting():\n    pass\n", "a.py:3: is_scripting supports"),
    (no_asserts, "x = 1\nassert x\n", "a.py:2: assert: raise ValueError"),
    (no_todos, "x = 1  # TODO: more\n", "a.py:1: TODO: do it"),
    (modules_are_documented, "x = 1\n", "a.py:1: no docstring"),
    (public_names_are_documented, "def f(): ...\n", "a.py:1: f has no docstring"),
    (public_names_are_documented, "class A: ...\n", "a.py:1: A has no docstring"),
    (
        public_names_are_documented,
        'class A(B):\n    """A."""\n    def f(self): ...\nclass B:\n    """B."""\n    def _f(self): ...\n',
        "a.py:3: A.f has no docstring",
    ),
    (
        public_names_are_documented,
        'class A(nn.Module):\n    """A."""\n    def rotate(self): ...\n',
        "a.py:3: A.rotate has no docstring",
    ),
    (tensors_have_a_legend, DOC + "def f(x: Tensor | None): ...\n", "though f (line 2) takes a Tensor"),
    (
        tensors_have_a_legend,
        DOC + "class A:\n    def f(self, x: list[torch.Tensor]): ...\n",
        "though f (line 3) takes a Tensor",
    ),
    (private_names_stay_private, "from .b import _x\n", "a.py:1: imports the private _x of vit_rope.b"),
    (private_names_stay_private, "from . import b\nb._x\n", "a.py:2: uses the private b._x"),
]


@pytest.mark.parametrize(("rule", "text", "message"), CATCHES)
def test_a_rule_catches_a_violation(rule, text, message):
    found = rule([Source.of("vit_rope/a.py", text)])
    assert len(found) == 1
    assert message in found[0]


PASSES = [  # a rule, and what looks like a violation and is none
    (functions_are_short, "def forward_intermediates():\n" + "    x = 1\n" * 80),
    (no_torchscript, "import torch\n\ntorch.jit.trace(f, x)\n"),
    (public_names_are_documented, "def _f(): ...\nclass _A: ...\n"),
    (public_names_are_documented, 'class A(nn.Module):\n    """A."""\n    def forward(self): ...\n'),
    (
        public_names_are_documented,
        'class A(B):\n    """A."""\n    def f(self): ...\nclass B:\n    """B."""\n    def f(self):\n        """F."""\n',
    ),
    (tensors_have_a_legend, '"""A module.\n\nShapes   N tokens\n"""\ndef f(x: Tensor): ...\n'),
    (tensors_have_a_legend, DOC + "def f(x: Callable[[Tensor], Tensor]): ...\ndef _g(x: Tensor): ...\n"),
    (private_names_stay_private, "from torch import _C\nfrom .b import c\nc._replace(x=1)\n"),
]


@pytest.mark.parametrize(("rule", "text"), PASSES)
def test_a_rule_lets_good_code_pass(rule, text):
    assert rule([Source.of("vit_rope/a.py", text)]) == []


def test_names_of_one_folder_are_compared():
    sources = [
        Source.of("vit_rope/a.py", "def _f(): ...\ndef main(): ...\n"),
        Source.of("vit_rope/b.py", "def main(): ...\ndef _f(): ...\n"),
        Source.of("vit_rope/c/a.py", "def _f(): ...\n"),
    ]
    assert names_are_unique(sources) == [
        "vit_rope/b.py:2: _f is also defined in vit_rope/a.py: rename one, or share it"
    ]


@pytest.mark.parametrize(
    "line",
    ["from tests.test_b import x", "from .test_b import x", "from . import test_b", "import test_b", "import tests.b"],
)
def test_imports_between_tests_are_found(line):
    source = Source.of("tests/test_a.py", f"{line}\n")
    assert no_test_is_imported([source])[0].startswith("tests/test_a.py:1: imports ")


@pytest.mark.parametrize(
    "line",
    [
        "from tests.helpers import x",
        "from .helpers import x",
        "from tests import oracles",
        "from tests.unet.helpers import x",
        "import torch",
    ],
)
def test_imports_of_shared_code_pass(line):
    assert not no_test_is_imported([Source.of("tests/test_a.py", f"{line}\n")])


# ---- the architecture page ----------------------------------------------------------------------

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
PRIVATE = re.compile(r"_(?!_)\w*[a-zA-Z]\w*")


def private_names_of_others(sources: list[Source]) -> dict[str, set[str]]:
    """Private names that the library uses and does not define, with the files that use them."""
    defined, used = set(NAMED_TUPLE), {}
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, Function | ast.ClassDef) and not _is_override_of_others(node):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.arg):
                defined.add(node.arg)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and named(node.value) == "self":
                defined.add(node.attr)
            elif isinstance(node, ast.alias) and node.asname:
                defined.add(node.asname)
    for source in sources:
        for node in ast.walk(source.tree):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            for name in names:
                if PRIVATE.fullmatch(name) and name not in defined:
                    used.setdefault(name, set()).add(source.path)
    return used


def _is_override_of_others(node: ast.AST) -> bool:
    """Whether a method calls the method of the same name of its base class."""
    name = getattr(node, "name", "")
    calls = (ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call))
    return f"super().{name}" in calls


def test_the_architecture_page_lists_the_private_names_of_other_packages():
    used = private_names_of_others(LIBRARY)
    table = ARCHITECTURE.partition("## Private names")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    listed = {name: row for row in rows for name in re.findall(r"[`.](_\w+)", row)}
    missing = {name: sorted(paths) for name, paths in used.items() if name not in listed}
    assert not missing, f"add to the table of docs/architecture.md: {missing}"
    assert not listed.keys() - used.keys(), f"remove from docs/architecture.md: {sorted(listed.keys() - used.keys())}"
    for name, paths in used.items():
        for path in paths:
            assert f"`{path.removeprefix('vit_rope/')}`" in listed[name], f"{name} is also used in {path}: add it"


def layers_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layers", ROOT / "docs" / "layers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_architecture_page_and_the_picture_show_the_tested_layers():
    """`LAYERS` is written down once, in tests/test_imports.py; the script reads it there."""
    script = layers_script()
    layers = script.layers()
    rows = re.findall(r"^\| (\d) \| `(\w+)(?:/|\.py)` \|", ARCHITECTURE, re.MULTILINE)
    assert [{name for number, name in rows if int(number) == i} for i in range(len(layers))] == layers
    assert set(script.IDEAS) == set(script.COLUMNS) == set().union(*layers)
    inside, _ = script.graph()
    depth = {name: i for i, names in enumerate(layers) for name in names}
    assert all(depth[other] <= depth[name] for name, others in inside.items() for other in others)


def test_the_tree_names_every_file():
    tree = ARCHITECTURE.partition("## The tree")[2].partition("\n## ")[0]
    words = set(re.findall(r"\w+", tree))
    missing = [source.path for source in LIBRARY if not {Path(source.path).stem.strip("_")} <= words | {"init", "main"}]
    assert not missing, f"add to the tree of docs/architecture.md: {missing}"


def test_the_picture_of_the_layers_shows_the_imports(tmp_path):
    script = layers_script()
    script.draw(tmp_path / "layers.png")
    for path in (tmp_path / "layers.png", ROOT / "docs" / "layers.png"):
        assert path.stat().st_size < 100_000
        with Image.open(path) as picture:
            assert picture.info["imports"] == script.imports_shown(), "draw it again: python docs/layers.py"


# ---- continuous integration ---------------------------------------------------------------------


def test_the_workflow_runs_the_script_that_developers_run():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as True
    (job,) = workflow["jobs"].values()
    assert job["timeout-minutes"] == 90
    assert job["runs-on"].startswith("ubuntu")
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert {"python-version": "3.11"} in [step.get("with") for step in job["steps"]]


def test_hooks_run_the_checks_of_the_script_from_the_environment():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    assert {hook["language"] for hook in hooks[0]["hooks"]} == {"system"}
    script = (ROOT / ".ci" / "run").read_text()
    assert all(hook["entry"] in script for hook in hooks[0]["hooks"])
