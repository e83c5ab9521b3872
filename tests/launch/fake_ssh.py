"""ssh, scp, ssh-keygen, ssh-add, and sudo, systemd-run, systemctl of hosts that are folders.

    python fake_ssh.py ROOT PROGRAM [arguments]

ROOT/hosts/ADDRESS.json holds the folder and the environment of a host, and its `link`: "up", "down"
(no answer), or "hung" (it accepts the connection, no more). A command runs in the home of its
login, FOLDER/home/USER, in a session of its own: it outlives a broken connection. Few imports: it
must start fast.
"""

import fcntl
import getopt
import json
import os
import shutil
import subprocess
import sys
import time

_KEY = "3072 SHA256:AAAA user@laptop (RSA)"
_REMOTE_END = 255  # of ssh, when the connection is not there


def write(path, content):
  """Writes JSON so that a reader finds the old or the new."""
  partial = path.with_name(f"{path.name}.tmp")
  partial.write_text(json.dumps(content))
  partial.replace(path)


def _connect(root, target):
  """Returns what is known of the host USER@ADDRESS; ends here where it cannot be reached."""
  user, _, address = target.rpartition("@")
  try:
    with open(f"{root}/hosts/{address}.json", encoding="utf-8") as file:
      host = json.load(file)
  except FileNotFoundError:
    host = {"link": "down"}
  if host["link"] == "hung":
    time.sleep(3600)
  if host["link"] != "up":
    sys.stderr.write(f"ssh: connect to host {address} port 22: Connection timed out\n")
    sys.exit(_REMOTE_END)
  home = f"{host['folder']}/home/{user or 'user'}"
  os.makedirs(home, exist_ok=True)
  return home, dict(host["environment"], HOME=home, USER=user or "user")


def _ssh(root, arguments):
  """ssh [options] USER@ADDRESS [--] COMMAND ..."""
  _, (target, *command) = getopt.getopt(
    arguments, "1246AaCfGgKkMNnqsTtVvXxYyB:b:c:D:E:e:F:I:i:J:L:l:m:O:o:p:Q:R:S:W:w:"
  )
  home, environment = _connect(root, target)
  command = command[1:] if command[:1] == ["--"] else command
  return subprocess.call(
    ["bash", "-c", " ".join(command)],
    cwd=home,
    env=environment,
    start_new_session=True,
  )


def _scp(root, arguments):
  """scp [options] FILE ... FILE, with USER@ADDRESS:PATH on one side."""
  _, files = getopt.getopt(arguments, "346BCpqrTvc:F:i:J:l:o:P:S:")

  def local(name):
    target, colon, path = name.partition(":")
    if not colon or "/" in target:
      return name
    return os.path.join(_connect(root, target)[0], path.removeprefix("~/"))

  *sources, target = map(local, files)
  for source in sources:
    try:
      if os.path.isdir(source):
        shutil.copytree(source, os.path.join(target, os.path.basename(source)), dirs_exist_ok=True)
      else:
        shutil.copy(source, target)
    except OSError as error:
      sys.stderr.write(f"scp: {error}\n")
      return 1
  return 0


def _sudo(root, arguments):
  """sudo [options] COMMAND ..., for whom everybody is root."""
  del root
  while arguments[0].startswith("-"):
    arguments.pop(0)
  os.environ.update(HOME=f"{os.environ['FAKE_HOST']}/root", USER="root")
  os.execvp(arguments[0], arguments)


def _systemd_run(root, arguments):
  """systemd-run --unit=NAME [options] COMMAND ...: a process that starts it again and again."""
  del root
  options = []
  while arguments[0].startswith("-"):
    options.append(arguments.pop(0))
  unit = next(option[7:] for option in options if option.startswith("--unit="))
  for option in options:
    if option.startswith("--setenv="):
      name, _, value = option[9:].partition("=")
      os.environ[name] = value
  if os.fork():
    return 0
  os.setsid()
  held = open(f"{os.environ['FAKE_HOST']}/{unit}.lock", "wb")  # noqa: SIM115, as long as it lives
  fcntl.flock(held, fcntl.LOCK_EX)
  with open(f"{os.environ['FAKE_HOST']}/{unit}.log", "ab") as log:
    while True:
      subprocess.call(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
      time.sleep(5)


def _systemctl(root, arguments):
  """systemctl is-active --quiet NAME"""
  del root
  try:
    with open(f"{os.environ['FAKE_HOST']}/{arguments[-1]}.lock", "rb") as held:
      fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except FileNotFoundError:
    return 3
  except BlockingIOError:
    return 0
  return 3


def _print_key(root, arguments):
  del root, arguments
  print(_KEY)
  return 0


if __name__ == "__main__":
  _PROGRAMS = {
    "ssh": _ssh,
    "scp": _scp,
    "sudo": _sudo,
    "systemd-run": _systemd_run,
    "systemctl": _systemctl,
    "ssh-keygen": _print_key,
    "ssh-add": _print_key,
  }
  sys.exit(_PROGRAMS[sys.argv[2]](sys.argv[1], sys.argv[3:]))
