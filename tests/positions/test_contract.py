"""The contract of every registered scheme, on one, two and three axes."""

import copy
import io

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_flatten

from tests.helpers import EVERY, EXCLUDED, make
from vit_rope.attention import attend
from vit_rope.models.vit import RopeViT
from vit_rope.positions import Encoding, Position
from vit_rope.positions.coords import grid
from vit_rope.positions.transform import Transform


def tokens(layout, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, len(layout.coords()), layout.width, generator=generator, dtype=torch.float64)
    weights = torch.randn(3, layout.width, layout.width, generator=generator, dtype=torch.float64) / 4
    return x, weights


def run(position, layout, coords, x, weights, layer=1, grid=None):
    """The output (B, H, N, D) of one attention layer with a position scheme, in float64."""
    q, k, v = _heads(embedded(position, layout, x, coords, grid), weights, layout)
    return attend(q, k, v, position(coords, grid=grid), layer)


def embedded(position, layout, x, coords, grid=None):
    """Tokens with the embeddings that a scheme adds before each layer."""
    for layer in range(layout.depth if position.each_layer else 1):
        x = position.embed(x, coords, grid, layer)
    return x


def _heads(x, weights, layout):
    return [(x @ w).unflatten(-1, (layout.heads, -1)).transpose(1, 2) for w in weights]


def same(a: Encoding, b: Encoding) -> bool:
    (xs, shape), (ys, other) = tree_flatten(a), tree_flatten(b)
    return shape == other and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(xs, ys, strict=True)
    )


