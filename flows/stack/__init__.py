"""The local stack: Prefect with its work pool, MLflow, a worker, a watcher and, if asked, a Ray head.

| module | what it owns |
|---|---|
| `plan` | what is to be started, on which ports, and what forbids it |
| `lifecycle` | up and down, in their order |
| `services` | the record of what was started, and where a stack keeps its files |
| `api` | clients of a Prefect server |
| `pool` | work pool, queues with their limits, and the deployments in them |
| `ray_head` | a Ray head that listens on loopback alone and asks for a token |
| `settle` | the final state of a run whose process is gone |
| `watch` | the program that settles every few seconds |

Which process runs a flow run is announced by the run itself (`flows.announced`).

Everything listens on 127.0.0.1 alone, and is ended by its process id after a look at whether it is still that process.
"""
