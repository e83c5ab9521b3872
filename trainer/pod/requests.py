"""What a host may ask for at any step: that the run saves, or saves and stops.

Hosts agree in the step itself: each passes its request to the devices with the batch, and the step
returns the highest one. Two steps later all hosts read the same number, without another message.
"""

import collections
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from trainer import mesh as mesh_lib

NOTHING, SAVE, STOP = range(3)

# Results of a step are read when this many later steps are queued behind it, so that the devices
# never wait for the host.
LAG = 2


class Requests:
  """The requests of this host on their way in, and what all hosts agreed on.

  Attributes:
    agreed: the highest request of any host at the steps read so far, unless forgotten since; the
      same on all hosts.
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
    self._flags = {request: mesh_lib.flags(mesh, request) for request in (NOTHING, SAVE, STOP)}
    self._pending: collections.deque[tuple[int, jax.Array]] = collections.deque()
    self.agreed = NOTHING

  def flags(self) -> jax.Array:
    """Return what this host asks for now, int32 [devices]; the argument of the next step."""
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
    _, request = self._pending.popleft()
    self.agreed = max(self.agreed, int(jax.device_get(request)))
