"""Data: fixed disjoint splits, an order from (seed, epoch) only, readers with clear errors."""

import gzip
import importlib.util
import io
import math
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from vit_rope.training.data import timm as timm_data
from vit_rope.training.data.augment import Augment
from vit_rope.training.data.files import MAX_PIXELS, read_image
from vit_rope.training.data.folder import ImageFolder
from vit_rope.training.data.in_memory import CIFAR, Digits, FashionMNIST, Images, find_idx, hold_out, read_idx
from vit_rope.training.data.loader import WORKERS, ResumableSampler, end_workers
from vit_rope.training.data.timm import TimmData

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def batches(loader) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


# Splits


def test_digits_split_is_fixed_stratified_and_disjoint():
    data = Digits()
    data.setup()
    sizes = {name: len(labels) for name, (_, labels) in data.splits.items()}
    assert sizes == {"train": 1287, "val": 252, "test": 258}
    seen = [image.numpy().tobytes() for images, _ in data.splits.values() for image in images]
    assert len(seen) == 1797
    assert len(set(seen)) == 1797  # no image twice, so none in two splits
    for images, labels in data.splits.values():
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (1, 8, 8)
        assert (images.min(), images.max()) == (0, 255)
        share = labels.bincount(minlength=10) / len(labels)
        assert ((share > 0.09) & (share < 0.11)).all()


def test_evaluation_yields_every_image_once_and_unchanged():
    data = Digits(batch_size=50, augment="strong")
    data.setup()
    for name, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        images, labels = batches(loader)
        assert torch.equal(labels, data.splits[name][1])
        assert torch.equal(images, data.splits[name][0].float() / 127.5 - 1)


