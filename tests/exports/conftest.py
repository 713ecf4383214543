"""Runs to export: an autoencoder and a classifier, with numbers nobody has trained."""

import pathlib

import pytest


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
