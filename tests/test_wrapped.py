"""Models in the wrappers that PyTorch has, in every function that takes a model: as on the bare one. A foreign model is refused."""

import functools

import pytest
import torch
import torch.distributed
import torch.nn as nn
from helpers import R, batch, identical, rows, snapshot, tiny
from safetensors import safe_open

import pyra
from pyra_lab import budget, deploy, epochs, evaluation, methods, pruning, report, speed
from pyra_lab.config import Config
from pyra_lab.pefts import adapter, convpass, fact, snf
from pyra_lab.pefts.shared import peft_macs
from pyra_lab.reducers import ats, diffrate, evit, ltmp, tofu

CONFIG = Config(rate=R, weights="none", device="cpu").resolved()
add_lora = functools.partial(pyra.add_lora, rank=2)


def nothing(model):
    return model


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """One process is a group: what DistributedDataParallel needs."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def groups(model):
    return [(group["name"], group["lr"], group["weight_decay"], len(group["params"])) for group in pyra.param_groups(model, 0.5)]


def saved(model, path):
    pyra.save_adapter(model, path)
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).tolist() for name in sorted(file.keys())}


def loaded(model, path):
    pyra.save_adapter(add_lora(tiny()), path)
    return pyra.load_adapter(model, path)


def exported(model, path):
    deploy.check_export(model, path, [0.5] * 3, [0.5] * 3)


def drawn(model, path):
    pytest.importorskip("matplotlib").use("Agg")
    report.merged_tokens(model, torch.zeros(1, 3, 24, 24, dtype=torch.uint8), "half", ["x"], [1])


CALLS = [  # what is done before the model is wrapped; the function, of the model and perhaps a path
    *[(nothing, function) for function in (
        add_lora, pyra.freeze, groups, lambda model: pyra.add_tome(model, R), lambda model: pyra.add_pyra(model, R), lambda model: pyra.solve_macs(model, 1.5),
        lambda model: pyra.load_pretrained(model, tiny(seed=1)), lambda model: pyra.set_reducers(model, [None] * 3), pyra.describe, pyra.check_peft,
        lambda model: adapter.add_adapter(model, 4), lambda model: convpass.add_convpass(model, 4), fact.add_fact, snf.add_snf,
        evit.add_evit, lambda model: evit.evit_keep_rate(model, 0.8 * pyra.count_macs(tiny())), lambda model: tofu.add_tofu(model, R),
        lambda model: ats.add_ats(model, 20), lambda model: ats.ats_counts(model, R), ltmp.add_ltmp, diffrate.add_diffrate,
        lambda model: pruning.prune_channels(model, [(2, 30)] * 3), deploy.pack, exported, drawn, speed.most_macs_ratio,
        lambda model: pruning.search_pruning(model, 1.3, lambda pruned: 0.0, candidates=1, progress=False),
        lambda model: budget.schedule(CONFIG, model), lambda model: budget.target_macs(CONFIG, model), lambda model: budget.counts_of_schedule(model, R),
    )],
    *[(add_lora, function) for function in (pyra.merge_lora, groups, saved, loaded, methods.fold, methods.count_trained,
                                            lambda model: [group["name"] for group in epochs.make_optimizer(model, CONFIG).param_groups])],
    *[(functools.partial(pyra.add_tome, r=R), function) for function in (
        pyra.token_counts, pyra.count_macs, lambda model: budget.mean_macs(model, torch.ones(4, 1)))],
    *[(ltmp.add_ltmp, function) for function in (
        budget.learns_budget, budget.depends_on_image, lambda model: [part.tolist() for part in budget.forward_counted(model, batch())],
        lambda model: budget.count_tokens(model, [batch()]).tolist(), lambda model: budget.budget_loss(model, torch.ones(4, 2), 1e6).item(),
    )],
    (functools.partial(ats.add_ats, counts=20), lambda model: budget.calibrate(ats.dial(model, CONFIG), model, CONFIG, batch())),
    (diffrate.add_diffrate, diffrate.diffrate_rates), (diffrate.add_diffrate, diffrate.freeze_diffrate),
    (fact.add_fact, fact.fold_fact), (adapter.add_adapter, peft_macs),
]
WRAPPERS = [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.parallel.DistributedDataParallel(model))]


def called(prepare, call, path, wrap=nothing):
    """The result of a call, the model's tensors and which are trained."""
    torch.manual_seed(0)
    model = prepare(tiny())
    wrapped = wrap(model)
    result = call(wrapped, path) if call in (saved, loaded, exported, drawn) else call(wrapped)
    assert isinstance(result, nn.Module) == (result is wrapped)  # the model is returned as it was given
    return "model" if result is wrapped else result, snapshot(model), [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["compile", "parallel", "distributed"])
def test_a_wrapped_model_is_as_good_as_the_bare_one(tmp_path, process_group, wrap):
    for prepare, call in CALLS:
        expected, found = called(prepare, call, tmp_path / "a"), called(prepare, call, tmp_path / "b", wrap)
        assert found[0] == expected[0] and identical(found[1], expected[1]) and found[2] == expected[2], call


@rows("prepare, call", CALLS)
def test_a_foreign_model_is_refused(tmp_path, prepare, call):
    for foreign in (nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)), None):
        with pytest.raises(ValueError, match=r"\w+ needs a pyra.VisionTransformer, not [\w.]+: see create_model and from_timm"):
            call(foreign, tmp_path / "a") if call in (saved, loaded, exported, drawn) else call(foreign)


def test_wrapped_models_are_evaluated_and_timed():
    for wrap in (nn.DataParallel, nothing):
        assert evaluation.evaluate(wrap(tiny()), [(batch(), torch.zeros(3, dtype=torch.int64))])["accuracy"] >= 0
        assert speed.benchmark({"model": wrap(tiny())}, batch_size=1, seconds=0.01, rounds=1)["model"].images_per_second > 0
