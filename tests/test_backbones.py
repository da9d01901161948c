"""Backbones that came after ViT and DeiT: DINOv2, DINOv3, DeiT III, CLIP, SigLIP, by timm's names, files and modules, and all that is done to them."""

import cmath
import copy
import math
import os
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import ONE_STEP, R, TINY, VARIANTS, batch, numbers, randomise, rows, trained, variant

import pyra
from pyra_lab import Config, backbones, budget, load_run, pruning, run
from pyra_lab.methods import METHODS, PEFTS


def miss(found, expected):
    """The largest difference, relative to the largest entry."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ----------------------------------------------------------------------------------------------------------------------
# timm's models


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="timm, the oracle, isn't installed")


@torch.no_grad()
def loud(theirs):
    """A timm model in eval mode with random parameters, so large that each of them matters."""
    randomise(theirs)
    for name, p in theirs.named_parameters():
        if re.search(r"gamma(_\d)?$", name):
            p.copy_(torch.rand(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return theirs.eval()


SMALL = dict(embed_dim=48, num_heads=3, depth=2, num_classes=5)
FAMILIES = [  # timm's name, the variant that is left when all extras are folded
    ("vit_small_patch14_dinov2", {}), ("vit_small_patch14_reg4_dinov2", dict(reg_tokens=4)), ("vit_giant_patch14_dinov2", dict(act="swiglu")),
    ("deit3_small_patch16_224", {}), ("deit_small_distilled_patch16_224", {}), ("vit_base_patch16_224_miil", {}),
    ("vit_base_patch16_clip_224", dict(pre_norm=True, eps=1e-5)), ("vit_base_patch16_clip_quickgelu_224", dict(pre_norm=True, eps=1e-5, act="quick_gelu")),
    ("vit_base_patch16_siglip_224", dict(class_token=False)), ("vit_base_patch16_siglip_gap_224", dict(class_token=False, fc_norm=False)),
    ("vit_so400m_patch16_siglip_256", dict(class_token=False, act="gelu_tanh")),
    ("vit_small_patch16_dinov3", dict(reg_tokens=4, fc_norm=False, eps=1e-5, rope=True)),
    ("vit_small_plus_patch16_dinov3", dict(reg_tokens=4, fc_norm=False, eps=1e-5, act="swiglu", rope=True)),
    ("vit_base_patch16_dinov3_qkvb", dict(reg_tokens=4, fc_norm=False, eps=1e-5, rope=True)),
]


@rows("name, left", FAMILIES)
@torch.no_grad()
def test_each_family_gives_timms_logits(timm, name, left):
    """From the module, and from its state dict into the model of that name."""
    size = 4 * int(re.search(r"patch(\d+)", name)[1])
    theirs, x = loud(timm.create_model(name, img_size=size, **SMALL)), batch(img_size=size)
    expected = theirs(x)
    assert expected.std() > 0.3
    for ours in (pyra.from_timm(theirs), pyra.load_pretrained(pyra.create_model(name, img_size=size, **SMALL), theirs.state_dict())):
        ours.eval()
        assert miss(sum(ours.forward_heads(x)) / 2 if ours.distilled else ours(x), expected) < 2e-5
        assert ours.variant == left and ours.layer_scale == any(re.search("gamma", key) for key in theirs.state_dict())
        assert not theirs.training and all(p.requires_grad for p in ours.parameters())


@rows("kwargs", [dict(img_size=(24, 40)), dict(global_pool="avg", reg_tokens=3), dict(class_token=False, reg_tokens=2, global_pool="avg", fc_norm=False),
                 dict(no_embed_class=True, init_values=0.5, qkv_bias=False), dict(num_classes=0), dict(mlp_ratio=3)])
@torch.no_grad()
def test_from_timm_takes_any_plain_vit(timm, kwargs):
    """Not square too, in training mode and in half precision; a head that was set to zero is no difference."""
    theirs = loud(timm.models.VisionTransformer(**{**TINY, "patch_size": 8, "img_size": 32, **kwargs}))
    x = numbers(2, 3, *theirs.patch_embed.img_size)
    assert miss(pyra.from_timm(theirs)(x), theirs(x)) < 2e-5
    ours = pyra.from_timm(nn.DataParallel(theirs.bfloat16().train()))
    assert ours.training and theirs.training and ours.pos_embed.dtype == torch.bfloat16
    if theirs.num_classes:
        nn.init.zeros_(theirs.head.weight), nn.init.zeros_(theirs.head.bias)
        assert not pyra.from_timm(theirs.float()).head.weight.any()


def plain(timm, change=lambda model: None, **kwargs):
    theirs = loud(timm.models.VisionTransformer(**{**TINY, **kwargs}))
    change(theirs)
    return theirs


def patch_activation(model):
    """In the last block alone, and with a head whose bias drowns all else."""
    model.blocks[-1].mlp.act = nn.ReLU()
    model.head.bias.data.fill_(1e4)


@rows("build, reason", [
    (lambda timm: timm.create_model("beit_base_patch16_224", depth=1, embed_dim=48, num_heads=3), "Beit can't be converted: it looks like BEiT or Swin"),
    (lambda timm: timm.create_model("swin_tiny_patch4_window7_224"), "it looks like BEiT or Swin, with relative positions"),
    (lambda timm: timm.create_model("vit_tiny_r_s16_p8_224", depth=1), "it looks like a convolutional network|patch_embed.proj.weight"),
    (lambda timm: timm.create_model("resnet18"), "ResNet can't be converted: it looks like a convolutional network"),
    (lambda timm: timm.create_model("eva02_base_patch14_224", depth=1), "Eva can't be converted: it looks like a ViT with norms or rotations"),
    (lambda timm: plain(timm, qk_norm=True), "it looks like a ViT with norms or rotations"),
    (lambda timm: timm.create_model("vit_small_patch16_rope_mixed_224", depth=1), "it looks like a ViT with norms or rotations"),
    (lambda timm: plain(timm, global_pool="max"), "global_pool must be 'token', 'avg' or 'map', not 'max'"),
    (lambda timm: plain(timm, act_layer=nn.ReLU), "VisionTransformer can't be converted"),
    (lambda timm: timm.create_model("vit_so400m_patch14_siglip_384", depth=1), r"img_size \(384, 384\) is not a multiple of patch_size 14"),
    (lambda timm: plain(timm, patch_activation), "its forward pass differs"),
    (lambda timm: plain(timm, pool_include_prefix=True, global_pool="avg"), "its forward pass differs"),
    (lambda timm: plain(timm, lambda model: model.blocks[0].register_forward_hook(lambda block, given, x: 2 * x)), "its forward pass differs"),
    # As timm initialises them, with weights so small that logits hardly tell
    (lambda timm: timm.create_model("vit_small_patch16_rope_224", depth=1), "can't be converted"),
    (lambda timm: timm.create_model("eva02_tiny_patch14_224", depth=1), "can't be converted"),
    (lambda timm: timm.create_model("vit_base_patch16_rpn_224", depth=1), "can't be converted"),
    (lambda timm: "vit_base_patch16_dinov3", "from_timm|str"), (lambda timm: nn.Linear(2, 2), "Linear can't be converted: it is no plain ViT"),
])
def test_from_timm_refuses_all_else_with_the_reason(timm, build, reason):
    """Nothing odd in silence."""
    with pytest.raises(ValueError, match=reason) as error:
        pyra.from_timm(build(timm))
    assert "\n" not in str(error.value)


def test_names_say_what_timms_do(timm):
    """Whatever name is taken gives the shapes, activation, eps, pooling, heads and image size of timm's, and most of its plain ViTs are taken."""
    taken = []
    for name in timm.list_models():
        try:
            pyra.read_name(name)
            taken.append(name)
        except ValueError:
            assert not re.match(r"vit_(small|base|large)_patch\d+(_reg4)?_(\d+|clip_\d+|siglip_\d+|dinov[23])$|deit", name), name
    assert len(taken) > 90
    unlike = set(re.findall(r"\S+", "vit_so400m_patch14_siglip_384 vit_so400m_patch14_siglip_gap_384"))  # 384 pixels are 27.4 patches
    chosen = [name for name in taken if re.search("gap|siglip|so400m|giant|dinov3|huge", name)][::3] + taken[::5]
    for name in dict.fromkeys([name for name in chosen if name not in unlike]):
        with torch.device("meta"):
            theirs, ours = (library.create_model(name, depth=1, num_classes=7) for library in (timm, pyra))
        block, act = theirs.blocks[0], dict(GELU="gelu", GELUTanh="gelu_tanh", QuickGELU="quick_gelu", SiLU="swiglu")[type(theirs.blocks[0].mlp.act).__name__]
        own = ours.blocks[0]
        assert (own.mlp.act, own.norm1.eps, own.attn.num_heads, ours.global_pool) == (act, block.norm1.eps, block.attn.num_heads, theirs.global_pool), name
        assert tuple(side * ours.patch_size for side in ours.grid) == theirs.patch_embed.img_size and ours.specials == theirs.num_prefix_tokens, name
        shapes = {key: p.shape for key, p in theirs.state_dict().items()}
        for key, p in ours.state_dict().items():  # but what is rewritten at load
            folded = key in ("pos_embed", "patch_embed.proj.bias") or key.endswith("qkv.bias") or ".mlp.fc1." in key and act == "swiglu"
            assert folded or shapes[key] == p.shape, (name, key)
    for name in ("vit_base_r50_s16_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224", "eva02_base_patch14_224", "vit_base"):
        with pytest.raises(ValueError, match=f"no model is called '{name}': known are timm's names of plain ViTs"):
            pyra.create_model(name)


