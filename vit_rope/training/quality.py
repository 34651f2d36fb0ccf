"""How good samples are, without the network: `vit-rope quality runs/fashion_ddpm --judge runs/fashion_vit`.

The Fréchet distance (arXiv:1706.08500) between Gaussians fitted to features of real and of drawn images. The features
are those of a classifier that this library trained on the same data, so values compare only under the same judge, and
only at the same number of images: fewer seem farther. Real images of the test split, as many, give the floor. With
`--judge inception` the features are those of papers' FID, for who has the weights of that network as a file.
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
    """A classifier of ours as a source of features, from the folder of a run of `Classification` or its exported/."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        folder = Path(folder, "exported") if Path(folder, "exported").is_dir() else Path(folder)
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(f"{folder} has no model.safetensors; --judge wants a finished run of a classifier")
        self.model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().requires_grad_(False)
        self.num_features = self.model.num_features

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, F) of images (B, C, H, W) in [-1, 1]."""
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)

    def classes(self, images: Tensor) -> Tensor:
        """The classes (B,) that it sees in images (B, C, H, W) in [-1, 1]."""
        return torch.cat([self.model(part).argmax(dim=1) for part in images.split(256)])


class Inception(nn.Module):
    """The network of papers' FID, 2048 features of RGB images at 299x299, from torch-fidelity's file of its weights.

    Nothing is downloaded, and no code in the file is run. Raises FileNotFoundError or ValueError for another file, and
    ValueError where torch-fidelity is not installed.
    """

    num_features = 2048

    def __init__(self, weights: str | Path | None) -> None:
        super().__init__()
        if weights is None:
            raise ValueError(f"--judge inception wants --weights, your copy of {WEIGHTS}; nothing is downloaded")
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ValueError("--judge inception needs the network of torch-fidelity: pip install torch-fidelity")
        if not Path(weights).is_file():
            raise FileNotFoundError(f"{weights} is no file; --weights wants your copy of {WEIGHTS}")
        try:  # for torch-fidelity would run what code is in it
            tensors = torch.load(weights, map_location="meta", weights_only=True)
        except Exception as error:
            raise ValueError(f"{weights} does not hold weights alone; --weights wants {WEIGHTS}") from error
        if "fc.weight" not in tensors or tensors["fc.weight"].shape != (1008, 2048):
            raise ValueError(f"{weights} has the weights of another network; --weights wants {WEIGHTS}")
        options = {"feature_extractor_weights_path": str(weights), "antialias": False}  # as papers' code resizes
        self.model = NoTrainInceptionV3("inception-v3-compat", ["2048"], **options)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of images (B, C, H, W) in [-1, 1], grey ones taken for RGB."""
        return self.model(sampling.to_bytes(images).expand(-1, 3, -1, -1))


def frechet_distance(judge: nn.Module, real: Iterator[Tensor], *sets: Tensor) -> list[float]:
    """The distance of each set of images (n, C, H, W) in [-1, 1] from the real ones, which come batch by batch."""
    metric = FrechetInceptionDistance(judge, reset_real_features=False).eval()
    for images in real:
        metric.update(_in_steps(images), real=True)
    distances = []
    for images in sets:
        metric.reset()
        for part in images.split(256):
            metric.update(_in_steps(part), real=False)
        distances.append(float(metric.compute()))
    return distances


def _in_steps(images: Tensor) -> Tensor:
    """Images in [-1, 1] as they are once written to a file, so that none is told apart by finer shades."""
    return sampling.to_bytes(images).float() / 127.5 - 1


def copy_error(images: Tensor) -> float:
    """Mean absolute difference between the left and the right half of images (B, C, H, W)."""
    left, right = images.chunk(2, dim=3)
    return float((left - right).abs().mean())


def connected_parts(images: Tensor, threshold: float = -0.5) -> float:
    """Into how many parts what is brighter than the threshold falls, on average over grey images (B, 1, H, W)."""
    inside = images > threshold
    height, width = images.shape[2:]
    number = torch.arange(1.0, height * width + 1).view(1, 1, height, width)
    labels = torch.where(inside, number, 0.0)
    while True:  # each pixel takes the highest number around it until all of a part have the same
        spread = torch.where(inside, nn.functional.max_pool2d(labels, 3, 1, 1), 0.0)
        if torch.equal(spread, labels):
            break
        labels = spread
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
    """Scores of n samples of a run: `fd`, `fd_floor` of n real test images, and what the images allow beside.

    `judge` is the run of a classifier, or "inception", whose `weights` are a file. At most `reference` training images
    are what distances are measured from; `root` says where the data are now. A model with classes draws them in turn,
    and `asked` is the share in which a classifier sees the class that was asked for. Images twice as wide as high are
    pairs: the judge sees the left one, and there is a `copy_error`; grey ones fall into `parts`. These come with the
    value of real images, `…_real`.
    Raises ValueError or FileNotFoundError for what is no run of `Diffusion` with a configuration inside.
    """
    if n < 2:
        raise ValueError(f"a distance between distributions needs at least 2 samples, got n = {n}")
    if weights is not None and judge != "inception":
        raise ValueError("--weights are those of --judge inception; a run of a classifier has its own")
    jury = Inception(weights) if judge == "inception" else Judge(judge)
    denoiser = sampling.load(run)
    data = load_data(run, root)
    labels = list(range(denoiser.classes)) or None
    test = torch.cat(list(_images(data.test_dataloader(), n)))
    if floor and len(test) < n:
        raise ValueError(
            f"the floor needs as many test images as samples, but there are only {len(test)}; "
            f"lower n, or leave the floor out (--no-floor)"
        )
    drawn = sampling.sample(denoiser, n, steps, scheduler, None, labels, guidance, seed)
    train, further = _images(data.train_dataloader(), reference), dict[str, float]()
    if drawn.shape[3] == 2 * drawn.shape[2]:
        further = {"copy_error": copy_error(drawn), "copy_error_real": copy_error(test)}
        train = (images.chunk(2, dim=3)[0] for images in train)
        drawn, test = (images.chunk(2, dim=3)[0] for images in (drawn, test))
    if labels and isinstance(jury, Judge):
        asked = torch.tensor([labels[i % len(labels)] for i in range(n)])
        further["asked"] = float((jury.classes(drawn) == asked).float().mean())
    if drawn.shape[1] == 1:
        further |= {"parts": connected_parts(drawn), "parts_real": connected_parts(test)}
    distances = frechet_distance(jury, train, drawn, *([test] if floor else []))
    return {"n": n} | dict(zip(("fd", "fd_floor"), distances, strict=False)) | further


def load_data(run: str | Path, root: str | None = None) -> Any:
    """The data module that a run was trained on, without its augmentation."""
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
    left = count
    for images, _ in islice(loader, count):
        yield images[:left]
        left -= len(images)
        if left <= 0:
            break
