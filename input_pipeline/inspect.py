"""The command `python -m input_pipeline.inspect`; see input_pipeline/tools/inspect.py."""

import sys

from input_pipeline.tools.inspect import main

if __name__ == "__main__":
  sys.exit(main(sys.argv))
