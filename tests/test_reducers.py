"""The other token reducers against naive loops, the papers' figures and their own promises."""

import copy
import functools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import R, TINY, batch, numbers, on_meta, randomise, rows, tiny, trained
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import pyra
from pyra_lab import budget
from pyra_lab.pefts import adapter, convpass, fact, snf
from pyra_lab.reducers import ats, diffrate, dtem, evit, fpet, ltmp, one_row, pitome, shared, tofu

RATES = [(36, 36), (25, 20), (30, 9)]  # patches that DiffRate keeps, of 36


def add_ltmp(model, merge=0.6, prune=0.012):
    """With thresholds that merge some, prune some, and more in some images than in others."""
    ltmp.add_ltmp(model)
    for block in model.blocks:
        block.reducer.merge_threshold.data.fill_(merge)
        block.reducer.prune_threshold.data.fill_(prune)
    return model


def add_diffrate(model, rates=RATES, granularity=1):
    """With logits that come to these rates."""
    diffrate.add_diffrate(model, granularity)
    for block, pair in zip(model.blocks, rates):
        for logits, kept in zip((block.reducer.prune_logits, block.reducer.merge_logits), pair):
            logits.data = -0.5 * (block.reducer.candidates - kept + 0.5).abs()  # 0.5: the mean is rounded up
    return model


def freeze_diffrate(model):
    return diffrate.freeze_diffrate(diffrate.add_diffrate(model), RATES)


REDUCERS = {
    "evit": lambda model: evit.add_evit(model, 0.7, [0, 1, 2]),
    "tofu": lambda model: tofu.add_tofu(model, R),
    "ats": lambda model: ats.add_ats(model, [30, 25, 20]),
    "ltmp": add_ltmp,
    "diffrate": add_diffrate,
    "frozen_diffrate": freeze_diffrate,
    "one_row": lambda model: randomise(one_row.add_one_row(model, R)),
    "fpet": lambda model: fpet.add_fpet(model, [12, 8, 3]),
    "pitome": lambda model: pitome.add_pitome(model, R),
    "dtem": lambda model: randomise(dtem.add_dtem(model, R)),
}
PEFTS = {
    "lora": lambda model: pyra.add_lora(model, rank=4, dropout=0.0),
    "adapter": lambda model: adapter.add_adapter(model, dim=4, dropout=0.0),
    "convpass": lambda model: convpass.add_convpass(model, dim=4, scale=0.5, dropout=0.0),
    "fact": lambda model: fact.add_fact(model, rank=4, scale=5, dropout=0.0),
    "snf": lambda model: snf.add_snf(model, flows=1),
}
every_reducer = rows("reducer", REDUCERS)


def reduced(reducer, peft=None, **kwargs):
    """A small, random ViT with a reducer, and a PEFT whose parameters are random too, in eval mode."""
    model = tiny(**kwargs)
    return REDUCERS[reducer](model if peft is None else randomise(PEFTS[peft](model))).eval()


