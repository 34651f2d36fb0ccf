"""The command `vit-rope study`: many runs that differ only in position scheme and seed.

`vit-rope study configs/study_ddpm_dit.yaml --position none axial --seed 0 1 2` makes all runs in
one process. A study that was stopped continues with the same command: it resumes the run that was
interrupted, and keeps those that are finished; runs with other settings are refused. The results of
all finished runs, also those of earlier studies, go to a CSV file, which `vit-rope plot study`
draws. Any configuration works, and several at once.
"""

import csv
import inspect
import json
import re
import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..files import expand_home, one_line, replacing
from .errors import one_line_errors
from .parsers import VerbParser

RECORD = "study.json"  # in the folder of a run: the settings that it was trained and scored with
FIXED = ("seed_everything", "model.model_args.position", "model.init_args.model_args.position", "ckpt_path")


def study(
    config: str | Path,
    positions: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    judge: str | None = None,
    n: int = 500,
    steps: int = 20,
    options: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Train a configuration with every position and seed, each in a folder `out`/POSITION/SEED.

    Finished runs are kept and begun ones are resumed. With a `judge` (the run of a classifier), n
    samples of each run, drawn in the given number of steps, are scored too. `options` are added to
    the command line of every run. `overwrite` replaces what was made with other settings; otherwise
    this raises ValueError, as it does for options that the study sets itself, before any run.
    """
    names = [word.partition("=")[0].removeprefix("--") for word in options if word.startswith("--")]
    if fixed := [name for name in names if name in FIXED]:
        raise ValueError(f"--{fixed[0]} is set by the study: use its own --position, --seed and --out")
    judged = {"judge": judge, "n": n, "steps": steps}
    runs = dict[Path, tuple[dict[str, Any], list[str] | None]]()
    for seed in dict.fromkeys(seeds):  # all positions of a seed before the next: finished runs can be compared
        for position in dict.fromkeys(positions):
            folder = out / re.sub(r"[^\w=.,()+-]+", "", position) / str(seed)
            if folder in runs:
                raise ValueError(
                    f"{position!r} and {runs[folder][0]['position']!r} have the same folder: leave out one"
                )
            settings = settings_of(config, position, seed, options)
            runs[folder] = settings, next_start(folder, settings, overwrite)
            if judge is not None and (folder / "quality.json").is_file() and not is_same(folder, "scored", judged):
                refuse(folder, "scored", judged, overwrite)
                (folder / "quality.json").unlink()
    if runs:
        kept = sum(start is None for _, start in runs.values())
        print(f"{out}: {kept} finished runs are kept, {len(runs) - kept} are trained", file=sys.stderr)
    for folder, (settings, start) in runs.items():
        if start is not None:
            (folder / "quality.json").unlink(missing_ok=True)
            record(folder, {"trained": settings})
            own = ("--seed_everything", settings["seed"], "--model.model_args.position", settings["position"])
            fit_run(["--config", config, *own, *options, "--out", folder, *start])
        if judge is not None and not (folder / "quality.json").is_file():
            from ..training.quality import scores

            quality = scores(folder / "checkpoints" / "last.ckpt", judge, n, steps, reference=5000)
            record(folder, {"scored": judged})
            (folder / "quality.json").write_text(json.dumps(quality) + "\n")


def fit_run(options: Sequence[object]) -> None:
    """Run `vit-rope fit`; if a signal ends it, say how the study continues."""
    from .fit import main as fit  # loads Lightning, which a table of finished runs does not need

    try:
        fit([str(option) for option in options])
    except SystemExit as end:
        if end.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            print("Or continue the study: the same vit-rope study command resumes this run", file=sys.stderr)
        raise


def settings_of(config: str | Path, position: str, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """All that determines a run but its folder, as plain values of JSON."""
    content = {key: value for key, value in read_config(config).items() if key != "out"}
    words = list[list[str]]()
    for word in options:
        if word.startswith("--"):
            words.append(word.split("=", 1))
        elif words:
            words[-1].append(word)
    settings = {"config": content, "position": position, "seed": seed, "options": sorted(words)}
    return json.loads(json.dumps(settings, default=str))


def next_start(folder: Path, settings: dict[str, Any], overwrite: bool) -> list[str] | None:
    """The options of fit that begin or resume the run in a folder, or None if it is finished.

    Raises ValueError if the folder has a run with other settings, unless `overwrite`.
    """
    if not (folder / "config.yaml").is_file():
        return ["--overwrite", "true"]
    if not is_same(folder, "trained", settings):
        refuse(folder, "trained", settings, overwrite)
        return ["--overwrite", "true"]
    if (folder / "summary.json").is_file():
        return None
    resumes = (folder / "checkpoints" / "last.ckpt").is_file()
    return ["--ckpt_path", "last"] if resumes else ["--overwrite", "true"]


def is_same(folder: Path, part: str, settings: dict[str, Any]) -> bool:
    """Whether a run was trained or scored with these settings, as far as its record says."""
    recorded = recorded_settings(folder).get(part)
    if recorded is None and (folder / "summary.json").is_file():  # of a release that recorded nothing
        print(f"{folder} is kept, but what it was {part} with is not known", file=sys.stderr)
        return True
    return recorded == settings


def refuse(folder: Path, part: str, settings: dict[str, Any], overwrite: bool) -> None:
    """Raise ValueError that says what differs in a run with other settings, unless `overwrite`."""
    if overwrite:
        return
    recorded = recorded_settings(folder).get(part, {})
    changed = [key for key in settings if recorded.get(key) != settings[key]]
    told = "; ".join(_change(key, recorded[key], settings[key]) for key in changed) if recorded else "not recorded"
    raise ValueError(
        f"{folder} was {part} with other settings ({told}): replace such runs with --overwrite, or choose another --out"
    )


def recorded_settings(folder: Path) -> dict[str, Any]:
    """The record in the folder of a run, empty if there is none."""
    path = folder / RECORD
    return json.loads(path.read_text()) if path.is_file() else {}


def record(folder: Path, settings: dict[str, Any]) -> None:
    """Add settings to the record in the folder of a run."""
    content = recorded_settings(folder) | settings
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / RECORD) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def _change(key: str, old: Any, new: Any) -> str:
    """What a setting was and is, in a few words."""
    if key == "config":
        return "the configuration has changed"
    if key == "options":
        old, new = (" ".join(" ".join(words) for words in value) or "none" for value in (old, new))
    return f"{key}: {old}, now {new}"


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


def read_config(path: str | Path) -> dict[str, Any]:
    """The content of a YAML file of `vit-rope fit`; raises ValueError if it is not one."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a configuration of vit-rope fit: expected keys such as model and data")
    return content


