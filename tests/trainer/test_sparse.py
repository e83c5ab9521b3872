"""Sparse training: how many weights each layer keeps, which ones, and what a step does to them."""

import dataclasses
import math
import zlib

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from tests.trainer import tiny
from trainer import config as config_lib
from trainer import mesh as mesh_lib
from trainer import program as program_lib
from trainer.errors import ConfigError
from trainer.models import packing
from trainer.pod.pod import Pod
from trainer.pod.requests import NOTHING
from trainer.sparse import layers, method, select, show
from trainer.state import TrainState, make_init, path_name
from trainer.step import metric_names
from trainer.tools import plan
from trainer.workdir.checkpoint import Checkpointer


def flat(tree):
  return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.fixture(scope="module")
def resnet50():
  """The parameters of ResNet-50, without memory."""
  config = base.get_config()
  return jax.eval_shape(make_init(config, optax.identity(), 1)[1]).params


def sparse_config(**fields):
  config = base.get_config()
  config.sparsity.update({"name": "rigl"} | fields)
  return config


def test_figures_of_resnet50(resnet50):
  """Those of the code of RigL (google-research/rigl, sparse_utils.py), whose ratios are ours."""
  found = {}
  for sparsity in (0.8, 0.9):
    found[sparsity] = layers.find(sparse_config(sparsity=sparsity), resnet50)
    assert len(found[sparsity]) == 54
    assert sum(layer.size for layer in found[sparsity]) == 25_502_912
  # (budget before each layer rounds its zeros down, eps, density of the stem and of the head)
  for sparsity, budget, eps, stem, head in (
    (0.8, 5_100_607, 99.562, 0.857, 0.148),
    (0.9, 2_550_318, 48.787, 0.420, 0.0726),
  ):
    by_name = {layer.name: layer for layer in found[sparsity]}
    rounded = [layer for layer in found[sparsity] if not layer.dense]
    assert 0 <= sum(layer.kept for layer in found[sparsity]) - budget < len(rounded)
    widest = by_name["stage4_block3/conv2/kernel"]
    ratio = (3 + 3 + 512 + 512) / widest.size
    assert widest.kept / widest.size / ratio == pytest.approx(eps, abs=2e-3)
    for name, density in (("stem_conv", stem), ("head", head)):
      layer = by_name[f"{name}/kernel"]
      assert layer.kept / layer.size == pytest.approx(density, abs=5e-4)
  assert {layer.name.removesuffix("/kernel") for layer in found[0.8] if layer.dense} == {
    *[f"stage1_block{block}/{conv}" for block in (1, 2, 3) for conv in ("conv1", "conv3")],
    "stage1_block1/projection_conv",
    "stage2_block1/conv1",
  }
  assert [layer.name for layer in found[0.9] if layer.dense] == ["stage1_block1/conv1/kernel"]