@rows("reducer, training", [(reducer, training) for reducer in REDUCERS for training in (False, True)])
def test_no_reducer_waits_for_a_gpu(reducer, training):
    """On tensors without values, all on one GPU, unless the number of tokens depends on the image: that has to be known before the next block."""
    model = reduced(reducer).train(training)
    with FakeTensorMode(), torch.device("cuda"):
        fake = lambda t: torch.empty(t.shape, dtype=t.dtype)
        tensors = {name: fake(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
        forward = functools.partial(torch.func.functional_call, model, tensors, fake(batch()))
        if reducer == "ats" or reducer in ("ltmp", "diffrate") and not training:
            with pytest.raises(DataDependentOutputException):
                forward()
        else:
            assert forward().device.type == "cuda"


def attention(b, n, seed=0, h=3, d=8):
    return pyra.QKV(*numbers(3, b, h, n, d, seed=seed))


def probabilities(qkv, image, size=None):
    """The attention of an image, (h, n, n)."""
    weight = (qkv.q[image] @ qkv.k[image].mT / math.sqrt(qkv.q.shape[-1])).exp()
    weight = weight if size is None else weight * size[image, :, 0]
    return weight / weight.sum(dim=-1, keepdim=True)


def tokens_of(b=2, n=13, specials=1, seed=0, size=None):
    """Tokens of which some hold a few of 20 patches, and of what is special each itself."""
    where = torch.randint(specials, n, (b, 20), generator=torch.Generator().manual_seed(seed))
    return pyra.Tokens(numbers(b, n, 24, seed=seed + 1), size, torch.cat([torch.arange(specials).expand(b, -1), where], dim=1))


def as_groups(tokens, image):
    """Living tokens as a list of (x, size, the input's tokens that it holds), in their order."""
    size = torch.ones(tokens.x.shape[1]) if tokens.size is None else tokens.size[image, :, 0].detach()
    return [(tokens.x[image, j].detach(), size[j].item(), {i for i, s in enumerate(tokens.source[image].tolist()) if s == j})
            for j in range(tokens.x.shape[1]) if size[j] > 0]


def same_groups(found, expected):
    assert len(found) == len(expected)
    for (x, size, held), (y, other, those) in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        assert size == pytest.approx(other, rel=1e-4) and held == those


# ----------------------------------------------------------------------------------------------------------------------
# What all of them promise


@every_reducer
def test_two_forwards_agree_and_so_do_training_and_evaluation(reducer):
    """Where tokens are masked in training and cut in evaluation the logits are the same; the counts are in both."""
    model = reduced(reducer)
    logits, counts = budget.forward_counted(model, batch())
    assert torch.equal(model(batch()), logits) and torch.equal(model(batch()), logits)
    model.train()
    trained_logits, trained_counts = budget.forward_counted(model, batch())
    torch.testing.assert_close(trained_logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(trained_counts, counts) and counts.shape == (4, 3)
    assert (counts[0] == 37).all() and (counts[-1] < counts[0]).all()
    assert not torch.allclose(tiny()(batch()), logits, rtol=1e-2)


@every_reducer
def test_special_tokens_keep_their_places(reducer):
    """In front, alive, and holding nothing else."""
    for model in (reduced(reducer, distilled=True), reduced(reducer, distilled=True).train()):
        tokens, p = model.forward_tokens(batch()), model.specials
        assert (tokens.source[:, :p] == torch.arange(p)).all() and (tokens.size[:, :p] == 1).all()
        assert ((tokens.source[:, p:] >= p) | (tokens.source[:, p:] == -1)).all() and (tokens.source < tokens.x.shape[1]).all()
        gone = torch.where(tokens.source < 0, 1, tokens.size[..., 0].gather(1, tokens.source.clamp(min=0)))
        assert (gone > 0).all()  # a dead token holds nothing


@every_reducer
def test_results_do_not_depend_on_the_rest_of_the_batch(reducer):
    model, images = reduced(reducer), batch(5)
    logits, counts = budget.forward_counted(model, images)
    for i in range(5):
        alone, count = budget.forward_counted(model, images[i:i + 1])
        torch.testing.assert_close(alone[0], logits[i], rtol=1e-4, atol=1e-5)
        assert torch.equal(count[:, 0], counts[:, i])
        assert model.forward_tokens(images[i:i + 1]).x.shape[1] == count[-1, 0]  # the dead are really removed
    assert (len(counts[-1].unique()) > 1) == (reducer in ("ats", "ltmp"))


@pytest.mark.parametrize("reducer, peft", [("evit", "lora"), ("tofu", "adapter"), ("ats", "convpass"), ("ltmp", "convpass"), ("ltmp", "snf"),
                                           ("diffrate", "convpass"), ("diffrate", "fact"), ("frozen_diffrate", "fact"), ("pitome", "lora")])
def test_with_a_peft(reducer, peft):
    """Training and evaluation agree, before or after the PEFT is the same, and the gradients reach exactly what is trained."""
    model = reduced(reducer, peft)
    logits = model(batch())
    torch.testing.assert_close(model.train()(batch()), logits, rtol=1e-4, atol=1e-5)
    other = randomise(PEFTS[peft](REDUCERS[reducer](pyra.VisionTransformer(**TINY))))
    assert trained(other).keys() == trained(model).keys()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(batch()), logits, rtol=1e-4, atol=1e-5)

    logits, counts = budget.forward_counted(model, batch())
    loss = F.cross_entropy(logits, torch.arange(3))
    if reducer in ("ltmp", "diffrate"):
        loss = loss + budget.budget_loss(model, counts, 0.4 * pyra.count_macs(tiny()))
    loss.backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == pyra.is_adapter(name), name
        if name.endswith("_logits") and name.startswith("blocks.0."):
            assert not p.grad.any()  # one candidate
        else:
            assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name
            assert p.grad is None or p.grad.isfinite().all(), name
    assert sum(".reducer." in name for name in trained(model)) == (6 if reducer in ("ltmp", "diffrate") else 0)


@every_reducer
def test_bf16(reducer):
    """Under autocast on a bf16 backbone the tokens stay bf16, and the gradients are finite."""
    model = reduced(reducer, "lora")
    logits = model(batch())
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(batch())
        tokens = model.train().forward_tokens(batch())
        out, counts = budget.forward_counted(model, batch())
    assert tokens.x.dtype == torch.bfloat16 and tokens.size.dtype == counts.dtype == torch.float32
    assert (low.float() - logits).abs().mean() < 0.3 * logits.abs().mean()  # a few tokens change their rank
    (out.float().square().sum() + counts.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained(model).values())


@rows("reducer", ["ats", "ltmp", "diffrate", "one_row", "fpet", "dtem"])
def test_activation_checkpointing(reducer):
    """Nothing is hidden between forwards: computed again, the gradients are the same."""
    model, found = reduced(reducer, "lora").train(), []
    for checkpoint in (False, True):
        model.checkpoint = checkpoint
        torch.manual_seed(0)
        logits, counts = budget.forward_counted(model, batch())
        loss = logits.square().mean() + counts.sum() * counts.requires_grad  # ATS's counts are constant
        found.append(torch.autograd.grad(loss, [p for name, p in trained(model).items() if not name.startswith("blocks.2.")]))
    assert all(torch.equal(a, b) for a, b in zip(*found)) and found[0][0].any()


@rows("reducer", ["tofu", "ltmp", "diffrate", "one_row", "fpet", "pitome", "dtem"])
def test_compile(reducer):
    """One graph, without a break, for the step of training."""
    torch.compiler.reset()
    model = reduced(reducer).train()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(batch()), model(batch()))


@rows("one, other", [
    (lambda model: evit.add_evit(model, 0.7, [1]), lambda model: evit.add_evit(model, 0.6, [1])),
    (lambda model: evit.add_evit(model, 0.7, [1]), lambda model: evit.add_evit(model, 0.7, [2])),
    (lambda model: tofu.add_tofu(model, 3), lambda model: pyra.add_tome(model, 3)),
    (lambda model: tofu.add_tofu(model, 3), lambda model: tofu.add_tofu(model, 4)),
    (lambda model: ats.add_ats(model, 20), lambda model: ats.add_ats(model, 21)),
    (lambda model: one_row.add_one_row(model, 3), lambda model: one_row.add_one_row(model, 3, s=2)),
    (lambda model: pitome.add_pitome(model, 3), lambda model: pyra.add_tome(model, 3)),
    (lambda model: fpet.add_fpet(model), lambda model: fpet.add_fpet(model, [0, 17, 0])),
    (lambda model: ltmp.add_ltmp(model), lambda model: model),
    (lambda model: diffrate.add_diffrate(model, 4), lambda model: diffrate.add_diffrate(model, 2)),
    (freeze_diffrate, lambda model: diffrate.freeze_diffrate(diffrate.add_diffrate(model), [(36, 36), (25, 20), (30, 8)])),
])
def test_adapter_files_of_another_reducer_are_refused(tmp_path, one, other):
    path = tmp_path / "a.safetensors"
    pyra.save_adapter(one(pyra.add_lora(tiny(), rank=2)), path)
    pyra.load_adapter(one(pyra.add_lora(tiny(), rank=2)), path)
    with pytest.raises(ValueError, match="doesn't fit the model: its (settings|reducers|r) (is|are)"):
        pyra.load_adapter(other(pyra.add_lora(tiny(), rank=2)), path)


def test_adapter_files_of_before_there_were_settings_still_load(tmp_path):
    model, path = randomise(pyra.add_pyra(pyra.add_lora(tiny(), rank=2), R)), tmp_path / "a.safetensors"
    metadata = {key: value for key, value in pyra.describe(model).items() if key != "settings"}
    save_file({name: p.detach() for name, p in trained(model).items()}, path, {"format": "pyra-adapter", **metadata})
    pyra.load_adapter(model, path)


@every_reducer
def test_another_reducer_takes_its_place(reducer):
    """ToMe added afterwards is ToMe, and what came with the other is gone, its attention too; the other way round as well."""
    after = REDUCERS[reducer](pyra.add_tome(tiny(), R, prop_attn=False))
    assert torch.equal(after(batch()), reduced(reducer)(batch()))
    model = pyra.add_tome(reduced(reducer), R)
    assert torch.equal(model(batch()), pyra.add_tome(tiny(), R)(batch()))
    assert model.state_dict().keys() == tiny().state_dict().keys()
    assert all(block.attn.attend is pyra.attend and block.prop_attn for block in model.blocks)


@rows("reducer", [*REDUCERS, "tome", "pyra"])
def test_an_empty_batch(reducer):
    for peft in (None, *PEFTS):
        model = reduced(reducer, peft) if reducer in REDUCERS else pyra.add_pyra(tiny(), R) if reducer == "pyra" else pyra.add_tome(tiny(), R)
        for training in (False, True):
            logits, counts = budget.forward_counted(model.train(training), batch()[:0])
            assert logits.shape == (0, 5) and counts.shape == (4, 0)


@rows("reducer", REDUCERS)
@torch.no_grad()
def test_float16_holds_large_activations(reducer):
    """Activations of hundreds, averaged over large groups, stay finite and as near to float32 as float16 allows."""
    model, images = reduced(reducer).eval(), batch().half().float()
    model.pos_embed.mul_(500 / model.pos_embed.abs().max())
    for p in model.parameters():
        p.copy_(p.half())
    expected, found = model.forward_tokens(images), copy.deepcopy(model).half().forward_tokens(images.half())
    assert expected.x.abs().max() > 300 and found.x.isfinite().all() and found.x.dtype == torch.float16
    assert (found.x[:, 0].float() - expected.x[:, 0]).abs().max() < 5e-3 * expected.x.abs().max()


@rows("add", [
    lambda model: ats.add_ats(model, np.int64(20)), lambda model: ats.add_ats(model, np.array([30, 20, 10])),
    lambda model: evit.add_evit(model, np.float32(0.5), np.array([0, 1])),
    lambda model: diffrate.add_diffrate(model, np.int64(4)),
    lambda model: diffrate.freeze_diffrate(diffrate.add_diffrate(model), np.array([(36, 20), (18, 10), (9, 5)])),
])
def test_numbers_of_numpy_are_numbers(tmp_path, add):
    pyra.save_adapter(add(tiny()), tmp_path / "a")
    pyra.load_adapter(add(tiny()), tmp_path / "a")


@rows("call, message", [
    (lambda model: evit.add_evit(model, 0), "keep_rate must be greater than 0 and at most 1, not 0"),
    (lambda model: evit.add_evit(model, 1.1), "keep_rate must be greater than 0 and at most 1, not 1.1"),
    (lambda model: evit.add_evit(model, 0.5, [1, 1]), r"layers must be a list of different blocks from 0 to 2, not \[1, 1\]"),
    (lambda model: evit.add_evit(model, 0.5, [3]), r"layers must be a list of different blocks from 0 to 2, not \[3\]"),
    (lambda model: evit.evit_keep_rate(model, 1000), r"EViT in blocks \[0, 1, 2\] costs at least .* MACs, not 1,000: let it act in more or earlier blocks"),
    (lambda model: tofu.add_tofu(model, [1, 2]), r"3 blocks"),
    (lambda model: tofu.add_tofu(model, -1), "r must be an integer of at least 0, not -1"),
    (lambda model: one_row.add_one_row(model, 4, s=0), "s must be a positive integer, not 0"),
    (lambda model: fpet.add_fpet(model, [1, 2]), "the schedule has 2 entries, the model 3 blocks"),
    (lambda model: fpet.fpet_schedule(model, 1000), "FPET costs at least .* MACs, not 1,000: ask for less"),
    (lambda model: ats.add_ats(model, [20, 20]), "counts must be an integer or a list with one, or None, for each of the 3 blocks"),
    (lambda model: ats.add_ats(model, [20, 1, None]), "block 1: the count must be an integer greater than the 1 special tokens, or None, not 1"),
    (lambda model: ats.add_ats(model, True), "block 0: the count must be an integer"),
    (lambda model: diffrate.add_diffrate(model, 0), "granularity must be an integer from 1 to 36, not 0"),
    (lambda model: diffrate.add_diffrate(model, 37), "granularity must be an integer from 1 to 36, not 37"),
    (lambda model: diffrate.diffrate_rates(model), "the model has no DiffRate: add_diffrate adds it"),
    (lambda model: diffrate.freeze_diffrate(diffrate.add_diffrate(copy.deepcopy(model)), [(3, 0)] * 3),
     r"rates must be one \(prune, merge\) for each of the 3 blocks"),
    (lambda model: budget.budget_loss(model, torch.ones(4, 2), 1e6), "no reducer of the model learns how many tokens to keep"),
    (lambda model: pyra.count_macs(ats.add_ats(copy.deepcopy(model), 20)), "ATS keeps as many tokens as each image needs"),
    (lambda model: pyra.token_counts(ltmp.add_ltmp(copy.deepcopy(model))), "LTMP keeps as many tokens as each image needs"),
])
def test_refused(call, message):
    """In one sentence, before anything is touched."""
    model = tiny()
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all(block.reducer is None and block.attn.attend is pyra.attend for block in model.blocks)


# ----------------------------------------------------------------------------------------------------------------------
# Where nothing goes, the model is the plain one


def test_evit_that_keeps_all_is_plain():
    model = evit.add_evit(tiny(), 1, [0, 1, 2])
    assert torch.equal(model(batch()), tiny()(batch())) and pyra.token_counts(model) == [37] * 4


def test_tofu_that_merges_nothing_is_plain():
    assert torch.equal(tofu.add_tofu(tiny(), 0)(batch()), tiny()(batch()))


def test_ats_with_points_for_every_patch_is_plain():
    logits, counts = budget.forward_counted(ats.add_ats(tiny(), [1_000_000] * 3), batch())
    torch.testing.assert_close(logits, tiny()(batch()))
    assert (counts == 37).all()


@pytest.mark.parametrize("global_pool, distilled", [("token", True), ("avg", False)])
def test_ltmp_whose_thresholds_never_fire_is_plain(global_pool, distilled):
    """But for the order of the tokens."""
    model = add_ltmp(tiny(global_pool=global_pool, distilled=distilled), merge=1.0, prune=0.0)
    for mode in (True, False):
        logits, counts = budget.forward_counted(model.train(mode), batch())
        torch.testing.assert_close(logits, tiny(global_pool=global_pool, distilled=distilled)(batch()), rtol=1e-4, atol=1e-5)
        assert (counts == 36 + model.specials).all()


def test_a_patch_alone_neither_merges_nor_is_pruned():
    """Without special tokens: LTMP whose thresholds always fire goes on with the last one, and a learned metric has one target to choose."""
    kwargs, x = dict(class_token=False, global_pool="avg", img_size=8), numbers(2, 3, 8, 8)
    for mode in (True, False):
        logits, counts = budget.forward_counted(add_ltmp(tiny(**kwargs), merge=-1.0, prune=0.0).train(mode), x)
        assert logits.isfinite().all() and counts.detach()[:, 0].tolist() == [4, 2, 1, 1]
    for pool in ("avg", "map"):  # and thresholds that would prune all patches leave one
        model = add_ltmp(tiny(class_token=False, global_pool=pool), merge=1.0, prune=0.9)
        assert budget.forward_counted(model.eval(), batch())[1][1:].eq(1).all() and model(batch()).isfinite().all()
    for add in (dtem.add_dtem, fpet.add_fpet):
        assert add(tiny(**kwargs), [2, 1, 0]).train()(x).isfinite().all()


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_diffrate_that_keeps_all_is_plain(global_pool):
    model = add_diffrate(tiny(global_pool=global_pool))
    for block in model.blocks:
        block.reducer.prune_logits.data[0] = block.reducer.merge_logits.data[0] = 50
    for mode in (True, False):
        logits, counts = budget.forward_counted(model.train(mode), batch())
        torch.testing.assert_close(logits, tiny(global_pool=global_pool)(batch()), rtol=1e-4, atol=1e-5)
        assert (counts == 37).all()


@every_reducer
def test_with_an_average_pool(reducer):
    """The dead are not in the average: training and evaluation agree."""
    model = reduced(reducer, global_pool="avg")
    logits = model(batch())
    assert not torch.allclose(logits, tiny(global_pool="avg")(batch()), rtol=1e-2)
    torch.testing.assert_close(model.train()(batch()), logits, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Dead tokens


def test_masked_attention_is_the_formula_with_its_gradients():
    qkv = attention(2, 7)
    size = torch.tensor([1.0, 0, 2, 0, 1, 3, 1]).expand(2, -1)[..., None].clone().requires_grad_()
    weight = (qkv.q @ qkv.k.mT / math.sqrt(8)).exp() * size.mT[:, None]
    expected = weight / weight.sum(dim=-1, keepdim=True) @ qkv.v
    out = shared.attend_with_gradient(qkv, size)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out, pyra.attend(qkv, size.detach()), rtol=1e-4, atol=1e-5)
    found, right = (torch.autograd.grad(y.square().sum(), size, retain_graph=True)[0] for y in (out, expected))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert (found[:, [1, 3]] != 0).all()  # the dead ones' too


def test_a_dead_key_with_a_huge_score_leaves_the_living_their_attention():
    qkv = attention(1, 5)
    qkv.k[:, :, 2] = 1000 * qkv.q[:, :, 0]
    size = torch.tensor([1.0, 1, 0, 1, 1])[None, :, None].requires_grad_()
    out = shared.attend_with_gradient(qkv, size)
    torch.testing.assert_close(out, pyra.attend(qkv, size.detach()))
    assert torch.autograd.grad(out.sum(), size)[0].isfinite().all()


def test_sizes_carry_who_lives():
    """Back out comes what went in, in value and gradient, of the dead as of the living."""
    logits, number = numbers(1, 6, 1).requires_grad_(), torch.tensor([1.0, 2, 3, 4, 5, 6])[None, :, None]
    alive = shared.straight_through((logits > 0).float(), logits.sigmoid())
    size = shared.size_with_gradient(number, alive)
    assert torch.equal(size, number * (logits > 0)) and torch.equal(budget.alive_mask(size), (logits > 0).float()) and 0 < size.count_nonzero() < 6
    weight = numbers(1, 6, 1, seed=1)
    found = torch.autograd.grad((weight * budget.alive_mask(size)).sum(), logits)[0]
    torch.testing.assert_close(found, weight * logits.sigmoid() * (1 - logits.sigmoid()))


def test_gather_tokens():
    tokens = tokens_of(size=torch.tensor([1.0, 2, 0] + [1] * 10).expand(2, -1)[..., None])
    order = torch.tensor([[0, 5, 2, 1], [0, 1, 2, 12]])
    found = shared.gather_tokens(tokens, order)
    for image in range(2):
        assert torch.equal(found.x[image], tokens.x[image, order[image]]) and torch.equal(found.size[image], tokens.size[image, order[image]])
        for before, after in zip(tokens.source[image].tolist(), found.source[image].tolist()):
            assert after == (order[image].tolist().index(before) if before in order[image] and before != 2 else -1)
    again = shared.gather_tokens(found, torch.tensor([[0, 3], [0, 3]]))  # gone is gone
    assert (again.source[found.source < 0] == -1).all() and (found.source < 0).any()


def test_convpass_reads_zero_where_a_patch_is_gone():
    part, x = PEFTS["convpass"](tiny()).blocks[0].peft_attn, numbers(2, 10, 24)
    with torch.no_grad():
        for p in part.parameters():
            p.copy_(numbers(*p.shape))
    where = torch.randint(-1, 9, (2, 36), generator=torch.Generator().manual_seed(0))  # token 9 holds none
    where[where == 0] = -1
    out = part.bypass(x, torch.cat([torch.zeros(2, 1, dtype=torch.int64), where], dim=1))
    z = pyra.ACTS["quick_gelu"](part.down(x))
    for image in range(2):
        grid = torch.stack([z[image, j] if j > 0 else torch.zeros(4) for j in where[image].tolist()]).T.reshape(1, 4, 6, 6)
        grid = part.conv(grid).flatten(2)[0].T
        for j in range(10):
            own = grid[where[image] == j]
            mixed = own.mean(dim=0) if len(own) else F.linear(z[image, j], part.conv.weight[:, :, 1, 1], part.conv.bias)
            expected = part.scale * part.up(pyra.ACTS["quick_gelu"](mixed))
            torch.testing.assert_close(out[image, j], expected, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# EViT


def test_evit_ladders_and_macs_of_the_paper():
    """After blocks 3, 6 and 9, and in units of 1e9 MACs."""
    for keep_rate, ladder, macs in (
            (0.9, [197, 179, 163, 148], 4.02), (0.8, None, 3.48), (0.7, [197, 140, 100, 72], 3.03), (0.6, None, 2.64), (0.5, [197, 100, 52, 28], 2.31)):
        model = evit.add_evit(on_meta("vit_small_patch16_224"), keep_rate)
        counts = pyra.token_counts(model)
        assert ladder is None or [counts[i] for i in (3, 4, 7, 10)] == ladder
        assert len({*counts}) == 4 and round(pyra.count_macs(model) / 1e9, 2) == macs


@pytest.mark.parametrize("keep_rate, specials", [(0.3, 1), (0.55, 2), (0.9, 1)])
def test_evit_is_the_naive_loop(keep_rate, specials):
    tokens, qkv = tokens_of(n=13, specials=specials), attention(2, 13)
    found = evit.EViT(keep_rate, specials)(tokens, qkv)
    for image in range(2):
        a = probabilities(qkv, image)[:, 0].mean(dim=0)
        ranked = sorted(range(specials, 13), key=lambda j: -a[j])
        k = math.ceil(keep_rate * (13 - specials))
        groups = as_groups(tokens, image)
        rest = ranked[k:]
        fused = (sum(a[j] * tokens.x[image, j] for j in rest), 1, set().union(*(groups[j][2] for j in rest)))
        same_groups(as_groups(found, image), groups[:specials] + [groups[j] for j in ranked[:k]] + [fused])
    assert found.x.shape[1] == evit.EViT(keep_rate, specials).tokens_after(13)


def test_evit_rounds_up_only_what_is_not_whole():
    assert evit.EViT(0.55, 1).kept(101) == 55 and evit.EViT(0.7, 1).kept(21) == 14 and evit.EViT(0.71, 1).kept(21) == 15


def test_evit_keep_rates_for_the_papers_budgets():
    """Low is in reach of blocks 3, 6, 9, and high is not."""
    model = on_meta("vit_base_patch16_224", num_classes=100)
    low, high = (pyra.count_macs(pyra.add_tome(model, pyra.merge_schedule(rate))) for rate in ("low", "high"))
    keep_rate = evit.evit_keep_rate(model, low)
    assert 0.48 < keep_rate < 0.50
    assert pyra.count_macs(evit.add_evit(model, keep_rate)) == 8_755_983_360 <= low < pyra.count_macs(evit.add_evit(model, keep_rate + 1e-4))
    with pytest.raises(ValueError, match=r"EViT in blocks \[3, 6, 9\] costs at least 5,186,073,600 MACs, not 5,071,277,568"):
        evit.evit_keep_rate(model, high)
    layers = [1, 3, 5, 7, 9]
    assert 0.97 * high < pyra.count_macs(evit.add_evit(model, evit.evit_keep_rate(model, high, layers), layers)) <= high


def test_evit_layers():
    acts = lambda model: [i for i, block in enumerate(model.blocks) if block.reducer is not None]
    assert acts(evit.add_evit(on_meta("vit_small_patch16_224"))) == [3, 6, 9]
    assert acts(evit.add_evit(on_meta("vit_large_patch16_224"))) == [6, 12, 18]
    assert acts(evit.add_evit(tiny(), 0.5, (2, 0))) == [0, 2]
    assert acts(evit.add(on_meta("vit_base_patch16_224"), SimpleNamespace(rate="low"), None)) == [3, 6, 9]
    assert acts(evit.add(on_meta("vit_base_patch16_224"), SimpleNamespace(rate="high"), None)) == [1, 3, 5, 7, 9]  # three can't save as much
    assert acts(evit.add(tiny(depth=4), SimpleNamespace(rate=[36] * 4), None)) == [0, 1, 2, 3]  # a small model has no five


# ----------------------------------------------------------------------------------------------------------------------
# ToFu


@pytest.mark.parametrize("late, specials, r", [(False, 1, 4), (False, 2, 100), (True, 1, 1), (True, 2, 4), (True, 1, 100)])
def test_tofu_is_the_naive_loop(late, specials, r):
    tokens, qkv = tokens_of(n=14, specials=specials), attention(2, 14)
    found, matching = tofu.ToFu(r, late, specials)(tokens, qkv), pyra.match(qkv.k.mean(dim=1), min(r, 6), specials)
    r = min(r, 6)
    for image in range(2):
        groups = as_groups(tokens, image)
        order, dst = matching.order[image].tolist(), matching.dst[image].tolist()
        expected = []
        for place, j in enumerate(order[:14 - r]):
            members = [j] + [order[14 - r + i] for i in range(r) if dst[i] == place]
            x, held = groups[j][0], groups[j][2]
            if late and len(members) > 1:
                mean = sum(groups[m][0] for m in members) / len(members)
                norm = max(groups[m][0].norm() for m in members)
                x, held = mean / mean.norm() * norm, set().union(*(groups[m][2] for m in members))
                assert x.norm() > mean.norm()
            expected.append((x, 1, held))
        same_groups(as_groups(found, image), expected)
    assert (found.source < 0).any() != late


def test_tofu_prunes_early_and_merges_late():
    assert [block.reducer.late for block in tofu.add_tofu(on_meta("vit_base_patch16_224"), 8).blocks] == [False] * 7 + [True] * 5
    assert [block.reducer and block.reducer.late for block in tofu.add_tofu(tiny(), [1, 0, 3]).blocks] == [False, None, True]
    mixed = tofu.add_tofu(tiny(), R)  # what is pruned is nowhere, also where others merge after it
    mixed.blocks[1].reducer = pyra.ToMe(R[1])
    x, size, source = mixed.forward_tokens(batch())
    held = (F.one_hot(source.clamp(min=0), 18) * (source >= 0)[..., None]).sum(dim=1)
    assert x.shape[1] == size.shape[1] == 18 and (source < 0).any(dim=1).all() and torch.equal(held, size[..., 0].long())
    assert pyra.token_counts(tofu.add_tofu(tiny(), R)) == pyra.token_counts(pyra.add_tome(tiny(), R))


# ----------------------------------------------------------------------------------------------------------------------
# PYRA with one row


def test_one_row_is_pyra_whose_rows_are_alike():
    """W_r's rows all w / sqrt(r); training starts at ToMe; more pairs than there are tokens for are clamped, and r may be set to any number."""
    for s in (1, 2):
        ours, theirs = randomise(one_row.add_one_row(tiny(), R, s)), pyra.add_pyra(tiny(), R, s)
        for one, other in zip(ours.blocks, theirs.blocks):
            other.reducer.w_r.data = one.reducer.w_r.data.repeat(other.reducer.r, 1) / other.reducer.r**0.5
            other.reducer.w_d.data = one.reducer.w_d.data
        torch.testing.assert_close(ours(batch()), theirs(batch()))
        assert sum(p.numel() for name, p in trained(ours).items() if ".reducer." in name) == 3 * s * (1 + 24)
    assert torch.equal(one_row.add_one_row(tiny(), 30)(batch()), pyra.add_tome(tiny(), 30)(batch()))
    half = one_row.add_one_row(tiny().to(torch.bfloat16), R)
    assert half(batch().to(torch.bfloat16)).dtype == torch.bfloat16
    for block, r in zip(ours.blocks, (4, 0, 1)):
        block.reducer.r = r
    assert pyra.token_counts(ours) == [37, 33, 33, 32] and ours.forward_tokens(batch()).x.shape[1] == 32


# ----------------------------------------------------------------------------------------------------------------------
# FPET, PiToMe, DTEM


def golden(name):
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(value)) for key, value in arrays.items()}


