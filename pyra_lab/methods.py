"""The methods and the PEFTs, one row each; and the model that a config describes.

A row may be added at run time, for example in a notebook, and then works in Config, run, run_grid and results:

    def merge_half(model, config, plan):
        return pyra.add_tome(model, [r // 2 for r in schedule(config, model)])

    METHODS["half"] = Method("Half", "merges half as many pairs", merge_half)

A run's id knows the row by its name alone: after changing a row, delete its runs or use another folder for them.
"""

import json
import warnings
from functools import partial
from typing import Callable, NamedTuple

import torch

import pyra
from pyra_lab import pruning
from pyra_lab.backbones import load_backbone
from pyra_lab.budget import schedule
from pyra_lab.pefts import adapter, convpass, fact, snf
from pyra_lab.reducers import ats, diffrate, dtem, evit, fpet, ltmp, one_row, pitome, tofu

RATE = frozenset({"rate"})
ANY_NUMBER_OF_PAIRS = RATE | {"rise", "any_rate", "train_rate"}  # its reducers merge r pairs, whatever r is set to: see epochs.set_share


class Method(NamedTuple):
    """How a model gets cheaper to run. The contract of a reducer is in `pyra.Block`.

    Where there is no plan, `add` is also called before a run with a model on the meta device, without weights and without the PEFT,
    so that a config that can't work is refused before anything is trained: it must not read the weights' values.
    """

    title: str  # in tables, legends and figures
    help: str
    add: Callable  # (model, config, plan) -> model; plan is None where the row has none
    uses: frozenset = RATE  # the optional fields of Config that matter to it; all others fall back to their defaults before the id is made
    check: Callable | None = None  # (model without weights, config): raises ValueError for what the plan could not do
    plan: Callable | None = None  # (config, PlanContext) -> what is chosen before training, as JSON
    dial: Callable | None = None  # (model, config) -> budget.Dial, by which the trained model is brought to its budget
    second_stage: bool = False  # can be added to a model that is adapted already
    before_peft: bool = False  # add changes the backbone itself, before the PEFT is added
    in_memory: bool = False  # its plan reads whole splits


class PlanContext(NamedTuple):
    """What a plan may use: the run's data and device, and models as the run would build them."""

    device: torch.device
    dtype: torch.dtype
    num_classes: int
    steps: int  # per epoch
    sample: Callable  # () -> some normalised images to train on, as when evaluating, on the device
    predict_split: Callable  # (function, split) -> function(images) for all images of a split, float32, and their labels, on the device
    backbone: Callable  # () -> the pre-trained backbone, on the CPU
    adapted: Callable  # () -> the same with the PEFT
    train: Callable  # (model, epochs) trains as the run would, and resumes where it was interrupted
    progress: bool  # whether to show a bar


class Peft(NamedTuple):
    """What is trained besides the reducer and the head."""

    title: str
    help: str
    add: Callable  # (model, config) -> model
    uses: frozenset = frozenset({"peft_dim", "dropout"})  # as in Method
    fold: Callable | None = None  # (model) -> model, where the PEFT can be folded into the weights; does nothing to any other model
    defaults: Callable | None = None  # (task) -> the published settings of the task, as fields of Config
    trains_backbone: bool = False  # then with layer-wise rates and MAE's schedule


def add_merging(model, config, plan):
    return pyra.add_tome(model, schedule(config, model))


def add_modulation(model, config, plan):
    return pyra.add_pyra(model, schedule(config, model), config.s)


METHODS = {
    "plain": Method("plain", "no reduction: the PEFT alone", lambda model, config, plan: model, frozenset()),
    "tome": Method("ToMe", "merges similar tokens", add_merging, ANY_NUMBER_OF_PAIRS, second_stage=True),
    "pyra": Method("PYRA", "merges similar tokens with modulation", add_modulation, RATE | {"s", "modulation_lr"}, second_stage=True),
    "evit": Method("EViT", "keeps what the class token attends to", evit.add, second_stage=True),
    "tofu": Method("ToFu", "prunes early, merges late", tofu.add, ANY_NUMBER_OF_PAIRS, second_stage=True),
    "ats": Method("ATS", "samples tokens, image by image", ats.add, plan=ats.plan, dial=ats.dial),
    "ltmp": Method("LTMP", "learns thresholds to merge and prune by, image by image", ltmp.add, dial=ltmp.dial),
    "diffrate": Method("DiffRate", "learns how many tokens each block prunes and merges", diffrate.add, plan=diffrate.plan),
    "rap": Method("RaP", "prunes channels, chosen on val200", pruning.add, check=pruning.flops_ratio, plan=pruning.plan, before_peft=True, in_memory=True),
    "pyra_row": Method("PYRA-row", "PYRA whose pairs share one row of W_r", one_row.add, ANY_NUMBER_OF_PAIRS | {"s", "modulation_lr"}, second_stage=True),
    "fpet": Method("FPET", "merges half of the patches, a few times, with a learned matching", fpet.add, second_stage=True),
    "pitome": Method("PiToMe", "merges where tokens are crowded, by energy", pitome.add, ANY_NUMBER_OF_PAIRS, second_stage=True),
    "dtem": Method("DTEM", "merges similar tokens by a learned metric", dtem.add, ANY_NUMBER_OF_PAIRS, second_stage=True),
}


