"""The code is broken on purpose, in a copy, and a test must notice: ./scripts/test.sh -m slow."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

STEP, GRADIENTS = 'sam_jax/train_step.py', 'sam_jax/gradients.py'
ASCENT, TREES, COMBINE, GATE, DIRECTION, MASK, PROTOCOL, LINK = (
    f'sam_jax/sharpness/{name}.py'
    for name in ('ascent', 'trees', 'combine', 'gate', 'direction', 'mask', 'protocol', 'as_optax')
)
PERTURBED, COMBINED, INTERMITTENT, ONE_GRADIENT, TWO_AT_ONCE, PROBES, OF_EXAMPLES = (
    f'sam_jax/sharpness/methods/{name}.py'
    for name in (
        'perturbed',
        'combined',
        'intermittent',
        'one_gradient',
        'two_at_once',
        'probes',
        'of_examples',
    )
)
TRAJECTORY = 'sam_jax/trajectory.py'
FORMS = ' '.join(
    f'tests/{name}_test.py'
    for name in ('ascents', 'combinations', 'gates', 'other_means', 'contract')
)
BY_HAND = 'tests/methods_by_hand_test.py'
OBJECTIVE, HESSIAN, SHARPNESS, LANDSCAPE = (
    f'sam_jax/analysis/{name}.py' for name in ('objective', 'hessian', 'sharpness', 'landscape')
)
STREAM, AUGMENT = 'sam_jax/data/streaming.py', 'sam_jax/data/augment.py'
CONVOLUTIONS, CONVOLUTIONS_TEST = 'sam_jax/convolutions.py', 'tests/convolutions_test.py'
AHEAD = 'tests/replicas_test.py::test_the_host_does_not_run_far_ahead_and_results_keep_their_order'
STEP_TEST = 'tests/train_step_test.py'
ALGORITHM_1 = f'{STEP_TEST}::test_step_is_algorithm_1_with_clean_statistics_and_one_dropout_mask'

MUTANTS = {
    'batches dispatched far ahead of the devices': (
        'sam_jax/replicas.py',
        'len(waiting) > IN_FLIGHT',
        'len(waiting) > 1000',
        AHEAD,
    ),
    'an analysis that runs ahead of the devices': (
        OBJECTIVE,
        'jax.block_until_ready(total)',
        'total',
        'tests/hessian_test.py::test_no_batch_is_dispatched_before_the_one_before_it_is_done',
    ),
    'sign of the perturbation': (
        TREES,
        'promote(w) + sign * e',
        'promote(w) - sign * e',
        ALGORITHM_1,
    ),
    'no perturbation': (TREES, 'promote(w) + sign * e', 'promote(w) + 0 * e', ALGORITHM_1),
    'perturbation of half the length': (
        ASCENT,
        'rho / jnp.where(norm > 0, norm, 1.0), 0.0)',
        '0.5 * rho / norm, 0.0)',
        ALGORITHM_1,
    ),
    'norm without a guard': (
        ASCENT,
        'jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1.0), 0.0)',
        'rho / norm',
        'tests/sharpness_test.py',
    ),
    'perturbed weights in the dtype of the params': (
        TREES,
        'promote(w) + sign * e',
        '(promote(w) + sign * e).astype(w.dtype)',
        f'{STEP_TEST}::test_bfloat16_params_are_perturbed_in_float32',
    ),
    'no mean over devices': (
        STEP,
        '    *result, report = gradients.mean_over_devices((*result, report))\n',
        '',
        ALGORITHM_1,
    ),
    'no mean of the cosines': (
        STEP,
        'lax.cond(is_logged, gradients.mean_over_devices, lambda same: same, cosines)',
        'cosines',
        ALGORITHM_1,
    ),
    'gradient averaged before the ascent': (
        GRADIENTS,
        '    if layout.devices_per_group > 1 and not part:\n'
        '        result = mean_over_devices(result, layout.axis_index_groups)',
        '    result = mean_over_devices(result)',
        ALGORITHM_1,
    ),
    'a part of the only group': (
        GRADIENTS,
        'part=True) if shared else None',
        'part=True)',
        'tests/exchanges_test.py -k one_group',
    ),
    'wsam: a part of a gradient is clipped': (
        COMBINED,
        'linear=not clips',
        'linear=True',
        'tests/exchanges_test.py::test_a_part_is_as_good_as_the_group[wsam]',
    ),
    'statistics of the second pass': (
        GRADIENTS,
        "    return (updates, sharpness_state, aux['batch_stats'], report), kept",
        "    return (updates, sharpness_state, seen.perturbed.aux[0]['batch_stats'], report), kept",
        ALGORITHM_1,
    ),
    'the error of the clean weights for that of the perturbed ones': (
        GRADIENTS,
        'seen.perturbed.reported.items()',
        'seen.clean.reported.items()',
        ALGORITHM_1,
    ),
    'the length of a part for that of the gradient': (
        GRADIENTS,
        'if shared else (a, b)',
        'if False else (a, b)',
        f'{STEP_TEST} -k knows_no_devices',
    ),
    'the cosine of the clean gradient with itself': (
        PROTOCOL,
        "'perturbed': self.compare(clean.grads, grads)",
        "'perturbed': self.compare(clean.grads, clean.grads)",
        ALGORITHM_1,
    ),
    'the same dropout in all replicas': (
        STEP,
        'fold_in, key))(replica)',
        'fold_in, key))(0 * replica)',
        ALGORITHM_1,
    ),
    'replicas summed': (GRADIENTS, 't / n if', 't if', ALGORITHM_1),
    'augmentation by device': (
        STEP,
        '(\n        replica[0] * layout.replica_batch_size)',
        '0',
        'tests/topology_test.py',
    ),
    'no weight decay in the gradients': (
        GRADIENTS,
        'return losses.l2_penalty(',
        'return 0 * losses.l2_penalty(',
        ALGORITHM_1,
    ),
    'rho as a constant of the program': (
        'sam_jax/schedules.py',
        'of_rho(hparams.rho,',
        'of_rho(config.sam.rho,',
        f'{STEP_TEST}::test_swept_values_are_not_constants_of_the_program',
    ),
    'clipping forgotten': (
        'sam_jax/optimizers.py',
        'if clip else optax.identity()',
        'if False else optax.identity()',
        'tests/golden_train_test.py::test_every_value_after_three_steps',
    ),
    'checkpoint shares the buffers of the state': (
        'sam_jax/checkpoint.py',
        'np.array(x, copy=True)',
        'np.asarray(x)',
        'tests/checkpoint_test.py',
    ),
    'sums of the report not saved': (
        STEP,
        'jnp.where(position == 0, 0.0, state.sums[name])',
        '0.0',
        f'{STEP_TEST}::test_metrics_are_means_since_the_last_report',
    ),
    'windows do not depend on the step': (
        STREAM,
        'step, self._places[j])',
        '0, self._places[j])',
        'tests/streaming_test.py::test_windows_differ_between_steps_and_places',
    ),
    'windows depend on the place within the process': (
        STREAM,
        'step, self._places[j])',
        'step, j)',
        'tests/streaming_test.py::test_each_process_reads_its_share_alone',
    ),
    'a resumed run begins at the first step': (
        STREAM,
        'step += self._first_step',
        'step += 0',
        'tests/streaming_test.py::test_an_epoch_is_a_permutation_and_any_step_can_be_the_first',
    ),
    'padding counts in the evaluation': (
        STREAM,
        "'mask': np.float32(0)}",
        "'mask': np.float32(1)}",
        'tests/streaming_test.py::test_evaluation_sees_every_example_once',
    ),
    'partners on the same device': (
        AUGMENT,
        'if axis_name is None:',
        'if True:',
        'tests/data_test.py::test_augmentation_depends_on_seed_step_and_place_alone',
    ),
    'mixup with the smaller weight': (
        AUGMENT,
        'jnp.maximum(weights, 1 - weights)',
        'jnp.minimum(weights, 1 - weights)',
        'tests/augment_test.py::test_mixup_is_the_original_s',
    ),
    'noise that depends on what it is asked for together': (
        'sam_jax/data/labels.py',
        'draws[index]',
        'draws[:len(index)]',
        'tests/labels_test.py',
    ),
    'noise for all but the drawn': (
        'sam_jax/data/labels.py',
        'np.where(hit',
        'np.where(~hit',
        'tests/labels_test.py',
    ),
    # Convolutions on CPU.
    'convolutions left as they are': (
        CONVOLUTIONS,
        'return None if numbers == _fast_numbers(lhs.ndim) else _transposed',
        'return None',
        f'{CONVOLUTIONS_TEST} -k fast_form',
    ),
    'filters of a block that are not moved': (
        CONVOLUTIONS,
        'padded(rhs, rhs.ndim - 3, q, window * block)',
        'padded(rhs, rhs.ndim - 3, 0, window * block)',
        f'{CONVOLUTIONS_TEST} -k few_features',
    ),
    'an image of few features that is moved': (
        CONVOLUTIONS,
        'padded(lhs, lhs.ndim - 2, low, whole)',
        'padded(lhs, lhs.ndim - 2, 0, whole)',
        f'{CONVOLUTIONS_TEST} -k few_features',
    ),
    'taps of another phase': (
        CONVOLUTIONS,
        'first = (low - r) % d',
        'first = low % d',
        f'{CONVOLUTIONS_TEST} -k window',
    ),
    'phases in other places': (
        CONVOLUTIONS,
        'spread[c] = (r, size - 1 - r - (results - 1) * d, d - 1)',
        'spread[c] = (0, size - 1 - (results - 1) * d, d - 1)',
        f'{CONVOLUTIONS_TEST} -k window',
    ),
    "the last part of a filter's gradient forgotten": (
        CONVOLUTIONS,
        '0, count if rest else count - 1,',
        '0, count - 1,',
        f'{CONVOLUTIONS_TEST} -k in_parts',
    ),
    "a filter's gradient in parts summed in bfloat16": (
        CONVOLUTIONS,
        'sum_dtype = jnp.promote_types(dtype, jnp.float32)',
        'sum_dtype = dtype',
        f'{CONVOLUTIONS_TEST} -k summed_in_float32',
    ),
    'parts of what XLA may cut': (
        CONVOLUTIONS,
        'if whole and _is_filter_gradient',
        'if _is_filter_gradient',
        f'{CONVOLUTIONS_TEST} -k xla_cuts',
    ),
    'negative padding left to XLA': (
        CONVOLUTIONS,
        'if _is_cropped(lhs, settings):',
        'if False:',
        f'{CONVOLUTIONS_TEST} -k nothing_but_padding',
    ),
    'cropped at the wrong end': (
        CONVOLUTIONS,
        'slice(max(-low, 0), lhs.shape[a] - max(-high, 0))',
        'slice(max(-high, 0), lhs.shape[a] - max(-low, 0))',
        f'{CONVOLUTIONS_TEST} -k window',
    ),
    'operands that XLA swaps': (
        CONVOLUTIONS,
        'if _is_small_image(lhs, rhs, settings):',
        'if False:',
        f'{CONVOLUTIONS_TEST} -k fast_form',
    ),
    'dilated windows of patches': (
        CONVOLUTIONS,
        'stride) + k * d for k in range(n)]',
        'stride) + k for k in range(n)]',
        f'{CONVOLUTIONS_TEST} -k window',
    ),
    # A method each, or more.
    'second_order: no Hessian': (
        PERTURBED,
        'loss.hessian_product(params, by_grads)',
        'by_grads',
        'tests/methods_test.py -k second_order_sam_of_a_quadratic',
    ),
    'multistep: out of the ball': (
        ASCENT,
        'project(jax.tree.map(jnp.add, eps, further), radius)',
        'jax.tree.map(jnp.add, eps, further)',
        'tests/methods_test.py -k test_multistep',
    ),
    'look_layersam: one radius for all': (
        INTERMITTENT,
        'ascent.layer_ball(rho), combine.reused',
        'ascent.lp_ball(rho), combine.reused',
        f'{FORMS} -k looksam',
    ),
    'ae_looksam: nothing reused': (
        INTERMITTENT,
        'combine.reused(alpha),\n        gate.adaptive',
        'combine.perturbed(),\n        gate.adaptive',
        f'{FORMS} -k ae_looksam',
    ),
    'a resumed SAMPa without its last batch': (
        'sam_jax/experiment.py',
        'max(first_step - 1, 0) if',
        'first_step if',
        f'{BY_HAND} -k feeds',
    ),
    'bsam: another number of examples': (
        STEP,
        'num_examples=steps_per_epoch * config.batch_size',
        'num_examples=config.batch_size',
        f'{BY_HAND} -k bsam',
    ),
    'wsam: the learning rate of the start': (
        STEP,
        'add_correction(updates, sharpness_state, learning_rate)',
        'add_correction(updates, sharpness_state, hparams.learning_rate)',
        f'{BY_HAND} -k wsam',
    ),
    'rmsprop: the momentum of the wrong sign': (
        'sam_jax/optimizers.py',
        'jax.tree.map(jnp.negative, trace)',
        'trace',
        f'{BY_HAND} -k points_against',
    ),
    'unnormalized: downhill': (
        ASCENT,
        'jnp.asarray(radius, g.dtype) * g,',
        'jnp.asarray(radius, g.dtype) * -g,',
        f'{FORMS} -k unnormalized',
    ),
    'asam: T in place of its square': (
        ASCENT,
        'return jax.tree.map(jnp.multiply, root, inner)',
        'return inner',
        f'{FORMS} -k asam',
    ),
    'fisher: the metric itself': (
        ASCENT,
        '1.0 / (1.0 + eta',
        '1.0 * (1.0 + eta',
        f'{FORMS} -k fisher',
    ),
    'layerwise: one radius for all': (
        ASCENT,
        'radius * lp_norm(w), 2.0)',
        'radius, 2.0)',
        f'{FORMS} -k layerwise',
    ),
    'sam_on: everything': (
        PERTURBED,
        'rho, p, masks.normalization)',
        'rho, p)',
        f'{FORMS} -k sam_on',
    ),
    'sparse: nothing left out': (
        MASK,
        'jnp.where(m, e, 0.0)',
        'jnp.where(m, e, e)',
        f'{FORMS} -k sparse',
    ),
    'sparse: the least sensitive': (MASK, 'x >= threshold', 'x < threshold', f'{FORMS} -k sparse'),
    'random_sam: along the gradient': (
        DIRECTION,
        'return random_like(key, updates), state',
        'return updates, state',
        'tests/methods_test.py -k test_random_sam',
    ),
    'vasso: weights exchanged': (
        DIRECTION,
        '(1 - theta) * d + theta * g)',
        'theta * d + (1 - theta) * g)',
        f'{FORMS} -k vasso',
    ),
    'friendly: towards the average': (
        DIRECTION,
        'g - sigma * m)',
        'g + sigma * m)',
        f'{FORMS} -k friendly',
    ),
    'a schedule counts ascents': (
        ASCENT,
        'state.count if count is None else count',
        'state.count',
        f'{FORMS} -k counts_updates',
    ),
    'gsam: the sign of the gap': (
        COMBINE,
        '(promote(g_p) - alpha * (',
        '(promote(g_p) + alpha * (',
        f'{FORMS} -k gsam',
    ),
    'wsam: the sign of the correction': (
        COMBINED,
        'a * (y - x), g, g_p)',
        'a * (x - y), g, g_p)',
        f'{FORMS} -k wsam',
    ),
    'wsam: no correction': (
        STEP,
        '    updates = sharpness.add_correction(updates, sharpness_state, learning_rate)\n',
        '',
        'tests/methods_in_training_test.py::test_devices_restarts_and_values[wsam]',
    ),
    'gnp: weights that do not add up': (
        COMBINE,
        '(1.0 - alpha) * promote(g)',
        '1.0 * promote(g)',
        f'{FORMS} -k gnp',
    ),
    'a projection of the whole length': (
        TREES,
        'share = dot(tree, direction)',
        'share = lp_norm(tree)',
        f'{FORMS} -k gsam',
    ),
    'gradient_constrained: low ignored': (
        COMBINE,
        '(c <= low) & (low > 0)',
        '(c <= low)',
        f'{FORMS} -k gradient_constrained',
    ),
    'cr_sam: the second difference': (
        COMBINED,
        'g_up + g_down - 2.0 * g',
        'g_up + g_down - g',
        f'{FORMS} -k cr_sam',
    ),
    'stable_sam: the ratio upside down': (
        COMBINE,
        '_ratio(lp_norm(grads), lp_norm(perturbed_grads))',
        '_ratio(lp_norm(perturbed_grads), lp_norm(grads))',
        f'{FORMS} -k stable',
    ),
    'wsam: the correction of gradients as they are': (
        COMBINED,
        '(clipped(x.grads, max_norm if clips else None) for x',
        '(x.grads for x',
        'tests/contract_test.py -k wsam',
    ),
    'functional_sam: the derivative there': (
        OF_EXAMPLES,
        ', cotangents_of=clean)',
        ')',
        'tests/contract_test.py -k functional',
    ),
    'functional_sam: of a group, the derivative there': (
        GRADIENTS,
        'total = jnp.sum(logits * lax.stop_gradient(cotangents))',
        'total = total',
        f'{BY_HAND} -k functional',
    ),
    'le_sam: the larger radius': (
        ASCENT,
        '_ball_step(grads, jnp.minimum(',
        '_ball_step(grads, jnp.maximum(',
        'tests/contract_test.py -k le_sam',
    ),
    'a memory keeps what is not finite': (
        LINK,
        '_if_finite(memory, state.memory)',
        'memory',
        'tests/contract_test.py -k bad_step',
    ),
    'norms of entries as they are': (
        TREES,
        'jnp.where(huge, 1 / far, jnp.where(small, far, 1.0))',
        'jnp.where(huge, 1.0, 1.0)',
        'tests/contract_test.py -k tiny_and_huge',
    ),
    'a loss with memory that nobody adds': (
        ONE_GRADIENT,
        "        now.need('added_loss', name)\n",
        '',
        'tests/methods_test.py -k silently',
    ),
    'the edge of plain gradient descent': (
        SHARPNESS,
        '8 * rho /',
        '0 * rho /',
        'tests/analysis_sharpness_test.py -k edge',
    ),
    'looksam: not orthogonal': (
        COMBINE,
        'promote(y) - part',
        'promote(y) + part',
        f'{FORMS} -k looksam',
    ),
    'looksam: nothing reused': (
        COMBINE,
        '(each(add, grads, state.orthogonal), state)',
        '(grads, state)',
        f'{FORMS} -k looksam',
    ),
    'periodic: a step late': (GATE, 'count % k == 0', 'count % k == 1', f'{FORMS} -k periods'),
    'late_phase: a step more': (GATE, '(count < end)', '(count <= end)', f'{FORMS} -k windows'),
    'rst: the other side of the coin': (
        GATE,
        'bernoulli(gate_key, p)',
        'bernoulli(gate_key, 1 - p)',
        f'{FORMS} -k coin',
    ),
    'rst: one coin for all steps': (
        STEP,
        "'gate', state.step)",
        "'gate', 0)",
        'tests/methods_in_training_test.py -k coin_is_thrown',
    ),
    'ae_sam: end and start exchanged': (
        GATE,
        'past * lambda1 + (1 - past) * lambda2',
        'past * lambda2 + (1 - past) * lambda1',
        f'{FORMS} -k adaptive',
    ),
    'ae_sam: each group for itself': (
        STEP,
        'gate_norm=gate_norm)',
        'gate_norm=None)',
        f'{BY_HAND} -k adaptive',
    ),
    'trace: the sum of the probes': (
        PROBES,
        'lam / losses.size), jnp',
        'lam), jnp',
        f'{FORMS} -k trace',
    ),
    'det: another power': (PROBES, 'half - 3 * log_mean', 'half - 2 * log_mean', f'{FORMS} -k det'),
    'frob: the biased variance': (
        PROBES,
        '/ (losses.size - 1)',
        '/ losses.size',
        f'{FORMS} -k frob',
    ),
    'losses without the penalty': (
        GRADIENTS,
        "'objective': (total + penalty)",
        "'objective': (total + 0 * penalty)",
        f'{BY_HAND} -k whole_objective',
    ),
    'momentum_sam: along the momentum': (
        ONE_GRADIENT,
        "jax.tree.map(jnp.negative, now.need('momentum'))",
        "now.need('momentum')",
        f'{FORMS} -k momentum',
    ),
    'extrapolated: uphill': (
        ONE_GRADIENT,
        'times(rho, -1.0)',
        'times(rho, 1.0)',
        f'{FORMS} -k extrapolated',
    ),
    'sampa: weights exchanged': (
        TWO_AT_ONCE,
        '(1.0 - lam) * g_p + lam * g',
        '(1.0 - lam) * g + lam * g_p',
        f'{FORMS} -k sampa',
    ),
    'sampa: both on this batch': (
        STEP,
        'previous, arrays, hparams',
        'feed, arrays, hparams',
        f'{BY_HAND} -k sampa',
    ),
    'bsam: the precision': (
        TWO_AT_ONCE,
        '(jnp.sqrt(s) * jnp.abs(g)',
        '(jnp.abs(g)',
        f'{FORMS} -k bsam',
    ),
    'bsam: the variance for the deviation': (
        TWO_AT_ONCE,
        'lambda z, s: z / jnp.sqrt(number * s)',
        'lambda z, s: z / (number * s)',
        f'{FORMS} -k bsam_draws',
    ),
    'saf: another epoch': (
        TRAJECTORY,
        '== epoch - slots',
        '== epoch - slots + 1',
        f'{BY_HAND} -k saf',
    ),
    'mesa: its own teacher': (
        TRAJECTORY,
        'model.apply(average,',
        "model.apply({'params': state.params, 'batch_stats': state.batch_stats},",
        f'{BY_HAND} -k mesa',
    ),
    'a loss with the divergence the other way': (
        'sam_jax/losses.py',
        'jnp.exp(old) * (old - new)',
        'jnp.exp(new) * (new - old)',
        f'{FORMS} -k trajectory_loss',
    ),
    'quantization: the generator descends': (
        'sam_jax/quantization.py',
        'lambda y: -f(x, y)',
        'lambda y: f(x, y)',
        'tests/quantization_test.py -x',
    ),
    'quantization: no gradient through the rounding': (
        'sam_jax/quantization.py',
        '(x - lax.stop_gradient(x))',
        '0.0 * x',
        'tests/quantization_test.py -x',
    ),
    'esam: those that fall most': (
        GRADIENTS,
        'lax.top_k(new - old_losses,',
        'lax.top_k(old_losses - new,',
        f'{BY_HAND} -k esam',
    ),
    'esam: not as far as 1 / beta': (
        OF_EXAMPLES,
        'times(rho, 1.0 / beta)',
        'rho',
        f'{FORMS} -k esam',
    ),
    'objective: of the first device alone': (
        OBJECTIVE,
        'lax.psum(part(params, batch_stats, batch, *vectors), AXIS)',
        'part(params, batch_stats, batch, *vectors)',
        'tests/hessian_test.py -k dense',
    ),
    'objective: what fills the last batch counts': (
        OBJECTIVE,
        "jnp.sum(jnp.where(batch['mask'] > 0, each, 0.0))",
        'jnp.sum(each)',
        'tests/hessian_test.py -k dense',
    ),
    'objective: the penalty is not in the Hessian': (
        OBJECTIVE,
        'jax.jvp(gradient, (params,), (v,))[1]',
        'jax.jvp(gradient, (params,), (v,))[0]',
        'tests/hessian_test.py -k dense',
    ),
    'objective: no curvature of the loss': (
        OBJECTIVE,
        'back(curved)[0]',
        'back(moved)[0]',
        'tests/hessian_test.py -k gauss',
    ),
    'objective: bfloat16 products': (
        OBJECTIVE,
        'Objective(model.clone(dtype=dtype),',
        'Objective(model,',
        'tests/hessian_test.py -k top_eigenpairs_of',
    ),
    'lanczos: orthogonal to the last two only': (
        HESSIAN,
        'known = basis[:j + 1]',
        'known = basis[max(j - 1, 0):j + 1]',
        'tests/hessian_test.py -k orthogonal',
    ),
    'density: weights not squared': (
        HESSIAN,
        'vectors[0] ** 2',
        'abs(vectors[0])',
        'tests/hessian_test.py -k wigner',
    ),
    'trace: normal probes': (
        HESSIAN,
        'jax.random.rademacher',
        'jax.random.normal',
        'tests/hessian_test.py -k trace',
    ),
    'sharpness: of the other side': (
        SHARPNESS,
        'move(params, eps), params)',
        'move(params, eps, -1.0), params)',
        'tests/analysis_sharpness_test.py -k quadratic',
    ),
    'sharpness: groups by the sum of their losses': (
        SHARPNESS,
        "sums['loss'] / m",
        "sums['loss']",
        'tests/analysis_sharpness_test.py -k mean_over_groups',
    ),
    'sharpness: unfinished groups count': (
        SHARPNESS,
        "whole = jnp.all(batch['mask'] > 0)",
        'whole = True',
        'tests/analysis_sharpness_test.py -k mean_over_groups',
    ),
    'landscape: whole layers for filters': (
        LANDSCAPE,
        'd.reshape(-1, w.shape[-1]), axis=0)',
        'd)',
        'tests/landscape_test.py',
    ),
    'landscape: statistics stay behind': (
        LANDSCAPE,
        "moved['params'], moved['batch_stats'], batch)",
        "moved['params'], origin['batch_stats'], batch)",
        'tests/landscape_test.py',
    ),
}


def _copy(tmp_path):
    for name in ('sam_jax', 'configs', 'scripts', 'tests', 'pyproject.toml'):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(source, tmp_path)


def _pattern(old):
    """A regular expression for a piece of code, however its lines are broken."""
    indent = re.match(r'\s*', old)[0]
    tokens = re.findall(r"'[^'\n]*'|\w+|[^\w\s]", old)
    parts = [rf',?\s*{re.escape(t)}' if t in ')]}' else rf'\s*{re.escape(t)}' for t in tokens]
    end = r'\n' if old.endswith('\n') else ''
    return re.compile(re.escape(indent) + ''.join(parts).removeprefix(r'\s*') + end)


def test_what_is_broken_on_purpose_is_there():
    for name, (file, old, _, _) in MUTANTS.items():
        found = _pattern(old).findall((ROOT / file).read_text())
        assert len(found) == 1, f'{name}: {file}, {old!r}'


@pytest.mark.slow
@pytest.mark.parametrize('name', MUTANTS)
def test_a_test_notices(name, tmp_path):
    file, old, new, test = MUTANTS[name]
    _copy(tmp_path)
    text = (tmp_path / file).read_text()
    (tmp_path / file).write_text(_pattern(old).sub(lambda _: new, text))
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-x', '-m', 'not slurm and not browser', *test.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': ''},
        check=False,
    )
    assert run.returncode == 1 and 'failed' in run.stdout, run.stdout[-2000:]
