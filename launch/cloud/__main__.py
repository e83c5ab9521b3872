"""python3 -m launch.cloud, as launch/tpu calls it."""

import sys

from launch.cloud.cli import main

if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
