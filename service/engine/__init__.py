"""The engine: a worker thread that owns the model and the pool."""
