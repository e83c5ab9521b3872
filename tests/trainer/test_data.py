"""A run means its data: what they are is kept with it, and other data are refused or mapped."""

import json
import pickle
import shutil

import numpy as np
import pytest

from input_pipeline import sources
from input_pipeline.errors import DataError
from tests.input_pipeline.conftest import data_config, encoded, run_prepare
from tests.trainer import tiny
from trainer import data as data_lib
from trainer import train as train_lib
from trainer.errors import ConfigError

COLOURS = {"cat": (200, 40, 40), "dog": (40, 40, 200), "fox": (40, 200, 40)}


def images(root, names, count=4, splits=("train", "val"), shift=0):
  """Make ROOT/SPLIT/CLASS/I.png, all images of a class in its colour."""
  for split in splits:
    for name, colour in zip(names, COLOURS.values()):
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        pixels = np.clip(np.array(colour) + 3 * i + shift, 0, 255).astype(np.uint8)
        picture = np.broadcast_to(pixels, (20, 20, 3))
        (root / split / name / f"{i}.png").write_bytes(encoded(picture, "PNG"))
  return root


def small(path, classes=2, **fields):
  config = tiny.get_config()
  config.data.path, config.model.num_classes, config.total_steps = str(path), classes, 12
  config.data.threads = 0
  config.update_from_flattened_dict(fields)
  return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run that has learned cat and dog from a folder: its workdir, its folder and its result."""
  root = tmp_path_factory.mktemp("trained")
  folder = images(root / "photos", ["cat", "dog"])
  final = train_lib.train(small(folder), str(root / "run"))
  assert final["top1"] == 1.0
  return root / "run", folder


@pytest.fixture
def run(trained, tmp_path):
  """A copy of that run."""
  shutil.copytree(trained[0], tmp_path / "run")
  return str(tmp_path / "run")


def longer(path, **fields):
  return small(path, total_steps=14, **{"resume.allow": "total_steps", **fields})


def test_what_the_data_are_is_kept_with_the_run(trained):
  workdir, folder = trained
  assert json.loads((workdir / "classes.json").read_text()) == {"classes": ["cat", "dog"]}
  kept = json.loads((workdir / "data.json").read_text())
  saved = json.loads((workdir / "checkpoints" / "12" / "meta" / "metadata").read_text())["dataset"]
  assert kept["path"] == str(folder) and kept["left_out"] == {}
  assert saved == {key: kept[key] for key in ("classes", "train", "eval")}
  assert saved["classes"] == ["cat", "dog"]
  assert saved["train"]["examples"] == 8 and saved["train"]["class_counts"] == [4, 4]
  assert saved["train"]["digest"].startswith("folder ")


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"names": ["a", "b"]}, "class 0 was 'cat' and is 'a'"),
    ({"names": ["dog", "cat"], "count": 3}, "it had 8 examples and has 6"),
    ({"names": ["cat", "dog"], "shift": 1, "count": 5}, "class 'cat' had 4 examples and has 5"),
  ],
)
def test_a_resume_on_other_data_is_refused(run, tmp_path, change, says):
  other = images(tmp_path / "other", **change)
  with pytest.raises(ConfigError) as refused:
    train_lib.train(longer(other), run)
  assert says in str(refused.value) and "\n" not in str(refused.value)
  assert "another --workdir" in str(refused.value)


def test_other_images_under_the_same_names_are_refused(run, trained, tmp_path):
  other = shutil.copytree(trained[1], tmp_path / "other")
  (other / "train" / "cat" / "0.png").write_bytes(encoded(np.zeros((9, 9, 3), np.uint8), "PNG"))
  with pytest.raises(ConfigError, match=r"its images, or their order, are others.*allow=data"):
    train_lib.train(longer(other), run)


def test_data_that_move_are_the_same_and_others_may_be_allowed(run, trained, tmp_path):
  moved = shutil.copytree(trained[1], tmp_path / "moved")
  assert train_lib.train(longer(moved), run)["step"] == 14
  more = images(tmp_path / "more", ["cat", "dog"], count=6)
  allowed = {"total_steps": 16, "resume.allow": "total_steps,data"}
  assert train_lib.train(small(more, **allowed), run)["step"] == 16
  renamed = images(tmp_path / "renamed", ["cat", "fox"])
  with pytest.raises(ConfigError, match="class 1 was 'dog' and is 'fox'"):
    train_lib.train(small(renamed, **allowed), run)


def test_a_folder_and_its_shards_are_the_same_data(run, trained, tmp_path):
  assert run_prepare("--out", tmp_path / "shards", "--folder", trained[1]) == 0
  assert train_lib.train(longer(tmp_path / "shards"), run)["step"] == 14


def test_an_evaluation_maps_classes_by_name(run, tmp_path):
  # The order of these names is another, and the images have the colours of the names.
  root = tmp_path / "other"
  for name in ("dog", "cat"):
    (root / "test" / name).mkdir(parents=True)
    picture = np.broadcast_to(np.array(COLOURS[name], np.uint8), (20, 20, 3))
    (root / "test" / name / "x.png").write_bytes(encoded(picture, "PNG"))
  assert train_lib.evaluate_only(small(root, **{"data.eval_split": "test"}), run)["top1"] == 1.0
  shutil.rmtree(root / "test" / "cat")  # fewer folders would shift the labels
  assert train_lib.evaluate_only(small(root, **{"data.eval_split": "test"}), run)["top1"] == 1.0
  (root / "test" / "dog").rename(root / "test" / "wolf")
  with pytest.raises(ConfigError, match=r"has the class .wolf., which the run lacks \(cat, dog\)"):
    train_lib.evaluate_only(small(root, **{"data.eval_split": "test"}), run)


class Named(sources.Source):
  """A source that has no more than its classes."""

  def __init__(self, *names, counts=None):
    self.class_names, self.num_classes, self.class_counts = names, len(names), counts

  def __len__(self):
    return 4


def test_the_labels_of_an_evaluation():
  def table(classes, *names, **options):
    found = data_lib.label_table(classes, Named(*names, **options), "test")
    return found if found is None else found.tolist()

  assert table(["a", "b", "c"], "c", "a") == [2, 0]
  assert table(["a", "b"], "a", "b") is None
  assert table(["caf\u00e9", "b"], "b", "cafe\u0301") == [1, 0]
  assert table(["a", "b"], "b", "x", counts=[3, 0])[0] == 1  # nobody has the label of x
  assert table(["n1", "n2"], "0", "1") is None  # numbers are labels, as in ImageNet-V2
  for classes, names, words in (
    (["a", "b"], ["x"], "'x', which the run lacks"),
    (["crane", "crane", "b"], ["b", "crane"], "'crane', which 2 classes of the run are called"),
    (["n1", "n2", "n3"], ["0", "1"], "2 classes and the run 3, of which one has numbers"),
  ):
    with pytest.raises(ConfigError) as refused:
      table(classes, *names)
    assert words in str(refused.value)
  batch = {"label": np.array([0, 1, 0]), "mask": np.array([True, True, False])}
  (made,) = data_lib.relabelled([batch], np.array([5, 3]))
  assert made["label"].tolist() == [5, 3, 5] and made["mask"] is batch["mask"]


def test_a_checkpoint_of_before_resumes_unless_its_classes_have_another_order(tmp_path):
  config = small(images(tmp_path / "names", ["cat", "dog"]))
  plain = sources.open_source(config.data, "train", 2)
  now = data_lib.describe(plain, {})
  data_lib.check_same(None, now, plain, "runs/a", allow=False)
  config.data.path = str(images(tmp_path / "numbers", ["2", "10"]))
  numbers = sources.open_source(config.data, "train", 2)
  assert numbers.class_names == ("2", "10")
  with pytest.raises(ConfigError, match=r"give --config\.data\.class_order=text"):
    data_lib.check_same(None, now, numbers, "runs/a", allow=False)
  config.data.class_order = "text"
  text = sources.open_source(config.data, "train", 2)
  assert text.class_names == ("10", "2")
  data_lib.check_same(None, now, text, "runs/a", allow=False)


def test_the_digest_is_that_of_the_images_and_not_of_the_place(shards, tmp_path):
  def digest(path, split="train"):
    return sources.open_source(data_config(path), split, None).digest

  moved = shutil.copytree(shards, tmp_path / "moved")
  assert digest(moved) == digest(shards) != digest(shards, "val")
  assert digest(f"file://{moved}") == digest(shards)
  assert digest(shards, "train[:50%]") != digest(shards, "train[50%:]") != digest(shards)
  assert pickle.loads(pickle.dumps(sources.open_source(data_config(shards), "train", None)))


@pytest.mark.parametrize(
  ("fields", "says"),
  [
    ({"data.eval_resize": 8}, "eval_resize=8 is smaller than config.data.eval_image_size=16"),
    ({"data.kind": "stream"}, "must be a multiple of config.data.stream_lanes=64"),
  ],
)
def test_values_that_the_loader_refuses_are_refused_before_anything_compiles(
  fields, says, trained, tmp_path, monkeypatch
):
  monkeypatch.setattr("trainer.program.build", None)
  path = trained[1]
  if "data.kind" in fields:
    path = tmp_path / "shards"
    assert run_prepare("--out", path, "--folder", trained[1]) == 0
  with pytest.raises(DataError, match=says):
    train_lib.train(small(path, **fields), str(tmp_path / "new"))
