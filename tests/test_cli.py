"""The command line: its commands, its help, and that errors are one line."""

import dataclasses
import json
import logging
import os
import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import ONE_STEP, ROOT, forbidden, python, rows, write_image

from pyra_lab import batches, cli, speed, training, vtab
from pyra_lab.config import MOST, Config, parse


def lab(*args, runs):
    """`python -m pyra_lab ...` in a process of its own."""
    return python("-m", "pyra_lab", *args, cwd=ROOT, env={**os.environ, "PYRA_RUNS": str(runs)})


def test_a_run_is_recorded(task, tmp_path, monkeypatch):
    argv = ["--task", task, "--weights", "none", "--method", "tome", "--rate", json.dumps([40] * 3 + [0] * 9), "--epochs", "1", "--batch_size", "8",
            "--device", "cpu", "--dtype", "float32", "--eval_split", "val200", "--lora_rank", "1"]
    runs = tmp_path / "runs"
    done = lab("run", *argv, runs=runs)
    assert done.returncode == 0, done.stderr
    shown = re.fullmatch(r"accuracy on val200: (\d\.\d{4}), epoch 1 of 1; record in (.+)\n"
                         r"next: python -m pyra_lab predict (.+) images/ --out predictions.csv\n      python -m pyra_lab export (.+) folder\n", done.stdout)
    assert done.stderr.splitlines() == ["pyra_lab: note: eval_split val200 is of images that train_split train800val200 trains on: to select on val200, train on train800",
                                        "vit_nano_patch4_56, 56 pixels: 21 images to train on, 3 to select on"]
    config = parse(argv)
    assert shown[3] == shown[4] == config.id()
    monkeypatch.setattr(training, "build_model", forbidden)  # the record that the other process made is found in this one
    result = training.run(config, runs)
    assert shown[1] == f"{result.accuracy_last:.4f}" and shown[2] == result.folder == str(runs / config.id())
    assert result.token_counts == [197, 157, 117] + [77] * 10
    assert result.config["rate"] == [40] * 3 + [0] * 9 and len(result.history) == 1


def test_results(small_backbone, task, tmp_path, monkeypatch, capsys):
    """Aligned, the newest last; without a rate where the method has none."""
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path))
    assert not cli.main(["results"]) and capsys.readouterr().out == f"{tmp_path} holds no finished run\n"
    done = [training.run(Config(task=task, **{**ONE_STEP, "method": method}), progress=False) for method in ("tome", "plain")]
    for age, result in enumerate(done):
        os.utime(f"{result.folder}/result.json", (1e9 - age, 1e9 - age))
    assert not cli.main(["results"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert re.split("  +", head) == ["id", "task", "method", "rate", "epochs", "accuracy", "MACs, M", "other settings"]
    assert len({line.rindex("  ") for line in (head, *lines)}) == 1
    for line, result, rate in zip(lines, done[::-1], ("-", "[10, 6, 3]")):
        values = [Path(result.folder).name, task, result.config["method"], rate, "1", f"{result.accuracy_last:.4f}", f"{result.macs / 1e6:.1f}"]
        *found, others = re.split("  +", line.strip())
        assert found == values and {"batch_size=64", "lr=0.005", "dropout=0.0"} <= set(others.split()) and "seed=" not in others


def test_what_a_run_says(task, tmp_path, monkeypatch, capsys):
    """How many images it has for what, once; warnings as one line without a place in the code, none of them of the libraries below."""
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path))
    images = shutil.copytree(task.removeprefix("folder:"), tmp_path / "images")
    argv = f"run --task folder:{images} --weights none --epochs 1 --keep best --train_split train800 --batch_size 8 --device cpu --dtype float32 --lora_rank 1"
    monkeypatch.setattr(sys, "argv", ["pyra-lab", *argv.split()])
    monkeypatch.setattr(training, "warn_of", lambda configs: [warnings.warn("of two\nlines", stacklevel=1) for _ in range(2)])
    with pytest.raises(SystemExit) as left:
        cli.entry()
    assert not left.value.code
    shown = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]  # without bars
    assert shown == ["pyra_lab: note: of two lines", "vit_nano_patch4_56, 56 pixels: 18 images to train on, 3 to select on, 24 to test on"]
    assert not logging.getLogger("pyra_lab").handlers
    with pytest.raises(SystemExit) as left:
        cli.entry()
    (found,) = tmp_path.glob("*/result.json")
    assert not left.value.code and f"found, not trained again: {found.parent}\n" in capsys.readouterr().err
    images.rename(tmp_path / "away")
    with pytest.raises(SystemExit) as left:
        cli.entry()
    assert not left.value.code  # a record is good without its images
    shutil.copytree(tmp_path / "away", images)
    write_image(images / "train/green/one_more.png", (9, 9, 9))
    with pytest.raises(SystemExit, match=f"folder:{images} holds other images than when {found.parent} was trained on them: to train on these, delete that folder"):
        cli.entry()


