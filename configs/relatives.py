"""SAM's relatives: their own tables, with the settings that their authors have published.

    ./scripts/train.sh configs/relatives.py:paper=gsam,model=vit-b32 --config.data.dir=DIR
    ./scripts/train.sh configs/relatives.py:paper=sassha,dataset=cifar100,method=sgd ...

PAPERS below has a row for each model and dataset of a paper whose settings are public, and the
methods that its settings are known for; a report shows the authors' number beside a run of a row.
Most papers could be read in their abstract alone, so settings are those of the authors' code, and
a number stands here only where a public source gives it. Test error (%), of one seed or with no
interval told unless said otherwise:

    gsam     2203.08065, Tables 1 and 4, both pictures in the authors' PyTorch repository; batch,
             pooling and clipping of big_vision's config. GSAM (optimizer alone; SAM, whose rho is
             not stated): resnet50 22.8 (24.0; 23.1), resnet101 21.1 (22.2; 21.4), resnet152 20.0
             (21.5; 20.7), vit-s32 26.2 (31.6; 29.5), vit-s16 20.5 (25.6; 21.9), vit-b32 23.2 (28.6;
             26.4), vit-b16 19.0 (25.4; 20.1). Of the ResNets batch (4096 here), clipping (none) and
             label smoothing (none) are not stated. Doubtful: Table 4 gives SGD the weight decay
             0.3 too, which cannot be a penalty's factor; here it is 1e-4. The loss
             of ViTs is a sigmoid's for each class with a bias of -10 at the start, as in
             big_vision, which trains on 99 % of the images.
    asam     2102.11600, example_cifar.py and README of the authors. An author tells of 2.37 on
             CIFAR-10 with wrn16_8 and rho 0.5 (davda54/sam, issue 37), but not the augmentation.
             The paper's own tables: not public in a source read here; leaderboards quote 1.32 and
             10.1 for PyramidNet-272, whose settings are not stated.
    looksam  2203.02714: the authors' repository is empty, and their settings (ViTs of ImageNet) are
             not public. What stands here is the implementation of MSAM's authors: k = 5 and
             alpha = 0.1, since 0.7 did not do on CIFAR; their rho is not stated (0.3, the default
             of their class). Their Table 1: wrn28_10 16.69, wrn16_4 21.00.
    esam     2110.03141, run.sh of the authors: replicas of 64, two or four of them. Of its table
             only SAM on CIFAR-100 with wrn28_10 is quoted in public: 16.58 +- 0.04 (the authors'
             issue 7, where a user gets 15.93); SAM's rho is not stated (ESAM's here). Settings on
             ImageNet are not public (SAF's authors give 22.9 for ResNet-50). Left out is their
             PyramidNet-110 without bottlenecks, which the zoo does not have.
    saf      2205.14083, run.sh, SAF_train.py and README of the authors: SAF and MESA (method=mesa)
             on ImageNet, 4 GPUs of 256. SAF 22.2, MESA 22.5 (SGD 24.0; SAM 23.1, ESAM 22.9), from
             notes on the paper. timm's SGD has Nesterov momentum and no decay of biases and norms.
             Not so here: colour jitter of 0.4, random interpolation, ten epochs at 1e-6 after the
             schedule. Settings on CIFAR are not in their repository.
    cr_sam   2312.13555, defaults of crsam_train.py. Numbers and settings on ImageNet: not public.
             Its third pass moves the BatchNorm statistics as well; here the first alone does.
    universal 2406.03682, README of the authors, CIFAR-10: frob_sam, det_sam, trace_sam, asam, sam,
             sparse_sam, sgd. noise=0.2 and fraction=0.1 are its other experiments, but for those,
             CIFAR-100 and SVHN the README refers to the paper for other settings, which are not
             public. Nor are numbers. Theirs normalise by statistics of every pass; here by the
             batch as well, and only the first pass is remembered.
    fsam     2403.12350, run.sh of the authors, and the logs that they publish, one seed: 18.81 with
             lam 0.6, 18.68 with --config.sam.lam=0.95, SAM 19.22. The logs' last line comes after
             the BatchNorm statistics were measured anew; here they are the running ones. run.sh
             also names VGG16-BN and WRN-28-10; whether with the same settings is not stated.
    vasso    2309.15639, train.sh (CIFAR-100) and README (CIFAR-10, where rho is the default of the
             code) of the authors. Numbers are in a chart without digits.
    sam_on   2306.04226, README of the authors: ASAM's ascent of normalisation layers alone, rho 10,
             that is method asam with adapt=norm_only. Its numbers, and rho of plain SAM-ON: not
             public. (MSAM's authors have 15.43 for SAM on BatchNorm alone, rho not stated.)
    msam     2401.12033, Tables 1 and 2, and the configs and README of the authors; method
             momentum_sam. Momentum-SAM (SGD; SAM): wrn28_10 16.79 (18.49; 15.84), wrn16_4 20.89
             (23.10; 20.75), cifar_resnet50 17.35 (18.54; 16.64), on ImageNet resnet50 23.5 (23.7;
             23.4), vit-s32 30.9 (33.0; 30.9). The table's rho was tuned for each method and is not
             stated; here it is the README's, 3 and 0.2. WRN-28-10 has no command: WRN-16-4's. On
             ImageNet the number of GPUs is not stated (replicas of 128). Of the ViT rho is 0 for
             eight epochs there; here it rises through them.
    wsam     2305.15817, train_wsam_entry.sh and main.py of the authors. Numbers: not public.
    sampa    2410.10683, README and train.py of the authors. A tenth of the training set, at random,
             is held out to choose the epoch; here the last tenth, and the last epoch counts. Its
             numbers: not public in a source read here.
    sassha   2502.18153: SAM and SGD, the baselines of Sassha, which is not a method of this
             project; the authors' scripts, and numbers of a public note on the paper, of three
             seeds. SAM (SGD): resnet20 7.15 (7.97), resnet32 on CIFAR-100 28.01 (30.68), wrn28_10
             16.86 (19.94), on ImageNet resnet50 23.64 (24.42) and vit-s32, by AdamW, 31.69 (33.54).
             Their ResNets for CIFAR project shortcuts by a 1x1 convolution; here they are padded
             with zero channels. The number of GPUs on ImageNet is not stated (replicas of 64).

What differs here in all rows: the penalty of the weights is a part of the loss, and so of what SAM
climbs (PyTorch adds it to the gradient of the descent; AdamW's is as there); the learning rate
changes with each step, in most of their codes with each epoch; shift crops are padded by
reflection, theirs with zeros; the last epoch counts, while most of their codes print the best.
No row has been run here.

Arguments: paper, model and dataset (of a row; default the paper's first), method (default the
paper's own), rho (default that of the row), noise and fraction (of labels that are another class,
and of the training set), seed, smoke.
"""

