"""When Triton twins step aside, and that they compile."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp

from fusionkit.kernels import _dispatch, maximum_loss, ssim
from fusionkit.kernels._dispatch import transformed, twin_takes
from fusionkit.methods.gradient_transfer import GradientTransferMethod
from tests.kernels.cases import pictures, run_apart


def on(monkeypatch):
    """Let the dispatchers take the twins on this device, too."""
    for module in (maximum_loss, ssim):
        monkeypatch.setattr(module, "twin_takes", lambda *x: not transformed(*x))


def test_only_a_gpu_takes_twins():
    assert not twin_takes(torch.ones(2))
    if torch.cuda.is_available():
        assert twin_takes(torch.ones(2, device="cuda"))
        assert not twin_takes(torch.ones(2, device="cuda", dtype=torch.float64))
        assert not twin_takes(torch.ones(2, device="cuda"), torch.ones(2))


def test_references_can_be_asked_for(monkeypatch):
    class OnAGPU:
        is_cuda, device, dtype, numel = True, "cuda:0", torch.float32, staticmethod(lambda: 1)

    monkeypatch.setattr(_dispatch, "installed", lambda: True)
    monkeypatch.setattr(_dispatch, "transformed", lambda *x: False)
    assert _dispatch.twin_takes(OnAGPU())
    with _dispatch.references():
        assert not _dispatch.twin_takes(OnAGPU())
    assert _dispatch.twin_takes(OnAGPU())


def test_transforms_are_seen():
    x, seen = torch.ones(2), []

    def function(x):
        seen.append(transformed(x))
        return x.square().sum()

    function(x)
    function(x.requires_grad_())
    jvp(function, (x.detach(),), (x.detach(),))
    grad(function)(x.detach())
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x.detach(), x.detach()))
    assert seen == [False, False, True, True, True]


@pytest.mark.parametrize(
    "terms", [maximum_loss.maximum_terms, lambda *x: ssim.ssim_of_both(*x, window=5)]
)
def test_forward_mode_goes_through_the_reference(terms, device, monkeypatch):
    inputs = tuple(x.detach() for x in pictures((1, 1, 8, 9), device))
    tangents = tuple(torch.randn_like(x) for x in inputs)
    expected = jvp(terms, inputs, tangents)
    on(monkeypatch)
    torch.testing.assert_close(jvp(terms, inputs, tangents), expected)


def test_a_method_has_the_same_losses_and_gradients(device, monkeypatch):
    network = torch.nn.Conv2d(2, 1, 3, padding=1).to(device)

    class Fuse(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, a, b):
            return self.network(torch.cat([a, b], dim=1)).sigmoid()

    method = GradientTransferMethod(Fuse(), task="ivif")
    a, b, _ = (x.detach() for x in pictures((1, 1, 12, 13), device))

    def run():
        losses = method.losses(a, b)
        return losses, torch.autograd.grad(sum(losses.values()), method.trained("fusion"))

    expected = run()
    on(monkeypatch)
    called = []
    for module, name in ((maximum_loss, "maximum_terms_twin"), (ssim, "ssim_of_both_twin")):
        twin = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *x, t=twin, n=name: called.append(n) or t(*x))
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
    assert called == ["maximum_terms_twin", "ssim_of_both_twin"]


def test_losses_need_no_triton():
    code = """
        sys.modules["triton"] = None  # importing it is an ImportError
        import torch
        from fusionkit.kernels._dispatch import installed
        from fusionkit.losses import maximum_losses, structure_loss
        x = torch.rand(1, 1, 16, 16, requires_grad=True)
        (sum(maximum_losses(x, 1 - x, x * x)) + structure_loss(x, 1 - x, x * x)).backward()
        assert x.grad.isfinite().all() and not installed()
    """
    run_apart(code)
