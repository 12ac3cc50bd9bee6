"""Two pictures in, one out: `fuse` for a pair, `fuse_folders` for many."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from fusionkit.allocator import keep_freed_memory
from fusionkit.color import chroma, fuse_chroma, luminance, to_rgb
from fusionkit.images import ImageLike, list_images, save_image, to_tensor
from fusionkit.models.registry import create_model, model_entry
from fusionkit.names import check_name, check_task
from fusionkit.tiling import fuse_tiled

# Up to here a picture is fused whole: 1280×1024, the largest of the usual test sets.
WHOLE_PIXELS = 1280 * 1024
TILE = 768
# A network that streams gives the same result in tiles, and on a CPU, whose cache holds a tile of
# 128, in about two thirds of the time.
STREAM_TILE_CPU, STREAM_TILE_GPU = 128, 1024


def fuse(
    a: ImageLike,
    b: ImageLike,
    task: str = "ivif",
    *,
    model: str | nn.Module = "refusion",
    checkpoint: str | os.PathLike | None = None,
    color: str = "auto",
    stretch: bool | None = None,
    tile: int | None = None,
    device: str | torch.device | None = None,
) -> torch.Tensor:
    """Fuse two registered pictures of one scene.

    The network sees luminance; chroma is put back as `color.fuse_chroma` says, in float.

    Args:
        a, b: paths, PIL pictures, arrays or tensors (see `images.to_tensor`), of one size, from
            8×8 up. By task: `ivif` infrared and visible, `mfif` near and far focus, `meif` under-
            and over-exposed, `mif` CT, PET or SPECT and MRI.
        task: chooses the weights.
        model: a name of `list_models()`, or a network with `forward(a, b) -> fused`.
        checkpoint: weights from a file (ours or the authors'), in place of those that ship.
        color: "auto" gives RGB if a source has three channels; "gray" gives luminance.
        stretch: spread the fused luminance over [0, 1], from its minimum to its maximum over the
            picture; by default as the model's paper does, which is True for `refusion`.
        tile: side of the tiles that large pictures are cut into; 0 never cuts. ReFusion streams
            (see `models.streaming`): tiles give its result to rounding, and are the default on a
            CPU. Other networks fuse overlapping tiles, by default of 768 beyond 1280×1024 pixels.
        device: by default a GPU if there is one; a network of yours stays where it is.

    Returns:
        float32 (1 or 3, H, W) in [0, 1], on the CPU; `to_pil` and `save_image` take it.

    Raises:
        ValueError, FileNotFoundError: a picture, a size, or a name is not as expected; the
            message names it.
    """
    check_name(color, ("auto", "gray"), "color")
    network = load_network(model, task, checkpoint, device)
    if stretch is None:
        stretch = model_entry(model).stretch if isinstance(model, str) else False
    return _fuse_pair(network, a, b, color, stretch, tile)


def fuse_folders(
    a: str | os.PathLike,
    b: str | os.PathLike,
    out: str | os.PathLike,
    task: str = "ivif",
    *,
    model: str | nn.Module = "refusion",
    checkpoint: str | os.PathLike | None = None,
    color: str = "auto",
    stretch: bool | None = None,
    tile: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> dict[str, Path | Exception]:
    """Fuse the pairs of two folders, matched by stem, into `out` as PNG files.

    A pair that fails is reported by name and the others go on: each stem is mapped to the file
    that was written, or to the exception. The other arguments are those of `fuse`.

    Raises:
        ValueError, FileNotFoundError: a folder is missing or empty, or a name is unknown.
    """
    check_name(color, ("auto", "gray"), "color")
    found_a, found_b = list_images(a), list_images(b)
    network = load_network(model, task, checkpoint, device)
    if stretch is None:
        stretch = model_entry(model).stretch if isinstance(model, str) else False
    results: dict[str, Path | Exception] = {}
    bar = tqdm(sorted(found_a.keys() | found_b.keys()), unit="pair", disable=not progress)
    for stem in bar:
        bar.set_postfix_str(stem)
        try:
            for found, folder in ((found_a, a), (found_b, b)):
                if stem not in found:
                    raise FileNotFoundError(f"{folder}: no picture {stem!r} to match its partner")
            fused = _fuse_pair(network, found_a[stem], found_b[stem], color, stretch, tile)
            results[stem] = save_image(fused, Path(out) / f"{stem}.png")
        except (ValueError, OSError) as error:
            results[stem] = error
            bar.write(f"{stem}: {error}")
    return results


def stretch_to_range(image: torch.Tensor) -> torch.Tensor:
    """Spread each picture of (B, C, H, W) over [0, 1] by its own minimum and maximum.

    A constant picture stays as it is.
    """
    low, high = image.amin((-3, -2, -1), keepdim=True), image.amax((-3, -2, -1), keepdim=True)
    flat = high <= low
    return torch.where(flat, image, (image - low) / torch.where(flat, 1.0, high - low))


def load_network(
    model: str | nn.Module,
    task: str = "ivif",
    checkpoint: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """The network that `fuse` runs for these arguments, which it explains, placed for speed."""
    check_task(task)
    if not isinstance(model, str):
        if checkpoint is not None:
            raise ValueError(
                "checkpoint goes with a model's name; load it into the network yourself"
            )
        return model if device is None else model.to(device)
    if not model_entry(model).fuses:
        raise ValueError(f"model {model!r} is no fusion network; expected another of list_models()")
    network = create_model(model, task, pretrained=checkpoint is None, checkpoint=checkpoint)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Channels last: depth-wise convolutions and norms over channels are far faster on a CPU.
    return network.to(device, memory_format=torch.channels_last)


@torch.inference_mode()
def _fuse_pair(
    network: nn.Module, a: ImageLike, b: ImageLike, color: str, stretch: bool, tile: int | None
) -> torch.Tensor:
    image_a, image_b = to_tensor(a, _name(a, "a")), to_tensor(b, _name(b, "b"))
    if image_a.shape[-2:] != image_b.shape[-2:]:
        sizes = [f"{x.shape[-2]}×{x.shape[-1]}" for x in (image_a, image_b)]
        raise ValueError(
            f"{_name(a, 'a')} is {sizes[0]} but {_name(b, 'b')} is {sizes[1]}; "
            "expected two registered pictures of one size"
        )
    pair = luminance(image_a)[None], luminance(image_b)[None]
    keep_freed_memory()
    training = network.training
    try:
        fused = _run(network.eval(), *pair, tile)
    finally:
        network.train(training)  # the network may be somebody's, in the middle of its training
    # Once, after blending: tile by tile it would show as a patchwork.
    fused = (stretch_to_range(fused) if stretch else fused)[0].clamp(0, 1)
    if color == "gray" or image_a.shape[0] == image_b.shape[0] == 1:
        return fused
    return to_rgb(fused, fuse_chroma(chroma(image_a), chroma(image_b)))


def _run(network: nn.Module, a: torch.Tensor, b: torch.Tensor, tile: int | None) -> torch.Tensor:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    streams = hasattr(network, "stream")
    if tile is None:
        large = a.numel() > WHOLE_PIXELS
        if streams:
            tile = STREAM_TILE_GPU if large else 0
            if device.type == "cpu":
                tile = STREAM_TILE_CPU
        else:
            tile = TILE if large else 0
    if not tile or max(a.shape[-2:]) <= tile:
        return network(a.to(device), b.to(device)).cpu()
    if streams:
        return network.stream(a.to(device), b.to(device), tile).cpu()
    return fuse_tiled(network, a, b, tile, tile // 8)


def _name(image: ImageLike, role: str) -> str:
    if isinstance(image, str | os.PathLike):
        return str(image)
    return getattr(image, "filename", "") or f"picture {role}"
