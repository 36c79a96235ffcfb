"""A TOML file of a person's with some keys set, and everything else as it was: comments, order, spaces.

toml.with_keys(text, "serving", {"workers": 2})
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import InlineTable, Table

from marwright.errors import SettingsError

Value = str | int | float | bool


def with_keys(text: str, table: str, values: Mapping[str, Value], *, without: Collection[str] = ()) -> str:
    """`text` with `values` in `[table]`, which is made where it lacks, and `without` those keys. What says so already
    is not touched.

    SettingsError where the text is not TOML, or could not be changed without changing more.
    """
    try:
        wanted = tomllib.loads(text)
        document = tomlkit.parse(text)
        section = document.get(table)
        if section is None:
            section = tomlkit.table()
            document[table] = section
        if not isinstance(section, Table | InlineTable):
            section = document[table]
        for key, value in values.items():
            if key not in section or section[key] != value or type(wanted[table][key]) is not type(value):
                section[key] = value
        wanted.setdefault(table, {}).update(values)
        for key in without:
            if wanted[table].pop(key, None) is not None:
                del section[key]
        changed = tomlkit.dumps(document)
        right = tomllib.loads(changed) == wanted
    except (tomllib.TOMLDecodeError, TOMLKitError, TypeError, AttributeError) as error:
        raise SettingsError(f"not TOML that can be changed: {error}", hint="set the keys by hand") from None
    if not right:
        lines = ", ".join(f"{key} = {value}" for key, value in values.items())
        raise SettingsError(f"[{table}] cannot be changed without changing more", hint=f"set them by hand: {lines}")
    return changed
