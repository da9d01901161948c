"""The other PEFT modules, channel pruning and distillation against naive loops, the papers' figures and their own promises."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import baselines
import pyra
import tasks
from small import R, TINY, batch, numbers, on_meta, one_thread, randomise, tiny, trained  # noqa: F401 (one_thread is a fixture)

PEFTS = {
    "adapter": lambda model: baselines.add_adapter(model, dim=4),
    "convpass": lambda model: baselines.add_convpass(model, dim=4, scale=0.5),
    "fact_tt": lambda model: baselines.add_fact(model, "tt", rank=4, scale=5),
    "fact_tk": lambda model: baselines.add_fact(model, "tk", rank=4, scale=10),
    "snf": lambda model: baselines.add_snf(model),
    "snf_planar": lambda model: baselines.add_snf(model, flows=2, affine=False),
}
REDUCERS = {"plain": lambda model: model, "tome": lambda model: pyra.add_tome(model, R), "pyra": lambda model: pyra.add_pyra(model, R)}
every_peft = pytest.mark.parametrize("peft", PEFTS)
every_reducer = pytest.mark.parametrize("reducer", REDUCERS)


# ----------------------------------------------------------------------------------------------------------------------
# Helpers


def adapted(peft, reducer="pyra", seed=0, **kwargs):
    """A small ViT with a PEFT and a reducer, in eval mode, every parameter random."""
    return randomise(REDUCERS[reducer](PEFTS[peft](pyra.VisionTransformer(**{**TINY, **kwargs}))), seed).eval()


def peft_parameters(model):
    return sum(p.numel() for name, p in model.named_parameters() if "peft_" in name)


def macs(model):
    """What PyTorch counts for one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(batch(1))
    return counter.get_total_flops() // 2


def phi(z):
    return z / (1 + (-1.702 * z).exp())


# ----------------------------------------------------------------------------------------------------------------------
# What all of them promise


@pytest.mark.parametrize("name, add, expected", [
    ("vit_base_patch16_224", baselines.add_adapter, 156_768),
    ("vit_large_patch16_224", lambda model: baselines.add_adapter(model, dim=12), 614_688),
    ("vit_small_patch16_224", lambda model: baselines.add_adapter(model, dim=4), 41_520),
    ("vit_base_patch16_224", baselines.add_convpass, 327_552),
    ("vit_base_patch16_224", baselines.add_fact, 61_440),
    ("vit_base_patch16_224", lambda model: baselines.add_fact(model, "tt", rank=4), 8_448),
    ("vit_base_patch16_224", lambda model: baselines.add_fact(model, "tk", rank=32), 86_528),
    ("vit_base_patch16_224", lambda model: baselines.add_fact(model, "tk", rank=8), 13_952),
    ("vit_base_patch16_224", baselines.add_snf, 36_864),
    ("vit_base_patch16_224", lambda model: baselines.add_snf(model, flows=1, affine=False), 36_888),
    ("vit_base_patch16_224", lambda model: baselines.add_snf(model, flows=16), 627_072),
])
def test_parameters_of_the_papers(name, add, expected):
    model = add(on_meta(name, num_classes=0))
    assert sum(p.numel() for p in trained(model).values()) == expected


@every_reducer
@pytest.mark.parametrize("peft", ["convpass", "fact_tt", "fact_tk", "snf"])
def test_training_starts_at_the_pre_trained_model(peft, reducer):
    """Bit for bit."""
    torch.manual_seed(0)
    model = REDUCERS[reducer](tiny())
    logits = model(batch())
    assert torch.equal(PEFTS[peft](model)(batch()), logits)


def test_adapter_and_planar_flows_do_not_start_at_zero():
    for peft in ("adapter", "snf_planar"):
        torch.manual_seed(0)
        model = tiny()
        logits = model(batch())
        assert not torch.allclose(PEFTS[peft](model)(batch()), logits, rtol=1e-4)


