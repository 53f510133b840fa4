"""The methods, a file a family. A class with a name is a method; nothing else has to be told of it."""
