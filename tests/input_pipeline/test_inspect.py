"""The look at data before a run: what it says, what it shows, and what it finds wrong."""

import contextlib
import pathlib
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from configs import base
from input_pipeline import augment, loader, order, records, rows, sources
from input_pipeline.tools import checksums, contact_sheet, inspect
from tests.input_pipeline import web
from tests.input_pipeline.conftest import (
  data_config,
  encoded,
  make_folder,
  manifest_of,
  picture,
  tfds_folder,
)


@pytest.fixture
def look(tmp_path, capsys):
  """Run the command; return its exit code, its output, and the sentences about problems."""

  def run(path, *flags):
    sheet = "" if any(flag.startswith("--sheet") for flag in flags) else tmp_path / "sheet.png"
    argv = [
      "inspect",
      f"--data={path}",
      "--images=8",
      *flags,
      *([f"--sheet={sheet}"] if sheet else []),
    ]
    capsys.readouterr()
    code = inspect.main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    sentences = err.splitlines()
    assert all(s.startswith("inspect: ") and s[-1] in ".?" for s in sentences), err
    return code, out, sentences

  return run


@pytest.fixture
def copied(shards, tmp_path):
  """A copy of the shards to be damaged."""
  return shutil.copytree(shards, tmp_path / "copied")


def flip(path: pathlib.Path, at: int) -> None:
  """Flips one bit of a file."""
  data = bytearray(path.read_bytes())
  data[at] ^= 1
  path.write_bytes(data)


def test_what_is_in_shards(look, shards):
  code, out, wrong = look(shards)
  assert (code, wrong) == (0, [])
  size = sum(s["bytes"] for s in manifest_of(shards)["splits"]["train"]["shards"]) / 2**20
  assert f"train: 23 records of 3 classes, {size:.1f} MiB in 3 shards" in out
  assert "7 to 8 records each, median 8\n             c (2): 7, a (0): 8, b (1): 8" in out
  assert "val: 11 records of 3 classes" in out
  assert out.count("least 40, 5 % 40, median 40, 95 % 40, most 40 pixels") == 2
  assert "JPEG 23 (100.0%)" in out
  assert "3 of 3 shards intact (SHA-256)" in out
  assert "1 of 1 shard intact (SHA-256)" in out


def test_a_sample_says_what_it_is(look, shards):
  code, out, _ = look(shards, "--split=train", "--sample=5", "--nocheck")
  assert code == 0
  assert "JPEG 5 (100.0%), of 5 that were decoded" in out
  assert "c (2): 7, a (0): 8, b (1): 8" in out  # all the same, the manifest knows
  assert "SHA-256" not in out
  assert "val" not in out


def test_a_folder_and_odd_images(look, tmp_path):
  root = make_folder(tmp_path / "f", {"train": {"a": 3, "b": 1}, "val": {"a": 1, "b": 1}})
  (root / "train" / "b" / "b_001.JPEG").write_bytes(encoded(picture(0), "PNG", "L"))
  code, out, wrong = look(root)
  assert (code, wrong) == (0, [])
  assert "JPEG 4 (80.0%), PNG 1 (20.0%)" in out
  assert "greyscale 1 (20.0%)" in out
  assert "not what its name says 1 (20.0%)" in out
  assert "checksums  none; 5 (100.0%) records could be read" in out
  (root / "train" / "a" / "a_001.JPEG").write_bytes(b"junk")
  code, out, wrong = look(root)
  assert code == 1
  (sentence,) = wrong
  assert "1 of the 5 records of train that were read are bad" in sentence
  assert "train/a/a_001.JPEG: is no JPEG" in sentence


def test_synthetic_data(look):
  code, out, _ = look("", "--config.data.kind=synthetic", "--config.data.synthetic_examples=20")
  assert code == 0
  assert "train: 20 records of 1,000 classes" in out


