"""scikit-learn's handwritten digits: 1,797 real images that come with the package.

    ./scripts/train.sh configs/digits.py
    ./scripts/train.sh configs/digits.py:noise=0.4,method=sgd

Not an experiment of the paper: the embedded default, and the smallest place where its claims can be
seen. A WideResNet-10-1 on 8x8x1 images, 60 epochs; under label noise SAM's rho is 0.5.

Arguments: model (any name of the zoo), method (sam, sgd), noise (fraction of training labels drawn
anew), rho, seed, smoke.
"""

from configs import common


def get_config(arg=''):
    arg = common.parse_arg(arg, model='wrn10_1', method='sam', noise=0.0, rho=0.5, seed=0)
    c = common.get_config()
    c.seed = arg.seed
    c.total_epochs = 60
    c.batch_size = 64
    c.replica_batch_size = 64
    c.log_every_steps = 20  # an epoch has 20 steps
    common.set_model(c, arg.model)
    c.data.name = 'digits'
    c.data.augment = 'none'  # a mirrored digit is another sign
    c.data.label_noise = arg.noise
    c.data.label_noise_seed = arg.seed
    common.set_method(c, arg.method)
    c.sam.rho = arg.rho
    c.eval.every_epochs = 10
    return common.finish(c, arg)
