"""The Triton kernel without a GPU: results in Triton's interpreter, compilation for two
architectures.
"""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton runs on Linux only")

INTERPRETED = """
import torch
from vit_rope.ops.triton import rotate_pairs
from vit_rope.ops.rotate import formula

torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-6), (torch.float16, 2**-9)):
    for heads, shared, pairs, stride in ((3, True, 4, 1), (2, False, 6, 1), (2, False, 6, 6), (1, True, 6, 3)):
        qkv = torch.randn(2, 19, 3, heads, 2 * pairs + 1).to(dtype)
        x = qkv[:, 1:, :2, :, : 2 * pairs]
        theta = 4 * torch.randn(1 if shared else 2, 18, 1 if shared else heads, pairs)
        cos_sin = torch.stack((theta.cos(), theta.sin()), dim=-1)
        want = [formula(x[:, :, g], cos_sin, stride) for g in range(2)]
        out, kept = torch.empty_like(x), qkv.clone()
        rotate_pairs(x, cos_sin, stride, out)
        assert torch.equal(qkv, kept)
        rotate_pairs(x, cos_sin, stride, x)  # in place
        for g in range(2):
            torch.testing.assert_close(out[:, :, g], want[g], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(x[:, :, g], want[g], rtol=tolerance, atol=tolerance)
        assert torch.equal(qkv[:, :1], kept[:, :1])
        assert torch.equal(qkv[..., 2 * pairs:], kept[..., 2 * pairs:])
        assert torch.equal(qkv[:, :, 2], kept[:, :, 2])
        for group in x.unbind(2):  # one by one, as in the backward pass
            rotate_pairs(group, cos_sin * torch.tensor([1.0, -1.0]), stride, group)
        torch.testing.assert_close(qkv, kept, rtol=2 * tolerance, atol=2 * tolerance)
heads = torch.randn(2, 3, 2, 12, 5)  # cut out of a map with channels first
x = heads.permute(0, 4, 1, 2, 3)  # (B, N, G, H, D)
theta = 4 * torch.randn(1, 5, 2, 6)
cos_sin = torch.stack((theta.cos(), theta.sin()), dim=-1)
want = torch.stack([formula(x[:, :, g], cos_sin, 1) for g in range(3)], dim=2)
kept, strided = x.clone(), torch.empty_like(heads).permute(0, 4, 1, 2, 3)
dense = x.clone(memory_format=torch.contiguous_format)
for source, out in ((x, torch.empty_like(dense)), (dense, strided), (x, strided)):
    rotate_pairs(source, cos_sin, 1, out)
    torch.testing.assert_close(out, want)
    assert torch.equal(source, kept)
rotate_pairs(x, cos_sin, 1, x)
torch.testing.assert_close(x, want)
print("passed")
"""


def test_the_interpreted_kernel_matches_the_formula():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, timeout=300)
    assert run.stdout.strip().endswith("passed"), run.stderr[-3000:]


@pytest.mark.parametrize("batch", [0, 3, 65_536, 200_000])
def test_only_the_first_size_of_a_launch_grows_with_the_batch(batch, monkeypatch):
    from vit_rope.ops import triton

    sizes = []

    class Recorder:
        def __getitem__(self, size):
            sizes.append(size)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(triton, "rotate_kernel", Recorder())
    x = torch.empty(batch, 17, 2, 3, 4)
    triton.rotate_pairs(x, torch.empty(1, 17, 1, 2, 2), 1, x)
    assert sizes == [(2 * batch, 6)]  # CUDA allows 2^31 - 1 programs along the first, 65,535 along the others


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_kernel_compiles_ahead_of_time(capability, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from vit_rope.ops.triton import rotate_kernel

    names = rotate_kernel.arg_names
    fixed = {"pairs": 32, "lanes": 32, "stride": 1, "rows": 16}
    kinds = {"x": f"*{dtype}", "out": f"*{dtype}", "cos_sin": "*fp32"}
    signature = {name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in names}
    constants = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(fn=rotate_kernel, signature=signature, constexprs=constants)
    built = compile(source, target=GPUTarget("cuda", capability, 32))
    assert f"sm_{capability}" in built.asm["ptx"]
    assert len(built.asm["cubin"]) > 0
    assert "arith.muli" in built.asm["ttir"]
    assert not re.search(r"muli .*tensor<16x1xi32>", built.asm["ttir"])  # offsets of tokens have 64 bits


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_rotates_as_the_cpu_does(dtype):
    from vit_rope.ops.rotate import rotate_groups

    torch.manual_seed(0)
    x = torch.randn(2, 20, 3, 4, 64).to(dtype)
    theta = 4 * torch.randn(1, 19, 4, 32)
    cos_sin = torch.stack((theta.cos(), theta.sin()), dim=-1)
    results = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device, copy=True).requires_grad_()
        learned = cos_sin.to(device, copy=True).requires_grad_()
        out = rotate_groups(leaf * 1, learned, 2, prefix=1, overwrite=True)
        sum(part.float().square().sum() * (i + 1) for i, part in enumerate(out)).backward()
        results.append([*out, leaf.grad, learned.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=2e-2, atol=2e-2)
