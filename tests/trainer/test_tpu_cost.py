"""The estimate of a TPU step, on programs short enough to reckon by hand."""

import pytest

from trainer.reporting.chips import CHIPS
from trainer.tools import hlo, kinds, tpu_cost
from trainer.tools.collectives import Collective
from trainer.tools.tpu_cost import Rates

DEVICE = Rates(hbm=10.0, links=4.0, network=1.0)

# Of 4096 bytes each: "on" is on the chip, the others in HBM.
ARRAY, ON = "f32[8,128]{1,0:T(8,128)}", "f32[8,128]{1,0:T(8,128)S(1)}"


MUL = "jit(train_step)/jvp()/mul"


def fusion(name, *operands, cycles=None, calls="nothing", layout=ON, op_name=MUL, kind="kLoop"):
  estimate = f', backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
  return (
    f"  %{name} = {layout} fusion({', '.join('%' + operand for operand in operands)}), "
    f'kind={kind}, calls=%{calls}, metadata={{op_name="{op_name}"}}'
    + estimate
    * (cycles is not None)
  )


def program(*lines, computations=()):
  return "\n".join(
    [
      "HloModule jit_train_step, is_scheduled=true, replica_count=1, num_partitions=4",
      "",
      "%nothing (p: f32[8,128]) -> f32[8,128] {",
      f"  ROOT %p = {ARRAY} parameter(0)",
      "}",
      *computations,
      "ENTRY %main.1_spmd (x: f32[8,128], w: f32[8,128]) -> f32[8,128] {",
      f"  %x = {ARRAY} parameter(0), sharding={{replicated}}",
      f"  %w = {ARRAY} parameter(1)",
      *lines,
      "}",
    ]
  )


def items(text, **options):
  line = tpu_cost.time_line(text, DEVICE, **options)
  return {(item.name, "wait") if item.waits else item.name: item.cycles for item in line.items}


@pytest.mark.parametrize(
  "shape, dtype, lengths, size, space",
  [
    ("f32[8,128]{1,0:T(8,128)}", "f32", (8, 128), 4096, 0),
    ("f32[8,128]{1,0:T(8,128)S(1)}", "f32", (8, 128), 4096, 1),
    # 64 channels take 128 lanes, or 32 examples do; 9 rows take 16.
    ("bf16[32,4,4,64]{3,0,2,1:T(8,128)(2,1)}", "bf16", (32, 4, 4, 64), 32 * 16 * 128 * 2, 0),
    ("bf16[32,4,4,64]{0,3,2,1:T(8,128)(2,1)}", "bf16", (32, 4, 4, 64), 128 * 16 * 64 * 2, 0),
    ("pred[9,128]{1,0:T(8,128)(4,1)}", "pred", (9, 128), 16 * 128, 0),
    ("f32[64]{0:T(128)}", "f32", (64,), 512, 0),
    ("u32[]{:S(2)}", "u32", (), 4, 2),
    ("f32[64,64]", "f32", (64, 64), 16384, 0),
  ],
)
def test_arrays_are_as_large_as_their_tiles(shape, dtype, lengths, size, space):
  assert hlo.arrays(shape) == (hlo.Array(dtype, lengths, size, space),)
  assert hlo.arrays(f"({shape}, (token[], {shape}))") == 2 * hlo.arrays(shape)


def test_text_without_entry():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.parse("HloModule empty\n")


