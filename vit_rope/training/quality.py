"""Scores of generated images, without downloads.

    vit-rope quality runs/fashion_ddpm --judge runs/fashion_vit

The main score is the Fréchet distance (arXiv:1706.08500) between Gaussians that are fitted to
features of real images and of samples. The features are those of a classifier that this library
trained on the same data. So values are comparable only with the same judge and the same number of
images: fewer images give a larger distance. The distance of as many real images of the test split
is the floor. With `--judge inception` the features are those of the FID of papers, for users who
have a file with the weights of that network.

torchmetrics computes the distance.

Shapes   B images (n in a set), C channels, (H, W) height and width, F features of an image
"""

import importlib.util
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from .. import files, sampling
from .run import trust

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release v0.2.0"


class Judge(nn.Module):
    """Features of a classifier that this library trained.

    `folder` is the folder of a run of `Classification`, or the exported/ folder in it. Raises
    FileNotFoundError for a folder without an exported model.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        folder = files.expand_home(folder)
        folder = Path(folder, "exported") if Path(folder, "exported").is_dir() else Path(folder)
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(f"{folder} has no model.safetensors; --judge needs a finished run of a classifier")
        self.model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().requires_grad_(False)
        self.num_features = self.model.num_features

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, F) of images (B, C, H, W) in [-1, 1]."""
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)

    def classes(self, images: Tensor) -> Tensor:
        """Predicted classes (B,) of images (B, C, H, W) in [-1, 1]."""
        return torch.cat([self.model(part).argmax(dim=1) for part in images.split(256)])


