"""The whole path of a fine-tuning user: weights, a folder of classes, predictions, ONNX."""

import json
import pathlib

import numpy as np
from PIL import Image
import pytest

from configs import finetune_resnet50
from input_pipeline import image
from tests.trainer.shared import call
from trainer import config as config_lib
from trainer import finetune, predict, train
from trainer.weights import __main__ as weights_command
from trainer.weights import foreign, safetensors
from trainer.weights import net as net_lib

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (200, 60, 50)}


def write_images(folder, count, rng):
  for name, colour in COLOURS.items():
    (folder / name).mkdir(parents=True)
    for i in range(count):
      pixels = np.clip(rng.normal(colour, 40, (40, 36, 3)), 0, 255).astype(np.uint8)
      Image.fromarray(pixels).save(folder / name / f"{i}.png")


def small_config():
  """The recipe, for a ResNet-18 of an eighth of the width at 32 px."""
  config = finetune_resnet50.get_config()
  config.global_batch_size = config.eval.batch_size = 6
  config.total_epochs, config.total_steps = 0.0, 12
  config.optimizer.warmup_epochs, config.eval.every_epochs = 0.0, 0.0
  config.optimizer.lr_per_256 = 0.5
  config.model.depth, config.model.width, config.model.dtype = 18, 0.125, "float32"
  config.data.image_size = config.data.eval_image_size = 32
  config.data.eval_resize, config.data.workers = 36, 0
  config.log.every_steps = 6
  return config


def test_from_weights_of_another_tool_to_onnx(tmp_path, capsys, caplog):
  onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
  pytest.importorskip("onnx", reason="needs the extra [export]")
  caplog.set_level("INFO")
  rng = np.random.default_rng(0)
  write_images(tmp_path / "data" / "train", 8, rng)
  write_images(tmp_path / "data" / "val", 4, rng)

  # Weights in torchvision's names and layouts, with a head of 20 classes.
  config = small_config()
  config.model.num_classes = 20
  net = net_lib.build(config)
  tensors = {
    net.torch_name(leaf): foreign.theirs(leaf, net.torch_name(leaf), array)
    for leaf, array in net_lib.random_leaves(net).items()
  }
  assert tensors["layer1.0.conv1.weight"].shape == (8, 8, 3, 3)
  assert tensors["fc.weight"].shape == (20, 64)
  file = tmp_path / "resnet.safetensors"
  file.write_bytes(b"".join(safetensors.encode(tensors, {})))

  # Training on a folder of three classes.
  config = small_config()
  config.model.num_classes = 3
  config.data.path, config.init_from = str(tmp_path / "data"), str(file)
  workdir = str(tmp_path / "run")
  result = train.train(config, workdir)
  assert "2 made anew (head/bias, head/kernel); 2 left over (fc.bias, fc.weight)" in caplog.text
  assert "resnet18 of width 0.125 with 20 classes" in caplog.text
  assert result["step"] == 12 and result["top1"] > 0.6  # a guess has a third

  # Predictions for the validation images.
  val = tmp_path / "data" / "val"
  assert predict.main(["trainer.predict", workdir, str(val), "--json"]) == 0
  rows = json.loads(capsys.readouterr().out)
  names = list(COLOURS)
  right = [row["top"][0]["class"] == row["image"].split("/")[-2] for row in rows]
  assert len(rows) == 12 and np.mean(right) == pytest.approx(result["top1"])

  # The same answers from ONNX, for pixels prepared here.
  out = tmp_path / "run.onnx"
  arguments = ["export", workdir, "--format=onnx", f"--out={out}", "--pixels", f"--images={val}"]
  assert call(weights_command.main, "trainer.weights", *arguments) == 0
  assert "same top-5 on 12 of 12 images" in capsys.readouterr().out
  session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
  assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == names
  pixels = [image.eval_view(pathlib.Path(row["image"]).read_bytes(), 36, 32) for row in rows]
  logits = session.run(None, {"images": np.stack(pixels)})[0].astype(np.float64)
  shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  ours = np.zeros_like(shares)
  for row, own in zip(rows, ours, strict=True):
    for entry in row["top"]:
      own[entry["label"]] = entry["probability"]
  np.testing.assert_allclose(ours, shares, atol=1e-4)


@pytest.mark.parametrize("variant", finetune_resnet50.VARIANTS)
def test_the_patterns_of_the_recipe_are_those_of_its_net(variant):
  config = finetune_resnet50.get_config(variant)
  config.model.depth = 18  # the same names, in less time
  config_lib.validate(config)
  params = net_lib.build(config).shapes.params
  finetune.check(config, params)
  frozen = finetune.frozen(config.optimizer.freeze or "$^", params)
  trained = {name.split("/")[0] for name in net_lib.flatten((params,))} - {
    name.split("/")[0] for name in frozen
  }
  assert (trained == {"head"}) == (variant == "head")
