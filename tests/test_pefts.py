"""The other PEFT modules against naive loops, the papers' figures and their own promises."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import R, TINY, batch, count_flops, numbers, on_meta, randomise, rows, tiny, trained
from safetensors.torch import save_file

import pyra
from pyra_lab import pruning, vtab
from pyra_lab.pefts import adapter, convpass, fact, snf
from pyra_lab.pefts.shared import peft_macs

PEFTS = {
    "adapter": lambda model: adapter.add_adapter(model, dim=4),
    "convpass": lambda model: convpass.add_convpass(model, dim=4, scale=0.5),
    "fact_tt": lambda model: fact.add_fact(model, "tt", rank=4, scale=5),
    "fact_tk": lambda model: fact.add_fact(model, "tk", rank=4, scale=10),
    "snf": lambda model: snf.add_snf(model),
    "snf_planar": lambda model: snf.add_snf(model, flows=2, affine=False),
}
REDUCERS = {"plain": lambda model: model, "tome": lambda model: pyra.add_tome(model, R), "pyra": lambda model: pyra.add_pyra(model, R)}
every_peft = pytest.mark.parametrize("peft", PEFTS)


def adapted(peft, reducer="pyra", seed=0, **kwargs):
    """A small ViT with a PEFT and a reducer, in eval mode, every parameter random."""
    return randomise(REDUCERS[reducer](PEFTS[peft](pyra.VisionTransformer(**{**TINY, **kwargs}))), seed).eval()


def without_attention(block):
    """The block, whose attention now adds nothing."""
    torch.nn.init.zeros_(block.attn.proj.weight)
    torch.nn.init.zeros_(block.attn.proj.bias)
    return block


def phi(z):
    return z / (1 + (-1.702 * z).exp())


# ----------------------------------------------------------------------------------------------------------------------
# What all of them promise


def test_parameters_of_the_papers():
    table = [
        ("vit_base_patch16_224", adapter.add_adapter, {}, 156_768),
        ("vit_large_patch16_224", adapter.add_adapter, dict(dim=12), 614_688),
        ("vit_small_patch16_224", adapter.add_adapter, dict(dim=4), 41_520),
        ("vit_base_patch16_224", convpass.add_convpass, {}, 327_552),
        ("vit_base_patch16_224", fact.add_fact, {}, 61_440),
        ("vit_base_patch16_224", fact.add_fact, dict(form="tt", rank=4), 8_448),
        ("vit_base_patch16_224", fact.add_fact, dict(form="tk", rank=32), 86_528),
        ("vit_base_patch16_224", fact.add_fact, dict(form="tk", rank=8), 13_952),
        ("vit_base_patch16_224", snf.add_snf, {}, 36_864),
        ("vit_base_patch16_224", snf.add_snf, dict(flows=1, affine=False), 36_888),
        ("vit_base_patch16_224", snf.add_snf, dict(flows=16), 627_072),
    ]
    found = [(name, add, kwargs, sum(p.numel() for p in trained(add(on_meta(name, num_classes=0), **kwargs)).values())) for name, add, kwargs, _ in table]
    assert found == table


@pytest.mark.parametrize("peft", ["convpass", "fact_tt", "fact_tk", "snf"])
def test_training_starts_at_the_pre_trained_model(peft):
    """Bit for bit, with merging or without."""
    for reducer in REDUCERS.values():
        torch.manual_seed(0)
        model = reducer(tiny())
        logits = model(batch())
        assert torch.equal(PEFTS[peft](model)(batch()), logits)


def test_adapter_and_planar_flows_do_not_start_at_zero():
    for peft in ("adapter", "snf_planar"):
        torch.manual_seed(0)
        model = tiny()
        logits = model(batch())
        assert not torch.allclose(PEFTS[peft](model)(batch()), logits, rtol=1e-4)


@every_peft
def test_order_and_freezing(peft):
    """Before or after the reducer, the same model; PEFT, generators and class head are trained, all of them, and nothing else."""
    model = randomise(PEFTS[peft](REDUCERS["pyra"](pyra.VisionTransformer(**TINY, global_pool="avg")))).eval()
    other = adapted(peft, global_pool="avg")  # the last block's merging does not reach the class token
    assert trained(model).keys() == trained(other).keys()
    assert torch.equal(model(batch()), other(batch()))
    F.cross_entropy(model(batch()), torch.arange(3)).backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == ("peft_" in name or ".reducer." in name or name.startswith(("head.", "fc_norm."))), name
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name
    assert sum("peft_" in name for name in trained(model)) >= 3


@every_peft
def test_load_pretrained_into_an_adapted_model(tmp_path, peft):
    """The backbone keeps its names, and what the PEFT adds stays as it is."""
    source, model = tiny(seed=5), adapted(peft)
    before = {name: p.clone() for name, p in trained(model).items()}
    assert {name for name in model.state_dict() if not ("peft_" in name or ".reducer." in name)} == set(source.state_dict())
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    pyra.load_pretrained(model, tmp_path / "weights.pth")
    for name, p in model.named_parameters():
        expected = before[name] if "peft_" in name or ".reducer." in name else source.state_dict()[name]
        assert torch.equal(p, expected), name


@pytest.mark.parametrize("other", [
    lambda model: convpass.add_convpass(model, dim=4, scale=5),
    lambda model: adapter.add_adapter(model, dim=4),
    lambda model: model,
])
def test_adapter_files_of_another_peft_are_refused(tmp_path, other):
    pyra.save_adapter(adapted("convpass"), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match='its peft is {"name": "Convpass", "dim": 4, "scale": 0.5}, the model\'s '):
        pyra.load_adapter(randomise(pyra.add_pyra(other(tiny()), R)), tmp_path / "a.safetensors")


def test_adapter_files_of_before_there_was_a_peft_still_load(tmp_path):
    """They don't name one; a model that has one refuses them."""
    model, path = randomise(pyra.add_lora(tiny(), rank=2)), tmp_path / "a.safetensors"
    metadata = {key: value for key, value in pyra.describe(model).items() if key != "peft"}
    save_file({name: p.detach() for name, p in trained(model).items()}, path, {"format": "pyra-adapter", **metadata})
    pyra.load_adapter(model, path)
    with pytest.raises(ValueError, match="doesn't fit"):
        pyra.load_adapter(adapted("snf", "plain"), path)


