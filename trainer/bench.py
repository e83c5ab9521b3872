"""The command `python -m trainer.bench`; its code is in trainer/tools/bench.py."""

from trainer.tools.bench import main

if __name__ == "__main__":
  main()
