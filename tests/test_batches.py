"""Batches: which images an epoch takes, in which order, and what is done to them; streams from files."""

import dataclasses
import os

import pytest
import torch
from helpers import SMALL, UNREAD, adapter, assert_same_run, identical, interrupted_at, watch_batches, write_class_folders
from PIL import Image

from pyra_lab import Config, augmentation, batches, load_run, run
from pyra_lab.images import normalize
from pyra_lab.methods import build_model
from pyra_lab.tasks import find_task, load_split

pytestmark = pytest.mark.usefixtures("small_backbone")


@pytest.mark.parametrize("parts, world", [(1, 1), (3, 1), (2, 2)])
def test_chunks_share_out_an_epoch(parts, world):
    chunks = [batches.chunks_of_epoch(21, 8, parts, 5, rank, world) for rank in range(world)]
    assert all(len(mine) == 2 * parts for mine in chunks)
    steps = [torch.cat([chunk for mine in chunks for chunk in mine[step * parts : (step + 1) * parts]]) for step in range(2)]
    assert all(len(step) == 8 for step in steps) and len(set(torch.cat(steps).tolist())) == 16
    assert torch.equal(torch.cat(steps), torch.cat(batches.chunks_of_epoch(21, 8, 1, 5, 0, 1)))  # the same images in each step


def test_in_batches():
    images, labels = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8), torch.arange(10)
    cut = list(batches.in_batches(images, labels, "half", batch_size=4))
    assert [len(x) for x, _ in cut] == [4, 4, 2]
    assert torch.equal(torch.cat([x for x, _ in cut]), normalize(images, "half")) and torch.equal(torch.cat([y for _, y in cut]), labels)


def test_epochs_differ_in_their_order(task, tmp_path):
    """Each epoch takes 16 of the 21 images once, in an order of its own, and in training mode whether or not an evaluation came before."""
    with watch_batches() as seen:
        run(Config(task=task, **{**SMALL, "eval_every": 1, "epochs": 2, "method": "tome"}), tmp_path, progress=False)
    assert [(training, len(x)) for training, x in seen] == [(True, 8), (True, 8), (False, 24)] * 2  # after each epoch the test images
    index = {image.numpy().tobytes(): i for i, image in enumerate(normalize(load_split(task, "train800val200", 24)[0], "half"))}
    first, second = ([index[image.numpy().tobytes()] for _, x in seen[i : i + 2] for image in x] for i in (0, 3))
    assert len(set(first)) == len(set(second)) == 16
    assert first != second and first != sorted(first)


# ----------------------------------------------------------------------------------------------------------------------
# Streams, and fine-tuning as MAE does it

FULL = {**SMALL, "peft": "full", "augment": "mae", "epochs": 2, "lr": 1e-3, "modulation_lr": 1e-3, "eval_every": 0, "workers": 0}


def stream(task):
    return task.replace("folder:", "stream:")


def test_full_fine_tuning_trains_everything(task, tmp_path):
    config = Config(task=stream(task), **{**FULL, "eval_every": 1})
    result = run(config, tmp_path, progress=False)
    model = build_model(config, 3)
    assert sum(result.trained.values()) == sum(p.numel() for p in model.parameters()) and result.trained["peft"] == 0
    after = adapter(result)
    assert not [name for name, p in model.named_parameters() if torch.equal(after[name], p) and not name.startswith(UNREAD)]
    assert ["accuracy" in entry for entry in result.history] == [True, True]
    assert identical(dict(load_run(result).named_parameters()), after)


def test_stream_resumes_and_does_not_depend_on_workers(task, tmp_path):
    config = Config(task=stream(task), **FULL)
    whole = run(config, tmp_path / "whole", progress=False)
    with interrupted_at(3):  # in the second epoch
        run(config, tmp_path / "cut", progress=False)
    assert_same_run(run(dataclasses.replace(config, workers=2), tmp_path / "cut", progress=False), whole)


def test_a_stream_may_be_sampled(task, tmp_path):
    """ATS looks at some images before training; they come from the files too."""
    fields = {**FULL, "peft": "lora", "augment": "none", "epochs": 1, "warmup": 0, "method": "ats"}
    result = run(Config(task=stream(task), **fields), tmp_path, progress=False)
    assert result.plan and 0 < result.accuracy_last < 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_of_a_stream_is_named(tmp_path, workers):
    name = stream(write_class_folders(tmp_path / "images"))
    os.truncate(tmp_path / "images/train/green/3.png", 40)
    with pytest.raises(ValueError) as caught:
        run(Config(task=name, **{**FULL, "workers": workers}), tmp_path / "runs", progress=False)
    assert str(caught.value).startswith(f"{tmp_path}/images/train/green/3.png is not an image that can be read: ") and "\n" not in str(caught.value)
    config = Config(task=name, **{**FULL, "workers": workers})
    data = batches.streamed(find_task(name), config.resolved(), 24, torch.device("cpu"))
    shares = [[len(y) for _, y in data.evaluation(rank, 32)] for rank in range(32)]  # more processes than images: some have none
    assert sorted(shares) == [[]] * (32 - data.n_evaluated) + [[1]] * data.n_evaluated


