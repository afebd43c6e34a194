"""What Alembic runs: the migrations, on the connection and in the transaction of :mod:`lorafleet.registry.database`."""

from alembic import context

given = context.config.attributes
context.configure(
    connection=given["connection"], version_table=given["version_table"], version_table_pk=False, transactional_ddl=True
)
with context.begin_transaction():
    context.run_migrations()
