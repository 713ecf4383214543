"""Which processes ask jax to recognise their cluster, and which are alone."""

import jax
import pytest

from avmae_jax.parallel import hosts


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed.initialize was called with."""
    calls = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **kwargs: calls.append(args))
    monkeypatch.setattr(jax.config, 'update', lambda *args: None)
    for name in (*hosts.CLUSTER_VARIABLES, hosts.ON_TPU):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ('name', 'value', 'recognised'),
    [
        ('SLURM_NTASKS', '4', True),
        ('SLURM_NTASKS', '1', False),
        ('TPU_WORKER_HOSTNAMES', 'a,b', True),
        ('JAX_COORDINATOR_ADDRESS', 'a:1', True),
        # The environment of a Cloud TPU VM says nothing of the other hosts, nor that of GKE of other slices.
        ('TPU_ML_PLATFORM', 'JAX', True),
        ('HOME', '/', False),
    ],
)
def test_a_cluster_is_recognised_by_its_variables_and_tpus_by_jax(joined, monkeypatch, name, value, recognised):
    monkeypatch.setenv(name, value)
    hosts.initialize()
    assert joined == [()] if recognised else joined[0][1:] == (1, 0)


def test_who_a_process_is_is_told_wholly_or_not_at_all(joined):
    hosts.initialize('host:1', 4, 2)
    assert joined == [('host:1', 4, 2)]
    with pytest.raises(ValueError, match='give all three or none'):
        hosts.initialize('host:1', 4)
