"""The server of host 0: who gave what, who is missing, who is gone, at any number of hosts."""

import argparse
import concurrent.futures
import resource
import socket
import threading
import time

import pytest

from tests.trainer.shared import free_port
from trainer.errors import FAILED, HOST_LOST
from trainer.pod import lifeline as lifeline_lib
from trainer.pod.lifeline import Lifeline, Line, expand
from trainer.tools.hosts import bench_hosts

HOSTS = 5


@pytest.fixture
def port():
  return free_port()


@pytest.fixture
def lines(port):
  """One line of each host to a new server."""
  Lifeline(port, HOSTS, timeout=60.0)
  return [Line(("localhost", port), host, timeout=20.0) for host in range(HOSTS)]


def gather(lines, number, values):
  """Return the replies to a gather of the hosts that have a value, asked at the same time."""
  with concurrent.futures.ThreadPoolExecutor(HOSTS) as pool:
    asked = [
      pool.submit(lines[host].ask, "gather", number=number, name="test", value=value)
      for host, value in values.items()
    ]
    return [one.result() for one in asked]


@pytest.mark.parametrize(
  "values",
  [
    ["same"] * HOSTS,
    [1, 2, 1, 1, 2],
    [None, [1, "é\n"], {"a": 0.1}, "", True],
    [1, 1.0, True, "1", 1],  # equal to Python, but not the same value
    [str(host) * (1 << 20) for host in range(HOSTS)],  # more than a socket takes at once
  ],
)
def test_every_host_receives_the_value_of_every_host(lines, values):
  for number in range(2):
    for reply in gather(lines, number, dict(enumerate(values))):
      given = {host: value for value, ranges in reply["values"] for host in expand(ranges)}
      assert sorted(given) == list(range(HOSTS))
      assert [repr(given[host]) for host in range(HOSTS)] == [repr(value) for value in values]


def test_who_is_missing_is_named_and_may_still_come(lines):
  for reply in gather(lines, 0, {1: "c", 3: "c"}):
    assert expand(reply["missing"]) == [0, 2, 4] and reply["verdict"] is None
  replies = gather(lines, 0, dict.fromkeys(range(HOSTS), "c"))
  assert [reply["values"] for reply in replies] == [[["c", [[0, 4]]]]] * HOSTS


def test_a_gather_ends_for_all_when_a_host_is_gone(lines):
  lines[4].ask("alive", point="step 7", note=None, seen=-1)
  closed = threading.Timer(0.2, lambda: lines[4]._lines.close())
  closed.start()
  for reply in gather(lines, 0, dict.fromkeys(range(4))):
    while reply["verdict"] is None:  # the second of patience may pass before
      (reply,) = gather(lines, 0, {0: None})
    assert expand(reply["missing"]) == [4]
    assert reply["verdict"] == [4, "host 4 is gone: its connection closed at 'step 7'", HOST_LOST]


def test_a_silent_host_is_lost(port):
  Lifeline(port, 2, timeout=0.5)
  quiet, line = (Line(("localhost", port), host, timeout=20.0) for host in range(2))
  quiet.ask("alive", point="compile", note=None, seen=-1)
  verdict = None
  while not verdict:
    verdict = line.ask("alive", point="start", note=None, seen=-1)["verdict"]
  assert verdict[0] == 0 and "host 0 was last heard from" in verdict[1] and verdict[2] == HOST_LOST


def test_notes_are_sent_once_when_all_hosts_have_reported(lines):
  for line in lines:
    reply = line.ask("alive", point="step 10", note=[10, 0.5], seen=-1)
    assert reply["window"] == (10 if line is lines[-1] else -1)
  assert reply["notes"] == {str(host): 0.5 for host in range(HOSTS)}
  assert lines[0].ask("alive", point="step 11", note=[10, 0.5], seen=-1)["notes"] == reply["notes"]
  assert lines[0].ask("alive", point="step 11", note=[10, 0.5], seen=10)["notes"] is None


def test_hosts_compare_times_of_a_clock_that_nobody_sets(lines):
  asked = time.monotonic()
  now = lines[0].ask("alive", point="step 1", note=None, seen=-1)["now"]
  assert asked <= now <= time.monotonic()


def test_hosts_that_contradict_are_refused(lines):
  assert lines[0].ask("hello", hosts=HOSTS) == {}
  assert "two hosts with the number 0" in lines[0].ask("hello", hosts=HOSTS)["refused"]
  assert "one of 9 hosts" in lines[1].ask("hello", hosts=9)["refused"]
  assert lines[2].ask("alive", point="start", note=None, seen=-1)["verdict"][::2] == [0, FAILED]


@pytest.mark.parametrize(
  "noise",
  [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff\n",
    b"[]\n",
    b"{}\n",
    b'{"ask": "serve", "host": 0}\n',
    b'{"ask": "gather", "host": 9, "number": 0, "name": "", "value": 0}\n',
    b'{"ask": "alive", "host": 0}\n',
  ],
)
def test_a_stranger_is_sent_away_and_disturbs_nobody(lines, port, noise):
  with socket.create_connection(("localhost", port), timeout=20) as stranger:
    stranger.sendall(noise)
    assert stranger.recv(1) == b""
  assert all("values" in reply for reply in gather(lines, 0, dict.fromkeys(range(HOSTS))))


def test_open_files_are_allowed_or_refused_at_start(monkeypatch, port):
  limits, given = (256, 1000), []
  monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
  monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: given.append(pair))
  lifeline_lib.allow_connections(100)
  assert not given
  lifeline_lib.allow_connections(500)
  assert given == [(820, 1000)]
  with pytest.raises(OSError, match=r"8194 connections need 8258 open files.* is 1000; raise it"):
    Lifeline(port, 4096, 60.0)


def test_the_benchmark_runs(capsys):
  bench_hosts(argparse.Namespace(hosts=8))
  report = capsys.readouterr().out.splitlines()
  assert len(report) == 3 and all("8 hosts" in line and "1 threads" in line for line in report)
