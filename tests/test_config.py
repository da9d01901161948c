"""Config: what it refuses, what its defaults stand for, ids that never change, and the command line."""

import dataclasses
import math
import re

import pytest
from helpers import rows
import torch

import pyra
from pyra_lab import backbones, budget, config, devices
from pyra_lab.config import Config, arguments, parse
from pyra_lab.methods import METHODS, OPTIONAL, PEFTS

# ----------------------------------------------------------------------------------------------------------------------
# What it refuses, without a look at files or devices

REFUSED = [  # fields, what the sentence says
    (dict(task=None), "task must be of type str, not None"),
    (dict(rate=True), "rate must be of type str | float | list, not True"),
    (dict(lr="1e-3"), "lr must be of type float, not '1e-3'"),
    (dict(compile=1), "compile must be of type bool, not 1"),
    (dict(backbone="vit_tiny_patch16_224.mae"), "backbone 'vit_tiny_patch16_224.mae' is unknown; did you mean vit_tiny_patch16_224? (run --help lists them)"),
    (dict(backbone="vit_small_patch16_22"), "backbone 'vit_small_patch16_22' is unknown; did you mean vit_small_patch16_224? (run --help lists them)"),
    (dict(method="diffrate_search"), "method 'diffrate_search' is unknown; did you mean diffrate?"),
    (dict(method="none"), "method 'none' is unknown; it must be one of plain, tome, pyra, "),
    (dict(train_split="train"), "train_split 'train' is unknown; did you mean train800?"),
    (dict(keep="bset"), "keep 'bset' is unknown; did you mean best?"),
    (dict(norm="0.5"), "norm '0.5' is unknown; it must be one of imagenet, half, none, clip"),
    (dict(rate="mid", method="plain"), "rate must be 'low', 'high' or a number greater than 1, not 'mid'"),
    (dict(rate=math.nan), "must be a finite number greater than 1, not nan"),
    (dict(s=0), "s must be at least 1, not 0"),
    (dict(warmup=3), "warmup (3) must be less than epochs (3)"),
    (dict(lr=-1e-3), "lr must be a finite number of at least 0, not -0.001"),
    (dict(drop_path=1), "drop_path must be at least 0 and less than 1, not 1.0"),
    (dict(seed=2**31), "seed must be at least 0 and less than 2^31, not 2147483648"),
    (dict(rise=1), "rise must be at least 0 and less than 1, not 1.0"),
    (dict(any_rate=True, method="tome", compile=True), "rise and any_rate merge other numbers of tokens again and again, for each of which compile would"),
    (dict(rise=0.5, method="tome", keep="best", train_split="train800"), "keep best can't compare epochs that merge different numbers of tokens"),
    (dict(peft_scale=0), "peft_scale must be a finite number greater than 0, not 0.0"),
    (dict(layer_decay=0), "layer_decay must be greater than 0 and at most 1, not 0.0"),
    (dict(device="tpu"), "device must be cpu, cuda"),
    (dict(second_epochs=1, method="ats"),
     "two-stage training (second_epochs) supports tome, pyra, evit, tofu, pyra_row, fpet, pitome, dtem with a PEFT, not method ats with peft lora"),
    (dict(method="rap", peft="full"), "method rap prunes a frozen backbone, and peft full would train it"),
    (dict(method="rap", task="stream:/images"), "method rap needs the images in memory, and stream:/images is read from its files"),
    (dict(teacher="vit_nano_patch4_56", task="stream:/images"), "a teacher needs the images in memory"),
    (dict(teacher_weights="none"), "teacher_weights were given, but no teacher"),
    (dict(augment="mae"), "augment mae is for stream:/path tasks, and sprites_location is held in memory: take strong, or light"),
    (dict(augment="light", task="stream:/images"), "augment light is for tasks held in memory, and stream:/images is read from its files: take mae"),
    (dict(augment="strong", teacher="vit_nano_patch4_56"), "a teacher's logits are of the images as they are: leave out augment strong, or the teacher"),
    (dict(augment="heavy"), "augment 'heavy' is unknown; it must be one of none, light, strong, mae"),
    (dict(keep="best"), "keep best selects on val200, and train_split train800val200 trains on it: take train800"),
    (dict(keep="best", task="stream:/images"), "keep best selects on val200, and stream:/images has no images besides those to train and to test on"),
    (dict(keep="best", train_split="train800", method="ltmp"), "keep best can't choose an epoch of method ltmp, which meets its budget after the last one"),
    (dict(img_size=225, backbone="vit_base_patch16_224"), "img_size must be a multiple of 16, the patches of vit_base_patch16_224, not 225"),
    (dict(img_size=224, backbone="vit_so400m_patch14_siglip_224", lora_targets="qvk"), "lora_targets must be different names out of qkv, proj, fc1, fc2"),
    (dict(img_size=200, backbone="vit_small_patch14_dinov2"), "img_size must be a multiple of 14"), (dict(img_size=0), "img_size must be at least 1, not 0"),
    (dict(lora_targets="qkv, fc1"), "separated by commas, not 'qkv, fc1'"), (dict(lora_targets="qkv,qkv"), "lora_targets must be different names"),
    (dict(lora_targets=""), "lora_targets must be"), (dict(lora_alpha=0), "lora_alpha must be a finite number greater than 0, not 0.0"),
]


