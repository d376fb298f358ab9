"""A record made up for tests: English words whose routing depends on what they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from moepp_jax.analysis.record import Meta, Record, Rows

WORDS = ("the", "of", "a", "touch", "needed", "got", "coffee", "week", "house", "quickly", "green")
WORDS += ("ran", "jumped", "pper", "ts", "ing", "\n", ".", ",", "é")
SPECIAL = {0: "<pad>", 1: "<s>", 2: "</s>"}
PIECES = ["", "", "", *(" " + word for word in WORDS)]


def pieces() -> tuple[str, ...]:
    """Ids 0 to 2 have no text, then each word after a space, then every byte by itself."""
    words = [text.encode().decode("latin-1") for text in PIECES]
    return (*words, *(chr(byte) for byte in range(256)))


def meta(**changes: Any) -> Meta:
    values: dict[str, Any] = dict(
        name="tiny",
        step=700,
        rule={"type": "moepp", "top_k": 2, "tau": 0.75, "residual": "logits"},
        counts=(8, 2, 1, 1),
        most=2,
        layers=(1, 2, 3, 4),
        pieces=pieces(),
        special=SPECIAL,
        sources={"wikipedia": "source", "king_james": "source", "arc_easy": "task"},
        wanted=1.2,
        machine="CPU, 2 cores",
    )
    return Meta(**(values | changes))


def record(tokens: int = 3000, seed: int = 0, length: int = 64, **changes: Any) -> Record:
    """Documents of `length` tokens; the routing of a token leans on its id, layer and source."""
    about, rng = meta(**changes), np.random.default_rng(seed)
    N, K, J = about.num_experts, about.most, len(about.layers)
    place = np.arange(tokens) % length
    token = np.where(place == 0, 1, rng.integers(3, len(PIECES), tokens)).astype(np.int32)
    source = (np.arange(tokens) * len(about.sources) // tokens).astype(np.int16)
    # What is fixed for a token's id, the same whatever the seed.
    taste = np.random.default_rng(7).normal(size=(J, len(about.pieces), N))
    logits = taste[:, token] + 0.3 * rng.normal(size=(J, tokens, N))
    logits[..., : about.counts[0]] += 0.5
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    experts = np.argsort(-p, axis=-1)[..., :K].astype(np.uint8)
    best = np.take_along_axis(p, experts.astype(np.int64), axis=-1)
    loss = rng.gamma(4.0, 1.2, tokens).astype(np.float32)
    loss[np.append(place[1:] == 0, True)] = np.nan
    rows = Rows(
        token=token,
        source=source,
        document=(np.arange(tokens) // length).astype(np.int32),
        position=place.astype(np.int32),
        place=place.astype(np.int32),
        loss=loss,
        experts=experts,
        gates=best.astype(np.float32),
        kept=rng.random((J, tokens, K)) > 0.02,
        scores=best[..., :2].astype(np.float32),
        entropy=-np.sum(p * np.log(p), axis=-1).astype(np.float32),
    )
    return Record(about, rows)
