"""The cluster plumbing of jobs. Ray is imported here alone, and only where work begins."""
