"""How good are generated digits? Two figures from scikit-learn alone, independent of the project's own evaluation.

* legible: share of images that an SVM, trained on the 1,797 real digits, recognises as their label;
* recall: share of the real digits that lie in the k-nearest-neighbour manifold of the generated ones, in raw pixels
  (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 2). It is near zero for copies of a few legible prototypes.

    python -m tests.digits_quality <URI of an image set> [<first image id> <count>]
"""

from __future__ import annotations

import json
import sys

import numpy as np
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

NEIGHBOURS = 3


def legible(images: np.ndarray, labels: np.ndarray) -> float:
    """Share of `images` (N, 8, 8, 1), uint8, recognised as `labels` (N,), on the digits' own scale of 0 to 16."""
    real = load_digits()
    judge = SVC(gamma=0.001).fit(real.data, real.target)
    return float((judge.predict(_on_the_digits_scale(images)) == labels).mean())


def recall(images: np.ndarray) -> float:
    """Share of the real digits within the manifold of `images` (N, 8, 8, 1), uint8."""
    generated = _on_the_digits_scale(images)
    neighbours = NearestNeighbors(n_neighbors=NEIGHBOURS + 1).fit(generated)
    radii = neighbours.kneighbors(generated)[0][:, -1]  # the nearest neighbour of a point is itself
    real = load_digits().data
    distances = np.linalg.norm(real[:, None, :] - generated[None, :, :], axis=-1)
    return float((distances <= radii[None, :]).any(axis=1).mean())


def _on_the_digits_scale(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), 64).astype(np.float64) * (16 / 255)


def main() -> None:
    from diffusion_core.generation import open_imageset

    uri, *wanted = sys.argv[1:]
    first, count = (int(number) for number in wanted) if wanted else (0, 1000)
    images, labels = open_imageset(uri).read(first, count)
    print(json.dumps({"images": len(images), "legible": legible(images, labels), "recall": recall(images)}))


if __name__ == "__main__":
    main()
