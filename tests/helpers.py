"""Shared by several tests: example specs and models, random parameters, tiny training runs.

Shapes   B images, C channels, H x W pixels
"""

import contextlib
import inspect
import io
import json
from pathlib import Path

import timm
import torch

from vit_rope.positions import Layout, build, schemes, specs

ROOT = Path(__file__).parents[1]

# ---- position schemes ----------------------------------------------------------------------------

MODIFIES = {"gate": "learned", "inject": "learned"}  # the argument of schemes that cannot wrap axial


def spec_of(name: str) -> str:
    """A spec for a registered name; a scheme that modifies another gets axial or learned."""
    parameters = list(inspect.signature(specs._SCHEMES[name]).parameters.values())[1:]
    parts = [MODIFIES.get(name, "axial") for parameter in parameters if parameter.default is parameter.empty]
    return f"{name}({', '.join(parts)})" if parts else name


GRIDS = {1: (7,), 2: (4, 5), 3: (2, 3, 4)}
SPECS = [*map(spec_of, schemes()), "learned + mixed", "axial + mixed", "sincos(axes=1) + flat"]
SPECS += ["dynamic(learned + mixed)", "xy(mixed)", "learned + string", "tupe + t5", "gate(floater)", "ntk(mixed)"]
SPECS += [  # options that make a different scheme
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
EXCLUDED = {  # impossible combinations, and why
    ("xpos", 2): "a decay in all directions is not a product of a factor of queries and a factor of keys",
    ("xpos", 3): "see 2 axes",
    ("lookhere(fov=45)", 1): "one axis has two directions, not eight",
}
EVERY = [(spec, axes) for spec in SPECS for axes in GRIDS if (spec, axes) not in EXCLUDED]


def make(spec, axes, seed=0):
    """A position scheme on a small grid with this many axes, and its layout."""
    torch.manual_seed(seed)
    layout = Layout(width=48, heads=2, grid=GRIDS[axes], depth=3)
    return build(spec, layout), layout


# ---- models --------------------------------------------------------------------------------------


def shrunken(name):
    """Options that make a timm model small, with 2 layers and at most 4 heads."""
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
    """The model with random parameters of sensible size, so that all matter; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if key == "rope.freqs":
                parameter.add_(noise, alpha=0.1)
            else:
                parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5))
                parameter.add_(
                    1 if parameter.ndim == 1 and not key.endswith("bias") else 0
                )  # scales of norms and layers are near 1
    return model.eval()


def images(size, seed=1):
    """Two random images (2, 3, H, W) of a size (H, W)."""
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def difference(ours, theirs):
    """The largest difference, relative to the largest value of `theirs`."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


# ---- training runs -------------------------------------------------------------------------------

CHANGING = ("time", "train/images_per_s", "train/memory_gb")  # differ between equal runs

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
    """Run `fit` with these arguments, in this process and without output."""
    from vit_rope.cli.fit import train  # loads Lightning, which most tests do not need

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(["fit", *map(str, args)])


def last_checkpoint(folder: Path) -> dict:
    """The content of a run's last.ckpt."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def metrics_by_step(folder: Path) -> dict:
    """The metrics of a run by (stage, step, epoch); if one was logged twice, the later value."""
    metrics: dict = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = (row["stage"], row["step"], row["epoch"])
        metrics.setdefault(step, {}).update({key: value for key, value in row.items() if key not in CHANGING})
    return metrics


def assert_same(run: Path, other: Path) -> None:
    """Two runs have bit-identical weights, optimizers, progress, scores and metrics."""
    first, second = last_checkpoint(run), last_checkpoint(other)
    for key in ("epoch", "global_step", "state_dict", "weights_in_training", "optimizer_states", "lr_schedulers"):
        assert_equal(first[key], second[key], key)
    assert_equal(
        first["loops"]["fit_loop"]["epoch_progress"], second["loops"]["fit_loop"]["epoch_progress"], "progress"
    )
    scores = [
        {name: state.get("best_model_score") for name, state in checkpoint["callbacks"].items()}
        for checkpoint in (first, second)
    ]
    assert_equal(*scores, "scores")
    assert metrics_by_step(run) == metrics_by_step(other)


def assert_equal(first, second, path: str) -> None:
    """Two nested structures have equal types and bit-identical values; `path` is for messages."""
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{path}.{number}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    else:
        assert first == second, path


# ---- denoisers -----------------------------------------------------------------------------------

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "position": "sincos + axial(base=100)"}


def perturbed(model):
    """The model with noise added to its weights, so that none is zero; in eval mode."""
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False)


def dit_denoiser(size=8, classes=0, **options):
    """A tiny RopeDiT as a Denoiser of (B, 1, size, size), conditional if there are classes."""
    from vit_rope.models.dit import RopeDiT
    from vit_rope.sampling import Denoiser
    from vit_rope.training.objective import make_noise

    torch.manual_seed(0)
    labels = classes + 1 if classes else None
    model = RopeDiT(sample_size=size, in_channels=1, num_class_embeds=labels, **TINY | options)
    return Denoiser(perturbed(model), make_noise(1000, "squaredcos_cap_v2", "v_prediction"), classes, classes or None)


def unet_denoiser(size=16, channels=3):
    """A tiny RopeUNet2DModel as a Denoiser of (B, channels, size, size)."""
    from vit_rope.sampling import Denoiser
    from vit_rope.training.objective import make_noise
    from vit_rope.unet import RopeUNet2DModel

    torch.manual_seed(0)
    model = RopeUNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8, position="axial",
    )  # fmt: skip
    return Denoiser(perturbed(model), make_noise(1000, "squaredcos_cap_v2", "epsilon"))