def test_uniform_figures_of_resnet50(resnet50):
  for sparsity, budget in ((0.8, 5_108_109), (0.9, 2_558_758)):
    config = sparse_config(sparsity=sparsity, distribution="uniform", dense="^stem")
    found = layers.find(config, resnet50)
    assert [layer.name for layer in found if layer.dense] == ["stem_conv/kernel"]
    assert 0 <= sum(layer.kept for layer in found) - budget < 54
    for layer in found:
      zeros = 0 if layer.name.startswith("stem") else math.floor(sparsity * layer.size)
      assert layer.kept == layer.size - zeros


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"sparsity": 1.0}, ["sparsity.sparsity", "in [0, 1)", "1.0"]),
    ({"sparsity": -0.1}, ["sparsity.sparsity", "in [0, 1)"]),
    ({"name": "rigel"}, ["sparsity.name", "none, static, set, rigl, gradual"]),
    ({"every_steps": 0}, ["sparsity.every_steps", "1 or more"]),
    ({"drop_fraction": 1.0}, ["sparsity.drop_fraction", "in (0, 1)"]),
    ({"end_share": 1.1}, ["sparsity.end_share", "in (0, 1]"]),
    ({"leaves": "("}, ["sparsity.leaves", "a regular expression"]),
    ({"power": 2.0}, ["sparsity.power is 2.0", "rigl", "no use for it"]),
    ({"name": "gradual", "drop_fraction": 0.5}, ["drop_fraction is 0.5", "gradual"]),
    ({"name": "static", "every_steps": 5}, ["every_steps is 5", "static"]),
    ({"name": "none", "sparsity": 0.5}, ["sparsity.sparsity is 0.5", "none"]),
  ],
)
def test_fields_that_are_refused_at_start(fields, words):
  with pytest.raises(ConfigError) as caught:
    config_lib.validate(sparse_config(**fields))
  assert all(word in str(caught.value) for word in words), caught.value
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"leaves": "weight$"}, ["sparsity.leaves is 'weight$'", "no trained parameter", "head/"]),
    ({"leaves": "bias$"}, ["sparsity.leaves is 'bias$'", "two dimensions"]),
    ({"dense": "^layer1"}, ["sparsity.dense is '^layer1'", "no parameter"]),
    ({"dense": "."}, ["sparsity.dense is '.'", "no layer that could be sparse"]),
    ({"end_steps": 100}, ["sparsity.end_steps is 100", "only 100 steps"]),
    ({"begin_steps": 200}, ["sparsity.begin_steps is 200", "only 100 steps"]),
    ({"begin_steps": 80}, ["step 80", "step 75", "after the begin"]),
    (
      {"sparsity": 0.9999, "distribution": "uniform"},
      ["sparsity is 0.9999", "less than one", "lower"],
    ),
  ],
)
def test_what_does_not_fit_the_net_or_the_run_is_refused(fields, words):
  config = sparse_config(**fields)
  config_lib.validate(config)
  params = {"head": {"kernel": jnp.zeros((40, 3)), "bias": jnp.zeros(3)}}
  with pytest.raises(ConfigError) as caught:
    method.make(config, params, 100)
  assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("dtype", [np.uint32, np.float32])
def test_the_largest_are_exact_and_the_first_of_equal_ones(dtype):
  rng = np.random.default_rng(0)
  shapes = [(1, 3, 3, 5), (4, 60), (2, 7, 11)]
  if dtype == np.uint32:  # up to the largest number, with many equal ones
    scores = [rng.choice(np.array([0, 1, 7, 2**31, 2**32 - 1], np.uint32), s) for s in shapes]
  else:
    scores = [rng.integers(-3, 4, s).astype(dtype) / 2 for s in shapes]
  allowed = [rng.random(shape) < 0.7 for shape in shapes]
  counts = []
  for number, may in enumerate(allowed):
    most = may.reshape(len(may), -1).sum(1)
    counts.append(np.int32([0, *most[1:]] if number == 1 else rng.integers(0, most + 1)))

  @jax.jit
  def ours(scores, allowed, counts):
    if dtype == np.float32:
      scores = [select.magnitudes(x) for x in scores]
    return select.largest(scores, allowed, counts)

  for found, score, may, count in zip(ours(scores, allowed, counts), scores, allowed, counts):
    for block in range(len(score)):
      np.testing.assert_array_equal(found[block], top(score[block], may[block], count[block]))


def top(score, allowed, count):
  """The same by a stable sort."""
  keys = [-np.abs(score.astype(np.float64)).ravel(), ~allowed.ravel()]
  order = np.lexsort(keys)
  mask = np.zeros(score.size, bool)
  mask[order[:count]] = True
  return mask.reshape(score.shape)


# Ten changes, at every second step. Numbers that are exact in float32, and so often equal.
STEPS, RATE, MOMENTUM = 22, 0.5, 0.5
TOY = {
  "stem/kernel": (3, 3, 2, 4),
  "stage1_block2/conv/kernel": (6, 9),
  "stage1_block3/conv/kernel": (6, 9),
  "head/bias": (4,),
}


