"""Recipes by name, from anywhere, and `~` where no shell expands it."""

import subprocess

import pytest

from moepp_jax import main, recipes
from moepp_jax.commands import completion
from moepp_jax.config import Config
from moepp_jax.configs import tiny
from moepp_jax.errors import ConfigError

TINY = str(recipes.FOLDER / "tiny.py")


@pytest.mark.parametrize(
    ("given", "file"),
    [
        ("tiny", TINY),
        ("tiny:moe", f"{TINY}:moe"),
        ("configs/tiny.py", TINY),  # what the documents write, in another folder
        ("tiny.py", TINY),
        ("routing/zeda", str(recipes.FOLDER / "routing" / "zeda.py")),
        ("~/own.py:x", "HOME/own.py:x"),
        ("run:~/runs/x", f"{recipes.FOLDER / 'run.py'}:HOME/runs/x"),
        ("own.py:a:b", "own.py:a:b"),
    ],
)
def test_a_recipe_is_a_file_or_a_name(given, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.py").touch()
    assert recipes.with_file(given) == file.replace("HOME", str(tmp_path))


def test_a_file_of_ones_own_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").touch()
    assert recipes.with_file("tiny:moe") == "tiny:moe"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("tny", "--config=tny: .* no such recipe; did you mean tiny?"),
        ("base", "no such recipe"),  # holds fields, and is no recipe
        ("nothing/like/it.py", "`moepp recipes` lists them"),
    ],
)
def test_no_recipe(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        recipes.with_file(given)


def test_every_recipe_says_what_it_is():
    assert {"tiny", "english", "run", "moepp_7b", "moe_7b", "routing/remoe"} <= set(recipes.names())
    for name in recipes.names():
        assert 10 < len(recipes.summary(name)) < 100


def test_tilde_is_the_users_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    c = tiny.get_config()
    c.data.dir, c.data.sources.text["path"] = "~/data", "~/corpus"
    data = Config.parse(c).data
    assert (data.dir, data.sources["text"].path) == ("/home/someone/data", "/home/someone/corpus")


def completed(*words: str) -> list[str]:
    """What the shell offers when Tab is pressed behind these words, as it breaks them."""
    there = " ".join(f"'{word}'" for word in words)
    asked = f"COMP_WORDS=({there}); COMP_CWORD={len(words) - 1}; _moepp; echo ${{COMPREPLY[*]}}"
    script = f"{completion.script()}\n{asked}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


def test_the_shell_completes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert completed("moepp", "tr") == ["train"]
    assert set(main.COMMANDS) < set(completed("moepp", ""))
    assert completed("moepp", "data", "ver") == ["verify"]
    assert completed("moepp", "train", "--init_o") == ["--init_optimizer"]
    assert completed("moepp", "train", "--workd") == ["--workdir="]
    assert completed("moepp", "evaluate", "--init") == []  # another command's
    assert completed("moepp", "train", "--config", "=", "routing/z") == ["routing/zeda"]
    assert completed("moepp", "train", "--config", "=") == [*recipes.names(), "runs"]
    assert completed("moepp", "train", "--config.moe.rule.ta") == ["--config.moe.rule.tau="]
    assert completed("moepp", "evaluate", "--workdir", "=", "r") == ["runs"]