def test_training_batches_are_full_shuffled_and_in_range():
    data = Digits(batch_size=100, augment="strong")
    data.setup()
    images, labels = batches(data.train_dataloader())
    assert images.shape == (1200, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.min() >= -1
    assert images.max() <= 1
    assert not torch.equal(labels[:100], data.splits["train"][1][:100])


def test_single_image_equals_the_same_image_of_a_batch():
    images = Images((torch.arange(12, dtype=torch.uint8).view(3, 1, 2, 2), torch.tensor([5, 6, 7])))
    image, label = images[1]
    assert torch.equal(image, images.__getitems__([2, 1])[0][1])
    assert label == 6


def test_hold_out():
    parts = hold_out((torch.arange(100), torch.arange(100)), 5000)
    assert parts["train"][0].tolist() == list(range(90))
    assert parts["val"][0].tolist() == list(range(90, 100))


# Order


def test_order_depends_on_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[int]:
        torch.manual_seed(seed)
        sampler = ResumableSampler(20, shuffle=True)
        torch.rand(7)  # other random numbers do not matter
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert sorted(order(0, 3)) == list(range(20))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_epoch(world):
    shares = [list(ResumableSampler(20, True, rank, world)) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-20 // world)}
    assert set().union(*shares) == set(range(20))
    shares = [list(ResumableSampler(20, False, rank, world)) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(20))
    assert [len(ResumableSampler(20, False, rank, world)) for rank in range(world)] == [len(share) for share in shares]


def test_repeats_keep_the_length():
    order = list(ResumableSampler(20, True, repeats=3))
    assert len(order) == 20
    assert order[:3] == [order[0]] * 3
    assert len(set(order)) == 7


# Augmentation


def test_no_augmentation_is_the_identity():
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    assert torch.equal(Augment()(images), images)


def test_shifts_are_full_pixels_and_new_areas_are_black():
    images = torch.full((64, 1, 8, 8), -1.0)
    images[:, :, 4, 4] = 1.0
    moved = Augment(shift=0.25)(images)
    torch.testing.assert_close(moved.sort(dim=-1).values.sum(), images.sum())
    bright = (moved > 0.99).flatten(1)
    assert (bright.sum(dim=1) == 1).all()
    cells = bright.int().argmax(dim=1)
    assert len(cells.unique()) > 10  # each image has its own shift
    assert ((cells // 8 - 4).abs() <= 2).all()
    assert ((cells % 8 - 4).abs() <= 2).all()


def test_flips_are_exact_and_independent():
    images = torch.rand(64, 3, 6, 10) * 2 - 1
    flipped = Augment(flip=True)(images)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(flipped, images, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(flipped, images, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 10 < sum(same) < 54


def test_rotation_preserves_lines_on_images_that_are_not_square():
    images = torch.full((1, 1, 21, 41), -1.0)
    images[:, :, 10, :] = 1.0  # a horizontal line through the middle
    torch.manual_seed(0)
    rotated = Augment(rotate=90.0)(images)
    rows, columns = (rotated[0, 0] > 0).nonzero().float().T
    lengths = torch.linalg.svdvals(torch.stack((rows - rows.mean(), columns - columns.mean())))
    assert lengths[1] < 0.15 * lengths[0]  # still a line, in some direction
    assert rows.max() > 11


def test_holes_are_small_and_only_in_some_images():
    images = torch.full((200, 1, 12, 12), -3.0)
    hole = (Augment(erase=0.5)(images) != -3.0).flatten(1).float().mean(dim=1)
    assert hole.max() <= (5 / 12) ** 2
    assert 0.25 < (hole > 0).float().mean() < 0.75


def test_user_transforms_get_single_uint8_images():
    seen = []

    class Spy(v2.Transform):
        def forward(self, image):
            seen.append((image.shape, image.dtype))
            return image

    data = Digits(batch_size=10, augment="none", transforms=[Spy(), v2.RandomInvert(p=1.0)])
    data.setup()
    images, _ = next(iter(data.train_dataloader()))
    assert seen == [((1, 8, 8), torch.uint8)] * 10
    assert images.mean() > 0  # inverted digits are bright


# Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path):
    def make(folder: str = ".", zipped: bool = True, train: int = 40, labels: int = 40) -> Path:
        generator = np.random.default_rng(0)
        target = tmp_path / folder
        target.mkdir(parents=True, exist_ok=True)
        for part, images, names in (("train", train, labels), ("t10k", 10, 10)):
            arrays = {
                f"{part}-images-idx3-ubyte": generator.integers(0, 256, (images, 28, 28), dtype=np.uint8),
                f"{part}-labels-idx1-ubyte": (np.arange(names) % 10).astype(np.uint8),
            }
            for name, array in arrays.items():
                content = idx(array)
                path = target / (f"{name}.gz" if zipped else name)
                path.write_bytes(gzip.compress(content) if zipped else content)
        return tmp_path

    return make


@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"])
@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_files_are_found_and_read(fashion, folder, zipped):
    root = fashion(folder, zipped)
    data = FashionMNIST(str(root), batch_size=8)
    data.setup()
    assert {name: len(labels) for name, (_, labels) in data.splits.items()} == {"train": 36, "val": 4, "test": 10}
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 1, 28, 28)
    assert labels.dtype == torch.int64
    first = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)[0]
    assert np.array_equal(data.splits["train"][0][0, 0].numpy(), first)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_fashion_has_its_official_test_images(tmp_path):
    data = FashionMNIST(str(tmp_path))
    data.setup()
    assert {name: tuple(images.shape) for name, (images, _) in data.splits.items()} == {
        "train": (55000, 1, 28, 28),
        "val": (5000, 1, 28, 28),
        "test": (10000, 1, 28, 28),
    }
    assert data.splits["test"][1].bincount().tolist() == [1000] * 10


def test_fashion_errors(fashion, tmp_path):
    root = fashion(labels=39)
    with pytest.raises(ValueError, match="40 images but 39 labels"):
        FashionMNIST(str(root)).setup()
    with pytest.raises(ValueError, match=r"no train-images\[\.gz\] in .*missing; give the folder as root"):
        find_idx([tmp_path / "missing"], "train-images")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it begins with nothing"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 0]), "not an IDX file of bytes with 3 axes: it begins with 00000801"),
        (b"<html>not found</html>", "it begins with 3c68746d"),
        (idx(np.zeros((2, 3, 4), np.uint8))[:-1], r"must hold 24 bytes for shape \[2, 3, 4\], got 23"),
        (idx(np.zeros((2, 3, 4), np.uint8)) + b"x", "got 25"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_bad_idx_files(tmp_path, content, message, zipped):
    path = tmp_path / ("bad.gz" if zipped else "bad")
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} .*{message}"):
        read_idx(path, 3)


def test_damaged_gzip(tmp_path):
    path = tmp_path / "bad.gz"
    valid = gzip.compress(idx(np.zeros((20, 30, 40), np.uint8)))
    for content in (valid[:-20], b"no gzip at all", valid[:15] + b"xxxx" + valid[19:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.gz is damaged"):
            read_idx(path, 3)


# CIFAR


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(monkeypatch, tmp_path, classes):
    class Source:
        def __init__(self, root: str, train: bool):
            count = 100 if train else 20
            self.data = np.zeros((count, 32, 32, 3), np.uint8)
            self.data[:, 1, 2, 0] = 255
            self.targets = [i % classes for i in range(count)]

    data = CIFAR(str(tmp_path), classes, batch_size=10, augment="none")
    with pytest.raises(ValueError, match=f"no CIFAR-{classes} in .*set download: true"):
        data.setup()
    data.source = Source
    data.setup()
    assert {name: len(labels) for name, (_, labels) in data.splits.items()} == {"train": 90, "val": 10, "test": 20}
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (10, 3, 32, 32)
    assert (images[:, 0, 1, 2] == 1).all()
    assert images.sum() == -images.numel() + 20
    assert data.num_classes == classes


def test_workers_ignore_signals_and_end_with_the_main_process():
    """Terminals (Ctrl-C) and schedulers send signals to all processes."""
    data = Digits(batch_size=200, workers=1)
    data.setup()
    expected, batches = list(data.train_dataloader()), []
    before = set(multiprocessing.active_children())
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    for batch in loader:
        batches.append(batch)
        (worker,) = set(multiprocessing.active_children()) - before
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid, number)
    assert len(batches) == 6
    assert all(torch.equal(a[0], b[0]) for a, b in zip(expected, batches, strict=True))
    del loader
    worker.join(5)
    assert worker.exitcode == 0


SCRIPT = """
from vit_rope.training.data.in_memory import Digits
data = Digits(batch_size=4, workers=2)
data.setup()
loader = data.train_dataloader()
batches = iter(loader)
next(batches)
print("first", flush=True)
%s
"""


def test_workers_that_ignore_signals_are_ended_at_exit():
    """Not by multiprocessing, which would wait for them without limit."""
    data = Digits(batch_size=4, workers=2)
    data.setup()
    batches, before = iter(data.train_dataloader()), set(multiprocessing.active_children())
    handler = signal.getsignal(signal.SIGCHLD)
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    try:
        end_workers()
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert len(workers) == 2
    assert not any(worker.is_alive() for worker in workers)


def test_workers_of_a_start_that_fails_are_registered(monkeypatch):
    def start(_):
        process.start()
        raise OSError("no more processes")

    process = multiprocessing.Process(target=time.sleep, args=(60,), daemon=True)
    monkeypatch.setattr(DataLoader, "__iter__", start)
    data = Digits(batch_size=4)
    data.setup()
    try:
        with pytest.raises(OSError, match="no more processes"):
            next(iter(data.train_dataloader()))
        assert process in WORKERS
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "raise KeyError", "import sys; sys.exit(3)"])
def test_script_with_workers_ends(end):
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT % end], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert result.stdout == "first\n"
    assert result.returncode == {"": 0, "raise KeyError": 1}.get(end, 3)
    assert ("Error" in result.stderr) == (end == "raise KeyError")
    assert time.monotonic() - began < 60


# Image folders


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for name, colour in (("cat", 0), ("dog", 255)):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                mode = ("RGB", "L", "RGBA", "P")[number]
                Image.new("RGB", (40, 30), (colour, 128, 0)).convert(mode).save(
                    tmp_path / split / name / f"{number}.png"
                )
    return tmp_path


@pytest.mark.parametrize("augment", ["none", "light", "strong"])
def test_folder_with_images_of_several_modes(folder, augment):
    data = ImageFolder(str(folder), img_size=16, batch_size=8, workers=0, augment=augment)
    assert (data.num_classes, data.classes, data.in_chans, data.img_size) == (2, ["cat", "dog"], 3, 16)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 16, 16)
    assert images.dtype == torch.float32
    assert labels.bincount().tolist() == [4, 4]
    images, labels = batches(data.val_dataloader())
    assert labels.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(images[2, :, 0, 0], (torch.tensor([1, 128 / 255, 0]) - torch.tensor(data.mean)) / torch.tensor(data.std))  # fmt: skip # noqa: E501
    assert torch.equal(batches(data.test_dataloader())[1], labels)  # without a test folder, test is val


def test_user_transforms_replace_the_augmentation(folder):
    data = ImageFolder(
        str(folder), img_size=16, batch_size=2, workers=0, transforms=[v2.Resize((16, 16)), v2.RandomInvert(1.0)]
    )
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 16, 16)
    assert images[:, 2].min() > 2  # blue was 0


