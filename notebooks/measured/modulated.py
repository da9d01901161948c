"""Does PYRA's modulation help other reducers? `python notebooks/measured/modulated.py folder --data_root ... --weights ...` writes modulated.csv beside it.

With one row for all pairs it suits any reducer that merges sources into destinations: PiToMe, DTEM and FPET have the hook that ToMe has.
"""

import argparse
import dataclasses
import types
from pathlib import Path

import numpy as np

from pyra_lab import METHODS, Config, Method, evaluation, run
from pyra_lab.records import write_rows
from pyra_lab.reducers.one_row import OneRow

REDUCERS = ("pitome", "dtem", "fpet")


def modulated(add):
    """The `add` of a row whose reducers are modulated too."""
    def add_modulated(model, config, plan):
        model = add(model, config, plan)
        for reducer in filter(None, (block.reducer for block in model.blocks)):
            row = OneRow(reducer.r, model.embed_dim, config.s)
            reducer.w_r, reducer.w_d, reducer.modulate = row.w_r, row.w_d, types.MethodType(OneRow.modulate, reducer)
        return model

    return add_modulated


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
    for name in REDUCERS:
        plain = METHODS[name]
        METHODS[f"{name}_row"] = Method(f"{plain.title}, modulated", plain.help, modulated(plain.add), plain.uses | {"s", "modulation_lr"})
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
