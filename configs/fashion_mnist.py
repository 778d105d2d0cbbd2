"""Fashion-MNIST: the right half of the paper's Table 5.

    ./scripts/train.sh configs/fashion_mnist.py:model=wrn28_10 --config.data.dir=DIR

Settings: paper, Table 7 and appendix C.1. Test error (%), mean and 95 % confidence interval of 5
runs, SAM (baseline):

    wrn28_10             basic  3.98 +- 0.05 (4.57 +- 0.07)  "auto" 3.61 +- 0.06 (3.86 +- 0.14)
    shake_shake_26_2x96d basic  3.97 +- 0.09 (4.37 +- 0.06)  "auto" 3.59 +- 0.01 (3.76 +- 0.07)

What the table calls auto augmentation is cutout alone on this dataset (its appendix C.1):
augment=cutout. Left open: the number of epochs (200 here, the default of the paper's code).

Arguments: model (wrn28_10, shake_shake_26_2x96d), augment (a recipe), method (sam, sgd), rho
(default that of Table 7), doubled (twice the epochs, as for the paper's baseline), seed, smoke.
"""

from configs import common

# Table 7: learning rate, weight decay, rho.
TABLE_7 = {'wrn28_10': (0.1, 5e-4, 0.05), 'shake_shake_26_2x96d': (0.1, 5e-4, 0.02)}
DATASET, EPOCHS = 'fashion_mnist', 200


def get_config(arg=''):
    return common.table_7(arg, DATASET, TABLE_7, EPOCHS)
