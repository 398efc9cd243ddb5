"""The Ray programs of the pipeline, one module a stage, each runnable as `python -m diffusion_core.jobs.<stage> <request URI>`."""