@every_peft
@every_reducer
def test_order_and_freezing(peft, reducer):
    """Before or after the reducer, the same model; PEFT, generators and class head are trained, all of them, and nothing else."""
    model = randomise(PEFTS[peft](REDUCERS[reducer](pyra.VisionTransformer(**TINY, global_pool="avg")))).eval()
    other = adapted(peft, reducer, global_pool="avg")  # the last block's merging does not reach the class token
    assert trained(model).keys() == trained(other).keys()
    assert torch.equal(model(batch()), other(batch()))
    F.cross_entropy(model(batch()), torch.arange(3)).backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == ("peft_" in name or ".reducer." in name or name.startswith(("head.", "fc_norm."))), name
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name
    assert sum("peft_" in name for name in trained(model)) >= 3


@every_peft
def test_the_backbone_keeps_its_names(peft):
    plain, model = tiny(), adapted(peft)
    assert {name for name in model.state_dict() if not ("peft_" in name or ".reducer." in name)} == set(plain.state_dict())


@every_peft
def test_load_pretrained_into_an_adapted_model(tmp_path, peft):
    source, model = tiny(seed=5), adapted(peft)
    before = {name: p.clone() for name, p in trained(model).items()}
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    pyra.load_pretrained(model, tmp_path / "weights.pth")
    for name, p in model.named_parameters():
        expected = before[name] if "peft_" in name or ".reducer." in name else source.state_dict()[name]
        assert torch.equal(p, expected), name


