"""ssh, scp, ssh-keygen, ssh-add and sudo for hosts that are folders.

    python fake_ssh.py ROOT PROGRAM [arguments]

ROOT/hosts/ADDRESS.json holds the folder and the environment of a host, and its `link`: "up", "down"
(no answer), or "hung" (it accepts the connection, no more). A command runs in that folder in a
session of its own, so that it outlives a broken connection. Few imports: it must start fast.
"""

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
  address = target.rpartition("@")[2]
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
  return host


def _ssh(root, arguments):
  """ssh [options] USER@ADDRESS [--] COMMAND ..."""
  _, (target, *command) = getopt.getopt(
    arguments, "1246AaCfGgKkMNnqsTtVvXxYyB:b:c:D:E:e:F:I:i:J:L:l:m:O:o:p:Q:R:S:W:w:"
  )
  host = _connect(root, target)
  command = command[1:] if command[:1] == ["--"] else command
  return subprocess.call(
    ["bash", "-c", " ".join(command)],
    cwd=host["folder"],
    env=host["environment"],
    start_new_session=True,
  )


def _scp(root, arguments):
  """scp [options] FILE ... FILE, with USER@ADDRESS:PATH on one side."""
  _, files = getopt.getopt(arguments, "346BCpqrTvc:F:i:J:l:o:P:S:")

  def local(name):
    target, colon, path = name.partition(":")
    if not colon or "/" in target:
      return name
    return os.path.join(_connect(root, target)["folder"], path.removeprefix("~/"))

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
  os.execvp(arguments[0], arguments)


def _print_key(root, arguments):
  del root, arguments
  print(_KEY)
  return 0


if __name__ == "__main__":
  _PROGRAMS = {
    "ssh": _ssh,
    "scp": _scp,
    "sudo": _sudo,
    "ssh-keygen": _print_key,
    "ssh-add": _print_key,
  }
  sys.exit(_PROGRAMS[sys.argv[2]](sys.argv[1], sys.argv[3:]))
