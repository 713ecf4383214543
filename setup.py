"""What to install: ranges. constraints.txt pins what CI uses, on Python 3.11."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
version = next(
    line.split("'")[1] for line in (HERE / 'avmae_jax/__init__.py').read_text().splitlines() if '__version__' in line
)

setup(
    name='avmae_jax',
    version=version,
    description='Self-supervised pretraining of transformers on video and its sound, in JAX.',
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11,<3.14',
    packages=find_packages(include=['avmae_jax', 'avmae_jax.*']),
    install_requires=[
        'absl-py>=2.1',
        'av>=16,<19',
        'cloudpickle>=3.0',
        'clu>=0.0.12',
        'etils[epath]>=1.12',
        'flax>=0.12.7,<0.13',
        'google-crc32c>=1.6',
        'grain>=0.2.15,<0.3',
        'jax>=0.10,<0.12',
        'jaxtyping>=0.3',
        'ml_collections>=1.0',
        'msgpack>=1.0',
        'numpy>=2.0',
        'opencv-python-headless>=4.10',
        'optax>=0.2.6',
        'orbax-checkpoint>=0.12,<0.13',
        'PyYAML>=6.0',
        'simplejpeg>=1.8',
        'tensorboardX>=2.6.4',
        'tensorflow-datasets>=4.9.9,<5',
        'tqdm>=4.66',
    ],
    extras_require={
        'cuda': ['jax[cuda13]'],
        'tpu': ['jax[tpu]'],
        'plan': ['jax[tpu]'],  # Its compiler, which needs no TPU.
        'export': ['flatbuffers>=24.3', 'pyarrow>=15'],
        'gcs': ['etils[epath-gcs]', 'gcsfs'],
        # What weights are read from, handed to and compared with; no module of ours imports them when it is imported.
        'interop': ['safetensors>=0.5,<1', 'torch>=2.6', 'transformers>=5.0,<6'],
        'test': [
            'beartype>=0.20',
            'ipykernel>=6.29',
            'kaldi_native_fbank>=1.20',
            'mypy>=1.15',
            'nbclient>=0.10',
            'pytest>=8',
            'pytest-timeout>=2.3',
            'pytest-xdist>=3.6',
            'ruff>=0.9',
            'safetensors>=0.5,<1',
            'scikit-learn>=1.5',
        ],
    },
)
