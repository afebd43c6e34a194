"""A fleet: many tasks or users, one adapter each, trained together, let through gates, kept in the registry."""
