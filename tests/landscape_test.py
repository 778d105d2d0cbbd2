"""Landscapes: their directions, and that a place has the loss that the objective has there."""

import jax
import numpy as np
import pytest
from analysed import network, objective
from helpers import assert_trees_equal

from sam_jax.analysis import landscape


def test_filters_of_a_random_direction_have_the_norms_of_the_filters():
    _, variables = network()
    params = variables['params']
    d = landscape.random_direction(params, seed=3)
    for layer in ('Conv_0', 'Dense_0'):
        kernel, direction = np.asarray(params[layer]['kernel']), d[layer]['kernel']
        for i in range(kernel.shape[-1]):
            np.testing.assert_allclose(
                np.linalg.norm(direction[..., i]), np.linalg.norm(kernel[..., i]), rtol=1e-5
            )
        assert not d[layer]['bias'].any()
    assert not d['BatchNorm_0']['scale'].any() and not d['BatchNorm_0']['bias'].any()
    assert_trees_equal(d, landscape.random_direction(params, seed=3))
    for other in (landscape.random_direction(params, 4), landscape.random_direction(params, 3, 1)):
        a, b = (x['Conv_0']['kernel'].ravel() for x in (d, other))
        assert abs(a @ b) < 0.5 * np.linalg.norm(a) * np.linalg.norm(b)


def test_a_direction_goes_through_scaled_networks_as_through_the_first():
    """Filter normalisation: weights before BatchNorm times 10 give the same surface."""
    _, variables = network()
    params = variables['params']
    larger = {**params, 'Conv_0': {**params['Conv_0'], 'kernel': 10 * params['Conv_0']['kernel']}}
    a, b = (landscape.random_direction(p, 0)['Conv_0']['kernel'] for p in (params, larger))
    np.testing.assert_allclose(10 * a, b, rtol=1e-4)


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_places_have_the_loss_of_the_objective_there(x64, weight_decay):
    measured, params = objective(devices=4, weight_decay=weight_decay)
    directions = [landscape.random_direction(params, 0, i) for i in range(2)]
    ticks, places = landscape.grid(0.5, 3, 2)
    assert ticks.tolist() == [-0.5, 0, 0.5] and places.tolist()[5] == [0, 0.5]
    found = landscape.make_surface(measured, params, directions)(places)
    assert {name: x[4] for name, x in found.items()} == pytest.approx(
        measured.value(params), rel=1e-12
    )
    for place, loss, error_rate in zip(places, found['loss'], found['error_rate']):
        there = jax.tree.map(lambda w, x, y, p=place: w + p[0] * x + p[1] * y, params, *directions)
        assert {'loss': loss, 'error_rate': error_rate} == pytest.approx(
            measured.value(measured.layout.replicate(there)), rel=1e-10
        )


def test_one_device_and_four_find_the_same_bit_for_bit():
    surfaces = []
    for devices in (1, 4):
        measured, params = objective(devices=devices, model_and_variables=network())
        directions = [landscape.random_direction(params, 0)]
        surfaces.append(
            landscape.make_surface(measured, params, directions)(landscape.grid(1.0, 7, 1)[1])
        )
    assert_trees_equal(*surfaces)


def test_the_way_to_another_run_ends_there_with_its_statistics(x64):
    model, first = network(0, dtype='float64')
    _, second = network(1, dtype='float64')
    measured, params = objective(devices=2, model_and_variables=(model, first))
    other, other_params = objective(devices=2, model_and_variables=(model, second))
    way = landscape.difference(first, second)
    found = landscape.make_surface(measured, params, [way])([[0.0], [1.0], [0.5]])
    np.testing.assert_allclose(found['loss'][0], measured.value(params)['loss'], rtol=1e-12)
    np.testing.assert_allclose(found['loss'][1], other.value(other_params)['loss'], rtol=1e-12)
    assert abs(found['loss'][2] - found['loss'][:2].mean()) > 1e-3


def test_runs_of_different_models_have_no_way_between_them():
    _, first = network()
    _, second = network(batch_norm=False)
    with pytest.raises(ValueError, match='needs the same model'):
        landscape.difference(first, second)
