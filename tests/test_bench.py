"""The benchmark's arithmetic, on a clock of the test's own; real times are never asserted."""

import csv

import pytest

from vit_rope import bench
from vit_rope.__main__ import main


class Clock:
    """A clock that moves only when a run says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def run(self, *seconds):
        left = list(seconds)

        def spend():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return spend


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench.time, "process_time", clock)
    monkeypatch.setattr(bench.time, "perf_counter", clock)
    return clock


def test_ratios_are_taken_within_rounds_and_the_first_does_not_count(clock):
    runs = {"slow start": clock.run(100.0, 2.0), "half": clock.run(100.0, 1.0), "uneven": clock.run(9.0, 2.0, 4.0, 6.0)}
    first, half, uneven = bench.ratios("made up", runs, rounds=3)
    assert first == ("made up", "slow start", 1.0, 1.0, 1.0, 3)
    assert (half.median, half.low, half.high) == (0.5, 0.5, 0.5)
    assert (uneven.median, uneven.low, uneven.high) == (2.0, 1.0, 3.0)


def test_a_report_says_under_what_conditions(tmp_path, capsys):
    out = tmp_path / "deep" / "ratios.csv"
    bench.report(
        [bench.Ratio("made up", "stock", 1.0, 1.0, 1.0, 5), bench.Ratio("made up", "axial", 1.04, 1.0, 1.1, 5)],
        str(out),
    )
    printed = capsys.readouterr().out
    assert "axial" in printed
    assert "1.040" in printed
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["candidate"] for row in rows] == ["stock", "axial"]
    assert rows[1]["median"] == "1.04"
    assert {"device", "threads", "dtype", "torch"} <= set(rows[0])


def test_one_small_unet_is_measured(monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(bench, "UNETS", {"8 x 8": (8, (16, 16), (False, True), 1)})
    main(["bench", "unet", "--specs", "none", "axial", "--rounds", "2", "--out", str(tmp_path / "unet.csv")])
    rows = list(csv.DictReader((tmp_path / "unet.csv").read_text().splitlines()))
    assert [row["candidate"] for row in rows] == ["stock", "none", "axial"] * 2
    assert all(float(row["median"]) > 0 for row in rows)


def test_bad_requests(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "unet", "--rounds", "1"])
    assert "quartiles need at least 2 rounds, got 1" in capsys.readouterr().err
