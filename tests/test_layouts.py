"""pyra_lab/layouts.py: lists and trees on disk, how they are dealt out to splits, what is left out, and what is refused."""

import os
import unicodedata
from collections import Counter

import pytest
from helpers import rows, write_image

from pyra_lab import layouts


def test_a_list_gives_paths_labels_and_line_numbers(tmp_path):
    (tmp_path / "test.txt").write_text("\ufeffa b/c.png 3\n\n d.png\t0 \ne.png -1\nf.png 1.5\n\u2028.png 1000000\n", encoding="utf-8")
    parsed = layouts.parse_list(tmp_path / "test.txt")
    assert parsed == [("a b/c.png", 3, 1), ("d.png", 0, 3), ("e.png -1", None, 4), ("f.png 1.5", None, 5), ("\u2028.png 1000000", None, 6)]
    assert layouts.read_classes(tmp_path) == ()
    (tmp_path / "classes.txt").write_text("crow\nsea gull\n\n")
    assert layouts.read_classes(tmp_path) == ("crow", "sea gull")


@pytest.mark.parametrize("content, sentence", [
    (b"a.png 0\nb.png\n", r"test.txt, line 2: expected `relative/path label` with a label of 0 to 999999, found 'b.png'$"),
    (b"a.png -1\n", r"test.txt, line 1: expected"),
    (b"\n", "test.txt lists no images$"),
    (b"\xff.png 1\n", "test.txt is not text in UTF-8"),
])
def test_broken_lists(tmp_path, content, sentence):
    (tmp_path / "test.txt").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        layouts.read_list(tmp_path / "test.txt")


def test_hold_out_takes_a_fifth_of_each_class():
    members = {"a": list(range(25)), "b": list(range(100, 150)), "c": [200]}
    kept, held = layouts.hold_out(members, 1)
    assert {name: len(part) for name, part in held.items()} == {"a": 5, "b": 10, "c": 0}
    assert all(sorted(kept[name] + held[name]) == members[name] for name in members)
    assert layouts.hold_out(members, 1) == (kept, held) != layouts.hold_out(members, 2)


# Trees. A tree is written as "folder/names: files" where files are numbers of images (3) or names


def write_files(root, *lines):
    """"a/b: 3" writes three empty images in a/b, "a: x.txt y.csv" two files, "a -> b" a link; nothing here opens them."""
    for line in lines:
        if " -> " in line:
            link, target = line.split(" -> ")
            (root / link).parent.mkdir(parents=True, exist_ok=True)
            (root / link).symlink_to(target)
            continue
        folder, names = line.split(": ")
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in [f"{i}.png" for i in range(int(names))] if names.isdecimal() else names.split():
            (root / folder / name).touch()


def count_files(path):
    return {split: [len(files) for files in tree.values()] for split, tree in layouts.split_tree(path)[0].items()}


def test_a_tree_with_and_without_parts(tmp_path):
    write_files(tmp_path / "whole", "cat: 25", "horse: 50", "horse/deeper: a.PNG b.jpeg", ".hidden: 3")
    os.remove(tmp_path / "whole/horse/0.png"), os.remove(tmp_path / "whole/horse/1.png")
    assert count_files(tmp_path / "whole") == {"train800": [16, 32], "val200": [4, 8], "train800val200": [20, 40], "test": [5, 10]}
    tree, left = layouts.split_tree(tmp_path / "whole")
    splits = {split: {file for files in members.values() for file in files} for split, members in tree.items()}
    assert not splits["train800val200"] & splits["test"] and not splits["train800"] & splits["val200"] and not left
    assert splits["train800"] | splits["val200"] == splits["train800val200"]

    parts = tmp_path / "parts"
    write_files(parts, "train/a: 10", "train/b: 10", "val/a: 3", "val/b: 3")
    assert count_files(parts) == {"train800": [8, 8], "val200": [2, 2], "train800val200": [10, 10], "test": [3, 3]}
    write_files(parts, "test/a: 4", "test/b: 4")
    assert count_files(parts) == {"train800": [10, 10], "val200": [3, 3], "train800val200": [13, 13], "test": [4, 4]}