@every_peft
def test_a_model_takes_one_peft(peft):
    model = adapted(peft)
    logits, names = model(batch()), list(model.state_dict())
    for add in (pyra.add_lora, *PEFTS.values()):
        with pytest.raises(ValueError, match="the model has (Adapter|Convpass|FacT|SNF) already, and takes one PEFT"):
            add(model)
    with pytest.raises(ValueError, match="the model has LoRA already"):
        PEFTS[peft](pyra.add_lora(tiny()))
    assert list(model.state_dict()) == names and torch.equal(model(batch()), logits)


@rows("call, message", [
    (lambda model: adapter.add_adapter(model, dim=0), "dim must be a positive integer, not 0"),
    (lambda model: adapter.add_adapter(model, dropout=1.0), "dropout must be at least 0 and less than 1, not 1.0"),
    (lambda model: convpass.add_convpass(model, dim=True), "dim must be a positive integer, not True"),
    (lambda model: convpass.add_convpass(model, scale=0), "scale must be a finite number greater than 0, not 0"),
    (lambda model: convpass.add_convpass(model, init="zero"), "init must be 'identity' or 'xavier', not 'zero'"),
    (lambda model: fact.add_fact(model, "tucker"), "form must be 'tt' or 'tk', not 'tucker'"),
    (lambda model: fact.add_fact(model, rank=1.5), "rank must be a positive integer, not 1.5"),
    (lambda model: fact.add_fact(model, scale=math.inf), "scale must be a finite number greater than 0, not inf"),
    (lambda model: snf.add_snf(model, flows=-1), "flows must be an integer of at least 0, not -1"),
    (lambda model: snf.add_snf(model, flows=0, affine=False), "SNF without affine needs flows of at least 1"),
])
def test_refused(call, message):
    """In one sentence, before anything is touched."""
    model = tiny()
    with pytest.raises(ValueError, match=message):
        call(model)
    assert not any("peft_" in name for name in model.state_dict()) and all(p.requires_grad for p in model.parameters())
    assert all(block.peft_attn is block.peft_mlp is pyra.residual for block in model.blocks)


@every_peft
def test_dropout_and_drop_path_act_in_training_alone(peft):
    model = adapted(peft, drop_path_rate=0.3)
    assert torch.equal(model(batch()), model(batch()))
    model.train()
    assert not torch.allclose(model(batch()), model(batch()))
    for block in model.blocks:
        block.drop_path_rate = 0.0
    assert torch.equal(model(batch()), model(batch())) == peft.startswith("snf")  # SNF has no dropout


