"""Processes as hosts: what the pod passes on, and that it leaves nothing behind."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from launch import local_pod

COMMAND = [sys.executable, "-m", "launch.local_pod"]


def run(*arguments):
  result = subprocess.run(
    [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
  )
  return result.returncode, result.stdout


def test_every_host_gets_its_environment_and_its_prefix():
  code, log = run(
    "--hosts=2",
    "--devices-per-host=3",
    "--",
    "bash",
    "-c",
    (
      "echo $JAX_PROCESS_ID of $JAX_NUM_PROCESSES with $JAX_NUM_CPU_DEVICES"
      " at $JAX_COORDINATOR_ADDRESS"
    ),
  )
  assert code == 0
  for host in range(2):
    assert f"[{host}] {host} of 2 with 3 at localhost:" in log


def test_the_first_host_that_fails_is_told_with_its_last_lines_and_the_others_are_ended():
  code, log = run(
    "--hosts=3",
    "--grace=1",
    "--",
    "bash",
    "-c",
    "test $JAX_PROCESS_ID != 1 && sleep 600 & wait; echo no such thing; "
    "test $JAX_PROCESS_ID != 1 || exit 7; sleep 600",
  )
  assert code == 7
  assert "host 1 was the first to fail, with code 7; its last lines:\n  no such thing" in log
  assert "killing host 0, 2, still running 1 s after host 1 ended" in log
  pids = [int(line.split()[-1]) for line in log.splitlines() if "started as process" in line]
  assert len(pids) == 3 and not any(map(psutil.pid_exists, pids))


def test_where_processes_cannot_be_bound_to_cores_all_run_on_all(monkeypatch, capfd):
  monkeypatch.setattr(local_pod, "_CAN_BIND", False)
  monkeypatch.delattr(os, "sched_setaffinity")
  handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
  assert local_pod.main(["--hosts=2", "--", "true"]) == 0
  assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
  with pytest.raises(SystemExit):
    local_pod.main(["--hosts=1", "--cpus=1", "--", "true"])
  assert "--cpus needs Linux" in capfd.readouterr().err


def test_signals_are_passed_on():
  script = "trap 'echo stopping; exit 75' TERM; echo ready; while true; do sleep 0.1; done"
  with subprocess.Popen(
    [*COMMAND, "--hosts=2", "--", "bash", "-c", script], stdout=subprocess.PIPE, text=True
  ) as pod:
    ready = 0
    while ready < 2:
      ready += "ready" in pod.stdout.readline()
    pod.send_signal(signal.SIGTERM)
    log = pod.communicate(timeout=60)[0]
  assert pod.returncode == 75
  for host in range(2):
    assert f"[{host}] stopping" in log and f"[{host}] ended with code 75" in log


def test_hosts_may_have_cores_of_their_own():
  code, log = run(
    "--hosts=1",
    "--cpus=1",
    "--",
    sys.executable,
    "-c",
    "import os, time; time.sleep(0.5); print(len(os.sched_getaffinity(0)), 'core')",
  )
  assert code == 0 and "[0] 1 core" in log


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--hosts=0", "--", "true"], "must be 1 or more"),
    (["--hosts=2"], "give the command after --"),
    ([f"--hosts={os.cpu_count() + 1}", "--cpus=1", "--", "true"], "is more than the"),
  ],
)
def test_bad_arguments_are_one_sentence(arguments, words):
  code, log = run(*arguments)
  assert code == 2 and words in log.splitlines()[-1]
