"""What a host may ask for at any step: that the run saves, saves and stops, or that it has failed.

Hosts agree in the step itself: each passes its request to the devices with the batch, and the step
returns the highest one. Two steps later all hosts read the same number, without another message.

A host whose input has failed has no batch for the step that the others are about to take. It takes
part with an empty one and FAIL, with which a step leaves the state as it is. So nobody waits for
it, and two steps later all hosts have the state before it, which they save.
"""

import collections
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from trainer import mesh as mesh_lib

NOTHING, SAVE, STOP, FAIL = range(4)

# Results of a step are read when this many later steps are queued behind it, so that the devices
# never wait for the host.
LAG = 2


class Requests:
  """The requests of this host on their way in, and what all hosts agreed on.

  Attributes:
    agreed: the highest request of any host at the steps read so far, unless forgotten since; the
      same on all hosts.
    failed_step: the first step with FAIL of any host, among those read; None if there is none.
    failure: what has failed on this host: (step or None, error).
  """

  def __init__(
    self,
    mesh: Mesh,
    stop: Callable[[], bool],
    wanted: Callable[[], bool] = lambda: False,
  ):
    """Put one array for each kind of request on the devices of this host.

    Args:
      mesh: the mesh of the run.
      stop: whether this host asks for a stop.
      wanted: whether this host asks for a save.
    """
    self._stop, self._wanted = stop, wanted
    self._flags = {
      request: mesh_lib.flags(mesh, request) for request in (NOTHING, SAVE, STOP, FAIL)
    }
    self._pending: collections.deque[tuple[int, jax.Array]] = collections.deque()
    self.agreed = NOTHING
    self.failed_step: int | None = None
    self.failure: tuple[int | None, Exception] | None = None

  def fail(self, step: int | None, error: Exception) -> None:
    """Note that this host cannot take a step, or finish an evaluation.

    Args:
      step: the step that it cannot take; earlier ones are not affected. None for an evaluation,
        which counts more, as it comes before a step that is only known to fail.
      error: why.
    """
    if self.failure is None or (step is None and self.failure[0] is not None):
      self.failure = step, error

  def fails(self, step: int | None) -> bool:
    """Whether this host cannot take a step, or with None finish an evaluation."""
    if self.failure is None:
      return False
    first = self.failure[0]
    return first is None or (step is not None and step >= first)

  def flags(self, step: int | None = None) -> jax.Array:
    """Return what this host asks for now, int32 [devices]; the argument of a step.

    Args:
      step: its number; None if it is one of an evaluation.
    """
    if self.fails(step):
      return self._flags[FAIL]
    return self._flags[STOP if self._stop() else SAVE if self._wanted() else NOTHING]

  def note(self, step: int, request: jax.Array) -> None:
    """Take the int32 scalar of the step just dispatched, and read that of `LAG` steps before."""
    self._pending.append((step, request))
    while self._pending[0][0] <= step - LAG:
      self._read()

  def flush(self) -> None:
    """Wait for every step noted, and read its request."""
    while self._pending:
      self._read()

  def forget(self, request: int) -> None:
    """Drop a request that has been met, and only that one."""
    if self.agreed == request:
      self.agreed = NOTHING

  def _read(self) -> None:
    step, request = self._pending.popleft()
    self.agree(step, int(jax.device_get(request)))

  def agree(self, step: int, request: int) -> None:
    """Take the highest request of all hosts at a step."""
    self.agreed = max(self.agreed, request)
    if self.agreed == FAIL and self.failed_step is None:
      self.failed_step = step
