"""timm's encoders of language models convert to a RopeViT with the same function, or the error
names the reason."""

import re

import pytest
import timm
import torch
from timm.models._hub import save_for_hf

from tests.helpers import difference, images, randomised
from vit_rope.convert import from_timm

NAMES = [name for module in ("qwen3_vit", "deepseek_vit", "gemma4_vit") for name in timm.list_models(module=module)]
SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 3}
REFUSED = {
    "_merge": "a projector that merges patches (Qwen3VitPatchMerger); create the model with encoder_pool=''",
    "_align": "a projector that merges patches (DeepseekVitAligner); create the model with encoder_pool=''",
    "qwen3_vit_enc": "a projector that merges patches (Qwen3VitPatchMerger); create the model with global_pool='avg'",
    "deepseek_vit_enc": "a projector that merges patches (DeepseekVitAligner); create the model with global_pool='avg'",
    "gemma4_vit": "blocks of type Gemma4Block, which normalize values and the outputs of attention and MLP; for its "
    'rotations create a model with position="xy(axial(base=100, pairs=\\"axis\\"))"',
}


def small(name, **options):
    """A small model with the other settings of this name, on a grid of 6 x 9 patches."""
    patch = 14 if "deepseek" in name else 16
    shrink = SMALL if "gemma" not in name else SMALL | {"head_dim": 32}
    size = {} if "gemma" in name else {"img_size": (6 * patch, 9 * patch)}
    if "enc" not in name:
        options = {"num_classes": 7} | options
    if name.endswith(("_enc", "_merge", "_align")) and "gemma" not in name:
        options = {"out_features": 64} | options
    model = timm.create_model(name, **shrink, **size, **options)
    return randomised(model), images((6 * patch, 9 * patch))


def kind(name):
    """The key of REFUSED for a name, or None."""
    if name.endswith("_enc") and "gemma" not in name:
        return re.sub(r"_vit_\d+m", "_vit", name)
    return next((key for key in REFUSED if name.endswith(key) or name.startswith(key)), None)


def same(theirs, x, folder):
    ours = from_timm(theirs)
    with torch.no_grad():
        want, got = theirs(x), ours(x)
        assert got.shape == want.shape
        assert difference(got, want) < 1e-5
    save_for_hf(ours, folder, safe_serialization=True)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(x), got)
        theirs.get_submodule("encoder" if hasattr(theirs, "encoder") else "").rope.bands.mul_(0)
        assert difference(theirs(x), want) > 1e-3  # the test would notice wrong positions


def test_there_are_sixteen_names():
    assert len(NAMES) == 16


@pytest.mark.parametrize("name", NAMES)
def test_each_name_converts_or_is_refused(name, tmp_path):
    theirs, x = small(name)
    refused = kind(name)
    if refused is None:
        same(theirs, x, tmp_path)
        return
    with pytest.raises(ValueError, match=re.escape(f"RopeViT does not support {REFUSED[refused]}")):
        from_timm(theirs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3_vit_88m_enc", {"global_pool": "avg"}),
        ("deepseek_vit_412m_enc", {"global_pool": "avg"}),
        ("qwen3_vit_88m_merge", {"encoder_pool": ""}),
        ("deepseek_vit_412m_align", {"encoder_pool": "", "final_norm": False}),
        ("qwen3_vit_88m", {"final_norm": False, "global_pool": "", "pos_embed_grid_size": 5}),
        ("qwen3_vit_88m", {"rope_temperature": 100.0, "drop_rate": 0.5, "drop_path_rate": 0.1}),
    ],
)
def test_encoders_without_a_projector_convert(name, options, tmp_path):
    theirs, x = small(name, **options)
    same(theirs, x, tmp_path)


@pytest.mark.parametrize("name", ["qwen3_vit_88m", "deepseek_vit_412m"])
def test_files_load_by_name(name, tmp_path):
    """The file of a classifier, and of an encoder with its published projector."""
    theirs, x = small(name)
    torch.save(theirs.state_dict(), tmp_path / "classifier.pth")
    make = {"source": name, "img_size": x.shape[2:], "pretrained": True, "num_classes": 7, **SMALL}
    overlay = {"file": str(tmp_path / "classifier.pth"), "num_classes": 7}
    ours = timm.create_model("vit_rope_from_timm", **make, pretrained_cfg_overlay=overlay).eval()
    with torch.no_grad():
        assert difference(ours(x), theirs(x)) < 1e-5
    bare, _ = small(f"{name}_enc")
    torch.save(bare.state_dict(), tmp_path / "encoder.pth")
    overlay = {"file": str(tmp_path / "encoder.pth"), "num_classes": 0}
    ours = timm.create_model("vit_rope_from_timm", **make, pretrained_cfg_overlay=overlay).eval()
    with torch.no_grad():
        assert difference(ours.forward_features(x), bare.forward_features(x).flatten(1, 2)) < 1e-5


def test_an_invalid_final_norm():
    with pytest.raises(ValueError, match="final_norm is True, False or 'both', got 'twice'"):
        timm.create_model("vit_rope_test_patch16_64", final_norm="twice")
