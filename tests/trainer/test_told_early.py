"""What can be known at the start of a run is refused there, before anything is trained."""

import json

import jax
import pytest

from input_pipeline.errors import DataError
from tests.trainer import outside, tiny
from tests.trainer.shared import call
from tests.trainer.test_data import images
from trainer import predict
from trainer import train as train_lib
from trainer.errors import FAILED, NoDevices, TrainerError, exit_code
from trainer.tools import bench, mixed, plan
from trainer.weights import __main__ as weights

SYNTHETIC = {
  "a size that the model cannot evaluate": (
    {"data.eval_image_size": 24, "data.eval_resize": 24},
    "config.data.eval_image_size is 24, which the model family tests.trainer.outside:Mixer cannot",
  ),
  "an evaluation that enlarges nothing": (
    {"data.eval_resize": 12},
    "config.data.eval_resize=12 is smaller than config.data.eval_image_size=16",
  ),
  "a batch of evaluation": ({"eval.batch_size": 0}, "config.eval.batch_size must be 1 or more"),
  "an interpolation": (
    {"data.eval_interpolation": "nearest"},
    "config.data.eval_interpolation must be one of",
  ),
  "a profile": ({"log.profile_step": 9}, "config.log.profile_step is 9"),
  "precise BN without BN": ({"eval.precise_bn_examples": 16}, "has no batch norm"),
  "a file of ReaL labels": ({"eval.real_labels": "/nowhere/real.json"}, "there is no such file"),
  "names without ReaL labels": (
    {"eval.real_labels": "real.json"},
    "one of config.data.eval_split=val is called synthetic",
  ),
}


@pytest.fixture
def refusal(monkeypatch, tmp_path):
  """Return a function that trains, and returns the sentence that refuses to."""

  def never(self):
    raise AssertionError("a step was taken")

  monkeypatch.setattr("trainer.run.Run.take_step", never)

  def of(config):
    with pytest.raises((TrainerError, DataError)) as refused:
      train_lib.train(config, str(tmp_path / "run"))
    assert exit_code(refused.value) == FAILED
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    return str(refused.value)

  return of


@pytest.mark.parametrize("case", SYNTHETIC)
def test_fields_that_an_evaluation_refuses(case, refusal, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "real.json").write_text(json.dumps([[0], [1]]))
  fields, words = SYNTHETIC[case]
  config = outside.get_config()
  config.total_steps = 4
  config.update_from_flattened_dict(fields)
  assert words in refusal(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return images(tmp_path_factory.mktemp("data"), ["cat", "dog"])


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"data.eval_split": "test"}, "has no split 'test', only train, val"),
    ({"data.eval_split": "val, test"}, "has no split 'test', only train, val"),
    ({"data.eval_split": "val[50:]"}, "holds none or goes beyond them"),
    ({"model.num_classes": 3}, "give --config.model.num_classes=2"),
  ],
)
def test_splits_that_an_evaluation_refuses(fields, words, refusal, folder):
  config = tiny.get_config()
  config.data.path, config.model.num_classes = str(folder), 2
  config.update_from_flattened_dict(fields)
  assert words in refusal(config)


@pytest.mark.parametrize(
  ("error", "words"),
  [
    (
      RuntimeError("Unable to initialize 'tpu': no libtpu.so\n..."),
      "'tpu': no libtpu.so). What it",
    ),
    (AssertionError(), ". What it needs for TPUs comes with pip install -e '.[tpu]'"),
  ],
)
def test_devices_that_are_not_there(error, words, tmp_path, monkeypatch):
  def device_count():
    raise error

  monkeypatch.setattr(jax, "device_count", device_count)
  with pytest.raises(NoDevices) as refused:
    train_lib.train(tiny.get_config(), str(tmp_path / "run"))
  assert str(refused.value).startswith("JAX finds no devices") and words in str(refused.value)
  assert exit_code(refused.value) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("main", "words"),
  [
    (plan.main, ["--config=smoke"]),
    (mixed.main, ["--config=imagenet_rsb_a3"]),
    (predict.main, ["FOLDER", "FOLDER/1.png"]),
    (weights.main, ["show", "FOLDER"]),
    (weights.main, ["export", "FOLDER", "--format=safetensors", "--out=FOLDER/x.safetensors"]),
    (bench.main, ["save"]),
  ],
)
def test_devices_that_are_not_there_for_other_commands(main, words, tmp_path, monkeypatch, capsys):
  def device_count():
    raise AssertionError

  monkeypatch.setattr(jax, "device_count", device_count)
  (tmp_path / "1.png").touch()
  words = [word.replace("FOLDER", str(tmp_path)) for word in words]
  if main is bench.main:
    with pytest.raises(SystemExit, match=r"^JAX finds no devices"):
      main(words)
  else:
    assert call(main, "command", *words) == FAILED
    assert "JAX finds no devices" in capsys.readouterr().err


@pytest.mark.parametrize("statistics", [True, False])
def test_labels_of_a_parquet_split_that_no_class_has(refusal, tmp_path, statistics):
  tables = pytest.importorskip(
    "tests.input_pipeline.test_tables", reason="the extra [hf] is not installed"
  )
  write, data = tables.write, tmp_path / "data"
  write(data, "train-00000-of-00001.parquet")
  some = [row | {"label": -1 if i == 5 else row["label"]} for i, row in enumerate(tables.ROWS)]
  write(data, "validation-00000-of-00001.parquet", some, write_statistics=statistics)
  config = tiny.get_config()
  config.data.path, config.model.num_classes = f"hf:{data}", 2
  assert "a label is -1, but there are 2 classes; choose a split with labels" in refusal(config)