def train_all(model, config):
    """MAE's fine-tuning: the whole backbone, with a small head to start from."""
    pyra.check_peft(model)
    if model.layer_scale:
        warnings.warn("LayerScale is folded into attn.proj and mlp.fc2: full fine-tuning trains the products, and no scale of its own", stacklevel=2)
    torch.nn.init.trunc_normal_(model.head.weight, std=2e-5)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith("head_dist."))  # the class head alone is trained and evaluated
    return model


def add_lora(model, config):
    return pyra.add_lora(model, config.lora_rank, config.dropout, config.lora_targets.split(","), config.lora_alpha)


SCALED = frozenset({"peft_dim", "peft_scale", "dropout"})
PEFTS = {
    "lora": Peft("LoRA", "low-rank update of qkv", add_lora, frozenset({"lora_rank", "lora_targets", "lora_alpha", "dropout"}), pyra.merge_lora),
    "adapter": Peft("Adapter", "bottleneck after the MLP", adapter.add),
    "convpass": Peft("Convpass", "convolutional bypasses", convpass.add, SCALED, defaults=convpass.defaults),
    "fact_tt": Peft("FacT-TT", "shared low-rank factors, tensor train", partial(fact.add, "tt"), SCALED, fact.fold_fact, partial(fact.defaults, "tt")),
    "fact_tk": Peft("FacT-TK", "shared low-rank factors, Tucker", partial(fact.add, "tk"), SCALED, fact.fold_fact, partial(fact.defaults, "tk")),
    "snf": Peft("SNF", "flows on the shortcuts", snf.add, frozenset()),
    "full": Peft("full", "the whole backbone, as MAE fine-tunes it", train_all, frozenset({"layer_decay"}), trains_backbone=True),
}
# The fields of Config that only some methods or PEFTS use. All others matter to every run.
OPTIONAL = frozenset().union(*(row.uses for row in (*METHODS.values(), *PEFTS.values())))


def call_add(row, model, *arguments):
    """row.add, with what it must have done checked. Raises ValueError."""
    model = row.add(model, *arguments)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"add of {row.title} must return the model, not {model!r}")
    for reducer in {block.reducer for block in model.blocks} - {None}:
        if not hasattr(reducer, "tokens_after"):
            raise ValueError(f"the {type(reducer).__name__} of {row.title} needs a method tokens_after(n): see pyra.Block")
        try:
            json.dumps(getattr(reducer, "settings", None))
        except TypeError as error:
            raise ValueError(f"the settings of {row.title}'s {type(reducer).__name__} must be JSON: {error}") from error
    return model


def adapt(model, config):
    """The backbone with the config's PEFT."""
    return call_add(PEFTS[config.peft], model, config)


def build_model(config, num_classes, plan=None):
    """The pre-trained backbone with all that the config adds, on the CPU in float32, initialised by the config's seed.

    plan: of a finished run, where its method makes one: Result.plan.
    """
    config = config.resolved()
    method, model = METHODS[config.method], load_backbone(config, num_classes)
    if method.before_peft:
        return adapt(call_add(method, model, config, plan), config)
    return call_add(method, adapt(model, config), config, plan)


@pyra.on_model
def fold(model):
    """Folds the PEFT into the weights, where it can be: the same logits for less work. Returns the model."""
    for row in PEFTS.values():
        if row.fold is not None:
            model = row.fold(model)
    return model


def part_of(name):
    """Which part of a model a parameter belongs to."""
    if not pyra.is_adapter(name):
        return "backbone"
    if ".reducer." in name:
        return "reducer"
    return "peft" if "lora_" in name or "peft_" in name else "head"


@pyra.on_model
def count_trained(model):
    """Trained parameters by part: peft, reducer, head, backbone."""
    counts = {"peft": 0, "reducer": 0, "head": 0, "backbone": 0}
    for name, p in model.named_parameters():
        if p.requires_grad:
            counts[part_of(name)] += p.numel()
    return counts
