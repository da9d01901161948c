"""Budgets: what a rate leaves to do, what a model does, and how methods that choose their own numbers of tokens are brought there."""

from types import SimpleNamespace

import pytest
import torch
from helpers import R, batch, on_meta, tiny, trained

import pyra
from pyra_lab import budget
from pyra_lab.pefts import adapter
from pyra_lab.pefts.shared import peft_macs
from pyra_lab.reducers import ats, diffrate, evit, ltmp, tofu

CONFIG = SimpleNamespace(rate=R)


def with_thresholds(model, merge=0.6, prune=0.012):
    """With LTMP whose thresholds merge some tokens, prune some, and more in some images than in others."""
    for block in ltmp.add_ltmp(model).blocks:
        block.reducer.merge_threshold.data.fill_(merge)
        block.reducer.prune_threshold.data.fill_(prune)
    return model


@pytest.mark.parametrize("rate, expected", [("high", [40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3]), (2, [16] * 11 + [10]), ([3] * 12, [3] * 12)])
def test_the_schedule_and_the_operations_of_a_rate(rate, expected):
    """A list is taken as it stands; the target is what ToMe costs, whatever reducer the model has."""
    model, config = on_meta("vit_nano_patch4_56"), SimpleNamespace(rate=rate)
    assert budget.schedule(config, model) == expected
    target = budget.target_macs(config, tofu.add_tofu(model, 5))
    assert target == pyra.count_macs(pyra.add_tome(model, expected)) == budget.target_macs(config, model)


def test_a_schedule_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 entries|3 blocks"):
        budget.target_macs(SimpleNamespace(rate=[1, 2]), tiny())


def test_mean_macs():
    """ATS: 3ND^2 + N^2 D + N'ND + N'D^2 + 2 N'D hidden per block; of the others what count_macs counts. The mean over the images."""
    model = ats.add_ats(tiny(), [30, 25, 20])
    counts = budget.forward_counted(model, batch())[1]
    expected = 0
    for n in counts.long().T.tolist():
        for before, after in zip(n, n[1:]):
            expected += 3 * before * 24**2 + before**2 * 24 + after * before * 24 + after * 24**2 + 2 * after * 24 * 48
        expected += 36 * 24 * 48 + 24 * 5
    assert budget.mean_macs(model, counts) == expected / 3
    for model in (evit.add_evit(tiny(), 0.7, [0, 1, 2]), tofu.add_tofu(tiny(), R), diffrate.add_diffrate(tiny()).eval()):
        assert budget.mean_macs(model, budget.forward_counted(model, batch())[1]) == pyra.count_macs(model)
    model = evit.add_evit(adapter.add_adapter(tiny()), 0.7)
    assert peft_macs(model, budget.forward_counted(model, batch())[1]).tolist() == [peft_macs(model)] * 3


def test_count_tokens():
    """One column where all images keep the same number, and no image is read; else one per image, of all batches."""
    assert budget.count_tokens(pyra.add_tome(tiny(), R), iter([None])).tolist() == [[37], [27], [21], [18]]
    model = ats.add_ats(tiny(), [30, 25, 20]).train()
    assert budget.count_tokens(model, []).shape == (4, 0)  # a process without images
    counts = budget.count_tokens(model, [batch(5), batch(2)])
    assert counts.shape == (4, 7) and len(counts[-1].unique()) > 1
    assert torch.equal(counts[:, :5], budget.forward_counted(model.eval(), batch(5))[1])


@pytest.mark.parametrize("distilled", [False, True])
def test_ltmps_budget_is_the_papers_formula(distilled):
    """rho = mean over the blocks of [2 m n D^2 + (m n)^2 D + 4 m' n D^2] / [6 n D^2 + n^2 D], m the mean share of living tokens."""
    model = with_thresholds(tiny(distilled=distilled, mlp_ratio=4.0)).train()
    counts = budget.forward_counted(model, batch())[1]
    n, d = 36 + model.specials, 24
    m = (counts.mean(dim=1) / n).tolist()
    rho = sum(2 * a * n * d**2 + (a * n)**2 * d + 4 * b * n * d**2 for a, b in zip(m, m[1:])) / 3 / (6 * n * d**2 + n**2 * d)
    rest, blocks = 36 * 48 * 24 + 24 * 5, 3 * 2 * (6 * n * d**2 + n**2 * d)
    assert budget.budget_loss(model, counts, rest + 0.3 * blocks).item() == pytest.approx(10 * (rho - 0.3)**2, rel=1e-4)
    assert budget.budget_loss(model, counts, rest + rho * blocks).item() == pytest.approx(0, abs=1e-8)