@pytest.mark.parametrize("peft", ["convpass", "fact_tk"])
def test_compile(peft):
    """One graph, without a break; the same logits and gradients."""
    torch.compiler.reset()
    model = adapted(peft)
    logits = model(batch())
    expected = torch.autograd.grad(logits.square().sum(), list(trained(model).values()))
    out = torch.compile(model, fullgraph=True, backend="eager")(batch())
    found = torch.autograd.grad(out.square().sum(), list(trained(model).values()))
    torch.testing.assert_close(out, logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@every_peft
def test_copies_and_bf16(peft):
    """A copy shares nothing with its model; under autocast on a bf16 backbone the tokens stay bf16 and the gradients are finite."""
    model = adapted(peft)
    other, logits = copy.deepcopy(model), model(batch())
    for p in trained(other).values():
        p.data.mul_(0.5)
    assert torch.equal(model(batch()), logits) and not torch.allclose(other(batch()), logits)
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        tokens, low = model.train().forward_tokens(batch()), model.eval()(batch())
    assert tokens.x.dtype == torch.bfloat16
    assert (low.float() - logits).abs().max() < 0.1 * logits.abs().max()
    tokens.x.float().sum().backward()
    assert all(p.grad.isfinite().all() for name, p in trained(model).items() if "peft_" in name)


@pytest.mark.parametrize("peft, reducer, distilled", [
    ("adapter", "pyra", True), ("convpass", "plain", True), ("convpass", "pyra", False), ("fact_tt", "tome", True), ("fact_tk", "pyra", False),
    ("snf", "pyra", True), ("snf_planar", "tome", False),
])
def test_peft_macs_are_what_pytorch_counts(peft, reducer, distilled):
    """But for the flows, products of vectors that PyTorch does not count, and for FacT's Sigma U, computed once per batch."""
    model, plain = adapted(peft, reducer, distilled=distilled), REDUCERS[reducer](tiny(distilled=distilled))
    counts = pyra.token_counts(model)
    extra = count_flops(model, batch(1)) - count_flops(plain, batch(1))
    if peft.startswith("snf"):
        assert extra == 0
        extra = (24 if peft == "snf" else 2 * 2 * 24) * (sum(counts[:-1]) + sum(counts[1:]))
    elif peft == "fact_tt":
        extra -= 3 * (3 + 1 + 2 + 2) * 4 * 4 * 24
    elif peft == "fact_tk":
        extra -= 3 * (3 + 1 + 2 + 2) * (4 * 4 * 24 + 4 * 4 * 4)
    assert peft_macs(model) == extra
    assert pyra.count_macs(model) == pyra.count_macs(plain)


def test_peft_macs_of_vit_base():
    assert peft_macs(adapter.add_adapter(on_meta("vit_base_patch16_224"))) == 12 * 197 * 2 * 768 * 8
    assert peft_macs(convpass.add_convpass(on_meta("vit_base_patch16_224"))) == 24 * (197 * 2 * 768 * 8 + 196 * 9 * 64 + 197 * 64)
    assert peft_macs(pyra.add_lora(on_meta("vit_base_patch16_224"))) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Adapter


def test_adapter_is_the_formula():
    block, tokens = adapted("adapter", "plain").blocks[0], pyra.Tokens(numbers(2, 7, 24), None, None)
    x, part = tokens.x + block.attn(block.attn.project(block.norm1(tokens.x))), block.peft_mlp
    m = block.mlp(block.norm2(x))
    expected = x + m + phi(m @ part.down.weight.T + part.down.bias) @ part.up.weight.T + part.up.bias
    torch.testing.assert_close(block(tokens).x, expected)


def test_a_dropped_sample_still_gets_the_adapters_biases():
    block, x = without_attention(adapted("adapter", "plain", drop_path_rate=0.5).train().blocks[2]), numbers(64, 7, 24)
    part = block.peft_mlp
    part.dropout = 0.0
    torch.manual_seed(0)
    delta = block(pyra.Tokens(x, None, None)).x - x
    biases = (part.up.weight @ phi(part.down.bias) + part.up.bias).expand(7, -1)
    dropped = [torch.allclose(d, biases, atol=1e-5) for d in delta]
    assert 16 < sum(dropped) < 48


def test_adapter_starts_as_intended():
    torch.manual_seed(0)
    part = adapter.add_adapter(pyra.VisionTransformer(**{**TINY, "embed_dim": 96})).blocks[1].peft_mlp
    for linear in (part.down, part.up):
        bound = math.sqrt(6 / (96 + 8))
        assert 0.9 * bound < linear.weight.abs().max() <= bound
        assert 0 < linear.bias.abs().max() < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# Convpass


def naive_convpass(part, x, source):
    """One image, in loops over the grid. x (n, c), source: list, for each patch the token that holds it."""
    side, n = part.grid[0], len(x)
    z = phi(x @ part.down.weight.T + part.down.bias)
    kernel, bias = part.conv.weight, part.conv.bias
    out = {}
    for i in range(side):
        for j in range(side):
            value = bias.clone()
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if 0 <= i + di < side and 0 <= j + dj < side:
                        value = value + kernel[:, :, di + 1, dj + 1] @ z[source[(i + di) * side + j + dj]]
            out[i * side + j] = value
    mixed = []
    for token in range(n):
        own = [out[patch] for patch in out if source[patch] == token]
        mixed.append(sum(own) / len(own) if own else kernel[:, :, 1, 1] @ z[token] + bias)
    return part.scale * (phi(torch.stack(mixed)) @ part.up.weight.T + part.up.bias)


@pytest.mark.parametrize("n, specials", [(None, 2), (20, 1), (5, 2)])
@torch.no_grad()
def test_convpass_is_the_naive_loop(n, specials):
    """Merged or not, on the grid, with each token the mean of its patches and the special ones by the centre tap."""
    part = adapted("convpass", distilled=specials == 2).blocks[0].peft_attn
    generator = torch.Generator().manual_seed(0)
    if n is None:
        n, where = specials + 36, [torch.arange(36) + specials] * 2
    else:  # every token holds a patch at least
        where = [torch.cat([torch.arange(n - specials), torch.randint(0, n - specials, (36 - n + specials,), generator=generator)]) for _ in range(2)]
        where = [w[torch.randperm(36, generator=generator)] + specials for w in where]
    x, where = numbers(2, n, 24), torch.stack(where)
    source = torch.cat([torch.arange(specials).expand(2, -1), where], dim=1)
    out = part.bypass(x, source)
    for image in range(2):
        torch.testing.assert_close(out[image], naive_convpass(part, x[image], where[image].tolist()), rtol=1e-4, atol=1e-5)


def test_scattering_back_is_plain_convpass_where_nothing_is_merged():
    """Bit for bit what a convolution of the reshaped patches gives."""
    part, x = adapted("convpass").blocks[0].peft_mlp, numbers(2, 37, 24)
    z = pyra.ACTS["quick_gelu"](part.down(x))
    patches = part.conv(z[:, 1:].mT.reshape(2, 4, 6, 6)).flatten(2).mT
    special = F.linear(z[:, :1], part.conv.weight[:, :, 1, 1], part.conv.bias)
    expected = part.scale * part.up(pyra.ACTS["quick_gelu"](torch.cat([special, patches], dim=1)))
    assert torch.equal(part.bypass(x, torch.arange(37).expand(2, -1)), expected)


def test_convpass_does_not_see_the_order_of_tokens():
    """Tokens permuted together with the map come out permuted."""
    bypass, x = adapted("convpass").blocks[0].peft_attn.bypass, numbers(2, 13, 24)
    generator = torch.Generator().manual_seed(1)
    source = torch.cat([torch.zeros(2, 1, dtype=torch.int64), torch.randint(1, 13, (2, 36), generator=generator)], dim=1)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(12, generator=generator)])
    torch.testing.assert_close(bypass(x[:, order], order.argsort()[source]), bypass(x, source)[:, order])


