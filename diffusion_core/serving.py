"""The model as MLflow serves it ("models from code"): MLflow runs this file to make the model, so nothing is pickled.

    model = mlflow.pyfunc.load_model("models:/digits@champion")
    images = model.predict(pandas.DataFrame({"label": [3, 7]}), params={"guidance_scale": 2.0, "seed": 1})

Rows have `label` (the class number; models without classes have none), and if wanted `image_id` (default: the row's
number) and `seed`. The answer is uint8 (N, H, W, C). An image depends on its label, image id, seed and the parameters
alone, not on the other rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pandas
from mlflow.pyfunc.model import PythonModel

if TYPE_CHECKING:
    from mlflow.pyfunc.model import PythonModelContext


class DiffusionModel(PythonModel):
    """A bundle behind MLflow's `predict`."""

    def load_context(self, context: PythonModelContext) -> None:
        import torch

        from diffusion_core.bundle import load_bundle

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.bundle = load_bundle(context.artifacts["bundle"], self.device)
        self.defaults = dict(context.model_config)

    def predict(self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        """Images (N, H, W, C) uint8 for the rows of `model_input`."""
        options = {"seed": 0, **self.defaults, **(params or {})}
        count = len(model_input)
        ids = self._column(model_input, "image_id", np.arange(count))
        seeds = self._column(model_input, "seed", np.full(count, int(options["seed"])))
        labels = self._labels(model_input)
        images = np.zeros((count, *self.bundle.config.image_shape), dtype=np.uint8)
        for seed in np.unique(seeds):
            rows = np.flatnonzero(seeds == seed)
            generator = self._generator(int(seed), options)
            images[rows] = generator.images(ids[rows], None if labels is None else labels[rows])
        return images

    def _generator(self, seed: int, options: dict[str, Any]) -> Any:
        from diffusion_core.generation.config import GenerationConfig
        from diffusion_core.generation.worker import Generator

        sampler = {**options["sampler"], "steps": options.get("steps", options["sampler"]["steps"])}
        config = GenerationConfig.model_validate(
            {
                "sampler": sampler,
                "guidance": {"scale": options["guidance_scale"]},
                "seed": seed,
                "batch_size": options["batch_size"],
            }
        )
        return Generator(self.bundle, config, self.device)

    def _labels(self, rows: pandas.DataFrame) -> np.ndarray | None:
        names = self.bundle.config.class_names
        if not names:
            return None
        if "label" not in rows:
            raise ValueError(f"This model needs the column label: a class number from 0 to {len(names) - 1}.")
        labels = rows["label"].to_numpy(dtype=np.int64)
        wrong = labels[(labels < 0) | (labels >= len(names))]
        if len(wrong):
            raise ValueError(f"label: {wrong[0]} is not a class; accepted are 0 to {len(names) - 1}.")
        return labels

    @staticmethod
    def _column(rows: pandas.DataFrame, name: str, default: np.ndarray) -> np.ndarray:
        if name not in rows:
            return default.astype(np.int64)
        values = rows[name].fillna(dict(enumerate(default))) if rows[name].hasnans else rows[name]
        numbers = values.to_numpy(dtype=np.int64)
        if (numbers < 0).any():
            raise ValueError(f"{name}: {numbers.min()} is not accepted: it must not be negative.")
        return numbers


mlflow.models.set_model(DiffusionModel())
