"""The text that the paper trained on: seven sources and their weights (arXiv 2410.07348).

    moepp data prepare --config=moepp_7b:/corpora
    moepp train --config=moepp_7b:/corpora --workdir=...

`/corpora` is the folder that holds the corpora of PLACES. They are hundreds of GB, to be had from
those who publish them; one that is missing is named, with its place, by the first command that
needs it. Without `:/corpora` a recipe has one source, "text", to be set to text of one's own:
--config.data.sources.text.path=FOLDER.

The paper's 1T-token model saw 900 B tokens of "strategy 1" and then 100 B of "last 100B". That is
two runs, of which the second starts from the first: configs/moepp_7b_1t.py and
configs/moepp_7b_1t_final.py.
"""

from moepp_jax.configs import base

# Where each one is in the folder of corpora: a file, or a folder of files.
PLACES = {
    "redpajama_books": "redpajama/book",
    "redpajama_wikipedia": "redpajama/wikipedia",
    "redpajama_arxiv": "redpajama/arxiv",
    "redpajama_stackexchange": "redpajama/stackexchange",
    "redpajama_c4": "redpajama/c4",
    "dolma": "dolma",
    "pile": "pile",
}

# Per cent of the training tokens, in the order of PLACES.
WEIGHTS = {
    "strategy 1": (4.24, 3.50, 4.37, 3.19, 10.94, 61.28, 12.48),
    "last 100B": (13.93, 9.03, 11.36, 9.77, 7.42, 41.53, 6.96),
}


def sources(folder: str, weights: str = "strategy 1") -> dict[str, dict]:
    """The fields of config.data.sources.

    Args:
      folder: of the corpora; if empty, there is one source, "text", which is the default corpus.
      weights: a key of WEIGHTS.
    """
    if not folder:
        return {"text": base.source("default")}
    return {
        name: base.source(f"{folder.rstrip('/')}/{place}", weight)
        for (name, place), weight in zip(PLACES.items(), WEIGHTS[weights], strict=True)
    }
