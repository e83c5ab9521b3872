"""What prepare reads: tars, ImageNet's archives, the digits."""

import io
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import scipy.io

from input_pipeline import image
from tests.input_pipeline.conftest import (
  contents,
  encoded,
  failure,
  hashes,
  manifest_of,
  picture,
  run_prepare,
)


def add(tar, name, data):
  """Add a file to an open tar."""
  member = tarfile.TarInfo(name)
  member.size = len(data)
  tar.addfile(member, io.BytesIO(data))


def tar_of(files, **options):
  """Return the bytes of a tar of {name: data}."""
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
    for name, data in files.items():
      add(tar, name, data)
  return buffer.getvalue()


@pytest.mark.parametrize("top", ["", "./", "set/", "a/b/"])
@pytest.mark.parametrize("splits", [True, False])
def test_a_tar_is_read_like_the_folder_in_it(folder, tmp_path, top, splits):
  roots = {s: folder / s for s in ("train", "val")} if splits else {"": folder / "train"}
  files = {
    f"{top}{split}/{f.parent.name}/{f.name}".replace("//", "/"): f.read_bytes()
    for split, root in roots.items()
    for f in root.glob("*/*.JPEG")
  }
  (tmp_path / "x.tar").write_bytes(tar_of(files))
  assert run_prepare("--out", tmp_path / "out", "--tar", tmp_path / "x.tar") == 0
  assert (
    run_prepare("--out", tmp_path / "same", "--folder", folder if splits else folder / "train") == 0
  )
  for split in roots:
    assert contents(tmp_path / "out", split or "train") == contents(
      tmp_path / "same", split or "train"
    )


def test_the_order_inside_a_tar_does_not_matter(tmp_path):
  files = {f"train/{i % 3}/{i}.JPEG": encoded(picture(i)) for i in range(9)}
  for name, order in (("one", sorted(files)), ("two", sorted(files, reverse=True))):
    (tmp_path / name).mkdir()
    (tmp_path / name / "x.tar").write_bytes(tar_of({f: files[f] for f in order}))
    assert run_prepare("--out", tmp_path / f"{name}-out", "--tar", tmp_path / name / "x.tar") == 0
  assert hashes(tmp_path / "one-out") == hashes(tmp_path / "two-out")


def test_what_is_wrong_with_a_tar_is_named(folder, tmp_path, capsys):
  files = {f"train/a/{i}.JPEG": encoded(picture(i)) for i in range(4)}
  whole = tar_of(files)

  def says(data, name="x.tar"):
    (tmp_path / name).write_bytes(data)
    return failure(capsys, "--out", tmp_path / "out", "--tar", tmp_path / name)

  compressed = io.BytesIO()
  with tarfile.open(fileobj=compressed, mode="w:gz") as tar:
    add(tar, "train/a/0.JPEG", b"x")
  assert "is compressed with gzip" in says(compressed.getvalue())
  assert "gunzip it first" in says(compressed.getvalue())
  last = whole.index(b"train/a/3.JPEG")
  assert "ends in the middle of train/a/3.JPEG; fetch it again" in says(whole[: last + 900])
  assert f"is damaged at byte {last:,}; fetch it again" in says(whole[: last + 100])
  assert "lacks the mark at the end of a tar, so it is truncated" in says(whole[:last])
  torn = bytearray(whole)
  at = torn.index(b"train/a/2.JPEG")
  torn[at : at + 20] = b"\x55" * 20
  assert f"is damaged at byte {at:,}; fetch it again" in says(bytes(torn))
  assert "is not an intact tar" in says(b"no tar" * 1000)
  archive = io.BytesIO()
  with zipfile.ZipFile(archive, "w") as zipped:
    zipped.writestr("train/a/0.JPEG", b"x")
  assert "is a zip archive; unzip it, and give the folder as --folder" in says(archive.getvalue())
  assert "no CLASS/*.jpg|" in says(tar_of({"readme.txt": b"x"}))
  mixed = files | {"train/a/deeper/9.JPEG": b"x"}
  assert "is not laid out as {train,val}/CLASS/IMAGE" in says(tar_of(mixed))
  assert "the class b, which train lacks" in says(tar_of(files | {"val/b/9.JPEG": b"x"}))
  missing = failure(capsys, "--out", tmp_path / "out", "--tar", tmp_path / "none.tar")
  assert "none.tar cannot be read: No such file" in missing
  given = failure(capsys, "--out", tmp_path / "out", "--tar", tmp_path)
  assert "is a folder and no tar; give it as --folder" in given
  given = failure(capsys, "--out", tmp_path / "out", "--folder", tmp_path / "x.tar")
  assert "is not a folder: give a tar as --tar" in given


_SYNSETS = ["n01440764", "n01443537", "n02084071"]


