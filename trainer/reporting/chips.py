"""What the chips of each TPU generation can do, by published figures."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip; where it has two cores, these are the figures of both together.

  Attributes:
    name: as clouds sell it, e.g. "v5e".
    peak: dense bfloat16 FLOP/s.
    hbm_bytes: capacity of its memory.
    hbm_bandwidth: bytes/s.
    clock: Hz of the matrix units: peak over two FLOPs for each of their cells.
    link_bandwidth: bytes/s that it sends to its neighbours over all its links, one way.
    network_bandwidth: bytes/s between slices, its share of the host's; None if not published.
    topologies: names of slices of it that the compiler accepts, as examples.
    host_cores: virtual CPUs of a host with four chips, of docs.cloud.google.com/tpu/docs; two
      share a core.
  """

  name: str
  peak: float
  hbm_bytes: float
  hbm_bandwidth: float
  clock: float
  link_bandwidth: float
  network_bandwidth: float | None
  topologies: tuple[str, ...]
  host_cores: int


def _units(number: int, size: int) -> int:
  """Return FLOPs of a clock cycle in so many square matrix units."""
  return 2 * number * size * size


_GB, _GIB = 1e9, 2.0**30

# By jax.Device.device_kind; kinds as in jax/_src/pallas/mosaic/tpu_info.py. Units of v2 to v4 from
# the papers, of v5 and later from docs.cloud.google.com/tpu/docs/system-architecture-tpu-vm. Links:
# half of a published figure that counts both ways.
CHIPS = {
  # doi:10.1145/3360307: 4 links of 496 Gbit/s
  "TPU v2": Chip(
    "v2", 46e12, 16 * _GIB, 700 * _GB, 46e12 / _units(2, 128), 248 * _GB, None, ("2x2", "4x4"), 96
  ),
  # docs.cloud.google.com/tpu/docs/v3; links: doi:10.1145/3360307, 4 of 656 Gbit/s
  "TPU v3": Chip(
    "v3", 123e12, 32 * _GIB, 900 * _GB, 123e12 / _units(4, 128), 328 * _GB, None, ("2x2", "4x4"), 96
  ),
  # docs.cloud.google.com/tpu/docs/v4; links: arXiv:2304.01433, 6 of 50 GB/s
  "TPU v4": Chip(
    "v4",
    275e12,
    32 * _GIB,
    1200 * _GB,
    275e12 / _units(8, 128),
    300 * _GB,
    None,
    ("2x2x1", "2x2x2", "2x2x4", "4x4x4"),
    240,
  ),
  # docs.cloud.google.com/tpu/docs/v5e: 6.4 Tbit/s for the 256 chips of a pod
  "TPU v5 lite": Chip(
    "v5e",
    197e12,
    16 * _GIB,
    819 * _GB,
    197e12 / _units(4, 128),
    200 * _GB,
    3.125 * _GB,
    ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    112,
  ),
  # docs.cloud.google.com/tpu/docs/v5p and tpu7x
  "TPU v5": Chip(
    "v5p",
    459e12,
    95 * _GIB,
    2765 * _GB,
    459e12 / _units(8, 128),
    600 * _GB,
    6.25 * _GB,
    ("2x2x1", "2x2x2", "2x2x4", "4x4x4"),
    208,
  ),
  # docs.cloud.google.com/tpu/docs/v6e and tpu7x
  "TPU v6 lite": Chip(
    "v6e",
    918e12,
    32 * _GIB,
    1638 * _GB,
    918e12 / _units(4, 256),
    400 * _GB,
    12.5 * _GB,
    ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    180,
  ),
  # docs.cloud.google.com/tpu/docs/tpu7x; units as in two of v6e, which is not published
  "TPU7x": Chip(
    "tpu7x",
    2307e12,
    192 * _GIB,
    7380 * _GB,
    2307e12 / _units(8, 256),
    600 * _GB,
    12.5 * _GB,
    ("2x2x1", "2x2x2", "2x2x4", "4x4x4"),
    224,
  ),
}
