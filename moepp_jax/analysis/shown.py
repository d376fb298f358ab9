"""How texts were routed, for Python users: `moepp_jax.load(workdir).routing(text)`."""

from __future__ import annotations

import dataclasses
import html
import os
from pathlib import Path

from moepp_jax.analysis import page, record, report
from moepp_jax.analysis.record import Record


@dataclasses.dataclass(frozen=True)
class Routing:
    """A record of texts; in a notebook it shows itself as the routing page.

    Attributes:
      record: tokens, and how each was routed: see `moepp_jax.analysis.record`.
    """

    record: Record

    def html(self, against: Routing | None = None) -> str:
        """The routing page, one file that needs no other.

        Args:
          against: of another model on the same texts, to be shown beside it.

        Raises:
          ConfigError: the other's tokens are not the same.
        """
        return page.build([self.record] if against is None else [self.record, against.record])

    def save(self, file: str | os.PathLike) -> None:
        """As a routing.parquet, which `main analyze --redraw` and pandas read."""
        record.write(file, self.record.meta, [self.record.rows])

    def report(self, folder: str | os.PathLike) -> Path:
        """Writes tables, figures and REPORT.md; returns the latter's file."""
        return report.write(Path(folder), [self.record], "moepp_jax.load(...).routing(...)")

    def _repr_html_(self) -> str:
        # A frame of its own: the page's styles and scripts stay out of the notebook's.
        return (
            '<iframe style="width:100%;height:640px;border:0" title="Routing of the text" '
            f'sandbox="allow-scripts" srcdoc="{html.escape(self.html(), quote=True)}"></iframe>'
        )

    def __repr__(self) -> str:
        one, meta = self.record, self.record.meta
        return (
            f"Routing({meta.name}, step {meta.step}: {one.num_tokens:,} tokens, "
            f"{one.ffn.mean():.3f} FFN experts a token)"
        )