def test_class_missing_in_a_split(folder):
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    with pytest.raises(ValueError, match=r"class folder 'dog' is in .*train but missing in .*val"):
        ImageFolder(str(folder))
    (folder / "val" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"class folder 'wolf' is in .*val but missing in .*train"):
        ImageFolder(str(folder))


def test_empty_folders(folder, tmp_path):
    for path in (folder / "val" / "dog").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"class folder .*val/dog has no images"):
        ImageFolder(str(folder))
    with pytest.raises(ValueError, match=r"no folder .*nowhere/train: ImageFolder needs ROOT/train/CLASS/"):
        ImageFolder(str(tmp_path / "nowhere"))
    (tmp_path / "bare" / "train").mkdir(parents=True)
    (tmp_path / "bare" / "val").mkdir()
    with pytest.raises(ValueError, match="train has no class folders"):
        ImageFolder(str(tmp_path / "bare"))


@pytest.mark.parametrize(("content", "workers"), [(b"", 0), (b"no image at all", 0), ("half", 0), (b"", 1)])
def test_broken_images_are_named(folder, content, workers):
    path = folder / "train" / "dog" / "2.png"
    path.write_bytes(path.read_bytes()[:60] if content == "half" else content)
    data = ImageFolder(str(folder), img_size=16, batch_size=8, workers=workers)
    with pytest.raises(ValueError, match=f"cannot read the image {re.escape(str(path))}"):
        next(iter(data.train_dataloader()))


