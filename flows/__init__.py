"""Thin Prefect flows over the jobs, and the `diffusion` command. The only package that imports Prefect."""
