"""A workdir has one owner at a time."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

from etils import epath
import pytest

from tests.trainer import tiny
from tests.trainer.shared import ENVIRONMENT, Process, run, trainer
from trainer import train as train_lib
from trainer.errors import DONE, HOST_LOST, WorkdirBusy
from trainer.workdir import lease, storage


@pytest.fixture(params=["folder", "bucket"])
def path(request, tmp_path):
  if request.param == "folder":
    return epath.Path(tmp_path) / "owner.json"
  request.getfixturevalue("server")
  return storage.path_of(f"gs://bucket/{tmp_path.name}") / "owner.json"


def _hold(path, seconds=0.6):
  return lease.hold(path, path.parent, seconds)


def _elsewhere(monkeypatch):
  """Make this process one of another machine for all that follows."""
  monkeypatch.setattr(lease, "_machine", lambda: "another")
  monkeypatch.setattr(lease, "_POLL", 0.05)


def test_it_is_held_renewed_and_given_back(path):
  with _hold(path) as held:
    first = json.loads(storage.read_whole(path))
    assert first["pid"] == os.getpid()
    while json.loads(storage.read_whole(path))["renewed"] == first["renewed"]:
      time.sleep(0.05)
    held.check()
  assert not path.exists()
  with _hold(path):
    assert path.exists()


def test_a_second_owner_on_this_machine_is_refused_at_once(path):
  with (
    _hold(path, 1000),
    pytest.raises(WorkdirBusy, match=rf"in use by process {os.getpid()} of .* since 20"),
    _hold(path, 1000),
  ):
    pass


def test_an_owner_elsewhere_that_gives_signs_is_respected(path, monkeypatch):
  with _hold(path, 0.6) as held:
    _elsewhere(monkeypatch)
    with pytest.raises(WorkdirBusy, match="Wait until it has ended"), _hold(path, 30):
      pass
    held.check()


def test_an_owner_elsewhere_that_is_silent_loses_it(path, monkeypatch):
  with pytest.MonkeyPatch.context() as patch, _hold(path, 1000) as held:
    _elsewhere(patch)
    began = time.monotonic()
    with _hold(path, 1.0):
      assert time.monotonic() - began >= 1.0
      held.seconds = 0.1  # it wakes up again
      woken = threading.Thread(target=held._renew)
      woken.start()
      woken.join()
      with pytest.raises(WorkdirBusy, match=f"taken over by process {os.getpid()}"):
        held.check()


def test_an_owner_that_was_suspended_asks_before_it_saves(path, monkeypatch):
  """All of it was, also the thread that renews: a save may be the first that it does again."""
  with _hold(path, 0.5) as held, pytest.MonkeyPatch.context() as patch:
    held._done.set()
    held._thread.join()
    _elsewhere(patch)
    with _hold(path, 0.5), pytest.raises(WorkdirBusy, match=f"taken over by process {os.getpid()}"):
      held.check()


def test_an_owner_that_was_suspended_and_is_still_the_owner_goes_on(path):
  with _hold(path, 0.5) as held:
    held._done.set()
    held._thread.join()
    path.unlink()
    time.sleep(0.6)
    held.check()
    assert json.loads(storage.read_whole(path))["token"] == held.owner["token"]


def test_an_owner_that_is_known_to_be_gone_loses_it_at_once(path):
  code = f"""
import os
from trainer.workdir import lease, storage
held = lease.hold(storage.path_of({str(path)!r}), storage.path_of({str(path.parent)!r}), 1000)
held.__enter__()
os._exit(9)
"""
  assert subprocess.run([sys.executable, "-c", code]).returncode == 9
  assert path.exists()
  began = time.monotonic()
  with _hold(path, 1000):
    assert json.loads(path.read_text())["pid"] == os.getpid()
  assert time.monotonic() - began < 500


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 3}', '{"pid": 1}'])
def test_a_damaged_lease_stops_nobody(path, content):
  path.write_text(content)
  with _hold(path):
    assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_folder_without_links(tmp_path, monkeypatch):
  def link(*unused):
    raise PermissionError(errno.EPERM, "Operation not permitted")

  monkeypatch.setattr(os, "link", link)
  path = epath.Path(tmp_path) / "owner.json"
  with _hold(path, 1000), pytest.raises(WorkdirBusy, match="in use by"), _hold(path, 1000):
    pass
  assert not list(tmp_path.iterdir())


def test_of_many_at_the_same_time_one_wins(path):
  path.write_text("damaged")
  outcomes, together = [], threading.Barrier(8)

  def take():
    together.wait()
    try:
      with _hold(path, 1000):
        outcomes.append("held")
        over.wait()
    except WorkdirBusy:
      outcomes.append("refused")

  over = threading.Event()
  threads = [threading.Thread(target=take) for _ in range(8)]
  for thread in threads:
    thread.start()
  while len(outcomes) < 8:
    time.sleep(0.01)
  over.set()
  for thread in threads:
    thread.join()
  assert sorted(outcomes) == ["held"] + ["refused"] * 7


def test_the_same_command_twice(tmp_path):
  command = trainer(tmp_path, "total_steps=100000")
  first = Process(command, env=ENVIRONMENT)
  first.wait_for("step 2/")
  second = Process(command, env=ENVIRONMENT)
  assert second.finish() == HOST_LOST
  assert f"{tmp_path} is in use by process {first.pid} of " in second.log
  assert "Traceback" not in second.log
  first.send(signal.SIGKILL)
  first.finish()
  # The owner is known to be gone.
  third = Process([*command[:-1], "--config.total_steps=4"], env=ENVIRONMENT)
  assert third.finish() == DONE, third.log


def test_hosts_of_one_run_share_it_and_another_pod_is_refused(tmp_path):
  config = tiny.get_config()
  config.data.kind = "synthetic"
  with lease.hold(epath.Path(tmp_path) / "owner.json", epath.Path(tmp_path), 1000):
    log = run(2, 1, trainer(tmp_path, "total_steps=4"), expected=HOST_LOST)
    assert log.count("is in use by process") >= 1 and "Traceback" not in log
    with pytest.raises(WorkdirBusy):
      train_lib.train(config, str(tmp_path))
  run(2, 1, trainer(tmp_path, "total_steps=4"))
