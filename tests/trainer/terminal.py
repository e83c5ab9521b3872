"""A program on a terminal of some width, and what stands on its screen."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios


def run(code, columns, environment=None, until=None):
  """Return all that a Python program writes to a terminal, as text.

  Args:
    code: of the program.
    columns: width of the terminal.
    environment: variables to set, or with None to unset.
    until: a text after which it is ended; None for its own end.
  """
  ours, theirs = pty.openpty()
  fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
  variables = os.environ | {"TERM": "xterm"} | (environment or {})
  variables = {name: value for name, value in variables.items() if value is not None}
  process = subprocess.Popen(
    [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=variables
  )
  os.close(theirs)
  found = b""
  while select.select([ours], [], [], 240)[0]:
    try:
      data = os.read(ours, 65536)
    except OSError:  # Linux: the other side is closed
      break
    if not data:
      break
    found += data
    if until and until.encode() in found:
      process.terminate()
      until = None
  os.close(ours)
  assert process.wait(60) == 0 or until is None, found.decode()
  return found.decode()


def rows(text, columns):
  """Return the rows on the screen of a terminal without an end, after a text was written to it.

  It wraps as terminals do, and of escape sequences it does what the trainer needs: clear to the end
  of the row; colours change nothing.
  """
  screen, row, column = [[]], 0, 0
  for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|[^\x1b]", text.replace("\r\n", "\n")):
    if part == "\r":
      column = 0
    elif part == "\n":
      row, column = row + 1, 0
    elif part == "\x1b[K":
      del screen[row][column:]
    elif not part.startswith("\x1b"):
      if column == columns:
        row, column = row + 1, 0
      if row == len(screen):
        screen.append([])
      screen[row] += " " * (column - len(screen[row]))
      screen[row][column : column + 1] = part
      column += 1
    if row == len(screen):
      screen.append([])
  return ["".join(row).rstrip() for row in screen]
