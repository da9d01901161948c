"""Hugging Face peft's files, adapter_config.json and adapter_model.safetensors: LoRA and the head, to and from timm's ViTs and transformers'."""

import json
import math
import re
import warnings
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save

import pyra
from pyra_lab import files

PARTS = {"qkv": ("query", "key", "value"), "fc1": ("fc1_g", "fc1_x")}  # maps that transformers, and timm's SwiGLU, hold apart, in our rows' order
# What a config may say: these values, anything (it changes no logits, or shows in the tensors' names), and of all other fields nothing.
VALUES = {"bias": ("none",), "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica")}  # others change frozen weights
ANYTHING = """peft_type r lora_alpha lora_dropout use_rslora target_modules exclude_modules modules_to_save auto_mapping base_model_name_or_path
    inference_mode task_type layers_pattern layers_to_transform megatron_config megatron_core peft_version qalora_group_size revision eva_config""".split()


def check_like_timm(model, maps):
    """Raises ValueError where timm's model computes something else; maps: the names of those with LoRA or new weights."""
    pyra.require(not model.distilled, "timm answers with the mean of a distilled model's two heads, ours with one: take pyra.save_adapter")
    scaled = [name for name in ("proj", "fc2") if model.layer_scale and name in maps]
    pyra.require(not scaled, f"LoRA on {' and '.join(scaled)} doesn't carry over: LayerScale is in its weights here, a factor after it in timm")


@pyra.on_model
@torch.no_grad()
def save_peft(model, folder):
    """Writes LoRA and the head: peft.PeftModel.from_pretrained(timm's model of this backbone and number of classes, folder) has the same logits.

    Creates the folder. Merging isn't part of the format: a model that merges is saved as one that doesn't, with a warning. Raises ValueError for
    what the format can't hold: folded LoRA, other PEFTs, PYRA's generators, LoRA on a model that timm computes otherwise.
    """
    lora, own, remedy = pyra.lora_layers(model), dict(model.named_parameters()), "use pyra.save_adapter"
    pyra.require(not model.folded, f"{model.folded} was folded into the backbone: save the adapter before folding")
    pyra.require(not model.peft, f"peft's LoRA format doesn't hold {model.peft and model.peft['name']}: {remedy}")
    pyra.require(lora, "the model has no LoRA to save: see pyra.add_lora")
    check_like_timm(model, lora)
    other = [name for name, p in own.items() if ".reducer." in name or p.requires_grad and not pyra.is_adapter(name)]
    pyra.require(not other, f"peft's LoRA format has no place for {pyra.listed(other)}: {remedy}")
    pyra.require(len({block.attn.num_heads for block in model.blocks}) == 1, f"the blocks are pruned, and timm has no such model: {remedy}")
    bypassed = (rope := "rope" in model.variant) and "qkv" in lora and any(block.attn.qkv.bias.any() for block in model.blocks)
    pyra.require(not bypassed, f"timm's DINOv3 with biases of q and v never calls its qkv, so that LoRA there has no effect: {remedy}")
    if reducers := sorted({type(block.reducer).__name__ for block in model.blocks if block.reducer is not None}):
        warnings.warn(f"peft's format doesn't record {pyra.listed(reducers)}: what is saved is the model without it", stacklevel=4)
    whole = [module for module in ("head", "fc_norm", *getattr(model, "modules_to_save", ())) if f"{module}.weight" in own]
    tensors, targets = {name: p for name, p in own.items() if name.rpartition(".")[0] in whole}, []
    for name, layers in lora.items():
        apart = name == "fc1" and rope and model.blocks[0].mlp.act == "swiglu"  # DINOv3's; timm's DINOv2 has one map, as we do
        parts, place = PARTS[name] if apart else (name,), pyra.LORA_TARGETS[name]
        targets += [rf"{place}\.{part}" for part in parts]
        for i, layer in enumerate(layers):
            for part, rows in zip(parts, layer.lora_b.chunk(len(parts))):
                tensors |= {f"blocks.{i}.{place}.{part}.lora_A.weight": layer.lora_a, f"blocks.{i}.{place}.{part}.lora_B.weight": rows}
    rank, alpha = len(layer.lora_a), round(layer.scale * len(layer.lora_a), 9)
    config = dict(peft_type="LORA", task_type=None, base_model_name_or_path=None, inference_mode=True, bias="none", r=rank,
                  lora_alpha=int(alpha) if alpha == int(alpha) else alpha, lora_dropout=layer.dropout, modules_to_save=whole or None,
                  target_modules=rf"blocks\.\d+\.({'|'.join(targets)})")
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    content = save({f"base_model.model.{name}": p.detach().cpu().clone().contiguous() for name, p in tensors.items()}, {"format": "pt"})
    files.write_atomically(folder / "adapter_model.safetensors", lambda partial: partial.write_bytes(content))
    files.write_atomically(folder / "adapter_config.json", lambda partial: partial.write_text(json.dumps(config, indent=2)))


