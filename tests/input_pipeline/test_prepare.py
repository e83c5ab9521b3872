"""What prepare writes, and how it survives whatever stops it."""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import psutil
import pytest

from input_pipeline import image, records
from input_pipeline.prepare import __main__ as prepare
from input_pipeline.prepare import output as outputs
from input_pipeline.prepare import progress
from input_pipeline.prepare import shards as shards_lib
from tests.input_pipeline.conftest import (
  contents,
  encoded,
  failure,
  hashes,
  make_folder,
  manifest_of,
  picture,
  rotated,
  run_prepare,
)

ONE = ("--allow", "one_class")


def test_the_untouched_files_come_back_in_another_order(folder, shards):
  made = contents(shards)
  assert len(made) == 23
  for name, record in made.items():
    assert record.image == (folder / "train" / name).read_bytes()
    assert name.startswith("abc"[record.label])
  assert list(made) != sorted(made)


def test_the_manifest_says_what_there_is(shards):
  manifest = manifest_of(shards)
  assert manifest["format_version"] == 1
  assert manifest["classes"] == ["a", "b", "c"]
  assert manifest["source"]["kind"] == "folder"
  assert (manifest["seed"], manifest["max_size"], manifest["checksum"]) == (0, 0, "sha256")
  train = manifest["splits"]["train"]
  assert train["examples"] == 23
  assert train["class_counts"] == [8, 8, 7]
  assert train["problems"] == {}
  assert [s["file"] for s in train["shards"]] == [
    records.shard_name("train", i, 3) for i in range(3)
  ]
  assert [s["examples"] for s in train["shards"]] == [8, 8, 7]
  for split in manifest["splits"].values():
    for shard in split["shards"]:
      data = (shards / shard["file"]).read_bytes()
      assert len(data) == shard["bytes"]
      assert hashlib.sha256(data).hexdigest() == shard["sha256"]


def test_workers_do_not_change_a_byte_and_seeds_do(folder, shards, tmp_path):
  flags = ("--folder", folder, "--shards", 3)
  assert run_prepare("--out", tmp_path / "two", *flags, "--workers", 2) == 0
  assert hashes(tmp_path / "two") == hashes(shards)
  assert run_prepare("--out", tmp_path / "seed", *flags, "--seed", 1) == 0
  assert contents(tmp_path / "seed") == contents(shards)
  assert list(contents(tmp_path / "seed")) != list(contents(shards))


def test_finished_shards_are_kept_and_torn_ones_made_again(folder, shards, tmp_path, capsys):
  out = shutil.copytree(shards, tmp_path / "out")
  expected = hashes(out)
  names = [records.shard_name("train", i, 3) for i in range(3)]
  kept_time = (out / names[0]).stat().st_mtime_ns
  with open(out / names[1], "r+b") as f:  # cut off
    f.truncate(1000)
  with open(out / names[2], "r+b") as f:  # a flipped byte, size as before
    f.seek(70_000)
    f.write(b"\x55")
  (out / records.shard_name("val", 0, 1)).unlink()
  (out / f".{names[1]}.1234.tmp").write_bytes(b"left by a run that was killed")
  (out / records.MANIFEST).unlink()
  assert run_prepare("--out", out, "--folder", folder, "--shards", 3) == 0
  assert "kept 1 finished shards, made 3" in capsys.readouterr().out
  assert hashes(out) == expected
  assert (out / names[0]).stat().st_mtime_ns == kept_time


def test_other_options_over_existing_shards_are_refused(folder, shards, tmp_path, capsys):
  out = shutil.copytree(shards, tmp_path / "out")
  flags = ("--out", out, "--folder", folder)
  assert "seed=0 instead of 5;" in failure(capsys, *flags, "--shards", 3, "--seed", 5)
  assert "max_size=0 instead of 20" in failure(capsys, *flags, "--shards", 3, "--max-size", 20)
  assert "{'train': 3, 'val': 1} instead of {'train': 2, " in failure(capsys, *flags, "--shards", 2)
  other = make_folder(tmp_path / "other", {"train": {"a": 1, "b": 1, "c": 1}})
  assert "other images" in failure(capsys, "--out", out, "--folder", other)
  assert hashes(out) == hashes(shards)
  assert run_prepare(*flags, "--shards", 2, "--overwrite") == 0
  assert len(list(out.glob("train-*"))) == 2
  assert len(contents(out)) == 23


