"""The laboratory around pyra.py: everything that trains, measures, compares or serves it."""

from pyra_lab.config import Config
from pyra_lab.deploy import export_onnx, pack, quantize_onnx
from pyra_lab.grid import run_grid, write_slurm
from pyra_lab.methods import METHODS, PEFTS, Method, Peft, build_model, fold
from pyra_lab.peft_format import load_peft, save_peft
from pyra_lab.prediction import predict
from pyra_lab.records import Result, recorded, results
from pyra_lab.release import card, pull, push, write_release
from pyra_lab.speed import benchmark, fit_schedule
from pyra_lab.training import load_run, run

__all__ = [
    "Config", "METHODS", "Method", "PEFTS", "Peft", "Result", "benchmark", "build_model", "card", "export_onnx", "fit_schedule", "fold",
    "load_peft", "load_run", "pack", "predict", "pull", "push", "quantize_onnx", "recorded", "results", "run", "run_grid", "save_peft",
    "write_release", "write_slurm",
]
