"""attend against loops in float64, and its calls of torch's kernels."""

import itertools
import re

import pytest
import torch
from torch.nn import functional as F

from tests import oracles
from vit_rope.attention import attend, attend_qkv
from vit_rope.ops.rotate import may_overwrite
from vit_rope.positions import Encoding, Layout, build
from vit_rope.positions.coords import grid
from vit_rope.positions.encoding import RelativeTerm
from vit_rope.positions.transform import Transform

COORDS = grid((2, 3)).double()
ROTARY = build("mixed", Layout(width=16, heads=2, grid=(2, 3), depth=3))(COORDS, prefix=1)
FIXED = ROTARY._replace(q=Transform(rotation=[table.detach() for table in ROTARY.q.rotation]))


def qkv(tokens=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 2, tokens, 8, generator=generator, dtype=torch.float64).to(dtype).unbind(0)


def biased(layers=3, heads=2):
    bias = torch.randn(layers, 1, heads, 7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return FIXED._replace(biases=list(bias))


CLOSED = torch.rand(7, 7, generator=torch.Generator().manual_seed(2)) < 0.3
CLOSED.fill_diagonal_(False)
CAUSAL = torch.ones(7, 7, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("encoding", [Encoding(), FIXED, biased(), biased(1, 1)])
@pytest.mark.parametrize("masking", ["none", "bool", "float", "causal"])
def test_attend_is_the_loop(fused, encoding, masking):
    q, k, v = qkv()
    options = {
        "none": {},
        "bool": {"mask": ~CLOSED},
        "float": {"mask": torch.zeros(7, 7, dtype=torch.float64).masked_fill(CLOSED, float("-inf"))},
        "causal": {"causal": True},
    }[masking]
    closed = {"bool": CLOSED, "float": CLOSED, "causal": CAUSAL}.get(masking)
    for layer in (0, 1, 2):
        out = attend(q, k, v, encoding, layer, fused=fused, **options)
        for b in range(2):
            for h in range(2):
                rows = [q[b, h], k[b, h]]
                if encoding.q.rotation:
                    table = encoding.q.rotation[layer % 3][0, :, h]
                    angle = torch.cat((torch.zeros(1, 4), torch.atan2(table[..., 1], table[..., 0])))
                    rows = [
                        torch.stack([oracles.rotation_matrix([1.0], angle[n][None]) @ x[n] for n in range(7)])
                        for x in rows
                    ]
                bias = None
                if encoding.biases:
                    bias = encoding.biases[layer % len(encoding.biases)]
                    bias = bias[0, h % bias.shape[1]]
                want = oracles.attention(*rows, v[b, h], bias, closed)
                torch.testing.assert_close(out[b, h], want, rtol=0, atol=1e-9)


def misfit(spec, heads, batch, tokens=6):
    """Attention under an encoding of 2 heads, 2 samples and 6 tokens."""
    position = build(spec, Layout(width=16, heads=2, grid=(2, 3), depth=1))
    q, k, v = torch.randn(3, batch, heads, tokens, 8)
    return attend(q, k, v, position(COORDS.expand(2, -1, -1)))


@pytest.mark.parametrize("encoding", [Encoding(), ROTARY, biased()])
def test_attend_qkv_is_the_same_function(encoding):
    packed = torch.randn(2, 7, 48)
    q, k, v = packed.view(2, 7, 3, 2, 8).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(attend_qkv(packed, 2, encoding, 1), attend(q, k, v, encoding, 1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "share",
    [
        lambda q, k, v: (q, q, v),
        lambda q, k, v: (q, k, k),
        lambda q, k, v: (q, k, q),
        lambda q, k, v: (q, q[:, :, 1:], v[:, :, 1:]),
        lambda q, k, v: (q, k[:, :1].expand(-1, 2, -1, -1), v),
        lambda q, k, v: torch.stack((q, k, v)).unbind(0),
    ],
)
def test_tensors_that_share_memory_are_not_overwritten(share, dtype):
    q, k, v = share(*torch.randn(3, 2, 2, 7, 8).to(dtype))
    places = grid((7,)), grid((7,))[7 - k.shape[2] :]
    encoding = build("axial", Layout(width=16, heads=2, grid=(7,)))(places[0], key_coords=places[1])
    want = attend(q.clone(), k.clone(), v.clone(), encoding)
    kept = [t.clone() for t in (q, k, v)]
    torch.testing.assert_close(attend(q, k, v, encoding, overwrite=True), want, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), kept, strict=True))


def test_what_may_be_overwritten():
    q, k, v = (torch.randn(2, 2, 7, 8) for _ in range(3))
    assert may_overwrite(q, k.transpose(1, 2), v[:, :, 1:])
    assert may_overwrite(torch.randn(2, 8, 3, 5).flatten(2).transpose(1, 2))  # heads cut out of a convolution's map
    assert may_overwrite(torch.randn(1, 1, 1, 1).expand(1, 1, 1, 1), q[:0])
    assert not may_overwrite(q, k, k)
    assert not may_overwrite(torch.randn(9).unfold(0, 4, 2))
    assert not may_overwrite(q.requires_grad_(), k)


def test_attend_qkv_does_not_change_its_input():
    packed = torch.randn(2, 7, 48)
    kept = packed.clone()
    attend_qkv(packed, 2, ROTARY)
    assert torch.equal(packed, kept)


@pytest.mark.parametrize("spec", ["none", "axial", "mixed", "flat", "learned + mixed", "sincos"])
def test_without_a_bias_no_mask_reaches_the_kernel(spec, monkeypatch):
    seen = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(a[3]) or kernel(*a, **k))
    encoding = build(spec, Layout(width=16, heads=2, grid=(2, 3)))(COORDS, prefix=1)
    attend(*qkv(), encoding)
    attend(*qkv(), biased())
    assert seen[0] is None
    assert seen[1].shape == (1, 2, 7, 7)