def test_fpet_is_the_published_code():
    """One merge of 14 x 14 patches, with its gradients. Theirs come out by rows, odd ones first; ours in reading order."""
    g = golden("fpet_merge")
    reducer = fpet.FPET(98, 64, (14, 14)).eval()
    reducer.w_down.data, reducer.w_up.data = g["w_down"], g["w_up"]
    place = torch.arange(196).view(14, 14)
    theirs = torch.cat([place[1::2, ::2].flatten(), place[::2, 1::2].flatten()])
    order = torch.cat([torch.tensor([0]), 1 + theirs.argsort().argsort()])
    found = reducer(pyra.Tokens(g["x"], g["size"], torch.arange(197).expand(2, -1)), pyra.QKV(None, g["keys"][:, None], None))
    torch.testing.assert_close(found.x[:, order], g["out_x"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.size[:, order], g["out_size"], rtol=1e-5, atol=1e-5)
    (found.x[:, order] * g["g"]).sum().backward()
    for name in ("w_down", "w_up"):
        torch.testing.assert_close(getattr(reducer, name).grad, g[f"grad_{name}"], rtol=1e-5, atol=1e-5)


def test_pitome_is_the_published_code():
    """Which tokens merge, and what comes out, in their order."""
    g = golden("pitome_merge")
    found = pyra.merge(pyra.Tokens(g["x"], g["size"], torch.arange(197).expand(2, -1)), pitome.match_by_energy(g["metric"], int(g["r"]), float(g["margin"])))
    assert torch.equal(torch.zeros(2, 157, 197).scatter(1, found.source[:, None], 1), g["holds"].float())
    torch.testing.assert_close(found.x, g["out_x"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.size, g["out_size"], rtol=1e-5, atol=1e-5)


@rows("specials, r", [(1, 3), (2, 4), (1, 100)])
def test_pitome_is_the_naive_loop(specials, r):
    keys, r = attention(2, 14).k.mean(dim=1), min(r, (14 - specials) // 2)
    matching = pitome.match_by_energy(keys, r, 0.3, specials)
    for image in range(2):
        cos = lambda i, j: F.cosine_similarity(keys[image, i], keys[image, j], dim=0).item()
        energy = {i: sum(cos(i, j) - 0.3 if cos(i, j) > 0.3 else math.exp(cos(i, j) - 0.3) - 1 for j in range(specials, 14)) for i in range(specials, 14)}
        ranked = sorted(energy, key=energy.get, reverse=True)
        sources, targets, protected = ranked[0 : 2 * r : 2], ranked[1 : 2 * r : 2], ranked[2 * r :]
        assert matching.order[image].tolist() == [*range(specials), *protected, *targets, *sources]
        best = [max(targets, key=lambda j: cos(i, j)) for i in sources]
        assert [matching.order[image, j].item() for j in matching.dst[image]] == best


@rows("r, specials", [(18, 1), (18, 2), (5, 1), (100, 2)])
def test_fpet_is_the_naive_loop(r, specials):
    """On a whole grid of 6 x 6, and after it on every other patch of the 18 that are left."""
    reducer = randomise(fpet.FPET(r, 8, (6, 6), specials)).eval()
    for n, colour in ((36, lambda i: (i // 6 + i % 6) % 2), (18, lambda i: i % 2)):
        tokens, qkv = tokens_of(n=n + specials, specials=specials, size=numbers(2, n + specials, 1).exp()), attention(2, n + specials)
        found = reducer(tokens, qkv)
        keys = qkv.k.mean(dim=1)
        keys = keys + (keys @ reducer.w_down).relu() @ reducer.w_up
        for image in range(2):
            groups = as_groups(tokens, image)
            even, odd = ([specials + i for i in range(n) if colour(i) == c] for c in (0, 1))
            cos = lambda i, j: F.cosine_similarity(keys[image, i], keys[image, j], dim=0).item()
            best = {i: max(odd, key=lambda j: cos(i, j)) for i in even}
            merged = sorted(even, key=lambda i: -cos(i, best[i]))[:r]
            expected = groups[:specials] + [groups[i] for i in even if i not in merged]
            for j in odd:
                members = [groups[j], *(groups[i] for i in merged if best[i] == j)]
                size = sum(size for _, size, _ in members)
                expected.append((sum(x * size for x, size, _ in members) / size, size, set().union(*(held for *_, held in members))))
            same_groups(as_groups(found, image), expected)


def test_fpet_meets_its_budget_with_few_merges():
    """The paper's one merge, and as many as low and high take of it."""
    model = on_meta("vit_base_patch16_224")
    assert pyra.count_macs(fpet.add_fpet(model)) / 1e9 == pytest.approx(13.41, abs=0.01)  # the class token too goes through MLPs: 13.3 in the paper
    for rate, expected in (("low", [0, 0, 0, 98, 43] + [0] * 7), ("high", [0, 98, 49, 0, 0, 25] + [0] * 6)):
        target = pyra.macs_of_counts(model, budget.counts_of_schedule(model, pyra.merge_schedule(rate)))
        assert fpet.fpet_schedule(model, target) == expected
        assert pyra.count_macs(fpet.add_fpet(model, expected)) == pytest.approx(target, rel=0.005)


@torch.no_grad()
def test_dtem_starts_at_tome_and_is_tome_with_its_metric():
    assert torch.equal(dtem.add_dtem(tiny(), R)(batch()), pyra.add_tome(tiny(), R)(batch()))
    reducer = randomise(dtem.DTEM(5, 3, 8))
    tokens, qkv = tokens_of(), attention(2, 13)
    metric = qkv.k.transpose(1, 2).flatten(2) @ reducer.metric.weight.T + reducer.metric.bias
    expected = pyra.merge(tokens, pyra.match(metric, 5))
    assert all(torch.equal(a, b) for a, b in zip(reducer(tokens, qkv), expected))


def test_the_gradient_of_a_matching_is_that_of_its_soft_assignment():
    """In loops; to the metric alone, whose similarities decide, and through the sizes too."""
    metric, tokens = numbers(1, 9, 4, seed=3).requires_grad_(), tokens_of(b=1, n=9, size=numbers(1, 9, 1).exp())
    matching = pyra.match(metric, 3)
    stay = matching.order[:, :6]
    found = shared.merge_learned(tokens, metric, matching, stay % 2 == 1)
    weight = numbers(1, 6, 25, seed=4)
    grad, = torch.autograd.grad((torch.cat([found.x, found.size], dim=-1) * weight).sum(), metric)

    total = 0.0
    for place, j in enumerate(stay[0].tolist()):
        num, den = tokens.size[0, j] * tokens.x[0, j], tokens.size[0, j]
        for k, i in enumerate(matching.order[0, 6:].tolist()):
            cosines = {t: F.cosine_similarity(metric[0, i], metric[0, t], dim=0) for t in stay[0].tolist() if t % 2 == 1}
            first, second = sorted(cosines.values(), reverse=True)[:2]
            soft = (cosines[j] - (first + second) / 2).sigmoid() if j % 2 == 1 else torch.tensor(0.0)
            chosen = float(matching.dst[0, k] == place) + soft - soft.detach()
            num, den = num + chosen * tokens.size[0, i] * tokens.x[0, i], den + chosen * tokens.size[0, i]
        total = total + (torch.cat([num / den, den]) * weight[0, place]).sum()
    expected, = torch.autograd.grad(total, metric)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# ATS


@pytest.mark.parametrize("count, specials", [(4, 1), (9, 2), (40, 1)])
def test_ats_is_the_naive_loop(count, specials):
    """Each point of the cumulative distribution, in a loop, takes the first patch that reaches it."""
    size = torch.ones(2, 13, 1)
    size[1, [4, 7, 12]] = 0
    tokens, qkv = tokens_of(n=13, specials=specials, size=size), attention(2, 13)
    found = ats.ATS(count, specials)(tokens, qkv)
    lengths = []
    for image in range(2):
        a = probabilities(qkv, image, size)[:, 0].sum(dim=0)
        score = {j: (a[j] * qkv.v[image, :, j].norm()).item() for j in range(specials, 13) if size[image, j] > 0}
        ranked, total, kept = sorted(score, key=score.get), sum(score.values()), set()
        for k in range(1, count - specials + 1):
            point, below = (2 * k - 1) / (2 * (count - specials)), 0.0
            for j in ranked:
                below += score[j] / total
                if below >= point:
                    kept.add(j)
                    break
        expected = [tuple(group) for j, group in zip([j for j in range(13) if size[image, j] > 0], as_groups(tokens, image)) if j < specials or j in kept]
        same_groups(as_groups(found, image), expected)
        lengths.append(len(expected))
    assert found.x.shape[1] == max(lengths) <= count


def test_ats_keeps_what_is_significant_and_few_where_one_patch_is_all():
    qkv = attention(1, 13)
    qkv.k[:, :, 5] = 50 * qkv.q[:, :, 0]
    kept = ats.ATS(13, 1).sample(qkv, torch.ones(1, 13, 1))
    assert kept[0].nonzero().flatten().tolist() == [0, 5]


def test_ats_blocks_and_counts_of_a_schedule():
    acts = [block.reducer and block.reducer.count for block in ats.add_ats(on_meta("vit_base_patch16_224"), 197).blocks]
    assert acts == [None] * 3 + [197] * 9
    model = on_meta("vit_base_patch16_224")
    assert ats.ats_counts(model, pyra.merge_schedule("high")) == [157, 123, 93, 69, 51, 37, 27, 19, 15, 11, 8, 5]
    assert ats.ats_counts(tiny(), [10, 0, 100]) == [27, None, 14]


# ----------------------------------------------------------------------------------------------------------------------
# LTMP


def naive_ltmp(tokens, qkv, image, merge, prune, specials):
    """Real removal from one image, in lists."""
    groups = as_groups(tokens, image)
    n = len(groups)
    size = torch.tensor([group[1] for group in groups])[None, :, None]
    one = pyra.QKV(*(t[image:image + 1, :, :n] for t in qkv[:3]))
    importance = probabilities(one, 0, size).mean(dim=(0, 1)).tolist()
    importance[max(range(specials, n), key=lambda j: importance[j])] = math.inf  # an image's most important patch stays
    key = F.normalize(one.k[0].mean(dim=0), dim=-1)
    into = {}
    for a in range(2, n, 2):
        partners = [j for j in range(1, n, 2) if j >= specials]
        b = max(partners, key=lambda j: (key[a] @ key[j]).item(), default=None)
        if b is not None and key[a] @ key[b] > merge:
            into[a] = b
    out, pruned = [], 0
    for j in list(range(specials)) + [j for j in range(0, n, 2) if j >= specials] + [j for j in range(1, n, 2) if j >= specials]:
        if j in into:
            continue
        members = [j] + [a for a in into if into[a] == j]
        if j >= specials and max(importance[m] for m in members) <= prune:
            pruned += 1
            continue
        total = sum(groups[m][1] for m in members)
        out.append((sum(groups[m][0] * groups[m][1] for m in members) / total, total, set().union(*(groups[m][2] for m in members))))
    return out, len(into), pruned


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("n, dead, specials", [(14, 0, 1), (13, 0, 2), (13, 4, 1), (14, 5, 2)])
def test_ltmp_is_removal_in_a_naive_loop(n, dead, specials, training):
    """Of one image at a time; where dead tokens, at the end, take part in nothing."""
    size = torch.randint(1, 4, (3, n, 1), generator=torch.Generator().manual_seed(0)).float()
    size[:, :specials] = 1
    size[0, n - dead:] = 0
    tokens, qkv = tokens_of(b=3, n=n, specials=specials, size=size), attention(3, n)
    reducer = ltmp.LTMP(specials).train(training)
    reducer.merge_threshold.data.fill_(0.35)
    reducer.prune_threshold.data.fill_(0.075)
    found = reducer(tokens, qkv)
    lengths, merges, prunes = [], 0, 0
    for image in range(3):
        expected, merged, pruned = naive_ltmp(tokens, qkv, image, 0.35, 0.075, specials)
        same_groups(as_groups(found, image), expected)
        lengths.append(len(expected))
        merges, prunes = merges + merged, prunes + pruned
    assert merges > 3 and prunes
    assert found.x.shape[1] == (n if training else max(lengths))


@pytest.mark.parametrize("peft", ["lora", "convpass"])
def test_ltmp_masked_is_removal_in_the_whole_model(peft):
    """Blocks after blocks, training's masks against batch size 1, where the dead are cut."""
    model = reduced("ltmp", peft)
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in batch()])
    torch.testing.assert_close(model.train()(batch()), alone, rtol=1e-4, atol=1e-5)
    tokens = model.forward_tokens(batch())
    assert tokens.x.shape[1] == 37 and (tokens.size == 0).any() and (tokens.size > 1).any()


def test_ltmps_parameters():
    model = ltmp.add_ltmp(on_meta("vit_base_patch16_224"))
    assert sum(p.numel() for name, p in model.named_parameters() if ".reducer." in name) == 24
    reducer = ltmp.add_ltmp(tiny()).blocks[0].reducer
    assert reducer.merge_threshold.item() == pytest.approx(0.9) and reducer.prune_threshold.item() == 0


def test_ltmps_thresholds_have_a_sigmoids_gradient():
    """A count's, block by block, from the soft masks written out; the dead of one block count no more in the next."""
    value, threshold = torch.tensor([-math.inf, 0.2, 0.5, math.inf]), torch.tensor(0.3, requires_grad=True)
    out = ltmp.step_above(value, threshold)
    assert out.tolist() == [0, 0, 1, 1]
    expected = -sum(s * (1 - s) / 0.1 for s in (1 / (1 + math.exp(-(v - 0.3) / 0.1)) for v in (0.2, 0.5)))
    assert torch.autograd.grad(out.sum(), threshold)[0].item() == pytest.approx(expected, rel=1e-5)

    model = add_ltmp(tiny()).train()
    counts = budget.forward_counted(model, batch())[1]
    thresholds = [block.reducer.prune_threshold for block in model.blocks]
    for l in range(1, 4):
        gradients = torch.autograd.grad(counts[l].sum(), thresholds, retain_graph=True, allow_unused=True)
        assert [g is not None and g.item() < 0 for g in gradients] == [i < l for i in range(3)]

    model = add_ltmp(tiny(), merge=1.0, prune=0.0).train()  # where no other block removes anything, a token that died in the first is missed in all
    for name, value in (("merge_threshold", 0.6), ("prune_threshold", 0.027)):
        threshold = getattr(model.blocks[0].reducer, name)
        untouched = threshold.item()
        threshold.data.fill_(value)
        counts = budget.forward_counted(model, batch())[1]
        first, *others = (torch.autograd.grad(counts[l].sum(), threshold, retain_graph=True)[0].item() for l in (1, 2, 3))
        assert (counts[1] < 35).any() and others == pytest.approx([first, first], rel=1e-5)
        threshold.data.fill_(untouched)


def test_thresholds_stay_from_0_to_1():
    for block in add_ltmp(tiny(), merge=1.5, prune=-0.1).blocks:
        block.reducer.after_step()
        assert block.reducer.merge_threshold.item() == 1 and block.reducer.prune_threshold.item() == 0


# ----------------------------------------------------------------------------------------------------------------------
# DiffRate


def naive_diffrate(tokens, qkv, image, prune, merge, specials):
    groups, size = as_groups(tokens, image), torch.ones(2, 99, 1) if tokens.size is None else tokens.size
    a = probabilities(qkv, image, size[:, :qkv.q.shape[2]])[:, 0].mean(dim=0)
    ranked = sorted((j for j in range(specials, len(groups))), key=lambda j: -a[j])[:prune]
    keep, rest = ranked[:merge], ranked[merge:]
    cosine = lambda i, j: F.cosine_similarity(groups[i][0], groups[j][0], dim=0).item()
    into = {i: max(keep, key=lambda j: cosine(i, j)) for i in rest}
    out = groups[:specials]
    for j in keep:
        members = [j] + [i for i in rest if into[i] == j]
        x = sum(groups[m][0] for m in members) / len(members)
        out.append((x, groups[j][1] + sum(groups[m][1] * max(cosine(m, j), 0) for m in members[1:]), set().union(*(groups[m][2] for m in members))))
    return out


@pytest.mark.parametrize("prune, merge, specials", [(12, 12, 1), (9, 12, 2), (12, 5, 1), (9, 4, 2), (3, 1, 1)])
def test_diffrate_is_the_naive_loop(prune, merge, specials):
    """Cut, and masked with logits that come to the same."""
    size = torch.randint(1, 4, (2, 12 + specials, 1), generator=torch.Generator().manual_seed(1)).float()
    size[:, :specials] = 1
    tokens, qkv = tokens_of(n=12 + specials, specials=specials, size=size), attention(2, 12 + specials)
    soft = diffrate.DiffRate(range(12, 0, -1), 1, specials).train()
    for logits, kept in ((soft.prune_logits, prune), (soft.merge_logits, merge)):
        logits.data[12 - kept] = 20
    assert soft.rates() == (prune, merge)
    expected = [naive_diffrate(tokens, qkv, image, prune, merge, specials) for image in range(2)]
    for reducer in (diffrate.FrozenDiffRate(prune, merge, specials), soft):
        found = reducer(tokens, qkv)
        for image in range(2):
            if (prune, merge) == (12, 12):
                assert {frozenset(group[2]) for group in as_groups(found, image)} == {frozenset(group[2]) for group in expected[image]}
            else:
                same_groups(as_groups(found, image), expected[image])
        assert found.x.shape[1] == (12 + specials if reducer is soft else specials + min(prune, merge))


@pytest.mark.parametrize("peft", ["lora", "convpass"])
def test_diffrate_masked_is_cut(peft):
    """In training with logits, and with the integers that they come to: the same logits out, and the same gradients of the PEFT."""
    model = reduced("diffrate", peft).train()
    frozen = diffrate.freeze_diffrate(copy.deepcopy(model))
    assert diffrate.diffrate_rates(frozen) == diffrate.diffrate_rates(model) == RATES
    assert pyra.token_counts(frozen) == pyra.token_counts(model) == [37, 37, 21, 10]
    torch.testing.assert_close(model(batch()), frozen(batch()), rtol=1e-4, atol=1e-5)
    parameters = lambda m: {name: p for name, p in trained(m).items() if ".reducer." not in name}
    found, expected = (torch.autograd.grad(m(batch()).sum(), list(parameters(m).values())) for m in (model, frozen))
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-4)
    assert not any(".reducer." in name for name in frozen.state_dict())


def test_the_dead_rank_last_even_behind_those_without_attention():
    size = torch.tensor([1.0, 1, 0, 1, 0, 1])[None, :, None]
    tokens, qkv = tokens_of(b=1, n=6, size=size), attention(1, 6)
    qkv.k[:, :, 5] = -1000 * qkv.q[:, :, 0]
    assert probabilities(qkv, 0)[:, 0, 5].sum() == 0
    assert diffrate.sort_by_attention(tokens, qkv, 1, 1).size[0, :, 0].tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("granularity, parameters", [(4, 1_080), (1, 4_314)])
def test_diffrates_parameters(granularity, parameters):
    model = diffrate.add_diffrate(on_meta("vit_base_patch16_224"), granularity)
    assert sum(p.numel() for name, p in model.named_parameters() if ".reducer." in name) == parameters
    assert len(diffrate.add_diffrate(on_meta("vit_base_patch16_224", global_pool="avg")).blocks[-1].reducer.prune_logits) == 1


def test_diffrate_starts_half_way():
    """Uniform logits expect 100 patches: 101 tokens."""
    model = diffrate.add_diffrate(pyra.create_model("vit_nano_patch4_56"))
    assert pyra.token_counts(model) == [197, 197] + [101] * 11
    counts = budget.forward_counted(model.train(), torch.zeros(1, 3, 56, 56))[1]
    assert counts[:, 0].tolist() == [197, 197] + [101] * 11


def test_diffrates_numbers_are_the_same_under_autocast():
    reducer = diffrate.DiffRate(range(196, 0, -1), 1)
    for step in range(5):
        reducer.prune_logits.data = 0.02 * reducer.candidates * step
        with torch.autocast("cpu", torch.bfloat16):
            low = reducer.rates()
        assert low == reducer.rates()
    assert 180 < reducer.rates()[0] < 190


def test_diffrates_gradients():
    """A rank's is the probability that as many are kept or more; a count's goes to both numbers, and not to the block before."""
    reducer = diffrate.DiffRate([6, 4, 2], 2)
    reducer.prune_logits.data, reducer.merge_logits.data = torch.tensor([0.5, 0.1, -0.3]), torch.tensor([0.0, 0.0, -1.0])
    p = reducer.prune_logits.softmax(dim=0)
    weight = numbers(7)
    mask = reducer.mask(reducer.prune_logits, torch.arange(7), torch.ones(1, 7, 1))[0, :, 0]
    assert mask.tolist() == [float(j <= math.ceil((p @ torch.tensor([6.0, 4, 2])).item())) for j in range(7)] == [1, 1, 1, 1, 1, 1, 0]
    soft = sum(w * sum(p[i] for i, k in enumerate([6, 4, 2]) if k >= j) for j, w in enumerate(weight))
    logits = reducer.prune_logits
    torch.testing.assert_close(torch.autograd.grad((weight * mask).sum(), logits)[0], torch.autograd.grad(soft, logits, retain_graph=True)[0])

    alive = torch.tensor([1.0, 1, 1, 1, 1, 1, 0])[None, :, None]  # five patches, all of which stay: nothing is masked, nor the number asked
    assert (reducer.mask(reducer.prune_logits, torch.arange(7), alive) == 1).all()
    assert not torch.autograd.grad(reducer.mask(reducer.prune_logits, torch.arange(7), alive).sum(), logits)[0].any()

    n = torch.tensor([7.0, 4.0], requires_grad=True)
    count = reducer.tokens_expected(n)
    assert count.tolist() == [6, 4]
    found = torch.autograd.grad(count.sum(), [reducer.prune_logits, reducer.merge_logits, n], allow_unused=True)
    for gradient, other in zip(found, (reducer.prune_logits, reducer.merge_logits)):
        torch.testing.assert_close(gradient, torch.autograd.grad(2 * other.softmax(dim=0) @ torch.tensor([6.0, 4, 2]), other)[0])
    assert found[2] is None


def test_diffrates_dead_tell_the_logits():
    """What a token that a block cut would have added to a later block's output moves the numbers that cut it: pruned, merged, and behind later masks."""
    first, second = (diffrate.DiffRate(range(12, 0, -1), 1).train() for _ in range(2))
    for logits, kept in ((first.prune_logits, 9), (first.merge_logits, 7), (second.prune_logits, 5), (second.merge_logits, 4)):
        logits.data = -0.5 * (first.candidates - kept) ** 2  # a bell around it
        assert int(first.patches(logits)) == kept
    tokens, qkv = tokens_of(n=13, specials=1), attention(2, 13)
    after = first(tokens, qkv)
    end = second(after, qkv)
    dead = (end.size == 0)
    assert dead[0].sum() == 8
    found = torch.autograd.grad((end.size * dead).sum(), [first.prune_logits, first.merge_logits, second.prune_logits, second.merge_logits])
    for gradient, kept in zip(found, (9, 7, 5, 4)):
        assert gradient @ (first.candidates - kept) > 1e-3  # greater numbers would bring some back

    def soft(logits, places):
        return sum((logits.softmax(dim=0) * (first.candidates >= j)).sum() for j in places)
    # three pruned and two merged in the first block, two pruned and one merged in the second
    expected = sum(2 * soft(logits, places) for logits, places in (
        (first.prune_logits, (10, 11, 12)), (first.merge_logits, (8, 9)), (second.prune_logits, (6, 7)), (second.merge_logits, (5,))))
    for f, e in zip(found, torch.autograd.grad(expected, [first.prune_logits, first.merge_logits, second.prune_logits, second.merge_logits])):
        torch.testing.assert_close(f, e)


@rows("queries, kwargs", [(1, {}), (1, dict(reg_tokens=4, rope=True)), (None, dict(global_pool="avg")), (None, dict(class_token=False, global_pool="map"))])
def test_tokens_are_ranked_by_the_attention_that_they_get(queries, kwargs):
    """From the class token where that is classified, else the mean from all living tokens; a dead token gets none."""
    assert shared.ranking_queries(tiny(**kwargs)) == queries
    qkv = attention(2, 7)
    size = torch.tensor([1.0, 2, 0, 3, 1, 0, 1]).view(1, 7, 1).expand(2, -1, -1)
    for given, living in ((None, [0, 1, 2, 3, 4, 5, 6]), (size, [0, 1, 3, 4, 6])):
        received = shared.attention_received(qkv, given, queries)
        for image in range(2):
            given_out = probabilities(qkv, image, given)
            expected = given_out[:, 0] if queries == 1 else sum(given_out[:, i] for i in living) / len(living)
            torch.testing.assert_close(received[image], expected, rtol=1e-4, atol=1e-6)