def read_config(path):
    """adapter_config.json as {field: value}, LoRA's scale, a pattern of the modules with it, timm's names of those held whole. Raises ValueError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, rule = config.get("peft_type"), config.get("target_modules") or []
        saved = {to_timm_name(f"{name}.")[:-1] for name in config.get("modules_to_save") or ()}
        pattern = re.compile(rule if isinstance(rule, str) else rf"(.*\.)?({'|'.join(map(re.escape, rule))})")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, re.error) as error:
        raise ValueError(f"{path} can't be read as peft's config: {pyra.first_line(error)}") from error
    pyra.require(kind == "LORA", f"{path} must be of peft_type LORA, not {kind}")
    odd = [f"{k} = {v}" for k, v in config.items() if (v not in VALUES[k] if k in VALUES else v and k not in ANYTHING)]
    pyra.require(not odd, f"{path} asks for what pyra.LoRALinear doesn't do: {pyra.listed(odd)}")
    r, alpha, dropout = (config.get(k) for k in ("r", "lora_alpha", "lora_dropout"))
    known = type(r) is int and r > 0 and all(type(v) in (int, float) for v in (alpha, dropout)) and 0 < alpha < math.inf and 0 <= dropout < 1
    pyra.require(known, f"{path} must have r and lora_alpha above 0 and lora_dropout in [0, 1), not {r!r}, {alpha!r} and {dropout!r}")
    return config, alpha / (math.sqrt(r) if config.get("use_rslora") else r), pattern, saved


def to_timm_name(name):
    """A name in a ViT of timm's or transformers' -> timm's, with the latter's query, key and value in attn."""
    name = re.sub(r"^\w+\.(?=(encoder|layers|embeddings|layernorm)\.)", "", name)
    for pattern, replacement in pyra.RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def find_map(module):
    """Where a module of the file is in our model: its name, which share of its rows, of how many."""
    place, _, part = module.rpartition(".")
    return next(((f"{place}.{name}", parts.index(part), len(parts)) for name, parts in PARTS.items() if part in parts), (module, 0, 1))


@pyra.on_model
@torch.no_grad()
def load_peft(model, folder):
    """Adds the LoRA of a folder that save_peft wrote, or peft for a ViT of timm's or transformers', and its head where it has one. Returns the model.

    The model has its backbone, as many classes as the saved head, and no PEFT; it may merge tokens. LoRA on query, key and value goes into one of
    the sum of their ranks on qkv, and other maps then get unused ranks, B = 0. What is neither in a block's maps nor the head (timm's
    patch_embed.proj, which the target "proj" also means) goes into the weights, with a warning. Raises ValueError for what pyra.LoRALinear can't
    express and for files that are missing, damaged or don't fit; the model is then as it was.
    """
    folder, names = Path(folder).expanduser(), ("adapter_model.safetensors", "adapter_model.bin")
    config, scale, pattern, saved = read_config(folder / "adapter_config.json")
    r, own, path = config["r"], dict(model.named_parameters()), next((folder / name for name in names if (folder / name).is_file()), None)
    pyra.require(path, f"there is no {names[0]} in {str(folder)!r}")
    found = {name.removeprefix("base_model.model."): value for name, value in pyra.read_checkpoint(path)[1].items()}
    given = {to_timm_name(name): value for name, value in found.items()}
    modules = sorted({name.partition(".lora_")[0] for name in given if ".lora_" in name})
    whole, ranks = {name.rpartition(".")[0] for name in given if ".lora_" not in name} - {""}, Counter(find_map(module)[0] for module in modules)
    expected = {name: p for name, p in own.items() if name.rpartition(".")[0] in whole | saved}
    inside = {re.sub(r"^blocks\.\d+\.", "", module) for module in modules if module.startswith("blocks.")}  # each in every block
    for module in sorted({*modules, *(f"blocks.{i}.{name}" for i in range(len(model.blocks)) for name in inside)}):
        name, _, count = find_map(module)
        if f"{name}.weight" in own:
            out, *into = own[f"{name}.weight"].shape
            expected[f"{module}.lora_A.weight"] = torch.empty(r, *into, device="meta")
            expected[f"{module}.lora_B.weight"] = torch.empty(out // count, r, *(1 for _ in into[1:]), device="meta")
    pyra.check_fit(path, expected, given)
    odd = [name for name in found if ".lora_" in name and not pattern.fullmatch(name.partition(".lora_")[0])]
    pyra.require(not odd, f"{path} doesn't fit adapter_config.json: its target_modules don't mean {pyra.listed(odd)}")
    targets = [name for name, place in pyra.LORA_TARGETS.items() if f"blocks.0.{place}.{name}" in ranks]
    pyra.require(targets, f"{path} has LoRA on none of {', '.join(pyra.LORA_TARGETS)} of the blocks")
    check_like_timm(model, {*targets, *(name.rpartition(".")[2] for name in whole if name.startswith("blocks."))})
    pyra.add_lora(model, rank := r * max(ranks.values()), config["lora_dropout"], targets, scale * rank)
    for name in expected.keys() & own.keys():
        own[name].copy_(given[name])
    for module in modules:
        name, share, count = find_map(module)
        layer, ranks[name] = model.get_submodule(name), ranks[name] - 1
        a, b = (given[f"{module}.lora_{side}.weight"].float().flatten(1).to(layer.weight.device) for side in "AB")
        if isinstance(layer, pyra.LoRALinear):
            free, rows = slice(ranks[name] * r, ranks[name] * r + r), len(layer.lora_b) // count  # each part has ranks and rows of its own
            layer.lora_a[free], layer.lora_b[share * rows : (share + 1) * rows, free] = a.to(layer.lora_a), b.to(layer.lora_b)
        else:
            layer.weight.copy_(layer.weight.float() + (scale * b @ a).view_as(layer.weight))
    if changed := sorted({*whole, *(module for module in modules if not module.startswith("blocks."))} - {"head", "fc_norm"}):
        warnings.warn(f"{path} changes the backbone's {pyra.listed(changed)} too, which save_peft keeps and pyra.save_adapter doesn't", stacklevel=4)
        model.modules_to_save = sorted({*changed, *getattr(model, "modules_to_save", ())})
    return model
