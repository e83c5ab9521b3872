"""Which steps have one estimate, so that those of --known are not compiled again."""

import types

import pytest

from launch import preflight_known

A_STEP = """
  %cst = stablehlo.constant dense<1.014770e+05> : tensor<f32>
  %cst_0 = stablehlo.constant dense<[0.000000e+00, 2.502000e+03, -3.1E-2]> : tensor<3xf32>
  %c = stablehlo.constant dense<12> : tensor<i32>
  %0 = stablehlo.add %arg0, %cst : tensor<f32>
"""


@pytest.mark.parametrize(
  "old, new, same",
  [
    ("1.014770e+05", "3.615880e+05", True),  # another length
    ("-3.1E-2", "0.899999976", True),
    ("1.014770e+05", "1.000000e+00", False),  # the compiler may drop what it scales
    ("0.000000e+00", "5.000000e-01", False),
    ("<12>", "<24>", False),  # perhaps rounds of a loop
    ("%arg0", "%arg1", False),
    ("tensor<f32>", "tensor<bf16>", False),
  ],
)
def test_steps_that_differ_in_values_alone_are_one(old, new, same):
  other = A_STEP.replace(old, new)
  assert other != A_STEP
  before, after = map(preflight_known.without_values, (A_STEP, other))
  assert (before == after) == same


@pytest.mark.parametrize("change", ["program", "place", "about", "options", "libtpu"])
def test_what_else_decides_an_estimate_makes_it_another(change, tmp_path, monkeypatch):
  program = types.SimpleNamespace(as_text=lambda: A_STEP)
  monkeypatch.setattr(preflight_known.importlib.metadata, "version", lambda name: "0.0.42.1")
  monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
  kept = preflight_known.path(str(tmp_path), program, "v5e:2x2", "train", 64)
  preflight_known.keep(kept, {"cycles": 5})
  again = preflight_known.path(str(tmp_path), program, "v5e:2x2", "train", 64)
  assert preflight_known.find(again) == {"cycles": 5}
  place, about = "v5e:2x2", ("train", 64)
  if change == "program":
    program.as_text = lambda: A_STEP.replace("<12>", "<24>")
  elif change == "place":
    place = "v5e:4x4"
  elif change == "about":
    about = ("train", 128)
  elif change == "options":
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=8192")
  else:
    monkeypatch.setattr(preflight_known.importlib.metadata, "version", lambda name: "0.0.52")
  other = preflight_known.path(str(tmp_path), program, place, *about)
  assert preflight_known.find(other) is None