from configs import common

# Plain _SGD with momentum, as PyTorch users have it.
_SGD = {'optimizer.nesterov': False, 'optimizer.clip_norm': 0.0}
_ADAMW = {
    'optimizer.name': 'adamw',
    'optimizer.decay': 0.999,
    'optimizer.epsilon': 1e-8,
    'optimizer.nesterov': False,
    'optimizer.clip_norm': 1.0,
    'optimizer.schedule_after_warmup': True,
    'model.class_token': False,
}
_CUTOUT = {'data.augment': 'cutout', 'data.cutout_per_image': True, 'data.cutout_probability': 0.5}


def _cifar(batch=128, replica=128, epochs=200, **more):
    return (
        {'batch_size': batch, 'replica_batch_size': replica, 'total_epochs': epochs} | _SGD | more
    )


def _imagenet(batch, replica, epochs, **more):
    return _cifar(batch, replica, epochs, **more) | {
        'data.augment': 'imagenet',
        'data.image_size': 224,
        'eval.batch_size': 1024,
    }


def _rates(learning_rate, weight_decay):
    return {'optimizer.learning_rate': learning_rate, 'optimizer.weight_decay': weight_decay}


def _steps(factor, *epochs):
    return {
        'optimizer.schedule': 'milestones',
        'optimizer.milestones': epochs,
        'optimizer.milestone_factor': factor,
    }


def _rho(value, **options):
    return {'sam.rho': value} | {f'sam.{name}': option for name, option in options.items()}


def _gsam(decay, warmup_steps, rate, **more):
    return {
        **_rates(rate, decay),
        'optimizer.schedule': 'linear',
        'optimizer.end': 0.01,
        'optimizer.warmup_steps': warmup_steps,
        'optimizer.schedule_after_warmup': True,
        'optimizer.decay_norm_and_bias': False,
    } | more


def _with_learning_rate(high, low, alpha):
    """rho on the line from `high` at the top of the learning rate to `low` at a hundredth of it."""
    at_zero = max(0.0, (low - 0.01 * high) / 0.99)
    return _rho(high, alpha=alpha, schedule='learning_rate', rho_min=at_zero)


_GSAM_RESNET = _imagenet(4096, 128, 90) | _gsam(1e-4, 5000, 1.6)
_GSAM_VIT = (
    _imagenet(4096, 64, 300)
    | _ADAMW
    | _gsam(0.3, 10_000, 3e-3)
    | {'loss': 'sigmoid', 'model.head_bias': -10.0}
)
_VIT_90 = _imagenet(1024, 128, 90) | _ADAMW | {'model.positions': 'sincos2d'}
_MSAM = _cifar(256, 256) | _CUTOUT | {'label_smoothing': 0.1, 'optimizer.warmup_epochs': 1.0}
_MSAM_IMAGENET = _imagenet(1024, 128, 100) | {
    'label_smoothing': 0.1,
    'optimizer.warmup_epochs': 1.0,
}
_MSAM_RHO = {'momentum_sam': _rho(3.0), 'sam': _rho(0.2), 'sgd': {}}
_TENTH = _steps(0.1, 80, 120)

