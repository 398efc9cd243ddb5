"""How a stage runs as a program: its request and result, where it runs, and the Ray cluster under it."""