@pytest.mark.parametrize("reducer", ["plain", "pyra"])
def test_convpass_block(reducer):
    """Beside attention with the map before the merge, beside the MLP with the map after it; each with its norm."""
    block = adapted("convpass", reducer).blocks[0]
    tokens = pyra.Tokens(numbers(2, 37, 24), None, torch.arange(37).expand(2, -1))
    u = block.norm1(tokens.x)
    qkv = block.attn.project(u)
    half = tokens._replace(x=tokens.x + block.attn(qkv) + block.peft_attn.bypass(u, tokens.source))
    half = half if block.reducer is None else block.reducer(half, qkv)
    u = block.norm2(half.x)
    expected = half.x + block.mlp(u) + block.peft_mlp.bypass(u, half.source)
    out = block(tokens)
    torch.testing.assert_close(out.x, expected)
    assert out.x.shape[1] == (37 if reducer == "plain" else 27) and torch.equal(out.source, half.source)


def test_convpass_drops_its_paths_by_draws_of_its_own():
    """In some samples the MLP stays and the bypass goes, in others it is the other way round."""
    block = without_attention(adapted("convpass", "plain", drop_path_rate=0.5).blocks[2].train())
    block.peft_mlp.dropout = 0.0
    torch.nn.init.zeros_(block.peft_attn.up.weight)
    torch.nn.init.zeros_(block.peft_attn.up.bias)
    tokens = pyra.Tokens(numbers(1, 37, 24).expand(64, -1, -1), None, torch.arange(37).expand(64, -1))
    u = block.norm2(tokens.x[:1])
    branches = torch.stack([2 * block.mlp(u)[0], 2 * block.peft_mlp.bypass(u, tokens.source[:1])[0]]).detach()
    torch.manual_seed(0)
    found = set()
    for delta in (block(tokens).x - tokens.x).detach():
        found |= {(a, b) for a in (0, 1) for b in (0, 1) if torch.allclose(delta, a * branches[0] + b * branches[1], atol=1e-4)}
    assert found == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize("init", ["identity", "xavier"])
