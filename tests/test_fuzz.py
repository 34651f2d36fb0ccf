"""Random inputs: each works, or raises an error of this library with a message of one line.

`VIT_ROPE_FUZZ=5000 pytest tests/test_fuzz.py -m "slow or not slow"` tries that many of each kind;
`VIT_ROPE_FUZZ_OUT=results/fuzz.csv` writes the counts there.
"""

import contextlib
import copy
import csv
import io
import os
import pickle
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.helpers import CLASSIFIER, CONFIG
from vit_rope import files
from vit_rope.cli.fit import main
from vit_rope.positions import Layout, Position, build, schemes
from vit_rope.training import classification
from vit_rope.training.data.files import read_image

NUMBER = int(os.environ.get("VIT_ROPE_FUZZ", "0"))
COUNTS: dict[str, Counter] = {}
MODEL = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1, "position": "mixed + learned", "img_size": 8}


def fuzz(examples: int, share: float = 1.0):
    """Hypothesis settings: the same examples every time, VIT_ROPE_FUZZ of them if it is set."""
    number = round(NUMBER * share) or examples
    health = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=health)


@pytest.fixture(scope="module", autouse=True)
def write_counts():
    """After all tests, write the counts to the file named by VIT_ROPE_FUZZ_OUT."""
    yield
    if path := os.environ.get("VIT_ROPE_FUZZ_OUT"):
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["inputs", "tried", "accepted", "refused in one line"])
            for name, counts in COUNTS.items():
                writer.writerow([name, sum(counts.values()), counts["accepted"], counts["refused"]])


def attempt(name: str, call) -> None:
    """Call; it may only raise a one-line ValueError of this library or exit as the command line."""
    counts = COUNTS.setdefault(name, Counter())
    fault, message = None, ""
    try:
        call()
    except ValueError as error:
        fault, message = error, str(error)
    except SystemExit as error:
        fault, message = error, str(error.code).removeprefix("error: ")
    counts["accepted" if fault is None else "refused"] += 1
    if fault is not None:
        assert message.strip()
        assert "\n" not in message.strip()
        assert isinstance(fault, SystemExit) or "vit_rope" in traceback.extract_tb(fault.__traceback__)[-1].filename


# Specs

literals = st.one_of(
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=5),
    st.lists(st.integers(0, 9)),
)
calls = st.builds(
    lambda name, options: f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})",
    st.sampled_from(schemes()),
    st.dictionaries(
        st.sampled_from(["base", "unit", "scale", "freqs", "layout", "heads", "pairs"]), literals, max_size=3
    ),
)
specs = st.one_of(
    st.text(max_size=40),
    st.text("axialmedrng+()=,.0123456789*[]{}'\" -", max_size=40),
    st.lists(st.one_of(st.sampled_from(schemes()), calls), min_size=1, max_size=4).map(" + ".join),
    st.recursive(st.sampled_from(schemes()), lambda inner: inner.map(lambda text: f"({text})")),
)


@fuzz(300)
@given(specs, st.integers(1, 3))
def test_specs(spec, axes):
    layout = Layout(width=24, heads=2, grid=(3,) * axes, depth=2)
    attempt("position specs", lambda: isinstance(build(spec, layout), Position))


# Files


def encoded_image(kind: str) -> bytes:
    """An image of 9 x 12 pixels in this format."""
    content = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    Image.fromarray(values).save(content, kind)
    return content.getvalue()


