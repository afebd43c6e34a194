"""An id that a registry's files carry too."""

import secrets

import sqlalchemy as sa
from alembic import op

from lorafleet.registry.tables import sealed

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make one."""
    registry = op.create_table(
        "registry",
        sa.Column("identity", sa.String(32), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sqlite_with_rowid=False,
    )
    op.bulk_insert(registry, [sealed({"identity": secrets.token_hex(16)})])
