"""What `python -m trainer.plan` says of a run before it runs."""

import pytest

from configs import base, recipes
from tests.trainer import tiny
from trainer.errors import DONE, FAILED, ConfigError
from trainer.tools import plan as plan_lib


def test_figures_of_a_recipe():
  plan = plan_lib.make(recipes.load("imagenet_ffcv:rn18_16"), "imagenet_ffcv:rn18_16")
  assert plan.examples == 1_281_167
  assert plan.lengths.total == round(16 * 1_281_167 / 1024)
  assert plan.images == plan.lengths.total * 1024
  assert plan.params == 11_689_512  # torchvision's resnet18
  assert plan.evaluations == 2
  assert plan.rates.max() == pytest.approx(0.5, rel=1e-3) and plan.rates[-1] < 1e-3
  assert plan.sizes[0] == 160 and plan.sizes[-1] == 192
  # 1.814 G multiply-adds at 224 px, in proportion to the area but for the head
  assert plan.forward_flops / 2 == pytest.approx(1.814e9 * (192 / 224) ** 2, rel=2e-3)
  first = plan.lengths.sizes[1][0] / plan.lengths.total
  mean = first * (160 / 192) ** 2 + 1 - first
  assert plan.train_flops == pytest.approx(3 * plan.images * plan.forward_flops * mean, rel=2e-3)
  text = plan_lib.text(plan, images_per_second=1000)
  for words in (
    "160, 192 from epoch 12 px; evaluated at 256 px of 293",
    "20,018 steps of 1,024, 16 epochs, 20,498,432 images",
    "5 h 41 min at 1,000 images/s",
    "▁",
  ):
    assert words in text


def test_a_row_of_the_table():
  name = "imagenet_mlperf:8192"
  row = plan_lib.row(plan_lib.make(recipes.load(name), name), name)
  assert row.startswith(f"| `{name}` | 44 | 8,192 | 6,881 | 56.37 M | 224 / 224 | lars, 17 | ")
  assert row.endswith("| 75.9 |")


def test_examples_come_from_the_data_the_command_or_the_recipe(tmp_path):
  config = tiny.get_config()
  with pytest.raises(ConfigError, match="or --examples"):
    plan_lib.make(config, "mine")
  assert plan_lib.make(config, "mine", 800).examples == 800
  config.data.kind = "synthetic"
  assert plan_lib.make(config, "mine").examples == 64
  config.data.kind, config.data.path = "auto", str(tmp_path / "nowhere")
  with pytest.raises(ConfigError, match=r"nowhere.* Or give --examples\."):
    plan_lib.make(config, "mine")
  assert plan_lib.make(base.get_config(), "imagenet_goyal").examples == 1_281_167
  # The variant that the run file takes where none is named.
  assert plan_lib.make(base.get_config(), "imagenet_ffcv").examples == 1_281_167


def test_a_picture(tmp_path):
  path = tmp_path / "plan.png"
  plan_lib.write_picture(plan_lib.make(tiny.get_config(), "mine", 80), str(path))
  assert path.read_bytes().startswith(b"\x89PNG")


def test_the_command(capsys):
  assert plan_lib.main(["plan", "--help"]) == DONE
  assert "--images_per_second" in capsys.readouterr().out
  assert plan_lib.main(["plan", "--config=nowhere.py"]) == FAILED
  assert "nowhere.py" in capsys.readouterr().err
