"""Every Triton twin compiles for an NVIDIA GPU: none is needed for that, nor does a launch happen.

The interpreter forgives what the compiler does not. A process of its own, since Triton decides for
or against the interpreter when it is imported.
"""

from __future__ import annotations

import pytest

from tests.kernels.cases import run_apart

PROGRAM = """
    import torch
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64",
             torch.uint8: "*u8", torch.int32: "*i32"}
    compiled = set()

    def kind(value):
        if isinstance(value, torch.Tensor):
            return TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    def launch(kernel, *arguments, grid, warmup, **options):
        given = dict(zip(kernel.arg_names, arguments)) | options
        fixed = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
        kinds = {name: "constexpr" if name in fixed else kind(given[name])
                 for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=kinds, constexprs=fixed)
        code = compile(source, target=GPUTarget("cuda", 90, 32))
        assert ".target sm_90" in code.asm["ptx"]
        compiled.add((kernel.fn.__module__.split(".")[-1], kernel.__name__))

    JITFunction.run = launch

    from fusionkit.kernels.channel_statistics import channel_statistics_twin
    from fusionkit.kernels.gated_depthwise import gated_depthwise_twin
    from fusionkit.kernels.joint_histogram import joint_counts_twin
    from fusionkit.kernels.maximum_loss import maximum_terms_twin
    from fusionkit.kernels.normed_depthwise import (
        normed_depthwise_twin, normed_gated_depthwise_twin,
    )
    from fusionkit.kernels.qabf import qabf_twin
    from fusionkit.kernels.ssim import ssim_of_both_twin

    pictures = [torch.rand(2, 1, 8, 9, requires_grad=True) for _ in range(3)]
    sum(maximum_terms_twin(*pictures)).backward()
    sum(ssim_of_both_twin(*pictures, window=3)).backward()
    bf16 = [x.detach().bfloat16().requires_grad_() for x in pictures]
    sum(maximum_terms_twin(*bf16, "zeros")).backward()
    x = torch.rand(1, 8, 8, 9)
    gated_depthwise_twin(x, torch.rand(8, 1, 3, 3))
    sum(y.sum() for y in channel_statistics_twin(x.requires_grad_(), x)).backward()
    x = x.detach()
    for options in ("ieee", "tf32"):
        torch.backends.cudnn.conv.fp32_precision = options
        weights = x[0, :, 0, 0], x[0, :, 0, 0], torch.rand(24, 8, 1, 1), torch.rand(24, 1, 3, 3)
        normed_depthwise_twin(x, *weights)
        normed_gated_depthwise_twin(x, *weights)
    normed_gated_depthwise_twin(x.bfloat16(), *(w.bfloat16() for w in weights))
    levels = x[0].double()
    joint_counts_twin(levels, levels)
    for matlab in (False, True):
        qabf_twin(levels, levels, levels, (0.9, 15, 0.5, 0.9, 22, 0.8), 1e-4, matlab)
    print(len(compiled))
"""


def test_twins_compile_for_a_gpu():
    pytest.importorskip("triton.backends.nvidia")
    assert run_apart(PROGRAM).split() == ["13"]
