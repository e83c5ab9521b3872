"""Two hosts in network namespaces of their own, joined by one cable, which is cut."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.trainer import tiny
from trainer.errors import HOST_LOST


def ip(*arguments):
  subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def namespaces():
  """Names of two namespaces, 10.77.0.1 and 10.77.0.2 on the interface `cable`."""
  names = [f"pod{host}-{os.getpid()}" for host in range(2)]
  if not (shutil.which("ip") and shutil.which("unshare")):
    pytest.skip("needs ip and unshare")
  try:
    for name in names:
      ip("netns", "add", name)
  except subprocess.CalledProcessError as error:
    pytest.skip(f"network namespaces may not be made here: {error.stderr.decode().strip()}")
  try:
    ip(
      "link",
      "add",
      "cable",
      "netns",
      names[0],
      "type",
      "veth",
      "peer",
      "name",
      "cable",
      "netns",
      names[1],
    )
    for host, name in enumerate(names):
      ip("-n", name, "address", "add", f"10.77.0.{host + 1}/24", "dev", "cable")
      for device in ("cable", "lo"):
        ip("-n", name, "link", "set", device, "up")
    yield names
  finally:
    for name in names:
      ip("netns", "delete", name)


def test_a_cut_cable_ends_both_hosts(tmp_path, namespaces):
  # gloo listens where the name of the host points to.
  (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 pod-host0\n10.77.0.2 pod-host1\n")
  command = [
    sys.executable,
    "-m",
    "trainer",
    f"--config={tiny.__file__}",
    f"--workdir={tmp_path / 'run'}",
    "--config.data.kind=synthetic",
    "--config.total_steps=1000000",
    "--config.log.every_steps=10",
    "--config.pod.timeout_seconds=8",
  ]
  logs, processes = [tmp_path / f"log-{host}" for host in range(2)], []
  try:
    for host, name in enumerate(namespaces):
      inside = f'hostname pod-host{host} && mount --bind {tmp_path}/hosts /etc/hosts && exec "$@"'
      environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": "10.77.0.1:7000",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(host),
        "JAX_NUM_CPU_DEVICES": "1",
      }
      with open(logs[host], "w") as log:
        processes.append(
          subprocess.Popen(
            [
              "ip",
              "netns",
              "exec",
              name,
              "unshare",
              "--uts",
              "--mount",
              "sh",
              "-c",
              inside,
              "sh",
              *command,
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
          )
        )
    deadline = time.monotonic() + 600
    while "step 20/" not in logs[0].read_text():
      assert time.monotonic() < deadline and not any(process.poll() for process in processes), logs[
        0
      ].read_text()
      time.sleep(0.2)
    ip("-n", namespaces[1], "link", "set", "cable", "down")
    assert [process.wait(timeout=90) for process in processes] == [HOST_LOST, HOST_LOST]
  finally:
    for process in processes:
      process.send_signal(signal.SIGKILL)
  assert "gives up: host 1 was last heard" in logs[0].read_text()
  assert "gives up: host 0, which coordinates, cannot be reached" in logs[1].read_text()