@pytest.fixture
def official(tmp_path):
  """The archives of ILSVRC2012 in small: 3 synsets, 4 images each, 5 to validate."""
  inner = {
    s: tar_of({f"{s}_{i}.JPEG": encoded(picture(10 * n + i)) for i in range(4)})
    for n, s in enumerate(_SYNSETS)
  }
  # Not in order, as nobody promises one.
  train = tar_of({f"{s}.tar": inner[s] for s in reversed(_SYNSETS)})
  (tmp_path / "train.tar").write_bytes(train)
  val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": encoded(picture(100 + i)) for i in (2, 0, 1, 4, 3)}
  (tmp_path / "val.tar").write_bytes(tar_of(val))
  # The ids of the development kit are in another order than the synsets, with inner nodes behind.
  fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
  ids = {1: _SYNSETS[2], 2: _SYNSETS[0], 3: _SYNSETS[1], 4: "n00000001"}
  synsets = np.array([[(float(i), s, "word")] for i, s in ids.items()], dtype=fields)
  meta = io.BytesIO()
  scipy.io.savemat(meta, {"synsets": synsets})
  truth = b"1\n2\n3\n3\n2\n"
  with tarfile.open(tmp_path / "devkit.tar.gz", "w:gz") as tar:
    add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
    add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)
  expected = [_SYNSETS[i] for i in (2, 0, 1, 1, 0)]
  (tmp_path / "labels.txt").write_text("\n".join(expected) + "\n")
  return tmp_path, expected


@pytest.mark.parametrize("labels", [("--devkit", "devkit.tar.gz"), ("--val-labels", "labels.txt")])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_official_archives(official, labels, workers):
  root, expected = official
  out = root / "out"
  flags = ("--imagenet-train", root / "train.tar", "--imagenet-val", root / "val.tar")
  flags += (labels[0], root / labels[1], "--shards", 4, "--val-shards", 2)
  assert run_prepare("--out", out, *flags, "--workers", workers) == 0
  assert manifest_of(out)["classes"] == _SYNSETS
  words = manifest_of(out)["source"].get("words")
  assert words == (
    dict.fromkeys((*_SYNSETS, "n00000001"), "word") if "--devkit" in labels else None
  )
  train = contents(out)
  assert len(train) == 12
  for n, synset in enumerate(_SYNSETS):
    for i in range(4):
      record = train[f"{synset}_{i}.JPEG"]
      assert (record.label, record.image) == (n, encoded(picture(10 * n + i)))
  val = contents(out, "val")
  assert len(val) == 5
  for i, synset in enumerate(expected):
    record = val[f"ILSVRC2012_val_{i + 1:08d}.JPEG"]
    assert (record.label, record.image) == (_SYNSETS.index(synset), encoded(picture(100 + i)))


def test_validation_alone(official):
  root, _ = official
  flags = ("--imagenet-val", root / "val.tar", "--val-labels", root / "labels.txt")
  assert run_prepare("--out", root / "out", *flags) == 0
  assert len(contents(root / "out", "val")) == 5


def test_what_is_wrong_with_the_official_archives_is_named(official, capsys):
  root, _ = official
  flags = ["--out", root / "out", "--imagenet-val", root / "val.tar"]
  assert "needs --devkit or --val-labels" in failure(capsys, *flags)
  (root / "short.txt").write_text("n01440764\n")
  message = failure(capsys, *flags, "--val-labels", root / "short.txt")
  assert "holds 5 images, but" in message
  assert "labels 1;" in message
  assert "is it ILSVRC2012_devkit_t12" in failure(capsys, *flags, "--devkit", root / "val.tar")
  assert "cannot be read" in failure(capsys, *flags, "--devkit", root / "none.tar.gz")
  assert "cannot be read" in failure(capsys, *flags, "--val-labels", root / "none.txt")
  message = failure(capsys, "--out", root / "out", "--imagenet-train", root / "val.tar")
  assert "holds no tars" in message
  # The train archive is cut off inside its last class.
  data = (root / "train.tar").read_bytes()
  (root / "cut.tar").write_bytes(data[: len(data) // 2])
  message = failure(capsys, "--out", root / "out", "--imagenet-train", root / "cut.tar")
  assert "ends in the middle of" in message
  # A class inside is damaged, the rest is whole.
  torn = bytearray(data)
  at = torn.index(b"n01443537_2.JPEG")
  torn[at : at + 20] = b"\x55" * 20
  (root / "torn.tar").write_bytes(torn)
  message = failure(capsys, "--out", root / "out", "--imagenet-train", root / "torn.tar")
  assert f"torn.tar is damaged at byte {at:,}" in message


def test_the_digits(tmp_path):
  out = tmp_path / "out"
  assert run_prepare("--out", out, "--digits") == 0
  manifest = manifest_of(out)
  assert manifest["classes"] == list("0123456789")
  assert manifest["splits"]["train"]["examples"] == 1437
  assert manifest["splits"]["val"]["examples"] == 360
  assert min(manifest["splits"]["val"]["class_counts"]) >= 35
  assert manifest["splits"]["train"]["problems"] == {}
  train, val = contents(out), contents(out, "val")
  assert not set(train) & set(val)
  record = next(iter(train.values()))
  assert image.decode(record.image).shape == (32, 32, 3)
  assert record.name.endswith(f"_{record.label}.jpeg")


def test_digits_without_scikit_learn_say_what_to_install(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  message = failure(capsys, "--out", tmp_path, "--digits")
  assert "pip install resnet-pod[smoke]" in message
