"""RaP: cutting heads and units is masking them, within a budget; and the score that chooses among random cuts."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import R, TINY, batch, count_flops, numbers, on_meta, randomise, rows, tiny, trained

import pyra
from pyra_lab import pruning
from pyra_lab.pefts import adapter, convpass, fact, snf
from pyra_lab.reducers import dtem, fpet

KEEP = [(3, 20), (1, 48), (2, 1)]


def kept_units(model, pruned, block):
    """Which of the model's units and heads the pruned one has, found by their weights."""
    full, less = model.blocks[block], pruned.blocks[block]
    units = [u for u, row in enumerate(full.mlp.fc1.weight) if any(torch.equal(row, other) for other in less.mlp.fc1.weight)]
    heads = [h for h in range(3) if any(torch.equal(full.attn.qkv.weight[8 * h], other) for other in less.attn.qkv.weight[::8])]
    return heads, units


def test_pruning_is_masking():
    """The pruned model's logits are those of the whole one without the other heads' and units' contributions."""
    model = tiny()
    pruned = pruning.prune_channels(copy.deepcopy(model), KEEP)
    masked = copy.deepcopy(model)
    for i, block in enumerate(masked.blocks):
        heads, units = kept_units(model, pruned, i)
        assert (len(heads), len(units)) == KEEP[i]
        with torch.no_grad():
            for h in set(range(3)) - set(heads):
                block.attn.proj.weight[:, 8 * h:8 * h + 8] = 0
            block.mlp.fc2.weight[:, sorted(set(range(48)) - set(units))] = 0
    torch.testing.assert_close(pruned(batch()), masked(batch()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pruned(batch()), model(batch()), rtol=1e-2)


def test_keeping_all_changes_nothing():
    model = tiny()
    weights, logits = copy.deepcopy(model.state_dict()), model(batch())
    assert pruning.prune_channels(model, [(3, 48)] * 3) is model
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(batch()), logits) and all(p.requires_grad for p in model.parameters())


def test_l1_keeps_the_largest():
    """A head by all its weights, a unit by its row and its column."""
    model = tiny()
    with torch.no_grad():
        model.blocks[0].attn.proj.weight[:, 8:16] *= 20  # head 1
        model.blocks[0].attn.qkv.weight[24:32] *= 10  # the keys of head 0
        model.blocks[0].mlp.fc1.weight[5] *= 30
        model.blocks[0].mlp.fc2.weight[:, 40] *= 30
    pruned = pruning.prune_channels(copy.deepcopy(model), [(2, 2), (3, 48), (3, 48)])
    assert kept_units(model, pruned, 0) == ([0, 1], [5, 40])
    assert kept_units(model, pruning.prune_channels(copy.deepcopy(model), [(1, 48)] * 3), 0)[0] == [1]