# ----------------------------------------------------------------------------------------------------------------------
# Merging


@rows("family, method", [(family, method) for family in VARIANTS for method in ("tome", "pyra")])
@torch.no_grad()
def test_merging_keeps_special_tokens_sizes_and_sources(family, method):
    """In every block: special tokens in front and alone, and as many patches as there were; without pairs to merge it is the plain model, bit for bit."""
    model = variant(family, method)
    k = model.specials
    for depth in range(1, 4):
        x, size, source = model.forward_tokens(batch(), depth)
        assert x.shape[1] == pyra.token_counts(model)[depth] == 36 + k - sum(R[:depth])
        assert (size[:, :k] == 1).all() and (source[:, :k] == torch.arange(k)).all() and (source[:, k:] >= k).all()
        assert all(torch.equal(held.bincount(minlength=x.shape[1]).float(), each[:, 0]) for held, each in zip(source, size))
    plain = variant(family)
    first, same = (each.forward_tokens(batch(), 1).x[:, :k] for each in (model, plain))
    torch.testing.assert_close(first, same)  # what merges in a block is seen by its special tokens in the next one only
    assert torch.equal(pyra.add_tome(variant(family), 0)(batch()), plain(batch())) and miss(model(batch()), plain(batch())) > 1e-3


def naive_rotation(x, grid, held, specials):
    """RoPE in loops: x (n, d) of one image's head, held: for each token the indices of the input's tokens. Complex numbers, place by place."""
    height, width = grid
    turned, quarter = x.clone(), x.shape[1] // 4
    for token, patches in enumerate(held):
        if token < specials:
            continue
        centres = [((i - specials) // width, (i - specials) % width) for i in patches]
        for j in range(2 * quarter):
            axis, period = j // quarter, 100 ** (2 * (j % quarter) / (2 * quarter))
            angles = [2 * math.pi * (2 * (centre[axis] + 0.5) / (height, width)[axis] - 1) / period for centre in centres]
            value = complex(x[token, j], x[token, j + 2 * quarter]) * sum(cmath.exp(1j * angle) for angle in angles) / len(angles)
            turned[token, j], turned[token, j + 2 * quarter] = value.real, value.imag
    return turned


@torch.no_grad()
def test_a_merged_token_turns_by_the_mean_of_its_patches():
    """On a grid that isn't square; special tokens and lost patches (source -1) turn nothing, and what is compared is the key before."""
    model = variant("dinov3", "tome", img_size=(16, 24))
    tokens = model.forward_tokens(numbers(2, 3, 16, 24), 2)
    source = tokens.source.clone()
    source[1, 9] = -1
    qkv = model.blocks[2].attn.project(model.blocks[2].norm1(tokens.x))
    turned = model.blocks[2].rope(qkv, source)
    for image in range(2):
        held = [(source[image] == token).nonzero().flatten().tolist() for token in range(tokens.x.shape[1])]
        assert max(map(len, held)) > 1
        for head in range(3):
            for before, after in ((qkv.q, turned.q), (qkv.k, turned.k)):
                expected = naive_rotation(before[image, head], (4, 6), [patches or [5] for patches in held], 5)
                alive = torch.tensor([bool(patches) for patches in held])
                torch.testing.assert_close(after[image, head][alive], expected[alive], rtol=1e-4, atol=1e-5)
    assert turned.k.isfinite().all() and torch.equal(turned.v, qkv.v) and torch.equal(turned.metric(), qkv.k.mean(dim=1))
    assert all(torch.equal(a, b) for a, b in zip(model.blocks[2].reducer.match(turned), model.blocks[2].reducer.match(qkv)))


@torch.no_grad()
def test_attention_pool_counts_a_token_as_often_as_its_size():
    """Size k is the same as k copies, and 0 as none; a loop over heads says what attention is."""
    pool, x = variant("siglip").attn_pool, numbers(2, 5, 24)
    size = torch.tensor([1.0, 3, 0, 2, 1]).view(1, 5, 1).expand(2, -1, -1)
    copies = x[:, [0, 1, 1, 1, 3, 3, 4]]
    assert miss(pool(x, size), pool(copies, None)) < 1e-5 and miss(pool(x, None), pool(x, size)) > 1e-2
    q, (k, v) = F.linear(pool.latent[0, 0], pool.q.weight, pool.q.bias), F.linear(copies, pool.kv.weight, pool.kv.bias).chunk(2, dim=-1)
    heads = []
    for part in (slice(0, 8), slice(8, 16), slice(16, 24)):
        weight = ((q[part] * k[..., part]).sum(-1) / math.sqrt(8)).softmax(-1)  # (b, n)
        heads.append((weight[..., None] * v[..., part]).sum(1))
    pooled = pool.proj(torch.cat(heads, dim=-1))
    assert miss(pool(x, size), pooled + pool.mlp.fc2(F.gelu(pool.mlp.fc1(pool.norm(pooled)), approximate="tanh"))) < 1e-5


@rows("family, kwargs", [("dinov3", dict(depth=2, r=[6, 4])), ("siglip", dict(depth=1, r=[6]))])
def test_training_in_bf16_and_in_one_graph(family, kwargs):
    """Autocast and a model held in bf16 are near float32; torch.compile finds no graph break and gives the same gradients."""
    torch.compiler.reset()
    model = variant(family, "pyra", lora=True, **kwargs)
    logits = model(batch())
    logits.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in trained(model).items()}
    compiled = torch.compile(model, fullgraph=True, backend="eager")(batch())
    model.zero_grad()
    compiled.square().sum().backward()
    assert miss(compiled, logits) < 1e-5
    for name, p in trained(model).items():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        model = variant(family, "pyra")
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model.forward_tokens(batch())
            assert tokens.size.dtype == torch.float32 and (tokens.size.sum((1, 2)) == 36 + model.specials).all() and model(batch()).isfinite().all()
        plain = variant(family)
        assert miss(copy.deepcopy(plain).bfloat16()(batch().bfloat16()).float(), plain(batch())) < 0.05


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def small_backbones():
    """Configs may name two small families, with special tokens and RoPE, and without any."""
    with pytest.MonkeyPatch.context() as patch:
        for name, more in (("dinov3", dict(act="gelu")), ("siglip", {})):
            patch.setitem(pyra.SIZES, f"tests_{name}", {k: v for k, v in {**TINY, **VARIANTS[name], **more}.items() if k != "num_classes"})
            patch.setitem(backbones.BACKBONES, f"tests_{name}", dict(weights="none", norm="half", lora_rank=4, batch_size=8))
            patch.setitem(backbones.MODULATION_LRS, f"tests_{name}", [1e-4])
        yield


@pytest.mark.parametrize("family", ["dinov3", "siglip"])
def test_every_method_and_peft_runs(family, small_backbones, task, tmp_path):
    """Trains, evaluates, meets its operations and comes back from its adapter; with LoRA on other maps and with another image size too."""
    for method, peft in [(method, "lora") for method in METHODS] + [("pyra", peft) for peft in PEFTS if peft != "lora"]:
        more = dict(img_size=16, rate=[4, 3, 2]) if method == "tome" else {}
        c = Config(**{**ONE_STEP, **more, "backbone": f"tests_{family}", "task": task, "method": method, "peft": peft, "peft_dim": 4,
                      "lora_targets": "qkv,fc2", "lora_alpha": 8.0})
        result = run(c, tmp_path, progress=False)
        model = load_run(result)
        assert 0 <= result.metrics["accuracy"] <= 1 and result.token_counts[0] == model.num_patches + model.specials, (method, peft)
        assert model.num_patches == (16 if more else 36) and model.specials == (5 if family == "dinov3" else 0)
        if method != "plain" and peft == "lora":
            assert result.macs == pytest.approx(budget.target_macs(c, backbones.create_backbone(c, 3)), rel=0.1), method


def test_what_a_family_is_told():
    """Pruning knows no SwiGLU; what full fine-tuning means where LayerScale is folded in."""
    model = variant("dinov2")
    model.layer_scale = True
    with pytest.warns(UserWarning, match="LayerScale is folded into attn.proj and mlp.fc2: full fine-tuning trains the products"):
        assert not [name for name, p in PEFTS["full"].add(model, None).named_parameters() if not p.requires_grad]
    with pytest.raises(ValueError, match="pruning is for MLPs of two maps, and SwiGLU has three"):
        pruning.prune_channels(variant("dinov3"), [(2, 20)] * 3)


@rows("name, img_size", [("vit_small_patch14_dinov2", None), ("vit_base_patch14_reg4_dinov2", None), ("vit_small_patch16_dinov3", 256),
                         ("vit_base_patch16_siglip_224", 256), ("vit_large_patch14_clip_224", None), ("deit3_base_patch16_224", 384)])
def test_low_and_high_are_ratios_of_operations_for_any_number_of_patches(name, img_size):
    """2.002 and 3.463, those of the paper's lists on its ViT-B; as MACs of this very model, special tokens and all. PYRA takes the schedule."""
    for rate, ratio in pyra.MAC_RATIOS.items():
        c = Config(backbone=name, img_size=img_size, rate=rate, method="pyra")
        with torch.device("meta"):
            model = backbones.create_backbone(c, 100)
        plain, r = pyra.count_macs(model), budget.schedule(c, model)
        assert model.num_patches != 196 and plain / pyra.count_macs(pyra.add_pyra(model, r)) == pytest.approx(ratio, rel=0.01)


def test_real_weights(timm):
    """A DINOv2 ViT-S/14 of timm's names, at 196 and 224 pixels: strict, and timm's features."""
    path = os.environ.get("PYRA_DINOV2_SMALL")
    if not path:
        pytest.skip("needs PYRA_DINOV2_SMALL, the .safetensors file of vit_small_patch14_dinov2")
    for size in (196, 224):
        given = dict(img_size=size, num_classes=0)
        theirs = timm.create_model("vit_small_patch14_dinov2", pretrained=True, pretrained_cfg_overlay=dict(file=path), **given).eval()
        ours = pyra.load_pretrained(pyra.create_model("vit_small_patch14_dinov2", **given), path).eval()
        with torch.no_grad():
            x = batch(2, img_size=size)
            assert miss(ours.norm(ours.forward_tokens(x).x), theirs.forward_features(x)) < 2e-5 and miss(ours(x), theirs(x)) < 2e-5