@rows("fields, sentence", REFUSED)
def test_refused_in_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        Config(**{"epochs": 3, **fields})
    assert "\n" not in str(error.value) and not str(error.value).endswith(".")


def test_apples_gpu(monkeypatch):
    """Allowed where torch has it, with what it lacks said; float32 there."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device mps was requested, but PyTorch finds no Apple GPU here"):
        devices.check_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="device mps is untested: results are not reproducible bit for bit there, and peak memory is not recorded"):
        devices.check_device("mps")
    assert Config(device="mps").resolved().dtype == "float32"


@rows("amx, avx512, intel, fast", [(True, True, True, True), (False, True, True, False), (False, True, False, True), (False, False, False, False)])
def test_bfloat16_is_fast(monkeypatch, amx, avx512, intel, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(devices, "is_intel", lambda: intel)
    assert devices.has_fast_bfloat16("cpu") == fast and Config(device="cpu").resolved().dtype == ("bfloat16" if fast else "float32")


def test_a_ratio_is_the_same_schedule_on_the_command_line_and_in_the_library():
    with torch.device("meta"):
        model = pyra.create_model("vit_base_patch16_224")
        for rate in ("2", "1.05", "2.1", "3.4"):
            r = budget.schedule(parse(["--rate", rate, "--backbone", "vit_base_patch16_224"]), model)
            assert r == pyra.merge_schedule(float(rate))
            pyra.add_pyra(model, r)


# ----------------------------------------------------------------------------------------------------------------------
# Defaults


def test_resolved_fills_in_the_backbones_defaults(monkeypatch):
    monkeypatch.delenv("PYRA_DATA")
    for name, known in backbones.BACKBONES.items():
        resolved = Config(backbone=name, method="plain", epochs=50, device="cpu").resolved()
        for field in ("weights", "norm", "lora_rank", "batch_size"):
            assert getattr(resolved, field) == known[field]
        assert resolved.warmup == 5
        assert resolved.dtype == ("bfloat16" if config.has_fast_bfloat16("cpu") else "float32")
        assert [f.name for f in dataclasses.fields(resolved) if getattr(resolved, f.name) is None] == [
            "img_size", "lora_alpha", "peft_dim", "peft_scale", "teacher", "teacher_weights", "second_epochs", "train_rate", "micro_batch", "modulation_lr", "data_root"]
        assert resolved.resolved() == resolved
    given = dict(weights="none", norm="none", lora_rank=5, batch_size=7, warmup=0, device="cpu", dtype="float32")
    resolved = Config(**given, method="plain").resolved()
    assert {k: getattr(resolved, k) for k in given} == given
    assert Config(epochs=9).resolved().warmup == 0


def test_table_4():
    """The learning rates of the modulation that the paper chooses from, and which of them is the default."""
    assert backbones.MODULATION_LRS.keys() == backbones.BACKBONES.keys()
    assert backbones.MODULATION_LRS["vit_large_patch16_224.mae"] == [1e-6, 3e-6, 1e-5, 3e-5]
    for name in ("deit_base_patch16_224", "vit_base_patch16_224"):
        assert backbones.MODULATION_LRS[name] == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    assert [Config(backbone=name).resolved().modulation_lr for name in ("vit_base_patch16_224", "vit_large_patch16_224.mae")] == [1e-4, 1e-5]


def test_backbones_pool_as_they_were_pretrained():
    with torch.device("meta"):
        averaging = backbones.create_backbone(Config(backbone="vit_base_patch16_224.mae"), 7)
        assert averaging.global_pool == "avg" and averaging.head.out_features == 7 and averaging.embed_dim == 768
        assert backbones.create_backbone(Config(backbone="vit_base_patch16_224"), 7).global_pool == "token"


def test_published_settings_of_the_task():
    """By any of the task's names; a value that is given stays."""

    def sizes(**fields):
        resolved = Config(device="cpu", **fields).resolved()
        return resolved.peft_dim, resolved.peft_scale

    assert sizes(task="cifar", peft="fact_tt") == (8, 1.0) and sizes(task="cifar100", peft="fact_tk") == (32, 0.1)
    assert sizes(task="svhn", peft="convpass", backbone="vit_large_patch16_224") == (12, 100.0) and sizes(task="digits", peft="convpass") == (8, 1.0)
    assert sizes(task="svhn", peft="convpass", peft_dim=3, peft_scale=2) == (3, 2.0) and sizes(peft="adapter", peft_scale=2.0) == (8, None)