def test_an_error_is_one_line(tmp_path):
    done = lab("run", "--task", "sprites_locatoin", runs=tmp_path / "runs")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"pyra_lab: [Uu]nknown task 'sprites_locatoin'[^\n]+\n", done.stderr)
    assert not (tmp_path / "runs").exists()


def raises(error):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.mark.parametrize("argv, normalize, sentence", [
    (["--epochs", "many"], None, "epochs must be of type int, not 'many'"),
    (["--task", "folder:/nowhere"], None, "/nowhere is not a folder"),
    (["--lr", "1e38", "--epochs", "3", "--batch_size", "64"], None, "loss was nan in epoch 2; a lower lr may help"),
    ([], KeyboardInterrupt(), "interrupted; a run continues from its last epoch when the command is repeated"),
    ([], torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more lines"),
     "CUDA out of memory. Tried to allocate 2.00 GiB.; with --micro_batch a device takes fewer images at once"),
], ids=["ValueError", "FileNotFoundError", "FloatingPointError", "KeyboardInterrupt", "OutOfMemoryError"])
def test_entry_leaves_with_a_sentence(task, tmp_path, monkeypatch, argv, normalize, sentence):
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["pyra-lab", "run", f"--task={task}", "--weights=none", "--device=cpu", "--dtype=float32", *argv])
    if normalize:
        monkeypatch.setattr(batches, "normalize", raises(normalize))
    with pytest.raises(SystemExit) as left:  # Python prints its text on stderr, and returns 1
        cli.entry()
    assert left.value.code.startswith("pyra_lab: ") and sentence in left.value.code and "\n" not in left.value.code
    assert not list(tmp_path.rglob("result.json"))


def test_help(capsys):
    """An overview of the commands, the options of each, and of a run every field of Config."""
    assert not cli.main([])
    overview = capsys.readouterr().out
    assert not cli.main(["--help"]) and capsys.readouterr().out == overview
    for command in ("check", "benchmark", "schedule", "push", "export", "predict", "slurm", "grid", "results", "run"):
        assert re.search(rf"^  {command} ", overview, re.MULTILINE)
        with pytest.raises(SystemExit) as left:
            cli.main([command, "--help"])
        shown = capsys.readouterr().out
        assert left.value.code == 0 and shown.startswith(f"usage: python -m pyra_lab {command} ")
    for f in dataclasses.fields(Config):
        assert re.search(rf"^ +--{f.name}\b", shown, re.MULTILINE), f.name
        assert f.metadata["help"].split()[0] in shown
        if f.default is not None:
            assert f"(default: {f.default})" in " ".join(shown.split())
    needed, rest = shown.split("what most runs need:")[1].split("the rest:")
    assert re.findall(r"^ +--(\w+)", needed, re.MULTILINE) == list(MOST) and not set(re.findall(r"^ +--(\w+)", rest, re.MULTILINE)) & set(MOST)
    assert "as --backbone" in rest and shown.count("vit_base_patch14_dinov2") == 1


