"""Several engines behind one API: what a fleet needs beside one process, without a word of what carries its calls."""
