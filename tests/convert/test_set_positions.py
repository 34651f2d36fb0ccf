"""vit_rope.set_positions: another spec for a model with positions, with what these have learned."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from torch import nn

import vit_rope
from tests.helpers import images, randomised
from vit_rope.models.dit import RopeDiT
from vit_rope.models.vit import RopeViT

NAME = "vit_rope_test_patch16_64"


def vit(spec="mixed", **options):
    return randomised(timm.create_model(NAME, position=spec, num_classes=3, **options))


def test_a_vit_keeps_what_it_learned_and_is_saved_with_the_new_spec(tmp_path):
    net, x = vit(), images((64, 64))
    before, freqs = net(x), net.position.freqs
    assert vit_rope.set_positions(net, "ntk(mixed, factor=4)") is net
    assert torch.equal(net.position.freqs, freqs)
    after = net(x)
    assert (after - before).abs().max() > 1e-4
    save_for_hf(net, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.position.spec == "ntk(mixed, factor=4)"
    assert torch.equal(again(x), after)


def test_a_dit_changes_too():
    net = RopeDiT(8, 1, embed_dim=16, depth=1, num_heads=2, position="axial")
    assert vit_rope.set_positions(net, "yarn(axial, factor=2)") is net
    assert net.position.spec == net.config.position == "yarn(axial, factor=2)"


@pytest.mark.parametrize(
    ("options", "spec", "message"),
    [
        ({}, "axail", "did you mean axial"),
        ({}, "learned", "but the model's positions learned"),
        ({"spec": "axial", "attention": "linear"}, "alibi", "linear attention has no logits"),
        ({"spec": "axial"}, "axial + axial(share=(4, 4))", "pairs cannot be summed"),
        ({"spec": "axial"}, 'axial + axial(pairs="half")', "give both the same `pairs`"),
        ({"spec": "axial"}, "axial + vjepa2", "cannot be summed with rotations"),
        ({"spec": "string"}, "string + axial", "cannot be summed with rotations"),
    ],
)
def test_a_spec_that_does_not_fit_changes_nothing(options, spec, message):
    net = vit(**options)
    position = net.position
    with pytest.raises(ValueError, match=message):
        vit_rope.set_positions(net, spec)
    assert net.position is position


def test_a_model_without_positions_is_a_type_error():
    with pytest.raises(TypeError, match="Linear"):
        vit_rope.set_positions(nn.Linear(2, 2), "axial")


def test_a_model_without_positions_is_a_type_error_without_diffusers_too():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import vit_rope, timm, torch\n"
        "net = timm.create_model('vit_rope_test_patch16_64', position='axial')\n"
        "assert vit_rope.set_positions(net, 'xy(axial)').position.spec == 'xy(axial)'\n"
        "try: vit_rope.set_positions(torch.nn.Linear(2, 2), 'axial')\n"
        "except TypeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a diffusers U-Net with positions, got Linear" in done.stdout


def test_the_registered_names_choose_the_class_by_the_options():
    plain = timm.create_model(NAME, depth=1)
    assert type(plain) is RopeViT
    converted = timm.create_model(NAME, depth=1, num_kv_heads=1, norm_eps=1e-5)
    assert type(converted).__name__ == "ConvertedViT"
    assert isinstance(converted, RopeViT)
    with pytest.raises(TypeError, match="num_kv_heads"):
        RopeViT(64, depth=1, num_kv_heads=1)
    with pytest.raises(ValueError, match="linear attention has as many heads of keys as of queries"):
        timm.create_model(NAME, depth=1, num_kv_heads=1, attention="linear")
