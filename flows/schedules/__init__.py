"""Schedules: what runs by itself, when, and with what that differs from a preset.

| module | |
|---|---|
| `config` | a schedule as configuration: a YAML file, or the options of `diffusion schedule add` |
| `runs` | the flows that a schedule starts: pipeline, generate, prune |
| `watch` | the flow that looks at a folder or prefix and makes a dataset version of what is new in it |
| `replace` | the flow that cancels the last run and starts the next one |
| `server` | schedules as deployments of a Prefect server: add, list, pause, resume, remove |
| `cli` | `diffusion schedule` |
"""
