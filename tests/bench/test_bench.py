"""The arithmetic of benchmarks, on a simulated clock; real times are never asserted."""

import csv
import importlib
import json

import pytest
import torch
from matplotlib.axes import Axes

from vit_rope.__main__ import main
from vit_rope.bench import measure, report
from vit_rope.bench.block import peak_memory
from vit_rope.cli import bench
from vit_rope.plots import plot_ratios, slope


class Clock:
    """A clock that only the runs advance."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def run(self, *seconds):
        remaining = list(seconds)

        def advance():
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return advance


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure.time, "process_time", clock)
    monkeypatch.setattr(measure.time, "perf_counter", clock)
    return clock


def test_ratios_are_computed_within_rounds_and_the_first_round_does_not_count(clock):
    runs = {"slow start": clock.run(100.0, 2.0), "half": clock.run(100.0, 1.0), "uneven": clock.run(9.0, 2.0, 4.0, 6.0)}
    first, half, uneven = measure.ratios("made up", runs, rounds=3)
    assert first == ("made up", "slow start", 1.0, 1.0, 1.0, 3, 2.0, "s")
    assert (half.median, half.low, half.high) == (0.5, 0.5, 0.5)
    assert (uneven.median, uneven.low, uneven.high) == (2.0, 1.0, 3.0)


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_reports_contain_the_conditions_of_the_run(suffix, tmp_path, capsys):
    out = tmp_path / "deep" / f"ratios.{suffix}"
    results = [
        measure.Ratio("made up", "stock", 1.0, 1.0, 1.0, 5, 0.00123449),
        measure.Ratio("made up", "axial", 1.04, 1.0, 1.1, 5, 0.0013),
    ]
    report.show(results)
    printed = capsys.readouterr().out
    assert "axial" in printed
    assert "1.040" in printed
    assert "1.23 ms" in printed
    report.write(results, out)
    rows = json.loads(out.read_text()) if suffix == "json" else list(csv.DictReader(out.read_text().splitlines()))
    assert [row["candidate"] for row in rows] == ["stock", "axial"]
    assert [float(row["took"]) for row in rows] == [0.001234, 0.0013]
    assert float(rows[1]["median"]) == 1.04
    assert {"device", "threads", "command", "torch", "commit"} <= set(rows[0])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.0, "s", "0 s"), (3.2e-7, "s", "320 ns"), (1.5, "s", "1.5 s"), (2.5e9, "B", "2.5 GB"), (4e-12, "s", "0.004 ns")],
)
def test_amounts_have_three_digits_and_a_prefix(value, unit, text):
    assert report.amount(value, unit) == text


def test_a_small_unet_is_measured(monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(bench, "STEADY", {})
    monkeypatch.setattr("vit_rope.bench.unet.UNETS", {"8 x 8": (8, (16, 16), (False, True), 1)})
    main(["bench", "unet", "--specs", "none", "axial", "--rounds", "2", "--out", str(tmp_path / "unet.csv")])
    rows = list(csv.DictReader((tmp_path / "unet.csv").read_text().splitlines()))
    assert [row["candidate"] for row in rows] == ["stock", "none", "axial"] * 4
    assert all(float(row["median"]) > 0 for row in rows)


def test_ratios_to_the_paired_run_are_computed_within_rounds_too(clock):
    runs = {"plain": clock.run(9.0, 2.0), "none": clock.run(9.0, 4.0), "axial": clock.run(9.0, 5.0)}
    medians = {(row.group, row.candidate): row.median for row in measure.ratios("made up", runs, 3, paired="none")}
    assert medians["made up", "axial"] == 2.5
    assert medians["made up, against none", "axial"] == 1.25
    assert medians["made up, against none", "plain"] == 0.5


def test_short_runs_are_repeated(clock):
    count = []
    short = clock.run(0.25)
    measure.ratios("made up", {"short": lambda: count.append(short())}, rounds=2, at_least=1.0)
    assert len(count) == 2 + 2 * 4


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # raised by other libraries, if installed
@pytest.mark.parametrize(
    ("topic", "small"),
    [
        ("rotate", {"SHAPES": [(1, 2, 2, 1)]}),
        ("data", {"PHOTO": (40, 30), "PHOTOS": 8, "MODEL": "vit_rope_tiny_patch16_224", "SIZE": 32}),
        ("tables", {"SIDES": (3,), "BATCH": 1}),
        ("growth", {"SIDES": (2, 3, 4), "AXES": {1: (4,), 2: (2, 2)}}),
    ],
)
def test_other_topics_are_measured_on_small_inputs(topic, small, monkeypatch, tmp_path):
    module = importlib.import_module(f"vit_rope.bench.{topic}")
    monkeypatch.setattr(bench, "STEADY", {})
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    main(["bench", topic, "--rounds", "2", "--out", str(tmp_path / "out.csv")])
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    expected = {"growth": "9 tokens", "data": "taken over from a worker"}.get(topic, "vit_rope axial")
    assert expected in {row["candidate"] for row in rows}
    assert all(float(row["median"]) > 0 for row in rows)
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_against_selects_the_libraries(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "STEADY", {})
    monkeypatch.setattr("vit_rope.bench.rotate.SHAPES", [(1, 2, 2, 1)])
    command = ["bench", "rotate", "--rounds", "2", "--against", "timm,rope-vit", "--out", str(tmp_path / "out.json")]
    main(command)
    names = {row["candidate"] for row in json.loads((tmp_path / "out.json").read_text())}
    assert {name for name in names if not name.startswith("vit_rope")} == {
        "copy", "timm axial", "timm mixed", "timm dinov3", "complex product, out of place (as RoPE-ViT)",
    }  # fmt: skip


def test_cuda_events_measure_time_on_a_gpu(monkeypatch):
    now, synchronized = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    def run():
        now[0] += 3.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synchronized.append(now[0]))
    (row,) = measure.ratios("made up", {"three seconds": run}, rounds=2)
    assert row.took == 3.0
    assert synchronized == [0.0, 3.0, 3.0, 6.0, 6.0, 9.0]


def test_every_topic_has_a_bench_function():
    for topic in bench.TOPICS:
        assert callable(importlib.import_module(f"vit_rope.bench.{topic}").bench)


def test_peak_memory_counts_what_is_allocated_at_once():
    def run():
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.zeros(500)
        del kept

    assert peak_memory(run) == 4 * 1500


def test_the_slope_of_a_power_is_its_exponent():
    assert slope([1, 2, 4, 8], [5.0, 20.0, 80.0, 320.0]) == pytest.approx(2)


def test_curves_of_a_plot_differ_in_more_than_colour(tmp_path, monkeypatch):
    drawn, errorbar = [], Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda *data, **style: drawn.append(style) or errorbar(*data, **style))
    results = [
        measure.Ratio(group, str(n), 1.0, 1.0, 1.0, 2, 1.0) for n in range(12) for group in map(str, range(12, 24))
    ]
    plot_ratios(results, tmp_path / "ratios.png")
    assert len({(style["color"], style["marker"]) for style in drawn}) == 12
    assert len({style["marker"] for style in drawn}) > 10


def test_invalid_arguments(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "unet", "--rounds", "1"])
    assert "quartiles need at least 2 rounds, got 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "startup", "--specs", "axial"])
    assert "startup takes no --specs; leave it out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "unet", "--against", "timm"])
    assert "unet takes no --against; leave it out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "rotate", "--against", "keras"])
    assert "keras is unknown here; available are timm, rope-vit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "unet", "--out", "ratios.txt"])
    assert "--out is a .csv or .json file, got ratios.txt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "rotate", "--specs", "alibi"])
    assert "alibi rotates no queries, so there is no rotation to measure" in capsys.readouterr().err