def test_shards_of_an_unknown_origin_are_refused(folder, tmp_path, capsys):
  (tmp_path / records.shard_name("train", 0, 9)).write_bytes(b"mine")
  (tmp_path / "notes.txt").write_text("also mine")
  assert "--overwrite to delete them" in failure(capsys, "--out", tmp_path, "--folder", folder)
  assert run_prepare("--out", tmp_path, "--folder", folder, "--overwrite") == 0
  assert not (tmp_path / records.shard_name("train", 0, 9)).exists()
  assert (tmp_path / "notes.txt").exists()


def test_two_runs_in_one_folder_are_refused(folder, tmp_path, capsys):
  with prepare._locked(outputs.open_output(str(tmp_path))):
    message = failure(capsys, "--out", tmp_path, "--folder", folder)
  assert "another prepare is writing to" in message


@pytest.fixture
def odd_folder(tmp_path):
  """One class of every oddity, of which three are no images."""
  files = {
    "plain.JPEG": encoded(picture(0)),
    "grey.JPEG": encoded(picture(1), mode="L"),
    "cmyk.JPEG": encoded(picture(2), mode="CMYK"),
    "png.JPEG": encoded(picture(3), "PNG"),
    "real.png": encoded(picture(4), "PNG"),
    "rotated.JPEG": rotated(picture(5)),
    "one_pixel.JPEG": encoded(picture(6, 1, 1)),
    "junk_inside.JPEG": damaged(encoded(picture(7, 200, 200))),
    "empty.JPEG": b"",
    "truncated.JPEG": encoded(picture(8))[:-300],
    "text.JPEG": b"no image at all",
  }
  root = make_folder(tmp_path / "odd", {"train": {"a": 0}})
  for name, data in files.items():
    (root / "train" / "a" / name).write_bytes(data)
  (root / "train" / "a" / "notes.txt").write_text("not an image")
  return root, files


def damaged(data: bytes) -> bytes:
  """Put a marker into the coded pixels, for which libjpeg warns and continues."""
  return data[: len(data) // 2] + b"\xff\xd5" + data[len(data) // 2 :]


def test_odd_images_are_listed_and_only_undecodable_ones_left_out(odd_folder, tmp_path, capsys):
  root, files = odd_folder
  assert run_prepare("--out", tmp_path / "out", "--folder", root, *ONE) == 0
  train = manifest_of(tmp_path / "out")["splits"]["train"]
  assert train["problems"] == {
    "cmyk": ["a/cmyk.JPEG"],
    "damaged_but_decodable": ["a/junk_inside.JPEG"],
    "exif_rotated": ["a/rotated.JPEG"],
    "greyscale": ["a/grey.JPEG"],
    "not_what_its_name_says": ["a/png.JPEG"],
    "undecodable": ["a/empty.JPEG", "a/text.JPEG", "a/truncated.JPEG"],
  }
  assert train["examples"] == 8
  assert train["reasons"]["a/empty.JPEG"] == "zero bytes"
  made = contents(tmp_path / "out")
  assert sorted(made) == sorted(
    f"a/{name}" for name in set(files) - {"empty.JPEG", "text.JPEG", "truncated.JPEG"}
  )
  for name, record in made.items():
    assert record.image == files[name.removeprefix("a/")]
    assert image.decode(record.image).shape[2] == 3
  out = capsys.readouterr().out
  assert "ignored 1 file" in out
  assert "undecodable: 3 (LEFT OUT), for example a/empty.JPEG" in out
  assert "    a/truncated.JPEG: OSError: image file is truncated" in out


def test_max_size_shrinks_only_what_is_larger(tmp_path, capsys):
  files = {
    "large.JPEG": encoded(picture(0, 120, 90)),
    "large.png": encoded(picture(1, 64, 200), "PNG"),
    "exact.JPEG": encoded(picture(2, 32, 100)),
    "small.JPEG": encoded(picture(3, 20, 300)),
  }
  root = make_folder(tmp_path / "f", {"train": {"a": 0}})
  for name, data in files.items():
    (root / "train" / "a" / name).write_bytes(data)
  assert run_prepare("--out", tmp_path / "out", "--folder", root, *ONE, "--max-size", 32) == 0
  made = contents(tmp_path / "out")
  assert made["a/exact.JPEG"].image == files["exact.JPEG"]
  assert made["a/small.JPEG"].image == files["small.JPEG"]
  for name, size in {"large.JPEG": (32, 43), "large.png": (100, 32)}.items():
    shrunk = Image.open(io.BytesIO(made[f"a/{name}"].image))
    assert (shrunk.format, shrunk.size) == ("JPEG", size)
    original = Image.fromarray(image.decode(files[name])).resize(size, Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(shrunk).astype(int) - np.asarray(original))
    assert difference.mean() < 3
  assert manifest_of(tmp_path / "out")["splits"]["train"]["reencoded"] == 2
  assert "2 shrunk to 32 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    ((), "give exactly one of"),
    (("--digits", "--folder", "x"), "give exactly one of"),
    (("--digits", "--val-labels", "x"), "label --imagenet-val, which is not given"),
    (("--imagenet-val", "x", "--val-labels", "y", "--devkit", "z"), "not both"),
    (("--digits", "--max-size", "-1"), "--max-size must not be negative"),
    (("--folder", "/no/such"), "--folder /no/such is not a folder"),
    (("--folder", "gs://b/x"), "is not a folder: give parquet as --from, and copy images"),
    (("--from", "photos"), "parquet begins with hf:, as hf:photos. Images are given as --folder"),
    (("--digits", "--shards", "9999"), "9999 shards are more than the 1437 images of train"),
  ],
)
def test_flags_that_do_not_fit_are_named(tmp_path, capsys, flags, says):
  assert says in failure(capsys, "--out", tmp_path / "out", *flags)


