"""The tables' versions, one file each in ``versions``, applied by alembic; and what applies them."""