# ----------------------------------------------------------------------------------------------------------------------
# Ids

ON_ANY_MACHINE = dict(device="cpu", dtype="float32")
# As the first version computed them: an id that changes would orphan every record under it.
IDS = [
    (dict(), "sprites_location-vit_nano_patch4_56-pyra-seed0-5cee6ecd6f"),
    (dict(method="plain"), "sprites_location-vit_nano_patch4_56-plain-seed0-21146c8a8a"),
    (dict(method="plain", rate="low", s=4, modulation_lr=1.0, task="cifar"), "cifar100-vit_nano_patch4_56-plain-seed0-03fa2e2044"),
    (dict(method="tome", rate="low", s=2, seed=3), "sprites_location-vit_nano_patch4_56-tome-seed3-96b3c1952c"),
    (dict(s=4, modulation_lr=3e-4, backbone="vit_base_patch16_224", task="cifar100"), "cifar100-vit_base_patch16_224-pyra-seed0-dc0315f473"),
    (dict(method="evit", rate=2), "sprites_location-vit_nano_patch4_56-evit-seed0-29956a476b"),
    (dict(method="tofu", rate=2.5, epochs=30), "sprites_location-vit_nano_patch4_56-tofu-seed0-9fa261f2dd"),
    (dict(method="ats", task="digits", train_split="train800", eval_split="val200"), "digits-vit_nano_patch4_56-ats-seed0-d0699061d9"),
    (dict(method="ltmp", backbone="vit_small_patch16_224", lr=3e-4, weight_decay=0.05),
     "sprites_location-vit_small_patch16_224-ltmp-seed0-65abfe361d"),
    (dict(method="diffrate", rate=[16] * 11 + [10], eval_every=5), "sprites_location-vit_nano_patch4_56-diffrate-seed0-d9400b5aac"),
    (dict(method="rap", rate=3.0, compile=True, checkpoint=True), "sprites_location-vit_nano_patch4_56-rap-seed0-97357bd2fe"),
    (dict(lora_rank=2, dropout=0.0, drop_path=0, batch_size=16, micro_batch=4), "sprites_location-vit_nano_patch4_56-pyra-seed0-424d37d6ce"),
    (dict(peft="adapter", peft_dim=4, peft_scale=2.0), "sprites_location-vit_nano_patch4_56-pyra-seed0-58d14641ec"),
    (dict(peft="convpass", task="svhn"), "svhn-vit_nano_patch4_56-pyra-seed0-41b6db086f"),
    (dict(peft="fact_tt", task="dtd", method="tome"), "dtd-vit_nano_patch4_56-tome-seed0-289acec56f"),
    (dict(peft="fact_tk", task="clevr_count", peft_scale=0.5), "clevr_count-vit_nano_patch4_56-pyra-seed0-ebc73cadd5"),
    (dict(peft="snf", dropout=0.3, norm="imagenet"), "sprites_location-vit_nano_patch4_56-pyra-seed0-12e1967336"),
    (dict(peft="full", method="plain", layer_decay=0.75, warmup=5, epochs=50, backbone="vit_base_patch16_224.mae"),
     "sprites_location-vit_base_patch16_224.mae-plain-seed0-66b9279e37"),
    (dict(method="tome", second_epochs=0), "sprites_location-vit_nano_patch4_56-tome-seed0-3258e0e864"),
    (dict(second_epochs=30, peft="adapter", weights="none"), "sprites_location-vit_nano_patch4_56-pyra-seed0-c7096162dc"),
    (dict(method="plain", teacher="vit_base_patch16_224"), "sprites_location-vit_nano_patch4_56-plain-seed0-fcbadd5fee"),
    (dict(method="evit", teacher="vit_large_patch16_224", teacher_weights="none", backbone="deit_small_distilled_patch16_224"),
     "sprites_location-deit_small_distilled_patch16_224-evit-seed0-85de8b12c4"),
]