@pytest.mark.parametrize("spec", ["axial", "mixed", "alibi", 'alibi(distance="quadratic")', "shaw", "swin", "liere"])
def test_keys_may_have_more_tokens_without_a_position_than_queries(spec):
    torch.manual_seed(0)
    position = build(spec, Layout(width=16, heads=2, grid=(2, 3), depth=1))
    q, k = torch.randn(1, 2, 7, 8, dtype=torch.float64), torch.randn(1, 2, 9, 8, dtype=torch.float64)
    v = torch.eye(9, dtype=torch.float64).expand(1, 2, -1, -1)
    encoding = position(COORDS, prefix=1, key_coords=COORDS, key_prefix=3)
    weights = attend(q, k, v, encoding)
    placed = attend(q[:, :, 1:], k[:, :, 3:], v[:, :, 3:, 3:], position(COORDS))
    among = weights[:, :, 1:, 3:] / weights[:, :, 1:, 3:].sum(dim=-1, keepdim=True)
    torch.testing.assert_close(among, placed, rtol=0, atol=1e-9)
    plain = (q[:, :, :1] @ k[:, :, :3].transpose(-2, -1) / 8**0.5).softmax(dim=-1)
    rest = weights[:, :, :1, :3] / weights[:, :, :1, :3].sum(dim=-1, keepdim=True)
    torch.testing.assert_close(rest, plain, rtol=0, atol=1e-9)


