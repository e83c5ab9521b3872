"""A stop that is requested more than once."""

import signal
import subprocess
import sys

CODE = """
import time
from trainer.pod.preemption import StopRequest
stop = StopRequest()
stop.install()
print(flush=True)
while True:
  time.sleep(0.05)
  if stop():
    print(stop.reason, flush=True)
"""


def test_only_an_impatient_person_ends_it_at_once():
  pipe = subprocess.PIPE
  with subprocess.Popen(
    [sys.executable, "-c", CODE], stdout=pipe, stderr=pipe, text=True
  ) as process:
    process.stdout.readline()
    for _ in range(3):  # of the machine, its guard and a launcher
      process.send_signal(signal.SIGTERM)
      assert process.stdout.readline() == "SIGTERM\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    assert process.stderr.read().count("stopping after this step and saving") == 1