def test_copy_gets_the_bandwidth_that_operations_leave():
  text = program(
    f"  %copy-start.1 = ({ON}, {ARRAY}, u32[]{{:S(2)}}) copy-start(%w)",
    f"  %slice-start.1 = (({ARRAY}), f32[4,128]{{1,0:T(4,128)S(1)}}, s32[]{{:S(2)}}) "
    "slice-start(%w), slice={[0:4], [0:128]}",
    fusion("reads", "x", cycles=500),
    f"  %copy-done.1 = {ON} copy-done(%copy-start.1)",
    fusion("computes", "copy-done.1", cycles=100),
    "  %slice-done.1 = f32[4,128]{1,0:T(4,128)S(1)} slice-done(%slice-start.1)",
    "  ROOT %result = (f32[8,128]) tuple(%computes)",
  )
  # reads: 5000 bytes could pass, 4096 are its own, so that 904 of the copy's 4096 do. The slice
  # comes behind the copy, with 1000 of its 2048 bytes while nothing else reads.
  assert items(text) == {
    "copy-start.1": 0,
    "slice-start.1": 0,
    "reads": 500,
    ("copy-start.1", "wait"): pytest.approx((4096 - 904) / 10),
    "computes": 100,
    ("slice-start.1", "wait"): pytest.approx((2048 - 1000) / 10),
  }
  line = tpu_cost.time_line(text, DEVICE)
  assert line.cycles == pytest.approx(500 + 319.2 + 100 + 104.8)
  assert line.estimated == 600
  assert line.hbm_bytes == 4096 + 2048 + 4096
  assert line.by_kind()["copies"] == pytest.approx(319.2 + 104.8)


def test_copy_within_hbm_counts_twice():
  text = program(
    f"  %copy-start.1 = ({ARRAY}, {ARRAY}, u32[]{{:S(2)}}) copy-start(%w)",
    f"  ROOT %copy-done.1 = {ARRAY} copy-done(%copy-start.1)",
  )
  assert items(text)["copy-start.1", "wait"] == pytest.approx(819.2)


def test_what_has_no_estimate_takes_its_bytes():
  text = program(
    f"  %select-and-scatter.1 = {ON} select-and-scatter(%x, %w), window={{size=3x3}}, "
    'select=%ge, scatter=%add, metadata={op_name="jit(train_step)/transpose(jvp(stem))/pool"}',
    f"  %custom-call.1 = {ON} custom-call(%select-and-scatter.1, %gone), "
    'custom_call_target="kernel"',
    f'  %custom-call.2 = {ON} custom-call(%x, %w), custom_call_target="ConcatBitcast"',
    f"  ROOT %copy.1 = {ARRAY} copy(%custom-call.2)",
  )
  assert items(text) == {
    "select-and-scatter.1": pytest.approx(3 * 409.6),
    "custom-call.1": pytest.approx(2 * 409.6),
    "copy.1": pytest.approx(2 * 409.6),
  }
  line = tpu_cost.time_line(text, DEVICE)
  assert line.estimated == 0
  assert line.by_kind() == {
    "pool": pytest.approx(1228.8),
    "copies": pytest.approx(2 * 819.2),
  }
  assert line.by_layer()["stem"] == pytest.approx(1228.8)


STACK = "f32[16,8,128]{2,1,0:T(8,128)}"
SLICE = f"{STACK.replace('16', '1')} dynamic-slice(%s, %i, %z, %z), dynamic_slice_sizes={{1,8,128}}"
UPDATE = f"{STACK} dynamic-update-slice(%s, %u, %i, %z, %z)"


@pytest.mark.parametrize(
  "parts, touched",
  [
    # A slice of the stack and the other operand are read, the sum is written on the chip.
    ([f"%a = {SLICE}", f"%b = {ARRAY} bitcast(%a)", f"ROOT %c = {ON} add(%b, %u)"], 2 * 4096),
    # Two slices.
    (
      [f"%a = {SLICE}", f"%b = {SLICE}", f"ROOT %c = {ON} subtract(%a, %b, %u)"],
      3 * 4096,
    ),
    # All of the stack, in spite of a slice of it.
    ([f"%a = {SLICE}", f"ROOT %c = {ON} custom(%a, %s, %u)"], 17 * 4096),
    # The update is read, and written into its place.
    ([f"ROOT %c = {UPDATE}"], 2 * 4096),
    ([f"%c = {UPDATE}", f"ROOT %d = {STACK} bitcast(%c)"], 2 * 4096),
    # A copy is updated: all of it is read and written.
    ([f"%s.1 = {STACK} copy(%s)", f"ROOT %c = {UPDATE.replace('%s', '%s.1')}"], 33 * 4096),
  ],
)
def test_of_stacked_arrays_the_slice_is_moved(parts, touched):
  result = STACK if "dynamic-update" in "".join(parts) else ON
  text = program(
    '  %n = s32[]{:S(6)} custom-call(), custom_call_target="number"',
    f'  %stack = {STACK} custom-call(), custom_call_target="AllocateBuffer"',
    f"  ROOT %out = {result} fusion(%stack, %w, %n), kind=kLoop, calls=%part",
    computations=[
      "%part (s: f32[16,8,128], u: f32[8,128], i: s32[]) -> f32[8,128] {",
      f"  %s = {STACK} parameter(0)",
      f"  %u = {ARRAY} parameter(1)",
      "  %i = s32[]{:S(6)} parameter(2)",
      *(f"  {part}" for part in parts),
      "}",
    ],
  )
  (found,) = (item for item in tpu_cost.time_line(text, DEVICE).items if item.name == "out")
  assert found.hbm_bytes == touched


