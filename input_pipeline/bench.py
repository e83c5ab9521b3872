"""python -m input_pipeline.bench: the command; its code is in input_pipeline.tools.bench."""

import sys

from input_pipeline.tools.bench import main

if __name__ == "__main__":
  sys.exit(main())
