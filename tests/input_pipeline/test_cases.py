"""Folders, tars and archives that people report, each with its right answer by every way in."""

import functools
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import threading

import pytest

from input_pipeline import sources
from input_pipeline.sources import layout, local
from input_pipeline.tools import inspect
from tests.input_pipeline.conftest import data_config, failure, run_prepare
from tests.input_pipeline.ways import all_ways, by_inspect, by_prepare, by_training, picture, right

PETS = ("cat", "dog")


def files(splits=("train", "val"), classes=PETS, count=3, ending="jpg", kind="JPEG", deeper=""):
  """Return {SPLIT/CLASS/I.ENDING: image} in the colours of the classes."""
  return {
    f"{split}/{name}/{deeper}{i}.{ending}": picture(name, kind)
    for split in splits
    for name in classes
    for i in range(count)
  }


def tree(root, found):
  """Write {path: bytes} below a folder; None is a folder."""
  for name, data in found.items():
    path = root / name
    if data is None:
      path.mkdir(parents=True)
    else:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)
  return root


def tar(path, members, mode="w", **options):
  """Write a tar of (name, bytes), or (name, type, target) for links, in this order."""
  with tarfile.open(path, mode, **options) as archive:
    for name, *rest in members:
      member = tarfile.TarInfo(name)
      if len(rest) == 2:
        member.type, member.linkname = rest
        archive.addfile(member)
      else:
        member.size = len(rest[0])
        archive.addfile(member, io.BytesIO(rest[0]))
  return path