def test_ids_never_change(monkeypatch):
    monkeypatch.delenv("PYRA_DATA")  # a path is part of the id
    assert [Config(**ON_ANY_MACHINE, **fields).id() for fields, _ in IDS] == [expected for _, expected in IDS]
    assert {fields.get("method", "pyra") for fields, _ in IDS} >= {"plain", "tome", "pyra", "evit", "tofu", "ats", "ltmp", "diffrate", "rap"}
    assert {fields.get("peft", "lora") for fields, _ in IDS} >= {"lora", "adapter", "convpass", "fact_tt", "fact_tk", "snf", "full"}


OTHER = dict(
    task="digits", backbone="vit_tiny_patch16_224", weights="none", method="tome", rate="low", s=2, lora_rank=3, epochs=99, warmup=3, batch_size=16,
    lr=2e-3, modulation_lr=2e-4, weight_decay=0.0, drop_path=0.0, dropout=0.0, norm="none", seed=1, train_split="train800", eval_split="val200",
    eval_every=1, data_root="elsewhere", device="cuda", dtype="float32", compile=True, checkpoint=True,
    peft="full", second_epochs=1, micro_batch=4, layer_decay=0.5, augment="mae", keep="best", workers=1,
    img_size=112, lora_targets="qkv,fc2", lora_alpha=4.0, peft_dim=5, peft_scale=0.1, teacher="vit_small_patch16_224", teacher_weights="none",
    rise=0.5, any_rate=True, train_rate="low",
)  # a value for each field that isn't its default


def test_an_id_depends_on_all_that_matters_and_on_nothing_else(monkeypatch):
    monkeypatch.setattr(config, "has_fast_bfloat16", lambda device: True)
    base = Config(method="plain", device="cpu")
    assert base.id() == Config(method="plain", device="cpu").id() == base.resolved().id()
    for name in ("weights", "lora_rank", "warmup", "batch_size", "norm", "dtype"):
        assert getattr(base, name) is None
        assert dataclasses.replace(base, **{name: getattr(base.resolved(), name)}).id() == base.id()
    assert dataclasses.replace(base, drop_path=0).id() == dataclasses.replace(base, drop_path=0.0).id()

    assert OTHER.keys() == {f.name for f in dataclasses.fields(Config)}
    merging, full = dataclasses.replace(base, method="pyra"), dataclasses.replace(base, method="pyra", peft="full", task="stream:/images")
    starts = {"augment": full, "keep": dataclasses.replace(base, train_split="train800"), "teacher_weights": dataclasses.replace(base, teacher="vit_base_patch16_224")}  # where the field matters
    for name in OPTIONAL:
        method = next((method for method, row in METHODS.items() if name in row.uses), "pyra")
        peft = next((peft for peft, row in PEFTS.items() if name in row.uses), "lora")
        starts[name] = dataclasses.replace(base, method=method, peft=peft)
    ids = [base.id(), merging.id(), full.id(), dataclasses.replace(merging, rate=[1] * 12).id()]
    ids += [dataclasses.replace(starts.get(name, merging), **{name: value}).id() for name, value in OTHER.items() if name != "workers"]
    assert len(set(ids)) == len(ids) == len(OTHER) + 3

    assert dataclasses.replace(merging, workers=1).id() == merging.id()  # how many processes read the files changes nothing
    for name in ("rate", "s", "modulation_lr", "layer_decay", "peft_dim", "peft_scale"):  # what plain LoRA does not use
        assert dataclasses.replace(base, **{name: OTHER[name]}).id() == base.id()
    assert dataclasses.replace(base, method="tome", s=2, modulation_lr=1.0).id() == dataclasses.replace(base, method="tome").id()
    assert dataclasses.replace(base, lora_targets="fc1,qkv").id() == dataclasses.replace(base, lora_targets="qkv,fc1").id() != base.id()
    assert Config(rate=2, device="cpu").id() == Config(rate=2.0, device="cpu").id()
    assert Config(task="cifar").id() == Config(task="cifar100").id()
    for name in ("vit_nano_patch4_56", "vit_base_patch16_224.mae", "vit_small_patch14_dinov2", "vit_base_patch16_dinov3"):  # its own size, when it is given
        size = backbones.default_img_size(name)
        assert Config(backbone=name, img_size=size).id() == Config(backbone=name).id() != Config(backbone=name, img_size=size + 112).id()
    assert len({dataclasses.replace(base, device=device).id() for device in ("cuda", "cuda:0", "cuda:1")}) == 1  # the same run on the next GPU
    assert re.fullmatch(r"[\w.-]+", dataclasses.replace(base, task="folder:/a b/ä/../c").id())
    with pytest.raises(dataclasses.FrozenInstanceError):
        base.seed = 1


