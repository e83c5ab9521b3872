"""Distillation: the loss, what the teacher sees, who may be one, resumes and layouts."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from input_pipeline.prepare import __main__ as prepare
from tests.trainer import tiny
from tests.trainer.shared import StopAt, fingerprints
from trainer import augment, distill
from trainer import config as config_lib
from trainer import mesh as mesh_lib
from trainer import program as program_lib
from trainer import train as train_lib
from trainer.errors import ConfigError, Preempted, TrainerError
from trainer.pod.pod import Pod
from trainer.reporting import flops
from trainer.state import step_key
from trainer.step import metric_names
from trainer.tools import plan
from trainer.weights import net as net_lib
from trainer.weights import read as read_lib
from trainer.weights import run_folder, safetensors, teacher
from trainer.weights.about import About

CLASSES = [f"class{i}" for i in range(6)]
NUMBERS = [str(i) for i in range(6)]  # what synthetic images have


def make_teacher(family="cifar_resnet", seed=0, classes=CLASSES):
  """Return a net with weights that no part of it hides behind, as weights.read.read_model does."""
  config = tiny.get_config(family)
  config.model.num_classes = len(classes)
  net = net_lib.build(config)
  return net, net_lib.random_leaves(net, seed), About(classes=tuple(classes))


def write_teacher(folder, **of_net):
  """Write the workdir of such a net; return its path."""
  net, leaves, about = make_teacher(**of_net)
  run_folder.write(str(folder), net.config, net, leaves, about.classes)
  return str(folder)


@pytest.fixture(scope="module")
def teachers():
  """Nets that `read` finds without files, by the name of their workdir."""
  found = {
    "plain": make_teacher(),
    "other": make_teacher(seed=1),
    "vit": make_teacher("vit"),
    "five": make_teacher(classes=CLASSES[:5]),
  }
  with pytest.MonkeyPatch.context() as patch:
    real = read_lib.read_model
    patch.setattr(
      read_lib, "read_model", lambda origin: found[origin] if origin in found else real(origin)
    )
    yield


def student(origin, **fields):
  config = tiny.get_config()
  config.data.kind = "synthetic"
  config.distill.update({"teacher": origin, "weight": 1.0})
  config.update_from_flattened_dict(fields)
  config_lib.validate(config)
  return config


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence(logits, theirs, t):
  p, q = log_softmax(theirs / t), log_softmax(logits / t)
  return t * t * (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize("t", [1.0, 2.5, 10.0])
def test_loss_and_gradient_are_those_of_numpy(t):
  rng = np.random.default_rng(0)
  logits, theirs = rng.normal(0, 4, (2, 5, 7))
  with jax.enable_x64(True):
    loss, pull = jax.vjp(lambda x: distill.divergence(x, jnp.asarray(theirs), t), logits)
    (grads,) = pull(jnp.ones_like(loss))
  assert loss.dtype == np.float64
  np.testing.assert_allclose(loss, divergence(logits, theirs, t), rtol=1e-12)
  by_hand = t * (np.exp(log_softmax(logits / t)) - np.exp(log_softmax(theirs / t)))
  np.testing.assert_allclose(grads, by_hand, rtol=1e-12, atol=1e-14)


@pytest.fixture(scope="module")
def stepped(teachers):
  """A step in two micro-batches with mixing, averages and half of the labels, and its output."""
  fields = {"accumulation_steps": 2, "optimizer.ema_decay": 0.9, "augment": "mixup(alpha=1.0)"}
  fields |= {"distill.weight": 0.75, "distill.temperature": 2.0, "label_smoothing": 0.1}
  fields |= {"data.mean": (100.0, 120.0, 140.0), "data.std": (50.0, 60.0, 70.0)}
  del teachers
  config = student("plain", **fields)
  read = teacher.read(config)
  program = program_lib.build(config, 64, teacher=read)
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (8, 16, 16, 3), np.uint8),
    "label": rng.integers(0, 6, 8, np.int32),
  }
  state = program.init_state()
  before = jax.device_get(state)
  taught = read.place(config, program.mesh)
  step = program.compile("train", **program.sizes("train"))
  after, output = step(
    state, mesh_lib.to_global(program.mesh, batch), mesh_lib.flags(program.mesh, 0), taught
  )
  metrics = dict(zip(metric_names(config), np.asarray(output.metrics).tolist(), strict=True))
  return program, batch, before, after, taught, metrics


def test_the_teacher_sees_the_mixed_batch_in_evaluation_mode(stepped):
  program, batch, before, after, taught, metrics = stepped
  config, read = program.config, program.teacher
  ours, own = (
    [np.array(x) for x in (fields.mean, fields.std)] for fields in (config.data, read.config.data)
  )
  float32 = net_lib.build(read.config)  # as trainer.predict has it

  @jax.jit
  def both(variables, key, images, their_images):
    net = program.model.merge(variables, key)
    return net(images), float32.logits(read.variables, their_images)

  found = []
  for number in range(2):
    key_augment, key_model = jax.random.split(step_key(config.seed, jnp.int32(0), number))
    rows = {name: x[number::2] for name, x in batch.items()}
    images, labels = augment.make_inputs(config)(key_augment, rows, jnp.int32(0))
    assert 0 < labels[0].max() < 1  # mixed
    pixels = np.asarray(images) * ours[1] + ours[0]
    logits, theirs = both(before.raw(), key_model, images, (pixels - own[0]) / own[1])
    logits, theirs = (np.asarray(x, np.float64) for x in (logits, theirs))
    smooth = 0.9 * np.asarray(labels) + 0.1 / 6
    found.append(
      (
        divergence(logits, theirs, 2.0).mean(),
        -(smooth * log_softmax(logits)).sum(-1).mean(),
        (logits.argmax(-1) == theirs.argmax(-1)).mean(),
      )
    )
  far, cross_entropy, agreement = np.mean(found, 0)
  assert metrics["distill_loss"] == pytest.approx(far, rel=1e-5)
  assert metrics["loss"] == pytest.approx(0.75 * far + 0.25 * cross_entropy, rel=1e-5)
  assert metrics["agreement"] == agreement
  # The state is that of any run, and the teacher is neither donated nor changed.
  assert jax.tree.structure(after) == jax.tree.structure(program.abstract_state)
  assert after.ema is not None
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(taught), read.variables)


def test_its_forward_pass_counts(stepped):
  program = stepped[0]
  read, variables = program.teacher, program.abstract_state.raw()
  own = flops.forward_flops(program.model, variables, 16)
  of_teacher = flops.forward_flops(read.model, read.variables, 16)
  assert own == of_teacher > 0  # the same net
  work = flops.work(program, peak=1.0)
  assert work.between(0, 10) == 10 * 8 * (3 * own + of_teacher)
  planned = plan.make(program.config, "tiny")
  assert planned.train_flops == work.between(0, 10)
  assert "weight 0.75, temperature 2: CIFAR ResNet-8, width" in plan.text(planned)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"distill.weight": 0.0}, ["distill.teacher is", "distill.weight is 0", "set it to 1"]),
    ({"distill.weight": 1.5}, ["distill.weight must be in [0, 1]", "1.5"]),
    ({"distill.temperature": 0.0}, ["distill.temperature must be positive"]),
  ],
)
def test_fields_that_are_refused_at_start(fields, words):
  with pytest.raises(ConfigError) as caught:
    student("runs/a", **fields)
  assert all(word in str(caught.value) for word in words), caught.value
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("origin", "fields", "classes", "words"),
  [
    ("", {}, CLASSES, "distill.weight is 1, but config.distill.teacher names no teacher; give"),
    ("{0}/none", {}, CLASSES, "config.distill.teacher: There is no file or folder {0}/none"),
    ("{0}/empty", {}, CLASSES, "config.distill.teacher: {0}/empty holds no checkpoint"),
    ("{0}/a.safetensors", {}, CLASSES, "does not say of which model it is; import it into a"),
    ("five", {}, CLASSES, "five has 5 classes, this run has 6; give a teacher of the same"),
    ("plain", {}, CLASSES[::-1], "class 0 was 'class0' and is 'class5'. Give a teacher of the"),
    ("vit", {"data.image_size": 18}, CLASSES, "cannot be the teacher: config.data.image_size"),
  ],
)
def test_teachers_that_are_refused(teachers, tmp_path, origin, fields, classes, words):
  (tmp_path / "empty").mkdir()
  foreign = safetensors.encode({"fc.weight": np.zeros((6, 4))}, {})
  (tmp_path / "a.safetensors").write_bytes(b"".join(foreign))
  config = student(origin.format(tmp_path), **fields)
  with pytest.raises(TrainerError) as caught, Pod(config.pod) as pod:
    teacher.read_everywhere(config, classes, pod)
  assert words.format(tmp_path) in str(caught.value), caught.value
  assert "\n" not in str(caught.value)


def test_a_vision_transformer_is_brought_to_the_size_of_the_images(teachers):
  same, larger = (teacher.read(student("vit", **{"data.image_size": s})) for s in (16, 32))
  assert larger.digest == same.digest
  images = jnp.zeros((1, 32, 32, 3))
  logits = jax.eval_shape(lambda v: larger.model.merge(v, None)(images), larger.variables)
  assert logits.shape == (1, 6)
  sizes = [sum(x.size for x in jax.tree.leaves(t.variables)) for t in (same, larger)]
  assert sizes[1] > sizes[0]


def test_another_teacher_is_one_of_other_values(teachers):
  read, other = (teacher.read(student(name)) for name in ("plain", "other"))
  moved = dataclasses.replace(read, origin="moved")
  for saved in (None, read.digest):
    teacher.check_same(saved, moved, student("moved"), "runs/a")
  teacher.check_same(read.digest, None, tiny.get_config(), "runs/a")
  with pytest.raises(ConfigError, match=r"runs/a holds .* other weights .*=distill\.teacher\.$"):
    teacher.check_same(read.digest, other, student("other"), "runs/a")
  allowed = student("other", **{"resume.allow": "distill"})
  teacher.check_same(read.digest, other, allowed, "runs/a")


@pytest.mark.slow
def test_a_run_stopped_anywhere_and_another_teacher_at_its_resume(tmp_path, caplog):
  caplog.set_level("INFO")
  origin = write_teacher(tmp_path / "teacher", classes=NUMBERS)
  config = student(origin, **{"augment": "mixup(alpha=0.5)", "optimizer.ema_decay": 0.9})
  quiet, stopped = tmp_path / "quiet", tmp_path / "stopped"
  result = train_lib.train(config, str(quiet))
  with pytest.raises(Preempted):
    train_lib.train(config, str(stopped), StopAt(5))
  other = student(write_teacher(tmp_path / "other", seed=1, classes=NUMBERS))
  other.update_from_flattened_dict({"augment": config.augment, "optimizer.ema_decay": 0.9})
  with pytest.raises(ConfigError, match="a run that learnt from other weights"):
    train_lib.train(other, str(stopped))
  shutil.move(origin, tmp_path / "moved")
  config.distill.teacher = str(tmp_path / "moved")
  train_lib.train(config, str(stopped))
  assert fingerprints(stopped, 10) == fingerprints(quiet, 10)
  assert not any("teacher" in name for name in fingerprints(quiet, 10))
  # An evaluation needs no teacher.
  config.distill.teacher = origin
  found = train_lib.evaluate_only(config, str(stopped))
  assert found["top1"] == result["top1"]
  assert "teacher   CIFAR ResNet-8" in (quiet / "overview.txt").read_text()
  lines = [json.loads(line) for line in (quiet / "metrics.jsonl").read_text().splitlines()]
  curves = [line for line in lines if "train/distill_loss" in line]
  assert len(curves) == 10
  for line in curves:
    assert line["train/loss"] == line["train/distill_loss"] > 0
    assert 0 <= line["train/agreement"] <= 1


@pytest.mark.slow
def test_the_layout_changes_nothing(tmp_path):
  origin = write_teacher(tmp_path / "teacher")
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_ENABLE_X64": "1"}
  command = [sys.executable, "-m", "tests.trainer.sharded", "float64", "distilled"]
  done = subprocess.run(
    command, env=environment | {"TEACHER": origin}, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  seen = json.loads(done.stdout.splitlines()[-1])["distilled"]
  one = seen.pop("1")
  assert len(seen) == 2 and one["distill_loss"][0] > 0
  for name, other in seen.items():
    for metric in ("loss", "distill_loss", "agreement", "grad_norm", "param_norm"):
      # The student computes in float64, its teacher in float32.
      np.testing.assert_allclose(other[metric], one[metric], rtol=1e-6, err_msg=f"{name} {metric}")


@pytest.mark.slow
def test_a_student_comes_near_its_teacher_on_digits(tmp_path):
  assert prepare.main(["--digits", "--out", str(tmp_path / "data"), "--shards=1"]) == 0

  def digits():
    config = smoke.get_config()
    config.data.path, config.data.workers = str(tmp_path / "data"), 0
    config.total_epochs, config.eval.every_epochs = 4.0, 0.0
    config.optimizer.warmup_epochs = 1.0
    return config

  origin = str(tmp_path / "teacher")
  taught = train_lib.train(digits(), origin)
  config = digits()
  config.seed, config.model.width = 1, config.model.width / 2
  config.distill.update({"teacher": origin, "weight": 1.0, "temperature": 2.0})
  config.augment = "mix(mixup=1.0, partner='roll', fold=True)"
  train_lib.train(config, str(tmp_path / "student"))
  lines = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
  curve = [line for line in map(json.loads, lines) if "train/agreement" in line]
  # After four epochs the teacher had 49 %. The student went from 0.39 to 0.14 and from 58 to 76 %.
  assert taught["top1"] > 0.4
  assert curve[-1]["train/distill_loss"] < 0.5 * curve[0]["train/distill_loss"]
  assert curve[-1]["train/agreement"] > curve[0]["train/agreement"] + 0.1
