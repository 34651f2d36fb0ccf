"""What the kernel says, and the picture of it."""

import math

import pytest
import torch

from vit_rope.__main__ import main, scheme_table
from vit_rope.analysis import kernel, reversibility_margin
from vit_rope.positions import Layout, build, schemes


@pytest.mark.parametrize(
    ("base", "values"),
    [
        (10, {1: 0.882, 7: -0.014, 13: -0.165, 31: 0.035, 63: -0.111}),
        (100, {1: 0.932, 7: 0.454, 13: 0.314, 31: 0.177, 63: -0.068}),
        (1e4, {1: 0.957, 7: 0.714, 13: 0.692, 31: 0.564, 63: 0.553}),
    ],
)
def test_decay_of_one_axis(base, values):
    position = build(f"axial(base={base})", Layout(width=32, heads=1, grid=(64,)))
    for distance, value in values.items():
        want = sum(math.cos(base ** (-j / 16) * distance) for j in range(16)) / 16
        assert kernel(position, torch.tensor([float(distance)])).item() == pytest.approx(want, abs=1e-6)
        assert value == pytest.approx(want, abs=6e-4)


def test_axial_decay_depends_on_direction():
    position = build("axial(base=100)", Layout(width=64, heads=1, grid=(14, 14)))
    along, across = kernel(position, torch.tensor([[7.0, 0.0], [5.0, 5.0]]))[0].tolist()
    assert along == pytest.approx(0.727, abs=1e-3)
    assert across == pytest.approx(0.469, abs=1e-3)


def test_kernels_of_heads_of_their_own():
    position = build("mixed", Layout(width=64, heads=4, grid=(4, 4), depth=2))
    plane = torch.randn(3, 5, 2)
    assert kernel(position, plane, layer=1).shape == (4, 3, 5)
    torch.testing.assert_close(kernel(position, torch.zeros(1, 2)), torch.ones(4, 1))
    torch.testing.assert_close(kernel(position, plane), kernel(position, -plane))


@pytest.mark.parametrize(("base", "margin"), [(100, 0.034), (10, 0.059), (1e4, 0.021)])
def test_reversibility(base, margin):
    position = build(f"axial(base={base})", Layout(width=64, heads=1, grid=(14, 14)))
    assert reversibility_margin(position, (14, 14)) == pytest.approx(margin, abs=6e-4)


def test_a_kernel_needs_a_rotation():
    with pytest.raises(ValueError, match="a kernel needs a rotary scheme, such as axial or mixed"):
        kernel(build("learned", Layout(width=8, heads=1, grid=(2, 2))), torch.zeros(1, 2))


def test_plot_kernel(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "deep" / "kernel.png"
    main(["plot", "kernel", "axial", "mixed", "--out", str(out), "--grid", "7", "5"])
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert capsys.readouterr().out.strip() == str(out)
    with pytest.raises(SystemExit):
        main(["plot", "kernel", "none", "--out", str(tmp_path / "none.png")])
    assert "a kernel needs a rotary scheme" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def test_scheme_table_lists_every_scheme(capsys):
    main(["schemes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("(")[0].split()[0] for line in lines] == schemes()
    assert scheme_table() == "\n".join(lines)


def test_unknown_verbs(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["trian"])
    assert "no verb 'trian'" in capsys.readouterr().err
    main([])
    assert "vit-rope VERB" in capsys.readouterr().out