@pytest.mark.parametrize("fields", [dict(), dict(task="folder:images"), dict(weights="weights.safetensors"), dict(data_root="vtab")], ids=str)
def test_paths_mean_the_same_everywhere(tmp_path, monkeypatch, fields):
    """A relative path starts in the folder that the config was resolved in, and the id is the same before and after."""
    for name in ("images", "vtab", "data", "elsewhere"):
        (tmp_path / name).mkdir()
    for name in ("weights.safetensors", "data/vit_nano_patch4_56.safetensors"):  # the latter is not the one that is shipped
        (tmp_path / name).touch()
    if not fields:
        monkeypatch.setenv("PYRA_DATA", "vtab")
    monkeypatch.chdir(tmp_path)
    relative = Config(**fields, device="cpu")
    resolved = relative.resolved()
    absolute = {k: v.replace(v.split(":")[-1], str(tmp_path / v.split(":")[-1])) for k, v in fields.items()}
    assert relative.id() == resolved.id() == Config(**absolute, device="cpu").id()
    assert resolved.resolved() == resolved
    if not fields:
        assert resolved.weights == backbones.SHIPPED and resolved.data_root == str(tmp_path / "vtab")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resolved.resolved() == resolved


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def test_parse():
    for argv, field, value in [
        ("--rate low", "rate", "low"),
        ("--rate 3.4", "rate", 3.4),
        ("--rate 2", "rate", 2.0),
        ("--rate [16,16,16,16,16,16,16,16,16,16,16,10]", "rate", [16] * 11 + [10]),
        ("--lora_rank null", "lora_rank", None),
        ("--lora_rank 12", "lora_rank", 12),
        ("--weights none", "weights", "none"),
        ("--weights None", "weights", None),
        ("--compile true", "compile", True),
        ("--compile False", "compile", False),
        ("--checkpoint", "checkpoint", True),
        ("--lr 3e-4", "lr", 3e-4),
        ("--lr 1", "lr", 1.0),
        ("--dropout .2", "dropout", 0.2),
        ("--seed=7", "seed", 7),
        ("--task 365", "task", "365"),  # a folder's name
        ("--data_root /some/where", "data_root", "/some/where"),
    ]:
        parsed = parse(argv.split())
        assert getattr(parsed, field) == value and type(getattr(parsed, field)) is type(value), argv
        assert parsed == dataclasses.replace(Config(), **{field: value}), argv


def test_parse_refuses():
    for argv in ("--rate mid", "--rate [1,2", "--epochs 1.5", "--epochs True", "--compile 1", "--lr fast", "--lr NaN", "--seed None", "--s [1]"):
        with pytest.raises(ValueError, match=f"{argv[2:].split()[0]} must be"):
            parse(argv.split())


def test_arguments_are_parsed_back():
    every_field = Config(**OTHER | dict(peft="lora", augment="strong", teacher=None, teacher_weights=None, rise=0.0, any_rate=False))  # go with other values only
    for given in (Config(), Config(rise=0.5), Config(rate=[16] * 12, weights="none", s=2, lr=3e-4, compile=True, warmup=0, device="cpu"), every_field):
        assert parse(arguments(given)) == given
