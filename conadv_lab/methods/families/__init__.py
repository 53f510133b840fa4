"""The methods, one file per family. A class with a ``name`` is a method; it needs no further registration."""