def toy(packed):
  """Return a random start, and a gradient for each step."""
  rng = np.random.default_rng(3)

  def tree():
    leaves = {name: rng.integers(-4, 5, s).astype(np.float32) / 4 for name, s in TOY.items()}
    nested = method.nested(leaves)
    return packing.pack(nested) if packed else nested

  return tree(), [tree() for _ in range(STEPS)]


def reference(name, sparse, params, grads):
  """Yield weights, masks and momentum after each step, by NumPy."""
  fields = sparse.config.sparsity
  w, g = flat(params), [flat(g) for g in grads]
  kept = {layer.name: layer.kept for layer in sparse.layers if not layer.dense}
  final = {n: w[n].size - kept[n] for n in kept}

  def random(number):
    key = jax.random.fold_in(jax.random.key(sparse.config.seed), zlib.crc32(b"sparsity"))
    key = jax.random.fold_in(key, number)
    return {
      n: np.asarray(
        jax.random.bits(jax.random.fold_in(key, np.uint32(zlib.crc32(n.encode()))), w[n].shape)
      )
      for n in kept
    }

  if name == "gradual":
    mask = {n: np.ones(w[n].shape, bool) for n in kept}
  else:
    scores = random(0)
    mask = {n: top(scores[n], np.ones(w[n].shape, bool), kept[n]) for n in kept}
  w = {n: x * mask.get(n, 1) for n, x in w.items()}
  m = {n: np.zeros_like(x) for n, x in w.items()}
  for step in range(STEPS):
    due = sparse.begin <= step <= sparse.end and (step - sparse.begin) % fields.every_steps == 0
    due &= name != "static"
    if not due:
      for n in w:
        m[n] = MOMENTUM * m[n] + g[step][n] * mask.get(n, 1)
        w[n] = w[n] - RATE * m[n]
    for n in kept if due else ():
      old, p = mask[n], (step - sparse.begin) / (sparse.end - sparse.begin)
      if name == "gradual":
        zeros = math.floor(final[n] * (1 - (1 - p) ** 3) + 1e-6)
        mask[n] = top(w[n], old, w[n].size - zeros)
      else:
        drop = math.floor(old.sum() * 0.3 / 2 * (1 + math.cos(math.pi * p)) + 1e-6)
        stay = top(w[n], old, old.sum() - drop)
        scores = random(step + 1)[n] if name == "set" else g[step][n]
        mask[n] = stay | top(scores, ~stay, drop)
      w[n] = w[n] * mask[n]
      m[n] = m[n] * (mask[n] & old)
    yield {n: x.copy() for n, x in w.items()}, dict(mask), {n: x.copy() for n, x in m.items()}


@pytest.mark.parametrize("name", ["rigl", "set", "gradual", "static"])
def test_ten_changes_are_those_of_numpy_stacked_or_not(name):
  changing = {} if name == "static" else {"every_steps": 2, "end_steps": 20}
  config = sparse_config(name=name, sparsity=0.75, **changing)
  params, grads = toy(packed=False)
  expected = list(reference(name, method.make(config, params, 30), params, grads))
  optimizer = optax.sgd(RATE, momentum=MOMENTUM)
  for packed in (False, True):
    params, grads = toy(packed)
    sparse = method.make(config, params, 30)
    dense = TrainState(jnp.int32(0), params, {}, {}, optimizer.init(params), None)
    state = sparse.with_masks(lambda dense=dense: dense, optimizer)()

    @jax.jit
    def step(state, grads, sparse=sparse):
      update = sparse.step(optimizer, grads, state.params, state)
      new = dataclasses.replace(
        state,
        step=state.step + 1,
        params=update.params,
        opt_state=update.opt_state,
        masks=update.masks,
      )
      return new, jnp.stack(update.metrics)

    sizes = sum(math.prod(shape) for shape in TOY.values() if len(shape) > 1)
    changes, kept = 0, None
    for number, (gradient, (weights, masks, momentum)) in enumerate(zip(grads, expected)):
      before = flat(packing.unpack(state.masks))
      state, metrics = step(state, gradient)
      for found, wanted in (
        (state.params, weights),
        (state.masks, masks),
        (state.opt_state[0].trace, momentum),
      ):
        found = flat(packing.unpack(found))
        assert found.keys() == wanted.keys()
        for leaf, value in wanted.items():
          np.testing.assert_array_equal(found[leaf], value, err_msg=f"step {number} {leaf}")
      counts = {leaf: int(mask.sum()) for leaf, mask in masks.items()}
      if name != "gradual":
        assert kept is None or counts == kept
      elif kept:
        assert all(counts[leaf] <= kept[leaf] for leaf in counts)
      kept = counts
      changed = sum(int((masks[leaf] != before[leaf]).sum()) for leaf in masks)
      changes += changed > 0
      dense_size = sizes - sum(mask.size for mask in masks.values())
      assert metrics[0] == pytest.approx((sum(counts.values()) + dense_size) / sizes, rel=1e-6)
      assert metrics[1] == pytest.approx(changed / sizes, rel=1e-6)
    assert kept == {layer.name: layer.kept for layer in sparse.layers if not layer.dense}
    assert changes >= (0 if name == "static" else 8)