CAFE = [unicodedata.normalize(form, "Caf\u00e9") for form in ("NFC", "NFD")]
READ = {  # a tree of two classes, 10 images each to train on and 3 to test on in all of these -> the classes' names
    "other names of the parts": (["Training/a: 10", "Training/b: 10", "TEST/a: 3", "TEST/b: 3"], "ab"),
    "longer names of the parts": (["train_set/a: 10", "train_set/b: 10", "TestImages/a: 3", "TestImages/b: 3"], "ab"),
    "folders around it": (["x/y/train/a: 10", "x/y/train/b: 10", "x/y/dev/a: 3", "x/y/dev/b: 3", "x: LICENSE"], "ab"),
    "folders in the parts": (["train/images/a: 10", "train/images/b: 10", "test/test/a: 3", "test/test/b: 3"], "ab"),
    "folders in the classes": (["train/a/images: 10", "train/b/images: 10", "train/a: boxes.txt", "val/a: 3", "val/b: 3"], "ab"),
    "classes first": (["a/train: 10", "b/Train: 10", "a/valid: 3", "b/val: 3"], "ab"),
    "hidden and system entries": (
        ["train/a: 10", "train/b: 10", "test/a: 3", "test/b: 3", "__MACOSX/train/a: 3", ".git: 2", "train/.ipynb_checkpoints: 1", "test/@eaDir/a: 1",
         "train/a/.Trash-1000: 2", "test/b/@eaDir: 2", "train/b: ._0.png Thumbs.db .DS_Store", "test/a/$RECYCLE.BIN: 1",
         "test/a/System Volume Information: 1"], "ab"),
    "links": (["blobs/x: 7", "blobs/y: 3", "blobs/z: 7", "blobs/files: 3", "t/train/a: 3", "t/train/b -> ../../blobs/y", "t/train/a/more -> ../../../blobs/x",
               "blobs/y/more -> ../z", "t/test/a: 3", "t/test/b/0.png -> ../../../blobs/files/0.png", "t/test/b/1.png -> ../../../blobs/files/1.png",
               "t/test/b/2.png -> ../../../blobs/files/2.png"], "ab"),
    "Unicode forms": ([f"train/{CAFE[0]}: 10", "train/b: 10", f"test/{CAFE[1]}: 3", "test/b: 3"], ["b", CAFE[0]]),
    "letters' case": (["train/Cat: 10", "train/b: 10", "test/cat: 3", "test/b: 3"], ["Cat", "b"]),
}


@pytest.mark.parametrize("lines, classes", READ.values(), ids=READ)
def test_trees_that_are_read_in_one_way_only(tmp_path, lines, classes):
    write_files(tmp_path, *lines)
    path = tmp_path / "t" if (tmp_path / "t").is_dir() else tmp_path
    assert count_files(path) == {"train800": [8, 8], "val200": [2, 2], "train800val200": [10, 10], "test": [3, 3]}
    assert sorted(layouts.split_tree(path)[0]["test"]) == sorted(classes)
    tree, _ = layouts.find_stream(path)
    counts = {part: [len(layouts.list_images(folder, Counter(), {})) for folder in folders.values()] for part, folders in tree.items()}
    assert counts == {"train": [10, 10], "val": [3, 3]}
    assert [sorted(folders) for folders in tree.values()] == [sorted(classes)] * 2


