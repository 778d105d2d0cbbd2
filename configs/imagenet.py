"""ImageNet from scratch: the paper's Table 2.

    ./scripts/train.sh configs/imagenet.py:model=resnet50,epochs=100 --config.data.dir=DIR

Settings: paper, section 3.1 and appendix C.1: batch 4096 on 32 TPU cores (replicas of 128),
learning rate 1, cosine, weight decay 1e-4, label smoothing 0.1, rho 0.05 for all. Nesterov
momentum, random windows and flip are the code's. Test error (%), top-1 / top-5, mean and 95 %
confidence interval of 5 runs:

                          SAM                          SGD
    resnet50    100       22.5 +- 0.1 / 6.28 +- 0.08   22.9 +- 0.1 / 6.62 +- 0.11
                200       21.4 +- 0.1 / 5.82 +- 0.03   22.3 +- 0.1 / 6.37 +- 0.04
                400       20.9 +- 0.1 / 5.51 +- 0.03   22.3 +- 0.1 / 6.40 +- 0.06
    resnet101   100       20.2 +- 0.1 / 5.12 +- 0.03   21.2 +- 0.1 / 5.66 +- 0.05
                200       19.4 +- 0.1 / 4.76 +- 0.03   20.9 +- 0.1 / 5.66 +- 0.04
                400       19.0 +- 0.01 / 4.65 +- 0.05  22.3 +- 0.1 / 6.41 +- 0.06
    resnet152   100       19.2 +- 0.01 / 4.69 +- 0.04  20.4 / 5.39 +- 0.06
                200       18.5 +- 0.1 / 4.37 +- 0.03   20.3 +- 0.2 / 5.39 +- 0.07
                400       18.4 +- 0.01 / 4.35 +- 0.04  20.9 / 5.84 +- 0.07

Doubtful: SGD's row of ResNet-101 at 400 epochs is that of ResNet-50 but for the last digit. Left
open: whether the gradient was clipped (at 5, the default of the code) and warmed up (no; there is
no warm-up in the code). What the code calls batch size is that of one host here.

Arguments: model, epochs, method (sam, sgd), rho, augment (a recipe with a random window), seed,
smoke.
"""

from configs import common


def get_config(arg=''):
    arg = common.parse_arg(
        arg, model='resnet50', epochs=100, method='sam', rho=0.05, augment='imagenet', seed=0
    )
    c = common.get_config()
    c.seed = arg.seed
    c.total_epochs = arg.epochs
    c.batch_size = 4096
    c.replica_batch_size = 128
    c.label_smoothing = 0.1
    common.set_model(c, arg.model)
    c.data.name = 'imagenet'
    c.data.image_size = 224
    c.data.augment = arg.augment
    c.optimizer.learning_rate = 1.0
    c.optimizer.weight_decay = 1e-4
    common.set_method(c, arg.method)
    c.sam.rho = arg.rho
    c.eval.batch_size = 4096
    c.eval.top5 = True
    return common.finish(c, arg)