def test_convpass_starts_as_intended(init):
    torch.manual_seed(0)
    part = convpass.add_convpass(pyra.VisionTransformer(**TINY), init=init).blocks[0].peft_attn
    x = numbers(2, 8, 6, 6)
    assert torch.equal(part.conv(x), x) == (init == "identity")
    bound = math.sqrt(6 / (24 + 8))
    assert not part.up.weight.any() and 0.9 * bound < part.down.weight.abs().max() <= bound
    assert not any(part.bias.any() for part in (part.down, part.conv, part.up))


def test_convpass_settings():
    assert convpass.CONVPASS.keys() == vtab.VTAB.keys()
    assert convpass.convpass_settings("svhn") == dict(scale=100.0, init="xavier")
    model = tiny()
    convpass.add_convpass(model, **convpass.convpass_settings("sprites_count"))
    assert model.peft == dict(name="Convpass", dim=8, scale=1.0)


# ----------------------------------------------------------------------------------------------------------------------
# FacT


def naive_updates(model, form, rank, scale, depth, pieces):
    """{(block, linear): delta W} in dense matrices, a piece at a time, from the parameters by name."""
    p = {name: value.detach().double() for name, value in model.named_parameters()}
    u, v, updates = p["peft_u"], p["peft_v"], {}
    for i in range(depth):
        for linear, (outs, ins) in {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (pieces, 1), "mlp.fc2": (1, pieces)}.items():
            below = []
            for o in range(outs):
                beside = []
                for j in range(ins):
                    if form == "tt":
                        sigma = p[f"blocks.{i}.{linear}.peft_core"][o, j]
                    else:
                        column = p[f"blocks.{i}.{linear}.peft_p"][:, o, j]
                        sigma = sum(p["peft_core"][:, :, k] * column[k] for k in range(rank))
                    beside.append(scale * v @ sigma @ u)
                below.append(torch.cat(beside, dim=1))
            updates[f"blocks.{i}.{linear}.weight"] = torch.cat(below, dim=0)
    return updates


