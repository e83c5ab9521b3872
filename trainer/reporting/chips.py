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
    units: number of its matrix units, and the rows, or columns, of each.
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
  units: tuple[int, int]
  link_bandwidth: float
  network_bandwidth: float | None
  topologies: tuple[str, ...]
  host_cores: int

  @property
  def clock(self) -> float:
    """Hz of the matrix units: the peak over two FLOPs for each of their cells."""
    number, size = self.units
    return self.peak / (2 * number * size * size)


_GB, _GIB = 1e9, 2.0**30

# By jax.Device.device_kind; kinds as in jax/_src/pallas/mosaic/tpu_info.py. Units of v2 to v4 from
# the papers, of v5 and later from docs.cloud.google.com/tpu/docs/system-architecture-tpu-vm. Links:
# half of a published figure that counts both ways.
CHIPS = {
  # doi:10.1145/3360307: 4 links of 496 Gbit/s
  "TPU v2": Chip(
    name="v2",
    peak=46e12,
    hbm_bytes=16 * _GIB,
    hbm_bandwidth=700 * _GB,
    units=(2, 128),
    link_bandwidth=248 * _GB,
    network_bandwidth=None,
    topologies=("2x2", "4x4"),
    host_cores=96,
  ),
  # docs.cloud.google.com/tpu/docs/v3; links: doi:10.1145/3360307, 4 of 656 Gbit/s
  "TPU v3": Chip(
    name="v3",
    peak=123e12,
    hbm_bytes=32 * _GIB,
    hbm_bandwidth=900 * _GB,
    units=(4, 128),
    link_bandwidth=328 * _GB,
    network_bandwidth=None,
    topologies=("2x2", "4x4"),
    host_cores=96,
  ),
  # docs.cloud.google.com/tpu/docs/v4; links: arXiv:2304.01433, 6 of 50 GB/s
  "TPU v4": Chip(
    name="v4",
    peak=275e12,
    hbm_bytes=32 * _GIB,
    hbm_bandwidth=1200 * _GB,
    units=(8, 128),
    link_bandwidth=300 * _GB,
    network_bandwidth=None,
    topologies=("2x2x1", "2x2x2", "2x2x4", "4x4x4"),
    host_cores=240,
  ),
  # docs.cloud.google.com/tpu/docs/v5e: 6.4 Tbit/s for the 256 chips of a pod
  "TPU v5 lite": Chip(
    name="v5e",
    peak=197e12,
    hbm_bytes=16 * _GIB,
    hbm_bandwidth=819 * _GB,
    units=(4, 128),
    link_bandwidth=200 * _GB,
    network_bandwidth=3.125 * _GB,
    topologies=("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    host_cores=112,
  ),
  # docs.cloud.google.com/tpu/docs/v5p and tpu7x
  "TPU v5": Chip(
    name="v5p",
    peak=459e12,
    hbm_bytes=95 * _GIB,
    hbm_bandwidth=2765 * _GB,
    units=(8, 128),
    link_bandwidth=600 * _GB,
    network_bandwidth=6.25 * _GB,
    topologies=("2x2x1", "2x2x2", "2x2x4", "4x4x4"),
    host_cores=208,
  ),
  # docs.cloud.google.com/tpu/docs/v6e and tpu7x
  "TPU v6 lite": Chip(
    name="v6e",
    peak=918e12,
    hbm_bytes=32 * _GIB,
    hbm_bandwidth=1638 * _GB,
    units=(4, 256),
    link_bandwidth=400 * _GB,
    network_bandwidth=12.5 * _GB,
    topologies=("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    host_cores=180,
  ),
  # docs.cloud.google.com/tpu/docs/tpu7x; units as in two of v6e, which is not published
  "TPU7x": Chip(
    name="tpu7x",
    peak=2307e12,
    hbm_bytes=192 * _GIB,
    hbm_bandwidth=7380 * _GB,
    units=(8, 256),
    link_bandwidth=600 * _GB,
    network_bandwidth=12.5 * _GB,
    topologies=("2x2x1", "2x2x2", "2x2x4", "4x4x4"),
    host_cores=224,
  ),
}
