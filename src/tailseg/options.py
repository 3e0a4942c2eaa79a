"""What a person may choose, checked: names with suggestions, and keyword-only arguments as options."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import pydantic

_STRICT = pydantic.ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class OptionError(ValueError):
    """A name, key or value that a person gave and that does not fit; the text says the rule and the way out."""


def suggest(name: str, known: Iterable[str]) -> str:
    """'Did you mean ...?' when something known is close, else the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    # close matches miss transposed short names ('dch'), which share their letters
    close = close or [known_name for known_name in names if sorted(known_name) == sorted(name)]
    return f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(names) or 'none'}."


def explain(error: pydantic.ValidationError, what: str, known: Iterable[str] = ()) -> OptionError:
    """A pydantic error in one line per problem, each naming the key; what is the owner of the keys."""
    lines = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{what} has no option '{key}'. {suggest(key.rpartition('.')[2], known)}")
        elif problem["type"] == "missing":
            lines.append(f"{what} needs '{key}', which is not set.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            where = f"{what} {key}" if key else what
            lines.append(f"{where}: {message} (got {problem['input']!r})")
    return OptionError("\n".join(lines))


@cache
def options_model(make: Callable[..., Any]) -> type[pydantic.BaseModel]:
    """The keyword-only arguments of a class or function with their types and defaults, as a pydantic model."""
    function = make.__init__ if inspect.isclass(make) else make
    hints = typing.get_type_hints(function)
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    return pydantic.create_model(f"{make.__name__}Options", __config__=_STRICT, **fields)


def check_options(make: Callable[..., Any], given: Mapping[str, Any], reserved: Iterable[str] = ()) -> dict[str, Any]:
    """The options of make with defaults filled in and types checked.

    reserved: keyword-only arguments that the engine sets and a person may not.
    Raises OptionError naming the option, the rule and the nearest known name.
    """
    model = options_model(make)
    known = set(model.model_fields) - set(reserved)
    for name in given:
        if name not in known:
            raise OptionError(f"{make.__name__} has no option '{name}'. {suggest(name, known)}")
    try:
        checked = model.model_validate(dict(given))
    except pydantic.ValidationError as error:
        raise explain(error, make.__name__, known) from None
    return {name: getattr(checked, name) for name in model.model_fields if name in known}