@rows("argv, sentence", [
    (["grdi", "grid.jsonl"], "there is no command 'grdi'; did you mean grid"),
    (["predictions"], "there is no command 'predictions'; did you mean predict"),
    (["serve"], "there is no command 'serve'; the commands are run, results, grid, slurm, predict, export, push, schedule, benchmark, check"),
    (["schedule", "--latency", "5", "--images_per_second", "9"], "give exactly one of --speedup, --images_per_second, --latency"),
    (["schedule"], "give exactly one of --speedup, --images_per_second, --latency"),
    (["schedule", "--latency", "0"], "give exactly one of speedup, images_per_second and latency, a positive number, not .0.0."),
    (["export", "none", "folder"], "there is no finished run, run folder, adapter, .onnx file or hub name 'none' .runs are in "),
    (["push", "/nowhere", "me/model"], "/nowhere has no README.md, adapter.safetensors, result.json: write it with python -m pyra_lab export"),
    (["--task", "a b"], "the first argument must be a command, one of run, .*; to train, write: python -m pyra_lab run --task 'a b'"),
    (["benchmark", "--training", "--compile", "default"], "--training is measured without --compile"),
    (["benchmark", "--suite", "gpu"], "--suite needs --out, the file that it writes"), (["benchmark", "--out", "gpu.json"], "and --out belongs to --suite"),
    (["slurm", "grid.jsonl", "--max", "0"], "--max must be at least 1, not 0"),
    (["check", "/nowhere"], "/nowhere is not a folder"),
    (["run", "--methd", "pyra"], "^there is no option --methd; did you mean --method$"),
    (["run", "--epoch=3"], "^there is no option --epoch; did you mean --epochs$"),
    (["schedule", "--zzz"], "^there is no option --zzz; python -m pyra_lab schedule --help lists the options$"),
    (["run", "sprites_location"], "^unrecognized arguments: sprites_location; python -m pyra_lab run --help lists"),
    (["grid"], "^the following arguments are required: grid; python -m pyra_lab grid --help"),
    (["schedule", "--backbone", "resnet50"], "invalid choice: 'resnet50'.*; python -m pyra_lab schedule --help"),
])
def test_what_is_refused_in_a_sentence(argv, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        cli.main(argv)


def test_benchmark(capsys, monkeypatch):
    cli.main("benchmark --backbone vit_nano_patch4_56 --batch_size 1 --rate 2.5 --device cpu --dtype float32 --seconds 0.01 --rounds 2".split())
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["dtype", "model", "images/s"]
    rows = [[line[:9].strip(), line[10:27].strip(), *map(float, line[27:].split())] for line in lines]
    assert [row[:2] for row in rows][:3] == [["float32", name] for name in ("plain", "tome", "pyra")]
    for _, model, median, low, high, speedup, ratio, latency, peak in rows:
        assert 0 < low <= median <= high and speedup > 0 and latency > 0 and 2 < peak < 20 and 1 <= ratio < 3
    row = dict(dtype="bfloat16", model="pyra", mac_ratio=3.46, **speed.Speed(10.0, 9.0, 11.0, 3.0, 100.0, None)._asdict())
    monkeypatch.setattr(speed, "training_table", lambda *args: [row])
    cli.main("benchmark --training --batch_size 4".split())
    assert capsys.readouterr().out.splitlines()[1].split() == ["bfloat16", "pyra", "10.0", "9.0", "11.0", "3.00", "3.46", "100.0", "-"]


def test_schedule_prints_what_run_takes(capsys, monkeypatch):
    monkeypatch.setattr(speed, "fit_schedule", lambda *args, **kwargs: speed.Fitted([60, 45, 0], 2.0, 1.9, 10.0, 0.0))
    cli.main("schedule --backbone vit_nano_patch4_56 --latency 5".split())
    name, value = shlex.split(capsys.readouterr().out)
    assert parse([name, value]).rate == [60, 45, 0]


def test_exit_codes(tmp_path, monkeypatch, capsys):
    """1 where a run failed or a folder has faults."""
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path / "runs"))
    (tmp_path / "grid.jsonl").write_text('{"task": "cifr100"}\n')
    assert cli.main(["grid", str(tmp_path / "grid.jsonl")]) == 1
    assert capsys.readouterr().out == f"0 of 1 runs are recorded in {tmp_path / 'runs'}\n"
    with pytest.raises(ValueError, match="Unknown task 'cifr100'"):
        cli.main(["slurm", str(tmp_path / "grid.jsonl")])
    assert not (tmp_path / "grid.sbatch").exists()
    for text, gpu in (('{"task": "digits"}', "--gres=gpu:1 "), ('{"task": "digits", "device": "cpu"}', "")):
        (tmp_path / "grid.jsonl").write_text(text)
        assert not cli.main(["slurm", str(tmp_path / "grid.jsonl"), "--max", "2"])
        shown, script = capsys.readouterr(), (tmp_path / "grid.sbatch").read_text()
        assert shown.out == f"sbatch {gpu}--cpus-per-task=4 --time=2:00:00 {tmp_path / 'grid.sbatch'}\n" and shown.out in script and "%2\n" in script
        assert shown.err.endswith(f"logs will be {tmp_path}/runs/logs/pyra-<job>_<task>.log\n")
    assert cli.main(["check", str(tmp_path), "dtd", "--quick"]) == 1
    assert capsys.readouterr().out.endswith("\n1 task checked: missing (images not decoded)\n")
    monkeypatch.setattr(vtab, "check", lambda root, tasks, quick: {"dtd": [vtab.Finding("note", "JPEG")]})
    assert cli.main(["check", str(tmp_path)]) == 0