def weights_of(q, k, encoding, layer=0):
    """Attention weights (B, H, N, M), computed as the output for one-hot values."""
    terms = encoding.term_lists and [[term for term in terms if term.acts_on != "v"] for terms in encoding.term_lists]
    encoding = encoding._replace(v=Transform(), out=Transform(), term_lists=terms)
    return attend(q, k, torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1), encoding, layer)


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_relative_schemes_ignore_shifts_and_others_do_not(spec, axes):
    position, layout = make(spec, axes)
    x, weights = tokens(layout)
    coords = layout.coords().double()
    coords = coords + torch.rand(coords.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    shift = torch.tensor([1.37, -1.21, 2.5], dtype=torch.float64)[:axes]
    original, shifted = (run(position, layout, c, x, weights) for c in (coords, coords + shift))
    if position.relative:
        torch.testing.assert_close(original, shifted, rtol=0, atol=1e-6)
    else:
        assert (original - shifted).abs().max() > 1e-4


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_permuting_tokens_with_their_coordinates_permutes_the_output(spec, axes):
    position, layout = make(spec, axes)
    x, weights = tokens(layout)
    coords = layout.coords().double()
    order = torch.randperm(len(coords), generator=torch.Generator().manual_seed(3))
    out = run(position, layout, coords, x, weights)
    permuted = run(position, layout, coords[order], x[:, order], weights)
    torch.testing.assert_close(out[:, :, order], permuted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_coordinates_of_each_sample_equal_shared_ones(spec, axes):
    position, layout = make(spec, axes)
    x, weights = tokens(layout)
    coords = layout.coords().double()
    shared = run(position, layout, coords, x, weights)
    each = run(position, layout, coords.expand(2, -1, -1).contiguous(), x, weights)
    torch.testing.assert_close(shared, each, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_passing_the_training_grid_changes_nothing(spec, axes):
    position, layout = make(spec, axes)
    x, weights = tokens(layout)
    coords = layout.coords().double()
    out = run(position, layout, coords, x, weights)
    with_grid = run(position, layout, coords, x, weights, grid=list(layout.grid))
    torch.testing.assert_close(out, with_grid, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_key_coordinates_select_a_part_of_all_keys(spec, axes):
    position, layout = make(spec, axes)
    x, weights = tokens(layout)
    coords = layout.coords().double()
    q, k, v = _heads(embedded(position, layout, x, coords), weights, layout)
    all_keys = attend(q, k[:, :, ::2], v[:, :, ::2], position(coords, key_coords=coords[::2]), 2)
    some = attend(q[:, :, 3:], k[:, :, ::2], v[:, :, ::2], position(coords[3:], key_coords=coords[::2]), 2)
    torch.testing.assert_close(all_keys[:, :, 3:], some, rtol=0, atol=1e-12)
    mask = torch.zeros(len(coords), dtype=torch.bool)
    mask[::2] = True
    masked = attend(q, k, v, position(coords), 2, mask=mask[None])
    torch.testing.assert_close(all_keys, masked, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("spec", "axes"), EVERY)
@pytest.mark.parametrize("prefix", [1, 5])
def test_prefix_tokens_have_no_position(spec, axes, prefix):
    position, layout = make(spec, axes)
    coords = layout.coords().double()
    generator = torch.Generator().manual_seed(2)
    count = prefix + len(coords)
    q, k = torch.randn(2, 2, layout.heads, count, layout.head_dim, generator=generator, dtype=torch.float64)
    for layer in range(layout.depth):
        padded = weights_of(q, k, position(coords, prefix=prefix), layer)
        among = padded[..., prefix:, prefix:] / padded[..., prefix:, prefix:].sum(dim=-1, keepdim=True)
        bare = weights_of(q[:, :, prefix:], k[:, :, prefix:], position(coords), layer)
        torch.testing.assert_close(among, bare, rtol=0, atol=1e-12)
        shifted = weights_of(q, k, position(coords + 3.25, prefix=prefix), layer)
        among_prefix, after_shift = (w[..., :prefix, :prefix] for w in (padded, shifted))
        among_prefix, after_shift = (w / w.sum(dim=-1, keepdim=True) for w in (among_prefix, after_shift))
        torch.testing.assert_close(among_prefix, after_shift, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_casts_and_autocast_do_not_change_the_tables(spec, axes):
    position, layout = make(spec, axes)
    coords = 50 * layout.coords()
    want = position(coords, prefix=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(position(coords, prefix=1), want)
    for cast in (Position.bfloat16, Position.half, lambda p: p.to(torch.float16), lambda p: p.bfloat16().float()):
        converted = cast(copy.deepcopy(position))
        assert all(p.dtype == torch.float32 for p in converted.parameters())
        assert same(converted(coords, prefix=1), want)


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_copies_and_the_meta_device_keep_the_tables(spec, axes):
    position, layout = make(spec, axes)
    coords = layout.coords()
    want = position(coords)
    file = io.BytesIO()
    torch.save(position, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=False)(coords), want)
    with torch.device("meta"):
        empty, _ = make(spec, axes, seed=5)
    assert all(p.is_meta for p in empty.parameters())
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(position.state_dict())
    assert same(empty(coords), want)
    x, _ = tokens(layout)
    expected, actual = (embedded(p, layout, x, coords) for p in (position, empty))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_reset_parameters_sets_every_parameter(spec, axes):
    position, _ = make(spec, axes)
    with torch.no_grad():
        for parameter in position.parameters():
            parameter.fill_(float("nan"))
    for module in position.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(p.isfinite().all() for p in position.parameters())


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_reset_parameters_draws_again_what_is_random(spec, axes):
    position, _ = make(spec, axes)
    first = {key: value.clone() for key, value in position.state_dict().items()}
    other = make(spec, axes, seed=1)[0].state_dict()
    random = [key for key, value in other.items() if not torch.equal(value, first[key])]
    for module in position.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for key, value in position.state_dict().items():
        assert torch.equal(value, first[key]) == (key not in random), key


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_gradients_reach_every_parameter(spec, axes):
    position, layout = make(spec, axes)
    x, weights = tokens(layout)
    x.requires_grad_()  # so that schemes without parameters run backward too
    loss = sum(
        run(position, layout, layout.coords(), x, weights, layer).square().sum() for layer in range(layout.depth)
    )
    loss.backward()
    for name, parameter in position.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_the_state_dict_holds_learned_tensors_only(spec, axes):
    position, _ = make(spec, axes)
    assert list(position.buffers()) == []
    assert set(position.state_dict()) == {name for name, _ in position.named_parameters()}
    assert all(parameter.requires_grad for parameter in position.parameters())


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_calls_do_not_depend_on_earlier_calls(spec, axes):
    position, layout = make(spec, axes)
    want = position(layout.coords(), prefix=1)
    with torch.inference_mode():
        position(grid([n + 3 for n in layout.grid]), prefix=2)
    position(layout.coords() + 100.5)
    assert same(position(layout.coords(), prefix=1), want)


@pytest.mark.parametrize(("spec", "axes"), EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_attention_keeps_the_dtype_of_its_input(spec, axes, dtype):
    position, layout = make(spec, axes)
    coords = layout.coords()
    q = torch.randn(1, layout.heads, len(coords), layout.head_dim, dtype=dtype)
    assert attend(q, q, q, position(coords)).dtype == dtype
    x = torch.randn(1, len(coords), layout.width, dtype=dtype)
    assert embedded(position, layout, x, coords).dtype == dtype


SIZES = {
    1: [(32,), (48,), (40,), (64,), (56,), (80,)],
    2: [(32, 32), (32, 48), (48, 32), (64, 64), (40, 56), (80, 32)],
    3: [(16, 24, 32), (24, 24, 32), (16, 16, 16), (32, 16, 24), (24, 40, 16), (16, 32, 48)],
}


def small_vit(spec, axes):
    torch.manual_seed(0)
    size = {"embed_dim": 48, "depth": 1, "num_heads": 2, "num_classes": 5, "dynamic_img_size": True}
    return RopeViT(SIZES[axes][0], (8,) * axes, position=spec, **size).eval()


# compiling takes minutes, so tests that are not slow compile a few schemes only; the slow ones
# cover every scheme on images, and the schemes of KINDS on signals and videos too
KINDS = (
    "axial",
    "mixed",
    "flat",
    "learned",
    "sincos",
    "peg",
    "alibi",
    "swin",
    "shaw",
    "yarn(axial)",
    "learned + mixed",
)
FAST = [(spec, 2) for spec in ("axial", "mixed", "peg", "swin", "shaw", "learned + mixed")]
COMPILED = [
    pytest.param(spec, axes, marks=() if (spec, axes) in FAST else pytest.mark.slow)
    for spec, axes in EVERY
    if axes == 2 or spec in KINDS or (spec, 2) in EXCLUDED
]


@pytest.mark.parametrize(("spec", "axes"), COMPILED)
def test_two_graphs_suffice_for_six_sizes(spec, axes):
    torch._dynamo.reset()
    model, counter = small_vit(spec, axes), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for size in SIZES[axes]:
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("spec", "axes"), COMPILED)
def test_an_exported_model_runs_at_other_sizes(spec, axes):
    model = small_vit(spec, axes)
    dims = [8 * torch.export.Dim(f"cells_{a}", min=2, max=16) for a in range(axes)]
    shapes = ({0: torch.export.Dim("batch", min=2, max=16)} | {2 + a: dim for a, dim in enumerate(dims)},)
    program = torch.export.export(model, (torch.randn(2, 3, *SIZES[axes][1]),), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            assert not value.is_complex()
            assert value.dtype != torch.float64
    for size in SIZES[axes]:
        x = torch.randn(3, 3, *size)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)
