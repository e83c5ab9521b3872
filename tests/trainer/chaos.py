"""A training run hit by every kind of failure, and the proof that none leaves a trace.

    python -m tests.trainer.chaos [--events N] [--seed N] [--folder DIR]

Real processes train a tiny net on 1, 2 or 4 hosts while random events hit them: SIGTERM, SIGKILL or
SIGSTOP of a random host, a restart on another number of hosts, damage of the newest checkpoint.
After each event every process must be gone within a time limit, with the right exit code, and the
next start must resume from the newest whole checkpoint. At the end every stretch on one number of
hosts is trained again without events: its checkpoints must be equal bit for bit. Needs two cores
and, for thirty events, about half an hour.
"""

import argparse
from collections.abc import Sequence
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import tempfile
import time

from tests.trainer.shared import LocalPod, fingerprints, trainer

EVENTS = ("SIGTERM", "SIGKILL", "SIGSTOP", "resize", "damage")
HOSTS = (2, 1, 4)
EVERY = 20  # steps between checkpoints and between lines of the log
STEPS_PER_EVENT = 120  # most events come within the first hundred of a start
SILENCE = 8  # seconds after which a host is lost
# Seconds in which every process must be gone after an event; an idle machine needs a fifth of it.
LIMIT = 60


def start(workdir: pathlib.Path, hosts: int, total_steps: int) -> LocalPod:
  """Start all hosts."""
  command = trainer(
    workdir,
    f"total_steps={total_steps}",
    f"log.every_steps={EVERY}",
    "checkpoint.keep_last=100000",
    f"checkpoint.every_steps={EVERY}",
    f"pod.timeout_seconds={SILENCE}",
  )
  return LocalPod(hosts, 1, command, grace=LIMIT)


def finish(pod: LocalPod, limit: float) -> dict[int, int]:
  """Return the exit code of each host when all are gone, and make sure that they are."""
  pod.finish(limit)
  pod.close()
  return pod.codes()


def checkpoints(workdir: pathlib.Path) -> list[int]:
  folder = workdir / "checkpoints"
  return (
    sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    if folder.exists()
    else []
  )


