"""The newest number of every name, so that none is given twice; and an id that a registry's files carry too."""

import secrets

import sqlalchemy as sa
from alembic import op

from lorafleet.registry.tables import sealed

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the tables, and fill them from what there is."""
    names = op.create_table(
        "names",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("newest", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
    )
    registry = op.create_table(
        "registry",
        sa.Column("identity", sa.String(32), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
    )
    connection, newest = op.get_bind(), dict[str, int]()
    for query in ("SELECT name, number FROM versions", "SELECT name, after FROM moves"):
        for name, number in connection.execute(sa.text(query)):
            newest[name] = max(number, newest.get(name, 0))
    op.bulk_insert(names, [sealed({"name": name, "newest": number}) for name, number in newest.items()])
    op.bulk_insert(registry, [sealed({"identity": secrets.token_hex(16)})])
