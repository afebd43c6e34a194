"""The registry: adapters as immutable revisions under names, with versions, aliases, lineage and scores."""
