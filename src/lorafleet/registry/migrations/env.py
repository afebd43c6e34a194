"""What Alembic runs: the migrations, on the connection and in the transaction of :mod:`lorafleet.registry.database`."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
