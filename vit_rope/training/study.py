"""Data on which positions matter to different degrees, and many runs that differ in position and seed alone.

`python -m vit_rope.training.study configs/study_ddpm_dit.yaml --position none axial --seed 0 1 2` makes all runs in one
process and writes one row a run to a CSV file. It goes on where it was stopped, and works for every configuration.
"""

import argparse
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from torch.nn import functional as F

from .data import FashionMNIST, Split


class SmallFashion(FashionMNIST):
    """Fashion-MNIST at 14x14, each pixel the mean of four; options as there."""

    img_size: Any = 14

    def load(self) -> dict[str, Split]:
        return {split: (shrink(images), labels) for split, (images, labels) in super().load().items()}


class FashionPairs(SmallFashion):
    """The same garment twice, side by side, at 14x28: who looks up the place beside draws both alike."""

    img_size: Any = (14, 28)

    def load(self) -> dict[str, Split]:
        return {split: (images.repeat(1, 1, 1, 2), labels) for split, (images, labels) in super().load().items()}


def shrink(images: Tensor) -> Tensor:
    """Bytes (N, 1, H, W) at half the size."""
    return F.avg_pool2d(images.float(), 2).round().byte()


def study(
    config: str | Path,
    positions: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    judge: str | None = None,
    n: int = 500,
    steps: int = 20,
    options: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Run a configuration with every position and seed, and gather what each reached, as one row a run.

    Runs lie in `out`/POSITION/SEED; those that are finished are not made again. With a `judge` (the run of a
    classifier) n samples of each, drawn in so many steps, are scored too. `options` go to every run's command line.
    """
    from .cli import main

    rows = []
    for seed in seeds:  # all positions of a seed before the next, so that what is there can always be compared
        for position in positions:
            folder = out / re.sub(r"[^\w=.,()+-]+", "", position) / str(seed)
            if not (folder / "summary.json").is_file():
                fixed = ("--seed_everything", seed, "--model.model_args.position", position, "--out", folder)
                settings = ["fit", "--config", config, *fixed, "--overwrite", "true", *options]
                main([str(setting) for setting in settings])
            summary = json.loads((folder / "summary.json").read_text())
            row = {"position": position, "seed": seed, "seconds": summary["seconds"], **summary["last"]}
            if judge is not None:
                row |= _scores(folder, judge, n, steps)
            rows.append(row)
    return rows


def _scores(folder: Path, judge: str, n: int, steps: int) -> dict[str, float]:
    from .quality import scores

    path = folder / "quality.json"
    if not path.is_file():
        last = folder / "checkpoints" / "last.ckpt"
        path.write_text(json.dumps(scores(last, judge, n, steps, reference=5000)) + "\n")
    return json.loads(path.read_text())


def main(args: Sequence[str] | None = None) -> None:
    """Run the study that the arguments describe; further ones go to each run, as for `train.py fit`."""
    parser = argparse.ArgumentParser("python -m vit_rope.training.study", description="Runs that differ in positions.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--position", nargs="+", required=True, metavar="SPEC")
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--judge", help="the run of a classifier, to score samples of a denoiser")
    parser.add_argument("--n", type=int, default=500, help="samples to score")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--csv", type=Path, help="where the table goes (default: study.csv among the runs)")
    known, options = parser.parse_known_args(args)
    out = Path(yaml.safe_load(known.config.read_text())["out"])
    rows = study(known.config, known.position, known.seed, out, known.judge, known.n, known.steps, options)
    path = known.csv or out / "study.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, keys)
        table.writeheader()
        table.writerows(rows)
    print(path)


if __name__ == "__main__":
    main()