def test_wrong_options(folder):
    with pytest.raises(ValueError, match="augment must be none, light or strong, got 'much'"):
        ImageFolder(str(folder), augment="much")
    with pytest.raises(ValueError, match="augment must be none, light or strong, got 'much'"):
        Digits(augment="much")
    with pytest.raises(ValueError, match="0 < crop <= 1"):
        ImageFolder(str(folder), crop=2)
    with pytest.raises(
        ValueError, match=r"mean and std must be 3 finite numbers each, std above 0, got .* and \(0, 0, 0\)"
    ):
        ImageFolder(str(folder), std=[0, 0, 0])
    with pytest.raises(
        ValueError, match=r"mean and std must be 3 finite numbers each, std above 0, got \(nan, 0, 0\) and"
    ):
        ImageFolder(str(folder), mean=(math.nan, 0, 0))
    with pytest.raises(ValueError, match=r"^batch_size must be at least 1, got 0$"):
        Digits(batch_size=0)
    with pytest.raises(ValueError, match=r"^workers must be at least 0, got -1$"):
        Digits(batch_size=8, workers=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        ImageFolder(str(folder), batchsize=2)


# Image files


def save(path: Path, mode: str) -> np.ndarray:
    """Save an image of this mode, dark on the left and bright on the right; returns its grey
    values.
    """
    grey = np.zeros((8, 8), np.uint8)
    grey[:, 4:] = 200
    rgb = Image.fromarray(np.stack([grey] * 3, axis=-1))
    match mode:
        case "I;16":
            Image.fromarray(grey.astype(np.uint16) * 257).save(path)
        case "I":
            Image.fromarray(grey.astype(np.int32) * 257, mode="I").save(path)
        case "F":
            Image.fromarray(grey.astype(np.float32)).save(path)
        case "P transparent":
            rgb.convert("P").save(path, transparency=rgb.convert("P").getpixel((0, 0)))
            grey[:, :4] = 255
        case "RGBA" | "LA":
            alpha = Image.fromarray((grey > 0).astype(np.uint8) * 255)
            image = rgb.convert(mode)
            image.putalpha(alpha)
            image.save(path)
            grey[:, :4] = 255  # transparent areas become white
        case _:
            rgb.convert(mode, dither=Image.Dither.NONE).save(path)
    return grey


MODES = [("RGB", "png"), ("L", "png"), ("P", "gif"), ("P transparent", "png"), ("I;16", "png"), ("I;16", "tiff")]
MODES += [
    ("F", "tiff"),
    ("RGBA", "png"),
    ("RGBA", "webp"),
    ("LA", "png"),
    ("CMYK", "jpg"),
    ("CMYK", "tiff"),
    ("1", "png"),
]


@pytest.mark.parametrize(("mode", "kind"), MODES, ids=[f"{mode} {kind}" for mode, kind in MODES])
def test_every_mode_is_converted_to_rgb(tmp_path, mode, kind):
    path = tmp_path / f"image.{kind}"
    expected = save(path, mode)
    image = read_image(path, MAX_PIXELS)
    assert image.mode == "RGB"
    assert image.size == (8, 8)
    pixels = np.asarray(image).astype(int)
    bright = 255 if mode == "1" else 200
    assert abs(pixels[:, 0] - expected[0, 0]).max() <= 8
    assert abs(pixels[:, 7] - bright).max() <= 8


def bomb(path: Path, width: int, height: int) -> None:
    """A small PNG file whose header claims a large image."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))


@pytest.mark.parametrize("size", [(20_000, 20_000), (9_000, 9_000), (1, 1_000_000)])
def test_image_bombs_are_refused_by_their_header(tmp_path, size, monkeypatch):
    path = tmp_path / "bomb.png"
    bomb(path, *size)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(
        ValueError,
        match=rf"bomb\.png.*(too large: {size[0]} x {size[1]} exceeds max_pixels|DecompressionBomb|exceeds limit)",
    ):
        read_image(path, MAX_PIXELS)


def test_max_pixels_can_be_set(folder):
    with pytest.raises(ValueError, match=r"is too large: 40 x 30 exceeds max_pixels 1000"):
        next(iter(ImageFolder(str(folder), img_size=16, batch_size=2, workers=0, max_pixels=1000).val_dataloader()))
    with pytest.raises(ValueError, match=r"max_pixels must be at least 1 and at most Pillow's limit of \d+, got 0"):
        ImageFolder(str(folder), max_pixels=0)


@pytest.mark.parametrize("augment", ["none", "light", "strong"])
def test_images_of_one_pixel(folder, augment):
    Image.new("L", (1, 1), 7).save(folder / "train" / "cat" / "0.png")
    data = ImageFolder(str(folder), img_size=16, batch_size=8, workers=0, augment=augment)
    assert next(iter(data.train_dataloader()))[0].shape == (8, 3, 16, 16)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_skipped_and_counted(folder, workers, caplog):
    (folder / "train" / "dog" / "3.png").write_bytes(b"")  # the last file, which the first one replaces
    (folder / "train" / "cat" / "1.png").write_bytes(b"no image")
    (folder / "val" / "cat" / "0.png").write_bytes(b"")
    options = {"img_size": 16, "workers": workers, "on_error": "skip"}
    data = ImageFolder(str(folder), batch_size=8, augment="none", **options)
    batches = data.train_dataloader()
    images, labels = next(iter(batches))
    assert images.shape == (8, 3, 16, 16)
    assert labels.bincount().tolist() == [5, 3]
    assert batches.dataset.dataset.skipped == 2
    batches = data.val_dataloader()
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 1]]  # validation replaces none, so none counts twice
    assert batches.dataset.dataset.skipped == 1
    if not workers:
        assert "skipped: cannot read the image" in caplog.text
    with pytest.raises(ValueError, match="on_error must be stop or skip, got 'maybe'"):
        ImageFolder(str(folder), on_error="maybe")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_with_broken_images_only(folder, workers):
    for path in (folder / "train" / "dog" / "2.png", folder / "val" / "cat" / "1.png"):
        path.write_bytes(b"")
    data = ImageFolder(str(folder), img_size=16, batch_size=1, workers=workers, on_error="skip")
    expected = list(data.train_dataloader())
    assert len(expected) == 8
    again = data.train_dataloader()
    again.load_state_dict({"epoch": 0, "batches": 5})
    for (images, labels), (same, _) in zip(list(again), expected[5:], strict=True):
        assert torch.equal(images, same)
        assert len(labels) == 1
    batches, states = data.val_dataloader(), []
    for _ in batches:
        states.append(batches.state_dict()["batches"])
    assert states == [1, 3, 4]  # a skipped batch counts as drawn


def test_files_that_are_not_images(folder, monkeypatch):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    data = ImageFolder(str(folder), img_size=16, batch_size=2, workers=0, on_error="skip")
    with pytest.raises(ValueError, match=r"^none of 8 images in a row could be read; the last one: .*png"):
        next(iter(data.train_dataloader()))
    with pytest.raises(ValueError, match="none of the images of 2 batches could be read; check that they are images"):
        list(data.val_dataloader())
    monkeypatch.setattr("vit_rope.training.data.files.TRIES", 3)
    with pytest.raises(ValueError, match="none of 3 images in a row"):
        next(iter(data.train_dataloader()))


def test_names_that_are_not_utf8(folder):
    name = b"\xff\xfe.png"
    target = os.path.join(os.fsencode(folder / "train" / "dog"), name)
    os.rename(folder / "train" / "dog" / "2.png", target)
    data = ImageFolder(str(folder), img_size=16, batch_size=8, workers=0)
    assert next(iter(data.train_dataloader()))[0].shape[0] == 8
    with open(target, "wb") as file:
        file.write(b"broken")
    with pytest.raises(ValueError, match=r"cannot read the image .*dog/\\xff\\xfe\.png") as caught:
        next(iter(data.train_dataloader()))
    str(caught.value).encode()  # any terminal can print it


def test_errors_name_folders_and_files_without_permission(folder, monkeypatch):
    closed = folder / "train" / "dog"
    walk, opened = os.scandir, Image.open

    def refuse(path="."):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return walk(path)

    with (
        monkeypatch.context() as patch
    ):  # the tests may run as root, who can read everything, so the error is simulated
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(ValueError, match=r"cannot open the folder .*train/dog: Permission denied"):
            ImageFolder(str(folder))

    def refuse_file(path, *args):
        if Path(path).name == "1.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args)

    monkeypatch.setattr(Image, "open", refuse_file)
    with pytest.raises(ValueError, match=r"cannot read the image .*1\.png: .*Permission denied"):
        next(iter(ImageFolder(str(folder), img_size=16, batch_size=8, workers=0).train_dataloader()))


# Sets that timm reads


# timm does not close the tar files that it reads
timms_files = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def tars(folder):
    for split, name in (("train", "train"), ("val", "validation")):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            tar.add(folder / split, arcname=split)
    return folder


@timms_files
def test_tar_files_are_a_set(tars):
    data = TimmData(2, root=str(tars), img_size=16, batch_size=8, workers=1)
    direct = ImageFolder(str(tars), img_size=16, batch_size=8, workers=0)
    images, labels = next(iter(data.val_dataloader()))
    torch.testing.assert_close(images, next(iter(direct.val_dataloader()))[0])
    assert labels.tolist() == [0, 0, 1, 1]
    assert next(iter(data.train_dataloader()))[1].bincount().tolist() == [4, 4]
    with pytest.raises(ValueError, match=r"the label of .*\.png is 1, but num_classes is 1"):
        next(iter(TimmData(1, root=str(tars), img_size=16, batch_size=8, workers=0).train_dataloader()))
    with pytest.raises(ValueError, match=r"no file .*nowhere/train\.tar: TimmData without a name needs ROOT/SPLIT"):
        TimmData(2, root="nowhere")


@timms_files
def test_broken_image_in_a_tar_is_named(tars):
    (tars / "train" / "dog" / "2.png").write_bytes(b"broken")
    with tarfile.open(tars / "train.tar", "w") as tar:
        tar.add(tars / "train", arcname="train")
    options = {"root": str(tars), "img_size": 16, "batch_size": 8, "workers": 0}
    with pytest.raises(ValueError, match=r"cannot read the image train/dog/2\.png"):
        next(iter(TimmData(2, **options).train_dataloader()))
    assert len(next(iter(TimmData(2, **options, on_error="skip").train_dataloader()))[0]) == 8


@timms_files
@pytest.mark.parametrize("name", ["../../cat/evil.png", "/etc/cat/evil.png"])
def test_archives_with_names_that_point_outside(tars, name):
    with tarfile.open(tars / "train.tar", "w") as tar:
        tar.add(tars / "train" / "cat" / "0.png", arcname="cat/0.png")
        member = tarfile.TarInfo(name)
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(ValueError, match=rf"train\.tar contains the name {re.escape(name)}, which points outside it"):
        TimmData(2, root=str(tars), img_size=16, batch_size=1, workers=0).train_dataloader()


class Reader:
    """A stream, as one of timm's readers."""

    def __iter__(self):
        yield from ((Image.new("RGB", (20, 20)), label) for label in (0, 1, 0, 1, 1))

    def __len__(self):
        return 5

    epochs: ClassVar[list[int]] = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def test_streams_and_names_are_passed_to_timm_unchanged(monkeypatch):
    calls = []

    def create(name, **options):
        calls.append((name, options))
        return IterableImageDataset(options["root"], reader=Reader())

    monkeypatch.setattr(timm_data, "create_dataset", create)
    data = TimmData(2, "wds/mine", root="x", train_split="a-{0..3}.tar", img_size=16, batch_size=2, workers=0)
    batches = data.train_dataloader()
    assert [labels.tolist() for _, labels in batches] == [[0, 1], [0, 1]]
    assert [images.shape for images, _ in batches] == [(2, 3, 16, 16)] * 2
    assert Reader.epochs == [0, 1]
    assert calls[0][0] == "wds/mine"
    assert calls[0][1]["split"] == "a-{0..3}.tar"
    assert "trust_remote_code" not in calls[0][1]  # timm's default is False
    assert [len(labels) for _, labels in data.val_dataloader()] == [2, 2, 1]


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the package is installed")
def test_missing_package_is_named():
    with pytest.raises(ValueError, match=r"^hfds/x/y needs a package that is not installed: .*datasets"):
        TimmData(2, "hfds/x/y", batch_size=1).train_dataloader()
