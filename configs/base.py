"""Every field of a run with its default, unit, range and words.

A run file calls `get_config()` with its model family and only overrides. Durations carry their
unit in the name. Where a field exists as `*_epochs` and `*_steps`, at most one of the two is not 0;
`trainer.config` turns both into steps.
"""

import re

import ml_collections

from configs import families
from configs.fields import (
  ASK,
  COUNT_OR_AUTO,
  POSITIVE,
  SHARE,
  YES,
  Check,
  Field,
  Fields,
  at_least,
  between,
  one_of,
  to_config,
)

_THREE = Check("three numbers, for R, G and B", lambda v: len(v) == 3)
_THREE_POSITIVE = Check(
  "three positive numbers, for R, G and B", lambda v: len(v) == 3 and min(v) > 0
)
_AREA = Check("(min, max) in (0, 1]", lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1)
_ASPECT = Check("(min, max), both positive", lambda v: len(v) == 2 and 0 < v[0] <= v[1])
_AXIS_OR_REST = Check("1 or more, or -1 for all that is left", lambda v: v == -1 or v >= 1)

# What `data.allow`, and `--allow` of input_pipeline.prepare, may name.
FAULTS = ("empty_class", "deeper", "missing_file", "behind_end")

RUN: Fields = {
  "seed": Field(
    0,
    "Initialisation, data order, augmentation and all randomness of a step are functions of it.",
    check=Check("in [0, 2**32)", lambda v: 0 <= v < 2**32),
  ),
  "global_batch_size": Field(
    1024, "Examples per step, over all devices of all hosts.", "examples", at_least(1), ASK
  ),
  "total_epochs": Field(
    90.0, "Length of the run; set exactly one of the two.", "epochs", at_least(0), ASK
  ),
  "total_steps": Field(0, "Length of the run.", "steps", at_least(0), ASK),
  "accumulation_steps": Field(
    1,
    "Micro-batches that a step is computed in, to save memory; see trainer/step.py.",
    "micro-batches",
    at_least(1),
    ASK,
  ),
  "label_smoothing": Field(
    0.1, "Share of each target spread over all classes (arXiv:1512.00567).", "", SHARE, ASK
  ),
  "loss": Field(
    "softmax_cross_entropy",
    "Loss of an example: a function of trainer/losses.py, or package.module:function, with options "
    "as in 'sigmoid_cross_entropy(threshold=0.2)'.",
    resume=ASK,
  ),
  "augment": Field(
    "",
    "Chain of functions of trainer/augment.py on the device, as in 'mixup(alpha=0.2)|...'.",
    resume=ASK,
  ),
  "augment_until_epochs": Field(
    0.0,
    "From then on config.augment is off; 0 is never.",
    "epochs",
    at_least(0),
    ASK,
  ),
  "compilation_cache": Field(
    "workdir",
    "Where compiled programs are kept, so that a restart compiles nothing: workdir "
    "(WORKDIR/compiled) | a folder, local or gs:// | '' for nowhere. The environment variable "
    "JAX_COMPILATION_CACHE_DIR takes precedence.",
    resume=YES,
  ),
  "init_from": Field(
    "",
    "Weights that step 0 of a new run takes: a file that trainer.weights reads, or a workdir (its "
    "averages where it has them), local, gs:// or https:// with a checksum. The head is made anew "
    "where the number of classes differs. A resume does not read it.",
    resume=YES,
  ),
  "init_exclude": Field(
    "",
    "Regular expression of leaves that init_from leaves alone, searched for in their path, as in "
    "'^head/|^stage4'; and of tensors of the file that have no place in the model.",
    check=Check("a regular expression", lambda v: _is_pattern(v)),
    resume=YES,
  ),
  "mesh.data": Field(
    -1,
    "Examples are split over it; -1 is all that the other two leave.",
    "devices",
    _AXIS_OR_REST,
    YES,
  ),
  "mesh.fsdp": Field(
    1, "Examples are split over it as well, and so may parameters be.", "devices", at_least(1), YES
  ),
  "mesh.space": Field(
    1, "The height of images is split over it, inside one host.", "devices", at_least(1), YES
  ),
  "sharding.params": Field(
    "replicated",
    "fsdp: each device of the axis fsdp keeps its part of the parameters.",
    check=one_of("replicated", "fsdp"),
    resume=YES,
  ),
  "sharding.opt_state": Field(
    "replicated",
    "replicated: as params | data: over data and fsdp (arXiv:2004.13336); above 8 chips best with "
    "mesh.fsdp of 4 or 8.",
    check=one_of("replicated", "data"),
    resume=YES,
  ),
  "model.name": Field("resnet", "Model family, of configs/families.py or package.module:Class."),
  "model.num_classes": Field(1000, "Classes of the head.", "classes", at_least(2)),
  "model.dtype": Field(
    "bfloat16",
    "Of activations; parameters and statistics are float32 or wider.",
    check=one_of("bfloat16", "float32", "float64"),
  ),
  "data.path": Field(
    "",
    "Folder of shards (input_pipeline.prepare or TFDS), local, gs://, s3:// or http(s)://; or of "
    "class folders; or parquet: hf:NAME[:CONFIG][@REVISION] of the Hugging Face hub, or hf: and a "
    "folder, as in hf:gs://BUCKET/FOLDER.",
    resume=YES,
  ),
  "data.kind": Field(
    "auto",
    "array_record: a global shuffle of local shards | stream: of shards anywhere, in lanes | "
    "folder | hf | synthetic | auto: hf for hf:..., stream for a URL, else by what the folder "
    "holds | package.module:Class of a source of one's own.",
    resume=YES,
  ),
  "data.train_split": Field(
    "train", "Split that is trained on, or a part of it: train[:99%], train[1000:5000]."
  ),
  "data.eval_split": Field(
    "val",
    "Split that is evaluated, or several: in 'train[99%:], val' the first decides which checkpoint "
    "is the best.",
    resume=YES,
  ),
  "data.image_column": Field(
    "",
    "Column of the images in parquet, or feature of TFDS; '' takes the only one, or `image`.",
    resume=ASK,
  ),
  "data.label_column": Field(
    "",
    "Column of the labels in parquet, or feature of TFDS; '' takes the only one, or `label`.",
    resume=ASK,
  ),
  "data.class_order": Field(
    "natural",
    "How the class folders of kind folder are numbered: natural, in alphabetical order, but by "
    "value where all names are numbers | text, always alphabetical, as before this field existed.",
    check=one_of("natural", "text"),
    resume=YES,
  ),
  "data.allow": Field(
    "",
    "Faults of the data that are not refused, joined by commas: empty_class, a class without "
    "images in a split | deeper, images of a class in several folders | missing_file, gaps in "
    "numbered parquet files.",
    check=Check(
      f"names of {', '.join(FAULTS)}, joined by commas",
      lambda v: not v or all(word.strip() in FAULTS for word in v.split(",")),
    ),
    resume=YES,
  ),
  "data.image_size": Field(
    224, "Height and width of a training image.", "pixels", at_least(1), ASK
  ),
  "data.image_sizes": Field(
    "",
    "By epoch, instead of image_size: '0:128, 11:160, 13:192' is 160 px from epoch 11 on. Each "
    "size is compiled for itself, ahead of its first step; configs/image_sizes.py writes ramps.",
    "pixels",
    resume=ASK,
  ),
  "data.eval_image_size": Field(
    224,
    "The same in evaluation; a larger one than in training helps (arXiv:1906.06423).",
    "pixels",
    at_least(1),
    YES,
  ),
  "data.eval_resize": Field(
    256,
    "Shorter side before the centre crop of evaluation; 0 leaves the image as it is.",
    "pixels",
    at_least(0),
    YES,
  ),
  "data.eval_interpolation": Field(
    "bilinear",
    "Of this resize, antialiased: bilinear | bicubic.",
    check=one_of("bilinear", "bicubic"),
    resume=YES,
  ),
  "data.crop": Field(
    "random_resized",
    "random_resized: by crop_area and crop_aspect (arXiv:1409.4842) | padded: of image_size at a "
    "random place of the image and a black margin, as for CIFAR (arXiv:1512.03385) | none: the "
    "whole image.",
    check=one_of("random_resized", "padded", "none"),
    resume=ASK,
  ),
  "data.crop_padding": Field(
    4, "Width of the margin on each side, of crop padded.", "pixels", at_least(0), ASK
  ),
  "data.interpolation": Field(
    "bilinear",
    "Of the resize in training: bilinear, not antialiased and fast | bicubic, antialiased | "
    "random: one of the two for each image, as in timm.",
    check=one_of("bilinear", "bicubic", "random"),
    resume=ASK,
  ),
  "data.crop_area": Field(
    (0.08, 1.0), "Random-resized crop: share of the area of the image.", "", _AREA, ASK
  ),
  "data.crop_aspect": Field(
    (3 / 4, 4 / 3), "Random-resized crop: width over height, log-uniform.", "", _ASPECT, ASK
  ),
  "data.repeats": Field(
    1,
    "Augmented copies of an image in a row (arXiv:1901.09335). An epoch keeps its number of "
    "examples, so that it has that much fewer different ones.",
    "copies",
    at_least(1),
    ASK,
  ),
  "data.flip": Field(True, "Mirror half of the training images.", resume=ASK),
  "data.operations": Field(
    "",
    "Chain of operations of input_pipeline/augment on the host, after crop and flip, as in "
    "'solarize(p=0.2)|...'.",
    resume=ASK,
  ),
  "data.mean": Field(
    (123.675, 116.28, 103.53), "RGB, subtracted on the device.", "levels of 255", _THREE
  ),
  "data.std": Field(
    (58.395, 57.12, 57.375), "RGB, divided by on the device.", "levels of 255", _THREE_POSITIVE
  ),
  "data.workers": Field(
    -1,
    "Decoding processes; 0 decodes in threads of the trainer. -1: on 4 cores and more all but two "
    "of them, at most 32; on fewer none. `python -m input_pipeline.bench` measures.",
    "processes",
    COUNT_OR_AUTO,
    YES,
  ),
  "data.threads": Field(
    -1,
    "Decoding threads of each process; 0 decodes when a batch is asked for. -1: 0 in processes, up "
    "to 2 in the trainer, and for kind hf one a core, at most 16.",
    "threads",
    COUNT_OR_AUTO,
    YES,
  ),
  "data.prefetch_batches": Field(
    4,
    "Batches that threads decode ahead in each process; without threads it is two.",
    "batches",
    at_least(1),
    YES,
  ),
  "data.stream_lanes": Field(
    64,
    "Lanes of a streamed order, see input_pipeline/order.py; must divide the batch, and be a "
    "multiple of the number of hosts, or blocks are read twice.",
    "lanes",
    at_least(1),
  ),
  "data.stream_block": Field(
    40, "Neighbouring records read by one request, at least.", "records", at_least(1)
  ),
  "data.stream_window": Field(
    8,
    "Blocks that a lane shuffles together: a batch mixes lanes x window blocks, and all hosts "
    "together hold as many in memory and somewhat more.",
    "blocks",
    at_least(1),
  ),
  "data.stream_ahead_steps": Field(
    8, "Steps whose blocks are asked for before they are needed.", "steps", at_least(1), YES
  ),
  "data.stream_requests": Field(
    32, "Blocks on their way at the same time, in each process.", "requests", at_least(1), YES
  ),
  "data.stream_timeout_seconds": Field(
    30.0, "Of one request, which is then sent anew.", "seconds", POSITIVE, YES
  ),
  "data.stream_hedge_seconds": Field(
    5.0, "After which a slow request gets a second one beside it.", "seconds", POSITIVE, YES
  ),
  "data.stream_give_up_seconds": Field(
    300.0, "Of one read with all its retries; then the run ends.", "seconds", POSITIVE, YES
  ),
  "data.hf_streams": Field(
    8,
    "Row groups that each host reads at once; see input_pipeline/sources/hf_stream.py.",
    "row groups",
    at_least(1),
  ),
  "data.hf_window": Field(
    4096,
    "Examples shuffled together; a host holds two windows in memory, 110 kB an image.",
    "examples",
    at_least(1),
  ),
  "data.max_bad_fraction": Field(
    0.001, "Undecodable records tolerated, as a share of an epoch.", "", SHARE, YES
  ),
  "data.synthetic_examples": Field(
    1024, "Size of each split of kind synthetic.", "examples", at_least(1)
  ),
  "optimizer.name": Field(
    "sgd", "An optimizer of trainer/optimizer.py, or package.module:function."
  ),
  "optimizer.schedule": Field(
    "cosine",
    "The learning rate over the run: a schedule of trainer/schedules.py with its options, as in "
    "'step(at=(30, 60, 80), factor=0.1)', or package.module:function.",
    resume=ASK,
  ),
  "optimizer.lr_per_256": Field(
    0.1,
    "Peak learning rate at batch 256; scaled linearly with the batch (arXiv:1706.02677). Exactly "
    "one of lr_per_256 and lr is positive.",
    "",
    at_least(0),
    ASK,
  ),
  "optimizer.lr": Field(0.0, "Peak learning rate at any batch.", "", at_least(0), ASK),
  "optimizer.final_lr_fraction": Field(
    0.0, "The schedule ends at this share of the peak.", "", between(0, 1), ASK
  ),
  "optimizer.warmup_epochs": Field(
    5.0,
    "Linear from warmup_start to the peak; at most one of the two.",
    "epochs",
    at_least(0),
    ASK,
  ),
  "optimizer.warmup_steps": Field(
    0, "Linear from warmup_start to the peak.", "steps", at_least(0), ASK
  ),
  "optimizer.warmup_start": Field(
    0.0,
    "Rate of the first step as a share of the peak; at 0 that step changes no weight.",
    "",
    between(0, 1),
    ASK,
  ),
  "optimizer.momentum": Field(0.9, "Of sgd, lars and rmsprop.", "", SHARE, ASK),
  "optimizer.nesterov": Field(True, "Of sgd.", resume=ASK),
  "optimizer.b1": Field(0.9, "Of adamw and lamb: decay of the first moment.", "", SHARE, ASK),
  "optimizer.b2": Field(0.999, "Of adamw and lamb: decay of the second moment.", "", SHARE, ASK),
  "optimizer.eps": Field(
    1e-8, "Of adamw: added to the root of the second moment.", "", POSITIVE, ASK
  ),
  "optimizer.mu_dtype": Field(
    "params",
    "Of adamw and lamb: of the first moment; params: that of the parameters.",
    check=one_of("params", "bfloat16"),
  ),
  "optimizer.lamb_eps": Field(
    1e-6, "Of lamb: added to the root of the second moment, as in timm.", "", POSITIVE, ASK
  ),
  "optimizer.lamb_clip_norm": Field(
    1.0,
    "Of lamb: norm that the gradient is clipped to inside of it, as in timm; 0 clips nothing.",
    "",
    at_least(0),
    ASK,
  ),
  "optimizer.eta": Field(
    0.001, "Of lars: trust coefficient, as in all entries of MLPerf.", "", POSITIVE, ASK
  ),
  "optimizer.rms_decay": Field(
    0.9, "Of rmsprop: decay of the squares (arXiv:1905.11946).", "", SHARE, ASK
  ),
  "optimizer.rms_eps": Field(
    1e-3, "Of rmsprop: inside the root, as in TensorFlow's EfficientNet.", "", POSITIVE, ASK
  ),
  "optimizer.weight_decay": Field(
    1e-4, "Share of the parameters; optimizer.decay says of what.", "", at_least(0), ASK
  ),
  "optimizer.decay": Field(
    "own",
    "own: sgd and rmsprop: coupled; adamw: decoupled; lamb and lars: part of the trust ratio | "
    "coupled: added to the gradient | decoupled: taken off the parameters, times the rate "
    "(arXiv:1711.05101) | scheduled: likewise, times the rate over its peak, as Composer and "
    "big_vision do.",
    check=one_of("own", "coupled", "decoupled", "scheduled"),
  ),
  "optimizer.decay_bn_and_bias": Field(
    False,
    "Whether vectors decay too: BN scales and all biases. With optimizer.no_decay, all parameters "
    "but those.",
  ),
  "optimizer.no_decay": Field(
    "",
    "Regular expression of further parameters that do not decay, searched for in their path, as in "
    "'stem_conv|head/bias'.",
    check=Check("a regular expression", lambda v: _is_pattern(v)),
  ),
  "optimizer.freeze": Field(
    "",
    "Regular expression of parameters that are not trained, searched for in their path, as in "
    "'^stem|^stage[12]'. A batch norm whose parameters all match computes with its running "
    "averages, which stay as they are.",
    check=Check("a regular expression", lambda v: _is_pattern(v)),
  ),
  "optimizer.lr_scales": Field(
    "",
    "Factors of the learning rate by parameter, PATTERN:FACTOR joined by commas, as in "
    "'^head/:10, ^stem:0.1': the first regular expression found in the path counts, else 1.",
    resume=ASK,
  ),
  "optimizer.clip_norm": Field(
    0.0, "Largest norm of the gradient of all parameters; 0 clips nothing.", "", at_least(0), ASK
  ),
  "optimizer.agc": Field(
    0.0,
    "Largest norm of the gradient of a unit over that of its weights (arXiv:2102.06171; there "
    "0.01); 0 clips nothing.",
    "",
    at_least(0),
    ASK,
  ),
  "optimizer.no_agc": Field(
    "^head/",
    "Regular expression of parameters that optimizer.agc leaves alone; '' for none.",
    check=Check("a regular expression", lambda v: _is_pattern(v)),
    resume=ASK,
  ),
  "optimizer.ema_decay": Field(
    0.0, "Of averaged weights, which evaluation then uses; 0 keeps none.", "", SHARE
  ),
  "optimizer.ema_rule": Field(
    "tf",
    "Decay of each update: tf: min(ema_decay, (1 + n) / (10 + n)) | constant | timm(gamma=1, "
    "power=0.667): see trainer/averages.py | package.module:function.",
    resume=ASK,
  ),
  "optimizer.ema_every_steps": Field(
    1, "Steps between updates of the averages.", "steps", at_least(1), ASK
  ),
  "optimizer.ema_start_epochs": Field(
    0.0, "Until then the averages are copies of the weights.", "epochs", at_least(0), ASK
  ),
  "optimizer.ema_batch_stats": Field(
    True, "Whether BN statistics are averaged too, or those of the last step taken.", resume=ASK
  ),
  "eval.batch_size": Field(
    1024,
    "Examples per step over all devices; the last batch is padded.",
    "examples",
    at_least(1),
    YES,
  ),
  "eval.every_epochs": Field(
    1.0,
    "At most one of the two; with neither only the end is evaluated.",
    "epochs",
    at_least(0),
    YES,
  ),
  "eval.every_steps": Field(0, "Steps between evaluations.", "steps", at_least(0), YES),
  "eval.flip": Field(
    False,
    "Evaluate the mean of the logits of an image and of its mirror (as FFCV does); takes twice the "
    "time of the model.",
    resume=YES,
  ),
  "eval.raw": Field(
    False,
    "Where weights are averaged (optimizer.ema_decay): evaluate the last ones too, as raw_top1, "
    "raw_top5 and raw_loss; the averaged ones decide which checkpoint is the best.",
    resume=YES,
  ),
  "eval.precise_bn_examples": Field(
    0,
    "Before an evaluation BN statistics are computed anew over so many training images, a fixed "
    "choice of them, and used for that evaluation only; a multiple of eval.batch_size; 0 is off. "
    "See trainer/evaluate.py.",
    "examples",
    at_least(0),
    YES,
  ),
  "checkpoint.every_epochs": Field(
    0.0,
    "At most one of the two; evaluated steps and the end are always saved.",
    "epochs",
    at_least(0),
    YES,
  ),
  "checkpoint.every_steps": Field(0, "Steps between checkpoints.", "steps", at_least(0), YES),
  "checkpoint.every_minutes": Field(
    10.0, "Time between checkpoints by the clock, besides; 0 is never.", "minutes", at_least(0), YES
  ),
  "checkpoint.keep_last": Field(
    3, "Newest checkpoints that stay.", "checkpoints", at_least(1), YES
  ),
  "checkpoint.keep_best": Field(
    True, "Whether the one with the highest top1 stays as well.", resume=YES
  ),
  "checkpoint.retry_seconds": Field(
    60.0, "Pause before a failed save is tried again.", "seconds", at_least(0), YES
  ),
  "resume.allow": Field(
    "",
    "Fields and sections that may differ from those of the checkpoint, joined by commas, as in "
    "'total_epochs,optimizer.lr_per_256' or 'optimizer'.",
    resume=YES,
  ),
  "pod.start_seconds": Field(300.0, "For all hosts to come up.", "seconds", at_least(1), YES),
  "pod.timeout_seconds": Field(
    45.0,
    "A host that is silent for longer is lost, and the others exit.",
    "seconds",
    at_least(1),
    YES,
  ),
  "pod.lease_seconds": Field(
    60.0,
    "A workdir whose owner on another machine gives no sign for longer may be taken over.",
    "seconds",
    at_least(1),
    YES,
  ),
  "pod.stuck_seconds": Field(
    1800.0,
    "A host that stays at one point for longer exits; compiling is one point.",
    "seconds",
    at_least(1),
    YES,
  ),
  "log.every_steps": Field(
    100, "Steps between progress lines and points of the curves.", "steps", at_least(1), YES
  ),
  "log.profile_step": Field(
    0, "First step of a profile for TensorBoard; 0 takes none.", "steps", at_least(0), YES
  ),
  "log.profile_steps": Field(5, "Length of the profile.", "steps", at_least(1), YES),
}

# Durations that are given in epochs or in steps: X_epochs, X_steps.
DURATIONS = ("total", "optimizer.warmup", "eval.every", "checkpoint.every")


def get_config(family: str = "resnet") -> ml_collections.ConfigDict:
  """Return the defaults of a run: at first ResNet-50 on ImageNet at 224 px.

  Only `data.path` is left to be filled in.

  Args:
    family: model family, whose fields `config.model` then has beside those of all families.
  """
  config = to_config(all_fields(family))
  config.model.name = family
  return config


def all_fields(family: str) -> dict[str, Field]:
  """Return the fields of a run with a model of this family, by name as in "model.depth".

  Raises:
    ValueError: if there is no such family.
  """
  own = families.find(family).FIELDS
  merged: dict[str, Field] = {}
  for name, field in RUN.items():
    merged[name] = field
    if name == "model.dtype":  # the last of the section
      merged |= {f"model.{key}": own_field for key, own_field in own.items()}
  return merged


def _is_pattern(text: str) -> bool:
  try:
    re.compile(text)
  except re.error:
    return False
  return True