def shown(sheet, section, places):
  """Return the images of a section that are on a picture, uint8 [n, size, size, 3]."""
  size = section.images.shape[1]
  zoom = max(1, 112 // size)
  pixels = np.asarray(sheet)
  return np.stack(
    [
      pixels[top : top + size * zoom : zoom, left : left + size * zoom : zoom]
      for left, top in places
    ]
  )


@pytest.mark.parametrize("size", [32, 120])
def test_the_picture_shows_the_batches_of_the_run(look, shards, tmp_path, size):
  flags = [
    f"--config.data.{name}={size}" for name in ("image_size", "eval_image_size", "eval_resize")
  ]
  code, out, _ = look(shards, *flags, "--config.seed=3")
  assert code == 0
  assert "sheet.png: images with their labels" in out

  config = base.get_config()
  config.seed = 3
  config.data.update(path=str(shards), image_size=size, eval_image_size=size, eval_resize=size)
  train, val = (sources.open_source(config.data, split, 3) for split in ("train", "val"))
  # As the trainer asks for them, in batches of another size.
  batches = loader.train_batches(train, config.data, seed=3, global_batch_size=4)
  with contextlib.closing(batches):
    expected = [next(batches) for _ in range(2)]
  images, labels = (np.concatenate([b[k] for b in expected]) for k in ("image", "label"))
  with contextlib.closing(loader.eval_batches(val, config.data, batch_size=11)) as batches:
    evaluated = next(batches)

  sections = [
    contact_sheet.training_section(train, config, 8),
    contact_sheet.evaluation_section(val, config, 8),
  ]
  drawn, places = contact_sheet.draw(sections)
  with Image.open(tmp_path / "sheet.png") as sheet:
    np.testing.assert_array_equal(np.asarray(sheet), np.asarray(drawn))
    np.testing.assert_array_equal(shown(sheet, sections[0], places[0]), images)
    spread = evaluated["image"][[0, 1, 2, 4, 5, 7, 8, 10]]
    np.testing.assert_array_equal(shown(sheet, sections[1], places[1]), spread)
  assert sections[0].captions == [f"{'abc'[label]} ({label})" for label in labels]
  assert sections[1].captions[0] == f"{'abc'[evaluated['label'][0]]} ({evaluated['label'][0]})"


def test_views_are_those_of_the_run_and_name_their_steps(look, shards):
  spec = "timm_rand_augment(m=7, p=1.0)|tests.input_pipeline.test_augment:shifted(most=3)"
  assert look(shards, f"--config.data.operations={spec}", "--config.data.image_size=32")[0] == 0
  config = base.get_config()
  config.data.update(path=str(shards), image_size=32, operations=spec, crop="none")
  train = sources.open_source(config.data, "train", 3)
  section = contact_sheet.views_section(train, config, 2)
  assert spec in section.title
  assert len(section.images) == len(section.captions) == 16
  assert all(caption.count(", ") == 2 for caption in section.captions)
  assert all(caption.endswith(", shifted") for caption in section.captions)
  draws, operations = rows.Draws(order.seeds(config.seed)[1]), augment.parse(spec)
  for i, view in enumerate(section.images[8:]):  # of the last record
    rng = draws.of(i * len(train) + len(train) - 1)
    expected = rows.crop_of(config.data)(train[len(train) - 1].image, rng, 32)
    augment.apply(operations, expected, rng)
    np.testing.assert_array_equal(view, expected)
  assert len({view.tobytes() for view in section.images}) == 16


def test_a_caption_is_red_where_another_image_is_shown():
  images = np.full((2, 16, 16, 3), 77, np.uint8)
  section = contact_sheet.Section("title", images, ["good (0)", "x" * 99], np.array([False, True]))
  sheet, ((good, bad),) = contact_sheet.draw([section])
  pixels = np.asarray(sheet).astype(int)

  def caption(place):
    left, top = place
    return pixels[top + 112 : top + 112 + 18, left : left + 112]

  def red(part):
    return (part[..., 0] > part[..., 1] + 100).any()

  assert red(caption(bad))
  assert not red(caption(good))
  assert (caption(good) < 100).any()
  assert (pixels[:, bad[0] + 112 + 8 :] == 255).all()  # cut where the next image would be


@pytest.mark.parametrize("at", [5000, -1])
def test_a_damaged_shard_is_named(look, copied, at):
  # In the middle of a record, and in the very last byte, which no record holds.
  flip(copied / records.shard_name("train", 1, 3), at)
  code, out, wrong = look(copied)
  assert code == 1
  assert "2 of 3 shards intact (SHA-256)" in out
  assert "1 of 1 shard intact (SHA-256)" in out
  sentences = [s for s in wrong if "its SHA-256 differs" in s]
  assert len(sentences) == 1
  assert "train-00001-of-00003.array_record is not what was written" in sentences[0]
  assert not [s for s in wrong if "00000-of" in s or "00002-of" in s]


def test_a_shard_that_is_no_longer_one_is_named(look, copied):
  shard = copied / records.shard_name("train", 1, 3)
  shard.write_bytes(bytes(shard.stat().st_size))
  code, _, wrong = look(copied, "--nocheck")
  assert code == 1
  assert any("train-00001-of-00003.array_record is damaged or no ArrayRecord" in s for s in wrong)


def test_a_missing_shard_is_named(look, copied):
  (copied / records.shard_name("train", 1, 3)).unlink()
  code, _, wrong = look(copied)
  assert code == 1
  (sentence,) = wrong
  assert "train-00001-of-00003.array_record is missing" in sentence


def test_a_shard_that_vanishes_meanwhile_is_named(copied):
  source, done = sources.open_source(data_config(copied), "train", 3), []
  (copied / source.shards[1].name).unlink()
  (sentence,) = checksums.verify(source.folder, source.shards, done.append)
  assert "train-00001-of-00003.array_record cannot be read (No such file" in sentence
  assert sum(done) == sum(shard.size for shard in source.shards)


def test_records_of_tfds_are_checked_by_reading_them(look, tmp_path):
  root = tfds_folder(tmp_path / "tfds")
  code, out, wrong = look(root, "--sample=1")
  assert (code, wrong) == (0, [])
  assert "train: 5 records of 2 classes" in out
  assert "y (1): 2, x (0): 3" in out
  assert "checksums  none; 5 (100.0%) records could be read" in out
  shard = root / "imagenet2012-train.array_record-00001-of-00002"
  flip(shard, shard.read_bytes().index(encoded(picture(4))[-200:-100]))
  code, out, wrong = look(root, "--sample=1")
  assert code == 1
  (sentence,) = wrong
  assert "1 of the 5 records of train" in sentence
  assert "imagenet2012-train.array_record-00001-of-00002[1]: cannot be read (Corrupted" in sentence
  assert "none; 4 (80.0%) records could be read" in out


@pytest.fixture
def server(copied, monkeypatch):
  """A web server of the copied shards, taken for Google's."""
  with web.Server(copied) as started:
    for key, value in started.environment().items():
      monkeypatch.setenv(key, value)
    yield started


@pytest.mark.parametrize("scheme", ["http", "gs", "file"])
def test_shards_that_are_elsewhere_are_checked_there(look, copied, server, scheme, monkeypatch):
  monkeypatch.setattr(checksums, "_PIECE", 50_000)
  url = {"http": server.url, "gs": "gs://bucket", "file": f"file://{copied}"}[scheme]
  lanes = "--config.data.stream_lanes=2"
  code, out, wrong = look(url, lanes)
  assert (code, wrong) == (0, [])
  assert out.replace(url, str(copied)) == look(copied)[1]
  flip(copied / records.shard_name("train", 2, 3), 70_000)
  code, out, wrong = look(url, lanes)
  assert code == 1
  assert "2 of 3 shards intact (SHA-256)" in out
  assert any(f"{url}/train-00002-of-00003.array_record is not what was written" in s for s in wrong)


def test_records_of_tfds_in_a_bucket_are_read_with_their_neighbours(look, tmp_path):
  root = tfds_folder(tmp_path / "tfds")
  flip(
    root / "imagenet2012-validation.array_record-00000-of-00001",
    (root / "imagenet2012-validation.array_record-00000-of-00001")
    .read_bytes()
    .index(encoded(picture(5))[-200:-100]),
  )
  with web.Server(root) as server:
    code, out, (sentence,) = look(server.url, "--sheet=")
    requests = server.counts["requests"]
  assert code == 1
  assert "train: 5 records of 2 classes" in out
  assert "none; 5 (100.0%) records could be read" in out
  assert "none; 1 (50.0%) records could be read" in out
  assert "imagenet2012-validation.array_record-00000-of-00001[0]: cannot be read" in sentence
  # Of each split three small files; of each shard its size and index, and its records together.
  assert requests <= 2 * 4 + 3 * 3


def test_a_shard_that_vanishes_from_a_bucket_is_named(copied, server):
  data = data_config(server.url)
  source = sources.open_source(data, "train", 3)
  (copied / source.shards[1].name).unlink()
  (sentence,) = checksums.verify(source.folder, source.shards, lambda size: None)
  assert f"{server.url}/train-00001-of-00003.array_record is missing" in sentence


def test_a_server_that_does_not_answer_is_named(look):
  code, _, (sentence,) = look("http://127.0.0.1:9/x", "--config.data.stream_give_up_seconds=0.5")
  assert code == 1
  assert "http://127.0.0.1:9/x/manifest.json could not be read within" in sentence


def test_parquet_is_refused_with_advice(look):
  code, _, (sentence,) = look("hf:imagenet-1k")
  assert code == 1
  assert "hf:imagenet-1k has neither checksums" in sentence
  assert "prepare --from" in sentence


def test_a_config_for_another_number_of_classes_is_refused(look, shards):
  config = pathlib.Path(base.__file__).with_name("smoke.py")
  code, _, (sentence,) = look(shards, f"--config={config}")
  assert code == 1
  assert "has 3 classes, but config.model.num_classes is 10" in sentence


def test_a_value_out_of_range_is_named_before_anything_is_read(look, shards):
  code, out, (sentence,) = look(shards, "--config.data.crop_area=(0.5,0.1)")
  assert (code, out) == (2, "")
  assert "config.data.crop_area must be (min, max) in (0, 1]" in sentence
  assert "it is [0.5, 0.1]" in sentence


@pytest.mark.parametrize(
  ("path", "flags", "says"),
  [
    ("", [], "--data=DIR_OR_URL is needed"),
    ("x", ["y"], "'y' is not a flag"),
    ("x", ["--sample=-1"], "--sample=-1 must be at least 0"),
    ("x", ["--images=0"], "--images=0 must be at least 1"),
    ("x", ["--nonsense"], "Unknown command line flag 'nonsense'"),
    ("x", ["--config.data.nonsense=1"], "config.data.nonsense is not a field"),
    ("x", ["--config.data.image_size=big"], "image_size must be a whole number; it is 'big'"),
    ("x", ["--config=no_such.py"], "The run file no_such.py does not exist"),
    ("x", ["--sheet=picture.gif"], "--sheet=picture.gif must end in .png"),
    ("x", ["--sheet=/no/such/sheet.png"], "in a folder that does not exist"),
  ],
)
def test_a_wrong_command_line_is_told_in_a_sentence(look, path, flags, says):
  code, out, (sentence,) = look(path, *flags)
  assert (code, out) == (2, "")
  assert says in sentence


def test_the_command(shards, tmp_path):
  command = [sys.executable, "-m", "input_pipeline.inspect", f"--data={shards}", "--images=4"]
  environment = {"PYTHONPATH": str(pathlib.Path(inspect.__file__).parents[2])}
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
  assert (done.returncode, done.stderr) == (0, "")
  assert "train: 23 records" in done.stdout
  assert (tmp_path / "contact_sheet.png").exists()
  done = subprocess.run([*command[:3], "--help"], capture_output=True, text=True, env=environment)
  assert done.returncode == 0
  assert "--[no]check" in done.stdout and "--undefok" not in done.stdout
  assert max(map(len, done.stdout.splitlines())) <= 100
