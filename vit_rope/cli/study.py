"""The command `vit-rope study`: many runs that differ only in position scheme and seed.

`vit-rope study configs/study_ddpm_dit.yaml --position none axial --seed 0 1 2` makes all runs in
one process. A study that was stopped continues with the same command. The results of all finished
runs, also those of earlier studies, go to a CSV file, which `vit-rope plot study` draws. Any
configuration works, and several at once.
"""

import csv
import inspect
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import one_line_errors
from .parsers import VerbParser


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
    """Train a configuration with every position and seed, each in a folder `out`/POSITION/SEED.

    Finished runs are not repeated. With a `judge` (the run of a classifier), n samples of each run,
    drawn in the given number of steps, are scored too. `options` are added to the command line of
    every run.
    """
    from .fit import main as fit  # loads Lightning, which a table of finished runs does not need

    for seed in seeds:  # all positions of a seed before the next seed, so that finished runs can always be compared
        for position in positions:
            folder = out / re.sub(r"[^\w=.,()+-]+", "", position) / str(seed)
            if not (folder / "summary.json").is_file():
                fixed = ("--seed_everything", seed, "--model.model_args.position", position, "--out", folder)
                settings = ["--config", config, *fixed, "--overwrite", "true", *options]
                fit([str(setting) for setting in settings])
            if judge is not None and not (folder / "quality.json").is_file():
                from ..training.quality import scores

                quality = scores(folder / "checkpoints" / "last.ckpt", judge, n, steps, reference=5000)
                (folder / "quality.json").write_text(json.dumps(quality) + "\n")


def table(out: Path) -> list[dict[str, Any]]:
    """A row for each validation of each finished run of a study in `out`, in order of time.

    `host` names the model and the data, `step` is the number of optimizer steps before the
    validation; the rest is what the validation measured. The last row of a run also has `seconds`,
    the time of the whole training, and the scores of its samples.
    """
    return [row for _, rows in sorted(map(_run, out.glob("*/*/summary.json")), key=lambda run: run[0]) for row in rows]


def _run(summary: Path) -> tuple[float, list[dict[str, Any]]]:
    """The time at which a run began, and its rows."""
    folder = summary.parent
    config = yaml.safe_load((folder / "config.yaml").read_text())
    model, data = config["model"]["init_args"], config["data"]["class_path"].rpartition(".")[2]
    run = {"host": f"{model['model']} on {data}", "position": model["model_args"]["position"]}
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = []
    for line in logged:
        scores = {key: value for key, value in line.items() if key.startswith("val/")}
        if scores and line["stage"] == "fit":
            rows.append(run | {"seed": config["seed_everything"], "step": line["step"] + 1} | scores)
    rows[-1]["seconds"] = json.loads(summary.read_text())["seconds"]
    if (folder / "quality.json").is_file():
        rows[-1] |= json.loads((folder / "quality.json").read_text())
    return logged[0]["time"], rows


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a table as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)


def split(args: Sequence[str], names: Collection[str]) -> tuple[list[str], list[str]]:
    """The arguments of a command whose options have these names, and all other options."""
    known, further = list[str](), list[str]()
    target = known
    for word in args:
        if word.startswith("--"):
            target = known if word.partition("=")[0].removeprefix("--") in names else further
        target.append(word)
    return known, further


def main(args: Sequence[str]) -> None:
    """Run `vit-rope study`."""

    def run(
        config: list[Path],
        position: list[str] | None = None,
        seed: list[int] | None = None,
        judge: str | None = None,
        n: int = 500,
        steps: int = 20,
        csv: Path | None = None,
    ) -> None:
        """Train with several position schemes and seeds, and write a table of all finished runs.

        All further options are those of vit-rope fit, such as --trainer.max_epochs 8.

        Args:
            config: YAML files of vit-rope fit; runs go to the folder of `out`, in POSITION/SEED
            position: position schemes to train with; without any, only the table is written
            seed: seeds to train with (default: 0)
            judge: the run of a classifier, to score samples of a denoiser
            n: number of samples to score
            steps: calls of the network for each sample
            csv: file of the table (default: study.csv in the folder of the first configuration)
        """
        folders = [Path(yaml.safe_load(path.read_text())["out"]) for path in config]
        for path, out in zip(config, folders, strict=True):
            study(path, position or (), seed or (0,), out, judge, n, steps, fit_options)
        rows = [row for out in folders for row in table(out)]
        if not rows:
            raise ValueError(f"no finished runs in {', '.join(map(str, folders))}; make some with --position")
        path = csv or folders[0] / "study.csv"
        write(rows, path)
        print(path)

    known, fit_options = split(args, {"help", *inspect.signature(run).parameters})
    with one_line_errors(ValueError, OSError):
        VerbParser("vit-rope study", run).run(known)
