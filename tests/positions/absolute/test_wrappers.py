"""Inject, and tables of wrapped schemes."""

import pytest
import torch

from tests.positions.absolute.helpers import made
from vit_rope.models.vit import RopeViT
from vit_rope.positions.coords import grid


@pytest.mark.parametrize(("layers", "acting"), [((-2, -1), {2, 3}), ((0, 3), {0, 3}), ((1, -3), {1})])
@pytest.mark.parametrize("scheme", ["learned", "sincos", "floater", "multiplicative", "peg"])
def test_inject_acts_before_the_given_layers(layers, acting, scheme):
    injected, plain = made(f"inject({scheme}, layers={layers})", (4, 5), depth=4), made(scheme, (4, 5), depth=4)
    x, coords = torch.randn(1, 20, 24), grid((4, 5))
    for layer in range(4):
        inner = plain.scheme if scheme == "peg" else plain
        want = inner.add(x, coords, None, layer) if layer in acting else x
        torch.testing.assert_close(injected.embed(x, coords, None, layer), want)


def test_inject_changes_the_input_of_layers_in_a_model():
    torch.manual_seed(0)
    net = RopeViT(16, 4, position="inject(learned, layers=(1,)) + axial(share='rest')", embed_dim=24, depth=3,
                  num_heads=2, reg_tokens=1).eval()  # fmt: skip
    seen = []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    net(torch.randn(1, 3, 16, 16))
    table = net.position.parts[0].scheme.table.flatten(0, 1)
    torch.testing.assert_close(seen[2], torch.cat((seen[1][:, :2], seen[1][:, 2:] + table), dim=1))
    assert torch.equal(seen[4], seen[3])


def test_tables_of_wrapped_schemes_are_resampled_when_loaded():
    for spec in ("inject(learned)", "concat", "multiplicative"):
        small, large = made(spec, (4, 6)), made(spec, (9, 5))
        large.load_state_dict(small.state_dict())
        coords = grid((9, 5))
        x = torch.ones(1, 45, 24)
        layer = 2 if spec.startswith("inject") else 0
        torch.testing.assert_close(large.embed(x, coords, [9, 5], layer), small.embed(x, coords, [9, 5], layer))
