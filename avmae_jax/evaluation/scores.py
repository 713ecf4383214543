"""From the features of two splits to scores: what is fitted on the one is judged on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from avmae_jax.evaluation import metrics, passes, probes, retrieval
from avmae_jax.structs import JOINT_ORDER

# 'train' and 'test' -> what `passes.make_feature_step` gave for every record of the split.
Tables = Mapping[str, Mapping[str, Any]]


def classify(tables: Tables, labels: Mapping[str, Any], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Scores of every head of `labels`, set of features and method ('knn', 'probe')."""
    sets = {role: passes.feature_sets(table) for role, table in tables.items()}
    results = []
    for head, classes in labels.items():
        for name in (name for name in sets['test'] if name in sets['train']):
            rows = {}
            for role, table in tables.items():
                features, present = sets[role][name]
                targets = table['labels'][head]
                counted = present & (targets.sum(axis=1) > 0)
                rows[role] = (features[counted], targets[counted])
            (train, train_targets), (test, test_targets) = rows['train'], rows['test']
            if len(train) < 2 or not len(test):
                logging.warning('Labels %s: too few clips with %s to score.', head, name)
                continue
            for method in methods:
                logging.info('Fitting %s on %s: %d clips, width %d.', method, name, *train.shape)
                scored, settings = METHODS[method](train, train_targets, test, classes.multi)
                score = probes.judge(scored, test_targets, multi=classes.multi, settings=settings)
                about = {'head': head, 'features': name, 'method': method}
                results.append({**about, **score._asdict(), 'num_train': len(train), 'num_test': len(test)})
    return results


def _knn(train, train_targets, test, multi):
    del multi  # Votes are scores for either kind of label.
    neighbours = probes.NearestNeighbours()
    settings = {'k': float(neighbours.num_neighbours), 'temperature': neighbours.temperature}
    return neighbours(train, train_targets, test), settings


def _probe(train, train_targets, test, multi):
    return probes.LinearProbe()(train, train_targets, test, multi=multi)


METHODS = {'knn': _knn, 'probe': _probe}


def retrieve(tables: Tables) -> list[dict[str, Any]]:
    """Both directions between all pairs of modalities, by maps fitted on the training split and by plain cosines.

    Features are of one modality alone: computed from both, they would carry the answer.
    """
    modalities = [m for m in JOINT_ORDER if m in tables['test']['alone']]
    results = []
    for i, first in enumerate(modalities):
        for second in modalities[i + 1 :]:
            pairs = {}
            for role, table in tables.items():
                both = table['present'][first] & table['present'][second]
                pairs[role] = (table['alone'][first][both], table['alone'][second][both])
            if len(pairs['train'][0]) < 2 or not len(pairs['test'][0]):
                logging.warning('Too few clips with %s and %s to look for one by the other.', first, second)
                continue
            mapped, settings = retrieval.CanonicalCorrelation()(pairs['train'], pairs['test'])
            ways = {'canonical correlation': (mapped, settings)}
            plain = retrieval.plain(pairs['train'], pairs['test'])
            if plain is not None:
                ways['cosine'] = (plain, {})
            for method, (pair, chosen) in ways.items():
                for query, candidates, order in ((first, second, 1), (second, first, -1)):
                    results.append(
                        {
                            'query': query,
                            'candidates': candidates,
                            'method': method,
                            'scores': metrics.retrieval(*retrieval.ranks(*pair[::order])),
                            'chance': metrics.retrieval_chance(len(pair[0])),
                            'num_candidates': len(pair[0]),
                            'settings': chosen,
                        }
                    )
    return results
