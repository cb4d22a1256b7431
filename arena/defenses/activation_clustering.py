"""Activation clustering: what one class's inputs look like inside falls into two clusters.

The features of inputs that the model gives one answer are reduced by independent component analysis
and split in two by k-means; the smaller cluster is suspected.

Source: Chen et al. 2018, https://arxiv.org/abs/1811.03728; 20 components as in SDRM (Xia et al.
    2022), which also uses levels below the last one. Analysis and clustering: scikit-learn.
Departs: k-means also starts from the best split along each principal direction. Reduced features
    have variance 1 along every component, so that a few far inputs attract random starts: with 100
    inputs of a model with a patch backdoor ten of them ended far from the true split, which is
    tighter. The tightest clusters count, as in the source; more starts find fainter backdoors.
    Exclusionary reclassification and silhouette scores, the other ways to choose a cluster,
    are not offered. Features are flattened, not averaged over pixels, as in SDRM. Fewer components
    are used where there are fewer than twice as many inputs.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from arena.core.contracts import Images
from arena.core.detection import flat_features
from arena.core.models import Classifier
from arena.core.registry import BadInput, method, param
from arena.core.seeding import draw_seed


@method
class ActivationClustering:
    rule: ClassVar[str] = "clusters"  # how scores become flags, see arena.detecting

    level: str = param(
        "deep", "feature level", choices=("shallow", "middle", "deep"), source="deep: Chen et al."
    )
    components: int = param(20, "independent components", low=1, source="SDRM; Chen et al. 10")

    starts: int = param(
        10, "random starts of k-means", low=1, source="scikit-learn's default, in those years"
    )
    principal: bool = param(
        True,
        "k-means also starts from the best split along each principal direction",
        source="SDRM: no",
    )

    def score(self, model: Classifier, x: Tensor, clean: Images, rng: Generator) -> Tensor:
        """(N,) 1 in the smaller cluster, 0 in the larger one. Raises BadInput below 4 inputs."""
        from sklearn.decomposition import FastICA
        from sklearn.exceptions import ConvergenceWarning

        if len(x) < 4:
            raise BadInput(f"activation_clustering needs 4 inputs or more, got {len(x)}.")
        found = flat_features(model, x, self.level).double().cpu()
        seed = draw_seed(rng) % 2**32
        principal = leading(found, min(self.components, len(x) // 2))
        if not principal.shape[1]:
            return torch.zeros(len(x))  # inputs that are all alike inside have no clusters
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # usual, and harmless to clusters
            analysis = FastICA(whiten="unit-variance", max_iter=1000, random_state=seed)
            reduced = analysis.fit_transform(principal.numpy())
        directions = principal if self.principal else principal[:, :0]
        clusters = torch.from_numpy(
            split_in_two(reduced, directions.numpy(), self.starts, seed)
        ).bool()
        smaller = clusters if clusters.sum() * 2 <= len(x) else ~clusters
        return smaller.float()


def leading(points: Tensor, count: int) -> Tensor:
    """(N, K) coordinates of (N, D) points along their K <= `count` principal directions, of those
    along which they differ: all that whitening to so many dimensions looks at. By way of the (N, N)
    products, since there are far more features than inputs."""
    centred = points - points.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    differ = values > 1e-10 * values[0].clamp_min(1e-30)
    return (vectors * values.clamp_min(0).sqrt())[:, differ]


def split_in_two(points: Any, directions: Any, starts: int, seed: int) -> Any:
    """(N,) 0 or 1: the tightest two clusters of `points` (N, K) that k-means finds.

    directions: (N, D) coordinates along which starts are looked for beside the random ones.
    """
    import numpy as np
    from sklearn.cluster import KMeans

    tries = [KMeans(2, n_init=starts, random_state=seed).fit(points)]
    for column in directions.T:
        start = KMeans(2, n_init=1, random_state=seed).fit_predict(column[:, None])
        centres = np.stack([points[start == label].mean(0) for label in (0, 1)])
        tries.append(KMeans(2, init=centres, n_init=1).fit(points))
    return min(tries, key=lambda one: one.inertia_).labels_