@every_peft
@every_reducer
def test_adapter_files(tmp_path, peft, reducer):
    """A fresh model with the file gives the same logits; the file holds what was trained, once."""
    model, fresh = adapted(peft, reducer), adapted(peft, reducer)
    for p in trained(fresh).values():
        p.data.zero_()
    pyra.save_adapter(model, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors").keys() == trained(model).keys()
    assert not torch.allclose(fresh(batch()), model(batch()))
    assert torch.equal(pyra.load_adapter(fresh, tmp_path / "a.safetensors")(batch()), model(batch()))


@pytest.mark.parametrize("other", [
    lambda model: baselines.add_convpass(model, dim=5, scale=0.5),
    lambda model: baselines.add_convpass(model, dim=4, scale=5),
    lambda model: baselines.add_adapter(model, dim=4),
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
def test_one_peft_a_model(peft):
    model = adapted(peft)
    logits, names = model(batch()), list(model.state_dict())
    for add in (pyra.add_lora, *PEFTS.values()):
        with pytest.raises(ValueError, match="the model has (Adapter|Convpass|FacT|SNF) already, and takes one PEFT$"):
            add(model)
    with pytest.raises(ValueError, match="the model has LoRA already"):
        PEFTS[peft](pyra.add_lora(tiny()))
    assert list(model.state_dict()) == names and torch.equal(model(batch()), logits)


@pytest.mark.parametrize("call, message", [
    (lambda model: baselines.add_adapter(model, dim=0), "dim must be a positive integer, not 0"),
    (lambda model: baselines.add_adapter(model, dropout=1.0), "dropout must be at least 0 and less than 1, not 1.0"),
    (lambda model: baselines.add_convpass(model, dim=True), "dim must be a positive integer, not True"),
    (lambda model: baselines.add_convpass(model, scale=0), "scale must be a finite number greater than 0, not 0"),
    (lambda model: baselines.add_convpass(model, init="zero"), "init must be 'identity' or 'xavier', not 'zero'"),
    (lambda model: baselines.add_fact(model, "tucker"), "form must be 'tt' or 'tk', not 'tucker'"),
    (lambda model: baselines.add_fact(model, rank=1.5), "rank must be a positive integer, not 1.5"),
    (lambda model: baselines.add_fact(model, scale=math.inf), "scale must be a finite number greater than 0, not inf"),
    (lambda model: baselines.add_snf(model, flows=-1), "flows must be an integer of at least 0, not -1"),
    (lambda model: baselines.add_snf(model, flows=0, affine=False), "SNF without affine needs flows of at least 1"),
])
def test_refused(call, message):
    """In one sentence, before anything is touched."""
    model = tiny()
    with pytest.raises(ValueError, match=message):
        call(model)
    assert not any("peft_" in name for name in model.state_dict()) and all(p.requires_grad for p in model.parameters())
    assert all(type(block) is pyra.Block for block in model.blocks)


@every_peft
def test_dropout_and_drop_path_act_in_training_alone(peft):
    model = adapted(peft, drop_path_rate=0.3)
    assert torch.equal(model(batch()), model(batch()))
    model.train()
    assert not torch.allclose(model(batch()), model(batch()))
    for block in model.blocks:
        block.drop_path_rate = 0.0
    assert torch.equal(model(batch()), model(batch())) == peft.startswith("snf")  # SNF has no dropout


@every_peft
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


@pytest.mark.parametrize("distilled", [False, True])
@every_peft
@every_reducer
def test_peft_macs_are_what_pytorch_counts(peft, reducer, distilled):
    """But for the flows, products of vectors that PyTorch does not count, and for FacT's Sigma U, once a batch."""
    model, plain = adapted(peft, reducer, distilled=distilled), REDUCERS[reducer](tiny(distilled=distilled))
    counts = pyra.token_counts(model)
    extra = macs(model) - macs(plain)
    if peft.startswith("snf"):
        assert extra == 0
        extra = (24 if peft == "snf" else 2 * 2 * 24) * (sum(counts[:-1]) + sum(counts[1:]))
    elif peft == "fact_tt":
        extra -= 3 * (3 + 1 + 2 + 2) * 4 * 4 * 24
    elif peft == "fact_tk":
        extra -= 3 * (3 + 1 + 2 + 2) * (4 * 4 * 24 + 4 * 4 * 4)
    assert baselines.peft_macs(model) == extra
    assert pyra.count_macs(model) == pyra.count_macs(plain)


def test_peft_macs_of_vit_base():
    assert baselines.peft_macs(baselines.add_adapter(on_meta("vit_base_patch16_224"))) == 12 * 197 * 2 * 768 * 8
    assert baselines.peft_macs(baselines.add_convpass(on_meta("vit_base_patch16_224"))) == 24 * (197 * 2 * 768 * 8 + 196 * 9 * 64 + 197 * 64)
    assert baselines.peft_macs(pyra.add_lora(on_meta("vit_base_patch16_224"))) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Adapter


def test_adapter_is_the_formula():
    block, tokens = adapted("adapter").blocks[0], pyra.Tokens(numbers(2, 7, 24), None, None)
    adapter = block.peft_mlp
    m = block.mlp(block.norm2(tokens.x))
    expected = tokens.x + m + phi(m @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(block.transform(tokens).x, expected)


def test_a_dropped_sample_still_gets_the_adapters_biases():
    model = adapted("adapter", drop_path_rate=0.5).train()
    block, x = model.blocks[2], numbers(64, 7, 24)
    block.peft_mlp.dropout = 0.0
    torch.manual_seed(0)
    delta = block.transform(pyra.Tokens(x, None, None)).x - x
    adapter = block.peft_mlp
    biases = (adapter.up.weight @ phi(adapter.down.bias) + adapter.up.bias).expand(7, -1)
    dropped = [torch.allclose(d, biases, atol=1e-5) for d in delta]
    assert 16 < sum(dropped) < 48


def test_adapter_starts_as_intended():
    torch.manual_seed(0)
    adapter = baselines.add_adapter(pyra.VisionTransformer(**{**TINY, "embed_dim": 96})).blocks[1].peft_mlp
    for linear in (adapter.down, adapter.up):
        bound = math.sqrt(6 / (96 + 8))
        assert 0.9 * bound < linear.weight.abs().max() <= bound
        assert 0 < linear.bias.abs().max() < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# Convpass


def naive_convpass(bypass, x, source):
    """One image, in loops over the grid. x (n, c), source: list, for each patch the token that holds it."""
    side, n = bypass.grid, len(x)
    z = phi(x @ bypass.down.weight.T + bypass.down.bias)
    kernel, bias = bypass.conv.weight, bypass.conv.bias
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
    return bypass.scale * (phi(torch.stack(mixed)) @ bypass.up.weight.T + bypass.up.bias)


@pytest.mark.parametrize("specials", [1, 2])
@pytest.mark.parametrize("n", [None, 20, 5])
@torch.no_grad()
def test_convpass_is_the_naive_loop(n, specials):
    """Merged or not, on the grid, with each token the mean of its patches and the special ones by the centre tap."""
    bypass = adapted("convpass", distilled=specials == 2).blocks[0].peft_attn
    generator = torch.Generator().manual_seed(0)
    if n is None:
        n, where = specials + 36, [torch.arange(36) + specials] * 2
    else:  # every token holds a patch at least
        where = [torch.cat([torch.arange(n - specials), torch.randint(0, n - specials, (36 - n + specials,), generator=generator)]) for _ in range(2)]
        where = [w[torch.randperm(36, generator=generator)] + specials for w in where]
    x, where = numbers(2, n, 24), torch.stack(where)
    source = torch.cat([torch.arange(specials).expand(2, -1), where], dim=1)
    out = bypass(x, source)
    for image in range(2):
        torch.testing.assert_close(out[image], naive_convpass(bypass, x[image], where[image].tolist()), rtol=1e-4, atol=1e-5)


def test_scattering_back_is_plain_convpass_where_nothing_is_merged():
    """Bit for bit what a convolution of the reshaped patches gives."""
    bypass, x = adapted("convpass").blocks[0].peft_mlp, numbers(2, 37, 24)
    z = baselines.quick_gelu(bypass.down(x))
    patches = bypass.conv(z[:, 1:].mT.reshape(2, 4, 6, 6)).flatten(2).mT
    special = F.linear(z[:, :1], bypass.conv.weight[:, :, 1, 1], bypass.conv.bias)
    expected = bypass.scale * bypass.up(baselines.quick_gelu(torch.cat([special, patches], dim=1)))
    assert torch.equal(bypass(x, torch.arange(37).expand(2, -1)), expected)


def test_convpass_does_not_see_the_order_of_tokens():
    """Tokens permuted together with the map come out permuted."""
    bypass, x = adapted("convpass").blocks[0].peft_attn, numbers(2, 13, 24)
    generator = torch.Generator().manual_seed(1)
    source = torch.cat([torch.zeros(2, 1, dtype=torch.int64), torch.randint(1, 13, (2, 36), generator=generator)], dim=1)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(12, generator=generator)])
    torch.testing.assert_close(bypass(x[:, order], order.argsort()[source]), bypass(x, source)[:, order])


@every_reducer
def test_convpass_block(reducer):
    """Beside attention with the map before the merge, beside the MLP with the map after it; each with its norm."""
    block = adapted("convpass", reducer).blocks[0]
    tokens = pyra.Tokens(numbers(2, 37, 24), None, torch.arange(37).expand(2, -1))
    u = block.norm1(tokens.x)
    qkv = block.attn.project(u)
    half = tokens._replace(x=tokens.x + block.attn(qkv) + block.peft_attn(u, tokens.source))
    half = half if block.reducer is None else block.reducer(half, qkv)
    u = block.norm2(half.x)
    expected = half.x + block.mlp(u) + block.peft_mlp(u, half.source)
    out = block(tokens)
    torch.testing.assert_close(out.x, expected)
    assert out.x.shape[1] == (37 if reducer == "plain" else 27) and torch.equal(out.source, half.source)


def test_convpass_drops_its_paths_by_draws_of_its_own():
    """In some samples the MLP stays and the bypass goes, in others it is the other way round."""
    block = adapted("convpass", drop_path_rate=0.5).blocks[2].train()
    block.peft_mlp.dropout = 0.0
    tokens = pyra.Tokens(numbers(1, 37, 24).expand(64, -1, -1), None, torch.arange(37).expand(64, -1))
    u = block.norm2(tokens.x[:1])
    branches = torch.stack([2 * block.mlp(u)[0], 2 * block.peft_mlp(u, tokens.source[:1])[0]]).detach()
    torch.manual_seed(0)
    found = set()
    for delta in (block.transform(tokens).x - tokens.x).detach():
        found |= {(a, b) for a in (0, 1) for b in (0, 1) if torch.allclose(delta, a * branches[0] + b * branches[1], atol=1e-4)}
    assert found == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize("init", ["identity", "xavier"])
def test_convpass_starts_as_intended(init):
    torch.manual_seed(0)
    bypass = baselines.add_convpass(pyra.VisionTransformer(**TINY), init=init).blocks[0].peft_attn
    x = numbers(2, 8, 6, 6)
    assert torch.equal(bypass.conv(x), x) == (init == "identity")
    bound = math.sqrt(6 / (24 + 8))
    assert not bypass.up.weight.any() and 0.9 * bound < bypass.down.weight.abs().max() <= bound
    assert not any(part.bias.any() for part in (bypass.down, bypass.conv, bypass.up))


def test_convpass_settings():
    assert baselines.CONVPASS.keys() == tasks.VTAB.keys()
    assert baselines.convpass_settings("svhn") == dict(scale=100.0, init="xavier")
    model = tiny()
    baselines.add_convpass(model, **baselines.convpass_settings("sprites_count"))
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


@pytest.mark.parametrize("mlp_ratio, pieces", [(2.0, 2), (4.0, 4)])
@pytest.mark.parametrize("form", ["tt", "tk"])
def test_fact_is_dense_products(form, mlp_ratio, pieces):
    """Merged, every weight is the frozen one plus s V Sigma U in each c x c piece; nothing else changes, nothing stays."""
    model = randomise(baselines.add_fact(tiny(mlp_ratio=mlp_ratio), form, rank=4, scale=10))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    updates = naive_updates(model, form, 4, 10, 3, pieces)
    after = dict(baselines.merge_fact(model).named_parameters())
    assert after.keys() == tiny().state_dict().keys()
    for name, p in after.items():
        if name in updates:
            assert updates[name].abs().max() > 0.1
            torch.testing.assert_close(p, (before[name] + updates[name]).float(), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("heads, units", [(3, 48), (2, 35), (1, 20)])
@pytest.mark.parametrize("form", ["tt", "tk"])
@every_reducer
def test_merged_fact_gives_the_same_logits(form, reducer, heads, units):
    """In pruned models too, whose pieces are narrower than c or uneven."""
    model = baselines.prune_channels(tiny(), [(heads, units)] * 3)
    model = randomise(REDUCERS[reducer](baselines.add_fact(model, form, rank=4, scale=5))).eval()
    plain = randomise(REDUCERS[reducer](baselines.prune_channels(tiny(), [(heads, units)] * 3)))
    logits = model(batch())
    assert not torch.allclose(plain(batch()), logits, rtol=1e-2)
    baselines.merge_fact(model)
    torch.testing.assert_close(model(batch()), logits, rtol=1e-5, atol=1e-5)
    assert model.peft is None and baselines.peft_macs(model) == 0


def test_merged_fact_can_not_be_saved_and_can_be_adapted_again(tmp_path):
    model = baselines.merge_fact(adapted("fact_tt"))
    with pytest.raises(ValueError, match="FacT was folded into the backbone: save the adapter before merge_fact"):
        pyra.save_adapter(model, tmp_path / "a.safetensors")
    pyra.save_adapter(pyra.add_lora(model, rank=2), tmp_path / "a.safetensors")


def test_merge_fact_leaves_other_models_alone():
    model = adapted("adapter")
    names, logits = list(model.state_dict()), model(batch())
    assert list(baselines.merge_fact(model).state_dict()) == names and torch.equal(model(batch()), logits)


def test_fact_starts_as_intended():
    """V is zero; U and TT's cores start as nn.Linear's weights, TK's core and the whole of its P as Xavier has it."""
    torch.manual_seed(0)
    tt = dict(baselines.add_fact(tiny(mlp_ratio=4.0), "tt", rank=8).named_parameters())
    tk = dict(baselines.add_fact(tiny(mlp_ratio=4.0), "tk", rank=8).named_parameters())
    p = torch.cat([p.flatten() for name, p in tk.items() if "peft_p" in name])
    for values, bound in ((tt["peft_u"], 24**-0.5), (tt["blocks.0.attn.qkv.peft_core"], 8**-0.5), (tt["blocks.0.mlp.fc2.peft_core"], 32**-0.5),
                          (tk["peft_core"], math.sqrt(3) / 8), (p, math.sqrt(6 / (8 + 36)))):
        assert 0.95 * bound < values.abs().max() <= bound
    assert not tt["peft_v"].any() and not tk["peft_v"].any()


def test_fact_settings():
    """The task's ranks make the paper's 0.069 M on average for TK."""
    assert baselines.FACT.keys() == tasks.VTAB.keys()
    size = {rank: peft_parameters(baselines.add_fact(on_meta("vit_base_patch16_224"), "tk", rank)) for rank in (16, 32)}
    ranks = [baselines.fact_settings(task, "tk")["rank"] for task in tasks.VTAB]
    assert round(sum(size[rank] for rank in ranks) / 19) == 68_985
    assert baselines.fact_settings("dtd") == dict(form="tt", rank=8, scale=0.01)
    assert baselines.fact_settings("digits", "tk") == dict(form="tk", rank=32, scale=1.0)


# ----------------------------------------------------------------------------------------------------------------------
# SNF


@pytest.mark.parametrize("flows, affine", [(0, True), (1, False), (3, True)])
def test_snf_is_the_formula(flows, affine):
    """On both shortcuts, F(x) + branch(x): mu + e^lambda x, then x + a tanh(w x + b) for each planar flow."""
    block = randomise(baselines.add_snf(tiny(), flows, affine)).blocks[1]

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


# ----------------------------------------------------------------------------------------------------------------------
# Channel pruning

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
    pruned = baselines.prune_channels(copy.deepcopy(model), KEEP)
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
    assert baselines.prune_channels(model, [(3, 48)] * 3) is model
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
    pruned = baselines.prune_channels(copy.deepcopy(model), [(2, 2), (3, 48), (3, 48)])
    assert kept_units(model, pruned, 0) == ([0, 1], [5, 40])
    assert kept_units(model, baselines.prune_channels(copy.deepcopy(model), [(1, 48)] * 3), 0)[0] == [1]


@every_reducer
def test_macs_of_a_pruned_model(reducer):
    """By formula in the widths that are left; by PyTorch's count the same but for matching and modulation."""
    model = REDUCERS[reducer](baselines.prune_channels(tiny(), KEEP))
    counts = pyra.token_counts(model)
    expected = 36 * 24 * 48 + 24 * 5
    for (heads, units), n, m in zip(KEEP, counts, counts[1:]):
        expected += 4 * n * 24 * 8 * heads + 2 * n**2 * 8 * heads + 2 * m * 24 * units
    assert pyra.count_macs(model) == expected
    matching = sum((n - n // 2) * (n // 2) * 8 for n in counts[:-1]) if reducer != "plain" else 0
    modulation = sum(2 * r * 24 for r in R) if reducer == "pyra" else 0
    assert macs(model) == expected + matching + modulation


@pytest.mark.parametrize("name, ratio", [("vit_base_patch16_224", 2.0), ("vit_base_patch16_224", 3.46), ("vit_large_patch16_224", 3.44),
                                         ("vit_nano_patch4_56", 1.2), ("vit_nano_patch4_56", 4)])
def test_random_configurations_meet_the_budget(name, ratio):
    model = on_meta(name, num_classes=100)
    full = pyra.count_macs(model)
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(10):
        keep = baselines.random_keep(model, ratio, generator)
        pruned = baselines.prune_channels(copy.deepcopy(model), keep)
        assert abs(pyra.count_macs(pruned) * ratio / full - 1) <= 0.01
        seen.add(tuple(keep))
    assert len(seen) == 10
    assert len({units for _, units in keep}) > 1
    assert len({heads for heads, _ in keep}) > 1 or name == "vit_nano_patch4_56"  # of its 3 heads 1 may be left everywhere


@pytest.mark.parametrize("reducer", ["plain", "tome"])
def test_search_returns_the_best_candidate(reducer):
    """What to keep within budget, of least score; the model keeps the weights that it had before it was scored."""
    model = REDUCERS[reducer](tiny(mlp_ratio=4.0))
    before, logits, scores = copy.deepcopy(model.state_dict()), model(batch()), []

    def score(pruned):
        scores.append((pruned(batch()) - logits).square().mean())
        pruned.head.weight.data.zero_()  # what scoring does to its copy is its own affair
        return scores[-1]

    keep = baselines.search_pruning(model, 2.0, score, candidates=6, seed=3)
    best = baselines.prune_channels(copy.deepcopy(model), keep)
    assert len(scores) == 6 == len({value.item() for value in scores})
    torch.testing.assert_close((best(batch()) - logits).square().mean(), min(scores))
    assert abs(pyra.count_macs(best) * 2 / pyra.count_macs(model) - 1) <= 0.01
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert baselines.search_pruning(model, 2.0, score, candidates=6, seed=3) == keep


def test_search_passes_over_nan():
    model, scores = tiny(mlp_ratio=4.0), iter([math.nan, 2.0, 3.0, math.nan])
    seen = []
    keep = baselines.search_pruning(model, 2.0, lambda pruned: seen.append(pruned) or next(scores), candidates=4)
    best = baselines.prune_channels(copy.deepcopy(model), keep)
    assert torch.equal(best(batch()), seen[1](batch())) and not torch.equal(best(batch()), seen[0](batch()))


def test_probe_loss_tells_knowledge_from_noise():
    """Features that hold the label lose little, noise more than the uniform answer; scaling and shifting them changes nothing."""
    labels, held_out = torch.arange(60) % 4, torch.arange(40) % 4
    told = [F.one_hot(y, 4) + 0.1 * numbers(len(y), 4, seed=i) for i, y in enumerate((labels, held_out))]
    noise = [numbers(len(y), 4, seed=i) for i, y in enumerate((labels, held_out))]
    loss = baselines.probe_loss(told[0], labels, told[1], held_out, 4)
    assert loss < 0.2 < 1.3 < baselines.probe_loss(noise[0], labels, noise[1], held_out, 4)
    assert baselines.probe_loss(5 * told[0] - 3, labels, 5 * told[1] - 3, held_out, 4) == pytest.approx(loss, rel=1e-3)


def test_probe_loss_is_of_the_best_head():
    """Against scikit-learn's logistic regression on the same standardised features; its C is 1 / (n weight_decay)."""
    from sklearn.linear_model import LogisticRegression

    x, y, held_out, held_out_labels = numbers(60, 5), torch.arange(60) % 3, numbers(30, 5, seed=1), torch.arange(30) % 3
    mean, std = x.mean(dim=0), x.std(dim=0)
    head = LogisticRegression(C=1 / (60 * 0.01), tol=1e-8, max_iter=1000).fit((x - mean) / std, y)
    expected = F.nll_loss(torch.from_numpy(head.predict_log_proba((held_out - mean) / std)), held_out_labels).item()
    assert baselines.probe_loss(x, y, held_out, held_out_labels, 3, weight_decay=0.01) == pytest.approx(expected, rel=1e-3)


@every_peft
@every_reducer
def test_pruned_models_are_adapted(tmp_path, peft, reducer):
    """Any PEFT, and its file fits a model that was pruned alike, and no other."""
    def build(keep):
        return randomise(REDUCERS[reducer](PEFTS[peft](baselines.prune_channels(pyra.VisionTransformer(**TINY), keep)))).eval()

    model = build(KEEP)
    pyra.save_adapter(model, tmp_path / "a.safetensors")
    fresh = build(KEEP)
    for p in trained(fresh).values():
        p.data.zero_()
    assert torch.equal(pyra.load_adapter(fresh, tmp_path / "a.safetensors")(batch()), model(batch()))
    with pytest.raises(ValueError, match="another backbone"):
        pyra.load_adapter(build([(3, 20), (1, 48), (2, 2)]), tmp_path / "a.safetensors")


def test_pruned_models_take_lora():
    model = randomise(pyra.add_pyra(pyra.add_lora(baselines.prune_channels(tiny(), KEEP), rank=2), R)).eval()
    assert [block.attn.qkv.lora_b.shape for block in model.blocks] == [(72, 2), (24, 2), (48, 2)]
    logits = model(batch())
    torch.testing.assert_close(pyra.merge_lora(model)(batch()), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call, message", [
    (lambda model: baselines.prune_channels(model, [(1, 1)] * 2), r"keep must be a list with one \(heads, units\) for each of the 3 blocks"),
    (lambda model: baselines.prune_channels(model, [(1, 1), (1, 1), (0, 1)]), r"block 2: .* must be integers from \(1, 1\) to \(3, 48\), not \(0, 1\)"),
    (lambda model: baselines.prune_channels(model, [(1, 1), (1, 49), (1, 1)]), r"block 1: .* not \(1, 49\)"),
    (lambda model: baselines.prune_channels(model, [(1, 1.0)] * 3), r"block 0: .* not \(1, 1.0\)"),
    (lambda model: baselines.prune_channels(model, [1, 1, 1]), r"block 0: .* not 1"),
    (lambda model: baselines.prune_channels(pyra.add_lora(model), KEEP), "prune first"),
    (lambda model: baselines.search_pruning(PEFTS["adapter"](model), 2.0, id), "prune first"),
    (lambda model: baselines.search_pruning(model, 1, id), "flops_ratio must be a finite number greater than 1, not 1"),
    (lambda model: baselines.search_pruning(model, 2.0, id, candidates=0), "candidates must be a positive integer, not 0"),
    (lambda model: baselines.search_pruning(model, 50, id), r"no random pruning of this model meets 1/50 of its MACs within 1 %"),
    (lambda model: baselines.search_pruning(model, 2.0, lambda pruned: math.nan, candidates=2), "score gave no finite number for any of the 2 candidates"),
])
def test_pruning_refused(call, message):
    model = tiny()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


# ----------------------------------------------------------------------------------------------------------------------
# Distillation


@pytest.mark.parametrize("weight, temperature", [(1.0, 1.0), (0.3, 4.0), (2.0, 0.5)])
def test_distillation_loss_is_the_formula(weight, temperature):
    student, teacher, labels = numbers(4, 5, seed=1), 3 * numbers(4, 5, seed=2), [0, 3, 4, 3]

    def softmax(z, t):
        e = [math.exp(value / t) for value in z]
        return [value / sum(e) for value in e]

    expected = 0
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels):
        p, q = softmax(t, temperature), softmax(s, temperature)
        kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))
        expected += (-math.log(softmax(s, 1)[y]) + weight * temperature**2 * kl) / 4
    loss = baselines.distillation_loss(student, teacher, torch.tensor(labels), weight, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_teacher_that_agrees_adds_nothing():
    """Equal logits, or logits that differ by a constant: cross-entropy alone is left."""
    student, labels = numbers(4, 5), torch.arange(4)
    for teacher in (student, student + 7):
        loss = baselines.distillation_loss(student, teacher, labels, weight=100.0, temperature=3.0)
        torch.testing.assert_close(loss, F.cross_entropy(student, labels), rtol=1e-4, atol=1e-4)


def test_distillation_teaches_the_student_alone():
    student, teacher, labels = numbers(4, 5).requires_grad_(), numbers(4, 5, seed=1).requires_grad_(), torch.arange(4)
    baselines.distillation_loss(student, teacher, labels).backward()
    assert teacher.grad is None
    expected = (2 * student.softmax(1) - F.one_hot(labels, 5) - teacher.softmax(1)) / 4
    torch.testing.assert_close(student.grad, expected.detach())


@pytest.mark.parametrize("call, message", [
    (lambda z, y: baselines.distillation_loss(z, z[:, :4], y), r"must agree on the logits' shape, not \(4, 5\) and \(4, 4\)"),
    (lambda z, y: baselines.distillation_loss(z, z, y, temperature=0), "temperature must be greater than 0, not 0"),
])
def test_distillation_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(numbers(4, 5), torch.arange(4))
