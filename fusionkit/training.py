"""The one training loop: progress, log, checkpoints, exact resume, precision, several processes."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from fusionkit.allocator import keep_freed_memory
from fusionkit.batches import STEP, batches, check_loader, random_state_kept, seed_all
from fusionkit.checkpointing import recomputed
from fusionkit.images import write_atomically
from fusionkit.training_log import TrainingLog

if TYPE_CHECKING:
    from fusionkit.methods.base import Method


def fit(
    method: Method,
    loader: DataLoader,
    *,
    steps: int,
    out_dir: str | Path,
    checkpoint_every: int = 200,
    log_every: int = 10,
    seed: int = 0,
    resume: bool = True,
    mixed_precision: str | None = None,
    accumulate: int = 1,
    checkpointing: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> pd.DataFrame:
    """Train until `steps` steps are done in all, and return the log.

    Writes `out_dir/checkpoint.pt` (atomically, every `checkpoint_every` steps, after the last one
    and on Ctrl-C) and `out_dir/log.csv`. With a checkpoint there, the run goes on from it: on the
    CPU its weights equal those of an undisturbed run bit for bit, and a run that had reached
    `steps` only gives its weights and log. With more steps a finished run is continued.

    Started by `accelerate launch` (on CPUs: `torchrun`), every process takes its slice of each
    batch, so `loader` speaks of the whole batch; one that does not divide evenly is filled up with
    its own first samples. `out_dir` must be the same folder for all processes, and a resume gives
    them all the buffers (batch norm) of process 0.

    Args:
        method: what is trained; `method.step(batch)` returns its losses by name.
        loader: dict batches of a map-style dataset; iterated as often as needed. Its order and its
            augmentation must draw from the global generators of torch, NumPy or Python, or the
            order from the sampler's `generator`, which is then seeded here.
        steps: calls of `method.step` in all, those before a resume included.
        log_every: step 1 and every such step get a row: `step`, each loss (mean over processes;
            empty where a step does not report it), `seconds` of training so far.
        resume: False discards the run in `out_dir`, if there is one, and starts over.
        mixed_precision: "no" or "bf16"; by default as launched, which is "no" without a launcher.
        accumulate: each process's share of a batch goes through the networks in so many parts, one
            after the other, for one update by their mean gradient: less memory at the same result,
            but for batch norm and for what the method draws at random. For methods whose step is
            one update of one mean loss; a meta-learning step is not the mean of its parts'.
        checkpointing: keep only the input of each block of the networks for the backward pass, and
            compute the rest again there (`checkpointing.recomputed`): equal gradients, about a
            third more time, less memory.
        device: "cpu" or "cuda"; by default the one that accelerate chooses.
        progress: show a bar, in the main process.
        on_log: called in the main process with each logged step and its losses.

    Returns:
        One row a logged step, with the columns of `log.csv`.

    Raises:
        ValueError: a setting is out of range; the loader has no batches, or its batch size does
            not divide by the number of processes; the checkpoint is broken, was made with another
            seed, method, network, data size, precision or number of processes, or is past `steps`;
            `accumulate` with a method whose step is no mean over its batch.
        FloatingPointError: a loss, or a weight that was to be saved, is NaN or infinite; the last
            good checkpoint is kept.
        KeyboardInterrupt: after Ctrl-C, once the step is finished and saved. A second Ctrl-C does
            not wait for the step and leaves the last checkpoint as it is.
    """
    counts = {"checkpoint_every": checkpoint_every, "log_every": log_every}
    _check_settings(seed, steps=steps, accumulate=accumulate, **counts)
    if accumulate > 1:
        method.check_accumulates()
    keep_freed_memory()
    accelerator = _make_accelerator(device)
    place, main = accelerator.device, accelerator.is_main_process
    rank, processes = accelerator.process_index, accelerator.num_processes
    precision = _check_precision(mixed_precision or accelerator.mixed_precision)
    check_loader(loader, processes)
    run = {
        "method": type(method).__name__,
        "seed": seed,
        "processes": processes,
        "mixed_precision": precision,
        "samples": len(loader.dataset),
        "batches per epoch": len(loader),
    }

    path = Path(out_dir) / "checkpoint.pt"
    if not resume and main:
        path.unlink(missing_ok=True)
    method.prepare(accelerator)
    saved = {"step": 0, "seconds": 0.0, "log": []}
    if resume and path.exists():
        saved = _read_checkpoint(path, run, steps)
        _load_method(method, saved["method"], path)
    accelerator.wait_for_everyone()  # nobody writes while another process reads
    log = TrainingLog(path.with_name("log.csv"), saved["log"], write=main)
    if saved["step"] == steps:
        return log.table()

    began = time.perf_counter() - saved["seconds"]
    done = kept = saved["step"]  # steps that are finished, and that are in the checkpoint
    halfway = False

    def save() -> int:
        # A gradient can overflow while its loss is still finite.
        weights = method.modules.named_parameters()
        largest = {name: weight.detach().abs().max().item() for name, weight in weights}
        _check_finite("weight", largest, done, path, kept)
        if main:
            checkpoint = {
                "run": run,
                "step": done,
                "seconds": time.perf_counter() - began,
                "log": log.rows,
                "method": method.state_dict(),
            }
            write_atomically(path, lambda file: torch.save(checkpoint, file))
        return done

    bar = tqdm(total=steps, initial=done, unit="step", disable=not (progress and main))
    with random_state_kept(place), bar:
        try:
            for batch in batches(loader, seed, done, steps, rank, processes):
                with _interrupt_held_back():
                    batch = send_to_device(batch, place, non_blocking=loader.pin_memory)
                    seed_all(seed, STEP, done + 1, rank)
                    halfway = True
                    recomputing = recomputed(method.modules) if checkpointing else nullcontext()
                    with _autocast(precision, place), recomputing:
                        losses = method.step_in_parts(batch, accumulate)
                    losses = _average(losses, accelerator)
                    _check_finite("loss", losses, done + 1, path, kept)
                    halfway = False
                    done += 1
                    bar.set_postfix({k: f"{v:.4g}" for k, v in losses.items()}, refresh=False)
                    bar.update()
                    if done == 1 or done % log_every == 0:
                        log.append(done, losses, time.perf_counter() - began)
                        if on_log and main:
                            on_log(done, losses)
                    if done == steps or done % checkpoint_every == 0:
                        kept = save()
        except KeyboardInterrupt:
            if done > kept and not halfway:
                kept = save()
            note = f"stopped after step {done} of {steps}; {_kept(path, kept)}"
            raise KeyboardInterrupt(note) from None
    accelerator.wait_for_everyone()
    return log.table()


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Let a Ctrl-C wait for the end of the block, since half a step cannot be resumed exactly."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught = False

    def remember(signum, frame) -> None:
        nonlocal caught
        caught = True
        signal.signal(signal.SIGINT, handler)  # a second one goes through at once

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught:
        handler(signal.SIGINT, None)


def _make_accelerator(device: str | torch.device | None) -> Accelerator:
    if not torch.distributed.is_initialized():
        # accelerate keeps a program's first device; a notebook may train on several in turn.
        AcceleratorState._reset_state(reset_partial_state=True)
    wanted = None if device is None else torch.device(device).type
    accelerator = Accelerator(cpu=wanted == "cpu")
    here = accelerator.device.type
    if wanted not in (None, here):
        raise ValueError(f"device {str(device)!r}, but accelerate runs on {here!r} here")
    return accelerator


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    # No cache: a step that updates a network and uses it again would meet its old bf16 weights.
    enabled = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def _average(losses: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Each loss as a mean over processes, so that all of them log, and stop, alike."""
    values = [float(value) for value in losses.values()]
    if accelerator.num_processes > 1:
        tensor = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
        values = accelerator.reduce(tensor, reduction="mean").tolist()
    return dict(zip(losses, values, strict=True))


