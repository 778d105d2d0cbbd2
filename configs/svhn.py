"""SVHN: the left half of the paper's Table 5.

    ./scripts/train.sh configs/svhn.py:model=wrn28_10 --config.data.dir=DIR

Settings: paper, Table 7 and appendix C.1; 73,257 training images and 531,131 extra ones. Test error
(%), mean and 95 % confidence interval of 5 runs, SAM (baseline):

    wrn28_10             basic  1.42 +- 0.02 (1.58 +- 0.03)  AutoAugment 0.99 +- 0.01 (1.14 +- 0.04)
    shake_shake_26_2x96d basic  1.44 +- 0.02 (1.58 +- 0.05)  AutoAugment 1.07 +- 0.02 (1.03 +- 0.02)

The paper's AutoAugment on SVHN is the policy for SVHN and cutout, without flip and crop:
augment=autoaugment_only_cutout. Shake-Shake with it is the one cell of the paper where SAM is
worse. Left open: the number of epochs (200 here, the default of the paper's code) and the side of
the cutout (16, the code's; AutoAugment's own was 20). On several hosts the paper's code takes the
global batch for that of each host here, and its schedule then ends too late; this one does not.

Arguments: model (wrn28_10, shake_shake_26_2x96d), augment (a recipe), method (sam, sgd), rho
(default that of Table 7), doubled (twice the epochs, as for the paper's baseline), seed, smoke.
"""

from configs import common

# Table 7: learning rate, weight decay, rho.
TABLE_7 = {'wrn28_10': (0.01, 5e-4, 0.01), 'shake_shake_26_2x96d': (0.01, 5e-4, 0.01)}
DATASET, EPOCHS = 'svhn', 200


def get_config(arg=''):
    arg = common.parse_arg(arg, **common.TABLE_7)
    return common.finish(common.table_7(arg, DATASET, TABLE_7, EPOCHS), arg)
