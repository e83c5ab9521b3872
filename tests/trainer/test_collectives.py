"""Collectives are counted alike in what the compilers of CPU and of TPU write."""

import json
import os
import subprocess
import sys

import pytest

from trainer.tools import collectives
from trainer.tools.collectives import Collective

CPU_PROGRAM = """
import dataclasses, json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from trainer.tools import collectives

def f(x):  # float32 [2, 8] on each of 8 devices, in pairs and fours
  gathered = jax.lax.all_gather(x, "four", tiled=True)
  scattered = jax.lax.psum_scatter(gathered, "four", tiled=True)
  moved = jax.lax.ppermute(scattered, "four", [(0, 1), (1, 2), (2, 3)])
  def body(carry, _):
    return jnp.sin(jax.lax.psum(carry, "pair")), None
  return jax.lax.scan(body, moved, length=3)[0]

mesh = jax.make_mesh((2, 4), ("pair", "four"), axis_types=(AxisType.Auto,) * 2)
spec = P(("pair", "four"))
jitted = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
text = jitted.lower(jax.ShapeDtypeStruct((16, 8), jnp.float32)).compile().as_text()
print(json.dumps([dataclasses.astuple(each) for each in collectives.read(text)]))
"""

# Shortened from what the compiler writes for v5e:2x2.
TPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true, replica_count=1, num_partitions=4, \
entry_computation_layout={...}

%all-reduce-scatter.1 (input: bf16[64,64]) -> bf16[16,64] {
  %all-reduce.1 = bf16[64,64]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, \
replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[16,64]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %offset, \
%zero)
}

%fused_computation.1 (param: f32[16,64]) -> (f32[16,64], f32[64,64], s32[2]) {
  %all-gather.1 = f32[64,64]{1,0:T(8,128)} all-gather(%param), channel_id=2, \
replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={0}, \
frontend_attributes={chain_id="0"}
  ROOT %custom-call = (f32[16,64], f32[64,64], s32[2]) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (param.1: f32[16,64]) -> (f32[16,64], f32[64,64], s32[2]) {
  %all-gather.2 = f32[64,64]{1,0:T(8,128)} all-gather(%param.1), channel_id=2, \
replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={0}, \
frontend_attributes={chain_id="0"}
}

%body (state: (f32[4,8], s32[])) -> (f32[4,8], s32[]) {
  %collective-permute-start = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %collective-permute-done = f32[4,8]{1,0} collective-permute-done(%collective-permute-start)
}

ENTRY %main (input: f32[16,64]) -> f32[] {
  %all-reduce.2 = (f32[96]{0:T(128)S(1)}, bf16[8,8]{1,0}) all-reduce(%a, %b), channel_id=1, \
replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, to_apply=%add.2
  %all-gather-start = (f32[2,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%c), channel_id=5, \
replica_groups=[2,2]<=[4]
  %recv = (f32[4,8]{1,0}, u32[], token[]) recv(%g), channel_id=7, is_host_transfer=true, \
frontend_attributes={\
_xla_megascale_target="{1,2,3}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[4,8]{1,0}, u32[], token[]) recv(%g), channel_id=8, is_host_transfer=true
  %all-reduce.3 = pred[3]{0} all-reduce(%d), channel_id=6, replica_groups={}, to_apply=%or
  %fusion = bf16[16,64] fusion(%e), kind=kCustom, calls=%all-reduce-scatter.1
  %while = (f32[4,8], s32[]) while(%f), condition=%condition, body=%body
  %get-tuple-element = f32[96]{0} get-tuple-element(%all-reduce.2), index=0
}
"""


def test_program_of_cpu():
  result = subprocess.run(
    [sys.executable, "-c", CPU_PROGRAM],
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
  )
  assert result.returncode == 0, result.stderr
  assert sorted(json.loads(result.stdout)) == [
    ["all-gather", 4, 256, False],
    ["all-reduce", 2, 64, True],
    ["collective-permute", 4, 64, False],
    ["reduce-scatter", 4, 256, False],
  ]


def test_program_of_tpu():
  assert collectives.read(TPU_PROGRAM) == [
    Collective("reduce-scatter", 4, 64 * 64 * 2, False),
    Collective("all-gather", 4, 64 * 64 * 4, False),
    Collective("collective-permute", 2, 4 * 8 * 4, True),
    Collective("all-reduce", 2, 96 * 4 + 64 * 2, False),
    Collective("all-gather", 2, 4 * 8 * 4, False),
    Collective("all-reduce between slices", 3, 4 * 8 * 4, False),
    Collective("all-reduce", 4, 3, False),
  ]


@pytest.mark.parametrize(
  "axes, devices",
  [
    ("mesh['a'=4,'b'=8] {'b'}", 8),
    ("mesh['a'=4,'b'=8] {'a','b':(2)4}", 16),
    ("mesh['a'=1,'b'=2,'c'=4], device_ids=([2,4]T(1,0)) {'b'}", 2),
    ("[4,8]<=[8,4]T(1,0)", 8),
    ("{{0,3,6}}", 3),
  ],
)
def test_every_way_to_write_groups(axes, devices):
  line = (
    "  %all-reduce = f32[]{:T(128)} all-reduce(%x), channel_id=1, "
    f"replica_groups={axes}, to_apply=%add"
  )
  assert collectives.read(line) == [Collective("all-reduce", devices, 4, False)]


@pytest.mark.parametrize(
  "groups, devices",
  [
    ("replica_groups=mesh['a'=4,'b'=8] {'b'}", range(8)),
    ("replica_groups=mesh['a'=4,'b'=8] {'a'}", range(0, 32, 8)),
    # Of the 8 along b, the first axis of 2 and the second of 4 in it.
    ("replica_groups=mesh['a'=4,'b'=8] {'b':(2)4}", (0, 1, 2, 3)),
    ("replica_groups=mesh['a'=4,'b'=8] {'b':(1)2}", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
    ("replica_groups=[4,2]<=[8]", (0, 1)),
    ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
    ("replica_groups={{1,5},{2,6}}", (1, 5)),
    ("replica_groups={}", ()),
    ("source_target_pairs={{3,0},{0,3},{1,2}}", (0, 3)),
  ],
)
def test_devices_of_a_group(groups, devices):
  assert collectives.group(f"  %sum = f32[] all-reduce(%x), {groups}, to_apply=%add") == (*devices,)


def test_description_adds_up_by_kind_and_devices():
  mebibyte = 2**20
  assert collectives.describe(
    [
      Collective("all-reduce", 4, mebibyte, False),
      Collective("all-gather", 4, 3 * mebibyte, False),
      Collective("all-reduce", 4, mebibyte // 2, False),
      Collective("all-reduce", 2, mebibyte, True),
    ]
  ) == [
    "all-gather                over 4 devices: 1, 3.00 MiB",
    "all-reduce                over 2 devices: 1, 1.00 MiB; 1 of them in loops, counted once",
    "all-reduce                over 4 devices: 2, 1.50 MiB",
  ]
