"""The paper's ablations and figures on CIFAR-10, one network each.

    ./scripts/train.sh configs/ablations.py:figure=m,m=16 --config.data.dir=DIR
    ./scripts/train.sh configs/ablations.py:figure=p_norm --config.sam.p=inf --config.data.dir=DIR

    figure      paper             network                       what varies
    landscape   Figure 1, right   ResNet-56 without skips       method
    spectrum    Figure 3, left    WRN-40-10 without BatchNorm   method; looked at after 1, 50, 300
    m           Figure 3, middle  ResNet-20 without BatchNorm   m of 1, 4, 16, 64, 256; rho to 0.15
    p_norm      C.5, Figure 6     WRN-16-4                      sam.p=2, inf; rho 1e-6 to 1e3
    sync        its code's flag   WRN-28-10                     one perturbation for the batch

These want methods that are not there yet: appendix C.4 (the second-order term kept, WRN-40-2), the
random direction of C.5 and the inner steps of C.6. Left open by the paper, and what is chosen here:
the "small ResNet" of Figure 3 (ResNet-20, without BatchNorm, which has no statistics of one
example), the wide ResNet of C.5 (WRN-16-4), their settings (WRN-28-10's of Table 6, 200 epochs),
and rho of the landscape and the spectrum (0.05).

Arguments: figure, m (of figure=m), method (sam, sgd), rho, seed, smoke.
"""

from configs import common

MODELS = {'landscape': 'resnet56', 'spectrum': 'wrn40_10', 'm': 'resnet20', 'p_norm': 'wrn16_4',
          'sync': 'wrn28_10'}
SIZES = (1, 4, 16, 64, 256)


def get_config(arg=''):
    arg = common.parse_arg(arg, figure='m', m=16, method='sam', rho=0.05, seed=0)
    common.one_of('figure', arg.figure, tuple(MODELS))
    common.one_of('m', arg.m, SIZES)
    c = common.get_config()
    c.seed = arg.seed
    c.total_epochs = 200
    common.set_model(c, MODELS[arg.figure])
    c.data.name = 'cifar10'
    c.sam.method = arg.method
    c.sam.rho = arg.rho
    if arg.figure == 'landscape':
        c.model.residual = False
    elif arg.figure == 'spectrum':
        c.model.batch_norm = False
        c.total_epochs = 300
        c.checkpoint.keep_epochs = (1, 50, 300)
    elif arg.figure == 'm':
        c.model.batch_norm = False
        c.replica_batch_size = arg.m
    elif arg.figure == 'sync':
        c.sam.replicas_per_group = c.batch_size // c.replica_batch_size
    return common.finish(c, arg)
