"""timm's own tests/test_models.py, from the sdist of the installed timm, on the models that this
package registers.

Its TorchScript tests are deselected: torch deprecates `torch.jit.script`, and this library does not
support it.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

import vit_rope  # noqa: F401  registers the models

PLUGIN = """
import vit_rope
from timm.models import _registry

ours = {name for name, make in _registry._model_entrypoints.items() if make.__module__.split(".")[0] == "vit_rope"}
_registry._module_to_models["vision_transformer"] |= ours  # timm selects its feature and pruning tests by module
"""


@pytest.fixture(scope="module")
def timm_tests(tmp_path_factory):
    """The folder of timm's tests: VIT_ROPE_TIMM_TESTS, or downloaded by pip."""
    if given := os.environ.get("VIT_ROPE_TIMM_TESTS"):
        return Path(given)
    folder = tmp_path_factory.mktemp("timm")
    version = importlib.metadata.version("timm")
    fetch = ["download", f"timm=={version}", "--no-binary", "timm", "--no-deps", "--quiet", "--dest", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", *fetch], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"timm {version}'s own tests could not be fetched by pip: {done.stderr.strip().splitlines()[-1]}")
    with tarfile.open(next(folder.glob("timm-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("timm-*/tests"))


CONVERTED = ["vit_rope_small_patch16_rope_mixed_224", "vit_rope_eva02_tiny_patch14_224", "vit_rope_from_timm"]
OURS = timm.list_models("vit_rope_*", module="registry", exclude_filters="*large*")  # timm keeps twelve copies: 16 GB
NAMES = [*OURS, *CONVERTED]  # the other converted models differ in size only


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_timms_own_tests_pass(name, timm_tests, tmp_path):
    (tmp_path / "register_vit_rope.py").write_text(PLUGIN)
    target = tmp_path / "timm_tests"
    target.symlink_to(timm_tests)
    command = ["-m", "pytest", "-p", "register_vit_rope", "-p", "no:cacheprovider", "-q", "--disable-warnings"]
    done = subprocess.run(
        [sys.executable, *command, "-k", f"{name} and not pretrained and not torchscript", "timm_tests/test_models.py"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) >= 8, done.stdout[-2000:]  # forward, backward, fx, cfg, features, pruning
    assert "skipped" not in done.stdout.splitlines()[-1]
