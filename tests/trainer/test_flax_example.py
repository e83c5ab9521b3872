"""The net that ours is compared with is a ResNet-50, and the comparison runs."""

import functools
import re

import jax
import pytest

from trainer.tools import bench, flax_example


def test_parameters():
  init, _ = flax_example.make_step()
  state = jax.eval_shape(init)
  # As torchvision counts them.
  assert sum(x.size for x in jax.tree.leaves(state.params)) == 25_557_032
  assert sum(x.size for x in jax.tree.leaves(state.batch_stats)) == 53_120


def test_both_steps_run_in_turns(capsys, monkeypatch):
  monkeypatch.setattr(
    flax_example, "ResNet50", functools.partial(flax_example.ResNet50, numbers=(1,))
  )
  rows = ["model.depth=18 model.width=0.125", "model.depth=18 accumulation_steps=2"]
  shape = ["--batch-size", "4", "--image-size", "32"]
  bench.main(["step", "--ours", ";".join(rows), *shape, "--steps", "1", "--rounds", "2"])
  *rounds, title, theirs, small, large = capsys.readouterr().out.splitlines()
  assert [line.split(":")[0] for line in rounds] == ["round  1", "round  2"]
  assert title.endswith("4 images of 32 px each, float32; medians of 2 rounds of 1 steps")
  assert theirs.endswith("1.000 (1.000 to 1.000)  Flax's example")
  assert small.endswith(f"ours {rows[0]}") and large.endswith(f"ours {rows[1]}")
  assert all(re.match(r" *[\d,]+\.\d\d images/s  [\d.]+ \(", line) for line in (small, large))


@pytest.mark.parametrize(
  ("field", "words"),
  [
    ("model.dept=18", "'model.dept=18' is not FIELD=VALUE"),
    ("accumulation_steps=three", "'accumulation_steps=three' is not FIELD=VALUE"),
    ("accumulation_steps=3", "is 4, which config.accumulation_steps = 3 does not divide"),
  ],
)
def test_fields_that_cannot_be(field, words):
  with pytest.raises(SystemExit, match=re.escape(words)):
    bench.main(["step", "--batch-size", "4", "--image-size", "32", "--ours", field])
