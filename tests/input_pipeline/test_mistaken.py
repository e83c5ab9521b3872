"""Data that are no folders of classes, as people have them: what is said, by every way in."""

import os
import pathlib
import re

import pytest

from input_pipeline import sources
from input_pipeline.sources import parquet_files, splits
from tests.input_pipeline.conftest import failure, run_prepare
from tests.input_pipeline.test_cases import PETS, files, tree
from tests.input_pipeline.ways import all_ways, by_inspect, by_prepare, by_training, picture

INSIDE = {f"{c}/{s}/{i}.jpg": picture(c) for c in PETS for s in ("train", "val") for i in range(3)}
FLAT = {f"{name}_{i}.jpg": picture(name) for name in PETS for i in range(3)}
FOLDERS = {
  "splits inside of classes": (INSIDE, "move cat/train to train/cat, and so on"),
  "no class at all": (FLAT, "its images, as cat_0.jpg, lie in no folder of a class"),
  "splits without classes, and tables": (
    {
      **{f"{split}/{name}": data for split in ("train", "val") for name, data in FLAT.items()},
      **dict.fromkeys(("train.csv", "val.csv", "notes.txt"), b"cat_0.jpg,cat\n"),
    },
    "If train.csv holds the classes: no such file is read, but input_pipeline/README.md",
  ),
  "one class": (files(classes=("cat",)), "has one class, cat, of which there is nothing to learn"),
  "other letters in val": (
    {**files(("train",)), **files(("val",), ("dog",)), "val/Cat/0.jpg": picture("cat")},
    "val has the class Cat, which train lacks (train has 'cat')",
  ),
  "a tar for each class": (
    {f"{split}/{name}.tar": b"x" for split in ("train", "val") for name in PETS},
    "it holds archives, as train/cat.tar; unpack them",
  ),
  "TFRecord": (
    {f"train-{i:05d}-of-00003": b"x" for i in range(3)},
    "it holds TFRecord, as train-00000-of-00003, which is not read; write the images as files",
  ),
  "FFCV": ({"train.beton": b"x", "val.beton": b"x"}, "it holds a data set of FFCV, as train.beton"),
  "arrays": ({"x_train.npy": b"x"}, "it holds arrays of numpy, as x_train.npy"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_is_refused_with_what_mends_it(case, tmp_path):
  found, wanted = FOLDERS[case]
  path = tree(tmp_path / "data", found)
  all_ways(tmp_path / "out", path, ("--folder", path), wanted)


def test_a_single_class_is_refused_unless_it_is_meant(tmp_path, capsys):
  found = {f"images/{name}": data for name, data in FLAT.items()} | {"labels.csv": b"x"}
  path = tree(tmp_path / "data", found)
  says = "has one class, images, of which there is nothing to learn; allow it with --config.data."
  table = "If labels.csv holds the classes: no such file is read, but input_pipeline/README.md"
  for said in (by_prepare(tmp_path / "out", "--folder", path), by_training(path, "train")):
    assert says in said and table in said
  assert by_training(path, "train", allow="one_class").keys() == {("images", c) for c in PETS}
  assert by_inspect(path, "train", allow="one_class") == {"images": 6}
  assert run_prepare("--out", tmp_path / "out", "--folder", path, "--allow", "one_class") == 0
  assert says in by_training(tmp_path / "out", "train")  # and so are shards of one class


def test_the_readme_makes_folders_of_a_table(tmp_path, monkeypatch):
  text = (pathlib.Path(sources.__file__).parents[1] / "README.md").read_text()
  (code,) = re.findall(r"```python\n(import csv.*?)```", text, re.DOTALL)
  rows = "".join(f"{name},{name[:3]}\n" for name in FLAT)
  tree(tmp_path / "photos", FLAT | {"labels.csv": f"\ufeffimage,class\n{rows}".encode()})
  monkeypatch.chdir(tmp_path)
  exec(code, {})
  all_ways(
    tmp_path / "out",
    tmp_path / "classes",
    ("--folder", tmp_path / "classes", "--val-fraction=0.34", "--split=val=val"),
    {"train": {"cat": 2, "dog": 2}, "val": {"cat": 1, "dog": 1}},
    val_fraction=0.34,
  )


@pytest.mark.parametrize("word", ["gs:/bucket/x", "gs:bucket", "hf:me/x", "s3:/b", "file:/tmp/x"])
def test_an_address_that_is_typed_wrong_is_no_folder(word, tmp_path, monkeypatch, capsys):
  path = tree(tmp_path / "data", files())
  monkeypatch.chdir(tmp_path)
  assert "is neither a folder nor gs://BUCKET" in failure(capsys, "--out", word, "--folder", path)
  assert os.listdir(tmp_path) == ["data"]
  if not word.startswith("hf:"):
    assert "an address has :// behind its kind" in by_training(word, "train")


def test_a_share_that_is_held_out_of_nothing_is_said(tmp_path, capsys):
  path = tree(tmp_path / "data", files())
  assert run_prepare("--out", tmp_path / "out", "--folder", path, "--val-fraction", 0.2) == 0
  assert "nothing is held out, as --val-fraction asks" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("held", "train"), [("Dev", "Train"), ("valid", "train"), ("VALIDATION", "training")]
)
def test_nothing_is_held_out_beside_a_val_of_any_name(tmp_path, held, train):
  path = tree(tmp_path / "data", files((train, held)))
  all_ways(
    tmp_path / "out",
    path,
    ("--folder", path, "--val-fraction=0.34"),
    {"train": {"cat": 3, "dog": 3}, "val": {"cat": 3, "dog": 3}},
    val_fraction=0.34,
  )


def test_a_split_of_no_known_name_may_be_the_val_that_is_wanted(tmp_path):
  path = tree(tmp_path / "data", files(("train", "extra")))
  flags, said = ("--folder", path, "--val-fraction=0.34"), "the split extra, which is none of train"
  assert said in by_prepare(tmp_path / "out", *flags)
  for split in ("train", "val"):
    assert said in by_training(path, split, val_fraction=0.34)
  # What the sentences advise.
  val = {("cat", "cat"): 3, ("dog", "dog"): 3}
  assert by_prepare(tmp_path / "out", *flags, "--split", "val=extra") == {"train": val, "val": val}
  assert by_training(path, "extra", eval_split="extra", val_fraction=0.0) == val
  # It is known what extra is, and both are asked for.
  left = by_prepare(tmp_path / "left", *flags, "--split", "extra=")
  assert left["val"] == by_training(path, "val", eval_split="val, extra", val_fraction=0.34)
  assert by_prepare(tmp_path / "none", *flags, "--split", "extra=", "--split", "val=") == {
    "train": val
  }


@pytest.mark.parametrize(
  ("word", "name"),
  [("dev", "val"), ("valid", "val"), ("eval", "test"), ("evaluation", "test"), ("Testing", "test")],
)
def test_folders_and_parquet_know_the_same_words(tmp_path, word, name):
  assert splits.canonical(parquet_files.split_of(f"data/{word}/0.parquet")) == name
  assert splits.canonical(parquet_files.split_of(f"{word}-00000-of-00001.parquet")) == name
  path = tree(tmp_path / "data", files(("train", word)))
  assert name in by_prepare(tmp_path / "out", "--folder", path)
  assert by_training(path, name) == {("cat", "cat"): 3, ("dog", "dog"): 3}
