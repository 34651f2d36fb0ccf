"""Data on which positions matter to different degrees, and many runs that differ in position and seed alone.

`vit-rope study configs/study_ddpm_dit.yaml --position none axial --seed 0 1 2` makes all runs in one
process and goes on where it was stopped. What all finished runs reached, these and earlier ones, goes to a CSV file,
which `vit-rope plot study` draws. It works for every configuration, and for several at once.
"""

import argparse
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def study(
    config: str | Path,
    positions: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    judge: str | None = None,
    n: int = 500,
    steps: int = 20,
    options: Sequence[str] = (),
) -> None:
    """Run a configuration with every position and seed, each in a folder `out`/POSITION/SEED of its own.

    What is finished there is not made again. With a `judge` (the run of a classifier) n samples of each, drawn in so
    many steps, are scored too. `options` go to every run's command line.
    """
    from .fit import main

    for seed in seeds:  # all positions of a seed before the next, so that what is there can always be compared
        for position in positions:
            folder = out / re.sub(r"[^\w=.,()+-]+", "", position) / str(seed)
            if not (folder / "summary.json").is_file():
                fixed = ("--seed_everything", seed, "--model.model_args.position", position, "--out", folder)
                settings = ["fit", "--config", config, *fixed, "--overwrite", "true", *options]
                main([str(setting) for setting in settings])
            if judge is not None and not (folder / "quality.json").is_file():
                from ..training.quality import scores

                found = scores(folder / "checkpoints" / "last.ckpt", judge, n, steps, reference=5000)
                (folder / "quality.json").write_text(json.dumps(found) + "\n")


def table(out: Path) -> list[dict[str, Any]]:
    """A row for each validation of each finished run of a study in `out`, in the order in which they were made.

    `host` says which model learned which data, `step` how many steps it had made; the rest is what validation found.
    The last row of a run has `seconds` as well, all that the training took, and the scores of samples.
    """
    return [row for _, rows in sorted(map(_run, out.glob("*/*/summary.json")), key=lambda run: run[0]) for row in rows]


def _run(summary: Path) -> tuple[float, list[dict[str, Any]]]:
    """When a run began, and its rows."""
    folder = summary.parent
    config = yaml.safe_load((folder / "config.yaml").read_text())
    model, data = config["model"]["init_args"], config["data"]["class_path"].rpartition(".")[2]
    what = {"host": f"{model['model']} on {data}", "position": model["model_args"]["position"]}
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = []
    for line in logged:
        found = {key: value for key, value in line.items() if key.startswith("val/")}
        if found and line["stage"] == "fit":
            rows.append(what | {"seed": config["seed_everything"], "step": line["step"] + 1} | found)
    rows[-1]["seconds"] = json.loads(summary.read_text())["seconds"]
    if (folder / "quality.json").is_file():
        rows[-1] |= json.loads((folder / "quality.json").read_text())
    return logged[0]["time"], rows


def main(args: Sequence[str] | None = None) -> None:
    """Run the studies that the arguments describe; further ones go to each run, as for `train.py fit`."""
    parser = argparse.ArgumentParser("vit-rope study", description="Runs that differ in positions.")
    parser.add_argument("config", type=Path, nargs="+")
    parser.add_argument("--position", nargs="+", default=[], metavar="SPEC", help="left out, nothing is run")
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--judge", help="the run of a classifier, to score samples of a denoiser")
    parser.add_argument("--n", type=int, default=500, help="samples to score")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--csv", type=Path, help="where the table goes (default: study.csv among the first one's runs)")
    known, options = parser.parse_known_args(args)
    folders = [Path(yaml.safe_load(config.read_text())["out"]) for config in known.config]
    for config, out in zip(known.config, folders, strict=True):
        study(config, known.position, known.seed, out, known.judge, known.n, known.steps, options)
    rows = [row for out in folders for row in table(out)]
    if not rows:
        raise SystemExit(f"error: no finished runs in {', '.join(map(str, folders))}; make some with --position")
    path = known.csv or folders[0] / "study.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    print(path)