REFUSED = {
    "nothing": ([], "has no sub-folders: a task is a tree with one folder per class$"),
    "images only": ([".: 3"], "has no sub-folders"),
    "one class": (["cat: 9"], "holds one class, cat: a task is a tree with one folder for each of two classes or more$"),
    "one class to test on": (["train/a: 3", "train/b: 3", "test/images: 3"], "test holds one class, images"),
    "too few": (["a: 3", "b: 3"], "has too few images per class to hold out val200: a fifth of each class rounds to none$"),
    "train alone": (["train/a: 3", "train/b: 3"], "has train/ but neither val/ nor test/: add one, or point the task at .*train$"),
    "test alone": (["cat: 3", "dog: 3", "Test: 3"], "has Test/ but no train/: add it; if it is a class, give it another name$"),
    "other classes": (["train/a: 3", "train/b: 3", "test/a: 1", "test/c: 1"], "must hold the same classes, and differ in b, c$"),
    "an empty class": (["a: 9", "b: x.txt"], "b holds no images: no file in it is of a format that Pillow reads$"),
    "two of a part": (["train/a: 9", "train/b: 9", "val/a: 2", "val/b: 2", "valid: 2"], "holds val/ and valid/, which both mean val/"),
    "flat parts": (["train: 9", "test: 9"], "(train|test) has no sub-folders"),
    "some classes in parts": (["a/train: 9", "a/val: 9", "b/train: 9", "b: 2"],
                              r"has parts inside classes \(train/, val/\), but b/ holds train/ and images: put train/ and val/"),
    "parts deep in a class": (["a: 9", "b: 9", "b/x/val: 2"], "b/x/val is called like a part of the tree, but lies inside a class"),
    "classes below others": (["art/cat: 9", "art/dog: 9", "clip/cat: 9", "clip/dog: 9"],
                             r"art holds images in several sub-folders only \(cat, dog\): if those"),
    "parts of other names": (["seg_train: 9", "seg_test: 9"], "holds seg_test, seg_train: name them train/ and val/ or test/ if they are parts"),
    "one folder twice": (["train/a: 9", "train/b: 9", "test -> train"], "test/a and .*train/a are the same folder: remove one of the links$"),
    "links in a circle": (["a: 9", "b: 9", "a/x -> ../b", "b/y -> ../a"], "a/x and .*b are the same folder"),
    "one name twice": ([f"{CAFE[0]}: 9", f"{CAFE[1]}: 9"], "holds two folders of the same name in two Unicode forms: merge them$"),
}


@rows("lines, sentence", REFUSED.values())
def test_trees_that_are_refused(tmp_path, lines, sentence):
    write_files(tmp_path, *lines)
    with pytest.raises(ValueError, match=sentence):
        layouts.split_tree(tmp_path)


def test_what_is_left_out_is_said_in_one_line(tmp_path):
    write_files(tmp_path, "train/a: 9", "train/b: 9", "val/a: 3", "val/b: 3", "extra: 2", "notes: x.txt", "train: 1", "val/a: 1.heic 2.txt 3.txt plain",
                "val/b: ._0.png", "train/a/up -> ..", "train/a/self.png -> self.png", "train/b/gone.png -> nowhere", "train/c -> gone", "d -> gone")
    write_image(tmp_path / "val/b/4.png")
    (tmp_path / "val/b/4.png").rename(tmp_path / "val/b/four")
    os.mkfifo(tmp_path / "val/b/pipe.png")
    splits, left = layouts.split_tree(tmp_path)
    assert [len(files) for files in splits["test"].values()] == [3, 4]  # `four` begins as an image does
    assert layouts.describe_left("birds", left) == (
        "birds: 13 left out: broken links (4), entries that are no files (1), files that aren't images (4: .heic, .txt, without a suffix), folders that are "
        "neither train, val nor test (1: extra/), hidden images (1), images outside the class folders (1), links that lead back (1); see data/README.md")


def test_a_stream_has_two_parts(tmp_path):
    write_files(tmp_path, "val: 1")
    with pytest.raises(FileNotFoundError, match=r"must hold train/ and val/ \(or valid/"):
        layouts.find_stream(tmp_path)
    write_files(tmp_path, "train/horse: 1", "train/cat: 1", "test: 5")  # ImageNet's test/ is flat, and isn't looked at
    with pytest.raises(ValueError, match="val has no sub-folders: a task is a tree with one folder per class$"):
        layouts.find_stream(tmp_path)
    write_files(tmp_path, "val/horse: 1", "val/zebra: 1")
    with pytest.raises(ValueError, match="train and .*val must hold the same classes, and differ in cat, zebra$"):
        layouts.find_stream(tmp_path)
    write_files(tmp_path, "val/cat: 1", "train/zebra: 1")
    tree, left = layouts.find_stream(tmp_path)
    assert list(tree["train"]) == list(tree["val"]) == ["cat", "horse", "zebra"] and left["images outside the class folders", ""] == 1
