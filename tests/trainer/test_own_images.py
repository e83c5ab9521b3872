"""A folder of one's own images, from its first screen to an evaluation by the workdir alone."""

import json
import re
import shutil
import signal
import sys
import threading

import ml_collections
import numpy as np
import pytest
import simplejpeg

from configs import own_images
from input_pipeline import sources
from input_pipeline.errors import DataError
from input_pipeline.prepare import __main__ as prepare
from input_pipeline.sources import layout
from tests.trainer import tiny
from tests.trainer.shared import StopAt, call
from trainer import __main__ as command
from trainer import command_line
from trainer import config as config_lib
from trainer import data as data_lib
from trainer import train as train_lib
from trainer.errors import DONE, FAILED, Preempted
from trainer.reporting import report
from trainer.workdir import saved

CLASSES = [f"class{i}" for i in range(6)]


def write_images(folder, classes=CLASSES, count=12):
  rng = np.random.default_rng(0)
  for name in classes:
    (folder / name).mkdir(parents=True)
    for i in range(count):
      pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
      (folder / name / f"{i}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))
  return folder


def own_config(folder):
  config = tiny.get_config()
  config.model.num_classes = 0
  config.data.path, config.data.val_fraction = str(folder), 0.25
  config.eval.every_steps = 5
  return config


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
  """A workdir with checkpoints 5 and 10, and what `train` has returned."""
  workdir = tmp_path_factory.mktemp("runs") / "own"
  return workdir, train_lib.train(own_config(images), str(workdir))


def evaluate(workdir, *flags):
  """Return the exit code of --mode=eval and what it has written."""
  for name in list(command_line.FLAGS):
    if not name.startswith("config."):
      command_line.FLAGS[name].unparse()
  sys.modules.pop("config_config", None)
  (workdir / "eval.json").unlink(missing_ok=True)
  code = call(command.main, "trainer", "--mode=eval", f"--workdir={workdir}", *flags)
  written = workdir / "eval.json"
  return code, json.loads(written.read_text()) if written.exists() else None


def test_a_share_of_each_class_is_held_out_by_name(images):
  data = own_config(images).data
  train, val = (sources.open_source(data, split, None) for split in ("train", "val"))
  assert train.class_names == val.class_names == tuple(CLASSES)
  assert train.class_counts == [9] * 6 and val.class_counts == [3] * 6
  names = [{source[i].name for i in range(len(source))} for source in (train, val)]
  assert not names[0] & names[1] and len(names[0] | names[1]) == 72
  assert "18 of 72 images are held out of train as val" in train.notes
  data.val_seed = 1
  other = sources.open_source(data, "val", None)
  assert {other[i].name for i in range(18)} != names[1]
  data.val_fraction = 0.0
  with pytest.raises(DataError, match=r"no split 'val', only train; .*val_fraction=0\.1"):
    sources.open_source(data, "val", None)


def test_prepare_holds_out_the_same(images, tmp_path):
  flags = ["--folder", str(images), "--out", str(tmp_path), "--workers=1", "--val-fraction=0.25"]
  assert prepare.main(flags) == 0
  data = own_config(tmp_path).data
  direct = own_config(images).data
  for split in ("train", "val"):
    shards, folder = (sources.open_source(d, split, None) for d in (data, direct))
    found = [{(x[i].image, x[i].label) for i in range(len(x))} for x in (shards, folder)]
    assert found[0] == found[1]
  # Of shards and a folder that have a val, nothing is held out.
  assert len(sources.open_source(data, "train", None)) == 54


@pytest.mark.parametrize("flags", [["--digits", "--val-fraction=0.1"], ["--val-fraction=1"]])
def test_prepare_refuses_a_share_of_nothing(flags, images, tmp_path, capsys):
  flags = flags if "--digits" in flags else [*flags, "--folder", str(images)]
  assert prepare.main([*flags, "--out", str(tmp_path)]) == 1
  assert "--val-fraction is" in capsys.readouterr().err


def listed(**counts):
  return [layout.Entry(f"{name}/{i}.jpg") for name, count in counts.items() for i in range(count)]


def test_the_choice_hardly_moves_when_images_are_added():
  def held(count):
    contents = layout.hold_out(layout.arrange(listed(a=count, b=10), "x"), 0.2, 7)
    return {image.name for image in contents.splits["val"]["a"]}

  before, after = held(100), held(110)
  assert len(before) == 20 and len(after) == 22
  assert len(before & after) >= 16
  assert held(2) != set() and len(held(2)) == 1 and len(held(3)) == 1
  with pytest.raises(DataError, match="the class a has one image"):
    held(1)


def test_a_val_of_its_own_stays():
  entries = [layout.Entry(f"{split}/a/{i}.jpg") for split in ("train", "valid") for i in range(4)]
  contents = layout.arrange(entries, "x")
  assert layout.hold_out(contents, 0.5, 0) is contents


def test_the_number_of_classes_is_that_of_the_data(images, finished):
  workdir, final = finished
  assert json.loads((workdir / "config.json").read_text())["model"]["num_classes"] == 6
  assert final["examples"] == 18 and final["step"] == 10
  config = own_config(images)
  assert data_lib.with_classes(config).model.num_classes == 6 and config.model.num_classes == 0
  config_lib.validate(own_images.get_config())
  assert train_lib.train(config, str(workdir)) == final  # a start with 0 again is the same run


def test_the_first_screen_is_ten_lines_and_the_rest_a_file(images, finished, caplog, tmp_path):
  caplog.set_level("INFO")
  shutil.copytree(finished[0], tmp_path / "run")
  config = own_config(images)
  config.log.every_steps = 3
  train_lib.train(config, str(tmp_path / "run"), verbose=True)
  texts = [record.getMessage() for record in caplog.records]
  (screen,) = [text for text in texts if text.startswith("This run:")]
  (details,) = [text for text in texts if text.startswith("  config.")]
  lines = screen.splitlines()
  assert len(lines) == 10 and max(map(len, lines)) < 240
  for word, line in zip(
    ["model", "data", "order", "length", "decay", "devices", "config", "changed", "writes to"],
    lines[1:],
    strict=True,
  ):
    assert line.split("  ")[1].strip().startswith(word)
  assert "54 to train, 18 to evaluate" in screen and f"{tmp_path / 'run'}" in lines[-1]
  assert "since the last start log.every_steps: 1 -> 3" in screen
  assert "data.eval_image_size=16" in lines[7] and re.search(r"and \d+ more", lines[7])
  assert "config.log.every_steps=3 (default 100)" in details and "stem_conv/kernel" in details
  file = (finished[0] / "overview.txt").read_text()
  assert file.splitlines()[0] == "This run:" and details.splitlines()[-3] in file
  assert "config.log.every_steps=1 (default 100)" in file and "the first start" in file


def test_a_batch_that_is_larger_than_the_data_gets_a_word(images, tmp_path, caplog):
  config = own_config(images)
  config.global_batch_size = 64
  with pytest.raises(Preempted, match="before the first step"):
    train_lib.train(config, str(tmp_path), StopAt(1))
  assert "global_batch_size is 64, more than the 54 examples of train" in caplog.text


def test_an_evaluation_needs_the_workdir_alone(finished, caplog):
  workdir, final = finished
  caplog.set_level("INFO")
  code, found = evaluate(workdir)
  assert code == DONE and found["step"] == 10
  assert {name: found[name] for name in ("top1", "loss", "examples")} == pytest.approx(
    {name: final[name] for name in ("top1", "loss", "examples")}
  )
  assert f"Result: {workdir}/eval.json" in caplog.text
  assert evaluate(workdir, "--checkpoint=5")[1]["step"] == 5
  code, found = evaluate(workdir, "--checkpoint=best", "--config.eval.flip=True")
  assert code == DONE and found["step"] == final["best"]["step"]


def test_a_checkpoint_that_is_not_there_is_refused(finished, caplog):
  workdir, final = finished
  code, found = evaluate(workdir, "--checkpoint=7")
  assert code == FAILED and found is None
  best = f"of which {final['best']['step']} is the best"
  assert f"holds no such checkpoint; it holds 5, 10, {best}" in caplog.text
  code, _ = evaluate(workdir.parent)
  assert code == FAILED and "holds no config.json; check --workdir" in caplog.text


def test_an_evaluation_of_a_data_set_without_train(finished, tmp_path):
  write_images(tmp_path / "val", count=3)
  code, found = evaluate(finished[0], f"--config.data.path={tmp_path}")
  assert code == DONE and found["examples"] == 18


def test_the_saved_config_is_that_of_the_run(finished, images, tmp_path):
  config = saved.get_config(str(finished[0]))
  expected = own_config(images)
  expected.model.num_classes = 6
  assert config.to_dict() == expected.to_dict() and config.is_locked
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json cannot be read .* give the --config"):
    saved.get_config(str(tmp_path))
  assert isinstance(config, ml_collections.ConfigDict) and isinstance(config.data.mean, tuple)


@pytest.mark.usefixtures("python_interrupts")
def test_interrupted_in_a_notebook_it_saves_and_a_second_run_works(images, finished, tmp_path):
  """Ctrl-C as a kernel sends it: SIGINT, where the handler is Python's own."""
  asked = []

  def stop():
    if threading.current_thread() is not threading.main_thread():
      return False
    asked.append(1)
    if len(asked) == 4:
      signal.raise_signal(signal.SIGINT)
    return False

  with pytest.raises(Preempted, match=r"Stopped and saved at step \d of 10"):
    train_lib.train(own_config(images), str(tmp_path), stop)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  result = train_lib.train(own_config(images), str(tmp_path))
  assert {n: result[n] for n in ("top1", "loss")} == {n: finished[1][n] for n in ("top1", "loss")}


def test_the_report_has_images_mistakes_and_words(images, finished, tmp_path, capsys):
  """Words of the classes come from a file beside them, and are kept by the start."""
  workdir, final = finished
  page = (workdir / "report.html").read_text()
  assert page.count("data:image/jpeg;base64") == 8 and "<h2>The most confident" not in page
  assert "--mistakes=1000" in page  # adds them
  environment = json.loads((workdir / "environment.json").read_text())
  assert environment["hosts"] == 1 and environment["versions"]["jax"] in page
  shutil.copytree(images, tmp_path / "images")
  (tmp_path / "images" / "words.txt").write_text("class0 tench, Tinca tinca\nclass9 unused\n")
  words = data_lib.words_of(str(tmp_path / "images"), CLASSES)
  assert words == {"class0": "tench, Tinca tinca"}
  shutil.copytree(workdir, tmp_path / "run")
  classes = {"classes": CLASSES, "words": words}
  (tmp_path / "run" / "classes.json").write_text(json.dumps(classes))
  assert report.main([str(tmp_path / "run"), "--mistakes=100"]) == 0
  found = json.loads((tmp_path / "run" / "mistakes.json").read_text())
  wrong = final["examples"] - round(final["top1"] * final["examples"])
  assert len(found["images"]) == wrong and "Of 18 images of val, 18 in all" in found["note"]
  shares = [image["probability"] for image in found["images"]]
  assert shares == sorted(shares, reverse=True)
  assert all(image["class"] != image["predicted"] for image in found["images"])
  page = (tmp_path / "run" / "report.html").read_text()
  assert "<h2>The most confident" in page and "--mistakes=1000" not in page
  assert page.count("data:image/jpeg;base64") == 8 + wrong and "tench, Tinca tinca (class0)" in page
  assert report.main([str(tmp_path / "run"), "--mistakes=-1"]) == 2
  assert "--mistakes=-1 must be 1 or more" in capsys.readouterr().err
