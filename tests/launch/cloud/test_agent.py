"""The agent of a host: one trainer at a time, idempotent requests, and a guard."""

import ast
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from launch.cloud import bundle
from launch.host import files, install, logs
from launch.host import host as host_lib

LINE = "12:00:00 I step {}/100  epoch 0.10  loss 2.5  ETA 5 min"


@pytest.fixture
def host(tmp_path, monkeypatch):
  monkeypatch.setenv("TPU_WORKER_ID", "3")
  monkeypatch.setenv("MEGASCALE_SLICE_ID", "1")
  made = host_lib.Host("gs://bucket/r1", tmp_path)
  made.contacted()
  return made


def began(host, attempt=1, phase="running", **values):
  files.write_json(
    host.home / "state.json",
    {"attempt": attempt, "phase": phase, "boot": host.me["boot"], "started": time.time()} | values,
  )
  (host.home / f"attempt-{attempt}").mkdir(exist_ok=True)


def old_pythons():
  """Returns the Python 3.8 to 3.10 of this machine, as the images of TPU VMs have them."""
  folders = [pathlib.Path.home() / ".pyenv/versions", pathlib.Path("/opt")]
  found = [path for folder in folders for path in folder.glob("3.[89]*/bin/python")]
  found += [path for folder in folders for path in folder.glob("3.10*/bin/python")]
  named = [shutil.which(f"python3.{minor}") for minor in (8, 9, 10)]
  return sorted({str(path) for path in [*found, *filter(None, named)]})


def test_it_is_written_for_the_python_of_old_images():
  for path in pathlib.Path(host_lib.__file__).parent.glob("*.py"):
    ast.parse(path.read_text(), feature_version=(3, 8))


@pytest.mark.skipif(not old_pythons(), reason="no Python 3.8 to 3.10 is installed")
def test_it_runs_on_the_python_of_old_images(tmp_path):
  packed = bundle.pack_agent(tmp_path)
  code = (
    f"import sys; sys.path.insert(0, {str(packed)!r}); sys.argv = [{str(packed)!r}]; "
    "from launch.host import __main__, google; "
    "print(google._seconds_of('2026-01-02T03:04:05.678901234Z'))"
  )
  for python in old_pythons():
    done = subprocess.run([python, "-IS", "-c", code], capture_output=True, text=True)
    version = subprocess.run([python, "--version"], capture_output=True, text=True)
    if version.returncode == 0:
      assert (done.returncode, done.stdout) == (0, "1767323045\n"), f"{python}: {done.stderr}"


def test_it_is_one_file_of_the_same_bytes_everywhere(tmp_path):
  packed = bundle.pack_agent(tmp_path)
  assert packed.name == bundle.agent_name()
  environment = os.environ | {"GCE_METADATA_HOST": "localhost:9"}
  done = subprocess.run(
    [sys.executable, "-IS", packed, "gs://bucket/r1", "status"],
    capture_output=True,
    text=True,
    check=True,
    cwd="/",
    env=environment,
  )
  assert json.loads(done.stdout)["phase"] == "none"


def test_the_first_words_of_a_host(host):
  status = host.status()
  assert (
    status["slice"],
    status["worker"],
    status["attempt"],
    status["phase"],
    status["step"],
  ) == (1, 3, None, "none", None)


def test_a_host_without_metadata_is_not_remembered(tmp_path, monkeypatch):
  monkeypatch.setenv("GCE_METADATA_HOST", "localhost:9")
  for name in ("TPU_WORKER_ID", "MEGASCALE_SLICE_ID"):
    monkeypatch.delenv(name, raising=False)
  assert host_lib.Host("gs://bucket/r1", tmp_path).name == "0-0"
  monkeypatch.setattr(
    host_lib,
    "metadata",
    {
      "attributes/agent-worker-number": "5",
      "attributes/tpu-env": "A: 'b'\nMEGASCALE_SLICE_ID: '2'\n",
    }.get,
  )
  assert host_lib.Host("gs://bucket/r1", tmp_path).name == "2-5"
  monkeypatch.setattr(host_lib, "metadata", {}.get)
  assert host_lib.Host("gs://bucket/r1", tmp_path).name == "2-5"


def test_progress_is_the_last_line(tmp_path):
  log = tmp_path / "log"
  assert logs.progress(log)["step"] is None
  log.write_bytes(
    b"\xff" * 100_000
    + b"\n"
    + "\n".join(LINE.format(step) for step in range(50)).encode()
    + b"\nother\n"
  )
  assert logs.progress(log) == {
    "step": 49,
    "total": 100,
    "progress": LINE.format(49).removeprefix("12:00:00 I "),
  }


def test_a_trainer_that_is_gone_has_crashed_and_one_of_before_a_restart_was_lost(host):
  began(host)
  assert (host.status()["phase"], host.status()["code"]) == ("ended", host_lib.CRASHED)
  began(host, phase="installing")
  assert host.status()["phase"] == "installing"
  began(host, phase="installing", started=time.time() - 100)
  assert host.status()["phase"] == "ended"
  began(host, boot="another")
  assert (host.status()["phase"], host.status()["code"]) == ("ended", host_lib.HOST_LOST)
  with files.locked(host.home / "attempt.lock", 0):
    began(host)
    assert (host.status()["phase"], host.status()["code"]) == ("running", None)


