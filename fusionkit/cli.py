"""The command `fusionkit`: fuse, evaluate, models, datasets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fusionkit.datasets import dataset_info, list_datasets
from fusionkit.fuse import fuse, fuse_folders
from fusionkit.images import save_image, write_atomically
from fusionkit.metrics import METRICS, evaluate, summary
from fusionkit.models.registry import MODELS, list_models
from fusionkit.names import TASKS


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 if some pairs failed, 2 for a wrong call."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"fusionkit: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusionkit", description="Image fusion from the shell.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("fuse", help="fuse two pictures, or two folders of them")
    command.add_argument(
        "a", type=Path, help="infrared, near focus, under-exposed, or CT/PET/SPECT"
    )
    command.add_argument("b", type=Path, help="visible, far focus, over-exposed, or MRI")
    command.add_argument("-o", "--out", type=Path, required=True, help="a picture, or a folder")
    command.add_argument("--task", default="ivif", help=f"{', '.join(TASKS)} (default: ivif)")
    command.add_argument("--model", default="refusion", help="see `fusionkit models`")
    command.add_argument("--checkpoint", type=Path, help="weights, ours or the authors'")
    command.add_argument("--color", default="auto", help="auto or gray")
    command.add_argument("--tile", type=int, help="side of the tiles; 0 never cuts")
    command.add_argument("--precision", default="float32", help="float32, or bf16")
    command.add_argument("--device", help="cpu or cuda")
    command.add_argument("--stretch", action=argparse.BooleanOptionalAction, default=None)
    command.set_defaults(run=_fuse)

    command = commands.add_parser("evaluate", help="measure fused pictures against their sources")
    for name in ("a", "b", "fused"):
        command.add_argument(name, type=Path, help="a picture, or a folder")
    command.add_argument("--metrics", nargs="+", help=f"all, or among {', '.join(METRICS)}")
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    command.add_argument("-o", "--out", type=Path, help="write the table as CSV")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("models", help="list the models and the weights that ship")
    command.set_defaults(run=_models)
    command = commands.add_parser("datasets", help="list the data sets of the catalogue")
    command.set_defaults(run=_datasets)
    return parser


def _fuse(options: argparse.Namespace) -> int:
    keys = ("task", "model", "checkpoint", "color", "tile", "precision", "device", "stretch")
    settings = {key: getattr(options, key) for key in keys}
    if not options.a.is_dir():
        print(save_image(fuse(options.a, options.b, **settings), options.out))
        return 0
    results = fuse_folders(options.a, options.b, options.out, **settings)
    failed = [stem for stem, result in results.items() if isinstance(result, Exception)]
    print(f"{len(results) - len(failed)} of {len(results)} pairs fused into {options.out}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _evaluate(options: argparse.Namespace) -> int:
    metrics = "all" if options.metrics == ["all"] else options.metrics
    pictures = options.a, options.b, options.fused
    table = evaluate(*pictures, metrics, device=options.device, progress=True)
    if options.out:
        write_atomically(options.out, lambda file: file.write(table.to_csv().encode()))
    print(table.to_string(float_format="%.4f"))
    if len(table) > 1:
        print("\nmean, and its 95 % interval over the pictures (bootstrap)")
        print(summary(table)[["mean", "low", "high"]].to_string(float_format="%.4f"))
    return 0


def _models(options: argparse.Namespace) -> int:
    shipped = list_models(pretrained=True)
    for name in list_models():
        tasks = [w.removeprefix(f"{name}_") for w in shipped if w.startswith(f"{name}_")]
        if name in shipped:
            tasks = ["one network for all tasks"]
        print(f"{name:12} {MODELS[name].paper}; weights: {', '.join(tasks) or 'none'}")
    return 0


def _datasets(options: argparse.Namespace) -> int:
    for name in list_datasets():
        info = dataset_info(name)
        print(f"{name:20} {info.task:5} {info.title}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
