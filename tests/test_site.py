"""The documentation site: the tutorial runs, the site builds without a warning, links lead on."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from website import cells

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.py"


def run(folder: Path, text: str) -> str:
    """The page that a file of these cells becomes, run in a process of its own."""
    (folder / "some.py").write_text(text)
    command = [sys.executable, "-m", "website.cells", str(folder / "some.py"), str(folder / "out")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return (folder / "out" / "some.md").read_text()


def test_a_cell_is_code_what_it_printed_and_its_last_value(tmp_path):
    page = run(tmp_path, "# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nprint(1)\n'two'\n")
    assert page == "# Title\n\nText.\n\n```python\nprint(1)\n'two'\n```\n\n```text\n1\n'two'\n```\n"


def test_folded_code_is_shown_on_demand_and_figures_are_files(tmp_path):
    code = "import matplotlib.pyplot as plt\nplt.figure().suptitle('A line')\nplt.show()\n"
    page = run(tmp_path, f"# %% [folded]\n{code}")
    assert page.startswith('<details markdown="1">')
    assert "![A line](some/figure-1.png)" in page
    assert (tmp_path / "out" / "some" / "figure-1.png").read_bytes().startswith(b"\x89PNG")


def test_classes_of_cells_are_found_in_main(tmp_path):
    page = run(tmp_path, "# %%\nclass A: pass\n# %%\nimport __main__\nprint(__main__.A is A)\n")
    assert page.endswith("```text\nTrue\n```\n")


def test_a_failing_cell_names_its_line(tmp_path):
    (tmp_path / "bad.py").write_text("# %% [markdown]\n# Text\n# %%\nx = 1\n1 / 0\n")
    command = [sys.executable, "-m", "website.cells", str(tmp_path / "bad.py"), str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1 and "ZeroDivisionError" in ran.stderr
    assert 'bad.py", line 5' in ran.stderr
    assert not (tmp_path / "bad.md").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("print(1)\n", "page.py has no cell: each begins with a line `# %%`"),
        ("# %% [mardown]\n# x\n", "page.py, line 1: '# %% [mardown]' must be # %%, "),
        ("# %% [markdown]\n# x\ny = 1\n", "page.py, line 3: text must be in comments, not 'y = 1'"),
    ],
)
def test_what_is_no_file_of_cells_is_refused(text, message):
    with pytest.raises(cells.CellError) as refused:
        cells.split(text, "page.py")
    assert message in str(refused.value)


def test_the_tutorial_is_of_cells_and_has_its_five_parts():
    found = cells.split(TUTORIAL.read_text(), TUTORIAL.name)
    text = "\n".join(cell.text for cell in found if cell.kind == "markdown")
    assert len(re.findall(r"^## ", text, re.MULTILINE)) == 5


@pytest.mark.slow
def test_the_tutorial_runs_and_its_numbers_are_right(tmp_path):
    command = [sys.executable, "-m", "website.cells", str(TUTORIAL), str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    page = (tmp_path / "tutorial.md").read_text()
    printed = re.findall(r"^largest difference from .*: (\S+)$", page, re.MULTILINE)
    by_hand, mixtral = map(float, printed)
    assert by_hand < 1e-5 and mixtral < 2e-5
    losses = [float(x) for x in re.findall(r"^step +\d+/60 +loss ([\d.]+)", page, re.MULTILINE)]
    assert len(losses) == 24  # two runs of 12 rows
    assert losses[11] < losses[0] - 2 and losses[23] < losses[12] - 2
    pictures = re.findall(r"!\[\w[^\]]*\]\((\S+)\)", page)
    assert len(pictures) == 5
    assert all((tmp_path / picture).is_file() for picture in pictures)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built with warnings as errors; MkDocs not being there fails."""
    folder = tmp_path_factory.mktemp("site")
    ran = build("website/mkdocs.yml", folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def build(config, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
    return subprocess.run(
        [*command, "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.site
def test_every_link_in_the_site_leads_to_a_file(site):
    pages = [page for page in site.rglob("*.html") if "frame-" not in page.name]
    assert len(pages) > 40
    dead, seen = [], 0
    for page in pages:
        html = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
        for given in re.findall(r'<[^>]*\s(?:href|src)="([^"]*)"', html):
            url = urlsplit(given)
            if url.scheme or not url.path:
                continue
            seen += 1
            # 404.html stands for pages anywhere, so its links begin with a slash.
            start = site if url.path.startswith("/") else page.parent
            if not (start / unquote(url.path).lstrip("/")).exists():
                dead.append((page.relative_to(site).as_posix(), given))
    assert seen > 1000 and dead == []


@pytest.mark.site
def test_nothing_is_loaded_from_elsewhere(site):
    loaded = []
    for page in site.rglob("*.html"):
        loaded += re.findall(
            r'<(?:script|img|iframe|source)[^>]*\ssrc="(?:https?:)?//[^"]*"', page.read_text()
        )
        loaded += [
            link
            for link in re.findall(r"<link[^>]*>", page.read_text())
            if re.search(r'href="(?:https?:)?//', link) and 'rel="canonical"' not in link
        ]
    for sheet in site.rglob("*.css"):
        loaded += re.findall(r"url\(\"?(?:https?:)?//[^)]*\)", sheet.read_text())
    assert loaded == []


@pytest.mark.site
def test_guides_reports_and_docstrings_are_pages(site):
    for file in [*ROOT.glob("docs/*.md"), *ROOT.glob("experiments/results/*/*/REPORT.md")]:
        assert (site / file.relative_to(ROOT)).with_suffix(".html").is_file(), file
    assert "The MoE++ layer as pure functions of arrays" in (site / "api" / "moe.html").read_text()
    for name in ("load", "Model"):
        assert f'id="moepp_jax.api.{name}"' in (site / "api" / "index.html").read_text()
    for name in ("local", "routed", "MoE", "Pool"):
        assert re.search(
            rf'id="moepp_jax\.moe\.(\w+\.)?{name}"', (site / "api" / "moe.html").read_text()
        ), name


@pytest.mark.site
def test_the_menu_calls_each_page_by_a_name_of_its_own(site):
    link = r'<a href="([^"#]+)" class="md-nav__link[^"]*">\s*<span[^>]*>\s*(.*?)\s*<'
    named = dict(re.findall(link, (site / "index.html").read_text(), re.DOTALL))
    assert named["README.zh-CN.html"] == "简体中文"
    assert {"CONTRIBUTING.html", "docs/RUNS.html"} <= named.keys()
    assert "moepp_jax" not in named.values()


@pytest.mark.site
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    pages = ROOT / "website" / "pages"
    (tmp_path / "pages").mkdir()
    for page in pages.rglob("*.*"):
        target = tmp_path / "pages" / page.relative_to(pages)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(page.read_bytes())
    lost = tmp_path / "pages" / "routing_page.md"
    lost.write_text(lost.read_text() + "\n[lost](docs/NOWHERE.md)\n")
    text = (ROOT / "website" / "mkdocs.yml").read_text()
    text = text.replace("docs_dir: pages", f"docs_dir: {tmp_path}/pages")
    text = text.replace("hooks: [hooks.py]", f"hooks: [{ROOT}/website/hooks.py]")
    text = text.replace("[!relative $config_dir/..]", f"[{ROOT}]")
    text = text.replace("paths: [..]", f"paths: [{ROOT}]").replace("watch: [..", "watch: [.")
    text = re.sub(r"^watch: .*$", "", text, flags=re.MULTILINE)
    (tmp_path / "mkdocs.yml").write_text(text)
    ran = build(tmp_path / "mkdocs.yml", tmp_path / "out")
    assert ran.returncode == 1
    assert "'docs/NOWHERE.md'" in ran.stderr