# Paper -> {(model, dataset): (settings, {method: its settings})}.
PAPERS = {
    'gsam': {
        (model, 'imagenet'): (base, {'gsam': _with_learning_rate(*numbers), 'sgd': {}})
        for model, base, numbers in (
            ('resnet50', _GSAM_RESNET, (0.04, 0.02, 0.01)),
            ('resnet101', _GSAM_RESNET, (0.04, 0.02, 0.01)),
            ('resnet152', _GSAM_RESNET, (0.04, 0.02, 0.005)),
            ('vit-s32', _GSAM_VIT, (0.6, 0.0, 0.4)),
            ('vit-s16', _GSAM_VIT, (0.6, 0.0, 1.0)),
            ('vit-b32', _GSAM_VIT, (0.6, 0.1, 0.6)),
            ('vit-b16', _GSAM_VIT, (0.6, 0.2, 0.4)),
        )
    },
    'asam': {
        (model, dataset): (
            _cifar(label_smoothing=0.1) | _rates(0.1, 5e-4),
            {'asam': _rho(radius, eta=0.0), 'sam': _rho(radius / 10)},
        )
        for model, dataset, radius in (
            ('wrn28_10', 'cifar10', 0.5),
            ('wrn28_10', 'cifar100', 1.0),
            ('wrn16_8', 'cifar10', 0.5),
        )
    },
    'looksam': {
        (model, 'cifar100'): (_MSAM | _rates(0.5, 5e-4), {'looksam': _rho(0.3, k=5, alpha=0.1)})
        for model in ('wrn28_10', 'wrn16_4')
    },
    'esam': {
        (model, dataset): (
            _cifar(batch, 64) | _CUTOUT | _rates(0.05, 1e-3),
            {'esam': _rho(radius, beta=beta, gamma=0.5), 'sam': _rho(radius)},
        )
        for model, batch, radius, beta in (
            ('cifar_resnet18', 128, 0.05, 0.6),
            ('wrn28_10', 256, 0.1, 0.5),
        )
        for dataset in ('cifar10', 'cifar100')
    },
    'saf': {
        ('resnet50', 'imagenet'): (
            _imagenet(1024, 256, 90)
            | _rates(0.4, 1e-4)
            | {
                'label_smoothing': 0.1,
                'optimizer.nesterov': True,
                'optimizer.decay_norm_and_bias': False,
                'optimizer.warmup_epochs': 3.0,
            },
            {
                'saf': {'sam.lam': 0.3, 'sam.epochs_ago': 2, 'ema.decay': 0.9998},
                'mesa': {'sam.lam': 0.8, 'ema.decay': 0.9998},
                'sgd': {},
            },
        )
    },
    'cr_sam': {
        (model, dataset): (
            _cifar() | _rates(0.05, 1e-3),
            {'cr_sam': _rho(0.1, gamma=0.1, beta=0.01)},
        )
        for model in ('cifar_resnet18', 'cifar_resnet50', 'cifar_resnet101', 'wrn28_10')
        for dataset in ('cifar100', 'cifar10')
    },
    'universal': {
        ('cifar_resnet18', 'cifar10'): (
            _cifar() | _rates(0.1, 5e-4) | _steps(0.1, 50, 100, 150),
            {
                'frob_sam': _rho(0.005, lam=0.005, n=2),
                'det_sam': _rho(1.0, lam=1.0, h=0.01, n=1),
                'trace_sam': _rho(0.01, lam=1.0, n=1),
                'asam': _rho(0.5, eta=0.01),
                'sam': _rho(0.05),
                'sparse_sam': _rho(0.1, sparsity=0.5, period=390),
                'sgd': {},
            },
        )
    },
    'fsam': {
        ('cifar_resnet18', 'cifar100'): (
            _cifar() | _CUTOUT | _rates(0.05, 1e-3),
            {'friendly_sam': _rho(0.2, sigma=1.0, lam=0.6), 'sam': _rho(0.2)},
        )
    },
    'vasso': {
        ('wrn28_10', 'cifar100'): (
            _cifar() | _CUTOUT | _rates(0.1, 1e-3),
            {'vasso': _rho(0.2, theta=0.9), 'sam': _rho(0.2)},
        ),
        ('cifar_resnet18', 'cifar10'): (
            _cifar() | _CUTOUT | _rates(0.05, 1e-3),
            {'vasso': _rho(0.05, theta=0.9), 'sgd': {'optimizer.weight_decay': 5e-4}},
        ),
    },
    'sam_on': {
        ('wrn28_10', 'cifar100'): (
            _cifar(label_smoothing=0.1) | _rates(0.1, 5e-4) | {'data.augment': 'autoaugment'},
            {'asam': _rho(10.0, eta=0.0, adapt='norm_only'), 'sgd': {}},
        )
    },
    'msam': {
        ('wrn28_10', 'cifar100'): (_MSAM | _rates(0.5, 5e-4), _MSAM_RHO),
        ('wrn16_4', 'cifar100'): (_MSAM | _rates(0.5, 5e-4), _MSAM_RHO),
        ('cifar_resnet50', 'cifar100'): (_MSAM | _rates(0.1, 1e-3), _MSAM_RHO),
        ('resnet50', 'imagenet'): (_MSAM_IMAGENET | _rates(1.0, 1e-4), _MSAM_RHO),
        ('vit-s32', 'imagenet'): (
            _VIT_90
            | _rates(1e-3, 0.1)
            | {'optimizer.warmup_epochs': 8.0, 'sam.warmup_epochs': 8.0},
            _MSAM_RHO,
        ),
    },
    'wsam': {
        ('cifar_resnet18', 'cifar10'): (
            _cifar() | _rates(0.1, 5e-4),
            {'wsam': _rho(0.2, gamma=0.9, decoupled=True)},
        )
    },
    'sampa': {
        ('resnet56', 'cifar10'): (
            _cifar(label_smoothing=0.1) | _CUTOUT | _rates(0.1, 5e-4) | {'data.validation': True},
            {'sampa': _rho(0.1, lam=0.2)},
        )
    },
    'sassha': {
        ('resnet20', 'cifar10'): (
            _cifar(256, 256, 160) | _rates(0.1, 5e-4) | _TENTH,
            {'sam': _rho(0.15), 'sgd': {}},
        ),
        ('resnet32', 'cifar10'): (
            _cifar(256, 256, 160) | _rates(0.1, 5e-4) | _TENTH,
            {'sam': _rho(0.15), 'sgd': {}},
        ),
        ('resnet32', 'cifar100'): (
            _cifar(256, 256, 160) | _rates(0.1, 5e-4) | _TENTH,
            {'sam': _rho(0.2), 'sgd': {}},
        ),
        ('wrn28_10', 'cifar100'): (
            _cifar(256, 256) | _rates(0.1, 1e-3) | _steps(0.2, 60, 120, 160),
            {'sam': _rho(0.15), 'sgd': {'optimizer.weight_decay': 5e-4}},
        ),
        ('resnet50', 'imagenet'): (
            _imagenet(256, 64, 90) | _rates(0.1, 1e-4) | _steps(0.1, 30, 60),
            {'sam': _rho(0.1), 'sgd': {}},
        ),
        ('vit-s32', 'imagenet'): (
            _VIT_90
            | _rates(1e-3, 1e-4)
            | {'replica_batch_size': 64, 'optimizer.warmup_epochs': 8.0},
            {'sam': _rho(0.2), 'sgd': {}},
        ),
    },
}