def damage(workdir: pathlib.Path, step: int, rng: random.Random) -> str:
  """Damage a checkpoint in one of the ways that disks and killed processes do."""
  folder = workdir / "checkpoints" / str(step)
  data = max(
    (path for path in (folder / "params").rglob("*") if path.is_file()),
    key=lambda path: path.stat().st_size,
  )
  kind = rng.choice(["lost item", "cut file", "wrong byte"])
  if kind == "lost item":
    shutil.rmtree(folder / "opt_state")
  elif kind == "cut file":
    os.truncate(data, data.stat().st_size // 2)
  else:
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0x10
    data.write_bytes(content)
  return kind


def chaos(
  folder: pathlib.Path, events: list[str], seed: int, counts: Sequence[int] = HOSTS
) -> None:
  """Train through the events and check everything.

  Args:
    folder: folder of the run and of the runs it is compared with.
    events: names from EVENTS, in order.
    seed: seed of the moment and the host of each event.
    counts: numbers of hosts to choose from; the run starts with the first.

  Raises:
    AssertionError: with what went wrong.
  """
  rng, workdir, total = random.Random(seed), folder / "run", STEPS_PER_EVENT * (len(events) + 2)
  hosts, newest, harmed = counts[0], 0, None
  stretches = []  # (hosts, first step, {step: fingerprints})
  for number, event in enumerate([*events, "end"]):
    began = time.monotonic()
    before = newest
    pod = start(workdir, hosts, total)
    try:
      pod.wait_for(r"step \d+/\d+ ", 240)
      came = time.monotonic() - began
      if before:
        assert f"Resuming from checkpoint {before} of" in pod.log, (
          f"not from {before}:\n{pod.log[-3000:]}"
        )
      assert ("is damaged" in pod.log) == bool(harmed), pod.log[-3000:]
      if event != "end":
        pod.wait_for(f"step {EVERY * (before // EVERY + rng.randint(2, 4))}/", 240)
        time.sleep(rng.uniform(0.0, 0.5))
        assert f"step {total}/" not in pod.log, "the run was over before the event"
      struck, victim = time.monotonic(), rng.randrange(hosts)
      if event == "SIGKILL" or event == "SIGSTOP":
        os.kill(pod.pids()[victim], getattr(signal, event))
        if event == "SIGSTOP":
          for other in set(range(hosts)) - {victim}:
            pod.wait_for(rf"\[{other}\] ended with", LIMIT)
          os.kill(pod.pids()[victim], signal.SIGKILL)
        codes = finish(pod, LIMIT)
        assert codes.pop(victim) == -signal.SIGKILL and set(codes.values()) <= {76}, (
          f"{codes}\n{pod.log[-3000:]}"
        )
      elif event != "end":
        os.kill(pod.pids()[victim], signal.SIGTERM)
        assert set(finish(pod, LIMIT).values()) == {75}, pod.log[-3000:]
      else:
        assert set(finish(pod, LIMIT + 0.5 * total).values()) == {0}, pod.log[-3000:]
    except BaseException:
      pod.close()
      raise
    gone = time.monotonic() - struck
    if not stretches or stretches[-1][0] != hosts:
      stretches.append((hosts, before, {}))
    steps = [step for step in checkpoints(workdir) if step > before]
    stretches[-1][2].update({step: fingerprints(workdir, step) for step in steps})
    reached = max(map(int, re.findall(r"step (\d+)/", pod.log)))
    newest = max(checkpoints(workdir))
    if event in ("SIGKILL", "SIGSTOP"):
      # A step is logged before its save begins, and a save begins when the one before is whole. So
      # this save and the one before it may be lost, and no more.
      kept = max(before, EVERY * (reached // EVERY - 2))
      assert newest >= kept, f"step {reached} was reached, but {newest} is the newest checkpoint"
    elif event != "end":
      assert f"Stopped and saved at step {newest} of" in pod.log, (
        f"{newest} is the newest checkpoint:\n{pod.log[-3000:]}"
      )
    else:
      assert newest == total
    harmed, note = None, f"host {victim} of {hosts}" if event != "end" else f"{hosts} hosts"
    if event == "damage":
      note = f"{damage(workdir, newest, rng)} of checkpoint {newest}"
      harmed, newest = newest, checkpoints(workdir)[-2]
      stretches[-1][2].pop(harmed, None)
    elif event == "resize":
      note = (
        f"{hosts} -> {(hosts := rng.choice([count for count in counts if count != hosts]))} hosts"
      )
    print(
      f"{number + 1:3} {event:8} {note:32} start {came:5.1f} s, gone after {gone:4.1f} s, "
      f"step {reached}, checkpoint {newest}",
      flush=True,
    )

  final = json.loads((workdir / "final.json").read_text())
  assert final["step"] == total
  for number, (hosts, first, seen) in enumerate(stretches):
    periodic = [step for step in seen if step % EVERY == 0]
    if not periodic:
      continue
    quiet = folder / f"quiet-{number}"
    if first:
      shutil.copytree(workdir / "checkpoints" / str(first), quiet / "checkpoints" / str(first))
    pod = start(quiet, hosts, total)
    while not (quiet / "checkpoints" / str(max(periodic))).exists() and not pod.ended:
      time.sleep(0.2)
    pod.close()
    for step in periodic:
      assert fingerprints(quiet, step) == seen[step], (
        f"checkpoint {step} on {hosts} hosts is not that of a quiet run"
      )
    print(
      f"{hosts} hosts, steps {first} to {max(periodic)}: {len(periodic)} checkpoints are those of "
      "a quiet run, bit for bit",
      flush=True,
    )
    shutil.rmtree(quiet)
  print(f"{len(events)} events, {total} steps, top1 {100 * final['top1']:.1f} %; nothing was lost.")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--events", type=int, default=30)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--folder", type=pathlib.Path, help="folder of the runs, kept (default: a temporary one)"
  )
  args = parser.parse_args()
  rng = random.Random(args.seed)
  events = [rng.choice(EVENTS) for _ in range(args.events)]
  with contextlib.ExitStack() as stack:
    folder = args.folder or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    chaos(folder, events, args.seed)


if __name__ == "__main__":
  main()
