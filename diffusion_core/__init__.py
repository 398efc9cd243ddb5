"""Train diffusion models on your own images and generate image sets in bulk.

The library under the flows: it is usable without Prefect, and without Ray outside `diffusion_core.jobs`.
"""

__version__ = "0.1.0"
