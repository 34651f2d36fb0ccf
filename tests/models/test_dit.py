"""RopeDiT: compiled, exported, and with another spec."""

import weakref

import pytest
import torch

from vit_rope.models.block import last, run_blocks
from vit_rope.models.dit import RopeDiT
from vit_rope.models.vit import RopeViT


def model(position="mixed", **options):
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}
    net = RopeDiT(position=position, **sizes | options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # untrained models predict zeros
    return net


def images(*size):
    return torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(1))


def test_patches_are_put_back_where_they_were_taken_from():
    net, x = model("none", depth=1), images(4, 6)
    first = torch.autograd.functional.jacobian(lambda x: net(x, 3).sample[0, 0, 0, 0], x)[0]
    assert first[:, :2, :2].abs().min() > 0  # pixels of the same patch
    with torch.no_grad():
        net.embed.weight.copy_(torch.randn(8, 8).T.contiguous()[:8].repeat(2, 1))
        tokens = net.embed(x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))
        seen = []
        net.embed.register_forward_hook(lambda module, args, out: seen.append(out))
        net(x, 3)
    torch.testing.assert_close(seen[0], tokens)


@pytest.mark.parametrize("spec", ["mixed", "learned + axial", "recurrent"])
def test_one_graph_for_every_size(spec):
    net = model(spec)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True, dynamic=True)
    for size in ((8, 8), (4, 12), (16, 8)):
        x, time = images(*size), torch.tensor([3, 700])
        torch.testing.assert_close(compiled(x, time).sample, net(x, time).sample, rtol=1e-5, atol=1e-5)


def test_an_exported_model_computes_the_same():
    net, x, time = model(), images(8, 12), torch.tensor([3, 700])
    program = torch.export.export(net, (x, time), {"return_dict": False})
    torch.testing.assert_close(program.module()(x, time, return_dict=False)[0], net(x, time).sample)


def test_another_spec_keeps_what_was_learned_and_is_saved(tmp_path):
    net, x = model("mixed"), images(8, 8)
    before, freqs = net(x, 3).sample, net.position.freqs
    net.set_position("ntk(mixed, factor=4)")
    assert net.position.spec == net.config.position == "ntk(mixed, factor=4)"
    assert torch.equal(net.position.freqs, freqs)
    after = net(x, 3).sample
    assert (after - before).abs().max() > 1e-4
    net.save_pretrained(tmp_path)
    again = RopeDiT.from_pretrained(tmp_path).eval()
    assert again.config.position == "ntk(mixed, factor=4)"
    torch.testing.assert_close(again(x, 3).sample, after)


@pytest.mark.parametrize(
    ("options", "spec", "message"),
    [
        ({}, "axail", "did you mean axial"),
        ({}, "axial", "learns nothing, but the model's positions learned"),
        ({"position": "axial", "attention": "linear"}, "alibi", "linear attention has no logits"),
    ],
)
def test_a_spec_that_does_not_fit_changes_nothing(options, spec, message):
    net, x = model(**options), images(8, 8)
    before, position = net(x, 3).sample, net.position
    with pytest.raises(ValueError, match=message):
        net.set_position(spec)
    assert net.position is position
    assert net.config.position == position.spec
    assert torch.equal(net(x, 3).sample, before)


def test_the_loop_over_blocks():
    calls = []

    class Add(torch.nn.Module):
        def forward(self, x, amount):
            return x + amount

    def embed(x, layer):
        calls.append(layer)
        return 10 * x

    def checkpoint(block, x, amount):
        return block(x, amount) - 1

    blocks, x = [Add(), Add(), Add()], torch.zeros(1)
    assert [float(out) for out in run_blocks(blocks, x, 2)] == [2, 4, 6]
    assert [float(out) for out in run_blocks(blocks, x, 2, embed=embed)] == [2, 22, 222]
    assert calls == [1, 2]
    assert float(last(run_blocks(blocks, x, 2, checkpoint=checkpoint))) == 3


@torch.no_grad()
@pytest.mark.parametrize("net", [model(depth=3), RopeViT(16, 8, embed_dim=16, depth=3, num_heads=2, num_classes=2)])
def test_tokens_of_earlier_layers_are_freed(net):
    alive = []
    net.blocks[0].register_forward_pre_hook(lambda module, args: alive.append(weakref.ref(args[0])))
    net.blocks[0].register_forward_hook(lambda module, args, out: alive.append(weakref.ref(out)))
    net.blocks[2].register_forward_pre_hook(lambda module, args: seen.extend(ref() is None for ref in alive))
    seen = []
    net(*((images(8, 8), 3) if isinstance(net, RopeDiT) else (torch.randn(1, 3, 16, 16),)))
    assert seen == [True, True]