@pytest.mark.parametrize("reducer", ["plain", "pyra"])
def test_macs_of_a_pruned_model(reducer):
    """By formula in the widths that are left; by PyTorch's count the same but for matching and modulation."""
    model = pruning.prune_channels(tiny(), KEEP)
    if reducer == "pyra":
        pyra.add_pyra(model, R)
    counts = pyra.token_counts(model)
    expected = 36 * 24 * 48 + 24 * 5
    for (heads, units), n, m in zip(KEEP, counts, counts[1:]):
        expected += 4 * n * 24 * 8 * heads + 2 * n**2 * 8 * heads + 2 * m * 24 * units
    assert pyra.count_macs(model) == expected
    matching = sum((n - n // 2) * (n // 2) * 8 for n in counts[:-1]) if reducer != "plain" else 0
    modulation = sum(2 * r * 24 for r in R) if reducer == "pyra" else 0
    assert count_flops(model, batch(1)) == expected + matching + modulation


@pytest.mark.parametrize("name, ratio", [("vit_base_patch16_224", 3.46), ("vit_large_patch16_224", 3.44),
                                         ("vit_nano_patch4_56", 1.2), ("vit_nano_patch4_56", 4)])
def test_random_configurations_meet_the_budget(name, ratio):
    model = on_meta(name, num_classes=100)
    full = pyra.count_macs(model)
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(10):
        keep = pruning.random_keep(model, ratio, generator)
        pruned = pruning.prune_channels(copy.deepcopy(model), keep)
        assert abs(pyra.count_macs(pruned) * ratio / full - 1) <= 0.01
        seen.add(tuple(keep))
    assert len(seen) == 10
    assert len({units for _, units in keep}) > 1
    assert len({heads for heads, _ in keep}) > 1 or name == "vit_nano_patch4_56"  # of its 3 heads 1 may be left everywhere


def test_search_returns_the_best_candidate():
    """What to keep within budget, of least score; the model keeps the weights that it had before it was scored."""
    model = pyra.add_tome(tiny(mlp_ratio=4.0), R)
    before, logits, scores = copy.deepcopy(model.state_dict()), model(batch()), []

    def score(pruned):
        scores.append((pruned(batch()) - logits).square().mean())
        pruned.head.weight.data.zero_()  # what scoring does to its copy is its own affair
        return scores[-1]

    keep = pruning.search_pruning(model, 2.0, score, candidates=6, seed=3)
    best = pruning.prune_channels(copy.deepcopy(model), keep)
    assert len(scores) == 6 == len({value.item() for value in scores})
    torch.testing.assert_close((best(batch()) - logits).square().mean(), min(scores))
    assert abs(pyra.count_macs(best) * 2 / pyra.count_macs(model) - 1) <= 0.01
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert pruning.search_pruning(model, 2.0, score, candidates=6, seed=3) == keep


def test_search_passes_over_nan():
    model, scores = tiny(mlp_ratio=4.0), iter([math.nan, 2.0, 3.0, math.nan])
    seen = []
    keep = pruning.search_pruning(model, 2.0, lambda pruned: seen.append(pruned) or next(scores), candidates=4)
    best = pruning.prune_channels(copy.deepcopy(model), keep)
    assert torch.equal(best(batch()), seen[1](batch())) and not torch.equal(best(batch()), seen[0](batch()))


def test_probe_loss_tells_knowledge_from_noise():
    """Features that hold the label lose little, noise more than the uniform answer; scaling and shifting them changes nothing."""
    labels, held_out = torch.arange(60) % 4, torch.arange(40) % 4
    told = [F.one_hot(y, 4) + 0.1 * numbers(len(y), 4, seed=i) for i, y in enumerate((labels, held_out))]
    noise = [numbers(len(y), 4, seed=i) for i, y in enumerate((labels, held_out))]
    loss = pruning.probe_loss(told[0], labels, told[1], held_out, 4)
    assert loss < 0.2 < 1.3 < pruning.probe_loss(noise[0], labels, noise[1], held_out, 4)
    assert pruning.probe_loss(5 * told[0] - 3, labels, 5 * told[1] - 3, held_out, 4) == pytest.approx(loss, rel=1e-3)


def test_probe_loss_is_of_the_best_head():
    """Against scikit-learn's logistic regression on the same standardised features; its C is 1 / (n weight_decay)."""
    from sklearn.linear_model import LogisticRegression

    x, y, held_out, held_out_labels = numbers(60, 5), torch.arange(60) % 3, numbers(30, 5, seed=1), torch.arange(30) % 3
    mean, std = x.mean(dim=0), x.std(dim=0)
    head = LogisticRegression(C=1 / (60 * 0.01), tol=1e-8, max_iter=1000).fit((x - mean) / std, y)
    expected = F.nll_loss(torch.from_numpy(head.predict_log_proba((held_out - mean) / std)), held_out_labels).item()
    assert pruning.probe_loss(x, y, held_out, held_out_labels, 3, weight_decay=0.01) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("add, merge", [
    (lambda model: pyra.add_lora(model, rank=2), pyra.add_pyra), (adapter.add_adapter, dtem.add_dtem), (convpass.add_convpass, fpet.add_fpet),
    (fact.add_fact, pyra.add_pyra), (snf.add_snf, pyra.add_pyra)], ids=["lora", "adapter", "convpass", "fact", "snf"])
def test_pruned_models_are_adapted(tmp_path, add, merge):
    """By any PEFT, with learned metrics too, whose widths differ then; and its file fits a model that was pruned alike, and no other."""
    def build(keep):
        return randomise(merge(add(pruning.prune_channels(pyra.VisionTransformer(**TINY), keep)), R)).eval()

    model = build(KEEP)
    pyra.save_adapter(model, tmp_path / "a.safetensors")
    fresh = build(KEEP)
    for p in trained(fresh).values():
        p.data.zero_()
    assert torch.equal(pyra.load_adapter(fresh, tmp_path / "a.safetensors")(batch()), model(batch()))
    with pytest.raises(ValueError, match="another backbone"):
        pyra.load_adapter(build([(3, 20), (1, 48), (2, 2)]), tmp_path / "a.safetensors")


def test_pruned_models_take_lora():
    model = randomise(pyra.add_pyra(pyra.add_lora(pruning.prune_channels(tiny(), KEEP), rank=2), R)).eval()
    assert [block.attn.qkv.lora_b.shape for block in model.blocks] == [(72, 2), (24, 2), (48, 2)]
    logits = model(batch())
    torch.testing.assert_close(pyra.merge_lora(model)(batch()), logits, rtol=1e-4, atol=1e-5)


@rows("call, message", [
    (lambda model: pruning.prune_channels(model, [(1, 1)] * 2), r"keep must be a list with one \(heads, units\) for each of the 3 blocks"),
    (lambda model: pruning.prune_channels(model, [(1, 1), (1, 1), (0, 1)]), r"block 2: .* must be integers from \(1, 1\) to \(3, 48\), not \(0, 1\)"),
    (lambda model: pruning.prune_channels(model, [(1, 1), (1, 49), (1, 1)]), r"block 1: .* not \(1, 49\)"),
    (lambda model: pruning.prune_channels(model, [(1, 1.0)] * 3), r"block 0: .* not \(1, 1.0\)"),
    (lambda model: pruning.prune_channels(model, [1, 1, 1]), r"block 0: .* not 1"),
    (lambda model: pruning.prune_channels(pyra.add_lora(model), KEEP), "prune first"),
    (lambda model: pruning.search_pruning(adapter.add_adapter(model), 2.0, id), "prune first"),
    (lambda model: pruning.search_pruning(model, 1, id), "flops_ratio must be a finite number greater than 1, not 1"),
    (lambda model: pruning.search_pruning(model, 2.0, id, candidates=0), "candidates must be a positive integer, not 0"),
    (lambda model: pruning.search_pruning(model, 50, id), r"no random pruning of this model meets 1/50 of its MACs within 1 %"),
    (lambda model: pruning.search_pruning(model, 2.0, lambda pruned: math.nan, candidates=2), "score gave no finite number for any of the 2 candidates"),
])
def test_pruning_refused(call, message):
    model = tiny()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
