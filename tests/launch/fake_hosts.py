"""Workers of fake slices: folders with processes in them, and with a metadata server each."""

from http import HTTPStatus
import http.server
import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import threading
import time

import psutil

from tests.launch import fake_ssh

_PROGRAMS = (
  ("bin", ("ssh", "scp", "ssh-keygen", "ssh-add")),
  ("host-bin", ("sudo", "systemd-run", "systemctl")),
)


def serve(
  handler: type[http.server.BaseHTTPRequestHandler], owner: object
) -> http.server.ThreadingHTTPServer:
  """Serves `owner`, as the handler's `server.owner`, at a free port of loopback."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  server.daemon_threads, server.owner = True, owner
  threading.Thread(target=server.serve_forever, daemon=True).start()
  return server


def install(root: pathlib.Path) -> None:
  """Writes the programs of root/bin and root/host-bin, root/hosts, and the home of the user."""
  (root / "hosts").mkdir()
  for folder, names in _PROGRAMS:
    (root / folder).mkdir()
    for name in names:
      program = root / folder / name
      program.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -IS "{fake_ssh.__file__}" "{root}" {name} "$@"\n'
      )
      program.chmod(program.stat().st_mode | stat.S_IXUSR)
  keys = root / "home" / ".ssh"
  keys.mkdir(parents=True)
  (keys / "google_compute_engine").write_text("private key")
  (keys / "google_compute_engine.pub").write_text(
    "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQ== user@laptop\n"
  )


class Host:
  """A worker: a folder, reached by its address.

  Attributes:
    address: its IP address, and the name of its folder.
    folder: with `home` of its logins, `root`, and `state`, which stands for /var/lib/tpu.
    link: see fake_ssh.py.
    preempted: whether its metadata say so.
    metadata: its attributes; `startup-script` runs as root at every boot.
    token: of its service account.
  """

  def __init__(
    self,
    root: pathlib.Path,
    address: str,
    worker: int,
    environment: dict[str, str],
    metadata: dict[str, str],
    token: str,
  ):
    self.address, self.worker, self.folder = address, worker, root / "hosts" / address
    self.link, self.preempted = "up", False
    self.metadata, self.token = metadata, token
    self._published = root / "hosts" / f"{address}.json"
    self.folder.mkdir()
    (self.folder / "root").mkdir()
    (self.folder / "token").write_text(token)
    self._metadata = serve(_Metadata, self)
    self._environment = environment | {
      "FAKE_HOST": str(self.folder),
      "TPU_STATE": str(self.state),
      "TPU_WORKER_ID": str(worker),
      "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(self.folder / "token"),
      "PATH": f"{root / 'host-bin'}{os.pathsep}{os.environ['PATH']}",
      "GCE_METADATA_HOST": f"127.0.0.1:{self._metadata.server_port}",
    }
    self.connect("up")

  @property
  def state(self) -> pathlib.Path:
    return self.folder / "state"

  def connect(self, link: str) -> None:
    """Sets how it can be reached."""
    self.link = link
    fake_ssh.write(
      self._published, {"folder": str(self.folder), "environment": self._environment, "link": link}
    )

  def boot(self) -> None:
    """Boots it: nothing runs any more, and the startup script does."""
    self.kill()
    self._environment["TPU_FAKE_BOOT"] = str(time.clock_gettime(time.CLOCK_BOOTTIME))
    self.connect(self.link)
    script = self.folder / "startup-script"
    script.write_text(self.metadata.get("startup-script", ""))
    with open(self.folder / "startup.log", "ab") as log:
      subprocess.Popen(
        ["sh", script],
        env=self._environment | {"HOME": str(self.folder / "root"), "USER": "root"},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
      )

  def processes(self, *words: str) -> list[psutil.Process]:
    """Returns those that run in it, if given those with these words in their command line."""
    found = []
    for process in psutil.process_iter():
      try:
        if process.environ().get("FAKE_HOST") == str(self.folder):
          line = process.cmdline()
          found += [process] if all(word in line for word in words) else []
      except (psutil.NoSuchProcess, psutil.AccessDenied):
        continue
    return found

  def kill(self, number: int = signal.SIGKILL) -> None:
    """Sends a signal to all of them; SIGKILL until none is left, since they may start others."""
    while True:
      found = self.processes()
      for process in found:
        try:
          process.send_signal(number)
        except psutil.NoSuchProcess:
          continue
      if not found or number != signal.SIGKILL:
        return
      time.sleep(0.05)

  def remove(self) -> None:
    """Ends what runs in it, and its connection; the folder stays, for a look."""
    self._published.unlink(missing_ok=True)
    self.kill()
    self._metadata.shutdown()
    self._metadata.server_close()


class _Metadata(http.server.BaseHTTPRequestHandler):
  def do_GET(self):  # pylint: disable=invalid-name
    host, path = (
      self.server.owner,
      self.path.partition("?")[0].removeprefix("/computeMetadata/v1/instance/"),
    )
    token = {"access_token": host.token, "expires_in": 3600, "token_type": "Bearer"}
    answer = {
      "preempted": str(host.preempted).upper(),
      "attributes/agent-worker-number": str(host.worker),
      "service-accounts/default/token": json.dumps(token),
    }.get(path) or host.metadata.get(path.removeprefix("attributes/"))
    if answer is None or self.headers.get("Metadata-Flavor") != "Google":
      self.send_error(HTTPStatus.NOT_FOUND)
      return
    self.send_response(HTTPStatus.OK)
    self.send_header("Metadata-Flavor", "Google")
    self.end_headers()
    self.wfile.write(answer.encode())

  def log_message(self, *args):
    del args