def test_an_update_outside_of_a_fusion():
  text = program(
    f'  %stack = {STACK} custom-call(), custom_call_target="AllocateBuffer"',
    f"  ROOT %out = {STACK} dynamic-update-slice(%stack, %w, %i, %z, %z)",
  )
  assert items(text)["out"] == pytest.approx(2 * 409.6)


LOOP = [
  "%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {",
  f"  %state = (s32[], {ARRAY}) parameter(0)",
  f"  %part = {ARRAY} get-tuple-element(%state), index=1",
  fusion("round", "part", cycles=700),
  "  ROOT %next = (s32[], f32[8,128]) tuple(%i, %round)",
  "}",
  "%condition (state: (s32[], f32[8,128])) -> pred[] {",
  "  %limit = s32[]{:T(128)} constant(8)",
  "  ROOT %less = pred[] compare(%i, %limit), direction=LT",
  "}",
]


LESS = "  ROOT %less = pred[] compare(%i, %limit), direction=LT"
UNFINISHED = [
  fusion("unfinished", "part", cycles=40),
  # What a sum over devices makes of its bits is compared with nothing.
  "  %bits = u32[] constant(24)",
]


@pytest.mark.parametrize(
  "old, new, rounds, of_condition",
  [
    ("", "", 8, None),
    ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}', 5, None),
    ("body=%body", 'body=%body, metadata={op_name="jit(step)/one_round/while"}', 1, None),
    (LESS, "\n".join([*UNFINISHED, LESS]), 8, None),
    (
      LESS,
      "\n".join(
        [*UNFINISHED, LESS.replace("ROOT ", ""), "  ROOT %both = pred[] and(%less, %bits)"]
      ),
      8,
      40,
    ),
    (LESS, "\n".join([*UNFINISHED, "  ROOT %it = pred[] convert(%bits)"]), None, 40),
  ],
)
def test_loops_count_as_often_as_they_turn(old, new, rounds, of_condition):
  text = program(
    f"  %copy-start.1 = ({ON}, {ARRAY}, u32[]{{:S(2)}}) copy-start(%w)",
    "  %while.1 = (s32[], f32[8,128]) while(%start), condition=%condition, body=%body",
    f"  ROOT %copy-done.1 = {ON} copy-done(%copy-start.1)",
    computations=LOOP,
  ).replace(old, new)
  line = tpu_cost.time_line(text, DEVICE)
  waited = sum(item.cycles for item in line.items if item.waits)
  times = rounds or 1
  if of_condition:
    loop = tpu_cost.Loop("while.1", rounds, pytest.approx(line.cycles - waited))
    assert line.open_loops == (loop,)
    assert times * (700 + of_condition) <= loop.cycles.expected < times * (760 + of_condition)
  else:
    assert line.open_loops == ()
    assert line.cycles == pytest.approx(times * 700 + waited)
    # Each round leaves 7000 - 4096 bytes to the copy of 4096.
    assert waited == pytest.approx(max(0, 4096 - times * (7000 - 4096)) / 10)


