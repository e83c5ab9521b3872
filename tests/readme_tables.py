"""Tables of READMEs whose rows name the tests that hold them."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def check_tests(readme: str, heading: str, column: int, least: int) -> None:
  """Assert that each row of a table names tests that exist.

  Args:
    readme: path of the README from the root.
    heading: of the section with the table, with its hashes.
    column: that names the tests, counted from 1.
    least: rows that the table has at least.
  """
  text = (ROOT / readme).read_text()
  level = len(heading.partition(" ")[0])
  table = re.split(rf"\n#{{1,{level}}} ", text.split(f"{heading}\n")[1])[0]
  rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
  assert len(rows) >= least
  for row in rows:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+)(?:\[\w+\])?)?`", row.split("|")[column])
    assert named, row
    for path, name in named:
      assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
