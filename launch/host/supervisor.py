"""The process that runs one trainer to its end and records its exit code."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import time
import traceback

from launch.host.files import locked, write_json
from launch.host.host import CRASHED, Host
from launch.host.install import prepare

_GUARD_SECONDS = 10.0


def supervise(host: Host) -> None:
  """Run the trainer of the current attempt to its end."""
  with contextlib.suppress(OSError):  # a guard that started it is spared when memory runs out
    pathlib.Path("/proc/self/oom_score_adj").write_text("0")
  with locked(host.home / "attempt.lock", 5) as lock:
    host.change(supervisor=os.getpid())
    trainer, trouble = None, None
    try:
      with open(host.log(), "ab") as log:
        command, folder, environment = prepare(host.home, host.url, host.spec(), log)
        trainer = subprocess.Popen(
          command,
          cwd=folder,
          env=environment,
          stdin=subprocess.DEVNULL,
          stdout=log,
          stderr=log,
          start_new_session=True,
          pass_fds=[lock],
        )
        log.write(f"agent: started the trainer as process {trainer.pid}\n".encode())
      host.change(phase="running", pid=trainer.pid, running=time.time())
      if (host.home / "stop").exists():
        host.ask_to_end()
      code = _wait(host, trainer)
    except Exception as error:  # of any kind: the report is the only place where it is seen
      if trainer:
        trainer.kill()
      code = CRASHED
      trouble = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
      with open(host.log(), "a") as text:
        text.write(f"agent: {trouble}\n{traceback.format_exc()}")
    ended = {"phase": "ended", "code": code, "ended": time.time(), "trouble": trouble}
    host.change(pid=None)
    exit_file = host.log().with_name("exit.json")
    write_json(exit_file, dict(host.status(), **ended))
    host.upload(exit_file, host.log_url(f"exit-{host.name}.json"), seconds=60)
    host.upload_log(seconds=60)
    host.change(**ended)  # last: a launcher that reads it may remove this machine


def _wait(host: Host, trainer: subprocess.Popen[bytes]) -> int:
  """Return the exit code of the trainer; meanwhile, see to it that there is a guard."""
  while not _has_ended(trainer):
    host.keep_guard()
  return trainer.returncode


def _has_ended(trainer: subprocess.Popen[bytes]) -> bool:
  """Whether the trainer has ended, after a wait of some seconds."""
  try:
    trainer.wait(_GUARD_SECONDS)
  except subprocess.TimeoutExpired:
    return False
  return True
