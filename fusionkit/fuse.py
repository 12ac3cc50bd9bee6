"""Two pictures in, one out: `fuse` for a pair, `fuse_folders` for many."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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
# A multiple of 112, which TC-MoA's windows fill.
TILE = 560
# A network that streams gives the same result in tiles, in less memory. Whole it is faster, as
# some work is done once for a picture and not for each tile. On a CPU, whose memory programs share,
# pictures are fused whole up to 640×512, where ReFusion takes less than 2 GiB, and the network says
# itself how large tiles should be: ReFusion's are fastest where they stay in the cache.
WHOLE_PIXELS_CPU = 640 * 512
STREAM_TILE_GPU = 1024
PRECISIONS = ("float32", "bf16")


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
    precision: str = "float32",
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
        tile: side of the tiles that large pictures are cut into; 0 never cuts. ReFusion and CAF
            stream (see `models.streaming`): tiles give their result to rounding, and are the
            default beyond 640×512 pixels on a CPU. Other networks fuse overlapping tiles, by
            default of 560 beyond 1280×1024 pixels (`tcmoa_large` on a CPU: 448); up to there they
            see the whole picture, as the authors' do, which may take more memory than tiles.
        precision: "bf16" runs the network in mixed precision: for GPUs, and for CPUs that multiply
            bf16, where CAF takes half the time; values move by a few thousandths.
        device: by default a GPU if there is one; a network of yours stays where it is.

    Returns:
        float32 (1 or 3, H, W) in [0, 1], on the CPU; `to_pil` and `save_image` take it.

    Raises:
        ValueError, FileNotFoundError: a picture, a size, or a name is not as expected; the
            message names it.
    """
    check_name(color, ("auto", "gray"), "color")
    check_name(precision, PRECISIONS, "precision")
    network = load_network(model, task, checkpoint, device)
    if stretch is None:
        stretch = model_entry(model).stretch if isinstance(model, str) else False
    pair = _load(a, b, color)
    return _colored(_fuse_luminance(network, pair, stretch, tile, precision), pair.chroma)


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
    precision: str = "float32",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> dict[str, Path | Exception]:
    """Fuse the pairs of two folders, matched by stem, into `out` as PNG files.

    A pair that fails is reported by name and the others go on: each stem is mapped to the file
    that was written, or to the exception. The other arguments are those of `fuse`. While a pair is
    fused, the next is read and the last is written, one of each, so memory stays bounded.

    Raises:
        ValueError, FileNotFoundError: a folder is missing or empty, or a name is unknown.
    """
    check_name(color, ("auto", "gray"), "color")
    check_name(precision, PRECISIONS, "precision")
    found_a, found_b = list_images(a), list_images(b)
    network = load_network(model, task, checkpoint, device)
    if stretch is None:
        stretch = model_entry(model).stretch if isinstance(model, str) else False
    stems = sorted(found_a.keys() | found_b.keys())
    results: dict[str, Path | Exception] = {}

    def load(stem: str) -> _Pair:
        for found, folder in ((found_a, a), (found_b, b)):
            if stem not in found:
                raise FileNotFoundError(f"{folder}: no picture {stem!r} to match its partner")
        return _load(found_a[stem], found_b[stem], color)

    def save(luma: torch.Tensor, chroma: torch.Tensor | None, stem: str) -> Path:
        return save_image(_colored(luma, chroma), Path(out) / f"{stem}.png")

    with (
        tqdm(total=len(stems), unit="pair", disable=not progress) as bar,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as writer,
    ):

        def finish(stem: str, work: Future) -> None:
            try:
                results[stem] = work.result()
            except Exception as error:  # out of memory, too: a smaller pair may pass
                results[stem] = error
                bar.write(f"{stem}: {error}")
            bar.update()

        read = deque([reader.submit(load, stem) for stem in stems[:1]])
        written: deque[tuple[str, Future]] = deque()
        for stem, following in zip(stems, [*stems[1:], None], strict=True):
            bar.set_postfix_str(stem)
            work = read.popleft()
            failed = work.exception()
            if following is not None:
                read.append(reader.submit(load, following))
            while written:  # before the next result is there, so that they do not pile up
                finish(*written.popleft())
            if failed is None:
                try:
                    pair = work.result()
                    del work
                    luma = _fuse_luminance(network, pair, stretch, tile, precision)
                    work = writer.submit(save, luma, pair.chroma, stem)
                except Exception as error:
                    work = Future()
                    work.set_exception(error)
            written.append((stem, work))
        while written:
            finish(*written.popleft())
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


class _Pair(NamedTuple):
    """What is needed of two pictures: luminances (1, 1, H, W), and the fused chroma (2, H, W).

    The chroma is None where the result is gray.
    """

    a: torch.Tensor
    b: torch.Tensor
    chroma: torch.Tensor | None


@torch.no_grad()  # not inference mode, whose tensors are of no use in training
def _load(a: ImageLike, b: ImageLike, color: str) -> _Pair:
    image_a, image_b = to_tensor(a, _name(a, "a")), to_tensor(b, _name(b, "b"))
    if image_a.shape[-2:] != image_b.shape[-2:]:
        sizes = [f"{x.shape[-2]}×{x.shape[-1]}" for x in (image_a, image_b)]
        raise ValueError(
            f"{_name(a, 'a')} is {sizes[0]} but {_name(b, 'b')} is {sizes[1]}; "
            "expected two registered pictures of one size"
        )
    colored = [x for x in (image_a, image_b) if x.shape[0] == 3 and color != "gray"]
    # Before the network runs, so that it does not hold the colours of a large picture besides.
    mixed = None
    if colored:  # a gray source has no say in the chroma
        mixed = fuse_chroma(*map(chroma, colored)) if len(colored) == 2 else chroma(colored[0])
    return _Pair(luminance(image_a)[None], luminance(image_b)[None], mixed)


@torch.no_grad()
def _fuse_luminance(
    network: nn.Module, pair: _Pair, stretch: bool, tile: int | None, precision: str
) -> torch.Tensor:
    keep_freed_memory()
    training = network.training
    try:
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            fused = _run(network.eval(), pair.a.to(device), pair.b.to(device), tile).float().cpu()
    finally:
        network.train(training)  # the network may be somebody's, in the middle of its training
    # Once, after blending: tile by tile it would show as a patchwork.
    return (stretch_to_range(fused) if stretch else fused)[0].clamp(0, 1)


@torch.no_grad()
def _colored(fused: torch.Tensor, mixed: torch.Tensor | None) -> torch.Tensor:
    return fused if mixed is None else to_rgb(fused, mixed)


def _run(network: nn.Module, a: torch.Tensor, b: torch.Tensor, tile: int | None) -> torch.Tensor:
    if tile is not None and tile < 0:
        raise ValueError(f"tile {tile}; expected a side in pixels, or 0 for the whole picture")
    streams = hasattr(network, "stream")
    if tile is None:
        on_cpu = a.device.type == "cpu"
        if on_cpu:
            tile = getattr(network, "cpu_tile", TILE)
        else:
            tile = STREAM_TILE_GPU if streams else TILE
        if a.numel() <= (WHOLE_PIXELS_CPU if streams and on_cpu else WHOLE_PIXELS):
            tile = 0
    if not tile or max(a.shape[-2:]) <= tile:
        return network(a, b)
    if streams:
        return network.stream(a, b, tile)
    return fuse_tiled(network, a, b, tile, tile // 8)


def _name(image: ImageLike, role: str) -> str:
    if isinstance(image, str | os.PathLike):
        return str(image)
    return getattr(image, "filename", "") or f"picture {role}"
