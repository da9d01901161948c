"""pyra.py against the published code's numbers, naive loops, timm, the paper's figures, and its own promises."""

import contextlib
import copy
import functools
import math
import pathlib
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (HIGH, R, TINY, adapted, assert_golden, attend_as_on_a_gpu, batch, block_outputs, count_flops, gradients, numbers, on_meta, randomise, rows,
                     same, snapshot, tiny, trained, variant)
from torch._subclasses.fake_tensor import FakeTensorMode

import pyra
from pyra_lab import epochs, speed

HERE = pathlib.Path(__file__).parent


# ----------------------------------------------------------------------------------------------------------------------
# Helpers


def equal(a, b):
    """Whether two dictionaries hold the same names and, bit for bit, the same tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)



def count(parameters):
    return sum(p.numel() for p in parameters)


# ----------------------------------------------------------------------------------------------------------------------
# The published code


@pytest.mark.parametrize("method", ["plain", "tome", "pyra"])
@pytest.mark.parametrize("file", ["vit_cls", "deit_distilled"])
def test_golden(file, method):
    assert_golden(file, method)


# ----------------------------------------------------------------------------------------------------------------------
# Matching, merging, modulation


def naive_gate(pairs, w_r, w_d):
    """The gate of each pair and channel, in loops, from modulate's docstring. pairs: [(source, destination)], lists of floats."""
    def sigmoid(value):
        return 1 / (1 + math.exp(-value))

    r, s, c = len(w_r), len(w_r[0]), len(w_d[0])
    p = []
    for src, dst in pairs:
        both = [a + b for a, b in zip(src, dst)]
        mean = sum(both) / c
        std = math.sqrt(sum((value - mean) ** 2 for value in both) / c + 1e-5)
        p.append([(value - mean) / std for value in both])
    delta_d = [[sum(w_r[i][j] * p[i][k] for i in range(r)) for k in range(c)] for j in range(s)]
    delta_r = [[sum(p[i][k] * w_d[j][k] for k in range(c)) for j in range(s)] for i in range(r)]
    if s == 1:
        return [[2 * sigmoid(delta_d[0][k]) * (2 * sigmoid(delta_r[i][0]) - 1) for k in range(c)] for i in range(r)]
    return [[sum(delta_r[i][j] * delta_d[j][k] for j in range(s)) for k in range(c)] for i in range(r)]


def naive_merge(x, size, source, metric, r, specials, w_r=None, w_d=None):
    """One image, in loops. x (n, c), size and source: lists, metric (n, d). Returns x, size and source as lists."""
    n = len(x)
    unit = [m / m.norm() for m in metric.double()]
    best = {}
    for a in range(0, n, 2):
        if a >= specials:
            best[a] = max((float(unit[a] @ unit[b]), b) for b in range(1, n, 2) if b >= specials)
    sources = sorted(best, key=lambda a: -best[a][0])[:r]
    stay = list(range(specials))
    stay += [i for i in range(0, n, 2) if i >= specials and i not in sources] + [i for i in range(1, n, 2) if i >= specials]

    weighted = [[float(value) * size[i] for value in x[i]] for i in range(n)]
    new_x, new_size, place = [list(weighted[i]) for i in stay], [size[i] for i in stay], {i: stay.index(i) for i in stay}
    pairs = [(weighted[a], weighted[best[a][1]]) for a in sources]
    gates = naive_gate(pairs, w_r.tolist(), w_d.tolist()) if w_r is not None else [[0.0] * len(x[0])] * r
    for a, gate in zip(sources, gates):
        place[a] = place[best[a][1]]
        new_size[place[a]] += size[a]
        for k, value in enumerate(weighted[a]):
            new_x[place[a]][k] += value + value * gate[k]
    return [[value / new_size[i] for value in token] for i, token in enumerate(new_x)], new_size, [place[i] for i in source]


@pytest.mark.parametrize("rank", [None, 1, 3], ids=["tome", "s1", "s3"])
@rows("n, rs, specials", [(4, [1], 1), (9, [1], 2), (10, [4], 1), (12, [5, 2], 2), (17, [7], 2), (18, [5, 4, 3], 1),
                              (8, [4, 1], 0), (13, [3, 2], 3), (14, [4, 2], 4), (15, [5, 1], 5), (16, [4, 3], 5)])
def test_merge_is_the_naive_loop(n, rs, specials, rank):
    """Matching, modulation, merging, sizes and sources of several blocks in a row, against per-image loops."""
    torch.manual_seed(n)
    b, c = 3, 6
    tokens = pyra.Tokens(torch.randn(b, n, c), None, torch.arange(n).repeat(b, 1))
    naive = [(tokens.x[i], [1.0] * n, list(range(n))) for i in range(b)]
    for r in rs:
        metric = torch.randn(b, tokens.x.shape[1], 4)
        w_r, w_d = (None, None) if rank is None else (torch.randn(r, rank), torch.randn(rank, c))
        modulate = None if rank is None else lambda src, dst: pyra.modulate(src, dst, w_r, w_d)
        total = (tokens.x if tokens.size is None else tokens.x * tokens.size).sum(1)
        tokens = pyra.merge(tokens, pyra.match(metric, r, specials), modulate)
        naive = [naive_merge(*naive[i], metric[i], r, specials, w_r, w_d) for i in range(b)]
        for i, (x, size, source) in enumerate(naive):
            torch.testing.assert_close(tokens.x[i], torch.tensor(x), rtol=1e-4, atol=1e-4)
            assert tokens.size[i, :, 0].tolist() == size
            assert tokens.source[i].tolist() == source
        assert (tokens.size.sum((1, 2)) == n).all()
        if rank is None:
            torch.testing.assert_close((tokens.x * tokens.size).sum(1), total, rtol=1e-4, atol=1e-5)


@rows("n, specials, most", [(2, 1, 0), (3, 1, 1), (4, 1, 1), (3, 2, 0), (5, 2, 1), (6, 2, 2), (197, 1, 98), (198, 2, 98), (1, 0, 0), (7, 0, 3), (8, 0, 4), (9, 4, 2), (10, 5, 2), (11, 5, 3)])
def test_most_merges(n, specials, most):
    """The most pairs that can merge do merge, and no more: a pair with a special token isn't counted."""
    assert pyra.most_merges(n, specials) == most
    if most:
        matching = pyra.match(torch.randn(2, n, 4), most, specials)
        assert matching.dst.shape == (2, most)
        assert matching.dst.min() >= specials  # nothing merges into a special token
        sources = matching.order[:, n - most:]
        assert sources.min() >= specials
        assert torch.equal(matching.order.sort(dim=1).values, torch.arange(n).expand(2, -1))  # a permutation


def test_sources_are_in_order_of_similarity():
    """w_r has a row for each rank, so the most similar pair has to come first."""
    torch.manual_seed(0)
    metric = torch.randn(4, 21, 5)
    order, dst = pyra.match(metric, 7)
    unit = F.normalize(metric, dim=-1)
    kept = order[:, :14]
    similarity = (pyra.take(unit, order[:, 14:]) * pyra.take(unit, kept.gather(1, dst))).sum(-1)
    assert (similarity[:, 1:] <= similarity[:, :-1]).all()
    assert (similarity[:, 0] - similarity[:, -1]).min() > 0.1


def test_matching_is_by_direction_in_float32_and_without_gradient():
    """Keys' lengths don't count; bf16 autocast changes nothing; a pair's choice passes no gradient on."""
    metric = torch.randn(3, 65, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    matching = pyra.match(metric, 20)
    lengths = torch.rand(3, 65, 1) * 10 + 0.1
    assert all(map(torch.equal, matching, pyra.match(metric * lengths, 20)))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, matching, pyra.match(metric, 20)))
    before = metric.detach().clone()
    assert not matching.order.requires_grad and torch.equal(metric, before)


