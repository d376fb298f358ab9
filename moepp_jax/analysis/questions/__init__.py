"""The questions that `main analyze` answers, one a file."""
