"""CIFAR-10 and CIFAR-100 with WideResNets: rows of the paper's Table 1.

    ./scripts/train.sh configs/cifar.py:model=wrn28_10,dataset=cifar100 --config.data.dir=DIR

WRN-28-10, 200 epochs, basic augmentation: test error 2.7 +- 0.1 (SAM, rho 0.05) against 3.5 +- 0.1
(SGD) on CIFAR-10, 16.5 +- 0.2 (SAM, rho 0.1) against 18.8 +- 0.2 (SGD) on CIFAR-100: mean and 95 %
confidence interval of 5 runs. Settings: paper, Table 6 and appendix C.1 (batch 256 on 8
accelerators, so replicas of 32; learning rate 0.1; weight decay 5e-4); Nesterov momentum, cosine
schedule and clipping at 5 are those of the paper's code. The paper gives SGD twice the epochs and
reports the better of the two: --config.total_epochs=400.

Arguments: model (wrn28_10, wrn16_4, wrn40_2, any wrn<depth>_<width>), dataset (cifar10, cifar100),
augment (none, basic), method (sam, sgd), seed.
"""

from configs import common

RHO = {'cifar10': 0.05, 'cifar100': 0.1}


def get_config(arg=''):
    arg = common.parse_arg(
        arg, model='wrn28_10', dataset='cifar10', augment='basic', method='sam', seed=0)
    if arg.dataset not in RHO:
        raise ValueError(
            f'config argument dataset is {arg.dataset!r}; it must be one of {", ".join(RHO)}.')
    c = common.get_config()
    c.seed = arg.seed
    c.model.name = arg.model
    c.data.name = arg.dataset
    c.data.augment = arg.augment
    c.sam.method = arg.method
    c.sam.rho = RHO[arg.dataset]
    c.lock()
    return c
