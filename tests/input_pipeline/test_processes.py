"""How many processes and threads decode."""

import os

import pytest

from input_pipeline.workers import processes


@pytest.mark.parametrize(
  ("cores", "asked", "chosen"),
  [
    (1, (-1, -1), (0, 1)),
    (2, (-1, -1), (0, 2)),
    (3, (-1, -1), (0, 2)),
    (4, (-1, -1), (2, 0)),
    (24, (-1, -1), (22, 0)),
    (224, (-1, -1), (32, 0)),
    (224, (-1, 1), (32, 1)),
    (224, (0, -1), (0, 2)),
    (2, (3, -1), (3, 0)),
    (1, (5, 7), (5, 7)),
    (8, (0, 0), (0, 0)),
  ],
)
def test_what_is_not_set_is_chosen_by_the_cores(cores, asked, chosen, monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
  assert processes.choose(*asked) == chosen


def test_threads_where_no_process_can_decode(monkeypatch):
  for cores, expected in ((2, 2), (8, 8), (112, 16)):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)), raising=False)
    assert processes.choose_threads(-1) == expected
  assert [processes.choose_threads(threads) for threads in (0, 1, 40)] == [1, 1, 40]