@pytest.mark.parametrize(
  "op_name, cycles",
  [
    ("jit(train_step)/cond", 900),  # the dearest, if it is not known how often each is taken
    ("jit(train_step)/one_in_100/cond", 0.01 * 900 + 0.99 * 100),
    ("jit(train_step)/one_in_100/cond/branch_1_fun/cond", 900),
  ],
)
def test_a_branch_counts_as_often_as_it_is_taken(op_name, cycles):
  branches = [
    line
    for name, spent in (("usual", 100), ("rare", 900))
    for line in (
      f"%{name} (p: f32[8,128]) -> f32[8,128] {{",
      f"  %x.{name} = {ON} parameter(0)",
      fusion(f"of.{name}", f"x.{name}", cycles=spent),
      "}",
    )
  ]
  text = program(
    f"  ROOT %result = {ON} conditional(%x, %w, %w), branch_computations={{%usual, %rare}}, "
    f'metadata={{op_name="{op_name}"}}',
    computations=branches,
  )
  line = tpu_cost.time_line(text, DEVICE)
  assert line.cycles == pytest.approx(cycles)
  assert sum(line.by_kind().values()) == pytest.approx(cycles)


def test_collectives():
  reduce = "replica_groups={{0,1,2,3}}, to_apply=%add"
  text = program(
    f"  %all-reduce-start.1 = {ARRAY} all-reduce-start(%w), channel_id=1, {reduce}",
    fusion("computes", "x", cycles=1000),
    f"  %all-reduce-done.1 = {ARRAY} all-reduce-done(%all-reduce-start.1)",
    f"  %all-reduce.2 = {ARRAY} all-reduce(%x), channel_id=2, {reduce}",
    f"  %all-gather.1 = {ARRAY} all-gather(%y), channel_id=3, replica_groups={{{{0,1,2,3}}}}, "
    "dimensions={0}",
    f"  %recv.1 = ({ARRAY}, u32[], token[]) recv(%x), channel_id=7, is_host_transfer=true, "
    'frontend_attributes={_xla_megascale_target="{1,2}x{0:1}",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}',
    f"  %recv-done.1 = ({ARRAY}, token[]) recv-done(%recv.1)",
    f"  ROOT %copy.1 = {ON} copy(%all-reduce.2)",
  )
  line = tpu_cost.time_line(text, DEVICE)
  # A ring of four passes 2 x 3/4 of the bytes for a sum, 3/4 to gather; one of two slices, all.
  assert [(each.collective, each.cycles, each.rounds, each.waited) for each in line.transfers] == [
    (Collective("all-reduce", 4, 4096, False), 1536, 1, 536),
    (Collective("all-reduce", 4, 4096, False), 1536, 1, 1536),
    (Collective("all-gather", 4, 4096, False), 768, 1, 768),
    (Collective("all-reduce between slices", 2, 4096, False), 4096, 1, 4096),
  ]
  assert line.cycles == pytest.approx(1000 + 536 + 1536 + 768 + 4096 + 819.2)
  assert line.without_collectives == pytest.approx(1000 + 819.2)
  assert [each.group for each in line.transfers] == [(0, 1, 2, 3)] * 3 + [()]
  assert [round(each.position, 3) for each in line.transfers] == [
    0,
    round(1536 / line.cycles, 3),
    round(3072 / line.cycles, 3),
    round(3840 / line.cycles, 3),
  ]


def test_collective_in_fusions_of_a_chain():
  of = 'to_apply=%add, frontend_attributes={chain_id="0"}'

  def part(name, target=""):
    return [
      f"%{name} (p: f32[8,128]) -> f32[8,128] {{",
      f"  %{name}.sum = {ARRAY} all-reduce(%p), channel_id=2, replica_groups={{{{0,1,2,3}}}}, {of}",
      f'  ROOT %{name}.call = {ARRAY} custom-call(%{name}.sum), custom_call_target="{target}"',
      "}",
    ]

  text = program(
    fusion("first", "w", calls="start", kind="kCustom"),
    fusion("between", "x", calls="middle", cycles=900),
    fusion("last", "w", calls="end", kind="kCustom"),
    computations=[
      *part("start", "AsyncCollectiveStart"),
      *part("middle"),
      *part("end", "AsyncCollectiveDone"),
    ],
  )
  line = tpu_cost.time_line(text, DEVICE)
  assert [(each.cycles, each.waited) for each in line.transfers] == [(1536, 636)]
  assert line.cycles == 1536


STEP = "jit(train_step)/"
FORWARD, BACKWARD = STEP + "jvp(stage1_block1)", STEP + "transpose(jvp(stage1_block1))"


