"""Records the screen of a launcher: python -m tests.launch.record

A run of the tiny net on two hosts, which are processes of this machine, under the real gcloud and a
cloud on loopback; it is preempted once. Prints the terminal after some steps of the second attempt.
"""

import fcntl
import os
import pathlib
import pty
import re
import struct
import subprocess
import tempfile
import termios
import threading

from tests.launch import lives

COLUMNS, ROWS = 118, 50


class Terminal:
  """What a command draws, for as much of a terminal as the launcher uses."""

  def __init__(self, command: list[str], environment: dict[str, str]):
    self._main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    self.process = subprocess.Popen(
      command, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True
    )
    os.close(side)
    self.lines = [""]
    threading.Thread(target=self._read, daemon=True).start()

  def _read(self) -> None:
    rest = ""
    while True:
      try:
        rest += os.read(self._main, 1 << 16).decode(errors="replace").replace("\r", "")
      except OSError:  # its end
        return
      *pieces, rest = re.split(r"(\n|\x1b\[\d*[FJ])", rest)
      for piece in pieces:
        if up := re.fullmatch(r"\x1b\[(\d+)F", piece):
          self.lines = [*self.lines[: len(self.lines) - 1 - int(up[1])], ""]
        elif piece == "\n":
          self.lines.append("")
        elif not piece.startswith("\x1b"):
          self.lines[-1] += piece


def main() -> None:
  with tempfile.TemporaryDirectory() as folder, lives.bed(pathlib.Path(folder)) as bed:
    command = [
      str(lives.ROOT / "launch/tpu"),
      *lives.up("--max-hours=2", "--owner=me", "--poll=2s", steps=1000),
    ]
    terminal = Terminal(command, bed.environment)
    bed.wait_for_checkpoint()
    bed.cloud.preempt(lives.NAME)
    lives.wait_until(
      lambda: re.search(r"attempt  2: training\n.*step [\d,]+ of", "\n".join(terminal.lines))
    )
    print("\n".join(f"    {line}".rstrip() for line in terminal.lines[-22:]))
    terminal.process.terminate()
    terminal.process.wait()
    bed.run("down", lives.NAME, f"--zone={lives.ZONE}", "--owner=me")


if __name__ == "__main__":
  main()
