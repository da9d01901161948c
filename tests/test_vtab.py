"""pyra_lab/vtab.py: Table 1, and the check of a VTAB-1k folder, which names every fault and nothing else."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import write_image, write_lists, write_tree
from PIL import Image

from pyra_lab import vtab
from pyra_lab.layouts import SPLITS
from pyra_lab.vtab import VTAB, check


def test_table_1():
    assert len(VTAB) == 19
    groups = [group for group, _, _ in VTAB.values()]
    assert [groups.count(g) for g in ("Natural", "Specialized", "Structured")] == [7, 4, 8]
    assert sum(classes for _, classes, _ in VTAB.values()) == 940
    assert VTAB["sun397"] == ("Natural", 397, 21750) and VTAB["patch_camelyon"] == ("Specialized", 2, 32768)
    assert set(vtab.ALIASES.values()) <= set(VTAB) and not set(vtab.ALIASES) & set(VTAB)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Tiny images that all tasks share: train/ has 1,000 different ones, test/ has 73,728 names of a few (a file has at most 65,000)."""
    pool = tmp_path_factory.mktemp("pool")
    for i in range(1000):
        write_image(pool / f"train/{i:06d}.png", (i % 256, i // 256, 0), (2, 2))
    names = [f"{pool}/test/{i:06d}.png" for i in range(73728)]
    for i, name in enumerate(names):
        if i % 30000 == 0:
            write_image(Path(name), (0, 0, 9), (2, 2))
        else:
            os.link(names[i - i % 30000], name)
    return pool


def write_vtab(folder, name, pool):
    """One of the 19 as Table 1 has it, of the pool's images."""
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        (folder / part).symlink_to(pool / part)
    _, classes, test = VTAB[name]
    train, test = ([f"{part}/{i:06d}.png {i % classes}\n" for i in range(n)] for part, n in (("train", 1000), ("test", test)))
    for split, lines in dict(train800=train[:800], val200=train[800:], train800val200=train, test=test).items():
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def edit_line(file, number, new):
    """Replaces a line of a list by a new one; None removes it."""
    lines = file.read_text().splitlines()
    lines[number - 1 : number] = [] if new is None else [new]
    file.write_text("\n".join(lines) + "\n")


def test_check_names_twelve_faults_among_nineteen_tasks_and_nothing_else(tmp_path, pool):
    root = tmp_path
    folder = {name: write_vtab(root / {"cifar100": "cifar", "oxford_pet": "oxford_iiit_pet"}.get(name, name), name, pool) for name in VTAB}
    out = vtab.report(check(root, quick=True)).splitlines()
    assert [line.split() for line in out[:19]] == [[name, "ok"] for name in VTAB]
    assert out[19:] == ["19 of 19 tasks ok, 0 missing, 0 with 0 faults"]

    shutil.rmtree(folder["dmlab"])
    (folder["dtd"] / "val200.txt").unlink()
    edit_line(folder["svhn"] / "test.txt", 26032, None)
    edit_line(folder["eurosat"] / "test.txt", 7, "test/000006.png")
    edit_line(folder["kitti"] / "test.txt", 4, "test/000003.png 4")
    (folder["clevr_dist"] / "test.txt").write_text((folder["clevr_dist"] / "test.txt").read_text().replace(" 5\n", " 4\n"))
    edit_line(folder["smallnorb_azi"] / "train800val200.txt", 10, "train/000009.png 8")
    edit_line(folder["sun397"] / "test.txt", 2, "test/000000.png 1")
    edit_line(folder["resisc45"] / "test.txt", 5, "train/000300.png 4")
    edit_line(folder["caltech101"] / "test.txt", 100, "test/none.png 99")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    noise.save(folder["oxford_flowers102"] / "cut.png")
    os.truncate(folder["oxford_flowers102"] / "cut.png", 900)
    edit_line(folder["oxford_flowers102"] / "test.txt", 9, "cut.png 8")
    (folder["oxford_pet"] / "classes.txt").write_text("cat\ndog\n")
    noise.save(folder["dsprites_loc"] / "lossy.jpg")  # noted, and no fault
    edit_line(folder["dsprites_loc"] / "test.txt", 1, "lossy.jpg 0")

    expected = {
        "dmlab": ("task", "no folder dmlab"),
        "dtd": ("list", "val200.txt is missing"),
        "svhn": ("count", "test.txt lists 26,031 images, not 26,032"),
        "eurosat": ("line", "test.txt, line 7: expected `relative/path label`, found 'test/000006.png'"),
        "kitti": ("label", "test.txt, line 4: label 4 is outside 0..3"),
        "clevr_dist": ("class", "test.txt has no image of class 5"),
        "smallnorb_azi": ("union", "train800val200.txt, line 10: train/000009.png with label 8 is neither in train800.txt nor in val200.txt"),
        "sun397": ("duplicate", "test.txt, line 2: test/000000.png is in test.txt, line 1 already"),
        "resisc45": ("overlap", "train800.txt, line 301: train/000300.png is in test.txt, line 5 too"),
        "caltech101": ("missing", "test.txt, line 100: test/none.png does not exist"),
        "oxford_flowers102": (
            "unreadable", f"test.txt, line 9: {folder['oxford_flowers102']}/cut.png is not an image that can be read: image file is truncated"),
        "oxford_pet": ("count", "classes.txt names 2 classes, not 37"),
        "dsprites_loc": ("note", "1 of 74,728 images are JPEG, which blurs dsprites_loc"),
    }
    findings = check(root)
    assert [(name, len(found)) for name, found in findings.items()] == [(name, int(name in expected)) for name in VTAB]
    for name, (kind, text) in expected.items():
        assert findings[name][0].kind == kind and text in findings[name][0].text
    out = vtab.report(findings)
    assert "dmlab                 missing: no folder dmlab\n" in out and "kitti                 1 fault\n    test.txt, line 4" in out
    assert "dsprites_loc          ok\n    note: 1 of" in out
    assert out.endswith("\n7 of 19 tasks ok, 1 missing, 11 with 11 faults")


def export(folder, name, pool, suffix="png"):
    """The same task as an exporter writes it: each list has its own images; those of train800val200 have new names and another order."""
    write_vtab(folder, name, pool)
    for split in SPLITS:
        lines = (folder / f"{split}.txt").read_text().splitlines()
        lines = lines[::-1] if split == "train800val200" else lines
        (folder / "images" / split).mkdir(parents=True)
        for i, line in enumerate(lines):
            shutil.copy(folder / line.split()[0], folder / f"images/{split}/{i:06d}.{suffix}")
            lines[i] = f"images/{split}/{i:06d}.{suffix} {line.split()[1]}\n"
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def texts(root, name, **options):
    return [f"{finding.kind}: {finding.text}" for finding in check(root, [name], **options)[name]]


def test_check_knows_an_exporters_images_by_their_bytes(tmp_path, pool):
    folder = export(tmp_path / "kitti", "kitti", pool)
    assert texts(tmp_path, "kitti") == texts(tmp_path, "kitti", quick=True) == []
    write_image(folder / "images/train800val200/000007.png", (1, 2, 3))
    edit_line(folder / "train800val200.txt", 1000, "images/train800val200/000999.png 3")
    expected = [
        "union: train800val200.txt, line 8: images/train800val200/000007.png with label 0 is neither in train800.txt nor in val200.txt",
        "union: train800val200.txt, line 1000: images/train800val200/000999.png with label 3 is neither in train800.txt nor in val200.txt",
        "union: val200.txt, line 193: images/val200/000192.png with label 0 is not in train800val200.txt"]
    assert texts(tmp_path, "kitti") == texts(tmp_path, "kitti", quick=True) == expected
    shutil.copy(folder / "images/train800/000000.png", folder / "images/test/000005.png")
    assert texts(tmp_path, "kitti")[3:] == ["note: test.txt has training images under other names: images/test/000005.png"]


def test_check_of_images_that_are_no_images(tmp_path, pool):
    folder = export(tmp_path / "kitti", "kitti", pool)
    (folder / "images/test/000001.png").write_bytes(b"")
    (folder / "images/test/000002.png").write_bytes(b"not an image")
    (folder / "images/test/000003.png").unlink()
    (folder / "images/test/000003.png").mkdir()
    found = texts(tmp_path, "kitti")
    assert [text.split(":")[0] for text in found] == ["missing", "unreadable", "unreadable"]
    assert "line 4: images/test/000003.png does not exist" in found[0] and "line 2: " in found[1] and "000002.png is not an image" in found[2]
    assert len(texts(tmp_path, "kitti", quick=True)) == 1  # opens nothing that its name vouches for


def test_check_of_validation_images_that_are_trained_on(tmp_path, pool):
    edit_line(write_vtab(tmp_path / "kitti", "kitti", pool) / "val200.txt", 3, "train/000000.png 0")
    assert texts(tmp_path, "kitti") == [
        "overlap: train800.txt, line 1: train/000000.png is in val200.txt, line 3 too",
        "union: train800val200.txt, line 803: train/000802.png with label 2 is neither in train800.txt nor in val200.txt"]


def test_check_notes_classes_to_train_on_that_have_no_image(tmp_path, pool):
    folder = write_vtab(tmp_path / "kitti", "kitti", pool)
    for split in SPLITS[:3]:
        (folder / f"{split}.txt").write_text((folder / f"{split}.txt").read_text().replace(" 3\n", " 2\n"))
    assert texts(tmp_path, "kitti") == ["note: train800val200.txt has no image of 1 of the 4 classes: 3"]
    assert vtab.report(check(tmp_path, ["kitti"])).endswith("\n1 task checked: 0 faults")  # notes are no faults


def test_check_looks_for_jpeg_where_it_matters(tmp_path, pool):
    folder = write_vtab(tmp_path / "cifar", "cifar100", pool)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    (folder / "a.png").write_bytes(buffer.getvalue())  # a JPEG, whatever it is called
    edit_line(folder / "test.txt", 1, "a.png 0")
    assert texts(tmp_path, "cifar100")[0].startswith("note: 1 of 11,000 images are JPEG, which blurs cifar100")
    (folder / "a.png").rename(folder / "a.JPG")
    edit_line(folder / "test.txt", 1, "a.JPG 0")
    assert [finding.kind for finding in check(tmp_path, ["cifar"], quick=True)["cifar100"]] == ["note"]
    (write_vtab(tmp_path / "kitti", "kitti", pool) / "a.jpg").write_bytes(buffer.getvalue())
    edit_line(tmp_path / "kitti" / "test.txt", 1, "a.jpg 0")
    assert texts(tmp_path, "kitti") == []


def test_check_takes_tasks_of_ones_own(tmp_path):
    folder = write_lists(tmp_path / "birds")
    assert check(folder) == {"birds": []} == check(tmp_path) == check(tmp_path, ["birds"])
    Image.open(folder / "images/train800/000001.png").save(folder / "images/test/000004.bmp")  # the same image in another format
    edit_line(folder / "test.txt", 5, "images/test/000004.bmp 1")
    edit_line(folder / "test.txt", 6, "images/test/000003.png 4")
    (folder / "images/val200/000002.png").unlink()
    assert [f"{finding.kind}: {finding.text}" for finding in check(folder)["birds"]] == [
        "note: train800val200.txt has no image of 2 of the 5 classes: 3, 4",
        "duplicate: test.txt, line 6: images/test/000003.png is in test.txt, line 4 already",
        "note: test.txt has no image of 2 of the 5 classes: 3, 4",
        "missing: val200.txt, line 3: images/val200/000002.png does not exist",
        "overlap: test.txt, line 5: images/test/000004.bmp is the same image as images/train800/000001.png in train800.txt, line 2"]
    write_lists(tmp_path / "cifar")
    assert list(check(tmp_path, quick=True)) == [*VTAB, "birds"] and len(check(tmp_path / "cifar", quick=True)["cifar100"]) > 4  # Table 1's


def test_report_shortens_long_lists(tmp_path, pool):
    folder = write_vtab(tmp_path / "kitti", "kitti", pool)
    (folder / "test").unlink()
    out = vtab.report(check(tmp_path, ["kitti"], quick=True)).splitlines()
    assert out[0] == "kitti                 711 faults" and out[1] == "    test.txt, line 1: test/000000.png does not exist" and len(out) == 8
    assert out[6:] == ["    ... and 706 more of this kind (missing)", "1 task checked: 711 faults"]
    assert len(check(tmp_path, ["kitti"])["kitti"]) == 711


def test_check_of_a_tree(tmp_path):
    """Images per class and part, what is left out, and what can't be read; whatever kind it is given as."""
    for part, count in (("train", 10), ("val", 2)):
        write_tree(tmp_path / "pets" / part, {"cat": count, "horse": 2 * count})
    for file in (tmp_path / "pets/val").rglob("*.png"):
        write_image(file, (int(file.stem), len(file.parent.name), 99))  # other images than those to train on
    (tmp_path / "pets/train/cat/notes.txt").write_text("none")
    left = f"note: {tmp_path}/pets: 1 left out: files that aren't images (1: .txt); see data/README.md"
    texts = lambda given, **options: {name: [f"{finding.kind}: {finding.text}" for finding in found] for name, found in check(given, **options).items()}
    expected = {f"folder:{tmp_path}/pets": [
        "note: to train on (train800): 24 images: cat 8, horse 16", "note: to select on (val200): 6 images: cat 2, horse 4",
        "note: to test on (test): 6 images: cat 2, horse 4", left]}
    assert texts(tmp_path / "pets") == texts(f"folder:{tmp_path}/pets") == expected
    assert texts(f"stream:{tmp_path}/pets") == {f"stream:{tmp_path}/pets": [
        "note: to train on (train/): 30 images: cat 10, horse 20", "note: to test on (val/): 6 images: cat 2, horse 4", left]}
    shutil.copy(tmp_path / "pets/train/cat/3.png", tmp_path / "pets/val/horse/0.png")
    copied = [f"overlap: {tmp_path}/pets/val/horse/0.png, to test on, is the same image as {tmp_path}/pets/train/cat/3.png, which is not"]
    assert texts(tmp_path / "pets") == {name: found + copied for name, found in expected.items()}
    (tmp_path / "pets/val/horse/0.png").write_bytes((tmp_path / "pets/val/horse/1.png").read_bytes())
    for i in range(7):
        (tmp_path / f"pets/train/horse/{i}.png").write_bytes(b"no image")
    (tmp_path / "pets/val/cat/0.png").write_bytes(b"no image")
    found = texts(tmp_path / "pets")[f"folder:{tmp_path}/pets"]
    assert found[:4] == expected[f"folder:{tmp_path}/pets"] and len(found) == 12 and all(text.startswith("unreadable: ") for text in found[4:])
    out = vtab.report(check(tmp_path / "pets")).splitlines()
    assert out[0] == f"folder:{tmp_path}/pets 8 faults" and len(out) == 14  # all of them are named
    assert texts(tmp_path / "pets", quick=True) == expected
    shutil.rmtree(tmp_path / "pets/val")
    (finding,), = check(tmp_path / "pets").values()
    assert finding.kind == "tree" and "pets has train/ but neither val/ nor test/" in finding.text


def test_check_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'birds' is neither one of VTAB-1k's 19 tasks .cifar100, .* nor a folder with lists in "):
        check(tmp_path, ["kitti", "birds"])
    with pytest.raises(ValueError, match="folder:.* is one task: leave out kitti$"):
        check(f"folder:{tmp_path}", ["kitti"])
    found = check(tmp_path)
    assert {finding.kind for task in found.values() for finding in task} == {"task"} and len(found) == 19
    assert found["cifar100"][0].text == "no folder cifar100 or cifar"
