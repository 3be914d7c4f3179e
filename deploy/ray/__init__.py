"""A fleet of engines on Ray Serve. Inside this package, `ray` is the library: imports are absolute."""
