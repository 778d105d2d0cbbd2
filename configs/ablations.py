"""The paper's ablations and figures on CIFAR-10, one network each.

    ./scripts/train.sh configs/ablations.py:figure=m,m=16 --config.data.dir=DIR
    ./scripts/train.sh configs/ablations.py:figure=p_norm --config.sam.p=inf --config.data.dir=DIR

    figure      paper             network                       what varies
    landscape   Figure 1, right   ResNet-56 without skips       method
    spectrum    Figure 3, left    WRN-40-10 without BatchNorm   method; looked at after 1, 50, 300
    m           Figure 3, middle  ResNet-20 without BatchNorm   m of 1, 4, 16, 64, 256; rho to 0.15
    p_norm      C.5, Figure 6     WRN-16-4                      sam.p=2, inf; rho 1e-6 to 1e3
    random      C.5, Figure 6     WRN-16-4                      a random direction; rho 1e-6 to 1e3
    sync        its code's flag   WRN-28-10                     one perturbation for the batch
    order       C.4, Figures 4, 5 WRN-40-2                      method: second_order_sam, sam
    steps       C.6, Table 11     WRN-28-10                     ascent steps of 1, 2, 3, 5; dataset

Table 11, test error (%), mean and STANDARD DEVIATION of 20 runs, with 1, 2, 3 and 5 steps: CIFAR-10
2.77 +- 0.03, 2.76 +- 0.03, 2.73 +- 0.04, 2.77 +- 0.03; CIFAR-100 16.72 +- 0.08, 16.59 +- 0.08,
16.62 +- 0.09, 16.60 +- 0.06. C.4 finds that without the second-order term the test error is lower;
C.5 that adversarial directions beat random ones, and p = 2 is best. Its formulas for p = 2 and for
the random direction divide by the square of the norm, which its text contradicts; not so here.

Left open by the paper, and what is chosen here: the "small ResNet" of Figure 3 (ResNet-20, without
BatchNorm, which has no statistics of one example), the wide ResNet of C.5 (WRN-16-4) and of C.6
(WRN-28-10, whose errors in Table 1 are those of one step), the settings of all of them (WRN-28-10's
of Table 6, 200 epochs), rho (0.05; of C.6 that of Table 6), and the length of the steps of C.6
(rho, projected: --config.sam.step_size). What Figures 4 and 7 draw over the steps of training is
logged; the cosines of Figure 5 are logged of second_order_sam, and of both methods measured of
checkpoints: `sam-jax-analyze --what=order`. `sam-jax-figure` draws them all.

Arguments: figure, m (of figure=m), steps and dataset (of figure=steps), method (any of
sam_jax.sharpness.METHODS; default that of the figure), rho, seed, smoke.
"""

from configs import common

MODELS = {
    'landscape': 'resnet56',
    'spectrum': 'wrn40_10',
    'm': 'resnet20',
    'p_norm': 'wrn16_4',
    'random': 'wrn16_4',
    'sync': 'wrn28_10',
    'order': 'wrn40_2',
    'steps': 'wrn28_10',
}
METHODS = {'random': 'random_sam', 'order': 'second_order_sam', 'steps': 'multistep_sam'}
SIZES = (1, 4, 16, 64, 256)


def get_config(arg=''):
    given = common.given(arg)
    arg = common.parse_arg(
        arg, figure='m', m=16, steps=2, dataset='cifar10', method='', rho=-1.0, seed=0
    )
    common.one_of('figure', arg.figure, tuple(MODELS))
    common.one_of('m', arg.m, SIZES)
    common.one_of('dataset', arg.dataset, ('cifar10', 'cifar100'))
    c = common.get_config()
    c.seed = arg.seed
    c.total_epochs = 200
    common.set_model(c, MODELS[arg.figure])
    c.data.name = arg.dataset
    common.set_method(c, arg.method or METHODS.get(arg.figure, 'sam'))
    c.sam.rho = common.rho(arg, 0.1 if arg.dataset == 'cifar100' else 0.05)
    steps = arg.figure == 'steps' and 'steps' in c.sam
    common.only_with('m', given, arg.figure == 'm', 'figure=m')
    common.only_with('steps', given, steps, 'figure=steps and a method that has steps')
    if arg.figure == 'landscape':
        c.model.residual = False
    elif arg.figure == 'spectrum':
        c.model.batch_norm = False
        c.total_epochs = 300
        c.checkpoint.keep_epochs = (1, 50, 300)
    elif arg.figure == 'm':
        c.model.batch_norm = False
        c.replica_batch_size = arg.m
    elif steps:
        c.sam.steps = arg.steps
    elif arg.figure == 'sync':
        c.sam.replicas_per_group = c.batch_size // c.replica_batch_size
    return common.finish(c, arg)