def test_a_lock_is_held_until_its_process_ends(tmp_path):
  path = tmp_path / "lock"
  code = (
    f"import fcntl, sys; f = open({str(path)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    "print(flush=True); sys.stdin.read()"
  )
  with subprocess.Popen(
    [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  ) as holder:
    holder.stdout.readline()
    assert not files.is_free(path)
    with pytest.raises(TimeoutError), files.locked(path, 0):
      pass
    holder.kill()
  assert files.is_free(path)


def test_starts_that_are_asked_for_at_once_start_one_trainer(host, tmp_path, monkeypatch):
  fake = tmp_path / "bin" / "gcloud"
  fake.parent.mkdir()
  fake.write_text(
    "#!/bin/bash\n[[ $3 == *.json ]] && exec cp $HOME/in-bucket.json $4\n"
    "exec cp $HOME/code.tar.gz $4\n"
  )
  fake.chmod(0o755)
  subprocess.run(["tar", "czf", tmp_path / "code.tar.gz", "--files-from=/dev/null"], check=True)
  trainer = tmp_path / "python"
  trainer.write_text(
    "#!/bin/bash\necho one trainer; trap 'exit 75' TERM; while :; do sleep 0.05; done\n"
  )
  trainer.chmod(0o755)
  spec = {"code": "abc", "secrets": {}, "argv": [], "python": str(trainer)}
  spec["archive"] = hashlib.sha256((tmp_path / "code.tar.gz").read_bytes()).hexdigest()
  spec["limits"] = {"max_seconds": None, "idle": None}
  spec["request"] = spec["limits"] | {"run": "r1", "project": "p", "zone": "z"}
  (tmp_path / "in-bucket.json").write_text(json.dumps(spec))
  sha = hashlib.sha256((tmp_path / "in-bucket.json").read_bytes()).hexdigest()
  environment = os.environ | {
    "PATH": f"{fake.parent}:{os.environ['PATH']}",
    "GCE_METADATA_HOST": "localhost:9",
    "HOME": str(tmp_path),
  }

  program = bundle.pack_agent(tmp_path)

  def ask(*words):
    return subprocess.Popen(
      [sys.executable, program, "gs://bucket/r1", *words],
      env=environment,
      cwd=tmp_path,
      stdout=subprocess.PIPE,
      text=True,
    )

  try:
    asked = [ask("start", "1", sha) for _ in range(3)]
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in asked]
    assert {(answer["attempt"], answer["trouble"]) for answer in answers} == {(1, None)}
    altered = json.loads(ask("start", "2", "0" * 64).communicate(timeout=60)[0])
    assert altered["attempt"] == 1 and "somebody else has written it" in altered["trouble"]
    deadline = time.monotonic() + 30
    while not (log := host.log()).exists() or "one trainer" not in log.read_text():
      assert time.monotonic() < deadline
      time.sleep(0.05)
    ask("start", "1", sha).communicate(timeout=60)
    assert log.read_text().count("one trainer") == 1
    # A late repetition ends nothing; a later attempt ends the earlier one, which stays ended.
    assert json.loads(ask("end", "1").communicate(timeout=60)[0])["phase"] == "running"
    ended = json.loads(ask("end", "2").communicate(timeout=60)[0])
    assert (ended["attempt"], ended["phase"], ended["code"]) == (1, "ended", 75)
    assert json.loads(ask("start", "2", sha).communicate(timeout=60)[0])["attempt"] == 2
    assert json.loads(ask("start", "1", sha).communicate(timeout=60)[0])["attempt"] == 2
    ask("stop").communicate(timeout=60)
    while host.status()["phase"] != "ended":
      assert time.monotonic() < deadline + 30
      time.sleep(0.05)
    assert host.status()["code"] == 75 and host.status()["stop_requested"]
  finally:
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
      try:
        if f"HOME={tmp_path}\0".encode() in path.read_bytes() and path.parent.name != str(
          os.getpid()
        ):
          os.kill(int(path.parent.name), 9)
      except OSError:
        pass


def test_a_trainer_is_asked_to_end_once_whoever_asks(host):
  code = (
    "import signal, time; n = 0\ndef count(*_):\n  global n; n += 1\n"
    "signal.signal(signal.SIGTERM, count); print(flush=True)\n"
    "signal.signal(signal.SIGUSR1, lambda *_: (print(n, flush=True), exit()))\n"
    "while True: time.sleep(1)"
  )
  with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as trainer:
    trainer.stdout.readline()
    with files.locked(host.home / "attempt.lock", 0):
      began(host, pid=trainer.pid)
      host.stop()
      host.stop()
      host.ask_to_end()
      time.sleep(0.2)
      host.signal_trainer(signal.SIGUSR1)
      assert trainer.stdout.readline() == "1\n"


def test_the_file_of_secrets_is_no_shell(tmp_path):
  path = tmp_path / "env"
  path.write_text("# a comment\nTOKEN=a=b $(touch x) 'c\"\n\nEMPTY=\n")
  assert install.read_environment(path) == {"TOKEN": "a=b $(touch x) 'c\"", "EMPTY": ""}
  assert path.stat().st_mode & 0o777 == 0o600
