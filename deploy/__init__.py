"""How the service is operated; only `deploy.ray` is Python."""