def test_dropout_zeroes_weights():
    torch.manual_seed(0)
    q, k, v = qkv()
    for fused in (True, False):
        assert not torch.equal(attend(q, k, v, ROTARY, dropout=0.5, fused=fused), attend(q, k, v, ROTARY, fused=fused))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: attend(*qkv(8), ROTARY),
            "the encoding is for 7 tokens, but there are 8 queries; "
            "give position(coords, prefix=…) the number of tokens that have no position",
        ),
        (lambda: attend(qkv()[0], *qkv(8)[1:], ROTARY), "the encoding is for 7 tokens, but there are 8 keys"),
        (
            lambda: attend(*qkv(8), Encoding(biases=[torch.zeros(1, 1, 7, 7)])),
            "is for 7 tokens, but there are 8 queries",
        ),
        (lambda: attend(*qkv(), ROTARY, mask=~CLOSED, causal=True), "attend takes a mask or causal=True, not both"),
        (
            lambda: attend(*qkv(), Encoding(biases=[torch.zeros(1, 1, 7, 8)])),
            "is for 8 tokens, but there are 7 keys",
        ),
        (
            lambda: attend(
                *qkv(), Encoding(term_lists=[[RelativeTerm(torch.ones(1, 1, 8), torch.zeros(1, 7, 6).long(), "v")]])
            ),
            "is for 6 tokens, but there are 7 keys",
        ),
        *(
            (call, f"the encoding is for {count}")
            for spec in ("axial", "axial(learned=True)", "alibi", 'alibi(distance="quadratic")', "tupe", "swin")
            for heads, batch, count in ((3, 2, "2 heads"), (1, 2, "2 heads"), (2, 3, "a batch of 2"))
            for call in (lambda spec=spec, heads=heads, batch=batch: misfit(spec, heads, batch),)
            if batch == 3 or spec != "axial"
        ),
        (lambda: misfit('alibi(distance="quadratic")', 2, 2, 5), "the encoding is for 6 tokens, but there are 5"),
        (lambda: misfit("sandwich", 2, 2, 5), "the encoding is for 6 tokens, but there are 5"),
        (lambda: misfit("axial", 2, 2, 5), "the encoding is for 6 tokens, but there are 5"),
        (
            lambda: build("axial", Layout(width=16, heads=2, grid=(2, 3)))(COORDS, prefix=-1),
            "the number of tokens without a position must be 0 or more, got -1 and -1",
        ),
        *(
            (
                lambda spec=spec: build(spec, Layout(width=16, heads=2, grid=(2, 3)))(COORDS, grid=[6]),
                "grid [6] has 1 axes, but the coordinates have 2; give the number of cells along each axis",
            )
            for spec in ("axial", "mixed", "flat")
        ),
        (
            lambda: attend_qkv(
                torch.zeros(1, 6, 72), 3, build("mixed", Layout(width=32, heads=2, grid=(2, 3), depth=1))(COORDS)
            ),
            "the encoding is for 2 heads, but there are queries of 3; build the scheme with a Layout of 3 heads",
        ),
        (
            lambda: attend_qkv(torch.zeros(1, 7, 50), 2, ROTARY),
            "50 channels do not divide into queries, keys and values of 2 heads",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("placed", [1, 5])
def test_bases_are_matrices_of_heads_their_blocks_or_one_for_all_tokens(shared, placed):
    generator = torch.Generator().manual_seed(4)
    q, k, v = torch.randn(3, 2, 3, placed + 1, 8, generator=generator, dtype=torch.float64)
    blocks = torch.randn(
        1 if shared else 2, placed, 1 if shared else 3, 4, 2, 2, generator=generator, dtype=torch.float64
    )
    dense = torch.zeros(*blocks.shape[:3], 8, 8, dtype=torch.float64)
    for s in range(4):
        dense[..., 2 * s : 2 * s + 2, 2 * s : 2 * s + 2] = blocks[..., s, :, :]
    rotated = [x.clone() for x in (q, k)]
    for x, y in zip((q, k), rotated, strict=True):
        for b, h, n in itertools.product(range(2), range(3), range(placed)):  # the first token has no position
            y[b, h, n + 1] = x[b, h, n + 1] @ dense[b % len(dense), n, h % dense.shape[2]]
    want = attend(*rotated, v, Encoding())
    for basis in (blocks, dense):
        got = attend(q, k, v, Encoding(Transform(basis=[basis]), prefix=(1, 1)))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    own = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
    got = attend(q, k, v, Encoding(Transform(basis=[own]), prefix=(1, 1)))
    torch.testing.assert_close(got, attend(q @ own, k @ own, v, Encoding()), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("none", "Encoding(prefix 1, 1)"),
        ("axial", "Encoding(q: rotation of 4 pairs; prefix 1, 1)"),
        ("swin", "Encoding(bias of 12 layer(s); prefix 1, 1)"),
        ("shaw + yarn(axial)", "Encoding(q: rotation of 4 pairs; terms of 12 layer(s); scale 1.143; prefix 1, 1)"),
        ('alibi(distance="quadratic")', "Encoding(q: 6 extra channels; k: 6 extra channels; prefix 1, 1)"),
    ],
)
def test_encodings_print_in_one_line(spec, text):
    layout = Layout(width=16, heads=2, grid=(2, 3))
    assert repr(build(spec, layout)(layout.coords(), prefix=1)) == text


def test_layers_beyond_the_depth_are_refused():
    layout = Layout(width=16, heads=2, grid=(2, 3), depth=3)
    q = torch.randn(1, 2, 6, 8)
    for spec in ("mixed", "swin", "shaw"):
        encoding = build(spec, layout)(layout.coords())
        for layer in (-1, 3, 40):
            with pytest.raises(ValueError, match=f"layer {layer} does not exist: the encoding is for 3 layers"):
                attend(q, q, q, encoding, layer)
    shared = build("axial", layout)(layout.coords())
    assert attend(q, q, q, shared, 40).shape == q.shape  # one table serves all layers
