"""What pyproject.toml cannot say: the folder `configs` is a package inside of `sam_jax`."""

import setuptools

setuptools.setup(
    packages=[*setuptools.find_packages(include=['sam_jax', 'sam_jax.*']), 'sam_jax.configs'],
    package_dir={'sam_jax.configs': 'configs'},
    package_data={'sam_jax.experiments': ['paper.csv']},
)
