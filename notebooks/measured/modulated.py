"""Does PYRA's modulation help other reducers? `python notebooks/measured/modulated.py folder --data_root ... --weights ...` writes modulated.csv beside it.

With one row for all pairs it suits any reducer that merges sources into destinations: PiToMe, DTEM and FPET have the hook that ToMe has.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import numpy as np
import torch

import pyra
from pyra_lab import METHODS, Config, Method, evaluation, run
from pyra_lab.records import write_rows
from pyra_lab.reducers import dtem, fpet, pitome

MODULES = {"pitome": (pitome, pitome.PiToMe), "dtem": (dtem, dtem.DTEM), "fpet": (fpet, fpet.FPET)}


class Row:
    """PYRA-row's modulation, for a reducer that has the parameters w_r (1, s) and w_d (s, c)."""

    def modulate(self, src, dst):
        r = src.shape[1]
        return pyra.modulate(src, dst, pyra.widen(self.w_r).expand(r, -1) / math.sqrt(r), pyra.widen(self.w_d))


def modulated(module, kind):
    """The `add` of a row: the module's reducers, modulated."""
    with_row = type(f"{kind.__name__}Row", (Row, kind), {})

    def add(model, config, plan):
        for block in (model := module.add(model, config, plan)).blocks:
            if (reducer := block.reducer) is not None:
                reducer.w_r = torch.nn.Parameter(torch.empty(1, config.s).uniform_(-1, 1) / math.sqrt(config.s))
                reducer.w_d = torch.nn.Parameter(torch.zeros(config.s, model.embed_dim))
                reducer.__class__ = with_row
        return model

    return add


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="for the runs")
    parser.add_argument("--data_root", help="folder of the tasks")
    parser.add_argument("--weights", help="of the backbone")
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--tasks", default="eurosat1000,cifar100")
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    evaluation.METRICS["hits"] = lambda logits, labels: (logits.argmax(dim=1) == labels).int().tolist()
    base = Config(backbone=args.backbone, data_root=args.data_root, weights=args.weights, norm="half", epochs=3, warmup=1, batch_size=16, lr=3e-3,
                  modulation_lr=1e-4)
    rows = []
    for name, (module, kind) in MODULES.items():
        plain = METHODS[name]
        METHODS[f"{name}_row"] = Method(f"{plain.title}, modulated", plain.help, modulated(module, kind), plain.uses | {"s", "modulation_lr"})
        for method in (name, f"{name}_row"):
            for task in args.tasks.split(","):
                for seed in map(int, args.seeds.split(",")):
                    result = run(dataclasses.replace(base, method=method, task=task, seed=seed), args.folder)
                    hits = np.packbits(np.array(result.metrics["hits"], dtype=bool)).tobytes().hex()
                    rows.append(dict(task=task, method=method, seed=seed, accuracy=f"{result.accuracy_last:.4f}", macs=result.macs,
                                     images=len(result.metrics["hits"]), hits=hits))
    write_rows(rows, Path(__file__).with_suffix(".csv"))


if __name__ == "__main__":
    main()
