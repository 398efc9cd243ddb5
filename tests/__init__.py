"""The test suite, and the helpers that its parts share."""