@pytest.mark.parametrize("form, mlp_ratio, pieces", [("tt", 4.0, 4), ("tk", 2.0, 2)])
def test_fact_is_dense_products(form, mlp_ratio, pieces):
    """Folded, every weight is the frozen one plus s V Sigma U in each c x c piece; nothing else changes, nothing stays."""
    model = randomise(fact.add_fact(tiny(mlp_ratio=mlp_ratio), form, rank=4, scale=10))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    updates = naive_updates(model, form, 4, 10, 3, pieces)
    after = dict(fact.fold_fact(model).named_parameters())
    assert after.keys() == tiny().state_dict().keys()
    for name, p in after.items():
        if name in updates:
            assert updates[name].abs().max() > 0.1
            torch.testing.assert_close(p, (before[name] + updates[name]).float(), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("form, reducer, heads, units", [("tt", "plain", 3, 48), ("tt", "pyra", 2, 35), ("tk", "pyra", 3, 48), ("tk", "tome", 1, 20)])
def test_folded_fact_gives_the_same_logits(form, reducer, heads, units):
    """In pruned models too, whose pieces are narrower than c or uneven."""
    model = pruning.prune_channels(tiny(), [(heads, units)] * 3)
    model = randomise(REDUCERS[reducer](fact.add_fact(model, form, rank=4, scale=5))).eval()
    plain = randomise(REDUCERS[reducer](pruning.prune_channels(tiny(), [(heads, units)] * 3)))
    logits = model(batch())
    assert not torch.allclose(plain(batch()), logits, rtol=1e-2)
    fact.fold_fact(model)
    torch.testing.assert_close(model(batch()), logits, rtol=1e-5, atol=1e-5)
    assert model.peft is None and peft_macs(model) == 0


def test_folded_fact_can_not_be_saved_and_can_be_adapted_again(tmp_path):
    model = fact.fold_fact(adapted("fact_tt"))
    with pytest.raises(ValueError, match="FacT was folded into the backbone: save the adapter before folding"):
        pyra.save_adapter(model, tmp_path / "a.safetensors")
    pyra.save_adapter(pyra.add_lora(model, rank=2), tmp_path / "a.safetensors")


def test_fold_fact_leaves_other_models_alone():
    model = adapted("adapter")
    names, logits = list(model.state_dict()), model(batch())
    assert list(fact.fold_fact(model).state_dict()) == names and torch.equal(model(batch()), logits)


def test_fact_starts_as_intended():
    """V is zero; U and TT's cores start as nn.Linear's weights, TK's core and the whole of its P as Xavier has it."""
    torch.manual_seed(0)
    tt = dict(fact.add_fact(tiny(mlp_ratio=4.0), "tt", rank=8).named_parameters())
    tk = dict(fact.add_fact(tiny(mlp_ratio=4.0), "tk", rank=8).named_parameters())
    p = torch.cat([p.flatten() for name, p in tk.items() if "peft_p" in name])
    for values, bound in ((tt["peft_u"], 24**-0.5), (tt["blocks.0.attn.qkv.peft_core"], 8**-0.5), (tt["blocks.0.mlp.fc2.peft_core"], 32**-0.5),
                          (tk["peft_core"], math.sqrt(3) / 8), (p, math.sqrt(6 / (8 + 36)))):
        assert 0.95 * bound < values.abs().max() <= bound
    assert not tt["peft_v"].any() and not tk["peft_v"].any()


def test_fact_settings():
    """The task's ranks make the paper's 0.069 M on average for TK."""
    assert fact.FACT.keys() == vtab.VTAB.keys()
    models = {rank: fact.add_fact(on_meta("vit_base_patch16_224"), "tk", rank) for rank in (16, 32)}
    size = {rank: sum(p.numel() for name, p in model.named_parameters() if "peft_" in name) for rank, model in models.items()}
    ranks = [fact.fact_settings(task, "tk")["rank"] for task in vtab.VTAB]
    assert round(sum(size[rank] for rank in ranks) / 19) == 68_985
    assert fact.fact_settings("dtd") == dict(form="tt", rank=8, scale=0.01)
    assert fact.fact_settings("digits", "tk") == dict(form="tk", rank=32, scale=1.0)


# ----------------------------------------------------------------------------------------------------------------------
# SNF


@pytest.mark.parametrize("flows, affine", [(0, True), (1, False), (3, True)])
def test_snf_is_the_formula(flows, affine):
    """On both shortcuts, F(x) + branch(x): mu + e^lambda x, then x + a tanh(w x + b) for each planar flow."""
    block = randomise(snf.add_snf(tiny(), flows, affine)).blocks[1]

    def flow(f, x):
        if affine:
            x = torch.stack([f.shift[c] + f.log_scale[c].exp() * x[..., c] for c in range(24)], dim=-1)
        for k in range(flows):
            inner = sum(f.w[k, c] * x[..., c] for c in range(24)) + f.b[k]
            x = torch.stack([x[..., c] + f.a[k, c] * inner.tanh() for c in range(24)], dim=-1)
        return x

    tokens = pyra.Tokens(numbers(2, 37, 24), None, torch.arange(37).expand(2, -1))
    half = flow(block.peft_attn, tokens.x) + block.attn(block.attn.project(block.norm1(tokens.x)))
    expected = flow(block.peft_mlp, half) + block.mlp(block.norm2(half))
    torch.testing.assert_close(block(tokens).x, expected, rtol=1e-4, atol=1e-5)