KINDS = {kind: encoded_image(kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")}


def corrupt(content: bytes, changes: list[tuple[float, int]], cut: float) -> bytes:
    """Content, changed at some positions and truncated (both as shares of its length)."""
    array = bytearray(content)
    for position, value in changes:
        array[int(position * (len(array) - 1))] = value
    return bytes(array[: int(len(array) * cut)])


changes = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8)
cuts = st.one_of(st.just(1.0), st.floats(0, 1))


@pytest.mark.filterwarnings("ignore")  # Pillow's, on damaged files that it can still read
@fuzz(300)
@given(st.one_of(st.sampled_from(sorted(KINDS)), st.binary(max_size=300)), changes, cuts)
def test_images(tmp_path, kind, changed, cut):
    content = corrupt(KINDS[kind], changed, cut) if isinstance(kind, str) else kind
    path = tmp_path / "image"
    path.write_bytes(content)
    attempt("image bytes", lambda: read_image(path, 2**20))


def saved(content) -> bytes:
    """The bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


FILES = [saved({"state_dict": {"a": torch.ones(3)}, "config": "x: 1"}), pickle.dumps({"a": [1, "b", 2.0]})]


@fuzz(200)
@given(st.one_of(st.sampled_from([0, 1]), st.binary(max_size=200)), changes, cuts)
def test_checkpoint_bytes(tmp_path, file, changed, cut):
    path = tmp_path / "x.ckpt"
    path.write_bytes(corrupt(FILES[file], changed, cut) if isinstance(file, int) else file)
    attempt("checkpoint bytes", lambda: files.read(path))


# State dicts

model = timm.create_model("vit_rope_tiny_patch16_224", in_chans=1, num_classes=10, **MODEL)
state = {name: value.clone() for name, value in model.state_dict().items()}
unusual_values = st.one_of(
    st.lists(st.integers(0, 3), max_size=4).map(lambda shape: torch.zeros(shape)),
    st.sampled_from(
        [torch.tensor(float("nan")), torch.ones(3, dtype=torch.long), torch.ones(2, dtype=torch.complex64)]
    ),
    st.sampled_from([None, 3, "text", [1.0], {}, torch.zeros(2, 2).to_sparse()]),
)
faults = st.one_of(
    st.tuples(st.just("drop"), st.sampled_from(sorted(state)), st.none()),
    st.tuples(st.just("set"), st.one_of(st.sampled_from(sorted(state)), st.text(max_size=12)), unusual_values),
    st.tuples(st.just("nan"), st.sampled_from(sorted(state)), st.none()),
    st.tuples(st.just("rename"), st.sampled_from(sorted(state)), st.text(max_size=12)),
)


@fuzz(150)
@given(st.lists(faults, max_size=3), st.sampled_from(["", "state_dict", "model", "state_dict_ema"]), st.booleans())
def test_state_dicts(tmp_path, edits, key, prefixed):
    content = dict(state)
    for edit, name, value in edits:
        if edit == "set":
            content[name] = value
        elif name in content:
            old = content.pop(name)
            if edit == "nan":
                content[name] = state[name] * float("nan")
            elif edit == "rename":
                content[value] = old
    content = {f"model.{name}": value for name, value in content.items()} if prefixed else content
    torch.save({key: content} if key else content, tmp_path / "x.ckpt")
    attempt("state dicts", lambda: classification.load_weights(model, str(tmp_path / "x.ckpt"), "vit"))
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


# YAML


def key_paths(node, path=()):
    """The paths of all keys in nested dictionaries."""
    yield path
    for key, child in node.items() if isinstance(node, dict) else ():
        yield from key_paths(child, (*path, key))


COMPLETE = CONFIG | {"model": CLASSIFIER}
values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.integers(), st.floats(), st.text(max_size=6),
    st.lists(st.integers(-1, 3), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    st.sampled_from(["auto", "axial", "class_path", "mixed(base=0)", "../..", "1e400", "nan", "-1"]),
)  # fmt: skip
COSTLY = {"max_epochs", "limit_train_batches", "limit_val_batches"}  # a large value would train for long


@pytest.mark.filterwarnings("ignore")  # Lightning's, on unusual settings that work
@pytest.mark.slow
@fuzz(30, share=0.1)
@given(st.sampled_from([path for path in key_paths(COMPLETE) if path and path[-1] not in COSTLY]), values)
def test_yaml_values(tmp_path, path, value):
    config: dict = copy.deepcopy(COMPLETE)
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    args = ["--config", str(tmp_path / "x.yaml"), "--out", str(tmp_path / "r"), "--trainer.fast_dev_run", "2"]

    def fit():
        silence = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
        with silence[0], silence[1]:
            main(args)

    attempt("YAML values", fit)
