"""Bringing the tables of a storage to a version, by alembic."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from kser.errors import ConfigurationError
from kser.storage.schema import Tables

__all__ = ["current_version", "newest_version", "uninstall", "upgrade"]


def upgrade(connection: Connection, tables: Tables, version: str = "head") -> None:
    """Bring the tables to the newest version, or to one on the way there, inside the connection's transaction.

    Raises ConfigurationError for a version that this release of kser does not know.
    """
    _alone(connection, tables)
    config = _config()
    current = current_version(connection, tables)
    if current is not None and current not in {found.revision for found in _scripts().walk_revisions()}:
        raise ConfigurationError(
            f"The tables have version {current}, which this release of kser does not know: upgrade kser here"
        )
    config.attributes |= {
        "connection": connection,
        "prefix": tables.prefix,
        "version_table": tables.version_name,
    }
    command.upgrade(config, version)


def current_version(connection: Connection, tables: Tables) -> str | None:
    """The version the tables have; None when there are none."""
    context = MigrationContext.configure(connection, opts={"version_table": tables.version_name})
    return context.get_current_revision()


def newest_version() -> str:
    """The version this release of kser needs."""
    head = _scripts().get_current_head()
    assert head is not None
    return head


def uninstall(connection: Connection, tables: Tables) -> None:
    """Drop the tables, inside the connection's transaction."""
    _alone(connection, tables)
    tables.metadata.drop_all(connection)
    connection.execute(text(f'DROP TABLE IF EXISTS "{tables.version_name}"'))


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    folder = Path(__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    return config


def _alone(connection: Connection, tables: Tables) -> None:
    """Wait for another process that does the same. sqlite has one writer anyhow."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": tables.version_name})
