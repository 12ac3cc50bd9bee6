"""TC-MoA's losses: what each task asks of the picture, and what the prompts and routers owe.

Pictures are (B, 1 or 3, H, W) in [0, 1], losses are scalars. A gray picture counts as three equal
channels, as it does in the network. Source: Zhu et al., TC-MoA, CVPR 2024, sections 3.2 and 3.3;
the formulas and weights, which the paper leaves to its supplement, are its release's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch.nn import functional as F

from fusionkit.losses import maximum_intensity_loss, sobel, ssim, ssim_of_both
from fusionkit.models.adapters import ROUTED_TASKS
from fusionkit.models.tcmoa import TCMoAOutput
from fusionkit.names import check_name

FOCUS_PATCH = 16
ENCODER_SHARE = 0.75
MIR_FORMS = ("released", "paper")
# What each term weighs, by task. The release's gradient terms carry a factor 3 of their own.
WEIGHTS = {
    "ivif": {"gradient": 4.5, "pixel": 1.5, "ssim": 2.0, "mir": 1.0},
    "meif": {"gradient": 5.4, "pixel": 5.4, "ssim": 3.6, "mir": 1.8},
    "mfif": {"gradient": 60.0, "pixel": 20.0, "ssim": 3.0, "mir": 1.0},
}
WARMUP_WEIGHTS = {
    "ivif": {"pixel": 3.0, "ssim": 1.0, "mir": 1.0},
    "meif": {"pixel": 3.0, "ssim": 1.0, "mir": 1.0},
    "mfif": {"pixel": 1.0, "ssim": 1.0, "mir": 1.0},
}
MEF_SCALES = (0.0710, 0.4530, 0.4760)


def tcmoa_loss(
    task: str,
    a: torch.Tensor,
    b: torch.Tensor,
    out: TCMoAOutput,
    *,
    epoch: int = 2,
    warmup: bool = False,
    mir_form: str = "released",
    mef_scales: int = 1,
    weights: Mapping[str, float] | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of one task's batch, and its unweighted terms by name.

    The loss is Σ weight · term + balance / (epoch + 1) over the terms of `weights`.

    Args:
        task: `ivif`, `meif` or `mfif`.
        a, b: the sources.
        out: what `TCMoA.explain(a, b, task)` gave.
        epoch: from 0 on; the routers are balanced strongly at first.
        warmup: take the warm-up's terms, which only ask for the sources' mean (`mfif`: for the
            sharper source), in place of the task's.
        mir_form: see `mutual_information_regularisation`.
        mef_scales: see `mef_ssim_loss`.
        weights: weights of the terms `pixel`, `ssim`, `gradient` (not in the warm-up) and `mir`; by
            default those of the release. A term that is left out counts nothing.

    Raises:
        ValueError: unknown task, form or term.
    """
    check_name(task, ROUTED_TASKS, "task")
    defaults = (WARMUP_WEIGHTS if warmup else WEIGHTS)[task]
    weights = defaults if weights is None else weights
    for name in weights:
        check_name(name, defaults, "loss term")
    picture_terms = {"ivif": _ivif, "meif": partial(_meif, scales=mef_scales), "mfif": _mfif}[task]
    with torch.autocast(a.device.type, enabled=False):
        terms = picture_terms(*(x.to(a.dtype).clamp(0, 1) for x in (a, b, out.fused)), warmup)
        terms["mir"] = mutual_information_regularisation(out.prompts, mir_form)
        terms["balance"] = out.auxiliary
        total = sum(weight * terms[name] for name, weight in weights.items())
    return total + out.auxiliary / (epoch + 1), terms


def _ivif(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, warmup: bool) -> dict:
    pixel = average_intensity_loss if warmup else maximum_intensity_loss
    return {
        "pixel": pixel(a, b, fused),
        "gradient": signed_maximum_gradient_loss(a, b, fused),
        "ssim": _mean_dissimilarity(a, b, fused),
    }


def _meif(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, warmup: bool, scales: int) -> dict:
    structure = _mean_dissimilarity if warmup else partial(mef_ssim_loss, scales=scales)
    return {
        "pixel": average_intensity_loss(a, b, fused),
        "gradient": signed_maximum_gradient_loss(a, b, fused),
        "ssim": structure(a, b, fused),
    }


def _mfif(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, warmup: bool) -> dict:
    del warmup  # the sharper source is the aim from the start
    selected = sharper_source(a, b)
    return {
        "pixel": F.l1_loss(fused, selected),
        "gradient": F.l1_loss(signed_gradient(fused), signed_gradient(selected)),
        "ssim": 1 - ssim(fused, selected, border="zeros"),
    }


