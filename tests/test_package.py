"""What an installation has is what the checkout has."""

import configparser
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("configs", "input_pipeline", "launch", "trainer")


def test_every_package_is_installed():
  settings = configparser.ConfigParser()
  settings.read(ROOT / "setup.cfg")
  listed = settings["options"]["packages"].split()
  found = [
    ".".join(path.parent.relative_to(ROOT).parts)
    for package in PACKAGES
    for path in (ROOT / package).rglob("__init__.py")
  ]
  assert sorted(listed) == sorted(found)
