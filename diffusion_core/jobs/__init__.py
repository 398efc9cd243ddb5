"""The Ray programs of the pipeline, one module a stage: `python -m diffusion_core.jobs.<stage> <request URI>`."""
