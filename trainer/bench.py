"""python -m trainer.bench: the command; its code is in trainer.tools.bench."""

from trainer.tools.bench import main

if __name__ == "__main__":
  main()
