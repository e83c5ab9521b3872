"""A short version of `python -m tests.trainer.chaos`: one event of each kind."""

import pytest

from tests.trainer import chaos


def test_one_event_of_each_kind_leaves_no_trace(tmp_path):
  events = ["SIGTERM", "damage", "SIGKILL", "resize", "SIGSTOP"]
  chaos.chaos(tmp_path, events, seed=0, counts=(2, 1))


@pytest.mark.slow
def test_nor_do_those_around_the_run(tmp_path):
  events = ["SIGHUP", "worker", "owner", "files", "data"]
  chaos.chaos(tmp_path, events, seed=0, counts=(2, 1))
