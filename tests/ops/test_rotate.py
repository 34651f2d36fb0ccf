"""`ops.rotate` in all layouts and dtypes: in place or not, forward, backward, twice backward."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracles
from vit_rope.ops import eager, gradient
from vit_rope.ops.rotate import formula, rotate, rotate_groups
from vit_rope.ops.tables import angles, cos_sin, on_circle
from vit_rope.positions.coords import grid


def table(theta):
    return torch.stack((theta.cos(), theta.sin()), dim=-1)


def placed(theta):
    """The table of angles (B, N, H, R), made as schemes make theirs: every token has an axis."""
    samples, tokens, heads, pairs = theta.shape
    coords = torch.eye(samples * tokens, dtype=theta.dtype).unflatten(0, (samples, tokens))
    return cos_sin(theta.transpose(1, 2).transpose(0, 1).reshape(1, heads, samples * tokens, pairs), coords)[0]


def by_hand(x, theta, stride, prefix):
    """Rotate every pair of x (B, H, N, D) by its own 2 x 2 matrix, in float64."""
    out = x.double().clone()
    samples, tokens, heads, pairs = theta.shape
    for b, h, n in ((b, h, n) for b in range(len(x)) for h in range(x.shape[1]) for n in range(tokens)):
        for j in range(pairs):
            first = j // stride * 2 * stride + j % stride
            angle = float(theta[b % samples, n, h % heads, j])
            pair = x[b, h, prefix + n, [first, first + stride]].double()
            matrix = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            out[b, h, prefix + n, [first, first + stride]] = matrix.double() @ pair
    return out


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 4),
    prefix=st.integers(0, 2),
    stride=st.sampled_from([1, 2, 4]),
    extra=st.integers(0, 3),
    shared=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    overwrite=st.booleans(),
    grouped=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_implementation_rotates_each_pair_by_its_matrix(
    batch, heads, tokens, prefix, stride, extra, shared, dtype, overwrite, grouped, seed
):
    generator = torch.Generator().manual_seed(seed)
    pairs, width = 4, 8 + extra
    theta = 5 * torch.randn(1 if shared[0] else batch, tokens, 1 if shared[1] else heads, pairs, generator=generator)
    groups = 3 if grouped else 1
    x = torch.randn(batch, prefix + tokens, groups, heads, width, generator=generator).to(dtype)
    wanted = [group.transpose(1, 2).clone() for group in x.unbind(2)]
    kept = x.clone()
    rotating = 2 if grouped else 1
    out = rotate_groups(x, table(theta), rotating, stride, prefix, overwrite)
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-5)
    for i, (got, want) in enumerate(zip(out, wanted, strict=True)):
        assert got.dtype == dtype
        want = by_hand(want, theta, stride, prefix) if i < rotating else want.double()
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
        plain = formula(kept[:, :, i], table(theta), stride, prefix).transpose(1, 2) if i < rotating else got
        torch.testing.assert_close(plain, got, rtol=tolerance, atol=tolerance)
    assert overwrite or torch.equal(x, kept)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (2, 3, 2, 2), (1, 3, 2, 2)])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", [table, lambda theta: 0.7 * table(theta), placed])
def test_gradients_of_channels_and_of_angles(stride, prefix, shape, overwrite, make):
    torch.manual_seed(0)
    x = torch.randn(2, prefix + 3, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    theta = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def rotated(x, theta):
        return rotate_groups(x * 1.0, make(theta), 2, stride, prefix, overwrite)

    assert torch.autograd.gradcheck(rotated, (x, theta))
    assert torch.autograd.gradgradcheck(lambda x, theta: rotated(x, theta)[:2], (x, theta))


@pytest.mark.parametrize("shape", [(1, 3, 1, 4), (1, 3, 2, 4), (5, 3, 2, 4)])
@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_in_pieces_equals_a_batch_at_once(shape, stride, dtype, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(5, 4, 3, 2, 9).to(dtype)
    theta = 5 * torch.randn(shape)
    upstream = torch.randn(3, 5, 2, 4, 9).to(dtype)
    results = {}
    # bytes that fit all 5 samples; 3 and then 2 (backward: 2, 2 and 1); one at a time
    for limit in (10**9, 900, 300):
        monkeypatch.setattr(eager, "SCRATCH", limit)
        monkeypatch.setattr(gradient, "SCRATCH", limit)
        leaf, angle = x.clone().requires_grad_(), theta.clone().requires_grad_()
        out = rotate_groups(leaf * 1, placed(angle), 2, stride, 1, overwrite=True)
        for got, want in zip(out[:2], x.unbind(2), strict=False):
            want = by_hand(want.transpose(1, 2), theta, stride, 1)
            torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=2**-7)
        results[limit] = [*out, *torch.autograd.grad(out, [leaf, angle], list(upstream))]
    for at_once, *others in zip(*results.values(), strict=True):
        for in_pieces in others:
            torch.testing.assert_close(in_pieces, at_once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("full_grid", [False, True])
def test_gradients_of_frequencies(full_grid):
    torch.manual_seed(0)
    freqs = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    coords = grid((2, 3)).double()
    sizes = [2, 3] if full_grid else None
    assert torch.autograd.gradcheck(lambda freqs: cos_sin(freqs, coords, sizes), (freqs,))
    assert torch.autograd.gradgradcheck(lambda freqs: cos_sin(freqs, coords, sizes), (freqs,))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (2, 3, 2, 2), (1, 3, 2, 2)])
def test_gradients_of_a_table_of_any_modulus(shape, stride, overwrite):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    entries = torch.randn(*shape, 2, dtype=torch.float64)
    entries[0, 0, 0, 0] = 0  # a decay that underflows

    def rotated(x, entries):
        return rotate_groups(x * 1.0, entries, 2, stride, 1, overwrite)

    assert torch.autograd.gradcheck(rotated, (x, entries.requires_grad_()))
    assert torch.autograd.gradgradcheck(lambda x, entries: rotated(x, entries)[:2], (x, entries))


def test_tables_of_modulus_one_are_recognised():
    freqs = torch.randn(2, 1, 2, 4, requires_grad=True)
    made = cos_sin(freqs, grid((2, 3)))
    assert all(on_circle(layer) for layer in (*made.unbind(0), made[1]))
    assert not any(on_circle(t) for t in (0.7 * made[0], made[0].detach(), table(torch.randn(1, 3, 1, 4))))


def test_gradients_of_coordinates():
    coords = grid((2, 3)).double().requires_grad_()
    freqs = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda coords: cos_sin(freqs, coords, [2, 3]), (coords,))


@pytest.mark.parametrize("shape", [(9,), (4, 5), (2, 3, 4), (2, 2, 2, 3)])
def test_the_table_of_a_full_grid_is_a_product_over_its_axes(shape):
    torch.manual_seed(0)
    freqs = torch.randn(3, 2, len(shape), 6)
    coords = grid(shape) * 1.7 - 3.1  # shifted and stretched, as augmentation does
    theta = angles(freqs.double(), coords.double())
    for sizes in (None, list(shape)):
        torch.testing.assert_close(cos_sin(freqs, coords, sizes).double(), table(theta), rtol=0, atol=5e-6)
    for n, point in enumerate(coords.double()):
        matrix = oracles.rotation_matrix(point, freqs[1, 0].double())
        torch.testing.assert_close(theta[1, 0, n, 0].cos(), matrix.diagonal()[::2], rtol=0, atol=1e-9)


def test_autograd_reports_a_needed_tensor_that_was_overwritten():
    x = torch.randn(1, 3, 3, 2, 4, requires_grad=True)
    projected = x * 1.0
    squares = (projected * projected).sum()  # saves `projected` for its gradient
    q, _, _ = rotate_groups(projected, table(torch.randn(1, 3, 1, 2)), 2, overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squares + q.sum()).backward()


def test_rotation_saves_only_its_table_for_the_backward_pass():
    kept = []
    x = torch.randn(2, 8, 3, 2, 16, requires_grad=True)
    cos_sin = table(torch.randn(1, 8, 1, 8))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotate_groups(x * 1.0, cos_sin, 2)
    kept = [t for t in kept if t.ndim]
    assert [t.data_ptr() for t in kept] == [cos_sin.data_ptr()]


def test_a_rotation_in_place_needs_no_more_memory_than_no_positions():
    x = torch.randn(2, 8, 3, 2, 16, requires_grad=True)
    learned = cos_sin(torch.randn(1, 2, 1, 8, requires_grad=True), grid((8,)))[0]
    for overwrite, copies in ((True, 3), (False, 5)):  # in units of the size of the queries
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            groups = rotate_groups(x * 1.0, learned, 2, overwrite=overwrite)
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*groups, *kept] if t.ndim > 3
        }
        tables = 4 * 8 * 2 * 8 * 2
        assert sum(storages.values()) == copies * groups[0].nbytes + tables


def test_odd_strides_are_copied():
    x = torch.randn(2, 2, 3, 7)  # heads of 7 channels: the second head starts at an odd offset
    theta = torch.randn(1, 3, 1, 3)
    for overwrite in (False, True):
        torch.testing.assert_close(
            rotate(x.clone(), table(theta), overwrite=overwrite).double(), by_hand(x, theta, 1, 0), rtol=0, atol=1e-5
        )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own jvp calls it
def test_function_transforms():
    theta = torch.randn(1, 3, 1, 2)
    x = torch.randn(5, 2, 2, 3, 4)
    each = torch.func.vmap(lambda x: rotate(x, table(theta)))(x)
    torch.testing.assert_close(each, torch.stack([rotate(part, table(theta)) for part in x]))
    _, along = torch.func.jvp(lambda x: rotate(x, table(theta)), (x[0],), (x[1],))
    torch.testing.assert_close(along, rotate(x[1], table(theta)))


def test_a_leaf_that_learns_is_not_overwritten():
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    kept = x.detach().clone()
    rotate(x, table(torch.randn(1, 3, 1, 2)), overwrite=True)
    assert torch.equal(x, kept)


def test_a_single_token_at_an_odd_offset():
    x = torch.randn(1, 2, 1, 1, 9, dtype=torch.float64)  # contiguous after the class token, at an offset of 9
    theta = torch.rand(1, 1, 1, 4)
    (out,) = rotate_groups(x.float(), table(theta), 1, 1, 1)
    want = by_hand(x[:, :, 0].transpose(1, 2), theta, 1, 1)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


def test_channels_from_an_odd_offset():
    x = torch.randn(2, 2, 3, 10)[..., 1:9]
    theta = torch.randn(1, 3, 1, 4)
    torch.testing.assert_close(rotate(x, table(theta)).double(), by_hand(x, theta, 1, 0), rtol=0, atol=1e-5)