def test_the_cubic_schedule_and_the_cosine():
  params, _ = toy(packed=False)
  sparse = method.make(
    sparse_config(name="gradual", begin_steps=10_000, end_steps=25_000), params, 31_200
  )
  steps = np.array([0, 10_000, 13_000, 20_000, 25_000, 30_000])
  p = np.clip((steps - 10_000) / 15_000, 0, 1)
  np.testing.assert_allclose(sparse.pruned(steps), 1 - (1 - p) ** 3, atol=1e-6)
  due = np.asarray(jax.vmap(sparse.due)(np.arange(9_000, 26_000, 50)))
  assert due.sum() == 151 and due[20] and due[-1 - 19]
  rigl = method.make(sparse_config(end_steps=25_000), params, 32_000)
  p = np.clip(steps / 25_000, 0, 1)
  np.testing.assert_allclose(rigl.drop_fraction(steps), 0.15 * (1 + np.cos(np.pi * p)), atol=1e-7)


@pytest.fixture(scope="module")
def trained():
  """A small net with all that touches weights: its program, and the states of ten steps."""
  config = tiny.get_config()
  config.data.kind = "synthetic"
  config.model.zero_init_residual = False
  config.accumulation_steps = 2
  config.optimizer.update(
    ema_decay=0.9, weight_decay=0.01, clip_norm=1.0, agc=0.1, freeze="stage1_block1/conv1"
  )
  config.sparsity.update(name="rigl", every_steps=3, end_steps=9, dense="^stem", sparsity=0.85)
  config_lib.validate(config)
  program = program_lib.build(config, 64)
  step = program.compile("train", **program.sizes("train"))
  states, metrics = [jax.device_get(program.init_state())], []
  for number in range(10):
    state, output = take(program, step, states[-1], number)
    states.append(state)
    metrics.append(dict(zip(metric_names(config), output.tolist(), strict=True)))
  return program, step, states, metrics


def take(program, step, state, number):
  rng = np.random.default_rng(number)
  batch = {
    "image": rng.integers(0, 256, (8, 16, 16, 3), np.uint8),
    "label": rng.integers(0, 6, 8, np.int32),
  }
  state = jax.device_put(state, program.state_shardings())
  state, output = step(
    state, mesh_lib.to_global(program.mesh, batch), mesh_lib.flags(program.mesh, NOTHING)
  )
  return jax.device_get(state), np.asarray(output.metrics)


