"""Runs to export: an autoencoder and a classifier, with numbers nobody has trained."""

import importlib
import pathlib

import pytest
from absl import flags
from absl.testing import flagsaver

from avmae_jax import export


@pytest.fixture(scope='session')
def pretrained_run(save_run, small_config, tmp_path_factory) -> pathlib.Path:
    """Of encoder 'mid', with three checkpoints; pictures are resized and cut."""
    config = small_config('encoder=mid', **{'video.short_side': 40})
    return save_run(tmp_path_factory.mktemp('pretrained'), config, steps=(5, 6, 7))


@pytest.fixture(scope='session')
def finetuned_run(save_run, small_finetuning, tmp_path_factory) -> pathlib.Path:
    """An MBT whose optimiser keeps an average of the parameters."""
    config = small_finetuning('', **{'video.short_side': 40, 'optimizer.average_decay': 0.9})
    return save_run(tmp_path_factory.mktemp('finetuned'), config, seed=1)


@pytest.fixture
def run_export():
    """Runs the verb with flags as strings; nothing is caught."""

    def run(*arguments: object) -> None:
        verb = importlib.reload(export)  # Other verbs, which tests of other files bring in, have flags of these names.
        with flagsaver.flagsaver():
            verb.main(flags.FLAGS(['export', *map(str, arguments)]))

    return run