def _read_checkpoint(path: Path, run: dict, steps: int) -> dict:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        step, kind = saved["step"], saved["run"]
    except Exception as error:  # a broken file can make torch raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: not a whole checkpoint of a training run ({reason}); "
            "remove it, or pass resume=False to start over"
        ) from error
    for name, expected in run.items():
        if kind.get(name) != expected:
            raise ValueError(
                f"{path}: {name} is {kind.get(name)!r} there, expected {expected!r}; "
                "use another out_dir, or pass resume=False to start over"
            )
    if step > steps:
        raise ValueError(f"{path}: {step} steps are done there, expected at most steps={steps}")
    return saved


def _load_method(method: Method, state: dict, path: Path) -> None:
    """`load_state_dict`, with the network compared first, so that an error leaves it untouched."""
    theirs, ours = state["modules"], method.modules.state_dict()
    faults = {
        "missing": [name for name in ours if name not in theirs],
        "unexpected": [name for name in theirs if name not in ours],
        "of another shape": [k for k in ours if k in theirs and ours[k].shape != theirs[k].shape],
    }
    found = [f"{fault}: {', '.join(names[:3])}" for fault, names in faults.items() if names]
    if found:
        raise ValueError(f"{path}: the weights of another network ({'; '.join(found)}, …)")
    try:
        method.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: does not fit this {type(method).__name__} ({error})") from error


def _kept(path: Path, step: int) -> str:
    return f"{path} holds step {step}" if step else f"{path} was not written yet"


def _check_finite(kind: str, values: dict[str, float], step: int, path: Path, kept: int) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            note = f"step {step}: {kind} {name!r} is {value}; {_kept(path, kept)}"
            raise FloatingPointError(note)


def _check_settings(seed: int, **counts: int) -> None:
    for name, value, least in [("seed", seed, 0), *((name, n, 1) for name, n in counts.items())]:
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")


def _check_precision(precision: str) -> str:
    if precision not in ("no", "bf16"):
        why = "; torch.autograd.grad has no loss scaling, use bf16" if precision == "fp16" else ""
        raise ValueError(f"mixed_precision {precision!r}, expected 'no' or 'bf16'{why}")
    return precision
