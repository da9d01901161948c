"""The command line: python -m pyra_lab, or pyra-lab where it is installed, and one of COMMANDS: run, results, grid ..."""

import contextlib
import dataclasses
import difflib
import functools
import json
import logging
import os
import shlex
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from pyra import first_line
from pyra_lab import gpu_suite, grid, prediction, release, serving, speed, vtab
from pyra_lab.backbones import BACKBONES, create_backbone
from pyra_lab.config import Config, Parser, parse, read_value
from pyra_lab.devices import DTYPES
from pyra_lab.methods import METHODS
from pyra_lab.records import kept_epoch, results, runs_folder
from pyra_lab.training import run


def make_parser(command, description):
    return Parser(prog=f"python -m pyra_lab {command}", description=description, allow_abbrev=False)


def run_command(argv):
    result = run(parse(argv))
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"accuracy on {result.config['eval_split']}: {result.accuracy_last:.4f}, {kept_epoch(result)}; record in {result.folder}")
        name = Path(result.folder).name
        print(f"next: python -m pyra_lab predict {name} images/ --out predictions.csv\n      python -m pyra_lab export {name} folder")
    if dist.is_initialized():
        dist.destroy_process_group()


def other_settings(row):
    """What of a recorded run differs from the default, besides what its row shows and where it ran: "eval_split=val200 peft=adapter"."""
    shown = {name: row[name] for name in ("task", "backbone", "method", "rate", "epochs", "seed", "data_root", "device", "dtype", "workers")}
    try:
        default = dataclasses.asdict(Config(**shown).resolved())
    except ValueError:  # a method that was added at run time, or another version's
        return ""
    differs = {name: row[name] for name, value in default.items() if row[name] != value}
    return " ".join(f"{name}={Path(value).name if name.endswith('weights') and value else value}" for name, value in differs.items())


def results_command(argv):
    make_parser("results", "The recorded runs, the newest last; in Python: pyra_lab.results(), with all that was recorded").parse_args(argv)
    rows = sorted(results(), key=lambda row: os.path.getmtime(Path(row["folder"]) / "result.json"))
    if not rows:
        print(f"{runs_folder()} holds no finished run")
        return
    table = [["id", "task", "method", "rate", "epochs", "accuracy", "MACs, M", "other settings"]]
    for row in rows:
        rate = str(row["rate"]) if row["method"] not in METHODS or "rate" in METHODS[row["method"]].uses else "-"
        table.append([row["id"], row["task"], row["method"], rate if len(rate) <= 12 else f"{rate[:11]}…", str(row["epochs"]),
                      f"{row['accuracy']:.4f}", f"{row['macs'] / 1e6:,.1f}", other_settings(row)])
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.rjust(width) if 4 <= i < 7 else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))).rstrip())


def grid_command(argv):
    parser = make_parser("grid", "Many runs, from a file with one config per line: {\"task\": \"dtd\", \"seed\": 1}")
    parser.add_argument("grid", help="the file")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one per CUDA device, or one)")
    args = parser.parse_args(argv)
    results = grid.run_grid(grid.read_grid(args.grid), args.workers)
    print(f"{len(results) - results.count(None)} of {len(results)} runs are recorded in {runs_folder()}")
    return int(None in results)


def slurm_command(argv):
    parser = make_parser("slurm", "Writes a script that does the runs of a grid as a Slurm array, and prints the command that submits it")
    parser.add_argument("grid", help="the file, with one config per line: {\"task\": \"dtd\", \"seed\": 1}")
    parser.add_argument("--max", type=int, help="runs at a time (default: all)")
    args = parser.parse_args(argv)
    if args.max is not None and args.max < 1:
        raise ValueError(f"--max must be at least 1, not {args.max}")
    script = Path(args.grid).with_suffix(".sbatch")
    print(grid.write_slurm(grid.read_grid(args.grid), script, max_running=args.max))
    print(f"put in the cores and hours that your runs need; logs will be {runs_folder()}/logs/pyra-<job>_<task>.log", file=sys.stderr)


