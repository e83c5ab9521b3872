"""Every field of a run with its default. A run file calls `get_config()` here and only overrides.

Durations carry their unit in the name. Where a field exists as `*_epochs` and `*_steps`, at most one of the
two is non-zero; `trainer.config` turns both into steps.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the base config: ResNet-50 on ImageNet at 224 px; only `data.path` is left to be filled in."""
  config = ml_collections.ConfigDict()

  config.seed = 0  # initialisation, data order and augmentation are functions of it
  config.global_batch_size = 1024  # examples per step, over all devices of all hosts
  config.total_epochs = 90.0  # length of the run; give exactly one of the two
  config.total_steps = 0
  config.accumulation_steps = (
    1  # micro-batches that a step is computed in, for memory; see trainer/step.py
  )
  config.label_smoothing = 0.1  # in [0, 1)
  # Where compiled programs are kept, so that a start after a preemption compiles nothing: workdir (WORKDIR/compiled,
  # which outlives a host if WORKDIR does) | a folder, local or gs:// | "" for nowhere. The environment variable
  # JAX_COMPILATION_CACHE_DIR goes before it.
  config.compilation_cache = "workdir"

  config.mesh = (
    ml_collections.ConfigDict()
  )  # devices along each axis; their product is the number of devices
  config.mesh.data = -1  # examples are split over it; -1 is all that the other two leave
  config.mesh.fsdp = 1  # examples are split over it as well, and so may parameters be
  config.mesh.space = 1  # the height of images is split over it, inside one host

  config.sharding = ml_collections.ConfigDict()
  config.sharding.params = (
    "replicated"  # replicated | fsdp: each device of the axis fsdp keeps its part of them
  )
  # replicated: as params | data: over data and fsdp (arXiv:2004.13336); above 8 chips best with mesh.fsdp of 4 or 8
  config.sharding.opt_state = "replicated"

  config.model = ml_collections.ConfigDict()
  config.model.name = (
    "resnet"  # resnet: four stages, 18|34|50|101|152|200; cifar_resnet: three stages, 6n+2
  )
  config.model.depth = 50
  config.model.width = 1.0  # multiplies the number of channels of every stage
  config.model.num_classes = 1000
  config.model.dtype = (
    "bfloat16"  # bfloat16 | float32 | float64, of activations; all else is float32 or wider
  )
  config.model.zero_init_residual = (
    True  # last BN scale of each block starts at 0 (arXiv:1706.02677, 5.1)
  )
  config.model.bn_momentum = 0.9  # share of the old running average kept at each step
  config.model.bn_epsilon = 1e-5
  # Whose examples share BN statistics: global (the whole batch, or micro-batch) | device (each device its own: results
  # depend on the number of devices) | a number of examples, as in "64" (the same numbers on any number of devices).
  config.model.bn_group = "global"

  config.data = ml_collections.ConfigDict()
  # Folder of shards (input_pipeline.prepare or TFDS), local or gs:// s3:// http(s):// file://, or of class folders.
  # Or parquet: hf:NAME[:CONFIG][@REVISION] of the Hugging Face hub, or hf: and a folder, as in hf:gs://BUCKET/FOLDER.
  config.data.path = ""
  # array_record: a global shuffle of local shards | stream: of shards anywhere, in lanes | folder | hf | synthetic |
  # auto: hf for hf:..., stream for a URL, else by what the folder holds.
  config.data.kind = "auto"
  config.data.train_split = "train"
  config.data.eval_split = "val"
  config.data.image_size = 224  # pixels, height and width of a training image
  config.data.eval_image_size = (
    224  # the same in evaluation; a larger one than in training helps (arXiv:1906.06423)
  )
  config.data.eval_resize = 256  # pixels, shorter side before the centre crop of evaluation
  config.data.crop_area = (0.08, 1.0)  # random-resized crop: share of the image's area
  config.data.crop_aspect = (3 / 4, 4 / 3)  # random-resized crop: width over height, log-uniform
  config.data.flip = True  # mirror half of the training images
  config.data.operations = ""  # on the host after crop and flip, see input_pipeline/augment.py
  config.data.mean = (123.675, 116.28, 103.53)  # RGB in 0..255, subtracted on the device
  config.data.std = (58.395, 57.12, 57.375)
  # Decoding processes; 0 decodes in threads of the trainer. -1 chooses: on 4 cores and more all but two of them, at
  # most 32; on fewer none. What a chip needs of them: `python -m input_pipeline.bench`.
  config.data.workers = -1
  # Decoding threads of each process; 0 decodes when the batch is asked for. -1 chooses: 0 in processes, which ask at
  # once, and up to 2 in the trainer. Kind hf decodes in threads of the trainer alone: -1 is one a core, at most 16.
  config.data.threads = -1
  config.data.prefetch_batches = (
    4  # batches that threads decode ahead in each process; without threads it is two
  )
  # Streamed data, see input_pipeline/order.py. A batch mixes lanes x window blocks; all hosts together hold that many
  # blocks in memory, and somewhat more.
  config.data.stream_lanes = (
    64  # must divide the batch; a multiple of the number of hosts, or blocks are read twice
  )
  config.data.stream_block = 40  # neighbouring records read by one request, at least
  config.data.stream_window = 8  # blocks that a lane shuffles together
  config.data.stream_ahead_steps = 8  # steps whose blocks are asked for before they are needed
  config.data.stream_requests = 32  # blocks on their way at the same time, in each process
  config.data.stream_timeout_seconds = 30.0  # of one request, which is then sent anew
  config.data.stream_hedge_seconds = 5.0  # after which a slow request gets a second one beside it
  config.data.stream_give_up_seconds = 300.0  # of one read with all its retries; then the run ends
  # Parquet, see input_pipeline/sources/hf_stream.py.
  config.data.hf_streams = 8  # row groups that each host reads at once
  config.data.hf_window = (
    4096  # examples shuffled together; a host holds two windows in memory, 110 kB an image
  )
  config.data.max_bad_fraction = 0.001  # undecodable records tolerated, as a share of an epoch
  config.data.synthetic_examples = 1024  # size of each split of kind synthetic

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = "sgd"  # sgd | adamw
  config.optimizer.lr_per_256 = (
    0.1  # peak learning rate at batch 256; scaled linearly with the batch
  )
  config.optimizer.final_lr_fraction = 0.0  # the cosine ends at this share of the peak
  config.optimizer.warmup_epochs = 5.0  # linear from 0 to the peak; at most one of the two
  config.optimizer.warmup_steps = 0
  config.optimizer.momentum = 0.9  # sgd
  config.optimizer.nesterov = True  # sgd
  config.optimizer.b1 = 0.9  # adamw
  config.optimizer.b2 = 0.999  # adamw
  config.optimizer.eps = 1e-8  # adamw
  config.optimizer.weight_decay = 1e-4  # sgd: added to the gradient; adamw: decoupled
  config.optimizer.decay_bn_and_bias = False  # whether BN scales and all biases decay too
  config.optimizer.clip_norm = 0.0  # global gradient norm; 0 clips nothing
  config.optimizer.ema_decay = 0.0  # of averaged weights, which evaluation then uses; 0 keeps none

  config.eval = ml_collections.ConfigDict()
  config.eval.batch_size = 1024  # examples per step over all devices; the last batch is padded
  config.eval.every_epochs = 1.0  # at most one of the two; with neither only the end is evaluated
  config.eval.every_steps = 0

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every_epochs = (
    0.0  # at most one of the two; evaluated steps and the end are always saved
  )
  config.checkpoint.every_steps = 0
  config.checkpoint.every_minutes = 10.0  # besides, by the clock; 0 is never
  config.checkpoint.keep_last = 3  # newest checkpoints that stay
  config.checkpoint.keep_best = True  # the one with the highest top1 stays as well
  config.checkpoint.retry_seconds = 60.0  # pause before a failed save is tried again

  config.pod = ml_collections.ConfigDict()
  config.pod.start_seconds = 300.0  # for all hosts to come up
  config.pod.timeout_seconds = 45.0  # a host that is silent for longer is lost, and the others exit
  config.pod.stuck_seconds = (
    1800.0  # a host that stays at one point for longer exits; compiling is one point
  )

  config.log = ml_collections.ConfigDict()
  config.log.every_steps = 100  # progress line and event files
  config.log.profile_step = 0  # first step of a profile for TensorBoard; 0 takes none
  config.log.profile_steps = 5  # its length
  return config
