"""What several tests share: example specs and models, randomised parameters, tiny training runs."""

import contextlib
import inspect
import io
import json
from pathlib import Path

import timm
import torch

from vit_rope.positions import Layout, build, schemes, specs

ROOT = Path(__file__).parents[1]

# ---- position schemes -------------------------------------------------------------------------------------

MODIFIES = {"gate": "learned", "inject": "learned"}  # where axial will not do


def spec_of(name: str) -> str:
    """A registered name as a spec: what modifies another scheme gets one to modify."""
    parameters = list(inspect.signature(specs._SCHEMES[name]).parameters.values())[1:]
    parts = [MODIFIES.get(name, "axial") for parameter in parameters if parameter.default is parameter.empty]
    return f"{name}({', '.join(parts)})" if parts else name


GRIDS = {1: (7,), 2: (4, 5), 3: (2, 3, 4)}
SPECS = [*map(spec_of, schemes()), "learned + mixed", "axial + mixed", "sincos(axes=1) + flat"]
SPECS += ["dynamic(learned + mixed)", "xy(mixed)", "learned + string", "tupe + t5", "gate(floater)", "ntk(mixed)"]
SPECS += [  # options that are schemes of their own
    'axial(pairs="half", share="rest")',
    'axial(learned=True, share="rest")',
    'axial(pairs="axis")',
    'mixed(learned=False, pairs="half")',
    "valuerope(undo=False)",
    "orthogonal(determinant=1)",
    "liere(block=2)",
    "commuting(block=6)",
    'string(pairs="half")',
    "mrope(blocks=True, idle=1)",
    'dinov3(pairs="interleaved", periods="bfloat16")',
    "sincos(axes=1)",
    'fourier(bands="learned")',
    'hierarchical(tables="axes")',
    'peg(padding="circular")',
    'alibi(distance="manhattan")',
    'alibi(distance="quadratic")',
    "lookhere(fov=90)",
    "lookhere(fov=45)",
    "t5(buckets=8, max_distance=6)",
    'kerple(kind="power", distance="manhattan")',
    'fire(distance="manhattan")',
    "sandwich(flash=False)",
    "shaw(clip=2, values=True)",
    "deberta(clip=2)",
    'irpe(method="cross", on="qkv")',
    'irpe(method="euclidean", on="qk")',
]
EXCLUDED = {  # what the mathematics forbids
    ("xpos", 2): "a decay in all directions is no product of what queries and keys each multiply in",
    ("xpos", 3): "as on 2 axes",
    ("lookhere(fov=45)", 1): "along one axis there are two ways to look, not eight",
}
EVERY = [(spec, axes) for spec in SPECS for axes in GRIDS if (spec, axes) not in EXCLUDED]


def make(spec, axes, seed=0):
    torch.manual_seed(seed)
    layout = Layout(width=48, heads=2, grid=GRIDS[axes], depth=3)
    return build(spec, layout), layout


# ---- models -------------------------------------------------------------------------------------------------


def shrunken(name):
    """Options that make a model of this name small, all of its settings left: two layers, four heads at most."""
    published = timm.create_model(name, device="meta")
    attention = published.blocks[0].attn
    heads = min(4, attention.num_heads)
    patch = published.patch_embed.patch_size[0]
    options = {"depth": 2, "num_heads": heads, "embed_dim": heads * attention.head_dim, "num_classes": 7}
    if "sapiens2" in name:
        options["num_kv_heads"] = (heads, heads // 2)
    if "gigantic" in name:
        options["mlp_ratio"] = 2
    return options | {"img_size": (6 * patch, 9 * patch)}


def randomised(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if key == "rope.freqs":
                parameter.add_(noise, alpha=0.1)
            else:
                parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5))
                parameter.add_(1 if parameter.ndim == 1 and not key.endswith("bias") else 0)  # scales are about 1
    return model.eval()


def images(size, seed=1):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


# ---- training runs ------------------------------------------------------------------------------------------

CHANGING = ("time", "train/images_per_s", "train/memory_gb")  # of a machine, not of a run


CLASSIFIER = {
    "class_path": "Classification",
    "init_args": {
        "model": "vit_rope_tiny_patch16_224",
        "model_args": {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1, "position": "mixed + learned"}
        | {"proj_drop_rate": 0.1, "drop_path_rate": 0.1, "patch_drop_rate": 0.25},
        "mixup": 0.2,
        "optim": {"lr": 0.01},
        "schedule": {"warmup": 2},
    },
}


CONFIG = {
    "seed_everything": 3,
    "data": {"class_path": "Digits", "init_args": {"batch_size": 64, "augment": "strong"}},
    "trainer": {"max_epochs": 4, "limit_train_batches": 6, "limit_val_batches": 2, "accelerator": "cpu"}
    | {"log_every_n_steps": 2, "enable_progress_bar": False},
    "ema": {"decay": 0.9},
}


def run(*args: object) -> None:
    from vit_rope.cli.fit import train

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(["fit", *map(str, args)])


def last(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def numbers(folder: Path) -> dict:
    """What the metrics file says of each step; of what it says twice, the later."""
    found: dict = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        place = (row["stage"], row["step"], row["epoch"])
        found.setdefault(place, {}).update({key: value for key, value in row.items() if key not in CHANGING})
    return found


def assert_same(one: Path, other: Path) -> None:
    first, second = last(one), last(other)
    for key in ("epoch", "global_step", "state_dict", "weights_in_training", "optimizer_states", "lr_schedulers"):
        equal(first[key], second[key], key)
    equal(first["loops"]["fit_loop"]["epoch_progress"], second["loops"]["fit_loop"]["epoch_progress"], "progress")
    scores = [
        {name: state.get("best_model_score") for name, state in checkpoint["callbacks"].items()}
        for checkpoint in (first, second)
    ]
    equal(*scores, "scores")
    assert numbers(one) == numbers(other)


def equal(one, other, where: str) -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            equal(*pair, f"{where}.{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


# ---- denoisers ----------------------------------------------------------------------------------------------

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "position": "sincos + axial(base=100)"}


def shaken(model):
    """The model with none of its weights zero, so that every part of it matters."""
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False)


def transformer(size=8, classes=0, **options):
    from vit_rope.models.dit import RopeDiT
    from vit_rope.sampling import Denoiser
    from vit_rope.training.diffusion import make_noise

    torch.manual_seed(0)
    labels = classes + 1 if classes else None
    model = RopeDiT(sample_size=size, in_channels=1, num_class_embeds=labels, **TINY | options)
    return Denoiser(shaken(model), make_noise(1000, "squaredcos_cap_v2", "v_prediction"), classes, classes or None)


def convolutions(size=16, channels=3):
    from vit_rope.sampling import Denoiser
    from vit_rope.training.diffusion import make_noise
    from vit_rope.unet import RopeUNet2DModel

    torch.manual_seed(0)
    model = RopeUNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8, position="axial",
    )  # fmt: skip
    return Denoiser(shaken(model), make_noise(1000, "squaredcos_cap_v2", "epsilon"))
