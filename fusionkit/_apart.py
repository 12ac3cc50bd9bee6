"""What `versus.Apart` runs in a process of its own; needs torch alone, no version of this package.

`python -P _apart.py TARGET FOLDER`: inputs are FOLDER/inputs.pt, the first call's result becomes
FOLDER/output.pt. For every line of its standard input it calls the target and answers with a line
of JSON: seconds of the call, and the process's peak of resident memory in bytes.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def load_callable(target: str) -> Callable:
    """The function that "FILE.py:FUNCTION" or "MODULE:FUNCTION" names.

    Raises:
        ValueError: the name is of another form, or there is no such module or function.
        FileNotFoundError: no such file.
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise ValueError(f"{target!r}: expected FILE.py:FUNCTION or MODULE:FUNCTION")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise FileNotFoundError(f"{place}: no such file")
        # By its path, which hides no other module; what dataclasses and pickle look up is there.
        spec = importlib.util.spec_from_file_location(str(Path(place).resolve()), place)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(f"{target!r}: no module named {error.name!r}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{target!r}: {place} has no function {name!r}")
    return found


def peak_resident() -> int:
    """Peak of this process's resident memory in bytes, by Linux's own count."""
    # Not getrusage: its figure begins with that of the process which started this one.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


def main(target: str, folder: str) -> None:
    # What the function prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    inputs = torch.load(Path(folder) / "inputs.pt", weights_only=True)
    function = load_callable(target)
    saved = False
    for _ in sys.stdin:
        began = time.perf_counter()
        output = function(*inputs)
        if torch.cuda.is_initialized():  # not for functions that leave the GPU alone
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "peak": peak_resident()}), file=answers)
        if not saved:
            torch.save(torch.as_tensor(output).cpu(), Path(folder) / "output.pt")
            saved = True
        del output


if __name__ == "__main__":
    main(*sys.argv[1:])