def test_reducers_match_by_the_heads_mean_key():
    """The metric is the mean over the heads of the keys that the block uses, LoRA included."""
    model = adapted("tome")
    x = torch.randn(2, 37, 24)
    qkv = model.blocks[0].attn.project(x)
    linear = model.blocks[0].attn.qkv
    keys = (F.linear(x, linear.weight, linear.bias) + x @ linear.lora_a.T @ linear.lora_b.T)[..., 24:48]
    keys = keys.unflatten(-1, (3, 8)).mean(dim=2)
    assert all(map(torch.equal, model.blocks[0].reducer.match(qkv), pyra.match(keys, 10)))
    without = F.linear(x, linear.weight, linear.bias)[..., 24:48].unflatten(-1, (3, 8)).mean(dim=2)
    assert not torch.equal(model.blocks[0].reducer.match(qkv).order, pyra.match(without, 10).order)


def test_forward_tokens_of_a_plain_model():
    """Without merging every token stands for itself."""
    tokens = tiny().forward_tokens(batch())
    assert tokens.x.shape == (3, 37, 24)
    assert torch.equal(tokens.size, torch.ones(3, 37, 1))
    assert torch.equal(tokens.source, torch.arange(37).repeat(3, 1))


@pytest.mark.parametrize("s", [1, 3])
def test_modulation_is_the_formula(s):
    """Pair by pair, channel by channel; the gates stay in their ranges."""
    torch.manual_seed(0)
    src, dst = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    src[1], dst[1] = src[1] / 300, dst[1] / 300  # so small that LN's epsilon shows
    w_r, w_d = torch.randn(4, s), torch.randn(s, 6)
    for i in range(2):
        pairs = list(zip(src[i].tolist(), dst[i].tolist()))
        gate = torch.tensor(naive_gate(pairs, w_r.tolist(), w_d.tolist()))
        torch.testing.assert_close(pyra.modulate(src, dst, w_r, w_d)[i], src[i] * (1 + gate), rtol=1e-4, atol=1e-7)
    if s == 1:  # the gates' ranges: (0, 2) times (-1, 1)
        huge = pyra.modulate(src, dst, 1e4 * w_r, 1e4 * w_d) / src
        assert huge.min() >= -1 - 1e-5 and huge.max() <= 3 + 1e-5
        assert (huge - 3).abs().min() < 1e-5 and (huge + 1).abs().min() < 1e-5


@pytest.mark.parametrize("s, kwargs", [(1, {}), (3, dict(distilled=True)), (1, dict(global_pool="avg"))], ids=["token", "distilled", "avg"])
def test_pyra_starts_as_tome(s, kwargs):
    """At initialisation bit for bit; once w_d differs from 0 no longer."""
    model = randomise(pyra.VisionTransformer(**{**TINY, **kwargs})).eval()
    expected = pyra.add_tome(copy.deepcopy(model), R)(batch())
    pyra.add_pyra(model, R, s=s)
    assert torch.equal(model(batch()), expected)
    torch.nn.init.normal_(model.blocks[0].reducer.w_d)
    assert not same(model(batch()), expected, rtol=1e-3)


@pytest.mark.parametrize("s", [1, 3])
def test_gradients_at_step_0(s):
    """Of the generators only w_d learns at first, of LoRA only B; the backbone never. The last block's can't reach the class token."""
    model = tiny()
    pyra.add_pyra(pyra.add_lora(model, rank=2, dropout=0), R, s=s)
    _, grads = gradients(model, batch())
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    learning = {name for name, grad in grads.items() if grad.any()}
    lora_b = {f"blocks.{i}.attn.qkv.lora_b" for i in range(3)}
    assert learning == lora_b | {"blocks.0.reducer.w_d", "blocks.1.reducer.w_d", "head.weight", "head.bias"}


@pytest.mark.parametrize("s", [1, 8])
def test_generators_start_in_range(s):
    """w_r is uniform in (-1, 1) / sqrt(s), w_d zero."""
    torch.manual_seed(0)
    reducer = pyra.PYRA(4000, 24, s)
    bound = 1 / math.sqrt(s)
    assert reducer.w_r.shape == (4000, s) and reducer.w_d.shape == (s, 24)
    assert 0.98 * bound < reducer.w_r.max() <= bound and -bound <= reducer.w_r.min() < -0.98 * bound
    assert abs(reducer.w_r.mean()) < 0.05 * bound
    assert not reducer.w_d.any()


@rows("name, r, s, numbers", [
    ("vit_base_patch16_224", pyra.merge_schedule("high"), 1, 9408),
    ("vit_base_patch16_224", pyra.merge_schedule("low"), 1, 9402),
    ("vit_base_patch16_224", pyra.merge_schedule("high"), 4, 4 * 9408),
    ("vit_large_patch16_224", pyra.merge_schedule("high", depth=24), 1, 24768),
    ("vit_large_patch16_224", pyra.merge_schedule("low", depth=24), 1, 24766),
    ("deit_base_distilled_patch16_224", [16] * 6 + [10] * 6, 1, 9372),
])
def test_modulation_parameters(name, r, s, numbers):
    """The paper's 9.4 K (ViT-B) and 25 K (ViT-L): the generators and nothing else."""
    model = pyra.add_pyra(on_meta(name), r, s=s)
    assert count(p for block in model.blocks for p in block.reducer.parameters()) == numbers


def test_lora_parameters():
    """ViT-B, rank 8: 294,912 in 24 tensors, with a 100-class head the only trained ones."""
    model = pyra.add_lora(on_meta("vit_base_patch16_224", num_classes=100), rank=8)
    assert count(p for name, p in trained(model).items() if "lora_" in name) == 294_912
    assert len(trained(model)) == 26 and count(trained(model).values()) == 294_912 + 76_900
    assert model.blocks[0].attn.qkv.lora_a.shape == (8, 768) and model.blocks[0].attn.qkv.lora_b.shape == (2304, 8)


# ----------------------------------------------------------------------------------------------------------------------
# Attention, pooling, the clamp


def repeated_patches(groups):
    """Images whose 36 patches (in reading order) have the content `groups` numbers."""
    patches = torch.randn(2, max(groups) + 1, 3, 4, 4, generator=torch.Generator().manual_seed(7))[:, groups]
    return patches.reshape(2, 6, 6, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 24, 24)