BOTH = {split: {"cat": 3, "dog": 3} for split in ("train", "val")}
THREE = {split: {"cat": 3, "dog": 3, "fox": 3} for split in ("train", "val")}
OTHER = {f"validation/{name}/9.jpg": picture(name) for name in PETS}
LEAK = {f"{folder}/{i}.jpg": picture("cat") for folder in ("cat", "train") for i in range(3)}
TINY = {
  **files(("train",), deeper="images/", ending="JPEG"),
  "train/cat/cat_boxes.txt": b"x",
  **{f"val/images/val_{i}.JPEG": picture("cat") for i in range(3)},
  "val/val_annotations.txt": b"val_0.JPEG\tcat\t0\t0\t9\t9\n",
}
FOLDERS = {
  "plain": (files(), BOTH),
  "names in capitals": (files(("Train", "VAL")), BOTH),
  "valid": (files(("train", "valid")), BOTH),
  "training and validation": (files(("training", "validation")), BOTH),
  "two folders for one split": ({**files(), **OTHER}, "two folders for the split val"),
  "a test split": (
    files(("train", "val", "test")),
    {**BOTH, "test": {"cat": 3, "dog": 3}},
  ),
  "no split": ({name.partition("/")[2]: data for name, data in files().items()}, None),
  "a class named train": (LEAK, "if train is a class, put all classes into a folder train"),
  "a class one folder deeper": (
    {**files(), **files(classes=("fox",), deeper="images/")},
    THREE,
  ),
  "classes of classes": (
    {**files(classes=("cat",), deeper="x/"), **files(classes=("cat",), deeper="y/")},
    "if both are of the class cat, allow it with --config.data.allow=deeper",
  ),
  "a folder named like an image": (
    {**files(), "train/cat/photo.jpg/real.jpg": picture("cat")},
    "compare train/cat/0.jpg with train/cat/photo.jpg/real.jpg",
  ),
  "Tiny ImageNet": (TINY, "val has the class images, which train lacks"),
  "a class of WebP": (
    {**files(), **files(classes=("fox",), ending="webp", kind="WEBP")},
    THREE,
  ),
  "other endings": (
    {**files(), "train/cat/a.GIF": picture("cat", "GIF"), "train/cat/b.jfif": picture("cat")},
    {"train": {"cat": 5, "dog": 3}, "val": {"cat": 3, "dog": 3}},
  ),
  "a class of TIFF": (
    {**files(), **files(classes=("fox",), ending="tif", kind="TIFF")},
    "the class fox of train has no image (left out: 3 images of a format that is not decoded",
  ),
  "an empty class": (
    {**files(), "train/fox": None, "val/fox": None},
    "the class fox of train has no image; add some, remove the folder",
  ),
  "a class without images in val": (
    {**files(), **files(("train",), ("fox",)), "val/fox": None},
    "the class fox of val has no image",
  ),
  "a class that val lacks": (
    {**files(), **files(("train",), ("fox",))},
    "must have the same class folders, but 'fox' is in only one of them",
  ),
  "a class that train lacks": (
    {**files(), **files(("val",), ("fox",))},
    "val has the class fox, which train lacks",
  ),
  "junk": (
    {
      **files(),
      **{f"train/{name}": b"x" for name in (".DS_Store", "cat/._0.jpg", "cat/Thumbs.db")},
      **dict.fromkeys(("train/.ipynb_checkpoints/a.jpg", "val/.git/a.jpg"), picture("dog")),
    },
    BOTH,
  ),
  "folders of systems": (
    {
      **files(),
      **{f"{folder}/a.jpg": picture("dog") for folder in ("__MACOSX", "train/@eaDir")},
      "train/lost+found": None,
    },
    BOTH,
  ),
  "a WebDataset": (
    {"train/part/0.jpg": picture("cat"), "train/part/0.cls": b"0", "val/part/0.jpg": b"x"},
    "is a WebDataset (train/part/0.cls holds the label of an image)",
  ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder(case, tmp_path):
  found, wanted = FOLDERS[case]
  if wanted is None:  # classes alone are the split train
    wanted = {"train": BOTH["train"]}
  path = tree(tmp_path / "data", found)
  all_ways(tmp_path / "out", path, ("--folder", path), wanted)


def test_tiny_imagenet_is_refused_with_the_command_that_mends_it(tmp_path, capsys):
  marks = "".join(f"val_{i}.JPEG\t{PETS[i % 2]}\t0\t0\t9\t9\n" for i in range(4))
  found = {
    **files(("train",), deeper="images/", ending="JPEG"),
    **{f"val/images/val_{i}.JPEG": picture(PETS[i % 2]) for i in range(4)},
    "val/val_annotations.txt": marks.encode(),
    "test/images/test_0.JPEG": picture("cat"),
  }
  path = tree(tmp_path / "data", found)
  all_ways(tmp_path / "out", path, ("--folder", path), "as in Tiny ImageNet")
  said = failure(capsys, "--out", tmp_path / "no", "--folder", path)
  command = re.search(r"makes folders of them: (while .* rmdir images);", said)[1]
  subprocess.run(["bash", "-ec", command], cwd=path / "val", check=True)
  shutil.rmtree(path / "test")
  wanted = {"train": BOTH["train"], "val": {"cat": 2, "dog": 2}}
  all_ways(tmp_path / "mended", path, ("--folder", path), wanted)


def test_one_name_in_two_unicode_forms(tmp_path):
  path = tree(tmp_path / "data", files(("train", "val"), ("dog",)))
  for split, name in (("train", "caf\u00e9"), ("val", "cafe\u0301")):
    tree(path, {f"{split}/{name}/0.jpg": picture("cat")})
  assert by_prepare(tmp_path / "out", "--folder", path).keys() == {"train", "val"}
  for split in ("train", "val"):
    expected = {("caf\u00e9", "cat"): 1, ("dog", "dog"): 3}
    assert by_training(path, split) == expected
  tree(path, {"train/cafe\u0301/1.jpg": picture("cat")})
  all_ways(tmp_path / "twice", path, ("--folder", path), "train has two folders caf\u00e9")


def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
  names = [str(i) for i in range(12)]
  path = tree(
    tmp_path / "data", {f"{s}/{n}/0.jpg": picture("cat") for s in ("train", "val") for n in names}
  )
  assert run_prepare("--out", tmp_path / "out", "--folder", path) == 0
  for made in (path, tmp_path / "out"):
    assert sources.open_source(data_config(made), "val", 12).class_names == tuple(names)
  text = sources.open_source(data_config(path, class_order="text"), "val", 12)
  assert text.class_names == tuple(sorted(names))
  assert layout.in_order(["1", "x", "10", "2"]) == ["1", "10", "2", "x"]
  assert layout.in_order(["01", "1", "\u00b2"]) == ["01", "1", "\u00b2"]


def test_links_are_followed_and_dangling_ones_counted(tmp_path, capsys):
  real = tree(tmp_path / "real", files())
  path = tree(tmp_path / "data", {"train/cat": None, "val": None})
  (path / "train" / "dog").symlink_to(real / "train" / "dog")
  for i in range(3):
    (path / "train" / "cat" / f"{i}.jpg").symlink_to(real / "train" / "cat" / f"{i}.jpg")
  for name in PETS:
    (path / "val" / name).symlink_to(real / "val" / name)
  (path / "train" / "cat" / "gone.jpg").symlink_to("/nowhere/gone.jpg")
  (path / "train" / "cat" / "round").symlink_to(path / "train")
  os.mkfifo(path / "val" / "pipe.jpg")
  all_ways(tmp_path / "out", path, ("--folder", path), BOTH)
  left_out = json.loads((tmp_path / "out" / "left_out.json").read_text())
  assert left_out["dangling"] == ["train/cat/gone.jpg"]
  assert left_out["special"] == ["val/pipe.jpg"]
  assert left_out["loop"] == ["train/cat/round"]
  manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
  assert manifest["left_out"] == {"dangling": 1, "loop": 1, "special": 1}
  capsys.readouterr()
  assert run_prepare("--out", tmp_path / "said", "--folder", path) == 0
  assert "left out 1 links to nothing: train/cat/gone.jpg" in capsys.readouterr().out


def test_what_is_allowed_is_taken(tmp_path):
  found = {**files(), **files(("train",), ("fox",)), "val/fox": None}
  path = tree(tmp_path / "data", found)
  allow = {"allow": "empty_class"}
  wanted = {"train": {"cat": 3, "dog": 3, "fox": 3}, "val": {"cat": 3, "dog": 3}}
  made = by_prepare(tmp_path / "out", "--folder", path, "--allow", "empty_class")
  assert made == {split: right(**counts) for split, counts in wanted.items()}
  for split, counts in wanted.items():
    assert by_training(path, split, 3, **allow) == right(**counts)
    assert {k: v for k, v in by_inspect(path, split, **allow).items() if v} == counts
  tree(path, {"train/cat/more/9.jpg": picture("cat")})
  assert by_training(path, "train", allow="empty_class, deeper")["cat", "cat"] == 4


def test_splits_are_chosen_by_a_flag(tmp_path, capsys):
  path = tree(tmp_path / "data", files(("train", "test", "extra")))
  flags = ("--folder", path)
  message = failure(capsys, "--out", tmp_path / "x", *flags)
  assert "has the split extra, which is none of train, val and test" in message
  made = by_prepare(tmp_path / "a", *flags, "--split", "val=extra", "--split", "test=")
  assert made == dict.fromkeys(("train", "val"), right(cat=3, dog=3))
  left_out = json.loads((tmp_path / "a" / "left_out.json").read_text())
  assert len(left_out["split"]) == 6
  made = by_prepare(tmp_path / "b", *flags, "--split", "val=test", "--split", "extra=")
  assert made.keys() == {"train", "val"}
  assert by_training(path, "extra") == right(cat=3, dog=3)
  for word, says in (
    ("val", "must be NAME=FOUND"),
    ("mine=test", "with NAME one of train, val, test"),
    ("val=none", "no split 'none', only extra, test, train"),
  ):
    assert says in failure(capsys, "--out", tmp_path / "x", *flags, "--split", word)
  twice = ("--split", "val=test", "--split", "val=extra")
  assert "names val twice" in failure(capsys, "--out", tmp_path / "x", *flags, *twice)
  assert "--allow=all is no fault" in failure(
    capsys, "--out", tmp_path / "x", *flags, "--allow", "all"
  )


def test_a_class_that_cannot_be_decoded_is_not_lost(tmp_path, capsys):
  found = files(classes=("cat", "dog", "fox")) | {
    f"val/fox/{i}.jpg": b"version https://git-lfs.github.com/spec/v1" for i in range(3)
  }
  path = tree(tmp_path / "data", found)
  message = failure(capsys, "--out", tmp_path / "out", "--folder", path)
  assert "not one image of the class fox of val can be decoded" in message
  assert not (tmp_path / "out" / "manifest.json").exists()
  flags = ("--folder", path, "--allow", "empty_class")
  assert by_prepare(tmp_path / "out", *flags)["val"] == right(cat=3, dog=3)


def test_the_whole_list_of_what_is_left_out(tmp_path):
  found = {**files(), "readme.txt": b"x", "train/cat/a.tif": b"x", "loose.png": picture("cat")}
  path = tree(tmp_path / "data", found)
  assert by_inspect(path, "train", allow="") == BOTH["train"]
  list_file = tmp_path / "list.json"
  assert inspect.main(["inspect", f"--data={path}", "--sheet=", f"--list={list_file}"]) == 0
  assert json.loads(list_file.read_text()) == {
    "format": ["train/cat/a.tif"],
    "no_image": ["readme.txt"],
    "outside": ["loose.png"],
  }


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
  path = tree(tmp_path / "data", files())
  scandir = os.scandir

  def refuse(folder):
    if str(folder).endswith("val/dog/"):
      raise PermissionError(13, "Permission denied", folder)
    return scandir(folder)

  monkeypatch.setattr(os, "scandir", refuse)
  with pytest.raises(local.DataError, match=r"val/dog/ cannot be listed \(Permission denied\)"):
    list(local.walk(str(path)))


@pytest.mark.parametrize("top", ["", "./", "photos/set/", "test/"])
@pytest.mark.parametrize(
  "case",
  [case for case in FOLDERS if case not in ("no split", "an empty class", "folders of systems")],
)
def test_a_tar_gives_the_answer_of_the_folder(case, top, tmp_path):
  found, wanted = FOLDERS[case]
  if case == "a class named train" and top == "test/":
    wanted = {"test": None}  # a split with a class of this name
  members = [(f"{top}{name}", data) for name, data in found.items() if data is not None]
  made = by_prepare(tmp_path / "out", "--tar", tar(tmp_path / "x.tar", members))
  if case == "a class without images in val":  # a tar without folders
    wanted = "must have the same class folders"
  if wanted == {"test": None}:
    assert made == {"test": {("cat", "cat"): 3, ("train", "cat"): 3}}
  elif isinstance(wanted, str):
    key = wanted.split(" with --config")[0].partition("compare")[0].partition(" (train/")[0]
    assert isinstance(made, str) and key in made, made
  else:
    assert made == {split: right(**counts) for split, counts in wanted.items()}


def test_the_last_version_in_a_tar_counts(tmp_path):
  path = tar(tmp_path / "x.tar", files().items())
  tar(path, [("./train/cat/0.jpg", picture("fox"))], "a")  # as `tar -r` does
  made = by_prepare(tmp_path / "out", "--tar", path)
  assert made["train"] == {("cat", "cat"): 2, ("cat", "fox"): 1, ("dog", "dog"): 3}
  left_out = json.loads((tmp_path / "out" / "left_out.json").read_text())
  assert left_out == {"replaced": ["train/cat/0.jpg"]}


def test_links_in_a_tar(tmp_path, capsys):
  members = list(files(classes=("dog",)).items())
  for split in ("train", "val"):
    members.append((f"{split}/cat/real.jpg", picture("cat")))
    members.append((f"{split}/cat/hard.jpg", tarfile.LNKTYPE, f"{split}/cat/real.jpg"))
    members.append((f"{split}/cat/soft.jpg", tarfile.SYMTYPE, "../cat/hard.jpg"))
    members.append((f"{split}/cat/out.jpg", tarfile.SYMTYPE, "/data/out.jpg"))
    members.append((f"{split}/cat/me.jpg", tarfile.SYMTYPE, "me.jpg"))
  made = by_prepare(tmp_path / "out", "--tar", tar(tmp_path / "x.tar", members))
  assert made == dict.fromkeys(("train", "val"), right(cat=3, dog=3))
  left_out = json.loads((tmp_path / "out" / "left_out.json").read_text())
  assert len(left_out["dangling"]) == 4
  lost = [(n, *rest) for n, *rest in members if "/cat/" not in n or "out.jpg" in n]
  message = failure(capsys, "--out", tmp_path / "y", "--tar", tar(tmp_path / "y.tar", lost))
  assert "the class cat of train has no image (left out: 1 links to nothing" in message


def test_what_lies_behind_the_end_of_a_tar_is_refused(tmp_path, capsys):
  one, two = tar(tmp_path / "1.tar", files().items()), tar(tmp_path / "2.tar", files().items())
  joined = tmp_path / "joined.tar"
  joined.write_bytes(one.read_bytes() + two.read_bytes())
  message = failure(capsys, "--out", tmp_path / "out", "--tar", joined)
  assert f"holds more behind its end, from byte {one.stat().st_size:,} on" in message
  assert by_prepare(tmp_path / "out", "--tar", joined, "--allow", "behind_end")["val"] == right(
    cat=3, dog=3
  )


def inner(name, count=3, mode="w"):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode=mode) as archive:
    for i in range(count):
      member = tarfile.TarInfo(f"{name}_{i}.JPEG")
      member.size = len(picture(name))
      archive.addfile(member, io.BytesIO(picture(name)))
  return buffer.getvalue()


OFFICIAL = [("dog.tar", inner("dog")), ("cat.tar", inner("cat"))]


@pytest.mark.parametrize(
  ("members", "says"),
  [
    ([*OFFICIAL, ("fox.tar", inner("fox", 0))], "fox.tar holds no image; fetch it again"),
    ([*OFFICIAL, ("fox.tar", b"")], "fox.tar in {} is empty, zero bytes"),
    ([*OFFICIAL, ("fox.tar", inner("fox", mode="w:gz"))], "fox.tar in {} is compressed with gzip"),
    ([*OFFICIAL, ("x/dog.tar", inner("dog"))], "holds dog.tar twice"),
    ([*OFFICIAL, ("dog.tar", inner("dog"))], "holds dog.tar twice"),
    ([*OFFICIAL, ("._dog.tar", b"\0\5\x16\7" * 99), ("._x.JPEG", b"x")], None),
  ],
)
def test_the_official_archive_with_a_fault(members, says, tmp_path):
  path = tar(tmp_path / "train.tar", members)
  made = by_prepare(tmp_path / "out", "--imagenet-train", path)
  if says is None:  # what a Mac adds is no class
    assert made == {"train": right(cat=3, dog=3)}
  else:
    assert isinstance(made, str) and says.format(path) in made, made


IMAGES = {f"ILSVRC2012_val_{i:08d}.JPEG": picture(PETS[i % 2]) for i in (3, 1, 4, 2)}
SORTED = {f"val/{PETS[int(name[22]) % 2]}/{name}": data for name, data in IMAGES.items()}
SHORT = {f"val_{i}.JPEG": picture(PETS[i % 2]) for i in range(8, 12)}
LINES = ["dog", "cat", "dog", "cat"]
LABELS = {
  "plain": (IMAGES, "\n".join(LINES), None),
  "in folders": (SORTED, "\n".join(LINES), None),
  "marked and from Windows": (IMAGES, "\ufeff" + "\r\n".join(LINES) + "\r\n", None),
  "by name": (IMAGES, "".join(f"{n} {PETS[int(n[22]) % 2]}\n" for n in IMAGES), None),
  "by name, with commas": (
    IMAGES,
    "".join(f"{n[:-5]}, {PETS[int(n[22]) % 2]}\n" for n in sorted(IMAGES)),
    None,
  ),
  "numbers of the kit": (IMAGES, "2\n1\n2\n1\n", "give the kit itself with --devkit"),
  "another number": (IMAGES, "dog\n", "holds 4 images, but"),
  "a name is missing": (IMAGES, "x.JPEG cat\n", "which {} does not list"),
  "a name too many": (
    IMAGES,
    "".join(f"{n} cat\n" for n in [*IMAGES, "x.JPEG"]),
    "holds 4 images, but {} lists 5",
  ),
  "a name twice": (IMAGES, "x.JPEG cat\nx.JPEG dog\n", "lists an image twice"),
  "columns": (IMAGES, "a b c\n", "every line must be CLASS, or IMAGE and CLASS"),
  "against the folders": (SORTED, "cat\ndog\ncat\ndog\n", "lies in the folder of"),
  "no leading zeros": (SHORT, "\n".join(LINES), "the order of the images is not clear"),
}


@pytest.mark.parametrize("case", LABELS)
def test_the_labels_of_the_validation_images(case, tmp_path):
  found, text, says = LABELS[case]
  train, val = tar(tmp_path / "train.tar", OFFICIAL), tar(tmp_path / "val.tar", found.items())
  labels = tmp_path / "labels.txt"
  labels.write_text(text, encoding="utf-8", newline="")
  flags = ("--imagenet-train", train, "--imagenet-val", val, "--val-labels", labels)
  made = by_prepare(tmp_path / "out", *flags)
  if says is None:
    assert made == {"train": right(cat=3, dog=3), "val": right(cat=2, dog=2)}
  else:
    assert isinstance(made, str) and says.format(labels) in made, made


def test_shards_of_before_stay_readable(tmp_path):
  path = tree(tmp_path / "data", files())
  assert run_prepare("--out", tmp_path / "out", "--folder", path) == 0
  manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
  assert set(manifest) == {
    *("format_version", "source", "seed", "max_size", "checksum", "classes", "splits")
  }
  shutil.rmtree(tmp_path / "out" / ".journal")
  assert by_training(tmp_path / "out", "validation") == right(cat=3, dog=3)


class Whole(http.server.SimpleHTTPRequestHandler):
  """A server that sends whole files only."""

  def log_message(self, *unused):
    pass


class Elsewhere(Whole):
  def do_GET(self):
    self.send_response(302)
    self.send_header("Location", f"/there{self.path}")
    self.end_headers()


class Closed(Whole):
  def do_GET(self):
    self.send_error(403)


class Login(Whole):
  def do_GET(self):
    self.send_response(200)
    self.end_headers()
    self.wfile.write(b"<!DOCTYPE html><html>Please log in.</html>")


@pytest.mark.parametrize(
  ("kind", "says"),
  [
    (Whole, "its server sends whole files only, and parts are needed"),
    (Elsewhere, "HTTP code 302, a redirect; give the URL that it leads to"),
    (Closed, "; give the credentials of this machine the right to read it"),
    (Login, "manifest.json is a web page; its server may ask for a login"),
  ],
)
def test_a_server_that_cannot_be_used_is_named_at_the_start(kind, says, shards):
  server = http.server.ThreadingHTTPServer(
    ("127.0.0.1", 0), functools.partial(kind, directory=str(shards))
  )
  threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
  try:
    assert says in by_training(f"http://127.0.0.1:{server.server_address[1]}", "train")
  finally:
    server.shutdown()
    server.server_close()