def test_every_layer_keeps_its_number_of_weights_in_every_step(trained):
  program, _, states, metrics = trained
  sparse = program.sparse
  named = {layer.name: layer for layer in sparse.layers}
  assert "stage1_block1/conv1/kernel" not in named and named["stem_conv/kernel"].dense
  for number, state in enumerate(states):
    masks, params, averages = flat(state.masks), flat(state.params), flat(state.ema["params"])
    assert masks.keys() == {name for name, layer in named.items() if not layer.dense}
    for name, mask in masks.items():
      assert mask.dtype == bool and mask.sum() == named[name].kept
      assert not params[name][~mask].any() and not averages[name][~mask].any()
      if number > 1 and (number - 1) % 3:  # what has grown has moved on
        assert np.count_nonzero(params[name]) == named[name].kept
    if number:
      assert metrics[number - 1]["density"] == pytest.approx(sparse.kept / sparse.size, rel=1e-6)
      assert (metrics[number - 1]["mask_changed"] > 0) == (number in (1, 4, 7))
  same = "stage1_block1/conv1/kernel"
  np.testing.assert_array_equal(flat(states[-1].params)[same], flat(states[0].params)[same])


def test_a_change_takes_no_step_and_new_weights_start_anew(trained):
  _, _, states, _ = trained
  before, after = states[3], states[4]  # the fourth step changes masks
  masks, new = flat(before.masks), flat(after.masks)
  for name, leaf in flat(before.params).items():
    np.testing.assert_array_equal(flat(after.params)[name], leaf * new.get(name, 1))
  moments = [
    {name.partition("trace/")[2]: x for name, x in flat(state.opt_state).items() if "trace" in name}
    for state in (before, after)
  ]
  assert moments[0].keys() == flat(before.params).keys() - {"stage1_block1/conv1/kernel"}
  for name, moment in moments[0].items():
    kept = masks[name] & new[name] if name in masks else 1
    np.testing.assert_array_equal(moments[1][name], moment * kept)
  counts = [
    {name: int(x) for name, x in flat(state.opt_state).items() if name.endswith("count")}
    for state in (before, after)
  ]
  assert counts[0] and all(counts[1][name] == count + 1 for name, count in counts[0].items())


def test_a_resume_is_exact(trained, tmp_path):
  program, step, states, _ = trained
  checkpointer = Checkpointer(Pod(program.config.pod), epath.Path(tmp_path), program.config, 0)
  saved = jax.device_put(states[5], program.state_shardings())
  checkpointer.save_and_wait(5, saved, {"best": None, "wall_seconds": {}})
  state, meta = checkpointer.restore_newest(program.abstract_checkpoint)
  checkpointer.close()
  assert "masks/head/kernel" in meta["fingerprints"]
  state = jax.device_get(state)
  for number in range(5, 10):
    state, _ = take(program, step, state, number)
  jax.tree.map(np.testing.assert_array_equal, state, states[-1])


def test_weights_that_there_are_keep_their_largest(trained):
  """And those of a sparse net all that they have."""
  program, _, states, _ = trained
  masks = flat(jax.jit(program.sparse.of_weights)(states[-1].params))
  for name, mask in flat(states[-1].masks).items():
    np.testing.assert_array_equal(masks[name], mask)
  dense = jax.tree.map(lambda x: np.random.default_rng(1).normal(size=x.shape), states[0].params)
  masks, weights = flat(jax.jit(program.sparse.of_weights)(dense)), flat(dense)
  for name, mask in masks.items():
    ones = np.ones(mask.shape, bool)
    np.testing.assert_array_equal(mask, top(weights[name].astype(np.float32), ones, mask.sum()))


def test_what_a_person_sees(trained):
  sparse = trained[0].sparse
  line = show.line(sparse)
  assert line.startswith(f"rigl, erk: {sparse.kept:,} of {sparse.size:,} weights")
  assert line.endswith("; changes every 3 steps from 0 to 9, of 30 % of a layer (cosine)")
  rows = [row.split() for row in show.table(sparse).splitlines()[1:]]
  assert {row[0]: row[1] for row in rows}["head/kernel"].isdecimal()
  assert sum(int(row[1].replace(",", "")) for row in rows) == sparse.kept
  config = trained[0].config
  assert f"sparsity   {line}" in plan.text(plan.make(config, "mine", 64))