def convolution(labels, op_name):
  return f'  %c = {ON} convolution(%p, %q), dim_labels={labels}, metadata={{op_name="{op_name}"}}'


def elementwise(opcode, op_name):
  return f'  %e = {ON} {opcode}(%p, %q), metadata={{op_name="{op_name}"}}'


@pytest.mark.parametrize(
  "inside, op_name, work",
  [
    (
      [
        elementwise("multiply", FORWARD + "/bn1/mul"),
        convolution("b01f_01io->b01f", FORWARD + "/conv2/conv_general_dilated"),
      ],
      "",
      ("stage1_block1/conv2", kinds.FORWARD),
    ),
    (
      [convolution("b01f_01oi->b01f", BACKWARD + "/conv2/conv_general_dilated")],
      "",
      ("stage1_block1/conv2", kinds.DATA),
    ),
    (
      [convolution("f01b_i01o->01bf", BACKWARD + "/conv2/conv_general_dilated")],
      "",
      ("stage1_block1/conv2", kinds.WEIGHT),
    ),
    (
      [elementwise("subtract", FORWARD + "/bn1/sub"), elementwise("maximum", FORWARD + "/max")],
      "",
      ("stage1_block1/bn1", kinds.NORM),
    ),
    (
      [
        elementwise("subtract", FORWARD + "/bn2/sub"),
        elementwise("multiply", FORWARD + "/bn2/mul"),
        elementwise("add", FORWARD + "/add"),
      ],
      "",
      ("stage1_block1/bn2", kinds.RESIDUAL),
    ),
    ([f"  %r = {ON} reduce-window(%p)"], STEP + "jvp()/reduce_window_max", ("", kinds.POOL)),
    ([elementwise("add", STEP + "add")], STEP + "add", ("", kinds.OPTIMIZER)),
    ([elementwise("log", STEP + "jvp()/log")], "", ("", kinds.INPUT)),
    # of a loop over blocks, in a loop over micro-batches
    ([elementwise("copy", STEP + "while/body/jvp()/while/body/slice")], "", ("", kinds.OTHER)),
    ([elementwise("log", STEP + "while/body/jvp()/log")], "", ("", kinds.INPUT)),
    (
      [elementwise("tanh", STEP + "while/body/closed_call/jvp(head)/tanh")],
      "",
      ("head", kinds.OTHER),
    ),
    ([f"  %t = {ON} copy(%p)"], "", ("", kinds.COPIES)),
  ],
)
def test_kinds_and_layers(inside, op_name, work):
  text = program(
    fusion("one", "x", cycles=1, calls="part", op_name=op_name),
    computations=["%part (p: f32[8,128]) -> f32[8,128] {", *inside, "}"],
  )
  (item,) = tpu_cost.time_line(text, DEVICE).items
  assert item.work == work


def test_evaluation_has_no_optimizer():
  text = program(
    fusion("one", "x", cycles=1, op_name="jit(eval_step)/jit(relu)/max"),
    fusion("two", "x", cycles=1, op_name="jit(eval_step)/stage1_block1/bn1/mul"),
  )
  works = [item.work for item in tpu_cost.time_line(text, DEVICE, training=False).items]
  assert works == [("", kinds.INPUT), ("stage1_block1/bn1", kinds.NORM)]


def test_chips():
  for kind, chip in CHIPS.items():
    # What a chip computes for each byte that it reads rises from 66 FLOPs to 560.
    assert 50 < chip.peak / chip.hbm_bandwidth < 600, kind
    assert 0.7e9 <= round(chip.clock, -7) < 2.3e9, kind
  v5e = CHIPS["TPU v5 lite"]
  assert v5e.clock == pytest.approx(1.5e9, rel=0.01)  # 4 units of 128 x 128
  assert CHIPS["TPU v4"].clock == pytest.approx(1.05e9, rel=0.01)  # arXiv:2304.01433
  assert tpu_cost.rates(v5e).hbm == pytest.approx(545, abs=1)
  assert tpu_cost.rates(CHIPS["TPU v3"], 2).hbm == pytest.approx(450e9 / 0.94e9, rel=0.01)
