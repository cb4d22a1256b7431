"""Activation clustering: what one class's inputs look like inside falls into two clusters.

The features of inputs that the model gives one answer are reduced by independent component analysis
and split in two by k-means; the smaller cluster is suspected.

Source: Chen et al. 2018, https://arxiv.org/abs/1811.03728; 20 components as in SDRM (Xia et al.
    2022), which also uses levels below the last one. Analysis and clustering: scikit-learn.
Departs: exclusionary reclassification and silhouette scores, the other ways to choose a cluster,
    are not offered. Features are flattened, not averaged over pixels, as in SDRM. Fewer components
    are used where there are fewer than twice as many inputs.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

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

    def score(self, model: Classifier, x: Tensor, clean: Images, rng: Generator) -> Tensor:
        """(N,) 1 in the smaller cluster, 0 in the larger one. Raises BadInput below 4 inputs."""
        from sklearn.cluster import KMeans
        from sklearn.decomposition import FastICA
        from sklearn.exceptions import ConvergenceWarning

        if len(x) < 4:
            raise BadInput(f"activation_clustering needs 4 inputs or more, got {len(x)}.")
        found = flat_features(model, x, self.level).double().cpu().numpy()
        seed = draw_seed(rng) % 2**32
        parts = min(self.components, len(x) // 2, found.shape[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # usual, and harmless to clusters
            analysis = FastICA(parts, whiten="unit-variance", max_iter=1000, random_state=seed)
            reduced = analysis.fit_transform(found)
        clusters = torch.from_numpy(
            KMeans(2, n_init=10, random_state=seed).fit_predict(reduced)
        ).bool()
        smaller = clusters if clusters.sum() * 2 <= len(x) else ~clusters
        return smaller.float()