def test_augmentation_depends_on_seed_and_index_alone():
    def noise(index):
        return torch.rand(3) + index

    class Images:
        def __getitem__(self, index):
            return noise(index)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = augmentation.Seeded(Images(), 7), augmentation.Seeded(Images(), 8)
    assert torch.equal(first[3], first[3]) and torch.equal(first[torch.tensor(3)], first[3])
    assert not torch.equal(first[3], second[3]) and not torch.equal(first[3] - 3, first[4] - 4)
    assert torch.equal(torch.get_rng_state(), state)


AUGMENTED = {**SMALL, "epochs": 2, "eval_every": 0, "method": "tome", "dropout": 0.0, "drop_path": 0.0}


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_augmented_in_memory(task, tmp_path, augment):
    """Each image as seed, epoch and index say: resumed and cut in micro-batches alike; evaluation sees images as they are. Teaches what it should."""
    config = Config(task=task, **{**AUGMENTED, "augment": augment, "keep": "best", "train_split": "train800"})
    with watch_batches() as seen:
        whole = run(config, tmp_path / "whole", progress=False)
    steps = [x for training, x in seen if training]
    assert [len(x) for x in steps] == [8] * 4 and len({image.numpy().tobytes() for x in steps for image in x}) == 32  # no image twice the same
    assert identical({"x": torch.cat([x for training, x in seen if not training and len(x) == 3][:1])}, {"x": normalize(load_split(task, "val200", 24)[0], "half")})
    with interrupted_at(3):
        run(config, tmp_path / "cut", progress=False)
    assert_same_run(run(config, tmp_path / "cut", progress=False), whole)
    with watch_batches() as parts:
        run(dataclasses.replace(config, micro_batch=4), tmp_path, progress=False)
    if augment == "light":  # mixing depends on the batch it is done in
        assert torch.equal(torch.cat([x for training, x in parts if training]), torch.cat(steps))
        assert all(-1 <= x.min() and x.max() <= 1 for x in steps)  # crops of an image have its colours
    assert run(dataclasses.replace(config, seed=1), tmp_path, progress=False).history[0]["loss"] != whole.history[0]["loss"]


def test_rows_of_augmentation_differ_in_what_they_say():
    """Light keeps half of the area or more, in a picture whose pixels tell where they came from; strong changes colours and erases too."""
    place = (torch.arange(64) * 4).to(torch.uint8)
    image = torch.stack([place.expand(64, 64), place[:, None].expand(64, 64), torch.zeros(64, 64, dtype=torch.uint8)])
    kept, others, flipped = [], 0, 0
    for index in range(60):
        light, strong = (augmentation.Seeded(augmentation.Transformed([image] * 60, augmentation.crops_and_more(augmentation.AUGMENTS[name], 32, "none", True)), 3)[index]
                         for name in ("light", "strong"))
        x, y = light[0], light[1]
        flipped += bool(x[0, 0] > x[0, -1])
        kept.append(float((x.max() - x.min()) * (y.max() - y.min())))
        assert light[2].max() == 0 and light.shape == (3, 32, 32)
        others += bool(strong[2].abs().max() > 0)
    assert 0.4 < min(kept) < 0.6 and 0.8 < max(kept) and 15 < flipped < 45 and others > 15


def test_mixed_labels_are_probabilities():
    torch.manual_seed(0)
    x, y = augmentation.mixup_or_cutmix(3)(torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert x.shape == (6, 3, 8, 8) and y.shape == (6, 3) and torch.allclose(y.sum(dim=1), torch.ones(6)) and (y.max(dim=1).values < 1).any()


def test_centre_crop_is_seven_eighths():
    image = Image.new("RGB", (64, 64), (255, 255, 255))
    image.paste((0, 0, 0), (4, 4, 60, 60))  # a white frame, a sixteenth wide
    x = augmentation.centre_crop(56, "none")(image)
    assert x.shape == (3, 56, 56) and x.mean() < 0.01