def get_config(arg=''):
    arg = common.parse_arg(
        arg,
        paper='gsam',
        model='',
        dataset='',
        method='',
        rho=-1.0,
        noise=0.0,
        fraction=1.0,
        seed=0,
    )
    common.one_of('paper', arg.paper, tuple(PAPERS))
    rows = PAPERS[arg.paper]
    # The first of the paper that has what was asked for.
    found = [row for row in rows if arg.model in ('', row[0]) and arg.dataset in ('', row[1])]
    if not found:
        if arg.model:
            common.one_of('model', arg.model, tuple(dict.fromkeys(model for model, _ in rows)))
        of_model = dict.fromkeys(data for model, data in rows if arg.model in ('', model))
        common.one_of('dataset', arg.dataset, tuple(of_model))
    model, dataset = found[0]
    settings, methods = rows[model, dataset]
    method = arg.method or next(iter(methods))
    common.one_of('method', method, tuple(methods))
    c = common.get_config()
    c.seed = arg.seed
    common.set_model(c, model)
    c.data.name = dataset
    common.set_method(c, method)
    c.update_from_flattened_dict({**settings, **methods[method]})
    c.sam.rho = common.rho(arg, c.sam.rho)
    c.data.label_noise, c.data.label_noise_kind = arg.noise, 'other' if arg.noise else 'uniform'
    c.data.fraction = arg.fraction
    c.data.label_noise_seed = c.data.fraction_seed = arg.seed
    return common.finish(c, arg)
