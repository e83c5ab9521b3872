"""Every recipe: its fields, and a trial run of two steps, a resume and an evaluation."""

import pathlib
import re

import pytest

from configs import recipes, trial
from tests.configs import golden
from tests.trainer.shared import StopAt
from trainer import command_line
from trainer import config as config_lib
from trainer.errors import Preempted
from trainer.tools import plan
from trainer.train import evaluate_only, train

NAMES = recipes.names()


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_those_of_the_golden_file(name):
  assert golden.text(name) == golden.path(name).read_text(), (
    "if the change is meant: python -m tests.configs.golden"
  )


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_and_its_docstring_says_how_to_run_it(name):
  config_lib.validate(recipes.load(name))
  file = name.partition(":")[0]
  words = __import__(f"configs.{file}", fromlist=["get_config"]).__doc__
  assert re.search(rf"--config=configs/{file}\.py|bash launch/smoke\.sh", words)
  assert re.search(r"[Ee]xpected|Measured|published", words)
  top1 = recipes.top1(name)
  errors = name.startswith("cifar10") and f"{100 - float(top1):.2f}"
  assert (errors or top1) in " ".join(words.split())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_tried_in_short(name):
  """By --trial, and with no other word than --config.total_steps."""
  small, cut = recipes.load(name), recipes.load(name)
  trial.shrink(small)
  cut.total_steps = 20
  command_line.give_way(cut, {"total_steps": 20})
  for config, examples in ((small, small.data.synthetic_examples), (cut, 50_000)):
    config_lib.validate(config)
    lengths = config_lib.durations(config, examples)
    assert lengths.warmup < lengths.total


def test_a_trial_of_real_data_logs_every_tenth_step():
  config = recipes.load("own_images")
  config.data.path = "photos"
  trial.shrink(config)
  assert config.log.every_steps == 10


# Together they use every kind of field that recipes set.
QUICK = (
  "cifar10_resnet:20",
  "imagenet_ffcv:rn18_16",
  "imagenet_mlperf:4096",
  "imagenet_mosaic_mild",
  "imagenet_rsb_a1",
  "imagenet_torchvision_v2",
)


@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES],
)
def test_a_trial_takes_some_steps_resumes_and_evaluates(name, shards, tmp_path):
  config = recipes.load(name)
  config.model.num_classes = 6
  if config.data.crop == "random_resized":  # else images must be as large as the net's
    config.data.path = str(shards)
  trial.shrink(config)
  # Later ones would be compiled, and no step takes them.
  config.data.image_sizes = ", ".join(config.data.image_sizes.split(", ")[:2])
  config_lib.validate(config)
  steps = []
  for _ in range(2):
    with pytest.raises(Preempted) as stopped:
      train(config, str(tmp_path), StopAt(3))
    steps.append(int(re.search(r"saved at step (\d+) of", str(stopped.value))[1]))
  assert 0 < steps[0] < steps[1] <= 8
  result = evaluate_only(config, str(tmp_path))
  assert result["step"] == steps[1] and result["examples"] == (29 if config.data.path else 8)


@pytest.mark.slow
def test_the_table_of_the_readme_is_what_plan_prints():
  text = (pathlib.Path(recipes.__file__).parent / "README.md").read_text()
  shown = text.partition("<!-- recipes: begin -->")[2].partition("<!-- recipes: end -->")[0]
  assert shown.strip() == "\n".join(plan.table())
