"""Command lines that have no --config: flags are written out, and a refusal is one sentence."""

import argparse
from collections.abc import Sequence
import difflib
import os
import re
import sys
from typing import Any, NoReturn

_UNKNOWN = re.compile(r"(unrecognized arguments|unknown argument[^:]*): (?P<flag>-[^\s=]+)")


class Parser(argparse.ArgumentParser):
  """argparse's, without abbreviations, and with one line in place of its whole usage."""

  def __init__(self, **options: Any):
    """Take the options of argparse."""
    super().__init__(**{"allow_abbrev": False, **options})

  def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
    """See argparse; --workdir is refused where the workdir is a word of its own."""
    words: Sequence[str] = sys.argv[1:] if args is None else args
    if "--workdir" not in self._option_string_actions and self._has_workdir():
      for word in words:
        if word.split("=")[0] == "--workdir":
          self.error(
            "the workdir is a word without a flag, as in `runs/r50` for --workdir=runs/r50"
          )
    return super().parse_known_args(args, namespace)

  def error(self, message: str) -> NoReturn:
    """Print what is wrong, with the flag that was probably meant; end with exit code 2."""
    if unknown := _UNKNOWN.search(message):
      near = difflib.get_close_matches(unknown["flag"], self._option_string_actions, n=1)
      message += f"; did you mean {near[0]}?" if near else ""
    stop = "" if message.endswith(("?", ".")) else "."
    self.exit(2, f"{self.prog}: {message}{stop} --help shows all flags.\n")

  def _has_workdir(self) -> bool:
    return any(
      "workdir" in (str(a.dest), str(a.metavar).split("|")[0].lower()) for a in self._actions
    )


def path(word: str) -> str:
  """Return a path as a person means it: ~ is left by the shell in --out=~/data."""
  return os.path.expanduser(word)
