"""A training step for machines that are not here: what it takes of memory, network and time."""