def benchmark_command(argv):
    parser = make_parser("benchmark", "Images/s and memory of plain, ToMe and PYRA on random weights, and of timm's model if timm is installed")
    parser.add_argument("--backbone", default="vit_base_patch16_224", help="timm's name (default: %(default)s)")
    parser.add_argument("--img_size", type=int, help="pixels of a side (default: what the name says)")
    parser.add_argument("--batch_size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--rate", default="high", help="low, high or a number for Eq. (1) (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--seconds", type=float, default=10.0, help="per model and dtype (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="how often the models take turns (default: %(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: both")
    parser.add_argument("--compile", metavar="MODE", help="torch.compile's mode: default, or reduce-overhead for CUDA graphs")
    parser.add_argument("--training", action="store_true", help="training steps with LoRA, with and without --checkpoint, instead of inference")
    parser.add_argument("--suite", choices=["gpu"], help="the whole GPU suite, in bf16, instead of a table; needs --out")
    parser.add_argument("--out", metavar="FILE.json", help="file for the suite's rows, written after each of its tasks")
    parser.add_argument("--minutes", type=float, default=6.0, help="time limit of the suite: what doesn't fit is left out (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="the suite with tiny models, to see that it runs")
    args = parser.parse_args(argv)
    if (args.suite is None) != (args.out is None):
        raise ValueError("--suite needs --out, the file that it writes, and --out belongs to --suite")
    if args.suite:
        gpu_suite.run_suite(args.out, args.minutes, args.smoke, args.device)
        return
    if args.training and args.compile:
        raise ValueError("--training is measured without --compile")
    common = (args.backbone, args.batch_size, read_value(args.rate, str | float), args.device, args.seconds, args.rounds)
    dtypes = [args.dtype] if args.dtype else DTYPES
    rows = speed.training_table(*common, dtypes, args.img_size) if args.training else speed.benchmark_table(*common, args.compile, dtypes, args.img_size)
    layout = "{:9} {:17} {:>9} {:>8} {:>8} {:>9} {:>10} {:>9} {:>8}"
    print(layout.format("dtype", "model", "images/s", "lowest", "highest", "speed-up", "MAC ratio", "ms/batch", "peak MB"))
    for row in rows:
        speeds = [f"{row[name]:.1f}" for name in ("images_per_second", "lowest", "highest")]
        peak = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e6:.0f}"
        ratios = [f"{row[name]:.2f}" for name in ("speedup", "mac_ratio")]
        print(layout.format(row["dtype"], row["model"], *speeds, *ratios, f"{row['latency']:.1f}", peak))


def check_command(argv):
    parser = make_parser("check", "Checks tasks: VTAB-1k's against the paper's Table 1, your own lists, or a tree with one folder per class")
    parser.add_argument("root", help="the folder that holds the tasks' folders, or the folder of one task; also folder:/path or stream:/path")
    parser.add_argument("tasks", nargs="*", metavar="task", help="only these of the tasks in it")
    parser.add_argument("--quick", action="store_true", help="don't decode the images, which takes most of the time")
    args = parser.parse_args(argv)
    findings = vtab.check(args.root, args.tasks, args.quick)
    print(vtab.report(findings) + (" (images not decoded)" if args.quick else ""))
    return int(any(finding.kind != "note" for found in findings.values() for finding in found))


def predict_command(argv):
    parser = make_parser("predict", "Classes and probabilities of images, as CSV: of a run, an adapter, a model on the hub, or an exported file")
    parser.add_argument("model", help="id or folder of a run, its adapter.safetensors, user/name on the hub, or model.onnx")
    parser.add_argument("images", nargs="+", help="images, or folders of them")
    parser.add_argument("--top", type=int, default=3, help="classes per image (default: %(default)s)")
    parser.add_argument("--out", help="file to write (default: the terminal)")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--weights", help="the backbone's weights, if they have moved since the run: a file or a name on the hub")
    args = parser.parse_args(argv)
    images = args.images if len(args.images) > 1 else args.images[0]
    if args.out:
        serving.check_out(args.out)
    rows = prediction.predict(args.model, images, args.top, args.batch_size, args.device, args.weights)
    if args.out is None:
        return serving.write_csv(rows, sys.stdout)
    serving.save_csv(rows, args.out)
    unread = sum(row.error is not None for row in rows)
    print(f"{len(rows):,} images in {args.out}" + (f", {unread:,} of which can't be read: the column error says why" if unread else ""))


def export_command(argv):
    parser = make_parser("export", "A folder for others: ONNX files that need no PyTorch, what predicts and serves, adapter, record and model card")
    parser.add_argument("run", help="id or folder of a finished run")
    parser.add_argument("folder", help="to write")
    parser.add_argument("--formats", default="float32,int8", help="of the ONNX files, by commas, or none (default: %(default)s)")
    parser.add_argument("--name", help="user/name, as the card will call it")
    parser.add_argument("--weights", help="the name on the hub under which others find the backbone's weights, if they came from a file")
    args = parser.parse_args(argv)
    formats = () if args.formats == "none" else tuple(args.formats.split(","))
    written = release.write_release(prediction.find_result(args.run), args.folder, formats, args.name, args.weights)
    print(f"{', '.join(written)} in {args.folder}")


def push_command(argv):
    parser = make_parser("push", "Uploads a folder of `export` to the Hugging Face hub, with the token that `hf auth login` has stored")
    parser.add_argument("folder", help="the folder")
    parser.add_argument("name", help="user/name")
    parser.add_argument("--public", action="store_true", help="for all to see (default: private)")
    args = parser.parse_args(argv)
    print(release.push(args.folder, args.name, private=not args.public))


def schedule_command(argv):
    parser = make_parser("schedule", "The merging schedule, for --rate, that makes a backbone as fast as asked for on this device. "
                         "It is timed in PyTorch; onnxruntime often gains more from merging: measure what it serves, and ask for less if you need less")
    parser.add_argument("--backbone", default="vit_base_patch16_224", choices=list(BACKBONES), metavar="NAME", help="default: %(default)s")
    parser.add_argument("--img_size", type=int, help="pixels of a side (default: the backbone's)")
    parser.add_argument("--speedup", type=float, help="target: times as fast as the unmerged model; give one of these three")
    parser.add_argument("--images_per_second", type=float, help="target: images per second")
    parser.add_argument("--latency", type=float, help="target: milliseconds per batch")
    parser.add_argument("--batch_size", type=int, default=16, help="images at a time when serving (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=3.0, help="to time each try (default: %(default)s)")
    args = parser.parse_args(argv)
    target = args.speedup, args.images_per_second, args.latency
    if target.count(None) != 2:
        raise ValueError("give exactly one of --speedup, --images_per_second, --latency")
    model = create_backbone(Config(backbone=args.backbone, img_size=args.img_size), 1000)
    fitted = speed.fit_schedule(model, args.speedup, args.images_per_second, args.batch_size, args.dtype, args.device, seconds=args.seconds,
                                latency=args.latency)
    print(f"{fitted.speedup:.2f} times as fast, {fitted.images_per_second:.1f} images/s, {fitted.mac_ratio:.2f} times fewer operations", file=sys.stderr)
    print(f"--rate '{json.dumps(fitted.schedule, separators=(',', ':'))}'")


COMMANDS = {
    "run": (run_command, "train and evaluate one config: --task dtd --method pyra"),
    "results": (results_command, "list the recorded runs with their accuracy and cost"),
    "grid": (grid_command, "do many runs on this machine, from a file with one config per line"),
    "slurm": (slurm_command, "write a script that does them as a Slurm array"),
    "predict": (predict_command, "classes and probabilities of images, as CSV, from a run, a model on the hub or an exported file"),
    "export": (export_command, "write a folder for others: ONNX files in float32 and int8, adapter, model card"),
    "push": (push_command, "upload such a folder to the Hugging Face hub"),
    "schedule": (schedule_command, "find the merging schedule for a speed-up, a latency or images/s on this device"),
    "benchmark": (benchmark_command, "measure images/s and memory of plain, ToMe and PYRA"),
    "check": (check_command, "check a folder of VTAB-1k, or a task of your own"),
}


def overview():
    lines = "".join(f"  {name:10} {help}\n" for name, (_, help) in COMMANDS.items())
    return f"usage: python -m pyra_lab COMMAND ...\n\n{lines}\npython -m pyra_lab COMMAND --help lists the options of a command."


def main(argv):
    """Does what the arguments say. Returns the exit code, None for 0. Raises ValueError and whatever the command raises."""
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return
    command, *rest = argv
    if command.startswith("-"):
        known = ", ".join(COMMANDS)
        raise ValueError(f"the first argument must be a command, one of {known}; to train, write: python -m pyra_lab run {shlex.join(argv)}")
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {close[0]}" if close else f"the commands are {', '.join(COMMANDS)}"
        raise ValueError(f"there is no command {command!r}; {hint}")
    return COMMANDS[command][0](rest)


@contextlib.contextmanager
def notes_on_stderr():
    """Within it, warnings are one line each, without their place in the code, which would look like a crash; and what a run logs is shown."""
    say = functools.cache(functools.partial(print, file=sys.stderr))  # each line once: a teacher's run is of the same images
    handler, logger = logging.Handler(), logging.getLogger("pyra_lab")
    handler.emit = lambda record: say(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place: say(f"{grid.NOTE}{' '.join(str(message).split())}")
        try:
            yield
        finally:
            logger.removeHandler(handler)


def entry():
    """The process: console script, python -m pyra_lab, and what run_grid and Slurm start. User errors end in one line on stderr."""
    runner = os.environ.pop("PYRA_RUNNER", None)
    if runner:
        grid.die_with_parent(int(runner))
    try:
        if rows := os.environ.get("PYRA_ROWS"):
            grid.load_rows(rows)
        with notes_on_stderr():
            sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError) as error:
        if runner:  # the log of the run keeps the place, too
            traceback.print_exc()
        hint = "; with --micro_batch a device takes fewer images at once" if isinstance(error, torch.OutOfMemoryError) else ""
        sys.exit(f"{grid.USER_ERROR}{first_line(error, 2000)}{hint}")
    except KeyboardInterrupt:
        sys.exit(f"{grid.USER_ERROR}interrupted; a run continues from its last epoch when the command is repeated")