def _mean_dissimilarity(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """The mean over both sources of 1 - SSIM with the fused picture."""
    return 1 - sum(ssim_of_both(a, b, fused, border="zeros")) / 2


def average_intensity_loss(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """Mean |fused - (a + b) / 2|: L_AvgPixel."""
    return F.l1_loss(fused, (a + b) / 2)


def signed_gradient(image: torch.Tensor) -> torch.Tensor:
    """One map (B, 1, H, W) of signed slopes: to the right plus upwards, summed over the channels.

    Differences over two pixels, weighted by 0.2, 1 and 0.2 across them; zeros beyond the border.
    """
    across, along = image.new_tensor([0.2, 1.0, 0.2]), image.new_tensor([-1.0, 0.0, 1.0])
    kernel = torch.outer(across, along) - torch.outer(along, across)
    summed = image.expand(-1, 3, -1, -1).sum(dim=1, keepdim=True)
    return F.conv2d(summed, kernel[None, None], padding=1)


def signed_maximum_gradient_loss(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor
) -> torch.Tensor:
    """L_MaxGrad: mean |∇fused - the stronger of ∇a and ∇b at each pixel|, signs kept; a scalar."""
    gradient_a, gradient_b = signed_gradient(a), signed_gradient(b)
    stronger = torch.where(gradient_a.abs() >= gradient_b.abs(), gradient_a, gradient_b)
    return F.l1_loss(signed_gradient(fused), stronger)


def sharper_source(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """For each patch of 16×16 pixels the source with the steepest pixel: L_Mask's picture, as a.

    Steepness is the Sobel magnitude of Rec. 601 luminance, black beyond the border. A tie goes to
    b. Patches at the right and lower border may be smaller.
    """

    def steepest(image: torch.Tensor) -> torch.Tensor:
        rgb = image.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        gray = (rgb * image).sum(dim=1, keepdim=True)
        return F.max_pool2d(sobel(gray, border="zeros"), FOCUS_PATCH, ceil_mode=True)

    take_a = (steepest(a) > steepest(b)).to(a.dtype)
    take_a = F.interpolate(take_a, scale_factor=float(FOCUS_PATCH))
    take_a = take_a[..., : a.shape[-2], : a.shape[-1]]
    return take_a * a + (1 - take_a) * b


def mef_ssim_loss(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, scales: int = 1
) -> torch.Tensor:
    """1 - MEF-SSIM with luminance: L_mefssim; a scalar.

    In each 11×11 window (Gaussian, σ 11/6, all channels together, zeros beyond the border) the
    fused picture is compared with the source of larger variance for contrast and structure, and
    for luminance with the sources' mean weighted by well-exposedness, local and global. As in the
    release, a batch is stacked along the height into one picture.

    Args:
        scales: 1 is what the release's numbers are; 3 multiplies contrast and structure of three
            scales, to the powers 0.071, 0.453 and 0.476, with the coarsest scale's luminance.

    Raises:
        ValueError: another number of scales.

    Source: Ma et al., Deep guided learning for fast multi-exposure image fusion, 2020.
    """
    if scales not in (1, len(MEF_SCALES)):
        raise ValueError(f"scales is {scales}, expected 1 or {len(MEF_SCALES)}")
    fused, *sources = (x.transpose(0, 1).flatten(1, 2)[None] for x in (fused, a, b))
    sources = torch.cat(sources)  # (2, C, B·H, W)
    if scales == 1:
        luminance, structure = _mef_terms(sources, fused)
        return 1 - luminance * structure
    quality = 1.0
    for scale, power in enumerate(MEF_SCALES):
        if scale:
            sources, fused = F.avg_pool2d(sources, 2), F.avg_pool2d(fused, 2)
        luminance, structure = _mef_terms(sources, fused)
        quality = quality * structure.clamp_min(1e-6) ** power
    return 1 - quality * luminance.clamp_min(1e-6) ** power


def _mef_terms(sources: torch.Tensor, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean luminance, and mean contrast and structure, of MEF-SSIM at one scale."""
    position = torch.arange(-5, 6, dtype=fused.dtype, device=fused.device)
    window = torch.softmax(-position.square() / (2 * (11 / 6) ** 2), dim=0)

    def blur(x: torch.Tensor) -> torch.Tensor:
        x = x.mean(dim=1, keepdim=True)
        x = F.conv2d(x, window.view(1, 1, 1, 11), padding=(0, 5))
        return F.conv2d(x, window.view(1, 1, 11, 1), padding=(5, 0))

    means, mean = blur(sources), blur(fused)
    variances = blur(sources.square()) - means.square()
    variance = blur(fused.square()) - mean.square()
    covariances = blur(sources * fused) - means * mean
    similarity = (2 * covariances + 9e-4) / (variances + variance + 9e-4)
    structure = similarity.gather(0, variances.argmax(dim=0, keepdim=True)).mean()
    # Exposedness of the pixel's surroundings, and of the whole picture: σ 0.2 around mid-gray.
    whole = means.mean(dim=(-2, -1), keepdim=True)
    weights = torch.exp(-((means - 0.5).square() + (whole - 0.5).square()) / (2 * 0.2**2))
    wanted = (weights * means).sum(0, keepdim=True) / weights.sum(0, keepdim=True)
    luminance = (2 * mean * wanted + 1e-4) / (mean.square() + wanted.square() + 1e-4)
    return luminance.mean(), structure


def mutual_information_regularisation(
    prompts: Mapping[str, Sequence[torch.Tensor]], form: str = "released"
) -> torch.Tensor:
    """Equation 7: how far the two prompts of a token are from summing to one; a scalar.

    The mean over the encoder's layers counts 0.75, that over the decoder's 0.25.

    Args:
        prompts: for "encoder" and "decoder" a tensor (B, 2, h, w) for each TC-MoA layer; a network
            without such layers owes nothing.
        form: "released" is the mean of (prompt_a + prompt_b - 1)², "paper" that of the absolute
            value.

    Raises:
        ValueError: unknown form.
    """
    check_name(form, MIR_FORMS, "MIR form")

    def mean(layers: Sequence[torch.Tensor]) -> torch.Tensor:
        excess = [layer.float().sum(dim=1) - 1 for layer in layers]
        values = [(e.square() if form == "released" else e.abs()).mean() for e in excess]
        return torch.stack(values).mean() if values else torch.zeros(())

    encoder, decoder = mean(prompts["encoder"]), mean(prompts["decoder"])
    return ENCODER_SHARE * encoder + (1 - ENCODER_SHARE) * decoder
