"""Estimates of a run, and what lies in memory, reckoned by hand."""

import types

import numpy as np
import pytest

from tests.trainer.test_tpu_cost import ARRAY, ON, fusion, program
from trainer.reporting.chips import CHIPS
from trainer.tools import estimate, live, tpu_cost
from trainer.tools.collectives import Collective


def device(number, slice_index=0, process=0, core=0):
  return types.SimpleNamespace(
    device_kind="TPU v4",
    slice_index=slice_index,
    process_index=process,
    coords=(number, 0, 0),
    core_on_chip=core,
  )


def test_pod():
  # Two slices of two hosts with a chip each, whose two cores are devices.
  devices = [
    device(chip, slice_index, chip, core)
    for slice_index in range(2)
    for chip in range(2)
    for core in range(2)
  ]
  assert estimate.pod(devices) == estimate.Pod(CHIPS["TPU v4"], 4, 2, 4, 2)


def test_hosts():
  where = estimate.Pod(CHIPS["TPU v5 lite"], 16, 1, 4, 1)
  side = estimate.host_side(where, 4 * 718 * 50.0)
  assert side["images_per_second"] == 718 * 50
  assert side["cores"] == 50
  assert side["cores_available"] == 56  # of 112 virtual ones
  assert side["bytes_per_second"] == 718 * 50 * 112_000
  assert side["enough"]
  assert not estimate.host_side(where, 4 * 718 * 57.0)["enough"]


@pytest.mark.parametrize(
  "lengths, hours",
  [(((0, 128),), 900 * 2 / 3600), (((0, 128), (300, 224)), (300 * 2 + 600 * 6) / 3600)],
)
def test_run(lengths, hours):
  found = estimate.run(
    {128: 2.0, 224: 6.0},
    lengths,
    total=900,
    evaluations=3,
    eval_steps=10,
    eval_seconds=12.0,
    start_seconds=180.0,
    chips=8,
    dollars_per_chip_hour=1.5,
  )
  assert found["hours"] == {
    "training": pytest.approx(hours),
    "evaluation": pytest.approx(0.1),
    "start": pytest.approx(0.05),
    "total": pytest.approx(hours + 0.15),
  }
  assert found["chip_hours"] == pytest.approx(8 * (hours + 0.15))
  assert found["dollars"] == pytest.approx(12 * (hours + 0.15))


def test_collectives_by_axis():
  mesh = types.SimpleNamespace(
    axis_names=("data", "fsdp"),
    devices=np.array([device(i, slice_index=i // 4) for i in range(8)]).reshape(4, 2),
  )
  gradients, halves = Collective("all-reduce", 8, 100, False), Collective("all-reduce", 2, 8, True)
  line = tpu_cost.TimeLine(
    (),
    (
      tpu_cost.Transfer(gradients, (), "", 1000.0, 1, 0.5, 0.0),
      tpu_cost.Transfer(gradients, tuple(range(8)), "", 3000.0, 1, 0.9, 2000.0),
      tpu_cost.Transfer(halves, (0, 1), "", 10.0, 3, 0.1, 10.0),
      tpu_cost.Transfer(halves, (0, 2), "", 10.0, 1, 0.1, 10.0),
      tpu_cost.Transfer(halves, (0, 4), "", 10.0, 1, 0.1, 10.0),
      tpu_cost.Transfer(
        Collective("all-reduce between slices", 2, 50, False), (), "", 10.0, 1, 0.1, 10.0
      ),
    ),
    (),
  )
  found = estimate.sent(line, mesh, clock=1e6)
  assert [
    (each["kind"], each["axes"], each["crosses_slices"], each["count"], each["bytes"])
    for each in found
  ] == [
    ("all-reduce", ["data"], False, 1, 8),
    ("all-reduce", ["data"], True, 1, 8),
    ("all-reduce", ["data", "fsdp"], True, 2, 200),
    ("all-reduce", ["fsdp"], False, 3, 24),
    ("all-reduce between slices", ["data"], True, 1, 50),
  ]
  both = found[2]
  assert (both["ms"], both["waited_ms"], both["first"], both["last"]) == (4.0, 2.0, 0.5, 0.9)


@pytest.mark.parametrize("peak, temporary", [(9000, 700), (1250, 150), (900, 0)])
def test_memory_counts_the_smaller_figure_for_temporaries(peak, temporary):
  """A peak is of all memories, and too large for small programs."""
  found = types.SimpleNamespace(
    argument_size_in_bytes=1000,
    output_size_in_bytes=1100,
    alias_size_in_bytes=1000,
    temp_size_in_bytes=700,
    generated_code_size_in_bytes=30,
    peak_memory_in_bytes=peak,
  )
  assert estimate.memory(types.SimpleNamespace(memory_analysis=lambda: found)) == {
    "arguments": 1000,
    "outputs": 100,
    "temporary": temporary,
    "program": 30,
    "total": 1130 + temporary,
  }


def test_what_is_in_memory_at_the_worst_moment():
  def op_name(layer):
    return f"jit(train_step)/jvp({layer})/mul"

  half = "f32[4,128]{1,0:T(4,128)}"
  text = program(
    fusion("a", "x", layout=ARRAY, cycles=1, op_name=op_name("one")),
    fusion("b", "a", layout=f"({ARRAY}, {half})", cycles=1, op_name=op_name("two")),
    f"  %b0 = {ARRAY} get-tuple-element(%b), index=0",
    f"  %b1 = {half} get-tuple-element(%b), index=1",
    # a, b0 and b1 are needed, c lies on the chip
    fusion("c", "b0", "a", layout=ON, cycles=1, op_name=op_name("three")),
    # b1 alone
    fusion("d", "b1", "c", layout=ARRAY, cycles=1, op_name=op_name("four")),
    fusion("e", "d", layout=ARRAY, cycles=1, op_name=op_name("five")),
    f"  ROOT %all = ({ARRAY}) tuple(%e)",
  )
  assert live.largest(text) == {"two": 4096 + 2048, "one": 4096}


def test_memory_of_a_copy_is_of_the_layer_that_wrote_it():
  text = program(
    fusion("a", "x", layout=ON, cycles=1, op_name="jit(train_step)/jvp(one)/mul"),
    f"  %copy-start.1 = ({ARRAY}, {ON}, u32[]{{:S(2)}}) copy-start(%a)",
    f"  %copy-done.1 = {ARRAY} copy-done(%copy-start.1)",
    f"  ROOT %z = {ON} fusion(%copy-done.1), kind=kLoop, calls=%nothing",
  )
  assert live.largest(text) == {"one": 4096}


def test_memory_of_a_loop():
  text = program(
    fusion("a", "x", layout=ARRAY, cycles=1, op_name="jit(train_step)/jvp(one)/mul"),
    "  %while.1 = (s32[], f32[8,128]) while(%start), condition=%condition, body=%body",
    f"  ROOT %z = {ON} fusion(%a), kind=kLoop, calls=%nothing",
    computations=[
      "%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {",
      fusion(
        "b", "part", layout=ARRAY, cycles=1, op_name="jit(train_step)/while/body/jvp(two)/mul"
      ),
      fusion("c", "b", layout=ARRAY, cycles=1, op_name="jit(train_step)/while/body/jvp(three)/mul"),
      "  ROOT %next = (s32[], f32[8,128]) tuple(%i, %c)",
      "}",
    ],
  )
  assert live.largest(text) == {"one": 4096, "two": 4096}
