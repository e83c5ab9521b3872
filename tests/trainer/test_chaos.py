"""A short version of `python -m tests.trainer.chaos`: one event of each kind."""

from tests.trainer import chaos


def test_one_event_of_each_kind_leaves_no_trace(tmp_path):
  chaos.chaos(
    tmp_path, ["SIGTERM", "damage", "SIGKILL", "resize", "SIGSTOP"], seed=0, counts=(2, 1)
  )
