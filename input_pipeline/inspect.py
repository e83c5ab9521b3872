"""python -m input_pipeline.inspect: the command; its code is in input_pipeline.tools.inspect."""

import sys

from input_pipeline.tools.inspect import main

if __name__ == "__main__":
  sys.exit(main(sys.argv))
