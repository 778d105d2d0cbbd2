"""pip install -e . ; settings of the tools are in pyproject.toml."""

import pathlib

import setuptools

ROOT = pathlib.Path(__file__).parent


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith(('#', '-r'))]


setuptools.setup(
    name='sam_jax',
    version='0.1.0',
    description='Sharpness-Aware Minimization in JAX: the research training codebase',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    # configs are loaded by path; as a package they find `configs.common` from any folder.
    packages=setuptools.find_packages(include=['sam_jax', 'sam_jax.*', 'configs']),
    install_requires=requirements('requirements.txt'),
    extras_require={'test': requirements('requirements-test.txt')},
    entry_points={'console_scripts': [
        'sam-jax-train=sam_jax.main:run',
        'sam-jax-test=sam_jax.main:run_tests',
    ]},
)
