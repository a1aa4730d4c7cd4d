"""What alembic runs around the versions: kser.storage.migrate gives it the connection and the names."""

from alembic import context

_given = context.config.attributes

context.configure(
    connection=_given["connection"],
    version_table=_given["version_table"],
    # All steps or none: the connection is inside a transaction already, on sqlite too.
    transactional_ddl=True,
    transaction_per_migration=False,
)
context.run_migrations()
