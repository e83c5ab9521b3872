"""Whole lives of runs: the real launcher, gcloud and trainer, on the cloud of fake_cloud.py."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import time
from typing import Any
import urllib.parse

import psutil
import pytest
import requests

from tests import quickly
from tests.launch.fake_cloud import Cloud
from tests.trainer import bucket_server, shared, tiny

ROOT = pathlib.Path(__file__).parents[2]
ZONE = "us-central2-b"
LIMIT = 900  # seconds for anything; nothing of it takes a tenth of that on an unloaded machine
NAME = "run"

needs_gcloud = pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")


class Process(shared.Process):
  """A launcher at work."""

  limit = LIMIT

  def __init__(self, words: list[str], environment: dict[str, str]):
    # A shell in the background ignores Ctrl-C, and so would all that it starts.
    super().__init__(
      [ROOT / "launch" / "tpu", *words],
      env=environment,
      start_new_session=True,
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

  def interrupt(self) -> None:
    """Ctrl-C."""
    os.killpg(self._process.pid, signal.SIGINT)

  def kill(self) -> None:
    """Ends it as a power cut would, with every gcloud that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
      for process in [
        psutil.Process(self._process.pid),
        *psutil.Process(self._process.pid).children(recursive=True),
      ]:
        with contextlib.suppress(psutil.NoSuchProcess):
          process.kill()
    self._process.wait()


class Bed:
  """A cloud with a bucket, and a laptop to launch from.

  Attributes:
    cloud: of all slices.
    bucket: server of the bucket `bucket`.
    environment: of whoever launches.
  """

  def __init__(self, cloud: Cloud, bucket: bucket_server.Server, environment: dict[str, str]):
    self.cloud, self.bucket, self.environment = cloud, bucket, environment
    self._started: list[Process] = []

  def start(self, *words: str) -> Process:
    """Starts `launch/tpu WORDS`."""
    self._started.append(Process(list(words), self.environment))
    return self._started[-1]

  def run(self, *words: str) -> tuple[int, str]:
    """Returns exit code and output of `launch/tpu WORDS`."""
    process = self.start(*words)
    return process.finish(), process.log

  def close(self) -> None:
    for process in self._started:
      process.kill()

  def _object(self, name: str) -> requests.Response:
    name = urllib.parse.quote(name, safe="")
    return requests.get(f"{self.bucket.url}/storage/v1/b/bucket/o/{name}?alt=media", timeout=60)

  def read(self, name: str) -> str:
    """Returns what an object of the run holds."""
    answer = self._object(f"run/{name}")
    assert answer.status_code == 200, f"{name}: {answer.status_code}"
    return answer.text

  def json(self, name: str) -> Any:
    """Returns what an object of the run holds."""
    return json.loads(self.read(name))

  def names(self, prefix: str = "") -> list[str]:
    """Lists objects of the run."""
    listed = requests.get(
      f"{self.bucket.url}/storage/v1/b/bucket/o?prefix=run/{prefix}", timeout=60
    ).json()
    return [entry["name"].removeprefix("run/") for entry in listed.get("items", [])]

  def checkpoints(self) -> list[int]:
    """Lists the steps of whole checkpoints."""
    found = [
      re.search(r"/checkpoints/(\d+)/commit_success.txt$", name)
      for name in self.names("workdir/checkpoints/")
    ]
    return sorted(int(match[1]) for match in found if match)

  def wait_for_checkpoint(self, step: int = 1) -> int:
    """Returns the newest checkpoint once it is at or after `step`; fails if the launcher ends."""

    def newest() -> int | None:
      found = max(self.checkpoints(), default=0)
      last = self._started[-1]
      assert found >= step or not last.ended, last.log
      return found if found >= step else None

    return wait_until(newest)

  def fingerprints(self, step: int) -> dict[str, str]:
    """Returns the hash of every leaf of a checkpoint."""
    return self.json(f"workdir/checkpoints/{step}/meta/metadata")["fingerprints"]

  def hosts(self) -> list[Any]:
    """Returns the hosts that exist."""
    return [host for node in self.cloud.nodes.values() for host in node.hosts]

  def trainers(self) -> list[psutil.Process]:
    """Returns the trainers that run."""
    return [process for host in self.hosts() for process in host.processes("trainer")]

  def started(self, attempt: int, worker: int) -> int:
    """Returns how many trainers an attempt has had on a host of the first slice, by their log."""
    return self.read(f"logs/attempt-{attempt}/host-0-{worker}.log").count(
      "agent: started the trainer"
    )


def wait_until(condition, limit: float = LIMIT) -> Any:
  """Returns what `condition` returns, when that is something."""
  deadline = time.monotonic() + limit
  while not (found := condition()):
    assert time.monotonic() < deadline, "it did not come"
    time.sleep(0.2)
  return found


@contextlib.contextmanager
def bed(folder: pathlib.Path) -> Iterator[Bed]:
  """Makes everything, and ends everything."""
  for name in ("bucket", "cloud"):
    (folder / name).mkdir()
  with bucket_server.serving(folder / "bucket") as bucket:
    storage = bucket.environment | {
      "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{bucket.url}/storage/v1/"
    }
    shared = ("JAX_COMPILATION", "JAX_PERSISTENT")
    compiled = {name: value for name, value in os.environ.items() if name.startswith(shared)}
    flags = {"XLA_FLAGS": quickly.XLA_FLAGS, "TMPDIR": str(folder)}
    with Cloud(folder / "cloud", storage | compiled | flags) as cloud:
      me = {"USER": "me", "LOGNAME": "me"}
      made = Bed(cloud, bucket, os.environ | cloud.environment | storage | me)
      try:
        yield made
      finally:
        made.close()


def up(
  *words: str, accelerator_type: str = "v4-16", capacity: str = "--spot", steps: int = 40
) -> list[str]:
  """Returns the words that train the tiny net, with pauses of seconds where there are minutes."""
  return [
    "up",
    NAME,
    f"--type={accelerator_type}",
    capacity,
    f"--zone={ZONE}",
    "--bucket=gs://bucket",
    f"--python={sys.executable}",
    "--no-check",
    "--poll=4s",
    "--backoff=1s",
    "--idle=1h",
    f"--config={pathlib.Path(tiny.__file__).relative_to(ROOT)}",
    "--config.data.kind=synthetic",
    f"--config.total_steps={steps}",
    "--config.log.every_steps=10",
    "--config.checkpoint.every_steps=50",
    *words,
  ]
