"""Benchmarks: the model behind EleutherAI's lm-evaluation-harness, and the paper's tasks.

`scoring` and `requests` are ours alone; `model`, `suite` and `__main__` need the package `lm_eval`
(the extra `eval`).
"""
