"""Published weights load by name from files in the layouts of timm, of the authors and of this
library. No test needs a network."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import get_arch_pretrained_cfgs

from tests.helpers import difference, images, randomised, shrunken
from vit_rope.convert import from_timm, pretrained, ropeify

PARTS = ["vit_small_patch16_rope_mixed_ape_224", "eva02_base_patch14_448", "vit_small_plus_patch16_dinov3_qkvb"]


def small(name):
    """A small model of timm with random parameters, its options, and an image for it."""
    options = shrunken(name)
    return randomised(timm.create_model(name, **options)), options, images(options["img_size"])


def test_every_rotary_name_and_tag_of_timm_is_registered():
    assert len(pretrained.SOURCES) == 60
    for name, source in pretrained.SOURCES.items():
        theirs, mine = get_arch_pretrained_cfgs(source), get_arch_pretrained_cfgs(name)
        assert [key.partition(".")[2] for key in mine] == [key.partition(".")[2] for key in theirs]
        assert [cfg.hf_hub_id for cfg in mine.values()] == [cfg.hf_hub_id for cfg in theirs.values()]
    assert timm.is_model_pretrained("vit_rope_small_patch16_rope_mixed_224.naver_in1k")


def our_name(name):
    return f"vit_rope_{name.removeprefix('vit_')}"


def write(state, folder, size, **facts):
    """Options of create_model to load these weights of models trained at this size from a file."""
    path = folder / "weights.safetensors"
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "input_size": (3, *size)} | facts}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    "change", [{}, {"in_chans": 1, "num_classes": 0}, {"img_size": (48, 96)}, {"img_size": (48, 96), "patch_size": 8}]
)
def test_timms_files_load_as_timm_loads_them(name, change, tmp_path):
    theirs, options, _ = small(name)
    if change.get("img_size"):
        patch = change.get("patch_size", theirs.patch_embed.patch_size[0])
        change = change | {"img_size": (7 * patch, 5 * patch)}
    file = write(theirs.state_dict(), tmp_path, options["img_size"], num_classes=7)
    a, b = (timm.create_model(n, **options | change | file).eval() for n in (name, our_name(name)))
    x = images((options | change)["img_size"])[:, : change.get("in_chans", 3)]
    with torch.no_grad():
        assert difference(b(x), a(x)) < 1e-5


@pytest.mark.parametrize("name", PARTS)
def test_our_own_files_load_with_and_without_a_head(name, tmp_path):
    theirs, options, x = small(name)
    mine = from_timm(theirs)
    file = write(mine.state_dict(), tmp_path, options["img_size"], num_classes=7)
    again = timm.create_model(our_name(name), **options | file).eval()
    assert torch.equal(again(x), mine(x))
    headless = {key: value for key, value in mine.state_dict().items() if not key.startswith("head.")}
    file = write(headless, tmp_path, options["img_size"], num_classes=0)
    again = timm.create_model(our_name(name), **options | file | {"num_classes": 0}).eval()
    assert torch.equal(again(x), mine.forward_head(mine.forward_features(x), pre_logits=True))


def renamed(state, *pairs):
    out = {}
    for key, value in state.items():
        for pattern, name in pairs:
            key = re.sub(pattern, name, key)
        out[key] = value
    return out


def rope_vit_layout(state):
    """RoPE-ViT stores the frequencies of all heads in one row, and its tables of coordinates."""
    freqs = state.pop("rope.freqs")
    return {"model": state | {"freqs": freqs.flatten(-2), "freqs_t_x": torch.zeros(196), "freqs_t_y": torch.zeros(196)}}


def dinov3_layout(state):
    """DINOv3 has one bias for queries, keys and values, with a mask (zeros or NaN) for the keys."""
    for key in [key for key in state if key.endswith("q_bias")]:
        q, v = state.pop(key), state.pop(key.replace("q_bias", "v_bias"))
        state[key.replace("q_bias", "qkv.bias")] = torch.cat((q, torch.full_like(q, 7.0), v))
        state[key.replace("q_bias", "qkv.bias_mask")] = torch.full((3 * len(q),), torch.nan)
    state |= {"mask_token": torch.zeros(1, 256), "rope_embed.periods": (100 ** (torch.arange(16) / 16)).bfloat16()}
    names = [(r"gamma_(.)", r"ls\1.gamma"), ("reg_token", "storage_tokens")]
    return renamed(state, *names, ("fc1_g", "w1"), ("fc1_x", "w2"), ("mlp.fc2", "mlp.w3"))


def sapiens2_layout(state):
    names = [
        ("reg_token", "storage_tokens"),
        ("patch_embed.proj", "patch_embed.projection"),
        (r"attn.(.)_proj", r"attn.w\1"),
    ]
    names += [("gamma_1", "attn.gamma.weight"), (r"mlp.fc1", "ffn.w12"), (r"mlp.fc2", "ffn.w3")]
    return renamed(state, *names, (r"\.norm([12])\.", r".ln\1."), (r"^norm\.", "ln1."))


def eva02_layout(state):
    names = [
        ("fc1_g", "w1"),
        ("fc1_x", "w2"),
        ("mlp.fc2", "mlp.w3"),
        ("mlp.norm", "mlp.ffn_ln"),
        ("attn.norm", "attn.inner_attn_ln"),
    ]
    biases = [("q_proj.bias", "q_bias"), ("v_proj.bias", "v_bias")]
    return {f"visual.{key}": value for key, value in renamed(state, *names, *biases).items()}


def perception_encoder_layout(state):
    names = [("patch_embed.proj", "conv1"), (r"^blocks", "transformer.resblocks"), ("norm_pre", "ln_pre")]
    names += [(r"\.norm(\d)", r".ln_\1"), ("attn.qkv.", "attn.in_proj_"), ("attn.proj", "attn.out_proj")]
    names += [("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("gamma_", "ls_"), (r"(ls_.)$", r"\1.gamma")]
    state["positional_embedding"], state["class_embedding"] = state.pop("pos_embed")[0], state.pop("cls_token")[0, 0]
    return {f"visual.{key}": value for key, value in renamed(state, *names).items() if not key.startswith("head")}


@pytest.mark.parametrize(
    ("name", "publish"),
    [
        ("vit_small_patch16_rope_mixed_224", rope_vit_layout),
        ("vit_small_patch16_rope_mixed_ape_224", rope_vit_layout),
        ("vit_small_patch16_dinov3_qkvb", dinov3_layout),
        ("vit_small_plus_patch16_dinov3_qkvb", dinov3_layout),
        ("vit_base_patch16_sapiens2", sapiens2_layout),
        ("eva02_base_patch16_clip_224", eva02_layout),
        ("vit_pe_lang_large_patch14_448", perception_encoder_layout),
    ],
)
def test_files_of_the_authors_load(name, publish, tmp_path):
    theirs, options, x = small(name)
    if publish is perception_encoder_layout:
        theirs.reset_classifier(0)
        options["num_classes"] = 0
    torch.save(publish(theirs.state_dict()), tmp_path / "weights.pth")
    facts = {"num_classes": options["num_classes"], "input_size": (3, *options["img_size"])}
    overlay = facts | {"file": str(tmp_path / "weights.pth")}
    load = partial(timm.create_model, our_name(name), pretrained=True, pretrained_cfg_overlay=overlay, **options)
    if publish is dinov3_layout:
        with pytest.warns(UserWarning, match="periods are rounded to bfloat16"):
            mine = load()
    else:
        mine = load()
    with torch.no_grad():
        assert difference(mine.eval()(x), theirs(x)) < 1e-5


def test_files_that_timm_translates_for_its_vit(tmp_path):
    theirs = randomised(timm.create_model("vit_small_patch14_dinov2", img_size=56, depth=2, num_classes=0))
    state = dict(theirs.state_dict()) | {"mask_token": torch.zeros(1, 384)}
    options = {"img_size": 56, "depth": 2, "num_classes": 0, "position": "none", "source": "vit_small_patch14_dinov2"}
    mine = timm.create_model("vit_rope_from_timm", **options | write(state, tmp_path, (56, 56), num_classes=0))
    assert torch.equal(mine.eval()(images((56, 56))), theirs(images((56, 56))))
    clip = perception_encoder_layout(
        dict(randomised(timm.create_model("vit_base_patch32_clip_224", depth=1)).state_dict())
    )
    options = {"depth": 1, "num_classes": 0, "position": "none", "source": "vit_base_patch32_clip_224"}
    mine = timm.create_model("vit_rope_from_timm", **options | write(clip, tmp_path, (224, 224), num_classes=0))
    assert torch.equal(mine.blocks[0].mlp.fc1.weight, clip["visual.transformer.resblocks.0.mlp.c_fc.weight"])


def test_weights_of_no_known_layout(tmp_path):
    theirs, options, _ = small("vit_small_patch16_rope_224")
    state = {key: value for key, value in theirs.state_dict().items() if re.search("gamma|norm|rope", key)}
    file = write(state | {"encoder.layer.0.weight": torch.zeros(2)}, tmp_path, options["img_size"])
    with pytest.raises(ValueError, match=r"none of the known layouts: .*timm's Eva \(14 of 35 names\), DINOv3's own"):
        timm.create_model("vit_rope_small_patch16_rope_224", **options | file)


@pytest.mark.parametrize("source", ["deit3_small_patch16_224.fb_in22k_ft_in1k", "vit_so150m_patch16_reg4_gap_256"])
def test_any_model_of_timm_by_name(source, tmp_path):
    options = {"depth": 2, "embed_dim": 96, "num_heads": 3}
    theirs = randomised(timm.create_model(source, num_classes=7, img_size=(64, 96), **options))
    file = write(theirs.state_dict(), tmp_path, (64, 96), num_classes=7)
    x = images((64, 96))
    for ape in ("keep", "drop", "gate"):
        mine = timm.create_model(
            "vit_rope_from_timm", source=source, position="axial", ape=ape, img_size=(64, 96), **options | file
        )
        torch.testing.assert_close(mine.eval()(x), ropeify(theirs, "axial", ape)(x), rtol=1e-5, atol=1e-5)


def test_models_by_name_know_their_source():
    source = "deit3_small_patch16_224.fb_in22k_ft_in1k"
    assert timm.create_model("vit_rope_from_timm", source=source).pretrained_cfg["hf_hub_id"] == f"timm/{source}"
    rotary = timm.create_model("vit_rope_from_timm", source="vit_tiny_patch16_dinov3_qkvb", depth=1)
    assert type(rotary.position).__name__ == "DinoV3"
    with pytest.raises(TypeError, match="not ResNet"):
        timm.create_model("vit_rope_from_timm", source="resnet18")


def test_a_gate_fades_by_schedule():
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule

    from vit_rope.training import Fade

    class Net(LightningModule):
        def __init__(self, position):
            super().__init__()
            self.model = timm.create_model("vit_rope_test_patch16_64", position=position)

    net, fade, seen = Net("axial + gate(learned)"), Fade(0.2, 0.6), []
    gate = net.model.position.parts[1].gate
    trainer = SimpleNamespace(estimated_stepping_batches=11, global_step=0)
    fade.setup(trainer, net, "fit")
    assert not gate.requires_grad
    for trainer.global_step in range(11):
        fade.on_train_batch_start(trainer, net, None, 0)
        seen.append(float(gate))
    assert seen[:3] == [1.0] * 3
    assert seen[4] == pytest.approx(0.5)
    assert seen[6:] == [0.0] * 5
    with pytest.raises(ValueError, match="this model has none"):
        Fade().setup(trainer, Net("axial"), "fit")
    with pytest.raises(ValueError, match=r"got start 0\.5 and stop 0\.5"):
        Fade(0.5, 0.5)
