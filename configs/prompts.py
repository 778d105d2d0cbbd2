"""Prompt learning on CLIP: CoOp, CoOp with SAM, and GCSCoOp (2309.07866). Not of the SAM paper.

    ./scripts/train.sh configs/prompts.py --config.model.init_from=CLIP --config.data.dir=DIR
    ./scripts/train.sh configs/prompts.py:method=sgd --config.model.init_from=CLIP ...

CLIP is a folder of Hugging Face's transformers with model.safetensors, config.json, vocab.json and
merges.txt, such as that of openai/clip-vit-base-patch16. DIR has train/CLASS/IMAGE and
test/CLASS/IMAGE, folders named as the classes. The first half of the classes (in the order of their
names) is trained by 16 images each; the others are evaluated by their names alone. The result has
test/error_rate (of the base classes), new/error_rate, and new/harmonic_mean of the two accuracies.
docs/howto/prompts.md has more.

method=sgd is CoOp (2109.01134), method=sam CoOp with SAM, method=gradient_constrained GCSCoOp.

Settings: those of the authors' code (llcllc1997/GCSCoOp, its vit_b16_ctxv1.yaml of SharpCoOp and
base2new_train.sh): ViT-B/16, 16 shots, SGD at 0.002, cosine after one epoch of warm-up, 200 epochs,
batch 128, rho 0.1, bounds 0.5 and 0.8, random resized crop and flip, CLIP's normalisation, seeds 1
to 3; context=4,words=a photo of a. CoOp's own are a batch of 32 and context=16 of random vectors,
the default here. Momentum 0.9 and weight decay 5e-4 are not in those files; they are taken for the
defaults of the library below them, which was not read.

Published: of the numbers of GCSCoOp none was found in a source that can be read here. SAMPLe's
abstract has, over 11 datasets, CoOp 63.22 % on new classes and a harmonic mean of 71.66, with SAM
73.28 % and 76.07.

Not so here: the warm-up is linear, there constant at 1e-5; the decay is part of the loss that is
climbed; the towers are in float32, there in float16; evaluation crops the middle as ImageNet's
does, there the image is resized to 224 first; the classes are in the order of the folders' names,
there in that of each dataset. A batch must not exceed the shots of all base classes. Left open: no
run with weights of OpenAI was made, since none can be had here.

small: Fashion-MNIST and a CLIP of 77,000 parameters, which
`python -m sam_jax.benchmarks.prompts` trains first; what runs have given so far stands in
docs/howto/prompts.md.
Left open: rho and learning rate were not searched for this size.

Arguments: model (clip-b16, clip-b32, clip-l14), method (gradient_constrained, sam, sgd, any of
sam_jax.sharpness.METHODS), shots (0 for all images), context (number of vectors), words (what they
say at the start, as many tokens), rho, epochs, small, seed, smoke.
"""

from configs import common


def get_config(arg=''):
    arg = common.parse_arg(
        arg,
        model='',
        method='gradient_constrained',
        shots=16,
        context=16,
        words='',
        rho=0.1,
        epochs=0,
        small=False,
        seed=0,
    )
    c = common.get_config()
    c.seed = arg.seed
    common.set_model(c, arg.model or ('clip-tiny14' if arg.small else 'clip-b16'))
    c.model.context, c.model.words = arg.context, arg.words
    c.data.shots, c.data.fraction_seed, c.data.base_to_new = arg.shots, arg.seed, True
    c.optimizer.learning_rate = 0.002
    c.optimizer.warmup_epochs = 1.0
    c.optimizer.nesterov = False
    c.optimizer.clip_norm = 0.0
    (_small if arg.small else _full)(c)
    c.total_epochs = arg.epochs or c.total_epochs
    common.set_method(c, arg.method)
    c.sam.rho = arg.rho
    c.eval.every_epochs = 0
    return common.finish(c, arg)


def _full(c):
    c.total_epochs = 200
    c.batch_size = c.replica_batch_size = 128
    c.data.name = 'folder'
    c.data.augment = 'imagenet'
    c.data.normalization = 'clip'
    c.data.image_size = 224


def _small(c):
    c.total_epochs = 25
    c.batch_size = c.replica_batch_size = 16
    c.log_every_steps = 50
    c.data.name = 'fashion_mnist'
    c.data.augment = 'none'
    c.eval.batch_size = 1000