class Inception(nn.Module):
    """The network of papers' FID: F = 2048 features of RGB images at 299x299.

    `weights` is torch-fidelity's file of the weights. Nothing is downloaded, and no code in the
    file is run. Raises FileNotFoundError or ValueError for a missing or different file, and
    ValueError if torch-fidelity is not installed.
    """

    num_features = 2048

    def __init__(self, weights: str | Path | None) -> None:
        super().__init__()
        if weights is None:
            raise ValueError(f"--judge inception needs --weights, your copy of {WEIGHTS}; nothing is downloaded")
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ValueError("--judge inception needs the network of torch-fidelity: pip install torch-fidelity")
        weights = files.expand_home(weights)
        if not Path(weights).is_file():
            raise FileNotFoundError(f"{weights} is not a file; --weights needs your copy of {WEIGHTS}")
        try:  # torch-fidelity would run code in the file
            tensors = torch.load(weights, map_location="meta", weights_only=True)
        except Exception as error:
            raise ValueError(f"{weights} holds more than weights; --weights needs {WEIGHTS}") from error
        if "fc.weight" not in tensors or tensors["fc.weight"].shape != (1008, 2048):
            raise ValueError(f"{weights} has the weights of a different network; --weights needs {WEIGHTS}")
        options = {"feature_extractor_weights_path": str(weights), "antialias": False}  # resizes as papers do
        self.model = NoTrainInceptionV3("inception-v3-compat", ["2048"], **options)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, F) of images (B, C, H, W) in [-1, 1]; grey ones (C = 1) become RGB."""
        return self.model(sampling.to_bytes(images).expand(-1, 3, -1, -1))


def frechet_distance(judge: nn.Module, real: Iterator[Tensor], *sets: Tensor) -> list[float]:
    """Fréchet distance of each set of images (n, C, H, W) from the real images, all in [-1, 1].

    `real` yields batches (B, C, H, W).
    """
    metric = FrechetInceptionDistance(judge, reset_real_features=False).eval()
    for images in real:
        metric.update(_quantized(images), real=True)
    distances = []
    for images in sets:
        metric.reset()
        for part in images.split(256):
            metric.update(_quantized(part), real=False)
        distances.append(float(metric.compute()))
    return distances


def _quantized(images: Tensor) -> Tensor:
    """Images in [-1, 1] in the 256 steps of a file: finer steps must not distinguish samples."""
    return sampling.to_bytes(images).float() / 127.5 - 1


def copy_error(images: Tensor) -> float:
    """Mean absolute difference between the left and the right half of images (B, C, H, W)."""
    left, right = images.chunk(2, dim=3)
    return float((left - right).abs().mean())


def connected_parts(images: Tensor, threshold: float = -0.5) -> float:
    """Mean number of connected parts above the threshold in grey images (B, 1, H, W).

    Pixels are connected to their 8 neighbors. By hand because `scipy.ndimage.label` would be the
    only use of SciPy here.
    """
    inside = images > threshold
    height, width = images.shape[2:]
    number = torch.arange(1.0, height * width + 1).view(1, 1, height, width)
    labels = torch.where(inside, number, 0.0)
    while True:  # each pixel takes the highest label of its neighbors until a part has one label
        grown = torch.where(inside, nn.functional.max_pool2d(labels, 3, 1, 1), 0.0)
        if torch.equal(grown, labels):
            break
        labels = grown
    return float(torch.tensor([len(image.unique()) - (not bool(image.all())) for image in labels]).float().mean())


def scores(
    run: str | Path,
    judge: str | Path,
    n: int = 1000,
    steps: int = 50,
    scheduler: str = "ddim",
    guidance: float = 1.0,
    seed: int = 0,
    root: str | None = None,
    reference: int = 20_000,
    weights: str | Path | None = None,
    floor: bool = True,
) -> dict[str, float]:
    """Scores of n samples of a run.

    `fd` is the Fréchet distance of the samples from training images, and `fd_floor` that of n test
    images. A model with classes samples them in turn; `asked` is the fraction of samples in which
    the judge, if it is a classifier, sees the requested class. Images twice as wide as high are
    pairs: the judge sees the left one, and `copy_error` is added. For grey images, `parts` is
    added. The two come with the value of test images, `copy_error_real` and `parts_real`.

    Raises ValueError or FileNotFoundError if `run` is not a run of `Diffusion`.

    Args:
        run: a run of `Diffusion`: its folder, or one of its checkpoints
        judge: the run of a classifier on the same data, or "inception"
        n: number of samples, and of test images for the floor
        steps: sampling steps
        scheduler: name of the sampler
        guidance: classifier-free guidance scale; 1 is none
        seed: seed of the first image; each next image adds 1
        root: folder of the data, if it has moved since training
        reference: highest number of training images to measure the distance from
        weights: file of the weights of the judge "inception"
        floor: score test images too
    """
    if n < 2:
        raise ValueError(f"a distance between distributions needs at least 2 samples, got n = {n}")
    if weights is not None and judge != "inception":
        raise ValueError("--weights is for --judge inception only; a run of a classifier has its own")
    network = Inception(weights) if judge == "inception" else Judge(judge)
    denoiser = sampling.load(run)
    data = load_data(run, root)
    labels = list(range(denoiser.classes)) or None
    real = torch.cat(list(_images(data.test_dataloader(), n)))
    if floor and len(real) < n:
        raise ValueError(
            f"the floor needs as many test images as samples, but there are only {len(real)}; "
            f"lower n, or leave the floor out (--no-floor)"
        )
    samples = sampling.sample(denoiser, n, steps, scheduler, labels=labels, guidance=guidance, seed=seed)
    extra = _image_scores(samples, real)
    samples, real = _left(samples), _left(real)
    if labels and isinstance(network, Judge):
        requested = torch.tensor([labels[i % len(labels)] for i in range(n)])
        extra = {"asked": float((network.classes(samples) == requested).float().mean())} | extra
    train = map(_left, _images(data.train_dataloader(), reference))
    distances = frechet_distance(network, train, samples, *([real] if floor else []))
    return {"n": n} | dict(zip(("fd", "fd_floor"), distances, strict=False)) | extra


def _image_scores(samples: Tensor, real: Tensor) -> dict[str, float]:
    """`copy_error` of pairs, and `parts` of grey images, both of shape (n, C, H, W)."""
    scores: dict[str, float] = {}
    if samples.shape[3] == 2 * samples.shape[2]:
        scores |= {"copy_error": copy_error(samples), "copy_error_real": copy_error(real)}
    if samples.shape[1] == 1:
        scores |= {"parts": connected_parts(_left(samples)), "parts_real": connected_parts(_left(real))}
    return scores


def _left(images: Tensor) -> Tensor:
    """The left images (B, C, H, H) of pairs (B, C, H, 2H); other images as they are."""
    return images.chunk(2, dim=3)[0] if images.shape[3] == 2 * images.shape[2] else images


def load_data(run: str | Path, root: str | None = None) -> Any:
    """The data module of a run, without augmentation; `root` is the folder of moved data."""
    path = files.find(str(run), "", "best")
    config = yaml.safe_load(trust.embedded_config(files.read(path), path, []))["data"]
    module, _, name = config["class_path"].rpartition(".")
    options = config.get("init_args", {}) | {"augment": "none", "transforms": None, "workers": 0}
    if root is not None:
        options["root"] = root
    data = getattr(importlib.import_module(module), name)(**options)
    data.setup("fit")
    return data


def _images(loader: Any, count: int) -> Iterator[Tensor]:
    """Batches of the first `count` images of a loader."""
    remaining = count
    for images, _ in islice(loader, count):
        yield images[:remaining]
        remaining -= len(images)
        if remaining <= 0:
            break