@pytest.mark.parametrize("groups, r", [
    ([i // 2 for i in range(36)], [18, 0, 0]),  # tokens 1 and 2, 3 and 4, ... are equal: 18 pairs
    ([i // 2 for i in range(36)], [0, 18, 0]),
    ([i // 2 for i in range(36)], [0, 7, 0]),
    ([0] * 36, [18, 9, 4]),
])
@rows("kwargs", [dict(), dict(reg_tokens=4, act="swiglu"), dict(distilled=True), dict(class_token=False, global_pool="avg", fc_norm=False),
                 dict(class_token=False, global_pool="map", pre_norm=True)])
def test_identical_tokens_merge_without_a_trace(groups, r, kwargs):
    """With proportional attention, in the pooling too, a token that stands for k equal ones is k tokens; without, the others notice."""
    model, images = tiny(**kwargs), repeated_patches(groups)
    torch.nn.init.zeros_(model.pos_embed)
    plain, logits = model.forward_tokens(images), model(images)
    pyra.add_tome(model, r)
    merged = model.forward_tokens(images)
    assert merged.x.shape[1] == 36 + model.specials - sum(r)
    assert same(pyra.take(merged.x, merged.source), plain.x)
    assert same(model(images), logits)
    pyra.add_tome(model, r, prop_attn=False)
    assert model.specials == 0 or not same(model(images), logits, rtol=1e-3)  # where all that there is is twice as large, nobody notices


@pytest.mark.parametrize("add", [pyra.add_tome, pyra.add_pyra])
def test_prop_attn(add):
    """It changes the logits of merged tokens, and nothing before the first merge."""
    model = tiny()
    for r, alike in ((R, False), ([0, 0, 10], True)):
        assert same(add(model, r, prop_attn=True)(batch()), add(model, r, prop_attn=False)(batch()), rtol=1e-4) == alike


@pytest.mark.parametrize("add", [pyra.add_tome, pyra.add_pyra])
def test_no_merging_is_the_plain_model(add):
    """r = 0 leaves no reducer and the logits bit for bit; a later schedule replaces an earlier one."""
    model = tiny()
    expected = model(batch())
    add(model, R)
    assert not torch.equal(model(batch()), expected)
    assert add(model, 0) is model
    assert all(block.reducer is None for block in model.blocks)
    assert torch.equal(model(batch()), expected)


def test_dead_tokens_get_no_attention():
    """A token of size 0 changes no other token; a token's own output stays finite."""
    torch.manual_seed(0)
    attention = tiny().blocks[0].attn
    x, size = torch.randn(2, 7, 24), torch.ones(2, 7, 1)
    size[0, 3] = size[1, 5] = 0
    other = torch.where(size == 0, torch.randn(2, 7, 24), x)
    alive = (size > 0).squeeze(-1)
    a, b = (attention(attention.project(value), size) for value in (x, other))
    assert a.isfinite().all() and torch.equal(a[alive], b[alive])
    without = attention(attention.project(x[:1, [0, 1, 2, 4, 5, 6]]))
    assert same(a[:1, [0, 1, 2, 4, 5, 6]], without)
    assert not same(a[alive], attention(attention.project(x))[alive], rtol=1e-3)


def test_attention_counts_a_token_as_often_as_its_size():
    """Size k is the same as k copies of the key."""
    torch.manual_seed(0)
    attention, x = tiny().blocks[0].attn, torch.randn(1, 5, 24)
    size = torch.tensor([1.0, 3, 1, 2, 1]).view(1, 5, 1)
    copies = attention(attention.project(x[:, [0, 1, 1, 1, 2, 3, 3, 4]]))
    assert same(attention(attention.project(x), size), copies[:, [0, 1, 4, 5, 7]])


@pytest.mark.parametrize("method, distilled", [("plain", False), ("tome", True), ("pyra", False)])
def test_avg_pool_is_weighted_by_size(method, distilled):
    """MAE's pooling: the mean over the patches that tokens stand for, special tokens left out, then fc_norm."""
    model = adapted(method, global_pool="avg", distilled=distilled)
    tokens, specials = model.forward_tokens(batch()), model.specials
    for i in range(3):
        of_patch = [tokens.x[i, j] for j in tokens.source[i, specials:]]
        mean = torch.stack(of_patch).mean(0)
        expected = F.linear(F.layer_norm(mean, (24,), model.fc_norm.weight, model.fc_norm.bias, 1e-6), model.head.weight, model.head.bias)
        assert same(model(batch())[i], expected)
    assert isinstance(model.norm, torch.nn.Identity)


@pytest.mark.parametrize("img_size, r, ladder", [(24, 1000, [37, 19, 10, 6]), (24, [12, 12, 12], [37, 25, 13, 7]), (8, 5, [5, 3, 2, 2]),
                                                 (4, 3, [2, 2, 2, 2])])
def test_tome_clamps(img_size, r, ladder):
    """ToMe merges at most half of the tokens that are left; with none to merge it is the plain model."""
    model = tiny(img_size=img_size)
    plain = model(batch(img_size=img_size))
    pyra.add_tome(model, r)
    outputs, logits = block_outputs(model, batch(img_size=img_size))
    assert pyra.token_counts(model) == ladder
    assert [tokens.x.shape[1] for tokens in outputs] == ladder[1:]
    assert torch.equal(logits, plain) == (ladder[0] == ladder[-1])


@pytest.mark.parametrize("method", ["plain", "tome", "pyra"])
def test_forward_is_repeatable_and_per_image(method):
    """Two forwards agree bit for bit (no list is used up), and an image's logits don't depend on its neighbours."""
    model = adapted(method)
    logits = model(batch())
    assert torch.equal(model(batch()), logits)
    assert same(torch.cat([model(image[None]) for image in batch()]), logits)


@rows("modulated, pool", [(False, "token"), (True, "token"), (False, "avg")])
@torch.no_grad()
def test_float16_holds_large_groups_of_large_activations(modulated, pool):
    """197 tokens of 600 are a sum beyond float16; their mean isn't."""
    x = (600 + torch.randn(1, 197, 8, generator=torch.Generator().manual_seed(0))).half()
    size = torch.ones(1, 197, 1).index_fill(1, torch.arange(1, 99), 197.0)
    matching = pyra.match(torch.randn(1, 197, 4, generator=torch.Generator().manual_seed(1)), 98)
    modulate = (lambda src, dst: pyra.modulate(src, dst, torch.ones(98, 1), torch.full((1, 8), 0.1))) if modulated else None
    merged, expected = (pyra.merge(pyra.Tokens(tokens, size, torch.arange(197)[None]), matching, modulate).x for tokens in (x, x.float()))
    assert merged.dtype == torch.float16 and same(merged, expected, rtol=1e-3)
    model = pyra.add_tome(tiny(global_pool=pool), 100)
    model.pos_embed.mul_(500 / model.pos_embed.abs().max())
    assert same(copy.deepcopy(model).half()(batch().half()), model(batch()), rtol=0.02)


# ----------------------------------------------------------------------------------------------------------------------
# Schedules and cost


def test_paper_schedules():
    """Table 5 and the constant lists; a caller can't spoil them."""
    assert pyra.merge_schedule("high") == HIGH
    assert pyra.merge_schedule("low") == [16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 10]
    table = [20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1]  # as printed: 23 entries
    large = pyra.merge_schedule("high", depth=24)
    assert len(large) == 24 and sum(large) == 192
    assert sorted(large) == sorted([*table, 4]) and large == sorted(large, reverse=True)
    assert pyra.merge_schedule("low", depth=24) == [8] * 23 + [6]
    pyra.merge_schedule("high").append(1)
    assert len(pyra.merge_schedule("high")) == 12


@rows("name, rate, ladder", [
    ("vit_base_patch16_224", "high", [197, 157, 123, 93, 69, 51, 37, 27, 19, 15, 11, 8, 5]),
    ("vit_base_patch16_224", "low", [197, 181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]),
    ("vit_nano_patch4_56", "high", [197, 157, 123, 93, 69, 51, 37, 27, 19, 15, 11, 8, 5]),
    ("deit_base_distilled_patch16_224", "high", [198, 158, 124, 94, 70, 52, 38, 28, 20, 16, 12, 9, 6]),
    ("vit_large_patch16_224", "low", [*range(197, 12, -8), 7]),
    ("vit_large_patch16_224", "high", [197, 177, 158, 140, 123, 108, 95, 82, 70, 60, 51, 43, 37, 31, 27, 23, 19, 16, 13, 11, 9, 8, 7, 6, 5]),
])
def test_token_ladders(name, rate, ladder):
    """The paper's schedules fit its backbones: no entry is clamped or refused."""
    model = on_meta(name)
    assert pyra.token_counts(model) == [ladder[0]] * (len(model.blocks) + 1)
    for add in (pyra.add_tome, pyra.add_pyra):
        assert pyra.token_counts(add(model, pyra.merge_schedule(rate, len(model.blocks)))) == ladder


@pytest.mark.parametrize("depth, tokens, remaining, ratio", [(12, 196, 4, 3.4), (24, 196, 4, 1.5), (12, 196, 0, 2), (7, 50, 3, 3), (1, 16, 2, 4.7)])
def test_solve_schedule_is_equation_1(depth, tokens, remaining, ratio):
    """Against Eq. (1) in 60-digit arithmetic."""
    with localcontext() as context:
        context.prec = 60

        def g(x):
            return (1 - Decimal(x) / depth) ** (Decimal(str(ratio)) - 1)

        exact = [int((g(l - 1) - g(l)) * (tokens - remaining) + Decimal("1e-40")) for l in range(1, depth + 1)]
    schedule = pyra.solve_schedule(depth, tokens, remaining, ratio)
    assert schedule == exact
    assert tokens - remaining - depth < sum(schedule) <= tokens - remaining  # each floor loses less than one


@pytest.mark.parametrize("depth", [12, 24])
def test_every_merge_schedule_can_be_satisfied(depth):
    """For any rate and number of patches, class token alone or distillation token too: where Eq. (1) asks for more, half of the patches that are left merge."""
    clamped = 0
    for grid in (14, 3, 4, 7, 9, 16, 24):
        model, distilled = (pyra.VisionTransformer(img_size=grid, patch_size=1, embed_dim=8, depth=depth, num_heads=1, num_classes=0, distilled=d) for d in (False, True))
        for rate in (1.05, 1.2, 1.5, 1.8, 2, 2.1, 2.2, 2.5, 3.4, 5, 8):
            r, asked, left = pyra.merge_schedule(rate, depth, grid**2), pyra.solve_schedule(depth, grid**2, flops_ratio=rate), grid**2
            assert len(r) == depth
            for entry, wanted in zip(r, asked):
                assert entry == min(wanted, left // 2)
                left -= entry
            clamped += r != asked
            with pytest.warns(UserWarning, match="Eq. .1. for F/f = .* pairs can; see solve_macs") if sum(r) < 0.95 * sum(asked) else contextlib.nullcontext():
                pyra.merge_schedule(rate, depth, grid**2)
            pyra.add_pyra(model, r)
            pyra.add_pyra(distilled, r)
    assert clamped > 10


@rows("r", [np.int64(3), np.array(3), torch.tensor(3), np.array(R), torch.tensor(R), tuple(R), [np.int32(entry) for entry in R], range(3, 0, -1)])
def test_numbers_of_numpy_and_torch_are_numbers(tmp_path, r):
    """In schedules and sizes, and in the adapter's file."""
    model = pyra.add_pyra(pyra.add_lora(pyra.VisionTransformer(**{**TINY, "embed_dim": np.int64(24)}), rank=np.int64(2)), r, s=np.int64(2))
    expected = [3, 3, 3] if np.ndim(r) == 0 else list(map(int, r))
    assert [block.reducer.r for block in model.blocks] == expected and all(type(block.reducer.r) is int for block in model.blocks)
    pyra.save_adapter(model, tmp_path / "a")
    pyra.load_adapter(model, tmp_path / "a")
    assert pyra.merge_schedule(np.float32(2), tokens=np.int64(196)) == pyra.merge_schedule(2)


def test_solve_schedule_constant_at_ratio_2():
    """(1/12) * 192 must floor to 16, though it is 15.999... in floating point."""
    assert pyra.solve_schedule(12, tokens=196, remaining=4, flops_ratio=2) == [16] * 12
    assert pyra.solve_schedule(24, tokens=196, remaining=4, flops_ratio=2) == [8] * 24
    assert pyra.solve_schedule(12) == pyra.solve_schedule(12, 196, 4, 3.4) == pyra.merge_schedule(3.4)
    assert pyra.merge_schedule(2.0) == [16] * 11 + [10] == pyra.merge_schedule("low")


def test_macs_of_the_paper():
    """To the printed digit, in units of 1e9."""
    table = [
        ("vit_tiny_patch16_224", 1000, 0, "1.254"),
        ("vit_small_patch16_224", 1000, 0, "4.599"),
        ("deit_small_patch16_224", 1000, 0, "4.599"),
        ("vit_base_patch16_224", 1000, 0, "17.564"),
        ("deit_base_patch16_224", 1000, 0, "17.564"),
        ("deit_base_distilled_patch16_224", 1000, 0, "17.656"),
        ("vit_large_patch16_224", 1000, 0, "61.555"),
        ("vit_base_patch16_224", 1000, 8, "13.104"),
        ("vit_base_patch16_224", 1000, 13, "10.367"),
        ("vit_base_patch16_224", 1000, 16, "8.772"),
        ("vit_base_patch16_224", 100, 0, "17.563"),
        ("vit_base_patch16_224", 100, "low", "8.771"),
        ("vit_base_patch16_224", 100, "high", "5.071"),
        ("vit_large_patch16_224", 100, 0, "61.554"),
        ("vit_large_patch16_224", 100, "low", "30.962"),
        ("vit_large_patch16_224", 100, "high", "17.915"),
        ("deit_base_distilled_patch16_224", 100, [16] * 6 + [10] * 6, "9.654"),
        ("deit_base_distilled_patch16_224", 100, "high", "5.159"),
    ]
    found = []
    for name, classes, r, _ in table:
        model = on_meta(name, num_classes=classes)
        pyra.add_tome(model, pyra.merge_schedule(r, len(model.blocks)) if isinstance(r, str) else r)
        assert isinstance(pyra.count_macs(model), int)
        found.append((name, classes, r, f"{pyra.count_macs(model) / 1e9:.3f}"))
    assert found == table


def test_parameters_of_the_backbones():
    """In millions, with 1000 classes, as in the literature; a tag after the name is ignored."""
    table = {"vit_tiny_patch16_224": "5.72", "vit_small_patch16_224": "22.05", "vit_base_patch16_224": "86.57",
             "deit_base_distilled_patch16_224": "87.34", "vit_large_patch16_224": "304.33"}
    assert {name: f"{count(on_meta(f'{name}.some_tag').parameters()) / 1e6:.2f}" for name in table} == table


@rows("method, s, kwargs", [
    ("plain", 1, dict(num_classes=0)), ("plain", 1, dict(distilled=True)), ("tome", 1, dict(global_pool="avg")), ("tome", 1, dict(mlp_ratio=3.0, img_size=16)),
    ("pyra", 1, {}), ("pyra", 3, dict(distilled=True)), ("tome", 1, dict(reg_tokens=4, rope=True, act="swiglu")), ("plain", 1, dict(pre_norm=True)),
    ("pyra", 1, dict(class_token=False, global_pool="map")), ("pyra", 1, dict(class_token=False, global_pool="avg", fc_norm=False)),
])
def test_count_macs_is_what_pytorch_counts(method, s, kwargs):
    """On top of the formula come only matching (a metric product) and modulation (two or three small products)."""
    r = [5, 3, 2]
    model = tiny(**kwargs)
    if method == "tome":
        pyra.add_tome(model, r)
    elif method == "pyra":
        pyra.add_pyra(model, r, s=s)
    extra = 0
    if method != "plain":
        for n, entry in zip(pyra.token_counts(model), r):
            extra += (n - n // 2) * (n // 2) * 8
            if method == "pyra":
                extra += (2 if s == 1 else 3) * entry * s * 24
    assert count_flops(model, batch(1, img_size=model.img_size)) == pyra.count_macs(model) + extra


def test_count_macs_of_an_adapted_model():
    """LoRA counts as folded in: before merge_lora and after, the same."""
    model = adapted("pyra")
    macs = pyra.count_macs(model)
    assert macs == pyra.count_macs(adapted("tome", lora=False))
    assert count_flops(model, batch(1)) > count_flops(pyra.merge_lora(model), batch(1))
    assert pyra.count_macs(model) == macs


# ----------------------------------------------------------------------------------------------------------------------
# timm


@pytest.mark.parametrize("kwargs", [
    dict(),
    dict(img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=2, mlp_ratio=4.0),
    dict(img_size=14, patch_size=2, num_classes=1),
    dict(global_pool="avg"),
    dict(num_classes=0),
    dict(distilled=True),
    dict(distilled=True, img_size=32, patch_size=16),
], ids=str)
def test_timm_agrees(kwargs):
    """The same names, shapes and logits as timm's model, on random weights."""
    vit = pytest.importorskip("timm.models.vision_transformer", reason="timm, the oracle, isn't installed")
    deit = pytest.importorskip("timm.models.deit")
    kwargs = {**TINY, **kwargs}
    distilled = kwargs.get("distilled", False)
    model = randomise(pyra.VisionTransformer(**kwargs)).eval()
    kwargs.pop("distilled", None)
    oracle = (deit.VisionTransformerDistilled if distilled else vit.VisionTransformer)(**kwargs).eval()
    oracle.load_state_dict(model.state_dict(), strict=True)
    images = batch(img_size=kwargs["img_size"])
    with torch.no_grad():
        expected = oracle(images)
        assert expected.abs().max() > 0.1
        if distilled:
            head, head_dist = model.forward_heads(images)
            assert same((head + head_dist) / 2, expected)
            assert torch.equal(model(images), head) and not same(head_dist, head, rtol=1e-2)
        else:
            assert same(model(images), expected)
        assert same(model.forward_tokens(images).x, oracle.blocks(oracle._pos_embed(oracle.patch_embed(images))))


def test_shipped_size():
    """The small backbone has the paper's geometry."""
    model = on_meta("vit_nano_patch4_56")
    assert (len(model.blocks), model.num_patches) == (12, 196)
    assert count(model.parameters()) * 4 < 6e6


# ----------------------------------------------------------------------------------------------------------------------
# LoRA, freezing, parameter groups


@pytest.mark.parametrize("method", ["plain", "pyra"])
def test_merge_lora(method):
    """The logits stay, LoRA's tensors go, and the model has timm's names again (and the generators)."""
    model = adapted(method)
    logits = model(batch())
    backbone = tiny().state_dict().keys()
    assert not same(pyra.VisionTransformer.forward(adapted(method, lora=False), batch()), logits, rtol=1e-2)
    assert pyra.merge_lora(model) is model
    assert same(model(batch()), logits)
    assert {k for k in model.state_dict() if ".reducer." not in k} == backbone
    assert type(model.blocks[0].attn.qkv) is torch.nn.Linear
    assert torch.equal(pyra.merge_lora(model)(batch()), model(batch()))  # a second time changes nothing


def test_lora_is_the_formula():
    """y = W x + b + B A x with one A for q, k and v; at first B = 0, and the model is the pre-trained one, bit for bit."""
    model = tiny()
    logits, linear = model(batch()), copy.deepcopy(model.blocks[0].attn.qkv)
    pyra.add_lora(model, rank=2).eval()
    assert torch.equal(model(batch()), logits)
    lora = model.blocks[0].attn.qkv
    assert lora.lora_a.shape == (2, 24) and lora.lora_b.shape == (72, 2)
    assert lora.lora_a.any() and not lora.lora_b.any()
    torch.nn.init.normal_(lora.lora_b)
    x = torch.randn(4, 24)
    assert same(lora(x), x @ (linear.weight + lora.lora_b @ lora.lora_a).T + linear.bias)


@rows("targets, alpha", [(("qkv",), None), (("qkv", "proj", "fc1", "fc2"), 6), (["fc2"], 0.5), (("proj", "fc1"), 3)])
@torch.no_grad()
def test_lora_on_any_map_is_the_formula(targets, alpha):
    """y = W x + b + alpha / rank B A x, alpha = rank by default; at first nothing changes, and folded in it gives the same logits."""
    for family in ("clip", "dinov3"):
        model = variant(family)
        linears = {name: copy.deepcopy(linear) for name, linear in model.named_modules() if name.split(".")[-1] in targets and "blocks." in name}
        before = model(batch())
        pyra.add_lora(model, rank=3, dropout=0.0, targets=targets, alpha=alpha)
        assert torch.equal(model(batch()), before) and len(linears) == 3 * len(targets)
        assert {name for name in trained(model) if not name.startswith("head.")} == {f"{name}.lora_{part}" for name in linears for part in "ab"}
        randomise(model)
        for name, linear in linears.items():
            lora, x = model.get_submodule(name), numbers(4, linear.in_features)
            weight = lora.weight + (alpha or 3) / 3 * lora.lora_b @ lora.lora_a
            assert same(lora(x), x @ weight.T + lora.bias)
        logits, macs = model(batch()), pyra.count_macs(model)
        assert not same(logits, before, rtol=1e-2) and model.folded is None
        assert same(pyra.merge_lora(model)(batch()), logits) and model.state_dict().keys() == variant(family).state_dict().keys()
        assert pyra.count_macs(model) == macs and model.folded == "LoRA"


@rows("settings, message", [
    (dict(targets=("qvk",)), r"targets must be different names out of qkv, proj, fc1, fc2, not \('qvk',\)"), (dict(targets=()), "targets must be"),
    (dict(targets=("qkv", "qkv")), "targets must be different names"), (dict(targets="qkv"), "targets must be different names out of .* not 'qkv'"),
    (dict(alpha=0), "alpha must be a finite number greater than 0, not 0"), (dict(alpha=math.inf), "alpha must be"), (dict(alpha=math.nan), "alpha must be"),
])
def test_lora_settings_refused(settings, message):
    model, before = variant("clip"), snapshot(variant("clip"))
    with pytest.raises(ValueError, match=message):
        pyra.add_lora(model, **settings)
    assert equal(model.state_dict(), before) and all(p.requires_grad for p in model.parameters())


def test_lora_dropout_only_in_training():
    """In training two forwards differ, in evaluation they agree; without dropout they always do."""
    model = adapted("plain").train()
    assert not same(model(batch()), model(batch()), rtol=1e-4)
    model.eval()
    assert torch.equal(model(batch()), model(batch()))
    model = randomise(pyra.add_lora(tiny(), rank=2, dropout=0.0)).train()
    assert torch.equal(model(batch()), model(batch()))


def test_lora_added_in_evaluation_mode():
    """Surgery on a model in eval() leaves it in eval(): no dropout in what a user then serves."""
    model = randomise(pyra.add_pyra(pyra.add_lora(tiny().eval(), rank=2, dropout=0.5), R))
    assert torch.equal(model(batch()), model(batch()))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 1 - 1e-9])
def test_lora_dropout_acts_on_lora_alone(rate):
    """It drops elements of LoRA's input at the rate, independently, and scales the rest; the frozen map reads all of it."""
    torch.manual_seed(0)
    lora = pyra.LoRALinear(torch.nn.Linear(7, 21), rank=7, dropout=rate).train()
    with torch.no_grad():  # the first 7 outputs are dropout(x), the others the frozen map
        lora.lora_a.copy_(torch.eye(7))
        lora.lora_b[:7] = torch.eye(7)
        lora.weight[:7] = lora.bias[:7] = 0
    x = torch.rand(5001, 7) + 1
    out = lora(x).detach()
    assert same(out[:, 7:], F.linear(x, lora.weight[7:], lora.bias[7:]))
    kept = out[:, :7] != 0
    assert (kept.float().mean(dim=0) - (1 - rate)).abs().max() < 0.03
    if rate < 0.99:
        assert (kept.T.float().corrcoef() - torch.eye(7)).abs().max() < 0.06
        assert (kept[1:].flatten() != kept[:-1].flatten()).float().mean() == pytest.approx(2 * rate * (1 - rate), abs=0.02)
        torch.testing.assert_close(out[:, :7][kept], x[kept] / (1 - rate))


@pytest.mark.parametrize("order, kwargs", [("lora, pyra", {}), ("pyra, lora", dict(distilled=True))], ids=["token", "distilled"])
def test_freezing(order, kwargs):
    """Whatever the order, LoRA, the generators and the class head are trained, and nothing else."""
    model = tiny(**kwargs)
    for step in order.split(", "):
        pyra.add_lora(model, rank=2) if step == "lora" else pyra.add_pyra(model, R)
    expected = {"head.weight", "head.bias"}
    for i in range(3):
        expected |= {f"blocks.{i}.attn.qkv.lora_a", f"blocks.{i}.attn.qkv.lora_b", f"blocks.{i}.reducer.w_r", f"blocks.{i}.reducer.w_d"}
    assert trained(model).keys() == expected


def test_full_fine_tuning():
    """Without LoRA nothing is frozen: MAE's recipe trains it all, and all of it learns."""
    model = pyra.add_pyra(tiny(global_pool="avg"), R)
    assert all(p.requires_grad for p in model.parameters())
    _, grads = gradients(model, batch())
    zero = {name for name, grad in grads.items() if not grad.any()}
    assert zero == {f"blocks.{i}.reducer.w_r" for i in range(3)}  # w_d = 0 still


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("method", ["pyra", "tome"])
def test_param_groups(lora, method):
    """Every trained parameter is in exactly one group; the generators have their rate; biases and norms don't decay."""
    model = adapted(method, lora=lora)
    groups = {group["name"]: group for group in pyra.param_groups(model, lr=1e-2, modulation_lr=1e-4, weight_decay=0.3)}
    of = {id(p): name for name, p in model.named_parameters()}
    names = {name: [of[id(p)] for p in group["params"]] for name, group in groups.items()}
    assert sorted(sum(names.values(), [])) == sorted(trained(model))
    assert list(groups) == ["decay", "no_decay", "modulation"][:3 if method == "pyra" else 2]
    if method == "pyra":
        assert sorted(names["modulation"]) == sorted(name for name in trained(model) if ".reducer.w_" in name)
        assert groups["modulation"]["lr"] == 1e-4 and groups["modulation"]["weight_decay"] == 0.3
    for name in ("decay", "no_decay"):
        assert groups[name]["lr"] == 1e-2
    assert groups["no_decay"]["weight_decay"] == 0 and groups["decay"]["weight_decay"] == 0.3
    plain = {name for name in trained(model) if name.endswith("bias") or "norm" in name or name in ("pos_embed", "cls_token", "dist_token")}
    assert set(names["no_decay"]) == plain
    assert {group["name"]: group["lr"] for group in pyra.param_groups(model, lr=0.5)} == dict.fromkeys(groups, 0.5)
    torch.optim.AdamW(list(groups.values()))


class Threshold(pyra.ToMe):
    """A reducer with trained parameters of its own: a number, and a matrix with its own learning rate."""

    lrs = {"matrix": 7e-3}

    def __init__(self, r):
        super().__init__(r)
        self.number, self.matrix = torch.nn.Parameter(torch.tensor(0.5)), torch.nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize("decay", [None, 0.5])
def test_a_reducers_parameters(decay):
    """A number does not decay, as a bias doesn't; what is in `lrs` forms a group of its name, behind the others, with this rate in every block, without decay."""
    model = pyra.set_reducers(tiny(), [Threshold(3), None, Threshold(2)])
    groups = pyra.param_groups(model, lr=0.1, weight_decay=0.3)
    groups = epochs.decay_by_layer(model, groups, decay) if decay else groups
    numbers, matrices = ({id(getattr(model.blocks[i].reducer, name)) for i in (0, 2)} for name in ("number", "matrix"))
    of = [{id(p) for p in group["params"]} for group in groups]
    assert set().union(*(params for params, group in zip(of, groups) if group["name"] == "no_decay")) >= numbers
    assert of[-1] == matrices and {key: groups[-1][key] for key in ("name", "lr", "weight_decay")} == dict(name="matrix", lr=7e-3, weight_decay=0.0)
    assert list(dict.fromkeys(group["name"] for group in groups)) == ["decay", "no_decay", "matrix"]
    assert sum(map(len, of)) == len(trained(model)) == len(set().union(*of))


def test_modulation_rate_takes_effect():
    """One step of plain descent moves the generators by their own rate."""
    model = adapted("pyra")
    before = snapshot(model)
    _, grads = gradients(model, batch())
    torch.optim.SGD(pyra.param_groups(model, lr=0.5, modulation_lr=0.125, weight_decay=0)).step()
    for name in ("blocks.0.reducer.w_r", "blocks.0.reducer.w_d", "blocks.0.attn.qkv.lora_a", "head.bias"):
        rate = 0.125 if ".reducer." in name else 0.5
        torch.testing.assert_close(model.state_dict()[name], before[name] - rate * grads[name])
        assert grads[name].any()
    assert torch.equal(model.norm.weight, before["norm.weight"])


# ----------------------------------------------------------------------------------------------------------------------
# Training's machinery


@pytest.mark.parametrize("method", ["plain", "pyra"])
def test_activation_checkpointing(method, monkeypatch):
    """Each block run again in the backward pass: the same logits and gradients, bit for bit, drop path and dropout included."""
    model = adapted(method, drop_path_rate=0.3).train()
    torch.manual_seed(5)
    logits, grads = gradients(model, batch())
    model.checkpoint, forward = True, pyra.Block.forward
    calls = []
    monkeypatch.setattr(pyra.Block, "forward", lambda block, tokens: calls.append(block) or forward(block, tokens))
    torch.manual_seed(5)
    again, grads_again = gradients(model, batch())
    assert torch.equal(again, logits) and equal(grads_again, grads)
    assert len(calls) == 6
    model.eval()(batch())
    assert len(calls) == 9


@rows("method, gpu", [("plain", False), ("tome", False), ("pyra", True)])
def test_compile(method, gpu, monkeypatch):
    """One graph, without a break, through autograd's tracing too, and the same logits and gradients; with what a GPU does instead, too."""
    torch.compiler.reset()
    model = adapted(method, depth=2)
    logits, grads = gradients(model, batch())
    model.zero_grad()
    if gpu:
        pyra.set_reducers(model, [block.reducer for block in model.blocks], attend=attend_as_on_a_gpu)
        take = pyra.take
        monkeypatch.setattr(pyra, "take", lambda x, index, shared=False: pyra.one_hot_product(index, x.shape[1], x) if shared else take(x, index))
        monkeypatch.setattr(pyra, "add_at", lambda x, index, y: x + pyra.one_hot_product(index, x.shape[1], y, add=True))
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(batch())
    F.cross_entropy(out, torch.arange(3)).backward()
    assert same(out, logits)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


@rows("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_without_a_mask(dtype):
    """Sizes in two more channels of k: in float32 the mask's attention, in 16 bits less than half of its error. Dead tokens get no attention."""
    for d in (64, 24, 6):
        qkv, size = numbers(3, 2, 3, 50, d), torch.arange(100).view(2, 50, 1) % 39.0  # two tokens of size 0 each, at least
        exact = pyra.attend(pyra.QKV(*qkv.to(dtype).double()), size.double())
        qkv = pyra.QKV(*qkv.to(dtype))
        q, k, v = pyra.append_log_size(qkv, size)
        assert q.shape == k.shape == v.shape == (2, 3, 50, d + 2 + -(d + 2) % 8) and q.dtype == k.dtype == v.dtype == dtype
        error = lambda out: (out.double() - exact).square().mean().sqrt()
        masked = error(F.scaled_dot_product_attention(*qkv[:3], attn_mask=size.log().to(dtype).mT[:, None]))
        assert error(attend_as_on_a_gpu(qkv, size)) < (1e-7 if dtype == torch.float32 else 0.5 * masked), d
        alive = size[0, :, 0] > 0
        of_living = pyra.QKV(*(t[:1, :, alive] for t in qkv[:3]))
        assert same(attend_as_on_a_gpu(qkv, size)[:1, :, alive], attend_as_on_a_gpu(of_living, size[:1, alive]), 1e-6 if dtype == torch.float32 else 1e-2)


@rows("method", ["tome", "pyra"])
def test_merging_as_on_a_gpu(method, monkeypatch):
    """By products with one-hot matrices: the same tokens, logits and gradients, under autocast with a stream in float32 too."""
    model = adapted(method, global_pool="avg")
    (tokens, logits), (_, grads) = block_outputs(model, batch()), gradients(model, batch())
    calls, product = [], pyra.one_hot_product
    monkeypatch.setattr(pyra, "one_hot_product", lambda *args, **kwargs: calls.append(1) or product(*args, **kwargs))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)
    (dense, found), (_, found_grads) = block_outputs(model, batch()), gradients(model, batch())
    assert len(calls) == 2 * 3 * (2 if method == "pyra" else 1)  # forwards x blocks
    assert same(found, logits) and all(same(a.x, b.x) and torch.equal(a.size, b.size) and torch.equal(a.source, b.source) for a, b in zip(dense, tokens))
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, rtol=1e-4, atol=1e-6)
    x, index, y = numbers(2, 7, 5), torch.tensor([[1, 1, 6], [0, 3, 3]]), numbers(2, 3, 5, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pyra.take(x, index, shared=True), x.gather(1, index[..., None].expand(-1, -1, 5)))
        torch.testing.assert_close(pyra.add_at(x, index, y), x.scatter_add(1, index[..., None].expand(-1, -1, 5), y), rtol=1e-6, atol=1e-6)


@rows("method, kwargs", [("plain", {}), ("tome", {}), ("pyra", {}), ("pyra", dict(rope=True, num_heads=2)), ("pyra", dict(class_token=False, global_pool="map"))])
def test_the_forward_pass_never_waits_for_a_gpu(method, kwargs, monkeypatch):
    """On tensors without values, all on one GPU: none is asked for a value or moved. In bf16 no attention has a mask."""
    masks, attention = [], F.scaled_dot_product_attention
    watched = lambda *args, attn_mask=None, **given: masks.append(attn_mask) or attention(*args, attn_mask=attn_mask, **given)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model = adapted(method, **kwargs).train()
    with FakeTensorMode(), torch.device("cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            fake = lambda t: torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype)
            tensors = {name: fake(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
            out = torch.func.functional_call(model, tensors, fake(batch()))
            assert out.device.type == "cuda" and out.shape == (3, 5) and out.dtype == dtype
    attentions = 4 if "global_pool" in kwargs else 3
    assert len(masks) == 2 * attentions and masks[attentions:] == [None] * attentions


def test_compile_in_training():
    """Dropout and drop path are in the graph too, for a second batch size as well."""
    torch.compiler.reset()
    model = adapted(drop_path_rate=0.3, depth=2).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for b in (3, 2):
        compiled(batch(b)).sum().backward()
    assert all(p.grad.isfinite().all() for p in trained(model).values())
    assert not same(compiled(batch(2)), compiled(batch(2)), rtol=1e-3)


@pytest.mark.parametrize("s, kwargs", [(1, {}), (3, dict(global_pool="avg"))], ids=["token", "avg"])
def test_bf16_autocast(s, kwargs):
    """Training under autocast: finite, near float32, with float32 sizes that stay exact."""
    model = adapted(s=s, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.forward_tokens(batch())
        _, grads = gradients(model, batch())
    assert tokens.size.dtype == torch.float32 and (tokens.size.sum((1, 2)) == 37).all()
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in grads.values())
    assert sum(bool(grad.any()) for grad in grads.values()) >= len(grads) - 2


def test_a_learning_rate_of_a_reducers_own_is_one_per_name():
    """Two blocks that differ, or the name of one of the other groups: refused, where one of them would be lost in silence."""
    for lrs in ([{"w_d": 0.1}, {"w_d": 0.2}], [{"decay": 0.1}, {}]):
        model = adapted()
        for block, own in zip(model.blocks, lrs):
            block.reducer.lrs = own
        with pytest.raises(ValueError, match="lrs has two learning rates for (w_d|decay): rename one"):
            pyra.param_groups(model)


def test_drop_path():
    """In training it drops a branch of part of the samples and scales the rest; in evaluation it does nothing."""
    model = tiny(drop_path_rate=0.4)
    assert torch.equal(model(batch()), tiny()(batch()))
    assert [block.drop_path_rate for block in model.blocks] == pytest.approx([0, 0.2, 0.4])
    assert pyra.VisionTransformer(**{**TINY, "depth": 1, "drop_path_rate": 0.4}).blocks[0].drop_path_rate == 0
    model.train()
    assert not same(model(batch()), model(batch()), rtol=1e-3)
    torch.manual_seed(0)
    x = torch.randn(2000, 3, 2)
    out = pyra.drop_path(x, 0.4)
    dropped = (out == 0).all(dim=(1, 2))
    assert 0.35 < dropped.float().mean() < 0.45
    torch.testing.assert_close(out[~dropped], x[~dropped] / 0.6)


@pytest.mark.parametrize("method", ["plain", "tome", "pyra"])
def test_overfits_a_batch(method):
    """The whole of it learns: LoRA, generators and head bring the loss of a few images to nearly nothing."""
    torch.manual_seed(0)
    model = tiny()
    pyra.add_lora(model, rank=4, dropout=0)
    {"plain": lambda *_: None, "tome": pyra.add_tome, "pyra": pyra.add_pyra}[method](model, R)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.AdamW(pyra.param_groups(model, lr=1e-2, modulation_lr=1e-3))
    images, labels = batch(8), torch.arange(8) % 5
    for _ in range(40):
        loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.1
    assert all(torch.equal(model.get_parameter(name), p) for name, p in frozen.items())
    if method == "pyra":
        assert model.blocks[0].reducer.w_d.any() and model.blocks[1].reducer.w_r.grad.any()


def test_models_copy_and_move():
    """A deep copy is independent; a state dict goes into a fresh model; half of the reducers may be absent."""
    model = adapted()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(batch()), model(batch()))
    torch.nn.init.zeros_(twin.blocks[0].reducer.w_d)
    assert not torch.equal(twin(batch()), model(batch()))
    fresh = adapted(seed=1)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(batch()), model(batch()))
    double = copy.deepcopy(model).double()
    assert double(batch().double()).dtype == torch.float64
    assert same(double(batch().double()), model(batch()), rtol=1e-4)
    pyra.add_pyra(model, [0, 6, 0])
    assert [block.reducer is None for block in model.blocks] == [True, False, True]
    assert pyra.token_counts(model) == [37, 37, 31, 31]
    assert "r=6" in repr(model) and "r=4" in repr(pyra.ToMe(4))


@pytest.mark.parametrize("s", [1, 3])
def test_models_in_bfloat16(s):
    """A whole model held in bf16 runs without autocast, and keeps its sizes in float32."""
    model = adapted(s=s).bfloat16()
    assert model(batch().bfloat16()).dtype == torch.bfloat16
    tokens = model.forward_tokens(batch().bfloat16())
    assert tokens.size.dtype == torch.float32 and (tokens.size.sum((1, 2)) == 37).all()


# ----------------------------------------------------------------------------------------------------------------------
# Refusals: one sentence each


@rows("call, message", [
    (lambda: pyra.solve_schedule(0), "depth must be a positive integer, not 0"),
    (lambda: pyra.solve_schedule(12, tokens="196"), "tokens must be a positive integer, not '196'"),
    (lambda: pyra.solve_schedule(12, remaining=-1), "remaining must be an integer of at least 0, not -1"),
    (lambda: pyra.solve_schedule(12, remaining=196), r"remaining \(196\) must be less than tokens \(196\)"),
    (lambda: pyra.solve_schedule(12, tokens=4), r"remaining \(4\) must be less than tokens \(4\)"),
    *[(functools.partial(pyra.solve_schedule, 12, flops_ratio=ratio), "flops_ratio must be a finite number greater than 1")
      for ratio in (1, -2, math.inf, math.nan, True, "3")],
    (lambda: pyra.merge_schedule("mid"), "rate must be 'low', 'high' or a number greater than 1, not 'mid'"),
    (lambda: pyra.merge_schedule("high", depth=3, tokens=8), "flops_ratio 3.463 is out of reach: merging down to 4 patches reaches 1.* at most"),
    (lambda: pyra.merge_schedule("high", model=torch.nn.Linear(2, 2)), "model must be a pyra.VisionTransformer, not <class 'torch.nn.*Linear'>: see from_timm"),
    (lambda: pyra.merge_schedule(1.0), "greater than 1, not 1.0"),
    (lambda: pyra.merge_schedule(None), "greater than 1, not None"),
    *[(functools.partial(pyra.VisionTransformer, **{name: value}), f"{name} must be a positive integer, not {value!r}")
      for name, value in dict(img_size=0, patch_size=2.0, embed_dim=True, depth=0, num_heads=-1).items()],
    (lambda: pyra.VisionTransformer(num_classes=-1), "num_classes must be an integer of at least 0, not -1"),
    (lambda: pyra.VisionTransformer(img_size=225), "img_size 225 is not a multiple of patch_size 16"),
    (lambda: pyra.VisionTransformer(num_heads=7), "embed_dim 768 is not a multiple of num_heads 7"),
    (lambda: pyra.VisionTransformer(global_pool="mean"), "global_pool must be 'token', 'avg' or 'map', not 'mean'"),
    (lambda: pyra.VisionTransformer(drop_path_rate=1.0), "drop_path_rate must be at least 0 and less than 1, not 1.0"),
    (lambda: pyra.create_model("vit_huge"), "no model is called 'vit_huge': known are timm's names of plain ViTs"),
    *[(functools.partial(lambda shape: tiny()(torch.zeros(shape)), shape), r"images must be \(b, 3, 24, 24\), not ")
      for shape in ((3, 24, 24), (1, 1, 24, 24), (1, 3, 24, 20))],
    *[(functools.partial(lambda rank: pyra.add_lora(tiny(), rank=rank), rank), "rank must be a positive integer, not ")
      for rank in (0, 2.0, True)],
    (lambda: pyra.add_lora(tiny(), dropout=1.0), "dropout must be at least 0 and less than 1, not 1.0"),
    (lambda: pyra.add_lora(pyra.add_lora(tiny())), "has LoRA already"),
    *[(functools.partial(lambda s: pyra.add_pyra(tiny(), R, s=s), s), "s must be a positive integer, not ") for s in (0, 1.0, True)],
    *[(functools.partial(lambda add, r: add(tiny(), r), add, r), message) for add, r, message in (
        (pyra.add_tome, [1, 2], "the schedule has 2 entries, the model 3 blocks"),
        (pyra.add_pyra, [1, 2, 3, 4], "the schedule has 4 entries, the model 3 blocks"),
        (pyra.add_tome, "high", "r must be an integer or a list with one entry per block, not 'high'"),
        (pyra.add_pyra, 2.5, "r must be an integer or a list.* not 2.5"),
        (pyra.add_tome, -1, "block 0: r must be an integer of at least 0, not -1"),
        (pyra.add_pyra, [3, 2, -1], "block 2: r must be an integer of at least 0, not -1"),
        (pyra.add_tome, [3, 2.0, 1], "block 1: r must be an integer of at least 0, not 2.0"),
        (pyra.add_pyra, [3, True, 1], "block 1: r must be an integer of at least 0, not True"),
        (pyra.add_tome, True, "r must be an integer.* not True"),
    )],
    (lambda: pyra.add_pyra(tiny(), [19, 0, 0]), "block 0: 19 pairs can't merge, 37 tokens are left and at most 18 pairs can"),
    (lambda: pyra.add_pyra(tiny(), [10, 6, 11]), "block 2: 11 pairs can't merge, 21 tokens are left and at most 10 pairs can"),
    (lambda: pyra.add_pyra(tiny(distilled=True), [18, 10, 0]), "block 1: 10 pairs can't merge, 20 tokens are left and at most 9 pairs can"),
    (lambda: pyra.add_pyra(tiny(), 13), "block 1: 13 pairs can't merge, 24 tokens are left and at most 11 pairs can"),
    *[(functools.partial(lambda r: pyra.add_tome(tiny(), r), r), message) for r, message in (
        (np.array([3.0, 2.0, 1.0]), "block 0: r must be an integer of at least 0, not 3.0"),
        (torch.tensor([True] * 3), "block 0: r must be an integer.* not True"),
        (np.ones((3, 1), int), r"block 0: r must be an integer.* not \[1\]"),
        (np.array([1, 2]), "the schedule has 2 entries"), ({1, 2, 3}, "a list.* not {1, 2, 3}"),
    )],
    (lambda: pyra.read_checkpoint("/nowhere/weights"), "weights must be a .safetensors, .pth, .* file or a name on the hub"),
    (lambda: pyra.read_checkpoint(HERE), "weights must be a .safetensors, .pth, .* file or a name on the hub"),
    (lambda: pyra.read_checkpoint("a name"), "weights must be .* not 'a name'"),
])
def test_refused(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", [
    lambda model: pyra.add_pyra(model, [3, 2, 30]),
    lambda model: pyra.add_pyra(model, R, s=0),
    lambda model: pyra.add_tome(model, [3, 2, -1]),
    lambda model: pyra.add_lora(model),
])
def test_a_refusal_changes_nothing(call):
    """Surgery that is refused halfway down the schedule has touched no block."""
    model = adapted()
    logits, before = model(batch()), snapshot(model)
    with pytest.raises(ValueError):
        call(model)
    assert equal(model.state_dict(), before) and torch.equal(model(batch()), logits)


def test_sizes_are_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        pyra.VisionTransformer(224)


# ----------------------------------------------------------------------------------------------------------------------
# Schedules by operations


@pytest.mark.parametrize("name, ratio", [
    ("vit_nano_patch4_56", 1.1), ("vit_base_patch16_224", 3.46), ("vit_large_patch16_224", 2), ("deit_base_distilled_patch16_224", 4.5),
])
def test_solved_schedule_meets_the_operations(name, ratio):
    model = on_meta(name, num_classes=100)
    plain, r = pyra.count_macs(model), pyra.solve_macs(model, ratio)
    assert len(r) == len(model.blocks) and model.num_patches - sum(r) >= 4
    pyra.add_pyra(model, r)  # which refuses what tokens can't satisfy
    assert plain / pyra.count_macs(model) == pytest.approx(ratio, rel=2e-3)


def test_solved_schedule_cannot_be_bettered_by_one_pair():
    model = pyra.VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2, num_classes=3)
    plain, r = pyra.count_macs(model), pyra.solve_macs(model, 1.6, remaining=2)

    def miss(r):
        return abs(plain / pyra.count_macs(pyra.add_tome(model, r)) / 1.6 - 1)
    best = miss(r)
    for block in range(4):
        for step in (-1, 1):
            other = r[:block] + [r[block] + step] + r[block + 1:]
            tokens = [17 - sum(other[:i]) for i in range(5)]
            if min(other) >= 0 and tokens[-1] >= 3 and all(2 * merged <= n - 1 for merged, n in zip(other, tokens)):
                assert miss(other) >= best


def test_the_most_merging_is_where_solve_macs_ends():
    model = pyra.create_model("vit_nano_patch4_56")
    most = speed.most_macs_ratio(model)
    r = pyra.solve_macs(model, most)
    assert r[:3] == [98, 49, 24] and sum(r) == model.num_patches - 4
    with pytest.raises(ValueError, match="is out of reach: merging down to 4 patches reaches .* at most"):
        pyra.solve_macs(model, most * 1.001)


@rows("kwargs, sentence", [
    (dict(flops_ratio=1), "flops_ratio must be a finite number greater than 1, not 1"), (dict(flops_ratio="2"), "flops_ratio must be"),
    (dict(flops_ratio=2, remaining=0), "remaining must be a positive integer, not 0"),
    (dict(flops_ratio=2, remaining=196), r"remaining \(196\) must be less than the model's 196 patches"), (dict(flops_ratio=40), "flops_ratio 40 is out of reach"),
])
def test_solve_macs_refuses(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        pyra.solve_macs(on_meta("vit_base_patch16_224"), **kwargs)
