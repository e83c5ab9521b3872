"""How a run ends when something fails: the last good state is saved, and all hosts leave alike.

A failure of the input, of a host's memory or of a library may be gone in the next start, so the
first one at a step exits with 76. One at the same step in a later start, or of data that are bad as
they are, exits with 2. What failed where is kept in `starts.json`.
"""

from typing import Any

from absl import logging
import jax

from input_pipeline.errors import DataError, Stopped, UnusableData, first_line, one_line
from trainer.errors import FAILED, HOST_LOST, RunFailed, StorageError, TrainerError
from trainer.run import Run
from trainer.workdir.files import write_json


def end(run: Run) -> None:
  """Save the last good state and raise, if a host has failed; all hosts call this together.

  Raises:
    RunFailed: the same on all hosts.
  """
  failed = _agreed(run)
  if failed is not None:
    raise _saved(run, *failed)


def end_at_once(run: Run, error: Exception) -> RunFailed:
  """Return what ends the run after an error out of the loop; save the state if it is whole."""
  run.pod.rule_out_lost(error)
  run.requests.fail(run.step + 1, error)
  failed = _agreed(run) if run.pod.hosts == 1 else (HOST_LOST, _words(error))
  assert failed is not None
  if run.pod.hosts == 1 and not any(leaf.is_deleted() for leaf in jax.tree.leaves(run.state)):
    try:
      run.flush()
      return _saved(run, *failed)
    except Exception as second:
      logging.error("The state could not be saved: %s", first_line(second))
  code, words = failed
  return RunFailed(f"{words} The last checkpoint is what is left{_advice(code)}", code, False)


def evaluation_failed(run: Run) -> RunFailed | None:
  """Return what ends an evaluation without training, or None if no host has failed."""
  failed = _agreed(run)
  return RunFailed(failed[1], failed[0]) if failed else None


def _agreed(run: Run) -> tuple[int, str] | None:
  """Return the exit code and what has failed, the same on all hosts; note it for later starts."""
  mine = None
  if run.requests.failure and not isinstance(run.requests.failure[1], Stopped):
    step, error = run.requests.failure
    bug = not isinstance(error, (DataError, TrainerError, MemoryError))
    if bug or run.pod.hosts > 1:  # of a single host the sentence at the end has it all
      logging.error("This host has failed.", exc_info=error if bug else None)
    mine = [step, _words(error), _is_lasting(error)]
  given = run.pod.gather("what has failed", mine)
  failed = [(host, what) for host, what in given.items() if what]
  if not failed:
    return None
  host, (step, words, lasting) = failed[0]
  where = f"Step {step}" if step is not None else f"The evaluation of step {run.step}"
  sentence = f"{where} failed{f' on host {host}' if run.pod.hosts > 1 else ''}: {words}"
  again = run.pod.host == 0 and _note(run, step, words)
  if run.pod.gather("whether it has failed before", again)[0]:
    return FAILED, f"{sentence} It failed so in an earlier start as well."
  return FAILED if lasting else HOST_LOST, sentence


def _note(run: Run, step: int | None, words: str) -> bool:
  """Note a failure beside this start; return whether the last failure before was the same."""
  if run.clock.noted is None:  # an evaluation, which is no start of the run
    return False
  *before, this = run.clock.noted["history"]
  at = {"step": run.step if step is None else step, "evaluation": step is None}
  this["failure"] = at | {"reason": words}
  write_json(run.workdir.starts, run.clock.noted, needed=False)
  last: dict[str, Any] = next((s["failure"] for s in reversed(before) if "failure" in s), {})
  return {key: last.get(key) for key in at} == at


def _saved(run: Run, code: int, words: str) -> RunFailed:
  try:
    run.save(wait=True)
  except StorageError as error:
    lasting = FAILED in (code, error.exit_code)
    also = " Mend the cause of the failure as well." if code == FAILED else ""
    return RunFailed(f"{words} {error}{also}", FAILED if lasting else code)
  return RunFailed(f"{words} Step {run.step} is saved{_advice(code)}", code)


def _advice(code: int) -> str:
  if code == HOST_LOST:
    return "; the same command resumes from there."
  return "; the same command would fail again: mend the cause first."


def _words(error: Exception) -> str:
  kind = "" if isinstance(error, (DataError, TrainerError)) else type(error).__name__
  words = one_line(": ".join(filter(None, (kind, first_line(error)))))
  return words if words.endswith(".") else f"{words}."


def _is_lasting(error: Exception) -> bool:
  """Whether a rerun meets the same error."""
  return isinstance(error, UnusableData) or (
    isinstance(error, TrainerError) and error.exit_code == FAILED
  )
