"""Evaluation by class, of the classes that a split has, and with ReaL labels, against numpy."""

import json

import numpy as np
from PIL import Image
import pytest

from input_pipeline import image
from tests.trainer import tiny
from trainer import config as config_lib
from trainer import real_labels, train, weights
from trainer.errors import FAILED, HOST_LOST, ConfigError, StorageError
from trainer.reporting import classes
from trainer.weights import net as net_lib
from trainer.weights import run_folder
from trainer.workdir import storage

NAMES = ("ant", "bee", "crane", "dhole", "emu", "fox")


def logits_of(model, config, files):
  pixels = np.stack([image.eval_view(f.read_bytes(), 16, 16) for f in files]).astype(np.float32)
  normal = (pixels - np.float32(config.data.mean)) / np.float32(config.data.std)
  return np.asarray(model(normal))


def test_imported_weights_on_all_classes_and_on_some(tmp_path):
  config = tiny.get_config()
  config.eval.per_class = True
  net = net_lib.build(config)
  run_folder.write(str(tmp_path / "run"), config, net, net_lib.random_leaves(net), NAMES)
  rng = np.random.default_rng(0)
  counts = {"whole": (5, 7, 3, 4, 1, 2), "part": (0, 6, 0, 9, 0, 4)}  # of 8: with padding
  image_number = 0
  for folder, numbers in counts.items():
    for name, number in zip(NAMES, numbers, strict=True):
      for _ in range(number):
        image_number += 1
        file = tmp_path / folder / "val" / name / f"ILSVRC2012_val_{image_number:08d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        low, high = sorted(rng.integers(0, 256, 2))
        Image.fromarray(rng.integers(low, high + 1, (20, 24, 3), np.uint8)).save(file)
  real = [rng.choice(6, rng.integers(0, 4), replace=False).tolist() for _ in range(22)]
  (tmp_path / "real.json").write_text(json.dumps(real))
  model, about = weights.load(str(tmp_path / "run"))
  assert about.classes == NAMES

  for folder, allowed in (("whole", range(6)), ("part", (1, 3, 5))):
    config.data.path = str(tmp_path / folder)
    config.eval.classes = "all" if folder == "whole" else "data"
    config.eval.real_labels = str(tmp_path / "real.json") if folder == "whole" else ""
    result = train.evaluate_only(config, str(tmp_path / "run"))
    files = sorted((tmp_path / folder).rglob("*.png"))
    labels = np.array([NAMES.index(file.parent.name) for file in files])
    logits = logits_of(model, config, files).astype(np.float64)
    logits[:, [i for i in range(6) if i not in allowed]] = -np.inf
    best = logits.argmax(1)
    assert result["examples"] == len(files) and "confusion" not in result
    assert result["top1"] == pytest.approx(np.mean(best == labels))
    log_sums = np.log(np.exp(logits).sum(1))
    expected = np.mean(log_sums - logits[np.arange(len(files)), labels])
    assert result["loss"] == pytest.approx(expected, rel=1e-4)

    if folder == "whole":
      own = [real[int(file.stem[-8:]) - 1] for file in files]
      hits = [answer in accepted for answer, accepted in zip(best, own, strict=True) if accepted]
      assert result["real_examples"] == len(hits) < 22
      assert result["real_top1"] == pytest.approx(np.mean(hits)) and 0 < np.mean(hits) < 1
    else:
      assert "real_top1" not in result

    written = json.loads((tmp_path / "run" / "eval_classes.json").read_text())
    (table,) = written["splits"].values()
    assert [entry["class"] for entry in table["classes"]] == [NAMES[i] for i in allowed]
    for entry in table["classes"]:
      own = labels == entry["label"]
      assert entry["examples"] == own.sum()
      assert entry["top1"] == pytest.approx(np.mean(best[own] == entry["label"]))
    pairs = {(p["class"], p["taken_for"]): p["examples"] for p in table["confusions"]}
    assert sum(pairs.values()) == np.sum(best != labels) > 0
    for (own, other), number in pairs.items():
      right = (labels == NAMES.index(own)) & (best == NAMES.index(other))
      assert number == right.sum()
    numbers = list(pairs.values())
    assert numbers == sorted(numbers, reverse=True)


def test_a_class_without_examples_has_no_accuracy():
  table = classes.table(np.array([[3, 1, 0], [0, 0, 0], [2, 2, 0]]), "abc")
  assert table["mean_class_top1"] == pytest.approx((3 / 4 + 0) / 2)
  assert [entry["class"] for entry in table["classes"]] == ["a", "c"]
  assert [(p["class"], p["taken_for"], p["share"]) for p in table["confusions"]] == [
    ("c", "a", 0.5),
    ("c", "b", 0.5),
    ("a", "b", 0.25),
  ]


def test_refused(config):
  config.eval.classes = "some"
  with pytest.raises(ConfigError, match=r"config\.eval\.classes must be one of all, data"):
    config_lib.validate(config)
  config.eval.classes, config.eval.per_class, config.model.num_classes = "all", True, 5000
  with pytest.raises(ConfigError, match=r"eval\.per_class .* 4096 .* set it to False"):
    config_lib.validate(config)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    (None, "there is no such file"),
    ("[[1], ", "cannot be read"),
    ("{}", "no list of lists"),
    ("[]", "no list of lists"),
    ("[[0], 3]", "no list of lists"),
    ("[[0], [6]]", r"has \[6\] for image 2; .*num_classes=6"),
    ("[[-1]]", "numbers below"),
    ('[["a"]]', "numbers below"),
  ],
)
def test_real_labels_that_are_none(tmp_path, text, words):
  if text is not None:
    (tmp_path / "real.json").write_text(text)
  with pytest.raises(ConfigError, match=rf"config\.eval\.real_labels=.*{words}"):
    real_labels.read(str(tmp_path / "real.json"), 6)


@pytest.mark.parametrize(("status", "code"), [(503, HOST_LOST), (403, FAILED)])
def test_real_labels_in_a_bucket_that_fails(monkeypatch, status, code):
  def path_of(path):
    raise type("HttpError", (Exception,), {"__module__": "gcsfs.retry", "code": status})(status)

  monkeypatch.setattr(storage, "path_of", path_of)
  with pytest.raises(StorageError, match=rf"cannot be read .*{status}.* again\.$") as error:
    real_labels.read("gs://bucket/real.json", 6)
  assert error.value.exit_code == code


def test_images_without_a_number_have_no_real_labels():
  table = np.eye(3, 4, dtype=np.bool_)
  batch = {"number": np.array([3, 1, 0]), "mask": np.array([True, True, False])}
  (found,) = real_labels.accepted([batch], table)
  np.testing.assert_array_equal(found["accepted"], [table[2], table[0], [False] * 4])
  for number, words in ((0, "another name"), (4, "the number 4")):
    batch["number"] = np.array([3, number, 0])
    with pytest.raises(ConfigError, match=words):
      list(real_labels.accepted([batch], table))
