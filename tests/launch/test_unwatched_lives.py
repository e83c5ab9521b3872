"""The sequences in which a slice would be paid for without end, with the real gcloud and API.

In each, every process of the launcher is gone when the slice must remove itself, by the startup
script, the metadata and the REST API of its own machine. What is paid after the limit is measured
by the bills of the cloud.
"""

import re
import time

import pytest

from tests.launch import lives
from tests.launch.lives import NAME, needs_gcloud, wait_until

pytestmark = needs_gcloud
slow = pytest.mark.slow
ERROR, USAGE, COST, LEFT = 1, 2, 5, 130
IDLE = 20.0  # seconds
LATE = 2 * 5.0 + 5.0  # two polls of the guard; a busy machine needs some more for its own part
TRAINER = """#!/bin/sh
trap 'echo saved; exit 75' TERM
echo "step 1/1000 loss 2.0"
while :; do sleep 0.2; done
"""


@pytest.fixture
def bed(tmp_path):
  python = tmp_path / "python"
  python.write_text(TRAINER)
  python.chmod(0o755)
  with lives.bed(tmp_path) as made:
    made.python = python
    yield made


def up(bed, *words, capacity="--spot"):
  python = f"--python={bed.python}"
  return lives.up(python, f"--idle={IDLE:g}", *words, capacity=capacity)


def started(bed, *words, **fields):
  """Starts a launcher, and returns it when the trainers run."""
  launcher = bed.start(*up(bed, *words, **fields))
  wait_until(lambda: len(bed.hosts()) == 2 and all(h.processes("trainer") for h in bed.hosts()))
  return launcher


def assert_removes_itself(bed, limit, since=0.0):
  """Waits until nothing is paid for; fails if more than `limit` seconds were, from `since` on."""
  wait_until(lambda: not bed.cloud.nodes, 300)
  paid = bed.cloud.paid() - since
  print(f"paid {paid:.1f} s, {paid - limit:+.1f} s beyond the limit of {limit:.1f} s")
  assert paid < limit + LATE


@slow
@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_granted_hours_later(bed, how):
  """Sequences 1 and 2: no process has ever reached a host."""
  bed.cloud.allow(False)
  launcher = bed.start(*up(bed))
  launcher.wait_for("in the queue")
  getattr(launcher, how)()
  if how == "interrupt":
    assert launcher.finish(60) == LEFT
    assert "hosts count from then, with this machine off too" in launcher.log
    assert "have not proven yet" in launcher.log
    assert "If the slice is lost, nothing asks for another one" in launcher.log
  bed.cloud.grant(NAME)
  assert_removes_itself(bed, IDLE)


@slow
def test_a_first_start_that_fails(bed):
  """Sequence 3: the hosts may not read the bucket."""
  launcher = bed.start(*up(bed))
  launcher.wait_for("waiting for the guard|hosts answer|PROVISIONING")
  bed.bucket.refuse("^GET .*attempt-1.json", 403)
  launcher.wait_for("attempt-1.json|starting attempt 1")
  time.sleep(5)
  launcher.kill()
  seen = bed.cloud.paid()
  assert_removes_itself(bed, IDLE, seen)


@slow
def test_hosts_reboot(bed):
  """Sequence 4: they go on by themselves, and the limit does not begin again."""
  launcher = started(bed, "--max-hours=0.03", capacity="--on-demand")
  launcher.kill()
  before = sorted(trainer.pid for trainer in bed.trainers())
  bed.cloud.reboot(NAME)
  wait_until(lambda: all(host.processes("trainer") for host in bed.hosts()))
  assert not set(before) & {trainer.pid for trainer in bed.trainers()}
  assert len(bed.trainers()) == 2
  assert_removes_itself(bed, 108.0)


@slow
def test_the_guard_is_killed_again_and_again(bed):
  """Sequence 5, at the cost limit of a run that trains."""
  launcher = started(bed, "--max-hours=0.02", capacity="--on-demand")
  launcher.kill()
  log = bed.hosts()[0].state / NAME / "attempt-1" / "host.log"
  for _ in range(3):
    for host in bed.hosts():
      for guard in host.processes("guard"):
        if "systemd-run" not in guard.cmdline():
          guard.kill()
    time.sleep(7)
  assert_removes_itself(bed, 72.0)
  assert "saved" in log.read_text()  # the trainer was asked in time
  code, output = bed.run(*up(bed, "--max-hours=0.02", capacity="--on-demand"))
  assert code == COST, output  # what was paid for unseen counts
  assert bed.cloud.count(r"^POST .*/queuedResources$") == 1


@slow
@pytest.mark.parametrize("explains", [True, False], ids=["told", "not told"])
def test_a_service_account_that_may_not_delete(bed, explains):
  """Sequence 6: nothing is bought, or it is found out at the first boot; no trainer starts."""
  bed.cloud.may_delete, bed.cloud.explains = False, explains
  code, log = bed.run(*up(bed))
  assert code == (USAGE if explains else ERROR), log
  assert not bed.cloud.nodes and not bed.cloud.resources
  assert not bed.names("logs/attempt-1")
  assert bed.cloud.count(r"^POST .*/queuedResources$") == (0 if explains else 1)
  if explains:
    assert "may not delete TPUs, so no slice could remove itself" in log
  else:
    assert "cannot be found out from here (UNKNOWN_INFO)" in log
    assert re.search("may not delete queued resources: Permission 'tpu.nodes.delete' denied", log)


@slow
def test_a_bucket_that_is_closed(bed):
  """The limit needs no bucket."""
  launcher = started(bed, "--max-hours=0.02", capacity="--on-demand")
  launcher.kill()
  bed.bucket.refuse(".", 403)
  assert_removes_itself(bed, 72.0)


@slow
def test_two_logins_of_one_run(bed):
  """The second finds the trainer of the first; neither starts another, and no guard goes astray."""
  first = bed.start(*up(bed, "--owner=team"))
  wait_until(lambda: len(bed.trainers()) == 2)
  pids = sorted(trainer.pid for trainer in bed.trainers())
  first.kill()
  second = lives.Process(
    up(bed, "--owner=team"), bed.environment | {"USER": "bob", "LOGNAME": "bob"}
  )
  try:
    second.wait_for("training")
    assert sorted(trainer.pid for trainer in bed.trainers()) == pids
    homes = {path.name for path in (bed.hosts()[0].folder / "home").iterdir()}
    assert "bob" in homes and len(homes) == 2
    guards = [p for p in bed.hosts()[0].processes("guard") if "systemd-run" not in p.cmdline()]
    assert len(guards) == 1
    time.sleep(IDLE + LATE)  # the first launcher has gone; its login counts for nothing
    assert len(bed.trainers()) == 2
  finally:
    second.interrupt()
    second.finish(60)


@slow
def test_a_create_whose_operation_fails(bed):
  """The reason is told, and nothing was bought."""
  bed.cloud.fail_create(7, "The service account pod@project does not exist")
  code, log = bed.run(*up(bed))
  assert code == ERROR, log
  assert "The service account pod@project does not exist" in log
  assert bed.cloud.count(r"^POST .*/queuedResources$") == 1
