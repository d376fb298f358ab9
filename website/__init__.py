"""The documentation site: what MkDocs is told (mkdocs.yml), and how the tutorial becomes a page."""