def test_diffrates_budget_is_the_papers_on_vit_tiny():
    """5 (GMACs - target)^2, but for rounding 1.2246 to 1.22."""
    model = diffrate.add_diffrate(on_meta("vit_tiny_patch16_224"))
    counts = torch.tensor([197.0] * 2 + [101.0] * 11)[:, None]
    gmacs = pyra.macs_of_counts(model, counts[:, 0].tolist()) / 1e9
    assert budget.budget_loss(model, counts, 0.5e9).item() == pytest.approx(5 * (gmacs - 0.5)**2, rel=0.01)


@pytest.mark.parametrize("add", [ltmp.add_ltmp, lambda model: diffrate.add_diffrate(model, 2)], ids=["ltmp", "diffrate"])
def test_a_budget_is_reached(add):
    """By the budget's loss alone, with the groups of param_groups and what follows each step."""
    model = add(pyra.add_lora(tiny(), rank=2)).train()
    target = 0.6 * pyra.count_macs(tiny())
    groups = pyra.param_groups(model)
    for group in groups:
        group["lr"] *= 10  # few steps
    optimizer, first = torch.optim.AdamW(groups), None
    for _ in range(60):
        logits, counts = budget.forward_counted(model, batch())
        loss = budget.budget_loss(model, counts, target)
        first = first or budget.mean_macs(model, counts.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for block in model.blocks:
            getattr(block.reducer, "after_step", lambda: None)()
    found = budget.mean_macs(model.eval(), budget.forward_counted(model, batch())[1].detach())
    assert abs(first / target - 1) > 0.1 and abs(found / target - 1) < 0.05


@pytest.mark.parametrize("method, add", [
    (ats, lambda model: ats.add_ats(model, [27, 21, 18])), (ltmp, lambda model: with_thresholds(model, 0.9, 0.0)),
    (diffrate, lambda model: diffrate.add_diffrate(model, 1)),
], ids=["ats", "ltmp", "diffrate"])
def test_a_dial_brings_the_model_to_its_budget(method, add):
    """Whatever it cost before; the plan that is returned makes the same model again."""
    model, images = add(tiny()), batch(8)
    target = budget.target_macs(CONFIG, model)
    cost = lambda model: budget.mean_macs(model, budget.count_tokens(model, [images]))
    before = cost(model)
    plan = budget.calibrate(method.dial(model, CONFIG), model, CONFIG, images)
    assert abs(before / target - 1) > 0.03 and abs(cost(model) / target - 1) < 0.03
    if method is ats:
        assert cost(ats.add_ats(tiny(), plan)) == cost(model)
    elif method is diffrate:
        assert cost(diffrate.freeze_diffrate(diffrate.add_diffrate(tiny()), plan)) == cost(model)
    else:
        assert plan is None and {block.reducer.prune_threshold.item() for block in model.blocks} == {0.0}


@pytest.mark.parametrize("add, lrs", [
    (ltmp.add_ltmp, {"merge_threshold": 5e-3, "prune_threshold": 5e-6}), (diffrate.add_diffrate, {"prune_logits": 1e-2, "merge_logits": 1e-2}),
], ids=["ltmp", "diffrate"])
def test_what_meets_a_budget_has_learning_rates_of_its_own(add, lrs):
    """And no weight decay: thresholds and logits must not drift towards 0."""
    model = add(pyra.add_lora(tiny(), rank=2))
    groups = {group["name"]: group for group in pyra.param_groups(model, lr=0.1, weight_decay=0.2)}
    assert groups.keys() == {"decay", "no_decay", *lrs}
    for name, lr in lrs.items():
        assert groups[name]["lr"] == lr and groups[name]["weight_decay"] == 0
        assert {id(p) for p in groups[name]["params"]} == {id(p) for n, p in trained(model).items() if n.endswith(name)}
