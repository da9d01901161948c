"""The laboratory around pyra.py: everything that trains, measures, compares or serves it."""

from pyra_lab.config import Config
from pyra_lab.deploy import export_onnx, pack
from pyra_lab.grid import run_grid
from pyra_lab.methods import METHODS, PEFTS, Method, Peft, build_model, fold
from pyra_lab.records import Result, recorded, results
from pyra_lab.speed import benchmark, fit_schedule
from pyra_lab.training import load_run, run

__all__ = [
    "METHODS", "PEFTS", "Config", "Method", "Peft", "Result", "benchmark", "build_model", "export_onnx", "fit_schedule", "fold", "load_run", "pack",
    "recorded", "results", "run", "run_grid",
]
