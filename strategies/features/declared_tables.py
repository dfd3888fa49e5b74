"""Tables of ours that the user's code declares in its own metadata, and which of them an app has."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from sqlalchemy import MetaData, Table

from ..errors import InvalidSetting


class DeclaredTables:
    """The tables of one kind.

    Args:
        usual: The name that one has where no other is given.
        make: Makes one of a name and a schema, in a metadata.
        why: What needs it, for messages.
        setting: Names the one to use.
    """

    def __init__(self, usual: str, make: Callable[[MetaData, str, str | None], Table], why: str, setting: str) -> None:
        self._usual, self._make, self._why, self._setting = usual, make, why, setting
        self._declared: weakref.WeakSet[Table] = weakref.WeakSet()
        self._named: dict[str, Table] = {}  # Those that only the setting names

    def declare(self, metadata: MetaData, name: str, schema: str | None = None) -> Table:
        """Return one as part of the user's metadata: it is used from now on."""
        table = self._make(metadata, name, schema)
        self._declared.add(table)
        return table

    @property
    def names(self) -> list[str]:
        """The names of those that are declared, with their schemas."""
        return sorted(table.fullname for table in list(self._declared))

    def chosen(self, setting: str | None = None) -> Table:
        """Return the one that an app uses.

        Args:
            setting: Its name, with its schema if it has one. None: the one that is declared.
        Raises:
            InvalidSetting: several are declared.
        """
        declared = {table.fullname: table for table in list(self._declared)}
        if setting is None and len(declared) > 1:
            raise InvalidSetting(
                f"{self._why}, and this process declares {len(declared)} tables for it: "
                f"{', '.join(sorted(declared))}. Name the one to use: {self._setting} = {sorted(declared)[0]!r}."
            )
        if setting is None and declared:
            return next(iter(declared.values()))
        name = setting or self._usual
        if name in declared:
            return declared[name]
        if name not in self._named:
            schema, _, short = name.rpartition(".")
            self._named[name] = self._make(MetaData(), short, schema or None)
        return self._named[name]

    def undeclared(self, setting: str | None = None) -> str | None:
        """Say, connecting to nothing, why the database may have no table for an app; None where the code declares it.

        Raises:
            InvalidSetting: several are declared, and the setting names none.
        """
        names = self.names
        name = self.chosen(setting).fullname
        if name in names:
            return None
        if names:
            return f"this process declares {names[0]!r} instead of {name!r}, which is what it writes to"
        return f"nothing in this process declares its table {name!r}"
