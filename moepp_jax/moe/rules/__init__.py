"""The routing rules, one a file: `moe/rules/NAME.py` is the rule of type NAME, whole.

A file that is put here is a rule; nothing else names it. One that lies elsewhere is named by its
module and class, "my_package.my_module:MyRule".
"""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from moepp_jax.moe.experts import Pool
from moepp_jax.moe.rule import Rule, RuleError


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(kind: Any) -> type[Rule]:
    """The rule of a type.

    Raises:
      RuleError: there is none.
    """
    if not isinstance(kind, str) or (":" not in kind and kind not in names()):
        near = difflib.get_close_matches(str(kind), names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(map(repr, names()))
        raise RuleError(f"type = {kind!r}: {hint}must be one of {known}, or 'MODULE:CLASS'")
    if ":" not in kind:
        module = importlib.import_module(f"{__name__}.{kind}")
        own = [c for _, c in inspect.getmembers(module, inspect.isclass) if _of(c, module)]
        if len(own) != 1:
            raise RuleError(f"{module.__file__} must have one rule, and has {len(own)}")
        return own[0]
    module, _, name = kind.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module is its user's: anything may be wrong in it
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            why += "; it is looked for in the current folder, on PYTHONPATH and among packages"
        raise RuleError(f"type = {kind!r} cannot be imported: {why}") from error
    if not (inspect.isclass(found) and issubclass(found, Rule)):
        raise RuleError(f"type = {kind!r} is no subclass of moepp_jax.moe.Rule")
    return found


def make(kind: str, pool: Pool, **options: Any) -> Rule:
    """A rule with some of its options: make("moepp", Pool(8, 2, 1, 1), tau=0.5).

    Raises:
      RuleError: the type or an option is unknown, ill-typed, out of range or does not fit the pool.
    """
    rule = find(kind)
    known = rule.options()
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise RuleError(f"{name} = {value!r} is no option of {kind!r}: {hint}")
    return rule(pool=pool, **rule.typed(options))


def parse(fields: Mapping[str, Any], pool: Pool) -> Rule:
    """The rule of a recipe: `make` of a dictionary of its type and options."""
    if "type" not in fields:
        raise RuleError(f"type is missing: it is one of {', '.join(map(repr, names()))}")
    return make(pool=pool, **{"kind" if n == "type" else n: v for n, v in fields.items()})


def fields_of(rule: Rule) -> dict[str, Any]:
    """What `parse` makes this rule of: its type and every option."""
    module, _, name = type(rule).__module__.rpartition(".")
    kind = name if module == __name__ else f"{type(rule).__module__}:{type(rule).__qualname__}"
    return {"type": kind} | {option: getattr(rule, option) for option in rule.options()}


def _of(found: type, module: Any) -> bool:
    return issubclass(found, Rule) and found.__module__ == module.__name__
