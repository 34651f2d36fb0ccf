"""Memory between segments: its values, how far gradients flow, and a task that needs it."""

import copy
import re

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor
from torch.nn import functional as F

from vit_rope.models.memory import Reader
from vit_rope.models.vit import RopeViT
from vit_rope.positions.coords import grid


def vit(memory_tokens=2, **options):
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "num_classes": 4} | options
    return RopeViT(8, 4, 1, memory_tokens=memory_tokens, **sizes)


def segments(count=4, batch=3, seed=0):
    return torch.randn(count, batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"reg_tokens": 3}, {"patch_drop_rate": 0.5}])
def test_memory_is_what_the_last_registers_become(options):
    net, x = vit(**options).eval(), segments(2)
    net.reg_token *= 5  # only a norm removes this scale
    reader = Reader(copy.deepcopy(net))
    first = net.forward_features(x[0])
    prefix = net.num_prefix_tokens
    assert prefix == 1 + options.get("reg_tokens", 0) + 2
    memory = net.fc_norm(first[:, prefix - 2 : prefix])
    second = [net(x[1, i : i + 1]) for i in range(3)]
    for i in range(3):  # the memory of each sample replaces the learned tokens
        net.reg_token[:, -2:] = memory[i]
        second[i] = net(x[1, i : i + 1])
    logits, left = reader(x)
    torch.testing.assert_close(logits[0], net.forward_head(first))
    torch.testing.assert_close(logits[1], torch.cat(second), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left.std(dim=-1, correction=0), torch.ones(3, 2), rtol=1e-3, atol=0)


@torch.no_grad()
def test_a_sequence_can_be_read_in_parts():
    reader, x = Reader(vit().eval()), segments()
    complete, left = reader(x)
    first, memory = reader(x[:3])
    second, last = reader(list(x[3:]), memory)
    torch.testing.assert_close(torch.cat((first, second)), complete)
    torch.testing.assert_close(last, left)


@torch.no_grad()
def test_memory_has_no_position_and_segments_have_their_own():
    reader, x = Reader(vit(position="learned + axial").eval()), segments(2)
    first = grid((2, 2))
    coords = [first, first + torch.tensor([0.0, 2.0])]
    plain, shifted = reader(x)[0], reader(x, coords=coords)[0]
    torch.testing.assert_close(shifted[0], plain[0])
    assert (shifted[1] - plain[1]).abs().max() > 1e-4
    order = torch.tensor([2, 0, 3, 1])
    patches = x.unfold(3, 4, 4).unfold(4, 4, 4).flatten(3, 4)[:, :, :, order].unflatten(3, (2, 2))
    shuffled = patches.permute(0, 1, 2, 3, 5, 4, 6).reshape(x.shape)
    permuted, _ = reader(shuffled, coords=[c[order] for c in coords])
    torch.testing.assert_close(permuted, shifted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("horizon", "reached"),
    [(None, [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}]), (1, [{0}, {1}, {2}, {3}]), (2, [{0}, {0, 1}, {2}, {2, 3}]),
     (3, [{0}, {1}, {1, 2}, {1, 2, 3}]), (9, [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}])],
)  # fmt: skip
def test_the_horizon_limits_how_many_segments_gradients_reach(horizon, reached):
    x = segments().requires_grad_()
    logits, _ = Reader(vit(), horizon)(x)
    for i, expected in enumerate(reached):
        (gradient,) = torch.autograd.grad(logits[i].square().sum(), x, retain_graph=True)
        assert {j for j in range(4) if gradient[j].abs().max() > 0} == expected


def test_a_horizon_also_detaches_the_memory_that_is_passed_in():
    x = segments(2).requires_grad_()
    reader = Reader(vit(), 4)
    _, memory = reader(x[:1])
    logits, _ = reader(x[1:], memory)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    assert gradient[0].abs().max() == 0 < gradient[1].abs().max()


def recall(count, generator, samples=64):
    """Noisy segments and the corner (samples,), one of four, that is bright in the first segment
    only.
    """
    corner = torch.randint(4, (samples,), generator=generator)
    x = 0.3 * torch.randn(count, samples, 1, 8, 8, generator=generator)
    bright = F.one_hot(corner, 4).view(samples, 1, 2, 2).float()
    x[0] += 2 * F.interpolate(bright, scale_factor=4)
    return x, corner


def test_recalling_the_first_segment_at_the_last_needs_memory():
    net, generator = vit(), torch.Generator().manual_seed(0)
    reader, optimizer = Reader(net), torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(600):  # about 100, with these seeds
        x, corner = recall(3, generator)
        logits, _ = reader(x)
        loss = F.cross_entropy(logits.flatten(0, 1), corner.repeat(3))
        if loss < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x, corner = recall(3, generator, 256)
        remembered, forgotten = reader(x)[0][-1], net(x[-1])
    assert (remembered.argmax(-1) == corner).float().mean() > 0.95
    assert (forgotten.argmax(-1) == corner).float().mean() < 0.4


def test_without_memory_nothing_changes_and_with_it_timms_tools_work():
    torch.manual_seed(0)
    plain = timm.create_model("vit_rope_test_patch16_64", reg_tokens=2)
    torch.manual_seed(0)
    memory = timm.create_model("vit_rope_test_patch16_64", memory_tokens=2).eval()
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in memory.state_dict().items()}
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(create_feature_extractor(memory, ["head"])(x)["head"], memory(x))
    assert memory.forward_intermediates(x, [1], return_prefix_tokens=True)[1][0][1].shape == (2, 3, 64)
    torch._dynamo.reset()
    compiled = torch.compile(Reader(memory), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled([x, x]), Reader(memory)([x, x]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vit(-1), "memory_tokens is a number of tokens, 0 or more, got -1"),
        (lambda: Reader(vit(0)), "this RopeViT has no memory; create it with memory_tokens=…"),
        (lambda: Reader(vit(), 0), "horizon is a number of segments, 1 or more, got 0"),
        (lambda: Reader(vit())([]), "expected one or more segments, and coordinates of the same number of them, got 0"),
        (
            lambda: Reader(vit())(segments(), coords=[grid((2, 2))]),
            "the same number of them, got 4 and coordinates of 1",
        ),
        (
            lambda: Reader(vit())(segments(), torch.zeros(3, 1, 32)),
            "memory of shape (3, 1, 32) was given, but expected (3, 2, 32)",
        ),
        (
            lambda: vit(0).forward_features(segments()[0], memory=torch.zeros(3, 1, 32)),
            "memory of shape (3, 1, 32) was given, but this model has none; create it with memory_tokens=…",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