def study_folders(configs: Sequence[Path], out: Path | None) -> list[Path]:
    """The folder of the runs of each configuration; raises ValueError if two have the same.

    This is `out` of the file, or the option of that name: with several configurations, a folder in
    it for each, named as the file.
    """
    if out is not None:
        folders = [out] if len(configs) == 1 else [out / path.stem for path in configs]
    else:
        outs = [read_config(path).get("out") for path in configs]
        if None in outs:
            raise ValueError(f"{configs[outs.index(None)]} has no out: add it, or give --out")
        folders = [Path(expand_home(str(folder))) for folder in outs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(
            f"two configurations have the same folder, of {', '.join(map(str, folders))}: give each its own"
        )
    return folders


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
        out: Path | None = None,
        overwrite: bool = False,
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
            out: folder of all runs, if it is not `out` of the configuration
            overwrite: replace runs that were made with other settings
        """
        folders = study_folders(config, out)
        for path, folder in zip(config, folders, strict=True):
            study(path, position or (), seed or (0,), folder, judge, n, steps, fit_options, overwrite)
        rows = [row for folder in folders for row in table(folder)]
        if not rows:
            raise ValueError(f"no finished runs in {', '.join(map(str, folders))}; make some with --position")
        path = csv or folders[0] / "study.csv"
        write(rows, path)
        print(path)

    known, fit_options = split(args, {"help", *inspect.signature(run).parameters})
    with one_line_errors(ValueError, OSError):
        VerbParser("vit-rope study", run).run(known)
