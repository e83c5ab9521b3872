"""The command `python -m input_pipeline.bench`; see input_pipeline/tools/bench.py."""

import sys

from input_pipeline.tools.bench import main

if __name__ == "__main__":
  sys.exit(main())