def test_the_folder_of_the_images_is_no_output(folder, capsys):
  assert "--out is" in failure(capsys, "--out", f"{folder}/", "--folder", folder)


def test_a_split_that_is_not_there_is_named_with_the_flag(folder, tmp_path, capsys):
  said = failure(capsys, "--out", tmp_path / "o", "--folder", folder, "--split", "val=more")
  assert "has no split 'more', only train, val; give one of those to --split val=NAME." in said


def test_an_output_that_cannot_be_made_is_named(tmp_path, capsys):
  (tmp_path / "file").write_text("x")
  assert "file: File exists" in failure(capsys, "--out", tmp_path / "file", "--digits")


def test_nothing_but_undecodable_images_is_an_error(tmp_path, capsys):
  root = make_folder(tmp_path / "f", {"train": {"a": 1}})
  (root / "train" / "a" / "a_000.JPEG").write_bytes(b"")
  message = failure(capsys, "--out", tmp_path / "out", "--folder", root, *ONE)
  assert "not one image of train can be decoded" in message
  assert not (tmp_path / "out" / records.MANIFEST).exists()


def test_too_little_room_is_said_before_the_work(folder, tmp_path, capsys, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  message = failure(capsys, "--out", tmp_path / "out", "--folder", folder)
  assert "0.0 GiB free, but the shards need" in message


def test_a_source_that_shrinks_meanwhile_is_named(folder, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(os, "pread", lambda fd, size, offset: b"short")
  assert "changed while it was read" in failure(capsys, "--out", tmp_path / "o", "--folder", folder)


def command(*flags):
  return [sys.executable, "-m", "input_pipeline.prepare", *(str(f) for f in flags)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_sentence_and_no_torn_shard(folder, tmp_path, workers):
  # A limit on the size of files fails in the same calls as a full disk, and needs no such disk.
  program = (
    "import resource, signal, sys\n"
    "from input_pipeline.prepare import __main__ as prepare\n"
    "if __name__ == '__main__':\n"
    "  resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))\n"
    "  sys.exit(prepare.main())\n"
  )
  (tmp_path / "limited.py").write_text(program)
  flags = ["--folder", folder, "--out", tmp_path / "out", "--workers", workers, "--shards", 3]
  run = [sys.executable, str(tmp_path / "limited.py"), *map(str, flags)]
  environment = os.environ | {"PYTHONPATH": os.getcwd()}
  done = subprocess.run(run, capture_output=True, text=True, env=environment, check=False)
  assert done.returncode == 1
  assert "cannot be written (" in done.stderr
  assert "File too large" in done.stderr
  assert "Traceback" not in done.stderr
  left = os.listdir(tmp_path / "out")
  assert left == [".journal"]
  assert run_prepare(*flags[:4], "--shards", 3) == 0
  assert len(contents(tmp_path / "out")) == 23


def test_the_command_from_beginning_to_end(folder, shards, tmp_path):
  run = command("--folder", folder, "--out", tmp_path / "out", "--shards", 3)
  done = subprocess.run(run, capture_output=True, text=True, check=True)
  assert done.stderr == ""
  assert "train: 23 records in 3 shards" in done.stdout
  assert "7 to 8 of each of 3 classes" in done.stdout
  assert hashes(tmp_path / "out") == hashes(shards)


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_is_plain_lines_in_a_log(folder, tmp_path, capsys, monkeypatch, workers):
  monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
  assert run_prepare("--folder", folder, "--out", tmp_path / "out", "--workers", workers) == 0
  lines = [line for line in capsys.readouterr().out.splitlines() if " of 34 images, " in line]
  assert lines[-1].startswith("34 of 34 images, ")
  assert lines[-1].endswith("/s, 0 min left")


def test_help_explains_max_size():
  done = subprocess.run(command("--help"), capture_output=True, text=True, check=True)
  assert "quality 95" in " ".join(done.stdout.split())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_behind_and_goes_on(tmp_path, how):
  root = make_folder(tmp_path / "f", {"train": {"a": 0, "b": 0}})
  large = encoded(np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8))
  for i in range(480):
    (root / "train" / "ab"[i % 2] / f"{i}.JPEG").write_bytes(large)
  flags = ("--folder", root, "--out", tmp_path / "out", "--shards", 24, "--workers", 2)
  # A group of its own, as a terminal gives it: Ctrl-C reaches the workers as well.
  process = subprocess.Popen(
    command(*flags),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
    # Tests that run in the background ignore SIGINT, and their children would inherit that.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
  )
  journal = tmp_path / "out" / shards_lib.JOURNAL
  deadline = time.monotonic() + 60
  while len(list(journal.glob("train-*.json"))) < 2 and time.monotonic() < deadline:
    time.sleep(0.02)
  family = psutil.Process(process.pid).children(recursive=True)
  assert family
  if how == signal.SIGINT:
    os.killpg(process.pid, how)
  else:
    process.send_signal(how)
  _, errors = process.communicate(timeout=60)
  _, alive = psutil.wait_procs(family, timeout=10)
  assert not alive
  finished = {f.name for f in (tmp_path / "out").glob("train-*")}
  assert 2 <= len(finished) < 24
  if how != signal.SIGKILL:
    assert process.returncode == 130
    assert "the same command resumes" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "out").glob("*.tmp"))
  assert not (tmp_path / "out" / records.MANIFEST).exists()
  done = subprocess.run(command(*flags), capture_output=True, text=True, check=True)
  assert "finished shards, made" in done.stdout
  assert len(contents(tmp_path / "out")) == 480
  assert not list((tmp_path / "out").glob(".*.tmp"))
  assert run_prepare("--folder", root, "--out", tmp_path / "one", "--shards", 24) == 0
  assert hashes(tmp_path / "one") == hashes(tmp_path / "out")


def test_a_killed_worker_is_a_sentence(tmp_path):
  root = make_folder(tmp_path / "f", {"train": {"a": 0}})
  large = encoded(np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8))
  for i in range(200):
    (root / "train" / "a" / f"{i}.JPEG").write_bytes(large)
  flags = ("--folder", root, "--out", tmp_path / "out", "--shards", 4, "--workers", 2, *ONE)
  process = subprocess.Popen(
    command(*flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  deadline = time.monotonic() + 60
  while not (torn := list((tmp_path / "out").glob(".*.tmp"))) and time.monotonic() < deadline:
    time.sleep(0.02)
  os.kill(int(torn[0].name.split(".")[-2]), signal.SIGKILL)  # its name carries the process
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 1
  assert "a worker process was killed" in errors
  assert not list((tmp_path / "out").glob(".*.tmp"))


def test_the_real_originals_can_be_prepared(originals, tmp_path):
  assert run_prepare("--folder", originals, "--out", tmp_path, "--max-size", 256) == 0
  train = manifest_of(tmp_path)["splits"]["train"]
  assert train["examples"] == 200
  assert "undecodable" not in train["problems"]
  for record in contents(tmp_path).values():
    assert min(image.decode(record.image).shape[:2]) <= 256
