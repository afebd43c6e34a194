"""The registry's tables as they grew, run by Alembic."""
