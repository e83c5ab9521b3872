"""What every model family keeps to: exact resumes in both dtypes, on any mesh."""

import pytest

from tests.trainer import tiny
from tests.trainer.shared import fingerprints
from tests.trainer.test_run import StopAt
from trainer import train as train_lib
from trainer.errors import Preempted

# Family: fields that make it draw at random, and use all of its parts. The first family of the
# project is that of most other tests.
FAMILIES = {
  "vit": {"dropout": 0.1, "drop_path": 0.3, "scan": True, "layer_scale": 0.1},
  "efficientnet": {"dropout": 0.1, "drop_path": 0.3},
  "nfnet": {"dropout": 0.1, "drop_path": 0.3, "scan": True},
  "nf_resnet": {"dropout": 0.1, "drop_path": 0.3, "scan": True},
  "mdeq": {
    "dropout": 0.1,
    "unrolled_steps": 3,
    "jacobian_weight": 0.1,
    "jacobian_share": 0.5,
  },
  "convnext": {"dropout": 0.1, "drop_path": 0.3, "scan": True, "layer_scale": 0.1},
}
QUICK = ("vit",)


def families():
  return [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


_SAMPLE = ("vit bfloat16", "efficientnet float32")


@pytest.mark.parametrize(
  ("family", "dtype"),
  [
    pytest.param(family, dtype, marks=[] if f"{family} {dtype}" in _SAMPLE else pytest.mark.slow)
    for family in FAMILIES
    for dtype in ("float32", "bfloat16")
  ],
)
def test_stopped_anywhere_the_result_is_bitwise_the_same(family, dtype, tmp_path):
  config = tiny.get_config(family)
  config.model.update(FAMILIES[family] | {"dtype": dtype})
  config.data.kind, config.total_steps = "synthetic", 6
  config.optimizer.ema_decay = 0.9
  quiet = train_lib.train(config, str(tmp_path / "quiet"))
  assert quiet["examples"] == 64
  with pytest.raises(Preempted):
    train_lib.train(config, str(tmp_path / "stopped"), StopAt(3))
  assert 0 < max(int(p.name) for p in (tmp_path / "stopped" / "checkpoints").iterdir()) < 6
  train_lib.train(config, str(tmp_path / "stopped"))
  assert fingerprints(tmp_path / "stopped", 6) == fingerprints(tmp_path / "quiet", 6)
