"""The HTTP edge: routes, schemas, errors and streams. The rest is reached through `service.engine.interface`."""
